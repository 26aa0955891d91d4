//! The printed report: tables, the targets, and the machine.

use serde_json::{Value, json};

/// Repeated measurements of one thing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    pub(crate) fn median(&self) -> f64 {
        let sorted = self.sorted();
        match (sorted.get(sorted.len() / 2), sorted.len() % 2) {
            (None, _) => f64::NAN,
            (Some(middle), 1) => *middle,
            (Some(upper), _) => (upper + sorted[sorted.len() / 2 - 1]) / 2.0,
        }
    }

    /// Ratios of the measurements that were taken in the same repetition.
    pub(crate) fn over(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(own, others)| own / others).collect())
    }

    fn text(&self, digits: usize) -> String {
        let sorted = self.sorted();
        let median = format!("{:.digits$}", self.median());
        match (sorted.first(), sorted.last()) {
            (Some(low), Some(high)) if sorted.len() > 1 => format!("{median} ({low:.digits$}–{high:.digits$})"),
            _ => median,
        }
    }
}

/// One field of a table.
pub(crate) struct Cell {
    text: String,
    value: Value,
}

impl Cell {
    pub(crate) fn text(text: impl ToString) -> Self {
        let text = text.to_string();
        Self { value: json!(text), text }
    }

    /// Median and spread.
    pub(crate) fn series(series: &Series, digits: usize) -> Self {
        Self { text: series.text(digits), value: json!({ "median": series.median(), "all": series.0 }) }
    }
}

struct Table {
    title: String,
    columns: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

/// The targets for a figure.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    /// The project's target, which a full run must reach.
    pub(crate) wanted: f64,
    /// The target of a quick run, if any. A quick run is short, and other processes may be active. So this target
    /// detects only a clear regression.
    pub(crate) quick: Option<f64>,
}

struct Target {
    what: String,
    seen: f64,
    bound: Bound,
    /// Whether a higher value is better.
    upwards: bool,
}

/// All results.
pub(crate) struct Report {
    quick: bool,
    tables: Vec<Table>,
    targets: Vec<Target>,
}

/// A table of a [`Report`].
#[derive(Clone, Copy)]
pub(crate) struct TableIndex(usize);

impl Report {
    pub(crate) fn new(quick: bool) -> Self {
        Self { quick, tables: Vec::new(), targets: Vec::new() }
    }

