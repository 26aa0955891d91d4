//! The binary as a process. It starts with an explicit environment, its output is read line by line, and it is killed
//! when the test drops it.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use runner_host::{
    auth::NodeKey,
    transport::{self, Client},
};
use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
    process::{Pid, Signal},
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;
use url::Url;

use super::{EVENT_LIMIT, fixtures, hygiene::Hygiene, trimmed, within};

/// A command line of the binary. Its environment contains only the variables that are set here.
pub(crate) struct Cli {
    args: Vec<OsString>,
    env: BTreeMap<String, String>,
    dir: Option<PathBuf>,
    file_bytes_max: Option<u64>,
    open_files: Option<(u64, u64)>,
    /// The folder on which a separate disk is mounted, and the script that mounts it.
    disk: Option<(PathBuf, &'static str)>,
    obeys_permissions: bool,
}

impl Cli {
    pub(crate) fn new(args: &[&str]) -> Self {
        let args = args.iter().map(OsString::from).collect();
        Self {
            args,
            env: BTreeMap::new(),
            dir: None,
            file_bytes_max: None,
            open_files: None,
            disk: None,
            obeys_permissions: false,
        }
    }

    /// No file of the process can grow beyond this size. A larger write fails, as on a full disk.
    pub(crate) fn file_bytes_max(mut self, bytes: u64) -> Self {
        self.file_bytes_max = Some(bytes);
        self
    }

    /// Mounts a full disk at this folder for the process. Only where [`can_mount`].
    pub(crate) fn full_disk(mut self, folder: &Path) -> Self {
        self.disk = Some((folder.to_owned(), FILL_AND_RUN));
        self
    }

    /// Mounts a separate disk of four megabytes at this folder for the process. Only where [`can_mount`].
    pub(crate) fn small_disk(mut self, folder: &Path) -> Self {
        self.disk = Some((folder.to_owned(), MOUNT_AND_RUN));
        self
    }

    /// Sets the soft and the hard limit of open files.
    pub(crate) fn open_files(mut self, now: u64, most: u64) -> Self {
        self.open_files = Some((now, most));
        self
    }

    /// File permissions apply to the process even if this user is root.
    pub(crate) fn obeys_permissions(mut self) -> Self {
        self.obeys_permissions = true;
        self
    }

    pub(crate) fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    pub(crate) fn set(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.insert(name.to_owned(), value.into());
        self
    }

    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.dir = Some(dir.to_owned());
        self
    }

    /// If the test sets no log level, `IT_RUST_LOG` sets it. At `trace` all possible output is searched for secrets
    /// ([`super::hygiene`]). CI runs these tests in that way.
    pub(crate) fn start(mut self) -> Process {
        if let (Ok(filter), false) = (std::env::var("IT_RUST_LOG"), self.env.contains_key("RUST_LOG")) {
            self.env.insert("RUST_LOG".to_owned(), filter);
        }
        let binary = env!("CARGO_BIN_EXE_runner-host");
        let mut command = match (self.file_bytes_max, self.disk) {
            (None, None) => match self.open_files {
                None if self.obeys_permissions && rustix::process::geteuid().is_root() => {
                    let mut without = Command::new("setpriv");
                    without.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(binary);
                    without
                }
                None => Command::new(binary),
                Some((now, most)) => {
                    let limited = format!("ulimit -S -n {now} && ulimit -H -n {most} && exec \"$0\" \"$@\"");
                    let mut shell = Command::new("/bin/sh");
                    shell.arg("-c").arg(limited).arg(binary);
                    shell
                }
            },
            (None, Some((folder, how))) => {
                let mut shell = Command::new(MOUNTING[0]);
                shell.args(&MOUNTING[1..]).arg(how).arg(folder).arg(binary);
                shell
            }
            (Some(bytes), _) => {
                // The signal for the limit is ignored. A program keeps an ignored signal after exec.
                let limited = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", bytes / 512);
                let mut shell = Command::new("/bin/sh");
                shell.arg("-c").arg(limited).arg(binary);
                shell
            }
        };
        let hygiene = Hygiene::of(&self.env);
        command.args(self.args).env_clear().envs(self.env);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(dir) = self.dir {
            command.current_dir(dir);
        }
        Process::follow(command.spawn().expect("the binary starts"), hygiene)
    }

