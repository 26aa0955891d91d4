//! The words the rooms share.
//!
//! No I/O and no wire types live here: a control plane's JSON becomes a [`Lease`] in its adapter,
//! and a plugin's table becomes an [`Outcome`] in `plugins`. What two sibling rooms would otherwise
//! need from each other is defined here instead.

mod artifact;
mod budget;
mod capability;
mod grant;
mod lease;
mod line;
mod mailbox;
mod millis;
mod moment;
mod outcome;
mod ports;
mod status;
mod visits;
mod watched;

pub use artifact::{Artifact, ArtifactSpec};
pub use budget::{Budget, Charge, OverBudget};
pub use capability::{Capability, CapabilityError};
pub use grant::{
    CancelReason, CancelSignal, Coordinates, Fence, Grant, GrantKeys, Granted, Missed, News, Setup, Token,
};
pub use lease::{Lease, TaskId};
pub use line::in_a_line;
pub use mailbox::{Mailbox, MailboxError, Pending};
pub use millis::millis;
pub use moment::Moment;
pub use outcome::{KeptLease, Outcome, ReportName, Stage, Verdict};
pub(crate) use outcome::{holds_token, redact};
pub use ports::{Fetched, InputMeta, InputStream, Materialized, OutputStream, PortError, PortErrorKind, Ports};
pub use status::{
    DiskStatus, HeldNumber, HeldTasks, HostStatus, Live, OutboxStatus, Phase, PollStatus, ReportState, StatusBoard,
    TaskRecord, TaskStatus,
};
pub use visits::{Callback, Unexpected, Visits};
