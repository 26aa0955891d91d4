//! The first delivery of a report: written to the disk, then sent by the attempt that made it.
//!
//! The report of a brief task is sent before it is written. If the control plane accepts it at once, it is never
//! written.

use std::{future::Future, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    Outbox, Sent,
    entry::Entry,
    sending::{Sender, Try},
    store::Change,
};
use crate::{
    crash,
    leases::PlaneFacts,
    model::{Lease, LeaseKeeper, PlaneName, TaskResult},
};

/// Longest time for the last heartbeat and the first send of a report after a stop is requested. The outbox keeps
/// what is not sent by then.
const SEND_AFTER_STOP: Duration = Duration::from_secs(2);
/// A task is brief if it took at most this time and published nothing. To run it again costs little.
const BRIEF: Duration = Duration::from_millis(50);
/// How long the control plane may take to accept the report of a brief task before the report is written.
const AT_ONCE: Duration = Duration::from_millis(25);

/// The report of a task that has just ended.
#[derive(Clone, Copy)]
pub struct NewReport<'a> {
    /// The control plane that gave the task.
    pub plane: &'a PlaneFacts,
    /// Its lease.
    pub lease: &'a Lease,
    /// What is reported.
    pub task_result: &'a TaskResult,
    /// How long the task took.
    pub elapsed: Duration,
}

/// The stop requests of the node. Both shorten a delivery.
#[derive(Clone, Copy)]
pub struct Stops<'a> {
    /// The node takes no new tasks.
    pub drain: &'a CancellationToken,
    /// The node cancels its tasks.
    pub cancel: &'a CancellationToken,
}

/// A report whose first try belongs to its attempt. If it is dropped without a try or
/// [`PendingReport::withdraw`], it is written and waits in the outbox.
pub(super) struct PendingReport {
    outbox: Outbox,
    plane: PlaneName,
    number: u64,
    done: bool,
}

/// The number of a report in the outbox. With it, a caller waits until the report is on the disk.
pub(super) struct Ticket {
    outbox: Outbox,
    number: u64,
}

impl NewReport<'_> {
    fn is_brief(&self) -> bool {
        self.elapsed <= BRIEF && self.task_result.artifacts.is_empty()
    }
}

impl Outbox {
    /// Delivers a report once and returns how far it came. The outbox sends it later if it is not accepted.
    ///
    /// `close` sends the last heartbeat and returns the lease, which the outbox holds until the report leaves. Its
    /// error means that nothing may be reported: the report is deleted and the error returned. `when_safe` starts as
    /// soon as the disk or the control plane has the report, and frees the slot of the task. It runs concurrently
    /// with everything that may wait for the control plane.
    ///
    /// If the future is dropped, the report is written and the outbox sends it.
    pub async fn deliver<L: LeaseKeeper + 'static, E>(
        &self,
        report: NewReport<'_>,
        close: impl Future<Output = Result<L, E>>,
        stops: Stops<'_>,
        when_safe: impl Future<Output = ()>,
    ) -> Result<Sent, E> {
        crash::point("before-write");
        let pending = self.enter(report);
        let ticket = pending.ticket();
        let sending = async move {
            match close.await {
                Ok(lease) => {
                    crash::point("before-report");
                    Ok(pending.send(lease).await)
                }
                Err(err) => {
                    pending.withdraw();
                    Err(err)
                }
            }
        };
        tokio::pin!(sending);
        let mut sent = None;
        if report.is_brief() {
            tokio::select! {
                biased;
                now = &mut sending => sent = Some(now),
                () = tokio::time::sleep(AT_ONCE) => {}
                () = stops.cancel.cancelled() => {}
            }
        }
        if matches!(sent, None | Some(Ok(Sent::Waiting(_)))) {
            ticket.write().await;
            crash::point("after-write");
        }
        if let Some(sent) = sent {
            when_safe.await;
            return sent;
        }
        let sending = async {
            tokio::select! {
                biased;
                sent = sending => sent,
                // `sending` is dropped here, so the outbox owns the report.
                () = send_limit(stops.drain) => Ok(Sent::Waiting("the node stops".to_owned())),
            }
        };
        let ((), sent) = tokio::join!(when_safe, sending);
        sent
    }

    /// Adds a report. It is in memory only: see [`PendingReport::ticket`].
    pub(super) fn enter(&self, report: NewReport<'_>) -> PendingReport {
        let NewReport { plane, lease, task_result, .. } = report;
        let entry = Arc::new(Entry {
            plane: plane.name.clone(),
            base_url: plane.base_url.trim_end_matches('/').into(),
            node: Arc::clone(&plane.node),
            address: lease.address.clone(),
            job_id: lease.job,
            domain_id: lease.data.domain(),
            capability: lease.capability.to_string(),
            task_result: task_result.clone(),
            ended_at: Timestamp::now(),
        });
        let number = self.with(|queue| queue.add(entry));
        PendingReport { outbox: self.clone(), plane: plane.name.clone(), number, done: false }
    }
}

