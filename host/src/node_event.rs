//! The node's events, as one typed stream.
//!
//! A module passes each change of state to [`NodeEvents::emit`]. `emit` updates the status board, writes the log line
//! and sends the event to the subscribers. [`NodeEvent::name`] is the code of the log line in its field `event`
//! (docs/operations/events.md). Log lines that report no change of state do not pass through here.
//!
//! Each line keeps the target of the module that emits it, because filters in `RUST_LOG` name targets. It also keeps
//! the fields of the current span, so a module emits an event of a task in the span of that task.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::sync::broadcast;
use tracing::{debug, info, warn};

use crate::model::{DiskStatus, HeldNumber, Phase, PlaneName, ReportState, StatusBoard, TaskId, TaskRecord, millis};

const APP: &str = "runner_host::app";
const ENGINE: &str = "runner_host::engine";
const ATTEMPT: &str = "runner_host::engine::attempt";
const DRIVER: &str = "runner_host::session::driver";
const DISK: &str = "runner_host::storage::disk";

/// Events that are stored for a slow subscriber. It loses older ones.
const STORED_MAX: usize = 1024;

/// A change of state of the node, a lease or a task.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NodeEvent {
    /// The node serves its pages and begins to register.
    NodeStarted {
        /// Where its pages are.
        address: Option<SocketAddr>,
        /// Its control plane.
        plane: PlaneName,
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
            Self::PollFailed { .. } => "poll.failed",
            Self::LeaseUnreadable { .. } => "lease.unreadable",
            Self::LeaseSkipped { .. } => "lease.skipped",
            Self::LeaseTakenElsewhere { .. } => "lease.taken_elsewhere",
            Self::LeaseLost { .. } => "lease.lost",
            Self::TaskLeasedAgain { .. } => "task.leased_again",
            Self::TaskStarted { .. } => "task.started",
            Self::TaskCancelled { .. } => "task.cancelled",
            Self::TaskRenamed { .. } => "task.renamed",
            Self::TaskEnded { .. } => "task.ended",
            Self::HeartbeatFailed { .. } => "heartbeat.failed",
            Self::HeartbeatRecovered { .. } => "heartbeat.recovered",
            Self::HeartbeatRefused { .. } => "heartbeat.refused",
        }
    }

    /// The task that the event is about.
    #[must_use]
    pub fn task(&self) -> Option<&TaskId> {
        match self {
            Self::LeaseUnreadable { task, .. }
            | Self::LeaseSkipped { task, .. }
            | Self::LeaseTakenElsewhere { task, .. }
            | Self::LeaseLost { task }
            | Self::TaskLeasedAgain { task }
            | Self::TaskStarted { task }
            | Self::TaskCancelled { task }
            | Self::TaskRenamed { task, .. }
            | Self::HeartbeatFailed { task, .. }
            | Self::HeartbeatRecovered { task }
            | Self::HeartbeatRefused { task, .. } => Some(task),
            Self::TaskEnded { record, .. } => Some(&record.task_id),
            Self::NodeStarted { .. }
            | Self::NodeLeasing
            | Self::NodeDraining { .. }
            | Self::NodeStopped { .. }
            | Self::DiskFull { .. }
            | Self::DiskHasRoom { .. }
            | Self::PollFailed { .. } => None,
        }
    }

    /// Changes what the status board shows.
    fn show(&self, board: &StatusBoard) {
        match self {
            Self::NodeLeasing => board.change(|status| status.phase = Phase::Running),
            Self::NodeDraining { .. } => board.change(|status| status.phase = Phase::Draining),
            Self::NodeStopped { .. } => board.change(|status| status.phase = Phase::Stopped),
            Self::DiskFull { disk, .. } | Self::DiskHasRoom { disk, .. } => board.change(|status| status.disk = *disk),
            Self::PollFailed { error, .. } => board.polled(Some(error.clone())),
            Self::TaskEnded { held, record, .. } => board.ended(*held, Arc::clone(record)),
            // The board reads leases and heartbeats from the held lease when it is shown.
            _ => {}
        }
    }

    /// Writes the log line.
    fn log(&self) {
        match self {
            Self::NodeStarted { address, plane } => {
                info!(target: APP, event = "node.started", address = address.map(tracing::field::display), plane = %plane, "node started");
            }
            Self::NodeLeasing => info!(target: APP, event = "node.leasing", "node leases tasks"),
            Self::NodeDraining { tasks, limit } => {
                info!(target: ENGINE, event = "node.draining", tasks, limit_ms = millis(*limit), "draining");
            }
            Self::NodeStopped { cut_short } => info!(target: APP, event = "node.stopped", cut_short, "node stopped"),
            Self::DiskFull { path, disk: DiskStatus { free_bytes, floor_bytes, .. } } => {
                warn!(target: DISK, event = "disk.full", path = %path.display(), free_bytes, floor_bytes, "disk is nearly full, leasing paused");
            }
            Self::DiskHasRoom { path, disk: DiskStatus { free_bytes, floor_bytes, .. } } => {
                info!(target: DISK, event = "disk.has_room", path = %path.display(), free_bytes, floor_bytes, "disk has room, leasing resumed");
            }
            Self::PollFailed { error, pause } => {
                warn!(target: ENGINE, event = "poll.failed", error, retry_in_ms = millis(*pause), "poll failed");
            }
            Self::LeaseUnreadable { task, error } => {
                warn!(target: ENGINE, event = "lease.unreadable", task_id = %task, error, "lease could not be read, its task is reported as failed");
            }
            Self::LeaseSkipped { reason: SkipReason::Cancelled, .. } => {
                info!(target: ENGINE, event = "lease.skipped", "lease skipped, it was already cancelled");
            }
            Self::LeaseSkipped { reason: SkipReason::Expired, .. } => {
                warn!(target: ENGINE, event = "lease.skipped", "lease skipped, it has expired");
            }
            Self::LeaseTakenElsewhere { error, .. } => {
                info!(target: ATTEMPT, event = "lease.taken_elsewhere", error, "another node has the lease");
            }
            Self::LeaseLost { task } => warn!(target: DRIVER, event = "lease.lost", task_id = %task, "lease lost"),
            Self::TaskLeasedAgain { .. } => {
                info!(target: ENGINE, event = "task.leased_again", "task leased again, its report is not accepted yet");
            }
            Self::TaskStarted { .. } => info!(target: ATTEMPT, event = "task.started", "task started"),
            Self::TaskCancelled { task } => {
                info!(target: DRIVER, event = "task.cancelled", task_id = %task, "control plane cancelled the task");
            }
            Self::TaskRenamed { task, formerly } => {
                info!(target: DRIVER, event = "task.renamed", task_id = %task, formerly = %formerly, "control plane renamed the task");
            }
            Self::TaskEnded { record, reason, report_reason, .. } => {
                log_task_ended(record, reason.as_deref(), report_reason.as_deref());
            }
            Self::HeartbeatFailed { task, error, repeated: true } => {
                debug!(target: DRIVER, event = "heartbeat.failed", task_id = %task, error, "heartbeat failed");
            }
            Self::HeartbeatFailed { task, error, repeated: false } => {
                warn!(target: DRIVER, event = "heartbeat.failed", task_id = %task, error, "heartbeat failed");
            }
            Self::HeartbeatRecovered { task } => {
                info!(target: DRIVER, event = "heartbeat.recovered", task_id = %task, "heartbeats are answered again");
            }
            Self::HeartbeatRefused { task, error, ended: true } => {
                debug!(target: DRIVER, event = "heartbeat.refused", task_id = %task, error, "heartbeat refused");
            }
            Self::HeartbeatRefused { task, error, ended: false } => {
                warn!(target: DRIVER, event = "heartbeat.refused", task_id = %task, error, "heartbeat refused");
            }
        }
    }
}

