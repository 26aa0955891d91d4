//! The calls to DDS: a challenge, two forms of registration, a login (posemesh.md section 2).
//! When to call is decided in `registration` and `renewal`.

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

/// The result of a login.
pub(super) struct Login {
    pub(super) token: Token,
    /// The token's remaining life when the answer arrived.
    pub(super) ttl: Duration,
}

/// The client for DDS.
pub(super) struct Dds {
    base: String,
    client: Client,
    key: NodeKey,
    timeout: Duration,
    audience: Audience,
    reg_secret: SecretString,
    /// Holds the secret of the last callback.
    gate: Arc<CallbackGate>,
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
    pub(super) fn new(config: &super::Config, client: Client, gate: Arc<CallbackGate>) -> Self {
        Self {
            base: config.dds.as_str().trim_end_matches('/').to_owned(),
            client,
            key: config.key.clone(),
            // A limit of zero would fail every call.
            timeout: config.request_timeout.max(Duration::from_secs(1)),
            audience: Audience::new(&config.dds, config.sign_in_domain.as_deref()),
            reg_secret: config.reg_secret.clone(),
            gate,
        }
    }

    /// The time limit of each call.
    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Fetches a nonce and signs the message that contains it. A nonce is valid for one attempt.
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

    /// Registers the wallet with its capabilities (posemesh.md section 2.5). The body of a 2xx is ignored.
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

    /// Registers the node under its URL (posemesh.md section 2.9). The URL is sent exactly as it is signed. A 2xx alone
    /// is not enough: the service must call back. The caller waits for that.
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
            return Err(content("access_token holds characters that are invalid in a header"));
        }
        let expiry = verified.access_expires_at.or(verified.expires_at);
        let expiry =
            expiry.ok_or_else(|| content("access_expires_at and expires_at are missing, expected one of them"))?;
        match answer.left_until(expiry) {
            Some(ttl) => Ok(Login { token: Token::new(verified.access_token), ttl }),
            None => Err(content("the token has already expired by the clock of the service")),
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
        // Only a body that is decoded must be complete. A registration needs the status only.
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

    /// Returns the beginning of an error body. Removes secrets that the service repeats, in plain and in JSON form.
    fn excerpt(&self, answer: &Answer, secrets: &[&str]) -> String {
        if memchr::memmem::find(&answer.body, b"access_token").is_some() {
            return "(not shown: it holds a token)".to_owned();
        }
        let callback = self.gate.secret();
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
    fn signed_timestamp_has_nine_fraction_digits() {
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
