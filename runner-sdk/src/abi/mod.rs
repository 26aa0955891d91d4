//! The binary contract between a host and a plugin, major version 2. It is a draft: it may change until it is frozen.
//!
//! Two tables of functions and the plain values they take, the same in Rust and in C (`include/runner.h`). This
//! module has no logic and allocates nothing. The SDK's shim and the host use it. A plugin author does not need it.
//!
//! # Rules that keep old plugins working
//! - A table starts with a mask: one bit per entry, the first entry lowest. An entry may be used only if its bit is
//!   set. The next word belongs to the side that wrote the table (zero in C).
//! - Released entries never change. New entries go to the end and are optional for the other side.
//! - A request is a struct that begins with its own size. New fields go to its end. The reader checks the size.
//! - Numbers with named constants are used instead of Rust enums. An unknown number is a value, but an unknown
//!   discriminant would be undefined behaviour.
//! - The side that allocates frees: [`Bytes`] carries its own `release`.
//! - No panic crosses the boundary. The SDK catches panics at every entry of the plugin, the host at every
//!   entry of its table.
//!
//! # Instances
//! A library is opened once and may have several instances, each with its own config: [`Module::create`] makes one.
//! The host names an instance by the number that `create` answered. The plugin passes the [`HostWord`] of its
//! instance to every entry of the host.
//!
//! # Start and complete
//! Host entries return at once and answer through a [`Callback`], exactly once, from any thread, also the calling one.
//! Exceptions: `cancelled`, `log` and `complete` have no callback. `task_dir` answers before it returns. Answers inside
//! one another are limited, see the header.
//! `start` returns at once too. The plugin answers with exactly one `complete`, from any thread.
//! The host makes the calls of one instance one after the other. If one does not return within some milliseconds, the
//! next one comes on another thread.

pub mod proof;

use std::ffi::c_void;

use abi_stable::StableAbi;

/// Name of the exported function that returns the [`ModuleTable`].
pub const ENTRY: &str = "runner_module_v2";
/// The exported function of the first draft, major version 1. A plugin that has only this one is rejected.
pub const ENTRY_V1: &str = "runner_module_v1";
/// First word of a [`ModuleTable`]: "RUNNERv2" read as a big-endian number.
pub const MAGIC: u64 = 0x5255_4e4e_4552_7632;
/// Major version. A host rejects a plugin with another major version.
pub const ABI_MAJOR: u16 = 2;
/// Minor version. It grows with every appended entry or field.
pub const ABI_MINOR: u16 = 0;
/// `major << 16 | minor`, as the tables carry it.
pub const ABI_VERSION: u32 = (ABI_MAJOR as u32) << 16 | ABI_MINOR as u32;
/// `major.minor`, as the manifest carries it.
pub const ABI_TEXT: &str = "2.0";
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

/// Names an instance of a plugin to the host. The plugin passes it to every entry of the host. A forged word gets
/// [`Status::STALE`].
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, StableAbi)]
pub struct HostWord(pub u64);

/// Names an instance to its plugin. The plugin chooses the number in its answer to [`Module::create`].
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, StableAbi)]
pub struct Instance(pub u64);

/// Names one running task: index and generation. A late, double or forged call gets
/// [`Status::STALE`] and has no effect.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, StableAbi)]
pub struct Task(pub u64);

/// How a task ended: 0 to 63. A host handles an unknown number as [`End::FAILED`].
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, StableAbi)]
pub struct End(pub i32);

impl End {
    /// The task is done.
    pub const OK: Self = Self(0);
    /// It failed.
    pub const FAILED: Self = Self(1);
    /// It failed, and a retry may succeed.
    pub const RETRYABLE: Self = Self(2);
    /// It ended because it was cancelled.
    pub const CANCELLED: Self = Self(3);
    /// The task's input is invalid. A retry will not help.
    pub const INVALID_INPUT: Self = Self(4);
    /// The runner panicked.
    pub const PANICKED: Self = Self(5);
    /// Inputs or outputs could not be transferred, and the runner did not cause it.
    pub const STORAGE: Self = Self(6);
}

