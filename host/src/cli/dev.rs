//! `runner-host dev`: a dev server on this machine, with a node.

#[cfg(feature = "grpc")]
use std::collections::BTreeMap;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use url::Url;

use super::{
    Exit, PluginArgs, block_on, counted, print_line, put, read_problem,
    run::{checked, log_warnings},
    signals, too_few_files,
};
use crate::{
    app::Node,
    auth::NodeKey,
    config::{HostConfig, Layers, Mistakes, Origin, Secrets, folder_problem, own_scratch_dir},
    dev::{self, DevError, DevServer, Faults, WireForm, Wires},
    engine::{Ended, StopSignals},
    plugins::Plugins,
    storage::Scratch,
};
#[cfg(feature = "grpc")]
use crate::{config::PlaneChoice, leases::node_runtime, model::PlaneName};

/// The default port of the dev server.
const DEFAULT_PORT: u16 = 8700;

/// The pause between two heartbeats of the node.
#[cfg(feature = "grpc")]
const NODE_HEARTBEAT: std::time::Duration = std::time::Duration::from_secs(30);

/// Flags of `dev`.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    plugins: PluginArgs,
    /// Keep stored data in this folder; without it all data is deleted at the end
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Port of the dev server [default: 8700, or a free one if that is taken]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    port: Option<u16>,
    /// Control planes to serve; node-runtime is REST and gRPC
    #[arg(long, value_name = "PLANE", value_enum, default_value_t = Wires::Dms)]
    plane: Wires,
    /// Behave as the original Node Runtime control plane, with its defects (docs/protocols/node-runtime.md)
    #[arg(long)]
    origin: bool,
    /// Start the services without a node
    #[arg(long)]
    no_node: bool,
    /// Lifetime of a lease without a heartbeat [default: 60s, and 300s for runs of node-runtime]
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true, value_parser = super::parse_duration_above_zero)]
    lease_ttl: Option<std::time::Duration>,
    /// Leases one node may hold at once [default: any number]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = super::parse_count)]
    leases_per_node: Option<usize>,
    /// Refuse (409) a second node with the wallet of one that is online
    #[arg(long)]
    strict_identity: bool,
    /// Settings of the node in TOML or JSON; the environment has priority
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Inject faults into the services by the rules in this file (docs/operations/faults.md)
    #[arg(long, value_name = "FILE")]
    faults: Option<PathBuf>,
    /// Tasks the node runs at once [default: MAX_CONCURRENCY, or 4]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_concurrency: Option<String>,
}

pub(super) fn run(args: Args, layers: Layers) -> anyhow::Result<Exit> {
    if let Some(exit) = too_few_files(1, 1) {
        return Ok(exit);
    }
    block_on(live(args, layers))
}

async fn live(args: Args, layers: Layers) -> anyhow::Result<Exit> {
    let options = HostConfig::some(&layers, &["plugins"])?.plugins;
    look(&args, &layers)?;
    let faults = args.faults.as_deref().map(Faults::read).transpose()?.unwrap_or_default();
    let stops = StopSignals::default();
    signals::listen(stops.clone())?;
    let plugins = if args.no_node { None } else { Some(Arc::new(args.plugins.load(64, &options)?)) };
    // Data of this process only. The next start removes the folder of a killed process.
    let folder = Scratch::open(own_scratch_dir()?).context("make a temporary folder")?;
    let dev_server = start(&args, &faults, folder.path()).await?;
    let state = args.data.as_ref().map_or_else(|| folder.path().join("state"), |data| data.join("node"));
    let node = match &plugins {
        Some(plugins) => Some(join(&args, &state, layers, &dev_server, plugins).await?),
        None => None,
    };
    put(std::io::stdout(), &greeting(&args, &dev_server, &faults, node.as_ref(), plugins.as_deref())?)?;
    let ended = match node {
        Some(node) => node.run(stops).await,
        None => {
            stops.drain.cancelled().await;
            Ended::Drained
        }
    };
    dev_server.stop().await;
    Ok(if ended == Ended::Drained { Exit::Done } else { Exit::Temporary })
}

