//! Limits that domain servers state, cached for a minute per server (posemesh.md sections 6.6, 10.5).

use std::{collections::HashMap, sync::Mutex, time::Duration};

use http::{Method, StatusCode};
use tokio::time::Instant;
use url::Url;

use super::{
    Inner,
    calls::Call,
    cid::api_url,
    upload::Plan,
    wire::{InfoJson, UploadInfoJson},
};
use crate::model::{PortError, PortErrorKind};

/// How long an answer is cached.
const CACHE_TIME: Duration = Duration::from_secs(60);

/// An artifact of at most so many bytes is sent in one request. A stream is held in memory until it is longer.
const SINGLE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// The same for a file while the server's limits are unknown.
const UNSTATED_BYTES_MAX: u64 = 64 * 1024;

/// The limits of a server. `None`: it states no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// The largest request, in bytes.
    pub(super) request_bytes_max: Option<u64>,
    /// The largest stored item, in bytes.
    pub(super) item_bytes_max: Option<u64>,
    /// Whether to try uploads in parts. `false` only if the server says that it has none.
    pub(super) parts: bool,
    /// Whether the server stated any limit.
    stated: bool,
}

impl Limits {
    const UNKNOWN: Self = Self { request_bytes_max: None, item_bytes_max: None, parts: true, stated: false };

    fn read(info: &UploadInfoJson) -> Result<Self, String> {
        let parts = info.multipart.as_ref();
        let limit = |field: &str, value: Option<i64>| match value {
            None | Some(0) => Ok(None),
            Some(value) => {
                let limit = u64::try_from(value);
                limit.map(Some).map_err(|_| format!("{field} is {value}, expected 0 for no limit, or more"))
            }
        };
        // The answer to each upload has the part size that is used. This value is only checked.
        limit("part_size_bytes", parts.and_then(|parts| parts.part_size_bytes))?;
        Ok(Self {
            request_bytes_max: limit("request_max_bytes", Some(info.request_max_bytes))?,
            item_bytes_max: limit("domain_data_max_bytes", info.domain_data_max_bytes)?,
            parts: parts.is_none_or(|parts| parts.enabled != Some(false)),
            stated: true,
        })
    }

    /// The largest payload of `plan` that is sent in one request, without trying parts.
    pub(super) fn single_bytes_max(&self, plan: &Plan) -> u64 {
        // Boundary, part headers and line ends, with a margin.
        let overhead = 512 + plan.name.len() as u64 + plan.data_type.len() as u64;
        let most = self.request_bytes_max.map_or(u64::MAX, |limit| limit.saturating_sub(overhead));
        most.min(SINGLE_BYTES_MAX)
    }

    /// The same for a file. An upload of a file in parts needs no known limits (posemesh.md section 6.8). While the
    /// limits are unknown, only small files are sent in one request first. The refusal of a request that is too
    /// large may be lost with the connection.
    pub(super) fn single_file_bytes_max(&self, plan: &Plan) -> u64 {
        self.single_bytes_max(plan).min(if self.stated { u64::MAX } else { UNSTATED_BYTES_MAX })
    }

    /// Refuses an artifact of at least `bytes` that the server would not store, before it is sent.
    pub(super) fn check(&self, plan: &Plan, bytes: u64) -> Result<(), PortError> {
        match self.item_bytes_max {
            Some(most) if bytes > most => {
                let message = format!("{} refused: the domain server stores at most {most} bytes an item", plan.what);
                Err(PortError::new(PortErrorKind::Limit, message))
            }
            _ => Ok(()),
        }
    }
}

/// By base URL: the time of the request, and the limits.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<HashMap<String, (Instant, Limits)>>);

impl Inner {
    /// The limits of `server`. A failed request never fails an upload: the limits are unknown then, and the server
    /// refuses what is too large.
    pub(super) async fn limits(&self, server: &Url) -> Limits {
        let key = server.as_str().trim_end_matches('/').to_owned();
        let cache = &self.config.info.0;
        let lock = || cache.lock().expect("the cache is only read and set");
        if let Some((_, limits)) = lock().get(&key).filter(|(requested_at, _)| requested_at.elapsed() < CACHE_TIME) {
            return *limits;
        }
        let limits = match self.ask_limits(server).await {
            Ok(limits) => limits,
            Err(reason) => {
                tracing::debug!(error = %reason, "domain server's limits are unknown");
                return Limits::UNKNOWN;
            }
        };
        let mut known = lock();
        known.retain(|_, (requested_at, _)| requested_at.elapsed() < CACHE_TIME);
        known.insert(key, (Instant::now(), limits));
        limits
    }

    async fn ask_limits(&self, server: &Url) -> Result<Limits, String> {
        let mut call = Call::new("asking for the domain server's limits", Method::GET, api_url(server, &["info"]));
        call.bearer = false;
        let response = self.exchange(&call).await.map_err(|err| err.to_string())?;
        match response.status() {
            // Older servers have no such request.
            StatusCode::NOT_FOUND => {
                self.excerpt(response).await; // reads to the end, so that the connection can be reused
                Ok(Limits::UNKNOWN)
            }
            _ => {
                let response = self.accepted(&call, response).await.map_err(|failed| failed.err.to_string())?;
                let info: InfoJson = self.decode(&call, response).await.map_err(|failed| failed.err.to_string())?;
                Limits::read(&info.upload)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The limits read from an `upload` object: request, item, parts.
    #[track_caller]
    fn check(upload: serde_json::Value, expected: Result<(Option<u64>, Option<u64>, bool), &str>) {
        let info: UploadInfoJson = serde_json::from_value(upload.clone()).expect("an answer of the protocol");
        let read = Limits::read(&info).map(|read| (read.request_bytes_max, read.item_bytes_max, read.parts));
        assert_eq!(read, expected.map_err(str::to_owned), "{upload}");
    }

    #[test]
    fn older_and_newer_answers_are_read() {
        check(json!({ "request_max_bytes": 50, "multipart": { "enabled": true } }), Ok((Some(50), None, true)));
        check(json!({ "request_max_bytes": 0 }), Ok((None, None, true)));
        check(json!({ "request_max_bytes": 9, "multipart": { "enabled": false } }), Ok((Some(9), None, false)));
        check(
            json!({ "request_max_bytes": 9, "domain_data_max_bytes": 0, "new": {},
                "multipart": { "enabled": true, "part_size_bytes": 0 } }),
            Ok((Some(9), None, true)),
        );
        check(json!({ "request_max_bytes": 9, "domain_data_max_bytes": 7 }), Ok((Some(9), Some(7), true)));
    }

    #[test]
    fn negative_limits_are_refused() {
        let complaint = "request_max_bytes is -1, expected 0 for no limit, or more";
        check(json!({ "request_max_bytes": -1 }), Err(complaint));
        check(
            json!({ "request_max_bytes": 1, "domain_data_max_bytes": -2 }),
            Err("domain_data_max_bytes is -2, expected 0 for no limit, or more"),
        );
        check(
            json!({ "request_max_bytes": 1, "multipart": { "part_size_bytes": -3 } }),
            Err("part_size_bytes is -3, expected 0 for no limit, or more"),
        );
    }
}
