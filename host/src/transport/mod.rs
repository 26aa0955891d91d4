//! The one HTTP client of the node: pooled connections, no redirects.
//!
//! Other modules build requests and read answers. This module decides which URLs are allowed ([`Client::check`]), and
//! limits the time and the size of answers. It knows no path, no token and no wire format. `connect` opens connections,
//! with the certificate authorities of `tls` or `peer_tls` and the proxies of `proxy`.

mod clock;
mod connect;
#[cfg(feature = "grpc")]
mod http2;
pub(crate) mod multipart;
mod peer_tls;
mod pool;
mod proxy;
mod retry_after;
#[cfg(test)]
pub(crate) mod testing;
mod tls;
mod tls_error;

use std::{fmt, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, response, uri::Authority};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::Semaphore;
use url::Url;

#[cfg(feature = "grpc")]
pub use http2::{Http2, Http2Limits};
pub use peer_tls::{Identity, PeerTls, PeerTlsError};
pub use proxy::Proxies;
pub use retry_after::{RETRY_AFTER_MAX, retry_after};
pub use tls::Roots;
pub use tls_error::TlsError;

use crate::model::BootInstant;
use clock::{Clocks, Reading};
use pool::Pool;

/// Largest JSON answer read, in bytes.
pub const JSON_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Length of an error answer in error texts, in bytes.
pub const EXCERPT_BYTES_MAX: usize = 512;

/// How long a connection stays open without a request.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// A shorter word is not treated as a token.
const TOKEN_BYTES_MIN: usize = 12;

/// A request body of any kind.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A body that is already in memory (or empty).
#[must_use]
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// The limits and routes of the client.
#[derive(Clone, Debug)]
pub struct Config {
    /// Allow `http://` to hosts other than loopback.
    pub allow_insecure_http: bool,
    /// The time limit to open a connection, with proxy and TLS.
    pub connect_timeout: Duration,
    /// The trusted certificate authorities.
    pub roots: Roots,
    /// TLS with a special peer. A client with it calls this peer only.
    pub peer: Option<PeerTls>,
    /// Which requests go through a proxy.
    pub proxies: Proxies,
    /// Most concurrent requests, and so connections. Further requests wait. At least 1.
    pub at_once: usize,
    /// Most idle connections. Each one uses a file descriptor.
    pub idle_at_most: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            allow_insecure_http: false,
            connect_timeout: Duration::from_secs(10),
            roots: Roots::default(),
            peer: None,
            proxies: Proxies::default(),
            at_once: Semaphore::MAX_PERMITS,
            idle_at_most: usize::MAX,
        }
    }
}

/// Why a call has no usable answer. Texts name the host, never a query, a header or a body.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The URL is not allowed.
    #[error("{url}: plain http is allowed to loopback only; use https, or set ALLOW_INSECURE_HTTP=true")]
    Insecure {
        /// Scheme, host and port.
        url: String,
    },
    /// The URL is neither http nor https, or has no host.
    #[error("{url}: expected an absolute http or https URL")]
    BadUrl {
        /// As given.
        url: String,
    },
    /// There is no connection, or it broke.
    #[error("{host} did not answer: {reason}")]
    Unreachable {
        /// Host and port.
        host: String,
        /// The innermost cause.
        reason: String,
    },
    /// There is no TLS with it.
    #[error("{host} did not answer: {error}")]
    Tls {
        /// Host and port.
        host: String,
        /// What is wrong.
        #[source]
        error: TlsError,
    },
    /// The port is open, but does not serve what this client needs.
    #[error("{host} does not speak HTTP/2: {reason}; check that the URL is that of a gRPC port")]
    NotHttp2 {
        /// Host and port.
        host: String,
        /// What it does instead.
        reason: String,
    },
    /// The answer did not arrive in time.
    #[error("{host} did not answer within {limit:?}")]
    Timeout {
        /// Host and port.
        host: String,
        /// The limit that passed.
        limit: Duration,
    },
    /// The body is incomplete.
    #[error("the answer of {host} broke off: {reason}")]
    Truncated {
        /// Host and port.
        host: String,
        /// The innermost cause.
        reason: String,
    },
    /// The body is larger than allowed.
    #[error("the answer of {host} is larger than {limit} bytes")]
    Oversize {
        /// Host and port.
        host: String,
        /// The limit.
        limit: usize,
        /// The bytes before the limit.
        begin: Beginning,
    },
    /// The body is not the JSON that was expected.
    #[error("the answer of {host} is not the expected JSON ({bytes} bytes): {reason}")]
    NotJson {
        /// Host and port.
        host: String,
        /// Size of the body.
        bytes: usize,
        /// The error of the decoder. It names fields and types, never values.
        reason: String,
    },
}

