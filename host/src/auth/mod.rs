//! Proves the node's identity to the control plane.
//!
//! One task, [`Auth::run`], registers the wallet with the discovery service (DDS) and renews the node token. All other
//! code reads the current token from a [`TokenSource`]. This module does not know what the token is used for.
//!
//! Start reading at `renewal`. `dds` has the calls. `registration` and `tokens` have the two visible states.
//! `health_checks` has the requests of the service to this node.

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
    model::{Capability, HealthChecks, RegistrationForm},
    node_event::NodeEvents,
    transport,
};

pub use key::{KeyError, NodeKey};
pub use tokens::{AuthError, TokenSource};

/// How a node registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// By a signed message only (posemesh.md section 2.5).
    Wallet,
    /// By a URL that the service calls back (posemesh.md section 2.9).
    Callback {
        /// As configured. It is signed and sent byte for byte.
        url: String,
    },
}

impl Form {
    /// Its name in the status and in the log.
    #[must_use]
    pub fn kind(&self) -> RegistrationForm {
        match self {
            Self::Wallet => RegistrationForm::Wallet,
            Self::Callback { .. } => RegistrationForm::Callback,
        }
    }
}

/// The identity of the node, and the limits of its sign-in.
#[derive(Clone, Debug)]
pub struct Config {
    /// Base URL of the discovery service. Trailing slashes are ignored. A path prefix is kept.
    pub dds: Url,
    /// How the node registers.
    pub form: Form,
    /// The only domain that sign-in messages may name. `None`: the domain of the service.
    pub sign_in_domain: Option<String>,
    /// The shared secret that a node needs to register.
    pub reg_secret: SecretString,
    /// The wallet.
    pub key: NodeKey,
    /// The announced version, semver without a leading `v`.
    pub version: String,
    /// The time until a registration is repeated. Also the longest pause after a conflict, and the pause after a
    /// refusal that only an operator can fix.
    pub register_interval: Duration,
    /// Consecutive transient failures before a pause of one interval. Negative: no cap.
    pub register_max_retry: i32,
    /// The share of a token's life after which it is renewed, 0 to 1.
    pub token_safety_ratio: f64,
    /// Consecutive failed logins, beyond the first, before callers without a token get an error.
    pub token_max_retries: u32,
    /// Jitter of the renewal time, to both sides. Also bounds the first pauses after a failed login.
    pub token_jitter: Duration,
    /// The time limit of each call.
    pub request_timeout: Duration,
}

impl Config {
    /// The default settings with a wallet.
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

/// Registration and login of this node, not yet started.
pub struct Auth {
    config: Config,
    /// The capabilities that this node serves now.
    capabilities: watch::Receiver<Vec<Capability>>,
    dds: dds::Dds,
    issuer: tokens::TokenIssuer,
    gate: Arc<health_checks::CallbackGate>,
    /// Receives each change of the registration and of the login, and shows them in the status.
    events: NodeEvents,
    /// Requests a new registration, because the service may have lost the current one.
    reregister: Notify,
}

impl Auth {
    /// Creates the module. [`Auth::run`] makes the first call.
    ///
    /// `capabilities` is what this node serves now. It is sent sorted, without duplicates, and again after every change.
    #[must_use]
    pub fn new(
        config: Config,
        capabilities: watch::Receiver<Vec<Capability>>,
        client: transport::Client,
        events: NodeEvents,
    ) -> Self {
        let gate = health_checks::CallbackGate::new(events.board().clone());
        let dds = dds::Dds::new(&config, client, Arc::clone(&gate));
        Self { config, capabilities, dds, issuer: tokens::TokenIssuer::new(), gate, events, reregister: Notify::new() }
    }

    /// The source of the node token for other modules.
    #[must_use]
    pub fn tokens(&self) -> TokenSource {
        self.issuer.source()
    }

    /// The address of the node's wallet.
    #[must_use]
    pub fn address(&self) -> &str {
        self.config.key.address()
    }

    /// How the node registers.
    #[must_use]
    pub fn form(&self) -> &Form {
        &self.config.form
    }

    /// Receives the calls of the service to the node's HTTP pages.
    #[must_use]
    pub fn health_checks(&self) -> Arc<dyn HealthChecks> {
        Arc::clone(&self.gate) as _
    }

    /// Registers, logs in and renews until `stop`. Then it drops a call in progress, and callers without a token get
    /// [`AuthError::Stopped`]. So stop it after the last report is sent.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            never = self.sign_in_loop() => match never {},
        }
    }
}
