//! What a host does with the calls of one task: streams, memory budget, directory, limits.
//!
//! This is for hosts, and no part of the API for authors. A node uses it for plugins in its process. The test kit uses
//! it too, so that a runner meets the same limits and errors in a unit test. Start at [`HostCalls::call`]. The
//! [`Backend`] moves the data.
//!
//! Nothing here knows the ABI. Each [`Call`] and each [`Answer`] is a plain value that fits into one message.

mod budget;

use std::{
    collections::HashMap,
    future::{Future, poll_fn},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;

pub use budget::{Budget, Charge, OverBudget};

use crate::{
    abi::{INPUT_KEEP, Status},
    author::{BoxFuture, PortError, PortErrorKind, TimeLeft, Usage},
};

/// Largest progress value, in bytes of JSON.
pub const PROGRESS_BYTES_MAX: usize = 64 * 1024;
/// Largest event, in bytes of JSON.
pub const EVENT_BYTES_MAX: usize = 64 * 1024;
/// Maximum number of streams that one task may hold open.
pub const STREAMS_MAX: usize = 64;
/// Maximum number of calls of one task that may be in progress.
pub const CALLS_MAX: usize = 1024;
/// Largest piece of an input in one answer, in bytes. A runner that asks for more gets this much.
pub const PIECE_BYTES_MAX: u64 = 1024 * 1024;

/// One call of a runner. Texts are UTF-8 and not yet parsed.
#[derive(Debug)]
pub enum Call {
    /// Replaces the progress: JSON.
    Progress(String),
    /// Appends an event: JSON.
    Event(String),
    /// Adds to what the task has used: JSON of a [`Usage`].
    Usage(String),
    /// Asks why the task should stop.
    CancelReason,
    /// Asks for the storage token.
    Token,
    /// Asks how long the task may still run.
    TimeLeft,
    /// Creates the task's directory.
    TaskDir,
    /// Opens an input.
    InputOpen {
        /// An entry of `inputs_cids`.
        cid: String,
        /// 0 or [`INPUT_KEEP`].
        flags: u64,
    },
    /// Reads the next piece of an input.
    InputRead {
        /// The open input.
        stream: u64,
        /// Maximum size of the piece in bytes.
        max: u64,
    },
    /// Closes an input.
    InputClose {
        /// The open input.
        stream: u64,
    },
    /// Brings an input to a file.
    InputFile {
        /// An entry of `inputs_cids`.
        cid: String,
    },
    /// Looks for data.
    InputFind {
        /// JSON with name, data type and ids.
        query: String,
    },
    /// Opens an artifact.
    OutputOpen {
        /// Its path.
        path: String,
        /// Empty, or JSON with name, data type, id and size.
        options: String,
    },
    /// Appends to an artifact.
    OutputWrite {
        /// The open artifact.
        stream: u64,
        /// The next bytes.
        data: Bytes,
    },
    /// Publishes an artifact.
    OutputFinish {
        /// The open artifact.
        stream: u64,
    },
    /// Discards an artifact.
    OutputAbort {
        /// The open artifact.
        stream: u64,
    },
    /// Publishes a file.
    OutputFile {
        /// The artifact's path.
        path: String,
        /// As in `OutputOpen`.
        options: String,
        /// The absolute path of the file.
        file: String,
    },
}

/// The answer to a [`Call`]. The documentation of [`crate::abi::Host`] says what a call answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// A number, such as a stream. 0 if the call answers none.
    pub number: u64,
    /// Bytes, text or JSON.
    pub data: Bytes,
}

/// An answer, or why there is none.
pub type Answered = Result<Answer, PortError>;

