//! One try to send a report to the control plane, and the meaning of the answer.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;
use tracing::{Instrument as _, Span, debug, info_span};

use super::{
    Outbox, Sent,
    entry::{Entry, Tries},
    queue::{Failed, Failure},
    source_of,
    store::Change,
};
use crate::{
    leases::{Advice, LeaseError},
    model::{PlaneName, millis},
    node_event::NodeEvent,
};

/// The error of a try whose sender ended before an answer.
const BROKEN_OFF: &str = "the node stopped before the control plane answered";

/// The sender of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    Attempt,
    Outbox,
}

/// One try in progress, which is counted. If it is dropped before its end, its report waits in the queue again.
pub(super) struct Try {
    outbox: Outbox,
    number: u64,
    entry: Arc<Entry>,
    tries: Tries,
    who: Sender,
    ended: bool,
}

impl Try {
    /// `None` if there is nothing to send.
    pub(super) fn begin(outbox: &Outbox, number: u64, who: Sender) -> Option<Self> {
        let (entry, tries) = outbox.with(|queue| {
            let renamed = queue.rename(number);
            let (entry, tries) = queue.begin(number, Timestamp::now())?;
            if renamed {
                outbox.0.writer.note(Change::Put(number, entry.encode(&tries)));
            }
            Some((entry, tries))
        })?;
        Some(Self { outbox: outbox.clone(), number, entry, tries, who, ended: false })
    }

    /// The control plane that gets the report.
    pub(super) fn plane(&self) -> &PlaneName {
        &self.entry.plane
    }

    /// An attempt logs the end of its task in its own span. For a report that the outbox sends, the line is logged
    /// here. `None` if the report was dropped during the try.
    pub(super) async fn run(self) -> Option<Sent> {
        let entry = &self.entry;
        let span = match self.who {
            Sender::Attempt => Span::current(),
            Sender::Outbox => info_span!(
                "report",
                plane = %entry.plane,
                task_id = %entry.task(),
                job_id = entry.job_id.map(tracing::field::display),
                domain_id = entry.domain_id.map(tracing::field::display),
                capability = entry.capability,
            ),
        };
        self.send().instrument(span).await
    }

    async fn send(mut self) -> Option<Sent> {
        let source = source_of(&self.outbox.0.planes, &self.entry).expect("a foreign report is never sent");
        let settled = source.report(&self.entry.address, &self.entry.task_result).await;
        self.ended = true;
        let Self { outbox, number, entry, tries, who, .. } = &self;
        let (task, outcome, tries) = (entry.task(), entry.task_result.outcome.kind(), tries.count);
        let Err(err) = settled else {
            crate::crash::point("answer-read");
            let ended_as = outbox.answered(*number);
            if *who == Sender::Outbox {
                let waited = Timestamp::now().duration_since(entry.ended_at).max(SignedDuration::ZERO).unsigned_abs();
                let ended_as = ended_as.unwrap_or_else(|| task.clone());
                let delivered = NodeEvent::ReportDelivered { task: task.clone(), ended_as, outcome, tries, waited };
                outbox.0.events.emit(delivered);
            }
            return Some(Sent::Accepted);
        };
        let error = err.to_string();
        if for_good(&err) {
            let ended_as = outbox.answered(*number)?;
            if *who == Sender::Outbox {
                let (task, error) = (task.clone(), error.clone());
                outbox.0.events.emit(NodeEvent::ReportRefused { task, ended_as, outcome, tries, error });
            }
            return Some(Sent::Refused(error));
        }
        let only_this = err.advice() == Advice::RetryBounded;
        let failure = Failure { error: &error, retry_after: err.retry_after(), only_this };
        // Ordered under the lock: if the report is dropped next, this write must not put it back on the disk.
        let Failed { tries: failed, pause, first, ended_as } = outbox.with(|queue| {
            let failed = queue.failed(*number, failure, Instant::now(), rand::random::<f64>())?;
            outbox.0.writer.note(Change::Put(*number, entry.encode(&failed.tries)));
            Some(failed)
        })?;
        outbox.0.report_due.notify_one();
        if failed.set_aside {
            let (task, error) = (task.clone(), error.clone());
            outbox.0.events.emit(NodeEvent::ReportSetAside { task, ended_as, outcome, tries, error });
        } else if first {
            outbox.0.events.emit(NodeEvent::ReportWaiting { task: task.clone(), error: error.clone(), pause });
        } else {
            debug!(task_id = %task, error, tries, retry_in_ms = millis(pause), "report failed");
        }
        Some(Sent::Waiting(error))
    }
}

impl Drop for Try {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.outbox.with(|queue| {
            if let Some((entry, tries)) = queue.broken_off(self.number, BROKEN_OFF, Instant::now()) {
                self.outbox.0.writer.note(Change::Put(self.number, entry.encode(&tries)));
            }
        });
        self.outbox.0.report_due.notify_one();
    }
}

/// Whether the control plane will never accept this report.
fn for_good(err: &LeaseError) -> bool {
    matches!(err.advice(), Advice::StopTask | Advice::GiveUp)
}
