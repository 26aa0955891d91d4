//! Registration in both forms: when polling starts, the callback, repetition, conflicts.

use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures, within,
};

const NONCE: &str = "POST /internal/v1/auth/siwe/request";
const WALLET: &str = "POST /internal/v1/nodes/register-wallet";
const BY_URL: &str = "POST /internal/v1/nodes/register";
const LEASE: &str = "GET /v1/tasks";
const CALLBACK: &str = "/internal/v1/registrations";
const JSON: &str = "application/json";

#[tokio::test]
async fn polling_starts_after_callback_and_answer() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let (gate, held) = Bad::gate();
    proxy.answer(BY_URL, 1, held);
    let node = proxy.node(&[fixtures::hello()]).reachable().start().await;
    node.says("registration.called_back").await;
    assert_eq!(node.page("/health").await.0, 200, "the pages answer while the registration is in flight");
    let status = node.status().await;
    assert_eq!((&status["registration"], &status["registration_form"]), (&json!("registering"), &json!("callback")));
    assert_eq!(node.page("/ready").await.1["reason"], "not signed in (registering)");
    assert_eq!((proxy.count(NONCE), proxy.count(LEASE)), (0, 0), "the service has not answered yet");
    gate.cancel();
    node.says("node.leasing").await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    assert_eq!((proxy.count(BY_URL), proxy.count(WALLET)), (1, 0));
    // The dev server requests the node's health after the registration.
    let (_, status) = node.page_until("/status.json", |page| page.1["last_healthcheck"].is_string()).await;
    assert_eq!(status["registration"], "registered");
    node.stop().await;
}

#[tokio::test]
async fn registration_without_callback_starts_nothing() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(BY_URL, 1, Bad::Json(json!({})));
    let node = proxy.node(&[fixtures::hello()]).reachable().set("REQUEST_TIMEOUT_SECS", "1").start().await;
    let line = node.says("registration.failed").await;
    let error = line["error"].as_str().expect("text");
    assert!(
        error.starts_with("registration: accepted, but the service did not call back at NODE_URL http://127.0.0.1:"),
        "{line}"
    );
    assert_eq!((proxy.count(NONCE), proxy.count(LEASE)), (0, 0), "neither a login nor a poll");
    node.says("node.leasing").await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

// The node signs NODE_URL byte for byte.
#[tokio::test]
async fn node_url_is_registered_unchanged() {
    for written in ["http://LocalHost:PORT", "http://127.0.0.1:PORT/", "http://127.0.0.1:PORT/a/../b"] {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        proxy.answer(BY_URL, usize::MAX, Bad::Echo(403));
        let node = proxy.node(&[fixtures::hello()]).reachable_as(written).start().await;
        let refused = node.says("registration.failed").await;
        let port = node.address.rsplit_once(':').expect("an address").1;
        let wanted = format!("\"url\":\"{}\"", written.replace("PORT", port));
        assert!(refused["error"].as_str().is_some_and(|text| text.contains(&wanted)), "{wanted}: {refused}");
    }
}

#[tokio::test]
async fn form_follows_node_url_by_default() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).reachable().set("REGISTRATION", "wallet").leasing().await;
    assert_eq!((proxy.count(BY_URL), proxy.count(WALLET)), (0, 1));
    assert_eq!(node.status().await["registration_form"], "wallet");
    node.stop().await;
    let node = proxy.node(&[fixtures::hello()]).reachable().set("REGISTRATION", "callback").leasing().await;
    assert_eq!((proxy.count(BY_URL), proxy.count(WALLET)), (1, 1));
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

