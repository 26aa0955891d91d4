//! The callback form, and registrations that are repeated.

use super::*;
use crate::model::{Callback, Unexpected};

const BY_URL: &str = "POST /prefix/internal/v1/nodes/register";
const URL: &str = "http://node.lab.test:8080/";

fn by_url(config: &mut Config) {
    config.form = Form::Callback { url: URL.to_owned() };
}

fn callback(secret: &str) -> Callback {
    Callback { id: "node-1".to_owned(), secret: secret.into(), organization_id: Some("org-1".to_owned()) }
}

/// A 503 that asks for nothing.
fn busy(call: Call) {
    call.answer(503, "busy");
}

impl World {
    /// Lets the room register under its URL, with the callback before the answer.
    async fn register_url(&mut self) {
        let call = self.dds.expect(BY_URL).await;
        assert_eq!(self.visits.called_back(callback("called-back")), Ok(()));
        call.ok(json!({}));
    }
}

#[tokio::test]
async fn a_registration_by_url_sends_what_the_contract_says() {
    let mut world = World::start(by_url).await;
    let call = world.dds.expect(BY_URL).await;
    let body = call.json();
    let text = |field: &str| body[field].as_str().expect("text").to_owned();
    let key = key::tests::vector_key();
    assert_eq!(body.as_object().expect("an object").len(), 7, "{body}");
    assert_eq!(body["capabilities"], json!(["/a/v1", "/b/v1"]));
    assert_eq!((text("url"), text("version")), (URL.to_owned(), "1.2.3".to_owned()));
    assert_eq!(text("registration_credentials"), "top-secret-registration");
    assert_eq!(text("public_key"), key.public_key());
    assert_eq!(text("signature"), key.bare_sign(&format!("{URL}{}", text("timestamp"))));
    let timestamp = text("timestamp");
    assert!(timestamp.len() == 30 && timestamp.ends_with('Z'), "{timestamp}");
    let age = Timestamp::now().duration_since(timestamp.parse().expect("a timestamp"));
    assert!(age.as_secs() < 20, "{timestamp}");
    assert_eq!(world.visits.called_back(callback("s")), Ok(()));
    call.answer(204, "");
    world.login("t", Duration::from_secs(3600)).await;
    assert_eq!(world.bearer().await, Ok("t".to_owned()));
}

#[tokio::test]
async fn the_gate_opens_only_when_the_service_accepts_and_calls_back_in_any_order() {
    let mut world = World::start(by_url).await;
    let call = world.dds.expect(BY_URL).await;
    call.ok(json!({}));
    tokio::time::sleep(Duration::from_millis(50)).await; // an answer alone opens nothing
    assert_eq!(world.status.borrow().state, RegistrationState::Registering);
    assert!(world.dds.waiting().is_none(), "no login before the callback");
    assert_eq!(world.visits.called_back(callback("s")), Ok(()));
    world.nonce().await;
    assert_eq!(world.status.borrow().state, RegistrationState::Registered);
    assert_eq!(world.visits.called_back(callback("late")), Err(Unexpected), "nothing is in flight any more");
}

#[tokio::test]
async fn an_answer_lost_after_the_callback_is_a_registration() {
    let mut world = World::start(by_url).await;
    let call = world.dds.expect(BY_URL).await;
    assert_eq!(world.visits.called_back(callback("s")), Ok(()));
    drop(call);
    world.nonce().await;
    assert_eq!(world.status.borrow().state, RegistrationState::Registered);
}

#[tokio::test]
async fn a_refusal_after_the_callback_is_a_refusal() {
    for (status, state) in [(409, RegistrationState::Conflict), (403, RegistrationState::Disconnected)] {
        let mut world = World::start(by_url).await;
        let call = world.dds.expect(BY_URL).await;
        assert_eq!(world.visits.called_back(callback("called-back-secret")), Ok(()));
        call.answer(status, "not you, called-back-secret, top-secret-registration");
        let error = world.until(state).await.error.expect("a reason");
        assert!(!error.contains("called-back") && error.contains("[secret]"), "{error}");
        assert_clean(&error);
        assert_eq!(world.visits.called_back(callback("s")), Err(Unexpected));
    }
}

