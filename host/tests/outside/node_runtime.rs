//! A Node Runtime control plane in Python, with grpcio. It is another implementation of the wire.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::Request;
use http_body_util::BodyExt as _;
use runner_host::transport::{self, Client, Identity, PeerTls};
use serde_json::{Value, json};

use crate::harness::{
    EVENT_LIMIT, fixtures,
    node::{NodeSetup, TestNode},
    node_plane::in_future,
    tls::{authority, client_file},
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
    /// Whether both ports use TLS and require a client certificate.
    tls: bool,
}

impl ControlPlane {
    fn start() -> Self {
        Self::on(0, 0, false)
    }

    /// On these ports of REST and gRPC; 0 is a free one.
    fn on(rest: u64, grpc: u64, tls: bool) -> Self {
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
            .args([rest.to_string(), grpc.to_string()])
            .args(tls.then(|| host.join("tests/fixtures/tls")))
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
        let identity = Identity { certificate: client_file("client.pem"), key: client_file("client.key") };
        let peer = PeerTls { identity: Some(identity), authorities: Some(authority().into()), ..PeerTls::default() };
        let config = transport::Config { peer: tls.then_some(peer), ..transport::Config::default() };
        Self { rest: port("rest"), grpc: port("grpc"), client: Client::new(config), tls, process }
    }

    /// Ends the program without a goodbye, and starts it again on the same ports. It has forgotten everything.
    fn killed_and_restarted(mut self) -> Self {
        self.process.kill().expect("it runs");
        self.process.wait().expect("it has ended");
        Self::on(self.rest, self.grpc, self.tls)
    }

    fn url(&self, port: u64) -> String {
        format!("{}://localhost:{port}", if self.tls { "https" } else { "http" })
    }

    fn node(&self, plugins: &[PathBuf]) -> NodeSetup {
        self.node_with(plugins, "")
    }

    /// A node with `more` lines in its table.
    fn node_with(&self, plugins: &[PathBuf], more: &str) -> NodeSetup {
        let table = format!(
            "[plane.runs]\nkind = \"node-runtime\"\nnode_id = \"outside\"\n\
             control_plane_url = \"{}\"\ngrpc_url = \"{}\"\n{more}\n",
            self.url(self.rest),
            self.url(self.grpc)
        );
        NodeSetup::with_config(&table, plugins)
    }

    /// Makes one HTTP request. Fails on a status above 299.
    async fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = Request::builder().method(method).uri(format!("{}{path}", self.url(self.rest)));
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

#[tokio::test]
async fn sent_report_without_an_answer_is_accepted_once() {
    let plane = ControlPlane::start();
    plane.mode(json!({ "reports": "hold" })).await;
    let first = plane.node(&[fixtures::echo()]).leasing().await;
    plane.send(&[echo("unread")]).await;
    plane.accepted(&first, "unread").await;
    // The report was brief. It is written because its answer does not come.
    first.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 1).await;
    first.kill();
    assert_eq!(first.wait().await, -1);
    plane.mode(json!({ "reports": "accept" })).await;
    let next = plane.node(&[fixtures::echo()]).after(&first).leasing().await;
    let all = plane.calls(&next, "run=unread", 2).await;
    next.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 0).await;
    let report = plane.accepted(&next, "unread").await;
    assert!(all.iter().all(|one| one["report"] == report["report"] && one["kind"] == "complete"), "{all:#?}");
    assert!(next.said("task.started").is_empty(), "the run does not start again: {}", next.log());
    next.stop().await;
}

