//! Durations as log lines carry them.

use std::time::Duration;

/// Whole milliseconds. Machines read log lines, and JSON shows the `u128` of
/// [`Duration::as_millis`] as a text.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
