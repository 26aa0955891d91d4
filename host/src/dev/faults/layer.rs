//! A layer around the router. It names each request, applies the fault rules, and records the result in the journal.

use std::{convert::Infallible, future::poll_fn, sync::Arc, time::Duration};

use ::http::{HeaderValue, Request, Response, StatusCode, header};
use axum::{Router, body::Body};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use jiff::fmt::rfc2822::DateTimePrinter;
use serde_json::Value;
use uuid::Uuid;

#[cfg(feature = "grpc")]
use super::grpc;
use super::{AppliedFault, Client, Endpoint, Kind, WireForm, wire::Line};
#[cfg(feature = "grpc")]
use crate::dev::node_runtime::CallFault;
use crate::dev::{
    Inner,
    http::{CallerNode, bearer, drain},
    journal::Note,
};

/// How much of a body is read to find its middle. Longer bodies are cut here.
const MIDDLE_BYTES: usize = 64 * 1024;
/// One chunk of an oversized answer.
const PIECE: &[u8] = &[b'x'; 16 * 1024];
/// Largest sign-in body that is searched for its wallet.
const SIGN_IN_BYTES_MAX: usize = 64 * 1024;
/// How long the bytes of an answer may take to leave before the connection is reset.
const FLUSH_TIME: Duration = Duration::from_millis(200);
/// The page that a captive portal returns instead of an answer.
const PAGE: &str = "<!doctype html><title>Sign in</title><p>Sign in to use this network.";

/// The content type that the oldest services do not send.
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The request gets no answer.
#[derive(Debug, thiserror::Error)]
pub(in crate::dev) enum NoAnswer {
    /// The connection must be broken.
    #[error("reset by a fault rule")]
    Reset,
    /// The stream of the request is reset. The connection stays.
    #[cfg(feature = "grpc")]
    #[error("stream reset by a fault rule")]
    ResetStream(#[source] h2::Error),
}

/// Handles one request: applies a fault or routes it, answers it, and records it.
pub(in crate::dev) async fn answer(
    server: Arc<Inner>,
    router: Router,
    line: Arc<Line>,
    request: Request<Incoming>,
) -> Result<Response<Body>, NoAnswer> {
    let endpoint = Endpoint::of(request.method(), request.uri(), request.headers());
    let client = Client::of(request.headers());
    let mut note = Note::of(&server, &request, endpoint.map(Endpoint::name));
    let request = request.map(Body::new);
    let applied = endpoint.and_then(|endpoint| Some((endpoint, server.faults().apply(endpoint, client)?)));
    let answered = match applied {
        None => Ok(Routes { server: &server, router, line: &line }.answer(request).await),
        Some((endpoint, applied)) => {
            tracing::info!(event = "dev.fault_injected", endpoint = endpoint.name(), fault = applied.kind(), rule = %applied.rule, "fault injected");
            note.fault(applied.kind());
            let routes = Routes { server: &server, router, line: &line };
            FaultedRequest { routes, endpoint, note: &mut note }.answer(applied, request).await
        }
    };
    let mut answer = answered?;
    let node = answer.extensions().get::<CallerNode>().map(|by| by.0);
    note.answered(answer.status().as_u16(), node);
    if server.form() == WireForm::Old && answer.headers().get(header::CONTENT_TYPE) == Some(&JSON) {
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    }
    if !server.faults().clock_offset().is_zero() {
        let now = DateTimePrinter::new().timestamp_to_rfc9110_string(&server.now());
        let date = now.ok().and_then(|text| HeaderValue::try_from(text).ok());
        answer.headers_mut().extend(date.map(|date| (header::DATE, date)));
    }
    Ok(answer)
}

/// The handlers of all requests.
pub(super) struct Routes<'a> {
    pub(super) server: &'a Arc<Inner>,
    router: Router,
    pub(super) line: &'a Arc<Line>,
}

impl Routes<'_> {
    /// Answers a request of either wire.
    pub(super) async fn answer(&self, request: Request<Body>) -> Response<Body> {
        #[cfg(feature = "grpc")]
        if self.is_grpc(&request) {
            return self.answer_grpc(request, CallFault::default()).await;
        }
        let routed = hyper_util::service::TowerToHyperService::new(self.router.clone());
        let answered: Result<_, Infallible> = hyper::service::Service::call(&routed, request).await;
        answered.unwrap_or_else(|never| match never {})
    }
}

