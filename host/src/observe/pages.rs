//! `/health`, `/ready`, `/status.json`, and the path for the sign-in service's callback.
//!
//! Anybody who reaches the port can connect. Connections are bounded for each sender and in total, see [`listen`].
//! `/status.json` answers only requests for the node's own host names. Otherwise a web page could read it through a
//! foreign name that resolves to this node.

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
    listen::{self, Http2, Limits},
    model::{HealthChecks, HostStatus, NotReady, Readiness, STATUS_SCHEMA, StatusBoard},
};

/// How long a stop waits for running requests.
const GRACE: Duration = Duration::from_secs(1);
/// Most open connections. A process with a low limit of descriptors allows fewer.
const CONNECTIONS_MAX: usize = 256;
/// The lowest value of that limit.
const CONNECTIONS_MIN: usize = 16;
/// Time limit for the head of a request.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// Descriptors that are reserved for these pages.
const RESERVE: usize = 4;

/// The bound listener. It is bound before the node registers, so that `/health` answers in time.
pub struct Pages {
    listener: TcpListener,
    node_host: Option<String>,
    /// The process's limit of open descriptors.
    descriptors: usize,
    board: StatusBoard,
    callbacks: Arc<CallbackQueue>,
}

impl Pages {
    /// Binds `listen`. Port 0 selects a free port. `descriptors` is the process's limit of open descriptors.
    /// `health_checks` gets the requests of the sign-in service.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn bind(
        listen: SocketAddr,
        node_host: Option<String>,
        descriptors: usize,
        board: StatusBoard,
        health_checks: Arc<dyn HealthChecks>,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        Ok(Self { listener, node_host, descriptors, board, callbacks: CallbackQueue::new(health_checks) })
    }

    /// The address of the listener.
    ///
    /// # Errors
    /// When the operating system does not give it.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`, and up to 1 s longer for running requests.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, node_host, descriptors, board, callbacks } = self;
        let of_sign_in = Router::new()
            .route("/health", get(health))
            .route("/internal/v1/registrations", post(callback::registrations))
            // The service requests these paths if its URL of the node ends in a slash.
            .route("//health", get(health))
            .route("//internal/v1/registrations", post(callback::registrations))
            .with_state(callbacks);
        let shown = StatusSource { board: board.clone(), node_host: node_host.map(Arc::from) };
        let router = Router::new()
            .route("/ready", get(ready))
            .with_state(board)
            .merge(Router::new().route("/status.json", get(status)).with_state(shown))
            .merge(of_sign_in);
        let connections = (descriptors / 4).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX);
        let limits = Limits {
            connections,
            per_sender: connections / 4,
            head_time: HEAD_TIME_MAX,
            grace: GRACE,
            reserve: RESERVE,
            http2: Http2::Refused,
        };
        let start = |socket, sender: SocketAddr, _: &CancellationToken| {
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

/// Always 200. The user agent of the sign-in service is its name and a version (posemesh.md section 2.7).
async fn health(State(callbacks): State<Arc<CallbackQueue>>, headers: HeaderMap) -> StatusCode {
    if headers.get(header::USER_AGENT).is_some_and(|agent| agent.as_bytes().starts_with(b"DDS v")) {
        callbacks.health_checks().probed();
    }
    StatusCode::OK
}

/// 200 while the node can lease tasks, otherwise 503 with the reasons. A node that has lost a part of its
/// capabilities, or one of its control planes, shows that with the 200.
async fn ready(State(board): State<StatusBoard>) -> impl IntoResponse {
    let status = board.now();
    let Readiness { ready, reasons } = Readiness::of(&status, Timestamp::now());
    if !ready {
        let first = reasons.first().map(ToString::to_string);
        let page = json!({ "ready": false, "reason": first, "reasons": reasons });
        return (StatusCode::SERVICE_UNAVAILABLE, Json(page));
    }
    let mut page = json!({ "ready": true });
    if !status.degraded.is_empty() {
        page["degraded"] = json!(status.degraded);
    }
    if !reasons.is_empty() {
        page["planes_not_ready"] = json!(reasons);
    }
    (StatusCode::OK, Json(page))
}

/// State of `/status.json`.
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
    not_ready: Vec<NotReady>,
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
    let (mut status, now) = (page.board.now().clone(), Timestamp::now());
    for index in 0..status.planes.0.len() {
        let reasons = Readiness::of_plane(&status, &status.planes.0[index], now);
        let plane = &mut status.planes.0[index];
        (plane.ready, plane.not_ready) = (reasons.is_empty(), reasons);
    }
    let not_ready = Readiness::of(&status, now).reasons().to_vec();
    Json(StatusPage { schema: STATUS_SCHEMA, ready: not_ready.is_empty(), not_ready, status }).into_response()
}

/// Whether `host` is an IP address, `localhost`, or the host that the operator named. `HTTP_BIND` is always an IP
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