/// The result of a call: 0, or an error from 64 to 127. The reader handles an unknown number as [`Status::OTHER`].
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, StableAbi)]
pub struct Status(pub i32);

impl Status {
    /// Success; number and data are the answer. With every other status the data is one line of text.
    pub const OK: Self = Self(0);
    /// Any other error, such as 403 or 413 of the store.
    pub const OTHER: Self = Self(64);
    /// The other side does not offer this.
    pub const UNSUPPORTED: Self = Self(65);
    /// The task or the instance has ended, or never existed.
    pub const STALE: Self = Self(66);
    /// No such object.
    pub const NOT_FOUND: Self = Self(67);
    /// Malformed request.
    pub const BAD_REQUEST: Self = Self(68);
    /// An artifact path that cannot be stored.
    pub const INVALID_PATH: Self = Self(69);
    /// The store rejected the task's token.
    pub const UNAUTHORIZED: Self = Self(70);
    /// The object exists or is in use.
    pub const CONFLICT: Self = Self(71);
    /// The store answered 5xx.
    pub const SERVER: Self = Self(72);
    /// The store is unreachable, or the transfer was interrupted.
    pub const NETWORK: Self = Self(73);
    /// The store's answer does not follow its protocol.
    pub const MALFORMED: Self = Self(74);
    /// The lease has ended. No more data is transferred for it.
    pub const LEASE_OVER: Self = Self(75);
    /// A local file could not be read or written.
    pub const LOCAL: Self = Self(76);
    /// A limit was exceeded (size of progress, bytes in memory, open streams).
    pub const LIMIT: Self = Self(77);
    /// The task could not be set up on its control plane.
    pub const SETUP: Self = Self(78);
    /// The plugin panicked in [`Module::create`].
    pub const PANICKED: Self = Self(79);
}

/// Flag of `input_open`: the caller keeps the whole input in memory. The host charges its size to the memory budget
/// until the stream is closed, and waits until it fits. `LIMIT` if it can never fit.
pub const INPUT_KEEP: u64 = 1;

/// Receives the answer of a call, exactly once. `data` belongs to the function.
#[repr(transparent)]
#[derive(Clone, Copy, StableAbi)]
pub struct Callback {
    /// The function. `user` is the value that was passed with the callback. `None`: no answer is wanted.
    pub call: Option<unsafe extern "C" fn(user: *mut c_void, status: Status, number: u64, data: Bytes)>,
}

/// What an instance is created from. The host lends it for the duration of the call.
#[repr(C)]
#[derive(Clone, Copy, StableAbi)]
pub struct CreateRequest {
    /// Size of this struct in bytes, as the host knows it.
    pub size: u32,
    /// The host's [`ABI_VERSION`].
    pub abi: u32,
    /// Most verbose level worth sending to `log`: 1 error, 2 warn, 3 info, 4 debug, 5 trace, 0 none.
    pub log_level: u32,
    /// Number of `capabilities`.
    pub capabilities_len: u32,
    /// The capabilities that this instance serves.
    pub capabilities: *const Str,
    /// The name of the instance in the node's log.
    pub name: Str,
    /// The instance's config from `plugins.toml`, a JSON object.
    pub config: Str,
}

/// A task to start. The host lends it for the duration of the call.
#[repr(C)]
#[derive(Clone, Copy, StableAbi)]
pub struct StartRequest {
    /// Size of this struct in bytes, as the host knows it.
    pub size: u32,
    /// Number of `inputs`.
    pub inputs_len: u32,
    /// The task's inputs, in the order of the lease. Each is a `cid` for `input_open`.
    pub inputs: *const Str,
    /// The requested capability.
    pub capability: Str,
    /// The task's own directory. It is removed with the task.
    pub dir: Str,
    /// The task's id, as the control plane wrote it.
    pub task_id: Str,
    /// W3C trace context of the lease, or empty.
    pub traceparent: Str,
    /// The whole lease as JSON, without tokens.
    pub lease: Str,
}

