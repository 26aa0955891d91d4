//! The command line: one file per subcommand.

mod cancel;
mod completions;
mod config;
mod dev;
mod invoke;
mod outbox;
mod plugins;
mod run;
mod signals;
mod submit;

use std::{
    io::{self, Write as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use uuid::Uuid;

use crate::{
    config::{HostConfig, Key, Layers, Mistakes, Origin, Secrets, kernel_problem},
    dev::DevError,
    model::{Capability, TaskId, TaskIdError, in_a_line, nearest, parse_duration},
    observe::logs::{self, Format},
    outbox::StateError,
    plugins::{Places, PluginsFile},
};

/// How a command ended, as its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// The task failed.
    Failed = 1,
    /// The command was used wrongly.
    Usage = 2,
    /// Cancelled.
    Cancelled = 3,
    /// Every plugin was refused.
    PluginsRefused = 4,
    /// Timed out.
    TimedOut = 5,
    /// Temporary: the control plane is unreachable, a disk is full, a port is in use, or a drain was cut short.
    Temporary = 75,
    /// The configuration cannot be used, or the node has no access to a folder or address in it.
    Configuration = 78,
    /// The host panicked: a bug. The code of every Rust program.
    Panicked = 101,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[derive(Parser)]
#[command(
    name = "runner-host",
    version,
    about = "A node for leased compute: leases tasks, runs them in plugins, and reports each result until it is accepted.",
    after_help = "Exit codes: 0 done, 1 task failed, 2 usage, 3 cancelled, 4 every plugin refused, 5 timed out, 75 try again later, 78 configuration, 101 a bug of the host.",
    propagate_version = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the node
    Run(run::Args),
    /// Start a dev server on this machine, with a node, for development and tests
    Dev(dev::Args),
    /// Create a job and, if asked, wait for its artifacts
    Submit(Box<submit::Args>),
    /// Run one task on this machine, without a control plane
    Invoke(invoke::Args),
    /// List and inspect plugins, and create new ones
    #[command(subcommand)]
    Plugins(plugins::Command),
    /// Show and check the configuration of a node
    #[command(subcommand)]
    Config(config::Command),
    /// End a running or waiting task; it is reported as failed, with the advice not to retry it
    Cancel(cancel::Args),
    /// List, retry or drop reports that the control plane has not accepted yet
    #[command(subcommand)]
    Outbox(outbox::Command),
    /// Print a completion script for a shell
    Completions(completions::Args),
}

/// Which plugins a command loads.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct PluginArgs {
    /// A folder of plugins, or one library; may be given more than once [default: plugins/ in the folder of the plugins file]
    #[arg(long = "plugins", value_name = "DIR|FILE")]
    plugins: Vec<PathBuf>,
    /// File that says what to load and how [default: plugins.toml in the current folder, if there is one]
    #[arg(long, value_name = "FILE")]
    plugins_file: Option<PathBuf>,
}

/// The node of a command, and the form of its output.
#[derive(clap::Args)]
pub(super) struct StateArgs {
    /// The node's state folder [default: STATE_DIR]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

impl StateArgs {
    /// The state folder of the node.
    fn folder(&self, layers: &Layers) -> Result<PathBuf, Mistakes> {
        match &self.state_dir {
            Some(folder) => Ok(folder.clone()),
            None => Ok(HostConfig::some(layers, &["state"])?.outbox.state_dir),
        }
    }
}

/// The format of printed data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table for people.
    #[default]
    Text,
    /// JSON for programs.
    Json,
}

/// Parses the command line, runs the command, returns its exit code.
#[must_use]
pub fn main(secrets: &Secrets) -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|err| with_suggestion(err).exit());
    crate::plugins::watch_exit();
    // The exit guard attributes every exit without `exit_process` to a plugin.
    let exit = catch_unwind(AssertUnwindSafe(|| execute(cli, secrets))).unwrap_or_else(|_| {
        print_line("error: runner-host has a bug and panicked; report the message above");
        Exit::Panicked
    });
    crate::plugins::exit_process(exit as u8);
    exit.into()
}

