//! Inputs: one request, its parts as they arrive.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use uuid::Uuid;

use super::{
    Inner,
    calls::{Call, status_error},
    cid::resolve,
    parts::{Parser, PartHead, PartsError, PartsEvent},
};
use crate::{
    model::{InputMeta, InputStream, Materialized, PortError, PortErrorKind},
    storage::{
        file::FileSink,
        naming::{dataset_file, dataset_folder, shown},
    },
    transport::innermost,
};

/// How much may follow the closing delimiter before the connection is given up instead of reused.
const EPILOGUE_BYTES_MAX: usize = 64 * 1024;
/// How long it is waited for.
const EPILOGUE_WAIT: Duration = Duration::from_millis(200);

/// An answer being taken apart.
struct Download {
    inner: Arc<Inner>,
    what: String,
    cid: String,
    body: Incoming,
    parser: Parser,
}

pub(super) async fn open(inner: &Arc<Inner>, cid: &str) -> Result<Box<dyn InputStream>, PortError> {
    let (download, head) = Download::begin(inner, cid).await?;
    let meta = meta(cid, head);
    Ok(Box::new(FirstPart { state: State::Running(download), inner: Arc::clone(inner), meta }))
}

/// The first part as a stream.
struct FirstPart {
    state: State,
    inner: Arc<Inner>,
    meta: InputMeta,
}

enum State {
    Running(Download),
    /// Its end has been seen.
    Over,
    /// Asked again, it fails again: an error must not turn into an end.
    Failed(PortError),
}

#[async_trait]
impl InputStream for FirstPart {
    fn meta(&self) -> &InputMeta {
        &self.meta
    }

    async fn next(&mut self) -> Result<Option<Bytes>, PortError> {
        let state = &mut self.state;
        let next = async {
            let download = match state {
                State::Over => return Ok(None),
                State::Failed(err) => return Err(err.clone()),
                State::Running(download) => download,
            };
            match download.event().await {
                Ok(Some(PartsEvent::Data(data))) => Ok(Some(data)),
                Ok(_) => {
                    // What follows, if anything, is not asked for.
                    download.leave().await;
                    *state = State::Over;
                    Ok(None)
                }
                Err(err) => {
                    *state = State::Failed(err.clone());
                    Err(err)
                }
            }
        };
        self.inner.guarded(next).await
    }
}

pub(super) async fn materialize(inner: &Arc<Inner>, cid: &str) -> Result<Materialized, PortError> {
    let (mut download, first) = Download::begin(inner, cid).await?;
    let root = inner.dir.join(format!("domain-input-{}", Uuid::new_v4()));
    let unfinished = Unfinished(Some(root.clone()));
    let mut taken = HashSet::new();
    let mut files = Vec::new();
    let mut head = Some(first.clone());
    while let Some(part) = head.take() {
        let path = place(&root, &part, &mut taken);
        download.write_part(&path).await.map_err(|err| named(err, &path))?;
        files.push(path);
        head = match download.event().await? {
            Some(PartsEvent::Part(part)) => Some(part),
            _ => None,
        };
    }
    download.leave().await;
    unfinished.keep();
    let path = files.remove(0);
    let meta = meta(cid, first);
    Ok(Materialized { meta, path, root_dir: root, related_files: files, extracted_paths: Vec::new() })
}

/// A folder that goes again unless the input is complete: half an input is no input.
struct Unfinished(Option<PathBuf>);

impl Unfinished {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(root) = &self.0 {
            // The task's directory goes with everything in it, so a failure here is not lost.
            let _ = std::fs::remove_dir_all(root);
        }
    }
}

/// Trouble with a local file, or with the transfer into it.
enum WriteError {
    Port(PortError),
    Local(std::io::Error),
}

fn named(err: WriteError, path: &Path) -> PortError {
    match err {
        WriteError::Port(err) => err,
        WriteError::Local(err) => {
            PortError::new(PortErrorKind::Local, format!("cannot write input file {}: {err}", path.display()))
        }
    }
}

