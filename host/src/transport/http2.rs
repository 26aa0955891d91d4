//! One HTTP/2 connection, for a control plane with streams. It takes the same route as every other connection: the
//! policy for plain http, the certificate authorities and the proxies apply.
//!
//! The caller decides when a connection is replaced. Nothing here reconnects.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Buf;
use http::{Request, Response, Uri};
use http_body::Body;
use hyper::{
    body::Incoming,
    client::conn::http2::{Builder, SendRequest},
    rt,
};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;
use tower_service::Service;
use url::Url;

use super::{Client, PeerTls, TransportError, connect::Connector, innermost, tls_error::Failure};

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
        let peer = self.config.peer.as_ref();
        let failed = |err: &(dyn std::error::Error + 'static)| Failure::of(err, peer).at(&host);
        let not_http2 = |reason: &str| TransportError::NotHttp2 { host: host.to_string(), reason: reason.to_owned() };
        let mut connector = Connector::http2(&self.config, limits.tcp_patience);
        // The connector has the same limit.
        let limit = self.config.connect_timeout;
        let io = connector.call(to).await.map_err(|err| failed(&*err))?;
        let (io, first) = Greeted::new(io, peer.cloned());
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(limits.stream_window)
            .keep_alive_interval(limits.ping_every)
            .keep_alive_timeout(limits.ping_patience)
            .keep_alive_while_idle(true);
        let (sender, connection) = builder.handshake(io).await.map_err(|err| failed(&err))?;
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            // The error reaches the requests of the connection too.
            if let Err(err) = connection.await {
                tracing::debug!(error = %innermost(&err), "an HTTP/2 connection ended");
            }
        }));
        match tokio::time::timeout(limit, first).await {
            Ok(Ok(First::Http2)) => Ok(Http2 { sender, _driver: Arc::new(driver) }),
            Ok(Ok(First::Http1)) => Err(not_http2("it speaks HTTP/1")),
            Ok(Ok(First::Unknown)) => Err(not_http2("it sends something else")),
            Ok(Ok(First::Failed(failure))) => Err(failure.at(&host)),
            Ok(Err(_)) => Err(not_http2("it closes the connection")),
            Err(_) => Err(not_http2(&format!("it sends nothing within {limit:?}"))),
        }
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

/// What a server sends first.
enum First {
    Http2,
    Http1,
    Unknown,
    Failed(Failure),
}

impl First {
    /// HTTP/2 begins with a frame of settings. The fourth byte of a frame is its type.
    fn of(bytes: &[u8]) -> Self {
        const SETTINGS: u8 = 4;
        match bytes {
            [b'H', b'T', b'T', b'P', ..] => Self::Http1,
            [_, _, _, kind, ..] if *kind != SETTINGS => Self::Unknown,
            _ => Self::Http2,
        }
    }
}

/// A socket that tells what arrives first. Without this, a port that is silent looks like a server without work: a
/// client of HTTP/2 may send requests before the server has said anything.
struct Greeted<S> {
    socket: S,
    peer: Option<PeerTls>,
    first: Option<oneshot::Sender<First>>,
}

impl<S> Greeted<S> {
    fn new(socket: S, peer: Option<PeerTls>) -> (Self, oneshot::Receiver<First>) {
        let (sender, first) = oneshot::channel();
        (Self { socket, peer, first: Some(sender) }, first)
    }
}

impl<S: rt::Read + Unpin> rt::Read for Greeted<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, mut buf: rt::ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.first.is_none() {
            return Pin::new(&mut this.socket).poll_read(cx, buf);
        }
        let mut bytes = [0; 16];
        let most = bytes.len().min(buf.remaining());
        let mut part = rt::ReadBuf::new(&mut bytes[..most]);
        let read = ready!(Pin::new(&mut this.socket).poll_read(cx, part.unfilled()));
        let first = match &read {
            // An end is seen because the sender is dropped with this socket.
            Ok(()) if part.filled().is_empty() => return Poll::Ready(read),
            Ok(()) => First::of(part.filled()),
            Err(err) => First::Failed(Failure::of(err, this.peer.as_ref())),
        };
        buf.put_slice(part.filled());
        // The receiver is dropped if it did not wait that long.
        let _ = this.first.take().map(|told| told.send(first));
        Poll::Ready(read)
    }
}

impl<S: rt::Read + Unpin> Greeted<S> {
    /// A server that refuses the client certificate says so and closes. So a failed write waits for what was sent.
    fn written<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if matches!(written, Poll::Ready(Err(_))) && self.first.is_some() {
            let mut bytes = [0; 16];
            let _ = ready!(rt::Read::poll_read(Pin::new(self), cx, rt::ReadBuf::new(&mut bytes).unfilled()));
        }
        written
    }
}

impl<S: rt::Read + rt::Write + Unpin> rt::Write for Greeted<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.socket).poll_write(cx, buf);
        this.written(cx, written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.socket).poll_flush(cx);
        this.written(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.socket).poll_write_vectored(cx, bufs);
        this.written(cx, written)
    }
}
