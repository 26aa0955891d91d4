//! The fault matrix: breaks each call of the wire in each way, and checks the node's reaction.
//!
//! One cell is one test, named `call/fault` or `call/fault/long`. It has its own dev server, a real node with a
//! real plugin, one task and one fault (`dev --faults`, docs/operations/faults.md). The task downloads an input and
//! publishes bytes (twice) and a file in parts. The fault strikes two requests, or lasts longer than a lease.
//!
//! Each cell must end with one accepted report, complete artifacts without duplicates, no open upload, no leftover
//! file, a node that stops with 0, and few requests per second. [`plan`] lists skipped combinations with the reason.
//!
//! The calls of the Node Runtime wire have cells too: one run with inline data. It ends with one accepted report, or
//! stays in the queue while the stream is silent.
//!
//! `cargo test -p runner-host --test fault_matrix heartbeat` runs the cells with `heartbeat` in their names.

mod cell;
#[path = "../it/harness/mod.rs"]
#[allow(dead_code, reason = "the matrix uses only a part of the shared harness")]
mod harness;
mod plan;
mod run_cell;
mod table;

use std::{
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use libtest_mimic::{Arguments, Trial};

/// Concurrent cells, unless `--test-threads` sets another number. A cell mostly waits for leases and pauses to end.
const CONCURRENT_CELLS: usize = 10;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(CONCURRENT_CELLS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = Arc::new(runtime.expect("the system has threads for a runtime"));
    let reports = Arc::new(Mutex::new(Vec::new()));
    let (cells, skipped) = plan::all();
    let trials = cells.into_iter().map(|cell| {
        let (runtime, reports) = (Arc::clone(&runtime), Arc::clone(&reports));
        Trial::test(cell.name(), move || {
            let report = runtime.block_on(cell::run(cell, harness::fixtures::zoo()));
            let failure = report.failure.clone();
            reports.lock().unwrap_or_else(PoisonError::into_inner).push(report);
            failure.map_or(Ok(()), |failure| Err(failure.into()))
        })
    });
    let began = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    let reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
    if !reports.is_empty() {
        table::print(&reports, &skipped, began.elapsed());
    }
    conclusion.exit_code()
}
