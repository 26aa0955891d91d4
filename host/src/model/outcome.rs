//! How a task ended, in one vocabulary.

use serde_json::Value;

use super::Artifact;

/// How an attempt ended. The wire form is each adapter's business.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The runner returned without error.
    Completed,
    /// The runner returned an error.
    Failed {
        /// The whole error chain, outermost first, joined by `: `.
        message: String,
        /// The runner says a repeat may succeed.
        retryable: bool,
        /// The runner says the input is at fault.
        invalid_input: bool,
        /// The runner's own details, `null` when it gave none.
        details: Value,
    },
    /// The runner panicked.
    Panicked {
        /// The panic's text.
        message: String,
        /// `file:line`, or `unknown place`.
        place: String,
    },
    /// Inputs or outputs could not be moved, and it was not the runner's doing.
    Storage {
        /// What went wrong, one line.
        message: String,
    },
    /// The task could not be set up.
    Setup {
        /// `start_session`, `initial_heartbeat` or `build_ports` (posemesh contract 4.8).
        stage: &'static str,
        /// What went wrong, one line.
        message: String,
    },
    /// No plugin serves the capability.
    NoRunner,
    /// The control plane cancelled the task. Nothing is reported.
    Cancelled,
    /// The lease ran out or went to somebody else. Nothing is reported.
    LeaseLost,
    /// The node shut down before the runner ended.
    Drained,
    /// The node itself is at fault.
    HostFault {
        /// What went wrong, one line.
        message: String,
    },
}

impl Outcome {
    /// A stable word for logs, status pages and reports.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed { .. } => "failed",
            Self::Panicked { .. } => "panicked",
            Self::Storage { .. } => "storage",
            Self::Setup { .. } | Self::NoRunner | Self::HostFault { .. } => "host-fault",
            Self::Cancelled => "cancelled",
            Self::LeaseLost => "lease-lost",
            Self::Drained => "drained",
        }
    }

    /// A stable, finer code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Completed => "ok",
            Self::Failed { invalid_input: true, .. } => "invalid_input",
            Self::Failed { .. } => "runner_error",
            Self::Panicked { .. } => "runner_panic",
            Self::Storage { .. } => "storage",
            Self::Setup { stage, .. } => stage,
            Self::NoRunner => "no_runner",
            Self::Cancelled => "cancelled",
            Self::LeaseLost => "lease_lost",
            Self::Drained => "drained",
            Self::HostFault { .. } => "host_fault",
        }
    }

    /// What went wrong, for people; `None` when nothing did.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Completed | Self::Cancelled | Self::LeaseLost | Self::Drained => None,
            Self::Failed { message, .. } | Self::Storage { message } | Self::HostFault { message } => {
                Some(message.clone())
            }
            Self::Panicked { message, place } => Some(format!("{message} at {place}")),
            Self::Setup { stage, message } => Some(format!("{stage}: {message}")),
            Self::NoRunner => Some("no runner registered for this capability".to_owned()),
        }
    }

    /// Whether somebody who repeats the task may hope for another end.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::Failed { retryable, .. } => *retryable,
            Self::Storage { .. } | Self::Setup { .. } | Self::NoRunner | Self::Drained | Self::HostFault { .. } => true,
            Self::Completed | Self::Panicked { .. } | Self::Cancelled | Self::LeaseLost => false,
        }
    }
}

/// The end of an attempt together with what it published: what is reported, once.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// How it ended.
    pub outcome: Outcome,
    /// What was published, sorted by logical path, one entry a path.
    pub artifacts: Vec<Artifact>,
}
