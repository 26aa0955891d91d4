//! A folder of job files as a [`super::LeaseSource`]: no sign-in, no network, fixed deadlines.
//!
//! `folder` reads and writes the files and applies the rules of claims (docs/protocols/local.md). Start at the
//! [`LeaseSource`] implementation. Several nodes may share a folder on one machine.

mod folder;

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json, value::to_raw_value};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use self::folder::{ClaimAnswer, Claimed, Folder, Found, Outcomes};
pub use self::folder::{Job, TERM_MAX, folders, submit};
use super::{Acknowledged, Admission, LeaseError, LeaseSource, PlaneFacts, PlaneReadiness, Renewal};
use crate::{
    model::{
        AnnouncedData, BootInstant, Capability, DataLocation, Lease, LocalFiles, Outcome, Pending, PlaneName,
        ReportAddress, TaskId, TaskResult, Term,
    },
    node_event::{NodeEvent, NodeEvents},
};

/// How often the folder is scanned while no job waits.
const SCAN_EVERY: Duration = Duration::from_millis(200);
/// How often the node checks that it can write to the folder.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// Why no job is claimed before the first check.
const NOT_CHECKED: &str = "the folder is not checked yet";
/// Number of checks between two searches for abandoned claims.
const CHECKS_PER_SEARCH: u32 = 60;
/// The pause after a claim that could not be written.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// Longest pause between two heartbeats: a heartbeat notices a cancel file and passes progress on.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(1);

/// A folder of jobs.
#[derive(Debug)]
pub struct Config {
    /// The name of this control plane.
    pub name: PlaneName,
    /// The folder. It is created if it does not exist.
    pub folder: PathBuf,
    /// The capabilities that this node serves. Jobs for other capabilities stay in the folder.
    pub capabilities: watch::Receiver<Vec<Capability>>,
    /// Receives the events of the jobs. Used by `invoke`.
    pub observer: Option<mpsc::UnboundedSender<LocalEvent>>,
}

/// An event of a job.
#[derive(Clone, Debug, PartialEq)]
pub enum LocalEvent {
    /// The runner reported progress.
    Progress(Value),
    /// The runner reported an event.
    Event(Value),
    /// The task ended.
    Ended(TaskResult),
}

/// See the module documentation.
pub struct Local {
    facts: PlaneFacts,
    folder: Arc<Folder>,
    capabilities: watch::Receiver<Vec<Capability>>,
    observer: Option<mpsc::UnboundedSender<LocalEvent>>,
    readiness: watch::Sender<PlaneReadiness>,
    events: NodeEvents,
    /// Jobs that a poll returned and this node has not claimed yet.
    offered: Mutex<HashSet<TaskId>>,
    quiet: CancellationToken,
    /// A claim could not be written: the next poll waits before it looks for jobs.
    pause: AtomicBool,
}

impl Local {
    /// Opens the folder and creates its missing parts.
    ///
    /// # Errors
    /// One line when the folder cannot be used.
    pub fn open(config: Config, events: NodeEvents) -> Result<Self, String> {
        let Config { name, folder, capabilities, observer } = config;
        let folder = Folder::open(folder)?;
        let facts = PlaneFacts {
            name,
            base_url: format!("file://{}", folder.path().display()).into(),
            node: "local".into(),
            admission: Admission::LeaseFirst,
            heartbeat_every: Some(HEARTBEAT_EVERY),
        };
        events.board().change_plane(|status| status.plane_error = Some(NOT_CHECKED.to_owned()));
        Ok(Self {
            facts,
            folder: Arc::new(folder),
            capabilities,
            observer,
            readiness: watch::Sender::new(PlaneReadiness::NotReady(NOT_CHECKED.to_owned())),
            events,
            offered: Mutex::default(),
            quiet: CancellationToken::new(),
            pause: AtomicBool::new(false),
        })
    }

    /// Shows whether the node can write to the folder.
    fn set_readiness(&self, now: PlaneReadiness) {
        let before = self.readiness();
        if now == before {
            return;
        }
        let plane = self.facts.name.clone();
        match &now {
            PlaneReadiness::NotReady(error) => {
                self.events.emit(NodeEvent::PlaneNotReady { plane, error: error.clone() });
            }
            PlaneReadiness::Ready if before == PlaneReadiness::NotReady(NOT_CHECKED.to_owned()) => {
                self.events.board().change_plane(|status| status.plane_error = None);
            }
            PlaneReadiness::Ready => self.events.emit(NodeEvent::PlaneReady { plane }),
        }
        self.readiness.send_replace(now);
    }

