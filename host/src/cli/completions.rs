//! `runner-host completions`.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Exit, put};

/// Flags of `completions`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// bash, elvish, fish, powershell or zsh
    shell: Shell,
}

pub(super) fn run(args: &Args) -> anyhow::Result<Exit> {
    // Into memory first: clap_complete panics where its writer fails.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "runner-host", &mut script);
    put(std::io::stdout(), &String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}
