//! What runs the tasks of one instance of a plugin.

use std::{sync::Arc, time::Duration};

use runner_sdk::{
    BoxFuture,
    abi::{self, Task},
};
use tokio::sync::oneshot;

use super::{
    backend::TaskBackend,
    ffi::Entries,
    instance::{Completion, Entered, Instance},
};
use crate::model::HeldLease;

/// A task to start.
pub(super) struct Request {
    /// The lease.
    pub(super) held_lease: HeldLease,
    /// The task's own directory.
    pub(super) dir: String,
}

/// A started task. When it is dropped, the task is over for its plugin.
pub(super) struct Run {
    /// Its handle.
    pub(super) task: Task,
    /// Gets its completion once.
    pub(super) ended: oneshot::Receiver<Completion>,
    _entered: Entered,
}

/// Runs the tasks of one instance. No call waits for the plugin.
pub(super) trait Executor: Send + Sync {
    /// Starts a task. Its runner's calls go to `backend`.
    fn start(&self, request: Request, backend: TaskBackend) -> Run;
    /// Tells the runner that its task should stop.
    fn cancel(&self, task: Task);
    /// Tells the plugin the most verbose level that it should send.
    fn set_log_level(&self, level: u32);
    /// Ends the instance. No task is running. The future waits until the plugin has ended it.
    fn shutdown(&self, deadline: Duration) -> BoxFuture<'static, ()>;
}

/// Runs them in this process.
pub(super) struct InProcess {
    pub(super) instance: Arc<Instance>,
    pub(super) entries: Entries,
    /// The plugin's number for the instance.
    pub(super) number: abi::Instance,
}

impl Executor for InProcess {
    fn start(&self, request: Request, backend: TaskBackend) -> Run {
        let (entered, ended) = self.instance.enter(backend);
        let (entries, number, task) = (self.entries, self.number, entered.task);
        self.instance.dispatcher.run("start", move || entries.start(number, task, &request));
        Run { task, ended, _entered: entered }
    }

    fn cancel(&self, task: Task) {
        let (entries, number) = (self.entries, self.number);
        self.instance.dispatcher.run("cancel", move || entries.cancel(number, task));
    }

    fn set_log_level(&self, level: u32) {
        self.instance.set_log_level(level);
        let (entries, number) = (self.entries, self.number);
        self.instance.dispatcher.run("log_level", move || entries.log_level(number, level));
    }

    fn shutdown(&self, deadline: Duration) -> BoxFuture<'static, ()> {
        let (ended, done) = oneshot::channel();
        let (entries, number) = (self.entries, self.number);
        self.instance.dispatcher.run("shutdown", move || {
            entries.shutdown(number, deadline);
            // The receiver is gone after the deadline.
            let _ = ended.send(());
        });
        Box::pin(async move {
            // An error means that the thread has ended. That also ends the wait.
            let _ = done.await;
        })
    }
}
