//! The difference between the local clock and the clock of a service, measured by the `Date` of its answers.
//!
//! Services send absolute times, such as the expiry of a lease. These follow the clock of the service. With another
//! local clock, a fresh lease would look expired, or an expired one fresh. So each `Date` is compared with the local
//! clock.
//!
//! One answer gives a range: a date has whole seconds, and the answer takes time to arrive. The ranges of one host are
//! intersected, so the result becomes more exact.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use http::{HeaderMap, header};
use jiff::{SignedDuration, Timestamp};

use crate::model::{BootInstant, millis};

/// A smaller difference is noise between synchronised clocks.
const NOISE: SignedDuration = SignedDuration::from_secs(5);
/// Most hosts with a measurement. A node calls fewer. A forgotten host is measured again.
const HOSTS_MAX: usize = 64;
/// The resolution of a date.
const DATE_RESOLUTION: SignedDuration = SignedDuration::from_secs(1);

/// The other clock is ahead of the local clock by at least `low` and at most `high`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    low: SignedDuration,
    high: SignedDuration,
}

impl Range {
    /// Measures one answer: dated `date`. `sent` and `received` are the times of the request and the answer, by the
    /// local clock.
    fn measured(date: Timestamp, sent: Timestamp, received: Timestamp) -> Self {
        Self { low: date.duration_since(received), high: date.duration_since(sent).saturating_add(DATE_RESOLUTION) }
    }

    /// The intersection. If it is empty, a clock was changed: the newer range alone.
    fn and(self, newer: Self) -> Self {
        let both = Self { low: self.low.max(newer.low), high: self.high.min(newer.high) };
        if both.low <= both.high { both } else { newer }
    }

    /// The correction, if the difference is certain to exceed `noise`.
    fn beyond(self, noise: SignedDuration) -> Option<SignedDuration> {
        (self.low > noise || self.high < -noise).then(|| (self.low.saturating_add(self.high)) / 2)
    }
}

/// The measured clocks of all hosts that a client has called.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    /// A few entries: a linear search is faster than a hash.
    hosts: Mutex<Vec<(String, Range)>>,
    /// The last parsed date. Most answers repeat it.
    date: Mutex<Option<(Box<[u8]>, Timestamp)>>,
}

impl Clocks {
    /// Measures an answer of `host` that was requested at `sent` and has just arrived.
    pub(super) fn measure(&self, host: &str, headers: &HeaderMap, sent: BootInstant) -> Reading {
        // The duration is read before the time of day. A process stop in between only widens the range.
        let (elapsed, received) = (BootInstant::now() - sent, Timestamp::now());
        let date = headers.get(header::DATE).and_then(|date| self.date(date.as_bytes()));
        let requested_at = received.checked_sub(elapsed).unwrap_or(received);
        let measured = date.map(|date| Range::measured(date, requested_at, received));
        Reading { sent, range: self.update(host, measured) }
    }

    fn date(&self, text: &[u8]) -> Option<Timestamp> {
        let mut last = self.date.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((known, date)) if **known == *text => Some(*date),
            _ => {
                let date = parse(std::str::from_utf8(text).ok()?)?;
                *last = Some((text.into(), date));
                Some(date)
            }
        }
    }

    /// The time at `host`: the local time, corrected by the measured difference.
    pub(super) fn now(&self, host: &str) -> Timestamp {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let range = hosts.iter().find(|(known, _)| known == host).map(|(_, range)| *range);
        let ahead = range.and_then(|range| range.beyond(NOISE)).unwrap_or_default();
        Timestamp::now().saturating_add(ahead).expect("a difference of clocks fits a timestamp")
    }

    fn update(&self, host: &str, measured: Option<Range>) -> Option<Range> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = hosts.iter_mut().find(|(known, _)| known == host).map(|(_, range)| range);
        let was = known.as_deref().copied();
        let Some(measured) = measured else { return was };
        let range = was.map_or(measured, |was| was.and(measured));
        match &mut known {
            Some(known) => **known = range,
            None => {
                if hosts.len() >= HOSTS_MAX {
                    hosts.clear();
                }
                hosts.push((host.to_owned(), range));
            }
        }
        drop(hosts);
        let (was, is) = (was.and_then(|was| was.beyond(NOISE)), range.beyond(NOISE));
        if let (None, Some(ahead)) = (was, is) {
            let (off_ms, direction) =
                (millis(ahead.unsigned_abs()), if ahead.is_negative() { "behind" } else { "ahead" });
            tracing::warn!(
                event = "clock.differs",
                host,
                off_ms,
                direction,
                "clock of a service differs from the clock of this machine, its times are corrected"
            );
        }
        Some(range)
    }
}

/// When an answer was requested, and the measured clock of its sender.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    sent: BootInstant,
    range: Option<Range>,
}

impl Reading {
    /// Converts `at` from the sender's clock to the local clock. `None`: the time had passed before the request was
    /// sent. Such a time cannot belong to something that the answer has just issued.
    pub(super) fn local_time(&self, at: Timestamp) -> Option<BootInstant> {
        let (now, wall_clock) = (BootInstant::now(), Timestamp::now());
        let plain = at.duration_since(wall_clock);
        // A short time needs an exact clock. A long one tolerates a small error.
        let noise = (plain / 10).clamp(SignedDuration::ZERO, NOISE);
        let ahead = self.range.and_then(|range| range.beyond(noise)).unwrap_or_default();
        let left = plain.saturating_sub(ahead);
        let local_time = if left.is_negative() { now.back(left.unsigned_abs()) } else { now + left.unsigned_abs() };
        (local_time > self.sent).then_some(local_time)
    }

