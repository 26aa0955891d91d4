//! Leases while the cores are busy or the process is stopped.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{TestServer, fixtures};

const LEASE: Duration = Duration::from_secs(2);

/// The one long test: ten lease terms of two seconds take twenty seconds.
#[tokio::test]
async fn throttled_node_under_cpu_load_loses_no_lease() {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let job = test_server.task("/fixtures/burn/v1").meta(json!({ "file": file })).submit();
    test_server.started(&node, job).await;
    let began = Instant::now();
    while began.elapsed() < LEASE * 10 {
        node.freeze();
        tokio::time::sleep(Duration::from_millis(90)).await;
        node.thaw();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    std::fs::write(&file, "").expect("the folder is writable");
    let ended = test_server.ended(&node, job).await;
    assert_eq!(ended.completed().task()["attempts"], 1, "the lease lived through all of it");
    assert!(node.said("lease.lost").is_empty(), "{}", node.log());
    let beats = test_server.dev_server.journal().iter().filter(|seen| seen.path.ends_with("/heartbeat")).count();
    assert!((20..=120).contains(&beats), "{beats} heartbeats in ten lengths");
}

/// The process is stopped for two lease terms during `capability`. After that the node sends nothing more for the
/// task.
async fn silent_after_a_stop(capability: &str) {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let job = test_server.task(capability).submit();
    let task = test_server.started(&node, job).await;
    node.freeze();
    let frozen = Instant::now();
    // The control plane takes the task back meanwhile. The task has no second attempt.
    let over = test_server.task_until(&node, job, |task| task["status"] == "failed").await;
    tokio::time::sleep((LEASE * 2).saturating_sub(frozen.elapsed())).await;
    let before = test_server.dev_server.journal().len();
    node.thaw();
    let line = node.says_ended("none").await;
    assert_eq!(line["outcome"], "lease-lost", "{line}");
    // Another task proves that the node works again, and that its requests are recorded.
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    let id = task["id"].as_str().expect("an id");
    let journal = test_server.dev_server.journal();
    let data = |path: &str| path.contains("/domains/") || path.ends_with("/info");
    let late: Vec<_> = journal[before..].iter().filter(|seen| seen.path.contains(id) || data(&seen.path)).collect();
    assert!(late.is_empty(), "{late:#?}");
    assert_eq!(over["attempts"], 1);
    assert_eq!(test_server.dev_server.job(job).map(|job| job["job"]["status"].clone()), Some(Value::from("failed")));
}

#[tokio::test]
async fn node_frozen_past_lease_sends_no_late_requests() {
    tokio::join!(silent_after_a_stop("/fixtures/chatter/v1"), silent_after_a_stop("/fixtures/slow/v1"));
}
