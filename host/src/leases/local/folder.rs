//! The files of a folder of jobs, and the rules of claims.
//!
//! | file | content |
//! |---|---|
//! | `jobs/ID.json` | a job that has not ended |
//! | `jobs/ID.cancel` | asks to cancel the job |
//! | `running/ID.json` | the claim of a node, until `ends_at` |
//! | `done/ID.json` | the result; written once |
//!
//! A claim is made, replaced and ended under the lock of `.lock`. Two nodes of one machine never hold the same job.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fmt,
    fs::{self, File, TryLockError},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Error as _, value::MapAccessDeserializer},
};
use serde_json::{Value, json};
use tracing::warn;
use uuid::Uuid;

use super::super::wall_time;
use crate::model::{Capability, Outcome, TaskId, TaskResult, resolved_path};

/// The folders of the control plane.
const OWN_FOLDERS: [&str; 3] = ["jobs", "running", "done"];
/// The folders that the node must be able to write, or it cannot run jobs.
const WRITTEN: [&str; 2] = ["running", "done"];
/// How long a change waits for the lock file. Nodes hold it for milliseconds.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
/// The pauses between two tries to lock it. They double from the first to the last.
const LOCK_PAUSE_MIN: Duration = Duration::from_millis(1);
const LOCK_PAUSE_MAX: Duration = Duration::from_millis(50);
/// Most characters of a wrong value that an error shows.
const SHOWN_CHARS_MAX: usize = 60;
/// The names of files that are being written begin with it.
const TEMPORARY: &str = ".tmp";
/// Some editors write it before UTF-8 text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Largest job file, in bytes.
const JOB_BYTES_MAX: u64 = 2 * 1024 * 1024;
/// How long a claim lasts when the job does not say it.
const TERM_DEFAULT: Duration = Duration::from_secs(3600);
/// Longest term of a claim.
pub const TERM_MAX: Duration = Duration::from_secs(24 * 3600);

/// The folder of a control plane and the folders that it uses there.
#[must_use]
pub fn folders(folder: &Path) -> Vec<PathBuf> {
    let parts = OWN_FOLDERS.iter().map(|part| folder.join(part));
    std::iter::once(folder.to_owned()).chain(parts).collect()
}

/// How much later than its file a claim may be dated. The clock of a file system may differ a little.
const CLAIM_MARGIN: Duration = Duration::from_secs(60);

/// How long an abandoned claim stays. The outbox of a node sends the result of its run within this time.
const LATE_REPORT: Duration = Duration::from_secs(600);

/// A job that can be run.
#[derive(Clone, Debug)]
pub struct Job {
    /// The requested capability.
    pub capability: Capability,
    /// Paths, absolute or relative to the folder.
    pub inputs: Vec<PathBuf>,
    /// Parameters for the runner.
    pub meta: Value,
    /// The folder of outputs, absolute or relative to the folder. `None`: `out/ID`.
    pub out: Option<PathBuf>,
    /// How long a claim lasts, from one second to [`TERM_MAX`].
    pub term: Duration,
    /// How long the run may take. `None`: as long as the claim.
    pub time_limit: Option<Duration>,
}

/// Puts a job into a folder. The folder is created if it does not exist.
///
/// # Errors
/// One line when the folder cannot be used.
pub fn submit(folder: &Path, id: &TaskId, job: &Job) -> anyhow::Result<()> {
    let folder = Folder::open(folder.to_owned()).map_err(|problem| anyhow::anyhow!(problem))?;
    let Job { capability, inputs, meta, out, term, time_limit } = job;
    let file = JobFile {
        capability: capability.clone(),
        inputs: inputs.iter().map(AnyPath::from).collect(),
        meta: meta.clone(),
        out: out.as_ref().map(AnyPath::from),
        term_secs: *term,
        time_limit_secs: *time_limit,
    };
    Ok(write(&folder.job(id), &serde_json::to_value(file)?)?)
}

