//! Slots, polling, dispatch and drain. The engine owns the running tasks.
//!
//! [`attempt::attempt`] runs one task. [`Engine::run`] polls for leases while slots are free. It sends one poll at a
//! time, or several while leases come. It stops in two steps. First nothing new is leased and running tasks may end.
//! Then running tasks are cancelled.

mod attempt;
mod pace;
mod planes;
mod slots;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    runtime::Handle,
    sync::Notify,
    task::{JoinError, JoinSet},
    time::{Instant, MissedTickBehavior, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, error, warn};

use crate::{
    leases::{Admission, LeaseError, LeaseSource},
    model::{Backoff, BootInstant, Jitter, Lease, Outcome, PlaneName, ReportAddress, SetupStage, TimeLimit, millis},
    node_event::{NodeEvent, NodeEvents, SkipReason},
    outbox::Outbox,
    plugins::Plugins,
    session::Sessions,
    storage::Stores,
};
use pace::{LeaseValue, Pace};
use planes::{Plane, PollSlot, next_poll};
use slots::{Permit, Slots};

/// How long a stop waits for the answer to a poll under way. A lease that arrives later expires and goes to another
/// node.
const LAST_POLL: Duration = Duration::from_secs(5);
/// The status shows polls as unanswered when a plane answers none for this long.
const UNANSWERED: Duration = Duration::from_secs(10);
/// A poll that waits this long for its answer lets the other planes use its slot. A plane that hangs must not delay
/// their tasks.
const LENT_AFTER: Duration = Duration::from_millis(250);
/// How many times the node tries to report a lease that cannot be read.
const REFUSALS_MAX: u32 = 3;
/// The pauses between these tries.
const REFUSAL_PAUSES: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(1), Jitter::Fifth);

/// The modules that the engine uses.
pub struct Modules {
    /// Where leases come from.
    pub planes: Vec<Arc<dyn LeaseSource>>,
    /// Keeps leases alive.
    pub sessions: Sessions,
    /// Moves data.
    pub storage: Stores,
    /// Keeps reports until they are accepted.
    pub outbox: Outbox,
    /// Runs plugins.
    pub plugins: Arc<Plugins>,
    /// Shows and logs what happens.
    pub events: NodeEvents,
    /// Moves data and waits for runners. Their work may keep its threads busy.
    pub workers: Handle,
}

/// Settings of the engine.
#[derive(Clone, Debug)]
pub struct Config {
    /// Tasks at once.
    pub slots: usize,
    /// Bounds of the pause after a poll without work, in either order.
    pub poll_backoff: (Duration, Duration),
    /// How long running tasks may continue after the first stop.
    pub drain_timeout: Duration,
    /// How long a runner may take to end after its cancel.
    pub cancel_grace: Duration,
    /// Longest time of a run, if the plugins file sets none for its capability.
    pub time_limit: Option<Duration>,
    /// Slots that are kept free for a control plane. Together at most `slots`.
    pub floors: BTreeMap<PlaneName, usize>,
}

/// The largest number of slots that may be configured.
pub const SLOTS_MAX: usize = 65_536;

impl Default for Config {
    fn default() -> Self {
        Self {
            slots: 1,
            poll_backoff: (Duration::from_secs(1), Duration::from_secs(30)),
            drain_timeout: Duration::from_secs(30),
            cancel_grace: Duration::from_secs(10),
            time_limit: None,
            floors: BTreeMap::new(),
        }
    }
}

/// Signals that stop the engine.
#[derive(Clone, Default)]
pub struct StopSignals {
    /// Lease nothing new; let running tasks end within the drain timeout.
    pub drain: CancellationToken,
    /// Cancel what is running.
    pub cancel: CancellationToken,
}

impl StopSignals {
    /// Returns some time after the first stop, or at the second stop.
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
    /// Every task ended without a cancel from the node.
    Drained,
    /// Tasks were cancelled because time ran out or a second signal came, or reports are left.
    CutShort,
}

