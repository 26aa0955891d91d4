//! TLS with one peer: the certificate of this node, the authorities of the peer, and the name in its certificate.
//!
//! The files are read for each connection, so that a renewed certificate needs no restart.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};

use super::{
    Roots,
    tls::{NO_CERTIFICATE, authorities, builder, pem, provider},
};

/// The settings. They apply to connections to the peer, not to a proxy on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerTls {
    /// The certificate of this node with its chain, and its key.
    pub identity: Option<Identity>,
    /// The only authorities for the certificate of the peer. Without a file: those of the client.
    pub authorities: Option<PathBuf>,
    /// The common name that the certificate of the peer must have.
    pub common_name: Option<String>,
    /// The certificate of the peer may be for another host than that of the URL.
    pub any_host: bool,
}

/// Two PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The certificate and its chain.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// A file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerTlsError {
    /// See [`Identity::certificate`].
    #[error("{0}")]
    Certificate(String),
    /// See [`Identity::certificate`].
    #[error("{file}: the client certificate has expired at {at}; renew it, it is read again for each connection")]
    Expired {
        /// The file of the certificate.
        file: String,
        /// The end of its life.
        at: Timestamp,
    },
    /// See [`Identity::key`].
    #[error("{0}")]
    Key(String),
    /// See [`PeerTls::authorities`].
    #[error("{0}")]
    Authorities(String),
}

impl PeerTls {
    /// Whether the files can be used. An expired certificate may be renewed while the node runs.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub fn check(&self) -> Result<(), PeerTlsError> {
        match self.config(&Roots::default()) {
            Ok(_) | Err(PeerTlsError::Expired { .. }) => Ok(()),
            Err(err) => Err(err),
        }
    }

    /// Reads the files.
    pub(super) fn config(&self, roots: &Roots) -> Result<ClientConfig, PeerTlsError> {
        let roots = match &self.authorities {
            None => roots.store(),
            Some(path) => {
                let mut store = RootCertStore::empty();
                let found = authorities(path).map_err(|why| PeerTlsError::Authorities(about(path, &why)))?;
                store.add_parsable_certificates(found);
                Arc::new(store)
            }
        };
        let Self { common_name, any_host, .. } = self;
        let verifier = Verifier { roots, provider: provider(), common_name: common_name.clone(), any_host: *any_host };
        let builder = builder().dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let Some(Identity { certificate, key }) = &self.identity else { return Ok(builder.with_no_client_auth()) };
        let unusable = |why: &str| PeerTlsError::Certificate(about(certificate, why));
        let bytes = pem(certificate).map_err(|why| unusable(&why))?;
        let chain = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|err| unusable(&format!("is not valid PEM: {err}")))?;
        let Some(own) = chain.first() else { return Err(unusable(NO_CERTIFICATE)) };
        let expired = expired(own);
        let unusable = |why: &str| PeerTlsError::Key(about(key, why));
        let bytes = pem(key).map_err(|why| unusable(&why))?;
        // The error of the parser could quote the file.
        let none = "expected a private key in PEM form (-----BEGIN PRIVATE KEY-----) without a password, found none";
        let der = PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| unusable(none))?;
        let config = builder.with_client_auth_cert(chain, der).map_err(|err| match err {
            rustls::Error::InconsistentKeys(_) => unusable(&format!("is not the key of {}", certificate.display())),
            err => unusable(&format!("cannot be used: {err}")),
        })?;
        let file = || certificate.display().to_string();
        expired.map_or(Ok(config), |at| Err(PeerTlsError::Expired { file: file(), at }))
    }
}

/// The end of the life of a certificate, if it is over.
fn expired(certificate: &CertificateDer<'_>) -> Option<Timestamp> {
    let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
    let (algorithms, usage) = (provider().signature_verification_algorithms.all, webpki::KeyUsage::client_auth());
    // Without authorities this always fails. The times are checked first.
    match parsed.verify_for_usage(algorithms, &[], &[], UnixTime::now(), usage, None, None).err()? {
        webpki::Error::CertExpired { not_after, .. } => {
            Timestamp::from_second(i64::try_from(not_after.as_secs()).ok()?).ok()
        }
        _ => None,
    }
}

fn about(path: &Path, why: &str) -> String {
    format!("{}: {why}", path.display())
}

/// Checks the certificate of the peer: its authority, its host, and its common name.
#[derive(Debug)]
struct Verifier {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    common_name: Option<String>,
    any_host: bool,
}

/// The certificate is that of somebody else.
#[derive(Debug, thiserror::Error)]
#[error("the certificate has the common name {found}, expected {expected:?}")]
struct WrongName {
    found: String,
    expected: String,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        if !self.any_host {
            verify_server_name(&parsed, server_name)?;
        }
        if let Some(expected) = &self.common_name {
            let malformed = |_| CertificateError::BadEncoding;
            let subject = webpki::EndEntityCert::try_from(certificate).map_err(malformed)?;
            let names = common_names(subject.subject());
            if names != [expected.as_str()] {
                let (found, expected) = (format!("{names:?}"), expected.clone());
                return Err(CertificateError::Other(OtherError(Arc::new(WrongName { found, expected }))).into());
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The common names in a subject: the sets of a DER name, each with pairs of a type and a text.
fn common_names(mut subject: &[u8]) -> Vec<&str> {
    const SET: u8 = 0x31;
    const SEQUENCE: u8 = 0x30;
    const OBJECT_ID: u8 = 0x06;
    const TEXTS: [u8; 3] = [0x0c, 0x13, 0x16]; // UTF8String, PrintableString, IA5String
    const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
    let mut names = Vec::new();
    while let Some((SET, mut set, rest)) = element(subject) {
        subject = rest;
        while let Some((SEQUENCE, pair, rest)) = element(set) {
            set = rest;
            if let Some((OBJECT_ID, COMMON_NAME, value)) = element(pair)
                && let Some((tag, text, _)) = element(value)
            {
                let text = std::str::from_utf8(text).ok().filter(|_| TEXTS.contains(&tag));
                names.push(text.unwrap_or("?"));
            }
        }
    }
    names
}

/// The tag and the content of the first DER element, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let [tag, length, rest @ ..] = der else { return None };
    let (length, rest) = match length {
        0..=0x7f => (usize::from(*length), rest),
        0x81 => rest.split_first().map(|(length, rest)| (usize::from(*length), rest))?,
        0x82 => rest.split_first_chunk().map(|(length, rest)| (usize::from(u16::from_be_bytes(*length)), rest))?,
        // No name is that long.
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((*tag, content, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_names_are_found_in_every_position() {
        // O = a; CN = plane + OU = b; CN as a BMPString.
        let subject = b"\x31\x0a\x30\x08\x06\x03\x55\x04\x0a\x0c\x01a\
            \x31\x18\x30\x0c\x06\x03\x55\x04\x03\x13\x05plane\x30\x08\x06\x03\x55\x04\x0b\x0c\x01b\
            \x31\x0b\x30\x09\x06\x03\x55\x04\x03\x1e\x02\x00a";
        assert_eq!(common_names(subject), ["plane", "?"]);
        for end in 0..subject.len() {
            assert!(common_names(&subject[..end]).len() < 2);
        }
        assert!(common_names(b"\x31\x82\xff").is_empty() && common_names(b"\x31\x84\xff\xff\xff\xff").is_empty());
    }
}
