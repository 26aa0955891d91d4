//! Time from the start of a run in a plugin to its end, with one call of the host.
//!
//! The library is loaded into this process, as in a node. The one call downloads an input that is already on disk.
//! For comparison, two threads with their own runtimes exchange messages. That measures two thread wake-ups, which is
//! the minimum cost of a run on its own threads.

use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use async_trait::async_trait;
use runner_host::{
    model::{
        Artifact, ArtifactSpec, Budget, Capability, Fetched, HeldLease, InputMeta, InputStream, Lease, Materialized,
        Outcome, OutputStream, PortError, PortErrorKind, Ports, Setup, StatusBoard, TaskId,
    },
    node_event::NodeEvents,
    plugins::{self, Folder, Job, Places, Plugins, PluginsFile},
};
use serde_json::value::to_raw_value;
use tokio::{
    runtime::{Builder, Handle},
    sync::{mpsc, oneshot},
};
use uuid::Uuid;

use super::Sizes;
use crate::{
    build::Built,
    report::{Bound, Cell, Report, Series},
};

const CAPABILITY: &str = "/examples/noop/v1";
/// The ratios to the ping-pong of two messages: a run has two messages, and each call of the host two more.
const WITHOUT_CALL: Bound = Bound { wanted: 1.5, quick: None };
const WITH_CALL: Bound = Bound { wanted: 2.0, quick: None };
/// Time limit of a run or a message on a slow machine.
const LIMIT: Duration = Duration::from_secs(10);

/// Where the threads run. The system's own choice changes both times by a factor of three.
#[derive(Clone, Copy)]
enum Placement {
    /// All on one core.
    OneCore,
    /// The thread that waits on the first core, the threads that answer it on the second.
    TwoCores,
}

impl Placement {
    fn waiting(self) -> anyhow::Result<()> {
        bind(0)
    }

    fn answering(self) -> anyhow::Result<()> {
        bind(match self {
            Self::OneCore => 0,
            Self::TwoCores => 1,
        })
    }
}

/// Binds this thread, and the threads that it starts from now on, to one core.
#[cfg(target_os = "linux")]
fn bind(core: usize) -> anyhow::Result<()> {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    rustix::thread::sched_setaffinity(None, &cores).with_context(|| format!("cannot use core {core} alone"))
}

/// Other systems place the threads themselves.
#[cfg(not(target_os = "linux"))]
fn bind(_core: usize) -> anyhow::Result<()> {
    Ok(())
}

pub(super) fn measure(built: &Built, sizes: &Sizes, report: &mut Report) -> anyhow::Result<()> {
    eprintln!("runs in a plugin");
    let table = report.table(
        "Start of a run in a plugin to its end, over a ping-pong of two threads",
        &["threads", "calls of the host", "ratio of times", "run, µs", "ping-pong, µs"],
    );
    let both = [(Placement::TwoCores, "on two cores"), (Placement::OneCore, "on one core")];
    for (placement, place) in both {
        for (calls, config, bound) in
            [("none", "sleep_secs = 0.0", WITHOUT_CALL), ("one", "sleep_secs = 0.0, fetch_inputs = true", WITH_CALL)]
        {
            let label = format!("boundary-{}-{calls}", place.replace(' ', "-"));
            let measured = || compare(built, sizes, &label, config, placement);
            // A thread of its own, because it is bound to a core.
            let (own, least) = thread::scope(|scope| scope.spawn(measured).join())
                .map_err(|_| anyhow::anyhow!("the measurement panicked"))??;
            let times = own.over(&least);
            report.at_most(
                &format!("run in a plugin over a ping-pong {place}, calls of the host: {calls}"),
                &times,
                bound,
            );
            let series = [(&times, 2), (&own, 1), (&least, 1)].map(|(series, digits)| Cell::series(series, digits));
            report.row(table, [Cell::text(place), Cell::text(calls)].into_iter().chain(series).collect());
        }
    }
    Ok(())
}

/// Times of runs and of ping-pongs.
fn compare(
    built: &Built,
    sizes: &Sizes,
    label: &str,
    config: &str,
    placement: Placement,
) -> anyhow::Result<(Series, Series)> {
    let (folder, listing) = built.noop(label, config)?;
    let config = plugins::Config {
        places: Places { folders: vec![folder], files: Vec::new() },
        file: PluginsFile::read(&listing)?,
        max_concurrency: 1,
        log_level: 3,
        init_limit: LIMIT,
        allow_writable: true,
    };
    placement.answering()?;
    let plugins = Plugins::load(&config)?;
    let words = Words::start()?;
    placement.waiting()?;
    // As in a node: one thread for leases, other threads for data.
    let workers = Builder::new_multi_thread().enable_all().build()?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (mut own, mut least) = <(Series, Series)>::default();
    runtime.block_on(async {
        let runs = Runs::new(&plugins, workers.handle().clone(), built.scratch())?;
        for repetition in 0..=sizes.repetitions {
            let (run, word) = (timed(sizes.runs, || runs.one()).await?, timed(sizes.runs, || words.one()).await?);
            // The first repetition warms up.
            if repetition > 0 {
                own.add(run);
                least.add(word);
            }
        }
        plugins.shutdown(LIMIT).await;
        anyhow::Ok(())
    })?;
    Ok((own, least))
}

