//! What the node shows of itself: one value, changed by whoever knows, served by `observe`.
//!
//! Every key is always there; `null` stands for unknown. `docs/operations/status.md` lists the keys, and a test compares
//! it with a running node. A key that changes its meaning needs a new [`STATUS_SCHEMA`].

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, MutexGuard},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Serialize, Serializer, ser::SerializeMap as _};
use uuid::Uuid;

use super::{
    Artifact, BootInstant, Budget, Capability, DataLocation, Fetched, HeldLease, Lease, MissedHeartbeats, OutcomeWord,
    Setup, TaskId, TaskResult, in_a_line, millis, watched::Watched,
};

/// The version of `/status.json`. New keys do not change it.
pub const STATUS_SCHEMA: u32 = 1;

/// Ended tasks that are shown.
const RECENT_MAX: usize = 100;

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
    /// Standing with the sign-in service.
    pub registration: RegistrationState,
    /// How the node registers.
    pub registration_form: RegistrationForm,
    /// Since when it stands so.
    pub registration_since: Timestamp,
    /// The last trouble with it, one line.
    pub registration_error: Option<String>,
    /// When the sign-in service last asked for this node's health.
    pub last_healthcheck: Option<Timestamp>,
    /// Until when the node token in hand is good.
    pub token_expires_at: Option<Timestamp>,
    /// Why the last login failed, one line.
    pub login_error: Option<String>,
    /// How asking for work goes.
    pub polls: PollStatus,
    /// Room where tasks work.
    pub disk: DiskStatus,
    /// Most tasks at once.
    pub slots: usize,
    /// What is served.
    pub capabilities: Vec<String>,
    /// What does not work any more although the node runs, one line each.
    pub degraded: Vec<String>,
    /// Why a thread for a plugin's calls cannot be created, one line.
    pub no_thread: Option<String>,
    /// Tasks held now, shown by id.
    pub tasks: HeldTasks,
    /// Ended tasks by outcome, since the start.
    pub ended: BTreeMap<OutcomeWord, u64>,
    /// Reports the control plane refused for good.
    pub unreported: u64,
    /// Reports on their way.
    pub outbox: OutboxStatus,
    /// Tasks that ended lately, the newest last; at most 100.
    pub recent: VecDeque<Arc<TaskRecord>>,
    /// Calls of plugins that named a task which was over or never was.
    pub stale_calls: Live,
    /// Runners that ignored their cancellation; their slots were given back.
    pub stuck_runners: Live,
    /// Bytes of tasks' data in memory: now, at most so far, and the limit.
    pub memory: Budget,
    /// Every library, loaded or refused.
    pub plugins: Listings,
}

/// How asking the control plane for work goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PollStatus {
    /// Polls in a row that failed up to now.
    pub failed: u32,
    /// Why the last one failed, one line; gone with the first one that is answered.
    pub last_error: Option<String>,
    /// One has waited for its answer for long; `false` with the first one that is answered.
    pub unanswered: bool,
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

/// Every library with what is known of it when the page is asked.
#[derive(Clone)]
pub struct Listings(pub Arc<dyn Fn() -> serde_json::Value + Send + Sync>);

impl fmt::Debug for Listings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listings")
    }
}

impl Serialize for Listings {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (self.0)().serialize(serializer)
    }
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

/// Standing with the sign-in service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistrationState {
    /// Not registered; the last attempt was refused, or none was made.
    #[default]
    Disconnected,
    /// Being registered, or tried again soon.
    Registering,
    /// Registered.
    Registered,
    /// Another node with this wallet is online.
    Conflict,
}

impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disconnected => "disconnected",
            Self::Registering => "registering",
            Self::Registered => "registered",
            Self::Conflict => "conflict",
        })
    }
}

/// How the node registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistrationForm {
    /// By a signed message.
    Wallet,
    /// By a URL at which the service calls back.
    Callback,
    /// Not at all: the control plane has no sign-in.
    None,
}

/// How far a held task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskStage {
    /// Its session opens.
    SettingUp,
    /// Its plugin is full.
    Waiting,
    /// Its runner works.
    Running,
    /// Its report is on its way.
    Reporting,
}

