//! The client side, for commands: one request, one answer.

use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};

/// Why a running node did not answer: one line.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No process listens, or the answer cannot be used.
    #[error("the node at {path} does not answer: {reason}", path = path.display())]
    NoAnswer {
        /// Its socket.
        path: PathBuf,
        /// The error.
        reason: String,
    },
    /// This system has no such sockets.
    #[error("commands cannot reach a running node on this system; stop the node first")]
    Unsupported,
}

/// Sends a request to the node of the state folder `folder`. With `body` it is a POST.
///
/// # Errors
/// When it does not answer in time.
#[cfg(unix)]
pub async fn ask<T: DeserializeOwned>(
    folder: &Path,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<T, ControlError> {
    use std::time::Duration;

    use http::{Method, Request, header};
    use http_body_util::{BodyExt as _, Full};
    use hyper_util::rt::TokioIo;

    /// A busy node answers in milliseconds. A stopped process never answers.
    const ANSWER_LIMIT: Duration = Duration::from_secs(10);

    let socket = folder.join(super::SOCKET);
    let asking = async {
        let address = super::Address::of(folder).map_err(|err| err.to_string())?;
        let stream = tokio::net::UnixStream::connect(&address.path).await.map_err(|err| err.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|err| err.to_string())?;
        let _connection = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let bytes = body.map(|body| serde_json::to_vec(body).expect("a request is JSON")).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "node")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(bytes::Bytes::from(bytes)))
            .map_err(|err| err.to_string())?;
        let answer = sender.send_request(request).await.map_err(|err| err.to_string())?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(|err| err.to_string())?.to_bytes();
        if !status.is_success() {
            return Err(format!("it answered {status}; node and command may be of different versions"));
        }
        serde_json::from_slice(&body).map_err(|err| err.to_string())
    };
    let answer = tokio::time::timeout(ANSWER_LIMIT, asking).await;
    let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {ANSWER_LIMIT:?}")));
    answer.map_err(|reason| ControlError::NoAnswer { path: socket, reason })
}

/// This system has no such sockets.
///
/// # Errors
/// Always.
#[cfg(not(unix))]
pub async fn ask<T: DeserializeOwned>(_: &Path, _: &str, _: Option<&impl Serialize>) -> Result<T, ControlError> {
    Err(ControlError::Unsupported)
}
