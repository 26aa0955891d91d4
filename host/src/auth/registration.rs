//! The node's registration: its attempts, and its repetition (posemesh.md sections 2.5, 2.6 and 2.9).
//!
//! The service may lose a registration, and the capabilities may change. So the node repeats the registration
//! ([`Auth::refresh`]) while it works. The current token stays in use.
//! `docs/decisions/2026-11-21-registration.md` says what a callback proves.

use std::{convert::Infallible, time::Duration};

use tokio::time::Instant;

use super::{
    Auth, Form,
    pauses::Pauses,
    refusal::{Class, Refusal},
};
use crate::{
    model::{Capability, RegistrationState, pause_asked},
    node_event::{NodeEvent, NodeEvents, RepeatCause},
    transport::RETRY_AFTER_MAX,
};

/// The least time between two warnings about a registration that only an operator can fix.
const WARN_EVERY: Duration = Duration::from_secs(180);

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

/// Consecutive attempts, with their pauses and warnings.
struct Series {
    pauses: Pauses,
    warned: Option<Instant>,
}

impl Series {
    fn new(auth: &Auth) -> Self {
        Self { pauses: Pauses::new(auth.config.register_interval, auth.config.register_max_retry), warned: None }
    }

    /// Emits a failed attempt of a node that is `registered` already or not. Returns the pause before the next one.
    fn failed(&mut self, events: &NodeEvents, registered: bool, failure: Failure) -> Duration {
        let Failure { class, retry_after, error } = failure;
        let pause = pause_asked(self.pauses.after(class, rand::random()), retry_after, RETRY_AFTER_MAX);
        let transient = class == Class::Transient;
        let repeated = !transient && self.warned.is_some_and(|at| at.elapsed() < WARN_EVERY);
        if !repeated {
            self.warned = (!transient).then(Instant::now);
        }
        events.emit(NodeEvent::RegistrationFailed { error, state: class.state(), registered, pause, repeated });
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
            self.events.board().registration(RegistrationState::Registering, None);
            let failure = match self.attempt().await {
                Ok(served) => {
                    self.events.emit(NodeEvent::RegistrationAccepted {
                        address: self.config.key.address().to_owned(),
                        form: self.config.form.kind(),
                        capabilities: served.len(),
                    });
                    return served;
                }
                Err(failure) => failure,
            };
            self.issuer.failed(&format!("not registered: {}", failure.error));
            let pause = series.failed(&self.events, false, failure);
            tokio::time::sleep(pause).await;
        }
    }

    /// Repeats the registration of `served` whenever there is a [`RepeatCause`]. The current token stays in use.
    pub(super) async fn refresh(&self, mut served: Vec<Capability>) -> Infallible {
        let mut last = Instant::now();
        loop {
            let cause = tokio::select! {
                () = self.until_old(last) => RepeatCause::Age,
                () = self.until_capabilities_differ(&served) => RepeatCause::Capabilities,
                () = self.reregister.notified() => RepeatCause::Rejections,
            };
            let mut series = Series::new(self);
            loop {
                match self.attempt().await {
                    Ok(now) => {
                        self.events.emit(NodeEvent::RegistrationRepeated { cause, capabilities: now.len() });
                        (served, last) = (now, Instant::now());
                        break;
                    }
                    Err(failure) => tokio::time::sleep(series.failed(&self.events, true, failure)).await,
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
        let probed_at = self.gate.probed_at();
        loop {
            let last_probe = probed_at.borrow().filter(|_| self.config.form != Form::Wallet);
            let due = last_probe.map_or(last, |at| at.max(last)) + interval;
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
}
