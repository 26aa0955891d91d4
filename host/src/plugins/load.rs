//! Reads, checks and opens libraries. All libraries pass one step before the next step begins.
//!
//! The host reads and hashes every file and stores it where nobody can change it. Only then does it open the first
//! file. Thus code of one plugin cannot change what another plugin will run.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::c_void,
    io::Read,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use runner_sdk::abi::{self, Status, proof::Proof};
use sha2::{Digest, Sha256};
use tracing::debug;

use super::{
    InstallError,
    config::Settings,
    discover::Found,
    dispatch::Dispatcher,
    error::is_out_of_files,
    ffi::{self, Entries, Published},
    inspect::{Facts, inspect},
    instance::{Created, Instance},
    open::Sealed,
    writable,
};
use crate::model::Capability;

/// Largest library that is read into memory, in bytes.
pub(super) const LIBRARY_BYTES_MAX: u64 = 4 << 30;

/// A file whose bytes were checked and cannot change.
pub(super) struct Verified {
    pub(super) file: PathBuf,
    pub(super) settings: Settings,
    pub(super) sha256: String,
    pub(super) facts: Facts,
    pub(super) capabilities: Vec<Capability>,
    sealed: Sealed,
}

/// An instance of a mapped library. It has accepted its config.
pub(super) struct Loaded {
    pub(super) instance: Arc<Instance>,
    pub(super) published: Arc<Published>,
    pub(super) entries: Entries,
    /// The plugin's number for the instance.
    pub(super) number: abi::Instance,
    /// Built with the SDK of this repository.
    pub(super) rust: bool,
}

/// Number of bytes at the start of a file that show whether it may be a library.
const HEAD_BYTES: u64 = 4096;

/// Maximum number of files that are read at once. Each is in memory while it is read.
const READERS_MAX: usize = 4;

/// Reads and checks files, several at once. Returns them in their order. No code of the files runs.
pub(super) fn verify_all(found: Vec<Found>, allow_writable: bool) -> Vec<Result<Verified, (PathBuf, InstallError)>> {
    let readers = std::thread::available_parallelism().map_or(1, usize::from).min(READERS_MAX).min(found.len());
    let mut results: Vec<_> = found.iter().map(|_| None).collect();
    let queue = Mutex::new(results.iter_mut().zip(found));
    let work = || {
        let mut buffer = Vec::new();
        loop {
            let next = queue.lock().expect("a reader thread does not panic").next();
            let Some((result, found)) = next else { return };
            *result = Some(verify(found, allow_writable, &mut buffer));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..readers {
            // This thread reads files as well. Therefore fewer threads are enough when one cannot be created.
            if let Err(err) = std::thread::Builder::new().name("plugin-reader".to_owned()).spawn_scoped(scope, work) {
                debug!(error = %err, "no thread to read plugins with");
            }
        }
        work();
    });
    drop(queue);
    results.into_iter().map(|result| result.expect("every queued file was processed")).collect()
}

/// Reads and checks one file. The caller may reuse the buffer.
fn verify(found: Found, allow_writable: bool, buffer: &mut Vec<u8>) -> Result<Verified, (PathBuf, InstallError)> {
    let Found { file, settings, refused } = found;
    match refused.map_or_else(|| check(&file, &settings, allow_writable, buffer), Err) {
        Ok((sha256, facts, capabilities, sealed)) => {
            Ok(Verified { file, settings, sha256, facts, capabilities, sealed })
        }
        Err(err) => Err((file, err)),
    }
}

type Checked = (String, Facts, Vec<Capability>, Sealed);

