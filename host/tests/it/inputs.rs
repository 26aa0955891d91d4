//! Inputs through the binary: every form of id, broken downloads, and memory.

use std::sync::Arc;

use runner_host::{
    model::{AnnouncedData, Coordinates, DataLocation, DataQuery, HeldLease, Lease, Ports as _, Setup, TaskId, Token},
    storage::{DomainConfig, DomainPorts},
    transport::{self, Client},
};
use serde_json::{Value, json};

use crate::harness::{
    Ended, TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::TestNode,
};

const LIST: &str = "GET /api/v1/domains/*/data?ids=";
const RAW: &str = "GET /api/v1/domains/*/data/*?raw";

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| ((n / 251) ^ (n * 7)) as u8).collect()
}

/// The output of `/fixtures/inputs/v1`.
async fn seen(test_server: &TestServer, ended: &Ended) -> Vec<Value> {
    serde_json::from_slice(&test_server.artifact(ended.completed(), "inputs.json").await).expect("JSON")
}

/// The count of inputs, or files of them, on disk.
fn left(node: &TestNode) -> usize {
    node.scratch().iter().filter(|path| path.is_file() || path.to_string_lossy().contains("input")).count()
}

/// Waits until no bytes of tasks' data are in memory.
async fn nothing_in_flight(node: &TestNode) {
    node.page_until("/status.json", |page| page.1["memory"]["in_flight_bytes"] == 0).await;
}

#[tokio::test]
async fn every_input_form_resolves_to_same_file() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let name = "dmt_2025-06-01_08-30-00";
    let one = test_server.dev_server.put_data(name, "dmt_frames_csv", b"frames").await.expect("stored");
    let two = test_server.dev_server.put_data(name, "dmt_gyro_csv", b"gyro").await.expect("stored");
    let data =
        format!("{}api/v1/domains/{}/data", test_server.dev_server.dds_url(), test_server.dev_server.domain_id());
    let path = url::Url::parse(&data).expect("a URL").path().to_owned();
    let forms = [
        one.to_string(),
        format!("  {one} "),
        format!("{data}/{one}"),
        format!("{data}/{one}?raw=true"),
        format!("{path}/{one}"),
        format!("{path}?ids={one}"),
        format!("{data}?name={name}&data_type=dmt_frames_csv"),
        format!("{data}?ids={one}%2C{two}"),
        format!("{data}?ids={one},{two}"),
    ];
    let ended = test_server
        .ended(&node, test_server.task("/fixtures/inputs/v1").set("inputs_cids", json!(forms)).submit())
        .await;
    for (form, input) in forms.iter().zip(seen(&test_server, &ended).await) {
        // The folder is the scan's time, the extension its data type (posemesh.md section 11.3).
        let root = input["root_dir"].as_str().expect("a folder");
        let path = input["path"].as_str().expect("a path").strip_prefix(root).expect("below its root");
        assert_eq!(path, format!("/datasets/2025-06-01_08-30-00/{name}.dmt_frames_csv"), "{form}");
        assert_eq!(json!([input["data_id"], input["on_disk"], input["inside"]]), json!([one, 6, true]), "{form}");
        let related: Vec<&str> =
            input["related_files"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
        let expected = format!("{root}/datasets/2025-06-01_08-30-00/{name}.dmt_gyro_csv");
        assert!(if form.contains(&two.to_string()) { related == [expected] } else { related.is_empty() }, "{form}");
    }
    nothing_in_flight(&node).await;
}

