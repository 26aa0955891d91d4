//! Durations in the format of log lines.

use std::time::Duration;

/// Whole milliseconds as `u64`. Programs read log lines, and JSON shows the `u128` of [`Duration::as_millis`] as a
/// string.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
