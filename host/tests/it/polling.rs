//! When the node polls for work, and how it handles unusable leases.

use std::time::{Duration, Instant};

use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::harness::{
    TestServer, fixtures,
    node::TestNode,
    rubbish::{Bad, Rubbish},
};

const POLL: &str = "GET /v1/tasks";
const COMPLETE: &str = "POST /v1/tasks/*/complete";
const FAIL: &str = "POST /v1/tasks/*/fail";
const PAUSE: Duration = Duration::from_millis(150);

/// A node with free slots and equal pauses between polls.
async fn node(rubbish: &Rubbish) -> TestNode {
    let node = rubbish.node(&[fixtures::hello(), fixtures::zoo()]).set("MAX_CONCURRENCY", "4");
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
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer("POST /v1/tasks/*/heartbeat", usize::MAX, beat);
    rubbish.answer(FAIL, usize::MAX, Bad::Json(json!({})));
    let shown = lease.clone();
    rubbish.answer(POLL, usize::MAX, Bad::make(move || fresh(&lease)));
    let node = node(&rubbish).await;
    rubbish.seen(POLL, 5).await;
    let (began, before) = (Instant::now(), rubbish.count(POLL));
    rubbish.seen(POLL, before + 5).await;
    assert!(began.elapsed() >= PAUSE * 4, "five polls in {:?} for {shown}", began.elapsed());
    rubbish.heal();
    lab.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

#[tokio::test]
async fn leases_that_are_good_for_nothing_are_not_taken_in_a_tight_loop() {
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
fn runnable(rubbish: &Rubbish, capability: &str) -> Value {
    let id = uuid::Uuid::new_v4();
    json!({
        "domain_id": id, "domain_server_url": format!("http://{}", rubbish.address()), "access_token": "domain-token",
        "task": { "id": "", "capability": capability, "inputs_cids": [id] },
    })
}

/// Runs 20 good tasks behind 12 that fail. With a pause after each failure, the good ones would start minutes later.
async fn failures_first(capability: &str, outcome: &str) {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer("GET /api/v1/domains/*/data?ids=", usize::MAX, Bad::Status(403, "not for you"));
    let input = lab.put("in", b"some input").await;
    let failing: Vec<_> = (0..12).map(|_| lab.task(capability).inputs(&[input]).submit()).collect();
    let good: Vec<_> = (0..20).map(|_| lab.task("/fixtures/ok/v1").submit()).collect();
    // The default pauses.
    let node = rubbish.node(&[fixtures::echo(), fixtures::zoo()]).set("MAX_CONCURRENCY", "1");
    let node = node.set("POLL_BACKOFF_MS_MIN", "1000").set("POLL_BACKOFF_MS_MAX", "30000").leasing().await;
    for job in good {
        lab.ended(&node, job).await.completed();
    }
    for job in failing {
        assert_eq!(lab.ended(&node, job).await.failed().1["outcome"], outcome);
    }
    node.stop().await;
}

#[tokio::test]
async fn failing_tasks_do_not_delay_the_good_ones() {
    failures_first("/fixtures/fail/v1", "failed").await;
}

#[tokio::test]
async fn tasks_without_their_data_do_not_delay_others() {
    failures_first("/examples/echo-bytes/v1", "storage").await;
}

#[tokio::test]
async fn tasks_that_complete_follow_each_other_without_a_pause() {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer("POST /v1/tasks/*/heartbeat", usize::MAX, Bad::Json(json!({})));
    rubbish.answer("POST /v1/tasks/*/complete", usize::MAX, Bad::Json(json!({})));
    rubbish.answer(FAIL, usize::MAX, Bad::Json(json!({})));
    // Every third task fails.
    let (good, bad) = (runnable(&rubbish, "/fixtures/ok/v1"), runnable(&rubbish, "/fixtures/fail/v1"));
    let count = std::sync::atomic::AtomicUsize::new(0);
    let next = move || match count.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 3 {
        0 => fresh(&bad),
        _ => fresh(&good),
    };
    rubbish.answer(POLL, 60, Bad::make(next));
    let node = rubbish.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1");
    let node = node.set("POLL_BACKOFF_MS_MIN", "1000").set("POLL_BACKOFF_MS_MAX", "1000").leasing().await;
    rubbish.seen(FAIL, 1).await;
    let began = Instant::now();
    rubbish.seen(FAIL, 20).await;
    assert!(began.elapsed() < Duration::from_secs(10), "sixty tasks in {:?}", began.elapsed());
    node.stop().await;
}

#[tokio::test]
async fn a_task_that_ends_is_followed_by_a_poll_whatever_pause_had_begun() {
    let lab = TestServer::start().await;
    let files = tempfile::tempdir().expect("a folder");
    let node = lab.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "2");
    let first = lab.task("/fixtures/wait-file/v1").meta(json!({ "file": files.path().join("go") })).submit();
    let node = node.set("POLL_BACKOFF_MS_MIN", "60000").set("POLL_BACKOFF_MS_MAX", "60000").leasing().await;
    lab.started(&node, first).await;
    // The other slot has polled without success and would poll again in a minute.
    lab.seen(&node, |seen| seen.iter().any(|seen| seen.path == "/v1/tasks" && seen.status == 204)).await;
    let second = lab.task("/fixtures/ok/v1").submit();
    std::fs::write(files.path().join("go"), "").expect("the folder is writable");
    lab.ended(&node, first).await.completed();
    lab.ended(&node, second).await.completed();
    node.stop().await;
}

/// Slots fill in few round trips to a distant control plane. A control plane without work gets one poll at a time.
#[tokio::test]
async fn while_leases_come_several_polls_are_under_way_and_else_one() {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer("POST /v1/tasks/*/heartbeat", usize::MAX, Bad::Json(json!({})));
    rubbish.answer("POST /v1/tasks/*/complete", usize::MAX, Bad::Json(json!({})));
    let files = tempfile::tempdir().expect("a folder");
    let release = files.path().join("release");
    let mut lease = runnable(&rubbish, "/fixtures/wait-file/v1");
    lease["task"]["meta"] = json!({ "file": release });
    rubbish.answer(POLL, 3, Bad::make(move || fresh(&lease)));
    let (empty, held) = Bad::gate();
    rubbish.answer(POLL, 3, held);
    let (end, held) = Bad::gate();
    rubbish.answer(POLL, usize::MAX, held);
    let node = rubbish.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "8");
    let node = node.set("POLL_BACKOFF_MS_MIN", "50").set("POLL_BACKOFF_MS_MAX", "50").leasing().await;
    rubbish.seen(POLL, 6).await; // three leases, and after them three polls at once
    empty.cancel();
    rubbish.seen(POLL, 7).await;
    std::fs::write(release, "").expect("the folder is writable");
    // After each end the next poll would follow at once, unless one is in progress.
    rubbish.seen("POST /v1/tasks/*/complete", 3).await;
    node.page_until("/status.json", |(_, status)| status["ended"]["completed"] == 3).await;
    assert_eq!(rubbish.count(POLL), 7);
    end.cancel();
    node.stop().await;
}

