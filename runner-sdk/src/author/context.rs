//! What a running task is given.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
};

use super::{ArtifactSink, Call, ControlPlane, InputSource, LeaseEnvelope, Port, PortErrorKind};

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

/// Where the task's directory is, and what came of asking for it.
pub(crate) struct Dir {
    path: PathBuf,
    port: Arc<dyn Port>,
    made: OnceLock<Result<(), String>>,
}

impl Dir {
    /// Why it could not be had, where it was asked for.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.made.get()?.as_ref().err().map(String::as_str)
    }

    /// Makes it unless it is there. What stands in the way is for the host to deal with, which owns the folder
    /// it lies in.
    fn make(&self) -> Result<(), String> {
        let mut builder = std::fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        let err = match builder.create(&self.path) {
            Ok(()) => return Ok(()),
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Err(err) => err,
        };
        let mut answer = self.port.call(Call::TaskDir);
        match answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(_)) => Ok(()),
            Poll::Ready(Err(refused)) if refused.kind() != PortErrorKind::Unsupported => Err(refused.to_string()),
            // A host that does not know this call yet.
            Poll::Ready(Err(_)) | Poll::Pending => Err(format!("cannot make task directory: {err}")),
        }
    }
}

impl TaskCtx {
    pub(crate) fn new(lease: LeaseEnvelope, dir: PathBuf, port: Arc<dyn Port>) -> Self {
        Self {
            lease: Arc::new(lease),
            input: InputSource::new(Arc::clone(&port)),
            output: ArtifactSink::new(Arc::clone(&port)),
            ctrl: ControlPlane::new(Arc::clone(&port)),
            dir: Arc::new(Dir { path: dir, port, made: OnceLock::new() }),
        }
    }

    pub(crate) fn dir(&self) -> Arc<Dir> {
        Arc::clone(&self.dir)
    }

    /// A directory of this task's own (mode 0700), empty at the start but for inputs brought to disk, gone
    /// when the task ends.
    ///
    /// Where the node cannot make it, this call does not return: the run ends here, as a storage failure that is
    /// not held against the runner.
    #[must_use]
    pub fn scratch_dir(&self) -> &Path {
        // Many tasks need none, and making and removing one is not free.
        match self.dir.made.get_or_init(|| self.dir.make()) {
            Ok(()) => &self.dir.path,
            // Not a panic of the runner: no hook is called. The shim finds the failure in `dir`.
            Err(text) => std::panic::resume_unwind(Box::new(text.clone())),
        }
    }
}
