//! Opens a library from checked bytes. The opened bytes are exactly the hashed bytes.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub(super) use unix::{Sealed, exit_process, on_exit};
#[cfg(windows)]
pub(super) use windows::{Sealed, exit_process, on_exit};
