//! DDS as this node calls it: a challenge, two forms of registration, a login (posemesh.md section 2).
//! Knows nothing of when to call; that is `registration` and `renewal`.

use std::{sync::Arc, time::Duration};

use http::{Method, Request, header};
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::json;
use url::Url;

use super::{
    NodeKey,
    audience::Audience,
    health_checks::CallbackGate,
    refusal::{NONCE, REGISTER, Refusal, VERIFY},
    siwe::{Challenge, Unsignable},
};
use crate::{
    model::Token,
    transport::{self, Answer, Client, TransportError},
};

#[derive(Deserialize)]
struct Verified {
    access_token: String,
    #[serde(default)]
    access_expires_at: Option<Timestamp>,
    #[serde(default)]
    expires_at: Option<Timestamp>,
}

/// A login that worked.
pub(super) struct Login {
    pub(super) token: Token,
    /// What was left of the token's life when the answer came.
    pub(super) ttl: Duration,
}

/// DDS as this node calls it.
pub(super) struct Dds {
    base: String,
    client: Client,
    key: NodeKey,
    timeout: Duration,
    audience: Audience,
    reg_secret: SecretString,
    /// Knows the secret of the last callback.
    door: Arc<CallbackGate>,
}

#[derive(Serialize)]
struct WalletBody<'a> {
    message: &'a str,
    signature: &'a str,
    registration_credentials: &'a str,
    capabilities: &'a [String],
    version: &'a str,
}

#[derive(Serialize)]
struct UrlBody<'a> {
    url: &'a str,
    version: &'a str,
    registration_credentials: &'a str,
    signature: &'a str,
    timestamp: &'a str,
    public_key: &'a str,
    capabilities: &'a [String],
}

impl Dds {
    pub(super) fn new(config: &super::Config, client: Client, door: Arc<CallbackGate>) -> Self {
        Self {
            base: config.dds.as_str().trim_end_matches('/').to_owned(),
            client,
            key: config.key.clone(),
            // A limit of nothing would fail every call.
            timeout: config.request_timeout.max(Duration::from_secs(1)),
            audience: Audience::new(&config.dds, config.sign_in_domain.as_deref()),
            reg_secret: config.reg_secret.clone(),
            door,
        }
    }

    /// Limit of each call.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Fetches a nonce and signs the message made of it. A nonce serves one attempt.
    async fn signed(&self) -> Result<(String, String), Refusal> {
        let body = json!({ "wallet": self.key.address() });
        let answer = self.post("auth/siwe/request", NONCE, body.to_string(), &[]).await?;
        let challenge: Challenge = answer.json().map_err(|source| Refusal::Transport { step: NONCE, source })?;
        let message = challenge.message(self.key.address(), &self.audience).map_err(|why| match why {
            Unsignable::Malformed(reason) => Refusal::Content { step: NONCE, reason },
            Unsignable::Foreign(reason) => Refusal::Foreign { step: NONCE, reason },
        })?;
        let signature = self.key.personal_sign(&message);
        Ok((message, signature))
    }

    /// Registers the wallet with its capabilities (posemesh.md section 2.5). The body of a 2xx means nothing.
    pub(super) async fn register_wallet(&self, capabilities: &[String], version: &str) -> Result<(), Refusal> {
        let (message, signature) = self.signed().await?;
        let body = WalletBody {
            message: &message,
            signature: &signature,
            registration_credentials: self.reg_secret.expose_secret(),
            capabilities,
            version,
        };
        let body = serde_json::to_string(&body).expect("strings are JSON");
        self.post("nodes/register-wallet", REGISTER, body, &[&signature]).await.map(drop)
    }

    /// Registers the node under its URL (posemesh.md section 2.9), which is sent as it is signed. A 2xx alone is not
    /// enough: the service has to call back, which is the caller's to await.
    pub(super) async fn register_url(&self, url: &str, capabilities: &[String], version: &str) -> Result<(), Refusal> {
        let timestamp = nine_digits(self.client.now_at(&self.base));
        let signature = self.key.bare_sign(&format!("{url}{timestamp}"));
        let body = UrlBody {
            url,
            version,
            registration_credentials: self.reg_secret.expose_secret(),
            signature: &signature,
            timestamp: &timestamp,
            public_key: &self.key.public_key(),
            capabilities,
        };
        let body = serde_json::to_string(&body).expect("strings are JSON");
        self.post("nodes/register", REGISTER, body, &[&signature]).await.map(drop)
    }

