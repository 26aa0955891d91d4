//! The rows of the measurement, and their sizes.

mod boundary;
mod data;
mod idle;
mod runs;
mod start;
mod tasks;
mod waiting;

use std::time::Duration;

use crate::{build::Built, report::Report};

/// The slots of the rows with no-op tasks and runs.
const SLOTS: [usize; 3] = [1, 8, 64];

/// A row of the table, or a few that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Row {
    /// No-op tasks per second at 1, 8 and 64 slots
    Tasks,
    /// No-op runs of a Node Runtime control plane per second at 1, 8 and 64 slots
    Runs,
    /// A large object in as a file and out as a file
    Data,
    /// From the start of the process to the first lease, with ten plugins
    Start,
    /// A node without work
    Idle,
    /// A node with ten thousand tasks that wait
    Waiting,
    /// From the start of a run in a plugin to its end, with one call of the host
    Boundary,
}

/// The sizes of a measurement.
pub(crate) struct Sizes {
    /// Repetitions of each measurement.
    pub(crate) repetitions: usize,
    /// How long one repetition of the rows with no-op tasks and runs should take.
    pub(crate) tasks: Duration,
    /// Bytes of the large object.
    pub(crate) object: u64,
    /// Repetitions with the large object, which is slow.
    pub(crate) objects: usize,
    /// How long an idle node is measured.
    pub(crate) idle: Duration,
    /// Number of tasks that wait at once.
    pub(crate) waiting: usize,
    /// Sequential runs in a plugin in one repetition.
    pub(crate) runs: u32,
}

impl Sizes {
    pub(crate) const FULL: Self = Self {
        repetitions: 5,
        tasks: Duration::from_millis(1500),
        object: 1 << 30,
        objects: 5,
        idle: Duration::from_secs(30),
        waiting: 10_000,
        runs: 10_000,
    };
    pub(crate) const QUICK: Self = Self {
        repetitions: 1,
        tasks: Duration::from_millis(500),
        object: 256 << 20,
        objects: 1,
        idle: Duration::from_secs(3),
        waiting: 1_000,
        runs: 1_000,
    };
}

pub(crate) fn measure(row: Row, built: &Built, sizes: &Sizes, report: &mut Report) -> anyhow::Result<()> {
    match row {
        Row::Tasks => tasks::measure(built, sizes, report),
        Row::Runs => runs::measure(built, sizes, report),
        Row::Data => data::measure(built, sizes, report),
        Row::Start => start::measure(built, sizes, report),
        Row::Idle => idle::measure(built, sizes, report),
        Row::Waiting => waiting::measure(built, sizes, report),
        Row::Boundary => boundary::measure(built, sizes, report),
    }
}
