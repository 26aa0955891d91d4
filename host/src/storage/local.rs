//! A task's data in plain files, for `runner-host invoke`.
//!
//! Inputs are the files named on the command line, called `input-0`, `input-1`… or as given.
//! Outputs appear below one folder under their logical paths, complete or not at all.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::{
    digest::hex,
    file::{FileBlocks, FileSink},
    naming::{data_type, dataset_file, dataset_folder, logical_path, relative_path, safe, shown},
    runner_file::RunnerFile,
    zip::{self, UnpackLimits},
};
use crate::model::{
    Artifact, ArtifactSpec, Budget, Fetched, InputMeta, InputStream, Materialized, OutputStream, PortError,
    PortErrorKind, Ports,
};

/// See the module's text.
pub struct LocalPorts {
    inputs: Vec<PathBuf>,
    dir: PathBuf,
    shelf: Arc<OfflineOutbox>,
    /// Counts only: whoever runs something by hand sees what it takes.
    budget: Budget,
}

/// Where outputs go, and which are there.
struct OfflineOutbox {
    out: PathBuf,
    published: Mutex<BTreeMap<String, Artifact>>,
    disk_was_full: AtomicBool,
}

impl LocalPorts {
    /// Ports that read `inputs`, write below `out` and materialize below `dir`.
    #[must_use]
    pub fn new(inputs: Vec<PathBuf>, out: PathBuf, dir: PathBuf) -> Self {
        Self {
            inputs,
            dir,
            shelf: Arc::new(OfflineOutbox { out, published: Mutex::default(), disk_was_full: AtomicBool::new(false) }),
            budget: Budget::unlimited(),
        }
    }

    /// Whether a write failed because a disk or a quota was full.
    #[must_use]
    pub fn disk_was_full(&self) -> bool {
        self.shelf.disk_was_full.load(Ordering::Relaxed)
    }

    fn find(&self, cid: &str) -> Result<&Path, PortError> {
        let cid = cid.trim();
        let number = cid.strip_prefix("input-").and_then(|number| number.parse::<usize>().ok());
        let by_number = number.and_then(|number| self.inputs.get(number));
        let found = by_number.or_else(|| self.inputs.iter().find(|path| path.as_os_str() == cid));
        found.map(PathBuf::as_path).ok_or_else(|| {
            let count = self.inputs.len();
            let message =
                format!("input {} not found (404): {count} inputs were given, input-0 is the first", shown(cid));
            PortError::new(PortErrorKind::NotFound, message)
        })
    }

    async fn input(&self, cid: &str) -> Result<(PathBuf, File, InputMeta), PortError> {
        let path = self.find(cid)?.to_owned();
        let source = path.clone();
        let opened = blocking(move || {
            if !std::fs::metadata(&source)?.is_file() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a regular file"));
            }
            let file = File::open(&source)?;
            let size = file.metadata()?.len();
            Ok((file, size))
        });
        let (file, size) = opened.await.map_err(|err| {
            let kind = match err.kind() {
                io::ErrorKind::NotFound => PortErrorKind::NotFound,
                io::ErrorKind::InvalidInput => PortErrorKind::BadRequest,
                _ => PortErrorKind::Local,
            };
            PortError::new(kind, format!("cannot read input {}: {err}", path.display()))
        })?;
        let text = |part: Option<&std::ffi::OsStr>| part.map(|part| part.to_string_lossy().into_owned());
        let meta = InputMeta {
            cid: cid.to_owned(),
            data_id: None,
            name: text(path.file_stem()),
            data_type: text(path.extension()),
            domain_id: None,
            size: Some(size),
        };
        Ok((path, file, meta))
    }
}

#[async_trait]
impl Ports for LocalPorts {
    async fn open(&self, cid: &str) -> Result<Box<dyn InputStream>, PortError> {
        let (path, file, meta) = self.input(cid).await?;
        let blocks = FileBlocks::new(Arc::new(file), 0, meta.size.unwrap_or_default());
        Ok(Box::new(Reader { blocks, meta, path }))
    }

    async fn materialize(&self, cid: &str) -> Result<Materialized, PortError> {
        let (source, mut file, meta) = self.input(cid).await?;
        let root_dir = self.dir.join(format!("domain-input-{}", Uuid::new_v4()));
        let name = meta.name.as_deref().unwrap_or_default();
        let (stem, extension) = dataset_file(name, meta.data_type.as_deref().unwrap_or_default());
        let folder = root_dir.join("datasets").join(dataset_folder(name));
        let path = folder.join(if meta.data_type.is_some() { format!("{stem}.{extension}") } else { stem });
        // A copy: the runner may change or remove what it is given.
        let target = path.clone();
        let copied = blocking(move || {
            std::fs::create_dir_all(&folder)?;
            io::copy(&mut file, &mut File::create_new(target)?)
        });
        copied.await.map_err(|err| self.shelf.failed(&format!("copy input {}", source.display()), &err))?;
        let data_type = meta.data_type.as_deref().unwrap_or_default();
        let extracted_paths = match zip::is_archive(data_type) {
            false => Vec::new(),
            true => {
                let into = root_dir.join(zip::folder(data_type, name, 1));
                let what = format!("archive {}", source.display());
                zip::unpacked(&what, path.clone(), into, UnpackLimits::default(), None).await?
            }
        };
        Ok(Materialized { meta, path, root_dir, related_files: Vec::new(), extracted_paths })
    }

