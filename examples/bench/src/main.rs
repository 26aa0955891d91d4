//! `cargo bench-node`: compares the node with a bare client, as ratios within one run.
//!
//! Dev server, node and bare client are separate processes. The runner is a real shared library. Each ratio of
//! throughput is reported with the ratio of processor time, which a slow dev server cannot improve. Start at
//! [`rows`]. `procs` starts and watches the processes, `bare` is the reference client, and `report` prints.

#![forbid(unsafe_code)]

mod bare;
mod build;
mod calls;
mod procs;
mod report;
mod rows;

use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::{
    build::Built,
    report::Report,
    rows::{Row, Sizes},
};

#[derive(Parser)]
#[command(name = "bench-node", about = "Measures a node beside a bare client, as ratios in one run.")]
struct Cli {
    /// One repetition and small sizes; targets may be missed by a factor of two
    #[arg(long)]
    quick: bool,
    /// Measure only this row; may be given more than once
    #[arg(long, value_enum, value_name = "ROW")]
    only: Vec<Row>,
    /// Form of the result on stdout; what happens meanwhile goes to stderr
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    #[command(subcommand)]
    mode: Option<Mode>,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Output {
    /// Markdown tables
    #[default]
    Table,
    /// One JSON object
    Json,
}

#[derive(Subcommand)]
enum Mode {
    /// The bare client; the benchmark starts it by itself
    #[command(hide = true, subcommand)]
    Bare(bare::Work),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = match cli.mode {
        Some(Mode::Bare(work)) => bare::run(work).map(|()| true),
        None => measure(&cli),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether every target was reached.
fn measure(cli: &Cli) -> anyhow::Result<bool> {
    anyhow::ensure!(cfg!(target_os = "linux"), "the benchmark reads /proc, so it runs on Linux only");
    let built = Built::make()?;
    let sizes = if cli.quick { Sizes::QUICK } else { Sizes::FULL };
    let mut report = Report::new(cli.quick);
    for row in Row::value_variants() {
        if cli.only.is_empty() || cli.only.contains(row) {
            rows::measure(*row, &built, &sizes, &mut report)?;
        }
    }
    match cli.output {
        Output::Table => print!("{}", report.markdown()),
        Output::Json => println!("{}", report.json()),
    }
    Ok(report.reached())
}
