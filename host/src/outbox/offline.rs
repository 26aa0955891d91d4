//! The outbox of a node that does not run. Its reports can be listed, dropped and added.

use std::{collections::HashSet, path::Path};

use super::{
    entry::{Entry, ImportedReports, Listing, ListingState, Tries},
    state::{StateDir, StateError, failed},
    store::{Change, FILE, Store},
};
use crate::model::TaskId;

/// Why it cannot be opened: one line.
#[derive(Debug, thiserror::Error)]
pub enum OfflineOutboxError {
    /// The folder cannot be used, or a node runs on it.
    #[error(transparent)]
    State(#[from] StateError),
    /// The file has no content. A node never leaves it so.
    #[error("{path} is empty: it has 0 bytes, its reports are lost; a node that starts there creates a new one", path = path.display())]
    Empty {
        /// The file.
        path: std::path::PathBuf,
    },
    /// The file cannot be read or written.
    #[error("{path}: {reason}; a node that starts there sets a damaged file aside", path = path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// The error.
        reason: String,
    },
}

/// See the module documentation. It holds the folder, so no node can start there while it exists.
pub struct OfflineOutbox {
    state: StateDir,
    store: Store,
    reports: Vec<(u64, Entry, Tries)>,
    /// The number of the next report.
    next: u64,
}

impl OfflineOutbox {
    /// Opens the outbox in a state folder. It creates nothing if there is no outbox.
    ///
    /// # Errors
    /// When the folder cannot be read or is in use (see [`StateError::InUse`]), or the file cannot be read.
    pub fn open(folder: &Path) -> Result<Option<Self>, OfflineOutboxError> {
        let file = folder.join(FILE);
        // An unreadable folder must not look like an empty outbox.
        if !file.try_exists().map_err(failed("open", &file))? {
            return Ok(None);
        }
        let state = StateDir::open(folder)?;
        let file = state.path().join(FILE);
        if std::fs::metadata(&file).map_err(failed("open", &file))?.len() == 0 {
            return Err(OfflineOutboxError::Empty { path: file });
        }
        let (store, rows) = Store::open(&file).map_err(|err| bad_file(&state, &err))?;
        let next = rows.iter().map(|(number, _)| number.saturating_add(1)).max().unwrap_or_default();
        let reports = rows.into_iter().filter_map(|(number, bytes)| {
            let (entry, tries) = Entry::decode(&bytes).ok()?;
            Some((number, entry, tries))
        });
        Ok(Some(Self { reports: reports.collect(), next, store, state }))
    }

    /// Every report, the oldest first.
    #[must_use]
    pub fn listings(&self, tasks: Option<&HashSet<TaskId>>) -> Vec<Listing> {
        let wanted = self.reports.iter().filter(|(_, entry, _)| wants(tasks, entry));
        wanted.map(|(_, entry, tries)| listing(entry, tries)).collect()
    }

    /// Sends these tasks' reports, or all, after the next start, also those that were set aside. Returns the reports.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn retry(&mut self, tasks: Option<&HashSet<TaskId>>) -> Result<Vec<Listing>, OfflineOutboxError> {
        let wanted = self.reports.iter_mut().filter(|(_, entry, _)| wants(tasks, entry));
        let changed = wanted
            .filter_map(|(number, entry, tries)| tries.take_back().then(|| Change::Put(*number, entry.encode(tries))));
        let changed: Vec<_> = changed.collect();
        if !changed.is_empty() {
            self.store.apply(changed).map_err(|err| bad_file(&self.state, &err))?;
        }
        Ok(self.listings(tasks))
    }

    /// Adds reports from another file under new numbers. Reports that are here already do not change. Returns the new
    /// ones.
    ///
    /// # Errors
    /// When the file cannot be written. Then no report was added.
    pub fn take_up(&mut self, imported: ImportedReports) -> Result<Vec<Listing>, OfflineOutboxError> {
        let new = imported.missing_in(self.reports.iter().map(|(_, entry, _)| entry));
        let new: Vec<_> = (self.next..).zip(new).map(|(number, (entry, tries))| (number, entry, tries)).collect();
        let puts = new.iter().map(|(number, entry, tries)| Change::Put(*number, entry.encode(tries)));
        self.store.apply(puts).map_err(|err| bad_file(&self.state, &err))?;
        self.next += new.len() as u64;
        let listings = new.iter().map(|(_, entry, tries)| listing(entry, tries)).collect();
        self.reports.extend(new);
        Ok(listings)
    }

    /// Deletes these tasks' reports, or all. Returns the deleted ones.
    ///
    /// # Errors
    /// When the file cannot be written. Then nothing was deleted.
    pub fn drop_reports(&mut self, tasks: Option<&HashSet<TaskId>>) -> Result<Vec<Listing>, OfflineOutboxError> {
        let listings = self.listings(tasks);
        let gone = self.reports.iter().filter(|(_, entry, _)| wants(tasks, entry));
        let gone: Vec<_> = gone.map(|(number, _, _)| Change::Remove(*number)).collect();
        self.store.apply(gone).map_err(|err| bad_file(&self.state, &err))?;
        self.reports.retain(|(_, entry, _)| !wants(tasks, entry));
        Ok(listings)
    }
}

fn listing(entry: &Entry, tries: &Tries) -> Listing {
    Listing::new(entry, tries, if tries.set_aside { ListingState::SetAside } else { ListingState::Waiting })
}

fn wants(tasks: Option<&HashSet<TaskId>>, entry: &Entry) -> bool {
    tasks.is_none_or(|tasks| tasks.contains(entry.task()))
}

fn bad_file(state: &StateDir, err: &impl ToString) -> OfflineOutboxError {
    OfflineOutboxError::File { path: state.path().join(FILE), reason: err.to_string() }
}
