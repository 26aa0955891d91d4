//! One node that serves the posemesh services and a Node Runtime control plane.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::{Cli, NodeSetup, TestNode},
    node_plane::{Answer, Call, NodePlane, lease},
};

const ECHO: &str = "/examples/echo-file/v1";
const WAIT: &str = "/fixtures/wait-file/v1";
const COMPLETE: &str = "POST /v1/tasks/*/complete";
const POLL: &str = "GET /v1/tasks";
/// Far less than any timeout of the node, and far more than a task takes on a busy machine.
const SOON: Duration = Duration::from_secs(5);

/// A server that gives no usable answer.
struct BadServer {
    address: SocketAddr,
    _server: Option<AbortOnDropHandle<()>>,
}

impl BadServer {
    /// Nobody listens on its port.
    async fn away() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        Self { address: listener.local_addr().expect("it is bound"), _server: None }
    }

    /// Accepts connections and never answers.
    async fn silent() -> Self {
        Self::serve(|_| {}).await
    }

    /// Answers garbage.
    async fn garbage() -> Self {
        Self::serve(|stream| {
            // The node may end the connection first.
            drop(stream.try_write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n\x00garbage\xff"));
        })
        .await
    }

    async fn serve(answer: impl Fn(&TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let server = tokio::spawn(async move {
            let mut open = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.expect("a listener accepts");
                stream.flush().await.expect("nothing was written");
                answer(&stream);
                open.push(stream);
            }
        });
        Self { address, _server: Some(AbortOnDropHandle::new(server)) }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// The tables of a node that serves both, with more lines in each.
fn tables(runs: &str, more_mesh: &str, more_runs: &str) -> String {
    format!(
        "[plane.mesh]\nkind = \"posemesh\"\n{more_mesh}\n[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \
         \"{runs}\"\nnode_id = \"w-07\"\n{more_runs}\n"
    )
}

fn with_posemesh(setup: NodeSetup, dds: &str, dms: &str) -> NodeSetup {
    let key = setup.key.clone();
    setup
        .set("DDS_BASE_URL", dds.trim_end_matches('/'))
        .set("DMS_BASE_URL", dms.trim_end_matches('/'))
        .set("REG_SECRET", "a-registration-secret")
        .set("SECP256K1_PRIVHEX", key)
}

fn node_of(server: &TestServer, tables: &str, plugins: &[PathBuf]) -> NodeSetup {
    let (dds, dms) = (server.dev_server.dds_url(), server.dev_server.dms_url());
    with_posemesh(NodeSetup::with_config(tables, plugins), dds.as_str(), dms.as_str())
}

/// A node whose posemesh services are behind `proxy`.
fn node_behind(proxy: &FaultProxy, tables: &str, plugins: &[PathBuf]) -> NodeSetup {
    let url = format!("http://{}", proxy.address());
    with_posemesh(NodeSetup::with_config(tables, plugins), &url, &format!("{url}/v1"))
}

/// Waits until both control planes can give work.
async fn both_ready(node: &TestNode) {
    let ready = |page: &(u16, Value)| ["mesh", "runs"].iter().all(|plane| page.1["planes"][plane]["ready"] == true);
    node.page_until("/status.json", ready).await;
}

/// Waits until `/ready` names this control plane, and returns the page.
async fn named_by_ready(node: &TestNode, status: u16, plane: &str, code: &str) -> Value {
    let list = if status == 200 { "planes_not_ready" } else { "reasons" };
    let named = |page: &(u16, Value)| {
        let reasons = page.1[list].as_array().into_iter().flatten();
        page.0 == status && reasons.clone().any(|reason| reason["plane"] == plane && reason["code"] == code)
    };
    node.page_until("/ready", named).await.1
}

/// Completes tasks one after the other, each soon.
async fn posemesh_completes(server: &TestServer, node: &TestNode) {
    for _ in 0..3 {
        let began = Instant::now();
        server.run(node, ECHO, json!({})).await.completed();
        assert!(began.elapsed() < SOON, "{:?}: {}", began.elapsed(), node.log());
    }
}

async fn runs_complete(plane: &NodePlane, node: &TestNode) {
    for number in 0..3 {
        let (began, run) = (Instant::now(), format!("run-{number}"));
        plane.send(node, lease(&run, ECHO, &[("a", "x")], &[])).await;
        plane.completed(node, &run).await;
        assert!(began.elapsed() < SOON, "{:?}: {}", began.elapsed(), node.log());
    }
}

/// The tasks in the order of their start.
fn started(node: &TestNode) -> Vec<String> {
    node.said("task.started").iter().map(|line| line["task_id"].as_str().expect("an id").to_owned()).collect()
}

#[tokio::test]
async fn node_serves_both_planes_and_drains() {
    let (server, plane) = (TestServer::start().await, NodePlane::start().await);
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let node = node_of(&server, &tables(&plane.url(), "", ""), &[fixtures::echo(), fixtures::zoo()]);
    let node = node.set("MAX_CONCURRENCY", "2").leasing().await;
    both_ready(&node).await;
    assert_eq!(node.page("/ready").await, (200, json!({ "ready": true })));
    posemesh_completes(&server, &node).await;
    runs_complete(&plane, &node).await;
    let status = node.status().await;
    let record = &status["recent"][0];
    assert_eq!(record["plane"], "mesh", "{record:#}");
    let (mesh, runs) = (&status["planes"]["mesh"], &status["planes"]["runs"]);
    assert_eq!((&mesh["kind"], &runs["kind"]), (&json!("posemesh"), &json!("node-runtime")), "{status:#}");
    assert_eq!((&runs["node"], &runs["registration_form"]), (&json!("w-07"), &json!("none")), "{status:#}");
    assert_eq!((&status["node"], &status["registration_form"]), (&mesh["node"], &json!("wallet")), "{status:#}");

    let job = server.task(WAIT).meta(json!({ "file": go })).submit();
    plane.send(&node, lease("held", WAIT, &[], &[("file", &go.display().to_string())])).await;
    let tasks = |page: &(u16, Value)| page.1["tasks"].as_object().is_some_and(|tasks| tasks.len() == 2);
    let (_, page) = node.page_until("/status.json", tasks).await;
    assert_eq!(page["tasks"]["held"]["plane"], "runs", "{page:#}");
    server.started(&node, job).await;
    node.line(|line| line["event"] == "task.started" && line["task_id"] == "held" && line["plane"] == "runs").await;
    node.term();
    node.says("node.draining").await;
    fs::write(&go, "").expect("the folder is writable");
    server.ended(&node, job).await.completed();
    plane.completed(&node, "held").await;
    assert_eq!(node.wait().await, 0, "{}", node.log());
    assert!(plane.calls().contains(&Call::Remove("w-07".to_owned())));
}

#[tokio::test]
async fn posemesh_completes_while_other_plane_is_unusable() {
    for bad in [BadServer::away().await, BadServer::silent().await, BadServer::garbage().await] {
        let server = TestServer::start().await;
        let node = node_of(&server, &tables(&bad.url(), "", ""), &[fixtures::echo()]).leasing().await;
        posemesh_completes(&server, &node).await;
        let page = named_by_ready(&node, 200, "runs", "plane-not-ready").await;
        assert_eq!(page["planes_not_ready"].as_array().map(Vec::len), Some(1), "{page}");
        node.stop().await;
    }
}

#[tokio::test]
async fn runs_complete_while_posemesh_is_unusable() {
    for bad in [BadServer::away().await, BadServer::silent().await, BadServer::garbage().await] {
        let plane = NodePlane::start().await;
        let setup = NodeSetup::with_config(&tables(&plane.url(), "", ""), &[fixtures::echo()]);
        let node = with_posemesh(setup, &bad.url(), &bad.url()).leasing().await;
        runs_complete(&plane, &node).await;
        named_by_ready(&node, 200, "mesh", "starting").await;
        node.stop().await;
    }
}

#[tokio::test]
async fn hanging_poll_lends_its_slot() {
    let (server, plane) = (TestServer::start().await, NodePlane::start().await);
    let proxy = FaultProxy::before(&server).await;
    let node = node_behind(&proxy, &tables(&plane.url(), "", ""), &[fixtures::echo()]);
    let node = node.set("MAX_CONCURRENCY", "1").set("REQUEST_TIMEOUT_SECS", "15").leasing().await;
    both_ready(&node).await;
    proxy.answer(POLL, usize::MAX, Bad::Hang);
    node.page_until("/status.json", |page| page.1["planes"]["mesh"]["polls"]["unanswered"] == true).await;
    runs_complete(&plane, &node).await;
    named_by_ready(&node, 200, "mesh", "poll-unanswered").await;
    proxy.heal();
    posemesh_completes(&server, &node).await;
    node.stop().await;
}

#[tokio::test]
async fn garbage_after_registration_delays_no_other_plane() {
    let (server, plane) = (TestServer::start().await, NodePlane::start().await);
    let proxy = FaultProxy::before(&server).await;
    proxy.answer(POLL, usize::MAX, Bad::Garbage);
    let node = node_behind(&proxy, &tables(&plane.url(), "", ""), &[fixtures::echo()]).leasing().await;
    runs_complete(&plane, &node).await;
    let page = named_by_ready(&node, 200, "mesh", "polls-fail").await;
    let reason = page["planes_not_ready"][0]["message"].as_str().expect("a message");
    assert!(reason.contains("polls of the control plane failed"), "{page}");
    let line = node.says("poll.failed").await;
    assert_eq!(line["plane"], "mesh", "{line}");
    node.stop().await;

    let bad = BadServer::garbage().await;
    let more = format!("grpc_url = \"{}\"", bad.url());
    let node = node_of(&server, &tables(&plane.url(), "", &more), &[fixtures::echo()]).leasing().await;
    posemesh_completes(&server, &node).await;
    let page = named_by_ready(&node, 200, "runs", "plane-not-ready").await;
    let reason = page["planes_not_ready"][0]["message"].as_str().expect("a message");
    assert!(reason.contains("the stream of leases ended"), "{page}");
    node.stop().await;
}

#[tokio::test]
async fn ready_all_wants_every_plane() {
    let (server, mut plane) = (TestServer::start().await, NodePlane::start().await);
    let setup = |plane: &NodePlane| node_of(&server, &tables(&plane.url(), "", ""), &[fixtures::echo()]);
    let (any, all) = (setup(&plane).leasing().await, setup(&plane).set("READY", "all").leasing().await);
    both_ready(&any).await;
    all.page_until("/ready", |page| page.0 == 200).await;
    plane.kill().await;
    let page = named_by_ready(&all, 503, "runs", "plane-not-ready").await;
    let reason = page["reason"].as_str().expect("a reason");
    assert!(page["ready"] == false && reason.starts_with("runs: the control plane cannot be used: "), "{page}");
    named_by_ready(&any, 200, "runs", "plane-not-ready").await;
    let status = any.status().await;
    assert_eq!((&status["ready"], &status["not_ready"]), (&json!(true), &json!([])), "{status:#}");
    assert_eq!(status["planes"]["runs"]["not_ready"][0]["code"], "plane-not-ready", "{status:#}");
    plane.restart().await;
    all.page_until("/ready", |page| page.0 == 200).await;
    any.page_until("/ready", |page| page.1 == json!({ "ready": true })).await;
    all.stop().await;
    any.stop().await;
    let wrong = setup(&plane).set("READY", "some").refused().await.expect(78);
    assert!(wrong.stderr.contains("READY: expected any or all, found \"some\""), "{}", wrong.stderr);
}

#[tokio::test]
async fn planes_with_endless_work_take_turns() {
    let (server, plane) = (TestServer::start().await, NodePlane::start().await);
    let files = tempfile::tempdir().expect("a folder");
    let node = node_of(&server, &tables(&plane.url(), "", ""), &[fixtures::echo(), fixtures::zoo()]);
    let node = node.set("MAX_CONCURRENCY", "1").leasing().await;
    both_ready(&node).await;

    // The posemesh services have endless work.
    let go = files.path().join("first");
    let first = server.task(WAIT).meta(json!({ "file": go })).submit();
    server.started(&node, first).await;
    let jobs: Vec<_> = (0..20).map(|_| server.task(ECHO).submit()).collect();
    plane.send(&node, lease("one", ECHO, &[("a", "x")], &[])).await;
    node.page_until("/status.json", |page| page.1["tasks"]["one"]["state"] == "waiting").await;
    fs::write(&go, "").expect("the folder is writable");
    plane.completed(&node, "one").await;
    for job in jobs {
        server.ended(&node, job).await.completed();
    }
    let order = started(&node);
    let place = order.iter().position(|task| task == "one").expect("it started");
    assert!(place <= 2, "{order:?}");

    // The other one has endless work.
    let go = files.path().join("second");
    plane.send(&node, lease("gate", WAIT, &[], &[("file", &go.display().to_string())])).await;
    node.line(|line| line["event"] == "task.started" && line["task_id"] == "gate").await;
    let stream = plane.stream(&node).await;
    for number in 0..20 {
        plane.send_on(stream.clone(), lease(&format!("run-{number}"), ECHO, &[("a", "x")], &[]));
    }
    node.page_until("/status.json", |page| page.1["tasks"]["run-0"]["state"] == "waiting").await;
    let job = server.task(ECHO).submit();
    fs::write(&go, "").expect("the folder is writable");
    let ended = server.ended(&node, job).await;
    let id = ended.completed().task()["id"].as_str().expect("an id").to_owned();
    plane.completed(&node, "run-19").await;
    let order = started(&node);
    let gate = order.iter().position(|task| task == "gate").expect("it started");
    let place = order.iter().position(|task| *task == id).expect("it started");
    assert!(place - gate <= 4, "{order:?}");
    node.stop().await;
}

#[tokio::test]
async fn floor_keeps_a_slot_free() {
    let (server, plane) = (TestServer::start().await, NodePlane::start().await);
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let tables = tables(&plane.url(), "min_slots = 1", "");
    let node = node_of(&server, &tables, &[fixtures::echo(), fixtures::zoo()]);
    let node = node.set("MAX_CONCURRENCY", "2").leasing().await;
    both_ready(&node).await;
    for run in ["one", "two"] {
        plane.send(&node, lease(run, WAIT, &[], &[("file", &go.display().to_string())])).await;
    }
    node.line(|line| line["event"] == "task.started" && line["task_id"] == "one").await;
    node.page_until("/status.json", |page| page.1["tasks"]["two"]["state"] == "waiting").await;
    posemesh_completes(&server, &node).await;
    let status = node.status().await;
    assert_eq!(status["planes"]["mesh"]["min_slots"], 1);
    assert_eq!(status["tasks"]["two"]["state"], "waiting", "{status:#}");
    fs::write(&go, "").expect("the folder is writable");
    plane.completed(&node, "two").await;
    node.stop().await;
}

#[tokio::test]
async fn reports_of_a_dead_plane_wait_alone() {
    let (server, mut plane) = (TestServer::start().await, NodePlane::start().await);
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let plugins = [fixtures::echo(), fixtures::zoo()];
    let node = node_of(&server, &tables(&plane.url(), "", ""), &plugins).set("MAX_CONCURRENCY", "4").leasing().await;
    both_ready(&node).await;
    for number in 0..4 {
        let held = lease(&format!("run-{number}"), WAIT, &[], &[("file", &go.display().to_string())]);
        plane.send(&node, held).await;
    }
    node.page_until("/status.json", |page| page.1["tasks"].as_object().is_some_and(|tasks| tasks.len() == 4)).await;
    plane.kill().await;
    fs::write(&go, "").expect("the folder is writable");
    node.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 4).await;
    posemesh_completes(&server, &node).await;
    // The report to posemesh leaves although the others wait.
    node.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 4).await;
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    let list = |form| Cli::new(&["outbox", "list", "-o", form, "--state-dir"]).arg(node.state_dir()).run();
    let listed = list("text").await.expect(0).stdout;
    let names: Vec<_> = listed.lines().map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(names, [Some("runs"); 4], "{listed}");
    let listed: Value = serde_json::from_str(&list("json").await.expect(0).stdout).expect("a list");
    assert_eq!((&listed[0]["plane_name"], &listed[0]["plane"]), (&json!("runs"), &json!(plane.url())), "{listed:#}");
    plane.restart().await;
    let next = node_of(&server, &tables(&plane.url(), "", ""), &plugins).after(&node).leasing().await;
    for number in 0..4 {
        plane.completed(&next, &format!("run-{number}")).await;
    }
    next.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 0).await;
    assert!(next.said("task.started").is_empty(), "{}", next.log());
    next.stop().await;
}

