//! The slots of the node, shared by its control planes.
//!
//! A free slot goes to the waiting control plane that uses the fewest slots. Of two that use as many, the one whose
//! last turn is longer ago gets it. The slots of a floor are kept free for their control plane.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// See the module documentation. Cheap to clone.
#[derive(Clone)]
pub(super) struct Slots(Arc<Mutex<State>>);

struct State {
    slots: usize,
    /// How many slots were given so far.
    turns: u64,
    planes: Vec<Share>,
}

/// The slots of one control plane, by its index.
#[derive(Default)]
struct Share {
    /// Kept free for it.
    floor: usize,
    /// Used by its tasks and polls.
    used: usize,
    /// How many of them may be used by other control planes too.
    lent: usize,
    /// When it got its last slot.
    turn: u64,
    waiters: VecDeque<oneshot::Sender<Permit>>,
}

/// One slot. It is free again when this is dropped.
pub(super) struct Permit {
    slots: Slots,
    plane: usize,
    lent: bool,
}

impl Slots {
    /// Slots for as many control planes as there are `floors`.
    pub(super) fn new(slots: usize, floors: impl IntoIterator<Item = usize>) -> Self {
        let planes = floors.into_iter().map(|floor| Share { floor, ..Share::default() }).collect();
        Self(Arc::new(Mutex::new(State { slots, turns: 0, planes })))
    }

    /// Asks for a slot for the control plane of this index. Drop the receiver to withdraw the request.
    pub(super) fn ask(&self, plane: usize) -> oneshot::Receiver<Permit> {
        let (sender, receiver) = oneshot::channel();
        self.lock().planes[plane].waiters.push_back(sender);
        self.give();
        receiver
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the free slots to those who wait.
    fn give(&self) {
        loop {
            let Some((plane, waiter)) = self.lock().next() else { return };
            let permit = Permit { slots: self.clone(), plane, lent: false };
            // A waiter that has gone gives its permit back. The lock is not held here.
            drop(waiter.send(permit));
        }
    }
}

impl State {
    /// The next one to get a slot.
    fn next(&mut self) -> Option<(usize, oneshot::Sender<Permit>)> {
        for share in &mut self.planes {
            while share.waiters.front().is_some_and(oneshot::Sender::is_closed) {
                share.waiters.pop_front();
            }
        }
        let waiting = self.planes.iter().enumerate().filter(|(_, share)| !share.waiters.is_empty());
        let entitled = waiting.filter(|(plane, _)| self.has_room(*plane));
        let (plane, _) = entitled.min_by_key(|(_, share)| (share.used, share.turn))?;
        self.turns += 1;
        let share = &mut self.planes[plane];
        (share.used, share.turn) = (share.used + 1, self.turns);
        Some((plane, share.waiters.pop_front()?))
    }

    /// Whether this control plane may use one more slot.
    fn has_room(&self, plane: usize) -> bool {
        let others = self.planes.iter().enumerate().filter(|(other, _)| *other != plane).map(|(_, share)| share);
        let others: usize = others.map(|share| (share.used - share.lent).max(share.floor)).sum();
        self.planes[plane].used + others < self.slots
    }
}

impl Permit {
    /// Lets the other control planes use this slot too.
    pub(super) fn lend(&mut self) {
        if !self.lent {
            self.lent = true;
            self.slots.lock().planes[self.plane].lent += 1;
            self.slots.give();
        }
    }

    /// Ends the loan. `None`: another control plane uses the slot.
    pub(super) fn take_back(mut self) -> Option<Self> {
        if self.lent {
            let mut state = self.slots.lock();
            let share = &mut state.planes[self.plane];
            share.used -= 1;
            let fits = state.has_room(self.plane);
            let share = &mut state.planes[self.plane];
            share.used += 1;
            if !fits {
                return None;
            }
            share.lent -= 1;
            drop(state);
            self.lent = false;
        }
        Some(self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        let share = &mut state.planes[self.plane];
        share.used -= 1;
        share.lent -= usize::from(self.lent);
        drop(state);
        self.slots.give();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(request: &mut oneshot::Receiver<Permit>) -> Option<Permit> {
        request.try_recv().ok()
    }

    fn take(slots: &Slots, plane: usize) -> Permit {
        granted(&mut slots.ask(plane)).expect("a free slot")
    }

    #[test]
    fn waiting_planes_take_turns() {
        let slots = Slots::new(1, [0, 0]);
        let mut held = Some(take(&slots, 0));
        let mut waiting = [slots.ask(0), slots.ask(1)];
        let mut order = Vec::new();
        for _ in 0..6 {
            drop(held.take());
            let plane = waiting.iter_mut().position(|request| {
                held = granted(request);
                held.is_some()
            });
            let plane = plane.expect("one of them gets the slot");
            order.push(plane);
            waiting[plane] = slots.ask(plane);
        }
        assert_eq!(order, [1, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn plane_with_fewest_slots_is_next() {
        let slots = Slots::new(4, [0, 0]);
        let mut held: Vec<_> = (0..4).map(|_| take(&slots, 0)).collect();
        let mut waiting: Vec<_> = [0, 1, 1, 1].map(|plane| slots.ask(plane)).into();
        held.truncate(1);
        let permits: Vec<_> = waiting.iter_mut().map(granted).collect();
        let got: Vec<_> = permits.iter().map(Option::is_some).collect();
        assert_eq!(got, [true, true, true, false], "each has two");
    }

    #[test]
    fn floor_is_kept_free_for_its_plane() {
        let slots = Slots::new(3, [0, 2]);
        let first = take(&slots, 0);
        let mut second = slots.ask(0);
        assert!(granted(&mut second).is_none());
        let reserved = [take(&slots, 1), take(&slots, 1)];
        let mut third = slots.ask(1);
        assert!(granted(&mut third).is_none());
        drop(reserved);
        let third = granted(&mut third).expect("its own slot");
        assert!(granted(&mut second).is_none());
        drop(first);
        assert!(granted(&mut second).is_some());
        drop(third);
    }

    #[test]
    fn withdrawn_request_gets_no_slot() {
        let slots = Slots::new(1, [0, 0]);
        let held = take(&slots, 0);
        let (withdrawn, mut waits) = (slots.ask(1), slots.ask(0));
        drop(withdrawn);
        drop(held);
        drop(granted(&mut waits).expect("the slot"));
        // A granted request that nobody took gives its slot back too.
        drop(slots.ask(0));
        drop(take(&slots, 1));
    }

    #[test]
    fn lent_slot_serves_another_plane_once() {
        let slots = Slots::new(1, [0, 0]);
        let mut polls = take(&slots, 0);
        let mut other = slots.ask(1);
        assert!(granted(&mut other).is_none());
        polls.lend();
        let other = granted(&mut other).expect("the lent slot");
        assert!(granted(&mut slots.ask(0)).is_none(), "it lends to others only");
        assert!(granted(&mut slots.ask(1)).is_none(), "it is used already");
        assert!(polls.take_back().is_none());
        assert!(granted(&mut slots.ask(0)).is_none());
        drop(other);
        let mut polls = take(&slots, 0);
        polls.lend();
        let kept = polls.take_back().expect("nobody uses it");
        assert!(granted(&mut slots.ask(1)).is_none());
        drop(kept);
        drop(take(&slots, 1));
    }

    #[test]
    fn lent_slots_of_a_floor_stay_reserved() {
        let slots = Slots::new(2, [1, 0]);
        let mut polls = take(&slots, 0);
        polls.lend();
        let _first = take(&slots, 1);
        assert!(granted(&mut slots.ask(1)).is_none());
        assert!(polls.take_back().is_some());
    }
}
