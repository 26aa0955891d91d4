//! The control planes of a node. Decides which of them is polled next.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};
use tracing::{Span, info_span};

use super::{
    Modules, SharedPace,
    slots::{Permit, Slots},
};
use crate::{
    leases::{Admission, LeaseSource, PlaneReadiness},
    node_event::NodeEvents,
    outbox::Outbox,
};

/// One control plane as the engine sees it.
pub(super) struct Plane {
    pub(super) source: Arc<dyn LeaseSource>,
    pub(super) pace: SharedPace,
    /// Polls under way.
    pub(super) under_way: usize,
    /// The control plane wants one of its tasks to end before it gives more.
    pub(super) busy: bool,
    /// When the last answer arrived, or when the first poll after it was sent.
    pub(super) since: Instant,
    /// When it was polled last. Of two planes that are due, the one that waited longer is next.
    polled_at: Instant,
    waiting: Waiting,
    /// The slot for its next poll, while it is due.
    request: Option<SlotRequest>,
    /// Shows and logs what happens on this control plane.
    pub(super) events: NodeEvents,
    /// The fields of log lines about it.
    pub(super) span: Span,
}

/// A request for a slot.
enum SlotRequest {
    Asked(oneshot::Receiver<Permit>),
    Granted(Permit),
}

impl SlotRequest {
    /// Whether there is a slot now. Otherwise the task of `cx` is woken when there is one.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Self::Asked(answer) = self {
            match Pin::new(answer).poll(cx) {
                Poll::Ready(permit) => *self = Self::Granted(permit.expect("slots answer each request")),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }
}

/// Counts leases that arrived without a slot and wait for one.
#[derive(Clone)]
pub(super) struct Waiting {
    count: Arc<AtomicUsize>,
    changed: Arc<Notify>,
}

/// One lease that waits for a slot.
pub(super) struct WaitingLease(Waiting);

impl Drop for WaitingLease {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_one();
    }
}

/// Permission to poll one plane.
pub(super) struct PollSlot {
    /// Its index in the list.
    pub(super) plane: usize,
    /// The slot for the lease. `None`: the slot is reserved when a lease has arrived.
    pub(super) permit: Option<Permit>,
}

impl Plane {
    pub(super) fn new(
        source: Arc<dyn LeaseSource>,
        poll_backoff: (Duration, Duration),
        changed: &Arc<Notify>,
        now: Instant,
        events: NodeEvents,
    ) -> Self {
        let waiting = Waiting { count: Arc::default(), changed: Arc::clone(changed) };
        let pace = SharedPace::new(poll_backoff, now);
        let span = info_span!("plane", plane = %source.facts().name);
        Self {
            source,
            pace,
            under_way: 0,
            busy: false,
            since: now,
            polled_at: now,
            waiting,
            request: None,
            events,
            span,
        }
    }

    /// Whether one more poll may be under way.
    pub(super) fn wants_poll(&self) -> bool {
        match self.source.facts().admission {
            Admission::SlotFirst => !self.busy && self.under_way < self.pace.width(),
            // One lease may wait for a slot. More would keep work from other nodes.
            Admission::LeaseFirst => self.under_way == 0 && self.waiting.count.load(Ordering::Acquire) == 0,
        }
    }

    /// Notes that a poll is sent.
    pub(super) fn sent(&mut self, now: Instant) {
        if self.under_way == 0 {
            self.since = now;
        }
        self.under_way += 1;
        self.polled_at = now;
    }

    /// Counts a lease that waits for a slot until the returned value is dropped.
    pub(super) fn one_waits(&self) -> WaitingLease {
        self.waiting.count.fetch_add(1, Ordering::AcqRel);
        WaitingLease(self.waiting.clone())
    }

    fn is_ready(&self) -> bool {
        matches!(self.source.readiness(), PlaneReadiness::Ready)
    }

    fn is_due(&self, outbox: &Outbox, now: Instant) -> bool {
        self.wants_poll() && self.is_ready() && self.pace.next() <= now && self.has_room(outbox)
    }

    fn has_room(&self, outbox: &Outbox) -> bool {
        outbox.has_room(&self.source.facts().name)
    }

    /// Withdraws the request for a slot, if there is one.
    pub(super) fn release_slot(&mut self) {
        self.request = None;
    }

    /// Asks for the slot of the next poll if it needs one. `true`: it may be polled now. A plane that is not due holds
    /// no slot.
    fn prepare(&mut self, index: usize, slots: &Slots, outbox: &Outbox, now: Instant) -> bool {
        if !self.is_due(outbox, now) {
            self.release_slot();
            return false;
        }
        if self.source.facts().admission == Admission::LeaseFirst {
            return true;
        }
        let request = self.request.get_or_insert_with(|| SlotRequest::Asked(slots.ask(index)));
        request.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }
}

/// Waits until one of the planes may be polled. A plane that pauses or is not ready holds no slot. Too many waiting
/// reports of a plane stop its polls. A full disk stops the polls of all planes. Otherwise finished tasks would accumulate without bound.
///
/// A request for a slot outlives a dropped future: a plane must not lose its turn because another event came first.
pub(super) async fn next_poll(modules: &Modules, planes: &mut [Plane], slots: &Slots) -> PollSlot {
    let (outbox, disk) = (&modules.outbox, modules.storage.disk());
    loop {
        if !disk.has_room() {
            planes.iter_mut().for_each(Plane::release_slot);
            disk.until_room().await;
            continue;
        }
        let now = Instant::now();
        let due = planes.iter_mut().enumerate().filter_map(|(index, plane)| {
            let due = plane.prepare(index, slots, outbox, now);
            due.then_some((plane.polled_at, index))
        });
        // Every plane is prepared here, not only the first one.
        if let Some((_, plane)) = due.min() {
            let permit = planes[plane].request.take().and_then(|request| match request {
                SlotRequest::Granted(permit) => Some(permit),
                SlotRequest::Asked(_) => None,
            });
            return PollSlot { plane, permit };
        }
        one_changes(planes, outbox, now).await;
    }
}

/// Waits until a plane may be due: it gets a slot, becomes ready, its pause is over, or its reports leave.
async fn one_changes(planes: &mut [Plane], outbox: &Outbox, now: Instant) {
    let wanting = || planes.iter().filter(|plane| plane.wants_poll());
    let next = wanting().filter(|plane| plane.is_ready()).map(|plane| plane.pace.next()).filter(|next| *next > now);
    let next = next.min();
    let unable = wanting().filter(|plane| !plane.is_ready() || !plane.has_room(outbox));
    let mut unable: FuturesUnordered<_> = unable
        .map(|plane| Arc::clone(&plane.source))
        .map(|source| async move {
            if !source.until_ready().await {
                std::future::pending::<()>().await; // this plane will not be due
            }
            outbox.until_room(&source.facts().name).await;
        })
        .collect();
    let granted = poll_fn(|cx| {
        let mut requests = planes.iter_mut().filter_map(|plane| plane.request.as_mut());
        if requests.any(|request| request.poll(cx).is_ready()) { Poll::Ready(()) } else { Poll::Pending }
    });
    tokio::select! {
        () = async {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        } => {}
        Some(()) = unable.next() => {}
        () = granted => {}
    }
}
