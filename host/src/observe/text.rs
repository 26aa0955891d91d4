//! The fields of a log line as text for people.
//!
//! Fields of the node are `name=value` on the line. Fields of a plugin have the same form. Its backtrace follows on
//! indented lines. Every log line begins with a timestamp in the first column, so an indented line is never taken for
//! one.

use std::fmt::{self, Debug, Write as _};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{FormatFields, format::Writer},
};

use super::json::PLUGIN_FIELDS;
use crate::model::in_a_line;

/// The plugin field whose value is shown on separate lines.
const BACKTRACE: &str = "backtrace";
/// Most lines of a backtrace. A frame has two.
const BACKTRACE_LINES_MAX: usize = 24;
/// Most characters of one value of a plugin, and of one line of its backtrace.
const VALUE_CHARS_MAX: usize = 1000;
/// Most fields of a plugin on one line.
const FIELDS_MAX: usize = 64;

/// Fields for people.
pub(super) struct TextFields;

impl<'a> FormatFields<'a> for TextFields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'a>, fields: R) -> fmt::Result {
        let mut words = Words::default();
        fields.record(&mut words);
        writer.write_str(&words.finish())
    }
}

#[derive(Default)]
struct Words {
    line: String,
    /// Names of the fields on the line.
    names: Vec<&'static str>,
    plugin_fields: Option<String>,
}

impl Words {
    fn push(&mut self, word: &str) {
        if !self.line.is_empty() {
            self.line.push(' ');
        }
        self.line.push_str(&in_a_line(word));
    }

    fn finish(mut self) -> String {
        let Some(fields) = self.plugin_fields.take() else { return self.line };
        let Ok(fields) = serde_json::from_str::<Map<String, Value>>(&fields) else {
            self.push(&format!("{PLUGIN_FIELDS}={:?}", cut(&fields)));
            return self.line;
        };
        let mut backtrace = None;
        let left_out = fields.len().saturating_sub(FIELDS_MAX);
        for (name, value) in fields.into_iter().take(FIELDS_MAX) {
            match value {
                Value::String(text) if name == BACKTRACE => backtrace = Some(text),
                value => {
                    // A plugin field with a name of the node gets a prefix, as in JSON lines.
                    let prefix = if self.names.contains(&&*name) { "plugin." } else { "" };
                    let value = match &value {
                        Value::String(text) => format!("{:?}", cut(text)),
                        other => cut(&other.to_string()),
                    };
                    self.push(&format!("{prefix}{}={value}", plain_name(&name)));
                }
            }
        }
        if left_out > 0 {
            self.push(&format!("({left_out} more fields)"));
        }
        if let Some(backtrace) = backtrace {
            push_backtrace(&mut self.line, &backtrace);
        }
        self.line
    }
}

impl Visit for Words {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == PLUGIN_FIELDS {
            self.plugin_fields = Some(value.to_owned());
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let name = field.name();
        match name {
            "message" => self.push(&format!("{value:?}")),
            // The source of a record of the `log` crate. Its target is already on the line.
            name if name.starts_with("log.") => return,
            name => self.push(&format!("{name}={value:?}")),
        }
        self.names.push(name);
    }
}

/// Quotes a name that contains other characters than letters, digits, `_`, `.` and `-`.
fn plain_name(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if !name.is_empty() && name.chars().all(is_plain) && name.len() <= VALUE_CHARS_MAX {
        name.to_owned()
    } else {
        format!("{:?}", cut(name))
    }
}

