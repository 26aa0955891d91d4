//! Jobs and tasks as authors see them (posemesh.md section 4.13.7). This module reads the state and never changes it.

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{Plane, State, Task, Word, jobs::Job};

/// A list query that is already checked.
pub(in crate::dev) struct Listing {
    pub(in crate::dev) limit: usize,
    /// Jobs older than the one with this serial.
    pub(in crate::dev) before: Option<u64>,
    pub(in crate::dev) status: Option<String>,
    pub(in crate::dev) capabilities: Vec<String>,
    pub(in crate::dev) match_all: bool,
}

impl Plane {
    /// One job with all its fields. `None`: no such job.
    pub(in crate::dev) fn job(&mut self, id: Uuid, now: Timestamp) -> Option<Value> {
        self.expire(now);
        let job = self.jobs.get(&id)?;
        let tasks: Vec<&Task> = job.tasks.iter().map(|id| &self.tasks[id]).collect();
        let receipts: Vec<Value> = tasks.iter().flat_map(|task| receipts(task)).collect();
        let mut answer = self.overview(job);
        answer.insert("tasks".to_owned(), tasks.into_iter().map(|task| self.task(task)).collect());
        answer.insert("receipts".to_owned(), receipts.into());
        Some(Value::Object(answer))
    }

    /// A page of jobs, newest first, and the serial after which the next page starts.
    pub(in crate::dev) fn list(&mut self, query: &Listing, now: Timestamp) -> (Vec<Value>, Option<u64>) {
        self.expire(now);
        let matches = |job: &Job| {
            let wanted = |name: &String| job.capabilities.contains(name.as_str());
            let capable = query.capabilities.is_empty()
                || if query.match_all {
                    query.capabilities.iter().all(wanted)
                } else {
                    query.capabilities.iter().any(wanted)
                };
            let is_run = self.tasks[&job.tasks[0]].request.is_run();
            !is_run && capable && query.status.as_ref().is_none_or(|status| status == job.status())
        };
        let mut found = self
            .order
            .range(..query.before.unwrap_or(u64::MAX))
            .rev()
            .filter_map(|(serial, id)| Some((*serial, self.jobs.get(id)?)))
            .filter(|(_, job)| matches(job));
        let page: Vec<(u64, &Job)> = found.by_ref().take(query.limit).collect();
        // The cursor names the last job shown, so none is skipped between pages.
        let next = if found.next().is_some() { page.last().map(|(serial, _)| *serial) } else { None };
        (page.into_iter().map(|(_, job)| Value::Object(self.overview(job))).collect(), next)
    }

    /// The nodes that hold leases now, with their tasks (`GET /nodes/busy`).
    pub(in crate::dev) fn busy(&mut self, now: Timestamp) -> Vec<Value> {
        self.expire(now);
        let mut seen = std::collections::HashSet::new();
        let held = self.expiries.iter().map(|(_, id)| &self.tasks[id]);
        held.filter_map(|task| {
            let State::Held(hold) = &task.state else { return None };
            // Each node is listed once, whatever the number of its leases.
            seen.insert(hold.node).then(|| {
                json!({
                    "node_id": hold.node, "task_id": task.id, "task_status": task.state.word().text(),
                    "task_mode": task.request.mode.text(), "job_id": task.job,
                    "job_status": self.jobs[&task.job].status(),
                })
            })
        })
        .collect()
    }

    fn overview(&self, job: &Job) -> Map<String, Value> {
        let summary: Map<String, Value> =
            Word::ALL.iter().map(|word| (word.text().to_owned(), job.counts[*word as usize].into())).collect();
        let shown = json!({
            "id": job.id, "domain_id": self.domain_id, "organization_id": self.org, "label": job.label,
            "status": job.status(), "priority": job.priority, "meta": job.meta,
            "created_at": job.created_at, "updated_at": job.updated_at,
            "credit_lock_id": null, "credit_lock_amount": null, "credit_locked_at": null, "credit_released_at": null,
        });
        Map::from_iter([("job".to_owned(), shown), ("tasks_summary".to_owned(), Value::Object(summary))])
    }

    fn task(&self, task: &Task) -> Value {
        let request = &task.request;
        let hold = if let State::Held(hold) = &task.state { Some(hold) } else { None };
        json!({
            "id": task.id, "job_id": task.job, "label": request.label, "stage": &*request.stage,
            "capability": &*request.capability, "capability_filters": request.capability_filters,
            "status": task.state.word().text(), "mode": request.mode.text(), "priority": request.priority,
            "deps_remaining": self.deps_remaining(task), "attempts": task.attempts,
            "max_attempts": request.max_attempts(), "inputs_cids": request.inputs_cids,
            "outputs_prefix": request.outputs_prefix, "meta": meta(task), "organization_id": self.org,
            "reserved_by": hold.map(|hold| hold.node), "lease_expires_at": hold.map(|hold| hold.expires),
            "last_heartbeat_at": task.last_heartbeat_at,
            "cancel_requested_at": hold.and_then(|hold| hold.cancel_requested_at),
            "billing_units": "0", "estimated_credit_cost": "0", "debited_amount": null, "debited_at": null,
            "created_at": task.created_at, "updated_at": task.updated_at,
        })
    }
}

/// The author's meta, merged with the data from heartbeats. A meta that is no object moves to `value`.
fn meta(task: &Task) -> Value {
    let mut meta = match &task.request.meta {
        Value::Object(meta) => meta.clone(),
        Value::Null => Map::new(),
        other => Map::from_iter([("value".to_owned(), other.clone())]),
    };
    if !task.progress.is_null() {
        meta.insert("progress".to_owned(), task.progress.clone());
    }
    if !task.events.is_empty() {
        meta.insert("events".to_owned(), task.events.iter().cloned().collect());
    }
    Value::Object(meta)
}

fn receipts(task: &Task) -> impl Iterator<Item = Value> {
    task.receipts.iter().map(|receipt| {
        json!({
            "id": receipt.id, "job_id": task.job, "task_id": task.id, "node_id": receipt.node,
            "outputs": receipt.outputs, "meta": receipt.meta, "created_at": receipt.created_at,
        })
    })
}
