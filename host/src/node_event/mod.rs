//! The node's events, as one typed stream.
//!
//! A module passes each change of state to [`NodeEvents::emit`]. `emit` updates the status board, writes the log line
//! and sends the event to the subscribers. [`NodeEvent::name`] is the code of the log line in its field `event`
//! (docs/operations/events.md). Log lines that report no change of state do not pass through here.
//!
//! Values of the status that change with every task, such as the number of waiting reports, are set on
//! [`NodeEvents::board`] without an event.

mod log;
#[cfg(test)]
mod tests;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::broadcast;

use crate::model::{
    Capability, DiskStatus, HeldNumber, OutcomeWord, Phase, PlaneName, RegistrationForm, RegistrationState,
    ReportState, StatusBoard, TaskId, TaskRecord,
};

/// Events that are stored for a slow subscriber. It loses older ones.
const STORED_MAX: usize = 1024;

/// A change of state of the node, its registration, a plugin, the outbox, a lease or a task.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NodeEvent {
    /// The node serves its pages and begins to register.
    NodeStarted {
        /// Where its pages are.
        address: Option<SocketAddr>,
        /// Its control planes.
        planes: Vec<PlaneName>,
    },
    /// The node leases tasks.
    NodeLeasing,
    /// The node leases nothing new and waits for running tasks.
    NodeDraining {
        /// How many tasks run.
        tasks: usize,
        /// How long they may still run.
        limit: Duration,
    },
    /// The node has stopped.
    NodeStopped {
        /// Tasks were cancelled, or reports are left.
        cut_short: bool,
    },
    /// The free disk space is below `DISK_FREE_MIN`, so leasing pauses.
    DiskFull {
        /// The folder whose file system is full.
        path: PathBuf,
        /// Its free space and the limit.
        disk: DiskStatus,
    },
    /// There is enough free disk space again.
    DiskHasRoom {
        /// The folder.
        path: PathBuf,
        /// Its free space and the limit.
        disk: DiskStatus,
    },
    /// The sign-in service or the control plane registered the node.
    RegistrationAccepted {
        /// The address of the node's wallet, or its id on the control plane.
        address: String,
        /// How the node registered.
        form: RegistrationForm,
        /// How many capabilities are registered. 0 if the wire has none.
        capabilities: usize,
    },
    /// A registered node registered again.
    RegistrationRepeated {
        /// Why.
        cause: RepeatCause,
        /// How many capabilities are registered.
        capabilities: usize,
    },
    /// A registration failed. The node tries again.
    RegistrationFailed {
        /// Why.
        error: String,
        /// The state that follows from such a failure. A registered node enters it only after a conflict.
        state: RegistrationState,
        /// The node was already registered.
        registered: bool,
        /// The pause before the next attempt.
        pause: Duration,
        /// The log had a warning about such a failure a short time ago. The line has the level `debug`.
        repeated: bool,
    },
    /// The sign-in service does not know the node any more. The node registers again.
    RegistrationLost {
        /// Its answer.
        error: String,
    },
    /// A login failed. The node tries again.
    LoginFailed {
        /// Why.
        error: String,
        /// How many logins have failed in a row.
        failures: u32,
        /// The pause before the next attempt.
        pause: Duration,
    },
    /// The control plane rejected a valid node token. The node logs in again.
    TokenRejected {
        /// Why this is not a single rejection.
        error: &'static str,
        /// The pause before the login.
        pause: Duration,
    },
    /// A login succeeded: the node has a new token. The line has the level `debug`.
    TokenRenewed {
        /// How long the token is valid.
        lifetime: Duration,
        /// When the next login is due.
        renew_in: Duration,
    },
    /// A plugin gets no more work until the node restarts.
    PluginOutOfService {
        /// The plugin.
        plugin: Arc<str>,
        /// Why.
        reason: String,
        /// The capabilities that the node does not serve any more.
        capabilities: Vec<Capability>,
    },
    /// Calls into a plugin do not return. Emitted again when their number doubles, and at intervals.
    PluginCallsHang {
        /// The plugin.
        plugin: Arc<str>,
        /// How many calls.
        calls: usize,
        /// The oldest call.
        call: &'static str,
        /// How long the oldest call takes.
        longest: Duration,
    },
    /// The calls into a plugin have returned.
    PluginCallsReturned {
        /// The plugin.
        plugin: Arc<str>,
    },
    /// A runner ignored its cancel. The node released its slot.
    RunnerStuck {
        /// The task.
        task: TaskId,
        /// The plugin.
        plugin: Arc<str>,
        /// How long the node waited for the runner.
        grace: Duration,
        /// How many runners of the plugin have ignored their cancel.
        strikes: u32,
    },
    /// The control plane cannot be used, so leasing pauses.
    PlaneNotReady {
        /// The control plane.
        plane: PlaneName,
        /// Why.
        error: String,
    },
    /// The control plane can be used again.
    PlaneReady {
        /// The control plane.
        plane: PlaneName,
    },
    /// The control plane did not answer a poll, or refused it.
    PollFailed {
        /// Why.
        error: String,
        /// The pause before the next poll.
        pause: Duration,
    },
    /// A lease cannot be read. Its task is reported as failed.
    LeaseUnreadable {
        /// The task.
        task: TaskId,
        /// Why.
        error: String,
    },
    /// A lease was over before its task started.
    LeaseSkipped {
        /// The task.
        task: TaskId,
        /// Why it was over.
        reason: SkipReason,
    },
    /// Another node has the lease. The task does not run here.
    LeaseTakenElsewhere {
        /// The task.
        task: TaskId,
        /// The answer of the control plane.
        error: String,
    },
    /// The lease of a running task is lost.
    LeaseLost {
        /// The task.
        task: TaskId,
    },
    /// The control plane leased a task again although it has not accepted the report of that task yet.
    TaskLeasedAgain {
        /// The task.
        task: TaskId,
    },
    /// A task has a slot and starts.
    TaskStarted {
        /// The task.
        task: TaskId,
    },
    /// The control plane cancelled a task.
    TaskCancelled {
        /// The task.
        task: TaskId,
    },
    /// An operator cancelled a task.
    TaskCancelledByOperator {
        /// The control plane of the task.
        plane: PlaneName,
        /// The task.
        task: TaskId,
    },
    /// The control plane gave a task another id.
    TaskRenamed {
        /// The new id.
        task: TaskId,
        /// The old id.
        formerly: TaskId,
    },
    /// A task has ended.
    TaskEnded {
        /// The task on the status board.
        held: HeldNumber,
        /// Its result and the state of its report.
        record: Arc<TaskRecord>,
        /// Why the task failed, as the runner or the node wrote it.
        reason: Option<String>,
        /// Why the report is refused, waits, or does not exist.
        report_reason: Option<String>,
    },
    /// The control plane does not accept reports now. They wait in the outbox.
    ReportWaiting {
        /// The first task whose report waits.
        task: TaskId,
        /// Why.
        error: String,
        /// The pause before the next try.
        pause: Duration,
    },
    /// The control plane accepted a report that waited. For a report that did not wait, see
    /// [`NodeEvent::TaskEnded`].
    ReportDelivered {
        /// The task.
        task: TaskId,
        /// The id of the task when it ended. The status shows the task by this id.
        ended_as: TaskId,
        /// How the task ended.
        outcome: OutcomeWord,
        /// How many times the report was sent.
        tries: u32,
        /// The time since the end of the task.
        waited: Duration,
    },
    /// The control plane refused a report that waited. The node does not send it again.
    ReportRefused {
        /// The task.
        task: TaskId,
        /// The id of the task when it ended. The status shows the task by this id.
        ended_as: TaskId,
        /// How the task ended.
        outcome: OutcomeWord,
        /// How many times the report was sent.
        tries: u32,
        /// The answer of the control plane.
        error: String,
    },
    /// The control plane answered, and did not accept a report for 24 h. It stays in the outbox and is not sent.
    ReportSetAside {
        /// The task.
        task: TaskId,
        /// The id of the task when it ended. The status shows the task by this id.
        ended_as: TaskId,
        /// How the task ended.
        outcome: OutcomeWord,
        /// How many times the report was sent.
        tries: u32,
        /// The answer of the control plane.
        error: String,
    },
    /// An operator dropped a report.
    ReportDropped {
        /// The task.
        task: TaskId,
        /// The id of the task when it ended. The status shows the task by this id.
        ended_as: TaskId,
        /// How the task ended.
        outcome: OutcomeWord,
    },
    /// The outbox is full, so leasing pauses.
    OutboxFull {
        /// The control planes whose reports reach a limit. Nothing new is leased from them.
        planes: Vec<PlaneName>,
        /// How many reports are not accepted.
        waiting: usize,
        /// The limit for each control plane.
        limit: usize,
        /// About how much memory the reports take.
        bytes: usize,
    },
    /// The outbox has room again.
    OutboxHasRoom {
        /// How many reports the control plane has not accepted.
        waiting: usize,
    },
    /// Reports cannot be written to the disk, so leasing pauses.
    OutboxNotWritable {
        /// Why.
        error: String,
    },
    /// Reports can be written to the disk again.
    OutboxWritable,
    /// A heartbeat got no answer, or an answer that does not end the lease.
    HeartbeatFailed {
        /// The task.
        task: TaskId,
        /// Why.
        error: String,
        /// The previous heartbeat of this lease failed in the same way. Its line has the level `debug`.
        repeated: bool,
    },
    /// The control plane answers the heartbeats of a lease again.
    HeartbeatRecovered {
        /// The task.
        task: TaskId,
    },
    /// The control plane says that the lease is over.
    HeartbeatRefused {
        /// The task.
        task: TaskId,
        /// Its answer.
        error: String,
        /// The task has ended, and its report is being sent. The line has the level `debug`.
        ended: bool,
    },
}

