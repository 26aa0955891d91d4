//! The Node Runtime wire: runs from their creation to their end, with a hand-written node.

use std::time::Duration;

use http::Uri;
use tonic::Code;

use super::*;
use crate::{
    dev::Wires,
    leases::node_runtime::lease::{
        AckRequest, CompleteRequest, FailRequest, Lease, PullRequest, lease_service_client::LeaseServiceClient,
    },
    transport::{Http2, Http2Limits},
};

const CONNECTION: Http2Limits = Http2Limits {
    stream_window: 16 * 1024,
    ping_every: Duration::from_secs(310),
    ping_patience: Duration::from_secs(20),
    tcp_patience: Duration::from_secs(30),
};

pub(super) type Calls = LeaseServiceClient<Http2<tonic::body::Body>>;
pub(super) type Stream = tonic::Streaming<Lease>;

pub(super) fn config() -> Config {
    Config { wires: Wires::Both, ..Config::default() }
}

impl TestServer {
    pub(super) async fn register_run_node(&self, id: &str) -> Calls {
        let answer = self.post("/v1/nodes:register", None, &json!({"NODEID": id, "capacity": {"slots": 4}})).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.excerpt());
        self.calls().await
    }

    pub(super) async fn calls(&self) -> Calls {
        let url = self.server.url();
        let connection = self.client.http2(&url, CONNECTION).await.expect("the dev server speaks HTTP/2");
        LeaseServiceClient::with_origin(connection, url.as_str().parse::<Uri>().expect("a URL"))
    }

    /// A run with one input and this many attempts.
    pub(super) async fn run(&self, max_attempts: u32) -> String {
        let run = json!({
            "agentId": "agent", "version": "v1", "inputRef": {"message": "hi"}, "metadata": {"capability": HELLO},
            "maxAttempts": max_attempts, "traceId": "trace",
        });
        let answer = self.post("/v1/runs", None, &run).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.excerpt());
        body(&answer)["runId"].as_str().expect("an id").to_owned()
    }

    pub(super) async fn shown(&self, run: &str) -> Value {
        body(&self.get(&format!("/v1/runs/{run}"), None).await)
    }

    async fn cancel_run(&self, run: &str) -> Answer {
        self.post(&format!("/v1/runs/{run}:cancel"), None, &json!({"reason": "test"})).await
    }

    /// Waits until a run has this status.
    pub(super) async fn until_status(&self, run: &str, wanted: &str) {
        let id = Uuid::parse_str(run).expect("an id");
        let status = || self.server.inner.plane().run(id, self.server.inner.now()).expect("known")["status"].clone();
        let reached = self.server.until(|| (status() == wanted).then_some(()));
        tokio::time::timeout(LIMIT, reached).await.unwrap_or_else(|_| panic!("{run} is {}", status()));
    }
}

pub(super) async fn pull(calls: &mut Calls, node: &str, max_leases: i32) -> Stream {
    calls.pull(PullRequest { node_id: node.to_owned(), max_leases }).await.expect("a stream").into_inner()
}

pub(super) async fn next(stream: &mut Stream) -> Lease {
    let next = tokio::time::timeout(LIMIT, stream.message()).await.expect("a lease in time");
    next.expect("the stream is open").expect("a lease")
}

pub(super) async fn ack(calls: &mut Calls, node: &str, lease: &Lease) -> bool {
    let request = AckRequest { lease_id: lease.lease_id.clone(), node_id: node.to_owned(), ..AckRequest::default() };
    calls.ack(request).await.expect("an answer").into_inner().success
}

pub(super) async fn complete(calls: &mut Calls, node: &str, lease: &Lease) -> bool {
    let request = CompleteRequest {
        lease_id: lease.lease_id.clone(),
        run_id: lease.run_id.clone(),
        node_id: node.to_owned(),
        result: [("out".to_owned(), "done".to_owned())].into(),
        ..CompleteRequest::default()
    };
    calls.complete(request).await.expect("an answer").into_inner().success
}

