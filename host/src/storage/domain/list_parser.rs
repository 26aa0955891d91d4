//! Reads the answer to a list, `{"data": [entry, …], …}`, one entry at a time. Pure: bytes in, entries out.
//!
//! It holds the bytes that were fed last, and at most one incomplete value.

use bytes::{Buf, BytesMut};
use serde::de::{DeserializeOwned, IgnoredAny};

use super::wire::MetadataJson;

/// The largest entry, or other value of the answer, in bytes. Usual ones have a few hundred.
pub(super) const VALUE_BYTES_MAX: usize = 64 * 1024;

/// Why an answer is not a list.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ListError {
    #[error("the answer ended before its last entry")]
    Truncated,
    #[error("a value in the answer is longer than {VALUE_BYTES_MAX} bytes")]
    TooLong,
    #[error("the answer is not a list of data: {0}")]
    Malformed(String),
}

/// See the module documentation.
#[derive(Default)]
pub(super) struct ListParser {
    buffer: BytesMut,
    ended: bool,
    found_list: bool,
    next: Next,
    /// Of the value at the beginning of the buffer.
    scan: Scan,
}

/// Looks for the end of a value, without a second look at a byte. It trusts the value to be JSON.
#[derive(Default)]
struct Scan {
    at: usize,
    depth: usize,
    in_text: bool,
    /// The next character of the text has no meaning of its own.
    escaped: bool,
}

/// What the answer must continue with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Next {
    #[default]
    Object,
    /// Or the end of the object.
    FirstName,
    Name,
    ColonBeforeList,
    ColonBeforeValue,
    List,
    /// A value that is skipped.
    Value,
    /// Or the end of the object.
    CommaAfterValue,
    /// Or the end of the list.
    FirstEntry,
    Entry,
    /// Or the end of the list.
    CommaAfterEntry,
    Nothing,
}

impl ListParser {
    /// Adds bytes of the answer.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// No more bytes follow.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    /// Whether the answer is complete.
    pub(super) fn is_complete(&self) -> bool {
        self.next == Next::Nothing
    }

    /// The next entry. `None`: there are no more, or the next one is incomplete.
    pub(super) fn next(&mut self) -> Result<Option<MetadataJson>, ListError> {
        loop {
            let spaces = self.buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.buffer.advance(spaces);
            let Some(&first) = self.buffer.first() else { return self.incomplete() };
            self.next = match (self.next, first) {
                (Next::Object, b'{') => self.passed(Next::FirstName),
                (Next::FirstName | Next::Name, b'"') => match self.value::<String>()? {
                    Some(name) if name == "data" && !self.found_list => Next::ColonBeforeList,
                    Some(_) => Next::ColonBeforeValue,
                    None => return self.incomplete(),
                },
                (Next::ColonBeforeList, b':') => self.passed(Next::List),
                (Next::ColonBeforeValue, b':') => self.passed(Next::Value),
                (Next::List, b'[') => {
                    self.found_list = true;
                    self.passed(Next::FirstEntry)
                }
                (Next::FirstEntry | Next::Entry, b'{') => match self.value::<MetadataJson>()? {
                    Some(entry) => {
                        self.next = Next::CommaAfterEntry;
                        return Ok(Some(entry));
                    }
                    None => return self.incomplete(),
                },
                (Next::CommaAfterEntry, b',') => self.passed(Next::Entry),
                (Next::FirstEntry | Next::CommaAfterEntry, b']') => self.passed(Next::CommaAfterValue),
                (Next::Value, _) => match self.value::<IgnoredAny>()? {
                    Some(_) => Next::CommaAfterValue,
                    None => return self.incomplete(),
                },
                (Next::CommaAfterValue, b',') => self.passed(Next::Name),
                (Next::FirstName | Next::CommaAfterValue, b'}') if self.found_list => self.passed(Next::Nothing),
                (next, first) => {
                    let found = char::from(first);
                    return Err(ListError::Malformed(format!("expected {}, found {found:?}", next.words())));
                }
            };
        }
    }

    /// Removes one byte.
    fn passed(&mut self, next: Next) -> Next {
        self.buffer.advance(1);
        next
    }

    /// Removes a value. `None`: it is incomplete.
    fn value<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ListError> {
        match self.scan.end(&self.buffer) {
            Some(length) => {
                self.scan = Scan::default();
                let json = self.buffer.split_to(length);
                serde_json::from_slice(&json).map(Some).map_err(|err| ListError::Malformed(err.to_string()))
            }
            None if self.buffer.len() > VALUE_BYTES_MAX => Err(ListError::TooLong),
            None => Ok(None),
        }
    }

