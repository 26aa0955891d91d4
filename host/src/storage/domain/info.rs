//! What domain servers say about their limits, remembered for a minute per server.

use std::{collections::HashMap, sync::Mutex, time::Duration};

use http::{Method, StatusCode};
use tokio::time::Instant;
use url::Url;

use super::{Inner, calls::Call, cid::api_url, wire::InfoJson};

/// How long an answer is believed.
const FRESH: Duration = Duration::from_secs(60);

/// By base URL: when it was asked, and the largest request it takes (`None`: not said).
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<HashMap<String, (Instant, Option<u64>)>>);

impl Inner {
    /// The largest request `server` takes, if it says one. Asking never fails an upload: a server
    /// that does not answer is unlimited here and says so itself when it gets too much.
    pub(super) async fn request_bytes_max(&self, server: &Url) -> Option<u64> {
        let key = server.as_str().trim_end_matches('/').to_owned();
        let cache = &self.config.info.0;
        let lock = || cache.lock().expect("the cache is only read and set");
        if let Some((_, limit)) = lock().get(&key).filter(|(asked, _)| asked.elapsed() < FRESH) {
            return *limit;
        }
        let mut call = Call::new("asking for the domain server's limits", Method::GET, api_url(server, &["info"]));
        call.bearer = false;
        let response = self.exchange(&call).await;
        let limit = match response {
            Ok(response) if response.status() == StatusCode::NOT_FOUND => None,
            Ok(response) if response.status().is_success() => match self.decode::<InfoJson>(&call, response).await {
                // Zero is "no limit" to newer servers and "unknown" to older clients: the same to us.
                Ok(info) => u64::try_from(info.upload.request_max_bytes).ok().filter(|limit| *limit > 0),
                Err(err) => {
                    tracing::debug!(error = %err, "domain server's limits are unknown");
                    return None;
                }
            },
            Ok(response) => {
                tracing::debug!(status = response.status().as_u16(), "domain server's limits are unknown");
                return None;
            }
            Err(err) => {
                tracing::debug!(error = %err, "domain server's limits are unknown");
                return None;
            }
        };
        let mut known = lock();
        known.retain(|_, (asked, _)| asked.elapsed() < FRESH);
        known.insert(key, (Instant::now(), limit));
        limit
    }
}
