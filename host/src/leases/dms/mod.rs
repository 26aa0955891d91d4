//! The posemesh task service (DMS) as a [`super::LeaseSource`].
//!
//! Start at the [`LeaseSource`] implementation. Each operation is one HTTP call. It is repeated once with a fresh token
//! when the old one is rejected. `wire` has the JSON, `report` the bodies of reports. Received bodies are never logged:
//! a lease holds credentials.

mod address;
mod report;
#[cfg(test)]
mod tests;
pub mod wire;

use std::{
    borrow::Cow,
    cell::Cell,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, StatusCode, Uri, header,
    uri::{self, PathAndQuery},
};
use jiff::Timestamp;
use serde::de::DeserializeSeed as _;
use serde_json::{
    Value,
    value::{RawValue, to_raw_value},
};
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::fmt::Hyphenated;

pub use self::address::address;
use self::{
    address::At,
    wire::{Beat, HeartbeatResponse, LeaseFacts, Members, Seek},
};
use super::{
    Admission, LeaseError, LeaseSource, PlaneFacts, PlaneReadiness, Renewal, is_credential, recent_tokens::RecentTokens,
};
use crate::{
    auth::{Auth, TokenSource},
    model::{
        AnnouncedData, BootInstant, Capability, CapabilityError, Lease, Outcome, Pending, PlaneName, ReportAddress,
        TaskResult, Term, Token, millis,
    },
    transport::{self, Answer, Client, Need, TransportError},
};

/// The name of this control plane, unless the configuration gives another one.
pub const DEFAULT_NAME: &str = "posemesh";
/// The term of a lease with an expiry in the past, from a service that sends no `Date`. Its clock is behind by an
/// unknown time. So heartbeats must be early enough for a lease of 4 s.
const TERM_UNKNOWN_CLOCK: Duration = Duration::from_secs(5);
/// Longest time limit of one call.
const LIMIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// The address of the service, and its time limits.
#[derive(Clone, Debug)]
pub struct Config {
    /// Base URL, such as `https://dms.example/v1`. A trailing slash is ignored.
    pub base: Url,
    /// The time limit of each call, with its repeat after a 401.
    pub request_timeout: Duration,
    /// The name of this control plane in the configuration.
    pub name: PlaneName,
}

impl Config {
    /// The default settings for this base URL.
    #[must_use]
    pub fn new(base: Url) -> Self {
        let name = PlaneName::parse(DEFAULT_NAME).expect("the default name is valid");
        Self { base, request_timeout: Duration::from_secs(60), name }
    }
}

/// The client for the task service.
pub struct Dms {
    facts: PlaneFacts,
    /// The sign-in, until `run` starts it.
    auth: Mutex<Option<Auth>>,
    /// `…/tasks`, or why the URL is not allowed.
    tasks: Result<Uri, String>,
    limit: Duration,
    client: Client,
    tokens: TokenSource,
    /// The tokens of tasks. No excerpt shows them.
    task_tokens: RecentTokens,
    /// The latest token as a header. To build one of 900 bytes takes 1.3 µs, 2.7 % of a no-op task.
    bearer: Mutex<Option<(Token, HeaderValue)>>,
}

/// A request that can be sent again.
struct Call {
    method: Method,
    uri: Uri,
    /// JSON, or empty.
    body: Bytes,
    need: Need,
}

impl Dms {
    /// Creates the adapter. It makes no call yet.
    #[must_use]
    pub fn new(config: Config, client: Client, auth: Auth) -> Self {
        let dms = Self::with_tokens(config, client, auth.address().into(), auth.tokens());
        Self { auth: Mutex::new(Some(auth)), ..dms }
    }

