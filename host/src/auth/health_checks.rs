//! Accepts the callback of the sign-in service, and notes its health checks.
//!
//! Nothing in a callback proves its sender (posemesh.md section 2.9). So the gate accepts one only while a registration
//! is in flight ([`CallbackGate::open`]). `registration` counts it only together with the answer of the service.
//!
//! The secret of a callback stays in memory and is wiped on drop. It has one use: to remove it from texts that the
//! service sends.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use secrecy::SecretString;
use tokio::{sync::watch, time::Instant};

use crate::model::{Callback, HealthChecks, StatusBoard, Unexpected};

/// Most characters of an id in the log. The sender of a callback is not authenticated.
const SHOWN_MAX: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    /// A registration is in flight.
    Open,
    /// A registration is in flight, and its callback has arrived.
    CalledBack,
}

/// Shared by the HTTP pages and the registration. See the module documentation.
pub(super) struct CallbackGate {
    state: watch::Sender<State>,
    secret: Mutex<Option<Arc<SecretString>>>,
    /// When the service last requested `/health`.
    probed_at: watch::Sender<Option<Instant>>,
    board: StatusBoard,
}

impl CallbackGate {
    /// `board` shows the time of the last health check.
    pub(super) fn new(board: StatusBoard) -> Arc<Self> {
        Arc::new(Self {
            state: watch::Sender::new(State::Closed),
            secret: Mutex::default(),
            probed_at: watch::Sender::new(None),
            board,
        })
    }

    /// Accepts callbacks until the returned guard is dropped.
    pub(super) fn open(&self) -> Opened<'_> {
        self.state.send_replace(State::Open);
        Opened(self)
    }

    /// The secret of the last callback.
    pub(super) fn secret(&self) -> Option<Arc<SecretString>> {
        self.secret.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Watches the last health check.
    pub(super) fn probed_at(&self) -> watch::Receiver<Option<Instant>> {
        self.probed_at.subscribe()
    }
}

impl HealthChecks for CallbackGate {
    fn called_back(&self, callback: Callback) -> Result<(), Unexpected> {
        let Callback { id, secret, organization_id } = callback;
        let open = self.state.send_if_modified(|state| {
            let open = *state != State::Closed;
            if open {
                *state = State::CalledBack;
                // A second callback overwrites the first.
                *self.secret.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(secret));
            }
            open
        });
        let shown = |text: &str| text.chars().filter(|c| !c.is_control()).take(SHOWN_MAX).collect::<String>();
        if open {
            let organization = organization_id.as_deref().map(shown);
            tracing::info!(
                event = "registration.called_back",
                id = shown(&id),
                organization,
                "sign-in service called back"
            );
            return Ok(());
        }
        tracing::debug!("a callback came while no registration is in flight");
        Err(Unexpected)
    }

    fn probed(&self) {
        self.probed_at.send_replace(Some(Instant::now()));
        self.board.change_plane(|status| status.last_healthcheck = Some(Timestamp::now()));
    }
}

/// Keeps the gate open. Closes it on drop.
pub(super) struct Opened<'a>(&'a CallbackGate);

impl Opened<'_> {
    pub(super) fn is_called_back(&self) -> bool {
        *self.0.state.borrow() == State::CalledBack
    }

    /// Waits for the callback.
    pub(super) async fn called_back(&self) {
        let mut state = self.0.state.subscribe();
        let _ = state.wait_for(|state| *state == State::CalledBack).await.expect("the gate holds the sender");
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.0.state.send_replace(State::Closed);
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    fn callback(secret: &str) -> Callback {
        Callback { id: "node-1".to_owned(), secret: secret.into(), organization_id: None }
    }

    #[test]
    fn only_an_open_gate_accepts_callbacks() {
        let gate = CallbackGate::new(StatusBoard::new(1, Vec::new()));
        let secret = || gate.secret().map(|secret| secret.expose_secret().to_owned());
        assert_eq!(gate.called_back(callback("early")), Err(Unexpected));
        assert_eq!(secret(), None);
        let opened = gate.open();
        assert!(!opened.is_called_back());
        assert_eq!(gate.called_back(callback("one")), Ok(()));
        assert_eq!(gate.called_back(callback("two")), Ok(()));
        assert!(opened.is_called_back());
        drop(opened);
        assert_eq!(gate.called_back(callback("late")), Err(Unexpected));
        assert_eq!(secret().as_deref(), Some("two"));
        assert!(!gate.open().is_called_back(), "an earlier callback does not count for a later registration");
    }
}
