//! The table that the matrix prints at its end.

use std::{collections::BTreeMap, fmt::Write as _, io::Write as _, time::Duration};

use crate::{
    cell::Report,
    plan::{ENDPOINTS, KINDS, Kind, Length, RUN_ENDPOINTS, RUN_KINDS, Skipped},
};

/// Prints the seconds of each cell, and the reasons for the skipped combinations.
pub(crate) fn print(reports: &[Report], skipped: &[Skipped], took: Duration) {
    let mut reports: Vec<&Report> = reports.iter().collect();
    reports.sort_by_key(|report| report.cell.length == Length::Long);
    let mut cells: BTreeMap<(&str, &str), String> = BTreeMap::new();
    for (endpoint, kind, _) in skipped {
        cells.insert((endpoint, kind), "-".to_owned());
    }
    for report in &reports {
        let text = match &report.failure {
            None => format!("{:.1}", report.took.as_secs_f64()),
            Some(_) => "FAIL".to_owned(),
        };
        let cell = cells.entry((report.cell.endpoint, report.cell.kind.0)).or_default();
        let bar = if cell.is_empty() { "" } else { "|" };
        let _ = write!(cell, "{bar}{text}");
    }
    let mut text = "\nseconds per cell, and after | those of the long fault; -: skipped\n".to_owned();
    let names = |kinds: &[Kind]| kinds.iter().map(|kind| kind.0).collect::<Vec<_>>();
    let columns = [names(&KINDS), vec!["ahead", "behind"]].concat();
    rows(&mut text, &ENDPOINTS, &columns, &cells);
    text.push_str("\n\n");
    rows(&mut text, &RUN_ENDPOINTS.map(|(endpoint, _)| endpoint), &[names(&KINDS), names(&RUN_KINDS)].concat(), &cells);
    let long = reports.iter().filter(|report| report.cell.length == Length::Long).count();
    let struck: usize = reports.iter().map(|report| report.struck).sum();
    let most = reports.iter().map(|report| report.busiest).max().unwrap_or_default();
    let _ = writeln!(
        text,
        "\n{} cells ({long} long) in {:.0} s, {struck} faults, at most {most} requests of one kind in a second",
        reports.len(),
        took.as_secs_f64()
    );
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (endpoint, kind, reason) in skipped {
        reasons.entry(reason).or_default().push(format!("{kind} of {endpoint}"));
    }
    for (reason, combinations) in reasons {
        let _ = writeln!(text, "skipped, {reason}: {}", combinations.join(", "));
    }
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn rows(text: &mut String, endpoints: &[&str], columns: &[&str], cells: &BTreeMap<(&str, &str), String>) {
    let columns: Vec<&str> = columns
        .iter()
        .copied()
        .filter(|column| endpoints.iter().any(|endpoint| cells.contains_key(&(*endpoint, *column))))
        .collect();
    let _ = write!(text, "{:<16}", "");
    for column in &columns {
        let _ = write!(text, "{column:>13}");
    }
    for endpoint in endpoints {
        let _ = write!(text, "\n{endpoint:<16}");
        for column in &columns {
            let _ = write!(text, "{:>13}", cells.get(&(*endpoint, *column)).map_or("", String::as_str));
        }
    }
}
