//! Memory of a whole node during transfers (issue 3, sections 3 and 6).

#![cfg(target_os = "linux")]

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

#[cfg(feature = "grpc")]
use crate::harness::node_plane::{NodePlane, domain_lease, result};
use crate::harness::{
    TestServer, fixtures,
    node::{NodeSetup, TestNode},
};

const MIB: u64 = 1024 * 1024;

/// Bytes in and out of each of four concurrent tasks.
const OBJECT_BYTES: u64 = 64 * MIB;
/// The memory budget of all tasks together.
const BUDGET_BYTES: u64 = 32 * MIB;
/// Parts of the two streams. The budget counts them, but they do not wait for it.
const STREAMS_BYTES: u64 = 2 * PART_BYTES;
const PART_BYTES: u64 = 4 * MIB;
/// The node in a debug build, its plugins, and free memory of the allocator.
const REST_BYTES: u64 = 64 * MIB;

const KINDS: [&str; 2] = ["/examples/echo-file/v1", "/examples/echo-stream/v1"];

#[tokio::test]
async fn transfers_of_256_mib_stay_within_the_budget() {
    let (test_server, object, input) = stored().await;
    let node = bounded(test_server.node(&[fixtures::echo()])).leasing().await;
    let jobs = [0, 1, 0, 1].map(|kind| test_server.task(KINDS[kind]).inputs(&[input]).submit());
    for job in jobs {
        let ended = test_server.ended(&node, job).await;
        let artifact = &ended.completed().artifacts()["echo-0.bin"];
        assert_eq!(test_server.size(artifact["id"].as_str().expect("an id")).await, OBJECT_BYTES);
    }
    check_memory(node, &object).await;
}

#[cfg(feature = "grpc")]
#[tokio::test]
async fn transfers_of_runs_need_no_more_memory() {
    let (test_server, object, input) = stored().await;
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::echo()], "").set("DOMAIN_HOSTS", test_server.dev_server.address().to_string());
    let node = bounded(node).leasing().await;
    let runs = ["run-0", "run-1", "run-2", "run-3"];
    for (run, kind) in runs.into_iter().zip(KINDS.iter().cycle()) {
        plane.send(&node, domain_lease(&test_server, run, kind, &[("large", &input.to_string())], &[])).await;
    }
    for run in runs {
        let sent = plane.completed(&node, run).await;
        assert_eq!(test_server.size(result(&sent)["echo-0.bin"]).await, OBJECT_BYTES);
    }
    check_memory(node, &object).await;
}

/// A dev server with the object, and its id there.
async fn stored() -> (TestServer, Vec<u8>, Uuid) {
    let test_server = TestServer::with(|config| config.part_size = PART_BYTES).await;
    let object: Vec<u8> = (0..OBJECT_BYTES).map(|n| (n % 251) as u8).collect();
    let input = test_server.put("large", &object).await;
    (test_server, object, input)
}

/// Four tasks at once, with this memory for all of them.
fn bounded(node: NodeSetup) -> NodeSetup {
    node.set("MAX_CONCURRENCY", "4").set("MEMORY_BUDGET", BUDGET_BYTES.to_string()).set("RUST_LOG", "info")
}

/// Four tasks have copied the object.
async fn check_memory(node: TestNode, object: &[u8]) {
    // The control plane learns of an end before the page shows it.
    let all = |page: &(u16, Value)| page.1["recent"].as_array().is_some_and(|recent| recent.len() == 4);
    let (_, status) = node.page_until("/status.json", all).await;
    let peak = node.memory("VmHWM");
    let charged = status["memory"]["peak_bytes"].as_u64().expect("a number");
    assert!(charged > 0 && charged <= BUDGET_BYTES + STREAMS_BYTES, "{}", status["memory"]);
    assert!(peak < BUDGET_BYTES + REST_BYTES, "{} MiB resident, {}", peak / MIB, status["memory"]);
    let sha256: String = Sha256::digest(object).iter().map(|byte| format!("{byte:02x}")).collect();
    let recent = status["recent"].as_array().expect("a list");
    let sums = recent.iter().flat_map(|one| [&one["inputs"][0]["sha256"], &one["artifacts"][0]["sha256"]]);
    assert!(sums.into_iter().all(|sum| *sum == sha256.as_str()), "{recent:#?}");
    node.stop().await;
}

/// Most bytes that stay allocated after 200 panics. The symbol cache of one backtrace takes 40 MiB.
const PANICS_BYTES: u64 = 16 * MIB;

#[tokio::test]
async fn panicking_runners_leak_no_memory() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "4").set("RUST_LOG", "info").leasing().await;
    let panics = ["/fixtures/panic/v1", "/fixtures/panic-in-drop/v1", "/fixtures/panic-blocking/v1"];
    for capability in ["/fixtures/ok/v1"; 50] {
        test_server.run(&node, capability, json!({})).await.completed();
    }
    let before = node.memory("RssAnon");
    let jobs: Vec<_> = panics.iter().cycle().take(200).map(|panic| test_server.task(panic).submit()).collect();
    for job in jobs {
        assert_eq!(test_server.ended(&node, job).await.failed().1["outcome"], "panicked");
    }
    let kept = node.memory("RssAnon").saturating_sub(before);
    assert!(kept < PANICS_BYTES, "{} KiB kept of 200 panics", kept / 1024);
    node.stop().await;
}
