//! `/health`, `/ready`, `/status.json`, and the path for the sign-in service's callback.
//!
//! Anybody who reaches the port can connect. Connections are bounded for each sender and in total, see [`listen`].
//! `/status.json` answers only requests for the node's own host names: a web page must not read it through a name of
//! its own that leads to this node.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{ConnectInfo, State},
    http::{HeaderMap, Request, StatusCode, Uri, header, uri::Authority},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::{body::Incoming, service::service_fn};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_service::Service as _;

use super::callback::{self, CallbackQueue};
use crate::{
    listen::{self, Limits},
    model::{HealthChecks, HostStatus, NotReadyReason, Readiness, STATUS_SCHEMA, StatusBoard},
};

/// How long a stop waits for requests that are being answered.
const GRACE: Duration = Duration::from_secs(1);
/// Open connections, at most. A process with a low limit of descriptors allows fewer.
const CONNECTIONS_MAX: usize = 256;
/// The same, at least.
const CONNECTIONS_MIN: usize = 16;
/// How long a connection may take to send the head of a request.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// Descriptors that only these pages use.
const RESERVE: usize = 4;

/// A listener that is up, so that `/health` answers before the node registers.
pub struct Pages {
    listener: TcpListener,
    node_host: Option<String>,
    /// How many descriptors the process may have open.
    descriptors: usize,
    board: StatusBoard,
    desk: Arc<CallbackQueue>,
}

impl Pages {
    /// Binds `listen`; port 0 takes a free one. The process may have `descriptors` open. `visits` learns what the
    /// sign-in service says here.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn bind(
        listen: SocketAddr,
        node_host: Option<String>,
        descriptors: usize,
        board: StatusBoard,
        visits: Arc<dyn HealthChecks>,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        Ok(Self { listener, node_host, descriptors, board, desk: CallbackQueue::new(visits) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the operating system does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`, and a moment longer for requests that are being answered.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, node_host, descriptors, board, desk } = self;
        let visited = Router::new()
            .route("/health", get(health))
            .route("/internal/v1/registrations", post(callback::registrations))
            // A service asks for these when its URL of the node ends in a slash.
            .route("//health", get(health))
            .route("//internal/v1/registrations", post(callback::registrations))
            .with_state(desk);
        let shown = StatusSource { board: board.clone(), node_host: node_host.map(Arc::from) };
        let router = Router::new()
            .route("/ready", get(ready))
            .with_state(board)
            .merge(Router::new().route("/status.json", get(status)).with_state(shown))
            .merge(visited);
        let connections = (descriptors / 4).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX);
        let limits = Limits {
            connections,
            per_sender: connections / 4,
            head_time: HEAD_TIME_MAX,
            grace: GRACE,
            reserve: RESERVE,
        };
        let start = |socket, sender: SocketAddr| {
            let router = router.clone();
            let answer = service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(ConnectInfo(sender));
                router.clone().call(request)
            });
            (socket, answer)
        };
        listen::serve(listener, limits, stop, start).await;
    }
}

/// Always 200. The sign-in service is known by its name in front of a version (posemesh.md section 2.7).
async fn health(State(desk): State<Arc<CallbackQueue>>, headers: HeaderMap) -> StatusCode {
    if headers.get(header::USER_AGENT).is_some_and(|agent| agent.as_bytes().starts_with(b"DDS v")) {
        desk.visits().probed();
    }
    StatusCode::OK
}

/// 200 while the node can get work, else 503, with the reasons. A node that has lost a part of what it
/// serves says so beside the 200.
async fn ready(State(board): State<StatusBoard>) -> impl IntoResponse {
    let status = board.now();
    match Readiness::of(&status, Timestamp::now()) {
        Readiness::Ready if status.degraded.is_empty() => (StatusCode::OK, Json(json!({ "ready": true }))),
        Readiness::Ready => (StatusCode::OK, Json(json!({ "ready": true, "degraded": status.degraded }))),
        Readiness::NotReady(reasons) => {
            let first = reasons.first().map(ToString::to_string);
            let page = json!({ "ready": false, "reason": first, "reasons": reasons });
            (StatusCode::SERVICE_UNAVAILABLE, Json(page))
        }
    }
}

/// What `/status.json` needs.
#[derive(Clone)]
struct StatusSource {
    board: StatusBoard,
    node_host: Option<Arc<str>>,
}

/// `/status.json`.
#[derive(Serialize)]
struct StatusPage {
    schema: u32,
    ready: bool,
    not_ready: Vec<NotReadyReason>,
    #[serde(flatten)]
    status: HostStatus,
}

async fn status(State(page): State<StatusSource>, uri: Uri, headers: HeaderMap) -> Response {
    let host = headers.get(header::HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    let authority = uri.authority().cloned().or(host);
    if !authority.is_some_and(|authority| is_own_host(authority.host(), page.node_host.as_deref())) {
        let remedy = "the host name is not one of this node; use its IP address, localhost or the host of NODE_URL\n";
        return (StatusCode::MISDIRECTED_REQUEST, remedy).into_response();
    }
    let status = page.board.now().clone();
    let not_ready = Readiness::of(&status, Timestamp::now()).reasons().to_vec();
    Json(StatusPage { schema: STATUS_SCHEMA, ready: not_ready.is_empty(), not_ready, status }).into_response()
}

/// Whether `host` can only lead to this node, or is the one its operator named. The address of `HTTP_BIND` is an IP
/// address.
fn is_own_host(host: &str, node_host: Option<&str>) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let same = |own: &str| host.trim_end_matches('.').eq_ignore_ascii_case(own);
    bare.parse::<IpAddr>().is_ok() || same("localhost") || node_host.is_some_and(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_hosts_are_addresses_localhost_and_node_url() {
        for own in ["127.0.0.1", "192.0.2.7", "[::1]", "localhost", "LOCALHOST.", "node.example", "Node.Example."] {
            assert!(is_own_host(own, Some("node.example")), "{own}");
        }
        for other in ["evil.example", "node.example.evil.example", "localhost.evil.example", "127.0.0.1.evil", ""] {
            assert!(!is_own_host(other, Some("node.example")), "{other}");
        }
        assert!(!is_own_host("node.example", None));
    }
}
