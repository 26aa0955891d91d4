//! Leases and tasks that cannot run. The node rejects them with a precise reason, or skips them.

use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
};

const LEASE: &str = "GET /v1/tasks";
const BEAT: &str = "POST /v1/tasks/*/heartbeat";

/// Changes every lease in an answer, and nothing else.
fn lease(change: impl Fn(&mut Value) + Send + Sync + 'static) -> Bad {
    Bad::edit(move |answer| {
        if answer["task"].is_object() {
            change(answer);
        }
    })
}

/// Runs hello with a changed lease. Returns the stage and the error of its set-up failure.
async fn setup_failure(change: impl Fn(&mut Value) + Clone + Send + Sync + 'static) -> Value {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).leasing().await;
    proxy.answer(LEASE, usize::MAX, lease(change.clone()));
    proxy.answer(BEAT, usize::MAX, Bad::edit(change));
    let ended = test_server.run(&node, "/examples/hello/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "node_setup_failed");
    assert_eq!(json!([details["outcome"], details["code"]]), json!(["host-fault", "build_ports"]));
    proxy.heal();
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    json!([details["stage"], details["error"]])
}

#[tokio::test]
async fn lease_without_domain_fails_its_setup() {
    let failure = setup_failure(|answer| answer["domain_id"] = Value::Null).await;
    assert_eq!(failure, json!(["build_ports", "lease missing domain_id"]));
    let failure = setup_failure(|answer| answer["domain_server_url"] = Value::Null).await;
    assert_eq!(failure, json!(["build_ports", "lease missing domain_server_url"]));
}

#[tokio::test]
async fn relative_server_url_fails_the_setup() {
    let failure = setup_failure(|answer| answer["domain_server_url"] = json!("api/v1")).await;
    assert_eq!(failure, json!(["build_ports", "domain_server_url \"api/v1\" is not an absolute http(s) URL"]));
}

/// The node skips a lease with this change, and logs `message`. It neither runs nor reports it. The next poll waits as
/// after an empty answer.
async fn skipped(change: impl Fn(&mut Value) + Send + Sync + 'static, message: &str) {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(LEASE, usize::MAX, lease(change));
    let job = test_server.task("/examples/hello/v1").submit();
    let node = proxy.node(&[fixtures::hello()]).set("RUST_LOG", "info,runner_host::engine=debug");
    let node = node.set("POLL_BACKOFF_MS_MIN", "500").set("POLL_BACKOFF_MS_MAX", "500").leasing().await;
    let line = node.line(|line| line["event"] == "lease.skipped" && line["message"] == message).await;
    let task = test_server.dev_server.job(job).expect("a job")["tasks"][0]["id"].clone();
    assert_eq!((&line["task_id"], &line["capability"]), (&task, &json!("/examples/hello/v1")));
    node.says("poll.empty").await;
    proxy.heal();
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    let calls = test_server.dev_server.journal();
    let about = calls.iter().filter(|seen| seen.path.contains(task.as_str().expect("an id"))).count();
    assert_eq!(about, 0, "{calls:#?}");
    assert_eq!(node.said("lease.skipped").len(), 1);
    let lines = node.lines();
    let after =
        lines.iter().skip_while(|line| line["event"] != "lease.skipped").find(|line| line["event"] == "poll.empty");
    assert_eq!(after.map(|line| &line["retry_in_ms"]), Some(&json!(500)), "a number in the log");
}

#[tokio::test]
async fn cancelled_lease_is_skipped() {
    skipped(|lease| lease["cancel"] = json!(true), "lease skipped, it was already cancelled").await;
}

#[tokio::test]
async fn missing_input_is_named() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::echo()]).await;
    let missing = uuid::Uuid::new_v4();
    for capability in ["/examples/echo-bytes/v1", "/examples/echo-file/v1", "/examples/echo-stream/v1"] {
        let ended = test_server.ended(&node, test_server.task(capability).inputs(&[missing]).submit()).await;
        let wanted = format!("runner failed: download of input {missing} refused: not found (404)");
        assert!(ended.failed().0.starts_with(&wanted), "{}", ended.failed().0);
    }
}

#[tokio::test]
async fn empty_inputs_are_valid_but_empty_outputs_fail() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::echo(), fixtures::zoo()]).await;
    let input = test_server.put("nothing", b"").await;
    let ended = test_server.ended(&node, test_server.task("/fixtures/inputs/v1").inputs(&[input]).submit()).await;
    let seen: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "inputs.json").await).expect("JSON");
    assert_eq!((&seen[0]["on_disk"], &seen[0]["size"]), (&json!(0), &json!(0)), "{seen}");
    for capability in ["/examples/echo-bytes/v1", "/examples/echo-stream/v1"] {
        let ended = test_server.ended(&node, test_server.task(capability).inputs(&[input]).submit()).await;
        assert_eq!(test_server.artifact(ended.completed(), "echo-0.bin").await, b"", "{capability}");
    }
    // posemesh.md section 6.8: rejected before any call to the store.
    let before = test_server.stored().await;
    let ended = test_server.ended(&node, test_server.task("/examples/echo-file/v1").inputs(&[input]).submit()).await;
    let reason = ended.failed().0;
    // The report shows no path of this machine.
    let wanted = "runner failed: upload of echo-0.bin refused: its file is empty; expected at least one byte";
    assert_eq!(reason, wanted);
    assert!(ended.artifacts().is_empty());
    assert_eq!(test_server.stored().await, before);
    let parts = test_server.dev_server.journal().into_iter().filter(|seen| seen.path.ends_with("/multipart")).count();
    assert_eq!(parts, 0, "an empty file is never sent in parts");
}

#[tokio::test]
async fn artifact_names_follow_the_protocol() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    for (prefix, path, logical, name, data_type) in [
        (Some("/a/b/"), "/x/y.PLY", "a/b/x/y.PLY", "a_b_x_y_PLY_TASK", "ply"),
        (None, "/abs", "abs", "abs_TASK", "binary"),
        (None, "é.json", "é.json", "__json_TASK", "json"),
        (None, "a//b", "a/b", "a_b_TASK", "binary"),
        (None, "p.we ird", "p.we ird", "p_we_ird_TASK", "we_ird_data"),
        (Some("p"), "", "p", "p_TASK", "binary"),
    ] {
        let job =
            test_server.task("/fixtures/paths/v1").meta(json!({ "path": path })).set("outputs_prefix", json!(prefix));
        let ended = test_server.ended(&node, job.submit()).await;
        let artifacts = ended.completed().artifacts();
        let artifact = artifacts.get(logical).unwrap_or_else(|| panic!("{path:?}: {artifacts:?}"));
        let task = ended.task()["id"].as_str().expect("an id");
        assert_eq!(artifact["name"], json!(name.replace("TASK", task)), "{path:?}");
        assert_eq!(artifact["data_type"], data_type, "{path:?}");
        assert_eq!(test_server.artifact(&ended, logical).await, path.as_bytes());
    }
}

#[tokio::test]
async fn invalid_artifact_paths_have_distinct_errors() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let long = "x".repeat(1025);
    for (path, wanted) in [
        ("a/../../b", "artifact path a/../../b contains a `..` segment; expected a path below the outputs prefix"),
        ("a\0b", "artifact path contains a NUL character; use printable names"),
        (long.as_str(), "artifact path has 1025 bytes; at most 1024 are allowed"),
    ] {
        let ended = test_server.run(&node, "/fixtures/paths/v1", json!({ "path": path })).await;
        assert_eq!(ended.failed().0, format!("runner failed: {wanted}"));
        assert!(ended.artifacts().is_empty());
    }
}