    /// Runs the process until it ends.
    pub(crate) async fn run(self) -> Finished {
        let process = self.start();
        let code = process.wait().await;
        Finished { code, stdout: process.stdout().join("\n"), stderr: process.stderr().join("\n") }
    }
}

/// A shell that may mount, for itself and its child processes.
const MOUNTING: [&str; 6] = ["unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-c"];

/// Mounts a disk of four pages at `$0` and fills it, then runs the program.
const FILL_AND_RUN: &str =
    "mount -t tmpfs -o size=16k none \"$0\" && { cat /dev/zero >\"$0/full\" 2>/dev/null; exec \"$@\"; }";

/// Mounts a disk of four megabytes at `$0`, then runs the program.
const MOUNT_AND_RUN: &str = "mount -t tmpfs -o size=4m none \"$0\" && exec \"$@\"";

/// Whether this user may create mounts, which not every system allows. If not, prints that.
pub(crate) fn can_mount() -> bool {
    let tried = Command::new(MOUNTING[0]).args(&MOUNTING[1..]).arg("mount -t tmpfs none /tmp").output();
    let can = tried.is_ok_and(|ended| ended.status.success());
    if !can {
        let test = thread::current().name().unwrap_or_default().to_owned();
        // The test harness captures the output of the print macros and shows it only for a failed test.
        let _ = std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("SKIPPED {test}: this user may not mount\n"),
        );
    }
    can
}

/// A process that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }
}

/// A running process and its output so far. On drop it is killed, and its output is searched for secrets
/// ([`super::hygiene`]).
pub(crate) struct Process {
    child: Arc<Mutex<Child>>,
    stdout: Said,
    stderr: Said,
    code: watch::Receiver<Option<i32>>,
    hygiene: Hygiene,
}

/// The lines from a pipe.
struct Said {
    pipe: Arc<Pipe>,
    lines: watch::Receiver<Vec<String>>,
}

struct Pipe {
    from: OwnedFd,
    state: Mutex<Unread>,
}

struct Unread {
    /// The start of an incomplete line.
    rest: Vec<u8>,
    /// `None` when the pipe has ended.
    tell: Option<watch::Sender<Vec<String>>>,
}

impl Said {
    fn follow(from: impl Into<OwnedFd>) -> (Self, thread::JoinHandle<()>) {
        let (tell, lines) = watch::channel(Vec::new());
        let state = Mutex::new(Unread { rest: Vec::new(), tell: Some(tell) });
        let pipe = Arc::new(Pipe { from: from.into(), state });
        rustix::io::ioctl_fionbio(&pipe.from, true).expect("a pipe need not block");
        let reader = Arc::clone(&pipe);
        let reading = thread::spawn(move || {
            while !reader.catch_up() {
                let mut pipes = [PollFd::new(&reader.from, PollFlags::IN)];
                // An interrupted wait only causes one more check.
                let _ = rustix::event::poll(&mut pipes, None);
            }
        });
        (Self { pipe, lines }, reading)
    }

    /// All lines so far, including those that this process has not read yet.
    fn now(&self) -> Vec<String> {
        self.pipe.catch_up();
        self.lines.borrow().clone()
    }
}

impl Pipe {
    /// Reads the available bytes. `true` if the pipe has ended.
    fn catch_up(&self) -> bool {
        let mut state = self.state.lock().expect("nobody panics with it");
        let Unread { rest, tell } = &mut *state;
        let Some(sender) = tell else { return true };
        let mut bytes = [0; 16 * 1024];
        let ended = loop {
            match rustix::io::read(&self.from, &mut bytes) {
                Ok(0) => break true,
                Ok(count) => rest.extend_from_slice(&bytes[..count]),
                Err(Errno::INTR) => {}
                Err(err) => break err != Errno::AGAIN,
            }
        };
        let end = if ended { rest.len() } else { rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1) };
        let whole: Vec<u8> = rest.drain(..end).collect();
        let lines = whole.split_inclusive(|byte| *byte == b'\n');
        let lines = lines.map(|line| String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line)).into_owned());
        if !whole.is_empty() {
            sender.send_modify(|known| known.extend(lines));
        }
        if ended {
            *tell = None;
        }
        ended
    }
}

