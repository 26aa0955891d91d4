//! Proves to the control plane who this node is.
//!
//! One task, [`Auth::run`], registers the wallet with the discovery service (DDS) and keeps a
//! node token fresh. Everyone else holds a [`TokenSource`] and asks it for the bearer of the
//! moment. Nothing in here knows what the token is used for. Start reading at `renewal`; `siwe`
//! has the calls, `registration` and `tokens` the two states people look at.

mod key;
mod registration;
mod renewal;
mod siwe;
#[cfg(test)]
mod tests;
mod tokens;

use std::time::Duration;

use secrecy::SecretString;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{model::Capability, transport};

pub use key::{KeyError, NodeKey};
pub use registration::{Registration, RegistrationState};
pub use tokens::{AuthError, TokenSource};

/// Who the node is and how patiently it says so.
#[derive(Clone, Debug)]
pub struct Config {
    /// Base URL of the discovery service. Trailing slashes do not matter, a path in front is kept.
    pub dds: Url,
    /// The shared secret that admits a node.
    pub reg_secret: SecretString,
    /// The wallet.
    pub key: NodeKey,
    /// Version announced, semver without a leading `v`.
    pub version: String,
    /// What this node serves. Sent sorted and without doubles.
    pub capabilities: Vec<Capability>,
    /// Pause after a conflict or a refusal that will not pass by itself.
    pub register_interval: Duration,
    /// Transient failures in a row before one interval is waited; negative: no cap.
    pub register_max_retry: i32,
    /// Share of a token's life after which it is renewed, 0 to 1.
    pub token_safety_ratio: f64,
    /// Failed logins in a row, beyond the first, before users without a token are told.
    pub token_max_retries: u32,
    /// Spread of the renewal instant, to both sides.
    pub token_jitter: Duration,
    /// Limit of each single call.
    pub request_timeout: Duration,
}

/// Registration and login of this node, not started.
pub struct Auth {
    config: Config,
    dds: siwe::Dds,
    desk: tokens::Desk,
    status: watch::Sender<Registration>,
}

impl Auth {
    /// Makes the room; no call is made before [`Auth::run`].
    #[must_use]
    pub fn new(mut config: Config, client: transport::Client) -> Self {
        config.capabilities.sort();
        config.capabilities.dedup();
        // A limit of nothing would fail every call.
        let timeout = config.request_timeout.max(Duration::from_secs(1));
        let dds = siwe::Dds::new(&config.dds, client, config.key.clone(), timeout, config.reg_secret.clone());
        Self { config, dds, desk: tokens::Desk::new(), status: watch::Sender::new(Registration::default()) }
    }

    /// Where others get the node token.
    #[must_use]
    pub fn tokens(&self) -> TokenSource {
        self.desk.source()
    }

    /// How the registration stands, for status pages and readiness.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Registration> {
        self.status.subscribe()
    }

    /// Registers, logs in and renews until `stop`. A call under way is dropped then, and token
    /// users get [`AuthError::Stopped`]: stop this room after the last report is sent.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            never = self.keep() => match never {},
        }
    }
}
