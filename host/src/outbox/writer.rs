//! The one writer: a thread that puts what is waiting into one transaction.
//!
//! A transaction costs a sync of the disk, however much is in it, so everything that has arrived
//! while the last one was written goes into the next. Removals nobody waits for give others a moment
//! to come along, and so do writes that somebody waits for, once the last transaction has shown that they
//! come in company.
//!
//! It knows what is to stand in the file. What the disk does not take is tried again, and where the folder
//! was removed under it, it is made again with all that is owed.

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

/// How long a removal waits for company. A crash in this time sends a report again that was accepted.
const LINGER: Duration = Duration::from_millis(10);
/// How long a write waits for company, where there was some the last time. Short beside a task, and many
/// times what it saves: a transaction costs as much processor time for one report as for ten.
const GATHER: Duration = Duration::from_micros(300);
/// Most changes in one transaction.
const BATCH_MAX: usize = 256;
/// When a write that the disk did not take is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// What the disk has to take before it counts as good again.
const ROOM_BYTES: usize = 256 * 1024;

/// What is heard of a thread that panicked.
const GONE: &str = "the outbox's writer has ended";

type Done = oneshot::Sender<Result<(), String>>;

/// What its owner has to hear of.
pub(super) enum WriterEvent {
    /// The file cannot be written, for this reason.
    Broken(String),
    /// It can be written again.
    Mended,
    /// The folder was made again.
    Moved,
}

/// What a file that was closed does not say.
#[derive(Debug)]
pub(super) struct Unwritten {
    /// Why, in one line.
    pub(super) error: String,
    /// The numbers of reports that do not stand in it; `None` where nobody can tell.
    pub(super) numbers: Option<BTreeSet<u64>>,
}

enum Order {
    Change(Change, Option<Done>),
    /// Everything before it is on the disk and the file is closed when this is answered.
    Close(oneshot::Sender<Result<(), Unwritten>>),
}

/// Hands changes to the thread, which ends when this is dropped.
pub(super) struct Writer {
    orders: Sender<Order>,
}

impl Writer {
    /// `rows` stand in the file already. `tell` is called on the thread.
    pub(super) fn start(
        state: Arc<StateDir>,
        store: Store,
        rows: Vec<Row>,
        tell: impl Fn(WriterEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let (orders, incoming) = channel();
        // Bounded by the outbox: a change for each report that is not accepted yet, and its removal.
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

    /// Orders a change, now; it is on the disk when the future returns.
    ///
    /// # Errors
    /// One line when the disk did not take it.
    pub(super) fn write(&self, change: Change) -> impl Future<Output = Result<(), String>> + use<> {
        let (done, written) = oneshot::channel();
        self.order(Order::Change(change, Some(done)));
        answer(written)
    }

    /// The change will be on the disk soon.
    pub(super) fn note(&self, change: Change) {
        self.order(Order::Change(change, None));
    }

    /// Waits until every change so far is on the disk and the file is closed; nothing is written after that.
    ///
    /// # Errors
    /// When not all that is owed is on the disk; or nobody can tell.
    pub(super) async fn close(&self) -> Result<(), Unwritten> {
        let (done, closed) = oneshot::channel();
        self.order(Order::Close(done));
        let gone = |_| Err(Unwritten { error: GONE.to_owned(), numbers: None });
        closed.await.unwrap_or_else(gone)
    }

    fn order(&self, order: Order) {
        // Without its thread (which ends by a panic only) whoever waits hears so.
        let _ = self.orders.send(order);
    }
}

async fn answer(written: oneshot::Receiver<Result<(), String>>) -> Result<(), String> {
    written.await.unwrap_or_else(|_| Err(GONE.to_owned()))
}

struct Thread {
    state: Arc<StateDir>,
    /// `None` after an error, until it could be opened again.
    store: Option<Store>,
    /// Which file is ours.
    file: (u64, u64),
    /// What is to stand in it.
    rows: BTreeMap<u64, Vec<u8>>,
    /// Of which of it the file may say something else.
    behind: BTreeSet<u64>,
    /// Of which of it the file says anything.
    stored: BTreeSet<u64>,
    /// The last transaction failed, and that was said.
    broken: bool,
    /// A new file was begun, and that was not said.
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
                // Who asked may have gone.
                let _ = done.send(result.clone());
            }
            if let Some(done) = last {
                let missing = |number: &u64| !self.stored.contains(number);
                let numbers = Some(self.rows.keys().copied().filter(missing).collect());
                drop(self); // whoever hears it may take the folder
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
                tracing::info!(event = "outbox.writable", "outbox can be written again");
                (self.tell)(WriterEvent::Mended);
            }
            Err(err) if !self.broken => {
                self.broken = true;
                tracing::error!(event = "outbox.not_writable", error = %err, "outbox cannot be written, reports are kept in memory only");
                (self.tell)(WriterEvent::Broken(err.clone()));
            }
            Ok(()) | Err(_) => {}
        }
        result
    }

    /// Whether the disk takes more than a change or two: a full one still takes those that fit into what the file
    /// holds already, and the next one not.
    fn has_room(&self) -> bool {
        let probe = tempfile::tempfile_in(self.state.path()).and_then(|mut file| {
            file.write_all(&vec![0; ROOM_BYTES])?;
            file.sync_all()
        });
        // A folder that is gone is made again for the next report.
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
        // There is none where the file is gone and nothing is owed.
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

    /// Begins a new file where ours is gone. Reports of others that lie there by now are not touched.
    fn move_in(&mut self, path: &Path) -> Result<(), String> {
        self.state.take_again().map_err(|err| err.to_string())?;
        let (store, found) = Store::open(path).map_err(|err| err.to_string())?;
        if found.iter().any(|(number, bytes)| self.rows.get(number) != Some(bytes)) {
            return Err(format!("another outbox lies at {} by now; move it away, or restart the node", path.display()));
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

    /// Whether what lies at its path is our file: one that was removed can be written, and nobody finds it.
    fn is_in_place(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|about| identity(&about) == self.file)
    }
}

/// The next orders; `None` when nobody is left to give any. There is at least one, unless `limit` has
/// passed. In `company`, a write waits a little for others.
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
            // Asleep, and not waiting for the next: each of them would wake this thread.
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
