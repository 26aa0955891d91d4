//! One attempt: runs one task from its lease to its report.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use tokio::{sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::{Span, info_span, warn};

use super::{
    Modules, SharedPace, StopSignals,
    pace::LeaseValue,
    planes::WaitingLease,
    slots::{Permit, Slots},
};
use crate::{
    leases::{Acknowledged, Advice, LeaseSource},
    model::{
        BootInstant, CancelReason, HeldLease, HeldNumber, Lease, Outcome, PlaneName, PluginId, ReportState, Setup,
        SetupStage, TaskRecord, TaskResult, TaskStage, TimeLimit, Timings,
    },
    node_event::{NodeEvent, NodeEvents},
    outbox::{self, NewReport, Outbox, Sent},
    plugins::{Folder, Job},
    session::{NoReport, Session},
    storage::{ScratchError, TaskDir},
};

/// What a run returns.
struct End {
    result: TaskResult,
    /// Its folder is being removed.
    tidying: Option<Tidying>,
}

type Tidying = JoinHandle<Result<(), ScratchError>>;

/// How the report of an attempt ended.
enum ReportEnd {
    /// It was sent, with this result.
    Sent(Sent),
    /// Nothing may be reported.
    NotReported(CancelReason),
}

/// The slot of an attempt.
pub(super) enum SlotPermit {
    /// Reserved before the poll.
    Held(Permit),
    /// To be reserved for the plane of this index: the lease arrived before its slot.
    Wanted(Slots, usize, WaitingLease),
}

/// The slot for one task, and the parts that learn how it ended.
pub(super) struct Slot {
    pub(super) permit: SlotPermit,
    /// The control plane that gave the lease.
    pub(super) source: Arc<dyn LeaseSource>,
    pub(super) pace: SharedPace,
    /// The task on the status board.
    pub(super) held: HeldNumber,
    /// The plugin that serves the task.
    pub(super) plugin: Option<PluginId>,
    /// How long the runner may take.
    pub(super) time_limit: Option<TimeLimit>,
}

/// The fields of every log line about a task.
pub(super) fn span(plane: &PlaneName, lease: &Lease, plugin: Option<&str>) -> Span {
    info_span!(
        "task",
        %plane,
        task_id = %lease.task(),
        job_id = lease.job.map(tracing::field::display),
        domain_id = lease.data.domain().map(tracing::field::display),
        capability = %lease.capability,
        plugin,
        attempt = lease.attempt,
    )
}

/// Runs one task from start to end. Run it in its [`span`]. Every early exit still handles the report and frees
/// the slot.
pub(super) async fn attempt(modules: Arc<Modules>, slot: Slot, session: Session, grace: Duration, stops: StopSignals) {
    let held_lease = session.held_lease(); // the task, a token, the cancel signal, the progress queue
    let lease = &held_lease.lease;
    let began = Instant::now();
    let (permit, refused) =
        match admit(&modules.events, slot.permit, &*slot.source, slot.held, &held_lease, &stops).await {
            Ok(permit) => (Some(permit), None),
            Err(outcome) => (None, Some(End::bare(outcome))),
        };
    let (start, clock) = slot.time_limit.map(Clock::new).unzip();
    // Boxed: the futures around it would hold it several times, and each move would copy it.
    let run = AssertUnwindSafe(Box::pin(run(Arc::clone(&modules), slot.held, held_lease.clone(), grace, start)))
        .catch_unwind();
    let ended = async {
        run.await.unwrap_or_else(|_| {
            // A host bug must not leave a task unreported. The log has the details.
            let message = "the node failed while it ran the task; see its log".to_owned();
            End::bare(Outcome::HostFault { message })
        })
    };
    let queued = began.elapsed();
    let End { mut result, tidying } = match refused {
        Some(end) => end,
        None => {
            modules.events.emit(NodeEvent::TaskStarted { task: lease.task().clone() });
            run_to_end(ended, &held_lease, clock, &stops.cancel).await
        }
    };
    result.usage = held_lease.usage();
    result.timings = Timings::new(queued, began.elapsed().saturating_sub(queued));
    result.outcome.redact(&held_lease.tokens());
    modules.events.board().moved(slot.held, TaskStage::Reporting);
    // From here on no operator can cancel the task. A cancel before it counts, whatever the runner returned.
    if held_lease.cancel.reason() == Some(CancelReason::Operator) {
        result.outcome = Outcome::CancelledByOperator;
    }
    slot.pace.ended(lease_value(&held_lease, &result.outcome));
    let report = NewReport { plane: slot.source.facts(), lease, task_result: &result, elapsed: began.elapsed() };
    let report_end = deliver_report(&modules.outbox, report, free(permit, tidying), session, &stops).await;
    let record =
        TaskRecord::new(&report.plane.name, lease, slot.plugin.as_ref(), &result, began.elapsed(), report_end.state());
    modules.events.emit(NodeEvent::TaskEnded {
        held: slot.held,
        record: Arc::new(record),
        reason: result.outcome.reason(),
        report_reason: report_end.reason(),
    });
}

