//! Reads the rows of a PLY file as a stream of points.
//!
//! One row is in memory at a time. For an ascii row it is only one number. The reader checks everything in the
//! header against the data. This includes elements that are not needed, because a wrong count or type shows there
//! first. The underlying reader handles cancellation: it checks for it at every refill.
#![forbid(unsafe_code)]

use std::io::{self, BufRead};

use super::header::{Element, Encoding, Header, Kind, Scalar};
use super::words::{Found, Words};
use super::{PlyError, quote};
use crate::cloud::Point;

/// The six numbers of a point, in the order of [`Wanted`].
const NAMES: [[&str; 2]; 6] =
    [["x", "x"], ["y", "y"], ["z", "z"], ["red", "diffuse_red"], ["green", "diffuse_green"], ["blue", "diffuse_blue"]];

/// A number of a vertex row that becomes a part of the point.
#[derive(Clone, Copy)]
struct Wanted {
    /// Index into [`NAMES`].
    slot: usize,
    scalar: Scalar,
    /// Position in its run: in bytes for binary rows, in numbers for ascii.
    offset: usize,
}

/// A part of a row, in reading order.
enum Piece {
    /// Numbers of fixed size, next to each other.
    Run {
        bytes: usize,
        numbers: usize,
        wanted: Vec<Wanted>,
    },
    List {
        length: Scalar,
        item: Scalar,
    },
}

/// The conversion of colours to bytes.
#[derive(Clone, Copy)]
enum Colors {
    Absent,
    Bytes,
    Words,
    Shares,
}

/// Reads points, one by one.
pub struct Reader<R> {
    from: R,
    header: Header,
    vertex: Vec<Piece>,
    colors: Colors,
    /// Rows of `vertex` that were read.
    rows: u64,
    skipped: u64,
    started: bool,
    ended: bool,
    /// The current line of `from`, for ascii.
    line: u64,
    /// A binary run, or one number in ascii.
    scratch: Vec<u8>,
}

impl<R: BufRead> Reader<R> {
    /// Reads the header.
    pub fn new(mut from: R) -> Result<Self, PlyError> {
        let header = Header::read(&mut from)?;
        let element = &header.elements[header.vertex];
        let colors = colors(element);
        let slots = if matches!(colors, Colors::Absent) { 3 } else { 6 };
        let vertex = pieces(element, slots, header.encoding);
        let line = header.lines + 1;
        Ok(Self {
            from,
            header,
            vertex,
            colors,
            rows: 0,
            skipped: 0,
            started: false,
            ended: false,
            line,
            scratch: Vec::new(),
        })
    }

    /// The header of the file.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Number of points skipped so far because a coordinate is not a finite number.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Returns the next point with finite coordinates. Returns `None` after the whole file was read and matches its
    /// header.
    pub fn next_point(&mut self) -> Result<Option<Point>, PlyError> {
        if !self.started {
            self.started = true;
            self.skip_elements(0..self.header.vertex)?;
        }
        while self.rows < self.header.elements[self.header.vertex].count {
            let mut numbers = [0.0; 6];
            let complete = match self.header.encoding {
                Encoding::Ascii => self.ascii_row(&mut numbers)?,
                _ => self.binary_row(&mut numbers)?,
            };
            if !complete {
                return Err(truncated(&self.header.elements[self.header.vertex], self.rows));
            }
            self.rows += 1;
            let [x, y, z, color @ ..] = numbers;
            let position = [x, y, z];
            if position.iter().all(|value| value.is_finite()) {
                return Ok(Some(Point { position, color: self.color(color) }));
            }
            self.skipped += 1;
        }
        if !self.ended {
            self.ended = true;
            self.skip_elements(self.header.vertex + 1..self.header.elements.len())?;
            if self.more_than_space()? {
                return Err(PlyError::Trailing);
            }
        }
        Ok(None)
    }

    fn color(&self, numbers: [f64; 3]) -> Option<[u8; 3]> {
        // The casts saturate. A value that is not a number becomes 0.
        match self.colors {
            Colors::Absent => None,
            Colors::Bytes => Some(numbers.map(|value| value as u8)),
            Colors::Words => Some(numbers.map(|value| (value / 257.0).round() as u8)),
            Colors::Shares => Some(numbers.map(|value| (value * 255.0).round() as u8)),
        }
    }

