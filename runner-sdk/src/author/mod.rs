//! The API for authors of runners.
//!
//! Start at [`Runner`]. Every run gets a [`TaskCtx`]. No code here depends on the ABI: each operation becomes a
//! [`Call`](crate::host_calls::Call). A host answers it across the ABI, or the test kit in memory.

mod context;
mod control;
mod error;
mod input;
mod lease;
mod output;
mod port;
mod runner;
mod signal;

pub use context::TaskCtx;
pub use control::{CancelReason, ControlPlane, TimeLeft, Usage};
pub use error::{Error, Failure, PortError, PortErrorKind};
pub use input::{DataQuery, FoundData, FoundStream, InputReader, InputSource, MaterializedInput};
pub use lease::{LeaseEnvelope, TaskSpec};
pub use output::{Artifact, ArtifactSink, ArtifactWriter};
pub use runner::{BoxFuture, DynRunner, Runner};

pub(crate) use port::{Port, Reply};
pub(crate) use signal::StopSignal;
