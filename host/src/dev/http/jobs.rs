//! The author's side of the task service (posemesh.md section 4.13).

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, RawQuery, State},
    http::{HeaderMap, StatusCode},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Answer, JOB_BYTES_MAX, Refusal, ok, pairs, read_json};
use crate::dev::{
    Inner,
    plane::{
        jobs::{JobRefusal, TaskRequest, fingerprint, parse},
        view::Listing,
    },
};

/// The status words of jobs.
const STATUSES: [&str; 5] = ["pending", "running", "completed", "failed", "canceled"];

/// `POST /jobs`
pub(super) async fn create(State(server): State<Arc<Inner>>, headers: HeaderMap, body: Body) -> Answer {
    server.author(&headers)?;
    let body: Value = read_json(body, JOB_BYTES_MAX).await?;
    let key = idempotency_key(&headers)?.map(|key| (key, fingerprint(&body)));
    let request = parse(body, server.domain_id).map_err(refused)?;
    let now = server.now();
    let job = server.plane().create(request, key, now).map_err(refused)?;
    server.changed();
    ok(&json!({ "job_id": job }))
}

/// `POST /jobs/estimate`: every job is free of charge here.
pub(super) async fn estimate(State(server): State<Arc<Inner>>, headers: HeaderMap, body: Body) -> Answer {
    server.author(&headers)?;
    let body: Value = read_json(body, JOB_BYTES_MAX).await?;
    let request = parse(body, server.domain_id).map_err(refused)?;
    let free = |task: &TaskRequest| {
        json!({
            "label": task.label, "stage": &*task.stage, "capability": &*task.capability, "mode": task.mode.text(),
            "billing_units": "0", "estimated_credit_cost": "0",
        })
    };
    ok(&json!({ "total": "0", "tasks": request.tasks.iter().map(free).collect::<Vec<_>>() }))
}

/// `GET /jobs`
pub(super) async fn list(State(server): State<Arc<Inner>>, headers: HeaderMap, RawQuery(query): RawQuery) -> Answer {
    server.author(&headers)?;
    let listing = listing(&pairs(query.as_deref()), server.domain_id)?;
    let (items, next) = server.plane().list(&listing, server.now());
    ok(&json!({ "items": items, "next_cursor": next.map(|serial| BASE64.encode(serial.to_be_bytes())) }))
}

fn listing(query: &[(String, String)], domain_id: Uuid) -> Result<Listing, Refusal> {
    let mut listing = Listing { limit: 50, before: None, status: None, capabilities: Vec::new(), match_all: false };
    for (name, value) in query {
        match &**name {
            "domain_id" if Uuid::parse_str(value) != Ok(domain_id) => {
                return Err(Refusal::bad(format!("domain_id is not {domain_id}, the only domain of this dev server")));
            }
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=100).contains(limit));
                listing.limit = limit.ok_or_else(|| Refusal::bad("limit is not a number from 1 to 100"))?;
            }
            "cursor" if !value.is_empty() => {
                let bytes = BASE64.decode(value).ok().and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
                let bytes = bytes.ok_or_else(|| Refusal::bad("cursor is not from this service"))?;
                listing.before = Some(u64::from_be_bytes(bytes));
            }
            "status" if !STATUSES.contains(&&**value) => {
                return Err(Refusal::bad(format!("status is none of {}", STATUSES.join(", "))));
            }
            "status" => listing.status = Some(value.clone()),
            "capabilities" => listing.capabilities.push(value.clone()),
            "match_all_capabilities" => match &**value {
                "true" => listing.match_all = true,
                "false" => listing.match_all = false,
                _ => return Err(Refusal::bad("match_all_capabilities is neither true nor false")),
            },
            _ => {}
        }
    }
    Ok(listing)
}

/// `GET /jobs/{id}`
pub(super) async fn get(State(server): State<Arc<Inner>>, Path(id): Path<String>, headers: HeaderMap) -> Answer {
    server.author(&headers)?;
    let id = job_id(&id)?;
    let job = server.plane().job(id, server.now()).ok_or_else(no_job)?;
    ok(&job)
}

/// `POST /jobs/{id}/cancel`
pub(super) async fn cancel(State(server): State<Arc<Inner>>, Path(id): Path<String>, headers: HeaderMap) -> Answer {
    server.author(&headers)?;
    let id = job_id(&id)?;
    let mut plane = server.plane();
    let updated_at = plane.cancel(id, server.now()).ok_or_else(no_job)?;
    match plane.job_status(id) {
        None | Some("canceled") => {}
        Some(status) => {
            return Err(Refusal::new(StatusCode::CONFLICT, format!("the job is {status} and cannot be canceled")));
        }
    }
    drop(plane);
    server.changed();
    ok(&json!({ "id": id, "status": "canceled", "updated_at": updated_at }))
}

/// `GET /nodes/busy`
pub(super) async fn busy(State(server): State<Arc<Inner>>, headers: HeaderMap) -> Answer {
    server.author(&headers)?;
    let nodes = server.plane().busy(server.now());
    ok(&json!({ "nodes": nodes }))
}

fn job_id(text: &str) -> Result<Uuid, Refusal> {
    Uuid::parse_str(text).map_err(|_| no_job())
}

fn no_job() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "no such job")
}

pub(in crate::dev) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let fits = (1..=128).contains(&value.len()) && value.as_bytes().iter().all(|byte| (0x21..=0x7e).contains(byte));
    match value.to_str() {
        Ok(key) if fits => Ok(Some(key.to_owned())),
        _ => Err(Refusal::bad("Idempotency-Key is not 1 to 128 visible ASCII characters")),
    }
}

pub(in crate::dev) fn refused(refusal: JobRefusal) -> Refusal {
    match refusal {
        JobRefusal::Invalid(text) => Refusal::bad(text),
        JobRefusal::KeyReused => {
            Refusal::new(StatusCode::CONFLICT, "this Idempotency-Key was used for another request")
        }
    }
}
