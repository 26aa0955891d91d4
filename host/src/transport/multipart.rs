//! Reads a `multipart/form-data` body while it arrives: downloads of a node, uploads to the dev server.
//!
//! [`Parser`] is a state machine without I/O. Bytes enter through [`Parser::feed`] and [`Parser::end`]. [`Parser::next`]
//! returns events. It buffers at most a header block, never a body. A part with a `size` is counted, not searched, so it
//! may contain the boundary. A body that is cut off, miscounted or malformed is an error, never a shorter success.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};

/// Largest header block of a part, in bytes.
pub(crate) const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Longest accepted boundary, in bytes. The standard allows 70.
const BOUNDARY_BYTES_MAX: usize = 200;

/// Why a body is not valid multipart.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PartsError {
    #[error("expected Content-Type multipart/form-data with a boundary, found {0}")]
    ContentType(String),
    #[error("no boundary was found in the multipart body")]
    NoBoundary,
    #[error("the multipart body ends too early: {0}")]
    Truncated(&'static str),
    #[error("a part has more bytes than its size of {0}")]
    LongerThanSize(u64),
    #[error("a part's header block has more than {HEAD_BYTES_MAX} bytes")]
    HeadTooLarge,
    #[error("a part's headers are malformed: {0}")]
    Head(&'static str),
}

/// The headers of a part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PartHead {
    pub(crate) id: Option<String>,
    pub(crate) domain_id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) data_type: Option<String>,
    pub(crate) size: Option<u64>,
    /// The text of the service. It is only compared.
    pub(crate) updated_at: Option<String>,
    /// SHA-256 of the body, if a digest header has it.
    pub(crate) sha256: Option<[u8; 32]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PartsEvent {
    /// A part begins.
    Part(PartHead),
    /// Some bytes of its body, never empty.
    Data(Bytes),
    /// The part is complete, and the delimiter after it was read.
    PartEnd,
    /// The closing delimiter. It is the last event.
    End,
}

#[derive(Debug)]
enum State {
    /// Before the first delimiter.
    Preamble,
    /// In a header block.
    Head { lf: bool },
    /// In a body of known length.
    Sized { left: u64, size: u64 },
    /// After such a body. Only a line end may precede the delimiter.
    Between { size: u64 },
    /// In a body without `size`, which ends at a delimiter on its own line.
    Searched { lf: bool, begun: bool },
    /// After the closing delimiter.
    Ended,
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Parser {
    delimiter: Vec<u8>,
    buffer: Bytes,
    ended: bool,
    state: State,
    /// Whether anything but line ends has arrived.
    has_content: bool,
}

/// What a position in the buffer holds.
enum Delimiter {
    /// Not a delimiter (for instance a longer word with the same beginning).
    None,
    /// More bytes are needed to decide.
    Open,
    /// A part follows. The fields are the bytes to skip, and whether its line ended in a bare LF.
    Part { skip: usize, lf: bool },
    /// The closing delimiter.
    Close,
}

impl Parser {
    /// A parser for bodies of this `Content-Type`.
    pub(crate) fn new(content_type: &str) -> Result<Self, PartsError> {
        let refused = || PartsError::ContentType(super::excerpt(content_type.as_bytes()));
        let (kind, rest) = content_type.split_once(';').ok_or_else(refused)?;
        if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
            return Err(refused());
        }
        let parameters = parameters(rest).map_err(|_| refused())?;
        let boundary = parameters.into_iter().find(|(name, _)| name.eq_ignore_ascii_case("boundary"));
        let boundary = boundary.map(|(_, value)| value).unwrap_or_default();
        if boundary.is_empty() || boundary.len() > BOUNDARY_BYTES_MAX {
            return Err(refused());
        }
        let delimiter = format!("--{boundary}").into_bytes();
        Ok(Self { delimiter, buffer: Bytes::new(), ended: false, state: State::Preamble, has_content: false })
    }

