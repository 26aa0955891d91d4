//! Tests the pool against a server that counts its connections.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    super::{Client, Config, TransportError, full, read_capped},
    *,
};

const LIMIT: Duration = Duration::from_secs(10);

/// How a server answers the requests of one connection, before it closes the connection.
#[derive(Clone, Copy)]
struct Behaviour {
    answers: usize,
    head: &'static str,
}

struct Server {
    url: String,
    opened: Arc<AtomicUsize>,
    closed: tokio::sync::mpsc::UnboundedReceiver<String>,
    _task: AbortOnDropHandle<()>,
}

async fn server(behaviour: Behaviour) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/path?query", listener.local_addr().expect("an address"));
    let opened = Arc::new(AtomicUsize::new(0));
    let (received_by_connection, closed) = tokio::sync::mpsc::unbounded_channel();
    let count = Arc::clone(&opened);
    let task = tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.expect("a connection");
            count.fetch_add(1, Ordering::Relaxed);
            let received_by_connection = received_by_connection.clone();
            tokio::spawn(async move {
                let received = serve(socket, behaviour).await;
                let _ = received_by_connection.send(received);
            });
        }
    });
    Server { url, opened, closed, _task: AbortOnDropHandle::new(task) }
}

/// Returns all bytes that the connection received.
async fn serve(mut socket: TcpStream, behaviour: Behaviour) -> String {
    let mut received = Vec::new();
    for answer in 1..=behaviour.answers {
        while received.windows(4).filter(|end| end == b"\r\n\r\n").count() < answer {
            if socket.read_buf(&mut received).await.unwrap_or(0) == 0 {
                return String::from_utf8_lossy(&received).into_owned();
            }
        }
        let text = format!("HTTP/1.1 200 OK\r\n{}\r\n\r\nyes", behaviour.head);
        socket.write_all(text.as_bytes()).await.expect("written");
    }
    String::from_utf8_lossy(&received).into_owned()
}

fn client() -> Client {
    Client::new(Config::default())
}

fn ask(url: &str) -> Request<Body> {
    Request::get(url).body(full("")).expect("a request")
}

async fn call(client: &Client, url: &str) -> String {
    let answer = client.call(ask(url), LIMIT).await.expect("an answer");
    String::from_utf8_lossy(&answer.body).into_owned()
}

#[tokio::test]
async fn concurrent_requests_are_bounded() {
    const ANSWER: &str = "content-length: 3";
    for (at_once, connections) in [(3, 3), (0, 1), (20, 10)] {
        let server = server(Behaviour { answers: 10, head: ANSWER }).await;
        let client = Client::new(Config { at_once, ..Config::default() });
        // All calls begin before the first answer.
        let calls = (0..10).map(|_| call(&client, &server.url));
        let answers = futures_util::future::join_all(calls).await;
        assert_eq!(answers, ["yes"; 10]);
        assert_eq!(server.opened.load(Ordering::Relaxed), connections, "{at_once} at once");
    }
}

#[tokio::test]
async fn idle_connections_are_bounded() {
    let mut server = server(Behaviour { answers: 10, head: "content-length: 3" }).await;
    let client = Client::new(Config { idle_at_most: 2, ..Config::default() });
    let calls = (0..5).map(|_| call(&client, &server.url));
    futures_util::future::join_all(calls).await;
    assert_eq!(server.opened.load(Ordering::Relaxed), 5);
    for _ in 0..3 {
        tokio::time::timeout(LIMIT, server.closed.recv()).await.expect("three are closed");
    }
    // The two others stay.
    futures_util::future::join_all((0..2).map(|_| call(&client, &server.url))).await;
    assert_eq!(server.opened.load(Ordering::Relaxed), 5);
}

#[tokio::test]
async fn timed_out_request_releases_its_permit() {
    let hung = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", hung.local_addr().expect("an address"));
    let server = server(Behaviour { answers: 1, head: "content-length: 3" }).await;
    let client = Client::new(Config { at_once: 1, ..Config::default() });
    let hangs = client.call(ask(&url), Duration::from_millis(20)).await;
    assert!(matches!(hangs, Err(TransportError::Timeout { .. })), "{hangs:?}");
    assert_eq!(call(&client, &server.url).await, "yes");
}

