//! A proxy between a node and a dev server that gives bad answers. It forwards every request, except those that a
//! test tells it to answer. After [`FaultProxy::heal`] it forwards every request again.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Frame, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use runner_host::transport::{self, Client, JSON_BYTES_MAX};
use serde_json::Value;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use url::Url;

use super::{EVENT_LIMIT, TestServer, node::NodeSetup, within};

type Body = BoxBody<Bytes, std::io::Error>;
type Edit = Arc<dyn Fn(&mut Value) + Send + Sync>;

/// The answer that replaces the dev server's.
#[derive(Clone)]
pub(crate) enum Bad {
    /// 200 with an empty body.
    Empty,
    /// 200 with more JSON than a node reads.
    Oversize,
    /// 200 with a body that breaks off.
    Truncated,
    /// 200 with a body that is not JSON.
    Garbage,
    /// 200 with an HTML page.
    Html,
    /// Any status with any text.
    Status(u16, &'static str),
    /// This status with a `Retry-After` in seconds.
    Busy(u16, u64),
    /// Like [`Bad::Busy`], with a date of this service's clock.
    BusyUntil(u16, i64),
    /// This status with the address of a redirect.
    Redirect(u16, String),
    /// 200 with this JSON.
    Json(Value),
    /// 200 with the JSON that this function returns for each request.
    Make(Arc<dyn Fn() -> Value + Send + Sync>),
    /// The connection ends without an answer.
    Cut,
    /// The dev server's answer. The connection ends after this many bytes of its body.
    CutAfter(usize),
    /// The dev server's answer. No byte follows after this many bytes of its body.
    SilentAfter(usize),
    /// No answer while the service is running.
    Hang,
    /// The dev server's answer, changed.
    Edit(Edit),
    /// The dev server's answer without this many bytes at its end.
    Shortened(usize),
    /// The dev server's answer, sent after this token is cancelled.
    Held(CancellationToken),
    /// This status. The body contains the whole request, including headers.
    Echo(u16),
}

impl Bad {
    pub(crate) fn edit(edit: impl Fn(&mut Value) + Send + Sync + 'static) -> Self {
        Self::Edit(Arc::new(edit))
    }

    pub(crate) fn make(make: impl Fn() -> Value + Send + Sync + 'static) -> Self {
        Self::Make(Arc::new(make))
    }

    /// An answer that is held back until the token is cancelled.
    pub(crate) fn gate() -> (CancellationToken, Self) {
        let gate = CancellationToken::new();
        (gate.clone(), Self::Held(gate))
    }

    /// Every kind of unusable answer, with the text that a node should log about it.
    pub(crate) fn answers() -> Vec<(Self, &'static str)> {
        vec![
            (Self::Empty, "the body is empty"),
            (Self::Oversize, "is larger than 2097152 bytes"),
            (Self::Truncated, "broke off"),
            (Self::Garbage, "malformed at line 1 column"),
            (Self::Html, "it looks like HTML"),
        ]
    }
}

struct Rule {
    pattern: String,
    left: usize,
    bad: Bad,
}

struct Inner {
    dev_server: String,
    own: String,
    client: Client,
    rules: Mutex<Vec<Rule>>,
    clock: Mutex<SignedDuration>,
    undated: AtomicBool,
    seen: watch::Sender<Vec<String>>,
    heads: Mutex<Vec<(String, HeaderMap)>>,
    connections: watch::Sender<usize>,
}

/// See the module documentation.
pub(crate) struct FaultProxy {
    inner: Arc<Inner>,
    address: SocketAddr,
    _stop: tokio_util::sync::DropGuard,
    _server: AbortOnDropHandle<()>,
}

impl FaultProxy {
    /// Starts a proxy before the dev server of `test_server`.
    pub(crate) async fn before(test_server: &TestServer) -> Self {
        Self::known_as(test_server, None).await
    }

    /// Like [`FaultProxy::before`], for nodes that reach it under another URL.
    pub(crate) async fn known_as(test_server: &TestServer, url: Option<&str>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let inner = Arc::new(Inner {
            dev_server: format!("http://{}", test_server.dev_server.address()),
            own: url.map_or_else(|| format!("http://{address}"), str::to_owned),
            client: Client::new(transport::Config::default()),
            rules: Mutex::default(),
            clock: Mutex::default(),
            undated: AtomicBool::new(false),
            seen: watch::Sender::new(Vec::new()),
            heads: Mutex::default(),
            connections: watch::Sender::new(0),
        });
        let stop = CancellationToken::new();
        let server = AbortOnDropHandle::new(tokio::spawn(serve(Arc::clone(&inner), listener, stop.clone())));
        Self { inner, address, _stop: stop.drop_guard(), _server: server }
    }

