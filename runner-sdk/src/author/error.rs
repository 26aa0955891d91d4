//! How a runner fails, and how a port does.

use std::{error::Error as StdError, fmt, sync::Arc};

use serde_json::Value;

/// Why a runner failed. Takes any standard error, `anyhow::Error` or text by `?` and `into()`.
///
/// It deliberately does not implement [`std::error::Error`] itself: that is what lets `?` take
/// every other error.
///
/// ```
/// use runner_sdk::Error;
///
/// fn parse(text: &str) -> Result<u32, Error> {
///     text.parse().map_err(|err| Error::from(err).invalid_input())
/// }
/// assert!(parse("x").unwrap_err().is_invalid_input());
/// ```
pub struct Error {
    source: Box<dyn StdError + Send + Sync>,
    retryable: bool,
    invalid_input: bool,
    details: Value,
}

impl Error {
    /// An error that says `text`.
    #[must_use]
    pub fn msg(text: impl Into<String>) -> Self {
        Self::from(text.into())
    }

    /// Marks a failure that a repeat may not have.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }

    /// Marks a failure the task's input is to blame for; a repeat will not help.
    #[must_use]
    pub fn invalid_input(mut self) -> Self {
        self.invalid_input = true;
        self
    }

    /// Adds details for the job's author, reported beside the reason (at most 64 KiB of JSON).
    #[must_use]
    pub fn details(mut self, details: Value) -> Self {
        self.details = details;
        self
    }

    /// Whether [`Self::retryable`] was called.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }

    /// Whether [`Self::invalid_input`] was called.
    #[must_use]
    pub fn is_invalid_input(&self) -> bool {
        self.invalid_input
    }

    /// The whole chain of causes on one line, outermost first, joined by `: `. A cause whose text
    /// the one before it ends with already is not said twice.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.source.to_string();
        let mut cause = self.source.source();
        while let Some(err) = cause {
            let more = err.to_string();
            if !err.is::<Told>() && !text.ends_with(&more) {
                text.push_str(": ");
                text.push_str(&more);
            }
            cause = err.source();
        }
        text.replace(['\n', '\r'], " ")
    }

    /// The port error this failure comes from, if it comes from one.
    #[must_use]
    pub fn port_error(&self) -> Option<PortError> {
        let mut cause: Option<&(dyn StdError + 'static)> = Some(&*self.source);
        while let Some(err) = cause {
            if let Some(port) = err.downcast_ref::<PortError>() {
                return Some(port.clone());
            }
            if let Some(told) = err.downcast_ref::<Told>() {
                return Some(PortError(Arc::new(told.clone())));
            }
            // An `io::Error` hides what it wraps from `source`.
            cause = match err.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
                Some(inner) => Some(inner),
                None => err.source(),
            };
        }
        None
    }

    pub(crate) fn details_json(&self) -> &Value {
        &self.details
    }
}

impl<E: Into<Box<dyn StdError + Send + Sync>>> From<E> for Error {
    fn from(err: E) -> Self {
        Self { source: err.into(), retryable: false, invalid_input: false, details: Value::Null }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.chain())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.chain())
    }
}

/// How a run ended otherwise than well.
#[derive(Debug)]
#[non_exhaustive]
pub enum Failure {
    /// The runner returned an error.
    Error(Error),
    /// The runner panicked.
    Panic {
        /// The panic's text.
        message: String,
        /// `file:line`, or `unknown place`.
        place: String,
    },
}

/// What kind of trouble an input, an output or another call had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PortErrorKind {
    /// No such input or object.
    NotFound,
    /// The request makes no sense, or the store said so (400).
    BadRequest,
    /// An artifact path with `..`, NUL or more than 1024 bytes.
    InvalidPath,
    /// The store rejected the task's token, also the newest one.
    Unauthorized,
    /// The object exists or is in use (409).
    Conflict,
    /// The store answered 5xx.
    Server,
    /// The store was not reached or the transfer broke off.
    Network,
    /// The store's answer was not its protocol.
    Malformed,
    /// This host or store does not offer it, or the operator did not grant it.
    Unsupported,
    /// The task is over; its context is of no use any more.
    TaskOver,
    /// The lease is over; nothing more may be moved for it.
    LeaseOver,
    /// A local file could not be read or written.
    Local,
    /// A bound was passed: size of progress, number of waiting events, number of open streams, bytes in
    /// memory, contents of an archive.
    Limit,
    /// The task could not be set up on its control plane.
    Setup,
    /// Any other refusal.
    Other,
}

impl PortErrorKind {
    /// True for trouble that is neither the runner's nor the input's doing.
    #[must_use]
    pub fn is_infrastructure(self) -> bool {
        matches!(
            self,
            Self::Unauthorized
                | Self::Server
                | Self::Network
                | Self::Malformed
                | Self::Local
                | Self::Setup
                | Self::Other
        )
    }
}

/// Why an input, an output or another call of the context failed. One line, without secrets; a
/// refusal of the store holds its status, as in `conflict (409)`.
#[derive(Clone)]
pub struct PortError(Arc<Told>);

/// What a [`PortError`] says, and its own cause: a wrapper such as `anyhow::Error` hides the type of what it
/// holds but shows its causes, and the host has to recognise its own trouble below any wrapper.
#[derive(Clone, Debug)]
struct Told {
    kind: PortErrorKind,
    message: String,
}

impl PortError {
    pub(crate) fn new(kind: PortErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Told { kind, message: message.into() }))
    }

    /// What to branch on.
    #[must_use]
    pub fn kind(&self) -> PortErrorKind {
        self.0.kind
    }
}

impl fmt::Display for PortError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for PortError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortError").field("kind", &self.0.kind).field("message", &self.0.message).finish()
    }
}

impl StdError for PortError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.0)
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port error {:?}", self.kind)
    }
}

impl StdError for Told {}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(std::num::ParseIntError);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("voxel is no number")
        }
    }

    impl StdError for Outer {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn the_reason_is_the_whole_chain() {
        let err = Error::from(Outer("x".parse::<i32>().expect_err("not a number")));
        assert_eq!(err.chain(), "voxel is no number: invalid digit found in string");
    }

    #[test]
    fn a_port_error_is_found_below_other_errors() {
        let port = PortError::new(PortErrorKind::Server, "download failed: server (503)");
        let err = Error::from(std::io::Error::other(port));
        assert_eq!(err.port_error().map(|port| port.kind()), Some(PortErrorKind::Server));
        assert!(Error::msg("plain").port_error().is_none());
    }
}