    /// Runs `work` on the folder, on a thread that may block.
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folder) -> Result<T, String> + Send + 'static,
    ) -> Result<T, LeaseError> {
        let folder = Arc::clone(&self.folder);
        let done = spawn_blocking(move || work(&folder)).await;
        done.unwrap_or_else(|err| Err(err.to_string())).map_err(LeaseError::Unreachable)
    }

    fn offered(&self) -> std::sync::MutexGuard<'_, HashSet<TaskId>> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends an event to the observer, if it still exists.
    fn notify(&self, event: LocalEvent) {
        if let Some(observer) = &self.observer {
            let _ = observer.send(event);
        }
    }

    /// Gives a cancelled job its result, because a cancelled task is not reported.
    async fn end_cancelled(&self, id: &TaskId, claim: Uuid) -> Result<(), LeaseError> {
        let (id, result) = (id.clone(), TaskResult::bare(Outcome::Cancelled));
        if self.on_disk(move |folder| folder.cancel_job(&id, claim, &result, Timestamp::now())).await? {
            self.notify(LocalEvent::Ended(TaskResult::bare(Outcome::Cancelled)));
        }
        Ok(())
    }

    /// The next job that may start, or `None` if there is none now.
    async fn scan(&self) -> Result<Option<Lease>, LeaseError> {
        let served = self.capabilities.borrow().clone();
        let offered = self.offered().clone();
        let found = self.on_disk(move |folder| folder.next(&served, &offered, Timestamp::now())).await?;
        match found {
            None => Ok(None),
            Some(Found { id, job: Ok(job) }) => {
                let claim = Uuid::new_v4();
                self.offered().insert(id.clone());
                Ok(Some(lease(&self.folder, id, claim, job)))
            }
            Some(Found { id, job: Err(reason) }) => {
                // Until it has a result, it must not be found again and again.
                self.offered().insert(id.clone());
                let address = ReportAddress { task: id, at: Uuid::new_v4().to_string().into() };
                Err(LeaseError::Malformed { task: Some(address), reason })
            }
        }
    }
}

/// The claim that this node made, from the address of the task.
fn claim(to: &ReportAddress) -> Result<Uuid, LeaseError> {
    to.at.parse().map_err(|_| LeaseError::Address(to.at.to_string()))
}

fn gone(to: &ReportAddress) -> LeaseError {
    LeaseError::Gone { task: to.task.clone(), status: 410 }
}

fn lease(folder: &Folder, id: TaskId, claim: Uuid, job: Job) -> Lease {
    let Job { capability, inputs, meta, out, term, time_limit } = job;
    let cids: Vec<String> = (0..inputs.len()).map(|number| format!("input-{number}")).collect();
    let task = json!({ "id": id.as_str(), "capability": capability.as_str(), "inputs_cids": cids, "meta": meta });
    let document = to_raw_value(&json!({ "task": task })).expect("JSON values are JSON");
    let files = LocalFiles {
        inputs: inputs.into_iter().map(|path| folder.path().join(path)).collect(),
        out: folder.path().join(out.unwrap_or_else(|| PathBuf::from("out").join(id.as_str()))),
    };
    Lease {
        expires_at: Some(BootInstant::now() + term),
        time_limit,
        inputs: cids,
        data: AnnouncedData::Known(DataLocation::LocalFiles(files)),
        document,
        ..Lease::bare(ReportAddress { task: id, at: claim.to_string().into() }, capability)
    }
}

#[async_trait]
impl LeaseSource for Local {
    fn facts(&self) -> &PlaneFacts {
        &self.facts
    }

