//! The composition root: builds every module in order, then starts them.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, error, info_span, warn};

#[cfg(feature = "grpc")]
use crate::leases::node_runtime::NodeRuntime;
use crate::{
    auth::Auth,
    config::{HostConfig, PlaneChoice},
    control::ControlSocket,
    engine::{Ended, Engine, Modules, StopSignals},
    leases::{
        LeaseSource,
        dms::{self, Dms},
        local::{self, Local},
    },
    model::{HealthChecks, Listings, Live, NoRegistration, PlaneStatus, Planes, RegistrationForm, StatusBoard},
    node_event::{NodeEvent, NodeEvents},
    observe::{StatusPage, pages::Pages},
    outbox::{self, Outbox, Remaining, StateDir, UnansweredTries},
    plugins::Plugins,
    session::Sessions,
    storage::{Disk, DomainStorage, LocalStorage, Scratch, Stores},
    transport,
};

/// Longest time for the shutdown of all plugins together.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(1);

/// Most calls of the control plane at once. A control plane that hangs must not cause one connection for each of
/// thousands of leases.
const CALLS_MAX: usize = 256;

/// How long a stop continues to send waiting reports.
const LAST_ROUND: Duration = Duration::from_secs(2);

/// How long a start waits for a command that uses the state folder.
const CLAIM_PATIENCE: Duration = Duration::from_millis(500);

/// A node that is built and listens, but has sent nothing over the network.
pub struct Node {
    engine: Engine,
    sources: Vec<Arc<dyn LeaseSource>>,
    outbox: Outbox,
    #[cfg(unix)]
    socket: Option<ControlSocket>,
    pages: Option<Pages>,
    events: NodeEvents,
    disk: Disk,
    control: Control,
    plugins: Arc<Plugins>,
    state_dir: PathBuf,
}

