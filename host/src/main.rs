//! Parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: the first statement of the process; no other thread is running.
    let secrets = unsafe { runner_host::config::Secrets::take() };
    runner_host::cli::main(&secrets)
}
