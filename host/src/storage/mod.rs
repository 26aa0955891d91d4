//! Inputs and outputs of tasks.
//!
//! A task's data moves through [`crate::model::Ports`]. A [`Storage`] makes them: [`DomainStorage`] for a
//! domain server, [`LocalStorage`] for files of this machine, [`InlineStorage`] for data in the lease and in the report. [`Stores`] chooses one by the lease.
//! [`Scratch`] gives each task its directory. Both directions stream: nothing here holds a whole object.
//! This module decides neither when a task runs nor what is reported about it. It lists what was published.
//! Start at [`domain`].

mod digest;
mod disk;
mod domain;
mod file;
mod found_list;
mod inline;
mod local;
mod naming;
mod open_task;
mod piece_queue;
mod runner_file;
mod task_dir;
mod whole_input;
mod zip;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub use disk::Disk;
pub use domain::{Config as DomainConfig, DomainPorts, DomainStorage};
pub use inline::{INLINE_BYTES_MAX, InlineStorage};
pub use local::{LocalPorts, LocalStorage};
use open_task::OpenTask;
pub use task_dir::{Scratch, ScratchError, TaskDir};
pub use zip::UnpackLimits;

use crate::model::{AnnouncedData, Budget, DataLocation, HeldLease, Ports, TaskId};

/// The directories of tasks, and the transfer of their data.
#[derive(Debug)]
pub struct Config {
    /// The base folder of task directories.
    pub scratch_dir: PathBuf,
    /// With fewer free bytes in `scratch_dir`, nothing new is leased. 0: no limit.
    pub disk_free_min: u64,
    /// The settings for calls to domain servers.
    pub domain: DomainConfig,
}

impl Config {
    /// The usual settings for this folder, with a random client id.
    #[must_use]
    pub fn new(scratch_dir: PathBuf) -> Self {
        let mut domain = DomainConfig::new(format!("runner-host/{}", uuid::Uuid::new_v4()));
        domain.budget = Budget::new(1 << 30);
        Self { scratch_dir, disk_free_min: 1 << 30, domain }
    }
}

/// Creates a task's ports. Nothing is fetched before the runner asks.
pub trait Storage: Send + Sync {
    /// Ports for the task of `held`. Inputs are stored below `dir`.
    fn ports(&self, held: &HeldLease, dir: &Path) -> Arc<dyn Ports>;
}

/// The module as the engine uses it: a directory and ports for each task.
pub struct Stores {
    scratch: Scratch,
    disk: Disk,
    domain: DomainStorage,
    local: LocalStorage,
    inline: InlineStorage,
}

impl Stores {
    /// Combines the parts. Nothing is created yet.
    #[must_use]
    pub fn new(scratch: Scratch, disk: Disk, local: LocalStorage, domain: DomainStorage) -> Self {
        let inline = InlineStorage::new(local.budget().clone(), local.unpack().clone());
        Self { scratch, disk, domain, local, inline }
    }

    /// A directory for a task. It is created when it is first needed and removed on drop.
    #[must_use]
    pub fn task_dir(&self, task: &TaskId) -> TaskDir {
        self.scratch.task_dir(task)
    }

    /// The disk that tasks use.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Ports to the data location that the lease of `held` names. Inputs are stored below `dir`.
    #[must_use]
    pub fn ports(&self, held: &HeldLease, dir: &Path) -> Arc<dyn Ports> {
        let storage: &dyn Storage = match held.lease.data {
            AnnouncedData::DomainServer { .. } | AnnouncedData::Known(DataLocation::DomainServer(_)) => &self.domain,
            AnnouncedData::Known(DataLocation::Inline(_)) => &self.inline,
            AnnouncedData::Known(DataLocation::LocalFiles(_) | DataLocation::None) => &self.local,
        };
        storage.ports(held, dir)
    }
}
