//! The posemesh task service (DMS) as a [`super::LeaseSource`].
//!
//! Start at the [`LeaseSource`] implementation: three verbs, each one HTTP call that is repeated
//! once with a fresh token when the old one is rejected. `wire` has the JSON, `report` the words
//! of a task's end. What has arrived is never logged: a lease holds credentials.

mod report;
#[cfg(test)]
mod tests;
pub mod wire;

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use http::{HeaderValue, Method, Request, StatusCode, header};
use jiff::Timestamp;
use serde_json::{
    Value,
    value::{RawValue, to_raw_value},
};
use url::Url;
use uuid::Uuid;

use self::wire::{HeartbeatRequest, HeartbeatResponse, LeaseFacts};
use super::{Kept, LeaseError, LeaseSource};
use crate::{
    auth::TokenSource,
    model::{Capability, CapabilityError, Lease, Moment, Outcome, Pending, TaskId, Token, Verdict, millis},
    transport::{self, Answer, Client},
};

/// Longest limit of one call; more would overflow no clock and help nobody.
const LIMIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// Where the service is and how long it may take.
#[derive(Clone, Debug)]
pub struct Config {
    /// Base URL, such as `https://dms.example/v1`; a trailing slash does not matter.
    pub base: Url,
    /// Limit of each verb, its repeat after a 401 included.
    pub request_timeout: Duration,
}

/// The task service as this node calls it.
pub struct Dms {
    base: Url,
    tasks: String,
    limit: Duration,
    client: Client,
    tokens: TokenSource,
}

/// How much of an answer matters.
#[derive(Clone, Copy)]
enum Need {
    Body,
    Status,
}

impl Dms {
    /// Makes the adapter; nothing is called yet.
    #[must_use]
    pub fn new(config: Config, client: Client, tokens: TokenSource) -> Self {
        let mut base = config.base;
        base.set_query(None);
        base.set_fragment(None);
        Self {
            tasks: format!("{}/tasks", base.as_str().trim_end_matches('/')),
            base,
            limit: config.request_timeout.clamp(Duration::from_secs(1), LIMIT_MAX),
            client,
            tokens,
        }
    }

    async fn bearer(&self, until: Moment) -> Result<Token, LeaseError> {
        match until.before(self.tokens.bearer()).await {
            Some(token) => token.map_err(|err| LeaseError::NoToken(err.to_string())),
            None => Err(LeaseError::NoToken("the login takes longer than this call may".to_owned())),
        }
    }

    async fn once(
        &self,
        method: &Method,
        url: &str,
        body: Option<&str>,
        token: &Token,
        need: Need,
        until: Moment,
    ) -> Result<Answer, LeaseError> {
        let unreachable = |err: transport::TransportError| LeaseError::Unreachable(err.to_string());
        // `url` is this base and a path.
        self.client.check(&self.base).map_err(unreachable)?;
        let mut bearer = HeaderValue::from_str(&format!("Bearer {}", token.expose()))
            .map_err(|_| LeaseError::NoToken("the node token holds characters that cannot stand in a header".into()))?;
        bearer.set_sensitive(true);
        let mut request = Request::builder().method(method).uri(url).header(header::AUTHORIZATION, bearer);
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(transport::full(body.unwrap_or_default().to_owned()))
            .map_err(|_| LeaseError::Unreachable(format!("{url}: expected a URL")))?;
        let started = Moment::now();
        let limit = until - started;
        // Asked again at each step: what a stopped process had begun is not sent when it goes on.
        let answer = until.before(async {
            match need {
                Need::Body => self.client.call(request, limit).await,
                Need::Status => self.client.call_for_status(request, limit).await,
            }
        });
        let late = || LeaseError::Unreachable(format!("no answer within {limit:?}"));
        let answer = answer.await.ok_or_else(late)?.map_err(unreachable)?;
        let elapsed_ms = millis(Moment::now() - started);
        tracing::debug!(%method, url, status = answer.status.as_u16(), elapsed_ms, "control plane answered");
        Ok(answer)
    }

