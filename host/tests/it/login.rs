//! Node tokens on the wire: renewal, use until expiry, and pauses between logins.

use std::time::{Duration, Instant};

use runner_host::dev::Faults;
use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::TestNode,
};

const NONCE: &str = "POST /internal/v1/auth/siwe/request";
const VERIFY: &str = "POST /internal/v1/auth/siwe/verify";

/// A dev server whose node tokens have this lifetime, and a proxy before it.
async fn test_server(ttl: Duration) -> (TestServer, FaultProxy) {
    let test_server = TestServer::with(|config| config.node_token_ttl = ttl).await;
    let proxy = FaultProxy::before(&test_server).await;
    (test_server, proxy)
}

/// When the current token expires.
async fn expiry(node: &TestNode) -> jiff::Timestamp {
    let (_, status) = node.page_until("/status.json", |page| page.1["token_expires_at"].is_string()).await;
    status["token_expires_at"].as_str().expect("a token is held").parse().expect("a timestamp")
}

#[tokio::test]
async fn token_renews_at_three_quarters_of_its_life() {
    let (test_server, proxy) = test_server(Duration::from_secs(2)).await;
    let node = proxy.node(&[fixtures::hello()]).set("TOKEN_REAUTH_JITTER_MS", "0").leasing().await;
    let first = expiry(&node).await;
    proxy.seen(VERIFY, 2).await;
    let left = first.duration_since(jiff::Timestamp::now()).as_secs_f64();
    assert!((0.0..=0.6).contains(&left), "{left} s were left of 2");
    proxy.seen(VERIFY, 3).await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    // The dev server ends a token with the next login. A poll in progress may get a 401, and is repeated.
    assert!(node.said("poll.failed").is_empty() && node.said("login.failed").is_empty(), "{}", node.log());
}

