//! The status of the node: one value that the modules change and `observe` serves.
//!
//! Every key is always present, and `null` means unknown. `docs/operations/status.md` lists the keys, and a test
//! compares it with a running node. A key that changes its meaning needs a new [`STATUS_SCHEMA`].

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
    Artifact, BootInstant, Budget, Capability, DataLocation, Fetched, HeldLease, Lease, MissedHeartbeats,
    NotReadyReason, OutcomeWord, PlaneName, ReadyWhen, Setup, TaskId, TaskResult, TimeLimit, in_a_line, millis,
    watched::Watched,
};

/// The version of `/status.json`. New keys do not change it.
pub const STATUS_SCHEMA: u32 = 1;

/// Most ended tasks that are shown.
const RECENT_MAX: usize = 100;

/// The status of the node in `/status.json`.
#[derive(Clone, Debug, Serialize)]
pub struct HostStatus {
    /// The host's version.
    pub version: &'static str,
    /// When the process began to serve.
    pub started_at: Timestamp,
    /// `starting`, `running`, `draining` or `stopped`.
    pub phase: Phase,
    /// The control planes: the first one without its name, and all by name.
    #[serde(flatten)]
    pub planes: Planes,
    /// When the node is ready.
    #[serde(skip)]
    pub ready_when: ReadyWhen,
    /// Disk space for the tasks' files.
    pub disk: DiskStatus,
    /// Most tasks at once.
    pub slots: usize,
    /// The capabilities that the node serves.
    pub capabilities: Vec<String>,
    /// Functions that have failed while the node still runs, one line each.
    pub degraded: Vec<String>,
    /// Why a thread for a plugin's calls cannot be created, one line.
    pub no_thread: Option<String>,
    /// Tasks held now, shown by id.
    pub tasks: HeldTasks,
    /// Ended tasks by outcome, since the start.
    pub ended: BTreeMap<OutcomeWord, u64>,
    /// Number of reports that the control plane refused permanently.
    pub unreported: u64,
    /// Reports that wait or are being sent.
    pub outbox: OutboxStatus,
    /// Recently ended tasks, the newest last, at most 100.
    pub recent: VecDeque<Arc<TaskRecord>>,
    /// Calls of plugins that named a task that was over or never existed.
    pub stale_calls: Live,
    /// Runners that ignored their cancellation. Their slots were released.
    pub stuck_runners: Live,
    /// Bytes of task data in memory: now, the peak, and the limit.
    pub memory: Budget,
    /// Every library, whether loaded or refused.
    pub plugins: Listings,
}

/// The control planes of the node. There is at least one.
#[derive(Clone, Debug)]
pub struct Planes(pub Vec<PlaneStatus>);

impl Planes {
    /// The first one. The keys of the page without a name show it.
    #[must_use]
    pub fn first(&self) -> &PlaneState {
        &self.0[0].state
    }
}

impl Serialize for Planes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown<'a> {
            #[serde(flatten)]
            first: &'a PlaneState,
            planes: BTreeMap<&'a str, &'a PlaneStatus>,
        }
        let planes = self.0.iter().map(|plane| (plane.name.as_str(), plane)).collect();
        Shown { first: self.first(), planes }.serialize(serializer)
    }
}

/// One control plane.
#[derive(Clone, Debug, Serialize)]
pub struct PlaneStatus {
    /// Its name in the configuration.
    #[serde(skip)]
    pub name: PlaneName,
    /// `posemesh`, `node-runtime` or `local`.
    pub kind: &'static str,
    /// Slots that are kept free for it.
    pub min_slots: usize,
    /// Whether it was ready at least once.
    #[serde(skip)]
    pub has_begun: bool,
    /// Whether it can give work.
    pub ready: bool,
    /// Why it cannot. This list and `ready` are written when they are shown.
    pub not_ready: Vec<NotReadyReason>,
    /// The state of this node there.
    #[serde(flatten)]
    pub state: PlaneState,
}

