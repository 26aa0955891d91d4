//! Log lines on stderr, JSON or text.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, Layer, filter::LevelFilter, layer::SubscriberExt, util::SubscriberInitExt};

use super::json::{JsonLines, JsonMembers};

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

impl Format {
    /// `LOG_FORMAT`: `text` or `json` in any case; anything else is `json`, as on other nodes.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        if text.eq_ignore_ascii_case("text") { Self::Text } else { Self::Json }
    }
}

/// Starts logging to stderr. A second call changes nothing. `filter` is what `RUST_LOG` says; an
/// unusable one falls back to `info` and is said so.
pub fn init(format: Format, filter: &str) {
    let parsed = EnvFilter::try_new(filter);
    let mistake = parsed.as_ref().err().map(ToString::to_string);
    let filter = parsed.unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines: Box<dyn Layer<_> + Send + Sync> = match format {
        Format::Json => lines.event_format(JsonLines).fmt_fields(JsonMembers).boxed(),
        Format::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    };
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
    if let Some(mistake) = mistake {
        tracing::warn!(error = %mistake, "RUST_LOG cannot be used, logging at info");
    }
}

/// The most verbose level anybody listens to, as the plugins' ABI counts: 1 error to 5 trace, 0 none.
#[must_use]
pub fn plugin_level() -> u32 {
    match LevelFilter::current() {
        LevelFilter::OFF => 0,
        LevelFilter::ERROR => 1,
        LevelFilter::WARN => 2,
        LevelFilter::INFO => 3,
        LevelFilter::DEBUG => 4,
        LevelFilter::TRACE => 5,
    }
}
