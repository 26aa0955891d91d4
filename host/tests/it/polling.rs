//! When the node polls for work, and how it handles unusable leases.

use std::time::{Duration, Instant};

use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::TestNode,
};

const POLL: &str = "GET /v1/tasks";
const COMPLETE: &str = "POST /v1/tasks/*/complete";
const FAIL: &str = "POST /v1/tasks/*/fail";
const PAUSE: Duration = Duration::from_millis(150);

/// A node with free slots and equal pauses between polls.
async fn node(proxy: &FaultProxy) -> TestNode {
    let node = proxy.node(&[fixtures::hello(), fixtures::zoo()]).set("MAX_CONCURRENCY", "4");
    let pause = PAUSE.as_millis().to_string();
    node.set("POLL_BACKOFF_MS_MIN", pause.as_str()).set("POLL_BACKOFF_MS_MAX", pause).leasing().await
}

/// Gives each lease its own task id.
fn fresh(lease: &Value) -> Value {
    let mut lease = lease.clone();
    lease["task"]["id"] = json!(uuid::Uuid::new_v4());
    lease
}

/// A control plane with an unusable lease for every poll is polled at the rate of the pauses.
async fn flapping(lease: Value, beat: Bad) {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("POST /v1/tasks/*/heartbeat", usize::MAX, beat);
    proxy.answer(FAIL, usize::MAX, Bad::Json(json!({})));
    let shown = lease.clone();
    proxy.answer(POLL, usize::MAX, Bad::make(move || fresh(&lease)));
    let node = node(&proxy).await;
    proxy.seen(POLL, 5).await;
    let (began, before) = (Instant::now(), proxy.count(POLL));
    proxy.seen(POLL, before + 5).await;
    assert!(began.elapsed() >= PAUSE * 4, "five polls in {:?} for {shown}", began.elapsed());
    proxy.heal();
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

#[tokio::test]
async fn polling_pauses_after_each_unusable_lease() {
    let good = json!({ "task": { "id": "", "capability": "/examples/hello/v1", "inputs_cids": [] } });
    let with = |field: &str, value: Value| {
        let mut lease = good.clone();
        lease[field] = value;
        lease
    };
    let nobody = json!({ "task": { "id": "", "capability": "/nobody/serves/v1" } });
    let unreadable = json!({ "task": { "id": "", "capability": 7 } });
    tokio::join!(
        flapping(with("cancel", json!(true)), Bad::Json(json!({}))),
        flapping(good.clone(), Bad::Json(json!({}))), // without coordinates: its set-up fails
        flapping(good.clone(), Bad::Status(404, "gone")),
        flapping(good.clone(), Bad::Json(json!({ "cancel": true }))),
        flapping(nobody, Bad::Json(json!({}))),
        flapping(unreadable, Bad::Json(json!({}))),
    );
}

/// A lease for `capability` in this service's form, with one input.
fn runnable(proxy: &FaultProxy, capability: &str) -> Value {
    let id = uuid::Uuid::new_v4();
    json!({
        "domain_id": id, "domain_server_url": format!("http://{}", proxy.address()), "access_token": "domain-token",
        "task": { "id": "", "capability": capability, "inputs_cids": [id] },
    })
}

/// Runs 20 good tasks behind 12 that fail. With a pause after each failure, the good ones would start minutes later.
async fn failures_first(capability: &str, outcome: &str) {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("GET /api/v1/domains/*/data?ids=", usize::MAX, Bad::Status(403, "not for you"));
    let input = test_server.put("in", b"some input").await;
    let failing: Vec<_> = (0..12).map(|_| test_server.task(capability).inputs(&[input]).submit()).collect();
    let good: Vec<_> = (0..20).map(|_| test_server.task("/fixtures/ok/v1").submit()).collect();
    // The default pauses.
    let node = proxy.node(&[fixtures::echo(), fixtures::zoo()]).set("MAX_CONCURRENCY", "1");
    let node = node.set("POLL_BACKOFF_MS_MIN", "1000").set("POLL_BACKOFF_MS_MAX", "30000").leasing().await;
    for job in good {
        test_server.ended(&node, job).await.completed();
    }
    for job in failing {
        assert_eq!(test_server.ended(&node, job).await.failed().1["outcome"], outcome);
    }
    node.stop().await;
}

#[tokio::test]
async fn failing_tasks_do_not_delay_other_tasks() {
    failures_first("/fixtures/fail/v1", "failed").await;
}

#[tokio::test]
async fn tasks_without_their_data_do_not_delay_others() {
    failures_first("/examples/echo-bytes/v1", "storage").await;
}

#[tokio::test]
async fn completed_tasks_cause_no_pause_between_polls() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("POST /v1/tasks/*/heartbeat", usize::MAX, Bad::Json(json!({})));
    proxy.answer("POST /v1/tasks/*/complete", usize::MAX, Bad::Json(json!({})));
    proxy.answer(FAIL, usize::MAX, Bad::Json(json!({})));
    // Every third task fails.
    let (good, bad) = (runnable(&proxy, "/fixtures/ok/v1"), runnable(&proxy, "/fixtures/fail/v1"));
    let count = std::sync::atomic::AtomicUsize::new(0);
    let next = move || match count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 3 {
        0 => fresh(&bad),
        _ => fresh(&good),
    };
    proxy.answer(POLL, 60, Bad::make(next));
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1");
    let node = node.set("POLL_BACKOFF_MS_MIN", "1000").set("POLL_BACKOFF_MS_MAX", "1000").leasing().await;
    proxy.seen(FAIL, 1).await;
    let began = Instant::now();
    proxy.seen(FAIL, 20).await;
    assert!(began.elapsed() < Duration::from_secs(10), "sixty tasks in {:?}", began.elapsed());
    node.stop().await;
}