/// The rules for the callback (posemesh.md section 2.7).
#[tokio::test]
async fn callback_endpoint_follows_the_protocol() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(BY_URL, usize::MAX, Bad::Hang);
    let node = proxy.node(&[fixtures::hello()]).reachable().start().await;
    proxy.seen(BY_URL, 1).await;
    let text = |status: u16, text: &str| (status, text.to_owned());
    let wrong = text(422, "a field is missing or has another type; expected id and secret as text");
    let secret = |length: usize| json!({ "id": "a", "secret": "s".repeat(length) }).to_string();
    let full = json!({
        "id": "node-1", "secret": "s", "organization_id": null, "lighthouses_in_domains": [{ "a": 1 }], "domains": "x",
        "something": { "newer": true },
    });
    let too_large = json!({ "id": "a", "secret": "s", "domains": "x".repeat(300_000) }).to_string();
    for (kind, body, expected) in [
        (JSON, json!({ "id": " ", "secret": "s" }).to_string(), text(422, "missing id")),
        (JSON, json!({ "id": "a", "secret": "\t" }).to_string(), text(422, "missing secret")),
        (JSON, secret(4097), text(403, "secret too large")),
        (JSON, json!({ "secret": "top-secret" }).to_string(), wrong.clone()),
        (JSON, json!({ "id": "a" }).to_string(), wrong.clone()),
        (JSON, json!({ "id": 7, "secret": "top-secret" }).to_string(), wrong.clone()),
        (JSON, json!({ "id": "a", "secret": ["top-secret"] }).to_string(), wrong.clone()),
        (JSON, json!({ "id": "a", "secret": "s", "organization_id": 7 }).to_string(), wrong),
        (JSON, "{\"id\":\"a\",".to_owned(), text(400, "the body is not JSON")),
        ("text/plain", full.to_string(), text(415, "expected Content-Type: application/json")),
        (JSON, too_large, text(413, "the body is larger than 256 KiB")),
        (JSON, full.to_string(), text(200, "{\"ok\":true}")),
        ("application/json; charset=utf-8", secret(4096), text(200, "{\"ok\":true}")),
    ] {
        let (status, content_type, text) = node.post(CALLBACK, kind, body.clone()).await;
        assert_eq!((status, text), expected, "{kind} {body:.80}");
        assert!(status != 200 || content_type == JSON, "{content_type}");
    }
    let slashes = node.post(&format!("/{CALLBACK}"), JSON, secret(1)).await;
    assert_eq!(slashes.0, 200, "a base URL may end in a slash");
    assert_eq!(node.page(CALLBACK).await.0, 405);
    let mut limited = 0;
    for _ in 0..30 {
        limited += usize::from(node.post(CALLBACK, JSON, secret(1)).await.0 == 429);
    }
    assert!(limited >= 5, "only {limited} of 44 were limited");
    assert_eq!(proxy.count(NONCE), 0, "a callback alone starts no login");
    assert!(!node.log().contains("sssss") && !node.log().contains("top-secret"), "no secret in the log");
}

/// The number of incomplete bodies, and the wait for each, are bounded.
#[tokio::test]
async fn incomplete_callback_bodies_are_refused() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello()]).await;
    let head =
        format!("POST {CALLBACK} HTTP/1.1\r\nhost: node\r\ncontent-type: {JSON}\r\ncontent-length: 100\r\n\r\n{{");
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut sender = tokio::net::TcpStream::connect(&node.address).await.expect("the pages answer");
        sender.write_all(head.as_bytes()).await.expect("sent");
        slow.push(sender);
    }
    // One sender may send two bodies at once.
    let mut answered = 0;
    while node.post(CALLBACK, JSON, "{}").await.0 != 429 {
        answered += 1;
        assert!(answered < 11, "the third concurrent body must be refused");
    }
    // The node does not wait for this body. It answers, and closes the connection.
    let mut refused = tokio::net::TcpStream::connect(&node.address).await.expect("the pages answer");
    refused.write_all(head.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    within("a refusal", || node.log(), refused.read_to_end(&mut answer)).await.expect("an answer");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 429 ") && answer.contains("\r\nconnection: close\r\n"), "{answer}");
    // Another sender is not affected.
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.2:0".parse().expect("an address")).expect("all of 127.0.0.0/8 is this machine");
    let mut other = socket.connect(node.address.parse().expect("an address")).await.expect("the pages answer");
    let empty = "{}";
    let request = format!(
        "POST {CALLBACK} HTTP/1.1\r\nhost: node\r\ncontent-type: {JSON}\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{empty}"
    );
    other.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    within("an answer to another sender", || node.log(), other.read_to_end(&mut answer)).await.expect("an answer");
    assert!(answer.starts_with(b"HTTP/1.1 422 "), "{}", String::from_utf8_lossy(&answer));
    let mut answer = [0; 64];
    let first = within("an end of the wait", || node.log(), slow[0].read(&mut answer)).await.expect("an answer");
    assert!(answer[..first].starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&answer[..first]));
    let accepted = async {
        while node.post(CALLBACK, JSON, "{}").await.0 != 422 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await; // the pages offer no event to await
        }
    };
    within("an accepted body", || node.log(), accepted).await;
}

#[tokio::test]
async fn unexpected_callback_is_refused_and_not_logged() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello()]).await;
    let body = json!({ "id": "an-unknown-node", "secret": "an-unknown-secret" }).to_string();
    let (status, _, text) = node.post(CALLBACK, JSON, body).await;
    assert_eq!((status, text.as_str()), (409, "no registration is in flight"));
    assert_eq!(node.status().await["registration"], "registered");
    assert!(!node.log().contains("unknown-"), "{}", node.log());
}

#[tokio::test]
async fn registration_is_repeated_without_a_new_login() {
    let test_server = TestServer::with(|config| config.health_interval = std::time::Duration::from_secs(3600)).await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).reachable().set("REGISTER_INTERVAL_SECS", "1").leasing().await;
    // Health checks by other clients do not prove that the service knows the node.
    let asked = async {
        while proxy.count(BY_URL) < 3 {
            assert_eq!(node.page("/health").await.0, 200);
            tokio::time::sleep(std::time::Duration::from_millis(50)).await; // often, within the interval
        }
    };
    within("two repetitions", || node.log(), asked).await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    assert_eq!(proxy.count(NONCE), 1, "the token stays in use");
}

