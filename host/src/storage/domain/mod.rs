//! A task's data on the domain server of its lease.
//!
//! [`DomainPorts`] is one task's view: it waits for the set-up heartbeat, speaks only to the
//! server the lease names (and the operator allows), takes the newest bearer for each request, and
//! stops for good when the lease is lost, the control plane cancels the task, or the task is over. `calls` sends single requests,
//! `download` and `upload` are what runners see, `transfer` brings an input through broken
//! connections (`retry` paces that), `uploads_in_parts` and `stream` carry large
//! artifacts, `parts`, `cid` and `wire` are pure. Nothing in here decides what is reported.

mod calls;
mod cid;
mod download;
mod info;
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
use url::Url;

use crate::{
    model::{
        Artifact, ArtifactSpec, Budget, CancelReason, Coordinates, DataLocation, Fetched, HeldLease, InputStream,
        Materialized, OutputStream, PortError, PortErrorKind, Ports, Setup,
    },
    storage::{Storage, zip::UnpackLimits},
    transport::Client,
};

/// How the node talks to domain servers. One per process: it also remembers what the servers said
/// about their limits.
#[derive(Debug)]
pub struct Config {
    /// Sent as `posemesh-client-id` on every call; servers bill repeated access of one client once.
    pub client_id: String,
    /// A transfer in which nothing moves for so long has failed.
    pub stall: Duration,
    /// How long a small answer, or the head of a large one, may take.
    pub request_timeout: Duration,
    /// How long a refused request waits for a newer bearer before it is repeated.
    pub token_wait: Duration,
    /// Pause before a failed request is sent again; it grows with each try.
    pub part_pause: Duration,
    /// How long a transfer in which nothing moves is tried again.
    pub patience: Duration,
    /// What is held in memory is charged to it.
    pub budget: Budget,
    /// What a zip input may hold.
    pub unpack: UnpackLimits,
    /// Hosts (or `host:port`) that may get a lease's token; empty allows any.
    pub domain_hosts: Vec<String>,
    /// How many parts of one artifact travel at once; at least one. Two fill a connection that has
    /// to wait for answers, and bound what a stream holds in memory: they, and the one being filled.
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
            patience: Duration::from_secs(120),
            budget: Budget::unlimited(),
            unpack: UnpackLimits::default(),
            domain_hosts: Vec::new(),
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
    /// Connects to nobody yet.
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

/// See the module's text.
pub struct DomainPorts {
    inner: Arc<Inner>,
}

/// What the ports of one task and its streams share.
struct Inner {
    client: Client,
    grant: HeldLease,
    dir: PathBuf,
    config: Arc<Config>,
    /// Turned when the task is over.
    closed: CancellationToken,
    /// Everything under way, so that `close` can wait for it.
    tracker: TaskTracker,
    books: Mutex<Books>,
}

/// What this task has stored and fetched.
#[derive(Default)]
struct Books {
    /// Which logical path took a stored name and type.
    names: HashMap<(String, String), String>,
    /// By logical path.
    published: BTreeMap<String, Published>,
    /// In the order in which they came to their end.
    fetched: Vec<Fetched>,
}

struct Published {
    artifact: Artifact,
    /// When the server last changed it, in its words.
    updated_at: Option<String>,
}

impl Books {
    /// Notes an input; one that was read before is not noted again.
    fn fetch(&mut self, input: Fetched) {
        if !self.fetched.contains(&input) {
            self.fetched.push(input);
        }
    }
}

impl DomainPorts {
    /// Ports for the task of `grant`, which may write below `dir`. No request is made yet.
    #[must_use]
    pub fn new(client: Client, grant: HeldLease, dir: PathBuf, config: Arc<Config>) -> Self {
        let inner = Inner {
            client,
            grant,
            dir,
            config,
            closed: CancellationToken::new(),
            tracker: TaskTracker::new(),
            books: Mutex::default(),
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

    async fn put_file(&self, spec: ArtifactSpec, file: &Path) -> Result<Option<String>, PortError> {
        self.inner.guarded(upload::put_file(&self.inner, spec, file)).await
    }

    async fn create(&self, spec: ArtifactSpec) -> Result<Box<dyn OutputStream>, PortError> {
        self.inner.guarded(async { stream::create(&self.inner, spec) }).await
    }

    fn published(&self) -> Vec<Artifact> {
        self.inner.books().published.values().map(|published| published.artifact.clone()).collect()
    }

    fn fetched(&self) -> Vec<Fetched> {
        self.inner.books().fetched.clone()
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
    /// Runs `work` until it is done, or until [`Self::over`].
    async fn guarded<T>(&self, work: impl Future<Output = Result<T, PortError>>) -> Result<T, PortError> {
        // `close` waits for this, so that what `work` leaves behind when it is dropped is seen by it.
        let _busy = self.tracker.token();
        tokio::select! {
            biased;
            over = self.over() => Err(over),
            result = work => result,
        }
    }

    /// Waits until nothing more may be transferred: the lease is lost, the control plane has cancelled the task, or
    /// the task is over. A drain or an operator lets a runner store what it has.
    async fn over(&self) -> PortError {
        let cancelled_by_plane = async {
            if self.grant.cancel.cancelled().await != CancelReason::Plane {
                std::future::pending::<()>().await;
            }
        };
        let why = tokio::select! {
            biased;
            () = self.grant.lost() => "the lease is lost",
            () = cancelled_by_plane => "the control plane cancelled the task",
            () = self.closed.cancelled() => "the task is over",
        };
        PortError::new(PortErrorKind::LeaseOver, format!("{why}: nothing more is transferred for it"))
    }

    /// The error of [`Self::over`] if that has happened.
    async fn still_ours(&self) -> Result<(), PortError> {
        let cancelled = self.grant.cancel.reason() == Some(CancelReason::Plane);
        match cancelled || self.closed.is_cancelled() || !self.grant.check_deadline() {
            true => Err(self.over().await),
            false => Ok(()),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("nobody panics while holding the books")
    }

    /// Where the data lives, once the plane has answered and if we may go there.
    async fn coordinates(&self) -> Result<Coordinates, PortError> {
        let refuse = |message: String| PortError::new(PortErrorKind::Setup, message);
        let coordinates = match self.grant.setup().await {
            Setup::Ready(Ok(DataLocation::DomainServer(coordinates))) => coordinates,
            Setup::Ready(Ok(other)) => {
                return Err(refuse(format!("the task's data is not on a domain server: {other:?}")));
            }
            Setup::Ready(Err(message)) | Setup::Refused(message) => return Err(refuse(message)),
            Setup::Pending => unreachable!("`HeldLease::setup` waits while it is pending"),
        };
        let server = &coordinates.server;
        self.client.check(server).map_err(|err| refuse(format!("domain server {err}")))?;
        if !server.username().is_empty() || server.password().is_some() {
            return Err(refuse("the domain server's URL holds credentials; expected scheme, host and path".to_owned()));
        }
        if !allowed(server, &self.config.domain_hosts) {
            let host = server.host_str().unwrap_or_default();
            return Err(refuse(format!("domain server {host} is not in DOMAIN_HOSTS; add it there to allow it")));
        }
        Ok(coordinates)
    }
}

/// Whether the operator lets us speak to this server.
fn allowed(server: &Url, hosts: &[String]) -> bool {
    let host = server.host_str().unwrap_or_default();
    let with_port = format!("{host}:{}", server.port_or_known_default().unwrap_or_default());
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    hosts.is_empty()
        || hosts.iter().any(|allowed| [host, bare, &with_port].iter().any(|h| h.eq_ignore_ascii_case(allowed)))
}
