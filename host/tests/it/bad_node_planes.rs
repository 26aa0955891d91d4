//! Unusable answers of a Node Runtime control plane, and ports that serve something else. Each gives one clear log
//! line, and the node continues.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    time::{Duration, Instant},
};

use http::StatusCode;
use prost::Message as _;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

use crate::harness::{
    fixtures,
    node::TestNode,
    node_plane::{Call, NodePlane, PULL, frame, lease, result},
};

const ECHO: &str = "/examples/echo-file/v1";
const REGISTER: &str = "/v1/nodes:register";

/// A port that answers every connection with the same bytes, and then is silent. After [`Foreign::heal`] it forwards
/// new connections to the control plane.
struct Foreign {
    address: SocketAddr,
    heal: watch::Sender<bool>,
    _server: AbortOnDropHandle<()>,
}

impl Foreign {
    async fn before(plane: &NodePlane, answer: &'static [u8]) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (to, heal) = (plane.address(), watch::Sender::new(false));
        let healed = heal.subscribe();
        let serve = async move {
            let mut connections = JoinSet::new();
            while let Ok((mut socket, _)) = listener.accept().await {
                let healed = *healed.borrow();
                connections.spawn(async move {
                    if healed {
                        let mut plane = TcpStream::connect(to).await?;
                        return copy_bidirectional(&mut socket, &mut plane).await.map(drop);
                    }
                    socket.write_all(answer).await?;
                    while socket.read(&mut [0; 1024]).await? > 0 {}
                    Err(ErrorKind::UnexpectedEof.into())
                });
            }
        };
        Self { address, heal, _server: AbortOnDropHandle::new(tokio::spawn(serve)) }
    }

    /// A node that uses this port for gRPC.
    async fn node(&self, plane: &NodePlane) -> TestNode {
        let more = format!("grpc_url = \"http://{}\"", self.address);
        plane.node(&[fixtures::echo()], &more).leasing().await
    }

    fn heal(&self) {
        self.heal.send_replace(true);
    }
}

fn error(line: &Value) -> &str {
    line["error"].as_str().unwrap_or_default()
}

/// The node runs a task.
async fn works(plane: &NodePlane, node: TestNode) {
    plane.send(&node, lease("works", ECHO, &[("a", "x")], &[])).await;
    assert_eq!(result(&plane.completed(&node, "works").await)["echo-0.bin"], "x");
    node.says_ended("accepted").await;
    node.stop().await;
}

#[tokio::test]
async fn silent_grpc_port_is_reported_in_time() {
    let plane = NodePlane::start().await;
    let foreign = Foreign::before(&plane, b"").await;
    let began = Instant::now();
    let node = foreign.node(&plane).await;
    let wanted = "does not speak HTTP/2: it sends nothing within 10s; check that the URL is that of a gRPC port";
    let line = node.says("stream.ended").await;
    assert!(error(&line).contains(wanted), "{line}");
    let (_, page) = node.page_until("/ready", |page| page.0 == 503).await;
    assert!(page["reason"].as_str().is_some_and(|reason| reason.contains(wanted)), "{page}");
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    foreign.heal();
    works(&plane, node).await;
}

#[tokio::test]
async fn foreign_grpc_ports_are_named() {
    for (answer, wanted) in [
        (&b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"[..], "it speaks HTTP/1"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it sends something else"),
    ] {
        let plane = NodePlane::start().await;
        let foreign = Foreign::before(&plane, answer).await;
        let node = foreign.node(&plane).await;
        let line = node.says("stream.ended").await;
        assert!(error(&line).contains(wanted), "{wanted}: {line}");
        assert_eq!(node.said("stream.ended").len(), 1, "one line, then a pause:\n{}", node.log());
        foreign.heal();
        works(&plane, node).await;
    }
}

#[tokio::test]
async fn unreadable_frames_end_the_stream() {
    let plane = NodePlane::start().await;
    plane.answer_with(PULL, Some(frame(b"\xff\xff\xff garbage")));
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    let line = node.says("stream.ended").await;
    assert!(error(&line).contains("failed to decode Protobuf message"), "{line}");
    plane.answer_with(PULL, None);
    // A message above 4 MiB ends the stream too. It is not read again and again.
    plane.send(&node, lease("oversize", ECHO, &[("a", &"x".repeat(5 << 20))], &[])).await;
    node.line(|line| line["event"] == "stream.ended" && error(line).contains("message length too large")).await;
    let pulls = |calls: &[Call]| calls.iter().filter(|call| matches!(call, Call::Pull(_))).count();
    plane.until(&node, "the next stream", |calls| (pulls(calls) == 2).then_some(())).await;
    assert_eq!(node.said("stream.ended").len(), 2, "{}", node.log());
    works(&plane, node).await;
    assert_eq!(plane.acks(), 1);
}

