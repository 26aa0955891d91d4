//! The node's registration: what is visible of it, its attempts, and its repetition (posemesh contract
//! 2.5, 2.6 and 2.9).
//!
//! A registration does not last by itself: services forget, and capabilities come and go. So it is
//! repeated ([`Auth::refresh`]) while the node works, without touching the token in use. What a
//! callback is worth is told in `docs/decisions/2026-11-21-registration.md`.

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

/// How often a registration that cannot succeed by itself is worth a warning.
const WARN_EVERY: Duration = Duration::from_secs(180);

/// Registration and login for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Registration {
    /// Where it stands.
    pub state: RegistrationState,
    /// Since when.
    pub since: Timestamp,
    /// Why the last attempt failed, one line; `None` while all is well.
    pub error: Option<String>,
    /// When the service last asked for this node's health.
    pub probed_at: Option<Timestamp>,
    /// Until when the node token in hand is good, by our clock; `None` while there is none.
    pub token_expires_at: Option<Timestamp>,
    /// Why the last login failed, one line; `None` while all is well.
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

/// An attempt that did not register the node.
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

/// Why a standing registration is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// It is old, and the service has not asked for this node's health either.
    Age,
    /// Other capabilities are served now.
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

/// Attempts in a row, with the pauses and warnings between them.
struct Series {
    pauses: Pauses,
    warned: Option<Instant>,
}

impl Series {
    fn new(auth: &Auth) -> Self {
        Self { pauses: Pauses::new(auth.config.register_interval, auth.config.register_max_retry), warned: None }
    }

    /// Says that an attempt failed; how long to wait.
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
    /// Where an attempt that failed like this leaves a node that is not registered.
    fn state(self) -> RegistrationState {
        match self {
            Self::Conflict => RegistrationState::Conflict,
            Self::Transient => RegistrationState::Registering,
            Self::Slow => RegistrationState::Disconnected,
        }
    }
}

impl Auth {
    /// Attempts until the node is registered; what was registered.
    pub(super) async fn register(&self) -> Vec<Capability> {
        let mut series = Series::new(self);
        self.desk.working();
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
            self.desk.failed(&format!("not registered: {}", failure.error));
            self.publish(failure.class.state(), Some(failure.error));
            tokio::time::sleep(pause).await;
        }
    }

    /// Repeats the registration of `served` whenever there is a cause. The token in use is not touched,
    /// and only a conflict changes the state: while logins work, the service knows this node.
    pub(super) async fn refresh(&self, mut served: Vec<Capability>) -> Infallible {
        let mut last = Instant::now();
        loop {
            let cause = tokio::select! {
                () = self.aged(last) => Cause::Age,
                () = self.serves_other_than(&served) => Cause::Capabilities,
                () = self.doubted.notified() => Cause::Rejections,
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
                            Class::Transient | Class::Slow => self.status.borrow().state,
                        };
                        self.publish(state, Some(failure.error));
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }

    /// One attempt in the form of the configuration; what was registered.
    async fn attempt(&self) -> Result<Vec<Capability>, Failure> {
        let mut served = self.capabilities.borrow().clone();
        served.sort();
        served.dedup();
        if served.is_empty() {
            let error = "there is no capability to register; load a plugin".to_owned();
            return Err(Failure { class: Class::Slow, retry_after: None, error });
        }
        let names: Vec<String> = served.iter().map(ToString::to_string).collect();
        match &self.config.form {
            Form::Wallet => self.dds.register_wallet(&names, &self.config.version).await?,
            Form::Callback { url } => self.register_url(url, &names).await?,
        }
        Ok(served)
    }

    /// Registers under `url`: the service has to accept, and to call back.
    async fn register_url(&self, url: &str, names: &[String]) -> Result<(), Failure> {
        let door = self.door.open();
        match self.dds.register_url(url, names, &self.config.version).await {
            Ok(()) => {}
            // It called back, so it had taken the registration; only its answer got lost.
            Err(refusal) if refusal.answer_lost() && door.visited() => return Ok(()),
            Err(refusal) => {
                let unreached = refusal.server_error() && !door.visited();
                let mut failure = Failure::from(refusal);
                if unreached {
                    failure.error.push_str(&format!("; check that the service can reach NODE_URL {url}"));
                }
                return Err(failure);
            }
        }
        tokio::time::timeout(self.dds.timeout(), door.visit()).await.map_err(|_| Failure {
            class: Class::Transient,
            retry_after: None,
            error: format!(
                "registration: accepted, but nobody called back at NODE_URL {url} within {:?}; check that the service \
                 can reach it, or set REGISTRATION=wallet",
                self.dds.timeout()
            ),
        })
    }

    /// Waits until the registration made at `last` needs repeating, because for one interval neither it
    /// nor (where the service knows a URL to ask) a health check showed that the service knows us.
    async fn aged(&self, last: Instant) {
        let interval = self.config.register_interval.max(Duration::from_secs(1));
        let probes = self.door.probes();
        loop {
            let probed = probes.borrow().map(|probe| probe.at).filter(|_| self.config.form != Form::Wallet);
            let due = probed.map_or(last, |at| at.max(last)) + interval;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }

    async fn serves_other_than(&self, served: &[Capability]) {
        let mut now = self.capabilities.clone();
        let other = |now: &Vec<Capability>| {
            let mut now = now.clone();
            now.sort();
            now.dedup();
            now != served
        };
        if now.wait_for(other).await.is_err() {
            // Nobody can change them any more.
            std::future::pending().await
        }
    }

    pub(super) fn publish(&self, state: RegistrationState, error: Option<String>) {
        self.status.send_modify(|now| {
            if now.state != state {
                now.since = Timestamp::now();
                now.state = state;
            }
            // While an attempt is under way the last failure is still the news.
            if error.is_some() || state == RegistrationState::Registered {
                now.error = error;
            }
        });
    }

    /// Shows the service's visits.
    pub(super) async fn show_probes(&self) -> Infallible {
        let mut probes = self.door.probes();
        loop {
            probes.changed().await.expect("the door holds the sender");
            let shown = probes.borrow_and_update().map(|probe| probe.shown);
            self.status.send_modify(|now| now.probed_at = shown);
        }
    }
}