#[tokio::test]
async fn a_service_that_never_calls_back_or_cannot_is_told_with_the_url() {
    let mut world = World::start(|config| {
        by_url(config);
        config.request_timeout = Duration::from_secs(1);
    })
    .await;
    world.dds.expect(BY_URL).await.ok(json!({}));
    let error = world.until(RegistrationState::Registering).await.error.expect("a reason");
    assert_eq!(
        error,
        "registration: accepted, but nobody called back at NODE_URL http://node.lab.test:8080/ within 1s; check that \
         the service can reach it, or set REGISTRATION=wallet"
    );
    world.dds.expect(BY_URL).await.answer(500, "no route");
    let wanted = "registration: answered 500 Internal Server Error: no route; check that the service can reach NODE_URL \
                  http://node.lab.test:8080/";
    let seen = world.status.wait_for(|now| now.error.as_deref() == Some(wanted));
    tokio::time::timeout(Duration::from_secs(20), seen).await.expect("in time").expect("the room runs");
}

#[tokio::test]
async fn a_registration_by_url_is_repeated_when_no_probe_came_for_an_interval() {
    let mut world = World::start(|config| {
        by_url(config);
        config.register_interval = Duration::from_secs(2);
    })
    .await;
    world.register_url().await;
    world.login("t", Duration::from_secs(3600)).await;
    let registered = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await; // in the middle of the interval
    world.visits.probed();
    let again = world.dds.expect(BY_URL).await;
    let waited = again.at - registered;
    assert!(waited >= Duration::from_millis(2900), "the probe put it off: {waited:?}");
    assert!(world.status.borrow().probed_at.is_some());
    busy(again);
    assert_eq!(world.bearer().await, Ok("t".to_owned()), "the token is used on");
    world.register_url().await;
    let well = world.status.wait_for(|now| now.error.is_none());
    tokio::time::timeout(Duration::from_secs(20), well).await.expect("in time").expect("the room runs");
}

#[tokio::test]
async fn a_wallet_is_registered_again_every_interval_whatever_probes_come() {
    let interval = |config: &mut Config| config.register_interval = Duration::from_secs(1);
    let mut world = World::started("t", Duration::from_secs(3600), interval).await;
    world.visits.probed();
    world.nonce().await;
    world.dds.expect(REGISTER).await.answer(409, "two of you");
    let error = world.until(RegistrationState::Conflict).await.error.expect("a reason");
    assert!(error.starts_with("another node with this wallet is online"), "{error}");
    assert_eq!(world.bearer().await, Ok("t".to_owned()), "the token is used on");
    world.register().await;
    assert_eq!(world.until(RegistrationState::Registered).await.error, None);
}

#[tokio::test]
async fn other_capabilities_are_registered_at_once_and_the_same_ones_are_not() {
    let mut world = World::started("t", Duration::from_secs(3600), |_| {}).await;
    let named = |names: &[&str]| names.iter().map(|name| name.parse().expect("a name")).collect();
    world.capabilities.send_replace(named(&["/a/v1", "/b/v1"]));
    world.capabilities.send_replace(named(&["/b/v1"]));
    world.nonce().await;
    let call = world.dds.expect(REGISTER).await;
    assert_eq!(call.json()["capabilities"], json!(["/b/v1"]));
    world.capabilities.send_replace(named(&["/b/v1", "/c/v1"]));
    call.ok(json!({}));
    world.nonce().await;
    let call = world.dds.expect(REGISTER).await;
    assert_eq!(call.json()["capabilities"], json!(["/b/v1", "/c/v1"]), "a change during a call is not missed");
    call.ok(json!({}));
    assert_eq!(world.bearer().await, Ok("t".to_owned()));
}