/// The plugin that serves a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginId {
    /// Name in its manifest.
    pub name: Arc<str>,
    /// SHA-256 of the bytes that were opened, in hex.
    pub sha256: Arc<str>,
}

/// What began and has not ended, each with a number of its own: a task may be leased again before its
/// lost attempt has ended.
#[derive(Clone, Debug, Default)]
pub struct HeldTasks {
    begun: u64,
    by_number: BTreeMap<u64, TaskStatus>,
}

/// What the board calls something that began on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldNumber(u64);

impl HeldTasks {
    /// What stands against keeping the leases, where that is so for all of them: the least that one of them
    /// has missed.
    #[must_use]
    pub fn missed(&self) -> Option<MissedHeartbeats> {
        self.by_number.values().map(|task| task.turning.0.missed()).min_by_key(|missed| missed.count)
    }
}

impl Serialize for HeldTasks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Of two with one id the newer one is shown: it is the one that still counts.
        let newest: BTreeMap<String, &TaskStatus> =
            self.by_number.values().map(|task| (task.turning.0.lease.task().to_string(), task)).collect();
        serializer.collect_map(newest)
    }
}

/// One held task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskStatus {
    /// Which runner.
    #[serde(serialize_with = "as_text")]
    pub capability: Capability,
    /// The job it belongs to.
    pub job_id: Option<Uuid>,
    /// The plugin that serves it.
    #[serde(serialize_with = "name_of_plugin")]
    pub plugin: Option<PluginId>,
    /// Which run of the task this is, as the plane counts them.
    pub attempt: Option<u64>,
    /// How far it is.
    pub state: TaskStage,
    /// When it was leased.
    pub since: Timestamp,
    /// `domain_id`, `lease_expires_at`, `token_expires_at` and `progress_at` (when the runner reported progress
    /// last): what is known of them when the page is asked. Neither a token nor the progress itself is shown.
    /// `heartbeats_failed` says how many failed in a row, `heartbeat_error` why the last one did.
    #[serde(flatten)]
    pub turning: RunningTask,
}

/// What the plane and the runner may change while a task is held, looked up when it is shown.
#[derive(Clone)]
pub struct RunningTask(HeldLease);

impl fmt::Debug for RunningTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RunningTask").field(self.0.lease.task()).finish()
    }
}

impl Serialize for RunningTask {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(grant) = self;
        let domain = match grant.setup_now() {
            Setup::Ready(Ok(DataLocation::DomainServer(at))) => Some(at.domain),
            _ => grant.lease.data.domain(),
        };
        let times = [
            ("lease_expires_at", grant.deadline().until().on_calendar()),
            ("token_expires_at", grant.token_deadline().until().on_calendar()),
            ("progress_at", grant.progress.progress_at().and_then(BootInstant::on_calendar)),
        ];
        let MissedHeartbeats { count, error } = grant.missed();
        let mut shown = serializer.serialize_map(None)?;
        shown.serialize_entry("domain_id", &domain)?;
        for (name, at) in times {
            shown.serialize_entry(name, &at)?;
        }
        shown.serialize_entry("heartbeats_failed", &count)?;
        shown.serialize_entry("heartbeat_error", &Some(error).filter(|_| count > 0))?;
        shown.end()
    }
}

/// Reports the control plane has not accepted yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OutboxStatus {
    /// How many there are, from the end of their tasks on.
    pub waiting: usize,
    /// When the task of the oldest one ended.
    pub oldest: Option<Timestamp>,
    /// How often that one was sent.
    pub oldest_tries: Option<u32>,
    /// Why the last one sent was not accepted, one line; gone when none waits.
    pub last_error: Option<String>,
    /// Reports of another control plane or node that are kept, and not sent.
    pub foreign: usize,
    /// So many are not accepted that nothing new is leased.
    pub full: bool,
    /// Why they cannot be written down, one line; nothing new is leased until they can.
    pub not_written: Option<String>,
}

/// The name is enough while a task runs.
fn name_of_plugin<S: Serializer>(plugin: &Option<PluginId>, serializer: S) -> Result<S::Ok, S::Error> {
    plugin.as_ref().map(|plugin| &*plugin.name).serialize(serializer)
}

