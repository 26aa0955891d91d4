//! Answers a runner's calls from memory, with the same errors as a real host.

use std::{
    collections::{BTreeMap, HashMap},
    future::ready,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    CancelReason, TimeLeft, Usage,
    author::{BoxFuture, Port, PortError, PortErrorKind, Reply, StopSignal},
    host_calls::{
        ArtifactSpec, Backend, Budget, Call, Called, EVENT_BYTES_MAX, HostCalls, PROGRESS_BYTES_MAX, Sink, Source,
    },
};

/// An artifact as the test host keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredArtifact {
    /// Its content.
    pub bytes: Vec<u8>,
    /// Name, if the runner set one.
    pub name: Option<String>,
    /// Data type, if the runner set one.
    pub data_type: Option<String>,
    /// Id of the data it replaces, if the runner set one.
    pub existing_id: Option<String>,
}

#[derive(Default)]
pub(super) struct Records {
    pub(super) outputs: BTreeMap<String, StoredArtifact>,
    pub(super) progress: Vec<Value>,
    pub(super) events: Vec<Value>,
    pub(super) usage: Usage,
}

pub(super) struct Memory {
    ids: AtomicU64,
    budget: Mutex<Budget>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    inputs: HashMap<String, Vec<u8>>,
    /// What a query finds, in order.
    stored: Vec<Value>,
    time_left: TimeLeft,
    token: Option<String>,
    cancel_after: Option<usize>,
    tokens_max: Option<u64>,
    reason: Option<CancelReason>,
    dir: PathBuf,
    /// The current run.
    running: Option<Arc<Run>>,
    records: Records,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self { ids: AtomicU64::new(1), budget: Mutex::new(Budget::unlimited()), state: Mutex::default() }
    }

    pub(super) fn add_input(&self, cid: &str, bytes: Vec<u8>) {
        self.lock().inputs.insert(cid.to_owned(), bytes);
    }

    pub(super) fn add_stored(&self, id: &str, name: &str, data_type: &str, bytes: Vec<u8>) {
        let found = json!({ "id": id, "name": name, "data_type": data_type, "size": bytes.len() });
        let mut state = self.lock();
        state.stored.push(found);
        state.inputs.insert(id.to_owned(), bytes);
    }

    pub(super) fn set_time_left(&self, left: TimeLeft) {
        self.lock().time_left = left;
    }

    pub(super) fn set_token(&self, token: &str) {
        self.lock().token = Some(token.to_owned());
    }

    pub(super) fn set_budget(&self, bytes: u64) {
        *self.budget.lock().unwrap_or_else(PoisonError::into_inner) = Budget::new(bytes);
    }

    pub(super) fn set_tokens_max(&self, max: u64) {
        self.lock().tokens_max = Some(max);
    }

    pub(super) fn cancel_after_progress(&self, count: usize) {
        self.lock().cancel_after = Some(count);
    }

    pub(super) fn cancel(&self, reason: CancelReason) {
        self.lock().cancel(reason);
    }

    /// Begins a run and returns what answers its calls.
    pub(super) fn begin(self: &Arc<Self>, dir: PathBuf) -> Arc<Run> {
        let signal = Arc::new(StopSignal::default());
        let budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let calls = Arc::new(HostCalls::new(InMemory { memory: Arc::clone(self), budget }));
        let run = Arc::new(Run { calls, signal });
        let mut state = self.lock();
        if state.reason.is_some() {
            run.signal.stop();
        }
        state.dir = dir;
        state.running = Some(Arc::clone(&run));
        state.records = Records::default();
        run
    }

    pub(super) fn end(&self) {
        let ended = self.lock().running.take();
        if let Some(run) = ended {
            run.signal.end();
            run.calls.close();
        }
    }

    pub(super) fn records(&self) -> Records {
        std::mem::take(&mut self.lock().records)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a lost lease no data moves.
    fn lock_for_data(&self) -> Result<std::sync::MutexGuard<'_, State>, PortError> {
        let state = self.lock();
        if state.reason == Some(CancelReason::LeaseLost) {
            return Err(PortError::new(PortErrorKind::LeaseOver, "the lease is over"));
        }
        Ok(state)
    }

    fn store(&self, spec: ArtifactSpec, bytes: Vec<u8>) -> Result<Option<String>, PortError> {
        let mut state = self.lock_for_data()?;
        let ArtifactSpec { path, name, data_type, existing_id, .. } = spec;
        let id = existing_id.clone().unwrap_or_else(|| format!("artifact-{}", self.next_id()));
        state.records.outputs.insert(path, StoredArtifact { bytes, name, data_type, existing_id });
        Ok(Some(id))
    }

    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }
}

impl State {
    fn cancel(&mut self, reason: CancelReason) {
        self.reason = Some(reason);
        if let Some(run) = &self.running {
            run.signal.stop();
        }
    }
}

