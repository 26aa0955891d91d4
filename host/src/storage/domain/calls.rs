//! Requests to the domain server: headers, bearer, one repetition after a 401, statuses as errors, and
//! repetitions of failed requests.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use url::Url;

use super::{
    Inner,
    retry::{Retries, transient},
    source::{BodyProgress, Source, body},
};
use crate::{
    model::{CancelReason, PortError, PortErrorKind, Token},
    transport::{self, EXCERPT_BYTES_MAX, JSON_BYTES_MAX, TransportError},
};

/// A request that can be sent more than once.
pub(super) struct Call<'a> {
    /// Its purpose, such as `upload of out/x.json`. Errors begin with it.
    pub(super) what: &'a str,
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) accept: &'static str,
    /// Further headers, such as `Range`.
    pub(super) headers: Vec<(HeaderName, String)>,
    pub(super) content_type: Option<String>,
    pub(super) payload: Vec<Source>,
    /// Whether it carries the lease's bearer.
    pub(super) bearer: bool,
}

impl<'a> Call<'a> {
    /// A request without a body.
    pub(super) fn new(what: &'a str, method: Method, url: Url) -> Self {
        let accept = "application/json";
        Self { what, method, url, accept, headers: Vec::new(), content_type: None, payload: Vec::new(), bearer: true }
    }

    /// With these bytes as its body.
    pub(super) fn with(mut self, content_type: impl Into<String>, payload: Vec<Source>) -> Self {
        self.content_type = Some(content_type.into());
        self.payload = payload;
        self
    }

    /// With JSON as its body.
    pub(super) fn with_json(self, json: &impl serde::Serialize) -> Self {
        let text = serde_json::to_vec(json).expect("our own wire types have string keys");
        self.with("application/json", vec![Bytes::from(text).into()])
    }

    fn failed(&self, err: &TransportError) -> PortError {
        let kind = match err {
            TransportError::Insecure { .. } | TransportError::BadUrl { .. } => PortErrorKind::Setup,
            TransportError::Oversize { .. } | TransportError::NotJson { .. } => PortErrorKind::Malformed,
            _ => PortErrorKind::Network,
        };
        PortError::new(kind, format!("{} failed: {err}", self.what))
    }
}

/// Why a request failed, and whether it may be repeated.
pub(super) struct Failed {
    pub(super) err: PortError,
    /// A transient failure: no answer, an incomplete or unreadable one, 5xx, 408, 425, 429.
    pub(super) transient: bool,
    /// The server refuses requests of this size.
    pub(super) too_large: bool,
    /// How long the server asks to wait.
    after: Option<Duration>,
}

impl From<PortError> for Failed {
    fn from(err: PortError) -> Self {
        let transient = err.kind == PortErrorKind::Network;
        Self { err, transient, too_large: false, after: None }
    }
}

impl Failed {
    /// The answer does not show whether the request was done.
    pub(super) fn unknown_result(err: PortError) -> Self {
        Self { err, transient: true, too_large: false, after: None }
    }

    /// A repetition does not help.
    pub(super) fn permanent(err: PortError) -> Self {
        Self { err, transient: false, too_large: false, after: None }
    }

    /// Waits before the next try. Returns the error if there must be none.
    pub(super) async fn wait(self, retries: &mut Retries) -> Result<(), PortError> {
        match self.transient {
            true => retries.pause(self.err, self.after).await,
            false => Err(self.err),
        }
    }
}

impl Inner {
    /// The retries for one request and its repetitions.
    pub(super) fn retries(&self) -> Retries {
        Retries::new(self.config.part_pause, self.config.retry_limit)
    }

