//! Runs the steps of `pacing`. Each session has one task, which owns all mutable state.

use std::sync::Arc;

use tokio::{sync::oneshot, time::sleep};
use tracing::{debug, warn};

use super::{
    Closing, NoReport,
    pacing::{GAP_MIN, HeartbeatTiming, Pacing, PacingEvent, PacingStep, State},
};
use crate::{
    leases::{Advice, LeaseSource, Renewal},
    model::{
        AnnouncedData, BootInstant, CancelReason, HeldLease, HeldLeaseWriter, Pending, ReportAddress, Setup, TaskId,
    },
    node_event::{NodeEvent, NodeEvents},
};

/// Most failed heartbeats in the final flush of a task. Its report is then sent without the rest.
const FLUSHES_MAX: u32 = 3;
/// The error for a caller that waits for the set-up of a cancelled task.
const CANCELLED: &str = "the task was cancelled";

pub(super) struct Driver {
    source: Arc<dyn LeaseSource>,
    held_lease: HeldLease,
    writer: HeldLeaseWriter,
    closed: oneshot::Receiver<Closing>,
    pacing: Pacing,
    events: NodeEvents,
    /// Where heartbeats and the report go now.
    address: ReportAddress,
    /// Where the data is, according to the control plane so far.
    announced: AnnouncedData,
    /// Whether the location of the data was published.
    located: bool,
    /// Whether the task has ended and its final flush is complete.
    ended: bool,
    /// The advice of the latest heartbeat's failure. `None` after an answered heartbeat. Each advice is logged once.
    last_advice: Option<Advice>,
    /// The plane's message that this node no longer holds the lease.
    refusal: Option<String>,
}

impl Driver {
    pub(super) fn new(
        source: Arc<dyn LeaseSource>,
        timing: HeartbeatTiming,
        held_lease: HeldLease,
        writer: HeldLeaseWriter,
        closed: oneshot::Receiver<Closing>,
        events: NodeEvents,
    ) -> Self {
        let address = held_lease.lease.address.clone();
        let mut pacing =
            Pacing::new(timing, held_lease.lease.expires_at, held_lease.lease.token_expires_at, BootInstant::now());
        if held_lease.lease.cancelled {
            held_lease.cancel.cancel(CancelReason::Plane);
            writer.publish(|now| now.setup = Setup::Refused(CANCELLED.to_owned()));
            pacing = pacing.cancelled();
        }
        let announced = held_lease.lease.data.clone();
        let driver = Self {
            source,
            held_lease,
            writer,
            closed,
            pacing,
            events,
            address,
            announced,
            located: false,
            ended: false,
            last_advice: None,
            refusal: None,
        };
        driver.publish_deadline();
        driver
    }

    /// Holds the lease while its task runs, sends the final flush, and holds the lease while the report is sent.
    /// If the caller drops the session instead of closing it, this future ends at once.
    pub(super) async fn run(mut self) {
        let Some(closing) = self.hold_for_task().await else { return };
        if self.pacing.left(BootInstant::now()).is_some() && self.held_lease.progress.is_dirty() {
            self.flush().await;
        }
        let end = self.end();
        let report = end.is_ok();
        // The receiver no longer exists: the node stops, and the outbox owns the report.
        if closing.send(end).is_ok() && report {
            self.hold_for_report().await;
        }
    }

    /// Holds the lease until the session is closed.
    async fn hold_for_task(&mut self) -> Option<Closing> {
        let mut event = PacingEvent::Tick;
        loop {
            let step = self.pacing.on(event, BootInstant::now(), rand::random());
            self.publish_deadline();
            match step {
                PacingStep::Heartbeat { until } => event = self.send_heartbeat(until).await,
                PacingStep::Sleep { until } => {
                    event = tokio::select! {
                        biased;
                        closing = &mut self.closed => return closing.ok(),
                        () = sleep(until.left()) => PacingEvent::Tick,
                        () = self.held_lease.progress.changed() => PacingEvent::Tick,
                    };
                    // A heartbeat may already have carried the change.
                    if self.held_lease.progress.is_dirty() {
                        event = PacingEvent::Dirty;
                    }
                }
                PacingStep::Rest => return (&mut self.closed).await.ok(),
                end => {
                    self.publish_step(end);
                    event = PacingEvent::Tick;
                }
            }
        }
    }

