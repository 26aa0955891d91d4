//! Reports of ended tasks, kept on disk until the control plane has them.
//!
//! A verdict goes through three hands. [`Outbox::enter`] takes it in, and [`Ticket::write`] returns when it
//! is on the disk; from then on it survives this process, and its slot may serve the next task.
//! [`Kept::send`] is the first try, by the attempt that made it. What fails then waits, and
//! [`Outbox::run`] sends it again, the oldest first, until it is accepted or refused for good: through
//! outages, restarts and new tokens. What is accepted before anybody wrote it is never written. A lease
//! that runs out meanwhile does not stop a report; whether it still counts is for the plane to say.
//! Nothing is sent to another plane than the one that gave the task, nor by another node.
//!
//! `book` decides whose turn it is, `writer` and `store` own the file, `state` the folder, `shelf` is
//! the outbox of a node that does not run. Pages see a summary on the status board.

mod book;
mod entry;
mod shelf;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use jiff::{SignedDuration, Timestamp};
use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span, debug, info, info_span, warn};
use uuid::Uuid;

use self::{
    book::{Book, Failure, Gone, Turn},
    entry::{Entry, Tries},
    store::Change,
    writer::Writer,
};
pub use self::{
    entry::{Listing, ListingState},
    shelf::{Shelf, ShelfError},
    state::{StateDir, StateError},
};
use crate::{
    leases::{Advice, LeaseError, LeaseSource},
    model::{KeptLease, Lease, OutboxStatus, ReportState, StatusBoard, TaskId, Verdict, millis},
};

/// What is noted of a try that ended with its sender.
const BROKEN_OFF: &str = "the node stopped before the control plane answered";

/// How often the last rounds may fail before they are given up: a plane that is away would cost a
/// shutdown a request for each report.
const LAST_FAILURES_MAX: u32 = 3;

/// Whose reports these are, and how many.
pub struct Config {
    /// Where they are kept.
    pub state: StateDir,
    /// Base URL of the control plane.
    pub plane: String,
    /// Address of this node on it.
    pub node: String,
    /// Reports not accepted yet from which on nothing new is leased; above 0.
    pub max: usize,
    /// First tries at once. More wait for their turn like those that failed.
    pub senders: usize,
}

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Outbox(Arc<Inner>);

struct Inner {
    plane: Arc<str>,
    node: Arc<str>,
    max: usize,
    source: Arc<dyn LeaseSource>,
    board: StatusBoard,
    writer: Writer,
    senders: Semaphore,
    book: Mutex<Pages>,
    /// There may be something to send.
    turn: Notify,
    /// There is room again.
    room: Notify,
    _state: StateDir,
}

/// The book, and what of it the status board shows.
#[derive(Default)]
struct Pages {
    book: Book,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sender {
    Attempt,
    Outbox,
}

/// A report whose first try is its attempt's. Dropped without a word, it is written and waits for its turn
/// in the outbox.
pub struct Kept {
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
    pub fn open(config: Config, source: Arc<dyn LeaseSource>, board: StatusBoard) -> Result<Self, StateError> {
        let folder = config.state.path().to_owned();
        let (store, rows) = store::open_or_set_aside(&folder)?;
        let plane: Arc<str> = config.plane.trim_end_matches('/').into();
        let mut book = Book::default();
        for (number, bytes) in rows {
            match Entry::decode(&bytes) {
                Ok((entry, tries)) => {
                    let ours = entry.plane == plane && *entry.node == *config.node;
                    book.found(number, entry, tries, ours, Instant::now());
                }
                Err(err) => {
                    book.skip(number);
                    warn!(number, error = %err, "a report in the outbox cannot be read, it is kept and not sent");
                }
            }
        }
        if book.ours() > 0 {
            info!(reports = book.ours(), "reports of an earlier run will be sent");
        }
        if book.foreign() > 0 {
            warn!(
                reports = book.foreign(),
                state_dir = %folder.display(),
                "reports for another control plane or from another node are kept and not sent"
            );
        }
        let writer = Writer::start(folder.clone(), store).map_err(state::failed("start the writer of", &folder))?;
        let outbox = Self(Arc::new(Inner {
            plane,
            node: config.node.into(),
            max: config.max.max(1),
            source,
            board,
            writer,
            senders: Semaphore::new(config.senders.max(1)),
            book: Mutex::new(Pages { book, ..Pages::default() }),
            turn: Notify::new(),
            room: Notify::new(),
            _state: config.state,
        }));
        outbox.with(|_| {});
        Ok(outbox)
    }

