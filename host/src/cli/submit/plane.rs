//! The control plane and the domain server as an author's client sees them
//! (posemesh.md sections 4.13 and 6). Bodies are streamed from and to files.

use std::{
    io::{ErrorKind, SeekFrom},
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt, BufWriter};
use tokio_util::io::ReaderStream;
use url::Url;
use uuid::Uuid;

use super::{Exit, UNREACHABLE_MAX, artifacts::plain, notes::Notes};
use crate::transport::{self, Answer, Body, Client, TransportError, full, innermost, read_capped, retry_after};

/// How long a call with a small body may take.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Time limit for aborting a multipart upload when the command ends.
const ABORT_LIMIT: Duration = Duration::from_secs(2);
/// The time limit for an upload and its answer. Its size is not known here.
const UPLOAD_LIMIT: Duration = Duration::from_secs(60 * 60);
/// Largest description of a job that is read: [`super::TASKS_PER_JOB`] tasks with their events.
const JOB_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Bytes of one read or write of a file.
const CHUNK_BYTES: usize = 256 * 1024;
/// The largest single upload if the server states no limit.
const SINGLE_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Pauses between two tries of one call. They double from the first to the last.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(200);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why a call to the control plane or the domain server failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlaneError {
    #[error("no dev server answers at {url} ({reason}); {remedy}")]
    NoDevServer { url: String, reason: String, remedy: &'static str },
    #[error("the dev server at {url} does not serve {wanted}; {remedy}")]
    NotServed { url: String, wanted: &'static str, remedy: String },
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("{what} was answered {status}: {excerpt}")]
    Refused { what: String, status: u16, excerpt: String, retry_after: Option<Duration> },
    #[error("{what}: {reason}")]
    File { what: String, reason: String },
    #[error("{what}: {reason}")]
    DiskFull { what: String, reason: String },
}

impl PlaneError {
    /// No dev server with the control plane `wanted`.
    fn no_dev_server(url: &str, wanted: &str, reason: impl std::fmt::Display) -> Self {
        let remedy = match wanted {
            NODE_RUNTIME => "start runner-host dev --plane node-runtime, or name a running one with --dev",
            _ => "start runner-host dev, or name a control plane with --dms",
        };
        Self::NoDevServer { url: url.to_owned(), reason: reason.to_string(), remedy }
    }

    /// An error of the operating system about a file.
    pub(super) fn file(path: &Path, err: &std::io::Error) -> Self {
        let (what, reason) = (path.display().to_string(), err.to_string());
        match err.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { what, reason },
            _ => Self::File { what, reason },
        }
    }

    /// Whether an immediate repeat may help.
    pub(super) fn is_temporary(&self) -> bool {
        match self {
            Self::NoDevServer { .. } => true,
            Self::Transport(err) => !matches!(err, TransportError::Insecure { .. } | TransportError::BadUrl { .. }),
            Self::Refused { status, .. } => matches!(status, 408 | 429 | 500..),
            Self::NotServed { .. } | Self::File { .. } | Self::DiskFull { .. } => false,
        }
    }

    /// Whether the service has certainly not executed the request. Then a repeat cannot execute it twice.
    fn is_not_done(&self) -> bool {
        matches!(self, Self::Refused { status: 408 | 429 | 503, .. })
    }

    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused { status: 409, .. })
    }

    pub(super) fn is_disk_full(&self) -> bool {
        matches!(self, Self::DiskFull { .. })
    }

    pub(super) fn exit_code(&self) -> Exit {
        match self {
            _ if self.is_temporary() || self.is_disk_full() => Exit::Temporary,
            Self::File { .. } => Exit::Failed,
            _ => Exit::Usage,
        }
    }
}

/// See the module documentation.
pub(super) struct Plane {
    client: Client,
    dms: String,
    server: String,
    domain: Uuid,
    token: String,
    /// The address of the dev server, if it is one.
    dev: Option<String>,
    /// The id of the multipart upload in progress, encoded for a query.
    begun: Mutex<Option<String>>,
}

