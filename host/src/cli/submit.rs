//! `runner-host submit`: create a job, wait for it, download its artifacts.
//!
//! [`Args`] has the flags, `inputs` reads the arguments of `--input`, `plane` and `runs` have the wires. `notes` has
//! the messages for people, `artifacts` has the paths of artifacts. Only `--cancel` cancels a job: an interrupted wait
//! leaves it running.

mod artifacts;
mod inputs;
mod notes;
mod plane;
mod runs;

use std::{
    io::Write,
    path::PathBuf,
    sync::{Mutex, OnceLock},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use url::Url;
use uuid::Uuid;

use super::{Exit, Output, put, read_problem, signals, table};
use crate::{
    config::{folder_problem, host_problem},
    model::{Capability, did_you_mean, in_a_line},
    transport::{self, Client},
};
use artifacts::{Artifact, Source};
use inputs::Input;
use notes::Notes;
use plane::{Plane, PlaneError};
use runs::RunPlane;

/// Most tasks of one job: the answer about a job grows with its tasks.
const TASKS_PER_JOB: usize = 100;
/// The delay before the note that no node has leased the job. It is for control planes that do not list what their
/// nodes serve.
const NO_NODE_AFTER: Duration = Duration::from_secs(5);
/// How long the control plane may be unreachable during a wait.
const UNREACHABLE_MAX: Duration = Duration::from_secs(30);
/// After this time without an answer the control plane counts as unreachable.
const UNANSWERED_AFTER: Duration = Duration::from_secs(2);
/// Pauses between two queries of a job: they grow from the first to the last.
const QUERY_PAUSE_MIN: Duration = Duration::from_millis(50);
const QUERY_PAUSE_MAX: Duration = Duration::from_millis(500);

/// Create a job; with --wait, wait for it and download its artifacts
///
/// Uses the dev server of `runner-host dev`; --dms, --domain, --token and --domain-server
/// choose another control plane.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// Capability that the task needs, such as /examples/hello/v1
    #[arg(value_parser = super::parse_capability, required_unless_present = "cancel")]
    pub(super) capability: Option<Capability>,
    /// Cancel this job instead of submitting one
    #[arg(long, value_name = "ID", value_parser = super::parse_id, conflicts_with_all = ["capability", "inputs", "meta", "count", "attempts", "wait", "out"])]
    pub(super) cancel: Option<Uuid>,
    /// Control plane; node-runtime sends inputs of at most 1 MiB inline
    #[arg(long, value_name = "PLANE", value_enum, default_value_t = PlaneKind::Dms)]
    pub(super) plane: PlaneKind,
    /// A file to upload as input, or the id or URL of stored data; may be given several times
    ///
    /// If a file has the name of an id, it is uploaded.
    #[arg(long = "input", short, value_name = "FILE|ID|URL")]
    pub(super) inputs: Vec<PathBuf>,
    /// Parameters of the runner
    #[arg(long, value_name = "JSON", value_parser = parse_json, default_value = "{}")]
    pub(super) meta: Value,
    /// Number of equal tasks
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(super) count: u32,
    /// Most attempts of each task
    #[arg(long, value_name = "N", default_value_t = 3, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) attempts: u32,
    /// Wait for the end and show progress
    #[arg(long)]
    pub(super) wait: bool,
    /// End after this time, such as 90s, 15m or 2h; a created job continues
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = super::parse_duration_above_zero)]
    pub(super) timeout: Option<Duration>,
    /// Folder for the artifacts
    #[arg(long, value_name = "DIR", requires = "wait")]
    pub(super) out: Option<PathBuf>,
    /// Form of the output; JSON also after a timeout, an interrupt or a temporary failure
    #[arg(long = "output", short, value_name = "FORM", value_enum, default_value_t = Output::Text)]
    pub(super) output: Output,
    /// Address of a running `runner-host dev`
    #[arg(long, value_name = "URL", env = "RUNNER_HOST_DEV", default_value = "http://127.0.0.1:8700", value_parser = parse_base_url)]
    pub(super) dev: Url,
    /// Base URL of another task service, including /v1
    #[arg(long, value_name = "URL", requires_all = ["domain", "domain_server"], value_parser = parse_base_url)]
    pub(super) dms: Option<Url>,
    /// Domain to work in
    #[arg(long, value_name = "UUID", requires = "dms", value_parser = super::parse_id)]
    pub(super) domain: Option<Uuid>,
    /// Base URL of the domain's server
    #[arg(long, value_name = "URL", requires = "dms", value_parser = parse_base_url)]
    pub(super) domain_server: Option<Url>,
    /// Domain grant with write scope; others on this machine can read it there, --token-file is better
    #[arg(long, value_name = "TOKEN", requires = "dms", conflicts_with = "token_file")]
    pub(super) token: Option<String>,
    /// File that holds the domain grant
    #[arg(long, value_name = "FILE", requires = "dms")]
    pub(super) token_file: Option<PathBuf>,
}