/// Whether the failure was accepted, and whether the run is queued again.
pub(super) async fn fail(calls: &mut Calls, node: &str, lease: &Lease, retryable: bool) -> (bool, bool) {
    let request = FailRequest {
        lease_id: lease.lease_id.clone(),
        run_id: lease.run_id.clone(),
        node_id: node.to_owned(),
        error_message: "broken".to_owned(),
        retryable,
        ..FailRequest::default()
    };
    let answer = calls.fail(request).await.expect("an answer").into_inner();
    (answer.success, answer.should_retry)
}

#[tokio::test]
async fn acknowledged_run_counts_as_leased() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("w/1").await;
    let run = test_server.run(3).await;
    let mut stream = pull(&mut calls, "w/1", 2).await;
    let lease = next(&mut stream).await;
    let spec = lease.run_spec.clone().expect("a spec");
    assert_eq!((&*spec.agent_id, &*spec.version, &*spec.input_ref["message"]), ("agent", "v1", "hi"));
    assert_eq!((&*spec.metadata["capability"], &*lease.trace_id, &lease.run_id), (HELLO, "trace", &run));
    assert_eq!(spec.budgets.map(|budgets| (budgets.max_tokens, budgets.max_duration_seconds)), Some((4000, 60)));
    let left = lease.deadline_unix_ms - Timestamp::now().as_millisecond();
    assert!((250_000..=300_000).contains(&left), "{left} ms");
    let shown = test_server.shown(&run).await;
    assert_eq!((&shown["status"], &shown["attempts"]), (&json!("pending"), &json!(0)));

    assert!(!ack(&mut calls, "w/2", &lease).await, "another node");
    for _ in 0..2 {
        assert!(ack(&mut calls, "w/1", &lease).await);
        let shown = test_server.shown(&run).await;
        assert_eq!((&shown["status"], &shown["attempts"]), (&json!("assigned"), &json!(1)));
        assert_eq!(shown["nodeId"], "w/1");
    }
    assert!(complete(&mut calls, "w/1", &lease).await);
    let shown = test_server.shown(&run).await;
    assert_eq!((&shown["status"], &shown["result"]), (&json!("completed"), &json!({"out": "done"})));
    assert!(ack(&mut calls, "w/1", &lease).await, "the report has overtaken the acknowledgement");
    test_server.server.stop().await;
    let end = stream.message().await.expect_err("a stop is not a clean end");
    assert_eq!(end.code(), Code::Unavailable, "{end}");
}

#[tokio::test]
async fn first_report_of_a_run_wins() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    let run = test_server.run(3).await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let first = next(&mut stream).await;
    // Without an acknowledgement: the failure has overtaken it.
    assert_eq!(fail(&mut calls, "n", &first, true).await, (true, true));
    let second = next(&mut stream).await;
    assert_eq!(second.run_id, first.run_id);
    assert_ne!(second.lease_id, first.lease_id);
    assert!(!complete(&mut calls, "n", &first).await, "its lease has ended");
    assert!(!complete(&mut calls, "other", &second).await, "another node");
    assert!(complete(&mut calls, "n", &second).await);
    assert!(complete(&mut calls, "n", &second).await, "a repeat");
    assert_eq!(fail(&mut calls, "n", &second, true).await, (false, false), "a late report");
    let shown = test_server.shown(&run).await;
    assert_eq!(
        (&shown["status"], &shown["attempts"], &shown["errorInfo"]),
        (&json!("completed"), &json!(2), &Value::Null)
    );
    test_server.server.stop().await;
}

#[tokio::test]
async fn failed_run_is_queued_again_within_attempts() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let run = test_server.run(2).await;
    let lease = next(&mut stream).await;
    assert_eq!(fail(&mut calls, "n", &lease, true).await, (true, true));
    let lease = next(&mut stream).await;
    assert_eq!(fail(&mut calls, "n", &lease, true).await, (true, false), "the last attempt");
    let shown = test_server.shown(&run).await;
    assert_eq!((&shown["status"], &shown["errorInfo"]["errorMessage"]), (&json!("failed"), &json!("broken")));
    let run = test_server.run(2).await;
    let lease = next(&mut stream).await;
    assert_eq!(fail(&mut calls, "n", &lease, false).await, (true, false), "a retry would not help");
    assert_eq!(test_server.shown(&run).await["status"], "failed");
    test_server.server.stop().await;
}

