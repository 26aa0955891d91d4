//! Reports of ended tasks, kept on disk until the control plane has them.
//!
//! A report passes three steps:
//!
//! 1. [`Outbox::deliver`] writes it to the disk. From then on the report survives this process, and its slot may serve
//!    the next task.
//! 2. [`Outbox::deliver`] also sends it for the first time, on behalf of the attempt that made it.
//! 3. After a failure the report waits. [`Outbox::run`] sends it again, the oldest first, until the control plane
//!    accepts it or refuses it permanently. Outages, restarts and new tokens do not end this.
//!
//! A report that is accepted before it was written is never written. An expired lease does not stop a report: the
//! control plane decides whether it still counts. A report goes only to the control plane that gave the task, and
//! only from the node that ran it.
//!
//! `delivery` writes and sends a new report. `queue` decides which report is sent next. `writer` and `store` own the file, `state` owns the folder.
//! `offline` is the outbox of a node that does not run. The pages show a summary from the status board.

mod delivery;
mod entry;
mod offline;
mod queue;
mod row;
mod sending;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, join_all},
    stream::FuturesUnordered,
};
use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::{
    delivery::{NewReport, Stops},
    entry::{ImportedReports, Listing, ListingState},
    offline::{OfflineOutbox, OfflineOutboxError},
    state::{StateDir, StateError},
};
use self::{
    entry::Entry,
    queue::{Amount, Gone, NextReport, ReportQueue},
    sending::{Sender, Try},
    store::Change,
    writer::{Unwritten, Writer, WriterEvent},
};
use crate::{
    leases::LeaseSource,
    model::{LeaseKeeper, OutboxStatus, PlaneName, TaskId},
    node_event::{NodeEvent, NodeEvents},
};

/// Most failures in the last rounds. Without this limit, a shutdown with an unreachable control plane would send
/// a request for each report.
const LAST_FAILURES_MAX: u32 = 3;

/// The highest limit of reports that may be configured.
pub const REPORTS_MAX: usize = 1_000_000;

/// The settings of an operator.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder of the reports that are not accepted yet. One node uses it at a time.
    pub state_dir: PathBuf,
    /// At this number of reports of one control plane that are not accepted yet, nothing new is leased from it.
    pub max: usize,
    /// The same for their size in memory.
    pub bytes_max: u64,
}

impl Default for Options {
    /// Without a folder, because its place depends on the environment.
    fn default() -> Self {
        Self { state_dir: PathBuf::new(), max: 1000, bytes_max: 256 * 1024 * 1024 }
    }
}

/// The owner of the reports, and their limits.
pub struct Config {
    /// The folder of the reports.
    pub state: StateDir,
    /// The control planes of this node. Reports for others are kept and not sent.
    pub planes: Vec<Arc<dyn LeaseSource>>,
    /// At this number of reports of one control plane that are not accepted yet, nothing new is leased from it. Above 0.
    pub max: usize,
    /// The same for their size in memory. Above 0.
    pub bytes_max: u64,
    /// Most concurrent first tries for each control plane. Further reports wait in the queue like failed ones.
    pub senders: usize,
}

/// See the module documentation. Cheap to clone.
#[derive(Clone)]
pub struct Outbox(Arc<Inner>);

struct Inner {
    planes: Vec<Arc<dyn LeaseSource>>,
    /// The limit for each control plane.
    limit: Amount,
    events: NodeEvents,
    writer: Writer,
    /// For each control plane of this node: one that does not answer takes no permit of another one.
    senders: BTreeMap<PlaneName, Semaphore>,
    queue: Arc<Mutex<QueueState>>,
    /// Notified when there may be a report to send.
    report_due: Notify,
    /// Notified when the outbox accepts new tasks again.
    room: Arc<Notify>,
    /// Notified when the state folder was created again.
    moved: Arc<Notify>,
    state: Arc<StateDir>,
}

impl Inner {
    /// Whether this node sends the report. The file may also hold reports of another node or control plane.
    fn is_ours(&self, entry: &Entry) -> bool {
        source_of(&self.planes, entry).is_some()
    }
}

