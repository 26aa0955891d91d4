//! A test service. The test decides each answer.
//!
//! Requests arrive at [`Service::next`] in order. Each waits until the test answers it. Thus tests await events instead
//! of sleeping, and see each request exactly.

use std::time::Duration;

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    response::Response,
};
use futures_util::StreamExt as _;
use http::HeaderMap;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use url::Url;

use super::JSON_BYTES_MAX;

/// How long a test waits for an expected request.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Service {
    pub(crate) url: Url,
    calls: mpsc::UnboundedReceiver<Call>,
    _server: AbortOnDropHandle<()>,
}

/// One request. A drop without an answer breaks its connection.
pub(crate) struct Call {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) at: std::time::Instant,
    reply: oneshot::Sender<Response>,
}

/// A body that breaks after its first piece was sent.
fn broken() -> Body {
    let pieces = [Ok(Bytes::from_static(b"{\"access_token\":\"top-secr")), Err(std::io::Error::other("cut"))];
    Body::from_stream(futures_util::stream::iter(pieces).then(|piece| async move {
        if piece.is_err() {
            tokio::task::yield_now().await;
        }
        piece
    }))
}

async fn receive(State(calls): State<mpsc::UnboundedSender<Call>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 16 * JSON_BYTES_MAX).await.expect("the request of a test is complete");
    let (reply, answer) = oneshot::channel();
    let path = format!("{} {}", head.method, head.uri);
    let _ = calls.send(Call { path, headers: head.headers, body, at: std::time::Instant::now(), reply });
    answer.await.unwrap_or_else(|_| Response::new(broken()))
}

impl Service {
    pub(crate) async fn start() -> Self {
        let (sender, calls) = mpsc::unbounded_channel();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let url = format!("http://{}", listener.local_addr().expect("bound")).parse().expect("a URL");
        let app = Router::new().fallback(receive).with_state(sender);
        let server = tokio::spawn(async move { axum::serve(listener, app).await.expect("serves until aborted") });
        Self { url, calls, _server: AbortOnDropHandle::new(server) }
    }

    /// Waits for the next request.
    pub(crate) async fn next(&mut self) -> Call {
        let call = tokio::time::timeout(REQUEST_LIMIT, self.calls.recv()).await.expect("a request in time");
        call.expect("the server runs")
    }

    /// Waits for the next request, which must be `path` (with its method).
    pub(crate) async fn expect(&mut self, path: &str) -> Call {
        let call = self.next().await;
        assert_eq!(call.path, path);
        call
    }

    /// A request that has already arrived.
    pub(crate) fn waiting(&mut self) -> Option<Call> {
        self.calls.try_recv().ok()
    }
}

impl Call {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }

    pub(crate) fn bearer(&self) -> &str {
        let value = self.headers.get("authorization").map_or("", |value| value.to_str().expect("ASCII"));
        value.strip_prefix("Bearer ").unwrap_or(value)
    }

    pub(crate) fn ok(self, body: Value) {
        self.answer(200, body.to_string());
    }

    pub(crate) fn answer(self, status: u16, body: impl Into<Body>) {
        self.respond(Response::builder().status(status).body(body.into()).expect("a response"));
    }

    pub(crate) fn respond(self, response: Response) {
        let _ = self.reply.send(response);
    }

    /// Answers with a 200 of a service whose clock shows `date`.
    pub(crate) fn ok_at(self, date: jiff::Timestamp, body: Value) {
        let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&date).expect("a date");
        let response = Response::builder().header(http::header::DATE, date).body(Body::from(body.to_string()));
        self.respond(response.expect("a response"));
    }

    /// Answers with `status` and one of [`BAD_BODIES`].
    pub(crate) fn bad(self, status: u16, kind: &str) {
        let body = match kind {
            "empty" => Body::empty(),
            "html" => Body::from("<html>top-secret</html>"),
            "text" => Body::from("top-secret"),
            "number" => Body::from("17"),
            "half" => Body::from(r#"{"access_token":"top-secret","#),
            "types" => Body::from(r#"{"access_token":["top-secret"],"nonce":["top-secret"],"task":"top-secret"}"#),
            "oversize" => Body::from(vec![b' '; JSON_BYTES_MAX + 1]),
            "truncated" => broken(),
            other => panic!("unknown kind of body {other}"),
        };
        self.answer(status, body);
    }
}

/// Kinds of unusable bodies. Some hold `top-secret`.
pub(crate) const BAD_BODIES: [&str; 8] = ["empty", "html", "text", "number", "half", "types", "oversize", "truncated"];

/// Checks an error text for operators: one line, not empty, no secret.
#[track_caller]
pub(crate) fn assert_clean(text: &str) {
    assert!(!text.is_empty() && !text.contains('\n') && !text.contains("top-sec") && text.len() < 1024, "{text:?}");
}
