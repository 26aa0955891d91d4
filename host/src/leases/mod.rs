//! Lease sources: one adapter per control plane.
//!
//! A [`LeaseSource`] has four main calls: poll, heartbeat, report, reject. Only this module knows which control plane
//! is in use. It does not decide when to call: `session` paces heartbeats, `engine` admits work.

pub mod dms;
pub mod local;
#[cfg(feature = "grpc")]
pub mod node_runtime;
mod recent_tokens;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::model::{
    AnnouncedData, BootInstant, Lease, Outcome, Pending, PlaneName, ReportAddress, TaskId, TaskResult, Term, Token,
};

/// When a slot is reserved for a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Before each poll: the node polls only for tasks that can start at once.
    SlotFirst,
    /// When a lease has arrived: the control plane sends leases by itself, and a poll waits for the next one. One
    /// lease may wait for a slot. Heartbeats keep it alive.
    LeaseFirst,
}

/// The fixed properties of a control plane.
#[derive(Clone, Debug)]
pub struct PlaneFacts {
    /// Its name in the configuration of this node.
    pub name: PlaneName,
    /// Its base URL. A report goes to no other URL.
    pub base_url: Arc<str>,
    /// The identity of this node there. A report of another node is not sent.
    pub node: Arc<str>,
    /// When a slot is reserved.
    pub admission: Admission,
    /// Longest pause between two heartbeats of one lease. `None`: only the term of the lease decides.
    pub heartbeat_every: Option<Duration>,
}

/// Whether a control plane may be polled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlaneReadiness {
    /// It may be polled.
    Ready,
    /// It may not be polled. The reason is one line.
    NotReady(String),
}

/// One control plane. An adapter is built from its own configuration and owns its sign-in and registration.
#[async_trait]
pub trait LeaseSource: Send + Sync {
    /// The fixed properties.
    fn facts(&self) -> &PlaneFacts;
    /// Registers, signs in and renews the sign-in for the other calls, until `stop`. Called once. Stop it after the
    /// last report.
    async fn run(&self, stop: CancellationToken);
    /// Whether it may be polled now. The call is cheap.
    fn readiness(&self) -> PlaneReadiness;
    /// Waits until it may be polled. `false`: it cannot be polled any more.
    async fn until_ready(&self) -> bool;
    /// Ends waiting polls, because the node drains. A poll that waits for a lease returns `None` soon.
    fn quiesce(&self) {}
    /// Confirms to the control plane that the lease has arrived, if its wire has such a call. Called once for each
    /// lease, before its task runs. [`LeaseError::Gone`]: another node has it.
    async fn acknowledge(&self, _lease: &Lease) -> Result<Acknowledged, LeaseError> {
        Ok(Acknowledged::Held)
    }
    /// Returns the next lease that this node can serve, or `None` (no work, back off).
    /// Do not drop this future: it may already own a lease.
    async fn poll(&self) -> Result<Option<Lease>, LeaseError>;
    /// Extends a held lease. The answer may carry a newer token or a request to cancel. Sends nothing and waits no
    /// longer after `until`, which the session derives from the remaining term of the lease.
    async fn heartbeat(&self, to: &ReportAddress, beat: &Pending, until: BootInstant) -> Result<Renewal, LeaseError>;
    /// Reports the end of a task. A repeat after a crash returns `Ok`.
    async fn report(&self, to: &ReportAddress, task_result: &TaskResult) -> Result<(), LeaseError>;
    /// Returns a lease that this node cannot run: `why` is an [`Outcome::Setup`].
    async fn reject(&self, to: &ReportAddress, why: &Outcome) -> Result<(), LeaseError>;
}

/// The content of a heartbeat's answer. `None` means unchanged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Renewal {
    /// A newer token for the domain server.
    pub token: Option<Token>,
    /// When that token expires.
    pub token_expires_at: Option<BootInstant>,
    /// The new term of the lease.
    pub term: Term,
    /// The new hard deadline of the run.
    pub hard_deadline: Option<BootInstant>,
    /// The control plane requests a cancel.
    pub cancel: bool,
    /// The new address for heartbeats and the report, if the control plane changed it.
    pub address: Option<ReportAddress>,
    /// The new name of the task's capability.
    pub capability: Option<String>,
    /// The new location of the data.
    pub data: Option<AnnouncedData>,
}