    /// One call, repeated once with a fresh token after a 401. Any other status is the caller's,
    /// who gets the token that was used so that it can be kept out of excerpts.
    async fn exchange(
        &self,
        method: Method,
        url: &str,
        body: Option<&str>,
        need: Need,
        until: Moment,
    ) -> Result<(Answer, Token), LeaseError> {
        let until = until.min(Moment::now() + self.limit);
        let token = self.bearer(until).await?;
        let answer = self.once(&method, url, body, &token, need, until).await?;
        if answer.status != StatusCode::UNAUTHORIZED {
            return Ok((answer, token));
        }
        self.tokens.rejected(&token);
        let token = self.bearer(until).await?;
        let answer = self.once(&method, url, body, &token, need, until).await?;
        if answer.status == StatusCode::UNAUTHORIZED {
            return Err(LeaseError::Unauthorized);
        }
        Ok((answer, token))
    }

    async fn tell(&self, task: TaskId, report: &report::Report) -> Result<(), LeaseError> {
        let url = self.task_url(task, report.verb());
        let body = report.body();
        let (answer, token) = self.exchange(Method::POST, &url, Some(&body), Need::Status, Moment::NEVER).await?;
        if answer.status.is_success() { Ok(()) } else { Err(refused_for(task, &answer, &token)) }
    }

    fn task_url(&self, task: TaskId, verb: &str) -> String {
        format!("{}/{task}/{verb}", self.tasks)
    }
}

#[async_trait]
impl LeaseSource for Dms {
    async fn take(&self) -> Result<Option<Lease>, LeaseError> {
        let (answer, token) = self.exchange(Method::GET, &self.tasks, None, Need::Body, Moment::NEVER).await?;
        match answer.status {
            StatusCode::NO_CONTENT => Ok(None),
            StatusCode::CONFLICT => Err(LeaseError::Busy),
            StatusCode::NOT_FOUND => Err(LeaseError::NoSuchPath { excerpt: answer.excerpt_without(&[token.expose()]) }),
            status if status.is_success() => lease(&answer).map(Some),
            _ => Err(refused(&answer, &token)),
        }
    }

    async fn keep(&self, task: TaskId, beat: &Pending, until: Moment) -> Result<Kept, LeaseError> {
        let body = HeartbeatRequest { progress: beat.progress.clone(), events: beat.events.clone() };
        let body = serde_json::to_string(&body).expect("JSON values are JSON");
        let url = self.task_url(task, "heartbeat");
        let (answer, token) = self.exchange(Method::POST, &url, Some(&body), Need::Body, until).await?;
        if !answer.status.is_success() {
            return Err(refused_for(task, &answer, &token));
        }
        // Decoding a struct from `null` or a list fails with words about the struct; say what it is.
        if !answer.body.trim_ascii_start().starts_with(b"{") && answer.json::<Value>().is_ok() {
            let reason = format!("the heartbeat's answer is {} bytes of JSON, but no object", answer.body.len());
            return Err(LeaseError::Malformed { task: None, reason });
        }
        match answer.json::<HeartbeatResponse>() {
            Ok(response) => Ok(kept(response, &answer)),
            Err(err) => Err(LeaseError::Malformed { task: None, reason: err.to_string() }),
        }
    }

    async fn settle(&self, task: TaskId, lease: &Lease, verdict: &Verdict) -> Result<(), LeaseError> {
        match report::report(task, lease, verdict) {
            Some(report) => self.tell(task, &report).await,
            None => Ok(()),
        }
    }

    async fn refuse(&self, task: TaskId, why: &Outcome) -> Result<(), LeaseError> {
        match report::setup_failure(why) {
            Some(report) => self.tell(task, &report).await,
            None => Ok(()),
        }
    }
}

fn refused(answer: &Answer, token: &Token) -> LeaseError {
    LeaseError::Refused {
        status: answer.status.as_u16(),
        excerpt: answer.excerpt_without(&[token.expose()]),
        retry_after: transport::retry_after(&answer.headers),
    }
}

fn refused_for(task: TaskId, answer: &Answer, token: &Token) -> LeaseError {
    match answer.status.as_u16() {
        status @ (404 | 409 | 410) => LeaseError::Gone { task, status },
        _ => refused(answer, token),
    }
}

