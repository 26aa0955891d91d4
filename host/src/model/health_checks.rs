//! The requests that the sign-in service may send to the node's pages. `observe` reads them, and `auth` interprets
//! them.

use secrecy::SecretString;

/// A well-formed callback of the sign-in service (posemesh.md section 2.7). Its sender is not known.
#[derive(Debug)]
pub struct Callback {
    /// The service's name for this node; not blank.
    pub id: String,
    /// Not blank, at most 4096 bytes.
    pub secret: SecretString,
    /// The organization that the node belongs to, for people.
    pub organization_id: Option<String>,
}

/// No registration waits for a callback now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unexpected;

/// Handles the requests of the sign-in service.
pub trait HealthChecks: Send + Sync {
    /// A callback arrived. It is accepted only while a registration is in progress.
    ///
    /// # Errors
    /// When no registration is in progress. Nothing of the callback is stored then.
    fn called_back(&self, callback: Callback) -> Result<(), Unexpected>;

    /// The service checked whether this node is alive.
    fn probed(&self);
}

/// A node without registration. No callback is expected, and a probe has no effect.
pub struct NoRegistration;

impl HealthChecks for NoRegistration {
    fn called_back(&self, _callback: Callback) -> Result<(), Unexpected> {
        Err(Unexpected)
    }

    fn probed(&self) {}
}
