//! Whether the node can get work, and why not. All callers use this one function of the status.

use std::fmt;

use jiff::Timestamp;
use serde::{Serialize, Serializer, ser::SerializeStruct as _};

use super::{HostStatus, MissedHeartbeats, Phase, PlaneName, PlaneState, PlaneStatus, RegistrationState};

/// Fewer failed polls in a row do not affect readiness.
const FAILED_POLLS_MIN: u32 = 3;
/// The same for heartbeats of every held lease: with all slots in use there are no polls.
const FAILED_HEARTBEATS_MIN: u32 = 3;

/// When a node with several control planes is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadyWhen {
    /// One of them can give work.
    #[default]
    Any,
    /// All of them can.
    All,
}

/// Whether the node can get work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readiness {
    /// The node can get work.
    pub ready: bool,
    /// Why the node or one of its control planes is not ready. Act on the first one.
    pub reasons: Vec<NotReady>,
}

/// Why the node or a control plane is not ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotReady {
    /// The reason.
    #[serde(flatten)]
    pub reason: NotReadyReason,
    /// The control plane, if the reason belongs to one of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plane: Option<PlaneName>,
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.plane {
            Some(plane) => write!(f, "{plane}: {}", self.reason),
            None => self.reason.fmt(f),
        }
    }
}

/// Why the node cannot get work.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotReadyReason {
    /// No plugin is loaded.
    NoPlugin,
    /// Every plugin is out of service. One line each.
    NoPluginInService(Vec<String>),
    /// A thread for a plugin's calls cannot be created.
    NoThread(String),
    /// Another node with this wallet is online.
    RegistrationConflict(Option<String>),
    /// Too many reports wait for the control plane, or they take too much memory.
    OutboxFull {
        /// How many reports wait.
        waiting: usize,
    },
    /// Reports cannot be written to the disk.
    OutboxNotWritten(String),
    /// Too little space is free below `SCRATCH_DIR`.
    DiskFull {
        /// The free space in bytes.
        free_bytes: u64,
        /// `DISK_FREE_MIN`.
        floor_bytes: u64,
    },
    /// The node has no valid node token, and the last sign-in failed.
    NotSignedIn(String),
    /// The control plane cannot be used now.
    PlaneNotReady(String),
    /// Polls fail.
    PollsFail {
        /// How many in a row.
        failed: u32,
        /// The last failure.
        error: String,
    },
    /// A poll has waited for its answer for a long time.
    PollUnanswered,
    /// Heartbeats of every held lease fail.
    HeartbeatsFail {
        /// How many in a row.
        failed: u32,
        /// The last failure.
        error: String,
    },
    /// The node has not signed in yet.
    Starting {
        /// The registration state at the sign-in service.
        registration: RegistrationState,
        /// The last failure.
        error: Option<String>,
    },
    /// A stop of the node was requested.
    Draining,
    /// The node has stopped.
    Stopped,
}

impl NotReadyReason {
    /// A stable code for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoPlugin => "no-plugin",
            Self::NoPluginInService(_) => "no-plugin-in-service",
            Self::NoThread(_) => "no-thread",
            Self::RegistrationConflict(_) => "registration-conflict",
            Self::OutboxFull { .. } => "outbox-full",
            Self::OutboxNotWritten(_) => "outbox-not-written",
            Self::DiskFull { .. } => "disk-full",
            Self::NotSignedIn(_) => "not-signed-in",
            Self::PlaneNotReady(_) => "plane-not-ready",
            Self::PollsFail { .. } => "polls-fail",
            Self::PollUnanswered => "poll-unanswered",
            Self::HeartbeatsFail { .. } => "heartbeats-fail",
            Self::Starting { .. } => "starting",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

impl NotReadyReason {
    /// The place in a list: first the reasons that an operator must act on.
    fn rank(&self) -> u8 {
        match self {
            Self::NoPlugin | Self::NoPluginInService(_) => 0,
            Self::NoThread(_) => 1,
            Self::RegistrationConflict(_) => 2,
            Self::OutboxFull { .. } => 3,
            Self::OutboxNotWritten(_) => 4,
            Self::DiskFull { .. } => 5,
            Self::NotSignedIn(_) => 6,
            Self::PlaneNotReady(_) => 7,
            Self::PollsFail { .. } => 8,
            Self::PollUnanswered => 9,
            Self::HeartbeatsFail { .. } => 10,
            Self::Starting { .. } => 11,
            Self::Draining => 12,
            Self::Stopped => 13,
        }
    }
}

impl fmt::Display for NotReadyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPlugin => f.write_str("no plugin is loaded"),
            Self::NoPluginInService(lines) => f.write_str(&lines.join("; ")),
            Self::NoThread(err) => {
                write!(f, "cannot create a thread for the calls of a plugin: {err}; raise the limit of threads")
            }
            Self::RegistrationConflict(Some(err)) => write!(f, "conflict: {err}"),
            Self::RegistrationConflict(None) => f.write_str("conflict"),
            Self::OutboxFull { waiting } => {
                write!(f, "the outbox is full: {waiting} reports wait for the control plane")
            }
            Self::OutboxNotWritten(err) => write!(f, "the outbox cannot be written: {err}"),
            Self::DiskFull { free_bytes, floor_bytes } => write!(
                f,
                "disk nearly full: {free_bytes} bytes are free where tasks work, DISK_FREE_MIN is {floor_bytes}"
            ),
            Self::NotSignedIn(err) => write!(f, "not signed in: {err}"),
            Self::PlaneNotReady(err) => write!(f, "the control plane cannot be used: {err}"),
            Self::PollsFail { failed, error } => {
                write!(f, "the last {failed} polls of the control plane failed: {error}")
            }
            Self::PollUnanswered => f.write_str("the control plane does not answer the poll"),
            Self::HeartbeatsFail { failed, error } => {
                write!(f, "the last {failed} heartbeats of a lease failed: {error}")
            }
            Self::Starting { registration, error: Some(err) } => write!(f, "not signed in ({registration}): {err}"),
            Self::Starting { registration, error: None } => write!(f, "not signed in ({registration})"),
            Self::Draining => f.write_str("draining"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

impl Serialize for NotReadyReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut shown = serializer.serialize_struct("reason", 2)?;
        shown.serialize_field("code", self.code())?;
        shown.serialize_field("message", &self.to_string())?;
        shown.end()
    }
}

