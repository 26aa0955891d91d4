//! The binary contract between a host and a plugin, version 1.
//!
//! Two tables of functions and the plain values they take, the same in Rust and in C (`include/runner.h`). This
//! module has no logic and allocates nothing. The SDK's shim and the host use it. A plugin author does not need it.
//!
//! # Rules that keep old plugins working
//! - A table starts with two words. The first is a mask with one bit per entry. The second belongs to the side that
//!   wrote the table (zero in C). An entry may be used only if its bit is set.
//! - Released entries never change. New entries go to the end and are optional for the other side.
//! - Numbers with named constants are used instead of Rust enums. An unknown number is a value, but an unknown
//!   discriminant would be undefined behaviour.
//! - The side that allocates frees: [`Bytes`] carries its own `release`.
//! - No panic crosses the boundary. The SDK catches panics at every entry of the plugin, the host at every
//!   entry of its table.
//!
//! # Start and complete
//! Host entries return at once and answer through a [`Callback`], exactly once, from any thread, also the calling one.
//! Exceptions: `cancelled`, `log` and `complete` have no callback. `task_dir` answers before it returns.
//! `start` returns at once too. The plugin answers with exactly one `complete`, from any thread.
//! The host makes its calls one after the other. If one does not return within some milliseconds, the next one comes
//! on another thread.

pub mod proof;

use std::ffi::c_void;

use abi_stable::StableAbi;

/// Name of the exported function that returns the module table: `runner_module_v1`.
pub const ENTRY: &str = "runner_module_v1";
/// First word of a plugin's own table: "RUNNERv1" read as a big-endian number.
pub const MAGIC: u64 = 0x5255_4e4e_4552_7631;
/// Major version. A host rejects a plugin with another major version.
pub const ABI_MAJOR: u16 = 1;
/// Minor version. It grows with every appended entry.
pub const ABI_MINOR: u16 = 2;
/// `major << 16 | minor`, as the tables carry it.
pub const ABI_VERSION: u32 = (ABI_MAJOR as u32) << 16 | ABI_MINOR as u32;
/// Section that holds the manifest, a JSON object readable without running the file.
pub const MANIFEST_SECTION: &str = ".runner";

/// Borrowed UTF-8 text. It is valid for the duration of the call it is passed to. `ptr` may be null when `len` is
/// 0.
#[repr(C)]
#[derive(Clone, Copy, StableAbi)]
pub struct Str {
    /// First byte.
    pub ptr: *const u8,
    /// Length in bytes.
    pub len: usize,
}

/// Bytes that change their owner. The receiver calls `release(owner)` exactly once when done, from any thread. Without
/// `release` there is nothing to free. `ptr` may be null when `len` is 0.
#[repr(C)]
#[derive(StableAbi)]
pub struct Bytes {
    /// First byte.
    pub ptr: *const u8,
    /// Length in bytes.
    pub len: usize,
    /// Passed to `release`, otherwise opaque.
    pub owner: *mut c_void,
    /// Frees the bytes.
    pub release: Option<unsafe extern "C" fn(owner: *mut c_void)>,
}

/// Names one running task: index and generation. A late, double or forged call gets
/// [`Status::STALE`] and has no effect.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, StableAbi)]
pub struct Task(pub u64);

/// The result of a call. Unknown numbers are failures.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, StableAbi)]
pub struct Status(pub i32);

impl Status {
    /// Success; the data is the answer.
    pub const OK: Self = Self(0);
    /// It failed, and the data is one line of text. All other statuses but `OK` carry such a line too.
    pub const FAILED: Self = Self(1);
    /// It failed, and a retry may succeed.
    pub const RETRYABLE: Self = Self(2);
    /// It ended because the task was cancelled.
    pub const CANCELLED: Self = Self(3);
    /// The task's input is invalid.
    pub const INVALID_INPUT: Self = Self(4);
    /// The other side does not offer this.
    pub const UNSUPPORTED: Self = Self(5);
    /// The task has ended, or never existed.
    pub const STALE: Self = Self(6);
    /// The runner panicked.
    pub const PANICKED: Self = Self(7);
    /// Inputs or outputs could not be transferred, and the runner did not cause it (only for `complete`).
    pub const STORAGE: Self = Self(8);
    /// No such object.
    pub const NOT_FOUND: Self = Self(16);
    /// Malformed request.
    pub const BAD_REQUEST: Self = Self(17);
    /// An artifact path that cannot be stored.
    pub const INVALID_PATH: Self = Self(18);
    /// The store rejected the task's token.
    pub const UNAUTHORIZED: Self = Self(19);
    /// The object exists or is in use.
    pub const CONFLICT: Self = Self(20);
    /// The store answered 5xx.
    pub const SERVER: Self = Self(21);
    /// The store is unreachable, or the transfer was interrupted.
    pub const NETWORK: Self = Self(22);
    /// The store's answer does not follow its protocol.
    pub const MALFORMED: Self = Self(23);
    /// The lease has ended. No more data is transferred for it.
    pub const LEASE_OVER: Self = Self(24);
    /// A local file could not be read or written.
    pub const LOCAL: Self = Self(25);
    /// A limit was exceeded (size of progress, number of waiting events, open streams).
    pub const LIMIT: Self = Self(26);
    /// The task could not be set up on its control plane.
    pub const SETUP: Self = Self(27);
    /// Any other error of the store, such as 403 or 413.
    pub const OTHER: Self = Self(28);
}

