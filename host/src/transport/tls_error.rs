//! Why there is no TLS with a host, and what to do about it.

use std::{error::Error, io};

use rustls::{AlertDescription, CertificateError};

use super::{PeerTls, PeerTlsError, TransportError, innermost};

/// See the module documentation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// No trusted authority has signed the certificate of the host, or it is not valid now.
    #[error("{0}; check the trusted authorities, the URL, and the clock of this machine")]
    Untrusted(String),
    /// The certificate is that of another host.
    #[error("{0}; check the expected name and the URL")]
    WrongName(String),
    /// The host refuses the certificate of this node.
    #[error(
        "it refuses the client certificate {file} ({alert}); check its authority, its usage and its dates, or renew it"
    )]
    ClientRefused {
        /// The file of the certificate.
        file: String,
        /// The TLS alert.
        alert: String,
    },
    /// A file of this node cannot be used.
    #[error(transparent)]
    File(#[from] PeerTlsError),
    /// Any other failure.
    #[error("{0}; check that the port serves TLS, and the client certificate if it needs one")]
    Failed(String),
}

/// Why a connection failed, without its host.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    Tls(TlsError),
    /// The innermost cause.
    Other(String),
}

impl Failure {
    /// Reads the error of a connection, with these settings of its TLS.
    pub(super) fn of(err: &(dyn Error + 'static), peer: Option<&PeerTls>) -> Self {
        find(err, peer).map_or_else(|| Self::Other(innermost(err)), Self::Tls)
    }

    pub(super) fn at(self, host: impl ToString) -> TransportError {
        let host = host.to_string();
        match self {
            Self::Tls(error) => TransportError::Tls { host, error },
            Self::Other(reason) => TransportError::Unreachable { host, reason },
        }
    }
}

/// The TLS error among the causes. An I/O error does not name its content as its cause.
fn find(err: &(dyn Error + 'static), peer: Option<&PeerTls>) -> Option<TlsError> {
    if let Some(found) = err.downcast_ref() {
        return Some(of_rustls(found, peer));
    }
    if let Some(found) = err.downcast_ref::<PeerTlsError>() {
        return Some(found.clone().into());
    }
    match err.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(content) => find(content, peer),
        None => err.source().and_then(|source| find(source, peer)),
    }
}

fn of_rustls(err: &rustls::Error, peer: Option<&PeerTls>) -> TlsError {
    use AlertDescription as Alert;
    let identity = peer.and_then(|peer| peer.identity.as_ref());
    match (err, identity) {
        (rustls::Error::InvalidCertificate(CertificateError::Other(other)), _) => {
            TlsError::WrongName(other.0.to_string())
        }
        (
            rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ),
            _,
        ) => TlsError::WrongName(err.to_string()),
        (rustls::Error::InvalidCertificate(_), _) => TlsError::Untrusted(err.to_string()),
        (
            rustls::Error::AlertReceived(
                alert @ (Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::DecryptError),
            ),
            Some(identity),
        ) => TlsError::ClientRefused { file: identity.certificate.display().to_string(), alert: format!("{alert:?}") },
        _ => TlsError::Failed(err.to_string()),
    }
}
