//! Runs of the Node Runtime wire. Each is a job with one task, in the one queue of all runs.
//!
//! A run is offered on a stream. It counts as leased once it is acknowledged; until then it still counts as queued.
//! A lease is not renewed: it ends at its deadline. A report must name the current lease.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    Holder, NewToken, Phase, Plane, RUNS, ReceiptKind, State, Task, Word,
    jobs::{BYTES_PER_TASK, JobRefusal, JobRequest, Mode, TaskRequest},
};
use crate::dev::plane::CallRefusal;

/// A run to create.
pub(in crate::dev) struct NewRun {
    /// Its fields as the author's side shows them.
    pub(in crate::dev) fields: Value,
    pub(in crate::dev) bytes: usize,
    pub(in crate::dev) max_attempts: u32,
}

/// A run for a stream.
pub(in crate::dev) struct Offer {
    pub(in crate::dev) run: Uuid,
    pub(in crate::dev) lease: Uuid,
    pub(in crate::dev) deadline: Timestamp,
    /// For data on the domain server.
    pub(in crate::dev) token: NewToken,
    request: Arc<TaskRequest>,
}

impl Offer {
    /// The fields of the run.
    pub(in crate::dev) fn fields(&self) -> &Value {
        &self.request.meta
    }
}

impl Plane {
    /// Stores a run. With an idempotency key, an equal request returns the run of the first request.
    pub(in crate::dev) fn create_run(
        &mut self,
        run: NewRun,
        key: Option<(String, [u8; 32])>,
        now: Timestamp,
    ) -> Result<Uuid, JobRefusal> {
        let task = TaskRequest {
            label: "run".to_owned(),
            stage: "run".into(),
            capability: RUNS.into(),
            mode: Mode::Public,
            capability_filters: Map::new(),
            priority: 0,
            inputs_cids: Vec::new(),
            outputs_prefix: None,
            meta: run.fields,
            max_attempts: run.max_attempts,
        };
        let job = JobRequest {
            domain_id: self.domain_id,
            label: "run".to_owned(),
            priority: 0,
            meta: Value::Null,
            tasks: vec![task],
            edges: Vec::new(),
            bytes: run.bytes,
        };
        self.create(job, key, now)
    }

    /// Offers the next run to a node that has fewer than `max` runs. The original does not count them, and an offer is
    /// a lease.
    pub(in crate::dev) fn offer(&mut self, node: Uuid, name: &Arc<str>, max: usize, now: Timestamp) -> Option<Offer> {
        let origin = self.config.origin;
        if self.held(node, now) >= max && !origin {
            return None;
        }
        let queue_key = *self.ready.get(RUNS)?.first()?;
        let deadline = now + self.config.run_ttl;
        let (phase, expires) = match origin {
            true => (Phase::Leased, deadline),
            false => (Phase::Offered { deadline }, now + self.config.offer_ttl),
        };
        let granted = self.hold(&queue_key, node, phase, expires, now);
        let task = self.tasks.get_mut(&granted.task).expect("just held");
        task.runs_on = Some(name.clone());
        Some(Offer {
            run: granted.task,
            lease: granted.lease,
            deadline,
            token: granted.token,
            request: granted.request,
        })
    }

    /// The run has arrived at its node: it is leased. A repeat is allowed.
    pub(in crate::dev) fn acknowledge(&mut self, run: Uuid, by: Holder, now: Timestamp) -> Result<(), CallRefusal> {
        self.expire(now);
        let known = self.tasks.get_mut(&run).ok_or(CallRefusal::Unknown)?;
        let hold = match &mut known.state {
            State::Held(hold) if by.is(hold.node, hold.lease) => hold,
            // The report has overtaken the acknowledgement.
            _ if known.receipts.iter().any(|receipt| by.is(receipt.node, receipt.lease)) => return Ok(()),
            _ => return Err(CallRefusal::NotHeld),
        };
        let Phase::Offered { deadline } = hold.phase else { return Ok(()) };
        self.expiries.remove(&(hold.expires, run));
        hold.phase = Phase::Leased;
        hold.expires = deadline + self.config.run_report_time;
        self.expiries.insert((hold.expires, run));
        known.attempts += 1;
        known.updated_at = now;
        let job = known.job;
        self.recount(job, Word::Queued, Word::Leased);
        Ok(())
    }

