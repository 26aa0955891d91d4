//! The report of a task for the DMS: its call, reason and details (posemesh.md sections 4.7 and 4.8).

use serde::Serialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{address::At, wire::FailRequest};
use crate::model::{Artifact, Outcome, TaskResult};

/// Longest reason that control planes are known to accept, in bytes.
const REASON_BYTES_MAX: usize = 4096;
/// Largest details of a runner that are reported, in bytes of JSON. Control planes are known to accept twice as much
/// for all details.
const OWN_DETAILS_BYTES_MAX: usize = 32 * 1024;

/// The request to send.
#[derive(Debug)]
pub(super) struct Report {
    /// The last segment of the path.
    pub(super) verb: &'static str,
    /// JSON.
    pub(super) body: String,
}

/// A [`super::wire::CompleteRequest`] as it is sent.
#[derive(Serialize)]
struct Complete<'a> {
    output_cids: Vec<&'a str>,
    meta: Ended<'a>,
}

/// The common part of a completion and a failure.
#[derive(Serialize)]
struct Ended<'a> {
    job: Job<'a>,
    artifacts: Vec<Listed<'a>>,
}

#[derive(Serialize)]
struct Job<'a> {
    task_id: Uuid,
    job_id: Option<Uuid>,
    domain_id: Option<Uuid>,
    capability: &'a str,
}

/// An artifact on the wire: only these four fields.
#[derive(Serialize)]
struct Listed<'a> {
    logical_path: &'a str,
    name: &'a str,
    data_type: &'a str,
    id: Option<&'a str>,
}

/// The report for a task result. `None`: the task must not be reported.
pub(super) fn report(to: &At<'_>, task_result: &TaskResult) -> Option<Report> {
    let reason = match &task_result.outcome {
        Outcome::Cancelled | Outcome::LeaseLost => return None,
        Outcome::Completed => {
            let body = Complete { output_cids: output_cids(task_result), meta: Ended::new(to, task_result) };
            return Some(Report { verb: "complete", body: text(&body) });
        }
        Outcome::Setup { .. } => return setup_failure(&task_result.outcome),
        Outcome::Failed { message, .. } => format!("runner failed: {message}"),
        Outcome::Panicked { message, place } => {
            // The place is the most useful part, so it must not be cut off.
            let place = format!(" at {place}");
            let limit = REASON_BYTES_MAX.saturating_sub(place.len());
            format!("{}{place}", cut_at(&format!("runner panicked: {message}"), limit))
        }
        Outcome::Storage { message } => format!("storage: {message}"),
        Outcome::Budget { message, .. } => format!("budget: {message}"),
        Outcome::NoRunner => format!("no runner registered for capability: {}", to.capability),
        Outcome::CancelledByOperator => task_result.outcome.reason().unwrap_or_default(),
        Outcome::Drained => "drained".to_owned(),
        Outcome::HostFault { message } => format!("host fault: {message}"),
    };
    let Ended { job, artifacts } = Ended::new(to, task_result);
    let mut details = Map::from_iter([("job".into(), json!(job)), ("artifacts".into(), json!(artifacts))]);
    if let Outcome::Failed { details: own, .. } = &task_result.outcome
        && !own.is_null()
    {
        let bytes = own.to_string().len();
        let own = if bytes > OWN_DETAILS_BYTES_MAX {
            json!({ "omitted": format!("{bytes} bytes, at most {OWN_DETAILS_BYTES_MAX} are reported") })
        } else {
            own.clone()
        };
        details.insert("details".into(), own);
    }
    Some(fail(&reason, details, &task_result.outcome))
}

/// The report for a task that could not be set up. It has no job (posemesh.md section 4.8).
pub(super) fn setup_failure(outcome: &Outcome) -> Option<Report> {
    let Outcome::Setup { stage, message } = outcome else { return None };
    let mut details = Map::new();
    details.insert("stage".into(), stage.code().into());
    details.insert("error".into(), cut(message).into());
    Some(fail("node_setup_failed", details, outcome))
}

fn fail(reason: &str, mut details: Map<String, Value>, outcome: &Outcome) -> Report {
    details.insert("outcome".into(), outcome.word().into());
    details.insert("code".into(), outcome.code().into());
    details.insert("retryable".into(), outcome.retryable().into());
    let body = FailRequest { reason: cut(reason).to_owned(), details: Value::Object(details) };
    Report { verb: "fail", body: text(&body) }
}

impl<'a> Ended<'a> {
    fn new(to: &'a At<'_>, task_result: &'a TaskResult) -> Self {
        let job = Job { task_id: to.task, job_id: to.job, domain_id: to.domain_id, capability: &to.capability };
        Self { job, artifacts: task_result.artifacts.iter().map(Listed::new).collect() }
    }
}

impl<'a> Listed<'a> {
    fn new(artifact: &'a Artifact) -> Self {
        Self {
            logical_path: &artifact.logical_path,
            name: &artifact.name,
            data_type: &artifact.data_type,
            id: artifact.id.as_deref(),
        }
    }
}

fn text(body: &impl Serialize) -> String {
    serde_json::to_string(body).expect("strings and JSON values are JSON")
}

/// Ids in the order of the artifacts, each once.
fn output_cids(task_result: &TaskResult) -> Vec<&str> {
    let mut seen = std::collections::HashSet::new();
    let ids = task_result.artifacts.iter().filter_map(|artifact| artifact.id.as_deref());
    ids.filter(|id| seen.insert(*id)).collect()
}

fn cut(text: &str) -> &str {
    cut_at(text, REASON_BYTES_MAX)
}

