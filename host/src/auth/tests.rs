//! The room against a DDS that each test plays by hand.

mod registering;

use std::time::Instant;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::transport::testing::{BAD_BODIES, Call, Service, assert_clean};

const REQUEST: &str = "POST /prefix/internal/v1/auth/siwe/request";
const VERIFY: &str = "POST /prefix/internal/v1/auth/siwe/verify";
const REGISTER: &str = "POST /prefix/internal/v1/nodes/register-wallet";
const ADDRESS: &str = "0x1a642f0e3c3af545e7acbd38b07251b3990914f1";

/// A running room and the service it talks to.
struct World {
    dds: Service,
    tokens: TokenSource,
    status: watch::Receiver<Registration>,
    stop: CancellationToken,
    room: AbortOnDropHandle<()>,
    visits: Arc<dyn HealthChecks>,
    capabilities: watch::Sender<Vec<Capability>>,
}

impl World {
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
        let auth = Auth::new(config, served, transport::Client::new(transport::Config::default()));
        let (tokens, status, stop) = (auth.tokens(), auth.status(), CancellationToken::new());
        let visits = auth.health_checks();
        let room = AbortOnDropHandle::new(tokio::spawn(auth.run(stop.clone())));
        Self { dds, tokens, status, stop, room, visits, capabilities }
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

    /// Answers one login with a token of `ttl`; returns when its first call came.
    async fn login(&mut self, token: &str, ttl: Duration) -> Instant {
        let at = self.nonce().await;
        grant(self.dds.expect(VERIFY).await, token, ttl);
        at
    }

    /// As [`World::login`] while the room may register as well; when the login came, and how many
    /// registrations did.
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
                    grant(call, token, Duration::from_secs(3600));
                    return (at, registrations);
                }
            }
        }
    }

    /// A running room that has registered and logged in.
    async fn started(token: &str, ttl: Duration, adjust: impl FnOnce(&mut Config)) -> Self {
        let mut world = Self::start(adjust).await;
        world.register().await;
        world.login(token, ttl).await;
        assert_eq!(world.bearer().await, Ok(token.to_owned()));
        world
    }

    async fn bearer(&self) -> Result<String, AuthError> {
        let soon = tokio::time::timeout(Duration::from_secs(20), self.tokens.bearer());
        soon.await.expect("nobody waits for ever").map(|token| token.expose().to_owned())
    }

    async fn until(&mut self, state: RegistrationState) -> Registration {
        let wait = self
            .status
            .wait_for(|now| now.state == state && (now.error.is_some() || state == RegistrationState::Registered));
        tokio::time::timeout(Duration::from_secs(20), wait).await.expect("in time").expect("the room runs").clone()
    }
}

fn challenge() -> Value {
    json!({"nonce":"k3Yp9QwZ7t","domain":"dds.test.local","uri":"https://dds.test.local/login","version":"1","chainId":8453,
           "issuedAt":"2025-03-04T05:06:07Z"})
}

fn grant(call: Call, token: &str, ttl: Duration) {
    let expiry = Timestamp::now() + SignedDuration::try_from(ttl).expect("a short time");
    call.ok(json!({ "access_token": token, "access_expires_at": expiry.to_string() }));
}

#[tokio::test]
async fn registration_and_login_send_what_the_contract_says() {
    let mut world = World::start(|_| {}).await;
    world.nonce().await;
    let call = world.dds.expect(REGISTER).await;
    assert_eq!(call.headers["content-type"], "application/json");
    let signature = key::tests::vector_key().personal_sign(&siwe::tests::vector_message("a"));
    assert_eq!(
        call.json(),
        json!({ "message": siwe::tests::vector_message("a"), "signature": signature, "version": "1.2.3",
                "registration_credentials": "top-secret-registration", "capabilities": ["/a/v1", "/b/v1"] })
    );
    call.bad(200, "truncated"); // the body of a 2xx means nothing
    world.until(RegistrationState::Registered).await;
    world.nonce().await;
    let call = world.dds.expect(VERIFY).await;
    assert_eq!(
        call.json(),
        json!({ "address": ADDRESS, "message": siwe::tests::vector_message("a"), "signature": signature })
    );
    call.ok(json!({ "access_token": "t", "access_expires_at": null, "expires_at": "2125-01-01T00:00:00+02:00" }));
    assert_eq!(world.bearer().await, Ok("t".to_owned()));
}

