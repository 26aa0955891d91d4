//! What a running task is given.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use super::{ArtifactSink, ControlPlane, InputSource, LeaseEnvelope, Port};

/// Everything a runner needs for one task. Cheap to clone; clones may move to other tasks and
/// threads. After the run has returned, every call fails with
/// [`crate::PortErrorKind::TaskOver`] and does no harm.
#[derive(Clone)]
pub struct TaskCtx {
    /// What was leased.
    pub lease: Arc<LeaseEnvelope>,
    /// The task's inputs.
    pub input: InputSource,
    /// The task's artifacts.
    pub output: ArtifactSink,
    /// Progress, events, cancellation, token.
    pub ctrl: ControlPlane,
    dir: Arc<Dir>,
}

/// Where the task's directory is, and whether it has been asked for.
struct Dir {
    path: PathBuf,
    made: OnceLock<()>,
}

impl TaskCtx {
    pub(crate) fn new(lease: LeaseEnvelope, dir: PathBuf, port: Arc<dyn Port>) -> Self {
        Self {
            lease: Arc::new(lease),
            input: InputSource::new(Arc::clone(&port)),
            output: ArtifactSink::new(Arc::clone(&port)),
            ctrl: ControlPlane::new(port),
            dir: Arc::new(Dir { path: dir, made: OnceLock::new() }),
        }
    }

    /// A directory of this task's own (mode 0700), empty at the start but for inputs brought to disk, gone
    /// when the task ends.
    #[must_use]
    pub fn scratch_dir(&self) -> &Path {
        // Many tasks need none, and making and removing one is not free.
        self.dir.made.get_or_init(|| {
            let mut builder = std::fs::DirBuilder::new();
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            // It may be there. Where it cannot be made, whoever writes to it is told why.
            let _ = builder.create(&self.dir.path);
        });
        &self.dir.path
    }
}