/// A complete answer with its body in memory.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: http::HeaderMap,
    /// The body, at most [`JSON_BYTES_MAX`].
    pub body: Bytes,
    host: Authority,
    clock: Reading,
}

impl Answer {
    /// Converts `at` from the clock of the service to the local clock. `None`: the time had passed before the request
    /// was sent.
    #[must_use]
    pub fn local_time(&self, at: Timestamp) -> Option<BootInstant> {
        self.clock.local_time(at)
    }

    /// Whether the clock of the service is known. It is unknown if the service never sent a `Date`.
    #[must_use]
    pub fn clock_is_known(&self) -> bool {
        self.clock.is_measured()
    }

    /// The time left until `at`, which follows the clock of the service. `None`: it has passed.
    #[must_use]
    pub fn left_until(&self, at: Timestamp) -> Option<Duration> {
        self.clock.time_left(at)
    }

    /// Decodes the body as JSON.
    pub fn json<'a, T: Deserialize<'a>>(&'a self) -> Result<T, TransportError> {
        serde_json::from_slice(&self.body).map_err(|err| self.not_json(&err))
    }

    /// The error about a body, or a part of it, that was not decoded because of `err`. It quotes no value.
    #[must_use]
    pub fn not_json(&self, err: &serde_json::Error) -> TransportError {
        let (host, bytes) = (self.host.to_string(), self.body.len());
        TransportError::NotJson { host, bytes, reason: decode_complaint(&self.body, err) }
    }

    /// The first [`EXCERPT_BYTES_MAX`] bytes of the body on one line, for error texts.
    #[must_use]
    pub fn excerpt(&self) -> String {
        excerpt(&self.body)
    }

    /// Like [`Answer::excerpt`], without `secrets`: some services repeat the request in an error.
    #[must_use]
    pub fn excerpt_without(&self, secrets: &[&str]) -> String {
        excerpt_without(&self.body, secrets)
    }
}

/// Like [`excerpt`], without `secrets` and without bearer tokens: some services repeat the request in an error. A secret
/// across the end of the excerpt is removed too, if `body` continues after it.
#[must_use]
pub fn excerpt_without(body: &[u8], secrets: &[&str]) -> String {
    let longest = secrets.iter().map(|secret| secret.len()).max().unwrap_or(0);
    let cut = &body[..body.len().min(EXCERPT_BYTES_MAX.saturating_add(longest))];
    let mut text = String::from_utf8_lossy(cut).into_owned();
    for secret in secrets.iter().filter(|secret| !secret.is_empty()) {
        text = text.replace(secret, "[secret]");
    }
    excerpt(without_bearers(&text).as_bytes())
}

/// Removes the tokens that follow the word `bearer`.
fn without_bearers(text: &str) -> String {
    const SCHEME: &str = "bearer ";
    let (lower, mut clean, mut from) = (text.to_ascii_lowercase(), String::with_capacity(text.len()), 0);
    while let Some(at) = lower[from..].find(SCHEME) {
        let token = from + at + SCHEME.len();
        clean.push_str(&text[from..token]);
        let end = text[token..].find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | ';' | '<'));
        from = end.map_or(text.len(), |end| token + end);
        // Words such as "bearer token is missing" are not tokens.
        clean.push_str(if from - token >= TOKEN_BYTES_MIN { "[secret]" } else { &text[token..from] });
    }
    clean.push_str(&text[from..]);
    clean
}

