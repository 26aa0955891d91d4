//! Uploads in parts (posemesh.md section 6.7).
//!
//! All parts of an upload are written to one file, each at its own offset. All parts have one size, so completing an
//! upload renames the file instead of copying it. A part does not count if it breaks off or is being rewritten.

use std::{collections::BTreeMap, fs, io, sync::Arc};

use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::Mutex;
use uuid::Uuid;

use super::store::{Item, Store, StoreError, check_name, exists};

/// Most parts of one upload.
const PARTS_MAX: u64 = 10_000;

/// Held by the task that writes to a file. The system admits one writer at a time, and a thread that waits there
/// spins.
pub(super) type WriteLock = Arc<Mutex<()>>;

/// An upload in progress, or a finished one. A finished upload is kept until it expires, because the answer to the
/// last call may have been lost.
pub(super) struct Upload {
    data_id: Uuid,
    name: String,
    data_type: String,
    size: Option<u64>,
    expires: Timestamp,
    parts: BTreeMap<u64, Part>,
    write_lock: WriteLock,
    done: Option<Item>,
}

enum Part {
    Writing,
    Whole { size: u64, etag: String },
}

/// The body of an initiating call. Newer writers omit unused fields.
#[derive(Deserialize)]
pub(super) struct Initiate {
    name: Option<String>,
    data_type: Option<String>,
    size: Option<u64>,
    existing_id: Option<String>,
}

/// The answer to an initiating call.
pub(super) struct Initiated {
    pub(super) upload_id: Uuid,
    pub(super) data_id: Uuid,
    pub(super) expires: Timestamp,
}

/// A part as the completing call lists it.
#[derive(Deserialize)]
pub(super) struct ListedPart {
    part_number: u64,
    etag: String,
}

/// A part in progress. If it is dropped before [`Writing::finish`], it does not count.
pub(super) struct Writing {
    store: Arc<Store>,
    upload: Uuid,
    number: u64,
    pub(super) path: std::path::PathBuf,
    pub(super) offset: u64,
    pub(super) write_lock: WriteLock,
    finished: bool,
}

impl Store {
    pub(super) fn initiate(&self, request: Initiate, now: Timestamp) -> Result<Initiated, StoreError> {
        if request.size == Some(0) {
            return Err(StoreError::Invalid("size is 0; upload an empty item in a single request".to_owned()));
        }
        let limit = u64::try_from(self.config.domain_data_max_bytes).unwrap_or(0);
        if let Some(size) = request.size
            && limit > 0
            && size > limit
        {
            return Err(StoreError::TooLarge(format!("size is {size}, at most {limit} bytes are stored")));
        }
        let most = PARTS_MAX.saturating_mul(self.config.part_size);
        if request.size.is_some_and(|size| size > most) {
            return Err(StoreError::TooLarge(format!("{PARTS_MAX} parts hold {most} bytes")));
        }
        let mut index = self.index();
        let (data_id, name, data_type) = if let Some(id) = request.existing_id.filter(|id| !id.is_empty()) {
            let known = Uuid::parse_str(&id).ok().and_then(|id| index.items.get(&id));
            let item = known.ok_or(StoreError::NoData(id))?;
            (item.id, item.name.clone(), item.data_type.clone())
        } else {
            let (name, data_type) = (request.name.unwrap_or_default(), request.data_type.unwrap_or_default());
            check_name("name", &name)?;
            check_name("data_type", &data_type)?;
            // A create in parts replaces an item of the same name (posemesh.md section 10.5).
            let known = index.names.get(&(name.clone(), data_type.clone())).copied();
            (known.unwrap_or_else(Uuid::new_v4), name, data_type)
        };
        let upload_id = Uuid::new_v4();
        let expires = now + self.config.upload_ttl;
        let (size, parts, write_lock, done) = (request.size, BTreeMap::new(), WriteLock::default(), None);
        index.uploads.insert(upload_id, Upload { data_id, name, data_type, size, expires, parts, write_lock, done });
        Ok(Initiated { upload_id, data_id, expires })
    }

    /// Opens a part for writing.
    pub(super) fn begin_part(self: &Arc<Self>, id: &str, number: u64, now: Timestamp) -> Result<Writing, StoreError> {
        let part_size = self.config.part_size;
        let mut index = self.index();
        let (upload_id, upload) = index.open_upload(id, now)?;
        let most = upload.size.map_or(PARTS_MAX, |size| size.div_ceil(part_size));
        if number == 0 || number > most {
            return Err(StoreError::Invalid(format!("partNumber is {number}, expected 1 to {most}")));
        }
        if matches!(upload.parts.get(&number), Some(Part::Writing)) {
            return Err(StoreError::Conflict(format!("part {number} is being written by another request")));
        }
        upload.parts.insert(number, Part::Writing);
        let write_lock = Arc::clone(&upload.write_lock);
        Ok(Writing {
            store: self.clone(),
            upload: upload_id,
            number,
            path: self.upload_path(upload_id),
            offset: (number - 1) * part_size,
            write_lock,
            finished: false,
        })
    }

