//! The log line of each event.
//!
//! A line keeps the target of the module that emits the event, because filters in `RUST_LOG` name targets. It also keeps
//! the fields of the current span, so a module emits an event of a task in the span of that task.

use tracing::{debug, error, info, warn};

use super::{NodeEvent, RepeatCause, SkipReason};
use crate::model::{DiskStatus, PlaneName, ReportState, TaskRecord, millis};

const APP: &str = "runner_host::app";
const ENGINE: &str = "runner_host::engine";
const ATTEMPT: &str = "runner_host::engine::attempt";
const CONTROL: &str = "runner_host::control";
const DRIVER: &str = "runner_host::session::driver";
const DISK: &str = "runner_host::storage::disk";
const REGISTRATION: &str = "runner_host::auth::registration";
const RENEWAL: &str = "runner_host::auth::renewal";
const LOCAL: &str = "runner_host::leases::local";
const PLUGIN_RUN: &str = "runner_host::plugins::run";
const STUCK: &str = "runner_host::plugins::stuck";
const OUTBOX: &str = "runner_host::outbox";
const SENDING: &str = "runner_host::outbox::sending";
const WRITER: &str = "runner_host::outbox::writer";

impl NodeEvent {
    /// Writes the log line.
    pub(super) fn log(&self) {
        match self {
            Self::NodeStarted { address, planes } => {
                let plane: Vec<&str> = planes.iter().map(PlaneName::as_str).collect();
                info!(target: APP, event = "node.started", address = address.map(tracing::field::display), plane = plane.join(" "), "node started");
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
            Self::RegistrationAccepted { address, form, capabilities } => {
                info!(target: REGISTRATION, event = "registration.accepted", address, form = form.as_str(), capabilities, "node registered");
            }
            Self::RegistrationRepeated { cause: cause @ RepeatCause::Age, .. } => {
                debug!(target: REGISTRATION, event = "registration.repeated", cause = cause.as_str(), "registration repeated");
            }
            Self::RegistrationRepeated { cause, capabilities } => {
                info!(target: REGISTRATION, event = "registration.repeated", cause = cause.as_str(), capabilities, "registration repeated");
            }
            Self::RegistrationFailed { error, state, pause, repeated: true, .. } => {
                debug!(target: REGISTRATION, event = "registration.failed", %error, %state, retry_in_ms = millis(*pause), "registration failed");
            }
            Self::RegistrationFailed { error, state, pause, repeated: false, .. } => {
                warn!(target: REGISTRATION, event = "registration.failed", %error, %state, retry_in_ms = millis(*pause), "registration failed");
            }
            Self::RegistrationLost { error } => {
                warn!(target: RENEWAL, event = "registration.lost", %error, "node is not registered any more");
            }
            Self::LoginFailed { error, failures, pause } => {
                warn!(target: RENEWAL, event = "login.failed", %error, attempt = failures, retry_in_ms = millis(*pause), "login failed");
            }
            Self::TokenRejected { error, pause } => {
                warn!(target: RENEWAL, event = "token.rejected", error, retry_in_ms = millis(*pause), "node token rejected");
            }
            Self::TokenRenewed { lifetime, renew_in } => {
                debug!(target: RENEWAL, event = "token.renewed", ttl_ms = millis(*lifetime), renew_in_ms = millis(*renew_in), "node token renewed");
            }
            Self::PluginOutOfService { plugin, reason, .. } => {
                error!(target: STUCK, event = "plugin.out_of_service", %plugin, reason, "plugin is out of service");
            }
            Self::PluginCallsHang { plugin, calls, call, longest } => {
                warn!(target: PLUGIN_RUN, event = "plugin.calls_hang", %plugin, calls, call, longest_ms = millis(*longest), "calls into the plugin do not return");
            }
            Self::PluginCallsReturned { plugin } => {
                info!(target: PLUGIN_RUN, event = "plugin.calls_returned", %plugin, "calls into the plugin have returned");
            }
            Self::RunnerStuck { plugin, grace, strikes, .. } => {
                warn!(target: STUCK, event = "runner.stuck", %plugin, grace_ms = millis(*grace), strikes, "runner ignored its cancel, slot released");
            }
            Self::PlaneNotReady { plane, error } => {
                warn!(target: LOCAL, event = "plane.not_ready", %plane, error, "control plane cannot be used, no job is claimed");
            }
            Self::PlaneReady { plane } => {
                info!(target: LOCAL, event = "plane.ready", %plane, "control plane can be used again");
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
            Self::TaskCancelledByOperator { plane, task } => {
                info!(target: CONTROL, event = "task.cancelled_by_operator", task_id = %task, %plane, "operator cancelled the task");
            }
            Self::TaskRenamed { task, formerly } => {
                info!(target: DRIVER, event = "task.renamed", task_id = %task, formerly = %formerly, "control plane renamed the task");
            }
            Self::TaskEnded { record, reason, report_reason, .. } => {
                log_task_ended(record, reason.as_deref(), report_reason.as_deref());
            }
            Self::ReportWaiting { task, error, pause } => {
                warn!(target: SENDING, event = "report.waiting", task_id = %task, error, retry_in_ms = millis(*pause), "reports wait for the control plane");
            }
            Self::ReportDelivered { task, outcome, tries, waited, .. } => {
                info!(target: SENDING, event = "report.delivered", task_id = %task, outcome = outcome.as_str(), tries, waited_ms = millis(*waited), "report delivered");
            }
            Self::ReportRefused { task, outcome, tries, error, .. } => {
                warn!(target: SENDING, event = "report.refused", task_id = %task, outcome = outcome.as_str(), tries, error, "report refused permanently");
            }
            Self::ReportSetAside { task, outcome, tries, error, .. } => {
                error!(target: SENDING, event = "report.set_aside", task_id = %task, outcome = outcome.as_str(), tries, error, "report was not accepted for 24 h, it is kept and not sent");
            }
            Self::ReportDropped { task, outcome, .. } => {
                warn!(target: OUTBOX, event = "report.dropped", task_id = %task, outcome = outcome.as_str(), "report dropped by an operator");
            }
            Self::OutboxFull { planes, waiting, limit, bytes } => {
                let plane: Vec<&str> = planes.iter().map(PlaneName::as_str).collect();
                warn!(target: OUTBOX, event = "outbox.full", plane = plane.join(" "), waiting, limit, bytes, "leasing paused, the outbox is full");
            }
            Self::OutboxHasRoom { waiting } => {
                info!(target: OUTBOX, event = "outbox.has_room", waiting, "leasing resumed, the outbox has room");
            }
            Self::OutboxNotWritable { error } => {
                error!(target: WRITER, event = "outbox.not_writable", %error, "outbox cannot be written, reports are kept in memory only");
            }
            Self::OutboxWritable => info!(target: WRITER, event = "outbox.writable", "outbox can be written again"),
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
        ReportState::Waiting | ReportState::SetAside => {
            warn!(target: ATTEMPT, event = "task.ended", report = "waiting", outcome, artifacts, elapsed_ms, reason, error = why, "task ended, its report waits in the outbox");
        }
        ReportState::Dropped => {
            warn!(target: ATTEMPT, event = "task.ended", report = "dropped", outcome, artifacts, elapsed_ms, reason, "task ended, its report was dropped by an operator");
        }
    }
}
