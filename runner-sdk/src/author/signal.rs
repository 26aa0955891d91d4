//! Tells a task's context that the task should stop, or has ended.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::Notify;

/// One task's stop signal. Every clone of the task's context shares it.
#[derive(Default)]
pub(crate) struct StopSignal {
    stop: AtomicBool,
    over: AtomicBool,
    wake: Notify,
}

impl StopSignal {
    /// The task should stop.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake.notify_waiters();
    }

    /// The task has ended.
    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.stop();
    }

    /// Whether the task should stop or has ended.
    pub(crate) fn is_set(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Whether the task has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Waits until [`Self::is_set`].
    pub(crate) async fn wait(self: Arc<Self>) {
        let wake = self.wake.notified();
        tokio::pin!(wake);
        // Registered before the flag is read: a signal in between is not missed.
        wake.as_mut().enable();
        if !self.is_set() {
            wake.await;
        }
    }
}
