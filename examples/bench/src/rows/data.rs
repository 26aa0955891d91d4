//! Downloads one large object to a file and uploads it from a file.

use std::{fs::File, io::Write, path::Path, time::Duration};

use anyhow::Context;

use super::Sizes;
use crate::{
    build::Built,
    calls::Author,
    procs::{Bare, DevServer, Node},
    report::{Bound, Cell, Report, Series},
};

const ECHO_FILE: &str = "/examples/echo-file/v1";
/// Peak resident memory of the node, in MiB.
const PEAK_MIB: Bound = Bound { wanted: 48.0, quick: Some(96.0) };
/// The ratio of the node's time to the bare client's.
const TIME: Bound = Bound { wanted: 1.3, quick: None };
const MIB: f64 = 1024.0 * 1024.0;
const LIMIT: Duration = Duration::from_secs(300);

pub(super) fn measure(built: &Built, sizes: &Sizes, report: &mut Report) -> anyhow::Result<()> {
    let dev_server = DevServer::start(built)?;
    let author = Author::new(&dev_server)?;
    let mib = sizes.object >> 20;
    eprintln!("{mib} MiB in as a file and out as a file");
    let input = author.store("bench-input", sizes.object)?;
    let warmth = built.scratch().join("warmth");
    let file = built.scratch().join("bare-copy");
    let file = file.to_str().context("the target folder's name is no text")?;
    let domain = dev_server.domain.to_string();
    let grant = [("BENCH_GRANT", &*author.grant)];
    let (mut peak, mut bare_peak, mut times, mut bare_times) = <(Series, Series, Series, Series)>::default();
    let mut costs = (Series::default(), Series::default());
    for _ in 0..sizes.objects {
        // A fresh process each time, so that the peak starts at zero.
        let settings = [("MAX_CONCURRENCY", "1"), ("POLL_BACKOFF_MS_MIN", "20"), ("POLL_BACKOFF_MS_MAX", "200")];
        let node = Node::start(built, Some(&dev_server), &[&built.library("echo")], None, &settings)?;
        warm(&warmth, 2 * sizes.object)?;
        let job = author.create(ECHO_FILE, &[&input], 1)?;
        author
            .wait(&job, Duration::from_millis(100), LIMIT)
            .with_context(|| format!("the node's log ends with:\n{}", node.log_tail()))?;
        times.add(author.times(&job)?.took.as_secs_f64());
        costs.0.add(node.process.cpu()?.as_secs_f64());
        peak.add(node.process.memory("VmHWM")? as f64 / MIB);
        drop(node);
        forget(&author, &input, sizes.object)?;

        let mut bare = Bare::start(built, &["data", dev_server.base.as_str(), &domain, file], &grant)?;
        warm(&warmth, 2 * sizes.object)?;
        let nanos: u64 = bare.order(&input)?.parse().context("the bare client's time")?;
        bare_times.add(nanos as f64 / 1e9);
        costs.1.add(bare.process.cpu()?.as_secs_f64());
        bare_peak.add(bare.process.memory("VmHWM")? as f64 / MIB);
        drop(bare);
        forget(&author, &input, sizes.object)?;
    }
    let table = report.table(
        &format!("{mib} MiB in as a file and out as a file, through echo-file"),
        &[
            "peak resident memory, MiB",
            "bare, MiB",
            "ratio of times",
            "node, s",
            "bare, s",
            "ratio of processor time",
            "node, s of processor",
            "bare, s of processor",
        ],
    );
    let ratio = times.over(&bare_times);
    report.at_most(&format!("peak resident memory for {mib} MiB, MiB"), &peak, PEAK_MIB);
    report.at_most(&format!("ratio of times for {mib} MiB"), &ratio, TIME);
    report.row(
        table,
        vec![
            Cell::series(&peak, 1),
            Cell::series(&bare_peak, 1),
            Cell::series(&ratio, 2),
            Cell::series(&times, 2),
            Cell::series(&bare_times, 2),
            Cell::series(&costs.0.over(&costs.1), 2),
            Cell::series(&costs.0, 2),
            Cell::series(&costs.1, 2),
        ],
    );
    Ok(())
}

/// Makes sure that free memory for the files is available before each side starts. A virtual machine may return free
/// memory to its host. It gets that memory back far more slowly than files are written.
fn warm(file: &Path, bytes: u64) -> anyhow::Result<()> {
    let block = vec![0; 1 << 20];
    let write = || {
        let mut written = File::create(file)?;
        (0..bytes >> 20).try_for_each(|_| written.write_all(&block))
    };
    write().context("write a file that is as large as both copies")?;
    std::fs::remove_file(file).context("remove it")
}

/// Checks that there is one complete copy of the object, and deletes it.
fn forget(author: &Author, input: &str, size: u64) -> anyhow::Result<()> {
    let copies: Vec<_> = author.stored()?.into_iter().filter(|(id, _)| id != input).collect();
    anyhow::ensure!(copies.len() == 1 && copies[0].1 == size, "expected one copy of {size} bytes, found {copies:?}");
    author.delete(&copies[0].0)
}