/// The beginning of `body` on one line, cut at a character.
#[must_use]
pub fn excerpt(body: &[u8]) -> String {
    let cut = &body[..body.len().min(EXCERPT_BYTES_MAX)];
    let text: String = String::from_utf8_lossy(cut).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.trim().to_owned()
}

/// The error of serde_json without quoted values: an answer may hold a token.
pub(crate) fn decode_complaint(body: &[u8], err: &serde_json::Error) -> String {
    if body.is_empty() {
        return "the body is empty".to_owned();
    }
    if body.trim_ascii_start().first() == Some(&b'<') {
        return "it looks like HTML".to_owned();
    }
    match err.classify() {
        serde_json::error::Category::Data => {
            let text = err.to_string();
            // "invalid type: string "…", expected …": keep what was expected, drop the value.
            match (text.starts_with("invalid"), text.find("expected")) {
                (true, Some(at)) => text[at..].to_owned(),
                // The parser of a field may quote its input.
                _ => match (text.find('"'), text.rfind('"')) {
                    (Some(from), Some(to)) if from < to => format!("{}…{}", &text[..from], &text[to + 1..]),
                    _ => text,
                },
            }
        }
        _ => format!("malformed at line {} column {}", err.line(), err.column()),
    }
}

/// Which URLs are allowed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    /// Allow `http://` to hosts other than loopback.
    pub allow_insecure_http: bool,
}

impl Policy {
    /// Whether `url` is allowed: https to any host, http to loopback only, unless allowed elsewhere.
    pub fn check(&self, url: &Url) -> Result<(), TransportError> {
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| TransportError::BadUrl { url: url.to_string() })?;
        let loopback = is_loopback(host.trim_start_matches('[').trim_end_matches(']'));
        match url.scheme() {
            "https" => Ok(()),
            "http" if loopback || self.allow_insecure_http => Ok(()),
            "http" => Err(TransportError::Insecure { url: url.origin().ascii_serialization() }),
            _ => Err(TransportError::BadUrl { url: url.to_string() }),
        }
    }
}

/// Whether a host (without brackets) is this machine itself.
fn is_loopback(host: &str) -> bool {
    match host.parse::<std::net::IpAddr>() {
        Ok(ip) => ip.is_loopback(),
        Err(_) => host == "localhost" || host.ends_with(".localhost"),
    }
}

/// The HTTP client. Cheap to clone. All clones share one pool.
#[derive(Clone)]
pub struct Client {
    pool: Pool,
    config: Arc<Config>,
    clocks: Arc<Clocks>,
}

