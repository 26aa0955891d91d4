//! Faults over the network: each kind, as a client sees it.

use std::time::Instant;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;
use crate::dev::{Faults, JournalEntry};

impl TestServer {
    pub(super) fn faults(&self, file: &str) {
        self.server.set_faults(Faults::parse(file).expect("a valid file"));
    }

    /// Sends one request on a new connection. Returns the bytes received and how the connection ended.
    pub(super) async fn exchange(&self, head: &str, bearer: &str, body: &str) -> (String, std::io::Result<()>) {
        let mut socket = TcpStream::connect(self.server.address()).await.expect("it listens");
        let (host, length) = (self.server.address(), body.len());
        let request = format!(
            "{head} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {bearer}\r\nContent-Length: {length}\r\n\
             Connection: close\r\n\r\n{body}"
        );
        socket.write_all(request.as_bytes()).await.expect("it reads");
        let mut came = Vec::new();
        let read = tokio::time::timeout(LIMIT, socket.read_to_end(&mut came)).await.expect("the connection ends");
        (String::from_utf8_lossy(&came).into_owned(), read.map(drop))
    }

    pub(super) fn last_seen(&self) -> JournalEntry {
        self.server.journal().pop().expect("a request")
    }
}

pub(super) fn is_reset(end: std::io::Result<()>) -> bool {
    end.is_err_and(|err| err.kind() == std::io::ErrorKind::ConnectionReset)
}

/// A rule that applies once to one call.
pub(super) fn once(endpoint: &str, rest: &str) -> String {
    format!("[[fault]]\nendpoint = \"{endpoint}\"\ncount = 1\n{rest}")
}

#[tokio::test]
async fn status_fault_answers_without_processing_the_request() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server.job(HELLO, 1);
    test_server
        .faults(&once("lease", "kind = \"status\"\ncode = 503\nheaders = { Retry-After = \"7\" }\nbody = \"later\""));
    let answer = node.poll(&test_server, "").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!((&answer.headers["retry-after"], &answer.body[..]), (&"7".parse().expect("a value"), &b"later"[..]));
    assert_eq!(test_server.server.job(job).expect("known")["tasks"][0]["status"], "queued");
    let seen = test_server.last_seen();
    assert_eq!((seen.endpoint, seen.fault, seen.status), (Some("lease"), Some("status"), 503));
    node.lease(&test_server).await;
    assert_eq!(test_server.last_seen().fault, None, "the rule is used up");
}

#[tokio::test]
async fn reset_fault_drops_request_without_processing_it() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server.job(HELLO, 1);
    test_server.faults(&once("lease", "kind = \"reset\""));
    let (came, end) = test_server.exchange("GET /v1/tasks", &node.token, "").await;
    assert!(is_reset(end) && came.is_empty(), "{came}");
    assert_eq!(test_server.server.job(job).expect("known")["tasks"][0]["status"], "queued");
    let seen = test_server.last_seen();
    assert_eq!((seen.fault, seen.status), (Some("reset"), 0));
}

#[tokio::test]
async fn lost_answer_fault_processes_request_without_answering() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    test_server.faults(&once("complete", "kind = \"lost_answer\""));
    let (came, end) = test_server.exchange(&format!("POST {}", path(&lease, "complete")), &node.token, "{}").await;
    assert!(is_reset(end) && came.is_empty(), "{came}");
    assert_eq!(test_server.server.job(job).expect("known")["job"]["status"], "completed");
}

#[tokio::test]
async fn reset_body_fault_resets_connection_in_mid_body() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.job(HELLO, 1);
    test_server.faults(&once("lease", "kind = \"reset_body\""));
    let (came, end) = test_server.exchange("GET /v1/tasks", &node.token, "").await;
    assert!(is_reset(end), "{came}");
    let (head, body) = came.split_once("\r\n\r\n").expect("a head");
    let promised = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    assert_eq!(promised, Some(body.len() * 2 + body.len() % 2).filter(|_| body.len() > 100), "{came}");

    let id = test_server.server.put_data("long", "bin", &[7; 300_000]).await.expect("stored");
    let ask = format!("GET /api/v1/domains/{}/data/{id}?raw=true", test_server.server.domain_id());
    test_server.faults(&once("by_id", "kind = \"reset_body\"\nafter_bytes = 200000"));
    let (came, end) = test_server.exchange(&ask, &test_server.server.grant(), "").await;
    let (head, body) = came.split_once("\r\n\r\n").expect("a head");
    assert!(is_reset(end) && head.to_lowercase().contains("content-length: 300000"), "{head}");
    // Bytes that were not sent yet are lost with the connection.
    assert!((1..=200_000).contains(&body.len()), "{}", body.len());
}