/// The control plane that gets the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum PlaneKind {
    Dms,
    NodeRuntime,
}

/// The wire to the control plane. A run is shown in the form of a job.
enum Wire {
    Jobs(Plane),
    Runs(RunPlane),
}

impl Wire {
    async fn job(&self, id: Uuid) -> Result<Value, PlaneError> {
        match self {
            Self::Jobs(plane) => plane.job(id).await,
            Self::Runs(plane) => plane.job(id).await,
        }
    }

    async fn cancel_job(&self, id: Uuid, notes: &mut Notes) -> Result<(), PlaneError> {
        match self {
            Self::Jobs(plane) => plane.cancel_job(id, notes).await,
            Self::Runs(plane) => plane.cancel(id, notes).await,
        }
    }

    /// The capabilities that nodes serve, if the control plane lists them.
    async fn served(&self) -> Option<Vec<String>> {
        match self {
            Self::Jobs(plane) => plane.served().await,
            Self::Runs(_) => None,
        }
    }

    /// Where inputs and artifacts are.
    fn store(&self) -> &Plane {
        match self {
            Self::Jobs(plane) => plane,
            Self::Runs(plane) => plane.store(),
        }
    }

    fn artifacts(&self, job: &Value, task: &str) -> Vec<Artifact> {
        match self {
            Self::Jobs(_) => artifacts::listed(job, task),
            Self::Runs(_) => runs::artifacts(job),
        }
    }
}

fn parse_base_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some());
    let url = url.filter(|url| url.query().is_none() && url.fragment().is_none());
    let url = url.ok_or("expected a base URL, such as https://plane.example/v1, without query or fragment")?;
    match host_problem(&url) {
        Some(problem) => Err(problem),
        None => Ok(url),
    }
}

fn parse_json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|err| format!("not JSON: {err}; quote it for your shell, as in '{{\"a\":1}}'"))
}

/// Runs the command and returns its exit code. Results go to stdout, everything else to stderr.
///
/// # Errors
/// Errors without their own exit code: a file that cannot be read or written.
pub(super) async fn run(args: Args, http: transport::Config) -> anyhow::Result<Exit> {
    run_to(args, http, &mut std::io::stdout(), Notes::to_stderr(), NO_NODE_AFTER, signals::interrupted()).await
}

