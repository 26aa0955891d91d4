//! One HTTP/2 connection, for a control plane with streams. It takes the same route as every other connection: the
//! policy for plain http, the certificate authorities and the proxies apply.
//!
//! The caller decides when a connection is replaced. Nothing here reconnects.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Buf;
use http::{Request, Response, Uri};
use http_body::Body;
use hyper::{
    body::Incoming,
    client::conn::http2::{Builder, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio_util::task::AbortOnDropHandle;
use tower_service::Service;
use url::Url;

use super::{Client, TransportError, connect::Connector, innermost, late};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The limits of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Http2Limits {
    /// Bytes that the peer may send on one stream before they are read.
    pub stream_window: u32,
    /// How often a PING shows that the peer still answers.
    pub ping_every: Duration,
    /// How long the peer may take to answer a PING.
    pub ping_patience: Duration,
    /// How long TCP waits for a sign of the peer: before a keep-alive probe, and for sent bytes.
    pub tcp_patience: Duration,
}

/// A connection to one server. Clones share it. It closes when the last clone is dropped.
pub struct Http2<B> {
    sender: SendRequest<B>,
    _driver: Arc<AbortOnDropHandle<()>>,
}

impl<B> Clone for Http2<B> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), _driver: Arc::clone(&self._driver) }
    }
}

impl<B> Http2<B> {
    /// Whether the connection takes no more requests.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

impl Client {
    /// Opens a new connection to the server of `url`. The runtime of the caller drives it.
    ///
    /// # Errors
    /// If the URL is not allowed, or there is no connection in time.
    pub async fn http2<B>(&self, url: &Url, limits: Http2Limits) -> Result<Http2<B>, TransportError>
    where
        B: Body + Send + Unpin + 'static,
        B::Data: Buf + Send,
        B::Error: Into<BoxError>,
    {
        self.check(url)?;
        let bad = || TransportError::BadUrl { url: url.to_string() };
        let to: Uri = url.as_str().parse().map_err(|_| bad())?;
        let host = to.authority().cloned().ok_or_else(bad)?;
        let unreachable = |reason| TransportError::Unreachable { host: host.to_string(), reason };
        let mut connector = Connector::http2(&self.config, limits.tcp_patience);
        let opening = async {
            let io = connector.call(to).await.map_err(|err| unreachable(innermost(&*err)))?;
            let mut builder = Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .initial_stream_window_size(limits.stream_window)
                .keep_alive_interval(limits.ping_every)
                .keep_alive_timeout(limits.ping_patience)
                .keep_alive_while_idle(true);
            builder.handshake(io).await.map_err(|err| unreachable(innermost(&err)))
        };
        let limit = self.config.connect_timeout;
        let opened = tokio::time::timeout(limit, opening).await.unwrap_or_else(|_| Err(late(&host, limit)));
        let (sender, connection) = opened?;
        let driver = tokio::spawn(async move {
            // The error reaches the requests of the connection too.
            if let Err(err) = connection.await {
                tracing::debug!(error = %innermost(&err), "an HTTP/2 connection ended");
            }
        });
        Ok(Http2 { sender, _driver: Arc::new(AbortOnDropHandle::new(driver)) })
    }
}

impl<B> Service<Request<B>> for Http2<B>
where
    B: Body + Send + 'static,
{
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.sender.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}
