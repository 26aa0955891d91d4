//! The folder for data that must survive a restart. One process uses it at a time.

use std::{
    fmt,
    fs::{self, DirBuilder, File, Metadata, TryLockError},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The lock file of the folder. It names the process that holds it.
const LOCK: &str = "lock";
/// The pause between two tries to open a folder in use.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Why the folder cannot be used: one line that names the folder.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process uses it.
    #[error("{path} is in use by {owner}; give each node a folder of its own", path = path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
        /// The other process, if it is known.
        owner: Owner,
    },
    /// An operation of the operating system failed.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// The operation.
        action: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { action, path, source }
}

/// The process that holds a state folder.
#[derive(Debug, PartialEq, Eq)]
pub struct Owner(Option<u32>);

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(id) => write!(f, "another node (process {id})"),
            None => f.write_str("another node"),
        }
    }
}

/// A state folder in use by this process until this is dropped.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    lock: Mutex<File>,
}

impl StateDir {
    /// Locks the folder. A missing folder is created for this user only.
    ///
    /// # Errors
    /// When it cannot be created or written, or another process uses it.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        if !path.is_dir() {
            let mut builder = DirBuilder::new();
            builder.recursive(true);
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.create(path).map_err(failed("make", path))?;
        }
        let path = fs::canonicalize(path).map_err(failed("open", path))?;
        let lock_path = path.join(LOCK);
        let mut lock = private(&lock_path).map_err(failed("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // Only for people: the holder may not have written it yet.
                let _ = lock.read_to_string(&mut text);
                return Err(StateError::InUse { path, owner: Owner(text.trim().parse().ok()) });
            }
            Err(TryLockError::Error(err)) => return Err(failed("lock", &lock_path)(err)),
        }
        let note = |lock: &mut File| {
            lock.set_len(0)?;
            lock.rewind()?;
            write!(lock, "{}", std::process::id())
        };
        note(&mut lock).map_err(failed("write", &lock_path))?;
        Ok(Self { path, lock: Mutex::new(lock) })
    }

    /// Like [`StateDir::open`], but waits up to `patience` while another process uses the folder. A command that reads
    /// the outbox ends soon, and must not prevent the start of a node.
    ///
    /// # Errors
    /// As [`StateDir::open`], after `patience`.
    pub async fn claim(path: &Path, patience: Duration) -> Result<Self, StateError> {
        let deadline = Instant::now() + patience;
        loop {
            match Self::open(path) {
                Err(StateError::InUse { .. }) if Instant::now() < deadline => tokio::time::sleep(LOOK_AGAIN).await,
                opened => return opened,
            }
        }
    }

    /// Whether a process uses the folder. Creates nothing.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn is_in_use(path: &Path) -> Result<bool, StateError> {
        let lock = path.join(LOCK);
        match File::open(&lock) {
            Ok(lock) => Ok(lock.try_lock_shared().is_err()),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(err) => Err(failed("open", &lock)(err)),
        }
    }

    /// Locks the folder again after it was removed or replaced during its use.
    ///
    /// # Errors
    /// As [`StateDir::open`].
    pub(super) fn take_again(&self) -> Result<(), StateError> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = lock.metadata().map(|about| identity(&about)).ok();
        if fs::metadata(self.path.join(LOCK)).map(|about| identity(&about)).ok() != ours {
            *lock = Self::open(&self.path)?.lock.into_inner().unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// The folder, absolute.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The identity of an open file, independent of the file that is at its path now.
#[cfg(unix)]
pub(super) fn identity(about: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt as _;
    (about.dev(), about.ino())
}

/// Files at the same path count as the same file.
#[cfg(not(unix))]
pub(super) fn identity(_: &Metadata) -> (u64, u64) {
    (0, 0)
}

/// Opens a file for this user only. A missing file is created.
pub(super) fn private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn state_folder_has_one_owner_named_in_error() {
        let base = tempfile::tempdir().expect("a folder");
        let path = base.path().join("a/b");
        let state = StateDir::open(&path).expect("made and taken");
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join(LOCK))), (0o700, 0o600));
        let said = StateDir::open(&path).expect_err("taken").to_string();
        let wanted = format!(
            "{} is in use by another node (process {}); give each node a folder of its own",
            state.path().display(),
            std::process::id()
        );
        assert_eq!(said, wanted);
        drop(state);
        StateDir::open(&path).expect("free again");
    }

    #[tokio::test]
    async fn claim_waits_for_state_folder_until_timeout() {
        let base = tempfile::tempdir().expect("a folder");
        let state = StateDir::open(base.path()).expect("taken");
        let said = StateDir::claim(base.path(), 3 * LOOK_AGAIN).await.expect_err("still in use").to_string();
        assert!(said.contains("is in use by another node"), "{said}");
        let leaving = async {
            tokio::time::sleep(2 * LOOK_AGAIN).await;
            drop(state);
        };
        let (claimed, ()) = tokio::join!(StateDir::claim(base.path(), Duration::from_secs(10)), leaving);
        claimed.expect("free by now");
    }

    #[test]
    fn file_as_state_path_gives_one_line_error() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let said = StateDir::open(file.path()).expect_err("refused").to_string();
        assert!(said.starts_with(&format!("cannot make {}: ", file.path().display())), "{said}");
        assert_eq!(said.lines().count(), 1);
    }
}
