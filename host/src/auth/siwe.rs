//! Sign-in with Ethereum: the challenge DDS hands out, the message built from it, and the three
//! calls. Knows nothing of when to call; that is `registration` and `renewal`.

use std::time::Duration;

use http::{Method, Request, StatusCode, header};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::json;
use url::Url;

use super::NodeKey;
use crate::{
    model::Token,
    transport::{self, Answer, Client, TransportError},
};

/// Longest `Retry-After` obeyed. A service that asks for more is asked again earlier than it likes.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// The answer to a nonce request (posemesh contract 2.1).
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Challenge {
    nonce: String,
    domain: String,
    uri: String,
    version: String,
    chain_id: i64,
    issued_at: String,
}

impl Challenge {
    /// The text to sign (contract 2.2). Refuses a field that would change the message's lines:
    /// the node would otherwise sign whatever the other side writes into it.
    pub(super) fn message(&self, address: &str) -> Result<String, String> {
        let fields = [
            ("nonce", &self.nonce),
            ("domain", &self.domain),
            ("uri", &self.uri),
            ("version", &self.version),
            ("issuedAt", &self.issued_at),
        ];
        for (name, value) in fields {
            if value.is_empty() {
                return Err(format!("field {name} is empty, expected text to sign"));
            }
            if value.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')) {
                return Err(format!("field {name} holds a control character, which is not signed"));
            }
        }
        Ok(format!(
            "{domain} wants you to sign in with your Ethereum account:\n{address}\n\nURI: {uri}\nVersion: {version}\n\
             Chain ID: {chain}\nNonce: {nonce}\nIssued At: {issued}",
            domain = self.domain,
            uri = self.uri,
            version = self.version,
            chain = self.chain_id,
            nonce = self.nonce,
            issued = self.issued_at,
        ))
    }
}

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

/// Why one exchange with DDS failed. Texts hold no secret: what was sent is cut out of what came back.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// No usable answer.
    #[error("{step}: {source}")]
    Transport { step: &'static str, source: TransportError },
    /// An answer other than 2xx.
    #[error("{step}: answered {status}{}", said(excerpt))]
    Status { step: &'static str, status: StatusCode, excerpt: String, retry_after: Option<Duration> },
    /// A 2xx whose content cannot be used.
    #[error("{step}: {reason}")]
    Content { step: &'static str, reason: String },
}

fn said(excerpt: &str) -> String {
    if excerpt.is_empty() { String::new() } else { format!(": {excerpt}") }
}

/// What a [`Refusal`] means for the next attempt (contract 2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Another node with this identity is online.
    Conflict,
    /// Passes by itself.
    Transient,
    /// Needs somebody's hand; asked again at a long interval.
    Slow,
}

impl Refusal {
    pub(super) fn class(&self) -> Class {
        match self {
            Self::Transport { source: TransportError::Insecure { .. } | TransportError::BadUrl { .. }, .. } => {
                Class::Slow
            }
            Self::Transport { .. } | Self::Content { .. } => Class::Transient,
            Self::Status { status, .. } => match status.as_u16() {
                409 => Class::Conflict,
                408 | 429 | 500.. => Class::Transient,
                _ => Class::Slow,
            },
        }
    }

    /// How long the service asks to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether a login was refused because DDS does not know this wallet.
    pub(super) fn unknown_wallet(&self) -> bool {
        matches!(self, Self::Status { step: VERIFY, status, .. } if matches!(status.as_u16(), 403 | 404))
    }
}

const NONCE: &str = "sign-in challenge";
const VERIFY: &str = "sign-in";
const REGISTER: &str = "registration";

/// DDS as this node calls it.
pub(super) struct Dds {
    base: String,
    client: Client,
    key: NodeKey,
    timeout: Duration,
    /// Cut out of every excerpt of an answer.
    reg_secret: secrecy::SecretString,
}

#[derive(Serialize)]
struct RegisterBody<'a> {
    message: &'a str,
    signature: &'a str,
    registration_credentials: &'a str,
    capabilities: &'a [String],
    version: &'a str,
}

impl Dds {
    pub(super) fn new(
        base: &Url,
        client: Client,
        key: NodeKey,
        timeout: Duration,
        reg_secret: secrecy::SecretString,
    ) -> Self {
        Self { base: base.as_str().trim_end_matches('/').to_owned(), client, key, timeout, reg_secret }
    }