#[tokio::test]
async fn restarted_control_plane_gets_the_owed_report() {
    let plane = ControlPlane::start();
    plane.mode(json!({ "reports": "UNAVAILABLE", "origin": true })).await;
    let node = plane.node_with(&[fixtures::echo()], "heartbeat_interval_seconds = 1").leasing().await;
    plane.send(&[echo("owed")]).await;
    node.says("report.waiting").await;
    let plane = plane.killed_and_restarted();
    plane.mode(json!({ "origin": true })).await;
    let report = plane.accepted(&node, "owed").await;
    assert_eq!((&report["kind"], &report["report"]["result"]["echo-0.bin"]), (&json!("complete"), &json!("some text")));
    // It has forgotten the node too.
    plane.calls(&node, "kind=register", 1).await;
    plane.send(&[echo("next")]).await;
    assert_eq!(plane.accepted(&node, "next").await["kind"], "complete");
    assert_eq!(node.said("task.started").len(), 2, "{}", node.log());
    assert_eq!(plane.calls(&node, "run=owed", 1).await.len(), 1);
    node.stop().await;
}

#[tokio::test]
async fn original_with_its_database_keeps_its_node() {
    let plane = ControlPlane::start();
    plane.mode(json!({ "origin": true })).await;
    let first = plane.node(&[fixtures::echo()]).leasing().await;
    plane.calls(&first, "kind=pull", 1).await;
    first.kill();
    assert_eq!(first.wait().await, -1);
    // The second registration is answered with a 500. A heartbeat shows that the node is known.
    let node = plane.node(&[fixtures::echo()]).after(&first).leasing().await;
    assert_eq!(plane.calls(&node, "kind=register&again=True", 1).await.len(), 1);
    plane.send(&[echo("known")]).await;
    assert_eq!(plane.accepted(&node, "known").await["kind"], "complete");

    // CANCELLED from the control plane ends a stream like any other status.
    let pulls = plane.calls(&node, "kind=pull", 1).await.len();
    plane.ask("POST", "/test/end", &json!("CANCELLED")).await;
    plane.calls(&node, "kind=pull", pulls + 1).await;
    plane.send(&[echo("cancelled")]).await;
    assert_eq!(plane.accepted(&node, "cancelled").await["kind"], "complete");

    // The stream of a forgotten node ends without an error. The node registers, and does not loop.
    let pulls = plane.calls(&node, "kind=pull", 1).await.len();
    plane.ask("POST", "/test/forget", &Value::Null).await;
    assert_eq!(plane.calls(&node, "kind=register&again=False", 2).await.len(), 2);
    plane.send(&[echo("forgotten")]).await;
    assert_eq!(plane.accepted(&node, "forgotten").await["kind"], "complete");
    assert_eq!(plane.calls(&node, "kind=pull", pulls).await.len(), pulls + 1);
    node.stop().await;
}

#[tokio::test]
async fn page_of_a_gateway_is_no_registration() {
    let plane = ControlPlane::start();
    plane.mode(json!({ "register": "page" })).await;
    let node = plane.node(&[fixtures::echo()]).start().await;
    let line = node.says("registration.failed").await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains("answered 200: <!doctype html>")), "{line}");
    plane.mode(json!({ "register": "create" })).await;
    node.says("node.leasing").await;
    plane.calls(&node, "kind=pull", 1).await;
    node.stop().await;
}

#[tokio::test]
async fn client_certificate_opens_both_ports() {
    let plane = ControlPlane::on(0, 0, true);
    let ca = authority();
    let tls = |more: &str| format!("[plane.runs.tls]\nca = {ca:?}\n{more}");
    let without = plane.node_with(&[fixtures::echo()], &tls("")).start().await;
    let line = without.says("registration.failed").await;
    let remedy = "and the client certificate if it needs one";
    assert!(line["error"].as_str().is_some_and(|error| error.contains(remedy)), "{line}");
    without.stop().await;
    let (certificate, key) = (client_file("client.pem"), client_file("client.key"));
    let identity = format!("client_certificate = {certificate:?}\nclient_key = {key:?}\ncommon_name = \"plane.test\"");
    let node = plane.node_with(&[fixtures::echo()], &tls(&identity)).leasing().await;
    assert_eq!(plane.calls(&node, "kind=register", 1).await.len(), 1);
    plane.send(&[echo("secure")]).await;
    assert_eq!(plane.accepted(&node, "secure").await["kind"], "complete");
    node.says_ended("accepted").await;
    node.stop().await;
}
