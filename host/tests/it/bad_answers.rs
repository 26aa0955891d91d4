//! Unusable answers of services: one clear log line, no crash, no hang, no request storm. The node works again when the
//! service does.

use std::time::Instant;

use futures_util::future::join_all;
use serde_json::json;

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
};

const NONCE: &str = "POST /internal/v1/auth/siwe/request";
const VERIFY: &str = "POST /internal/v1/auth/siwe/verify";
const LEASE: &str = "GET /v1/tasks";
const BEAT: &str = "POST /v1/tasks/*/heartbeat";
const COMPLETE: &str = "POST /v1/tasks/*/complete";
const DATA: &str = "GET /api/v1/domains/*/data";

/// A node that gets `bad` once as the answer to `call` logs `event` with `text`, and then works.
async fn signs_in_after(call: &str, bad: Bad, event: &str, text: &str) {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(call, 1, bad);
    let node = proxy.node(&[fixtures::hello()]).set("REGISTER_MAX_RETRY", "1").set("REGISTER_INTERVAL_SECS", "1");
    let began = Instant::now();
    let node = node.start().await;
    let line = node.says(event).await;
    let error = line["error"].as_str().expect("text");
    assert!(error.contains(text) && error.contains(&proxy.address().to_string()), "{line}");
    node.says("node.leasing").await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    assert_eq!(node.said(event).len(), 1, "one line:\n{}", node.log());
    assert!(!node.log().contains("top-secr"), "the content is not repeated:\n{}", node.log());
    // One failed call, one to register, one to log in. The registration is repeated every second.
    let (count, took) = (proxy.count(call), began.elapsed());
    assert!(count as u64 <= 3 + took.as_secs(), "no storm: {count} of {call} in {took:?}");
}

#[tokio::test]
async fn unusable_challenges_are_retried() {
    join_all(Bad::answers().into_iter().map(|(bad, text)| signs_in_after(NONCE, bad, "registration.failed", text)))
        .await;
}

#[tokio::test]
async fn unusable_logins_are_retried() {
    join_all(Bad::answers().into_iter().map(|(bad, text)| signs_in_after(VERIFY, bad, "login.failed", text))).await;
}

#[tokio::test]
async fn challenge_with_extra_lines_is_not_signed() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(NONCE, 1, Bad::edit(|challenge| challenge["nonce"] = json!("1\nURI: https://elsewhere.example")));
    let node = proxy.node(&[fixtures::hello()]).set("REGISTER_MAX_RETRY", "1").set("REGISTER_INTERVAL_SECS", "1");
    let node = node.start().await;
    let line = node.says("registration.failed").await;
    assert_eq!(line["error"], "sign-in challenge: field nonce holds a control character, which is not signed");
    assert_eq!(proxy.count("POST /internal/v1/nodes/register-wallet"), 0);
    node.says("node.leasing").await;
}

#[tokio::test]
async fn challenge_for_another_domain_is_not_signed() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).set("SIGN_IN_DOMAIN", "login.example").start().await;
    let line = node.says("registration.failed").await;
    let error = line["error"].as_str().expect("text");
    assert!(error.starts_with("sign-in challenge: field domain names ") && error.contains("expected login.example"));
    assert_eq!(proxy.count("POST /internal/v1/nodes/register-wallet"), 0, "{line}");
    node.stop().await;
}

#[tokio::test]
async fn unusable_poll_answers_are_retried() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).leasing().await;
    for (bad, text) in Bad::answers().into_iter().chain([
        (Bad::Status(500, "out of order"), "answered 500: out of order"),
        (Bad::Cut, "did not answer"),
        (Bad::Json(json!({ "task": { "id": "no uuid" } })), "is not the expected JSON"),
        (Bad::Json(json!([])), "is not the expected JSON"),
    ]) {
        proxy.answer(LEASE, 1, bad);
        node.line(|line| {
            let error = line["error"].as_str().unwrap_or_default();
            line["event"] == "poll.failed" && line["level"] == "WARN" && error.contains(text)
        })
        .await;
    }
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    assert_eq!(node.said("poll.failed").len(), 9, "one line each:\n{}", node.log());
    assert!(!node.log().contains("top-secr"), "the content is not repeated:\n{}", node.log());
}

#[tokio::test]
async fn failed_polls_have_pauses() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "300").set("POLL_BACKOFF_MS_MAX", "300");
    proxy.answer(LEASE, usize::MAX, Bad::Status(503, "later"));
    let node = node.leasing().await;
    let began = Instant::now();
    proxy.seen(LEASE, 4).await;
    assert!(began.elapsed() >= std::time::Duration::from_millis(800), "{:?} for three pauses", began.elapsed());
    proxy.heal();
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

