//! The plugin's side of the ABI: connects `extern "C"` with a [`crate::Runner`].
//!
//! `export_runner!` exports [`module`]. Everything else is reached through the table it returns. Every entry
//! catches panics. The author's futures run on a small tokio runtime that belongs to the plugin. The host never
//! polls them.

mod blocked;
mod export;
mod logging;
mod manifest;
mod panics;
mod spawn;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    collections::HashMap,
    ffi::c_void,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use serde_json::json;
use tokio::{
    runtime::{Handle, Runtime},
    sync::oneshot,
};

use crate::{
    abi::{
        self, Callback, CreateRequest, End, HostRef, HostWord, Instance, Module, ModuleRef, ModuleTable, StartRequest,
        Status, Str, Table, Task,
    },
    author::{DynRunner, Error, LeaseEnvelope, Port, PortError, PortErrorKind, Reply, StopSignal, TaskCtx},
    host_calls::{Answer, Answered, Call, kind_of},
};

use blocked::Workers;
pub use export::{Registration, from_config, from_default};
pub use manifest::{ManifestKeys, checked, manifest, manifest_len};
pub use panics::spawn_blocking;
pub(crate) use panics::{Guarded, guard, install_hook};
pub use spawn::{Spawned, spawn};

/// Worker threads of an instance's runtime. Runners mostly wait. Computations use `spawn_blocking`.
const WORKERS: usize = 2;

/// The runners of this library.
static REGISTRATIONS: OnceLock<&'static [Registration]> = OnceLock::new();
/// The instances of this library that are not shut down.
static PLUGINS: RwLock<Vec<Arc<Plugin>>> = RwLock::new(Vec::new());

/// One instance of this library.
pub(crate) struct Plugin {
    /// The number that the host uses for it.
    number: u64,
    host: Host,
    log_level: AtomicU32,
    runners: HashMap<&'static str, Arc<dyn DynRunner>>,
    handle: Handle,
    workers: Arc<Workers>,
    /// `None` after the shutdown.
    runtime: Mutex<Option<Runtime>>,
    tasks: Mutex<HashMap<u64, Arc<StopSignal>>>,
}

/// The host of one instance.
#[derive(Clone, Copy)]
struct Host {
    api: HostRef,
    word: HostWord,
}

/// On drop, ends a task on this side of the boundary, even if its run did not end.
struct Ending {
    plugin: Arc<Plugin>,
    task: Task,
    run: u64,
    signal: Arc<StopSignal>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        lock(&self.plugin.tasks).remove(&self.task.0);
        logging::forget(self.run);
        // This runs after the completion. A context that outlives the run then finds that the task is over.
        self.signal.end();
    }
}

/// The table of this plugin. Called by the exported entry, possibly more than once.
#[must_use]
pub fn module(registrations: &'static [Registration]) -> &'static ModuleTable {
    static TABLE: ModuleTable = ModuleTable {
        magic: abi::MAGIC,
        abi: abi::ABI_VERSION,
        table: Table { present: abi::MODULE_MASK, reserved: 0, entries: ENTRIES },
    };
    REGISTRATIONS.get_or_init(|| registrations);
    &TABLE
}

const ENTRIES: Module = Module { create, start, cancel, shutdown, log_level };

/// What abi_stable describes as this library's root module: the same entries as in [`module`].
#[must_use]
pub fn described() -> ModuleRef {
    use abi_stable::prefix_type::{PrefixRefTrait as _, WithMetadata};
    const TABLE: &WithMetadata<Module> = &WithMetadata::new(ENTRIES);
    ModuleRef::from_prefix_ref(TABLE.static_as_prefix())
}

unsafe extern "C" fn create(
    api: HostRef,
    word: HostWord,
    request: *const CreateRequest,
    reply: Callback,
    user: *mut c_void,
) {
    let created = guard(|| {
        // SAFETY: the host lends the request for the duration of this call. A host of this major version knows all
        // fields that are read here.
        let request = unsafe { CreateArguments::read(request) };
        prepare(Host { api, word }, request)
    });
    let (status, number, message) = match created {
        Ok(Ok(number)) => (Status::OK, number, String::new()),
        Ok(Err(reason)) => (Status::OTHER, 0, reason),
        Err(note) => (Status::PANICKED, 0, format!("{} at {}", note.message, note.place)),
    };
    if let Some(call) = reply.call {
        // SAFETY: `reply` and `user` belong together and are used exactly once, here.
        unsafe { call(user, status, number, owned(message.into())) };
    }
}

/// What a [`CreateRequest`] lends.
struct CreateArguments<'a> {
    name: &'a str,
    log_level: u32,
    config: &'a str,
    capabilities: Vec<&'a str>,
}