#[derive(Deserialize)]
struct DevServerInfo {
    dms: String,
    domain_server: String,
    domain_id: Uuid,
    grant: String,
    nodes: Vec<DevServerNode>,
    #[serde(default = "only_dms")]
    planes: Vec<String>,
}

/// The control planes of a dev server by their names.
pub(super) const DMS: &str = "dms";
pub(super) const NODE_RUNTIME: &str = "node-runtime";

fn only_dms() -> Vec<String> {
    vec![DMS.to_owned()]
}

#[derive(Deserialize)]
struct DevServerNode {
    capabilities: Vec<String>,
}

impl Plane {
    pub(super) fn new(
        client: Client,
        dms: &Url,
        server: &Url,
        domain: Uuid,
        token: String,
    ) -> Result<Self, PlaneError> {
        client.check(dms)?;
        client.check(server)?;
        Ok(Self { client, dms: base(dms), server: base(server), domain, token, dev: None, begun: Mutex::default() })
    }

    /// The dev server that listens at `url`, which must serve the control plane `wanted`.
    pub(super) async fn of_dev(client: Client, url: &Url, wanted: &'static str) -> Result<Self, PlaneError> {
        let (dev, answer) = Self::dev_server(&client, url, wanted).await?;
        let away = |err: url::ParseError| PlaneError::no_dev_server(&dev, wanted, err);
        let (dms, server) = (Url::parse(&answer.dms).map_err(away)?, Url::parse(&answer.domain_server).map_err(away)?);
        let mut plane = Self::new(client, &dms, &server, answer.domain_id, answer.grant)?;
        plane.dev = Some(dev);
        Ok(plane)
    }

    /// The base URL and the answer of the dev server at `url`.
    async fn dev_server(
        client: &Client,
        url: &Url,
        wanted: &'static str,
    ) -> Result<(String, DevServerInfo), PlaneError> {
        client.check(url)?;
        let dev = base(url);
        let answer = dev_server(client, &dev).await;
        let answer = answer.map_err(|err| PlaneError::no_dev_server(&dev, wanted, err))?;
        if answer.planes.iter().any(|plane| plane == wanted) {
            return Ok((dev, answer));
        }
        let remedy = match answer.planes.first() {
            Some(other) if wanted == DMS => format!("use submit --plane {other}"),
            _ => format!("start it with runner-host dev --plane {wanted}"),
        };
        Err(PlaneError::NotServed { url: dev, wanted, remedy })
    }

    pub(super) fn domain(&self) -> Uuid {
        self.domain
    }

    /// The base URL of the domain server.
    pub(super) fn server(&self) -> &str {
        &self.server
    }

    /// The base URL of the dev server, if it is one.
    pub(super) fn dev(&self) -> Option<&str> {
        self.dev.as_deref()
    }

    /// The capabilities that nodes serve. `None`: unknown, because only a dev server lists them.
    pub(super) async fn served(&self) -> Option<Vec<String>> {
        let answer = dev_server(&self.client, self.dev.as_ref()?).await.ok()?;
        Some(answer.nodes.into_iter().flat_map(|node| node.capabilities).collect())
    }

    /// Creates a job. After a lost answer the job may exist. Then the request is repeated only with a dev server,
    /// because other services may ignore `Idempotency-Key`.
    pub(super) async fn create_job(&self, job: &Value, notes: &mut Notes) -> Result<Uuid, PlaneError> {
        #[derive(Deserialize)]
        struct Created {
            job_id: Uuid,
        }
        let (key, job) = (Uuid::new_v4().to_string(), job.to_string());
        let again = |err: &PlaneError| err.is_not_done() || (self.dev.is_some() && err.is_temporary());
        let create = async |_: &mut Notes| {
            let request = self.request(Method::POST, &format!("{}/jobs", self.dms)).header(header::CONTENT_TYPE, JSON);
            let request = request.header("idempotency-key", &key);
            let answer = self.call(request, full(job.clone()), CALL_LIMIT, "the job").await?;
            Ok(answer.json::<Created>()?.job_id)
        };
        retrying(notes, again, create).await
    }

