//! Runs one task in a plugin, from its start to its one completion.

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
use tracing::{info, warn};

use super::{
    Plugins,
    dispatch::{Dispatcher, Hanging},
    ffi::{self, Completion, Entries},
    held_bytes::{TaskBytes, Unreleased},
    load::Loaded,
    stuck::{self, Record},
};
use crate::model::{CancelReason, HeldLease, Outcome, Ports, SetupStage, millis};

/// How long a call may take before the log warns that it hangs.
const HANGS: Duration = Duration::from_secs(1);
/// How often that warning is repeated while no more calls hang.
const HANGS_AGAIN: Duration = Duration::from_secs(60);

/// One task to run.
pub struct Job {
    /// What was leased.
    pub grant: HeldLease,
    /// Its inputs and outputs.
    pub ports: Arc<dyn Ports>,
    /// Its directory.
    pub folder: Folder,
    /// Where its calls are worked on.
    pub workers: Handle,
    /// How long a cancelled runner may take to return before its slot is given back.
    pub cancel_grace: Duration,
    /// Called when the plugin has room and the runner begins.
    pub began: Box<dyn FnOnce() + Send>,
}

/// A directory that is made when it is first needed.
#[derive(Clone)]
pub struct Folder {
    /// Where it is or would be.
    pub path: PathBuf,
    /// Makes it unless it is there; the error is one line. May block.
    pub make: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
}

/// What a plugin is told when a task starts.
#[derive(Serialize)]
struct Request<'a> {
    capability: &'a str,
    dir: &'a Path,
    lease: &'a RawValue,
}

impl Request<'_> {
    /// As JSON.
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
    record: Record,
    shown: Mutex<Shown>,
    unreleased: Arc<Unreleased>,
    /// Its tasks' directories must be there when they start; our SDK makes them by itself.
    needs_folder: bool,
}

