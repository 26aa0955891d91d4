//! The entries of an exported plugin, called as a host calls them.

use std::{
    ffi::c_void,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use runner_sdk::{
    CancelReason, Error, Runner, TaskCtx,
    abi::{
        self, Bytes, Callback, CreateRequest, End, Host, HostWord, Instance, Module, ModuleTable, StartRequest, Status,
        Str, Task,
    },
    export_runner,
};

const LIMIT: Duration = Duration::from_secs(10);

/// Fails with its cancel reason.
#[derive(Default)]
struct Waits;

impl Runner for Waits {
    const CAPABILITY: &'static str = "/tests/waits/v1";
    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        let reason = ctx.ctrl.cancelled().await;
        Err(Error::msg(format!("{reason:?} {}", ctx.ctrl.is_cancelled())))
    }
}

/// Returns at once. A task that it spawned waits for the end.
#[derive(Default)]
struct Outlived;

static OUTLIVED: OnceLock<mpsc::Sender<(bool, CancelReason)>> = OnceLock::new();

impl Runner for Outlived {
    const CAPABILITY: &'static str = "/tests/outlived/v1";
    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        tokio::spawn(async move {
            let reason = ctx.ctrl.cancelled().await;
            let seen = (ctx.ctrl.is_cancelled(), reason);
            OUTLIVED.get().map(|sender| sender.send(seen))
        });
        Ok(())
    }
}

/// Reads its tokio task id before its first await.
#[derive(Default)]
struct NamesTask;

impl Runner for NamesTask {
    const CAPABILITY: &'static str = "/tests/names-task/v1";
    async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> {
        tokio::task::id();
        tracing::info!("named");
        Ok(())
    }
}

export_runner!(Waits, Outlived, NamesTask);

#[allow(improper_ctypes, reason = "the lint checks the targets of transparent pointers")]
unsafe extern "C" {
    fn runner_module_v2() -> &'static ModuleTable;
}

/// Arguments of a `complete` call.
type Completed = (HostWord, Task, End, String);

static COMPLETED: OnceLock<Mutex<mpsc::Sender<Completed>>> = OnceLock::new();
/// Arguments of a `log` call.
type Logged = (HostWord, u32, String);

static LOGGED: OnceLock<Mutex<mpsc::Sender<Logged>>> = OnceLock::new();
static CANCELLED: AtomicBool = AtomicBool::new(false);

/// A host that answers `cancelled`, `cancel_reason` and `complete`.
mod host {
    use super::*;

    pub(super) fn table() -> Host {
        Host {
            log,
            cancelled,
            complete,
            progress: with_text,
            event: with_text,
            usage: with_text,
            cancel_reason,
            token: plain,
            time_left: plain,
            task_dir: plain,
            input_open,
            input_read,
            input_close: with_stream,
            input_file: with_text,
            input_find: with_text,
            output_open: with_two_texts,
            output_write,
            output_finish: with_stream,
            output_abort: with_stream,
            output_file,
        }
    }

    const NONE: Bytes = Bytes { ptr: std::ptr::null(), len: 0, owner: std::ptr::null_mut(), release: None };

    unsafe extern "C" fn log(host: HostWord, _: Task, level: u32, _: Str, text: Str, _: Str) {
        if let Some(sender) = LOGGED.get() {
            // SAFETY: lent for this call.
            let text = unsafe { copied(text) };
            let _ = sender.lock().expect("not poisoned").send((host, level, text));
        }
    }
    unsafe extern "C" fn cancelled(_: HostWord, _: Task) -> i32 {
        i32::from(CANCELLED.load(Ordering::Acquire))
    }
    unsafe extern "C" fn cancel_reason(_: HostWord, _: Task, reply: Callback, user: *mut c_void) {
        let word: &'static [u8] = b"plane";
        let data = Bytes { ptr: word.as_ptr(), len: word.len(), owner: std::ptr::null_mut(), release: None };
        // SAFETY: `reply` and `user` came in one call and are used once.
        unsafe { (reply.call.expect("a reply"))(user, Status::OK, 0, data) };
    }
    unsafe extern "C" fn complete(host: HostWord, task: Task, end: End, text: Str, _details: Str) -> Status {
        if let Some(sender) = COMPLETED.get() {
            // SAFETY: lent for this call.
            let text = unsafe { copied(text) };
            let _ = sender.lock().expect("not poisoned").send((host, task, end, text));
        }
        Status::OK
    }

