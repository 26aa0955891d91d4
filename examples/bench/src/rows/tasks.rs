//! No-op tasks. Node and bare client alternate on one dev server.

use std::time::Duration;

use anyhow::Context;

use super::{SLOTS, Sizes};
use crate::{
    build::Built,
    calls::Author,
    procs::{Bare, DevServer, Node, Process},
    report::{Bound, Cell, Report, Series},
};

/// The capability of the node. The bare client registers for another one, so that neither gets the other's tasks.
const NOOP: &str = "/examples/noop/v1";
const BARE: &str = "/bench/bare/v1";
/// The ratio of the node's rate to the bare client's.
pub(super) const RATE: Bound = Bound { wanted: 0.5, quick: None };
/// The same with eight slots, where a short run is most reliable.
const RATE_AT_8: Bound = Bound { quick: Some(0.15), ..RATE };
/// The ratio of the node's processor time to the bare client's.
pub(super) const COST: Bound = Bound { wanted: 2.0, quick: None };
/// Maximum number of tasks of one job.
const TASKS_MAX: usize = 20_000;
/// Time limit of a job on a slow machine.
const LIMIT: Duration = Duration::from_secs(120);

pub(super) fn measure(built: &Built, sizes: &Sizes, report: &mut Report) -> anyhow::Result<()> {
    let table = report.table(
        "No-op tasks, node over bare client",
        &[
            "slots",
            "ratio of rates",
            "ratio of processor time",
            "node, tasks/s",
            "bare, tasks/s",
            "node, µs/task",
            "bare, µs/task",
            "dev_server's processor share: node, bare",
        ],
    );
    for slots in SLOTS {
        eprintln!("no-op tasks, {slots} slots");
        let seen = at(slots, built, sizes)?;
        let (rate, cost) = (seen.rates.0.over(&seen.rates.1), seen.costs.0.over(&seen.costs.1));
        let bound = if slots == 8 { RATE_AT_8 } else { RATE };
        report.at_least(&format!("ratio of rates at {slots} slots"), &rate, bound);
        report.at_most(&format!("ratio of processor time at {slots} slots"), &cost, COST);
        report.row(
            table,
            vec![
                Cell::text(slots),
                Cell::series(&rate, 2),
                Cell::series(&cost, 2),
                Cell::series(&seen.rates.0, 0),
                Cell::series(&seen.rates.1, 0),
                Cell::series(&seen.costs.0, 0),
                Cell::series(&seen.costs.1, 0),
                Cell::text(format!("{:.0} %, {:.0} %", seen.shares.0.median(), seen.shares.1.median())),
            ],
        );
    }
    Ok(())
}

/// The node's values first, the bare client's second.
#[derive(Default)]
struct Seen {
    /// Tasks per second.
    rates: (Series, Series),
    /// Microseconds of processor time per task.
    costs: (Series, Series),
    /// The dev server's share of the processor time of both, in percent.
    shares: (Series, Series),
}

fn at(slots: usize, built: &Built, sizes: &Sizes) -> anyhow::Result<Seen> {
    let dev_server = DevServer::start(built)?;
    let author = Author::new(&dev_server)?;
    let (folder, listing) = built.noops(1)?;
    let count = slots.to_string();
    // The pause of a node without work is long enough to cost little and short enough not to delay a round.
    let settings = [("MAX_CONCURRENCY", &*count), ("POLL_BACKOFF_MS_MIN", "20"), ("POLL_BACKOFF_MS_MAX", "200")];
    let node = Node::start(built, Some(&dev_server), &[&folder], Some(&listing), &settings)?;
    let mut bare = Bare::start(built, &["tasks", dev_server.base.as_str(), BARE, &count], &[])?;

    let turn = |tasks,
                order: &mut dyn FnMut(usize) -> anyhow::Result<()>,
                process: &dyn Fn() -> anyhow::Result<Duration>,
                capability| { run(&author, &dev_server.process, capability, tasks, order, process) };
    let mut seen = Seen::default();
    let mut tasks = (slots * 20 + 100, slots * 20 + 100);
    // The first round warms up. It also determines the number of tasks for a round of the configured length.
    for round in 0..=sizes.repetitions {
        let by_node = turn(tasks.0, &mut |_| Ok(()), &|| node.process.cpu(), NOOP)
            .with_context(|| format!("the node's log ends with:\n{}", node.log_tail()))?;
        let cpu = std::cell::RefCell::new(&mut bare);
        let by_bare = turn(
            tasks.1,
            &mut |count| cpu.borrow_mut().order(&count.to_string()).map(|_| ()),
            &|| cpu.borrow().process.cpu(),
            BARE,
        )?;
        let wanted = |rate: f64| ((rate * sizes.tasks.as_secs_f64()) as usize).clamp(200, TASKS_MAX);
        tasks = (wanted(by_node.rate), wanted(by_bare.rate));
        if round > 0 {
            for (series, value) in [
                (&mut seen.rates.0, by_node.rate),
                (&mut seen.rates.1, by_bare.rate),
                (&mut seen.costs.0, by_node.cost),
                (&mut seen.costs.1, by_bare.cost),
                (&mut seen.shares.0, by_node.share),
                (&mut seen.shares.1, by_bare.share),
            ] {
                series.add(value);
            }
        }
    }
    Ok(seen)
}

/// One job.
struct Turn {
    rate: f64,
    cost: f64,
    share: f64,
}

fn run(
    author: &Author,
    dev_server: &Process,
    capability: &str,
    tasks: usize,
    order: &mut dyn FnMut(usize) -> anyhow::Result<()>,
    cpu: &dyn Fn() -> anyhow::Result<Duration>,
) -> anyhow::Result<Turn> {
    let before = (cpu()?, dev_server.cpu()?);
    let job = author.create(capability, &[], tasks)?;
    order(tasks)?;
    author.wait(&job, Duration::from_millis(100), LIMIT)?;
    let after = (cpu()?, dev_server.cpu()?);
    let took = author.times(&job)?.took;
    let (own, server_time) = (after.0 - before.0, after.1 - before.1);
    Ok(Turn {
        rate: tasks as f64 / took.as_secs_f64(),
        cost: own.as_secs_f64() * 1e6 / tasks as f64,
        share: 100.0 * server_time.as_secs_f64() / (own + server_time).as_secs_f64(),
    })
}
