//! Work on a stream that must not hold up the network: hashing it, writing it.
//!
//! A [`Lane`] takes pieces and hands them in order to its [`Stage`] on the blocking pool. A thread
//! is held only while there is work, and goes on as long as there is: no hand-over between pieces.
//! Whoever pushes waits while four blocks are on their way.

use std::{
    collections::VecDeque,
    io, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::{sync::Notify, task::spawn_blocking};

use super::file::BLOCK_BYTES;

/// From here on a push waits.
const QUEUED_BYTES_MAX: usize = 4 * BLOCK_BYTES;
/// With as much somebody begins to work, and goes on until nothing is left: fewer hand-overs.
const BEGIN_BYTES: usize = 2 * BLOCK_BYTES;

/// What is done with each piece. It may block.
pub(crate) trait Stage: Send + 'static {
    /// Up to here the last pieces take less than handing them over.
    const IN_PLACE_BYTES_MAX: usize = 0;

    fn take(&mut self, piece: &Bytes) -> io::Result<()>;
}

/// See the module's text.
pub(crate) struct Lane<S: Stage> {
    shared: Arc<Shared<S>>,
}

struct Shared<S> {
    queue: Mutex<Queue<S>>,
    /// There is room, or all is done.
    moved: Notify,
}

struct Queue<S> {
    pieces: VecDeque<Bytes>,
    /// Bytes in `pieces` and in work.
    bytes: usize,
    state: State<S>,
}

enum State<S> {
    /// Nobody works.
    Idle(S),
    Busy,
    Failed(io::Error),
}

impl<S: Stage> Lane<S> {
    pub(crate) fn new(stage: S) -> Self {
        let queue = Queue { pieces: VecDeque::new(), bytes: 0, state: State::Idle(stage) };
        Self { shared: Arc::new(Shared { queue: Mutex::new(queue), moved: Notify::new() }) }
    }

