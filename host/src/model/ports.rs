//! The interfaces through which a task's data moves. `storage` implements them, `plugins` uses them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Artifact, ArtifactSpec, Budget, DataQuery};

/// The kind of a port error. Callers branch on this, never on the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortErrorKind {
    /// The store refused the request as malformed, or the runner asked for something impossible.
    BadRequest,
    /// An artifact path that cannot be stored: `..`, NUL, or over 1024 bytes.
    InvalidPath,
    /// The store rejected the bearer twice.
    Unauthorized,
    /// There is no such input.
    NotFound,
    /// The store says the object exists or is in use.
    Conflict,
    /// The store answered with a 5xx status.
    Server,
    /// The store was unreachable, or the transfer broke off.
    Network,
    /// The store's answer does not follow its protocol.
    Malformed,
    /// This store does not support the request.
    Unsupported,
    /// The lease is over. Nothing more may be moved for it.
    LeaseOver,
    /// The set-up heartbeat was refused or coordinates are missing.
    Setup,
    /// A local file could not be read or written.
    Local,
    /// A limit was exceeded (size of progress or of an event, bytes in memory, size of an archive), or the
    /// store answered 413.
    Limit,
    /// The task ended while the call was in progress.
    TaskOver,
    /// Everything else, such as 403.
    Other,
}

/// An error of an input or output: one line, without secrets.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct PortError {
    /// The kind, for callers that branch.
    pub kind: PortErrorKind,
    /// What happened, for people. Status errors contain the words and the number, as in `conflict (409)`, because
    /// existing runners search error texts for them.
    pub message: String,
}

impl PortError {
    /// An error of `kind` with the text `message`.
    #[must_use]
    pub fn new(kind: PortErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// The store's metadata of an input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct InputMeta {
    /// The requested entry of `inputs_cids`.
    pub cid: String,
    /// The store's id of the data.
    pub data_id: Option<String>,
    /// Stored name.
    pub name: Option<String>,
    /// Stored data type.
    pub data_type: Option<String>,
    /// Domain the data belongs to.
    pub domain_id: Option<String>,
    /// Size in bytes, if the store sends it.
    pub size: Option<u64>,
}

/// An input on disk, inside the task's directory.
#[derive(Clone, Debug, Serialize)]
pub struct Materialized {
    /// The store's metadata of it.
    #[serde(flatten)]
    pub meta: InputMeta,
    /// The file.
    pub path: PathBuf,
    /// Folder that contains only this input. The runner may remove it.
    pub root_dir: PathBuf,
    /// Files of the other parts of the same answer.
    pub related_files: Vec<PathBuf>,
    /// Files unpacked from the input.
    pub extracted_paths: Vec<PathBuf>,
}

/// An input that was read completely, for the task's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// The requested entry of `inputs_cids`.
    pub cid: String,
    /// Stored name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256 of the bytes, 64 hex digits.
    pub sha256: String,
}

/// An input that is being read.
#[async_trait]
pub trait InputStream: Send {
    /// The store's metadata of it.
    fn meta(&self) -> &InputMeta;
    /// The next piece, of any size above zero. `None` at the end. A truncated transfer is an error.
    async fn next(&mut self) -> Result<Option<Bytes>, PortError>;
}

/// An artifact that is being written. If it is dropped without `finish`, nothing is published.
#[async_trait]
pub trait OutputStream: Send {
    /// Writes the next piece. Waits when the store is slower than the runner.
    async fn write(&mut self, piece: Bytes) -> Result<(), PortError>;
    /// Publishes the artifact and returns its id.
    async fn finish(self: Box<Self>) -> Result<Option<String>, PortError>;
    /// Cancels the upload. Uploaded parts are removed from the store, best effort.
    async fn abort(self: Box<Self>);
}

/// A task's inputs and outputs. Nothing is fetched before it is requested.
#[async_trait]
pub trait Ports: Send + Sync {
    /// Opens an input as a stream (the first part of the answer).
    async fn open(&self, cid: &str) -> Result<Box<dyn InputStream>, PortError>;
    /// Streams an input to disk.
    async fn materialize(&self, cid: &str) -> Result<Materialized, PortError>;
    /// Looks for data that matches `query`, in the order of the store. The stream has a line of JSON for each
    /// [`super::FoundData`], and has no metadata. The id of a line can be opened as an input.
    async fn find(&self, _query: DataQuery) -> Result<Box<dyn InputStream>, PortError> {
        Err(PortError::new(PortErrorKind::Unsupported, "this store cannot be queried; use the inputs of the lease"))
    }
    /// Uploads a file as a stream. Returns its id.
    async fn put_file(&self, spec: ArtifactSpec, file: &Path) -> Result<Option<String>, PortError>;
    /// Opens an artifact for writing piece by piece.
    async fn create(&self, spec: ArtifactSpec) -> Result<Box<dyn OutputStream>, PortError>;
    /// Everything published so far, sorted by logical path, one entry for each path (the last one wins).
    fn published(&self) -> Vec<Artifact>;
    /// Every input that was read completely so far, each once, in the order in which the reads ended. An input of
    /// several parts has one entry for each part.
    fn fetched(&self) -> Vec<Fetched>;
    /// The budget to which bytes in memory are charged.
    fn budget(&self) -> &Budget;
    /// The published artifacts for [`super::TaskResult::inline`], if the report carries them.
    fn inline(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
    /// Whether an output was not written because a disk of this machine was full.
    fn disk_was_full(&self) -> bool {
        false
    }
    /// Ends the task's access. Calls in progress fail with [`PortErrorKind::LeaseOver`], and unfinished outputs are
    /// aborted. This returns when that is done. Published artifacts stay listed.
    async fn close(&self);
}
