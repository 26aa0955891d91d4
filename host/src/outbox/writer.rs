//! The one writer: a thread that puts all waiting changes into one transaction.
//!
//! A transaction costs one sync of the disk, independent of its size. So all changes that arrive during one
//! transaction go into the next. A change without a waiter is delayed for a short time, so that others join its
//! transaction. A change with a waiter is delayed only if the last transaction had several waiters.
//!
//! The thread knows the wanted content of the file. It repeats a failed write. If the folder was removed, it
//! creates the folder and the file again, with all reports.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write as _},
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{
    state::{StateDir, identity},
    store::{Change, FILE, Row, Store},
};

/// How long a change without a waiter waits for others. If the process crashes before a removal is written, the
/// accepted report is sent again.
const LINGER: Duration = Duration::from_millis(10);
/// How long a write waits for others, if the last transaction had several waiters. This is short compared with a
/// task. One transaction costs as much processor time for one report as for ten.
const GATHER: Duration = Duration::from_micros(300);
/// Most changes in one transaction.
const BATCH_MAX: usize = 256;
/// The pause before a failed write is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// The bytes that the disk must accept before it counts as writable again.
const ROOM_BYTES: usize = 256 * 1024;

/// The error for a thread that panicked.
const GONE: &str = "the outbox's writer has ended";

type Done = oneshot::Sender<Result<(), String>>;

/// Events for the owner of the writer.
pub(super) enum WriterEvent {
    /// The file cannot be written, for this reason.
    Broken(String),
    /// It can be written again.
    Mended,
    /// The folder was created again.
    Moved,
}

/// What is missing in a closed file.
#[derive(Debug)]
pub(super) struct Unwritten {
    /// Why, in one line.
    pub(super) error: String,
    /// The numbers of reports that are not in it. `None`: unknown.
    pub(super) numbers: Option<BTreeSet<u64>>,
}

enum Order {
    Change(Change, Option<Done>),
    /// The answer follows when all earlier changes are on the disk and the file is closed.
    Close(oneshot::Sender<Result<(), Unwritten>>),
}

/// Sends changes to the thread. The thread ends when this is dropped.
pub(super) struct Writer {
    orders: Sender<Order>,
}

impl Writer {
    /// `rows` are in the file already. `tell` is called on the thread.
    pub(super) fn start(
        state: Arc<StateDir>,
        store: Store,
        rows: Vec<Row>,
        tell: impl Fn(WriterEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, incoming) = channel();
        // The outbox bounds it: one change for each report that is not accepted yet, and its removal.
        let file = store.file;
        let rows: BTreeMap<_, _> = rows.into_iter().collect();
        let thread = Thread {
            state,
            store: Some(store),
            file,
            stored: rows.keys().copied().collect(),
            rows,
            behind: BTreeSet::new(),
            broken: false,
            moved: false,
            tell: Box::new(tell),
        };
        thread::Builder::new().name("outbox".to_owned()).spawn(move || thread.run(&incoming))?;
        Ok(Self { orders })
    }

    /// Orders a change at once, before the future is polled. The change is on the disk when the future returns.
    ///
    /// # Errors
    /// One line when the write failed.
    pub(super) fn write(&self, change: Change) -> impl Future<Output = Result<(), String>> + use<> {
        let (done, written) = oneshot::channel();
        self.order(Order::Change(change, Some(done)));
        answer(written)
    }

    /// Orders a change without waiting for it.
    pub(super) fn note(&self, change: Change) {
        self.order(Order::Change(change, None));
    }

    /// Waits until all earlier changes are on the disk and the file is closed. Nothing is written after that.
    ///
    /// # Errors
    /// When a change is missing on the disk, or when this is unknown.
    pub(super) async fn close(&self) -> Result<(), Unwritten> {
        let (done, closed) = oneshot::channel();
        self.order(Order::Close(done));
        let gone = |_| Err(Unwritten { error: GONE.to_owned(), numbers: None });
        closed.await.unwrap_or_else(gone)
    }