/// How a call is answered.
pub enum Called {
    /// At once.
    Now(Answered),
    /// By this future. It ends with `TaskOver` when the calls are closed.
    Later(BoxFuture<'static, Answered>),
}

/// An artifact that a runner asks the host to store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactSpec {
    /// Path relative to the task's outputs prefix.
    pub path: String,
    /// Stored name; derived from the path when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Data type; derived from the extension when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_type: Option<String>,
    /// Id of stored data to replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub existing_id: Option<String>,
    /// Exact size in bytes, if the runner knows it beforehand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// An input that is being read.
pub trait Source: Send {
    /// The store's metadata of it, a JSON object.
    fn meta(&self) -> Value;
    /// Its size in bytes, if the store sends it.
    fn size(&self) -> Option<u64>;
    /// The next piece, of any size above 0. `None` at the end.
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, PortError>>;
}

/// An artifact that is being written. If it is dropped without `finish`, nothing is published.
pub trait Sink: Send {
    /// Writes the next piece. Waits when the store is slower than the runner.
    fn write(&mut self, piece: Bytes) -> BoxFuture<'_, Result<(), PortError>>;
    /// Publishes the artifact and returns its id.
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<Option<String>, PortError>>;
    /// Discards what was written.
    fn abort(self: Box<Self>) -> BoxFuture<'static, ()>;
}

/// Moves the data of one task, and knows its lease.
pub trait Backend: Send + Sync + 'static {
    /// The budget to which bytes in memory are charged.
    fn budget(&self) -> &Budget;
    /// Replaces the progress.
    fn progress(&self, value: Value) -> Result<(), PortError>;
    /// Appends an event. Waits for a free place.
    fn event(&self, value: Value) -> BoxFuture<'_, Result<(), PortError>>;
    /// Adds to what the task has used.
    fn usage(&self, used: Usage);
    /// The word for the cancel reason. Empty if the task should go on.
    fn cancel_reason(&self) -> String;
    /// The storage token and when it expires, in seconds since 1970, or 0.
    fn token(&self) -> BoxFuture<'_, Result<(String, u64), PortError>>;
    /// How long the task may still run.
    fn time_left(&self) -> TimeLeft;
    /// Creates the task's directory unless it exists. May block on the file system.
    fn make_folder(&self) -> Result<(), PortError>;
    /// Opens an input.
    fn open<'a>(&'a self, cid: &'a str) -> BoxFuture<'a, Result<Box<dyn Source>, PortError>>;
    /// Brings an input to a file and returns the JSON about it.
    fn materialize<'a>(&'a self, cid: &'a str) -> BoxFuture<'a, Result<Value, PortError>>;
    /// Looks for data. The source has a line of JSON for each found data.
    fn find<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Box<dyn Source>, PortError>>;
    /// Opens an artifact.
    fn create(&self, spec: ArtifactSpec) -> BoxFuture<'_, Result<Box<dyn Sink>, PortError>>;
    /// Publishes a file and returns its id.
    fn put_file<'a>(&'a self, spec: ArtifactSpec, file: &'a str) -> BoxFuture<'a, Result<Option<String>, PortError>>;
}

/// Answers the calls of one task.
pub struct HostCalls<B> {
    backend: B,
    streams: Mutex<Streams>,
    over: watch::Sender<bool>,
    /// Has one reference for each call in progress, and its own.
    in_progress: Arc<()>,
}

#[derive(Default)]
struct Streams {
    /// `None` while it is being opened.
    open: HashMap<u64, Option<Stream>>,
    last: u64,
}

type Shared<T> = Arc<tokio::sync::Mutex<T>>;

enum Stream {
    Input(Shared<Reading>),
    Output(Shared<Option<Box<dyn Sink>>>),
}

impl Stream {
    fn input(&self) -> Option<Shared<Reading>> {
        if let Self::Input(reading) = self { Some(Arc::clone(reading)) } else { None }
    }

    fn output(&self) -> Option<Shared<Option<Box<dyn Sink>>>> {
        if let Self::Output(writing) = self { Some(Arc::clone(writing)) } else { None }
    }
}

/// A stream that is being opened. It counts as open, so that no more are opened at once than may be open.
struct Opening<B: Backend> {
    calls: Arc<HostCalls<B>>,
    id: u64,
}

impl<B: Backend> Opening<B> {
    fn input(self, source: Box<dyn Source>, kept: Option<Charge>) -> Result<u64, PortError> {
        let reading = Reading { source, rest: Bytes::new(), _kept: kept };
        self.opened(Stream::Input(Arc::new(tokio::sync::Mutex::new(reading))))
    }

    fn opened(self, stream: Stream) -> Result<u64, PortError> {
        // `close` has removed it.
        *self.calls.streams().open.get_mut(&self.id).ok_or_else(task_over)? = Some(stream);
        Ok(self.id)
    }
}

impl<B: Backend> Drop for Opening<B> {
    fn drop(&mut self) {
        let mut streams = self.calls.streams();
        if streams.open.get(&self.id).is_some_and(Option::is_none) {
            streams.open.remove(&self.id);
        }
    }
}