/// The control plane that takes the report: same name, base URL and node. `None`: the report is foreign.
fn source_of<'a>(planes: &'a [Arc<dyn LeaseSource>], entry: &Entry) -> Option<&'a Arc<dyn LeaseSource>> {
    planes.iter().find(|source| {
        let facts = source.facts();
        let base_url = facts.base_url.trim_end_matches('/');
        entry.plane == facts.name && *entry.base_url == *base_url && entry.node == facts.node
    })
}

/// The queue, and its summary on the status board.
#[derive(Default)]
struct QueueState {
    queue: ReportQueue,
    shown: OutboxStatus,
    /// The log says that leasing is paused.
    paused: bool,
}

/// The result of a try to send a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The control plane accepted it.
    Accepted,
    /// The control plane refused it permanently. The text is the reason, in one line.
    Refused(String),
    /// It waits in the outbox. The text is the failure, in one line.
    Waiting(String),
    /// An operator dropped it during the try.
    Dropped,
}

/// Tries of the outbox that have no answer yet. A try that is dropped is repeated, so the control plane may get its
/// report twice.
#[derive(Default)]
pub struct UnansweredTries(FuturesUnordered<UnansweredTry>);

/// A try, and the control plane that has not answered it.
struct UnansweredTry(PlaneName, BoxFuture<'static, Option<Sent>>);

impl Future for UnansweredTry {
    type Output = Option<Sent>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.1.poll_unpin(cx)
    }
}

impl UnansweredTries {
    fn begin(&mut self, outbox: &Outbox, number: u64) {
        let begun = Try::begin(outbox, number, Sender::Outbox);
        self.0.extend(begun.map(|one| UnansweredTry(one.plane().clone(), one.run().boxed())));
    }

    /// The tries of each control plane.
    fn by_plane(self) -> BTreeMap<PlaneName, Self> {
        let mut by_plane: BTreeMap<_, Self> = BTreeMap::new();
        for one in self.0 {
            by_plane.entry(one.0.clone()).or_default().0.push(one);
        }
        by_plane
    }
}

/// The reports that remain when an outbox ends.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// Reports of this node that the control plane has not accepted.
    pub reports: usize,
    /// How many of them the next start finds on the disk.
    pub kept: usize,
    /// Why some changes are not on the disk, in one line.
    pub unwritten: Option<String>,
    /// The tasks whose reports are not on the disk. These reports end with this process.
    pub lost: Vec<TaskId>,
}

impl Outbox {
    /// Opens the file in the state folder and reads the reports of earlier runs. Nothing is sent yet.
    ///
    /// # Errors
    /// When the folder cannot be used. An unreadable file is no error: it is set aside.
    pub fn open(config: Config, events: NodeEvents) -> Result<Self, StateError> {
        let state = Arc::new(config.state);
        let folder = state.path().to_owned();
        let (store, rows) = store::open_or_set_aside(&folder)?;
        let mut queue = ReportQueue::default();
        for (number, bytes) in &rows {
            match Entry::decode(bytes) {
                Ok((entry, tries)) => {
                    let ours = source_of(&config.planes, &entry).is_some();
                    queue.found(*number, entry, tries, ours, Instant::now());
                }
                Err(err) => {
                    queue.skip(*number);
                    warn!(event = "outbox.report_unreadable", number, error = %err, "a report in the outbox cannot be read, it is kept and not sent");
                }
            }
        }
        if queue.ours() > 0 {
            info!(event = "outbox.found_reports", reports = queue.ours(), "reports of an earlier run will be sent");
        }
        if queue.foreign() > 0 {
            warn!(
                event = "outbox.foreign_reports",
                reports = queue.foreign(),
                state_dir = %folder.display(),
                "reports for another control plane or of another node are kept and not sent"
            );
        }
        let queue = Arc::new(Mutex::new(QueueState { queue, ..QueueState::default() }));
        let (room, moved) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let listener = listener(Arc::clone(&queue), events.clone(), Arc::clone(&room), Arc::clone(&moved));
        let writer = Writer::start(Arc::clone(&state), store, rows, listener);
        let writer = writer.map_err(state::failed("start the writer of", &folder))?;
        let senders = config.planes.iter().map(|source| source.facts().name.clone());
        let senders = senders.map(|plane| (plane, Semaphore::new(config.senders.max(1)))).collect();
        let outbox = Self(Arc::new(Inner {
            planes: config.planes,
            limit: Amount {
                reports: config.max.max(1),
                bytes: usize::try_from(config.bytes_max).unwrap_or(usize::MAX).max(1),
            },
            events,
            writer,
            senders,
            queue,
            report_due: Notify::new(),
            room,
            moved,
            state,
        }));
        outbox.with(|_| {});
        Ok(outbox)
    }

