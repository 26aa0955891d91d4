//! `runner-host run`: the node.

use std::{path::PathBuf, sync::Arc};

#[cfg(target_os = "linux")]
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use super::{Exit, PluginArgs, block_on_node_runtime, nothing_to_serve, signals};
use crate::{
    config::{
        HostConfig, KEYS, Key, Layers, Mistakes, Origin, Secrets, default_scratch_dir, folder_mistakes,
        own_scratch_dir, warnings,
    },
    engine::{Ended, StopSignals},
    model::did_you_mean,
};

/// Flags of `run`.
#[derive(clap::Args)]
#[command(after_help = settings_help())]
pub(super) struct Args {
    #[command(flatten)]
    plugins: PluginArgs,
    #[command(flatten)]
    pub(super) settings: Settings,
}

/// Settings given on the command line.
#[derive(clap::Args, Default)]
pub(super) struct Settings {
    /// Settings in TOML or JSON; the environment has priority
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Concurrent tasks; sets MAX_CONCURRENCY
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_concurrency: Option<String>,
    /// Address of the node's pages; sets HTTP_BIND
    #[arg(long, value_name = "ADDR")]
    http_bind: Option<String>,
    /// Any other setting by its environment name; never a secret
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
}

impl Settings {
    /// Adds the flags above the environment and the file below it. Mistakes in single flags are reported
    /// with all others.
    pub(super) fn apply(&self, layers: &mut Layers) -> anyhow::Result<()> {
        if let Some(file) = &self.config {
            layers.read_file(file)?;
        }
        layers.end_planes();
        for (name, value) in [("MAX_CONCURRENCY", &self.max_concurrency), ("HTTP_BIND", &self.http_bind)] {
            if let Some(value) = value {
                layers.set(name, value, Origin::Flag);
            }
        }
        for pair in &self.set {
            let Some((name, value)) = pair.split_once('=') else {
                layers.mistake(format!("--set {pair}: expected NAME=VALUE"));
                continue;
            };
            match Key::find(name) {
                Some(key) if key.is_secret() => layers.mistake(format!(
                    "--set {name}: a secret on the command line is visible to others; use the environment or {name}_FILE"
                )),
                Some(key) => layers.set(key.name, value, Origin::Flag),
                None => layers.mistake(format!("--set {name}: there is no such setting{}", did_you_mean(name, Key::suggested_names()))),
            }
        }
        Ok(())
    }
}

fn settings_help() -> String {
    let mut help = "Settings, by environment variable:\n".to_owned();
    for key in KEYS {
        let default = match (key.default, key.required) {
            (Some(default), _) => format!(" [default: {default}]"),
            (None, true) => " (required)".to_owned(),
            (None, false) => String::new(),
        };
        help.push_str(&format!("  {:<26} {}{default}\n", key.name, key.help));
    }
    help.push_str("\nThe first TERM or INT drains, the second cancels, the third exits at once.");
    help
}

/// The node's configuration, with its folders and plugin places checked.
/// All commands that start or check a node call it first.
///
/// # Errors
/// All mistakes.
pub(super) fn checked(layers: &Layers, secrets: &Secrets, plugins: &PluginArgs) -> Result<HostConfig, Mistakes> {
    let built = HostConfig::build(layers, secrets);
    let mut others = folder_mistakes(layers);
    others.extend(plugins.mistakes());
    match built {
        Ok(config) if others.is_empty() => Ok(config),
        Ok(_) => Err(Mistakes(others)),
        Err(Mistakes(mut mistakes)) => {
            mistakes.extend(others);
            Err(Mistakes(mistakes))
        }
    }
}

pub(super) fn log_warnings(warnings: &[String]) {
    for warning in warnings {
        tracing::warn!(event = "setting.warning", reason = %warning, "a setting should be changed");
    }
}

pub(super) fn run(args: &Args, layers: &Layers, secrets: &Secrets) -> anyhow::Result<Exit> {
    let config = checked(layers, secrets, &args.plugins).inspect_err(|_| log_warnings(&warnings(layers, secrets)))?;
    if config.storage.scratch_dir == default_scratch_dir() {
        own_scratch_dir()?;
    }
    // After the secrets are read and before a plugin runs: a dump or a debugger must not show them.
    #[cfg(target_os = "linux")]
    if !config.observe.allow_core_dumps
        && let Err(err) = set_dumpable_behavior(DumpableBehavior::NotDumpable)
    {
        tracing::warn!(event = "dumps.allowed", error = %err, "core dumps cannot be disabled, they contain the secrets");
    }
    // Log lines start here, so the last line must have the same form.
    super::errors_as_logs();
    if let Some(exit) = super::too_few_files(config.engine.slots, 1) {
        return Ok(exit);
    }
    log_warnings(&config.warnings);
    block_on_node_runtime(async {
        let stops = StopSignals::default();
        // Before the plugins load, which may take long: a signal in this time must end the node.
        signals::listen(stops.clone())?;
        let plugins = Arc::new(args.plugins.load(config.engine.slots, &config.plugins)?);
        if let Some(exit) = super::too_few_files(config.engine.slots, plugins.listings().len()) {
            return Ok(exit);
        }
        if let Some(exit) = nothing_to_serve(&plugins) {
            return Ok(exit);
        }
        let node = super::build_node(config, plugins).await?;
        Ok(match node.run(stops).await {
            Ended::Drained => Exit::Done,
            Ended::CutShort => Exit::Temporary,
        })
    })
}