/// Confirms the lease and gets its slot. `Err` is the end of a task that never started.
async fn admit(
    events: &NodeEvents,
    slot: SlotPermit,
    source: &dyn LeaseSource,
    held: HeldNumber,
    held_lease: &HeldLease,
    stops: &StopSignals,
) -> Result<Permit, Outcome> {
    match source.acknowledge(&held_lease.lease).await {
        Ok(Acknowledged::Held) => {}
        Ok(Acknowledged::Cancelled) => return Err(Outcome::Cancelled),
        Err(err) if err.advice() == Advice::StopTask => {
            let (task, error) = (held_lease.lease.task().clone(), err.to_string());
            events.emit(NodeEvent::LeaseTakenElsewhere { task, error });
            return Err(Outcome::LeaseLost);
        }
        Err(err) => {
            warn!(event = "lease.not_acknowledged", error = %err, "lease could not be acknowledged, its task runs anyway");
        }
    }
    let (slots, plane, waiting) = match slot {
        SlotPermit::Held(permit) => return Ok(permit),
        SlotPermit::Wanted(slots, plane, waiting) => (slots, plane, waiting),
    };
    events.board().moved(held, TaskStage::Waiting);
    let permit = tokio::select! {
        biased;
        () = stops.drain.cancelled() => Err(Outcome::Drained),
        reason = held_lease.cancel.cancelled() => Err(Outcome::of_cancel(reason)),
        () = deadline_passed(held_lease) => Err(Outcome::of_cancel(CancelReason::Deadline)),
        permit = slots.ask(plane) => Ok(permit.expect("slots answer each request")),
    };
    drop(waiting);
    permit
}

/// Classifies the ended task for the pace of polling.
fn lease_value(held_lease: &HeldLease, outcome: &Outcome) -> LeaseValue {
    let begun = !held_lease.is_refused();
    let held = held_lease.cancel.reason() != Some(CancelReason::LeaseLost);
    match outcome {
        _ if !begun || !held => LeaseValue::Nothing,
        Outcome::Completed
        | Outcome::Budget { .. }
        | Outcome::Failed { .. }
        | Outcome::Panicked { .. }
        | Outcome::Storage { .. }
        | Outcome::Cancelled
        | Outcome::CancelledByOperator
        | Outcome::Drained => LeaseValue::Work,
        Outcome::Setup { .. } | Outcome::NoRunner | Outcome::LeaseLost | Outcome::HostFault { .. } => {
            LeaseValue::Nothing
        }
    }
}

/// Reports the task result. Then the slot is `freed`.
async fn deliver_report(
    outbox: &Outbox,
    report: NewReport<'_>,
    freed: impl Future<Output = ()>,
    session: Session,
    stops: &StopSignals,
) -> ReportEnd {
    if let Some(reason) = session.no_report(&report.task_result.outcome) {
        freed.await;
        return ReportEnd::NotReported(reason);
    }
    let stops = outbox::Stops { drain: &stops.drain, cancel: &stops.cancel };
    match outbox.deliver(report, session.close(), stops, freed).await {
        Ok(sent) => ReportEnd::Sent(sent),
        Err(NoReport::Over(reason)) => ReportEnd::NotReported(reason),
        Err(NoReport::Refused(why)) => ReportEnd::Sent(Sent::Refused(why)),
    }
}

