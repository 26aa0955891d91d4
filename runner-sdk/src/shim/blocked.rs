//! Notices that nothing runs on a runtime although it has runs: they block all its workers.
//!
//! One future waits on the runtime. A thread wakes it up at intervals. If it does not run for [`INTERVALS`] of them, the
//! runs that are being polled block the workers. The thread exists while the runtime has runs, and a few seconds longer.
//! A run costs some atomic operations.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::Notify};

/// Time between two checks. Nothing is late because of it.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);
/// Checks without progress until the workers count as blocked. Intervals are counted, not the time: a process that was
/// stopped or starved for a while had no checks either.
const INTERVALS: u32 = 5;
/// Checks without a run until the thread ends. It outlives the gaps between the tasks of a busy node.
const IDLE_INTERVALS: u32 = 3;
/// Number of runs that can be named. A runtime polls one run per worker, and more only in `block_in_place`.
const POLLED_MAX: usize = 4;

/// Observes the runs of one runtime.
pub(super) struct Workers {
    /// Runs that began and did not end.
    runs: AtomicUsize,
    /// The thread exists.
    watched: AtomicBool,
    /// The runs that are being polled. 0 is a free place.
    polled: [AtomicU64; POLLED_MAX],
    /// Wakes up the future that waits on the runtime.
    ask: Notify,
    /// How often that future ran.
    answers: AtomicU64,
    interval: Duration,
    report: fn(&[u64]),
}

impl Workers {
    /// `report` is called once each time the workers are blocked, with the runs that block them. They may be none: then
    /// futures block them that the runs have spawned.
    pub(super) fn new(runtime: &Handle, interval: Duration, report: fn(&[u64])) -> Arc<Self> {
        let workers = Arc::new(Self {
            runs: AtomicUsize::new(0),
            watched: AtomicBool::new(false),
            polled: Default::default(),
            ask: Notify::new(),
            answers: AtomicU64::new(0),
            interval,
            report,
        });
        let waiting = Arc::clone(&workers);
        runtime.spawn(async move {
            loop {
                waiting.ask.notified().await;
                waiting.answers.fetch_add(1, Ordering::Relaxed);
            }
        });
        workers
    }

    /// Drives a run with this number, which is not 0.
    pub(super) async fn drive<F: Future>(self: Arc<Self>, run: u64, future: F) -> F::Output {
        let _counted = Counted::new(&self);
        let mut future = pin!(future);
        poll_fn(|cx| {
            let _polled = self.polled(run);
            future.as_mut().poll(cx)
        })
        .await
    }

    /// Marks a run as being polled.
    fn polled(&self, run: u64) -> Option<Polled<'_>> {
        let free = |place: &&AtomicU64| place.compare_exchange(0, run, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        self.polled.iter().find(free).map(Polled)
    }

    fn watch(self: &Arc<Self>) {
        if self.watched.load(Ordering::SeqCst) || self.watched.swap(true, Ordering::SeqCst) {
            return;
        }
        let workers = Arc::clone(self);
        let thread = std::thread::Builder::new().name("runner-watch".to_owned());
        if thread.spawn(move || workers.check_until_idle()).is_err() {
            // The next run tries again.
            self.watched.store(false, Ordering::SeqCst);
        }
    }

    fn check_until_idle(&self) {
        let (mut expected, mut silent, mut idle) = (self.answers.load(Ordering::Relaxed), 0, 0);
        loop {
            std::thread::sleep(self.interval);
            let has_runs = self.runs.load(Ordering::SeqCst) > 0;
            let answers = self.answers.load(Ordering::Relaxed);
            if answers >= expected {
                (expected, silent) = (answers + 1, 0);
                self.ask.notify_one();
            } else if has_runs {
                silent += 1;
                if silent == INTERVALS {
                    let polled = self.polled.iter().map(|place| place.load(Ordering::Relaxed));
                    (self.report)(&polled.filter(|run| *run != 0).collect::<Vec<_>>());
                }
            }
            idle = if has_runs { 0 } else { idle + 1 };
            if idle == IDLE_INTERVALS {
                self.watched.store(false, Ordering::SeqCst);
                // A run that began before this line relied on this thread, unless another run started a new one.
                if self.runs.load(Ordering::SeqCst) == 0 || self.watched.swap(true, Ordering::SeqCst) {
                    return;
                }
                idle = 0;
            }
        }
    }
}

