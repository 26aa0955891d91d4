//! Connections that stay open between requests.
//!
//! A request takes a connection that is idle, or opens one; whoever has read the whole answer gives it
//! back. A connection is driven by the runtime of the request that opened it.

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

use super::{Body, Config, connect::Connector, innermost};

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    connector: Connector,
    /// How long a connection stays open without a request.
    idle_max: Duration,
    /// Connections without a request, at most.
    idle_at_most: usize,
    /// One for each request that may be under way.
    turns: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A node talks to a handful of servers: looking through them is quicker than hashing a name.
    servers: Vec<Server>,
    /// Somebody will look for connections that have been idle for too long.
    swept: bool,
}

struct Server {
    scheme: uri::Scheme,
    authority: uri::Authority,
    host: HeaderValue,
    /// The latest one is taken first, so that those beyond need get old. As many as there were
    /// requests at once.
    idle: Vec<Idle>,
}

struct Idle {
    sender: SendRequest<Body>,
    proxied: bool,
    since: Instant,
}

/// A connection with a request under way.
pub(super) struct Taken {
    sender: SendRequest<Body>,
    /// A proxy reads the request, so it must name the server.
    proxied: bool,
    scheme: uri::Scheme,
    authority: uri::Authority,
    /// Held until the answer was read; none before the request is sent.
    turn: Option<OwnedSemaphorePermit>,
}

impl Pool {
    /// A pool without connections. It keeps `config.idle_at_most` of them open without a request, for `idle_max`, and
    /// has at most `config.at_once` requests under way.
    pub(super) fn new(config: &Config, idle_max: Duration) -> Self {
        let connector = Connector::new(config);
        let turns = Arc::new(Semaphore::new(config.at_once.clamp(1, Semaphore::MAX_PERMITS)));
        let idle_at_most = config.idle_at_most;
        Self { shared: Arc::new(Shared { connector, idle_max, idle_at_most, turns, state: Mutex::default() }) }
    }

    /// Waits for its turn, sends `request`, whose URI must be absolute, and waits for the head of its answer. The
    /// text of an error is its innermost cause.
    pub(super) async fn request(&self, mut request: Request<Body>) -> Result<(Response<Incoming>, Taken), String> {
        let uri::Parts { scheme, authority, path_and_query, .. } = std::mem::take(request.uri_mut()).into_parts();
        let (Some(scheme), Some(authority)) = (scheme, authority) else {
            return Err("expected an absolute URL".to_owned());
        };
        let path = path_and_query.unwrap_or_else(|| uri::PathAndQuery::from_static("/"));
        let turn = Arc::clone(&self.shared.turns).acquire_owned().await.expect("nobody closes it");
        loop {
            let idle = self.shared.idle(&scheme, &authority);
            let fresh = idle.is_none();
            let mut taken = match idle {
                Some((idle, host)) => {
                    request.headers_mut().entry(header::HOST).or_insert(host);
                    Taken {
                        sender: idle.sender,
                        proxied: idle.proxied,
                        scheme: scheme.clone(),
                        authority: authority.clone(),
                        turn: None,
                    }
                }
                None => {
                    // Boxed: it is large, and every request would be moved about with room for it.
                    let taken = Box::pin(self.connect(&scheme, &authority)).await?;
                    request.headers_mut().entry(header::HOST).or_insert(host_of(&scheme, &authority)?);
                    taken
                }
            };
            *request.uri_mut() = taken.form(path.clone());
            // An idle connection may have ended a moment ago.
            let sent = match taken.sender.ready().await {
                Ok(()) => taken.sender.try_send_request(request).await,
                Err(_) if !fresh => continue,
                Err(err) => return Err(innermost(&err)),
            };
            match sent {
                Ok(response) => {
                    taken.turn = Some(turn);
                    return Ok((response, taken));
                }
                Err(mut err) => match err.take_message() {
                    // Nothing of it was sent.
                    Some(unsent) if !fresh => request = unsent,
                    _ => return Err(innermost(err.error())),
                },
            }
        }
    }

    async fn connect(&self, scheme: &uri::Scheme, authority: &uri::Authority) -> Result<Taken, String> {
        let server = Uri::builder().scheme(scheme.clone()).authority(authority.clone()).path_and_query("/").build();
        let server = server.map_err(|err| err.to_string())?;
        let mut connector = self.shared.connector.clone();
        std::future::poll_fn(|cx| Service::<Uri>::poll_ready(&mut connector, cx))
            .await
            .map_err(|err| innermost(&*err))?;
        let socket = connector.call(server).await.map_err(|err| innermost(&*err))?;
        let proxied = socket.connected().is_proxied();
        let (sender, connection) = http1::handshake(socket).await.map_err(|err| innermost(&err))?;
        // Not joined: it ends with its sender, which the pool or a request holds.
        tokio::spawn(async move {
            if let Err(err) = connection.await {
                tracing::debug!(error = %innermost(&err), "a connection ended");
            }
        });
        Ok(Taken { sender, proxied, scheme: scheme.clone(), authority: authority.clone(), turn: None })
    }

    /// For an answer that was read to its end. A server may have answered before it read the whole request:
    /// the connection is then taken back once the rest is sent.
    pub(super) fn give_back(&self, taken: Taken) {
        if taken.sender.is_ready() {
            self.keep(taken);
        } else if !taken.sender.is_closed() {
            self.give_back_later(taken);
        }
    }

    /// Makes a connection idle that can take a request now.
    fn keep(&self, taken: Taken) {
        if taken.sender.is_closed() {
            return;
        }
        let now = Instant::now();
        let mut state = self.shared.state();
        if state.servers.iter().map(|server| server.idle.len()).sum::<usize>() >= self.shared.idle_at_most {
            return;
        }
        let idle = Idle { sender: taken.sender, proxied: taken.proxied, since: now };
        match state.server(&taken.scheme, &taken.authority) {
            Some(server) => server.idle.push(idle),
            None => {
                // The request had this header.
                let Ok(host) = host_of(&taken.scheme, &taken.authority) else { return };
                let Taken { scheme, authority, .. } = taken;
                state.servers.push(Server { scheme, authority, host, idle: vec![idle] });
            }
        }
        if !std::mem::replace(&mut state.swept, true) {
            // Not joined: it ends with the pool, or when nothing is idle any more.
            tokio::spawn(sweep(Arc::downgrade(&self.shared)));
        }
    }

    /// For an answer that somebody else reads.
    pub(super) fn give_back_later(&self, mut taken: Taken) {
        let pool = self.clone();
        // Not joined: it ends with the answer's body, read or dropped, or with its connection.
        tokio::spawn(async move {
            if taken.sender.ready().await.is_ok() {
                pool.keep(taken);
            }
        });
    }
}

impl Taken {
    /// What a request line says.
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

    /// Takes an idle connection that looks alive, and the header that names its server.
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

/// Closes what has been idle for too long, until nothing is idle.
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

/// The header that names a server: without a user, and without the port its scheme has anyway.
fn host_of(scheme: &uri::Scheme, authority: &uri::Authority) -> Result<HeaderValue, String> {
    let usual = if *scheme == uri::Scheme::HTTPS { 443 } else { 80 };
    let host = match authority.port_u16() {
        Some(port) if port != usual => HeaderValue::try_from(format!("{}:{port}", authority.host())),
        _ => HeaderValue::from_str(authority.host()),
    };
    host.map_err(|_| "the server's name cannot stand in a header".to_owned())
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
