//! Log lines on stderr, JSON or text.

use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{LevelFilter, Targets},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use super::{
    json::{JsonLines, JsonMembers},
    text::TextFields,
};

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}

impl Format {
    /// `LOG_FORMAT`: `text` or `json` in any case. Any other value is `json`, as on other nodes.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        if text.eq_ignore_ascii_case("text") { Self::Text } else { Self::Json }
    }
}

/// Starts logging to stderr. A second call changes nothing. `filter` is the value of `RUST_LOG`. If it is invalid,
/// the level is `info` and a warning is logged.
pub fn init(format: Format, filter: &str) {
    let parsed = EnvFilter::try_new(filter);
    let mistake = parsed.as_ref().err().map(ToString::to_string);
    let filter = parsed.unwrap_or_else(|_| EnvFilter::new("info"));
    let filter = plain(filter);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines: Box<dyn Layer<_> + Send + Sync> = match format {
        Format::Json => lines.event_format(JsonLines).fmt_fields(JsonMembers).boxed(),
        // The crate's feature for colours is disabled. Without it, `with_ansi(true)` panics.
        Format::Text => lines.with_ansi(false).fmt_fields(TextFields).boxed(),
    };
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
    if let Some(mistake) = mistake {
        tracing::warn!(event = "log.filter_invalid", error = %mistake, "RUST_LOG cannot be used, the log level is info");
    }
}

/// Why `filter` is invalid. `None`: it is valid.
#[must_use]
pub fn filter_mistake(filter: &str) -> Option<String> {
    EnvFilter::try_new(filter).err().map(|err| err.to_string())
}

/// The same filter without its record of spans, unless a directive names a span. The record costs time on every
/// poll of a task.
fn plain<S: Subscriber>(filter: EnvFilter) -> Box<dyn Layer<S> + Send + Sync> {
    let text = filter.to_string();
    match text.parse::<Targets>() {
        Ok(targets) if !text.is_empty() && !text.contains('[') => targets.boxed(),
        _ => filter.boxed(),
    }
}

/// The most verbose enabled level, as a number of the plugins' ABI: 1 error to 5 trace, 0 none.
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{Event, debug, error, info, info_span, trace, warn};
    use tracing_subscriber::layer::Context;

    use super::*;

    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Seen {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let about = event.metadata();
            self.0.lock().expect("no code panics while it holds this").push(format!(
                "{} {}",
                about.target(),
                about.level()
            ));
        }
    }

    /// The lines that pass the filter, and the level that it announces.
    fn seen(filter: impl Layer<tracing_subscriber::Registry> + Send + Sync) -> (Option<LevelFilter>, Vec<String>) {
        let seen = Seen::default();
        let announced = filter.max_level_hint();
        let captured = crate::model::test_log::capture(tracing_subscriber::registry().with(filter).with(seen.clone()));
        for _ in 0..2 {
            let _task = info_span!("task", n = 1).entered();
            error!("x");
            warn!("x");
            info!("x");
            debug!("x");
            trace!("x");
            error!(target: "hyper::client", "x");
            info!(target: "hyper::client", "x");
            debug!(target: "hyper", "x");
            trace!(target: "other", "x");
        }
        drop(captured);
        let lines = seen.0.lock().expect("no code panics while it holds this").clone();
        (announced, lines)
    }

    #[test]
    fn plain_filter_equals_the_full_filter() {
        for text in [
            "",
            "info",
            "off",
            "WARN",
            "2",
            "hyper",
            "hyper=debug",
            "warn,hyper::client=info",
            "runner_host=trace,hyper=off",
            "info,,other",
            "runner_host::observe=debug,info,hyper=error",
            "trace",
            "[task]=debug",
            "info,[task{n=1}]=trace",
            "hyper[task]=trace",
            "info,other[{n}]=trace",
        ] {
            let filter = || EnvFilter::try_new(text).unwrap_or_else(|err| panic!("{text}: {err}"));
            assert_eq!(seen(plain(filter())), seen(filter()), "{text}");
        }
        assert_eq!(seen(plain(EnvFilter::new("off"))).1, [""; 0]);
    }
}
