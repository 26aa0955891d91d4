//! A Node Runtime control plane for tests: REST and gRPC on one port. It does what a test says, and records every
//! call. It can be killed and started again on the same port.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use runner_host::leases::node_runtime::lease::{
    AckRequest, AckResponse, BudgetConstraints, CompleteRequest, CompleteResponse, FailRequest, FailResponse, Lease,
    PullRequest, RunSpec,
    lease_service_server::{LeaseService, LeaseServiceServer},
};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status, body::Body};
use tower_service::Service as _;

use super::{
    TestServer,
    node::{NodeSetup, TestNode},
    trimmed, within,
};

/// A call that the control plane got.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Call {
    Register(Value),
    /// The node in the path, as it was sent, and the body.
    Heartbeat(String, Value),
    Remove(String),
    Pull(PullRequest),
    /// The node has cancelled a stream.
    Cancelled,
    Ack(AckRequest),
    Complete(CompleteRequest),
    Fail(FailRequest),
}

/// The answer to reports.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Accept,
    /// `success = false`.
    NotAccepted,
    Status(Code),
}

struct State {
    calls: watch::Sender<Vec<Call>>,
    known: watch::Sender<bool>,
    register_status: Mutex<StatusCode>,
    reports: Mutex<Answer>,
    /// The end of each message that is no success.
    repeated: Mutex<String>,
    /// The bodies that replace all other answers, by path.
    bodies: Mutex<HashMap<&'static str, Vec<u8>>>,
    /// The open stream.
    stream: watch::Sender<Option<mpsc::UnboundedSender<Result<Lease, Status>>>>,
}

/// See the module documentation.
pub(crate) struct NodePlane {
    state: Arc<State>,
    address: SocketAddr,
    server: Option<AbortOnDropHandle<()>>,
}

impl NodePlane {
    pub(crate) async fn start() -> Self {
        let state = Arc::new(State {
            calls: watch::Sender::default(),
            known: watch::Sender::new(false),
            register_status: Mutex::new(StatusCode::CREATED),
            reports: Mutex::new(Answer::Accept),
            repeated: Mutex::default(),
            bodies: Mutex::default(),
            stream: watch::Sender::default(),
        });
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut plane = Self { state, address, server: None };
        plane.restart().await;
        plane
    }

    /// Ends all connections at once.
    pub(crate) async fn kill(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            let _ = server.await;
        }
        self.state.stream.send_replace(None);
    }

    pub(crate) async fn restart(&mut self) {
        self.kill().await;
        let listener = TcpListener::bind(self.address).await.expect("the port is free");
        self.address = listener.local_addr().expect("it is bound");
        self.server = Some(AbortOnDropHandle::new(tokio::spawn(serve(Arc::clone(&self.state), listener))));
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A node with `more` lines in its table.
    pub(crate) fn node(&self, plugins: &[PathBuf], more: &str) -> NodeSetup {
        let table = format!(
            "[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \"{}\"\nnode_id = \"w/07\"\n{more}\n",
            self.url()
        );
        NodeSetup::with_config(&table, plugins)
    }

    pub(crate) fn answer_reports(&self, answer: Answer) {
        *self.state.reports.lock().expect("nobody panics with it") = answer;
    }

    /// Accepts no Ack, and repeats `text` in every error.
    pub(crate) fn repeat(&self, text: &str) {
        text.clone_into(&mut self.state.repeated.lock().expect("nobody panics with it"));
    }

    pub(crate) fn answer_registrations(&self, status: StatusCode) {
        *self.state.register_status.lock().expect("nobody panics with it") = status;
    }

    /// Answers this path with status 200 and `body`; `None` ends that. The stream of a gRPC call ends after it.
    pub(crate) fn answer_with(&self, path: &'static str, body: Option<Vec<u8>>) {
        let mut bodies = self.state.bodies.lock().expect("nobody panics with it");
        match body {
            Some(body) => bodies.insert(path, body),
            None => bodies.remove(path),
        };
    }

    /// Forgets or knows the node.
    pub(crate) fn knows_node(&self, known: bool) {
        self.state.known.send_replace(known);
    }

    /// Sends a lease on the open stream, or on the next one.
    pub(crate) async fn send(&self, node: &TestNode, lease: Lease) {
        self.send_on(self.stream(node).await, lease);
    }

    pub(crate) async fn stream(&self, node: &TestNode) -> mpsc::UnboundedSender<Result<Lease, Status>> {
        let mut open = self.state.stream.subscribe();
        let stream = within("a stream", || node.log(), async {
            open.wait_for(|open| open.as_ref().is_some_and(|stream| !stream.is_closed())).await.expect("kept").clone()
        });
        stream.await.expect("it is open")
    }

    pub(crate) fn send_on(&self, stream: mpsc::UnboundedSender<Result<Lease, Status>>, lease: Lease) {
        stream.send(Ok(lease)).expect("the stream is open");
    }

    /// Ends the open stream, with a status or without.
    pub(crate) async fn end_stream(&self, node: &TestNode, status: Option<Status>) {
        let stream = self.stream(node).await;
        self.state.stream.send_replace(None);
        if let Some(status) = status {
            stream.send(Err(status)).expect("the stream is open");
        }
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.state.calls.borrow().clone()
    }

    /// Waits until the calls match `wanted`.
    pub(crate) async fn until<T>(&self, node: &TestNode, what: &str, wanted: impl Fn(&[Call]) -> Option<T>) -> T {
        let mut calls = self.state.calls.subscribe();
        let log = || format!("{}\n{:#?}", node.log(), self.calls());
        within(what, log, async {
            loop {
                if let Some(found) = wanted(&calls.borrow_and_update()) {
                    return found;
                }
                calls.changed().await.expect("kept");
            }
        })
        .await
    }

    pub(crate) async fn completed(&self, node: &TestNode, run: &str) -> CompleteRequest {
        let found = |call: &Call| match call {
            Call::Complete(request) if request.run_id == run => Some(request.clone()),
            _ => None,
        };
        self.until(node, "a completion", |calls| calls.iter().find_map(found)).await
    }

    pub(crate) async fn failed(&self, node: &TestNode, run: &str) -> FailRequest {
        let found = |call: &Call| match call {
            Call::Fail(request) if request.run_id == run => Some(request.clone()),
            _ => None,
        };
        self.until(node, "a failure", |calls| calls.iter().find_map(found)).await
    }

    /// Counts the calls that match.
    pub(crate) fn count(&self, wanted: impl Fn(&Call) -> bool) -> usize {
        self.state.calls.borrow().iter().filter(|call| wanted(call)).count()
    }

    pub(crate) fn acks(&self) -> usize {
        self.count(|call| matches!(call, Call::Ack(_)))
    }
}

