//! Reads ascii data word by word. A line may have any length, and memory use stays constant.
#![forbid(unsafe_code)]

use std::io::BufRead;

use super::header::Scalar;
use super::reader::buffered;
use super::{PlyError, quote};

/// Maximum length of a number. `%f` of the largest double takes 317 bytes.
const WORD_BYTES_MAX: usize = 512;

/// The result of [`Words::next`].
#[derive(PartialEq, Eq)]
pub(super) enum Found {
    Word,
    LineEnd,
    DataEnd,
}

/// The current reading position.
pub(super) struct Words<'a, R> {
    pub(super) from: &'a mut R,
    pub(super) line: &'a mut u64,
    pub(super) word: &'a mut Vec<u8>,
}

impl<R: BufRead> Words<'_, R> {
    /// Reads the next word. It stops before the end of the line unless `cross` is true.
    pub(super) fn next(&mut self, cross: bool) -> Result<Found, PlyError> {
        self.word.clear();
        loop {
            let held = buffered(self.from)?;
            if held.is_empty() {
                return Ok(if self.word.is_empty() { Found::DataEnd } else { Found::Word });
            }
            let mut used = 0;
            let mut end = None;
            for byte in held {
                if !byte.is_ascii_whitespace() {
                    self.word.push(*byte);
                    if self.word.len() > WORD_BYTES_MAX {
                        return Err(self.error(format!("a number of at most {WORD_BYTES_MAX} bytes")));
                    }
                } else if !self.word.is_empty() {
                    end = Some(Found::Word);
                    break;
                } else if *byte == b'\n' {
                    if !cross {
                        end = Some(Found::LineEnd);
                        break;
                    }
                    *self.line += 1;
                }
                used += 1;
            }
            self.from.consume(used);
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    /// Reads the next number of a row that has `read` numbers so far. Returns `false` when the data ends.
    pub(super) fn next_in_row(&mut self, read: u64) -> Result<bool, PlyError> {
        match self.next(read == 0)? {
            Found::Word => Ok(true),
            Found::DataEnd => Ok(false),
            Found::LineEnd => {
                Err(self.found(format!("more than {read} values in this row"), "the end of the line".into()))
            }
        }
    }

    pub(super) fn end_of_row(&mut self, read: u64) -> Result<(), PlyError> {
        match self.next(false)? {
            Found::Word => Err(self.error(format!("{read} values in this row"))),
            Found::LineEnd | Found::DataEnd => Ok(()),
        }
    }

    pub(super) fn integer(&self, scalar: Scalar) -> Result<i64, PlyError> {
        // Every integer type of the format fits exactly into a double.
        self.number(scalar).map(|value| value as i64)
    }

    pub(super) fn number(&self, scalar: Scalar) -> Result<f64, PlyError> {
        let text = std::str::from_utf8(self.word).unwrap_or_default();
        let value = text.parse::<f64>().ok().or_else(|| {
            // C libraries print a value that is not a number like this: `-nan(ind)`, `1.#QNAN`.
            let unsigned = text.trim_start_matches(['-', '+']);
            (unsigned.starts_with("nan(") || unsigned.starts_with("1.#")).then_some(f64::NAN)
        });
        let fits = |value: &f64| match scalar.range() {
            Some((least, most)) => value.fract() == 0.0 && (least..=most).contains(value),
            None => true,
        };
        value.filter(fits).ok_or_else(|| self.error(format!("a number of type {}", scalar.keyword())))
    }

    pub(super) fn error(&self, expected: String) -> PlyError {
        self.found(expected, quote(self.word))
    }

    fn found(&self, expected: String, found: String) -> PlyError {
        PlyError::Line { line: *self.line, expected, found }
    }
}