    /// A node that uses this proxy for every service.
    pub(crate) fn node(&self, plugins: &[PathBuf]) -> NodeSetup {
        let url = |path: &str| Url::parse(&format!("{}{path}", self.inner.own)).expect("a URL");
        NodeSetup::new(&url("/"), &url("/v1"), plugins)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers the next `times` requests that match `pattern` with `bad`. A `*` matches one segment of the path. The
    /// text after a `?` must be in the query.
    pub(crate) fn answer(&self, pattern: &str, times: usize, bad: Bad) {
        self.inner.rules().push(Rule { pattern: pattern.to_owned(), left: times, bad });
    }

    /// Sets the offset of its clock from now on. It affects the date of each answer and every time in it.
    pub(crate) fn set_clock(&self, ahead: SignedDuration) {
        *self.inner.clock() = ahead;
    }

    /// Answers have no `Date` from now on.
    pub(crate) fn send_no_date(&self) {
        self.inner.undated.store(true, Ordering::Relaxed);
    }

    /// Forwards every request again.
    pub(crate) fn heal(&self) {
        self.inner.rules().clear();
    }

    /// The number of requests so far that match `pattern`.
    pub(crate) fn count(&self, pattern: &str) -> usize {
        self.inner.seen.borrow().iter().filter(|seen| fits(pattern, seen)).count()
    }

    /// The value of this header in every request so far to `path` or below, with the request.
    pub(crate) fn headers(&self, path: &str, header: &str) -> Vec<(String, Option<String>)> {
        let heads = self.inner.heads.lock().expect("nobody panics with the heads");
        let value = |head: &HeaderMap| head.get(header).map(|value| String::from_utf8_lossy(value.as_bytes()).into());
        let below = heads.iter().filter(|(name, _)| name.split(' ').nth(1).is_some_and(|url| url.starts_with(path)));
        below.map(|(name, head)| (name.clone(), value(head))).collect()
    }

    /// The number of connections opened so far.
    pub(crate) fn connections(&self) -> usize {
        *self.inner.connections.borrow()
    }

    /// Waits until this many requests match `pattern`.
    pub(crate) async fn seen(&self, pattern: &str, times: usize) {
        let mut seen = self.inner.seen.subscribe();
        let enough = seen.wait_for(|seen| seen.iter().filter(|seen| fits(pattern, seen)).count() >= times);
        within(&format!("{times} of {pattern}"), || format!("{:#?}", self.inner.seen.borrow()), async {
            enough.await.expect("the service holds the sender");
        })
        .await;
    }
}

impl Inner {
    fn rules(&self) -> MutexGuard<'_, Vec<Rule>> {
        self.rules.lock().expect("nobody panics with the rules")
    }

    fn clock(&self) -> MutexGuard<'_, SignedDuration> {
        self.clock.lock().expect("nobody panics with the clock")
    }

    /// The rule for this request, with its count reduced. A rule that edits an answer is applied when the answer has
    /// arrived. A poll may already be in progress at the dev server when a test sets such a rule for leases.
    fn rule(&self, request: &str, answered: bool) -> Option<Bad> {
        let mut rules = self.rules();
        let rule = rules.iter_mut().find(|rule| rule.left > 0 && fits(&rule.pattern, request))?;
        (matches!(rule.bad, Bad::Edit(_) | Bad::Shortened(_)) == answered).then(|| {
            rule.left -= 1;
            rule.bad.clone()
        })
    }

    async fn pass_on(&self, request: Request<Incoming>) -> (StatusCode, HeaderMap, Bytes) {
        let (head, body) = request.into_parts();
        let Ok(body) = body.collect().await else {
            return (StatusCode::BAD_REQUEST, HeaderMap::new(), Bytes::new());
        };
        let mut passed = Request::builder().method(head.method).uri(format!("{}{}", self.dev_server, head.uri));
        for (name, value) in &head.headers {
            if ![header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING].contains(name) {
                passed = passed.header(name, value);
            }
        }
        let passed = passed.body(transport::full(body.to_bytes())).expect("a request that was one before");
        let answer = self.client.send(passed, EVENT_LIMIT).await.expect("the dev server answers");
        let (head, body) = answer.into_parts();
        (head.status, head.headers, body.collect().await.expect("the dev server's answers are whole").to_bytes())
    }

