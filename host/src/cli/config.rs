//! `runner-host config show|check`.

use serde_json::json;

use super::{Exit, Output, PluginArgs, complain, put, run::Settings};
use crate::config::{HostConfig, KEYS, Key, Kind, Layers, Secrets, folder_mistakes};

/// What to do with the configuration.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Print every setting with its value and where it comes from; secrets are masked
    Show {
        #[command(flatten)]
        settings: Settings,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Check the configuration and report all mistakes at once
    Check {
        #[command(flatten)]
        plugins: PluginArgs,
        #[command(flatten)]
        settings: Settings,
    },
}

impl Command {
    pub(super) fn settings(&self) -> &Settings {
        let (Self::Show { settings, .. } | Self::Check { settings, .. }) = self;
        settings
    }
}

pub(super) fn run(command: &Command, layers: &Layers, secrets: &Secrets) -> anyhow::Result<Exit> {
    match command {
        Command::Show { output, .. } => show(layers, secrets, *output),
        Command::Check { plugins, .. } => {
            let (warnings, mut mistakes) = match HostConfig::build(layers, secrets) {
                Ok(config) => (config.warnings, Vec::new()),
                Err(mistakes) => (Vec::new(), mistakes.0),
            };
            mistakes.extend(folder_mistakes(layers));
            mistakes.extend(plugins.mistakes());
            for warning in &warnings {
                eprintln!("warning: {warning}");
            }
            mistakes.iter().for_each(|mistake| complain(mistake));
            if !mistakes.is_empty() {
                return Ok(Exit::Configuration);
            }
            put(std::io::stdout(), "the configuration is complete\n")?;
            Ok(Exit::Done)
        }
    }
}

/// Name, value as it may be shown, and origin.
fn row(key: &Key, layers: &Layers, secrets: &Secrets) -> (&'static str, Option<String>, String) {
    if key.is_secret() {
        return match secrets.find(key, layers) {
            Ok(Some((_, origin))) => (key.name, Some("********".to_owned()), origin),
            Ok(None) => (key.name, None, "unset".to_owned()),
            Err(problem) => {
                complain(&problem);
                (key.name, None, "mistake".to_owned())
            }
        };
    }
    let (value, origin) = layers.get(key);
    let is_url = matches!(key.kind, Kind::Proxy | Kind::Url);
    let shown = value.map(|value| if is_url { without_password(value) } else { value.to_owned() });
    (key.name, shown, layers.describe(origin))
}

/// A URL without its user, password and query, also where it is no URL at all.
fn without_password(url: &str) -> String {
    let (place, query) = url.split_once('?').map_or((url, ""), |(place, _)| (place, "?********"));
    match place.rsplit_once('@') {
        Some((_, host)) => format!("********@{host}{query}"),
        None => format!("{place}{query}"),
    }
}

fn show(layers: &Layers, secrets: &Secrets, output: Output) -> anyhow::Result<Exit> {
    let rows = KEYS.iter().map(|key| row(key, layers, secrets));
    let text: String = match output {
        Output::Text => rows
            .map(|(name, value, origin)| format!("{name:<26} {:<34} {origin}\n", value.as_deref().unwrap_or("-")))
            .collect(),
        Output::Json => {
            let all: serde_json::Map<_, _> = rows
                .map(|(name, value, origin)| (name.to_owned(), json!({ "value": value, "origin": origin })))
                .collect();
            format!("{}\n", serde_json::Value::Object(all))
        }
    };
    put(std::io::stdout(), &text)?;
    // What was given and is not among the rows.
    layers.mistakes().iter().for_each(|mistake| complain(mistake));
    Ok(if layers.mistakes().is_empty() { Exit::Done } else { Exit::Configuration })
}
