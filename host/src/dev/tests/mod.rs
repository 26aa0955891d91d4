//! Tests of a started dev server over loopback with hand-written requests. The requests are those of a node, an
//! author or a runner of any implementation.

mod by_url;
mod data;
mod faults;
mod identity;
mod jobs;
mod leases;
mod newer;
#[cfg(feature = "grpc")]
mod origin;
#[cfg(feature = "grpc")]
mod run_faults;
#[cfg(feature = "grpc")]
mod runs;

use std::time::Duration;

use http::{Method, Request, StatusCode};
use jiff::Timestamp;
use k256::ecdsa::SigningKey;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Config, DevServer, siwe};
use crate::transport::{self, Answer, Client};

/// Far longer than any call takes. It turns a hang into a failed test.
const LIMIT: Duration = Duration::from_secs(20);
const HELLO: &str = "/examples/hello/v1";

/// A dev server and a client.
pub(crate) struct TestServer {
    pub(crate) server: DevServer,
    client: Client,
}

impl TestServer {
    pub(crate) async fn start() -> Self {
        Self::with(Config::default()).await
    }

    pub(crate) async fn with(config: Config) -> Self {
        let server = DevServer::start(config).await.expect("starts on a free port");
        Self { server, client: Client::new(transport::Config::default()) }
    }

    /// Sends a request; `path` may carry a query.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        bearer: Option<&str>,
        headers: &[(&str, &str)],
        body: impl Into<bytes::Bytes>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.server.address()));
        if let Some(token) = bearer {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(transport::full(body)).expect("a request");
        self.client.call(request, LIMIT).await.expect("the dev server answers")
    }

    pub(crate) async fn get(&self, path: &str, bearer: Option<&str>) -> Answer {
        self.send(Method::GET, path, bearer, &[], "").await
    }

    pub(crate) async fn post(&self, path: &str, bearer: Option<&str>, body: &Value) -> Answer {
        self.send(Method::POST, path, bearer, &[("content-type", "application/json")], body.to_string()).await
    }

    /// A registered and logged-in node.
    pub(crate) async fn node(&self, key: u8, capabilities: &[&str]) -> TestNode {
        let mut node = TestNode { key: SigningKey::from_slice(&[key; 32]).expect("a key"), token: String::new() };
        assert_eq!(node.register(self, capabilities).await.status, StatusCode::OK);
        node.login(self).await;
        node
    }

    /// Creates a job with one task.
    fn job(&self, capability: &str, max_attempts: u32) -> Uuid {
        self.server
            .create_job(json!({"label": "one", "tasks": [task("s", capability, max_attempts)]}))
            .expect("a valid job")
    }
}

fn task(stage: &str, capability: &str, max_attempts: u32) -> Value {
    json!({"label": stage, "stage": stage, "capability": capability, "max_attempts": max_attempts})
}

fn body(answer: &Answer) -> Value {
    assert_eq!(answer.headers["content-type"], "application/json", "{}", answer.excerpt());
    answer.json().expect("JSON")
}

/// The text of a rejection.
fn refusal(answer: &Answer) -> String {
    body(answer)["error"].as_str().expect("a line").to_owned()
}

pub(crate) struct TestNode {
    key: SigningKey,
    pub(crate) token: String,
}

impl TestNode {
    fn wallet(&self) -> String {
        siwe::address(self.key.verifying_key())
    }

    fn sign(&self, message: &str) -> String {
        let (signature, recovery) = self.key.sign_prehash_recoverable(&siwe::digest(message));
        format!("0x{}{:02x}", siwe::hex(&signature.to_bytes()), recovery.to_byte() + 27)
    }

    /// Requests a nonce and composes the message.
    async fn message(&self, test_server: &TestServer) -> String {
        let asked = test_server.post("/internal/v1/auth/siwe/request", None, &json!({"wallet": self.wallet()})).await;
        let asked = body(&asked);
        let text = |name: &str| asked[name].as_str().expect("text").to_owned();
        format!(
            "{} wants you to sign in with your Ethereum account:\n{}\n\nURI: {}\nVersion: {}\nChain ID: {}\nNonce: {}\n\
             Issued At: {}",
            text("domain"),
            self.wallet(),
            text("uri"),
            text("version"),
            asked["chainId"].as_i64().expect("an integer"),
            text("nonce"),
            text("issuedAt"),
        )
    }

    async fn register(&self, test_server: &TestServer, capabilities: &[&str]) -> Answer {
        let message = self.message(test_server).await;
        let request = json!({
            "message": message, "signature": self.sign(&message), "registration_credentials": "any",
            "capabilities": capabilities, "version": "1.2.3",
        });
        test_server.post("/internal/v1/nodes/register-wallet", None, &request).await
    }

    async fn try_login(&self, test_server: &TestServer) -> Answer {
        let message = self.message(test_server).await;
        let request = json!({"address": self.wallet(), "message": message, "signature": self.sign(&message)});
        test_server.post("/internal/v1/auth/siwe/verify", None, &request).await
    }

    async fn login(&mut self, test_server: &TestServer) {
        let answer = self.try_login(test_server).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
        self.token = body(&answer)["access_token"].as_str().expect("a token").to_owned();
    }

    async fn poll(&self, test_server: &TestServer, query: &str) -> Answer {
        test_server.get(&format!("/v1/tasks{query}"), Some(&self.token)).await
    }

    pub(crate) async fn lease(&self, test_server: &TestServer) -> Value {
        let answer = self.poll(test_server, "").await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
        body(&answer)
    }

    pub(crate) async fn heartbeat(&self, test_server: &TestServer, lease: &Value, request: &Value) -> Answer {
        test_server.post(&path(lease, "heartbeat"), Some(&self.token), request).await
    }

    pub(crate) async fn complete(&self, test_server: &TestServer, lease: &Value, outputs: &[&str]) -> Answer {
        test_server
            .post(&path(lease, "complete"), Some(&self.token), &json!({"output_cids": outputs, "meta": {"a": 1}}))
            .await
    }

    pub(crate) async fn fail(&self, test_server: &TestServer, lease: &Value, reason: &str) -> Answer {
        test_server.post(&path(lease, "fail"), Some(&self.token), &json!({"reason": reason, "details": null})).await
    }
}

fn path(lease: &Value, call: &str) -> String {
    format!("/v1/tasks/{}/{call}", lease["task"]["id"].as_str().expect("an id"))
}
