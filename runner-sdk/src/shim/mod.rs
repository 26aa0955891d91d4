//! The plugin's side of the ABI: connects `extern "C"` with a [`crate::Runner`].
//!
//! `export_runner!` exports [`module`]. Everything else is reached through the table it returns. Every entry
//! catches panics. The author's futures run on a small tokio runtime that belongs to the plugin. The host never
//! polls them.

mod export;
mod logging;
mod manifest;
mod panics;
mod spawn;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    collections::HashMap,
    ffi::c_void,
    ops::Deref,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use serde::Deserialize;
use serde_json::json;
use tokio::{
    runtime::{Handle, Runtime},
    sync::oneshot,
};

use crate::{
    abi::{self, Bytes, Callback, HostRef, Module, ModuleRef, Status, Str, Task},
    author::{
        Call, DynRunner, Error, LeaseEnvelope, Payload, Port, PortError, PortErrorKind, Reply, StopSignal, TaskCtx,
    },
};

pub use export::{Registration, from_config, from_default};
pub use manifest::{ManifestKeys, checked, manifest, manifest_len};
pub use panics::spawn_blocking;
pub(crate) use panics::{Guarded, guard, install_hook};
pub use spawn::{Spawned, spawn};

/// Worker threads of the plugin's runtime. Runners mostly wait. Computations use `spawn_blocking`.
const WORKERS: usize = 2;

static REGISTRATIONS: OnceLock<(&'static str, &'static [Registration])> = OnceLock::new();
static HOST: OnceLock<HostRef> = OnceLock::new();
static PLUGIN: OnceLock<Plugin> = OnceLock::new();

struct Plugin {
    runners: HashMap<&'static str, Arc<dyn DynRunner>>,
    handle: Handle,
    /// `None` after the shutdown.
    runtime: Mutex<Option<Runtime>>,
    tasks: Mutex<HashMap<u64, Arc<StopSignal>>>,
}

/// On drop, ends a task on this side of the boundary, even if its run did not end.
struct Ending {
    plugin: &'static Plugin,
    task: Task,
    signal: Arc<StopSignal>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        lock(&self.plugin.tasks).remove(&self.task.0);
        // This runs after the completion. A context that outlives the run then finds that the task is over.
        self.signal.end();
    }
}

/// The table of this plugin. Called by the exported entry, possibly more than once.
#[must_use]
pub fn module(name: &'static str, registrations: &'static [Registration]) -> ModuleRef {
    use abi_stable::prefix_type::{PrefixRefTrait as _, WithMetadata};
    const TABLE: &WithMetadata<Module> =
        &WithMetadata::new(Module { magic: abi::MAGIC, abi: abi::ABI_VERSION, init, start, cancel, shutdown });
    REGISTRATIONS.get_or_init(|| (name, registrations));
    ModuleRef::from_prefix_ref(TABLE.static_as_prefix())
}

unsafe extern "C" fn init(host: HostRef, config: Str, reply: Callback, user: *mut c_void) {
    let ready = guard(|| {
        // SAFETY: the host lends `config` for the duration of this call.
        let config = unsafe { text(config) };
        prepare(host, config)
    });
    let (status, message) = match ready {
        Ok(Ok(())) => (Status::OK, String::new()),
        Ok(Err(reason)) => (Status::FAILED, reason),
        Err(note) => (Status::PANICKED, format!("{} at {}", note.message, note.place)),
    };
    // SAFETY: `reply` and `user` belong together and are used exactly once, here.
    unsafe { (reply.call)(user, status, owned(message.into_bytes())) };
}

fn prepare(host: HostRef, config: &str) -> Result<(), String> {
    let (name, registrations) = *REGISTRATIONS.get().ok_or("init was called before runner_module_v1")?;
    HOST.set(host).map_err(|_| "init was called twice")?;
    install_hook(Some(report_panic), false);
    logging::install(host.log_level());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name(format!("runner-{name}"))
        .enable_all()
        .build()
        .map_err(|err| format!("the plugin's runtime did not start: {err}"))?;
    let mut runners = HashMap::new();
    let entered = runtime.enter();
    for registration in registrations {
        let runner = (registration.build)(config).map_err(|err| err.chain())?;
        if runners.insert(registration.capability, runner).is_some() {
            return Err(format!("capability {} is exported twice by this library", registration.capability));
        }
    }
    drop(entered);
    let handle = runtime.handle().clone();
    let plugin = Plugin { runners, handle, runtime: Mutex::new(Some(runtime)), tasks: Mutex::default() };
    PLUGIN.set(plugin).map_err(|_| "init was called twice".to_owned())
}

