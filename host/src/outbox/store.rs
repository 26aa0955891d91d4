//! The file: a small database with atomic changes.
//!
//! Each row has its own checksum (`row`). If the database cannot be opened, a scan of the file finds the rows whose
//! bytes are intact.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs, io,
    panic::{self, AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Mutex, Once, PoisonError},
};

use jiff::Timestamp;
use redb::{Builder, Database, ReadableTable, StorageBackend as _, TableDefinition, backends::InMemoryBackend};

use super::{
    row,
    state::{StateError, failed, identity, private},
};

/// Its name in the state folder.
pub(super) const FILE: &str = "outbox.redb";
/// The format of the tables. A file with another number is from another program.
const FORMAT: u64 = 2;
/// The previous format. The rows of both can be read.
const OLD_FORMAT: u64 = 1;
const ABOUT: TableDefinition<'_, &str, u64> = TableDefinition::new("about");
/// Reports by their number. Numbers increase.
const REPORTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("reports");
/// A second copy of the list of reports. It is in another page, so one damaged page leaves one list.
const LIVE_AGAIN: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("live");
/// Pages kept in memory. Reports are small and are read once.
const CACHE_BYTES: usize = 512 * 1024;

/// A report's number and its bytes.
pub(super) type Row = (u64, Vec<u8>);

/// One change.
#[derive(Debug)]
pub(super) enum Change {
    Put(u64, Vec<u8>),
    Remove(u64),
}

/// Why the file was not read or written: one line.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    /// An operation of the operating system failed. The file may be undamaged.
    #[error("{0}")]
    System(io::Error),
    /// This version did not write this content.
    #[error("{0}")]
    Damaged(String),
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(err: E) -> Self {
        match err.into() {
            // An error without a number is from the library: the file is truncated.
            redb::Error::Io(err) if err.raw_os_error().is_some() => Self::System(err),
            err => Self::Damaged(err.to_string().replace('\n', " ")),
        }
    }
}

/// See the module documentation.
pub(super) struct Store {
    database: Database,
    known: Mutex<Known>,
    /// See [`identity`].
    pub(super) file: (u64, u64),
}

/// Facts about the rows in the file.
struct Known {
    /// The number of the next change. A newer copy of a row has a higher one.
    change: u64,
    /// The numbers of the reports.
    live: BTreeSet<u64>,
}

impl Store {
    /// Opens the file or creates it. Returns its rows too.
    ///
    /// # Errors
    /// When it is damaged, or is not an outbox of this version.
    pub(super) fn open(path: &Path) -> Result<(Self, Vec<Row>), StoreError> {
        quietly(|| Self::open_sound(path))
    }

    fn open_sound(path: &Path) -> Result<(Self, Vec<Row>), StoreError> {
        let existed = path.exists();
        let file = private(path).map_err(StoreError::System)?;
        let about = file.metadata().map_err(StoreError::System)?;
        if existed && about.len() == 0 {
            tracing::warn!(event = "outbox.empty", path = %path.display(), "outbox file was empty, a new one is created");
            #[cfg(unix)]
            file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).map_err(StoreError::System)?;
        }
        let identity = identity(&about);
        let mut database = Builder::new().set_cache_size(CACHE_BYTES).create_file(file)?;
        if !database.check_integrity()? {
            tracing::warn!(event = "outbox.repaired", path = %path.display(), "outbox was repaired");
        }
        let Contents { rows, bare, newest } = contents(&database)?;
        let live = rows.iter().map(|(number, _)| *number).collect();
        let store = Self { database, known: Mutex::new(Known { change: newest + 1, live }), file: identity };
        if !bare.is_empty() {
            let again = rows.iter().filter(|(number, _)| bare.contains(number));
            store.apply(again.map(|(number, bytes)| Change::Put(*number, bytes.clone())))?;
        }
        Ok((store, rows))
    }

    /// Writes all changes or none. They are on the disk when this returns.
    ///
    /// # Errors
    /// When the write failed. Then the store should be opened again.
    pub(super) fn apply(&self, changes: impl IntoIterator<Item = Change>) -> Result<(), StoreError> {
        quietly(|| {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let change = self.database.begin_write()?;
            {
                let mut reports = change.open_table(REPORTS)?;
                for one in changes {
                    match one {
                        Change::Put(number, bytes) => {
                            reports.insert(number, row::write(number, known.change, &bytes).as_slice())?;
                            known.live.insert(number);
                        }
                        Change::Remove(number) => {
                            reports.remove(number)?;
                            known.live.remove(&number);
                        }
                    }
                }
                let live = row::write(row::LIVE, known.change, &row::ranges(&known.live));
                reports.insert(row::LIVE, live.as_slice())?;
                change.open_table(LIVE_AGAIN)?.insert(0, live.as_slice())?;
            }
            known.change += 1;
            Ok(change.commit()?)
        })
    }
}

