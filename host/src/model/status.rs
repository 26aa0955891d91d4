//! What the node shows of itself: one value, changed by whoever knows, served by `observe`.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use tokio::sync::watch;
use uuid::Uuid;

use super::{Budget, Lease, Outcome, TaskId};

/// The node as `/status.json` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct HostStatus {
    /// The host's version.
    pub version: &'static str,
    /// The node's address on the control plane.
    pub node: String,
    /// When the process began to serve.
    pub started_at: Timestamp,
    /// `starting`, `running`, `draining` or `stopped`.
    pub phase: Phase,
    /// Standing with the sign-in service: `disconnected`, `registering`, `registered` or `conflict`.
    pub registration: String,
    /// How the node registers: `wallet` or `callback`.
    pub registration_form: &'static str,
    /// Since when it stands so.
    pub registration_since: Timestamp,
    /// The last trouble with it, one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registration_error: Option<String>,
    /// When the sign-in service last asked for this node's health.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_healthcheck: Option<Timestamp>,
    /// Until when the node token in hand is good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_expires_at: Option<Timestamp>,
    /// Why the last login failed, one line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub login_error: Option<String>,
    /// Room where tasks work.
    pub disk: DiskStatus,
    /// Most tasks at once.
    pub slots: usize,
    /// What is served.
    pub capabilities: Vec<String>,
    /// What does not work any more although the node runs, one line each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub degraded: Vec<String>,
    /// Tasks held now, by id.
    pub tasks: BTreeMap<String, TaskStatus>,
    /// Ended tasks by outcome, since the start.
    pub ended: BTreeMap<&'static str, u64>,
    /// Verdicts the control plane refused or could not be told before the lease ran out.
    pub unreported: u64,
    /// Calls of plugins that named a task which was over or never was.
    pub stale_calls: Live,
    /// Runners that ignored their cancellation; their slots were given back.
    pub stuck_runners: Live,
    /// Bytes of tasks' data in memory: now, at most so far, and the limit.
    pub memory: Budget,
    /// Every library, loaded or refused.
    pub plugins: serde_json::Value,
}

/// Room on the file system of `SCRATCH_DIR`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskStatus {
    /// What is left; `None` where the system does not say.
    pub free_bytes: Option<u64>,
    /// Below this nothing new is leased; 0: there is no floor.
    pub floor_bytes: u64,
    /// Whether it is below.
    pub full: bool,
}

/// A number that is asked for when it is shown.
#[derive(Clone, Copy, Debug)]
pub struct Live(pub fn() -> u64);

impl Serialize for Live {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64((self.0)())
    }
}

/// Where the node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Not registered or signed in yet.
    Starting,
    /// Leasing.
    Running,
    /// No new leases; running tasks end.
    Draining,
    /// All ended.
    Stopped,
}

/// One held task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskStatus {
    /// Which runner.
    pub capability: String,
    /// The job it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_id: Option<Uuid>,
    /// `setting-up`, `waiting` (its plugin is full), `running` or `reporting`.
    pub state: &'static str,
    /// When it was leased.
    pub since: Timestamp,
}

/// The writing side. Cheap to clone.
#[derive(Clone)]
pub struct StatusBoard(Arc<watch::Sender<HostStatus>>);

impl StatusBoard {
    /// A board for a node that is starting.
    #[must_use]
    pub fn new(node: String, slots: usize, capabilities: Vec<String>, plugins: serde_json::Value) -> Self {
        Self(Arc::new(watch::Sender::new(HostStatus {
            version: env!("CARGO_PKG_VERSION"),
            node,
            started_at: Timestamp::now(),
            phase: Phase::Starting,
            registration: "disconnected".to_owned(),
            registration_form: "wallet",
            registration_since: Timestamp::now(),
            registration_error: None,
            last_healthcheck: None,
            token_expires_at: None,
            login_error: None,
            disk: DiskStatus::default(),
            slots,
            capabilities,
            degraded: Vec::new(),
            tasks: BTreeMap::new(),
            ended: BTreeMap::new(),
            unreported: 0,
            stale_calls: Live(|| 0),
            stuck_runners: Live(|| 0),
            memory: Budget::unlimited(),
            plugins,
        })))
    }

    /// A live view.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<HostStatus> {
        self.0.subscribe()
    }

    /// Changes anything.
    pub fn change(&self, change: impl FnOnce(&mut HostStatus)) {
        self.0.send_modify(change);
    }

    /// Enters a task.
    pub fn began(&self, lease: &Lease) {
        let task = TaskStatus {
            capability: lease.capability.to_string(),
            job_id: lease.job,
            state: "setting-up",
            since: Timestamp::now(),
        };
        self.change(|status| {
            status.tasks.insert(lease.task.to_string(), task);
        });
    }

    /// Moves a task on.
    pub fn moved(&self, task: TaskId, state: &'static str) {
        self.change(|status| {
            if let Some(task) = status.tasks.get_mut(&task.to_string()) {
                task.state = state;
            }
        });
    }

    /// Removes a task and counts its end.
    pub fn ended(&self, task: TaskId, outcome: &Outcome, reported: bool) {
        self.change(|status| {
            status.tasks.remove(&task.to_string());
            *status.ended.entry(outcome.word()).or_default() += 1;
            status.unreported += u64::from(!reported);
        });
    }
}
