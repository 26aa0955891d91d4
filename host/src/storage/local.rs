//! A task's data in files on this machine.
//!
//! Inputs are the files that the lease names, called `input-0`, `input-1`… or by their path.
//! Outputs appear below one folder under their logical paths, complete or not at all.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::{
    OpenTask, Storage,
    digest::hex,
    file::{FileBlocks, FileSink},
    found_list::FoundList,
    naming::{data_type, for_message, logical_path, relative_path, safe},
    runner_file::RunnerFile,
    whole_input::{self, Target, blocking, list_fetched},
    zip::UnpackLimits,
};
use crate::model::{
    AnnouncedData, Artifact, ArtifactSpec, Budget, DataLocation, DataQuery, Fetched, FoundData, HeldLease, InputMeta,
    InputStream, LocalFiles, Materialized, OutputStream, PortError, PortErrorKind, Ports,
};

/// Bytes of one copy step.
const COPY_BYTES: usize = 256 * 1024;

/// Storage in local files.
pub struct LocalStorage {
    budget: Budget,
    unpack: UnpackLimits,
}

impl LocalStorage {
    /// Bytes in memory are charged to `budget`. `unpack` bounds the content of zip inputs.
    #[must_use]
    pub fn new(budget: Budget, unpack: UnpackLimits) -> Self {
        Self { budget, unpack }
    }

    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    pub(super) fn unpack(&self) -> &UnpackLimits {
        &self.unpack
    }
}

impl Storage for LocalStorage {
    fn ports(&self, held: &HeldLease, dir: &Path) -> Arc<dyn Ports> {
        let files = match &held.lease.data {
            AnnouncedData::Known(DataLocation::LocalFiles(files)) => Some(files.clone()),
            _ => None,
        };
        Arc::new(LocalPorts::new(held.clone(), files, dir.to_owned(), self.budget.clone(), self.unpack.clone()))
    }
}

/// The ports of one task. See the module documentation.
pub struct LocalPorts {
    inputs: Vec<PathBuf>,
    dir: PathBuf,
    folder: Arc<OutputFolder>,
    fetched: Arc<Mutex<Vec<Fetched>>>,
    budget: Budget,
    unpack: UnpackLimits,
}

/// The folder of the outputs, and the outputs that were published.
struct OutputFolder {
    /// `None`: the task has no data.
    out: Option<PathBuf>,
    published: Mutex<BTreeMap<String, Artifact>>,
    task: OpenTask,
}

impl LocalPorts {
    /// Ports for the task of `held`. They read and write `files` and materialize below `dir`. Without `files`
    /// every call fails.
    #[must_use]
    pub fn new(held: HeldLease, files: Option<LocalFiles>, dir: PathBuf, budget: Budget, unpack: UnpackLimits) -> Self {
        let (inputs, out) = files.map_or((Vec::new(), None), |files| (files.inputs, Some(files.out)));
        let folder = OutputFolder { out, published: Mutex::default(), task: OpenTask::new(held) };
        Self { inputs, dir, folder: Arc::new(folder), fetched: Arc::default(), budget, unpack }
    }

    fn path_of(&self, cid: &str) -> Result<&Path, PortError> {
        let cid = cid.trim();
        let number = cid.strip_prefix("input-").and_then(|number| number.parse::<usize>().ok());
        let by_number = number.and_then(|number| self.inputs.get(number));
        let found = by_number.or_else(|| self.inputs.iter().find(|path| path.as_os_str() == cid));
        found.map(PathBuf::as_path).ok_or_else(|| {
            let count = self.inputs.len();
            let message =
                format!("input {} not found (404): {count} inputs were given, input-0 is the first", for_message(cid));
            PortError::new(PortErrorKind::NotFound, message)
        })
    }

    async fn input(&self, cid: &str) -> Result<(PathBuf, File, InputMeta), PortError> {
        self.folder.task.check()?;
        let path = self.path_of(cid)?.to_owned();
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
        let meta = whole_input::meta(cid, &path, size);
        Ok((path, file, meta))
    }
}