/// The rows of a database.
struct Contents {
    rows: Vec<Row>,
    /// Rows that an older version wrote without a checksum.
    bare: Vec<u64>,
    /// The highest number of a change.
    newest: u64,
}

/// Reads all rows. Missing tables are created.
fn contents(database: &Database) -> Result<Contents, StoreError> {
    let change = database.begin_write()?;
    let mut contents = Contents { rows: Vec::new(), bare: Vec::new(), newest: 0 };
    {
        let mut about = change.open_table(ABOUT)?;
        let found = about.get("format")?.map(|format| format.value());
        match found {
            Some(FORMAT) => {}
            Some(OLD_FORMAT) | None => drop(about.insert("format", FORMAT)?),
            Some(format) => {
                return Err(StoreError::Damaged(format!("it has format {format}, this version reads {FORMAT}")));
            }
        }
        for row in change.open_table(REPORTS)?.iter()? {
            let (number, bytes) = row?;
            let (number, bytes) = (number.value(), bytes.value());
            if bytes.first() == Some(&b'{') {
                contents.bare.push(number);
                contents.rows.push((number, bytes.to_vec()));
                continue;
            }
            let found = row::read(bytes).filter(|found| found.number == number);
            let found = found.ok_or_else(|| StoreError::Damaged(format!("row {number} has a wrong checksum")))?;
            contents.newest = contents.newest.max(found.change);
            if number != row::LIVE {
                contents.rows.push((number, found.bytes.to_vec()));
            }
        }
    }
    change.commit()?;
    Ok(contents)
}

/// Reads the rows of a file that no node uses, damaged or not. The file is not changed: the database works on
/// a copy in memory.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn read_aside(path: &Path) -> io::Result<Vec<Row>> {
    let file = fs::read(path)?;
    if file.is_empty() {
        return Ok(Vec::new());
    }
    let intact = quietly(|| {
        let copy = InMemoryBackend::new();
        copy.set_len(file.len() as u64).and_then(|()| copy.write(0, &file)).map_err(StoreError::System)?;
        let mut database = Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(copy)?;
        database.check_integrity()?;
        contents(&database)
    });
    Ok(intact.map_or_else(|_| row::scan(&file), |contents| contents.rows))
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Turns a panic of the database library into an error: the library does not expect a damaged page everywhere.
/// The log has the error, so the panic prints nothing.
fn quietly<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |about| {
            if !QUIET.get() {
                before(about);
            }
        }));
    });
    let outer = QUIET.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(outer);
    done.unwrap_or_else(|_| Err(StoreError::Damaged("its pages contradict each other".to_owned())))
}

/// Opens the file of a node. A damaged file is set aside under a name with the time. Then a new file is created
/// with the readable rows.
///
/// # Errors
/// When this fails too.
pub(super) fn open_or_set_aside(folder: &Path) -> Result<(Store, Vec<Row>), StateError> {
    let path = folder.join(FILE);
    let why = match Store::open(&path) {
        Ok(opened) => return Ok(opened),
        // A full disk, or a folder that cannot be written, does not mean that the file is damaged.
        Err(StoreError::System(err)) => return Err(failed("open", &path)(err)),
        Err(err) => err,
    };
    let rows = row::scan(&fs::read(&path).map_err(failed("read", &path))?);
    let aside = free_name(folder);
    fs::rename(&path, &aside).map_err(failed("set aside", &path))?;
    tracing::error!(
        event = "outbox.damaged",
        path = %path.display(),
        moved_to = %aside.display(),
        salvaged = rows.len(),
        error = %why,
        "outbox file is damaged, it was set aside"
    );
    let begin = || {
        let (store, _) = Store::open(&path)?;
        if !rows.is_empty() {
            store.apply(rows.iter().map(|(number, bytes)| Change::Put(*number, bytes.clone())))?;
        }
        Ok(store)
    };
    let store = begin().map_err(|err: StoreError| failed("make", &path)(io::Error::other(err)))?;
    Ok((store, rows))
}

