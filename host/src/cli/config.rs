//! `runner-host config show|check`.

use serde_json::json;

use super::{
    Exit, Output, PluginArgs, print_error, print_line, put,
    run::{Settings, checked},
    table,
};
use crate::{
    config::{KEYS, Key, Kind, Layers, Mistakes, Remark, Secrets, remarks, warnings},
    observe::logs,
};

/// Subcommands of `config`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Print every setting with its value and origin; secrets are masked
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
        /// Exit with 78 on warnings too
        #[arg(long)]
        strict: bool,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
}

impl Command {
    pub(super) fn settings(&self) -> &Settings {
        let (Self::Show { settings, .. } | Self::Check { settings, .. }) = self;
        settings
    }

    /// Whether mistakes go to stdout as [`report`] writes them.
    pub(super) fn reports_json(&self) -> bool {
        matches!(self, Self::Check { output: Output::Json, .. })
    }
}

pub(super) fn run(command: &Command, layers: &Layers, secrets: &Secrets) -> anyhow::Result<Exit> {
    match command {
        Command::Show { output, .. } => show(layers, secrets, *output),
        Command::Check { plugins, strict, output, .. } => {
            let warnings = match checked(layers, secrets, plugins) {
                Ok(config) => config.warnings,
                Err(Mistakes(mistakes)) => {
                    let warnings = warnings(layers, secrets);
                    match output {
                        Output::Json => report(&mistakes, &warnings)?,
                        Output::Text => {
                            mistakes.iter().for_each(|mistake| print_error(mistake));
                            warnings.iter().for_each(|warning| print_line(format_args!("warning: {warning}")));
                        }
                    }
                    return Ok(Exit::Configuration);
                }
            };
            let is_bad = *strict && !warnings.is_empty();
            match output {
                Output::Json => report(&[], &warnings)?,
                Output::Text => {
                    warnings.iter().for_each(|warning| print_line(format_args!("warning: {warning}")));
                    if is_bad {
                        print_error("with --strict a warning is a mistake; correct what the warnings name");
                    } else {
                        put(std::io::stdout(), "the configuration is complete\n")?;
                    }
                }
            }
            Ok(if is_bad { Exit::Configuration } else { Exit::Done })
        }
    }
}

/// What `config check -o json` prints.
pub(super) fn report(mistakes: &[String], warnings: &[String]) -> anyhow::Result<()> {
    let report = json!({ "complete": mistakes.is_empty(), "mistakes": mistakes, "warnings": warnings });
    put(std::io::stdout(), &format!("{report}\n"))
}

/// A setting as it is shown.
struct Row {
    name: String,
    value: Option<String>,
    origin: String,
    /// Why the value cannot be used.
    mistake: Option<String>,
    warning: Option<String>,
}

fn row(key: &Key, layers: &Layers, secrets: &Secrets, mistakes: &[Remark], warnings: &[Remark]) -> Row {
    let (value, origin) = if key.is_secret() {
        match secrets.find(key, layers) {
            Ok(Some((_, origin))) => (Some("********".to_owned()), origin),
            Ok(None) => (None, "unset".to_owned()),
            Err(problem) => {
                print_error(&problem);
                (None, "mistake".to_owned())
            }
        }
    } else {
        let (value, origin) = layers.get(key);
        (value.map(|value| masked_text(key, value)), layers.describe(origin))
    };
    let masked = |what: &str| match (key.is_secret(), layers.get(key).0) {
        // A remark repeats only the shown part of the value.
        (false, Some(raw)) => {
            let shown = masked_text(key, raw);
            what.replace(&format!("{raw:?}"), &format!("{shown:?}")).replace(raw, &shown)
        }
        _ => what.to_owned(),
    };
    let about = |remarks: &[Remark]| {
        let all = remarks.iter().filter(|remark| remark.is_about(key.name));
        let all: Vec<String> = all.map(|remark| masked(&remark.what)).collect();
        (!all.is_empty()).then(|| all.join("; "))
    };
    Row { name: key.name.to_owned(), value, origin, mistake: about(mistakes), warning: about(warnings) }
}

fn masked_text(key: &Key, value: &str) -> String {
    if matches!(key.kind, Kind::Proxy | Kind::Url) { without_password(value) } else { value.to_owned() }
}

impl Row {
    fn text(&self) -> String {
        let value = self.value.as_deref().unwrap_or("-");
        let remarks = [("mistake", &self.mistake), ("warning", &self.warning)];
        let remarks_text: String =
            remarks.iter().filter_map(|(word, text)| text.as_ref().map(|text| format!("  {word}: {text}"))).collect();
        format!("{:<26} {value:<34} {}{remarks_text}", self.name, self.origin)
    }

    /// The keys `mistake` and `warning` exist only if there is one.
    fn json(self) -> serde_json::Value {
        let mut row = json!({ "value": self.value, "origin": self.origin });
        for (word, text) in [("mistake", self.mistake), ("warning", self.warning)] {
            if let Some(text) = text {
                row[word] = text.into();
            }
        }
        row
    }
}

/// A URL without user, password and query. The text need not be a valid URL.
fn without_password(url: &str) -> String {
    let (place, query) = url.split_once('?').map_or((url, ""), |(place, _)| (place, "?********"));
    match place.rsplit_once('@') {
        Some((_, host)) => format!("********@{host}{query}"),
        None => format!("{place}{query}"),
    }
}

fn show(layers: &Layers, secrets: &Secrets, output: Output) -> anyhow::Result<Exit> {
    let (mistakes, mut warnings) = remarks(layers, secrets);
    let filter = layers.text("RUST_LOG").and_then(logs::filter_mistake);
    warnings.extend(filter.map(|why| Remark::at("RUST_LOG", "", format_args!("{why}, using info"))));
    let planes = layers.plane_rows().into_iter().map(|(name, value, origin)| Row {
        mistake: mistakes.iter().find(|mistake| mistake.is_about(&name)).map(|mistake| mistake.what.clone()),
        name,
        value: Some(value),
        origin: layers.describe(origin),
        warning: None,
    });
    let rows = planes.chain(KEYS.iter().map(|key| row(key, layers, secrets, &mistakes, &warnings)));
    let text: String = match output {
        Output::Text => table(rows.map(|row| row.text())),
        Output::Json => {
            let all: serde_json::Map<_, _> = rows.map(|row| (row.name.clone(), row.json())).collect();
            format!("{}\n", serde_json::Value::Object(all))
        }
    };
    put(std::io::stdout(), &text)?;
    // Mistakes that belong to no row.
    layers.mistakes().iter().for_each(|mistake| print_error(mistake));
    Ok(if layers.mistakes().is_empty() { Exit::Done } else { Exit::Configuration })
}