/// Writes the one log line for an ended task.
fn log_task_ended(record: &TaskRecord, reason: Option<&str>, why: Option<&str>) {
    let TaskRecord { outcome, elapsed_ms, .. } = record;
    let (outcome, artifacts) = (outcome.as_str(), record.artifacts.len());
    match record.report {
        ReportState::Accepted if reason.is_none() => {
            info!(target: ATTEMPT, event = "task.ended", report = "accepted", outcome, artifacts, elapsed_ms, "task ended");
        }
        ReportState::Accepted => {
            warn!(target: ATTEMPT, event = "task.ended", report = "accepted", outcome, artifacts, elapsed_ms, reason, "task ended");
        }
        ReportState::None => {
            info!(target: ATTEMPT, event = "task.ended", report = "none", outcome, elapsed_ms, cancelled = why, "task ended, nothing to report");
        }
        ReportState::Refused => {
            warn!(target: ATTEMPT, event = "task.ended", report = "refused", outcome, artifacts, elapsed_ms, reason, error = why, "task ended, its report was refused permanently");
        }
        ReportState::Waiting => {
            warn!(target: ATTEMPT, event = "task.ended", report = "waiting", outcome, artifacts, elapsed_ms, reason, error = why, "task ended, its report waits in the outbox");
        }
        ReportState::Dropped => {
            warn!(target: ATTEMPT, event = "task.ended", report = "dropped", outcome, artifacts, elapsed_ms, reason, "task ended, its report was dropped by an operator");
        }
    }
}