impl Readiness {
    /// The readiness that follows from the status at `now`.
    #[must_use]
    pub fn of(status: &HostStatus, now: Timestamp) -> Self {
        let planes = &status.planes.0;
        let of_node = match status.phase {
            Phase::Starting => Vec::new(),
            Phase::Running => of_node(status),
            Phase::Draining => vec![NotReadyReason::Draining],
            Phase::Stopped => vec![NotReadyReason::Stopped],
        };
        let of_planes: Vec<_> = planes.iter().map(|plane| Self::of_plane(status, plane, now)).collect();
        let mut can_work = of_planes.iter().map(Vec::is_empty);
        let planes_ready = match status.ready_when {
            ReadyWhen::Any => can_work.any(|ready| ready),
            ReadyWhen::All => can_work.all(|ready| ready),
        };
        let ready = of_node.is_empty() && planes_ready;
        let named = |plane: &PlaneStatus| (planes.len() > 1).then(|| plane.name.clone());
        let of_planes = planes.iter().zip(of_planes).flat_map(|(plane, reasons)| {
            reasons.into_iter().map(move |reason| NotReady { plane: named(plane), reason })
        });
        let mut reasons: Vec<_> = of_node.into_iter().map(|reason| NotReady { plane: None, reason }).collect();
        reasons.extend(of_planes);
        // The sort is stable: of one rank, the reasons of the node come first.
        reasons.sort_by_key(|reason| reason.reason.rank());
        Self { ready, reasons }
    }

    /// Why the control plane cannot give work.
    #[must_use]
    pub fn of_plane(status: &HostStatus, plane: &PlaneStatus, now: Timestamp) -> Vec<NotReadyReason> {
        match status.phase {
            Phase::Draining | Phase::Stopped => Vec::new(),
            Phase::Running if plane.has_begun => while_running(status, plane, now),
            Phase::Starting | Phase::Running => vec![match &plane.state.plane_error {
                Some(err) => NotReadyReason::PlaneNotReady(err.clone()),
                None => NotReadyReason::Starting {
                    registration: plane.state.registration,
                    error: plane.state.registration_error.clone(),
                },
            }],
        }
    }

    /// Why the node is not ready. Nothing if it is.
    #[must_use]
    pub fn reasons(&self) -> &[NotReady] {
        if self.ready { &[] } else { &self.reasons }
    }
}

/// Why the node can get no work from any control plane.
fn of_node(status: &HostStatus) -> Vec<NotReadyReason> {
    let HostStatus { outbox, disk, .. } = status;
    let mut reasons = Vec::new();
    if status.capabilities.is_empty() {
        reasons.push(match &status.degraded[..] {
            [] => NotReadyReason::NoPlugin,
            lines => NotReadyReason::NoPluginInService(lines.to_vec()),
        });
    }
    if let Some(err) = &status.no_thread {
        reasons.push(NotReadyReason::NoThread(err.clone()));
    }
    if let Some(err) = &outbox.not_written {
        reasons.push(NotReadyReason::OutboxNotWritten(err.clone()));
    }
    if disk.full {
        let free_bytes = disk.free_bytes.unwrap_or_default();
        reasons.push(NotReadyReason::DiskFull { free_bytes, floor_bytes: disk.floor_bytes });
    }
    reasons
}

