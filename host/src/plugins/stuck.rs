//! What is held against a plugin: runners that ignore their cancellation, and calls that do not return.
//!
//! A thread of a library cannot be ended from outside. Such a runner is given up: its slot is free, its
//! handle stale. Each is a strike against its plugin, whose threads it may still keep; after the third
//! the plugin is out of service until the node starts anew.

use std::{
    collections::HashMap,
    sync::{
        Arc, LazyLock, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use runner_sdk::abi::Task;
use tracing::{error, info, warn};

use super::dispatch::Hanging;
use crate::model::{BootInstant, TaskId, millis};

/// Runners given up until their plugin gets no more work.
const STRIKES_MAX: u32 = 3;

/// Calls beyond one for each slot that may hang until their plugin gets no more work. Each keeps a thread.
const HANGING_SPARE: usize = 16;

static TOTAL: AtomicU64 = AtomicU64::new(0);

/// Those that have not returned yet, by their handles. Bounded by the strikes and by the tasks a plugin
/// may run at once.
static GIVEN_UP: LazyLock<Mutex<HashMap<Task, GivenUp>>> = LazyLock::new(Mutex::default);

struct GivenUp {
    plugin: Arc<str>,
    task: TaskId,
    since: BootInstant,
}

/// Runners given up since the process began.
pub(super) fn total() -> u64 {
    TOTAL.load(Ordering::Relaxed)
}

/// Takes note when the task behind a stale handle was given up and ends after all.
pub(super) fn returned(handle: Task) {
    let found = GIVEN_UP.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle);
    if let Some(GivenUp { plugin, task, since }) = found {
        let late_ms = millis(BootInstant::now() - since);
        info!(event = "runner.returned_late", plugin = %plugin, task_id = %task, late_ms, "stuck runner returned after its task was given up");
    }
}

/// What is held against one plugin.
#[derive(Default)]
pub(super) struct Record {
    strikes: AtomicU32,
    out: OnceLock<String>,
}

impl Record {
    /// How many of its runners were given up.
    pub(super) fn strikes(&self) -> u32 {
        self.strikes.load(Ordering::Acquire)
    }

    /// Why the plugin is out of service, if it is.
    pub(super) fn out_of_service(&self) -> Option<&str> {
        self.out.get().map(String::as_str)
    }

    /// Gives up the runner of `task` behind `handle`.
    pub(super) fn give_up(&self, plugin: &Arc<str>, handle: Task, task: TaskId, grace: Duration) {
        TOTAL.fetch_add(1, Ordering::Relaxed);
        let given_up = GivenUp { plugin: Arc::clone(plugin), task, since: BootInstant::now() };
        GIVEN_UP.lock().unwrap_or_else(PoisonError::into_inner).insert(handle, given_up);
        let strikes = self.strikes.fetch_add(1, Ordering::AcqRel) + 1;
        let grace_ms = millis(grace);
        warn!(event = "runner.stuck", plugin = %plugin, grace_ms, strikes, "runner ignored its cancel, slot released");
        if strikes < STRIKES_MAX {
            return;
        }
        self.put_out(
            plugin,
            format!("{STRIKES_MAX} of its runners ignored their cancellation; fix the plugin and restart the node"),
        );
    }

    /// Takes the plugin out of service when too many of its calls hang beside `slots` tasks.
    pub(super) fn judge(&self, plugin: &Arc<str>, hanging: Hanging, slots: usize) {
        if hanging.calls > slots.saturating_add(HANGING_SPARE) {
            let Hanging { calls, entry, .. } = hanging;
            self.put_out(
                plugin,
                format!("{calls} calls into it have not returned, the oldest is {entry}; fix the plugin and restart the node"),
            );
        }
    }

    fn put_out(&self, plugin: &Arc<str>, reason: String) {
        if self.out.set(reason.clone()).is_ok() {
            error!(event = "plugin.out_of_service", plugin = %plugin, reason, "plugin is out of service");
        }
    }
}
