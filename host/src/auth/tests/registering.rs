//! Registration with a callback, and repeated registrations.

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

/// Answers with a 503 without `Retry-After`.
fn busy(call: Call) {
    call.answer(503, "busy");
}

impl TestAuth {
    /// Accepts a registration under the URL. The callback comes before the answer.
    async fn register_url(&mut self) {
        let call = self.dds.expect(BY_URL).await;
        assert_eq!(self.health_checks.called_back(callback("called-back")), Ok(()));
        call.ok(json!({}));
    }
}

#[tokio::test]
async fn registration_by_url_follows_the_protocol() {
    let mut auth = TestAuth::start(by_url).await;
    let call = auth.dds.expect(BY_URL).await;
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
    assert_eq!(auth.health_checks.called_back(callback("s")), Ok(()));
    call.answer(204, "");
    auth.login("t", Duration::from_secs(3600)).await;
    assert_eq!(auth.bearer().await, Ok("t".to_owned()));
}

#[tokio::test]
async fn registration_needs_the_answer_and_the_callback() {
    let mut auth = TestAuth::start(by_url).await;
    let call = auth.dds.expect(BY_URL).await;
    call.ok(json!({}));
    tokio::time::sleep(Duration::from_millis(50)).await; // the answer alone does not register the node
    assert_eq!(auth.board.now().planes.first().registration, RegistrationState::Registering);
    assert!(auth.dds.waiting().is_none(), "no login before the callback");
    assert_eq!(auth.health_checks.called_back(callback("s")), Ok(()));
    auth.nonce().await;
    assert_eq!(auth.board.now().planes.first().registration, RegistrationState::Registered);
    assert_eq!(auth.health_checks.called_back(callback("late")), Err(Unexpected), "no registration is in flight");
}

#[tokio::test]
async fn callback_replaces_a_lost_answer() {
    let mut auth = TestAuth::start(by_url).await;
    let call = auth.dds.expect(BY_URL).await;
    assert_eq!(auth.health_checks.called_back(callback("s")), Ok(()));
    drop(call);
    auth.nonce().await;
    assert_eq!(auth.board.now().planes.first().registration, RegistrationState::Registered);
}

#[tokio::test]
async fn refusal_counts_even_after_the_callback() {
    for (status, state) in [(409, RegistrationState::Conflict), (403, RegistrationState::Disconnected)] {
        let mut auth = TestAuth::start(by_url).await;
        let call = auth.dds.expect(BY_URL).await;
        assert_eq!(auth.health_checks.called_back(callback("called-back-secret")), Ok(()));
        call.answer(status, "not you, called-back-secret, top-secret-registration");
        let error = auth.until(state).await.registration_error.expect("a reason");
        assert!(!error.contains("called-back") && error.contains("[secret]"), "{error}");
        assert_clean(&error);
        assert_eq!(auth.health_checks.called_back(callback("s")), Err(Unexpected));
    }
}

#[tokio::test]
async fn missing_callback_error_names_the_url() {
    let mut auth = TestAuth::start(|config| {
        by_url(config);
        config.request_timeout = Duration::from_secs(1);
    })
    .await;
    auth.dds.expect(BY_URL).await.ok(json!({}));
    let error = auth.until(RegistrationState::Registering).await.registration_error.expect("a reason");
    assert_eq!(
        error,
        "registration: accepted, but the service did not call back at NODE_URL http://node.lab.test:8080/ within 1s; check that \
         the service can reach it, or set REGISTRATION=wallet"
    );
    auth.dds.expect(BY_URL).await.answer(500, "no route");
    let wanted = "registration: answered 500 Internal Server Error: no route; check that the service can reach NODE_URL \
                  http://node.lab.test:8080/";
    auth.until_status(|now| now.planes.first().registration_error.as_deref() == Some(wanted)).await;
}

#[tokio::test]
async fn registration_by_url_is_repeated_without_health_checks() {
    let mut auth = TestAuth::start(|config| {
        by_url(config);
        config.register_interval = Duration::from_secs(2);
    })
    .await;
    auth.register_url().await;
    auth.login("t", Duration::from_secs(3600)).await;
    let registered = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await; // in the middle of the interval
    auth.health_checks.probed();
    let again = auth.dds.expect(BY_URL).await;
    let waited = again.at - registered;
    assert!(waited >= Duration::from_millis(2900), "the health check postponed it: {waited:?}");
    assert!(auth.board.now().planes.first().last_healthcheck.is_some());
    busy(again);
    assert_eq!(auth.bearer().await, Ok("t".to_owned()), "the token stays in use");
    auth.register_url().await;
    auth.until_status(|now| now.planes.first().registration_error.is_none()).await;
}

#[tokio::test]
async fn wallet_is_registered_again_every_interval() {
    let interval = |config: &mut Config| config.register_interval = Duration::from_secs(1);
    let mut auth = TestAuth::started("t", Duration::from_secs(3600), interval).await;
    auth.health_checks.probed();
    auth.nonce().await;
    auth.dds.expect(REGISTER).await.answer(409, "two of you");
    let error = auth.until(RegistrationState::Conflict).await.registration_error.expect("a reason");
    assert!(error.starts_with("another node with this wallet is online"), "{error}");
    assert_eq!(auth.bearer().await, Ok("t".to_owned()), "the token stays in use");
    auth.register().await;
    assert_eq!(auth.until(RegistrationState::Registered).await.registration_error, None);
}

