//! Tests of sessions through the real adapter, against a DMS whose answers each test sends.

use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::{
    auth::TokenSource,
    leases::dms::{self, Dms},
    model::{AnnouncedData, BootInstant, Coordinates, DataLocation, Outcome, SetupStage, StatusBoard, Token},
    transport::{
        self,
        testing::{BAD_BODIES, Call, Service},
    },
};

const TASK: &str = "0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01";
const OTHER: &str = "11111111-2222-3333-4444-555555555555";
const HEARTBEAT: &str = "POST /tasks/0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01/heartbeat";
const MINUTE: Duration = Duration::from_secs(60);

fn in_future(left: Duration) -> Timestamp {
    Timestamp::now() + SignedDuration::try_from(left).expect("a short time")
}

fn lease(left: Duration) -> Lease {
    Lease {
        address: named(),
        job: None,
        capability: "/lab/echo/v1".parse().expect("a name"),
        expires_at: Some(BootInstant::now() + left),
        hard_deadline: None,
        time_limit: None,
        tokens_max: None,
        cancelled: false,
        data: AnnouncedData::at_server(Some("https://ds.lab.test"), Some(Uuid::nil())),
        token: Some(Token::new("dom-1")),
        token_expires_at: None,
        inputs: Vec::new(),
        outputs_prefix: None,
        traceparent: None,
        attempt: None,
        document: serde_json::value::RawValue::NULL.to_owned(),
        hold: None,
    }
}

fn at(server: &str, domain: Uuid) -> DataLocation {
    DataLocation::DomainServer(Coordinates { server: server.parse().expect("a URL"), domain })
}

fn server_of(location: &DataLocation) -> &str {
    match location {
        DataLocation::DomainServer(at) => at.server.as_str(),
        other => panic!("not on a domain server: {other:?}"),
    }
}

/// The address of the report if the plane changes nothing.
fn named() -> ReportAddress {
    address(TASK, None, Some(Uuid::nil()))
}

fn address(task: &str, job: Option<Uuid>, domain: Option<Uuid>) -> ReportAddress {
    dms::address(task.parse().expect("an id"), job, domain, "/lab/echo/v1")
}

async fn open(lease: Lease) -> (Service, Session) {
    let plane = Service::start().await;
    let config = dms::Config { request_timeout: Duration::from_secs(20), ..dms::Config::new(plane.url.clone()) };
    let client = transport::Client::new(transport::Config::default());
    let source: Arc<dyn LeaseSource> =
        Arc::new(Dms::with_tokens(config, client, "node".into(), TokenSource::holding("node")));
    let config = Config { coalesce: Duration::from_millis(50), ..Config::default() };
    let events = NodeEvents::new(StatusBoard::new(1, Vec::new()));
    let session = Sessions::new(config, Handle::current(), events).open(&source, lease);
    (plane, session)
}

/// A session whose set-up heartbeat has been answered with `answer`.
async fn set_up(lease: Lease, answer: Value) -> (Service, Session) {
    let (mut plane, session) = open(lease).await;
    plane.expect(HEARTBEAT).await.ok(answer);
    session.held_lease().setup().await;
    (plane, session)
}

/// Closes the session and drops it.
async fn ended(session: Session) -> Result<ReportAddress, NoReport> {
    Ok(session.close().await?.address())
}

/// Closes the session while `answer` acts as the plane.
async fn close(session: Session, answer: impl AsyncFnOnce()) -> Result<ReportAddress, NoReport> {
    tokio::join!(ended(session), answer()).0
}

#[tokio::test]
async fn task_without_events_sends_one_heartbeat() {
    let (mut plane, session) = open(lease(MINUTE)).await;
    let held_lease = session.held_lease();
    let call = plane.expect(HEARTBEAT).await;
    assert_eq!(call.json(), json!({ "progress": {}, "events": [] }));
    assert_eq!(call.bearer(), "node");
    call.ok(json!({}));
    let coordinates = at("https://ds.lab.test", Uuid::nil());
    assert_eq!(held_lease.setup().await, Setup::Ready(Ok(coordinates)));
    assert_eq!(session.no_report(&Outcome::Completed), None);
    assert_eq!(ended(session).await, Ok(named()));
    assert!(plane.waiting().is_none());
}

