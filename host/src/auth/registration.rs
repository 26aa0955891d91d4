//! The node's registration: its status, its attempts, and its repetition (posemesh.md sections 2.5, 2.6 and 2.9).
//!
//! The service may lose a registration, and the capabilities may change. So the node repeats the registration
//! ([`Auth::refresh`]) while it works. The current token stays in use.
//! `docs/decisions/2026-11-21-registration.md` says what a callback proves.

use std::{convert::Infallible, time::Duration};

use jiff::Timestamp;
use serde::Serialize;
use tokio::time::Instant;

use super::{
    Auth, Form,
    pauses::Pauses,
    refusal::{Class, Refusal},
};
use crate::{
    model::{Capability, RegistrationState, millis, pause_asked},
    transport::RETRY_AFTER_MAX,
};

/// The least time between two warnings about a registration that only an operator can fix.
const WARN_EVERY: Duration = Duration::from_secs(180);

/// The state of registration and login, for operators.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Registration {
    /// The state.
    pub state: RegistrationState,
    /// When the state began.
    pub since: Timestamp,
    /// Why the last attempt failed, one line. `None`: it did not fail.
    pub error: Option<String>,
    /// When the service last requested this node's health.
    pub probed_at: Option<Timestamp>,
    /// When the current node token expires, by the local clock. `None`: there is no token.
    pub token_expires_at: Option<Timestamp>,
    /// Why the last login failed, one line. `None`: it did not fail.
    pub login_error: Option<String>,
}

impl Default for Registration {
    fn default() -> Self {
        Self {
            state: RegistrationState::default(),
            since: Timestamp::now(),
            error: None,
            probed_at: None,
            token_expires_at: None,
            login_error: None,
        }
    }
}

/// A failed attempt to register.
struct Failure {
    class: Class,
    retry_after: Option<Duration>,
    /// One line.
    error: String,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let error = match refusal.class() {
            Class::Conflict => format!("another node with this wallet is online; {refusal}"),
            _ => refusal.to_string(),
        };
        Self { class: refusal.class(), retry_after: refusal.retry_after(), error }
    }
}

/// Why a registration is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// It is old, and the service has not requested this node's health either.
    Age,
    /// The capabilities changed.
    Capabilities,
    /// The control plane rejects fresh tokens.
    Rejections,
}

impl Cause {
    fn word(self) -> &'static str {
        match self {
            Self::Age => "age",
            Self::Capabilities => "capabilities",
            Self::Rejections => "rejected tokens",
        }
    }
}

/// Consecutive attempts, with their pauses and warnings.
struct Series {
    pauses: Pauses,
    warned: Option<Instant>,
}

impl Series {
    fn new(auth: &Auth) -> Self {
        Self { pauses: Pauses::new(auth.config.register_interval, auth.config.register_max_retry), warned: None }
    }

    /// Logs a failed attempt. Returns the pause before the next one.
    fn failed(&mut self, failure: &Failure) -> Duration {
        let Failure { class, retry_after, error } = failure;
        let pause = pause_asked(self.pauses.after(*class, rand::random()), *retry_after, RETRY_AFTER_MAX);
        let transient = *class == Class::Transient;
        if transient || self.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            self.warned = (!transient).then(Instant::now);
            tracing::warn!(event = "registration.failed", %error, state = %class.state(), retry_in_ms = millis(pause), "registration failed");
        } else {
            tracing::debug!(event = "registration.failed", %error, state = %class.state(), retry_in_ms = millis(pause), "registration failed");
        }
        pause
    }
}

impl Class {
    /// The state of an unregistered node after such a failure.
    fn state(self) -> RegistrationState {
        match self {
            Self::Conflict => RegistrationState::Conflict,
            Self::Transient => RegistrationState::Registering,
            Self::Persistent => RegistrationState::Disconnected,
        }
    }
}

impl Auth {
    /// Tries until the node is registered. Returns the registered capabilities.
    pub(super) async fn register(&self) -> Vec<Capability> {
        let mut series = Series::new(self);
        self.issuer.working();
        loop {
            self.publish(RegistrationState::Registering, None);
            let failure = match self.attempt().await {
                Ok(served) => {
                    self.publish(RegistrationState::Registered, None);
                    let (address, form) = (self.config.key.address(), self.config.form.word());
                    tracing::info!(
                        event = "registration.accepted",
                        address,
                        form,
                        capabilities = served.len(),
                        "node registered"
                    );
                    return served;
                }
                Err(failure) => failure,
            };
            let pause = series.failed(&failure);
            self.issuer.failed(&format!("not registered: {}", failure.error));
            self.publish(failure.class.state(), Some(failure.error));
            tokio::time::sleep(pause).await;
        }
    }

