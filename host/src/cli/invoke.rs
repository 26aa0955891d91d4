//! `runner-host invoke`: runs one runner once, without a control plane.
//!
//! The task is the one job of a local control plane in a temporary folder. It uses the same code as every other
//! task: slots, memory budget, outbox.

use std::{io::Write, path::PathBuf, sync::Arc};

use anyhow::Context;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    Exit, Output, PluginArgs, block_on_node_runtime, nothing_to_serve, print_line, put, reserve_stdout, signals, table,
    too_few_files, unreadable,
};
use crate::{
    config::{HostConfig, Layers, PlaneChoice, folder_problem, own_scratch_dir},
    engine::StopSignals,
    leases::local::{self, LocalEvent},
    model::{Capability, Outcome, PlaneName, TaskId, TaskResult, did_you_mean},
    observe::StatusPage,
    plugins::Plugins,
    storage::Scratch,
};

/// The id of the one job.
const JOB: &str = "invoke";

/// Flags of `invoke`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to run, such as /examples/hello/v1
    #[arg(value_parser = super::parse_capability)]
    capability: Capability,
    #[command(flatten)]
    plugins: PluginArgs,
    /// Input file of the runner; may be given more than once
    #[arg(long = "input", value_name = "FILE")]
    inputs: Vec<PathBuf>,
    /// Parameters of the runner
    #[arg(long, value_name = "JSON", default_value = "{}")]
    meta: String,
    /// Folder for artifacts
    #[arg(long, value_name = "DIR", default_value = "out")]
    out: PathBuf,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

pub(super) fn run(args: Args, layers: &Layers) -> anyhow::Result<Exit> {
    let capability = args.capability.clone();
    let meta: Value = serde_json::from_str(&args.meta)
        .map_err(|err| anyhow::anyhow!("--meta: expected JSON: {err}"))
        .context(Exit::Usage)?;
    for input in &args.inputs {
        if let Some(why) = unreadable("--input", input) {
            return Err(anyhow::anyhow!(why).context(Exit::Usage));
        }
    }
    if let Some(why) = folder_problem(&args.out) {
        return Err(anyhow::anyhow!("--out {}: {why}", args.out.display()).context(Exit::Usage));
    }
    if let Some(exit) = too_few_files(1, 1) {
        return Ok(exit);
    }
    let data = reserve_stdout()?;
    // Settings of a control plane are not used here, so mistakes in them are ignored.
    let config = HostConfig::some(layers, &["plugins", "storage", "engine"])?;
    let plugins = args.plugins.load(1, &config.plugins)?;
    if let Some(exit) = nothing_to_serve(&plugins) {
        return Ok(exit);
    }
    if !plugins.capabilities().contains(&capability) {
        let served: Vec<String> = plugins.capabilities().iter().map(ToString::to_string).collect();
        let near = did_you_mean(capability.as_str(), served.iter().map(String::as_str));
        print_line(format_args!("error: no plugin serves {capability}; these do: {}{near}", served.join(", ")));
        for listing in plugins.listings() {
            if let Some(reason) = &listing.reason {
                print_line(format_args!("note: plugin {} was refused: {reason}", listing.file.display()));
            }
        }
        return Ok(Exit::Usage);
    }
    block_on_node_runtime(invoke(args, capability, meta, config, plugins, data))
}

async fn invoke(
    args: Args,
    capability: Capability,
    meta: Value,
    mut config: HostConfig,
    plugins: Plugins,
    mut data: impl Write,
) -> anyhow::Result<Exit> {
    config.storage.scratch_dir = own_scratch_dir()?;
    config.storage.disk_free_min = 0; // the limit is for leased tasks, not for a requested one
    let home = Scratch::open(config.storage.scratch_dir.clone())?;
    let out = std::path::absolute(&args.out).context("--out")?;
    let (observer, mut events) = mpsc::unbounded_channel();
    let folder = home.path().join("jobs");
    let inputs = args.inputs.iter().map(std::path::absolute).collect::<Result<Vec<_>, _>>().context("--input")?;
    let job = local::Job { capability, inputs, meta, out: Some(out), term: local::TERM_MAX, time_limit: None };
    local::submit(&folder, &TaskId::parse(JOB)?, &job)?;
    config.planes = vec![PlaneChoice::Local { name: PlaneName::parse(JOB)?, folder, observer: Some(observer) }];
    config.engine.slots = 1;
    config.outbox.state_dir = home.path().join("state");
    config.observe.status_page = StatusPage::Disabled;
    let stops = StopSignals::default();
    signals::cancel(stops.clone())?;
    crate::crash::point("invoke.before-run");
    let node = super::build_node(config, Arc::new(plugins)).await?;
    let running = node.run(stops.clone());
    tokio::pin!(running);
    let mut result = None;
    loop {
        tokio::select! {
            _ = &mut running => break,
            Some(event) = events.recv() => show(event, &mut result, &stops),
        }
    }
    while let Ok(event) = events.try_recv() {
        show(event, &mut result, &stops);
    }
    let Some(result) = result else {
        print_line(format_args!("cancelled"));
        return Ok(Exit::Cancelled);
    };
    match &result.outcome {
        Outcome::Completed => {}
        Outcome::Drained | Outcome::Cancelled | Outcome::CancelledByOperator => {
            print_line(format_args!("cancelled"));
            return Ok(Exit::Cancelled);
        }
        other => {
            print_line(format_args!("error: {}: {}", other.word(), other.reason().unwrap_or_default()));
            return Ok(if result.disk_was_full { Exit::Temporary } else { Exit::Failed });
        }
    }
    for artifact in &result.artifacts {
        let path = args.out.join(&artifact.logical_path);
        match args.output {
            Output::Text => put(&mut data, &table([path.display()]))?,
            Output::Json => {
                let row = json!({
                    "path": path.to_string_lossy(), "data_type": artifact.data_type, "name": artifact.name,
                    "size": artifact.size, "sha256": artifact.sha256,
                });
                put(&mut data, &format!("{row}\n"))?;
            }
        }
    }
    Ok(Exit::Done)
}

/// Prints progress and events, one line each. The end of the task stops the node.
fn show(event: LocalEvent, result: &mut Option<TaskResult>, stops: &StopSignals) {
    match event {
        LocalEvent::Event(event) => print_line(format_args!("event    {event}")),
        LocalEvent::Progress(progress) => print_line(format_args!("progress {progress}")),
        LocalEvent::Ended(ended) => {
            *result = Some(ended);
            stops.drain.cancel();
        }
    }
}
