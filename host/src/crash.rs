//! Named points at which a test lets the process die as if the power went: debug builds only.
//!
//! `RUNNER_HOST_CRASH_AT=NAME` kills the process with SIGKILL the first time it comes by the point of
//! that name. With `panic:NAME` it panics there instead. In a release build a point is nothing. A point stands where no answer that a test holds
//! back can stop the node, such as between the end of a runner and the write of its verdict.

/// Dies here if that is asked for.
#[cfg(all(debug_assertions, unix))]
pub(crate) fn point(name: &str) {
    use std::sync::OnceLock;
    static AT: OnceLock<Option<String>> = OnceLock::new();
    let Some(at) = AT.get_or_init(|| std::env::var("RUNNER_HOST_CRASH_AT").ok()) else { return };
    assert!(at.strip_prefix("panic:") != Some(name), "panic at {name}, as RUNNER_HOST_CRASH_AT asks");
    if at == name {
        // The process does not come back from this.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

#[cfg(not(all(debug_assertions, unix)))]
#[inline(always)]
pub(crate) fn point(_: &str) {}