impl Node {
    /// Builds the modules. `/health` is bound when this returns, and nothing has been sent over the network.
    ///
    /// # Errors
    /// When a folder or an address cannot be used.
    pub async fn build(config: HostConfig, plugins: Arc<Plugins>) -> anyhow::Result<Self> {
        let HostConfig { planes, auth, dms, session, engine, storage, outbox, observe, transport: http, .. } = config;
        #[cfg(unix)]
        let files = crate::open_files::limit();
        #[cfg(not(unix))]
        let files = u64::MAX;
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        // Connections that wait for a request must not use up the descriptors that tasks need.
        let http = transport::Config { idle_at_most: files / 8, ..http };
        let state = StateDir::claim(&outbox.state_dir, CLAIM_PATIENCE).await.context("STATE_DIR cannot be used")?;
        let state_dir = state.path().to_owned();
        let scratch = Scratch::open(storage.scratch_dir.clone()).context("SCRATCH_DIR cannot be used")?;
        let control = Control::start().context("start the control thread")?;
        // The pages, the outbox and the data transfers need files too.
        let at_once = (files / 4).min(CALLS_MAX);
        // There are several clients. A sign-in must not wait in the queue behind a control plane that hangs. A
        // connection is driven by the runtime that opened it, so sign-in and control connections must not wait for
        // data.
        let sign_in_client = transport::Client::new(http.clone());
        // Each control plane has its own client: one that hangs must not use up the calls of another one.
        let at_once = (at_once / planes.len().max(1)).max(1);
        let control_client =
            || transport::Client::new(transport::Config { at_once, idle_at_most: at_once, ..http.clone() });
        let data_client = transport::Client::new(http.clone());
        let capabilities = plugins.capabilities().iter().map(ToString::to_string).collect();
        let board = StatusBoard::new(engine.slots, capabilities);
        board.change(|status| {
            let shown = planes.iter().map(|plane| {
                let (name, kind) = match plane {
                    PlaneChoice::Posemesh => (&dms.name, "posemesh"),
                    PlaneChoice::Local { name, .. } => (name, "local"),
                    #[cfg(feature = "grpc")]
                    PlaneChoice::NodeRuntime(config) => (&config.name, "node-runtime"),
                };
                PlaneStatus::new(name.clone(), kind, engine.floors.get(name).copied().unwrap_or(0))
            });
            status.planes = Planes(shown.collect());
            status.ready_when = observe.ready_when;
        });
        let events = NodeEvents::new(board.clone());
        let mut posemesh = Some((auth, dms, sign_in_client));
        let mut built = Vec::with_capacity(planes.len());
        for (index, plane) in planes.into_iter().enumerate() {
            let events = events.of_plane(index);
            built.push(match plane {
                PlaneChoice::Posemesh => {
                    let (auth, dms, client) = posemesh.take().context("a node serves one posemesh control plane")?;
                    let auth = Auth::new(auth, plugins.serving(), client, events);
                    BuiltPlane::posemesh(dms, auth, control_client())
                }
                PlaneChoice::Local { name, folder, observer } => {
                    let local = local::Config { name, folder, capabilities: plugins.serving(), observer };
                    BuiltPlane::local(local, events)?
                }
                #[cfg(feature = "grpc")]
                PlaneChoice::NodeRuntime(config) => {
                    let hosts = storage.domain.domain_hosts.clone();
                    BuiltPlane::node_runtime(NodeRuntime::new(*config, engine.slots, hosts, control_client(), events))
                }
            });
        }
        let sources: Vec<_> = built.iter().map(|plane| Arc::clone(&plane.source)).collect();
        // At most one control plane has a sign-in service.
        let health_checks = built.iter_mut().find_map(|plane| plane.health_checks.take());
        let health_checks = health_checks.unwrap_or_else(|| Arc::new(NoRegistration));
        let (stale, stuck) = (Arc::clone(&plugins), Arc::clone(&plugins));
        let (stale, stuck) =
            (Live(Arc::new(move || stale.stale_calls())), Live(Arc::new(move || stuck.stuck_runners())));
        let listed = Arc::clone(&plugins);
        let listings = Listings(Arc::new(move || serde_json::to_value(listed.listings()).unwrap_or_default()));
        let budget = storage.domain.budget.clone();
        board.change(|status| {
            status.plugins = listings;
            for (shown, plane) in status.planes.0.iter_mut().zip(&built) {
                shown.state.node = plane.source.facts().node.to_string();
                shown.state.registration_form = plane.registration_form;
            }
            status.stale_calls = stale;
            status.stuck_runners = stuck;
            status.memory = budget;
        });
        #[cfg(unix)]
        let socket = match ControlSocket::open(state.path()) {
            Ok(socket) => Some(socket),
            Err(err) => {
                no_control_socket(state.path(), &err);
                None
            }
        };
        let outbox = Outbox::open(
            outbox::Config {
                state,
                planes: sources.clone(),
                max: outbox.max,
                bytes_max: outbox.bytes_max,
                // The next task of each slot may end while the last report of the slot is being sent.
                senders: engine.slots.saturating_mul(2).max(8),
            },
            events.clone(),
        )
        .context("STATE_DIR cannot be used")?;
        let pages = match observe.status_page {
            StatusPage::Disabled => None,
            StatusPage::Enabled { listen } => Some(
                Pages::bind(listen, observe.node_host, files, board.clone(), health_checks)
                    .await
                    .with_context(|| format!("HTTP_BIND {listen} cannot be bound"))?,
            ),
        };
        let disk = Disk::new(storage.scratch_dir, storage.disk_free_min);
        let modules = Modules {
            sessions: Sessions::new(session, control.handle.clone(), events.clone()),
            planes: sources.clone(),
            storage: Stores::new(
                scratch,
                disk.clone(),
                LocalStorage::new(storage.domain.budget.clone(), storage.domain.unpack.clone()),
                DomainStorage::new(data_client, storage.domain),
            ),
            outbox: outbox.clone(),
            plugins: Arc::clone(&plugins),
            events: events.clone(),
            workers: Handle::current(),
        };
        let engine = Engine::new(modules, engine);
        Ok(Self {
            engine,
            sources,
            outbox,
            #[cfg(unix)]
            socket,
            pages,
            events,
            disk,
            control,
            plugins,
            state_dir,
        })
    }

