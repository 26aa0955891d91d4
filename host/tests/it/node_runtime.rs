//! The Node Runtime control plane (docs/protocols/node-runtime.md): the real binary against a control plane of the
//! tests, with real plugins.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use prost::Message as _;
use runner_host::{
    control::client,
    leases::node_runtime::lease::{AckResponse, CompleteRequest, Lease},
};
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::harness::{
    fixtures,
    node::{Cli, TestNode},
    node_plane::{Answer, Call, NodePlane, frame, in_future, lease, result},
};

const ECHO: &str = "/examples/echo-file/v1";
const WAIT: &str = "/fixtures/wait-file/v1";

/// A file that lets `wait-file` end.
struct Gate(tempfile::TempDir);

impl Gate {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self) -> String {
        self.0.path().join("go").display().to_string()
    }

    fn open(&self) {
        fs::write(self.path(), "").expect("the folder is writable");
    }
}

fn is_ack(call: &Call) -> bool {
    matches!(call, Call::Ack(_))
}

fn reports_of(calls: &[Call], run: &str) -> usize {
    let of_run = |call: &&Call| match call {
        Call::Complete(request) => request.run_id == run,
        Call::Fail(request) => request.run_id == run,
        _ => false,
    };
    calls.iter().filter(of_run).count()
}

async fn heartbeat_with(plane: &NodePlane, node: &TestNode, state: &str) -> Value {
    let found = |call: &Call| match call {
        Call::Heartbeat(_, body) if body["status"]["state"] == state => Some(body.clone()),
        _ => None,
    };
    plane.until(node, "a heartbeat", |calls| calls.iter().find_map(found)).await
}

#[tokio::test]
async fn run_passes_from_stream_to_result() {
    let plane = NodePlane::start().await;
    let more = "[plane.runs.capacity]\nslots = 3\ncpu = \"2\"\n[plane.runs.metadata]\nRegion = \"lab\"\n";
    let node = plane.node(&[fixtures::echo()], more).leasing().await;
    let inputs = [("a.txt", "some text"), ("b.bin;base64", "/wCA")];
    plane.send(&node, lease("run-1", ECHO, &inputs, &[])).await;
    let sent = plane.completed(&node, "run-1").await;
    assert_eq!(result(&sent), BTreeMap::from([("echo-0.bin", "some text"), ("echo-1.bin;base64", "/wCA")]));
    assert_eq!((sent.lease_id.as_str(), sent.node_id.as_str()), ("lease-run-1", "w/07"));
    let timings = sent.timings.expect("timings");
    assert_eq!(timings.duration_ms, timings.queue_time_ms + timings.execution_time_ms);
    assert!(sent.costs.is_some());
    node.says_ended("accepted").await;
    let calls = plane.calls();
    let capacity = json!({ "slots": 3, "cpu": "2" });
    let metadata = json!({ "Region": "lab", "region": "lab" });
    let register = Call::Register(json!({ "nodeId": "w/07", "metadata": metadata, "capacity": capacity }));
    assert_eq!(calls[0], register);
    let status = json!({ "status": { "state": "active", "activeRuns": 0, "availableSlots": 3 } });
    assert_eq!(calls[1], Call::Heartbeat("w%2F07".to_owned(), status), "the first heartbeat is sent at once");
    let Call::Pull(pull) = &calls[2] else { panic!("{calls:#?}") };
    assert_eq!((pull.node_id.as_str(), pull.max_leases), ("w/07", 5));
    assert_eq!(calls.iter().filter(|call| is_ack(call)).count(), 1);
    let page = node.page("/status.json").await.1;
    assert_eq!((&page["registration"], &page["node"]), (&json!("registered"), &json!("w/07")), "{page:#}");
    node.stop().await;
    assert!(plane.calls().contains(&Call::Remove("w%2F07".to_owned())));
    plane.until(&node, "the end of the stream", |calls| calls.contains(&Call::Cancelled).then_some(())).await;
}

#[tokio::test]
async fn runner_gets_the_trace_of_its_run() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    let trace_id = "0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01".to_owned();
    for (run, trace_id, expected) in [
        ("traced", trace_id, "00-0b9f3c523b0e4f0e8f8e6f2e9d0c7a01-8f8e6f2e9d0c7a01-00"),
        ("untraced", String::new(), "none"),
    ] {
        let mut traced = lease(run, "/fixtures/trace/v1", &[], &[]);
        traced.trace_id = trace_id;
        plane.send(&node, traced).await;
        let sent = plane.completed(&node, run).await;
        assert_eq!(result(&sent)["trace.txt"], expected);
    }
    node.kill();
}