/// Waits until a stop leaves no more time to send.
async fn send_limit(drain: &CancellationToken) {
    drain.cancelled().await;
    tokio::time::sleep(SEND_AFTER_STOP).await;
}

impl Ticket {
    /// Returns when the report is on the disk, or has left the outbox. It also returns after a write error, which is
    /// logged. Such a report is in memory only.
    pub(super) async fn write(&self) {
        let Self { outbox, number } = self;
        let ordered = outbox.with(|queue| {
            let (entry, tries) = queue.write(*number)?;
            // Under the lock: after an answer, this write must not put the report back on the disk.
            Some((outbox.0.writer.write(Change::Put(*number, entry.encode(&tries))), entry))
        });
        let Some((written, entry)) = ordered else { return };
        if let Err(err) = written.await {
            debug!(task_id = %entry.task(), error = %err, "report is kept in memory only");
        }
    }
}

impl PendingReport {
    /// The number of the report, to wait for its write.
    pub(super) fn ticket(&self) -> Ticket {
        Ticket { outbox: self.outbox.clone(), number: self.number }
    }

    /// The first try. If the future is dropped, the outbox sends the report. `lease` gives the current address of the
    /// report before each try. The outbox holds it until the report leaves: until then, the control plane must not
    /// lease the task again.
    pub(super) async fn send(mut self, lease: impl LeaseKeeper + 'static) -> Sent {
        self.outbox.with(|queue| queue.hold(self.number, Box::new(lease)));
        let outbox = self.outbox.clone();
        let senders = outbox.0.senders.get(&self.plane).expect("a control plane of this node gave the task");
        let Ok(_sender) = senders.try_acquire() else {
            return Sent::Waiting("too many other reports are being sent".to_owned());
        };
        let sent = match Try::begin(&outbox, self.number, Sender::Attempt) {
            Some(one) => one.run().await,
            None => None,
        };
        self.done = true;
        // Other reports may wait for an answer of the control plane, or for the end of this try.
        if outbox.lock().queue.waiting() > 0 {
            outbox.0.report_due.notify_one();
        }
        sent.unwrap_or(Sent::Dropped)
    }

    /// Deletes the report: there is nothing to report any more.
    pub(super) fn withdraw(mut self) {
        self.done = true;
        let outbox = &self.outbox;
        outbox.with(|queue| Some(outbox.forget(self.number, queue.remove(self.number)?)));
    }
}

impl Drop for PendingReport {
    fn drop(&mut self) {
        if !self.done {
            self.outbox.with(|queue| {
                if !queue.is_written(self.number)
                    && let Some((entry, tries)) = queue.write(self.number)
                {
                    self.outbox.0.writer.note(Change::Put(self.number, entry.encode(&tries)));
                }
                queue.hand_over(self.number, Instant::now());
            });
            self.outbox.0.report_due.notify_one();
        }
    }
}
