//! Slots, polling, dispatch, drain. Owns what is running.
//!
//! [`attempt::attempt`] is the path of one task. [`Engine::run`] polls for leases while slots are
//! free and stops in two steps: first nothing new is leased and running tasks may end, then they are
//! cancelled.

mod attempt;
mod pace;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, error, info, warn};

use crate::{
    leases::{Advice, LeaseError, LeaseSource},
    model::{Lease, Moment, Outcome, Phase, StatusBoard, TaskId, millis},
    outbox::Outbox,
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
    /// Tasks were cancelled because time ran out or a second signal came, or reports are left.
    CutShort,
}

/// See the module's text.
pub struct Engine {
    rooms: Arc<Rooms>,
    config: Config,
    slots: Arc<Semaphore>,
    attempts: JoinSet<()>,
    pace: SharedPace,
}

/// The pace of polling, which attempts change as they end.
#[derive(Clone)]
struct SharedPace(Arc<Mutex<Pace>>);

impl SharedPace {
    fn lock(&self) -> MutexGuard<'_, Pace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Instant {
        self.lock().next()
    }

    fn won(&self) {
        self.lock().won(Instant::now());
    }

    fn pause(&self, asked: Option<Duration>) -> Duration {
        let mut pace = self.lock();
        if let Some(asked) = asked {
            pace.leave_alone(asked, Instant::now());
        }
        pace.pause(Instant::now())
    }

    fn ended(&self, worth: Worth) {
        self.lock().ended(worth, Instant::now());
    }

    fn hasten(&self) {
        self.lock().hasten(Instant::now());
    }
}

/// What became of one poll.
enum Polled {
    Lease(Box<Lease>),
    /// A lease for this task, and why it could not be read.
    Unreadable(TaskId, String),
    /// Nothing to do now. The plane may have asked to be left alone for so long.
    Pause(Option<Duration>),
    /// The plane wants us to end something first.
    Busy,
}

impl Engine {
    /// An engine that has not started.
    #[must_use]
    pub fn new(rooms: Rooms, config: Config) -> Self {
        let slots = Arc::new(Semaphore::new(config.slots));
        let pace = SharedPace(Arc::new(Mutex::new(Pace::new(config.poll_backoff, Instant::now()))));
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
                    self.pace.won();
                    self.begin(*lease, permit, &stops);
                }
                Polled::Unreadable(task, reason) => {
                    self.pace.ended(Worth::Nothing);
                    let refusal = refuse(Arc::clone(&self.rooms.source), task, reason, stops.cancel.clone());
                    self.attempts.spawn(async move {
                        refusal.await;
                        drop(permit);
                    });
                }
                Polled::Pause(asked) => {
                    let pause = self.pace.pause(asked);
                    debug!(retry_in_ms = millis(pause), "no work");
                }
                Polled::Busy => {
                    drop(permit);
                    if self.attempts.is_empty() {
                        self.pace.pause(None);
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

    /// A permit, or `None` once no more work should be taken. Where too many reports wait for the
    /// plane it takes no work either: finished tasks would pile up without bound.
    async fn free_slot(&mut self, stops: &Stops) -> Option<OwnedSemaphorePermit> {
        let outbox = self.rooms.outbox.clone();
        loop {
            let room = outbox.has_room();
            tokio::select! {
                biased;
                () = stops.drain.cancelled() => return None,
                Some(ended) = self.attempts.join_next() => self.look_at(ended),
                // The task whose slot this was may have filled the outbox.
                permit = Arc::clone(&self.slots).acquire_owned(), if room => if outbox.has_room() {
                    return Some(permit.expect("the slots are never closed"));
                },
                () = outbox.until_room(), if !room => {}
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
        let plugin = self.rooms.plugins.name_of(&lease.capability);
        let span = attempt::span(&lease, plugin.as_deref());
        let task = lease.task;
        let session = span.in_scope(|| self.rooms.sessions.open(lease)); // heartbeats start
        if self.rooms.outbox.owes(task) {
            // The plane leased it again before it heard of its end, as after a crash.
            span.in_scope(|| info!("task leased again, its report is still on its way"));
            self.rooms.outbox.adopt(task, session);
            return;
        }
        let held = self.rooms.board.began(&session.grant(), plugin);
        let slot = attempt::Slot { permit, pace: self.pace.clone(), held };
        let (rooms, grace) = (Arc::clone(&self.rooms), self.config.cancel_grace);
        let attempt = attempt::attempt(rooms, slot, session, grace, stops.clone());
        self.attempts.spawn(attempt.instrument(span));
    }

    async fn poll(&self, stops: &Stops) -> Polled {
        // Dropped midway only when a stop runs out of patience: the plane may have given us a lease.
        let taken = tokio::select! {
            biased;
            taken = self.rooms.source.take() => taken,
            () = stops.out_of_patience() => return Polled::Pause(None),
        };
        if taken.is_ok() {
            self.rooms.outbox.plane_answers();
        }
        // A lease that cannot be read, or a word to end something first, is an answer too.
        let answered = matches!(taken, Ok(_) | Err(LeaseError::Busy | LeaseError::Malformed { task: Some(_), .. }));
        self.rooms.board.polled(taken.as_ref().err().filter(|_| !answered).map(ToString::to_string));
        match taken {
            Ok(Some(lease)) => self.admit(lease),
            Ok(None) => Polled::Pause(None),
            Err(LeaseError::Busy) => Polled::Busy,
            Err(LeaseError::Malformed { task: Some(task), reason }) => Polled::Unreadable(task, reason),
            Err(err) => {
                if !stops.drain.is_cancelled() {
                    warn!(error = %err, "poll failed");
                }
                Polled::Pause(err.retry_after())
            }
        }
    }

    /// Leases that are over before they begin are neither run nor reported.
    fn admit(&self, lease: Lease) -> Polled {
        let span = || attempt::span(&lease, self.rooms.plugins.name_of(&lease.capability).as_deref());
        if lease.cancelled {
            span().in_scope(|| info!("lease skipped, it came already cancelled"));
            return Polled::Pause(None);
        }
        if lease.expires_at.is_some_and(Moment::has_passed) {
            span().in_scope(|| warn!("lease skipped, it expired before it was looked at"));
            return Polled::Pause(None);
        }
        Polled::Lease(Box::new(lease))
    }

    /// An attempt settles its lease itself; only a bug of ours surfaces here.
    fn look_at(&self, ended: Result<(), JoinError>) {
        match ended {
            Ok(()) => self.pace.hasten(),
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

/// Gives back a lease that could not be read. Where the plane does not take that either, the lease
/// expires by itself.
async fn refuse(source: Arc<dyn LeaseSource>, task: TaskId, reason: String, cancel: CancellationToken) {
    warn!(task_id = %task, error = reason, "lease could not be read, its task is failed");
    let outcome = Outcome::Setup { stage: "start_session", message: reason };
    let telling = async {
        for tries in 1..=REFUSALS_MAX {
            let Err(err) = source.refuse(task, &outcome).await else { return };
            warn!(task_id = %task, error = %err, tries, "lease could not be given back");
            if err.advice() != Advice::RetryLater {
                return;
            }
            tokio::time::sleep(REFUSAL_PAUSE * tries).await;
        }
    };
    tokio::select! {
        () = telling => {}
        () = cancel.cancelled() => {}
    }
}
