//! The first signal drains, the second cancels, the third ends the process. Nothing is left behind.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::harness::{
    TestServer, fixtures,
    node::TestNode,
    rubbish::{Bad, Rubbish},
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
async fn a_signal_ends_an_idle_node_at_once() {
    for signal in [TestNode::term, TestNode::interrupt] {
        let lab = TestServer::start().await;
        // A long pause between polls must not delay the end.
        let node = lab.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "25000");
        let node = node.set("POLL_BACKOFF_MS_MAX", "30000").leasing().await;
        lab.seen(&node, |seen| seen.iter().any(|seen| seen.path == "/v1/tasks")).await;
        signal(&node);
        ends_promptly(&node, 0).await;
        assert_nothing_left(&node);
    }
}

#[tokio::test]
async fn a_signal_before_the_start_is_over_ends_a_node_that_has_spoken_to_nobody() {
    let lab = TestServer::start().await;
    let files = tempfile::tempdir().expect("a folder");
    let mark = files.path().join("opened");
    let slow = fixtures::c("refused", &["MARKS", "INIT_BLOCKS"]);
    let node = lab.node(&[fixtures::hello(), slow]).set("PLUGIN_INIT_TIMEOUT", "1s");
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
    assert!(lab.dev_server.journal().is_empty(), "{:?}", lab.dev_server.journal());
    assert_nothing_left(&node);
}

#[tokio::test]
async fn a_signal_lets_a_running_task_finish_and_leases_nothing_more() {
    let lab = TestServer::start().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let node = lab.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "2").leasing().await;
    let job = lab.task("/fixtures/wait-file/v1").meta(json!({ "file": file })).submit();
    lab.started(&node, job).await;
    node.term();
    node.says("node.draining").await;
    let (status, ready) = node.page("/ready").await;
    assert_eq!((status, &ready["ready"], &ready["reason"]), (503, &json!(false), &json!("draining")), "{ready}");
    assert_eq!(node.status().await["phase"], "draining");
    let late = lab.task("/fixtures/ok/v1").submit();
    std::fs::write(&file, "").expect("the folder is writable");
    ends_promptly(&node, 0).await;
    lab.ended(&node, job).await.completed();
    assert_eq!(lab.dev_server.job(late).expect("a job")["job"]["status"], "pending", "nothing new is leased");
    assert_nothing_left(&node);
}

/// Checks that the job was released with the reason on which the control plane repeats it.
async fn assert_drained(lab: &TestServer, node: &TestNode, job: uuid::Uuid) {
    let ended = lab.ended(node, job).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "drained");
    assert_eq!(json!([details["outcome"], details["code"], details["retryable"]]), json!(["drained", "drained", true]));
}

#[tokio::test]
async fn what_outlasts_the_drain_is_cancelled_and_given_back() {
    let lab = TestServer::start().await;
    let node = lab.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "200ms").leasing().await;
    let job = lab.task("/fixtures/slow/v1").submit();
    lab.started(&node, job).await;
    node.term();
    ends_promptly(&node, 75).await;
    assert_drained(&lab, &node, job).await;
    assert_nothing_left(&node);
}

#[tokio::test]
async fn a_second_signal_cancels_without_waiting_for_the_drain() {
    let lab = TestServer::start().await;
    let node = lab.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "1h").leasing().await;
    let job = lab.task("/fixtures/slow/v1").submit();
    lab.started(&node, job).await;
    node.term();
    node.says("signal.drain").await;
    node.term();
    ends_promptly(&node, 75).await;
    assert_drained(&lab, &node, job).await;
    assert_nothing_left(&node);
}

#[tokio::test]
async fn a_third_signal_ends_the_process_and_the_next_one_sweeps_up() {
    let lab = TestServer::start().await;
    let node = lab.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "1h").set("CANCEL_GRACE", "1h").leasing().await;
    let job = lab.task("/fixtures/ignores-cancel/v1").meta(json!({ "sleep_ms": 3_600_000 })).submit();
    lab.started(&node, job).await;
    node.term();
    node.says("signal.drain").await;
    node.term();
    node.says("signal.cancel").await;
    node.term();
    ends_promptly(&node, 75).await;
    assert!(!node.scratch().is_empty(), "there was no time to tidy up");
    let next = lab.node(&[fixtures::hello()]).set("SCRATCH_DIR", node.scratch_dir().to_string_lossy());
    let next = next.leasing().await;
    next.stop().await;
    assert_nothing_left(&node);
}