/// Logs a panic through `tracing`, so that the line carries the task whose span the thread is in.
fn report_panic(note: &panics::PanicNote, backtrace: &Backtrace) {
    let place = note.place.as_str();
    if backtrace.status() == BacktraceStatus::Captured {
        let backtrace = backtrace.to_string();
        tracing::error!(target: "panic", place, backtrace, "{}", note.message);
    } else {
        let hint = "set RUST_BACKTRACE=1 to log a backtrace";
        tracing::error!(target: "panic", place, hint, "{}", note.message);
    }
}

/// The plugin's name, for lines that belong to no task.
pub(crate) fn plugin_name() -> &'static str {
    REGISTRATIONS.get().map_or("?", |(name, _)| name)
}

#[derive(Deserialize)]
struct Request {
    capability: String,
    dir: PathBuf,
    lease: LeaseEnvelope,
}

unsafe extern "C" fn start(task: Task, request: Str) {
    let begun = guard(|| {
        // SAFETY: the host lends `request` for the duration of this call.
        let request = unsafe { text(request) };
        begin(task, request)
    });
    match begun {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => complete(task, Status::FAILED, &reason, ""),
        Err(note) => complete(task, Status::PANICKED, &note.message, &place_json(&note.place)),
    }
}

fn begin(task: Task, request: &str) -> Result<(), String> {
    let plugin = PLUGIN.get().ok_or("start was called before init")?;
    let request: Request =
        serde_json::from_str(request).map_err(|err| format!("the host's request does not parse: {err}"))?;
    let runner = plugin.runners.get(request.capability.as_str());
    let runner = runner.ok_or_else(|| format!("this plugin does not serve {}", request.capability))?;
    if lock(&plugin.runtime).is_none() {
        return Err("the plugin has been shut down".to_owned());
    }
    let signal = Arc::new(StopSignal::default());
    lock(&plugin.tasks).insert(task.0, Arc::clone(&signal));
    let ending = Ending { plugin, task, signal: Arc::clone(&signal) };
    // A cancel may have come before the task was in the table. Later ones find it there.
    if already_stopped(task) {
        signal.stop();
    }
    let port = Arc::new(HostPort { task, signal });
    let ctx = TaskCtx::new(request.lease, request.dir, port);
    let dir = ctx.dir();
    let run = async move { runner.run_boxed(ctx).await };
    let attempt = async move {
        let _ending = ending;
        let ended = Guarded::new(run).await;
        // A failure after a missing directory does not count against the runner.
        let without_dir = dir.failure().filter(|_| !matches!(ended, Ok(Ok(()))));
        match ended {
            _ if without_dir.is_some() => complete(task, Status::STORAGE, without_dir.unwrap_or_default(), ""),
            Ok(Ok(())) => complete(task, Status::OK, "", ""),
            // The author's code formats the error, so it may panic too.
            Ok(Err(err)) => {
                if let Err(note) = guard(|| fail(task, &err)) {
                    complete(task, Status::PANICKED, &note.message, &place_json(&note.place));
                }
            }
            Err(note) => complete(task, Status::PANICKED, &note.message, &place_json(&note.place)),
        }
    };
    let attempt = tracing::Instrument::instrument(attempt, logging::task_span(task.0));
    plugin.handle.spawn(attempt);
    Ok(())
}

fn fail(task: Task, err: &Error) {
    let infrastructure = err.port_error().is_some_and(|port| port.kind().is_infrastructure());
    let status = if err.is_invalid_input() {
        Status::INVALID_INPUT
    } else if infrastructure {
        Status::STORAGE
    } else if err.is_retryable() {
        Status::RETRYABLE
    } else {
        Status::FAILED
    };
    let details = match err.details_json() {
        serde_json::Value::Null => String::new(),
        details => details.to_string(),
    };
    complete(task, status, &err.chain(), &details);
}

