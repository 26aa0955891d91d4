//! Slots, polling, dispatch, drain. Owns what is running.
//!
//! [`attempt::attempt`] is the path of one task. [`Engine::run`] polls for leases while slots are
//! free and stops in two steps: first nothing new is leased and running tasks may end, then they are
//! cancelled.

mod attempt;
mod pace;

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::{
    leases::{Advice, LeaseError, LeaseSource},
    model::{CancelReason, Grant, Lease, Moment, Outcome, Phase, Setup, StatusBoard, TaskId, millis},
    plugins::Plugins,
    session::Sessions,
    storage::Storage,
};
use pace::{Pace, Worth};

/// How long a stop waits for the answer to a poll under way. A lease that comes later expires and
/// goes to another node.
const LAST_POLL: Duration = Duration::from_secs(5);
/// How often a lease that could not be read is given back.
const REFUSALS_MAX: u32 = 3;
/// Pause after the first try of that; it grows by as much with each.
const REFUSAL_PAUSE: Duration = Duration::from_millis(500);

/// What the engine works with.
pub struct Rooms {
    /// Where leases come from.
    pub source: Arc<dyn LeaseSource>,
    /// Keeps them.
    pub sessions: Sessions,
    /// Moves data.
    pub storage: Storage,
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
    /// Bounds of the pause after a poll without work, in either order.
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
    /// Tasks were cancelled because time ran out or a second signal came.
    CutShort,
}

/// See the module's text.
pub struct Engine {
    rooms: Arc<Rooms>,
    config: Config,
    slots: Arc<Semaphore>,
    attempts: JoinSet<Worth>,
    pace: Pace,
}