#[tokio::test]
async fn health_checks_postpone_the_next_registration() {
    let test_server = TestServer::with(|config| config.health_interval = std::time::Duration::from_millis(200)).await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).reachable().set("REGISTER_INTERVAL_SECS", "1").leasing().await;
    let time =
        |status: &Value, field: &str| status[field].as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok());
    let checked_late = |page: &(u16, Value)| {
        let since = time(&page.1, "registration_since");
        since
            .zip(time(&page.1, "last_healthcheck"))
            .is_some_and(|(from, to)| to.duration_since(from).as_millis() > 1500)
    };
    node.page_until("/status.json", checked_late).await;
    assert_eq!(proxy.count(BY_URL), 1);
    assert_eq!(node.page("/health").await.0, 200);
}

#[tokio::test]
async fn second_node_conflicts_until_the_first_ends() {
    let test_server = TestServer::start().await;
    let first = test_server.node(&[fixtures::hello()]).reachable().leasing().await;
    let second = test_server.node(&[fixtures::hello()]).reachable().set("SECP256K1_PRIVHEX", first.key.as_str());
    let second = second.set("REGISTER_INTERVAL_SECS", "1").start().await;
    let conflict = |page: &(u16, Value)| {
        let text = page.1["reason"].as_str().unwrap_or_default();
        text.starts_with(
            "not signed in (conflict): another node with this wallet is online; registration: answered 409",
        )
    };
    assert_eq!(second.page_until("/ready", conflict).await.0, 503);
    assert_eq!(second.status().await["registration"], "conflict");
    test_server.run(&first, "/examples/hello/v1", json!({})).await.completed();
    first.stop().await;
    second.says("node.leasing").await;
    test_server.run(&second, "/examples/hello/v1", json!({})).await.completed();
}

/// The service has not noticed yet that the killed process has ended.
#[tokio::test]
async fn restarted_node_registers_soon_after_conflicts() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let killed = proxy.node(&[fixtures::hello()]).leasing().await;
    killed.kill();
    killed.wait().await;
    proxy.answer(WALLET, 2, Bad::Status(409, "online"));
    let node = proxy.node(&[fixtures::hello()]).after(&killed).start().await;
    // The default REGISTER_INTERVAL_SECS is far longer than this waits.
    node.says("node.leasing").await;
    let pauses: Vec<_> = node.said("registration.failed").iter().map(|line| line["retry_in_ms"].clone()).collect();
    assert!(matches!(&pauses[..], [first, ..] if first.as_u64() <= Some(1200)), "{pauses:?}");
    assert_eq!(proxy.count(WALLET), 4);
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
}

#[tokio::test]
async fn conflict_is_shown_while_work_continues() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).set("REGISTER_INTERVAL_SECS", "1").leasing().await;
    assert_eq!(node.page("/ready").await.0, 200);
    proxy.answer(WALLET, 2, Bad::Status(409, "there are two of you"));
    let conflict = |page: &(u16, Value)| page.1["reason"].as_str().is_some_and(|text| text.starts_with("conflict: "));
    node.page_until("/ready", conflict).await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    node.page_until("/ready", |page| page.0 == 200).await;
}

#[tokio::test]
async fn unknown_node_registers_again() {
    for by_url in [false, true] {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        let node = proxy.node(&[fixtures::hello()]);
        let node = if by_url { node.reachable() } else { node }.leasing().await;
        let wallet = node.status().await["node"].as_str().expect("an address").to_owned();
        assert!(test_server.dev_server.forget_wallet(&wallet));
        test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
        assert_eq!(proxy.count(if by_url { BY_URL } else { WALLET }), 2);
        assert_eq!(node.said("registration.lost").len(), 1);
    }
}

#[tokio::test]
async fn signal_ends_a_node_during_registration() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    for call in [BY_URL, WALLET] {
        proxy.answer(call, usize::MAX, Bad::Hang);
    }
    let node = proxy.node(&[fixtures::hello()]).start().await;
    proxy.seen(WALLET, 1).await;
    node.stop().await;
    let node = proxy.node(&[fixtures::hello()]).reachable().start().await;
    proxy.seen(BY_URL, 1).await;
    node.stop().await;
    proxy.heal();
    proxy.answer(WALLET, usize::MAX, Bad::Status(403, "not on the list"));
    let node = proxy.node(&[fixtures::hello()]).start().await;
    node.says("registration.failed").await;
    node.stop().await;
}

#[tokio::test]
async fn only_semantic_versions_are_announced() {
    let own = env!("CARGO_PKG_VERSION");
    for (given, announced) in [("v1.2.3", "1.2.3"), ("V2.0.0-rc.1", "2.0.0-rc.1"), (" ", own), ("soon", own)] {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        proxy.answer(BY_URL, usize::MAX, Bad::Echo(403));
        let node = proxy.node(&[fixtures::hello()]).reachable().set("NODE_VERSION", given).start().await;
        let refused = node.says("registration.failed").await;
        let wanted = format!("\"version\":\"{announced}\"");
        assert!(refused["error"].as_str().is_some_and(|text| text.contains(&wanted)), "{given:?}: {refused}");
        assert_eq!(node.log().contains("is not a semantic version"), given == "soon");
    }
}
