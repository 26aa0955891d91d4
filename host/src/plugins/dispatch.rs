//! The threads on which the host calls into a plugin.
//!
//! One thread leads: it makes the calls in their order. A call should return at once. When a call does not return
//! and others wait, a second thread watches. After [`WATCH_INTERVAL`] it takes the lead. Thus a plugin that blocks in a
//! call blocks only the thread of that call. Its other tasks and the host go on. Calls that do not return are
//! counted. Each keeps its thread.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tracing::{error, warn};

use super::threads;
use crate::model::millis;

/// How long calls wait behind one that does not return. Each check of the watching thread costs a wake-up.
/// Therefore this is long compared with a call, and shorter than a delay a person notices.
const WATCH_INTERVAL: Duration = Duration::from_millis(5);

/// A call that takes longer than this is worth a warning. On a busy machine any call can take a few milliseconds.
const SLOW: Duration = Duration::from_millis(50);

/// Maximum number of calls that wait when an answer is added. A plugin that makes two calls in each answer would
/// otherwise fill the memory.
const WAITING_MAX: usize = 65_536;

/// Maximum number of calls that have not returned. Each keeps a thread, so later calls wait.
const HANGING_MAX: usize = 1024;

struct Job {
    entry: &'static str,
    run: Box<dyn FnOnce() + Send>,
    /// An answer or a release. The plugin decides how many there are.
    is_reply: bool,
}

/// Calls that have not returned for [`SLOW`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hanging {
    /// Number of calls.
    pub(super) calls: usize,
    /// Age of the oldest call.
    pub(super) longest: Duration,
    /// The entry that the oldest call is in.
    pub(super) entry: &'static str,
}

/// A call that has not returned.
struct Call {
    number: u64,
    entry: &'static str,
    since: Instant,
}

/// The sending side. The threads end when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Dispatcher(Arc<Sender>);

struct Sender(Arc<Shared>);

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.state().open = false;
        self.0.work.notify_all();
        self.0.watch.notify_all();
    }
}

struct Shared {
    plugin: Arc<str>,
    watch_interval: Duration,
    /// Stack size of each new thread in bytes, above 0. A test asks for more than the system has.
    #[cfg(test)]
    stack: std::sync::atomic::AtomicUsize,
    state: Mutex<State>,
    /// The leading thread waits here for calls.
    work: Condvar,
    /// The watching thread waits here until the leading thread may need it.
    watch: Condvar,
}

struct State {
    /// Answers and releases are bounded by [`WAITING_MAX`]. All other jobs belong to a task or to the node, and both
    /// are few.
    queue: VecDeque<Job>,
    /// Too many answers waited. The plugin gets no answer any more.
    flooded: bool,
    open: bool,
    /// Identifies the leading thread. A thread that returns from a call and finds another number ends.
    lead: u64,
    /// The leading thread waits for work.
    idle: bool,
    /// Number of calls that were begun. It shows whether the calls make progress.
    begun: u64,
    /// The calls that have not returned, the oldest first.
    calls: Vec<Call>,
    watcher: Watcher,
    /// The error of creating the watching thread, if one was needed and could not be created.
    no_thread: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Watcher {
    /// The thread does not exist yet.
    Missing,
    /// The thread waits until it is needed.
    Asleep,
    /// The thread checks the queue every [`WATCH_INTERVAL`].
    Awake,
}

impl Dispatcher {
    /// Starts the leading thread.
    pub(super) fn start(plugin: Arc<str>) -> std::io::Result<Self> {
        let dispatcher = Self::new(plugin, WATCH_INTERVAL);
        dispatcher.lead()?;
        Ok(dispatcher)
    }

    fn new(plugin: Arc<str>, watch_interval: Duration) -> Self {
        let state = State {
            queue: VecDeque::new(),
            flooded: false,
            open: true,
            lead: 0,
            // The leading thread counts as waiting. Its first call needs no watch.
            idle: true,
            begun: 0,
            calls: Vec::new(),
            watcher: Watcher::Missing,
            no_thread: None,
        };
        Self(Arc::new(Sender(Arc::new(Shared {
            plugin,
            watch_interval,
            #[cfg(test)]
            stack: Default::default(),
            state: Mutex::new(state),
            work: Condvar::new(),
            watch: Condvar::new(),
        }))))
    }

    fn lead(&self) -> std::io::Result<()> {
        self.0.0.thread(|shared| shared.lead(0))
    }

