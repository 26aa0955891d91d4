//! The adapter against a DMS that each test plays by hand.

use serde_json::json;

use super::*;
use crate::{
    auth::NodeKey,
    leases::Advice,
    model::Outcome,
    transport::testing::{BAD_BODIES, Call, Service, assert_clean},
};

const TASK: &str = "0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01";
const SOON: Duration = Duration::from_secs(20);

/// The minimal lease of posemesh.md section 4.4.
pub(in crate::leases) fn sample_envelope() -> Value {
    json!({"access_token":"dom-1","lease_expires_at":"2025-06-01T08:05:00Z","domain_id":"3f0c1c1e-8f57-4d0a-9a83-5f0f3f1b7c11",
        "domain_server_url":"https://ds.lab.test","task":{"id":TASK,"capability":"/lab/echo/v1","inputs_cids":["a1"]}})
}

pub(in crate::leases) fn sample_lease() -> Lease {
    let envelope: wire::LeaseEnvelope = serde_json::from_value(sample_envelope()).expect("a lease");
    let capability = "/lab/echo/v1".parse().expect("a name");
    let address = address(envelope.task.id, None, envelope.domain_id, "/lab/echo/v1");
    Lease { data: AnnouncedData::at_server(None, envelope.domain_id), ..Lease::bare(address, capability) }
}

fn to() -> ReportAddress {
    sample_lease().address
}

fn dms(plane: &Service, base: &str) -> Dms {
    let config = Config { request_timeout: SOON, ..Config::new(plane.url.join(base).expect("a URL")) };
    Dms::with_tokens(
        config,
        Client::new(transport::Config::default()),
        "node".into(),
        TokenSource::holding("top-secret-node"),
    )
}

/// Calls `take` and lets `answer` play the plane.
fn server_of(data: &AnnouncedData) -> Option<&str> {
    match data {
        AnnouncedData::DomainServer { server, .. } => server.as_deref(),
        AnnouncedData::Known(location) => panic!("not announced by this wire: {location:?}"),
    }
}

fn until(term: Term) -> Option<BootInstant> {
    match term {
        Term::Until(at) => Some(at),
        Term::SameTerm | Term::Unchanged => None,
    }
}

/// An answer that names nothing extends the lease by its last term.
fn unchanged() -> Renewal {
    Renewal { term: Term::SameTerm, data: Some(AnnouncedData::at_server(None, None)), ..Renewal::default() }
}

async fn take(answer: impl FnOnce(Call)) -> Result<Option<Lease>, LeaseError> {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let (taken, ()) = tokio::join!(dms.poll(), async { answer(plane.expect("GET /v1/tasks").await) });
    taken
}

async fn keep(answer: impl FnOnce(Call)) -> Result<Renewal, LeaseError> {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let (to, beat) = (to(), Pending { progress: json!({ "at": 1 }), events: vec![json!("e")], version: 1 });
    let (kept, ()) = tokio::join!(dms.heartbeat(&to, &beat, BootInstant::now() + SOON), async {
        let call = plane.expect(&format!("POST /v1/tasks/{TASK}/heartbeat")).await;
        assert_eq!(call.json(), json!({ "progress": { "at": 1 }, "events": ["e"] }));
        assert_eq!(call.headers["content-type"], "application/json");
        answer(call);
    });
    kept
}

async fn settle(outcome: Outcome, answer: impl FnOnce(Call)) -> Result<(), LeaseError> {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let task_result = TaskResult::bare(outcome);
    let lease = sample_lease();
    let (settled, ()) = tokio::join!(dms.report(&lease.address, &task_result), async { answer(plane.next().await) });
    settled
}

#[tokio::test]
async fn slashes_behind_the_base_do_not_matter() {
    for (base, path) in [("v1", "/v1/tasks"), ("v1/", "/v1/tasks"), ("v1//", "/v1/tasks"), ("", "/tasks")] {
        let mut plane = Service::start().await;
        let dms = dms(&plane, base);
        let (taken, ()) = tokio::join!(dms.poll(), async {
            let call = plane.expect(&format!("GET {path}")).await;
            assert_eq!(call.bearer(), "top-secret-node");
            call.answer(204, "");
        });
        assert!(matches!(taken, Ok(None)));
    }
}

