//! Progress and events between a runner and its heartbeats.
//!
//! Only the latest progress value counts. Events form a queue: an event stays until a heartbeat that carried it was
//! acknowledged (at least once, in order).

use std::{collections::VecDeque, pin::pin, sync::Mutex};

use serde_json::Value;
use tokio::sync::Notify;

use super::BootInstant;

/// Largest progress value, in bytes of JSON. Newer control planes reject larger values.
pub(crate) const PROGRESS_BYTES_MAX: usize = 64 * 1024;
/// Most events that wait for acknowledgement.
pub(crate) const EVENTS_MAX: usize = 1024;
/// Most bytes of JSON in waiting events.
pub(crate) const EVENTS_BYTES_MAX: usize = 256 * 1024;
/// Most bytes of events in one heartbeat, and the largest event. Newer control planes reject more.
pub(crate) const EVENT_BYTES_MAX: usize = 64 * 1024;

/// Why progress or an event was not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProgressError {
    /// The value is larger than [`PROGRESS_BYTES_MAX`].
    #[error("progress is {0} bytes of JSON, at most {PROGRESS_BYTES_MAX} are allowed")]
    ProgressTooLarge(usize),
    /// The event is larger than [`EVENT_BYTES_MAX`].
    #[error("event is {0} bytes of JSON, at most {EVENT_BYTES_MAX} are allowed")]
    EventTooLarge(usize),
}

/// What the next heartbeat should carry.
#[derive(Clone, Debug, PartialEq)]
pub struct Pending {
    /// Latest progress. `{}` if there is none.
    pub progress: Value,
    /// Unacknowledged events, oldest first, as many as one heartbeat may carry.
    pub events: Vec<Value>,
    /// Version of `progress`, for [`ProgressQueue::acknowledge`].
    pub version: u64,
}

/// See the module documentation. The runner's side and the session share it.
#[derive(Default)]
pub struct ProgressQueue {
    state: Mutex<State>,
    changed: Notify,
    /// Held by the caller that waits for space at the head of the line. Waiters get it in order of arrival.
    turn: tokio::sync::Mutex<()>,
    /// There is space for the caller that has the turn.
    freed: Notify,
}

#[derive(Default)]
struct State {
    progress: Option<Value>,
    progress_at: Option<BootInstant>,
    version: u64,
    acknowledged: u64,
    /// A caller waits for the answer to a heartbeat that has not been sent yet.
    answer_requested: bool,
    events: VecDeque<(Value, usize)>,
    events_bytes: usize,
}

