//! `runner-host cancel TASK`: ends a task of a running node.

use serde_json::json;

use super::{Exit, Output, StateArgs, block_on, parse_task, print_error, put, table};
use crate::{
    config::Layers,
    control::{CancelAnswer, TaskToCancel, client},
    model::{PlaneName, TaskId},
    outbox::StateDir,
};

/// Flags of `cancel`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Id of the task, as the log and the status page show it
    #[arg(value_name = "TASK", value_parser = parse_task)]
    task: TaskId,
    /// Control plane of the task; needed if several have a task with this id
    #[arg(long, value_name = "NAME", value_parser = PlaneName::parse)]
    plane: Option<PlaneName>,
    #[command(flatten)]
    state_args: StateArgs,
}

pub(super) fn run(args: Args, layers: &Layers) -> anyhow::Result<Exit> {
    let folder = args.state_args.folder(layers)?;
    let wanted = TaskToCancel { task: args.task, plane: args.plane };
    let asked = block_on(async { Ok(client::ask(&folder, "/tasks/cancel", Some(&wanted)).await) })?;
    let answer: CancelAnswer = match asked {
        Ok(answer) => answer,
        Err(_) if !StateDir::is_in_use(&folder)? => {
            let folder = folder.display();
            print_error(&format!("no node runs with the state folder {folder}; name that of a node with --state-dir"));
            return Ok(Exit::Failed);
        }
        Err(err) => return Err(anyhow::Error::new(err).context(Exit::Temporary)),
    };
    let task = &wanted.task;
    let (problem, exit) = match answer {
        CancelAnswer::Cancelled { plane, capability, reason } => {
            let row = match args.state_args.output {
                Output::Json => {
                    json!({ "task_id": task, "plane": plane, "capability": capability, "cancel_reason": reason })
                        .to_string()
                }
                Output::Text if reason == "operator" => {
                    format!("task {task} of {plane} is cancelled and fails, its runner has CANCEL_GRACE to return")
                }
                Output::Text => format!("task {task} of {plane} was already cancelled ({reason})"),
            };
            put(std::io::stdout(), &table([row]))?;
            return Ok(Exit::Done);
        }
        CancelAnswer::Ended { outcome: None } => {
            (format!("task {task} has ended, its report is being sent"), Exit::Failed)
        }
        CancelAnswer::Ended { outcome: Some(outcome) } => (format!("task {task} has ended ({outcome})"), Exit::Failed),
        CancelAnswer::Unknown => {
            let folder = folder.display();
            let hint = "/status.json shows its tasks, --state-dir names the folder of another node";
            (format!("the node of {folder} has no task {task}; {hint}"), Exit::Failed)
        }
        CancelAnswer::SeveralTasks { planes } => {
            let planes = planes.join(", ");
            (format!("several control planes have a task {task}; choose one with --plane: {planes}"), Exit::Usage)
        }
        CancelAnswer::NoSuchPlane { planes } => {
            (format!("--plane: the node has no such control plane, it has {}", planes.join(", ")), Exit::Usage)
        }
    };
    print_error(&problem);
    Ok(exit)
}