fn place_json(place: &str) -> String {
    json!({ "place": place }).to_string()
}

unsafe extern "C" fn cancel(task: Task) {
    let _ = guard(|| {
        if let Some(plugin) = PLUGIN.get() {
            if let Some(signal) = lock(&plugin.tasks).get(&task.0) {
                signal.stop();
            }
        }
    });
}

unsafe extern "C" fn shutdown(deadline_ms: u32) {
    let _ = guard(|| {
        if let Some(plugin) = PLUGIN.get() {
            let runtime = lock(&plugin.runtime).take();
            if let Some(runtime) = runtime {
                runtime.shutdown_timeout(Duration::from_millis(u64::from(deadline_ms)));
            }
        }
    });
}

/// Calls of one task, across the boundary.
struct HostPort {
    task: Task,
    signal: Arc<StopSignal>,
}

impl Port for HostPort {
    fn call(&self, call: Call) -> Reply {
        let (sender, answer) = oneshot::channel();
        match HOST.get() {
            Some(host) => dispatch(*host, self.task, call, sender),
            None => {
                let _ = sender.send(Err(PortError::new(PortErrorKind::TaskOver, "there is no host")));
            }
        }
        Box::pin(async move {
            answer.await.unwrap_or_else(|_| Err(PortError::new(PortErrorKind::TaskOver, "the host gave no answer")))
        })
    }

    fn stop_signal(&self) -> &Arc<StopSignal> {
        &self.signal
    }
}

type ReplySender = oneshot::Sender<Result<Payload, PortError>>;

fn dispatch(host: HostRef, task: Task, call: Call, sender: ReplySender) {
    let reply = Callback { call: answered };
    let user = Box::into_raw(Box::new(sender)).cast::<c_void>();
    // SAFETY: every entry of `host` used here is a mandatory one of version 1, or looked up. Borrowed texts live
    // until the call returns, and the host may not use them longer. `user` is the box above, and the host passes it
    // to `reply` exactly once.
    unsafe {
        match &call {
            Call::Progress(json) => host.progress()(task, lend(json), reply, user),
            Call::Event(json) => host.event()(task, lend(json), reply, user),
            Call::CancelReason => host.cancel_reason()(task, reply, user),
            Call::Token => host.token()(task, reply, user),
            Call::Usage(json) => match host.usage() {
                Some(usage) => usage(task, lend(json), reply, user),
                None => (reply.call)(user, Status::UNSUPPORTED, owned(b"this host takes no usage".to_vec())),
            },
            Call::TaskDir => match host.task_dir() {
                Some(task_dir) => task_dir(task, reply, user),
                None => (reply.call)(user, Status::UNSUPPORTED, owned(Vec::new())),
            },
            Call::InputOpen { cid } => host.input_open()(task, lend(cid), reply, user),
            Call::InputRead { stream, max } => host.input_read()(task, *stream, *max, reply, user),
            Call::InputClose { stream } => host.input_close()(task, *stream, reply, user),
            Call::InputFile { cid } => host.input_file()(task, lend(cid), reply, user),
            Call::OutputOpen { spec } => host.output_open()(task, lend(spec), reply, user),
            Call::OutputFinish { stream } => host.output_finish()(task, *stream, reply, user),
            Call::OutputAbort { stream } => host.output_abort()(task, *stream, reply, user),
            Call::OutputFile { spec, path } => host.output_file()(task, lend(spec), lend(path), reply, user),
            Call::OutputWrite { .. } => {
                let Call::OutputWrite { stream, data } = call else { unreachable!("matched above") };
                host.output_write()(task, stream, owned(data), reply, user);
            }
        }
    }
}

/// Receives the host's answer to a call.
unsafe extern "C" fn answered(user: *mut c_void, status: Status, data: Bytes) {
    // SAFETY: the host received `data` from nobody else and hands it over here.
    let data = unsafe { OwnedBytes::new(data) };
    // SAFETY: `user` is the box made in `dispatch`, and the host calls back exactly once.
    let sender = unsafe { Box::from_raw(user.cast::<ReplySender>()) };
    let _ = guard(|| {
        let answer = if status == Status::OK {
            Ok(Payload::Foreign(data))
        } else {
            Err(PortError::new(kind(status), String::from_utf8_lossy(&data).into_owned()))
        };
        let _ = sender.send(answer);
    });
}