fn free_name(folder: &Path) -> PathBuf {
    let now = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let names = std::iter::once(String::new()).chain((2_u32..).map(|n| format!("-{n}")));
    let paths = names.map(|more| folder.join(format!("outbox-damaged-{now}{more}.redb")));
    paths.into_iter().find(|path| !path.exists()).expect("some number is free")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(folder: &Path) -> Vec<Row> {
        Store::open(&folder.join(FILE)).expect("opens").1
    }

    #[test]
    fn changes_are_there_after_reopening_in_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, found) = Store::open(&folder.path().join(FILE)).expect("made");
        assert!(found.is_empty());
        let puts = [3_u64, 1, 2].map(|number| Change::Put(number, vec![number as u8; 10]));
        store.apply(puts).expect("written");
        store.apply([Change::Remove(2), Change::Put(1, b"new".to_vec()), Change::Remove(9)]).expect("written");
        drop(store);
        assert_eq!(rows(folder.path()), [(1, b"new".to_vec()), (3, vec![3; 10])]);
    }

    #[test]
    fn unreadable_store_file_is_renamed_not_deleted() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, _) = Store::open(&folder.path().join(FILE)).expect("made");
        let change = store.database.begin_write().expect("begun");
        change.open_table(ABOUT).expect("a table").insert("format", 9).expect("written");
        change.commit().expect("written");
        drop(store);
        for (kind, bytes) in [("other format", None), ("text", Some(b"hello".to_vec())), ("noise", Some(vec![7; 5000]))]
        {
            if let Some(bytes) = &bytes {
                fs::write(folder.path().join(FILE), bytes).expect("written");
            }
            let (store, found) = open_or_set_aside(folder.path()).unwrap_or_else(|err| panic!("{kind}: {err}"));
            assert!(found.is_empty(), "{kind}");
            store.apply([Change::Put(1, b"x".to_vec())]).expect("a new one is begun");
        }
        let aside = fs::read_dir(folder.path()).expect("listed").flatten();
        let aside: Vec<_> = aside.filter(|entry| entry.file_name().to_string_lossy().contains("damaged")).collect();
        assert_eq!(aside.len(), 3, "nothing is deleted: {aside:?}");
    }

    #[test]
    fn damaged_store_gives_error_or_correct_rows() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(FILE);
        let (store, _) = Store::open(&path).expect("made");
        store.apply((0..50).map(|number| Change::Put(number, vec![number as u8; 300]))).expect("written");
        drop(store);
        let sound = fs::read(&path).expect("read");
        let mut seed = 42_u64;
        let mut next = |below: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % below
        };
        for round in 0..60 {
            let mut bytes = sound.clone();
            let at = next(bytes.len());
            match round % 3 {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 0xff,
                _ => bytes[at..(at + 4096).min(sound.len())].fill(0),
            }
            fs::write(&path, &bytes).expect("written");
            match Store::open(&path) {
                // The damage is in unused bytes, or the library detected it and used the previous state.
                Ok((store, rows)) => {
                    assert!(rows.iter().all(|(number, bytes)| *bytes == vec![*number as u8; 300]), "round {round}");
                    drop(store);
                }
                Err(err) => assert_eq!(err.to_string().lines().count(), 1, "{err}"),
            }
        }
    }

    const FIRST: &[u8] = b"{\"first\":true}";

    /// Creates a file with 60 reports and returns them. Each was written twice. Ten more were removed.
    fn sixty(path: &Path) -> Vec<Row> {
        let row =
            |number: u64| (number, format!("{{\"report\":{number},\"text\":\"{}\"}}", "x".repeat(500)).into_bytes());
        let (store, _) = Store::open(path).expect("made");
        for number in 0..70 {
            store.apply([Change::Put(number, FIRST.to_vec())]).expect("written");
        }
        store.apply((0..70).map(row).map(|(number, bytes)| Change::Put(number, bytes))).expect("written");
        store.apply((60..70).map(Change::Remove)).expect("written");
        (0..60).map(row).collect()
    }

    #[test]
    fn nearly_all_rows_survive_damage_of_any_kind() {
        let base = tempfile::tempdir().expect("a folder");
        let written = sixty(&base.path().join(FILE));
        let sound = fs::read(base.path().join(FILE)).expect("read");
        let mut seed = 42_u64;
        let mut next = |below: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % below
        };
        let (mut kept, mut damaged) = (0, 0);
        for round in 0..200 {
            let folder = tempfile::tempdir().expect("a folder");
            let mut bytes = sound.clone();
            let at = next(bytes.len());
            match round % 4 {
                0 => bytes[at] ^= 1 << (at % 8),
                1 => bytes[at / 4096 * 4096..][..4096].fill(0),
                2 => bytes[at / 4096 * 4096..][..4096].fill(0xa5),
                _ => bytes[..64].rotate_left(1 + at % 63), // the header
            }
            fs::write(folder.path().join(FILE), &bytes).expect("written");
            let (store, rows) = open_or_set_aside(folder.path()).expect("opens");
            drop(store);
            let again = Store::open(&folder.path().join(FILE)).expect("opens").1;
            assert_eq!(again, rows, "round {round}: what was salvaged is in the new file");
            for (number, bytes) in &rows {
                // An older copy is the same report with fewer tries.
                let older = *number < 60 && bytes == FIRST;
                let known = older || written.iter().any(|(other, text)| (other, text) == (number, bytes));
                assert!(known, "round {round}: row {number} was invented or altered");
            }
            assert!(rows.len() >= 50, "round {round}: {} rows", rows.len());
            kept += rows.len();
            damaged += usize::from(fs::read_dir(folder.path()).expect("listed").count() > 1);
        }
        assert!(kept >= 200 * 58, "{kept} of {}", 200 * 60);
        assert!(damaged > 50, "only {damaged} files were set aside");
    }

    #[cfg(unix)]
    #[test]
    fn empty_file_becomes_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(FILE);
        fs::write(&path, "").expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("set");
        assert_eq!(rows(folder.path()), []);
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    }
}