    /// Reads one packed row. Returns `false` when the data ends inside it.
    fn binary_row(&mut self, numbers: &mut [f64; 6]) -> Result<bool, PlyError> {
        let big = self.header.encoding == Encoding::BigEndian;
        for piece in &self.vertex {
            match piece {
                Piece::Run { bytes, wanted, .. } => {
                    self.scratch.resize(*bytes, 0);
                    if !fill(&mut self.from, &mut self.scratch)? {
                        return Ok(false);
                    }
                    for want in wanted {
                        numbers[want.slot] = decode(&self.scratch[want.offset..], want.scalar, big);
                    }
                }
                Piece::List { length, item } => {
                    let Some(length) = list_length(&mut self.from, *length, big)? else { return Ok(false) };
                    let length = u64::try_from(length).map_err(|_| negative("vertex", self.rows, length))?;
                    if !pass(&mut self.from, length * item.bytes() as u64)? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Reads one line of numbers. Returns `false` when the data ends before or inside it.
    fn ascii_row(&mut self, numbers: &mut [f64; 6]) -> Result<bool, PlyError> {
        let mut words = Words { from: &mut self.from, line: &mut self.line, word: &mut self.scratch };
        let mut read = 0_u64;
        for piece in &self.vertex {
            let (count, wanted) = match piece {
                Piece::Run { numbers, wanted, .. } => (*numbers as u64, wanted.as_slice()),
                Piece::List { length, .. } => {
                    if !words.next_in_row(read)? {
                        return Ok(false);
                    }
                    read += 1;
                    let length = words.integer(*length)?;
                    (u64::try_from(length).map_err(|_| negative("vertex", self.rows, length))?, &[][..])
                }
            };
            let mut wanted = wanted.iter().peekable();
            for index in 0..count {
                if !words.next_in_row(read)? {
                    return Ok(false);
                }
                read += 1;
                if let Some(want) = wanted.next_if(|want| want.offset as u64 == index) {
                    numbers[want.slot] = words.number(want.scalar)?;
                }
            }
        }
        words.end_of_row(read)?;
        Ok(true)
    }

    fn skip_elements(&mut self, which: std::ops::Range<usize>) -> Result<(), PlyError> {
        let encoding = self.header.encoding;
        for element in &self.header.elements[which] {
            let pieces = pieces(element, 0, encoding);
            if encoding == Encoding::Ascii {
                let mut words = Words { from: &mut self.from, line: &mut self.line, word: &mut self.scratch };
                skip_ascii(&mut words, element, &pieces)?;
            } else {
                skip_binary(&mut self.from, element, &pieces, encoding == Encoding::BigEndian)?;
            }
        }
        Ok(())
    }

    fn more_than_space(&mut self) -> Result<bool, PlyError> {
        loop {
            let held = buffered(&mut self.from)?;
            if held.is_empty() {
                return Ok(false);
            }
            if !held.iter().all(u8::is_ascii_whitespace) {
                return Ok(true);
            }
            let length = held.len();
            self.from.consume(length);
        }
    }
}

/// Determines the meaning of the colour properties. All three must be present and have one type.
fn colors(element: &Element) -> Colors {
    let kind = |slot: usize| {
        let property = element.properties.iter().find(|property| NAMES[slot].contains(&property.name.as_str()));
        property.map(|property| property.kind)
    };
    match (kind(3), kind(4), kind(5)) {
        (red, green, blue) if red != green || green != blue => Colors::Absent,
        (Some(Kind::One(Scalar::U8)), ..) => Colors::Bytes,
        (Some(Kind::One(Scalar::U16)), ..) => Colors::Words,
        (Some(Kind::One(Scalar::F32 | Scalar::F64)), ..) => Colors::Shares,
        _ => Colors::Absent,
    }
}

/// Splits the rows of an element into pieces. The first `slots` of [`NAMES`] are wanted.
fn pieces(element: &Element, slots: usize, encoding: Encoding) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut taken = [false; NAMES.len()];
    for property in &element.properties {
        let scalar = match property.kind {
            Kind::One(scalar) => scalar,
            Kind::List { length, item } => {
                pieces.push(Piece::List { length, item });
                continue;
            }
        };
        if !matches!(pieces.last(), Some(Piece::Run { .. })) {
            pieces.push(Piece::Run { bytes: 0, numbers: 0, wanted: Vec::new() });
        }
        let Some(Piece::Run { bytes, numbers, wanted }) = pieces.last_mut() else {
            unreachable!("a run was pushed just above");
        };
        let slot = NAMES[..slots].iter().position(|names| names.contains(&property.name.as_str()));
        if let Some(slot) = slot.filter(|slot| !std::mem::replace(&mut taken[*slot], true)) {
            let offset = if encoding == Encoding::Ascii { *numbers } else { *bytes };
            wanted.push(Wanted { slot, scalar, offset });
        }
        *bytes += scalar.bytes();
        *numbers += 1;
    }
    pieces
}

fn truncated(element: &Element, found: u64) -> PlyError {
    PlyError::Truncated { element: quote(element.name.as_bytes()), promised: element.count, found }
}

fn negative(element: &str, rows_before: u64, found: i64) -> PlyError {
    PlyError::ListLength { element: quote(element.as_bytes()), row: rows_before + 1, found }
}

// Packed rows.

fn skip_binary(from: &mut impl BufRead, element: &Element, pieces: &[Piece], big: bool) -> Result<(), PlyError> {
    match pieces {
        [] => return Ok(()),
        [Piece::Run { bytes, .. }] => {
            // A product above 64 bits is wrong in any case. The data ends before that size.
            let length = element.count.saturating_mul(*bytes as u64);
            let passed = pass_some(from, length)?;
            return if passed == length { Ok(()) } else { Err(truncated(element, passed / *bytes as u64)) };
        }
        _ => {}
    }
    for row in 0..element.count {
        for piece in pieces {
            let length = match piece {
                Piece::Run { bytes, .. } => *bytes as u64,
                Piece::List { length, item } => {
                    let length = list_length(from, *length, big)?.ok_or_else(|| truncated(element, row))?;
                    let length = u64::try_from(length).map_err(|_| negative(&element.name, row, length))?;
                    length * item.bytes() as u64
                }
            };
            if !pass(from, length)? {
                return Err(truncated(element, row));
            }
        }
    }
    Ok(())
}

/// Reads the length of a list. Returns `None` when the data ends.
fn list_length(from: &mut impl BufRead, scalar: Scalar, big: bool) -> Result<Option<i64>, PlyError> {
    let mut bytes = [0; 8];
    let bytes = &mut bytes[..scalar.bytes()];
    // Every integer type of the format fits exactly into a double.
    Ok(fill(from, bytes)?.then(|| decode(bytes, scalar, big) as i64))
}

fn decode(bytes: &[u8], scalar: Scalar, big: bool) -> f64 {
    fn take<const N: usize>(bytes: &[u8], big: bool) -> [u8; N] {
        let mut taken: [u8; N] = bytes[..N].try_into().expect("the slice has this length");
        if big {
            taken.reverse();
        }
        taken
    }
    match scalar {
        Scalar::I8 => i8::from_le_bytes(take(bytes, big)).into(),
        Scalar::U8 => bytes[0].into(),
        Scalar::I16 => i16::from_le_bytes(take(bytes, big)).into(),
        Scalar::U16 => u16::from_le_bytes(take(bytes, big)).into(),
        Scalar::I32 => i32::from_le_bytes(take(bytes, big)).into(),
        Scalar::U32 => u32::from_le_bytes(take(bytes, big)).into(),
        Scalar::F32 => f32::from_le_bytes(take(bytes, big)).into(),
        Scalar::F64 => f64::from_le_bytes(take(bytes, big)),
    }
}

/// Fills the buffer. Returns `false` when the data ends before it is full.
fn fill(from: &mut impl BufRead, buffer: &mut [u8]) -> Result<bool, PlyError> {
    match from.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(PlyError::Read(error)),
    }
}

/// Skips bytes. Returns `false` when the data ends first.
fn pass(from: &mut impl BufRead, length: u64) -> Result<bool, PlyError> {
    Ok(pass_some(from, length)? == length)
}

/// Skips at most `length` bytes and returns the number skipped.
fn pass_some(from: &mut impl BufRead, length: u64) -> Result<u64, PlyError> {
    let mut left = length;
    while left > 0 {
        let held = buffered(from)?.len();
        if held == 0 {
            break;
        }
        let step = usize::try_from(left).map_or(held, |left| left.min(held));
        from.consume(step);
        left -= step as u64;
    }
    Ok(length - left)
}

/// Returns the buffered bytes and refills an empty buffer. The result is empty at the end of the data.
pub(super) fn buffered(from: &mut impl BufRead) -> Result<&[u8], PlyError> {
    while let Err(error) = from.fill_buf() {
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(PlyError::Read(error));
        }
    }
    from.fill_buf().map_err(PlyError::Read)
}

// Ascii rows.

fn skip_ascii<R: BufRead>(words: &mut Words<'_, R>, element: &Element, pieces: &[Piece]) -> Result<(), PlyError> {
    if pieces.is_empty() {
        return Ok(());
    }
    for row in 0..element.count {
        for piece in pieces {
            let count = match piece {
                Piece::Run { numbers, .. } => *numbers as u64,
                Piece::List { length, .. } => {
                    if words.next(true)? != Found::Word {
                        return Err(truncated(element, row));
                    }
                    let length = words.integer(*length)?;
                    u64::try_from(length).map_err(|_| negative(&element.name, row, length))?
                }
            };
            for _ in 0..count {
                // A long list may continue on the next line. Some writers do this, and it is harmless here.
                if words.next(true)? != Found::Word {
                    return Err(truncated(element, row));
                }
            }
        }
        if words.next(false)? == Found::Word {
            return Err(words.error(format!(
                "the end of row {} of element {}",
                row + 1,
                quote(element.name.as_bytes())
            )));
        }
    }
    Ok(())
}
