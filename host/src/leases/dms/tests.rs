//! Runs the adapter against a DMS whose answers each test gives.

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

/// The renewal of an empty answer, which extends the lease by its last term.
fn unchanged() -> Renewal {
    Renewal { term: Term::SameTerm, data: Some(AnnouncedData::at_server(None, None)), ..Renewal::default() }
}

/// Polls once, and answers with `answer`.
async fn poll(answer: impl FnOnce(Call)) -> Result<Option<Lease>, LeaseError> {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let (polled, ()) = tokio::join!(dms.poll(), async { answer(plane.expect("GET /v1/tasks").await) });
    polled
}

/// Sends one heartbeat, and answers with `answer`.
async fn heartbeat(answer: impl FnOnce(Call)) -> Result<Renewal, LeaseError> {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let (to, beat) = (to(), Pending { progress: json!({ "at": 1 }), events: vec![json!("e")], version: 1 });
    let (renewal, ()) = tokio::join!(dms.heartbeat(&to, &beat, BootInstant::now() + SOON), async {
        let call = plane.expect(&format!("POST /v1/tasks/{TASK}/heartbeat")).await;
        assert_eq!(call.json(), json!({ "progress": { "at": 1 }, "events": ["e"] }));
        assert_eq!(call.headers["content-type"], "application/json");
        answer(call);
    });
    renewal
}

/// Sends one report, and answers with `answer`.
async fn report(outcome: Outcome, answer: impl FnOnce(Call)) -> Result<(), LeaseError> {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let task_result = TaskResult::bare(outcome);
    let lease = sample_lease();
    let (reported, ()) = tokio::join!(dms.report(&lease.address, &task_result), async { answer(plane.next().await) });
    reported
}

#[tokio::test]
async fn trailing_slashes_of_the_base_are_ignored() {
    for (base, path) in [("v1", "/v1/tasks"), ("v1/", "/v1/tasks"), ("v1//", "/v1/tasks"), ("", "/tasks")] {
        let mut plane = Service::start().await;
        let dms = dms(&plane, base);
        let (polled, ()) = tokio::join!(dms.poll(), async {
            let call = plane.expect(&format!("GET {path}")).await;
            assert_eq!(call.bearer(), "top-secret-node");
            call.answer(204, "");
        });
        assert!(matches!(polled, Ok(None)));
    }
}

#[tokio::test]
async fn lease_document_has_no_credentials() {
    let mut envelope = sample_envelope();
    envelope["p2p_access_token"] = "top-secret-p2p".into();
    envelope["Other_Token"] = "top-secret-other".into();
    envelope["access_token_expires_at"] = "2025-06-01 08:05:00.25+02:00".into();
    envelope["task"]["meta"] = json!({ "access_token": "the author's own", "voxel": 0.1 });
    envelope["task"]["id"] = TASK.to_uppercase().into();
    envelope["task"]["outputs_prefix"] = "out".into();
    envelope["future"] = json!({ "kept": true });
    let sent = envelope.clone();
    let lease = poll(|call| call.ok(sent)).await.expect("usable").expect("a lease");
    assert_eq!(lease.address, to());
    assert_eq!(lease.capability.as_str(), "/lab/echo/v1");
    assert_eq!(lease.token, Some(Token::new("dom-1")));
    assert_eq!(server_of(&lease.data), Some("https://ds.lab.test"));
    assert_eq!(lease.expires_at, None, "it had passed before the poll");
    assert_eq!((lease.inputs, lease.outputs_prefix.as_deref()), (vec!["a1".to_owned()], Some("out")));
    for key in ["access_token", "p2p_access_token", "Other_Token"] {
        envelope.as_object_mut().expect("an object").remove(key);
    }
    let document: Value = serde_json::from_str(lease.document.get()).expect("JSON");
    assert_eq!(document, envelope);
}

