//! `runner-host outbox list|retry|drop`: reports that no control plane has accepted yet.

use std::{collections::HashSet, path::PathBuf};

use anyhow::Context as _;

use super::{Exit, Output, StateArgs, block_on, counted, parse_task, print_error, print_line, put, table};
use crate::{
    config::Layers,
    control::{Reports, Wanted, client},
    model::TaskId,
    outbox::{ImportedReports, Listing, OfflineOutbox, OfflineOutboxError, StateError},
};

/// Subcommands of `outbox`.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show the reports that are not accepted yet
    List {
        #[command(flatten)]
        state_args: StateArgs,
    },
    /// Send reports now, also those that were set aside, or add the reports of another file
    Retry {
        #[command(flatten)]
        what: Retried,
        #[command(flatten)]
        state_args: StateArgs,
    },
    /// Delete reports: the control plane never gets their results
    Drop {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        state_args: StateArgs,
    },
}

/// The selected reports.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct Which {
    /// Ids of tasks, as `list` shows them
    #[arg(value_name = "TASK", value_parser = parse_task)]
    tasks: Vec<TaskId>,
    /// Every report
    #[arg(long)]
    all: bool,
}

/// The reports to send now.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct Retried {
    /// Task ids, as `list` shows them
    #[arg(value_name = "TASK", value_parser = parse_task)]
    tasks: Vec<TaskId>,
    /// Every report
    #[arg(long)]
    all: bool,
    /// Reports of this file, damaged or not: `outbox-damaged-….redb`, or the outbox of a lost node
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

impl Command {
    /// The selected tasks. `None`: all.
    fn tasks(&self) -> Option<Vec<TaskId>> {
        let (all, tasks) = match self {
            Self::List { .. } => return None,
            Self::Retry { what, .. } => (what.all || what.from.is_some(), &what.tasks),
            Self::Drop { which, .. } => (which.all, &which.tasks),
        };
        (!all).then(|| tasks.clone())
    }

    /// The reports to add.
    fn imported(&self) -> Result<Option<ImportedReports>, StateError> {
        match self {
            Self::Retry { what: Retried { from: Some(file), .. }, .. } => ImportedReports::read(file).map(Some),
            _ => Ok(None),
        }
    }
}

pub(super) fn run(command: &Command, layers: &Layers) -> anyhow::Result<Exit> {
    let (Command::List { state_args } | Command::Retry { state_args, .. } | Command::Drop { state_args, .. }) = command;
    let folder = state_args.folder(layers)?;
    let tasks = command.tasks();
    let imported = command.imported()?;
    let found = imported.as_ref().map(ImportedReports::len);
    if found == Some(0) {
        print_error("the file has no report that can be read");
        return Ok(Exit::Failed);
    }
    let (reports, running) = match OfflineOutbox::open(&folder) {
        Ok(Some(outbox)) => (stopped(command, outbox, tasks.as_deref(), imported)?, false),
        // A mistyped folder must not look like an empty outbox.
        Ok(None) => {
            let folder = folder.display();
            print_error(&format!(
                "there is no outbox in {folder}; name a node's state folder with --state-dir or STATE_DIR"
            ));
            return Ok(Exit::Failed);
        }
        Err(OfflineOutboxError::State(StateError::InUse { path, .. })) => {
            let wanted = Wanted { tasks: tasks.clone() };
            let asked = block_on(async {
                Ok(match command {
                    _ if imported.is_some() => client::ask(&path, "/outbox/take-up", imported.as_ref()).await,
                    Command::List { .. } => client::ask::<Reports>(&path, "/outbox", None::<&Wanted>).await,
                    Command::Retry { .. } => client::ask(&path, "/outbox/retry", Some(&wanted)).await,
                    Command::Drop { .. } => client::ask(&path, "/outbox/drop", Some(&wanted)).await,
                })
            })?;
            (asked.context(Exit::Temporary)?.reports, true)
        }
        Err(err) => return Err(err.into()),
    };
    put(std::io::stdout(), &shown(&reports, state_args.output)?)?;
    if let Some(found) = found {
        print_added(reports.len(), found, running);
        return Ok(Exit::Done);
    }
    // Named reports that are missing are listed below.
    if tasks.is_none() || !reports.is_empty() {
        print_effect(command, reports.len(), running);
    }
    let found: HashSet<TaskId> = reports.iter().map(|report| report.task_id.clone()).collect();
    let missing: Vec<TaskId> = tasks.unwrap_or_default().into_iter().filter(|task| !found.contains(task)).collect();
    for task in &missing {
        print_line(format_args!(
            "error: no report of task {task} is in the outbox; `runner-host outbox list` shows what is"
        ));
    }
    Ok(if missing.is_empty() { Exit::Done } else { Exit::Failed })
}

/// For a node that does not run. Its waiting reports are sent after the next start.
fn stopped(
    command: &Command,
    mut outbox: OfflineOutbox,
    tasks: Option<&[TaskId]>,
    imported: Option<ImportedReports>,
) -> anyhow::Result<Vec<Listing>> {
    if let Some(imported) = imported {
        return Ok(outbox.take_up(imported)?);
    }
    let tasks: Option<HashSet<TaskId>> = tasks.map(|tasks| tasks.iter().cloned().collect());
    Ok(match command {
        Command::List { .. } => outbox.listings(tasks.as_ref()),
        Command::Retry { .. } => outbox.retry(tasks.as_ref())?,
        Command::Drop { .. } => outbox.drop_reports(tasks.as_ref())?,
    })
}

/// Prints the effect for people.
fn print_effect(command: &Command, count: usize, running: bool) {
    let reports = counted(count, "report", "reports");
    match command {
        _ if count == 0 => print_line(format_args!("the outbox is empty")),
        Command::List { .. } => {}
        Command::Retry { .. } if running => print_line(format_args!("{reports} will be sent now")),
        Command::Retry { .. } => print_line(format_args!("no node runs here; {reports} will be sent when one starts")),
        Command::Drop { .. } => print_line(format_args!("dropped {reports}")),
    }
}

/// Prints for people how many of the `found` reports were added.
fn print_added(count: usize, found: usize, running: bool) {
    if count < found {
        let known = counted(found - count, "report is", "reports are");
        print_line(format_args!("{known} in the outbox already"));
    }
    let reports = counted(count, "report", "reports");
    match running {
        _ if count == 0 => {}
        true => print_line(format_args!("added {reports}, which will be sent now")),
        false => print_line(format_args!("added {reports}; no node runs here, the next start sends them")),
    }
}

fn shown(reports: &[Listing], output: Output) -> anyhow::Result<String> {
    if output == Output::Json {
        return Ok(format!("{}\n", serde_json::to_string(reports)?));
    }
    let widest = reports.iter().map(|report| report.plane_name.as_str().len()).max().unwrap_or_default();
    let rows = reports.iter().map(|report| {
        let ended = report.ended_at.strftime("%Y-%m-%dT%H:%M:%SZ");
        format!(
            "{:<9} {:<widest$} {} {} {:<10} {:>9}  {}  {}",
            report.state.word(),
            report.plane_name.as_str(),
            report.task_id,
            ended,
            report.outcome,
            counted(report.attempts, "try", "tries"),
            report.capability,
            report.last_error.as_deref().unwrap_or("-"),
        )
    });
    Ok(table(rows))
}
