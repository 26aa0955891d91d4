//! The connection pool.
//!
//! A request uses an idle connection or opens a new one. The connection returns to the pool after the whole answer was
//! read. The runtime of the request that opened a connection drives it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use http::{HeaderValue, Request, Response, Uri, header, uri};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::client::legacy::connect::Connection;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tower_service::Service;

use super::{Body, Config, connect::Connector, innermost, tls_error::Failure};

/// See the module documentation. Cheap to clone.
#[derive(Clone)]
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    connector: Connector,
    /// How long a connection stays open without a request.
    idle_max: Duration,
    /// Most idle connections.
    idle_at_most: usize,
    /// One permit per concurrent request.
    permits: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A node calls a few servers: a linear search is faster than a hash.
    servers: Vec<Server>,
    /// The task that closes idle connections runs.
    swept: bool,
}

struct Server {
    scheme: uri::Scheme,
    authority: uri::Authority,
    host: HeaderValue,
    /// The most recent one is used first, so that surplus connections expire. Their number is bounded by the concurrent
    /// requests.
    idle: Vec<Idle>,
}

struct Idle {
    sender: SendRequest<Body>,
    proxied: bool,
    since: Instant,
}

/// A connection that a request uses.
pub(super) struct InUse {
    sender: SendRequest<Body>,
    /// A proxy reads the request, so its URI must be absolute.
    proxied: bool,
    scheme: uri::Scheme,
    authority: uri::Authority,
    /// Held until the answer was read. `None` before the request is sent.
    permit: Option<OwnedSemaphorePermit>,
}

impl Pool {
    /// Creates an empty pool. It keeps at most `config.idle_at_most` idle connections for `idle_max`, and sends at most
    /// `config.at_once` concurrent requests.
    pub(super) fn new(config: &Config, idle_max: Duration) -> Self {
        let connector = Connector::new(config);
        let permits = Arc::new(Semaphore::new(config.at_once.clamp(1, Semaphore::MAX_PERMITS)));
        let idle_at_most = config.idle_at_most;
        Self { shared: Arc::new(Shared { connector, idle_max, idle_at_most, permits, state: Mutex::default() }) }
    }

    /// Waits for a permit, sends `request`, and waits for the head of its answer. The URI must be absolute.
    pub(super) async fn request(&self, mut request: Request<Body>) -> Result<(Response<Incoming>, InUse), Failure> {
        let uri::Parts { scheme, authority, path_and_query, .. } = std::mem::take(request.uri_mut()).into_parts();
        let (Some(scheme), Some(authority)) = (scheme, authority) else {
            return Err(Failure::Other("expected an absolute URL".to_owned()));
        };
        let path = path_and_query.unwrap_or_else(|| uri::PathAndQuery::from_static("/"));
        let permit = Arc::clone(&self.shared.permits).acquire_owned().await.expect("the semaphore is never closed");
        loop {
            let idle = self.shared.idle(&scheme, &authority);
            let fresh = idle.is_none();
            let mut in_use = match idle {
                Some((idle, host)) => {
                    request.headers_mut().entry(header::HOST).or_insert(host);
                    InUse {
                        sender: idle.sender,
                        proxied: idle.proxied,
                        scheme: scheme.clone(),
                        authority: authority.clone(),
                        permit: None,
                    }
                }
                None => {
                    // Boxed: the future is large, and would enlarge the future of every request.
                    let in_use = Box::pin(self.connect(&scheme, &authority)).await?;
                    request.headers_mut().entry(header::HOST).or_insert(host_of(&scheme, &authority)?);
                    in_use
                }
            };
            *request.uri_mut() = in_use.form(path.clone());
            // The server may have just closed an idle connection.
            let sent = match in_use.sender.ready().await {
                Ok(()) => in_use.sender.try_send_request(request).await,
                Err(_) if !fresh => continue,
                Err(err) => return Err(self.failure(&err)),
            };
            match sent {
                Ok(response) => {
                    in_use.permit = Some(permit);
                    return Ok((response, in_use));
                }
                Err(mut err) => match err.take_message() {
                    // The request was not sent.
                    Some(unsent) if !fresh => request = unsent,
                    _ => return Err(self.failure(err.error())),
                },
            }
        }
    }

    async fn connect(&self, scheme: &uri::Scheme, authority: &uri::Authority) -> Result<InUse, Failure> {
        let server = Uri::builder().scheme(scheme.clone()).authority(authority.clone()).path_and_query("/").build();
        let server = server.map_err(|err| Failure::Other(err.to_string()))?;
        let mut connector = self.shared.connector.clone();
        std::future::poll_fn(|cx| Service::<Uri>::poll_ready(&mut connector, cx))
            .await
            .map_err(|err| self.failure(&*err))?;
        let socket = connector.call(server).await.map_err(|err| self.failure(&*err))?;
        let proxied = socket.connected().is_proxied();
        let (sender, connection) = http1::handshake(socket).await.map_err(|err| self.failure(&err))?;
        // Not joined: it ends with its sender, which the pool or a request holds.
        tokio::spawn(async move {
            if let Err(err) = connection.await {
                tracing::debug!(error = %innermost(&err), "a connection ended");
            }
        });
        Ok(InUse { sender, proxied, scheme: scheme.clone(), authority: authority.clone(), permit: None })
    }

