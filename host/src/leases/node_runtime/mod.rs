//! A Node Runtime control plane as a [`super::LeaseSource`]: REST for the node, a gRPC stream for leases, gRPC calls
//! for reports (docs/protocols/node-runtime.md).
//!
//! [`NodeRuntime::run`] keeps two things alive: the registration with its heartbeats (`rest`), and the stream
//! (`stream`). `incoming` and `domain_data` read leases, `report` writes reports, `outstanding` bounds what this node
//! has accepted. `lease` is generated from host/protos/lease.proto.

mod domain_data;
mod incoming;
mod no_runner;
mod outstanding;
mod report;
mod rest;
mod stream;

/// The messages of the wire, their client, and the server for the dev server and tests. See host/protos/generate.
#[allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]
pub mod lease {
    include!("lease.in.rs");
}

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use http::Uri;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};
use tracing::{debug, warn};
use url::Url;

pub use self::rest::Capacity;
use self::{
    lease::{FailRequest, lease_service_client::LeaseServiceClient},
    no_runner::NoRunnerPauses,
    outstanding::Outstanding,
    report::{At, Report},
    rest::{Known, Registered, Rest},
};
use super::{Admission, LeaseError, LeaseSource, PlaneFacts, PlaneReadiness, Renewal, recent_tokens::RecentTokens};
use crate::{
    model::{
        Backoff, BootInstant, Capability, DomainHosts, Jitter, Lease, Outcome, Pending, PlaneName, RegistrationForm,
        RegistrationState, ReportAddress, TaskId, TaskResult, Term, Timings, millis,
    },
    node_event::{NodeEvent, NodeEvents},
    transport::{Client, Http2, Http2Limits, PeerTls},
};

/// How long a gRPC call may take. A report may have 3 MiB.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// How often a session asks for a newer lease of its run. The question stays in this process.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);
/// The shortest time from a heartbeat of a full node to the one that tells that it has a free slot.
const FREE_AFTER: Duration = Duration::from_secs(1);
/// Fewer failed heartbeats of the node in a row do not affect readiness.
const HEARTBEAT_FAILURES_MIN: u32 = 3;
/// The pauses between two registrations.
const REGISTER_PAUSES: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60), Jitter::Half);
/// The pauses after runs that had no runner here.
const NO_RUNNER_PAUSES: Backoff = Backoff::new(Duration::from_secs(60), Duration::from_secs(600), Jitter::Half);
/// How long the stream may take to end after a stop.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long the node may take to leave the control plane.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);
/// The limits of a connection. Servers of the C and Go libraries close a connection that sends a PING more often than
/// every 300 s.
const CONNECTION: Http2Limits = Http2Limits {
    stream_window: 16 * 1024,
    ping_every: Duration::from_secs(310),
    ping_patience: Duration::from_secs(20),
    tcp_patience: Duration::from_secs(30),
};

/// A connection to the gRPC port.
type Connection = Http2<tonic::body::Body>;
type WireClient = LeaseServiceClient<Connection>;

/// A Node Runtime control plane, and this node there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The name of this control plane.
    pub name: PlaneName,
    /// The base URL of REST.
    pub control_plane_url: Url,
    /// The base URL of gRPC.
    pub grpc_url: Url,
    /// The identity of this node.
    pub node_id: String,
    /// Most leases that this node has accepted and not reported.
    pub max_concurrent_leases: u32,
    /// The pause between two heartbeats of the node.
    pub heartbeat_interval: Duration,
    /// What the node offers.
    pub capacity: Capacity,
    /// Properties of the node, for the scheduler of the control plane.
    pub metadata: BTreeMap<String, String>,
    /// The runner of an agent.
    pub agent_map: BTreeMap<String, Capability>,
    /// TLS for REST and gRPC, if it differs from that of other servers.
    pub tls: Option<PeerTls>,
}

/// See the module documentation.
pub struct NodeRuntime(Arc<Shared>);

