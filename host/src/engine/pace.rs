//! When to poll next.

use std::{ops::RangeInclusive, time::Duration};

use tokio::time::Instant;

/// Longest time the plane may ask to be left alone, unless the pauses are longer anyway.
const ASKED_MAX: Duration = Duration::from_secs(60);
/// No pause is shorter, whatever the bounds say: a plane without work is asked a hundred times a second at most.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Most polls under way at once: slots fill in few round trips of a plane far away, and an empty one is not
/// asked by all of them.
const WIDTH_MAX: usize = 8;

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
pub(super) enum LeaseValue {
    /// Its runner did its work.
    Work,
    /// Its runner failed. One may; what fails in a row comes from the node, or is one task that comes
    /// back each time.
    Failure,
    /// It could not be set up, its data could not be moved, it was cancelled before it began, or it was lost.
    Nothing,
}

/// Decides when to poll, and how often at once. Work is followed by the next poll at once; empty answers,
/// failures in a row and leases that were good for nothing are not, so that neither a plane which flaps nor
/// a task which comes back as soon as it has failed is a tight loop.
pub(super) struct Pace {
    backoff: Backoff,
    next: Instant,
    /// Before this the plane wants no poll, whatever else happens.
    not_before: Instant,
    /// When the last pause after a poll began: polls that were on their way then have the same answer.
    paused_at: Instant,
    /// The end of the last pause after an end: what ends before it is the same misfortune.
    paused_until: Instant,
    /// Leases since a poll brought none.
    wins: usize,
    /// The last lease did not work, but was no reason to wait yet.
    suspicious: bool,
    /// The last lease that ended was good for nothing: the next ones are taken one by one.
    wary: bool,
}

impl Pace {
    pub(super) fn new(bounds: (Duration, Duration), now: Instant) -> Self {
        let backoff = Backoff::new(bounds.0, bounds.1);
        Self {
            backoff,
            next: now,
            not_before: now,
            paused_at: now,
            paused_until: now,
            wins: 0,
            suspicious: false,
            wary: false,
        }
    }

    /// How many polls may be under way. One where there is no work; while leases come, one more with each.
    pub(super) fn width(&self) -> usize {
        if self.wary { 1 } else { self.wins.clamp(1, WIDTH_MAX) }
    }

    /// The next poll goes alone.
    pub(super) fn alone(&mut self) {
        self.wins = 0;
    }

    /// When the next poll may be.
    pub(super) fn next(&self) -> Instant {
        self.next.max(self.not_before)
    }

    /// The plane asks to be left alone for so long.
    pub(super) fn leave_alone(&mut self, asked: Duration, now: Instant) {
        self.not_before = now + asked.min(self.backoff.high.max(ASKED_MAX));
    }

    /// A poll brought a lease.
    pub(super) fn won(&mut self, now: Instant) {
        if self.wary {
            self.next = now + self.backoff.low;
        } else {
            self.backoff.reset();
            self.wins += 1;
        }
    }

    /// A poll of the moment `sent` brought nothing that could be run. Returns the pause, or `None` where a
    /// poll that was under way beside it has said so already.
    pub(super) fn pause(&mut self, sent: Instant, now: Instant) -> Option<Duration> {
        self.alone();
        if sent < self.paused_at {
            return None;
        }
        self.paused_at = now;
        self.wait(now);
        Some(self.next() - now)
    }

    fn wait(&mut self, now: Instant) {
        self.next = now + self.backoff.next();
    }

    /// A lease ended. Say it before its slot is free: what follows shall not be taken too early.
    pub(super) fn ended(&mut self, lease_value: LeaseValue, now: Instant) {
        match lease_value {
            LeaseValue::Work => {
                self.wary = false;
                self.suspicious = false;
                self.backoff.reset();
            }
            LeaseValue::Failure if !self.suspicious => self.suspicious = true,
            // Several that end together are one misfortune.
            LeaseValue::Failure | LeaseValue::Nothing if self.wary && now < self.paused_until => {}
            LeaseValue::Failure | LeaseValue::Nothing => {
                self.wary = true;
                self.suspicious = true;
                self.alone();
                self.wait(now);
                self.paused_until = self.next;
            }
        }
    }