struct Reading {
    source: Box<dyn Source>,
    rest: Bytes,
    /// Set for a caller that keeps the bytes it reads.
    _kept: Option<Charge>,
}

impl<B: Backend> HostCalls<B> {
    /// Answers calls with `backend`.
    pub fn new(backend: B) -> Self {
        Self { backend, streams: Mutex::default(), over: watch::Sender::new(false), in_progress: Arc::new(()) }
    }

    /// What moves the data.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The task is over: closes all streams. Calls in progress and later ones get `TaskOver`.
    pub fn close(&self) {
        self.over.send_replace(true);
        self.streams().open.clear();
    }

    /// Answers a call. The future of a later answer must be driven to its end.
    pub fn call(self: &Arc<Self>, call: Call) -> Called {
        if *self.over.borrow() {
            return Called::Now(Err(task_over()));
        }
        if Arc::strong_count(&self.in_progress) > CALLS_MAX {
            let text = format!("{CALLS_MAX} calls of this task are in progress; wait for answers first");
            return Called::Now(Err(PortError::new(PortErrorKind::Limit, text)));
        }
        self.begin(call).unwrap_or_else(|err| Called::Now(Err(err)))
    }

    fn begin(self: &Arc<Self>, call: Call) -> Result<Called, PortError> {
        let calls = Arc::clone(self);
        Ok(match call {
            Call::Progress(json) => {
                self.backend.progress(parse(&json)?)?;
                nothing()
            }
            Call::Event(json) => {
                let value = parse(&json)?;
                let waits = Box::pin(async move { calls.backend.event(value).await.map(|()| Answer::default()) });
                self.now_or_later(waits)
            }
            Call::Usage(json) => {
                let used: Usage =
                    serde_json::from_str(&json).map_err(|err| bad_request(format!("usage is not valid: {err}")))?;
                if used.usd_cost < 0.0 {
                    return Err(bad_request(format!("usd_cost is {}, expected 0 or more", used.usd_cost)));
                }
                self.backend.usage(used);
                nothing()
            }
            Call::CancelReason => now(self.backend.cancel_reason()),
            Call::Token => self.later(async move {
                let (token, expires) = calls.backend.token().await?;
                Ok(Answer { number: expires, data: token.into() })
            }),
            Call::TimeLeft => {
                let TimeLeft { lease, limit } = self.backend.time_left();
                let ms = |left: Duration| u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
                let (lease_ms, limit_ms) = (lease.map(ms), limit.map(ms));
                let number = lease_ms.into_iter().chain(limit_ms).min().unwrap_or(u64::MAX);
                let data = json!({ "lease_ms": lease_ms, "limit_ms": limit_ms }).to_string().into();
                Called::Now(Ok(Answer { number, data }))
            }
            Call::TaskDir => {
                self.backend.make_folder()?;
                nothing()
            }
            Call::InputOpen { cid, flags } => {
                if flags & !INPUT_KEEP != 0 {
                    let text = format!("input_open has the flags {flags:#x}, this host knows {INPUT_KEEP:#x}");
                    return Err(PortError::new(PortErrorKind::Unsupported, text));
                }
                let opening = self.opening()?;
                self.later(async move { calls.open(&cid, flags & INPUT_KEEP != 0, opening).await })
            }
            Call::InputRead { stream, max } => {
                let reading = self.stream(stream, Stream::input)?;
                self.later(async move { calls.read(reading, max).await })
            }
            Call::InputClose { stream } => {
                self.take(stream, Stream::input)?;
                nothing()
            }
            Call::InputFile { cid } => self.later(async move {
                calls.backend.make_folder()?;
                let file = calls.backend.materialize(&cid).await?;
                Ok(Answer { number: 0, data: file.to_string().into() })
            }),
            Call::InputFind { query } => {
                let opening = self.opening()?;
                self.later(async move {
                    let source = calls.backend.find(&query).await?;
                    let number = opening.input(source, None)?;
                    Ok(Answer { number, data: Bytes::new() })
                })
            }
            Call::OutputOpen { path, options } => {
                let spec = artifact_spec(path, &options)?;
                let opening = self.opening()?;
                self.later(async move {
                    calls.backend.make_folder()?;
                    let sink = calls.backend.create(spec).await?;
                    let number = opening.opened(Stream::Output(Arc::new(tokio::sync::Mutex::new(Some(sink)))))?;
                    Ok(Answer { number, data: Bytes::new() })
                })
            }
            Call::OutputWrite { stream, data } => {
                let writing = self.stream(stream, Stream::output)?;
                self.later(async move {
                    let mut writing = writing.lock().await;
                    let sink = writing.as_mut().ok_or_else(|| wrong_direction(stream))?;
                    if !data.is_empty() {
                        let (size, budget) = (data.len() as u64, calls.backend.budget());
                        let charge = match size > PIECE_BYTES_MAX {
                            true => budget.reserve(size).await.map_err(over_budget)?,
                            false => budget.count(size),
                        };
                        sink.write(charge.tie(data)).await?;
                    }
                    Ok(Answer::default())
                })
            }
            Call::OutputFinish { stream } => {
                let writing = self.take(stream, Stream::output)?;
                self.later(async move {
                    let sink = writing.lock().await.take().ok_or_else(|| wrong_direction(stream))?;
                    Ok(published(sink.finish().await?))
                })
            }
            Call::OutputAbort { stream } => {
                let writing = self.take(stream, Stream::output)?;
                self.later(async move {
                    if let Some(sink) = writing.lock().await.take() {
                        sink.abort().await;
                    }
                    Ok(Answer::default())
                })
            }
            Call::OutputFile { path, options, file } => {
                let spec = artifact_spec(path, &options)?;
                self.later(async move { Ok(published(calls.backend.put_file(spec, &file).await?)) })
            }
        })
    }

