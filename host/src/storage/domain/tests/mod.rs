//! Tests of the ports against a small domain server over loopback. The server checks the rules of the wire. A test
//! can make it misbehave once at a chosen request.

mod downloads;
mod files;
mod names;
mod queries;
mod refusals;
mod repeats;
mod resumes;
mod slow;
mod streams;
mod uploads;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use http::{Method, StatusCode, header, request::Parts};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle};
use url::Url;
use uuid::Uuid;

use super::{Config, DomainPorts};
use crate::{
    model::{
        AnnouncedData, ArtifactSpec, Capability, Coordinates, DataLocation, HeldLease, HeldLeaseWriter, InputStream,
        Lease, PortError, PortErrorKind, Ports, Setup, TaskId, Token,
    },
    transport::{self, Client},
};

const TASK: Uuid = Uuid::from_u128(0x11);
const DOMAIN: Uuid = Uuid::from_u128(0x22);
const MIB: usize = 1024 * 1024;

/// One stored object.
#[derive(Clone, Debug, Default, PartialEq)]
struct Item {
    name: String,
    data_type: String,
    bytes: Vec<u8>,
    /// Counts changes. The time of the last change derives from it.
    version: u32,
}

/// What the server does with one request instead of the normal answer, or before it.
enum Fault {
    /// Answers after reading the request.
    Answer(Response),
    /// Answers without reading the request, which ends the connection.
    Unread(Box<dyn FnOnce() -> Response + Send>),
    /// Never answers.
    Hang,
    /// Reads the body with at most this many bytes per second, then answers normally.
    Slow(u32),
    /// Calls a function first, then answers normally.
    First(Box<dyn FnOnce() + Send>),
    /// Does the request, and sends another answer.
    Lost(Response),
}

/// How content by id is served.
#[derive(Clone, Copy)]
struct Raw {
    served: bool,
    ranges: bool,
    etags: bool,
}

struct Store {
    items: BTreeMap<String, Item>,
    uploads: BTreeMap<String, (Value, BTreeMap<u32, Vec<u8>>)>,
    /// The kind of each request: list, download, raw, raw from <byte>, meta, info, initiate, part, complete, abort.
    log: Vec<String>,
    tokens: Vec<String>,
    faults: VecDeque<(&'static str, Fault)>,
    raw: Raw,
    part_size: i64,
    info: Value,
    next_id: u32,
}

impl Store {
    fn put(&mut self, id: &str, mut item: Item) -> Value {
        item.version = self.items.get(id).map_or(0, |old| old.version + 1);
        let stored = metadata(id, &item);
        self.items.insert(id.to_owned(), item);
        stored
    }
}

#[derive(Clone)]
struct Server {
    store: Arc<Mutex<Store>>,
    /// Increases with each logged request.
    calls: tokio::sync::watch::Sender<usize>,
}

impl Server {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("the store is never poisoned in a transient test")
    }
}

struct Fixture {
    server: Server,
    url: Url,
    ports: DomainPorts,
    held: HeldLease,
    writer: Arc<HeldLeaseWriter>,
    dir: TempDir,
    serving: JoinHandle<()>,
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn lease(inputs: &[&str]) -> Lease {
    Lease {
        address: TaskId::from(TASK).into(),
        job: None,
        capability: Capability::parse("/test/storage/v1").expect("a capability"),
        expires_at: None,
        hard_deadline: None,
        time_limit: None,
        tokens_max: None,
        cancelled: false,
        data: AnnouncedData::at_server(None, Some(DOMAIN)),
        token: Some(Token::new("t1")),
        token_expires_at: None,
        inputs: inputs.iter().map(ToString::to_string).collect(),
        outputs_prefix: Some("/out/".to_owned()),
        traceparent: None,
        attempt: None,
        document: serde_json::value::RawValue::NULL.to_owned(),
        hold: None,
    }
}

async fn fixture() -> Fixture {
    fixture_with(|_| {}).await
}

async fn fixture_with(change: impl FnOnce(&mut Config)) -> Fixture {
    let store = Store {
        items: BTreeMap::new(),
        uploads: BTreeMap::new(),
        log: Vec::new(),
        tokens: vec!["t1".to_owned()],
        faults: VecDeque::new(),
        raw: Raw { served: true, ranges: true, etags: true },
        part_size: MIB as i64,
        info: json!({"upload": {"request_max_bytes": 8 * MIB, "multipart": {"enabled": true}}}),
        next_id: 1,
    };
    let server = Server { store: Arc::new(Mutex::new(store)), calls: tokio::sync::watch::Sender::new(0) };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let url = format!("http://{}/base//", listener.local_addr().expect("bound"));
    let url = Url::parse(&url).expect("a URL");
    let router = Router::new().fallback(handle).with_state(server.clone());
    let serving = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
    let mut config = Config::new("node/1");
    config.stall = Duration::from_secs(30);
    config.request_timeout = Duration::from_secs(30);
    config.token_wait = Duration::from_millis(20);
    config.part_pause = Duration::from_millis(1);
    config.retry_limit = Duration::ZERO;
    change(&mut config);
    let (held, writer) = HeldLease::new(lease(&[]), Setup::Pending);
    writer.publish(|now| {
        now.setup = Setup::Ready(Ok(DataLocation::DomainServer(Coordinates { server: url.clone(), domain: DOMAIN })))
    });
    let dir = tempfile::tempdir().expect("a temporary directory");
    let client = Client::new(transport::Config::default());
    let ports = DomainPorts::new(client, held.clone(), dir.path().to_owned(), Arc::new(config));
    Fixture { server, url, ports, held, writer: Arc::new(writer), dir, serving }
}

impl Fixture {
    fn item(&self, id: &str, name: &str, data_type: &str, bytes: impl Into<Vec<u8>>) {
        let item = Item { name: name.into(), data_type: data_type.into(), bytes: bytes.into(), version: 0 };
        self.server.store().items.insert(id.to_owned(), item);
    }