/// Why the node may get no leases, one line each. It continues to try.
#[derive(Default)]
struct Problems {
    /// It is not registered.
    registration: Option<String>,
    stream: Option<String>,
    heartbeats: Option<String>,
    /// The runs need runners that this node does not have.
    runners: Option<String>,
}

/// The parts that calls beside the stream use too.
struct Shared {
    facts: PlaneFacts,
    config: Config,
    /// Tasks that run at once on this node.
    slots: usize,
    /// The domain servers that may get the token of a run.
    domain_hosts: DomainHosts,
    client: Client,
    rest: Rest,
    /// `Err`: the URL cannot be used.
    origin: Result<Uri, String>,
    /// The connection for Ack and reports. A new one replaces it after a failure.
    calls: tokio::sync::Mutex<Option<Connection>>,
    outstanding: Outstanding,
    /// The tokens of runs. No text of the control plane shows them.
    tokens: Arc<RecentTokens>,
    /// Runs whose report was sent and is not accepted.
    owed: Mutex<HashSet<TaskId>>,
    /// Leases on their way from the stream to a poll.
    sender: mpsc::Sender<Lease>,
    receiver: tokio::sync::Mutex<mpsc::Receiver<Lease>>,
    readiness: watch::Sender<PlaneReadiness>,
    problems: Mutex<Problems>,
    /// Changes at each successful registration.
    registrations: watch::Sender<u64>,
    no_runner: NoRunnerPauses,
    events: NodeEvents,
    quiet: CancellationToken,
}

impl NodeRuntime {
    /// Nothing is sent yet. The node runs at most `slots` tasks at once. Data moves only through servers in
    /// `domain_hosts`.
    #[must_use]
    pub fn new(config: Config, slots: usize, domain_hosts: DomainHosts, client: Client, events: NodeEvents) -> Self {
        // The client certificate is for this control plane only.
        let client = config.tls.clone().map_or(client.clone(), |tls| client.for_peer(tls));
        let facts = PlaneFacts {
            name: config.name.clone(),
            base_url: rest::base(&config.control_plane_url).into(),
            node: config.node_id.as_str().into(),
            admission: Admission::LeaseFirst,
            heartbeat_every: Some(HEARTBEAT_EVERY),
        };
        // The stream holds one place while it waits for a lease. The other one is for runs that start again.
        let (sender, receiver) = mpsc::channel(2);
        let max = usize::try_from(config.max_concurrent_leases).unwrap_or(usize::MAX);
        let tokens = Arc::<RecentTokens>::default();
        Self(Arc::new(Shared {
            rest: Rest::new(&config, client.clone(), Arc::clone(&tokens)),
            tokens,
            origin: rest::base(&config.grpc_url).parse().map_err(|err| format!("{}: {err}", config.grpc_url)),
            facts,
            slots,
            domain_hosts,
            client,
            calls: tokio::sync::Mutex::default(),
            outstanding: Outstanding::new(max),
            owed: Mutex::default(),
            sender,
            receiver: tokio::sync::Mutex::new(receiver),
            readiness: watch::Sender::new(PlaneReadiness::NotReady("the node has not registered".to_owned())),
            problems: Mutex::default(),
            registrations: watch::Sender::default(),
            no_runner: NoRunnerPauses::new(NO_RUNNER_PAUSES),
            events,
            quiet: CancellationToken::new(),
            config,
        }))
    }
}

