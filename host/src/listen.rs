//! Accepts connections and serves HTTP on them: the pages, the control socket, the dev server.
//!
//! Anybody can connect to the pages. [`Limits`] bound the open connections of one sender and of all senders. A new
//! connection is always served. It replaces the connection that has had no request for the longest time. The caller
//! decides how a request is answered.

use std::{
    collections::HashMap,
    fs::File,
    future::Future,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::body::Body;
use http::{Request, Response};
use hyper::{
    body::Incoming,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::{AbortHandle, Id, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

/// The pause after an accept that failed. Another connection may end meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// How often a used reserve of descriptors is filled again.
const REFILL_PAUSE: Duration = Duration::from_secs(1);

/// What connections may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Open connections, at most.
    pub(crate) connections: usize,
    /// Open connections of one sender, at most.
    pub(crate) per_sender: usize,
    /// How long a connection may take to send the head of a request. This holds for each request.
    pub(crate) head_time: Duration,
    /// How long a stop waits for requests in progress.
    pub(crate) grace: Duration,
    /// Descriptors reserved for connections while the process has no other free one.
    pub(crate) reserve: usize,
    /// Whether they may begin with HTTP/2.
    pub(crate) http2: Http2,
}

/// HTTP/2 without TLS and by prior knowledge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Http2 {
    Refused,
    #[cfg(feature = "grpc")]
    Accepted,
}

/// A listening socket.
pub(crate) trait Listener: Send + Sync {
    type Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    type Peer: Copy + Send;

    fn accept(&self) -> impl Future<Output = io::Result<(Self::Socket, Self::Peer)>> + Send;

    /// The address of the peer, if senders can be distinguished.
    fn sender(peer: Self::Peer) -> Option<IpAddr>;
}

impl Listener for TcpListener {
    type Socket = tokio::net::TcpStream;
    type Peer = SocketAddr;

    async fn accept(&self) -> io::Result<(Self::Socket, Self::Peer)> {
        let (socket, peer) = self.accept().await?;
        // Small answers must not wait for an acknowledgement. Without the option they are only slower.
        let _ = socket.set_nodelay(true);
        Ok((socket, peer))
    }

    fn sender(peer: Self::Peer) -> Option<IpAddr> {
        Some(sender(peer.ip()))
    }
}

#[cfg(unix)]
impl Listener for tokio::net::UnixListener {
    type Socket = tokio::net::UnixStream;
    type Peer = ();

    async fn accept(&self) -> io::Result<(Self::Socket, Self::Peer)> {
        Ok((self.accept().await?.0, ()))
    }

    fn sender((): Self::Peer) -> Option<IpAddr> {
        None
    }
}

/// Masks the address: one IPv6 sender usually has a whole /64.
pub(crate) fn sender(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

/// Serves until `stop`, and then for `limits.grace` while requests are in progress. Returns how many connections
/// were open after that.
///
/// `start` makes the byte stream and the service of a new connection. The token ends this connection like `stop`.
pub(crate) async fn serve<L, I, S, E>(
    listener: L,
    limits: Limits,
    stop: CancellationToken,
    start: impl Fn(L::Socket, L::Peer, &CancellationToken) -> (I, S),
) -> usize
where
    L: Listener,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<Body>, Error = E> + Send + Sync + 'static,
    S::Future: Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let (mut open, mut tasks, mut reserve) = (Open::default(), JoinSet::new(), Reserve::new(limits.reserve));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(ended) = tasks.join_next_with_id() => {
                open.ended(ended);
                reserve.refill();
                continue;
            }
            () = tokio::time::sleep(REFILL_PAUSE), if !reserve.is_full() => {
                reserve.refill();
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(err) if out_of_descriptors(&err) && reserve.release() => continue,
            Err(err) if out_of_descriptors(&err) && open.close_quietest(None) => {
                // The descriptor is free when the task has ended.
                if let Some(ended) = tasks.join_next_with_id().await {
                    open.ended(ended);
                }
                continue;
            }
            Err(err) => {
                warn!(event = "connection.not_accepted", error = %err, "connection could not be accepted");
                let _ = tokio::time::timeout(ACCEPT_PAUSE, stop.cancelled()).await;
                continue;
            }
        };
        let sender = L::sender(peer);
        open.make_room(sender, limits);
        let active = Active::default();
        let stop = stop.child_token();
        let (stream, service) = start(socket, peer, &stop);
        let task = tasks.spawn(connection(stream, service, limits, active.clone(), stop));
        open.connections.insert(task.id(), Connection { sender, active, task });
    }
    drop((listener, reserve));
    let all = async { while tasks.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(limits.grace, all).await;
    let left = tasks.len();
    tasks.shutdown().await;
    left
}

/// Serves one connection until its end, or until `stop`.
async fn connection<I, S, E>(stream: I, service: S, limits: Limits, active: Active, stop: CancellationToken)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<Body>, Error = E> + Send + 'static,
    S::Future: Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let service = service_fn(move |request| {
        active.mark();
        let (active, answering) = (active.clone(), service.call(request));
        async move {
            let answer = answering.await;
            active.mark();
            answer
        }
    });
    let stream = TokioIo::new(stream);
    match limits.http2 {
        Http2::Refused => {
            let mut http = hyper::server::conn::http1::Builder::new();
            let http = http.timer(TokioTimer::new()).header_read_timeout(limits.head_time);
            until_stopped(http.serve_connection(stream, service), stop).await;
        }
        #[cfg(feature = "grpc")]
        Http2::Accepted => {
            let mut http = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
            http.http1().timer(TokioTimer::new()).header_read_timeout(limits.head_time);
            until_stopped(http.serve_connection(stream, service), stop).await;
        }
    }
}

