//! Work on a stream that must not delay the network: hashing and writing.
//!
//! A [`PieceQueue`] passes its pieces in order to a [`Processor`] on the blocking pool. It uses a thread
//! only while there is work. One thread processes all queued pieces, without a hand-over between them.
//! `push` waits while four blocks are queued.

use std::{
    collections::VecDeque,
    io, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::{sync::Notify, task::spawn_blocking};

use super::file::BLOCK_BYTES;

/// At this number of queued bytes, `push` waits.
const QUEUED_BYTES_MAX: usize = 4 * BLOCK_BYTES;
/// At this number of queued bytes, a worker starts. It works until the queue is empty. This saves hand-overs.
const BEGIN_BYTES: usize = 2 * BLOCK_BYTES;

/// The work on each piece. It may block.
pub(crate) trait Processor: Send + 'static {
    /// Last pieces of at most so many bytes are processed by the caller, which takes less time than a hand-over to the
    /// pool.
    const IN_PLACE_BYTES_MAX: usize = 0;

    fn process(&mut self, piece: &Bytes) -> io::Result<()>;
}

/// See the module documentation.
pub(crate) struct PieceQueue<S: Processor> {
    shared: Arc<Shared<S>>,
}

struct Shared<S> {
    queue: Mutex<Queue<S>>,
    /// Notified when the queue has space, and when a worker ends.
    changed: Notify,
}

struct Queue<S> {
    pieces: VecDeque<Bytes>,
    /// Bytes in `pieces` and of the piece in work.
    bytes: usize,
    state: State<S>,
}

enum State<S> {
    /// No worker runs.
    Idle(S),
    Busy,
    Failed(io::Error),
}

impl<S: Processor> PieceQueue<S> {
    pub(crate) fn new(processor: S) -> Self {
        let queue = Queue { pieces: VecDeque::new(), bytes: 0, state: State::Idle(processor) };
        Self { shared: Arc::new(Shared { queue: Mutex::new(queue), changed: Notify::new() }) }
    }

    /// Queues the next piece. Waits only while four blocks are queued. After an error of the processor, every call
    /// returns that error.
    pub(crate) async fn push(&mut self, piece: Bytes) -> io::Result<()> {
        while !self.has_space()? {
            self.shared.changed.notified().await;
        }
        let begun = {
            let mut queue = self.shared.queue();
            queue.bytes += piece.len();
            queue.pieces.push_back(piece);
            if queue.bytes >= BEGIN_BYTES { queue.begin() } else { None }
        };
        self.work(begun);
        Ok(())
    }

    fn has_space(&self) -> io::Result<bool> {
        let mut queue = self.shared.queue();
        queue.check()?;
        Ok(queue.bytes < QUEUED_BYTES_MAX)
    }

    /// Calls `ask` with the processor after it has processed every pushed piece.
    pub(crate) async fn when_processed<T>(&mut self, ask: impl FnOnce(&mut S) -> T) -> io::Result<T> {
        loop {
            let begun = {
                let mut queue = self.shared.queue();
                queue.check()?;
                queue.process_in_place()?;
                match queue.begin() {
                    None => {
                        if let State::Idle(processor) = &mut queue.state {
                            return Ok(ask(processor));
                        }
                        None
                    }
                    begun => begun,
                }
            };
            self.work(begun);
            self.shared.changed.notified().await;
        }
    }

    /// Do not call it with the queue locked: a runtime that ends drops the worker at once, and the drop locks it.
    fn work(&self, begun: Option<S>) {
        if let Some(processor) = begun {
            let worker = Worker { shared: Arc::clone(&self.shared), ended: false };
            // Not joined: the queue's state shows its end, also after a panic.
            spawn_blocking(move || worker.work(processor));
        }
    }
}

impl<S> Shared<S> {
    fn queue(&self) -> MutexGuard<'_, Queue<S>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Processor> Queue<S> {
    /// The processor for a new worker, if there are pieces and no worker runs.
    fn begin(&mut self) -> Option<S> {
        if self.pieces.is_empty() || !matches!(self.state, State::Idle(_)) {
            return None;
        }
        match mem::replace(&mut self.state, State::Busy) {
            State::Idle(processor) => Some(processor),
            _ => None,
        }
    }

