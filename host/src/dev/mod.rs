//! The dev server: DDS, task service (DMS, under `/v1`) and domain server on one loopback port. It is a Node Runtime
//! control plane too, or instead.
//!
//! It implements the server side of both contracts for any node. `runner-host dev`, the demo and the
//! integration tests use it. It is not a mock: signatures, leases, tokens and limits are real. Times are those of the
//! wall clock, unless a fault sets the dev server's clock wrong. It is not for production. It has one domain and one
//! organisation. Jobs and sign-ins are in memory only and are lost at a restart. Domain data survives a restart if a
//! data folder is configured.
//!
//! Start at [`DevServer`]. The state is in three pure state machines: `identity`, `plane` and the index of `store`.
//! Each has its own lock, which is held briefly and never over an await. `plane` is the one queue. Two wires use it:
//! `http` is posemesh, `node_runtime` is REST and gRPC.

mod calls;
mod config;
mod faults;
mod http;
mod identity;
mod journal;
#[cfg(feature = "grpc")]
mod node_runtime;
mod plane;
mod siwe;
mod store;
#[cfg(test)]
pub(crate) mod tests;
mod tokens;
mod uploads;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use faults::{Live, wire::Wire};
use hyper::service::service_fn;
use identity::{Identity, Node};
use jiff::Timestamp;
use journal::Journal;
use plane::{NewToken, Plane};
use serde_json::Value;
use store::{Store, StoreError, Target};
use tokens::Tokens;
use tokio::{
    net::TcpListener,
    sync::Notify,
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;

use crate::{
    listen::{self, Http2, Limits},
    transport,
};

pub use config::{Config, DevError, Wires};
pub use faults::{Endpoint, Faults, FaultsError, WireForm};
pub use journal::JournalEntry;

/// A node counts as online if it has sent a request within this time. Nodes without work wait up to 30 s between
/// polls.
const ONLINE: Duration = Duration::from_secs(90);
/// How long a connection may stay idle. It is longer than the idle limit of clients. If the server closed a
/// connection that the client is about to use, the client would lose a request.
const IDLE: Duration = Duration::from_secs(300);
/// Interval of the expiry timer, which ends expired entries without a request.
const TICK: Duration = Duration::from_millis(250);

/// A running dev server. Dropping it without [`DevServer::stop`] stops it at once and breaks open connections.
pub struct DevServer {
    inner: Arc<Inner>,
    address: SocketAddr,
    stop: CancellationToken,
    served: Option<JoinHandle<()>>,
}

/// The state that all requests share.
struct Inner {
    config: Arc<Config>,
    /// `http://127.0.0.1:8700`, without a trailing slash.
    base: String,
    domain_id: Uuid,
    org: Uuid,
    tokens: Tokens,
    identity: Mutex<Identity>,
    plane: Mutex<Plane>,
    #[cfg(feature = "grpc")]
    nodes: Mutex<node_runtime::Nodes>,
    store: Arc<Store>,
    journal: Mutex<Journal>,
    faults: Mutex<Live>,
    stop: CancellationToken,
    /// Client for calls to nodes that registered with a URL. It is created for the first such node.
    client: OnceLock<transport::Client>,
    /// Notified after every change and every answered request.
    changed: Notify,
}

impl DevServer {
    /// Starts the server. Must be called inside a tokio runtime.
    pub async fn start(config: Config) -> Result<Self, DevError> {
        config.check()?;
        let config = Arc::new(config);
        let bind = config.bind;
        let listener = TcpListener::bind(bind).await.map_err(|source| DevError::Listen { bind, source })?;
        let address = listener.local_addr().map_err(|source| DevError::Listen { bind, source })?;
        let opening = config.clone();
        let store = tokio::task::spawn_blocking(move || Store::open(opening)).await;
        let store = Arc::new(store.expect("opening a store does not panic")?);
        let base = format!("http://{address}");
        let (domain_id, org) = (store.domain_id, Uuid::new_v4());
        let stop = CancellationToken::new();
        let inner = Arc::new(Inner {
            faults: Mutex::new(Live::new(config.faults.clone())),
            stop: stop.clone(),
            tokens: Tokens::new(base.clone(), domain_id, org),
            identity: Mutex::new(Identity::new(config.clone())),
            plane: Mutex::new(Plane::new(config.clone(), domain_id, org)),
            #[cfg(feature = "grpc")]
            nodes: Mutex::default(),
            journal: Mutex::new(Journal::new(config.journal_max)),
            client: OnceLock::new(),
            changed: Notify::new(),
            base,
            domain_id,
            org,
            store,
            config,
        });
        let served = tokio::spawn(serve(inner.clone(), listener, stop.clone()));
        Ok(Self { inner, address, stop, served: Some(served) })
    }

    /// The address on which it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Base URL of all services.
    #[must_use]
    pub fn url(&self) -> Url {
        self.dds_url()
    }

    /// Base URL of the sign-in service.
    #[must_use]
    pub fn dds_url(&self) -> Url {
        Url::parse(&self.inner.base).expect("an address makes a URL")
    }

    /// Base URL of the task service; ends in `/v1`.
    #[must_use]
    pub fn dms_url(&self) -> Url {
        Url::parse(&self.inner.dms()).expect("an address makes a URL")
    }

    /// Base URL of the domain server.
    #[must_use]
    pub fn domain_server_url(&self) -> Url {
        self.dds_url()
    }

    /// The one domain.
    #[must_use]
    pub fn domain_id(&self) -> Uuid {
        self.inner.domain_id
    }

    /// A fresh grant for authors. It is valid for jobs and all data of the domain.
    #[must_use]
    pub fn grant(&self) -> String {
        self.inner.grant()
    }

    /// Creates a job as `POST /jobs` does. A missing `domain_id` is filled in. The error is the line that an author
    /// would see.
    pub fn create_job(&self, mut job: Value) -> Result<Uuid, String> {
        if let Some(job) = job.as_object_mut() {
            job.entry("domain_id").or_insert_with(|| self.inner.domain_id.to_string().into());
        }
        let refused = |refusal| match refusal {
            plane::jobs::JobRefusal::Invalid(text) => text,
            plane::jobs::JobRefusal::KeyReused => "the key was used for another request".to_owned(),
        };
        let request = plane::jobs::parse(job, self.inner.domain_id).map_err(refused)?;
        let id = self.inner.plane().create(request, None, self.inner.now()).map_err(refused)?;
        self.inner.changed();
        Ok(id)
    }

    /// A job as `GET /jobs/{id}` shows it.
    #[must_use]
    pub fn job(&self, id: Uuid) -> Option<Value> {
        self.inner.plane().job(id, self.inner.now())
    }

    /// Waits until a job matches `wanted`, and returns that state. There is no time limit, so the caller must set
    /// one. A job that does not exist is `null`.
    pub async fn job_until(&self, id: Uuid, wanted: impl Fn(&Value) -> bool) -> Value {
        self.until(|| Some(self.job(id).unwrap_or_default()).filter(|job| wanted(job))).await
    }

    /// Cancels a job. `false`: no such job.
    pub fn cancel_job(&self, id: Uuid) -> bool {
        let known = self.inner.plane().cancel(id, self.inner.now()).is_some();
        self.inner.changed();
        known
    }

    /// Stores data in the domain and returns its id. The error is the line that a writer would see.
    pub async fn put_data(&self, name: &str, data_type: &str, bytes: &[u8]) -> Result<Uuid, String> {
        store::check_name("name", name).map_err(|err| err.to_string())?;
        store::check_name("data type", data_type).map_err(|err| err.to_string())?;
        let target = Target::New { name: name.to_owned(), data_type: data_type.to_owned() };
        let (store, now, bytes) = (self.inner.store.clone(), self.inner.now(), bytes.to_vec());
        let stored = tokio::task::spawn_blocking(move || {
            let staged = store.stage();
            std::fs::write(staged.path(), &bytes)?;
            store.commit(vec![(target, bytes.len() as u64, staged)], now)
        });
        let items =
            stored.await.expect("file system work does not panic").map_err(|err: StoreError| err.to_string())?;
        Ok(items[0].id)
    }

    /// Replaces the fault rules. Counts start again. Another clock offset is a jump of the dev server's clock, which
    /// may end leases and tokens.
    pub fn set_faults(&self, faults: Faults) {
        *self.inner.faults() = Live::new(faults);
        self.inner.changed();
    }

    /// The seed of the random draws of the faults.
    #[must_use]
    pub fn faults_seed(&self) -> u64 {
        self.inner.faults().seed()
    }

    /// Uploads in parts that were started and neither finished nor aborted.
    #[must_use]
    pub fn open_uploads(&self) -> usize {
        self.inner.store.open_uploads(self.inner.now())
    }

    /// The newest requests, oldest first ([`Config::journal_max`]).
    #[must_use]
    pub fn journal(&self) -> Vec<JournalEntry> {
        self.inner.journal().since(0).1
    }

    /// Waits until the journal matches `wanted`. There is no time limit, so the caller must set one.
    pub async fn journal_until(&self, wanted: impl Fn(&[JournalEntry]) -> bool) -> Vec<JournalEntry> {
        self.until(|| Some(self.journal()).filter(|journal| wanted(journal))).await
    }

    /// Waits until a node that serves `capability` is online. There is no time limit.
    pub async fn node_online(&self, capability: &str) {
        let serves = |node: &Node| node.capabilities.iter().any(|name| &**name == capability);
        self.until(|| self.inner.nodes_online().iter().any(serves).then_some(())).await;
    }

    /// Removes a wallet's registration, as an operator of DDS could. Its next login is answered 403. `false`: it was
    /// not registered.
    pub fn forget_wallet(&self, wallet: &str) -> bool {
        self.inner.identity().forget(&wallet.to_ascii_lowercase())
    }

    /// Stops accepting requests and lets open ones end within [`Config::stop_grace`]. Removes temporary data, and
    /// waits until all of it is done.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(served) = self.served.take() {
            served.await.expect("serving does not panic");
        }
    }

    async fn until<T>(&self, mut check: impl FnMut() -> Option<T>) -> T {
        loop {
            // Subscribe before the check, so that no change between the two is missed.
            let mut notified = std::pin::pin!(self.inner.changed.notified());
            notified.as_mut().enable();
            if let Some(found) = check() {
                return found;
            }
            notified.await;
        }
    }
}