impl PlaneStatus {
    /// A control plane that is not ready yet.
    #[must_use]
    pub fn new(name: PlaneName, kind: &'static str, min_slots: usize) -> Self {
        let state = PlaneState {
            node: String::new(),
            registration: RegistrationState::default(),
            registration_form: RegistrationForm::Wallet,
            registration_since: Timestamp::now(),
            registration_error: None,
            last_healthcheck: None,
            token_expires_at: None,
            login_error: None,
            plane_error: None,
            polls: PollStatus::default(),
        };
        Self { name, kind, min_slots, has_begun: false, ready: false, not_ready: Vec::new(), state }
    }
}

/// The state of this node on a control plane.
#[derive(Clone, Debug, Serialize)]
pub struct PlaneState {
    /// The node's address on the control plane.
    pub node: String,
    /// The registration state at the sign-in service or the control plane.
    pub registration: RegistrationState,
    /// How the node registers.
    pub registration_form: RegistrationForm,
    /// When the registration entered this state.
    pub registration_since: Timestamp,
    /// The last registration error, one line.
    pub registration_error: Option<String>,
    /// When the sign-in service last requested this node's health.
    pub last_healthcheck: Option<Timestamp>,
    /// When the current node token expires.
    pub token_expires_at: Option<Timestamp>,
    /// Why the last login failed, one line.
    pub login_error: Option<String>,
    /// Why the control plane cannot be used now, one line.
    pub plane_error: Option<String>,
    /// The state of polling.
    pub polls: PollStatus,
}

/// The state of polling the control plane for work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PollStatus {
    /// How many polls in a row have failed.
    pub failed: u32,
    /// Why the last one failed, one line. The first answered poll clears it.
    pub last_error: Option<String>,
    /// A poll has waited for its answer for a long time. `false` after the first answered poll.
    pub unanswered: bool,
}

/// Space on the file system of `SCRATCH_DIR`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskStatus {
    /// The free space. `None` if the system does not return it.
    pub free_bytes: Option<u64>,
    /// Below this, nothing new is leased. 0 means no minimum.
    pub floor_bytes: u64,
    /// Whether the free space is below that minimum.
    pub full: bool,
}

/// Every library, with its state at the time of the request.
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

/// A number that is read when it is shown.
#[derive(Clone)]
pub struct Live(pub Arc<dyn Fn() -> u64 + Send + Sync>);

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Live")
    }
}

impl Serialize for Live {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64((self.0)())
    }
}

/// The phase of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Not registered or signed in yet.
    Starting,
    /// The node leases tasks.
    Running,
    /// No new leases. Running tasks end.
    Draining,
    /// Everything has ended.
    Stopped,
}

/// The registration state at the sign-in service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistrationState {
    /// Not registered. The last attempt was refused, or none was made.
    #[default]
    Disconnected,
    /// A registration is in progress, or is retried soon.
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
    /// With a signed message.
    Wallet,
    /// With a URL at which the service calls back.
    Callback,
    /// No registration: the control plane has no sign-in.
    None,
}

impl RegistrationForm {
    /// The value on the status page and in the log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wallet => "wallet",
            Self::Callback => "callback",
            Self::None => "none",
        }
    }
}

/// The stage of a held task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskStage {
    /// Its session is being opened.
    SettingUp,
    /// It waits because its plugin is full.
    Waiting,
    /// Its runner is running.
    Running,
    /// Its report is being sent.
    Reporting,
}

/// The plugin that serves a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginId {
    /// Name in its manifest.
    pub name: Arc<str>,
    /// SHA-256 of the opened file, in hex.
    pub sha256: Arc<str>,
}

/// The tasks that began and have not ended, each with a unique number. A task may be leased again before its lost
/// attempt has ended.
#[derive(Clone, Debug, Default)]
pub struct HeldTasks {
    begun: u64,
    by_number: BTreeMap<u64, TaskStatus>,
}

/// The number that the board assigned to a task when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldNumber(u64);

impl HeldTasks {
    /// The held tasks with this id, by control plane: the newest one of each. A task that was renamed has two ids.
    #[must_use]
    pub fn with_id(&self, id: &TaskId) -> BTreeMap<&PlaneName, &TaskStatus> {
        let held_leases = self.by_number.values().map(|task| (task, task.held_lease()));
        let tasks = held_leases.filter(|(_, held)| held.lease.task() == id || held.address().task == *id);
        tasks.map(|(task, _)| (&task.plane, task)).collect()
    }