#[tokio::test]
async fn lease_brings_a_token_for_its_domain_data() {
    let test_server = TestServer::with(Config {
        // The token of a run is not renewed. It lasts as long as the lease.
        domain_token_ttl: Duration::from_nanos(1),
        ..config()
    })
    .await;
    let mut calls = test_server.register_run_node("n").await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let (base, domain) = (test_server.server.url(), test_server.server.domain_id());
    let create = async |server: &str| {
        let metadata = json!({ "capability": HELLO, "domain_id": domain, "domain_server_url": server });
        let answer = test_server.post("/v1/runs", None, &json!({ "metadata": metadata })).await;
        body(&answer)["runId"].as_str().expect("an id").to_owned()
    };
    let data = format!("/api/v1/domains/{domain}/data");
    let status = async |token: &str| test_server.get(&data, Some(token)).await.status;
    let token_of = |lease: &Lease| lease.run_spec.as_ref().expect("a spec").metadata.get("access_token").cloned();

    let run = create(base.as_str().trim_end_matches('/')).await;
    let first = next(&mut stream).await;
    let first_token = token_of(&first).expect("a token");
    assert_eq!(status(&first_token).await, StatusCode::OK);
    assert_eq!(fail(&mut calls, "n", &first, true).await, (true, true));
    assert_eq!(status(&first_token).await, StatusCode::UNAUTHORIZED, "its lease has ended");
    let second = next(&mut stream).await;
    assert_eq!(second.run_id, run);
    let second_token = token_of(&second).expect("a token");
    assert_eq!(status(&second_token).await, StatusCode::OK);
    let shown = test_server.shown(&run).await;
    assert!(shown["metadata"].get("access_token").is_none(), "{shown}");
    assert!(complete(&mut calls, "n", &second).await);
    assert_eq!(status(&second_token).await, StatusCode::UNAUTHORIZED);

    // Another server gets no token.
    create("http://127.0.0.1:1").await;
    assert_eq!(token_of(&next(&mut stream).await), None);
    test_server.server.stop().await;
}

#[tokio::test]
async fn run_larger_than_a_message_is_refused() {
    let test_server = TestServer::with(config()).await;
    let (base, domain) = (test_server.server.url(), test_server.server.domain_id());
    let base = base.as_str().trim_end_matches('/');
    let run = |bytes: usize| {
        let metadata = json!({ "capability": HELLO, "domain_id": domain, "domain_server_url": base });
        json!({ "inputRef": { "data": "x".repeat(bytes) }, "metadata": metadata })
    };
    let refused = test_server.post("/v1/runs", None, &run(4_500_000)).await;
    assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
    let (text, wanted) = (refusal(&refused), "at most 4190208 (a gRPC message has at most 4 MiB)");
    assert!(text.contains(wanted), "{text}");
    // The answer has the run, so it is larger than the usual client accepts.
    let create = async |bytes: usize| {
        let request = http::Request::post(format!("{base}/v1/runs")).header("content-type", "application/json");
        let request = request.body(transport::full(run(bytes).to_string())).expect("a request");
        test_server.client.send(request, LIMIT).await.expect("the dev server answers").status()
    };
    // The largest one arrives, with its token.
    let mut bytes = (4 << 20) - 4096;
    while create(bytes).await == StatusCode::PAYLOAD_TOO_LARGE {
        bytes -= 64;
    }
    let mut calls = test_server.register_run_node("n").await;
    let lease = next(&mut pull(&mut calls, "n", 1).await).await;
    let spec = lease.run_spec.expect("a spec");
    assert_eq!((spec.input_ref["data"].len(), spec.metadata.contains_key("access_token")), (bytes, true));
    test_server.server.stop().await;
}

