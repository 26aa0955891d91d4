//! The lease that a control plane gives to this node.

use std::{any::Any, fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{AnnouncedData, BootInstant, Capability, DataLocation, Token};

/// The id of one task on its control plane: 1 to 128 letters, digits and characters of `-_.:/+=@~`. A UUID is lower
/// case and hyphenated. A file name is never derived from it directly.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct TaskId(Arc<str>);

/// The text is not a task id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a task id has 1 to {max} letters, digits or characters of {TASK_ID_MARKS}", max = TaskId::BYTES_MAX)]
pub struct TaskIdError;

const TASK_ID_MARKS: &str = "-_.:/+=@~";

impl TaskId {
    /// Length of the longest id in bytes.
    pub const BYTES_MAX: usize = 128;

    /// Reads an id as the control plane writes it.
    ///
    /// # Errors
    /// If the text is empty, too long, or has another character.
    pub fn parse(text: &str) -> Result<Self, TaskIdError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || TASK_ID_MARKS.as_bytes().contains(&byte);
        let valid = (1..=Self::BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed);
        if valid { Ok(Self(text.into())) } else { Err(TaskIdError) }
    }

    /// The id as the control plane writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<Uuid> for TaskId {
    fn from(id: Uuid) -> Self {
        Self((&*id.as_hyphenated().encode_lower(&mut Uuid::encode_buffer())).into())
    }
}

impl<'de> Deserialize<'de> for TaskId {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a control plane in the configuration of this node: 1 to 64 lower-case letters, digits, `-` and `_`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PlaneName(Arc<str>);

/// The text is not a name of a control plane.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the name of a control plane has 1 to 64 lower-case letters, digits, `-` and `_`")]
pub struct PlaneNameError;

impl PlaneName {
    /// Reads a name.
    ///
    /// # Errors
    /// If the text is empty, too long, or has another character.
    pub fn parse(text: &str) -> Result<Self, PlaneNameError> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
        let valid = (1..=64).contains(&text.len()) && text.bytes().all(allowed);
        if valid { Ok(Self(text.into())) } else { Err(PlaneNameError) }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for PlaneName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

impl fmt::Display for PlaneName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PlaneName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where the report of a task goes on its control plane. It holds no secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportAddress {
    /// The key of this host. Lists show it, and it identifies repeats.
    pub task: TaskId,
    /// A text that only the control plane's adapter writes and reads.
    pub at: Arc<str>,
}

impl From<TaskId> for ReportAddress {
    /// An address for a task that no control plane leased.
    fn from(task: TaskId) -> Self {
        Self { task, at: "".into() }
    }
}

/// The end of the name of a parameter whose value is JSON, on control planes that have texts only.
pub const JSON_SUFFIX: &str = ";json";

/// The effect of a heartbeat's answer on the term of a lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Term {
    /// The lease ends at this instant.
    Until(BootInstant),
    /// The lease lasts for its last term again, counted from when the heartbeat was sent.
    SameTerm,
    /// The end of the lease does not move. The control plane uses leases with a fixed deadline.
    #[default]
    Unchanged,
}

/// A lease as it was received. Its session holds later changes (token, expiry, cancel). They reach a runner through
/// the [`super::HeldLease`].
#[derive(Clone, Debug)]
pub struct Lease {
    /// The task, and where its report goes.
    pub address: ReportAddress,
    /// The job the task belongs to, for logs and pages.
    pub job: Option<Uuid>,
    /// Number of this run of the task, as the control plane counts runs. Most control planes count from 1.
    pub attempt: Option<u64>,
    /// The requested capability.
    pub capability: Capability,
    /// When the control plane gives the task to another node. `None` if the control plane sent no plausible time.
    pub expires_at: Option<BootInstant>,
    /// When the run must have ended, for any term of the lease. It is cancelled then, and fails. A heartbeat may move
    /// it.
    pub hard_deadline: Option<BootInstant>,
    /// How long the run may take, according to the control plane or the metadata of the task.
    pub time_limit: Option<Duration>,
    /// How many tokens of language models the run may use. It is cancelled above, and fails.
    pub tokens_max: Option<u64>,
    /// True when the lease arrived cancelled.
    pub cancelled: bool,
    /// Where the task's data is, according to the control plane so far.
    pub data: AnnouncedData,
    /// Bearer for the domain server.
    pub token: Option<Token>,
    /// When that bearer ends, if the control plane sent that.
    pub token_expires_at: Option<BootInstant>,
    /// Input ids, URLs or names, passed on unchanged.
    pub inputs: Vec<String>,
    /// Prefix of artifact paths, as received.
    pub outputs_prefix: Option<String>,
    /// The trace the task belongs to, as a W3C `traceparent`, if the control plane sent one.
    pub traceparent: Option<String>,
    /// The lease as the control plane sent it, with unknown fields, and without any credential. A runner receives this
    /// text unchanged. The host does not parse it.
    pub document: Box<RawValue>,
    /// Dropped when the node no longer works on the task and owes no report about it.
    pub hold: Option<LeaseHold>,
}

/// How long a run may take, counted from the start of its runner. It is cancelled then, and fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeLimit {
    /// The time.
    pub wall_time: Duration,
    /// Only this node sets it. Another node may finish the task.
    pub of_node: bool,
}