/// Why a control plane call failed. Texts hold no token and no body of a lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// There was no answer, or it came too late.
    #[error("{0}")]
    Unreachable(String),
    /// The node has no token now.
    #[error("no node token: {0}")]
    NoToken(String),
    /// A fresh token was rejected too.
    #[error("control plane rejected the node token")]
    Unauthorized,
    /// The control plane no longer knows the task (404), or another node holds it (409, 410).
    #[error("lease of task {task} is gone ({status})")]
    Gone {
        /// The task.
        task: TaskId,
        /// The status of the answer.
        status: u16,
    },
    /// The lease is over, and a newer lease of the same task waits for the end of this attempt.
    #[error("lease of task {task} is over, a newer one starts it again")]
    Replaced {
        /// The task.
        task: TaskId,
    },
    /// The control plane considers this node busy (409 on a poll).
    #[error("control plane considers this node busy")]
    Busy,
    /// The control plane does not know the path (404 on a poll).
    #[error(
        "control plane answered 404 to the poll; check the path of DMS_BASE_URL, it usually ends in /v1{}",
        suffix(excerpt)
    )]
    NoSuchPath {
        /// The beginning of the body.
        excerpt: String,
    },
    /// Any other refusal.
    #[error("control plane answered {status}{}", suffix(excerpt))]
    Refused {
        /// The status.
        status: u16,
        /// The beginning of the body.
        excerpt: String,
        /// The pause that the control plane requests.
        retry_after: Option<Duration>,
    },
    /// The answer is a 2xx with an unusable body.
    #[error("control plane sent an answer that cannot be used: {reason}")]
    Malformed {
        /// The address of the task, if its id could be read from the lease.
        task: Option<ReportAddress>,
        /// What is wrong with the body.
        reason: String,
    },
    /// A gRPC call ended with an error status.
    #[error("gRPC call to the control plane ended with {code}{}", suffix(message))]
    Grpc {
        /// The name of the status code.
        code: String,
        /// The beginning of its message.
        message: String,
        /// Whether the call may be repeated.
        retry: bool,
    },
    /// The control plane answered a report with `success = false`. It answers so on its own failures too.
    #[error("control plane did not accept the report{}", suffix(message))]
    NotAccepted {
        /// The beginning of its message.
        message: String,
    },
    /// The adapter cannot read an address that it wrote earlier.
    #[error("report address cannot be read: {0}; start the version of the node that wrote the report")]
    Address(String),
}

/// Whether a member of a lease is a credential. The runner does not get it.
fn is_credential(key: &str) -> bool {
    const END: &str = "token";
    let end = key.len().checked_sub(END.len()).and_then(|at| key.get(at..));
    end.is_some_and(|end| end.eq_ignore_ascii_case(END))
}

/// The time limit of a run in the `budgets` of its metadata: `wall_ms`.
///
/// # Errors
/// One line if it is not usable. A text is not shown, because it may be anything.
fn wall_time(budgets: &Value) -> Result<Option<Duration>, String> {
    let wall_ms = &budgets["wall_ms"];
    if let Some(ms) = wall_ms.as_u64().filter(|ms| *ms > 0) {
        return Ok(Some(Duration::from_millis(ms)));
    }
    let found = match wall_ms {
        Value::Null => return Ok(None),
        Value::Number(number) => number.to_string(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::String(_) => "a text".to_owned(),
        Value::Array(_) | Value::Object(_) => "a list or an object".to_owned(),
    };
    Err(format!("meta.budgets.wall_ms is {found}, expected a whole number of milliseconds above 0"))
}

fn suffix(excerpt: &str) -> String {
    if excerpt.is_empty() { String::new() } else { format!(": {excerpt}") }
}

/// The answer to [`LeaseSource::acknowledge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledged {
    /// The task may run.
    Held,
    /// The task was cancelled before its start. It must not run, and it is not reported.
    Cancelled,
}

/// What to do about a [`LeaseError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Try again later. The node may still hold the lease.
    RetryLater,
    /// The control plane works, and does not accept this request. Try again later, but not without end. Other requests
    /// are not affected.
    RetryBounded,
    /// The lease is over.
    StopTask,
    /// The control plane will never accept this request.
    GiveUp,
}

impl Advice {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn may_retry(self) -> bool {
        matches!(self, Self::RetryLater | Self::RetryBounded)
    }
}

impl LeaseError {
    /// The only policy for errors. Callers branch on it, never on a variant or a text.
    #[must_use]
    pub fn advice(&self) -> Advice {
        match self {
            Self::Unreachable(_)
            | Self::NoToken(_)
            | Self::Unauthorized
            | Self::Busy
            | Self::Malformed { .. }
            | Self::Grpc { retry: true, .. }
            | Self::Address(_) => Advice::RetryLater,
            // 5xx: the control plane failed. 3xx: a gateway before it may redirect for a while.
            Self::Refused { status, .. } if matches!(status, 408 | 425 | 429) || !(400..500).contains(status) => {
                Advice::RetryLater
            }
            Self::Refused { .. } | Self::NoSuchPath { .. } | Self::Grpc { .. } => Advice::GiveUp,
            Self::Gone { .. } | Self::Replaced { .. } => Advice::StopTask,
            Self::NotAccepted { .. } => Advice::RetryBounded,
        }
    }

    /// The pause that the control plane requests, at most ten minutes. The caller applies its own limit.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
