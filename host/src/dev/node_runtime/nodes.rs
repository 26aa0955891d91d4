//! The registered nodes. Pure state: the caller passes the time.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{number, property};

/// Free slots of a node that states no capacity.
const SLOTS_DEFAULT: i64 = 8;

/// See the module documentation.
#[derive(Default)]
pub(in crate::dev) struct Nodes(BTreeMap<Arc<str>, Node>);

struct Node {
    metadata: Value,
    capacity: Value,
    status: Status,
    heartbeat_at: Timestamp,
}

struct Status {
    state: String,
    active_runs: i64,
    available_slots: i64,
}

/// Whether a node may get a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Schedulable {
    Yes,
    /// Its last heartbeat says that it is full, or not active.
    No,
    Unknown,
}

impl Nodes {
    pub(super) fn knows(&self, id: &str) -> bool {
        self.0.contains_key(id)
    }

    /// Registers a node. A node with this id is replaced. A `full` one gets no run before its first heartbeat.
    pub(super) fn register(&mut self, id: &str, body: &Value, full: bool, now: Timestamp) -> Value {
        let capacity = property(body, "capacity").clone();
        let available_slots = if full { 0 } else { capacity["slots"].as_i64().unwrap_or(SLOTS_DEFAULT) };
        let status = Status { state: "active".to_owned(), active_runs: 0, available_slots };
        let node = Node { metadata: property(body, "metadata").clone(), capacity, status, heartbeat_at: now };
        let shown = node.show(id);
        self.0.insert(id.into(), node);
        shown
    }

    /// Replaces the status of a node. `None`: it is unknown.
    pub(super) fn heartbeat(&mut self, id: &str, body: &Value, now: Timestamp) -> Option<Value> {
        let node = self.0.get_mut(id)?;
        let status = property(body, "status");
        let count = |name| number(property(status, name)).unwrap_or_default();
        node.status = Status {
            state: property(status, "state").as_str().unwrap_or("active").to_owned(),
            active_runs: count("activeRuns"),
            available_slots: count("availableSlots"),
        };
        node.heartbeat_at = now;
        Some(node.show(id))
    }

    /// `false`: it is unknown.
    pub(in crate::dev) fn remove(&mut self, id: &str) -> bool {
        self.0.remove(id).is_some()
    }

    pub(super) fn get(&self, id: &str) -> Option<Value> {
        self.0.get(id).map(|node| node.show(id))
    }

    pub(super) fn list(&self) -> Vec<Value> {
        self.0.iter().map(|(id, node)| node.show(id)).collect()
    }

    pub(super) fn schedulable(&self, id: &str) -> Schedulable {
        match self.0.get(id).map(|node| &node.status) {
            None => Schedulable::Unknown,
            Some(status) if status.state == "active" && status.available_slots > 0 => Schedulable::Yes,
            Some(_) => Schedulable::No,
        }
    }
}

impl Node {
    fn show(&self, id: &str) -> Value {
        let Status { state, active_runs, available_slots } = &self.status;
        json!({
            "nodeId": id, "metadata": self.metadata, "capacity": self.capacity, "heartbeatAt": self.heartbeat_at,
            "status": { "state": state, "activeRuns": active_runs, "availableSlots": available_slots },
        })
    }
}

/// The name of a node in the queue. It depends on the id only, so that a node that registers again keeps its runs.
pub(super) fn key(id: &str) -> Uuid {
    let digest = Sha256::digest(id);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}