    /// Takes in a verdict. It is in memory only: see [`Kept::ticket`].
    #[must_use]
    pub fn enter(&self, lease: &Lease, verdict: Verdict) -> Kept {
        let entry = Arc::new(Entry {
            plane: Arc::clone(&self.0.plane),
            node: Arc::clone(&self.0.node),
            task_id: lease.task.0,
            job_id: lease.job,
            domain_id: lease.domain_id,
            capability: lease.capability.to_string(),
            verdict,
            ended_at: Timestamp::now(),
        });
        let number = self.with(|book| book.add(entry));
        Kept { outbox: self.clone(), number, done: false }
    }

    /// Whether a report about `task` waits to be sent: the task is done, whatever the plane knows of it.
    #[must_use]
    pub fn owes(&self, task: TaskId) -> bool {
        self.lock().book.owed(task.0).is_some()
    }

    /// Holds `lease` as long as the report about `task` is on its way, and sends that now. Without
    /// such a report the lease is dropped.
    pub fn adopt(&self, task: TaskId, lease: impl KeptLease + 'static) {
        self.with(|book| {
            if let Some(number) = book.owed(task.0) {
                book.hold(number, Box::new(lease));
            }
            book.hurry(Some(&HashSet::from([task.0])), Instant::now())
        });
        self.0.turn.notify_one();
    }

