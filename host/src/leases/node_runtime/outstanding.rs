//! The runs that this node has accepted and not settled yet.
//!
//! Their number is bounded: the stream of leases is read only while there is a permit. A run that is leased again
//! takes the new lease id here, and does not start a second time. If its deadline has passed, it is being cancelled. Then
//! the new lease starts the run again after this one has ended.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use super::domain_data::DomainData;
use crate::model::{BootInstant, LeaseHold, TaskId, Token};

/// See the module documentation.
pub(super) struct Outstanding {
    permits: Arc<Semaphore>,
    runs: Arc<Mutex<Runs>>,
}

#[derive(Default)]
struct Runs {
    by_task: HashMap<TaskId, Run>,
    next: u64,
    ended: Arc<Notify>,
}

impl Runs {
    /// Removes a run. If it did not complete, its next lease starts.
    fn remove(&mut self, task: &TaskId, completed: bool) {
        if let Some(run) = self.by_task.remove(task) {
            run.tell_next(if completed { Next::Nothing } else { Next::Start });
            self.ended.notify_one();
        }
    }
}

/// What happens to the lease that waits for the end of its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The run starts again with this lease.
    Start,
    /// The run has completed with this lease, or a newer lease has replaced it.
    Nothing,
}

/// The result of [`Outstanding::adopt`].
pub(super) enum Adopted {
    /// The run is not known.
    Unknown,
    /// The run continues with the lease.
    Continues,
    /// The run is being cancelled. This tells how its end affects the lease.
    AfterEnd(oneshot::Receiver<Next>),
}

struct Run {
    number: u64,
    lease: Arc<str>,
    /// The deadline of its newest lease.
    deadline: Option<BootInstant>,
    /// Another lease has moved the deadline.
    is_moved: bool,
    /// Tells the lease that waits for the end.
    next: Option<oneshot::Sender<Next>>,
    /// Where its data is, with the newest token.
    domain: Option<DomainData>,
    _permit: OwnedSemaphorePermit,
}

impl Run {
    fn tell_next(self, next: Next) {
        // A stopping node no longer waits.
        let _ = self.next.map(|waiting| waiting.send(next));
    }
}

/// Ends a run of [`Outstanding`] when the node needs its lease no more.
struct Guard {
    runs: Weak<Mutex<Runs>>,
    task: TaskId,
    number: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(runs) = self.runs.upgrade() else { return };
        let mut runs = lock(&runs);
        if runs.by_task.get(&self.task).is_some_and(|run| run.number == self.number) {
            runs.remove(&self.task, false);
        }
    }
}

fn lock(runs: &Mutex<Runs>) -> MutexGuard<'_, Runs> {
    runs.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outstanding {
    pub(super) fn new(max: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS))), runs: Arc::default() }
    }

    /// Waits until one more lease may be read.
    pub(super) async fn permit(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.permits).acquire_owned().await.expect("the semaphore is never closed")
    }

    /// How many runs are accepted.
    pub(super) fn count(&self) -> usize {
        lock(&self.runs).by_task.len()
    }

    /// Waits until a run ends, or returns at once if one has ended since the last call.
    pub(super) async fn one_ended(&self) {
        let ended = Arc::clone(&lock(&self.runs).ended);
        ended.notified().await;
    }

    /// Gives a known run a newer lease, with its deadline if that can be used. A token for the same domain server
    /// replaces the old one.
    pub(super) fn adopt(
        &self,
        task: &TaskId,
        lease: &str,
        deadline: Option<BootInstant>,
        domain: impl FnOnce() -> Option<DomainData>,
    ) -> Adopted {
        match lock(&self.runs).by_task.get_mut(task) {
            Some(run) if run.deadline.is_some_and(BootInstant::has_passed) => {
                run.lease = lease.into();
                let (tell, told) = oneshot::channel();
                if let Some(older) = run.next.replace(tell) {
                    let _ = older.send(Next::Nothing);
                }
                Adopted::AfterEnd(told)
            }
            Some(run) => {
                run.lease = lease.into();
                if let Some(deadline) = deadline {
                    (run.deadline, run.is_moved) = (Some(deadline), true);
                }
                if let Some(old) = &mut run.domain
                    && let Some(new) = domain()
                    && new.at == old.at
                {
                    old.token = new.token;
                }
                Adopted::Continues
            }
            None => Adopted::Unknown,
        }
    }

    /// Adds a run. It ends when the returned guard is dropped, or with [`Self::settled`].
    pub(super) fn add(
        &self,
        task: &TaskId,
        lease: &str,
        deadline: Option<BootInstant>,
        domain: Option<DomainData>,
        permit: OwnedSemaphorePermit,
    ) -> LeaseHold {
        let mut runs = lock(&self.runs);
        let number = runs.next;
        runs.next += 1;
        let lease = lease.into();
        let run = Run { number, lease, deadline, is_moved: false, next: None, domain, _permit: permit };
        runs.by_task.insert(task.clone(), run);
        LeaseHold::new(Guard { runs: Arc::downgrade(&self.runs), task: task.clone(), number })
    }

    /// The newest lease of a run.
    pub(super) fn lease_of(&self, task: &TaskId) -> Option<Arc<str>> {
        lock(&self.runs).by_task.get(task).map(|run| Arc::clone(&run.lease))
    }

    /// The deadline of a run, if another lease has moved it.
    pub(super) fn moved_deadline_of(&self, task: &TaskId) -> Option<BootInstant> {
        lock(&self.runs).by_task.get(task).filter(|run| run.is_moved)?.deadline
    }

    /// Whether another lease starts the run again after its end.
    pub(super) fn starts_again(&self, task: &TaskId) -> bool {
        lock(&self.runs).by_task.get(task).and_then(|run| run.next.as_ref()).is_some_and(|next| !next.is_closed())
    }

    /// The newest token of a run for its domain server.
    pub(super) fn token_of(&self, task: &TaskId) -> Option<Token> {
        Some(lock(&self.runs).by_task.get(task)?.domain.as_ref()?.token.clone())
    }

    /// Ends a run: the control plane has answered its report.
    pub(super) fn settled(&self, task: &TaskId, completed: bool) {
        lock(&self.runs).remove(task, completed);
    }
}

