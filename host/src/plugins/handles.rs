//! Maps numbers that plugins hold to what they name: tasks and instances.
//!
//! A handle is an index and a generation. A plugin may keep a handle after the end of the task, or use a number
//! that is no handle. In both cases the lookup finds nothing and the call is answered `STALE`. Generations start at
//! a random number. Thus a plugin that tries small numbers finds no task of another plugin.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// A table of live things.
pub(super) struct HandleTable<T> {
    slots: RwLock<Slots<T>>,
    stale: AtomicU64,
}

struct Slots<T> {
    entries: Vec<Slot<T>>,
    free: Vec<u32>,
}

struct Slot<T> {
    generation: u32,
    live: Option<Arc<T>>,
}

impl<T> HandleTable<T> {
    pub(super) const fn new() -> Self {
        Self { slots: RwLock::new(Slots { entries: Vec::new(), free: Vec::new() }), stale: AtomicU64::new(0) }
    }

    /// Adds `live` and returns its handle, which is never 0.
    pub(super) fn insert(&self, live: Arc<T>) -> u64 {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let index = match slots.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(slots.entries.len()).expect("fewer than 2^32 are live at once");
                // The keys of each `RandomState` are random.
                let generation = RandomState::new().hash_one(index) as u32;
                slots.entries.push(Slot { generation, live: None });
                index
            }
        };
        let slot = &mut slots.entries[index as usize];
        // Generation 0 is skipped, so that no handle is ever 0.
        slot.generation = slot.generation.wrapping_add(1).max(1);
        slot.live = Some(live);
        u64::from(index) | u64::from(slot.generation) << 32
    }

    /// Returns what a handle names. When there is none, the call is counted as stale.
    pub(super) fn get(&self, handle: u64) -> Option<Arc<T>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let found = slots.slot(handle).and_then(|slot| slot.live.clone());
        if found.is_none() {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    /// Retires a handle. When it names nothing, the call is counted as stale.
    pub(super) fn take(&self, handle: u64) -> Option<Arc<T>> {
        let taken = self.remove(handle);
        if taken.is_none() {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// Everything live at the time of the call.
    pub(super) fn all(&self) -> Vec<Arc<T>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.entries.iter().filter_map(|slot| slot.live.clone()).collect()
    }

    /// Retires a handle.
    pub(super) fn remove(&self, handle: u64) -> Option<Arc<T>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let index = (handle & u64::from(u32::MAX)) as usize;
        let generation = (handle >> 32) as u32;
        let slot = slots.entries.get_mut(index).filter(|slot| slot.generation == generation);
        let live = slot.and_then(|slot| slot.live.take());
        if live.is_some() {
            slots.free.push(index as u32);
        }
        live
    }

    /// Number of lookups that found nothing.
    pub(super) fn stale_calls(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }
}

impl<T> Slots<T> {
    fn slot(&self, handle: u64) -> Option<&Slot<T>> {
        let index = (handle & u64::from(u32::MAX)) as usize;
        let generation = (handle >> 32) as u32;
        self.entries.get(index).filter(|slot| slot.generation == generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scanned_handles_find_nothing() {
        let table = HandleTable::new();
        let handles: Vec<u64> = (0..4).map(|task| table.insert(Arc::new(task))).collect();
        for index in 0..4 {
            for generation in 0..1024 {
                assert_eq!(table.get(index | generation << 32), None);
            }
        }
        assert!(handles.iter().all(|handle| table.get(*handle).is_some()));
    }

    #[test]
    fn handle_names_one_thing_only() {
        let table = HandleTable::new();
        let first = table.insert(Arc::new(1));
        assert_eq!(table.get(first).as_deref(), Some(&1));
        assert_eq!(table.remove(first).as_deref(), Some(&1));
        assert_eq!(table.remove(first), None);
        let second = table.insert(Arc::new(2));
        assert_ne!(first, second);
        assert_eq!(table.get(first), None);
        assert_eq!(table.get(0), None);
        assert_eq!(table.get(u64::MAX), None);
        assert_eq!(table.get(second).as_deref(), Some(&2));
        assert_eq!(table.stale_calls(), 3);
    }
}
