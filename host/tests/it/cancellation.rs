//! Cancellation of a runner: the signal, the grace period, a stuck runner, and strikes against its plugin.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use runner_host::dev::JournalEntry;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{TestServer, fixtures, node::TestNode};

const GIVEN_UP: &str = "runner.stuck";
const LEASE: Duration = Duration::from_secs(2);

async fn test_server() -> TestServer {
    TestServer::with(|config| config.lease_ttl = LEASE).await
}

/// A file that no test creates.
const NEVER: &str = "/never";

/// Submits a task whose runner ignores its cancel until `file` exists. Cancels it once it runs.
async fn ignored(test_server: &TestServer, node: &TestNode, file: impl AsRef<Path>) -> Uuid {
    let job = test_server.task("/fixtures/ignores-cancel/v1").meta(json!({ "file": file.as_ref() })).submit();
    test_server.started(node, job).await;
    assert!(test_server.dev_server.cancel_job(job));
    job
}

fn zoo(listing: &Value) -> &Value {
    let plugins = listing["plugins"].as_array().expect("a list");
    plugins.iter().find(|plugin| plugin["name"] == "zoo").expect("it was loaded")
}

#[tokio::test]
async fn stuck_runner_releases_slot_after_cancel_grace() {
    let test_server = test_server().await;
    let node = test_server.node(&[fixtures::zoo()]).set("CANCEL_GRACE", "200ms").leasing().await;
    ignored(&test_server, &node, NEVER).await;
    let line = node.says(GIVEN_UP).await;
    assert_eq!((&line["plugin"], &line["strikes"]), (&json!("zoo"), &json!(1)), "{line}");
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    let (code, status) = node.page_until("/status.json", |page| zoo(&page.1)["stuck_runners"] == 1).await;
    assert_eq!((code, &status["stuck_runners"], &zoo(&status)["state"]), (200, &json!(1), &json!("loaded")));
    assert_eq!(node.page("/ready").await, (200, json!({ "ready": true })));
    node.stop().await;
}

#[tokio::test]
async fn return_within_the_grace_adds_no_strike() {
    let test_server = test_server().await;
    let node = test_server.node(&[fixtures::zoo()]).set("CANCEL_GRACE", "15s").leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    ignored(&test_server, &node, &file).await;
    node.says_text("cancel ignored").await;
    std::fs::write(&file, "").expect("the folder is writable");
    let line = node.says_ended("none").await;
    assert_eq!(line["outcome"], "cancelled", "{line}");
    assert!(node.said(GIVEN_UP).is_empty());
}

#[tokio::test]
async fn late_return_of_a_stuck_runner_is_logged() {
    let test_server = test_server().await;
    let node = test_server.node(&[fixtures::zoo()]).set("CANCEL_GRACE", "100ms").leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let job = ignored(&test_server, &node, &file).await;
    node.says(GIVEN_UP).await;
    std::fs::write(&file, "").expect("the folder is writable");
    let line = node.says("runner.returned_late").await;
    let task = test_server.dev_server.job(job).expect("a job")["tasks"][0]["id"].clone();
    assert_eq!((&line["plugin"], &line["task_id"]), (&json!("zoo"), &task), "{line}");
    assert!(line["late_ms"].is_u64(), "{line}");
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
}

#[tokio::test]
async fn three_stuck_runners_take_plugin_out_of_service() {
    let test_server = test_server().await;
    let node = test_server.node(&[fixtures::zoo(), fixtures::hello()]).set("CANCEL_GRACE", "100ms");
    let node = node.set("MAX_CONCURRENCY", "4").leasing().await;
    for number in 1..=3_usize {
        ignored(&test_server, &node, NEVER).await;
        node.line(|line| line["event"] == GIVEN_UP && line["strikes"] == number).await;
    }
    let line = node.says("plugin.out_of_service").await;
    let reason = "3 of its runners ignored their cancellation; fix the plugin and restart the node";
    assert_eq!((&line["plugin"], &line["reason"]), (&json!("zoo"), &json!(reason)), "{line}");

    let degraded = json!([format!("plugin zoo is out of service: {reason}")]);
    let (_, status) = node.page_until("/status.json", |page| page.1["degraded"] == degraded).await;
    assert_eq!(status["capabilities"], json!(["/examples/hello/v1"]), "{status:#}");
    let plugin = zoo(&status);
    assert_eq!(
        json!([plugin["state"], plugin["stuck_runners"], plugin["reason"]]),
        json!(["out-of-service", 3, reason])
    );
    assert_eq!(node.page("/ready").await, (200, json!({ "ready": true, "degraded": degraded })));
    // The node registers the remaining capabilities, and its other plugins continue.
    test_server.seen(&node, |seen| seen.iter().filter(|seen| seen.path.contains("/nodes/register")).count() >= 2).await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    test_server.dev_server.node_online("/examples/hello/v1").await;
    let still = test_server.dev_server.node_online("/fixtures/ok/v1").now_or_never();
    assert_eq!(still, None, "the node still offers a plugin that is out of service");
    node.stop().await;
}

