//! The pauses between attempts (posemesh.md section 2.6). Pure code: the caller passes the random draw of the jitter.

use std::time::Duration;

use super::refusal::Class;
use crate::model::{Backoff, Jitter};

/// The pauses after consecutive transient failures.
const TRANSIENT: Backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(60), Jitter::Fifth);
/// The first pause after a conflict. A node that was killed and restarted conflicts with itself until the service
/// notices the end of the first process.
const CONFLICT_FIRST: Duration = Duration::from_secs(1);

/// The pauses between registrations.
#[derive(Debug)]
pub(super) struct Pauses {
    interval: Duration,
    cap: i32,
    /// Consecutive transient failures.
    transient: u32,
    /// Consecutive conflicts.
    conflicts: u32,
}

impl Pauses {
    /// `cap`: consecutive transient failures before a pause of one `interval`. Negative: no cap.
    pub(super) fn new(interval: Duration, cap: i32) -> Self {
        Self { interval: interval.max(Duration::from_secs(1)), cap, transient: 0, conflicts: 0 }
    }

    /// The pause after a failure of `class`. `draw` is in 0..1.
    pub(super) fn after(&mut self, class: Class, draw: f64) -> Duration {
        match class {
            Class::Transient => {
                self.conflicts = 0;
                self.transient += 1;
                if u32::try_from(self.cap).is_ok_and(|cap| self.transient >= cap) {
                    self.transient = 0;
                    return self.interval;
                }
                TRANSIENT.pause(self.transient, draw)
            }
            Class::Conflict => {
                self.transient = 0;
                self.conflicts = self.conflicts.saturating_add(1);
                Backoff::new(CONFLICT_FIRST, self.interval, Jitter::Fifth).pause(self.conflicts, draw)
            }
            Class::Persistent => {
                (self.transient, self.conflicts) = (0, 0);
                self.interval
            }
        }
    }
}

/// Bounds of the first pause after a failed login. The upper bound also limits all later pauses.
const LOGIN_FIRST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// The pauses after failed logins. The first pause is at most half of `jitter` (`TOKEN_REAUTH_JITTER_MS`), the second at
/// most all of it.
pub(super) fn after_login(jitter: Duration) -> Backoff {
    Backoff::new((jitter / 2).clamp(LOGIN_FIRST.0, LOGIN_FIRST.1), LOGIN_FIRST.1, Jitter::Half)
}

/// The least time between logins whose tokens the control plane first accepts and then rejects. It is short because the
/// node holds leases. It grows because another node may sign in with the same key.
const ACCEPTED_LOGIN_GAP: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1), Jitter::Half);

/// Counts consecutive tokens that were accepted, and rejected before [`ACCEPTED_LOGIN_GAP`] had passed.
#[derive(Debug, Default)]
pub(super) struct AcceptedTokens(u32);

impl AcceptedTokens {
    /// Returns the pause before the next login. `lived` is how long the last token was valid.
    pub(super) fn rejected(&mut self, lived: Duration, draw: f64) -> Duration {
        if lived >= ACCEPTED_LOGIN_GAP.grown(self.0 + 1) {
            self.0 = 0;
            return Duration::ZERO;
        }
        self.0 = (self.0 + 1).min(16);
        ACCEPTED_LOGIN_GAP.pause(self.0, draw).saturating_sub(lived)
    }
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
                    _ => Class::Persistent,
                };
                pauses.after(class, 0.5).as_secs().to_string()
            })
            .collect();
        assert_eq!(seen.join(" "), expected, "cap {cap}, failures {failures}");
    }

    #[test]
    fn only_transient_failures_have_growing_pauses() {
        check(-1, "ttttttttt", "2 4 8 16 32 60 60 60 60");
        check(-1, "ttstt", "2 4 120 2 4");
        check(0, "ttt", "120 120 120");
        check(3, "tttttt", "2 4 120 2 4 120");
    }

    #[test]
    fn conflict_pauses_grow_up_to_the_interval() {
        check(-1, "ccccccccc", "1 2 4 8 16 32 64 120 120");
        check(-1, "cctcsc", "1 2 2 1 120 1");
    }

    #[test]
    fn jitter_stays_within_one_fifth() {
        for (draw, expected) in [(0.0, 1.6), (1.0, 2.4)] {
            let mut pauses = Pauses::new(Duration::from_secs(120), -1);
            assert!((pauses.after(Class::Transient, draw).as_secs_f64() - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn login_pauses_grow_from_the_jitter() {
        let grown = |jitter: u64| -> Vec<u128> {
            let pauses = after_login(Duration::from_millis(jitter));
            (1..=9).map(|n| pauses.pause(n, 1.0).as_millis()).collect()
        };
        assert_eq!(grown(500), [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
        assert_eq!(grown(0), [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600]);
        assert_eq!(grown(1_000_000)[0], 30_000);
        assert_eq!(after_login(Duration::from_millis(500)).pause(1, 0.0), Duration::from_millis(125));
        assert_eq!(after_login(Duration::MAX).pause(u32::MAX, 0.0), Duration::from_secs(15));
    }

    #[test]
    fn only_short_lived_accepted_tokens_cause_pauses() {
        let mut tokens = AcceptedTokens::default();
        let pauses = |tokens: &mut AcceptedTokens, lived: u64, count: usize| -> Vec<u128> {
            (0..count).map(|_| tokens.rejected(Duration::from_millis(lived), 1.0).as_millis()).collect()
        };
        assert_eq!(pauses(&mut tokens, 150, 3), [0, 0, 0]);
        assert_eq!(pauses(&mut tokens, 0, 6), [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(pauses(&mut tokens, 900, 1), [100]);
        assert_eq!(pauses(&mut tokens, 1000, 2), [0, 0]);
        assert_eq!(pauses(&mut tokens, 90, 1), [10]);
    }
}
