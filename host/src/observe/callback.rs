//! `POST /internal/v1/registrations`: the callback of the sign-in service (posemesh.md section 2.7).
//!
//! Every client that reaches the pages can send this request. So there are limits for the size of the body,
//! the time to send it, concurrent requests, and requests per sender. [`HealthChecks`] decides whether a
//! callback is expected. No part of a body is logged or repeated in an answer.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::StreamExt as _;
use secrecy::{SecretString, zeroize::Zeroizing};
use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::json;

use crate::{
    listen,
    model::{Callback, HealthChecks},
};

/// Largest body, in bytes: the lists of domains and lighthouses may be long.
const BODY_BYTES_MAX: usize = 256 * 1024;
/// Bytes of a larger body that are read, so that its sender receives the answer.
const REFUSED_BYTES_MAX: usize = 4 * BODY_BYTES_MAX;
/// Largest secret, in bytes.
const SECRET_BYTES_MAX: usize = 4096;
/// Time limit for the arrival of a body.
const BODY_TIME_MAX: Duration = Duration::from_secs(5);
/// Bodies that are read concurrently.
const CONCURRENT_MAX: usize = 8;
/// Bodies of one sender that are read concurrently.
const CONCURRENT_PER_SENDER_MAX: usize = 2;
/// Requests of one sender in a row, and the interval at which the count decreases by one.
const BURST: u32 = 20;
const DECREASE_INTERVAL: Duration = Duration::from_millis(500);
/// Most senders in memory.
const SENDERS_MAX: usize = 256;

/// State of the handler.
pub(super) struct CallbackQueue {
    health_checks: Arc<dyn HealthChecks>,
    senders: Mutex<Senders>,
    /// Senders of the bodies that are being read.
    reading: Mutex<Vec<IpAddr>>,
}

impl CallbackQueue {
    pub(super) fn new(health_checks: Arc<dyn HealthChecks>) -> Arc<Self> {
        Arc::new(Self { health_checks, senders: Mutex::default(), reading: Mutex::default() })
    }

    /// Admits a body of `sender`. `None`: too many are being read.
    fn reading(&self, sender: IpAddr) -> Option<Reading<'_>> {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let own = reading.iter().filter(|other| **other == sender).count();
        (own < CONCURRENT_PER_SENDER_MAX && reading.len() < CONCURRENT_MAX).then(|| {
            reading.push(sender);
            Reading { queue: self, sender }
        })
    }

    pub(super) fn health_checks(&self) -> &dyn HealthChecks {
        &*self.health_checks
    }
}

/// A body that is being read.
struct Reading<'a> {
    queue: &'a CallbackQueue,
    sender: IpAddr,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut reading = self.queue.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = reading.iter().position(|other| *other == self.sender) {
            reading.swap_remove(at);
        }
    }
}

/// The body. Unknown fields and the lists are ignored.
#[derive(Deserialize)]
struct Body {
    id: String,
    #[serde(deserialize_with = "wiped")]
    secret: Zeroizing<String>,
    #[serde(default)]
    organization_id: Option<String>,
    #[serde(default, rename = "lighthouses_in_domains")]
    _lighthouses: IgnoredAny,
    #[serde(default, rename = "domains")]
    _domains: IgnoredAny,
}

fn wiped<'de, D: Deserializer<'de>>(from: D) -> Result<Zeroizing<String>, D::Error> {
    String::deserialize(from).map(Zeroizing::new)
}

/// Status and text of a refused request.
type Refusal = (StatusCode, &'static str);

/// See the module documentation.
pub(super) async fn registrations(
    State(queue): State<Arc<CallbackQueue>>,
    ConnectInfo(sender): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    let sender = listen::sender(sender.ip());
    let admitted = queue.senders.lock().unwrap_or_else(PoisonError::into_inner).admit(sender, Instant::now());
    let Some(_reading) = admitted.then(|| queue.reading(sender)).flatten() else {
        return unread((StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "1")], "too many callbacks"));
    };
    match read(request).await {
        Ok(callback) => match queue.health_checks.called_back(callback) {
            Ok(()) => Json(json!({ "ok": true })).into_response(),
            Err(_) => (StatusCode::CONFLICT, "no registration is in flight").into_response(),
        },
        Err(refusal) => unread(refusal),
    }
}