#[tokio::test]
async fn ended_lease_returns_its_run() {
    let test_server = TestServer::with(Config {
        run_ttl: Duration::from_millis(100),
        run_report_time: Duration::from_millis(100),
        ..config()
    })
    .await;
    let mut calls = test_server.register_run_node("n").await;
    let run = test_server.run(2).await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let first = next(&mut stream).await;
    assert!(ack(&mut calls, "n", &first).await);
    let second = next(&mut stream).await;
    assert_eq!(second.run_id, run);
    assert!(!complete(&mut calls, "n", &first).await, "its lease has ended");
    assert!(ack(&mut calls, "n", &second).await);
    test_server.until_status(&run, "failed").await;
    let error = test_server.shown(&run).await["errorInfo"]["errorMessage"].clone();
    assert_eq!(error, "lease expired on attempt 2 of 2");
    test_server.server.stop().await;
}

#[tokio::test]
async fn unacknowledged_run_returns_without_an_attempt() {
    let test_server = TestServer::with(Config { offer_ttl: Duration::from_millis(200), ..config() }).await;
    let mut calls = test_server.register_run_node("deaf").await;
    let run = test_server.run(1).await;
    let mut stream = pull(&mut calls, "deaf", 5).await;
    let lost = next(&mut stream).await;
    drop(stream);
    let mut other = test_server.register_run_node("other").await;
    let mut stream = pull(&mut other, "other", 5).await;
    let lease = next(&mut stream).await;
    assert_eq!((&lease.run_id, test_server.shown(&run).await["attempts"].clone()), (&run, json!(0)));
    assert!(!ack(&mut calls, "deaf", &lost).await, "too late");
    assert!(complete(&mut other, "other", &lease).await);
    test_server.server.stop().await;
}

#[tokio::test]
async fn max_leases_bounds_runs_that_a_node_holds() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    for _ in 0..4 {
        test_server.run(1).await;
    }
    let mut stream = pull(&mut calls, "n", 2).await;
    let (first, second) = (next(&mut stream).await, next(&mut stream).await);
    assert!(ack(&mut calls, "n", &first).await);
    // The next lease follows a report only.
    let waits = tokio::time::timeout(Duration::from_millis(300), stream.message()).await;
    assert!(waits.is_err(), "{waits:?}");
    assert!(complete(&mut calls, "n", &second).await);
    let third = next(&mut stream).await;
    assert!(third.run_id != first.run_id && third.run_id != second.run_id);
    test_server.server.stop().await;
}

#[tokio::test]
async fn full_or_draining_node_gets_no_run() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("a/b").await;
    let beat = async |state: &str, slots: u32| {
        let status = json!({"status": {"state": state, "activeRuns": 1, "availableSlots": slots}});
        test_server.post("/v1/nodes/a%2Fb:heartbeat", None, &status).await
    };
    assert_eq!(body(&beat("draining", 3).await)["status"]["state"], "draining");
    test_server.run(1).await;
    let mut stream = pull(&mut calls, "a/b", 2).await;
    let waits = tokio::time::timeout(Duration::from_millis(300), stream.message()).await;
    assert!(waits.is_err(), "{waits:?}");
    beat("active", 0).await;
    let waits = tokio::time::timeout(Duration::from_millis(300), stream.message()).await;
    assert!(waits.is_err(), "{waits:?}");
    beat("active", 1).await;
    next(&mut stream).await;
    assert_eq!(body(&test_server.get("/v1/nodes", None).await).as_array().map(Vec::len), Some(1));
    assert_eq!(test_server.send(Method::DELETE, "/v1/nodes/a%2Fb", None, &[], "").await.status, StatusCode::NO_CONTENT);
    let end = stream.message().await.expect_err("the node is gone");
    assert_eq!(end.code(), Code::NotFound, "{end}");
    assert_eq!(beat("active", 1).await.status, StatusCode::NOT_FOUND);
    test_server.server.stop().await;
}