    /// Adds the next bytes of the body. Call [`Parser::next`] until it returns `None` in between.
    pub(crate) fn feed(&mut self, bytes: Bytes) {
        self.has_content |= bytes.iter().any(|byte| !matches!(byte, b'\r' | b'\n'));
        if self.buffer.is_empty() {
            self.buffer = bytes;
        } else {
            let mut joined = BytesMut::with_capacity(self.buffer.len() + bytes.len());
            joined.extend_from_slice(&self.buffer);
            joined.extend_from_slice(&bytes);
            self.buffer = joined.freeze();
        }
    }

    /// Marks the end of the body.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    /// The next event. `None`: more bytes are needed. After [`Parser::end`] it means that there are no more events.
    pub(crate) fn next(&mut self) -> Result<Option<PartsEvent>, PartsError> {
        loop {
            match self.state {
                State::Preamble => {
                    let Some(skip) = self.find_in_preamble()? else { return Ok(None) };
                    if let Some(event) = self.pass(skip)? {
                        return Ok(Some(event));
                    }
                }
                State::Head { lf } => return self.head(lf),
                State::Sized { left: 0, size } => self.state = State::Between { size },
                State::Sized { left, size } => {
                    if self.buffer.is_empty() {
                        return self.need_more("a part has fewer bytes than its size");
                    }
                    let take = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
                    self.state = State::Sized { left: left - take as u64, size };
                    return Ok(Some(PartsEvent::Data(self.buffer.split_to(take))));
                }
                State::Between { size } => {
                    let skip = line_end(&self.buffer).unwrap_or(0);
                    match self.delimiter_at(skip) {
                        Delimiter::Part { .. } | Delimiter::Close => {
                            return Ok(Some(self.end_part(skip)));
                        }
                        Delimiter::Open => return Ok(None),
                        // A CR alone may be the beginning of a line end. At the end of the body, a partial delimiter
                        // means that the body was cut off.
                        Delimiter::None if !self.ended && *self.buffer == *b"\r" => return Ok(None),
                        Delimiter::None if self.ended && self.cut_off(skip) => {
                            return Err(PartsError::Truncated("the closing boundary is missing"));
                        }
                        Delimiter::None => return Err(PartsError::LongerThanSize(size)),
                    }
                }
                State::Searched { lf, begun } => return self.search(lf, begun),
                State::Ended => {
                    self.buffer.clear();
                    return Ok(None);
                }
            }
        }
    }

    /// Waits for more bytes. At the end of the body, `what` is the error.
    fn need_more(&self, what: &'static str) -> Result<Option<PartsEvent>, PartsError> {
        if self.ended { Err(PartsError::Truncated(what)) } else { Ok(None) }
    }

    /// What the buffer holds at `at`, where a delimiter may begin.
    fn delimiter_at(&self, at: usize) -> Delimiter {
        let rest = &self.buffer[at.min(self.buffer.len())..];
        if rest.len() < self.delimiter.len() {
            return if !self.ended && self.delimiter.starts_with(rest) { Delimiter::Open } else { Delimiter::None };
        }
        let Some(tail) = rest.strip_prefix(self.delimiter.as_slice()) else { return Delimiter::None };
        if tail.starts_with(b"--") {
            return Delimiter::Close;
        }
        let blank = tail.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        let after = &tail[blank..];
        match line_end(after) {
            Some(end) => Delimiter::Part { skip: self.delimiter.len() + blank + end, lf: end == 1 },
            None if self.ended || blank > HEAD_BYTES_MAX => Delimiter::None,
            None if after.is_empty() || after == b"\r" || tail == b"-" => Delimiter::Open,
            None => Delimiter::None,
        }
    }

    /// Skips the text before the first delimiter. Returns the position of the delimiter, once it is certain.
    fn find_in_preamble(&mut self) -> Result<Option<usize>, PartsError> {
        let mut from = 0;
        while let Some(at) = find(&self.buffer[from..], self.delimiter[0]) {
            let at = from + at;
            match self.delimiter_at(at) {
                Delimiter::Part { .. } | Delimiter::Close => return Ok(Some(at)),
                Delimiter::Open => {
                    let _ = self.buffer.split_to(at);
                    return Ok(None);
                }
                Delimiter::None => from = at + 1,
            }
        }
        self.buffer.clear();
        match (self.ended, self.has_content) {
            (true, true) => Err(PartsError::NoBoundary),
            _ => Ok(None),
        }
    }

