//! Where the first stretch of a run happens.
//!
//! Handing a run to the plugin's runtime wakes another thread, which costs more than many a run does
//! before its first wait. A runner whose latest run was quick up to there is therefore polled once on
//! the thread that starts it; the runtime gets what is left, if anything is. One that computes first
//! begins on the runtime, where it holds up nobody else's start.

use std::{
    future::Future,
    pin::Pin,
    sync::atomic::{AtomicBool, Ordering},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

/// What a first stretch may take to be called quick: some times what waking a thread costs.
const QUICK: Duration = Duration::from_micros(200);

/// How a runner's latest run began. Slow until one was seen.
#[derive(Default)]
pub(super) struct Pace {
    quick: AtomicBool,
}

/// Drives `run` to its end, on this thread up to its first wait if that is likely to come soon.
pub(super) fn drive(runtime: &Handle, pace: &'static Pace, run: impl Future<Output = ()> + Send + 'static) {
    let mut run = Box::pin(Run { begun: false, pace, run: Box::pin(run) });
    if pace.quick.load(Ordering::Relaxed) {
        let _inside = runtime.enter();
        // What it waits for may come before the runtime polls it again; that poll asks for everything anew.
        if run.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            return;
        }
    }
    runtime.spawn(run);
}

/// Measures the first poll.
struct Run<F> {
    begun: bool,
    pace: &'static Pace,
    run: Pin<Box<F>>,
}

impl<F: Future> Future for Run<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if self.begun {
            return self.run.as_mut().poll(cx);
        }
        self.begun = true;
        let began = Instant::now();
        let polled = self.run.as_mut().poll(cx);
        self.pace.quick.store(began.elapsed() < QUICK, Ordering::Relaxed);
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc,
        thread::{self, ThreadId},
    };

    use tokio::sync::oneshot;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn pace() -> &'static Pace {
        Box::leak(Box::default())
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
    }

    /// Runs once; the threads before and after its wait.
    fn once(runtime: &Handle, pace: &'static Pace, busy: Duration) -> (ThreadId, ThreadId) {
        let (tell, told) = mpsc::channel();
        let (go, wait) = oneshot::channel::<()>();
        let run = async move {
            let began = Instant::now();
            while began.elapsed() < busy {}
            let first = thread::current().id();
            let timer = tokio::time::sleep(Duration::ZERO);
            wait.await.expect("told to go on");
            timer.await;
            tell.send((first, thread::current().id())).expect("listened to");
        };
        drive(runtime, pace, run);
        go.send(()).expect("waited for");
        told.recv_timeout(LIMIT).expect("the run ends")
    }

    #[test]
    fn a_quick_runner_begins_where_it_is_started_and_goes_on_in_its_runtime() {
        let (runtime, pace, here) = (runtime(), pace(), thread::current().id());
        let (first, _) = once(runtime.handle(), pace, Duration::ZERO);
        assert_ne!(first, here, "nothing is known of it yet");
        // A machine with other work may make any stretch slow.
        let begun_here = (0..1000).find(|_| once(runtime.handle(), pace, Duration::ZERO).0 == here);
        assert!(begun_here.is_some());
        let mut after = (here, here);
        while after.0 == here {
            after = once(runtime.handle(), pace, QUICK);
            assert_ne!(after.1, here, "after its wait");
        }
        assert_ne!(once(runtime.handle(), pace, Duration::ZERO).0, here, "the latest one was slow");
    }

    // What the README promises to code that needs a task around it.
    #[test]
    fn a_first_stretch_has_no_task_around_it_and_a_yield_gives_it_one() {
        let (runtime, pace) = (runtime(), pace());
        pace.quick.store(true, Ordering::Relaxed);
        let (tell, told) = mpsc::channel();
        let run = async move {
            let first = tokio::task::try_id();
            tokio::task::yield_now().await;
            tell.send((first, tokio::task::try_id())).expect("listened to");
        };
        drive(runtime.handle(), pace, run);
        let (first, then) = told.recv_timeout(LIMIT).expect("the run ends");
        assert!(first.is_none() && then.is_some(), "{first:?}, then {then:?}");
    }

    #[test]
    fn a_quick_run_without_a_wait_is_over_when_it_is_started() {
        let (runtime, pace) = (runtime(), pace());
        pace.quick.store(true, Ordering::Relaxed);
        let (tell, told) = mpsc::channel();
        drive(runtime.handle(), pace, async move { tell.send(()).expect("listened to") });
        told.try_recv().expect("over");
    }
}