    async fn dated(&self, request: Request<Incoming>) -> Result<Response<Body>, std::io::Error> {
        let mut response = self.answer(request).await?;
        if self.undated.load(Ordering::Relaxed) {
            response.headers_mut().remove(header::DATE);
        } else {
            response.headers_mut().insert(header::DATE, self.date(0));
        }
        Ok(response)
    }

    /// The time of this service's clock in this many seconds.
    fn date(&self, seconds: i64) -> HeaderValue {
        let at = Timestamp::now() + *self.clock() + SignedDuration::from_secs(seconds);
        let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&at).expect("a date");
        date.parse().expect("a header")
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, std::io::Error> {
        let name = format!("{} {}", request.method(), request.uri());
        let rule = self.rule(&name, false);
        self.heads.lock().expect("nobody panics with the heads").push((name.clone(), request.headers().clone()));
        self.seen.send_modify(|seen| seen.push(name.clone()));
        let json = "application/json";
        let answer = |status: u16, kind: &str, body: Bytes| {
            let answer = Response::builder().status(status).header(header::CONTENT_TYPE, kind);
            answer.body(whole(body)).expect("a response")
        };
        // An answer to an unread request closes the connection while the sender still writes.
        if matches!(rule, Some(Bad::Cut)) {
            return Err(std::io::Error::other("cut"));
        }
        Ok(match rule {
            Some(Bad::CutAfter(bytes)) => {
                let (status, headers, body) = self.pass_on(request).await;
                let mut cut = Response::new(broken(body.slice(..bytes.min(body.len()))));
                *cut.status_mut() = status;
                *cut.headers_mut() = headers;
                cut
            }
            Some(Bad::SilentAfter(bytes)) => {
                let (status, headers, body) = self.pass_on(request).await;
                let beginning = Frame::data(body.slice(..bytes.min(body.len())));
                let pieces = futures_util::stream::iter([Ok(beginning)]);
                let pieces = futures_util::StreamExt::chain(pieces, futures_util::stream::pending());
                let mut silent = Response::new(BodyExt::boxed(StreamBody::new(pieces)));
                *silent.status_mut() = status;
                *silent.headers_mut() = headers;
                silent
            }
            None | Some(Bad::Held(_)) => {
                let (status, mut headers, mut body) = self.pass_on(request).await;
                if let Some(Bad::Held(gate)) = &rule {
                    gate.cancelled().await;
                }
                let plane = name.contains(" /v1/");
                if let (Ok(mut value), ahead) = (serde_json::from_slice::<Value>(&body), *self.clock())
                    && !ahead.is_zero()
                {
                    shift(&mut value, ahead);
                    body = value.to_string().into();
                }
                if let (Ok(mut value), true) = (serde_json::from_slice::<Value>(&body), plane) {
                    // All further calls must come here too.
                    if value["domain_server_url"] == self.dev_server.as_str() {
                        value["domain_server_url"] = self.own.as_str().into();
                    }
                    body = value.to_string().into();
                }
                let edit = if rule.is_none() { self.rule(&name, true) } else { None };
                match (edit, serde_json::from_slice::<Value>(&body)) {
                    (Some(Bad::Edit(edit)), Ok(mut value)) => {
                        edit(&mut value);
                        body = value.to_string().into();
                    }
                    (Some(Bad::Shortened(bytes)), _) => body.truncate(body.len().saturating_sub(bytes)),
                    _ => {}
                }
                // The body may have changed, and is sent whole.
                headers.remove(header::CONTENT_LENGTH);
                headers.remove(header::TRANSFER_ENCODING);
                let mut passed_on = Response::new(whole(body));
                *passed_on.status_mut() = status;
                *passed_on.headers_mut() = headers;
                passed_on
            }
            Some(Bad::Echo(status)) => {
                let (head, body) = request.into_parts();
                let headers = head
                    .headers
                    .iter()
                    .map(|(name, value)| format!("{name}={:?} ", value.as_bytes().escape_ascii().to_string()));
                let mut echo = headers.collect::<String>().into_bytes();
                echo.extend(body.collect().await.map(|body| body.to_bytes()).unwrap_or_default());
                answer(status, "text/plain", echo.into())
            }
            Some(bad) => {
                let _ = request.into_body().collect().await;
                match bad {
                    Bad::Empty => answer(200, json, Bytes::new()),
                    Bad::Oversize => answer(200, json, format!("\"{}\"", "x".repeat(JSON_BYTES_MAX)).into()),
                    Bad::Garbage => answer(200, json, Bytes::from_static(b"top-secret, not JSON")),
                    Bad::Html => answer(200, "text/html", Bytes::from_static(b"<html><body>Sign in</body></html>")),
                    Bad::Status(status, text) => answer(status, "text/plain", Bytes::from_static(text.as_bytes())),
                    Bad::Busy(status, seconds) => Response::builder()
                        .status(status)
                        .header(header::RETRY_AFTER, seconds)
                        .body(whole(Bytes::new()))
                        .expect("a response"),
                    Bad::BusyUntil(status, seconds) => Response::builder()
                        .status(status)
                        .header(header::RETRY_AFTER, self.date(seconds))
                        .body(whole(Bytes::new()))
                        .expect("a response"),
                    Bad::Redirect(status, location) => Response::builder()
                        .status(status)
                        .header(header::LOCATION, location)
                        .body(whole(Bytes::new()))
                        .expect("a response"),
                    Bad::Json(value) => answer(200, json, value.to_string().into()),
                    Bad::Make(make) => answer(200, json, make().to_string().into()),
                    Bad::Truncated => Response::builder()
                        .header(header::CONTENT_TYPE, json)
                        .header(header::CONTENT_LENGTH, 1000)
                        .body(broken(Bytes::from_static(b"{\"access_token\":\"top-secr")))
                        .expect("a response"),
                    Bad::Hang => std::future::pending().await,
                    Bad::Cut | Bad::CutAfter(_) | Bad::SilentAfter(_) | Bad::Held(_) | Bad::Echo(_) => {
                        unreachable!("answered above")
                    }
                    Bad::Edit(_) | Bad::Shortened(_) => unreachable!("left for the answer"),
                }
            }
        })
    }
}

