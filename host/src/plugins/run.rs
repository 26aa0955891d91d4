//! Runs one task in a plugin, from the start to the completion.

use std::{
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use runner_sdk::abi::End;
use serde_json::Value;
use tokio::{runtime::Handle, sync::Semaphore};

use super::{
    Plugins,
    backend::TaskBackend,
    dispatch::Hanging,
    executor::{Executor, InProcess, Request},
    ffi::Published,
    instance::{Completion, Instance},
    load::Loaded,
    stuck::Faults,
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

/// The access to a task's data, and the runtime that moves the data.
pub(super) struct TaskData {
    pub(super) ports: Arc<dyn Ports>,
    pub(super) folder: Folder,
    pub(super) runtime: Handle,
}

/// A loaded plugin.
pub(super) struct Plugin {
    instance: Arc<Instance>,
    executor: Box<dyn Executor>,
    grant_token: bool,
    slots: Semaphore,
    slots_max: usize,
    shown: Mutex<Shown>,
    /// The task directory must exist when a task starts. The SDK creates it by itself.
    needs_folder: bool,
    _published: Arc<Published>,
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
    pub(super) fn new(loaded: Loaded, grant_token: bool, slots: usize) -> Self {
        let Loaded { instance, published, entries, number, rust } = loaded;
        Self {
            executor: Box::new(InProcess { instance: Arc::clone(&instance), entries, number }),
            instance,
            grant_token,
            slots: Semaphore::new(slots),
            slots_max: slots,
            shown: Mutex::default(),
            needs_folder: !rust,
            _published: published,
        }
    }

    /// Checks for hanging calls.
    pub(super) fn review(&self, events: &NodeEvents) -> Changes {
        let hanging = self.instance.dispatcher.hanging();
        self.instance.faults.check_flooded(self.instance.dispatcher.is_flooded());
        self.instance.faults.check_hanging(hanging, self.slots_max);
        let out_of_service = self.instance.faults.out_of_service().is_some();
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
        self.instance.dispatcher.hanging().calls
    }

    /// The reason why a thread for its calls cannot be created, if there is one.
    pub(super) fn no_thread(&self) -> Option<String> {
        self.instance.dispatcher.no_thread()
    }

    /// Tries again to create a thread after a failure.
    pub(super) fn retry_thread(&self) {
        self.instance.dispatcher.retry_thread();
    }

    pub(super) fn name(&self) -> Arc<str> {
        Arc::clone(&self.instance.name)
    }

    /// Begins the plugin's shutdown. The future waits until the shutdown ends.
    pub(super) fn shutdown(&self, deadline: Duration) -> impl Future<Output = ()> + use<> {
        self.executor.shutdown(deadline)
    }

    /// Changes the most verbose level that the plugin should send.
    pub(super) fn set_log_level(&self, level: u32) {
        self.executor.set_log_level(level);
    }

    /// Number of its calls that named a task which was over or never existed.
    pub(super) fn stale_calls(&self) -> u64 {
        self.instance.tasks.stale_calls()
    }

    /// Bytes that its ended tasks still hold.
    pub(super) fn unreleased_bytes(&self) -> u64 {
        self.instance.unreleased.bytes()
    }

    /// The faults of the plugin.
    pub(super) fn faults(&self) -> &Faults {
        &self.instance.faults
    }

    /// The reason why the plugin takes no work, if there is one. It is the outcome of a task leased for it.
    pub(super) fn refusal(&self) -> Option<Outcome> {
        let reason = self.instance.faults.out_of_service()?;
        let message = format!("plugin {} is out of service: {reason}", self.instance.name);
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
        let Some(dir) = folder.path.to_str().map(str::to_owned) else {
            let message = format!("task directory {}: its path is not UTF-8", folder.path.display());
            return Outcome::HostFault { message };
        };
        if self.needs_folder {
            let make = Arc::clone(&folder.make);
            let made = workers.spawn_blocking(move || make()).await;
            if let Err(message) = made.unwrap_or_else(|err| Err(err.to_string())) {
                return Outcome::Storage { message };
            }
        }
        let data = TaskData { ports, folder, runtime: workers };
        let backend = TaskBackend { held_lease: held_lease.clone(), data, grant_token: self.grant_token };
        let mut run = self.executor.start(Request { held_lease: held_lease.clone(), dir }, backend);
        let completion = tokio::select! {
            biased;
            ended = &mut run.ended => ended,
            _ = held_lease.cancel.cancelled() => {
                self.executor.cancel(run.task);
                match tokio::time::timeout(cancel_grace, &mut run.ended).await {
                    Ok(ended) => ended,
                    Err(_) => {
                        let leased = held_lease.lease.task().clone();
                        self.instance.faults.abandon(&self.instance.name, run.task, leased, cancel_grace, &events);
                        if self.instance.faults.out_of_service().is_some() {
                            // Tasks that wait for a slot must not wait forever.
                            self.slots.close();
                        }
                        drop(slot);
                        let reason = held_lease.cancel.reason();
                        return Outcome::of_cancel(reason.expect("the signal has its reason for good"));
                    }
                }
            }
        };
        drop(run);
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
}

fn outcome(held_lease: &HeldLease, completion: Completion) -> Outcome {
    let Completion { end, text, details } = completion;
    match held_lease.cancel.reason() {
        // A task that completed during a drain is reported as completed.
        Some(CancelReason::Drained) if end == End::OK => return Outcome::Completed,
        Some(reason) => return Outcome::of_cancel(reason),
        None => {}
    }
    let message = if text.trim().is_empty() { "the runner gave no reason".to_owned() } else { text };
    let details = || serde_json::from_str(&details).unwrap_or(Value::Null);
    match end {
        End::OK => Outcome::Completed,
        End::PANICKED => {
            let place = details()["place"].as_str().unwrap_or("unknown place").to_owned();
            Outcome::Panicked { message, place }
        }
        End::STORAGE => Outcome::Storage { message },
        _ => Outcome::Failed {
            message,
            retryable: end == End::RETRYABLE,
            invalid_input: end == End::INVALID_INPUT,
            details: details(),
        },
    }
}