/// Frees the slot after the task's folder is removed.
async fn free(permit: Option<Permit>, tidying: Option<Tidying>) {
    if let Some(tidying) = tidying {
        match tidying.await {
            Ok(Ok(())) => {}
            Ok(Err(err)) => {
                warn!(event = "task.directory_not_removed", error = %err, "task directory could not be removed")
            }
            Err(err) => {
                warn!(event = "task.directory_not_removed", error = %err, "task directory could not be removed")
            }
        }
    }
    drop(permit);
}

/// The time limit of a run. Its clock starts with the runner, not while the task waits.
struct Clock {
    limit: TimeLimit,
    end: oneshot::Receiver<BootInstant>,
}

/// Starts a [`Clock`].
struct ClockStart {
    limit: TimeLimit,
    tell: oneshot::Sender<BootInstant>,
}

impl Clock {
    fn new(limit: TimeLimit) -> (ClockStart, Self) {
        let (tell, end) = oneshot::channel();
        (ClockStart { limit, tell }, Self { limit, end })
    }
}

impl ClockStart {
    fn start(self, held_lease: &HeldLease) {
        let end = BootInstant::now() + self.limit.wall_time;
        held_lease.run_end().set(end);
        // The receiver is gone if the task is cancelled already.
        let _ = self.tell.send(end);
    }
}

/// Waits until the time limit of the run has passed, and returns it. Waits forever if there is none.
async fn time_limit_passed(clock: Option<Clock>) -> TimeLimit {
    let Some(Clock { limit, end }) = clock else { return std::future::pending().await };
    let Ok(end) = end.await else { return std::future::pending().await }; // the runner did not begin
    while !end.has_passed() {
        tokio::time::sleep(end.left()).await;
    }
    limit
}

/// Waits until the hard deadline of the run has passed. Waits forever if there is none.
async fn deadline_passed(held_lease: &HeldLease) {
    loop {
        let known = held_lease.hard_deadline();
        let Some(deadline) = known else { return std::future::pending().await };
        if deadline.has_passed() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(deadline.left()) => {}
            () = held_lease.hard_deadline_moved(known) => {}
        }
    }
}

/// Waits until `run` ends, and cancels the task when the node cancels all tasks.
async fn run_to_end(
    run: impl Future<Output = End>,
    held_lease: &HeldLease,
    clock: Option<Clock>,
    cancel_all: &CancellationToken,
) -> End {
    tokio::pin!(run);
    tokio::select! {
        biased;
        end = &mut run => return end,
        () = cancel_all.cancelled() => held_lease.cancel.cancel(CancelReason::Drained),
        limit = time_limit_passed(clock) => held_lease.cancel.cancel(CancelReason::TimeLimit(limit)),
        () = deadline_passed(held_lease) => held_lease.cancel.cancel(CancelReason::Deadline),
    }
    run.await
}

