//! Named points at which a test kills the process, as a power failure would. They exist in debug builds only.
//!
//! `RUNNER_HOST_CRASH_AT=NAME` kills the process with SIGKILL the first time it reaches the point `NAME`. With
//! `panic:NAME` the process panics there instead. In a release build a point does nothing.
//!
//! Use a point where a test cannot stop the node by delaying an answer. An example is between the end of a runner and
//! the write of its task result.

/// Kills the process here if the variable names this point.
#[cfg(all(debug_assertions, unix))]
pub(crate) fn point(name: &str) {
    use std::sync::OnceLock;
    static AT: OnceLock<Option<String>> = OnceLock::new();
    let Some(at) = AT.get_or_init(|| std::env::var("RUNNER_HOST_CRASH_AT").ok()) else { return };
    assert!(at.strip_prefix("panic:") != Some(name), "panic at {name}, as RUNNER_HOST_CRASH_AT asks");
    if at == name {
        // The call does not return.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

#[cfg(not(all(debug_assertions, unix)))]
#[inline(always)]
pub(crate) fn point(_: &str) {}
