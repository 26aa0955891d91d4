//! A log line as JSON, written directly into the line's buffer.
//!
//! A line is one flat object. It begins with `timestamp` (UTC, microseconds), `level`, `message` and the event's own
//! fields. The fields of the enclosing spans follow, the innermost first. Then come the fields of a plugin, and
//! `target` is last. A name is written once per line. The event's own field has priority over those of spans. The
//! formatter of tracing-subscriber uses maps and parses every span again for each line.

use std::{
    cell::RefCell,
    fmt::{self, Write},
};

use jiff::Timestamp;
use serde_json::{Map, Value};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, format::Writer},
    registry::LookupSpan,
};

/// The field for the fields of a plugin: a JSON object, whose members become fields of the line.
pub(super) const PLUGIN_FIELDS: &str = "plugin_fields";

/// Names that the node writes in every line.
const NODE_FIELDS: [&str; 4] = ["timestamp", "level", "message", "target"];

/// Lines as JSON.
pub(super) struct JsonLines;

/// A span's fields as JSON members, each with a leading comma.
pub(super) struct JsonMembers;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let about = event.metadata();
        let mut line = String::with_capacity(512);
        line.push_str("{\"timestamp\":\"");
        push_now(&mut line);
        line.push_str("\",\"level\":\"");
        line.push_str(about.level().as_str());
        line.push('"');
        let mut members = Members { line: &mut line, plugin_fields: None, target: None };
        event.record(&mut members);
        let (plugin_fields, target) = (members.plugin_fields, members.target);
        for (at, span) in ctx.event_scope().into_iter().flatten().enumerate() {
            let inner = || ctx.event_scope().into_iter().flatten().take(at).map(|span| span.metadata());
            let taken = |name: &str| has(about, name) || inner().any(|inner| has(inner, name));
            let extensions = span.extensions();
            let Some(written) = extensions.get::<FormattedFields<N>>() else { continue };
            if span.metadata().fields().iter().any(|field| taken(field.name())) {
                let all = format!("{{{}}}", written.fields.trim_start_matches(','));
                push_members(&mut line, &all, taken, |_| None);
            } else {
                line.push_str(&written.fields);
            }
        }
        if let Some(fields) = plugin_fields {
            let spans = || ctx.event_scope().into_iter().flatten().map(|span| span.metadata());
            let taken =
                |name: &str| NODE_FIELDS.contains(&name) || has(about, name) || spans().any(|span| has(span, name));
            // A plugin field with a name of the node gets the prefix `plugin.`.
            if !push_members(&mut line, &fields, taken, |name| Some(format!("plugin.{name}"))) {
                push_key(&mut line, PLUGIN_FIELDS);
                push_text(&mut line, &fields);
            }
        }
        push_key(&mut line, "target");
        push_text(&mut line, target.as_deref().unwrap_or(about.target()));
        line.push_str("}\n");
        writer.write_str(&line)
    }
}

impl<'a> FormatFields<'a> for JsonMembers {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'a>, fields: R) -> fmt::Result {
        let mut line = String::with_capacity(512);
        fields.record(&mut Members { line: &mut line, plugin_fields: None, target: None });
        writer.write_str(&line)
    }
}

fn has(about: &Metadata<'_>, name: &str) -> bool {
    about.fields().iter().any(|field| field.name() == name)
}

/// Writes the members of a JSON object. A taken name is replaced by `instead`, or left out. Returns `false` and
/// writes nothing if `object` is not a JSON object.
fn push_members(
    line: &mut String,
    object: &str,
    taken: impl Fn(&str) -> bool,
    instead: impl Fn(&str) -> Option<String>,
) -> bool {
    let Ok(members) = serde_json::from_str::<Map<String, Value>>(object) else { return false };
    for (name, value) in members {
        let other = if taken(&name) { instead(&name) } else { None };
        if taken(&name) && other.is_none() {
            continue;
        }
        push_key(line, other.as_deref().unwrap_or(&name));
        let _ = write!(line, "{value}"); // a write to a String cannot fail
    }
    true
}

/// Writes the fields of an event or span in their order.
struct Members<'a> {
    line: &'a mut String,
    plugin_fields: Option<String>,
    /// The target of a record of the `log` crate.
    target: Option<String>,
}

impl Members<'_> {
    /// Begins a member. `false`: the field is not written.
    fn begin(&mut self, field: &Field) -> bool {
        let name = field.name();
        if name.starts_with("log.") {
            return false;
        }
        push_key(self.line, name.strip_prefix("r#").unwrap_or(name));
        true
    }

    fn plain(&mut self, field: &Field, value: impl fmt::Display) {
        if self.begin(field) {
            let _ = write!(self.line, "{value}"); // a write to a String cannot fail
        }
    }
}

