//! The queue of both wires: who may run a task, who holds it, and how it ended (posemesh.md section 4).
//!
//! It is a pure state machine without clock or socket. Every call gets `now` and first ends the expired leases. So
//! each answer is as current as a timer could make it. No call scans all tasks. Ready tasks are in one ordered queue
//! per capability, and held tasks in one queue ordered by expiry. Jobs are created in [`jobs`] and shown to authors
//! in [`view`]. Nothing survives a restart.
//!
//! A run of the Node Runtime wire is a job with one task: see `runs`. Nodes of that wire name no capabilities, so all
//! runs are in one queue.

pub(super) mod jobs;
#[cfg(feature = "grpc")]
pub(super) mod runs;
#[cfg(test)]
mod tests;
pub(super) mod view;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Config, identity::Node};
use jobs::{Job, TaskRequest};

/// Events stored for one task. Only the newest are kept (posemesh.md section 4.13.7: "recent ones only").
const EVENTS_MAX: usize = 64;
/// Replaced domain tokens stored for one lease. One renewal per grace period needs one entry. The other entries are
/// for tokens that are renewed early.
const OLD_TOKENS_MAX: usize = 8;
/// The queue of all runs. No capability has this name.
const RUNS: &str = "";

/// See the module documentation.
pub(super) struct Plane {
    config: Arc<Config>,
    domain_id: Uuid,
    org: Uuid,
    tasks: HashMap<Uuid, Task>,
    jobs: HashMap<Uuid, Job>,
    /// Jobs by age.
    order: BTreeMap<u64, Uuid>,
    /// Queues with ready tasks, each with its tasks in the order of leasing. A queue has the name of a capability, or
    /// is [`RUNS`].
    ready: HashMap<Arc<str>, BTreeSet<QueueKey>>,
    /// Held tasks, ordered by the end of their lease.
    expiries: BTreeSet<(Timestamp, Uuid)>,
    slots: HashMap<Uuid, Slot>,
    /// Idempotency keys, each with the digest of its request and its job.
    keys: HashMap<String, ([u8; 32], Uuid)>,
    /// Ended jobs, oldest first. The field after it is the sum of their weights.
    ended: VecDeque<Uuid>,
    ended_weight: usize,
    serial: u64,
}

/// The position of a ready task in its queue: priority of the job, then of the task, then age.
type QueueKey = (Reverse<u32>, Reverse<i32>, u64, Uuid);

/// What the plane stores about a node between polls.
#[derive(Default)]
struct Slot {
    held: usize,
    /// The capability that was leased last. The next poll starts after it.
    last: Option<Arc<str>>,
}

pub(super) struct Task {
    id: Uuid,
    job: Uuid,
    request: Arc<TaskRequest>,
    queue_key: QueueKey,
    /// Number of leases so far, including a current one. A lease of a run counts when it is acknowledged.
    attempts: u64,
    /// Number of the next domain token. It continues from lease to lease. A token of an earlier lease must not be
    /// valid for the present holder's lease.
    next_token: u64,
    state: State,
    progress: Value,
    events: VecDeque<Value>,
    receipts: Vec<Receipt>,
    created_at: Timestamp,
    updated_at: Timestamp,
    last_heartbeat_at: Option<Timestamp>,
    /// The name of the last node that was offered this run.
    #[cfg_attr(not(feature = "grpc"), expect(dead_code, reason = "only the other wire has runs"))]
    runs_on: Option<Arc<str>>,
}

enum State {
    /// A stage before its own is not complete.
    Blocked,
    /// In the queue of its capability.
    Ready,
    Held(Hold),
    Ended {
        end: End,
        /// The last holder, if a lease was active when the task ended.
        node: Option<Uuid>,
    },
}

struct Hold {
    node: Uuid,
    /// Names this lease among all leases of the task.
    lease: Uuid,
    expires: Timestamp,
    phase: Phase,
    cancel_requested_at: Option<Timestamp>,
    token: HeldToken,
}

#[derive(Clone, Copy)]
enum Phase {
    /// A run that was sent and not acknowledged. It still counts as queued, and costs no attempt.
    #[cfg_attr(not(feature = "grpc"), expect(dead_code, reason = "only the other wire offers"))]
    Offered {
        /// The end of the lease after the acknowledgement.
        deadline: Timestamp,
    },
    Leased,
    /// The holder has sent a heartbeat.
    Running,
}

/// Who makes a call about a task: a node, and its lease if the wire names one.
#[derive(Clone, Copy)]
pub(super) struct Holder {
    pub(super) node: Uuid,
    pub(super) lease: Option<Uuid>,
}

