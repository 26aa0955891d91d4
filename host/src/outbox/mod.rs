//! Reports of ended tasks, kept on disk until the control plane has them.
//!
//! A report passes three steps:
//!
//! 1. [`Outbox::enter`] adds it, in memory only. [`Ticket::write`] returns when it is on the disk. From then on
//!    the report survives this process, and its slot may serve the next task.
//! 2. [`PendingReport::send`] is the first try. The attempt that made the report sends it.
//! 3. After a failure the report waits. [`Outbox::run`] sends it again, the oldest first, until the control plane
//!    accepts it or refuses it permanently. Outages, restarts and new tokens do not end this.
//!
//! A report that is accepted before it was written is never written. An expired lease does not stop a report: the
//! control plane decides whether it still counts. A report goes only to the control plane that gave the task, and
//! only from the node that ran it.
//!
//! `queue` decides which report is sent next. `writer` and `store` own the file, `state` owns the folder.
//! `offline` is the outbox of a node that does not run. The pages show a summary from the status board.

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
    collections::HashSet,
    path::Path,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use jiff::Timestamp;
use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::{
    entry::Entry,
    queue::{Gone, ReportQueue, Turn},
    sending::{Sender, Try},
    store::Change,
    writer::{Unwritten, Writer, WriterEvent},
};
pub use self::{
    entry::{Listing, ListingState, SetAside},
    offline::{OfflineOutbox, OfflineOutboxError},
    state::{StateDir, StateError},
};
use crate::{
    leases::{LeaseSource, PlaneFacts},
    model::{Lease, LeaseKeeper, OutboxStatus, PlaneName, ReportState, StatusBoard, TaskId, TaskResult},
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
    /// At this number of reports that are not accepted yet, nothing new is leased.
    pub max: usize,
}

impl Default for Options {
    /// Without a folder, because its place depends on the environment.
    fn default() -> Self {
        Self { state_dir: PathBuf::new(), max: 1000 }
    }
}

/// The owner of the reports, and their limits.
pub struct Config {
    /// The folder of the reports.
    pub state: StateDir,
    /// The control planes of this node. Reports for others are kept and not sent.
    pub planes: Vec<Arc<dyn LeaseSource>>,
    /// At this number of reports that are not accepted yet, nothing new is leased. Above 0.
    pub max: usize,
    /// Most concurrent first tries. Further reports wait in the queue like failed ones.
    pub senders: usize,
}

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Outbox(Arc<Inner>);

struct Inner {
    planes: Vec<Arc<dyn LeaseSource>>,
    max: usize,
    board: StatusBoard,
    writer: Writer,
    senders: Semaphore,
    book: Arc<Mutex<Pages>>,
    /// Notified when there may be a report to send.
    turn: Notify,
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
struct Pages {
    book: ReportQueue,
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

/// A report whose first try belongs to its attempt. If it is dropped without a try or
/// [`PendingReport::withdraw`], it is written and waits in the outbox.
pub struct PendingReport {
    outbox: Outbox,
    number: u64,
    done: bool,
}

/// The place of a report in the outbox. With it, a caller waits until the report is on the disk.
pub struct Ticket {
    outbox: Outbox,
    number: u64,
}

impl Outbox {
    /// Opens the file in the state folder and reads the reports of earlier runs. Nothing is sent yet.
    ///
    /// # Errors
    /// When the folder cannot be used. An unreadable file is no error: it is set aside.
    pub fn open(config: Config, board: StatusBoard) -> Result<Self, StateError> {
        let state = Arc::new(config.state);
        let folder = state.path().to_owned();
        let (store, rows) = store::open_or_set_aside(&folder)?;
        let mut book = ReportQueue::default();
        for (number, bytes) in &rows {
            match Entry::decode(bytes) {
                Ok((entry, tries)) => {
                    let ours = source_of(&config.planes, &entry).is_some();
                    book.found(*number, entry, tries, ours, Instant::now());
                }
                Err(err) => {
                    book.skip(*number);
                    warn!(event = "outbox.report_unreadable", number, error = %err, "a report in the outbox cannot be read, it is kept and not sent");
                }
            }
        }
        if book.ours() > 0 {
            info!(event = "outbox.found_reports", reports = book.ours(), "reports of an earlier run will be sent");
        }
        if book.foreign() > 0 {
            warn!(
                event = "outbox.foreign_reports",
                reports = book.foreign(),
                state_dir = %folder.display(),
                "reports for another control plane or of another node are kept and not sent"
            );
        }
        let book = Arc::new(Mutex::new(Pages { book, ..Pages::default() }));
        let (room, moved) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let listener = listener(Arc::clone(&book), board.clone(), Arc::clone(&room), Arc::clone(&moved));
        let writer = Writer::start(Arc::clone(&state), store, rows, listener);
        let writer = writer.map_err(state::failed("start the writer of", &folder))?;
        let outbox = Self(Arc::new(Inner {
            planes: config.planes,
            max: config.max.max(1),
            board,
            writer,
            senders: Semaphore::new(config.senders.max(1)),
            book,
            turn: Notify::new(),
            room,
            moved,
            state,
        }));
        outbox.with(|_| {});
        Ok(outbox)
    }

