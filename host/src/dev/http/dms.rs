//! The node's side of the task service (posemesh.md sections 4.2 to 4.8).

use std::sync::Arc;

use axum::{
    Extension,
    body::Body,
    extract::{Path, RawQuery, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{Answer, REPORT_BYTES_MAX, Refusal, empty_object, for_node, ok, pairs, read_json};
use crate::{
    dev::{
        Inner, WireForm,
        identity::Peer,
        plane::{Granted, HeartbeatAnswer},
    },
    leases::dms::wire::{CompleteRequest, FailRequest, HeartbeatRequest, HeartbeatResponse, LeaseEnvelope, TaskSpec},
};

/// `GET /tasks`
pub(super) async fn lease(
    State(server): State<Arc<Inner>>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Response {
    for_node(&server, &headers, |node| {
        peer.is(node.id);
        let query = pairs(query.as_deref());
        let asked = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| &**value);
        // The oldest nodes also name a job and a domain.
        let job = match asked("job_id").map(Uuid::parse_str) {
            None => None,
            Some(Ok(job)) => Some(job),
            Some(Err(_)) => return Err(Refusal::bad("job_id is not a UUID")),
        };
        if asked("domain_id").is_some_and(|domain| Uuid::parse_str(domain) != Ok(server.domain_id)) {
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
        let now = server.now();
        // Newer nodes name a capability. Several values request any of several capabilities. No value requests any
        // capability of the node.
        let wanted = query.iter().filter(|(name, _)| name == "capability");
        let wanted: Vec<&str> = wanted.map(|(_, value)| &**value).collect();
        let granted = server.plane().lease(node, &wanted, job, now);
        let Ok(granted) = granted else {
            return Err(Refusal::new(StatusCode::CONFLICT, "this node holds its maximum number of leases"));
        };
        let Some(granted) = granted else { return Ok(StatusCode::NO_CONTENT.into_response()) };
        tracing::debug!(task_id = %granted.task, capability = %granted.request.capability, "leased");
        server.changed();
        let token = server.task_token(granted.task, &granted.token, node.id, now);
        ok(&envelope(&server, granted, token))
    })
}

fn envelope(server: &Inner, granted: Granted, token: String) -> LeaseEnvelope {
    let request = &granted.request;
    let old = server.form() == WireForm::Old;
    // The fields that this node reads are typed. The other fields of the task are added as JSON.
    let rest = [
        ("label", json!(request.label)),
        ("stage", json!(&*request.stage)),
        ("mode", json!(request.mode.text())),
        ("capability_filters", Value::Object(request.capability_filters.clone())),
        ("priority", json!(request.priority)),
        ("attempts", json!(granted.attempts)),
        ("max_attempts", json!(request.max_attempts())),
        ("deps_remaining", json!(0)),
        ("status", json!("leased")),
        ("billing_units", json!("0")),
        ("estimated_credit_cost", json!("0")),
        ("lease_expires_at", json!(granted.expires)),
    ];
    let rest = rest.into_iter().filter(|(name, _)| !old || *name != "lease_expires_at");
    LeaseEnvelope {
        access_token: Some(token),
        access_token_expires_at: Some(granted.token.expires).filter(|_| !old),
        lease_expires_at: Some(granted.expires),
        cancel: false,
        status: Some("leased".to_owned()),
        domain_id: Some(server.domain_id),
        domain_server_url: Some(server.base.clone()),
        task: TaskSpec {
            id: granted.task,
            job_id: Some(granted.job),
            capability: request.capability.to_string(),
            inputs_cids: request.inputs_cids.clone(),
            outputs_prefix: request.outputs_prefix.clone(),
            meta: request.meta.clone(),
            extra: rest.map(|(name, value)| (name.to_owned(), value)).collect(),
        },
        extra: Map::new(),
    }
}

/// `POST /tasks/{id}/heartbeat`
pub(super) async fn heartbeat(
    State(server): State<Arc<Inner>>,
    Path(task): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let request: Result<HeartbeatRequest, Refusal> = read_json(body, REPORT_BYTES_MAX).await;
    for_node(&server, &headers, |node| {
        let (task, request) = (task_id(&task)?, request?);
        let now = server.now();
        let heartbeat = server.plane().heartbeat(task, node.id, request.progress, request.events, now)?;
        server.changed();
        let old = server.form() == WireForm::Old;
        let mut answer = HeartbeatResponse {
            domain_id: Some(server.domain_id).filter(|_| !old),
            domain_server_url: Some(server.base.clone()).filter(|_| !old),
            ..HeartbeatResponse::default()
        };
        match heartbeat {
            HeartbeatAnswer::Cancel => answer.cancel = Some(true),
            HeartbeatAnswer::Extended { expires, token } => {
                answer.cancel = Some(false);
                answer.status = Some("running".to_owned()).filter(|_| !old);
                answer.lease_expires_at = Some(expires);
                if let Some(token) = token {
                    answer.access_token = Some(server.task_token(task, &token, node.id, now));
                    answer.access_token_expires_at = Some(token.expires).filter(|_| !old);
                }
            }
        }
        ok(&answer)
    })
}

/// `POST /tasks/{id}/complete`
pub(super) async fn complete(
    State(server): State<Arc<Inner>>,
    Path(task): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let request: Result<CompleteRequest, Refusal> = read_json(body, REPORT_BYTES_MAX).await;
    for_node(&server, &headers, |node| {
        let (task, request) = (task_id(&task)?, request?);
        server.plane().complete(task, node.id, request.output_cids, request.meta, server.now())?;
        tracing::debug!(task_id = %task, "completed");
        server.changed();
        report_answer()
    })
}

/// `POST /tasks/{id}/fail`
pub(super) async fn fail(
    State(server): State<Arc<Inner>>,
    Path(task): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let request: Result<FailRequest, Refusal> = read_json(body, REPORT_BYTES_MAX).await;
    for_node(&server, &headers, |node| {
        let (task, request) = (task_id(&task)?, request?);
        let meta = json!({ "reason": request.reason, "details": request.details });
        server.plane().fail(task, node.id, meta, true, server.now())?;
        tracing::debug!(task_id = %task, "failed");
        server.changed();
        report_answer()
    })
}

fn report_answer() -> Answer {
    ok(&empty_object())
}

fn task_id(text: &str) -> Result<Uuid, Refusal> {
    Uuid::parse_str(text).map_err(|_| Refusal::new(StatusCode::NOT_FOUND, "no such task: the id is not a UUID"))
}
