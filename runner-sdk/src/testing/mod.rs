//! Run a runner in a unit test, without a host.
//!
//! ```
//! use runner_sdk::{Error, Runner, TaskCtx, testing::TestHost};
//! use serde_json::json;
//!
//! struct Upper;
//!
//! impl Runner for Upper {
//!     const CAPABILITY: &'static str = "/examples/upper/v1";
//!     async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
//!         ctx.ctrl.progress(json!({"pct": 0})).await?;
//!         let text = ctx.input.get_bytes_by_cid("letter").await?;
//!         ctx.output.put_bytes("letter.txt", text.to_ascii_uppercase()).await?;
//!         Ok(())
//!     }
//! }
//!
//! let ended = TestHost::new().input("letter", b"dear reader").run_blocking(&Upper);
//! assert!(ended.is_ok());
//! assert_eq!(ended.output("letter.txt"), Some(&b"DEAR READER"[..]));
//! assert_eq!(ended.progress(), [json!({"pct": 0})]);
//! ```

mod memory;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
};

use serde_json::Value;

pub use memory::StoredArtifact;

use crate::{
    CancelReason, Error, Failure, LeaseEnvelope, Runner, TimeLeft, Usage,
    author::TaskCtx,
    shim::{Guarded, install_hook},
};
use memory::Memory;

/// A host in memory. Add inputs, run a runner, and check the result.
///
/// Clones share everything, so a clone can cancel the current run.
#[derive(Clone)]
pub struct TestHost {
    memory: Arc<Memory>,
    lease: LeaseEnvelope,
}

impl Default for TestHost {
    fn default() -> Self {
        Self::new()
    }
}

impl TestHost {
    /// A host with no inputs.
    #[must_use]
    pub fn new() -> Self {
        let mut lease = LeaseEnvelope::default();
        lease.task.id = "00000000-0000-4000-8000-000000000001".to_owned();
        Self { memory: Arc::new(Memory::new()), lease }
    }

    /// Adds an input under `cid`, at the end of the task's inputs.
    #[must_use]
    pub fn input(mut self, cid: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.lease.task.inputs_cids.push(cid.to_owned());
        self.memory.add_input(cid, bytes.into());
        self
    }

    /// Stores data that is no input of the task. A runner finds it with [`crate::InputSource::find`], and reads it by
    /// its `id`.
    #[must_use]
    pub fn stored(self, id: &str, name: &str, data_type: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.memory.add_stored(id, name, data_type, bytes.into());
        self
    }

    /// Sets what [`crate::ControlPlane::time_left`] answers. Without it nothing is known.
    #[must_use]
    pub fn time_left(self, left: TimeLeft) -> Self {
        self.memory.set_time_left(left);
        self
    }

    /// Sets the job author's parameters.
    #[must_use]
    pub fn meta(mut self, meta: Value) -> Self {
        self.lease.task.meta = meta;
        self
    }

    /// Changes any other field of the lease.
    #[must_use]
    pub fn lease(mut self, change: impl FnOnce(&mut LeaseEnvelope)) -> Self {
        change(&mut self.lease);
        self
    }

    /// Grants a storage token; without it [`crate::ControlPlane::token`] is `Unsupported`.
    #[must_use]
    pub fn token(self, token: &str) -> Self {
        self.memory.set_token(token);
        self
    }

    /// Limits the bytes that the run may hold in memory, as `MEMORY_BUDGET` of a node does. Without it there is no
    /// limit.
    #[must_use]
    pub fn memory_budget(self, bytes: u64) -> Self {
        self.memory.set_budget(bytes);
        self
    }

    /// Gives the run a budget of tokens. [`crate::ControlPlane::usage`] above it cancels the run.
    #[must_use]
    pub fn tokens_max(self, max: u64) -> Self {
        self.memory.set_tokens_max(max);
        self
    }

    /// Cancels the run after `count` progress reports.
    #[must_use]
    pub fn cancel_after_progress(self, count: usize) -> Self {
        self.memory.cancel_after_progress(count);
        self
    }

    /// Cancels the current run, or the next one. For [`CancelReason::LeaseLost`] every input and
    /// output call fails from then on, as on a real node.
    pub fn cancel(&self, reason: CancelReason) {
        self.memory.cancel(reason);
    }

    /// Runs `runner` once and waits for its end. A panic is caught.
    pub async fn run<R: Runner>(&self, runner: &R) -> Ended {
        install_hook(None, true);
        let mut lease = self.lease.clone();
        lease.task.capability = R::CAPABILITY.to_owned();
        let dir = ScratchDir::new();
        let port = self.memory.begin(dir.0.clone());
        let ctx = TaskCtx::new(lease, dir.0.clone(), "", port);
        let result = match Guarded::new(runner.run(ctx)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(err)) => Err(Failure::Error(err)),
            Err(note) => Err(Failure::Panic { message: note.message, place: note.place }),
        };
        self.memory.end();
        drop(dir);
        let records = self.memory.records();
        Ended {
            result,
            outputs: records.outputs,
            progress: records.progress,
            events: records.events,
            usage: records.usage,
        }
    }

    /// [`Self::run`] on a runtime of its own, for tests without one.
    ///
    /// # Panics
    /// When the runtime cannot be started.
    pub fn run_blocking<R: Runner>(&self, runner: &R) -> Ended {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime for the test");
        runtime.block_on(self.run(runner))
    }
}

/// How a run ended and what it left.
#[derive(Debug)]
pub struct Ended {
    result: Result<(), Failure>,
    outputs: BTreeMap<String, StoredArtifact>,
    progress: Vec<Value>,
    events: Vec<Value>,
    usage: Usage,
}

impl Ended {
    /// Whether the runner returned `Ok`.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.result.is_ok()
    }

    /// The error the runner returned.
    ///
    /// # Panics
    /// When it did not return one.
    #[must_use]
    pub fn error(&self) -> &Error {
        match &self.result {
            Err(Failure::Error(err)) => err,
            other => panic!("the runner returned no error but {other:?}"),
        }
    }

    /// How the run failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        self.result.as_ref().err()
    }

    /// The bytes published at `path`.
    #[must_use]
    pub fn output(&self, path: &str) -> Option<&[u8]> {
        self.outputs.get(path).map(|artifact| artifact.bytes.as_slice())
    }

    /// Everything published, by path.
    #[must_use]
    pub fn outputs(&self) -> &BTreeMap<String, StoredArtifact> {
        &self.outputs
    }

    /// Every progress value, oldest first (a control plane sees only some of them).
    #[must_use]
    pub fn progress(&self) -> &[Value] {
        &self.progress
    }

    /// Every event, oldest first.
    #[must_use]
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    /// The sum of all usage.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.usage
    }
}

/// A directory below the system's temporary one, removed on drop.
struct ScratchDir(PathBuf);

impl ScratchDir {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("runner-sdk-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).expect("a directory below the system's temporary one");
        Self(dir)
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