    /// Holds the lease until it is over. Messages of the plane meanwhile do not affect the report. The answer to the
    /// report decides whether it counts.
    async fn hold_for_report(&mut self) {
        self.ended = true;
        let mut event = PacingEvent::Tick;
        loop {
            match self.pacing.on(event, BootInstant::now(), rand::random()) {
                PacingStep::Heartbeat { until } => event = self.send_heartbeat(until).await,
                PacingStep::Sleep { until } => {
                    sleep(until.left()).await;
                    event = PacingEvent::Tick;
                }
                PacingStep::Cancel | PacingStep::Lose | PacingStep::Rest => {
                    debug!(task_id = %self.address.task, "lease ended before its report was accepted");
                    return;
                }
            }
        }
    }

    /// The current id of the task on the control plane.
    fn task(&self) -> TaskId {
        self.address.task.clone()
    }

    /// Publishes the deadline of the lease.
    fn publish_deadline(&self) {
        // The cancel signal reports a lost lease. It needs no clock.
        if let Some(expires) = self.pacing.expires() {
            self.writer.deadline().set(expires);
        }
    }

    /// Publishes the end of the lease or a cancel to everything that works on the task.
    fn publish_step(&self, step: PacingStep) {
        match step {
            PacingStep::Cancel => {
                self.events.emit(NodeEvent::TaskCancelled { task: self.task() });
                self.held_lease.cancel.cancel(CancelReason::Plane);
                self.set_up(Setup::Refused(CANCELLED.to_owned()));
            }
            PacingStep::Lose => {
                if self.held_lease.cancel.reason() != Some(CancelReason::Plane) {
                    self.events.emit(NodeEvent::LeaseLost { task: self.task() });
                }
                self.held_lease.cancel.cancel(CancelReason::LeaseLost);
                self.set_up(Setup::Refused("the lease was lost before its set-up heartbeat was answered".to_owned()));
            }
            PacingStep::Heartbeat { .. } | PacingStep::Sleep { .. } | PacingStep::Rest => {}
        }
    }

    /// Publishes the result of the set-up. Only the first result counts.
    fn set_up(&self, result: Setup) {
        self.writer.set_up(|now| {
            let first = *now == Setup::Pending;
            if first {
                *now = result;
            }
            first
        });
    }

    async fn send_heartbeat(&mut self, until: BootInstant) -> PacingEvent {
        let sent = self.held_lease.progress.pending();
        let failure = match self.source.heartbeat(&self.address, &sent, until).await {
            Ok(renewal) => return self.apply_renewal(&sent, renewal),
            Err(err) => err,
        };
        match failure.advice() {
            Advice::StopTask => {
                let (task, error, ended) = (self.task(), failure.to_string(), self.ended);
                self.events.emit(NodeEvent::HeartbeatRefused { task, error: error.clone(), ended });
                // After the task has ended, its report may have arrived although its answer was lost.
                if !ended {
                    self.refusal = Some(error);
                }
                return PacingEvent::Refused;
            }
            Advice::GiveUp => self.set_up(Setup::Refused(failure.to_string())),
            Advice::RetryLater | Advice::RetryBounded => {}
        }
        let error = failure.to_string();
        self.writer.missed(error.clone());
        let advice = Some(failure.advice());
        let repeated = self.last_advice == advice;
        self.last_advice = advice;
        self.events.emit(NodeEvent::HeartbeatFailed { task: self.task(), error, repeated });
        PacingEvent::Failed { retry_after: failure.retry_after() }
    }

