//! Faults of the Node Runtime wire, as a client sees them.

use std::error::Error as _;

use tokio::net::TcpStream;
use tonic::{Code, Status};

use super::{
    faults::{is_reset, once},
    runs::{Calls, ack, complete, config, next, pull},
    *,
};
use crate::leases::node_runtime::lease::{AckRequest, AckResponse, Lease, PullRequest};

async fn try_pull(calls: &mut Calls) -> Result<tonic::Streaming<Lease>, Status> {
    let opened = calls.pull(PullRequest { node_id: "n".to_owned(), max_leases: 5 }).await;
    opened.map(tonic::Response::into_inner)
}

async fn try_ack(calls: &mut Calls, lease: &Lease) -> Result<AckResponse, Status> {
    let request = AckRequest { lease_id: lease.lease_id.clone(), node_id: "n".to_owned(), ..AckRequest::default() };
    let answer = tokio::time::timeout(LIMIT, calls.ack(request)).await.expect("the call ends");
    answer.map(tonic::Response::into_inner)
}

async fn end_of(stream: &mut tonic::Streaming<Lease>) -> Result<Option<Lease>, Status> {
    tokio::time::timeout(LIMIT, stream.message()).await.expect("the stream ends")
}

/// The HTTP/2 error code behind a status.
fn reset_code(status: &Status) -> Option<h2::Reason> {
    let mut cause = status.source();
    while let Some(err) = cause {
        if let Some(err) = err.downcast_ref::<h2::Error>() {
            return err.reason();
        }
        cause = err.source();
    }
    None
}

#[tokio::test]
async fn each_grpc_status_arrives() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    let run = test_server.run(1).await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let lease = next(&mut stream).await;
    for number in 1..=16 {
        let code = Code::from_i32(number);
        // The names of the wire, from the names of the library: `InvalidArgument`.
        let name = format!("{code:?}").chars().fold(String::new(), |name, letter| {
            let word = letter.is_uppercase() && !name.is_empty();
            format!("{name}{}{}", if word { "_" } else { "" }, letter.to_ascii_uppercase())
        });
        let rule = format!("kind = \"grpc_status\"\ncode = \"{name}\"\nmessage = \"é 100%\"");
        test_server.faults(&once("ack", &rule));
        let status = try_ack(&mut calls, &lease).await.expect_err("a status");
        assert_eq!((status.code(), status.message()), (code, "é 100%"), "{name}");
        assert_eq!(test_server.last_seen().fault, Some("grpc_status"));
    }
    assert_eq!(test_server.shown(&run).await["status"], "pending", "the call is not executed");
    for endpoint in ["run_complete", "run_fail", "pull"] {
        test_server.faults(&once(endpoint, "kind = \"grpc_status\"\ncode = \"ABORTED\""));
        let status = match endpoint {
            "run_complete" => {
                calls.complete(crate::leases::node_runtime::lease::CompleteRequest::default()).await.map(drop)
            }
            "run_fail" => calls.fail(crate::leases::node_runtime::lease::FailRequest::default()).await.map(drop),
            _ => try_pull(&mut calls).await.map(drop),
        };
        assert_eq!(status.expect_err("a status").code(), Code::Aborted, "{endpoint}");
    }
    test_server.server.stop().await;
}

#[tokio::test]
async fn streams_end_after_their_leases() {
    for (kind, end) in [
        ("kind = \"grpc_status\"\ncode = \"OK\"", None),
        ("kind = \"grpc_status\"\ncode = \"CANCELLED\"", Some(Code::Cancelled)),
        ("kind = \"goaway\"", Some(Code::Unavailable)),
        ("kind = \"rst_stream\"\ncode = \"ENHANCE_YOUR_CALM\"", Some(Code::Unknown)),
        ("kind = \"reset\"", Some(Code::Unknown)),
    ] {
        let test_server = TestServer::with(config()).await;
        let mut calls = test_server.register_run_node("n").await;
        for _ in 0..3 {
            test_server.run(1).await;
        }
        for leases in [0, 2] {
            test_server.faults(&once("pull", &format!("{kind}\nafter_leases = {leases}")));
            let mut calls = test_server.calls().await;
            let ended = match try_pull(&mut calls).await {
                Ok(mut stream) => {
                    for _ in 0..leases {
                        next(&mut stream).await;
                    }
                    end_of(&mut stream).await
                }
                // The reset has overtaken the head of the answer.
                Err(status) => {
                    assert_eq!(leases, 0, "{kind} {status:?}");
                    Err(status)
                }
            };
            assert_eq!(ended.as_ref().err().map(Status::code), end, "{kind} {ended:?}");
            assert!(!matches!(ended, Ok(Some(_))), "{kind}");
            let reset = ended.err().as_ref().and_then(reset_code) == Some(h2::Reason::ENHANCE_YOUR_CALM);
            assert_eq!(reset, kind.contains("rst_stream"), "{kind}");
        }
        test_server.faults("");
        let mut stream = pull(&mut calls, "n", 5).await;
        next(&mut stream).await;
        test_server.server.stop().await;
    }
}