fn execute(cli: Cli, secrets: &Secrets) -> Exit {
    let mut layers = Layers::from_environment();
    // The file and the flags configure the logs. So a mistake in them is reported after the logs start.
    let layered = cli.command.lay(&mut layers);
    start_logs(&cli.command, &layers);
    let quiet = cli.command.logs_errors_only();
    let reports_json = matches!(&cli.command, Command::Config(command) if command.reports_json());
    let ended = layered.and_then(|()| match cli.command {
        Command::Run(args) => run::run(&args, &layers, secrets),
        Command::Dev(args) => dev::run(args, layers),
        Command::Submit(args) => block_on(submit::run(*args, HostConfig::some(&layers, &["transport"])?.transport)),
        Command::Invoke(args) => invoke::run(args, &layers),
        Command::Plugins(command) => plugins::run(command, &layers),
        Command::Config(command) => config::run(&command, &layers, secrets),
        Command::Cancel(args) => cancel::run(args, &layers),
        Command::Outbox(command) => outbox::run(&command, &layers),
        Command::Completions(args) => completions::run(&args),
    });
    ended.unwrap_or_else(|err| {
        let lines = match err.downcast_ref::<Mistakes>() {
            Some(Mistakes(lines)) => lines.clone(),
            None => vec![one_line(&err)],
        };
        if reports_json {
            // A closed stdout cannot be reported to anyone.
            let _ = config::report(&lines, &[]);
        } else {
            lines.iter().for_each(|line| print_error(line));
        }
        exit_of(&err, quiet)
    })
}

impl Command {
    /// Adds the settings of flags (above the environment) and of the file (below it).
    fn lay(&self, layers: &mut Layers) -> anyhow::Result<()> {
        match self {
            Self::Run(args) => args.settings.apply(layers),
            Self::Config(command) => command.settings().apply(layers),
            Self::Dev(dev::Args { config: Some(file), .. }) => {
                layers.read_file(file)?;
                layers.ignore_planes();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Whether the command does one thing and ends, so that it logs only errors.
    fn logs_errors_only(&self) -> bool {
        !matches!(self, Self::Run(_) | Self::Dev(_))
    }
}

fn start_logs(command: &Command, layers: &Layers) {
    let fallback = if matches!(command, Command::Run(_)) { Format::Json } else { Format::Text };
    // `config` prints text for people. The log format of the checked configuration does not apply to it.
    let is_for_people = matches!(command, Command::Config(_));
    let format = layers.text("LOG_FORMAT").filter(|_| !is_for_people).map(Format::parse);
    let filter = match Key::find("RUST_LOG").map(|key| layers.get(key)) {
        Some((Some(filter), origin)) if origin > Origin::Default => filter,
        _ if command.logs_errors_only() => "error",
        _ => "info",
    };
    logs::init(format.unwrap_or(fallback), filter);
    LOGS_ARE_JSON.store(format.unwrap_or(fallback) == Format::Json, Ordering::Relaxed);
    ERRORS_AS_JSON.store(format == Some(Format::Json), Ordering::Relaxed);
}

/// JSON logs were requested, so the reason for a failure is JSON too.
static ERRORS_AS_JSON: AtomicBool = AtomicBool::new(false);
/// The form of log lines.
static LOGS_ARE_JSON: AtomicBool = AtomicBool::new(false);

/// From this call on, the reason for a failure has the form of the log lines.
fn errors_as_logs() {
    ERRORS_AS_JSON.store(LOGS_ARE_JSON.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// Adds the nearest subcommand. clap does not find swapped letters in short words.
fn with_suggestion(mut err: clap::Error) -> clap::Error {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let Some(ContextValue::String(word)) = err.get(ContextKind::InvalidSubcommand) else { return err };
    if err.kind() != ErrorKind::InvalidSubcommand {
        return err;
    }
    // The words before it name the parent command.
    let mut command = Cli::command();
    for word in std::env::args_os().skip(1) {
        match word.to_str().and_then(|word| command.find_subcommand(word)) {
            Some(found) => command = found.clone(),
            None => break,
        }
    }
    let near = nearest(word, command.get_subcommands().map(clap::Command::get_name)).map(str::to_owned);
    if let Some(near) = near {
        err.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(vec![near]));
    }
    err
}

/// Prints why the command failed: one line, in the log format if that was chosen.
fn print_error(problem: &str) {
    if ERRORS_AS_JSON.load(Ordering::Relaxed) && tracing::enabled!(tracing::Level::ERROR) {
        tracing::error!(event = "node.failed", error = %problem, "cannot continue");
    } else {
        print_line(format_args!("error: {problem}"));
    }
}

/// The whole chain of causes on one line, so that operators can grep it. A repeated cause is printed once.
fn one_line(err: &anyhow::Error) -> String {
    let mut text = err.to_string();
    for cause in err.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The exit code of a command that ended with `err`. A supervisor starts a node again after [`Exit::Temporary`]
/// and leaves it stopped after [`Exit::Configuration`]. So the latter is only for errors that need an operator.
fn exit_of(err: &anyhow::Error, quiet: bool) -> Exit {
    let refused = |cause: &(dyn std::error::Error + 'static)| {
        let in_use = matches!(cause.downcast_ref(), Some(StateError::InUse { .. }))
            || matches!(cause.downcast_ref(), Some(DevError::InUse { .. }));
        in_use || cause.downcast_ref().is_some_and(|err| !is_for_operator(err))
    };
    match err.downcast_ref::<Exit>() {
        Some(exit) => *exit,
        // A short command has failed at its only action. For a node the operating system refused a resource.
        None if quiet && err.is::<io::Error>() => Exit::Failed,
        None if err.chain().any(refused) => Exit::Temporary,
        None => Exit::Configuration,
    }
}

/// Whether only the operator can correct the cause. Other errors may pass by themselves: a full disk, a quota,
/// a port in use, too many open files, a disk that does not answer.
fn is_for_operator(err: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    #[cfg(unix)]
    if err.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error()) {
        return true;
    }
    matches!(
        err.kind(),
        Kind::NotFound
            | Kind::PermissionDenied
            | Kind::AlreadyExists
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::ReadOnlyFilesystem
            | Kind::AddrNotAvailable
            | Kind::InvalidInput
            | Kind::InvalidFilename
            | Kind::Unsupported
    )
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Done => "done",
            Self::Failed => "the task failed",
            Self::Usage => "wrong usage",
            Self::Cancelled => "cancelled",
            Self::PluginsRefused => "every plugin was refused",
            Self::TimedOut => "timed out",
            Self::Temporary => "try again later",
            Self::Configuration => "the configuration cannot be used",
            Self::Panicked => "the host panicked",
        })
    }
}

/// Size limit of a file that is read completely.
const TEXT_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The longest duration that a flag accepts.
const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A duration on the command line. Zero would end each command at once.
fn parse_duration_above_zero(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text).filter(|time| !time.is_zero() && *time <= YEAR);
    time.ok_or_else(|| "expected a duration above 0 and of at most a year, such as 90s, 15m or 2h".to_owned())
}