#[tokio::test]
async fn setup_heartbeat_includes_early_progress() {
    let (mut plane, session) = open(lease(MINUTE)).await;
    session.held_lease().progress.progress(json!({ "early": 1 })).expect("space in the queue");
    let call = plane.expect(HEARTBEAT).await;
    assert_eq!(call.json()["progress"], json!({ "early": 1 }));
    call.ok(json!({}));
    session.held_lease().setup().await;
    assert_eq!(ended(session).await, Ok(named()));
    assert!(plane.waiting().is_none(), "nothing is sent twice");
}

#[tokio::test]
async fn coordinates_combine_lease_and_setup_heartbeat() {
    let check = async |server: Option<&str>, domain: Option<Uuid>, answer: Value, expected: Result<&str, &str>| {
        let lease = Lease { data: AnnouncedData::at_server(server, domain), ..lease(MINUTE) };
        let (_plane, session) = set_up(lease, answer).await;
        let Setup::Ready(found) = session.held_lease().setup().await else { panic!("answered") };
        assert_eq!(found.as_ref().map(server_of).map_err(String::as_str), expected);
    };
    let id = Some(Uuid::nil());
    check(None, None, json!({ "domain_id": OTHER, "domain_server_url": "https://late" }), Ok("https://late/")).await;
    check(Some("https://a"), id, json!({ "domain_server_url": "https://b" }), Ok("https://b/")).await;
    check(None, id, json!({}), Err("lease missing domain_server_url")).await;
    check(Some("https://a"), None, json!({}), Err("lease missing domain_id")).await;
    let odd = Err("domain_server_url \"a/b\" is not an absolute http(s) URL");
    check(Some("a/b"), id, json!({}), odd).await;
}

#[tokio::test]
async fn report_uses_job_and_domain_from_setup_heartbeat() {
    let lease = Lease { data: AnnouncedData::at_server(Some("https://ds.lab.test"), None), ..lease(MINUTE) };
    let (_plane, session) = set_up(lease, json!({ "domain_id": OTHER, "job_id": OTHER })).await;
    let other = OTHER.parse().ok();
    assert_eq!(ended(session).await, Ok(address(TASK, other, other)));
}

#[tokio::test]
async fn failing_heartbeats_do_not_lose_the_lease() {
    let (mut plane, session) = open(lease(MINUTE)).await;
    plane.expect(HEARTBEAT).await.answer(500, "sorry");
    plane.expect(HEARTBEAT).await.bad(200, "html");
    drop(plane.expect(HEARTBEAT).await); // the connection breaks
    plane.expect(HEARTBEAT).await.ok(json!({}));
    assert!(matches!(session.held_lease().setup().await, Setup::Ready(Ok(_))));
    assert_eq!(session.held_lease().cancel.reason(), None);
}

#[tokio::test]
async fn unusable_answers_are_misses() {
    for kind in BAD_BODIES {
        let (mut plane, session) = open(lease(MINUTE)).await;
        plane.expect(HEARTBEAT).await.bad(200, kind);
        plane.expect(HEARTBEAT).await.ok(json!({}));
        assert!(matches!(session.held_lease().setup().await, Setup::Ready(Ok(_))), "{kind}");
        assert_eq!(session.held_lease().cancel.reason(), None, "{kind}");
    }
}

#[tokio::test]
async fn refused_setup_gives_reason_and_allows_report() {
    let (mut plane, session) = open(lease(MINUTE)).await;
    plane.expect(HEARTBEAT).await.answer(403, "not you");
    let Setup::Refused(text) = session.held_lease().setup().await else { panic!("refused") };
    assert_eq!(text, "control plane answered 403: not you");
    assert_eq!(session.no_report(&Outcome::Setup { stage: SetupStage::InitialHeartbeat, message: text }), None);
    assert_eq!(ended(session).await, Ok(named()));
}

