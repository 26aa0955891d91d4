//! The host's side of the ABI: reads a plugin's table and answers its calls.
//!
//! All unsafe code about values that cross the boundary is in this file. Every host entry looks up its task by
//! handle and copies the lent values. It answers through the plugin's dispatch thread. If the call need not wait,
//! it answers at once, on the calling thread.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::c_void,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use bytes::Bytes;
use runner_sdk::abi::{self, Callback, HostRef, Module, Status, Str, Table, Task};
use serde_json::json;
use tokio::{runtime::Handle, sync::oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{Span, debug, error, info, trace, warn};

use super::{
    InstallError,
    dispatch::Dispatcher,
    held_bytes::{Holding, TaskBytes},
    run::Folder,
    tasks::TaskTable,
    text::{self, LOG_FIELDS_BYTES_MAX, LOG_TARGET_BYTES_MAX, LOG_TEXT_BYTES_MAX, REASON_BYTES_MAX},
};
use crate::model::{
    ArtifactSpec, Charge, HeldLease, InputStream, OutputStream, PortError, PortErrorKind, Ports, Setup, TaskId, Token,
    Usage, redact,
};

/// Maximum number of streams that one task may hold open.
const STREAMS_MAX: usize = 64;
/// Time an ended task has to release its bytes before a warning is logged.
const RELEASE_GRACE: Duration = Duration::from_secs(1);
/// Largest piece handed to a plugin at once, in bytes. A plugin that asks for more gets this much.
const PIECE_BYTES_MAX: u64 = 1024 * 1024;

static TASKS: TaskTable<Running> = TaskTable::new();
static HOST: OnceLock<HostRef> = OnceLock::new();
/// Plugins that have not answered their `init` yet, by the number they were given.
static INITS: Mutex<BTreeMap<usize, mpsc::Sender<InitAnswer>>> = Mutex::new(BTreeMap::new());

/// Number of calls that named a task which was over or never existed.
pub(super) fn stale_calls() -> u64 {
    TASKS.stale_calls()
}

/// Every running task, with the name of its plugin.
pub(super) fn running() -> Vec<(Arc<str>, TaskId)> {
    TASKS.all().iter().map(|running| (Arc::clone(&running.plugin), running.held_lease.lease.task().clone())).collect()
}

// ---------------------------------------------------------------------------------------------
// The plugin's table.

type InitFn = unsafe extern "C" fn(HostRef, Str, Callback, *mut c_void);
type StartFn = unsafe extern "C" fn(Task, Str);
type CancelFn = unsafe extern "C" fn(Task);
type ShutdownFn = unsafe extern "C" fn(u32);

/// The entries of a plugin whose table was checked. The library is never unloaded.
#[derive(Clone, Copy)]
pub(super) struct Entries {
    init: InitFn,
    start: StartFn,
    cancel: CancelFn,
    shutdown: ShutdownFn,
}

/// Calls the exported entry and checks the table it returns.
///
/// # Safety
/// `entry` must be the address of `runner_module_v1`, not null, in a library that stays loaded.
pub(super) unsafe fn read_table(entry: *const c_void) -> Result<Entries, InstallError> {
    // SAFETY: the symbol's name guarantees this signature. The returned pointer has the type that both table
    // declarations state. An entry is read only if its bit is set.
    unsafe {
        let entry = std::mem::transmute::<*const c_void, extern "C" fn() -> *const Table<Module>>(entry);
        let table = entry();
        if table.is_null() {
            return Err(InstallError::WrongMagic { found: 0 });
        }
        let present = (&raw const (*table).present).read();
        let need = |bit: u32, entry: &'static str| {
            if present >> bit & 1 == 1 { Ok(()) } else { Err(InstallError::MissingEntry { entry }) }
        };
        need(0, "magic")?;
        let magic = (&raw const (*table).entries.magic).read();
        if magic != abi::MAGIC {
            return Err(InstallError::WrongMagic { found: magic });
        }
        need(1, "abi")?;
        let major = ((&raw const (*table).entries.abi).read() >> 16) as u16;
        if major != abi::ABI_MAJOR {
            return Err(InstallError::AbiMajor { found: major });
        }
        need(2, "init")?;
        need(3, "start")?;
        need(4, "cancel")?;
        need(5, "shutdown")?;
        // A C table may hold NULL. Reading NULL as a Rust function pointer would be undefined behaviour.
        let function = |address_of: *const c_void, entry: &'static str| {
            let address = address_of.cast::<*const c_void>().read();
            if address.is_null() { Err(InstallError::MissingEntry { entry }) } else { Ok(address) }
        };
        let init = function((&raw const (*table).entries.init).cast(), "init")?;
        let start = function((&raw const (*table).entries.start).cast(), "start")?;
        let cancel = function((&raw const (*table).entries.cancel).cast(), "cancel")?;
        let shutdown = function((&raw const (*table).entries.shutdown).cast(), "shutdown")?;
        Ok(Entries {
            init: std::mem::transmute::<*const c_void, InitFn>(init),
            start: std::mem::transmute::<*const c_void, StartFn>(start),
            cancel: std::mem::transmute::<*const c_void, CancelFn>(cancel),
            shutdown: std::mem::transmute::<*const c_void, ShutdownFn>(shutdown),
        })
    }
}

