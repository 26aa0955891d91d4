//! Slots, polling, dispatch, drain. Owns what is running.
//!
//! [`attempt::attempt`] is the path of one task. [`Engine::run`] polls for leases while slots are
//! free and stops in two steps: first nothing new is leased and running tasks may end, then they are
//! cancelled.

mod attempt;
mod backoff;

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::Semaphore,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    leases::{LeaseError, LeaseSource},
    model::{Lease, Phase, StatusBoard, millis},
    outbox::Outbox,
    plugins::Plugins,
    session::Sessions,
    storage::Storage,
};
use backoff::Backoff;

/// How long a stop waits for the answer to a poll under way. A lease that comes later expires and
/// goes to another node.
const LAST_POLL: Duration = Duration::from_secs(5);

/// What the engine works with.
pub struct Rooms {
    /// Where leases come from.
    pub source: Arc<dyn LeaseSource>,
    /// Keeps them.
    pub sessions: Sessions,
    /// Moves data.
    pub storage: Storage,
    /// Keeps reports until they are accepted.
    pub outbox: Outbox,
    /// Runs code.
    pub plugins: Arc<Plugins>,
    /// Shows what is running.
    pub board: StatusBoard,
    /// Moves data and waits for runners, whose work may keep its threads busy.
    pub workers: Handle,
}

/// How the engine is paced.
#[derive(Clone, Debug)]
pub struct Config {
    /// Tasks at once.
    pub slots: usize,
    /// Bounds of the pause after an empty poll.
    pub poll_backoff: (Duration, Duration),
    /// How long running tasks may go on after the first stop.
    pub drain_timeout: Duration,
    /// How long a cancelled runner may take.
    pub cancel_grace: Duration,
}

/// How a stop is asked for.
#[derive(Clone, Default)]
pub struct Stops {
    /// Lease nothing new; let running tasks end within the drain timeout.
    pub drain: CancellationToken,
    /// Cancel what is running.
    pub cancel: CancellationToken,
}

impl Stops {
    /// Ends some time after the first stop, or with the second one.
    async fn out_of_patience(&self) {
        self.drain.cancelled().await;
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = tokio::time::sleep(LAST_POLL) => {}
        }
    }
}

/// How the engine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every task came to its own end.
    Drained,
    /// Tasks were cancelled because time ran out or a second signal came, or reports are left.
    CutShort,
}

/// See the module's text.
pub struct Engine {
    rooms: Arc<Rooms>,
    config: Config,
    slots: Arc<Semaphore>,
    attempts: JoinSet<()>,
}

/// What became of one poll.
enum Polled {
    Lease(Box<Lease>),
    /// Nothing to do now.
    Pause,
    /// The plane wants us to end something first.
    Busy,
}

impl Engine {
    /// An engine that has not started.
    #[must_use]
    pub fn new(rooms: Rooms, config: Config) -> Self {
        let slots = Arc::new(Semaphore::new(config.slots));
        Self { rooms: Arc::new(rooms), config, slots, attempts: JoinSet::new() }
    }

    /// Polls and runs until told to stop and everything has ended. Spawn it on the runtime that
    /// drives the sessions: a poll, its lease and the first heartbeat then need no other thread.
    pub async fn run(mut self, stops: Stops) -> Ended {
        let (low, high) = self.config.poll_backoff;
        let mut backoff = Backoff::new(low, high);
        // The slot is taken before polling: a lease we hold can always be run.
        while let Some(permit) = self.free_slot(&stops).await {
            let polled = self.poll(&stops).await;
            let pause = match polled {
                Polled::Lease(lease) => {
                    backoff.reset();
                    let session = self.rooms.sessions.open(*lease); // heartbeats start
                    let (rooms, grace) = (Arc::clone(&self.rooms), self.config.cancel_grace);
                    let attempt = attempt::attempt(rooms, permit, session, grace, stops.cancel.clone());
                    self.attempts.spawn(attempt);
                    continue;
                }
                Polled::Pause => backoff.next(),
                Polled::Busy => {
                    drop(permit);
                    if !self.attempts.is_empty() {
                        tokio::select! {
                            () = stops.drain.cancelled() => {}
                            Some(ended) = self.attempts.join_next() => look_at(ended),
                        }
                        continue;
                    }
                    backoff.next()
                }
            };
            debug!(retry_in_ms = millis(pause), "no work");
            tokio::select! {
                () = stops.drain.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
                // After a finished task the next poll follows at once.
                Some(ended) = self.attempts.join_next() => look_at(ended),
            }
        }
        self.drain(&stops).await
    }