    /// Sends `call` until it succeeds or fails permanently, and decodes a 2xx answer. Only for calls that may be
    /// repeated after any failure.
    pub(super) async fn json<T: DeserializeOwned>(&self, call: &Call<'_>) -> Result<T, PortError> {
        let mut retries = self.retries();
        loop {
            match self.try_json(call).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed.wait(&mut retries).await?,
            }
        }
    }

    /// Sends `call` once and decodes a 2xx answer.
    pub(super) async fn try_json<T: DeserializeOwned>(&self, call: &Call<'_>) -> Result<T, Failed> {
        let response = self.exchange(call).await?;
        let response = self.accepted(call, response).await?;
        self.decode(call, response).await
    }

    /// Turns every answer except 2xx into its error.
    pub(super) async fn accepted(
        &self,
        call: &Call<'_>,
        response: Response<Incoming>,
    ) -> Result<Response<Incoming>, Failed> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let after = transport::retry_after(response.headers());
        let excerpt = self.excerpt(response).await;
        let too_large = status == StatusCode::PAYLOAD_TOO_LARGE;
        Err(Failed { err: status_error(call.what, status, &excerpt), transient: transient(status), too_large, after })
    }

    /// Decodes a JSON answer of at most [`JSON_BYTES_MAX`] bytes.
    ///
    /// An unreadable answer counts as a lost one: a gateway may have sent it, and the server may have done the
    /// request.
    pub(super) async fn decode<T: DeserializeOwned>(
        &self,
        call: &Call<'_>,
        response: Response<Incoming>,
    ) -> Result<T, Failed> {
        let host = call.url.authority().to_owned();
        let limit = self.config.request_timeout;
        let reading = transport::read_capped(response.into_body(), JSON_BYTES_MAX, &host);
        let body = match tokio::time::timeout(limit, reading).await {
            Ok(body) => body,
            Err(_) => Err(TransportError::Timeout { host: host.clone(), limit }),
        };
        let decoded = body.and_then(|body| {
            serde_json::from_slice(&body).map_err(|err| {
                let reason = transport::decode_complaint(&body, &err);
                TransportError::NotJson { host, bytes: body.len(), reason }
            })
        });
        decoded.map_err(|err| Failed::unknown_result(call.failed(&err)))
    }

    /// Sends `call`, and once more with the newest bearer if the first one was refused.
    pub(super) async fn exchange(&self, call: &Call<'_>) -> Result<Response<Incoming>, PortError> {
        let token = self.token(call)?;
        let response = match self.send_once(call, token.as_ref()).await {
            // A server that refuses a bearer without reading the body closes the connection, so its answer can be
            // lost. If the bearer was rotated meanwhile, this may be the reason.
            Err(err) if err.kind == PortErrorKind::Network && !call.payload.is_empty() => {
                let newest = self.token(call)?;
                return if newest == token { Err(err) } else { self.send_once(call, newest.as_ref()).await };
            }
            sent => sent?,
        };
        if response.status() != StatusCode::UNAUTHORIZED || token.is_none() {
            return Ok(response);
        }
        // A task that is over, or cancelled by the control plane, has no more heartbeats. It gets no newer token, and
        // the same request with the same token gets the same answer.
        let over = self.closed.is_cancelled() || self.held.cancel.reason() == Some(CancelReason::Plane);
        if over && self.token(call)? == token {
            return Ok(response);
        }
        self.excerpt(response).await; // reads to the end, so that the connection can be reused
        tracing::debug!(what = call.what, "domain server refused the bearer; waiting for a newer one");
        let wait = if over { Duration::ZERO } else { self.config.token_wait };
        let newest = self.held.newer_token(token.as_ref(), wait).await;
        self.send_once(call, newest.as_ref()).await
    }

    fn token(&self, call: &Call<'_>) -> Result<Option<Token>, PortError> {
        match (call.bearer, self.held.token()) {
            (false, _) => Ok(None),
            (true, Some(token)) => Ok(Some(token)),
            (true, None) => {
                let message = format!("{} is not possible: the lease holds no domain token", call.what);
                Err(PortError::new(PortErrorKind::Setup, message))
            }
        }
    }

    async fn send_once(&self, call: &Call<'_>, token: Option<&Token>) -> Result<Response<Incoming>, PortError> {
        let length: u64 = call.payload.iter().map(Source::length).sum();
        let progress = BodyProgress::new(length);
        let request = self.request(call, token, length, &progress)?;
        if !self.held.check_deadline() {
            return Err(self.over().await);
        }
        let (stall, answer) = (self.config.stall, self.config.request_timeout);
        // An upload has no time limit while bytes move. Everything else has a fixed limit.
        let limit = if length == 0 { answer } else { Duration::MAX };
        let sent = tokio::select! {
            sent = self.client.send(request, limit) => sent.map_err(|err| call.failed(&err)),
            limit = progress.stalled(stall), if length > 0 => {
                let host = call.url.authority().to_owned();
                Err(call.failed(&TransportError::Timeout { host, limit }))
            }
        };
        match progress.fault.get() {
            Some(fault) if sent.is_err() => {
                let message = format!("{} failed: its file could not be read: {fault}", call.what);
                Err(PortError::new(PortErrorKind::Local, message))
            }
            _ => sent,
        }
    }

    fn request(
        &self,
        call: &Call<'_>,
        token: Option<&Token>,
        length: u64,
        progress: &std::sync::Arc<BodyProgress>,
    ) -> Result<Request<transport::Body>, PortError> {
        let bad = |kind, what: &str| PortError::new(kind, format!("{} is not possible: {what}", call.what));
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(call.url.as_str())
            .header(header::ACCEPT, call.accept)
            .header("posemesh-client-id", &self.config.client_id);
        for (name, value) in &call.headers {
            request = request.header(name, value);
        }
        if let Some(kind) = &call.content_type {
            request = request.header(header::CONTENT_TYPE, kind);
        }
        if !call.payload.is_empty() {
            request = request.header(header::CONTENT_LENGTH, length);
        }
        if let Some(token) = token {
            let value = HeaderValue::try_from(format!("Bearer {}", token.expose()));
            let mut value = value.map_err(|_| {
                bad(PortErrorKind::Setup, "the domain token contains characters that a header cannot hold")
            })?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let body = match call.payload.is_empty() {
            true => transport::full(Bytes::new()),
            false => body(call.payload.clone(), progress.clone()),
        };
        request.body(body).map_err(|_| {
            bad(PortErrorKind::Setup, "CLIENT_ID or the URL contains characters that a request cannot hold")
        })
    }

    /// The beginning of an error answer on one line, without the bearer if the server repeats it.
    pub(super) async fn excerpt(&self, response: Response<Incoming>) -> String {
        let token = self.held.token();
        let token = token.as_ref().map_or("", |token| token.expose());
        let mut body = response.into_body();
        let mut text = Vec::new();
        let reading = async {
            while let Some(Ok(frame)) = body.frame().await {
                text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
                if text.len() > EXCERPT_BYTES_MAX + token.len() {
                    break;
                }
            }
        };
        // The bytes that arrived in time are enough for an error text.
        let _ = tokio::time::timeout(self.config.request_timeout, reading).await;
        transport::excerpt_without(&text, &[token])
    }
}

/// A refused request as an error. Existing runners search for these words and numbers.
pub(super) fn status_error(what: &str, status: StatusCode, excerpt: &str) -> PortError {
    let code = status.as_u16();
    let (kind, words) = match code {
        400 => (PortErrorKind::BadRequest, "bad request"),
        401 => (PortErrorKind::Unauthorized, "unauthorized"),
        404 => (PortErrorKind::NotFound, "not found"),
        409 => (PortErrorKind::Conflict, "conflict"),
        // Final, because a repetition sends the same bytes.
        413 => (PortErrorKind::Limit, "unexpected status"),
        500..=599 => (PortErrorKind::Server, "server error"),
        300..=399 => (PortErrorKind::Other, "unexpected redirect"),
        _ => (PortErrorKind::Other, "unexpected status"),
    };
    let end = if excerpt.is_empty() { String::new() } else { format!(": {excerpt}") };
    PortError::new(kind, format!("{what} refused: {words} ({code}){end}"))
}