/// Names are written when they are shown.
fn as_text<S: Serializer>(name: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(name)
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReportState {
    /// The control plane took it.
    Accepted,
    /// It is in the outbox.
    Waiting,
    /// The control plane will never take it.
    Refused,
    /// An operator dropped it.
    Dropped,
    /// There was nothing to say: the task was cancelled or lost.
    None,
}

/// One ended task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskRecord {
    /// The task.
    #[serde(serialize_with = "as_text")]
    pub task_id: TaskId,
    /// The job it belonged to.
    pub job_id: Option<Uuid>,
    /// Which runner.
    #[serde(serialize_with = "as_text")]
    pub capability: Capability,
    /// Which run of the task this was, as the plane counts them.
    pub attempt: Option<u64>,
    /// Name of the plugin that served it.
    pub plugin: Option<Arc<str>>,
    /// SHA-256 of that plugin.
    pub plugin_sha256: Option<Arc<str>>,
    /// How it ended, one word.
    pub outcome: OutcomeWord,
    /// The same, finer.
    pub code: &'static str,
    /// Why it ended so, one line.
    pub reason: Option<String>,
    /// What it published.
    pub artifacts: Vec<Artifact>,
    /// What it fetched whole.
    pub inputs: Vec<Fetched>,
    /// When it ended.
    pub ended_at: Timestamp,
    /// How long it took, from the lease to its end.
    pub elapsed_ms: u64,
    /// What became of its report.
    pub report: ReportState,
}

impl TaskRecord {
    /// The record of a task that has just ended.
    #[must_use]
    pub fn new(
        lease: &Lease,
        plugin: Option<&PluginId>,
        task_result: &TaskResult,
        took: Duration,
        report: ReportState,
    ) -> Self {
        Self {
            task_id: lease.task().clone(),
            job_id: lease.job,
            capability: lease.capability.clone(),
            attempt: lease.attempt,
            plugin: plugin.map(|plugin| Arc::clone(&plugin.name)),
            plugin_sha256: plugin.map(|plugin| Arc::clone(&plugin.sha256)),
            outcome: task_result.outcome.kind(),
            code: task_result.outcome.code(),
            reason: task_result.outcome.reason().map(|reason| in_a_line(&reason)),
            artifacts: task_result.artifacts.clone(),
            inputs: task_result.inputs.clone(),
            ended_at: Timestamp::now(),
            elapsed_ms: millis(took),
            report,
        }
    }
}

/// Where it is written and read. Cheap to clone.
#[derive(Clone)]
pub struct StatusBoard(Arc<Watched<HostStatus>>);

impl StatusBoard {
    /// A board for a node that is starting.
    #[must_use]
    pub fn new(node: String, slots: usize, capabilities: Vec<String>, plugins: serde_json::Value) -> Self {
        Self(Arc::new(Watched::new(HostStatus {
            version: env!("CARGO_PKG_VERSION"),
            node,
            started_at: Timestamp::now(),
            phase: Phase::Starting,
            registration: RegistrationState::default(),
            registration_form: RegistrationForm::Wallet,
            registration_since: Timestamp::now(),
            registration_error: None,
            last_healthcheck: None,
            token_expires_at: None,
            login_error: None,
            polls: PollStatus::default(),
            disk: DiskStatus::default(),
            slots,
            capabilities,
            degraded: Vec::new(),
            no_thread: None,
            tasks: HeldTasks::default(),
            ended: BTreeMap::new(),
            unreported: 0,
            outbox: OutboxStatus::default(),
            recent: VecDeque::new(),
            stale_calls: Live(|| 0),
            stuck_runners: Live(|| 0),
            memory: Budget::unlimited(),
            plugins: Listings(Arc::new(move || plugins.clone())),
        })))
    }