impl Process {
    fn follow(mut child: Child, hygiene: Hygiene) -> Self {
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let stderr = child.stderr.take().expect("stderr is a pipe");
        let (stdout, out) = Said::follow(stdout);
        let (stderr, err) = Said::follow(stderr);
        let (code_tell, code) = watch::channel(None);
        let child = Arc::new(Mutex::new(child));
        let ended = Arc::clone(&child);
        thread::spawn(move || {
            // Both pipes end when the process ends, so the wait below is short.
            let _ = (out.join(), err.join());
            let status = ended.lock().expect("nobody panics with the child").wait().expect("a child can be waited for");
            code_tell.send_replace(Some(status.code().unwrap_or(-1)));
        });
        Self { child, stdout, stderr, code, hygiene }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().expect("nobody panics with the child")
    }

    pub(crate) fn stdout(&self) -> Vec<String> {
        self.stdout.now()
    }

    pub(crate) fn stderr(&self) -> Vec<String> {
        self.stderr.now()
    }

    /// The complete output.
    pub(crate) fn log(&self) -> String {
        format!("{}\n{}", self.stdout().join("\n"), self.stderr().join("\n"))
    }

    pub(crate) async fn wait(&self) -> i32 {
        let mut code = self.code.clone();
        let ended =
            async { code.wait_for(Option::is_some).await.expect("the exit code is sent").expect("there is a code") };
        within("the end of the process", || self.log(), ended).await
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.code.borrow().is_some()
    }

    fn id(&self) -> u32 {
        self.child().id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let mut child = self.child();
        // An ended process gets no signal, because its id may belong to another process.
        if matches!(child.try_wait(), Ok(None)) {
            rustix::process::kill_process(Pid::from_child(&child), signal).expect("our own child takes signals");
        }
    }

    /// Processor time it has used so far.
    #[cfg(target_os = "linux")]
    pub(crate) fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child().id())).expect("it runs");
        // Fields 14 and 15, counted after the name, which may contain any character.
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        let ticks = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().expect("a number"));
        let a_second = rustix::param::clock_ticks_per_second();
        Duration::from_millis(ticks.sum::<u64>() * 1000 / a_second)
    }

    /// A size in `/proc/PID/status`, in bytes. `VmHWM` is the peak of resident memory. `RssAnon` is the memory that
    /// the process itself has allocated.
    #[cfg(target_os = "linux")]
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child().id())).expect("it runs");
        let size = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib = size.expect("Linux reports it").trim().trim_end_matches(" kB").parse::<u64>();
        kib.expect("a number") * 1024
    }

    /// Waits for a line on stdout.
    pub(crate) async fn stdout_line(&self, wanted: impl Fn(&str) -> bool) -> String {
        line(self, self.stdout.lines.clone(), wanted).await
    }

    /// Waits for a line on stderr.
    pub(crate) async fn stderr_line(&self, wanted: impl Fn(&str) -> bool) -> String {
        line(self, self.stderr.lines.clone(), wanted).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process may have ended already, and then there is nothing to do.
        let _ = self.child().kill();
        if thread::panicking() {
            return;
        }
        // The last lines still arrive, unless a child of the process holds the pipe open.
        let deadline = std::time::Instant::now() + Duration::from_secs(2);
        while !self.has_ended() && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let leak = self.hygiene.find(self.log().as_bytes()).or_else(|| self.hygiene.find_in_files());
        assert!(leak.is_none(), "a secret got out: {}", leak.unwrap_or_default());
    }
}

