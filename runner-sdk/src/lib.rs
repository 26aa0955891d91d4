#![doc = include_str!("../README.md")]

pub mod abi;
mod author;
#[doc(hidden)]
pub mod host_calls;
mod shim;
pub mod testing;

pub use author::{
    Artifact, ArtifactSink, ArtifactWriter, BoxFuture, CancelReason, ControlPlane, DataQuery, DynRunner, Error,
    Failure, FoundData, FoundStream, InputReader, InputSource, LeaseEnvelope, MaterializedInput, PortError,
    PortErrorKind, Runner, TaskCtx, TaskSpec, TimeLeft, Usage,
};
pub use shim::{Spawned, spawn, spawn_blocking};

/// Name of this crate.
pub const CRATE_NAME: &str = env!("CARGO_PKG_NAME");

/// The C side of [`abi`], for tools that write it to disk.
pub const RUNNER_H: &str = include_str!("../include/runner.h");

// With `panic = "abort"` the first panic of a plugin would end the whole host.
#[cfg(panic = "abort")]
compile_error!(
    "runner-sdk catches panics at the plugin's boundary, which panic = \"abort\" makes impossible; remove it from the profile"
);

/// What `export_runner!` expands to. Not part of the API.
#[doc(hidden)]
pub mod __private {
    pub use abi_stable::library::{__call_root_module_loader as call_root_module_loader, LibHeader, RootModuleResult};

    pub use crate::{
        abi::{ABI_TEXT, ModuleTable, proof::header},
        shim::{
            ManifestKeys, Registration, checked, described, from_config, from_default, manifest, manifest_len, module,
        },
    };

    pub const SDK_VERSION: &str = env!("CARGO_PKG_VERSION");
}
