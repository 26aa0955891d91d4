//! The log bridge: a plugin's `tracing` (and `log`) records go to the host's log.
//!
//! Every library has its own copy of tracing's dispatcher. Without the bridge its records would be lost.

use std::{
    cell::RefCell,
    collections::HashMap,
    fmt::Write as _,
    sync::{
        Arc, LazyLock, OnceLock, PoisonError, RwLock, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use serde_json::{Map, Value};
use tracing::{
    Event, Id, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span::{Attributes, Record},
};
use tracing_core::span::Current;
use tracing_log::{AsLog as _, LogTracer};

use super::{PLUGINS, Plugin};
use crate::abi::Task;

/// Span that marks everything inside it as work of one run.
pub(crate) fn task_span(run: u64) -> tracing::Span {
    tracing::error_span!("runner_task", run)
}

/// The runs that have not ended, by number. A task's handle is unique in its instance only.
static RUNS: LazyLock<RwLock<Runs>> = LazyLock::new(RwLock::default);

type Runs = HashMap<u64, (Weak<Plugin>, Task)>;

/// Gives a run its number.
pub(super) fn remember(plugin: &Arc<Plugin>, task: Task) -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let run = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    RUNS.write().unwrap_or_else(PoisonError::into_inner).insert(run, (Arc::downgrade(plugin), task));
    run
}

/// The run has ended.
pub(super) fn forget(run: u64) {
    RUNS.write().unwrap_or_else(PoisonError::into_inner).remove(&run);
}

fn found(run: u64) -> Option<(Arc<Plugin>, Task)> {
    let runs = RUNS.read().unwrap_or_else(PoisonError::into_inner);
    let (plugin, task) = runs.get(&run)?;
    Some((plugin.upgrade()?, *task))
}

/// The most verbose level that an instance of this library wants.
static LEVEL: AtomicU32 = AtomicU32::new(0);

fn filter() -> LevelFilter {
    match LEVEL.load(Ordering::Relaxed) {
        0 => LevelFilter::OFF,
        1 => LevelFilter::ERROR,
        2 => LevelFilter::WARN,
        3 => LevelFilter::INFO,
        4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

/// Installs the bridge unless it is installed, or the plugin's author has installed a subscriber.
pub(super) fn install(level: u32) {
    LEVEL.fetch_max(level, Ordering::Relaxed);
    if tracing::subscriber::set_global_default(Bridge).is_ok() {
        // Fails if the author has installed a logger of the `log` crate. That logger then gets its records.
        let _ = LogTracer::builder().with_max_level(filter().as_log()).init();
    }
}

/// Changes the level. Call sites ask again whether they are enabled.
pub(super) fn set_level(level: u32) {
    if LEVEL.swap(level, Ordering::Relaxed) != level {
        tracing_core::callsite::rebuild_interest_cache();
        tracing_log::log::set_max_level(filter().as_log());
    }
}

/// The bridge needs only the run of a span. Therefore the id of a span *is* its run. A registry of spans would
/// add a tenth to each plugin's memory.
struct Bridge;

thread_local! {
    /// The spans that this thread is in, the innermost last.
    static ENTERED: RefCell<Vec<Id>> = const { RefCell::new(Vec::new()) };
}

/// What [`Span::current`](tracing::Span::current) returns for a run's span.
static RUN: OnceLock<&'static Metadata<'static>> = OnceLock::new();

/// The id of a span outside all runs. A number of a run is never this one.
const NO_RUN: u64 = u64::MAX;

fn id_of(run: Option<u64>) -> Id {
    Id::from_u64(run.unwrap_or(NO_RUN))
}

fn run_of(id: &Id) -> Option<u64> {
    Some(id.into_u64()).filter(|id| *id != NO_RUN)
}

/// The innermost span of this thread. None in a thread that is ending.
fn innermost() -> Option<Id> {
    ENTERED.try_with(|entered| entered.borrow().last().cloned()).ok().flatten()
}

impl Subscriber for Bridge {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= filter()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(filter())
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let metadata = attributes.metadata();
        if metadata.target() == module_path!() {
            let mut marked = Marked(None);
            attributes.record(&mut marked);
            RUN.get_or_init(|| metadata);
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
        match (innermost(), RUN.get()) {
            (Some(id), Some(metadata)) if run_of(&id).is_some() => Current::new(id, metadata),
            _ => Current::none(),
        }
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let around = if event.is_contextual() { innermost() } else { event.parent().cloned() };
        let of_run = around.as_ref().and_then(run_of).and_then(found);
        // A line outside all runs goes to the first instance.
        let first = || Some((PLUGINS.read().unwrap_or_else(PoisonError::into_inner).first().cloned()?, Task(0)));
        let Some((plugin, task)) = of_run.or_else(first) else { return };
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
        let json = if fields.values.is_empty() { String::new() } else { Value::Object(fields.values).to_string() };
        let target = logged.as_ref().and_then(Value::as_str).unwrap_or(event.metadata().target());
        plugin.host.log(task, level, target, &fields.message, &json);
    }
}

/// Reads the run from its span.
struct Marked(Option<u64>);

impl Visit for Marked {
    fn record_u64(&mut self, _field: &Field, run: u64) {
        self.0 = Some(run);
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
