//! Runs one task in a plugin, from the start to the completion.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use runner_sdk::abi::Status;
use serde::Serialize;
use serde_json::{Value, value::RawValue};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
};

use super::{
    Plugins,
    dispatch::{Dispatcher, Hanging},
    ffi::{self, Completion, Entries},
    held_bytes::{TaskBytes, Unreleased},
    load::Loaded,
    stuck::{self, Faults},
};
use crate::{
    model::{CancelReason, HeldLease, Outcome, Ports, SetupStage},
    node_event::{NodeEvent, NodeEvents},
};

/// An event reports a call that takes longer than this.
const HANG_WARNING_AFTER: Duration = Duration::from_secs(1);
/// Interval at which the event is repeated while the number of hanging calls does not grow.
const HANG_WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// One task to run.
pub struct Job {
    /// The lease.
    pub held_lease: HeldLease,
    /// The inputs and outputs of the task.
    pub ports: Arc<dyn Ports>,
    /// The directory of the task.
    pub folder: Folder,
    /// The runtime that handles the calls of the task.
    pub workers: Handle,
    /// Time a cancelled runner has to return before the host releases its slot.
    pub cancel_grace: Duration,
    /// Called when the plugin has a free slot and the runner begins.
    pub began: Box<dyn FnOnce() + Send>,
    /// Receives the faults of the plugin.
    pub events: NodeEvents,
}

/// A directory that is created on first use.
#[derive(Clone)]
pub struct Folder {
    /// The path of the directory. It may not exist yet.
    pub path: PathBuf,
    /// Creates the directory unless it exists. The error is one line. The call may block.
    pub make: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
}

/// The start request of a task for the plugin.
#[derive(Serialize)]
struct Request<'a> {
    capability: &'a str,
    dir: &'a Path,
    lease: &'a RawValue,
}

impl Request<'_> {
    /// The request as JSON.
    fn text(&self) -> serde_json::Result<String> {
        let bytes = self.lease.get().len() + 2 * self.dir.as_os_str().len() + self.capability.len() + 64;
        let mut text = Vec::with_capacity(bytes);
        serde_json::to_writer(&mut text, self)?;
        Ok(String::from_utf8(text).expect("JSON is text"))
    }
}

/// A loaded plugin.
pub(super) struct Plugin {
    name: Arc<str>,
    dispatcher: Dispatcher,
    entries: Entries,
    grant_token: bool,
    slots: Semaphore,
    slots_max: usize,
    faults: Faults,
    shown: Mutex<Shown>,
    unreleased: Arc<Unreleased>,
    /// The task directory must exist when a task starts. The SDK creates it by itself.
    needs_folder: bool,
}

/// What the last review of the plugin found.
#[derive(Default)]
struct Shown {
    out_of_service: bool,
    no_thread: bool,
    /// How many calls hung at the last event about them, and the time of that event.
    hanging: Option<(usize, Instant)>,
}

/// What has changed since the last review of a plugin.
pub(super) struct Changes {
    /// It went out of service.
    pub(super) out_of_service: bool,
    /// A thread for its calls cannot be created, or can be created again.
    pub(super) no_thread: bool,
}

impl Plugin {
    pub(super) fn new(name: &str, loaded: Loaded, grant_token: bool, slots: usize) -> Self {
        let Loaded { dispatcher, entries, rust } = loaded;
        Self {
            name: name.into(),
            dispatcher,
            entries,
            grant_token,
            slots: Semaphore::new(slots),
            slots_max: slots,
            faults: Faults::default(),
            unreleased: Arc::default(),
            shown: Mutex::default(),
            needs_folder: !rust,
        }
    }

    /// Checks for hanging calls.
    pub(super) fn review(&self, events: &NodeEvents) -> Changes {
        let hanging = self.dispatcher.hanging();
        self.faults.check_hanging(hanging, self.slots_max);
        let out_of_service = self.faults.out_of_service().is_some();
        if out_of_service {
            self.slots.close();
        }
        let no_thread = self.no_thread().is_some();
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        self.show_hanging(&mut shown.hanging, hanging, events);
        Changes {
            out_of_service: std::mem::replace(&mut shown.out_of_service, out_of_service) != out_of_service,
            no_thread: std::mem::replace(&mut shown.no_thread, no_thread) != no_thread,
        }
    }

    /// Emits an event about hanging calls when their number grows, and at intervals.
    fn show_hanging(&self, shown: &mut Option<(usize, Instant)>, hanging: Hanging, events: &NodeEvents) {
        let Hanging { calls, longest, entry: call } = hanging;
        if longest < HANG_WARNING_AFTER {
            if shown.take().is_some() {
                events.emit(NodeEvent::PluginCallsReturned { plugin: self.name() });
            }
            return;
        }
        let now = Instant::now();
        if shown.is_none_or(|(before, at)| calls >= 2 * before || now - at > HANG_WARNING_INTERVAL) {
            *shown = Some((calls, now));
            events.emit(NodeEvent::PluginCallsHang { plugin: self.name(), calls, call, longest });
        }
    }

    /// Number of calls into the plugin that hang now.
    pub(super) fn hanging_calls(&self) -> usize {
        self.dispatcher.hanging().calls
    }

    /// The reason why a thread for its calls cannot be created, if there is one.
    pub(super) fn no_thread(&self) -> Option<String> {
        self.dispatcher.no_thread()
    }

