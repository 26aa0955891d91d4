//! Why a call to DDS failed, and when to call again (posemesh.md sections 2.4 and 2.5).

use std::time::Duration;

use http::StatusCode;

use crate::transport::TransportError;

/// The names of the calls in errors.
pub(super) const NONCE: &str = "sign-in challenge";
pub(super) const VERIFY: &str = "sign-in";
pub(super) const REGISTER: &str = "registration";

/// Why a call to DDS failed. The texts hold no secret: sent secrets are removed from the answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// There is no usable answer.
    #[error("{step}: {source}")]
    Transport { step: &'static str, source: TransportError },
    /// The answer is not a 2xx.
    #[error("{step}: answered {status}{}", suffix(excerpt))]
    Status { step: &'static str, status: StatusCode, excerpt: String, retry_after: Option<Duration> },
    /// The answer is a 2xx with unusable content.
    #[error("{step}: {reason}")]
    Content { step: &'static str, reason: String },
    /// The challenge would sign the node in to another service.
    #[error("{step}: {reason}")]
    Foreign { step: &'static str, reason: String },
}

fn suffix(excerpt: &str) -> String {
    if excerpt.is_empty() { String::new() } else { format!(": {excerpt}") }
}

/// When to try again after a [`Refusal`] (posemesh.md section 2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Another node with this identity is online.
    Conflict,
    /// The cause passes without an operator.
    Transient,
    /// An operator must act. The next attempt follows after a long interval.
    Persistent,
}

impl Refusal {
    pub(super) fn class(&self) -> Class {
        match self {
            Self::Transport { source: TransportError::Insecure { .. } | TransportError::BadUrl { .. }, .. } => {
                Class::Persistent
            }
            Self::Foreign { .. } => Class::Persistent,
            Self::Transport { .. } | Self::Content { .. } => Class::Transient,
            Self::Status { status, .. } => match status.as_u16() {
                409 => Class::Conflict,
                408 | 429 | 500.. => Class::Transient,
                _ => Class::Persistent,
            },
        }
    }

    /// The pause that the service requests.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether the service may have executed the request although its answer was lost.
    pub(super) fn answer_lost(&self) -> bool {
        use TransportError::{Oversize, Timeout, Tls, Truncated, Unreachable};
        matches!(
            self,
            Self::Transport {
                source: Unreachable { .. } | Tls { .. } | Timeout { .. } | Truncated { .. } | Oversize { .. },
                ..
            }
        )
    }

    /// Whether the service reports its own failure.
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
    fn each_status_has_a_class() {
        let class = |status: u16| {
            let status = StatusCode::from_u16(status).expect("a status");
            Refusal::Status { step: REGISTER, status, excerpt: String::new(), retry_after: None }.class()
        };
        assert_eq!(class(409), Class::Conflict);
        assert!([408, 429, 500, 503, 599].iter().all(|status| class(*status) == Class::Transient));
        assert!([301, 400, 401, 403, 404, 422].iter().all(|status| class(*status) == Class::Persistent));
    }
}
