//! The path of one task.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span, warn};

use super::Rooms;
use crate::{
    model::{CancelReason, Grant, Outcome, Ports, Setup, Verdict, millis},
    plugins::{Folder, Job},
    session::{Session, Settled},
    storage::TaskDir,
};

/// One task, top to bottom. Every early exit still settles the lease and frees the slot.
pub(super) async fn attempt(
    rooms: Arc<Rooms>,
    permit: OwnedSemaphorePermit,
    session: Session,
    grace: Duration,
    cancel_all: CancellationToken,
) {
    let grant = session.grant(); // the task, a token, cancel, a place to report progress
    let lease = &grant.lease;
    let span = info_span!(
        "task",
        task_id = %lease.task,
        job_id = lease.job.map(tracing::field::display),
        capability = %lease.capability,
        domain_id = lease.domain_id.map(tracing::field::display),
    );
    async {
        let began = std::time::Instant::now();
        info!("task started");
        let run = AssertUnwindSafe(run(Arc::clone(&rooms), grant.clone(), grace)).catch_unwind();
        let ended = async {
            run.await.unwrap_or_else(|_| {
                // A bug of ours must not leave a lease unsettled; the log has its words.
                let message = "the node failed while it ran the task; see its log".to_owned();
                Verdict { outcome: Outcome::HostFault { message }, artifacts: Vec::new() }
            })
        };
        let verdict = run_to_end(ended, &grant, cancel_all).await;
        rooms.board.moved(grant.lease.task, "reporting");
        let settled = session.settle(&verdict).await;
        drop(permit); // the slot is free
        rooms.board.ended(grant.lease.task, &verdict.outcome, !matches!(settled, Settled::GivenUp(_)));
        say(&verdict, &settled, began.elapsed());
    }
    .instrument(span)
    .await;
}

/// Lets `run` come to its end, passing on the node's own wish to stop.
async fn run_to_end(run: impl Future<Output = Verdict>, grant: &Grant, cancel_all: CancellationToken) -> Verdict {
    tokio::pin!(run);
    tokio::select! {
        verdict = &mut run => return verdict,
        () = cancel_all.cancelled() => grant.cancel.cancel(CancelReason::Drained),
    }
    run.await
}

/// Waits for the runner. What may take long, such as moving data, happens on the workers: this runs
/// beside the heartbeats.
async fn run(rooms: Arc<Rooms>, grant: Grant, grace: Duration) -> Verdict {
    let nothing = |outcome| Verdict { outcome, artifacts: Vec::new() };
    if let Some(refusal) = rooms.plugins.refusal(&grant.lease.capability) {
        return nothing(refusal);
    }
    // A lease without coordinates may still get them with its set-up heartbeat. All others start at
    // once; their first input, output or token call waits for the heartbeat's answer.
    if (grant.lease.domain_id.is_none() || grant.lease.domain_server.is_none())
        && let Err(outcome) = setup(&grant).await
    {
        return nothing(outcome);
    }
    let dir = rooms.storage.task_dir(grant.lease.task); // made when somebody needs it
    let ports = rooms.storage.ports(&grant, dir.path()); // nothing is fetched before the runner asks
    rooms.board.moved(grant.lease.task, "waiting");
    let (board, task) = (rooms.board.clone(), grant.lease.task);
    let job = Job {
        grant: grant.clone(),
        ports: Arc::clone(&ports) as Arc<dyn Ports>,
        folder: folder(&dir),
        workers: rooms.workers.clone(),
        cancel_grace: grace,
        began: Box::new(move || board.moved(task, "running")),
    };
    let outcome = rooms.plugins.run(job).await;
    ports.close().await; // ends or aborts what is still under way
    let artifacts = ports.published();
    if !dir.close_empty() {
        match rooms.workers.spawn_blocking(move || dir.close()).await {
            Ok(Ok(())) => {}
            Ok(Err(err)) => warn!(error = %err, "task directory could not be removed"),
            Err(err) => warn!(error = %err, "task directory could not be removed"),
        }
    }
    Verdict { outcome: refused_setup(&grant, outcome), artifacts }
}

/// The task's directory as plugins ask for it.
fn folder(dir: &TaskDir) -> Folder {
    let (path, dir) = (dir.path().to_owned(), dir.clone());
    Folder { path, make: Arc::new(move || dir.make().map_err(|err| err.to_string())) }
}

/// Waits for the set-up heartbeat and says what is missing.
async fn setup(grant: &Grant) -> Result<(), Outcome> {
    match grant.setup().await {
        Setup::Ready(Ok(_)) => Ok(()),
        Setup::Ready(Err(message)) => Err(Outcome::Setup { stage: "build_ports", message }),
        Setup::Refused(message) => Err(match grant.cancel.reason() {
            Some(CancelReason::Plane | CancelReason::Operator) => Outcome::Cancelled,
            Some(CancelReason::LeaseLost) => Outcome::LeaseLost,
            Some(CancelReason::Drained) => Outcome::Drained,
            None => Outcome::Setup { stage: "initial_heartbeat", message },
        }),
        Setup::Pending => unreachable!("setup() waits until it is not pending"),
    }
}

/// A runner that failed because the lease was never set up is not to blame.
fn refused_setup(grant: &Grant, outcome: Outcome) -> Outcome {
    if !matches!(outcome, Outcome::Failed { .. } | Outcome::Storage { .. }) {
        return outcome;
    }
    match grant.setup_now() {
        Setup::Refused(message) => Outcome::Setup { stage: "initial_heartbeat", message },
        Setup::Ready(Err(message)) => Outcome::Setup { stage: "build_ports", message },
        Setup::Ready(Ok(_)) | Setup::Pending => outcome,
    }
}

/// The one line a task ends with.
fn say(verdict: &Verdict, settled: &Settled, took: Duration) {
    let outcome = verdict.outcome.word();
    let (artifacts, elapsed_ms) = (verdict.artifacts.len(), millis(took));
    let reason = verdict.outcome.reason();
    match settled {
        Settled::Accepted if reason.is_none() => info!(outcome, artifacts, elapsed_ms, "task ended"),
        Settled::Accepted => warn!(outcome, artifacts, elapsed_ms, reason, "task ended"),
        Settled::NotSent(_) => info!(outcome, elapsed_ms, "task ended, nothing to report"),
        Settled::Refused(why) => {
            warn!(outcome, artifacts, elapsed_ms, reason, error = %why, "task ended, its report was refused for good")
        }
        Settled::GivenUp(why) => {
            warn!(outcome, artifacts, elapsed_ms, reason, error = %why, "task ended, its report could not be delivered")
        }
    }
}
