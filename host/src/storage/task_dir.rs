//! Where tasks work on disk: one fresh directory each, gone when the task ends.
//!
//! [`Scratch`] owns one folder per process below the base folder and holds a lock in it for as long
//! as it lives. What a crashed process left behind has no held lock, and the next process that
//! opens the same base sweeps it; folders of living processes and strangers' files stay.
//!
//! Many tasks need no directory, and making and removing one costs more than such a task does. So it
//! is made when somebody first needs it.

use std::{
    fs::{self, DirBuilder, File},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use uuid::Uuid;

use super::naming::in_file_name;
use crate::model::TaskId;

/// Our folders below the base begin like this; a sweep looks at no others.
const OWNER_PREFIX: &str = "node-";
/// Held while the process lives.
const OWNER_LOCK: &str = "owner.lock";
/// Held while somebody sweeps or makes a folder, so that no sweep sees a folder before its lock.
const BASE_LOCK: &str = ".lock";

/// Why a directory could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {source}", path = path.display())]
pub struct ScratchError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl ScratchError {
    /// The same for others, who have no use for a path of this machine.
    #[must_use]
    pub fn without_path(&self) -> String {
        format!("cannot {}: {}", self.action, self.source)
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ScratchError {
    let path = path.to_owned();
    move |source| ScratchError { action, path, source }
}

/// The folder of this process. Cheap to clone; removed when the last clone and the last
/// [`TaskDir`] are gone.
#[derive(Clone, Debug)]
pub struct Scratch {
    home: Arc<Home>,
}

#[derive(Debug)]
struct Home {
    base: PathBuf,
    path: PathBuf,
    named: AtomicU64,
    /// Held as long as the folder is ours.
    lock: Mutex<File>,
}

impl Home {
    /// Makes the folder again that somebody has removed, as cleaners of temporary folders do.
    fn restore(&self) -> Result<(), ScratchError> {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if self.path.join(OWNER_LOCK).exists() {
            return Ok(()); // another task was quicker
        }
        let turn = enter(&self.base)?;
        *lock = own(&self.path)?;
        drop(turn);
        tracing::warn!(event = "scratch.recreated", path = %self.path.display(), "scratch folder was removed, it was created again");
        Ok(())
    }
}

/// Makes the folder of all processes, unless it is there, and waits for a turn in it.
fn enter(base: &Path) -> Result<File, ScratchError> {
    match make_private(base, true) {
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists && base.is_dir() => {}
        made => made.map_err(failed("make scratch folder", base))?,
    }
    let lock = base.join(BASE_LOCK);
    let turn = open_lock(&lock).map_err(failed("open", &lock))?;
    turn.lock().map_err(failed("lock", &lock))?;
    Ok(turn)
}

/// Makes the folder of this process and holds it.
fn own(path: &Path) -> Result<File, ScratchError> {
    match make_private(path, false) {
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made.map_err(failed("make", path))?,
    }
    let owner = path.join(OWNER_LOCK);
    let held = open_lock(&owner).map_err(failed("make", &owner))?;
    held.try_lock().map_err(|err| failed("lock", &owner)(err.into()))?;
    Ok(held)
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(err) = remove_tree(&self.path) {
            tracing::warn!(event = "scratch.not_removed", path = %self.path.display(), error = %err, "scratch folder could not be removed");
        }
    }
}

impl Scratch {
    /// Makes this process's folder below `base` (made if missing) and removes what dead processes
    /// left there. Touches the disk; call it before serving.
    pub fn open(base: PathBuf) -> Result<Self, ScratchError> {
        let turn = enter(&base)?;
        sweep(&base).map_err(failed("read scratch folder", &base))?;

        let path = base.join(format!("{OWNER_PREFIX}{}-{}", std::process::id(), Uuid::new_v4().simple()));
        let lock = Mutex::new(own(&path)?);
        drop(turn);
        Ok(Self { home: Arc::new(Home { base, path, named: AtomicU64::new(0), lock }) })
    }

    /// The folder of this process, for what lasts as long as the process does.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.home.path
    }

    /// A directory for `task`, not made yet. Each call names another one.
    #[must_use]
    pub fn task_dir(&self, task: &TaskId) -> TaskDir {
        let number = self.home.named.fetch_add(1, Ordering::Relaxed);
        let path = self.home.path.join(format!("{}-{number}", in_file_name(task)));
        TaskDir(Arc::new(Place { path, stage: Mutex::new(Stage::Named), home: Arc::clone(&self.home) }))
    }
}

/// A task's directory. Cheap to clone; removed with everything in it when the last clone is dropped.
/// [`TaskDir::close`] does the same for all of them and says whether it worked.
#[derive(Clone, Debug)]
pub struct TaskDir(Arc<Place>);

#[derive(Debug)]
struct Place {
    path: PathBuf,
    stage: Mutex<Stage>,
    home: Arc<Home>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The runner may have made it, which its SDK does by itself.
    Named,
    Made,
    Closed,
}

impl TaskDir {
    /// Where it is or would be.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Makes it, readable by this user only, unless it is there. Blocks for as long as that takes.
    pub fn make(&self) -> Result<(), ScratchError> {
        let mut stage = self.0.stage();
        // Made before, it may have been removed since.
        if *stage != Stage::Closed {
            let mut made = make_private(&self.0.path, false);
            if made
                .as_ref()
                .is_err_and(|err| matches!(err.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory))
            {
                self.0.home.restore()?;
                made = make_private(&self.0.path, false);
            }
            match made {
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(failed("make task directory", &self.0.path))?,
            }
            *stage = Stage::Made;
        }
        Ok(())
    }

    /// Removes the directory if it is empty, which is quick, and makes sure it is not made again.
    /// `false` where more is to be done: by [`TaskDir::close`].
    #[must_use]
    pub fn close_empty(&self) -> bool {
        self.0.close_empty()
    }

    /// Removes the directory, which blocks for as long as what is in it takes.
    pub fn close(&self) -> Result<(), ScratchError> {
        self.0.close().map_err(failed("remove task directory", &self.0.path))
    }
}

impl Place {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_empty(&self) -> bool {
        let mut stage = self.stage();
        let empty = match fs::remove_dir(&self.path) {
            Err(err) => err.kind() == io::ErrorKind::NotFound,
            Ok(()) => true,
        };
        *stage = if empty { Stage::Closed } else { Stage::Made };
        empty
    }

    fn close(&self) -> io::Result<()> {
        let mut stage = self.stage();
        if *stage == Stage::Closed {
            return Ok(());
        }
        *stage = Stage::Closed;
        remove_tree(&self.path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(err) = self.close() {
            tracing::warn!(event = "task.directory_not_removed", path = %self.path.display(), error = %err, "task directory could not be removed");
        }
    }
}

/// Removes the folders of processes that are gone. A folder that resists is logged and left.
fn sweep(base: &Path) -> io::Result<()> {
    for entry in fs::read_dir(base)? {
        let entry = entry?;
        let ours = entry.file_name().to_string_lossy().starts_with(OWNER_PREFIX);
        // `file_type` does not follow links, so a link to somebody's folder is never entered.
        if !ours || !entry.file_type()?.is_dir() {
            continue;
        }
        let path = entry.path();
        let dead = match File::options().read(true).write(true).open(path.join(OWNER_LOCK)) {
            Ok(file) => file.try_lock().is_ok(),
            // Its owner died between the folder and the lock: we hold the base lock, nobody is in between now.
            Err(err) => err.kind() == io::ErrorKind::NotFound,
        };
        if !dead {
            continue;
        }
        match remove_tree(&path) {
            Ok(()) => {
                tracing::info!(event = "scratch.leftover_removed", path = %path.display(), "scratch folder of an ended process removed")
            }
            Err(err) => {
                tracing::warn!(event = "scratch.leftover_not_removed", path = %path.display(), error = %err, "scratch folder of an ended process could not be removed");
            }
        }
    }
    Ok(())
}

/// Removes a tree, also when a runner left directories in it that even their owner may not write.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
            open_up(path);
            match fs::remove_dir_all(path) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result,
            }
        }
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Makes every directory of a tree writable for us again, best effort: what fails here shows in
/// the removal that follows.
fn open_up(path: &Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

fn make_private(path: &Path, parents: bool) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(parents);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

fn open_lock(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn task() -> TaskId {
        Uuid::nil().into()
    }

    fn base() -> tempfile::TempDir {
        tempfile::tempdir().expect("a temporary directory")
    }

    fn folders(base: &Path) -> usize {
        let entries = fs::read_dir(base).expect("the base can be listed");
        entries.filter(|entry| entry.as_ref().expect("an entry").path().is_dir()).count()
    }

    fn made(scratch: &Scratch) -> TaskDir {
        let dir = scratch.task_dir(&task());
        dir.make().expect("made");
        dir
    }

    #[test]
    fn a_task_directory_is_private_fresh_and_gone_afterwards() {
        let base = base();
        let scratch = Scratch::open(base.path().join("deep/er")).expect("opens");
        let (one, two) = (made(&scratch), made(&scratch));
        assert_ne!(one.path(), two.path(), "the same task twice gets two directories");
        for path in [one.path(), one.path().parent().expect("the process folder")] {
            let mode = fs::metadata(path).expect("exists").permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{}", path.display());
        }
        fs::write(one.path().join("file"), b"x").expect("writable");
        let gone = [one.path().to_owned(), two.path().to_owned()];
        drop(one);
        two.close().expect("closes");
        assert!(gone.iter().all(|path| !path.exists()));
        drop((two, scratch));
        assert_eq!(folders(&base.path().join("deep/er")), 0, "a clean exit takes the process folder too");
    }

    #[test]
    fn a_directory_nobody_needs_is_never_made() {
        let base = base();
        let scratch = Scratch::open(base.path().to_owned()).expect("opens");
        let dir = scratch.task_dir(&task());
        assert!(!dir.path().exists());
        assert!(dir.close_empty());
        dir.make().expect("nothing to do");
        assert!(!dir.path().exists(), "what is over is not made again");

        let dir = scratch.task_dir(&task());
        make_private(dir.path(), false).expect("made by a runner");
        dir.make().expect("there already");
        fs::write(dir.path().join("file"), b"x").expect("written");
        assert!(!dir.close_empty(), "removing what is in it may take long");
        dir.close().expect("removed");
        assert!(!dir.path().exists());
    }

    #[test]
    fn read_only_directories_do_not_stay_behind() {
        let base = base();
        let scratch = Scratch::open(base.path().to_owned()).expect("opens");
        let task = made(&scratch);
        let inner = task.path().join("a/b");
        fs::create_dir_all(&inner).expect("made");
        fs::write(inner.join("file"), b"x").expect("written");
        for path in [inner.as_path(), inner.parent().expect("a")] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o500)).expect("changed");
        }
        let path = task.path().to_owned();
        task.close().expect("removed all the same");
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_the_runner_removed_itself_is_no_error() {
        let base = base();
        let task = made(&Scratch::open(base.path().to_owned()).expect("opens"));
        fs::remove_dir_all(task.path()).expect("removed");
        task.close().expect("nothing left to do");
        drop(task);
        assert_eq!(folders(base.path()), 0, "the last task directory takes the process folder with it");
    }

    #[test]
    fn a_sweep_takes_dead_owners_and_nobody_else() {
        let base = base();
        let living = Scratch::open(base.path().to_owned()).expect("opens");
        let task = made(&living);
        let dead = base.path().join("node-1-dead");
        let unlocked = base.path().join("node-2-before-its-lock");
        let stranger = base.path().join("somebody-else");
        for dir in [&dead, &unlocked, &stranger] {
            fs::create_dir_all(dir.join("left")).expect("made");
        }
        fs::write(dead.join(OWNER_LOCK), b"").expect("written");
        std::os::unix::fs::symlink(&stranger, base.path().join("node-3-link")).expect("linked");
        let second = Scratch::open(base.path().to_owned()).expect("opens beside the first");
        assert!(!dead.exists() && !unlocked.exists());
        assert!(task.path().exists() && stranger.join("left").exists());
        drop(second);
        assert!(task.path().exists(), "a clean exit takes only its own folder");
    }

    #[test]
    fn a_base_that_is_a_file_is_refused_by_name() {
        let base = base();
        let file = base.path().join("file");
        fs::write(&file, b"x").expect("written");
        let err = Scratch::open(file.clone()).expect_err("refused").to_string();
        assert!(err.contains(&file.display().to_string()), "{err}");
    }
}
