//! The world's clock: wall time that never goes back.
//!
//! Leases and tokens expire by it. The wall clock of a laptop may be set while the world runs; a
//! lease must not live longer or end earlier because of that, so the time is read once and counted
//! on monotonically.

use std::time::Instant;

use jiff::Timestamp;

/// See the module's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    started: Instant,
    at: Timestamp,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self { started: Instant::now(), at: Timestamp::now() }
    }

    pub(super) fn now(&self) -> Timestamp {
        self.at + self.started.elapsed()
    }
}