#[tokio::test]
async fn clean_end_without_leases_has_no_error() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    test_server.run(1).await;
    test_server.faults(&once("pull", "kind = \"grpc_status\"\ncode = \"OK\""));
    let mut stream = try_pull(&mut calls).await.expect("no error");
    assert_eq!(end_of(&mut stream).await.expect("no error"), None);
    test_server.server.stop().await;
}

#[tokio::test]
async fn reset_stream_leaves_the_connection() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    test_server.run(1).await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let lease = next(&mut stream).await;
    for (name, reason) in [("REFUSED_STREAM", h2::Reason::REFUSED_STREAM), ("CANCEL", h2::Reason::CANCEL)] {
        test_server.faults(&once("ack", &format!("kind = \"rst_stream\"\ncode = \"{name}\"")));
        let status = try_ack(&mut calls, &lease).await.expect_err("no answer");
        assert_eq!(reset_code(&status), Some(reason), "{status:?}");
    }
    assert!(ack(&mut calls, "n", &lease).await, "on the same connection");
    let run = test_server.run(1).await;
    assert_eq!(next(&mut stream).await.run_id, run);
    test_server.server.stop().await;
}

#[tokio::test]
async fn goaway_answers_the_call_and_ends_the_connection() {
    let test_server = TestServer::with(config()).await;
    test_server.register_run_node("n").await;
    let socket = TcpStream::connect(test_server.server.address()).await.expect("it listens");
    let (send, connection) = h2::client::handshake(socket).await.expect("HTTP/2");
    let ended = tokio::spawn(connection);
    let call = || {
        let uri = format!("http://{}/lease.LeaseService/Ack", test_server.server.address());
        let request = Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
        request.body(()).expect("a request")
    };
    test_server.faults(&once("ack", "kind = \"goaway\""));
    let mut send = send.ready().await.expect("it takes calls");
    let (answer, mut body) = send.send_request(call(), false).expect("sent");
    body.send_data(bytes::Bytes::from_static(&[0; 5]), true).expect("sent");
    assert_eq!(answer.await.expect("an answer").status(), StatusCode::OK);
    ended.await.expect("no panic").expect("the connection ends without an error");
    let err = send.ready().await.map(drop).expect_err("it takes no calls");
    assert!(err.is_go_away() && err.is_remote(), "{err:?}");
    assert_eq!(err.reason(), Some(h2::Reason::NO_ERROR));
    test_server.server.stop().await;
}

#[tokio::test]
async fn reset_breaks_all_calls_of_its_connection() {
    for kind in ["reset", "lost_answer", "reset_body"] {
        let test_server = TestServer::with(config()).await;
        let mut calls = test_server.register_run_node("n").await;
        let run = test_server.run(1).await;
        let mut stream = pull(&mut calls, "n", 5).await;
        let lease = next(&mut stream).await;
        test_server.faults(&once("ack", &format!("kind = \"{kind}\"")));
        assert!(try_ack(&mut calls, &lease).await.is_err());
        assert!(end_of(&mut stream).await.is_err(), "{kind}: the stream is on the same connection");
        let expected = if kind == "reset" { "pending" } else { "assigned" };
        assert_eq!(test_server.shown(&run).await["status"], expected, "{kind}");
        test_server.server.stop().await;
    }
}

#[tokio::test]
async fn silent_stream_stays_open() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    let (first, _) = (test_server.run(1).await, test_server.run(1).await);
    test_server.faults(&once("pull", "kind = \"hang\"\nafter_leases = 1"));
    let mut stream = pull(&mut calls, "n", 5).await;
    assert_eq!(next(&mut stream).await.run_id, first);
    let waits = tokio::time::timeout(Duration::from_millis(300), stream.message()).await;
    assert!(waits.is_err(), "{waits:?}");
    test_server.server.stop.cancel();
    assert!(end_of(&mut stream).await.is_err());
    test_server.server.stop().await;
}

