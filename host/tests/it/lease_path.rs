//! The path of a task through the node: it is leased and run, its artifacts are stored, and its end is reported.

use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
};

const MIB: usize = 1024 * 1024;

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| (n % 251) as u8).collect()
}

#[tokio::test]
async fn hello_reads_its_input_and_publishes_its_greeting() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello()]).await;
    let input = test_server.put("who", b"world").await;
    let job =
        test_server.task("/examples/hello/v1").inputs(&[input]).set("outputs_prefix", json!("/greetings/")).submit();
    let ended = test_server.ended(&node, job).await;
    ended.completed();
    assert_eq!(test_server.artifact(&ended, "greetings/outputs/hello.bin").await, b"hello, world");

    // The receipt contains the fields of posemesh.md section 4.7 and no others.
    let task = ended.task()["id"].as_str().expect("an id");
    let stored = &ended.artifacts()["greetings/outputs/hello.bin"]["id"];
    assert_eq!(ended.0["receipts"][0]["outputs"], json!([stored]));
    assert_eq!(
        *ended.receipt(),
        json!({
            "job": { "task_id": task, "job_id": job, "domain_id": test_server.dev_server.domain_id(),
                     "capability": "/examples/hello/v1" },
            "artifacts": [{ "logical_path": "greetings/outputs/hello.bin", "data_type": "bin_data", "id": stored,
                            "name": format!("greetings_outputs_hello_bin_{task}") }],
        })
    );
    // The last progress and every event arrive although the task took milliseconds.
    assert_eq!(ended.task()["meta"]["progress"], json!({ "status": "finished" }));
    assert_eq!(ended.task()["meta"]["events"], json!([{ "level": "info", "message": "greeted", "bytes": 5 }]));
    // The control plane's answer to the first heartbeat is evaluated before any input is downloaded.
    let journal = test_server.dev_server.journal();
    let first = |part: &str| journal.iter().position(|seen| seen.path.contains(part)).expect("it was asked");
    assert!(first("/heartbeat") < first("/api/v1/domains/"), "{journal:#?}");
    node.stop().await;
    assert_eq!(node.scratch(), Vec::<std::path::PathBuf>::new(), "nothing stays behind");
}

/// Inputs of these sizes come back unchanged.
async fn echoed(capability: &str, sizes: [usize; 3]) {
    let test_server = TestServer::with(|config| {
        config.request_max_bytes = 2 * MIB as i64;
        config.part_size = MIB as u64;
    })
    .await;
    let node = test_server.joined(&[fixtures::echo()]).await;
    let mut inputs = Vec::new();
    for size in sizes {
        inputs.push(test_server.put(&format!("input-{size}"), &pattern(size)).await);
    }
    let ended = test_server.ended(&node, test_server.task(capability).inputs(&inputs).submit()).await;
    ended.completed();
    assert_eq!(ended.artifacts().len(), sizes.len());
    for (index, size) in sizes.into_iter().enumerate() {
        let back = test_server.artifact(&ended, &format!("echo-{index}.bin")).await;
        assert!(back == pattern(size), "{capability} of {size} bytes came back as {}", back.len());
    }
    // The large artifact was sent in parts.
    let puts = test_server
        .dev_server
        .journal()
        .into_iter()
        .filter(|seen| seen.method == "PUT" && seen.path.ends_with("multipart"));
    assert!(puts.count() >= 6, "5 MiB and 7 bytes are six parts");
}

#[tokio::test]
async fn bytes_come_back_unchanged() {
    echoed("/examples/echo-bytes/v1", [0, 1, 5 * MIB + 7]).await;
}

#[tokio::test]
async fn files_come_back_unchanged() {
    // A file of 0 bytes cannot be published, see `bad_leases`.
    echoed("/examples/echo-file/v1", [1, 2, 5 * MIB + 7]).await;
}

#[tokio::test]
async fn streams_come_back_unchanged() {
    echoed("/examples/echo-stream/v1", [0, 1, 5 * MIB + 7]).await;
}

#[tokio::test]
async fn long_queue_does_not_delay_another_capability() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello(), fixtures::echo(), fixtures::zoo()]).await;
    let served: Vec<String> = serde_json::from_value(node.status().await["capabilities"].clone()).expect("names");
    assert!(served.is_sorted() && served.len() > 20, "{served:?}");
    // The first job has a long queue. The last job must not wait for its end.
    let many: Vec<Value> = (0..40).map(|n| task("/fixtures/ok/v1", n)).collect();
    let many = test_server.dev_server.create_job(json!({ "label": "many", "tasks": many })).expect("a job");
    let one = test_server.task("/examples/hello/v1").submit();
    test_server.ended(&node, one).await.completed();
    let left = test_server.dev_server.job(many).expect("a job")["tasks_summary"]["queued"].clone();
    assert!(left.as_u64() > Some(0), "the other capability was served before the queue ended: {left}");
    test_server.ended(&node, many).await.completed();
}