impl Holder {
    fn is(&self, node: Uuid, lease: Uuid) -> bool {
        self.node == node && self.lease.is_none_or(|own| own == lease)
    }
}

impl From<Uuid> for Holder {
    fn from(node: Uuid) -> Self {
        Self { node, lease: None }
    }
}

/// The valid domain tokens of a lease. The text of a token is not stored, because the token contains its number.
struct HeldToken {
    serial: u64,
    issued: Timestamp,
    expires: Timestamp,
    /// Replaced tokens, each with the end of its grace period.
    old: VecDeque<(u64, Timestamp)>,
    /// A call with an invalid token was rejected. The next heartbeat returns a new token.
    refused: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Completed,
    Failed,
    Canceled,
}

/// The status words of posemesh.md section 4.13.8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    Queued,
    Leased,
    Running,
    Completed,
    Failed,
    Canceled,
}

struct Receipt {
    id: Uuid,
    node: Uuid,
    lease: Uuid,
    kind: ReceiptKind,
    outputs: Vec<String>,
    meta: Value,
    created_at: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ReceiptKind {
    Completed,
    Failed,
    /// Set by the plane when the last attempt's lease expired.
    Expired,
}

/// A new lease.
pub(super) struct Granted {
    pub(super) task: Uuid,
    #[cfg_attr(not(feature = "grpc"), expect(dead_code, reason = "only the other wire names leases"))]
    pub(super) lease: Uuid,
    pub(super) job: Uuid,
    pub(super) request: Arc<TaskRequest>,
    pub(super) attempts: u64,
    pub(super) expires: Timestamp,
    pub(super) token: NewToken,
}

/// The data of a domain token that the caller must write.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NewToken {
    pub(super) serial: u64,
    pub(super) expires: Timestamp,
}

/// The node holds the maximum number of leases.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Busy;

/// The answer to a heartbeat.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeartbeatAnswer {
    /// The lease is extended.
    Extended { expires: Timestamp, token: Option<NewToken> },
    /// The node must stop. No further call is expected.
    Cancel,
}

/// The reason why a call about a task was rejected.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CallRefusal {
    /// No such task, or no longer.
    Unknown,
    /// The caller does not hold the task.
    NotHeld,
}

/// Whether a task's domain token is valid at the domain server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Open,
    Closed,
}

impl Plane {
    pub(super) fn new(config: Arc<Config>, domain_id: Uuid, org: Uuid) -> Self {
        Self {
            config,
            domain_id,
            org,
            tasks: HashMap::new(),
            jobs: HashMap::new(),
            order: BTreeMap::new(),
            ready: HashMap::new(),
            expiries: BTreeSet::new(),
            slots: HashMap::new(),
            keys: HashMap::new(),
            ended: VecDeque::new(),
            ended_weight: 0,
            serial: 0,
        }
    }

    /// Leases the next task to `node`. `only` restricts the capabilities unless it is empty. `job` restricts the
    /// jobs, as the oldest nodes request. The capabilities alternate. Within one capability, the order of [`QueueKey`]
    /// applies.
    pub(super) fn lease(
        &mut self,
        node: &Node,
        only: &[&str],
        job: Option<Uuid>,
        now: Timestamp,
    ) -> Result<Option<Granted>, Busy> {
        self.expire(now);
        let slot = self.slots.entry(node.id).or_default();
        if self.config.leases_per_node.is_some_and(|max| slot.held >= max) {
            return Err(Busy);
        }
        let names = &node.capabilities;
        let behind = slot.last.as_ref().and_then(|last| names.iter().position(|name| name == last));
        let first = behind.map_or(0, |at| at + 1);
        let found = (0..names.len())
            .map(|step| &names[(first + step) % names.len()])
            .filter(|name| only.is_empty() || only.contains(&&***name))
            .find_map(|name| {
                let queue = self.ready.get(name)?;
                let queue_key = match job {
                    None => queue.first(),
                    Some(job) => {
                        queue.iter().find(|queue_key| self.tasks.get(&queue_key.3).is_some_and(|task| task.job == job))
                    }
                };
                Some((name.clone(), *queue_key?))
            });
        let Some((name, queue_key)) = found else { return Ok(None) };

        slot.last = Some(name);
        Ok(Some(self.hold(&queue_key, node.id, Phase::Leased, now + self.config.lease_ttl, now)))
    }