/// Logs that these runs block all workers. Each line belongs to the task of the run.
pub(super) fn report(runs: &[u64]) {
    for run in runs {
        super::logging::task_span(*run).in_scope(|| {
            tracing::warn!(
                target: "runner_sdk",
                event = "runner.blocks_worker",
                "the run blocks a worker, and no worker of the plugin is free; long work belongs into spawn_blocking"
            );
        });
    }
    if runs.is_empty() {
        tracing::warn!(
            target: "runner_sdk",
            event = "runner.blocks_worker",
            "spawned futures block all workers of the plugin; long work belongs into spawn_blocking"
        );
    }
}

/// On drop, the place is free again.
struct Polled<'a>(&'a AtomicU64);

impl Drop for Polled<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

/// On drop, the run has ended.
struct Counted<'a>(&'a Workers);

impl<'a> Counted<'a> {
    fn new(workers: &'a Arc<Workers>) -> Self {
        workers.runs.fetch_add(1, Ordering::SeqCst);
        workers.watch();
        Self(workers)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.runs.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Mutex, mpsc},
        time::Instant,
    };

    use tokio::runtime::Runtime;

    use super::*;

    fn runtime() -> Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("a runtime")
    }

    fn workers(runtime: &Runtime, report: fn(&[u64])) -> Arc<Workers> {
        Workers::new(runtime.handle(), Duration::from_millis(5), report)
    }

    /// Starts a run that blocks its worker. Returns when it does. It ends when the sender is dropped.
    fn block(runtime: &Runtime, workers: &Arc<Workers>, run: u64) -> mpsc::Sender<()> {
        let (release, released) = mpsc::channel::<()>();
        let (begun, has_begun) = mpsc::channel();
        runtime.spawn(Arc::clone(workers).drive(run, async move {
            let _ = begun.send(());
            let _ = released.recv();
        }));
        has_begun.recv().expect("the run begins");
        release
    }

    fn wait_until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn runs_that_block_all_workers_are_reported_once() {
        static REPORTS: Mutex<Vec<Vec<u64>>> = Mutex::new(Vec::new());
        let runtime = runtime();
        let workers = workers(&runtime, |runs| REPORTS.lock().expect("no panic").push(runs.to_vec()));
        for round in 1..=2 {
            let releases = [block(&runtime, &workers, 7), block(&runtime, &workers, 8)];
            let other = runtime.spawn(Arc::clone(&workers).drive(9, async {}));
            wait_until("a report", || REPORTS.lock().expect("no panic").len() == round);
            drop(releases);
            runtime.block_on(other).expect("the waiting run ends");
            let answers = workers.answers.load(Ordering::Relaxed);
            wait_until("an answer", || workers.answers.load(Ordering::Relaxed) > answers);
        }
        let mut reports = REPORTS.lock().expect("no panic").clone();
        reports.iter_mut().for_each(|runs| runs.sort_unstable());
        assert_eq!(reports, [[7, 8], [7, 8]]);
    }

    #[test]
    fn one_free_worker_is_enough() {
        static REPORTED: AtomicBool = AtomicBool::new(false);
        let runtime = runtime();
        let workers = workers(&runtime, |_| REPORTED.store(true, Ordering::Relaxed));
        let _release = block(&runtime, &workers, 7);
        let waiting = runtime.spawn(Arc::clone(&workers).drive(8, std::future::pending::<()>()));
        let answers = u64::from(4 * INTERVALS);
        wait_until("the checks go on", || workers.answers.load(Ordering::Relaxed) > answers);
        assert!(!REPORTED.load(Ordering::Relaxed));
        waiting.abort();
    }

    #[test]
    fn thread_ends_without_runs_and_begins_again() {
        let runtime = runtime();
        let workers = workers(&runtime, |_| {});
        for _ in 0..3 {
            runtime.block_on(Arc::clone(&workers).drive(1, async {}));
            assert!(workers.watched.load(Ordering::SeqCst), "a run has a thread that checks");
            wait_until("the thread ends", || !workers.watched.load(Ordering::SeqCst));
        }
    }
}