impl<'a> CreateArguments<'a> {
    /// The request of an older host is shorter than its type, so there must be no reference to all of it.
    ///
    /// # Safety
    /// Everything in `request` must be readable for as long as the result is used.
    unsafe fn read(request: *const CreateRequest) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                name: text((*request).name),
                log_level: (*request).log_level,
                config: text((*request).config),
                capabilities: texts((*request).capabilities, (*request).capabilities_len),
            }
        }
    }
}

/// Makes an instance and returns its number.
fn prepare(host: Host, request: CreateArguments<'_>) -> Result<u64, String> {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let registrations = *REGISTRATIONS.get().ok_or("create was called before the exported entry")?;
    install_hook(Some(report_panic), false);
    logging::install(request.log_level);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name(format!("runner-{}", request.name))
        .enable_all()
        .build()
        .map_err(|err| format!("the plugin's runtime did not start: {err}"))?;
    let mut runners = HashMap::new();
    let entered = runtime.enter();
    for registration in registrations {
        if !request.capabilities.contains(&registration.capability) {
            continue;
        }
        let runner = (registration.build)(request.config).map_err(|err| err.chain())?;
        if runners.insert(registration.capability, runner).is_some() {
            return Err(format!("capability {} is exported twice by this library", registration.capability));
        }
    }
    drop(entered);
    let number = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    let handle = runtime.handle().clone();
    let workers = Workers::new(&handle, blocked::INTERVAL, blocked::report);
    let plugin = Arc::new(Plugin {
        number,
        host,
        log_level: AtomicU32::new(request.log_level),
        runners,
        handle,
        workers,
        runtime: Mutex::new(Some(runtime)),
        tasks: Mutex::default(),
    });
    write_plugins().push(plugin);
    apply_log_level();
    Ok(number)
}

fn plugin(instance: Instance) -> Option<Arc<Plugin>> {
    let plugins = PLUGINS.read().unwrap_or_else(PoisonError::into_inner);
    plugins.iter().find(|plugin| plugin.number == instance.0).cloned()
}

fn write_plugins() -> std::sync::RwLockWriteGuard<'static, Vec<Arc<Plugin>>> {
    PLUGINS.write().unwrap_or_else(PoisonError::into_inner)
}

/// The log bridge belongs to the library. It passes on what the most verbose instance wants.
fn apply_log_level() {
    let plugins = PLUGINS.read().unwrap_or_else(PoisonError::into_inner);
    let level = plugins.iter().map(|plugin| plugin.log_level.load(Ordering::Relaxed)).max();
    logging::set_level(level.unwrap_or(0));
}

unsafe extern "C" fn log_level(instance: Instance, level: u32) {
    let _ = guard(|| {
        if let Some(plugin) = plugin(instance) {
            plugin.log_level.store(level, Ordering::Relaxed);
            apply_log_level();
        }
    });
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

unsafe extern "C" fn start(instance: Instance, task: Task, request: *const StartRequest) {
    let Ok(Some(plugin)) = guard(|| plugin(instance)) else { return };
    let begun = guard(|| {
        // SAFETY: the host lends the request for the duration of this call. A host of this major version knows all
        // fields that are read here.
        // As in `CreateArguments::read`, there is no reference to all of the request.
        let task_to_start = unsafe {
            StartArguments {
                capability: text((*request).capability),
                dir: text((*request).dir),
                traceparent: text((*request).traceparent),
                lease: text((*request).lease),
            }
        };
        begin(&plugin, task, task_to_start)
    });
    match begun {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => plugin.host.complete(task, End::FAILED, &reason, ""),
        Err(note) => plugin.host.complete(task, End::PANICKED, &note.message, &place_json(&note.place)),
    }
}

/// What the SDK reads of a [`StartRequest`].
struct StartArguments<'a> {
    capability: &'a str,
    dir: &'a str,
    traceparent: &'a str,
    lease: &'a str,
}