/// What the status page was told about a plugin, and the log about its calls that hang.
#[derive(Default)]
struct Shown {
    strikes: u32,
    out_of_service: bool,
    hanging: usize,
    no_thread: bool,
    /// How many calls hung at the last warning, and when that was.
    warned: Option<(usize, Instant)>,
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
            record: Record::default(),
            unreleased: Arc::default(),
            shown: Mutex::default(),
            needs_folder: !rust,
        }
    }

    /// Looks at calls that hang. Whether anything the status page shows has changed.
    pub(super) fn review(&self) -> bool {
        let hanging = self.dispatcher.hanging();
        self.record.judge(&self.name, hanging, self.slots_max);
        let out_of_service = self.record.out_of_service().is_some();
        if out_of_service {
            self.slots.close();
        }
        let now = (self.record.strikes(), out_of_service, hanging.calls, self.no_thread().is_some());
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        self.warn(&mut shown.warned, hanging);
        let before = (shown.strikes, shown.out_of_service, shown.hanging, shown.no_thread);
        (shown.strikes, shown.out_of_service, shown.hanging, shown.no_thread) = now;
        now != before
    }

    /// Warns of calls that hang: when there are more of them, and from time to time.
    fn warn(&self, warned: &mut Option<(usize, Instant)>, hanging: Hanging) {
        let Hanging { calls, longest, entry } = hanging;
        if longest < HANGS {
            if warned.take().is_some() {
                info!(event = "plugin.calls_returned", plugin = %self.name, "calls into the plugin have returned");
            }
            return;
        }
        let now = Instant::now();
        if warned.is_none_or(|(before, at)| calls >= 2 * before || now - at > HANGS_AGAIN) {
            *warned = Some((calls, now));
            let longest_ms = millis(longest);
            warn!(event = "plugin.calls_hang", plugin = %self.name, calls, call = entry, longest_ms, "calls into the plugin do not return");
        }
    }

    /// Calls into it that hang now.
    pub(super) fn hanging_calls(&self) -> usize {
        self.dispatcher.hanging().calls
    }

    /// Why a thread for its calls cannot be created, if so.
    pub(super) fn no_thread(&self) -> Option<String> {
        self.dispatcher.no_thread()
    }

    /// Tries again to create a thread that could not be created.
    pub(super) fn retry_thread(&self) {
        self.dispatcher.retry_thread();
    }

    pub(super) fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    /// Begins the plugin's shutdown; the future waits for its end.
    pub(super) fn shutdown(&self, deadline: Duration) -> impl Future<Output = ()> + use<> {
        let (tell, done) = oneshot::channel();
        let entries = self.entries;
        self.dispatcher.run("shutdown", move || {
            entries.shutdown(deadline);
            // Nobody waits after the deadline.
            let _ = tell.send(());
        });
        async move {
            // An error is an answer too: the thread is gone.
            let _ = done.await;
        }
    }

    /// What its ended tasks still hold.
    pub(super) fn unreleased_bytes(&self) -> u64 {
        self.unreleased.bytes()
    }

    /// What is held against it.
    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Why it takes no work, if so: the end of a task leased for it.
    pub(super) fn refusal(&self) -> Option<Outcome> {
        let reason = self.record.out_of_service()?;
        let message = format!("plugin {} is out of service: {reason}", self.name);
        Some(Outcome::Setup { stage: SetupStage::StartSession, message })
    }

    async fn run(&self, job: Job) -> Outcome {
        let Job { grant, ports, folder, workers, cancel_grace, began } = job;
        let slot = tokio::select! {
            slot = self.slots.acquire() => slot,
            reason = grant.cancel.cancelled() => return Outcome::of_cancel(reason),
        };
        let Ok(slot) = slot else {
            return self.refusal().expect("slots are closed when the plugin goes out of service");
        };
        began();
        let request =
            Request { capability: grant.lease.capability.as_str(), dir: &folder.path, lease: &grant.lease.document };
        let request = match request.text() {
            Ok(request) => request,
            // A folder whose name is no text: JSON cannot hold it.
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
        let place = ffi::Place { ports, folder, runtime: workers };
        let bytes = TaskBytes::new(Arc::clone(&self.unreleased));
        let (entered, mut ended) =
            ffi::enter(Arc::clone(&self.name), self.dispatcher.clone(), self.grant_token, grant.clone(), place, bytes);
        let (entries, task) = (self.entries, entered.task);
        self.dispatcher.run("start", move || entries.start(task, &request));
        let completion = tokio::select! {
            biased;
            ended = &mut ended => ended,
            _ = grant.cancel.cancelled() => {
                self.dispatcher.run("cancel", move || entries.cancel(task));
                match tokio::time::timeout(cancel_grace, ended).await {
                    Ok(ended) => ended,
                    Err(_) => {
                        self.record.give_up(&self.name, task, grant.lease.task().clone(), cancel_grace);
                        if self.record.out_of_service().is_some() {
                            // What waits for a slot must not wait for ever.
                            self.slots.close();
                        }
                        drop(slot);
                        return Outcome::of_cancel(grant.cancel.reason().unwrap_or(CancelReason::Operator));
                    }
                }
            }
        };
        drop(entered);
        match completion {
            Ok(completion) => outcome(&grant, completion),
            Err(_) => Outcome::HostFault { message: "the plugin's task ended without a completion".to_owned() },
        }
    }
}

impl Plugins {
    /// Runs one task in the plugin that serves its capability. Returns within the grace period of a
    /// cancellation, whatever the runner does.
    pub async fn run(&self, job: Job) -> Outcome {
        match self.plugin(&job.grant.lease.capability) {
            Some(plugin) => {
                let outcome = plugin.run(job).await;
                if plugin.review() {
                    self.show();
                }
                outcome
            }
            None => Outcome::NoRunner,
        }
    }

    /// Runners that ignored their cancellation, since the process began.
    #[must_use]
    pub fn stuck_runners() -> u64 {
        stuck::total()
    }
}

fn outcome(grant: &HeldLease, completion: Completion) -> Outcome {
    let Completion { status, text, details } = completion;
    match grant.cancel.reason() {
        // Work that was finished in spite of a drain is worth reporting.
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