#[async_trait]
impl Ports for LocalPorts {
    async fn open(&self, cid: &str) -> Result<Box<dyn InputStream>, PortError> {
        let (path, file, meta) = self.input(cid).await?;
        let blocks = FileBlocks::new(Arc::new(file), 0, meta.size.unwrap_or_default());
        let fetched = Arc::clone(&self.fetched);
        Ok(Box::new(Reader { blocks, meta, path, fetched, size: 0, hasher: Sha256::new(), ended: false }))
    }

    async fn materialize(&self, cid: &str) -> Result<Materialized, PortError> {
        let (source, mut file, meta) = self.input(cid).await?;
        let target = Target::below(&self.dir, &meta);
        // A copy, because the runner may change or remove its file.
        let (folder, path) = (target.folder.clone(), target.path.clone());
        let copied = blocking(move || {
            std::fs::create_dir_all(&folder)?;
            copy_hashed(&mut file, &mut File::create_new(path)?)
        });
        let copied =
            copied.await.map_err(|err| self.folder.task.failed(&format!("copy input {}", source.display()), &err))?;
        list_fetched(&self.fetched, &meta, copied);
        target.unpacked(meta, &source.display().to_string(), &self.unpack).await
    }

    async fn find(&self, query: DataQuery) -> Result<Box<dyn InputStream>, PortError> {
        self.folder.task.check()?;
        if self.folder.out.is_none() {
            let message = "this task has no data to query: its lease names no data location";
            return Err(PortError::new(PortErrorKind::Unsupported, message));
        }
        let inputs = self.inputs.clone();
        // An input that is not a readable file has no metadata. A runner that opens it gets the reason.
        let found = blocking(move || Ok(inputs.iter().enumerate().filter_map(found).collect::<Vec<_>>()));
        let found = found.await.map_err(|err| self.folder.task.failed("list the inputs", &err))?;
        Ok(Box::new(FoundList::new(found.into_iter(), query)?))
    }

    async fn put_file(&self, spec: ArtifactSpec, file: &Path) -> Result<Option<String>, PortError> {
        self.folder.task.check()?;
        let place = self.folder.place(spec)?;
        let what = format!("upload of {}", for_message(&place.artifact.logical_path));
        let source = RunnerFile::open(&what, file, &self.dir).await?;
        let temporary = place.temporary().await?;
        let (from, size) = (source.handle(), source.size());
        let copied = blocking(move || {
            let copied = io::copy(&mut io::Read::take(&*from, size), &mut temporary.as_file())?;
            Ok((temporary, copied))
        });
        let (temporary, copied) = copied.await.map_err(|err| {
            self.folder.task.failed(&format!("copy {} to {}", file.display(), place.target.display()), &err)
        })?;
        // If the file became shorter during the copy, `digest` fails.
        let sha256 = source.digest(&what).await?;
        place.publish(temporary, copied, sha256).await
    }

    async fn create(&self, spec: ArtifactSpec) -> Result<Box<dyn OutputStream>, PortError> {
        self.folder.task.check()?;
        let place = self.folder.place(spec)?;
        let temporary = place.temporary().await?;
        let file = temporary.as_file().try_clone().map_err(|err| self.folder.task.failed("write an output", &err))?;
        Ok(Box::new(Writer { place, temporary, sink: Ok(FileSink::new(file)), size: 0, hasher: Sha256::new() }))
    }

    fn published(&self) -> Vec<Artifact> {
        self.folder.published.lock().expect("only read and set").values().cloned().collect()
    }

    fn fetched(&self) -> Vec<Fetched> {
        self.fetched.lock().expect("only read and pushed to").clone()
    }

    fn budget(&self) -> &Budget {
        &self.budget
    }

    fn disk_was_full(&self) -> bool {
        self.folder.task.disk_was_full()
    }

    async fn close(&self) {
        self.folder.task.close();
    }
}

/// The metadata of an input that is a file.
fn found((number, path): (usize, &PathBuf)) -> Option<FoundData> {
    let size = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?.len();
    Some(whole_input::found(format!("input-{number}"), path, size))
}

