//! Connects commands with a running node: HTTP over a socket in its state folder.
//!
//! Only the owner of the folder may open the socket. It is not on the network. [`ControlSocket`] is the side of the
//! node, [`client`] is the side of the commands.

pub mod client;

use serde::{Deserialize, Serialize};

use crate::{
    model::{PlaneName, TaskId},
    outbox::Listing,
};

/// The socket's name in the state folder.
pub const SOCKET: &str = "control.sock";

/// The reports that a command selects.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Their tasks. `null`: all.
    pub tasks: Option<Vec<TaskId>>,
}

/// Listed reports, or dropped reports as they were before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reports {
    /// The oldest first.
    pub reports: Vec<Listing>,
}

/// The task to cancel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskToCancel {
    /// Its id.
    pub task: TaskId,
    /// Its control plane. `null`: any.
    pub plane: Option<PlaneName>,
}

/// The answer to the cancel of a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum CancelAnswer {
    /// The task is cancelled. Its runner has the grace period to return.
    Cancelled {
        /// Its control plane.
        plane: PlaneName,
        /// The capability of the task.
        capability: String,
        /// Why it is cancelled. Another reason than `operator` came before this command.
        reason: String,
    },
    /// Its runner has ended.
    Ended {
        /// How it ended. `null` while its report is sent.
        outcome: Option<String>,
    },
    /// The node has no such task.
    Unknown,
    /// Several control planes have a task with this id.
    SeveralTasks {
        /// These control planes.
        planes: Vec<String>,
    },
    /// The node does not serve this control plane.
    NoSuchPlane {
        /// The ones it serves.
        planes: Vec<String>,
    },
}

#[cfg(unix)]
pub use socket::ControlSocket;

/// A path to the socket of a folder.
#[cfg(unix)]
struct Address {
    path: std::path::PathBuf,
    /// Open while the path uses it.
    _folder: Option<std::fs::File>,
}

#[cfg(unix)]
impl Address {
    /// The longest path in the address of a socket.
    #[cfg(target_os = "linux")]
    const BYTES_MAX: usize = 107;

    /// If the plain path is too long for an address, Linux has a short one through the opened folder.
    fn of(folder: &std::path::Path) -> std::io::Result<Self> {
        let path = folder.join(SOCKET);
        #[cfg(target_os = "linux")]
        if path.as_os_str().len() > Self::BYTES_MAX {
            use std::os::fd::AsRawFd as _;
            let folder = std::fs::File::open(folder)?;
            let path = format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()).into();
            return Ok(Self { path, _folder: Some(folder) });
        }
        Ok(Self { path, _folder: None })
    }
}

#[cfg(unix)]
mod socket {
    use std::{
        collections::HashSet,
        io,
        os::unix::fs::PermissionsExt,
        path::{Path, PathBuf},
        time::Duration,
    };

    use axum::{
        Json, Router,
        extract::{DefaultBodyLimit, State},
        http::Request,
        routing::{get, post},
    };
    use hyper::{body::Incoming, service::service_fn};
    use tokio::net::UnixListener;
    use tokio_util::sync::CancellationToken;
    use tower_service::Service as _;

    use super::{Address, CancelAnswer, Reports, SOCKET, TaskToCancel, Wanted};
    use crate::{
        listen::{self, Http2, Limits},
        model::{CancelReason, HostStatus, PlaneName, TaskStage},
        node_event::{NodeEvent, NodeEvents},
        outbox::{ImportedReports, Outbox},
    };

    const LIMITS: Limits = Limits {
        connections: 64,
        per_sender: 64,
        head_time: Duration::from_secs(5),
        grace: Duration::from_secs(1),
        reserve: 1,
        http2: Http2::Refused,
    };

    /// The listening side of the node.
    pub struct ControlSocket {
        listener: UnixListener,
        socket: Socket,
    }

    /// The file of the socket. It is removed when this is dropped, even if the node never ran.
    struct Socket(PathBuf);

    impl Drop for Socket {
        fn drop(&mut self) {
            if let Err(err) = std::fs::remove_file(&self.0) {
                tracing::debug!(error = %err, "control socket was already removed");
            }
        }
    }

    impl ControlSocket {
        /// Listens in a state folder that this process holds.
        ///
        /// # Errors
        /// When the socket cannot be created, for example with a path that is too long (not on Linux).
        pub fn open(folder: &Path) -> io::Result<Self> {
            let path = folder.join(SOCKET);
            // Only this process uses the folder. An existing socket is from a process that died.
            match std::fs::remove_file(&path) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
                _ => {}
            }
            let listener = UnixListener::bind(&Address::of(folder)?.path)?;
            let socket = Socket(path);
            std::fs::set_permissions(&socket.0, std::fs::Permissions::from_mode(0o600))?;
            Ok(Self { listener, socket })
        }

