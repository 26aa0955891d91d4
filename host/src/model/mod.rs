//! The types that the modules share.
//!
//! No I/O and no wire types belong here. A control plane's adapter converts its JSON into a [`Lease`]. `plugins`
//! converts a plugin's table into an [`Outcome`]. Types that two sibling modules would otherwise import from each
//! other are defined here.

mod artifact;
mod backoff;
mod boot_instant;
mod capability;
mod data_location;
mod data_query;
mod duration;
mod health_checks;
mod held_lease;
mod lease;
mod line;
mod millis;
mod outcome;
mod ports;
mod progress_queue;
mod readiness;
mod resolved_path;
mod status;
mod suggest;
#[cfg(test)]
pub(crate) mod test_log;
mod usage;
mod watched;

pub use artifact::Artifact;
pub use backoff::{Backoff, Jitter, pause_asked};
pub use boot_instant::BootInstant;
pub use capability::{Capability, CapabilityError};
pub use data_location::{AnnouncedData, Coordinates, DataLocation, DomainHosts, EmptyList, InlineInputs, LocalFiles};
pub use data_query::{DataQuery, FoundData};
pub use duration::{format_duration, parse_duration};
pub use health_checks::{Callback, HealthChecks, NoRegistration, Unexpected};
pub use held_lease::{
    CancelReason, CancelSignal, Deadline, HeldLease, HeldLeaseState, HeldLeaseWriter, LeaseUpdates, MissedHeartbeats,
    Setup, TimeLeft, Token,
};
pub use lease::{
    JSON_SUFFIX, Lease, LeaseHold, PlaneName, PlaneNameError, ReportAddress, TaskId, TaskIdError, Term, TimeLimit,
};
pub use line::in_a_line;
pub use millis::millis;
pub use outcome::{LeaseKeeper, Outcome, OutcomeWord, SetupStage, TaskResult, Timings};
pub(crate) use outcome::{holds_token, redact, redact_json};
pub use ports::{Fetched, InputMeta, InputStream, Materialized, OutputStream, PortError, PortErrorKind, Ports};
pub use progress_queue::{Pending, ProgressError, ProgressQueue};
pub use readiness::{NotReady, NotReadyReason, Readiness, ReadyWhen};
pub use resolved_path::resolved_path;
pub use runner_sdk::host_calls::{ArtifactSpec, Budget, Charge, OverBudget};
pub use status::{
    DiskStatus, HeldNumber, HeldTasks, HostStatus, Listings, Live, OutboxStatus, Phase, PlaneState, PlaneStatus,
    Planes, PluginId, PollStatus, RegistrationForm, RegistrationState, ReportState, STATUS_SCHEMA, StatusBoard,
    TaskRecord, TaskStage, TaskStatus,
};
pub use suggest::{did_you_mean, nearest};
pub use usage::Usage;