    /// Whether the outbox has a report about `task` to send. Such a task has ended, even if the control plane does
    /// not know it.
    #[must_use]
    pub fn has_report_of(&self, plane: &PlaneName, task: &TaskId) -> bool {
        self.lock().queue.newest_of(plane, task).is_some()
    }

    /// Holds `lease` until the report about `task` leaves the outbox, and sends the report now. If there is no such
    /// report, the lease is dropped.
    pub fn adopt(&self, plane: &PlaneName, task: &TaskId, lease: impl LeaseKeeper + 'static) {
        self.with(|queue| {
            if let Some(number) = queue.newest_of(plane, task) {
                queue.hold(number, Box::new(lease));
                queue.hurry_one(number, Instant::now());
            }
        });
        self.0.report_due.notify_one();
    }

    /// Whether another task of this control plane may be leased: the outbox can keep its report. The reports of one
    /// control plane take no room from another one.
    #[must_use]
    pub fn has_room(&self, plane: &PlaneName) -> bool {
        let state = self.lock();
        !state.queue.is_full(plane, self.0.limit) && state.shown.not_written.is_none()
    }

    /// Waits until [`Outbox::has_room`] is true.
    pub async fn until_room(&self, plane: &PlaneName) {
        loop {
            let room = self.0.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.has_room(plane) {
                return;
            }
            room.await;
        }
    }

    /// Ends the pause of this control plane, because it has answered another call.
    pub fn plane_answers(&self, plane: &PlaneName) {
        if self.lock().queue.plane_answers(plane) {
            self.0.report_due.notify_one();
        }
    }

    /// Sends waiting reports until `stop`. Returns the tries that have no answer yet, for [`Outbox::finish`].
    pub async fn run(&self, stop: CancellationToken) -> UnansweredTries {
        let mut unanswered = UnansweredTries::default();
        loop {
            let next = self.lock().queue.next(Instant::now());
            let due = match next {
                NextReport::Send(number) => {
                    unanswered.begin(self, number);
                    continue;
                }
                NextReport::At(due) => Some(due),
                NextReport::Idle => None,
            };
            tokio::select! {
                () = stop.cancelled() => return unanswered,
                Some(_) = unanswered.0.next() => {}
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                () = self.0.report_due.notified() => {}
            }
        }
    }

