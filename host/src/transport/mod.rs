//! The one HTTP client of the node: pooled connections, no redirects.
//!
//! Modules build requests and read answers; what may be spoken to whom ([`Client::check`]), how
//! long it may take and how large an answer may be are decided here. Nothing in here knows a
//! path, a token or a wire format. `connect` brings connections up, by the authorities of `tls` and
//! through the proxies of `proxy`.

mod clock;
mod connect;
pub(crate) mod multipart;
mod pool;
mod proxy;
mod retry_after;
#[cfg(test)]
pub(crate) mod testing;
mod tls;

use std::{fmt, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, response, uri::Authority};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::Semaphore;
use url::Url;

pub use proxy::Proxies;
pub use retry_after::{RETRY_AFTER_MAX, retry_after};
pub use tls::Roots;

use crate::model::BootInstant;
use clock::{Clocks, Reading};
use pool::Pool;

/// Largest JSON answer read, in bytes.
pub const JSON_BYTES_MAX: usize = 2 * 1024 * 1024;
/// How much of an error answer is kept for people, in bytes.
pub const EXCERPT_BYTES_MAX: usize = 512;

/// How long a connection stays open without a request.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Nothing shorter is taken for a token.
const TOKEN_BYTES_MIN: usize = 12;

/// A request body of any kind.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A body that is already in memory (or empty).
#[must_use]
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// What the client may do.
#[derive(Clone, Debug)]
pub struct Config {
    /// Allow `http://` to hosts other than loopback.
    pub allow_insecure_http: bool,
    /// How long a connection may take to come up, proxy and TLS included.
    pub connect_timeout: Duration,
    /// Whom to believe.
    pub roots: Roots,
    /// What goes through a proxy.
    pub proxies: Proxies,
    /// Requests under way at once, and so connections; more wait for their turn. 1 at least.
    pub at_once: usize,
    /// Connections that stay open without a request, at most: each takes a descriptor.
    pub idle_at_most: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            allow_insecure_http: false,
            connect_timeout: Duration::from_secs(10),
            roots: Roots::default(),
            proxies: Proxies::default(),
            at_once: Semaphore::MAX_PERMITS,
            idle_at_most: usize::MAX,
        }
    }
}

/// Why a call got no usable answer. Texts name the host, never a query, a header or a body.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The URL may not be spoken to.
    #[error("{url}: plain http is allowed to loopback only; use https, or set ALLOW_INSECURE_HTTP=true")]
    Insecure {
        /// Scheme, host and port.
        url: String,
    },
    /// Neither http nor https, or no host.
    #[error("{url}: expected an absolute http or https URL")]
    BadUrl {
        /// As given.
        url: String,
    },
    /// No connection, or it broke.
    #[error("{host} did not answer: {reason}")]
    Unreachable {
        /// Host and port.
        host: String,
        /// The innermost cause.
        reason: String,
    },
    /// Nothing came in time.
    #[error("{host} did not answer within {limit:?}")]
    Timeout {
        /// Host and port.
        host: String,
        /// The limit that passed.
        limit: Duration,
    },
    /// The body broke off.
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
        /// What came before the limit.
        begin: Beginning,
    },
    /// The body is not the JSON that was expected.
    #[error("the answer of {host} is not the expected JSON ({bytes} bytes): {reason}")]
    NotJson {
        /// Host and port.
        host: String,
        /// Size of the body.
        bytes: usize,
        /// The decoder's complaint; it names fields and types, never values of unknown fields.
        reason: String,
    },
}

/// A finished answer with its body in memory.
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
    /// The moment that whoever answered calls `at`, be its clock right or wrong. `None` for a time that
    /// had passed before the answer was asked for: it says more of a clock than of what it is about.
    #[must_use]
    pub fn moment(&self, at: Timestamp) -> Option<BootInstant> {
        self.clock.moment(at)
    }

    /// Whether the clock of whoever answered is known. It is not for a service that never sent a `Date`.
    #[must_use]
    pub fn clock_is_known(&self) -> bool {
        self.clock.is_measured()
    }

    /// What is left until `at`, a time of whoever answered; `None` where nothing is.
    #[must_use]
    pub fn left_until(&self, at: Timestamp) -> Option<Duration> {
        self.clock.left(at)
    }

    /// Decodes the body as JSON.
    pub fn json<'a, T: Deserialize<'a>>(&'a self) -> Result<T, TransportError> {
        serde_json::from_slice(&self.body).map_err(|err| TransportError::NotJson {
            host: self.host.to_string(),
            bytes: self.body.len(),
            reason: decode_complaint(&self.body, &err),
        })
    }

    /// The first [`EXCERPT_BYTES_MAX`] bytes of the body on one line, for error texts.
    #[must_use]
    pub fn excerpt(&self) -> String {
        excerpt(&self.body)
    }

    /// Like [`Answer::excerpt`], with every one of `secrets` cut out: some services repeat in an
    /// error what they were sent.
    #[must_use]
    pub fn excerpt_without(&self, secrets: &[&str]) -> String {
        excerpt_without(&self.body, secrets)
    }
}