/// Where events are emitted and subscribed to. Cheap to clone.
#[derive(Clone)]
pub struct NodeEvents(Arc<Inner>);

struct Inner {
    board: StatusBoard,
    /// Created by the first subscriber.
    sender: OnceLock<broadcast::Sender<NodeEvent>>,
}

impl NodeEvents {
    /// Events that change `board`.
    #[must_use]
    pub fn new(board: StatusBoard) -> Self {
        Self(Arc::new(Inner { board, sender: OnceLock::new() }))
    }

    /// The board that events change.
    #[must_use]
    pub fn board(&self) -> &StatusBoard {
        &self.0.board
    }

    /// Updates the status board, writes the log line and sends `event` to the subscribers.
    pub fn emit(&self, event: NodeEvent) {
        event.show(&self.0.board);
        event.log();
        if let Some(sender) = self.0.sender.get() {
            // An error means that no subscriber is left.
            let _ = sender.send(event);
        }
    }

    /// Every event from now on. A subscriber that is more than 1,024 events late loses the oldest ones.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<NodeEvent> {
        self.0.sender.get_or_init(|| broadcast::Sender::new(STORED_MAX)).subscribe()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! The codes of log lines, as a test sees them.

    use std::sync::{Arc, Mutex};

    use tracing::{Event, Level, Subscriber, field::Visit};
    use tracing_subscriber::{Layer, layer::Context};

    /// Collects the field `event` of each line except debug lines.
    #[derive(Clone, Default)]
    pub(crate) struct LogCodes(Arc<Mutex<Vec<String>>>);

    impl LogCodes {
        pub(crate) fn take(&self) -> Vec<String> {
            std::mem::take(&mut *self.0.lock().expect("no panic while it is locked"))
        }
    }