/// The content of a job file. Its errors carry a position and no names of types.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct JobFile {
    #[serde(serialize_with = "as_text", deserialize_with = "capability")]
    capability: Capability,
    #[serde(default)]
    inputs: Vec<AnyPath>,
    #[serde(default)]
    meta: Value,
    #[serde(default)]
    out: Option<AnyPath>,
    #[serde(default = "term_default", serialize_with = "as_seconds", deserialize_with = "term")]
    term_secs: Duration,
    #[serde(default, serialize_with = "as_optional_seconds", deserialize_with = "time_limit")]
    time_limit_secs: Option<Duration>,
}

impl JobFile {
    /// Reads a job of the control plane in `folder`. A byte order mark before it is ignored.
    fn parse(bytes: &[u8], folder: &Path) -> serde_json::Result<Self> {
        /// Accepts only an object. The derived code would also read an array, by position.
        struct Object<'a>(&'a Path);

        impl<'de> de::Visitor<'de> for Object<'_> {
            type Value = JobFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<JobFile, A::Error> {
                let mut file = JobFile::deserialize(MapAccessDeserializer::new(map))?;
                // Checked here, so that the error gets a position in the file.
                let wall_time = wall_time(&file.meta["budgets"]).map_err(A::Error::custom)?;
                file.time_limit_secs = file.time_limit_secs.into_iter().chain(wall_time).min();
                let out = file.out.clone().map(PathBuf::from);
                match out.filter(|out| is_own(self.0, out)) {
                    None => Ok(file),
                    Some(out) => Err(A::Error::custom(format!(
                        "out is {}, a folder of the control plane; give another folder",
                        out.display()
                    ))),
                }
            }
        }

        let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
        let mut reader = serde_json::Deserializer::from_slice(text);
        let file = reader.deserialize_any(Object(folder))?;
        reader.end()?;
        Ok(file)
    }
}

fn term_default() -> Duration {
    TERM_DEFAULT
}

fn as_text<S: Serializer>(value: &impl ToString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.to_string())
}

fn as_seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(time.as_secs())
}

fn as_optional_seconds<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|time| time.as_secs()).serialize(serializer)
}

fn capability<'de, D: Deserializer<'de>>(reader: D) -> Result<Capability, D::Error> {
    Capability::parse(&String::deserialize(reader)?).map_err(D::Error::custom)
}

/// Whether artifacts in `out` could become files of the control plane in `folder`.
fn is_own(folder: &Path, out: &Path) -> bool {
    let (folder, out) = (resolved_path(folder), resolved_path(&folder.join(out)));
    out == folder || OWN_FOLDERS.iter().any(|own| out.starts_with(resolved_path(&folder.join(own))))
}

fn term<'de, D: Deserializer<'de>>(reader: D) -> Result<Duration, D::Error> {
    let Some(term) = seconds(reader, "term_secs")? else { return Ok(TERM_DEFAULT) };
    if !(Duration::from_secs(1)..=TERM_MAX).contains(&term) {
        let message = format!("term_secs is {}, expected 1 to {}", term.as_secs(), TERM_MAX.as_secs());
        return Err(D::Error::custom(message));
    }
    Ok(term)
}

fn time_limit<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<Duration>, D::Error> {
    seconds(reader, "time_limit_secs")
}

/// A whole number of seconds, or `null`.
fn seconds<'de, D: Deserializer<'de>>(reader: D, key: &str) -> Result<Option<Duration>, D::Error> {
    match Value::deserialize(reader)? {
        Value::Null => Ok(None),
        value => match value.as_u64() {
            Some(seconds) => Ok(Some(Duration::from_secs(seconds))),
            None => Err(D::Error::custom(format!("{key} is {}, expected a whole number of seconds", begin(&value)))),
        },
    }
}

/// The beginning of a value that may be large.
fn begin(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A path in JSON: a text, or an array of bytes if the path is not UTF-8.
#[derive(Clone, Serialize)]
#[serde(untagged)]
enum AnyPath {
    Text(String),
    Bytes(Vec<u8>),
}

impl<'de> Deserialize<'de> for AnyPath {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(reader)?;
        let path = match &value {
            Value::String(text) => Some(Self::Text(text.clone())),
            Value::Array(bytes) => {
                let byte = |byte: &Value| byte.as_u64().and_then(|byte| u8::try_from(byte).ok());
                bytes.iter().map(byte).collect::<Option<_>>().map(Self::Bytes)
            }
            _ => None,
        };
        path.ok_or_else(|| {
            D::Error::custom(format!("a path is {}, expected a text or an array of bytes", begin(&value)))
        })
    }
}

