//! The calls of nodes over REST.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::Value;

use super::{before_verb, property, require_json};
use crate::dev::{
    Inner,
    http::{Answer, IDENTITY_BYTES_MAX, Refusal, answer, from_this_machine, ok, read_json},
};

/// `POST /nodes:register`
pub(super) async fn register(State(server): State<Arc<Inner>>, headers: HeaderMap, body: Body) -> Answer {
    require_json(&headers)?;
    let body: Value = read_json(body, IDENTITY_BYTES_MAX).await?;
    let id = property(&body, "nodeId").as_str().unwrap_or_default();
    if id.trim().is_empty() {
        return Err(Refusal::bad("NodeId is required"));
    }
    let (origin, mut nodes) = (server.config.origin, server.nodes());
    if origin && nodes.knows(id) {
        return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the key of the node exists already"));
    }
    let node = nodes.register(id, &body, origin, server.now());
    drop(nodes);
    tracing::info!(event = "dev.node_registered", node = id, "node registered");
    server.changed();
    let mut created = answer(StatusCode::CREATED, &node);
    let place: String = url::form_urlencoded::byte_serialize(id.as_bytes()).collect();
    let place = HeaderValue::try_from(format!("/v1/nodes/{place}"));
    created.headers_mut().extend(place.ok().map(|place| (header::LOCATION, place)));
    Ok(created)
}

/// `POST /nodes/{id}:heartbeat`
pub(super) async fn heartbeat(
    State(server): State<Arc<Inner>>,
    Path(segment): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    require_json(&headers)?;
    let id = before_verb(&segment, "heartbeat")?;
    let body: Value = read_json(body, IDENTITY_BYTES_MAX).await?;
    let node = server.nodes().heartbeat(id, &body, server.now()).ok_or_else(no_node)?;
    server.changed();
    ok(&node)
}

/// `GET /nodes`
pub(super) async fn list(State(server): State<Arc<Inner>>, headers: HeaderMap) -> Answer {
    from_this_machine(&headers)?;
    let nodes = server.nodes().list();
    ok(&nodes)
}

/// `GET /nodes/{id}`
pub(super) async fn get(State(server): State<Arc<Inner>>, Path(id): Path<String>, headers: HeaderMap) -> Answer {
    from_this_machine(&headers)?;
    let node = server.nodes().get(&id).ok_or_else(no_node)?;
    ok(&node)
}

/// `DELETE /nodes/{id}`
pub(super) async fn remove(
    State(server): State<Arc<Inner>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    from_this_machine(&headers)?;
    let known = server.nodes().remove(&id);
    server.changed();
    if known { Ok(StatusCode::NO_CONTENT.into_response()) } else { Err(no_node()) }
}

fn no_node() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "no such node")
}
