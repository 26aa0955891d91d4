//! The name under which work is asked for and served, such as `/pointcloud/downsample/v1`.

use std::{fmt, str::FromStr, sync::Arc};

/// Longest capability name accepted, in bytes (newer control planes refuse longer ones).
pub(crate) const CAPABILITY_BYTES_MAX: usize = 256;

/// A capability name: not blank, no white space, no control characters, at most
/// [`CAPABILITY_BYTES_MAX`] bytes. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capability(Arc<str>);

/// Why a text is no capability name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CapabilityError {
    /// Nothing there.
    #[error("capability is empty, expected a name such as /examples/hello/v1")]
    Empty,
    /// Longer than [`CAPABILITY_BYTES_MAX`].
    #[error("capability is {0} bytes long, at most {CAPABILITY_BYTES_MAX} are allowed")]
    TooLong(usize),
    /// White space or a control character inside.
    #[error("capability {0:?} holds white space or a control character")]
    Character(String),
}

impl Capability {
    /// Checks `text` and keeps it unchanged.
    pub fn parse(text: &str) -> Result<Self, CapabilityError> {
        if text.is_empty() {
            return Err(CapabilityError::Empty);
        }
        if text.len() > CAPABILITY_BYTES_MAX {
            return Err(CapabilityError::TooLong(text.len()));
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(CapabilityError::Character(text.to_owned()));
        }
        Ok(Self(text.into()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl FromStr for Capability {
    type Err = CapabilityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_once_at_the_door() {
        assert_eq!(Capability::parse("/examples/hello/v1").map(|c| c.to_string()), Ok("/examples/hello/v1".to_owned()));
        assert_eq!(Capability::parse(""), Err(CapabilityError::Empty));
        assert!(matches!(Capability::parse("/a b"), Err(CapabilityError::Character(_))));
        assert!(matches!(Capability::parse("/a\n"), Err(CapabilityError::Character(_))));
        assert_eq!(Capability::parse(&"x".repeat(257)), Err(CapabilityError::TooLong(257)));
    }
}