#[tokio::test]
async fn damaged_answers_are_valid_http() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let (first, second) = (test_server.job(HELLO, 1), test_server.job(HELLO, 1));
    test_server.faults(&once("lease", "kind = \"malformed\""));
    let answer = node.poll(&test_server, "").await;
    assert_eq!(
        (answer.status, &answer.headers["content-type"]),
        (StatusCode::OK, &"application/json".parse().expect("a value"))
    );
    assert!(answer.body.starts_with(b"{") && answer.json::<Value>().is_err());
    assert_eq!(test_server.server.job(first).expect("known")["tasks"][0]["status"], "leased", "the work was done");
    test_server.faults(&once("lease", "kind = \"wrong_type\""));
    let answer = node.poll(&test_server, "").await;
    assert_eq!(
        (answer.status, &answer.headers["content-type"]),
        (StatusCode::OK, &"text/html; charset=utf-8".parse().expect("a value"))
    );
    assert_eq!(test_server.server.job(second).expect("known")["tasks"][0]["status"], "leased");
    test_server.faults(&once("lease", "kind = \"oversize\"\nbytes = 100000"));
    let answer = node.poll(&test_server, "").await;
    assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 100_000), "also where there was no work");
    assert!(answer.json::<String>().is_ok());
    test_server.faults(&once("by_id", "kind = \"malformed\""));
    let id = test_server.server.put_data("bytes", "bin", b"0123456789").await.expect("stored");
    let ask = format!("/api/v1/domains/{}/data/{id}?raw=true", test_server.server.domain_id());
    assert_eq!(&test_server.get(&ask, Some(&test_server.server.grant())).await.body[..], b"01234");
}

#[tokio::test]
async fn delay_fault_delays_and_then_processes_request() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.faults(&once("lease", "kind = \"delay\"\ndelay = \"150ms\""));
    let began = Instant::now();
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
    assert!(began.elapsed() >= Duration::from_millis(150));
}

#[tokio::test]
async fn hangs_last_until_client_or_dev_server_ends() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.faults("[[fault]]\nendpoint = \"lease\"\nkind = \"hang\"");
    let asked = test_server.exchange("GET /v1/tasks", &node.token, "");
    let stop = async {
        test_server.server.journal_until(|seen| seen.iter().any(|seen| seen.fault == Some("hang"))).await;
        test_server.server.stop.cancel();
    };
    let ((came, end), ()) = tokio::join!(asked, stop);
    assert!(is_reset(end) && came.is_empty(), "{came}");
}