/// The host's table. Passed to [`Module::create`]; valid until the process ends.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = HostRef, prefix_fields = HostPrefix)))]
#[sabi(missing_field(panic))]
pub struct Host {
    /// Writes a line to the host's log. `task` may be 0. `fields` is a JSON object or empty. One way.
    pub log: unsafe extern "C" fn(host: HostWord, task: Task, level: u32, target: Str, text: Str, fields: Str),
    /// 0 while the task should go on, 1 when it should stop, [`Status::STALE`] after its end.
    pub cancelled: unsafe extern "C" fn(host: HostWord, task: Task) -> i32,
    /// Ends the task. `text` is the reason when `end` is not `OK`; `details` is JSON or empty. Returns
    /// [`Status::STALE`] if the task has already ended.
    pub complete: unsafe extern "C" fn(host: HostWord, task: Task, end: End, text: Str, details: Str) -> Status,
    /// Replaces the task's progress; `json` is any JSON value of at most 64 KiB. Answer: nothing.
    pub progress: unsafe extern "C" fn(host: HostWord, task: Task, json: Str, reply: Callback, user: *mut c_void),
    /// Appends an event; `json` is any JSON value of at most 64 KiB. Answer: nothing, when the event has a place
    /// among those that wait for the control plane.
    pub event: unsafe extern "C" fn(host: HostWord, task: Task, json: Str, reply: Callback, user: *mut c_void),
    /// Adds to what the task has used. `json` is `{"tokens_in":N,"tokens_out":N,"usd_cost":X}`; a missing number is 0.
    /// Answer: nothing. A task that is over its budget of tokens is cancelled before the answer.
    pub usage: unsafe extern "C" fn(host: HostWord, task: Task, json: Str, reply: Callback, user: *mut c_void),
    /// The reason why the task should stop. Answer: a word such as `plane`, `lease-lost`, `budget`. Empty when it
    /// should go on.
    pub cancel_reason: unsafe extern "C" fn(host: HostWord, task: Task, reply: Callback, user: *mut c_void),
    /// The storage bearer token, if the operator granted it. Answer: the token; the number is the time when it
    /// expires, in seconds since 1970, or 0 if that is unknown.
    pub token: unsafe extern "C" fn(host: HostWord, task: Task, reply: Callback, user: *mut c_void),
    /// How long the task may still run. Answer: the number is the milliseconds until its lease or its time limit ends,
    /// whichever comes first, or [`u64::MAX`] if neither is known. The data is JSON `{"lease_ms":N,"limit_ms":N}`,
    /// null for unknown. Heartbeats extend the lease.
    pub time_left: unsafe extern "C" fn(host: HostWord, task: Task, reply: Callback, user: *mut c_void),
    /// Creates the task's directory if it does not exist, with its parent folders. Answers before it returns, on the
    /// calling thread: nothing, or why it cannot be created.
    pub task_dir: unsafe extern "C" fn(host: HostWord, task: Task, reply: Callback, user: *mut c_void),
    /// Opens an input as a stream. `flags` is 0 or [`INPUT_KEEP`]. Answer: the number is the stream; the data is JSON
    /// `{"cid":…,"data_id":…,"name":…,"data_type":…,"domain_id":…,"size":…}`.
    pub input_open:
        unsafe extern "C" fn(host: HostWord, task: Task, cid: Str, flags: u64, reply: Callback, user: *mut c_void),
    /// The next piece of an input, at most `max` bytes and at most 1 MiB. Answer: bytes, none at the end.
    pub input_read:
        unsafe extern "C" fn(host: HostWord, task: Task, stream: u64, max: u64, reply: Callback, user: *mut c_void),
    /// Closes an input before or after its end. Answer: nothing.
    pub input_close: unsafe extern "C" fn(host: HostWord, task: Task, stream: u64, reply: Callback, user: *mut c_void),
    /// Brings an input to a file in the task's directory. Answer: the JSON of `input_open`, with `path`, `root_dir`,
    /// `related_files`, `extracted_paths`.
    pub input_file: unsafe extern "C" fn(host: HostWord, task: Task, cid: Str, reply: Callback, user: *mut c_void),
    /// Looks for data in the task's domain. `query` is JSON `{"name"?,"data_type"?,"ids"?}`; `{}` means all data. Answer:
    /// the number is a stream for `input_read` and `input_close`. It has a line of JSON for each found data:
    /// `{"id":…,"name":…,"data_type":…,"size":…,"domain_id":…}`. The id is a `cid` for `input_open`.
    pub input_find: unsafe extern "C" fn(host: HostWord, task: Task, query: Str, reply: Callback, user: *mut c_void),
    /// Opens an artifact for writing at `path`. `options` is empty or JSON
    /// `{"name"?,"data_type"?,"existing_id"?,"size"?}`. Answer: the number is the stream.
    pub output_open:
        unsafe extern "C" fn(host: HostWord, task: Task, path: Str, options: Str, reply: Callback, user: *mut c_void),
    /// Appends to an artifact; `data` goes to the host. One write per stream at a time. Answer: nothing.
    pub output_write:
        unsafe extern "C" fn(host: HostWord, task: Task, stream: u64, data: Bytes, reply: Callback, user: *mut c_void),
    /// Publishes an artifact. Answer: the store's id, or nothing if the store gives none.
    pub output_finish:
        unsafe extern "C" fn(host: HostWord, task: Task, stream: u64, reply: Callback, user: *mut c_void),
    /// Discards an artifact. Answer: nothing.
    pub output_abort: unsafe extern "C" fn(host: HostWord, task: Task, stream: u64, reply: Callback, user: *mut c_void),
    /// Publishes the file at the absolute path `file`; `path` and `options` as in `output_open`. Answer: as
    /// `output_finish`.
    #[sabi(last_prefix_field)]
    pub output_file: unsafe extern "C" fn(
        host: HostWord,
        task: Task,
        path: Str,
        options: Str,
        file: Str,
        reply: Callback,
        user: *mut c_void,
    ),
}