    pub(super) async fn cancel_job(&self, id: Uuid, notes: &mut Notes) -> Result<(), PlaneError> {
        let cancel = async |_: &mut Notes| {
            let request = self.request(Method::POST, &format!("{}/jobs/{id}/cancel", self.dms));
            self.call(request, full(""), CALL_LIMIT, "the cancellation").await.map(drop)
        };
        retrying(notes, PlaneError::is_temporary, cancel).await
    }

    pub(super) async fn job(&self, id: Uuid) -> Result<Value, PlaneError> {
        let request = self.request(Method::GET, &format!("{}/jobs/{id}", self.dms));
        let request = request.body(transport::full("")).expect("a valid request");
        let host = request.uri().host().unwrap_or_default().to_owned();
        let response = self.client.send(request, CALL_LIMIT).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        // A job with many tasks is larger than the limit for other answers.
        let body = in_time(&host, read_capped(response.into_body(), JOB_BYTES_MAX, &host)).await?;
        if !status.is_success() {
            return Err(refused("the question about the job", status, &headers, transport::excerpt(&body)));
        }
        serde_json::from_slice(&body).map_err(|_| not_json(host, body.len(), "expected a description of the job"))
    }

    /// Stores a file under a unique name. Returns its data id.
    pub(super) async fn upload(&self, file: &Path, notes: &mut Notes) -> Result<String, PlaneError> {
        let size = std::fs::metadata(file).map_err(|err| unreadable(file, &err))?.len();
        let (name, data_type) = name_of(file);
        let limits = self.limits(notes).await;
        if size > limits.single_max && limits.multipart && size > 0 {
            return self.upload_parts(file, size, &name, &data_type, notes).await;
        }
        let mut first = true;
        let upload = async |notes: &mut Notes| {
            let stored = self.upload_whole(file, size, &name, &data_type, notes).await;
            match stored {
                // The previous try stored it, and its answer was lost.
                Err(err) if !first && err.is_conflict() => self.stored(&name, &data_type).await,
                stored => {
                    first = false;
                    stored
                }
            }
        };
        retrying(notes, PlaneError::is_temporary, upload).await
    }

    /// Stores a file with one request.
    async fn upload_whole(
        &self,
        file: &Path,
        size: u64,
        name: &str,
        data_type: &str,
        notes: &mut Notes,
    ) -> Result<String, PlaneError> {
        notes.bytes(&format!("uploading {}", file.display()), 0, size);
        let boundary = format!("runner-host-{}", Uuid::new_v4().simple());
        let head = format!(
            "--{boundary}\r\nContent-Type: application/octet-stream\r\n\
             Content-Disposition: form-data; name=\"{name}\"; data-type=\"{data_type}\"\r\n\r\n"
        );
        let tail = format!("\r\n--{boundary}--\r\n");
        let length = head.len() as u64 + size + tail.len() as u64;
        let request = self
            .request(Method::POST, &self.data(""))
            .header(header::CONTENT_TYPE, format!("multipart/form-data; boundary={boundary}"))
            .header(header::CONTENT_LENGTH, length);
        let body = file_body(file, 0, size, head, tail).await?;
        let answer: Value = self.call(request, body, UPLOAD_LIMIT, "the upload").await?.json()?;
        notes.bytes(&format!("uploading {}", file.display()), size, size);
        id_in(&answer["data"][0])
    }

    /// The id of the data with this name and type.
    async fn stored(&self, name: &str, data_type: &str) -> Result<String, PlaneError> {
        let query = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("name", name)
            .append_pair("data_type", data_type)
            .finish();
        let request = self.request(Method::GET, &self.data(&format!("?{query}")));
        let answer: Value = self.call(request, full(""), CALL_LIMIT, "the search for the upload").await?.json()?;
        id_in(&answer["data"][0])
    }