    /// Creates an adapter with an existing token source. [`LeaseSource::run`] then does not sign in.
    #[must_use]
    pub fn with_tokens(config: Config, client: Client, node: Arc<str>, tokens: TokenSource) -> Self {
        let facts = PlaneFacts {
            name: config.name,
            base_url: config.base.as_str().trim_end_matches('/').into(),
            node,
            admission: Admission::SlotFirst,
            heartbeat_every: None,
        };
        Self {
            facts,
            auth: Mutex::default(),
            tasks: tasks_of(config.base, &client),
            limit: config.request_timeout.clamp(Duration::from_secs(1), LIMIT_MAX),
            client,
            tokens,
            task_tokens: RecentTokens::default(),
            bearer: Mutex::default(),
        }
    }

    async fn token(&self, until: BootInstant) -> Result<Token, LeaseError> {
        let token = match self.tokens.now() {
            Some(token) => Some(token),
            None => until.before(self.tokens.bearer()).await,
        };
        match token {
            Some(token) => token.map_err(|err| LeaseError::NoToken(err.to_string())),
            None => Err(LeaseError::NoToken("the login did not finish within the time limit of this call".to_owned())),
        }
    }

    /// The header value for `token`.
    fn bearer(&self, token: &Token) -> Result<HeaderValue, LeaseError> {
        let mut last = self.bearer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, bearer)) = &*last
            && known == token
        {
            return Ok(bearer.clone());
        }
        let mut bearer = HeaderValue::try_from(format!("Bearer {}", token.expose()))
            .map_err(|_| LeaseError::NoToken("the node token holds characters that are invalid in a header".into()))?;
        bearer.set_sensitive(true);
        *last = Some((token.clone(), bearer.clone()));
        Ok(bearer)
    }

    /// Makes one call, and repeats it once with a fresh token after a 401. Returns any other status to the caller, with
    /// the used token, so that the caller can remove it from excerpts.
    async fn exchange(&self, call: Call, until: BootInstant) -> Result<(Answer, Token), LeaseError> {
        let mut started = BootInstant::now();
        let until = until.min(started + self.limit);
        let mut repeated = false;
        loop {
            let token = self.token(until).await?;
            let request = call.request(self.bearer(&token)?);
            let answer = self.client.call_until(request, call.need, until).await;
            let answer = answer.map_err(|err| call.unread(err))?;
            let now = BootInstant::now();
            let (method, url, elapsed_ms) = (&call.method, &call.uri, millis(now - started));
            tracing::debug!(%method, %url, status = answer.status.as_u16(), elapsed_ms, "control plane answered");
            if answer.status.is_success() {
                self.tokens.accepted(&token);
            }
            if answer.status != StatusCode::UNAUTHORIZED {
                return Ok((answer, token));
            }
            if std::mem::replace(&mut repeated, true) {
                return Err(LeaseError::Unauthorized);
            }
            self.tokens.rejected(&token);
            started = now;
        }
    }

    async fn send_report(&self, to: &ReportAddress, report: report::Report) -> Result<(), LeaseError> {
        let call = self.post(to, report.verb, report.body, Need::Status)?;
        let (answer, token) = self.exchange(call, BootInstant::NEVER).await?;
        if answer.status.is_success() { Ok(()) } else { Err(self.refused_for(to, &answer, &token)) }
    }

    fn post(&self, to: &ReportAddress, verb: &str, body: String, need: Need) -> Result<Call, LeaseError> {
        let task = address::task(to)?;
        let mut parts = self.tasks()?.clone().into_parts();
        let tasks = parts.path_and_query.as_ref().map_or("", PathAndQuery::as_str);
        let mut id = [0; Hyphenated::LENGTH];
        let path = [tasks, "/", task.as_hyphenated().encode_lower(&mut id), "/", verb].concat();
        let path = PathAndQuery::from_maybe_shared(Bytes::from(path));
        parts.path_and_query = Some(path.expect("a path, an id and a word"));
        let uri = Uri::from_parts(parts).expect("only the path was changed");
        Ok(Call { method: Method::POST, uri, body: body.into(), need })
    }

    fn refused(&self, answer: &Answer, token: &Token) -> LeaseError {
        LeaseError::Refused {
            status: answer.status.as_u16(),
            excerpt: self.excerpt(answer, token),
            retry_after: transport::retry_after(&answer.headers),
        }
    }

    fn refused_for(&self, to: &ReportAddress, answer: &Answer, token: &Token) -> LeaseError {
        match answer.status.as_u16() {
            status @ (404 | 409 | 410) => LeaseError::Gone { task: to.task.clone(), status },
            _ => self.refused(answer, token),
        }
    }

    fn excerpt(&self, answer: &Answer, token: &Token) -> String {
        self.task_tokens.excerpt(&answer.body, &[token.expose()])
    }

    fn remember(&self, token: Option<&Token>) {
        if let Some(token) = token {
            self.task_tokens.remember(token);
        }
    }

    fn tasks(&self) -> Result<&Uri, LeaseError> {
        self.tasks.as_ref().map_err(|reason| LeaseError::Unreachable(reason.clone()))
    }
}