#[tokio::test]
async fn task_end_interrupts_pause_between_polls() {
    let test_server = TestServer::start().await;
    let files = tempfile::tempdir().expect("a folder");
    let node = test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "2");
    let first = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": files.path().join("go") })).submit();
    let node = node.set("POLL_BACKOFF_MS_MIN", "60000").set("POLL_BACKOFF_MS_MAX", "60000").leasing().await;
    test_server.started(&node, first).await;
    // The other slot has polled without success and would poll again in a minute.
    test_server.seen(&node, |seen| seen.iter().any(|seen| seen.path == "/v1/tasks" && seen.status == 204)).await;
    let second = test_server.task("/fixtures/ok/v1").submit();
    std::fs::write(files.path().join("go"), "").expect("the folder is writable");
    test_server.ended(&node, first).await.completed();
    test_server.ended(&node, second).await.completed();
    node.stop().await;
}

/// Slots fill in few round trips to a distant control plane. A control plane without work gets one poll at a time.
#[tokio::test]
async fn polls_run_in_parallel_only_while_leases_arrive() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("POST /v1/tasks/*/heartbeat", usize::MAX, Bad::Json(json!({})));
    proxy.answer("POST /v1/tasks/*/complete", usize::MAX, Bad::Json(json!({})));
    let files = tempfile::tempdir().expect("a folder");
    let release = files.path().join("release");
    let mut lease = runnable(&proxy, "/fixtures/wait-file/v1");
    lease["task"]["meta"] = json!({ "file": release });
    proxy.answer(POLL, 3, Bad::make(move || fresh(&lease)));
    let (empty, held) = Bad::gate();
    proxy.answer(POLL, 3, held);
    let (end, held) = Bad::gate();
    proxy.answer(POLL, usize::MAX, held);
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "8");
    let node = node.set("POLL_BACKOFF_MS_MIN", "50").set("POLL_BACKOFF_MS_MAX", "50").leasing().await;
    proxy.seen(POLL, 6).await; // three leases, and after them three polls at once
    empty.cancel();
    proxy.seen(POLL, 7).await;
    std::fs::write(release, "").expect("the folder is writable");
    // After each end the next poll would follow at once, unless one is in progress.
    proxy.seen("POST /v1/tasks/*/complete", 3).await;
    node.page_until("/status.json", |(_, status)| status["ended"]["completed"] == 3).await;
    assert_eq!(proxy.count(POLL), 7);
    end.cancel();
    node.stop().await;
}

#[tokio::test]
async fn polling_waits_for_retry_after() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(POLL, 1, Bad::Busy(429, 1));
    proxy.answer(POLL, 1, Bad::Busy(503, 1));
    let node = node(&proxy).await;
    proxy.seen(POLL, 1).await;
    let began = Instant::now();
    proxy.seen(POLL, 3).await;
    assert!(began.elapsed() >= Duration::from_millis(1900), "two seconds were asked for: {:?}", began.elapsed());
    node.stop().await;
}

