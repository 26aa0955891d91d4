//! Runs the module against a test DDS. Each test decides its answers.

mod registering;

use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::model::{HostStatus, PlaneState, RegistrationState, StatusBoard};
use crate::transport::testing::{BAD_BODIES, Call, Service, assert_clean};

const REQUEST: &str = "POST /prefix/internal/v1/auth/siwe/request";
const VERIFY: &str = "POST /prefix/internal/v1/auth/siwe/verify";
const REGISTER: &str = "POST /prefix/internal/v1/nodes/register-wallet";
const ADDRESS: &str = "0x1a642f0e3c3af545e7acbd38b07251b3990914f1";

/// The running module and its service.
struct TestAuth {
    dds: Service,
    tokens: TokenSource,
    board: StatusBoard,
    stop: CancellationToken,
    running: AbortOnDropHandle<()>,
    health_checks: Arc<dyn HealthChecks>,
    capabilities: watch::Sender<Vec<Capability>>,
}

impl TestAuth {
    async fn start(adjust: impl FnOnce(&mut Config)) -> Self {
        Self::serving(&["/b/v1", "/a/v1", "/b/v1"], adjust).await
    }

    async fn serving(names: &[&str], adjust: impl FnOnce(&mut Config)) -> Self {
        let dds = Service::start().await;
        let names = names.iter().map(|name| name.parse().expect("a name"));
        let (capabilities, served) = watch::channel(names.collect());
        let mut config = Config {
            form: Form::Wallet,
            sign_in_domain: None,
            dds: dds.url.join("prefix//").expect("a URL"),
            reg_secret: "top-secret-registration".into(),
            key: key::tests::vector_key(),
            version: "1.2.3".into(),
            register_interval: Duration::from_secs(120),
            register_max_retry: -1,
            token_safety_ratio: 0.75,
            token_max_retries: 0,
            token_jitter: Duration::ZERO,
            request_timeout: Duration::from_secs(20),
        };
        adjust(&mut config);
        let board = StatusBoard::new(1, Vec::new());
        let client = transport::Client::new(transport::Config::default());
        let module = Auth::new(config, served, client, NodeEvents::new(board.clone()));
        let (tokens, stop) = (module.tokens(), CancellationToken::new());
        let health_checks = module.health_checks();
        let running = AbortOnDropHandle::new(tokio::spawn(module.run(stop.clone())));
        Self { dds, tokens, board, stop, running, health_checks, capabilities }
    }

    async fn nonce(&mut self) -> Instant {
        let call = self.dds.expect(REQUEST).await;
        assert_eq!(call.json(), json!({ "wallet": ADDRESS }));
        let at = call.at;
        call.ok(challenge());
        at
    }

    async fn register(&mut self) {
        self.nonce().await;
        self.dds.expect(REGISTER).await.answer(204, "");
    }

    /// Answers one login with a token of `ttl`. Returns the arrival time of its first call.
    async fn login(&mut self, token: &str, ttl: Duration) -> Instant {
        let at = self.nonce().await;
        answer_login(self.dds.expect(VERIFY).await, token, ttl);
        at
    }

    /// As [`TestAuth::login`], while registrations may arrive too. Returns the time of the login and the number of
    /// registrations.
    async fn login_amid_registrations(&mut self, token: &str) -> (Instant, usize) {
        let mut registrations = 0;
        loop {
            let call = self.dds.next().await;
            match call.path.as_str() {
                REQUEST => call.ok(challenge()),
                REGISTER => {
                    registrations += 1;
                    call.ok(json!({}));
                }
                other => {
                    assert_eq!(other, VERIFY);
                    let at = call.at;
                    answer_login(call, token, Duration::from_secs(3600));
                    return (at, registrations);
                }
            }
        }
    }

