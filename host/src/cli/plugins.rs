//! `runner-host plugins list|inspect|new`.

use std::{io::Write, path::PathBuf};

use serde_json::json;

use super::{Exit, Output, PluginArgs, reserve_stdout};
use crate::plugins::{Listing, inspect_file}; //SCA USE

/// What to do with plugins.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Load what a node would load, and say what was refused and why
    List {
        #[command(flatten)]
        plugins: PluginArgs,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Print what a library says about itself; none of its code runs
    Inspect {
        /// The library
        file: PathBuf,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    //SCA VAR
}

pub(super) fn run(command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::List { plugins, output } => list(&plugins, output),
        Command::Inspect { file, output } => inspect(&file, output),
        //SCA ARM
    }
}

fn list(args: &PluginArgs, output: Output) -> anyhow::Result<Exit> {
    let mut data = reserve_stdout()?;
    let plugins = args.load(1, None)?;
    let listings = plugins.listings();
    match output {
        Output::Json => writeln!(data, "{}", serde_json::to_string(listings)?)?,
        Output::Text => {
            if listings.is_empty() {
                eprintln!("no plugin was found");
            }
            for listing in listings {
                writeln!(data, "{}", row(listing))?;
            }
        }
    }
    let refused_all = !listings.is_empty() && plugins.capabilities().is_empty();
    Ok(if refused_all { Exit::PluginsRefused } else { Exit::Done })
}

fn row(listing: &Listing) -> String {
    let file = listing.file.file_name().unwrap_or(listing.file.as_os_str()).to_string_lossy();
    match &listing.reason {
        Some(reason) => format!("refused  {file:<24} {reason}"),
        None => format!("loaded   {file:<24} {}", listing.capabilities.join(", ")),
    }
}

fn inspect(file: &std::path::Path, output: Output) -> anyhow::Result<Exit> {
    let (sha256, facts) = match inspect_file(file) {
        Ok(facts) => facts,
        Err(err) => {
            eprintln!("error: plugin {}: {err}", file.display());
            return Ok(Exit::PluginsRefused);
        }
    };
    if output == Output::Json {
        println!("{}", json!({ "file": file, "sha256": sha256, "facts": facts }));
        return Ok(Exit::Done);
    }
    let manifest = &facts.manifest;
    let none = || "-".to_owned();
    let rows = [
        ("name", manifest.name.clone()),
        ("version", manifest.version.clone()),
        ("capabilities", manifest.capabilities.join(", ")),
        ("abi", manifest.abi.clone()),
        ("sdk", manifest.sdk.clone().unwrap_or_else(none)),
        ("sha256", sha256),
        ("format", format!("{} {}", facts.format, facts.machine)),
        ("glibc at least", facts.glibc.clone().unwrap_or_else(none)),
        ("static TLS", facts.static_tls.to_string()),
        ("layout proof", facts.rust.to_string()),
        ("needs", facts.needed.join(", ")),
    ];
    for (name, value) in rows {
        println!("{name:<16} {value}");
    }
    Ok(Exit::Done)
}