impl ProgressQueue {
    /// Replaces the progress value.
    pub fn progress(&self, value: Value) -> Result<(), ProgressError> {
        let bytes = value.to_string().len();
        if bytes > PROGRESS_BYTES_MAX {
            return Err(ProgressError::ProgressTooLarge(bytes));
        }
        let mut state = self.lock();
        state.progress = Some(value);
        state.progress_at = Some(BootInstant::now());
        state.version += 1;
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Appends an event. Waits while there is no space. Callers that wait get space in order of arrival.
    /// [`super::HeldLease::event`] ends the wait when no heartbeat can free space.
    pub async fn event(&self, value: Value) -> Result<(), ProgressError> {
        let bytes = event_bytes(&value)?;
        let mut event = (value, bytes);
        let _turn = self.turn.lock().await;
        loop {
            // Registers before the try, so that no space between the two is missed.
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            match self.push(event) {
                Ok(()) => return Ok(()),
                Err(refused) => event = refused,
            }
            freed.await;
        }
    }

    /// Appends an event of so many bytes. Returns it if there is no space.
    fn push(&self, event: (Value, usize)) -> Result<(), (Value, usize)> {
        let mut state = self.lock();
        if state.events.len() >= EVENTS_MAX || state.events_bytes + event.1 > EVENTS_BYTES_MAX {
            return Err(event);
        }
        state.events_bytes += event.1;
        state.events.push_back(event);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// When the runner last reported progress.
    #[must_use]
    pub fn progress_at(&self) -> Option<BootInstant> {
        self.lock().progress_at
    }

    /// Requests a heartbeat soon although nothing has changed: a caller waits for its answer.
    pub fn ask(&self) {
        self.lock().answer_requested = true;
        self.changed.notify_one();
    }

    /// Records that the requested answer has arrived.
    pub fn answered(&self) {
        self.lock().answer_requested = false;
    }

    /// Returns a copy of the data for the next heartbeat.
    #[must_use]
    pub fn pending(&self) -> Pending {
        let mut state = self.lock();
        // A failed heartbeat is repeated in any case.
        state.answer_requested = false;
        let mut space = EVENT_BYTES_MAX;
        let fits = |(_, bytes): &&(Value, usize)| {
            let left = space.checked_sub(*bytes);
            space = left.unwrap_or(0);
            left.is_some()
        };
        Pending {
            progress: state.progress.clone().unwrap_or_else(|| Value::Object(serde_json::Map::new())),
            events: state.events.iter().take_while(fits).map(|(event, _)| event.clone()).collect(),
            version: state.version,
        }
    }

    /// Drops the data that an answered heartbeat carried. Events added meanwhile stay.
    pub fn acknowledge(&self, sent: &Pending) {
        let mut state = self.lock();
        state.acknowledged = state.acknowledged.max(sent.version);
        for _ in 0..sent.events.len().min(state.events.len()) {
            if let Some((_, bytes)) = state.events.pop_front() {
                state.events_bytes -= bytes;
            }
        }
        // Events that did not fit into one heartbeat are left for the next one.
        if !state.events.is_empty() {
            self.changed.notify_one();
        }
        drop(state);
        self.freed.notify_waiters();
    }

    /// True while there is progress or an event that no answered heartbeat has carried. Also true while a caller waits
    /// for an answer.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        let state = self.lock();
        state.answer_requested || state.acknowledged < state.version || !state.events.is_empty()
    }

    /// Waits for a change since the last call. At most one change is stored.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The size of an event.
fn event_bytes(value: &Value) -> Result<usize, ProgressError> {
    match value.to_string().len() {
        bytes if bytes > EVENT_BYTES_MAX => Err(ProgressError::EventTooLarge(bytes)),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn waiting_events_get_space_in_order() {
        let queue = ProgressQueue::default();
        for n in 0..EVENTS_MAX {
            queue.event(json!(n)).await.expect("space in the queue");
        }
        let [mut first, mut given_up, mut last] = [1, 2, 3].map(|n| Box::pin(queue.event(json!([n]))));
        assert!(poll!(&mut first).is_pending() && poll!(&mut given_up).is_pending() && poll!(&mut last).is_pending());
        queue.acknowledge(&queue.pending());
        // The one that has waited longest goes first, even if another one is polled before it.
        assert!(poll!(&mut last).is_pending() && queue.pending().events.is_empty());
        drop(given_up);
        assert_eq!((first.await, last.await), (Ok(()), Ok(())));
        assert_eq!(queue.pending().events, [json!([1]), json!([3])]);
    }

    #[tokio::test]
    async fn acknowledgement_removes_only_sent_events() {
        let queue = ProgressQueue::default();
        queue.event(json!(1)).await.expect("space in the queue");
        let sent = queue.pending();
        queue.event(json!(2)).await.expect("space in the queue");
        queue.acknowledge(&sent);
        assert_eq!(queue.pending().events, [json!(2)]);
        assert!(queue.is_dirty());
    }

    #[tokio::test]
    async fn large_events_are_split_across_heartbeats() {
        let queue = ProgressQueue::default();
        for n in 0..5 {
            queue.event(json!(format!("{n}{}", "x".repeat(20_000)))).await.expect("space in the queue");
        }
        let mut sizes = Vec::new();
        while queue.is_dirty() {
            let sent = queue.pending();
            assert!(
                sent.events[0].as_str().is_some_and(|text| text.starts_with(&sizes.iter().sum::<usize>().to_string()))
            );
            sizes.push(sent.events.len());
            queue.acknowledge(&sent);
        }
        assert_eq!(sizes, [3, 2]);
    }

    #[test]
    fn ask_triggers_heartbeat_with_empty_progress() {
        let queue = ProgressQueue::default();
        queue.ask();
        assert!(queue.is_dirty());
        let sent = queue.pending();
        assert_eq!((sent.progress.clone(), sent.events.len()), (json!({}), 0));
        queue.acknowledge(&sent);
        assert!(!queue.is_dirty());
    }

    #[tokio::test]
    async fn queue_is_limited_by_count_and_bytes() {
        let queue = ProgressQueue::default();
        for n in 0..EVENTS_MAX {
            queue.event(json!(n)).await.expect("space in the queue");
        }
        assert!(poll!(pin!(queue.event(json!("one more")))).is_pending());
        let queue = ProgressQueue::default();
        let quarter = json!("x".repeat(EVENTS_BYTES_MAX / 4 - 2));
        for _ in 0..4 {
            queue.event(quarter.clone()).await.expect("space in the queue");
        }
        assert!(poll!(pin!(queue.event(json!(1)))).is_pending());
        let too_large = queue.event(json!("x".repeat(EVENT_BYTES_MAX))).await;
        assert!(matches!(too_large, Err(ProgressError::EventTooLarge(_))));
        assert!(matches!(
            queue.progress(json!("x".repeat(PROGRESS_BYTES_MAX))),
            Err(ProgressError::ProgressTooLarge(_))
        ));
    }
}
