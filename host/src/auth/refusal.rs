//! Why a call to DDS failed, and what that means for the next one (posemesh.md sections 2.4 and 2.5).

use std::time::Duration;

use http::StatusCode;

use crate::transport::TransportError;

/// The calls, as errors name them.
pub(super) const NONCE: &str = "sign-in challenge";
pub(super) const VERIFY: &str = "sign-in";
pub(super) const REGISTER: &str = "registration";

/// Why one exchange with DDS failed. Texts hold no secret: what was sent is cut out of what came back.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// No usable answer.
    #[error("{step}: {source}")]
    Transport { step: &'static str, source: TransportError },
    /// An answer other than 2xx.
    #[error("{step}: answered {status}{}", said(excerpt))]
    Status { step: &'static str, status: StatusCode, excerpt: String, retry_after: Option<Duration> },
    /// A 2xx whose content cannot be used.
    #[error("{step}: {reason}")]
    Content { step: &'static str, reason: String },
    /// A challenge that would sign the node in elsewhere.
    #[error("{step}: {reason}")]
    Foreign { step: &'static str, reason: String },
}

fn said(excerpt: &str) -> String {
    if excerpt.is_empty() { String::new() } else { format!(": {excerpt}") }
}

/// What a [`Refusal`] means for the next attempt (posemesh.md section 2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Another node with this identity is online.
    Conflict,
    /// Passes by itself.
    Transient,
    /// Needs somebody's hand; asked again at a long interval.
    Slow,
}

impl Refusal {
    pub(super) fn class(&self) -> Class {
        match self {
            Self::Transport { source: TransportError::Insecure { .. } | TransportError::BadUrl { .. }, .. } => {
                Class::Slow
            }
            Self::Foreign { .. } => Class::Slow,
            Self::Transport { .. } | Self::Content { .. } => Class::Transient,
            Self::Status { status, .. } => match status.as_u16() {
                409 => Class::Conflict,
                408 | 429 | 500.. => Class::Transient,
                _ => Class::Slow,
            },
        }
    }

    /// How long the service asks to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether the request may have been done although no answer says so.
    pub(super) fn answer_lost(&self) -> bool {
        use TransportError::{Oversize, Timeout, Truncated, Unreachable};
        matches!(
            self,
            Self::Transport { source: Unreachable { .. } | Timeout { .. } | Truncated { .. } | Oversize { .. }, .. }
        )
    }

    /// Whether the service says that it failed itself.
    pub(super) fn server_error(&self) -> bool {
        matches!(self, Self::Status { status, .. } if status.is_server_error())
    }

    /// Whether a login was refused because DDS does not know this wallet.
    pub(super) fn unknown_wallet(&self) -> bool {
        matches!(self, Self::Status { step: VERIFY, status, .. } if matches!(status.as_u16(), 403 | 404))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_fall_into_their_classes() {
        let class = |status: u16| {
            let status = StatusCode::from_u16(status).expect("a status");
            Refusal::Status { step: REGISTER, status, excerpt: String::new(), retry_after: None }.class()
        };
        assert_eq!(class(409), Class::Conflict);
        assert!([408, 429, 500, 503, 599].iter().all(|status| class(*status) == Class::Transient));
        assert!([301, 400, 401, 403, 404, 422].iter().all(|status| class(*status) == Class::Slow));
    }
}
