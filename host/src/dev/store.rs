//! The domain's data: blobs on disk, an index in memory (posemesh.md section 6).
//!
//! A blob is written under a fresh name and enters the index only when it is complete. So a reader never sees a
//! partial blob. A replaced blob stays readable for readers that have it open.
//!
//! With a data folder, each item also has a small description file, written atomically. The index is rebuilt from
//! these files. Nothing is synced to the device, so data survives a restart but not a power failure. Uploads in parts
//! are in [`super::uploads`].

use std::{
    collections::HashMap,
    fs::{self, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use uuid::Uuid;

use super::{Config, DevError, uploads::Upload};

/// Longest accepted name or type, in bytes. Newer writers limit themselves to 128 bytes, but names made from long
/// artifact paths are longer.
const NAME_BYTES_MAX: usize = 1200;
/// Characters that the production servers reject in names and types (posemesh.md section 10.5).
const NAME_REFUSED: &str = ";!?<>[]{}()/\\\"$#@*^&|~%=+`";

/// One stored item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Item {
    pub(super) id: Uuid,
    pub(super) name: String,
    pub(super) data_type: String,
    pub(super) size: u64,
    pub(super) created_at: Timestamp,
    pub(super) updated_at: Timestamp,
    blob: Uuid,
}

/// See the module documentation.
pub(super) struct Store {
    root: PathBuf,
    /// Keeps a temporary root folder, and removes it on drop.
    temporary: Option<TempDir>,
    /// Held while this dev server uses the folder.
    _lock: Option<fs::File>,
    pub(super) domain_id: Uuid,
    pub(super) config: Arc<Config>,
    index: Mutex<Index>,
}

#[derive(Default)]
pub(super) struct Index {
    pub(super) items: HashMap<Uuid, Item>,
    /// The pair of name and type is unique.
    pub(super) names: HashMap<(String, String), Uuid>,
    pub(super) uploads: HashMap<Uuid, Upload>,
}

/// The reason why the store rejected a call. Each text is one line for the caller.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("{0}")]
    Invalid(String),
    #[error("no data {0} in this domain")]
    NoData(String),
    #[error("no upload {0}, it was finished, aborted or has expired")]
    NoUpload(String),
    #[error("{0}")]
    Conflict(String),
    #[error("{0}")]
    TooLarge(String),
    #[error("the store failed: {0}")]
    Io(#[from] io::Error),
}

/// A query of the index.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) ids: Option<Vec<String>>,
    pub(super) name: Option<String>,
    pub(super) data_type: Option<String>,
}

/// The destination of a staged blob.
pub(super) enum Target {
    New { name: String, data_type: String },
    Replace { id: Uuid },
}

/// A blob that is not in the index yet. Dropping it removes its file.
pub(super) struct Staged {
    path: PathBuf,
    blob: Uuid,
    kept: bool,
}

impl Staged {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Store {
    /// Opens the store and removes the unfinished data of an earlier dev server. It blocks, so call it before
    /// serving.
    pub(super) fn open(config: Arc<Config>) -> Result<Self, DevError> {
        let (root, temporary) = match &config.data {
            Some(root) => (root.clone(), None),
            None => {
                let place = config.temporary.clone().unwrap_or_else(std::env::temp_dir);
                let made = tempfile::Builder::new().prefix("runner-host-dev-").tempdir_in(&place);
                let made = made.map_err(|err| problem(&place, &err))?;
                (made.path().to_owned(), Some(made))
            }
        };
        for folder in ["blobs", "items", "uploads"] {
            fs::create_dir_all(root.join(folder)).map_err(|err| problem(&root.join(folder), &err))?;
        }
        let lock = if temporary.is_none() { Some(lock(&root)?) } else { None };
        let index = if temporary.is_none() { load(&root)? } else { Index::default() };
        let domain_id = if temporary.is_none() { domain_of(&root)? } else { Uuid::new_v4() };
        Ok(Self { root, temporary, _lock: lock, domain_id, config, index: Mutex::new(index) })
    }

    pub(super) fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().expect("nothing panics while it holds the index")
    }