    /// Adds the report of an ended task. It is in memory only: see [`PendingReport::ticket`].
    #[must_use]
    pub fn enter(&self, plane: &PlaneFacts, lease: &Lease, task_result: TaskResult) -> PendingReport {
        let entry = Arc::new(Entry {
            plane: plane.name.clone(),
            base_url: plane.base_url.trim_end_matches('/').into(),
            node: Arc::clone(&plane.node),
            address: lease.address.clone(),
            job_id: lease.job,
            domain_id: lease.data.domain(),
            capability: lease.capability.to_string(),
            task_result,
            ended_at: Timestamp::now(),
        });
        let number = self.with(|book| book.add(entry));
        PendingReport { outbox: self.clone(), number, done: false }
    }

    /// Whether the outbox has a report about `task` to send. Such a task has ended, even if the control plane does
    /// not know it.
    #[must_use]
    pub fn owes(&self, plane: &PlaneName, task: &TaskId) -> bool {
        self.lock().book.owed(plane, task).is_some()
    }

    /// Holds `lease` until the report about `task` leaves the outbox, and sends the report now. If there is no such
    /// report, the lease is dropped.
    pub fn adopt(&self, plane: &PlaneName, task: &TaskId, lease: impl LeaseKeeper + 'static) {
        self.with(|book| {
            if let Some(number) = book.owed(plane, task) {
                book.hold(number, Box::new(lease));
                book.hurry_one(number, Instant::now());
            }
        });
        self.0.turn.notify_one();
    }

    /// Whether another task may be leased: the outbox can keep its report.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let pages = self.lock();
        pages.book.ours() < self.0.max && pages.shown.not_written.is_none()
    }

    /// Waits until [`Outbox::has_room`] is true.
    pub async fn until_room(&self) {
        loop {
            let room = self.0.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.has_room() {
                return;
            }
            room.await;
        }
    }

    /// Ends the pause of this control plane, because it has answered another call.
    pub fn plane_answers(&self, plane: &PlaneName) {
        if self.lock().book.plane_answers(plane) {
            self.0.turn.notify_one();
        }
    }

