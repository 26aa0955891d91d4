//! The interface between the author's API and the host or test kit that runs the task.

use std::sync::Arc;

use super::{BoxFuture, StopSignal};
use crate::host_calls::{Answered, Call};

/// The answer to a [`Call`].
pub(crate) type Reply = BoxFuture<'static, Answered>;

/// Answers calls for one task.
pub(crate) trait Port: Send + Sync {
    /// Begins the call at once, even if the returned future is never polled.
    fn call(&self, call: Call) -> Reply;
    /// Begins a call whose answer is not needed.
    fn tell(&self, call: Call);
    /// Set once the task should stop, and at its end.
    fn stop_signal(&self) -> &Arc<StopSignal>;
}
