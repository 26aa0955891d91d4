//! How the system treats the threads of plugins.

/// Makes this thread batch work, and with it every thread that is started from it: it gets as much of the
/// processor as any other and waits its turn, instead of taking a core from the thread that keeps the leases the
/// moment it wakes up.
#[cfg(target_os = "linux")]
pub(super) fn batch() {
    let normal = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads `normal`, which outlives it, and changes nothing but this thread.
    let refused = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &normal) } != 0;
    if refused {
        // Some sandboxes do not allow it; the thread then works as others do.
        tracing::debug!(error = %std::io::Error::last_os_error(), "a plugin's thread cannot be made batch work");
    }
}

/// Other systems have no such word.
#[cfg(not(target_os = "linux"))]
pub(super) fn batch() {}