    fn incomplete(&self) -> Result<Option<MetadataJson>, ListError> {
        if self.ended && !self.is_complete() { Err(ListError::Truncated) } else { Ok(None) }
    }
}

impl Scan {
    /// The length of the value at the beginning of `bytes`. `None`: more bytes may belong to it.
    fn end(&mut self, bytes: &[u8]) -> Option<usize> {
        for byte in &bytes[self.at..] {
            let before = self.at;
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_text => self.escaped = true,
                b'"' => self.in_text = !self.in_text,
                _ if self.in_text => continue,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' | b',' | b':' if self.depth == 0 => return Some(before),
                b'}' | b']' => self.depth -= 1,
                byte if byte.is_ascii_whitespace() && self.depth == 0 => return Some(before),
                // Within an array, an object or a number.
                _ => continue,
            }
            if self.depth == 0 && !self.in_text {
                return Some(self.at);
            }
        }
        None
    }
}

impl Next {
    fn words(self) -> &'static str {
        match self {
            Self::Object => "an object",
            Self::FirstName | Self::Name => "a name in the object with `data`",
            Self::ColonBeforeList | Self::ColonBeforeValue => "a colon",
            Self::List => "an array",
            Self::Value => "a value",
            Self::CommaAfterValue => "a name or the end of the object, which has `data`",
            Self::FirstEntry | Self::Entry => "an entry",
            Self::CommaAfterEntry => "a comma or the end of the array",
            Self::Nothing => "nothing more",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ids that come from `text`, fed in pieces of `size` bytes.
    fn ids(text: &str, size: usize) -> Result<Vec<String>, ListError> {
        let (mut parser, mut ids) = (ListParser::default(), Vec::new());
        for piece in text.as_bytes().chunks(size) {
            parser.feed(piece);
            while let Some(entry) = parser.next()? {
                ids.push(entry.id);
            }
        }
        parser.end();
        assert!(parser.next()?.is_none());
        Ok(ids)
    }

    #[test]
    fn entries_come_from_pieces_of_any_size() {
        for (text, expected) in [
            (r#"{"data":[]}"#, &[][..]),
            (r#" { "data" : [ { "id" : "a" } , {"id":"b"} ] } "#, &["a", "b"]),
            (r#"{"n":12,"x":{"data":[{"id":"no"}]},"data":[{"id":"a\"]é","of":[{}]}],"t":1.5}"#, &["a\"]é"]),
            (r#"{"data":[{"id":"a","size":18446744073709551615,"name":null}],"data":[7]}"#, &["a"]),
        ] {
            for size in [1, 2, 3, 7, 1000] {
                assert_eq!(ids(text, size).expect(text), expected, "{text} in pieces of {size}");
            }
        }
    }

    #[test]
    fn answers_that_are_no_lists_are_malformed() {
        for text in [
            "<html>",
            "[]",
            "{}",
            r#"{"data":null}"#,
            r#"{"data":[{}]}"#,
            r#"{"data":[7]}"#,
            r#"{"data":[{"id":"a","size":-1}]}"#,
            r#"{"data":[{"id":"a"},]}"#,
            r#"{"data":[{"id":"a"}{"id":"b"}]}"#,
            r#"{"data":[]]"#,
            r#"{"data":[],}"#,
            r#"{"data":[]}x"#,
            r#"{"a":7"data":[]}"#,
            r#"{a:7}"#,
        ] {
            for size in [1, 1000] {
                assert!(matches!(ids(text, size), Err(ListError::Malformed(_))), "{text}: {:?}", ids(text, size));
            }
        }
        for text in ["", "{", r#"{"data":[{"id":"a"},{"id"#, r#"{"data":[]"#, r#"{"data":[],"n":7"#] {
            assert_eq!(ids(text, 3), Err(ListError::Truncated), "{text}");
        }
    }

    #[test]
    fn parser_holds_one_incomplete_value() {
        let mut parser = ListParser::default();
        parser.feed(b"{\"data\":[");
        for _ in 0..100_000 {
            parser.feed(b"{\"id\":\"a\"},");
            assert!(parser.next().expect("an entry").is_some());
        }
        assert!(parser.buffer.capacity() < VALUE_BYTES_MAX);
        parser.feed(b"{\"id\":\"");
        let mut fed = 0;
        let refused = loop {
            parser.feed(&[b'x'; 1000]);
            fed += 1000;
            match parser.next() {
                Ok(entry) => assert!(entry.is_none()),
                Err(err) => break err,
            }
        };
        assert_eq!(refused, ListError::TooLong);
        assert!(fed < VALUE_BYTES_MAX + 2000);
    }
}
