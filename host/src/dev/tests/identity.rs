//! Sign-in and registration over the wire.

use super::*;

const LOGIN: &str = "/internal/v1/auth/siwe/verify";

#[tokio::test]
async fn registered_wallet_can_log_in_and_poll() {
    let test_server = TestServer::start().await;
    let mut node = TestNode { key: SigningKey::from_slice(&[1; 32]).expect("a key"), token: "none".to_owned() };
    assert_eq!(node.wallet(), "0x1a642f0e3c3af545e7acbd38b07251b3990914f1");
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(node.try_login(&test_server).await.status, StatusCode::FORBIDDEN, "not registered yet");
    assert_eq!(node.register(&test_server, &[HELLO]).await.status, StatusCode::OK);
    node.login(&test_server).await;
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
    assert_eq!(test_server.get("/v1//tasks", Some(&node.token)).await.status, StatusCode::NOT_FOUND);

    assert!(test_server.server.forget_wallet(&node.wallet()));
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(node.try_login(&test_server).await.status, StatusCode::FORBIDDEN);
    test_server.server.stop().await;
}

#[tokio::test]
async fn login_rejects_reused_nonce_wrong_signature_or_domain() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let message = node.message(&test_server).await;
    let request =
        |message: &str, signature: &str| json!({"address": node.wallet(), "message": message, "signature": signature});
    let forged = request(&message, &node.sign("something else"));
    assert_eq!(test_server.post(LOGIN, None, &forged).await.status, StatusCode::UNAUTHORIZED);
    let good = request(&message, &node.sign(&message));
    assert_eq!(test_server.post(LOGIN, None, &good).await.status, StatusCode::OK);
    let again = test_server.post(LOGIN, None, &good).await;
    assert_eq!((again.status, refusal(&again).contains("nonce")), (StatusCode::UNAUTHORIZED, true));
    let elsewhere = message.replacen("127.0.0.1", "127.0.0.2", 1);
    let elsewhere = test_server.post(LOGIN, None, &request(&elsewhere, &node.sign(&elsewhere))).await;
    assert_eq!(elsewhere.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn strict_identity_accepts_reregistration_only_from_same_process() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    assert_eq!(node.register(&test_server, &[HELLO]).await.status, StatusCode::OK);
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT, "its token stays valid");

    let mut strict = TestServer::with(Config { strict_identity: true, ..Config::default() }).await;
    let node = strict.node(1, &[HELLO]).await;
    assert_eq!(node.register(&strict, &[HELLO]).await.status, StatusCode::OK, "it is the same node");
    let first = std::mem::replace(&mut strict.client, Client::new(transport::Config::default()));
    assert_eq!(node.register(&strict, &[HELLO]).await.status, StatusCode::CONFLICT, "connections of another process");
    strict.client = first;
    assert_eq!(node.poll(&strict, "").await.status, StatusCode::NO_CONTENT, "the first node is not disturbed");
}

#[tokio::test]
async fn node_token_expires() {
    let test_server = TestServer::with(Config { node_token_ttl: Duration::from_millis(1), ..Config::default() }).await;
    let node = test_server.node(1, &[HELLO]).await;
    // The token expires either during the login or before a later poll.
    let refused = async { while node.poll(&test_server, "").await.status != StatusCode::UNAUTHORIZED {} };
    tokio::time::timeout(LIMIT, refused).await.expect("the token expires");
}

#[tokio::test]
async fn registrations_are_checked() {
    let test_server = TestServer::with(Config { reg_secret: Some("right".to_owned()), ..Config::default() }).await;
    let node = TestNode { key: SigningKey::from_slice(&[1; 32]).expect("a key"), token: String::new() };
    let check = async |change: Value, status: StatusCode, line: &str| {
        let message = node.message(&test_server).await;
        let mut request = json!({
            "message": message, "signature": node.sign(&message), "registration_credentials": "right",
            "capabilities": [HELLO], "version": "1.2.3",
        });
        for (name, value) in change.as_object().expect("an object") {
            request[name] = value.clone();
        }
        let answer = test_server.post("/internal/v1/nodes/register-wallet", None, &request).await;
        assert_eq!(answer.status, status, "{}", answer.excerpt());
        assert!(status.is_success() || refusal(&answer).contains(line), "{}", answer.excerpt());
    };
    check(json!({"registration_credentials": "wrong"}), StatusCode::FORBIDDEN, "registration_credentials").await;
    check(json!({"capabilities": []}), StatusCode::BAD_REQUEST, "0 entries").await;
    check(json!({"capabilities": ["a b"]}), StatusCode::BAD_REQUEST, "white space").await;
    check(json!({"version": 3}), StatusCode::BAD_REQUEST, "expected a string").await;
    check(json!({"version": ""}), StatusCode::BAD_REQUEST, "version is empty").await;
    check(json!({"message": "hello"}), StatusCode::BAD_REQUEST, "first line").await;
    check(json!({"signature": "0x00"}), StatusCode::UNAUTHORIZED, "130 hex digits").await;
    check(json!({}), StatusCode::OK, "").await;

    let nonce = "/internal/v1/auth/siwe/request";
    assert_eq!(test_server.post(nonce, None, &json!({"wallet": "0x12"})).await.status, StatusCode::BAD_REQUEST);
    let huge = test_server.post(nonce, None, &json!({"wallet": "x".repeat(100_000)})).await;
    assert_eq!(huge.status, StatusCode::PAYLOAD_TOO_LARGE);
    let broken = test_server.send(Method::POST, nonce, None, &[], "{").await;
    assert!(refusal(&broken).contains("not the expected JSON"));
}
