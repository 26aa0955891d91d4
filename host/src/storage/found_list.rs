//! The answer to a query of inputs that are known without a request.

use async_trait::async_trait;
use bytes::Bytes;

use crate::model::{DataQuery, FoundData, InputMeta, InputStream, PortError};

/// Most bytes of a piece, except for its last line.
const PIECE_BYTES: usize = 64 * 1024;

/// A line of JSON for each input that matches a query.
pub(super) struct FoundList<T> {
    inputs: T,
    query: DataQuery,
    meta: InputMeta,
}

impl<T: Iterator<Item = FoundData> + Send> FoundList<T> {
    /// Searches `inputs`.
    ///
    /// # Errors
    /// One line about a query with a mistake.
    pub(super) fn new(inputs: T, query: DataQuery) -> Result<Self, PortError> {
        query.check()?;
        Ok(Self { inputs, query, meta: InputMeta::default() })
    }
}

#[async_trait]
impl<T: Iterator<Item = FoundData> + Send> InputStream for FoundList<T> {
    fn meta(&self) -> &InputMeta {
        &self.meta
    }

    async fn next(&mut self) -> Result<Option<Bytes>, PortError> {
        let mut lines = Vec::new();
        while lines.len() < PIECE_BYTES {
            match self.inputs.find(|input| self.query.matches(input)) {
                Some(input) => input.write_line(&mut lines),
                None => break,
            }
        }
        Ok(if lines.is_empty() { None } else { Some(lines.into()) })
    }
}
