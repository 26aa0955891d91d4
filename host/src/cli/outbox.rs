//! `runner-host outbox list|retry|drop`: reports that no control plane has accepted yet.

use std::{collections::HashSet, path::PathBuf};

use anyhow::Context as _;
use uuid::Uuid;

use super::{Exit, Output, block_on, complain, counted, put, table, tell};
use crate::{
    config::{HostConfig, Layers},
    control::{Reports, Wanted, client},
    model::{TaskId, TaskIdError},
    outbox::{Listing, OfflineOutbox, OfflineOutboxError, StateError},
};

/// What to do with them.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Show the reports that are not accepted yet
    List {
        #[command(flatten)]
        place: Place,
    },
    /// Send reports now instead of after their pause
    Retry {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        place: Place,
    },
    /// Forget reports: their tasks' ends are never told to the control plane
    Drop {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        place: Place,
    },
}

/// Whose outbox, and how it is shown.
#[derive(clap::Args)]
pub(super) struct Place {
    /// The node's state folder [default: STATE_DIR]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Which reports.
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

impl Which {
    fn tasks(&self) -> Option<Vec<TaskId>> {
        (!self.all).then(|| self.tasks.clone())
    }
}

pub(super) fn run(command: &Command, layers: &Layers) -> anyhow::Result<Exit> {
    let (Command::List { place } | Command::Retry { place, .. } | Command::Drop { place, .. }) = command;
    let folder = match &place.state_dir {
        Some(folder) => folder.clone(),
        None => HostConfig::some(layers, &["state"])?.outbox.state_dir,
    };
    let tasks = match command {
        Command::List { .. } => None,
        Command::Retry { which, .. } | Command::Drop { which, .. } => which.tasks(),
    };
    let (reports, running) = match OfflineOutbox::open(&folder) {
        Ok(Some(shelf)) => (stopped(command, shelf, tasks.as_deref())?, false),
        // A mistyped folder must not look like an empty outbox.
        Ok(None) => {
            let folder = folder.display();
            complain(&format!(
                "there is no outbox in {folder}; name a node's state folder with --state-dir or STATE_DIR"
            ));
            return Ok(Exit::Failed);
        }
        Err(OfflineOutboxError::State(StateError::InUse { path, .. })) => {
            let wanted = Wanted { tasks: tasks.clone() };
            let asked = block_on(async {
                Ok(match command {
                    Command::List { .. } => client::ask::<Reports>(&path, "/outbox", None::<&Wanted>).await,
                    Command::Retry { .. } => client::ask(&path, "/outbox/retry", Some(&wanted)).await,
                    Command::Drop { .. } => client::ask(&path, "/outbox/drop", Some(&wanted)).await,
                })
            })?;
            (asked.context(Exit::Temporary)?.reports, true)
        }
        Err(err) => return Err(err.into()),
    };
    put(std::io::stdout(), &shown(&reports, place.output)?)?;
    // Of reports that were named, each one that is missing is told below.
    if tasks.is_none() || !reports.is_empty() {
        say(command, reports.len(), running);
    }
    let found: HashSet<TaskId> = reports.iter().map(|report| report.task_id.clone()).collect();
    let missing: Vec<TaskId> = tasks.unwrap_or_default().into_iter().filter(|task| !found.contains(task)).collect();
    for task in &missing {
        tell(format_args!("error: no report of task {task} is in the outbox; `runner-host outbox list` shows what is"));
    }
    Ok(if missing.is_empty() { Exit::Done } else { Exit::Failed })
}

/// On a node that does not run. What waits there is sent when one starts.
fn stopped(command: &Command, mut shelf: OfflineOutbox, tasks: Option<&[TaskId]>) -> anyhow::Result<Vec<Listing>> {
    let tasks: Option<HashSet<TaskId>> = tasks.map(|tasks| tasks.iter().cloned().collect());
    Ok(match command {
        Command::List { .. } | Command::Retry { .. } => shelf.listings(tasks.as_ref()),
        Command::Drop { .. } => shelf.drop_reports(tasks.as_ref())?,
    })
}

/// What was done, for people.
fn say(command: &Command, count: usize, running: bool) {
    let reports = counted(count, "report", "reports");
    match command {
        _ if count == 0 => tell(format_args!("the outbox is empty")),
        Command::List { .. } => {}
        Command::Retry { .. } if running => tell(format_args!("{reports} will be sent now")),
        Command::Retry { .. } => tell(format_args!("no node runs here; {reports} will be sent when one starts")),
        Command::Drop { .. } => tell(format_args!("dropped {reports}")),
    }
}

/// Reads the id of a task; a UUID in any usual spelling.
fn parse_task(text: &str) -> Result<TaskId, TaskIdError> {
    match Uuid::try_parse(text) {
        Ok(id) => Ok(id.into()),
        Err(_) => TaskId::parse(text),
    }
}

fn shown(reports: &[Listing], output: Output) -> anyhow::Result<String> {
    if output == Output::Json {
        return Ok(format!("{}\n", serde_json::to_string(reports)?));
    }
    let rows = reports.iter().map(|report| {
        let ended = report.ended_at.strftime("%Y-%m-%dT%H:%M:%SZ");
        format!(
            "{:<8} {} {} {:<10} {:>9}  {}  {}",
            report.state.word(),
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
