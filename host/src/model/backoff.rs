//! Pauses between retries.
//!
//! A [`Backoff`] returns how long to wait after failure number `n` in a row. It holds no state, no clock and no random
//! source. The caller counts the failures and passes the draw.

use std::time::Duration;

/// How a pause varies. Nodes that failed together then do not retry together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Jitter {
    /// From half of the pause to all of it.
    Half,
    /// One fifth in both directions. The longest pause may exceed the maximum by one fifth.
    Fifth,
    /// From this duration to the pause.
    From(Duration),
}

/// A pause that doubles with each failure in a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    jitter: Jitter,
}

impl Backoff {
    /// Pauses of `first`, then twice that, and so on, at most `max`, before jitter.
    #[must_use]
    pub const fn new(first: Duration, max: Duration, jitter: Jitter) -> Self {
        Self { first, max, jitter }
    }

    /// The pause after failure number `failures` in a row. Zero failures count as one. `draw` is in 0..=1.
    #[must_use]
    pub fn pause(&self, failures: u32, draw: f64) -> Duration {
        let grown = self.grown(failures);
        match self.jitter {
            Jitter::Half => grown.mul_f64(0.5 + 0.5 * draw),
            Jitter::Fifth => grown.mul_f64(0.8 + 0.4 * draw),
            Jitter::From(low) => low.min(grown) + grown.saturating_sub(low).mul_f64(draw),
        }
    }

    /// The pause before jitter.
    #[must_use]
    pub fn grown(&self, failures: u32) -> Duration {
        let factor = 1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
        self.first.saturating_mul(factor).min(self.max)
    }
}

/// The pause before the next try: the longer one of `own` and the pause in `Retry-After`.
///
/// All callers use this rule for `Retry-After`. A request for more than `limit` is cut to `limit`. The caller then
/// tries once more, and does not give up before.
#[must_use]
pub fn pause_asked(own: Duration, asked: Option<Duration>, limit: Duration) -> Duration {
    own.max(asked.unwrap_or_default().min(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[track_caller]
    fn check(first: u32, max: u32, jitter: Jitter, draw: f64, expected: [u128; 5]) {
        let backoff = Backoff::new(first * MS, max * MS, jitter);
        let pauses = [0, 1, 2, 3, u32::MAX].map(|failures| backoff.pause(failures, draw).as_millis());
        assert_eq!(pauses, expected, "{backoff:?}, draw {draw}");
    }

    #[test]
    fn pauses_double_up_to_the_maximum() {
        check(100, 350, Jitter::Half, 1.0, [100, 100, 200, 350, 350]);
        check(500, 350, Jitter::Half, 1.0, [350; 5]);
        check(0, 350, Jitter::Half, 1.0, [0; 5]);
        let endless = Backoff::new(Duration::MAX, Duration::MAX, Jitter::Half);
        assert_eq!(endless.grown(u32::MAX), Duration::MAX);
    }

    #[test]
    fn retry_after_extends_pause_up_to_limit() {
        let pause = |asked: Option<u32>| pause_asked(2 * MS, asked.map(|asked| asked * MS), 5 * MS).as_millis();
        assert_eq!([None, Some(0), Some(3), Some(300)].map(pause), [2, 2, 3, 5]);
    }

    #[test]
    fn jitter_stays_within_its_bounds() {
        check(100, 350, Jitter::Half, 0.0, [50, 50, 100, 175, 175]);
        check(100, 350, Jitter::Fifth, 0.0, [80, 80, 160, 280, 280]);
        check(100, 350, Jitter::Fifth, 1.0, [120, 120, 240, 420, 420]);
        check(100, 350, Jitter::From(50 * MS), 0.0, [50; 5]);
        check(100, 350, Jitter::From(50 * MS), 1.0, [100, 100, 200, 350, 350]);
        check(100, 100, Jitter::From(200 * MS), 0.5, [100; 5]);
    }
}