    /// The plane knows of an end: there may be more work now.
    pub(super) fn hasten(&mut self, now: Instant) {
        if !self.wary {
            self.backoff.reset();
            self.next = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pauses_grow_from_one_bound_to_the_other_and_may_meet_both() {
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
    fn equal_bounds_give_a_fixed_pause() {
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
                    "empty" => drop(pace.pause(now, now)),
                    "work" => pace.ended(LeaseValue::Work, now),
                    "failure" => pace.ended(LeaseValue::Failure, now),
                    "nothing" => pace.ended(LeaseValue::Nothing, now),
                    _ => {}
                }
                if !matches!(*event, "won" | "empty") {
                    pace.hasten(now);
                }
                (pace.next() - start).as_millis()
            })
            .collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn work_is_followed_by_a_poll_at_once_and_nothing_else_is() {
        check(&[(0, "won"), (5, "won"), (9, "work"), (10, "empty"), (50, "work")], &[0, 0, 9, 110, 50]);
        check(&[(0, "won"), (5, "nothing"), (6, "nothing"), (105, "won"), (110, "nothing")], &[0, 105, 105, 205, 210]);
        check(&[(0, "nothing"), (100, "won"), (150, "work"), (151, "won")], &[100, 200, 150, 150]);
    }

    #[test]
    fn one_failure_is_followed_by_a_poll_at_once_and_a_second_in_a_row_is_not() {
        check(&[(0, "won"), (5, "failure"), (6, "won"), (7, "work"), (8, "won"), (9, "failure")], &[0, 5, 5, 7, 7, 9]);
        check(&[(0, "failure"), (1, "won"), (2, "failure"), (102, "won"), (103, "failure")], &[0, 0, 102, 202, 203]);
        check(
            &[(0, "nothing"), (100, "won"), (101, "failure"), (201, "won"), (202, "work")],
            &[100, 200, 201, 301, 202],
        );
    }

    #[test]
    fn a_plane_that_asks_to_be_left_alone_is_not_polled_before_within_bounds() {
        for (high, asked, expected) in [(3, 7, 7), (3, 3600, 60), (300, 3600, 300)] {
            let start = Instant::now();
            let mut pace = Pace::new((100 * MS, high * 1000 * MS), start);
            pace.leave_alone(asked * 1000 * MS, start);
            assert_eq!(pace.pause(start, start), Some(expected * 1000 * MS));
            // Work that ends meanwhile does not change that.
            pace.ended(LeaseValue::Work, start + MS);
            pace.hasten(start + MS);
            assert_eq!(pace.next(), start + expected * 1000 * MS);
        }
    }

    #[test]
    fn leases_in_a_row_widen_the_polling_and_anything_else_narrows_it() {
        let start = Instant::now();
        let mut pace = Pace::new((100 * MS, 1600 * MS), start);
        let widths = |pace: &mut Pace, wins: usize| {
            let won = (0..wins).map(|_| {
                pace.won(start);
                pace.width()
            });
            won.collect::<Vec<_>>()
        };
        assert_eq!(pace.width(), 1);
        assert_eq!(widths(&mut pace, 10), [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]);
        pace.alone();
        assert_eq!(widths(&mut pace, 3), [1, 2, 3]);
        // Three polls that were under way together found nothing: one pause, not a third one.
        assert!(pace.pause(start, start + 5 * MS).is_some());
        let next = pace.next();
        assert_eq!((pace.pause(start, start + 6 * MS), pace.next()), (None, next));
        assert_eq!((pace.pause(start + 4 * MS, start + 7 * MS), pace.next()), (None, next));
        assert!(pace.pause(start + 300 * MS, start + 301 * MS).is_some());
        assert_eq!(widths(&mut pace, 3), [1, 2, 3]);
        pace.ended(LeaseValue::Nothing, start + 302 * MS);
        assert_eq!(widths(&mut pace, 3), [1, 1, 1], "after a lease that was good for nothing, one by one");
    }

    #[test]
    fn pauses_after_leases_that_end_at_once_grow_too() {
        let start = Instant::now();
        let mut pace = Pace::new((100 * MS, 1600 * MS), start);
        let mut now = start;
        let longest = (0..6).map(|_| {
            pace.won(now);
            pace.ended(LeaseValue::Nothing, now + MS);
            now = pace.next();
            pace.backoff.grown.as_millis()
        });
        assert_eq!(longest.collect::<Vec<_>>(), [200, 400, 800, 1600, 1600, 1600]);
    }
}