    impl<S: Subscriber> Layer<S> for LogCodes {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            if *event.metadata().level() <= Level::INFO {
                event.record(&mut Code(self));
            }
        }
    }

    struct Code<'a>(&'a LogCodes);

    impl Visit for Code<'_> {
        fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
            if field.name() == "event" {
                self.0.0.lock().expect("no panic while it is locked").push(value.to_owned());
            }
        }

        fn record_debug(&mut self, _: &tracing::field::Field, _: &dyn std::fmt::Debug) {}
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::{testing::LogCodes, *};
    use crate::model::{CancelReason, Capability, Lease, Outcome, TaskResult};

    fn task() -> TaskId {
        TaskId::parse("one").expect("a task id")
    }

    fn task_ended(board: &StatusBoard, report: ReportState, outcome: Outcome) -> NodeEvent {
        let lease = Lease::bare(task(), Capability::parse("/lab/echo/v1").expect("a capability"));
        let held_lease = crate::model::HeldLease::new(lease, crate::model::Setup::Pending).0;
        let held = board.began(&held_lease, None);
        let reason = outcome.reason();
        let record = TaskRecord::new(&held_lease.lease, None, &TaskResult::bare(outcome), Duration::ZERO, report);
        let report_reason = Some(CancelReason::Plane.as_str().to_owned());
        NodeEvent::TaskEnded { held, record: Arc::new(record), reason, report_reason }
    }

    /// Each event that has a line above the level `debug`.
    fn all(board: &StatusBoard) -> Vec<NodeEvent> {
        let (path, disk, error) = (PathBuf::from("/"), DiskStatus::default(), "why".to_owned());
        let failed = || Outcome::HostFault { message: "why".to_owned() };
        vec![
            NodeEvent::NodeStarted { address: None, plane: PlaneName::parse("test").expect("a name") },
            NodeEvent::NodeLeasing,
            NodeEvent::DiskFull { path: path.clone(), disk },
            NodeEvent::DiskHasRoom { path, disk },
            NodeEvent::PollFailed { error: error.clone(), pause: Duration::ZERO },
            NodeEvent::LeaseUnreadable { task: task(), error: error.clone() },
            NodeEvent::LeaseSkipped { task: task(), reason: SkipReason::Cancelled },
            NodeEvent::LeaseSkipped { task: task(), reason: SkipReason::Expired },
            NodeEvent::LeaseTakenElsewhere { task: task(), error: error.clone() },
            NodeEvent::LeaseLost { task: task() },
            NodeEvent::TaskLeasedAgain { task: task() },
            NodeEvent::TaskStarted { task: task() },
            NodeEvent::TaskCancelled { task: task() },
            NodeEvent::TaskRenamed { task: task(), formerly: task() },
            task_ended(board, ReportState::Accepted, Outcome::Completed),
            task_ended(board, ReportState::Accepted, failed()),
            task_ended(board, ReportState::Refused, failed()),
            task_ended(board, ReportState::Waiting, failed()),
            task_ended(board, ReportState::Dropped, failed()),
            task_ended(board, ReportState::None, Outcome::Cancelled),
            NodeEvent::HeartbeatFailed { task: task(), error: error.clone(), repeated: false },
            NodeEvent::HeartbeatRecovered { task: task() },
            NodeEvent::HeartbeatRefused { task: task(), error, ended: false },
            NodeEvent::NodeDraining { tasks: 1, limit: Duration::ZERO },
            NodeEvent::NodeStopped { cut_short: false },
        ]
    }

    #[test]
    fn every_event_is_named_like_its_log_line() {
        let codes = LogCodes::default();
        let board = StatusBoard::new("node".to_owned(), 1, Vec::new(), serde_json::Value::Null);
        let events = NodeEvents::new(board.clone());
        let all = all(&board);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(codes.clone()), || {
            for event in &all {
                events.emit(event.clone());
                assert_eq!(codes.take(), [event.name()], "{event:?}");
            }
        });
        let status = board.now();
        assert_eq!((status.phase, status.polls.failed, status.recent.len()), (Phase::Stopped, 1, 6));
        assert_eq!(status.unreported, 1);
    }

    #[test]
    fn late_subscribers_lose_only_the_oldest_events() {
        let events = NodeEvents::new(StatusBoard::new("node".to_owned(), 1, Vec::new(), serde_json::Value::Null));
        events.emit(NodeEvent::NodeLeasing); // nobody is subscribed
        let mut subscriber = events.subscribe();
        for _ in 0..=STORED_MAX {
            events.emit(NodeEvent::TaskStarted { task: task() });
        }
        assert!(matches!(subscriber.try_recv(), Err(broadcast::error::TryRecvError::Lagged(1))));
        assert_eq!(std::iter::from_fn(|| subscriber.try_recv().ok()).count(), STORED_MAX);
        drop(subscriber);
        events.emit(NodeEvent::NodeLeasing); // nobody is subscribed any more
    }
}