/// The id of a task on the command line. A UUID may have any usual form.
fn parse_task(text: &str) -> Result<TaskId, TaskIdError> {
    match Uuid::try_parse(text) {
        Ok(id) => Ok(id.into()),
        Err(_) => TaskId::parse(text),
    }
}

/// An id on the command line.
fn parse_id(text: &str) -> Result<Uuid, String> {
    text.parse().map_err(|_| format!("expected an id such as {}", Uuid::nil()))
}

/// A number of things, at least one.
fn parse_count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| *count > 0);
    count.ok_or_else(|| "expected a whole number above 0".to_owned())
}

/// A capability on the command line.
fn parse_capability(text: &str) -> Result<Capability, String> {
    Capability::parse(text).map_err(|err| err.to_string())
}

/// Runs a command's future on its own runtime.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    on_runtime(tokio::runtime::Builder::new_multi_thread().enable_all().build()?, work)
}

/// Reports that too few files may be open for a node of `slots` with so many plugins, if that is so.
fn too_few_files(slots: usize, plugins: usize) -> Option<Exit> {
    #[cfg(unix)]
    if let Err(few) = crate::open_files::check(slots, plugins) {
        print_error(&few.to_string());
        return Some(Exit::Temporary);
    }
    #[cfg(not(unix))]
    let _ = (slots, plugins);
    None
}

/// Builds a node in this process, which belongs to it: more files may be open.
async fn build_node(
    config: HostConfig,
    plugins: std::sync::Arc<crate::plugins::Plugins>,
) -> anyhow::Result<crate::app::Node> {
    #[cfg(unix)]
    crate::open_files::allow(config.engine.slots);
    crate::app::Node::build(config, plugins).await
}

/// Like [`block_on`] for a process that is only a node. The control thread uses as much processor time as a worker,
/// so the number of workers is one less than the number of processors.
fn block_on_node_runtime<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let workers = std::thread::available_parallelism().map_or(1, |count| (count.get() - 1).max(1));
    on_runtime(tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?, work)
}

fn on_runtime<T>(runtime: tokio::runtime::Runtime, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let ended = runtime.block_on(work);
    // A blocking read (a stalled disk, a terminal) must not keep the process alive.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    ended
}