    /// Repeats the registration of `served` whenever there is a [`Cause`]. The current token stays in use. Only a
    /// conflict changes the state: while logins succeed, the service knows this node.
    pub(super) async fn refresh(&self, mut served: Vec<Capability>) -> Infallible {
        let mut last = Instant::now();
        loop {
            let cause = tokio::select! {
                () = self.until_old(last) => Cause::Age,
                () = self.until_capabilities_differ(&served) => Cause::Capabilities,
                () = self.reregister.notified() => Cause::Rejections,
            };
            let mut series = Series::new(self);
            loop {
                match self.attempt().await {
                    Ok(now) => {
                        self.publish(RegistrationState::Registered, None);
                        if cause == Cause::Age {
                            tracing::debug!(
                                event = "registration.repeated",
                                cause = cause.word(),
                                "registration repeated"
                            );
                        } else {
                            tracing::info!(
                                event = "registration.repeated",
                                cause = cause.word(),
                                capabilities = now.len(),
                                "registration repeated"
                            );
                        }
                        (served, last) = (now, Instant::now());
                        break;
                    }
                    Err(failure) => {
                        let pause = series.failed(&failure);
                        let state = match failure.class {
                            Class::Conflict => RegistrationState::Conflict,
                            Class::Transient | Class::Persistent => self.status.borrow().state,
                        };
                        self.publish(state, Some(failure.error));
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }

    /// Makes one attempt in the configured form. Returns the registered capabilities.
    async fn attempt(&self) -> Result<Vec<Capability>, Failure> {
        let mut served = self.capabilities.borrow().clone();
        served.sort();
        served.dedup();
        if served.is_empty() {
            let error = "there is no capability to register; load a plugin".to_owned();
            return Err(Failure { class: Class::Persistent, retry_after: None, error });
        }
        let names: Vec<String> = served.iter().map(ToString::to_string).collect();
        match &self.config.form {
            Form::Wallet => self.dds.register_wallet(&names, &self.config.version).await?,
            Form::Callback { url } => self.register_url(url, &names).await?,
        }
        Ok(served)
    }

    /// Registers under `url`. The service must accept the registration and call back.
    async fn register_url(&self, url: &str, names: &[String]) -> Result<(), Failure> {
        let opened = self.gate.open();
        match self.dds.register_url(url, names, &self.config.version).await {
            Ok(()) => {}
            // The service called back, so it accepted the registration. Only its answer was lost.
            Err(refusal) if refusal.answer_lost() && opened.is_called_back() => return Ok(()),
            Err(refusal) => {
                let unreachable = refusal.server_error() && !opened.is_called_back();
                let mut failure = Failure::from(refusal);
                if unreachable {
                    failure.error.push_str(&format!("; check that the service can reach NODE_URL {url}"));
                }
                return Err(failure);
            }
        }
        tokio::time::timeout(self.dds.timeout(), opened.called_back()).await.map_err(|_| Failure {
            class: Class::Transient,
            retry_after: None,
            error: format!(
                "registration: accepted, but the service did not call back at NODE_URL {url} within {:?}; check that the service \
                 can reach it, or set REGISTRATION=wallet",
                self.dds.timeout()
            ),
        })
    }

    /// Waits until the registration made at `last` is one interval old. With a callback URL, each health check of the
    /// service proves that it still knows this node, and restarts the interval.
    async fn until_old(&self, last: Instant) {
        let interval = self.config.register_interval.max(Duration::from_secs(1));
        let probes = self.gate.probes();
        loop {
            let probed = probes.borrow().map(|probe| probe.at).filter(|_| self.config.form != Form::Wallet);
            let due = probed.map_or(last, |at| at.max(last)) + interval;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }

    async fn until_capabilities_differ(&self, served: &[Capability]) {
        let mut now = self.capabilities.clone();
        let other = |now: &Vec<Capability>| {
            let mut now = now.clone();
            now.sort();
            now.dedup();
            now != served
        };
        if now.wait_for(other).await.is_err() {
            // The sender is gone, so they never change again.
            std::future::pending().await
        }
    }

    pub(super) fn publish(&self, state: RegistrationState, error: Option<String>) {
        self.status.send_modify(|now| {
            if now.state != state {
                now.since = Timestamp::now();
                now.state = state;
            }
            // During an attempt, the status still shows the last failure.
            if error.is_some() || state == RegistrationState::Registered {
                now.error = error;
            }
        });
    }

    /// Copies the times of health checks to the status.
    pub(super) async fn show_probes(&self) -> Infallible {
        let mut probes = self.gate.probes();
        loop {
            probes.changed().await.expect("the gate holds the sender");
            let shown = probes.borrow_and_update().map(|probe| probe.shown);
            self.status.send_modify(|now| now.probed_at = shown);
        }
    }
}