#[tokio::test]
async fn failures_say_whether_a_retry_helps() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    for (run, capability, text, code) in [
        ("fails", "/fixtures/fail-details/v1", "", "invalid_input"),
        ("panics", "/fixtures/panic/v1", "", "runner_panic"),
        ("unknown", "/other/v1", "no runner", "no_runner"),
    ] {
        plane.send(&node, lease(run, capability, &[], &[])).await;
        let sent = plane.failed(&node, run).await;
        let details: Value = serde_json::from_str(&sent.error_details).expect("JSON");
        assert!(sent.error_message.contains(text) && !sent.retryable, "{sent:?}");
        assert_eq!(details["code"], code, "{sent:?}");
        assert!(!sent.error_details.contains("stack"), "{sent:?}");
    }
    let mut unmapped = lease("agent-name", ECHO, &[], &[]);
    unmapped.run_spec.as_mut().expect("a spec").metadata.clear();
    plane.send(&node, unmapped).await;
    plane.failed(&node, "agent-name").await;
    let line = node.line(|line| line["event"] == "task.ended" && line["task_id"] == "agent-name").await;
    assert_eq!(line["capability"], "/agents/agent/v1", "{line}");
    node.stop().await;
}

#[tokio::test]
async fn node_without_runners_takes_no_runs_for_a_while() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    for run in ["one", "two", "three"] {
        plane.send(&node, lease(run, "/other/v1", &[], &[])).await;
        plane.failed(&node, run).await;
    }
    assert_eq!(node.says("stream.paused").await["runs"], 3);
    let none_free = json!({ "status": { "state": "active", "activeRuns": 0, "availableSlots": 0 } });
    let none_free = |call: &Call| matches!(call, Call::Heartbeat(_, body) if *body == none_free);
    plane.until(&node, "a heartbeat", |calls| calls.iter().any(none_free).then_some(())).await;
    let page = node.page("/status.json").await.1;
    assert!(page["plane_error"].as_str().is_some_and(|text| text.contains("last 3 runs had no runner")), "{page:#}");
    // The node waited for the fourth lease already. It does not take the fifth one.
    plane.send(&node, lease("four", "/other/v1", &[], &[])).await;
    plane.send(&node, lease("five", ECHO, &[], &[])).await;
    plane.failed(&node, "four").await;
    node.stop().await;
    let returned = plane.failed(&node, "five").await;
    assert!(returned.retryable && returned.error_message.contains("the node stops"), "{returned:?}");
    let line = &node.said("lease.returned")[0];
    assert_eq!((&line["plane"], &line["task_id"]), (&json!("runs"), &json!("five")), "{line}");
}

#[tokio::test]
async fn usage_arrives_with_the_completion() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    let run = |id: &str, usage: Value| lease(id, "/fixtures/usage/v1", &[], &[("usage", &usage.to_string())]);
    let usage = json!([
        { "tokens_in": 1000, "usd_cost": 0.25 },
        { "tokens_in": 200, "tokens_out": 30, "usd_cost": 0.5 },
        { "tokens_out": 7, "usd_cost": -1.0 },
    ]);
    plane.send(&node, run("sum", usage)).await;
    let costs = |sent: CompleteRequest| sent.costs.map(|costs| (costs.tokens_in, costs.tokens_out, costs.usd_cost));
    assert_eq!(costs(plane.completed(&node, "sum").await), Some((1200, 30, 0.75)));
    assert_eq!(node.says_text("usage refused").await["kind"], "BadRequest");
    let mut large = run("large", json!([{ "tokens_in": u64::MAX }, { "tokens_in": 1, "tokens_out": 5 }]));
    large.run_spec.as_mut().expect("a spec").budgets.as_mut().expect("budgets").max_tokens = 0;
    plane.send(&node, large).await;
    assert_eq!(costs(plane.completed(&node, "large").await), Some((i32::MAX, 5, 0.0)));
    plane.send(&node, lease("none", "/fixtures/ok/v1", &[], &[])).await;
    assert_eq!(costs(plane.completed(&node, "none").await), Some((0, 0, 0.0)));
    node.stop().await;
}