impl Shared {
    fn owed(&self) -> MutexGuard<'_, HashSet<TaskId>> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_registered(&self) -> bool {
        *self.readiness.borrow() == PlaneReadiness::Ready
    }

    /// Changes the problems and shows them. Without a problem of the registration, the node is registered.
    fn change_problems(&self, change: impl FnOnce(&mut Problems)) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut problems);
        let Problems { registration, stream, heartbeats, runners } = &*problems;
        let readiness = registration.clone().map_or(PlaneReadiness::Ready, PlaneReadiness::NotReady);
        self.readiness.send_replace(readiness);
        let error = [registration, stream, heartbeats, runners].into_iter().find_map(Clone::clone);
        self.events.board().change_plane(|status| status.plane_error = error);
    }

    /// Registers, with a heartbeat: a control plane may give no work before the first one. Tries until it succeeds.
    async fn register(&self) {
        let mut failures = 0;
        loop {
            let error = match self.register_once().await {
                Ok(()) => {
                    self.change_problems(|problems| problems.registration = None);
                    self.registrations.send_modify(|count| *count += 1);
                    self.events.emit(NodeEvent::RegistrationAccepted {
                        address: self.config.node_id.clone(),
                        form: RegistrationForm::None,
                        capabilities: 0, // the wire has none
                    });
                    return;
                }
                Err(error) => error,
            };
            failures += 1;
            let pause = REGISTER_PAUSES.pause(failures, rand::random());
            self.change_problems(|problems| problems.registration = Some(error.clone()));
            self.events.emit(NodeEvent::RegistrationFailed {
                error,
                state: RegistrationState::Registering,
                registered: false,
                pause,
                repeated: false,
            });
            tokio::time::sleep(pause).await;
        }
    }

    async fn register_once(&self) -> Result<(), String> {
        match self.rest.register().await? {
            Registered::Yes => {
                if let Err(error) = self.rest.heartbeat(self.node_status()).await {
                    warn!(event = "node.heartbeat_failed", error, "heartbeat of the node failed");
                }
                Ok(())
            }
            Registered::Maybe(reason) => match self.rest.heartbeat(self.node_status()).await {
                Ok(Known::Yes) => Ok(()),
                Ok(Known::No) | Err(_) => Err(reason),
            },
        }
    }

    fn node_status(&self) -> rest::Status {
        let active_runs = self.outstanding.count();
        let draining = self.quiet.is_cancelled();
        let most = self.slots.min(usize::try_from(self.config.max_concurrent_leases).unwrap_or(usize::MAX));
        let takes_none = draining || *self.no_runner.paused().borrow();
        let available_slots = if takes_none { 0 } else { most.saturating_sub(active_runs) };
        let state = if draining { "draining" } else { "active" };
        rest::Status { state, active_runs, available_slots }
    }

    /// Sends heartbeats of the node. A control plane that has forgotten the node gets a registration.
    async fn send_heartbeats(&self) {
        let (mut draining, mut full, mut failures) = (false, false, 0_u32);
        let mut paused = self.no_runner.paused();
        loop {
            let last = Instant::now();
            tokio::select! {
                () = self.quiet.cancelled(), if !draining => draining = true,
                // The control plane gives no work to a node that was full in its last heartbeat.
                () = self.until_free(last + FREE_AFTER), if full && !draining => {}
                Ok(()) = paused.changed() => {}
                () = tokio::time::sleep(self.config.heartbeat_interval) => {}
            }
            let status = self.node_status();
            let answer = self.rest.heartbeat(status).await;
            full = status.available_slots == 0 && answer.is_ok();
            if answer.is_ok() && failures > 0 {
                failures = 0;
                self.change_problems(|problems| problems.heartbeats = None);
            }
            match answer {
                Ok(Known::Yes) => {}
                Ok(Known::No) => {
                    let error = "control plane does not know the node".to_owned();
                    self.change_problems(|problems| problems.registration = Some(error.clone()));
                    self.events.emit(NodeEvent::RegistrationLost { error });
                    self.register().await;
                }
                Err(error) => {
                    warn!(event = "node.heartbeat_failed", error, "heartbeat of the node failed");
                    failures = failures.saturating_add(1);
                    if failures >= HEARTBEAT_FAILURES_MIN {
                        let problem = format!("the last {failures} heartbeats of the node failed: {error}");
                        self.change_problems(|problems| problems.heartbeats = Some(problem));
                    }
                }
            }
        }
    }

    /// Waits until this time, and until the node has a free slot.
    async fn until_free(&self, earliest: Instant) {
        sleep_until(earliest).await;
        while self.node_status().available_slots == 0 {
            self.outstanding.one_ended().await;
        }
    }

    /// Shows the pauses after runs without a runner.
    async fn keep_pauses(&self) {
        let begun = |runs, pause| {
            warn!(
                event = "stream.paused",
                runs,
                retry_in_ms = millis(pause),
                "runs had no runner on this node, it takes no runs for a while"
            );
            let problem = format!("the last {runs} runs had no runner on this node; install the plugins they need");
            self.change_problems(|problems| problems.runners = Some(problem));
        };
        let ended = || self.change_problems(|problems| problems.runners = None);
        self.no_runner.keep(begun, ended).await;
    }

    /// Removes the node from the control plane, unless reports are left: a scheduler may prefer a node that is gone.
    async fn leave(&self) {
        if !self.is_registered() || self.outstanding.count() > 0 || !self.owed().is_empty() {
            return;
        }
        match tokio::time::timeout(LEAVE_LIMIT, self.rest.remove()).await {
            Ok(Ok(())) => debug!("node removed from the control plane"),
            Ok(Err(error)) => debug!(error, "node could not be removed from the control plane"),
            Err(_) => debug!("node could not be removed from the control plane in time"),
        }
    }

    /// A new connection to the gRPC port.
    async fn connect(&self) -> Result<(Connection, WireClient), String> {
        let origin = self.origin.clone()?;
        let opened = self.client.http2(&self.config.grpc_url, CONNECTION).await;
        let connection = opened.map_err(|err| err.to_string())?;
        Ok((connection.clone(), LeaseServiceClient::with_origin(connection, origin)))
    }

    /// Makes a gRPC call. After a failure the next call uses a new connection.
    async fn call<T, F>(&self, call: impl FnOnce(WireClient) -> F) -> Result<T, LeaseError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let limit = tokio::time::Instant::now() + CALL_LIMIT;
        let answered = tokio::time::timeout_at(limit, async {
            let wire = self.calls_client().await.map_err(LeaseError::Unreachable)?;
            call(wire).await.map_err(|status| self.refused(&status))
        });
        let late = || LeaseError::Unreachable(format!("{} did not answer within {CALL_LIMIT:?}", self.config.grpc_url));
        let answered = answered.await.unwrap_or_else(|_| Err(late()));
        if matches!(answered, Err(LeaseError::Unreachable(_) | LeaseError::Grpc { retry: true, .. })) {
            *self.calls.lock().await = None;
        }
        answered.map(Response::into_inner)
    }

    async fn calls_client(&self) -> Result<WireClient, String> {
        let origin = self.origin.clone()?;
        let mut calls = self.calls.lock().await;
        if let Some(open) = calls.as_ref().filter(|open| !open.is_closed()) {
            return Ok(LeaseServiceClient::with_origin(open.clone(), origin));
        }
        // Boxed: the future is large, and would enlarge the future of every call.
        let (connection, wire) = Box::pin(self.connect()).await?;
        *calls = Some(connection);
        Ok(wire)
    }

    /// Sends the failure of a run that did not start here.
    async fn send_failure(&self, request: FailRequest) -> Result<(), LeaseError> {
        let answer = self.call(|mut wire| async move { wire.fail(request).await }).await?;
        self.accepted(answer.success, &answer.message)
    }

    async fn send_report(&self, report: Report) -> Result<(), LeaseError> {
        match report {
            Report::Complete(request) => {
                let answer = self.call(|mut wire| async move { wire.complete(request).await }).await?;
                self.accepted(answer.success, &answer.message)
            }
            Report::Fail(request) => self.send_failure(request).await,
        }
    }

    /// The address with the newest lease of its run.
    fn newest(&self, to: &ReportAddress) -> Result<At, LeaseError> {
        let at = At::read(to)?;
        Ok(match self.outstanding.lease_of(&to.task) {
            Some(lease) => At { lease: lease.to_string(), ..at },
            None => at,
        })
    }

    fn accepted(&self, success: bool, message: &str) -> Result<(), LeaseError> {
        let excerpt = || self.tokens.excerpt(message.as_bytes(), &[]);
        if success { Ok(()) } else { Err(LeaseError::NotAccepted { message: excerpt() }) }
    }

    fn refused(&self, status: &Status) -> LeaseError {
        report::refused(status, &self.tokens)
    }
}