async fn run_to(
    args: Args,
    http: transport::Config,
    out: &mut impl Write,
    mut notes: Notes,
    no_node_after: Duration,
    interrupt: impl Future<Output = ()>,
) -> anyhow::Result<Exit> {
    let (state, plane) = (Mutex::new(SubmitState::default()), OnceLock::new());
    let out_of_time = async {
        match args.timeout {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        ended = submit(&args, http, &plane, &state, out, &mut notes, no_node_after) => Ok(ended),
        () = interrupt => Err(("interrupted".to_owned(), Exit::Cancelled)),
        () = out_of_time => Err((format!("stopped after {:?}", args.timeout.unwrap_or_default()), Exit::TimedOut)),
    };
    notes.clear();
    let ended = match ended {
        Ok(ended) => ended,
        Err((what, exit)) => {
            let state = state.into_inner().expect("nothing panics while it holds this");
            let exit =
                if exit == Exit::TimedOut && state.unreachable_reason().is_some() { Exit::Temporary } else { exit };
            notes.line(&format!("{what}; {state}"));
            if args.output == Output::Json {
                let status = match exit {
                    Exit::TimedOut => "timed_out",
                    Exit::Temporary => "unreachable",
                    _ => "interrupted",
                };
                put(out, &format!("{}\n", state.to_json(status, &what)))?;
            }
            if let Some(plane) = plane.get() {
                plane.store().give_up().await;
            }
            return Ok(exit);
        }
    };
    match ended {
        Ok(code) => Ok(code),
        Err(Stop::Plane(err)) => {
            let mut state = state.into_inner().expect("nothing panics while it holds this");
            let (exit, reason) = (err.exit_code(), err.to_string());
            let text = if err.is_disk_full() {
                format!(
                    "{reason}; {state}; the domain still has the artifacts: free the disk, then download them there or \
                     submit again"
                )
            } else if err.is_temporary() && (!state.jobs.is_empty() || state.job_unanswered) {
                state.last_error.get_or_insert_with(|| reason.clone());
                state.to_string()
            } else {
                reason.clone()
            };
            notes.line(&format!("error: {text}"));
            if exit == Exit::Temporary && args.output == Output::Json {
                let status = if err.is_disk_full() { "disk_full" } else { "unreachable" };
                put(out, &format!("{}\n", state.to_json(status, &reason)))?;
            }
            Ok(exit)
        }
        Err(Stop::Usage(text)) => {
            notes.line(&format!("error: {text}"));
            Ok(Exit::Usage)
        }
        Err(Stop::Other(err)) => Err(err),
    }
}

/// Why a submission ended early.
enum Stop {
    Plane(PlaneError),
    Usage(String),
    Other(anyhow::Error),
}

impl From<PlaneError> for Stop {
    fn from(err: PlaneError) -> Self {
        Self::Plane(err)
    }
}

impl From<anyhow::Error> for Stop {
    fn from(err: anyhow::Error) -> Self {
        Self::Other(err)
    }
}

/// Progress of a submission: what continues when the command ends early.
#[derive(Default)]
struct SubmitState {
    stage: Stage,
    jobs: Vec<Uuid>,
    /// Another request was sent, and its answer has not arrived.
    job_unanswered: bool,
    /// Why the last call to the control plane failed.
    last_error: Option<String>,
    /// The start of the time in which queries of a job got no answer.
    query_sent_at: Option<Instant>,
    /// The last known state of each task. Only used for JSON.
    tasks: Vec<Value>,
}

/// The stage of a submission.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Connect,
    Upload,
    Create,
    Wait,
    /// All jobs have ended. Their artifacts are being downloaded.
    Download,
    Cancel,
}

impl Stage {
    fn word(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Upload => "upload",
            Self::Create => "create",
            Self::Wait => "wait",
            Self::Download => "download",
            Self::Cancel => "cancel",
        }
    }
}

impl SubmitState {
    /// Why the current state of the jobs is unknown, if it is.
    fn unreachable_reason(&self) -> Option<String> {
        let unanswered_for = self.query_sent_at.map(|sent| sent.elapsed()).filter(|since| *since >= UNANSWERED_AFTER);
        let unanswered = || unanswered_for.map(|since| format!("no answer for {} s", since.as_secs()));
        self.last_error.clone().or_else(unanswered)
    }

    fn to_json(&self, status: &str, reason: &str) -> Value {
        json!({
            "status": status, "reason": reason,
            "during": self.stage.word(), "jobs": self.jobs, "unanswered": self.job_unanswered, "tasks": self.tasks,
        })
    }
}

impl std::fmt::Display for SubmitState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.jobs[..], self.stage) {
            (_, Stage::Cancel) => f.write_str("whether the job was cancelled is not known"),
            ([], _) if self.job_unanswered => {
                f.write_str("a job was sent and not answered; whether it was created is not known")
            }
            ([], _) => f.write_str("no job was submitted"),
            (jobs, Stage::Download) => {
                write!(f, "the job has ended, not all artifacts were downloaded: {}", names(jobs))
            }
            (jobs, _) => match self.unreachable_reason() {
                None => write!(f, "the job continues: {}", names(jobs)),
                Some(why) => {
                    let jobs = names(jobs);
                    write!(
                        f,
                        "the control plane is unreachable ({why}); whether the job continues is not known: {jobs}"
                    )
                }
            },
        }
    }
}

/// Reads and changes the progress.
fn at<T>(state: &Mutex<SubmitState>, change: impl FnOnce(&mut SubmitState) -> T) -> T {
    change(&mut state.lock().expect("nothing panics while it holds this"))
}

