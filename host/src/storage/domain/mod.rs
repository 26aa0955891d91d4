//! A task's data on the domain server of its lease.
//!
//! [`DomainPorts`] are the ports of one task. They wait for the set-up heartbeat. They call only the server that the
//! lease names and the operator allows. Each request has the newest bearer. They stop when the lease is lost, the
//! control plane cancels the task, or the task is over.
//!
//! - `calls` sends single requests.
//! - `download` and `upload` are what runners use.
//! - `find` answers queries; `list_parser` reads their answers entry by entry.
//! - `transfer` resumes an input after broken connections; `retry` has its pauses.
//! - `uploads_in_parts` and `stream` send large artifacts.
//! - `cid`, `list_parser` and `wire` are pure.
//!
//! Nothing in here decides what is reported.

mod calls;
mod cid;
mod download;
mod find;
mod info;
mod list_parser;
mod retry;
mod source;
mod stream;
mod transfer;
mod upload;
mod uploads_in_parts;
mod wire;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    model::{
        Artifact, ArtifactSpec, Budget, CancelReason, Coordinates, DataLocation, DataQuery, DomainHosts, EmptyList,
        Fetched, HeldLease, InputStream, Materialized, OutputStream, PortError, PortErrorKind, Ports, Setup,
    },
    storage::{Storage, zip::UnpackLimits},
    transport::Client,
};

/// How the node calls domain servers. One per process, because it also caches the limits of the servers.
#[derive(Debug)]
pub struct Config {
    /// Sent as `posemesh-client-id` on every call. Servers bill repeated access of one client once.
    pub client_id: String,
    /// A transfer fails after no bytes moved for this time.
    pub stall: Duration,
    /// Time limit of a small answer, and of the head of a large one.
    pub request_timeout: Duration,
    /// How long a refused request waits for a newer bearer before it is repeated.
    pub token_wait: Duration,
    /// First pause before a failed request is repeated. It grows with each try.
    pub part_pause: Duration,
    /// Retry limit of a transfer without progress.
    pub retry_limit: Duration,
    /// Bytes in memory are charged to it.
    pub budget: Budget,
    /// Limits for the content of zip inputs.
    pub unpack: UnpackLimits,
    /// The servers that may get a lease's token. Empty allows any; an adapter may be stricter.
    pub domain_hosts: DomainHosts,
    /// How many parts of one artifact are sent concurrently, at least one. With two, a connection is busy while one
    /// part waits for its answer. A stream holds these parts and the next one in memory.
    pub parallel_parts: usize,
    info: info::Cache,
}

impl Config {
    /// The usual settings for this client id.
    #[must_use]
    pub fn new(client_id: impl Into<String>) -> Self {
        Self {
            client_id: client_id.into(),
            stall: Duration::from_secs(30),
            request_timeout: Duration::from_secs(30),
            token_wait: Duration::from_secs(3),
            part_pause: Duration::from_millis(250),
            retry_limit: Duration::from_secs(120),
            budget: Budget::unlimited(),
            unpack: UnpackLimits::default(),
            domain_hosts: DomainHosts::default(),
            parallel_parts: 2,
            info: info::Cache::default(),
        }
    }
}

/// Storage on domain servers.
pub struct DomainStorage {
    client: Client,
    config: Arc<Config>,
}

impl DomainStorage {
    /// Creates the storage. No connection is opened yet.
    #[must_use]
    pub fn new(client: Client, config: Config) -> Self {
        Self { client, config: Arc::new(config) }
    }
}

impl Storage for DomainStorage {
    fn ports(&self, held: &HeldLease, dir: &Path) -> Arc<dyn Ports> {
        Arc::new(DomainPorts::new(self.client.clone(), held.clone(), dir.to_owned(), Arc::clone(&self.config)))
    }
}

/// See the module documentation.
pub struct DomainPorts {
    inner: Arc<Inner>,
}

/// What the ports of one task and its streams share.
struct Inner {
    client: Client,
    held: HeldLease,
    dir: PathBuf,
    config: Arc<Config>,
    /// Cancelled when the task is over.
    closed: CancellationToken,
    /// All running transfers, so that `close` can wait for them.
    tracker: TaskTracker,
    record: Mutex<Record>,
}

/// What this task has stored and fetched.
#[derive(Default)]
struct Record {
    /// The logical path of each stored name and type.
    names: HashMap<(String, String), String>,
    /// By logical path.
    published: BTreeMap<String, Published>,
    /// In the order of their ends.
    fetched: Vec<Fetched>,
}

struct Published {
    artifact: Artifact,
    /// The time of its last change, as the server states it.
    updated_at: Option<String>,
}