/// The ports of a node with the list of the dev server.
#[tokio::test]
async fn found_data_can_be_read_as_input() {
    let test_server = TestServer::start().await;
    let dev_server = &test_server.dev_server;
    for n in 0..400 {
        let bytes = format!("content {n}");
        dev_server.put_data(&format!("scan {n}"), "ply", bytes.as_bytes()).await.expect("stored");
    }
    let wanted = dev_server.put_data("scan 7", "obj", b"the one").await.expect("stored");
    let at = Coordinates { server: dev_server.dds_url(), domain: dev_server.domain_id() };
    let lease = Lease {
        token: Some(Token::new(dev_server.grant())),
        data: AnnouncedData::Known(DataLocation::DomainServer(at.clone())),
        ..Lease::bare(TaskId::from(uuid::Uuid::nil()), "/lab/find/v1".parse().expect("a capability"))
    };
    let (held_lease, _writer) = HeldLease::new(lease, Setup::Ready(Ok(DataLocation::DomainServer(at))));
    let (dir, config) = (tempfile::tempdir().expect("a folder"), Arc::new(DomainConfig::new("it")));
    let ports = DomainPorts::new(Client::new(transport::Config::default()), held_lease, dir.path().to_owned(), config);
    let find = async |query: Value| {
        let query = DataQuery::parse(query.to_string().as_bytes()).expect("a query");
        let mut stream = ports.find(query).await.expect("found");
        let mut text = Vec::new();
        while let Some(piece) = stream.next().await.expect("read") {
            text.extend_from_slice(&piece);
        }
        let text = String::from_utf8(text).expect("text");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<Value>>()
    };
    let all = find(json!({})).await;
    let names: Vec<&str> = all.iter().map(|found| found["name"].as_str().expect("a name")).collect();
    let stored: Vec<String> = (0..400).map(|n| format!("scan {n}")).chain(["scan 7".to_owned()]).collect();
    assert_eq!(names, stored, "in the order of the store");
    let ids: Vec<&Value> = all.iter().map(|found| &found["id"]).collect();
    assert_eq!(find(json!({ "ids": ids })).await.len(), 401, "more than one request may name");
    assert_eq!(find(json!({ "name": "scan 7" })).await.len(), 2);
    let found = find(json!({ "name": "scan 7", "data_type": "obj" })).await;
    assert_eq!(found.iter().map(|found| &found["id"]).collect::<Vec<_>>(), [&json!(wanted)]);
    let mut input = ports.open(&wanted.to_string()).await.expect("opens");
    assert_eq!(input.next().await.expect("read").as_deref(), Some(&b"the one"[..]));
    ports.close().await;
}

/// The pause is limited to the rest of `TRANSFER_PATIENCE`.
#[tokio::test]
async fn transfer_patience_limits_long_retry_after() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(LIST, 1, Bad::Busy(503, 300));
    let node = proxy.node(&[fixtures::echo()]).set("TRANSFER_PATIENCE", "2s").leasing().await;
    let input = test_server.put("in", b"body").await;
    let job = test_server.task("/examples/echo-bytes/v1").inputs(&[input]).submit();
    test_server.ended(&node, job).await.completed();
    assert_eq!(proxy.count(LIST), 2);
    node.stop().await;
}

#[tokio::test]
async fn concurrent_tasks_see_only_their_own_data() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::echo()]).set("MAX_CONCURRENCY", "6").leasing().await;
    let mut jobs = Vec::new();
    for n in 0..6_u8 {
        let form = ["bytes", "file", "stream"][usize::from(n) % 3];
        let input = test_server.put(&format!("in {n}"), &vec![n; 300_000]).await;
        jobs.push(test_server.task(&format!("/examples/echo-{form}/v1")).inputs(&[input]).submit());
    }
    for (n, job) in (0_u8..).zip(jobs) {
        let ended = test_server.ended(&node, job).await;
        assert_eq!(ended.completed().artifacts().len(), 1);
        assert!(test_server.artifact(&ended, "echo-0.bin").await == vec![n; 300_000], "task {n}");
    }
    nothing_in_flight(&node).await;
}