/// Like [`excerpt`], with every one of `secrets` cut out, and every bearer: some services repeat in an error
/// what they were sent. A secret across the cut is found whole if `body` goes on beyond the excerpt.
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

/// What follows the word `bearer` is somebody's token, be it the one just sent or an earlier one.
fn without_bearers(text: &str) -> String {
    const SCHEME: &str = "bearer ";
    let (lower, mut kept, mut from) = (text.to_ascii_lowercase(), String::with_capacity(text.len()), 0);
    while let Some(at) = lower[from..].find(SCHEME) {
        let token = from + at + SCHEME.len();
        kept.push_str(&text[from..token]);
        let end = text[token..].find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | ';' | '<'));
        from = end.map_or(text.len(), |end| token + end);
        // Words such as "bearer token is missing" are no tokens.
        kept.push_str(if from - token >= TOKEN_BYTES_MIN { "[secret]" } else { &text[token..from] });
    }
    kept.push_str(&text[from..]);
    kept
}

/// The beginning of `body` on one line, cut at a character.
#[must_use]
pub fn excerpt(body: &[u8]) -> String {
    let cut = &body[..body.len().min(EXCERPT_BYTES_MAX)];
    let text: String = String::from_utf8_lossy(cut).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text.trim().to_owned()
}

/// serde_json's complaint without quoted values: an answer may hold a token.
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
                // A field's own parser may quote what it was given.
                _ => match (text.find('"'), text.rfind('"')) {
                    (Some(from), Some(to)) if from < to => format!("{}…{}", &text[..from], &text[to + 1..]),
                    _ => text,
                },
            }
        }
        _ => format!("malformed at line {} column {}", err.line(), err.column()),
    }
}

/// Who may be spoken to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    /// Allow `http://` to hosts other than loopback.
    pub allow_insecure_http: bool,
}

impl Policy {
    /// Whether `url` may be spoken to at all: https anywhere, http to loopback (or where allowed).
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

/// See the module's text. Cheap to clone; all clones share one pool.
#[derive(Clone)]
pub struct Client {
    pool: Pool,
    config: Arc<Config>,
    clocks: Arc<Clocks>,
}

impl Client {
    /// A client with an empty pool. It must be used inside a tokio runtime.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let pool = Pool::new(&config, IDLE_MAX);
        Self { pool, config: Arc::new(config), clocks: Arc::default() }
    }

    /// Whether `url` may be spoken to at all; see [`Policy::check`].
    pub fn check(&self, url: &Url) -> Result<(), TransportError> {
        Policy { allow_insecure_http: self.config.allow_insecure_http }.check(url)
    }

    /// Sends a request and waits up to `limit` for the head of the answer; the body is the
    /// caller's to stream. Uploads that may take longer than any fixed time pass `Duration::MAX`
    /// and watch for stalls themselves.
    pub async fn send(&self, request: Request<Body>, limit: Duration) -> Result<Response<Incoming>, TransportError> {
        let host = host_of(&request)?;
        let work = pin!(self.pool.request(self.for_proxy(request)));
        let sent = within(limit, &host, async { work.await.map_err(|reason| unreachable(&host, reason)) }).await;
        let (response, connection) = sent?;
        self.pool.give_back_later(connection);
        Ok(response)
    }

    /// The time as the service at `base` has it, as far as its answers have told.
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

    /// Like [`Client::call`] for callers to whom only the status matters: a body that breaks off,
    /// is too large or comes too late does not hide it. The answer's body is then empty.
    pub async fn call_for_status(&self, request: Request<Body>, limit: Duration) -> Result<Answer, TransportError> {
        let (host, mut head) = (host_of(&request)?, None);
        let body = within(limit, &host, pin!(self.whole(request, &host, BootInstant::now(), &mut head))).await;
        Need::Status.answer(host, head, body)
    }

