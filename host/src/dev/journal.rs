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
    entries: VecDeque<JournalEntry>,
    max: usize,
    next: u64,
}

impl Journal {
    pub(super) fn new(max: usize) -> Self {
        Self { entries: VecDeque::new(), max, next: 0 }
    }

    fn add(&mut self, entry: JournalEntry) {
        if self.entries.len() >= self.max {
            self.entries.pop_front();
        }
        self.entries.push_back(JournalEntry { number: self.next, ..entry });
        self.next += 1;
    }

    /// Stored requests from `number` on, and the number after the newest.
    pub(super) fn since(&self, number: u64) -> (u64, Vec<JournalEntry>) {
        (self.next, self.entries.iter().filter(|entry| entry.number >= number).cloned().collect())
    }
}

/// A request in progress. It is recorded when it ends, also when the client disconnects.
pub(super) struct Note {
    entry: Option<JournalEntry>,
    server: Arc<Inner>,
}

impl Note {
    pub(super) fn of<B>(server: &Arc<Inner>, request: &Request<B>, endpoint: Option<&'static str>) -> Self {
        let entry = (server.config.journal_max > 0).then(|| JournalEntry {
            number: 0,
            at: Timestamp::now(),
            method: request.method().to_string(),
            path: request.uri().path().to_owned(),
            endpoint,
            status: 0,
            node: None,
            fault: None,
        });
        Self { entry, server: server.clone() }
    }

    pub(super) fn fault(&mut self, kind: &'static str) {
        if let Some(entry) = &mut self.entry {
            entry.fault = Some(kind);
        }
    }

    pub(super) fn answered(&mut self, status: u16, node: Option<Uuid>) {
        if let Some(entry) = &mut self.entry {
            (entry.status, entry.node) = (status, node);
        }
    }

    /// Records the request now, because it may end much later.
    pub(super) fn now(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.server.journal().add(entry);
            self.server.changed();
        }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        self.now();
    }
}
