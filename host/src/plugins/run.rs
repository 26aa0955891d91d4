//! Runs one task in a plugin, from its start to its one completion.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
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
    dispatch::Dispatcher,
    ffi::{self, Completion, Entries},
    load::Loaded,
    stuck::{self, Record},
};
use crate::model::{CancelReason, HeldLease, Outcome, Ports, SetupStage};

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
    record: Record,
    /// Its tasks' directories must be there when they start; our SDK makes them by itself.
    needs_folder: bool,
}

impl Plugin {
    pub(super) fn new(name: &str, loaded: Loaded, grant_token: bool, slots: Semaphore) -> Self {
        let Loaded { dispatcher, entries, rust } = loaded;
        let (name, record) = (name.into(), Record::default());
        Self { name, dispatcher, entries, grant_token, slots, record, needs_folder: !rust }
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
            reason = grant.cancel.cancelled() => return cancelled(reason),
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
        let (entered, mut ended) =
            ffi::enter(Arc::clone(&self.name), self.dispatcher.clone(), self.grant_token, grant.clone(), place);
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
                        self.record.give_up(&self.name, task, grant.lease.task, cancel_grace);
                        if self.record.out_of_service().is_some() {
                            // What waits for a slot shall not wait for ever.
                            self.slots.close();
                        }
                        drop(slot);
                        return cancelled(grant.cancel.reason().unwrap_or(CancelReason::Operator));
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
                let strikes = plugin.record.strikes();
                let outcome = plugin.run(job).await;
                if plugin.record.strikes() != strikes {
                    self.serving.send_modify(|serving| *serving = self.in_service());
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

fn cancelled(reason: CancelReason) -> Outcome {
    match reason {
        CancelReason::LeaseLost => Outcome::LeaseLost,
        CancelReason::Drained => Outcome::Drained,
        CancelReason::Plane | CancelReason::Operator => Outcome::Cancelled,
    }
}

fn outcome(grant: &HeldLease, completion: Completion) -> Outcome {
    let Completion { status, text, details } = completion;
    match grant.cancel.reason() {
        // Work that was finished in spite of a drain is worth reporting.
        Some(CancelReason::Drained) if status == Status::OK => return Outcome::Completed,
        Some(reason) => return cancelled(reason),
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