#[tokio::test]
async fn a_lease_arrives_whole_and_its_document_without_credentials() {
    let mut envelope = sample_envelope();
    envelope["p2p_access_token"] = "top-secret-p2p".into();
    envelope["Other_Token"] = "top-secret-other".into();
    envelope["access_token_expires_at"] = "2025-06-01 08:05:00.25+02:00".into();
    envelope["task"]["meta"] = json!({ "access_token": "the author's own", "voxel": 0.1 });
    envelope["task"]["id"] = TASK.to_uppercase().into();
    envelope["task"]["outputs_prefix"] = "out".into();
    envelope["future"] = json!({ "kept": true });
    let sent = envelope.clone();
    let lease = take(|call| call.ok(sent)).await.expect("usable").expect("a lease");
    assert_eq!(lease.address, to());
    assert_eq!(lease.capability.as_str(), "/lab/echo/v1");
    assert_eq!(lease.token, Some(Token::new("dom-1")));
    assert_eq!(server_of(&lease.data), Some("https://ds.lab.test"));
    assert_eq!(lease.expires_at, None, "it had passed long before the lease was asked for");
    assert_eq!((lease.inputs, lease.outputs_prefix.as_deref()), (vec!["a1".to_owned()], Some("out")));
    for key in ["access_token", "p2p_access_token", "Other_Token"] {
        envelope.as_object_mut().expect("an object").remove(key);
    }
    let document: Value = serde_json::from_str(lease.document.get()).expect("JSON");
    assert_eq!(document, envelope);
}

// Whatever the plane's clock says, a minute is a minute.
#[tokio::test]
async fn times_are_those_of_the_planes_clock() {
    for off in [0, 1200, -1200] {
        let now = Timestamp::now() + jiff::SignedDuration::from_secs(off);
        let at = |seconds| (now + jiff::SignedDuration::from_secs(seconds)).to_string();
        let minute = |moment: Option<BootInstant>| moment.map(|at| (58..=61).contains(&at.left().as_secs()));
        let mut envelope = sample_envelope();
        envelope["lease_expires_at"] = at(60).into();
        envelope["access_token_expires_at"] = at(60).into();
        let lease = take(|call| call.ok_at(now, envelope.clone())).await.expect("usable").expect("a lease");
        assert_eq!((minute(lease.expires_at), minute(lease.token_expires_at)), (Some(true), Some(true)), "{off} s off");
        // Newer planes say it inside the task.
        envelope.as_object_mut().expect("an object").remove("lease_expires_at");
        envelope["task"]["lease_expires_at"] = at(60).into();
        let lease = take(|call| call.ok_at(now, envelope)).await.expect("usable").expect("a lease");
        assert_eq!(minute(lease.expires_at), Some(true), "{off} s off");
        let beat = json!({ "lease_expires_at": at(60), "access_token_expires_at": at(-60) });
        let kept = keep(|call| call.ok_at(now, beat)).await.expect("usable");
        assert_eq!((minute(until(kept.term)), kept.token_expires_at), (Some(true), None), "{off} s off");
    }
}

#[tokio::test]
async fn a_blank_server_counts_as_none_and_metadata_fills_in() {
    let server = async |url: Value, meta: Value| {
        let mut envelope = sample_envelope();
        envelope["domain_server_url"] = url;
        envelope["task"]["meta"] = meta;
        let lease = take(|call| call.ok(envelope)).await.expect("usable").expect("a lease");
        server_of(&lease.data).map(str::to_owned)
    };
    assert_eq!(server("  ".into(), Value::Null).await, None);
    assert_eq!(server(Value::Null, json!("text")).await, None);
    assert_eq!(server("relative/kept".into(), Value::Null).await.as_deref(), Some("relative/kept"));
    let both = json!({ "domain_server_url": "https://m", "legacy": { "domain_server_url": "https://l" } });
    assert_eq!(server("".into(), both.clone()).await.as_deref(), Some("https://m"));
    assert_eq!(server("https://own".into(), both).await.as_deref(), Some("https://own"));
    let legacy = json!({ "legacy": { "domain_server_url": "https://l" } });
    assert_eq!(server(Value::Null, legacy).await.as_deref(), Some("https://l"));
}

