//! The log bridge: a plugin's `tracing` (and `log`) records go to the host's log.
//!
//! Every library has its own copy of tracing's dispatcher, so without this they would vanish.

use std::fmt::Write as _;

use serde_json::{Map, Value};
use tracing::{
    Event, Id, Level, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span::Attributes,
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use super::{plugin_name, send_log};

/// Span that marks everything inside it as work of one task.
pub(crate) fn task_span(task: u64) -> tracing::Span {
    tracing::error_span!("runner_task", runner_task = task)
}

/// Installs the bridge unless the plugin's author has installed a subscriber.
pub(crate) fn install(level: u32) {
    let filter = match level {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let _ = tracing_subscriber::registry().with(filter).with(Bridge).try_init();
}

struct Bridge;

/// The task a span belongs to, kept in its extensions.
struct Mark(u64);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Bridge {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, ctx: Context<'_, S>) {
        if attributes.metadata().name() != "runner_task" {
            return;
        }
        let mut mark = None;
        attributes.record(&mut Marked(&mut mark));
        if let (Some(mark), Some(span)) = (mark, ctx.span(id)) {
            span.extensions_mut().insert(mark);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let marked = ctx
            .event_scope(event)
            .and_then(|scope| scope.from_root().find_map(|span| span.extensions().get::<Mark>().map(|mark| mark.0)));
        let level = match *event.metadata().level() {
            Level::ERROR => 1,
            Level::WARN => 2,
            Level::INFO => 3,
            Level::DEBUG => 4,
            Level::TRACE => 5,
        };
        // A record of the `log` crate arrives under the target "log", its own facts beside it as fields.
        let logged = fields.values.remove("log.target");
        for fact in ["log.module_path", "log.file", "log.line"] {
            fields.values.remove(fact);
        }
        if marked.is_none() {
            fields.values.insert("plugin".to_owned(), plugin_name().into());
        }
        let json = if fields.values.is_empty() { String::new() } else { Value::Object(fields.values).to_string() };
        let target = logged.as_ref().and_then(Value::as_str).unwrap_or(event.metadata().target());
        send_log(marked.unwrap_or(0), level, target, &fields.message, &json);
    }
}

/// Reads the task out of its span.
struct Marked<'a>(&'a mut Option<Mark>);

impl Visit for Marked<'_> {
    fn record_u64(&mut self, _field: &Field, task: u64) {
        *self.0 = Some(Mark(task));
    }

    fn record_debug(&mut self, _field: &Field, _value: &dyn std::fmt::Debug) {}
}

#[derive(Default)]
struct Fields {
    message: String,
    values: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.values.insert(field.name().to_owned(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            self.put(field, Value::String(format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            self.put(field, value.into());
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}