async fn submit(
    args: &Args,
    http: transport::Config,
    plane_cell: &OnceLock<Wire>,
    state: &Mutex<SubmitState>,
    out: &mut impl Write,
    notes: &mut Notes,
    no_node_after: Duration,
) -> Result<Exit, Stop> {
    let inputs = look(args).map_err(Stop::Usage)?;
    let found = find_plane(args, http).await?;
    let plane = plane_cell.get_or_init(|| found);
    if let Some(id) = args.cancel {
        at(state, |state| state.stage = Stage::Cancel);
        return cancel(args.output, plane, id, out, notes).await;
    }
    let capability = args.capability.as_ref().expect("clap requires it without --cancel");
    at(state, |state| state.stage = Stage::Upload);
    let inline = if let Wire::Runs(_) = plane { runs::inline(&inputs).map_err(Stop::Usage)? } else { None };
    let mut cids = Vec::new();
    if inline.is_none() {
        for input in &inputs {
            cids.push(match input {
                Input::File(file) => plane.store().upload(file, notes).await?,
                Input::Stored(cid) => cid.clone(),
            });
        }
    }
    at(state, |state| state.stage = Stage::Create);
    let run = match plane {
        Wire::Jobs(_) => Value::Null,
        Wire::Runs(plane) => {
            let stored = || inputs.iter().map(Input::name).zip(cids.iter().cloned()).collect();
            let (store, inputs) = match inline {
                Some(values) => (None, values),
                None => (Some(plane.store()), stored()),
            };
            runs::describe(args, capability, store, inputs)
        }
    };
    let mut jobs = Vec::new();
    let mut left = args.count as usize;
    while left > 0 {
        at(state, |state| state.job_unanswered = true);
        let (tasks, id) = match plane {
            Wire::Jobs(plane) => {
                let tasks = left.min(TASKS_PER_JOB);
                (tasks, plane.create_job(&job(args, capability, plane, &cids, tasks), notes).await?)
            }
            Wire::Runs(plane) => (1, plane.create(&run, notes).await?),
        };
        jobs.push(id);
        at(state, |state| {
            state.job_unanswered = false;
            state.jobs.push(id);
        });
        left -= tasks;
    }
    if !args.wait {
        print_job_ids(args.output, out, &jobs)?;
        print_unserved(capability, plane, notes).await;
        return Ok(Exit::Done);
    }
    at(state, |state| state.stage = Stage::Wait);
    // Only a dev server lists what its nodes serve. Elsewhere the note follows after a time without a lease.
    let no_node_after = if print_unserved(capability, plane, notes).await { None } else { Some(no_node_after) };
    let ended = watch(args, capability, plane, &jobs, state, notes, no_node_after).await?;
    at(state, |state| state.stage = Stage::Download);
    finish(args, plane, &ended, out, notes).await
}

/// Cancels a job and prints that.
async fn cancel(form: Output, plane: &Wire, id: Uuid, out: &mut impl Write, notes: &mut Notes) -> Result<Exit, Stop> {
    match plane.cancel_job(id, notes).await {
        Ok(()) => {}
        Err(PlaneError::Refused { status: 404, .. }) => {
            notes.line(&format!("error: the control plane knows no job {id}"));
            return Ok(Exit::Failed);
        }
        Err(err) if err.is_conflict() => {
            // The answer to the cancellation is not for people.
            let status = plane.job(id).await.ok().and_then(|job| Some(job["job"]["status"].as_str()?.to_owned()));
            let status = status.map(|status| format!(", its status is {}", in_a_line(&status))).unwrap_or_default();
            notes.line(&format!("error: job {id} cannot be cancelled any more{status}"));
            return Ok(Exit::Failed);
        }
        Err(err) => return Err(err.into()),
    }
    match form {
        Output::Json => put(out, &format!("{}\n", json!({ "job_id": id, "status": "canceled" })))?,
        Output::Text => put(out, &table([format!("cancelled job {id}")]))?,
    }
    Ok(Exit::Done)
}

/// Checks every named file and folder before anything is sent. Returns the inputs, or why one cannot be used.
fn look(args: &Args) -> Result<Vec<Input>, String> {
    if args.plane == PlaneKind::NodeRuntime && args.dms.is_some() {
        return Err("--dms names a posemesh task service; it cannot be used with --plane node-runtime".to_owned());
    }
    let inputs = args.inputs.iter().map(|input| Input::read(input)).collect::<Result<Vec<_>, _>>()?;
    if args.plane == PlaneKind::NodeRuntime && args.cancel.is_none() {
        runs::check(args, &inputs)?;
    }
    match args.out.as_deref().and_then(|out| Some((out, folder_problem(out)?))) {
        Some((out, why)) => Err(format!("--out {}: {why}", out.display())),
        None => Ok(inputs),
    }
}