    /// A running module that has registered and logged in.
    async fn started(token: &str, ttl: Duration, adjust: impl FnOnce(&mut Config)) -> Self {
        let mut auth = Self::start(adjust).await;
        auth.register().await;
        auth.login(token, ttl).await;
        assert_eq!(auth.bearer().await, Ok(token.to_owned()));
        auth
    }

    async fn bearer(&self) -> Result<String, AuthError> {
        let soon = tokio::time::timeout(Duration::from_secs(20), self.tokens.bearer());
        soon.await.expect("no endless wait").map(|token| token.expose().to_owned())
    }

    /// Waits until the node has registered, or failed to register and entered `state`.
    async fn until(&self, state: RegistrationState) -> PlaneState {
        let is_registered = state == RegistrationState::Registered;
        self.until_status(|now| {
            now.planes.first().registration == state && now.planes.first().registration_error.is_none() == is_registered
        })
        .await
        .planes
        .first()
        .clone()
    }

    async fn until_status(&self, wanted: impl FnMut(&HostStatus) -> bool) -> HostStatus {
        tokio::time::timeout(Duration::from_secs(20), self.board.until(wanted)).await.expect("in time");
        self.board.now().clone()
    }
}

fn challenge() -> Value {
    json!({"nonce":"k3Yp9QwZ7t","domain":"dds.test.local","uri":"https://dds.test.local/login","version":"1","chainId":8453,
           "issuedAt":"2025-03-04T05:06:07Z"})
}

fn answer_login(call: Call, token: &str, ttl: Duration) {
    let expiry = Timestamp::now() + SignedDuration::try_from(ttl).expect("a short time");
    call.ok(json!({ "access_token": token, "access_expires_at": expiry.to_string() }));
}

#[tokio::test]
async fn registration_and_login_follow_the_protocol() {
    let mut auth = TestAuth::start(|_| {}).await;
    auth.nonce().await;
    let call = auth.dds.expect(REGISTER).await;
    assert_eq!(call.headers["content-type"], "application/json");
    let signature = key::tests::vector_key().personal_sign(&siwe::tests::vector_message("a"));
    assert_eq!(
        call.json(),
        json!({ "message": siwe::tests::vector_message("a"), "signature": signature, "version": "1.2.3",
                "registration_credentials": "top-secret-registration", "capabilities": ["/a/v1", "/b/v1"] })
    );
    call.bad(200, "truncated"); // the body of a 2xx is ignored
    auth.until(RegistrationState::Registered).await;
    auth.nonce().await;
    let call = auth.dds.expect(VERIFY).await;
    assert_eq!(
        call.json(),
        json!({ "address": ADDRESS, "message": siwe::tests::vector_message("a"), "signature": signature })
    );
    call.ok(json!({ "access_token": "t", "access_expires_at": null, "expires_at": "2125-01-01T00:00:00+02:00" }));
    assert_eq!(auth.bearer().await, Ok("t".to_owned()));
}

#[tokio::test]
async fn many_callers_share_one_login() {
    let mut auth = TestAuth::start(|_| {}).await;
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let tokens = auth.tokens.clone();
            tokio::spawn(async move { tokens.bearer().await.map(|token| token.expose().to_owned()) })
        })
        .collect();
    auth.register().await;
    auth.login("shared", Duration::from_secs(3600)).await;
    for caller in callers {
        assert_eq!(caller.await.expect("no panic"), Ok("shared".to_owned()));
    }
    assert!(auth.dds.waiting().is_none(), "one login serves all callers");
}

#[tokio::test]
async fn token_is_renewed_at_the_ratio() {
    let mut auth = TestAuth::started("one", Duration::from_secs(4), |config| config.token_safety_ratio = 0.125).await;
    let got = Instant::now();
    let asked = auth.login("two", Duration::from_secs(3600)).await;
    let waited = asked.duration_since(got);
    assert!(waited > Duration::from_millis(200) && waited < Duration::from_millis(3900), "{waited:?}");
    while auth.bearer().await == Ok("one".to_owned()) {
        tokio::task::yield_now().await;
    }
    assert_eq!(auth.bearer().await, Ok("two".to_owned()));
}