    async fn open(&self, cid: &str, keep: bool, opening: Opening<B>) -> Answered {
        let source = self.backend.open(cid).await?;
        let kept = match keep {
            true => Some(self.backend.budget().reserve(source.size().unwrap_or(0)).await.map_err(over_budget)?),
            false => None,
        };
        let data = source.meta().to_string().into();
        let number = opening.input(source, kept)?;
        Ok(Answer { number, data })
    }

    async fn read(&self, reading: Shared<Reading>, max: u64) -> Answered {
        let mut reading = reading.lock().await;
        // An empty answer means the end. Therefore an empty piece is not passed on.
        while reading.rest.is_empty() {
            let Some(piece) = reading.source.next().await? else { break };
            reading.rest = piece;
        }
        let max = usize::try_from(max.clamp(1, PIECE_BYTES_MAX)).expect("a piece fits in memory");
        let take = reading.rest.len().min(max);
        let piece = reading.rest.split_to(take);
        let data = if piece.is_empty() { piece } else { self.backend.budget().count(take as u64).tie(piece) };
        Ok(Answer { number: 0, data })
    }

    /// The answer of `work`, or `TaskOver` when the calls are closed first.
    fn later(&self, work: impl Future<Output = Answered> + Send + 'static) -> Called {
        let (mut over, in_progress) = (self.over.subscribe(), Arc::clone(&self.in_progress));
        Called::Later(Box::pin(async move {
            let _in_progress = in_progress;
            let (mut over, mut work) = (pin!(over.wait_for(|over| *over)), pin!(work));
            poll_fn(|cx| {
                // An error means that the calls were dropped, so the task is over as well.
                if over.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Err(task_over()));
                }
                work.as_mut().poll(cx)
            })
            .await
        }))
    }

    /// For work that usually needs no wait.
    fn now_or_later(&self, mut work: BoxFuture<'static, Answered>) -> Called {
        match work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answer) => Called::Now(answer),
            Poll::Pending => self.later(work),
        }
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opening(self: &Arc<Self>) -> Result<Opening<B>, PortError> {
        let mut streams = self.streams();
        if streams.open.len() >= STREAMS_MAX {
            let text = format!("{STREAMS_MAX} inputs and outputs are open already; close some first");
            return Err(PortError::new(PortErrorKind::Limit, text));
        }
        streams.last += 1;
        let id = streams.last;
        streams.open.insert(id, None);
        Ok(Opening { calls: Arc::clone(self), id })
    }

    /// An open stream of the wanted direction.
    fn stream<T>(&self, id: u64, wanted: fn(&Stream) -> Option<T>) -> Result<T, PortError> {
        match self.streams().open.get(&id) {
            Some(Some(stream)) => wanted(stream).ok_or_else(|| wrong_direction(id)),
            _ => Err(bad_request(format!("stream {id} is not open"))),
        }
    }

    /// The same. The stream is no longer open.
    fn take<T>(&self, id: u64, wanted: fn(&Stream) -> Option<T>) -> Result<T, PortError> {
        let taken = self.stream(id, wanted)?;
        // Of two callers only one gets it.
        self.streams().open.remove(&id).map(|_| taken).ok_or_else(|| bad_request(format!("stream {id} is not open")))
    }
}