/// Why a control plane that was ready before cannot give work.
fn while_running(status: &HostStatus, plane: &PlaneStatus, now: Timestamp) -> Vec<NotReadyReason> {
    let PlaneState { registration, registration_error, login_error, token_expires_at, plane_error, polls, .. } =
        &plane.state;
    let mut reasons = Vec::new();
    if *registration == RegistrationState::Conflict {
        reasons.push(NotReadyReason::RegistrationConflict(registration_error.clone()));
    }
    if status.outbox.full_planes.contains(&plane.name) {
        reasons.push(NotReadyReason::OutboxFull { waiting: status.outbox.waiting });
    }
    // A token is used until it expires, also while its renewal fails.
    if let Some(err) = login_error
        && token_expires_at.is_none_or(|end| end <= now)
    {
        reasons.push(NotReadyReason::NotSignedIn(err.clone()));
    }
    if let Some(err) = plane_error {
        reasons.push(NotReadyReason::PlaneNotReady(err.clone()));
    }
    if polls.failed >= FAILED_POLLS_MIN {
        let error = polls.last_error.clone().unwrap_or_default();
        reasons.push(NotReadyReason::PollsFail { failed: polls.failed, error });
    } else if polls.unanswered {
        reasons.push(NotReadyReason::PollUnanswered);
    }
    if let Some(MissedHeartbeats { count, error }) = status.tasks.missed(&plane.name)
        && count >= FAILED_HEARTBEATS_MIN
    {
        reasons.push(NotReadyReason::HeartbeatsFail { failed: count, error });
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::StatusBoard;

    #[track_caller]
    fn check(change: impl FnOnce(&mut HostStatus), codes: &[&str]) {
        let board = StatusBoard::new(1, vec!["/examples/hello/v1".to_owned()]);
        let mut status = board.now();
        status.phase = Phase::Running;
        status.planes.0[0].has_begun = true;
        change(&mut status);
        let readiness = Readiness::of(&status, Timestamp::UNIX_EPOCH);
        let found: Vec<_> = readiness.reasons().iter().map(|reason| reason.reason.code()).collect();
        assert_eq!(found, codes);
    }

    #[test]
    fn readiness_lists_all_reasons_in_priority_order() {
        check(|_| {}, &[]);
        check(|now| now.phase = Phase::Starting, &["starting"]);
        check(|now| now.phase = Phase::Draining, &["draining"]);
        check(|now| now.phase = Phase::Stopped, &["stopped"]);
        check(|now| now.capabilities.clear(), &["no-plugin"]);
        check(
            |now| {
                now.degraded.push("plugin a is out of service".to_owned());
                now.capabilities.clear();
                now.no_thread = Some("EAGAIN".to_owned());
                let plane = &mut now.planes.0[0].state;
                plane.registration = RegistrationState::Conflict;
                plane.login_error = Some("401".to_owned());
                plane.plane_error = Some("read-only".to_owned());
                plane.polls.failed = FAILED_POLLS_MIN;
                plane.polls.unanswered = true;
                now.outbox.full_planes.push(now.planes.0[0].name.clone());
                now.outbox.not_written = Some("no space".to_owned());
                now.disk.full = true;
            },
            &[
                "no-plugin-in-service",
                "no-thread",
                "registration-conflict",
                "outbox-full",
                "outbox-not-written",
                "disk-full",
                "not-signed-in",
                "plane-not-ready",
                "polls-fail",
            ],
        );
        check(|now| now.planes.0[0].state.polls.unanswered = true, &["poll-unanswered"]);
        check(|now| now.planes.0[0].state.polls.failed = FAILED_POLLS_MIN - 1, &[]);
    }

    #[test]
    fn one_ready_plane_is_enough_unless_all_are_wanted() {
        let second = |error: Option<&str>, ready_when: ReadyWhen| {
            let error = error.map(str::to_owned);
            move |now: &mut HostStatus| {
                let mut plane = PlaneStatus::new(PlaneName::parse("runs").expect("a name"), "node-runtime", 0);
                (plane.has_begun, plane.state.plane_error) = (true, error);
                now.planes.0.push(plane);
                now.ready_when = ready_when;
            }
        };
        check(second(None, ReadyWhen::All), &[]);
        check(second(Some("away"), ReadyWhen::Any), &[]);
        check(second(Some("away"), ReadyWhen::All), &["plane-not-ready"]);
        let both = |now: &mut HostStatus| {
            now.planes.0[0].has_begun = false;
            second(Some("away"), ReadyWhen::Any)(now);
            let shown = serde_json::to_value(Readiness::of(now, Timestamp::UNIX_EPOCH).reasons()).expect("JSON");
            assert_eq!(shown[0]["plane"], "runs");
            assert_eq!(shown[0]["message"], "the control plane cannot be used: away");
        };
        check(both, &["plane-not-ready", "starting"]);
        check(
            |now| {
                second(None, ReadyWhen::Any)(now);
                now.disk.full = true;
            },
            &["disk-full"],
        );
    }

    #[test]
    fn failed_renewal_matters_once_the_token_expires() {
        let with_token = |expires_at: Timestamp| {
            move |now: &mut HostStatus| {
                let now = &mut now.planes.0[0].state;
                now.login_error = Some("401".to_owned());
                now.token_expires_at = Some(expires_at);
            }
        };
        check(with_token(Timestamp::UNIX_EPOCH), &["not-signed-in"]);
        check(with_token(Timestamp::MAX), &[]);
    }
}
