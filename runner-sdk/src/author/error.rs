//! Errors of runners, and errors of host calls.

use std::{error::Error as StdError, fmt, sync::Arc};

use serde_json::Value;

/// Why a runner failed. Takes any standard error, `anyhow::Error` or text by `?` and `into()`.
///
/// It does not implement [`std::error::Error`] itself, so that `?` accepts every other error.
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
    /// An error with this text.
    #[must_use]
    pub fn msg(text: impl Into<String>) -> Self {
        Self::from(text.into())
    }

    /// Marks a failure that a retry may avoid.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }

    /// Marks a failure that the task's input caused. A retry will not help.
    #[must_use]
    pub fn invalid_input(mut self) -> Self {
        self.invalid_input = true;
        self
    }

    /// Adds details for the job's author, at most 64 KiB of JSON. They are reported with the reason.
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

    /// The whole chain of causes on one line, outermost first, joined by `: `. A cause is left out if the text
    /// before it already ends with it.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.source.to_string();
        let mut cause = self.source.source();
        while let Some(err) = cause {
            let more = err.to_string();
            if !err.is::<PortErrorInfo>() && !text.ends_with(&more) {
                text.push_str(": ");
                text.push_str(&more);
            }
            cause = err.source();
        }
        text.replace(['\n', '\r'], " ")
    }

    /// The port error that caused this failure, if one did.
    #[must_use]
    pub fn port_error(&self) -> Option<PortError> {
        let mut cause: Option<&(dyn StdError + 'static)> = Some(&*self.source);
        while let Some(err) = cause {
            if let Some(port) = err.downcast_ref::<PortError>() {
                return Some(port.clone());
            }
            if let Some(info) = err.downcast_ref::<PortErrorInfo>() {
                return Some(PortError(Arc::new(info.clone())));
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

/// How a run failed.
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

/// Why a call for an input, an output or another host call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PortErrorKind {
    /// No such input or object.
    NotFound,
    /// The request is invalid, or the store answered 400.
    BadRequest,
    /// An artifact path with `..`, NUL or more than 1024 bytes.
    InvalidPath,
    /// The store rejected the task's token, even the newest one.
    Unauthorized,
    /// The object exists or is in use (409).
    Conflict,
    /// The store answered 5xx.
    Server,
    /// The store is unreachable, or the transfer was interrupted.
    Network,
    /// The store's answer does not follow its protocol.
    Malformed,
    /// This host or store does not support it, or the operator did not grant it.
    Unsupported,
    /// The task has ended, so its context is closed.
    TaskOver,
    /// The lease has ended. No more data may be transferred for it.
    LeaseOver,
    /// A local file could not be read or written.
    Local,
    /// A limit was exceeded: size of progress or of an event, open streams, bytes in memory, or the contents of an
    /// archive.
    Limit,
    /// The task could not be set up on its control plane.
    Setup,
    /// Any other error.
    Other,
}

impl PortErrorKind {
    /// True for failures that neither the runner nor the input caused.
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

/// Why a call of the context failed. One line, without secrets. If the store rejected the call, the line has the
/// status, as in `conflict (409)`.
#[derive(Clone)]
pub struct PortError(Arc<PortErrorInfo>);

/// The content of a [`PortError`], and also its cause. A wrapper such as `anyhow::Error` hides the type that it
/// holds, but it shows the causes. So the SDK finds a port error below any wrapper.
#[derive(Clone, Debug)]
struct PortErrorInfo {
    kind: PortErrorKind,
    message: String,
}

impl PortError {
    /// An error of `kind` with one line of text.
    #[must_use]
    pub fn new(kind: PortErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(PortErrorInfo { kind, message: message.into() }))
    }

    /// The kind of the error, for code that handles kinds differently.
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

impl fmt::Display for PortErrorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port error {:?}", self.kind)
    }
}

impl StdError for PortErrorInfo {}

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
    fn reason_is_the_whole_chain() {
        let err = Error::from(Outer("x".parse::<i32>().expect_err("not a number")));
        assert_eq!(err.chain(), "voxel is no number: invalid digit found in string");
    }

    #[test]
    fn port_error_is_found_below_other_errors() {
        let port = PortError::new(PortErrorKind::Server, "download failed: server (503)");
        let err = Error::from(std::io::Error::other(port));
        assert_eq!(err.port_error().map(|port| port.kind()), Some(PortErrorKind::Server));
        assert!(Error::msg("plain").port_error().is_none());
    }
}
