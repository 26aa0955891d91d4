//! Pauses after runs that had no runner on this node. Schedulers that prefer the node with the least work would send all
//! runs to this node, where they fail at once.

use std::time::Duration;

use tokio::{sync::watch, time::sleep};

use crate::model::{Backoff, Outcome};

/// After this many runs in a row without a runner, the node takes no runs for a while.
const RUNS: u32 = 3;

/// See the module documentation.
pub(super) struct NoRunnerPauses {
    /// A run that has a runner ends their growth.
    pauses: Backoff,
    /// Runs in a row that had no runner.
    in_a_row: watch::Sender<u32>,
    paused: watch::Sender<bool>,
}

impl NoRunnerPauses {
    pub(super) fn new(pauses: Backoff) -> Self {
        Self { pauses, in_a_row: watch::Sender::default(), paused: watch::Sender::default() }
    }

    /// Notes the end of a run.
    pub(super) fn note(&self, outcome: &Outcome) {
        self.in_a_row.send_if_modified(|runs| {
            let next = if matches!(outcome, Outcome::NoRunner) { runs.saturating_add(1) } else { 0 };
            next != std::mem::replace(runs, next)
        });
    }

    /// Whether the node takes no runs. It tells when that changes.
    pub(super) fn paused(&self) -> watch::Receiver<bool> {
        self.paused.subscribe()
    }

    /// Begins and ends pauses. Calls `begun` with the number of runs and the pause, and `ended`.
    pub(super) async fn keep(&self, begun: impl Fn(u32, Duration), ended: impl Fn()) {
        let (mut in_a_row, mut pauses) = (self.in_a_row.subscribe(), 0);
        while in_a_row.changed().await.is_ok() {
            let runs = *in_a_row.borrow_and_update();
            if runs < RUNS {
                pauses = 0;
                continue;
            }
            pauses += 1;
            let pause = self.pauses.pause(pauses, rand::random());
            begun(runs, pause);
            self.paused.send_replace(true);
            sleep(pause).await;
            // Runs that were accepted before the pause tell nothing new, unless one had a runner.
            if *in_a_row.borrow_and_update() < RUNS {
                pauses = 0;
            }
            self.paused.send_replace(false);
            ended();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::model::Jitter;

    const MS: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn runs_without_runner_pause_longer_each_time() {
        let backoff = Backoff::new(20 * MS, 600 * MS, Jitter::From(20 * MS));
        let (pauses, begun) = (NoRunnerPauses::new(backoff), RefCell::new(Vec::new()));
        let mut paused = pauses.paused();
        let keep = pauses.keep(|runs, pause| begun.borrow_mut().push((runs, pause)), || {});
        let runs = async {
            let mut run = async |outcome: Outcome, pauses_now| {
                pauses.note(&outcome);
                tokio::task::yield_now().await;
                assert_eq!(*paused.borrow_and_update(), pauses_now);
                paused.wait_for(|paused| !*paused).await.expect("it lives");
            };
            run(Outcome::NoRunner, false).await;
            run(Outcome::NoRunner, false).await;
            run(Outcome::Completed, false).await;
            run(Outcome::NoRunner, false).await;
            run(Outcome::NoRunner, false).await;
            run(Outcome::NoRunner, true).await;
            run(Outcome::NoRunner, true).await;
            run(Outcome::Completed, false).await;
            run(Outcome::NoRunner, false).await;
        };
        tokio::select! {
            biased;
            () = keep => unreachable!("it never ends"),
            () = runs => {}
        }
        let begun = begun.into_inner();
        assert_eq!(begun.iter().map(|(runs, _)| *runs).collect::<Vec<_>>(), [3, 4]);
        assert!(begun[0].1 == 20 * MS && (20 * MS..=40 * MS).contains(&begun[1].1), "{begun:?}");
    }
}