#[tokio::test]
async fn a_lease_that_cannot_be_used_tells_its_task_and_its_size_only() {
    let mut envelope = sample_envelope();
    envelope["task"]["inputs_cids"] = "top-secret".into();
    envelope["access_token"] = "top-secret".into();
    let bytes = envelope.to_string().len().to_string();
    let err = take(|call| call.ok(envelope)).await.expect_err("unusable");
    assert!(matches!(&err, LeaseError::Malformed { task: Some(id), .. } if id.task == to().task), "{err:?}");
    assert_clean(&err.to_string());
    assert!(err.to_string().contains(&bytes), "{err}");

    let mut envelope = sample_envelope();
    envelope["task"]["capability"] = "".into();
    let err = take(|call| call.ok(envelope)).await.expect_err("unusable");
    assert!(matches!(&err, LeaseError::Malformed { task: Some(_), .. }), "{err:?}");
    let mut envelope = sample_envelope();
    envelope["lease_expires_at"] = "top-secret".into();
    assert_clean(&take(|call| call.ok(envelope)).await.expect_err("unusable").to_string());
}

#[tokio::test]
async fn statuses_of_a_poll_mean_what_the_contract_says() {
    assert!(matches!(take(|call| call.answer(204, "")).await, Ok(None)));
    assert!(matches!(take(|call| call.answer(409, "")).await, Err(LeaseError::Busy)));
    let err = take(|call| call.answer(500, "sorry, top-secret-node\nis tired")).await.expect_err("refused");
    assert_eq!(err.to_string(), "control plane answered 500: sorry, [secret] is tired");
    assert_eq!(err.advice(), Advice::RetryLater);
    let err = take(|call| call.answer(404, "no top-secret-node here")).await.expect_err("refused");
    let remedy = "is the path of DMS_BASE_URL right? it usually ends in /v1: no [secret] here";
    assert_eq!(err.to_string(), format!("control plane answered 404 to the poll: {remedy}"));
    // A redirect is not followed: the token would go along.
    assert!(matches!(take(|call| call.answer(302, "")).await, Err(LeaseError::Refused { status: 302, .. })));
}

#[tokio::test]
async fn unusable_answers_give_one_clean_line_for_every_verb() {
    for kind in BAD_BODIES {
        for status in [200, 500] {
            let lines = [
                take(|call| call.bad(status, kind)).await.map(|_| ()),
                keep(|call| call.bad(status, kind)).await.map(|_| ()),
            ];
            for line in lines {
                let err = line.expect_err(kind);
                // The excerpt of a refusal is meant to be seen; of a success nothing is.
                if status == 200 {
                    assert_clean(&err.to_string());
                }
                assert_eq!(err.advice(), Advice::RetryLater, "{kind}: {err}");
            }
        }
        settle(Outcome::Completed, |call| call.bad(200, kind)).await.expect("a 2xx says it all");
        let err = settle(Outcome::Completed, |call| call.bad(410, kind)).await.expect_err("gone");
        assert!(matches!(err, LeaseError::Gone { status: 410, .. }), "{kind}: {err}");
    }
}

