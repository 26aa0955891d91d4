//! The calls of authors. The original has no call that creates a run; this one is our own.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::{before_verb, property, require_json};
use crate::{
    dev::{
        Inner,
        http::{Answer, JOB_BYTES_MAX, Refusal, answer, from_this_machine, idempotency_key, ok, read_json, refused},
        plane::{jobs::fingerprint, runs::NewRun},
    },
    leases::node_runtime::lease::{BudgetConstraints, RunSpec},
};

/// Most bytes of the spec and the trace id of a run. A gRPC message has at most 4 MiB; the rest is for the ids of the
/// lease and its token.
const LEASE_BYTES_MAX: usize = (4 << 20) - 4096;
/// Runs of one list.
const LIST_MAX: usize = 100;
/// The budgets that the original gives each run.
const TOKENS: i32 = 4000;
const SECONDS: i32 = 60;

/// The body of `POST /runs`, and the description of a run in the queue.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Description {
    #[serde(default)]
    agent_id: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    deployment_id: Option<String>,
    #[serde(default)]
    input_ref: BTreeMap<String, String>,
    #[serde(default)]
    budgets: Budgets,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    #[serde(default)]
    trace_id: Option<String>,
    #[serde(default = "three", skip_serializing)]
    max_attempts: u32,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct Budgets {
    max_tokens: i32,
    max_duration_seconds: i32,
}

impl Default for Budgets {
    fn default() -> Self {
        Self { max_tokens: TOKENS, max_duration_seconds: SECONDS }
    }
}

fn three() -> u32 {
    3
}

impl Description {
    /// Reads the fields of a queued run.
    pub(super) fn of(fields: &Value) -> Self {
        Self::deserialize(fields).expect("a queued run was written from this type")
    }

    pub(super) fn trace_id(&self) -> String {
        self.trace_id.clone().unwrap_or_default()
    }

    /// Adds a token for this dev server, if the run names it as its domain server. The author's side never shows it.
    pub(super) fn add_token(&mut self, server: &Inner, token: impl FnOnce() -> String) {
        let has = |key, wanted: &str| self.metadata.get(key).is_some_and(|value| value.trim_end_matches('/') == wanted);
        if has("domain_id", &server.domain_id.to_string()) && has("domain_server_url", &server.base) {
            self.metadata.entry("access_token".to_owned()).or_insert_with(token);
        }
    }

    pub(super) fn into_spec(self) -> RunSpec {
        RunSpec {
            agent_id: self.agent_id,
            version: self.version,
            deployment_id: self.deployment_id.unwrap_or_default(),
            input_ref: self.input_ref.into_iter().collect(),
            budgets: Some(BudgetConstraints {
                max_tokens: self.budgets.max_tokens,
                max_duration_seconds: self.budgets.max_duration_seconds,
            }),
            metadata: self.metadata.into_iter().collect(),
        }
    }
}

/// `POST /runs`
pub(super) async fn create(State(server): State<Arc<Inner>>, headers: HeaderMap, body: Body) -> Answer {
    require_json(&headers)?;
    let body: Value = read_json(body, JOB_BYTES_MAX).await?;
    let key = idempotency_key(&headers)?.map(|key| (key, fingerprint(&body)));
    let run = serde_json::from_value(body);
    let mut run: Description = run.map_err(|err| Refusal::bad(format!("the run cannot be read: {err}")))?;
    let names_runner = !run.agent_id.trim().is_empty() || run.metadata.contains_key("capability");
    if !names_runner {
        return Err(Refusal::bad("agentId is blank and metadata.capability is missing; name one of them"));
    }
    run.trace_id.get_or_insert_with(|| Uuid::new_v4().to_string());
    let bytes = run.input_ref.iter().chain(&run.metadata).map(|(name, value)| name.len() + value.len()).sum();
    let max_attempts = run.max_attempts;
    let fields = serde_json::to_value(run).expect("a description is plain JSON");
    let lease = Description::of(&fields);
    let size = lease.trace_id().len() + lease.into_spec().encoded_len();
    if size > LEASE_BYTES_MAX {
        let text = format!(
            "a lease of the run has {size} bytes, expected at most {LEASE_BYTES_MAX} (a gRPC message has at most 4 MiB); \
             put its data on a domain server"
        );
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text));
    }
    let now = server.now();
    let mut plane = server.plane();
    let id = plane.create_run(NewRun { fields, bytes, max_attempts }, key, now).map_err(refused)?;
    let shown = plane.run(id, now);
    drop(plane);
    server.changed();
    let mut created = answer(StatusCode::CREATED, &shown);
    let place = HeaderValue::try_from(format!("/v1/runs/{id}")).expect("a UUID is a header value");
    created.headers_mut().insert(header::LOCATION, place);
    Ok(created)
}

/// `GET /runs`: the newest ones.
pub(super) async fn list(State(server): State<Arc<Inner>>, headers: HeaderMap) -> Answer {
    from_this_machine(&headers)?;
    let runs = server.plane().runs(LIST_MAX, server.now());
    ok(&runs)
}

/// `GET /runs/{id}`
pub(super) async fn get(State(server): State<Arc<Inner>>, Path(id): Path<String>, headers: HeaderMap) -> Answer {
    from_this_machine(&headers)?;
    let run = server.plane().run(run_id(&id)?, server.now()).ok_or_else(no_run)?;
    ok(&run)
}

/// `POST /runs/{id}:cancel`
pub(super) async fn cancel(
    State(server): State<Arc<Inner>>,
    Path(segment): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    require_json(&headers)?;
    let id = run_id(before_verb(&segment, "cancel")?)?;
    let body: Value = read_json(body, JOB_BYTES_MAX).await?;
    if property(&body, "reason").as_str().is_none_or(|reason| reason.trim().is_empty()) {
        return Err(Refusal::bad("Reason is required"));
    }
    let now = server.now();
    let mut plane = server.plane();
    plane.run(id, now).ok_or_else(no_run)?;
    plane.cancel(id, now);
    let run = plane.run(id, now).ok_or_else(no_run)?;
    drop(plane);
    server.changed();
    match run["status"].as_str() {
        Some("cancelled") => ok(&run),
        // The original overwrites the end of a run.
        status => {
            let text = format!("the run is {} and cannot be cancelled", status.unwrap_or_default());
            Err(Refusal::new(StatusCode::CONFLICT, text))
        }
    }
}

fn run_id(text: &str) -> Result<Uuid, Refusal> {
    Uuid::parse_str(text).map_err(|_| no_run())
}

fn no_run() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "no such run")
}