fn check(file: &Path, settings: &Settings, allow_writable: bool, bytes: &mut Vec<u8>) -> Result<Checked, InstallError> {
    let about = read_into(file, bytes)?;
    let sha256 = base16ct::lower::encode_string(&Sha256::digest(&*bytes));
    if let Some(expected) = settings.sha256.as_ref().filter(|expected| **expected != sha256) {
        return Err(InstallError::PinMismatch { expected: expected.clone(), found: sha256 });
    }
    if settings.sha256.is_none() {
        writable::check(file, &about, allow_writable)?;
    }
    let facts = inspect(bytes)?;
    facts.manifest.check_needs(settings)?;
    let capabilities = chosen(&facts, settings)?;
    let name = file.file_name().map_or_else(|| "plugin".into(), |name| name.to_string_lossy());
    let sealed = Sealed::new(short(&name), bytes).map_err(|err| unreadable(&err))?;
    Ok((sha256, facts, capabilities, sealed))
}

/// Returns the whole content of one library file.
pub(super) fn read(file: &Path) -> Result<Vec<u8>, InstallError> {
    let mut bytes = Vec::new();
    read_into(file, &mut bytes)?;
    Ok(bytes)
}

fn read_into(file: &Path, bytes: &mut Vec<u8>) -> Result<std::fs::Metadata, InstallError> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true);
    // Opening a pipe that has no writer would block.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, rustix::fs::OFlags::NONBLOCK.bits() as i32);
    let opened = options.open(file).map_err(|err| unreadable(&err))?;
    let facts = opened.metadata().map_err(|err| unreadable(&err))?;
    if facts.is_dir() {
        return Err(InstallError::Directory);
    }
    if !facts.is_file() {
        return Err(InstallError::NotALibrary { found: "something that is not a regular file".to_owned() });
    }
    if facts.len() > LIBRARY_BYTES_MAX {
        return Err(InstallError::TooLarge { bytes: facts.len() });
    }
    bytes.clear();
    // The file may grow while it is read.
    let mut opened = opened.take(LIBRARY_BYTES_MAX);
    // A large file with a library's name may be no library. The head shows that without reading the rest.
    opened.by_ref().take(HEAD_BYTES).read_to_end(bytes).map_err(|err| unreadable(&err))?;
    if object::FileKind::parse(&**bytes).is_err() {
        inspect(bytes)?;
    }
    bytes.reserve(facts.len() as usize);
    opened.read_to_end(bytes).map_err(|err| unreadable(&err))?;
    Ok(facts)
}

fn unreadable(err: &std::io::Error) -> InstallError {
    let reason = err.to_string();
    if is_out_of_files(&reason) { InstallError::TooManyFiles } else { InstallError::Unreadable { reason } }
}