/// What became of one poll.
enum Polled {
    Lease(Box<Lease>),
    /// A lease for this task, and why it could not be read.
    Unreadable(TaskId, String),
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
        let pace = Pace::new(config.poll_backoff, Instant::now());
        Self { rooms: Arc::new(rooms), config, slots, attempts: JoinSet::new(), pace }
    }

    /// Polls and runs until told to stop and everything has ended. Spawn it on the runtime that
    /// drives the sessions: a poll, its lease and the first heartbeat then need no other thread.
    pub async fn run(mut self, stops: Stops) -> Ended {
        // The slot is taken before polling: a lease we hold can always be run.
        while let Some(permit) = self.free_slot(&stops).await
            && self.rested(&stops).await
            && self.finds_room(&stops).await
        {
            match self.poll(&stops).await {
                Polled::Lease(lease) => {
                    self.pace.won(Instant::now());
                    self.begin(*lease, permit, &stops);
                }
                Polled::Unreadable(task, reason) => {
                    self.pace.ended(Worth::Nothing, Instant::now());
                    let refusal = refuse(Arc::clone(&self.rooms.source), task, reason, stops.cancel.clone());
                    self.attempts.spawn(async move {
                        refusal.await;
                        drop(permit);
                        Worth::Nothing
                    });
                }
                Polled::Pause => {
                    let pause = self.pace.pause(Instant::now());
                    debug!(retry_in_ms = millis(pause), "no work");
                }
                Polled::Busy => {
                    drop(permit);
                    if self.attempts.is_empty() {
                        self.pace.pause(Instant::now());
                        continue;
                    }
                    tokio::select! {
                        () = stops.drain.cancelled() => {}
                        Some(ended) = self.attempts.join_next() => self.look_at(ended),
                    }
                }
            }
        }
        self.drain(&stops).await
    }

    /// A permit, or `None` once no more work should be taken.
    async fn free_slot(&mut self, stops: &Stops) -> Option<OwnedSemaphorePermit> {
        loop {
            tokio::select! {
                biased;
                () = stops.drain.cancelled() => return None,
                Some(ended) = self.attempts.join_next() => self.look_at(ended),
                permit = Arc::clone(&self.slots).acquire_owned() => {
                    return Some(permit.expect("the slots are never closed"));
                }
            }
        }
    }

    /// Waits until the next poll is due; false once no more work should be taken.
    async fn rested(&mut self, stops: &Stops) -> bool {
        while Instant::now() < self.pace.next() {
            tokio::select! {
                biased;
                () = stops.drain.cancelled() => return false,
                // After a finished task the next poll follows at once.
                Some(ended) = self.attempts.join_next() => self.look_at(ended),
                () = tokio::time::sleep_until(self.pace.next()) => {}
            }
        }
        true
    }

    /// Waits until the disk has room for another task; false once no more work should be taken.
    async fn finds_room(&mut self, stops: &Stops) -> bool {
        let disk = self.rooms.storage.disk().clone();
        while !disk.has_room() {
            tokio::select! {
                () = stops.drain.cancelled() => return false,
                Some(ended) = self.attempts.join_next() => self.look_at(ended),
                () = disk.until_room() => {}
            }
        }
        true
    }

    fn begin(&mut self, lease: Lease, permit: OwnedSemaphorePermit, stops: &Stops) {
        let session = self.rooms.sessions.open(lease); // heartbeats start
        let (rooms, grant) = (Arc::clone(&self.rooms), session.grant());
        let attempt =
            attempt::attempt(Arc::clone(&rooms), permit, session, self.config.cancel_grace, stops.cancel.clone());
        self.attempts.spawn(async move {
            attempt.await;
            worth(&grant, &rooms.plugins)
        });
    }

    async fn poll(&self, stops: &Stops) -> Polled {
        // Dropped midway only when a stop runs out of patience: the plane may have given us a lease.
        let taken = tokio::select! {
            biased;
            taken = self.rooms.source.take() => taken,
            () = stops.out_of_patience() => return Polled::Pause,
        };
        match taken {
            Ok(Some(lease)) => self.admit(lease),
            Ok(None) => Polled::Pause,
            Err(LeaseError::Busy) => Polled::Busy,
            Err(LeaseError::Malformed { task: Some(task), reason }) => Polled::Unreadable(task, reason),
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
        if lease.expires_at.is_some_and(Moment::has_passed) {
            warn!(task_id = %task, capability = %capability, "lease skipped, it expired before it was looked at");
            return Polled::Pause;
        }
        self.rooms.board.began(&lease);
        Polled::Lease(Box::new(lease))
    }

    /// An attempt settles its lease itself; only a bug of ours surfaces here.
    fn look_at(&mut self, ended: Result<Worth, JoinError>) {
        match ended {
            Ok(worth) => self.pace.ended(worth, Instant::now()),
            Err(err) => error!(error = %err, "an attempt ended unexpectedly"),
        }
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
                    Some(end) => self.look_at(end),
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

/// What the lease behind `grant` was good for, once its attempt has ended.
fn worth(grant: &Grant, plugins: &Plugins) -> Worth {
    let begun = matches!(grant.setup_now(), Setup::Pending | Setup::Ready(Ok(_)));
    let ours = grant.cancel.reason() != Some(CancelReason::LeaseLost);
    if begun && ours && plugins.refusal(&grant.lease.capability).is_none() { Worth::Work } else { Worth::Nothing }
}

/// Gives back a lease that could not be read. Where the plane does not take that either, the lease
/// expires by itself.
async fn refuse(source: Arc<dyn LeaseSource>, task: TaskId, reason: String, cancel: CancellationToken) {
    warn!(task_id = %task, error = reason, "lease could not be read, its task is failed");
    let outcome = Outcome::Setup { stage: "start_session", message: reason };
    let telling = async {
        for attempt in 1..=REFUSALS_MAX {
            let Err(err) = source.refuse(task, &outcome).await else { return };
            warn!(task_id = %task, error = %err, attempt, "lease could not be given back");
            if err.advice() != Advice::RetryLater {
                return;
            }
            tokio::time::sleep(REFUSAL_PAUSE * attempt).await;
        }
    };
    tokio::select! {
        () = telling => {}
        () = cancel.cancelled() => {}
    }
}
