//! How tasks end: errors, panics, cancels. The node works on after each of them.

use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
};

#[tokio::test]
async fn failure_report_contains_error_chain_and_retryable_flag() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let ended = test_server.run(&node, "/fixtures/fail/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "runner failed: cloud not written: shard 3 not written: disk full");
    let words = |details: &Value| json!([details["outcome"], details["code"], details["retryable"]]);
    assert_eq!(words(details), json!(["failed", "runner_error", false]));
    assert_eq!(details["job"]["capability"], "/fixtures/fail/v1");
    assert_eq!(details["artifacts"], json!([]));

    let ended = test_server.run(&node, "/fixtures/fail-details/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "runner failed: the scan is empty");
    assert_eq!(words(details), json!(["failed", "invalid_input", false]));
    assert_eq!(details["details"], json!({ "points": 0, "minimum": 3 }));

    let ended = test_server.run(&node, "/fixtures/retryable/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "runner failed: the scanner is busy");
    assert_eq!(words(details), json!(["failed", "runner_error", true]));
    // The control plane may record an end before the page shows it.
    node.page_until("/status.json", |page| page.1["ended"]["failed"] == 3).await;
}

#[tokio::test]
async fn failure_report_lists_published_artifacts() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::echo()]).await;
    let inputs = [test_server.put("there", b"some bytes").await, uuid::Uuid::new_v4()];
    let ended = test_server.ended(&node, test_server.task("/examples/echo-bytes/v1").inputs(&inputs).submit()).await;
    let (reason, details) = ended.failed();
    assert!(reason.contains(&inputs[1].to_string()) && reason.ends_with("no such data"), "{reason}");
    let listed = details["artifacts"].as_array().expect("a list");
    assert_eq!(listed.len(), 1, "{details}");
    assert_eq!((&listed[0]["logical_path"], &listed[0]["data_type"]), (&json!("echo-0.bin"), &json!("bin_data")));
    assert!(listed[0]["id"].is_string() && listed[0]["name"].is_string(), "{details}");
}

#[tokio::test]
async fn failed_task_is_retried_up_to_max_attempts() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let job = test_server.task("/fixtures/retryable/v1").set("max_attempts", json!(3)).submit();
    let ended = test_server.ended(&node, job).await;
    assert_eq!(ended.failed().0, "runner failed: the scanner is busy");
    assert_eq!(ended.task()["attempts"], 3);
    assert_eq!(ended.0["receipts"].as_array().map(Vec::len), Some(3));
}

#[tokio::test]
async fn panic_fails_only_its_task_with_location() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    for (name, text) in
        [("panic", "boom 42"), ("panic-in-drop", "boom in drop"), ("panic-blocking", "boom on a blocking thread")]
    {
        let ended = test_server.run(&node, &format!("/fixtures/{name}/v1"), json!({})).await;
        let (reason, details) = ended.failed();
        let place = reason.strip_prefix(&format!("runner panicked: {text} at ")).unwrap_or_else(|| panic!("{reason}"));
        assert!(place.contains("ends.rs:"), "{reason}");
        assert_eq!(json!([details["outcome"], details["code"]]), json!(["panicked", "runner_panic"]), "{name}");
        test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    }
    test_server.run(&node, "/fixtures/panic-thread/v1", json!({})).await.completed();
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    assert!(node.is_alive());
}

#[tokio::test]
async fn panic_in_error_or_spawned_task_fails_task() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    for (name, text) in [("panic-in-error", "boom in an error's text"), ("panic-passed-on", "boom in a spawned task")] {
        let ended = test_server.run(&node, &format!("/fixtures/{name}/v1"), json!({})).await;
        let (reason, details) = ended.failed();
        assert!(reason.starts_with(&format!("runner panicked: {text} at ")), "{reason}");
        assert_eq!(json!([details["outcome"], details["code"]]), json!(["panicked", "runner_panic"]), "{name}");
        test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    }
    node.stop().await;
}

#[tokio::test]
async fn lease_for_unknown_capability_fails_with_its_name() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(
        "GET /v1/tasks",
        usize::MAX,
        Bad::edit(|lease| {
            if lease["task"].is_object() {
                lease["task"]["capability"] = json!("/nobody/serves-this/v1");
            }
        }),
    );
    let node = proxy.node(&[fixtures::zoo()]).leasing().await; // its first poll is answered like all others
    let ended = test_server.run(&node, "/fixtures/ok/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "no runner registered for capability: /nobody/serves-this/v1");
    assert_eq!(details["job"]["capability"], "/nobody/serves-this/v1");
    assert_eq!(details["artifacts"], json!([]));
    proxy.heal();
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
}

/// Checks that no task end was reported.
fn assert_silence(test_server: &TestServer) {
    let result: Vec<_> = test_server
        .dev_server
        .journal()
        .into_iter()
        .filter(|seen| seen.path.ends_with("/complete") || seen.path.ends_with("/fail"))
        .collect();
    assert!(result.is_empty(), "{result:?}");
}

#[tokio::test]
async fn cancelled_job_stops_runner_without_report() {
    let test_server = TestServer::with(|config| config.lease_ttl = std::time::Duration::from_secs(2)).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let job = test_server.task("/fixtures/slow/v1").submit();
    test_server.started(&node, job).await;
    assert!(test_server.dev_server.cancel_job(job));
    let ended = test_server.ended(&node, job).await;
    assert_eq!(ended.status(), "canceled");
    let line = node.says_ended("none").await;
    assert_eq!(line["outcome"], "cancelled", "{line}");
    assert_silence(&test_server);
    assert_eq!(node.status().await["tasks"], json!({}));
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
}

#[tokio::test]
async fn cancelled_job_sets_cancel_flag_for_runner() {
    let test_server = TestServer::with(|config| config.lease_ttl = std::time::Duration::from_secs(2)).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let job = test_server.task("/fixtures/polls-cancel/v1").submit();
    test_server.started(&node, job).await;
    assert!(test_server.dev_server.cancel_job(job));
    let line = node.says_text("flag seen").await;
    assert!(line.to_string().contains("Plane"), "{line}");
    assert_eq!(test_server.ended(&node, job).await.status(), "canceled");
    node.says_ended("none").await;
    assert_silence(&test_server);
}

#[tokio::test]
async fn runner_receives_cancel_reason() {
    let test_server = TestServer::with(|config| config.lease_ttl = std::time::Duration::from_secs(2)).await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "0").leasing().await;
    let task = || test_server.task("/fixtures/polls-cancel/v1").submit();
    test_server.started(&node, task()).await;
    proxy.answer("POST /v1/tasks/*/heartbeat", 1, Bad::Status(410, "gone"));
    let line = node.says_text("flag seen").await;
    assert!(line.to_string().contains("LeaseLost"), "{line}");
    node.says_ended("none").await;
    let job = task();
    test_server.started(&node, job).await;
    node.term();
    node.line(|line| line["message"] == "flag seen" && line.to_string().contains("Drained")).await;
    assert_eq!(test_server.ended(&node, job).await.failed().0, "drained");
    node.wait().await;
}
