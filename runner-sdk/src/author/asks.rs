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
        // Several threads may ask; that a row is then not exact harms nobody.
        let asked = self.count.fetch_add(1, Ordering::Relaxed);
        if asked % ROW != ROW - 1 {
            return;
        }
        let now = nanoseconds();
        let took = now.saturating_sub(self.began.swap(now, Ordering::Relaxed));
        if u128::from(took) > ROW_TIME.as_nanos() {
            self.idle_rows.store(0, Ordering::Relaxed);
            return;
        }
        if self.idle_rows.fetch_add(1, Ordering::Relaxed) >= ROWS_FREE {
            std::thread::sleep(WAIT);
            // The wait is none of the next row's time.
            self.began.store(nanoseconds(), Ordering::Relaxed);
        }
    }
}

fn nanoseconds() -> u64 {
    u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_alone_is_slowed_down() {
        // On a busy machine some rows take their time; most of these hundred do not.
        let (noted, began) = (Asks::default(), Instant::now());
        (0..100 * ROW).for_each(|_| noted.note());
        assert!(began.elapsed() >= 10 * WAIT, "{:?}", began.elapsed());
    }

    #[test]
    fn a_few_thousand_asks_are_answered_at_once() {
        let noted = Asks::default();
        (0..ROW * ROWS_FREE).for_each(|_| noted.note());
        assert!(noted.idle_rows.load(Ordering::Relaxed) <= ROWS_FREE, "nobody has waited yet");
    }

    #[test]
    fn asks_with_work_between_them_are_not_held_up() {
        let noted = Asks::default();
        for _ in 0..8 * ROW {
            noted.note();
            let began = Instant::now();
            while began.elapsed() < Duration::from_micros(3) {
                std::hint::spin_loop();
            }
        }
        assert_eq!(noted.idle_rows.load(Ordering::Relaxed), 0);
    }
}
