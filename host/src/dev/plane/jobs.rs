//! Jobs: the request of an author, its checks, and the effects of a task's end (posemesh.md section 4.13).

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{End, Plane, RUNS, State, Task, Word};
use crate::model::Capability;

/// The body of `POST /jobs`.
#[derive(Deserialize)]
pub(in crate::dev) struct JobRequest {
    pub(super) domain_id: Uuid,
    pub(super) label: String,
    #[serde(default)]
    pub(super) priority: u32,
    #[serde(default = "empty_object")]
    pub(super) meta: Value,
    pub(in crate::dev) tasks: Vec<TaskRequest>,
    #[serde(default)]
    pub(super) edges: Vec<Edge>,
    /// The size of a run.
    #[serde(skip)]
    pub(super) bytes: usize,
}

/// Bytes of a run that count as much as one finished task.
pub(super) const BYTES_PER_TASK: usize = 1024;

/// One task of a job request.
#[derive(Deserialize)]
pub(in crate::dev) struct TaskRequest {
    pub(in crate::dev) label: String,
    #[serde(deserialize_with = "shared")]
    pub(in crate::dev) stage: Arc<str>,
    #[serde(deserialize_with = "shared")]
    pub(in crate::dev) capability: Arc<str>,
    #[serde(default)]
    pub(in crate::dev) mode: Mode,
    #[serde(default)]
    pub(in crate::dev) capability_filters: Map<String, Value>,
    #[serde(default)]
    pub(in crate::dev) priority: i32,
    #[serde(default)]
    pub(in crate::dev) inputs_cids: Vec<String>,
    #[serde(default)]
    pub(in crate::dev) outputs_prefix: Option<String>,
    #[serde(default = "empty_object")]
    pub(in crate::dev) meta: Value,
    #[serde(default = "three")]
    pub(super) max_attempts: u32,
}

impl TaskRequest {
    /// The number of attempts. 0 is treated as 1.
    pub(in crate::dev) fn max_attempts(&self) -> u64 {
        u64::from(self.max_attempts.max(1))
    }

    /// Whether it is a run, which `meta` describes.
    pub(super) fn is_run(&self) -> bool {
        *self.capability == *RUNS
    }
}

/// Who may serve a task. This dev server has one organisation, so both values have the same effect.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::dev) enum Mode {
    #[default]
    Public,
    Dedicated,
}

impl Mode {
    pub(in crate::dev) fn text(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::Dedicated => "dedicated",
        }
    }
}

#[derive(Deserialize)]
pub(in crate::dev) struct Edge {
    #[serde(deserialize_with = "shared")]
    from: Arc<str>,
    #[serde(deserialize_with = "shared")]
    to: Arc<str>,
}

/// Text that many tasks share in memory.
fn shared<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Arc<str>, D::Error> {
    String::deserialize(from).map(Arc::from)
}

fn empty_object() -> Value {
    Value::Object(Map::new())
}

fn three() -> u32 {
    3
}

pub(in crate::dev) struct Job {
    pub(super) id: Uuid,
    pub(super) serial: u64,
    pub(super) label: String,
    pub(super) priority: u32,
    pub(super) meta: Value,
    pub(super) tasks: Vec<Uuid>,
    pub(super) capabilities: HashSet<Arc<str>>,
    stages: HashMap<Arc<str>, Stage>,
    /// Tasks by [`Word`].
    pub(super) counts: [usize; 6],
    /// At least one of its tasks was leased.
    started: bool,
    pub(super) canceled: bool,
    key: Option<String>,
    /// Its share of [`Config::finished_tasks_max`](crate::dev::Config::finished_tasks_max).
    pub(super) weight: usize,
    pub(super) created_at: Timestamp,
    pub(super) updated_at: Timestamp,
}

/// The tasks of one stage, and the stages that depend on it.
#[derive(Default)]
struct Stage {
    tasks: Vec<Uuid>,
    next: BTreeSet<Arc<str>>,
    /// Tasks of earlier stages that are not completed.
    waits_for: u64,
}

/// The reason why a job was rejected. Each text is one line.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::dev) enum JobRefusal {
    /// The job can never run.
    Invalid(String),
    /// The key was used for another request.
    KeyReused,
}

/// Parses and checks a job.
pub(in crate::dev) fn parse(body: Value, domain_id: Uuid) -> Result<JobRequest, JobRefusal> {
    let request: JobRequest =
        serde_json::from_value(body).map_err(|err| JobRefusal::Invalid(format!("the job cannot be read: {err}")))?;
    check(&request, domain_id).map_err(JobRefusal::Invalid)?;
    Ok(request)
}

