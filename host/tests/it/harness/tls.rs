//! Services behind TLS under a name that only a proxy can resolve, and that proxy.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// The only name of the test certificate besides the loopback names. No resolver knows it.
pub(crate) const NAME: &str = "plane.test";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name)
}

/// The authority that signed the test certificate.
pub(crate) fn authority() -> String {
    fixture("ca.pem").to_string_lossy().into_owned()
}

/// A PEM file of a client: its certificate, an expired one, or the key of both.
pub(crate) fn client_file(name: &str) -> PathBuf {
    fixture(name)
}

/// Which client certificates a server asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clients {
    Any,
    /// A certificate of the test authority may be shown.
    MayShow,
    /// A certificate of the test authority is required.
    MustShow,
}

/// A local listener. Dropping it ends its connections.
pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    seen: watch::Receiver<Vec<String>>,
    _server: AbortOnDropHandle<()>,
}

impl Front {
    /// The requests so far, one line each.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.borrow().clone()
    }

    async fn serve<F>(serve: impl Fn(TcpStream, watch::Sender<Vec<String>>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = std::io::Result<()>> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let (tell, seen) = watch::channel(Vec::new());
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let serving = serve(socket, tell.clone());
                // The test decides how a connection ends, so errors are ignored.
                connections.spawn(async move { serving.await.is_ok() });
            }
        });
        Self { address, seen, _server: AbortOnDropHandle::new(server) }
    }

    /// Terminates TLS and forwards every connection to `to`.
    pub(crate) async fn tls(to: SocketAddr) -> Self {
        Self::tls_with(to, Clients::Any).await
    }

    /// The same, with client certificates. A handshake with one is seen as `handshake with a certificate`.
    pub(crate) async fn tls_with(to: SocketAddr, clients: Clients) -> Self {
        let certificate = CertificateDer::from_pem_file(fixture("server.pem")).expect("a certificate");
        let key = PrivateKeyDer::from_pem_file(fixture("server.key")).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(fixture("client-ca.pem")).expect("a certificate")).expect("usable");
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let verifier = match clients {
            Clients::Any => WebPkiClientVerifier::no_client_auth(),
            Clients::MayShow => verifier.allow_unauthenticated().build().expect("it has an authority"),
            Clients::MustShow => verifier.build().expect("it has an authority"),
        };
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring serves them")
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], key)
            .expect("they fit");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        Self::serve(move |socket, tell| {
            let acceptor = acceptor.clone();
            async move {
                tell.send_modify(|seen| seen.push("connection".to_owned()));
                let mut socket = acceptor.accept(socket).await?;
                let shown = socket.get_ref().1.peer_certificates().is_some();
                let handshake = if shown { "handshake with a certificate" } else { "handshake" };
                tell.send_modify(|seen| seen.push(handshake.to_owned()));
                copy_bidirectional(&mut socket, &mut TcpStream::connect(to).await?).await.map(drop)
            }
        })
        .await
    }

    /// An HTTP proxy that forwards every host to `to`. It requires this `Proxy-Authorization` if one is given.
    pub(crate) async fn proxy(to: SocketAddr, authorization: Option<&'static str>) -> Self {
        Self::serve(move |mut socket, tell| async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(socket.read_u8().await?);
            }
            let text = String::from_utf8_lossy(&head).into_owned();
            let request = text.lines().next().unwrap_or_default().to_owned();
            tell.send_modify(|seen| seen.push(request.clone()));
            let shown = text.lines().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                name.eq_ignore_ascii_case("proxy-authorization").then_some(value)
            });
            if authorization.is_some_and(|wanted| shown != Some(wanted)) {
                return socket.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").await;
            }
            let mut host = TcpStream::connect(to).await?;
            if request.starts_with("CONNECT ") {
                socket.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
            } else {
                host.write_all(&head).await?;
            }
            copy_bidirectional(&mut socket, &mut host).await.map(drop)
        })
        .await
    }
}
