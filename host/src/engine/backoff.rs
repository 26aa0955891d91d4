//! How long to wait between empty polls.

use std::time::Duration;

/// A pause that doubles from the lower bound to the upper one, with jitter: each pause lies anywhere
/// between the lower bound and the grown one, so that nodes which start together drift apart.
pub(super) struct Backoff {
    low: Duration,
    high: Duration,
    grown: Duration,
}

impl Backoff {
    pub(super) fn new(low: Duration, high: Duration) -> Self {
        Self { low, high: high.max(low), grown: low }
    }

    /// There was work: start over.
    pub(super) fn reset(&mut self) {
        self.grown = self.low;
    }

    /// The next pause.
    pub(super) fn next(&mut self) -> Duration {
        // A lower bound of zero would never grow.
        self.grown = (self.grown.max(Duration::from_millis(1)) * 2).min(self.high).max(self.low);
        let spread = self.grown - self.low;
        self.low + spread.mul_f64(rand::random::<f64>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s0_31_pauses_stay_in_bounds_and_grow() {
        let (low, high) = (Duration::from_millis(100), Duration::from_secs(3));
        let mut backoff = Backoff::new(low, high);
        let pauses: Vec<Duration> = (0..200).map(|_| backoff.next()).collect();
        assert!(pauses.iter().all(|pause| (low..=high).contains(pause)));
        assert!(pauses[0] <= Duration::from_millis(200));
        assert!(pauses.iter().any(|pause| *pause > Duration::from_secs(2)), "the upper part is used");
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(200));
    }

    #[test]
    fn s0_31_equal_bounds_give_a_fixed_pause() {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_millis(50));
        assert!((0..10).all(|_| backoff.next() == Duration::from_millis(50)));
    }
}