#[tokio::test]
async fn runs_over_max_tokens_are_cancelled_and_failed() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    let run = |id: &str, usage: Value, more: &[(&str, &str)]| {
        let usage = usage.to_string();
        let metadata: Vec<_> = more.iter().copied().chain([("usage", usage.as_str())]).collect();
        let mut lease = lease(id, "/fixtures/usage/v1", &[], &metadata);
        lease.run_spec.as_mut().expect("a spec").budgets.as_mut().expect("budgets").max_tokens = 100;
        lease
    };
    plane.send(&node, run("at-the-limit", json!([{ "tokens_in": 60, "tokens_out": 40 }]), &[])).await;
    plane.completed(&node, "at-the-limit").await;
    let over = json!([{ "tokens_in": 60 }, { "tokens_out": 41 }]);
    // This run returns without an error.
    plane.send(&node, run("ends", over.clone(), &[])).await;
    let sent = plane.failed(&node, "ends").await;
    assert_eq!(
        (sent.error_message.as_str(), sent.retryable),
        ("the run used 101 tokens, at most 100 are allowed", false)
    );
    // This run waits for its cancellation.
    plane.send(&node, run("waits", over, &[("waits", "yes")])).await;
    assert!(!plane.failed(&node, "waits").await.retryable);
    let line = node.says_text("cancelled").await;
    assert_eq!(line["reason"], "Budget", "{line}");
    node.stop().await;
}

#[tokio::test]
async fn agent_map_names_the_runner() {
    let plane = NodePlane::start().await;
    let map = "[plane.runs.agent_map]\nagent = \"/examples/echo-file/v1\"\n";
    let node = plane.node(&[fixtures::echo()], map).leasing().await;
    let mut mapped = lease("mapped", ECHO, &[("message", "hello")], &[]);
    mapped.run_spec.as_mut().expect("a spec").metadata.clear();
    plane.send(&node, mapped).await;
    assert_eq!(result(&plane.completed(&node, "mapped").await), BTreeMap::from([("echo-0.bin", "hello")]));
    node.stop().await;
}

#[tokio::test]
async fn late_runs_are_cancelled_and_failed() {
    let plane = NodePlane::start().await;
    let gate = Gate::new();
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    let ended = async |run| {
        let line = node.line(|line| line["event"] == "task.ended" && line["task_id"] == run).await;
        line["reason"].as_str().expect("a reason").to_owned()
    };
    let mut deadline = lease("deadline", WAIT, &[], &[("file", &gate.path())]);
    deadline.deadline_unix_ms = in_future(1500);
    plane.send(&node, deadline).await;
    let sent = plane.failed(&node, "deadline").await;
    assert!(sent.retryable && sent.error_message.contains("deadline"), "{sent:?}");
    assert_eq!(ended("deadline").await, "the deadline of the run has passed");
    let mut duration = lease("duration", WAIT, &[], &[("file", &gate.path())]);
    duration.run_spec.as_mut().expect("a spec").budgets.as_mut().expect("budgets").max_duration_seconds = 1;
    plane.send(&node, duration).await;
    let sent = plane.failed(&node, "duration").await;
    assert_eq!((sent.error_message.as_str(), sent.retryable), ("wall time 1s exceeded", false));
    assert_eq!(ended("duration").await, "wall time 1s exceeded");
    node.stop().await;
}

#[tokio::test]
async fn run_that_waits_past_its_deadline_does_not_start() {
    let plane = NodePlane::start().await;
    let gate = Gate::new();
    let node = plane.node(&[fixtures::zoo()], "").set("MAX_CONCURRENCY", "1").leasing().await;
    plane.send(&node, lease("first", WAIT, &[], &[("file", &gate.path())])).await;
    node.says("task.started").await;
    let mut waits = lease("waits", WAIT, &[], &[("file", &gate.path())]);
    waits.deadline_unix_ms = in_future(1500);
    plane.send(&node, waits).await;
    let sent = plane.failed(&node, "waits").await;
    assert!(sent.retryable && sent.error_message.contains("deadline"), "{sent:?}");
    gate.open();
    plane.completed(&node, "first").await;
    assert_eq!(node.said("task.started").len(), 1, "{}", node.log());
    node.stop().await;
}

#[tokio::test]
async fn full_node_tells_when_a_slot_is_free() {
    let plane = NodePlane::start().await;
    let gate = Gate::new();
    let node = plane.node(&[fixtures::zoo()], "heartbeat_interval_seconds = 1").leasing().await;
    plane.send(&node, lease("run", WAIT, &[], &[("file", &gate.path())])).await;
    let slots = |wanted: [u64; 2]| {
        move |calls: &[Call]| {
            let mut statuses = calls.iter().filter_map(|call| match call {
                Call::Heartbeat(_, body) => Some(&body["status"]),
                _ => None,
            });
            let [active, free] = wanted.map(Value::from);
            statuses.next_back().filter(|status| status["activeRuns"] == active && status["availableSlots"] == free)?;
            Some(())
        }
    };
    plane.until(&node, "a heartbeat of a full node", slots([1, 0])).await;
    gate.open();
    plane.completed(&node, "run").await;
    plane.until(&node, "a heartbeat of a free node", slots([0, 1])).await;
    node.stop().await;
}