/// The answer of `init`.
pub(super) type InitAnswer = (Status, String);

impl Entries {
    /// Calls `init`. The answer arrives on `answer_sender`, during the call or later.
    pub(super) fn init(&self, config: &str, log_level: u32, answer_sender: mpsc::Sender<InitAnswer>) {
        unsafe extern "C" fn answered(user: *mut c_void, status: Status, data: abi::Bytes) {
            // SAFETY: the plugin handed the bytes over and nobody else releases them.
            let data = unsafe { Foreign::new(data) };
            let answer = (status, text::lossy(data.as_ref(), REASON_BYTES_MAX));
            match INITS.lock().unwrap_or_else(PoisonError::into_inner).remove(&user.addr()) {
                // The receiver is gone after the time limit.
                Some(answer_sender) => drop(answer_sender.send(answer)),
                None => warn!(event = "plugin.second_init", "a plugin answered init a second time"),
            }
        }
        let host = *HOST.get_or_init(|| abi::publish_host(host_table(log_level)));
        // This is a number, not an address. A second answer finds no entry.
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        INITS.lock().unwrap_or_else(PoisonError::into_inner).insert(number, answer_sender);
        let user = std::ptr::without_provenance_mut(number);
        // SAFETY: `read_table` checked the entry. `config` outlives the call, and the host's table outlives the
        // process. The SDK's shim never unwinds, and C cannot.
        unsafe { (self.init)(host, lend(config), Callback { call: answered }, user) };
    }

    /// Calls `start`.
    pub(super) fn start(&self, task: Task, request: &str) {
        // SAFETY: as in `init`. The plugin copies the parts of `request` that it keeps.
        unsafe { (self.start)(task, lend(request)) };
    }

    /// Calls `cancel`.
    pub(super) fn cancel(&self, task: Task) {
        // SAFETY: as in `init`.
        unsafe { (self.cancel)(task) };
    }

    /// Calls `shutdown`.
    pub(super) fn shutdown(&self, deadline: Duration) {
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        // SAFETY: as in `init`.
        unsafe { (self.shutdown)(deadline_ms) };
    }
}

// ---------------------------------------------------------------------------------------------
// One running task.

/// The completion of a task as the plugin reported it.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) status: Status,
    pub(super) text: String,
    pub(super) details: String,
}

/// The access to a task's data, and the runtime that moves the data.
pub(super) struct TaskData {
    pub(super) ports: Arc<dyn Ports>,
    pub(super) folder: Folder,
    pub(super) runtime: Handle,
}

/// A task inside a plugin, as the calls of the plugin use it.
pub(super) struct Running {
    plugin: Arc<str>,
    dispatcher: Dispatcher,
    grant_token: bool,
    held_lease: HeldLease,
    data: TaskData,
    over: CancellationToken,
    span: Span,
    ended: Mutex<Option<oneshot::Sender<Completion>>>,
    streams: Mutex<HashMap<u64, Stream>>,
    next_stream: AtomicU64,
    bytes: Arc<TaskBytes>,
}