/// An answer to a poll as a lease. The size of an unusable one is all that is told of it.
fn lease(answer: &Answer) -> Result<Lease, LeaseError> {
    let malformed = |reason: String| LeaseError::Malformed { task: task_id(answer), reason };
    let envelope: LeaseFacts = answer.json().map_err(|err| malformed(err.to_string()))?;
    let mut document: BTreeMap<String, &RawValue> = answer.json().map_err(|err| malformed(err.to_string()))?;
    document.retain(|key, _| !is_credential(key));
    let document = to_raw_value(&document).expect("JSON is JSON");
    let task = envelope.task;
    let capability = Capability::parse(&task.capability).map_err(|err| {
        let why = match err {
            // Of a lease that cannot be used nothing is repeated.
            CapabilityError::Character(_) => "its capability holds white space or a control character".to_owned(),
            other => other.to_string(),
        };
        malformed(format!("the lease of {} bytes names no capability: {why}", answer.body.len()))
    })?;
    Ok(Lease {
        task: TaskId(task.id),
        job: task.job_id,
        attempt: task.attempts.as_u64(),
        capability,
        expires_at: moment(answer, envelope.lease_expires_at.or_else(|| time(&task.lease_expires_at))),
        cancelled: envelope.cancel,
        domain_id: envelope.domain_id,
        domain_server: filled(envelope.domain_server_url).or_else(|| server_of_meta(&task.meta)),
        token: filled(envelope.access_token).map(Token::new),
        token_expires_at: moment(answer, envelope.access_token_expires_at),
        inputs: task.inputs_cids,
        outputs_prefix: task.outputs_prefix,
        document,
    })
}

/// Whether a member of a lease is for the node alone.
fn is_credential(key: &str) -> bool {
    const END: &str = "token";
    let end = key.len().checked_sub(END.len()).and_then(|at| key.get(at..));
    end.is_some_and(|end| end.eq_ignore_ascii_case(END))
}

/// The task's id in a lease that cannot be used otherwise.
fn task_id(answer: &Answer) -> Option<TaskId> {
    let value: Value = answer.json().ok()?;
    value.pointer("/task/id")?.as_str().and_then(|text| Uuid::try_parse(text).ok()).map(TaskId)
}

fn kept(response: HeartbeatResponse, answer: &Answer) -> Kept {
    let inner = response.task.as_ref();
    Kept {
        token: filled(response.access_token).map(Token::new),
        token_expires_at: moment(answer, response.access_token_expires_at),
        expires_at: moment(answer, response.lease_expires_at.or_else(|| time(inner?.extra.get("lease_expires_at")?))),
        cancel: response.cancel == Some(true) || response.status.as_deref().is_some_and(is_over),
        task: inner.map(|task| task.id).or(response.task_id).map(TaskId),
        job: inner.map_or(response.job_id, |task| task.job_id),
        capability: inner.map(|task| task.capability.clone()),
        domain_id: response.domain_id,
        domain_server: filled(response.domain_server_url).or_else(|| inner.and_then(|task| server_of_meta(&task.meta))),
    }
}

/// A time of the plane by our clock. One that had passed before the plane was asked cannot be meant: what
/// it is about has just been given.
fn moment(answer: &Answer, at: Option<Timestamp>) -> Option<Moment> {
    let at = at?;
    let moment = answer.moment(at);
    if moment.is_none() {
        tracing::debug!(at = %at, "a time of the control plane lies in the past and is not counted");
    }
    moment
}

/// Words of a heartbeat's `status` that mean as much as a cancel (contract 10.3). The job API's `canceled`
/// is none of them.
fn is_over(status: &str) -> bool {
    matches!(status, "cancelled" | "failed" | "completed")
}

/// Newer planes may send the lease's end inside the task only.
fn time(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

/// The fallback of contract 4.6: older planes put the domain server into the task's metadata.
fn server_of_meta(meta: &Value) -> Option<String> {
    let at = |pointer: &str| filled(meta.pointer(pointer).and_then(Value::as_str).map(str::to_owned));
    at("/domain_server_url").or_else(|| at("/legacy/domain_server_url"))
}

fn filled(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.trim().is_empty())
}
