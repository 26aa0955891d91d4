//! A run's data on a domain server, if its metadata name one.

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::model::{AnnouncedData, Coordinates, DataLocation, Lease, Token, in_a_line, redact};

/// The metadata that name a domain server. A run has all of them or none.
const KEYS: [&str; 3] = ["domain_id", "domain_server_url", TOKEN_KEY];
/// The one with the token.
pub(super) const TOKEN_KEY: &str = "access_token";
/// Longest part of a value that an error message contains, in characters.
const SHOWN_CHARS_MAX: usize = 64;

/// A domain, its server, and the token for it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DomainData {
    pub(super) at: Coordinates,
    pub(super) token: Token,
}

impl DomainData {
    /// Takes the keys out of the metadata of a run. `None`: its data is inline.
    ///
    /// # Errors
    /// One line about a missing key or an unusable value. It does not contain the token.
    pub(super) fn take(metadata: &mut Map<String, Value>) -> Result<Option<Self>, String> {
        let values = KEYS.map(|key| metadata.remove(key));
        if values.iter().all(Option::is_none) {
            return Ok(None);
        }
        let mut texts = [const { String::new() }; KEYS.len()];
        for ((key, value), text) in KEYS.iter().zip(values).zip(&mut texts) {
            *text = match value {
                Some(Value::String(value)) => value,
                Some(_) => return Err(format!("its metadata {key} is not a text")),
                None => {
                    let all = KEYS.join(", ");
                    return Err(format!("its metadata have no {key}; data on a domain server needs {all}"));
                }
            };
        }
        let [domain, server, token] = texts;
        let token = Token::new(token);
        let read = coordinates(&domain, &server).and_then(|at| {
            // A header holds it.
            let usable = !token.expose().is_empty() && token.expose().bytes().all(|byte| byte.is_ascii_graphic());
            usable
                .then_some(at)
                .ok_or_else(|| "its metadata access_token is empty or has characters that no token has".to_owned())
        });
        match read {
            Ok(at) => Ok(Some(Self { at, token })),
            Err(mut reason) => {
                redact(&mut reason, &[token]);
                Err(reason)
            }
        }
    }

    /// The domain data of a lease that was read.
    pub(super) fn of(lease: &Lease) -> Option<Self> {
        match (&lease.data, &lease.token) {
            (AnnouncedData::Known(DataLocation::DomainServer(at)), Some(token)) => {
                Some(Self { at: at.clone(), token: token.clone() })
            }
            _ => None,
        }
    }
}

fn coordinates(domain: &str, server: &str) -> Result<Coordinates, String> {
    let id = Uuid::parse_str(domain.trim()).map_err(|_| {
        let shown: String = in_a_line(domain).chars().take(SHOWN_CHARS_MAX).collect();
        format!("its metadata domain_id {shown:?} is not a UUID")
    })?;
    match AnnouncedData::at_server(Some(server), Some(id)).resolve()? {
        DataLocation::DomainServer(at) => Ok(at),
        _ => unreachable!("coordinates name a domain server"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TOKEN: &str = "a-token-that-nobody-may-see";

    fn take(metadata: Value) -> (Result<Option<DomainData>, String>, Value) {
        let Value::Object(mut metadata) = metadata else { panic!("an object") };
        (DomainData::take(&mut metadata), Value::Object(metadata))
    }

    #[test]
    fn three_keys_name_a_domain_server() {
        let whole = json!({
            "domain_id": "3F0C0000-0000-0000-0000-000000000001", "domain_server_url": "https://ds.test/base",
            "access_token": TOKEN, "voxel": 1,
        });
        let (taken, rest) = take(whole);
        let data = taken.expect("usable").expect("a domain server");
        assert_eq!(data.at.server.as_str(), "https://ds.test/base");
        assert_eq!(data.at.domain.to_string(), "3f0c0000-0000-0000-0000-000000000001");
        assert_eq!((data.token.expose(), rest), (TOKEN, json!({ "voxel": 1 })));
        assert_eq!(take(json!({ "voxel": 1 })), (Ok(None), json!({ "voxel": 1 })));
    }

    #[test]
    fn incomplete_or_unusable_keys_are_refused() {
        let whole = json!({
            "domain_id": Uuid::nil(), "domain_server_url": "https://ds.test", "access_token": TOKEN,
        });
        for key in KEYS {
            let mut some = whole.clone();
            some.as_object_mut().expect("an object").remove(key);
            let reason = take(some).0.expect_err("one is missing");
            assert!(reason.starts_with(&format!("its metadata have no {key};")), "{reason}");
        }
        for (key, value, wanted) in [
            ("domain_id", json!(""), "domain_id \"\" is not a UUID"),
            ("domain_id", json!("lab\n1"), "is not a UUID"),
            ("domain_id", json!(7), "domain_id is not a text"),
            // Somebody has mixed up the two.
            ("domain_id", json!(TOKEN), "domain_id \"(token)\" is not a UUID"),
            ("domain_server_url", json!(" "), "domain_server_url"),
            ("domain_server_url", json!("ftp://ds.test"), "is not an absolute http(s) URL"),
            ("access_token", json!(""), "access_token is empty"),
            ("access_token", json!("a b"), "access_token is empty or has characters"),
            ("access_token", json!("a\nb"), "access_token is empty or has characters"),
        ] {
            let mut other = whole.clone();
            other[key] = value;
            let reason = take(other).0.expect_err("one is unusable");
            assert!(reason.contains(wanted) && !reason.contains(TOKEN), "{wanted}: {reason}");
        }
    }
}