    /// The address of the node's pages. `None`: they are disabled, or the system does not return it.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.pages.as_ref().and_then(|pages| pages.address().ok())
    }

    /// The state folder of the node.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// A live view of the node.
    #[must_use]
    pub fn board(&self) -> StatusBoard {
        self.events.board().clone()
    }

    /// The node's events as a stream.
    #[must_use]
    pub fn events(&self) -> NodeEvents {
        self.events.clone()
    }

    /// Registers, leases and runs tasks until a stop is requested and everything has ended.
    pub async fn run(self, stops: StopSignals) -> Ended {
        let address = self.address();
        let Self { engine, sources, outbox, pages, events, disk, control, plugins, .. } = self;
        let planes = sources.iter().map(|source| source.facts().name.clone()).collect();
        events.emit(NodeEvent::NodeStarted { address, planes });
        let over = CancellationToken::new();
        let pages = pages.map(|pages| tokio::spawn(pages.run(over.clone())));
        #[cfg(unix)]
        let socket =
            self.socket.map(|socket| tokio::spawn(keep_open(socket, outbox.clone(), events.clone(), over.clone())));
        #[cfg(not(unix))]
        let socket: Option<tokio::task::JoinHandle<()>> = None;
        let calls = (Arc::clone(&plugins), events.clone(), over.clone());
        let calls = tokio::spawn(async move { calls.0.watch(calls.1, calls.2).await });
        let disk = tokio::spawn(disk.run(events.clone(), over.clone()));
        // If a stop is requested before the node begins, the node does not register.
        let run = |(index, source): (usize, &Arc<dyn LeaseSource>)| {
            let (source, over, events) = (Arc::clone(source), over.clone(), events.of_plane(index));
            let span = info_span!("plane", plane = %source.facts().name);
            let running = async move {
                let beginning = async {
                    if source.until_ready().await {
                        begun(&events, index);
                    }
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = source.run(over) => {}
                    () = beginning => {}
                }
            };
            control.handle.spawn(running.instrument(span))
        };
        let running: Vec<_> = sources.iter().enumerate().filter(|_| !stops.drain.is_cancelled()).map(run).collect();
        let until_ready = sources.iter().enumerate().map(|(index, source)| async move {
            if !source.until_ready().await {
                std::future::pending::<()>().await; // this one gives no work
            }
            index
        });
        let mut ready: FuturesUnordered<_> = until_ready.collect();
        let (mut ended, last_round, unanswered) = tokio::select! {
            biased;
            () = stops.drain.cancelled() => (Ended::Drained, Duration::ZERO, UnansweredTries::default()),
            // One control plane that can give work is enough.
            Some(first) = ready.next() => {
                begun(&events, first);
                events.emit(NodeEvent::NodeLeasing);
                let (outbox, enough) = (outbox.clone(), CancellationToken::new());
                let enough_of_it = enough.clone();
                let sending = control.handle.spawn(async move { outbox.run(enough_of_it).await });
                let ended = match control.handle.spawn(engine.run(stops)).await {
                    Ok(ended) => ended,
                    Err(err) => std::panic::resume_unwind(err.into_panic()),
                };
                enough.cancel();
                let unanswered = sending.await.unwrap_or_else(|err| std::panic::resume_unwind(err.into_panic()));
                (ended, LAST_ROUND, unanswered)
            }
        };
        let finish = async move { outbox.finish(last_round, unanswered).await };
        let left = control.handle.spawn(finish).await.unwrap_or_default();
        say_left(&left);
        if left.reports > 0 {
            ended = Ended::CutShort;
        }
        plugins.shutdown(SHUTDOWN_LIMIT).await;
        over.cancel();
        for task in [calls, disk].into_iter().chain(pages).chain(running).chain(socket) {
            if let Err(err) = task.await {
                warn!(event = "node.part_failed", error = %err, "a part of the node ended unexpectedly");
            }
        }
        control.stop();
        events.emit(NodeEvent::NodeStopped { cut_short: ended == Ended::CutShort });
        ended
    }
}