fn check(request: &JobRequest, domain_id: Uuid) -> Result<(), String> {
    if request.domain_id != domain_id {
        return Err(format!("domain_id is {}, this dev server has {domain_id}", request.domain_id));
    }
    if request.tasks.is_empty() {
        return Err("tasks is empty, expected at least one task".to_owned());
    }
    for (at, task) in request.tasks.iter().enumerate() {
        Capability::from_wire(&task.capability).map_err(|err| format!("tasks[{at}]: {err}"))?;
        if task.stage.trim().is_empty() {
            return Err(format!("tasks[{at}]: stage is empty, expected a name"));
        }
        if let Some((name, _)) = task.capability_filters.iter().find(|(_, value)| !value.is_string()) {
            return Err(format!("tasks[{at}]: capability_filters.{name} is not text"));
        }
    }
    let stages: HashSet<&str> = request.tasks.iter().map(|task| &*task.stage).collect();
    for (at, edge) in request.edges.iter().enumerate() {
        if edge.from == edge.to {
            return Err(format!("edges[{at}]: stage {:?} cannot wait for itself", edge.from));
        }
        if let Some(unknown) = [&edge.from, &edge.to].into_iter().find(|stage| !stages.contains(&***stage)) {
            return Err(format!("edges[{at}]: no task has stage {unknown:?}"));
        }
    }
    match on_a_cycle(&stages, &request.edges) {
        Some(stage) => Err(format!("edges: stage {stage:?} would wait for itself through other stages")),
        None => Ok(()),
    }
}

/// Removes stages that no edge leads to until none is left. The remaining stages are in a cycle or behind one.
fn on_a_cycle(stages: &HashSet<&str>, edges: &[Edge]) -> Option<String> {
    let mut into: HashMap<&str, usize> = stages.iter().map(|stage| (*stage, 0)).collect();
    let mut next: HashMap<&str, Vec<&str>> = HashMap::new();
    for edge in edges {
        *into.entry(&edge.to).or_default() += 1;
        next.entry(&edge.from).or_default().push(&edge.to);
    }
    let mut free: Vec<&str> = into.iter().filter(|(_, count)| **count == 0).map(|(stage, _)| *stage).collect();
    while let Some(stage) = free.pop() {
        into.remove(stage);
        for to in next.get(stage).into_iter().flatten() {
            let count = into.get_mut(to).expect("a stage goes after all before it");
            *count -= 1;
            if *count == 0 {
                free.push(to);
            }
        }
    }
    into.into_keys().min().map(ToOwned::to_owned)
}

/// A digest that is equal for equal requests.
pub(in crate::dev) fn fingerprint(body: &Value) -> [u8; 32] {
    Sha256::digest(body.to_string()).into()
}

impl Plane {
    /// Stores a job. With an idempotency key, an equal request returns the job of the first request.
    pub(in crate::dev) fn create(
        &mut self,
        request: JobRequest,
        key: Option<(String, [u8; 32])>,
        now: Timestamp,
    ) -> Result<Uuid, JobRefusal> {
        if let Some((key, print)) = &key
            && let Some((first, job)) = self.keys.get(key)
        {
            return if first == print { Ok(*job) } else { Err(JobRefusal::KeyReused) };
        }
        let id = Uuid::new_v4();
        let serial = self.next_serial();
        let mut stages: HashMap<Arc<str>, Stage> = HashMap::new();
        let mut tasks = Vec::with_capacity(request.tasks.len());
        for task in &request.tasks {
            // A run is one task, and both have its id.
            let task_id = if task.is_run() { id } else { Uuid::new_v4() };
            tasks.push(task_id);
            stages.entry(task.stage.clone()).or_default().tasks.push(task_id);
        }
        for edge in &request.edges {
            let from = stages.get_mut(&edge.from).expect("edges were checked");
            // A duplicate edge counts once.
            if from.next.insert(edge.to.clone()) {
                let count = from.tasks.len() as u64;
                stages.get_mut(&edge.to).expect("edges were checked").waits_for += count;
            }
        }
        let mut counts = [0; 6];
        counts[Word::Queued as usize] = tasks.len();
        let blocked: Vec<bool> = request.tasks.iter().map(|task| stages[&task.stage].waits_for > 0).collect();
        if let Some((key, print)) = &key {
            self.keys.insert(key.clone(), (*print, id));
        }
        self.order.insert(serial, id);
        self.jobs.insert(
            id,
            Job {
                id,
                serial,
                label: request.label,
                priority: request.priority,
                meta: request.meta,
                tasks: tasks.clone(),
                capabilities: request.tasks.iter().map(|task| task.capability.clone()).collect(),
                stages,
                counts,
                started: false,
                canceled: false,
                key: key.map(|(key, _)| key),
                weight: tasks.len() + request.bytes / BYTES_PER_TASK,
                created_at: now,
                updated_at: now,
            },
        );
        for ((task_id, task), blocked) in tasks.into_iter().zip(request.tasks).zip(blocked) {
            let serial = self.next_serial();
            let queue_key = (Reverse(request.priority), Reverse(task.priority), serial, task_id);
            if !blocked {
                self.ready.entry(task.capability.clone()).or_default().insert(queue_key);
            }
            self.tasks.insert(
                task_id,
                Task {
                    id: task_id,
                    job: id,
                    request: Arc::new(task),
                    queue_key,
                    attempts: 0,
                    next_token: 0,
                    state: if blocked { State::Blocked } else { State::Ready },
                    progress: Value::Null,
                    events: VecDeque::new(),
                    receipts: Vec::new(),
                    created_at: now,
                    updated_at: now,
                    last_heartbeat_at: None,
                    runs_on: None,
                },
            );
        }
        Ok(id)
    }