async fn line(process: &Process, mut lines: watch::Receiver<Vec<String>>, wanted: impl Fn(&str) -> bool) -> String {
    let found = async {
        // Each line is checked once, because at `trace` there are many.
        let mut known = 0;
        loop {
            // Copied: `wanted` may read the log itself.
            let new = lines.borrow_and_update()[known..].to_vec();
            known += new.len();
            if let Some(line) = new.into_iter().find(|line| wanted(line)) {
                return line;
            }
            let ended = lines.changed().await.is_err();
            assert!(!ended || lines.borrow().len() > known, "the process ended without the line:\n{}", process.log());
        }
    };
    within("a line", || process.log(), found).await
}

/// The setup of a node that has not started.
pub(crate) struct NodeSetup {
    cli: Cli,
    scratch: TempDir,
    state: TempDir,
    plugins: TempDir,
    pub(crate) key: String,
}

impl NodeSetup {
    pub(crate) fn new(dds: &Url, dms: &Url, libraries: &[PathBuf]) -> Self {
        let setup = Self::bare(libraries);
        let key = setup.key.clone();
        setup
            .set("DDS_BASE_URL", trimmed(dds))
            .set("DMS_BASE_URL", trimmed(dms))
            .set("REG_SECRET", "a-registration-secret")
            .set("SECP256K1_PRIVHEX", key)
    }

    /// A node of the local control plane in `folder`, without settings of another control plane.
    pub(crate) fn local(folder: &Path, libraries: &[PathBuf]) -> Self {
        let text = format!("[plane.jobs]\nkind = \"local\"\nfolder = {:?}\n", folder.display().to_string());
        Self::with_config(&text, libraries)
    }

    /// A node with this configuration file, without settings of another control plane.
    pub(crate) fn with_config(text: &str, libraries: &[PathBuf]) -> Self {
        Self::with_file("node.toml", text, libraries)
    }

    /// The same, with a file of this name.
    pub(crate) fn with_file(name: &str, text: &str, libraries: &[PathBuf]) -> Self {
        let setup = Self::bare(libraries);
        let file = setup.plugins.path().join(name);
        std::fs::write(&file, text).expect("the folder is writable");
        setup.arg("--config").arg(file)
    }

    /// A node that has plugins and folders, but no control plane yet.
    pub(crate) fn bare(libraries: &[PathBuf]) -> Self {
        let scratch = tempfile::tempdir().expect("a folder below the system's temporary one");
        let state = tempfile::tempdir().expect("a folder below the system's temporary one");
        let plugins = fixtures::plugins_dir(libraries);
        let (_, key) = NodeKey::generate();
        let cli = Cli::new(&["run"])
            .arg("--plugins")
            .arg(plugins.path())
            .set("HTTP_BIND", "127.0.0.1:0")
            .set("SCRATCH_DIR", scratch.path().to_string_lossy())
            .set("STATE_DIR", state.path().to_string_lossy())
            .set("POLL_BACKOFF_MS_MIN", "10")
            .set("POLL_BACKOFF_MS_MAX", "50")
            .set("HEARTBEAT_JITTER_MS", "10")
            .set("TRANSFER_PATIENCE", "1s");
        Self { cli: cli.dir(plugins.path()), scratch, state, plugins, key }
    }

    pub(crate) fn set(mut self, name: &str, value: impl Into<String>) -> Self {
        self.cli = self.cli.set(name, value);
        self
    }

