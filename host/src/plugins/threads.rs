//! How the system treats the threads of plugins.

/// Sets the scheduling policy of this thread to batch. Threads that it starts inherit the policy. A batch thread
/// gets the same share of the processor as any other thread. When it wakes up it does not preempt the thread that
/// keeps the leases.
#[cfg(target_os = "linux")]
pub(super) fn batch() {
    let normal = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads `normal`, which outlives it, and changes nothing but this thread.
    let refused = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &normal) } != 0;
    if refused {
        // Some sandboxes do not allow the call. The thread then keeps the default policy.
        tracing::debug!(error = %std::io::Error::last_os_error(), "a plugin's thread cannot be made batch work");
    }
}

/// Other systems have no batch policy.
#[cfg(not(target_os = "linux"))]
pub(super) fn batch() {}