#[tokio::test]
async fn a_plane_that_asks_to_be_left_alone_is_not_polled_before() {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer(POLL, 1, Bad::Busy(429, 1));
    rubbish.answer(POLL, 1, Bad::Busy(503, 1));
    let node = node(&rubbish).await;
    rubbish.seen(POLL, 1).await;
    let began = Instant::now();
    rubbish.seen(POLL, 3).await;
    assert!(began.elapsed() >= Duration::from_millis(1900), "two seconds were asked for: {:?}", began.elapsed());
    node.stop().await;
}

// A date belongs to the clock of the service that sent it.
#[tokio::test]
async fn a_date_to_come_again_is_one_of_the_services_clock() {
    let asked_again = async |ahead: SignedDuration| {
        let lab = TestServer::start().await;
        let rubbish = Rubbish::before(&lab).await;
        rubbish.set_clock(ahead);
        rubbish.answer(POLL, 1, Bad::BusyUntil(503, 3));
        let node = node(&rubbish).await;
        rubbish.seen(POLL, 1).await;
        let began = Instant::now();
        rubbish.seen(POLL, 2).await;
        // Both dates have whole seconds.
        assert!(began.elapsed() >= Duration::from_millis(1900), "{ahead:?}: {:?}", began.elapsed());
        node.stop().await;
    };
    let minutes = SignedDuration::from_mins(20);
    tokio::join!(asked_again(minutes), asked_again(-minutes));
}

