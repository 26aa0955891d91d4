//! Starts dev server, node and bare client, watches them through `/proc`, and stops them with a signal.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use jiff::Timestamp;
use runner_host::auth::NodeKey;
use serde_json::Value;
use url::Url;
use uuid::Uuid;

use crate::build::Built;

/// Unit of the processor times in `/proc`. Linux always shows 100 ticks per second to user space.
const TICKS_PER_SECOND: f64 = 100.0;

/// A child process that is stopped on drop.
pub(crate) struct Process(Child);

impl Process {
    fn start(command: &mut Command, built: &Built) -> anyhow::Result<Self> {
        // Files that a killed process leaves are removed with the scratch folder.
        command.env("TMPDIR", built.scratch()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
        Ok(Self(child))
    }

    fn proc(&self, file: &str) -> anyhow::Result<String> {
        let path = PathBuf::from(format!("/proc/{}/{file}", self.0.id()));
        std::fs::read_to_string(&path).with_context(|| format!("read {}; has the process ended?", path.display()))
    }

    /// Processor time so far, user and system.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        let stat = self.proc("stat")?;
        // The second field is the name in parentheses, which may contain any character.
        let after = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
        let fields: Vec<&str> = after.split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
        match (ticks(11), ticks(12)) {
            (Some(user), Some(system)) => Ok(Duration::from_secs_f64((user + system) as f64 / TICKS_PER_SECOND)),
            _ => anyhow::bail!("/proc/PID/stat has no processor times"),
        }
    }

    /// Processor time of the live threads, in nanoseconds. It is more precise than [`Process::cpu`], for processes
    /// that are almost idle.
    pub(crate) fn cpu_of_threads(&self) -> anyhow::Result<Duration> {
        let folder = format!("/proc/{}/task", self.0.id());
        let mut nanos = 0;
        for thread in std::fs::read_dir(&folder).with_context(|| format!("read {folder}"))? {
            let Ok(text) = std::fs::read_to_string(thread?.path().join("schedstat")) else { continue };
            nanos += text.split_whitespace().next().and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Duration::from_nanos(nanos))
    }

    /// A figure of `/proc/PID/status` in bytes: `VmHWM` is the peak of resident memory.
    pub(crate) fn memory(&self, field: &str) -> anyhow::Result<u64> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kilobytes.with_context(|| format!("/proc/PID/status has no {field}"))? * 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let asked = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status();
        if !asked.is_ok_and(|status| status.success()) {
            // The process has ended already, or there is no `kill`.
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

/// `runner-host dev --no-node` on a free port.
pub(crate) struct DevServer {
    pub(crate) process: Process,
    pub(crate) base: Url,
    pub(crate) domain: Uuid,
}

impl DevServer {
    pub(crate) fn start(built: &Built) -> anyhow::Result<Self> {
        let mut command = Command::new(built.host());
        command.args(["dev", "--no-node", "--port", "0"]).env("RUST_LOG", "warn");
        let mut process = Process::start(&mut command, built)?;
        let mut table = BufReader::new(process.0.stdout.take().context("the dev server has no stdout")?);
        let (mut base, mut domain) = (None, None);
        let mut line = String::new();
        while base.is_none() || domain.is_none() {
            line.clear();
            anyhow::ensure!(table.read_line(&mut line)? > 0, "the dev server ended before it printed its address");
            match line.trim().rsplit_once("  ").map(|(name, value)| (name.trim(), value.trim())) {
                Some(("sign-in (DDS)", url)) => base = Some(Url::parse(url).context("the dev server's address")?),
                Some(("domain", id)) => domain = Some(Uuid::parse_str(id).context("the dev server's domain")?),
                _ => {}
            }
        }
        // The rest of the table fits into the pipe, and nothing is printed after it.
        process.0.stdout = Some(table.into_inner());
        let (Some(base), Some(domain)) = (base, domain) else { anyhow::bail!("the dev server printed no address") };
        Ok(Self { process, base, domain })
    }

    pub(crate) fn url(&self, path: &str) -> Url {
        self.base.join(path).expect("paths of this file are paths")
    }
}

/// `runner-host run` with a fresh key, on a dev server or on the control plane of its settings.
pub(crate) struct Node {
    pub(crate) process: Process,
    pub(crate) started: Timestamp,
    log: PathBuf,
}

impl Node {
    pub(crate) fn start(
        built: &Built,
        dev_server: Option<&DevServer>,
        plugins: &[&Path],
        listing: Option<&Path>,
        settings: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let log = built.scratch().join(format!("node-{}.log", Uuid::new_v4()));
        let mut command = Command::new(built.host());
        command.arg("run");
        for place in plugins {
            command.arg("--plugins").arg(place);
        }
        if let Some(listing) = listing {
            command.arg("--plugins-file").arg(listing);
        }
        if let Some(dev_server) = dev_server {
            let (_, key) = NodeKey::generate();
            command
                .env("DDS_BASE_URL", dev_server.base.as_str())
                .env("DMS_BASE_URL", dev_server.url("/v1").as_str())
                .env("REG_SECRET", "bench")
                .env("SECP256K1_PRIVHEX", &key);
        }
        command
            .env("HTTP_BIND", "127.0.0.1:0")
            .env("STATE_DIR", built.scratch().join(format!("state-{}", Uuid::new_v4())))
            .env("RUST_LOG", "info")
            .env("LOG_FORMAT", "json")
            .envs(settings.iter().copied())
            // Variables of this shell must not change the measurement.
            .env_remove("NODE_URL")
            .env_remove("ENABLE_NOOP")
            .stderr(File::create(&log)?);
        let started = Timestamp::now();
        let process = Process::start(&mut command, built)?;
        Ok(Self { process, started, log })
    }

    /// The time at which the node first logged `message`.
    pub(crate) fn logged(&self, message: &str) -> anyhow::Result<Timestamp> {
        let log = std::fs::read_to_string(&self.log).context("read the node's log")?;
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let line = lines.into_iter().find(|line| line["message"] == message);
        let line = line.with_context(|| format!("the node never logged {message:?}; its log:\n{log}"))?;
        line["timestamp"].as_str().unwrap_or_default().parse().context("a time in the node's log")
    }

    /// The end of the log, for errors.
    pub(crate) fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

/// The bare client in a separate process. It executes one order at a time.
pub(crate) struct Bare {
    pub(crate) process: Process,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Bare {
    pub(crate) fn start(built: &Built, arguments: &[&str], settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("find this binary")?);
        command.arg("bare").args(arguments).envs(settings.iter().copied());
        let mut process = Process::start(&mut command, built)?;
        let orders = process.0.stdin.take().context("the bare client has no stdin")?;
        let answers = BufReader::new(process.0.stdout.take().context("the bare client has no stdout")?);
        let mut bare = Self { process, orders, answers };
        let ready = bare.answer()?;
        anyhow::ensure!(ready == "ready", "the bare client answered {ready:?}, expected \"ready\"");
        Ok(bare)
    }

    /// Sends an order and waits for its answer.
    pub(crate) fn order(&mut self, order: &str) -> anyhow::Result<String> {
        writeln!(self.orders, "{order}").context("the bare client has ended")?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        anyhow::ensure!(self.answers.read_line(&mut line)? > 0, "the bare client ended early");
        Ok(line.trim_end().to_owned())
    }
}
