//! What was asked of the world lately: for tests, which can wait for a request instead of sleeping,
//! and for people who wonder what a node does.

use std::collections::VecDeque;

use serde::Serialize;
use uuid::Uuid;

/// One answered request. No query, no header and no body: they may hold tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// Counts all requests since the start, from 0.
    pub number: u64,
    /// The method.
    pub method: String,
    /// The path without query.
    pub path: String,
    /// The status of the answer.
    pub status: u16,
    /// The node that asked, where it showed a good node token.
    pub node: Option<Uuid>,
}

/// The newest requests, bounded.
pub(super) struct Journal {
    seen: VecDeque<Seen>,
    max: usize,
    next: u64,
}

impl Journal {
    pub(super) fn new(max: usize) -> Self {
        Self { seen: VecDeque::new(), max, next: 0 }
    }

    pub(super) fn enabled(&self) -> bool {
        self.max > 0
    }

    pub(super) fn add(&mut self, method: String, path: String, status: u16, node: Option<Uuid>) {
        if self.seen.len() >= self.max {
            self.seen.pop_front();
        }
        self.seen.push_back(Seen { number: self.next, method, path, status, node });
        self.next += 1;
    }

    /// Requests from `number` on that are still remembered, and the number after the newest.
    pub(super) fn since(&self, number: u64) -> (u64, Vec<Seen>) {
        (self.next, self.seen.iter().filter(|seen| seen.number >= number).cloned().collect())
    }
}