#[tokio::test]
async fn a_lease_that_cannot_be_read_is_failed_by_its_id_and_only_its_size_is_told() {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    let spoilt = |change: fn(&mut Value)| {
        Bad::edit(move |lease| {
            if lease["task"].is_object() {
                lease["access_token"] = json!("top-secret");
                change(lease);
            }
        })
    };
    let node = node(&rubbish).await;
    for (bad, why) in [
        (spoilt(|lease| lease["task"]["inputs_cids"] = json!("top-secret")), "expected a sequence"),
        (spoilt(|lease| lease["zeal"] = json!("top-secret".repeat(300_000))), "is larger than 2097152"),
        (Bad::Shortened(1), "not the expected JSON"),
    ] {
        rubbish.answer(POLL, usize::MAX, bad);
        let ended = lab.run(&node, "/examples/hello/v1", json!({})).await;
        let (reason, details) = ended.failed();
        assert_eq!((reason, &details["stage"]), ("node_setup_failed", &json!("start_session")));
        let error = details["error"].as_str().expect("text");
        assert!(error.contains("bytes") && error.contains(why), "{error}");
        let line = node.line(|line| line["error"] == error).await;
        assert_eq!(line["event"], "lease.unreadable");
        assert_eq!(line["task_id"], ended.task()["id"]);
        rubbish.heal();
        lab.run(&node, "/examples/hello/v1", json!({})).await.completed();
    }
    assert!(!node.log().contains("top-secret"), "{}", node.log());
}

#[tokio::test]
async fn a_lease_that_cannot_be_given_back_is_left_to_expire() {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer(POLL, 1, Bad::Json(fresh(&json!({ "task": { "id": "", "capability": "a b" } }))));
    rubbish.answer(FAIL, 1, Bad::Status(503, "later"));
    rubbish.answer(FAIL, 1, Bad::Status(404, "unknown task"));
    let node = node(&rubbish).await;
    rubbish.seen(FAIL, 2).await;
    lab.run(&node, "/examples/hello/v1", json!({})).await.completed();
    assert_eq!(node.said("lease.not_rejected").len(), 2, "{}", node.log());
    assert_eq!(rubbish.count(FAIL), 2, "a refusal for good ends it");
}

// The bounds are accepted in either order.
#[tokio::test]
async fn polls_keep_the_shorter_bound_whichever_comes_first() {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    let node = rubbish.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "200");
    let node = node.set("POLL_BACKOFF_MS_MAX", "100").leasing().await;
    rubbish.seen(POLL, 1).await;
    let began = Instant::now();
    rubbish.seen(POLL, 6).await;
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(400), "{took:?} for five pauses");
    node.stop().await;
}

#[tokio::test]
async fn pauses_of_nothing_are_no_licence_to_storm() {
    let lab = TestServer::start().await;
    let rubbish = Rubbish::before(&lab).await;
    let node = rubbish.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "0").set("POLL_BACKOFF_MS_MAX", "0");
    let node = node.leasing().await;
    let (began, before) = (Instant::now(), rubbish.count(POLL));
    rubbish.seen(POLL, before + 30).await;
    assert!(began.elapsed() >= Duration::from_millis(250), "thirty polls in {:?}", began.elapsed());
    node.stop().await;
}

/// A limit of zero is treated as one second, because with zero every call would fail.
#[tokio::test]
async fn a_poll_or_a_report_that_is_never_answered_ends_at_its_limit_and_is_repeated() {
    let ended_and_repeated = async |limit: &str| {
        let lab = TestServer::start().await;
        let rubbish = Rubbish::before(&lab).await;
        rubbish.answer(POLL, 1, Bad::Hang);
        rubbish.answer(COMPLETE, 1, Bad::Hang);
        let node = rubbish.node(&[fixtures::hello()]).set("REQUEST_TIMEOUT_SECS", limit).leasing().await;
        rubbish.seen(POLL, 1).await;
        let began = Instant::now();
        let line = node.says("poll.failed").await;
        assert!(line["error"].as_str().is_some_and(|error| error.contains("did not answer within ")), "{line}");
        lab.run(&node, "/examples/hello/v1", json!({})).await.completed();
        assert!(began.elapsed() >= Duration::from_millis(1800), "a second each: {:?}", began.elapsed());
        assert_eq!(node.said("poll.failed").len(), 1);
        node.stop().await;
    };
    tokio::join!(ended_and_repeated("1"), ended_and_repeated("0"));
}
