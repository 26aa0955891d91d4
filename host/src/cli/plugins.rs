//! `runner-host plugins list|inspect|new`.

use std::path::PathBuf;

use serde_json::json;

use super::{
    Exit, Output, PluginArgs, one_line, print_error, print_line, put, refused_exit, reserve_stdout, table,
    too_few_files,
};
use crate::{
    config::{HostConfig, Layers},
    plugins::{Listing, ScaffoldError, create, inspect_file},
};

/// Subcommands of `plugins`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Load plugins as a node does, and list them; refused ones with the reason
    List {
        #[command(flatten)]
        plugins: PluginArgs,
        /// Exit with 4 when one is refused, not only when all are
        #[arg(long)]
        strict: bool,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Print the description of a library without running its code
    Inspect {
        /// The library
        file: PathBuf,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Create a runner crate that builds
    New {
        /// Name of the crate; it serves /NAME/v1
        name: String,
        /// Folder of the crate [default: NAME]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Folder of runner-sdk to build against; required until the crate is published
        #[arg(long, value_name = "PATH")]
        sdk: Option<PathBuf>,
    },
}

pub(super) fn run(command: Command, layers: &Layers) -> anyhow::Result<Exit> {
    match command {
        Command::List { plugins, strict, output } => list(&plugins, strict, output, layers),
        Command::Inspect { file, output } => inspect(&file, output),
        Command::New { name, dir, sdk } => new(&name, dir, sdk),
    }
}

fn list(args: &PluginArgs, strict: bool, output: Output, layers: &Layers) -> anyhow::Result<Exit> {
    let data = reserve_stdout()?;
    let settings = HostConfig::some(layers, &["plugins"])?.plugins;
    if let Some(exit) = too_few_files(1, 1) {
        return Ok(exit);
    }
    let plugins = args.load(1, &settings)?;
    let listings = plugins.listings();
    if let Some(exit) = too_few_files(1, listings.len()) {
        return Ok(exit);
    }
    match output {
        Output::Json => put(data, &format!("{}\n", serde_json::to_string(&listings)?))?,
        Output::Text => {
            if listings.is_empty() {
                print_line(format_args!("no plugin was found"));
            }
            put(data, &table(listings.iter().map(row)))?;
        }
    }
    let refused = listings.iter().filter(|listing| listing.state == crate::plugins::PluginState::Refused).count();
    let is_bad = if strict { refused > 0 } else { refused > 0 && plugins.capabilities().is_empty() };
    Ok(if is_bad { refused_exit(&listings) } else { Exit::Done })
}

fn row(listing: &Listing) -> String {
    let mut file = listing.file.file_name().unwrap_or(listing.file.as_os_str()).to_string_lossy().into_owned();
    if let Some(name) = listing.name.as_ref().filter(|_| listing.is_named) {
        file = format!("{file} ({name})");
    }
    match &listing.reason {
        Some(reason) => format!("refused  {file:<24} {reason}"),
        None => format!("loaded   {file:<24} {}", listing.capabilities.join(", ")),
    }
}

fn inspect(file: &std::path::Path, output: Output) -> anyhow::Result<Exit> {
    let (sha256, facts) = match inspect_file(file) {
        Ok(facts) => facts,
        Err(err) => {
            print_line(format_args!("error: plugin {}: {err}", file.display()));
            return Ok(if err.is_temporary() { Exit::Temporary } else { Exit::PluginsRefused });
        }
    };
    if output == Output::Json {
        let facts = json!({ "file": file.to_string_lossy(), "sha256": sha256, "facts": facts });
        put(std::io::stdout(), &format!("{facts}\n"))?;
        return Ok(Exit::Done);
    }
    let manifest = &facts.manifest;
    let none = || "-".to_owned();
    let words = |words: &[String]| if words.is_empty() { none() } else { words.join(", ") };
    let rows = [
        ("name", manifest.name.clone()),
        ("version", manifest.version.clone()),
        ("capabilities", manifest.capabilities.join(", ")),
        ("abi", manifest.abi.clone()),
        ("abi at least", manifest.min_abi.clone().unwrap_or_else(none)),
        ("requires", words(&manifest.requires)),
        ("wants", words(&manifest.wants)),
        ("sdk", manifest.sdk.clone().unwrap_or_else(none)),
        ("sha256", sha256),
        ("format", format!("{} {}", facts.format, facts.machine)),
        ("glibc at least", facts.glibc.clone().unwrap_or_else(none)),
        ("static TLS", facts.static_tls.to_string()),
        ("layout proof", facts.rust.to_string()),
        ("libraries", facts.needed.join(", ")),
    ];
    put(std::io::stdout(), &table(rows.iter().map(|(name, value)| format!("{name:<16} {value}"))))?;
    Ok(Exit::Done)
}

fn new(name: &str, dir: Option<PathBuf>, sdk: Option<PathBuf>) -> anyhow::Result<Exit> {
    let dir = dir.unwrap_or_else(|| PathBuf::from(name));
    let files = match create(&dir, name, sdk.as_deref()) {
        Ok(files) => files,
        Err(err) => {
            // A write error is no wrong usage.
            let exit = if matches!(err, ScaffoldError::Write { .. }) { Exit::Failed } else { Exit::Usage };
            print_error(&one_line(&err.into()));
            return Ok(exit);
        }
    };
    put(std::io::stdout(), &table(files.iter().map(|file| file.display())))?;
    print_line(format_args!("next: cd {} && cargo test && cargo build --release", dir.display()));
    Ok(Exit::Done)
}
