//! A task's inputs: as bytes, as a file, as a stream.

use std::{
    io,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, ReadBuf};

use super::{
    Port, PortError, PortErrorKind, Reply,
    control::{decode, json},
};
use crate::{
    abi::INPUT_KEEP,
    host_calls::{Answer, Call},
};

/// Bytes that a reader requests at a time.
const READ_BYTES: u64 = 256 * 1024;
/// Bytes requested at a time by a caller that keeps the whole input in memory.
const READ_ALL_BYTES: u64 = 1024 * 1024;

/// What the store knows about an input, and its path on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct MaterializedInput {
    /// The requested entry of `inputs_cids`.
    pub cid: String,
    /// The file, inside the task's directory, named by the data's name and type.
    pub path: PathBuf,
    /// The store's id of the data.
    #[serde(default)]
    pub data_id: Option<String>,
    /// Stored name.
    #[serde(default)]
    pub name: Option<String>,
    /// Stored data type.
    #[serde(default)]
    pub data_type: Option<String>,
    /// Domain the data belongs to.
    #[serde(default)]
    pub domain_id: Option<String>,
    /// Size in bytes, where known.
    #[serde(default)]
    pub size: Option<u64>,
    /// The input's own directory. The runner may move or remove it.
    #[serde(default)]
    pub root_dir: PathBuf,
    /// Other files that belong to the same input.
    #[serde(default)]
    pub related_files: Vec<PathBuf>,
    /// Files unpacked from the input, in the order of the archive. Only if its data type is `zip`, `zip_data` or
    /// ends in `_zip`. `path` is the archive itself.
    #[serde(default)]
    pub extracted_paths: Vec<PathBuf>,
}

/// Fetches a task's inputs, each one on request. Cheap to clone.
#[derive(Clone)]
pub struct InputSource {
    port: Arc<dyn Port>,
}

impl InputSource {
    pub(crate) fn new(port: Arc<dyn Port>) -> Self {
        Self { port }
    }

    /// The whole input in memory, as it is stored: an archive stays packed. This call waits while the node's tasks
    /// together hold too much memory. Use a file or the reader for large inputs.
    ///
    /// # Errors
    /// `NotFound` for an unknown input. `Limit` for an input larger than the node's whole memory budget. See
    /// [`crate::PortErrorKind`] for the rest.
    pub async fn get_bytes_by_cid(&self, cid: &str) -> Result<Vec<u8>, PortError> {
        let mut reader = self.open(cid, INPUT_KEEP).await?;
        let mut bytes = Vec::new();
        while let Some(piece) = reader.next_piece(READ_ALL_BYTES).await? {
            if bytes.is_empty() {
                // The host has charged the whole size by now, so it is safe to allocate it.
                let size = reader.info.size.and_then(|size| usize::try_from(size).ok()).unwrap_or(0);
                bytes.try_reserve_exact(size.max(piece.len())).map_err(|_| {
                    PortError::new(PortErrorKind::Limit, format!("no memory for an input of {size} bytes"))
                })?;
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }

    /// The input as a file in the task's directory, streamed, for any size.
    ///
    /// # Errors
    /// As [`Self::get_bytes_by_cid`].
    pub async fn materialize_cid_to_temp(&self, cid: &str) -> Result<PathBuf, PortError> {
        Ok(self.materialize_cid_with_meta(cid).await?.path)
    }

    /// The input as a file, with what the store knows about it.
    ///
    /// # Errors
    /// As [`Self::get_bytes_by_cid`].
    pub async fn materialize_cid_with_meta(&self, cid: &str) -> Result<MaterializedInput, PortError> {
        let answer = self.port.call(Call::InputFile { cid: cid.to_owned() }).await?;
        let mut input: MaterializedInput = decode(&answer.data)?;
        if input.root_dir.as_os_str().is_empty() {
            input.root_dir = input.path.parent().map(PathBuf::from).unwrap_or_default();
        }
        Ok(input)
    }

    /// The input as an asynchronous reader. At most a few pieces are in memory at a time.
    ///
    /// # Errors
    /// As [`Self::get_bytes_by_cid`]. While reading, an [`io::Error`] that holds a [`PortError`].
    pub async fn open_reader_by_cid(&self, cid: &str) -> Result<InputReader, PortError> {
        self.open(cid, 0).await
    }

    /// Looks for data of the task's domain by name, data type or id. The answer is a stream, because a domain may hold
    /// much data. A found id can be read like an input.
    ///
    /// ```
    /// # use runner_sdk::{DataQuery, Error, TaskCtx};
    /// # async fn scans(ctx: TaskCtx) -> Result<(), Error> {
    /// let mut found = ctx.input.find(DataQuery::new().data_type("refined_scan_zip")).await?;
    /// while let Some(data) = found.next().await? {
    ///     let bytes = ctx.input.get_bytes_by_cid(&data.id).await?;
    /// #   drop(bytes);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// `BadRequest` for an empty name or type, or an id with a comma. `Unsupported` when the task's data is not on a
    /// domain server. See [`crate::PortErrorKind`] for the rest.
    pub async fn find(&self, query: DataQuery) -> Result<FoundStream, PortError> {
        let stream = self.port.call(Call::InputFind { query: json(&query)? }).await?.number;
        Ok(FoundStream { lines: self.reader(stream), buffer: BytesMut::new() })
    }

    fn reader(&self, stream: u64) -> InputReader {
        let port = Arc::clone(&self.port);
        InputReader { port, stream, info: InputInfo::default(), piece: None, read: None, ended: false }
    }

    async fn open(&self, cid: &str, flags: u64) -> Result<InputReader, PortError> {
        let Answer { number, data } = self.port.call(Call::InputOpen { cid: cid.to_owned(), flags }).await?;
        let mut reader = self.reader(number);
        // Dropping the reader closes the stream, also after an error.
        reader.info = decode(&data)?;
        Ok(reader)
    }
}

/// Which data [`InputSource::find`] looks for. Each given part must match exactly. Without any part it means all data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DataQuery {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ids: Option<Vec<String>>,
}

impl DataQuery {
    /// A query for all data of the domain.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Only data with this name.
    #[must_use]
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Only data of this type.
    #[must_use]
    pub fn data_type(self, data_type: impl Into<String>) -> Self {
        Self { data_type: Some(data_type.into()), ..self }
    }