    fn order(&self, order: Order) {
        // The thread ends early only by a panic. Then the waiter gets an error.
        let _ = self.orders.send(order);
    }
}

async fn answer(written: oneshot::Receiver<Result<(), String>>) -> Result<(), String> {
    written.await.unwrap_or_else(|_| Err(GONE.to_owned()))
}

struct Thread {
    state: Arc<StateDir>,
    /// `None` after an error, until the file is opened again.
    store: Option<Store>,
    /// The identity of our file.
    file: (u64, u64),
    /// The wanted content of the file.
    rows: BTreeMap<u64, Vec<u8>>,
    /// The numbers whose rows in the file may differ from `rows`.
    behind: BTreeSet<u64>,
    /// The numbers that have a row in the file.
    stored: BTreeSet<u64>,
    /// The last transaction failed, and this was reported.
    broken: bool,
    /// A new file was begun, and this was not reported yet.
    moved: bool,
    tell: Box<dyn Fn(WriterEvent) + Send>,
}

impl Thread {
    fn run(mut self, incoming: &Receiver<Order>) {
        let mut company = false;
        while let Some(batch) = next_batch(incoming, company, self.broken.then_some(AGAIN)) {
            let (mut waiting, mut last) = (Vec::new(), None);
            for order in batch {
                match order {
                    Order::Change(change, done) => {
                        self.note(change);
                        waiting.extend(done);
                    }
                    Order::Close(done) => last = Some(done),
                }
            }
            company = waiting.len() > 1;
            if last.is_some() && !self.rows.is_empty() && !self.is_in_place(&self.path()) {
                self.behind.extend(self.rows.keys());
                self.stored.clear();
            }
            let result = self.catch_up();
            for done in waiting {
                // The waiter may be gone.
                let _ = done.send(result.clone());
            }
            if let Some(done) = last {
                let missing = |number: &u64| !self.stored.contains(number);
                let numbers = Some(self.rows.keys().copied().filter(missing).collect());
                drop(self); // after the answer, the waiter may use the folder
                let _ = done.send(result.map_err(|error| Unwritten { error, numbers }));
                return;
            }
        }
    }

    fn note(&mut self, change: Change) {
        let (Change::Put(number, _) | Change::Remove(number)) = change;
        self.behind.insert(number);
        match change {
            Change::Put(_, bytes) => drop(self.rows.insert(number, bytes)),
            Change::Remove(_) => drop(self.rows.remove(&number)),
        }
    }

    /// Brings the file up to date.
    fn catch_up(&mut self) -> Result<(), String> {
        let result = if self.behind.is_empty() { Ok(()) } else { self.try_catch_up() };
        match &result {
            Ok(()) if self.broken && self.has_room() => {
                self.broken = false;
                (self.tell)(WriterEvent::Mended);
            }
            Err(err) if !self.broken => {
                self.broken = true;
                (self.tell)(WriterEvent::Broken(err.clone()));
            }
            Ok(()) | Err(_) => {}
        }
        result
    }

    /// Whether the disk has space for more than one or two changes. With a full disk, a write still succeeds while it
    /// fits into free pages of the file, and the next one fails.
    fn has_room(&self) -> bool {
        let probe = tempfile::tempfile_in(self.state.path()).and_then(|mut file| {
            file.write_all(&vec![0; ROOM_BYTES])?;
            file.sync_all()
        });
        // A missing folder is created again for the next report.
        probe.is_ok() || !self.state.path().exists()
    }