/// Checks all flags before anything is loaded or created. All mistakes are reported at once.
fn look(args: &Args, layers: &Layers) -> Result<(), Mistakes> {
    let mut mistakes = Vec::new();
    if args.plane.has_node_runtime() && !cfg!(feature = "grpc") {
        mistakes.push(format!("--plane: {}", DevError::NoGrpc));
    }
    if args.origin && !args.plane.has_node_runtime() {
        mistakes.push("--origin: has no effect with --plane dms; add --plane node-runtime or --plane both".to_owned());
    }
    mistakes.extend(args.faults.as_deref().and_then(|file| read_problem("--faults", file)));
    let data = args.data.as_deref().and_then(|data| Some((data, folder_problem(data)?)));
    mistakes.extend(data.map(|(data, why)| format!("--data {}: {why}", data.display())));
    if !args.no_node {
        // The URLs of the dev server are not known yet. The check accepts any URL on this machine.
        let place = Url::parse("http://127.0.0.1:9").expect("a constant URL");
        let (layers, secrets) = of_node(args, Path::new("node"), layers.clone(), &place, &place);
        mistakes.extend(checked(&layers, &secrets, &args.plugins).err().into_iter().flat_map(|of| of.0));
    }
    if mistakes.is_empty() { Ok(()) } else { Err(Mistakes(mistakes)) }
}

async fn start(args: &Args, faults: &Faults, temporary: &Path) -> anyhow::Result<DevServer> {
    let default = dev::Config::default();
    let config = |port| dev::Config {
        wires: args.plane,
        origin: args.origin,
        bind: SocketAddr::from(([127, 0, 0, 1], port)),
        data: args.data.clone(),
        temporary: Some(temporary.to_owned()),
        lease_ttl: args.lease_ttl.unwrap_or(default.lease_ttl),
        run_ttl: args.lease_ttl.unwrap_or(default.run_ttl),
        leases_per_node: args.leases_per_node,
        strict_identity: args.strict_identity,
        faults: faults.clone(),
        ..default.clone()
    };
    if let Some(port) = args.port {
        return DevServer::start(config(port)).await.context("the dev server did not start");
    }
    match DevServer::start(config(DEFAULT_PORT)).await {
        Err(DevError::Listen { source, .. }) if source.kind() == std::io::ErrorKind::AddrInUse => {
            print_line(format_args!("port {DEFAULT_PORT} is taken, using a free one"));
            DevServer::start(config(0)).await.context("the dev server did not start")
        }
        other => other.context("the dev server did not start"),
    }
}

/// A node that uses the dev server over HTTP, with its own key.
async fn join(
    args: &Args,
    state: &Path,
    layers: Layers,
    dev_server: &DevServer,
    plugins: &Arc<Plugins>,
) -> anyhow::Result<Node> {
    let (layers, secrets) = of_node(args, state, layers, &dev_server.dds_url(), &dev_server.dms_url());
    #[cfg_attr(not(feature = "grpc"), expect(unused_mut, reason = "only gRPC changes it"))]
    let mut config = HostConfig::build(&layers, &secrets)?;
    log_warnings(&config.warnings);
    #[cfg(feature = "grpc")]
    if args.plane.has_node_runtime() {
        if !args.plane.has_dms() {
            config.planes.clear();
        }
        config.planes.push(PlaneChoice::NodeRuntime(Box::new(node_runtime(dev_server.url(), config.engine.slots))));
    }
    super::build_node(config, Arc::clone(plugins)).await
}

/// The node's settings for the Node Runtime control plane.
#[cfg(feature = "grpc")]
fn node_runtime(url: Url, slots: usize) -> node_runtime::Config {
    let slots = u32::try_from(slots).unwrap_or(u32::MAX);
    node_runtime::Config {
        name: PlaneName::parse("node-runtime").expect("a valid name"),
        grpc_url: url.clone(),
        control_plane_url: url,
        node_id: "dev".to_owned(),
        max_concurrent_leases: slots,
        heartbeat_interval: NODE_HEARTBEAT,
        capacity: node_runtime::Capacity { slots, ..node_runtime::Capacity::default() },
        metadata: BTreeMap::new(),
        agent_map: BTreeMap::new(),
        tls: None,
    }
}