    /// Checks the folder again and again: the node must not claim a job whose result it cannot write.
    async fn run(&self, stop: CancellationToken) {
        let mut checks = 0_u32;
        loop {
            let check = self.on_disk(move |folder| {
                folder.check()?;
                if checks == 0 {
                    folder.remove_temporary()?;
                }
                if checks.is_multiple_of(CHECKS_PER_SEARCH) {
                    folder.remove_abandoned(Timestamp::now())?;
                }
                Ok(())
            });
            let checked = tokio::select! {
                () = stop.cancelled() => return,
                checked = check => checked,
            };
            checks = checks.wrapping_add(u32::from(checked.is_ok()));
            self.set_readiness(match checked {
                Ok(()) => PlaneReadiness::Ready,
                Err(err) => PlaneReadiness::NotReady(err.to_string()),
            });
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(CHECK_EVERY) => {}
            }
        }
    }

    fn readiness(&self) -> PlaneReadiness {
        self.readiness.borrow().clone()
    }

    async fn until_ready(&self) -> bool {
        let mut readiness = self.readiness.subscribe();
        readiness.wait_for(|now| *now == PlaneReadiness::Ready).await.is_ok()
    }

    fn quiesce(&self) {
        self.quiet.cancel();
    }

    async fn poll(&self) -> Result<Option<Lease>, LeaseError> {
        loop {
            if self.quiet.is_cancelled() {
                return Ok(None);
            }
            if self.pause.swap(false, Ordering::AcqRel) {
                tokio::select! {
                    () = self.quiet.cancelled() => {}
                    () = tokio::time::sleep(PAUSE_AFTER_FAILURE) => {}
                }
                continue;
            }
            if self.readiness() != PlaneReadiness::Ready {
                tokio::select! {
                    () = self.quiet.cancelled() => {}
                    _ = self.until_ready() => {}
                }
                continue;
            }
            if let Some(lease) = self.scan().await? {
                return Ok(Some(lease));
            }
            tokio::select! {
                () = self.quiet.cancelled() => {}
                () = tokio::time::sleep(SCAN_EVERY) => {}
            }
        }
    }

    async fn acknowledge(&self, lease: &Lease) -> Result<Acknowledged, LeaseError> {
        let to = &lease.address;
        let (claim, left) = (claim(to)?, lease.expires_at.map(BootInstant::left).unwrap_or_default());
        let id = to.task.clone();
        let mut claimed = self.on_disk(move |folder| folder.claim(&id, claim, left, Timestamp::now())).await;
        if let Ok(ClaimAnswer::Cancelled) = claimed {
            claimed = self.end_cancelled(&to.task, claim).await.map(|()| ClaimAnswer::Cancelled);
        }
        self.offered().remove(&to.task);
        match claimed {
            Ok(ClaimAnswer::Ours) => Ok(Acknowledged::Held),
            Ok(ClaimAnswer::Cancelled) => Ok(Acknowledged::Cancelled),
            Ok(ClaimAnswer::Other) => Err(gone(to)),
            // Without a claim another node could run the job too.
            Err(err) => {
                warn!(event = "claim.not_written", task_id = %to.task, error = %err, "claim cannot be written, the job waits");
                self.pause.store(true, Ordering::Release);
                Err(gone(to))
            }
        }
    }

    async fn heartbeat(&self, to: &ReportAddress, beat: &Pending, until: BootInstant) -> Result<Renewal, LeaseError> {
        let (id, claim) = (to.task.clone(), claim(to)?);
        // Asked before the look: the claim may be written while the folder is read.
        let offered = self.offered().contains(&to.task);
        let looked = self.on_disk(move |folder| folder.look_at_claim(&id, claim));
        let Some(looked) = until.before(looked).await else {
            return Err(LeaseError::Unreachable(format!(
                "the folder {} does not answer",
                self.folder.path().display()
            )));
        };
        let (held, cancel) = looked?;
        // Before the claim is made, it cannot be lost.
        if held == Claimed::Other && !offered {
            return Err(gone(to));
        }
        for event in &beat.events {
            self.notify(LocalEvent::Event(event.clone()));
        }
        if beat.progress != json!({}) {
            self.notify(LocalEvent::Progress(beat.progress.clone()));
        }
        if cancel {
            self.end_cancelled(&to.task, claim).await?;
        }
        Ok(Renewal { term: Term::Unchanged, cancel, ..Renewal::default() })
    }

    async fn report(&self, to: &ReportAddress, task_result: &TaskResult) -> Result<(), LeaseError> {
        let (id, claim, result) = (to.task.clone(), claim(to)?, task_result.clone());
        // A task that the node did not finish goes back to the queue.
        let outcome = match task_result.outcome {
            Outcome::Drained => Outcomes::Requeue,
            _ => Outcomes::Done,
        };
        let written = self.on_disk(move |folder| folder.end(&id, claim, &result, outcome, Timestamp::now())).await?;
        match written {
            Claimed::Ours => {
                self.notify(LocalEvent::Ended(task_result.clone()));
                Ok(())
            }
            Claimed::Other => Err(gone(to)),
        }
    }

    async fn reject(&self, to: &ReportAddress, why: &Outcome) -> Result<(), LeaseError> {
        // The file of the job is wrong. Another node would fail too.
        let why = match why.clone() {
            Outcome::Setup { message, .. } => {
                Outcome::Failed { message, retryable: false, invalid_input: true, details: Value::Null }
            }
            other => other,
        };
        let (id, claim, result) = (to.task.clone(), claim(to)?, TaskResult::bare(why));
        let ended = result.clone();
        let written = self.on_disk(move |folder| folder.reject(&id, claim, &result, Timestamp::now())).await?;
        if written == Claimed::Other {
            warn!(event = "job.rejected_elsewhere", task_id = %to.task, "another node ended the job first");
            return Ok(());
        }
        self.notify(LocalEvent::Ended(ended));
        Ok(())
    }
}