/// Why a lease was over before its task started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipReason {
    /// It arrived cancelled.
    Cancelled,
    /// It has expired.
    Expired,
}

/// Why a registered node registered again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepeatCause {
    /// The registration is old, and the sign-in service has not requested this node's health either. The line has the
    /// level `debug`.
    Age,
    /// The capabilities changed.
    Capabilities,
    /// The control plane rejects fresh tokens.
    Rejections,
}

impl RepeatCause {
    /// The value in the log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Age => "age",
            Self::Capabilities => "capabilities",
            Self::Rejections => "rejected tokens",
        }
    }
}

impl NodeEvent {
    /// The stable name, equal to the field `event` of the log line.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::NodeStarted { .. } => "node.started",
            Self::NodeLeasing => "node.leasing",
            Self::NodeDraining { .. } => "node.draining",
            Self::NodeStopped { .. } => "node.stopped",
            Self::DiskFull { .. } => "disk.full",
            Self::DiskHasRoom { .. } => "disk.has_room",
            Self::RegistrationAccepted { .. } => "registration.accepted",
            Self::RegistrationRepeated { .. } => "registration.repeated",
            Self::RegistrationFailed { .. } => "registration.failed",
            Self::RegistrationLost { .. } => "registration.lost",
            Self::LoginFailed { .. } => "login.failed",
            Self::TokenRejected { .. } => "token.rejected",
            Self::TokenRenewed { .. } => "token.renewed",
            Self::PluginOutOfService { .. } => "plugin.out_of_service",
            Self::PluginCallsHang { .. } => "plugin.calls_hang",
            Self::PluginCallsReturned { .. } => "plugin.calls_returned",
            Self::RunnerStuck { .. } => "runner.stuck",
            Self::PlaneNotReady { .. } => "plane.not_ready",
            Self::PlaneReady { .. } => "plane.ready",
            Self::PollFailed { .. } => "poll.failed",
            Self::LeaseUnreadable { .. } => "lease.unreadable",
            Self::LeaseSkipped { .. } => "lease.skipped",
            Self::LeaseTakenElsewhere { .. } => "lease.taken_elsewhere",
            Self::LeaseLost { .. } => "lease.lost",
            Self::TaskLeasedAgain { .. } => "task.leased_again",
            Self::TaskStarted { .. } => "task.started",
            Self::TaskCancelled { .. } => "task.cancelled",
            Self::TaskCancelledByOperator { .. } => "task.cancelled_by_operator",
            Self::TaskRenamed { .. } => "task.renamed",
            Self::TaskEnded { .. } => "task.ended",
            Self::ReportWaiting { .. } => "report.waiting",
            Self::ReportDelivered { .. } => "report.delivered",
            Self::ReportRefused { .. } => "report.refused",
            Self::ReportSetAside { .. } => "report.set_aside",
            Self::ReportDropped { .. } => "report.dropped",
            Self::OutboxFull { .. } => "outbox.full",
            Self::OutboxHasRoom { .. } => "outbox.has_room",
            Self::OutboxNotWritable { .. } => "outbox.not_writable",
            Self::OutboxWritable => "outbox.writable",
            Self::HeartbeatFailed { .. } => "heartbeat.failed",
            Self::HeartbeatRecovered { .. } => "heartbeat.recovered",
            Self::HeartbeatRefused { .. } => "heartbeat.refused",
        }
    }

    /// The task that the event is about.
    #[must_use]
    pub fn task(&self) -> Option<&TaskId> {
        match self {
            Self::RunnerStuck { task, .. }
            | Self::LeaseUnreadable { task, .. }
            | Self::LeaseSkipped { task, .. }
            | Self::LeaseTakenElsewhere { task, .. }
            | Self::LeaseLost { task }
            | Self::TaskLeasedAgain { task }
            | Self::TaskStarted { task }
            | Self::TaskCancelled { task }
            | Self::TaskCancelledByOperator { task, .. }
            | Self::TaskRenamed { task, .. }
            | Self::ReportWaiting { task, .. }
            | Self::ReportDelivered { task, .. }
            | Self::ReportRefused { task, .. }
            | Self::ReportSetAside { task, .. }
            | Self::ReportDropped { task, .. }
            | Self::HeartbeatFailed { task, .. }
            | Self::HeartbeatRecovered { task }
            | Self::HeartbeatRefused { task, .. } => Some(task),
            Self::TaskEnded { record, .. } => Some(&record.task_id),
            _ => None,
        }
    }

    /// Changes what the status board shows.
    fn show(&self, board: &StatusBoard) {
        match self {
            Self::NodeLeasing => board.change(|status| status.phase = Phase::Running),
            Self::NodeDraining { .. } => board.change(|status| status.phase = Phase::Draining),
            Self::NodeStopped { .. } => board.change(|status| status.phase = Phase::Stopped),
            Self::DiskFull { disk, .. } | Self::DiskHasRoom { disk, .. } => board.change(|status| status.disk = *disk),
            Self::PlaneNotReady { error, .. } => board.change_plane(|status| status.plane_error = Some(error.clone())),
            Self::PlaneReady { .. } => board.change_plane(|status| status.plane_error = None),
            Self::PollFailed { error, .. } => board.polled(Some(error.clone())),
            Self::RegistrationAccepted { .. } | Self::RegistrationRepeated { .. } => {
                board.registration(RegistrationState::Registered, None);
            }
            Self::RegistrationFailed { error, state, registered, .. } => {
                // While logins succeed, the service knows this node.
                let stays = *registered && *state != RegistrationState::Conflict;
                let state = if stays { board.registration_now() } else { *state };
                board.registration(state, Some(error.clone()));
            }
            Self::RegistrationLost { error } => {
                board.registration(RegistrationState::Disconnected, Some(error.clone()));
            }
            Self::LoginFailed { error, failures, .. } => {
                let error = format!("login failed {failures} times: {error}");
                board.change_plane(|status| status.login_error = Some(error));
            }
            Self::TokenRejected { error, .. } => {
                board.change_plane(|status| status.login_error = Some((*error).to_owned()));
            }
            Self::TokenRenewed { lifetime, .. } => board.change_plane(|status| {
                status.token_expires_at = Timestamp::now().checked_add(*lifetime).ok();
                status.login_error = None;
            }),
            Self::PluginOutOfService { plugin, reason, capabilities } => board.change(|status| {
                status.capabilities.retain(|served| !capabilities.iter().any(|lost| lost.as_str() == served));
                status.degraded.push(format!("plugin {plugin} is out of service: {reason}"));
            }),
            Self::TaskEnded { held, record, .. } => board.ended(*held, Arc::clone(record)),
            Self::ReportDelivered { ended_as, .. } => board.settled(ended_as, ReportState::Accepted),
            Self::ReportRefused { ended_as, .. } => board.settled(ended_as, ReportState::Refused),
            Self::ReportSetAside { ended_as, .. } => board.settled(ended_as, ReportState::SetAside),
            Self::ReportDropped { ended_as, .. } => board.settled(ended_as, ReportState::Dropped),
            // The status reads leases, heartbeats and hanging calls when it is shown. The outbox sets its own part, and
            // counts reports there too.
            _ => {}
        }
    }
}