    pub(super) fn upload_path(&self, upload: Uuid) -> PathBuf {
        self.root.join("uploads").join(upload.to_string())
    }

    /// Creates a path for a new blob.
    pub(super) fn stage(&self) -> Staged {
        let blob = Uuid::new_v4();
        Staged { path: self.blob_path(blob), blob, kept: false }
    }

    /// Adds staged blobs to the index, all or none. Blocks.
    pub(super) fn commit(&self, batch: Vec<(Target, u64, Staged)>, now: Timestamp) -> Result<Vec<Item>, StoreError> {
        let mut index = self.index();
        let mut items: Vec<Item> = Vec::with_capacity(batch.len());
        for (target, size, staged) in &batch {
            let item = match target {
                Target::New { name, data_type } => {
                    let key = (name.clone(), data_type.clone());
                    let twice = items.iter().any(|item| item.name == *name && item.data_type == *data_type);
                    if twice || index.names.contains_key(&key) {
                        return Err(exists(name, data_type));
                    }
                    let (name, data_type) = key;
                    Item {
                        id: Uuid::new_v4(),
                        name,
                        data_type,
                        size: *size,
                        created_at: now,
                        updated_at: now,
                        blob: staged.blob,
                    }
                }
                Target::Replace { id } => {
                    let old = index.items.get(id).ok_or_else(|| StoreError::NoData(id.to_string()))?;
                    Item { size: *size, updated_at: now, blob: staged.blob, ..old.clone() }
                }
            };
            items.push(item);
        }
        for item in &items {
            self.describe(item)?;
        }
        for ((_, _, staged), item) in batch.into_iter().zip(&items) {
            staged.keep();
            self.put(&mut index, item.clone());
        }
        Ok(items)
    }

    /// Adds an item to the index and removes the blob that it replaces.
    pub(super) fn put(&self, index: &mut Index, item: Item) {
        index.names.insert((item.name.clone(), item.data_type.clone()), item.id);
        if let Some(old) = index.items.insert(item.id, item) {
            let _ = fs::remove_file(self.blob_path(old.blob));
        }
    }

    /// Creates an item from a finished upload's file and adds it to the index. Blocks.
    pub(super) fn adopt(
        &self,
        index: &mut Index,
        file: &Path,
        id: Uuid,
        (name, data_type): (String, String),
        size: u64,
        now: Timestamp,
    ) -> Result<Item, StoreError> {
        let blob = Uuid::new_v4();
        let created_at = index.items.get(&id).map_or(now, |old| old.created_at);
        let item = Item { id, name, data_type, size, created_at, updated_at: now, blob };
        fs::rename(file, self.blob_path(blob))?;
        self.describe(&item)?;
        self.put(index, item.clone());
        Ok(item)
    }

    /// Matching items, oldest first.
    pub(super) fn find(&self, filter: &Filter) -> Vec<Item> {
        let index = self.index();
        let matches = |item: &&Item| {
            filter.name.as_ref().is_none_or(|name| *name == item.name)
                && filter.data_type.as_ref().is_none_or(|data_type| *data_type == item.data_type)
        };
        if let Some(ids) = &filter.ids {
            // Keeps the requested order, because the first part of a download is the input.
            let ids = ids.iter().filter_map(|id| Uuid::parse_str(id).ok());
            return ids.filter_map(|id| index.items.get(&id)).filter(matches).cloned().collect();
        }
        if let (Some(name), Some(data_type)) = (&filter.name, &filter.data_type) {
            let id = index.names.get(&(name.clone(), data_type.clone()));
            return id.and_then(|id| index.items.get(id)).cloned().into_iter().collect();
        }
        let mut found: Vec<Item> = index.items.values().filter(matches).cloned().collect();
        found.sort_by_key(|item| (item.created_at, item.id));
        found
    }

    pub(super) fn get(&self, id: Uuid) -> Option<Item> {
        self.index().items.get(&id).cloned()
    }