fn begin(plugin: &Arc<Plugin>, task: Task, request: StartArguments<'_>) -> Result<(), String> {
    let StartArguments { capability, dir, traceparent, lease } = request;
    let lease: LeaseEnvelope =
        serde_json::from_str(lease).map_err(|err| format!("the host's lease does not parse: {err}"))?;
    let runner = plugin.runners.get(capability);
    let runner = Arc::clone(runner.ok_or_else(|| format!("this plugin does not serve {capability}"))?);
    if lock(&plugin.runtime).is_none() {
        return Err("the plugin has been shut down".to_owned());
    }
    let signal = Arc::new(StopSignal::default());
    lock(&plugin.tasks).insert(task.0, Arc::clone(&signal));
    let run = logging::remember(plugin, task);
    let ending = Ending { plugin: Arc::clone(plugin), task, run, signal: Arc::clone(&signal) };
    let host = plugin.host;
    // A cancel may have come before the task was in the table. Later ones find it there.
    if host.wants_stop(task) {
        signal.stop();
    }
    let port = Arc::new(HostPort { host, task, signal });
    let ctx = TaskCtx::new(lease, PathBuf::from(dir), traceparent, port);
    let dir = ctx.dir();
    let work = async move { runner.run_boxed(ctx).await };
    let attempt = async move {
        let _ending = ending;
        let ended = Guarded::new(work).await;
        // A failure after a missing directory does not count against the runner.
        let without_dir = dir.failure().filter(|_| !matches!(ended, Ok(Ok(()))));
        match ended {
            _ if without_dir.is_some() => host.complete(task, End::STORAGE, without_dir.unwrap_or_default(), ""),
            Ok(Ok(())) => host.complete(task, End::OK, "", ""),
            // The author's code formats the error, so it may panic too.
            Ok(Err(err)) => {
                if let Err(note) = guard(|| fail(host, task, &err)) {
                    host.complete(task, End::PANICKED, &note.message, &place_json(&note.place));
                }
            }
            Err(note) => host.complete(task, End::PANICKED, &note.message, &place_json(&note.place)),
        }
    };
    let attempt = tracing::Instrument::instrument(attempt, logging::task_span(run));
    plugin.handle.spawn(Arc::clone(&plugin.workers).drive(run, attempt));
    Ok(())
}

fn fail(host: Host, task: Task, err: &Error) {
    let infrastructure = err.port_error().is_some_and(|port| port.kind().is_infrastructure());
    let end = if err.is_invalid_input() {
        End::INVALID_INPUT
    } else if infrastructure {
        End::STORAGE
    } else if err.is_retryable() {
        End::RETRYABLE
    } else {
        End::FAILED
    };
    let details = match err.details_json() {
        serde_json::Value::Null => String::new(),
        details => details.to_string(),
    };
    host.complete(task, end, &err.chain(), &details);
}

fn place_json(place: &str) -> String {
    json!({ "place": place }).to_string()
}

unsafe extern "C" fn cancel(instance: Instance, task: Task) {
    let _ = guard(|| {
        if let Some(signal) = plugin(instance).and_then(|plugin| lock(&plugin.tasks).get(&task.0).cloned()) {
            signal.stop();
        }
    });
}

unsafe extern "C" fn shutdown(instance: Instance, deadline_ms: u32) {
    let _ = guard(|| {
        let Some(plugin) = plugin(instance) else { return };
        let runtime = lock(&plugin.runtime).take();
        if let Some(runtime) = runtime {
            runtime.shutdown_timeout(Duration::from_millis(u64::from(deadline_ms)));
        }
        write_plugins().retain(|other| other.number != instance.0);
        apply_log_level();
    });
}

/// Calls of one task, across the boundary.
struct HostPort {
    host: Host,
    task: Task,
    signal: Arc<StopSignal>,
}

impl Port for HostPort {
    fn call(&self, call: Call) -> Reply {
        let (sender, answer) = oneshot::channel();
        let user = Box::into_raw(Box::<ReplySender>::new(sender)).cast::<c_void>();
        self.host.call(self.task, call, Callback { call: Some(answered) }, user);
        Box::pin(async move {
            answer.await.unwrap_or_else(|_| Err(PortError::new(PortErrorKind::TaskOver, "the host gave no answer")))
        })
    }

    fn tell(&self, call: Call) {
        self.host.call(self.task, call, Callback { call: None }, std::ptr::null_mut());
    }

    fn stop_signal(&self) -> &Arc<StopSignal> {
        &self.signal
    }
}

type ReplySender = oneshot::Sender<Answered>;