/// Where events are emitted and subscribed to. Cheap to clone. Events that belong to a control plane change the status of
/// the one of [`NodeEvents::of_plane`], at first of the first one.
#[derive(Clone)]
pub struct NodeEvents {
    board: StatusBoard,
    /// Created by the first subscriber.
    sender: Arc<OnceLock<broadcast::Sender<NodeEvent>>>,
}

impl NodeEvents {
    /// Events that change `board`.
    #[must_use]
    pub fn new(board: StatusBoard) -> Self {
        Self { board, sender: Arc::default() }
    }

    /// The same events, from the control plane of this index.
    #[must_use]
    pub fn of_plane(&self, plane: usize) -> Self {
        Self { board: self.board.of_plane(plane), sender: Arc::clone(&self.sender) }
    }

    /// The board that events change.
    #[must_use]
    pub fn board(&self) -> &StatusBoard {
        &self.board
    }

    /// Updates the status board, writes the log line and sends `event` to the subscribers.
    pub fn emit(&self, event: NodeEvent) {
        event.show(&self.board);
        event.log();
        if let Some(sender) = self.sender.get() {
            // An error means that no subscriber is left.
            let _ = sender.send(event);
        }
    }

    /// Every event from now on. A subscriber that is more than 1,024 events late loses the oldest ones.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<NodeEvent> {
        self.sender.get_or_init(|| broadcast::Sender::new(STORED_MAX)).subscribe()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! The codes of log lines, as a test sees them.

    use std::sync::{Arc, Mutex};

    use tracing::{Event, Level, Subscriber, field::Visit};
    use tracing_subscriber::{Layer, layer::Context};

    /// Collects the field `event` of each line up to a level.
    #[derive(Clone)]
    pub(crate) struct LogCodes {
        codes: Arc<Mutex<Vec<String>>>,
        level: Level,
    }

    impl LogCodes {
        pub(crate) fn up_to(level: Level) -> Self {
            Self { codes: Arc::default(), level }
        }

        pub(crate) fn take(&self) -> Vec<String> {
            std::mem::take(&mut *self.codes.lock().expect("no panic while it is locked"))
        }
    }

    impl<S: Subscriber> Layer<S> for LogCodes {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            if *event.metadata().level() <= self.level {
                event.record(&mut Code(self));
            }
        }
    }

    struct Code<'a>(&'a LogCodes);

    impl Visit for Code<'_> {
        fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
            if field.name() == "event" {
                self.0.codes.lock().expect("no panic while it is locked").push(value.to_owned());
            }
        }

        fn record_debug(&mut self, _: &tracing::field::Field, _: &dyn std::fmt::Debug) {}
    }
}