impl Drop for DevServer {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(served) = &self.served {
            served.abort();
        }
    }
}

impl Inner {
    fn identity(&self) -> MutexGuard<'_, Identity> {
        self.identity.lock().expect("nothing panics while it holds the identities")
    }

    fn plane(&self) -> MutexGuard<'_, Plane> {
        self.plane.lock().expect("nothing panics while it holds the plane")
    }

    #[cfg(feature = "grpc")]
    fn nodes(&self) -> MutexGuard<'_, node_runtime::Nodes> {
        self.nodes.lock().expect("nothing panics while it holds the nodes")
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().expect("nothing panics while it holds the journal")
    }

    fn faults(&self) -> MutexGuard<'_, Live> {
        self.faults.lock().expect("nothing panics while it holds the faults")
    }

    /// The dev server's clock.
    fn now(&self) -> Timestamp {
        Timestamp::now() + self.faults().clock_offset()
    }

    fn form(&self) -> WireForm {
        self.faults().form()
    }

    /// A task's domain token, as it is sent to the node.
    fn task_token(&self, task: Uuid, token: &NewToken, node: Uuid, now: Timestamp) -> String {
        let text = self.tokens.for_task(task, token.serial, node, now, token.expires);
        match self.form() {
            WireForm::New => text,
            WireForm::Old => Tokens::opaque(&text),
        }
    }

    fn changed(&self) {
        self.changed.notify_waiters();
    }

    /// Host and port, the `domain` of sign-in messages.
    fn authority(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    fn dms(&self) -> String {
        format!("{}/v1", self.base)
    }

    fn grant(&self) -> String {
        let now = self.now();
        self.tokens.grant(now, now + self.config.grant_ttl)
    }

    /// Nodes that are logged in and have sent a request lately.
    fn nodes_online(&self) -> Vec<Node> {
        let now = self.now();
        let nodes = self.identity().nodes(now).into_iter();
        let online = |(node, live): (Node, bool)| (live && now < node.seen_at + ONLINE).then_some(node);
        nodes.filter_map(online).collect()
    }
}