/// Receives the answer of a host call, exactly once. `data` belongs to the callback.
#[repr(transparent)]
#[derive(Clone, Copy, StableAbi)]
pub struct Callback {
    /// The function; `user` is the value that was passed with the callback.
    pub call: unsafe extern "C" fn(user: *mut c_void, status: Status, data: Bytes),
}

/// The host's table. Passed to [`Module::init`] once; valid until the process ends.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = HostRef, prefix_fields = HostPrefix)))]
#[sabi(missing_field(panic))]
pub struct Host {
    /// The host's [`ABI_VERSION`].
    pub abi: u32,
    /// Most verbose level worth sending to `log`: 1 error, 2 warn, 3 info, 4 debug, 5 trace, 0 none.
    pub log_level: u32,
    /// Writes a line to the host's log. `task` may be 0. `fields` is a JSON object or empty. One way.
    pub log: unsafe extern "C" fn(task: Task, level: u32, target: Str, text: Str, fields: Str),
    /// Replaces the task's progress; `json` is any JSON value. Answer: nothing.
    pub progress: unsafe extern "C" fn(task: Task, json: Str, reply: Callback, user: *mut c_void),
    /// Appends an event; `json` is any JSON value. Answer: nothing.
    pub event: unsafe extern "C" fn(task: Task, json: Str, reply: Callback, user: *mut c_void),
    /// 0 while the task should go on, 1 when it should stop, [`Status::STALE`] after its end. The return value is
    /// the answer.
    pub cancelled: unsafe extern "C" fn(task: Task) -> i32,
    /// The reason why the task should stop. Answer: a word such as `plane`, `lease-lost`, `budget`. Empty when it
    /// should go on.
    pub cancel_reason: unsafe extern "C" fn(task: Task, reply: Callback, user: *mut c_void),
    /// The storage bearer token, if the operator granted it. Answer: the token.
    pub token: unsafe extern "C" fn(task: Task, reply: Callback, user: *mut c_void),
    /// Opens an input as a stream. Answer: JSON
    /// `{"stream":N,"cid":…,"data_id":…,"name":…,"data_type":…,"domain_id":…,"size":…}`.
    pub input_open: unsafe extern "C" fn(task: Task, cid: Str, reply: Callback, user: *mut c_void),
    /// The next piece of an input, at most `max` bytes. Answer: bytes, none at the end. A `max` above 1 MiB means
    /// that the caller keeps the input in memory. The host then charges its size to the memory budget until the
    /// stream is closed. `LIMIT` if it can never fit.
    pub input_read: unsafe extern "C" fn(task: Task, stream: u64, max: u64, reply: Callback, user: *mut c_void),
    /// Closes an input before or after its end. Answer: nothing.
    pub input_close: unsafe extern "C" fn(task: Task, stream: u64, reply: Callback, user: *mut c_void),
    /// Brings an input to a file in the task's directory. Answer: the JSON of `input_open` without
    /// `stream`, with `path`, `root_dir`, `related_files`, `extracted_paths`.
    pub input_file: unsafe extern "C" fn(task: Task, cid: Str, reply: Callback, user: *mut c_void),
    /// Opens an artifact for writing. `spec` is JSON `{"path":…,"name"?,"data_type"?,"existing_id"?,"size"?}`.
    /// Answer: JSON `{"stream":N}`.
    pub output_open: unsafe extern "C" fn(task: Task, spec: Str, reply: Callback, user: *mut c_void),
    /// Appends to an artifact; `data` goes to the host. One write per stream at a time. Answer: nothing.
    pub output_write: unsafe extern "C" fn(task: Task, stream: u64, data: Bytes, reply: Callback, user: *mut c_void),
    /// Publishes an artifact. Answer: JSON `{"id":…}`.
    pub output_finish: unsafe extern "C" fn(task: Task, stream: u64, reply: Callback, user: *mut c_void),
    /// Discards an artifact. Answer: nothing.
    pub output_abort: unsafe extern "C" fn(task: Task, stream: u64, reply: Callback, user: *mut c_void),
    /// Publishes a file; `spec` as in `output_open`, `path` absolute. Answer: JSON `{"id":…}`.
    pub output_file: unsafe extern "C" fn(task: Task, spec: Str, path: Str, reply: Callback, user: *mut c_void),
    /// Ends the task. `text` is the reason when `status` is not `OK`; `details` is JSON or empty. Returns
    /// `STALE` if the task has already ended.
    #[sabi(last_prefix_field)]
    pub complete: unsafe extern "C" fn(task: Task, status: Status, text: Str, details: Str) -> Status,
    /// Creates the task's directory if it does not exist, with its parent folders. Answers before it returns:
    /// nothing, or why it cannot be created. Since 1.1.
    #[sabi(missing_field(option))]
    pub task_dir: unsafe extern "C" fn(task: Task, reply: Callback, user: *mut c_void),
    /// Adds to what the task has used. `json` is `{"tokens_in":N,"tokens_out":N,"usd_cost":X}`; a missing number is 0.
    /// Answer: nothing. A task that is over its budget of tokens is cancelled before the answer. Since 1.2.
    #[sabi(missing_field(option))]
    pub usage: unsafe extern "C" fn(task: Task, json: Str, reply: Callback, user: *mut c_void),
}