    /// Fetches a nonce and signs the message made of it. A nonce serves one attempt.
    async fn signed(&self) -> Result<(String, String), Refusal> {
        let body = json!({ "wallet": self.key.address() });
        let answer = self.post("auth/siwe/request", NONCE, body.to_string(), &[]).await?;
        let challenge: Challenge = answer.json().map_err(|source| Refusal::Transport { step: NONCE, source })?;
        let message =
            challenge.message(self.key.address()).map_err(|reason| Refusal::Content { step: NONCE, reason })?;
        let signature = self.key.personal_sign(&message);
        Ok((message, signature))
    }

    /// Registers the wallet with its capabilities. The body of a 2xx means nothing.
    pub(super) async fn register(&self, capabilities: &[String], version: &str) -> Result<(), Refusal> {
        use secrecy::ExposeSecret as _;
        let (message, signature) = self.signed().await?;
        let secret = self.reg_secret.expose_secret();
        let body = RegisterBody {
            message: &message,
            signature: &signature,
            registration_credentials: secret,
            capabilities,
            version,
        };
        let body = serde_json::to_string(&body).expect("strings are JSON");
        self.post("nodes/register-wallet", REGISTER, body, &[secret, &signature]).await.map(drop)
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
            None => {
                Err(content("the token's expiry lies in the past; compare the clocks of this node and the service"))
            }
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
            excerpt: answer.excerpt_without(secrets),
            retry_after: answer.headers.get(header::RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?)),
        })
    }
}

/// Reads `Retry-After` in both its forms.
fn retry_after(text: &str) -> Option<Duration> {
    let text = text.trim();
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
            Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default()
        }
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn challenge() -> Challenge {
        Challenge {
            nonce: "k3Yp9QwZ7t".into(),
            domain: "dds.test.local".into(),
            uri: "https://dds.test.local/login".into(),
            version: "1".into(),
            chain_id: 8453,
            issued_at: "2025-03-04T05:06:07Z".into(),
        }
    }

    /// The messages of contract 2.3, by the letter of their inputs.
    pub(in crate::auth) fn vector_message(inputs: &str) -> String {
        let mut fields = challenge();
        match inputs {
            "b" => fields.nonce.push('7'),
            "c" => fields.domain = "dés.test.local".into(),
            _ => {}
        }
        let mut text = fields.message("0x1a642f0e3c3af545e7acbd38b07251b3990914f1").expect("plain fields");
        if inputs == "d" {
            text.push_str("\nResources:\n- urn:a\n- urn:b");
        }
        text
    }

    #[test]
    fn fields_that_would_forge_lines_are_refused() {
        let spoil: [fn(&mut Challenge, &str); 5] = [
            |c, text| c.nonce = text.into(),
            |c, text| c.domain = text.into(),
            |c, text| c.uri = text.into(),
            |c, text| c.version = text.into(),
            |c, text| c.issued_at = text.into(),
        ];
        for spoil in spoil {
            for text in ["", "a\nURI: https://elsewhere", "a\r", "\u{0}", "a\u{85}b", "a\u{2028}b"] {
                let mut fields = challenge();
                spoil(&mut fields, text);
                let refused = fields.message("0x00").expect_err("must not be signed");
                assert!(!refused.contains('\n') && !refused.contains("elsewhere"), "{refused}");
            }
        }
    }

    #[test]
    fn strict_fields_of_a_challenge_stay_strict() {
        let good = json!({"nonce":"n","domain":"d","uri":"u","version":"1","chainId":1,"issuedAt":"t","more":0});
        assert!(serde_json::from_value::<Challenge>(good.clone()).is_ok());
        for (field, value) in [("version", json!(1)), ("chainId", json!("1")), ("nonce", json!(null))] {
            let mut bad = good.clone();
            bad[field] = value;
            assert!(serde_json::from_value::<Challenge>(bad).is_err(), "{field}");
        }
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date_and_has_a_bound() {
        assert_eq!(retry_after("7"), Some(Duration::from_secs(7)));
        assert_eq!(retry_after("999999"), Some(RETRY_AFTER_MAX));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("Fri, 06 Nov 2893 08:49:37 GMT"), Some(RETRY_AFTER_MAX));
        assert_eq!(retry_after("soon"), None);
    }

    #[test]
    fn statuses_fall_into_their_classes() {
        let class = |status: u16| {
            let status = StatusCode::from_u16(status).expect("a status");
            Refusal::Status { step: REGISTER, status, excerpt: String::new(), retry_after: None }.class()
        };
        assert_eq!(class(409), Class::Conflict);
        assert!([408, 429, 500, 503, 599].iter().all(|status| class(*status) == Class::Transient));
        assert!([301, 400, 401, 403, 404, 422].iter().all(|status| class(*status) == Class::Slow));
    }
}
