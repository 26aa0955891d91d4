//! One report on its way: what is kept on disk of a task that has ended. No token is among it.

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::{AnnouncedData, Capability, Lease, ReportName, TaskId, TaskResult};

/// A report: whose it is, what it is about, what it says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Base URL of the control plane that gave the task.
    pub(super) plane: Arc<str>,
    /// Address of the node that was given it.
    pub(super) node: Arc<str>,
    /// The task, as the plane calls it.
    pub(super) task_id: Uuid,
    /// The job it belongs to.
    pub(super) job_id: Option<Uuid>,
    /// The domain of its data.
    pub(super) domain_id: Option<Uuid>,
    /// Which runner it asked for.
    pub(super) capability: String,
    /// How it ended and what it published.
    #[serde(rename = "verdict")]
    pub(super) task_result: TaskResult,
    /// When it ended.
    pub(super) ended_at: Timestamp,
}

/// How often a report was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tries {
    pub(super) count: u32,
    pub(super) first: Option<Timestamp>,
    pub(super) last: Option<Timestamp>,
    /// Why the last one failed, one line.
    pub(super) error: Option<String>,
}

/// What stands in the file.
#[derive(Debug, Serialize, Deserialize)]
struct Stored<E, T> {
    report: E,
    tries: T,
}

impl Entry {
    pub(super) fn encode(&self, tries: &Tries) -> Vec<u8> {
        serde_json::to_vec(&Stored { report: self, tries }).expect("texts, numbers and JSON values are JSON")
    }

    /// # Errors
    /// One line about what is wrong with it.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Self, Tries), String> {
        let stored: Stored<Self, Tries> = serde_json::from_slice(bytes).map_err(|err| err.to_string())?;
        Capability::from_wire(&stored.report.capability).map_err(|err| err.to_string())?;
        Ok((stored.report, stored.tries))
    }

    pub(super) fn task(&self) -> TaskId {
        TaskId(self.task_id)
    }

    /// The same under the name the plane uses now; `None` where that has not changed.
    pub(super) fn renamed(&self, name: &ReportName) -> Option<Self> {
        let now = (name.task.0, name.job, name.domain_id);
        if (self.task_id, self.job_id, self.domain_id) == now {
            return None;
        }
        Some(Self { task_id: now.0, job_id: now.1, domain_id: now.2, ..self.clone() })
    }

    /// As much of the lease as a report says.
    pub(super) fn lease(&self) -> Lease {
        let capability = Capability::from_wire(&self.capability).expect("it was parsed when it came in");
        let data = AnnouncedData::DomainServer { server: None, domain: self.domain_id };
        Lease { job: self.job_id, data, ..Lease::bare(self.task(), capability) }
    }
}

/// A report as it is shown to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// The task.
    pub task_id: Uuid,
    /// The job it belongs to.
    pub job_id: Option<Uuid>,
    /// Which runner it asked for.
    pub capability: String,
    /// How it ended, one word.
    pub outcome: String,
    /// How many artifacts it published.
    pub artifacts: usize,
    /// When it ended.
    pub ended_at: Timestamp,
    /// How often the report was sent.
    pub attempts: u32,
    /// When it was sent last.
    pub last_try: Option<Timestamp>,
    /// Why that failed, one line.
    pub last_error: Option<String>,
    /// Base URL of the control plane it is for.
    pub plane: String,
    /// Address of the node it is from.
    pub node: String,
    /// Whether it will be sent.
    pub state: ListingState,
}

/// Where a report stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ListingState {
    /// It waits for its turn, or for a node that starts.
    Waiting,
    /// It is on its way.
    Sending,
    /// It is for another control plane or from another node, and is kept until that one runs here.
    Foreign,
}

impl ListingState {
    /// As a table shows it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Sending => "sending",
            Self::Foreign => "foreign",
        }
    }
}

impl Listing {
    pub(super) fn new(entry: &Entry, tries: &Tries, state: ListingState) -> Self {
        Self {
            task_id: entry.task_id,
            job_id: entry.job_id,
            capability: entry.capability.clone(),
            outcome: entry.task_result.outcome.word().to_owned(),
            artifacts: entry.task_result.artifacts.len(),
            ended_at: entry.ended_at,
            attempts: tries.count,
            last_try: tries.last,
            last_error: tries.error.clone(),
            plane: entry.plane.to_string(),
            node: entry.node.to_string(),
            state,
        }
    }
}