    /// Opens the current content of an item.
    pub(super) async fn read(&self, id: Uuid) -> Result<(Item, tokio::fs::File), StoreError> {
        loop {
            let item = self.get(id).ok_or_else(|| StoreError::NoData(id.to_string()))?;
            match tokio::fs::File::open(self.blob_path(item.blob)).await {
                Ok(file) => return Ok((item, file)),
                // The item was replaced meanwhile, and the index names another blob now.
                Err(err) if err.kind() == io::ErrorKind::NotFound && self.get(id).as_ref() != Some(&item) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// Removes an item. Blocks.
    pub(super) fn delete(&self, id: Uuid) -> Result<(), StoreError> {
        let mut index = self.index();
        let item = index.items.remove(&id).ok_or_else(|| StoreError::NoData(id.to_string()))?;
        index.names.remove(&(item.name, item.data_type));
        let _ = fs::remove_file(self.item_path(id));
        let _ = fs::remove_file(self.blob_path(item.blob));
        Ok(())
    }

    /// Removes data that is not needed after the dev server has stopped. Blocks.
    pub(super) fn close(&self) {
        self.index().uploads.clear();
        let _ = fs::remove_dir_all(self.root.join("uploads"));
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_dir_all(temporary.path());
        }
    }

    fn blob_path(&self, blob: Uuid) -> PathBuf {
        self.root.join("blobs").join(blob.to_string())
    }

    fn item_path(&self, id: Uuid) -> PathBuf {
        self.root.join("items").join(format!("{id}.json"))
    }

    /// Writes an item's description if the folder is persistent.
    fn describe(&self, item: &Item) -> io::Result<()> {
        if self.temporary.is_some() {
            return Ok(());
        }
        replace_file(&self.item_path(item.id), &serde_json::to_vec(item)?)
    }
}

/// Checks whether `text` may be a name or type. `what` is used in the error.
pub(super) fn check_name(what: &str, text: &str) -> Result<(), StoreError> {
    if text.is_empty() || text.len() > NAME_BYTES_MAX {
        let found = text.len();
        return Err(StoreError::Invalid(format!("{what} has {found} bytes, expected 1 to {NAME_BYTES_MAX}")));
    }
    match text.chars().find(|c| c.is_control() || NAME_REFUSED.contains(*c)) {
        Some(found) => {
            Err(StoreError::Invalid(format!("{what} {text:?} holds {found:?}, which domain servers refuse")))
        }
        None => Ok(()),
    }
}

pub(super) fn exists(name: &str, data_type: &str) -> StoreError {
    StoreError::Conflict(format!("data {name:?} of type {data_type:?} exists already; replace it with PUT and its id"))
}

fn problem(path: &Path, reason: &dyn std::fmt::Display) -> DevError {
    DevError::Data { path: path.to_owned(), reason: reason.to_string() }
}

/// Writes a temporary file and renames it, so that a reader sees the old or the new text.
fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, bytes)?;
    fs::rename(&beside, path)
}

/// Locks the folder. Two dev servers in one folder would remove each other's blobs.
fn lock(root: &Path) -> Result<fs::File, DevError> {
    let path = root.join("lock");
    let file = fs::File::create(&path).map_err(|err| problem(&path, &err))?;
    file.try_lock().map_err(|err| match err {
        TryLockError::WouldBlock => DevError::InUse { path: root.to_owned() },
        TryLockError::Error(err) => problem(&path, &err),
    })?;
    Ok(file)
}

fn domain_of(root: &Path) -> Result<Uuid, DevError> {
    let path = root.join("domain");
    match fs::read_to_string(&path) {
        Ok(text) => Uuid::parse_str(text.trim()).map_err(|_| {
            problem(&path, &"expected the domain's UUID; restore it, or remove the file for a new domain")
        }),
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            let id = Uuid::new_v4();
            replace_file(&path, id.to_string().as_bytes()).map_err(|err| problem(&path, &err))?;
            Ok(id)
        }
        Err(err) => Err(problem(&path, &err)),
    }
}