impl PluginArgs {
    /// Reads the plugins file and finds the folders. `--plugins` replaces the default folder.
    ///
    /// # Errors
    /// All mistakes in the named places and in the default folder.
    fn resolve(&self) -> anyhow::Result<(Places, PluginsFile)> {
        let (places, file, mut mistakes) = self.look();
        if mistakes.is_empty() {
            match Places::from_arguments(&places) {
                Ok(places) => return Ok((places, file)),
                Err(err) if err.is_temporary() => return Err(err.into()),
                Err(err) => mistakes.push(err.to_string()),
            }
        }
        Err(Mistakes(mistakes).into())
    }

    /// The mistakes in the named places, one line each. A missing default folder is no mistake here: it is reported
    /// when plugins are loaded, and the checked node may get other flags.
    fn mistakes(&self) -> Vec<String> {
        self.look().2
    }

    /// The places to search, the content of the plugins file, and the mistakes in both.
    fn look(&self) -> (Vec<PathBuf>, PluginsFile, Vec<String>) {
        let mut mistakes = Vec::new();
        let usual = PathBuf::from("plugins.toml");
        let file = match &self.plugins_file {
            Some(file) => read_problem("--plugins-file", file).map_or_else(
                || Some(file.clone()),
                |why| {
                    mistakes.push(why);
                    None
                },
            ),
            None => Some(usual).filter(|file| file.is_file()),
        };
        let read = file.map(|file| PluginsFile::read(&file));
        let file = match read {
            Some(Ok(file)) => file,
            Some(Err(err)) => {
                mistakes.push(err.to_string());
                PluginsFile::default()
            }
            None => PluginsFile { folder: PathBuf::from("."), ..PluginsFile::default() },
        };
        let (places, named) = match &self.plugins[..] {
            [] => (vec![file.folder.join("plugins")], false),
            named => (named.to_vec(), true),
        };
        for place in &places {
            let problem = if place.is_dir() {
                kernel_problem(place).map(|why| format!("plugins folder: {why}"))
            } else if !named && place.exists() {
                let shown = place.display();
                Some(format!(
                    "plugins folder {shown}: expected a folder, found a file; name it with --plugins if it is a library"
                ))
            } else {
                None
            };
            let unfound = || match Places::from_arguments(std::slice::from_ref(place)) {
                Err(err) if !err.is_temporary() => Some(err.to_string()),
                _ => None,
            };
            mistakes.extend(problem.or_else(|| named.then(unfound).flatten()));
        }
        (places, file, mistakes)
    }

    /// Loads the plugins. Refused ones are in the listings.
    fn load(
        &self,
        max_concurrency: usize,
        options: &crate::plugins::Options,
    ) -> anyhow::Result<crate::plugins::Plugins> {
        let (places, mut file) = self.resolve()?;
        if options.noop {
            file.list_noop(options.noop_sleep_secs);
        }
        Ok(crate::plugins::Plugins::load(&crate::plugins::Config {
            places,
            file,
            max_concurrency,
            log_level: logs::plugin_level(),
            init_limit: options.init_timeout,
            allow_writable: options.allow_writable,
        })?)
    }
}

/// A number with its noun.
fn counted<N: std::fmt::Display + PartialEq + From<u8>>(count: N, one: &str, many: &str) -> String {
    format!("{count} {}", if count == N::from(1) { one } else { many })
}

/// Why the file of `flag` cannot be opened for reading.
fn unreadable(flag: &str, file: &Path) -> Option<String> {
    let shown = file.display();
    // A pipe can be opened only once, by its reader.
    let opened = |about: std::fs::Metadata| if about.is_file() { std::fs::File::open(file).map(drop) } else { Ok(()) };
    match std::fs::metadata(file) {
        Ok(about) if about.is_dir() => Some(format!("{flag} {shown}: expected a file, found a folder")),
        about => about.and_then(opened).err().map(|err| format!("{flag} {shown}: {err}")),
    }
}

/// The same for a file that is read completely. It must not be a device, which has no end, and must not be too large.
fn read_problem(flag: &str, file: &Path) -> Option<String> {
    let shown = file.display();
    unreadable(flag, file).or_else(|| match std::fs::metadata(file).ok()? {
        about if is_device(&about) => Some(format!("{flag} {shown}: expected a file, found a device")),
        about if about.len() > TEXT_BYTES_MAX => {
            Some(format!("{flag} {shown}: expected at most {TEXT_BYTES_MAX} bytes, found more"))
        }
        _ => None,
    })
}

