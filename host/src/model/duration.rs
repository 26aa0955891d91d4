//! Durations as people write and read them.

use std::time::Duration;

use jiff::{
    SignedDuration,
    fmt::friendly::{Spacing, SpanPrinter},
};

/// Reads `30s`, `1m 30s`, `1h30m`, `500ms`, or plain seconds.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let parsed: SignedDuration = text.parse().ok()?;
    Duration::try_from(parsed).ok()
}

/// Writes `15m`, `1h30m` or `1s500ms`.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let duration = SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    SpanPrinter::new().spacing(Spacing::None).duration_to_string(&duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_carry_units_or_are_seconds() {
        assert_eq!(parse_duration("30s"), Some(Duration::from_secs(30)));
        assert_eq!(parse_duration("1m 30s"), Some(Duration::from_secs(90)));
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("0"), Some(Duration::ZERO));
        assert_eq!(parse_duration("-1s"), None);
        assert_eq!(parse_duration("soon"), None);
    }

    #[test]
    fn written_durations_are_short_and_exact() {
        for (ms, text) in [(900_000, "15m"), (5_400_000, "1h30m"), (90_000, "1m30s"), (1500, "1s500ms"), (0, "0s")] {
            let duration = Duration::from_millis(ms);
            assert_eq!(format_duration(duration), text);
            assert_eq!(parse_duration(text), Some(duration));
        }
        assert!(format_duration(Duration::MAX).ends_with('s'));
    }
}
