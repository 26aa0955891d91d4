//! The pauses between attempts (posemesh.md section 2.6). Pure: the draw of a jitter is passed in.

use std::time::Duration;

use super::refusal::Class;

/// Longest pause after a transient failure, before its jitter.
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// The pauses between registrations.
#[derive(Debug)]
pub(super) struct Pauses {
    interval: Duration,
    cap: i32,
    transient: u32,
}

impl Pauses {
    /// `cap`: transient failures in a row before one `interval` is waited; negative: no cap.
    pub(super) fn new(interval: Duration, cap: i32) -> Self {
        Self { interval: interval.max(Duration::from_secs(1)), cap, transient: 0 }
    }

    /// The pause after a failure of `class`. `draw` lies in 0..1.
    pub(super) fn after(&mut self, class: Class, draw: f64) -> Duration {
        if class != Class::Transient {
            self.transient = 0;
            return self.interval;
        }
        self.transient += 1;
        if u32::try_from(self.cap).is_ok_and(|cap| self.transient >= cap) {
            self.transient = 0;
            return self.interval;
        }
        let grown = Duration::from_secs(1 << self.transient.min(6)).min(BACKOFF_MAX);
        grown.mul_f64(0.8 + 0.4 * draw)
    }
}

/// Bounds of the first pause after a failed login, and the longest of all, before their jitter.
const LOGIN_FIRST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// The pause after failed login number `count` in a row: doubling, jittered downwards by up to a half.
/// The first is at most half of `jitter` (`TOKEN_REAUTH_JITTER_MS`), the second at most all of it.
pub(super) fn after_login(count: u32, jitter: Duration, draw: f64) -> Duration {
    let first = (jitter / 2).clamp(LOGIN_FIRST.0, LOGIN_FIRST.1);
    let grown = first * (1_u32 << count.saturating_sub(1).min(9));
    grown.min(LOGIN_FIRST.1).mul_f64(1.0 - 0.5 * draw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cap: i32, failures: &str, expected: &str) {
        let mut pauses = Pauses::new(Duration::from_secs(120), cap);
        let seen: Vec<String> = failures
            .chars()
            .map(|letter| {
                let class = match letter {
                    't' => Class::Transient,
                    'c' => Class::Conflict,
                    _ => Class::Slow,
                };
                pauses.after(class, 0.5).as_secs().to_string()
            })
            .collect();
        assert_eq!(seen.join(" "), expected, "cap {cap}, failures {failures}");
    }

    #[test]
    fn transient_failures_grow_and_others_wait_the_interval() {
        check(-1, "ttttttttt", "2 4 8 16 32 60 60 60 60");
        check(-1, "ttstct", "2 4 120 2 120 2");
        check(0, "ttt", "120 120 120");
        check(3, "tttttt", "2 4 120 2 4 120");
    }

    #[test]
    fn the_jitter_stays_within_a_fifth() {
        for (draw, expected) in [(0.0, 1.6), (1.0, 2.4)] {
            let mut pauses = Pauses::new(Duration::from_secs(120), -1);
            assert!((pauses.after(Class::Transient, draw).as_secs_f64() - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn pauses_between_logins_begin_within_the_jitter_and_grow_to_their_bound() {
        let grown = |jitter: u64| -> Vec<u128> {
            (1..=9).map(|n| after_login(n, Duration::from_millis(jitter), 0.0).as_millis()).collect()
        };
        assert_eq!(grown(500), [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
        assert_eq!(grown(0), [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600]);
        assert_eq!(grown(1_000_000)[0], 30_000);
        assert_eq!(after_login(1, Duration::from_millis(500), 1.0), Duration::from_millis(125));
        assert_eq!(after_login(u32::MAX, Duration::MAX, 1.0), Duration::from_secs(15));
    }
}
