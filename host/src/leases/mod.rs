//! Where leases come from.
//!
//! A [`LeaseSource`] turns one control plane into three verbs: take a lease, keep it, settle it.
//! Nothing outside `leases` knows which plane is in use. Nothing in here decides when to call:
//! pacing belongs to `session`, admission to `engine`.

pub mod dms;

use std::time::Duration;

use async_trait::async_trait;

use crate::model::{
    AnnouncedData, BootInstant, Lease, Outcome, Pending, ReportAddress, TaskId, TaskResult, Term, Token,
};

/// One control plane.
#[async_trait]
pub trait LeaseSource: Send + Sync {
    /// Takes the next lease we can serve. `Ok(None)`: asked, and there is nothing; back off quietly.
    /// Let it finish: dropping this future may lose a lease the plane has already given us.
    async fn poll(&self) -> Result<Option<Lease>, LeaseError>;
    /// Extends a lease we hold. The answer may carry a newer token or a request to cancel. Sends nothing
    /// after `until`, which the session takes from what is left of the lease, and waits no longer.
    async fn heartbeat(&self, to: &ReportAddress, beat: &Pending, until: BootInstant) -> Result<Renewal, LeaseError>;
    /// Reports the end of a task. A repeat after a crash returns `Ok`.
    async fn report(&self, to: &ReportAddress, task_result: &TaskResult) -> Result<(), LeaseError>;
    /// Returns a lease that this node cannot run: `why` is an [`Outcome::Setup`].
    async fn reject(&self, to: &ReportAddress, why: &Outcome) -> Result<(), LeaseError>;
}

/// What a heartbeat's answer said; absent means unchanged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Renewal {
    /// Newer bearer towards the domain server.
    pub token: Option<Token>,
    /// When that bearer ends.
    pub token_expires_at: Option<BootInstant>,
    /// What the answer says about the lease's term.
    pub term: Term,
    /// The plane asks to stop.
    pub cancel: bool,
    /// Where heartbeats and the report go from now on, if the plane has renamed something.
    pub address: Option<ReportAddress>,
    /// What the plane calls the task's capability now.
    pub capability: Option<String>,
    /// Where the data is now.
    pub data: Option<AnnouncedData>,
}

/// Why a control plane did not do what we asked. Texts hold no token and no body of a lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// No answer, or none in time.
    #[error("{0}")]
    Unreachable(String),
    /// The node has no token at the moment.
    #[error("no node token: {0}")]
    NoToken(String),
    /// Rejected with a fresh token too.
    #[error("control plane rejected the node token")]
    Unauthorized,
    /// The plane does not know the task any more (404), or another node holds it (409, 410).
    #[error("lease of task {task} is gone ({status})")]
    Gone {
        /// The task.
        task: TaskId,
        /// The status that said so.
        status: u16,
    },
    /// The plane considers this node busy (409 on a poll).
    #[error("control plane considers this node busy")]
    Busy,
    /// The plane knows no such path (404 on a poll).
    #[error(
        "control plane answered 404 to the poll: is the path of DMS_BASE_URL right? it usually ends in /v1{}",
        said(excerpt)
    )]
    NoSuchPath {
        /// The beginning of the body.
        excerpt: String,
    },
    /// Any other refusal.
    #[error("control plane answered {status}{}", said(excerpt))]
    Refused {
        /// The status.
        status: u16,
        /// The beginning of the body.
        excerpt: String,
        /// How long the plane asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// A 2xx whose body cannot be used.
    #[error("control plane sent an answer that cannot be used: {reason}")]
    Malformed {
        /// The address of the task, if the id of the task could be read from a lease.
        task: Option<ReportAddress>,
        /// What is wrong with it.
        reason: String,
    },
    /// The adapter of a control plane cannot read an address that it wrote before.
    #[error("report address cannot be read: {0}; start the version of the node that wrote the report")]
    Address(String),
}

fn said(excerpt: &str) -> String {
    if excerpt.is_empty() { String::new() } else { format!(": {excerpt}") }
}

/// What to do about a [`LeaseError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Try again later; the lease may still be ours.
    RetryLater,
    /// The lease is over.
    StopTask,
    /// The plane will never accept this request.
    GiveUp,
}

impl LeaseError {
    /// The one place where a variant gets its policy.
    #[must_use]
    pub fn advice(&self) -> Advice {
        match self {
            Self::Unreachable(_)
            | Self::NoToken(_)
            | Self::Unauthorized
            | Self::Busy
            | Self::Malformed { .. }
            | Self::Address(_) => Advice::RetryLater,
            // Beside trouble of its own, the plane may be hidden behind somebody who redirects.
            Self::Refused { status, .. } if matches!(status, 408 | 425 | 429) || !(400..500).contains(status) => {
                Advice::RetryLater
            }
            Self::Refused { .. } | Self::NoSuchPath { .. } => Advice::GiveUp,
            Self::Gone { .. } => Advice::StopTask,
        }
    }

    /// How long the plane asks to be left alone; at most ten minutes. Whoever asks it sets a bound of his own.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
