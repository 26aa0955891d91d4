//! Inputs that are at hand as a whole: a file of this machine, or bytes of a lease.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::{
    naming::{dataset_file, dataset_folder},
    zip::{self, UnpackLimits},
};
use crate::model::{Fetched, FoundData, InputMeta, Materialized, PortError};

/// The metadata of an input that is known by its path only.
pub(super) fn meta(cid: &str, path: &Path, size: u64) -> InputMeta {
    let text = |part: Option<&std::ffi::OsStr>| part.map(|part| part.to_string_lossy().into_owned());
    InputMeta {
        cid: cid.to_owned(),
        data_id: None,
        name: text(path.file_stem()),
        data_type: text(path.extension()),
        domain_id: None,
        size: Some(size),
    }
}

/// The same as the answer to a query. `id` opens the input.
pub(super) fn found(id: String, path: &Path, size: u64) -> FoundData {
    let InputMeta { cid: id, name, data_type, size, .. } = meta(&id, path, size);
    FoundData { id, name, data_type, size, ..FoundData::default() }
}

/// Where the file of a materialized input goes.
pub(super) struct Target {
    root_dir: PathBuf,
    /// Its folder, which does not exist yet.
    pub(super) folder: PathBuf,
    pub(super) path: PathBuf,
}

impl Target {
    /// A new place below `dir`. Nothing is created.
    pub(super) fn below(dir: &Path, meta: &InputMeta) -> Self {
        let root_dir = dir.join(format!("domain-input-{}", Uuid::new_v4()));
        let name = meta.name.as_deref().unwrap_or_default();
        let (stem, extension) = dataset_file(name, meta.data_type.as_deref().unwrap_or_default());
        let folder = root_dir.join("datasets").join(dataset_folder(name));
        let path = folder.join(if meta.data_type.is_some() { format!("{stem}.{extension}") } else { stem });
        Self { root_dir, folder, path }
    }

    /// Unpacks the written file if it is an archive. `shown` names it in errors.
    pub(super) async fn unpacked(
        self,
        meta: InputMeta,
        shown: &str,
        limits: &UnpackLimits,
    ) -> Result<Materialized, PortError> {
        let Self { root_dir, path, .. } = self;
        let (name, data_type) =
            (meta.name.as_deref().unwrap_or_default(), meta.data_type.as_deref().unwrap_or_default());
        let extracted_paths = match zip::is_archive(data_type) {
            false => Vec::new(),
            true => {
                let into = root_dir.join(zip::folder(data_type, name, 1));
                zip::unpacked(&format!("archive {shown}"), path.clone(), into, limits.clone(), None).await?
            }
        };
        Ok(Materialized { meta, path, root_dir, related_files: Vec::new(), extracted_paths })
    }
}

/// Lists an input that was read to its end, with the count and the SHA-256 of its bytes. Each input is listed once.
pub(super) fn list_fetched(fetched: &Mutex<Vec<Fetched>>, meta: &InputMeta, (size, sha256): (u64, String)) {
    let input = Fetched { cid: meta.cid.clone(), name: meta.name.clone(), size, sha256 };
    let mut fetched = fetched.lock().unwrap_or_else(PoisonError::into_inner);
    if !fetched.contains(&input) {
        fetched.push(input);
    }
}

/// Runs `work` on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}