#[tokio::test]
async fn only_changed_capabilities_are_registered_again() {
    let mut auth = TestAuth::started("t", Duration::from_secs(3600), |_| {}).await;
    let named = |names: &[&str]| names.iter().map(|name| name.parse().expect("a name")).collect();
    auth.capabilities.send_replace(named(&["/a/v1", "/b/v1"]));
    auth.capabilities.send_replace(named(&["/b/v1"]));
    auth.nonce().await;
    let call = auth.dds.expect(REGISTER).await;
    assert_eq!(call.json()["capabilities"], json!(["/b/v1"]));
    auth.capabilities.send_replace(named(&["/b/v1", "/c/v1"]));
    call.ok(json!({}));
    auth.nonce().await;
    let call = auth.dds.expect(REGISTER).await;
    assert_eq!(call.json()["capabilities"], json!(["/b/v1", "/c/v1"]), "a change during a call is not missed");
    call.ok(json!({}));
    assert_eq!(auth.bearer().await, Ok("t".to_owned()));
}

#[tokio::test]
async fn repeated_rejections_cause_one_registration() {
    let mut auth = TestAuth::started("t0", Duration::from_secs(3600), |_| {}).await;
    let mut registered = 0;
    for n in 1..=5 {
        let token = auth.tokens.bearer().await.expect("held");
        auth.tokens.rejected(&token);
        registered += auth.login_amid_registrations(&format!("t{n}")).await.1;
        assert_eq!(auth.bearer().await, Ok(format!("t{n}")));
    }
    assert_eq!(registered, 1, "only one registration");
}

#[tokio::test]
async fn registrations_without_effect_have_growing_pauses() {
    let mut auth = TestAuth::start(|_| {}).await;
    let mut times = Vec::new();
    for _ in 0..5 {
        times.push(auth.nonce().await);
        auth.dds.expect(REGISTER).await.ok(json!({}));
        auth.nonce().await;
        auth.dds.expect(VERIFY).await.answer(403, "who are you");
    }
    let gaps: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (gap, least) in gaps.iter().zip([0, 50, 100, 200]) {
        assert!(*gap >= Duration::from_millis(least), "{gaps:?}");
    }
}

#[tokio::test]
async fn challenge_for_another_service_is_not_signed() {
    let mut auth = TestAuth::start(|config| config.sign_in_domain = Some("login.example".to_owned())).await;
    auth.dds.expect(REQUEST).await.ok(challenge());
    let error = auth.until(RegistrationState::Disconnected).await.registration_error.expect("a reason");
    assert_eq!(
        error,
        "sign-in challenge: field domain names dds.test.local, expected login.example; set \
         SIGN_IN_DOMAIN=dds.test.local if the service signs in for it"
    );
}

#[tokio::test]
async fn times_follow_the_clock_of_the_service() {
    for minutes in [-20, 20] {
        let mut auth = TestAuth::start(by_url).await;
        let clock = || Timestamp::now() + SignedDuration::from_mins(minutes);
        let dated = |status: u16, body: Value| {
            let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&clock());
            let answer = axum::response::Response::builder().status(status).header("date", date.expect("a date"));
            answer.body(axum::body::Body::from(body.to_string())).expect("a response")
        };
        // The first timestamp is by the local clock, the next one by the clock of the service.
        auth.dds.expect(BY_URL).await.respond(dated(503, json!({})));
        let call = auth.dds.expect(BY_URL).await;
        let signed: Timestamp = call.json()["timestamp"].as_str().expect("text").parse().expect("a timestamp");
        assert!(clock().duration_since(signed).as_secs().abs() < 10, "{minutes}: {signed}");
        assert_eq!(auth.health_checks.called_back(callback("s")), Ok(()));
        call.respond(dated(200, json!({})));
        auth.dds.expect(REQUEST).await.respond(dated(200, challenge()));
        let expiry = (clock() + SignedDuration::from_secs(60)).to_string();
        let token = json!({ "access_token": "t", "access_expires_at": expiry });
        auth.dds.expect(VERIFY).await.respond(dated(200, token));
        assert_eq!(auth.bearer().await, Ok("t".to_owned()), "{minutes} minutes");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(auth.dds.waiting().is_none(), "no storm of logins");
    }
}

#[tokio::test]
async fn errors_show_neither_secrets_nor_tokens() {
    let quoted = "top-\"secret\"-registration";
    let echo = json!({ "got": quoted, "plain": "top-secret-registration" }).to_string();
    for (answer, expected) in [(echo.as_str(), "[secret]"), (r#"{"access_token":"top-secret"}"#, "not shown")] {
        let mut auth = TestAuth::start(|config| config.reg_secret = quoted.into()).await;
        let answer = answer.replace("top-secret-registration", "-");
        auth.register().await;
        auth.nonce().await;
        auth.dds.expect(VERIFY).await.answer(500, answer);
        let error = auth.bearer().await.expect_err("no token").to_string();
        assert!(error.contains(expected) && !error.contains("secret\\\"-") && !error.contains("top-"), "{error}");
    }
}
