//! Repeatable request bodies: bytes in memory or a range of a file.

use std::{
    fs::File,
    io,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::time::Instant;

use crate::{storage::file::FileBlocks, transport::Body};

/// A piece of a request body.
#[derive(Clone, Debug)]
pub(super) enum Source {
    Memory(Bytes),
    File { file: Arc<File>, offset: u64, length: u64 },
}

impl Source {
    pub(super) fn length(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { length, .. } => *length,
        }
    }
}

impl From<Bytes> for Source {
    fn from(bytes: Bytes) -> Self {
        Self::Memory(bytes)
    }
}

/// Bytes of one frame of a body. Small, so that progress is visible on slow connections too.
const FRAME_BYTES: usize = 64 * 1024;
/// Bytes that the buffers of both systems may still hold after the whole body was taken.
const UNSENT_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Progress of a body, and the error of its file.
#[derive(Debug)]
pub(super) struct BodyProgress {
    /// Bytes of the whole body.
    length: u64,
    began: Instant,
    last: Mutex<LastFrame>,
    /// Why the file could not be read.
    pub(super) fault: OnceLock<String>,
}

#[derive(Clone, Copy, Debug)]
struct LastFrame {
    at: Instant,
    /// Bytes taken until then.
    taken: u64,
}

impl BodyProgress {
    /// The progress of a body of `length` bytes.
    pub(super) fn new(length: u64) -> Arc<Self> {
        let began = Instant::now();
        let last = Mutex::new(LastFrame { at: began, taken: 0 });
        Arc::new(Self { length, began, last, fault: OnceLock::new() })
    }

    /// Counts bytes that were taken.
    fn count(&self, bytes: usize) {
        let mut last = self.last.lock().expect("the lock is only held to read or set");
        *last = LastFrame { at: Instant::now(), taken: last.taken + bytes as u64 };
    }

    /// Waits until no bytes were taken for `stall`. After the whole body was taken, the answer has a longer limit. It
    /// is `stall` plus the time for the bytes in the system's buffers at the rate of the earlier bytes.
    pub(super) async fn stalled(&self, stall: Duration) -> Duration {
        loop {
            let last = *self.last.lock().expect("the lock is only held to read or set");
            // A body of known length is not polled after its last byte.
            let limit = match last.taken >= self.length {
                false => stall,
                true => {
                    // The first bytes filled those buffers at once, so they do not show the rate.
                    let measured = last.taken.saturating_sub(UNSENT_BYTES_MAX).max(UNSENT_BYTES_MAX);
                    let unsent = last.taken.min(UNSENT_BYTES_MAX);
                    stall + (last.at - self.began).mul_f64(unsent as f64 / measured as f64)
                }
            };
            if last.at.elapsed() >= limit {
                return limit;
            }
            tokio::time::sleep_until(last.at + limit).await;
        }
    }
}

/// Joins the sources to one body. Each frame that is taken counts in `progress`.
pub(super) fn body(sources: Vec<Source>, progress: Arc<BodyProgress>) -> Body {
    enum Now {
        Bytes(Bytes),
        Blocks(FileBlocks),
    }
    let mut left = sources.into_iter();
    let first = left.next();
    let begin = |source: Source| match source {
        Source::Memory(bytes) => Now::Bytes(bytes),
        Source::File { file, offset, length } => Now::Blocks(FileBlocks::new(file, offset, length)),
    };
    let state = (first.map(begin), left, Bytes::new(), progress);
    let blocks = stream::unfold(state, move |(mut now, mut left, mut block, progress)| async move {
        loop {
            if !block.is_empty() {
                let frame = block.split_to(block.len().min(FRAME_BYTES));
                progress.count(frame.len());
                return Some((Ok(Frame::data(frame)), (now, left, block, progress)));
            }
            let next = match &mut now {
                None => return None,
                Some(Now::Bytes(bytes)) => Ok(Some(std::mem::take(bytes)).filter(|bytes| !bytes.is_empty())),
                Some(Now::Blocks(blocks)) => blocks.next().await,
            };
            match next {
                Ok(Some(next)) => block = next,
                Ok(None) => now = left.next().map(begin),
                Err(err) => {
                    let _ = progress.fault.set(err.to_string());
                    return Some((Err::<_, io::Error>(err), (None, Vec::new().into_iter(), Bytes::new(), progress)));
                }
            }
        }
    });
    StreamBody::new(blocks).boxed_unsync()
}