#[tokio::test]
async fn lease_held_by_another_node_is_lost() {
    for status in [404, 409, 410] {
        let (mut plane, session) = open(lease(MINUTE)).await;
        let held_lease = session.held_lease();
        plane.expect(HEARTBEAT).await.answer(status, "");
        assert_eq!(held_lease.cancel.cancelled().await, CancelReason::LeaseLost);
        assert!(matches!(held_lease.setup().await, Setup::Refused(_)), "nobody waits for a set-up that never comes");
        assert_eq!(session.no_report(&Outcome::Completed), Some(CancelReason::LeaseLost));
        let refusal = format!("lease of task {TASK} is gone ({status})");
        assert_eq!(ended(session).await, Err(NoReport::Refused(refusal)));
        assert!(plane.waiting().is_none(), "nothing is sent for a lease of somebody else");
    }
}

#[tokio::test]
async fn cancel_counts_in_every_answer() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({ "cancel": true })).await;
    let held_lease = session.held_lease();
    assert_eq!(held_lease.cancel.cancelled().await, CancelReason::Plane);
    assert_eq!(held_lease.setup().await, Setup::Refused("the task was cancelled".into()), "nothing is fetched for it");
    assert_eq!(session.no_report(&Outcome::Completed), Some(CancelReason::Plane));
    assert_eq!(ended(session).await, Err(NoReport::Over(CancelReason::Plane)));
    assert!(plane.waiting().is_none());

    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    session.held_lease().progress.progress(json!(1)).expect("space in the queue");
    plane.expect(HEARTBEAT).await.ok(json!({ "cancel": true }));
    assert_eq!(session.held_lease().cancel.cancelled().await, CancelReason::Plane);
    session.held_lease().progress.progress(json!(2)).expect("space in the queue");
    assert_eq!(session.no_report(&Outcome::Completed), Some(CancelReason::Plane));
    assert_eq!(ended(session).await, Err(NoReport::Over(CancelReason::Plane)));
    assert!(plane.waiting().is_none());
}

#[tokio::test]
async fn lease_received_cancelled_sends_no_request() {
    let (mut plane, session) = open(Lease { cancelled: true, ..lease(MINUTE) }).await;
    assert_eq!(session.held_lease().cancel.cancelled().await, CancelReason::Plane);
    assert_eq!(session.held_lease().setup().await, Setup::Refused("the task was cancelled".into()));
    assert_eq!(session.no_report(&Outcome::Completed), Some(CancelReason::Plane));
    assert_eq!(ended(session).await, Err(NoReport::Over(CancelReason::Plane)));
    assert!(plane.waiting().is_none());
}

#[tokio::test]
async fn changed_domain_address_is_applied_while_task_runs() {
    let at = |server: &str, domain: Uuid| Setup::Ready(Ok(at(server, domain)));
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    let (held_lease, other) = (session.held_lease(), OTHER.parse().expect("an id"));
    assert_eq!(held_lease.setup_now(), at("https://ds.lab.test", Uuid::nil()));
    for (answer, expected) in [
        (json!({ "domain_server_url": "https://moved" }), at("https://moved", Uuid::nil())),
        (json!({ "domain_server_url": "no URL" }), at("https://moved", Uuid::nil())),
        (
            json!({ "task": { "id": TASK, "capability": "/lab/echo/v1", "meta": { "domain_server_url": "https://meta" } } }),
            at("https://meta", Uuid::nil()),
        ),
        (json!({ "domain_id": OTHER }), at("https://meta", other)),
    ] {
        let old = held_lease.token();
        held_lease.progress.event(json!("go on")).await.expect("space in the queue");
        let mut answer = answer;
        answer["access_token"] = Uuid::new_v4().to_string().into();
        plane.expect(HEARTBEAT).await.ok(answer);
        held_lease.newer_token(old.as_ref(), MINUTE).await;
        assert_eq!(held_lease.setup_now(), expected);
    }
    assert_eq!(ended(session).await, Ok(address(TASK, None, Some(other))));
}

