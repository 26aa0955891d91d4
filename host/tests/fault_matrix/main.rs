//! The fault matrix: every call of the wire, broken in every way, and what the node makes of it.
//!
//! A cell is a world of its own, a real node with a real plugin, one task that downloads an input, publishes
//! bytes (twice) and a file in parts, and one fault (`dev --faults`, docs/operations/faults.md). The fault either
//! strikes twice, or lasts for longer than a lease. Whatever it was, in the end: one verdict, accepted once;
//! artifacts whole and not doubled; no upload left open, no file left behind, a node that stops in peace; and
//! never more than a few requests per second. Combinations without sense are listed in [`plan`] with the reason.
//!
//! `FAULT_MATRIX=heartbeat` or `FAULT_MATRIX=part/reset` runs a part of it.

#![allow(missing_docs, reason = "tests are named as statements")]

mod cell;
#[path = "../it/harness/mod.rs"]
#[allow(dead_code, reason = "the harness is shared; the matrix uses a part of it")]
mod harness;
mod plan;
mod table;

use std::{sync::Arc, time::Instant};

use cell::Report;
use tokio::{sync::Semaphore, task::JoinSet};

/// Cells at once. Most of a cell is waiting: for leases to run out, for pauses to end.
const AT_ONCE: usize = 10;

#[test]
fn every_fault_ends_in_one_verdict_and_leaves_nothing_behind() {
    let wanted = std::env::var("FAULT_MATRIX").unwrap_or_default();
    let (plan, senseless) = plan::all();
    let plan: Vec<_> = plan.into_iter().filter(|cell| cell.name().contains(&wanted)).collect();
    let plugin = harness::fixtures::zoo();
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let mut reports: Vec<Report> = runtime.expect("a runtime").block_on(async {
        let slots = Arc::new(Semaphore::new(AT_ONCE));
        let mut cells = JoinSet::new();
        for cell in plan {
            let (slots, plugin) = (Arc::clone(&slots), plugin.clone());
            cells.spawn(async move {
                let _slot = slots.acquire_owned().await.expect("never closed");
                cell::run(cell, plugin).await
            });
        }
        cells.join_all().await
    });
    reports.sort_by_key(|report| report.cell.order());
    table::print(&reports, &senseless, began.elapsed());
    let failed: Vec<String> = reports.iter().filter_map(Report::complaint).collect();
    assert!(failed.is_empty(), "{} of {} cells failed:\n{}", failed.len(), reports.len(), failed.join("\n"));
}