// A date belongs to the clock of the service that sent it.
#[tokio::test]
async fn retry_after_date_uses_service_clock() {
    let asked_again = async |ahead: SignedDuration| {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        proxy.set_clock(ahead);
        proxy.answer(POLL, 1, Bad::BusyUntil(503, 3));
        let node = node(&proxy).await;
        proxy.seen(POLL, 1).await;
        let began = Instant::now();
        proxy.seen(POLL, 2).await;
        // Both dates have whole seconds.
        assert!(began.elapsed() >= Duration::from_millis(1900), "{ahead:?}: {:?}", began.elapsed());
        node.stop().await;
    };
    let minutes = SignedDuration::from_mins(20);
    tokio::join!(asked_again(minutes), asked_again(-minutes));
}

#[tokio::test]
async fn unreadable_lease_fails_by_id_without_logging_content() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let spoilt = |change: fn(&mut Value)| {
        Bad::edit(move |lease| {
            if lease["task"].is_object() {
                lease["access_token"] = json!("top-secret");
                change(lease);
            }
        })
    };
    let node = node(&proxy).await;
    for (bad, why) in [
        (spoilt(|lease| lease["task"]["inputs_cids"] = json!("top-secret")), "expected a sequence"),
        (spoilt(|lease| lease["zeal"] = json!("top-secret".repeat(300_000))), "is larger than 2097152"),
        (Bad::Shortened(1), "not the expected JSON"),
    ] {
        proxy.answer(POLL, usize::MAX, bad);
        let ended = test_server.run(&node, "/examples/hello/v1", json!({})).await;
        let (reason, details) = ended.failed();
        assert_eq!((reason, &details["stage"]), ("node_setup_failed", &json!("start_session")));
        let error = details["error"].as_str().expect("text");
        assert!(error.contains("bytes") && error.contains(why), "{error}");
        let line = node.line(|line| line["error"] == error).await;
        assert_eq!(line["event"], "lease.unreadable");
        assert_eq!(line["task_id"], ended.task()["id"]);
        proxy.heal();
        test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    }
    assert!(!node.log().contains("top-secret"), "{}", node.log());
}

#[tokio::test]
async fn permanently_refused_lease_rejection_is_not_repeated() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(POLL, 1, Bad::Json(fresh(&json!({ "task": { "id": "", "capability": "a b" } }))));
    proxy.answer(FAIL, 1, Bad::Status(503, "later"));
    proxy.answer(FAIL, 1, Bad::Status(404, "unknown task"));
    let node = node(&proxy).await;
    proxy.seen(FAIL, 2).await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    assert_eq!(node.said("lease.not_rejected").len(), 2, "{}", node.log());
    assert_eq!(proxy.count(FAIL), 2, "a refusal for good ends it");
}

// The bounds are accepted in either order.
#[tokio::test]
async fn poll_pause_bounds_are_accepted_in_either_order() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "200");
    let node = node.set("POLL_BACKOFF_MS_MAX", "100").leasing().await;
    proxy.seen(POLL, 1).await;
    let began = Instant::now();
    proxy.seen(POLL, 6).await;
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(400), "{took:?} for five pauses");
    node.stop().await;
}

#[tokio::test]
async fn zero_pauses_cause_no_request_storm() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "0").set("POLL_BACKOFF_MS_MAX", "0");
    let node = node.leasing().await;
    let (began, before) = (Instant::now(), proxy.count(POLL));
    proxy.seen(POLL, before + 30).await;
    assert!(began.elapsed() >= Duration::from_millis(250), "thirty polls in {:?}", began.elapsed());
    node.stop().await;
}

/// A limit of zero is treated as one second, because with zero every call would fail.
#[tokio::test]
async fn unanswered_polls_and_reports_time_out_and_repeat() {
    let ended_and_repeated = async |limit: &str| {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        proxy.answer(POLL, 1, Bad::Hang);
        proxy.answer(COMPLETE, 1, Bad::Hang);
        let node = proxy.node(&[fixtures::hello()]).set("REQUEST_TIMEOUT_SECS", limit).leasing().await;
        proxy.seen(POLL, 1).await;
        let began = Instant::now();
        let line = node.says("poll.failed").await;
        assert!(line["error"].as_str().is_some_and(|error| error.contains("did not answer within ")), "{line}");
        test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
        assert!(began.elapsed() >= Duration::from_millis(1800), "a second each: {:?}", began.elapsed());
        assert_eq!(node.said("poll.failed").len(), 1);
        node.stop().await;
    };
    tokio::join!(ended_and_repeated("1"), ended_and_repeated("0"));
}