    fn stored(&self, id: &str) -> Item {
        self.server.store().items.get(id).cloned().unwrap_or_default()
    }

    /// The ports of another attempt of the same task, with an empty record.
    fn another_attempt(&self) -> DomainPorts {
        let config = Arc::new(Config::new("node/1"));
        let client = Client::new(transport::Config::default());
        DomainPorts::new(client, self.held.clone(), self.dir.path().to_owned(), config)
    }

    /// Applies `fault` to the next request whose kind begins with `at`.
    fn fault(&self, at: &'static str, fault: Fault) {
        self.server.store().faults.push_back((at, fault));
    }

    fn answer(&self, at: &'static str, status: u16, kind: &'static str, body: impl Into<Body>) {
        self.fault(at, Fault::Answer(reply(status, kind, body)));
    }

    fn log(&self) -> Vec<String> {
        self.server.store().log.clone()
    }

    fn count(&self, what: &str) -> usize {
        self.log().iter().filter(|entry| entry.as_str() == what).count()
    }

    /// Waits until a request of this kind has arrived.
    async fn until(&self, what: &str) {
        let mut calls = self.server.calls.subscribe();
        calls.wait_for(|_| self.count(what) > 0).await.expect("the server runs");
    }

    fn file(&self, bytes: &[u8]) -> std::path::PathBuf {
        let path = self.dir.path().join(format!("source-{}", Uuid::new_v4()));
        std::fs::write(&path, bytes).expect("written");
        path
    }

    async fn put(&self, path: &str, bytes: &[u8]) -> Result<Option<String>, PortError> {
        self.ports.put_file(spec(path), &self.file(bytes)).await
    }
}

fn spec(path: &str) -> ArtifactSpec {
    ArtifactSpec { path: path.to_owned(), ..ArtifactSpec::default() }
}

/// Bytes whose blocks all differ.
fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|n| ((n / 251) ^ (n * 7)) as u8).collect()
}

fn reply(status: u16, kind: &'static str, body: impl Into<Body>) -> Response {
    let builder = Response::builder().status(status).header(header::CONTENT_TYPE, kind);
    builder.body(body.into()).expect("a response")
}

