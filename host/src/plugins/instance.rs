//! One instance of a plugin in one node: its tasks, its threads, its log level, its counters.
//!
//! A plugin's calls arrive here as plain values. `ffi` converts them. What a call does with a task's data is in
//! [`HostCalls`]. Logs and ends of tasks are handled here.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::Duration,
};

use runner_sdk::{
    abi::{End, Status, Task},
    host_calls::HostCalls,
};
use tokio::{runtime::Handle, sync::oneshot};
use tracing::{Span, debug, error, info, trace, warn};

use super::{
    backend::TaskBackend,
    dispatch::Dispatcher,
    handles::HandleTable,
    held_bytes::{TaskBytes, Unreleased},
    stuck::Faults,
    text::{self, LOG_FIELDS_BYTES_MAX},
};
use crate::model::{redact, redact_json};

/// Time an ended task has to release its bytes before a warning is logged.
const RELEASE_GRACE: Duration = Duration::from_secs(1);

/// One instance.
pub(super) struct Instance {
    /// Its name in the node.
    pub(super) name: Arc<str>,
    /// The threads on which the host calls into it.
    pub(super) dispatcher: Dispatcher,
    /// Its running tasks.
    pub(super) tasks: HandleTable<Running>,
    /// Its faults.
    pub(super) faults: Faults,
    /// Bytes that its ended tasks still hold.
    pub(super) unreleased: Arc<Unreleased>,
    log_level: AtomicU32,
    /// Set until `create` was answered.
    creating: Mutex<Option<mpsc::Sender<Created>>>,
}

/// The answer of `create`.
#[derive(Debug)]
pub(super) struct Created {
    pub(super) status: Status,
    /// The plugin's number for the instance.
    pub(super) number: u64,
    /// The reason of a failure.
    pub(super) text: String,
}

/// The completion of a task as the plugin reported it.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) end: End,
    pub(super) text: String,
    pub(super) details: String,
}

/// A task inside a plugin, as the calls of the plugin use it.
pub(super) struct Running {
    /// Does what the calls ask for.
    pub(super) calls: Arc<HostCalls<TaskBackend>>,
    /// The runtime that drives them.
    pub(super) runtime: Handle,
    /// The span of the task.
    pub(super) span: Span,
    /// Counts the bytes that crossed the boundary.
    pub(super) bytes: Arc<TaskBytes>,
    ended: Mutex<Option<oneshot::Sender<Completion>>>,
}

/// Owns a task's handle. When it is dropped, the task is over for its plugin.
pub(super) struct Entered {
    pub(super) task: Task,
    running: Arc<Running>,
    instance: Arc<Instance>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.instance.tasks.remove(self.task.0);
        self.running.calls.close();
        self.running.bytes.end();
        if self.instance.unreleased.is_notable() {
            let instance = Arc::clone(&self.instance);
            // Not joined: the future only logs a warning, or does nothing.
            self.running.runtime.spawn(async move {
                tokio::time::sleep(RELEASE_GRACE).await;
                instance.unreleased.warn(&instance.name);
            });
        }
    }
}

/// A line of a plugin's log. The texts are bounded.
pub(super) struct LogLine {
    pub(super) level: u32,
    pub(super) target: String,
    pub(super) text: String,
    pub(super) fields: String,
}

impl Instance {
    pub(super) fn new(name: Arc<str>, dispatcher: Dispatcher, log_level: u32, created: mpsc::Sender<Created>) -> Self {
        Self {
            name,
            dispatcher,
            tasks: HandleTable::new(),
            faults: Faults::default(),
            unreleased: Arc::default(),
            log_level: AtomicU32::new(log_level),
            creating: Mutex::new(Some(created)),
        }
    }

    /// Enters a task. The receiver gets its completion once.
    pub(super) fn enter(self: &Arc<Self>, backend: TaskBackend) -> (Entered, oneshot::Receiver<Completion>) {
        let (completion_sender, ended) = oneshot::channel();
        let running = Arc::new(Running {
            runtime: backend.data.runtime.clone(),
            calls: Arc::new(HostCalls::new(backend)),
            span: Span::current(),
            bytes: TaskBytes::new(Arc::clone(&self.unreleased)),
            ended: Mutex::new(Some(completion_sender)),
        });
        let task = Task(self.tasks.insert(Arc::clone(&running)));
        (Entered { task, running, instance: Arc::clone(self) }, ended)
    }

    /// The most verbose level that the host wants from it.
    pub(super) fn log_level(&self) -> u32 {
        self.log_level.load(Ordering::Relaxed)
    }

    pub(super) fn set_log_level(&self, level: u32) {
        self.log_level.store(level, Ordering::Relaxed);
    }

    /// The plugin has answered `create`.
    pub(super) fn created(&self, answer: Created) {
        match self.creating.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // The receiver is gone after the time limit.
            Some(waiting) => drop(waiting.send(answer)),
            None => {
                warn!(event = "plugin.second_create", plugin = %self.name, "a plugin answered create a second time")
            }
        }
    }

    /// Writes a line of the plugin to the node's log.
    pub(super) fn log(&self, task: Task, line: LogLine) {
        let LogLine { level, mut target, mut text, mut fields } = line;
        if level.max(1) > self.log_level() {
            return;
        }
        let running = if task.0 == 0 { None } else { self.tasks.get(task.0) };
        // A runner may log its tokens, in a line or in the text of a panic. The thread may also belong to no known
        // task.
        let tokens = match &running {
            Some(running) => running.calls.backend().bearers(),
            None => self.tasks.all().iter().flat_map(|running| running.calls.backend().bearers()).collect(),
        };
        redact(&mut target, &tokens);
        redact(&mut text, &tokens);
        redact_json(&mut fields, &tokens);
        let fields = text::bounded_fields(fields, LOG_FIELDS_BYTES_MAX);
        let span = running.map_or_else(Span::none, |running| running.span.clone());
        let _entered = span.enter();
        let plugin = &*self.name;
        let plugin_fields = Some(fields.as_str()).filter(|fields| !fields.is_empty());
        match level {
            0 | 1 => error!(plugin, plugin_target = target, plugin_fields, "{text}"),
            2 => warn!(plugin, plugin_target = target, plugin_fields, "{text}"),
            3 => info!(plugin, plugin_target = target, plugin_fields, "{text}"),
            4 => debug!(plugin, plugin_target = target, plugin_fields, "{text}"),
            _ => trace!(plugin, plugin_target = target, plugin_fields, "{text}"),
        }
    }

    /// Whether a task should stop: 0, 1, or the status of a stale handle.
    pub(super) fn cancelled(&self, task: Task) -> i32 {
        match self.tasks.get(task.0) {
            Some(running) => i32::from(running.calls.backend().held_lease.cancel.reason().is_some()),
            None => Status::STALE.0,
        }
    }

    /// The plugin has ended a task. The handle is retired at once: all later calls for the task are stale.
    pub(super) fn complete(&self, task: Task, completion: Completion) -> Status {
        let waiting = self
            .tasks
            .take(task.0)
            .and_then(|running| running.ended.lock().unwrap_or_else(PoisonError::into_inner).take());
        // The receiver is gone when the task was abandoned as stuck.
        if waiting.is_some_and(|waiting| waiting.send(completion).is_ok()) {
            return Status::OK;
        }
        self.faults.returned(&self.name, task);
        Status::STALE
    }
}