#[tokio::test]
async fn newer_token_is_visible_immediately() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({ "access_token": null })).await;
    let held_lease = session.held_lease();
    let old = held_lease.token();
    assert_eq!(old, Some(Token::new("dom-1")));
    held_lease.progress.event(json!("go on")).await.expect("space in the queue");
    plane.expect(HEARTBEAT).await.ok(json!({ "access_token": "dom-2" }));
    assert_eq!(held_lease.newer_token(old.as_ref(), Duration::from_secs(20)).await, Some(Token::new("dom-2")));
}

#[tokio::test]
async fn progress_is_gathered_and_events_arrive_once() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    let held_lease = session.held_lease();
    let mailbox = &held_lease.progress;
    for n in 0..50 {
        mailbox.progress(json!({ "n": n })).expect("space in the queue");
        mailbox.event(json!(n)).await.expect("space in the queue");
    }
    let call = plane.expect(HEARTBEAT).await;
    assert_eq!(call.json(), json!({ "progress": { "n": 49 }, "events": (0..50).collect::<Vec<_>>() }));
    mailbox.event(json!("later")).await.expect("space in the queue");
    let first = call.at;
    call.ok(json!({}));
    let call = plane.expect(HEARTBEAT).await;
    assert_eq!(call.json(), json!({ "progress": { "n": 49 }, "events": ["later"] }));
    assert!(call.at - first >= Duration::from_millis(50), "later events are gathered too");
    call.ok(json!({}));
}

#[tokio::test]
async fn unacknowledged_events_come_again() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    session.held_lease().progress.event(json!("kept")).await.expect("space in the queue");
    plane.expect(HEARTBEAT).await.answer(502, "");
    let call = plane.expect(HEARTBEAT).await;
    assert_eq!(call.json()["events"], json!(["kept"]));
    call.ok(json!({}));
}

#[tokio::test]
async fn last_words_go_before_the_report() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    let held_lease = session.held_lease();
    let mailbox = &held_lease.progress;
    mailbox.progress(json!({ "done": true })).expect("space in the queue");
    mailbox.event(json!("end")).await.expect("space in the queue");
    let closed = close(session, async || {
        plane.expect(HEARTBEAT).await.answer(500, "once more, please");
        let call = plane.expect(HEARTBEAT).await;
        assert_eq!(call.json(), json!({ "progress": { "done": true }, "events": ["end"] }));
        call.ok(json!({}));
    });
    assert_eq!(closed.await, Ok(named()));
    assert!(plane.waiting().is_none());
}

#[tokio::test]
async fn event_backlog_is_sent_without_waiting_for_timer() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    for n in 0..6 {
        session.held_lease().progress.event(json!([n, "x".repeat(20_000)])).await.expect("space in the queue");
    }
    for sent in [[0, 1, 2], [3, 4, 5]] {
        let call = plane.expect(HEARTBEAT).await;
        let body = call.json();
        let numbers = body["events"].as_array().expect("a list").iter().map(|event| event[0].as_u64());
        assert_eq!(numbers.collect::<Vec<_>>(), sent.map(Some));
        call.ok(json!({}));
    }
}

#[tokio::test]
async fn final_flush_sends_all_events_before_report() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    let held_lease = session.held_lease();
    let mailbox = &held_lease.progress;
    let text = "x".repeat(20_000);
    for n in 0..8 {
        mailbox.event(json!([n, text])).await.expect("space in the queue");
    }
    let closed = close(session, async || {
        let (mut seen, mut last) = (Vec::new(), None::<Instant>);
        while seen.len() < 8 {
            let call = plane.expect(HEARTBEAT).await;
            assert!(call.body.len() < 70_000 && last.is_none_or(|last| call.at - last >= Duration::from_millis(95)));
            last = Some(call.at);
            let body = call.json();
            seen.extend(body["events"].as_array().expect("a list").iter().map(|event| event[0].as_u64()));
            call.ok(json!({}));
        }
        assert_eq!(seen, (0..8).map(Some).collect::<Vec<_>>());
    });
    assert_eq!(closed.await, Ok(named()));
}

#[tokio::test]
async fn failed_final_flush_does_not_prevent_the_report() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    session.held_lease().progress.event(json!("end")).await.expect("space in the queue");
    let closed = close(session, async || {
        for _ in 0..3 {
            plane.expect(HEARTBEAT).await.answer(500, "");
        }
    });
    assert_eq!(closed.await, Ok(named()));
    assert!(plane.waiting().is_none());
}