    async fn upload_parts(
        &self,
        file: &Path,
        size: u64,
        name: &str,
        data_type: &str,
        notes: &mut Notes,
    ) -> Result<String, PlaneError> {
        #[derive(Deserialize)]
        struct Begun {
            upload_id: String,
            part_size: u64,
        }
        let initiate = json!({
            "name": name, "data_type": data_type, "size": size, "content_type": "application/octet-stream",
            "existing_id": null,
        });
        // The server deletes an upload whose answer was lost after some time.
        let begin = async |_: &mut Notes| self.post_upload("?uploads", &initiate, CALL_LIMIT).await;
        let begun: Begun = retrying(notes, PlaneError::is_temporary, begin).await?;
        let upload: String = url::form_urlencoded::byte_serialize(begun.upload_id.as_bytes()).collect();
        drop(self.note(Some(upload.clone())));
        let stored = self.upload_begun(file, size, &upload, begun.part_size.max(1), notes).await;
        match stored {
            Ok(_) => drop(self.note(None)),
            Err(_) => self.give_up().await,
        }
        stored
    }

    /// Begins or completes an upload in parts.
    async fn post_upload<T: DeserializeOwned>(
        &self,
        query: &str,
        body: &Value,
        limit: Duration,
    ) -> Result<T, PlaneError> {
        let request = self.request(Method::POST, &self.data(&format!("/multipart{query}")));
        let request = request.header(header::CONTENT_TYPE, JSON);
        Ok(self.call(request, full(body.to_string()), limit, "the upload").await?.json()?)
    }

    fn note(&self, upload: Option<String>) -> Option<String> {
        std::mem::replace(&mut *self.begun.lock().expect("nothing panics while it holds this"), upload)
    }

    /// Aborts the current upload in parts, if there is one, in bounded time. A failure has no effect: the server
    /// deletes the upload later.
    pub(super) async fn give_up(&self) {
        let Some(upload) = self.note(None) else { return };
        let request = self.request(Method::DELETE, &self.data(&format!("/multipart?uploadId={upload}")));
        // A connection attempt has its own limits, and the command must end.
        let _ = tokio::time::timeout(ABORT_LIMIT, self.call(request, full(""), ABORT_LIMIT, "the abort")).await;
    }

    async fn upload_begun(
        &self,
        file: &Path,
        size: u64,
        upload: &str,
        part_size: u64,
        notes: &mut Notes,
    ) -> Result<String, PlaneError> {
        let mut parts = Vec::new();
        let mut offset = 0;
        while offset < size {
            notes.bytes(&format!("uploading {}", file.display()), offset, size);
            let (number, length) = (parts.len() + 1, part_size.min(size - offset));
            let put = async |_: &mut Notes| {
                let request = self
                    .request(Method::PUT, &self.data(&format!("/multipart?uploadId={upload}&partNumber={number}")))
                    .header(header::CONTENT_TYPE, "application/octet-stream")
                    .header(header::CONTENT_LENGTH, length);
                let body = file_body(file, offset, length, String::new(), String::new()).await?;
                Ok(self.call(request, body, UPLOAD_LIMIT, "a part of the upload").await?.json::<Value>()?)
            };
            let answer = retrying(notes, PlaneError::is_temporary, put).await?;
            parts.push(json!({ "part_number": number, "etag": answer["etag"] }));
            offset += length;
        }
        let (query, parts) = (format!("?uploadId={upload}"), json!({ "parts": parts }));
        let complete = async |_: &mut Notes| self.post_upload(&query, &parts, UPLOAD_LIMIT).await;
        let answer: Value = retrying(notes, PlaneError::is_temporary, complete).await?;
        notes.bytes(&format!("uploading {}", file.display()), size, size);
        id_in(&answer)
    }

    /// Streams stored data to `path`. The file appears only when it is complete.
    pub(super) async fn download(&self, id: &str, path: &Path, notes: &mut Notes) -> Result<(), PlaneError> {
        let download = async |notes: &mut Notes| self.download_once(id, path, notes).await;
        retrying(notes, PlaneError::is_temporary, download).await
    }

