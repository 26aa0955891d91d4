//! Bounds the bytes of task data that may be in the node's memory at once.
//!
//! A [`Budget`] is charged through guards. [`Budget::reserve`] charges a whole object before it is held, and waits
//! until enough bytes are free. [`Budget::count`] charges a piece of a stream, and never waits.
//!
//! Transfers cannot deadlock on the budget. A caller that waits for a reservation holds no earlier one. A piece of a
//! stream waits for no reservation. A single object is always admitted, whether or not pieces are charged.
//! Only the pieces of open streams can exceed the limit.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use serde::{Serialize, Serializer, ser::SerializeStruct};
use tokio::sync::oneshot;

/// An object that is larger than the whole budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverBudget {
    bytes: u64,
    limit: u64,
}

impl fmt::Display for OverBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, limit } = self;
        write!(f, "{bytes} bytes do not fit into MEMORY_BUDGET, {limit} bytes; use a file or a stream instead of bytes")
    }
}

impl std::error::Error for OverBudget {}

/// See the module documentation. Cheap to clone. All clones share one budget.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit: u64,
    usage: Mutex<Usage>,
}

#[derive(Debug, Default)]
struct Usage {
    /// Everything charged.
    in_flight: u64,
    /// The reserved part of it.
    reserved: u64,
    peak: u64,
    /// Reservations that wait for free bytes, in order of arrival.
    waiting: VecDeque<(u64, oneshot::Sender<Charge>)>,
}

impl Budget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self(Arc::new(Shared { limit, usage: Mutex::default() }))
    }

    /// A budget that only counts and never limits.
    #[must_use]
    pub fn unlimited() -> Self {
        Self::new(u64::MAX)
    }

    /// Charges an object of `bytes`. Waits until enough bytes are free, in order of arrival. A drop of the
    /// future removes it from the queue.
    ///
    /// # Errors
    /// At once, when the object is larger than the budget.
    pub async fn reserve(&self, bytes: u64) -> Result<Charge, OverBudget> {
        let limit = self.0.limit;
        if bytes > limit {
            return Err(OverBudget { bytes, limit });
        }
        let admission = {
            let mut usage = self.0.usage();
            if usage.waiting.is_empty() && usage.fits(bytes, limit) {
                return Ok(self.charge(&mut usage, bytes, true));
            }
            let (sender, admission) = oneshot::channel();
            usage.waiting.push_back((bytes, sender));
            admission
        };
        Ok(admission.await.expect("each waiter gets an answer before the budget is dropped"))
    }

    /// Charges a piece of `bytes` that is already in transfer.
    #[must_use]
    pub fn count(&self, bytes: u64) -> Charge {
        self.charge(&mut self.0.usage(), bytes, false)
    }

    /// Bytes charged now.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.0.usage().in_flight
    }

    fn charge(&self, usage: &mut Usage, bytes: u64, reserved: bool) -> Charge {
        usage.in_flight += bytes;
        usage.reserved += if reserved { bytes } else { 0 };
        usage.peak = usage.peak.max(usage.in_flight);
        Charge { budget: self.clone(), bytes, reserved }
    }
}

impl Shared {
    fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Usage {
    fn fits(&self, bytes: u64, limit: u64) -> bool {
        self.reserved == 0 || self.in_flight.saturating_add(bytes) <= limit
    }
}

/// The form that `/status.json` shows.
impl Serialize for Budget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let usage = self.0.usage();
        let mut shown = serializer.serialize_struct("Budget", 3)?;
        shown.serialize_field("in_flight_bytes", &usage.in_flight)?;
        shown.serialize_field("peak_bytes", &usage.peak)?;
        shown.serialize_field("limit_bytes", &self.0.limit)?;
        shown.end()
    }
}

/// Bytes charged to a [`Budget`] until this is dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Budget,
    bytes: u64,
    reserved: bool,
}