/// Serves until `stop`, then ends open requests.
async fn serve(server: Arc<Inner>, listener: TcpListener, stop: CancellationToken) {
    let router = http::router(server.clone());
    #[cfg(feature = "grpc")]
    let http2 = if server.config.wires.has_node_runtime() { Http2::Accepted } else { Http2::Refused };
    #[cfg(not(feature = "grpc"))]
    let http2 = Http2::Refused;
    let limits = Limits {
        connections: usize::MAX,
        per_sender: usize::MAX,
        head_time: IDLE,
        grace: server.config.stop_grace,
        reserve: 0,
        http2,
    };
    let start = |socket, _, close: &CancellationToken| {
        let (wire, line) = Wire::new(socket, close.clone());
        let (server, router, peer) = (server.clone(), router.clone(), identity::Peer::default());
        let answer = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(peer.clone());
            faults::layer::answer(server.clone(), router.clone(), line.clone(), request)
        });
        (wire, answer)
    };
    let serving = listen::serve(listener, limits, stop.clone(), start);
    let (broken, ()) = tokio::join!(serving, tick(&server, stop));
    if broken > 0 {
        tracing::warn!(
            event = "dev.connections_closed",
            connections = broken,
            "open connections were closed at the stop"
        );
    }
    let store = server.store.clone();
    tokio::task::spawn_blocking(move || store.close()).await.expect("closing the store does not panic");
}

/// Runs the periodic work until `stop`.
async fn tick(server: &Arc<Inner>, stop: CancellationToken) {
    let mut probes = JoinSet::new();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(tick.tick()).await.is_some() {
        expire(server).await;
        while probes.try_join_next().is_some() {}
        let due = server.identity().due(server.now());
        due.into_iter().for_each(|url| {
            probes.spawn(calls::probe(server.clone(), url));
        });
    }
    probes.shutdown().await;
}

/// Ends expired entries, so that waiting authors are notified without a request.
async fn expire(server: &Arc<Inner>) {
    let now = server.now();
    server.identity().prune(now);
    server.plane().expire(now);
    if server.store.has_late_uploads(now) {
        let store = server.store.clone();
        tokio::task::spawn_blocking(move || store.expire_uploads(now)).await.expect("expiring uploads does not panic");
    }
    server.changed();
}