#[tokio::test]
async fn unanswered_final_flush_takes_half_the_lease() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    // From here on the lease is short, because the control plane shortened it.
    session.held_lease().progress.progress(json!(1)).expect("space in the queue");
    let short = in_future(Duration::from_secs(3)).to_string();
    plane.expect(HEARTBEAT).await.ok(json!({ "lease_expires_at": short, "access_token": "short" }));
    let old = Token::new("dom-1");
    session.held_lease().newer_token(Some(&old), MINUTE).await;
    session.held_lease().progress.event(json!("end")).await.expect("space in the queue");
    let began = Instant::now();
    let mut held = Vec::new();
    let closing = ended(session);
    tokio::pin!(closing);
    let closed = loop {
        tokio::select! {
            closed = &mut closing => break closed,
            call = plane.expect(HEARTBEAT) => held.push(call),
        }
    };
    assert_eq!(closed, Ok(named()));
    assert!(!held.is_empty() && began.elapsed() < Duration::from_millis(2500), "{:?}", began.elapsed());
}

#[tokio::test]
async fn cancel_in_final_heartbeat_suppresses_report() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    session.held_lease().progress.event(json!("end")).await.expect("space in the queue");
    let closed = close(session, async || plane.expect(HEARTBEAT).await.ok(json!({ "cancel": true }))).await;
    assert_eq!(closed, Err(NoReport::Over(CancelReason::Plane)));
    assert!(plane.waiting().is_none());
}

#[tokio::test]
async fn close_waits_for_running_heartbeat() {
    let (mut plane, session) = open(lease(MINUTE)).await;
    let call = plane.expect(HEARTBEAT).await;
    let closed = close(session, async || call.ok(json!({ "task_id": OTHER }))).await;
    assert_eq!(closed, Ok(address(OTHER, None, Some(Uuid::nil()))));
}

#[tokio::test]
async fn cancelled_or_lost_task_is_not_reported() {
    for (outcome, reason) in [(Outcome::Cancelled, CancelReason::Plane), (Outcome::LeaseLost, CancelReason::LeaseLost)]
    {
        let (_plane, session) = set_up(lease(MINUTE), json!({})).await;
        assert_eq!(session.no_report(&outcome), Some(reason));
    }
}

#[tokio::test]
async fn heartbeats_and_report_follow_a_renamed_task() {
    let (mut plane, session) = set_up(lease(MINUTE), json!({})).await;
    session.held_lease().progress.progress(json!(1)).expect("space in the queue");
    let task = json!({ "id": OTHER, "capability": "/lab/echo/v1" });
    plane.expect(HEARTBEAT).await.ok(json!({ "task": task, "access_token": "seen" }));
    session.held_lease().newer_token(Some(&Token::new("dom-1")), MINUTE).await;
    session.held_lease().progress.progress(json!(2)).expect("space in the queue");
    plane.expect(&HEARTBEAT.replace(TASK, OTHER)).await.ok(json!({}));
    let closed = close(session, async || {
        if let Some(call) = plane.waiting() {
            call.ok(json!({}));
        }
    });
    assert_eq!(closed.await, Ok(address(OTHER, None, Some(Uuid::nil()))));
}

#[tokio::test]
async fn unextended_lease_is_lost_only_at_expiry() {
    let opened = Instant::now();
    let (mut plane, session) = open(lease(Duration::from_millis(2500))).await;
    let held_lease = session.held_lease();
    let mut held: Vec<Call> = vec![plane.expect(HEARTBEAT).await];
    assert_eq!(held_lease.cancel.cancelled().await, CancelReason::LeaseLost);
    assert!(opened.elapsed() >= Duration::from_millis(2490), "{:?}", opened.elapsed());
    while let Some(call) = plane.waiting() {
        held.push(call);
    }
    assert!((2..=4).contains(&held.len()), "a heartbeat nobody answers leaves room for another: {}", held.len());
    assert_eq!(session.no_report(&Outcome::Completed), Some(CancelReason::LeaseLost));
}