#[tokio::test]
async fn failed_ack_does_not_stop_its_run() {
    const ACK: &str = "/lease.LeaseService/Ack";
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    let refused = AckResponse { success: false, message: "no such lease".to_owned() };
    let garbage = b"\xff\xff\xff garbage".to_vec();
    for (run, body, text) in
        [("refused", refused.encode_to_vec(), "no such lease"), ("garbage", garbage, "failed to decode")]
    {
        plane.answer_with(ACK, Some(frame(&body)));
        plane.send(&node, lease(run, ECHO, &[("a", "x")], &[])).await;
        assert_eq!(result(&plane.completed(&node, run).await)["echo-0.bin"], "x");
        let logged = |line: &Value| line["event"] == "lease.not_acknowledged" && line["task_id"] == run;
        let line = node.line(logged).await;
        assert!(line["error"].as_str().is_some_and(|error| error.contains(text)), "{line}");
    }
    node.stop().await;
}

#[tokio::test]
async fn unusable_leases_are_failed_or_skipped() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    let mut expired = lease("expired", ECHO, &[], &[]);
    expired.deadline_unix_ms = in_future(-60_000);
    let mut negative = lease("negative", ECHO, &[], &[]);
    negative.deadline_unix_ms = i64::MIN;
    let mut no_spec = lease("no-spec", ECHO, &[], &[]);
    no_spec.run_spec = None;
    let mut many = lease("many", ECHO, &[], &[]);
    let entries = (0..10_000).map(|number| (number.to_string(), String::new())).collect();
    many.run_spec.as_mut().expect("a spec").input_ref = entries;
    let garbled = lease("garbled", ECHO, &[("a;base64", "no base64")], &[]);
    for (lease, retryable, text) in [
        (expired, true, "the deadline had passed"),
        (negative, false, "its deadline is"),
        (no_spec, false, "no run_spec"),
        (many, false, "10000 entries"),
        (garbled, false, "not base64"),
        (lease("no-json", ECHO, &[], &[("voxel;json", "0.1.2")]), false, "\"voxel;json\" is not JSON"),
        (lease("twice", ECHO, &[], &[("voxel;json", "1"), ("voxel", "1")]), false, "both with and without"),
    ] {
        let run = lease.run_id.clone();
        plane.send(&node, lease).await;
        let sent = plane.failed(&node, &run).await;
        assert!(sent.retryable == retryable && sent.error_message.contains(text), "{sent:?}");
    }
    let acks = plane.acks();
    for id in [String::new(), "x".repeat(100_000)] {
        plane.send(&node, lease(&id, ECHO, &[], &[])).await;
        plane.send(&node, Lease { lease_id: id, ..lease("named", ECHO, &[], &[]) }).await;
    }
    // A deadline that no clock has is far away.
    let mut far = lease("a far run", ECHO, &[("a", "far")], &[]);
    far.deadline_unix_ms = i64::MAX;
    plane.send(&node, far).await;
    assert_eq!(result(&plane.completed(&node, "a far run").await)["echo-0.bin"], "far");
    assert_eq!(node.said("lease.without_ids").len(), 4, "{}", node.log());
    assert_eq!(plane.acks(), acks + 1, "leases without ids are not acknowledged");
    for run in ["expired", "negative", "no-spec", "many", "garbled", "no-json", "twice"] {
        assert_eq!(reports_of(&plane.calls(), run), 1, "{run}");
    }
    node.stop().await;
}

#[tokio::test]
async fn large_result_is_refused_before_sending() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    // As base64, these bytes are larger than the limit.
    let input = base64(&vec![0xff; 2_500_000]);
    plane.send(&node, lease("large", ECHO, &[("a;base64", &input)], &[])).await;
    let sent = plane.failed(&node, "large").await;
    assert!(sent.error_message.contains("at most 3145728 bytes"), "{sent:?}");
    node.stop().await;
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.encode(bytes)
}

#[tokio::test]
async fn drain_finishes_runs_and_returns_new_leases() {
    let plane = NodePlane::start().await;
    let gate = Gate::new();
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    plane.send(&node, lease("running", WAIT, &[], &[("file", &gate.path())])).await;
    node.says("task.started").await;
    let stream = plane.stream(&node).await;
    node.term();
    let beat = heartbeat_with(&plane, &node, "draining").await;
    assert_eq!(beat["status"]["availableSlots"], 0, "{beat}");
    plane.send_on(stream, lease("late", WAIT, &[], &[("file", &gate.path())]));
    let sent = plane.failed(&node, "late").await;
    assert!(sent.retryable, "{sent:?}");
    plane.until(&node, "the end of the stream", |calls| calls.contains(&Call::Cancelled).then_some(())).await;
    gate.open();
    plane.completed(&node, "running").await;
    assert_eq!(node.wait().await, 0, "{}", node.log());
    assert!(plane.calls().contains(&Call::Remove("w%2F07".to_owned())));
    assert_eq!(plane.acks(), 2);
}