#[tokio::test]
async fn unusable_heartbeat_answers_are_retried() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).set("RUST_LOG", "info,runner_host::session=debug").leasing().await;
    for (bad, _) in Bad::answers() {
        proxy.answer(BEAT, 1, bad);
    }
    proxy.answer(BEAT, 1, Bad::Json(json!(["no", "object"])));
    proxy.answer(BEAT, 1, Bad::Status(502, "bad gateway"));
    // The set-up heartbeat is repeated within the lease. The runner waits for it.
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    let failed = node.said("heartbeat.failed");
    let warned = failed.iter().filter(|line| line["level"] == "WARN").count();
    assert_eq!(warned, 1, "one warning per failure: {failed:#?}");
    assert_eq!(node.said("heartbeat.recovered").len(), 1, "one line at its end");
    let errors: Vec<String> = failed.iter().map(|line| line["error"].as_str().unwrap_or_default().to_owned()).collect();
    let texts = Bad::answers().into_iter().map(|(_, text)| text).chain(["not an object", "answered 502: bad gateway"]);
    assert_eq!(errors.len(), 7, "{errors:#?}");
    for (error, text) in errors.iter().zip(texts) {
        assert!(error.contains(text), "{error} lacks {text}");
    }
    assert!(!node.log().contains("top-secr"), "the content is not repeated:\n{}", node.log());
}

#[tokio::test]
async fn permanent_setup_heartbeat_refusal_fails_the_setup() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).leasing().await;
    proxy.answer(BEAT, 1, Bad::Status(422, "this lease is not for you"));
    let ended = test_server.run(&node, "/examples/hello/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "node_setup_failed");
    assert_eq!(details["stage"], "initial_heartbeat");
    assert_eq!(details["error"], "control plane answered 422: this lease is not for you");
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

#[tokio::test]
async fn reports_repeat_until_any_2xx() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).leasing().await;
    proxy.answer(COMPLETE, 1, Bad::Status(500, "out of order"));
    proxy.answer(COMPLETE, 1, Bad::Cut);
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    // Only the first failure is logged.
    let waiting = node.said("report.waiting");
    assert_eq!(waiting.len(), 1, "{waiting:?}");
    assert_eq!(waiting[0]["error"], "control plane answered 500: out of order");
    let completed = async |wanted: usize| {
        node.page_until("/status.json", |page| page.1["ended"]["completed"] == wanted).await;
    };
    completed(1).await;
    for (number, (bad, _)) in Bad::answers().into_iter().enumerate() {
        // The body is ignored, so none of these answers delays the node.
        proxy.answer(COMPLETE, 1, bad);
        test_server.task("/examples/hello/v1").submit();
        completed(number + 2).await;
    }
    assert_eq!(node.status().await["unreported"], 0);
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

/// One task whose call to the domain server got a bad answer fails with `storage: <what> …<text>`, and
/// the next task succeeds.
async fn storage_fails(call: &str, capability: &str, what: &str) {
    let test_server = TestServer::with(|config| {
        config.request_max_bytes = 100_000;
        config.part_size = 64 * 1024;
    })
    .await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::echo(), fixtures::zoo()]).set("TRANSFER_PATIENCE", "0s").leasing().await;
    let input = test_server.put("in", b"some input").await;
    let submit = || test_server.task(capability).inputs(&[input]).meta(json!({ "bytes": 200_000 })).submit();
    for (bad, text) in Bad::answers() {
        proxy.answer(call, usize::MAX, bad);
        let ended = test_server.ended(&node, submit()).await;
        let (reason, details) = ended.failed();
        assert!(reason.starts_with(&format!("storage: {what}")), "{reason}");
        // The error about a download without multipart does not depend on its content.
        assert!(reason.contains(text) || reason.contains("multipart"), "{text}: {reason}");
        assert!(!reason.contains("top-secr"), "{reason}");
        assert_eq!(json!([details["outcome"], details["retryable"]]), json!(["storage", true]), "{reason}");
        proxy.heal();
    }
    test_server.ended(&node, submit()).await.completed();
}

#[tokio::test]
async fn unusable_download_is_a_storage_failure() {
    storage_fails("GET /api/v1/domains/*/data?ids=", "/examples/echo-bytes/v1", "download of input ").await;
}

#[tokio::test]
async fn unusable_search_is_a_storage_failure() {
    storage_fails("GET /api/v1/domains/*/data?name=", "/examples/echo-bytes/v1", "looking for an earlier echo-0.bin")
        .await;
}

#[tokio::test]
async fn unusable_upload_answer_is_a_storage_failure() {
    storage_fails("POST /api/v1/domains/*/data", "/examples/echo-bytes/v1", "upload of echo-0.bin").await;
}

#[tokio::test]
async fn unusable_multipart_start_is_a_storage_failure() {
    storage_fails("POST /api/v1/domains/*/data/multipart?uploads", "/fixtures/big-output/v1", "upload of big.bin")
        .await;
}

