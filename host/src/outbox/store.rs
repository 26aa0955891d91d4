//! The file: a small database that is either as it was before a change or as it is after it.

use std::{
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use redb::{Builder, Database, ReadableTable, TableDefinition};

use super::state::{StateError, failed, identity, private};

/// Its name in the state folder.
pub(super) const FILE: &str = "outbox.redb";
/// The form of what stands in the tables. Another number means another program's file.
const FORMAT: u64 = 2;
/// The form before: the rows of both can be read.
const OLD_FORMAT: u64 = 1;
const ABOUT: TableDefinition<'_, &str, u64> = TableDefinition::new("about");
/// Reports by their number, which counts up.
const REPORTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("reports");
/// Pages kept in memory. Reports are small and are read once.
const CACHE_BYTES: usize = 512 * 1024;

/// A report's number and what stands under it.
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
    /// The operating system refused something: the file may be as sound as before.
    #[error("{0}")]
    System(io::Error),
    /// It is not what this version wrote.
    #[error("{0}")]
    Damaged(String),
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(err: E) -> Self {
        match err.into() {
            // Without a number it is the library's own: a file that ends too early.
            redb::Error::Io(err) if err.raw_os_error().is_some() => Self::System(err),
            err => Self::Damaged(err.to_string().replace('\n', " ")),
        }
    }
}

/// See the module's text.
pub(super) struct Store {
    database: Database,
    /// See [`identity`].
    pub(super) file: (u64, u64),
}

impl Store {
    /// Opens the file or makes it; with what stands in it.
    ///
    /// # Errors
    /// When it is damaged, or is no outbox of this version.
    pub(super) fn open(path: &Path) -> Result<(Self, Vec<Row>), StoreError> {
        // A damaged page can be met where the library expects none.
        let opened = catch_unwind(AssertUnwindSafe(|| Self::open_sound(path)));
        opened.unwrap_or_else(|_| Err(StoreError::Damaged("its pages contradict each other".to_owned())))
    }

    fn open_sound(path: &Path) -> Result<(Self, Vec<Row>), StoreError> {
        let file = private(path).map_err(StoreError::System)?;
        let identity = identity(&file.metadata().map_err(StoreError::System)?);
        let mut database = Builder::new().set_cache_size(CACHE_BYTES).create_file(file)?;
        if !database.check_integrity()? {
            tracing::warn!(path = %path.display(), "outbox was repaired");
        }
        let change = database.begin_write()?;
        let mut rows = Vec::new();
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
                rows.push((number.value(), bytes.value().to_vec()));
            }
        }
        change.commit()?;
        Ok((Self { database, file: identity }, rows))
    }

    /// All changes or none; they are on the disk when this returns.
    ///
    /// # Errors
    /// When the disk did not take them; the store should be opened anew then.
    pub(super) fn apply(&self, changes: impl IntoIterator<Item = Change>) -> Result<(), StoreError> {
        let change = self.database.begin_write()?;
        {
            let mut reports = change.open_table(REPORTS)?;
            for one in changes {
                match one {
                    Change::Put(number, bytes) => drop(reports.insert(number, bytes.as_slice())?),
                    Change::Remove(number) => drop(reports.remove(number)?),
                }
            }
        }
        Ok(change.commit()?)
    }
}

/// Opens the file of a node. One that is damaged is set aside under a name with the time, and a
/// new one begun: finished work goes on being kept.
///
/// # Errors
/// When not even that is possible.
pub(super) fn open_or_set_aside(folder: &Path) -> Result<(Store, Vec<Row>), StateError> {
    let path = folder.join(FILE);
    let why = match Store::open(&path) {
        Ok(opened) => return Ok(opened),
        // A full disk, or a folder that cannot be written, does not make a file a damaged one.
        Err(StoreError::System(err)) => return Err(failed("open", &path)(err)),
        Err(err) => err,
    };
    let aside = free_name(folder);
    fs::rename(&path, &aside).map_err(failed("set aside", &path))?;
    tracing::error!(path = %path.display(), moved_to = %aside.display(), error = %why, "outbox cannot be read, it was set aside");
    let again = Store::open(&path);
    again.map_err(|err| failed("make", &path)(io::Error::other(err)))
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
    fn a_file_of_another_kind_is_set_aside_whole() {
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
    fn damage_of_any_kind_is_an_error_or_leaves_what_was_written() {
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
                // The damage lay where nothing is, or a page was found out and the state before is taken.
                Ok((store, rows)) => {
                    assert!(rows.iter().all(|(number, bytes)| *bytes == vec![*number as u8; 300]), "round {round}");
                    drop(store);
                }
                Err(err) => assert_eq!(err.to_string().lines().count(), 1, "{err}"),
            }
        }
    }
}