    /// Moves a ready task from its queue to a node.
    fn hold(&mut self, queue_key: &QueueKey, node: Uuid, phase: Phase, expires: Timestamp, now: Timestamp) -> Granted {
        self.slots.entry(node).or_default().held += 1;
        let task = self.tasks.get_mut(&queue_key.3).expect("queues name known tasks");
        let request = task.request.clone();
        let token_expires = match phase {
            // No heartbeat renews the token of a run.
            Phase::Offered { deadline } => deadline + self.config.run_report_time,
            Phase::Leased | Phase::Running => now + self.config.domain_token_ttl,
        };
        let token = NewToken { serial: task.next_token, expires: token_expires };
        task.next_token += 1;
        if !matches!(phase, Phase::Offered { .. }) {
            task.attempts += 1;
        }
        task.progress = Value::Null;
        task.updated_at = now;
        let held_token = HeldToken {
            serial: token.serial,
            issued: now,
            expires: token.expires,
            old: VecDeque::new(),
            refused: false,
        };
        let lease = Uuid::new_v4();
        let granted = Granted {
            task: task.id,
            lease,
            job: task.job,
            request: request.clone(),
            attempts: task.attempts,
            expires,
            token,
        };
        self.leave_queue(&request.capability, queue_key);
        let hold = Hold { node, lease, expires, phase, cancel_requested_at: None, token: held_token };
        self.expiries.insert((expires, queue_key.3));
        self.enter(queue_key.3, State::Held(hold), now);
        granted
    }

    /// A heartbeat: extends the lease and stores progress (`null`: none) and events.
    pub(super) fn heartbeat(
        &mut self,
        task: Uuid,
        node: Uuid,
        progress: Value,
        events: Vec<Value>,
        now: Timestamp,
    ) -> Result<HeartbeatAnswer, CallRefusal> {
        self.expire(now);
        let known = self.tasks.get_mut(&task).ok_or(CallRefusal::Unknown)?;
        let hold = match &mut known.state {
            State::Held(hold) if hold.node == node => hold,
            // The earlier answer with the cancel may have been lost.
            State::Ended { end: End::Canceled, node: Some(last) } if *last == node => {
                return Ok(HeartbeatAnswer::Cancel);
            }
            _ => return Err(CallRefusal::NotHeld),
        };
        if !progress.is_null() {
            known.progress = progress;
        }
        known.events.extend(events);
        let dropped_events = known.events.len().saturating_sub(EVENTS_MAX);
        known.events.drain(..dropped_events);
        known.last_heartbeat_at = Some(now);
        known.updated_at = now;
        if hold.cancel_requested_at.is_some() {
            self.release(task, node);
            self.enter(task, State::Ended { end: End::Canceled, node: Some(node) }, now);
            return Ok(HeartbeatAnswer::Cancel);
        }
        let first = !matches!(hold.phase, Phase::Running);
        hold.phase = Phase::Running;
        let expires = now + self.config.lease_ttl;
        self.expiries.remove(&(hold.expires, task));
        self.expiries.insert((expires, task));
        hold.expires = expires;
        let token = hold.token.renew(&mut known.next_token, &self.config, now);
        if first {
            let job = known.job;
            self.recount(job, Word::Leased, Word::Running);
        }
        Ok(HeartbeatAnswer::Extended { expires, token })
    }

    /// A completion. A repeat is allowed.
    pub(super) fn complete(
        &mut self,
        task: Uuid,
        by: impl Into<Holder>,
        outputs: Vec<String>,
        meta: Value,
        now: Timestamp,
    ) -> Result<(), CallRefusal> {
        let by = by.into();
        if self.end_lease(task, by, ReceiptKind::Completed, outputs, meta, now)? {
            // The task is complete. A cancel that the node had not received has no effect.
            self.enter(task, State::Ended { end: End::Completed, node: Some(by.node) }, now);
        }
        Ok(())
    }

    /// A failure: costs an attempt. A repeat is allowed. The task is queued again if `retry` and attempts are left.
    pub(super) fn fail(
        &mut self,
        task: Uuid,
        by: impl Into<Holder>,
        meta: Value,
        retry: bool,
        now: Timestamp,
    ) -> Result<(), CallRefusal> {
        let (by, cancelled) = (by.into(), self.cancel_requested(task));
        if self.end_lease(task, by, ReceiptKind::Failed, Vec::new(), meta, now)? {
            self.after_attempt(task, by.node, cancelled, retry, now);
        }
        Ok(())
    }