#[tokio::test]
async fn repeated_task_token_is_in_no_error() {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let mut envelope = sample_envelope();
    envelope["access_token"] = "top-secret-lease".into();
    let (polled, ()) = tokio::join!(dms.poll(), async { plane.next().await.ok(envelope) });
    let to = polled.expect("usable").expect("a lease").address;
    let renewal = json!({ "access_token": "top-secret-renewal" });
    let beat = Pending { progress: json!({}), events: Vec::new(), version: 1 };
    let until = BootInstant::now() + SOON;
    let (renewed, ()) = tokio::join!(dms.heartbeat(&to, &beat, until), async { plane.next().await.ok(renewal) });
    renewed.expect("renewed");
    let body = "no top-secret-lease, no top-secret-renewal, no top-secret-node";
    let completed = TaskResult::bare(Outcome::Completed);
    let (reported, ()) = tokio::join!(dms.report(&to, &completed), async { plane.next().await.answer(400, body) });
    let text = reported.expect_err("refused").to_string();
    assert_eq!(text, "control plane answered 400: no (token), no (token), no [secret]");
}

// A term has the same length for any clock of the control plane.
#[tokio::test]
async fn times_follow_the_clock_of_the_control_plane() {
    for off in [0, 1200, -1200] {
        let now = Timestamp::now() + jiff::SignedDuration::from_secs(off);
        let at = |seconds| (now + jiff::SignedDuration::from_secs(seconds)).to_string();
        let minute = |time: Option<BootInstant>| time.map(|at| (58..=61).contains(&at.left().as_secs()));
        let mut envelope = sample_envelope();
        envelope["lease_expires_at"] = at(60).into();
        envelope["access_token_expires_at"] = at(60).into();
        let lease = poll(|call| call.ok_at(now, envelope.clone())).await.expect("usable").expect("a lease");
        assert_eq!((minute(lease.expires_at), minute(lease.token_expires_at)), (Some(true), Some(true)), "{off} s off");
        // Newer control planes send it inside the task.
        envelope.as_object_mut().expect("an object").remove("lease_expires_at");
        envelope["task"]["lease_expires_at"] = at(60).into();
        let lease = poll(|call| call.ok_at(now, envelope)).await.expect("usable").expect("a lease");
        assert_eq!(minute(lease.expires_at), Some(true), "{off} s off");
        let beat = json!({ "lease_expires_at": at(60), "access_token_expires_at": at(-60) });
        let renewal = heartbeat(|call| call.ok_at(now, beat)).await.expect("usable");
        assert_eq!((minute(until(renewal.term)), renewal.token_expires_at), (Some(true), None), "{off} s off");
    }
}