    /// The missed heartbeats, if every held lease of this control plane has missed some. Returns those of the lease that
    /// missed the fewest.
    #[must_use]
    pub fn missed(&self, plane: &PlaneName) -> Option<MissedHeartbeats> {
        let tasks = self.by_number.values().filter(|task| task.plane == *plane);
        tasks.map(|task| task.running.0.missed()).min_by_key(|missed| missed.count)
    }
}

impl Serialize for HeldTasks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Of two tasks with the same id, the newer one is shown: only that one still counts.
        let newest: BTreeMap<String, &TaskStatus> =
            self.by_number.values().map(|task| (task.running.0.lease.task().to_string(), task)).collect();
        serializer.collect_map(newest)
    }
}

/// One held task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskStatus {
    /// The control plane that gave it.
    pub plane: PlaneName,
    /// The capability of the task.
    #[serde(serialize_with = "as_text")]
    pub capability: Capability,
    /// The job of the task.
    pub job_id: Option<Uuid>,
    /// The plugin that serves it.
    #[serde(serialize_with = "name_of_plugin")]
    pub plugin: Option<PluginId>,
    /// Number of this run of the task, as the control plane counts runs.
    pub attempt: Option<u64>,
    /// Its stage.
    pub state: TaskStage,
    /// When it was leased.
    pub since: Timestamp,
    /// How long its run may take, in milliseconds.
    pub time_limit_ms: Option<u64>,
    /// `domain_id`, `lease_expires_at`, `token_expires_at` and `progress_at` (when the runner last reported progress),
    /// as known at the time of the request. Neither a token nor the progress itself is shown. `heartbeats_failed` is
    /// the number that failed in a row. `heartbeat_error` says why the last one failed.
    #[serde(flatten)]
    pub running: RunningTask,
}

impl TaskStatus {
    /// The live view of its lease.
    #[must_use]
    pub fn held_lease(&self) -> &HeldLease {
        &self.running.0
    }
}

/// The values that the control plane and the runner may change while a task is held. They are read when they are shown.
#[derive(Clone)]
pub struct RunningTask(HeldLease);

impl fmt::Debug for RunningTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RunningTask").field(self.0.lease.task()).finish()
    }
}

impl Serialize for RunningTask {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(held_lease) = self;
        let domain = match held_lease.setup_now() {
            Setup::Ready(Ok(DataLocation::DomainServer(at))) => Some(at.domain),
            _ => held_lease.lease.data.domain(),
        };
        let times = [
            ("lease_expires_at", held_lease.deadline().until().on_calendar()),
            ("token_expires_at", held_lease.token_expires_at().and_then(BootInstant::on_calendar)),
            ("progress_at", held_lease.progress.progress_at().and_then(BootInstant::on_calendar)),
        ];
        let MissedHeartbeats { count, error } = held_lease.missed();
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
    /// How many there are. A report counts from the end of its task.
    pub waiting: usize,
    /// About how much memory they take.
    pub bytes: usize,
    /// When the task of the oldest one ended.
    pub oldest: Option<Timestamp>,
    /// How many times that one was sent.
    pub oldest_tries: Option<u32>,
    /// Why the last one sent was not accepted, one line. It is cleared when no report waits.
    pub last_error: Option<String>,
    /// Reports of another control plane or node. They are stored and not sent.
    pub foreign: usize,
    /// Reports that the control plane did not accept for 24 h. They are stored and not sent.
    pub set_aside: usize,
    /// Whether so many reports of a control plane wait that nothing new is leased from it.
    pub full: bool,
    /// These control planes.
    #[serde(skip)]
    pub full_planes: Vec<PlaneName>,
    /// Why reports cannot be written to the disk, one line. Nothing new is leased until they can be written.
    pub not_written: Option<String>,
}

/// Only the name is shown while a task runs.
fn name_of_plugin<S: Serializer>(plugin: &Option<PluginId>, serializer: S) -> Result<S::Ok, S::Error> {
    plugin.as_ref().map(|plugin| &*plugin.name).serialize(serializer)
}