async fn find_plane(args: &Args, http: transport::Config) -> Result<Wire, Stop> {
    let client = Client::new(http);
    if args.plane == PlaneKind::NodeRuntime {
        return Ok(Wire::Runs(RunPlane::of_dev(client, &args.dev).await?));
    }
    let Some(dms) = &args.dms else { return Ok(Wire::Jobs(Plane::of_dev(client, &args.dev, plane::DMS).await?)) };
    let token = match (&args.token, &args.token_file) {
        (Some(token), _) => token.trim().to_owned(),
        (None, Some(file)) => {
            if let Some(why) = read_problem("--token-file", file) {
                return Err(Stop::Usage(why));
            }
            let text = std::fs::read_to_string(file);
            text.map_err(|err| Stop::Usage(format!("--token-file {}: {err}", file.display())))?.trim().to_owned()
        }
        (None, None) => return Err(Stop::Usage("--dms needs --token or --token-file".to_owned())),
    };
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let given =
            args.token_file.as_ref().map_or("--token".to_owned(), |file| format!("--token-file {}", file.display()));
        return Err(Stop::Usage(format!(
            "{given}: expected one word of visible ASCII characters, found something else"
        )));
    }
    let (domain, server) = (args.domain.expect("clap requires it"), args.domain_server.as_ref());
    Ok(Wire::Jobs(Plane::new(client, dms, server.expect("clap requires it"), domain, token)?))
}

/// The body of `POST /jobs` (docs/jobs.md).
fn job(args: &Args, capability: &Capability, plane: &Plane, cids: &[String], tasks: usize) -> Value {
    let name = capability.as_str();
    let task = json!({
        "label": name, "stage": "submit", "capability": name, "mode": "public", "capability_filters": {},
        "priority": 0, "inputs_cids": cids, "outputs_prefix": null, "meta": args.meta, "max_attempts": args.attempts,
    });
    json!({
        "domain_id": plane.domain(), "label": format!("submit {name}"), "priority": 0, "meta": {},
        "tasks": vec![task; tasks], "edges": [],
    })
}

fn names(jobs: &[Uuid]) -> String {
    match jobs {
        [one] => one.to_string(),
        more => format!("{} and {} more", more[0], more.len() - 1),
    }
}

fn print_job_ids(form: Output, out: &mut impl Write, jobs: &[Uuid]) -> anyhow::Result<()> {
    match form {
        Output::Json => put(out, &format!("{}\n", json!({ "jobs": jobs }))),
        Output::Text => put(out, &table(jobs)),
    }
}

/// Prints that no node serves the capability, with a similar one that a node serves. Returns whether the control
/// plane lists what its nodes serve.
async fn print_unserved(capability: &Capability, plane: &Wire, notes: &mut Notes) -> bool {
    let Some(served) = plane.served().await else { return false };
    if !served.iter().any(|name| name == capability.as_str()) {
        let near = did_you_mean(capability.as_str(), served.iter().map(String::as_str));
        notes.line(&format!("no node serves {capability} at the moment; the job waits for one{near}"));
    }
    true
}

