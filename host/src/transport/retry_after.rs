//! Reads `Retry-After`. All callers apply it with one rule: `model::pause_asked`.

use std::time::Duration;

use http::{HeaderMap, HeaderName, header};
use jiff::Timestamp;

/// Longest accepted `Retry-After`. A caller may have a shorter limit.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// Reads `Retry-After` in both forms, at most [`RETRY_AFTER_MAX`]. A date follows the clock of the service, which its
/// `Date` header shows.
#[must_use]
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: HeaderName| headers.get(name)?.to_str().ok();
    read(text(header::RETRY_AFTER)?, text(header::DATE).and_then(date).unwrap_or_else(Timestamp::now))
}

fn read(text: &str, now: Timestamp) -> Option<Duration> {
    let text = text.trim();
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => Duration::try_from(date(text)?.duration_since(now)).unwrap_or_default(),
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

fn date(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_accepts_seconds_and_dates() {
        let date = |text: &'static str| [("date", "Sun, 06 Nov 1994 08:49:37 GMT"), ("retry-after", text)];
        let check = |given: &[(&'static str, &'static str)], expected: Option<u64>| {
            let headers =
                given.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("text")));
            assert_eq!(retry_after(&headers.collect()), expected.map(Duration::from_secs), "{given:?}");
        };
        check(&[], None);
        check(&[("retry-after", "7")], Some(7));
        check(&[("retry-after", "999999")], Some(600));
        check(&[("retry-after", "soon")], None);
        check(&[("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")], Some(0));
        check(&[("retry-after", "Fri, 06 Nov 2893 08:49:37 GMT")], Some(600));
        // By the clock of the service, not by the local clock.
        check(&date("Sun, 06 Nov 1994 08:49:44 GMT"), Some(7));
        check(&date("Sun, 06 Nov 1994 08:49:30 GMT"), Some(0));
        check(&date("7"), Some(7));
    }
}
