//! A file that a runner publishes: checked, opened once, and hashed in parallel with the upload.
//!
//! A runner may publish files from any directory. But a path in the task's directory must not lead out of it,
//! because a link that came with an input could publish other files.

use std::{
    fs::{File, FileType, Metadata},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use sha2::{Digest, Sha256};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    digest::hex,
    file::{BLOCK_BYTES, read_exact_at},
};
use crate::model::{PortError, PortErrorKind};

/// Files up to this size are hashed before the first byte is sent. Larger ones are hashed during the upload to
/// save time. Then a file that was touched counts as changed, even if its bytes are the same.
const HASHED_FIRST_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// See the module documentation. On drop the hashing ends too.
pub(crate) struct RunnerFile {
    file: Arc<File>,
    stamp: Stamp,
    hash: Hash,
    _stop: DropGuard,
}

enum Hash {
    Known(String),
    Running(JoinHandle<io::Result<String>>),
}

/// Metadata that shows a change of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self { size: metadata.len(), modified: metadata.modified().ok() }
    }
}

/// Why a file is refused.
enum Refusal {
    /// It is not a file that can be published.
    Unusable(&'static str),
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(err: io::Error) -> Self {
        Self::Io(err)
    }
}

impl RunnerFile {
    /// Opens `path` for the runner whose directory is `dir`. Errors begin with `what`.
    ///
    /// # Errors
    /// `BadRequest` if it is not a file, is empty, or leads out of `dir`. `Local` if it cannot be read.
    pub(crate) async fn open(what: &str, path: &Path, dir: &Path) -> Result<Self, PortError> {
        let (from, within) = (path.to_owned(), dir.to_owned());
        let opened = spawn_blocking(move || open(&from, &within)).await;
        let (file, stamp) = opened.unwrap_or_else(|err| Err(io::Error::other(err).into())).map_err(|refusal| {
            // The control plane may get this text, and it must not see paths of this machine. The file name is
            // enough for the runner.
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let refused = match refusal {
                Refusal::Unusable(why) => {
                    PortError::new(PortErrorKind::BadRequest, format!("{what} refused: its file {why}"))
                }
                Refusal::Io(err) => {
                    PortError::new(PortErrorKind::Local, format!("{what} failed: cannot read its file {name}: {err}"))
                }
            };
            tracing::debug!(path = %path.display(), error = %refused, "file of an artifact refused");
            refused
        })?;
        let stop = CancellationToken::new();
        let hashing = begin_hash(&file, stamp.size, &stop);
        let _stop = stop.drop_guard();
        let hash = match stamp.size <= HASHED_FIRST_BYTES_MAX {
            true => Hash::Known(hashed(hashing).await.map_err(|err| unreadable(what, &err))?),
            false => Hash::Running(hashing),
        };
        Ok(Self { file, stamp, hash, _stop })
    }

    /// Its size in bytes when it was opened, never 0.
    pub(crate) fn size(&self) -> u64 {
        self.stamp.size
    }

    pub(crate) fn handle(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// SHA-256 in hex of the first [`Self::size`] bytes. Call it after they were sent: it fails if they changed.
    ///
    /// # Errors
    /// `Local` if they changed since the file was opened. A file of up to 16 MiB may have grown.
    pub(crate) async fn digest(self, what: &str) -> Result<String, PortError> {
        let stamp =
            |file: &File| file.metadata().map(|metadata| Stamp::of(&metadata)).map_err(|err| unreadable(what, &err));
        let hash = match self.hash {
            Hash::Known(hash) => hash,
            Hash::Running(hashing) => {
                let hash = hashed(hashing).await.map_err(|err| unreadable(what, &err))?;
                return if stamp(&self.file)? == self.stamp { Ok(hash) } else { Err(changed(what)) };
            }
        };
        if stamp(&self.file)? == self.stamp {
            return Ok(hash);
        }
        // The file was touched. It is unchanged if its bytes have the same digest.
        let stop = CancellationToken::new();
        let _stop = stop.clone().drop_guard();
        match hashed(begin_hash(&self.file, self.stamp.size, &stop)).await {
            Ok(again) if again == hash => Ok(hash),
            Err(err) if err.kind() != io::ErrorKind::UnexpectedEof => Err(unreadable(what, &err)),
            _ => Err(changed(what)),
        }
    }
}

fn unreadable(what: &str, err: &io::Error) -> PortError {
    PortError::new(PortErrorKind::Local, format!("{what} failed: its file could not be read: {err}"))
}

fn changed(what: &str) -> PortError {
    let advice = "write to another file, and publish it when it is complete";
    PortError::new(PortErrorKind::Local, format!("{what} failed: its file changed while it was uploaded; {advice}"))
}

async fn hashed(hashing: JoinHandle<io::Result<String>>) -> io::Result<String> {
    hashing.await.map_err(io::Error::other)?
}

fn open(path: &Path, dir: &Path) -> Result<(Arc<File>, Stamp), Refusal> {
    let real = path.canonicalize()?;
    let real_dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    if (path.starts_with(dir) || path.starts_with(&real_dir)) && !real.starts_with(&real_dir) {
        return Err(Refusal::Unusable("leads out of the task's directory; publish a file in it, without links"));
    }
    // Checked before the open: an open of a pipe waits for its writer, and an open of a device can have effects.
    check_kind(std::fs::symlink_metadata(&real)?.file_type())?;
    let file = open_plain(&real)?;
    let metadata = file.metadata()?;
    check_kind(metadata.file_type())?;
    match Stamp::of(&metadata) {
        Stamp { size: 0, .. } => Err(Refusal::Unusable("is empty; expected at least one byte")),
        stamp => Ok((Arc::new(file), stamp)),
    }
}

fn check_kind(kind: FileType) -> Result<(), Refusal> {
    match kind {
        kind if kind.is_file() => Ok(()),
        kind if kind.is_dir() => Err(Refusal::Unusable("is a directory, expected a regular file")),
        _ => Err(Refusal::Unusable("is a pipe, socket, device or link, expected a regular file")),
    }
}

/// Opens the checked path. If it has been replaced since, the open neither follows a link nor waits for a pipe.
fn open_plain(path: &PathBuf) -> io::Result<File> {
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags.bits() as i32);
    }
    options.open(path)
}

fn begin_hash(file: &Arc<File>, size: u64, stop: &CancellationToken) -> JoinHandle<io::Result<String>> {
    let (file, stop) = (Arc::clone(file), stop.clone());
    spawn_blocking(move || {
        let mut hasher = Sha256::new();
        let mut block = vec![0; usize::try_from(size).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES)];
        let mut at = 0;
        while at < size {
            if stop.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let take = usize::try_from(size - at).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
            read_exact_at(&file, &mut block[..take], at)?;
            hasher.update(&block[..take]);
            at += take as u64;
        }
        Ok(hex(&hasher.finalize()))
    })
}