#[cfg(unix)]
fn is_device(about: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    about.file_type().is_char_device() || about.file_type().is_block_device()
}

#[cfg(not(unix))]
fn is_device(_: &std::fs::Metadata) -> bool {
    false
}

/// A line for people, on stderr. A closed stderr is ignored.
fn print_line(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{}", in_a_line(&line.to_string()));
}

/// Rows of a table for people, one line each.
fn table(rows: impl IntoIterator<Item = impl std::fmt::Display>) -> String {
    rows.into_iter().map(|row| in_a_line(&row.to_string()) + "\n").collect()
}

/// Writes a command's data. A closed pipe (`| head`) is no failure. A full disk is one.
fn put(mut to: impl std::io::Write, text: &str) -> anyhow::Result<()> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(err) if err.kind() != std::io::ErrorKind::BrokenPipe => Err(err).context("write to stdout"),
        _ => Ok(()),
    }
}

/// Reserves stdout for the data of the command. From now on the output of plugins goes to stderr,
/// so that it cannot corrupt JSON.
#[cfg(unix)]
fn reserve_stdout() -> anyhow::Result<std::fs::File> {
    use std::os::fd::AsFd;
    let data = std::io::stdout().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdout(std::io::stderr())?;
    Ok(data.into())
}

/// Not possible on this system: the output of plugins stays on stdout.
#[cfg(not(unix))]
fn reserve_stdout() -> anyhow::Result<std::io::Stdout> {
    Ok(std::io::stdout())
}

/// The exit code if no plugin serves anything. The reasons are printed on stderr.
fn nothing_to_serve(plugins: &crate::plugins::Plugins) -> Option<Exit> {
    if !plugins.capabilities().is_empty() {
        return None;
    }
    if plugins.listings().is_empty() {
        print_error("no plugin was found; put a library into the plugins folder or name one with --plugins");
        return Some(Exit::Configuration);
    }
    for listing in plugins.listings() {
        let reason = listing.reason.as_deref().unwrap_or("refused");
        print_error(&format!("plugin {}: {reason}", listing.file.display()));
    }
    Some(refused_exit(&plugins.listings()))
}

/// The exit code if plugins were refused: temporary if one of them may load at the next start.
fn refused_exit(listings: &[crate::plugins::Listing]) -> Exit {
    if listings.iter().any(|listing| listing.temporary) { Exit::Temporary } else { Exit::PluginsRefused }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_printed_once() {
        let cause = std::io::Error::from(std::io::ErrorKind::NotFound);
        let text = cause.to_string();
        let err = anyhow::Error::from(cause).context(format!("open x: {text}")).context("start");
        assert_eq!(one_line(&err), format!("start: open x: {text}"));
    }

    #[test]
    fn table_rows_are_one_line() {
        assert_eq!(table(["a\nb", "c"]), "a\u{fffd}b\nc\n");
    }

    #[cfg(unix)]
    #[test]
    fn transient_errors_exit_75_and_others_78() {
        use rustix::io::Errno;
        let exit = |no: Errno, quiet| {
            let source = io::Error::from(no);
            let refused = StateError::Io { action: "write", path: PathBuf::from("lock"), source };
            exit_of(&anyhow::Error::from(refused).context("STATE_DIR cannot be used"), quiet)
        };
        for no in [
            Errno::NOSPC,
            Errno::DQUOT,
            Errno::ADDRINUSE,
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOMEM,
            Errno::NOBUFS,
            Errno::IO,
            Errno::STALE,
            Errno::AGAIN,
            Errno::BUSY,
        ] {
            assert_eq!((exit(no, false), exit(no, true)), (Exit::Temporary, Exit::Temporary), "{no:?}");
        }
        for no in [
            Errno::NOENT,
            Errno::ACCESS,
            Errno::PERM,
            Errno::NOTDIR,
            Errno::ISDIR,
            Errno::ROFS,
            Errno::ADDRNOTAVAIL,
            Errno::AFNOSUPPORT,
            Errno::INVAL,
            Errno::NAMETOOLONG,
        ] {
            assert_eq!((exit(no, false), exit(no, true)), (Exit::Configuration, Exit::Configuration), "{no:?}");
        }
        let stdout = anyhow::Error::from(io::Error::from(Errno::NOSPC)).context("write to stdout");
        assert_eq!((exit_of(&stdout, true), exit_of(&stdout, false)), (Exit::Failed, Exit::Temporary));
        assert_eq!(exit_of(&anyhow::anyhow!("x").context(Exit::Usage), false), Exit::Usage);
    }
}
