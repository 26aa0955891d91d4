//! Time from the start of the process to the first lease, with ten plugins and a queued task.

use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;

use super::Sizes;
use crate::{
    build::Built,
    calls::Author,
    procs::{DevServer, Node},
    report::{Bound, Cell, Report, Series},
};

const PLUGINS: usize = 10;
const MS: Bound = Bound { wanted: 100.0, quick: Some(500.0) };
const LIMIT: Duration = Duration::from_secs(30);

pub(super) fn measure(built: &Built, sizes: &Sizes, report: &mut Report) -> anyhow::Result<()> {
    eprintln!("start to first lease");
    let dev_server = DevServer::start(built)?;
    let author = Author::new(&dev_server)?;
    let (folder, listing) = built.noops(PLUGINS)?;
    let (mut whole, mut loading, mut registering, mut leasing) = <(Series, Series, Series, Series)>::default();
    for _ in 0..sizes.repetitions {
        let job = author.create("/examples/noop/v1", &[], 1)?;
        let node = Node::start(built, Some(&dev_server), &[&folder], Some(&listing), &[])?;
        author
            .wait(&job, Duration::from_millis(20), LIMIT)
            .with_context(|| format!("the node's log ends with:\n{}", node.log_tail()))?;
        // The lease is slightly older than the log line that reports the start of its task.
        let started = node.logged("task started")?;
        let (up, registered) = (node.logged("node started")?, node.logged("node registered")?);
        whole.add(ms(node.started, started));
        loading.add(ms(node.started, up));
        registering.add(ms(up, registered));
        leasing.add(ms(registered, started));
    }
    let table = report.table(
        &format!("Start of the process to the first lease, {PLUGINS} plugins, in ms"),
        &["first lease", "of it: until it listens", "registration", "from registration to the first lease"],
    );
    report.at_most("start to first lease, ms", &whole, MS);
    report.row(
        table,
        vec![
            Cell::series(&whole, 1),
            Cell::series(&loading, 1),
            Cell::series(&registering, 1),
            Cell::series(&leasing, 1),
        ],
    );
    Ok(())
}

fn ms(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64() * 1000.0
}
