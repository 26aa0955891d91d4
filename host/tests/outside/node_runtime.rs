//! A Node Runtime control plane in Python, with grpcio. It is another implementation of the wire.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::Request;
use http_body_util::BodyExt as _;
use runner_host::transport::{self, Client};
use serde_json::{Value, json};

use crate::harness::{
    EVENT_LIMIT, fixtures,
    node::{NodeSetup, TestNode},
    node_plane::in_future,
    within,
};

const ECHO: &str = "/examples/echo-file/v1";
const WAIT: &str = "/fixtures/wait-file/v1";

/// The running program. It ends on drop, with its stdin.
struct ControlPlane {
    process: Child,
    client: Client,
    rest: u64,
    grpc: u64,
}

impl ControlPlane {
    fn start() -> Self {
        let host = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = host.join("../target/outside/python");
        assert!(
            python.join("grpc_tools").is_dir(),
            "grpcio-tools is missing in {}; run host/tests/outside/install",
            python.display()
        );
        let mut process = Command::new("python3")
            .arg(host.join("tests/outside/control_plane.py"))
            .arg(host.join("protos"))
            .env("PYTHONPATH", &python)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|err| panic!("python3 is missing: {err}; run host/tests/outside/install"));
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("piped")).read_line(&mut line).expect("it is text");
        assert!(!line.is_empty(), "the control plane ended at its start; its errors are above");
        let ports: Value = serde_json::from_str(&line).expect("JSON");
        let port = |name: &str| ports[name].as_u64().expect("a port");
        Self { rest: port("rest"), grpc: port("grpc"), client: Client::new(transport::Config::default()), process }
    }

    fn node(&self, plugins: &[PathBuf]) -> NodeSetup {
        self.node_with(plugins, "")
    }

    /// A node with `more` lines in its table.
    fn node_with(&self, plugins: &[PathBuf], more: &str) -> NodeSetup {
        let Self { rest, grpc, .. } = self;
        let table = format!(
            "[plane.runs]\nkind = \"node-runtime\"\nnode_id = \"outside\"\n\
             control_plane_url = \"http://127.0.0.1:{rest}\"\ngrpc_url = \"http://127.0.0.1:{grpc}\"\n{more}\n"
        );
        NodeSetup::with_config(&table, plugins)
    }

    /// Makes one HTTP request. Fails on a status above 299.
    async fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = Request::builder().method(method).uri(format!("http://127.0.0.1:{}{path}", self.rest));
        let request = request.body(transport::full(body)).expect("a request");
        let answer = self.client.send(request, EVENT_LIMIT).await.expect("the control plane answers");
        let status = answer.status();
        let body = answer.into_body().collect().await.expect("a whole answer").to_bytes();
        assert!(status.is_success(), "{method} {path}: {status}: {}", body.escape_ascii());
        if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).expect("JSON") }
    }

    async fn send(&self, leases: &[Value]) {
        self.ask("POST", "/test/leases", &json!(leases)).await;
    }

    async fn mode(&self, mode: Value) {
        self.ask("POST", "/test/mode", &mode).await;
    }

    /// Waits for this many calls that fit `query`, and returns all of them.
    async fn calls(&self, node: &TestNode, query: &str, count: usize) -> Vec<Value> {
        let path = format!("/test/calls?{query}&count={count}");
        let calls = within(&path, || node.log(), self.ask("GET", &path, &Value::Null)).await;
        calls.as_array().expect("a list").clone()
    }

    /// The one accepted report of a run.
    async fn accepted(&self, node: &TestNode, run: &str) -> Value {
        let calls = self.calls(node, &format!("run={run}&accepted=True"), 1).await;
        assert_eq!(calls.len(), 1, "{calls:#?}");
        calls[0].clone()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// A lease for a runner of this capability that ends in five minutes.
fn lease(run: &str, capability: &str, inputs: Value, metadata: Value) -> Value {
    let mut metadata = metadata;
    metadata["capability"] = capability.into();
    json!({
        "lease_id": format!("lease-{run}"),
        "run_id": run,
        "deadline_unix_ms": in_future(300_000),
        "run_spec": { "agent_id": "agent", "version": "v1", "input_ref": inputs, "metadata": metadata },
    })
}

fn echo(run: &str) -> Value {
    lease(run, ECHO, json!({ "a": "some text" }), json!({}))
}

#[tokio::test]
async fn leased_scan_gives_cloud_picture_and_report() {
    let plane = ControlPlane::start();
    let node = plane.node(&[fixtures::pointcloud()]).leasing().await;
    let points: String = (0..2000).map(|n| format!("{} {} {}\n", n % 40, n / 40, n % 7)).collect();
    let scan = format!(
        "ply\nformat ascii 1.0\nelement vertex 2000\nproperty float x\nproperty float y\nproperty float z\nend_header\n{points}"
    );
    let inputs = json!({ "scan.ply;base64": BASE64_STANDARD.encode(scan) });
    plane.send(&[lease("scan", "/pointcloud/downsample/v1", inputs, json!({}))]).await;
    let report = plane.accepted(&node, "scan").await;
    assert_eq!(report["kind"], "complete", "{report:#}");
    let result = report["report"]["result"].as_object().expect("results");
    let text = |name: &str| result[name].as_str().unwrap_or_else(|| panic!("{name} in {:?}", result.keys()));
    let summary: Value = serde_json::from_str(text("report.json")).expect("JSON");
    assert_eq!(summary["points_in"], 2000, "{summary}");
    assert!(BASE64_STANDARD.decode(text("preview.png;base64")).expect("base64").starts_with(b"\x89PNG\r\n\x1a\n"));
    assert!(result.keys().any(|name| name.starts_with("cloud.ply")), "{:?}", result.keys());
    assert_eq!(plane.calls(&node, "kind=ack", 1).await.len(), 1);
    node.stop().await;
    plane.calls(&node, "kind=remove", 1).await;
    plane.calls(&node, "kind=pull-ended", 1).await;
}

#[tokio::test]
async fn each_crash_point_leaves_one_accepted_report() {
    let plane = ControlPlane::start();
    let plugins = [fixtures::echo()];
    for point in ["before-write", "after-write", "before-report", "answer-read"] {
        let first = plane.node(&plugins).set("RUNNER_HOST_CRASH_AT", point).leasing().await;
        plane.send(&[echo(point)]).await;
        assert_eq!(first.wait().await, -1, "killed, not ended: {}", first.log());
        let next = plane.node(&plugins).after(&first).leasing().await;
        if point == "before-write" {
            // The result is lost with the process. The control plane leases the run again.
            plane.send(&[echo(point)]).await;
        }
        let report = plane.accepted(&next, point).await;
        assert_eq!(
            (&report["kind"], &report["report"]["result"]["echo-0.bin"]),
            (&json!("complete"), &json!("some text"))
        );
        next.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 0).await;
        next.stop().await;
        let all = plane.calls(&next, &format!("run={point}"), 1).await;
        assert!(all.iter().all(|one| one["report"] == report["report"]), "every repeat is the same: {all:#?}");
    }
}

