//! A streaming reader of `multipart/form-data` bodies (posemesh.md section 6.4).
//!
//! Pure: bytes are pushed in as they arrive, pieces come out. It holds one frame and a delimiter's
//! length of body, however large a part is. The boundary is looked for only as a whole delimiter
//! (CR LF, two dashes, boundary, then CR LF or two dashes), so a payload may hold the word itself.

use bytes::{Bytes, BytesMut};
use memchr::memmem;

/// Longest header block of a part.
const HEADERS_BYTES_MAX: usize = 16 * 1024;
/// Longest boundary (RFC 2046).
const BOUNDARY_BYTES_MAX: usize = 70;

/// What the parameters of a part's `Content-Disposition` say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PartHead {
    pub(super) id: Option<String>,
    pub(super) name: Option<String>,
    pub(super) data_type: Option<String>,
}

/// What has been read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Part(PartHead),
    Data(Bytes),
    PartEnd,
}

enum At {
    Preamble,
    Headers,
    Body,
    /// Behind the closing delimiter; what follows is ignored.
    End,
}

/// See the module's text.
pub(super) struct Form {
    delimiter: memmem::Finder<'static>,
    buffer: BytesMut,
    at: At,
}

/// The boundary named by a `Content-Type`, quoted or not.
pub(super) fn boundary(content_type: &str) -> Result<String, String> {
    let mut parts = content_type.split(';');
    let kind = parts.next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("multipart/form-data") {
        return Err(format!("Content-Type is {kind:?}, expected multipart/form-data"));
    }
    let value = parts
        .filter_map(|part| part.trim().split_once('='))
        .find_map(|(name, value)| name.trim().eq_ignore_ascii_case("boundary").then_some(value.trim()))
        .map(|value| value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value))
        .unwrap_or_default();
    if value.is_empty() || value.len() > BOUNDARY_BYTES_MAX {
        return Err(format!("Content-Type has no boundary of 1 to {BOUNDARY_BYTES_MAX} characters"));
    }
    Ok(value.to_owned())
}

impl Form {
    pub(super) fn new(boundary: &str) -> Self {
        let delimiter = format!("\r\n--{boundary}");
        // The first delimiter may open the body: the line end in front of it is lent.
        let buffer = BytesMut::from(&b"\r\n"[..]);
        Self { delimiter: memmem::Finder::new(delimiter.as_bytes()).into_owned(), buffer, at: At::Preamble }
    }

    /// Takes the next bytes of the body. Call [`Form::next`] until it has nothing more.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.at, At::End) {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next piece, or `None` when more bytes are needed.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, String> {
        loop {
            match self.at {
                At::End => return Ok(None),
                At::Headers => {
                    let Some(length) = memmem::find(&self.buffer, b"\r\n\r\n") else {
                        if self.buffer.len() > HEADERS_BYTES_MAX {
                            return Err(format!("the headers of a part are longer than {HEADERS_BYTES_MAX} bytes"));
                        }
                        return Ok(None);
                    };
                    let block = self.buffer.split_to(length + 4);
                    // A part without any payload is followed by its delimiter at once; the line end
                    // of the blank line does not belong to it, the writer sends another.
                    self.at = At::Body;
                    return head(&block[..length]).map(|head| Some(Piece::Part(head)));
                }
                At::Preamble | At::Body => {
                    let in_body = matches!(self.at, At::Body);
                    let Some(data) = self.until_delimiter() else {
                        match self.after_delimiter() {
                            After::Incomplete => return Ok(None),
                            After::Part => self.at = At::Headers,
                            After::End => self.at = At::End,
                        }
                        if in_body {
                            return Ok(Some(Piece::PartEnd));
                        }
                        continue;
                    };
                    if data.is_empty() {
                        return Ok(None);
                    }
                    if in_body {
                        return Ok(Some(Piece::Data(data)));
                    }
                }
            }
        }
    }

    /// Whether the closing delimiter has been read.
    pub(super) fn ended(&self) -> bool {
        matches!(self.at, At::End)
    }

    /// Data up to the next delimiter; empty: more bytes are needed; `None`: a delimiter comes next.
    fn until_delimiter(&mut self) -> Option<Bytes> {
        let delimiter = self.delimiter.needle().len();
        let mut from = 0;
        loop {
            let Some(found) = self.delimiter.find(&self.buffer[from..]).map(|at| at + from) else {
                // The end of the buffer may be the beginning of a delimiter.
                let keep = delimiter - 1;
                let safe = self.buffer.len().saturating_sub(keep).max(from);
                return Some(self.buffer.split_to(safe).freeze());
            };
            let behind = &self.buffer[found + delimiter..];
            let real = match behind {
                [] => true,
                [one] => matches!(one, b'-' | b'\r'),
                [one, two, ..] => matches!((one, two), (b'-', b'-') | (b'\r', b'\n')),
            };
            if !real {
                // The word stands in the payload.
                from = found + delimiter;
                continue;
            }
            return if found == 0 { None } else { Some(self.buffer.split_to(found).freeze()) };
        }
    }

    /// Steps over the delimiter at the beginning of the buffer.
    fn after_delimiter(&mut self) -> After {
        let length = self.delimiter.needle().len();
        let after = match self.buffer.get(length..length + 2) {
            None => return After::Incomplete,
            Some(b"--") => After::End,
            Some(_) => After::Part,
        };
        // A part's headers begin behind the line end. For a part without headers the line end is
        // half of the blank line, which no writer we know sends.
        let _ = self.buffer.split_to(length + 2);
        if matches!(after, After::End) {
            self.buffer.clear();
        }
        after
    }
}

