//! How a connection comes up: TCP, then TLS by the system's roots.

use std::sync::{Arc, OnceLock};

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;

use super::Config;

/// Opens connections for the pool.
pub(super) type Connector = HttpsConnector<HttpConnector>;

/// See [`Connector`].
pub(super) fn connector(config: &Config) -> Connector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(config.connect_timeout));
    HttpsConnectorBuilder::new()
        .with_tls_config(TLS.get_or_init(tls_config).clone())
        .https_or_http()
        .enable_http1()
        .wrap_connector(tcp)
}

/// The system's certificates are read once: that takes milliseconds, and a node has two clients.
static TLS: OnceLock<rustls::ClientConfig> = OnceLock::new();

fn tls_config() -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for problem in &found.errors {
        tracing::debug!(error = %problem, "a system certificate store could not be read");
    }
    roots.add_parsable_certificates(found.certs);
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring serves the default protocol versions")
        .with_root_certificates(roots)
        .with_no_client_auth()
}
