//! How a task ended. All modules use this one type.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Artifact, CancelReason, Fetched, ReportAddress, TimeLimit, Token, Usage, format_duration, millis};

/// Shortest token that is redacted, in bytes. A shorter token is an ordinary word. Its removal would damage texts and
/// hide nothing.
const SECRET_BYTES_MIN: usize = 4;
/// A match of this many leading bytes counts as the token.
const HEAD_BYTES: usize = 24;

/// The stage of a task's set-up that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SetupStage {
    /// The lease cannot be used, or its plugin is out of service.
    StartSession,
    /// The control plane refused the first heartbeat.
    InitialHeartbeat,
    /// The location of the data is missing or malformed.
    BuildPorts,
}

impl SetupStage {
    /// The stable code, also used on the posemesh wire.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::StartSession => "start_session",
            Self::InitialHeartbeat => "initial_heartbeat",
            Self::BuildPorts => "build_ports",
        }
    }
}

/// How an attempt ended. Each adapter defines its wire form. The serde form is the format of the outbox's file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "kebab-case")]
pub enum Outcome {
    /// The runner returned without error.
    Completed,
    /// The runner returned an error.
    Failed {
        /// The whole error chain, outermost first, joined by `: `.
        message: String,
        /// The runner says that a retry may succeed.
        retryable: bool,
        /// The runner says that the input is invalid.
        invalid_input: bool,
        /// The runner's details. `null` if it returned none.
        details: Value,
    },
    /// The runner panicked.
    Panicked {
        /// The panic's text.
        message: String,
        /// `file:line`, or `unknown place`.
        place: String,
    },
    /// Inputs or outputs could not be moved, and the runner did not cause that.
    Storage {
        /// What went wrong, one line.
        message: String,
    },
    /// The task could not be set up.
    Setup {
        /// What failed.
        stage: SetupStage,
        /// What went wrong, one line.
        message: String,
    },
    /// No plugin serves the capability.
    NoRunner,
    /// The run exceeded a limit of time or tokens.
    Budget {
        /// Which limit, in one line.
        message: String,
        /// Another node may finish in time.
        #[serde(default)]
        retryable: bool,
    },
    /// The control plane cancelled the task. Nothing is reported.
    Cancelled,
    /// An operator cancelled the task.
    CancelledByOperator,
    /// The lease expired or went to another node. Nothing is reported.
    LeaseLost,
    /// The node shut down before the runner ended.
    Drained,
    /// The host itself failed.
    HostFault {
        /// What went wrong, one line.
        message: String,
    },
}

/// The stable word for an outcome in logs, on the status page and in reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutcomeWord {
    /// The run exceeded a limit of time or tokens.
    Budget,
    /// The control plane or an operator cancelled the task.
    Cancelled,
    /// The runner returned without error.
    Completed,
    /// The node shut down before the runner ended.
    Drained,
    /// The runner returned an error.
    Failed,
    /// The node could not run the task.
    HostFault,
    /// The lease expired or went to another node.
    LeaseLost,
    /// The runner panicked.
    Panicked,
    /// Inputs or outputs could not be moved.
    Storage,
}

impl OutcomeWord {
    /// The word in its written form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Budget => "budget",
            Self::Cancelled => "cancelled",
            Self::Completed => "completed",
            Self::Drained => "drained",
            Self::Failed => "failed",
            Self::HostFault => "host-fault",
            Self::LeaseLost => "lease-lost",
            Self::Panicked => "panicked",
            Self::Storage => "storage",
        }
    }
}

impl Outcome {
    /// The outcome of a task that was cancelled for `reason`.
    #[must_use]
    pub fn of_cancel(reason: CancelReason) -> Self {
        match reason {
            CancelReason::LeaseLost => Self::LeaseLost,
            CancelReason::Drained => Self::Drained,
            CancelReason::Deadline => {
                Self::Budget { message: "the deadline of the run has passed".to_owned(), retryable: true }
            }
            CancelReason::TimeLimit(TimeLimit { wall_time, of_node }) => {
                let message = format!("wall time {} exceeded", format_duration(wall_time));
                Self::Budget { message, retryable: of_node }
            }
            CancelReason::TokenLimit { used, max } => {
                let message = format!("the run used {used} tokens, at most {max} are allowed");
                Self::Budget { message, retryable: false }
            }
            CancelReason::Plane => Self::Cancelled,
            CancelReason::Operator => Self::CancelledByOperator,
        }
    }

    /// The word for this outcome.
    #[must_use]
    pub fn kind(&self) -> OutcomeWord {
        match self {
            Self::Completed => OutcomeWord::Completed,
            Self::Failed { .. } => OutcomeWord::Failed,
            Self::Panicked { .. } => OutcomeWord::Panicked,
            Self::Storage { .. } => OutcomeWord::Storage,
            Self::Budget { .. } => OutcomeWord::Budget,
            Self::Setup { .. } | Self::NoRunner | Self::HostFault { .. } => OutcomeWord::HostFault,
            Self::Cancelled | Self::CancelledByOperator => OutcomeWord::Cancelled,
            Self::LeaseLost => OutcomeWord::LeaseLost,
            Self::Drained => OutcomeWord::Drained,
        }
    }