#[tokio::test]
async fn full_outbox_of_one_plane_stops_only_that_plane() {
    let (server, plane) = (TestServer::start().await, NodePlane::start().await);
    let proxy = FaultProxy::before(&server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "not now"));
    // Each report takes more than this.
    let node = node_behind(&proxy, &tables(&plane.url(), "", ""), &[fixtures::echo()]).set("OUTBOX_BYTES_MAX", "1KiB");
    let node = node.leasing().await;
    both_ready(&node).await;
    let jobs = [server.task(ECHO).submit(), server.task(ECHO).submit()];
    let full = node.says("outbox.full").await;
    assert_eq!((&full["plane"], &full["waiting"]), (&json!("mesh"), &json!(1)), "{full}");
    named_by_ready(&node, 200, "mesh", "outbox-full").await;
    runs_complete(&plane, &node).await;
    assert_eq!(node.said("task.started").len(), 4, "the second job waits on its control plane: {}", node.log());
    proxy.heal();
    for job in jobs {
        server.ended(&node, job).await.completed();
    }
    node.page_until("/ready", |page| page.1 == json!({ "ready": true })).await;
    node.stop().await;
}

#[tokio::test]
async fn hanging_reports_delay_no_report_of_another_plane() {
    let (server, plane) = (TestServer::start().await, NodePlane::start().await);
    let proxy = FaultProxy::before(&server).await;
    let node = node_behind(&proxy, &tables(&plane.url(), "", ""), &[fixtures::echo()]);
    let node = node.set("MAX_CONCURRENCY", "1").leasing().await;
    both_ready(&node).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Hang);
    // As many as the node sends at once with one slot.
    for _ in 0..8 {
        server.task(ECHO).submit();
    }
    proxy.seen(COMPLETE, 8).await;
    runs_complete(&plane, &node).await;
    for number in 0..3 {
        let run = format!("run-{number}");
        let line = node.line(|line| line["event"] == "task.ended" && line["task_id"] == run).await;
        assert_eq!((&line["level"], &line["report"]), (&json!("INFO"), &json!("accepted")), "{line}");
    }
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
}

