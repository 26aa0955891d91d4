//! Repetitions of a failed transfer: growing pauses with jitter, and a time limit.

use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;

use crate::model::{Backoff, Jitter, PortError, millis, pause_asked};

/// Longest pause without jitter, unless the server asks for a longer one.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The pauses and the time limit of one transfer. Progress resets both.
#[derive(Debug)]
pub(super) struct Retries {
    pauses: Backoff,
    limit: Duration,
    /// The time of the first failure since the last progress.
    since: Option<Instant>,
    failures: u32,
}

impl Retries {
    /// Pauses of `first`, twice that, and so on. It gives up after `limit` without progress.
    pub(super) fn new(first: Duration, limit: Duration) -> Self {
        Self { pauses: Backoff::new(first, PAUSE_MAX, Jitter::Fifth), limit, since: None, failures: 0 }
    }

    /// Resets the pauses and the limit after bytes moved.
    pub(super) fn progress(&mut self) {
        self.since = None;
        self.failures = 0;
    }

    /// Waits before the next try. Returns `err` if the time limit would end before that try.
    pub(super) async fn pause(&mut self, err: PortError, asked: Option<Duration>) -> Result<(), PortError> {
        let Some(pause) = self.next_pause(asked, Instant::now()) else {
            let PortError { kind, message } = err;
            let message = match self.failures {
                1 => message,
                tries => format!("{message} (given up after {tries} tries)"),
            };
            return Err(PortError { kind, message });
        };
        tracing::debug!(error = %err, attempt = self.failures, retry_in_ms = millis(pause), "transfer will be retried");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// The pause after another failure. `None`: the next try would be after the time limit.
    fn next_pause(&mut self, asked: Option<Duration>, now: Instant) -> Option<Duration> {
        let since = *self.since.get_or_insert(now);
        self.failures += 1;
        let left = self.limit.saturating_sub(now.duration_since(since));
        // With jitter, so that nodes that lost the same server do not return at the same time.
        let own = self.pauses.pause(self.failures, rand::random());
        // A server that asks for a longer pause than is left gets one last try at the end of it.
        (own <= left).then(|| pause_asked(own, asked, left))
    }
}

/// Whether the same request may succeed later.
pub(super) fn transient(status: StatusCode) -> bool {
    status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED || matches!(status.as_u16(), 408 | 425 | 429)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_grow_and_end_at_the_limit() {
        let mut retries = Retries::new(SECOND, 30 * SECOND);
        let began = Instant::now();
        let mut now = began;
        let mut pauses = Vec::new();
        while let Some(pause) = retries.next_pause(None, now) {
            pauses.push(pause.as_secs_f64());
            now += pause;
        }
        assert!((4..=6).contains(&pauses.len()), "{pauses:?}");
        for (n, pause) in pauses.iter().enumerate() {
            let middle = f64::from(1 << n).min(10.0);
            assert!((middle * 0.8..middle * 1.2).contains(pause), "{pauses:?}");
        }
        retries.progress();
        assert!(retries.next_pause(None, now).is_some(), "progress resets the limit");
    }

    #[test]
    fn retry_after_is_obeyed_within_the_limit() {
        let mut retries = Retries::new(SECOND, 30 * SECOND);
        let now = Instant::now();
        assert_eq!(retries.next_pause(Some(20 * SECOND), now), Some(20 * SECOND));
        assert_eq!(retries.next_pause(Some(Duration::MAX), now + 20 * SECOND), Some(10 * SECOND), "one last try");
        assert_eq!(retries.next_pause(Some(20 * SECOND), now + 30 * SECOND), None);
    }
}
