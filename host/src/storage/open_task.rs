//! Whether data may still move for a task.

use tokio_util::sync::CancellationToken;

use crate::model::{HeldLease, PortError, PortErrorKind};

/// A task whose ports are open. Data moves only while the node holds the lease and the task runs.
pub(super) struct OpenTask {
    held: HeldLease,
    over: CancellationToken,
}

impl OpenTask {
    pub(super) fn new(held: HeldLease) -> Self {
        Self { held, over: CancellationToken::new() }
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
}
