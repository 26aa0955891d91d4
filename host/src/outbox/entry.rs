//! One report: the data that is kept on disk about an ended task. It contains no token.

use std::{collections::HashSet, path::Path, sync::Arc};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    state::{StateError, failed},
    store,
};
use crate::{
    leases::dms,
    model::{Outcome, PlaneName, ReportAddress, TaskId, TaskResult},
};

/// A report: its control plane and node, its task, and the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Name of the control plane that gave the task.
    pub(super) plane: PlaneName,
    /// Its base URL.
    pub(super) base_url: Arc<str>,
    /// Address of the node that leased the task.
    pub(super) node: Arc<str>,
    /// Address of the report on that control plane.
    pub(super) address: ReportAddress,
    /// The job, as the lease named it. Only shown to people.
    pub(super) job_id: Option<Uuid>,
    /// The domain, as the lease named it. Only shown to people.
    pub(super) domain_id: Option<Uuid>,
    /// The capability, as the lease named it. Only shown to people.
    pub(super) capability: String,
    /// How the task ended and what it published.
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
    /// The first time that the control plane answered and did not accept it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) not_accepted_since: Option<Timestamp>,
    /// It is kept and not sent, because it was not accepted for [`super::queue::NOT_ACCEPTED_MAX`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) set_aside: bool,
}

impl Tries {
    /// Sends the report again if it was set aside. `true`: it was.
    pub(super) fn take_back(&mut self) -> bool {
        if self.set_aside {
            (self.set_aside, self.not_accepted_since) = (false, None);
            return true;
        }
        false
    }
}

/// An [`Entry`] of format 1, which supports one kind of control plane.
#[derive(Deserialize)]
struct OldEntry {
    /// Base URL of the control plane.
    plane: Arc<str>,
    node: Arc<str>,
    task_id: Uuid,
    job_id: Option<Uuid>,
    domain_id: Option<Uuid>,
    capability: String,
    #[serde(rename = "verdict")]
    task_result: TaskResult,
    ended_at: Timestamp,
}

impl From<OldEntry> for Entry {
    fn from(old: OldEntry) -> Self {
        Self {
            plane: PlaneName::parse(dms::DEFAULT_NAME).expect("the default name is a name"),
            base_url: old.plane,
            node: old.node,
            address: dms::address(old.task_id, old.job_id, old.domain_id, &old.capability),
            job_id: old.job_id,
            domain_id: old.domain_id,
            capability: old.capability,
            task_result: old.task_result,
            ended_at: old.ended_at,
        }
    }
}

/// The content of a row in the file.
#[derive(Debug, Serialize, Deserialize)]
struct Stored<E, T> {
    report: E,
    tries: T,
}

/// Reports from a file that no node uses. A command sends them to the node that adds them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct ImportedReports {
    reports: Vec<Stored<Entry, Tries>>,
}

impl ImportedReports {
    /// Reads `file`, damaged or not, and does not change it. Rows that cannot be read are missing.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(file: &Path) -> Result<Self, StateError> {
        // A pipe or a device has no end.
        if !std::fs::metadata(file).map_err(failed("read", file))?.is_file() {
            let problem = std::io::Error::new(std::io::ErrorKind::InvalidInput, "expected a regular file");
            return Err(failed("read", file)(problem));
        }
        let rows = store::read_aside(file).map_err(failed("read", file))?;
        let decoded = rows.iter().filter_map(|(_, bytes)| Entry::decode(bytes).ok());
        Ok(Self { reports: decoded.map(|(report, tries)| Stored { report, tries }).collect() })
    }

    /// The number of reports.
    #[must_use]
    pub fn len(&self) -> usize {
        self.reports.len()
    }

    /// Whether there are no reports.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.reports.is_empty()
    }

    /// The reports that are not among `known`, the oldest first.
    pub(super) fn missing_in<'a>(self, known: impl Iterator<Item = &'a Entry>) -> Vec<(Entry, Tries)> {
        let mut known: HashSet<_> = known.map(Entry::identity).collect();
        let reports = self.reports.into_iter().map(|Stored { report, mut tries }| {
            tries.take_back();
            (report, tries)
        });
        reports.filter(|(report, _)| known.insert(report.identity())).collect()
    }
}

/// The identity of a report: two reports with the same one are the same report.
type Identity = (PlaneName, Arc<str>, TaskId, Timestamp);