/// See the module documentation.
pub struct Engine {
    modules: Arc<Modules>,
    config: Config,
    slots: Slots,
    /// Each attempt returns the index of its plane.
    attempts: JoinSet<usize>,
    planes: Vec<Plane>,
    /// Notified when a lease no longer waits for a slot.
    changed: Arc<Notify>,
}

/// The pace of polling, which attempts change as they end.
#[derive(Clone)]
struct SharedPace(Arc<Mutex<Pace>>);

impl SharedPace {
    fn new(poll_backoff: (Duration, Duration), now: Instant) -> Self {
        Self(Arc::new(Mutex::new(Pace::new(poll_backoff, now))))
    }

    fn lock(&self) -> MutexGuard<'_, Pace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Instant {
        self.lock().next()
    }

    fn leased(&self) {
        self.lock().leased(Instant::now());
    }

    fn width(&self) -> usize {
        self.lock().width()
    }

    fn one_poll(&self) {
        self.lock().one_poll();
    }

    fn pause(&self, sent: Instant, asked: Option<Duration>) -> Option<Duration> {
        let mut pace = self.lock();
        if let Some(asked) = asked {
            pace.pause_as_asked(asked, Instant::now());
        }
        pace.pause(sent, Instant::now())
    }

    fn ended(&self, lease_value: LeaseValue) {
        self.lock().ended(lease_value, Instant::now());
    }

    fn poll_now(&self) {
        self.lock().poll_now(Instant::now());
    }
}

/// A poll that has ended.
struct Polled {
    poll_slot: PollSlot,
    sent: Instant,
    answer: Result<Option<Lease>, LeaseError>,
}

impl Engine {
    /// An engine that has not started.
    #[must_use]
    pub fn new(modules: Modules, config: Config) -> Self {
        let floor = |source: &Arc<dyn LeaseSource>| config.floors.get(&source.facts().name).copied().unwrap_or(0);
        let slots = Slots::new(config.slots, modules.planes.iter().map(floor));
        let (changed, now) = (Arc::new(Notify::new()), Instant::now());
        let plane = |(index, source): (usize, &Arc<dyn LeaseSource>)| {
            Plane::new(Arc::clone(source), config.poll_backoff, &changed, now, modules.events.of_plane(index))
        };
        let planes = modules.planes.iter().enumerate().map(plane).collect();
        Self { modules: Arc::new(modules), config, slots, attempts: JoinSet::new(), planes, changed }
    }

