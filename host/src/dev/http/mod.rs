//! The posemesh wire, and what both wires share: routes, bodies, bearer tokens, rejections. This module identifies the
//! caller and checks that the request is readable. All other decisions belong to the state.

mod data;
mod dds;
mod dms;
mod info;
mod jobs;
mod parts;
mod spool;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use uuid::Uuid;

#[cfg(feature = "grpc")]
pub(super) use self::{
    info::from_this_machine,
    jobs::{idempotency_key, refused},
};

use super::{
    Inner,
    identity::Node,
    plane::{Admission, CallRefusal},
    store::StoreError,
};

/// Largest body of a sign-in or registration, in bytes.
pub(super) const IDENTITY_BYTES_MAX: usize = 64 * 1024;
/// Largest body of a heartbeat or report, in bytes. Common limits of nodes are 64 KiB each of progress, events and
/// details. Lists of artifacts are long.
const REPORT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Largest body of a job, in bytes.
pub(super) const JOB_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How much of a rejected body is read, in bytes. Without it the sender would see a broken connection instead of the
/// answer.
const REFUSED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// All routes of the wires that are served.
pub(super) fn router(server: Arc<Inner>) -> Router {
    let own = Router::new().route("/world", get(info::description)).route("/requests", get(info::requests));
    let domain = Router::new()
        .route("/data", get(data::find).post(data::create).put(data::replace))
        .route("/data/multipart", post(parts::post).put(parts::put).delete(parts::abort))
        .route("/data/{id}", get(data::by_id).delete(data::delete));
    let (mut all, mut planes) = (Router::new(), Router::new());
    if server.config.wires.has_dms() {
        all = all
            .route("/internal/v1/auth/siwe/request", post(dds::nonce))
            .route("/internal/v1/auth/siwe/verify", post(dds::verify))
            .route("/internal/v1/nodes/register-wallet", post(dds::register))
            .route("/internal/v1/nodes/register", post(dds::register_url));
        planes = planes
            .route("/tasks", get(dms::lease))
            .route("/tasks/{id}/heartbeat", post(dms::heartbeat))
            .route("/tasks/{id}/complete", post(dms::complete))
            .route("/tasks/{id}/fail", post(dms::fail))
            .route("/jobs", post(jobs::create).get(jobs::list))
            .route("/jobs/estimate", post(jobs::estimate))
            .route("/jobs/{id}", get(jobs::get))
            .route("/jobs/{id}/cancel", post(jobs::cancel))
            .route("/nodes/busy", get(jobs::busy));
    }
    #[cfg(feature = "grpc")]
    if server.config.wires.has_node_runtime() {
        planes = planes.merge(super::node_runtime::routes());
    }
    all.route("/api/v1/info", get(info::uploads))
        .nest("/api/v1/domains/{domain}", domain)
        .nest("/v1", planes)
        .nest("/dev/v1", own)
        .fallback(|| async { Refusal::new(StatusCode::NOT_FOUND, "no such path") })
        .method_not_allowed_fallback(|| async { Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "no such method here") })
        .with_state(server)
}

/// A request that was rejected: a status and one line.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    text: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    pub(super) fn bad(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, text)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        answer(self.status, &json!({ "error": self.text }))
    }
}

