//! The Node Runtime wire (docs/protocols/node-runtime.md), server side: REST for nodes and authors, gRPC for leases
//! and reports. It shares the queue with the posemesh wire.
//!
//! `nodes` is the state of the registered nodes, `rest` their calls. `runs` has the calls of authors, `grpc` the lease
//! service.

mod grpc;
mod nodes;
mod rest;
mod runs;

use std::{convert::Infallible, sync::Arc};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Request, Response, StatusCode, header},
    routing::{get, post},
};
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{
    Inner,
    http::{Refusal, from_this_machine},
};
use crate::leases::node_runtime::lease::lease_service_server::LeaseServiceServer;

pub(super) use self::{
    grpc::{BeforeCall, CallFault, LeaseLimit},
    nodes::Nodes,
};

/// Whether a request is a gRPC call.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Answers a gRPC call. `close` ends its connection.
pub(super) async fn call(
    server: Arc<Inner>,
    close: CancellationToken,
    fault: CallFault,
    request: Request<Body>,
) -> Response<Body> {
    let service = TowerToHyperService::new(LeaseServiceServer::new(grpc::Leases { server, close, fault }));
    let answered: Result<_, Infallible> = service.call(request).await;
    answered.unwrap_or_else(|never| match never {}).map(Body::new)
}

/// The REST calls, below `/v1`.
pub(super) fn routes() -> Router<Arc<Inner>> {
    Router::new()
        .route("/nodes:register", post(rest::register))
        .route("/nodes", get(rest::list))
        .route("/nodes/{id}", get(rest::get).post(rest::heartbeat).delete(rest::remove))
        .route("/runs", post(runs::create).get(runs::list))
        .route("/runs/{id}", get(runs::get).post(runs::cancel))
}

/// Requires JSON. A web page in a browser cannot send it to another origin, and this wire has no other protection.
fn require_json(headers: &HeaderMap) -> Result<(), Refusal> {
    from_this_machine(headers)?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json")) {
        return Ok(());
    }
    let text = "the content type is not application/json; send this header";
    Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text))
}

/// The last segment of a path that ends in `:verb`.
fn before_verb<'a>(segment: &'a str, verb: &str) -> Result<&'a str, Refusal> {
    let no_path = || Refusal::new(StatusCode::NOT_FOUND, "no such path");
    segment.strip_suffix(verb).and_then(|rest| rest.strip_suffix(':')).ok_or_else(no_path)
}

/// A property of a JSON object, whatever the case of its name.
fn property<'a>(object: &'a Value, name: &str) -> &'a Value {
    let found = object.as_object().and_then(|object| object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)));
    found.map_or(&Value::Null, |(_, value)| value)
}

/// A whole number, also in quotes.
fn number(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.trim().parse().ok())
}
