//! Whether data may still move for a task, and what stopped it.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use tokio_util::sync::CancellationToken;

use crate::model::{HeldLease, PortError, PortErrorKind};

/// A task whose ports are open. Data moves only while the node holds the lease and the task runs.
pub(super) struct OpenTask {
    held: HeldLease,
    over: CancellationToken,
    disk_was_full: AtomicBool,
}

impl OpenTask {
    pub(super) fn new(held: HeldLease) -> Self {
        Self { held, over: CancellationToken::new(), disk_was_full: AtomicBool::new(false) }
    }

    /// Ends the task.
    pub(super) fn close(&self) {
        self.over.cancel();
    }

    /// An error if the lease is lost or the task is over.
    pub(super) fn check(&self) -> Result<(), PortError> {
        let why = match self.over.is_cancelled() {
            true => "the task is over",
            false if !self.held.is_ours() => "the lease is lost",
            false => return Ok(()),
        };
        Err(PortError::new(PortErrorKind::LeaseOver, format!("{why}; nothing more is read or written for it")))
    }

    /// The error of a file of this machine. Notes that a disk was full.
    pub(super) fn failed(&self, what: &str, err: &io::Error) -> PortError {
        if matches!(err.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            self.disk_was_full.store(true, Ordering::Relaxed);
        }
        PortError::new(PortErrorKind::Local, format!("cannot {what}: {err}"))
    }

    /// Whether a write failed because a disk of this machine was full.
    pub(super) fn disk_was_full(&self) -> bool {
        self.disk_was_full.load(Ordering::Relaxed)
    }
}
