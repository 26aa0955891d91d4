//! One held lease: heartbeats, token rotation and the final flush. The outbox sends the report. It keeps the session
//! until the report has arrived, so that the plane does not lease the task again meanwhile.
//!
//! [`Sessions::open`] starts a driver for a lease and returns the [`Session`]. Everything that works on the task reads
//! its [`HeldLease`]. Drivers run on a separate runtime, which busy runners cannot starve. `pacing` decides when to
//! send a heartbeat, without clock or socket. `driver` sends it. This module does not know which plane it talks to.

mod driver;
mod pacing;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use tokio::{runtime::Handle, sync::oneshot};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use crate::{
    leases::LeaseSource,
    model::{CancelReason, HeldLease, Lease, LeaseKeeper, Outcome, ReportAddress, Setup},
    node_event::NodeEvents,
};

/// How leases are kept alive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Earliest heartbeat, as a share of the time left of the lease. A wrong order or range of the two ratios is
    /// corrected.
    pub min_ratio: f64,
    /// Latest heartbeat, as a share of the time left of the lease.
    pub max_ratio: f64,
    /// How long progress and events are collected before they are sent.
    pub coalesce: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { min_ratio: 0.25, max_ratio: 0.35, coalesce: Duration::from_millis(250) }
    }
}

/// Opens sessions.
pub struct Sessions {
    timing: pacing::HeartbeatTiming,
    runtime: Handle,
    events: NodeEvents,
}

impl Sessions {
    /// `runtime` drives the heartbeats.
    #[must_use]
    pub fn new(config: Config, runtime: Handle, events: NodeEvents) -> Self {
        let timing = pacing::HeartbeatTiming::new(config.min_ratio, config.max_ratio, config.coalesce);
        Self { timing, runtime, events }
    }

    /// Starts to keep `lease` alive, and sends a heartbeat at once. A lease that arrived cancelled gets no heartbeat,
    /// and its view is cancelled from the start. Its log lines belong to the current span.
    #[must_use]
    pub fn open(&self, source: &Arc<dyn LeaseSource>, lease: Lease) -> Session {
        let (held_lease, writer) = HeldLease::new(lease, Setup::Pending);
        let (close, closed) = oneshot::channel();
        let timing = self.timing.at_most(source.facts().heartbeat_every);
        let driver =
            driver::Driver::new(Arc::clone(source), timing, held_lease.clone(), writer, closed, self.events.clone());
        let driver = AbortOnDropHandle::new(self.runtime.spawn(driver.run().in_current_span()));
        Session { held_lease, close, driver }
    }
}

/// A lease that is kept alive. Its heartbeats end at once when this is dropped.
pub struct Session {
    held_lease: HeldLease,
    close: oneshot::Sender<Closing>,
    driver: AbortOnDropHandle<()>,
}

/// Where the driver sends the result of the final flush.
type Closing = oneshot::Sender<Result<(), NoReport>>;

/// Why the end of a task may not be reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoReport {
    /// The task was cancelled or its lease lost before it ended.
    Over(CancelReason),
    /// The control plane refused a heartbeat: this node does not hold the task. The text is the reason in one line.
    Refused(String),
}

impl Session {
    /// The live view of the lease.
    #[must_use]
    pub fn held_lease(&self) -> HeldLease {
        self.held_lease.clone()
    }

    /// Returns why this outcome may not be reported, if it may not. Call it when the task has ended.
    #[must_use]
    pub fn no_report(&self, outcome: &Outcome) -> Option<CancelReason> {
        // This also reads the clock: a process that was stopped may not have noticed the end of the lease yet.
        let still_held = self.held_lease.check_deadline();
        match (self.held_lease.cancel.reason(), outcome) {
            _ if !still_held => Some(CancelReason::LeaseLost),
            (Some(reason @ (CancelReason::Plane | CancelReason::LeaseLost)), _) => Some(reason),
            (_, Outcome::LeaseLost) => Some(CancelReason::LeaseLost),
            (reason, Outcome::Cancelled) => Some(reason.unwrap_or(CancelReason::Plane)),
            _ => None,
        }
    }

    /// Sends the remaining progress and events while the lease is valid. Then the heartbeats go on until the returned
    /// lease is dropped. A lease that ends during this call does not prevent the report, because its task has ended
    /// before.
    ///
    /// # Errors
    /// When nothing may be reported.
    pub async fn close(self) -> Result<ClosedSession, NoReport> {
        let Self { held_lease, close, driver } = self;
        let (end, closed) = oneshot::channel();
        // The driver may have ended by a panic. Then nobody receives this message.
        let _ = close.send(end);
        match closed.await {
            Ok(end) => end?,
            Err(_) => {
                tracing::error!(event = "session.failed", task_id = %held_lease.lease.task(), "a session ended unexpectedly");
            }
        }
        Ok(ClosedSession { held_lease, _driver: driver })
    }
}

/// The lease of an ended task. It is kept alive until this is dropped.
pub struct ClosedSession {
    held_lease: HeldLease,
    _driver: AbortOnDropHandle<()>,
}

impl LeaseKeeper for ClosedSession {
    fn address(&self) -> ReportAddress {
        self.held_lease.address()
    }
}

impl LeaseKeeper for Session {
    fn address(&self) -> ReportAddress {
        self.held_lease.address()
    }
}
