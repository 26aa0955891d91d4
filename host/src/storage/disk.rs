//! Free space of the disk that tasks use.
//!
//! A task that is leased with a full disk fails after its work, or makes other tasks fail. Below a minimum
//! the node leases nothing new. Running tasks continue. Leasing resumes when there is space again.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    model::DiskStatus,
    node_event::{NodeEvent, NodeEvents},
};

/// How often the free space is read.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// See the module documentation. Cheap to clone.
#[derive(Clone)]
pub struct Disk(Arc<Inner>);

struct Inner {
    path: PathBuf,
    /// In bytes. 0: no floor.
    floor: u64,
    status: watch::Sender<DiskStatus>,
}

impl Disk {
    /// Watches the file system of `path`. It counts as full below `floor` free bytes. With 0 it never counts as full.
    #[must_use]
    pub fn new(path: PathBuf, floor: u64) -> Self {
        let status = watch::Sender::new(read_status(&path, floor));
        Self(Arc::new(Inner { path, floor, status }))
    }

    /// The latest reading.
    #[must_use]
    pub fn status(&self) -> DiskStatus {
        *self.0.status.borrow()
    }

    /// Whether there is space for a new task.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.0.status.borrow().full
    }

    /// Waits until there is space for a new task.
    pub async fn until_room(&self) {
        let mut status = self.0.status.subscribe();
        let space = status.wait_for(|status| !status.full).await;
        space.map(drop).expect("the disk holds its own sender");
    }

    /// Reads the free space at intervals and shows it on the status board, until `stop`.
    pub async fn run(self, events: NodeEvents, stop: CancellationToken) {
        update_board(&events, self.status());
        if self.0.floor == 0 {
            return;
        }
        if !self.has_room() {
            self.report(&events, self.status());
        }
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(CHECK_INTERVAL) => {}
            }
            // A disk that does not answer, such as a remote one, must not block a worker thread.
            let (path, floor) = (self.0.path.clone(), self.0.floor);
            let Ok(now) = tokio::task::spawn_blocking(move || read_status(&path, floor)).await else { return };
            let before = self.0.status.send_replace(now);
            update_board(&events, now);
            if before.full != now.full {
                self.report(&events, now);
            }
        }
    }

    fn report(&self, events: &NodeEvents, disk: DiskStatus) {
        let path = self.0.path.clone();
        events.emit(if disk.full { NodeEvent::DiskFull { path, disk } } else { NodeEvent::DiskHasRoom { path, disk } });
    }
}

fn update_board(events: &NodeEvents, now: DiskStatus) {
    events.board().change(|status| status.disk = now);
}

/// Unknown free space does not count as full: a write to a full disk reports its own error.
fn read_status(path: &Path, floor: u64) -> DiskStatus {
    let free_bytes = match free(path) {
        Ok(free) => free,
        Err(err) => {
            debug!(path = %path.display(), error = %err, "free disk space is unknown");
            None
        }
    };
    DiskStatus { free_bytes, floor_bytes: floor, full: free_bytes.is_some_and(|free| free < floor) }
}

/// Bytes that an ordinary user can still write.
#[cfg(unix)]
fn free(path: &Path) -> io::Result<Option<u64>> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

#[cfg(not(unix))]
fn free(_: &Path) -> io::Result<Option<u64>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_below_the_floor_counts_as_full() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let check = |path: &Path, floor: u64, space: bool| {
            let disk = Disk::new(path.to_owned(), floor);
            assert_eq!(disk.has_room(), space, "{:?}", disk.status());
        };
        check(dir.path(), 0, true);
        check(dir.path(), 1, true);
        check(dir.path(), u64::MAX, false);
        check(&dir.path().join("missing"), u64::MAX, true);
    }
}