/// A request to which a rule applies.
struct FaultedRequest<'a> {
    routes: Routes<'a>,
    endpoint: Endpoint,
    note: &'a mut Note,
}

impl FaultedRequest<'_> {
    async fn answer(self, applied: AppliedFault, request: Request<Body>) -> Result<Response<Body>, NoAnswer> {
        if !applied.delay.is_zero() {
            self.pause(applied.delay).await?;
        }
        #[cfg(feature = "grpc")]
        if self.routes.is_grpc(&request) && grpc::differs(&applied) {
            return grpc::answer(&self.routes, applied, request).await;
        }
        match applied.kind {
            // Except for the delay, these apply to gRPC calls only.
            Kind::SecondLease | Kind::GrpcStatus { .. } | Kind::RstStream { .. } | Kind::Goaway | Kind::Delay => {
                Ok(self.routes.answer(request).await)
            }
            Kind::Status { code, headers, body } => {
                drain(request.into_body()).await;
                let mut answer = Response::new(Body::from(body));
                *answer.status_mut() = code;
                *answer.headers_mut() = headers;
                Ok(answer)
            }
            Kind::Reset => self.reset(),
            Kind::Hang => {
                drain(request.into_body()).await;
                self.note.now();
                self.pause(Duration::MAX).await?;
                self.reset()
            }
            Kind::LostAnswer => {
                self.routes.answer(request).await;
                self.reset()
            }
            Kind::ResetBody { after } => {
                let answer = self.routes.answer(request).await;
                if answer.status() == StatusCode::NO_CONTENT {
                    return self.reset();
                }
                Ok(broken(answer, after, self.routes.line.clone()).await)
            }
            Kind::Malformed { after } => {
                let answer = self.routes.answer(request).await;
                if answer.status() == StatusCode::NO_CONTENT {
                    return Ok(instead(answer, "application/json", Body::from("{")));
                }
                Ok(if answer.status().is_success() { shortened(answer, after).await } else { answer })
            }
            Kind::Oversize { bytes } => {
                let answer = self.routes.answer(request).await;
                Ok(if answer.status().is_success() { oversized(answer, bytes) } else { answer })
            }
            Kind::WrongType => {
                let answer = self.routes.answer(request).await;
                let page = "text/html; charset=utf-8";
                Ok(if answer.status().is_success() { instead(answer, page, Body::from(PAGE)) } else { answer })
            }
            Kind::RevokeToken => {
                let server = self.routes.server;
                let token = bearer(request.headers()).unwrap_or_default();
                if self.endpoint.is_of_dms() {
                    server.identity().revoke(token);
                } else if let Some((task, serial)) = server.tokens.task_of(token) {
                    server.plane().revoke(task, serial, server.now());
                }
                Ok(self.routes.answer(request).await)
            }
            Kind::ForgetNode => {
                let request = self.forget(request).await;
                Ok(self.routes.answer(request).await)
            }
            Kind::StealLease => {
                if let Some(task) = self.task(&request) {
                    self.routes.server.plane().steal(task, self.routes.server.now());
                    self.routes.server.changed();
                }
                Ok(self.routes.answer(request).await)
            }
        }
    }

    fn reset<T>(&self) -> Result<T, NoAnswer> {
        self.routes.line.reset();
        Err(NoAnswer::Reset)
    }

    /// Waits for `length`, but ends when the dev server stops.
    async fn pause(&self, length: Duration) -> Result<(), NoAnswer> {
        tokio::select! {
            () = tokio::time::sleep(length) => Ok(()),
            () = self.routes.server.stop.cancelled() => self.reset(),
        }
    }

    /// Removes the registration of the wallet behind the node token, or of the wallet that a sign-in names.
    async fn forget(&self, request: Request<Body>) -> Request<Body> {
        if let Some(token) = bearer(request.headers()) {
            let server = self.routes.server;
            let node = server.identity().node(token, server.now());
            if let Some(node) = node {
                server.identity().forget(&node.wallet);
            }
            return request;
        }
        #[cfg(feature = "grpc")]
        if self.endpoint == Endpoint::NodeHeartbeat {
            grpc::forget_node(self.routes.server, request.uri().path());
            return request;
        }
        let (head, body) = request.into_parts();
        let body = http_body_util::Limited::new(body, SIGN_IN_BYTES_MAX).collect().await;
        let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let named = serde_json::from_slice::<Value>(&body).ok();
        if let Some(wallet) = named.as_ref().and_then(|named| named["address"].as_str()) {
            self.routes.server.identity().forget(&wallet.to_ascii_lowercase());
        }
        Request::from_parts(head, Body::from(body))
    }

    /// The task of a request. The path or the domain token names it.
    fn task(&self, request: &Request<Body>) -> Option<Uuid> {
        if self.endpoint.is_of_dms() {
            return Uuid::parse_str(request.uri().path().split('/').nth(3)?).ok();
        }
        self.routes.server.tokens.task_of(bearer(request.headers())?).map(|(task, _)| task)
    }
}

