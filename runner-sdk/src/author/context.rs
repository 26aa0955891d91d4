//! The context of a running task.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
};

use super::{ArtifactSink, ControlPlane, InputSource, LeaseEnvelope, Port};
use crate::host_calls::Call;

/// Everything a runner needs for one task. Cheap to clone; clones may move to other tasks and
/// threads. After the run has returned, every call fails with
/// [`crate::PortErrorKind::TaskOver`] and has no effect.
#[derive(Clone)]
pub struct TaskCtx {
    /// The lease.
    pub lease: Arc<LeaseEnvelope>,
    /// The task's inputs.
    pub input: InputSource,
    /// The task's artifacts.
    pub output: ArtifactSink,
    /// Progress, events, cancellation, token.
    pub ctrl: ControlPlane,
    dir: Arc<Dir>,
    traceparent: Option<Arc<str>>,
}

/// The task's directory: its path, and the result of the first request.
pub(crate) struct Dir {
    path: PathBuf,
    port: Arc<dyn Port>,
    made: OnceLock<Result<(), String>>,
}

impl Dir {
    /// Why it could not be created, if it was requested.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.made.get()?.as_ref().err().map(String::as_str)
    }

    /// Creates it if it does not exist. If that fails, the host creates it: it owns the parent folder.
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
            Poll::Ready(Err(refused)) => Err(refused.to_string()),
            // A host answers this call at once.
            Poll::Pending => Err(format!("cannot make task directory: {err}")),
        }
    }
}

impl TaskCtx {
    pub(crate) fn new(lease: LeaseEnvelope, dir: PathBuf, traceparent: &str, port: Arc<dyn Port>) -> Self {
        Self {
            lease: Arc::new(lease),
            input: InputSource::new(Arc::clone(&port)),
            output: ArtifactSink::new(Arc::clone(&port)),
            ctrl: ControlPlane::new(Arc::clone(&port)),
            dir: Arc::new(Dir { path: dir, port, made: OnceLock::new() }),
            traceparent: Some(traceparent).filter(|text| !text.is_empty()).map(Into::into),
        }
    }

    pub(crate) fn dir(&self) -> Arc<Dir> {
        Arc::clone(&self.dir)
    }

    /// The trace the task belongs to, as a W3C `traceparent` header. `None` if the control plane sent none. Pass it on
    /// to the services that the runner calls.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        self.traceparent.as_deref()
    }

    /// The task's own directory (mode 0700). At first it holds only inputs that were brought to disk. It is removed
    /// when the task ends.
    ///
    /// If the node cannot create it, this call does not return. The run ends here as a storage failure, which does
    /// not count against the runner.
    #[must_use]
    pub fn scratch_dir(&self) -> &Path {
        // Created on request: many tasks need none, and creating and removing one is not free.
        match self.dir.made.get_or_init(|| self.dir.make()) {
            Ok(()) => &self.dir.path,
            // Not a panic of the runner: no hook is called. The shim finds the failure in `dir`.
            Err(text) => std::panic::resume_unwind(Box::new(text.clone())),
        }
    }
}