#[tokio::test]
async fn killed_control_plane_gets_one_accepted_report() {
    let mut plane = NodePlane::start().await;
    let gate = Gate::new();
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    plane.send(&node, lease("run", WAIT, &[], &[("file", &gate.path())])).await;
    plane.until(&node, "an ack", |calls| calls.iter().any(is_ack).then_some(())).await;
    node.says("task.started").await;
    plane.kill().await;
    gate.open();
    node.says("report.waiting").await;
    plane.restart().await;
    plane.completed(&node, "run").await;
    node.says("report.delivered").await;
    assert_eq!(reports_of(&plane.calls(), "run"), 1, "{:#?}", plane.calls());
    // The stream comes back too.
    plane.send(&node, lease("next", WAIT, &[], &[("file", &gate.path())])).await;
    plane.completed(&node, "next").await;
    node.stop().await;
}

#[tokio::test]
async fn killed_node_reports_its_result_once() {
    let plane = NodePlane::start().await;
    let first = plane.node(&[fixtures::echo()], "").set("RUNNER_HOST_CRASH_AT", "after-write").leasing().await;
    plane.send(&first, lease("run", ECHO, &[("a;base64", "/wCA")], &[])).await;
    assert_eq!(first.wait().await, -1, "killed, not ended: {}", first.log());
    let next = plane.node(&[fixtures::echo()], "").after(&first).leasing().await;
    let sent = plane.completed(&next, "run").await;
    assert_eq!(result(&sent), BTreeMap::from([("echo-0.bin;base64", "/wCA")]));
    assert!(next.said("task.started").is_empty(), "the run does not start again: {}", next.log());
    // A stop before the answer has arrived would send the report again.
    next.says("report.delivered").await;
    next.stop().await;
    assert_eq!(reports_of(&plane.calls(), "run"), 1);
}

#[tokio::test]
async fn unaccepted_report_is_repeated_unchanged() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    let answers = [Answer::NotAccepted, Answer::Status(Code::Internal), Answer::Status(Code::Cancelled)];
    for (number, answer) in answers.into_iter().enumerate() {
        plane.answer_reports(answer);
        let run = format!("run-{number}");
        plane.send(&node, lease(&run, ECHO, &[("a", "x")], &[])).await;
        plane.until(&node, "a repeat", |calls| (reports_of(calls, &run) >= 2).then_some(())).await;
        plane.answer_reports(Answer::Accept);
        node.line(|line| line["event"] == "report.delivered" && line["task_id"] == run.as_str()).await;
    }
    assert_eq!(plane.count(|call| matches!(call, Call::Fail(_))), 0, "a completion is never turned into a failure");
    plane.answer_reports(Answer::Status(Code::InvalidArgument));
    plane.send(&node, lease("final", ECHO, &[("a", "x")], &[])).await;
    node.says_ended("refused").await;
    assert_eq!(reports_of(&plane.calls(), "final"), 1);
    node.stop().await;
}

/// A completion of `run` that this control plane did not accept for `hours`, in the form of the outbox.
fn owed_report(plane: &NodePlane, run: &str, hours: i64) -> Value {
    let since = Timestamp::now() - SignedDuration::from_hours(hours);
    json!({
        "report": {
            "plane": "runs", "base_url": plane.url(), "node": "w/07",
            "address": { "task": run, "at": json!({ "lease": "old", "run": run }).to_string() },
            "job_id": null, "domain_id": null, "capability": ECHO,
            "verdict": { "outcome": { "end": "completed" }, "artifacts": [], "inputs": [] },
            "ended_at": since,
        },
        "tries": { "count": 1, "first": since, "last": since, "error": "no", "not_accepted_since": since },
    })
}

