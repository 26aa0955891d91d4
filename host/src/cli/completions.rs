//! `runner-host completions`.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, Exit};

/// Flags of `completions`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// bash, elvish, fish, powershell or zsh
    shell: Shell,
}

pub(super) fn run(args: &Args) -> Exit {
    clap_complete::generate(args.shell, &mut Cli::command(), "runner-host", &mut std::io::stdout());
    Exit::Done
}
