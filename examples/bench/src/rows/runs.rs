//! No-op runs of a Node Runtime control plane. Node and bare client alternate on one control plane, which has its own
//! process and stores nothing.

use std::time::Duration;

use anyhow::Context;

use super::{
    SLOTS, Sizes,
    tasks::{COST, RATE},
};
use crate::{
    build::Built,
    procs::{Bare, Node, Process},
    report::{Bound, Cell, Report, Series},
};

const NODE: &str = "node";
const BARE: &str = "bare";
/// The ratio of rates with eight slots, where a short run is most reliable.
const RATE_AT_8: Bound = Bound { quick: Some(0.05), ..RATE };
/// The time from a lease to its completion with one slot, in milliseconds.
const LEASE_TO_COMPLETION_MS: Bound = Bound { wanted: 1.0, quick: Some(10.0) };
/// Maximum number of runs of one round.
const RUNS_MAX: usize = 40_000;

pub(super) fn measure(built: &Built, sizes: &Sizes, report: &mut Report) -> anyhow::Result<()> {
    let table = report.table(
        "No-op runs of a Node Runtime control plane, node over bare gRPC client",
        &[
            "slots",
            "ratio of rates",
            "ratio of processor time",
            "node, runs/s",
            "bare, runs/s",
            "node, µs/run",
            "bare, µs/run",
            "lease to completion, ms: node",
            "bare",
            "control plane's processor share: node, bare",
        ],
    );
    for slots in SLOTS {
        eprintln!("no-op runs over gRPC, {slots} slots");
        let (node, bare) = at(slots, built, sizes)?;
        let (rate, cost) = (node.rate.over(&bare.rate), node.cost.over(&bare.cost));
        let bound = if slots == 8 { RATE_AT_8 } else { RATE };
        report.at_least(&format!("ratio of rates over gRPC at {slots} slots"), &rate, bound);
        report.at_most(&format!("ratio of processor time over gRPC at {slots} slots"), &cost, COST);
        if slots == 1 {
            report.at_most("lease to completion over gRPC at 1 slots, ms", &node.median, LEASE_TO_COMPLETION_MS);
        }
        report.row(
            table,
            vec![
                Cell::text(slots),
                Cell::series(&rate, 2),
                Cell::series(&cost, 2),
                Cell::series(&node.rate, 0),
                Cell::series(&bare.rate, 0),
                Cell::series(&node.cost, 0),
                Cell::series(&bare.cost, 0),
                Cell::series(&node.median, 2),
                Cell::series(&bare.median, 2),
                Cell::text(format!("{:.0} %, {:.0} %", node.share.median(), bare.share.median())),
            ],
        );
    }
    Ok(())
}

/// The values of one side.
#[derive(Default)]
struct Seen {
    /// Runs per second.
    rate: Series,
    /// Microseconds of processor time per run.
    cost: Series,
    /// Median time from a lease to its completion, in milliseconds.
    median: Series,
    /// The control plane's share of the processor time of both, in percent.
    share: Series,
}

fn at(slots: usize, built: &Built, sizes: &Sizes) -> anyhow::Result<(Seen, Seen)> {
    let mut plane = Bare::start(built, &["control-plane"], &[])?;
    let url = plane.order("url")?;
    let (folder, listing) = built.noops(1)?;
    let count = slots.to_string();
    let settings = [
        ("MAX_CONCURRENCY", &*count),
        ("NodeRuntime__NodeId", NODE),
        ("NodeRuntime__ControlPlaneUrl", &*url),
        ("NodeRuntime__MaxConcurrentLeases", &*count),
    ];
    let node = Node::start(built, None, &[&folder], Some(&listing), &settings)?;
    let bare = Bare::start(built, &["runs", &url, BARE, &count], &[])?;
    let mut seen = (Seen::default(), Seen::default());
    let mut runs = (slots * 20 + 100, slots * 20 + 100);
    // The first round warms up. It also determines the number of runs for a round of the configured length.
    for round in 0..=sizes.repetitions {
        let by_node = one(&mut plane, NODE, runs.0, &node.process)
            .with_context(|| format!("the node's log ends with:\n{}", node.log_tail()))?;
        let by_bare = one(&mut plane, BARE, runs.1, &bare.process)?;
        let wanted = |rate: f64| ((rate * sizes.tasks.as_secs_f64()) as usize).clamp(200, RUNS_MAX);
        runs = (wanted(by_node.rate), wanted(by_bare.rate));
        if round > 0 {
            seen.0.add(&by_node);
            seen.1.add(&by_bare);
        }
    }
    Ok(seen)
}

impl Seen {
    fn add(&mut self, round: &Round) {
        self.rate.add(round.rate);
        self.cost.add(round.cost);
        self.median.add(round.median);
        self.share.add(round.share);
    }
}

/// The runs of one order.
struct Round {
    rate: f64,
    cost: f64,
    median: f64,
    share: f64,
}

fn one(plane: &mut Bare, client: &str, runs: usize, process: &Process) -> anyhow::Result<Round> {
    let before = (process.cpu()?, plane.process.cpu()?);
    let answer = plane.order(&format!("{client} {runs}"))?;
    let after = (process.cpu()?, plane.process.cpu()?);
    let (took, median) = answer.split_once(' ').context("the control plane's times")?;
    let (took, median) = (Duration::from_nanos(took.parse()?), Duration::from_nanos(median.parse()?));
    let (own, server_time) = (after.0 - before.0, after.1 - before.1);
    Ok(Round {
        rate: runs as f64 / took.as_secs_f64(),
        cost: own.as_secs_f64() * 1e6 / runs as f64,
        median: median.as_secs_f64() * 1e3,
        share: 100.0 * server_time.as_secs_f64() / (own + server_time).as_secs_f64(),
    })
}
