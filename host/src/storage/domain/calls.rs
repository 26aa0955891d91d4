//! Requests to the domain server: headers, bearer, one repetition after a 401, statuses as errors,
//! and how long a request that failed is repeated.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use url::Url;

use super::{
    Inner,
    retry::{Patience, passing},
    source::{Pulse, Source, body},
};
use crate::{
    model::{CancelReason, PortError, PortErrorKind, Token},
    transport::{self, EXCERPT_BYTES_MAX, JSON_BYTES_MAX, TransportError},
};

/// A request that can be sent more than once.
pub(super) struct Call<'a> {
    /// What it is for, as errors begin: `upload of out/x.json`.
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

/// Why a request did not succeed, and whether the same one may be tried again.
pub(super) struct Failed {
    pub(super) err: PortError,
    /// Trouble that may pass by itself: no answer, half of one or one nobody can read, 5xx, 408, 425, 429.
    pub(super) passing: bool,
    /// The server says that it takes no request as large as this one.
    pub(super) too_large: bool,
    /// How long the server asks to wait.
    after: Option<Duration>,
}

impl From<PortError> for Failed {
    fn from(err: PortError) -> Self {
        let passing = err.kind == PortErrorKind::Network;
        Self { err, passing, too_large: false, after: None }
    }
}

impl Failed {
    /// What the server answered does not tell what became of the request.
    pub(super) fn unread(err: PortError) -> Self {
        Self { err, passing: true, too_large: false, after: None }
    }

    /// Waits before the next try, or gives the error back when there should be none.
    pub(super) async fn wait(self, patience: &mut Patience) -> Result<(), PortError> {
        match self.passing {
            true => patience.pause(self.err, self.after).await,
            false => Err(self.err),
        }
    }
}

impl Inner {
    /// For one request and its repetitions.
    pub(super) fn patience(&self) -> Patience {
        Patience::new(self.config.part_pause, self.config.patience)
    }

    /// Sends `call`, as often as it takes, and decodes a 2xx answer. For calls that may be repeated
    /// whatever became of the one before.
    pub(super) async fn json<T: DeserializeOwned>(&self, call: &Call<'_>) -> Result<T, PortError> {
        let mut patience = self.patience();
        loop {
            match self.try_json(call).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed.wait(&mut patience).await?,
            }
        }
    }

    /// Sends `call` once and decodes a 2xx answer.
    pub(super) async fn try_json<T: DeserializeOwned>(&self, call: &Call<'_>) -> Result<T, Failed> {
        let response = self.exchange(call).await?;
        let response = self.accepted(call, response).await?;
        self.decode(call, response).await
    }

    /// Turns every answer but a 2xx one into its error.
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
        Err(Failed { err: status_error(call.what, status, &excerpt), passing: passing(status), too_large, after })
    }

    /// Decodes a JSON answer of at most [`JSON_BYTES_MAX`] bytes.
    ///
    /// One that cannot be read is as good as lost: something between us and the server may have made it,
    /// and what was asked may have been done.
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
        decoded.map_err(|err| Failed::unread(call.failed(&err)))
    }

    /// Sends `call`, and once more with the newest bearer when the first one was not accepted.
    pub(super) async fn exchange(&self, call: &Call<'_>) -> Result<Response<Incoming>, PortError> {
        let token = self.token(call)?;
        let response = match self.send_once(call, token.as_ref()).await {
            // A server that refuses a bearer without reading the body closes the connection, and
            // its answer can be lost in that. A bearer turned meanwhile tells that this may be it.
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
        let over = self.closed.is_cancelled() || self.grant.cancel.reason() == Some(CancelReason::Plane);
        if over && self.token(call)? == token {
            return Ok(response);
        }
        self.excerpt(response).await; // read to the end, so that the connection can be used again
        tracing::debug!(what = call.what, "domain server refused the bearer; waiting for a newer one");
        let wait = if over { Duration::ZERO } else { self.config.token_wait };
        let newest = self.grant.newer_token(token.as_ref(), wait).await;
        self.send_once(call, newest.as_ref()).await
    }

    fn token(&self, call: &Call<'_>) -> Result<Option<Token>, PortError> {
        match (call.bearer, self.grant.token()) {
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
        let pulse = Pulse::new(length);
        let request = self.request(call, token, length, &pulse)?;
        if !self.grant.check_deadline() {
            return Err(self.over().await);
        }
        let (stall, answer) = (self.config.stall, self.config.request_timeout);
        // An upload may take as long as it moves; everything else has a fixed time.
        let limit = if length == 0 { answer } else { Duration::MAX };
        let sent = tokio::select! {
            sent = self.client.send(request, limit) => sent.map_err(|err| call.failed(&err)),
            limit = pulse.silent(stall), if length > 0 => {
                let host = call.url.authority().to_owned();
                Err(call.failed(&TransportError::Timeout { host, limit }))
            }
        };
        match pulse.fault.get() {
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
        pulse: &std::sync::Arc<Pulse>,
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
            let mut value = value
                .map_err(|_| bad(PortErrorKind::Setup, "the domain token holds characters no header can carry"))?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let body = match call.payload.is_empty() {
            true => transport::full(Bytes::new()),
            false => body(call.payload.clone(), pulse.clone()),
        };
        request
            .body(body)
            .map_err(|_| bad(PortErrorKind::Setup, "CLIENT_ID or URL holds characters no request can carry"))
    }

    /// The beginning of an error answer on one line, without the bearer should the server echo it.
    pub(super) async fn excerpt(&self, response: Response<Incoming>) -> String {
        let token = self.grant.token();
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
        // What has arrived by then is enough for an error text.
        let _ = tokio::time::timeout(self.config.request_timeout, reading).await;
        transport::excerpt_without(&text, &[token])
    }
}

/// A refused request as an error. The words and numbers are searched for by existing runners.
pub(super) fn status_error(what: &str, status: StatusCode, excerpt: &str) -> PortError {
    let code = status.as_u16();
    let (kind, words) = match code {
        400 => (PortErrorKind::BadRequest, "bad request"),
        401 => (PortErrorKind::Unauthorized, "unauthorized"),
        404 => (PortErrorKind::NotFound, "not found"),
        409 => (PortErrorKind::Conflict, "conflict"),
        // A repetition sends the same bytes, so it gets the same answer.
        413 => (PortErrorKind::Limit, "unexpected status"),
        500..=599 => (PortErrorKind::Server, "server error"),
        300..=399 => (PortErrorKind::Other, "unexpected redirect"),
        _ => (PortErrorKind::Other, "unexpected status"),
    };
    let end = if excerpt.is_empty() { String::new() } else { format!(": {excerpt}") };
    PortError::new(kind, format!("{what} refused: {words} ({code}){end}"))
}