fn task(capability: &str, number: usize) -> Value {
    json!({ "label": format!("{number}"), "stage": "s", "capability": capability, "max_attempts": 1 })
}

#[tokio::test]
async fn heartbeats_combine_progress_and_send_events_in_order() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("HEARTBEAT_JITTER_MS", "100").leasing().await;
    let ended = test_server.run(&node, "/fixtures/progress-storm/v1", json!({ "count": 500 })).await;
    assert_eq!(ended.completed().task()["meta"]["progress"], json!({ "n": 500 }));
    let beats = test_server.dev_server.journal().iter().filter(|seen| seen.path.ends_with("/heartbeat")).count();
    assert!(beats < 50, "{beats} heartbeats for 500 reports");
    let ended = test_server.run(&node, "/fixtures/events/v1", json!({ "count": 40 })).await;
    let wanted: Vec<Value> = (1..=40).map(|n| json!({ "n": n })).collect();
    assert_eq!(ended.completed().task()["meta"]["events"], json!(wanted));
}

#[tokio::test]
async fn plugin_can_use_own_tokio_sockets_and_threads() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let ended = test_server.run(&node, "/fixtures/tokio-net/v1", json!({})).await;
    assert_eq!(test_server.artifact(ended.completed(), "net.txt").await, b"through the loopback");
    let ended = test_server.run(&node, "/fixtures/block-on/v1", json!({})).await;
    assert_eq!(test_server.artifact(ended.completed(), "blocking.txt").await, b"blocking");
    assert_eq!(test_server.artifact(&ended, "thread.txt").await, b"thread");
    // A dropped writer publishes nothing. Artifacts published before and after it remain.
    let ended = test_server.run(&node, "/fixtures/drop-writer/v1", json!({})).await;
    assert_eq!(ended.completed().artifacts().keys().collect::<Vec<_>>(), ["kept.txt"]);
    test_server.run(&node, "/fixtures/use-after-end/v1", json!({})).await.completed();
    let late = node.says_text("call after the end").await;
    assert_eq!(late["all"], true, "{late}");
}

#[tokio::test]
async fn lines_of_a_runner_carry_the_task() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("RUST_LOG", "").leasing().await;
    let ended = test_server.run(&node, "/fixtures/logs/v1", json!({})).await;
    let line = node.says_text("tracing at info").await;
    let task = &ended.completed().task()["id"];
    let text = line.to_string();
    for wanted in [task.as_str().expect("an id"), "/fixtures/logs/v1", "zoo", "forty-two"] {
        assert!(text.contains(wanted), "{wanted} is missing in {line}");
    }
    node.says_text("log at warn").await;
    assert_eq!(node.said_text("tracing at debug").len(), 0, "the host listens at info");
}

#[tokio::test]
async fn runner_lease_has_unknown_fields_but_no_token() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let meta = json!({ "voxel": 0.25, "nested": { "a": [1, "é"] } });
    let ended = test_server.run(&node, "/fixtures/echo-meta/v1", meta.clone()).await;
    let lease = test_server.artifact(ended.completed(), "lease.json").await;
    let lease: Value = serde_json::from_slice(&lease).expect("JSON");
    assert_eq!(lease["task"]["meta"], meta);
    assert_eq!(lease["task"]["stage"], "one", "fields the host does not read are kept: {lease}");
    assert!(lease.get("access_token").is_none_or(Value::is_null), "{lease}");
}

#[tokio::test]
async fn downloaded_input_includes_its_metadata() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let id =
        test_server.dev_server.put_data("scan_2025-06-01_08-30-00", "dmt_manifest_json", b"{}").await.expect("stored");
    let ended = test_server.ended(&node, test_server.task("/fixtures/inputs/v1").inputs(&[id]).submit()).await;
    let seen = test_server.artifact(ended.completed(), "inputs.json").await;
    let seen: Value = serde_json::from_slice(&seen).expect("JSON");
    let input = &seen[0];
    assert_eq!(input["data_id"], json!(id));
    assert_eq!(input["name"], "scan_2025-06-01_08-30-00");
    assert_eq!(input["data_type"], "dmt_manifest_json");
    assert_eq!(input["file_name"], "scan_2025-06-01_08-30-00.dmt_manifest_json");
    assert_eq!((&input["on_disk"], &input["inside"]), (&json!(2), &json!(true)), "{input}");
    assert!(input["path"].as_str().expect("a path").contains("/datasets/2025-06-01_08-30-00/"), "{input}");
}

#[tokio::test]
async fn task_folder_is_private_and_removed_afterwards() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let ended = test_server.run(&node, "/fixtures/scratch/v1", json!({})).await;
    let seen: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "scratch.json").await).expect("JSON");
    assert_eq!(seen["mode"], "700", "{seen}");
    let dir = seen["dir"].as_str().expect("a path");
    node.says("task.ended").await;
    assert!(!std::path::Path::new(dir).exists(), "{dir} is still there");
}