#[async_trait]
impl LeaseSource for NodeRuntime {
    fn facts(&self) -> &PlaneFacts {
        &self.0.facts
    }

    async fn run(&self, stop: CancellationToken) {
        self.0.change_problems(|problems| problems.registration = Some("the node registers".to_owned()));
        tokio::select! {
            () = stop.cancelled() => return,
            () = self.0.register() => {}
        }
        let late = async {
            stop.cancelled().await;
            tokio::time::sleep(STOP_LIMIT).await;
        };
        let streaming = async {
            tokio::select! {
                () = self.0.keep_stream(&stop) => stop.cancelled().await,
                () = late => {}
            }
        };
        tokio::select! {
            () = self.0.send_heartbeats() => {}
            () = self.0.keep_pauses() => {}
            () = streaming => {}
        }
        self.0.leave().await;
    }

    fn readiness(&self) -> PlaneReadiness {
        self.0.readiness.borrow().clone()
    }

    async fn until_ready(&self) -> bool {
        self.0.readiness.subscribe().wait_for(|now| *now == PlaneReadiness::Ready).await.is_ok()
    }

    fn quiesce(&self) {
        self.0.quiet.cancel();
    }

    async fn poll(&self) -> Result<Option<Lease>, LeaseError> {
        let mut receiver = self.0.receiver.lock().await;
        tokio::select! {
            biased;
            lease = receiver.recv() => Ok(lease),
            () = self.0.quiet.cancelled() => Ok(None),
        }
    }