type Shared<T> = Arc<tokio::sync::Mutex<T>>;

#[derive(Clone)]
enum Stream {
    Input(Shared<Reading>),
    Output(Shared<Option<Box<dyn OutputStream>>>),
}

struct Reading {
    stream: Box<dyn InputStream>,
    rest: Bytes,
    /// Set for a caller that holds the bytes it reads.
    held: Option<Charge>,
}

/// Owns a handle. When it is dropped, the task is over for its plugin.
pub(super) struct Entered {
    pub(super) task: Task,
    running: Arc<Running>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        TASKS.remove(self.task);
        self.running.over.cancel();
        self.running.streams.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.running.bytes.end();
        let unreleased = self.running.bytes.plugin();
        if unreleased.is_notable() {
            let (unreleased, plugin) = (Arc::clone(unreleased), Arc::clone(&self.running.plugin));
            // Not joined: the future only logs a warning, or does nothing.
            self.running.data.runtime.spawn(async move {
                tokio::time::sleep(RELEASE_GRACE).await;
                unreleased.warn(&plugin);
            });
        }
    }
}

/// Enters a task. The receiver gets its completion once.
pub(super) fn enter(
    plugin: Arc<str>,
    dispatcher: Dispatcher,
    grant_token: bool,
    held_lease: HeldLease,
    data: TaskData,
    bytes: Arc<TaskBytes>,
) -> (Entered, oneshot::Receiver<Completion>) {
    let (completion_sender, ended) = oneshot::channel();
    let running = Arc::new(Running {
        plugin,
        dispatcher,
        grant_token,
        held_lease,
        data,
        over: CancellationToken::new(),
        span: Span::current(),
        ended: Mutex::new(Some(completion_sender)),
        streams: Mutex::default(),
        next_stream: AtomicU64::new(1),
        bytes,
    });
    let task = TASKS.insert(Arc::clone(&running));
    (Entered { task, running }, ended)
}

impl Running {
    /// The tokens that only this task's runner may know.
    fn bearers(&self) -> Vec<Token> {
        if self.grant_token { self.held_lease.tokens() } else { Vec::new() }
    }

    /// Creates the task's directory, for calls that write to it. The creation may wait for a file. Therefore it
    /// runs on a worker or on one of the plugin's own threads.
    fn make_folder(&self) -> Result<(), PortError> {
        (self.data.folder.make)().map_err(|text| PortError::new(PortErrorKind::Local, text))
    }

    fn add(&self, stream: Stream) -> Result<u64, PortError> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if streams.len() >= STREAMS_MAX {
            let text = format!("{STREAMS_MAX} inputs and outputs are open already; close some first");
            return Err(PortError::new(PortErrorKind::BadRequest, text));
        }
        let id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        streams.insert(id, stream);
        Ok(id)
    }

    fn stream(&self, id: u64) -> Result<Stream, PortError> {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let found = streams.get(&id).cloned();
        found.ok_or_else(|| PortError::new(PortErrorKind::BadRequest, format!("stream {id} is not open")))
    }

    fn take(&self, id: u64) -> Option<Stream> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).remove(&id)
    }
}

// ---------------------------------------------------------------------------------------------
// Values that cross.

/// The plugin's `user` word, which the host passes back to the plugin.
struct User(*mut c_void);

// SAFETY: the host only passes the opaque word back. The contract lets a callback run on any thread.
unsafe impl Send for User {}

/// Bytes that a plugin handed over. They are released on drop.
struct Foreign {
    bytes: abi::Bytes,
    /// Counts the bytes, if the task they were handed over for is known.
    held: Option<Holding>,
}

// SAFETY: the contract of `Bytes` allows reading and releasing from any thread. Nothing is written.
unsafe impl Send for Foreign {}
// SAFETY: as above.
unsafe impl Sync for Foreign {}

impl Foreign {
    /// # Safety
    /// `bytes` must be complete, and nobody else may release it.
    unsafe fn new(bytes: abi::Bytes) -> Self {
        Self { bytes, held: None }
    }
}

