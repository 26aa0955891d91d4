//! When to poll next.

use std::{ops::RangeInclusive, time::Duration};

use tokio::time::Instant;

/// No pause is shorter, whatever the bounds say: a plane without work is asked a hundred times a second at most.
const PAUSE_MIN: Duration = Duration::from_millis(10);

/// A pause that doubles from the lower bound to the upper one, with jitter: each pause lies anywhere
/// between the lower bound and the grown one, both included, so that nodes which start together drift
/// apart.
struct Backoff {
    low: Duration,
    high: Duration,
    grown: Duration,
}

impl Backoff {
    /// The bounds may come in either order.
    fn new(a: Duration, b: Duration) -> Self {
        let (low, high) = (a.min(b).max(PAUSE_MIN), a.max(b).max(PAUSE_MIN));
        Self { low, high, grown: low }
    }

    fn reset(&mut self) {
        self.grown = self.low;
    }

    fn next(&mut self) -> Duration {
        rand::Rng::random_range(&mut rand::rng(), self.range())
    }

    /// Where the next pause lies.
    fn range(&mut self) -> RangeInclusive<Duration> {
        self.grown = (self.grown * 2).min(self.high).max(self.low);
        self.low..=self.grown
    }
}

/// What a lease was good for, as far as polling is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worth {
    /// Its runner could do its work, whatever came of it.
    Work,
    /// It could not be set up, was cancelled before it began, or was lost.
    Nothing,
}

/// Decides when to poll. Work is followed by the next poll at once; empty answers, failures and leases
/// that were good for nothing are not, so that a plane which flaps is not polled in a tight loop.
pub(super) struct Pace {
    backoff: Backoff,
    next: Instant,
    /// The last lease that ended was good for nothing: the next ones are taken one by one.
    wary: bool,
}

impl Pace {
    pub(super) fn new(bounds: (Duration, Duration), now: Instant) -> Self {
        Self { backoff: Backoff::new(bounds.0, bounds.1), next: now, wary: false }
    }

    /// When the next poll may be.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// A poll brought a lease.
    pub(super) fn won(&mut self, now: Instant) {
        if self.wary {
            self.next = now + self.backoff.low;
        } else {
            self.backoff.reset();
        }
    }

    /// A poll brought nothing that could be run. Returns the pause.
    pub(super) fn pause(&mut self, now: Instant) -> Duration {
        let pause = self.backoff.next();
        self.next = now + pause;
        pause
    }

    /// A lease ended.
    pub(super) fn ended(&mut self, worth: Worth, now: Instant) {
        match worth {
            Worth::Work => {
                self.wary = false;
                self.backoff.reset();
                self.next = now;
            }
            // Several that end together are one misfortune.
            Worth::Nothing if self.wary && self.next > now => {}
            Worth::Nothing => {
                self.wary = true;
                self.pause(now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn s0_31_pauses_grow_from_one_bound_to_the_other_and_may_meet_both() {
        for (a, b) in [(100, 3000), (3000, 100)] {
            let mut backoff = Backoff::new(a * MS, b * MS);
            let ranges: Vec<_> = (0..6).map(|_| backoff.range()).collect();
            assert!(ranges.iter().all(|range| *range.start() == 100 * MS));
            let grown: Vec<_> = ranges.iter().map(|range| range.end().as_millis()).collect();
            assert_eq!(grown, [200, 400, 800, 1600, 3000, 3000]);
            backoff.reset();
            assert_eq!(backoff.range(), 100 * MS..=200 * MS);
        }
        let mut backoff = Backoff::new(Duration::ZERO, 2 * MS);
        assert!((0..20).all(|_| backoff.next() == PAUSE_MIN), "bounds of nothing are no licence to storm");
    }

    #[test]
    fn s0_31_equal_bounds_give_a_fixed_pause() {
        let mut backoff = Backoff::new(50 * MS, 50 * MS);
        assert!((0..10).all(|_| backoff.next() == 50 * MS));
    }

    /// What happens at which millisecond, with pauses of 100 ms; expected are the moments of the next poll.
    #[track_caller]
    fn check(events: &[(u32, &str)], expected: &[u128]) {
        let start = Instant::now();
        let mut pace = Pace::new((100 * MS, 100 * MS), start);
        let seen: Vec<u128> = events
            .iter()
            .map(|(at, event)| {
                let now = start + *at * MS;
                match *event {
                    "won" => pace.won(now),
                    "empty" => drop(pace.pause(now)),
                    "work" => pace.ended(Worth::Work, now),
                    _ => pace.ended(Worth::Nothing, now),
                }
                (pace.next() - start).as_millis()
            })
            .collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn work_is_followed_by_a_poll_at_once_and_nothing_else_is() {
        check(&[(0, "won"), (5, "won"), (9, "work"), (10, "empty"), (50, "work")], &[0, 0, 9, 110, 50]);
        check(&[(0, "won"), (5, "nothing"), (6, "nothing"), (105, "won"), (110, "nothing")], &[0, 105, 105, 205, 205]);
        check(&[(0, "nothing"), (100, "won"), (150, "work"), (151, "won")], &[100, 200, 150, 150]);
    }
}
