//! Where plugins' threads leave what a loop waits for.
//!
//! To wake a loop from another thread costs a system call and a turn of that loop, also while it is
//! awake. So the loop looks at its desk before it sleeps, and is woken only if it sleeps already.

use std::{
    cell::RefCell,
    mem,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use runner_sdk::abi::Task;
use tokio::sync::{Notify, oneshot};

use super::{ffi::Completion, stuck};

thread_local! {
    static HERE: RefCell<Option<Arc<Desk>>> = const { RefCell::new(None) };
}

/// The desk of one loop: a runtime with one thread.
#[derive(Default)]
pub struct Desk {
    // As many as tasks end between two looks.
    ends: Mutex<Vec<End>>,
    /// The loop sleeps, and nobody has woken it yet.
    asleep: AtomicBool,
    wake: Notify,
}

/// The end of a task, and who waits for it.
pub(super) struct End {
    pub(super) task: Task,
    pub(super) tell: oneshot::Sender<Completion>,
    pub(super) completion: Completion,
}

impl Desk {
    /// The loop is about to sleep: its `on_thread_park`.
    pub fn sleeps(&self) {
        // Before the look: who comes after it sees that the loop sleeps.
        self.asleep.store(true, Ordering::SeqCst);
        self.look();
    }

    /// The loop goes on: its `on_thread_unpark`.
    pub fn awakes(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Serves the loop it runs in. That loop alone may poll it.
    pub async fn serve(self: Arc<Self>) {
        HERE.set(Some(Arc::clone(&self)));
        loop {
            self.wake.notified().await;
            self.look();
        }
    }

    /// The desk of this thread's loop, if it has one. Looks at it: a loop that finds no sleep still begins tasks.
    pub(super) fn here() -> Option<Arc<Self>> {
        let desk = HERE.with_borrow(Clone::clone)?;
        desk.look();
        Some(desk)
    }

    /// Leaves an end for the loop.
    pub(super) fn leave(&self, end: End) {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).push(end);
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.wake.notify_one();
        }
    }

    fn look(&self) {
        let ends = mem::take(&mut *self.ends.lock().unwrap_or_else(PoisonError::into_inner));
        for End { task, tell, completion } in ends {
            if tell.send(completion).is_err() {
                // Given up in the meantime.
                stuck::returned(task);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use futures_util::FutureExt as _;
    use runner_sdk::abi::Status;
    use tokio::runtime::{Builder, Runtime};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn desk() -> (Runtime, Arc<Desk>) {
        let desk = Arc::new(Desk::default());
        let (sleeps, awakes) = (Arc::clone(&desk), Arc::clone(&desk));
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_park(move || sleeps.sleeps())
            .on_thread_unpark(move || awakes.awakes())
            .build()
            .expect("a runtime");
        runtime.spawn(Arc::clone(&desk).serve());
        (runtime, desk)
    }

    fn end() -> (End, oneshot::Receiver<Completion>) {
        let (tell, told) = oneshot::channel();
        let completion = Completion { status: Status::OK, text: String::new(), details: String::new() };
        (End { task: Task(0), tell, completion }, told)
    }

    #[test]
    fn a_loop_that_is_awake_finds_an_end_without_being_woken() {
        let (runtime, desk) = desk();
        runtime.block_on(async {
            tokio::task::yield_now().await; // the desk is served
            let (end, told) = end();
            thread::scope(|scope| scope.spawn(|| desk.leave(end)).join().expect("left"));
            assert_eq!(desk.wake.notified().now_or_never(), None, "nobody was woken");
            let told = tokio::time::timeout(LIMIT, told).await.expect("looked at before the sleep");
            assert_eq!(told.expect("told").status, Status::OK);
        });
    }

    #[test]
    fn a_loop_that_begins_a_task_looks_though_it_finds_no_sleep() {
        let (runtime, desk) = desk();
        runtime.block_on(async {
            tokio::task::yield_now().await;
            let (end, mut told) = end();
            desk.leave(end);
            assert!(told.try_recv().is_err());
            assert!(Desk::here().is_some_and(|here| Arc::ptr_eq(&here, &desk)));
            assert!(told.try_recv().is_ok());
        });
        thread::spawn(|| assert!(Desk::here().is_none(), "another thread")).join().expect("ended");
    }

    #[test]
    fn no_end_is_lost_however_the_loop_sleeps() {
        let (runtime, desk) = desk();
        let (hand, ends) = std::sync::mpsc::channel::<End>();
        let leaves = thread::spawn(move || ends.into_iter().for_each(|end| desk.leave(end)));
        runtime.block_on(async {
            for round in 0..20_000_u32 {
                let (end, told) = end();
                hand.send(end).expect("taken");
                // So that the other thread comes before, in and after the way to sleep.
                (0..round % 64).for_each(|_| std::hint::spin_loop());
                tokio::time::timeout(LIMIT, told).await.expect("not lost").expect("told");
            }
        });
        drop(hand);
        leaves.join().expect("ended");
    }
}
