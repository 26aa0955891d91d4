//! Reports of ended tasks, kept on disk until the control plane has them.
//!
//! A verdict goes through three hands. [`Outbox::enter`] takes it in, and [`Ticket::write`] returns when it
//! is on the disk; from then on it survives this process, and its slot may serve the next task.
//! [`PendingReport::send`] is the first try, by the attempt that made it. What fails then waits, and
//! [`Outbox::run`] sends it again, the oldest first, until it is accepted or refused for good: through
//! outages, restarts and new tokens. What is accepted before anybody wrote it is never written. A lease
//! that runs out meanwhile does not stop a report; whether it still counts is for the plane to say.
//! Nothing is sent to another plane than the one that gave the task, nor by another node.
//!
//! `book` decides whose turn it is, `writer` and `store` own the file, `state` the folder, `shelf` is
//! the outbox of a node that does not run. Pages see a summary on the status board.

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

/// How often the last rounds may fail before they are given up: a plane that is away would cost a
/// shutdown a request for each report.
const LAST_FAILURES_MAX: u32 = 3;

/// Most reports not accepted yet that may be configured.
pub const REPORTS_MAX: usize = 1_000_000;

/// What an operator sets.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where reports are kept until they are accepted; one node at a time.
    pub state_dir: PathBuf,
    /// Reports not accepted yet from which on nothing new is leased.
    pub max: usize,
}

impl Default for Options {
    /// Without a folder: its place depends on the environment.
    fn default() -> Self {
        Self { state_dir: PathBuf::new(), max: 1000 }
    }
}

/// Whose reports these are, and how many.
pub struct Config {
    /// Where they are kept.
    pub state: StateDir,
    /// The control planes of this node. Reports for others are kept and not sent.
    pub planes: Vec<Arc<dyn LeaseSource>>,
    /// Reports not accepted yet from which on nothing new is leased; above 0.
    pub max: usize,
    /// First tries at once. More wait for their turn like those that failed.
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
    /// There may be something to send.
    turn: Notify,
    /// There is room again.
    room: Arc<Notify>,
    /// The state folder was made again.
    moved: Arc<Notify>,
    state: Arc<StateDir>,
}

impl Inner {
    /// Whether this node sends the report: another node or control plane may have its own reports in the file.
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

/// The book, and what of it the status board shows.
#[derive(Default)]
struct Pages {
    book: ReportQueue,
    shown: OutboxStatus,
    /// That nothing is leased was said.
    paused: bool,
}

/// What became of a report, for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The plane took it.
    Accepted,
    /// The plane will never take it; the text says why, in one line.
    Refused(String),
    /// It waits in the outbox; the text is the failure, in one line.
    Waiting(String),
    /// An operator dropped it meanwhile.
    Dropped,
}

/// What an outbox leaves behind when it ends.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// Reports of ours the control plane has not accepted.
    pub reports: usize,
    /// How many of them the next start finds.
    pub kept: usize,
    /// Why the disk does not say all of that, in one line.
    pub unwritten: Option<String>,
    /// Of which tasks it says nothing: their reports end with this process.
    pub lost: Vec<TaskId>,
}

/// A report whose first try is its attempt's. Dropped without a word, it is written and waits for its turn
/// in the outbox.
pub struct PendingReport {
    outbox: Outbox,
    number: u64,
    done: bool,
}

/// The place of a report in the outbox, for who has to know that it is safe.
pub struct Ticket {
    outbox: Outbox,
    number: u64,
}

impl Outbox {
    /// Opens the file in the state folder and finds what an earlier run left. Nothing is sent yet.
    ///
    /// # Errors
    /// When the folder cannot be used. A file that cannot be read is set aside.
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

    /// Takes in a verdict. It is in memory only: see [`PendingReport::ticket`].
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

    /// Whether a report about `task` waits to be sent: the task is done, whatever the plane knows of it.
    #[must_use]
    pub fn owes(&self, plane: &PlaneName, task: &TaskId) -> bool {
        self.lock().book.owed(plane, task).is_some()
    }