#[tokio::test]
async fn cancelled_run_keeps_its_end() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    let queued = test_server.run(3).await;
    assert_eq!(body(&test_server.cancel_run(&queued).await)["status"], "cancelled");
    let mut stream = pull(&mut calls, "n", 1).await;
    let held = test_server.run(3).await;
    let lease = next(&mut stream).await;
    assert_eq!(lease.run_id, held, "the cancelled run is not leased");
    assert!(ack(&mut calls, "n", &lease).await);
    assert_eq!(body(&test_server.cancel_run(&held).await)["status"], "cancelled");
    // The wire cannot tell the node. Its report ends the matter, and changes nothing.
    assert!(complete(&mut calls, "n", &lease).await);
    let shown = test_server.shown(&held).await;
    assert_eq!((&shown["status"], &shown["result"]), (&json!("cancelled"), &Value::Null));
    let done = test_server.run(3).await;
    let lease = next(&mut stream).await;
    assert!(complete(&mut calls, "n", &lease).await);
    let refused = test_server.cancel_run(&done).await;
    assert_eq!(
        (refused.status, refusal(&refused)),
        (StatusCode::CONFLICT, "the run is completed and cannot be cancelled".to_owned())
    );
    let bare = test_server.post(&format!("/v1/runs/{done}:cancel"), None, &json!({})).await;
    assert_eq!((bare.status, refusal(&bare)), (StatusCode::BAD_REQUEST, "Reason is required".to_owned()));
    let unknown = test_server.cancel_run(&Uuid::nil().to_string()).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    test_server.server.stop().await;
}

#[tokio::test]
async fn unusable_calls_of_the_wire_are_refused() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.calls().await;
    let mut code = async |node: &str, max: i32| {
        let asked = calls.pull(PullRequest { node_id: node.to_owned(), max_leases: max }).await;
        asked.map(drop).expect_err("refused").code()
    };
    assert_eq!(code(" ", 1).await, Code::InvalidArgument);
    assert_eq!(code("n", 0).await, Code::InvalidArgument);
    assert_eq!(code("n", 1).await, Code::NotFound, "it has not registered");
    let answer = calls.ack(AckRequest::default()).await.expect("an answer").into_inner();
    assert_eq!((answer.success, &*answer.message), (false, "LeaseId is required"));
    let register = test_server.post("/v1/nodes:register", None, &json!({"nodeId": " "})).await;
    assert_eq!((register.status, refusal(&register)), (StatusCode::BAD_REQUEST, "NodeId is required".to_owned()));
    // A page in a browser can send text to another origin, and no JSON.
    let plain = [("content-type", "text/plain")];
    let text = test_server.send(Method::POST, "/v1/runs", None, &plain, r#"{"agentId":"a"}"#).await;
    assert_eq!(text.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let nameless = test_server.post("/v1/runs", None, &json!({"inputRef": {}})).await;
    assert_eq!(nameless.status, StatusCode::BAD_REQUEST);
    test_server.server.stop().await;
}

#[tokio::test]
async fn each_wire_gets_its_own_tasks() {
    let test_server = TestServer::with(config()).await;
    let (dms, mut calls) = (test_server.node(1, &[HELLO]).await, test_server.register_run_node("n").await);
    let (run, job) = (test_server.run(1).await, test_server.job(HELLO, 1));
    let lease = dms.lease(&test_server).await;
    assert_eq!(lease["task"]["job_id"], job.to_string());
    assert_eq!(dms.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
    let mut stream = pull(&mut calls, "n", 5).await;
    assert_eq!(next(&mut stream).await.run_id, run);
    let grant = test_server.server.grant();
    let jobs = body(&test_server.get("/v1/jobs", Some(&grant)).await);
    assert_eq!(jobs["items"].as_array().map(Vec::len), Some(1), "{jobs}");
    test_server.server.stop().await;
    let only = TestServer::with(Config { wires: Wires::NodeRuntime, ..Config::default() }).await;
    assert_eq!(only.get("/v1/tasks", None).await.status, StatusCode::NOT_FOUND);
    let other = TestServer::start().await;
    assert_eq!(other.post("/v1/runs", None, &json!({"agentId": "a"})).await.status, StatusCode::NOT_FOUND);
}