    /// A stable word for logs, status pages and reports.
    #[must_use]
    pub fn word(&self) -> &'static str {
        self.kind().as_str()
    }

    /// A stable code that distinguishes more cases than the word.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Completed => "ok",
            Self::Failed { invalid_input: true, .. } => "invalid_input",
            Self::Failed { .. } => "runner_error",
            Self::Panicked { .. } => "runner_panic",
            Self::Storage { .. } => "storage",
            Self::Setup { stage, .. } => stage.code(),
            Self::Budget { .. } => "budget",
            Self::NoRunner => "no_runner",
            Self::Cancelled => "cancelled",
            Self::CancelledByOperator => "cancelled_by_operator",
            Self::LeaseLost => "lease_lost",
            Self::Drained => "drained",
            Self::HostFault { .. } => "host_fault",
        }
    }

    /// What went wrong, for people. `None` if nothing did.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::Completed | Self::Cancelled | Self::LeaseLost | Self::Drained => None,
            Self::Failed { message, .. }
            | Self::Storage { message }
            | Self::Budget { message, .. }
            | Self::HostFault { message } => Some(message.clone()),
            Self::Panicked { message, place } => Some(format!("{message} at {place}")),
            Self::Setup { stage, message } => Some(format!("{}: {message}", stage.code())),
            Self::NoRunner => Some("no runner registered for this capability".to_owned()),
            Self::CancelledByOperator => Some("cancelled by operator".to_owned()),
        }
    }

    /// Removes these tokens from all free text. A runner may put its token into its error. Reports, logs and stored
    /// files must not contain it.
    pub fn redact(&mut self, tokens: &[Token]) {
        let clean = |text: &mut String| redact(text, tokens);
        match self {
            Self::Failed { message, details, .. } => {
                clean(message);
                clean_value(details, &clean);
            }
            Self::Panicked { message, place } => {
                clean(message);
                clean(place);
            }
            Self::Storage { message }
            | Self::Budget { message, .. }
            | Self::Setup { message, .. }
            | Self::HostFault { message } => clean(message),
            Self::Completed
            | Self::NoRunner
            | Self::Cancelled
            | Self::CancelledByOperator
            | Self::LeaseLost
            | Self::Drained => {}
        }
    }

    /// Whether a retry of the task may end differently.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::Failed { retryable, .. } | Self::Budget { retryable, .. } => *retryable,
            Self::Storage { .. } | Self::Setup { .. } | Self::NoRunner | Self::Drained | Self::HostFault { .. } => true,
            Self::Completed | Self::Panicked { .. } | Self::Cancelled | Self::CancelledByOperator | Self::LeaseLost => {
                false
            }
        }
    }
}

/// Removes these tokens from `text`, also a token that was cut short.
pub(crate) fn redact(text: &mut String, tokens: &[Token]) {
    for token in secrets(tokens) {
        let head = token.get(..HEAD_BYTES).unwrap_or(token);
        if !text.contains(head) {
            continue;
        }
        let (mut clean, mut rest) = (String::with_capacity(text.len()), text.as_str());
        while let Some(at) = rest.find(head) {
            // Tokens may begin alike. The longest match counts.
            let found = secrets(tokens).map(|token| common_bytes(&rest[at..], token)).max().unwrap_or(head.len());
            clean.extend([&rest[..at], "(token)"]);
            rest = &rest[at + found..];
        }
        clean.push_str(rest);
        *text = clean;
    }
}

/// Removes these tokens from a text that is JSON, or that is not. JSON may write any character of a token as an escape.
pub(crate) fn redact_json(json: &mut String, tokens: &[Token]) {
    if tokens.is_empty() {
        return;
    }
    if let Ok(mut value) = serde_json::from_str(json) {
        clean_value(&mut value, &|text: &mut String| redact(text, tokens));
        *json = value.to_string();
    }
    redact(json, tokens);
}