    pub(crate) fn table(&mut self, title: &str, columns: &[&'static str]) -> TableIndex {
        self.tables.push(Table { title: title.to_owned(), columns: columns.to_vec(), rows: Vec::new() });
        TableIndex(self.tables.len() - 1)
    }

    pub(crate) fn row(&mut self, table: TableIndex, row: Vec<Cell>) {
        let table = &mut self.tables[table.0];
        debug_assert_eq!(table.columns.len(), row.len());
        table.rows.push(row);
    }

    /// A figure with a lower bound.
    pub(crate) fn at_least(&mut self, what: &str, seen: &Series, bound: Bound) {
        self.targets.push(Target { what: what.to_owned(), seen: seen.median(), bound, upwards: true });
    }

    /// A figure with an upper bound.
    pub(crate) fn at_most(&mut self, what: &str, seen: &Series, bound: Bound) {
        self.targets.push(Target { what: what.to_owned(), seen: seen.median(), bound, upwards: false });
    }

    /// Whether every target was reached. In a quick run: whether no figure has a clear regression.
    pub(crate) fn reached(&self) -> bool {
        self.targets.iter().all(|target| {
            let bound = if self.quick { target.bound.quick } else { Some(target.bound.wanted) };
            bound.is_none_or(|bound| target.within(bound))
        })
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("`{}` on {}, {}\n", command_line(), machine(), today());
        for table in &self.tables {
            text.push_str(&format!("\n{}\n\n", table.title));
            text.push_str(&line(table.columns.iter().copied()));
            text.push_str(&line(table.columns.iter().map(|_| "---")));
            for row in &table.rows {
                text.push_str(&line(row.iter().map(|cell| &*cell.text)));
            }
        }
        if !self.targets.is_empty() {
            text.push_str("\nTargets\n\n| figure | wanted | seen | |\n| --- | --- | --- | --- |\n");
        }
        for target in &self.targets {
            let (bound, reached) = (
                if target.upwards { "≥" } else { "≤" },
                if target.within(target.bound.wanted) { "reached" } else { "missed" },
            );
            text.push_str(&format!(
                "| {} | {bound} {} | {:.2} | {reached} |\n",
                target.what, target.bound.wanted, target.seen
            ));
        }
        text.push_str("\nMedian (lowest–highest) of the repetitions; a ratio is taken within each repetition.\n");
        text
    }

    pub(crate) fn json(&self) -> Value {
        let tables: Vec<Value> = self
            .tables
            .iter()
            .map(|table| {
                let row = |row: &Vec<Cell>| -> Value {
                    let fields = table.columns.iter().zip(row);
                    Value::Object(fields.map(|(name, cell)| ((*name).to_owned(), cell.value.clone())).collect())
                };
                json!({ "title": table.title, "rows": table.rows.iter().map(row).collect::<Vec<_>>() })
            })
            .collect();
        let targets: Vec<Value> = self
            .targets
            .iter()
            .map(|target| {
                let wanted = target.bound.wanted;
                json!({ "figure": target.what, "wanted": wanted, "seen": target.seen, "reached": target.within(wanted) })
            })
            .collect();
        json!({
            "command": command_line(), "machine": machine(), "date": today(), "quick": self.quick, "tables": tables,
            "targets": targets, "passed": self.reached(),
        })
    }
}

impl Target {
    fn within(&self, bound: f64) -> bool {
        // With these comparisons, NaN misses the target.
        if self.upwards { self.seen >= bound } else { self.seen <= bound }
    }
}

fn line<'a>(cells: impl Iterator<Item = &'a str>) -> String {
    format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
}

fn command_line() -> String {
    let arguments = std::env::args().skip(1).map(|argument| format!(" {argument}"));
    format!("cargo bench-node{}", arguments.collect::<String>())
}

/// Processor model and the number of processors.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{count} × {}", model.unwrap_or("an unknown processor").trim())
}

fn today() -> String {
    jiff::Timestamp::now().to_string().chars().take(10).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        Series(values.to_vec())
    }

    #[test]
    fn series_gives_median_range_and_pairwise_ratios() {
        assert_eq!(series(&[3.0, 1.0, 2.0]).text(1), "2.0 (1.0–3.0)");
        assert_eq!(series(&[4.0, 1.0]).median(), 2.5);
        assert_eq!(series(&[1.0, 4.0]).over(&series(&[2.0, 2.0])).0, [0.5, 2.0]);
        assert_eq!(series(&[7.0]).text(0), "7");
    }

    /// Whether a run passes with this figure, which must be at least, or at most, `wanted`.
    fn passes(quick_run: bool, upwards: bool, seen: &[f64], wanted: f64, quick: Option<f64>) -> bool {
        let (mut report, bound) = (Report::new(quick_run), Bound { wanted, quick });
        if upwards {
            report.at_least("rate", &series(seen), bound);
        } else {
            report.at_most("memory", &series(seen), bound);
        }
        report.reached()
    }

    #[test]
    fn quick_run_has_looser_limits_than_full_run() {
        for (quick_run, seen, expected) in
            [(false, 0.5, true), (false, 0.49, false), (true, 0.16, true), (true, 0.14, false)]
        {
            assert_eq!(passes(quick_run, true, &[seen], 0.5, Some(0.15)), expected, "{quick_run} {seen}");
        }
        for (quick_run, seen, expected) in
            [(false, 48.0, true), (false, 49.0, false), (true, 95.0, true), (true, 97.0, false)]
        {
            assert_eq!(passes(quick_run, false, &[seen], 48.0, Some(96.0)), expected, "{quick_run} {seen}");
        }
        assert!(passes(true, true, &[0.01], 0.5, None), "a quick run detects only a clear regression");
        assert!(!passes(false, true, &[0.01], 0.5, None));
        assert!(!passes(true, false, &[], 48.0, Some(96.0)), "no number");
    }
}