#[tokio::test]
async fn report_not_accepted_for_a_day_is_set_aside() {
    let mut plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    plane.answer_reports(Answer::NotAccepted);
    let owed = json!({ "reports": [owed_report(&plane, "old", 25), owed_report(&plane, "new", 23)] });
    client::ask::<Value>(node.state_dir(), "/outbox/take-up", Some(&owed)).await.expect("taken up");
    let line = node.says("report.set_aside").await;
    assert_eq!((&line["level"], &line["task_id"], &line["tries"]), (&json!("ERROR"), &json!("old"), &json!(2)));
    // A report that is not accepted delays no other one.
    plane.until(&node, "the other one", |calls| (reports_of(calls, "new") >= 1).then_some(())).await;
    plane.answer_reports(Answer::Accept);
    plane.send(&node, lease("next", ECHO, &[("a", "x")], &[])).await;
    node.says_ended("accepted").await;
    node.line(|line| line["event"] == "report.delivered" && line["task_id"] == "new").await;
    let outbox = node.page("/status.json").await.1["outbox"].take();
    assert_eq!((&outbox["waiting"], &outbox["set_aside"]), (&json!(0), &json!(1)), "{outbox:#}");
    node.stop().await;
    assert_eq!(reports_of(&plane.calls(), "old"), 1, "not sent again, also not at a stop");

    plane.restart().await;
    let next = plane.node(&[fixtures::echo()], "").after(&node).leasing().await;
    let listed = client::ask::<Value>(node.state_dir(), "/outbox", None::<&Value>).await.expect("listed");
    assert_eq!(
        (&listed["reports"][0]["task_id"], &listed["reports"][0]["state"]),
        (&json!("old"), &json!("set-aside"))
    );
    // A new lease of the run sends its report with the new lease id. The run does not start again.
    plane.send(&next, lease("old", ECHO, &[("a", "x")], &[])).await;
    next.says("report.delivered").await;
    let leases: Vec<String> = plane
        .calls()
        .iter()
        .filter_map(|call| match call {
            Call::Complete(sent) if sent.run_id == "old" => Some(sent.lease_id.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(leases, ["old", "lease-old"]);
    assert!(next.said("task.started").is_empty(), "{}", next.log());
    next.stop().await;
}

#[tokio::test]
async fn operator_retries_a_report_that_was_set_aside() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    plane.answer_reports(Answer::NotAccepted);
    let owed = json!({ "reports": [owed_report(&plane, "old", 25)] });
    client::ask::<Value>(node.state_dir(), "/outbox/take-up", Some(&owed)).await.expect("taken up");
    node.says("report.set_aside").await;
    node.stop().await;
    plane.answer_reports(Answer::Accept);
    let outbox = |verb: &'static str| {
        Cli::new(&["outbox", verb]).arg(if verb == "list" { "-ojson" } else { "--all" }).arg("--state-dir")
    };
    let listed = outbox("list").arg(node.state_dir()).run().await.expect(0);
    assert!(listed.stdout.contains("\"set-aside\""), "{}", listed.stdout);
    let retried = outbox("retry").arg(node.state_dir()).run().await.expect(0);
    assert_eq!(retried.stderr, "no node runs here; 1 report will be sent when one starts");
    let next = plane.node(&[fixtures::echo()], "").after(&node).leasing().await;
    next.says("report.delivered").await;
    next.stop().await;
}

#[tokio::test]
async fn run_leased_again_starts_once() {
    let plane = NodePlane::start().await;
    let gate = Gate::new();
    let node = plane.node(&[fixtures::zoo()], "").set("MAX_CONCURRENCY", "2").leasing().await;
    let run = |lease_id: &str| {
        let mut run = lease("run", WAIT, &[], &[("file", &gate.path())]);
        run.lease_id = lease_id.to_owned();
        run
    };
    plane.send(&node, run("first")).await;
    node.says("task.started").await;
    plane.send(&node, run("second")).await;
    node.says("lease.replaced").await;
    plane.until(&node, "two acks", |calls| (calls.iter().filter(|call| is_ack(call)).count() == 2).then_some(())).await;
    plane.answer_reports(Answer::NotAccepted);
    gate.open();
    assert_eq!(plane.completed(&node, "run").await.lease_id, "second");
    node.says("report.waiting").await;
    plane.answer_reports(Answer::Accept);
    node.says("report.delivered").await;
    assert_eq!(node.said("task.started").len(), 1, "{}", node.log());
    node.stop().await;
}

#[tokio::test]
async fn new_lease_of_a_cancelled_run_starts_it_again() {
    let plane = NodePlane::start().await;
    let gate = Gate::new();
    let node = plane.node(&[fixtures::zoo()], "").set("MAX_CONCURRENCY", "2").leasing().await;
    let run = |lease_id: &str, ms: i64| {
        let mut run = lease("run", "/fixtures/ignores-cancel/v1", &[], &[("file", &gate.path())]);
        run.lease_id = lease_id.to_owned();
        run.deadline_unix_ms = in_future(ms);
        run
    };
    plane.send(&node, run("first", 1_500)).await;
    node.line(|line| line["message"] == "cancel ignored").await;
    plane.send(&node, run("second", 3_600_000)).await;
    plane.send(&node, run("third", 3_600_000)).await;
    plane.until(&node, "all acks", |calls| (calls.iter().filter(|call| is_ack(call)).count() == 3).then_some(())).await;
    node.says("lease.waits").await;
    gate.open();
    assert_eq!(plane.completed(&node, "run").await.lease_id, "third");
    assert_eq!(node.said("task.started").len(), 2, "{}", node.log());
    let ended = &node.said("task.ended")[0];
    let reason = "lease of task run is over, a newer one starts it again";
    assert_eq!((&ended["report"], &ended["error"]), (&json!("refused"), &json!(reason)), "{ended}");
    node.stop().await;
    assert_eq!(reports_of(&plane.calls(), "run"), 1, "the cancelled run is not reported");
}

#[tokio::test]
async fn new_lease_moves_the_deadline_of_its_run() {
    let plane = NodePlane::start().await;
    let gate = Gate::new();
    let node = plane.node(&[fixtures::zoo()], "").set("MAX_CONCURRENCY", "2").leasing().await;
    let run = |id: &str, lease_id: &str, ms: i64| {
        let mut run = lease(id, WAIT, &[], &[("file", &gate.path())]);
        run.lease_id = lease_id.to_owned();
        run.deadline_unix_ms = in_future(ms);
        run
    };
    plane.send(&node, run("later", "first", 4_000)).await;
    plane.send(&node, run("sooner", "first", 3_600_000)).await;
    plane.send(&node, run("later", "second", 3_600_000)).await;
    plane.send(&node, run("sooner", "second", 5_000)).await;
    // The first deadline of the other run has passed by then.
    let sent = plane.failed(&node, "sooner").await;
    assert!(sent.retryable && sent.error_message.contains("deadline"), "{sent:?}");
    assert_eq!(sent.lease_id, "second");
    gate.open();
    assert_eq!(plane.completed(&node, "later").await.lease_id, "second");
    node.stop().await;
}

#[tokio::test]
async fn run_leased_again_while_its_report_waits_starts_once() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    plane.answer_reports(Answer::NotAccepted);
    plane.send(&node, lease("run", ECHO, &[("a", "x")], &[])).await;
    node.says("report.waiting").await;
    let mut again = lease("run", ECHO, &[("a", "x")], &[]);
    again.lease_id = "again".to_owned();
    plane.send(&node, again).await;
    node.says("task.leased_again").await;
    let newest = |call: &Call| matches!(call, Call::Complete(request) if request.lease_id == "again");
    plane.until(&node, "a report with the new lease", |calls| calls.iter().any(newest).then_some(())).await;
    plane.answer_reports(Answer::Accept);
    node.says("report.delivered").await;
    assert_eq!(node.said("task.started").len(), 1, "{}", node.log());
    assert_eq!(plane.acks(), 2);
    node.stop().await;
}