impl AsRef<[u8]> for Foreign {
    fn as_ref(&self) -> &[u8] {
        if self.bytes.len == 0 || self.bytes.ptr.is_null() {
            return &[];
        }
        // SAFETY: the caller of `new` guaranteed complete bytes. They are released only in drop.
        unsafe { std::slice::from_raw_parts(self.bytes.ptr, self.bytes.len) }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(release) = self.bytes.release {
            // SAFETY: the caller of `new` guaranteed that nobody else releases the bytes.
            unsafe { release(self.bytes.owner) };
        }
    }
}

/// Bytes that were handed to a plugin. `_held` counts them for their task, if there is one.
struct HandedOver {
    bytes: Bytes,
    _held: Option<Holding>,
}

/// Hands bytes to a plugin without a copy. The plugin frees them through `release`.
fn hand_over(bytes: Bytes, task: Option<&Arc<TaskBytes>>) -> abi::Bytes {
    unsafe extern "C" fn release(owner: *mut c_void) {
        // SAFETY: this is the box created below. The contract says that it is released exactly once.
        drop(unsafe { Box::from_raw(owner.cast::<HandedOver>()) });
    }
    if bytes.is_empty() {
        return abi::Bytes { ptr: std::ptr::null(), len: 0, owner: std::ptr::null_mut(), release: None };
    }
    let held = task.map(|task| task.hold(bytes.len()));
    let boxed = Box::new(HandedOver { bytes, _held: held });
    let (ptr, len) = (boxed.bytes.as_ptr(), boxed.bytes.len());
    abi::Bytes { ptr, len, owner: Box::into_raw(boxed).cast(), release: Some(release) }
}

fn lend(text: &str) -> Str {
    Str { ptr: text.as_ptr(), len: text.len() }
}

/// Copies a text that a plugin lent for the duration of its call.
///
/// # Safety
/// `text` must point to `len` readable bytes.
unsafe fn copy(text: Str) -> Result<String, PortError> {
    if text.len == 0 || text.ptr.is_null() {
        return Ok(String::new());
    }
    // SAFETY: the caller guarantees it.
    let bytes = unsafe { std::slice::from_raw_parts(text.ptr, text.len) };
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(PortError::new(PortErrorKind::BadRequest, "the plugin passed text that is not UTF-8")),
    }
}

/// Copies at most `max` bytes of a text for people. A plugin lent the text for the duration of its call.
///
/// # Safety
/// `text` must point to `len` readable bytes.
unsafe fn copy_lossy(text: Str, max: usize) -> String {
    if text.len == 0 || text.ptr.is_null() {
        return String::new();
    }
    // SAFETY: the caller guarantees it.
    text::lossy(unsafe { std::slice::from_raw_parts(text.ptr, text.len) }, max)
}

fn status(kind: PortErrorKind) -> Status {
    match kind {
        PortErrorKind::BadRequest => Status::BAD_REQUEST,
        PortErrorKind::InvalidPath => Status::INVALID_PATH,
        PortErrorKind::Unauthorized => Status::UNAUTHORIZED,
        PortErrorKind::NotFound => Status::NOT_FOUND,
        PortErrorKind::Conflict => Status::CONFLICT,
        PortErrorKind::Server => Status::SERVER,
        PortErrorKind::Network => Status::NETWORK,
        PortErrorKind::Malformed => Status::MALFORMED,
        PortErrorKind::Unsupported => Status::UNSUPPORTED,
        PortErrorKind::LeaseOver => Status::LEASE_OVER,
        PortErrorKind::Setup => Status::SETUP,
        PortErrorKind::Local => Status::LOCAL,
        PortErrorKind::Limit => Status::LIMIT,
        PortErrorKind::TaskOver => Status::STALE,
        PortErrorKind::Other => Status::OTHER,
    }
}

type Answer = Result<Bytes, PortError>;

