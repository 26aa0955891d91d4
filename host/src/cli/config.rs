//! `runner-host config show|check`.

use serde_json::json;

use super::{Exit, Output, put, run::Settings};
use crate::config::{HostConfig, KEYS, Layers, Origin, Secrets};

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
        settings: Settings,
    },
}

pub(super) fn run(command: &Command, mut layers: Layers, secrets: &Secrets) -> anyhow::Result<Exit> {
    let (Command::Show { settings, .. } | Command::Check { settings }) = command;
    if let Err(err) = settings.apply(&mut layers) {
        eprintln!("error: {err}");
        return Ok(Exit::Configuration);
    }
    match command {
        Command::Show { output, .. } => show(&layers, secrets, *output),
        Command::Check { .. } => match HostConfig::build(&layers, secrets) {
            Ok(_) => {
                put(std::io::stdout(), "the configuration is complete\n")?;
                Ok(Exit::Done)
            }
            Err(mistakes) => {
                for mistake in mistakes.0 {
                    eprintln!("error: {mistake}");
                }
                Ok(Exit::Configuration)
            }
        },
    }
}

fn show(layers: &Layers, secrets: &Secrets, output: Output) -> anyhow::Result<Exit> {
    let rows = KEYS.iter().map(|key| {
        if key.secret {
            let set = secrets.get(key.name).is_some();
            let origin = if set { Origin::Environment } else { Origin::Unset };
            return (key.name, set.then(|| "********".to_owned()), origin);
        }
        let (value, origin) = layers.get(key);
        (key.name, value.map(str::to_owned), origin)
    });
    let text: String = match output {
        Output::Text => rows
            .map(|(name, value, origin)| {
                format!("{name:<26} {:<34} {}\n", value.as_deref().unwrap_or("-"), origin.as_str())
            })
            .collect(),
        Output::Json => {
            let all: serde_json::Map<_, _> = rows
                .map(|(name, value, origin)| (name.to_owned(), json!({ "value": value, "origin": origin.as_str() })))
                .collect();
            format!("{}\n", serde_json::Value::Object(all))
        }
    };
    put(std::io::stdout(), &text)?;
    Ok(Exit::Done)
}
