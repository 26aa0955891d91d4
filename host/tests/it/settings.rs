//! Each setting has its effect. It is observed from outside, with a value far from its default.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::TestNode,
};

const NONCE: &str = "POST /internal/v1/auth/siwe/request";
const VERIFY: &str = "POST /internal/v1/auth/siwe/verify";

/// The arrival times of the heartbeats so far.
fn beats(test_server: &TestServer) -> Vec<Timestamp> {
    test_server
        .dev_server
        .journal()
        .iter()
        .filter(|seen| seen.path.ends_with("/heartbeat"))
        .map(|seen| seen.at)
        .collect()
}

/// Waits for `count` heartbeats. Returns the time from number `from` to the last.
async fn span(test_server: &TestServer, node: &TestNode, from: usize, count: usize) -> Duration {
    test_server.seen(node, |seen| seen.iter().filter(|seen| seen.path.ends_with("/heartbeat")).count() >= count).await;
    let all = beats(test_server);
    Duration::try_from(all[count - 1].duration_since(all[from])).expect("they are in order")
}

/// A task that is kept running and sends nothing after its start.
async fn held(test_server: &TestServer, node: &TestNode) -> (tempfile::TempDir, Uuid) {
    let files = tempfile::tempdir().expect("a folder");
    let job = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": files.path().join("go") })).submit();
    test_server.started(node, job).await;
    (files, job)
}

#[tokio::test]
async fn heartbeat_ratios_set_the_heartbeat_interval() {
    let timed = async |ratios: [&str; 2], lease: u64, count: usize| {
        let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(lease)).await;
        let node = test_server.node(&[fixtures::zoo()]).set("HEARTBEAT_MIN_RATIO", ratios[0]);
        let node = node.set("HEARTBEAT_MAX_RATIO", ratios[1]).leasing().await;
        let (_files, _job) = held(&test_server, &node).await;
        let from = beats(&test_server).len() - 1;
        span(&test_server, &node, from, from + 1 + count).await
    };
    let (often, seldom) = tokio::join!(timed(["0.01", "0.02"], 30, 3), timed(["0.9", "0.8"], 3, 1));
    // The usual third would be ten seconds, or one second.
    assert!(often >= Duration::from_millis(850) && often < Duration::from_secs(5), "{often:?}");
    assert!(seldom >= Duration::from_millis(2300), "{seldom:?}");
}

#[tokio::test]
async fn fast_progress_does_not_increase_heartbeats() {
    // The number of heartbeats, and the time from the first to the last.
    let counted = async |jitter: &str, reports: u64| {
        let test_server = TestServer::start().await;
        let node = test_server.node(&[fixtures::zoo()]).set("HEARTBEAT_JITTER_MS", jitter).leasing().await;
        let meta = json!({ "count": reports, "pause_ms": 5 });
        test_server.run(&node, "/fixtures/progress-storm/v1", meta).await.completed();
        let all = beats(&test_server);
        (all.len() as f64, all[all.len() - 1].duration_since(all[0]).as_secs_f64())
    };
    let (at_once, gathered) = tokio::join!(counted("0", 500), counted("1500", 900));
    // The final flush does not wait.
    let (count, span) = at_once;
    assert!(span / 0.4 < count && count <= span / 0.1 + 2.0, "{count} heartbeats in {span} s");
    let (count, span) = gathered;
    assert!(count >= 3.0 && count <= span / 1.5 + 2.0, "{count} heartbeats in {span} s");
}

#[tokio::test]
async fn sign_in_pauses_follow_their_settings() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(NONCE, 1, Bad::Status(503, "later"));
    proxy.answer(VERIFY, 1, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::hello()]).set("REGISTER_MAX_RETRY", "1").set("REGISTER_INTERVAL_SECS", "1");
    let node = node.set("TOKEN_REAUTH_JITTER_MS", "4000").leasing().await;
    let pause = |event: &str| node.said(event)[0]["retry_in_ms"].as_u64().expect("a pause");
    assert_eq!(pause("registration.failed"), 1000, "the interval, not the growing pause");
    let login = pause("login.failed");
    assert!((1000..=2000).contains(&login), "half of the jitter, less up to a half: {login}");
    node.stop().await;
}

#[tokio::test]
async fn noop_follows_its_settings_and_cancels() {
    const NOOP: &str = "/examples/noop/v1";
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(2)).await;
    // Unlisted libraries are not loaded here. `ENABLE_NOOP` lists noop.
    let listed = |plugins: &[std::path::PathBuf]| {
        test_server.node(plugins).plugins_file("[trust]\nunlisted = \"refuse\"\n[[plugin]]\nfile = \"hello\"\n")
    };
    let plugins = [fixtures::noop(), fixtures::hello()];
    let node = listed(&plugins).leasing().await;
    assert_eq!(node.status().await["capabilities"], json!(["/examples/hello/v1"]));
    node.stop().await;

    let node = listed(&plugins).set("ENABLE_NOOP", "true").set("NOOP_SLEEP_SECS", "0.7").leasing().await;
    let began = Instant::now();
    let ended = test_server.run(&node, NOOP, json!({})).await;
    assert!(ended.completed().artifacts().is_empty());
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(700) && took < Duration::from_millis(4500), "{took:?}");
    node.stop().await;

    let node = listed(&plugins).set("ENABLE_NOOP", "true").set("NOOP_SLEEP_SECS", "3600").leasing().await;
    let job = test_server.task(NOOP).submit();
    test_server.task_until(&node, job, |task: &Value| task["status"] == "running").await;
    assert!(test_server.dev_server.cancel_job(job));
    let line = node.says_ended("none").await;
    assert_eq!(line["outcome"], "cancelled", "{line}");
    node.stop().await;
}