/// Calls a plugin back. For each call with a callback this happens exactly once.
fn reply_now(reply: Callback, user: User, answer: Answer, task: Option<&Arc<TaskBytes>>) {
    let (status, data) = match answer {
        Ok(data) => (Status::OK, data),
        Err(err) => (status(err.kind), Bytes::from(err.message)),
    };
    // SAFETY: `reply` and `user` came in one call and are used only once, here. The plugin becomes the owner of
    // `data`.
    unsafe { (reply.call)(user.0, status, hand_over(data, task)) };
}

fn task_over() -> PortError {
    PortError::new(PortErrorKind::TaskOver, "the task is over")
}

/// Answers a call at once, on the calling thread.
fn answer_now(task: Task, reply: Callback, user: *mut c_void, work: impl FnOnce(&Running) -> Answer) {
    let running = TASKS.get(task);
    let answer = guarded(|| match &running {
        Some(running) => work(running),
        None => Err(task_over()),
    });
    reply_now(reply, User(user), answer, running.as_ref().map(|running| &running.bytes));
}

/// Answers a call from the plugin's dispatch thread when `work` is done or the task is over.
fn answer_later<F>(
    task: Task,
    reply: Callback,
    user: *mut c_void,
    work: impl FnOnce(Arc<Running>) -> Result<F, PortError>,
) where
    F: Future<Output = Answer> + Send + 'static,
{
    let user = User(user);
    let Some(running) = TASKS.get(task) else { return reply_now(reply, user, Err(task_over()), None) };
    let future = match guarded(|| work(Arc::clone(&running))) {
        Ok(future) => future,
        Err(err) => return reply_now(reply, user, Err(err), Some(&running.bytes)),
    };
    let (dispatcher, bytes) = (running.dispatcher.clone(), Arc::clone(&running.bytes));
    let mut pending = PendingAnswer { dispatcher, bytes, answer_to: Some((reply, user)) };
    let (over, span) = (running.over.clone(), running.span.clone());
    let work = async move {
        let answer = tokio::select! {
            biased;
            () = over.cancelled() => Err(task_over()),
            answer = future => answer,
        };
        pending.send(answer);
    };
    // Not joined: `over` ends it together with the task. Its last action is the answer that the plugin must get.
    running.data.runtime.spawn(tracing::Instrument::instrument(work, span));
}

/// An answer that a plugin must get exactly once. It is also sent when its work panicked or the runtime ended.
struct PendingAnswer {
    dispatcher: Dispatcher,
    bytes: Arc<TaskBytes>,
    answer_to: Option<(Callback, User)>,
}

impl PendingAnswer {
    fn send(&mut self, answer: Answer) {
        if let Some((reply, user)) = self.answer_to.take() {
            let bytes = Arc::clone(&self.bytes);
            self.dispatcher.run("callback", move || reply_now(reply, user, answer, Some(&bytes)));
        }
    }
}

impl Drop for PendingAnswer {
    fn drop(&mut self) {
        self.send(Err(PortError::new(PortErrorKind::Other, "the host failed inside this call; see its log")));
    }
}

/// A bug in the host must not unwind into a plugin.
fn guarded<T>(work: impl FnOnce() -> Result<T, PortError>) -> Result<T, PortError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        error!(event = "host.call_panicked", "a host call panicked");
        Err(PortError::new(PortErrorKind::Other, "the host failed inside this call; see its log"))
    })
}

// ---------------------------------------------------------------------------------------------
// The host's table. Safety of every entry: the plugin calls with values of the declared types. Texts are copied
// before the entry returns, so no lent value is used later.

fn host_table(log_level: u32) -> abi::Host {
    abi::Host {
        abi: abi::ABI_VERSION,
        log_level,
        log,
        progress,
        event,
        cancelled,
        cancel_reason,
        token,
        input_open,
        input_read,
        input_close,
        input_file,
        output_open,
        output_write,
        output_finish,
        output_abort,
        output_file,
        complete,
        task_dir,
        usage,
    }
}

/// Removes the plugin's name from the fields of a line that belongs to no task. The SDK adds that name.
fn named(fields: &str) -> Option<(String, String)> {
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(fields).ok()?;
    let plugin = fields.remove("plugin")?.as_str()?.to_owned();
    let rest = if fields.is_empty() { String::new() } else { serde_json::Value::Object(fields).to_string() };
    Some((plugin, rest))
}