    /// Processes the last pieces on this thread, if they are few.
    fn process_in_place(&mut self) -> io::Result<()> {
        if self.bytes <= S::IN_PLACE_BYTES_MAX
            && let State::Idle(processor) = &mut self.state
        {
            self.bytes = 0;
            self.pieces.drain(..).try_for_each(|piece| processor.process(&piece))?;
        }
        Ok(())
    }

    /// The error of the processor. The first call gets the original, later calls a copy of its kind and text.
    fn check(&mut self) -> io::Result<()> {
        match &mut self.state {
            State::Failed(err) => {
                let again = io::Error::new(err.kind(), err.to_string());
                Err(mem::replace(err, again))
            }
            _ => Ok(()),
        }
    }
}

/// Runs on the blocking pool. If it is dropped early, by a panic or the end of the runtime, the queue fails.
struct Worker<S: Processor> {
    shared: Arc<Shared<S>>,
    ended: bool,
}

impl<S: Processor> Worker<S> {
    fn work(mut self, mut processor: S) {
        let mut done = 0;
        loop {
            let piece = {
                let mut queue = self.shared.queue();
                queue.bytes -= done;
                if done > 0 && queue.bytes <= QUEUED_BYTES_MAX / 2 {
                    self.shared.changed.notify_one();
                }
                match queue.pieces.pop_front() {
                    Some(piece) => piece,
                    None => {
                        queue.state = State::Idle(processor);
                        break;
                    }
                }
            };
            done = piece.len();
            if let Err(err) = processor.process(&piece) {
                self.shared.queue().state = State::Failed(err);
                break;
            }
        }
        self.ended = true;
        self.shared.changed.notify_one();
    }
}

impl<S: Processor> Drop for Worker<S> {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.queue().state = State::Failed(io::Error::other("the worker ended unexpectedly"));
            self.shared.changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Collects the pieces. A piece that begins with 255 makes it fail, one that begins with 254 panic.
    #[derive(Default)]
    struct Collect(Vec<u8>);

    impl Processor for Collect {
        fn process(&mut self, piece: &Bytes) -> io::Result<()> {
            assert_ne!(piece.first(), Some(&254), "this piece causes a panic");
            if piece.first() == Some(&255) {
                return Err(io::Error::other("disk failed"));
            }
            self.0.extend_from_slice(piece);
            Ok(())
        }
    }

    async fn push_until_it_fails(first: u8) -> io::Error {
        let mut queue = PieceQueue::new(Collect::default());
        let piece = Bytes::from(vec![first; BLOCK_BYTES / 3]);
        loop {
            if let Err(err) = queue.push(piece.clone()).await {
                assert!(queue.when_processed(|_| ()).await.is_err(), "every later call returns the error");
                return err;
            }
        }
    }

    #[tokio::test]
    async fn pieces_arrive_in_order_at_any_time() {
        let mut queue = PieceQueue::new(Collect::default());
        let mut expected = Vec::new();
        for n in 0..100_u8 {
            let piece = vec![n; usize::from(n) * 1000];
            expected.extend_from_slice(&piece);
            queue.push(piece.into()).await.expect("processed");
            if n % 30 == 0 {
                let so_far = queue.when_processed(|processor| processor.0.clone()).await.expect("processed");
                assert!(so_far == expected);
            }
        }
        assert!(queue.when_processed(|processor| mem::take(&mut processor.0)).await.expect("processed") == expected);
    }

    #[tokio::test]
    async fn stage_errors_and_panics_reach_push() {
        assert_eq!(push_until_it_fails(255).await.to_string(), "disk failed");
        assert_eq!(push_until_it_fails(254).await.to_string(), "the worker ended unexpectedly");
    }

    #[test]
    fn hanging_stage_queues_at_most_four_blocks() {
        struct HungProcessor(std::sync::mpsc::Receiver<()>);
        impl Processor for HungProcessor {
            fn process(&mut self, _: &Bytes) -> io::Result<()> {
                self.0.recv().map_err(io::Error::other)
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let (go, wait) = std::sync::mpsc::channel();
            let mut queue = PieceQueue::new(HungProcessor(wait));
            let piece = Bytes::from(vec![1; BLOCK_BYTES / 4]);
            for _ in 0..16 {
                queue.push(piece.clone()).await.expect("there is space");
            }
            let mut next = Box::pin(queue.push(piece));
            assert!(futures_util::poll!(&mut next).is_pending());
            drop(next);
            drop(go);
        });
    }
}