    /// The status as it is now. Who holds it keeps all those waiting who would change it.
    pub fn now(&self) -> MutexGuard<'_, HostStatus> {
        self.0.lock()
    }

    /// Waits until the status is as `wanted`.
    #[cfg(test)]
    pub(crate) async fn until(&self, mut wanted: impl FnMut(&HostStatus) -> bool) {
        self.0.until(|status| wanted(status).then_some(())).await;
    }

    /// Changes anything.
    pub fn change(&self, change: impl FnOnce(&mut HostStatus)) {
        self.0.change(|status| {
            change(status);
            true
        });
    }

    /// Notes how a poll ended: with an answer, or why not.
    pub fn polled(&self, error: Option<String>) {
        self.change(|HostStatus { polls, .. }| {
            *polls = match &error {
                Some(_) => PollStatus {
                    failed: polls.failed.saturating_add(1),
                    last_error: error,
                    unanswered: polls.unanswered,
                },
                None => PollStatus::default(),
            };
        });
    }

    /// Notes that a poll has waited for its answer for long.
    pub fn unanswered(&self) {
        self.change(|status| status.polls.unanswered = true);
    }

    /// Enters a task, and the plugin that serves it.
    pub fn began(&self, grant: &HeldLease, plugin: Option<PluginId>) -> HeldNumber {
        let lease = &grant.lease;
        let task = TaskStatus {
            capability: lease.capability.clone(),
            job_id: lease.job,
            plugin,
            attempt: lease.attempt,
            state: TaskStage::SettingUp,
            since: Timestamp::now(),
            turning: RunningTask(grant.clone()),
        };
        let mut held = HeldNumber(0);
        self.change(|HostStatus { tasks, .. }| {
            tasks.begun += 1;
            held = HeldNumber(tasks.begun);
            tasks.by_number.insert(tasks.begun, task);
        });
        held
    }

    /// Moves a task on.
    pub fn moved(&self, held: HeldNumber, state: TaskStage) {
        self.change(|status| {
            if let Some(task) = status.tasks.by_number.get_mut(&held.0) {
                task.state = state;
            }
        });
    }

    /// Moves a task from the held ones to the ended ones and counts its end.
    pub fn ended(&self, held: HeldNumber, record: Arc<TaskRecord>) {
        self.change(|status| {
            status.tasks.by_number.remove(&held.0);
            *status.ended.entry(record.outcome).or_default() += 1;
            status.unreported += u64::from(record.report == ReportState::Refused);
            if status.recent.len() >= RECENT_MAX {
                status.recent.pop_front();
            }
            status.recent.push_back(record);
        });
    }

    /// Says what became of a report that waited.
    pub fn settled(&self, task: &TaskId, report: ReportState) {
        self.change(|status| {
            status.unreported += u64::from(report == ReportState::Refused);
            // The same task may have ended here twice: the plane gave it out again.
            let waiting =
                |record: &&mut Arc<TaskRecord>| record.task_id == *task && record.report == ReportState::Waiting;
            if let Some(record) = status.recent.iter_mut().find(waiting) {
                Arc::make_mut(record).report = report;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Outcome;

    fn grant(task: TaskId) -> HeldLease {
        let capability = Capability::parse("/examples/hello/v1").expect("a capability");
        HeldLease::new(Lease::bare(task, capability), Setup::Pending).0
    }

    #[test]
    fn a_task_leased_again_before_its_lost_attempt_has_ended_stays_on_the_page() {
        let board = StatusBoard::new("node".to_owned(), 2, Vec::new(), serde_json::Value::Null);
        let shown = || serde_json::to_value(&*board.now()).expect("a page")["tasks"].clone();
        let lost = grant(Uuid::from_u128(7).into());
        let id = lost.lease.task().to_string();
        let first = board.began(&lost, None);
        let second = board.began(&grant(lost.lease.task().clone()), None);
        board.moved(first, TaskStage::Reporting);
        assert_eq!(shown()[&id]["state"], "setting-up", "what becomes of the lost one is not its own");
        let task_result = TaskResult::bare(Outcome::LeaseLost);
        let record = || Arc::new(TaskRecord::new(&lost.lease, None, &task_result, Duration::ZERO, ReportState::None));
        board.ended(first, record());
        board.moved(first, TaskStage::Running); // a word that comes too late
        board.moved(second, TaskStage::Waiting);
        assert_eq!(shown()[&id]["state"], "waiting");
        board.ended(second, record());
        assert_eq!(shown(), serde_json::json!({}));
    }
}