    /// Logs in: nonce, signature, token.
    pub(super) async fn login(&self) -> Result<Login, Refusal> {
        let (message, signature) = self.signed().await?;
        let body = json!({ "address": self.key.address(), "message": message, "signature": signature });
        let answer = self.post("auth/siwe/verify", VERIFY, body.to_string(), &[&signature]).await?;
        let content = |reason: &str| Refusal::Content { step: VERIFY, reason: reason.to_owned() };
        let verified: Verified = answer.json().map_err(|source| Refusal::Transport { step: VERIFY, source })?;
        if verified.access_token.is_empty() {
            return Err(content("access_token is empty, expected a bearer token"));
        }
        if http::HeaderValue::from_str(&verified.access_token).is_err() {
            return Err(content("access_token holds characters that cannot stand in a header"));
        }
        let expiry = verified.access_expires_at.or(verified.expires_at);
        let expiry = expiry.ok_or_else(|| content("neither access_expires_at nor expires_at is there"))?;
        match answer.left_until(expiry) {
            Some(ttl) => Ok(Login { token: Token::new(verified.access_token), ttl }),
            None => Err(content("the token's expiry lies in the past of the service's own clock")),
        }
    }

    async fn post(&self, path: &str, step: &'static str, body: String, secrets: &[&str]) -> Result<Answer, Refusal> {
        let transport = |source| Refusal::Transport { step, source };
        let url = Url::parse(&format!("{}/internal/v1/{path}", self.base))
            .map_err(|_| transport(TransportError::BadUrl { url: self.base.clone() }))?;
        self.client.check(&url).map_err(transport)?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(url.as_str())
            .header(header::CONTENT_TYPE, "application/json")
            .body(transport::full(body))
            .map_err(|_| transport(TransportError::BadUrl { url: self.base.clone() }))?;
        // Only what is decoded needs a whole body; the status of a registration says it all.
        let answer = if step == REGISTER {
            self.client.call_for_status(request, self.timeout).await
        } else {
            self.client.call(request, self.timeout).await
        }
        .map_err(transport)?;
        if answer.status.is_success() {
            return Ok(answer);
        }
        Err(Refusal::Status {
            step,
            status: answer.status,
            excerpt: self.excerpt(&answer, secrets),
            retry_after: transport::retry_after(&answer.headers),
        })
    }

    /// The beginning of an error, without anything secret that the service repeats, at any step and
    /// also as JSON writes it.
    fn excerpt(&self, answer: &Answer, secrets: &[&str]) -> String {
        if memchr::memmem::find(&answer.body, b"access_token").is_some() {
            return "(not shown: it holds a token)".to_owned();
        }
        let callback = self.door.secret();
        let callback = callback.as_ref().map(|secret| secret.expose_secret());
        let plain = secrets.iter().copied().chain([self.reg_secret.expose_secret()]).chain(callback);
        let plain: Vec<&str> = plain.collect();
        let escaped: Vec<String> = plain.iter().map(|secret| serde_json::Value::from(*secret).to_string()).collect();
        let escaped = escaped.iter().map(|secret| &secret[1..secret.len() - 1]);
        let all: Vec<&str> = escaped.chain(plain.iter().copied()).collect();
        answer.excerpt_without(&all)
    }
}

/// RFC 3339 in UTC, always with nine fractional digits (posemesh.md section 2.9).
fn nine_digits(at: Timestamp) -> String {
    format!("{at:.9}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signed_timestamp_always_has_nine_digits() {
        for text in [
            "2025-03-04T05:06:07.000000008Z",
            "2025-03-04T05:06:07.000000000Z",
            "2025-03-04T05:06:07.120000000Z",
            "1969-12-31T23:59:59.999999999Z",
        ] {
            assert_eq!(nine_digits(text.parse().expect("a timestamp")), text);
        }
    }
}
