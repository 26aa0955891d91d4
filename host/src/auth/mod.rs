//! Proves to the control plane who this node is.
//!
//! One task, [`Auth::run`], registers the wallet with the discovery service (DDS) and keeps a
//! node token fresh. Everyone else holds a [`TokenSource`] and asks it for the bearer of the
//! moment. Nothing in here knows what the token is used for. Start reading at `renewal`; `dds`
//! has the calls, `registration` and `tokens` the two states people look at, `visits` what the
//! service asks of this node.

mod audience;
mod dds;
mod health_checks;
mod key;
mod pauses;
mod refusal;
mod registration;
mod renewal;
mod siwe;
#[cfg(test)]
mod tests;
mod tokens;

use std::{sync::Arc, time::Duration};

use secrecy::SecretString;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{
    model::{Capability, HealthChecks, RegistrationForm, RegistrationState},
    transport,
};

pub use key::{KeyError, NodeKey};
pub use registration::Registration;
pub use tokens::{AuthError, TokenSource};

/// How a node makes itself known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// By a signed message alone (posemesh.md section 2.5).
    Wallet,
    /// By a URL at which the service calls back (posemesh.md section 2.9).
    Callback {
        /// As configured; it is signed and sent byte for byte.
        url: String,
    },
}

impl Form {
    /// As the status page shows it.
    #[must_use]
    pub fn kind(&self) -> RegistrationForm {
        match self {
            Self::Wallet => RegistrationForm::Wallet,
            Self::Callback { .. } => RegistrationForm::Callback,
        }
    }

    /// As the log shows it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Wallet => "wallet",
            Self::Callback { .. } => "callback",
        }
    }
}

/// Who the node is and how patiently it says so.
#[derive(Clone, Debug)]
pub struct Config {
    /// Base URL of the discovery service. Trailing slashes do not matter, a path in front is kept.
    pub dds: Url,
    /// How the node registers.
    pub form: Form,
    /// The only domain sign-in messages may be for; absent: that of the service.
    pub sign_in_domain: Option<String>,
    /// The shared secret that admits a node.
    pub reg_secret: SecretString,
    /// The wallet.
    pub key: NodeKey,
    /// Version announced, semver without a leading `v`.
    pub version: String,
    /// How long a registration counts before it is repeated, and the pause after a conflict or a
    /// refusal that will not pass by itself.
    pub register_interval: Duration,
    /// Transient failures in a row before one interval is waited; negative: no cap.
    pub register_max_retry: i32,
    /// Share of a token's life after which it is renewed, 0 to 1.
    pub token_safety_ratio: f64,
    /// Failed logins in a row, beyond the first, before users without a token are told.
    pub token_max_retries: u32,
    /// Spread of the renewal instant, to both sides, and the longest first pause after a failed login.
    pub token_jitter: Duration,
    /// Limit of each single call.
    pub request_timeout: Duration,
}

impl Config {
    /// The usual settings of a wallet.
    #[must_use]
    pub fn new(dds: Url, key: NodeKey) -> Self {
        Self {
            dds,
            form: Form::Wallet,
            sign_in_domain: None,
            reg_secret: SecretString::default(),
            key,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            register_interval: Duration::from_secs(120),
            register_max_retry: -1,
            token_safety_ratio: 0.75,
            token_max_retries: 3,
            token_jitter: Duration::from_millis(500),
            request_timeout: Duration::from_secs(60),
        }
    }
}

/// Registration and login of this node, not started.
pub struct Auth {
    config: Config,
    /// What this node serves now.
    capabilities: watch::Receiver<Vec<Capability>>,
    dds: dds::Dds,
    desk: tokens::TokenIssuer,
    door: Arc<health_checks::CallbackGate>,
    status: watch::Sender<Registration>,
    /// Somebody has reason to believe that the registration is gone.
    doubted: Notify,
}

impl Auth {
    /// Makes the room; no call is made before [`Auth::run`].
    ///
    /// `capabilities` are what this node serves now. They are sent sorted and without duplicates, and again after
    /// every change.
    #[must_use]
    pub fn new(config: Config, capabilities: watch::Receiver<Vec<Capability>>, client: transport::Client) -> Self {
        let door = health_checks::CallbackGate::new();
        let dds = dds::Dds::new(&config, client, Arc::clone(&door));
        let status = watch::Sender::new(Registration::default());
        Self { config, capabilities, dds, desk: tokens::TokenIssuer::new(), door, status, doubted: Notify::new() }
    }

    /// Where others get the node token.
    #[must_use]
    pub fn tokens(&self) -> TokenSource {
        self.desk.source()
    }

    /// The address of the node's wallet.
    #[must_use]
    pub fn address(&self) -> &str {
        self.config.key.address()
    }

    /// How the registration stands, for status pages and readiness.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Registration> {
        self.status.subscribe()
    }

    /// How the node registers.
    #[must_use]
    pub fn form(&self) -> &Form {
        &self.config.form
    }

    /// Takes what the service says on the node's own pages.
    #[must_use]
    pub fn health_checks(&self) -> Arc<dyn HealthChecks> {
        Arc::clone(&self.door) as _
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