    /// Checks the list against the written parts and creates the item. Blocks.
    pub(super) fn complete_upload(&self, id: &str, listed: &[ListedPart], now: Timestamp) -> Result<Item, StoreError> {
        let part_size = self.config.part_size;
        let mut index = self.index();
        let (upload_id, upload) = match index.open_upload(id, now) {
            Err(StoreError::NoUpload(_)) => return index.finished_upload(id),
            found => found?,
        };
        let total = upload.check(listed, part_size).map_err(StoreError::Invalid)?;
        let (data_id, key) = (upload.data_id, (upload.name.clone(), upload.data_type.clone()));
        if index.names.get(&key).is_some_and(|holder| *holder != data_id) {
            return Err(exists(&key.0, &key.1));
        }
        let path = self.upload_path(upload_id);
        // Truncates parts beyond the listed ones, which were written and abandoned.
        fs::OpenOptions::new().write(true).open(&path)?.set_len(total)?;
        let item = self.adopt(&mut index, &path, data_id, key, total, now)?;
        if let Some(upload) = index.uploads.get_mut(&upload_id) {
            upload.parts.clear();
            upload.done = Some(item.clone());
        }
        Ok(item)
    }

    /// Blocks.
    pub(super) fn abort_upload(&self, id: &str, now: Timestamp) -> Result<(), StoreError> {
        let mut index = self.index();
        let (upload_id, _) = index.open_upload(id, now)?;
        index.uploads.remove(&upload_id);
        match fs::remove_file(self.upload_path(upload_id)) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err.into()),
            _ => Ok(()),
        }
    }

    /// Number of uploads that were started and not finished, aborted or expired.
    pub(super) fn open_uploads(&self, now: Timestamp) -> usize {
        self.index().uploads.values().filter(|upload| upload.done.is_none() && upload.expires > now).count()
    }

    /// Whether [`Store::expire_uploads`] has work to do.
    pub(super) fn has_late_uploads(&self, now: Timestamp) -> bool {
        self.index().uploads.values().any(|upload| upload.expires <= now)
    }

    /// Removes expired uploads. Blocks.
    pub(super) fn expire_uploads(&self, now: Timestamp) {
        let mut index = self.index();
        let late: Vec<Uuid> =
            index.uploads.iter().filter(|(_, upload)| upload.expires <= now).map(|(id, _)| *id).collect();
        for id in late {
            index.uploads.remove(&id);
            let _ = fs::remove_file(self.upload_path(id));
        }
    }
}

impl super::store::Index {
    fn open_upload(&mut self, id: &str, now: Timestamp) -> Result<(Uuid, &mut Upload), StoreError> {
        let unknown = || StoreError::NoUpload(id.chars().take(64).collect());
        let key = Uuid::parse_str(id).map_err(|_| unknown())?;
        let upload = self.uploads.get_mut(&key).ok_or_else(unknown)?;
        if upload.done.is_some() || upload.expires <= now { Err(unknown()) } else { Ok((key, upload)) }
    }

    /// The item of a completed upload, if the item is unchanged.
    fn finished_upload(&self, id: &str) -> Result<Item, StoreError> {
        let upload = Uuid::parse_str(id).ok().and_then(|id| self.uploads.get(&id));
        let item = upload.and_then(|upload| upload.done.as_ref()).filter(|item| self.items.get(&item.id) == Some(item));
        item.cloned().ok_or_else(|| StoreError::NoUpload(id.chars().take(64).collect()))
    }
}

impl Upload {
    /// The total size, if the listed parts form a complete file.
    fn check(&self, listed: &[ListedPart], part_size: u64) -> Result<u64, String> {
        if listed.is_empty() {
            return Err("parts is empty, expected at least one part".to_owned());
        }
        let mut total = 0;
        for (at, part) in listed.iter().enumerate() {
            let number = at as u64 + 1;
            if part.part_number != number {
                let found = part.part_number;
                return Err(format!(
                    "parts[{at}] has part_number {found}, expected {number}: all parts, ascending from 1"
                ));
            }
            let Some(Part::Whole { size, etag }) = self.parts.get(&number) else {
                return Err(format!("part {number} has not been uploaded"));
            };
            if *etag != part.etag {
                return Err(format!("part {number} has another etag than listed; it was uploaded again since"));
            }
            if number < listed.len() as u64 && *size != part_size {
                return Err(format!("part {number} has {size} bytes, every part but the last has {part_size}"));
            }
            total += size;
        }
        match self.size {
            Some(size) if size != total => Err(format!("the parts have {total} bytes together, {size} were announced")),
            _ => Ok(total),
        }
    }
}

impl Writing {
    /// Marks the part as complete and returns its etag.
    pub(super) fn finish(mut self, size: u64) -> Result<String, StoreError> {
        let etag = Uuid::new_v4().simple().to_string();
        let mut index = self.store.index();
        let upload =
            index.uploads.get_mut(&self.upload).ok_or_else(|| StoreError::NoUpload(self.upload.to_string()))?;
        upload.parts.insert(self.number, Part::Whole { size, etag: etag.clone() });
        drop(index);
        self.finished = true;
        Ok(etag)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.finished {
            let mut index = self.store.index();
            match index.uploads.get_mut(&self.upload) {
                Some(upload) => {
                    upload.parts.remove(&self.number);
                }
                // The upload was aborted during the write, so the file may have been created again.
                None => {
                    let _ = fs::remove_file(&self.path);
                }
            }
        }
    }
}