/// Answers the calls of one run. A context that outlives its run cannot affect the next one.
pub(super) struct Run {
    calls: Arc<HostCalls<InMemory>>,
    signal: Arc<StopSignal>,
}

impl Port for Run {
    fn call(&self, call: Call) -> Reply {
        match self.calls.call(call) {
            Called::Now(answer) => Box::pin(ready(answer)),
            // Begins the work. It waits only for memory.
            Called::Later(mut work) => match work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(answer) => Box::pin(ready(answer)),
                Poll::Pending => work,
            },
        }
    }

    fn tell(&self, call: Call) {
        drop(self.call(call));
    }

    fn stop_signal(&self) -> &Arc<StopSignal> {
        &self.signal
    }
}

/// Moves the data of one run.
struct InMemory {
    memory: Arc<Memory>,
    budget: Budget,
}

impl Backend for InMemory {
    fn budget(&self) -> &Budget {
        &self.budget
    }

    fn progress(&self, value: Value) -> Result<(), PortError> {
        bounded("progress", &value, PROGRESS_BYTES_MAX)?;
        let mut state = self.memory.lock();
        state.records.progress.push(value);
        if state.cancel_after == Some(state.records.progress.len()) {
            state.cancel(CancelReason::Plane);
        }
        Ok(())
    }

    fn event(&self, value: Value) -> BoxFuture<'_, Result<(), PortError>> {
        let kept = bounded("event", &value, EVENT_BYTES_MAX);
        if kept.is_ok() {
            self.memory.lock().records.events.push(value);
        }
        Box::pin(ready(kept))
    }

    fn usage(&self, more: Usage) {
        let mut state = self.memory.lock();
        let sum = &mut state.records.usage;
        sum.tokens_in = sum.tokens_in.saturating_add(more.tokens_in);
        sum.tokens_out = sum.tokens_out.saturating_add(more.tokens_out);
        sum.usd_cost += more.usd_cost;
        let used = sum.tokens_in.saturating_add(sum.tokens_out);
        if state.tokens_max.is_some_and(|max| used > max) {
            state.cancel(CancelReason::Budget);
        }
    }

    fn cancel_reason(&self) -> String {
        reason_word(self.memory.lock().reason.as_ref())
    }

    fn token(&self) -> BoxFuture<'_, Result<(String, u64), PortError>> {
        let token = self.memory.lock_for_data().and_then(|state| {
            let refused = || PortError::new(PortErrorKind::Unsupported, "this task was not granted a token");
            Ok((state.token.clone().ok_or_else(refused)?, 0))
        });
        Box::pin(ready(token))
    }

    fn time_left(&self) -> TimeLeft {
        self.memory.lock().time_left
    }

    fn make_folder(&self) -> Result<(), PortError> {
        std::fs::create_dir_all(&self.memory.lock().dir).map_err(local)
    }

    fn open<'a>(&'a self, cid: &'a str) -> BoxFuture<'a, Result<Box<dyn Source>, PortError>> {
        let opened = self.memory.lock_for_data().and_then(|state| {
            let bytes = Bytes::from(input(&state, cid)?.clone());
            let size = bytes.len() as u64;
            let source: Box<dyn Source> = Box::new(Reading { cid: cid.to_owned(), size, rest: Some(bytes) });
            Ok(source)
        });
        Box::pin(ready(opened))
    }

    fn materialize<'a>(&'a self, cid: &'a str) -> BoxFuture<'a, Result<Value, PortError>> {
        let file = self.memory.lock_for_data().and_then(|state| {
            let bytes = input(&state, cid)?;
            let root = state.dir.join(format!("input-{}", self.memory.next_id()));
            let path = root.join("input");
            std::fs::create_dir_all(&root).and_then(|()| std::fs::write(&path, bytes)).map_err(local)?;
            Ok(json!({ "cid": cid, "name": cid, "size": bytes.len(), "path": path, "root_dir": root }))
        });
        Box::pin(ready(file))
    }

    fn find<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Box<dyn Source>, PortError>> {
        let found = self.memory.lock_for_data().and_then(|state| {
            let query: Query = serde_json::from_str(query).map_err(|err| bad_request(err.to_string()))?;
            let matching = state.stored.iter().filter(|data| query.matches(data));
            let lines: String = matching.map(|data| format!("{data}\n")).collect();
            let size = lines.len() as u64;
            let rest = Some(Bytes::from(lines)).filter(|lines| !lines.is_empty());
            let source: Box<dyn Source> = Box::new(Reading { cid: String::new(), size, rest });
            Ok(source)
        });
        Box::pin(ready(found))
    }

    fn create(&self, spec: ArtifactSpec) -> BoxFuture<'_, Result<Box<dyn Sink>, PortError>> {
        let created = self.memory.lock_for_data().and_then(|_state| {
            let memory = Arc::clone(&self.memory);
            let sink: Box<dyn Sink> = Box::new(Writing { memory, spec: checked_spec(spec)?, bytes: Vec::new() });
            Ok(sink)
        });
        Box::pin(ready(created))
    }

    fn put_file<'a>(&'a self, spec: ArtifactSpec, file: &'a str) -> BoxFuture<'a, Result<Option<String>, PortError>> {
        let put = || {
            let spec = checked_spec(spec)?;
            let bytes = std::fs::read(file).map_err(local)?;
            if bytes.is_empty() {
                return Err(bad_request(format!("upload of {} refused: its file is empty", spec.path)));
            }
            self.memory.store(spec, bytes)
        };
        Box::pin(ready(put()))
    }
}