/// The plugin's table. `runner_module_v1` returns a pointer to it, valid until the process ends.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = ModuleRef, prefix_fields = ModulePrefix)))]
#[sabi(missing_field(panic))]
pub struct Module {
    /// [`MAGIC`].
    pub magic: u64,
    /// The plugin's [`ABI_VERSION`].
    pub abi: u32,
    /// Called once, before all other entries. `config` is a JSON object. Answer: nothing, or the reason why the
    /// plugin is unusable.
    pub init: unsafe extern "C" fn(host: HostRef, config: Str, reply: Callback, user: *mut c_void),
    /// Starts a task and returns at once. `request` is JSON `{"capability":…,"dir":…,"lease":{…}}`. `dir` is a
    /// fresh directory that is removed with the task.
    pub start: unsafe extern "C" fn(task: Task, request: Str),
    /// The task should stop; it must still be completed. May come before the `start` of the same task has
    /// returned, or was called. So a plugin calls [`Host::cancelled`] once after it has registered the task.
    pub cancel: unsafe extern "C" fn(task: Task),
    /// The process ends in at most `deadline_ms` milliseconds. No task is running.
    #[sabi(last_prefix_field)]
    pub shutdown: unsafe extern "C" fn(deadline_ms: u32),
}

/// Bits of [`Module`]'s mask that this version needs: all six.
pub const MODULE_MASK: u64 = 0b11_1111;
/// Bits of [`Host`]'s mask that this version writes: all twenty.
pub const HOST_MASK: u64 = 0xf_ffff;

/// A table in memory: the two leading words, then the entries. Read an entry only through a raw pointer, and only if
/// its bit is set: the table may be shorter than this type.
#[repr(C)]
pub struct Table<T> {
    /// One bit per entry, the first entry lowest.
    pub present: u64,
    /// Belongs to the writer.
    pub reserved: usize,
    /// The entries.
    pub entries: T,
}

impl abi_stable::library::RootModule for ModuleRef {
    abi_stable::declare_root_module_statics! {ModuleRef}

    const BASE_NAME: &'static str = "runner_module";
    const NAME: &'static str = "runner_module";
    const VERSION_STRINGS: abi_stable::sabi_types::VersionStrings = abi_stable::package_version_strings!();
}

// abi_stable's prefix metadata has the layout that `Table` and `runner.h` declare by hand.
const _: () = {
    use abi_stable::prefix_type::WithMetadata;
    assert!(size_of::<WithMetadata<Module>>() == size_of::<Table<Module>>());
    assert!(size_of::<WithMetadata<Host>>() == size_of::<Table<Host>>());
    assert!(std::mem::offset_of!(WithMetadata<Module>, value) == std::mem::offset_of!(Table<Module>, entries));
    assert!(size_of::<Bytes>() == 4 * size_of::<usize>());
    assert!(size_of::<Str>() == 2 * size_of::<usize>());
};

/// Allocates a host's table, with its mask, until the process ends.
#[must_use]
pub fn publish_host(host: Host) -> HostRef {
    use abi_stable::prefix_type::PrefixTypeTrait as _;
    host.leak_into_prefix()
}
