//! `cargo demo`: one command runs a leased task with a runner in a shared library, on this machine.
//!
//! It builds the host and the plugins into its own folder. It starts a dev server with a node, submits the same job over
//! both control planes, and saves the artifacts of the runner. The demo has no special code path: each step is a command
//! that a user can type.
//! Only the artifacts and the build remain afterwards.

#![forbid(unsafe_code)]

mod crew;

use std::{
    env::consts::{DLL_PREFIX, DLL_SUFFIX, EXE_SUFFIX},
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::{process::Command, time::timeout};

use crew::{Crew, clean_command};

/// The capability of the job.
const CAPABILITY: &str = "/pointcloud/downsample/v1";
/// The plugins that are copied into the node's folder.
const PLUGINS: [&str; 4] = ["echo", "hello", "noop", "pointcloud"];
/// Number of points of the scan, and its random seed. The same values produce the same file on every machine.
const POINTS: &str = "1000000";
const SEED: &str = "7";
/// Time limit for the start of the dev server. It needs a fraction of this on any machine that can build it.
const START_LIMIT: Duration = Duration::from_secs(30);

const EXIT_FAILED: u8 = 1;
const EXIT_CANCELLED: u8 = 3;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.context("start a runtime").and_then(|runtime| runtime.block_on(demo())) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("demo: {err:#}");
            EXIT_FAILED.into()
        }
    }
}

/// Runs the demo until it ends or is interrupted, then stops all processes.
async fn demo() -> anyhow::Result<ExitCode> {
    let mut interrupts = Interrupts::install().context("listen to signals")?;
    let temp = tempfile::Builder::new().prefix("runner-host-demo-").tempdir().context("make a temporary folder")?;
    let mut crew = Crew::default();
    let ended = tokio::select! {
        ended = work(&mut crew, temp.path()) => Some(ended),
        () = interrupts.next() => None,
    };
    crew.kill_all().await;
    temp.close().context("remove the temporary folder")?;
    match ended {
        Some(Ok(summary)) => {
            print!("{summary}");
            Ok(ExitCode::SUCCESS)
        }
        Some(Err(err)) => Err(err),
        None => {
            eprintln!("demo: interrupted");
            Ok(EXIT_CANCELLED.into())
        }
    }
}

/// The steps of the demo, from sources to artifacts.
async fn work(crew: &mut Crew, temp: &Path) -> anyhow::Result<String> {
    let target = target()?;
    let home = target.join("demo");
    std::fs::create_dir_all(&home).with_context(|| format!("make {}", home.display()))?;
    let began = Instant::now();
    say(format!("building runner-host and {} plugins in {} …", PLUGINS.len(), shown(&target)));
    crew.step("the build", cargo_build(&target)?).await?;
    say(format!("built in {:.1} s", began.elapsed().as_secs_f64()));

    let built = target.join("debug");
    let host = built.join(format!("runner-host{EXE_SUFFIX}"));
    let plugins = temp.join("plugins");
    std::fs::create_dir(&plugins)?;
    for name in PLUGINS {
        let file = format!("{DLL_PREFIX}{name}{DLL_SUFFIX}");
        std::fs::copy(built.join(&file), plugins.join(&file)).with_context(|| format!("copy {file}"))?;
    }

    let scan = temp.join("scan.ply");
    let mut make = clean_command(&built.join("examples").join(format!("scan{EXE_SUFFIX}")), temp);
    make.arg(&scan).args([POINTS, SEED]);
    crew.step("making the scan", make).await?;
    let mib = std::fs::metadata(&scan)?.len() as f64 / f64::from(1 << 20);
    say(format!("made a scan of {POINTS} points, {mib:.1} MiB"));

    let log = home.join("dev-server.log");
    let mut dev = clean_command(&host, temp);
    dev.args(["dev", "--plane", "both", "--port", "0", "--plugins"]).arg(&plugins);
    dev.stderr(std::fs::File::create(&log).with_context(|| format!("write {}", shown(&log)))?);
    let dev_server = start_dev_server(crew, dev).await.with_context(|| format!("its log is {}", shown(&log)))?;
    say(format!("started two control planes, a domain server and a node at {dev_server}"));

    let mut text = String::new();
    for (plane, about, out) in [
        ("dms", "posemesh, tasks over HTTP", home.join("out")),
        ("node-runtime", "Node Runtime, runs over gRPC", home.join("out-node-runtime")),
    ] {
        let began = Instant::now();
        clear(&out)?;
        let mut submit = clean_command(&host, temp);
        submit.args(["submit", "--plane", plane, CAPABILITY, "--dev", &dev_server, "--wait", "--timeout", "2m"]);
        submit.arg("--input").arg(&scan);
        submit.arg("--out").arg(shown(&out)); // as short as it was typed: submit repeats it
        say(format!("submitting {CAPABILITY} over {plane} ({about})"));
        crew.step("the job", submit).await.with_context(|| format!("the node's log is {}", shown(&log)))?;
        text += &summary(plane, &out, began.elapsed())?;
    }

    crew.stop_dev_server().await.with_context(|| format!("its log is {}", shown(&log)))?;
    Ok(text)
}