/// Shifts every expiry time.
fn shift(value: &mut Value, ahead: SignedDuration) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let time = value.as_str().and_then(|text| text.parse::<Timestamp>().ok());
                match time.filter(|_| key.ends_with("expires_at")) {
                    Some(time) => *value = (time + ahead).to_string().into(),
                    None => shift(value, ahead),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| shift(value, ahead)),
        _ => {}
    }
}

fn whole(body: Bytes) -> Body {
    Full::new(body).map_err(|never: Infallible| match never {}).boxed()
}

/// A body that breaks off after `beginning`.
fn broken(beginning: Bytes) -> Body {
    let beginning = Frame::data(beginning);
    let pieces = futures_util::stream::unfold(Some(beginning), |frame| async move {
        match frame {
            Some(frame) => Some((Ok(frame), None)),
            None => {
                // The first bytes must be sent before the connection breaks.
                tokio::task::yield_now().await;
                Some((Err(std::io::Error::other("cut")), None))
            }
        }
    });
    BodyExt::boxed(StreamBody::new(pieces))
}

async fn serve(inner: Arc<Inner>, listener: TcpListener, stop: CancellationToken) {
    loop {
        let Ok((socket, _)) = listener.accept().await else { return };
        let _ = socket.set_nodelay(true);
        inner.connections.send_modify(|count| *count += 1);
        let (inner, stopped) = (Arc::clone(&inner), stop.clone().cancelled_owned());
        tokio::spawn(async move {
            let service = service_fn(|request| inner.dated(request));
            // `dated` decides whether an answer has a date.
            let mut http = hyper::server::conn::http1::Builder::new();
            let connection = http.auto_date_header(false).serve_connection(TokioIo::new(socket), service);
            tokio::select! {
                // The test decides how a connection ends, so errors are ignored.
                _ = connection => {}
                () = stopped => {}
            }
        });
    }
}

/// Whether `request`, such as `GET /v1/tasks?x=1`, matches `pattern`.
fn fits(pattern: &str, request: &str) -> bool {
    let (wanted, needle) = pattern.split_once('?').unwrap_or((pattern, ""));
    let (path, query) = request.split_once('?').unwrap_or((request, ""));
    let mut wanted = wanted.split('/');
    let mut path = path.split('/');
    loop {
        match (wanted.next(), path.next()) {
            (None, None) => return query.contains(needle),
            (Some(wanted), Some(found)) if wanted == "*" || wanted == found => {}
            _ => return false,
        }
    }
}