    /// Holds `lease` as long as the report about `task` is on its way, and sends that now. Without
    /// such a report the lease is dropped.
    pub fn adopt(&self, plane: &PlaneName, task: &TaskId, lease: impl LeaseKeeper + 'static) {
        self.with(|book| {
            if let Some(number) = book.owed(plane, task) {
                book.hold(number, Box::new(lease));
                book.hurry_one(number, Instant::now());
            }
        });
        self.0.turn.notify_one();
    }

    /// Whether another task may be taken on: its end could be kept.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let pages = self.lock();
        pages.book.ours() < self.0.max && pages.shown.not_written.is_none()
    }

    /// Waits until [`Outbox::has_room`].
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

    /// The plane has answered: reports that wait for it need not wait longer.
    pub fn plane_answers(&self, plane: &PlaneName) {
        if self.lock().book.plane_answers(plane) {
            self.0.turn.notify_one();
        }
    }

    /// Sends what waits until told to stop.
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

    /// Returns when the state folder was made again, because somebody had removed it.
    pub async fn moved(&self) {
        self.0.moved.notified().await;
    }

    /// Last rounds within `limit`, then the file is closed. Call it after [`Outbox::run`] has ended; with
    /// what is left.
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

    /// Sends every report of ours once, until so many have failed; with how many did. `None`: time is up.
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

    /// Ends the pauses of these tasks' reports, or of all; with those that are sent now.
    pub fn retry(&self, tasks: Option<&HashSet<TaskId>>) -> Vec<Listing> {
        let listings = self.with(|book| book.hurry(tasks, Instant::now()));
        self.0.turn.notify_one();
        listings
    }

    /// Takes up reports from another file under new numbers. They are sent like those of an earlier run. Reports that
    /// are here already stay as they are. Returns the new ones, which are on the disk then.
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

    /// Forgets these tasks' reports, or all; with those that are gone, for good and from the disk.
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

    /// Forgets a report that the plane took or will never take, also on the disk.
    fn answered(&self, number: u64) -> Option<TaskId> {
        self.with(|book| Some(self.forget(number, book.answered(number)?)))
    }

    /// Takes a report that has just left the book out of the file too, in the same breath: a write of it
    /// must not come after this. With what its task is called among those that ended.
    fn forget(&self, number: u64, gone: Gone) -> TaskId {
        if gone.written {
            self.0.writer.note(Change::Remove(number));
        }
        gone.ended_as
    }

    /// Changes the book, and what is shown of it.
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
        // One that is on its way for the first time is no outage.
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
    /// Returns when the report is on the disk, or is not here any more. A disk that does not take it costs
    /// an error in the log: the report then lives as long as this process.
    pub async fn write(&self) {
        let Self { outbox, number } = self;
        let ordered = outbox.with(|book| {
            let (entry, tries) = book.write(*number)?;
            // In the same breath: what is answered right after this must not come back to the disk.
            Some((outbox.0.writer.write(Change::Put(*number, entry.encode(&tries))), entry))
        });
        let Some((written, entry)) = ordered else { return };
        if let Err(err) = written.await {
            debug!(task_id = %entry.task(), error = %err, "report is kept in memory only");
        }
    }
}

impl PendingReport {
    /// Where the report stands.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket { outbox: self.outbox.clone(), number: self.number }
    }

    /// The first try. Dropping the future leaves the report to the outbox. `lease` says before each try what
    /// the plane calls the task by now. It is held as long as the report is on its way, and dropped with it: the plane
    /// shall not give the task out again meanwhile.
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
        // Others may wait for a sign that the plane is there, or for their turn behind this one.
        if outbox.lock().book.waiting() > 0 {
            outbox.0.turn.notify_one();
        }
        sent.unwrap_or(Sent::Dropped)
    }

    /// Takes the report back: there is nothing to say any more.
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

/// What the writer's news change for all others.
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