/// Cargo's target folder, wherever that is. It is shared with `cargo test`, so that each reuses the build of the other.
fn target() -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("find the target folder")?;
    let target = exe.ancestors().nth(2).context("find the target folder: run `cargo demo`")?;
    Ok(target.to_owned())
}

/// Cargo alone builds no library of another workspace member, so each package is named.
fn cargo_build(target: &Path) -> anyhow::Result<Command> {
    let cargo = std::env::var_os("CARGO").context("run it as `cargo demo`")?;
    let mut command = Command::new(cargo);
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    command.arg("build").arg("--target-dir").arg(target);
    if !std::io::stderr().is_terminal() {
        command.arg("--quiet");
    }
    command.args(["--package", "runner-host", "--bin", "runner-host", "--lib", "--example", "scan"]);
    for name in PLUGINS {
        command.args(["--package", name]);
    }
    Ok(command)
}

/// Starts the dev server and reads its address from the printed table.
async fn start_dev_server(crew: &mut Crew, command: Command) -> anyhow::Result<String> {
    let mut lines = crew.start_dev_server(command)?;
    let address = async {
        while let Some(line) = lines.next_line().await? {
            if let Some(address) = line.strip_prefix("export RUNNER_HOST_DEV=") {
                return Ok(address.to_owned());
            }
        }
        bail!("the dev server ended during its start")
    };
    let address = timeout(START_LIMIT, address).await.context("the dev server did not start in time")??;
    // Reads the rest of the table, because a full pipe would block the dev server.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Ok(address)
}

fn clear(folder: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(err).with_context(|| format!("clear {}", shown(folder)))
        }
        _ => Ok(()),
    }
}

/// The artifacts, checked against the runner's report.
fn summary(plane: &str, out: &Path, elapsed: Duration) -> anyhow::Result<String> {
    use std::fmt::Write as _;
    let report = std::fs::read(out.join("report.json")).context("read report.json")?;
    let report: Value = serde_json::from_slice(&report).context("read report.json")?;
    let (Some(points_in), Some(points_out)) = (report["points_in"].as_u64(), report["points_out"].as_u64()) else {
        bail!("report.json does not say points_in and points_out");
    };
    let mut text = format!(
        "{CAPABILITY} over {plane} completed in {:.1} s: {points_in} points in, {points_out} points out\n",
        elapsed.as_secs_f64()
    );
    for (name, about) in [
        ("cloud.ply", "the thinned cloud"),
        ("preview.png", "a picture of it; look at this one"),
        ("report.json", "what the runner says about it"),
    ] {
        let path = out.join(name);
        let size = std::fs::metadata(&path).with_context(|| format!("the artifact {name} is missing"))?.len();
        writeln!(text, "  {:<40} {size:>9} bytes  {about}", shown(&path))?;
    }
    Ok(text)
}

fn say(line: String) {
    eprintln!("demo: {line}");
}

/// The shortest form of a path from the current folder.
fn shown(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    here.as_deref().and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path).display().to_string()
}

/// Waits for any signal that stops a program.
#[cfg(unix)]
struct Interrupts([tokio::signal::unix::Signal; 3]);

#[cfg(unix)]
impl Interrupts {
    fn install() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self([signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?]))
    }

    async fn next(&mut self) {
        let [int, term, hup] = &mut self.0;
        tokio::select! {
            _ = int.recv() => (),
            _ = term.recv() => (),
            _ = hup.recv() => (),
        }
    }
}

#[cfg(not(unix))]
struct Interrupts;

#[cfg(not(unix))]
impl Interrupts {
    fn install() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