fn kind(status: Status) -> PortErrorKind {
    match status {
        Status::NOT_FOUND => PortErrorKind::NotFound,
        Status::BAD_REQUEST => PortErrorKind::BadRequest,
        Status::INVALID_PATH => PortErrorKind::InvalidPath,
        Status::UNAUTHORIZED => PortErrorKind::Unauthorized,
        Status::CONFLICT => PortErrorKind::Conflict,
        Status::SERVER => PortErrorKind::Server,
        Status::NETWORK => PortErrorKind::Network,
        Status::MALFORMED => PortErrorKind::Malformed,
        Status::UNSUPPORTED => PortErrorKind::Unsupported,
        Status::STALE => PortErrorKind::TaskOver,
        Status::LEASE_OVER => PortErrorKind::LeaseOver,
        Status::LOCAL => PortErrorKind::Local,
        Status::LIMIT => PortErrorKind::Limit,
        Status::SETUP => PortErrorKind::Setup,
        _ => PortErrorKind::Other,
    }
}

/// Whether the host wants the task to stop, or has abandoned it.
fn already_stopped(task: Task) -> bool {
    // SAFETY: this is a mandatory entry of version 1, which accepts any number.
    HOST.get().is_some_and(|host| unsafe { host.cancelled()(task) } != 0)
}

fn complete(task: Task, status: Status, text: &str, details: &str) {
    if let Some(host) = HOST.get() {
        // SAFETY: this is a mandatory entry of version 1. The texts live until the call returns. A second
        // completion is answered STALE and has no effect.
        unsafe { host.complete()(task, status, lend(text), lend(details)) };
    }
}

pub(crate) fn send_log(task: u64, level: u32, target: &str, text: &str, fields: &str) {
    if let Some(host) = HOST.get() {
        // SAFETY: this is a mandatory entry of version 1. The texts live until the call returns.
        unsafe { host.log()(Task(task), level, lend(target), lend(text), lend(fields)) };
    }
}

fn lend(text: &str) -> Str {
    Str { ptr: text.as_ptr(), len: text.len() }
}

/// # Safety
/// `text` must point to `len` readable bytes for as long as the result is used.
unsafe fn text<'a>(text: Str) -> &'a str {
    if text.len == 0 {
        return "";
    }
    // SAFETY: the caller guarantees it.
    let bytes = unsafe { std::slice::from_raw_parts(text.ptr, text.len) };
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// Hands a vector over. The other side frees it through `release`.
pub(crate) fn owned(bytes: Vec<u8>) -> Bytes {
    unsafe extern "C" fn release(owner: *mut c_void) {
        // SAFETY: `owner` is the box created below. The contract says that it is released exactly once.
        drop(unsafe { Box::from_raw(owner.cast::<Vec<u8>>()) });
    }
    if bytes.is_empty() {
        return Bytes { ptr: std::ptr::null(), len: 0, owner: std::ptr::null_mut(), release: None };
    }
    let boxed = Box::new(bytes);
    let (ptr, len) = (boxed.as_ptr(), boxed.len());
    Bytes { ptr, len, owner: Box::into_raw(boxed).cast(), release: Some(release) }
}

/// Bytes received across the boundary, released on drop.
pub(crate) struct OwnedBytes(Bytes);

// SAFETY: the contract of `Bytes` allows reading and releasing from any thread. Nothing is written.
unsafe impl Send for OwnedBytes {}
// SAFETY: as above.
unsafe impl Sync for OwnedBytes {}

impl OwnedBytes {
    /// # Safety
    /// `bytes` must be complete, and nobody else may release it.
    unsafe fn new(bytes: Bytes) -> Self {
        Self(bytes)
    }
}

impl Deref for OwnedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        if self.0.len == 0 {
            return &[];
        }
        // SAFETY: the caller of `new` guaranteed complete bytes. They are released only in drop.
        unsafe { std::slice::from_raw_parts(self.0.ptr, self.0.len) }
    }
}

impl Drop for OwnedBytes {
    fn drop(&mut self) {
        if let Some(release) = self.0.release {
            // SAFETY: the caller of `new` guaranteed that nobody else releases the bytes.
            unsafe { release(self.0.owner) };
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
