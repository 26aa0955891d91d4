//! Reads and writes PLY files as streams of points.
//!
//! [`Reader`] accepts the three encodings. It accepts properties of any order and type, and other elements before
//! or after the vertices. It holds one row at a time. It trusts no count until the data confirms it. [`Writer`]
//! writes positions and colours only. The grammar of the header is in `header`.
#![forbid(unsafe_code)]

mod header;
mod reader;
mod words;
mod writer;

pub use header::{Element, Encoding, HEADER_BYTES_MAX, Header, Kind, Property, Scalar};
pub use reader::Reader;
pub use writer::{Layout, Writer};

use std::io;

/// The reason why a PLY file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PlyError {
    /// A line of the header or of ascii data is invalid.
    #[error("line {line}: expected {expected}, found {found}")]
    Line {
        /// Line number, from 1.
        line: u64,
        /// The expected text.
        expected: String,
        /// The text that was found, shortened.
        found: String,
    },
    /// The header does not end within the limit.
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
        /// Number of rows in the header.
        promised: u64,
        /// Number of whole rows in the data.
        found: u64,
    },
    /// The data continues after the end that the header states.
    #[error("the data goes on after the last row the header promises: its counts or types do not fit the data")]
    Trailing,
    /// The length of a list is negative.
    #[error("row {row} of element {element}: expected a list length of 0 or more, found {found}")]
    ListLength {
        /// The element, quoted.
        element: String,
        /// Row number, from 1.
        row: u64,
        /// The length that was read.
        found: i64,
    },
    /// The bytes could not be read from the source.
    #[error("the data could not be read")]
    Read(#[source] io::Error),
}

/// Formats text of a file for an error: quoted, printable and short.
fn quote(text: &[u8]) -> String {
    const SHOWN_MAX: usize = 40;
    let shown: String = text.iter().take(SHOWN_MAX).flat_map(|byte| byte.escape_ascii()).map(char::from).collect();
    let more = if text.len() > SHOWN_MAX { "…" } else { "" };
    format!("`{shown}{more}`")
}

#[cfg(test)]
mod tests;