/// At most [`VALUE_CHARS_MAX`] characters of `text`.
fn cut(text: &str) -> String {
    match text.char_indices().nth(VALUE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Writes the frames between the panic machinery and the start of the thread. Each line begins with `    | `.
fn push_backtrace(line: &mut String, backtrace: &str) {
    let is_machinery = |line: &str| {
        ["rust_begin_unwind", "core::panicking::", "std::panicking::", "std::backtrace"].iter().any(|word| {
            // `  12: name`, not the source position on the next line.
            line.trim_start().split_once(": ").is_some_and(|(number, name)| {
                number.bytes().all(|byte| byte.is_ascii_digit()) && name.trim_start_matches('<').starts_with(word)
            })
        })
    };
    let lines: Vec<&str> = backtrace.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let is_source_position = |line: &&&str| line.trim_start().starts_with("at ");
    let begin = lines
        .iter()
        .rposition(|line| is_machinery(line))
        .map_or(0, |at| at + 1 + lines[at + 1..].iter().take_while(is_source_position).count());
    let rest = &lines[begin..];
    let end = rest.iter().position(|line| line.contains("__rust_begin_short_backtrace")).unwrap_or(rest.len());
    let shown = end.min(BACKTRACE_LINES_MAX);
    for frame in &rest[..shown] {
        let _ = write!(line, "\n    | {}", in_a_line(&cut(frame))); // a write to a String cannot fail
    }
    let left_out = lines.len() - shown;
    if left_out > 0 {
        let _ = write!(line, "\n    | … {left_out} more lines; LOG_FORMAT=json shows all of them"); // a write to a String cannot fail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(plugin_fields: &str) -> String {
        Words { plugin_fields: Some(plugin_fields.to_owned()), names: vec!["plugin"], ..Words::default() }.finish()
    }

    #[test]
    fn plugin_fields_become_name_and_value() {
        for (fields, expected) in [
            (r#"{"n":1,"text":"a \"b\"","deep":{"a":[null]}}"#, r#"deep={"a":[null]} n=1 text="a \"b\"""#),
            (r#"{"plugin":"forged"}"#, r#"plugin.plugin="forged""#),
            (r#"{"a b\n":"x\ny"}"#, r#""a b\n"="x\ny""#),
            ("rub\"bish", r#"plugin_fields="rub\"bish""#),
            ("{}", ""),
        ] {
            assert_eq!(shown(fields), expected);
        }
    }

    #[test]
    fn plugin_fields_are_bounded() {
        let many: Map<String, Value> = (0..1000).map(|n| (format!("f{n}"), "x".repeat(5000).into())).collect();
        let line = shown(&Value::Object(many).to_string());
        assert!(line.len() < 70_000, "{}", line.len());
        assert!(line.ends_with(" (936 more fields)"), "{}", &line[line.len() - 100..]);
    }

    #[test]
    fn backtrace_shows_the_plugin_frames_indented() {
        let trace = "   0: std::backtrace_rs::trace\n             at /rustc/x.rs:1:2\n   1: core::panicking::panic_fmt\n             at /rustc/y.rs:3:4\n   2: zoo::ends::panic\n             at ./src/ends.rs:64:5\n   3: std::sys::backtrace::__rust_begin_short_backtrace\n   4: std::rt::lang_start\n";
        let fields =
            Value::Object(Map::from_iter([("backtrace".to_owned(), trace.into()), ("n".to_owned(), 1.into())]));
        let expected = "n=1\n    |    2: zoo::ends::panic\n    |              at ./src/ends.rs:64:5\n    | … 6 more lines; LOG_FORMAT=json shows all of them";
        assert_eq!(shown(&fields.to_string()), expected);
    }

    #[test]
    fn forged_backtrace_lines_are_indented() {
        let lines = "2026-01-01T00:00:00Z ERROR forged\u{1b}[2J\r\n".repeat(1000);
        let fields = Value::Object(Map::from_iter([("backtrace".to_owned(), lines.into())]));
        let shown = shown(&fields.to_string());
        assert_eq!(shown.lines().count(), 1 + BACKTRACE_LINES_MAX + 1);
        assert!(shown.lines().skip(1).all(|line| line.starts_with("    | ")), "{shown}");
        assert!(!shown.contains(['\u{1b}', '\r']), "{shown}");
    }
}