#[tokio::test]
async fn sequential_requests_share_one_connection() {
    let mut server = server(Behaviour { answers: usize::MAX, head: "content-length: 3" }).await;
    let client = client();
    for _ in 0..20 {
        assert_eq!(call(&client, &server.url).await, "yes");
        let response = client.send(ask(&server.url), LIMIT).await.expect("an answer");
        assert_eq!(read_capped(response.into_body(), 100, "host").await.expect("a body"), "yes");
        tokio::task::yield_now().await; // the connection returns to the pool in a task
        while client.pool.shared.state().servers.iter().all(|server| server.idle.is_empty()) {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(server.opened.load(Ordering::Relaxed), 1);
    drop(client);
    let received = server.closed.recv().await.expect("the connection ends with its client");
    let host = server.url.trim_start_matches("http://").trim_end_matches("/path?query");
    assert!(received.starts_with(&format!("GET /path?query HTTP/1.1\r\nhost: {host}\r\n")), "{received}");
}

#[tokio::test]
async fn closed_idle_connections_fail_no_request() {
    let mut server = server(Behaviour { answers: 1, head: "content-length: 3" }).await;
    let client = client();
    for _ in 0..20 {
        assert_eq!(call(&client, &server.url).await, "yes");
        server.closed.recv().await.expect("the server closes the connection");
    }
    assert_eq!(server.opened.load(Ordering::Relaxed), 20);
}

#[tokio::test]
async fn unread_answers_close_their_connection() {
    let mut server = server(Behaviour { answers: usize::MAX, head: "content-length: 300000" }).await;
    let client = client();
    drop(client.send(ask(&server.url), LIMIT).await.expect("a head"));
    server.closed.recv().await.expect("closed");
    let limit = Duration::from_millis(50);
    let answer = client.call_for_status(ask(&server.url), limit).await.expect("a status");
    assert!(answer.status.is_success() && answer.body.is_empty());
    server.closed.recv().await.expect("closed");
    assert!(matches!(client.call(ask(&server.url), limit).await, Err(TransportError::Timeout { .. })));
    server.closed.recv().await.expect("closed");
    assert_eq!(server.opened.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn unfinished_request_bodies_block_no_other_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let _server = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut open = Vec::new();
        loop {
            let (mut socket, _) = listener.accept().await.expect("a connection");
            let mut received = Vec::new();
            while !received.windows(4).any(|end| end == b"\r\n\r\n") {
                assert_ne!(socket.read_buf(&mut received).await.expect("a request"), 0);
            }
            socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nyes").await.expect("written");
            open.push(socket); // nothing more is read from it
        }
    }));
    let client = client();
    let endless = http_body_util::StreamBody::new(futures_util::stream::pending());
    let endless = Request::post(&url).body(http_body_util::BodyExt::boxed_unsync(endless)).expect("a request");
    assert_eq!(client.call(endless, LIMIT).await.expect("an early answer").body, "yes");
    let next = client.call(ask(&url), Duration::from_secs(2)).await;
    assert_eq!(next.expect("an answer on a connection of its own").body, "yes");
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let mut server = server(Behaviour { answers: usize::MAX, head: "content-length: 3" }).await;
    let mut client = client();
    client.pool = Pool::new(&Config::default(), Duration::from_millis(20));
    assert_eq!(call(&client, &server.url).await, "yes");
    server.closed.recv().await.expect("closed by the client");
}

#[test]
fn host_header_has_no_user_or_default_port() {
    let check = |url: &'static str, expected: &str| {
        let uri = Uri::from_static(url);
        let (scheme, authority) = (uri.scheme().expect("a scheme"), uri.authority().expect("an authority"));
        assert_eq!(host_of(scheme, authority).expect("a header"), expected);
    };
    check("http://plane.example", "plane.example");
    check("http://plane.example:80/", "plane.example");
    check("https://plane.example:80/", "plane.example:80");
    check("https://plane.example:443/", "plane.example");
    check("https://who@[::1]:8443/", "[::1]:8443");
}