/// Queries the jobs until all have ended.
async fn watch(
    args: &Args,
    capability: &Capability,
    plane: &Wire,
    jobs: &[Uuid],
    state: &Mutex<SubmitState>,
    notes: &mut Notes,
    no_node_after: Option<Duration>,
) -> Result<Vec<Value>, Stop> {
    let mut known: Vec<Value> = vec![Value::Null; jobs.len()];
    let (started, mut pause) = (Instant::now(), QUERY_PAUSE_MIN);
    let mut unreachable_since: Option<Instant> = None;
    let mut no_node_at = no_node_after.map(|after| started + after);
    loop {
        for (job, known) in jobs.iter().zip(&mut known).filter(|(_, known)| !has_ended(known)) {
            at(state, |state| state.query_sent_at = Some(Instant::now()));
            let answer = plane.job(*job).await;
            at(state, |state| {
                state.query_sent_at = None;
                state.last_error = answer.as_ref().err().map(ToString::to_string);
            });
            match answer {
                Ok(now) => {
                    *known = now;
                    unreachable_since = None;
                }
                Err(err) if err.is_temporary() => {
                    let since = *unreachable_since.get_or_insert_with(|| {
                        notes.line(&format!("{err}; trying again"));
                        Instant::now()
                    });
                    if since.elapsed() > UNREACHABLE_MAX {
                        return Err(err.into());
                    }
                    break;
                }
                Err(err) => return Err(err.into()),
            }
        }
        if args.output == Output::Json {
            let rows = known.iter().flat_map(|job| tasks(job).map(|task| row(job, task))).collect();
            at(state, |state| state.tasks = rows);
        }
        notes.show(args.count as usize, &known);
        if known.iter().all(has_ended) {
            return Ok(known);
        }
        if no_node_at.is_some_and(|at| Instant::now() >= at) {
            no_node_at = None;
            if !known.iter().any(was_leased) {
                notes.line(&format!("no node has leased a task of {capability} yet; the job waits for one"));
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(QUERY_PAUSE_MAX);
    }
}

/// The state of a task.
fn row(job: &Value, task: &Value) -> Value {
    json!({ "task_id": task["id"], "job_id": job["job"]["id"], "status": task["status"] })
}

fn tasks(job: &Value) -> impl Iterator<Item = &Value> {
    job["tasks"].as_array().into_iter().flatten()
}

/// A job has ended when its tasks have ended: a node may still work on a cancelled job.
fn has_ended(job: &Value) -> bool {
    let ended = |task: &Value| matches!(task["status"].as_str(), Some("completed" | "failed" | "canceled"));
    let cancelled = job["job"]["status"] == "canceled";
    cancelled || (tasks(job).next().is_some() && tasks(job).all(ended))
}

fn was_leased(job: &Value) -> bool {
    tasks(job).any(|task| task["attempts"].as_u64().unwrap_or(0) > 0)
}

/// Downloads the artifacts, prints failures and the result.
async fn finish(
    args: &Args,
    plane: &Wire,
    jobs: &[Value],
    out: &mut impl Write,
    notes: &mut Notes,
) -> Result<Exit, Stop> {
    let mut code = Exit::Done;
    let mut results = Vec::new();
    for (number, (job, task)) in jobs.iter().flat_map(|job| tasks(job).map(move |task| (job, task))).enumerate() {
        let status = task["status"].as_str().unwrap_or("unknown");
        let id = task["id"].as_str().unwrap_or("unknown");
        let mut artifacts = Vec::new();
        let mut reason = None;
        match status {
            "completed" => {
                artifacts = plane.artifacts(job, id);
                if let Some(folder) = &args.out {
                    let folder = if args.count > 1 { folder.join((number + 1).to_string()) } else { folder.clone() };
                    for artifact in &mut artifacts {
                        bring(plane, artifact, &folder, notes).await?;
                    }
                }
            }
            "failed" => {
                let why = artifacts::reason(job, id);
                notes.line(&format!("task {id} failed: {why}"));
                reason = Some(why);
                code = Exit::Failed;
            }
            _ => {
                notes.line(&format!("task {id} was cancelled"));
                if code == Exit::Done {
                    code = Exit::Cancelled;
                }
            }
        }
        results.push(json!({
            "task_id": id, "job_id": job["job"]["id"], "status": status, "reason": reason,
            "artifacts": artifacts.iter().map(Artifact::to_json).collect::<Vec<_>>(),
        }));
        if args.output == Output::Text {
            put(&mut *out, &table(&artifacts))?;
        }
    }
    if args.output == Output::Json {
        put(out, &format!("{}\n", json!({ "tasks": results })))?;
    }
    Ok(code)
}

/// Stores an artifact below `folder`.
async fn bring(plane: &Wire, artifact: &mut Artifact, folder: &std::path::Path, notes: &mut Notes) -> Result<(), Stop> {
    let name = match &artifact.source {
        Source::Domain(Some(id)) => id,
        Source::Domain(None) => {
            notes.line(&format!("artifact {} has no id, it cannot be downloaded", artifact.logical_path));
            return Ok(());
        }
        Source::Inline(_) => &artifact.logical_path,
    };
    let own = match artifacts::local_path(folder, &artifact.logical_path) {
        Ok(path) => match artifacts::create_parents(&path) {
            Ok(None) => Ok(path),
            Ok(Some(why)) => Err(why),
            Err(err) => return Err(PlaneError::file(&path, &err).into()),
        },
        Err(why) => Err(why),
    };
    let path = own.unwrap_or_else(|why| {
        let name = artifacts::plain(name);
        notes.line(&format!("artifact path {:?} {why}; stored as {name}", artifact.logical_path));
        folder.join(name)
    });
    match &artifact.source {
        Source::Inline(bytes) => runs::store(bytes.clone(), &path).await?,
        Source::Domain(_) => plane.store().download(name, &path, notes).await?,
    }
    artifact.path = Some(path);
    Ok(())
}

#[cfg(test)]
mod tests;