unsafe extern "C" fn log(task: Task, level: u32, target: Str, text: Str, fields: Str) {
    // SAFETY: lent for this call.
    let (target, text, fields) = unsafe {
        let fields = copy_lossy(fields, text::LOG_FIELDS_READ_BYTES_MAX);
        (copy_lossy(target, LOG_TARGET_BYTES_MAX), copy_lossy(text, LOG_TEXT_BYTES_MAX), fields)
    };
    let _ = guarded(|| {
        let running = if task.0 == 0 { None } else { TASKS.get(task) };
        // A runner may log its tokens, in a line or in the text of a panic. The thread may also belong to no known
        // task.
        let tokens = match &running {
            Some(running) => running.bearers(),
            None => TASKS.all().iter().flat_map(|running| running.bearers()).collect(),
        };
        let (mut text, mut fields) = (text, text::bounded_fields(fields, LOG_FIELDS_BYTES_MAX));
        redact(&mut text, &tokens);
        redact(&mut fields, &tokens);
        let (plugin, span, fields) = match &running {
            Some(running) => (running.plugin.to_string(), running.span.clone(), fields),
            None => {
                let (plugin, fields) = named(&fields).unwrap_or_else(|| ("?".to_owned(), fields));
                (plugin, Span::none(), fields)
            }
        };
        let _entered = span.enter();
        let (plugin, plugin_fields) = (plugin.as_str(), Some(fields.as_str()).filter(|fields| !fields.is_empty()));
        match level {
            1 => error!(plugin, plugin_target = target, plugin_fields, "{text}"),
            2 => warn!(plugin, plugin_target = target, plugin_fields, "{text}"),
            3 => info!(plugin, plugin_target = target, plugin_fields, "{text}"),
            4 => debug!(plugin, plugin_target = target, plugin_fields, "{text}"),
            _ => trace!(plugin, plugin_target = target, plugin_fields, "{text}"),
        }
        Ok(())
    });
}

unsafe extern "C" fn progress(task: Task, json: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    let json = unsafe { copy(json) };
    answer_now(task, reply, user, |running| {
        running.held_lease.progress.progress(parse(&json?)?).map_err(limit)?;
        Ok(Bytes::new())
    });
}

unsafe extern "C" fn event(task: Task, json: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    let json = unsafe { copy(json) };
    answer_now(task, reply, user, |running| {
        running.held_lease.progress.event(parse(&json?)?).map_err(limit)?;
        Ok(Bytes::new())
    });
}

unsafe extern "C" fn usage(task: Task, json: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    let json = unsafe { copy(json) };
    answer_now(task, reply, user, |running| {
        let used: Usage =
            serde_json::from_str(&json?).map_err(|err| bad_request(format!("usage is not valid: {err}")))?;
        if used.usd_cost < 0.0 {
            return Err(bad_request(format!("usd_cost is {}, expected 0 or more", used.usd_cost)));
        }
        running.held_lease.add_usage(used);
        Ok(Bytes::new())
    });
}

unsafe extern "C" fn cancelled(task: Task) -> i32 {
    let answer = catch_unwind(|| match TASKS.get(task) {
        Some(running) => i32::from(running.held_lease.cancel.reason().is_some()),
        None => Status::STALE.0,
    });
    answer.unwrap_or(Status::STALE.0)
}

unsafe extern "C" fn cancel_reason(task: Task, reply: Callback, user: *mut c_void) {
    answer_now(task, reply, user, |running| {
        let word = running.held_lease.cancel.reason().map_or("", |reason| reason.as_str());
        Ok(Bytes::from_static(word.as_bytes()))
    });
}

