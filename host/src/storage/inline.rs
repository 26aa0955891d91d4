//! A task's data in its lease and in its report.
//!
//! Inputs are the values that came with the lease. Artifacts are kept in memory in the form of the report: a text that
//! is UTF-8 under its path, other bytes as base64 under `PATH;base64`. All memory is charged to the budget.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::{
    OpenTask, Storage,
    digest::hex,
    found_list::FoundList,
    naming::{data_type, for_message, logical_path, relative_path, safe},
    runner_file::RunnerFile,
    whole_input::{self, Target, blocking, list_fetched},
    zip::UnpackLimits,
};
use crate::model::{
    AnnouncedData, Artifact, ArtifactSpec, Budget, Charge, DataLocation, DataQuery, Fetched, FoundData, HeldLease,
    InlineInputs, InputMeta, InputStream, Materialized, OutputStream, PortError, PortErrorKind, Ports,
};

/// Most bytes of all artifacts of a task with their names, in the form of the report. Control planes accept messages
/// of 4 MiB.
pub const INLINE_BYTES_MAX: usize = 3 * 1024 * 1024;

const BASE64_SUFFIX: &str = InlineInputs::BASE64_SUFFIX;

/// Storage in leases and reports.
pub struct InlineStorage {
    budget: Budget,
    unpack: UnpackLimits,
}

impl InlineStorage {
    /// Bytes in memory are charged to `budget`. `unpack` bounds the content of zip inputs.
    #[must_use]
    pub fn new(budget: Budget, unpack: UnpackLimits) -> Self {
        Self { budget, unpack }
    }
}

impl Storage for InlineStorage {
    fn ports(&self, held: &HeldLease, dir: &Path) -> Arc<dyn Ports> {
        let inputs = match &held.lease.data {
            AnnouncedData::Known(DataLocation::Inline(inputs)) => inputs.clone(),
            _ => InlineInputs(Arc::default()),
        };
        Arc::new(InlinePorts::new(held.clone(), inputs, dir.to_owned(), self.budget.clone(), self.unpack.clone()))
    }
}

/// The ports of one task. See the module's text.
struct InlinePorts {
    inputs: InlineInputs,
    dir: PathBuf,
    budget: Budget,
    unpack: UnpackLimits,
    fetched: Arc<Mutex<Vec<Fetched>>>,
    outputs: Arc<Outputs>,
    /// The memory of the inputs.
    _charge: Charge,
}

/// The artifacts of a task.
struct Outputs {
    published: Mutex<Published>,
    task: OpenTask,
}

#[derive(Default)]
struct Published {
    by_path: BTreeMap<String, Value>,
    /// The bytes of all names and values.
    total: usize,
}

/// A published artifact.
struct Value {
    artifact: Artifact,
    key: String,
    text: String,
    _charge: Charge,
}

impl Value {
    fn bytes(&self) -> usize {
        self.key.len() + self.text.len()
    }
}

impl InlinePorts {
    fn new(held: HeldLease, inputs: InlineInputs, dir: PathBuf, budget: Budget, unpack: UnpackLimits) -> Self {
        let bytes = inputs.0.iter().map(|(name, value)| (name.len() + value.len()) as u64).sum();
        let outputs = Arc::new(Outputs { published: Mutex::default(), task: OpenTask::new(held) });
        Self { _charge: budget.count(bytes), inputs, dir, budget, unpack, fetched: Arc::default(), outputs }
    }

    fn input(&self, cid: &str) -> Result<(InputMeta, Bytes), PortError> {
        self.outputs.task.check()?;
        let bytes = self.inputs.0.get(cid).ok_or_else(|| {
            let message = format!("input {} not found (404): the lease has no such input", for_message(cid));
            PortError::new(PortErrorKind::NotFound, message)
        })?;
        let meta = whole_input::meta(cid, Path::new(cid), bytes.len() as u64);
        Ok((meta, bytes.clone()))
    }
}