#[tokio::test]
async fn revoked_token_is_rejected_and_can_be_renewed() {
    let test_server = TestServer::start().await;
    let mut node = test_server.node(1, &[HELLO]).await;
    test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    test_server.faults(&once("heartbeat", "kind = \"revoke_token\""));
    assert_eq!(node.heartbeat(&test_server, &lease, &json!({})).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(node.heartbeat(&test_server, &lease, &json!({})).await.status, StatusCode::UNAUTHORIZED);
    node.login(&test_server).await;
    assert_eq!(node.heartbeat(&test_server, &lease, &json!({})).await.status, StatusCode::OK);

    let list = format!("/api/v1/domains/{}/data", test_server.server.domain_id());
    let old = lease["access_token"].as_str();
    assert_eq!(test_server.get(&list, old).await.status, StatusCode::OK);
    test_server.faults(&once("list", "kind = \"revoke_token\""));
    assert_eq!(test_server.get(&list, old).await.status, StatusCode::UNAUTHORIZED);
    let heartbeat = body(&node.heartbeat(&test_server, &lease, &json!({})).await);
    assert_eq!(test_server.get(&list, old).await.status, StatusCode::UNAUTHORIZED, "no grace for a revoked token");
    assert_eq!(test_server.get(&list, heartbeat["access_token"].as_str()).await.status, StatusCode::OK);
}

#[tokio::test]
async fn forgotten_node_must_register_again() {
    for endpoint in ["lease", "verify"] {
        let test_server = TestServer::start().await;
        let mut node = test_server.node(1, &[HELLO]).await;
        test_server.faults(&once(endpoint, "kind = \"forget_node\""));
        if endpoint == "lease" {
            assert_eq!(node.poll(&test_server, "").await.status, StatusCode::UNAUTHORIZED);
        }
        assert_eq!(node.try_login(&test_server).await.status, StatusCode::FORBIDDEN);
        assert_eq!(node.register(&test_server, &[HELLO]).await.status, StatusCode::OK);
        node.login(&test_server).await;
        assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
    }
}

#[tokio::test]
async fn stolen_lease_conflicts_and_task_requeues_after_expiry() {
    let test_server = TestServer::with(Config { lease_ttl: Duration::from_millis(300), ..Config::default() }).await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server.job(HELLO, 4);
    let lease = node.lease(&test_server).await;
    test_server.faults(&once("heartbeat", "kind = \"steal_lease\""));
    assert_eq!(node.heartbeat(&test_server, &lease, &json!({})).await.status, StatusCode::CONFLICT);
    assert_eq!(node.complete(&test_server, &lease, &[]).await.status, StatusCode::CONFLICT);
    let back = test_server.server.job_until(job, |job| job["tasks"][0]["status"] == "queued");
    assert_eq!(tokio::time::timeout(LIMIT, back).await.expect("re-queued")["tasks"][0]["attempts"], 2);
    let lease = node.lease(&test_server).await;
    test_server.faults(&once("list", "kind = \"steal_lease\""));
    let list = format!("/api/v1/domains/{}/data", test_server.server.domain_id());
    assert_eq!(test_server.get(&list, lease["access_token"].as_str()).await.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn clock_offset_changes_every_reported_time() {
    for (offset, minutes) in [("20m", 20), ("-20m", -20)] {
        let faults = Faults::parse(&format!("[[fault]]\nkind = \"clock_offset\"\noffset = \"{offset}\""));
        let test_server = TestServer::with(Config { faults: faults.expect("a valid file"), ..Config::default() }).await;
        let node = test_server.node(1, &[HELLO]).await;
        test_server.job(HELLO, 1);
        let answer = node.poll(&test_server, "").await;
        let lease = body(&answer);
        let now = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(minutes);
        let near = |at: jiff::Timestamp, ahead: i64| {
            (at.duration_since(now) - jiff::SignedDuration::from_secs(ahead)).abs()
                < jiff::SignedDuration::from_secs(20)
        };
        let date = jiff::fmt::rfc2822::parse(answer.headers["date"].to_str().expect("text")).expect("a date");
        assert!(near(date.timestamp(), 0), "{date}");
        assert!(near(lease["lease_expires_at"].as_str().expect("text").parse().expect("a time"), 60));
        let list = format!("/api/v1/domains/{}/data", test_server.server.domain_id());
        assert_eq!(test_server.get(&list, lease["access_token"].as_str()).await.status, StatusCode::OK);
        assert_eq!(node.heartbeat(&test_server, &lease, &json!({})).await.status, StatusCode::OK);
        assert_eq!(node.complete(&test_server, &lease, &[]).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn journal_page_lists_requests_with_faults() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.faults(&once("lease", "kind = \"status\"\ncode = 500"));
    node.poll(&test_server, "").await;
    let page = body(&test_server.get("/dev/v1/requests", None).await);
    let applied = page["requests"].as_array().expect("a list").last().expect("a request").clone();
    assert_eq!(
        (&applied["endpoint"], &applied["fault"], &applied["status"]),
        (&json!("lease"), &json!("status"), &json!(500))
    );
}