    /// Polls and runs tasks until a stop is requested and everything has ended. Spawn it on the runtime that drives
    /// the sessions. A poll, its lease and the first heartbeat then need no other thread.
    pub async fn run(mut self, stops: StopSignals) -> Ended {
        let mut polls = FuturesUnordered::new();
        let mut look = tokio::time::interval(UNANSWERED / 5);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Without such a plane, nobody looks at the requests for slots.
            let more = self.planes.iter().any(Plane::wants_poll);
            if !more {
                self.planes.iter_mut().for_each(Plane::release_slot);
            }
            tokio::select! {
                biased;
                () = stops.drain.cancelled() => break,
                Some(polled) = polls.next() => self.found(polled, &stops),
                // The next poll follows at once after a finished task.
                Some(ended) = self.attempts.join_next() => self.attempt_ended(ended),
                poll_slot = next_poll(&self.modules, &mut self.planes, &self.slots), if more => {
                    let plane = &mut self.planes[poll_slot.plane];
                    plane.sent(Instant::now());
                    let source = Arc::clone(&plane.source);
                    polls.push(poll(source, poll_slot, self.planes.len() > 1));
                }
                () = self.changed.notified() => {} // a plane may be polled again
                // A plane that hangs gives no work. This shows it long before the call fails.
                _ = look.tick(), if !polls.is_empty() => {
                    for plane in self.planes.iter().filter(|plane| hangs(plane)) {
                        plane.events.board().unanswered();
                    }
                }
            }
        }
        for plane in &self.planes {
            plane.source.quiesce();
        }
        // Polls are dropped midway only when a stop times out: the plane may already have leased tasks to this node.
        let mut patience = pin!(stops.out_of_patience());
        while !polls.is_empty() {
            tokio::select! {
                biased;
                Some(polled) = polls.next() => self.found(polled, &stops),
                () = &mut patience => break,
            }
        }
        self.drain(&stops).await
    }

    /// Handles the result of a poll.
    fn found(&mut self, polled: Polled, stops: &StopSignals) {
        let Polled { poll_slot: PollSlot { plane: index, permit }, sent, answer } = polled;
        let attempts_run = !self.attempts.is_empty();
        let plane = &mut self.planes[index];
        plane.under_way -= 1;
        plane.since = Instant::now();
        if answer.is_ok() {
            self.modules.outbox.plane_answers(&plane.source.facts().name);
        }
        // An unreadable lease is an answer too. So is a request to end a task first.
        if matches!(answer, Ok(_) | Err(LeaseError::Busy | LeaseError::Malformed { task: Some(_), .. })) {
            plane.events.board().polled(None);
        }
        match answer {
            Ok(Some(lease)) if admits(&self.modules, &plane.source.facts().name, &lease) => {
                plane.pace.leased();
                self.begin(lease, index, permit.and_then(Permit::take_back), stops);
            }
            Err(LeaseError::Busy) if attempts_run => {
                plane.pace.one_poll();
                plane.busy = true;
            }
            Ok(_) | Err(LeaseError::Busy) => {
                if let Some(pause) = plane.pace.pause(sent, None) {
                    debug!(event = "poll.empty", retry_in_ms = millis(pause), "no work");
                }
            }
            Err(LeaseError::Malformed { task: Some(to), reason }) => {
                // A control plane that sends leases by itself is not paced: an unusable lease costs nothing.
                if plane.source.facts().admission == Admission::SlotFirst {
                    plane.pace.ended(LeaseValue::Nothing);
                }
                let unreadable = NodeEvent::LeaseUnreadable { task: to.task.clone(), error: reason.clone() };
                self.modules.events.emit(unreadable);
                let refusal = refuse(Arc::clone(&plane.source), to, reason, stops.cancel.clone());
                self.attempts.spawn(async move {
                    refusal.await;
                    drop(permit);
                    index
                });
            }
            Err(err) => {
                // Polls that were under way together fail together. They are logged once.
                let Some(pause) = plane.pace.pause(sent, err.retry_after()) else { return };
                if !stops.drain.is_cancelled() {
                    let failed = NodeEvent::PollFailed { error: err.to_string(), pause };
                    plane.span.in_scope(|| plane.events.emit(failed));
                }
            }
        }
    }

    fn begin(&mut self, lease: Lease, index: usize, permit: Option<Permit>, stops: &StopSignals) {
        let plane = &self.planes[index];
        let plugin = self.modules.plugins.id_of(&lease.capability).cloned();
        let span = attempt::span(&plane.source.facts().name, &lease, plugin.as_ref().map(|plugin| &*plugin.name));
        let task = lease.task().clone();
        let session = span.in_scope(|| self.modules.sessions.open(&plane.source, lease)); // heartbeats start
        if self.modules.outbox.has_report_of(&plane.source.facts().name, &task) {
            // The plane leased the task again before it received the report, for example after a crash.
            let again = NodeEvent::TaskLeasedAgain { task: task.clone() };
            span.in_scope(|| self.modules.events.emit(again));
            self.modules.outbox.adopt(&plane.source.facts().name, &task, session);
            return;
        }
        let held_lease = session.held_lease();
        let of_node = self.modules.plugins.time_limit(&held_lease.lease.capability).or(self.config.time_limit);
        let time_limit = TimeLimit::of_run(of_node, held_lease.lease.time_limit);
        let held = plane.events.board().began(&held_lease, plugin.clone(), time_limit);
        let permit = match permit {
            Some(permit) => attempt::SlotPermit::Held(permit),
            None => attempt::SlotPermit::Wanted(self.slots.clone(), index, plane.one_waits()),
        };
        let (source, pace) = (Arc::clone(&plane.source), plane.pace.clone());
        let slot = attempt::Slot { permit, source, pace, held, plugin, time_limit };
        let (modules, grace) = (Arc::clone(&self.modules), self.config.cancel_grace);
        let stops = stops.clone();
        self.attempts.spawn(
            async move {
                // Called here: a future that is captured and awaited exists twice in this one.
                attempt::attempt(modules, slot, session, grace, stops).await;
                index
            }
            .instrument(span),
        );
    }

    /// An attempt reports the end of its lease itself. An error here is a host bug.
    fn attempt_ended(&mut self, ended: Result<usize, JoinError>) {
        match ended {
            Ok(index) => {
                self.planes[index].busy = false;
                self.planes[index].pace.poll_now();
            }
            Err(err) => {
                self.planes.iter_mut().for_each(|plane| plane.busy = false);
                error!(event = "task.attempt_failed", error = %err, "an attempt ended unexpectedly");
            }
        }
    }

    /// Waits for the running tasks. Cancels them after the drain timeout.
    async fn drain(mut self, stops: &StopSignals) -> Ended {
        let (tasks, limit) = (self.attempts.len(), self.config.drain_timeout);
        self.modules.events.emit(NodeEvent::NodeDraining { tasks, limit });
        let mut ended = Ended::Drained;
        let patience = tokio::time::sleep(self.config.drain_timeout);
        tokio::pin!(patience);
        loop {
            tokio::select! {
                // Ended tasks are checked first: with DRAIN_TIMEOUT=0 an idle node is not cut short.
                biased;
                next = self.attempts.join_next() => match next {
                    Some(end) => self.attempt_ended(end),
                    None => break,
                },
                () = &mut patience, if ended == Ended::Drained => {
                    ended = Ended::CutShort;
                    stops.cancel.cancel();
                }
                () = stops.cancel.cancelled(), if ended == Ended::Drained => ended = Ended::CutShort,
            }
        }
        ended
    }
}

