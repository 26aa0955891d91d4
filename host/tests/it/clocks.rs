//! Times of services whose clock differs, or that send no `Date`.

use std::time::Duration;

use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
};

const LEASE: Duration = Duration::from_secs(2);
const BEAT: &str = "POST /v1/tasks/*/heartbeat";

/// A node whose services are `ahead` keeps a task longer than its first lease term, at the normal rate of requests.
async fn keeps_lease_with_clock(ahead: SignedDuration) {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.set_clock(ahead);
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let began = std::time::Instant::now();
    let job = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": file })).submit();
    let end = |task: &Value| task["lease_expires_at"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok());
    let first = end(&test_server.started(&node, job).await).expect("a lease has an end");
    let later = SignedDuration::from_millis(2500);
    test_server.task_until(&node, job, |task| end(task).is_some_and(|end| end > first + later)).await;
    std::fs::write(&file, "").expect("the folder is writable");
    assert_eq!(test_server.ended(&node, job).await.completed().task()["attempts"], 1, "{ahead:?}");
    let most = 6 * (began.elapsed().as_secs() as usize + 1);
    assert!((4..=most).contains(&proxy.count(BEAT)), "{} heartbeats, {ahead:?}", proxy.count(BEAT));
    assert_eq!(proxy.count("POST /internal/v1/auth/siwe/verify"), 1, "{ahead:?}");
    let lines = node.said("clock.differs");
    assert!((1..=2).contains(&lines.len()), "once per service: {lines:?}");
    node.stop().await;
}

#[tokio::test]
async fn clock_differences_of_20_minutes_lose_no_lease() {
    let minutes = SignedDuration::from_mins(20);
    tokio::join!(keeps_lease_with_clock(minutes), keeps_lease_with_clock(-minutes));
}

/// Each time of the service is in the past by the local clock, and no `Date` shows the difference.
#[tokio::test]
async fn undated_service_behind_keeps_its_short_lease() {
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(4)).await;
    let proxy = FaultProxy::before(&test_server).await;
    // Sign-in times must not be in the past: only the control plane is behind.
    let behind = |answer: &mut Value| {
        for end in ["/lease_expires_at", "/access_token_expires_at", "/task/lease_expires_at"] {
            if let Some(end) = answer.pointer_mut(end)
                && let Some(at) = end.as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok())
            {
                *end = json!((at - SignedDuration::from_secs(60)).to_string());
            }
        }
    };
    proxy.send_no_date();
    proxy.answer("GET /v1/tasks", usize::MAX, Bad::edit(behind));
    proxy.answer(BEAT, usize::MAX, Bad::edit(behind));
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let job = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": file })).submit();
    let end = |task: &Value| task["lease_expires_at"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok());
    let first = end(&test_server.started(&node, job).await).expect("a lease has an end");
    // The service has extended the lease beyond its first end.
    let later = SignedDuration::from_secs(4);
    test_server
        .task_until(&node, job, |task| task["attempts"] != 1 || end(task).is_some_and(|end| end > first + later))
        .await;
    std::fs::write(&file, "").expect("the folder is writable");
    assert_eq!(test_server.ended(&node, job).await.completed().task()["attempts"], 1);
    assert!(node.said("lease.lost").is_empty(), "{}", node.log());
    node.stop().await;
}

/// With this change to leases and heartbeats, the node loses no lease and sends few heartbeats.
async fn keeps_lease_with_change(change: impl Fn(&mut Value) + Clone + Send + Sync + 'static) {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("GET /v1/tasks", usize::MAX, {
        let change = change.clone();
        Bad::edit(move |answer| {
            if answer["task"].is_object() {
                change(answer)
            }
        })
    });
    proxy.answer(BEAT, usize::MAX, Bad::edit(change));
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let ended = test_server.run(&node, "/fixtures/progress-storm/v1", json!({ "count": 200 })).await;
    assert_eq!(ended.completed().task()["attempts"], 1);
    assert!(proxy.count(BEAT) < 20, "{} heartbeats", proxy.count(BEAT));
    assert!(node.said("lease.lost").is_empty(), "{}", node.log());
}

#[tokio::test]
async fn answers_without_expiry_lose_no_lease() {
    keeps_lease_with_change(|answer| {
        answer.as_object_mut().expect("an object").remove("lease_expires_at");
    })
    .await;
}

#[tokio::test]
async fn expiry_in_the_past_loses_no_lease() {
    keeps_lease_with_change(|answer| answer["lease_expires_at"] = json!("2020-01-01T00:00:00Z")).await;
}

#[tokio::test]
async fn lease_expiry_may_be_inside_the_task() {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let proxy = FaultProxy::before(&test_server).await;
    let inside = |answer: &mut Value| {
        let end = answer.as_object_mut().expect("an object").remove("lease_expires_at");
        if answer["task"].is_object() {
            answer["task"]["lease_expires_at"] = end.expect("the dev server sends it");
        }
    };
    proxy.answer(
        "GET /v1/tasks",
        usize::MAX,
        Bad::edit(move |answer| {
            if answer["task"].is_object() {
                inside(answer)
            }
        }),
    );
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let job = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": file })).submit();
    // Five heartbeats arrive in time only if the node knows the term of two seconds.
    proxy.answer(BEAT, usize::MAX, Bad::edit(inside));
    test_server.started(&node, job).await;
    proxy.seen(BEAT, 5).await;
    std::fs::write(&file, "").expect("the folder is writable");
    assert_eq!(test_server.ended(&node, job).await.completed().task()["attempts"], 1);
}
