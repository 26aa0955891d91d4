//! Where leases come from.
//!
//! A [`LeaseSource`] is one control plane: poll, heartbeat, report, reject.
//! Nothing outside `leases` knows which plane is in use. Nothing in here decides when to call:
//! pacing belongs to `session`, admission to `engine`.

pub mod dms;
pub mod local;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::model::{
    AnnouncedData, BootInstant, Lease, Outcome, Pending, PlaneName, ReportAddress, TaskId, TaskResult, Term, Token,
};

/// When a slot is reserved for a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Before each poll: the control plane is asked only for what can start at once.
    SlotFirst,
    /// When a lease has arrived: the control plane sends leases by itself, and a poll waits for the next one. One
    /// lease may wait for a slot; heartbeats keep it.
    LeaseFirst,
}

/// What is known of a control plane before anything is sent.
#[derive(Clone, Debug)]
pub struct PlaneFacts {
    /// Its name in the configuration of this node.
    pub name: PlaneName,
    /// Its base URL. A report goes to no other one.
    pub base_url: Arc<str>,
    /// This node on it. A report of another node is not sent.
    pub node: Arc<str>,
    /// When a slot is reserved.
    pub admission: Admission,
    /// Longest pause between two heartbeats of one lease. `None`: the term of the lease decides alone.
    pub heartbeat_every: Option<Duration>,
}

/// Whether a control plane may give work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlaneReadiness {
    /// It may be polled.
    Ready,
    /// It may not, for this reason, in one line.
    NotReady(String),
}

/// One control plane. An adapter is built from its own configuration and owns its sign-in and registration.
#[async_trait]
pub trait LeaseSource: Send + Sync {
    /// What is known before anything is sent.
    fn facts(&self) -> &PlaneFacts;
    /// Registers, signs in and keeps up what the other calls need, until `stop`. Called once. Stop it after the
    /// last report.
    async fn run(&self, stop: CancellationToken);
    /// Whether it may be polled now. Costs little.
    fn readiness(&self) -> PlaneReadiness;
    /// Waits until it may be polled. `false`: it never will be again.
    async fn until_ready(&self) -> bool;
    /// Asks for no new lease: the node drains. A poll that waits for a lease returns `None` soon.
    fn quiesce(&self) {}
    /// Tells the control plane that the lease has arrived, where its wire has such a call. Called once for each
    /// lease, before its task runs. [`LeaseError::Gone`]: somebody else has it.
    async fn acknowledge(&self, _lease: &Lease) -> Result<(), LeaseError> {
        Ok(())
    }
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