impl Record {
    /// Lists an input. Each input is listed once.
    fn add_fetched(&mut self, input: Fetched) {
        if !self.fetched.contains(&input) {
            self.fetched.push(input);
        }
    }
}

impl DomainPorts {
    /// Ports for the task of `held`, which may write below `dir`. No request is made yet.
    #[must_use]
    pub fn new(client: Client, held: HeldLease, dir: PathBuf, config: Arc<Config>) -> Self {
        let inner = Inner {
            client,
            held,
            dir,
            config,
            closed: CancellationToken::new(),
            tracker: TaskTracker::new(),
            record: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }
}

impl Drop for DomainPorts {
    fn drop(&mut self) {
        self.inner.closed.cancel();
    }
}

#[async_trait]
impl Ports for DomainPorts {
    async fn open(&self, cid: &str) -> Result<Box<dyn InputStream>, PortError> {
        self.inner.guarded(download::open(&self.inner, cid)).await
    }

    async fn materialize(&self, cid: &str) -> Result<Materialized, PortError> {
        self.inner.guarded(download::materialize(&self.inner, cid)).await
    }

    async fn find(&self, query: DataQuery) -> Result<Box<dyn InputStream>, PortError> {
        self.inner.guarded(find::find(&self.inner, query)).await
    }

    async fn put_file(&self, spec: ArtifactSpec, file: &Path) -> Result<Option<String>, PortError> {
        self.inner.guarded(upload::put_file(&self.inner, spec, file)).await
    }

    async fn create(&self, spec: ArtifactSpec) -> Result<Box<dyn OutputStream>, PortError> {
        self.inner.guarded(async { stream::create(&self.inner, spec) }).await
    }

    fn published(&self) -> Vec<Artifact> {
        self.inner.record().published.values().map(|published| published.artifact.clone()).collect()
    }

    fn fetched(&self) -> Vec<Fetched> {
        self.inner.record().fetched.clone()
    }

    fn budget(&self) -> &Budget {
        &self.inner.config.budget
    }

    async fn close(&self) {
        self.inner.closed.cancel();
        self.inner.tracker.close();
        self.inner.tracker.wait().await;
    }
}

impl Inner {
    /// Runs `work` until it is done, or until [`Self::over`] returns.
    async fn guarded<T>(&self, work: impl Future<Output = Result<T, PortError>>) -> Result<T, PortError> {
        // `close` waits for this token, and so for tasks that `work` spawns when it is dropped.
        let _busy = self.tracker.token();
        tokio::select! {
            biased;
            over = self.over() => Err(over),
            result = work => result,
        }
    }

    /// Waits until nothing more may be transferred: the lease is lost, the control plane has cancelled the task, or
    /// the task is over. After a cancel by a drain or an operator a runner may still store its results.
    async fn over(&self) -> PortError {
        let cancelled_by_plane = async {
            if self.held.cancel.cancelled().await != CancelReason::Plane {
                std::future::pending::<()>().await;
            }
        };
        let why = tokio::select! {
            biased;
            () = self.held.lost() => "the lease is lost",
            () = cancelled_by_plane => "the control plane cancelled the task",
            () = self.closed.cancelled() => "the task is over",
        };
        PortError::new(PortErrorKind::LeaseOver, format!("{why}: nothing more is transferred for it"))
    }

    /// The error of [`Self::over`] if that has happened.
    async fn check_held(&self) -> Result<(), PortError> {
        let cancelled = self.held.cancel.reason() == Some(CancelReason::Plane);
        match cancelled || self.closed.is_cancelled() || !self.held.check_deadline() {
            true => Err(self.over().await),
            false => Ok(()),
        }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().expect("no code panics while it holds the record")
    }

    /// The location of the data, after the control plane has named it, if the operator allows the server.
    async fn coordinates(&self) -> Result<Coordinates, PortError> {
        let refuse = |message: String| PortError::new(PortErrorKind::Setup, message);
        let coordinates = match self.held.setup().await {
            Setup::Ready(Ok(DataLocation::DomainServer(coordinates))) => coordinates,
            Setup::Ready(Ok(other)) => {
                return Err(refuse(format!("the task's data is not on a domain server: {other:?}")));
            }
            Setup::Ready(Err(message)) | Setup::Refused(message) => return Err(refuse(message)),
            Setup::Pending => unreachable!("`HeldLease::setup` waits while it is pending"),
        };
        let server = &coordinates.server;
        self.client.check(server).map_err(|err| refuse(format!("domain server {err}")))?;
        self.config.domain_hosts.check(server, EmptyList::AllowsAny).map_err(refuse)?;
        Ok(coordinates)
    }
}