/// A lease for a runner of this capability that ends in five minutes.
pub(crate) fn lease(run: &str, capability: &str, inputs: &[(&str, &str)], metadata: &[(&str, &str)]) -> Lease {
    let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let mut metadata = map(metadata);
    metadata.insert("capability".to_owned(), capability.to_owned());
    Lease {
        lease_id: format!("lease-{run}"),
        run_id: run.to_owned(),
        run_spec: Some(RunSpec {
            agent_id: "agent".to_owned(),
            version: "v1".to_owned(),
            input_ref: map(inputs),
            budgets: Some(BudgetConstraints { max_tokens: 4000, max_duration_seconds: 60 }),
            metadata,
            ..RunSpec::default()
        }),
        deadline_unix_ms: in_future(300_000),
        trace_id: String::new(),
    }
}

/// The same with data on the domain server of `test_server`, and with these changes of the metadata.
pub(crate) fn domain_lease(
    test_server: &TestServer,
    run: &str,
    capability: &str,
    inputs: &[(&str, &str)],
    changes: &[(&str, Option<&str>)],
) -> Lease {
    let server = &test_server.dev_server;
    let metadata = [
        ("domain_id", server.domain_id().to_string()),
        ("domain_server_url", trimmed(&server.domain_server_url()).to_owned()),
        ("access_token", server.grant()),
    ];
    let metadata = metadata.each_ref().map(|(key, value)| (*key, value.as_str()));
    let mut lease = lease(run, capability, inputs, &metadata);
    let metadata = &mut lease.run_spec.as_mut().expect("a spec").metadata;
    for (key, value) in changes {
        match value {
            Some(value) => drop(metadata.insert((*key).to_owned(), (*value).to_owned())),
            None => drop(metadata.remove(*key)),
        }
    }
    lease
}

/// The path of the stream.
pub(crate) const PULL: &str = "/lease.LeaseService/Pull";

/// A frame of gRPC with this message.
pub(crate) fn frame(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("a short message").to_be_bytes();
    [&[0], &length[..], message].concat()
}

/// The Unix time in milliseconds, this long from now.
pub(crate) fn in_future(ms: i64) -> i64 {
    jiff::Timestamp::now().as_millisecond() + ms
}