#[tokio::test]
async fn many_callers_share_one_login() {
    let mut world = World::start(|_| {}).await;
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let tokens = world.tokens.clone();
            tokio::spawn(async move { tokens.bearer().await.map(|token| token.expose().to_owned()) })
        })
        .collect();
    world.register().await;
    world.login("shared", Duration::from_secs(3600)).await;
    for caller in callers {
        assert_eq!(caller.await.expect("no panic"), Ok("shared".to_owned()));
    }
    assert!(world.dds.waiting().is_none(), "one login serves everybody");
}

#[tokio::test]
async fn a_token_is_renewed_at_its_ratio() {
    let mut world = World::started("one", Duration::from_secs(4), |config| config.token_safety_ratio = 0.125).await;
    let got = Instant::now();
    let asked = world.login("two", Duration::from_secs(3600)).await;
    let waited = asked.duration_since(got);
    assert!(waited > Duration::from_millis(200) && waited < Duration::from_millis(3900), "{waited:?}");
    while world.bearer().await == Ok("one".to_owned()) {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.bearer().await, Ok("two".to_owned()));
}

#[tokio::test]
async fn a_valid_token_is_used_while_its_renewal_fails() {
    let mut world = World::started("valid", Duration::from_secs(60), |config| config.token_safety_ratio = 0.0).await;
    for _ in 0..3 {
        world.dds.expect(REQUEST).await.answer(503, "away");
        assert_eq!(world.bearer().await, Ok("valid".to_owned()));
    }
}

#[tokio::test]
async fn a_service_that_is_away_is_asked_at_a_falling_rate() {
    let mut world = World::start(|config| config.token_max_retries = 100).await;
    world.register().await;
    let mut times = Vec::new();
    for _ in 0..5 {
        let call = world.dds.expect(REQUEST).await;
        times.push(call.at);
        call.answer(500, "down");
    }
    let gaps: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (gap, least) in gaps.iter().zip([50, 100, 200, 400]) {
        assert!(*gap >= Duration::from_millis(least), "{gaps:?}");
    }
}

#[tokio::test]
async fn a_rejected_token_is_replaced_at_once_and_only_once() {
    let mut world = World::started("old", Duration::from_secs(3600), |_| {}).await;
    let old = world.tokens.bearer().await.expect("held");
    world.tokens.rejected(&old);
    world.login("new", Duration::from_secs(3600)).await;
    assert_eq!(world.bearer().await, Ok("new".to_owned()));
    world.tokens.rejected(&old); // late news about the old one
    assert_eq!(world.bearer().await, Ok("new".to_owned()));
    assert!(world.dds.waiting().is_none());
}

#[tokio::test]
async fn a_plane_that_rejects_every_token_causes_no_login_storm() {
    let mut world = World::started("t0", Duration::from_secs(3600), |_| {}).await;
    let mut times = Vec::new();
    for n in 1..=4 {
        let token = world.tokens.bearer().await.expect("held");
        world.tokens.rejected(&token);
        times.push(world.login_amid_registrations(&format!("t{n}")).await.0);
        assert_eq!(world.bearer().await, Ok(format!("t{n}")));
    }
    let gaps: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (gap, least) in gaps.iter().zip([50, 100, 200]) {
        assert!(*gap >= Duration::from_millis(least), "{gaps:?}");
    }
}

#[tokio::test]
async fn a_forgotten_wallet_is_registered_again() {
    for status in [403, 404] {
        let mut world = World::start(|_| {}).await;
        world.register().await;
        world.nonce().await;
        world.dds.expect(VERIFY).await.answer(status, "who are you");
        world.register().await;
        world.login("again", Duration::from_secs(3600)).await;
        assert_eq!(world.bearer().await, Ok("again".to_owned()));
        assert_eq!(world.until(RegistrationState::Registered).await.error, None);
    }
}