/// The beginning of `text`, at most `bytes` long, cut at a character boundary.
fn cut_at(text: &str, bytes: usize) -> &str {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{leases::dms::tests::sample_lease, model::SetupStage};

    const TASK: &str = "0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01";

    fn artifact(path: &str, id: Option<&str>) -> Artifact {
        Artifact {
            logical_path: path.into(),
            name: path.replace('/', "_"),
            data_type: "json".into(),
            id: id.map(Into::into),
            size: Some(3),
            sha256: Some("ab".repeat(32)),
        }
    }

    fn sent(outcome: Outcome, artifacts: Vec<Artifact>) -> (&'static str, Value) {
        let lease = sample_lease();
        let to = At::read(&lease.address).expect("an address");
        let sent = report(&to, &TaskResult { artifacts, ..TaskResult::bare(outcome) }).expect("a report");
        (sent.verb, serde_json::from_str(&sent.body).expect("JSON"))
    }

    #[test]
    fn completion_lists_the_published_artifacts() {
        // posemesh.md section 4.7: four fields per artifact. Size and digest stay on the node.
        let artifacts = vec![
            artifact("b", Some("d-2")),
            artifact("c", None),
            artifact("a", Some("d-1")),
            artifact("d", Some("d-2")),
        ];
        let (verb, body) = sent(Outcome::Completed, artifacts);
        assert_eq!(verb, "complete");
        assert_eq!(body["output_cids"], json!(["d-2", "d-1"]));
        assert_eq!(
            body["meta"]["job"],
            json!({ "task_id": TASK, "job_id": null, "domain_id": "3f0c1c1e-8f57-4d0a-9a83-5f0f3f1b7c11",
                    "capability": "/lab/echo/v1" })
        );
        assert_eq!(
            body["meta"]["artifacts"][1],
            json!({ "logical_path": "c", "name": "c", "data_type": "json", "id": null })
        );
        assert_eq!(body["meta"].as_object().map(Map::len), Some(2));
        assert_eq!(body.as_object().map(Map::len), Some(2));
    }

    /// Checks an outcome: its reason, then outcome/code/retryable, then the keys of the details.
    fn check(outcome: Outcome, reason: &str, words: &str, keys: &str) {
        let (verb, body) = sent(outcome, vec![artifact("a", Some("d-1"))]);
        let details = body["details"].as_object().expect("details");
        let word = |key: &str| details[key].as_str().expect("text").to_owned();
        assert_eq!(verb, "fail");
        assert_eq!(body["reason"], reason);
        assert_eq!(format!("{}/{}/{}", word("outcome"), word("code"), details["retryable"]), words);
        assert_eq!(details.keys().map(String::as_str).collect::<Vec<_>>().join(" "), keys);
    }

    #[test]
    fn every_outcome_has_its_reason_and_details() {
        let plain = "artifacts code job outcome retryable";
        let failed = |retryable, invalid_input, details| Outcome::Failed {
            message: "outer: inner".into(),
            retryable,
            invalid_input,
            details,
        };
        check(failed(true, false, Value::Null), "runner failed: outer: inner", "failed/runner_error/true", plain);
        check(
            failed(false, true, json!({ "line": 3 })),
            "runner failed: outer: inner",
            "failed/invalid_input/false",
            "artifacts code details job outcome retryable",
        );
        check(
            Outcome::Panicked { message: "oops".into(), place: "src/lib.rs:7".into() },
            "runner panicked: oops at src/lib.rs:7",
            "panicked/runner_panic/false",
            plain,
        );
        check(Outcome::Storage { message: "full".into() }, "storage: full", "storage/storage/true", plain);
        check(Outcome::Drained, "drained", "drained/drained/true", plain);
        check(Outcome::CancelledByOperator, "cancelled by operator", "cancelled/cancelled_by_operator/false", plain);
        check(
            Outcome::NoRunner,
            "no runner registered for capability: /lab/echo/v1",
            "host-fault/no_runner/true",
            plain,
        );
        check(Outcome::HostFault { message: "odd".into() }, "host fault: odd", "host-fault/host_fault/true", plain);
        check(
            Outcome::Setup { stage: SetupStage::BuildPorts, message: "lease missing domain_id".into() },
            "node_setup_failed",
            "host-fault/build_ports/true",
            "code error outcome retryable stage",
        );
    }

    #[test]
    fn lost_and_cancelled_tasks_have_no_report() {
        for outcome in [Outcome::Cancelled, Outcome::LeaseLost] {
            let task_result = TaskResult::bare(outcome);
            assert!(report(&At::read(&sample_lease().address).expect("an address"), &task_result).is_none());
        }
    }

    #[test]
    fn long_reasons_keep_the_place_of_a_panic() {
        let failed =
            Outcome::Failed {
                message: "é".repeat(4096), retryable: false, invalid_input: false, details: Value::Null
            };
        let (_, body) = sent(failed, Vec::new());
        assert_eq!(body["reason"].as_str().map(str::len), Some(REASON_BYTES_MAX - 1));
        let panicked = Outcome::Panicked { message: "é".repeat(4096), place: "src/lib.rs:7".into() };
        let (_, body) = sent(panicked, Vec::new());
        let reason = body["reason"].as_str().expect("text");
        assert!(reason.len() <= REASON_BYTES_MAX && reason.ends_with("é at src/lib.rs:7"));
    }

    #[test]
    fn large_details_are_omitted_from_the_report() {
        let failed =
            |details| Outcome::Failed { message: String::new(), retryable: false, invalid_input: false, details };
        let (_, body) = sent(failed(json!("x".repeat(OWN_DETAILS_BYTES_MAX))), Vec::new());
        assert_eq!(body["details"]["details"], json!({ "omitted": "32770 bytes, at most 32768 are reported" }));
        let (_, body) = sent(failed(json!("x".repeat(100))), Vec::new());
        assert_eq!(body["details"]["details"].as_str().map(str::len), Some(100));
    }
}
