//! `/health`, `/ready`, `/status.json`, and the door for the sign-in service's callback.
//!
//! Strangers may reach them, so connections are bounded in number and in the time they may be silent: who
//! opens many gets in the way of other visitors, and never of the node's own work.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{ConnectInfo, State},
    http::{HeaderMap, Request, StatusCode, header},
    response::IntoResponse,
    routing::{get, post},
};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tower_service::Service as _;

use super::callback::{self, CallbackQueue};
use crate::model::{HealthChecks, MissedHeartbeats, Phase, StatusBoard};

/// How long a stop waits for requests under way: a client that never ends its own must not keep the node.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// Connections at once; who comes later waits in the system's queue.
const CONNECTIONS_MAX: usize = 256;
/// How long a connection may take to send the head of a request, its next one too.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// The pause when the system gives no connection: one that is open has to end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// From so many polls in a row that failed the node gets no work; fewer are no news.
const FAILED_POLLS_MIN: u32 = 3;
/// The same of heartbeats of every lease that is held: with all slots taken there are no polls to tell.
const FAILED_HEARTBEATS_MIN: u32 = 3;

/// A listener that is up, so that `/health` answers before the node registers.
pub struct Pages {
    listener: TcpListener,
    board: StatusBoard,
    desk: Arc<CallbackQueue>,
}

impl Pages {
    /// Binds `address`; port 0 takes a free one. `visits` learns what the sign-in service says here.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn bind(address: SocketAddr, board: StatusBoard, visits: Arc<dyn HealthChecks>) -> std::io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(address).await?, board, desk: CallbackQueue::new(visits) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the operating system does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`, and a moment longer for requests under way.
    pub async fn run(self, stop: CancellationToken) {
        let visited = Router::new()
            .route("/health", get(health))
            .route("/internal/v1/registrations", post(callback::registrations))
            // What a service asks for that was given a URL with a slash at its end.
            .route("//health", get(health))
            .route("//internal/v1/registrations", post(callback::registrations))
            .with_state(self.desk);
        let router = Router::new()
            .route("/ready", get(ready))
            .route("/status.json", get(status))
            .with_state(self.board)
            .merge(visited);
        let (room, mut connections) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), JoinSet::new());
        loop {
            let next = async {
                let room = Arc::clone(&room).acquire_owned().await.expect("never closed");
                (room, self.listener.accept().await)
            };
            let (room, socket, sender) = tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                next = next => match next {
                    (room, Ok((socket, sender))) => (room, socket, sender),
                    (_, Err(err)) => {
                        tracing::warn!(error = %err, "connection could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
            };
            let (router, stop) = (router.clone(), stop.clone());
            connections.spawn(async move {
                let _room = room;
                connection(router, socket, sender, stop).await;
            });
        }
        let all = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LAST_ANSWERS, all).await;
    }
}

/// Answers one visitor until he leaves, or until `stop`.
async fn connection(router: Router, socket: TcpStream, sender: SocketAddr, stop: CancellationToken) {
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(sender));
        router.clone().call(request)
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    let http = http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME_MAX);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(socket), service));
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(err) = ended {
        tracing::debug!(error = %err, "connection broke");
    }
}

/// Always 200. The sign-in service is known by its name in front of a version (posemesh.md section 2.7).
async fn health(State(desk): State<Arc<CallbackQueue>>, headers: HeaderMap) -> StatusCode {
    if headers.get(header::USER_AGENT).is_some_and(|agent| agent.as_bytes().starts_with(b"DDS v")) {
        desk.visits().probed();
    }
    StatusCode::OK
}

/// 200 while the node may get work, else 503, with the reason. A node that has lost a part of what it
/// serves says so beside the 200.
async fn ready(State(board): State<StatusBoard>) -> impl IntoResponse {
    let status = board.now();
    let reason = match status.phase {
        Phase::Running if status.capabilities.is_empty() && status.degraded.is_empty() => {
            Some("no plugin is loaded".to_owned())
        }
        Phase::Running if status.capabilities.is_empty() => Some(status.degraded.join("; ")),
        Phase::Running if status.no_thread.is_some() => Some(format!(
            "cannot create a thread for the calls of a plugin: {}; raise the limit of threads",
            status.no_thread.as_deref().unwrap_or_default()
        )),
        Phase::Running if status.registration == "conflict" => Some(match &status.registration_error {
            Some(err) => format!("conflict: {err}"),
            None => "conflict".to_owned(),
        }),
        Phase::Running if status.outbox.full => {
            Some(format!("the outbox is full: {} reports wait for the control plane", status.outbox.waiting))
        }
        Phase::Running if status.outbox.not_written.is_some() => {
            Some(format!("the outbox cannot be written: {}", status.outbox.not_written.as_deref().unwrap_or_default()))
        }
        Phase::Running if status.disk.full => Some(format!(
            "disk nearly full: {} bytes are free where tasks work, DISK_FREE_MIN is {}",
            status.disk.free_bytes.unwrap_or_default(),
            status.disk.floor_bytes
        )),
        // A token in hand is used to its end, whatever becomes of its renewal.
        Phase::Running => match (&status.login_error, status.token_expires_at) {
            (Some(err), None) => Some(format!("not signed in: {err}")),
            (Some(err), Some(end)) if end <= Timestamp::now() => Some(format!("not signed in: {err}")),
            _ if status.polls.failed >= FAILED_POLLS_MIN => Some(format!(
                "the control plane does not give work, {} polls in a row failed: {}",
                status.polls.failed,
                status.polls.last_error.as_deref().unwrap_or_default()
            )),
            _ if status.polls.unanswered => Some("the control plane does not answer the poll".to_owned()),
            _ => status.tasks.missed().filter(|missed| missed.count >= FAILED_HEARTBEATS_MIN).map(|missed| {
                let MissedHeartbeats { count, error } = missed;
                format!("the control plane does not take heartbeats, {count} in a row failed: {error}")
            }),
        },
        Phase::Starting => Some(match &status.registration_error {
            Some(err) => format!("not signed in ({}): {err}", status.registration),
            None => format!("not signed in ({})", status.registration),
        }),
        Phase::Draining => Some("draining".to_owned()),
        Phase::Stopped => Some("stopped".to_owned()),
    };
    match reason {
        None if status.degraded.is_empty() => (StatusCode::OK, Json(json!({ "ready": true }))),
        None => (StatusCode::OK, Json(json!({ "ready": true, "degraded": status.degraded }))),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "reason": reason }))),
    }
}

async fn status(State(board): State<StatusBoard>) -> impl IntoResponse {
    let status = board.now().clone();
    Json(status)
}
