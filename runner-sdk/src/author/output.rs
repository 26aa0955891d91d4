//! A task's artifacts: bytes, files, streams, with or without explicit metadata.

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use serde::Serialize;

use super::{
    Port, PortError, PortErrorKind,
    control::{json, utf8},
};
use crate::host_calls::Call;

/// Path, name and data type of an artifact.
///
/// Only the path is required. Name and data type are derived from it: `outputs/cloud.ply` is stored as type `ply`,
/// and its name has the path and the task id. A name or type given here reaches the store unchanged. Two paths of
/// one task can have the same name, such as `a/b.ply` and `a_b.ply`. They are two artifacts: the second gets a
/// suffix in its name. Names and types with a quote, a backslash, a semicolon or a control character are rejected.
///
/// ```
/// use runner_sdk::Artifact;
/// let artifact = Artifact::new("refined/cloud.ply").name("refined_pointcloud").data_type("refined_pointcloud_ply");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Artifact {
    #[serde(skip)]
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    existing_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
}

impl Artifact {
    /// An artifact at `path`, relative to the task's outputs prefix.
    #[must_use]
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }

    /// Stores it under this name.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Stores it as this data type.
    #[must_use]
    pub fn data_type(mut self, data_type: impl Into<String>) -> Self {
        self.data_type = Some(data_type.into());
        self
    }

    /// Replaces stored data instead of creating it.
    #[must_use]
    pub fn existing_id(mut self, id: impl Into<String>) -> Self {
        self.existing_id = Some(id.into());
        self
    }

    /// Sets the exact size of a stream in bytes. The host then needs no buffer.
    #[must_use]
    pub fn size(mut self, bytes: u64) -> Self {
        self.size = Some(bytes);
        self
    }
}

impl From<&str> for Artifact {
    fn from(path: &str) -> Self {
        Self::new(path)
    }
}

impl From<String> for Artifact {
    fn from(path: String) -> Self {
        Self::new(path)
    }
}

/// The id in the answer to a finished artifact.
fn published(id: Bytes) -> Result<Option<String>, PortError> {
    Ok(Some(utf8(id)?).filter(|id| !id.is_empty()))
}

/// Publishes a task's artifacts. Putting one path twice replaces the first. Cheap to clone.
///
/// Paths are relative to the task's outputs prefix. Leading slashes are dropped. A `..` segment, a NUL or more than
/// 1024 bytes give `InvalidPath`.
#[derive(Clone)]
pub struct ArtifactSink {
    port: Arc<dyn Port>,
}

impl ArtifactSink {
    pub(crate) fn new(port: Arc<dyn Port>) -> Self {
        Self { port }
    }

    /// Publishes `bytes` at `path` and returns the store's id, if it has one.
    ///
    /// # Errors
    /// See [`crate::PortErrorKind`].
    pub async fn put_bytes(&self, path: &str, bytes: impl Into<Vec<u8>>) -> Result<Option<String>, PortError> {
        self.put_domain_artifact(Artifact::new(path), bytes).await
    }

    /// Publishes a file at `path`. The host reads it as a stream, for any size.
    ///
    /// # Errors
    /// `BadRequest` for an empty file, a directory, a pipe, or a link that leads out of the task's directory.
    /// `Local` when the file cannot be read or changes meanwhile. See [`crate::PortErrorKind`].
    pub async fn put_file(&self, path: &str, file: impl AsRef<Path>) -> Result<Option<String>, PortError> {
        self.put_domain_artifact_file(Artifact::new(path), file).await
    }

    /// Publishes `bytes` as `artifact`.
    ///
    /// # Errors
    /// As [`Self::put_bytes`].
    pub async fn put_domain_artifact(
        &self,
        artifact: impl Into<Artifact>,
        bytes: impl Into<Vec<u8>>,
    ) -> Result<Option<String>, PortError> {
        let bytes = bytes.into();
        let artifact = artifact.into().size(bytes.len() as u64);
        let mut writer = self.open_multipart(artifact).await?;
        if !bytes.is_empty() {
            writer.write_chunk(bytes).await?;
        }
        writer.finish().await
    }

    /// Publishes a file as `artifact`.
    ///
    /// # Errors
    /// As [`Self::put_file`].
    pub async fn put_domain_artifact_file(
        &self,
        artifact: impl Into<Artifact>,
        file: impl AsRef<Path>,
    ) -> Result<Option<String>, PortError> {
        let file = std::path::absolute(file.as_ref())
            .map_err(|err| PortError::new(PortErrorKind::Local, format!("{}: {err}", file.as_ref().display())))?;
        let path = file.to_str().ok_or_else(|| {
            PortError::new(PortErrorKind::Local, format!("{}: the path is not UTF-8", file.display()))
        })?;
        let artifact = artifact.into();
        let options = json(&artifact)?;
        let call = Call::OutputFile { path: artifact.path, options, file: path.to_owned() };
        published(self.port.call(call).await?.data)
    }

    /// Opens an artifact for writing in pieces, for any size.
    ///
    /// # Errors
    /// As [`Self::put_bytes`].
    pub async fn open_multipart(&self, artifact: impl Into<Artifact>) -> Result<ArtifactWriter, PortError> {
        let artifact = artifact.into();
        let options = json(&artifact)?;
        let stream = self.port.call(Call::OutputOpen { path: artifact.path, options }).await?.number;
        Ok(ArtifactWriter { port: Arc::clone(&self.port), stream, finished: false })
    }
}

/// An artifact being written. If it is dropped without [`Self::finish`], nothing is published.
pub struct ArtifactWriter {
    port: Arc<dyn Port>,
    stream: u64,
    finished: bool,
}

impl ArtifactWriter {
    /// Appends a piece. Waits when the store is slower than the runner.
    ///
    /// # Errors
    /// See [`crate::PortErrorKind`]. After an error the artifact cannot be finished.
    pub async fn write_chunk(&mut self, data: impl Into<Vec<u8>>) -> Result<(), PortError> {
        let call = Call::OutputWrite { stream: self.stream, data: Bytes::from(data.into()) };
        self.port.call(call).await.map(drop)
    }

    /// Publishes the artifact and returns the store's id, if it has one.
    ///
    /// # Errors
    /// See [`crate::PortErrorKind`].
    pub async fn finish(mut self) -> Result<Option<String>, PortError> {
        self.finished = true;
        published(self.port.call(Call::OutputFinish { stream: self.stream }).await?.data)
    }
}

impl Drop for ArtifactWriter {
    fn drop(&mut self) {
        if !self.finished {
            self.port.tell(Call::OutputAbort { stream: self.stream });
        }
    }
}