/// Copies to the end and returns the count and the SHA-256 of the bytes.
fn copy_hashed(from: &mut impl io::Read, to: &mut impl io::Write) -> io::Result<(u64, String)> {
    let (mut hasher, mut size, mut block) = (Sha256::new(), 0, vec![0; COPY_BYTES]);
    loop {
        let read = from.read(&mut block)?;
        if read == 0 {
            return Ok((size, hex(&hasher.finalize())));
        }
        hasher.update(&block[..read]);
        to.write_all(&block[..read])?;
        size += read as u64;
    }
}

struct Reader {
    blocks: FileBlocks,
    meta: InputMeta,
    path: PathBuf,
    fetched: Arc<Mutex<Vec<Fetched>>>,
    size: u64,
    hasher: Sha256,
    ended: bool,
}

#[async_trait]
impl InputStream for Reader {
    fn meta(&self) -> &InputMeta {
        &self.meta
    }

    async fn next(&mut self) -> Result<Option<Bytes>, PortError> {
        let piece = self.blocks.next().await.map_err(|err| {
            let message = format!("cannot read input {}: {err}", self.path.display());
            PortError::new(PortErrorKind::Local, message)
        })?;
        match &piece {
            Some(piece) => {
                self.size += piece.len() as u64;
                self.hasher.update(piece);
            }
            None if !self.ended => {
                self.ended = true;
                list_fetched(&self.fetched, &self.meta, (self.size, hex(&self.hasher.clone().finalize())));
            }
            None => {}
        }
        Ok(piece)
    }
}

/// The target of one output.
struct Place {
    folder: Arc<OutputFolder>,
    artifact: Artifact,
    size: Option<u64>,
    target: PathBuf,
}

impl OutputFolder {
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
        let Some(out) = &self.out else {
            let message = "this task has no output folder: its lease names no data location";
            return Err(PortError::new(PortErrorKind::Unsupported, message));
        };
        let target = out.join(&relative);
        Ok(Place { folder: Arc::clone(self), artifact, size: spec.size, target })
    }
}

impl Place {
    /// A temporary file in the target's folder, so that the last step is a rename.
    async fn temporary(&self) -> Result<NamedTempFile, PortError> {
        let folder = self.target.parent().unwrap_or(Path::new(".")).to_owned();
        let made = blocking(move || {
            std::fs::create_dir_all(&folder)?;
            let mut builder = tempfile::Builder::new();
            // Temporary files are private by default. A finished output is an ordinary file.
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
            builder.prefix(".output-").tempfile_in(&folder)
        });
        made.await.map_err(|err| self.folder.task.failed(&format!("make {}", self.target.display()), &err))
    }

    async fn publish(
        mut self,
        temporary: NamedTempFile,
        size: u64,
        sha256: String,
    ) -> Result<Option<String>, PortError> {
        if let Some(promised) = self.size.filter(|promised| *promised != size) {
            let path = for_message(&self.artifact.logical_path);
            let message = format!("upload of {path} refused: {promised} bytes were promised, {size} came");
            return Err(PortError::new(PortErrorKind::BadRequest, message));
        }
        self.folder.task.check()?;
        let target = self.target.clone();
        let renamed = blocking(move || temporary.persist(target).map_err(|err| err.error));
        renamed.await.map_err(|err| self.folder.task.failed(&format!("make {}", self.target.display()), &err))?;
        (self.artifact.size, self.artifact.sha256) = (Some(size), Some(sha256));
        let mut published = self.folder.published.lock().expect("only read and set");
        published.insert(self.artifact.logical_path.clone(), self.artifact);
        Ok(None)
    }
}

/// An output that is being written. On drop its temporary file is removed.
struct Writer {
    place: Place,
    temporary: NamedTempFile,
    /// The error of the first failure. Every later call returns it.
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
            let err = self.place.folder.task.failed(&format!("write {}", self.place.target.display()), &err);
            self.sink = Err(err.clone());
            return Err(err);
        }
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<Option<String>, PortError> {
        let Self { place, temporary, sink, size, hasher } = *self;
        let written = sink?.finish().await;
        written.map_err(|err| place.folder.task.failed(&format!("write {}", place.target.display()), &err))?;
        place.publish(temporary, size, hex(&hasher.finalize())).await
    }

    async fn abort(self: Box<Self>) {
        drop(self);
    }
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
