//! Opens a library from bytes that were checked: what is opened is what was hashed.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub(super) use unix::{Sealed, leave};
#[cfg(windows)]
pub(super) use windows::{Sealed, leave};