    /// The wire has no renewal. The answer has the newest lease of the run, its deadline and its token.
    async fn heartbeat(&self, to: &ReportAddress, _: &Pending, _: BootInstant) -> Result<Renewal, LeaseError> {
        let (old, new) = (At::read(to)?, self.0.newest(to)?);
        let address = (old != new).then(|| ReportAddress { task: to.task.clone(), at: new.text().into() });
        let hard_deadline = self.0.outstanding.moved_deadline_of(&to.task);
        let term = hard_deadline.map_or(Term::Unchanged, |deadline| Term::Until(incoming::expiry(deadline)));
        // A run in progress keeps its token among the latest ones.
        let token = self.0.outstanding.token_of(&to.task).inspect(|token| self.0.tokens.remember(token));
        Ok(Renewal { term, hard_deadline, address, token, ..Renewal::default() })
    }

    async fn report(&self, to: &ReportAddress, task_result: &TaskResult) -> Result<(), LeaseError> {
        let completed = task_result.outcome == Outcome::Completed;
        if !completed && self.0.outstanding.starts_again(&to.task) {
            return Err(LeaseError::Replaced { task: to.task.clone() });
        }
        let Some(report) = report::report(&self.0.newest(to)?, &self.0.config.node_id, task_result) else {
            return Ok(());
        };
        let sent = self.0.send_report(report).await;
        if !matches!(sent, Err(LeaseError::Unreachable(_))) {
            // The run no longer counts, also when the control plane does not accept its report for a long time.
            self.0.outstanding.settled(&to.task, completed);
        }
        if sent.is_ok() {
            self.0.no_runner.note(&task_result.outcome);
        }
        match &sent {
            Err(err) if err.advice().may_retry() => drop(self.0.owed().insert(to.task.clone())),
            _ => drop(self.0.owed().remove(&to.task)),
        }
        sent
    }

    async fn reject(&self, to: &ReportAddress, why: &Outcome) -> Result<(), LeaseError> {
        let failure = report::failure(&self.0.newest(to)?, &self.0.config.node_id, why, Timings::default());
        self.0.send_failure(FailRequest { retryable: false, ..failure }).await
    }
}