/// The result of a completion, sorted.
pub(crate) fn result(request: &CompleteRequest) -> BTreeMap<&str, &str> {
    request.result.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

async fn serve(state: Arc<State>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.expect("a listener accepts");
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&state), request));
            let builder = auto::Builder::new(TokioExecutor::new());
            // The node or the test may end a connection at any time.
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Result<Response<Body>, std::convert::Infallible> {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let body = state.bodies.lock().expect("nobody panics with it").get(request.uri().path()).cloned();
    if let Some(body) = body {
        let kind = kind.cloned().unwrap_or_else(|| HeaderValue::from_static("text/html"));
        let response = Response::builder().header(header::CONTENT_TYPE, kind);
        return Ok(response.body(Body::new(Full::new(Bytes::from(body)))).expect("a response"));
    }
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return LeaseServiceServer::new(Grpc(state)).call(request).await;
    }
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let node = path.strip_prefix("/v1/nodes/").unwrap_or_default();
    let status = match (method, node.strip_suffix(":heartbeat")) {
        (Method::POST, None) if path == "/v1/nodes:register" => {
            state.saw(Call::Register(body));
            let status = *state.register_status.lock().expect("nobody panics with it");
            if status.is_success() {
                state.known.send_replace(true);
            }
            status
        }
        (Method::POST, Some(node)) => {
            state.saw(Call::Heartbeat(node.to_owned(), body));
            if *state.known.borrow() { StatusCode::OK } else { StatusCode::NOT_FOUND }
        }
        (Method::DELETE, None) => {
            state.saw(Call::Remove(node.to_owned()));
            StatusCode::NO_CONTENT
        }
        _ => StatusCode::NOT_FOUND,
    };
    let body = if status.is_success() { json!({}).to_string() } else { state.repeated() };
    let body = Body::new(Full::new(Bytes::from(body)));
    Ok(Response::builder().status(status).body(body).expect("a response"))
}

impl State {
    fn saw(&self, call: Call) {
        self.calls.send_modify(|calls| calls.push(call));
    }

    fn repeated(&self) -> String {
        self.repeated.lock().expect("nobody panics with it").clone()
    }

    /// The answer to a report.
    fn answered(&self) -> Result<(bool, String), Status> {
        let text = |text: &str| format!("{text} {}", self.repeated()).trim_end().to_owned();
        match &*self.reports.lock().expect("nobody panics with it") {
            Answer::Accept => Ok((true, "ok".to_owned())),
            Answer::NotAccepted => Ok((false, text("Failed to complete run"))),
            Answer::Status(code) => Err(Status::new(*code, text("not now"))),
        }
    }
}

#[derive(Clone)]
struct Grpc(Arc<State>);

/// Records the end of a stream that the node did not wait for.
struct Watched(Arc<State>, bool);

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.1 {
            self.0.saw(Call::Cancelled);
        }
    }
}

#[tonic::async_trait]
impl LeaseService for Grpc {
    type PullStream = BoxStream<'static, Result<Lease, Status>>;

    async fn pull(&self, request: tonic::Request<PullRequest>) -> Result<tonic::Response<Self::PullStream>, Status> {
        self.0.saw(Call::Pull(request.into_inner()));
        let (sender, receiver) = mpsc::unbounded_channel();
        self.0.stream.send_replace(Some(sender));
        let watched = Watched(Arc::clone(&self.0), false);
        let leases = stream::unfold((receiver, watched), |(mut receiver, mut watched)| async move {
            let lease = receiver.recv().await;
            watched.1 = !matches!(lease, Some(Ok(_)));
            Some((lease?, (receiver, watched)))
        });
        Ok(tonic::Response::new(leases.boxed()))
    }

    async fn ack(&self, request: tonic::Request<AckRequest>) -> Result<tonic::Response<AckResponse>, Status> {
        self.0.saw(Call::Ack(request.into_inner()));
        let message = self.0.repeated();
        Ok(tonic::Response::new(AckResponse { success: message.is_empty(), message }))
    }

    async fn complete(
        &self,
        request: tonic::Request<CompleteRequest>,
    ) -> Result<tonic::Response<CompleteResponse>, Status> {
        self.0.saw(Call::Complete(request.into_inner()));
        let (success, message) = self.0.answered()?;
        Ok(tonic::Response::new(CompleteResponse { success, message }))
    }

    async fn fail(&self, request: tonic::Request<FailRequest>) -> Result<tonic::Response<FailResponse>, Status> {
        self.0.saw(Call::Fail(request.into_inner()));
        let (success, message) = self.0.answered()?;
        Ok(tonic::Response::new(FailResponse { success, message, should_retry: false }))
    }
}
