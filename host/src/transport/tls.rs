//! The trusted certificate authorities, from the system and from a bundle.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use rustls::{
    ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, pem::PemObject as _},
};

/// Largest bundle, in bytes. The bundles of operating systems are far smaller.
const BUNDLE_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What is wrong with a file without certificates.
pub(super) const NO_CERTIFICATE: &str = "expected certificates in PEM form (-----BEGIN CERTIFICATE-----), found none";

/// Certificate authorities. Those of the system are read on first use: that takes milliseconds and memory, and many
/// nodes call loopback only. Clones share the result.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    extra: Vec<CertificateDer<'static>>,
    tls: Arc<OnceLock<(Arc<RootCertStore>, Arc<ClientConfig>)>>,
}

impl Roots {
    /// The system's authorities and those of a PEM file.
    ///
    /// # Errors
    /// What was expected in the file and what was found.
    pub fn with_bundle(path: &Path) -> Result<Self, String> {
        let extra = authorities(path)?;
        Ok(Self { extra, tls: Arc::default() })
    }

    /// TLS that trusts these authorities.
    pub(super) fn tls(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.loaded().1)
    }

    /// The authorities.
    pub(super) fn store(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.loaded().0)
    }

    fn loaded(&self) -> &(Arc<RootCertStore>, Arc<ClientConfig>) {
        self.tls.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            let found = rustls_native_certs::load_native_certs();
            for problem in &found.errors {
                tracing::warn!(event = "tls.store_unreadable", error = %problem, "a system certificate store could not be read");
            }
            roots.add_parsable_certificates(found.certs);
            roots.add_parsable_certificates(self.extra.iter().cloned());
            if roots.is_empty() {
                tracing::warn!(event = "tls.no_authority", "no certificate authority was found, no https connection can be trusted; set CA_BUNDLE");
            }
            let roots = Arc::new(roots);
            (Arc::clone(&roots), config(roots))
        })
    }

    /// TLS without authorities, for connections without TLS.
    pub(super) fn none() -> Arc<ClientConfig> {
        static NONE: OnceLock<Arc<ClientConfig>> = OnceLock::new();
        Arc::clone(NONE.get_or_init(|| config(Arc::new(RootCertStore::empty()))))
    }
}

/// The same TLS, for a server that speaks HTTP/2.
pub(super) fn for_http2(tls: &Arc<ClientConfig>) -> Arc<ClientConfig> {
    let mut tls = ClientConfig::clone(tls);
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(tls)
}

/// The certificate authorities of a PEM file.
pub(super) fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut found = Vec::new();
    for (at, certificate) in CertificateDer::pem_slice_iter(&pem(path)?).enumerate() {
        let certificate = certificate.map_err(|err| format!("certificate {} is not valid PEM: {err}", at + 1))?;
        let tried = RootCertStore::empty().add(certificate.clone());
        tried.map_err(|err| format!("certificate {} cannot be used: {err}", at + 1))?;
        found.push(certificate);
    }
    if found.is_empty() {
        return Err(NO_CERTIFICATE.to_owned());
    }
    Ok(found)
}

/// The content of a PEM file.
pub(super) fn pem(path: &Path) -> Result<Vec<u8>, String> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path);
    let read = file.and_then(|file| file.take(BUNDLE_BYTES_MAX + 1).read_to_end(&mut bytes));
    read.map_err(|err| err.to_string())?;
    if bytes.len() as u64 > BUNDLE_BYTES_MAX {
        return Err(format!("expected PEM certificates of at most {BUNDLE_BYTES_MAX} bytes, found more"));
    }
    Ok(bytes)
}

/// TLS with the protocol versions and algorithms of every connection.
pub(super) fn builder() -> ConfigBuilder<ClientConfig, WantsVerifier> {
    ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("ring serves the default protocol versions")
}

pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn config(roots: Arc<RootCertStore>) -> Arc<ClientConfig> {
    Arc::new(builder().with_root_certificates(roots).with_no_client_auth())
}
