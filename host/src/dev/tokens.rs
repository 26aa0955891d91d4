//! Domain tokens and author grants. They are JWTs in the form of posemesh.md sections 10.3 and 4.13.1. The signing
//! key lives as long as the dev server.
//!
//! A signature only proves that this server wrote the token. The plane decides whether a task's token is still valid.
//! It knows the holder of the task and the newest token.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use hmac::{Hmac, KeyInit, Mac};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use uuid::Uuid;

/// Prefix of the tokens that are not JWTs.
const OPAQUE: &str = "dom-";

/// The claims of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Claims {
    iss: String,
    sub: String,
    aud: Vec<String>,
    pub(super) domain_id: Uuid,
    exp: i64,
    iat: i64,
    org: Uuid,
    #[serde(rename = "type")]
    kind: String,
    scopes: Vec<String>,
    /// Set in a task's token: the task, and the number of the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) task: Option<(Uuid, u64)>,
}

/// Writes and reads tokens.
pub(super) struct Tokens {
    key: Hmac<Sha256>,
    domain_server: String,
    domain_id: Uuid,
    org: Uuid,
}

impl Tokens {
    pub(super) fn new(domain_server: String, domain_id: Uuid, org: Uuid) -> Self {
        let secret: [u8; 32] = rand::random();
        let key = Hmac::new_from_slice(&secret).expect("a key of any length fits");
        Self { key, domain_server, domain_id, org }
    }

    /// Token number `serial` of a task, for the node that holds the task.
    pub(super) fn for_task(&self, task: Uuid, serial: u64, node: Uuid, now: Timestamp, expires: Timestamp) -> String {
        self.write(&Claims {
            iss: "dds".to_owned(),
            sub: node.to_string(),
            aud: vec![self.domain_server.clone()],
            domain_id: self.domain_id,
            exp: whole_seconds(expires),
            iat: now.as_second(),
            org: self.org,
            kind: "task-access".to_owned(),
            scopes: vec!["domain-data:rw".to_owned()],
            task: Some((task, serial)),
        })
    }

    /// An author's grant: everything in the domain, including jobs.
    pub(super) fn grant(&self, now: Timestamp, expires: Timestamp) -> String {
        self.write(&Claims {
            iss: "dds".to_owned(),
            sub: "dev-author".to_owned(),
            aud: vec![self.domain_server.clone(), "dds".to_owned()],
            domain_id: self.domain_id,
            exp: whole_seconds(expires),
            iat: now.as_second(),
            org: self.org,
            kind: "user-access".to_owned(),
            scopes: vec!["domain-data:rw".to_owned()],
            task: None,
        })
    }

    fn write(&self, claims: &Claims) -> String {
        // {"alg":"HS256","typ":"JWT"}
        let mut text = String::from("eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.");
        let claims = serde_json::to_vec(claims).expect("claims are plain JSON");
        BASE64.encode_string(claims, &mut text);
        let mut mac = self.key.clone();
        mac.update(text.as_bytes());
        let signature = mac.finalize().into_bytes();
        text.push('.');
        BASE64.encode_string(signature, &mut text);
        text
    }

    /// The claims of a token that this server wrote and that has not expired.
    pub(super) fn read(&self, token: &str, now: Timestamp) -> Option<Claims> {
        self.read_expired(token).filter(|claims| claims.exp > now.as_second())
    }

    /// Converts a token to an opaque one, from which a node can read nothing.
    pub(super) fn opaque(token: &str) -> String {
        format!("{OPAQUE}{}", BASE64.encode(token))
    }

    /// The claims of a token that this server wrote, expired or not.
    pub(super) fn read_expired(&self, token: &str) -> Option<Claims> {
        if let Some(hidden) = token.strip_prefix(OPAQUE) {
            return self.read_expired(std::str::from_utf8(&BASE64.decode(hidden).ok()?).ok()?);
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let mut mac = self.key.clone();
        mac.update(signed.as_bytes());
        mac.verify_slice(&BASE64.decode(signature).ok()?).ok()?;
        let (_, claims) = signed.split_once('.')?;
        serde_json::from_slice(&BASE64.decode(claims).ok()?).ok()
    }
}

impl Tokens {
    /// Task and number of a task's token, valid or not.
    pub(super) fn task_of(&self, token: &str) -> Option<(Uuid, u64)> {
        self.read_expired(token)?.task
    }
}

/// `exp` counts seconds and is rounded up. A node rejects a lease whose token has expired on arrival. The plane knows
/// the exact expiry of its own tokens.
fn whole_seconds(at: Timestamp) -> i64 {
    at.as_second() + i64::from(at.subsec_nanosecond() > 0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("in range")
    }

    #[test]
    fn tokens_are_jwts_with_required_claims() {
        let domain = Uuid::new_v4();
        let tokens = Tokens::new("http://127.0.0.1:1".to_owned(), domain, Uuid::new_v4());
        let token = tokens.for_task(Uuid::new_v4(), 3, Uuid::new_v4(), at(100), at(160));
        let parts: Vec<&str> = token.split('.').collect();
        assert_eq!(parts.len(), 3);
        let claims: serde_json::Value =
            serde_json::from_slice(&BASE64.decode(parts[1]).expect("base64url")).expect("JSON");
        assert_eq!(claims["iss"], "dds");
        assert_eq!(claims["domain_id"], domain.to_string());
        assert_eq!(claims["exp"], 160);
        assert_eq!(claims["aud"], serde_json::json!(["http://127.0.0.1:1"]));
    }

    #[test]
    fn only_own_unexpired_tokens_are_accepted() {
        let tokens = Tokens::new("http://127.0.0.1:1".to_owned(), Uuid::new_v4(), Uuid::new_v4());
        let other = Tokens::new("http://127.0.0.1:1".to_owned(), Uuid::new_v4(), Uuid::new_v4());
        let grant = tokens.grant(at(100), at(100) + Duration::from_secs(60));
        assert!(tokens.read(&grant, at(159)).is_some_and(|claims| claims.task.is_none()));
        assert_eq!(tokens.read(&grant, at(160)), None);
        assert_eq!(other.read(&grant, at(100)), None);
        assert_eq!(tokens.read(&format!("{grant}x"), at(100)), None);
        assert_eq!(tokens.read("", at(100)), None);
        let opaque = Tokens::opaque(&grant);
        assert!(!opaque.contains('.') && tokens.read(&opaque, at(159)).is_some());
        assert_eq!(other.read(&opaque, at(100)), None);
    }
}
