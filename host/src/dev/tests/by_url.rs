//! Registration with a URL and a callback over the wire.

use sha3::{Digest, Keccak256};

use super::*;
use crate::transport::testing::Service;

const REGISTER: &str = "/internal/v1/nodes/register";
const CALLED_BACK: &str = "POST /internal/v1/registrations";
const PROBED: &str = "GET /health";

impl TestNode {
    fn entry(&self, url: &str, at: Timestamp) -> Value {
        let timestamp = format!("{at:.9}");
        let digest: [u8; 32] = Keccak256::digest(format!("{url}{timestamp}")).into();
        let (signature, recovery) = self.key.sign_prehash_recoverable(&digest);
        json!({
            "url": url, "version": "1.2.3", "registration_credentials": "right", "timestamp": timestamp,
            "signature": format!("{}{:02x}", siwe::hex(&signature.to_bytes()), recovery.to_byte()),
            "public_key": siwe::hex(self.key.verifying_key().to_sec1_point(false).as_bytes()),
            "capabilities": [HELLO],
        })
    }

    /// Registers at `url`, with `page` answering the callback.
    async fn register_url(&self, test_server: &TestServer, page: &mut Service, url: &str) -> Answer {
        let entry = self.entry(url, Timestamp::now());
        let answered = async {
            let call = page.expect(CALLED_BACK).await;
            assert_eq!(call.headers["user-agent"].as_bytes()[..5], *b"DDS v");
            let body = call.json();
            assert!(body["id"].is_string() && body["organization_id"].is_string(), "{body}");
            assert!(body["secret"].as_str().is_some_and(|secret| secret.len() > 64), "{body}");
            assert!(body["domains"].is_array() && body["lighthouses_in_domains"].is_array(), "{body}");
            call.ok(json!({ "ok": true }));
        };
        tokio::join!(test_server.post(REGISTER, None, &entry), answered).0
    }
}

fn node(key: u8) -> TestNode {
    TestNode { key: SigningKey::from_slice(&[key; 32]).expect("a key"), token: String::new() }
}

#[tokio::test]
async fn registration_calls_node_url_back_then_probes_health() {
    let config = Config { health_interval: Duration::from_millis(10), ..Config::default() };
    let test_server = TestServer::with(config).await;
    let (mut page, mut node) = (Service::start().await, node(1));
    let url = page.url.to_string();
    assert!(url.ends_with('/'), "as older nodes print their keys");
    let answer = node.register_url(&test_server, &mut page, &url).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
    for _ in 0..2 {
        let probe = page.expect(PROBED).await;
        assert_eq!(probe.headers["user-agent"].as_bytes()[..5], *b"DDS v");
        probe.answer(200, "");
    }
    node.login(&test_server).await;
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
    test_server.server.stop().await;
}

#[tokio::test]
async fn node_url_changes_only_after_old_url_fails() {
    let test_server =
        TestServer::with(Config { health_interval: Duration::from_secs(3600), ..Config::default() }).await;
    let (mut first, mut second, mut node) = (Service::start().await, Service::start().await, node(1));
    let (first_url, second_url) = (first.url.to_string(), second.url.to_string());
    assert_eq!(node.register_url(&test_server, &mut first, &first_url).await.status, StatusCode::OK);
    first.expect(PROBED).await.answer(200, "");
    node.login(&test_server).await;
    assert_eq!(node.register_url(&test_server, &mut first, &first_url).await.status, StatusCode::OK);
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT, "its token stays valid");
    first.expect(PROBED).await.answer(200, "");

    let entry = node.entry(&second_url, Timestamp::now());
    let alive = async { first.expect(PROBED).await.answer(200, "") };
    let (refused, ()) = tokio::join!(test_server.post(REGISTER, None, &entry), alive);
    assert_eq!(refused.status, StatusCode::CONFLICT, "{}", refused.excerpt());
    assert!(second.waiting().is_none(), "the second is not called");
    drop(first);
    assert_eq!(
        node.register_url(&test_server, &mut second, &second_url).await.status,
        StatusCode::OK,
        "the first node is not reachable any more"
    );
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn registrations_with_a_url_are_checked() {
    let test_server = TestServer::with(Config { reg_secret: Some("right".to_owned()), ..Config::default() }).await;
    let node = node(1);
    let closed = {
        let unreachable = Service::start().await;
        unreachable.url.to_string()
    };
    let check = async |entry: Value, status: StatusCode, line: &str| {
        let answer = test_server.post(REGISTER, None, &entry).await;
        assert_eq!(answer.status, status, "{}", answer.excerpt());
        assert!(refusal(&answer).contains(line), "{}", answer.excerpt());
    };
    let now = Timestamp::now();
    let with = |field: &str, value: Value| {
        let mut entry = node.entry(&closed, now);
        entry[field] = value;
        entry
    };
    let (refused, bad) = (StatusCode::UNAUTHORIZED, StatusCode::BAD_REQUEST);
    check(with("signature", json!("00")), refused, "130 hex digits without 0x").await;
    check(with("url", json!("http://127.0.0.1:1")), refused, "of another key").await;
    check(with("public_key", json!("04")), refused, "of another key").await;
    check(with("registration_credentials", json!("wrong")), StatusCode::FORBIDDEN, "registration_credentials").await;
    check(with("capabilities", json!(["a b"])), bad, "white space").await;
    check(with("timestamp", Value::Null), bad, "expected a string").await;
    check(node.entry(&closed, now - Duration::from_secs(301)), refused, "301 s in the past").await;
    check(node.entry(&closed, now + Duration::from_secs(310)), refused, "s in the past").await;
    check(node.entry("https://127.0.0.1:1", now), bad, "http URLs on loopback only").await;
    check(node.entry("http://192.0.2.1", now), bad, "loopback only").await;
    check(node.entry("here", now), bad, "is not a URL").await;
    // The request is valid, but the node is unreachable.
    let unreachable = StatusCode::INTERNAL_SERVER_ERROR;
    check(node.entry(&closed, now), unreachable, "cannot be reached at its url").await;
    check(with("registration_credentials", json!("cmlnaHQ=")), unreachable, "cannot be reached").await;
    check(with("capabilities", json!([])), unreachable, "cannot be reached").await;
}
