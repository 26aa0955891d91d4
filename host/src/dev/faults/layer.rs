//! A layer around the router. It names each request, applies the fault rules, and records the result in the journal.

use std::{convert::Infallible, sync::Arc, task::Poll, time::Duration};

use ::http::{HeaderValue, Request, Response, StatusCode, header};
use axum::{Router, body::Body};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use jiff::fmt::rfc2822::DateTimePrinter;
use serde_json::Value;
use uuid::Uuid;

use super::{AppliedFault, Client, Endpoint, Kind, WireForm, wire::Line};
#[cfg(feature = "grpc")]
use crate::dev::node_runtime;
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
/// The page that a captive portal returns instead of an answer.
const PAGE: &str = "<!doctype html><title>Sign in</title><p>Sign in to use this network.";

/// The content type that the oldest services do not send.
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The connection must be broken.
#[derive(Debug, thiserror::Error)]
#[error("reset by a fault rule")]
pub(in crate::dev) struct Reset;

/// Handles one request: applies a fault or routes it, answers it, and records it.
pub(in crate::dev) async fn answer(
    server: Arc<Inner>,
    router: Router,
    line: Arc<Line>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Reset> {
    let endpoint = Endpoint::of(request.method(), request.uri(), request.headers());
    let client = Client::of(request.headers());
    let mut note = Note::of(&server, &request, endpoint.map(Endpoint::name));
    let request = request.map(Body::new);
    let applied = endpoint.and_then(|endpoint| Some((endpoint, server.faults().apply(endpoint, client)?)));
    let answered = match applied {
        None => Ok(route(&server, router, request).await),
        Some((endpoint, applied)) => {
            tracing::info!(event = "dev.fault_injected", endpoint = endpoint.name(), fault = applied.kind(), rule = %applied.rule, "fault injected");
            note.fault(applied.kind());
            FaultedRequest { server: &server, router, line, endpoint, note: &mut note }.answer(applied, request).await
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

/// Answers a request of either wire.
async fn route(server: &Arc<Inner>, router: Router, request: Request<Body>) -> Response<Body> {
    #[cfg(feature = "grpc")]
    if server.config.wires.has_node_runtime() && node_runtime::is_grpc(request.headers()) {
        return node_runtime::call(server.clone(), request).await;
    }
    #[cfg(not(feature = "grpc"))]
    let _ = server;
    let routed = hyper_util::service::TowerToHyperService::new(router);
    let answered: Result<_, Infallible> = hyper::service::Service::call(&routed, request).await;
    answered.unwrap_or_else(|never| match never {})
}

/// A request to which a rule applies.
struct FaultedRequest<'a> {
    server: &'a Arc<Inner>,
    router: Router,
    line: Arc<Line>,
    endpoint: Endpoint,
    note: &'a mut Note,
}

impl FaultedRequest<'_> {
    async fn answer(self, applied: AppliedFault, request: Request<Body>) -> Result<Response<Body>, Reset> {
        if !applied.delay.is_zero() {
            self.pause(applied.delay).await?;
        }
        match applied.kind {
            Kind::Delay => Ok(route(self.server, self.router, request).await),
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
                route(self.server, self.router.clone(), request).await;
                self.reset()
            }
            Kind::ResetBody { after } => {
                let answer = route(self.server, self.router.clone(), request).await;
                if answer.status() == StatusCode::NO_CONTENT {
                    return self.reset();
                }
                Ok(broken(answer, after, self.line).await)
            }
            Kind::Malformed { after } => {
                let answer = route(self.server, self.router, request).await;
                if answer.status() == StatusCode::NO_CONTENT {
                    return Ok(instead(answer, "application/json", Body::from("{")));
                }
                Ok(if answer.status().is_success() { shortened(answer, after).await } else { answer })
            }
            Kind::Oversize { bytes } => {
                let answer = route(self.server, self.router, request).await;
                Ok(if answer.status().is_success() { oversized(answer, bytes) } else { answer })
            }
            Kind::WrongType => {
                let answer = route(self.server, self.router, request).await;
                let page = "text/html; charset=utf-8";
                Ok(if answer.status().is_success() { instead(answer, page, Body::from(PAGE)) } else { answer })
            }
            Kind::RevokeToken => {
                let token = bearer(request.headers()).unwrap_or_default();
                if self.endpoint.is_of_dms() {
                    self.server.identity().revoke(token);
                } else if let Some((task, serial)) = self.server.tokens.task_of(token) {
                    self.server.plane().revoke(task, serial, self.server.now());
                }
                Ok(route(self.server, self.router, request).await)
            }
            Kind::ForgetNode => {
                let request = self.forget(request).await;
                Ok(route(self.server, self.router, request).await)
            }
            Kind::StealLease => {
                if let Some(task) = self.task(&request) {
                    self.server.plane().steal(task, self.server.now());
                    self.server.changed();
                }
                Ok(route(self.server, self.router, request).await)
            }
        }
    }

    fn reset<T>(&self) -> Result<T, Reset> {
        self.line.reset();
        Err(Reset)
    }

    /// Waits for `length`, but ends when the dev server stops.
    async fn pause(&self, length: Duration) -> Result<(), Reset> {
        tokio::select! {
            () = tokio::time::sleep(length) => Ok(()),
            () = self.server.stop.cancelled() => self.reset(),
        }
    }

    /// Removes the registration of the wallet behind the node token, or of the wallet that a sign-in names.
    async fn forget(&self, request: Request<Body>) -> Request<Body> {
        if let Some(token) = bearer(request.headers()) {
            let node = self.server.identity().node(token, self.server.now());
            if let Some(node) = node {
                self.server.identity().forget(&node.wallet);
            }
            return request;
        }
        let (head, body) = request.into_parts();
        let body = http_body_util::Limited::new(body, SIGN_IN_BYTES_MAX).collect().await;
        let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let named = serde_json::from_slice::<Value>(&body).ok();
        if let Some(wallet) = named.as_ref().and_then(|named| named["address"].as_str()) {
            self.server.identity().forget(&wallet.to_ascii_lowercase());
        }
        Request::from_parts(head, Body::from(body))
    }

    /// The task of a request. The path or the domain token names it.
    fn task(&self, request: &Request<Body>) -> Option<Uuid> {
        if self.endpoint.is_of_dms() {
            return Uuid::parse_str(request.uri().path().split('/').nth(3)?).ok();
        }
        self.server.tokens.task_of(bearer(request.headers())?).map(|(task, _)| task)
    }
}

/// Returns the answer with another body.
fn instead(answer: Response<Body>, content_type: &'static str, body: Body) -> Response<Body> {
    let (mut head, _) = answer.into_parts();
    head.status = StatusCode::OK;
    head.headers.remove(header::CONTENT_LENGTH);
    head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    Response::from_parts(head, body)
}

/// Returns a JSON string of that length.
fn oversized(answer: Response<Body>, bytes: usize) -> Response<Body> {
    let filling = bytes.saturating_sub(2);
    let full = std::iter::repeat_n(Bytes::from_static(PIECE), filling / PIECE.len());
    let quote = || std::iter::once(Bytes::from_static(b"\""));
    let rest = Bytes::from_static(&PIECE[..filling % PIECE.len()]);
    let pieces = quote().chain(full).chain(std::iter::once(rest)).chain(quote());
    instead(answer, "application/json", Body::from_stream(stream::iter(pieces.map(Ok::<_, Infallible>))))
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
    let begun = beginning(body, after).await.into_data_stream().map(|piece| piece.map_err(|_| Reset));
    let mut flushed = None;
    let reset = stream::poll_fn(move |cx| {
        // The bytes sent so far must arrive before the connection breaks.
        let flushed = *flushed.get_or_insert_with(|| line.flushed());
        std::task::ready!(line.poll_flushed(flushed, cx));
        line.reset();
        Poll::Ready(Some(Err(Reset)))
    });
    Response::from_parts(head, Body::from_stream(begun.chain(reset)))
}
