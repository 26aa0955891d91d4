//! Answers a runner's calls from memory, with the same errors as a real host.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    CancelReason, Usage,
    author::{Call, Payload, Port, PortError, PortErrorKind, Reply, StopSignal},
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
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    inputs: HashMap<String, Vec<u8>>,
    token: Option<String>,
    cancel_after: Option<usize>,
    tokens_max: Option<u64>,
    reason: Option<CancelReason>,
    dir: PathBuf,
    /// Signal of the current run.
    running: Option<Arc<StopSignal>>,
    reading: HashMap<u64, (Vec<u8>, usize)>,
    writing: HashMap<u64, (Spec, Vec<u8>)>,
    records: Records,
}

#[derive(Clone, Deserialize)]
struct Spec {
    path: String,
    name: Option<String>,
    data_type: Option<String>,
    existing_id: Option<String>,
    size: Option<u64>,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self { ids: AtomicU64::new(1), state: Mutex::default() }
    }

    pub(super) fn add_input(&self, cid: &str, bytes: Vec<u8>) {
        self.lock().inputs.insert(cid.to_owned(), bytes);
    }

    pub(super) fn set_token(&self, token: &str) {
        self.lock().token = Some(token.to_owned());
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
        let mut state = self.lock();
        if state.reason.is_some() {
            signal.stop();
        }
        state.dir = dir;
        state.running = Some(Arc::clone(&signal));
        state.records = Records::default();
        Arc::new(Run { memory: Arc::clone(self), signal })
    }

    pub(super) fn end(&self) {
        let mut state = self.lock();
        if let Some(signal) = state.running.take() {
            signal.end();
        }
        state.reading.clear();
        state.writing.clear();
    }

    pub(super) fn records(&self) -> Records {
        std::mem::take(&mut self.lock().records)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, signal: &StopSignal, call: Call) -> Result<Payload, PortError> {
        let mut state = self.lock();
        if signal.is_over() {
            return Err(PortError::new(PortErrorKind::TaskOver, "the task is over"));
        }
        let moves_data =
            !matches!(call, Call::Progress(_) | Call::Event(_) | Call::Usage(_) | Call::CancelReason | Call::TaskDir);
        if moves_data && state.reason == Some(CancelReason::LeaseLost) {
            return Err(PortError::new(PortErrorKind::LeaseOver, "the lease is over"));
        }
        match call {
            Call::Progress(text) => {
                let value = parse(&text)?;
                state.records.progress.push(value);
                if state.cancel_after == Some(state.records.progress.len()) {
                    state.cancel(CancelReason::Plane);
                }
                nothing()
            }
            Call::Event(text) => {
                let value = parse(&text)?;
                state.records.events.push(value);
                nothing()
            }
            Call::Usage(text) => {
                let more: Usage = serde_json::from_value(parse(&text)?).map_err(|err| bad_request(&err.to_string()))?;
                if more.usd_cost < 0.0 {
                    return Err(bad_request("usd_cost is negative"));
                }
                let sum = &mut state.records.usage;
                sum.tokens_in = sum.tokens_in.saturating_add(more.tokens_in);
                sum.tokens_out = sum.tokens_out.saturating_add(more.tokens_out);
                sum.usd_cost += more.usd_cost;
                let used = sum.tokens_in.saturating_add(sum.tokens_out);
                if state.tokens_max.is_some_and(|max| used > max) {
                    state.cancel(CancelReason::Budget);
                }
                nothing()
            }
            Call::CancelReason => Ok(Payload::Local(reason_word(state.reason.as_ref()).into_bytes())),
            Call::Token => match &state.token {
                Some(token) => Ok(Payload::Local(token.clone().into_bytes())),
                None => Err(PortError::new(PortErrorKind::Unsupported, "this task was not granted a token")),
            },
            Call::TaskDir => std::fs::create_dir_all(&state.dir).map_err(local).and_then(|()| nothing()),
            Call::InputOpen { cid } => {
                let bytes = input(&state, &cid)?.clone();
                let stream = self.next_id();
                let answer = json!({ "stream": stream, "cid": cid, "name": cid, "size": bytes.len() });
                state.reading.insert(stream, (bytes, 0));
                reply(&answer)
            }
            Call::InputRead { stream, max } => {
                let (bytes, at) = state.reading.get_mut(&stream).ok_or_else(closed)?;
                let end = bytes.len().min(at.saturating_add(usize::try_from(max).unwrap_or(usize::MAX)));
                let piece = bytes[*at..end].to_vec();
                *at = end;
                Ok(Payload::Local(piece))
            }
            Call::InputClose { stream } => {
                state.reading.remove(&stream);
                nothing()
            }
            Call::InputFile { cid } => {
                let bytes = input(&state, &cid)?.clone();
                let root = state.dir.join(format!("input-{}", self.next_id()));
                let path = root.join("input");
                std::fs::create_dir_all(&root).and_then(|()| std::fs::write(&path, &bytes)).map_err(local)?;
                reply(&json!({ "cid": cid, "name": cid, "size": bytes.len(), "path": path, "root_dir": root }))
            }
            Call::OutputOpen { spec } => {
                let stream = self.next_id();
                state.writing.insert(stream, (checked_spec(&spec)?, Vec::new()));
                reply(&json!({ "stream": stream }))
            }
            Call::OutputWrite { stream, data } => {
                let (_, bytes) = state.writing.get_mut(&stream).ok_or_else(closed)?;
                bytes.extend_from_slice(&data);
                nothing()
            }
            Call::OutputFinish { stream } => {
                let (spec, bytes) = state.writing.remove(&stream).ok_or_else(closed)?;
                if spec.size.is_some_and(|size| size != bytes.len() as u64) {
                    return Err(PortError::new(
                        PortErrorKind::BadRequest,
                        format!(
                            "{}: size {:?} was announced, {} bytes were written",
                            spec.path,
                            spec.size,
                            bytes.len()
                        ),
                    ));
                }
                let id = self.store(&mut state, spec, bytes);
                reply(&json!({ "id": id }))
            }
            Call::OutputAbort { stream } => {
                state.writing.remove(&stream);
                nothing()
            }
            Call::OutputFile { spec, path } => {
                let spec = checked_spec(&spec)?;
                let bytes = std::fs::read(&path).map_err(local)?;
                if bytes.is_empty() {
                    let message = format!("upload of {} refused: its file is empty", spec.path);
                    return Err(PortError::new(PortErrorKind::BadRequest, message));
                }
                let id = self.store(&mut state, spec, bytes);
                reply(&json!({ "id": id }))
            }
        }
    }

    fn store(&self, state: &mut State, spec: Spec, bytes: Vec<u8>) -> String {
        let Spec { path, name, data_type, existing_id, .. } = spec;
        let id = existing_id.clone().unwrap_or_else(|| format!("artifact-{}", self.next_id()));
        state.records.outputs.insert(path, StoredArtifact { bytes, name, data_type, existing_id });
        id
    }

    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }
}