/// Cuts a name to the length that a memory file may have.
fn short(name: &str) -> &str {
    let mut end = name.len().min(200);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

fn chosen(facts: &Facts, settings: &Settings) -> Result<Vec<Capability>, InstallError> {
    let all: Vec<Capability> =
        facts.manifest.capabilities.iter().filter_map(|name| Capability::parse(name).ok()).collect();
    if settings.capabilities.as_ref().is_some_and(BTreeSet::is_empty) {
        return Err(InstallError::ServesNothing);
    }
    let named = settings.capabilities.iter().flatten().chain(settings.capability_wall_times.keys());
    if let Some(unknown) = named.into_iter().find(|name| !all.contains(name)) {
        let serves = facts.manifest.capabilities.join(", ");
        return Err(InstallError::UnknownCapability { wanted: unknown.to_string(), serves });
    }
    let wanted = |name: &Capability| settings.capabilities.as_ref().is_none_or(|wanted| wanted.contains(name));
    Ok(all.into_iter().filter(wanted).collect())
}

/// Opens a checked file and creates an instance on the instance's own thread. A constructor or a `create` that hangs
/// blocks one thread, not the host.
pub(super) fn open(verified: Verified, limit: Duration, log_level: u32) -> Result<Loaded, InstallError> {
    let Verified { settings, sha256, facts, capabilities, sealed, .. } = verified;
    let name: Arc<str> = settings.name.as_deref().unwrap_or(&facts.manifest.name).into();
    let dispatcher = Dispatcher::start(Arc::clone(&name))
        .map_err(|err| InstallError::Open { reason: format!("no thread for it: {err}") })?;
    let (created_sender, created) = mpsc::channel();
    let instance = Arc::new(Instance::new(name, dispatcher, log_level, created_sender));
    let published = Arc::new(Published::new(Arc::clone(&instance)));
    let config = serde_json::Value::Object(settings.config).to_string();
    let capabilities: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
    let rust = facts.rust;
    let began = Instant::now();
    let (entries_sender, opened) = mpsc::channel();
    let known_to = Arc::clone(&published);
    instance.dispatcher.run("create", move || {
        let entries = opened_once(&sha256, sealed, rust);
        let begun = entries.as_ref().ok().copied();
        // The receiver is gone after the time limit.
        let _ = entries_sender.send(entries);
        if let Some(entries) = begun {
            entries.create(&known_to, &config, &capabilities);
        }
    });
    let entries = opened.recv_timeout(limit).map_err(|_| InstallError::OpenHung { limit })??;
    let left = limit.saturating_sub(began.elapsed());
    let Created { status, number, text } =
        created.recv_timeout(left).map_err(|_| InstallError::CreateHung { limit })?;
    match status {
        Status::OK => Ok(Loaded { instance, published, entries, number: abi::Instance(number), rust }),
        Status::PANICKED => Err(InstallError::CreatePanicked { reason: one_line(&text) }),
        _ if text.trim().is_empty() => {
            Err(InstallError::CreateFailed { reason: "the plugin gave no reason".to_owned() })
        }
        _ => Err(InstallError::CreateFailed { reason: one_line(&text) }),
    }
}

/// Maps a library, or returns the entries of the one that is mapped already: equal bytes are mapped once in a process.
/// A library that hangs while it is opened blocks only those who open the same bytes.
fn opened_once(sha256: &str, sealed: Sealed, rust: bool) -> Result<Entries, InstallError> {
    static OPENED: Mutex<BTreeMap<String, Arc<Mutex<Option<Entries>>>>> = Mutex::new(BTreeMap::new());
    let opened = Arc::clone(lock(&OPENED).entry(sha256.to_owned()).or_default());
    let mut opened = lock(&opened);
    if let Some(entries) = *opened {
        return Ok(entries);
    }
    let entries = map(sealed, rust)?;
    *opened = Some(entries);
    Ok(entries)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn map(sealed: Sealed, rust: bool) -> Result<Entries, InstallError> {
    let library = sealed.open().map_err(|reason| match is_out_of_files(&reason) {
        true => InstallError::TooManyFiles,
        false => InstallError::Open { reason },
    })?;
    let symbol = |name: &str| library.address(name);
    let entry = symbol(abi::ENTRY).ok_or(InstallError::NoEntry)?;
    let proof = if rust { symbol(abi::proof::HEADER_SYMBOL) } else { None };
    // After this line the host keeps pointers into the library.
    library.leak();
    if let Some(header) = proof {
        // SAFETY: the address of that symbol in a library that was just leaked.
        unsafe { prove_layout(header) }?;
    }
    // SAFETY: the address of that symbol in a library that was just leaked.
    unsafe { ffi::read_table(entry) }
}

/// Compares the plugin's types with the host's types.
///
/// # Safety
/// As [`abi::proof::prove_layout`].
unsafe fn prove_layout(header: *const c_void) -> Result<(), InstallError> {
    // SAFETY: the caller's promise.
    match unsafe { abi::proof::prove_layout(header) } {
        Ok(Proof::Layout) => Ok(()),
        Ok(Proof::None { reason }) => {
            debug!(reason, "layout not compared, the plugin is checked as a C plugin is");
            Ok(())
        }
        Err(mismatch) => {
            debug!(mismatch = %mismatch.full, "layout check failed");
            Err(InstallError::Layout { line: one_line(&mismatch.line) })
        }
    }
}

/// Makes a plugin's text fit for one line of a terminal or a log.
fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || c.is_control()).collect();
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}