    /// Tries again to create a thread after a failure.
    pub(super) fn retry_thread(&self) {
        self.dispatcher.retry_thread();
    }

    pub(super) fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    /// Begins the plugin's shutdown. The future waits until the shutdown ends.
    pub(super) fn shutdown(&self, deadline: Duration) -> impl Future<Output = ()> + use<> {
        let (ended, done) = oneshot::channel();
        let entries = self.entries;
        self.dispatcher.run("shutdown", move || {
            entries.shutdown(deadline);
            // The receiver is gone after the deadline.
            let _ = ended.send(());
        });
        async move {
            // An error means that the thread has ended. That also ends the wait.
            let _ = done.await;
        }
    }

    /// Bytes that its ended tasks still hold.
    pub(super) fn unreleased_bytes(&self) -> u64 {
        self.unreleased.bytes()
    }

    /// The faults of the plugin.
    pub(super) fn faults(&self) -> &Faults {
        &self.faults
    }

    /// The reason why the plugin takes no work, if there is one. It is the outcome of a task leased for it.
    pub(super) fn refusal(&self) -> Option<Outcome> {
        let reason = self.faults.out_of_service()?;
        let message = format!("plugin {} is out of service: {reason}", self.name);
        Some(Outcome::Setup { stage: SetupStage::StartSession, message })
    }

    async fn run(&self, job: Job) -> Outcome {
        let Job { held_lease, ports, folder, workers, cancel_grace, began, events } = job;
        let slot = tokio::select! {
            slot = self.slots.acquire() => slot,
            reason = held_lease.cancel.cancelled() => return Outcome::of_cancel(reason),
        };
        let Ok(slot) = slot else {
            return self.refusal().expect("slots are closed when the plugin goes out of service");
        };
        began();
        let request = Request {
            capability: held_lease.lease.capability.as_str(),
            dir: &folder.path,
            lease: &held_lease.lease.document,
        };
        let request = match request.text() {
            Ok(request) => request,
            // The folder's name is not valid text, so JSON cannot hold it.
            Err(err) => {
                return Outcome::HostFault { message: format!("task directory {}: {err}", folder.path.display()) };
            }
        };
        if self.needs_folder {
            let make = Arc::clone(&folder.make);
            let made = workers.spawn_blocking(move || make()).await;
            if let Err(message) = made.unwrap_or_else(|err| Err(err.to_string())) {
                return Outcome::Storage { message };
            }
        }
        let data = ffi::TaskData { ports, folder, runtime: workers };
        let bytes = TaskBytes::new(Arc::clone(&self.unreleased));
        let (entered, mut ended) = ffi::enter(
            Arc::clone(&self.name),
            self.dispatcher.clone(),
            self.grant_token,
            held_lease.clone(),
            data,
            bytes,
        );
        let (entries, task) = (self.entries, entered.task);
        self.dispatcher.run("start", move || entries.start(task, &request));
        let completion = tokio::select! {
            biased;
            ended = &mut ended => ended,
            _ = held_lease.cancel.cancelled() => {
                self.dispatcher.run("cancel", move || entries.cancel(task));
                match tokio::time::timeout(cancel_grace, ended).await {
                    Ok(ended) => ended,
                    Err(_) => {
                        let leased = held_lease.lease.task().clone();
                        self.faults.abandon(&self.name, task, leased, cancel_grace, &events);
                        if self.faults.out_of_service().is_some() {
                            // Tasks that wait for a slot must not wait forever.
                            self.slots.close();
                        }
                        drop(slot);
                        return Outcome::of_cancel(held_lease.cancel.reason().unwrap_or(CancelReason::Operator));
                    }
                }
            }
        };
        drop(entered);
        match completion {
            Ok(completion) => outcome(&held_lease, completion),
            Err(_) => Outcome::HostFault { message: "the plugin's task ended without a completion".to_owned() },
        }
    }
}

impl Plugins {
    /// Runs one task in the plugin that serves its capability. After a cancellation it returns within the grace
    /// period, whatever the runner does.
    pub async fn run(&self, job: Job) -> Outcome {
        match self.plugin(&job.held_lease.lease.capability) {
            Some(plugin) => {
                let events = job.events.clone();
                let outcome = plugin.run(job).await;
                self.review(plugin, &events);
                outcome
            }
            None => Outcome::NoRunner,
        }
    }

    /// Number of runners that ignored their cancellation since the process began.
    #[must_use]
    pub fn stuck_runners() -> u64 {
        stuck::total()
    }
}

fn outcome(held_lease: &HeldLease, completion: Completion) -> Outcome {
    let Completion { status, text, details } = completion;
    match held_lease.cancel.reason() {
        // A task that completed during a drain is reported as completed.
        Some(CancelReason::Drained) if status == Status::OK => return Outcome::Completed,
        Some(reason) => return Outcome::of_cancel(reason),
        None => {}
    }
    let message = if text.trim().is_empty() { "the runner gave no reason".to_owned() } else { text };
    let details = || serde_json::from_str(&details).unwrap_or(Value::Null);
    match status {
        Status::OK => Outcome::Completed,
        Status::PANICKED => {
            let place = details()["place"].as_str().unwrap_or("unknown place").to_owned();
            Outcome::Panicked { message, place }
        }
        Status::STORAGE => Outcome::Storage { message },
        _ => Outcome::Failed {
            message,
            retryable: status == Status::RETRYABLE,
            invalid_input: status == Status::INVALID_INPUT,
            details: details(),
        },
    }
}