#[tokio::test]
async fn flood_of_leases_is_bounded() {
    let plane = NodePlane::start().await;
    let gate = Gate::new();
    let more = "max_concurrent_leases = 3";
    let node = plane.node(&[fixtures::zoo()], more).set("MAX_CONCURRENCY", "8").leasing().await;
    let stream = plane.stream(&node).await;
    let mut outstanding = 0;
    for number in 0..1000 {
        plane.send_on(stream.clone(), lease(&format!("run-{number}"), WAIT, &[], &[("file", &gate.path())]));
    }
    plane
        .until(&node, "three acks", |calls| (calls.iter().filter(|call| is_ack(call)).count() == 3).then_some(()))
        .await;
    gate.open();
    plane
        .until(&node, "1000 reports", |calls| {
            (calls.iter().filter(|c| matches!(c, Call::Complete(_))).count() == 1000).then_some(())
        })
        .await;
    let mut most = 0;
    for call in plane.calls() {
        match call {
            Call::Ack(_) => outstanding += 1,
            // The answer to the previous report may still be on its way.
            Call::Complete(_) => outstanding -= 1,
            _ => {}
        }
        most = most.max(outstanding);
    }
    assert!(most <= 3, "{most} leases were acknowledged at once");
    assert_eq!(outstanding, 0);
    node.stop().await;
}

#[tokio::test]
async fn ended_stream_is_opened_again() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    let registers = || plane.count(|call| matches!(call, Call::Register(_)));
    plane.end_stream(&node, Some(Status::cancelled("Request was cancelled"))).await;
    let line = node.says("stream.ended").await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains("Cancelled")), "{line}");
    plane.send(&node, lease("one", ECHO, &[("a", "x")], &[])).await;
    plane.completed(&node, "one").await;
    assert_eq!(registers(), 1);
    // A clean end means that the control plane may not know the node.
    plane.end_stream(&node, None).await;
    plane.send(&node, lease("two", ECHO, &[("a", "x")], &[])).await;
    plane.completed(&node, "two").await;
    assert_eq!(registers(), 2);
    plane.end_stream(&node, Some(Status::not_found("unknown node"))).await;
    plane.send(&node, lease("three", ECHO, &[("a", "x")], &[])).await;
    plane.completed(&node, "three").await;
    assert_eq!(registers(), 3);
    node.stop().await;
}