unsafe extern "C" fn token(task: Task, reply: Callback, user: *mut c_void) {
    answer_later(task, reply, user, |running| {
        if !running.grant_token {
            let text = "this plugin was not granted the token; the operator can set grant = [\"token\"]";
            return Err(PortError::new(PortErrorKind::Unsupported, text));
        }
        Ok(async move {
            if let Setup::Refused(text) = running.held_lease.setup().await {
                return Err(PortError::new(PortErrorKind::Setup, text));
            }
            match running.held_lease.token() {
                Some(token) => Ok(Bytes::copy_from_slice(token.expose().as_bytes())),
                None => Err(PortError::new(PortErrorKind::Unsupported, "this lease carries no token")),
            }
        })
    });
}

unsafe extern "C" fn input_open(task: Task, cid: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    let cid = unsafe { copy(cid) };
    answer_later(task, reply, user, |running| {
        let cid = cid?;
        Ok(async move {
            let stream = running.data.ports.open(&cid).await?;
            let mut answer = serde_json::to_value(stream.meta()).map_err(internal)?;
            let reading = Reading { stream, rest: Bytes::new(), held: None };
            let id = running.add(Stream::Input(Arc::new(tokio::sync::Mutex::new(reading))))?;
            answer["stream"] = json!(id);
            Ok(Bytes::from(answer.to_string()))
        })
    });
}

unsafe extern "C" fn input_read(task: Task, stream: u64, max: u64, reply: Callback, user: *mut c_void) {
    answer_later(task, reply, user, |running| {
        let Stream::Input(reading) = running.stream(stream)? else { return Err(wrong_direction(stream)) };
        let (holds, max) = (max > PIECE_BYTES_MAX, max.clamp(1, PIECE_BYTES_MAX));
        let max = usize::try_from(max).expect("a piece fits in memory");
        Ok(async move {
            let mut reading = reading.lock().await;
            let budget = running.data.ports.budget();
            if holds && reading.held.is_none() {
                let size = reading.stream.meta().size.unwrap_or_default();
                reading.held = Some(budget.reserve(size).await.map_err(over_budget)?);
            }
            // An empty answer means the end. Therefore an empty piece is not passed on.
            while reading.rest.is_empty() {
                let Some(piece) = reading.stream.next().await? else { break };
                reading.rest = piece;
            }
            let take = reading.rest.len().min(max);
            let piece = reading.rest.split_to(take);
            Ok(if piece.is_empty() { piece } else { budget.count(take as u64).tie(piece) })
        })
    });
}

unsafe extern "C" fn input_close(task: Task, stream: u64, reply: Callback, user: *mut c_void) {
    answer_now(task, reply, user, |running| {
        running.take(stream);
        Ok(Bytes::new())
    });
}

unsafe extern "C" fn input_file(task: Task, cid: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    let cid = unsafe { copy(cid) };
    answer_later(task, reply, user, |running| {
        let cid = cid?;
        Ok(async move {
            running.make_folder()?;
            let input = running.data.ports.materialize(&cid).await?;
            serde_json::to_vec(&input).map(Bytes::from).map_err(internal)
        })
    });
}

unsafe extern "C" fn output_open(task: Task, spec: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    let spec = unsafe { copy(spec) };
    answer_later(task, reply, user, |running| {
        let spec = artifact_spec(&spec?)?;
        Ok(async move {
            running.make_folder()?;
            let stream = running.data.ports.create(spec).await?;
            let id = running.add(Stream::Output(Arc::new(tokio::sync::Mutex::new(Some(stream)))))?;
            Ok(Bytes::from(json!({ "stream": id }).to_string()))
        })
    });
}

unsafe extern "C" fn output_write(task: Task, stream: u64, data: abi::Bytes, reply: Callback, user: *mut c_void) {
    // SAFETY: handed over by this call.
    let mut data = unsafe { Foreign::new(data) };
    answer_later(task, reply, user, |running| {
        data.held = Some(running.bytes.hold(data.as_ref().len()));
        let Stream::Output(writing) = running.stream(stream)? else { return Err(wrong_direction(stream)) };
        Ok(async move {
            let mut writing = writing.lock().await;
            let writer = writing.as_mut().ok_or_else(|| wrong_direction(stream))?;
            let (size, budget) = (data.as_ref().len() as u64, running.data.ports.budget());
            if size > 0 {
                let charge = match size > PIECE_BYTES_MAX {
                    true => budget.reserve(size).await.map_err(over_budget)?,
                    false => budget.count(size),
                };
                writer.write(charge.tie(data)).await?;
            }
            Ok(Bytes::new())
        })
    });
}

