//! A node without work.

use std::time::{Duration, Instant};

use super::Sizes;
use crate::{
    build::Built,
    calls::Author,
    procs::{DevServer, Node},
    report::{Bound, Cell, Report, Series},
};

const PLUGINS: usize = 10;
const PERCENT: Bound = Bound { wanted: 0.1, quick: None };
const RESIDENT_MIB: Bound = Bound { wanted: 20.0, quick: Some(40.0) };

pub(super) fn measure(built: &Built, sizes: &Sizes, report: &mut Report) -> anyhow::Result<()> {
    eprintln!("idle node, {:?}", sizes.idle);
    let dev_server = DevServer::start(built)?;
    let author = Author::new(&dev_server)?;
    let (folder, listing) = built.noops(PLUGINS)?;
    let job = author.create("/examples/noop/v1", &[], 1)?;
    let node = Node::start(built, Some(&dev_server), &[&folder], Some(&listing), &[])?;
    author.wait(&job, Duration::from_millis(50), Duration::from_secs(30))?;
    let (from, _) = author.polls(0)?;
    let (began, before) = (Instant::now(), node.process.cpu_of_threads()?);
    // The node is measured while this thread sleeps.
    std::thread::sleep(sizes.idle);
    let (took, used) = (began.elapsed(), node.process.cpu_of_threads()? - before);
    let (_, polls) = author.polls(from)?;
    let one = |value: f64| {
        let mut series = Series::default();
        series.add(value);
        series
    };
    let table = report.table(
        &format!("A node without work for {} s, {PLUGINS} plugins, default settings", sizes.idle.as_secs()),
        &["processor, %", "resident memory, MiB", "polls"],
    );
    let percent = one(100.0 * used.as_secs_f64() / took.as_secs_f64());
    let resident = one(node.process.memory("VmRSS")? as f64 / 1024.0 / 1024.0);
    report.at_most("processor of an idle node, %", &percent, PERCENT);
    report.at_most("resident memory of an idle node, MiB", &resident, RESIDENT_MIB);
    report.row(table, vec![Cell::series(&percent, 3), Cell::series(&resident, 1), Cell::text(polls)]);
    Ok(())
}