    /// The state folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.0.state.path()
    }

    /// Returns when the state folder was created again after a removal.
    pub async fn moved(&self) {
        self.0.moved.notified().await;
    }

    /// Sends all reports in last rounds within `limit`, then closes the file. Call it after [`Outbox::run`] has ended,
    /// with its `unanswered` tries: they belong to the first round. Returns what remains.
    pub async fn finish(&self, limit: Duration, unanswered: UnansweredTries) -> Remaining {
        let deadline = Instant::now() + limit;
        let mut unanswered = unanswered.by_plane();
        // At once: a control plane that is away takes no time from another one.
        let rounds = self.0.planes.iter().map(|source| {
            let plane = &source.facts().name;
            self.last_rounds(plane, deadline, unanswered.remove(plane).unwrap_or_default())
        });
        join_all(rounds).await;
        let closed = self.0.writer.close().await;
        self.with(ReportQueue::let_go);
        let queue = &self.lock().queue;
        let reports = queue.ours();
        let Err(Unwritten { error, numbers }) = closed else {
            return Remaining { reports, kept: reports, ..Remaining::default() };
        };
        let numbers = numbers.map_or_else(|| queue.numbers(None), |numbers| numbers.into_iter().collect());
        let lost: Vec<Listing> = numbers.into_iter().filter_map(|number| queue.listing(number)).collect();
        let kept_back = |report: &&Listing| matches!(report.state, ListingState::Foreign | ListingState::SetAside);
        let ours = lost.iter().filter(|report| !kept_back(report)).count();
        let lost = lost.into_iter().map(|report| report.task_id).collect();
        Remaining { reports, kept: reports - ours, unwritten: Some(error), lost }
    }

    /// Sends the reports of one control plane in rounds until none is left, some have failed, or the deadline.
    async fn last_rounds(&self, plane: &PlaneName, deadline: Instant, mut unanswered: UnansweredTries) {
        let mut failures = 0;
        while self.lock().queue.held_of(plane).reports > 0 {
            let most = LAST_FAILURES_MAX - failures;
            let Some(failed) = self.last_round(plane, deadline, most, &mut unanswered).await else { return };
            failures += failed;
            let pause = queue::PAUSES.pause(failures, rand::random());
            if failed == 0 || failures >= LAST_FAILURES_MAX || Instant::now() + pause >= deadline {
                return;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Sends every report of one control plane once, until `failures_max` have failed. Returns the number of failures.
    /// `None`: the deadline has passed.
    async fn last_round(
        &self,
        plane: &PlaneName,
        deadline: Instant,
        failures_max: u32,
        unanswered: &mut UnansweredTries,
    ) -> Option<u32> {
        let mut failures = 0;
        let mut numbers = self.lock().queue.numbers_of(plane).into_iter().peekable();
        loop {
            let next = numbers.peek().filter(|_| failures < failures_max).copied();
            if let Some(number) = next.filter(|number| unanswered.0.len() < self.lock().queue.abreast(*number)) {
                numbers.next();
                unanswered.begin(self, number);
                continue;
            }
            let Some(sent) = timeout_at(deadline, unanswered.0.next()).await.ok()? else { return Some(failures) };
            failures += u32::from(matches!(sent, Some(Sent::Waiting(_))));
        }
    }

    /// Every report, the oldest first.
    #[must_use]
    pub fn listings(&self) -> Vec<Listing> {
        self.lock().queue.listings()
    }

    /// Ends the pauses of these tasks' reports, or of all, and sends those that were set aside. Returns the reports.
    pub fn retry(&self, tasks: Option<&HashSet<TaskId>>) -> Vec<Listing> {
        let listings = self.with(|queue| queue.hurry(tasks, Instant::now()));
        self.0.report_due.notify_one();
        listings
    }

    /// Adds reports from another file under new numbers. They are sent like those of an earlier run. Reports that
    /// are here already do not change. Returns the new ones after they were written. A write error is only logged.
    pub async fn take_up(&self, imported: ImportedReports) -> Vec<Listing> {
        let (ordered, listings): (Vec<_>, Vec<_>) = self.with(|queue| {
            let new = imported.missing_in(queue.entries());
            let taken = new.into_iter().map(|(entry, tries)| {
                let ours = self.0.is_ours(&entry);
                let number = queue.take_up(entry, tries, ours, Instant::now());
                let (entry, tries) = queue.write(number).expect("it was just added");
                let written = self.0.writer.write(Change::Put(number, entry.encode(&tries)));
                (written, queue.listing(number).expect("it was just added"))
            });
            taken.unzip()
        });
        self.0.report_due.notify_one();
        for written in ordered {
            if let Err(err) = written.await {
                debug!(error = %err, "report is kept in memory only");
            }
        }
        listings
    }

    /// Deletes these tasks' reports, or all, also on the disk. Returns the deleted ones.
    pub async fn drop_reports(&self, tasks: Option<&HashSet<TaskId>>) -> Vec<Listing> {
        let mut gone = Vec::new();
        let numbers = self.lock().queue.numbers(tasks);
        for number in numbers {
            let listing = self.lock().queue.listing(number);
            let Some((Gone { entry, ended_as, written }, listing)) =
                self.with(|queue| queue.remove(number)).zip(listing)
            else {
                continue;
            };
            let (task, outcome) = (entry.task().clone(), entry.task_result.outcome.kind());
            self.0.events.emit(NodeEvent::ReportDropped { task, ended_as, outcome });
            if written && let Err(err) = self.0.writer.write(Change::Remove(number)).await {
                warn!(event = "report.drop_not_written", task_id = %entry.task(), error = %err, "dropped report is still in the file");
            }
            gone.push(listing);
        }
        gone
    }

    /// Deletes a report that the control plane accepted or refused permanently, also on the disk.
    fn answered(&self, number: u64) -> Option<TaskId> {
        self.with(|queue| Some(self.forget(number, queue.answered(number)?)))
    }

    /// Removes a report that has just left the queue from the file too. Call it under the same lock: a write of the
    /// report must not follow the removal. Returns the name of its task on the status board.
    fn forget(&self, number: u64, gone: Gone) -> TaskId {
        if gone.written {
            self.0.writer.note(Change::Remove(number));
        }
        gone.ended_as
    }

    /// Changes the queue, and updates the status board.
    fn with<T>(&self, change: impl FnOnce(&mut ReportQueue) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state.queue);
        let queue = &state.queue;
        let full_planes = queue.full_planes(self.0.limit);
        let (had_full, full) = (state.shown.full, !full_planes.is_empty());
        let room_changed = had_full && full_planes != state.shown.full_planes;
        let (oldest, oldest_tries) = queue.oldest().unzip();
        let now = OutboxStatus {
            waiting: queue.ours(),
            bytes: queue.bytes(),
            oldest,
            oldest_tries,
            last_error: queue.last_error().map(str::to_owned),
            foreign: queue.foreign(),
            set_aside: queue.set_aside(),
            full,
            full_planes,
            not_written: state.shown.not_written.clone(),
        };
        // Reports in their first try are no outage.
        let event = if full && queue.waiting() + queue.set_aside() > 0 && !state.paused {
            state.paused = true;
            Some(NodeEvent::OutboxFull {
                planes: now.full_planes.clone(),
                waiting: now.waiting,
                limit: self.0.limit.reports,
                bytes: now.bytes,
            })
        } else if !full && std::mem::take(&mut state.paused) {
            Some(NodeEvent::OutboxHasRoom { waiting: now.waiting })
        } else {
            None
        };
        if now != state.shown {
            state.shown = now.clone();
            self.0.events.board().change(|status| status.outbox = now);
        }
        // Under the lock, so that the events are in order.
        if let Some(event) = event {
            self.0.events.emit(event);
        }
        drop(state);
        if room_changed {
            self.0.room.notify_waiters();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Applies the events of the writer: updates the status board, emits the event of the node and wakes waiting tasks.
fn listener(
    queue: Arc<Mutex<QueueState>>,
    events: NodeEvents,
    room: Arc<Notify>,
    moved: Arc<Notify>,
) -> impl Fn(WriterEvent) + Send + 'static {
    move |news| {
        let (not_written, event) = match news {
            WriterEvent::Moved => return moved.notify_one(),
            WriterEvent::Broken(error) => (Some(error.clone()), NodeEvent::OutboxNotWritable { error }),
            WriterEvent::Mended => (None, NodeEvent::OutboxWritable),
        };
        let mut state = queue.lock().unwrap_or_else(PoisonError::into_inner);
        state.shown.not_written = not_written;
        let now = state.shown.clone();
        events.board().change(|status| status.outbox = now);
        drop(state);
        events.emit(event);
        room.notify_waiters();
    }
}