/// A query of a runner.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Query {
    name: Option<String>,
    data_type: Option<String>,
    ids: Option<Vec<String>>,
}

impl Query {
    fn matches(&self, data: &Value) -> bool {
        let same = |wanted: &Option<String>, key: &str| wanted.as_deref().is_none_or(|wanted| data[key] == wanted);
        let listed = |ids: &Vec<String>| ids.iter().any(|id| data["id"] == **id);
        same(&self.name, "name") && same(&self.data_type, "data_type") && self.ids.as_ref().is_none_or(listed)
    }
}

/// An input that is being read.
struct Reading {
    cid: String,
    size: u64,
    rest: Option<Bytes>,
}

impl Source for Reading {
    fn meta(&self) -> Value {
        json!({ "cid": self.cid, "name": self.cid, "size": self.size })
    }

    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, PortError>> {
        Box::pin(ready(Ok(self.rest.take())))
    }
}

/// An artifact that is being written.
struct Writing {
    memory: Arc<Memory>,
    spec: ArtifactSpec,
    bytes: Vec<u8>,
}

impl Sink for Writing {
    fn write(&mut self, piece: Bytes) -> BoxFuture<'_, Result<(), PortError>> {
        self.bytes.extend_from_slice(&piece);
        Box::pin(ready(Ok(())))
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<Option<String>, PortError>> {
        let Self { memory, spec, bytes } = *self;
        let wrong = spec.size.filter(|size| *size != bytes.len() as u64);
        Box::pin(ready(match wrong {
            Some(size) => Err(bad_request(format!(
                "{}: size {size} was announced, {} bytes were written",
                spec.path,
                bytes.len()
            ))),
            None => memory.store(spec, bytes),
        }))
    }

    fn abort(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(ready(()))
    }
}

/// Refuses a value that a real host would refuse for its size.
fn bounded(what: &str, value: &Value, max: usize) -> Result<(), PortError> {
    let bytes = value.to_string().len();
    if bytes <= max {
        return Ok(());
    }
    Err(PortError::new(PortErrorKind::Limit, format!("{what} is {bytes} bytes of JSON, at most {max} are allowed")))
}

fn reason_word(reason: Option<&CancelReason>) -> String {
    match reason {
        None => String::new(),
        Some(CancelReason::Plane) => "plane".to_owned(),
        Some(CancelReason::LeaseLost) => "lease-lost".to_owned(),
        Some(CancelReason::Drained) => "drained".to_owned(),
        Some(CancelReason::Deadline) => "deadline".to_owned(),
        Some(CancelReason::Budget) => "budget".to_owned(),
        Some(CancelReason::Operator) => "operator".to_owned(),
        Some(CancelReason::TaskOver) => "task-over".to_owned(),
        Some(CancelReason::Other(word)) => word.clone(),
    }
}

fn input<'a>(state: &'a State, cid: &str) -> Result<&'a Vec<u8>, PortError> {
    let found = state.inputs.get(cid.trim());
    found.ok_or_else(|| PortError::new(PortErrorKind::NotFound, format!("input {cid}: not found (404)")))
}

/// The rules of a real store: see `ArtifactSink`.
fn checked_spec(mut spec: ArtifactSpec) -> Result<ArtifactSpec, PortError> {
    if spec.path.len() > 1024 || spec.path.contains('\0') || spec.path.split('/').any(|segment| segment == "..") {
        return Err(PortError::new(
            PortErrorKind::InvalidPath,
            "artifact path has a `..` segment, a NUL, or more than 1024 bytes",
        ));
    }
    let segments: Vec<&str> = spec.path.split('/').filter(|segment| !segment.is_empty()).collect();
    spec.path = segments.join("/");
    Ok(spec)
}

fn bad_request(text: String) -> PortError {
    PortError::new(PortErrorKind::BadRequest, text)
}

#[allow(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn local(err: std::io::Error) -> PortError {
    PortError::new(PortErrorKind::Local, err.to_string())
}
