//! Whether the node can get work, and why not. All callers use this one function of the status.

use std::fmt;

use jiff::Timestamp;
use serde::{Serialize, Serializer, ser::SerializeStruct as _};

use super::{HostStatus, MissedHeartbeats, Phase, RegistrationState};

/// Fewer failed polls in a row do not affect readiness.
const FAILED_POLLS_MIN: u32 = 3;
/// The same for heartbeats of every held lease: with all slots in use there are no polls.
const FAILED_HEARTBEATS_MIN: u32 = 3;

/// Whether the node can get work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// The node can get work.
    Ready,
    /// The node cannot get work, for these reasons. Act on the first one.
    NotReady(Vec<NotReadyReason>),
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
    /// Too many reports wait for the control plane.
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
        let reasons = match status.phase {
            Phase::Starting => vec![match &status.plane_error {
                Some(err) => NotReadyReason::PlaneNotReady(err.clone()),
                None => NotReadyReason::Starting {
                    registration: status.registration,
                    error: status.registration_error.clone(),
                },
            }],
            Phase::Running => while_running(status, now),
            Phase::Draining => vec![NotReadyReason::Draining],
            Phase::Stopped => vec![NotReadyReason::Stopped],
        };
        if reasons.is_empty() { Self::Ready } else { Self::NotReady(reasons) }
    }

    /// The reasons, if there are any.
    #[must_use]
    pub fn reasons(&self) -> &[NotReadyReason] {
        match self {
            Self::Ready => &[],
            Self::NotReady(reasons) => reasons,
        }
    }
}

/// Lists first the reasons that an operator must act on.
fn while_running(status: &HostStatus, now: Timestamp) -> Vec<NotReadyReason> {
    let HostStatus { outbox, disk, polls, .. } = status;
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
    if status.registration == RegistrationState::Conflict {
        reasons.push(NotReadyReason::RegistrationConflict(status.registration_error.clone()));
    }
    if outbox.full {
        reasons.push(NotReadyReason::OutboxFull { waiting: outbox.waiting });
    }
    if let Some(err) = &outbox.not_written {
        reasons.push(NotReadyReason::OutboxNotWritten(err.clone()));
    }
    if disk.full {
        let free_bytes = disk.free_bytes.unwrap_or_default();
        reasons.push(NotReadyReason::DiskFull { free_bytes, floor_bytes: disk.floor_bytes });
    }
    // A token is used until it expires, also while its renewal fails.
    if let Some(err) = &status.login_error
        && status.token_expires_at.is_none_or(|end| end <= now)
    {
        reasons.push(NotReadyReason::NotSignedIn(err.clone()));
    }
    if let Some(err) = &status.plane_error {
        reasons.push(NotReadyReason::PlaneNotReady(err.clone()));
    }
    if polls.failed >= FAILED_POLLS_MIN {
        let error = polls.last_error.clone().unwrap_or_default();
        reasons.push(NotReadyReason::PollsFail { failed: polls.failed, error });
    } else if polls.unanswered {
        reasons.push(NotReadyReason::PollUnanswered);
    }
    if let Some(MissedHeartbeats { count, error }) = status.tasks.missed()
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
        change(&mut status);
        let readiness = Readiness::of(&status, Timestamp::UNIX_EPOCH);
        let found: Vec<_> = readiness.reasons().iter().map(NotReadyReason::code).collect();
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
                now.registration = RegistrationState::Conflict;
                now.outbox.full = true;
                now.outbox.not_written = Some("no space".to_owned());
                now.disk.full = true;
                now.login_error = Some("401".to_owned());
                now.plane_error = Some("read-only".to_owned());
                now.polls.failed = FAILED_POLLS_MIN;
                now.polls.unanswered = true;
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
        check(|now| now.polls.unanswered = true, &["poll-unanswered"]);
        check(|now| now.polls.failed = FAILED_POLLS_MIN - 1, &[]);
    }

    #[test]
    fn failed_renewal_matters_once_the_token_expires() {
        let with_token = |expires_at: Timestamp| {
            move |now: &mut HostStatus| {
                now.login_error = Some("401".to_owned());
                now.token_expires_at = Some(expires_at);
            }
        };
        check(with_token(Timestamp::UNIX_EPOCH), &["not-signed-in"]);
        check(with_token(Timestamp::MAX), &[]);
    }
}