impl State {
    fn cancel(&mut self, reason: CancelReason) {
        self.reason = Some(reason);
        if let Some(signal) = &self.running {
            signal.stop();
        }
    }
}

/// Answers the calls of one run. A context that outlives its run cannot affect the next one.
pub(super) struct Run {
    memory: Arc<Memory>,
    signal: Arc<StopSignal>,
}

impl Port for Run {
    fn call(&self, call: Call) -> Reply {
        let answer = self.memory.answer(&self.signal, call);
        Box::pin(async move { answer })
    }

    fn stop_signal(&self) -> &Arc<StopSignal> {
        &self.signal
    }
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
fn checked_spec(spec: &str) -> Result<Spec, PortError> {
    let mut spec: Spec =
        serde_json::from_str(spec).map_err(|err| PortError::new(PortErrorKind::BadRequest, err.to_string()))?;
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

fn parse(text: &str) -> Result<Value, PortError> {
    serde_json::from_str(text).map_err(|err| PortError::new(PortErrorKind::BadRequest, err.to_string()))
}

fn bad_request(text: &str) -> PortError {
    PortError::new(PortErrorKind::BadRequest, text)
}

fn nothing() -> Result<Payload, PortError> {
    Ok(Payload::Local(Vec::new()))
}

fn reply(value: &Value) -> Result<Payload, PortError> {
    Ok(Payload::Local(value.to_string().into_bytes()))
}

fn closed() -> PortError {
    PortError::new(PortErrorKind::BadRequest, "the stream is closed")
}

#[allow(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn local(err: std::io::Error) -> PortError {
    PortError::new(PortErrorKind::Local, err.to_string())
}