impl From<&PathBuf> for AnyPath {
    fn from(path: &PathBuf) -> Self {
        match path.to_str() {
            Some(text) => Self::Text(text.to_owned()),
            None => Self::Bytes(path.as_os_str().as_encoded_bytes().to_owned()),
        }
    }
}

impl From<AnyPath> for PathBuf {
    fn from(path: AnyPath) -> Self {
        match path {
            AnyPath::Text(text) => text.into(),
            #[cfg(unix)]
            AnyPath::Bytes(bytes) => {
                Self::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(bytes))
            }
            #[cfg(not(unix))]
            AnyPath::Bytes(bytes) => String::from_utf8_lossy(&bytes).into_owned().into(),
        }
    }
}

/// A job in the folder.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) id: TaskId,
    /// `Err`: one line about what is wrong with the file.
    pub(super) job: Result<Job, String>,
}

/// The holder of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claimed {
    /// The given claim.
    Ours,
    /// Another claim, or none.
    Other,
}

/// The answer to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClaimAnswer {
    /// The claim holds the job.
    Ours,
    /// Another claim holds the job, or the job has ended.
    Other,
    /// Somebody cancelled the job, so that it must not run.
    Cancelled,
}

/// The end of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcomes {
    /// It has a result.
    Done,
    /// It waits for a node again.
    Requeue,
}

#[derive(Serialize, Deserialize)]
#[serde(expecting = "an object")]
struct Claim {
    claim: Uuid,
    ends_at: Timestamp,
}

/// The part of a result that a repeated report or cancel needs.
#[derive(Deserialize)]
struct Done {
    claim: Uuid,
    outcome: String,
}

impl Done {
    /// Whether the job of `claim` was cancelled.
    fn cancelled(&self, claim: Uuid) -> bool {
        self.claim == claim && self.outcome == Outcome::Cancelled.word()
    }
}

/// See the module documentation.
pub(super) struct Folder {
    path: PathBuf,
    /// Jobs whose claim is not valid. Each is logged once.
    invalid_claims: Mutex<HashSet<TaskId>>,
}

