//! Progress for people on stderr: a bar on a terminal, lines elsewhere.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::model::in_a_line;

/// The least time between progress lines without a terminal.
const LINE_PAUSE: Duration = Duration::from_secs(1);

/// Smaller transfers get a line only at their end.
const LONG_BYTES: u64 = 16 * 1024 * 1024;

/// See the module documentation.
pub(super) struct Notes {
    lines: Box<dyn Write + Send>,
    bar: Option<ProgressBar>,
    shown: Option<String>,
    shown_at: Option<Instant>,
}

impl Notes {
    pub(super) fn to_stderr() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}");
            ProgressBar::new(100).with_style(style.expect("the template is right"))
        });
        Self { lines: Box::new(std::io::stderr()), bar, shown: None, shown_at: None }
    }

    #[cfg(test)]
    pub(super) fn to(lines: Box<dyn Write + Send>) -> Self {
        Self { lines, bar: None, shown: None, shown_at: None }
    }

    /// Prints one line. A closed terminal is ignored.
    pub(super) fn line(&mut self, text: &str) {
        let text = in_a_line(text);
        let lines = &mut self.lines;
        let mut write = || {
            let _ = writeln!(lines, "{text}");
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Shows transferred bytes. Without a terminal, a short transfer is shown only at its end.
    pub(super) fn bytes(&mut self, what: &str, done: u64, total: u64) {
        if self.bar.is_none() && done != total && total < LONG_BYTES {
            return;
        }
        self.state(done, total, format!("{what}, {} of {}", size(done), size(total)));
    }

    /// Shows the progress of the jobs.
    pub(super) fn show(&mut self, total: usize, jobs: &[Value]) {
        let count = |word: &str| -> u64 { jobs.iter().filter_map(|job| job["tasks_summary"][word].as_u64()).sum() };
        if total == 1 {
            let task = &jobs[0]["tasks"][0];
            let word = task["status"].as_str().unwrap_or("submitted");
            let (share, text) = progress(&task["meta"]["progress"]);
            let share = if word == "completed" { 100 } else { share };
            let text = if text.is_empty() { word.to_owned() } else { format!("{word}, {text}") };
            self.state(share, 100, text);
        } else {
            let ended = count("completed") + count("failed") + count("canceled");
            let (running, failed) = (count("leased") + count("running"), count("failed"));
            let total = total as u64;
            self.state(ended, total, format!("{ended} of {total} tasks ended, {running} running, {failed} failed"));
        }
    }

    /// Removes the bar.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn state(&mut self, done: u64, total: u64, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(in_a_line(&text));
            return;
        }
        let is_new = self.shown.as_ref() != Some(&text);
        let paused = self.shown_at.is_none_or(|at| at.elapsed() >= LINE_PAUSE) || done == total;
        if is_new && paused {
            self.line(&text);
            self.shown = Some(text);
            self.shown_at = Some(Instant::now());
        }
    }
}

/// Runners report progress in different forms. This reads a share of 100 under one of the usual names, and a word
/// about the current step.
fn progress(progress: &Value) -> (u64, String) {
    let share = ["pct", "percent", "progress"].iter().find_map(|name| progress[*name].as_f64());
    let share = share.unwrap_or(0.0).clamp(0.0, 100.0);
    let text = ["message", "stage", "status"].iter().find_map(|name| progress[*name].as_str()).unwrap_or_default();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=100 just above")]
    (share as u64, text.chars().take(60).collect())
}

fn size(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn usual_forms_of_progress_are_understood() {
        let check = |value: Value, share: u64, text: &str| assert_eq!(progress(&value), (share, text.to_owned()));
        check(json!({"pct": 20, "stage": "python", "status": "starting"}), 20, "python");
        check(json!({"progress": 100, "status": "succeeded"}), 100, "succeeded");
        check(json!({"percent": 250.0}), 100, "");
        check(Value::Null, 0, "");
        check(json!({"pct": -1, "message": "a".repeat(61)}), 0, &"a".repeat(60));
    }
}