/// Returns the answer with another body.
pub(super) fn instead(answer: Response<Body>, content_type: &'static str, body: Body) -> Response<Body> {
    let (mut head, _) = answer.into_parts();
    head.status = StatusCode::OK;
    head.headers.remove(header::CONTENT_LENGTH);
    head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    Response::from_parts(head, body)
}

/// Returns a JSON string of that length.
fn oversized(answer: Response<Body>, bytes: usize) -> Response<Body> {
    let quote = || std::iter::once(Bytes::from_static(b"\""));
    let pieces = quote().chain(filler(bytes.saturating_sub(2))).chain(quote());
    instead(answer, "application/json", Body::from_stream(stream::iter(pieces.map(Ok::<_, Infallible>))))
}

/// So many bytes, in pieces.
pub(super) fn filler(bytes: usize) -> impl Iterator<Item = Bytes> {
    let full = std::iter::repeat_n(Bytes::from_static(PIECE), bytes / PIECE.len());
    full.chain(std::iter::once(Bytes::from_static(&PIECE[..bytes % PIECE.len()])))
}

/// The beginning of a body: the first `after` bytes, or its first half.
async fn beginning(mut body: Body, after: Option<usize>) -> Body {
    if let Some(after) = after {
        let left = after;
        let limited = stream::unfold((body, left), |(mut body, left)| async move {
            if left == 0 {
                return None;
            }
            loop {
                let Ok(mut bytes) = body.frame().await?.ok()?.into_data() else { continue };
                bytes.truncate(left);
                let left = left - bytes.len();
                return Some((Ok::<_, Infallible>(bytes), (body, left)));
            }
        });
        return Body::from_stream(limited);
    }
    let mut seen = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        seen.extend_from_slice(&frame.into_data().unwrap_or_default());
        if seen.len() >= MIDDLE_BYTES {
            seen.truncate(MIDDLE_BYTES);
            return Body::from(seen);
        }
    }
    seen.truncate(seen.len() / 2);
    Body::from(seen)
}

/// The answer, ended too early but as a valid HTTP message.
async fn shortened(answer: Response<Body>, after: Option<usize>) -> Response<Body> {
    let (mut head, body) = answer.into_parts();
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, beginning(body, after).await)
}

/// The answer with its full length announced. The connection is reset in the middle of the body.
async fn broken(answer: Response<Body>, after: Option<usize>, line: Arc<Line>) -> Response<Body> {
    let (mut head, body) = answer.into_parts();
    if let Some(length) = body.size_hint().exact() {
        head.headers.insert(header::CONTENT_LENGTH, length.into());
    }
    let begun = beginning(body, after).await.into_data_stream().map(|piece| piece.map_err(|_| NoAnswer::Reset));
    let reset = stream::once(async move {
        flushed(&line).await;
        line.reset();
        Err(NoAnswer::Reset)
    });
    Response::from_parts(head, Body::from_stream(begun.chain(reset)))
}

/// Waits until the bytes sent so far have left, so that they arrive before the connection breaks.
pub(super) async fn flushed(line: &Line) {
    let before = line.flushed();
    // Another task writes an HTTP/2 connection: the bytes may have left already.
    let _ = tokio::time::timeout(FLUSH_TIME, poll_fn(|cx| line.poll_flushed(before, cx))).await;
}
