//! The log bridge: a plugin's `tracing` (and `log`) records go to the host's log.
//!
//! Every library has its own copy of tracing's dispatcher. Without the bridge its records would be lost.

use std::{cell::RefCell, fmt::Write as _, sync::OnceLock};

use serde_json::{Map, Value};
use tracing::{
    Event, Id, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span::{Attributes, Record},
};
use tracing_core::span::Current;
use tracing_log::{AsLog as _, LogTracer};

use super::{plugin_name, send_log};

/// Span that marks everything inside it as work of one task.
pub(crate) fn task_span(task: u64) -> tracing::Span {
    tracing::error_span!("runner_task", runner_task = task)
}

/// Installs the bridge unless the plugin's author has installed a subscriber.
pub(crate) fn install(level: u32) {
    let most = match level {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    if tracing::subscriber::set_global_default(Bridge { most }).is_ok() {
        // Fails if the author has installed a logger of the `log` crate. That logger then gets its records.
        let _ = LogTracer::builder().with_max_level(most.as_log()).init();
    }
}

/// The bridge needs only the task of a span. Therefore the id of a span *is* its task. A registry of spans would
/// add a tenth to each plugin's memory.
struct Bridge {
    most: LevelFilter,
}

thread_local! {
    /// The spans that this thread is in, the innermost last.
    static ENTERED: RefCell<Vec<Id>> = const { RefCell::new(Vec::new()) };
}

/// What [`Span::current`](tracing::Span::current) returns for a task's span.
static TASK: OnceLock<&'static Metadata<'static>> = OnceLock::new();

const NO_TASK: u64 = u64::MAX;

fn id_of(task: Option<u64>) -> Id {
    // An id must not be 0.
    Id::from_u64(task.map_or(NO_TASK, |task| task.saturating_add(1)))
}

fn task_of(id: &Id) -> Option<u64> {
    Some(id.into_u64()).filter(|id| *id != NO_TASK).map(|id| id - 1)
}

/// The innermost span of this thread. None in a thread that is ending.
fn innermost() -> Option<Id> {
    ENTERED.try_with(|entered| entered.borrow().last().cloned()).ok().flatten()
}

impl Subscriber for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.most
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.most)
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let metadata = attributes.metadata();
        if metadata.target() == module_path!() {
            let mut marked = Marked(None);
            attributes.record(&mut marked);
            TASK.get_or_init(|| metadata);
            return id_of(marked.0);
        }
        let around = if attributes.is_contextual() { innermost() } else { attributes.parent().cloned() };
        around.unwrap_or_else(|| id_of(None))
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn enter(&self, span: &Id) {
        let _ = ENTERED.try_with(|entered| entered.borrow_mut().push(span.clone()));
    }

    fn exit(&self, span: &Id) {
        let _ = ENTERED.try_with(|entered| {
            let mut entered = entered.borrow_mut();
            if let Some(last) = entered.iter().rposition(|id| id == span) {
                entered.remove(last);
            }
        });
    }

    fn current_span(&self) -> Current {
        match (innermost(), TASK.get()) {
            (Some(id), Some(metadata)) if task_of(&id).is_some() => Current::new(id, metadata),
            _ => Current::none(),
        }
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let around = if event.is_contextual() { innermost() } else { event.parent().cloned() };
        let task = around.as_ref().and_then(task_of);
        let level = match *event.metadata().level() {
            Level::ERROR => 1,
            Level::WARN => 2,
            Level::INFO => 3,
            Level::DEBUG => 4,
            Level::TRACE => 5,
        };
        // A record of the `log` crate has the target "log". Its real target and place are fields.
        let logged = fields.values.remove("log.target");
        for fact in ["log.module_path", "log.file", "log.line"] {
            fields.values.remove(fact);
        }
        if task.is_none() {
            fields.values.insert("plugin".to_owned(), plugin_name().into());
        }
        let json = if fields.values.is_empty() { String::new() } else { Value::Object(fields.values).to_string() };
        let target = logged.as_ref().and_then(Value::as_str).unwrap_or(event.metadata().target());
        send_log(task.unwrap_or(0), level, target, &fields.message, &json);
    }
}

/// Reads the task from its span.
struct Marked(Option<u64>);

impl Visit for Marked {
    fn record_u64(&mut self, _field: &Field, task: u64) {
        self.0 = Some(task);
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
