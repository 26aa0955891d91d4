//! What the sign-in service may do on the node's own pages. `observe` reads the requests, `auth` knows
//! what they mean.

use secrecy::SecretString;

/// A callback of the sign-in service, well formed (posemesh.md section 2.7). Who sent it is not known.
#[derive(Debug)]
pub struct Callback {
    /// The service's name for this node; not blank.
    pub id: String,
    /// Not blank, at most 4096 bytes.
    pub secret: SecretString,
    /// The organization the node belongs to, for people.
    pub organization_id: Option<String>,
}

/// Nobody waits for a callback now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unexpected;

/// Takes what the pages were told.
pub trait HealthChecks: Send + Sync {
    /// A callback came. It is taken only while a registration is in flight.
    ///
    /// # Errors
    /// When none is; nothing is kept of the callback then.
    fn called_back(&self, callback: Callback) -> Result<(), Unexpected>;

    /// The service asked whether this node lives.
    fn probed(&self);
}

/// A node that registers nowhere: no callback is expected, and a probe says nothing.
pub struct NoRegistration;

impl HealthChecks for NoRegistration {
    fn called_back(&self, _callback: Callback) -> Result<(), Unexpected> {
        Err(Unexpected)
    }

    fn probed(&self) {}
}
