//! The server side of the runs: a Node Runtime control plane that stores nothing. It offers each client as many runs at
//! once as the client asked for, and counts acknowledgements and completions.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use anyhow::Context;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use http::{Request, Response, StatusCode, header};
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
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tonic::{Status, body::Body};
use tower_service::Service as _;
use uuid::Uuid;

/// The capability of the runs.
const NOOP: &str = "/examples/noop/v1";
/// Time limit of an order on a slow machine.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// See the module documentation.
pub(super) struct ControlPlane {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    clients: watch::Sender<HashMap<String, Client>>,
    round: Mutex<Round>,
    /// Changes when a round ends.
    ended: watch::Sender<()>,
}

/// An open stream.
#[derive(Clone)]
struct Client {
    leases: mpsc::UnboundedSender<Lease>,
    max: usize,
}

/// The runs of one order.
#[derive(Default)]
struct Round {
    client: Option<Client>,
    /// Not sent yet.
    left: usize,
    /// Not acknowledged yet.
    acks: usize,
    sent: HashMap<String, Instant>,
    /// From the send of a lease to its completion.
    took: Vec<Duration>,
    failed: Option<String>,
}

impl ControlPlane {
    /// Serves on a free port.
    pub(super) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let (address, state) = (listener.local_addr()?, Arc::<State>::default());
        tokio::spawn(serve(Arc::clone(&state), listener));
        Ok(Self { address, state })
    }

    /// `url`, or the name of a client and a number of runs for it. The answer is the URL, or two times in nanoseconds:
    /// the whole, and the median from the send of a lease to its completion.
    pub(super) async fn answer(&self, order: &str) -> anyhow::Result<String> {
        let Some((client, count)) = order.split_once(' ') else { return Ok(format!("http://{}", self.address)) };
        let count = count.parse().context("expected a number of runs")?;
        tokio::time::timeout(LIMIT, self.round(client, count)).await.context("the runs took too long")?
    }

    async fn round(&self, client: &str, count: usize) -> anyhow::Result<String> {
        let mut clients = self.state.clients.subscribe();
        let client = clients.wait_for(|clients| clients.contains_key(client)).await?[client].clone();
        let mut ended = self.state.ended.subscribe();
        let (began, max) = (Instant::now(), client.max);
        {
            let mut round = self.state.round();
            *round = Round { client: Some(client), left: count, acks: count, ..Round::default() };
            (0..max).for_each(|_| round.send());
        }
        ended.changed().await?;
        let took = began.elapsed();
        let mut round = self.state.round();
        if let Some(failed) = round.failed.take() {
            anyhow::bail!("a run failed: {failed}");
        }
        round.took.sort();
        let median = round.took.get(round.took.len() / 2).context("there were no runs")?;
        Ok(format!("{} {}", took.as_nanos(), median.as_nanos()))
    }
}

impl State {
    fn round(&self) -> MutexGuard<'_, Round> {
        self.round.lock().expect("nothing panics while it holds the round")
    }

    /// Changes the round. Tells when this ends it.
    fn change(&self, change: impl FnOnce(&mut Round)) {
        let mut round = self.round();
        change(&mut round);
        if round.failed.is_some() || (round.left == 0 && round.acks == 0 && round.sent.is_empty()) {
            self.ended.send_replace(());
        }
    }
}

impl Round {
    /// Sends the next run, if one is left.
    fn send(&mut self) {
        let (Some(client), Some(left)) = (&self.client, self.left.checked_sub(1)) else { return };
        self.left = left;
        let run = Uuid::new_v4().to_string();
        let lease = Lease {
            lease_id: format!("lease-{run}"),
            run_id: run.clone(),
            run_spec: Some(RunSpec {
                agent_id: "bench".to_owned(),
                version: "v1".to_owned(),
                budgets: Some(BudgetConstraints { max_tokens: 4000, max_duration_seconds: 60 }),
                metadata: HashMap::from([("capability".to_owned(), NOOP.to_owned())]),
                ..RunSpec::default()
            }),
            deadline_unix_ms: jiff::Timestamp::now().as_millisecond() + 300_000,
            trace_id: Uuid::new_v4().to_string(),
        };
        self.sent.insert(run, Instant::now());
        // A client that has gone completes nothing, and the order has a time limit.
        let _ = client.leases.send(lease);
    }
}

async fn serve(state: Arc<State>, listener: TcpListener) {
    while let Ok((socket, _)) = listener.accept().await {
        let _ = socket.set_nodelay(true);
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&state), request));
            // A client may end its connection at any time.
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
        });
    }
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let kind = request.headers().get(header::CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return LeaseServiceServer::new(Grpc(state)).call(request).await;
    }
    // Every node may register and send heartbeats.
    let created = request.uri().path().ends_with(":register");
    let mut response = Response::new(Body::empty());
    *response.status_mut() = if created { StatusCode::CREATED } else { StatusCode::OK };
    Ok(response)
}

#[derive(Clone)]
struct Grpc(Arc<State>);

#[tonic::async_trait]
impl LeaseService for Grpc {
    type PullStream = BoxStream<'static, Result<Lease, Status>>;

    async fn pull(&self, request: tonic::Request<PullRequest>) -> Result<tonic::Response<Self::PullStream>, Status> {
        let PullRequest { node_id, max_leases } = request.into_inner();
        let (leases, receiver) = mpsc::unbounded_channel();
        let client = Client { leases, max: usize::try_from(max_leases).unwrap_or_default() };
        self.0.clients.send_modify(|clients| drop(clients.insert(node_id, client)));
        let leases = stream::unfold(receiver, |mut receiver| async { Some((Ok(receiver.recv().await?), receiver)) });
        Ok(tonic::Response::new(leases.boxed()))
    }

    async fn ack(&self, _request: tonic::Request<AckRequest>) -> Result<tonic::Response<AckResponse>, Status> {
        self.0.change(|round| round.acks -= 1);
        Ok(tonic::Response::new(AckResponse { success: true, message: String::new() }))
    }

    async fn complete(
        &self,
        request: tonic::Request<CompleteRequest>,
    ) -> Result<tonic::Response<CompleteResponse>, Status> {
        let run = request.into_inner().run_id;
        self.0.change(|round| {
            let sent = round.sent.remove(&run);
            round.took.extend(sent.map(|sent| sent.elapsed()));
            round.send();
        });
        Ok(tonic::Response::new(CompleteResponse { success: true, message: String::new() }))
    }

    async fn fail(&self, request: tonic::Request<FailRequest>) -> Result<tonic::Response<FailResponse>, Status> {
        self.0.change(|round| round.failed = Some(request.into_inner().error_message));
        Ok(tonic::Response::new(FailResponse { success: true, ..FailResponse::default() }))
    }
}
