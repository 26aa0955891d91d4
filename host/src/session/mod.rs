//! One held lease: its heartbeats, its turning tokens, its last words. The report is the outbox's, which
//! keeps the session until the report has arrived: the plane must not give the task out again meanwhile.
//!
//! [`Sessions::open`] starts a driver for a lease and hands out the [`Session`]; everyone who works
//! on the task looks at its [`HeldLease`]. Drivers run on a runtime of their own, which busy runners
//! cannot starve. When to beat is decided in `pacing`, without clock or socket; `driver` does it.
//! Which plane is spoken to is not known here.

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

    /// Starts to keep `lease`, with a heartbeat at once. A lease that arrived cancelled gets none:
    /// its grant is cancelled from the beginning. Its log lines belong to the current span.
    #[must_use]
    pub fn open(&self, source: &Arc<dyn LeaseSource>, lease: Lease) -> Session {
        let (grant, keys) = HeldLease::new(lease, Setup::Pending);
        let (close, closed) = oneshot::channel();
        let timing = self.timing.at_most(source.facts().heartbeat_every);
        let driver = driver::Driver::new(Arc::clone(source), timing, grant.clone(), keys, closed, self.events.clone());
        let driver = AbortOnDropHandle::new(self.runtime.spawn(driver.run().in_current_span()));
        Session { grant, close: Some(close), _driver: driver }
    }
}

/// A lease being kept. Its heartbeats end at once when it is dropped.
pub struct Session {
    grant: HeldLease,
    close: Option<oneshot::Sender<Closing>>,
    _driver: AbortOnDropHandle<()>,
}

/// Where the driver says how the last words went.
type Closing = oneshot::Sender<Result<ReportAddress, NoReport>>;

/// Why nothing may be said about the end of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoReport {
    /// The task was cancelled or its lease lost before it ended.
    Over(CancelReason),
    /// The plane has said that the task is not ours; the text says how, in one line.
    Gone(String),
}

impl Session {
    /// The live view of the lease.
    #[must_use]
    pub fn grant(&self) -> HeldLease {
        self.grant.clone()
    }

    /// Why an end like this may not be reported, if so: asked in the moment the task has ended.
    #[must_use]
    pub fn no_report(&self, outcome: &Outcome) -> Option<CancelReason> {
        // Asking looks at the clock too: a process that was stopped may not have heard of the end yet.
        let ours = self.grant.check_deadline();
        match (self.grant.cancel.reason(), outcome) {
            _ if !ours => Some(CancelReason::LeaseLost),
            (Some(reason @ (CancelReason::Plane | CancelReason::LeaseLost)), _) => Some(reason),
            (_, Outcome::LeaseLost) => Some(CancelReason::LeaseLost),
            (reason, Outcome::Cancelled) => Some(reason.unwrap_or(CancelReason::Plane)),
            _ => None,
        }
    }

    /// Sends the last progress and events where some are left and the lease still lives. Returns where the
    /// report goes, or why there is none. A lease that runs out in here silences
    /// nothing: its task has ended before. Where there is a report, heartbeats go on until the session is
    /// dropped. Call it once.
    pub async fn close(&mut self) -> Result<ReportAddress, NoReport> {
        let (say, said) = oneshot::channel();
        if let Some(close) = self.close.take() {
            // The driver may have ended by a panic; then nothing is said.
            let _ = close.send(say);
        }
        if let Ok(closed) = said.await {
            return closed;
        }
        tracing::error!(event = "session.failed", task_id = %self.grant.lease.task(), "a session ended unexpectedly");
        Ok(self.grant.address())
    }
}

impl LeaseKeeper for Session {
    fn address(&self) -> ReportAddress {
        self.grant.address()
    }
}