    /// Only data with one of these ids. An empty list finds nothing.
    #[must_use]
    pub fn ids(self, ids: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { ids: Some(ids.into_iter().map(Into::into).collect()), ..self }
    }
}

/// What the store knows about found data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct FoundData {
    /// The store's id. It is a `cid` for the calls that read inputs.
    pub id: String,
    /// Stored name.
    #[serde(default)]
    pub name: Option<String>,
    /// Stored data type.
    #[serde(default)]
    pub data_type: Option<String>,
    /// Size in bytes.
    #[serde(default)]
    pub size: Option<u64>,
    /// The domain of the data.
    #[serde(default)]
    pub domain_id: Option<String>,
    /// When it was created, in the words of the store.
    #[serde(default)]
    pub created_at: Option<String>,
    /// When it was last changed, in the words of the store.
    #[serde(default)]
    pub updated_at: Option<String>,
}

/// Found data, one after the other. Dropping it ends the query.
pub struct FoundStream {
    lines: InputReader,
    buffer: BytesMut,
}

impl FoundStream {
    /// The next data, in the order of the store. `None` at the end.
    ///
    /// # Errors
    /// See [`crate::PortErrorKind`].
    pub async fn next(&mut self) -> Result<Option<FoundData>, PortError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1).freeze();
                return decode(&line).map(Some);
            }
            match self.lines.next_piece(READ_BYTES).await? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(PortError::new(PortErrorKind::Malformed, "the list of data ends inside a line")),
            }
        }
    }
}

/// What the store knows about an input that is read as a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct InputInfo {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    data_type: Option<String>,
    #[serde(default)]
    size: Option<u64>,
}

/// An input stream. Dropping it closes the input.
pub struct InputReader {
    port: Arc<dyn Port>,
    stream: u64,
    info: InputInfo,
    piece: Option<Bytes>,
    read: Option<Reply>,
    ended: bool,
}

impl InputReader {
    /// Stored name.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.info.name.as_deref()
    }

    /// Stored data type.
    #[must_use]
    pub fn data_type(&self) -> Option<&str> {
        self.info.data_type.as_deref()
    }

    /// Size in bytes, if the store reports it.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.info.size
    }

    async fn next_piece(&mut self, max: u64) -> Result<Option<Bytes>, PortError> {
        if self.ended {
            return Ok(None);
        }
        let piece = self.port.call(Call::InputRead { stream: self.stream, max }).await?.data;
        if piece.is_empty() {
            self.ended = true;
            return Ok(None);
        }
        Ok(Some(piece))
    }
}

impl AsyncRead for InputReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(piece) = &mut self.piece {
                let take = piece.len().min(buf.remaining());
                buf.put_slice(&piece.split_to(take));
                if piece.is_empty() {
                    self.piece = None;
                }
                return Poll::Ready(Ok(()));
            }
            if self.ended || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let Self { port, stream, read, .. } = &mut *self;
            let read = read.get_or_insert_with(|| port.call(Call::InputRead { stream: *stream, max: READ_BYTES }));
            match read.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(answer) => {
                    self.read = None;
                    match answer {
                        Ok(piece) if piece.data.is_empty() => self.ended = true,
                        Ok(piece) => self.piece = Some(piece.data),
                        Err(err) => return Poll::Ready(Err(io::Error::other(err))),
                    }
                }
            }
        }
    }
}

impl Drop for InputReader {
    fn drop(&mut self) {
        self.port.tell(Call::InputClose { stream: self.stream });
    }
}