    /// Applies an answer in the order of posemesh.md section 4.10. The cancel comes last.
    fn apply_renewal(&mut self, sent: &Pending, renewal: Renewal) -> PacingEvent {
        if self.last_advice.take().is_some() {
            self.writer.answered();
            self.events.emit(NodeEvent::HeartbeatRecovered { task: self.task() });
        }
        self.held_lease.progress.acknowledge(sent);
        if self.writer.renew(renewal.token, renewal.token_expires_at) {
            self.held_lease.progress.answered();
        }
        if let Some(deadline) = renewal.hard_deadline {
            self.writer.move_hard_deadline(deadline);
        }
        if let Some(address) = renewal.address {
            if address.task != self.address.task {
                let (task, formerly) = (address.task.clone(), self.task());
                self.events.emit(NodeEvent::TaskRenamed { task, formerly });
            }
            self.address = address.clone();
            self.writer.rename(address);
        }
        if let Some(capability) = renewal.capability.filter(|name| name != self.held_lease.lease.capability.as_str()) {
            // The running runner does not change. A plane that wants another runner must create another task.
            warn!(event = "task.capability_renamed", task_id = %self.address.task, renamed = %capability, "control plane renamed the task's capability, the runner continues");
        }
        if self.announced.domain().is_none()
            && let Some(domain) = renewal.data.as_ref().and_then(AnnouncedData::domain)
        {
            // The span of the task was created before this was known.
            tracing::Span::current().record("domain_id", tracing::field::display(domain));
        }
        // The runner of a cancelled task must not start to fetch.
        if !renewal.cancel {
            self.locate_data(renewal.data);
        }
        PacingEvent::Answered { term: renewal.term, token: renewal.token_expires_at, cancel: renewal.cancel }
    }

    /// Publishes the location of the task's data with the set-up heartbeat, and after each change.
    fn locate_data(&mut self, newer: Option<AnnouncedData>) {
        let first = !self.located;
        let mut now = self.announced.clone();
        if let Some(newer) = newer {
            now.update(newer);
        }
        if !first && now == self.announced {
            return;
        }
        self.located = true;
        self.announced = now;
        let now = self.announced.resolve();
        self.writer.set_up(|known| match (known, now) {
            (known @ Setup::Pending, now) => {
                *known = Setup::Ready(now);
                true
            }
            (Setup::Ready(known), Ok(now)) if known.as_ref() != Ok(&now) => {
                *known = Ok(now);
                true
            }
            // A refused set-up stays refused. An unusable location does not replace a usable one.
            _ => false,
        });
    }

    /// Whether the end of the task may be reported.
    fn end(&self) -> Result<(), NoReport> {
        if let Some(why) = self.refusal.clone() {
            return Err(NoReport::Refused(why));
        }
        if matches!(self.pacing.state(), State::Cancelled { .. }) {
            return Err(NoReport::Over(CancelReason::Plane));
        }
        Ok(())
    }

    /// Sends the last progress and events. It may take half of the time that is left of the lease. The other half is
    /// for the report, which is sent in any case.
    async fn flush(&mut self) {
        let started = BootInstant::now();
        let deadline = started + self.pacing.left(started).unwrap_or_default() / 2;
        let mut failures = 0;
        loop {
            let mut step = self.pacing.heartbeat_now(BootInstant::now());
            let mut answered = false;
            if let PacingStep::Heartbeat { until } = step {
                let event = self.send_heartbeat(until.min(deadline)).await;
                answered = matches!(event, PacingEvent::Answered { .. });
                step = self.pacing.on(event, BootInstant::now(), rand::random());
            }
            self.publish_deadline();
            self.publish_step(step);
            let PacingStep::Sleep { until } = step else { return };
            if !self.held_lease.progress.is_dirty() {
                return;
            }
            // The next heartbeat carries what one heartbeat could not carry. It is sent after the shortest gap.
            let next = if answered { BootInstant::now() + GAP_MIN } else { until };
            failures += u32::from(!answered);
            if failures >= FLUSHES_MAX || next >= deadline {
                break;
            }
            sleep(next.left()).await;
        }
        warn!(event = "progress.not_delivered", task_id = %self.address.task, "last progress and events were not delivered");
    }
}