unsafe extern "C" fn output_finish(task: Task, stream: u64, reply: Callback, user: *mut c_void) {
    answer_later(task, reply, user, |running| {
        let Some(Stream::Output(writing)) = running.take(stream) else { return Err(wrong_direction(stream)) };
        Ok(async move {
            let writer = writing.lock().await.take().ok_or_else(|| wrong_direction(stream))?;
            published(writer.finish().await?)
        })
    });
}

unsafe extern "C" fn output_abort(task: Task, stream: u64, reply: Callback, user: *mut c_void) {
    answer_later(task, reply, user, |running| {
        let taken = running.take(stream);
        Ok(async move {
            if let Some(Stream::Output(writing)) = taken
                && let Some(writer) = writing.lock().await.take()
            {
                writer.abort().await;
            }
            Ok(Bytes::new())
        })
    });
}

unsafe extern "C" fn output_file(task: Task, spec: Str, path: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    let (spec, path) = unsafe { (copy(spec), copy(path)) };
    answer_later(task, reply, user, |running| {
        let (spec, path) = (artifact_spec(&spec?)?, path?);
        Ok(async move { published(running.data.ports.put_file(spec, Path::new(&path)).await?) })
    });
}

unsafe extern "C" fn complete(task: Task, status: Status, text: Str, details: Str) -> Status {
    // SAFETY: lent for this call.
    let (text, details) = unsafe {
        // Truncated JSON is invalid.
        let left_out = (details.len > text::DETAILS_BYTES_MAX).then(|| json!({ "left_out_bytes": details.len }));
        let details = left_out.map_or_else(|| copy_lossy(details, usize::MAX), |left_out| left_out.to_string());
        (copy_lossy(text, REASON_BYTES_MAX), details)
    };
    let ended = guarded(|| {
        // The handle is retired at once. All later calls of the plugin for this task are stale.
        let Some(running) = TASKS.get(task) else {
            super::stuck::returned(task);
            return Ok(Status::STALE);
        };
        TASKS.remove(task);
        let completion_sender = running.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(completion_sender) = completion_sender else { return Ok(Status::STALE) };
        let completion = Completion { status, text, details };
        // The receiver is gone when the task was abandoned as stuck.
        if completion_sender.send(completion).is_ok() {
            return Ok(Status::OK);
        }
        super::stuck::returned(task);
        Ok(Status::STALE)
    });
    ended.unwrap_or(Status::FAILED)
}

unsafe extern "C" fn task_dir(task: Task, reply: Callback, user: *mut c_void) {
    // Answered at once: the caller is a thread of the plugin. It would create the directory itself and wait as
    // long.
    answer_now(task, reply, user, |running| running.make_folder().map(|()| Bytes::new()));
}

fn bad_request(text: String) -> PortError {
    PortError::new(PortErrorKind::BadRequest, text)
}

fn parse(json: &str) -> Result<serde_json::Value, PortError> {
    serde_json::from_str(json).map_err(|err| bad_request(format!("expected JSON: {err}")))
}

fn artifact_spec(json: &str) -> Result<ArtifactSpec, PortError> {
    serde_json::from_str(json).map_err(|err| bad_request(format!("expected an artifact spec: {err}")))
}

fn published(id: Option<String>) -> Answer {
    Ok(Bytes::from(json!({ "id": id }).to_string()))
}

fn wrong_direction(stream: u64) -> PortError {
    bad_request(format!("stream {stream} is not open in this direction"))
}

#[allow(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn limit(err: crate::model::ProgressError) -> PortError {
    PortError::new(PortErrorKind::Limit, err.to_string())
}

#[allow(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn over_budget(err: crate::model::OverBudget) -> PortError {
    PortError::new(PortErrorKind::Limit, err.to_string())
}

#[allow(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn internal(err: serde_json::Error) -> PortError {
    PortError::new(PortErrorKind::Other, err.to_string())
}
