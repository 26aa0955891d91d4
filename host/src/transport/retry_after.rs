//! How long a service asks to be left alone.

use std::time::Duration;

use http::{HeaderMap, header};
use jiff::Timestamp;

/// Longest `Retry-After` obeyed. A service that asks for more is asked again earlier than it likes.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// Reads `Retry-After` in both its forms, bounded by [`RETRY_AFTER_MAX`].
#[must_use]
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    read(headers.get(header::RETRY_AFTER)?.to_str().ok()?)
}

fn read(text: &str) -> Option<Duration> {
    let text = text.trim();
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
            Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default()
        }
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date_and_has_a_bound() {
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("999999"), Some(RETRY_AFTER_MAX));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(read("Fri, 06 Nov 2893 08:49:37 GMT"), Some(RETRY_AFTER_MAX));
        assert_eq!(read("soon"), None);
    }
}