    /// Whether another task may be taken on.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.lock().book.ours() < self.0.max
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
    pub fn plane_answers(&self) {
        if self.lock().book.plane_answers() {
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

    /// Last rounds within `limit`, then the file is closed. Call it after [`Outbox::run`] has ended; with
    /// how many reports are left for the next start.
    pub async fn finish(&self, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        let mut failures = 0;
        while self.lock().book.ours() > 0 {
            let Some(failed) = self.last_round(deadline, LAST_FAILURES_MAX - failures).await else { break };
            failures += failed;
            let pause = book::pause_after(failures, rand::random());
            if failed == 0 || failures >= LAST_FAILURES_MAX || Instant::now() + pause >= deadline {
                break;
            }
            tokio::time::sleep(pause).await;
        }
        if let Err(err) = self.0.writer.close().await {
            warn!(error = %err, "outbox was not closed in order");
        }
        self.with(Book::let_go);
        self.lock().book.ours()
    }

    /// Sends every report of ours once, until so many have failed; with how many did. `None`: time is up.
    async fn last_round(&self, deadline: Instant, failures_max: u32) -> Option<u32> {
        let (mut failures, mut under_way) = (0, FuturesUnordered::new());
        let mut numbers = self.lock().book.numbers(None).into_iter().peekable();
        loop {
            let next = numbers.peek().is_some() && failures < failures_max;
            if next && under_way.len() < self.lock().book.abreast() {
                let number = numbers.next().expect("it was looked at");
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
    pub fn retry(&self, tasks: Option<&HashSet<Uuid>>) -> Vec<Listing> {
        let listings = self.with(|book| book.hurry(tasks, Instant::now()));
        self.0.turn.notify_one();
        listings
    }

    /// Forgets these tasks' reports, or all; with those that are gone, for good and from the disk.
    pub async fn drop_reports(&self, tasks: Option<&HashSet<Uuid>>) -> Vec<Listing> {
        let mut gone = Vec::new();
        let numbers = self.lock().book.numbers(tasks);
        for number in numbers {
            let listing = self.lock().book.listing(number);
            let Some((Gone { entry, ended_as, written }, listing)) = self.with(|book| book.remove(number)).zip(listing)
            else {
                continue;
            };
            warn!(task_id = %entry.task(), outcome = entry.verdict.outcome.word(), "report dropped by an operator");
            self.0.board.settled(ended_as, ReportState::Dropped);
            if written && let Err(err) = self.0.writer.write(Change::Remove(number)).await {
                warn!(task_id = %entry.task(), error = %err, "dropped report is still in the file");
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
    fn with<T>(&self, change: impl FnOnce(&mut Book) -> T) -> T {
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
        };
        // One that is on its way for the first time is no outage.
        if full && book.waiting() > 0 && !pages.paused {
            pages.paused = true;
            warn!(waiting = now.waiting, limit = self.0.max, "leasing paused, the outbox is full");
        } else if !full && std::mem::take(&mut pages.paused) {
            info!(waiting = now.waiting, "leasing again, the outbox has room");
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

/// One try under way, which counts. Dropped before its end, its report waits for its turn again.
struct Try {
    outbox: Outbox,
    number: u64,
    entry: Arc<Entry>,
    tries: Tries,
    who: Sender,
    ended: bool,
}

impl Try {
    /// `None` when there is nothing to be sent.
    fn begin(outbox: &Outbox, number: u64, who: Sender) -> Option<Self> {
        let (entry, tries) = outbox.with(|book| {
            let renamed = book.rename(number);
            let (entry, tries) = book.begin(number, Timestamp::now())?;
            if renamed {
                outbox.0.writer.note(Change::Put(number, entry.encode(&tries)));
            }
            Some((entry, tries))
        })?;
        Some(Self { outbox: outbox.clone(), number, entry, tries, who, ended: false })
    }

    /// An attempt says itself how its task ended, in its own span; what the outbox sends gets a line here.
    /// `None` when the report was dropped meanwhile.
    async fn run(self) -> Option<Sent> {
        let entry = &self.entry;
        let span = match self.who {
            Sender::Attempt => Span::current(),
            Sender::Outbox => info_span!(
                "report",
                task_id = %entry.task(),
                job_id = entry.job_id.map(tracing::field::display),
                domain_id = entry.domain_id.map(tracing::field::display),
                capability = entry.capability,
            ),
        };
        self.send().instrument(span).await
    }

    async fn send(mut self) -> Option<Sent> {
        let settled = self.outbox.0.source.settle(self.entry.task(), &self.entry.lease(), &self.entry.verdict).await;
        self.ended = true;
        let Self { outbox, number, entry, tries, who, .. } = &self;
        let (task, verdict, tries) = (entry.task(), &entry.verdict, tries.count);
        let Err(err) = settled else {
            crate::crash::point("answer-read");
            let ended_as = outbox.answered(*number);
            if *who == Sender::Outbox {
                let waited = Timestamp::now().duration_since(entry.ended_at).max(SignedDuration::ZERO);
                let waited_ms = millis(waited.unsigned_abs());
                info!(task_id = %task, outcome = verdict.outcome.word(), tries, waited_ms, "report delivered");
                outbox.0.board.settled(ended_as.unwrap_or(task), ReportState::Accepted);
            }
            return Some(Sent::Accepted);
        };
        let error = err.to_string();
        if for_good(&err) {
            let ended_as = outbox.answered(*number)?;
            if *who == Sender::Outbox {
                warn!(task_id = %task, outcome = verdict.outcome.word(), tries, error, "report refused for good");
                outbox.0.board.settled(ended_as, ReportState::Refused);
            }
            return Some(Sent::Refused(error));
        }
        let failure = Failure { error: &error, retry_after: err.retry_after() };
        // Written in the same breath: what is dropped right after this must not come back to the disk.
        let (pause, first) = outbox.with(|book| {
            let (failed, pause, first) = book.failed(*number, failure, Instant::now(), rand::random::<f64>())?;
            outbox.0.writer.note(Change::Put(*number, entry.encode(&failed)));
            Some((pause, first))
        })?;
        outbox.0.turn.notify_one();
        if first {
            warn!(task_id = %task, error, retry_in_ms = millis(pause), "reports wait for the control plane");
        } else {
            debug!(task_id = %task, error, tries, retry_in_ms = millis(pause), "report failed");
        }
        Some(Sent::Waiting(error))
    }
}

impl Drop for Try {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.outbox.with(|book| {
            if let Some((entry, tries)) = book.broken_off(self.number, BROKEN_OFF, Instant::now()) {
                self.outbox.0.writer.note(Change::Put(self.number, entry.encode(&tries)));
            }
        });
        self.outbox.0.turn.notify_one();
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

impl Kept {
    /// Where the report stands.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket { outbox: self.outbox.clone(), number: self.number }
    }

    /// The first try. Dropping the future leaves the report to the outbox. `lease` says before each try what
    /// the plane calls the task by now. It is held as long as the report is on its way, and dropped with it: the plane
    /// shall not give the task out again meanwhile.
    pub async fn send(mut self, lease: impl KeptLease + 'static) -> Sent {
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

impl Drop for Kept {
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

/// Whether the plane will never take this report.
fn for_good(err: &LeaseError) -> bool {
    matches!(err.advice(), Advice::StopTask | Advice::GiveUp)
}