    /// A permit, or `None` once no more work should be taken. Where too many reports wait for the
    /// plane it takes no work either: finished tasks would pile up without bound.
    async fn free_slot(&mut self, stops: &Stops) -> Option<tokio::sync::OwnedSemaphorePermit> {
        let outbox = self.rooms.outbox.clone();
        loop {
            let room = outbox.has_room();
            tokio::select! {
                biased;
                () = stops.drain.cancelled() => return None,
                Some(ended) = self.attempts.join_next() => look_at(ended),
                // The task whose slot this was may have filled the outbox.
                permit = Arc::clone(&self.slots).acquire_owned(), if room => if outbox.has_room() {
                    return Some(permit.expect("the slots are never closed"));
                },
                () = outbox.until_room(), if !room => {}
            }
        }
    }

    async fn poll(&self, stops: &Stops) -> Polled {
        // Dropped midway only when a stop runs out of patience: the plane may have given us a lease.
        let taken = tokio::select! {
            biased;
            taken = self.rooms.source.take() => taken,
            () = stops.out_of_patience() => return Polled::Pause,
        };
        if taken.is_ok() {
            self.rooms.outbox.plane_answers();
        }
        match taken {
            Ok(Some(lease)) => self.admit(lease),
            Ok(None) => Polled::Pause,
            Err(LeaseError::Busy) => Polled::Busy,
            Err(err) => {
                if !stops.drain.is_cancelled() {
                    warn!(error = %err, "poll failed");
                }
                Polled::Pause
            }
        }
    }

    /// Leases that are over before they begin are neither run nor reported.
    fn admit(&self, lease: Lease) -> Polled {
        let (task, capability) = (lease.task, &lease.capability);
        if lease.cancelled {
            info!(task_id = %task, capability = %capability, "lease skipped, it came already cancelled");
            return Polled::Pause;
        }
        if lease.expires_at.is_some_and(|expiry| expiry <= jiff::Timestamp::now()) {
            warn!(task_id = %task, capability = %capability, "lease skipped, it came already expired");
            return Polled::Pause;
        }
        self.rooms.board.began(&lease);
        Polled::Lease(Box::new(lease))
    }

    /// Waits for the running tasks, first patiently, then with a cancel.
    async fn drain(mut self, stops: &Stops) -> Ended {
        self.rooms.board.change(|status| status.phase = Phase::Draining);
        if !self.attempts.is_empty() {
            info!(tasks = self.attempts.len(), limit_ms = millis(self.config.drain_timeout), "draining");
        }
        let mut ended = Ended::Drained;
        let patience = tokio::time::sleep(self.config.drain_timeout);
        tokio::pin!(patience);
        loop {
            tokio::select! {
                // What has ended is seen first: with DRAIN_TIMEOUT=0 an idle node is not cut short.
                biased;
                next = self.attempts.join_next() => match next {
                    Some(end) => look_at(end),
                    None => break,
                },
                () = &mut patience, if ended == Ended::Drained => {
                    ended = Ended::CutShort;
                    stops.cancel.cancel();
                }
                () = stops.cancel.cancelled(), if ended == Ended::Drained => ended = Ended::CutShort,
            }
        }
        self.rooms.board.change(|status| status.phase = Phase::Stopped);
        ended
    }
}

/// An attempt settles its lease itself; only a bug of ours surfaces here.
fn look_at(ended: Result<(), JoinError>) {
    if let Err(err) = ended {
        error!(error = %err, "an attempt ended unexpectedly");
    }
}