#[tokio::test]
async fn valid_token_stays_in_use_while_renewal_fails() {
    let mut auth = TestAuth::started("valid", Duration::from_secs(60), |config| config.token_safety_ratio = 0.0).await;
    for _ in 0..3 {
        auth.dds.expect(REQUEST).await.answer(503, "away");
        assert_eq!(auth.bearer().await, Ok("valid".to_owned()));
    }
}

#[tokio::test]
async fn failed_logins_have_growing_pauses() {
    let mut auth = TestAuth::start(|config| config.token_max_retries = 100).await;
    auth.register().await;
    let mut times = Vec::new();
    for _ in 0..5 {
        let call = auth.dds.expect(REQUEST).await;
        times.push(call.at);
        call.answer(500, "down");
    }
    let gaps: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (gap, least) in gaps.iter().zip([50, 100, 200, 400]) {
        assert!(*gap >= Duration::from_millis(least), "{gaps:?}");
    }
}

#[tokio::test]
async fn rejected_token_is_replaced_once() {
    let mut auth = TestAuth::started("old", Duration::from_secs(3600), |_| {}).await;
    let old = auth.tokens.bearer().await.expect("held");
    auth.tokens.rejected(&old);
    auth.login("new", Duration::from_secs(3600)).await;
    assert_eq!(auth.bearer().await, Ok("new".to_owned()));
    auth.tokens.rejected(&old); // a late rejection of the old token
    assert_eq!(auth.bearer().await, Ok("new".to_owned()));
    assert!(auth.dds.waiting().is_none());
}

#[tokio::test]
async fn rejected_fresh_tokens_cause_no_login_storm() {
    let mut auth = TestAuth::started("t0", Duration::from_secs(3600), |_| {}).await;
    let mut times = Vec::new();
    for n in 1..=4 {
        let token = auth.tokens.bearer().await.expect("held");
        auth.tokens.rejected(&token);
        times.push(auth.login_amid_registrations(&format!("t{n}")).await.0);
        assert_eq!(auth.bearer().await, Ok(format!("t{n}")));
    }
    let gaps: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (gap, least) in gaps.iter().zip([50, 100, 200]) {
        assert!(*gap >= Duration::from_millis(least), "{gaps:?}");
    }
}

#[tokio::test]
async fn unknown_wallet_is_registered_again() {
    for status in [403, 404] {
        let mut auth = TestAuth::start(|_| {}).await;
        auth.register().await;
        auth.nonce().await;
        auth.dds.expect(VERIFY).await.answer(status, "who are you");
        auth.register().await;
        auth.login("again", Duration::from_secs(3600)).await;
        assert_eq!(auth.bearer().await, Ok("again".to_owned()));
        assert_eq!(auth.until(RegistrationState::Registered).await.registration_error, None);
    }
}

#[tokio::test]
async fn conflict_has_its_state_and_hides_secrets() {
    let mut auth = TestAuth::start(|config| config.register_interval = Duration::from_secs(1)).await;
    auth.nonce().await;
    auth.dds.expect(REGISTER).await.answer(409, "taken by top-secret-registration\nsecond line");
    let seen = auth.until(RegistrationState::Conflict).await;
    let error = seen.registration_error.expect("a reason");
    assert_clean(&error);
    assert!(error.contains("another node") && error.contains("409") && error.contains("[secret]"), "{error}");
    assert!(matches!(auth.bearer().await, Err(AuthError::Unavailable(_))), "callers get an error");
    auth.register().await;
    assert_eq!(auth.until(RegistrationState::Registered).await.registration_error, None);
}

