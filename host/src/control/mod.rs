//! Connects commands with a running node: HTTP over a socket in its state folder.
//!
//! Only the owner of the folder may open the socket. It is not on the network. [`ControlSocket`] is the side of the
//! node, [`client`] is the side of the commands.

pub mod client;

use serde::{Deserialize, Serialize};

use crate::{model::TaskId, outbox::Listing};

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

    use super::{Address, Reports, SOCKET, Wanted};
    use crate::{
        listen::{self, Http2, Limits},
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
        pub async fn run(self, outbox: Outbox, stop: CancellationToken) {
            let Self { listener, socket: _socket } = self;
            let router = Router::new()
                .route("/outbox", get(list))
                .route("/outbox/retry", post(retry))
                .route("/outbox/drop", post(drop_reports))
                // The body can be as large as the outbox that it comes from.
                .route("/outbox/take-up", post(take_up).layer(DefaultBodyLimit::disable()))
                .with_state(outbox);
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

    fn tasks(wanted: Wanted) -> Option<HashSet<crate::model::TaskId>> {
        wanted.tasks.map(|tasks| tasks.into_iter().collect())
    }
}
