//! The processes that the demo starts. Each ends no later than the demo, however the demo ends.
//!
//! Each process leads its own process group. So its child processes, such as a compiler, end with it. A Ctrl-C of the
//! terminal reaches only the demo, which then stops the processes.

use std::{
    ffi::OsStr,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

/// Time limit for a process to end by itself after a request to stop.
const GRACE: Duration = Duration::from_secs(10);

/// All running processes.
#[derive(Default)]
pub(crate) struct Crew {
    dev_server: Option<Child>,
    step: Option<Child>,
}

impl Crew {
    /// Runs a command until it ends and returns its standard output.
    pub(crate) async fn step(&mut self, what: &str, mut command: Command) -> anyhow::Result<Vec<u8>> {
        let child = spawn(what, &mut command)?;
        let child = self.step.insert(child);
        let mut stdout_bytes = Vec::new();
        if let Some(mut stdout) = child.stdout.take() {
            tokio::io::copy(&mut stdout, &mut stdout_bytes).await?;
        }
        let status = child.wait().await?;
        self.step = None;
        if !status.success() {
            bail!("{what} failed ({status})");
        }
        Ok(stdout_bytes)
    }

    /// Starts the dev server and returns its output line by line.
    pub(crate) fn start_dev_server(&mut self, mut command: Command) -> anyhow::Result<Lines<BufReader<ChildStdout>>> {
        let mut child = spawn("runner-host dev", &mut command)?;
        let stdout = child.stdout.take().expect("spawn() pipes it");
        self.dev_server = Some(child);
        Ok(BufReader::new(stdout).lines())
    }

    /// Asks the dev server to stop, and waits until it has ended.
    pub(crate) async fn stop_dev_server(&mut self) -> anyhow::Result<()> {
        let Some(mut dev_server) = self.dev_server.take() else { return Ok(()) };
        signal(&dev_server, Signal::Term);
        let Some(status) = ended(&mut dev_server).await else {
            kill(dev_server).await;
            bail!("the dev server did not end within {GRACE:?} and was killed");
        };
        if !status.success() {
            bail!("the dev server ended badly ({status})");
        }
        Ok(())
    }

    /// Ends all remaining processes at once.
    pub(crate) async fn kill_all(mut self) {
        for child in [self.step.take(), self.dev_server.take()].into_iter().flatten() {
            kill(child).await;
        }
    }
}

/// A command without the caller's settings, which could connect the demo to another service.
pub(crate) fn clean_command(program: &Path, temp: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("TMPDIR", temp).env("TMP", temp).env("TEMP", temp).env("SCRATCH_DIR", temp.join("scratch"));
    for name in ["PATH", "TERM", "SystemRoot"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

fn spawn(what: &str, command: &mut Command) -> anyhow::Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    #[cfg(unix)]
    command.process_group(0);
    let program: &OsStr = command.as_std().get_program();
    let program = program.to_string_lossy().into_owned();
    command.spawn().with_context(|| format!("{what}: {program} does not start"))
}

async fn ended(child: &mut Child) -> Option<ExitStatus> {
    timeout(GRACE, child.wait()).await.ok()?.ok()
}

async fn kill(mut child: Child) {
    signal(&child, Signal::Kill);
    // The process may have ended by itself in the meantime.
    let _ = child.kill().await;
}

enum Signal {
    Term,
    Kill,
}

/// Sends a signal to a process and its child processes.
#[cfg(unix)]
fn signal(child: &Child, signal: Signal) {
    use rustix::process::{Pid, kill_process_group};
    let signal = match signal {
        Signal::Term => rustix::process::Signal::TERM,
        Signal::Kill => rustix::process::Signal::KILL,
    };
    if let Some(group) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // The group may have ended already, which is fine.
        let _ = kill_process_group(group, signal);
    }
}

/// This platform has no signals. `kill` ends the process itself, which also stops the dev server.
#[cfg(not(unix))]
fn signal(_child: &Child, _signal: Signal) {}