impl Host {
    fn call(self, task: Task, call: Call, reply: Callback, user: *mut c_void) {
        let Self { api, word } = self;
        // SAFETY: every entry used here is a mandatory one of this major version. Borrowed texts live until the call
        // returns, and the host may not use them longer. The host passes `user` to `reply` exactly once.
        unsafe {
            match call {
                Call::Progress(json) => api.progress()(word, task, lend(&json), reply, user),
                Call::Event(json) => api.event()(word, task, lend(&json), reply, user),
                Call::Usage(json) => api.usage()(word, task, lend(&json), reply, user),
                Call::CancelReason => api.cancel_reason()(word, task, reply, user),
                Call::Token => api.token()(word, task, reply, user),
                Call::TimeLeft => api.time_left()(word, task, reply, user),
                Call::TaskDir => api.task_dir()(word, task, reply, user),
                Call::InputOpen { cid, flags } => api.input_open()(word, task, lend(&cid), flags, reply, user),
                Call::InputRead { stream, max } => api.input_read()(word, task, stream, max, reply, user),
                Call::InputClose { stream } => api.input_close()(word, task, stream, reply, user),
                Call::InputFile { cid } => api.input_file()(word, task, lend(&cid), reply, user),
                Call::InputFind { query } => api.input_find()(word, task, lend(&query), reply, user),
                Call::OutputOpen { path, options } => {
                    api.output_open()(word, task, lend(&path), lend(&options), reply, user);
                }
                Call::OutputWrite { stream, data } => {
                    api.output_write()(word, task, stream, owned(data), reply, user);
                }
                Call::OutputFinish { stream } => api.output_finish()(word, task, stream, reply, user),
                Call::OutputAbort { stream } => api.output_abort()(word, task, stream, reply, user),
                Call::OutputFile { path, options, file } => {
                    api.output_file()(word, task, lend(&path), lend(&options), lend(&file), reply, user);
                }
            }
        }
    }

    /// Whether the host wants the task to stop, or has abandoned it.
    fn wants_stop(self, task: Task) -> bool {
        // SAFETY: this is a mandatory entry of this major version, which accepts any number.
        unsafe { self.api.cancelled()(self.word, task) != 0 }
    }

    fn complete(self, task: Task, end: End, text: &str, details: &str) {
        // SAFETY: this is a mandatory entry of this major version. The texts live until the call returns. A second
        // completion is answered STALE and has no effect.
        unsafe { self.api.complete()(self.word, task, end, lend(text), lend(details)) };
    }

    fn log(self, task: Task, level: u32, target: &str, text: &str, fields: &str) {
        // SAFETY: this is a mandatory entry of this major version. The texts live until the call returns.
        unsafe { self.api.log()(self.word, task, level, lend(target), lend(text), lend(fields)) };
    }
}

/// Receives the host's answer to a call.
unsafe extern "C" fn answered(user: *mut c_void, status: Status, number: u64, data: abi::Bytes) {
    // SAFETY: the host received `data` from nobody else and hands it over here.
    let data = unsafe { received(data) };
    // SAFETY: `user` is the box made in `HostPort::call`, and the host calls back exactly once.
    let sender = unsafe { Box::from_raw(user.cast::<ReplySender>()) };
    let _ = guard(|| {
        let answer = if status == Status::OK {
            Ok(Answer { number, data })
        } else {
            Err(PortError::new(kind_of(status), String::from_utf8_lossy(&data)))
        };
        let _ = sender.send(answer);
    });
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

/// # Safety
/// `texts` must point to `len` texts that are readable for as long as the result is used.
unsafe fn texts<'a>(list: *const Str, len: u32) -> Vec<&'a str> {
    if len == 0 {
        return Vec::new();
    }
    // SAFETY: the caller guarantees it.
    unsafe { std::slice::from_raw_parts(list, len as usize).iter().map(|item| text(*item)).collect() }
}

/// Hands bytes over. The other side frees them through `release`.
pub(crate) fn owned(bytes: Bytes) -> abi::Bytes {
    unsafe extern "C" fn release(owner: *mut c_void) {
        // SAFETY: `owner` is the box created below. The contract says that it is released exactly once.
        drop(unsafe { Box::from_raw(owner.cast::<Bytes>()) });
    }
    if bytes.is_empty() {
        return abi::Bytes { ptr: std::ptr::null(), len: 0, owner: std::ptr::null_mut(), release: None };
    }
    let (ptr, len) = (bytes.as_ptr(), bytes.len());
    abi::Bytes { ptr, len, owner: Box::into_raw(Box::new(bytes)).cast(), release: Some(release) }
}

/// Takes over bytes from the other side. They are released when the last part of them is dropped.
///
/// # Safety
/// `bytes` must be complete, and nobody else may release it.
unsafe fn received(bytes: abi::Bytes) -> Bytes {
    let bytes = Received(bytes);
    if bytes.0.len == 0 { Bytes::new() } else { Bytes::from_owner(bytes) }
}

/// Bytes received across the boundary, released on drop.
struct Received(abi::Bytes);

// SAFETY: the contract of `Bytes` allows reading and releasing from any thread. Nothing is written.
unsafe impl Send for Received {}

impl AsRef<[u8]> for Received {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the caller of `received` guaranteed complete bytes. They are released only in drop.
        unsafe { std::slice::from_raw_parts(self.0.ptr, self.0.len) }
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if let Some(release) = self.0.release {
            // SAFETY: the caller of `received` guaranteed that nobody else releases the bytes.
            unsafe { release(self.0.owner) };
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