impl TimeLimit {
    /// The smaller limit of the node's and the lease's.
    #[must_use]
    pub fn of_run(of_node: Option<Duration>, of_lease: Option<Duration>) -> Option<Self> {
        let wall_time = of_node.into_iter().chain(of_lease).min()?;
        Some(Self { wall_time, of_node: of_lease != Some(wall_time) })
    }
}

/// A guard that the control plane's adapter attaches to a lease.
#[derive(Clone)]
pub struct LeaseHold(#[expect(dead_code, reason = "only its drop matters")] Arc<dyn Any + Send + Sync>);

impl LeaseHold {
    /// Wraps the guard. Clones share it.
    #[must_use]
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self(Arc::new(guard))
    }
}

impl fmt::Debug for LeaseHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeaseHold")
    }
}

impl Lease {
    /// A lease that names its task and nothing else. Its document is `null`.
    #[must_use]
    pub fn bare(address: impl Into<ReportAddress>, capability: Capability) -> Self {
        Self {
            address: address.into(),
            job: None,
            attempt: None,
            capability,
            expires_at: None,
            hard_deadline: None,
            time_limit: None,
            tokens_max: None,
            cancelled: false,
            data: AnnouncedData::Known(DataLocation::None),
            token: None,
            token_expires_at: None,
            inputs: Vec::new(),
            outputs_prefix: None,
            traceparent: None,
            document: RawValue::NULL.to_owned(),
            hold: None,
        }
    }

    /// The task of this lease.
    #[must_use]
    pub fn task(&self) -> &TaskId {
        &self.address.task
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_time_limit_of_a_run_applies() {
        let [short, long] = [1, 2].map(Duration::from_secs);
        let of_run = |of_node, of_lease| TimeLimit::of_run(of_node, of_lease).map(|at| (at.wall_time, at.of_node));
        assert_eq!(of_run(None, None), None);
        assert_eq!(of_run(Some(short), None), Some((short, true)));
        assert_eq!(of_run(Some(short), Some(long)), Some((short, true)));
        assert_eq!(of_run(Some(long), Some(short)), Some((short, false)));
        assert_eq!(of_run(Some(short), Some(short)), Some((short, false)));
    }

    #[test]
    fn task_ids_are_bounded_and_safe_in_logs() {
        let longest = "x".repeat(TaskId::BYTES_MAX);
        for text in ["0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01", "jobs/a.json", "7", &longest] {
            assert_eq!(TaskId::parse(text).expect("an id").as_str(), text);
        }
        for text in ["", "a b", "a\n", "a\"b", "\u{e9}", &format!("{longest}x")] {
            assert_eq!(TaskId::parse(text), Err(TaskIdError), "{text:?}");
            assert!(serde_json::from_value::<TaskId>(text.into()).is_err(), "{text:?}");
        }
        let id = Uuid::from_u128(0xABCD);
        assert_eq!(TaskId::from(id).as_str(), id.to_string());
    }

    #[test]
    fn plane_names_are_bounded_and_plain() {
        assert_eq!(PlaneName::parse("posemesh").expect("a name").as_str(), "posemesh");
        for text in ["", "A", "a b", "a/b", &"x".repeat(65)] {
            assert_eq!(PlaneName::parse(text), Err(PlaneNameError), "{text:?}");
        }
    }
}
