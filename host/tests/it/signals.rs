//! The first signal drains, the second cancels, the third ends the process. Nothing is left behind.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::TestNode,
};

/// Far below every limit that the node could wait for by mistake (drain 30 s, calls 60 s, polls 30 s).
const PROMPT: Duration = Duration::from_secs(8);

async fn ends_promptly(node: &TestNode, code: i32) {
    let asked = Instant::now();
    assert_eq!(node.wait().await, code, "{}", node.log());
    assert!(asked.elapsed() < PROMPT, "it took {:?}:\n{}", asked.elapsed(), node.log());
}

fn assert_nothing_left(node: &TestNode) {
    assert_eq!(node.scratch(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn signal_stops_idle_node_at_once() {
    for signal in [TestNode::term, TestNode::interrupt] {
        let test_server = TestServer::start().await;
        // A long pause between polls must not delay the end.
        let node = test_server.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "25000");
        let node = node.set("POLL_BACKOFF_MS_MAX", "30000").leasing().await;
        test_server.seen(&node, |seen| seen.iter().any(|seen| seen.path == "/v1/tasks")).await;
        signal(&node);
        ends_promptly(&node, 0).await;
        assert_nothing_left(&node);
    }
}

#[tokio::test]
async fn signal_during_plugin_load_stops_node_without_requests() {
    let test_server = TestServer::start().await;
    let files = tempfile::tempdir().expect("a folder");
    let mark = files.path().join("opened");
    let slow = fixtures::c("refused", &["MARKS", "CREATE_BLOCKS"]);
    let node = test_server.node(&[fixtures::hello(), slow]).set("PLUGIN_INIT_TIMEOUT", "1s");
    let node = node.set("RH_FIXTURE_MARK", mark.to_string_lossy()).begun();
    let opened = async {
        while !mark.exists() {
            // There is no event for a file.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    crate::harness::within("a plugin to be opened", || node.log(), opened).await;
    node.term();
    ends_promptly(&node, 0).await;
    assert!(test_server.dev_server.journal().is_empty(), "{:?}", test_server.dev_server.journal());
    assert_nothing_left(&node);
}

#[tokio::test]
async fn signal_lets_running_task_finish_and_stops_leasing() {
    let test_server = TestServer::start().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let node = test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "2").leasing().await;
    let job = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": file })).submit();
    test_server.started(&node, job).await;
    node.term();
    node.says("node.draining").await;
    let (status, ready) = node.page("/ready").await;
    assert_eq!((status, &ready["ready"], &ready["reason"]), (503, &json!(false), &json!("draining")), "{ready}");
    assert_eq!(node.status().await["phase"], "draining");
    let late = test_server.task("/fixtures/ok/v1").submit();
    std::fs::write(&file, "").expect("the folder is writable");
    ends_promptly(&node, 0).await;
    test_server.ended(&node, job).await.completed();
    assert_eq!(test_server.dev_server.job(late).expect("a job")["job"]["status"], "pending", "nothing new is leased");
    assert_nothing_left(&node);
}

/// Checks that the job was released with the reason on which the control plane repeats it.
async fn assert_drained(test_server: &TestServer, node: &TestNode, job: uuid::Uuid) {
    let ended = test_server.ended(node, job).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "drained");
    assert_eq!(json!([details["outcome"], details["code"], details["retryable"]]), json!(["drained", "drained", true]));
}

#[tokio::test]
async fn drain_timeout_fails_running_task_as_drained() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "200ms").leasing().await;
    let job = test_server.task("/fixtures/slow/v1").submit();
    test_server.started(&node, job).await;
    node.term();
    ends_promptly(&node, 75).await;
    assert_drained(&test_server, &node, job).await;
    assert_nothing_left(&node);
}

#[tokio::test]
async fn second_signal_cancels_tasks_during_drain() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "1h").leasing().await;
    let job = test_server.task("/fixtures/slow/v1").submit();
    test_server.started(&node, job).await;
    node.term();
    node.says("signal.drain").await;
    node.term();
    ends_promptly(&node, 75).await;
    assert_drained(&test_server, &node, job).await;
    assert_nothing_left(&node);
}