    /// Takes the next piece; waits only while four blocks are on their way. After an error there is
    /// nothing to hand pieces to.
    pub(crate) async fn push(&mut self, piece: Bytes) -> io::Result<()> {
        while !self.has_room()? {
            self.shared.moved.notified().await;
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

    fn has_room(&self) -> io::Result<bool> {
        let mut queue = self.shared.queue();
        queue.check()?;
        Ok(queue.bytes < QUEUED_BYTES_MAX)
    }

    /// Asks the stage, once everything that was pushed has been handed to it.
    pub(crate) async fn settled<T>(&mut self, ask: impl FnOnce(&mut S) -> T) -> io::Result<T> {
        loop {
            let begun = {
                let mut queue = self.shared.queue();
                queue.check()?;
                queue.take_in_place()?;
                match queue.begin() {
                    None => {
                        if let State::Idle(stage) = &mut queue.state {
                            return Ok(ask(stage));
                        }
                        None
                    }
                    begun => begun,
                }
            };
            self.work(begun);
            self.shared.moved.notified().await;
        }
    }

    /// Not under the queue's lock: a runtime that ends drops the worker at once, and that locks it.
    fn work(&self, begun: Option<S>) {
        if let Some(stage) = begun {
            let worker = Worker { shared: Arc::clone(&self.shared), ended: false };
            // Not joined: its end is told through the queue, whatever it is.
            spawn_blocking(move || worker.work(stage));
        }
    }
}

impl<S> Shared<S> {
    fn queue(&self) -> MutexGuard<'_, Queue<S>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Stage> Queue<S> {
    /// The stage for a worker, if there is something to do and nobody does.
    fn begin(&mut self) -> Option<S> {
        if self.pieces.is_empty() || !matches!(self.state, State::Idle(_)) {
            return None;
        }
        match mem::replace(&mut self.state, State::Busy) {
            State::Idle(stage) => Some(stage),
            _ => None,
        }
    }

    /// Hands over the little that is left.
    fn take_in_place(&mut self) -> io::Result<()> {
        if self.bytes <= S::IN_PLACE_BYTES_MAX
            && let State::Idle(stage) = &mut self.state
        {
            self.bytes = 0;
            self.pieces.drain(..).try_for_each(|piece| stage.take(&piece))?;
        }
        Ok(())
    }

    /// The error of the stage; the first who asks gets it as it was.
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

/// On the blocking pool. Dropped early, by a panic or the runtime's end, it leaves an error.
struct Worker<S: Stage> {
    shared: Arc<Shared<S>>,
    ended: bool,
}

impl<S: Stage> Worker<S> {
    fn work(mut self, mut stage: S) {
        let mut done = 0;
        loop {
            let piece = {
                let mut queue = self.shared.queue();
                queue.bytes -= done;
                if done > 0 && queue.bytes <= QUEUED_BYTES_MAX / 2 {
                    self.shared.moved.notify_one();
                }
                match queue.pieces.pop_front() {
                    Some(piece) => piece,
                    None => {
                        queue.state = State::Idle(stage);
                        break;
                    }
                }
            };
            done = piece.len();
            if let Err(err) = stage.take(&piece) {
                self.shared.queue().state = State::Failed(err);
                break;
            }
        }
        self.ended = true;
        self.shared.moved.notify_one();
    }
}

impl<S: Stage> Drop for Worker<S> {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.queue().state = State::Failed(io::Error::other("it ended unexpectedly"));
            self.shared.moved.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps what it is given; one byte in it makes it fail, another one panic.
    #[derive(Default)]
    struct Kept(Vec<u8>);

    impl Stage for Kept {
        fn take(&mut self, piece: &Bytes) -> io::Result<()> {
            assert_ne!(piece.first(), Some(&254), "asked to");
            if piece.first() == Some(&255) {
                return Err(io::Error::other("disk on fire"));
            }
            self.0.extend_from_slice(piece);
            Ok(())
        }
    }

    async fn push_until_it_fails(first: u8) -> io::Error {
        let mut lane = Lane::new(Kept::default());
        let piece = Bytes::from(vec![first; BLOCK_BYTES / 3]);
        loop {
            if let Err(err) = lane.push(piece.clone()).await {
                assert!(lane.settled(|_| ()).await.is_err(), "an error stays");
                return err;
            }
        }
    }

    #[tokio::test]
    async fn pieces_arrive_in_order_and_none_waits_for_the_end() {
        let mut lane = Lane::new(Kept::default());
        let mut expected = Vec::new();
        for n in 0..100_u8 {
            let piece = vec![n; usize::from(n) * 1000];
            expected.extend_from_slice(&piece);
            lane.push(piece.into()).await.expect("taken");
            if n % 30 == 0 {
                let so_far = lane.settled(|kept| kept.0.clone()).await.expect("taken");
                assert!(so_far == expected);
            }
        }
        assert!(lane.settled(|kept| mem::take(&mut kept.0)).await.expect("taken") == expected);
    }

    #[tokio::test]
    async fn an_error_or_a_panic_of_the_stage_reaches_whoever_pushes() {
        assert_eq!(push_until_it_fails(255).await.to_string(), "disk on fire");
        assert_eq!(push_until_it_fails(254).await.to_string(), "it ended unexpectedly");
    }

    #[test]
    fn no_more_than_four_blocks_wait_for_a_stage_that_hangs() {
        struct Hangs(std::sync::mpsc::Receiver<()>);
        impl Stage for Hangs {
            fn take(&mut self, _: &Bytes) -> io::Result<()> {
                self.0.recv().map_err(io::Error::other)
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let (go, wait) = std::sync::mpsc::channel();
            let mut lane = Lane::new(Hangs(wait));
            let piece = Bytes::from(vec![1; BLOCK_BYTES / 4]);
            for _ in 0..16 {
                lane.push(piece.clone()).await.expect("there is room");
            }
            let mut next = Box::pin(lane.push(piece));
            assert!(futures_util::poll!(&mut next).is_pending());
            drop(next);
            drop(go);
        });
    }
}
