//! The report of a run: a completion or a failure, and the meaning of a gRPC status.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::lease::{CompleteRequest, CostInfo, FailRequest, TimingInfo};
use crate::{
    leases::{LeaseError, recent_tokens::RecentTokens},
    model::{Outcome, ReportAddress, TaskResult, Timings, Usage},
};

/// Longest error message that is sent, in bytes.
const MESSAGE_BYTES_MAX: usize = 4096;
/// Largest error details that are sent, in bytes of JSON.
const DETAILS_BYTES_MAX: usize = 32 * 1024;

/// The address of a report on this control plane: compact JSON in [`ReportAddress::at`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct At {
    pub(super) lease: String,
    pub(super) run: String,
}

impl At {
    pub(super) fn read(address: &ReportAddress) -> Result<Self, LeaseError> {
        serde_json::from_str(&address.at).map_err(|err| LeaseError::Address(err.to_string()))
    }

    pub(super) fn text(&self) -> String {
        serde_json::to_string(self).expect("ids and numbers are JSON")
    }
}

/// A report as it is sent.
#[derive(Debug, PartialEq)]
pub(super) enum Report {
    Complete(CompleteRequest),
    Fail(FailRequest),
}

/// The report of a task result. `None`: the task must not be reported.
pub(super) fn report(at: &At, node: &str, task_result: &TaskResult) -> Option<Report> {
    let TaskResult { outcome, artifacts, inline, timings, usage, .. } = task_result;
    // Only artifacts on a domain server have an id.
    let ids = || artifacts.iter().filter_map(|artifact| Some((artifact.logical_path.clone(), artifact.id.clone()?)));
    match outcome {
        Outcome::Cancelled | Outcome::LeaseLost => None,
        Outcome::Completed => Some(Report::Complete(CompleteRequest {
            lease_id: at.lease.clone(),
            run_id: at.run.clone(),
            node_id: node.to_owned(),
            result: inline.iter().map(|(path, text)| (path.clone(), text.clone())).chain(ids()).collect(),
            timings: Some(times(*timings)),
            costs: Some(costs(*usage)),
        })),
        outcome => Some(Report::Fail(failure(at, node, outcome, *timings))),
    }
}

/// The failure of a run.
pub(super) fn failure(at: &At, node: &str, outcome: &Outcome, timings: Timings) -> FailRequest {
    let (message, retryable) = match outcome {
        Outcome::Drained => ("the node stopped before the run ended".to_owned(), true),
        // The next lease would find the same runners.
        Outcome::NoRunner => (outcome.reason().unwrap_or_default(), false),
        outcome => (outcome.reason().unwrap_or_default(), outcome.retryable()),
    };
    let mut details = json!({ "outcome": outcome.word(), "code": outcome.code() });
    if let Outcome::Failed { details: own, .. } = outcome
        && !own.is_null()
    {
        let bytes = own.to_string().len();
        let omitted = || json!({ "omitted": format!("{bytes} bytes, at most {DETAILS_BYTES_MAX} are reported") });
        details["details"] = if bytes + 256 > DETAILS_BYTES_MAX { omitted() } else { own.clone() };
    }
    fail(at, node, &message, &details, retryable, timings)
}

/// A failure with this text.
pub(super) fn fail(
    at: &At,
    node: &str,
    message: &str,
    details: &Value,
    retryable: bool,
    timings: Timings,
) -> FailRequest {
    let mut end = message.len().min(MESSAGE_BYTES_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    FailRequest {
        lease_id: at.lease.clone(),
        run_id: at.run.clone(),
        node_id: node.to_owned(),
        error_message: message[..end].to_owned(),
        error_details: details.to_string(),
        timings: Some(times(timings)),
        retryable,
    }
}

/// The wire has numbers of 32 bits. A larger count becomes the largest one.
fn costs(usage: Usage) -> CostInfo {
    let count = |tokens: u64| i32::try_from(tokens).unwrap_or(i32::MAX);
    CostInfo { tokens_in: count(usage.tokens_in), tokens_out: count(usage.tokens_out), usd_cost: usage.usd_cost }
}

fn times(Timings { queue_ms, run_ms }: Timings) -> TimingInfo {
    let whole = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    TimingInfo {
        duration_ms: whole(queue_ms.saturating_add(run_ms)),
        queue_time_ms: whole(queue_ms),
        execution_time_ms: whole(run_ms),
    }
}

/// The error of a call that ended with `status`. These codes may end differently next time.
pub(super) fn refused(status: &Status, tokens: &RecentTokens) -> LeaseError {
    let retry = matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Aborted
            // Our own library: the answer is too large. The call may have been executed.
            | Code::OutOfRange
            // A gateway that knows no such path. It says nothing about the report.
            | Code::Unimplemented
            | Code::Internal
            | Code::Unknown
            | Code::Cancelled
            | Code::Unauthenticated
    );
    LeaseError::Grpc {
        code: format!("{:?}", status.code()),
        message: tokens.excerpt(status.message().as_bytes(), &[]),
        retry,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{CancelReason, TimeLimit};

    #[track_caller]
    fn check(outcome: Outcome, expected: (&str, bool)) {
        let at = At { lease: "l".into(), run: "r".into() };
        let result = TaskResult { timings: Timings { queue_ms: 5, run_ms: 7 }, ..TaskResult::bare(outcome) };
        let Some(Report::Fail(sent)) = report(&at, "n", &result) else { panic!("a failure") };
        assert_eq!((sent.error_message.as_str(), sent.retryable), expected);
        let timings = sent.timings.expect("timings");
        assert_eq!((timings.duration_ms, timings.queue_time_ms), (12, 5));
        assert!(sent.error_details.len() <= DETAILS_BYTES_MAX, "{} bytes", sent.error_details.len());
    }

    #[test]
    fn outcomes_decide_whether_a_run_is_retried() {
        let cancelled = |reason, expected| check(Outcome::of_cancel(reason), expected);
        cancelled(CancelReason::Deadline, ("the deadline of the run has passed", true));
        for of_node in [true, false] {
            let limit = CancelReason::TimeLimit(TimeLimit { wall_time: Duration::from_secs(120), of_node });
            cancelled(limit, ("wall time 2m exceeded", of_node));
        }
        let limit = CancelReason::TokenLimit { used: 9, max: 7 };
        cancelled(limit, ("the run used 9 tokens, at most 7 are allowed", false));
        check(Outcome::NoRunner, ("no runner registered for this capability", false));
        check(Outcome::Drained, ("the node stopped before the run ended", true));
        let failed =
            |retryable, details| Outcome::Failed { message: "m\nn".into(), retryable, invalid_input: false, details };
        check(failed(true, Value::Null), ("m\nn", true));
        check(failed(false, json!({ "large": "x".repeat(DETAILS_BYTES_MAX) })), ("m\nn", false));
        let at = At { lease: "l".into(), run: "r".into() };
        assert_eq!(report(&at, "n", &TaskResult::bare(Outcome::LeaseLost)), None);
    }

    #[test]
    fn status_codes_decide_whether_a_report_is_repeated() {
        for (code, retry) in [
            (Code::Unavailable, true),
            (Code::OutOfRange, true),
            (Code::Unimplemented, true),
            (Code::InvalidArgument, false),
        ] {
            let LeaseError::Grpc { retry: seen, .. } = refused(&Status::new(code, "m"), &RecentTokens::default())
            else {
                panic!("a status")
            };
            assert_eq!(seen, retry, "{code:?}");
        }
    }
}