#[tokio::test]
async fn server_without_multipart_gets_single_upload_request() {
    let test_server = TestServer::with(|config| {
        config.multipart = false;
        config.request_max_bytes = 0;
    })
    .await;
    let node = test_server.joined(&[fixtures::echo()]).await;
    let input = test_server.put("large", &pattern(6 * MIB)).await;
    for capability in ["/examples/echo-file/v1", "/examples/echo-stream/v1"] {
        let ended = test_server.ended(&node, test_server.task(capability).inputs(&[input]).submit()).await;
        let back = test_server.artifact(ended.completed(), "echo-0.bin").await;
        assert!(back == pattern(6 * MIB), "{capability}");
    }
}

#[tokio::test]
async fn second_attempt_replaces_artifacts_of_first_attempt() {
    let test_server = TestServer::with(|config| config.lease_ttl = std::time::Duration::from_secs(2)).await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).leasing().await;
    // The first report is rejected permanently, so the control plane leases the task again.
    proxy.answer("POST /v1/tasks/*/complete", 1, Bad::Status(409, "not yours"));
    let ended =
        test_server.ended(&node, test_server.task("/examples/hello/v1").set("max_attempts", json!(2)).submit()).await;
    assert_eq!(ended.completed().task()["attempts"], 2);
    let line = node.says_ended("refused").await;
    assert_eq!(line["outcome"], "completed", "{line}");
    let calls = |method: &str| proxy.count(&format!("{method} /api/v1/domains/*/data"));
    assert_eq!((calls("POST"), calls("PUT")), (1, 1), "one creation, one replacement");
}

#[tokio::test]
async fn many_tasks_are_each_done_and_reported_once() {
    let test_server = TestServer::start().await;
    let nodes = [
        test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "8").leasing().await,
        test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "8").leasing().await,
    ];
    let tasks: Vec<Value> = (0..300).map(|n| task("/fixtures/ok/v1", n)).collect();
    let job = test_server.dev_server.create_job(json!({ "label": "many", "tasks": tasks })).expect("a job");
    let ended = test_server.ended(&nodes[0], job).await;
    ended.completed();
    let receipts = ended.0["receipts"].as_array().expect("receipts");
    let workers: std::collections::BTreeSet<String> = receipts.iter().map(|one| one["node_id"].to_string()).collect();
    assert_eq!((receipts.len(), workers.len()), (300, 2), "both nodes worked");
    for node in &nodes {
        node.stop().await;
        // On a busy machine the plugin may be reported as slow.
        let loud = |line: &Value| line["level"] == "WARN" || line["level"] == "ERROR";
        let calm = |line: &Value| !loud(line) || line["event"] == "plugin.slow";
        assert!(node.lines().iter().all(calm), "{}", node.log());
    }
    let reports = test_server.dev_server.journal().into_iter().filter(|seen| seen.path.ends_with("/complete")).count();
    assert_eq!(reports, 300);
}

/// Issue 3, section 6: a lease, a heartbeat and a report for each task, all over persistent connections.
#[tokio::test]
async fn empty_task_sends_three_requests_over_open_connections() {
    const TASKS: usize = 150;
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    let tasks: Vec<Value> = (0..TASKS).map(|n| task("/fixtures/ok/v1", n)).collect();
    let job = test_server.dev_server.create_job(json!({ "label": "many", "tasks": tasks })).expect("a job");
    test_server.ended(&node, job).await.completed();
    node.stop().await;
    let journal = test_server.dev_server.journal();
    let about_tasks = journal.iter().filter(|seen| seen.path.starts_with("/v1/tasks") && seen.status != 204).count();
    assert!((2 * TASKS..=3 * TASKS).contains(&about_tasks), "{about_tasks} requests for {TASKS} tasks");
    // At most these requests are concurrent: the running task's, the previous task's, a poll and a login.
    let connections = proxy.connections();
    assert!(connections <= 6, "{connections} connections for {TASKS} tasks");
}

#[tokio::test]
async fn enable_noop_activates_packaged_noop_plugin() {
    let test_server = TestServer::start().await;
    let node =
        test_server.node(&[fixtures::noop()]).set("ENABLE_NOOP", "true").set("NOOP_SLEEP_SECS", "0.01").leasing().await;
    let ended = test_server.run(&node, "/examples/noop/v1", json!({})).await;
    assert!(ended.completed().artifacts().is_empty());
}

#[tokio::test]
async fn unlisted_domain_server_gets_no_request() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::hello()]).set("DOMAIN_HOSTS", "data.example, 127.0.0.1:1").leasing().await;
    let ended = test_server.run(&node, "/examples/hello/v1", json!({})).await;
    let (reason, host) = (ended.failed().0, test_server.dev_server.address().to_string());
    let expected = format!("domain server {host} is not in DOMAIN_HOSTS; add it there to allow it");
    assert!(reason.contains(&expected), "{reason}");
    let asked = test_server.dev_server.journal().into_iter().any(|seen| seen.path.contains("/domains/"));
    assert!(!asked, "nothing was sent there");
    node.stop().await;
    let node = test_server.node(&[fixtures::hello()]).set("DOMAIN_HOSTS", host).leasing().await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}
