//! The interface between the author's API and the host or test kit that runs the task.

use std::{ops::Deref, sync::Arc};

use super::{BoxFuture, PortError, StopSignal};

/// One request to the host: one frame, and at most one file path.
#[derive(Debug)]
pub(crate) enum Call {
    Progress(String),
    Event(String),
    CancelReason,
    Token,
    Usage(String),
    TaskDir,
    InputOpen { cid: String },
    InputRead { stream: u64, max: u64 },
    InputClose { stream: u64 },
    InputFile { cid: String },
    OutputOpen { spec: String },
    OutputWrite { stream: u64, data: Vec<u8> },
    OutputFinish { stream: u64 },
    OutputAbort { stream: u64 },
    OutputFile { spec: String, path: String },
}

/// The answer to a [`Call`].
pub(crate) type Reply = BoxFuture<'static, Result<Payload, PortError>>;

/// Answers calls for one task.
pub(crate) trait Port: Send + Sync {
    /// Begins the call at once, even if the returned future is never polled.
    fn call(&self, call: Call) -> Reply;
    /// Set once the task should stop, and at its end.
    fn stop_signal(&self) -> &Arc<StopSignal>;
}

/// Bytes of an answer, from either allocator.
pub(crate) enum Payload {
    /// Allocated by the host, freed by it on drop.
    Foreign(crate::shim::OwnedBytes),
    /// Allocated here.
    Local(Vec<u8>),
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Foreign(bytes) => bytes,
            Self::Local(bytes) => bytes,
        }
    }
}

impl Payload {
    /// The bytes as a vector. Bytes that the host allocated are copied.
    pub(crate) fn into_vec(self) -> Vec<u8> {
        match self {
            Self::Foreign(bytes) => bytes.to_vec(),
            Self::Local(bytes) => bytes,
        }
    }
}