#[tokio::test]
async fn a_conflict_is_a_state_of_its_own_and_its_excerpt_holds_no_secret() {
    let mut world = World::start(|config| config.register_interval = Duration::from_secs(1)).await;
    world.nonce().await;
    world.dds.expect(REGISTER).await.answer(409, "taken by top-secret-registration\nsecond line");
    let seen = world.until(RegistrationState::Conflict).await;
    let error = seen.error.expect("a reason");
    assert_clean(&error);
    assert!(error.contains("another node") && error.contains("409") && error.contains("[secret]"), "{error}");
    assert!(matches!(world.bearer().await, Err(AuthError::Unavailable(_))), "users are told");
    world.register().await;
    assert_eq!(world.until(RegistrationState::Registered).await.error, None);
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let mut world = World::start(|_| {}).await;
    let call = world.dds.expect(REQUEST).await;
    let first = call.at;
    let busy =
        axum::response::Response::builder().status(429).header("retry-after", "3").body(axum::body::Body::empty());
    call.respond(busy.expect("a response"));
    let gap = world.dds.expect(REQUEST).await.at - first;
    assert!(gap >= Duration::from_secs(3), "{gap:?}");
}

#[tokio::test]
async fn nothing_to_serve_is_said_without_a_request() {
    let mut world = World::serving(&[], |_| {}).await;
    let seen = world.until(RegistrationState::Disconnected).await;
    assert_eq!(seen.error.as_deref(), Some("there is no capability to register; load a plugin"));
    assert!(world.dds.waiting().is_none());
}

#[tokio::test]
async fn stop_ends_a_call_under_way_and_every_wait() {
    let mut world = World::start(|_| {}).await;
    let held = world.dds.expect(REQUEST).await;
    let tokens = world.tokens.clone();
    let waiting = tokio::spawn(async move { tokens.bearer().await });
    world.stop.cancel();
    (&mut world.room).await.expect("ends cleanly");
    assert_eq!(waiting.await.expect("no panic"), Err(AuthError::Stopped));
    assert_eq!(world.bearer().await, Err(AuthError::Stopped));
    drop(held);
}

#[tokio::test]
async fn a_call_that_is_never_answered_ends_at_its_limit() {
    let mut world = World::start(|config| config.request_timeout = Duration::from_secs(1)).await;
    let held = world.dds.expect(REQUEST).await;
    let seen = world.until(RegistrationState::Registering).await;
    assert!(seen.error.as_deref().is_some_and(|error| error.contains("did not answer within 1s")), "{seen:?}");
    drop(held);
}

#[tokio::test]
async fn unusable_challenges_give_one_clean_line() {
    for kind in BAD_BODIES {
        let mut world = World::start(|_| {}).await;
        world.dds.expect(REQUEST).await.bad(200, kind);
        let error = world.until(RegistrationState::Registering).await.error.expect("a reason");
        assert_clean(&error);
        assert!(error.starts_with("sign-in challenge: "), "{kind}: {error}");
    }
    let mut world = World::start(|_| {}).await;
    let mut forged = challenge();
    forged["nonce"] = "x\nURI: https://elsewhere".into();
    world.dds.expect(REQUEST).await.ok(forged);
    let error = world.until(RegistrationState::Registering).await.error.expect("a reason");
    assert_eq!(error, "sign-in challenge: field nonce holds a control character, which is not signed");
}

#[tokio::test]
async fn unusable_logins_give_one_clean_line() {
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
        let mut world = World::start(|_| {}).await;
        world.register().await;
        world.nonce().await;
        let call = world.dds.expect(VERIFY).await;
        match kind {
            Some(kind) => call.bad(status, kind),
            None => call.answer(status, body.to_string()),
        }
        let error = world.bearer().await.expect_err("no token").to_string();
        assert_clean(&error);
        assert!(error.starts_with("login failed 1 times: sign-in: "), "{kind:?} {body}: {error}");
    }
}