    fn try_catch_up(&mut self) -> Result<(), String> {
        let path = self.path();
        if !self.is_in_place(&path) {
            self.store = None;
            if !self.rows.is_empty() {
                self.move_in(&path)?;
            }
        } else if self.store.is_none() {
            self.store = Some(Store::open(&path).map_err(|err| err.to_string())?.0);
        }
        // `None` if the file is gone and there are no reports.
        if let Some(store) = self.store.take() {
            let changes = self.behind.iter().map(|number| match self.rows.get(number) {
                Some(bytes) => Change::Put(*number, bytes.clone()),
                None => Change::Remove(*number),
            });
            store.apply(changes).map_err(|err| err.to_string())?;
            self.store = Some(store);
            for number in &self.behind {
                if self.rows.contains_key(number) {
                    self.stored.insert(*number);
                } else {
                    self.stored.remove(number);
                }
            }
            if std::mem::take(&mut self.moved) {
                tracing::error!(
                    event = "state.recreated",
                    state_dir = %self.state.path().display(),
                    reports = self.rows.len(),
                    "state folder was removed while the node runs, it was created again with the waiting reports"
                );
                (self.tell)(WriterEvent::Moved);
            }
        }
        self.behind.clear();
        Ok(())
    }

    /// Begins a new file after ours was removed. Another outbox that is there now is not changed.
    fn move_in(&mut self, path: &Path) -> Result<(), String> {
        self.state.take_again().map_err(|err| err.to_string())?;
        let (store, found) = Store::open(path).map_err(|err| err.to_string())?;
        if found.iter().any(|(number, bytes)| self.rows.get(number) != Some(bytes)) {
            return Err(format!("another outbox is at {} now; move it away, or restart the node", path.display()));
        }
        self.behind.extend(self.rows.keys());
        self.stored.clear();
        self.file = store.file;
        self.store = Some(store);
        self.moved = true;
        Ok(())
    }

    fn path(&self) -> std::path::PathBuf {
        self.state.path().join(FILE)
    }

    /// Whether the file at the path is ours. A removed file can still be written, but the next start does not find it.
    fn is_in_place(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|about| identity(&about) == self.file)
    }
}

/// The next orders, at least one unless `limit` has passed. `None`: the [`Writer`] was dropped. With `company`, a
/// write waits for others.
fn next_batch(incoming: &Receiver<Order>, company: bool, limit: Option<Duration>) -> Option<Vec<Order>> {
    let first = match limit {
        None => incoming.recv().ok()?,
        Some(limit) => match incoming.recv_timeout(limit) {
            Ok(order) => order,
            Err(RecvTimeoutError::Timeout) => return Some(Vec::new()),
            Err(RecvTimeoutError::Disconnected) => return None,
        },
    };
    let mut batch = vec![first];
    let patience = Instant::now() + LINGER;
    let hurried = |order: &Order| !matches!(order, Order::Change(_, None));
    let mut hurry = hurried(&batch[0]);
    let mut gather = company;
    while batch.len() < BATCH_MAX {
        if hurry && std::mem::take(&mut gather) {
            // Sleeps instead of a wait for the next order: each order would wake this thread.
            thread::sleep(GATHER);
        }
        let next = if hurry {
            incoming.try_recv().map_err(|_| RecvTimeoutError::Timeout)
        } else {
            incoming.recv_timeout(patience.saturating_duration_since(Instant::now()))
        };
        let Ok(order) = next else { break };
        hurry |= hurried(&order);
        batch.push(order);
    }
    Some(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(folder: &tempfile::TempDir) -> Writer {
        let state = StateDir::open(folder.path()).expect("ours");
        let (store, rows) = Store::open(&folder.path().join(FILE)).expect("made");
        Writer::start(Arc::new(state), store, rows, |_| {}).expect("started")
    }

    #[tokio::test]
    async fn many_waiting_writes_are_all_on_the_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        let writer = start(&folder);
        let writes = (0..500).map(|number| writer.write(Change::Put(number, vec![1; 100])));
        for written in futures_util::future::join_all(writes).await {
            written.expect("written");
        }
        for number in 0..499 {
            writer.note(Change::Remove(number));
        }
        writer.close().await.expect("written");
        let (_, rows) = Store::open(&folder.path().join(FILE)).expect("opens");
        assert_eq!(rows.into_iter().map(|(number, _)| number).collect::<Vec<_>>(), [499]);
        assert!(writer.write(Change::Remove(499)).await.is_err(), "it is closed");
    }
}
