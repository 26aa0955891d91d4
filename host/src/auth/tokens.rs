//! The node token as its users see it.
//!
//! One task ([`super::Auth::run`]) writes the slot, everyone else looks. Since the slot is a
//! level and not a signal, nobody can miss a change; since only one task logs in, logins cannot
//! collide. A user never waits for longer than the attempt that is under way.

use std::sync::Arc;

use tokio::{sync::watch, time::Instant};

use crate::model::Token;

/// Why there is no node token at the moment. One line, nothing secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The node is stopping, or nobody renews tokens any more.
    #[error("the node is stopping")]
    Stopped,
    /// The last attempts failed; the next one follows by itself.
    #[error("{0}")]
    Unavailable(Arc<str>),
}

/// What there is to hand out.
#[derive(Clone, Debug)]
pub(super) enum Slot {
    /// Nothing yet, and an attempt is under way (or about to start).
    Working,
    /// Nothing, and the last attempts failed.
    Failed(Arc<str>),
    /// A token; good until `expires`, whatever becomes of its renewal.
    Held {
        token: Token,
        expires: Instant,
        /// Why renewal fails at the moment.
        trouble: Option<Arc<str>>,
        /// The control plane has taken it.
        taken: bool,
    },
    /// The control plane rejected the token; the owner has not acted on that yet.
    Rejected {
        /// After it had taken it.
        taken: bool,
    },
    /// Nothing will ever come again.
    Stopped,
}

impl Slot {
    fn look(&self, now: Instant) -> Option<Result<Token, AuthError>> {
        match self {
            Self::Held { token, expires, .. } if now < *expires => Some(Ok(token.clone())),
            Self::Held { trouble: Some(trouble), .. } | Self::Failed(trouble) => {
                Some(Err(AuthError::Unavailable(Arc::clone(trouble))))
            }
            Self::Held { .. } | Self::Working | Self::Rejected { .. } => None,
            Self::Stopped => Some(Err(AuthError::Stopped)),
        }
    }
}

/// Hands out the node token. Cheap to clone; usable from any runtime.
#[derive(Clone, Debug)]
pub struct TokenSource(Arc<watch::Sender<Slot>>);

impl TokenSource {
    /// What [`TokenSource::bearer`] would say without waiting.
    #[must_use]
    pub fn now(&self) -> Option<Result<Token, AuthError>> {
        self.0.borrow().look(Instant::now())
    }

    /// The current token. Waits while a login is under way, fails while the service is away.
    pub async fn bearer(&self) -> Result<Token, AuthError> {
        let mut watch = self.0.subscribe();
        loop {
            let seen = watch.borrow_and_update().look(Instant::now());
            if let Some(found) = seen {
                return found;
            }
            if watch.changed().await.is_err() {
                return Err(AuthError::Stopped);
            }
        }
    }

    /// Waits for a token through any number of failed attempts; `false` when none will ever come.
    pub async fn available(&self) -> bool {
        let mut watch = self.0.subscribe();
        loop {
            match watch.borrow_and_update().look(Instant::now()) {
                Some(Ok(_)) => return true,
                Some(Err(AuthError::Stopped)) => return false,
                Some(Err(AuthError::Unavailable(_))) | None => {}
            }
            if watch.changed().await.is_err() {
                return false;
            }
        }
    }

    /// Says that the control plane rejected `token`. It is not handed out again, and a login
    /// follows. Tokens other than the current one are old news.
    pub fn rejected(&self, token: &Token) {
        self.0.send_if_modified(|slot| match slot {
            Slot::Held { token: held, taken, .. } if held == token => {
                *slot = Slot::Rejected { taken: *taken };
                true
            }
            _ => false,
        });
    }

    /// Says that the control plane took `token`.
    pub fn taken(&self, token: &Token) {
        if matches!(&*self.0.borrow(), Slot::Held { taken: true, .. }) {
            return;
        }
        self.0.send_if_modified(|slot| {
            if let Slot::Held { token: held, taken, .. } = slot {
                *taken = held == token;
            }
            false // nobody waits for this
        });
    }

    /// A source that holds `token` for an hour.
    #[cfg(test)]
    pub(crate) fn holding(token: &str) -> Self {
        let expires = Instant::now() + std::time::Duration::from_secs(3600);
        Self(Arc::new(watch::Sender::new(Slot::Held {
            token: Token::new(token),
            expires,
            trouble: None,
            taken: false,
        })))
    }
}

/// The writing side, held by the one task that logs in. When it goes, users get
/// [`AuthError::Stopped`] and do not wait.
pub(super) struct TokenIssuer(Arc<watch::Sender<Slot>>);

impl TokenIssuer {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Slot::Working)))
    }

    pub(super) fn source(&self) -> TokenSource {
        TokenSource(Arc::clone(&self.0))
    }

    /// An attempt begins. A token that is still good stays.
    pub(super) fn working(&self) {
        self.0.send_modify(|slot| match slot {
            Slot::Held { trouble, expires, .. } if Instant::now() < *expires => *trouble = None,
            _ => *slot = Slot::Working,
        });
    }

    /// The attempts failed, the next one is some time away.
    pub(super) fn failed(&self, why: &str) {
        self.0.send_modify(|slot| match slot {
            Slot::Held { trouble, .. } => *trouble = Some(why.into()),
            _ => *slot = Slot::Failed(why.into()),
        });
    }

    pub(super) fn hold(&self, token: Token, expires: Instant) {
        self.0.send_replace(Slot::Held { token, expires, trouble: None, taken: false });
    }

    /// Waits until the token is rejected; whether it had been taken.
    pub(super) async fn rejected(&self) -> bool {
        let mut watch = self.0.subscribe();
        let slot = watch.wait_for(|slot| matches!(slot, Slot::Rejected { .. })).await;
        matches!(&*slot.expect("the desk holds the sender"), Slot::Rejected { taken: true })
    }
}

impl Drop for TokenIssuer {
    fn drop(&mut self) {
        self.0.send_replace(Slot::Stopped);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_token_is_handed_out_until_its_real_end_and_then_the_trouble_is_told() {
        let now = Instant::now();
        let held = |trouble: Option<&str>| Slot::Held {
            token: Token::new("t"),
            expires: now + Duration::from_secs(10),
            trouble: trouble.map(Into::into),
            taken: false,
        };
        let told = Some(Err(AuthError::Unavailable("away".into())));
        for (slot, after_s, expected) in [
            (held(None), 9, Some(Ok(Token::new("t")))),
            (held(Some("away")), 9, Some(Ok(Token::new("t")))),
            (held(None), 10, None),
            (held(Some("away")), 10, told.clone()),
            (Slot::Failed("away".into()), 0, told),
            (Slot::Working, 0, None),
            (Slot::Rejected { taken: true }, 0, None),
            (Slot::Stopped, 0, Some(Err(AuthError::Stopped))),
        ] {
            assert_eq!(slot.look(now + Duration::from_secs(after_s)), expected, "{slot:?} after {after_s} s");
        }
    }
}