#[tokio::test]
async fn third_signal_ends_process_next_start_cleans_up() {
    let test_server = TestServer::start().await;
    let node =
        test_server.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "1h").set("CANCEL_GRACE", "1h").leasing().await;
    let job = test_server.task("/fixtures/ignores-cancel/v1").meta(json!({ "sleep_ms": 3_600_000 })).submit();
    test_server.started(&node, job).await;
    node.term();
    node.says("signal.drain").await;
    node.term();
    node.says("signal.cancel").await;
    node.term();
    ends_promptly(&node, 75).await;
    assert!(!node.scratch().is_empty(), "there was no time to tidy up");
    let next = test_server.node(&[fixtures::hello()]).set("SCRATCH_DIR", node.scratch_dir().to_string_lossy());
    let next = next.leasing().await;
    next.stop().await;
    assert_nothing_left(&node);
}

#[tokio::test]
async fn signal_stops_node_while_login_service_is_unavailable() {
    let test_server = TestServer::start().await;
    // A port without a listener.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
    let node = test_server.node(&[fixtures::hello()]).set("DDS_BASE_URL", format!("http://{port}")).start().await;
    let line = node.says("registration.failed").await;
    let error = line["error"].as_str().expect("text");
    assert!(error.contains("did not answer") && error.contains(&port.to_string()), "{error}");
    node.term();
    ends_promptly(&node, 0).await;

    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("POST /internal/v1/auth/siwe/request", usize::MAX, Bad::Hang);
    let node = proxy.node(&[fixtures::hello()]).start().await;
    proxy.seen("POST /internal/v1/auth/siwe/request", 1).await;
    node.term();
    ends_promptly(&node, 0).await;
    assert_nothing_left(&node);
}

/// A plugin that records its shutdown. The node is stopped while it leases or before it has signed in.
async fn plugins_are_told(signed_in: bool) {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let files = tempfile::tempdir().expect("a folder");
    let mark = files.path().join("shutdown");
    let node = proxy.node(&[fixtures::c("behave", &[])]).set("RH_FIXTURE_SHUTDOWN", mark.to_string_lossy());
    let node = if signed_in {
        node.leasing().await
    } else {
        proxy.answer("POST /internal/v1/auth/siwe/request", usize::MAX, Bad::Hang);
        let node = node.start().await;
        proxy.seen("POST /internal/v1/auth/siwe/request", 1).await;
        node
    };
    assert!(!mark.exists(), "the mark comes too early");
    node.term();
    ends_promptly(&node, 0).await;
    assert!(mark.exists(), "the plugin was not told:\n{}", node.log());
}

#[tokio::test]
async fn stopped_idle_node_shuts_down_plugins() {
    plugins_are_told(true).await;
}

#[tokio::test]
async fn node_stopped_before_login_shuts_down_plugins() {
    plugins_are_told(false).await;
}

#[tokio::test]
async fn signal_stops_node_during_unanswered_poll() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("GET /v1/tasks", usize::MAX, Bad::Hang);
    let node = proxy.node(&[fixtures::hello()]).set("REQUEST_TIMEOUT_SECS", "2").leasing().await;
    proxy.seen("GET /v1/tasks", 1).await;
    node.term();
    ends_promptly(&node, 0).await;
}

#[tokio::test]
async fn hangup_signal_does_not_stop_node() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello()]).await;
    node.hang_up();
    let line = node.says("signal.hup").await;
    assert_eq!(line["level"], "WARN");
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn next_node_removes_files_of_killed_node() {
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(2)).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let job = test_server.task("/fixtures/slow/v1").set("max_attempts", json!(2)).submit();
    test_server.started(&node, job).await;
    node.kill();
    node.wait().await;
    assert!(!node.scratch().is_empty(), "there was no time to tidy up");
    // The control plane leases the task to the next node when the lease has expired.
    let next =
        test_server.node(&[fixtures::zoo()]).set("SCRATCH_DIR", node.scratch_dir().to_string_lossy()).leasing().await;
    test_server
        .task_until(&next, job, |task| task["attempts"] == 2 && task["meta"]["progress"]["started"] == true)
        .await;
    assert!(test_server.dev_server.cancel_job(job));
    assert_eq!(test_server.ended(&next, job).await.status(), "canceled");
    next.stop().await;
    assert_nothing_left(&node);
}