        /// Serves until `stop`.
        pub async fn run(self, outbox: Outbox, events: NodeEvents, stop: CancellationToken) {
            let Self { listener, socket: _socket } = self;
            let router = Router::new()
                .route("/outbox", get(list))
                .route("/outbox/retry", post(retry))
                .route("/outbox/drop", post(drop_reports))
                // The body can be as large as the outbox that it comes from.
                .route("/outbox/take-up", post(take_up).layer(DefaultBodyLimit::disable()))
                .with_state(outbox)
                .route("/tasks/cancel", post(cancel))
                .with_state(events);
            listen::serve(listener, LIMITS, stop, |socket, (), _| {
                let router = router.clone();
                (socket, service_fn(move |request: Request<Incoming>| router.clone().call(request)))
            })
            .await;
        }
    }

    async fn list(State(outbox): State<Outbox>) -> Json<Reports> {
        Json(Reports { reports: outbox.listings() })
    }

    async fn retry(State(outbox): State<Outbox>, Json(wanted): Json<Wanted>) -> Json<Reports> {
        Json(Reports { reports: outbox.retry(tasks(wanted).as_ref()) })
    }

    async fn drop_reports(State(outbox): State<Outbox>, Json(wanted): Json<Wanted>) -> Json<Reports> {
        Json(Reports { reports: outbox.drop_reports(tasks(wanted).as_ref()).await })
    }

    async fn take_up(State(outbox): State<Outbox>, Json(imported): Json<ImportedReports>) -> Json<Reports> {
        Json(Reports { reports: outbox.take_up(imported).await })
    }

    async fn cancel(State(events): State<NodeEvents>, Json(wanted): Json<TaskToCancel>) -> Json<CancelAnswer> {
        // The guard ends before the event, which changes the status too.
        let (answer, is_new) = cancel_held(&events.board().now(), &wanted);
        if let (CancelAnswer::Cancelled { plane, .. }, true) = (&answer, is_new) {
            events.emit(NodeEvent::TaskCancelledByOperator { plane: plane.clone(), task: wanted.task });
        }
        Json(answer)
    }

    /// Cancels a held task. Returns whether this call cancelled it. The guard of the status excludes that the runner
    /// ends meanwhile: each cancel here is before the stage `reporting`, and thus counts.
    fn cancel_held(status: &HostStatus, wanted: &TaskToCancel) -> (CancelAnswer, bool) {
        let names = || status.planes.0.iter().map(|plane| &plane.name);
        let is_wanted = |plane: &PlaneName| wanted.plane.as_ref().is_none_or(|wanted| wanted == plane);
        let texts = |names: &mut dyn Iterator<Item = &PlaneName>| names.map(|name| name.as_str().to_owned()).collect();
        if !names().any(is_wanted) {
            return (CancelAnswer::NoSuchPlane { planes: texts(&mut names()) }, false);
        }
        let mut held = status.tasks.with_id(&wanted.task);
        held.retain(|plane, _| is_wanted(plane));
        if held.len() > 1 {
            return (CancelAnswer::SeveralTasks { planes: texts(&mut held.into_keys()) }, false);
        }
        let Some((plane, task)) = held.pop_first() else {
            let mut ended = status.recent.iter().rev();
            let ended = ended.find(|record| record.task_id == wanted.task && is_wanted(&record.plane));
            let answer = ended.map_or(CancelAnswer::Unknown, |record| CancelAnswer::Ended {
                outcome: Some(record.outcome.as_str().to_owned()),
            });
            return (answer, false);
        };
        if task.state == TaskStage::Reporting {
            return (CancelAnswer::Ended { outcome: None }, false);
        }
        let cancel = &task.held_lease().cancel;
        let is_new = cancel.reason().is_none();
        cancel.cancel(CancelReason::Operator);
        let reason = cancel.reason().map_or("", CancelReason::as_str).to_owned();
        let capability = task.capability.to_string();
        (CancelAnswer::Cancelled { plane: plane.clone(), capability, reason }, is_new)
    }

    fn tasks(wanted: Wanted) -> Option<HashSet<crate::model::TaskId>> {
        wanted.tasks.map(|tasks| tasks.into_iter().collect())
    }
}
