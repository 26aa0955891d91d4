//! The signal that a task should stop, or has ended.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

/// One task's stop signal. Every clone of the task's context shares it.
#[derive(Default)]
pub(crate) struct StopSignal {
    stop: AtomicBool,
    over: AtomicBool,
    wake: Notify,
}

/// Wakes a thread that waits in [`StopSignal::wait_for`].
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
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

    /// Blocks until [`Self::is_set`], at most for `limit`. Returns [`Self::is_set`].
    pub(crate) fn wait_for(self: Arc<Self>, limit: Duration) -> bool {
        let (began, signal) = (Instant::now(), Arc::clone(&self));
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut set = pin!(self.wait());
        while set.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            let left = limit.saturating_sub(began.elapsed());
            if left.is_zero() {
                break;
            }
            thread::park_timeout(left);
        }
        signal.is_set()
    }

    /// Waits until [`Self::is_set`].
    pub(crate) async fn wait(self: Arc<Self>) {
        let wake = self.wake.notified();
        tokio::pin!(wake);
        // The waiter registers before it reads the flag. Thus it misses no signal in between.
        wake.as_mut().enable();
        if !self.is_set() {
            wake.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocked_thread_wakes_on_stop_or_timeout() {
        let signal = Arc::new(StopSignal::default());
        assert!(!Arc::clone(&signal).wait_for(Duration::from_millis(1)));
        let waiting = Arc::clone(&signal);
        let thread = thread::spawn(move || waiting.wait_for(Duration::MAX));
        signal.stop();
        assert!(thread.join().expect("the thread does not panic"));
        assert!(signal.wait_for(Duration::ZERO));
    }
}