#[tokio::test]
async fn a_signal_ends_a_node_whose_sign_in_service_is_away_or_silent() {
    let lab = TestServer::start().await;
    // A port without a listener.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
    let node = lab.node(&[fixtures::hello()]).set("DDS_BASE_URL", format!("http://{port}")).start().await;
    let line = node.says("registration.failed").await;
    let error = line["error"].as_str().expect("text");
    assert!(error.contains("did not answer") && error.contains(&port.to_string()), "{error}");
    node.term();
    ends_promptly(&node, 0).await;

    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer("POST /internal/v1/auth/siwe/request", usize::MAX, Bad::Hang);
    let node = rubbish.node(&[fixtures::hello()]).start().await;
    rubbish.seen("POST /internal/v1/auth/siwe/request", 1).await;
    node.term();
    ends_promptly(&node, 0).await;
    assert_nothing_left(&node);
}

/// A plugin that records its shutdown. The node is stopped while it leases or before it has signed in.
async fn plugins_are_told(signed_in: bool) {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    let files = tempfile::tempdir().expect("a folder");
    let mark = files.path().join("shutdown");
    let node = rubbish.node(&[fixtures::c("behave", &[])]).set("RH_FIXTURE_SHUTDOWN", mark.to_string_lossy());
    let node = if signed_in {
        node.leasing().await
    } else {
        rubbish.answer("POST /internal/v1/auth/siwe/request", usize::MAX, Bad::Hang);
        let node = node.start().await;
        rubbish.seen("POST /internal/v1/auth/siwe/request", 1).await;
        node
    };
    assert!(!mark.exists(), "the mark comes too early");
    node.term();
    ends_promptly(&node, 0).await;
    assert!(mark.exists(), "the plugin was not told:\n{}", node.log());
}

#[tokio::test]
async fn an_idle_node_that_ends_tells_its_plugins() {
    plugins_are_told(true).await;
}

#[tokio::test]
async fn a_node_that_ends_before_its_first_sign_in_tells_its_plugins() {
    plugins_are_told(false).await;
}

#[tokio::test]
async fn a_signal_ends_a_node_whose_task_service_is_silent() {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer("GET /v1/tasks", usize::MAX, Bad::Hang);
    let node = rubbish.node(&[fixtures::hello()]).set("REQUEST_TIMEOUT_SECS", "2").leasing().await;
    rubbish.seen("GET /v1/tasks", 1).await;
    node.term();
    ends_promptly(&node, 0).await;
}

#[tokio::test]
async fn a_hangup_does_not_end_a_node() {
    let lab = TestServer::start().await;
    let node = lab.joined(&[fixtures::hello()]).await;
    node.hang_up();
    let line = node.says("signal.hup").await;
    assert_eq!(line["level"], "WARN");
    lab.run(&node, "/examples/hello/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn a_killed_node_leaves_nothing_that_the_next_one_does_not_sweep() {
    let lab = TestServer::with(|config| config.lease_ttl = Duration::from_secs(2)).await;
    let node = lab.joined(&[fixtures::zoo()]).await;
    let job = lab.task("/fixtures/slow/v1").set("max_attempts", json!(2)).submit();
    lab.started(&node, job).await;
    node.kill();
    node.wait().await;
    assert!(!node.scratch().is_empty(), "there was no time to tidy up");
    // The control plane leases the task to the next node when the lease has expired.
    let next = lab.node(&[fixtures::zoo()]).set("SCRATCH_DIR", node.scratch_dir().to_string_lossy()).leasing().await;
    lab.task_until(&next, job, |task| task["attempts"] == 2 && task["meta"]["progress"]["started"] == true).await;
    assert!(lab.dev_server.cancel_job(job));
    assert_eq!(lab.ended(&next, job).await.status(), "canceled");
    next.stop().await;
    assert_nothing_left(&node);
}