    /// # Safety
    /// `text` must be readable.
    unsafe fn copied(text: Str) -> String {
        if text.len == 0 {
            return String::new();
        }
        // SAFETY: the caller's promise.
        String::from_utf8_lossy(unsafe { std::slice::from_raw_parts(text.ptr, text.len) }).into_owned()
    }

    fn refuse(reply: Callback, user: *mut c_void) {
        if let Some(call) = reply.call {
            // SAFETY: `reply` and `user` came in one call and are used once.
            unsafe { call(user, Status::UNSUPPORTED, 0, NONE) };
        }
    }
    unsafe extern "C" fn plain(_: HostWord, _: Task, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn with_text(_: HostWord, _: Task, _: Str, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn with_two_texts(_: HostWord, _: Task, _: Str, _: Str, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn with_stream(_: HostWord, _: Task, _: u64, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn input_open(_: HostWord, _: Task, _: Str, _: u64, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn input_read(_: HostWord, _: Task, _: u64, _: u64, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn output_write(_: HostWord, _: Task, _: u64, _: Bytes, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn output_file(_: HostWord, _: Task, _: Str, _: Str, _: Str, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
}

fn lend(text: &str) -> Str {
    Str { ptr: text.as_ptr(), len: text.len() }
}

/// The answer of a `create`.
type Created = (Status, u64, String);

unsafe extern "C" fn created(user: *mut c_void, status: Status, number: u64, data: Bytes) {
    // SAFETY: the sender of `create`, which waits for this answer.
    let sender = unsafe { &*user.cast::<mpsc::Sender<Created>>() };
    let mut text = String::new();
    if data.len > 0 {
        // SAFETY: this call transfers the bytes.
        text = String::from_utf8_lossy(unsafe { std::slice::from_raw_parts(data.ptr, data.len) }).into_owned();
    }
    if let Some(release) = data.release {
        // SAFETY: this call transfers the bytes.
        unsafe { release(data.owner) };
    }
    let _ = sender.send((status, number, text));
}

fn entries() -> &'static Module {
    // SAFETY: exported by the macro above, with this signature.
    unsafe { &runner_module_v2().table.entries }
}

/// Makes an instance of the plugin in this file that serves `capabilities`.
fn create(host: HostWord, log_level: u32, capabilities: &[&str], config: &str) -> Created {
    let names: Vec<Str> = capabilities.iter().map(|name| lend(name)).collect();
    let request = CreateRequest {
        size: size_of::<CreateRequest>() as u32,
        abi: abi::ABI_VERSION,
        log_level,
        capabilities_len: names.len() as u32,
        capabilities: names.as_ptr(),
        name: lend("tests"),
        config: lend(config),
    };
    let (sender, answer) = mpsc::channel::<Created>();
    let user = (&raw const sender).cast_mut().cast::<c_void>();
    // SAFETY: the request and the sender outlive the answer, which comes before this returns.
    unsafe {
        let reply = Callback { call: Some(created) };
        (entries().create)(abi::publish_host(host::table()), host, &raw const request, reply, user);
    }
    answer.recv_timeout(LIMIT).expect("create answers")
}

fn start(instance: Instance, task: Task, capability: &str) {
    let lease = format!(r#"{{"task":{{"id":"t","capability":"{capability}"}}}}"#);
    let request = StartRequest {
        size: size_of::<StartRequest>() as u32,
        inputs_len: 0,
        inputs: std::ptr::null(),
        capability: lend(capability),
        dir: lend("/nonexistent"),
        task_id: lend("t"),
        traceparent: lend(""),
        lease: lend(&lease),
    };
    // SAFETY: the entry of an instance; the request is lent for the call.
    unsafe { (entries().start)(instance, task, &raw const request) };
}

// The log bridge and the completions belong to the process: one test, step by step.
#[test]
fn entries_keep_their_contract() {
    let (sender, completed) = mpsc::channel();
    assert!(COMPLETED.set(Mutex::new(sender)).is_ok(), "set once");
    let (sender, logged) = mpsc::channel();
    assert!(LOGGED.set(Mutex::new(sender)).is_ok(), "set once");
    let (first, second) = (HostWord(11), HostWord(12));
    let (status, number, _) = create(first, 0, &[NamesTask::CAPABILITY, Outlived::CAPABILITY, Waits::CAPABILITY], "{}");
    assert_eq!(status, Status::OK);
    let instance = Instance(number);
    let (sender, outlived) = mpsc::channel();
    OUTLIVED.set(sender).expect("set once");

    // `tokio::task::id` works before the first wait, in each run.
    for task in 1..=50 {
        start(instance, Task(task), NamesTask::CAPABILITY);
        assert_eq!(completed.recv_timeout(LIMIT), Ok((first, Task(task), End::OK, String::new())));
    }

    // A context that outlives its task reports the end.
    start(instance, Task(100), Outlived::CAPABILITY);
    assert_eq!(completed.recv_timeout(LIMIT), Ok((first, Task(100), End::OK, String::new())));
    assert_eq!(outlived.recv_timeout(LIMIT), Ok((true, CancelReason::TaskOver)));

    // A cancel that comes before its start reaches the runner.
    CANCELLED.store(true, Ordering::Release);
    // SAFETY: the entry of an instance takes any number.
    unsafe { (entries().cancel)(instance, Task(101)) };
    start(instance, Task(101), Waits::CAPABILITY);
    assert_eq!(completed.recv_timeout(LIMIT), Ok((first, Task(101), End::FAILED, "Plane true".to_owned())));

    // A second instance has its own host, its own capabilities and its own config.
    let refused = create(second, 0, &[NamesTask::CAPABILITY], r#"{"greeting":"hi"}"#);
    assert_eq!((refused.0, refused.1), (Status::OTHER, 0));
    assert!(refused.2.contains("config has the key `greeting`"), "{}", refused.2);
    let (status, other, _) = create(second, 0, &[NamesTask::CAPABILITY], "{}");
    assert_eq!(status, Status::OK);
    assert_ne!(other, number);
    start(Instance(other), Task(1), NamesTask::CAPABILITY);
    assert_eq!(completed.recv_timeout(LIMIT), Ok((second, Task(1), End::OK, String::new())));
    start(Instance(other), Task(2), Waits::CAPABILITY);
    let unserved = format!("this plugin does not serve {}", Waits::CAPABILITY);
    assert_eq!(completed.recv_timeout(LIMIT), Ok((second, Task(2), End::FAILED, unserved)));

    // The log level changes at run time, and a line goes to the instance of its task.
    start(Instance(other), Task(3), NamesTask::CAPABILITY);
    assert_eq!(completed.recv_timeout(LIMIT), Ok((second, Task(3), End::OK, String::new())));
    assert!(logged.try_recv().is_err(), "level 0 logs nothing");
    // SAFETY: the entry of an instance takes any number.
    unsafe { (entries().log_level)(Instance(other), 3) };
    start(Instance(other), Task(4), NamesTask::CAPABILITY);
    assert_eq!(logged.recv_timeout(LIMIT), Ok((second, 3, "named".to_owned())));
    assert_eq!(completed.recv_timeout(LIMIT), Ok((second, Task(4), End::OK, String::new())));

    // After its shutdown an instance does nothing. The other one goes on.
    // SAFETY: the entries of an instance take any number.
    unsafe { (entries().shutdown)(Instance(other), 1000) };
    start(Instance(other), Task(5), NamesTask::CAPABILITY);
    start(instance, Task(6), NamesTask::CAPABILITY);
    assert_eq!(completed.recv_timeout(LIMIT), Ok((first, Task(6), End::OK, String::new())));
}