#[tokio::test]
async fn registration_ends_the_pause_of_the_stream() {
    let mut plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "heartbeat_interval_seconds = 1").leasing().await;
    plane.stream(&node).await;
    plane.kill().await;
    // From the third end on, the pause has at least 8 s.
    node.line(|line| line["event"] == "stream.ended" && line["retry_in_ms"].as_u64() >= Some(8_000)).await;
    plane.knows_node(false);
    plane.restart().await;
    node.says("registration.lost").await;
    let registered = Instant::now();
    plane.stream(&node).await;
    assert!(registered.elapsed() < Duration::from_secs(4), "{:?}", registered.elapsed());
    node.stop().await;
}

#[tokio::test]
async fn full_node_sends_no_heartbeat_after_each_run() {
    let plane = NodePlane::start().await;
    let more = "heartbeat_interval_seconds = 1\nmax_concurrent_leases = 50";
    let node = plane.node(&[fixtures::zoo()], more).set("MAX_CONCURRENCY", "1").leasing().await;
    let began = Instant::now();
    for run in 0..100 {
        let run = lease(&format!("run-{run}"), "/fixtures/ignores-cancel/v1", &[], &[("sleep_ms;json", "30")]);
        plane.send(&node, run).await;
    }
    let ended = |calls: &[Call]| calls.iter().filter(|call| matches!(call, Call::Complete(_))).count() == 100;
    plane.until(&node, "all completions", |calls| ended(calls).then_some(())).await;
    let heartbeats = plane.count(|call| matches!(call, Call::Heartbeat(..)));
    // One at the start, one each second, and one when the node is free.
    assert!(heartbeats as u64 <= began.elapsed().as_secs() + 3, "{heartbeats} in {:?}", began.elapsed());
    node.stop().await;
}

#[tokio::test]
async fn forgotten_node_registers_again() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "heartbeat_interval_seconds = 1").leasing().await;
    plane.knows_node(false);
    node.says("registration.lost").await;
    let registers = |calls: &[Call]| calls.iter().filter(|call| matches!(call, Call::Register(_))).count();
    plane.until(&node, "a second registration", |calls| (registers(calls) == 2).then_some(())).await;
    node.stop().await;
}

#[tokio::test]
async fn registration_is_retried_and_a_known_node_needs_none() {
    let plane = NodePlane::start().await;
    plane.answer_registrations(StatusCode::BAD_GATEWAY);
    let node = plane.node(&[fixtures::echo()], "").start().await;
    node.says("registration.failed").await;
    assert!(node.said("node.leasing").is_empty());
    let (status, page) = node.page("/ready").await;
    assert!(status == 503 && page["reason"].as_str().is_some_and(|reason| reason.contains("502")), "{page}");
    // A database may refuse a second registration of a node that it knows.
    plane.answer_registrations(StatusCode::INTERNAL_SERVER_ERROR);
    plane.knows_node(true);
    node.says("node.leasing").await;
    plane.send(&node, lease("run", ECHO, &[("a", "x")], &[])).await;
    plane.completed(&node, "run").await;
    node.stop().await;
}

#[tokio::test]
async fn wrong_settings_stop_the_start() {
    let plane = NodePlane::start().await;
    for (more, text) in [
        ("node_id = \" \"", "node_id: is blank"),
        ("max_concurrent_leases = 0", "max_concurrent_leases: expected a whole number from 1 to 65536, found 0"),
        ("max_leases = 1", "max_leases: there is no such key"),
        ("[plane.runs.agent_map]\na = \"echo\"", "agent_map.a: capability"),
        ("grpc_url = \"http://control.example\"", "grpc_url: http://control.example: plain http"),
    ] {
        let table = if more.starts_with("node_id") {
            format!("[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \"{}\"\n{more}\n", plane.url())
        } else {
            let url = plane.url();
            format!("[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \"{url}\"\nnode_id = \"n\"\n{more}\n")
        };
        let setup = crate::harness::node::NodeSetup::with_config(&table, &[fixtures::echo()]);
        let ended = setup.refused().await.expect(78);
        assert!(ended.stderr.contains(text), "{text}: {}", ended.stderr);
    }
    assert!(plane.calls().is_empty(), "nothing is sent");
}