/// Names are formatted when they are shown.
fn as_text<S: Serializer>(name: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(name)
}

/// The state of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReportState {
    /// The control plane accepted it.
    Accepted,
    /// It is in the outbox.
    Waiting,
    /// The control plane refused it permanently.
    Refused,
    /// The control plane did not accept it for 24 h. It is stored and not sent.
    #[serde(rename = "set-aside")]
    SetAside,
    /// An operator dropped it.
    Dropped,
    /// There is no report: the task was cancelled or lost.
    None,
}

/// One ended task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskRecord {
    /// The control plane that gave it.
    pub plane: PlaneName,
    /// The task.
    #[serde(serialize_with = "as_text")]
    pub task_id: TaskId,
    /// The job of the task.
    pub job_id: Option<Uuid>,
    /// The capability of the task.
    #[serde(serialize_with = "as_text")]
    pub capability: Capability,
    /// Number of this run of the task, as the control plane counts runs.
    pub attempt: Option<u64>,
    /// Name of the plugin that served it.
    pub plugin: Option<Arc<str>>,
    /// SHA-256 of that plugin.
    pub plugin_sha256: Option<Arc<str>>,
    /// How it ended, one word.
    pub outcome: OutcomeWord,
    /// The code of the outcome, which distinguishes more cases.
    pub code: &'static str,
    /// Why it ended this way, one line.
    pub reason: Option<String>,
    /// The artifacts that it published.
    pub artifacts: Vec<Artifact>,
    /// The inputs that it read completely.
    pub inputs: Vec<Fetched>,
    /// When it ended.
    pub ended_at: Timestamp,
    /// The time from the lease to its end.
    pub elapsed_ms: u64,
    /// The state of its report.
    pub report: ReportState,
}