    /// The calls that hang now.
    pub(super) fn hanging(&self) -> Hanging {
        let state = self.0.0.state();
        // The usual case does not read the clock.
        let Some(oldest) = state.calls.first() else { return Hanging::default() };
        let now = Instant::now();
        let calls = state.calls.iter().take_while(|call| now.duration_since(call.since) > SLOW).count();
        match calls {
            0 => Hanging::default(),
            calls => Hanging { calls, longest: now.duration_since(oldest.since), entry: oldest.entry },
        }
    }

    /// The reason why a thread for the plugin's calls cannot be created, if there is one.
    pub(super) fn no_thread(&self) -> Option<String> {
        self.0.0.state().no_thread.clone()
    }

    /// Tries again to create a thread after a failure.
    pub(super) fn retry_thread(&self) {
        let shared = &self.0.0;
        let mut state = shared.state();
        if state.no_thread.is_some() && state.watcher == Watcher::Missing {
            state.watcher = Watcher::Awake;
            drop(state);
            shared.new_watcher();
        }
    }

    /// Whether the plugin caused more answers and releases than it took.
    pub(super) fn is_flooded(&self) -> bool {
        self.0.0.state().flooded
    }

    /// Like [`Dispatcher::run`], for answers and releases. When too many wait, this one, all that wait and all later
    /// ones are dropped. Thus the plugin's calls end.
    pub(super) fn offer(&self, entry: &'static str, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.0.state();
        if !state.flooded && state.queue.len() < WAITING_MAX {
            return self.push(state, Job { entry, run: Box::new(job), is_reply: true });
        }
        state.flooded = true;
        let (replies, others) = state.queue.drain(..).partition(|job| job.is_reply);
        state.queue = others;
        drop(state);
        // Outside the lock: an answer may hold anything.
        drop::<VecDeque<Job>>(replies);
    }

    /// Runs `job` on the leading thread, after the earlier jobs.
    pub(super) fn run(&self, entry: &'static str, job: impl FnOnce() + Send + 'static) {
        self.push(self.0.0.state(), Job { entry, run: Box::new(job), is_reply: false });
    }