/// Notes that a control plane can give work for the first time.
fn begun(events: &NodeEvents, plane: usize) {
    events.board().change(|status| status.planes.0[plane].has_begun = true);
}

/// A control plane of a node, and the parts of it that the pages show.
struct BuiltPlane {
    source: Arc<dyn LeaseSource>,
    registration_form: RegistrationForm,
    /// Handles the requests of a sign-in service to the pages.
    health_checks: Option<Arc<dyn HealthChecks>>,
}

impl BuiltPlane {
    fn posemesh(config: dms::Config, auth: Auth, client: transport::Client) -> Self {
        Self {
            registration_form: auth.form().kind(),
            health_checks: Some(auth.health_checks()),
            source: Arc::new(Dms::new(config, client, auth)),
        }
    }

    #[cfg(feature = "grpc")]
    fn node_runtime(source: NodeRuntime) -> Self {
        Self { registration_form: RegistrationForm::None, health_checks: None, source: Arc::new(source) }
    }

    fn local(config: local::Config, events: NodeEvents) -> anyhow::Result<Self> {
        let source = Local::open(config, events).map_err(|problem| anyhow::anyhow!(problem))?;
        Ok(Self { registration_form: RegistrationForm::None, health_checks: None, source: Arc::new(source) })
    }
}

/// Most tasks with lost reports that are named.
const NAMED_MAX: usize = 100;

/// Logs which of the remaining reports the next start finds.
fn say_left(left: &Remaining) {
    let Remaining { reports, kept, unwritten, lost } = left;
    if !lost.is_empty() {
        let tasks: Vec<String> = lost.iter().take(NAMED_MAX).map(ToString::to_string).collect();
        let error = unwritten.as_deref();
        error!(
            event = "outbox.reports_lost",
            reports,
            lost = lost.len(),
            tasks = tasks.join(" "),
            error,
            "reports are lost, they are not on the disk"
        );
    } else if let Some(error) = unwritten {
        warn!(event = "outbox.not_closed", error, "outbox was not closed cleanly");
    }
    if *kept > 0 {
        warn!(
            event = "outbox.reports_left",
            reports = kept,
            "reports are left in the outbox, the next start sends them"
        );
    }
}

/// Listens for commands in the current state folder.
#[cfg(unix)]
async fn keep_open(mut socket: ControlSocket, outbox: Outbox, events: NodeEvents, over: CancellationToken) {
    loop {
        tokio::select! {
            () = socket.run(outbox.clone(), events.clone(), over.clone()) => return,
            () = outbox.moved() => {}
        }
        socket = match ControlSocket::open(outbox.folder()) {
            Ok(socket) => socket,
            Err(err) => return no_control_socket(outbox.folder(), &err),
        };
    }
}

#[cfg(unix)]
fn no_control_socket(folder: &Path, err: &std::io::Error) {
    warn!(event = "control.no_socket", state_dir = %folder.display(), error = %err, "control socket cannot be created, commands do not reach this node");
}

/// A thread with its own runtime for all calls to the control plane. Work that keeps the other threads busy then
/// cannot starve heartbeats.
struct Control {
    handle: Handle,
    stop: CancellationToken,
    thread: thread::JoinHandle<()>,
}

impl Control {
    fn start() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (handle, stop) = (runtime.handle().clone(), CancellationToken::new());
        let stopped = stop.clone();
        let thread =
            thread::Builder::new().name("control".to_owned()).spawn(move || runtime.block_on(stopped.cancelled()))?;
        Ok(Self { handle, stop, thread })
    }

    fn stop(self) {
        self.stop.cancel();
        // The thread ends as soon as it checks the signal. A panic in it has been logged.
        let _ = self.thread.join();
    }
}
