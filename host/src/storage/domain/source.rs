//! Request bodies that can be sent again: bytes in memory or a range of a file.

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

use crate::{
    storage::file::{BLOCK_BYTES, FileBlocks},
    transport::Body,
};

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

/// When a body moved last, and what went wrong in it on our side.
#[derive(Debug)]
pub(super) struct Pulse {
    last: Mutex<(Instant, bool)>,
    /// Why the file could not be read.
    pub(super) fault: OnceLock<String>,
}

impl Pulse {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { last: Mutex::new((Instant::now(), false)), fault: OnceLock::new() })
    }

    fn beat(&self, whole: bool) {
        *self.last.lock().expect("a pulse is only read and set") = (Instant::now(), whole);
    }

    /// Waits until nothing has moved for `stall`, or nothing has been answered for `answer` after
    /// the body was taken whole.
    pub(super) async fn silent(&self, stall: Duration, answer: Duration) -> Duration {
        loop {
            let (last, whole) = *self.last.lock().expect("a pulse is only read and set");
            let limit = if whole { answer } else { stall };
            if last.elapsed() >= limit {
                return limit;
            }
            tokio::time::sleep_until(last + limit).await;
        }
    }
}

/// The sources one after the other as one body. It beats `pulse` whenever a block is taken.
pub(super) fn body(sources: Vec<Source>, pulse: Arc<Pulse>) -> Body {
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
    let state = (first.map(begin), left, pulse);
    let blocks = stream::unfold(state, move |(mut now, mut left, pulse)| async move {
        loop {
            let block = match &mut now {
                None => {
                    pulse.beat(true);
                    return None;
                }
                Some(Now::Bytes(bytes)) if bytes.is_empty() => Ok(None),
                Some(Now::Bytes(bytes)) => Ok(Some(bytes.split_to(bytes.len().min(BLOCK_BYTES)))),
                Some(Now::Blocks(blocks)) => blocks.next().await,
            };
            match block {
                Ok(Some(block)) => {
                    pulse.beat(false);
                    return Some((Ok(Frame::data(block)), (now, left, pulse)));
                }
                Ok(None) => now = left.next().map(begin),
                Err(err) => {
                    let _ = pulse.fault.set(err.to_string());
                    return Some((Err::<_, io::Error>(err), (None, Vec::new().into_iter(), pulse)));
                }
            }
        }
    });
    StreamBody::new(blocks).boxed_unsync()
}