    /// Ends the lease with a receipt. `false`: the report was a repeat, and nothing has changed.
    fn end_lease(
        &mut self,
        task: Uuid,
        by: Holder,
        kind: ReceiptKind,
        outputs: Vec<String>,
        meta: Value,
        now: Timestamp,
    ) -> Result<bool, CallRefusal> {
        self.expire(now);
        let known = self.tasks.get_mut(&task).ok_or(CallRefusal::Unknown)?;
        let lease = match &known.state {
            State::Held(hold) if by.is(hold.node, hold.lease) => {
                // A report is an acknowledgement too.
                known.attempts += u64::from(matches!(hold.phase, Phase::Offered { .. }));
                hold.lease
            }
            _ if known.receipts.iter().any(|receipt| by.is(receipt.node, receipt.lease) && receipt.kind == kind) => {
                return Ok(false);
            }
            _ => return Err(CallRefusal::NotHeld),
        };
        known.receipts.push(Receipt { id: Uuid::new_v4(), node: by.node, lease, kind, outputs, meta, created_at: now });
        known.updated_at = now;
        self.release(task, by.node);
        Ok(true)
    }

    /// Re-queues a task whose attempt failed or expired, if it may be retried and attempts are left.
    fn after_attempt(&mut self, task: Uuid, node: Uuid, cancelled: bool, retry: bool, now: Timestamp) {
        let known = &self.tasks[&task];
        let state = if cancelled {
            State::Ended { end: End::Canceled, node: Some(node) }
        } else if retry && known.attempts < known.request.max_attempts() {
            State::Ready
        } else {
            State::Ended { end: End::Failed, node: Some(node) }
        };
        self.enter(task, state, now);
    }

    /// Ends the expired leases.
    pub(super) fn expire(&mut self, now: Timestamp) {
        while let Some(&(expires, task)) = self.expiries.first() {
            if expires > now {
                break;
            }
            let known = self.tasks.get_mut(&task).expect("expiries name known tasks");
            let State::Held(hold) = &known.state else { unreachable!("expiries name held tasks") };
            let (node, lease, cancelled) = (hold.node, hold.lease, hold.cancel_requested_at.is_some());
            let offered = matches!(hold.phase, Phase::Offered { .. });
            // The original leases such a run again without end.
            let endless = self.config.origin && known.request.is_run() && !cancelled;
            tracing::info!(event = "dev.lease_expired", task_id = %task, attempt = known.attempts, "lease expired");
            if !offered && !cancelled && !endless && known.attempts >= known.request.max_attempts() {
                let reason = format!("lease expired on attempt {} of {}", known.attempts, known.request.max_attempts());
                let meta = json!({ "reason": reason, "details": null });
                let (id, kind) = (Uuid::new_v4(), ReceiptKind::Expired);
                let outputs = Vec::new();
                known.receipts.push(Receipt { id, node, lease, kind, outputs, meta, created_at: now });
            }
            self.release(task, node);
            if endless {
                self.enter(task, State::Ready, now);
            } else {
                self.after_attempt(task, node, cancelled, true, now);
            }
        }
    }

    /// Whether the token number `serial` of `task` is still valid.
    pub(super) fn admit(&mut self, task: Uuid, serial: u64, now: Timestamp) -> Admission {
        self.expire(now);
        let Some(State::Held(hold)) = self.tasks.get_mut(&task).map(|task| &mut task.state) else {
            return Admission::Closed;
        };
        let token = &mut hold.token;
        let current = serial == token.serial && now < token.expires;
        if current || token.old.iter().any(|(old, until)| *old == serial && now < *until) {
            return Admission::Open;
        }
        token.refused = true;
        Admission::Closed
    }

    /// Records that an expired token of `task` was used. The task's next heartbeat returns a newer token.
    pub(super) fn refused(&mut self, task: Uuid) {
        if let Some(State::Held(hold)) = self.tasks.get_mut(&task).map(|task| &mut task.state) {
            hold.token.refused = true;
        }
    }

    /// Revokes the token number `serial` of `task` before it expires. The next heartbeat returns another.
    pub(super) fn revoke(&mut self, task: Uuid, serial: u64, now: Timestamp) {
        if let Some(State::Held(hold)) = self.tasks.get_mut(&task).map(|task| &mut task.state) {
            let token = &mut hold.token;
            token.old.retain(|(old, _)| *old != serial);
            if token.serial == serial {
                token.expires = token.expires.min(now);
            }
        }
    }

