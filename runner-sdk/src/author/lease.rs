//! The lease as a runner sees it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What the control plane handed out, as it was when the task started. Fields this version does
/// not name are kept in `extra`, credentials are not part of it.
///
/// Ids and times are text exactly as the plane sent them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LeaseEnvelope {
    /// Always absent in a task; kept so that stored leases parse. Ask [`crate::ControlPlane::token`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// When the token expires, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token_expires_at: Option<String>,
    /// When the lease expired at the time it was taken, RFC 3339; heartbeats move it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_expires_at: Option<String>,
    /// True when the lease was already cancelled.
    #[serde(default)]
    pub cancel: bool,
    /// The plane's word for its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// The domain the data belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_id: Option<String>,
    /// Base URL of the domain server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_server_url: Option<String>,
    /// What to do.
    pub task: TaskSpec,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The task inside a lease.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// The task's id.
    pub id: String,
    /// The job it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// The capability asked for.
    pub capability: String,
    /// Opaque to the host.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub capability_filters: Value,
    /// Inputs: ids, URLs or names, as the job's author wrote them.
    #[serde(default)]
    pub inputs_cids: Vec<String>,
    /// Put before every artifact path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outputs_prefix: Option<String>,
    /// Free text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Step of the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Parameters of the job's author.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub meta: Value,
    /// May be negative.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i64>,
    /// Which attempt this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u64>,
    /// After how many the plane gives up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u64>,
    /// Tasks this one still waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deps_remaining: Option<u64>,
    /// The plane's word for its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// `public` or `dedicated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Opaque to the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization_filter: Option<String>,
    /// Decimal text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub billing_units: Option<String>,
    /// Decimal text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_credit_cost: Option<String>,
    /// Decimal text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debited_amount: Option<String>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debited_at: Option<String>,
    /// RFC 3339; not used for timing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_expires_at: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s1_03_s1_22_a_lease_survives_both_directions_with_unknown_fields_kept() {
        let golden = r#"{"access_token_expires_at":"2025-06-01T08:05:00Z","cancel":false,"domain_id":"3f0c","domain_server_url":"https://ds.lab.test","task":{"id":"0b9f","capability":"/lab/echo/v1","inputs_cids":["a1"],"meta":{"voxel":0.1},"priority":-3,"billing_units":"1.50","flavour":"new"},"p2p":{"x":1}}"#;
        let lease: LeaseEnvelope = serde_json::from_str(golden).expect("parses");
        assert_eq!(lease.task.priority, Some(-3));
        assert_eq!(lease.task.extra["flavour"], "new");
        assert_eq!(lease.extra["p2p"]["x"], 1);
        assert_eq!(serde_json::to_string(&lease).expect("writes"), golden);
    }

    #[test]
    fn s1_04_the_smallest_lease_parses() {
        let lease: LeaseEnvelope = serde_json::from_str(r#"{"task":{"id":"1","capability":"/a"}}"#).expect("parses");
        assert!(!lease.cancel && lease.task.inputs_cids.is_empty());
    }
}