#[tokio::test]
async fn second_lease_replaces_the_first_one() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    let run = test_server.run(1).await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let first = next(&mut stream).await;
    test_server.faults(&once("ack", "kind = \"second_lease\""));
    assert!(!ack(&mut calls, "n", &first).await);
    let second = next(&mut stream).await;
    assert_eq!(second.run_id, run);
    assert_ne!(second.lease_id, first.lease_id);
    assert!(ack(&mut calls, "n", &second).await);
    test_server.faults(&once("run_complete", "kind = \"second_lease\""));
    assert!(!complete(&mut calls, "n", &second).await);
    let third = next(&mut stream).await;
    assert_eq!(third.run_id, run);
    assert!(!complete(&mut calls, "n", &second).await, "its lease has ended");
    assert!(complete(&mut calls, "n", &third).await);
    test_server.server.stop().await;
}

#[tokio::test]
async fn stolen_run_returns_after_its_lease() {
    let test_server = TestServer::with(Config { lease_ttl: Duration::from_millis(200), ..config() }).await;
    let mut calls = test_server.register_run_node("n").await;
    let run = test_server.run(5).await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let first = next(&mut stream).await;
    test_server.faults(&once("run_complete", "kind = \"steal_lease\""));
    assert!(!complete(&mut calls, "n", &first).await);
    let second = next(&mut stream).await;
    assert_eq!(second.run_id, run);
    assert!(complete(&mut calls, "n", &second).await);
    test_server.server.stop().await;
}

#[tokio::test]
async fn forgotten_run_node_is_unknown() {
    let test_server = TestServer::with(config()).await;
    let mut calls = test_server.register_run_node("n").await;
    test_server.faults(&once("pull", "kind = \"forget_node\""));
    assert_eq!(try_pull(&mut calls).await.map(drop).expect_err("unknown").code(), Code::NotFound);
    test_server.register_run_node("a/b").await;
    test_server.faults(&once("node_heartbeat", "kind = \"forget_node\""));
    let answer = test_server.post("/v1/nodes/a%2Fb:heartbeat", None, &json!({})).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    test_server.server.stop().await;
}

#[tokio::test]
async fn http_faults_apply_to_calls_of_nodes() {
    let test_server = TestServer::with(config()).await;
    let node = json!({"nodeId": "n"});
    test_server.faults(&once("node_register", "kind = \"status\"\ncode = 500"));
    assert_eq!(test_server.post("/v1/nodes:register", None, &node).await.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(test_server.get("/v1/nodes/n", None).await.status, StatusCode::NOT_FOUND, "not executed");
    test_server.faults(&once("node_register", "kind = \"malformed\""));
    let answer = test_server.post("/v1/nodes:register", None, &node).await;
    assert!(answer.status.is_success() && answer.json::<Value>().is_err());
    test_server.faults(&once("node_heartbeat", "kind = \"wrong_type\""));
    let answer = test_server.post("/v1/nodes/n:heartbeat", None, &json!({})).await;
    assert_eq!(answer.headers["content-type"], "text/html; charset=utf-8");
    test_server.faults(&once("node_remove", "kind = \"lost_answer\""));
    let (came, end) = test_server.exchange("DELETE /v1/nodes/n", "", "").await;
    assert!(is_reset(end) && came.is_empty(), "{came}");
    assert_eq!(test_server.get("/v1/nodes/n", None).await.status, StatusCode::NOT_FOUND, "executed");
    test_server.faults("[[fault]]\nendpoint = \"runs\"\nkind = \"status\"\ncode = 503");
    assert_eq!(test_server.get("/v1/runs", None).await.status, StatusCode::SERVICE_UNAVAILABLE);
    test_server.server.stop().await;
}

#[tokio::test]
async fn damaged_grpc_answers_are_errors_of_the_client() {
    let test_server = TestServer::with(Config { offer_ttl: Duration::from_millis(300), ..config() }).await;
    let mut calls = test_server.register_run_node("n").await;
    test_server.run(1).await;
    let mut stream = pull(&mut calls, "n", 5).await;
    let lease = next(&mut stream).await;
    for (rule, code) in [
        ("kind = \"oversize\"", Code::OutOfRange),
        ("kind = \"malformed\"", Code::Internal),
        ("kind = \"wrong_type\"", Code::Internal),
        ("kind = \"status\"\ncode = 503", Code::Unavailable),
    ] {
        test_server.faults(&once("ack", rule));
        let status = try_ack(&mut calls, &lease).await.expect_err("an error");
        assert_eq!(status.code(), code, "{rule} {status:?}");
    }
    test_server.faults(&once("pull", "kind = \"malformed\"\nafter_bytes = 20"));
    test_server.run(1).await;
    let mut cut = pull(&mut calls, "n", 5).await;
    // The first stream may have got the run, which returns unacknowledged.
    drop(stream);
    assert_eq!(end_of(&mut cut).await.expect_err("half a lease").code(), Code::Internal);
    test_server.server.stop().await;
}
