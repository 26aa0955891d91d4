//! The most recent requests to the dev server. Tests wait for a request instead of sleeping. Users see what a node
//! does.

use std::{collections::VecDeque, sync::Arc};

use http::Request;
use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::Inner;

/// One request that was answered, or that ended without an answer. Query, headers and body are left out, because they
/// may contain tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct JournalEntry {
    /// Counts all requests since the start, from 0, in the order in which they ended.
    pub number: u64,
    /// When it arrived, by the true clock.
    pub at: Timestamp,
    /// The method.
    pub method: String,
    /// The path without query.
    pub path: String,
    /// The call of the wire protocol, by its name in fault files.
    pub endpoint: Option<&'static str>,
    /// The status of the answer. 0: there was no answer.
    pub status: u16,
    /// The node that sent the request, if its node token was valid.
    pub node: Option<Uuid>,
    /// The kind of fault that was applied.
    pub fault: Option<&'static str>,
}

/// The newest requests, with a bound on their number.
pub(super) struct Journal {
    seen: VecDeque<JournalEntry>,
    max: usize,
    next: u64,
}

impl Journal {
    pub(super) fn new(max: usize) -> Self {
        Self { seen: VecDeque::new(), max, next: 0 }
    }

    fn add(&mut self, seen: JournalEntry) {
        if self.seen.len() >= self.max {
            self.seen.pop_front();
        }
        self.seen.push_back(JournalEntry { number: self.next, ..seen });
        self.next += 1;
    }

    /// Stored requests from `number` on, and the number after the newest.
    pub(super) fn since(&self, number: u64) -> (u64, Vec<JournalEntry>) {
        (self.next, self.seen.iter().filter(|seen| seen.number >= number).cloned().collect())
    }
}

/// A request in progress. It is recorded when it ends, also when the client disconnects.
pub(super) struct Note {
    seen: Option<JournalEntry>,
    server: Arc<Inner>,
}

impl Note {
    pub(super) fn of<B>(server: &Arc<Inner>, request: &Request<B>, endpoint: Option<&'static str>) -> Self {
        let seen = (server.config.journal_max > 0).then(|| JournalEntry {
            number: 0,
            at: Timestamp::now(),
            method: request.method().to_string(),
            path: request.uri().path().to_owned(),
            endpoint,
            status: 0,
            node: None,
            fault: None,
        });
        Self { seen, server: server.clone() }
    }

    pub(super) fn fault(&mut self, kind: &'static str) {
        if let Some(seen) = &mut self.seen {
            seen.fault = Some(kind);
        }
    }

    pub(super) fn answered(&mut self, status: u16, node: Option<Uuid>) {
        if let Some(seen) = &mut self.seen {
            (seen.status, seen.node) = (status, node);
        }
    }

    /// Records the request now, because it may end much later.
    pub(super) fn now(&mut self) {
        if let Some(seen) = self.seen.take() {
            self.server.journal().add(seen);
            self.server.changed();
        }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        self.now();
    }
}