/// Whether a lease may run. A lease that is over before its task starts is neither run nor reported.
fn admits(modules: &Modules, plane: &PlaneName, lease: &Lease) -> bool {
    let span = || attempt::span(plane, lease, modules.plugins.id_of(&lease.capability).map(|plugin| &*plugin.name));
    let reason = if lease.cancelled {
        SkipReason::Cancelled
    } else if lease.expires_at.is_some_and(BootInstant::has_passed) {
        SkipReason::Expired
    } else {
        return true;
    };
    let task = lease.task().clone();
    span().in_scope(|| modules.events.emit(NodeEvent::LeaseSkipped { task, reason }));
    false
}

/// Whether a plane does not answer its polls. A plane that sends leases by itself may be silent for a long time.
fn hangs(plane: &Plane) -> bool {
    let asked = plane.source.facts().admission == Admission::SlotFirst;
    asked && plane.under_way > 0 && plane.since.elapsed() >= UNANSWERED
}

/// Asks for a lease. `lends`: other planes may use its slot while the answer is late.
async fn poll(source: Arc<dyn LeaseSource>, mut poll_slot: PollSlot, lends: bool) -> Polled {
    let (sent, mut asking) = (Instant::now(), source.poll());
    if let Some(permit) = poll_slot.permit.as_mut().filter(|_| lends) {
        match timeout(LENT_AFTER, &mut asking).await {
            Ok(answer) => return Polled { poll_slot, sent, answer },
            Err(_) => permit.lend(),
        }
    }
    let answer = asking.await;
    Polled { poll_slot, sent, answer }
}

/// Reports a lease that could not be read. If the plane does not accept that report, the lease expires.
async fn refuse(source: Arc<dyn LeaseSource>, to: ReportAddress, reason: String, cancel: CancellationToken) {
    let outcome = Outcome::Setup { stage: SetupStage::StartSession, message: reason };
    let rejecting = async {
        for tries in 1..=REFUSALS_MAX {
            let Err(err) = source.reject(&to, &outcome).await else { return };
            warn!(event = "lease.not_rejected", task_id = %to.task, error = %err, tries, "lease could not be rejected");
            if !err.advice().may_retry() {
                return;
            }
            tokio::time::sleep(REFUSAL_PAUSES.pause(tries, rand::random())).await;
        }
    };
    tokio::select! {
        () = rejecting => {}
        () = cancel.cancelled() => {}
    }
}