impl Folder {
    /// Opens the folder and creates its missing parts.
    ///
    /// # Errors
    /// One line when it cannot be used.
    pub(super) fn open(path: PathBuf) -> Result<Self, String> {
        for part in OWN_FOLDERS {
            let part = path.join(part);
            fs::create_dir_all(&part).map_err(|err| format!("cannot make {}: {err}", part.display()))?;
        }
        let path = path.canonicalize().map_err(|err| format!("cannot open {}: {err}", path.display()))?;
        Ok(Self { path, invalid_claims: Mutex::default() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn job(&self, id: &TaskId) -> PathBuf {
        self.path.join("jobs").join(format!("{id}.json"))
    }

    fn cancel(&self, id: &TaskId) -> PathBuf {
        self.path.join("jobs").join(format!("{id}.cancel"))
    }

    fn running(&self, id: &TaskId) -> PathBuf {
        self.path.join("running").join(format!("{id}.json"))
    }

    fn done(&self, id: &TaskId) -> PathBuf {
        self.path.join("done").join(format!("{id}.json"))
    }

    /// The claim that holds the job now. A claim of a node lasts at most [`TERM_MAX`]. A later end is the work of
    /// another program and must not block the job for ever.
    fn holder(&self, id: &TaskId, now: Timestamp) -> Option<Uuid> {
        let path = self.running(id);
        let about = fs::metadata(&path).ok()?;
        let invalid = match parse_claim(&path, &about) {
            Ok(Claim { claim, ends_at }) => {
                let written = about.modified().ok().and_then(|at| Timestamp::try_from(at).ok()).unwrap_or(now);
                let latest = later(written, TERM_MAX + CLAIM_MARGIN);
                if ends_at <= latest {
                    return (ends_at > now).then_some(claim);
                }
                self.warn_once(
                    id,
                    &format!("it ends at {ends_at}, more than 24 h after it was written; {latest} is used"),
                );
                return (latest > now).then_some(claim);
            }
            Err(err) if err.kind() == io::ErrorKind::NotFound => return None,
            Err(err) => err,
        };
        self.warn_once(id, &format!("{invalid}; the job counts as not claimed"));
        None
    }

    fn warn_once(&self, id: &TaskId, error: &str) {
        if self.invalid_claims.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone()) {
            warn!(event = "claim.invalid", task_id = %id, error, "claim in the folder running is not valid");
        }
    }

    /// Runs `work` while no other node changes a claim.
    fn locked<T>(&self, work: impl FnOnce() -> io::Result<T>) -> Result<T, String> {
        let locked = || {
            let _lock = self.lock()?; // the lock ends with the file
            work()
        };
        locked().map_err(|err| format!("cannot use {}: {err}", self.path.display()))
    }

    /// Another process may hold the lock for ever. It must not keep threads of this node for ever.
    fn lock(&self) -> io::Result<File> {
        let lock = File::options().create(true).truncate(false).write(true).open(self.path.join(".lock"))?;
        let (until, mut pause) = (Instant::now() + LOCK_LIMIT, LOCK_PAUSE_MIN);
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::Error(err)) => return Err(err),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    thread::sleep(pause);
                    pause = (pause * 2).min(LOCK_PAUSE_MAX);
                }
                Err(TryLockError::WouldBlock) => {
                    let held = format!("another process has held .lock for {} s", LOCK_LIMIT.as_secs());
                    return Err(io::Error::new(io::ErrorKind::TimedOut, held));
                }
            }
        }
    }

    /// Whether claims and results can be written now. Missing folders are created.
    ///
    /// # Errors
    /// One line with the folder and the reason.
    pub(super) fn check(&self) -> Result<(), String> {
        self.locked(|| self.try_write())
    }

    /// Writes one byte to a file without a name in each folder that claims and results need.
    fn try_write(&self) -> io::Result<()> {
        for part in WRITTEN {
            let path = self.path.join(part);
            let write = || {
                match fs::create_dir(&path) {
                    Err(err) if err.kind() != io::ErrorKind::AlreadyExists => return Err(err),
                    _ => {}
                }
                tempfile::tempfile_in(&path)?.write_all(b"\n")
            };
            write().map_err(|err| io::Error::new(err.kind(), format!("cannot write to {part}: {}", bare(&err))))?;
        }
        Ok(())
    }

    /// The first job, by name, that no node holds and one of `served` can run. An unreadable job counts too.
    pub(super) fn next(
        &self,
        served: &[Capability],
        skip: &HashSet<TaskId>,
        now: Timestamp,
    ) -> Result<Option<Found>, String> {
        let list = || -> io::Result<Vec<TaskId>> {
            let mut ids = Vec::new();
            for entry in fs::read_dir(self.path.join("jobs"))? {
                ids.extend(job_id(&entry?.file_name()));
            }
            ids.sort();
            Ok(ids)
        };
        let ids = list();
        if let Ok(ids) = &ids {
            let mut invalid = self.invalid_claims.lock().unwrap_or_else(PoisonError::into_inner);
            invalid.retain(|id| ids.binary_search(id).is_ok());
        }
        let ids = ids.map_err(|err| format!("cannot list {}: {err}", self.path.join("jobs").display()))?;
        for id in ids.into_iter().filter(|id| !skip.contains(id)) {
            if self.done(&id).exists() {
                self.tidy(&id);
                continue;
            }
            if self.holder(&id, now).is_some() {
                continue;
            }
            match read_job(&self.job(&id), &self.path) {
                Ok(Some(job)) if !served.contains(&job.capability) => {}
                Ok(Some(job)) => return Ok(Some(Found { id, job: Ok(job) })),
                Ok(None) => {} // another node ended it meanwhile
                Err(reason) => return Ok(Some(Found { id, job: Err(reason) })),
            }
        }
        Ok(None)
    }

    /// Claims a job for `left` from now on, unless it has ended, was cancelled, or another claim holds it.
    pub(super) fn claim(
        &self,
        id: &TaskId,
        claim: Uuid,
        left: Duration,
        now: Timestamp,
    ) -> Result<ClaimAnswer, String> {
        self.locked(|| {
            // A heartbeat may have cancelled it before this call.
            if read::<Done>(&self.done(id)).is_some_and(|done| done.cancelled(claim)) {
                return Ok(ClaimAnswer::Cancelled);
            }
            let held = self.holder(id, now).is_some_and(|holder| holder != claim);
            if held || self.done(id).exists() || !self.job(id).exists() {
                return Ok(ClaimAnswer::Other);
            }
            if self.cancel(id).exists() {
                return Ok(ClaimAnswer::Cancelled);
            }
            // Without a place for its result, the job must not run.
            self.try_write()?;
            let ends_at = now + SignedDuration::try_from(left).unwrap_or(SignedDuration::MAX);
            write(&self.running(id), &json!(Claim { claim, ends_at }))?;
            Ok(ClaimAnswer::Ours)
        })
    }

    /// Who holds the job, and whether it was cancelled.
    pub(super) fn look_at_claim(&self, id: &TaskId, claim: Uuid) -> Result<(Claimed, bool), String> {
        if read::<Done>(&self.done(id)).is_some_and(|done| done.cancelled(claim)) {
            return Ok((Claimed::Ours, true));
        }
        let ours = read::<Claim>(&self.running(id)).is_some_and(|held| held.claim == claim);
        Ok((if ours { Claimed::Ours } else { Claimed::Other }, self.cancel(id).exists()))
    }

    /// Ends a job that `claim` holds. A repeat of an accepted report finds its own result.
    pub(super) fn end(
        &self,
        id: &TaskId,
        claim: Uuid,
        result: &TaskResult,
        outcome: Outcomes,
        now: Timestamp,
    ) -> Result<Claimed, String> {
        self.locked(|| {
            if let Some(done) = read::<Done>(&self.done(id)) {
                return Ok(if done.claim == claim { Claimed::Ours } else { Claimed::Other });
            }
            if read::<Claim>(&self.running(id)).is_none_or(|held| held.claim != claim) {
                return Ok(Claimed::Other);
            }
            match outcome {
                Outcomes::Requeue if self.job(id).exists() => remove(&self.running(id))?,
                // Without its job file a job cannot run again, so a stopped run is its result.
                Outcomes::Requeue | Outcomes::Done => {
                    write(&self.done(id), &done(id, claim, result, now))?;
                    self.tidy(id);
                }
            }
            Ok(Claimed::Ours)
        })
    }

    /// Ends a job that somebody cancelled, unless another claim holds it. Returns whether this call ended it.
    pub(super) fn cancel_job(
        &self,
        id: &TaskId,
        claim: Uuid,
        result: &TaskResult,
        now: Timestamp,
    ) -> Result<bool, String> {
        self.locked(|| {
            if self.holder(id, now).is_some_and(|holder| holder != claim) {
                return Ok(false);
            }
            let ends = !self.done(id).exists();
            if ends {
                write(&self.done(id), &done(id, claim, result, now))?;
            }
            self.tidy(id);
            Ok(ends)
        })
    }

    /// Ends a job that cannot be run and that no node holds.
    pub(super) fn reject(
        &self,
        id: &TaskId,
        claim: Uuid,
        result: &TaskResult,
        now: Timestamp,
    ) -> Result<Claimed, String> {
        self.locked(|| {
            if self.done(id).exists() {
                return Ok(Claimed::Other);
            }
            write(&self.done(id), &done(id, claim, result, now))?;
            self.tidy(id);
            Ok(Claimed::Ours)
        })
    }

    /// Removes files that a killed process began to write. All writes happen under the lock.
    pub(super) fn remove_temporary(&self) -> Result<(), String> {
        self.locked(|| {
            for part in WRITTEN {
                for entry in fs::read_dir(self.path.join(part))?.flatten() {
                    let name = entry.file_name();
                    let is_temporary = name.to_str().is_some_and(|name| name.starts_with(TEMPORARY));
                    if is_temporary && job_id(&name).is_none() {
                        remove(&entry.path())?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Removes claims that have ended and whose job file is gone: nobody else would replace them.
    pub(super) fn remove_abandoned(&self, now: Timestamp) -> Result<(), String> {
        self.locked(|| {
            for entry in fs::read_dir(self.path.join("running"))?.flatten() {
                let Some(id) = job_id(&entry.file_name()) else { continue };
                let is_abandoned = || -> io::Result<bool> {
                    let about = entry.metadata()?;
                    let written = Timestamp::try_from(about.modified()?).unwrap_or(now);
                    let ends_at = parse_claim(&entry.path(), &about).map_or(written, |claim| claim.ends_at);
                    let ends_at = ends_at.min(later(written, TERM_MAX + CLAIM_MARGIN));
                    Ok(later(ends_at, LATE_REPORT) < now)
                };
                let job_is_gone =
                    matches!(self.job(&id).symlink_metadata(), Err(err) if err.kind() == io::ErrorKind::NotFound);
                if job_is_gone && is_abandoned().unwrap_or(false) {
                    remove(&entry.path())?;
                }
            }
            Ok(())
        })
    }

    /// Removes the files of a job that has a result. The next scan retries what could not be removed.
    fn tidy(&self, id: &TaskId) {
        for path in [self.job(id), self.cancel(id), self.running(id)] {
            let _ = remove(&path);
        }
    }
}

fn later(at: Timestamp, by: Duration) -> Timestamp {
    at.saturating_add(by).expect("a time span without calendar units")
}

/// The id of the job whose file has this name.
fn job_id(name: &OsStr) -> Option<TaskId> {
    let stem = name.to_str()?.strip_suffix(".json")?;
    // `.` and `..` would name folders of this machine.
    if matches!(stem, "." | "..") { None } else { TaskId::parse(stem).ok() }
}

fn done(id: &TaskId, claim: Uuid, result: &TaskResult, now: Timestamp) -> Value {
    json!({
        "id": id.as_str(),
        "claim": claim,
        "outcome": result.outcome.word(),
        "code": result.outcome.code(),
        "reason": result.outcome.reason(),
        "retryable": result.outcome.retryable(),
        "artifacts": result.artifacts,
        "inputs": result.inputs,
        "ended_at": now,
    })
}

/// Reads a job of the control plane in `folder`. `None`: there is no such file.
fn read_job(path: &Path, folder: &Path) -> Result<Option<Job>, String> {
    let size = match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err("the job file is not a regular file".to_owned()),
        Ok(metadata) => metadata.len(),
        Err(err) if err.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            return Err("the job file is a link to a file that does not exist".to_owned());
        }
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(format!("the job file cannot be read: {err}")),
    };
    if size > JOB_BYTES_MAX {
        return Err(format!("the job file has {size} bytes; at most {JOB_BYTES_MAX} are read"));
    }
    let bytes = fs::read(path).map_err(|err| format!("the job file cannot be read: {err}"))?;
    let file = JobFile::parse(&bytes, folder).map_err(|err| format!("the job file cannot be used: {err}"))?;
    let JobFile { capability, inputs, meta, out, term_secs: term, time_limit_secs: time_limit } = file;
    let inputs = inputs.into_iter().map(PathBuf::from).collect();
    Ok(Some(Job { capability, inputs, meta, out: out.map(PathBuf::from), term, time_limit }))
}

/// The error says what is wrong with the file.
fn parse_claim(path: &Path, about: &fs::Metadata) -> io::Result<Claim> {
    // Reading a pipe would wait for its writer.
    if !about.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::from)
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Option<T> {
    // Reading a pipe would wait for its writer.
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Writes a file atomically, also across a power failure.
fn write(path: &Path, content: &Value) -> io::Result<()> {
    let folder = path.parent().expect("a file in the folder of jobs");
    let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder)?;
    file.write_all(format!("{content}\n").as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|err| err.error)?;
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// The error of the operating system, without the path that `tempfile` adds.
fn bare(err: &io::Error) -> String {
    match err.get_ref().and_then(std::error::Error::source) {
        Some(source) => source.to_string(),
        None => err.to_string(),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}