impl From<StoreError> for Refusal {
    fn from(err: StoreError) -> Self {
        let status = match err {
            StoreError::Invalid(_) => StatusCode::BAD_REQUEST,
            StoreError::NoData(_) | StoreError::NoUpload(_) => StatusCode::NOT_FOUND,
            StoreError::Conflict(_) => StatusCode::CONFLICT,
            StoreError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            StoreError::Io(_) => {
                tracing::error!(event = "dev.storage_failed", error = %err, "domain data could not be stored or read");
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        Self::new(status, err.to_string())
    }
}

impl From<CallRefusal> for Refusal {
    fn from(gone: CallRefusal) -> Self {
        match gone {
            CallRefusal::Unknown => Self::new(StatusCode::NOT_FOUND, "no such task"),
            CallRefusal::NotHeld => Self::new(StatusCode::CONFLICT, "this node does not hold the task"),
        }
    }
}

pub(super) type Answer = Result<Response, Refusal>;

/// A JSON answer.
pub(super) fn answer(status: StatusCode, body: &impl Serialize) -> Response {
    let body = serde_json::to_vec(body).expect("answers are plain JSON");
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

pub(super) fn ok(body: &impl Serialize) -> Answer {
    Ok(answer(StatusCode::OK, body))
}

/// The node that sent the request, for the journal.
#[derive(Clone, Copy)]
pub(super) struct CallerNode(pub(super) Uuid);

/// Runs `handler` for the node that owns the bearer token.
fn for_node(server: &Inner, headers: &HeaderMap, handler: impl FnOnce(&Node) -> Answer) -> Response {
    let node = match server.node(headers) {
        Ok(node) => node,
        Err(refusal) => return refusal.into_response(),
    };
    let mut response = handler(&node).unwrap_or_else(IntoResponse::into_response);
    response.extensions_mut().insert(CallerNode(node.id));
    response
}

pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn unauthorized(text: &str) -> Refusal {
    Refusal::new(StatusCode::UNAUTHORIZED, text)
}

impl Inner {
    /// The node that owns the bearer token.
    fn node(&self, headers: &HeaderMap) -> Result<Node, Refusal> {
        let node = bearer(headers).and_then(|token| self.identity().node(token, self.now()));
        node.ok_or_else(|| unauthorized("the node token is missing, unknown or expired"))
    }

    /// Requires an author's grant, for jobs.
    fn author(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let claims = bearer(headers).and_then(|token| self.tokens.read(token, self.now()));
        match claims {
            Some(claims) if claims.task.is_none() => Ok(()),
            _ => Err(unauthorized("the domain grant is missing, unknown or expired; GET /dev/v1/world issues one")),
        }
    }

    /// Requires a task's token or an author's grant, for data of `domain`.
    fn caller(&self, headers: &HeaderMap, domain: &str) -> Result<(), Refusal> {
        let token = bearer(headers).ok_or_else(|| unauthorized("the domain token is missing"))?;
        let now = self.now();
        let refused = || unauthorized("the domain token is unknown, expired, or its lease has ended");
        let Some(claims) = self.tokens.read(token, now) else {
            if let Some((task, _)) = self.tokens.read_expired(token).and_then(|claims| claims.task) {
                self.plane().refused(task);
            }
            return Err(refused());
        };
        if let Some((task, serial)) = claims.task
            && self.plane().admit(task, serial, now) == Admission::Closed
        {
            return Err(refused());
        }
        if Uuid::parse_str(domain) != Ok(claims.domain_id) {
            return Err(Refusal::new(StatusCode::FORBIDDEN, "invalid domain access token: it is for another domain"));
        }
        Ok(())
    }
}

/// Reads a JSON body. An empty body is read as an empty object.
pub(super) async fn read_json<T: DeserializeOwned>(body: Body, limit: usize) -> Result<T, Refusal> {
    let bytes = Limited::new(body, limit).collect().await.map_err(|err| {
        if err.is::<LengthLimitError>() {
            Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is larger than {limit} bytes"))
        } else {
            Refusal::bad("the body broke off")
        }
    })?;
    let bytes = bytes.to_bytes();
    let bytes = if bytes.is_empty() { &b"{}"[..] } else { &bytes[..] };
    serde_json::from_slice(bytes).map_err(|err| Refusal::bad(format!("the body is not the expected JSON: {err}")))
}

/// Reads and discards the body after a rejection, up to a limit.
pub(super) async fn drain(body: Body) {
    let mut body = Limited::new(body, REFUSED_BYTES_MAX);
    while let Some(Ok(_)) = body.frame().await {}
}

/// The pairs of a query string.
fn pairs(query: Option<&str>) -> Vec<(String, String)> {
    url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect()
}

/// Runs file system work on a blocking thread, so that it does not block the serving threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.expect("file system work does not panic").map_err(Refusal::from)
}

fn empty_object() -> Value {
    json!({})
}