/// The mean time of one call in microseconds, over `count` sequential calls.
async fn timed<F: Future<Output = anyhow::Result<()>>>(count: u32, one: impl Fn() -> F) -> anyhow::Result<f64> {
    let began = Instant::now();
    for _ in 0..count {
        tokio::time::timeout(LIMIT, one()).await.context("took too long")??;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(count))
}

/// Runs in a plugin.
struct Runs<'a> {
    plugins: &'a Plugins,
    lease: Lease,
    ports: Arc<Ready>,
    folder: Folder,
    workers: Handle,
    events: NodeEvents,
}

impl<'a> Runs<'a> {
    fn new(plugins: &'a Plugins, workers: Handle, scratch: &Path) -> anyhow::Result<Self> {
        let capability = Capability::parse(CAPABILITY)?;
        let document = serde_json::json!({
            "task": { "id": Uuid::nil(), "capability": CAPABILITY, "inputs_cids": ["d-1"] },
        });
        let lease = Lease {
            document: to_raw_value(&document)?,
            inputs: vec!["d-1".to_owned()],
            ..Lease::bare(TaskId::from(Uuid::nil()), capability)
        };
        let folder = Folder { path: scratch.join("task"), make: Arc::new(|| Ok(())) };
        let ports = Arc::new(Ready { input: scratch.join("task/input"), budget: Budget::unlimited() });
        let events = NodeEvents::new(StatusBoard::new(1, Vec::new()));
        Ok(Self { plugins, lease, ports, folder, workers, events })
    }

    async fn one(&self) -> anyhow::Result<()> {
        let (held_lease, _writer) = HeldLease::new(self.lease.clone(), Setup::Pending);
        let job = Job {
            held_lease,
            ports: Arc::clone(&self.ports) as Arc<dyn Ports>,
            folder: self.folder.clone(),
            workers: self.workers.clone(),
            cancel_grace: LIMIT,
            began: Box::new(|| {}),
            events: self.events.clone(),
        };
        match self.plugins.run(job).await {
            Outcome::Completed => Ok(()),
            other => anyhow::bail!("a run ended as {other:?}"),
        }
    }
}

/// Ports whose inputs are on disk.
struct Ready {
    input: std::path::PathBuf,
    budget: Budget,
}

fn unsupported<T>() -> Result<T, PortError> {
    Err(PortError::new(PortErrorKind::Unsupported, "only files come in here"))
}

#[async_trait]
impl Ports for Ready {
    async fn open(&self, _cid: &str) -> Result<Box<dyn InputStream>, PortError> {
        unsupported()
    }

    async fn materialize(&self, cid: &str) -> Result<Materialized, PortError> {
        Ok(Materialized {
            meta: InputMeta { cid: cid.to_owned(), ..InputMeta::default() },
            path: self.input.clone(),
            root_dir: self.input.parent().unwrap_or(&self.input).to_owned(),
            related_files: Vec::new(),
            extracted_paths: Vec::new(),
        })
    }

    async fn put_file(&self, _spec: ArtifactSpec, _file: &Path) -> Result<Option<String>, PortError> {
        unsupported()
    }

    async fn create(&self, _spec: ArtifactSpec) -> Result<Box<dyn OutputStream>, PortError> {
        unsupported()
    }

    fn published(&self) -> Vec<Artifact> {
        Vec::new()
    }

    fn fetched(&self) -> Vec<Fetched> {
        Vec::new()
    }

    fn budget(&self) -> &Budget {
        &self.budget
    }

    async fn close(&self) {}
}

/// Sends messages to another thread and gets an answer to each.
struct Words(mpsc::UnboundedSender<oneshot::Sender<()>>);

impl Words {
    fn start() -> anyhow::Result<Self> {
        let (requests, mut received) = mpsc::unbounded_channel::<oneshot::Sender<()>>();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        // Not joined: it ends when the sender is dropped.
        thread::Builder::new().name("ping-pong".to_owned()).spawn(move || {
            runtime.block_on(async {
                while let Some(answer) = received.recv().await {
                    let _ = answer.send(());
                }
            });
        })?;
        Ok(Self(requests))
    }

    async fn one(&self) -> anyhow::Result<()> {
        let (answer, answered) = oneshot::channel();
        self.0.send(answer).context("the other thread has ended")?;
        answered.await.context("the other thread gave no answer")
    }
}