#[tokio::test]
async fn fresh_tokens_rejected_again_and_again_make_the_node_register() {
    let mut world = World::started("t0", Duration::from_secs(3600), |_| {}).await;
    let mut registered = 0;
    for n in 1..=5 {
        let token = world.tokens.bearer().await.expect("held");
        world.tokens.rejected(&token);
        registered += world.login_amid_registrations(&format!("t{n}")).await.1;
        assert_eq!(world.bearer().await, Ok(format!("t{n}")));
    }
    assert_eq!(registered, 1, "once, not for every rejection");
}

#[tokio::test]
async fn a_service_that_registers_and_then_knows_nobody_is_asked_at_a_falling_rate() {
    let mut world = World::start(|_| {}).await;
    let mut times = Vec::new();
    for _ in 0..5 {
        times.push(world.nonce().await);
        world.dds.expect(REGISTER).await.ok(json!({}));
        world.nonce().await;
        world.dds.expect(VERIFY).await.answer(403, "who are you");
    }
    let gaps: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (gap, least) in gaps.iter().zip([0, 50, 100, 200]) {
        assert!(*gap >= Duration::from_millis(least), "{gaps:?}");
    }
}

#[tokio::test]
async fn a_challenge_for_somebody_else_is_not_signed() {
    let mut world = World::start(|config| config.sign_in_domain = Some("login.example".to_owned())).await;
    world.dds.expect(REQUEST).await.ok(challenge());
    let error = world.until(RegistrationState::Disconnected).await.error.expect("a reason");
    assert_eq!(
        error,
        "sign-in challenge: field domain names dds.test.local, expected login.example; set \
         SIGN_IN_DOMAIN=dds.test.local if the service signs in for it"
    );
}

#[tokio::test]
async fn a_service_with_another_clock_is_understood_by_its_own() {
    for minutes in [-20, 20] {
        let mut world = World::start(by_url).await;
        let clock = || Timestamp::now() + SignedDuration::from_mins(minutes);
        let dated = |status: u16, body: Value| {
            let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&clock());
            let answer = axum::response::Response::builder().status(status).header("date", date.expect("a date"));
            answer.body(axum::body::Body::from(body.to_string())).expect("a response")
        };
        // The first timestamp is by our clock, the next one by the service's.
        world.dds.expect(BY_URL).await.respond(dated(503, json!({})));
        let call = world.dds.expect(BY_URL).await;
        let signed: Timestamp = call.json()["timestamp"].as_str().expect("text").parse().expect("a timestamp");
        assert!(clock().duration_since(signed).as_secs().abs() < 10, "{minutes}: {signed}");
        assert_eq!(world.visits.called_back(callback("s")), Ok(()));
        call.respond(dated(200, json!({})));
        world.dds.expect(REQUEST).await.respond(dated(200, challenge()));
        let expiry = (clock() + SignedDuration::from_secs(60)).to_string();
        let token = json!({ "access_token": "t", "access_expires_at": expiry });
        world.dds.expect(VERIFY).await.respond(dated(200, token));
        assert_eq!(world.bearer().await, Ok("t".to_owned()), "{minutes} minutes");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(world.dds.waiting().is_none(), "no storm of logins");
    }
}

#[tokio::test]
async fn an_error_that_repeats_secrets_or_holds_a_token_shows_neither() {
    let quoted = "top-\"secret\"-registration";
    let echo = json!({ "got": quoted, "plain": "top-secret-registration" }).to_string();
    for (answer, expected) in [(echo.as_str(), "[secret]"), (r#"{"access_token":"top-secret"}"#, "not shown")] {
        let mut world = World::start(|config| config.reg_secret = quoted.into()).await;
        let answer = answer.replace("top-secret-registration", "-");
        world.register().await;
        world.nonce().await;
        world.dds.expect(VERIFY).await.answer(500, answer);
        let error = world.bearer().await.expect_err("no token").to_string();
        assert!(error.contains(expected) && !error.contains("secret\\\"-") && !error.contains("top-"), "{error}");
    }
}