#[async_trait]
impl Ports for InlinePorts {
    async fn open(&self, cid: &str) -> Result<Box<dyn InputStream>, PortError> {
        let (meta, bytes) = self.input(cid)?;
        let rest = if bytes.is_empty() { None } else { Some(bytes.clone()) };
        Ok(Box::new(Reader { meta, bytes, rest, fetched: Arc::clone(&self.fetched) }))
    }

    async fn materialize(&self, cid: &str) -> Result<Materialized, PortError> {
        let (meta, bytes) = self.input(cid)?;
        let target = Target::below(&self.dir, &meta);
        let (folder, path, content) = (target.folder.clone(), target.path.clone(), bytes.clone());
        let written = blocking(move || {
            std::fs::create_dir_all(&folder)?;
            std::fs::write(path, content)
        });
        let shown = for_message(cid);
        written.await.map_err(|err| self.outputs.task.failed(&format!("write input {shown}"), &err))?;
        list_fetched(&self.fetched, &meta, whole(&bytes));
        target.unpacked(meta, &shown, &self.unpack).await
    }

    async fn find(&self, query: DataQuery) -> Result<Box<dyn InputStream>, PortError> {
        self.outputs.task.check()?;
        let found =
            |(name, value): (&String, &Bytes)| whole_input::found(name.clone(), Path::new(name), value.len() as u64);
        let found: Vec<FoundData> = self.inputs.0.iter().map(found).collect();
        Ok(Box::new(FoundList::new(found.into_iter(), query)?))
    }

    async fn put_file(&self, spec: ArtifactSpec, file: &Path) -> Result<Option<String>, PortError> {
        self.outputs.task.check()?;
        let place = self.outputs.place(spec)?;
        let what = format!("upload of {}", for_message(&place.artifact.logical_path));
        let source = RunnerFile::open(&what, file, &self.dir).await?;
        let size = source.size();
        if size > INLINE_BYTES_MAX as u64 {
            return Err(too_large(&place.artifact.logical_path, size));
        }
        let charge = self.budget.count(size);
        let handle = source.handle();
        let read = blocking(move || {
            let mut bytes = Vec::new();
            (&*handle).take(size).read_to_end(&mut bytes).map(|_| bytes)
        });
        let bytes = read.await.map_err(|err| self.outputs.task.failed("read an output", &err))?;
        // If the file changed during the read, `digest` fails.
        let sha256 = source.digest(&what).await?;
        place.publish(bytes, sha256, charge)
    }

    async fn create(&self, spec: ArtifactSpec) -> Result<Box<dyn OutputStream>, PortError> {
        self.outputs.task.check()?;
        let place = self.outputs.place(spec)?;
        let (budget, charge) = (self.budget.clone(), self.budget.count(0));
        Ok(Box::new(Writer { place, bytes: Vec::new(), budget, charge }))
    }

    fn published(&self) -> Vec<Artifact> {
        self.outputs.published().by_path.values().map(|value| value.artifact.clone()).collect()
    }

    fn fetched(&self) -> Vec<Fetched> {
        self.fetched.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn budget(&self) -> &Budget {
        &self.budget
    }

    fn inline(&self) -> BTreeMap<String, String> {
        self.outputs.published().by_path.values().map(|value| (value.key.clone(), value.text.clone())).collect()
    }

    fn disk_was_full(&self) -> bool {
        self.outputs.task.disk_was_full()
    }

    async fn close(&self) {
        self.outputs.task.close();
    }
}

/// The count and the SHA-256 of bytes.
fn whole(bytes: &[u8]) -> (u64, String) {
    (bytes.len() as u64, hex(&Sha256::digest(bytes)))
}

struct Reader {
    meta: InputMeta,
    bytes: Bytes,
    /// What the runner has not read. `None`: nothing.
    rest: Option<Bytes>,
    fetched: Arc<Mutex<Vec<Fetched>>>,
}

#[async_trait]
impl InputStream for Reader {
    fn meta(&self) -> &InputMeta {
        &self.meta
    }