    async fn put_file(&self, spec: ArtifactSpec, file: &Path) -> Result<Option<String>, PortError> {
        let place = self.shelf.place(spec)?;
        let what = format!("upload of {}", shown(&place.artifact.logical_path));
        let source = RunnerFile::open(&what, file, &self.dir).await?;
        let temporary = place.temporary().await?;
        let (from, size) = (source.handle(), source.size());
        let copied = blocking(move || {
            let copied = io::copy(&mut io::Read::take(&*from, size), &mut temporary.as_file())?;
            Ok((temporary, copied))
        });
        let (temporary, copied) = copied.await.map_err(|err| {
            self.shelf.failed(&format!("copy {} to {}", file.display(), place.target.display()), &err)
        })?;
        // A file that became shorter meanwhile has no digest.
        let sha256 = source.digest(&what).await?;
        place.publish(temporary, copied, sha256).await
    }

    async fn create(&self, spec: ArtifactSpec) -> Result<Box<dyn OutputStream>, PortError> {
        let place = self.shelf.place(spec)?;
        let temporary = place.temporary().await?;
        let file = temporary.as_file().try_clone().map_err(|err| failed("write an output", &err))?;
        Ok(Box::new(Writer { place, temporary, sink: Ok(FileSink::new(file)), size: 0, hasher: Sha256::new() }))
    }

    fn published(&self) -> Vec<Artifact> {
        self.shelf.published.lock().expect("only read and set").values().cloned().collect()
    }

    /// A run by hand has no record to stand in.
    fn fetched(&self) -> Vec<Fetched> {
        Vec::new()
    }

    fn budget(&self) -> &Budget {
        &self.budget
    }
}

struct Reader {
    blocks: FileBlocks,
    meta: InputMeta,
    path: PathBuf,
}

#[async_trait]
impl InputStream for Reader {
    fn meta(&self) -> &InputMeta {
        &self.meta
    }

    async fn next(&mut self) -> Result<Option<Bytes>, PortError> {
        self.blocks.next().await.map_err(|err| failed(&format!("read input {}", self.path.display()), &err))
    }
}

/// Where one output will be.
struct Place {
    shelf: Arc<OfflineOutbox>,
    artifact: Artifact,
    size: Option<u64>,
    target: PathBuf,
}

impl OfflineOutbox {
    /// The error of a failed write.
    fn failed(&self, what: &str, err: &io::Error) -> PortError {
        if matches!(err.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            self.disk_was_full.store(true, Ordering::Relaxed);
        }
        failed(what, err)
    }

    fn place(self: &Arc<Self>, spec: ArtifactSpec) -> Result<Place, PortError> {
        let relative = relative_path(&spec.path)?;
        if relative.is_empty() {
            let message = "artifact path is empty; expected a file name below the output folder";
            return Err(PortError::new(PortErrorKind::InvalidPath, message));
        }
        let artifact = Artifact {
            logical_path: logical_path(None, &relative),
            name: spec.name.unwrap_or_else(|| safe(&relative, "artifact")),
            data_type: spec.data_type.unwrap_or_else(|| data_type(&relative)),
            id: None,
            size: None,
            sha256: None,
        };
        let target = self.out.join(&relative);
        Ok(Place { shelf: Arc::clone(self), artifact, size: spec.size, target })
    }
}

impl Place {
    /// A file beside the target, so that the last step is a rename.
    async fn temporary(&self) -> Result<NamedTempFile, PortError> {
        let folder = self.target.parent().unwrap_or(&self.shelf.out).to_owned();
        let made = blocking(move || {
            std::fs::create_dir_all(&folder)?;
            let mut builder = tempfile::Builder::new();
            // Temporary files are private by default; a finished output is an ordinary file.
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
            builder.prefix(".output-").tempfile_in(&folder)
        });
        made.await.map_err(|err| self.shelf.failed(&format!("make {}", self.target.display()), &err))
    }

    async fn publish(
        mut self,
        temporary: NamedTempFile,
        size: u64,
        sha256: String,
    ) -> Result<Option<String>, PortError> {
        if let Some(promised) = self.size.filter(|promised| *promised != size) {
            let path = shown(&self.artifact.logical_path);
            let message = format!("upload of {path} refused: {promised} bytes were promised, {size} came");
            return Err(PortError::new(PortErrorKind::BadRequest, message));
        }
        let target = self.target.clone();
        let renamed = blocking(move || temporary.persist(target).map_err(|err| err.error));
        renamed.await.map_err(|err| self.shelf.failed(&format!("make {}", self.target.display()), &err))?;
        (self.artifact.size, self.artifact.sha256) = (Some(size), Some(sha256));
        let mut published = self.shelf.published.lock().expect("only read and set");
        published.insert(self.artifact.logical_path.clone(), self.artifact);
        Ok(None)
    }
}

/// An output being written. Dropped, its temporary file goes with it.
struct Writer {
    place: Place,
    temporary: NamedTempFile,
    /// After a failure every further call fails with it.
    sink: Result<FileSink, PortError>,
    size: u64,
    hasher: Sha256,
}

#[async_trait]
impl OutputStream for Writer {
    async fn write(&mut self, piece: Bytes) -> Result<(), PortError> {
        let sink = self.sink.as_mut().map_err(|err| err.clone())?;
        self.size += piece.len() as u64;
        self.hasher.update(&piece);
        if let Err(err) = sink.write(piece).await {
            let err = self.place.shelf.failed(&format!("write {}", self.place.target.display()), &err);
            self.sink = Err(err.clone());
            return Err(err);
        }
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<Option<String>, PortError> {
        let Self { place, temporary, sink, size, hasher } = *self;
        let written = sink?.finish().await;
        written.map_err(|err| place.shelf.failed(&format!("write {}", place.target.display()), &err))?;
        place.publish(temporary, size, hex(&hasher.finalize())).await
    }

    async fn abort(self: Box<Self>) {
        drop(self);
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

fn failed(what: &str, err: &io::Error) -> PortError {
    PortError::new(PortErrorKind::Local, format!("cannot {what}: {err}"))
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
