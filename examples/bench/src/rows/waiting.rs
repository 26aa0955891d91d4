//! A node in which thousands of tasks wait at once.

use std::time::Duration;

use anyhow::Context;

use super::Sizes;
use crate::{
    build::Built,
    calls::Author,
    procs::{DevServer, Node},
    report::{Bound, Cell, Report, Series},
};

const RESIDENT_MIB: Bound = Bound { wanted: 500.0, quick: Some(100.0) };
/// Time limit until all tasks run, on a slow machine.
const LIMIT: Duration = Duration::from_secs(120);

pub(super) fn measure(built: &Built, sizes: &Sizes, report: &mut Report) -> anyhow::Result<()> {
    let tasks = sizes.waiting;
    eprintln!("{tasks} tasks that wait");
    let dev_server = DevServer::start(built)?;
    let author = Author::new(&dev_server)?;
    let (folder, listing) = built.noop("waiting", "sleep_secs = 3600.0")?;
    let count = tasks.to_string();
    // The node does not wait for the tasks when it stops.
    let settings = [("MAX_CONCURRENCY", &*count), ("DRAIN_TIMEOUT", "0")];
    let node = Node::start(built, Some(&dev_server), &[&folder], Some(&listing), &settings)?;
    let before = author.create("/examples/noop/v1", &[], 1)?;
    let running = |job: &str, tasks| {
        author
            .wait_running(job, tasks, LIMIT)
            .with_context(|| format!("the node's log ends with:\n{}", node.log_tail()))
    };
    running(&before, 1)?;
    let mib = |bytes: u64| bytes as f64 / 1024.0 / 1024.0;
    let without = mib(node.process.memory("VmRSS")?);
    let job = author.create("/examples/noop/v1", &[], tasks - 1)?;
    running(&job, tasks - 1)?;
    let mut resident = Series::default();
    resident.add(mib(node.process.memory("VmHWM")?));
    let table = report.table(
        &format!("{tasks} tasks waiting at once in one node"),
        &["peak resident memory, MiB", "with one task, MiB", "more for each task, KiB"],
    );
    report.at_most(&format!("resident memory with {tasks} tasks that wait, MiB"), &resident, RESIDENT_MIB);
    let each = (resident.median() - without) * 1024.0 / (tasks - 1) as f64;
    report.row(
        table,
        vec![Cell::series(&resident, 1), Cell::text(format!("{without:.1}")), Cell::text(format!("{each:.1}"))],
    );
    Ok(())
}
