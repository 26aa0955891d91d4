//! Counts, for each task, the bytes that crossed the plugin boundary and were not released yet.
//!
//! A running task may hold the bytes it was given. Bytes that it holds after its end count against its plugin. They
//! stay in memory until the process ends, unless the plugin releases them late.

use std::sync::{
    Arc,
    atomic::{AtomicI64, AtomicU64, Ordering},
};

use tracing::warn;

/// The log warns about a plugin from this number of bytes on, and again each time the number has doubled.
pub(super) const WARNING_BYTES_MIN: u64 = 16 << 20;

/// The top bit of [`TaskBytes::held`]. When it is set, the task is over.
const OVER: u64 = 1 << 63;

/// Bytes that the ended tasks of one plugin still hold.
#[derive(Default)]
pub(super) struct Unreleased {
    // The value is signed, because a release may be counted before the end of its task.
    bytes: AtomicI64,
    /// Number of bytes at the last warning.
    warned: AtomicU64,
}

impl Unreleased {
    pub(super) fn bytes(&self) -> u64 {
        u64::try_from(self.bytes.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Whether there are enough new bytes for a warning.
    pub(super) fn is_notable(&self) -> bool {
        self.bytes() >= WARNING_BYTES_MIN.max(self.warned.load(Ordering::Relaxed).saturating_mul(2))
    }

    /// Logs a warning. It logs none if the bytes were released meanwhile or another thread has warned.
    pub(super) fn warn(&self, plugin: &str) {
        let (warned, bytes) = (self.warned.load(Ordering::Relaxed), self.bytes());
        let is_first = || self.warned.compare_exchange(warned, bytes, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if self.is_notable() && is_first() {
            warn!(event = "plugin.leaked", plugin, bytes, "plugin does not release bytes of ended tasks");
        }
    }

    #[allow(clippy::cast_possible_wrap, reason = "no process holds 2^63 bytes")]
    fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes as i64, Ordering::Relaxed);
    }

    #[allow(clippy::cast_possible_wrap, reason = "no process holds 2^63 bytes")]
    fn subtract(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes as i64, Ordering::Relaxed);
    }
}

/// Bytes that one task holds.
pub(super) struct TaskBytes {
    held: AtomicU64,
    plugin: Arc<Unreleased>,
}

impl TaskBytes {
    pub(super) fn new(plugin: Arc<Unreleased>) -> Arc<Self> {
        Arc::new(Self { held: AtomicU64::new(0), plugin })
    }

    /// Counts `bytes` until the returned value is dropped.
    pub(super) fn hold(self: &Arc<Self>, bytes: usize) -> Holding {
        let bytes = bytes as u64;
        if self.held.fetch_add(bytes, Ordering::AcqRel) & OVER != 0 {
            self.plugin.add(bytes);
        }
        Holding { task: Arc::clone(self), bytes }
    }

    /// Marks the task as over. Bytes that it still holds then count against its plugin.
    pub(super) fn end(&self) {
        let held = self.held.fetch_or(OVER, Ordering::AcqRel);
        if held & OVER == 0 {
            self.plugin.add(held);
        }
    }
}

/// Counts bytes as held until it is dropped.
pub(super) struct Holding {
    task: Arc<TaskBytes>,
    bytes: u64,
}

impl Drop for Holding {
    fn drop(&mut self) {
        if self.task.held.fetch_sub(self.bytes, Ordering::AcqRel) & OVER != 0 {
            self.task.plugin.subtract(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bytes_held_after_task_end_count() {
        let plugin = Arc::new(Unreleased::default());
        let task = TaskBytes::new(Arc::clone(&plugin));
        let (early, late) = (task.hold(5), task.hold(7));
        drop(early);
        assert_eq!(plugin.bytes(), 0);
        task.end();
        task.end();
        assert_eq!(plugin.bytes(), 7);
        let later = task.hold(100);
        assert_eq!(plugin.bytes(), 107);
        drop((late, later));
        assert_eq!(plugin.bytes(), 0);
    }

    #[test]
    fn warnings_come_again_when_the_bytes_double() {
        let plugin = Unreleased::default();
        for (bytes, notable) in [(WARNING_BYTES_MIN - 1, false), (1, true), (1, false), (WARNING_BYTES_MIN, true)] {
            plugin.add(bytes);
            assert_eq!(plugin.is_notable(), notable, "{}", plugin.bytes());
            plugin.warn("p");
        }
    }
}