impl Client {
    /// Creates a client with an empty pool. Use it inside a tokio runtime.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let pool = Pool::new(&config, IDLE_MAX);
        Self { pool, config: Arc::new(config), clocks: Arc::default() }
    }

    /// A client with the same limits and routes that calls one peer only, with this TLS. It has its own connections.
    #[must_use]
    pub fn for_peer(&self, peer: PeerTls) -> Self {
        Self::new(Config { peer: Some(peer), ..Config::clone(&self.config) })
    }

    /// Whether `url` is allowed, see [`Policy::check`].
    pub fn check(&self, url: &Url) -> Result<(), TransportError> {
        Policy { allow_insecure_http: self.config.allow_insecure_http }.check(url)
    }

    /// Sends a request and waits up to `limit` for the head of the answer. The caller streams the body. An upload of
    /// unknown duration passes `Duration::MAX` and detects stalls itself.
    pub async fn send(&self, request: Request<Body>, limit: Duration) -> Result<Response<Incoming>, TransportError> {
        let host = host_of(&request)?;
        let work = pin!(self.pool.request(self.for_proxy(request)));
        let sent = within(limit, &host, async { work.await.map_err(|failure| failure.at(&host)) }).await;
        let (response, connection) = sent?;
        self.pool.give_back_later(connection);
        Ok(response)
    }

    /// The time at the service of `base`, as measured by its answers.
    #[must_use]
    pub fn now_at(&self, base: &str) -> Timestamp {
        let host = base.parse::<http::Uri>().ok().and_then(|uri| Some(uri.authority()?.to_string()));
        self.clocks.now(&host.unwrap_or_default())
    }

    /// Sends a request and reads the whole answer, at most [`JSON_BYTES_MAX`] bytes, all within `limit`.
    pub async fn call(&self, request: Request<Body>, limit: Duration) -> Result<Answer, TransportError> {
        let (host, mut head) = (host_of(&request)?, None);
        let body = within(limit, &host, pin!(self.whole(request, &host, BootInstant::now(), &mut head))).await;
        Need::Body.answer(host, head, body)
    }

    /// Like [`Client::call`], for callers that need the status only. If the body is incomplete, too large or too late,
    /// the answer still has its status, and an empty body.
    pub async fn call_for_status(&self, request: Request<Body>, limit: Duration) -> Result<Answer, TransportError> {
        let (host, mut head) = (host_of(&request)?, None);
        let body = within(limit, &host, pin!(self.whole(request, &host, BootInstant::now(), &mut head))).await;
        Need::Status.answer(host, head, body)
    }

    /// Like [`Client::call`] or [`Client::call_for_status`], but sends nothing after `until`. It checks the clock at each
    /// step: a process that was stopped does not send a stale request when it continues.
    pub async fn call_until(
        &self,
        request: Request<Body>,
        need: Need,
        until: BootInstant,
    ) -> Result<Answer, TransportError> {
        let (host, mut head, began) = (host_of(&request)?, None, BootInstant::now());
        let body = until.before(pin!(self.whole(request, &host, began, &mut head))).await;
        let body = body.unwrap_or_else(|| Err(late(&host, until - began)));
        need.answer(host, head, body)
    }

    /// Adds the authorization for a proxy that forwards the request.
    fn for_proxy(&self, mut request: Request<Body>) -> Request<Body> {
        if let Some(authorization) = self.config.proxies.authorization(request.uri()) {
            request.headers_mut().insert(http::header::PROXY_AUTHORIZATION, authorization);
        }
        request
    }

    /// Sends a request and returns the answer's body. Stores the head in `head` as soon as it arrives, so that the caller
    /// has it when the body fails or this future is dropped.
    async fn whole(
        &self,
        request: Request<Body>,
        host: &Authority,
        sent: BootInstant,
        head: &mut Option<Head>,
    ) -> Result<Bytes, TransportError> {
        let answered = self.pool.request(self.for_proxy(request)).await;
        let (response, connection) = answered.map_err(|failure| failure.at(host))?;
        let (parts, body) = response.into_parts();
        let clock = self.clocks.measure(host.as_str(), &parts.headers, sent);
        *head = Some((parts, clock));
        let body = read_capped(body, JSON_BYTES_MAX, host.as_str()).await?;
        self.pool.give_back(connection);
        Ok(body)
    }
}

/// The first bytes of a body. They may hold a token, so they are never printed.
pub struct Beginning(pub Vec<u8>);

impl fmt::Debug for Beginning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// The head of an answer, and its clock.
type Head = (response::Parts, Reading);

/// Which part of an answer the caller needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The whole answer; see [`Client::call`].
    Body,
    /// The status; see [`Client::call_for_status`].
    Status,
}

impl Need {
    fn answer(
        self,
        host: Authority,
        head: Option<Head>,
        body: Result<Bytes, TransportError>,
    ) -> Result<Answer, TransportError> {
        let body = match (self, &head) {
            (Self::Status, Some(_)) => body.unwrap_or_default(),
            _ => body?,
        };
        let (head, clock) = head.expect("a body comes after its head");
        Ok(Answer { status: head.status, headers: head.headers, body, host, clock })
    }
}

async fn within<T>(
    limit: Duration,
    host: &Authority,
    work: impl Future<Output = Result<T, TransportError>>,
) -> Result<T, TransportError> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(late(host, limit)))
}

fn late(host: &Authority, limit: Duration) -> TransportError {
    TransportError::Timeout { host: host.to_string(), limit }
}

