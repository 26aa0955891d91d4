//! The control planes of a node. Decides which of them is polled next.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::{Modules, SharedPace};
use crate::leases::{Admission, LeaseSource, PlaneReadiness};

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
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

impl Plane {
    pub(super) fn new(
        source: Arc<dyn LeaseSource>,
        poll_backoff: (Duration, Duration),
        changed: &Arc<Notify>,
        now: Instant,
    ) -> Self {
        let waiting = Waiting { count: Arc::default(), changed: Arc::clone(changed) };
        let pace = SharedPace::new(poll_backoff, now);
        Self { source, pace, under_way: 0, busy: false, since: now, polled_at: now, waiting }
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
}

/// Waits until one of the planes may be polled. A plane that pauses or is not ready holds no slot. Too many waiting
/// reports, or a full disk, stop polls of all planes. Otherwise finished tasks would accumulate without bound.
pub(super) async fn next_poll(modules: &Modules, planes: &[Plane], slots: &Arc<Semaphore>) -> PollSlot {
    let (outbox, disk) = (&modules.outbox, modules.storage.disk());
    loop {
        if !outbox.has_room() {
            outbox.until_room().await;
            continue;
        }
        if !disk.has_room() {
            disk.until_room().await;
            continue;
        }
        let Some(plane) = due(planes).await else { continue };
        if planes[plane].source.facts().admission == Admission::LeaseFirst {
            return PollSlot { plane, permit: None };
        }
        let permit = Arc::clone(slots).acquire_owned().await.expect("the slots are never closed");
        // All of these conditions may have changed while this waited for the slot.
        let due = planes[plane].is_ready() && planes[plane].pace.next() <= Instant::now();
        if due && outbox.has_room() && disk.has_room() {
            return PollSlot { plane, permit: Some(permit) };
        }
    }
}

/// Waits for a plane that may be polled now. `None`: something changed, and the caller must check again.
async fn due(planes: &[Plane]) -> Option<usize> {
    let wanting = || planes.iter().enumerate().filter(|(_, plane)| plane.wants_poll());
    let now = Instant::now();
    let ready = || wanting().filter(|(_, plane)| plane.is_ready());
    let first = ready().filter(|(_, plane)| plane.pace.next() <= now).min_by_key(|(_, plane)| plane.polled_at);
    if let Some((index, _)) = first {
        return Some(index);
    }
    let next = ready().map(|(_, plane)| plane.pace.next()).min();
    let mut unready: FuturesUnordered<_> = wanting()
        .filter(|(_, plane)| !plane.is_ready())
        .map(|(_, plane)| async {
            if !plane.source.until_ready().await {
                std::future::pending::<()>().await; // no plane will be due
            }
        })
        .collect();
    tokio::select! {
        () = async {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        } => {}
        Some(()) = unready.next() => {}
    }
    None
}