#[tokio::test]
async fn a_heartbeat_reads_what_is_there_and_leaves_the_rest_alone() {
    assert_eq!(keep(|call| call.ok(json!({}))).await.expect("usable"), unchanged());
    let same = json!({ "task_id": TASK, "domain_id": sample_lease().data.domain() });
    assert_eq!(keep(|call| call.ok(same)).await.expect("usable").address, None);
    let nothing = json!({ "access_token": null, "cancel": null, "task": null, "domain_server_url": "", "attempts": 3 });
    assert_eq!(keep(|call| call.ok(nothing)).await.expect("usable"), unchanged());
    let other = "11111111-2222-3333-4444-555555555555";
    let all = json!({ "access_token": "dom-2", "lease_expires_at": "2025-06-01 08:05:00Z", "cancel": true, "task_id": other,
        "job_id": other, "domain_id": other, "domain_server_url": "https://other" });
    let kept = keep(|call| call.ok(all)).await.expect("usable");
    let id: uuid::Uuid = other.parse().expect("an id");
    assert_eq!(
        kept,
        Renewal {
            token: Some(Token::new("dom-2")),
            token_expires_at: None,
            term: Term::SameTerm,
            cancel: true,
            address: Some(address(id, Some(id), Some(id), "/lab/echo/v1")),
            capability: None,
            data: Some(AnnouncedData::at_server(Some("https://other"), Some(id))),
        }
    );
    let task = json!({ "id": other, "capability": "/x", "meta": { "legacy": { "domain_server_url": "https://l" } } });
    let kept = keep(|call| call.ok(json!({ "task": task, "task_id": TASK }))).await.expect("usable");
    assert_eq!(kept.address.map(|to| to.task), Some(id.into()));
    assert_eq!(kept.data.as_ref().and_then(server_of), Some("https://l"));
}

// posemesh.md section 10.3
#[tokio::test]
async fn a_status_that_says_the_task_is_over_is_a_cancel() {
    for (status, cancel) in
        [("cancelled", true), ("failed", true), ("completed", true), ("canceled", false), ("running", false)]
    {
        assert_eq!(keep(|call| call.ok(json!({ "status": status }))).await.expect("usable").cancel, cancel, "{status}");
    }
}

#[tokio::test]
async fn a_heartbeat_answer_must_be_an_object() {
    for (status, body) in [(204, ""), (200, ""), (200, "null"), (200, "[]"), (200, "true")] {
        let err = keep(|call| call.answer(status, body)).await.expect_err(body);
        assert!(matches!(err, LeaseError::Malformed { .. }), "{body:?}: {err}");
    }
}

#[tokio::test]
async fn a_lease_is_gone_by_404_409_and_410() {
    for status in [404, 409, 410] {
        let err = keep(|call| call.answer(status, "")).await.expect_err("gone");
        assert_eq!(err.advice(), Advice::StopTask, "{err}");
        let err = settle(Outcome::Drained, |call| call.answer(status, "")).await.expect_err("gone");
        assert_eq!(err.advice(), Advice::StopTask, "{err}");
    }
    let err = settle(Outcome::Drained, |call| call.answer(422, "reason too long")).await.expect_err("refused");
    assert_eq!(err.advice(), Advice::GiveUp);
}

#[tokio::test]
async fn a_heartbeat_ends_within_its_limit() {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let (to, beat) = (to(), Pending { progress: json!({}), events: Vec::new(), version: 0 });
    let began = BootInstant::now();
    let (kept, held) = tokio::join!(dms.heartbeat(&to, &beat, began + Duration::from_millis(200)), plane.next());
    assert!(matches!(kept, Err(LeaseError::Unreachable(_))), "{kept:?}");
    let took = BootInstant::now() - began;
    assert!(took < SOON / 2, "the limit of other calls is {SOON:?}, this one took {took:?}");
    drop(held);
}