    async fn download_once(&self, id: &str, path: &Path, notes: &mut Notes) -> Result<(), PlaneError> {
        let id: String = url::form_urlencoded::byte_serialize(id.as_bytes()).collect();
        let request = self.request(Method::GET, &self.data(&format!("/{id}?raw=true")));
        let request = request.body(full("")).expect("a valid request");
        let host = request.uri().host().unwrap_or_default().to_owned();
        let response = self.client.send(request, CALL_LIMIT).await?;
        let (head, mut body) = response.into_parts();
        if !head.status.is_success() {
            let text = read_capped(body, transport::JSON_BYTES_MAX, &host).await.unwrap_or_default();
            return Err(refused(&format!("artifact {id}"), head.status, &head.headers, transport::excerpt(&text)));
        }
        let total = head.headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let problem = |err: std::io::Error| PlaneError::file(path, &err);
        let folder = path.parent().unwrap_or(Path::new("."));
        tokio::fs::create_dir_all(folder).await.map_err(problem)?;
        let beside = new_file(folder).map_err(problem)?;
        let file = beside.reopen().map_err(problem)?;
        let mut file = BufWriter::with_capacity(CHUNK_BYTES, tokio::fs::File::from_std(file));
        let mut done = 0;
        while let Some(frame) = body.frame().await {
            let broke = |err: hyper::Error| TransportError::Truncated { host: host.clone(), reason: innermost(&err) };
            let Ok(bytes) = frame.map_err(broke)?.into_data() else { continue };
            file.write_all(&bytes).await.map_err(problem)?;
            done += bytes.len() as u64;
            notes.bytes(&format!("downloading {}", path.display()), done, total.unwrap_or(0).max(done));
        }
        file.flush().await.map_err(problem)?;
        drop(file);
        let kept = tokio::task::spawn_blocking({
            let path = path.to_owned();
            move || beside.persist(path).map(drop).map_err(|err| err.error)
        });
        kept.await.expect("storing a file does not panic").map_err(problem)
    }

    async fn limits(&self, notes: &mut Notes) -> Limits {
        let ask = async |_: &mut Notes| {
            let request = Request::get(format!("{}/api/v1/info", self.server)).header(CLIENT_ID, CLIENT);
            Ok(self.call(request, full(""), CALL_LIMIT, "the question about upload limits").await?.json::<Value>()?)
        };
        // A server that states no limits has the usual ones.
        let info = retrying(notes, PlaneError::is_temporary, ask).await.unwrap_or_default();
        let single_max = info["upload"]["request_max_bytes"].as_u64().filter(|most| *most > 0);
        // A request also contains the boundary and the headers of its part.
        let single_max = single_max.map_or(SINGLE_BYTES_MAX, |most| most.saturating_sub(4096).min(SINGLE_BYTES_MAX));
        Limits { single_max, multipart: info["upload"]["multipart"]["enabled"] == true }
    }

    fn data(&self, rest: &str) -> String {
        format!("{}/api/v1/domains/{}/data{rest}", self.server, self.domain)
    }

    fn request(&self, method: Method, url: &str) -> http::request::Builder {
        let mut token = header::HeaderValue::from_str(&format!("Bearer {}", self.token))
            .unwrap_or(header::HeaderValue::from_static("Bearer INVALID"));
        token.set_sensitive(true);
        let request = Request::builder().method(method).uri(url).header(header::AUTHORIZATION, token);
        request.header(header::ACCEPT, JSON).header(CLIENT_ID, CLIENT)
    }

    async fn call(
        &self,
        request: http::request::Builder,
        body: Body,
        limit: Duration,
        what: &str,
    ) -> Result<Answer, PlaneError> {
        let request = request.body(body).expect("a valid request");
        let answer = self.client.call(request, limit).await?;
        if answer.status.is_success() {
            Ok(answer)
        } else {
            Err(refused(what, answer.status, &answer.headers, answer.excerpt()))
        }
    }
}

/// The content type of all requests except data.
pub(super) const JSON: &str = "application/json";

/// The name of this client for the services.
pub(super) const CLIENT_ID: &str = "posemesh-client-id";
pub(super) const CLIENT: &str = "runner-host-submit";

