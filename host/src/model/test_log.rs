//! The log of one test thread.

use std::sync::OnceLock;

use tracing::{
    Dispatch, Subscriber,
    subscriber::{DefaultGuard, NoSubscriber},
};

/// Sends the log of this thread to `subscriber` until the guard is dropped.
///
/// While only one subscriber exists, tracing asks the thread that reaches a log line first whether the line is wanted.
/// That may be the thread of another test, which wants none. A second subscriber makes tracing ask both.
pub(crate) fn capture(subscriber: impl Subscriber + Send + Sync + 'static) -> DefaultGuard {
    static SECOND: OnceLock<Dispatch> = OnceLock::new();
    SECOND.get_or_init(|| Dispatch::new(NoSubscriber::default()));
    tracing::subscriber::set_default(subscriber)
}