    pub(crate) fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.cli = self.cli.arg(arg);
        self
    }

    /// See [`Cli::open_files`].
    pub(crate) fn open_files(mut self, now: u64, most: u64) -> Self {
        self.cli = self.cli.open_files(now, most);
        self
    }

    /// See [`Cli::file_bytes_max`].
    pub(crate) fn file_bytes_max(mut self, bytes: u64) -> Self {
        self.cli = self.cli.file_bytes_max(bytes);
        self
    }

    /// See [`Cli::full_disk`].
    pub(crate) fn full_disk(mut self, folder: &Path) -> Self {
        self.cli = self.cli.full_disk(folder);
        self
    }

    /// See [`Cli::small_disk`].
    pub(crate) fn small_disk(mut self, folder: &Path) -> Self {
        self.cli = self.cli.small_disk(folder);
        self
    }

    /// Gives it its own port for its pages, for registrations with a callback.
    pub(crate) fn reachable(self) -> Self {
        self.reachable_as("http://127.0.0.1:PORT")
    }

    /// Like [`NodeSetup::reachable`], with this URL. `PORT` in it is replaced by the port.
    pub(crate) fn reachable_as(self, url: &str) -> Self {
        let port = free_port().to_string();
        self.set("NODE_URL", url.replace("PORT", &port)).set("HTTP_BIND", format!("127.0.0.1:{port}"))
    }

    /// The folder it loads plugins from.
    pub(crate) fn plugins(&self) -> &Path {
        self.plugins.path()
    }

    /// A node that replaces an ended one, with the same folders and identity.
    pub(crate) fn after(self, ended: &TestNode) -> Self {
        let key = ended.key.clone();
        let next = self.set("SCRATCH_DIR", ended.scratch_dir().to_string_lossy());
        let next = next.set("STATE_DIR", ended.state_dir().to_string_lossy());
        Self { key: key.clone(), ..next.set("SECP256K1_PRIVHEX", key) }
    }

    /// Writes a plugins file and uses it.
    pub(crate) fn plugins_file(self, text: &str) -> Self {
        let file = self.plugins.path().join("plugins.toml");
        std::fs::write(&file, text).expect("the folder is writable");
        self.arg("--plugins-file").arg(file)
    }

    /// Starts it and waits until it serves its pages.
    pub(crate) async fn start(self) -> TestNode {
        let mut node = self.begun();
        let started = node.says("node.started").await;
        node.address = started["address"].as_str().expect("an address").to_owned();
        node
    }

    /// Starts it without waiting. It has no address yet.
    pub(crate) fn begun(self) -> TestNode {
        let process = self.cli.start();
        let (scratch, state, plugins, key) = (self.scratch, self.state, self.plugins, self.key);
        let client = Client::new(transport::Config::default());
        TestNode { process, address: String::new(), scratch, state, _plugins: plugins, key, client }
    }

    /// Starts it and waits until it polls for work.
    pub(crate) async fn leasing(self) -> TestNode {
        let node = self.start().await;
        node.says("node.leasing").await;
        node
    }

    /// Runs it until it ends, for nodes that must not start.
    pub(crate) async fn refused(self) -> Finished {
        self.cli.run().await
    }
}

/// A free port below the range from which the system assigns ports to connections.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = std::process::id().wrapping_mul(101).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 20_000 + u16::try_from(next % 12_000).expect("below 12000");
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A running `runner-host run`.
pub(crate) struct TestNode {
    process: Process,
    pub(crate) address: String,
    scratch: TempDir,
    state: TempDir,
    _plugins: TempDir,
    pub(crate) key: String,
    client: Client,
}

impl TestNode {
    /// Waits for a log line.
    pub(crate) async fn line(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let parsed = |line: &str| serde_json::from_str::<Value>(line).unwrap_or_default();
        let line = self.process.stderr_line(|line| wanted(&parsed(line))).await;
        parsed(&line)
    }

    /// Waits for a log line with this event code.
    pub(crate) async fn says(&self, event: &str) -> Value {
        self.line(|line| line["event"] == event).await
    }

    /// Waits for the end of a task whose report has this state.
    pub(crate) async fn says_ended(&self, report: &str) -> Value {
        self.line(|line| line["event"] == "task.ended" && line["report"] == report).await
    }

    /// Waits for a log line with this text, which a plugin wrote.
    pub(crate) async fn says_text(&self, message: &str) -> Value {
        self.line(|line| line["message"] == message).await
    }

    /// Every log line so far. Fails on a line that is not JSON, because operators parse the log.
    pub(crate) fn lines(&self) -> Vec<Value> {
        let lines = self.process.stderr();
        lines.iter().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
    }

