//! What a control plane gave us to do.

use std::fmt;

use serde_json::value::RawValue;
use uuid::Uuid;

use super::{AnnouncedData, BootInstant, Capability, DataLocation, Token};

/// Names one task on its control plane. Prints lower case and hyphenated.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub Uuid);

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What a heartbeat's answer says about the term of a lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Term {
    /// The lease ends at this instant.
    Until(BootInstant),
    /// The lease lasts as long as its last term did, counted from the sending of the heartbeat.
    SameTerm,
    /// The end of the lease does not move. The control plane gives out leases with a fixed deadline.
    #[default]
    Unchanged,
}

/// A lease as it was taken. Later news about it (token, expiry, cancel) live in its session and
/// reach a runner through the [`super::HeldLease`].
#[derive(Clone, Debug)]
pub struct Lease {
    /// The task it is for.
    pub task: TaskId,
    /// The job the task belongs to, echoed in reports.
    pub job: Option<Uuid>,
    /// Which run of the task this is, as the plane counts them; most count from 1.
    pub attempt: Option<u64>,
    /// Which runner is asked for.
    pub capability: Capability,
    /// When the plane gives the task to somebody else, as far as it said so in a time that can be meant.
    pub expires_at: Option<BootInstant>,
    /// True when the plane handed the lease out already cancelled.
    pub cancelled: bool,
    /// Where the task's data is, as far as the control plane has said.
    pub data: AnnouncedData,
    /// Bearer towards the domain server.
    pub token: Option<Token>,
    /// When that bearer ends, where the plane said so.
    pub token_expires_at: Option<BootInstant>,
    /// Input ids, URLs or names, passed on unchanged.
    pub inputs: Vec<String>,
    /// Prefix of artifact paths, as received.
    pub outputs_prefix: Option<String>,
    /// The lease as the plane sent it, unknown fields included, every credential removed: what a
    /// runner sees. Text that is passed on: nobody here looks into it.
    pub document: Box<RawValue>,
}

impl Lease {
    /// A lease that says which task it is for and nothing else; its document is `null`.
    #[must_use]
    pub fn bare(task: TaskId, capability: Capability) -> Self {
        Self {
            task,
            job: None,
            attempt: None,
            capability,
            expires_at: None,
            cancelled: false,
            data: AnnouncedData::Known(DataLocation::None),
            token: None,
            token_expires_at: None,
            inputs: Vec::new(),
            outputs_prefix: None,
            document: RawValue::NULL.to_owned(),
        }
    }
}