impl Charge {
    /// Ties the charge to `bytes`. It ends when the last part of them is dropped.
    #[must_use]
    pub fn tie(self, bytes: impl AsRef<[u8]> + Send + 'static) -> Bytes {
        Bytes::from_owner(Tied { bytes, _charge: self })
    }

    /// The number of bytes charged.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

struct Tied<T> {
    bytes: T,
    _charge: Charge,
}

impl<T: AsRef<[u8]>> AsRef<[u8]> for Tied<T> {
    fn as_ref(&self) -> &[u8] {
        self.bytes.as_ref()
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut admitted = Vec::new();
        {
            let mut usage = self.budget.0.usage();
            usage.in_flight -= self.bytes;
            usage.reserved -= if self.reserved { self.bytes } else { 0 };
            usage.waiting.retain(|(_, sender)| !sender.is_closed());
            while let Some((bytes, _)) = usage.waiting.front() {
                if !usage.fits(*bytes, self.budget.0.limit) {
                    break;
                }
                let (bytes, sender) = usage.waiting.pop_front().expect("the queue has a front");
                admitted.push((sender, self.budget.charge(&mut usage, bytes, true)));
            }
        }
        for (sender, charge) in admitted {
            // If the waiter was dropped, the charge is dropped here, which admits the next waiter.
            drop(sender.send(charge));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::pin,
        task::{Context, Poll, Waker},
    };

    use super::*;

    /// Polls once whether a reservation was admitted.
    fn poll(admission: std::pin::Pin<&mut impl Future<Output = Result<Charge, OverBudget>>>) -> Option<Charge> {
        match admission.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(charge) => Some(charge.expect("it can fit")),
            Poll::Pending => None,
        }
    }

    #[test]
    fn reservations_queue_in_order_and_counts_never_wait() {
        let budget = Budget::new(100);
        let (mut a, mut b, mut c) = (pin!(budget.reserve(60)), pin!(budget.reserve(60)), pin!(budget.reserve(10)));
        let first = poll(a.as_mut()).expect("there is space");
        assert!(poll(b.as_mut()).is_none() && poll(c.as_mut()).is_none(), "reservations are admitted in order");
        let piece = budget.count(50);
        assert_eq!(budget.in_flight(), 110);
        drop(first);
        let second = poll(b.as_mut()).expect("a single object is admitted, whatever the pieces");
        assert!(poll(c.as_mut()).is_none());
        drop(piece);
        let third = poll(c.as_mut()).expect("now it fits");
        assert_eq!(budget.in_flight(), 70);
        drop((second, third));
        assert_eq!(budget.in_flight(), 0);
    }

    #[test]
    fn oversized_reservation_is_refused_immediately() {
        let budget = Budget::new(100);
        let _held = budget.count(100);
        let mut admission = pin!(budget.reserve(101));
        let Poll::Ready(Err(err)) = admission.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("refused")
        };
        assert!(err.to_string().starts_with("101 bytes do not fit into MEMORY_BUDGET, 100 bytes"), "{err}");
    }

    #[test]
    fn cancelled_waiter_does_not_block_the_queue() {
        let budget = Budget::new(100);
        let held = poll(pin!(budget.reserve(100))).expect("there is space");
        let mut after = pin!(budget.reserve(100));
        {
            let mut dropped = pin!(budget.reserve(50));
            assert!(poll(dropped.as_mut()).is_none());
            assert!(poll(after.as_mut()).is_none());
        }
        drop(held);
        assert!(poll(after.as_mut()).is_some());
        assert_eq!(budget.in_flight(), 0);
    }

    #[test]
    fn charge_lasts_until_last_slice_is_dropped() {
        let budget = Budget::new(100);
        let bytes = budget.count(4).tie(vec![1, 2, 3, 4]);
        let part = bytes.slice(1..2);
        drop(bytes);
        assert_eq!((budget.in_flight(), &part[..]), (4, &[2][..]));
        drop(part);
        assert_eq!(budget.in_flight(), 0);
    }
}