impl Entry {
    /// About how many bytes of memory it takes.
    pub(super) fn size(&self) -> usize {
        let TaskResult { outcome, artifacts, inputs, inline, .. } = &self.task_result;
        let inline: usize = inline.iter().map(|(path, text)| path.len() + text.len()).sum();
        let details = match outcome {
            Outcome::Failed { message, details, .. } if details.is_null() => message.len(),
            Outcome::Failed { message, details, .. } => message.len() + details.to_string().len(),
            _ => 0,
        };
        1024 + inline + details + (artifacts.len() + inputs.len()) * 512
    }

    pub(super) fn encode(&self, tries: &Tries) -> Vec<u8> {
        serde_json::to_vec(&Stored { report: self, tries }).expect("texts, numbers and JSON values are JSON")
    }

    /// # Errors
    /// One line about the mistake in it.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Self, Tries), String> {
        let stored = serde_json::from_slice::<Stored<Self, Tries>>(bytes).map(|stored| (stored.report, stored.tries));
        stored.or_else(|err| match serde_json::from_slice::<Stored<OldEntry, Tries>>(bytes) {
            Ok(old) => Ok((old.report.into(), old.tries)),
            Err(_) => Err(err.to_string()),
        })
    }

    fn identity(&self) -> Identity {
        (self.plane.clone(), Arc::clone(&self.node), self.task().clone(), self.ended_at)
    }

    pub(super) fn task(&self) -> &TaskId {
        &self.address.task
    }

    /// The same report at a new address.
    pub(super) fn moved(&self, address: ReportAddress) -> Self {
        Self { address, ..self.clone() }
    }
}

/// A report as it is shown to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// The task.
    pub task_id: TaskId,
    /// The job it belongs to.
    pub job_id: Option<Uuid>,
    /// The capability that it needs.
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
    /// Name of the control plane it is for. Empty in the answer of a node of an older version.
    #[serde(default)]
    pub plane_name: String,
    /// Its base URL.
    pub plane: String,
    /// Address of the node it is from.
    pub node: String,
    /// Whether it will be sent.
    pub state: ListingState,
}

/// The state of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ListingState {
    /// It waits in the queue, or for the start of a node.
    Waiting,
    /// It is being sent.
    Sending,
    /// It is for another control plane or from another node. It is kept until that one runs here.
    Foreign,
    /// The control plane did not accept it for 24 h. It is kept until an operator retries or drops it, or the control
    /// plane leases its task again.
    SetAside,
}

impl ListingState {
    /// The word for a table.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Sending => "sending",
            Self::Foreign => "foreign",
            Self::SetAside => "set-aside",
        }
    }
}

impl Listing {
    pub(super) fn new(entry: &Entry, tries: &Tries, state: ListingState) -> Self {
        Self {
            task_id: entry.task().clone(),
            job_id: entry.job_id,
            capability: entry.capability.clone(),
            outcome: entry.task_result.outcome.word().to_owned(),
            artifacts: entry.task_result.artifacts.len(),
            ended_at: entry.ended_at,
            attempts: tries.count,
            last_try: tries.last,
            last_error: tries.error.clone(),
            plane_name: entry.plane.to_string(),
            plane: entry.base_url.to_string(),
            node: entry.node.to_string(),
            state,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row as the version with format 1 wrote it.
    const OLD_ROW: &str = r#"{"report":{"plane":"http://127.0.0.1:9/v1","node":"0x1a","task_id":"0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01","job_id":"11111111-2222-3333-4444-555555555555","domain_id":null,"capability":"/lab/echo/v1","verdict":{"outcome":{"end":"completed"},"artifacts":[],"inputs":[]},"ended_at":"2026-11-29T14:35:28Z"},"tries":{"count":2,"first":"2026-11-29T14:35:28Z","last":"2026-11-29T14:35:29Z","error":"later"}}"#;

    #[test]
    fn format_1_rows_decode_for_default_plane() {
        let (entry, tries) = Entry::decode(OLD_ROW.as_bytes()).expect("an old row");
        assert_eq!(
            (entry.plane.as_str(), &*entry.base_url, &*entry.node),
            ("posemesh", "http://127.0.0.1:9/v1", "0x1a")
        );
        assert_eq!(entry.task().as_str(), "0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01");
        let at = r#"{"task":"0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01","job":"11111111-2222-3333-4444-555555555555","domain_id":null,"capability":"/lab/echo/v1"}"#;
        assert_eq!(&*entry.address.at, at);
        assert_eq!((tries.count, tries.error.as_deref()), (2, Some("later")));
        assert_eq!(Entry::decode(&entry.encode(&tries)), Ok((entry, tries)));
    }
}
