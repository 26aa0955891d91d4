//! Maps handles to the tasks that run inside plugins.
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

use runner_sdk::abi::Task;

/// A table of running tasks.
pub(super) struct TaskTable<T> {
    slots: RwLock<Slots<T>>,
    stale: AtomicU64,
}

struct Slots<T> {
    entries: Vec<Slot<T>>,
    free: Vec<u32>,
}

struct Slot<T> {
    generation: u32,
    running: Option<Arc<T>>,
}

impl<T> TaskTable<T> {
    pub(super) const fn new() -> Self {
        Self { slots: RwLock::new(Slots { entries: Vec::new(), free: Vec::new() }), stale: AtomicU64::new(0) }
    }

    /// Adds a task and returns its handle, which is never 0.
    pub(super) fn insert(&self, running: Arc<T>) -> Task {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let index = match slots.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(slots.entries.len()).expect("fewer than 2^32 tasks run at once");
                // The keys of each `RandomState` are random.
                let generation = RandomState::new().hash_one(index) as u32;
                slots.entries.push(Slot { generation, running: None });
                index
            }
        };
        let slot = &mut slots.entries[index as usize];
        // Generation 0 is skipped, so that no handle is ever 0.
        slot.generation = slot.generation.wrapping_add(1).max(1);
        slot.running = Some(running);
        Task(u64::from(index) | u64::from(slot.generation) << 32)
    }

    /// Returns the task behind a handle. When there is none, the call is counted as stale.
    pub(super) fn get(&self, task: Task) -> Option<Arc<T>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let found = slots.slot(task).and_then(|slot| slot.running.clone());
        if found.is_none() {
            self.stale.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    /// All tasks at the time of the call.
    pub(super) fn all(&self) -> Vec<Arc<T>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.entries.iter().filter_map(|slot| slot.running.clone()).collect()
    }

    /// Retires a handle.
    pub(super) fn remove(&self, task: Task) -> Option<Arc<T>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let index = (task.0 & u64::from(u32::MAX)) as usize;
        let generation = (task.0 >> 32) as u32;
        let slot = slots.entries.get_mut(index).filter(|slot| slot.generation == generation);
        let running = slot.and_then(|slot| slot.running.take());
        if running.is_some() {
            slots.free.push(index as u32);
        }
        running
    }

    /// Number of calls that named a task which was over or never existed.
    pub(super) fn stale_calls(&self) -> u64 {
        self.stale.load(Ordering::Relaxed)
    }
}

impl<T> Slots<T> {
    fn slot(&self, task: Task) -> Option<&Slot<T>> {
        let index = (task.0 & u64::from(u32::MAX)) as usize;
        let generation = (task.0 >> 32) as u32;
        self.entries.get(index).filter(|slot| slot.generation == generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scanned_handles_find_no_task() {
        let table = TaskTable::new();
        let handles: Vec<Task> = (0..4).map(|task| table.insert(Arc::new(task))).collect();
        for index in 0..4 {
            for generation in 0..1024 {
                assert_eq!(table.get(Task(index | generation << 32)), None);
            }
        }
        assert!(handles.iter().all(|handle| table.get(*handle).is_some()));
    }

    #[test]
    fn handle_names_one_task_only() {
        let table = TaskTable::new();
        let first = table.insert(Arc::new(1));
        assert_eq!(table.get(first).as_deref(), Some(&1));
        assert_eq!(table.remove(first).as_deref(), Some(&1));
        assert_eq!(table.remove(first), None);
        let second = table.insert(Arc::new(2));
        assert_ne!(first, second);
        assert_eq!(table.get(first), None);
        assert_eq!(table.get(Task(0)), None);
        assert_eq!(table.get(Task(u64::MAX)), None);
        assert_eq!(table.get(second).as_deref(), Some(&2));
        assert_eq!(table.stale_calls(), 3);
    }
}
