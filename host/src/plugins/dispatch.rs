//! The threads on which the host calls into a plugin.
//!
//! One thread leads: it makes the calls, in their order. Calls are meant to return at once. While one
//! does not and others wait behind it, a second thread watches, and takes the lead after [`PATIENCE`]. So a
//! plugin that blocks in a call blocks the thread of that call, neither its other tasks nor the host.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tracing::{error, warn};

use super::threads;
use crate::model::millis;

/// How long calls wait behind one that does not return. Each look of the watching thread costs a
/// wake-up, so it is long beside a call and short beside what a person notices.
const PATIENCE: Duration = Duration::from_millis(5);

/// How long a call may take before it is worth a warning. A busy machine alone can make a few
/// milliseconds of any call.
const SLOW: Duration = Duration::from_millis(50);

type Job = (&'static str, Box<dyn FnOnce() + Send>);

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
    patience: Duration,
    state: Mutex<State>,
    /// The lead waits here for calls.
    work: Condvar,
    /// The watching thread waits here for a lead that may need it.
    watch: Condvar,
}

struct State {
    // Unbounded, but every job answers a call or belongs to a task, and both are bounded.
    queue: VecDeque<Job>,
    open: bool,
    /// Which thread leads; one that comes back from a call and finds another number is done.
    lead: u64,
    /// The lead waits for work.
    idle: bool,
    /// How many calls were begun: a standstill shows here.
    begun: u64,
    watcher: Watcher,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Watcher {
    /// There is no such thread yet.
    Missing,
    /// It waits to be needed.
    Asleep,
    /// It looks at the queue every [`PATIENCE`].
    Awake,
}

impl Dispatcher {
    /// Starts the leading thread.
    pub(super) fn start(plugin: Arc<str>) -> std::io::Result<Self> {
        Self::with_patience(plugin, PATIENCE)
    }

    fn with_patience(plugin: Arc<str>, patience: Duration) -> std::io::Result<Self> {
        // The lead is as good as waiting: its first call needs no watch.
        let state =
            State { queue: VecDeque::new(), open: true, lead: 0, idle: true, begun: 0, watcher: Watcher::Missing };
        let shared = Arc::new(Shared {
            plugin,
            patience,
            state: Mutex::new(state),
            work: Condvar::new(),
            watch: Condvar::new(),
        });
        shared.thread(|shared| shared.lead(0))?;
        Ok(Self(Arc::new(Sender(shared))))
    }

    /// Runs `job` on the leading thread, after those before it.
    pub(super) fn run(&self, what: &'static str, job: impl FnOnce() + Send + 'static) {
        let shared = &self.0.0;
        let mut state = shared.state();
        state.queue.push_back((what, Box::new(job)));
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

    /// Not joined: a plugin that hangs must not keep the host from ending.
    fn thread(self: &Arc<Self>, role: impl FnOnce(Arc<Self>) + Send + 'static) -> std::io::Result<()> {
        let name: String = format!("plugin-{}", self.plugin).chars().take(15).collect();
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            threads::batch();
            role(shared);
        });
        thread.map(drop)
    }

    fn new_watcher(self: &Arc<Self>) {
        if let Err(err) = self.thread(|shared| shared.watch()) {
            // The next call behind a busy lead tries again.
            self.state().watcher = Watcher::Missing;
            error!(plugin = %self.plugin, error = %err, "no thread to watch over the plugin's calls");
        }
    }

    /// Makes calls until another thread has taken over or nobody is left to ask for any.
    fn lead(&self, own: u64) {
        let mut state = self.state();
        while state.lead == own {
            if let Some((what, job)) = state.queue.pop_front() {
                state.begun += 1;
                drop(state);
                self.call(what, job);
                state = self.state();
            } else if state.open {
                state.idle = true;
                let waits = |state: &mut State| state.idle && state.open && state.lead == own;
                state = self.work.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
            } else {
                return;
            }
        }
    }

    fn call(&self, what: &'static str, job: Box<dyn FnOnce() + Send>) {
        let began = Instant::now();
        job();
        let took = began.elapsed();
        if took > SLOW && what != "init" {
            warn!(plugin = %self.plugin, call = what, elapsed_ms = millis(took), "plugin was slow to return");
        }
    }

    /// Takes the lead, once it is needed.
    fn watch(self: Arc<Self>) {
        let mut state = self.state();
        loop {
            let seen = state.begun;
            drop(state);
            std::thread::sleep(self.patience);
            state = self.state();
            if state.begun != seen {
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
        // On a busy machine it may be that the lead has only not woken up yet. It must not wait on beside
        // this thread, and be woken in its place.
        self.work.notify_all();
        // The lead needs a watch in its turn.
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
    fn calls_are_made_in_their_order_on_one_thread() {
        let dispatcher = dispatcher();
        let (tell, told) = mpsc::channel();
        for number in 0..100 {
            let tell = tell.clone();
            dispatcher.run("start", move || tell.send((number, std::thread::current().id())).expect("listened to"));
        }
        let seen: Vec<_> = (0..100).map(|_| told.recv_timeout(LIMIT).expect("called")).collect();
        assert!(seen.iter().map(|(number, _)| *number).eq(0..100));
        assert!(seen.iter().all(|(_, thread)| *thread == seen[0].1), "no call blocked");
    }

    #[test]
    fn a_first_call_needs_no_watching_thread() {
        let dispatcher = dispatcher();
        let (tell, told) = mpsc::channel();
        dispatcher.run("init", move || tell.send(()).expect("listened to"));
        told.recv_timeout(LIMIT).expect("called");
        assert!(dispatcher.0.0.state().watcher == Watcher::Missing);
    }

    #[test]
    fn a_call_that_hangs_delays_the_others_but_for_a_moment() {
        let dispatcher = dispatcher();
        let (release, hanging) = mpsc::channel::<()>();
        let hanging = Arc::new(Mutex::new(hanging));
        for _ in 0..3 {
            let hanging = Arc::clone(&hanging);
            dispatcher.run("start", move || assert!(hanging.lock().expect("not poisoned").recv().is_err()));
        }
        let (tell, told) = mpsc::channel();
        dispatcher.run("cancel", move || tell.send(()).expect("listened to"));
        told.recv_timeout(LIMIT).expect("three calls hang, the fourth is made");
        drop(release);
    }

    #[test]
    fn a_lead_that_changes_all_the_time_loses_no_call() {
        let dispatcher = Dispatcher::with_patience("test".into(), Duration::ZERO).expect("a thread");
        let (tell, told) = mpsc::channel();
        for number in 0..5000 {
            let tell = tell.clone();
            dispatcher.run("start", move || tell.send(number).expect("listened to"));
            assert_eq!(told.recv_timeout(LIMIT), Ok(number));
        }
    }

    #[test]
    fn the_threads_end_with_their_last_user() {
        let dispatcher = dispatcher();
        let shared = Arc::downgrade(&dispatcher.0.0);
        let (release, hanging) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        dispatcher.run("start", move || assert!(hanging.recv().is_err()));
        dispatcher.run("cancel", move || tell.send(()).expect("listened to"));
        told.recv_timeout(LIMIT).expect("called beside the one that hangs");
        drop((dispatcher, release));
        let began = Instant::now();
        while shared.strong_count() > 0 {
            assert!(began.elapsed() < LIMIT, "{} threads are left", shared.strong_count());
            std::thread::yield_now();
        }
    }
}