#[tokio::test]
async fn waiting_lease_fails_when_its_plugin_goes_out() {
    let test_server = test_server().await;
    let file = "[[plugin]]\nfile = \"zoo\"\nmax_concurrency = 3\n";
    let node = test_server.node(&[fixtures::zoo()]).set("CANCEL_GRACE", "100ms").set("MAX_CONCURRENCY", "6");
    let node = node.plugins_file(file).leasing().await;
    let jobs: Vec<Uuid> = (0..3)
        .map(|_| test_server.task("/fixtures/ignores-cancel/v1").meta(json!({ "file": NEVER })).submit())
        .collect();
    for job in &jobs {
        test_server.started(&node, *job).await;
    }
    // Two of these get the slots of the first two stuck runners, and keep them.
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let waiting: Vec<Uuid> =
        (0..3).map(|_| test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": file })).submit()).collect();
    let wait = |count: usize| {
        move |page: &(u16, Value)| {
            let tasks = page.1["tasks"].as_object();
            tasks.is_some_and(|all| all.values().filter(|task| task["state"] == "waiting").count() == count)
        }
    };
    node.page_until("/status.json", wait(3)).await;
    for (number, job) in jobs.into_iter().enumerate() {
        // The third one puts the plugin out of service. The others must run before that.
        node.page_until("/status.json", wait(3 - number)).await;
        assert!(test_server.dev_server.cancel_job(job));
    }
    node.says("plugin.out_of_service").await;
    std::fs::write(&file, "").expect("the folder is writable");
    let mut refused = Vec::new();
    for job in waiting {
        let ended = test_server.ended(&node, job).await;
        if ended.status() == "failed" {
            refused.push(ended);
        }
    }
    assert_eq!(refused.len(), 1, "running tasks go on, the waiting one fails: {refused:#?}");
    let (reason, details) = refused[0].failed();
    assert_eq!((reason, &details["stage"]), ("node_setup_failed", &json!("start_session")), "{details}");
    let error = details["error"].as_str().expect("text");
    assert!(error.starts_with("plugin zoo is out of service: 3 of its runners ignored"), "{error}");
    let (_, body) = node.page_until("/ready", |page| page.0 == 503).await;
    assert_eq!(body["reason"], format!("{error}"));
}

// posemesh.md section 11.2
#[cfg(target_os = "linux")]
#[tokio::test]
async fn runner_polling_for_cancel_uses_little_cpu() {
    let test_server = test_server().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let job = test_server.task("/fixtures/asks-cancel/v1").submit();
    test_server.started(&node, job).await;
    let (began, before) = (Instant::now(), node.processor_time());
    // Two more heartbeats take at least a second.
    let beats = |seen: &[JournalEntry]| seen.iter().filter(|seen| seen.path.ends_with("/heartbeat")).count();
    let sent = beats(&test_server.dev_server.journal());
    test_server.seen(&node, |seen| beats(seen) >= sent + 2).await;
    let (took, used) = (began.elapsed(), node.processor_time() - before);
    assert!(used < took.mul_f64(0.4), "{used:?} of processor time in {took:?}");
    assert!(test_server.dev_server.cancel_job(job));
    let line = node.says_ended("none").await;
    assert_eq!(line["outcome"], "cancelled", "{line}");
}