/// Waits for the runner. Slow work, such as moving data, happens on the workers. This function runs
/// concurrently with the heartbeats.
async fn run(
    modules: Arc<Modules>,
    held: HeldNumber,
    held_lease: HeldLease,
    grace: Duration,
    clock: Option<ClockStart>,
) -> End {
    let nothing = End::bare;
    if let Some(refusal) = modules.plugins.refusal(&held_lease.lease.capability) {
        return nothing(refusal);
    }
    // The set-up heartbeat may bring the missing parts of the data's location. All other tasks start at once. Their
    // first input, output or token call waits for the heartbeat's answer.
    if !held_lease.lease.data.is_complete()
        && let Err(outcome) = setup(&held_lease).await
    {
        return nothing(outcome);
    }
    let dir = modules.storage.task_dir(held_lease.lease.task()); // created when it is first needed
    let ports = modules.storage.ports(&held_lease, dir.path()); // nothing is fetched before the runner asks
    modules.events.board().moved(held, TaskStage::Waiting);
    let (board, limited) = (modules.events.board().clone(), held_lease.clone());
    let job = Job {
        held_lease: held_lease.clone(),
        ports: Arc::clone(&ports),
        folder: folder(&dir),
        workers: modules.workers.clone(),
        cancel_grace: grace,
        began: Box::new(move || {
            board.moved(held, TaskStage::Running);
            if let Some(clock) = clock {
                clock.start(&limited);
            }
        }),
        events: modules.events.clone(),
    };
    let outcome = modules.plugins.run(job).await;
    ports.close().await; // ends or aborts the calls under way
    let (artifacts, inputs, disk_was_full) = (ports.published(), ports.fetched(), ports.disk_was_full());
    let tidying = (!dir.close_empty()).then(|| modules.workers.spawn_blocking(move || dir.close()));
    let outcome = refused_setup(&held_lease, outcome);
    let inline = if outcome == Outcome::Completed { ports.inline() } else { BTreeMap::new() };
    let result = TaskResult { artifacts, inputs, disk_was_full, inline, ..TaskResult::bare(outcome) };
    End { result, tidying }
}

/// The task's directory in the form that plugins use.
fn folder(dir: &TaskDir) -> Folder {
    let (path, dir) = (dir.path().to_owned(), dir.clone());
    let make = move || {
        dir.make().map_err(|err| {
            warn!(event = "task.directory_not_created", error = %err, "task directory could not be created");
            err.without_path()
        })
    };
    Folder { path, make: Arc::new(make) }
}

/// Waits for the set-up heartbeat and returns what is missing.
async fn setup(held_lease: &HeldLease) -> Result<(), Outcome> {
    let setup = tokio::select! {
        setup = held_lease.setup() => setup,
        reason = held_lease.cancel.cancelled() => return Err(Outcome::of_cancel(reason)),
    };
    match setup {
        Setup::Ready(Ok(_)) => Ok(()),
        Setup::Ready(Err(message)) => Err(Outcome::Setup { stage: SetupStage::BuildPorts, message }),
        Setup::Refused(message) => Err(match held_lease.cancel.reason() {
            Some(reason) => Outcome::of_cancel(reason),
            None => Outcome::Setup { stage: SetupStage::InitialHeartbeat, message },
        }),
        Setup::Pending => unreachable!("setup() waits until it is not pending"),
    }
}

/// Changes the outcome if the lease was never set up: the runner did not cause that failure.
fn refused_setup(held_lease: &HeldLease, outcome: Outcome) -> Outcome {
    if !matches!(outcome, Outcome::Failed { .. } | Outcome::Storage { .. }) {
        return outcome;
    }
    match held_lease.setup_now() {
        Setup::Refused(message) => Outcome::Setup { stage: SetupStage::InitialHeartbeat, message },
        Setup::Ready(Err(message)) => Outcome::Setup { stage: SetupStage::BuildPorts, message },
        Setup::Ready(Ok(_)) | Setup::Pending => outcome,
    }
}

impl End {
    /// An end without data.
    fn bare(outcome: Outcome) -> Self {
        Self { result: TaskResult::bare(outcome), tidying: None }
    }
}

impl ReportEnd {
    /// The state that the status page shows.
    fn state(&self) -> ReportState {
        match self {
            Self::Sent(Sent::Accepted) => ReportState::Accepted,
            Self::Sent(Sent::Refused(_)) => ReportState::Refused,
            Self::Sent(Sent::Waiting(_)) => ReportState::Waiting,
            Self::Sent(Sent::Dropped) => ReportState::Dropped,
            Self::NotReported(_) => ReportState::None,
        }
    }

    /// Why the report is refused, waits, or does not exist.
    fn reason(self) -> Option<String> {
        match self {
            Self::Sent(Sent::Accepted | Sent::Dropped) => None,
            Self::Sent(Sent::Refused(why) | Sent::Waiting(why)) => Some(why),
            Self::NotReported(reason) => Some(reason.as_str().to_owned()),
        }
    }
}
