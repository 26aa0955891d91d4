//! A value that a few callers wait for.
//!
//! It is made for values that are created and dropped with every task. tokio's watch channel does the same for many
//! concurrent waiters. It has eight waiter lists, which each task would create and each change would scan.

use std::{
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Watched<T> {
    value: Mutex<T>,
    changed: Notify,
}

impl<T> Watched<T> {
    pub(super) fn new(value: T) -> Self {
        Self { value: Mutex::new(value), changed: Notify::new() }
    }

    /// The current value. All other callers wait while the guard is held.
    pub(super) fn lock(&self) -> MutexGuard<'_, T> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the waiters if `change` returns that it changed the value. Returns what `change` returned.
    pub(super) fn change(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let changed = change(&mut self.lock());
        if changed {
            self.changed.notify_waiters();
        }
        changed
    }

    /// Waits until `check` returns a result.
    pub(super) async fn until<R>(&self, mut check: impl FnMut(&T) -> Option<R>) -> R {
        loop {
            // Registers before the check, so that no change between the two is missed.
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(found) = check(&self.lock()) {
                return found;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiter_wakes_only_on_real_changes() {
        let number = Watched::new(0);
        let mut checks = 0;
        let waiting = number.until(|now| {
            checks += 1;
            (*now == 3).then_some("three")
        });
        let changing = async {
            for next in 1..=3 {
                tokio::task::yield_now().await;
                assert!(!number.change(|_| false), "no waiter is woken");
                assert!(number.change(|now| std::mem::replace(now, next) != next));
            }
        };
        assert_eq!(tokio::join!(biased; waiting, changing).0, "three");
        assert_eq!(checks, 4, "once before it waited, once for each change");
    }

    #[tokio::test]
    async fn until_returns_immediately_if_condition_holds() {
        assert_eq!(Watched::new(7).until(|now| Some(*now)).await, 7);
    }
}