    /// The log lines so far with this event code.
    pub(crate) fn said(&self, event: &str) -> Vec<Value> {
        self.lines().into_iter().filter(|line| line["event"] == event).collect()
    }

    /// The log lines so far with this text, which a plugin wrote.
    pub(crate) fn said_text(&self, message: &str) -> Vec<Value> {
        self.lines().into_iter().filter(|line| line["message"] == message).collect()
    }

    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn term(&self) {
        self.process.signal(Signal::TERM);
    }

    pub(crate) fn interrupt(&self) {
        self.process.signal(Signal::INT);
    }

    pub(crate) fn hang_up(&self) {
        self.process.signal(Signal::HUP);
    }

    /// Stops the process as a debugger would. No thread of it runs until it is thawed.
    pub(crate) fn freeze(&self) {
        self.process.signal(Signal::STOP);
    }

    pub(crate) fn thaw(&self) {
        self.process.signal(Signal::CONT);
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn processor_time(&self) -> Duration {
        self.process.processor_time()
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn memory(&self, field: &str) -> u64 {
        self.process.memory(field)
    }

    pub(crate) fn kill(&self) {
        self.process.signal(Signal::KILL);
    }

    pub(crate) async fn wait(&self) -> i32 {
        self.process.wait().await
    }

    pub(crate) fn is_alive(&self) -> bool {
        !self.process.has_ended()
    }

    /// Stops it with TERM.
    pub(crate) async fn stop(&self) {
        self.term();
        assert_eq!(self.wait().await, 0, "{}", self.log());
    }

    pub(crate) fn scratch_dir(&self) -> &Path {
        self.scratch.path()
    }

    pub(crate) fn state_dir(&self) -> &Path {
        self.state.path()
    }

    /// The entries of the node's own scratch folder. `None` if the folder does not exist.
    pub(crate) fn scratch(&self) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    found.push(path.clone());
                    walk(&path, found);
                } else if !path.to_string_lossy().ends_with("lock") {
                    found.push(path);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.scratch.path(), &mut found);
        found
    }

    /// Requests one of the node's pages, each time over a new connection: the node closes idle ones.
    pub(crate) async fn page(&self, path: &str) -> (u16, Value) {
        let request = Request::get(format!("http://{}{path}", self.address)).header("connection", "close");
        let request = request.body(transport::full(""));
        let answer = self.client.call(request.expect("a request"), EVENT_LIMIT).await;
        let answer = answer.unwrap_or_else(|err| panic!("{path}: {err}\n{}", self.log()));
        let leak = self.process.hygiene.find(&answer.body);
        assert!(leak.is_none(), "a secret is on {path}: {}", leak.unwrap_or_default());
        (answer.status.as_u16(), answer.json().unwrap_or_default())
    }

    /// Posts to one of the node's pages. Returns status, `Content-Type` and text of the answer.
    pub(crate) async fn post(&self, path: &str, content_type: &str, body: impl Into<Bytes>) -> (u16, String, String) {
        let request = Request::post(format!("http://{}{path}", self.address)).header("content-type", content_type);
        let answer = self.client.call(request.body(transport::full(body)).expect("a request"), EVENT_LIMIT).await;
        let answer = answer.unwrap_or_else(|err| panic!("{path}: {err}\n{}", self.log()));
        let kind = answer.headers.get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        (answer.status.as_u16(), kind.to_owned(), String::from_utf8_lossy(&answer.body).into_owned())
    }

    /// Requests a page until it matches `wanted`, because pages have no event to wait for.
    pub(crate) async fn page_until(&self, path: &str, wanted: impl Fn(&(u16, Value)) -> bool) -> (u16, Value) {
        let asking = async {
            loop {
                let page = self.page(path).await;
                if wanted(&page) {
                    return page;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        within(path, || self.log(), asking).await
    }

    pub(crate) async fn status(&self) -> Value {
        self.page("/status.json").await.1
    }
}