    /// Skips the delimiter at `skip`. There must be one.
    fn pass(&mut self, skip: usize) -> Result<Option<PartsEvent>, PartsError> {
        match self.delimiter_at(skip) {
            Delimiter::Part { skip: more, lf } => {
                let _ = self.buffer.split_to(skip + more);
                self.state = State::Head { lf };
                Ok(None)
            }
            _ => {
                self.buffer.clear();
                self.state = State::Ended;
                Ok(Some(PartsEvent::End))
            }
        }
    }

    /// Whether the rest from `at` on is empty, or the beginning of a delimiter line.
    fn cut_off(&self, at: usize) -> bool {
        let rest = &self.buffer[at..];
        let tail = rest.strip_prefix(self.delimiter.as_slice());
        self.delimiter.starts_with(rest) || tail.is_some_and(|tail| tail.len() < 2) || *rest == *b"\r"
    }

    /// Drops the line end before a delimiter and leaves the delimiter for the next call.
    fn end_part(&mut self, skip: usize) -> PartsEvent {
        let _ = self.buffer.split_to(skip);
        self.state = State::Preamble;
        PartsEvent::PartEnd
    }

    fn head(&mut self, lf: bool) -> Result<Option<PartsEvent>, PartsError> {
        let mut at = 0;
        let mut lines = Vec::new();
        while let Some(end) = find(&self.buffer[at..], b'\n') {
            let line = &self.buffer[at..at + end];
            at += end + 1;
            if at > HEAD_BYTES_MAX {
                return Err(PartsError::HeadTooLarge);
            }
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.is_empty() {
                let head = parse_head(&lines)?;
                let _ = self.buffer.split_to(at);
                self.state = match head.size {
                    Some(size) => State::Sized { left: size, size },
                    None => State::Searched { lf, begun: false },
                };
                return Ok(Some(PartsEvent::Part(head)));
            }
            lines.push(line);
        }
        if self.buffer.len() > HEAD_BYTES_MAX {
            return Err(PartsError::HeadTooLarge);
        }
        self.need_more("it stops inside a header block")
    }

    /// Reads a body without `size`: all bytes before a line end and a delimiter.
    fn search(&mut self, lf: bool, begun: bool) -> Result<Option<PartsEvent>, PartsError> {
        let end: &[u8] = if lf { b"\n" } else { b"\r\n" };
        // An empty body may have no line end of its own before the delimiter.
        if !begun {
            match self.delimiter_at(0) {
                Delimiter::Part { .. } | Delimiter::Close => {
                    return Ok(Some(self.end_part(0)));
                }
                Delimiter::Open => return self.need_more("the closing boundary is missing"),
                Delimiter::None => {}
            }
        }
        let mut from = 0;
        let safe = loop {
            let Some(at) = find(&self.buffer[from..], end[0]) else { break self.buffer.len() };
            let at = from + at;
            let rest = &self.buffer[at..];
            if rest.len() < end.len() {
                break if self.ended { self.buffer.len() } else { at };
            }
            if rest.starts_with(end) {
                match self.delimiter_at(at + end.len()) {
                    Delimiter::Part { .. } | Delimiter::Close if at == 0 => {
                        return Ok(Some(self.end_part(end.len())));
                    }
                    Delimiter::Part { .. } | Delimiter::Close | Delimiter::Open => break at,
                    Delimiter::None => {}
                }
            }
            from = at + 1;
        };
        if safe == 0 {
            return self.need_more("the closing boundary is missing");
        }
        self.state = State::Searched { lf, begun: true };
        Ok(Some(PartsEvent::Data(self.buffer.split_to(safe))))
    }
}

fn find(bytes: &[u8], wanted: u8) -> Option<usize> {
    memchr::memchr(wanted, bytes)
}

/// The length of a line end at the beginning of `bytes`.
fn line_end(bytes: &[u8]) -> Option<usize> {
    match bytes {
        [b'\n', ..] => Some(1),
        [b'\r', b'\n', ..] => Some(2),
        _ => None,
    }
}