    /// Moves the lease of a held task to a node that does not exist. The task is queued again when that lease
    /// expires. This costs an attempt.
    pub(super) fn steal(&mut self, task: Uuid, now: Timestamp) {
        self.expire(now);
        let Some(State::Held(hold)) = self.tasks.get(&task).map(|task| &task.state) else { return };
        self.release(task, hold.node);
        let expires = now + self.config.lease_ttl;
        let known = self.tasks.get_mut(&task).expect("just seen");
        known.attempts += 1;
        let token =
            HeldToken { serial: known.next_token, issued: now, expires: now, old: VecDeque::new(), refused: false };
        known.next_token += 1;
        let (node, lease) = (Uuid::new_v4(), Uuid::new_v4());
        let hold = Hold { node, lease, expires, phase: Phase::Leased, cancel_requested_at: None, token };
        self.expiries.insert((expires, task));
        self.enter(task, State::Held(hold), now);
    }

    /// Number of leases that a node holds.
    pub(super) fn held(&mut self, node: Uuid, now: Timestamp) -> usize {
        self.expire(now);
        self.slots.get(&node).map_or(0, |slot| slot.held)
    }

    fn cancel_requested(&self, task: Uuid) -> bool {
        matches!(self.tasks.get(&task).map(|task| &task.state),
            Some(State::Held(hold)) if hold.cancel_requested_at.is_some())
    }

    /// Takes the lease from its node. The caller sets the task's next state.
    fn release(&mut self, task: Uuid, node: Uuid) {
        if let Some(State::Held(hold)) = self.tasks.get(&task).map(|task| &task.state) {
            self.expiries.remove(&(hold.expires, task));
        }
        if let Some(slot) = self.slots.get_mut(&node) {
            slot.held -= 1;
        }
    }

    fn leave_queue(&mut self, name: &str, queue_key: &QueueKey) {
        if let Some(queue) = self.ready.get_mut(name) {
            queue.remove(queue_key);
            // An author may use any number of capabilities over time.
            if queue.is_empty() {
                self.ready.remove(name);
            }
        }
    }

    /// The only function that changes the state of a task. It keeps counts, queues and dependent stages consistent.
    fn enter(&mut self, id: Uuid, state: State, now: Timestamp) {
        let task = self.tasks.get_mut(&id).expect("states change of known tasks");
        let before = task.state.word();
        let (job, queue_key, request) = (task.job, task.queue_key, task.request.clone());
        if matches!(task.state, State::Ready) && !matches!(state, State::Ready | State::Held(_)) {
            task.state = state;
            self.leave_queue(&request.capability, &queue_key);
        } else {
            task.state = state;
        }
        let task = self.tasks.get_mut(&id).expect("just seen");
        task.updated_at = now;
        let after = task.state.word();
        let end = if let State::Ended { end, .. } = task.state { Some(end) } else { None };
        if matches!(task.state, State::Ready) {
            self.ready.entry(request.capability.clone()).or_default().insert(queue_key);
        }
        self.recount(job, before, after);
        if let Some(end) = end {
            self.task_ended(job, id, end, now);
        }
    }
}

impl HeldToken {
    fn renew(&mut self, next: &mut u64, config: &Config, now: Timestamp) -> Option<NewToken> {
        let age = now.duration_since(self.issued).unsigned_abs();
        if !self.refused && age < config.domain_token_renew_after && now < self.expires {
            return None;
        }
        self.old.retain(|(_, until)| now < *until);
        self.old.push_back((self.serial, self.expires.min(now + config.domain_token_grace)));
        if self.old.len() > OLD_TOKENS_MAX {
            self.old.pop_front();
        }
        self.serial = *next;
        *next += 1;
        self.issued = now;
        self.expires = now + config.domain_token_ttl;
        self.refused = false;
        Some(NewToken { serial: self.serial, expires: self.expires })
    }
}

impl State {
    fn word(&self) -> Word {
        match self {
            Self::Blocked | Self::Ready => Word::Queued,
            Self::Held(hold) => match hold.phase {
                Phase::Offered { .. } => Word::Queued,
                Phase::Leased => Word::Leased,
                Phase::Running => Word::Running,
            },
            Self::Ended { end: End::Completed, .. } => Word::Completed,
            Self::Ended { end: End::Failed, .. } => Word::Failed,
            Self::Ended { end: End::Canceled, .. } => Word::Canceled,
        }
    }
}

impl Word {
    pub(super) const ALL: [Self; 6] =
        [Self::Queued, Self::Leased, Self::Running, Self::Completed, Self::Failed, Self::Canceled];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Leased => "leased",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Canceled => "canceled",
        }
    }
}
