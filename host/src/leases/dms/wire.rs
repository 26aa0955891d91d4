//! JSON of the DMS task API, both directions (posemesh.md sections 4.2 to 4.8).
//!
//! The adapter is lenient: it reads times with `T` or a space, and UUIDs in any usual form. It keeps unknown fields.
//! The dev server writes the same types.

use std::{borrow::Cow, cell::Cell, fmt};

use jiff::Timestamp;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor, value::MapDeserializer},
};
use serde_json::{Map, Value, value::RawValue};
use uuid::Uuid;

/// `GET /tasks` (4.3). Credentials are plain text here. The adapter moves them to [`crate::model::Token`] at once.
#[derive(Clone, Serialize, Deserialize)]
pub struct LeaseEnvelope {
    /// First domain token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// When it expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token_expires_at: Option<Timestamp>,
    /// When the lease expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_expires_at: Option<Timestamp>,
    /// The task is already cancelled.
    #[serde(default)]
    pub cancel: bool,
    /// Status word, opaque.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// The domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_id: Option<Uuid>,
    /// Base URL of its server. It is text here, and checked when it is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_server_url: Option<String>,
    /// The task.
    pub task: TaskSpec,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The task inside a lease (4.4). Members that the node reads are typed. The others are kept unchanged.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TaskSpec {
    /// Path segment of all later calls.
    pub id: Uuid,
    /// Echoed in reports.
    #[serde(default)]
    pub job_id: Option<Uuid>,
    /// Selects the runner.
    pub capability: String,
    /// Inputs.
    #[serde(default)]
    pub inputs_cids: Vec<String>,
    /// Prefix of artifact paths.
    #[serde(default)]
    pub outputs_prefix: Option<String>,
    /// Opaque, except for the two URL fallbacks of 4.6.
    #[serde(default)]
    pub meta: Value,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The part of a [`LeaseEnvelope`] that the node reads. Flattening the rest, as that type does, would buffer every
/// field and decode it twice.
#[derive(Deserialize)]
pub(super) struct LeaseFacts<'a> {
    #[serde(default)]
    pub(super) access_token: Option<String>,
    #[serde(default)]
    pub(super) access_token_expires_at: Option<Timestamp>,
    #[serde(default)]
    pub(super) lease_expires_at: Option<Timestamp>,
    #[serde(default)]
    pub(super) cancel: bool,
    #[serde(default)]
    pub(super) domain_id: Option<Uuid>,
    #[serde(default)]
    pub(super) domain_server_url: Option<String>,
    #[serde(borrow)]
    pub(super) task: TaskFacts<'a>,
}

impl<'a> LeaseFacts<'a> {
    const KEYS: [&'static str; 7] = [
        "access_token",
        "access_token_expires_at",
        "lease_expires_at",
        "cancel",
        "domain_id",
        "domain_server_url",
        "task",
    ];

    /// Reads the members of a lease. Unknown ones are not parsed.
    pub(super) fn read(members: &Members<'a>) -> serde_json::Result<Self> {
        let known = members.0.iter().filter(|(key, _)| Self::KEYS.contains(&&**key));
        Self::deserialize(MapDeserializer::new(known.map(|(key, value)| (&**key, *value))))
    }
}

/// The part of a [`TaskSpec`] that the node reads.
#[derive(Deserialize)]
pub(super) struct TaskFacts<'a> {
    pub(super) id: Uuid,
    #[serde(default)]
    pub(super) job_id: Option<Uuid>,
    pub(super) capability: String,
    #[serde(default)]
    pub(super) inputs_cids: Vec<String>,
    #[serde(default)]
    pub(super) outputs_prefix: Option<String>,
    #[serde(default, borrow)]
    pub(super) meta: Option<&'a RawValue>,
    /// A number, if the control plane sends it.
    #[serde(default, borrow)]
    pub(super) attempts: Option<&'a RawValue>,
    /// Only newer control planes send it.
    #[serde(default, borrow)]
    pub(super) lease_expires_at: Option<&'a RawValue>,
}

/// The members of an object, each unchanged.
pub(super) struct Members<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        /// Borrowed, unless it has an escape sequence.
        #[derive(Deserialize)]
        struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::with_capacity(16);
                while let Some((Key(key), value)) = map.next_entry()? {
                    members.push((key, value));
                }
                Ok(members)
            }
        }

        from.deserialize_map(Object).map(Self)
    }
}

impl Serialize for Members<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

/// Finds an id below the members of `path`. It keeps the id even when the document is cut off after it.
pub(super) struct Seek<'a> {
    pub(super) path: &'static [&'static str],
    pub(super) id: &'a Cell<Option<Uuid>>,
}

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        match self.path {
            [] => Uuid::deserialize(from).map(|id| self.id.set(Some(id))),
            _ => from.deserialize_map(self),
        }
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match self.path {
                [name, path @ ..] if *name == key => map.next_value_seed(Seek { path, id: self.id })?,
                _ => map.next_value::<IgnoredAny>().map(drop)?,
            }
        }
        Ok(())
    }
}

/// `POST /tasks/{id}/heartbeat` (4.5), request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HeartbeatRequest {
    /// The latest progress. The oldest nodes omit it.
    #[serde(default)]
    pub progress: Value,
    /// Events that are not acknowledged. The oldest nodes omit them.
    #[serde(default)]
    pub events: Vec<Value>,
}

/// A [`HeartbeatRequest`] as it is sent.
#[derive(Serialize)]
pub(super) struct Beat<'a> {
    pub(super) progress: &'a Value,
    pub(super) events: &'a [Value],
}

/// `POST /tasks/{id}/heartbeat`, answer. `null` is absent.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct HeartbeatResponse {
    /// Newer domain token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// When it expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token_expires_at: Option<Timestamp>,
    /// When the lease expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_expires_at: Option<Timestamp>,
    /// The task is cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<bool>,
    /// Status word, opaque.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// The domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_id: Option<Uuid>,
    /// Base URL of its server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain_server_url: Option<String>,
    /// Replaces the task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskSpec>,
    /// Replaces the task's id. Ignored if `task` is present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task_id: Option<Uuid>,
    /// Replaces the job's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<Uuid>,
}

/// `POST /tasks/{id}/complete` (4.7). Newer nodes send a `meta` with other members.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CompleteRequest {
    /// Ids of the artifacts that have one.
    #[serde(default)]
    pub output_cids: Vec<String>,
    /// `{"job": …, "artifacts": […]}` from this node.
    #[serde(default)]
    pub meta: Value,
}

/// `POST /tasks/{id}/fail` (4.8).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FailRequest {
    /// One line.
    #[serde(default)]
    pub reason: String,
    /// The members of the `meta` of a completion, and more.
    #[serde(default)]
    pub details: Value,
}
