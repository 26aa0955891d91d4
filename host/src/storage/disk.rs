//! How much room is left where tasks work.
//!
//! A task that is leased onto a full disk fails after its work, or takes others with it. Below a floor
//! nothing new is leased; running tasks go on, and leasing does by itself once there is room again.

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

/// How often the disk is looked at.
const RHYTHM: Duration = Duration::from_secs(1);

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Disk(Arc<Inner>);

struct Inner {
    path: PathBuf,
    /// In bytes; 0: none.
    floor: u64,
    seen: watch::Sender<DiskStatus>,
}

impl Disk {
    /// Looks at the file system of `path`, below whose floor of `floor` free bytes there is no room.
    /// With 0 there always is.
    #[must_use]
    pub fn new(path: PathBuf, floor: u64) -> Self {
        let seen = watch::Sender::new(look(&path, floor));
        Self(Arc::new(Inner { path, floor, seen }))
    }

    /// What was seen last.
    #[must_use]
    pub fn status(&self) -> DiskStatus {
        *self.0.seen.borrow()
    }

    /// Whether a new task finds room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.0.seen.borrow().full
    }

    /// Waits until a new task finds room.
    pub async fn until_room(&self) {
        let mut seen = self.0.seen.subscribe();
        let room = seen.wait_for(|seen| !seen.full).await;
        room.map(drop).expect("the disk holds its own sender");
    }

    /// Looks again and again, and shows it, until `stop`.
    pub async fn run(self, events: NodeEvents, stop: CancellationToken) {
        show(&events, self.status());
        if self.0.floor == 0 {
            return;
        }
        if !self.has_room() {
            self.report(&events, self.status());
        }
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RHYTHM) => {}
            }
            // A disk that does not answer, such as a remote one, must not hold up a worker.
            let (path, floor) = (self.0.path.clone(), self.0.floor);
            let Ok(now) = tokio::task::spawn_blocking(move || look(&path, floor)).await else { return };
            let before = self.0.seen.send_replace(now);
            show(&events, now);
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

fn show(events: &NodeEvents, now: DiskStatus) {
    events.board().change(|status| status.disk = now);
}

/// A disk that cannot be asked is no reason to stop: what is written to it will tell.
fn look(path: &Path, floor: u64) -> DiskStatus {
    let free_bytes = match free(path) {
        Ok(free) => free,
        Err(err) => {
            debug!(path = %path.display(), error = %err, "free disk space is unknown");
            None
        }
    };
    DiskStatus { free_bytes, floor_bytes: floor, full: free_bytes.is_some_and(|free| free < floor) }
}

/// Bytes that an ordinary user may still write.
#[cfg(unix)]
fn free(path: &Path) -> io::Result<Option<u64>> {
    let about = rustix::fs::statvfs(path)?;
    Ok(Some(about.f_bavail.saturating_mul(about.f_frsize)))
}

#[cfg(not(unix))]
fn free(_: &Path) -> io::Result<Option<u64>> {
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_the_floor_there_is_no_room() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let check = |path: &Path, floor: u64, room: bool| {
            let disk = Disk::new(path.to_owned(), floor);
            assert_eq!(disk.has_room(), room, "{:?}", disk.status());
        };
        check(dir.path(), 0, true);
        check(dir.path(), 1, true);
        check(dir.path(), u64::MAX, false);
        check(&dir.path().join("gone"), u64::MAX, true);
    }
}