fn parse_head(lines: &[&[u8]]) -> Result<PartHead, PartsError> {
    let mut disposition = None;
    let mut sha256 = None;
    for line in lines {
        let line = std::str::from_utf8(line).map_err(|_| PartsError::Head("they are not UTF-8"))?;
        let (name, value) = line.split_once(':').ok_or(PartsError::Head("a line has no colon"))?;
        if name.is_empty() || name.contains([' ', '\t']) {
            return Err(PartsError::Head("a header name is empty or holds a space"));
        }
        if name.eq_ignore_ascii_case("content-disposition") && disposition.is_none() {
            disposition = Some(value);
        } else if DIGEST_HEADERS.iter().any(|digest| name.eq_ignore_ascii_case(digest)) {
            sha256 = sha256.or_else(|| parse_digest(value));
        }
    }
    let disposition = disposition.ok_or(PartsError::Head("Content-Disposition is missing"))?;
    let given = disposition.split_once(';').map_or("", |(_, given)| given);
    let mut head = PartHead { sha256, ..PartHead::default() };
    for (name, value) in parameters(given)? {
        match name.to_ascii_lowercase().as_str() {
            "id" => head.id.get_or_insert(value),
            "domain-id" => head.domain_id.get_or_insert(value),
            "name" => head.name.get_or_insert(value),
            "data-type" => head.data_type.get_or_insert(value),
            "updated-at" => head.updated_at.get_or_insert(value),
            "size" => {
                // `parse` would accept a leading plus sign too.
                let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
                let size = value.parse().ok().filter(|_| digits);
                let size: u64 = size.ok_or(PartsError::Head("size is not a decimal number"))?;
                head.size.get_or_insert(size);
                continue;
            }
            _ => continue,
        };
    }
    Ok(head)
}

/// Headers that may carry a digest of the body (RFC 9530, RFC 3230).
pub(crate) const DIGEST_HEADERS: [&str; 3] = ["repr-digest", "content-digest", "digest"];

/// The SHA-256 in `sha-256=:<base64>:` or `SHA-256=<base64>`, with or without other algorithms.
pub(crate) fn parse_digest(value: &str) -> Option<[u8; 32]> {
    value.split(',').find_map(|one| {
        let (name, digest) = one.split_once('=')?;
        let digest = digest.trim().trim_matches(':');
        let decoded = STANDARD.decode(digest).ok().filter(|_| name.trim().eq_ignore_ascii_case("sha-256"))?;
        decoded.try_into().ok()
    })
}

/// `; name=value; name="quoted; value"`. Inside quotes, a backslash escapes a quote or a backslash.
fn parameters(text: &str) -> Result<Vec<(String, String)>, PartsError> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if let Some(next) = rest.strip_prefix(';') {
            rest = next.trim_start();
            continue;
        }
        let stop = rest.find([';', '=']).unwrap_or(rest.len());
        let name = rest[..stop].trim().to_owned();
        let Some(after) = rest[stop..].strip_prefix('=') else {
            rest = &rest[stop..];
            continue;
        };
        let after = after.trim_start();
        let value;
        if let Some(quoted) = after.strip_prefix('"') {
            let mut text = String::new();
            let mut chars = quoted.char_indices().peekable();
            let end = loop {
                match chars.next() {
                    None => return Err(PartsError::Head("a quoted value does not end")),
                    Some((at, '"')) => break at,
                    Some((_, '\\')) => match chars.next_if(|(_, c)| matches!(c, '"' | '\\')) {
                        Some((_, escaped)) => text.push(escaped),
                        None => text.push('\\'),
                    },
                    Some((_, c)) => text.push(c),
                }
            };
            value = text;
            rest = quoted[end + 1..].trim_start();
            if !rest.is_empty() && !rest.starts_with(';') {
                return Err(PartsError::Head("text follows a quoted value"));
            }
        } else {
            let stop = after.find(';').unwrap_or(after.len());
            value = after[..stop].trim().to_owned();
            rest = &after[stop..];
        }
        found.push((name, value));
    }
    Ok(found)
}

#[cfg(test)]
#[path = "multipart_tests.rs"]
mod tests;
