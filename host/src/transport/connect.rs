//! Opens connections: TCP, an optional proxy, TLS.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper::rt;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::{
    client::legacy::connect::{Connected, Connection, HttpConnector, proxy::Tunnel},
    rt::TokioIo,
};
use tokio::net::TcpStream;
use tower_service::Service;

use super::{Config, PeerTls, Proxies, Roots, innermost};

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Connecting<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;

/// Opens connections for the pool. All steps of a connection share one time limit.
#[derive(Clone)]
pub(super) struct Connector {
    route: Route,
    pub(super) peer: Option<PeerTls>,
    limit: Duration,
}

impl Connector {
    pub(super) fn new(config: &Config) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(config.connect_timeout));
        let (roots, proxies) = (config.roots.clone(), config.proxies.clone());
        let route = Route { tcp, roots, proxies, http2: false };
        Self { route, peer: config.peer.clone(), limit: config.connect_timeout }
    }

    /// A connector for HTTP/2. After `patience` without a sign of the peer, TCP looks for it and gives up.
    #[cfg(feature = "grpc")]
    pub(super) fn http2(config: &Config, patience: Duration) -> Self {
        const PROBES: u32 = 3;
        let mut connector = Self::new(config);
        connector.route.http2 = true;
        let tcp = &mut connector.route.tcp;
        tcp.set_keepalive(Some(patience));
        tcp.set_keepalive_interval(Some(patience / PROBES));
        tcp.set_keepalive_retries(Some(PROBES));
        #[cfg(target_os = "linux")]
        tcp.set_tcp_user_timeout(Some(patience * 2));
        connector
    }
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<Link>;
    type Error = BoxError;
    type Future = Connecting<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.route.poll_ready(cx)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let limit = self.limit;
        let opening: Connecting<_> = if to.scheme() == Some(&http::uri::Scheme::HTTPS) {
            let (route, peer) = (self.route.clone(), self.peer.clone());
            Box::pin(async move {
                let tls = match peer {
                    // Certificates are read when the first https connection needs them.
                    None => route.roots.tls(),
                    Some(peer) => {
                        let roots = route.roots.clone();
                        let read = tokio::task::spawn_blocking(move || peer.config(&roots));
                        Arc::new(read.await??)
                    }
                };
                let tls = if route.http2 { super::tls::for_http2(&tls) } else { tls };
                HttpsConnector::from((route, tls)).call(to).await
            })
        } else {
            let opening = self.route.call(to);
            Box::pin(async move { Ok(MaybeHttpsStream::Http(opening.await?)) })
        };
        Box::pin(async move {
            let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {limit:?}"));
            tokio::time::timeout(limit, opening).await.map_err(|_| late())?
        })
    }
}

/// The route to a host, below its TLS: direct, or through a proxy.
#[derive(Clone)]
struct Route {
    tcp: HttpConnector,
    roots: Roots,
    proxies: Proxies,
    /// A proxy cannot forward HTTP/2 requests, so every request uses a tunnel.
    http2: bool,
}

impl Route {
    /// The connection to a proxy. It uses TLS if the URL of the proxy is https.
    fn to_proxy(&self, proxy: &Uri) -> HttpsConnector<HttpConnector> {
        let tls = if proxy.scheme_str() == Some("https") { self.roots.tls() } else { Roots::none() };
        HttpsConnector::from((self.tcp.clone(), tls))
    }
}

impl Service<Uri> for Route {
    type Response = Link;
    type Error = BoxError;
    type Future = Connecting<Link>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let Some(proxy) = self.proxies.of(&to) else {
            let opening = self.tcp.call(to);
            return Box::pin(async move { Ok(Link { stream: opening.await?.into(), forwarded: false }) });
        };
        let at = proxy.uri().clone();
        let failed = {
            let host = at.authority().map_or_else(String::new, ToString::to_string);
            move |reason: String| Box::new(ProxyFailed { host, reason })
        };
        let mut direct = self.to_proxy(&at);
        if to.scheme() != Some(&http::uri::Scheme::HTTPS) && !self.http2 {
            let opening = direct.call(at);
            return Box::pin(async move {
                let stream = opening.await.map_err(|err| failed(innermost(&*err)))?;
                Ok(Link { stream, forwarded: true })
            });
        }
        let mut tunnel = Tunnel::new(at, direct);
        if let Some(auth) = proxy.basic_auth() {
            tunnel = tunnel.with_auth(auth.clone());
        }
        let opening = tunnel.call(to);
        Box::pin(async move {
            let stream = opening.await.map_err(|err| failed(innermost(&err)))?;
            Ok(Link { stream, forwarded: false })
        })
    }
}

/// A failure of the proxy, not of the target host.
#[derive(Debug, thiserror::Error)]
#[error("proxy {host}: {reason}")]
struct ProxyFailed {
    host: String,
    reason: String,
}

/// A connection below the TLS of the target host.
pub(super) struct Link {
    stream: MaybeHttpsStream<TokioIo<TcpStream>>,
    /// The other end is a proxy that needs the absolute URL.
    forwarded: bool,
}

impl Connection for Link {
    fn connected(&self) -> Connected {
        self.stream.connected().proxy(self.forwarded)
    }
}

impl rt::Read for Link {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: rt::ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl rt::Write for Link {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }
}
