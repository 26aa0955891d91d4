//! When the node asks for work, and what it does with leases that are good for nothing.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{
    Lab, fixtures,
    node::TestNode,
    rubbish::{Bad, Rubbish},
};

const POLL: &str = "GET /v1/tasks";
const FAIL: &str = "POST /v1/tasks/*/fail";
const PAUSE: Duration = Duration::from_millis(150);

/// A node with slots to spare whose pauses between polls are all alike.
async fn node(rubbish: &Rubbish) -> TestNode {
    let node = rubbish.node(&[fixtures::hello(), fixtures::zoo()]).set("MAX_CONCURRENCY", "4");
    let pause = PAUSE.as_millis().to_string();
    node.set("POLL_BACKOFF_MS_MIN", pause.as_str()).set("POLL_BACKOFF_MS_MAX", pause).leasing().await
}

/// A task id of its own for each lease.
fn fresh(lease: &Value) -> Value {
    let mut lease = lease.clone();
    lease["task"]["id"] = json!(uuid::Uuid::new_v4());
    lease
}

/// A plane that has a lease for every poll, each good for nothing, is asked at the rate of the pauses.
async fn flapping(lease: Value, beat: Bad) {
    let lab = Lab::start().await;
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

// P-30
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

// P-34
#[tokio::test]
async fn a_lease_that_cannot_be_read_is_failed_by_its_id_and_only_its_size_is_told() {
    let lab = Lab::start().await;
    let rubbish = Rubbish::before(&lab).await;
    let spoilt = |lease: &mut Value| {
        if lease["task"].is_object() {
            lease["task"]["inputs_cids"] = json!("top-secret");
            lease["access_token"] = json!("top-secret");
        }
    };
    rubbish.answer(POLL, usize::MAX, Bad::edit(spoilt));
    let node = node(&rubbish).await;
    let ended = lab.run(&node, "/examples/hello/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert_eq!((reason, &details["stage"]), ("node_setup_failed", &json!("start_session")));
    let line = node.says("lease could not be read, its task is failed").await;
    assert_eq!((&line["task_id"], &line["error"]), (&ended.task()["id"], &details["error"]));
    let error = details["error"].as_str().expect("text");
    assert!(error.contains("bytes") && error.contains("expected a sequence"), "{error}");
    assert!(!node.log().contains("top-secret"), "{}", node.log());
    rubbish.heal();
    lab.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

#[tokio::test]
async fn a_lease_that_cannot_be_given_back_is_left_to_expire() {
    let lab = Lab::start().await;
    let rubbish = Rubbish::before(&lab).await;
    rubbish.answer(POLL, 1, Bad::Json(fresh(&json!({ "task": { "id": "", "capability": "a b" } }))));
    rubbish.answer(FAIL, 1, Bad::Status(503, "later"));
    rubbish.answer(FAIL, 1, Bad::Status(404, "unknown task"));
    let node = node(&rubbish).await;
    rubbish.seen(FAIL, 2).await;
    lab.run(&node, "/examples/hello/v1", json!({})).await.completed();
    assert_eq!(node.said("lease could not be given back").len(), 2, "{}", node.log());
    assert_eq!(rubbish.count(FAIL), 2, "a refusal for good ends it");
}

// S0-31: swapped bounds are bounds.
#[tokio::test]
async fn s0_31_polls_keep_the_shorter_bound_whichever_comes_first() {
    let lab = Lab::start().await;
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
    let lab = Lab::start().await;
    let rubbish = Rubbish::before(&lab).await;
    let node = rubbish.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "0").set("POLL_BACKOFF_MS_MAX", "0");
    let node = node.leasing().await;
    let (began, before) = (Instant::now(), rubbish.count(POLL));
    rubbish.seen(POLL, before + 30).await;
    assert!(began.elapsed() >= Duration::from_millis(250), "thirty polls in {:?}", began.elapsed());
    node.stop().await;
}