#[tokio::test]
async fn inputs_from_other_servers_or_whole_domains_fail() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let own = test_server.dev_server.dds_url().to_string();
    for (cid, text) in [
        ("https://elsewhere.example/api/v1/domains/d/data/x".to_owned(), "the lease's domain server is"),
        (
            format!("{own}api/v1/domains/{}/data", test_server.dev_server.domain_id()),
            "which would fetch a whole domain",
        ),
    ] {
        let ended = test_server
            .ended(&node, test_server.task("/fixtures/inputs/v1").set("inputs_cids", json!([cid])).submit())
            .await;
        let (reason, _) = ended.failed();
        assert!(reason.starts_with("runner failed: input ") && reason.contains(text), "{reason}");
    }
}

/// posemesh.md section 11.3: some runners put names and types there, and the host does not read them.
#[tokio::test]
async fn host_ignores_inputs_that_are_names() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let names = json!(["refined_scan_2025-06-01_08-30-00", "", "://", 7.to_string()]);
    let ended = test_server
        .ended(&node, test_server.task("/fixtures/echo-meta/v1").set("inputs_cids", names.clone()).submit())
        .await;
    let lease: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "lease.json").await).expect("JSON");
    assert_eq!(lease["task"]["inputs_cids"], names);
}

#[tokio::test]
async fn node_resumes_a_broken_download() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::echo()]).leasing().await;
    let bytes = pattern(1_000_000);
    let input = test_server.put("in", &bytes).await;
    for (n, form) in ["bytes", "file", "stream"].into_iter().enumerate() {
        proxy.answer(LIST, 1, Bad::Status(503, "later"));
        proxy.answer(LIST, 1, Bad::Cut);
        proxy.answer(LIST, 1, Bad::CutAfter(600_000));
        proxy.answer(RAW, 1, Bad::Status(429, "slowly"));
        proxy.answer(RAW, 1, Bad::CutAfter(200_000));
        let ended = test_server
            .ended(&node, test_server.task(&format!("/examples/echo-{form}/v1")).inputs(&[input]).submit())
            .await;
        assert!(test_server.artifact(ended.completed(), "echo-0.bin").await == bytes, "{form}");
        // Neither the list nor the content is requested again from its beginning.
        assert_eq!((proxy.count(LIST), proxy.count(RAW)), (3 * (n + 1), 3 * (n + 1)), "{form}");
    }
    nothing_in_flight(&node).await;
}

#[tokio::test]
async fn download_from_an_unreachable_server_gives_up() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::echo()]).set("TRANSFER_PATIENCE", "900ms").leasing().await;
    let input = test_server.put("in", &pattern(100_000)).await;
    proxy.answer(LIST, usize::MAX, Bad::Status(503, "closed"));
    let ended = test_server.ended(&node, test_server.task("/examples/echo-file/v1").inputs(&[input]).submit()).await;
    let (reason, details) = ended.failed();
    assert!(reason.starts_with("storage: download of input "), "{reason}");
    assert!(reason.ends_with("server error (503): closed (given up after 3 tries)"), "{reason}");
    assert_eq!(details["retryable"], true);
    node.page_until("/status.json", |page| page.1["tasks"] == json!({})).await;
    assert_eq!(left(&node), 0, "half an input stays nowhere: {:?}", node.scratch());
}

#[tokio::test]
async fn silent_download_is_requested_again() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::echo()]).set("TRANSFER_STALL_TIMEOUT", "300ms").leasing().await;
    let bytes = pattern(300_000);
    let input = test_server.put("in", &bytes).await;
    proxy.answer(LIST, 1, Bad::SilentAfter(100_000));
    let ended = test_server.ended(&node, test_server.task("/examples/echo-file/v1").inputs(&[input]).submit()).await;
    assert!(test_server.artifact(ended.completed(), "echo-0.bin").await == bytes);
    assert_eq!((proxy.count(LIST), proxy.count(RAW)), (1, 1));
}

