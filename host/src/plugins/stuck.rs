//! Counts the faults of a plugin: runners that ignore their cancellation, and calls that do not return.
//!
//! The host cannot end a thread of a library. It abandons such a runner: it releases the slot and makes the handle
//! stale. Each abandoned runner is a strike against its plugin, because the plugin may still keep its threads.
//! After the third strike the plugin is out of service until the node restarts.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use runner_sdk::abi::Task;
use tracing::info;

use super::dispatch::Hanging;
use crate::{
    model::{BootInstant, TaskId, millis},
    node_event::{NodeEvent, NodeEvents},
};

/// A plugin gets no more work after this number of abandoned runners.
const STRIKES_MAX: u32 = 3;

/// A plugin gets no more work when more calls hang than one per slot plus this number. Each hanging call keeps a
/// thread.
const HANGING_SPARE: usize = 16;

/// A runner that the host has given up.
struct Abandoned {
    task: TaskId,
    since: BootInstant,
}

/// The faults of one plugin.
#[derive(Default)]
pub(super) struct Faults {
    strikes: AtomicU32,
    out_of_service: OnceLock<String>,
    /// Abandoned runners that have not returned yet, by handle. The strikes and the concurrent tasks of the plugin
    /// bound their number.
    abandoned: Mutex<HashMap<Task, Abandoned>>,
}

impl Faults {
    /// How many of its runners were abandoned.
    pub(super) fn strikes(&self) -> u32 {
        self.strikes.load(Ordering::Acquire)
    }

    /// Why the plugin is out of service, if it is.
    pub(super) fn out_of_service(&self) -> Option<&str> {
        self.out_of_service.get().map(String::as_str)
    }

    /// Abandons the runner of `task` behind `handle`.
    pub(super) fn abandon(&self, plugin: &Arc<str>, handle: Task, task: TaskId, grace: Duration, events: &NodeEvents) {
        let abandoned = Abandoned { task: task.clone(), since: BootInstant::now() };
        self.abandoned.lock().unwrap_or_else(PoisonError::into_inner).insert(handle, abandoned);
        let strikes = self.strikes.fetch_add(1, Ordering::AcqRel) + 1;
        events.emit(NodeEvent::RunnerStuck { task, plugin: Arc::clone(plugin), grace, strikes });
        if strikes >= STRIKES_MAX {
            self.take_out_of_service(format!(
                "{STRIKES_MAX} of its runners ignored their cancellation; fix the plugin and restart the node"
            ));
        }
    }

    /// Logs when an abandoned task behind a stale handle ends late.
    pub(super) fn returned(&self, plugin: &Arc<str>, handle: Task) {
        let found = self.abandoned.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle);
        if let Some(Abandoned { task, since }) = found {
            let late_ms = millis(BootInstant::now() - since);
            info!(event = "runner.returned_late", plugin = %plugin, task_id = %task, late_ms, "stuck runner returned after its task was abandoned");
        }
    }

    /// Takes the plugin out of service after it flooded its dispatcher: it did not get all answers.
    pub(super) fn check_flooded(&self, is_flooded: bool) {
        if is_flooded {
            self.take_out_of_service(
                "it makes calls faster than it takes their answers; fix the plugin and restart the node".to_owned(),
            );
        }
    }

    /// Takes the plugin out of service when more of its calls hang than `slots` plus `HANGING_SPARE`.
    pub(super) fn check_hanging(&self, hanging: Hanging, slots: usize) {
        if hanging.calls > slots.saturating_add(HANGING_SPARE) {
            let Hanging { calls, entry, .. } = hanging;
            self.take_out_of_service(format!(
                "{calls} calls into it have not returned, the oldest is {entry}; fix the plugin and restart the node"
            ));
        }
    }

    /// The first reason counts.
    fn take_out_of_service(&self, reason: String) {
        let _ = self.out_of_service.set(reason);
    }
}