impl Download {
    /// Sends the request and reads up to the head of the first part.
    async fn begin(inner: &Arc<Inner>, cid: &str) -> Result<(Self, PartHead), PortError> {
        let at = inner.coordinates().await?;
        let target = resolve(cid, &at.server)?;
        let what = format!("download of input {}", shown(cid.trim()));
        let mut call = Call::new(&what, Method::GET, target.url(&at));
        call.accept = "multipart/form-data";
        let response = match inner.send(&call).await {
            Err(err) if err.kind == PortErrorKind::NotFound => return Err(not_found(cid)),
            result => result?,
        };
        let kind = response.headers().get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
        let parser = match Parser::new(&kind.unwrap_or_default()) {
            Ok(parser) => parser,
            Err(_) if response.status() == StatusCode::NO_CONTENT => return Err(not_found(cid)),
            Err(err) => return Err(malformed(&what, &err)),
        };
        let body = response.into_body();
        let mut download = Self { inner: Arc::clone(inner), what: what.clone(), cid: cid.to_owned(), body, parser };
        match download.event().await? {
            Some(PartsEvent::Part(head)) => Ok((download, head)),
            _ => {
                download.leave().await;
                Err(not_found(&download.cid))
            }
        }
    }

    /// The next event; `None` at the end of the body.
    async fn event(&mut self) -> Result<Option<PartsEvent>, PortError> {
        loop {
            if let Some(event) = self.parser.next().map_err(|err| malformed(&self.what, &err))? {
                return Ok(Some(event));
            }
            let stall = self.inner.config.stall;
            match tokio::time::timeout(stall, self.body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.parser.feed(data);
                    }
                }
                Ok(Some(Err(err))) => return Err(self.broken(&format!("the answer broke off: {}", innermost(&err)))),
                Ok(None) => {
                    self.parser.end();
                    return self.parser.next().map_err(|err| malformed(&self.what, &err));
                }
                Err(_) => return Err(self.broken(&format!("nothing arrived for {stall:?}"))),
            }
        }
    }

    fn broken(&self, why: &str) -> PortError {
        PortError::new(PortErrorKind::Network, format!("{} failed: {why}", self.what))
    }

    /// Streams the body of the current part into a new file.
    async fn write_part(&mut self, path: &Path) -> Result<(), WriteError> {
        let target = path.to_owned();
        let file = tokio::task::spawn_blocking(move || {
            if let Some(parent) = target.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::fs::File::create_new(target)
        });
        let file = file.await.map_err(std::io::Error::other).and_then(|made| made).map_err(WriteError::Local)?;
        let mut sink = FileSink::new(file);
        while let Some(PartsEvent::Data(data)) = self.event().await.map_err(WriteError::Port)? {
            sink.write(data).await.map_err(WriteError::Local)?;
        }
        sink.finish().await.map_err(WriteError::Local)?;
        Ok(())
    }

    /// Reads the little that may follow, so that the connection can be used again.
    async fn leave(&mut self) {
        let mut left = EPILOGUE_BYTES_MAX;
        let rest = async {
            while let Some(Ok(frame)) = self.body.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                if length > left {
                    return;
                }
                left -= length;
            }
        };
        let _ = tokio::time::timeout(EPILOGUE_WAIT, rest).await;
    }
}

fn meta(cid: &str, head: PartHead) -> InputMeta {
    let PartHead { id, domain_id, name, data_type, size } = head;
    InputMeta { cid: cid.to_owned(), data_id: id, name, data_type, domain_id, size }
}

/// A path for a part that no other part of the answer has.
fn place(root: &Path, part: &PartHead, taken: &mut HashSet<PathBuf>) -> PathBuf {
    let name = part.name.as_deref().unwrap_or_default();
    let folder = root.join("datasets").join(dataset_folder(name));
    let (stem, extension) = dataset_file(name, part.data_type.as_deref().unwrap_or_default());
    let mut path = folder.join(format!("{stem}.{extension}"));
    let mut number = 2;
    while !taken.insert(path.clone()) {
        path = folder.join(format!("{stem}_{number}.{extension}"));
        number += 1;
    }
    path
}

fn not_found(cid: &str) -> PortError {
    status_error(&format!("download of input {}", shown(cid.trim())), StatusCode::NOT_FOUND, "no such data")
}

fn malformed(what: &str, err: &PartsError) -> PortError {
    let kind = match err {
        PartsError::Truncated(_) => PortErrorKind::Network,
        _ => PortErrorKind::Malformed,
    };
    PortError::new(kind, format!("{what} failed: {err}"))
}