    fn push(&self, mut state: MutexGuard<'_, State>, job: Job) {
        let shared = &self.0.0;
        state.queue.push_back(job);
        if state.idle {
            state.idle = false;
            drop(state);
            shared.work.notify_one();
            return;
        }
        match std::mem::replace(&mut state.watcher, Watcher::Awake) {
            Watcher::Awake => {}
            Watcher::Asleep => {
                drop(state);
                shared.watch.notify_one();
            }
            Watcher::Missing => {
                drop(state);
                shared.new_watcher();
            }
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread is not joined. A plugin that hangs must not prevent the end of the host.
    fn thread(self: &Arc<Self>, role: impl FnOnce(Arc<Self>) + Send + 'static) -> std::io::Result<()> {
        let name: String = format!("plugin-{}", self.plugin).chars().take(15).collect();
        let shared = Arc::clone(self);
        let builder = std::thread::Builder::new().name(name);
        #[cfg(test)]
        let builder = match self.stack.load(std::sync::atomic::Ordering::Relaxed) {
            0 => builder,
            stack => builder.stack_size(stack),
        };
        let thread = builder.spawn(move || {
            threads::batch();
            role(shared);
        });
        thread.map(drop)
    }

    fn new_watcher(self: &Arc<Self>) {
        let created = self.thread(|shared| shared.watch());
        let mut state = self.state();
        match created {
            Ok(()) => state.no_thread = None,
            Err(err) => {
                // The next call behind a busy leading thread tries again.
                state.watcher = Watcher::Missing;
                // Logged once, until a thread can be created again.
                if state.no_thread.replace(err.to_string()).is_none() {
                    drop(state);
                    error!(
                        event = "plugin.no_thread",
                        plugin = %self.plugin,
                        error = %err,
                        "cannot create a thread for the plugin's calls"
                    );
                }
            }
        }
    }

    /// Makes calls until another thread has taken the lead or no sender is left.
    fn lead(&self, own: u64) {
        let mut state = self.state();
        while state.lead == own {
            if let Some(Job { entry, run, .. }) = state.queue.pop_front() {
                state.begun += 1;
                let (number, since) = (state.begun, Instant::now());
                state.calls.push(Call { number, entry, since });
                drop(state);
                run();
                self.returned(entry, since);
                state = self.state();
                let at = state.calls.iter().position(|call| call.number == number);
                state.calls.remove(at.expect("only its own thread removes a call"));
            } else if state.open {
                state.idle = true;
                let waits = |state: &mut State| state.idle && state.open && state.lead == own;
                state = self.work.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
            } else {
                return;
            }
        }
    }

    fn returned(&self, what: &'static str, since: Instant) {
        let took = since.elapsed();
        if took > SLOW && what != "init" {
            warn!(event = "plugin.slow", plugin = %self.plugin, call = what, elapsed_ms = millis(took), "plugin call returned late");
        }
    }

    /// Takes the lead when it is needed.
    fn watch(self: Arc<Self>) {
        let mut state = self.state();
        loop {
            let seen = state.begun;
            drop(state);
            std::thread::sleep(self.watch_interval);
            state = self.state();
            if state.begun != seen || state.calls.len() >= HANGING_MAX {
                continue;
            }
            if !state.queue.is_empty() {
                break;
            }
            state.watcher = Watcher::Asleep;
            let asleep = |state: &mut State| state.watcher == Watcher::Asleep && state.open;
            state = self.watch.wait_while(state, asleep).unwrap_or_else(PoisonError::into_inner);
            if !state.open && state.queue.is_empty() {
                return;
            }
        }
        state.lead += 1;
        let own = state.lead;
        drop(state);
        // On a busy machine the old leading thread may only not have woken up yet. It must not go on waiting
        // together with this thread. It could be woken instead of this thread.
        self.work.notify_all();
        // The new leading thread also needs a watch.
        self.new_watcher();
        self.lead(own);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn dispatcher() -> Dispatcher {
        Dispatcher::start("test".into()).expect("a thread")
    }

    #[test]
    fn calls_run_in_order_on_one_thread() {
        let dispatcher = dispatcher();
        let (report_call, calls_made) = mpsc::channel();
        for number in 0..100 {
            let report_call = report_call.clone();
            dispatcher.run("start", move || {
                report_call.send((number, std::thread::current().id())).expect("the test listens")
            });
        }
        let seen: Vec<_> = (0..100).map(|_| calls_made.recv_timeout(LIMIT).expect("called")).collect();
        assert!(seen.iter().map(|(number, _)| *number).eq(0..100));
        assert!(seen.iter().all(|(_, thread)| *thread == seen[0].1), "no call blocked");
    }

    #[test]
    fn first_call_starts_no_watcher() {
        let dispatcher = dispatcher();
        let (report_call, calls_made) = mpsc::channel();
        dispatcher.run("init", move || report_call.send(()).expect("the test listens"));
        calls_made.recv_timeout(LIMIT).expect("called");
        assert!(dispatcher.0.0.state().watcher == Watcher::Missing);
    }

    #[test]
    fn hanging_call_does_not_block_later_calls() {
        let dispatcher = dispatcher();
        let (release, hanging) = mpsc::channel::<()>();
        let hanging = Arc::new(Mutex::new(hanging));
        for _ in 0..3 {
            let hanging = Arc::clone(&hanging);
            dispatcher.run("start", move || assert!(hanging.lock().expect("not poisoned").recv().is_err()));
        }
        let (report_call, calls_made) = mpsc::channel();
        dispatcher.run("cancel", move || report_call.send(()).expect("the test listens"));
        calls_made.recv_timeout(LIMIT).expect("three calls hang, the fourth is made");
        drop(release);
    }

    #[test]
    fn hanging_calls_are_counted() {
        let dispatcher = dispatcher();
        assert_eq!(dispatcher.hanging(), Hanging::default());
        let (release, hanging) = mpsc::channel::<()>();
        let hanging = Arc::new(Mutex::new(hanging));
        for _ in 0..3 {
            let hanging = Arc::clone(&hanging);
            dispatcher.run("start", move || assert!(hanging.lock().expect("not poisoned").recv().is_err()));
        }
        let until = |wanted: usize| {
            let began = Instant::now();
            while dispatcher.hanging().calls != wanted {
                assert!(began.elapsed() < LIMIT, "{:?}", dispatcher.hanging());
                std::thread::yield_now();
            }
        };
        until(3);
        let found = dispatcher.hanging();
        assert!(found.entry == "start" && found.longest > SLOW, "{found:?}");
        drop(release);
        until(0);
    }

    #[test]
    fn number_of_hanging_calls_is_bounded() {
        let dispatcher = Dispatcher::new("test".into(), Duration::ZERO);
        dispatcher.lead().expect("a thread");
        let (release, hanging) = mpsc::channel::<()>();
        let hanging = Arc::new(Mutex::new(hanging));
        let (report_call, calls_made) = mpsc::channel();
        for _ in 0..HANGING_MAX + 5 {
            let (hanging, report_call) = (Arc::clone(&hanging), report_call.clone());
            dispatcher.run("start", move || {
                report_call.send(()).expect("the test listens");
                assert!(hanging.lock().expect("not poisoned").recv().is_err());
            });
        }
        for _ in 0..HANGING_MAX {
            calls_made.recv_timeout(LIMIT).expect("called while others hang");
        }
        assert!(calls_made.recv_timeout(4 * SLOW).is_err(), "one more call has a thread");
        drop(release);
        for _ in 0..5 {
            calls_made.recv_timeout(LIMIT).expect("called after others have returned");
        }
    }

    #[test]
    fn flood_drops_answers_and_keeps_other_calls() {
        let dispatcher = dispatcher();
        let (report_call, calls_made) = mpsc::channel();
        let offer = |dispatcher: &Dispatcher| {
            let report_call = report_call.clone();
            dispatcher.offer("callback", move || report_call.send("answer").expect("the test listens"));
        };
        {
            // No thread makes calls while the queue fills.
            let mut state = dispatcher.0.0.state();
            state.lead += 1;
            state.idle = false;
            state.watcher = Watcher::Awake;
        }
        for _ in 0..WAITING_MAX - 1 {
            offer(&dispatcher);
        }
        let started = report_call.clone();
        dispatcher.run("start", move || started.send("start").expect("the test listens"));
        assert!(!dispatcher.is_flooded());
        offer(&dispatcher);
        offer(&dispatcher);
        assert!(dispatcher.is_flooded());
        let own = dispatcher.0.0.state().lead;
        dispatcher.0.0.thread(move |shared| shared.lead(own)).expect("a thread");
        assert_eq!(calls_made.recv_timeout(LIMIT), Ok("start"));
        drop((dispatcher, report_call));
        assert!(calls_made.recv_timeout(LIMIT).is_err(), "an answer came");
    }

    #[test]
    fn missing_thread_is_reported_until_created() {
        use std::sync::atomic::Ordering;
        let dispatcher = dispatcher();
        let (release, hanging) = mpsc::channel::<()>();
        dispatcher.run("start", move || assert!(hanging.recv().is_err()));
        // No system can map a stack of this size.
        dispatcher.0.0.stack.store(1 << 60, Ordering::Relaxed);
        let (report_call, calls_made) = mpsc::channel();
        // Waits until the leading thread is in its call.
        while dispatcher.0.0.state().calls.is_empty() {
            std::thread::yield_now();
        }
        dispatcher.run("cancel", move || report_call.send(()).expect("the test listens"));
        assert!(dispatcher.no_thread().is_some());
        dispatcher.retry_thread();
        assert!(dispatcher.no_thread().is_some(), "no thread exists yet");
        dispatcher.0.0.stack.store(0, Ordering::Relaxed);
        dispatcher.retry_thread();
        assert_eq!(dispatcher.no_thread(), None);
        calls_made.recv_timeout(LIMIT).expect("called on the new thread");
        drop(release);
    }

    #[test]
    fn changing_lead_loses_no_call() {
        let dispatcher = Dispatcher::new("test".into(), Duration::ZERO);
        dispatcher.lead().expect("a thread");
        let (report_call, calls_made) = mpsc::channel();
        for number in 0..5000 {
            let report_call = report_call.clone();
            dispatcher.run("start", move || report_call.send(number).expect("the test listens"));
            assert_eq!(calls_made.recv_timeout(LIMIT), Ok(number));
        }
    }

    #[test]
    fn threads_end_with_the_last_dispatcher() {
        let dispatcher = dispatcher();
        let shared = Arc::downgrade(&dispatcher.0.0);
        let (release, hanging) = mpsc::channel::<()>();
        let (report_call, calls_made) = mpsc::channel();
        dispatcher.run("start", move || assert!(hanging.recv().is_err()));
        dispatcher.run("cancel", move || report_call.send(()).expect("the test listens"));
        calls_made.recv_timeout(LIMIT).expect("called while another call hangs");
        drop((dispatcher, release));
        let began = Instant::now();
        while shared.strong_count() > 0 {
            assert!(began.elapsed() < LIMIT, "{} threads are left", shared.strong_count());
            std::thread::yield_now();
        }
    }
}