    /// Whether the sender's clock has been measured, by this answer or an earlier one.
    pub(super) fn is_measured(&self) -> bool {
        self.range.is_some()
    }

    /// The time left until the sender's `at`. `None`: it has passed.
    pub(super) fn time_left(&self, at: Timestamp) -> Option<Duration> {
        self.local_time(at).map(BootInstant::left).filter(|left| !left.is_zero())
    }
}

/// Parses a date of HTTP. Of its three forms, jiff reads the usual one.
fn parse(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(text: &str) -> SignedDuration {
        SignedDuration::try_from_secs_f64(text.parse().expect("a number")).expect("a short time")
    }

    /// Each answer is `date sent received` in seconds. Expected are the range, and the correction beyond noise.
    #[track_caller]
    fn check(answers: &[&str], expected: &str) {
        let at = |text: &str| Timestamp::UNIX_EPOCH + seconds("1000000000") + seconds(text);
        let clocks = Clocks::default();
        let mut last = None;
        for answer in answers {
            let [date, sent, received] = answer.split(' ').collect::<Vec<_>>()[..] else { panic!("three numbers") };
            last = clocks.update("h", Some(Range::measured(at(date), at(sent), at(received))));
        }
        let range = last.expect("there was an answer");
        let shown = |time: SignedDuration| format!("{:.1}", time.as_secs_f64());
        let correction = range.beyond(NOISE).map_or("none".to_owned(), shown);
        assert_eq!(format!("{} {} {correction}", shown(range.low), shown(range.high)), expected);
    }

    #[test]
    fn equal_clocks_get_no_correction() {
        check(&["100 100.2 100.4"], "-0.4 0.8 none");
        check(&["104 100 100.2"], "3.8 5.0 none");
    }

    #[test]
    fn more_answers_make_the_correction_more_exact() {
        check(&["1300 100.8 101.0"], "1199.0 1200.2 1199.6");
        check(&["1300 100.8 101.0", "1310 110.1 110.2", "1320 119.9 120.0"], "1200.0 1200.2 1200.1");
        check(&["-1100 100.5 100.5"], "-1200.5 -1199.5 -1200.0");
    }

    #[test]
    fn slow_answers_give_wide_ranges() {
        check(&["100 80 120"], "-20.0 21.0 none");
        check(&["1300 100 100.1", "1350 100 160"], "1199.9 1201.0 1200.5");
    }

    #[test]
    fn changed_clock_is_measured_again() {
        check(&["1300 100 100.1", "200 200 200.1"], "-0.1 1.0 none");
    }

    /// The time left until `at`, in seconds from now, if the other clock is `ahead` by this much.
    fn left(ahead: &str, at: &str) -> Option<f64> {
        let range = Range { low: seconds(ahead), high: seconds(ahead) };
        let reading = Reading { sent: BootInstant::now().back(Duration::from_secs(1)), range: Some(range) };
        let left = reading.time_left(Timestamp::now() + seconds(at))?;
        Some((left.as_secs_f64() * 10.0).round() / 10.0)
    }

    #[test]
    fn corrections_ignore_noise() {
        assert_eq!(left("0", "60"), Some(60.0));
        assert_eq!(left("4", "60"), Some(60.0), "noise");
        assert_eq!(left("4", "6"), Some(2.0), "noise is a large part of a short lease");
        assert_eq!(left("1200", "1260"), Some(60.0));
        assert_eq!(left("-1200", "-1140"), Some(60.0));
        assert_eq!(left("-3", "-1"), Some(2.0));
    }

    #[test]
    fn times_before_the_request_are_ignored() {
        assert_eq!(left("0", "-60"), None);
        let reading = Reading { sent: BootInstant::now().back(Duration::from_secs(5)), range: None };
        let between = reading.local_time(Timestamp::now() - SignedDuration::from_secs(2));
        assert!(between.is_some_and(BootInstant::has_passed), "it ended while the answer was in transit");
        assert_eq!(reading.time_left(Timestamp::now() - SignedDuration::from_secs(2)), None);
        assert_eq!(reading.local_time(Timestamp::MIN), None);
        assert!(reading.local_time(Timestamp::MAX).is_some());
    }

    #[test]
    fn http_dates_are_parsed() {
        assert_eq!(parse("Sat, 21 Nov 2026 05:55:12 GMT"), "2026-11-21T05:55:12Z".parse().ok());
        assert_eq!(parse("yesterday"), None);
        let clocks = Clocks::default();
        for (text, expected) in [
            ("Sat, 21 Nov 2026 05:55:12 GMT", "2026-11-21T05:55:12Z".parse().ok()),
            ("Sat, 21 Nov 2026 05:55:12 GMT", "2026-11-21T05:55:12Z".parse().ok()),
            ("yesterday", None),
            ("Sat, 21 Nov 2026 05:55:13 GMT", "2026-11-21T05:55:13Z".parse().ok()),
        ] {
            assert_eq!(clocks.date(text.as_bytes()), expected, "{text}");
        }
    }
}