/// The length of the common beginning.
fn common_bytes(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

/// Whether `text` contains one of these tokens.
pub(crate) fn holds_token(text: &str, tokens: &[Token]) -> bool {
    secrets(tokens).any(|token| text.contains(token))
}

fn secrets(tokens: &[Token]) -> impl Iterator<Item = &str> {
    tokens.iter().map(Token::expose).filter(|token| token.len() >= SECRET_BYTES_MIN)
}

fn clean_value(value: &mut Value, clean: &impl Fn(&mut String)) {
    match value {
        Value::String(text) => clean(text),
        Value::Array(items) => items.iter_mut().for_each(|item| clean_value(item, clean)),
        Value::Object(fields) => {
            for (mut name, mut value) in std::mem::take(fields) {
                clean(&mut name);
                clean_value(&mut value, clean);
                fields.insert(name, value);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Keeps a lease until the control plane has received the report of its task.
pub trait LeaseKeeper: Send {
    /// Where the report goes now. A heartbeat may have changed the address.
    fn address(&self) -> ReportAddress;
}

/// The outcome of an attempt, with its artifacts and inputs. It is reported once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// How it ended.
    pub outcome: Outcome,
    /// Published artifacts, sorted by logical path, one entry for each path.
    pub artifacts: Vec<Artifact>,
    /// Inputs that were read completely, each once.
    #[serde(default)]
    pub inputs: Vec<Fetched>,
    /// Whether an output was not written because a disk of this machine was full.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disk_was_full: bool,
    /// The artifacts themselves, if the report carries them: their texts by logical path. The bytes of an artifact that
    /// is not UTF-8 are base64, under its path with `;base64`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub inline: BTreeMap<String, String>,
    /// How long the task waited and ran.
    #[serde(default)]
    pub timings: Timings,
    /// What the runner has used.
    #[serde(default, skip_serializing_if = "Usage::is_zero")]
    pub usage: Usage,
}

/// How long a task waited and ran, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// From the arrival of the lease to the start of the run.
    pub queue_ms: u64,
    /// From the start of the run to its end.
    pub run_ms: u64,
}

impl Timings {
    /// The two times as they are reported.
    #[must_use]
    pub fn new(queue: Duration, run: Duration) -> Self {
        Self { queue_ms: millis(queue), run_ms: millis(run) }
    }
}

impl TaskResult {
    /// A result without artifacts and inputs.
    #[must_use]
    pub fn bare(outcome: Outcome) -> Self {
        Self {
            outcome,
            artifacts: Vec::new(),
            inputs: Vec::new(),
            disk_was_full: false,
            inline: BTreeMap::new(),
            timings: Timings::default(),
            usage: Usage::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_are_redacted_in_texts_and_nested_details() {
        let tokens = [Token::new("tok-1"), Token::new("tok-2"), Token::new("a"), Token::new("")];
        let mut failed = Outcome::Failed {
            message: "401 for tok-1, then for tok-2: a pity".into(),
            retryable: false,
            invalid_input: false,
            details: json!({ "tok-1": [{ "header": "Bearer tok-2" }], "n": 1 }),
        };
        failed.redact(&tokens);
        assert_eq!(failed.reason().as_deref(), Some("401 for (token), then for (token): a pity"));
        let text = serde_json::to_string(&failed).expect("JSON");
        assert!(!text.contains("tok-") && text.contains("Bearer (token)"), "{text}");
        for mut outcome in [
            Outcome::Panicked { message: "tok-1".into(), place: "tok-2".into() },
            Outcome::Storage { message: "tok-1".into() },
            Outcome::Setup { stage: SetupStage::BuildPorts, message: "tok-1".into() },
            Outcome::HostFault { message: "tok-1".into() },
        ] {
            outcome.redact(&tokens);
            assert!(!format!("{outcome:?}").contains("tok-"), "{outcome:?}");
        }
    }

    #[test]
    fn truncated_token_is_redacted() {
        let tokens = [Token::new("eyJhbGciOiJFUzI1NiJ9.body-ÄÖ.signature")];
        for (text, expected) in [
            ("input eyJhbGciOiJFUzI1NiJ9.body… not found", "input (token)… not found"),
            ("eyJhbGciOiJFUzI1NiJ9.body-ÄÖ.signature, eyJhbGciOiJFUzI1NiJ9.body-ÄÜ", "(token), (token)Ü"),
            ("eyJhbGciOiJFUzI1NiJ9.other", "eyJhbGciOiJFUzI1NiJ9.other"),
            ("eyJhbGciOi", "eyJhbGciOi"),
        ] {
            let mut text = text.to_owned();
            redact(&mut text, &tokens);
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn tokens_that_begin_alike_are_redacted_whole() {
        let tokens = ["one-header-of-all-tokens.a.b", "one-header-of-all-tokens.a.cd"].map(Token::new);
        let mut text = format!("{}, {}", tokens[1].expose(), tokens[0].expose());
        redact(&mut text, &tokens);
        assert_eq!(text, "(token), (token)");
    }

    #[test]
    fn every_outcome_comes_back_from_its_file_form() {
        let details = json!({ "points": 0 });
        let mut all = vec![
            Outcome::Completed,
            Outcome::Failed { message: "m".into(), retryable: true, invalid_input: true, details },
            Outcome::Panicked { message: "m".into(), place: "p".into() },
            Outcome::Storage { message: "m".into() },
            Outcome::NoRunner,
            Outcome::Budget { message: "m".into(), retryable: true },
            Outcome::Cancelled,
            Outcome::CancelledByOperator,
            Outcome::LeaseLost,
            Outcome::Drained,
            Outcome::HostFault { message: "m".into() },
        ];
        let stages = [SetupStage::StartSession, SetupStage::InitialHeartbeat, SetupStage::BuildPorts];
        all.extend(stages.map(|stage| Outcome::Setup { stage, message: "m".into() }));
        for outcome in all {
            let text = serde_json::to_string(&outcome).expect("JSON");
            assert_eq!(serde_json::from_str::<Outcome>(&text).expect("read back"), outcome, "{text}");
        }
        let strange = r#"{"end":"setup","stage":"dance","message":"m"}"#;
        assert!(serde_json::from_str::<Outcome>(strange).is_err());
    }
}