/// The plugin's table, inside a [`ModuleTable`].
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = ModuleRef, prefix_fields = ModulePrefix)))]
#[sabi(missing_field(panic))]
pub struct Module {
    /// Makes an instance. The host calls no other entry for it before the answer. Answer: the number names the
    /// instance to the plugin. With an error, the data is the reason why the plugin is unusable.
    pub create: unsafe extern "C" fn(
        api: HostRef,
        host: HostWord,
        request: *const CreateRequest,
        reply: Callback,
        user: *mut c_void,
    ),
    /// Starts a task and returns at once.
    pub start: unsafe extern "C" fn(instance: Instance, task: Task, request: *const StartRequest),
    /// The task should stop; it must still be completed. May come before the `start` of the same task has
    /// returned, or was called. So a plugin calls [`Host::cancelled`] once after it has registered the task.
    pub cancel: unsafe extern "C" fn(instance: Instance, task: Task),
    /// The instance ends within `deadline_ms` milliseconds. No task is running in it. The host makes no other call
    /// for it after this one has begun. Calls of the plugin for it may be answered [`Status::STALE`].
    #[sabi(last_prefix_field)]
    pub shutdown: unsafe extern "C" fn(instance: Instance, deadline_ms: u32),
    /// The most verbose level worth sending to `log` has changed. Optional: the host drops what it does not want.
    #[sabi(missing_field(option))]
    pub log_level: unsafe extern "C" fn(instance: Instance, level: u32),
}

/// Bits of [`Module`]'s mask that a host needs: `create`, `start`, `cancel`, `shutdown`.
pub const MODULE_NEEDED: u64 = 0b1111;
/// Bits of [`Module`]'s mask in this version: all five.
pub const MODULE_MASK: u64 = 0b1_1111;
/// Bits of [`Host`]'s mask in this version: all twenty.
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

/// What [`ENTRY`] returns a pointer to, valid until the process ends. The two leading words never change.
#[repr(C)]
pub struct ModuleTable {
    /// [`MAGIC`].
    pub magic: u64,
    /// The plugin's [`ABI_VERSION`].
    pub abi: u32,
    /// The entries.
    pub table: Table<Module>,
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