impl Visit for Members<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            PLUGIN_FIELDS => self.plugin_fields = Some(value.to_owned()),
            "log.target" => self.target = Some(value.to_owned()),
            _ if self.begin(field) => push_text(self.line, value),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.begin(field) {
            self.line.push('"');
            // If a `Debug` fails, the text so far stays.
            let _ = write!(Escaped(self.line), "{value:?}");
            self.line.push('"');
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(field, value);
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.plain(field, value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.plain(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN and no infinity. They become null.
        self.plain(field, Value::from(value));
    }
}

fn push_key(line: &mut String, name: &str) {
    line.push(',');
    push_text(line, name);
    line.push(':');
}

fn push_text(line: &mut String, text: &str) {
    line.push('"');
    let _ = Escaped(line).write_str(text); // a write to a String cannot fail
    line.push('"');
}

/// Escapes written text for a JSON string.
struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut clean = 0;
        for (at, byte) in text.bytes().enumerate() {
            if byte >= b' ' && byte != b'"' && byte != b'\\' {
                continue;
            }
            self.0.push_str(&text[clean..at]);
            clean = at + 1;
            match byte {
                b'"' => self.0.push_str("\\\""),
                b'\\' => self.0.push_str("\\\\"),
                b'\n' => self.0.push_str("\\n"),
                b'\r' => self.0.push_str("\\r"),
                b'\t' => self.0.push_str("\\t"),
                _ => write!(self.0, "\\u{byte:04x}")?,
            }
        }
        self.0.push_str(&text[clean..]);
        Ok(())
    }
}

/// The time as RFC 3339 with microseconds. The text of a second is formatted once and reused.
fn push_now(line: &mut String) {
    thread_local! {
        static SECOND: RefCell<(i64, String)> = const { RefCell::new((i64::MIN, String::new())) };
    }
    let now = Timestamp::now();
    SECOND.with_borrow_mut(|(second, text)| {
        if *second != now.as_second() {
            text.clear();
            let _ = write!(text, "{}", now.strftime("%Y-%m-%dT%H:%M:%S")); // a write to a String cannot fail
            *second = now.as_second();
        }
        line.push_str(text);
    });
    let _ = write!(line, ".{:06}Z", now.subsec_nanosecond() / 1000);
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no code panics while it holds this").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Checks the lines that `log` writes, without time and target.
    #[track_caller]
    fn check(log: impl FnOnce(), expected: &[&str]) {
        let written = Written::default();
        let writer = written.clone();
        let lines = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        let lines = lines.event_format(JsonLines).fmt_fields(JsonMembers);
        let captured = crate::model::test_log::capture(tracing_subscriber::registry().with(lines));
        log();
        drop(captured);
        let text =
            String::from_utf8(written.0.lock().expect("no code panics while it holds this").clone()).expect("UTF-8");
        let lines = text.lines().map(|line| {
            let value: Value = serde_json::from_str(line).unwrap_or_else(|err| panic!("{err}: {line}"));
            let time = value["timestamp"].as_str().expect("a time");
            assert!(time.len() == 27 && time.parse::<Timestamp>().is_ok(), "{time}");
            let from = line.find(",\"level\"").expect("a level follows the time") + 1;
            let to = line.rfind(",\"target\"").expect("a target ends the line");
            line[from..to].to_owned()
        });
        assert_eq!(lines.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn line_has_event_fields_then_span_fields() {
        check(
            || {
                tracing::info!(n = 7, on = true, share = 0.5, nan = f64::NAN, text = "a\"b\\\n\u{1}é", "said {}", 1);
                let _outer = tracing::info_span!("task", task_id = "t", job_id = 5, late = tracing::field::Empty);
                _outer.record("late", "x");
                let _outer = _outer.entered();
                let _inner = tracing::info_span!("inner", job_id = %"own").entered();
                tracing::warn!(task_id = "mine", error = ?Some("e"), "in spans");
                tracing::info!("again");
            },
            &[
                r#""level":"INFO","message":"said 1","n":7,"on":true,"share":0.5,"nan":null,"text":"a\"b\\\n\u0001é""#,
                r#""level":"WARN","message":"in spans","task_id":"mine","error":"Some(\"e\")","job_id":"own","late":"x""#,
                r#""level":"INFO","message":"again","job_id":"own","late":"x","task_id":"t""#,
            ],
        );
    }

    #[test]
    fn plugin_fields_do_not_replace_node_fields() {
        let line = |fields: &'static str| {
            let _task = tracing::info_span!("task", task_id = "t").entered();
            tracing::info!(plugin = "p", plugin_fields = fields, "x");
        };
        let start = r#""level":"INFO","message":"x","plugin":"p","task_id":"t""#;
        for (fields, expected) in [
            (r#"{"n":1,"deep":{"a":[null]}}"#, r#","deep":{"a":[null]},"n":1"#),
            ("{\"n\":\n1}", r#","n":1"#),
            (r#"{"task_id":"forged","level":9}"#, r#","plugin.level":9,"plugin.task_id":"forged""#),
            ("{}", ""),
            ("rub\"bish", r#","plugin_fields":"rub\"bish""#),
            ("[1]", r#","plugin_fields":"[1]""#),
        ] {
            check(|| line(fields), &[&format!("{start}{expected}")]);
        }
    }
}
