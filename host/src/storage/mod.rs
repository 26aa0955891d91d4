//! Inputs in, outputs out.
//!
//! A task's data moves through [`crate::model::Ports`]. [`DomainPorts`] implements it against the
//! domain server of a lease, [`LocalPorts`] against plain files for `runner-host invoke`, and
//! [`Scratch`] gives each task the directory it works in. Both directions stream: nothing in here
//! holds a whole object. This room decides neither when a task runs nor what is reported about it;
//! it lists what was published. Start at [`domain`].

mod digest;
mod disk;
mod domain;
mod file;
mod lane;
mod local;
mod naming;
mod runner_file;
mod task_dir;
mod zip;

use std::{path::Path, sync::Arc};

pub use disk::Disk;
pub use domain::{Config, DomainPorts};
pub use local::LocalPorts;
pub use task_dir::{Scratch, ScratchError, TaskDir};
pub use zip::UnpackLimits;

use crate::{
    model::{HeldLease, TaskId},
    transport::Client,
};

/// The room as the engine uses it: a directory and ports for each task.
pub struct Storage {
    scratch: Scratch,
    disk: Disk,
    client: Client,
    config: Arc<Config>,
}

impl Storage {
    /// Combines the pieces; nothing is touched yet.
    #[must_use]
    pub fn new(scratch: Scratch, disk: Disk, client: Client, config: Config) -> Self {
        Self { scratch, disk, client, config: Arc::new(config) }
    }

    /// A directory for a task, made when it is first needed and removed when it is dropped.
    #[must_use]
    pub fn task_dir(&self, task: TaskId) -> TaskDir {
        self.scratch.task_dir(task)
    }

    /// Where tasks work.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Ports to the domain of `grant`, with `dir` to put inputs into.
    #[must_use]
    pub fn ports(&self, grant: &HeldLease, dir: &Path) -> Arc<DomainPorts> {
        Arc::new(DomainPorts::new(self.client.clone(), grant.clone(), dir.to_owned(), Arc::clone(&self.config)))
    }
}