    fn failure(&self, err: &(dyn std::error::Error + 'static)) -> Failure {
        Failure::of(err, self.shared.connector.peer.as_ref())
    }

    /// Returns a connection whose answer was read completely. If the server answered before it read the whole request,
    /// the connection returns after the rest is sent.
    pub(super) fn give_back(&self, in_use: InUse) {
        if in_use.sender.is_ready() {
            self.make_idle(in_use);
        } else if !in_use.sender.is_closed() {
            self.give_back_later(in_use);
        }
    }

    /// Makes a ready connection idle.
    fn make_idle(&self, in_use: InUse) {
        if in_use.sender.is_closed() {
            return;
        }
        let now = Instant::now();
        let mut state = self.shared.state();
        if state.servers.iter().map(|server| server.idle.len()).sum::<usize>() >= self.shared.idle_at_most {
            return;
        }
        let idle = Idle { sender: in_use.sender, proxied: in_use.proxied, since: now };
        match state.server(&in_use.scheme, &in_use.authority) {
            Some(server) => server.idle.push(idle),
            None => {
                // The request already had this header.
                let Ok(host) = host_of(&in_use.scheme, &in_use.authority) else { return };
                let InUse { scheme, authority, .. } = in_use;
                state.servers.push(Server { scheme, authority, host, idle: vec![idle] });
            }
        }
        if !std::mem::replace(&mut state.swept, true) {
            // Not joined: it ends with the pool, or when nothing is idle any more.
            tokio::spawn(sweep(Arc::downgrade(&self.shared)));
        }
    }

    /// Returns a connection after the caller has read or dropped the body of its answer.
    pub(super) fn give_back_later(&self, mut in_use: InUse) {
        let pool = self.clone();
        // Not joined: it ends with the answer's body, read or dropped, or with its connection.
        tokio::spawn(async move {
            if in_use.sender.ready().await.is_ok() {
                pool.make_idle(in_use);
            }
        });
    }
}

impl InUse {
    /// The URI of the request line.
    fn form(&self, path: uri::PathAndQuery) -> Uri {
        let mut parts = uri::Parts::default();
        parts.path_and_query = Some(path);
        if self.proxied && self.scheme == uri::Scheme::HTTP {
            parts.scheme = Some(self.scheme.clone());
            parts.authority = Some(self.authority.clone());
        }
        Uri::from_parts(parts).expect("a path alone, or all three parts")
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns an idle connection that looks alive, and the header that names its server.
    fn idle(&self, scheme: &uri::Scheme, authority: &uri::Authority) -> Option<(Idle, HeaderValue)> {
        let mut state = self.state();
        let server = state.server(scheme, authority)?;
        while let Some(idle) = server.idle.pop() {
            if !idle.sender.is_closed() && idle.since.elapsed() < self.idle_max {
                return Some((idle, server.host.clone()));
            }
        }
        None
    }
}

impl State {
    fn server(&mut self, scheme: &uri::Scheme, authority: &uri::Authority) -> Option<&mut Server> {
        let same = |server: &&mut Server| server.authority.as_str() == authority.as_str() && server.scheme == *scheme;
        self.servers.iter_mut().find(same)
    }
}

/// Closes expired idle connections, until none is idle.
async fn sweep(pool: Weak<Shared>) {
    while let Some(idle_max) = pool.upgrade().map(|shared| shared.idle_max) {
        tokio::time::sleep(idle_max).await;
        let Some(shared) = pool.upgrade() else { return };
        let mut state = shared.state();
        for server in &mut state.servers {
            server.idle.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < idle_max);
        }
        state.servers.retain(|server| !server.idle.is_empty());
        if state.servers.is_empty() {
            state.swept = false;
            return;
        }
    }
}

/// The `Host` header of a server: without a user, and without the default port of the scheme.
fn host_of(scheme: &uri::Scheme, authority: &uri::Authority) -> Result<HeaderValue, Failure> {
    let usual = if *scheme == uri::Scheme::HTTPS { 443 } else { 80 };
    let host = match authority.port_u16() {
        Some(port) if port != usual => HeaderValue::try_from(format!("{}:{port}", authority.host())),
        _ => HeaderValue::from_str(authority.host()),
    };
    host.map_err(|_| Failure::Other("the server's name is invalid in a header".to_owned()))
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