/// A real login room against the same service, so that a 401 has its whole effect.
async fn with_login() -> (Service, Dms, tokio_util::task::AbortOnDropHandle<()>) {
    let mut plane = Service::start().await;
    let client = Client::new(transport::Config::default());
    let auth = crate::auth::Auth::new(
        crate::auth::Config {
            dds: plane.url.clone(),
            reg_secret: "s".into(),
            key: NodeKey::from_hex(&"01".repeat(32)).expect("a key"),
            version: "1.0.0".into(),
            form: crate::auth::Form::Wallet,
            sign_in_domain: None,
            register_interval: SOON,
            register_max_retry: -1,
            token_safety_ratio: 0.75,
            token_max_retries: 0,
            token_jitter: Duration::ZERO,
            request_timeout: SOON,
        },
        tokio::sync::watch::Sender::new(vec!["/lab/echo/v1".parse().expect("a name")]).subscribe(),
        client.clone(),
    );
    let config = Config { request_timeout: SOON, ..Config::new(plane.url.clone()) };
    let dms = Dms::with_tokens(config, client, "node".into(), auth.tokens());
    let room = tokio::spawn(auth.run(tokio_util::sync::CancellationToken::new()));
    nonce(&mut plane).await;
    plane.expect("POST /internal/v1/nodes/register-wallet").await.ok(json!({}));
    login(&mut plane, "node-1").await;
    (plane, dms, tokio_util::task::AbortOnDropHandle::new(room))
}

async fn nonce(plane: &mut Service) {
    plane.expect("POST /internal/v1/auth/siwe/request").await.ok(
        json!({"nonce":"n","domain":"d","uri":"https://d","version":"1","chainId":1,"issuedAt":"2025-01-01T00:00:00Z"}),
    );
}

async fn login(plane: &mut Service, token: &str) {
    nonce(plane).await;
    let call = plane.expect("POST /internal/v1/auth/siwe/verify").await;
    call.ok(json!({ "access_token": token, "expires_at": "2125-01-01T00:00:00Z" }));
}

#[tokio::test]
async fn a_rejected_token_is_replaced_and_the_request_repeated_once() {
    let (mut plane, dms, _room) = with_login().await;
    let (taken, ()) = tokio::join!(dms.poll(), async {
        let call = plane.expect("GET /tasks").await;
        assert_eq!(call.bearer(), "node-1");
        call.answer(401, "");
        login(&mut plane, "node-2").await;
        let call = plane.expect("GET /tasks").await;
        assert_eq!(call.bearer(), "node-2");
        call.ok(sample_envelope());
    });
    assert!(taken.expect("usable").is_some());

    let (to, beat) = (to(), Pending { progress: json!({ "kept": true }), events: Vec::new(), version: 0 });
    let (kept, ()) = tokio::join!(dms.heartbeat(&to, &beat, BootInstant::now() + SOON), async {
        let path = format!("POST /tasks/{TASK}/heartbeat");
        let call = plane.expect(&path).await;
        assert_eq!(call.bearer(), "node-2");
        call.answer(401, "");
        login(&mut plane, "node-3").await;
        let call = plane.expect(&path).await;
        assert_eq!((call.bearer(), call.json()["progress"].clone()), ("node-3", json!({ "kept": true })));
        call.ok(json!({}));
    });
    assert_eq!(kept.expect("usable"), unchanged());
}

// Whoever prints a request shows no token.
#[tokio::test]
async fn the_bearer_is_marked_as_a_secret() {
    let plane = Service::start().await;
    let bearer = dms(&plane, "v1").bearer(&Token::new("top-secret-node")).expect("a header");
    assert_eq!(format!("{bearer:?}"), "Sensitive");
}

#[tokio::test]
async fn a_second_401_is_final() {
    let (mut plane, dms, _room) = with_login().await;
    let task_result = TaskResult::bare(Outcome::Completed);
    let lease = sample_lease();
    let (settled, ()) = tokio::join!(dms.report(&lease.address, &task_result), async {
        let path = format!("POST /tasks/{TASK}/complete");
        plane.expect(&path).await.answer(401, "");
        login(&mut plane, "node-2").await;
        plane.expect(&path).await.answer(401, "");
    });
    assert!(matches!(settled, Err(LeaseError::Unauthorized)), "{settled:?}");
    assert!(plane.waiting().is_none());
}