impl TaskRecord {
    /// The record of a task that has just ended.
    #[must_use]
    pub fn new(
        plane: &PlaneName,
        lease: &Lease,
        plugin: Option<&PluginId>,
        task_result: &TaskResult,
        took: Duration,
        report: ReportState,
    ) -> Self {
        Self {
            plane: plane.clone(),
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

/// Where modules write and read the status. Cheap to clone. Changes that belong to a control plane go to the one of
/// [`StatusBoard::of_plane`], at first to the first one.
#[derive(Clone)]
pub struct StatusBoard {
    status: Arc<Watched<HostStatus>>,
    plane: usize,
}

impl StatusBoard {
    /// A board for a node that is starting. What is not known yet is empty.
    #[must_use]
    pub fn new(slots: usize, capabilities: Vec<String>) -> Self {
        let plane = PlaneStatus::new(PlaneName::parse("unnamed").expect("a valid name"), "posemesh", 0);
        let status = HostStatus {
            version: env!("CARGO_PKG_VERSION"),
            started_at: Timestamp::now(),
            phase: Phase::Starting,
            planes: Planes(vec![plane]),
            ready_when: ReadyWhen::default(),
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
            stale_calls: Live(Arc::new(|| 0)),
            stuck_runners: Live(Arc::new(|| 0)),
            memory: Budget::unlimited(),
            plugins: Listings(Arc::new(|| serde_json::Value::Null)),
        };
        Self { status: Arc::new(Watched::new(status)), plane: 0 }
    }

    /// The same board for the control plane of this index.
    #[must_use]
    pub fn of_plane(&self, plane: usize) -> Self {
        Self { status: Arc::clone(&self.status), plane }
    }

    /// Changes the state of its control plane.
    pub fn change_plane(&self, change: impl FnOnce(&mut PlaneState)) {
        self.change(|status| change(&mut status.planes.0[self.plane].state));
    }

    /// The registration state at its control plane.
    #[must_use]
    pub fn registration_now(&self) -> RegistrationState {
        self.now().planes.0[self.plane].state.registration
    }

    /// The current status. While the caller holds the guard, every caller that changes the status waits.
    pub fn now(&self) -> MutexGuard<'_, HostStatus> {
        self.status.lock()
    }

    /// Waits until `wanted` accepts the status.
    #[cfg(test)]
    pub(crate) async fn until(&self, mut wanted: impl FnMut(&HostStatus) -> bool) {
        self.status.until(|status| wanted(status).then_some(())).await;
    }

    /// Changes any part of the status.
    pub fn change(&self, change: impl FnOnce(&mut HostStatus)) {
        self.status.change(|status| {
            change(status);
            true
        });
    }

    /// Enters a state of the registration. `error` says why, in one line. Without one, the last error remains until
    /// the node is registered.
    pub fn registration(&self, state: RegistrationState, error: Option<String>) {
        self.change_plane(|status| {
            if status.registration != state {
                status.registration = state;
                status.registration_since = Timestamp::now();
            }
            if error.is_some() || state == RegistrationState::Registered {
                status.registration_error = error;
            }
        });
    }

    /// Records the end of a poll: `None` for an answer, or the error.
    pub fn polled(&self, error: Option<String>) {
        self.change_plane(|PlaneState { polls, .. }| {
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

    /// Records that a poll has waited for its answer for a long time.
    pub fn unanswered(&self) {
        self.change_plane(|status| status.polls.unanswered = true);
    }

    /// Adds a task, the plugin that serves it, and the time limit of its run.
    pub fn began(&self, held_lease: &HeldLease, plugin: Option<PluginId>, time_limit: Option<TimeLimit>) -> HeldNumber {
        let lease = &held_lease.lease;
        let plane = self.now().planes.0[self.plane].name.clone();
        let task = TaskStatus {
            plane,
            capability: lease.capability.clone(),
            job_id: lease.job,
            plugin,
            attempt: lease.attempt,
            state: TaskStage::SettingUp,
            since: Timestamp::now(),
            time_limit_ms: time_limit.map(|limit| millis(limit.wall_time)),
            running: RunningTask(held_lease.clone()),
        };
        let mut held = HeldNumber(0);
        self.change(|HostStatus { tasks, .. }| {
            tasks.begun += 1;
            held = HeldNumber(tasks.begun);
            tasks.by_number.insert(tasks.begun, task);
        });
        held
    }

    /// Changes the stage of a task.
    pub fn moved(&self, held: HeldNumber, state: TaskStage) {
        self.change(|status| {
            if let Some(task) = status.tasks.by_number.get_mut(&held.0) {
                task.state = state;
            }
        });
    }

    /// Moves a task from the held tasks to the ended tasks, and counts its end.
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

    /// Records the new state of a report that waited.
    pub fn settled(&self, task: &TaskId, report: ReportState) {
        self.change(|status| {
            status.unreported += u64::from(report == ReportState::Refused);
            // The same task may have ended here twice: the control plane leased it again.
            let waiting = |record: &&mut Arc<TaskRecord>| {
                record.task_id == *task && matches!(record.report, ReportState::Waiting | ReportState::SetAside)
            };
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

    fn held_lease(task: TaskId) -> HeldLease {
        let capability = Capability::parse("/examples/hello/v1").expect("a capability");
        HeldLease::new(Lease::bare(task, capability), Setup::Pending).0
    }

    #[test]
    fn lost_attempt_does_not_change_newer_attempt_status() {
        let board = StatusBoard::new(2, Vec::new());
        let shown = || serde_json::to_value(&*board.now()).expect("a page")["tasks"].clone();
        let lost = held_lease(Uuid::from_u128(7).into());
        let id = lost.lease.task().to_string();
        let first = board.began(&lost, None, None);
        let second = board.began(&held_lease(lost.lease.task().clone()), None, None);
        board.moved(first, TaskStage::Reporting);
        assert_eq!(shown()[&id]["state"], "setting-up", "what becomes of the lost one is not its own");
        let task_result = TaskResult::bare(Outcome::LeaseLost);
        let plane = PlaneName::parse("p").expect("a name");
        let record =
            || Arc::new(TaskRecord::new(&plane, &lost.lease, None, &task_result, Duration::ZERO, ReportState::None));
        board.ended(first, record());
        board.moved(first, TaskStage::Running); // this change comes too late
        board.moved(second, TaskStage::Waiting);
        assert_eq!(shown()[&id]["state"], "waiting");
        board.ended(second, record());
        assert_eq!(shown(), serde_json::json!({}));
    }
}
