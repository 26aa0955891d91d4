//! Shares the node token with its users.
//!
//! One task ([`super::Auth::run`]) writes the current state, all others read it. The state is a watched value, so no
//! reader misses a change. Only one task logs in, so logins cannot collide. A caller waits at most for the login in
//! progress.

use std::sync::Arc;

use tokio::{sync::watch, time::Instant};

use crate::model::Token;

/// Why there is no node token now. One line, without secrets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// The node stops, or its renewal has ended.
    #[error("the node is stopping")]
    Stopped,
    /// The last attempts failed. The next one follows automatically.
    #[error("{0}")]
    Unavailable(Arc<str>),
}

/// The current state of the node token.
#[derive(Clone, Debug)]
pub(super) enum TokenState {
    /// There is no token. An attempt is in progress, or starts soon.
    Working,
    /// There is no token, and the last attempts failed.
    Failed(Arc<str>),
    /// A token. It is valid until `expires`, even when its renewal fails.
    Held {
        token: Token,
        expires: Instant,
        /// Why the renewal fails.
        renewal_error: Option<Arc<str>>,
        /// The control plane has accepted it.
        accepted: bool,
    },
    /// The control plane rejected the token. The task that logs in has not acted on that yet.
    Rejected {
        /// The control plane had accepted it before.
        accepted: bool,
    },
    /// There will be no more tokens.
    Stopped,
}

impl TokenState {
    fn current_state(&self, now: Instant) -> Option<Result<Token, AuthError>> {
        match self {
            Self::Held { token, expires, .. } if now < *expires => Some(Ok(token.clone())),
            Self::Held { renewal_error: Some(renewal_error), .. } | Self::Failed(renewal_error) => {
                Some(Err(AuthError::Unavailable(Arc::clone(renewal_error))))
            }
            Self::Held { .. } | Self::Working | Self::Rejected { .. } => None,
            Self::Stopped => Some(Err(AuthError::Stopped)),
        }
    }
}

/// Gives the node token to callers. It is cheap to clone, and works on any runtime.
#[derive(Clone, Debug)]
pub struct TokenSource(Arc<watch::Sender<TokenState>>);

impl TokenSource {
    /// The result of [`TokenSource::bearer`], or `None` if that would wait.
    #[must_use]
    pub fn now(&self) -> Option<Result<Token, AuthError>> {
        self.0.borrow().current_state(Instant::now())
    }

    /// Returns the current token. Waits while a login is in progress. Fails while the service is unavailable.
    pub async fn bearer(&self) -> Result<Token, AuthError> {
        let mut watch = self.0.subscribe();
        loop {
            let seen = watch.borrow_and_update().current_state(Instant::now());
            if let Some(found) = seen {
                return found;
            }
            if watch.changed().await.is_err() {
                return Err(AuthError::Stopped);
            }
        }
    }

    /// Waits for a token through any number of failed attempts. `false`: there will be no more tokens.
    pub async fn available(&self) -> bool {
        let mut watch = self.0.subscribe();
        loop {
            match watch.borrow_and_update().current_state(Instant::now()) {
                Some(Ok(_)) => return true,
                Some(Err(AuthError::Stopped)) => return false,
                Some(Err(AuthError::Unavailable(_))) | None => {}
            }
            if watch.changed().await.is_err() {
                return false;
            }
        }
    }

    /// Notes that the control plane rejected `token`. It is not returned again, and a login follows. Only the current
    /// token counts. Others are ignored.
    pub fn rejected(&self, token: &Token) {
        self.0.send_if_modified(|state| match state {
            TokenState::Held { token: held, accepted, .. } if held == token => {
                *state = TokenState::Rejected { accepted: *accepted };
                true
            }
            _ => false,
        });
    }

    /// Notes that the control plane accepted `token`.
    pub fn accepted(&self, token: &Token) {
        if matches!(&*self.0.borrow(), TokenState::Held { accepted: true, .. }) {
            return;
        }
        self.0.send_if_modified(|state| {
            if let TokenState::Held { token: held, accepted, .. } = state {
                *accepted = held == token;
            }
            false // no caller waits for this
        });
    }

    /// A source that holds `token` for an hour.
    #[cfg(test)]
    pub(crate) fn holding(token: &str) -> Self {
        let expires = Instant::now() + std::time::Duration::from_secs(3600);
        Self(Arc::new(watch::Sender::new(TokenState::Held {
            token: Token::new(token),
            expires,
            renewal_error: None,
            accepted: false,
        })))
    }
}

/// Writes the state. The task that logs in owns it. After its drop, callers get [`AuthError::Stopped`] at once.
pub(super) struct TokenIssuer(Arc<watch::Sender<TokenState>>);

impl TokenIssuer {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(TokenState::Working)))
    }

    pub(super) fn source(&self) -> TokenSource {
        TokenSource(Arc::clone(&self.0))
    }

    /// Notes that an attempt begins. A valid token stays in use.
    pub(super) fn working(&self) {
        self.0.send_modify(|state| match state {
            TokenState::Held { renewal_error, expires, .. } if Instant::now() < *expires => *renewal_error = None,
            _ => *state = TokenState::Working,
        });
    }

    /// Notes that the attempts failed, and that the next one follows after a pause.
    pub(super) fn failed(&self, why: &str) {
        self.0.send_modify(|state| match state {
            TokenState::Held { renewal_error, .. } => *renewal_error = Some(why.into()),
            _ => *state = TokenState::Failed(why.into()),
        });
    }

    pub(super) fn hold(&self, token: Token, expires: Instant) {
        self.0.send_replace(TokenState::Held { token, expires, renewal_error: None, accepted: false });
    }

    /// Waits until the token is rejected. Returns whether it had been accepted before.
    pub(super) async fn rejected(&self) -> bool {
        let mut watch = self.0.subscribe();
        let state = watch.wait_for(|state| matches!(state, TokenState::Rejected { .. })).await;
        matches!(&*state.expect("the issuer holds the sender"), TokenState::Rejected { accepted: true })
    }
}

impl Drop for TokenIssuer {
    fn drop(&mut self) {
        self.0.send_replace(TokenState::Stopped);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn token_is_returned_until_expiry() {
        let now = Instant::now();
        let held = |renewal_error: Option<&str>| TokenState::Held {
            token: Token::new("t"),
            expires: now + Duration::from_secs(10),
            renewal_error: renewal_error.map(Into::into),
            accepted: false,
        };
        let unavailable = Some(Err(AuthError::Unavailable("away".into())));
        for (state, after_s, expected) in [
            (held(None), 9, Some(Ok(Token::new("t")))),
            (held(Some("away")), 9, Some(Ok(Token::new("t")))),
            (held(None), 10, None),
            (held(Some("away")), 10, unavailable.clone()),
            (TokenState::Failed("away".into()), 0, unavailable),
            (TokenState::Working, 0, None),
            (TokenState::Rejected { accepted: true }, 0, None),
            (TokenState::Stopped, 0, Some(Err(AuthError::Stopped))),
        ] {
            assert_eq!(
                state.current_state(now + Duration::from_secs(after_s)),
                expected,
                "{state:?} after {after_s} s"
            );
        }
    }
}