    /// Sends waiting reports until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let mut under_way = FuturesUnordered::new();
        loop {
            let turn = self.lock().book.turn(Instant::now());
            let due = match turn {
                Turn::Send(number) => {
                    under_way.extend(Try::begin(self, number, Sender::Outbox).map(Try::run));
                    continue;
                }
                Turn::At(due) => Some(due),
                Turn::Idle => None,
            };
            tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = under_way.next() => {}
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                () = self.0.turn.notified() => {}
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

    /// Sends all reports in last rounds within `limit`, then closes the file. Call it after [`Outbox::run`] has ended.
    /// Returns what remains.
    pub async fn finish(&self, limit: Duration) -> Remaining {
        let deadline = Instant::now() + limit;
        let mut failures = 0;
        while self.lock().book.ours() > 0 {
            let Some(failed) = self.last_round(deadline, LAST_FAILURES_MAX - failures).await else { break };
            failures += failed;
            let pause = queue::PAUSES.pause(failures, rand::random());
            if failed == 0 || failures >= LAST_FAILURES_MAX || Instant::now() + pause >= deadline {
                break;
            }
            tokio::time::sleep(pause).await;
        }
        let closed = self.0.writer.close().await;
        self.with(ReportQueue::let_go);
        let book = &self.lock().book;
        let reports = book.ours();
        let Err(Unwritten { error, numbers }) = closed else {
            return Remaining { reports, kept: reports, ..Remaining::default() };
        };
        let numbers = numbers.map_or_else(|| book.numbers(None), |numbers| numbers.into_iter().collect());
        let lost: Vec<Listing> = numbers.into_iter().filter_map(|number| book.listing(number)).collect();
        let ours = lost.iter().filter(|report| report.state != ListingState::Foreign).count();
        let lost = lost.into_iter().map(|report| report.task_id).collect();
        Remaining { reports, kept: reports - ours, unwritten: Some(error), lost }
    }

    /// Sends every report of this node once, until `failures_max` have failed. Returns the number of failures. `None`:
    /// the deadline has passed.
    async fn last_round(&self, deadline: Instant, failures_max: u32) -> Option<u32> {
        let (mut failures, mut under_way) = (0, FuturesUnordered::new());
        let mut numbers = self.lock().book.numbers(None).into_iter().peekable();
        loop {
            let next = numbers.peek().filter(|_| failures < failures_max).copied();
            if let Some(number) = next.filter(|number| under_way.len() < self.lock().book.abreast(*number)) {
                numbers.next();
                under_way.extend(Try::begin(self, number, Sender::Outbox).map(Try::run));
                continue;
            }
            let Some(sent) = timeout_at(deadline, under_way.next()).await.ok()? else { return Some(failures) };
            failures += u32::from(matches!(sent, Some(Sent::Waiting(_))));
        }
    }

    /// Every report, the oldest first.
    #[must_use]
    pub fn listings(&self) -> Vec<Listing> {
        self.lock().book.listings()
    }

    /// Ends the pauses of these tasks' reports, or of all. Returns the reports.
    pub fn retry(&self, tasks: Option<&HashSet<TaskId>>) -> Vec<Listing> {
        let listings = self.with(|book| book.hurry(tasks, Instant::now()));
        self.0.turn.notify_one();
        listings
    }

    /// Adds reports from another file under new numbers. They are sent like those of an earlier run. Reports that
    /// are here already do not change. Returns the new ones after they were written. A write error is only logged.
    pub async fn take_up(&self, set_aside: SetAside) -> Vec<Listing> {
        let (ordered, listings): (Vec<_>, Vec<_>) = self.with(|book| {
            let new = set_aside.missing_in(book.entries());
            let taken = new.into_iter().map(|(entry, tries)| {
                let ours = self.0.is_ours(&entry);
                let number = book.take_up(entry, tries, ours, Instant::now());
                let (entry, tries) = book.write(number).expect("it was just added");
                let written = self.0.writer.write(Change::Put(number, entry.encode(&tries)));
                (written, book.listing(number).expect("it was just added"))
            });
            taken.unzip()
        });
        self.0.turn.notify_one();
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
        let numbers = self.lock().book.numbers(tasks);
        for number in numbers {
            let listing = self.lock().book.listing(number);
            let Some((Gone { entry, ended_as, written }, listing)) = self.with(|book| book.remove(number)).zip(listing)
            else {
                continue;
            };
            warn!(event = "report.dropped", task_id = %entry.task(), outcome = entry.task_result.outcome.word(), "report dropped by an operator");
            self.0.board.settled(&ended_as, ReportState::Dropped);
            if written && let Err(err) = self.0.writer.write(Change::Remove(number)).await {
                warn!(event = "report.drop_not_written", task_id = %entry.task(), error = %err, "dropped report is still in the file");
            }
            gone.push(listing);
        }
        gone
    }

    /// Deletes a report that the control plane accepted or refused permanently, also on the disk.
    fn answered(&self, number: u64) -> Option<TaskId> {
        self.with(|book| Some(self.forget(number, book.answered(number)?)))
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
        let mut pages = self.lock();
        let result = change(&mut pages.book);
        let book = &pages.book;
        let (was_full, full) = (pages.shown.full, book.ours() >= self.0.max);
        let (oldest, oldest_tries) = book.oldest().unzip();
        let now = OutboxStatus {
            waiting: book.ours(),
            oldest,
            oldest_tries,
            last_error: book.last_error().map(str::to_owned),
            foreign: book.foreign(),
            full,
            not_written: pages.shown.not_written.clone(),
        };
        // Reports in their first try are no outage.
        if full && book.waiting() > 0 && !pages.paused {
            pages.paused = true;
            warn!(
                event = "outbox.full",
                waiting = now.waiting,
                limit = self.0.max,
                "leasing paused, the outbox is full"
            );
        } else if !full && std::mem::take(&mut pages.paused) {
            info!(event = "outbox.has_room", waiting = now.waiting, "leasing resumed, the outbox has room");
        }
        if now != pages.shown {
            pages.shown = now.clone();
            self.0.board.change(|status| status.outbox = now);
        }
        drop(pages);
        if was_full && !full {
            self.0.room.notify_waiters();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// Returns when the report is on the disk, or has left the outbox. It also returns after a write error, which is
    /// logged. Such a report is in memory only.
    pub async fn write(&self) {
        let Self { outbox, number } = self;
        let ordered = outbox.with(|book| {
            let (entry, tries) = book.write(*number)?;
            // Under the lock: after an answer, this write must not put the report back on the disk.
            Some((outbox.0.writer.write(Change::Put(*number, entry.encode(&tries))), entry))
        });
        let Some((written, entry)) = ordered else { return };
        if let Err(err) = written.await {
            debug!(task_id = %entry.task(), error = %err, "report is kept in memory only");
        }
    }
}

impl PendingReport {
    /// The place of the report in the outbox.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket { outbox: self.outbox.clone(), number: self.number }
    }

    /// The first try. If the future is dropped, the outbox sends the report. `lease` gives the current address of the
    /// report before each try. The outbox holds it until the report leaves: until then, the control plane must not
    /// lease the task again.
    pub async fn send(mut self, lease: impl LeaseKeeper + 'static) -> Sent {
        self.outbox.with(|book| book.hold(self.number, Box::new(lease)));
        let outbox = self.outbox.clone();
        let Ok(_sender) = outbox.0.senders.try_acquire() else {
            return Sent::Waiting("too many other reports are being sent".to_owned());
        };
        let sent = match Try::begin(&outbox, self.number, Sender::Attempt) {
            Some(one) => one.run().await,
            None => None,
        };
        self.done = true;
        // Other reports may wait for an answer of the control plane, or for the end of this try.
        if outbox.lock().book.waiting() > 0 {
            outbox.0.turn.notify_one();
        }
        sent.unwrap_or(Sent::Dropped)
    }

    /// Deletes the report: there is nothing to report any more.
    pub fn withdraw(mut self) {
        self.done = true;
        let outbox = &self.outbox;
        outbox.with(|book| Some(outbox.forget(self.number, book.remove(self.number)?)));
    }
}

impl Drop for PendingReport {
    fn drop(&mut self) {
        if !self.done {
            self.outbox.with(|book| {
                if !book.is_written(self.number)
                    && let Some((entry, tries)) = book.write(self.number)
                {
                    self.outbox.0.writer.note(Change::Put(self.number, entry.encode(&tries)));
                }
                book.hand_over(self.number, Instant::now());
            });
            self.outbox.0.turn.notify_one();
        }
    }
}

/// Applies the events of the writer: updates the status board and wakes waiting tasks.
fn listener(
    book: Arc<Mutex<Pages>>,
    board: StatusBoard,
    room: Arc<Notify>,
    moved: Arc<Notify>,
) -> impl Fn(WriterEvent) + Send + 'static {
    move |news| {
        let not_written = match news {
            WriterEvent::Moved => return moved.notify_one(),
            WriterEvent::Broken(why) => Some(why),
            WriterEvent::Mended => None,
        };
        let mut pages = book.lock().unwrap_or_else(PoisonError::into_inner);
        pages.shown.not_written = not_written;
        let now = pages.shown.clone();
        board.change(|status| status.outbox = now);
        drop(pages);
        room.notify_waiters();
    }
}