#[tokio::test]
async fn run_of_a_killed_node_starts_again_when_it_is_leased_again() {
    let plane = ControlPlane::start();
    let folder = tempfile::tempdir().expect("a folder");
    let gate = folder.path().join("go");
    let run = || lease("killed", WAIT, json!({}), json!({ "file": gate.display().to_string() }));
    let first = plane.node(&[fixtures::zoo()]).leasing().await;
    plane.send(&[run()]).await;
    plane.calls(&first, "kind=ack", 1).await;
    first.says("task.started").await;
    first.kill();
    assert_eq!(first.wait().await, -1);
    let next = plane.node(&[fixtures::zoo()]).after(&first).leasing().await;
    plane.send(&[run()]).await;
    next.says("task.started").await;
    std::fs::write(&gate, "").expect("the folder is writable");
    assert_eq!(plane.accepted(&next, "killed").await["kind"], "complete");
    next.stop().await;
}

#[tokio::test]
async fn ended_connections_lose_no_run() {
    let plane = ControlPlane::start();
    let folder = tempfile::tempdir().expect("a folder");
    let gate = folder.path().join("go");
    let node = plane.node(&[fixtures::zoo(), fixtures::echo()]).set("MAX_CONCURRENCY", "2").leasing().await;
    plane.send(&[lease("running", WAIT, json!({}), json!({ "file": gate.display().to_string() }))]).await;
    plane.calls(&node, "kind=ack", 1).await;
    plane.ask("POST", "/test/goaway", &Value::Null).await;
    plane.calls(&node, "kind=pull", 2).await;
    plane.send(&[echo("next")]).await;
    assert_eq!(plane.accepted(&node, "next").await["kind"], "complete");
    std::fs::write(&gate, "").expect("the folder is writable");
    assert_eq!(plane.accepted(&node, "running").await["kind"], "complete");
    assert_eq!(node.said("task.started").len(), 2, "{}", node.log());
    node.stop().await;
}

