//! Decides when to poll next.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::{Backoff, Jitter, pause_asked};

/// Longest `Retry-After` that is obeyed, unless the configured pauses are longer.
const ASKED_MAX: Duration = Duration::from_secs(60);
/// Shortest pause, whatever the bounds say. A plane without work is polled at most 100 times a second.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Most polls under way at once. Slots fill in few round trips to a distant plane. A plane without work does not
/// receive a poll for each slot.
const WIDTH_MAX: usize = 8;

/// The pauses between polls. Each pause is between the lower bound and the grown pause. Nodes that start together then
/// poll at different times. The bounds may come in either order.
fn pauses((a, b): (Duration, Duration)) -> (Duration, Duration, Backoff) {
    let (low, high) = (a.min(b).max(PAUSE_MIN), a.max(b).max(PAUSE_MIN));
    (low, high, Backoff::new((low * 2).min(high), high, Jitter::From(low)))
}

/// What an ended lease means for the next poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeaseValue {
    /// Its task was set up and ran. How it ended does not matter: a failed runner or a failed transfer belongs to
    /// this task only. Input data may be missing, or one domain server may be down. The control plane chooses which
    /// task comes next, so a pause would delay the tasks of all others. A full disk of the node stops polling
    /// elsewhere (`planes::next_poll`).
    Work,
    /// It was never set up, it was cancelled before it began, it was lost, or the node itself failed.
    Nothing,
}

/// Decides when to poll, and how many polls may be under way. After work, the next poll follows at once. After an
/// empty answer or a lease that could not be set up, the pauses grow. A control plane that gives such leases must not
/// be polled in a tight loop.
pub(super) struct Pace {
    backoff: Backoff,
    low: Duration,
    high: Duration,
    /// Number of pauses in a row.
    pauses: u32,
    next: Instant,
    /// No poll is sent before this instant, because the plane asked for a pause.
    not_before: Instant,
    /// When the last pause after a poll began. Polls that were under way then count as the same answer.
    paused_at: Instant,
    /// The end of the last pause after an unusable lease. Leases that end before it belong to the same failure.
    paused_until: Instant,
    /// Leases since the last poll without one.
    leases: usize,
    /// The last ended lease was unusable. The next leases are polled one at a time.
    wary: bool,
}

impl Pace {
    pub(super) fn new(bounds: (Duration, Duration), now: Instant) -> Self {
        let (low, high, backoff) = pauses(bounds);
        Self {
            backoff,
            low,
            high,
            pauses: 0,
            next: now,
            not_before: now,
            paused_at: now,
            paused_until: now,
            leases: 0,
            wary: false,
        }
    }

    /// How many polls may be under way. One without work. Each lease adds one.
    pub(super) fn width(&self) -> usize {
        if self.wary { 1 } else { self.leases.clamp(1, WIDTH_MAX) }
    }

    /// Only one poll may be under way next.
    pub(super) fn one_poll(&mut self) {
        self.leases = 0;
    }

    /// The earliest instant of the next poll.
    pub(super) fn next(&self) -> Instant {
        self.next.max(self.not_before)
    }

    /// The plane asks for no polls for the time `asked`.
    pub(super) fn pause_as_asked(&mut self, asked: Duration, now: Instant) {
        self.not_before = now + pause_asked(Duration::ZERO, Some(asked), self.high.max(ASKED_MAX));
    }

    /// A poll returned a lease.
    pub(super) fn leased(&mut self, now: Instant) {
        if self.wary {
            self.next = now + self.low;
        } else {
            self.pauses = 0;
            self.leases += 1;
        }
    }

    /// A poll sent at `sent` returned nothing that could run. Returns the pause. Returns `None` if a concurrent poll
    /// has started the pause already.
    pub(super) fn pause(&mut self, sent: Instant, now: Instant) -> Option<Duration> {
        self.one_poll();
        if sent < self.paused_at {
            return None;
        }
        self.paused_at = now;
        self.wait(now);
        Some(self.next() - now)
    }

    fn wait(&mut self, now: Instant) {
        self.pauses = self.pauses.saturating_add(1);
        self.next = now + self.backoff.pause(self.pauses, rand::random());
    }

    /// A lease ended. Call this before its slot is free. Otherwise the next poll may be sent too early.
    pub(super) fn ended(&mut self, lease_value: LeaseValue, now: Instant) {
        match lease_value {
            LeaseValue::Work => {
                self.wary = false;
                self.pauses = 0;
            }
            // Several leases that end together are one failure.
            LeaseValue::Nothing if self.wary && now < self.paused_until => {}
            LeaseValue::Nothing => {
                self.wary = true;
                self.one_poll();
                self.wait(now);
                self.paused_until = self.next;
            }
        }
    }

