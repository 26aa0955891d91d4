//! How often a runner asks whether it should stop.
//!
//! Some runners wait for a child process or a thread by asking in a loop without a pause. Answering
//! at once would let such a loop occupy a core that the work itself needs, so an answer of "no" that is
//! asked for again and again comes a little later.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Asks in a row that are answered at once, and then those between two waits.
const ROW: u32 = 1024;
/// Rows before the first wait: who asks a few thousand times and goes on to work is not held up.
const ROWS_FREE: u32 = 4;
/// A row that takes longer has work between its asks.
const ROW_TIME: Duration = Duration::from_millis(1);
/// How long the asker waits.
const WAIT: Duration = Duration::from_millis(1);

/// Counts the asks of one task.
#[derive(Default)]
pub(super) struct Asks {
    count: AtomicU32,
    /// Rows in a row without work between their asks.
    idle_rows: AtomicU32,
    /// When the row began, in nanoseconds since `START`.
    began: AtomicU64,
}

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

impl Asks {
    /// Notes an ask that is answered "no". Waits when nothing but asking goes on.
    pub(super) fn note(&self) {
        if self.wait_due(nanoseconds) {
            std::thread::sleep(WAIT);
            // The wait is none of the next row's time.
            self.began.store(nanoseconds(), Ordering::Relaxed);
        }
    }

    /// Whether the asker should wait. Asks for the time at the end of each row only.
    fn wait_due(&self, now: impl FnOnce() -> u64) -> bool {
        // Several threads may ask; that a row is then not exact harms nobody.
        let asked = self.count.fetch_add(1, Ordering::Relaxed);
        if asked % ROW != ROW - 1 {
            return false;
        }
        let now = now();
        let took = now.saturating_sub(self.began.swap(now, Ordering::Relaxed));
        if u128::from(took) > ROW_TIME.as_nanos() {
            self.idle_rows.store(0, Ordering::Relaxed);
            return false;
        }
        self.idle_rows.fetch_add(1, Ordering::Relaxed) >= ROWS_FREE
    }
}

fn nanoseconds() -> u64 {
    u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `count` asks wait when each takes `nanoseconds_each`.
    fn waits(count: u32, nanoseconds_each: u64) -> usize {
        let asks = Asks::default();
        (1..=count).filter(|ask| asks.wait_due(|| u64::from(*ask) * nanoseconds_each)).count()
    }

    #[test]
    fn asks_without_work_wait_after_each_row() {
        assert_eq!(waits(100 * ROW, 50), 100 - ROWS_FREE as usize);
    }

    #[test]
    fn first_rows_do_not_wait() {
        assert_eq!(waits(ROWS_FREE * ROW, 50), 0);
        assert_eq!(waits((ROWS_FREE + 1) * ROW, 50), 1);
    }

    #[test]
    fn asks_with_work_between_do_not_wait() {
        assert_eq!(waits(100 * ROW, 3_000), 0);
    }

    #[test]
    fn due_wait_takes_its_time() {
        // The row's end is never after its beginning, however busy the machine is.
        let asks = Asks {
            count: AtomicU32::new(ROW - 1),
            idle_rows: AtomicU32::new(ROWS_FREE),
            began: AtomicU64::new(u64::MAX),
        };
        let began = Instant::now();
        asks.note();
        assert!(began.elapsed() >= WAIT, "{:?}", began.elapsed());
    }
}