#[tokio::test]
async fn blank_server_falls_back_to_the_metadata() {
    let server = async |url: Value, meta: Value| {
        let mut envelope = sample_envelope();
        envelope["domain_server_url"] = url;
        envelope["task"]["meta"] = meta;
        let lease = poll(|call| call.ok(envelope)).await.expect("usable").expect("a lease");
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
async fn unusable_lease_error_shows_task_and_size_only() {
    let mut envelope = sample_envelope();
    envelope["task"]["inputs_cids"] = "top-secret".into();
    envelope["access_token"] = "top-secret".into();
    let bytes = envelope.to_string().len().to_string();
    let err = poll(|call| call.ok(envelope)).await.expect_err("unusable");
    assert!(matches!(&err, LeaseError::Malformed { task: Some(id), .. } if id.task == to().task), "{err:?}");
    assert_clean(&err.to_string());
    assert!(err.to_string().contains(&bytes), "{err}");

    let mut envelope = sample_envelope();
    envelope["task"]["capability"] = "".into();
    let err = poll(|call| call.ok(envelope)).await.expect_err("unusable");
    assert!(matches!(&err, LeaseError::Malformed { task: Some(_), .. }), "{err:?}");
    let mut envelope = sample_envelope();
    envelope["lease_expires_at"] = "top-secret".into();
    assert_clean(&poll(|call| call.ok(envelope)).await.expect_err("unusable").to_string());
}

#[tokio::test]
async fn poll_statuses_follow_the_protocol() {
    assert!(matches!(poll(|call| call.answer(204, "")).await, Ok(None)));
    assert!(matches!(poll(|call| call.answer(409, "")).await, Err(LeaseError::Busy)));
    let err = poll(|call| call.answer(500, "sorry, top-secret-node\nis tired")).await.expect_err("refused");
    assert_eq!(err.to_string(), "control plane answered 500: sorry, [secret] is tired");
    assert_eq!(err.advice(), Advice::RetryLater);
    let err = poll(|call| call.answer(404, "no top-secret-node here")).await.expect_err("refused");
    let remedy = "check the path of DMS_BASE_URL, it usually ends in /v1: no [secret] here";
    assert_eq!(err.to_string(), format!("control plane answered 404 to the poll; {remedy}"));
    // A redirect is not followed: it would send the token to another server.
    assert!(matches!(poll(|call| call.answer(302, "")).await, Err(LeaseError::Refused { status: 302, .. })));
}

#[tokio::test]
async fn unusable_answers_give_one_line_without_secrets() {
    for kind in BAD_BODIES {
        for status in [200, 500] {
            let lines = [
                poll(|call| call.bad(status, kind)).await.map(|_| ()),
                heartbeat(|call| call.bad(status, kind)).await.map(|_| ()),
            ];
            for line in lines {
                let err = line.expect_err(kind);
                // An error may show an excerpt of a refusal, but nothing of a success.
                if status == 200 {
                    assert_clean(&err.to_string());
                }
                assert_eq!(err.advice(), Advice::RetryLater, "{kind}: {err}");
            }
        }
        report(Outcome::Completed, |call| call.bad(200, kind)).await.expect("any 2xx is a success");
        let err = report(Outcome::Completed, |call| call.bad(410, kind)).await.expect_err("gone");
        assert!(matches!(err, LeaseError::Gone { status: 410, .. }), "{kind}: {err}");
    }
}

#[tokio::test]
async fn missing_heartbeat_fields_change_nothing() {
    assert_eq!(heartbeat(|call| call.ok(json!({}))).await.expect("usable"), unchanged());
    let same = json!({ "task_id": TASK, "domain_id": sample_lease().data.domain() });
    assert_eq!(heartbeat(|call| call.ok(same)).await.expect("usable").address, None);
    let nothing = json!({ "access_token": null, "cancel": null, "task": null, "domain_server_url": "", "attempts": 3 });
    assert_eq!(heartbeat(|call| call.ok(nothing)).await.expect("usable"), unchanged());
    let other = "11111111-2222-3333-4444-555555555555";
    let all = json!({ "access_token": "dom-2", "lease_expires_at": "2025-06-01 08:05:00Z", "cancel": true, "task_id": other,
        "job_id": other, "domain_id": other, "domain_server_url": "https://other" });
    let renewal = heartbeat(|call| call.ok(all)).await.expect("usable");
    let id: uuid::Uuid = other.parse().expect("an id");
    assert_eq!(
        renewal,
        Renewal {
            token: Some(Token::new("dom-2")),
            token_expires_at: None,
            term: Term::SameTerm,
            hard_deadline: None,
            cancel: true,
            address: Some(address(id, Some(id), Some(id), "/lab/echo/v1")),
            capability: None,
            data: Some(AnnouncedData::at_server(Some("https://other"), Some(id))),
        }
    );
    let task = json!({ "id": other, "capability": "/x", "meta": { "legacy": { "domain_server_url": "https://l" } } });
    let renewal = heartbeat(|call| call.ok(json!({ "task": task, "task_id": TASK }))).await.expect("usable");
    assert_eq!(renewal.address.map(|to| to.task), Some(id.into()));
    assert_eq!(renewal.data.as_ref().and_then(server_of), Some("https://l"));
}

// posemesh.md section 10.3
#[tokio::test]
async fn final_task_statuses_are_a_cancel() {
    for (status, cancel) in
        [("cancelled", true), ("failed", true), ("completed", true), ("canceled", false), ("running", false)]
    {
        assert_eq!(
            heartbeat(|call| call.ok(json!({ "status": status }))).await.expect("usable").cancel,
            cancel,
            "{status}"
        );
    }
}

#[tokio::test]
async fn heartbeat_answer_must_be_an_object() {
    for (status, body) in [(204, ""), (200, ""), (200, "null"), (200, "[]"), (200, "true")] {
        let err = heartbeat(|call| call.answer(status, body)).await.expect_err(body);
        assert!(matches!(err, LeaseError::Malformed { .. }), "{body:?}: {err}");
    }
}

#[tokio::test]
async fn statuses_404_409_and_410_end_a_lease() {
    for status in [404, 409, 410] {
        let err = heartbeat(|call| call.answer(status, "")).await.expect_err("gone");
        assert_eq!(err.advice(), Advice::StopTask, "{err}");
        let err = report(Outcome::Drained, |call| call.answer(status, "")).await.expect_err("gone");
        assert_eq!(err.advice(), Advice::StopTask, "{err}");
    }
    let err = report(Outcome::Drained, |call| call.answer(422, "reason too long")).await.expect_err("refused");
    assert_eq!(err.advice(), Advice::GiveUp);
}

#[tokio::test]
async fn heartbeat_ends_within_its_limit() {
    let mut plane = Service::start().await;
    let dms = dms(&plane, "v1");
    let (to, beat) = (to(), Pending { progress: json!({}), events: Vec::new(), version: 0 });
    let began = BootInstant::now();
    let (renewal, held) = tokio::join!(dms.heartbeat(&to, &beat, began + Duration::from_millis(200)), plane.next());
    assert!(matches!(renewal, Err(LeaseError::Unreachable(_))), "{renewal:?}");
    let took = BootInstant::now() - began;
    assert!(took < SOON / 2, "the limit of other calls is {SOON:?}, this one took {took:?}");
    drop(held);
}

/// A node with a real sign-in against the same service, so that a 401 causes a login.
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
        crate::node_event::NodeEvents::new(crate::model::StatusBoard::new(1, Vec::new())),
    );
    let config = Config { request_timeout: SOON, ..Config::new(plane.url.clone()) };
    let dms = Dms::with_tokens(config, client, "node".into(), auth.tokens());
    let running = tokio::spawn(auth.run(tokio_util::sync::CancellationToken::new()));
    nonce(&mut plane).await;
    plane.expect("POST /internal/v1/nodes/register-wallet").await.ok(json!({}));
    login(&mut plane, "node-1").await;
    (plane, dms, tokio_util::task::AbortOnDropHandle::new(running))
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
async fn request_is_repeated_once_with_a_fresh_token() {
    let (mut plane, dms, _running) = with_login().await;
    let (polled, ()) = tokio::join!(dms.poll(), async {
        let call = plane.expect("GET /tasks").await;
        assert_eq!(call.bearer(), "node-1");
        call.answer(401, "");
        login(&mut plane, "node-2").await;
        let call = plane.expect("GET /tasks").await;
        assert_eq!(call.bearer(), "node-2");
        call.ok(sample_envelope());
    });
    assert!(polled.expect("usable").is_some());

    let (to, beat) = (to(), Pending { progress: json!({ "kept": true }), events: Vec::new(), version: 0 });
    let (renewal, ()) = tokio::join!(dms.heartbeat(&to, &beat, BootInstant::now() + SOON), async {
        let path = format!("POST /tasks/{TASK}/heartbeat");
        let call = plane.expect(&path).await;
        assert_eq!(call.bearer(), "node-2");
        call.answer(401, "");
        login(&mut plane, "node-3").await;
        let call = plane.expect(&path).await;
        assert_eq!((call.bearer(), call.json()["progress"].clone()), ("node-3", json!({ "kept": true })));
        call.ok(json!({}));
    });
    assert_eq!(renewal.expect("usable"), unchanged());
}

// A printed request must not show the token.
#[tokio::test]
async fn bearer_header_is_marked_sensitive() {
    let plane = Service::start().await;
    let bearer = dms(&plane, "v1").bearer(&Token::new("top-secret-node")).expect("a header");
    assert_eq!(format!("{bearer:?}"), "Sensitive");
}

#[tokio::test]
async fn second_401_is_final() {
    let (mut plane, dms, _running) = with_login().await;
    let task_result = TaskResult::bare(Outcome::Completed);
    let lease = sample_lease();
    let (reported, ()) = tokio::join!(dms.report(&lease.address, &task_result), async {
        let path = format!("POST /tasks/{TASK}/complete");
        plane.expect(&path).await.answer(401, "");
        login(&mut plane, "node-2").await;
        plane.expect(&path).await.answer(401, "");
    });
    assert!(matches!(reported, Err(LeaseError::Unauthorized)), "{reported:?}");
    assert!(plane.waiting().is_none());
}