#[tokio::test]
async fn token_is_used_until_expiry_during_an_outage() {
    let (test_server, proxy) = test_server(Duration::from_secs(3)).await;
    let setup = proxy.node(&[fixtures::hello()]).set("TOKEN_REAUTH_JITTER_MS", "0").set("TOKEN_SAFETY_RATIO", "0.1");
    let node = setup.leasing().await;
    let end = expiry(&node).await;
    proxy.answer(NONCE, usize::MAX, Bad::Status(503, "away"));
    node.says("login.failed").await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    assert_eq!(node.page("/ready").await.0, 200, "the token is valid");
    let away =
        |page: &(u16, Value)| page.1["reason"].as_str().is_some_and(|text| text.starts_with("not signed in: login"));
    let page = node.page_until("/ready", away).await;
    assert_eq!(page.0, 503);
    assert!(jiff::Timestamp::now() >= end, "the token was used until its expiry");
    // 100 ms doubling, with a jitter of a half downwards: six to eight attempts in three seconds.
    let asked = proxy.count(NONCE);
    assert!(asked <= 12, "{asked} logins in three seconds");
    proxy.heal();
    node.page_until("/ready", |page| page.0 == 200).await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

#[tokio::test]
async fn unanswered_login_times_out() {
    let (test_server, proxy) = test_server(Duration::from_secs(60)).await;
    proxy.answer(VERIFY, 1, Bad::Hang);
    let node = proxy.node(&[fixtures::hello()]).set("REQUEST_TIMEOUT_SECS", "1").start().await;
    let line = node.says("login.failed").await;
    assert!(line["error"].as_str().is_some_and(|text| text.contains("did not answer within 1s")), "{line}");
    node.says("node.leasing").await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

#[tokio::test]
async fn refused_registration_waits_for_the_interval() {
    let (_lab, proxy) = test_server(Duration::from_secs(60)).await;
    proxy.answer("POST /internal/v1/nodes/register-wallet", 1, Bad::Status(401, "wrong secret"));
    let node = proxy.node(&[fixtures::hello()]).set("REGISTER_INTERVAL_SECS", "1").start().await;
    let refused = node.says("registration.failed").await;
    assert_eq!((&refused["retry_in_ms"], &refused["state"]), (&json!(1000), &json!("disconnected")), "{refused}");
    let began = Instant::now();
    node.says("node.leasing").await;
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn callers_get_the_login_error_after_max_retries() {
    for (retries, message) in [(0, "login failed 1 times: "), (2, "login failed 3 times: ")] {
        let (test_server, proxy) = test_server(Duration::from_secs(60)).await;
        let node = proxy.node(&[fixtures::hello()]).set("TOKEN_REAUTH_JITTER_MS", "0");
        let node = node.set("TOKEN_REAUTH_MAX_RETRIES", retries.to_string()).leasing().await;
        proxy.answer(VERIFY, usize::MAX, Bad::Status(503, "later"));
        // A poll whose token is rejected waits for the next one.
        proxy.answer("GET /v1/tasks", 1, Bad::Status(401, "who are you?"));
        let first = node.says("poll.failed").await;
        assert!(first["error"].as_str().is_some_and(|error| error.contains(message)), "{retries}: {first}");
        proxy.seen(VERIFY, 1 + 6).await;
        let failed = node.said("login.failed");
        let counts: Vec<_> = failed.iter().map(|line| line["attempt"].as_u64()).collect();
        assert_eq!(counts, (1..=failed.len() as u64).map(Some).collect::<Vec<_>>(), "{failed:?}");
        // Pauses double, minus a jitter of up to a half. So each is longer than the second one before it.
        let pause = |line: &Value| line["retry_in_ms"].as_u64().expect("a pause");
        assert!(failed.windows(3).all(|three| pause(&three[0]) < pause(&three[2])), "{failed:?}");
        proxy.heal();
        test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
        node.stop().await;
    }
}

/// Single 401 answers end one token each. None of them causes a pause.
#[tokio::test]
async fn accepted_tokens_are_replaced_without_a_pause() {
    const POLL: &str = "GET /v1/tasks";
    let (_lab, proxy) = test_server(Duration::from_secs(60)).await;
    let node = proxy.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "200").set("POLL_BACKOFF_MS_MAX", "200");
    let node = node.leasing().await;
    for _ in 0..5 {
        proxy.seen(POLL, proxy.count(POLL) + 1).await;
        proxy.answer(POLL, 1, Bad::Status(401, "who are you?"));
        // The rejected poll, its repeat with a new token, and the next one.
        proxy.seen(POLL, proxy.count(POLL) + 3).await;
    }
    let rejected = node.said("token.rejected");
    assert_eq!(rejected.len(), 4, "the first is not logged: {rejected:#?}");
    for line in &rejected {
        assert_eq!((&line["event"], &line["retry_in_ms"]), (&json!("token.rejected"), &json!(0)), "{line}");
    }
    assert_eq!(proxy.count(VERIFY), 6);
    node.stop().await;
}

#[tokio::test]
async fn revoked_tokens_cost_one_second_and_no_report() {
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(2)).await;
    let rule = |skip| format!("[[fault]]\nendpoint = \"lease\"\nkind = \"revoke_token\"\ncount = 1\nskip = {skip}\n\n");
    let rules: String = (1..=6).map(|n| rule(n * 10)).collect();
    test_server.dev_server.set_faults(Faults::parse(&rules).expect("sound rules"));
    let node = test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "4").set("TOKEN_REAUTH_JITTER_MS", "200");
    let node = node.leasing().await;
    let submit = || test_server.task("/fixtures/ignores-cancel/v1").meta(json!({ "sleep_ms": 20 })).submit();
    for job in (0..70).map(|_| submit()).collect::<Vec<_>>() {
        test_server.ended(&node, job).await.completed();
    }
    let rejected = node.said("token.rejected");
    assert!(rejected.len() >= 3, "{rejected:#?}");
    for line in &rejected {
        let error = "the control plane rejects node tokens soon after it accepted them; check that no other node";
        assert!(line["error"].as_str().is_some_and(|text| text.starts_with(error)), "{line}");
        assert!(line["retry_in_ms"].as_u64() <= Some(1000), "{line}");
    }
    node.stop().await;
    assert!(node.said("report.refused").is_empty(), "{}", node.log());
}