#[cfg(test)]
mod tests {
    use url::Url;
    use uuid::Uuid;

    use super::*;
    use crate::model::Coordinates;

    #[tokio::test]
    async fn only_the_same_domain_server_gets_a_new_token() {
        let (outstanding, task) = (Outstanding::new(1), TaskId::parse("run").expect("an id"));
        let data = |server: &str, domain, token: &str| {
            let at = Coordinates { server: Url::parse(server).expect("a URL"), domain };
            Some(DomainData { at, token: Token::new(token) })
        };
        let _hold = outstanding.add(
            &task,
            "a",
            None,
            data("https://ds.test", Uuid::nil(), "first"),
            outstanding.permit().await,
        );
        for (newer, expected) in [
            (None, "first"),
            (data("https://other.test", Uuid::nil(), "second"), "first"),
            (data("https://ds.test", Uuid::max(), "third"), "first"),
            (data("https://ds.test", Uuid::nil(), "fourth"), "fourth"),
        ] {
            assert!(matches!(outstanding.adopt(&task, "b", None, || newer), Adopted::Continues));
            assert_eq!(outstanding.token_of(&task), Some(Token::new(expected)));
        }
    }

    #[tokio::test]
    async fn guard_ends_only_its_own_run() {
        let (outstanding, task) = (Outstanding::new(2), TaskId::parse("run").expect("an id"));
        let first = outstanding.add(&task, "a", None, None, outstanding.permit().await);
        assert!(matches!(outstanding.adopt(&task, "b", None, || None), Adopted::Continues));
        assert_eq!((outstanding.lease_of(&task).as_deref(), outstanding.count()), (Some("b"), 1));
        outstanding.settled(&task, true);
        let second = outstanding.add(&task, "c", None, None, outstanding.permit().await);
        drop(first);
        assert_eq!((outstanding.lease_of(&task).as_deref(), outstanding.count()), (Some("c"), 1));
        drop(second);
        assert!(matches!(outstanding.adopt(&task, "d", None, || None), Adopted::Unknown));
        assert_eq!(outstanding.count(), 0);
    }
    #[tokio::test]
    async fn lease_of_a_late_run_waits_for_its_end() {
        let (outstanding, task) = (Outstanding::new(2), TaskId::parse("run").expect("an id"));
        for completed in [true, false] {
            let hold = outstanding.add(&task, "a", Some(BootInstant::now()), None, outstanding.permit().await);
            let wait = |lease| match outstanding.adopt(&task, lease, None, || None) {
                Adopted::AfterEnd(next) => next,
                _ => panic!("its deadline has passed"),
            };
            let (older, newer) = (wait("b"), wait("c"));
            assert_eq!(older.await, Ok(Next::Nothing), "a newer lease has replaced it");
            assert_eq!((outstanding.lease_of(&task).as_deref(), outstanding.starts_again(&task)), (Some("c"), true));
            if completed {
                outstanding.settled(&task, true);
            }
            drop(hold);
            assert_eq!(newer.await, Ok(if completed { Next::Nothing } else { Next::Start }));
        }
        let _hold = outstanding.add(&task, "a", Some(BootInstant::now()), None, outstanding.permit().await);
        drop(outstanding.adopt(&task, "b", None, || None));
        assert!(!outstanding.starts_again(&task), "nobody waits: the node stops");
    }
}
