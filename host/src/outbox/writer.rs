//! The one writer: a thread that puts what is waiting into one transaction.
//!
//! A transaction costs a sync of the disk, however much is in it, so everything that has arrived
//! while the last one was written goes into the next. Removals nobody waits for give others a moment
//! to come along, and so do writes that somebody waits for, once the last transaction has shown that they
//! come in company.

use std::{
    io,
    path::PathBuf,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::store::{Change, FILE, Store};

/// How long a removal waits for company. A crash in this time sends a report again that was accepted.
const LINGER: Duration = Duration::from_millis(10);
/// How long a write waits for company, where there was some the last time. Short beside a task, and many
/// times what it saves: a transaction costs as much processor time for one report as for ten.
const GATHER: Duration = Duration::from_micros(300);
/// Most changes in one transaction.
const BATCH_MAX: usize = 256;

type Done = oneshot::Sender<Result<(), String>>;

enum Order {
    Change(Change, Option<Done>),
    /// Everything before it is on the disk and the file is closed when this is answered.
    Close(Done),
}

/// Hands changes to the thread, which ends when this is dropped.
pub(super) struct Writer {
    orders: Sender<Order>,
}

impl Writer {
    pub(super) fn start(folder: PathBuf, store: Store) -> io::Result<Self> {
        let (orders, incoming) = channel();
        // Bounded by the outbox: a change for each report that is not accepted yet, and its removal.
        let thread = Thread { path: folder.join(FILE), store: Some(store), broken: false };
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
    pub(super) async fn close(&self) -> Result<(), String> {
        let (done, written) = oneshot::channel();
        self.order(Order::Close(done));
        answer(written).await
    }

    fn order(&self, order: Order) {
        // Without its thread (which ends by a panic only) whoever waits hears so.
        let _ = self.orders.send(order);
    }
}

async fn answer(written: oneshot::Receiver<Result<(), String>>) -> Result<(), String> {
    written.await.unwrap_or_else(|_| Err("the outbox's writer has ended".to_owned()))
}

struct Thread {
    path: PathBuf,
    /// `None` after an error, until it could be opened again.
    store: Option<Store>,
    /// The last transaction failed, and that was said.
    broken: bool,
}

impl Thread {
    fn run(mut self, incoming: &Receiver<Order>) {
        let mut company = false;
        while let Some(batch) = next_batch(incoming, company) {
            let (mut changes, mut waiting, mut last) = (Vec::with_capacity(batch.len()), Vec::new(), None);
            for order in batch {
                match order {
                    Order::Change(change, done) => {
                        changes.push(change);
                        waiting.extend(done);
                    }
                    Order::Close(done) => last = Some(done),
                }
            }
            company = waiting.len() > 1;
            let result = self.apply(changes);
            for done in waiting {
                // Who asked may have gone.
                let _ = done.send(result.clone());
            }
            if let Some(done) = last {
                self.store = None;
                let _ = done.send(result);
                return;
            }
        }
    }

    fn apply(&mut self, changes: Vec<Change>) -> Result<(), String> {
        if changes.is_empty() {
            return Ok(());
        }
        let result = self.try_apply(changes);
        match &result {
            Ok(()) if self.broken => tracing::info!("outbox is written again"),
            Err(err) if !self.broken => {
                tracing::error!(error = %err, "outbox cannot be written, reports are kept in memory only");
            }
            Ok(()) | Err(_) => {}
        }
        self.broken = result.is_err();
        result
    }

    fn try_apply(&mut self, changes: Vec<Change>) -> Result<(), String> {
        if self.store.is_none() {
            // What it holds is known here already.
            self.store = Some(Store::open(&self.path).map_err(|err| err.to_string())?.0);
        }
        let store = self.store.as_ref().expect("just opened");
        let result = store.apply(changes).map_err(|err| err.to_string());
        if result.is_err() {
            self.store = None;
        }
        result
    }
}

/// The next orders, at least one; `None` when nobody is left to give any. In `company`, a write waits a
/// little for others.
fn next_batch(incoming: &Receiver<Order>, company: bool) -> Option<Vec<Order>> {
    let mut batch = vec![incoming.recv().ok()?];
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
        let (store, _) = Store::open(&folder.path().join(FILE)).expect("made");
        Writer::start(folder.path().to_owned(), store).expect("started")
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