    /// Stores the completion of a run.
    pub(in crate::dev) fn complete_run(
        &mut self,
        run: Uuid,
        by: Holder,
        report: Value,
        bytes: usize,
        now: Timestamp,
    ) -> Result<(), CallRefusal> {
        // A run is its own job.
        if let (Some(State::Held(_)), Some(job)) =
            (self.tasks.get(&run).map(|task| &task.state), self.jobs.get_mut(&run))
        {
            job.weight += bytes / BYTES_PER_TASK;
        }
        self.complete(run, by, Vec::new(), report, now)
    }

    /// Ends the lease of a run and queues it again, as a control plane does that has lost the lease.
    pub(in crate::dev) fn queue_again(&mut self, run: Uuid, now: Timestamp) {
        self.expire(now);
        let Some(State::Held(hold)) = self.tasks.get(&run).map(|task| &task.state) else { return };
        self.release(run, hold.node);
        self.enter(run, State::Ready, now);
    }

    /// Whether the run is queued, for an attempt that can follow.
    pub(in crate::dev) fn is_queued(&self, run: Uuid) -> bool {
        matches!(self.tasks.get(&run).map(|task| &task.state), Some(State::Ready))
    }

    /// A run as the author's side shows it. `None`: there is no such run.
    pub(in crate::dev) fn run(&mut self, id: Uuid, now: Timestamp) -> Option<Value> {
        self.expire(now);
        self.tasks.get(&id).filter(|task| task.request.is_run()).map(|task| self.run_fields(task))
    }

    /// The newest runs, newest first.
    pub(in crate::dev) fn runs(&mut self, max: usize, now: Timestamp) -> Vec<Value> {
        self.expire(now);
        let tasks = self.order.values().rev().map(|id| &self.tasks[&self.jobs[id].tasks[0]]);
        tasks.filter(|task| task.request.is_run()).take(max).map(|task| self.run_fields(task)).collect()
    }

    fn run_fields(&self, task: &Task) -> Value {
        let cancelled = self.jobs[&task.job].canceled;
        let status = match task.state.word() {
            _ if cancelled => "cancelled",
            Word::Queued => "pending",
            Word::Leased | Word::Running => "assigned",
            Word::Completed => "completed",
            Word::Failed => "failed",
            Word::Canceled => "cancelled",
        };
        let last = task.receipts.last().filter(|_| !cancelled);
        let completion = last.filter(|receipt| receipt.kind == ReceiptKind::Completed);
        let failure = last.filter(|receipt| receipt.kind != ReceiptKind::Completed);
        let error = failure
            .map(|receipt| json!({ "errorMessage": receipt.meta["reason"], "errorDetails": receipt.meta["details"] }));
        let mut fields = task.request.meta.as_object().cloned().unwrap_or_default();
        for (name, value) in [
            ("runId", json!(task.id)),
            ("status", json!(status)),
            ("nodeId", json!(task.runs_on.as_deref())),
            ("attempts", json!(task.attempts)),
            ("maxAttempts", json!(task.request.max_attempts())),
            ("result", completion.map_or(Value::Null, |receipt| receipt.meta["result"].clone())),
            ("timings", last.map_or(Value::Null, |receipt| receipt.meta["timings"].clone())),
            ("costs", completion.map_or(Value::Null, |receipt| receipt.meta["costs"].clone())),
            ("errorInfo", json!(error)),
            ("createdAt", json!(task.created_at)),
        ] {
            fields.insert(name.to_owned(), value);
        }
        Value::Object(fields)
    }
}