enum After {
    Incomplete,
    Part,
    End,
}

/// Reads a part's header block.
fn head(block: &[u8]) -> Result<PartHead, String> {
    let text = std::str::from_utf8(block).map_err(|_| "the headers of a part are not UTF-8".to_owned())?;
    let value = text
        .split("\r\n")
        .filter_map(|line| line.split_once(':'))
        .find_map(|(name, value)| name.trim().eq_ignore_ascii_case("content-disposition").then_some(value))
        .ok_or("a part has no Content-Disposition header")?;
    let mut head = PartHead::default();
    for (name, value) in parameters(value) {
        match name {
            "id" => head.id = Some(value.to_owned()),
            "name" => head.name = Some(value.to_owned()),
            "data-type" => head.data_type = Some(value.to_owned()),
            _ => {}
        }
    }
    Ok(head)
}

/// `form-data; a="x"; b=y` as pairs. A semicolon inside quotes does not end a value: whether such a
/// name is acceptable is the store's business, which can then say so.
fn parameters(value: &str) -> Vec<(&str, &str)> {
    let mut rest = value.split_once(';').map_or("", |(_, rest)| rest);
    let mut found = Vec::new();
    while let Some((name, after)) = rest.split_once('=') {
        let after = after.trim_start();
        let (text, remaining) = match after.strip_prefix('"') {
            Some(quoted) => {
                // The closing quote is the one before a semicolon or at the end.
                let end = quoted
                    .match_indices('"')
                    .map(|(at, _)| at)
                    .find(|at| matches!(quoted[at + 1..].trim_start().as_bytes().first(), None | Some(b';')));
                match end {
                    Some(end) => (&quoted[..end], &quoted[end + 1..]),
                    None => (quoted, ""),
                }
            }
            None => after
                .split_once(';')
                .map_or((after.trim_end(), ""), |(text, _)| (text.trim_end(), &after[text.len()..])),
        };
        found.push((name.trim().trim_start_matches(';').trim(), text));
        rest = remaining.trim_start().trim_start_matches(';');
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    type Parts = Vec<(PartHead, Vec<u8>)>;

    /// Everything a body says, read in frames of `size` bytes.
    fn read(boundary: &str, body: &[u8], size: usize) -> Result<(Parts, bool), String> {
        let mut form = Form::new(boundary);
        let mut parts = Parts::new();
        for frame in body.chunks(size) {
            form.push(frame);
            while let Some(piece) = form.next()? {
                match piece {
                    Piece::Part(head) => parts.push((head, Vec::new())),
                    Piece::Data(data) => parts.last_mut().expect("data follows a head").1.extend_from_slice(&data),
                    Piece::PartEnd => {}
                }
            }
        }
        Ok((parts, form.ended()))
    }

    fn body(boundary: &str, parts: &[(&str, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (disposition, payload) in parts {
            body.extend_from_slice(
                format!("--{boundary}\r\nContent-Type: application/octet-stream\r\nContent-Disposition: {disposition}\r\n\r\n")
                    .as_bytes(),
            );
            body.extend_from_slice(payload);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
        body
    }

    #[test]
    fn bodies_are_read_the_same_in_frames_of_any_size() {
        let payload = b"a\r\n--boundaryless\r\n--boundary \r\n\r\n-\r\n--bound\r\n";
        let body = body(
            "boundary",
            &[
                ("form-data; name=\"scan a\"; data-type=\"ply\"", payload),
                ("form-data; id=\"7\"", b""),
                ("form-data; name=x;data-type=json", b"\r\n"),
            ],
        );
        for size in 1..body.len() + 1 {
            let (parts, ended) = read("boundary", &body, size).expect("well formed");
            assert!(ended, "frames of {size}");
            assert_eq!(parts.len(), 3);
            assert_eq!(parts[0].0.name.as_deref(), Some("scan a"));
            assert_eq!(parts[0].0.data_type.as_deref(), Some("ply"));
            assert_eq!(parts[0].1, payload, "frames of {size}");
            assert_eq!((parts[1].0.id.as_deref(), parts[1].1.len()), (Some("7"), 0));
            assert_eq!((parts[2].0.name.as_deref(), &parts[2].1[..]), (Some("x"), &b"\r\n"[..]));
        }
    }

    #[test]
    fn a_body_that_breaks_off_has_not_ended() {
        let whole = body("q7", &[("form-data; name=\"a\"; data-type=\"b\"", b"payload")]);
        for length in 0..whole.len() - 4 {
            let (_, ended) = read("q7", &whole[..length], 5).expect("nothing wrong so far");
            assert!(!ended, "cut at {length}");
        }
    }

    #[test]
    fn memory_does_not_grow_with_the_payload() {
        let mut form = Form::new("q7");
        form.push(b"--q7\r\nContent-Disposition: form-data; name=\"a\"; data-type=\"b\"\r\n\r\n");
        assert!(matches!(form.next(), Ok(Some(Piece::Part(_)))));
        for _ in 0..64 {
            form.push(&[b'x'; 65_536]);
            while form.next().expect("plain data").is_some() {}
            assert!(form.buffer.len() < 16, "{} bytes kept", form.buffer.len());
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(read("q7", b"--q7\r\nX: y\r\n\r\n", 99).expect_err("no disposition").contains("Content-Disposition"));
        assert!(read("q7", b"--q7\r\nContent-Disposition: \xff\r\n\r\n", 99).expect_err("bytes").contains("UTF-8"));
        let endless = format!("--q7\r\n{}", "a".repeat(HEADERS_BYTES_MAX + 1));
        assert!(read("q7", endless.as_bytes(), 4096).expect_err("endless").contains("longer than"));
    }

    #[test]
    fn the_boundary_is_read_from_the_header() {
        assert_eq!(boundary("multipart/form-data; boundary=boundary").as_deref(), Ok("boundary"));
        assert_eq!(boundary("Multipart/Form-Data;charset=x; Boundary=\"a b\"").as_deref(), Ok("a b"));
        assert!(boundary("multipart/form-data").expect_err("none").contains("no boundary"));
        assert!(boundary("application/json").expect_err("other").contains("expected multipart/form-data"));
    }

    #[test]
    fn quotes_and_semicolons_inside_a_name_are_kept_for_the_store_to_judge() {
        let head = head(b"Content-Disposition: form-data; name=\"a;b\"c\"; data-type=\"json\"").expect("readable");
        assert_eq!((head.name.as_deref(), head.data_type.as_deref()), (Some("a;b\"c"), Some("json")));
    }
}
