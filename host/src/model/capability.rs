//! The name under which work is requested and served, such as `/pointcloud/downsample/v1`.

use std::{fmt, str::FromStr, sync::Arc};

/// Longest capability name accepted, in bytes. Newer control planes reject longer names.
pub(crate) const CAPABILITY_BYTES_MAX: usize = 256;

/// A capability name. Cheap to clone.
///
/// The name in a plugin has the form `/` and parts that are not empty. It is printable ASCII without quotes and
/// backslashes, at most [`CAPABILITY_BYTES_MAX`] bytes. The SDK has the same rule in `shim/manifest.rs`. Names on the
/// wire may have other forms.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capability(Arc<str>);

/// Why a text is not a capability name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CapabilityError {
    /// The text is empty.
    #[error("capability is empty, expected a name such as /examples/hello/v1")]
    Empty,
    /// Longer than [`CAPABILITY_BYTES_MAX`].
    #[error("capability is {0} bytes long, at most {CAPABILITY_BYTES_MAX} are allowed")]
    TooLong(usize),
    /// The first character is not a slash.
    #[error("capability {0:?} does not begin with /, expected a name such as /examples/hello/v1")]
    NoSlash(String),
    /// Nothing between two slashes, or after the last one.
    #[error(
        "capability {0:?} has an empty part between slashes or at its end, expected a name such as /examples/hello/v1"
    )]
    EmptyPart(String),
    /// A character other than printable ASCII, or a quote or backslash.
    #[error("capability {0:?} holds a character other than printable ASCII without quotes and backslashes")]
    NotPrintable(String),
    /// White space or a control character inside.
    #[error("capability {0:?} holds white space or a control character")]
    Character(String),
}

impl Capability {
    /// Checks a name from a plugin or an operator, and does not change it.
    pub fn parse(text: &str) -> Result<Self, CapabilityError> {
        let name = Self::from_wire(text)?;
        let Some(parts) = text.strip_prefix('/') else { return Err(CapabilityError::NoSlash(text.to_owned())) };
        if parts.split('/').any(str::is_empty) {
            return Err(CapabilityError::EmptyPart(text.to_owned()));
        }
        if text.bytes().any(|byte| !byte.is_ascii_graphic() || matches!(byte, b'"' | b'\\')) {
            return Err(CapabilityError::NotPrintable(text.to_owned()));
        }
        Ok(name)
    }

    /// Checks a name from a control plane or another node, and does not change it.
    pub fn from_wire(text: &str) -> Result<Self, CapabilityError> {
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
    fn names_are_checked_when_parsed() {
        assert_eq!(Capability::parse("/examples/hello/v1").map(|c| c.to_string()), Ok("/examples/hello/v1".to_owned()));
        assert_eq!(Capability::parse(""), Err(CapabilityError::Empty));
        assert!(matches!(Capability::parse("/a b"), Err(CapabilityError::Character(_))));
        assert!(matches!(Capability::parse("/a\n"), Err(CapabilityError::Character(_))));
        assert_eq!(Capability::parse(&"x".repeat(257)), Err(CapabilityError::TooLong(257)));
        assert_eq!(Capability::parse("a/v1"), Err(CapabilityError::NoSlash("a/v1".to_owned())));
        assert_eq!(Capability::parse("/a//v1"), Err(CapabilityError::EmptyPart("/a//v1".to_owned())));
        assert_eq!(Capability::parse("/\u{e4}"), Err(CapabilityError::NotPrintable("/\u{e4}".to_owned())));
        assert!(Capability::from_wire("a/v1").is_ok() && Capability::from_wire("/a//v1").is_ok());
    }
}