#[tokio::test]
async fn unknown_fields_of_a_lease_are_ignored() {
    let plane = NodePlane::start().await;
    let mut message = lease("newer", ECHO, &[("a", "x")], &[]).encode_to_vec();
    // Field 99 as a number, as an enum would have it, and field 100 as a text.
    message.extend_from_slice(b"\x98\x06\x2a\xa2\x06\x03new");
    plane.answer_with(PULL, Some(frame(&message)));
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    assert_eq!(result(&plane.completed(&node, "newer").await)["echo-0.bin"], "x");
    node.says_ended("accepted").await;
    node.stop().await;
}

#[tokio::test]
async fn unreadable_answers_to_reports_are_retried() {
    const COMPLETE: &str = "/lease.LeaseService/Complete";
    let plane = NodePlane::start().await;
    plane.answer_with(COMPLETE, Some(frame(b"\xff\xff\xff garbage")));
    let node = plane.node(&[fixtures::echo()], "").leasing().await;
    plane.send(&node, lease("run", ECHO, &[("a", "x")], &[])).await;
    node.says("report.waiting").await;
    plane.answer_with(COMPLETE, None);
    assert_eq!(result(&plane.completed(&node, "run").await)["echo-0.bin"], "x");
    node.says("report.delivered").await;
    assert_eq!(plane.count(|call| matches!(call, Call::Fail(_))), 0, "a completion is never turned into a failure");
    node.stop().await;
}

#[tokio::test]
async fn input_of_nearly_4_mib_reaches_its_runner() {
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    let folder = tempfile::tempdir().expect("a folder");
    let gate = folder.path().join("go");
    std::fs::write(&gate, "").expect("the folder is writable");
    let input = "x".repeat((4 << 20) - 1000);
    let metadata = [("file", gate.to_str().expect("text"))];
    plane.send(&node, lease("large", "/fixtures/wait-file/v1", &[("a", &input)], &metadata)).await;
    plane.completed(&node, "large").await;
    node.says_ended("accepted").await;
    node.stop().await;
}

#[tokio::test]
async fn page_with_status_200_is_no_registration() {
    let plane = NodePlane::start().await;
    plane.answer_with(REGISTER, Some(b"\n<!doctype html><title>Sign in</title>".to_vec()));
    let node = plane.node(&[fixtures::echo()], "").start().await;
    let line = node.says("registration.failed").await;
    assert!(error(&line).contains("control plane answered 200: <!doctype html>"), "{line}");
    let (status, page) = node.page("/ready").await;
    assert!(status == 503 && page["reason"].as_str().is_some_and(|reason| reason.contains("answered 200")), "{page}");
    assert!(node.said("node.leasing").is_empty() && plane.calls().is_empty(), "{:#?}", plane.calls());
    plane.answer_with(REGISTER, None);
    node.says("node.leasing").await;
    works(&plane, node).await;
}

#[tokio::test]
async fn registration_answered_500_has_growing_pauses() {
    let plane = NodePlane::start().await;
    plane.answer_registrations(StatusCode::INTERNAL_SERVER_ERROR);
    let node = plane.node(&[fixtures::echo()], "").start().await;
    let fourth = node.line(|line| line["retry_in_ms"].as_u64().is_some_and(|pause| pause > 4000)).await;
    let lines = node.said("registration.failed");
    let pauses: Vec<u64> = lines.iter().filter_map(|line| line["retry_in_ms"].as_u64()).collect();
    assert!(pauses.is_sorted() && pauses.len() >= 4, "{pauses:?}");
    assert!(lines.iter().all(|line| error(line) == "control plane answered 500"), "{lines:?}");
    let tries = plane.count(|call| matches!(call, Call::Register(_)));
    assert!(tries <= pauses.len(), "{tries} registrations, the last line is {fourth}");
    plane.answer_registrations(StatusCode::CREATED);
    node.says("node.leasing").await;
    works(&plane, node).await;
}