impl Call {
    /// Converts a transport error. The beginning of a lease that is too large may still name its task.
    fn unread(&self, err: TransportError) -> LeaseError {
        let reason = err.to_string();
        match err {
            TransportError::Oversize { begin, .. } if self.method == Method::GET => match task_id(&begin.0) {
                None => LeaseError::Unreachable(reason),
                task => LeaseError::Malformed { task, reason },
            },
            _ => LeaseError::Unreachable(reason),
        }
    }

    fn request(&self, bearer: HeaderValue) -> Request<transport::Body> {
        let mut request = Request::new(transport::full(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        let headers = request.headers_mut();
        headers.insert(header::AUTHORIZATION, bearer);
        if !self.body.is_empty() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        request
    }
}

/// The URL of the tasks below `base`. The error says why the URL is not allowed.
fn tasks_of(mut base: Url, client: &Client) -> Result<Uri, String> {
    base.set_query(None);
    base.set_fragment(None);
    client.check(&base).map_err(|err| err.to_string())?;
    let tasks = format!("{}/tasks", base.as_str().trim_end_matches('/'));
    let expected_url = || format!("{tasks}: expected a URL");
    let uri: Uri = tasks.parse().map_err(|_: uri::InvalidUri| expected_url())?;
    if uri.authority().is_none() { Err(expected_url()) } else { Ok(uri) }
}

#[async_trait]
impl LeaseSource for Dms {
    fn facts(&self) -> &PlaneFacts {
        &self.facts
    }

    async fn run(&self, stop: CancellationToken) {
        let auth = self.auth.lock().unwrap_or_else(PoisonError::into_inner).take();
        match auth {
            Some(auth) => auth.run(stop).await,
            None => stop.cancelled().await,
        }
    }

    fn readiness(&self) -> PlaneReadiness {
        match self.tokens.now() {
            Some(Ok(_)) => PlaneReadiness::Ready,
            Some(Err(err)) => PlaneReadiness::NotReady(err.to_string()),
            None => PlaneReadiness::NotReady("the node signs in".to_owned()),
        }
    }

    async fn until_ready(&self) -> bool {
        self.tokens.available().await
    }

    async fn poll(&self) -> Result<Option<Lease>, LeaseError> {
        let call = Call { method: Method::GET, uri: self.tasks()?.clone(), body: Bytes::new(), need: Need::Body };
        let (answer, token) = self.exchange(call, BootInstant::NEVER).await?;
        match answer.status {
            StatusCode::NO_CONTENT => Ok(None),
            StatusCode::CONFLICT => Err(LeaseError::Busy),
            StatusCode::NOT_FOUND => Err(LeaseError::NoSuchPath { excerpt: self.excerpt(&answer, &token) }),
            status if status.is_success() => {
                lease(&answer).inspect(|lease| self.remember(lease.token.as_ref())).map(Some)
            }
            _ => Err(self.refused(&answer, &token)),
        }
    }

    async fn heartbeat(&self, to: &ReportAddress, beat: &Pending, until: BootInstant) -> Result<Renewal, LeaseError> {
        let body = Beat { progress: &beat.progress, events: &beat.events };
        let body = serde_json::to_string(&body).expect("JSON values are JSON");
        let (answer, token) = self.exchange(self.post(to, "heartbeat", body, Need::Body)?, until).await?;
        if !answer.status.is_success() {
            return Err(self.refused_for(to, &answer, &token));
        }
        // Decoding `null` or a list would give an error about the struct. This error states what was received.
        if !answer.body.trim_ascii_start().starts_with(b"{") && answer.json::<Value>().is_ok() {
            let reason = format!("the heartbeat's answer is {} bytes of JSON, not an object", answer.body.len());
            return Err(LeaseError::Malformed { task: None, reason });
        }
        match answer.json::<HeartbeatResponse>() {
            Ok(response) => renewal(response, &answer, to).inspect(|renewal| self.remember(renewal.token.as_ref())),
            Err(err) => Err(LeaseError::Malformed { task: None, reason: err.to_string() }),
        }
    }

    async fn report(&self, to: &ReportAddress, task_result: &TaskResult) -> Result<(), LeaseError> {
        match report::report(&At::read(to)?, task_result) {
            Some(report) => self.send_report(to, report).await,
            None => Ok(()),
        }
    }

    async fn reject(&self, to: &ReportAddress, why: &Outcome) -> Result<(), LeaseError> {
        match report::setup_failure(why) {
            Some(report) => self.send_report(to, report).await,
            None => Ok(()),
        }
    }
}

/// Reads the answer to a poll as a lease. The error about an unusable lease shows only its size.
fn lease(answer: &Answer) -> Result<Lease, LeaseError> {
    let malformed = |reason: String| LeaseError::Malformed { task: task_id(&answer.body), reason };
    let mut document: Members = answer.json().map_err(|err| malformed(err.to_string()))?;
    let envelope = LeaseFacts::read(&document).map_err(|err| malformed(answer.not_json(&err).to_string()))?;
    document.0.retain(|(key, _)| !is_credential(key));
    let document = to_raw_value(&document).expect("JSON is JSON");
    let task = envelope.task;
    let capability = Capability::from_wire(&task.capability).map_err(|err| {
        let why = match err {
            // The error must not quote an unusable lease.
            CapabilityError::Character(_) => "its capability holds white space or a control character".to_owned(),
            other => other.to_string(),
        };
        malformed(format!("the lease of {} bytes has no valid capability: {why}", answer.body.len()))
    })?;
    let time_limit = super::wall_time(&budgets_of_meta(task.meta)).map_err(malformed)?;
    Ok(Lease {
        address: address(task.id, task.job_id, envelope.domain_id, capability.as_str()),
        job: task.job_id,
        attempt: task.attempts.and_then(|text| text.get().parse().ok()),
        capability,
        expires_at: lease_end(answer, envelope.lease_expires_at.or_else(|| time(&value(task.lease_expires_at)))),
        hard_deadline: None,
        time_limit,
        tokens_max: None,
        cancelled: envelope.cancel,
        data: AnnouncedData::DomainServer {
            server: filled(envelope.domain_server_url).or_else(|| server_of_meta(&value(task.meta))),
            domain: envelope.domain_id,
        },
        token: filled(envelope.access_token).map(Token::new),
        token_expires_at: local_time(answer, envelope.access_token_expires_at),
        inputs: task.inputs_cids,
        outputs_prefix: task.outputs_prefix,
        traceparent: None,
        document,
        hold: None,
    })
}

/// Decodes a member of a lease whose content is needed.
fn value(text: Option<&RawValue>) -> Value {
    text.and_then(|text| serde_json::from_str(text.get()).ok()).unwrap_or_default()
}

/// The address of the task in an unusable lease. The rest of the body may be missing or invalid.
fn task_id(body: &[u8]) -> Option<ReportAddress> {
    let id = Cell::new(None);
    let lease = Seek { path: &["task", "id"], id: &id };
    // The rest of the body is irrelevant.
    let _ = lease.deserialize(&mut serde_json::Deserializer::from_slice(body));
    id.get().map(|task| address(task, None, None, ""))
}

fn renewal(response: HeartbeatResponse, answer: &Answer, to: &ReportAddress) -> Result<Renewal, LeaseError> {
    let address = renamed(&response, to)?;
    let inner = response.task.as_ref();
    let ends = response.lease_expires_at.or_else(|| time(inner?.extra.get("lease_expires_at")?));
    let ends = lease_end(answer, ends);
    Ok(Renewal {
        token: filled(response.access_token).map(Token::new),
        token_expires_at: local_time(answer, response.access_token_expires_at),
        // An answer without an expiry extends the lease by its last term.
        term: ends.map_or(Term::SameTerm, Term::Until),
        hard_deadline: None,
        cancel: response.cancel == Some(true) || response.status.as_deref().is_some_and(is_over),
        address,
        capability: inner.map(|task| task.capability.clone()),
        data: Some(AnnouncedData::DomainServer {
            server: filled(response.domain_server_url).or_else(|| inner.and_then(|task| server_of_meta(&task.meta))),
            domain: response.domain_id,
        }),
    })
}

/// The new address, if the answer changes the id of the task, its job or its domain.
fn renamed(response: &HeartbeatResponse, to: &ReportAddress) -> Result<Option<ReportAddress>, LeaseError> {
    let inner = response.task.as_ref();
    let task = inner.map(|task| task.id).or(response.task_id);
    let job = inner.map_or(response.job_id, |task| task.job_id);
    if (task, job, response.domain_id) == (None, None, None) {
        return Ok(None);
    }
    let old = At::read(to)?;
    let now = At {
        task: task.unwrap_or(old.task),
        job: job.or(old.job),
        domain_id: response.domain_id.or(old.domain_id),
        capability: Cow::Borrowed(&old.capability),
    };
    Ok((now != old).then(|| now.address()))
}

/// The expiry of a lease by the local clock. An expiry in the past counts as a short term if the clock of the control
/// plane is unknown. Otherwise it is ignored.
fn lease_end(answer: &Answer, at: Option<Timestamp>) -> Option<BootInstant> {
    let end = local_time(answer, at);
    let unknown = end.is_none() && at.is_some() && !answer.clock_is_known();
    if unknown { Some(BootInstant::now() + TERM_UNKNOWN_CLOCK) } else { end }
}

/// Converts a time of the control plane to the local clock. `None`: the time had passed before the request was sent.
/// It cannot apply to a lease or token that was just issued.
fn local_time(answer: &Answer, at: Option<Timestamp>) -> Option<BootInstant> {
    let at = at?;
    let converted = answer.local_time(at);
    if converted.is_none() {
        tracing::debug!(at = %at, "a time of the control plane is in the past and is ignored");
    }
    converted
}

/// The values of a heartbeat's `status` that mean a cancel (posemesh.md section 10.3). `canceled` of the job API is not
/// one of them.
fn is_over(status: &str) -> bool {
    matches!(status, "cancelled" | "failed" | "completed")
}

/// Newer control planes may send the expiry of the lease inside the task only.
fn time(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

/// The fallback of posemesh.md section 4.6: older control planes put the domain server into the metadata of the task.
fn server_of_meta(meta: &Value) -> Option<String> {
    let at = |pointer: &str| filled(meta.pointer(pointer).and_then(Value::as_str).map(str::to_owned));
    at("/domain_server_url").or_else(|| at("/legacy/domain_server_url"))
}

/// The limits in the metadata of a task. The rest of the metadata may be large, and is not decoded.
fn budgets_of_meta(meta: Option<&RawValue>) -> Value {
    let members = meta.and_then(|meta| serde_json::from_str::<Members>(meta.get()).ok());
    let members = members.map(|Members(members)| members).unwrap_or_default();
    value(members.into_iter().rfind(|(key, _)| key == "budgets").map(|(_, budgets)| budgets))
}

fn filled(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.trim().is_empty())
}