/// The status that carries an error of `kind` across the ABI.
#[must_use]
pub fn status_of(kind: PortErrorKind) -> Status {
    KINDS.iter().find(|(known, _)| *known == kind).map_or(Status::OTHER, |(_, status)| *status)
}

/// The kind of the error that `status` carries.
#[must_use]
pub fn kind_of(status: Status) -> PortErrorKind {
    KINDS.iter().find(|(_, known)| *known == status).map_or(PortErrorKind::Other, |(kind, _)| *kind)
}

/// Every kind with its number. A missing pair is `Other`.
const KINDS: [(PortErrorKind, Status); 14] = [
    (PortErrorKind::NotFound, Status::NOT_FOUND),
    (PortErrorKind::BadRequest, Status::BAD_REQUEST),
    (PortErrorKind::InvalidPath, Status::INVALID_PATH),
    (PortErrorKind::Unauthorized, Status::UNAUTHORIZED),
    (PortErrorKind::Conflict, Status::CONFLICT),
    (PortErrorKind::Server, Status::SERVER),
    (PortErrorKind::Network, Status::NETWORK),
    (PortErrorKind::Malformed, Status::MALFORMED),
    (PortErrorKind::Unsupported, Status::UNSUPPORTED),
    (PortErrorKind::TaskOver, Status::STALE),
    (PortErrorKind::LeaseOver, Status::LEASE_OVER),
    (PortErrorKind::Local, Status::LOCAL),
    (PortErrorKind::Limit, Status::LIMIT),
    (PortErrorKind::Setup, Status::SETUP),
];

/// The error of a call for a task that has ended.
#[must_use]
pub fn task_over() -> PortError {
    PortError::new(PortErrorKind::TaskOver, "the task is over")
}

fn bad_request(text: String) -> PortError {
    PortError::new(PortErrorKind::BadRequest, text)
}

fn parse(json: &str) -> Result<Value, PortError> {
    serde_json::from_str(json).map_err(|err| bad_request(format!("expected JSON: {err}")))
}

fn artifact_spec(path: String, options: &str) -> Result<ArtifactSpec, PortError> {
    if options.is_empty() {
        return Ok(ArtifactSpec { path, ..ArtifactSpec::default() });
    }
    #[derive(Deserialize)]
    struct Options {
        name: Option<String>,
        data_type: Option<String>,
        existing_id: Option<String>,
        size: Option<u64>,
    }
    let options = serde_json::from_str(options);
    let Options { name, data_type, existing_id, size } =
        options.map_err(|err| bad_request(format!("expected the options of an artifact: {err}")))?;
    Ok(ArtifactSpec { path, name, data_type, existing_id, size })
}

fn nothing() -> Called {
    Called::Now(Ok(Answer::default()))
}

fn now(data: impl Into<Bytes>) -> Called {
    Called::Now(Ok(Answer { number: 0, data: data.into() }))
}

fn published(id: Option<String>) -> Answer {
    Answer { number: 0, data: id.unwrap_or_default().into() }
}

fn wrong_direction(stream: u64) -> PortError {
    bad_request(format!("stream {stream} is not open in this direction"))
}

#[allow(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn over_budget(err: OverBudget) -> PortError {
    PortError::new(PortErrorKind::Limit, err.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_kinds_survive_the_boundary() {
        for (kind, status) in KINDS {
            assert_eq!((status_of(kind), kind_of(status)), (status, kind));
        }
        assert_eq!((status_of(PortErrorKind::Other), kind_of(Status(9999))), (Status::OTHER, PortErrorKind::Other));
        let numbers: std::collections::BTreeSet<i32> = KINDS.iter().map(|(_, status)| status.0).collect();
        assert_eq!(numbers.len(), KINDS.len(), "each kind has its own number");
        assert!(numbers.iter().all(|number| (64..128).contains(number)), "{numbers:?}");
    }
}