async fn until_stopped<C>(connection: C, stop: CancellationToken)
where
    C: GracefulConnection,
    C::Error: std::fmt::Display,
{
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(err) = ended {
        debug!(error = %err, "connection broke");
    }
}

/// The latest of three instants: the connection opened, a request began, or a request was answered.
#[derive(Clone)]
struct Active {
    opened: Instant,
    after_ms: Arc<AtomicU64>,
}

impl Default for Active {
    fn default() -> Self {
        Self { opened: Instant::now(), after_ms: Arc::default() }
    }
}

impl Active {
    fn mark(&self) {
        let after = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.after_ms.store(after, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.opened + Duration::from_millis(self.after_ms.load(Ordering::Relaxed))
    }
}

struct Connection {
    sender: Option<IpAddr>,
    active: Active,
    task: AbortHandle,
}

/// The open connections.
#[derive(Default)]
struct Open {
    connections: HashMap<Id, Connection>,
}

impl Open {
    fn ended(&mut self, ended: Result<(Id, ()), tokio::task::JoinError>) {
        let id = match &ended {
            Ok((id, ())) => *id,
            Err(err) => err.id(),
        };
        self.connections.remove(&id);
        if let Err(err) = ended
            && err.is_panic()
        {
            error!(event = "connection.failed", error = %err, "connection handler failed");
        }
    }

    /// Closes a connection if another one of `sender` would exceed a limit.
    fn make_room(&mut self, sender: Option<IpAddr>, limits: Limits) {
        let all = self.connections.len();
        let too_many = |sender: IpAddr| {
            let same = |connection: &&Connection| connection.sender == Some(sender);
            all >= limits.per_sender && self.connections.values().filter(same).count() >= limits.per_sender
        };
        if let Some(sender) = sender.filter(|sender| too_many(*sender)) {
            self.close_quietest(Some(sender));
        } else if all >= limits.connections {
            self.close_quietest(None);
        }
    }

    /// Closes the connection that was inactive for the longest time, of one sender or of all. `false`: there is none.
    fn close_quietest(&mut self, sender: Option<IpAddr>) -> bool {
        let candidates =
            self.connections.iter().filter(|(_, connection)| sender.is_none() || connection.sender == sender);
        let Some(id) = candidates.min_by_key(|(_, connection)| connection.active.last()).map(|(id, _)| *id) else {
            return false;
        };
        if let Some(connection) = self.connections.remove(&id) {
            debug!(sender = ?connection.sender, "connection closed for a new one");
            connection.task.abort();
        }
        true
    }
}

/// Open files that reserve descriptors.
struct Reserve {
    files: Vec<File>,
    size: usize,
}

impl Reserve {
    fn new(size: usize) -> Self {
        // Only Unix has a limit that a process can reach.
        let mut reserve = Self { files: Vec::new(), size: if cfg!(unix) { size } else { 0 } };
        reserve.refill();
        reserve
    }

    fn is_full(&self) -> bool {
        self.files.len() >= self.size
    }

    fn refill(&mut self) {
        while !self.is_full() {
            let Ok(file) = File::open("/dev/null") else { return };
            self.files.push(file);
        }
    }

    /// Frees one descriptor. `false`: none is left.
    fn release(&mut self) -> bool {
        if self.is_full() && self.size > 0 {
            warn!(
                event = "descriptors.exhausted",
                reserve = self.size,
                "no file descriptor is free, connections use the reserve"
            );
        }
        self.files.pop().is_some()
    }
}

/// Whether the process or the system has reached its limit of open files.
fn out_of_descriptors(err: &io::Error) -> bool {
    #[cfg(unix)]
    {
        use rustix::io::Errno;
        let known = err.raw_os_error().map(Errno::from_raw_os_error);
        known == Some(Errno::MFILE) || known == Some(Errno::NFILE)
    }
    #[cfg(not(unix))]
    {
        let _ = err;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_senders_are_grouped_by_network_prefix() {
        let of = |text: &str| sender(text.parse().expect("an address")).to_string();
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
        assert_eq!(of("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_ne!(of("2001:db8:1:3::1"), of("2001:db8:1:2::1"));
    }
}