#[tokio::test]
async fn bytes_over_the_budget_are_refused_or_wait() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::echo(), fixtures::zoo()]);
    let node = node.set("MEMORY_BUDGET", "3MiB").set("MAX_CONCURRENCY", "4").leasing().await;
    let large = test_server.put("large", &pattern(4 << 20)).await;
    let ended = test_server.ended(&node, test_server.task("/examples/echo-bytes/v1").inputs(&[large]).submit()).await;
    let reason = ended.failed().0;
    assert_eq!(
        reason,
        "runner failed: 4194304 bytes do not fit into MEMORY_BUDGET, 3145728 bytes; use a file or a stream instead of bytes"
    );
    // Files and streams of any size pass.
    for form in ["file", "stream"] {
        test_server
            .ended(&node, test_server.task(&format!("/examples/echo-{form}/v1")).inputs(&[large]).submit())
            .await
            .completed();
    }
    let output =
        |piece: usize| test_server.run(&node, "/fixtures/big-output/v1", json!({ "bytes": 4 << 20, "piece": piece }));
    let ended = output(4 << 20).await;
    assert!(ended.failed().0.starts_with("runner failed: 4194304 bytes do not fit into MEMORY_BUDGET"), "{ended:?}");
    output(2 << 20).await.completed();
    // Four tasks that need two thirds of the budget each run one after the other.
    let medium = test_server.put("medium", &pattern(2 << 20)).await;
    let jobs: Vec<_> = (0..4).map(|_| test_server.task("/examples/echo-bytes/v1").inputs(&[medium]).submit()).collect();
    for job in jobs {
        test_server.ended(&node, job).await.completed();
    }
    nothing_in_flight(&node).await;
    let memory = node.status().await["memory"].clone();
    assert_eq!(memory["limit_bytes"], 3 << 20);
    assert!(memory["peak_bytes"].as_u64() >= Some(2 << 20), "{memory}");
}

/// Peak resident memory of a process, in bytes.
#[cfg(target_os = "linux")]
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process of ours");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("Linux says so");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn byte_form_holds_one_copy_of_an_object() {
    const OBJECT: usize = 256 << 20;
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::echo()]).await;
    let small = test_server.put("small", &pattern(1000)).await;
    test_server.ended(&node, test_server.task("/examples/echo-bytes/v1").inputs(&[small]).submit()).await.completed();
    let before = peak(node.pid());
    let large = test_server.put("large", &vec![7; OBJECT]).await;
    let ended = test_server.ended(&node, test_server.task("/examples/echo-bytes/v1").inputs(&[large]).submit()).await;
    let id = ended.completed().artifacts()["echo-0.bin"]["id"].clone();
    let grown = peak(node.pid()) - before;
    assert!(grown < OBJECT as u64 + (24 << 20), "{} MiB for an object of 256 MiB", grown >> 20);
    // Memory that was free before is used first.
    assert!(grown > OBJECT as u64 - (16 << 20), "{grown}: it was not held at all?");
    assert_eq!(test_server.size(id.as_str().expect("an id")).await, OBJECT as u64);
    nothing_in_flight(&node).await;
}

/// posemesh.md section 11.3: real runners remove the folder and read the data by its id.
#[tokio::test]
async fn runner_may_remove_the_folder_of_an_input() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).plugins_file("[defaults]\ngrant = [\"token\"]\n").leasing().await;
    let input = test_server.put("in", b"some input").await;
    let ended = test_server.ended(&node, test_server.task("/fixtures/own-reads/v1").inputs(&[input]).submit()).await;
    let seen: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "own-reads.json").await).expect("JSON");
    assert_eq!(seen["again"], 10, "an input comes again after its folder was removed");
    assert_eq!(seen["raw"], "some input");
    assert_eq!(seen["status"], json!([200, 200, 200]));
    let first = json!({ "id": input, "name": "in", "size": 10 });
    for listed in [&seen["metadata"], &seen["encoded"]["data"][0]] {
        assert_eq!(json!({ "id": listed["id"], "name": listed["name"], "size": listed["size"] }), first);
    }
    node.page_until("/status.json", |page| page.1["tasks"] == json!({})).await;
    assert_eq!(left(&node), 0, "{:?}", node.scratch());
}