    /// One of the two above for who may say nothing after `until`. The clock is asked at each step: what a
    /// stopped process had begun is not sent when it goes on.
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

    /// Adds what a proxy on the way wants to be shown.
    fn for_proxy(&self, mut request: Request<Body>) -> Request<Body> {
        if let Some(authorization) = self.config.proxies.authorization(request.uri()) {
            request.headers_mut().insert(http::header::PROXY_AUTHORIZATION, authorization);
        }
        request
    }

    /// Sends a request and returns the answer's body. Its head is there as soon as it has come, also
    /// when the body fails or this is dropped.
    async fn whole(
        &self,
        request: Request<Body>,
        host: &Authority,
        sent: BootInstant,
        head: &mut Option<Head>,
    ) -> Result<Bytes, TransportError> {
        let answered = self.pool.request(self.for_proxy(request)).await;
        let (response, connection) = answered.map_err(|reason| unreachable(host, reason))?;
        let (parts, body) = response.into_parts();
        let clock = self.clocks.note(host.as_str(), &parts.headers, sent);
        *head = Some((parts, clock));
        let body = read_capped(body, JSON_BYTES_MAX, host.as_str()).await?;
        self.pool.give_back(connection);
        Ok(body)
    }
}

/// The first bytes of a body. Never printed: a token may be among them.
pub struct Beginning(pub Vec<u8>);

impl fmt::Debug for Beginning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// The head of an answer, and when it came.
type Head = (response::Parts, Reading);

/// How much of an answer matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// All of it; see [`Client::call`].
    Body,
    /// Its status; see [`Client::call_for_status`].
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

fn unreachable(host: &Authority, reason: String) -> TransportError {
    TransportError::Unreachable { host: host.to_string(), reason }
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
        // Most answers come in one piece, which need not be copied.
        if first.is_empty() && collected.is_empty() {
            first = data;
            continue;
        }
        collected.extend_from_slice(&std::mem::take(&mut first));
        collected.extend_from_slice(&data);
    }
    Ok(if collected.is_empty() { first } else { collected.into() })
}

/// The innermost cause of an error: the outer ones of HTTP libraries say little.
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
    async fn plain_http_is_for_loopback_only() {
        assert_eq!(check_result("https://plane.example/v1"), "ok");
        assert_eq!(check_result("http://127.0.0.9:8700"), "ok");
        assert_eq!(check_result("http://[::1]:8700"), "ok");
        assert_eq!(check_result("http://localhost:1"), "ok");
        assert_eq!(check_result("http://plane.example"), "insecure");
        assert_eq!(check_result("http://localhost.example"), "insecure");
        assert_eq!(check_result("ftp://127.0.0.1"), "bad");
    }

    #[test]
    fn excerpts_are_cut_at_a_character_and_stay_on_one_line() {
        let body = "é\n".repeat(400);
        let text = excerpt(body.as_bytes());
        assert!(text.len() <= EXCERPT_BYTES_MAX + 3 && !text.contains('\n'));
    }

    #[test]
    fn a_secret_that_comes_back_is_cut_out_even_across_the_end_of_the_excerpt() {
        for filler in [0, 3, EXCERPT_BYTES_MAX - 6, EXCERPT_BYTES_MAX] {
            let body = format!("{}top-secret is wrong", "-".repeat(filler));
            let answer = Answer {
                status: StatusCode::FORBIDDEN,
                headers: http::HeaderMap::new(),
                body: body.into(),
                host: Authority::from_static("plane"),
                clock: Clocks::default().note("", &http::HeaderMap::new(), BootInstant::now()),
            };
            let text = answer.excerpt_without(&["", "top-secret"]);
            assert!(!text.contains("top-"), "{text}");
            assert!(text.len() <= EXCERPT_BYTES_MAX);
        }
    }

    #[test]
    fn what_follows_a_bearer_is_cut_out_wherever_it_ends() {
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
    fn a_decode_complaint_never_quotes_a_value() {
        let body = br#"{"access_token":"secret-value"}"#;
        let err = serde_json::from_slice::<std::collections::HashMap<String, u64>>(body).expect_err("not a number");
        let text = decode_complaint(body, &err);
        assert!(!text.contains("secret"), "{text}");
        assert!(text.contains("expected u64"), "{text}");
    }
}