    /// Cancels a job. Queued tasks end at once. Held tasks end at their next heartbeat or by expiry. `None`: no such
    /// job. A repeat is allowed.
    pub(in crate::dev) fn cancel(&mut self, id: Uuid, now: Timestamp) -> Option<Timestamp> {
        self.expire(now);
        let job = self.jobs.get_mut(&id)?;
        if job.open() == 0 || job.canceled {
            return Some(job.updated_at);
        }
        job.canceled = true;
        job.updated_at = now;
        for task in job.tasks.clone() {
            let known = self.tasks.get_mut(&task).expect("the newest ended job is never dropped");
            match &mut known.state {
                State::Blocked | State::Ready => {
                    self.enter(task, State::Ended { end: End::Canceled, node: None }, now);
                }
                State::Held(hold) => {
                    hold.cancel_requested_at = Some(now);
                    known.updated_at = now;
                }
                State::Ended { .. } => {}
            }
        }
        Some(now)
    }

    /// The status word of a job. `None`: no such job.
    pub(in crate::dev) fn job_status(&self, id: Uuid) -> Option<&'static str> {
        self.jobs.get(&id).map(Job::status)
    }

    /// Number of tasks of the job that the given task still waits for.
    pub(super) fn deps_remaining(&self, task: &Task) -> u64 {
        match task.state {
            State::Blocked => self.jobs.get(&task.job).map_or(0, |job| job.stages[&task.request.stage].waits_for),
            _ => 0,
        }
    }

    pub(super) fn recount(&mut self, job: Uuid, before: Word, after: Word) {
        let job = self.jobs.get_mut(&job).expect("tasks belong to known jobs");
        job.counts[before as usize] -= 1;
        job.counts[after as usize] += 1;
        job.started |= matches!(after, Word::Leased);
    }

    /// Applies the end of a task to the job: later stages become ready, or can never run.
    pub(super) fn task_ended(&mut self, job_id: Uuid, task: Uuid, end: End, now: Timestamp) {
        let stage = self.tasks[&task].request.stage.clone();
        let job = self.jobs.get_mut(&job_id).expect("tasks belong to known jobs");
        job.updated_at = now;
        let mut opened = Vec::new();
        let mut cancelled_stages = Vec::new();
        for name in job.stages[&stage].next.clone() {
            let next = job.stages.get_mut(&name).expect("edges were checked");
            if end == End::Completed {
                next.waits_for -= 1;
                if next.waits_for == 0 {
                    opened.extend_from_slice(&next.tasks);
                }
            } else {
                cancelled_stages.extend_from_slice(&next.tasks);
            }
        }
        for id in opened {
            if matches!(self.tasks[&id].state, State::Blocked) {
                self.enter(id, State::Ready, now);
            }
        }
        for id in cancelled_stages {
            if matches!(self.tasks.get(&id).map(|task| &task.state), Some(State::Blocked)) {
                self.enter(id, State::Ended { end: End::Canceled, node: None }, now);
            }
        }
        self.forget_old_jobs(job_id);
    }

    /// Records an ended job. Drops the oldest ended jobs when there are too many tasks.
    fn forget_old_jobs(&mut self, job_id: Uuid) {
        let Some(job) = self.jobs.get(&job_id) else { return };
        if job.open() > 0 || self.ended.back() == Some(&job_id) {
            return;
        }
        self.ended.push_back(job_id);
        self.ended_weight += job.weight;
        // The newest job is kept whatever its size, because its author has not seen its end yet.
        while self.ended_weight > self.config.finished_tasks_max && self.ended.len() > 1 {
            let Some(job) = self.ended.pop_front().and_then(|id| self.jobs.remove(&id)) else { continue };
            self.ended_weight -= job.weight;
            self.order.remove(&job.serial);
            if let Some(key) = &job.key {
                self.keys.remove(key);
            }
            for task in &job.tasks {
                self.tasks.remove(task);
            }
        }
    }

    fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }
}

impl Job {
    /// Number of tasks that have not ended.
    fn open(&self) -> usize {
        self.counts[Word::Queued as usize] + self.counts[Word::Leased as usize] + self.counts[Word::Running as usize]
    }

    /// The status word. A job ends when all its tasks have ended. Until then failed tasks count as running, so that
    /// an end is final.
    pub(super) fn status(&self) -> &'static str {
        if self.canceled {
            "canceled"
        } else if self.open() == 0 {
            if self.counts[Word::Failed as usize] > 0 { "failed" } else { "completed" }
        } else if self.started {
            "running"
        } else {
            "pending"
        }
    }
}
