//! The door for the sign-in service's callback, and what it has asked of this node's pages.
//!
//! A callback carries nothing that proves who sent it (posemesh.md section 2.9), so the door stands
//! open only while a registration is in flight ([`CallbackGate::open`]), and what comes through it counts
//! only together with the service's own answer; that is `registration`'s business. The secret a
//! callback brings is kept in memory, wiped when it goes, and used for one thing: to cut it out of
//! texts that come from the service.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use secrecy::SecretString;
use tokio::{sync::watch, time::Instant};

use crate::model::{Callback, HealthChecks, Unexpected};

/// How much of an id is shown, in characters: it comes from a stranger.
const SHOWN_MAX: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    /// A registration is in flight.
    Open,
    /// One is, and the callback has come.
    Visited,
}

/// When the service last asked for `/health`, on both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    pub(super) at: Instant,
    pub(super) shown: Timestamp,
}

/// See the module's text. Shared by the pages and the registration.
pub(super) struct CallbackGate {
    state: watch::Sender<State>,
    secret: Mutex<Option<Arc<SecretString>>>,
    probe: watch::Sender<Option<Probe>>,
}

impl CallbackGate {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: watch::Sender::new(State::Closed),
            secret: Mutex::default(),
            probe: watch::Sender::new(None),
        })
    }

    /// Lets a callback in until the answer is dropped.
    pub(super) fn open(&self) -> Opened<'_> {
        self.state.send_replace(State::Open);
        Opened(self)
    }

    /// What the last callback brought.
    pub(super) fn secret(&self) -> Option<Arc<SecretString>> {
        self.secret.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Live view of the last probe.
    pub(super) fn probes(&self) -> watch::Receiver<Option<Probe>> {
        self.probe.subscribe()
    }
}

impl HealthChecks for CallbackGate {
    fn called_back(&self, callback: Callback) -> Result<(), Unexpected> {
        let Callback { id, secret, organization_id } = callback;
        let open = self.state.send_if_modified(|state| {
            let open = *state != State::Closed;
            if open {
                *state = State::Visited;
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
        self.probe.send_replace(Some(Probe { at: Instant::now(), shown: Timestamp::now() }));
    }
}

/// The door while it is open; closed when dropped.
pub(super) struct Opened<'a>(&'a CallbackGate);

impl Opened<'_> {
    pub(super) fn visited(&self) -> bool {
        *self.0.state.borrow() == State::Visited
    }

    /// Waits for the callback.
    pub(super) async fn visit(&self) {
        let mut state = self.0.state.subscribe();
        let _ = state.wait_for(|state| *state == State::Visited).await.expect("the door holds the sender");
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
    fn a_callback_is_taken_only_while_the_door_is_open_and_the_last_one_stays() {
        let door = CallbackGate::new();
        let kept = || door.secret().map(|secret| secret.expose_secret().to_owned());
        assert_eq!(door.called_back(callback("early")), Err(Unexpected));
        assert_eq!(kept(), None);
        let opened = door.open();
        assert!(!opened.visited());
        assert_eq!(door.called_back(callback("one")), Ok(()));
        assert_eq!(door.called_back(callback("two")), Ok(()));
        assert!(opened.visited());
        drop(opened);
        assert_eq!(door.called_back(callback("late")), Err(Unexpected));
        assert_eq!(kept().as_deref(), Some("two"));
        assert!(!door.open().visited(), "an earlier visit does not count for a later registration");
    }
}