    /// The plane has learned that a task ended. It may have more work now.
    pub(super) fn poll_now(&mut self, now: Instant) {
        if !self.wary {
            self.pauses = 0;
            self.next = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pauses_grow_within_bounds_given_in_any_order() {
        for (a, b) in [(100, 3000), (3000, 100)] {
            let (low, _, backoff) = pauses((a * MS, b * MS));
            assert!((1..=6).all(|count| backoff.pause(count, 0.0) == low));
            let grown: Vec<_> = (1..=6).map(|count| backoff.pause(count, 1.0).as_millis()).collect();
            assert_eq!(grown, [200, 400, 800, 1600, 3000, 3000]);
        }
        let (_, _, backoff) = pauses((Duration::ZERO, 2 * MS));
        assert!(
            (1..20).all(|count| backoff.pause(count, 0.5) == PAUSE_MIN),
            "bounds of nothing are no licence to storm"
        );
    }

    #[test]
    fn equal_bounds_give_a_fixed_pause() {
        let (_, _, backoff) = pauses((50 * MS, 50 * MS));
        assert!((1..10).all(|count| backoff.pause(count, 0.5) == 50 * MS));
    }

    /// Events by millisecond, with pauses of 100 ms. `expected` lists the instants of the next poll.
    #[track_caller]
    fn check(events: &[(u32, &str)], expected: &[u128]) {
        let start = Instant::now();
        let mut pace = Pace::new((100 * MS, 100 * MS), start);
        let seen: Vec<u128> = events
            .iter()
            .map(|(at, event)| {
                let now = start + *at * MS;
                match *event {
                    "leased" => pace.leased(now),
                    "empty" => drop(pace.pause(now, now)),
                    "work" => pace.ended(LeaseValue::Work, now),
                    "nothing" => pace.ended(LeaseValue::Nothing, now),
                    _ => {}
                }
                if !matches!(*event, "leased" | "empty") {
                    pace.poll_now(now);
                }
                (pace.next() - start).as_millis()
            })
            .collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn only_finished_work_triggers_an_immediate_poll() {
        check(&[(0, "leased"), (5, "leased"), (9, "work"), (10, "empty"), (50, "work")], &[0, 0, 9, 110, 50]);
        check(
            &[(0, "leased"), (5, "nothing"), (6, "nothing"), (105, "leased"), (110, "nothing")],
            &[0, 105, 105, 205, 210],
        );
        check(&[(0, "nothing"), (100, "leased"), (150, "work"), (151, "leased")], &[100, 200, 150, 150]);
    }

    #[test]
    fn requested_poll_pause_is_obeyed_within_bounds() {
        for (high, asked, expected) in [(3, 7, 7), (3, 3600, 60), (300, 3600, 300)] {
            let start = Instant::now();
            let mut pace = Pace::new((100 * MS, high * 1000 * MS), start);
            pace.pause_as_asked(asked * 1000 * MS, start);
            assert_eq!(pace.pause(start, start), Some(expected * 1000 * MS));
            // Work that ends meanwhile does not change the pause.
            pace.ended(LeaseValue::Work, start + MS);
            pace.poll_now(start + MS);
            assert_eq!(pace.next(), start + expected * 1000 * MS);
        }
    }

    #[test]
    fn only_consecutive_leases_increase_parallel_polls() {
        let start = Instant::now();
        let mut pace = Pace::new((100 * MS, 1600 * MS), start);
        let widths = |pace: &mut Pace, leases: usize| {
            let leased = (0..leases).map(|_| {
                pace.leased(start);
                pace.width()
            });
            leased.collect::<Vec<_>>()
        };
        assert_eq!(pace.width(), 1);
        assert_eq!(widths(&mut pace, 10), [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]);
        pace.one_poll();
        assert_eq!(widths(&mut pace, 3), [1, 2, 3]);
        // Three concurrent polls found nothing: they cause one pause, not a third one.
        assert!(pace.pause(start, start + 5 * MS).is_some());
        let next = pace.next();
        assert_eq!((pace.pause(start, start + 6 * MS), pace.next()), (None, next));
        assert_eq!((pace.pause(start + 4 * MS, start + 7 * MS), pace.next()), (None, next));
        assert!(pace.pause(start + 300 * MS, start + 301 * MS).is_some());
        assert_eq!(widths(&mut pace, 3), [1, 2, 3]);
        pace.ended(LeaseValue::Nothing, start + 302 * MS);
        assert_eq!(widths(&mut pace, 3), [1, 1, 1], "after an unusable lease, one by one");
    }

    #[test]
    fn pauses_grow_after_leases_that_end_immediately() {
        let start = Instant::now();
        let mut pace = Pace::new((100 * MS, 1600 * MS), start);
        let mut now = start;
        let longest = (0..6).map(|_| {
            pace.leased(now);
            pace.ended(LeaseValue::Nothing, now + MS);
            now = pace.next();
            pace.backoff.grown(pace.pauses).as_millis()
        });
        assert_eq!(longest.collect::<Vec<_>>(), [200, 400, 800, 1600, 1600, 1600]);
    }
}