    async fn next(&mut self) -> Result<Option<Bytes>, PortError> {
        let piece = self.rest.take();
        if piece.is_none() {
            list_fetched(&self.fetched, &self.meta, whole(&self.bytes));
        }
        Ok(piece)
    }
}

/// The name of one output.
struct Place {
    outputs: Arc<Outputs>,
    artifact: Artifact,
    size: Option<u64>,
}

impl Outputs {
    fn published(&self) -> MutexGuard<'_, Published> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(self: &Arc<Self>, spec: ArtifactSpec) -> Result<Place, PortError> {
        let relative = relative_path(&spec.path)?;
        let refuse = |message: String| Err(PortError::new(PortErrorKind::InvalidPath, message));
        if relative.is_empty() {
            return refuse("artifact path is empty; expected a file name".to_owned());
        }
        if relative.ends_with(BASE64_SUFFIX) {
            let path = for_message(&relative);
            return refuse(format!("artifact path {path} ends in {BASE64_SUFFIX}, which marks base64 in a report"));
        }
        let artifact = Artifact {
            logical_path: logical_path(None, &relative),
            name: spec.name.unwrap_or_else(|| safe(&relative, "artifact")),
            data_type: spec.data_type.unwrap_or_else(|| data_type(&relative)),
            id: None,
            size: None,
            sha256: None,
        };
        Ok(Place { outputs: Arc::clone(self), artifact, size: spec.size })
    }
}

impl Place {
    fn publish(mut self, bytes: Vec<u8>, sha256: String, charge: Charge) -> Result<Option<String>, PortError> {
        let (path, size) = (self.artifact.logical_path.clone(), bytes.len() as u64);
        if let Some(promised) = self.size.filter(|promised| *promised != size) {
            let message =
                format!("upload of {} refused: {promised} bytes were promised, {size} came", for_message(&path));
            return Err(PortError::new(PortErrorKind::BadRequest, message));
        }
        self.outputs.task.check()?;
        let (key, text) = match String::from_utf8(bytes) {
            Ok(text) => (path.clone(), text),
            Err(err) => (format!("{path}{BASE64_SUFFIX}"), BASE64_STANDARD.encode(err.as_bytes())),
        };
        (self.artifact.size, self.artifact.sha256) = (Some(size), Some(sha256));
        let value = Value { artifact: self.artifact, key, text, _charge: charge };
        let mut published = self.outputs.published();
        let replaced = published.by_path.get(&path).map_or(0, Value::bytes);
        let total = published.total - replaced + value.bytes();
        if total > INLINE_BYTES_MAX {
            return Err(too_large(&path, total as u64));
        }
        published.total = total;
        published.by_path.insert(path, value);
        Ok(None)
    }
}

fn too_large(path: &str, bytes: u64) -> PortError {
    let message = format!(
        "upload of {} refused: {bytes} bytes, but a report carries at most {INLINE_BYTES_MAX} bytes of all artifacts",
        for_message(path)
    );
    PortError::new(PortErrorKind::Limit, message)
}

/// An output that is being written.
struct Writer {
    place: Place,
    bytes: Vec<u8>,
    budget: Budget,
    charge: Charge,
}

#[async_trait]
impl OutputStream for Writer {
    async fn write(&mut self, piece: Bytes) -> Result<(), PortError> {
        let size = self.bytes.len() + piece.len();
        if size > INLINE_BYTES_MAX {
            return Err(too_large(&self.place.artifact.logical_path, size as u64));
        }
        self.bytes.extend_from_slice(&piece);
        self.charge = self.budget.count(size as u64);
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<Option<String>, PortError> {
        let Self { place, bytes, charge, .. } = *self;
        let sha256 = hex(&Sha256::digest(&bytes));
        place.publish(bytes, sha256, charge)
    }

    async fn abort(self: Box<Self>) {
        drop(self);
    }
}

#[cfg(test)]
#[path = "inline_tests.rs"]
mod tests;