#[tokio::test]
async fn unaccepted_reports_are_repeated_unchanged() {
    let plane = ControlPlane::start();
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    for (number, answer) in ["refuse", "UNAVAILABLE", "INTERNAL"].into_iter().enumerate() {
        plane.mode(json!({ "reports": answer })).await;
        let run = format!("run-{number}");
        plane.send(&[echo(&run)]).await;
        plane.calls(&node, &format!("run={run}"), 2).await;
        plane.mode(json!({ "reports": "accept" })).await;
        let report = plane.accepted(&node, &run).await;
        let all = plane.calls(&node, &format!("run={run}"), 3).await;
        assert!(all.iter().all(|one| one["report"] == report["report"] && one["kind"] == "complete"), "{all:#?}");
    }
    node.stop().await;
}

#[tokio::test]
async fn flood_of_leases_keeps_memory_flat() {
    const RUNS: usize = 1000;
    let plane = ControlPlane::start();
    let more = "max_concurrent_leases = 4";
    let node = plane.node_with(&[fixtures::echo()], more).set("MAX_CONCURRENCY", "8").leasing();
    let node = node.await;
    let padding = "x".repeat(4096);
    let runs: Vec<Value> =
        (0..RUNS).map(|number| lease(&format!("run-{number}"), ECHO, json!({ "a": padding }), json!({}))).collect();
    plane.send(&runs).await;
    plane.calls(&node, "kind=complete", RUNS / 10).await;
    let before = node.memory("VmRSS");
    plane.calls(&node, "kind=complete", RUNS).await;
    let after = node.memory("VmRSS");
    assert!(after < before + before / 2, "{before} KiB with a tenth of the runs, {after} KiB with all");
    let (acks, reports) = (plane.calls(&node, "kind=ack", RUNS).await.len(), RUNS);
    assert_eq!(acks, reports, "one acknowledgement for each lease");
    node.stop().await;
}

#[tokio::test]
async fn unusable_leases_disturb_no_others() {
    let plane = ControlPlane::start();
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    let mut past = echo("past");
    past["deadline_unix_ms"] = 1.into();
    let mut negative = echo("negative");
    negative["deadline_unix_ms"] = (-1).into();
    let mut far = echo("far");
    far["deadline_unix_ms"] = i64::MAX.into();
    plane.send(&[past, negative, far]).await;
    let failed = plane.accepted(&node, "past").await;
    assert_eq!((&failed["kind"], &failed["report"]["retryable"]), (&json!("fail"), &json!(true)), "{failed:#}");
    let failed = plane.accepted(&node, "negative").await;
    assert_eq!((&failed["kind"], &failed["report"]["retryable"]), (&json!("fail"), &json!(false)), "{failed:#}");
    assert_eq!(plane.accepted(&node, "far").await["kind"], "complete");
    // A lease above the limit of a message ends the stream. The next stream brings the next lease.
    plane.send(&[lease("oversize", ECHO, json!({ "a": "x".repeat(5 << 20) }), json!({})), echo("after")]).await;
    assert_eq!(plane.accepted(&node, "after").await["kind"], "complete");
    node.says("stream.ended").await;
    node.stop().await;
}

#[tokio::test]
async fn mute_control_plane_does_not_delay_a_stop() {
    let plane = ControlPlane::start();
    plane.mode(json!({ "mute": true })).await;
    let node = plane.node_with(&[fixtures::echo()], "heartbeat_interval_seconds = 1").leasing().await;
    plane.calls(&node, "kind=pull", 1).await;
    plane.calls(&node, "kind=heartbeat", 3).await;
    node.stop().await;
    plane.calls(&node, "kind=pull-ended", 1).await;
}