/// Makes a call until it succeeds, fails in a way that `again` does not accept, or has failed for [`UNREACHABLE_MAX`].
pub(super) async fn retrying<T>(
    notes: &mut Notes,
    again: impl Fn(&PlaneError) -> bool,
    mut call: impl AsyncFnMut(&mut Notes) -> Result<T, PlaneError>,
) -> Result<T, PlaneError> {
    let (mut since, mut pause) = (None, RETRY_PAUSE_MIN);
    loop {
        let err = match call(notes).await {
            Ok(done) => return Ok(done),
            Err(err) => err,
        };
        let first = since.is_none();
        let since = *since.get_or_insert_with(Instant::now);
        let asked = match &err {
            PlaneError::Refused { retry_after, .. } => retry_after.unwrap_or_default(),
            _ => Duration::ZERO,
        };
        let wait = pause.mul_f64(rand::random_range(0.8..1.2)).max(asked);
        if !again(&err) || since.elapsed() + wait > UNREACHABLE_MAX {
            return Err(err);
        }
        if first {
            notes.line(&format!("{err}; trying again"));
        }
        tokio::time::sleep(wait).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}

struct Limits {
    single_max: u64,
    multipart: bool,
}

async fn dev_server(client: &Client, dev: &str) -> Result<DevServerInfo, TransportError> {
    let request = Request::get(format!("{dev}/dev/v1/world")).body(full("")).expect("a valid request");
    client.call(request, CALL_LIMIT).await?.json()
}

/// Limits the time in which a body is read.
pub(super) async fn in_time<T>(
    host: &str,
    read: impl Future<Output = Result<T, TransportError>>,
) -> Result<T, TransportError> {
    let late = |_| Err(TransportError::Timeout { host: host.to_owned(), limit: CALL_LIMIT });
    tokio::time::timeout(CALL_LIMIT, read).await.unwrap_or_else(late)
}

pub(super) fn not_json(host: String, bytes: usize, expected: &str) -> PlaneError {
    TransportError::NotJson { host, bytes, reason: expected.to_owned() }.into()
}

fn base(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}

pub(super) fn refused(what: &str, status: StatusCode, headers: &HeaderMap, excerpt: String) -> PlaneError {
    PlaneError::Refused { what: what.to_owned(), status: status.as_u16(), excerpt, retry_after: retry_after(headers) }
}

fn unreadable(file: &Path, err: &std::io::Error) -> PlaneError {
    PlaneError::File { what: format!("--input {}", file.display()), reason: err.to_string() }
}

fn id_in(data: &Value) -> Result<String, PlaneError> {
    let id = data["id"].as_str().map(ToOwned::to_owned);
    id.ok_or_else(|| refused("the upload", StatusCode::OK, &HeaderMap::new(), "no id".to_owned()))
}

/// `length` bytes of a file from `offset`, between two texts.
async fn file_body(file: &Path, offset: u64, length: u64, head: String, tail: String) -> Result<Body, PlaneError> {
    let mut opened = tokio::fs::File::open(file).await.map_err(|err| unreadable(file, &err))?;
    opened.seek(SeekFrom::Start(offset)).await.map_err(|err| unreadable(file, &err))?;
    let content = ReaderStream::with_capacity(opened.take(length), CHUNK_BYTES);
    let text = |text: String| futures_util::stream::iter((!text.is_empty()).then(|| Ok(Bytes::from(text))));
    let whole = text(head).chain(content).chain(text(tail));
    Ok(StreamBody::new(whole.map(|bytes| bytes.map(Frame::data))).boxed_unsync())
}

/// A unique name for an input, and its type from the extension.
fn name_of(file: &Path) -> (String, String) {
    let stem = plain(&file.file_stem().unwrap_or_default().to_string_lossy());
    let extension = plain(&file.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase());
    let data_type = match &*extension {
        "" => "binary".to_owned(),
        "json" | "ply" | "glb" | "obj" | "csv" | "mp4" => extension,
        "drc" => "ply_draco".to_owned(),
        other => format!("{other}_data"),
    };
    // Names are unique in a domain, but one file may be submitted twice.
    let unique = Uuid::new_v4().simple().to_string();
    let stem: String = stem.chars().take(64).collect();
    (format!("{stem}_{}", &unique[..12]), data_type)
}

/// A nameless file in its final folder, with the permissions of an ordinary new file. By default only the owner can
/// read a temporary file.
pub(super) fn new_file(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        file.permissions(std::fs::Permissions::from_mode(0o666));
    }
    file.prefix(".runner-host-").tempfile_in(folder)
}
