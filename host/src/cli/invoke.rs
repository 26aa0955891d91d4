//! `runner-host invoke`: one runner, once, here, with no control plane.

use std::{io::Write, path::PathBuf, sync::Arc};

use anyhow::Context;
use serde_json::{Value, json, value::to_raw_value};
use uuid::Uuid;

use super::{
    Exit, Output, PluginArgs, block_on, nothing_to_serve, put, reserve_stdout, signals::Signals, table, tell,
    unreadable,
};
use crate::{
    config::{HostConfig, Layers, folder_trouble, own_scratch_dir},
    model::{
        Budget, CancelReason, Capability, DataLocation, HeldLease, Lease, LocalFiles, Outcome, Ports, Setup, TaskId,
    },
    plugins::{Folder, Job, Plugins},
    storage::{LocalPorts, Scratch, UnpackLimits},
};

/// How long a cancelled runner may take to return.
const CANCEL_GRACE: std::time::Duration = std::time::Duration::from_secs(10);

/// Flags of `invoke`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// What to run, such as /examples/hello/v1
    #[arg(value_parser = super::parse_capability)]
    capability: Capability,
    #[command(flatten)]
    plugins: PluginArgs,
    /// A file the runner gets as input; may be given more than once
    #[arg(long = "input", value_name = "FILE")]
    inputs: Vec<PathBuf>,
    /// Parameters for the runner
    #[arg(long, value_name = "JSON", default_value = "{}")]
    meta: String,
    /// Where artifacts are written
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
    if let Some(why) = folder_trouble(&args.out) {
        return Err(anyhow::anyhow!("--out {}: {why}", args.out.display()).context(Exit::Usage));
    }
    let data = reserve_stdout()?;
    let plugins = args.plugins.load(1, &HostConfig::some(layers, &["plugins"])?.plugins)?;
    if let Some(exit) = nothing_to_serve(&plugins) {
        return Ok(exit);
    }
    if !plugins.capabilities().contains(&capability) {
        let served: Vec<String> = plugins.capabilities().iter().map(ToString::to_string).collect();
        tell(format_args!("error: no plugin serves {capability}; these do: {}", served.join(", ")));
        for listing in plugins.listings() {
            if let Some(reason) = &listing.reason {
                tell(format_args!("note: plugin {} was refused: {reason}", listing.file.display()));
            }
        }
        return Ok(Exit::Usage);
    }
    block_on(invoke(args, capability, meta, plugins, data))
}

async fn invoke(
    args: Args,
    capability: Capability,
    meta: Value,
    plugins: Plugins,
    mut data: impl Write,
) -> anyhow::Result<Exit> {
    let scratch = Scratch::open(own_scratch_dir()?)?;
    let task = TaskId::from(Uuid::new_v4());
    let dir = scratch.task_dir(&task);
    dir.make()?;
    let (grant, _keys) =
        HeldLease::new(lease(task, capability, args.inputs.len(), meta), Setup::Ready(Ok(DataLocation::None)));
    let files = LocalFiles { inputs: args.inputs, out: args.out.clone() };
    let (budget, unpack) = (Budget::unlimited(), UnpackLimits::default());
    let ports = Arc::new(LocalPorts::new(grant.clone(), Some(files), dir.path().to_owned(), budget, unpack));
    let job = Job {
        grant: grant.clone(),
        ports: Arc::clone(&ports) as Arc<dyn Ports>,
        folder: Folder { path: dir.path().to_owned(), make: Arc::new(|| Ok(())) },
        workers: tokio::runtime::Handle::current(),
        cancel_grace: CANCEL_GRACE,
        began: Box::new(|| {}),
    };
    let mut signals = Signals::install()?;
    crate::crash::point("invoke.before-run");
    let running = plugins.run(job);
    tokio::pin!(running);
    let outcome = loop {
        tokio::select! {
            outcome = &mut running => break outcome,
            () = grant.progress.changed() => show_news(&grant),
            _ = signals.next() => grant.cancel.cancel(CancelReason::Operator),
        }
    };
    show_news(&grant);
    plugins.shutdown(std::time::Duration::from_secs(1)).await;
    dir.close()?;
    match &outcome {
        Outcome::Completed => {}
        Outcome::Cancelled => {
            tell(format_args!("cancelled"));
            return Ok(Exit::Cancelled);
        }
        other => {
            tell(format_args!("error: {}: {}", other.word(), other.reason().unwrap_or_default()));
            return Ok(if ports.disk_was_full() { Exit::Temporary } else { Exit::Failed });
        }
    }
    for artifact in ports.published() {
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

fn lease(task: TaskId, capability: Capability, inputs: usize, meta: Value) -> Lease {
    let inputs: Vec<String> = (0..inputs).map(|number| format!("input-{number}")).collect();
    let document = json!({
        "task": { "id": task.to_string(), "capability": capability.as_str(), "inputs_cids": inputs, "meta": meta },
    });
    let document = to_raw_value(&document).expect("JSON values are JSON");
    Lease { inputs, document, ..Lease::bare(task, capability) }
}

/// Prints progress and events as they come, a line each.
fn show_news(grant: &HeldLease) {
    if !grant.progress.is_dirty() {
        return;
    }
    let news = grant.progress.pending();
    grant.progress.acknowledge(&news);
    for event in &news.events {
        tell(format_args!("event    {event}"));
    }
    if news.progress != json!({}) {
        tell(format_args!("progress {}", news.progress));
    }
}
