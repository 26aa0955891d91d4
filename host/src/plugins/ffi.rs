//! The host's side of the ABI: converts between the boundary's values and plain ones.
//!
//! All unsafe code about values that cross the boundary is in this file. Every host entry looks up its instance and
//! its task by handle and copies the lent values. What the call does is in `instance` and in `HostCalls`. An answer
//! goes through the instance's dispatch thread, or out on the calling thread if the call need not wait.

use std::{
    cell::Cell,
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use runner_sdk::{
    PortError, PortErrorKind,
    abi::{self, Callback, CreateRequest, End, HostRef, HostWord, ModuleTable, StartRequest, Status, Str, Task},
    host_calls::{Answer, Answered, Call, Called, status_of, task_over},
};
use serde_json::json;
use tracing::error;

use super::{
    InstallError,
    dispatch::Dispatcher,
    executor::Request,
    handles::HandleTable,
    held_bytes::{Holding, TaskBytes},
    instance::{Completion, Created, Instance, LogLine, Running},
    text::{self, LOG_TARGET_BYTES_MAX, LOG_TEXT_BYTES_MAX, REASON_BYTES_MAX},
};
use crate::model::TaskId;

/// Number of calls into plugins that may be inside one another on one thread. The next one goes to another thread. A
/// plugin may make a call in each answer and each release, and its stack is limited.
const NESTED_MAX: u32 = 16;
/// The same for the answers of `task_dir`, which come before it returns.
const NESTED_FOLDERS_MAX: u32 = 2 * NESTED_MAX;
/// Largest text of a call, in bytes. Larger ones are refused and not copied.
const TEXT_BYTES_MAX: usize = 1 << 20;
/// No plugin has more memory in one piece. The sum of all calls in progress must fit into 63 bits.
const MEMORY_BYTES_MAX: usize = 1 << 48;

/// Every instance of every node in this process, by host word. A plugin may pass any number, so the number is looked
/// up and never used as an address.
static HOSTS: HandleTable<Instance> = HandleTable::new();
static API: LazyLock<HostRef> = LazyLock::new(|| abi::publish_host(TABLE));
/// Makes nested calls for host words that name no instance. `None` until it is needed.
static STALE: Mutex<Option<Dispatcher>> = Mutex::new(None);

/// Every running task, with the name of its plugin.
pub(super) fn running() -> Vec<(Arc<str>, TaskId)> {
    let of = |instance: &Arc<Instance>| {
        let tasks = instance.tasks.all();
        let named = |running: &Arc<Running>| {
            (Arc::clone(&instance.name), running.calls.backend().held_lease.lease.task().clone())
        };
        tasks.iter().map(named).collect::<Vec<_>>()
    };
    HOSTS.all().iter().flat_map(of).collect()
}

/// Makes an instance known to its plugin. The word is stale when this is dropped.
pub(super) struct Published(HostWord);

impl Published {
    pub(super) fn new(instance: Arc<Instance>) -> Self {
        Self(HostWord(HOSTS.insert(instance)))
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        HOSTS.remove(self.0.0);
    }
}

// ---------------------------------------------------------------------------------------------
// The plugin's table.

type CreateFn = unsafe extern "C" fn(HostRef, HostWord, *const CreateRequest, Callback, *mut c_void);
type StartFn = unsafe extern "C" fn(abi::Instance, Task, *const StartRequest);
type CancelFn = unsafe extern "C" fn(abi::Instance, Task);
type NumberFn = unsafe extern "C" fn(abi::Instance, u32);

/// The entries of a plugin whose table was checked. The library is never unloaded.
#[derive(Clone, Copy)]
pub(super) struct Entries {
    create: CreateFn,
    start: StartFn,
    cancel: CancelFn,
    shutdown: NumberFn,
    log_level: Option<NumberFn>,
}

/// Calls the exported entry and checks the table it returns.
///
/// # Safety
/// `entry` must be the address of `runner_module_v2`, not null, in a library that stays loaded.
pub(super) unsafe fn read_table(entry: *const c_void) -> Result<Entries, InstallError> {
    // SAFETY: the symbol's name guarantees this signature. The returned pointer has the type that both table
    // declarations state. An entry is read only if its bit is set. A C table may hold NULL. Reading NULL as a Rust
    // function pointer would be undefined behaviour, so each address is read as a pointer first.
    unsafe {
        let entry = std::mem::transmute::<*const c_void, extern "C" fn() -> *const ModuleTable>(entry);
        let module = entry();
        if module.is_null() {
            return Err(InstallError::WrongMagic { found: 0 });
        }
        let magic = (&raw const (*module).magic).read();
        if magic != abi::MAGIC {
            return Err(InstallError::WrongMagic { found: magic });
        }
        let major = ((&raw const (*module).abi).read() >> 16) as u16;
        if major != abi::ABI_MAJOR {
            return Err(InstallError::AbiMajor { found: major });
        }
        let present = (&raw const (*module).table.present).read();
        let entries = &raw const (*module).table.entries;
        let entry = |bit: u32, address_of: *const c_void| -> Option<*const c_void> {
            if present >> bit & 1 == 0 {
                return None;
            }
            Some(address_of.cast::<*const c_void>().read()).filter(|address| !address.is_null())
        };
        let need = |bit, address_of, name| entry(bit, address_of).ok_or(InstallError::MissingEntry { entry: name });
        let create = need(0, (&raw const (*entries).create).cast(), "create")?;
        let start = need(1, (&raw const (*entries).start).cast(), "start")?;
        let cancel = need(2, (&raw const (*entries).cancel).cast(), "cancel")?;
        let shutdown = need(3, (&raw const (*entries).shutdown).cast(), "shutdown")?;
        let log_level = entry(4, (&raw const (*entries).log_level).cast());
        Ok(Entries {
            create: std::mem::transmute::<*const c_void, CreateFn>(create),
            start: std::mem::transmute::<*const c_void, StartFn>(start),
            cancel: std::mem::transmute::<*const c_void, CancelFn>(cancel),
            shutdown: std::mem::transmute::<*const c_void, NumberFn>(shutdown),
            log_level: log_level.map(|address| std::mem::transmute::<*const c_void, NumberFn>(address)),
        })
    }
}

// A handle has 64 bits. `create` passes one where the plugin returns a pointer.
const _: () = assert!(usize::BITS == 64, "the host runs on 64-bit systems");

/// The leading word of a request: its size, which fits.
fn size_of_request<T>() -> u32 {
    size_of::<T>() as u32
}

impl Entries {
    /// Calls `create`. The answer goes to [`Instance::created`], during the call or later.
    pub(super) fn create(&self, published: &Published, config: &str, capabilities: &[String]) {
        unsafe extern "C" fn answered(user: *mut c_void, status: Status, number: u64, data: abi::Bytes) {
            // SAFETY: the plugin handed the bytes over and nobody else releases them.
            let data = unsafe { Foreign::new(data) };
            let text = data.slice().map_or_else(|err| err.to_string(), |text| text::lossy(text, REASON_BYTES_MAX));
            // `user` is a number, not an address.
            if let Some(instance) = HOSTS.get(user.addr() as u64) {
                instance.created(Created { status, number, text });
            }
        }
        let word = published.0;
        let Some(instance) = HOSTS.get(word.0) else { return };
        let capabilities: Vec<Str> = capabilities.iter().map(|name| lend(name)).collect();
        let request = CreateRequest {
            size: size_of_request::<CreateRequest>(),
            abi: abi::ABI_VERSION,
            log_level: instance.log_level(),
            capabilities_len: u32::try_from(capabilities.len()).expect("a manifest has few capabilities"),
            capabilities: capabilities.as_ptr(),
            name: lend(&instance.name),
            config: lend(config),
        };
        let user = std::ptr::without_provenance_mut(usize::try_from(word.0).expect("a word has at most 64 bits"));
        // SAFETY: `read_table` checked the entry. The request outlives the call, and the host's table outlives the
        // process. The SDK's shim never unwinds, and C cannot.
        unsafe { (self.create)(*API, word, &raw const request, Callback { call: Some(answered) }, user) };
    }

    /// Calls `start`.
    pub(super) fn start(&self, instance: abi::Instance, task: Task, request: &Request) {
        let lease = &request.held_lease.lease;
        let inputs: Vec<Str> = lease.inputs.iter().map(|cid| lend(cid)).collect();
        let request = StartRequest {
            size: size_of_request::<StartRequest>(),
            inputs_len: u32::try_from(inputs.len()).expect("a lease fits in memory"),
            inputs: inputs.as_ptr(),
            capability: lend(lease.capability.as_str()),
            dir: lend(&request.dir),
            task_id: lend(lease.task().as_str()),
            traceparent: lend(lease.traceparent.as_deref().unwrap_or_default()),
            lease: lend(lease.document.get()),
        };
        // SAFETY: as in `create`. The plugin copies the parts of the request that it keeps.
        unsafe { (self.start)(instance, task, &raw const request) };
    }

    /// Calls `cancel`.
    pub(super) fn cancel(&self, instance: abi::Instance, task: Task) {
        // SAFETY: as in `create`.
        unsafe { (self.cancel)(instance, task) };
    }

    /// Calls `shutdown`.
    pub(super) fn shutdown(&self, instance: abi::Instance, deadline: Duration) {
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        // SAFETY: as in `create`.
        unsafe { (self.shutdown)(instance, deadline_ms) };
    }

    /// Calls `log_level`, if the plugin has it.
    pub(super) fn log_level(&self, instance: abi::Instance, level: u32) {
        if let Some(log_level) = self.log_level {
            // SAFETY: as in `create`.
            unsafe { log_level(instance, level) };
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Values that cross.

/// The plugin's `user` word, which the host passes back to the plugin.
struct User(*mut c_void);

// SAFETY: the host only passes the opaque word back. The contract lets a callback run on any thread.
unsafe impl Send for User {}

/// Where an answer goes. `None`: the plugin wants none.
type ReplyTo = Option<(unsafe extern "C" fn(*mut c_void, Status, u64, abi::Bytes), User)>;

fn reply_to(reply: Callback, user: *mut c_void) -> ReplyTo {
    reply.call.map(|call| (call, User(user)))
}

/// Bytes that a plugin handed over. They are released on drop.
struct Foreign {
    bytes: abi::Bytes,
    /// Counts the bytes for their task.
    held: Option<Holding>,
    /// Releases the bytes. `None` while they are on the thread that handed them over. Another thread is the host's,
    /// and a `release` that hangs must not block it.
    dispatcher: Option<Dispatcher>,
}

// SAFETY: the contract of `Bytes` allows reading and releasing from any thread. Nothing is written.
unsafe impl Send for Foreign {}

impl Foreign {
    /// # Safety
    /// `bytes` must be complete, and nobody else may release it.
    unsafe fn new(bytes: abi::Bytes) -> Self {
        Self { bytes, held: None, dispatcher: None }
    }

    /// The bytes, if they can be bytes at all.
    fn slice(&self) -> Result<&[u8], PortError> {
        // SAFETY: the caller of `new` guaranteed complete bytes. They are released only in drop.
        unsafe { readable(self.bytes.ptr, self.bytes.len) }
    }
}

impl AsRef<[u8]> for Foreign {
    fn as_ref(&self) -> &[u8] {
        self.slice().unwrap_or_default()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let Some(release) = self.bytes.release else { return };
        let (owner, held) = (User(self.bytes.owner), self.held.take());
        let release = move || {
            let owner = owner;
            // SAFETY: the caller of `new` guaranteed that nobody else releases the bytes.
            unsafe { release(owner.0) };
            drop(held);
        };
        match &self.dispatcher {
            Some(dispatcher) => dispatcher.offer("release", release),
            None => run_here(NESTED_MAX, None, "release", release),
        }
    }
}

/// A plugin's bytes. Refuses a length that no memory can have, and NULL with a length.
///
/// # Safety
/// If `ptr` and `len` can describe memory, it must be readable for as long as the result is used.
unsafe fn readable<'a>(ptr: *const u8, len: usize) -> Result<&'a [u8], PortError> {
    if len == 0 {
        return Ok(&[]);
    }
    if ptr.is_null() || len > MEMORY_BYTES_MAX {
        let text = format!("the plugin passed {len} bytes at the address {:#x}, which no memory has", ptr.addr());
        return Err(PortError::new(PortErrorKind::BadRequest, text));
    }
    // SAFETY: the caller guarantees it.
    Ok(unsafe { std::slice::from_raw_parts(ptr, len) })
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

/// Copies a text that a plugin lent for the duration of its call. Refuses a text above [`TEXT_BYTES_MAX`].
///
/// # Safety
/// `text` must point to `len` readable bytes.
unsafe fn copy(text: Str) -> Result<String, PortError> {
    // SAFETY: the caller guarantees it.
    let bytes = unsafe { readable(text.ptr, text.len) }?;
    if bytes.len() > TEXT_BYTES_MAX {
        let text = format!("the plugin passed a text of {} bytes, at most {TEXT_BYTES_MAX} are allowed", bytes.len());
        return Err(PortError::new(PortErrorKind::Limit, text));
    }
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
    // SAFETY: the caller guarantees it.
    match unsafe { readable(text.ptr, text.len) } {
        Ok(bytes) => text::lossy(bytes, max),
        Err(err) => err.to_string(),
    }
}

// ---------------------------------------------------------------------------------------------
// Answers.

thread_local! {
    /// Number of calls into plugins that this thread is inside of.
    static NESTED: Cell<u32> = const { Cell::new(0) };
}

/// Calls a plugin back. For each call with a callback this happens exactly once.
fn reply(to: ReplyTo, answer: Answered, task: Option<&Arc<TaskBytes>>) {
    let Some((call, user)) = to else { return };
    let (status, number, data) = match answer {
        Ok(Answer { number, data }) => (Status::OK, number, data),
        Err(err) => (status_of(err.kind()), 0, Bytes::from(err.to_string())),
    };
    // SAFETY: `call` and `user` came in one call and are used only once, here. The plugin becomes the owner of `data`.
    unsafe { call(user.0, status, number, hand_over(data, task)) };
}

/// Calls into a plugin on the calling thread, unless that is inside `nested_max` such calls.
fn run_here(
    nested_max: u32,
    instance: Option<&Arc<Instance>>,
    entry: &'static str,
    job: impl FnOnce() + Send + 'static,
) {
    let nested = NESTED.get();
    if nested < nested_max {
        NESTED.set(nested + 1);
        job();
        return NESTED.set(nested);
    }
    // The job may call here again.
    let job = move || run_here(u32::MAX, None, entry, job);
    match instance {
        Some(instance) => instance.dispatcher.offer(entry, job),
        None => {
            // Without a thread nobody can run it. The plugin broke the rules, so the host goes on without it.
            if let Some(dispatcher) = stale() {
                dispatcher.offer(entry, job);
            }
        }
    }
}

fn stale() -> Option<Dispatcher> {
    let mut stale = STALE.lock().unwrap_or_else(PoisonError::into_inner);
    if stale.is_none() {
        *stale = Dispatcher::start("stale".into()).ok();
    }
    stale.clone()
}

/// An answer that a plugin must get exactly once. It is also sent when its work panicked or the runtime ended.
struct PendingAnswer {
    instance: Arc<Instance>,
    bytes: Arc<TaskBytes>,
    to: ReplyTo,
}

impl PendingAnswer {
    fn send(&mut self, answer: Answered) {
        let to = self.to.take();
        if to.is_some() {
            let bytes = Arc::clone(&self.bytes);
            let reply = move || run_here(u32::MAX, None, "callback", move || reply(to, answer, Some(&bytes)));
            self.instance.dispatcher.offer("callback", reply);
        }
    }
}

impl Drop for PendingAnswer {
    fn drop(&mut self) {
        self.send(Err(host_failed()));
    }
}

fn host_failed() -> PortError {
    PortError::new(PortErrorKind::Other, "the host failed inside this call; see its log")
}

/// A bug in the host must not unwind into a plugin.
fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    let done = catch_unwind(AssertUnwindSafe(work));
    if done.is_err() {
        error!(event = "host.call_panicked", "a host call panicked");
    }
    done.ok()
}

/// Makes a call for a task, and answers it.
fn call(host: HostWord, task: Task, reply: Callback, user: *mut c_void, make: impl FnOnce(&Running) -> MadeCall) {
    call_nested(NESTED_MAX, host, task, reply_to(reply, user), |_, running| make(running));
}

/// The same. The answer comes on the calling thread, unless that is inside `nested_max` calls into plugins.
fn call_nested(
    nested_max: u32,
    host: HostWord,
    task: Task,
    to: ReplyTo,
    make: impl FnOnce(&Instance, &Running) -> MadeCall,
) {
    let answer_here = |to: ReplyTo, answer, instance: Option<&Arc<Instance>>, bytes: Option<Arc<TaskBytes>>| {
        if to.is_some() {
            run_here(nested_max, instance, "callback", move || reply(to, answer, bytes.as_ref()));
        }
    };
    let Some(instance) = HOSTS.get(host.0) else { return answer_here(to, Err(task_over()), None, None) };
    let Some(running) = instance.tasks.get(task.0) else {
        return answer_here(to, Err(task_over()), Some(&instance), None);
    };
    let called = guarded(|| match make(&instance, &running) {
        Ok(call) => running.calls.call(call),
        Err(err) => Called::Now(Err(err)),
    });
    match called.unwrap_or_else(|| Called::Now(Err(host_failed()))) {
        Called::Now(answer) => answer_here(to, answer, Some(&instance), Some(Arc::clone(&running.bytes))),
        Called::Later(work) => {
            let mut pending = PendingAnswer { instance, bytes: Arc::clone(&running.bytes), to };
            let work = async move {
                let answer = work.await;
                pending.send(answer);
            };
            // Not joined: the work ends with its task. Its last action is the answer that the plugin must get.
            running.runtime.spawn(tracing::Instrument::instrument(work, running.span.clone()));
        }
    }
}

type MadeCall = Result<Call, PortError>;

// ---------------------------------------------------------------------------------------------
// The host's table. Safety of every entry: the plugin calls with values of the declared types. Texts are copied
// before the entry returns, so no lent value is used later.

const TABLE: abi::Host = abi::Host {
    log,
    cancelled,
    complete,
    progress,
    event,
    usage,
    cancel_reason,
    token,
    time_left,
    task_dir,
    input_open,
    input_read,
    input_close,
    input_file,
    input_find,
    output_open,
    output_write,
    output_finish,
    output_abort,
    output_file,
};

unsafe extern "C" fn log(host: HostWord, task: Task, level: u32, target: Str, text: Str, fields: Str) {
    let _ = guarded(|| {
        let Some(instance) = HOSTS.get(host.0).filter(|instance| level.max(1) <= instance.log_level()) else { return };
        // SAFETY: lent for this call.
        let line = unsafe {
            LogLine {
                level,
                target: copy_lossy(target, LOG_TARGET_BYTES_MAX),
                text: copy_lossy(text, LOG_TEXT_BYTES_MAX),
                fields: copy_lossy(fields, text::LOG_FIELDS_READ_BYTES_MAX),
            }
        };
        instance.log(task, line);
    });
}

unsafe extern "C" fn cancelled(host: HostWord, task: Task) -> i32 {
    let answer = guarded(|| HOSTS.get(host.0).map(|instance| instance.cancelled(task)));
    answer.flatten().unwrap_or(Status::STALE.0)
}

unsafe extern "C" fn complete(host: HostWord, task: Task, end: End, text: Str, details: Str) -> Status {
    let ended = guarded(|| {
        let Some(instance) = HOSTS.get(host.0) else { return Status::STALE };
        // SAFETY: lent for this call.
        let (text, details) = unsafe {
            // Truncated JSON is invalid.
            let left_out = (details.len > text::DETAILS_BYTES_MAX).then(|| json!({ "left_out_bytes": details.len }));
            let details = left_out.map_or_else(|| copy_lossy(details, usize::MAX), |left_out| left_out.to_string());
            (copy_lossy(text, REASON_BYTES_MAX), details)
        };
        instance.complete(task, Completion { end, text, details })
    });
    ended.unwrap_or(Status::OTHER)
}

unsafe extern "C" fn progress(host: HostWord, task: Task, json: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    call(host, task, reply, user, |_| unsafe { copy(json) }.map(Call::Progress));
}

unsafe extern "C" fn event(host: HostWord, task: Task, json: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    call(host, task, reply, user, |_| unsafe { copy(json) }.map(Call::Event));
}

unsafe extern "C" fn usage(host: HostWord, task: Task, json: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    call(host, task, reply, user, |_| unsafe { copy(json) }.map(Call::Usage));
}

unsafe extern "C" fn cancel_reason(host: HostWord, task: Task, reply: Callback, user: *mut c_void) {
    call(host, task, reply, user, |_| Ok(Call::CancelReason));
}

unsafe extern "C" fn token(host: HostWord, task: Task, reply: Callback, user: *mut c_void) {
    call(host, task, reply, user, |_| Ok(Call::Token));
}

unsafe extern "C" fn time_left(host: HostWord, task: Task, reply: Callback, user: *mut c_void) {
    call(host, task, reply, user, |_| Ok(Call::TimeLeft));
}

unsafe extern "C" fn task_dir(host: HostWord, task: Task, reply: Callback, user: *mut c_void) {
    // Answered before it returns: the caller is a thread of the plugin. It would create the directory itself and wait
    // as long.
    call_nested(NESTED_FOLDERS_MAX, host, task, reply_to(reply, user), |_, _| Ok(Call::TaskDir));
}

unsafe extern "C" fn input_open(host: HostWord, task: Task, cid: Str, flags: u64, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    call(host, task, reply, user, |_| Ok(Call::InputOpen { cid: unsafe { copy(cid) }?, flags }));
}

unsafe extern "C" fn input_read(host: HostWord, task: Task, stream: u64, max: u64, reply: Callback, user: *mut c_void) {
    call(host, task, reply, user, |_| Ok(Call::InputRead { stream, max }));
}

unsafe extern "C" fn input_close(host: HostWord, task: Task, stream: u64, reply: Callback, user: *mut c_void) {
    call(host, task, reply, user, |_| Ok(Call::InputClose { stream }));
}

unsafe extern "C" fn input_file(host: HostWord, task: Task, cid: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    call(host, task, reply, user, |_| Ok(Call::InputFile { cid: unsafe { copy(cid) }? }));
}

unsafe extern "C" fn input_find(host: HostWord, task: Task, query: Str, reply: Callback, user: *mut c_void) {
    // SAFETY: lent for this call.
    call(host, task, reply, user, |_| Ok(Call::InputFind { query: unsafe { copy(query) }? }));
}

unsafe extern "C" fn output_open(
    host: HostWord,
    task: Task,
    path: Str,
    options: Str,
    reply: Callback,
    user: *mut c_void,
) {
    // SAFETY: lent for this call.
    call(host, task, reply, user, |_| unsafe { Ok(Call::OutputOpen { path: copy(path)?, options: copy(options)? }) });
}

unsafe extern "C" fn output_write(
    host: HostWord,
    task: Task,
    stream: u64,
    data: abi::Bytes,
    reply: Callback,
    user: *mut c_void,
) {
    // SAFETY: handed over by this call.
    let mut data = unsafe { Foreign::new(data) };
    call_nested(NESTED_MAX, host, task, reply_to(reply, user), |instance, running| {
        let len = data.slice()?.len();
        data.held = Some(running.bytes.hold(len));
        data.dispatcher = Some(instance.dispatcher.clone());
        Ok(Call::OutputWrite { stream, data: Bytes::from_owner(data) })
    });
}

unsafe extern "C" fn output_finish(host: HostWord, task: Task, stream: u64, reply: Callback, user: *mut c_void) {
    call(host, task, reply, user, |_| Ok(Call::OutputFinish { stream }));
}

unsafe extern "C" fn output_abort(host: HostWord, task: Task, stream: u64, reply: Callback, user: *mut c_void) {
    call(host, task, reply, user, |_| Ok(Call::OutputAbort { stream }));
}

unsafe extern "C" fn output_file(
    host: HostWord,
    task: Task,
    path: Str,
    options: Str,
    file: Str,
    reply: Callback,
    user: *mut c_void,
) {
    // SAFETY: lent for this call.
    call(host, task, reply, user, |_| unsafe {
        Ok(Call::OutputFile { path: copy(path)?, options: copy(options)?, file: copy(file)? })
    });
}
