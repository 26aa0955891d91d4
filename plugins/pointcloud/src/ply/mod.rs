//! PLY files, read as a stream of points and written the same way.
//!
//! [`Reader`] takes the three encodings, any order and type of properties, and other elements before or
//! after the vertices; it holds one row at a time and believes no count before the data has shown it.
//! [`Writer`] writes positions and colours only. The grammar of the header is in `header`.
#![forbid(unsafe_code)]

mod header;
mod reader;
mod words;
mod writer;

pub use header::{Element, Encoding, HEADER_BYTES_MAX, Header, Kind, Property, Scalar};
pub use reader::Reader;
pub use writer::{Layout, Writer};

use std::io;

/// Why a PLY file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PlyError {
    /// A line of the header or of ascii data is not what it should be.
    #[error("line {line}: expected {expected}, found {found}")]
    Line {
        /// Counted from 1.
        line: u64,
        /// What belongs there.
        expected: String,
        /// What stands there, shortened.
        found: String,
    },
    /// The header does not end where it must.
    #[error("no `end_header` in the first {HEADER_BYTES_MAX} bytes: the header is damaged, or this is not PLY")]
    HeaderTooLong,
    /// The header describes no points.
    #[error("{0}")]
    NoPoints(String),
    /// The data holds fewer rows than the header promises.
    #[error("the header promises {promised} rows of element {element}, the data ends after {found}")]
    Truncated {
        /// The element, quoted.
        element: String,
        /// Rows by the header.
        promised: u64,
        /// Whole rows in the data.
        found: u64,
    },
    /// The data goes on where the header says it ends.
    #[error("the data goes on after the last row the header promises: its counts or types do not fit the data")]
    Trailing,
    /// A list says it has fewer than no entries.
    #[error("row {row} of element {element}: expected a list length of 0 or more, found {found}")]
    ListLength {
        /// The element, quoted.
        element: String,
        /// Counted from 1.
        row: u64,
        /// The length as read.
        found: i64,
    },
    /// The bytes themselves could not be had.
    #[error("the data could not be read")]
    Read(#[source] io::Error),
}

/// Shows text of a file in an error: quoted, printable, short.
fn quote(text: &[u8]) -> String {
    const SHOWN_MAX: usize = 40;
    let shown: String = text.iter().take(SHOWN_MAX).flat_map(|byte| byte.escape_ascii()).map(char::from).collect();
    let more = if text.len() > SHOWN_MAX { "…" } else { "" };
    format!("`{shown}{more}`")
}

#[cfg(test)]
mod tests;