/// Rebuilds the index and removes blobs without a description.
fn load(root: &Path) -> Result<Index, DevError> {
    let mut index = Index::default();
    let mut blobs = std::collections::HashSet::new();
    let items = root.join("items");
    for entry in fs::read_dir(&items).map_err(|err| problem(&items, &err))? {
        let path = entry.map_err(|err| problem(&items, &err))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            let _ = fs::remove_file(&path);
            continue;
        }
        let text = fs::read(&path).map_err(|err| problem(&path, &err))?;
        let item: Item = serde_json::from_slice(&text).map_err(|err| {
            problem(&path, &format!("expected the description of a stored item, {err}; remove the file"))
        })?;
        if !root.join("blobs").join(item.blob.to_string()).exists() {
            // The description was written before its blob, and the blob was abandoned.
            tracing::warn!(event = "dev.data_lost", data_id = %item.id, name = %item.name, "stored data has no content");
            let _ = fs::remove_file(&path);
            continue;
        }
        blobs.insert(item.blob.to_string());
        index.names.insert((item.name.clone(), item.data_type.clone()), item.id);
        index.items.insert(item.id, item);
    }
    for folder in ["blobs", "uploads"] {
        let folder = root.join(folder);
        for entry in fs::read_dir(&folder).map_err(|err| problem(&folder, &err))?.flatten() {
            if !entry.file_name().to_str().is_some_and(|name| blobs.contains(name)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(data: &Path) -> Store {
        Store::open(Arc::new(Config { data: Some(data.to_owned()), ..Config::default() })).expect("a fresh folder")
    }

    fn add(store: &Store, name: &str, bytes: &[u8]) -> Result<Item, StoreError> {
        let staged = store.stage();
        fs::write(staged.path(), bytes)?;
        let target = Target::New { name: name.to_owned(), data_type: "json".to_owned() };
        store.commit(vec![(target, bytes.len() as u64, staged)], Timestamp::now()).map(|mut items| items.remove(0))
    }

    #[test]
    fn restart_keeps_data_and_domain_and_deletes_leftovers() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = store(folder.path());
        let domain = first.domain_id;
        let item = add(&first, "kept", b"{}").expect("new");
        fs::write(folder.path().join("blobs/leftover"), b"x").expect("writable");
        fs::write(folder.path().join("uploads/leftover"), b"x").expect("writable");
        drop(first);
        let second = store(folder.path());
        assert_eq!(second.domain_id, domain);
        assert_eq!(second.get(item.id), Some(item.clone()));
        assert_eq!(fs::read(second.blob_path(item.blob)).expect("still there"), b"{}");
        assert!(!folder.path().join("blobs/leftover").exists() && !folder.path().join("uploads/leftover").exists());
        assert!(matches!(add(&second, "kept", b"x"), Err(StoreError::Conflict(_))));
    }

    #[cfg(unix)]
    #[test]
    fn data_folder_allows_only_one_dev_server() {
        let folder = tempfile::tempdir().expect("a folder");
        let _first = store(folder.path());
        let config = Config { data: Some(folder.path().to_owned()), ..Config::default() };
        let err = Store::open(Arc::new(config)).map(drop).expect_err("locked");
        assert!(matches!(err, DevError::InUse { .. }), "{err}");
    }

    #[test]
    fn refused_batch_stores_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = store(folder.path());
        add(&store, "taken", b"1").expect("new");
        let batch = ["fresh", "taken"].map(|name| {
            let staged = store.stage();
            fs::write(staged.path(), b"2").expect("writable");
            (Target::New { name: name.to_owned(), data_type: "json".to_owned() }, 1, staged)
        });
        assert!(matches!(store.commit(batch.into(), Timestamp::now()), Err(StoreError::Conflict(_))));
        assert_eq!(fs::read_dir(folder.path().join("blobs")).expect("readable").count(), 1);
        assert_eq!(store.find(&Filter::default()).len(), 1);
    }

    #[test]
    fn names_that_domain_servers_refuse_are_refused() {
        assert!(check_name("name", "scan a_2025-01-01é").is_ok());
        assert_eq!(
            check_name("name", "a;b").expect_err("semicolon").to_string(),
            "name \"a;b\" holds ';', which domain servers refuse"
        );
        assert!(check_name("data type", "").expect_err("empty").to_string().contains("0 bytes"));
        assert!(check_name("name", "a\nb").is_err());
    }
}
