//! One held lease: its heartbeats, its turning tokens, its end.
//!
//! [`Sessions::open`] starts a driver for a lease and hands out the [`Session`]; everyone who works
//! on the task looks at its [`Grant`]. Drivers run on a runtime of their own, which busy runners
//! cannot starve. When to beat is decided in `pacing`, without clock or socket; `driver` does it.
//! Which plane is spoken to is not known here.

mod driver;
mod pacing;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use tokio::{runtime::Handle, sync::oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    leases::LeaseSource,
    model::{CancelReason, Grant, Lease, Setup, Verdict},
};

/// How leases are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Earliest heartbeat, as a share of what is left of the lease. Order and range of the two
    /// ratios are put right where they are wrong.
    pub min_ratio: f64,
    /// Latest heartbeat, as a share of what is left of the lease.
    pub max_ratio: f64,
    /// How long progress and events are gathered before they are sent.
    pub coalesce: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { min_ratio: 0.25, max_ratio: 0.35, coalesce: Duration::from_millis(250) }
    }
}

/// Opens sessions.
pub struct Sessions {
    source: Arc<dyn LeaseSource>,
    rhythm: pacing::Rhythm,
    runtime: Handle,
}

impl Sessions {
    /// `runtime` drives the heartbeats and the final reports.
    #[must_use]
    pub fn new(source: Arc<dyn LeaseSource>, config: Config, runtime: Handle) -> Self {
        let rhythm = pacing::Rhythm::new(config.min_ratio, config.max_ratio, config.coalesce);
        Self { source, rhythm, runtime }
    }

    /// Starts to keep `lease`, with a heartbeat at once. A lease that arrived cancelled gets none:
    /// its grant is cancelled from the beginning.
    #[must_use]
    pub fn open(&self, lease: Lease) -> Session {
        let (grant, keys) = Grant::new(lease, Setup::Pending);
        let (close, closed) = oneshot::channel();
        let driver = driver::Driver::new(Arc::clone(&self.source), self.rhythm, grant.clone(), keys, closed);
        let driver = AbortOnDropHandle::new(self.runtime.spawn(driver.run()));
        Session { grant, close, driver }
    }
}

/// A lease being kept. Dropped without [`Session::settle`], its heartbeats end and nothing is
/// reported.
pub struct Session {
    grant: Grant,
    close: oneshot::Sender<Verdict>,
    driver: AbortOnDropHandle<Settled>,
}

/// What became of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The plane took it.
    Accepted,
    /// There was nothing to say: the task was cancelled, or is not ours any more.
    NotSent(CancelReason),
    /// The plane will never take it; the text says why, in one line.
    Refused(String),
    /// The lease ended before the plane took it; the text is the last failure, in one line.
    GivenUp(String),
}

impl Session {
    /// The live view of the lease.
    #[must_use]
    pub fn grant(&self) -> Grant {
        self.grant.clone()
    }

    /// Ends the heartbeats, sends the last progress and events where some are left, and reports
    /// until the plane takes it, refuses for good, or the lease ends. Dropping the future ends
    /// the report too.
    pub async fn settle(self, verdict: &Verdict) -> Settled {
        // The driver may have ended by a panic; then the join below says so.
        let _ = self.close.send(verdict.clone());
        self.driver.await.unwrap_or_else(|err| Settled::GivenUp(format!("the session ended early: {err}")))
    }
}