async fn drain(stream: &mut Box<dyn InputStream>) -> Result<Vec<u8>, PortError> {
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await? {
        assert!(!piece.is_empty());
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

fn metadata(id: &str, item: &Item) -> Value {
    json!({"id": id, "domain_id": DOMAIN, "name": item.name, "data_type": item.data_type, "size": item.bytes.len(),
        "created_at": "2025-06-01T08:00:00Z", "updated_at": changed(item.version), "of": "newer servers"})
}

fn changed(version: u32) -> String {
    format!("2025-06-01T08:00:{version:02}Z")
}

/// The body of the answer for these items.
fn multipart(boundary: &str, items: &[(String, Item)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (id, Item { name, data_type, bytes, version }) in items {
        body.extend_from_slice(
            format!(
                "--{boundary}\r\nContent-Type: application/octet-stream\r\nContent-Disposition: form-data; \
                 name=\"{name}\"; data-type=\"{data_type}\"; id=\"{id}\"; domain-id=\"{DOMAIN}\"; size=\"{}\"; updated-at=\"{}\"\r\n\r\n",
                bytes.len(),
                changed(*version)
            )
            .as_bytes(),
        );
        body.extend_from_slice(bytes);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
    body
}

async fn handle(State(server): State<Server>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let query: BTreeMap<String, String> =
        url::form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let data = format!("/base/api/v1/domains/{DOMAIN}/data");
    let path = head.uri.path();
    let accept = head.headers.get(header::ACCEPT).map(|value| value.to_str().expect("text").to_owned());
    let what = match (&head.method, path) {
        (&Method::GET, "/base/api/v1/info") => "info",
        (&Method::GET, path) if path == data && accept.as_deref() == Some("application/json") => "list",
        (&Method::GET, path) if path == data => "download",
        (&Method::GET, path) if path.starts_with(&format!("{data}/")) => match query.contains_key("raw") {
            true => "raw",
            false => "meta",
        },
        (&Method::POST, path) if path == data => "create",
        (&Method::PUT, path) if path == data => "update",
        (method, path) if path == format!("{data}/multipart") => match *method {
            Method::POST if head.uri.query() == Some("uploads") => "initiate",
            Method::PUT => "part",
            Method::POST => "complete",
            Method::DELETE => "abort",
            _ => "unknown",
        },
        _ => "unknown",
    };
    let fault = {
        let mut store = server.store();
        let range = head.headers.get(header::RANGE).map(|range| range.to_str().expect("text"));
        store.log.push(match range {
            Some(range) => format!("{what} from {}", range.trim_start_matches("bytes=").trim_end_matches('-')),
            None => what.to_owned(),
        });
        let found = store.faults.iter().position(|(at, _)| what.starts_with(at));
        found.and_then(|at| store.faults.remove(at)).map(|(_, fault)| fault)
    };
    server.calls.send_modify(|calls| *calls += 1);
    let mut lost = None;
    let mut body = body;
    match fault {
        Some(Fault::Answer(response)) => {
            let _ = axum::body::to_bytes(body, usize::MAX).await;
            return response;
        }
        Some(Fault::Unread(answer)) => return answer(),
        Some(Fault::Hang) => return std::future::pending().await,
        Some(Fault::Slow(bytes_per_second)) => body = slow::read(body, bytes_per_second).await,
        Some(Fault::First(act)) => act(),
        Some(Fault::Lost(answer)) => lost = Some(answer),
        None => {}
    }
    let answer = work(&server, what, head, body, &query).await;
    lost.unwrap_or(answer)
}

async fn work(server: &Server, what: &str, head: Parts, body: Body, query: &BTreeMap<String, String>) -> Response {
    let length: Option<usize> =
        head.headers.get(header::CONTENT_LENGTH).map(|v| v.to_str().expect("text").parse().expect("a number"));
    let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else { return reply(400, "text/plain", "cut off") };
    if !matches!(head.method, Method::GET | Method::DELETE) && length != Some(body.len()) {
        return reply(411, "text/plain", "no length");
    }
    if head.headers.get("posemesh-client-id").is_none_or(|id| id != "node/1") {
        return reply(400, "text/plain", "no client id");
    }
    let bearer = head.headers.get(header::AUTHORIZATION).map(|value| value.to_str().expect("text").to_owned());
    let known =
        |store: &Store| bearer.as_ref().is_some_and(|b| store.tokens.iter().any(|t| *b == format!("Bearer {t}")));
    match what {
        "info" if bearer.is_some() => return reply(400, "text/plain", "an unexpected bearer"),
        "info" => return axum::Json(server.store().info.clone()).into_response(),
        _ if !known(&server.store()) => {
            return reply(401, "text/plain", format!("{} is not accepted", bearer.unwrap_or_default()));
        }
        _ => {}
    }
    let kind = head.headers.get(header::CONTENT_TYPE).map(|value| value.to_str().expect("text").to_owned());
    let mut store = server.store();
    let store = &mut *store;
    match what {
        "list" | "download" => {
            let ids: Vec<&str> = query.get("ids").map(|ids| ids.split(',').collect()).unwrap_or_default();
            let part = |filter: &str, text: &str| query.get(filter).is_none_or(|filter| text.contains(filter));
            let found = store.items.iter().filter(|(id, item)| {
                (ids.is_empty() || ids.contains(&id.as_str()))
                    && part("name", &item.name)
                    && part("data_type", &item.data_type)
            });
            let found: Vec<(String, Item)> = found.map(|(id, item)| (id.clone(), item.clone())).collect();
            match what {
                "list" => {
                    axum::Json(json!({"data": found.iter().map(|(id, item)| metadata(id, item)).collect::<Vec<_>>()}))
                        .into_response()
                }
                _ if found.is_empty() => reply(404, "text/plain", "nothing"),
                _ => reply(200, "multipart/form-data; boundary=q7", multipart("q7", &found)),
            }
        }
        "raw" | "meta" => {
            let id = head.uri.path().rsplit('/').next().expect("a path has a last segment");
            let Some(item) = store.items.get(id).filter(|_| store.raw.served) else {
                return reply(404, "text/plain", "no such path");
            };
            if what == "meta" {
                return axum::Json(metadata(id, item)).into_response();
            }
            let total = item.bytes.len();
            let etag = format!("\"{id}-{}\"", item.version);
            let number = |text: &str| text.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok();
            let from =
                head.headers.get(header::RANGE).map(|range| number(range.to_str().expect("text")).expect("a range"));
            let held = head.headers.get(header::IF_RANGE).is_none_or(|wanted| wanted == etag.as_str());
            let mut answer = Response::builder();
            if store.raw.etags {
                answer = answer.header(header::ETAG, etag);
            }
            let from = from.filter(|from| store.raw.ranges && held && *from < total);
            if let Some(from) = from {
                answer =
                    answer.status(206).header(header::CONTENT_RANGE, format!("bytes {from}-{}/{total}", total - 1));
            }
            answer.body(item.bytes[from.unwrap_or(0)..].to_vec().into()).expect("a response")
        }
        "create" | "update" => {
            let boundary = kind.expect("a type").split_once("boundary=").expect("a boundary").1.to_owned();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let at = body.windows(4).position(|window| window == b"\r\n\r\n").expect("a header block");
            let given = text(&body[..at]);
            let payload = body[at + 4..].strip_suffix(format!("\r\n--{boundary}--\r\n").as_bytes()).expect("an end");
            let field = |name: &str| {
                given
                    .split_once(&format!(" {name}=\""))
                    .and_then(|(_, rest)| rest.split_once('"'))
                    .map(|(value, _)| value.to_owned())
            };
            let (id, mut item) = match what {
                "update" => {
                    let id = field("id").expect("an id");
                    let Some(item) = store.items.get(&id).cloned() else {
                        return reply(404, "text/plain", "no such id");
                    };
                    (id, item)
                }
                _ => {
                    let item = Item {
                        name: field("name").expect("a name"),
                        data_type: field("data-type").expect("a type"),
                        bytes: Vec::new(),
                        version: 0,
                    };
                    let same = |known: &Item| known.name == item.name && known.data_type == item.data_type;
                    if store.items.values().any(same) {
                        return reply(409, "text/plain", "exists");
                    }
                    store.next_id += 1;
                    (format!("d-{}", store.next_id), item)
                }
            };
            item.bytes = payload.to_vec();
            axum::Json(json!({"data": [store.put(&id, item)]})).into_response()
        }
        "initiate" => {
            store.next_id += 1;
            let id = format!("u {}", store.next_id);
            store.uploads.insert(id.clone(), (serde_json::from_slice(&body).expect("JSON"), BTreeMap::new()));
            // With the additional fields of newer servers.
            let more = json!({"upload_id": id, "part_size": store.part_size, "data_id": "d", "expires_at": "later"});
            axum::Json(more).into_response()
        }
        "part" => {
            let number: u32 = query["partNumber"].parse().expect("a number");
            let Some((_, parts)) = store.uploads.get_mut(&query["uploadId"]) else {
                return reply(404, "text/plain", "");
            };
            parts.insert(number, body.to_vec());
            axum::Json(json!({"etag": format!("e{number}-{}", body.len())})).into_response()
        }
        "complete" => {
            let Some((asked, parts)) = store.uploads.remove(&query["uploadId"]) else {
                return reply(404, "text/plain", "");
            };
            let listed: Value = serde_json::from_slice(&body).expect("JSON");
            let expected: Vec<Value> = parts
                .iter()
                .map(|(number, bytes)| json!({"part_number": number, "etag": format!("e{number}-{}", bytes.len())}))
                .collect();
            let last = parts.len();
            let even = parts.values().take(last - 1).all(|part| part.len() as i64 == store.part_size);
            let numbered = parts.keys().copied().eq(1..=last as u32);
            if listed != json!({"parts": expected}) || !even || !numbered {
                return reply(400, "text/plain", "bad parts");
            }
            store.next_id += 1;
            let id = asked["existing_id"].as_str().map_or_else(|| format!("d-{}", store.next_id), str::to_owned);
            let bytes: Vec<u8> = parts.into_values().flatten().collect();
            if asked["size"].as_u64().is_some_and(|size| size != bytes.len() as u64) {
                return reply(400, "text/plain", "another size was announced");
            }
            let text = |field: &str| asked[field].as_str().expect("text").to_owned();
            let item = Item { name: text("name"), data_type: text("data_type"), bytes, version: 0 };
            axum::Json(store.put(&id, item)).into_response()
        }
        "abort" => {
            store.uploads.remove(&query["uploadId"]);
            StatusCode::NO_CONTENT.into_response()
        }
        _ => reply(404, "text/plain", "no such path"),
    }
}

#[track_caller]
fn refused<T>(result: Result<T, PortError>, kind: PortErrorKind, text: &str) {
    let Err(err) = result else { panic!("expected {kind:?}") };
    assert_eq!(err.kind, kind, "{err}");
    assert!(err.message.contains(text), "{err} does not say {text}");
    assert!(!err.message.contains('\n'), "{err}");
}