fn host_of(request: &Request<Body>) -> Result<Authority, TransportError> {
    let uri = request.uri();
    uri.authority().cloned().ok_or_else(|| TransportError::BadUrl { url: uri.to_string() })
}

/// Reads a body of at most `limit` bytes. `host` is for the error text.
pub async fn read_capped(mut body: Incoming, limit: usize, host: &str) -> Result<Bytes, TransportError> {
    let (mut first, mut collected) = (Bytes::new(), Vec::new());
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|err| TransportError::Truncated { host: host.to_owned(), reason: innermost(&err) })?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + collected.len() + data.len() > limit {
            collected.splice(..0, std::mem::take(&mut first));
            collected.extend_from_slice(&data[..limit - collected.len()]);
            return Err(TransportError::Oversize { host: host.to_owned(), limit, begin: Beginning(collected) });
        }
        // Most answers arrive in one piece, which needs no copy.
        if first.is_empty() && collected.is_empty() {
            first = data;
            continue;
        }
        collected.extend_from_slice(&std::mem::take(&mut first));
        collected.extend_from_slice(&data);
    }
    Ok(if collected.is_empty() { first } else { collected.into() })
}

/// The innermost cause of an error. The outer errors of HTTP libraries have no detail.
#[must_use]
pub fn innermost(err: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = err;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_result(url: &str) -> &'static str {
        let client = Client::new(Config::default());
        match client.check(&Url::parse(url).expect("a URL")) {
            Ok(()) => "ok",
            Err(TransportError::Insecure { .. }) => "insecure",
            Err(_) => "bad",
        }
    }

    #[tokio::test]
    async fn plain_http_is_allowed_to_loopback_only() {
        assert_eq!(check_result("https://plane.example/v1"), "ok");
        assert_eq!(check_result("http://127.0.0.9:8700"), "ok");
        assert_eq!(check_result("http://[::1]:8700"), "ok");
        assert_eq!(check_result("http://localhost:1"), "ok");
        assert_eq!(check_result("http://plane.example"), "insecure");
        assert_eq!(check_result("http://localhost.example"), "insecure");
        assert_eq!(check_result("ftp://127.0.0.1"), "bad");
    }

    #[test]
    fn excerpts_are_one_line_of_whole_characters() {
        let body = "é\n".repeat(400);
        let text = excerpt(body.as_bytes());
        assert!(text.len() <= EXCERPT_BYTES_MAX + 3 && !text.contains('\n'));
    }

    #[test]
    fn excerpts_hold_no_part_of_a_secret() {
        for filler in [0, 3, EXCERPT_BYTES_MAX - 6, EXCERPT_BYTES_MAX] {
            let body = format!("{}top-secret is wrong", "-".repeat(filler));
            let answer = Answer {
                status: StatusCode::FORBIDDEN,
                headers: http::HeaderMap::new(),
                body: body.into(),
                host: Authority::from_static("plane"),
                clock: Clocks::default().measure("", &http::HeaderMap::new(), BootInstant::now()),
            };
            let text = answer.excerpt_without(&["", "top-secret"]);
            assert!(!text.contains("top-"), "{text}");
            assert!(text.len() <= EXCERPT_BYTES_MAX);
        }
    }

    #[test]
    fn excerpts_hold_no_bearer_tokens() {
        let long = "eyJ0".repeat(100);
        for (body, expected) in [
            (format!("authorization=\"Bearer {long}\" x"), "authorization=\"Bearer [secret]\" x"),
            (format!("got BEARER {long}"), "got BEARER [secret]"),
            ("the bearer token is é missing".to_owned(), "the bearer token is é missing"),
            ("bearer ".to_owned(), "bearer"),
        ] {
            assert_eq!(excerpt_without(body.as_bytes(), &[]), expected);
        }
    }

    #[test]
    fn decode_errors_quote_no_value() {
        let body = br#"{"access_token":"secret-value"}"#;
        let err = serde_json::from_slice::<std::collections::HashMap<String, u64>>(body).expect_err("not a number");
        let text = decode_complaint(body, &err);
        assert!(!text.contains("secret"), "{text}");
        assert!(text.contains("expected u64"), "{text}");
    }
}