#[tokio::test]
async fn unusable_part_answer_is_a_storage_failure() {
    storage_fails("PUT /api/v1/domains/*/data/multipart", "/fixtures/big-output/v1", "upload of big.bin").await;
}

#[tokio::test]
async fn unusable_multipart_end_is_a_storage_failure() {
    storage_fails("POST /api/v1/domains/*/data/multipart?uploadId", "/fixtures/big-output/v1", "upload of big.bin")
        .await;
}

#[tokio::test]
async fn parts_are_retried_until_the_retry_limit() {
    let test_server = TestServer::with(|config| {
        config.request_max_bytes = 100_000;
        config.part_size = 64 * 1024;
    })
    .await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).set("TRANSFER_PATIENCE", "1s").leasing().await;
    let (part, abort) = ("PUT /api/v1/domains/*/data/multipart", "DELETE /api/v1/domains/*/data/multipart");
    proxy.answer(part, 1, Bad::Status(503, "later"));
    proxy.answer(part, 1, Bad::Cut);
    let ended = test_server.run(&node, "/fixtures/big-output/v1", json!({ "bytes": 200_000 })).await;
    let back = test_server.artifact(ended.completed(), "big.bin").await;
    assert!(back.len() == 200_000 && back.iter().enumerate().all(|(n, byte)| usize::from(*byte) == n % 251));
    assert_eq!(proxy.count(abort), 0);
    // An upload that cannot be finished is aborted.
    proxy.answer(part, usize::MAX, Bad::Status(503, "never"));
    let ended = test_server.run(&node, "/fixtures/big-output/v1", json!({ "bytes": 200_000 })).await;
    let reason = ended.failed().0;
    // Two parts are sent at a time. Either may fail first.
    assert!(reason.starts_with("storage: upload of big.bin (part "), "{reason}");
    assert!(reason.contains(") refused: server error (503): never (given up after "), "{reason}");
    assert!(ended.artifacts().is_empty());
    assert_eq!(proxy.count(abort), 1);
}

#[tokio::test]
async fn unreadable_limits_do_not_block_uploads() {
    for (bad, _) in Bad::answers().into_iter().chain([(Bad::Status(500, "no"), ""), (Bad::Cut, "")]) {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        proxy.answer("GET /api/v1/info", usize::MAX, bad);
        let node = proxy.node(&[fixtures::zoo()]).leasing().await;
        let ended = test_server.run(&node, "/fixtures/big-output/v1", json!({ "bytes": 3_000_000 })).await;
        assert_eq!(test_server.artifact(ended.completed(), "big.bin").await.len(), 3_000_000);
    }
}

#[tokio::test]
async fn domain_server_refusals_have_distinct_errors() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::echo()]).set("TRANSFER_PATIENCE", "0s").leasing().await;
    let input = test_server.put("in", b"some input").await;
    for (status, whose, words) in [
        (400, "runner failed", "refused: bad request (400): why"),
        (404, "runner failed", "refused: not found (404)"),
        (409, "runner failed", "refused: conflict (409): why"),
        (500, "storage", "refused: server error (500): why"),
        (302, "storage", "refused: unexpected redirect (302): why"),
    ] {
        proxy.answer(DATA, usize::MAX, Bad::Status(status, "why"));
        let ended =
            test_server.ended(&node, test_server.task("/examples/echo-bytes/v1").inputs(&[input]).submit()).await;
        let (reason, _) = ended.failed();
        assert!(reason.starts_with(&format!("{whose}: download of input {input} {words}")), "{reason}");
        proxy.heal();
    }
    // After one 401, the node uses a newer token.
    proxy.answer(DATA, 1, Bad::Status(401, "expired"));
    test_server.ended(&node, test_server.task("/examples/echo-bytes/v1").inputs(&[input]).submit()).await.completed();
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let elsewhere = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    elsewhere.set_nonblocking(true).expect("a listener can do that");
    let target = format!("http://{}/v1/tasks", elsewhere.local_addr().expect("a bound listener has an address"));
    let node = proxy.node(&[fixtures::echo()]).leasing().await;
    let input = test_server.put("in", b"some input").await;
    let submit = || test_server.task("/examples/echo-bytes/v1").inputs(&[input]).submit();
    for status in [302, 307] {
        for call in [LEASE, BEAT, DATA, COMPLETE] {
            let asked = proxy.count(call);
            proxy.answer(call, 1, Bad::Redirect(status, target.clone()));
            submit();
            proxy.seen(call, asked + 1).await;
        }
    }
    proxy.heal();
    test_server.ended(&node, submit()).await.completed();
    let line = node.says("poll.failed").await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains("answered 302")), "{line}");
    node.stop().await;
    // A connection would be in the queue of the listener by now.
    let accepted = elsewhere.accept();
    assert_eq!(accepted.expect_err("no redirect is followed").kind(), std::io::ErrorKind::WouldBlock);
}