#[tokio::test]
async fn registration_obeys_retry_after() {
    let mut auth = TestAuth::start(|_| {}).await;
    let call = auth.dds.expect(REQUEST).await;
    let first = call.at;
    let busy =
        axum::response::Response::builder().status(429).header("retry-after", "3").body(axum::body::Body::empty());
    call.respond(busy.expect("a response"));
    let gap = auth.dds.expect(REQUEST).await.at - first;
    assert!(gap >= Duration::from_secs(3), "{gap:?}");
}

#[tokio::test]
async fn empty_capabilities_are_an_error_without_a_request() {
    let mut auth = TestAuth::serving(&[], |_| {}).await;
    let seen = auth.until(RegistrationState::Disconnected).await;
    assert_eq!(seen.registration_error.as_deref(), Some("there is no capability to register; load a plugin"));
    assert!(auth.dds.waiting().is_none());
}

#[tokio::test]
async fn stop_ends_calls_and_waits() {
    let mut auth = TestAuth::start(|_| {}).await;
    let held = auth.dds.expect(REQUEST).await;
    let tokens = auth.tokens.clone();
    let waiting = tokio::spawn(async move { tokens.bearer().await });
    auth.stop.cancel();
    (&mut auth.running).await.expect("ends cleanly");
    assert_eq!(waiting.await.expect("no panic"), Err(AuthError::Stopped));
    assert_eq!(auth.bearer().await, Err(AuthError::Stopped));
    drop(held);
}

#[tokio::test]
async fn unanswered_call_times_out() {
    let mut auth = TestAuth::start(|config| config.request_timeout = Duration::from_secs(1)).await;
    let held = auth.dds.expect(REQUEST).await;
    let seen = auth.until(RegistrationState::Registering).await;
    assert!(
        seen.registration_error.as_deref().is_some_and(|error| error.contains("did not answer within 1s")),
        "{seen:?}"
    );
    drop(held);
}

#[tokio::test]
async fn unusable_challenges_give_one_line_without_secrets() {
    for kind in BAD_BODIES {
        let mut auth = TestAuth::start(|_| {}).await;
        auth.dds.expect(REQUEST).await.bad(200, kind);
        let error = auth.until(RegistrationState::Registering).await.registration_error.expect("a reason");
        assert_clean(&error);
        assert!(error.starts_with("sign-in challenge: "), "{kind}: {error}");
    }
    let mut auth = TestAuth::start(|_| {}).await;
    let mut forged = challenge();
    forged["nonce"] = "x\nURI: https://elsewhere".into();
    auth.dds.expect(REQUEST).await.ok(forged);
    let error = auth.until(RegistrationState::Registering).await.registration_error.expect("a reason");
    assert_eq!(error, "sign-in challenge: field nonce holds a control character, which is not signed");
}

#[tokio::test]
async fn unusable_logins_give_one_line_without_secrets() {
    let mut answers: Vec<(u16, Option<&str>, Value)> =
        BAD_BODIES.iter().map(|kind| (200, Some(*kind), Value::Null)).collect();
    for body in [
        json!({ "access_token": "top-secret" }),
        json!({ "access_token": "", "expires_at": "2125-01-01T00:00:00Z" }),
        json!({ "access_token": "top-secret\n", "expires_at": "2125-01-01T00:00:00Z" }),
        json!({ "access_token": "top-secret", "expires_at": "1999-01-01T00:00:00Z" }),
        json!({ "access_token": "top-secret", "expires_at": 1_999_999_999 }),
        json!({ "access_token": "top-secret", "expires_at": "top-secret" }),
    ] {
        answers.push((200, None, body));
    }
    for (status, kind, body) in answers {
        let mut auth = TestAuth::start(|_| {}).await;
        auth.register().await;
        auth.nonce().await;
        let call = auth.dds.expect(VERIFY).await;
        match kind {
            Some(kind) => call.bad(status, kind),
            None => call.answer(status, body.to_string()),
        }
        let error = auth.bearer().await.expect_err("no token").to_string();
        assert_clean(&error);
        assert!(error.starts_with("login failed 1 times: sign-in: "), "{kind:?} {body}: {error}");
    }
}