#[tokio::test]
async fn heartbeat_timer_extends_a_short_lease() {
    let short = Duration::from_secs(2);
    let (mut plane, session) = open(lease(short)).await;
    let opened = Instant::now();
    let mut calls: Vec<Instant> = Vec::new();
    while opened.elapsed() < short + short / 4 {
        let call = plane.expect(HEARTBEAT).await;
        calls.push(call.at);
        call.ok(json!({ "lease_expires_at": in_future(short).to_string() }));
    }
    assert_eq!(session.held_lease().cancel.reason(), None);
    assert!(calls.windows(2).all(|pair| pair[1] - pair[0] >= Duration::from_millis(200)), "no flood");
}

#[tokio::test]
async fn wrong_clock_does_not_flood_or_lose_lease() {
    let past = (Timestamp::now() - SignedDuration::from_secs(3600)).to_string();
    let lease = Lease { expires_at: None, ..lease(MINUTE) };
    let (mut plane, session) = set_up(lease, json!({ "lease_expires_at": past })).await;
    session.held_lease().progress.progress(json!(1)).expect("space in the queue");
    plane.expect(HEARTBEAT).await.ok(json!({ "lease_expires_at": past }));
    assert_eq!(ended(session).await, Ok(named()));
    assert!(plane.waiting().is_none());
}

// The plane must not lease the task again while its report is being sent.
#[tokio::test]
async fn closed_session_keeps_lease_until_dropped() {
    let short = Duration::from_secs(2);
    let (mut plane, session) = set_up(lease(short), json!({})).await;
    let session = session.close().await.expect("a report is allowed");
    assert_eq!(session.address(), named());
    let closed = Instant::now();
    while closed.elapsed() < short + short / 4 {
        plane.expect(HEARTBEAT).await.ok(json!({ "lease_expires_at": in_future(short).to_string() }));
    }
    drop(session);
    assert!(plane.waiting().is_none());

    // After the control plane has refused a heartbeat, no more requests are sent to it.
    for answer in [json!({ "cancel": true }), Value::Null] {
        let (mut plane, session) = set_up(lease(short), json!({})).await;
        let _session = session.close().await.expect("a report is allowed");
        let call = plane.expect(HEARTBEAT).await;
        if answer.is_null() {
            call.answer(410, "")
        } else {
            call.ok(answer)
        }
        tokio::time::sleep(short).await; // no event to wait for: nothing must happen
        assert!(plane.waiting().is_none());
    }
}

#[tokio::test]
async fn dropped_session_stops_its_driver() {
    let (mut plane, session) = open(lease(MINUTE)).await;
    let held = plane.expect(HEARTBEAT).await;
    let held_lease = session.held_lease();
    drop(session);
    assert!(matches!(held_lease.setup().await, Setup::Refused(_)));
    held.ok(json!({}));
    assert!(plane.waiting().is_none());
}

#[tokio::test]
async fn drained_task_is_reported() {
    let (_plane, session) = set_up(lease(MINUTE), json!({})).await;
    session.held_lease().cancel.cancel(CancelReason::Drained);
    assert_eq!(session.no_report(&Outcome::Drained), None);
    assert_eq!(ended(session).await, Ok(named()));
}

// A task that ended within its lease may be reported after it. The plane decides whether the report counts.
#[tokio::test]
async fn lease_expiry_during_final_flush_keeps_report() {
    let (mut plane, session) = set_up(lease(Duration::from_millis(1200)), json!({})).await;
    session.held_lease().progress.event(json!("end")).await.expect("space in the queue");
    assert_eq!(session.no_report(&Outcome::Completed), None);
    let mut held = Vec::new();
    let closing = async {
        tokio::time::sleep(Duration::from_millis(1300)).await;
        ended(session).await
    };
    tokio::pin!(closing);
    let closed = loop {
        tokio::select! {
            closed = &mut closing => break closed,
            call = plane.expect(HEARTBEAT) => held.push(call),
        }
    };
    assert_eq!(closed, Ok(named()));
}
