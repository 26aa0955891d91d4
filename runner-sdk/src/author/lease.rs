//! The lease as a runner sees it.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Map, Value};

/// The lease as it was when the task started, without credentials. Fields that this version does not know are kept
/// in `extra`.
///
/// Ids and times are text, exactly as the control plane sent them. There is no token in it: use
/// [`crate::ControlPlane::token`]. A token in a stored lease is dropped when the lease is read.
///
/// Later versions have more fields. Code that needs a lease without a host changes a default one, or reads JSON:
///
/// ```
/// use runner_sdk::LeaseEnvelope;
///
/// let mut lease = LeaseEnvelope::default();
/// lease.task.id = "7".to_owned();
/// let read: LeaseEnvelope = serde_json::from_str(r#"{ "task": { "id": "7", "capability": "" } }"#)?;
/// assert_eq!(read, lease);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LeaseEnvelope {
    /// When the token expires, RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token_expires_at: Option<String>,
    /// When the lease expires, as of its start, RFC 3339. Heartbeats extend it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_expires_at: Option<String>,
    /// True when the lease was already cancelled.
    pub cancel: bool,
    /// The control plane's name for its state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// The domain the data belongs to. Absent if the data is not on a domain server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_id: Option<String>,
    /// Base URL of the domain server. Absent if the data is not on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_server_url: Option<String>,
    /// What to do.
    pub task: TaskSpec,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The task inside a lease. Later versions have more fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TaskSpec {
    /// The task's id.
    pub id: String,
    /// The job it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// The requested capability.
    pub capability: String,
    /// Opaque to the host.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub capability_filters: Value,
    /// Inputs: ids, URLs or names, as the job's author wrote them.
    pub inputs_cids: Vec<String>,
    /// Prefix of every artifact path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outputs_prefix: Option<String>,
    /// Free text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Step of the job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Parameters from the job's author.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub meta: Value,
    /// May be negative.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i64>,
    /// Which attempt this is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u64>,
    /// Number of attempts before the control plane gives up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u64>,
    /// Tasks this one still waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deps_remaining: Option<u64>,
    /// The control plane's name for its state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// `public` or `dedicated`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Opaque to the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub organization_filter: Option<String>,
    /// Decimal text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub billing_units: Option<String>,
    /// Decimal text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_credit_cost: Option<String>,
    /// Decimal text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debited_amount: Option<String>,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debited_at: Option<String>,
    /// RFC 3339; not used for timing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_expires_at: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// Reads an object's members into the fields of the same name, drops some, and puts all others into `extra`. It does what serde does
/// for a flattened map, without a copy of the whole object. Each task begins with this call.
macro_rules! read_members {
    ($type:ident needs [$($needed:ident),*], drops [$($dropped:ident),*] and may have [$($name:ident),* $(,)?]) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                struct Members;
                impl<'de> Visitor<'de> for Members {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str(concat!("an object, ", stringify!($type)))
                    }

                    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<$type, A::Error> {
                        let mut read = $type::default();
                        $(let mut $needed = false;)*
                        while let Some(Name(name)) = members.next_key()? {
                            match &*name {
                                $(stringify!($needed) => {
                                    read.$needed = members.next_value()?;
                                    $needed = true;
                                })*
                                $(stringify!($dropped) => drop(members.next_value::<IgnoredAny>()?),)*
                                $(stringify!($name) => read.$name = members.next_value()?,)*
                                _ => drop(read.extra.insert(name.into_owned(), members.next_value()?)),
                            }
                        }
                        $(if !$needed {
                            return Err(A::Error::missing_field(stringify!($needed)));
                        })*
                        Ok(read)
                    }
                }
                from.deserialize_map(Members)
            }
        }
    };
}

/// The name of a member, borrowed if possible.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

read_members!(LeaseEnvelope needs [task], drops [access_token] and may have [
    access_token_expires_at, lease_expires_at, cancel, status, domain_id, domain_server_url
]);

read_members!(TaskSpec needs [id, capability], drops [] and may have [
    job_id, capability_filters, inputs_cids, outputs_prefix, label, stage, meta, priority, attempts, max_attempts,
    deps_remaining, status, mode, organization_filter, billing_units, estimated_credit_cost, debited_amount,
    debited_at, lease_expires_at,
]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_round_trip_keeps_unknown_fields() {
        let golden = r#"{"access_token_expires_at":"2025-06-01T08:05:00Z","cancel":false,"domain_id":"3f0c","domain_server_url":"https://ds.lab.test","task":{"id":"0b9f","capability":"/lab/echo/v1","inputs_cids":["a1"],"meta":{"voxel":0.1},"priority":-3,"billing_units":"1.50","flavour":"new"},"p2p":{"x":1}}"#;
        let lease: LeaseEnvelope = serde_json::from_str(golden).expect("parses");
        assert_eq!(lease.task.priority, Some(-3));
        assert_eq!(lease.task.extra["flavour"], "new");
        assert_eq!(lease.extra["p2p"]["x"], 1);
        assert_eq!(serde_json::to_string(&lease).expect("writes"), golden);
    }

    #[test]
    fn known_fields_never_go_to_extra() {
        let text = || Some("x".to_owned());
        let task = TaskSpec {
            id: "1".to_owned(),
            job_id: text(),
            capability: "/a".to_owned(),
            capability_filters: 1.into(),
            inputs_cids: vec!["a1".to_owned()],
            outputs_prefix: text(),
            label: text(),
            stage: text(),
            meta: 2.into(),
            priority: Some(3),
            attempts: Some(4),
            max_attempts: Some(5),
            deps_remaining: Some(6),
            status: text(),
            mode: text(),
            organization_filter: text(),
            billing_units: text(),
            estimated_credit_cost: text(),
            debited_amount: text(),
            debited_at: text(),
            lease_expires_at: text(),
            extra: Map::new(),
        };
        let lease = LeaseEnvelope {
            access_token_expires_at: text(),
            lease_expires_at: text(),
            cancel: true,
            status: text(),
            domain_id: text(),
            domain_server_url: text(),
            task,
            extra: Map::new(),
        };
        let written = serde_json::to_string(&lease).expect("writes");
        assert_eq!(serde_json::from_str::<LeaseEnvelope>(&written).expect("parses"), lease);
        let value = serde_json::to_value(&lease).expect("writes");
        assert_eq!(serde_json::from_value::<LeaseEnvelope>(value).expect("parses"), lease);
    }

    #[test]
    fn token_of_a_stored_lease_is_dropped() {
        let stored = r#"{"access_token":"secret","task":{"id":"1","capability":"/a"}}"#;
        let lease: LeaseEnvelope = serde_json::from_str(stored).expect("parses");
        assert!(lease.extra.is_empty());
        assert!(!serde_json::to_string(&lease).expect("writes").contains("token"));
    }

    #[test]
    fn missing_lease_field_is_named() {
        for (document, expected) in [
            (r#"{"cancel":true}"#, "missing field `task`"),
            (r#"{"task":{"id":"1"}}"#, "missing field `capability`"),
            (r#"{"task":7}"#, "invalid type: integer `7`, expected an object, TaskSpec"),
        ] {
            let err = serde_json::from_str::<LeaseEnvelope>(document).expect_err("refused").to_string();
            assert!(err.starts_with(expected), "{err}");
        }
    }

    #[test]
    fn minimal_lease_parses() {
        let lease: LeaseEnvelope = serde_json::from_str(r#"{"task":{"id":"1","capability":"/a"}}"#).expect("parses");
        assert!(!lease.cancel && lease.task.inputs_cids.is_empty());
    }
}