/// An answer to a request that may not have been read to its end. It announces that the connection closes, because
/// the sender's next request on it would be lost.
fn unread(answer: impl IntoResponse) -> Response {
    let mut answer = answer.into_response();
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Reads the callback.
async fn read(request: Request) -> Result<Callback, Refusal> {
    let (head, body) = request.into_parts();
    if !is_json(&head.headers) {
        return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, "expected Content-Type: application/json"));
    }
    let mut body = body.into_data_stream();
    let whole = async {
        let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
        let mut length = 0;
        while let Some(data) = body.next().await {
            let data = data.map_err(|_| (StatusCode::BAD_REQUEST, "the body broke off"))?;
            length += data.len();
            if length <= BODY_BYTES_MAX {
                bytes.extend_from_slice(&data);
            } else if length > REFUSED_BYTES_MAX {
                break;
            }
        }
        if length > BODY_BYTES_MAX {
            return Err((StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than 256 KiB"));
        }
        Ok::<_, Refusal>(bytes)
    };
    let late = |_| (StatusCode::REQUEST_TIMEOUT, "the body did not arrive within 5 s");
    let bytes = tokio::time::timeout(BODY_TIME_MAX, whole).await.map_err(late)??;
    let body: Body = serde_json::from_slice(&bytes).map_err(|err| match err.classify() {
        // The decoder's text may contain the secret.
        serde_json::error::Category::Data => {
            (StatusCode::UNPROCESSABLE_ENTITY, "a field is missing or has another type; expected id and secret as text")
        }
        _ => (StatusCode::BAD_REQUEST, "the body is not JSON"),
    })?;
    if body.id.trim().is_empty() {
        return Err((StatusCode::UNPROCESSABLE_ENTITY, "missing id"));
    }
    if body.secret.trim().is_empty() {
        return Err((StatusCode::UNPROCESSABLE_ENTITY, "missing secret"));
    }
    if body.secret.len() > SECRET_BYTES_MAX {
        return Err((StatusCode::FORBIDDEN, "secret too large"));
    }
    let secret = SecretString::from(body.secret.as_str());
    Ok(Callback { id: body.id, secret, organization_id: body.organization_id })
}

/// `application/json`, or a type that ends in `+json`.
fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// Recent requests of each sender: a count that decreases by one every [`DECREASE_INTERVAL`].
#[derive(Default)]
struct Senders(HashMap<IpAddr, (u32, Instant)>);

impl Senders {
    fn admit(&mut self, sender: IpAddr, now: Instant) -> bool {
        let left = |(count, since): (u32, Instant)| {
            let forgotten = now.saturating_duration_since(since).as_millis() / DECREASE_INTERVAL.as_millis();
            count.saturating_sub(u32::try_from(forgotten).unwrap_or(u32::MAX))
        };
        if !self.0.contains_key(&sender) && self.0.len() >= SENDERS_MAX {
            self.0.retain(|_, seen| left(*seen) > 0);
            if self.0.len() >= SENDERS_MAX {
                return false;
            }
        }
        let (count, since) = self.0.entry(sender).or_insert((0, now));
        let still = left((*count, *since));
        if still >= BURST {
            return false;
        }
        if still != *count {
            *since = now;
        }
        *count = still + 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sender_has_its_own_rate_limit() {
        let (start, mut senders) = (Instant::now(), Senders::default());
        let ip = |last: u8| IpAddr::from([192, 0, 2, last]);
        let mut admitted = |sender: u8, count: usize, at_ms: u64| {
            let now = start + Duration::from_millis(at_ms);
            (0..count).filter(|_| senders.admit(ip(sender), now)).count()
        };
        assert_eq!(admitted(1, 100, 0), 20);
        assert_eq!(admitted(2, 1, 0), 1);
        assert_eq!(admitted(1, 100, 499), 0);
        assert_eq!(admitted(1, 100, 1000), 2);
        assert_eq!(admitted(1, 100, 60_000), 20);
    }

    #[test]
    fn idle_senders_are_forgotten_at_the_limit() {
        let (start, mut senders) = (Instant::now(), Senders::default());
        let ip = |n: u32| IpAddr::from(n.to_be_bytes());
        assert!((0..256).all(|n| senders.admit(ip(n), start)));
        assert!(!senders.admit(ip(256), start), "all senders are recent");
        assert!(senders.admit(ip(256), start + DECREASE_INTERVAL));
        assert_eq!(senders.0.len(), 1);
    }
}
