//! The address of a report on this control plane: compact JSON in [`ReportAddress::at`].

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{leases::LeaseError, model::ReportAddress};

/// The ids in a report.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct At<'a> {
    /// Path segment of every call about the task.
    pub(super) task: Uuid,
    pub(super) job: Option<Uuid>,
    pub(super) domain_id: Option<Uuid>,
    #[serde(borrow)]
    pub(super) capability: Cow<'a, str>,
}

/// The address of a task's report.
#[must_use]
pub fn address(task: Uuid, job: Option<Uuid>, domain_id: Option<Uuid>, capability: &str) -> ReportAddress {
    At { task, job, domain_id, capability: capability.into() }.address()
}

impl<'a> At<'a> {
    pub(super) fn read(address: &'a ReportAddress) -> Result<Self, LeaseError> {
        serde_json::from_str(&address.at).map_err(|err| LeaseError::Address(err.to_string()))
    }

    pub(super) fn address(&self) -> ReportAddress {
        let at = serde_json::to_string(self).expect("ids and texts are JSON");
        ReportAddress { task: self.task.into(), at: at.into() }
    }
}

/// The id of the task. It is read from the task id of the host, which is cheaper than decoding `at`.
pub(super) fn task(address: &ReportAddress) -> Result<Uuid, LeaseError> {
    let task = address.task.as_str();
    Uuid::try_parse(task).map_err(|err| LeaseError::Address(format!("task {task}: {err}")))
}
