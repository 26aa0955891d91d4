//! One thread per plugin, on which the host calls into it.
//!
//! A plugin that blocks in `start` or in a callback blocks this thread and nobody else's.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use tracing::warn;

use crate::model::millis;

/// How long a call into a plugin may take before it is worth a warning. It holds up only this
/// plugin, and a busy machine alone can make a few milliseconds of any call.
const SLOW: Duration = Duration::from_millis(50);

type Job = (&'static str, Box<dyn FnOnce() + Send>);

/// The sending side. The thread ends when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Dispatcher {
    jobs: mpsc::Sender<Job>,
}

impl Dispatcher {
    /// Starts the thread.
    pub(super) fn start(plugin: Arc<str>) -> std::io::Result<Self> {
        // Unbounded, but every job answers a call or belongs to a task, and both are bounded.
        let (jobs, queue) = mpsc::channel::<Job>();
        let name = format!("plugin-{plugin}");
        // Not joined: a plugin that hangs must not keep the host from ending.
        std::thread::Builder::new().name(name.chars().take(15).collect()).spawn(move || {
            for (what, job) in queue {
                let began = Instant::now();
                job();
                let took = began.elapsed();
                if took > SLOW && what != "init" {
                    warn!(plugin = %plugin, call = what, elapsed_ms = millis(took), "plugin was slow to return");
                }
            }
        })?;
        Ok(Self { jobs })
    }

    /// Runs `job` on the plugin's thread, after those before it.
    pub(super) fn run(&self, what: &'static str, job: impl FnOnce() + Send + 'static) {
        // The thread holds the queue until the last sender is gone, and we are one.
        let _ = self.jobs.send((what, Box::new(job)));
    }
}