/// The node's settings, with a fresh key.
fn of_node(args: &Args, state: &Path, mut layers: Layers, dds: &Url, dms: &Url) -> (Layers, Secrets) {
    layers.set("DDS_BASE_URL", dds.as_str(), Origin::Command);
    layers.set("DMS_BASE_URL", dms.as_str(), Origin::Command);
    layers.set("HTTP_BIND", "127.0.0.1:0", Origin::Command);
    if args.plane.has_node_runtime() {
        layers.set("DOMAIN_HOSTS", dms.authority(), Origin::Command);
    }
    layers.set("STATE_DIR", &state.to_string_lossy(), Origin::Command);
    layers.set_default("POLL_BACKOFF_MS_MIN", "50");
    layers.set_default("POLL_BACKOFF_MS_MAX", "250");
    layers.set_default("MAX_CONCURRENCY", "4");
    if let Some(count) = &args.max_concurrency {
        layers.set("MAX_CONCURRENCY", count, Origin::Flag);
    }
    let (_, key) = NodeKey::generate();
    (layers, Secrets::from_pairs([("REG_SECRET", "dev"), ("SECP256K1_PRIVHEX", key.as_str())]))
}

/// The text that `dev` prints on stdout.
fn greeting(
    args: &Args,
    dev_server: &DevServer,
    faults: &Faults,
    node: Option<&Node>,
    plugins: Option<&Plugins>,
) -> anyhow::Result<String> {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<16} {value}");
    };
    let wires = args.plane;
    if wires.has_dms() {
        row("sign-in (DDS)", dev_server.dds_url().to_string());
        row("tasks (DMS)", dev_server.dms_url().to_string());
    }
    if wires.has_node_runtime() {
        let form = if args.origin { ", as the original" } else { "" };
        row("node-runtime", format!("{} (REST and gRPC{form})", dev_server.url()));
    }
    row("domain server", dev_server.domain_server_url().to_string());
    row("domain", dev_server.domain_id().to_string());
    if let Some(address) = node.and_then(Node::address) {
        row("node pages", format!("http://{address}/status.json"));
    }
    if let Some(node) = node {
        row("node state", format!("{} (--state-dir of cancel and outbox)", node.state_dir().display()));
    }
    if let Some(plugins) = plugins {
        let served: Vec<String> = plugins.capabilities().iter().map(ToString::to_string).collect();
        row("serving", if served.is_empty() { "nothing: no plugin is loaded".to_owned() } else { served.join(" ") });
    }
    let state = match &args.data {
        Some(dir) => format!("stored data stays in {}; jobs are deleted at the end", dir.display()),
        None => "all data is deleted at the end; --data DIR keeps stored data".to_owned(),
    };
    row("state", state);
    if let Some(file) = &args.faults {
        let (rules, seed) = (counted(faults.len(), "rule", "rules"), dev_server.faults_seed());
        let mut text = format!("{rules} of {}, seed {seed}", file.display());
        if !faults.clock_offset().is_zero() {
            let _ = write!(text, ", clock {:#} off", faults.clock_offset());
        }
        if faults.form == WireForm::Old {
            text.push_str(", old form of the wire");
        }
        row("faults", text);
    }
    let url = trimmed(dev_server.url());
    // Two nodes cannot share an identity or a state folder.
    let fresh = || uuid::Uuid::new_v4().simple().to_string();
    let place = || {
        let state = std::env::temp_dir().join(format!("runner-host-{}", fresh()));
        format!("export HTTP_BIND=127.0.0.1:0\nexport STATE_DIR={}\n", state.display())
    };
    if wires.has_dms() {
        let (_, key) = NodeKey::generate();
        let dms = trimmed(dev_server.dms_url());
        let _ = write!(
            text,
            "\nAnother node joins with (a fresh key):\n\
             export DDS_BASE_URL={url}\n\
             export DMS_BASE_URL={dms}\n\
             export REG_SECRET=dev\n\
             export SECP256K1_PRIVHEX={key}\n\
             {}",
            place(),
        );
    }
    if wires.has_node_runtime() {
        let _ = write!(
            text,
            "\nAnother node joins node-runtime with this in its --config file (a fresh id):\n\
             [plane.node-runtime]\n\
             kind = \"node-runtime\"\n\
             control_plane_url = \"{url}\"\n\
             node_id = \"node-{}\"\n\
             and with:\n\
             {}\
             export DOMAIN_HOSTS={}\n",
            &fresh()[..8],
            place(),
            dev_server.address(),
        );
    }
    let _ = write!(text, "\nJobs come from:\nexport RUNNER_HOST_DEV={url}\n");
    if wires.has_dms() {
        text.push_str("runner-host submit CAPABILITY --input FILE --wait\n");
    }
    if wires.has_node_runtime() {
        text.push_str("runner-host submit --plane node-runtime CAPABILITY --input FILE --wait\n");
    }
    text.push_str("\nFor development and tests, not for production.\n");
    Ok(text)
}

fn trimmed(url: Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}