#[tokio::test]
async fn silent_plane_blocks_no_last_report_of_another() {
    let (server, plane) = (TestServer::start().await, NodePlane::start().await);
    let proxy = FaultProxy::before(&server).await;
    let node = node_behind(&proxy, &tables(&plane.url(), "", ""), &[fixtures::echo()]).leasing().await;
    both_ready(&node).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "not now"));
    for waiting in 1..=3 {
        server.task(ECHO).submit();
        node.page_until("/status.json", |page| page.1["outbox"]["waiting"] == waiting).await;
    }
    proxy.heal();
    proxy.answer(COMPLETE, usize::MAX, Bad::Hang);
    plane.answer_reports(Answer::NotAccepted);
    plane.send(&node, lease("run", ECHO, &[("a", "x")], &[])).await;
    // The pause after the fourth try is longer than the stop takes.
    let tries = |calls: &[Call]| calls.iter().filter(|call| matches!(call, Call::Complete(_))).count();
    plane.until(&node, "a fourth try", |calls| (tries(calls) >= 4).then_some(())).await;
    plane.answer_reports(Answer::Accept);
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    assert_eq!(node.said("report.delivered").len(), 1, "{}", node.log());
    let left = node.said("outbox.reports_left");
    assert_eq!(left[0]["reports"], 3, "{left:?}");
}
