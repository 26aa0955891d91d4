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
    abi::{self, Bytes, Callback, Host, Status, Str, Task},
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
        Ok(())
    }
}

export_runner!(Waits, Outlived, NamesTask);

#[allow(improper_ctypes, reason = "a transparent pointer; the lint checks its target")]
unsafe extern "C" {
    fn runner_module_v1() -> abi::ModuleRef;
}

/// Arguments of a `complete` call.
type Completed = (Task, Status, String);

static COMPLETED: OnceLock<Mutex<mpsc::Sender<Completed>>> = OnceLock::new();
static CANCELLED: AtomicBool = AtomicBool::new(false);

/// A host that answers `cancelled`, `cancel_reason` and `complete`.
mod host {
    use super::*;

    pub(super) fn table() -> Host {
        Host {
            abi: abi::ABI_VERSION,
            log_level: 0,
            log,
            progress: with_text,
            event: with_text,
            cancelled,
            cancel_reason,
            token: plain,
            input_open: with_text,
            input_read,
            input_close: with_stream,
            input_file: with_text,
            output_open: with_text,
            output_write,
            output_finish: with_stream,
            output_abort: with_stream,
            output_file,
            complete,
            task_dir: plain,
            usage: with_text,
        }
    }

    const NONE: Bytes = Bytes { ptr: std::ptr::null(), len: 0, owner: std::ptr::null_mut(), release: None };

    unsafe extern "C" fn log(_: Task, _: u32, _: Str, _: Str, _: Str) {}
    unsafe extern "C" fn cancelled(_: Task) -> i32 {
        i32::from(CANCELLED.load(Ordering::Acquire))
    }
    unsafe extern "C" fn cancel_reason(_: Task, reply: Callback, user: *mut c_void) {
        let word: &'static [u8] = b"plane";
        let data = Bytes { ptr: word.as_ptr(), len: word.len(), owner: std::ptr::null_mut(), release: None };
        // SAFETY: `reply` and `user` came in one call and are used once.
        unsafe { (reply.call)(user, Status::OK, data) };
    }
    unsafe extern "C" fn complete(task: Task, status: Status, text: Str, _details: Str) -> Status {
        let bytes = if text.len == 0 {
            &[]
        } else {
            // SAFETY: lent for this call.
            unsafe { std::slice::from_raw_parts(text.ptr, text.len) }
        };
        let answer = (task, status, String::from_utf8_lossy(bytes).into_owned());
        if let Some(sender) = COMPLETED.get() {
            let _ = sender.lock().expect("not poisoned").send(answer);
        }
        Status::OK
    }

    fn refuse(reply: Callback, user: *mut c_void) {
        // SAFETY: `reply` and `user` came in one call and are used once.
        unsafe { (reply.call)(user, Status::UNSUPPORTED, NONE) };
    }
    unsafe extern "C" fn plain(_: Task, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn with_text(_: Task, _: Str, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn with_stream(_: Task, _: u64, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn input_read(_: Task, _: u64, _: u64, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn output_write(_: Task, _: u64, _: Bytes, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
    unsafe extern "C" fn output_file(_: Task, _: Str, _: Str, reply: Callback, user: *mut c_void) {
        refuse(reply, user);
    }
}

fn lend(text: &str) -> Str {
    Str { ptr: text.as_ptr(), len: text.len() }
}

unsafe extern "C" fn ready(user: *mut c_void, status: Status, data: Bytes) {
    // SAFETY: the sender of `plugin`, which waits for this answer.
    let sender = unsafe { &*user.cast::<mpsc::Sender<Status>>() };
    if let Some(release) = data.release {
        // SAFETY: this call transfers the bytes.
        unsafe { release(data.owner) };
    }
    let _ = sender.send(status);
}

/// The plugin in this file, initialised, and the completions of its tasks.
fn plugin() -> (abi::ModuleRef, mpsc::Receiver<Completed>) {
    let (sender, completed) = mpsc::channel();
    assert!(COMPLETED.set(Mutex::new(sender)).is_ok(), "one test initialises the plugin");
    let (sender, answer) = mpsc::channel::<Status>();
    let user = (&raw const sender).cast_mut().cast::<c_void>();
    // SAFETY: exported by the macro above, with this signature. `tell` outlives the answer.
    let table = unsafe {
        let table = runner_module_v1();
        table.init()(abi::publish_host(host::table()), lend("{}"), Callback { call: ready }, user);
        table
    };
    assert_eq!(answer.recv_timeout(LIMIT), Ok(Status::OK));
    (table, completed)
}

fn start(table: abi::ModuleRef, task: Task, capability: &str) {
    let lease = format!(r#"{{"task":{{"id":"t","capability":"{capability}"}}}}"#);
    let request = format!(r#"{{"capability":"{capability}","dir":"/nonexistent","lease":{lease}}}"#);
    // SAFETY: the entry of an initialised plugin; the text is lent for the call.
    unsafe { table.start()(task, lend(&request)) };
}

// A library exports one plugin, which is initialised once: one test, step by step.
#[test]
fn entries_keep_their_contract() {
    let (table, completed) = plugin();
    let (sender, outlived) = mpsc::channel();
    OUTLIVED.set(sender).expect("set once");

    // `tokio::task::id` works before the first wait, in each run.
    for task in 1..=50 {
        start(table, Task(task), NamesTask::CAPABILITY);
        assert_eq!(completed.recv_timeout(LIMIT), Ok((Task(task), Status::OK, String::new())));
    }

    // A context that outlives its task reports the end.
    start(table, Task(100), Outlived::CAPABILITY);
    assert_eq!(completed.recv_timeout(LIMIT), Ok((Task(100), Status::OK, String::new())));
    assert_eq!(outlived.recv_timeout(LIMIT), Ok((true, CancelReason::TaskOver)));

    // A cancel that comes before its start reaches the runner.
    CANCELLED.store(true, Ordering::Release);
    // SAFETY: the entry of an initialised plugin takes any number.
    unsafe { table.cancel()(Task(101)) };
    start(table, Task(101), Waits::CAPABILITY);
    assert_eq!(completed.recv_timeout(LIMIT), Ok((Task(101), Status::FAILED, "Plane true".to_owned())));
}
