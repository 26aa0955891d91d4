//! The header of a PLY file: which elements follow, how many rows, which properties, how encoded.
//!
//! Strict about everything that decides how the data is read, and silent about the rest (comments,
//! names of elements). Counts are taken down here and believed nowhere.
#![forbid(unsafe_code)]

use std::io::{BufRead, Read};

use super::{PlyError, quote};

/// A header longer than this is refused.
pub const HEADER_BYTES_MAX: usize = 64 * 1024;

/// How the rows are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Numbers as text, a row a line.
    Ascii,
    /// Packed rows, least significant byte first.
    LittleEndian,
    /// Packed rows, most significant byte first.
    BigEndian,
}

impl Encoding {
    /// The word of the format line.
    pub fn keyword(self) -> &'static str {
        match self {
            Self::Ascii => "ascii",
            Self::LittleEndian => "binary_little_endian",
            Self::BigEndian => "binary_big_endian",
        }
    }
}

/// The type of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the types")]
pub enum Scalar {
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    F32,
    F64,
}

impl Scalar {
    /// Both families of names that writers use.
    fn parse(word: &[u8]) -> Option<Self> {
        Some(match word {
            b"char" | b"int8" => Self::I8,
            b"uchar" | b"uint8" => Self::U8,
            b"short" | b"int16" => Self::I16,
            b"ushort" | b"uint16" => Self::U16,
            b"int" | b"int32" => Self::I32,
            b"uint" | b"uint32" => Self::U32,
            b"float" | b"float32" => Self::F32,
            b"double" | b"float64" => Self::F64,
            _ => return None,
        })
    }

    /// The classic name.
    pub fn keyword(self) -> &'static str {
        match self {
            Self::I8 => "char",
            Self::U8 => "uchar",
            Self::I16 => "short",
            Self::U16 => "ushort",
            Self::I32 => "int",
            Self::U32 => "uint",
            Self::F32 => "float",
            Self::F64 => "double",
        }
    }

    /// Size in a binary row.
    pub fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 => 1,
            Self::I16 | Self::U16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The whole numbers this type can hold, or `None` for a floating-point type.
    pub(super) fn range(self) -> Option<(f64, f64)> {
        Some(match self {
            Self::I8 => (i8::MIN.into(), i8::MAX.into()),
            Self::U8 => (u8::MIN.into(), u8::MAX.into()),
            Self::I16 => (i16::MIN.into(), i16::MAX.into()),
            Self::U16 => (u16::MIN.into(), u16::MAX.into()),
            Self::I32 => (i32::MIN.into(), i32::MAX.into()),
            Self::U32 => (u32::MIN.into(), u32::MAX.into()),
            Self::F32 | Self::F64 => return None,
        })
    }
}

/// One number, or a list of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One number.
    One(Scalar),
    /// A length, then that many numbers.
    List {
        /// The type of the length: a whole number.
        length: Scalar,
        /// The type of the entries.
        item: Scalar,
    },
}

/// A column of an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property {
    /// As in the file.
    pub name: String,
    /// What a row holds.
    pub kind: Kind,
}

/// A table of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// As in the file.
    pub name: String,
    /// Rows, as promised.
    pub count: u64,
    /// Columns in order.
    pub properties: Vec<Property>,
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// How the rows are written.
    pub encoding: Encoding,
    /// The tables in order.
    pub elements: Vec<Element>,
    /// Which of them holds the points.
    pub vertex: usize,
    /// Lines of the header, so that ascii data is numbered as an editor shows it.
    pub lines: u64,
}

impl Header {
    /// Reads up to and including the line `end_header`.
    pub fn read(from: &mut impl BufRead) -> Result<Self, PlyError> {
        let mut lines = Lines { from: from.take(HEADER_BYTES_MAX as u64), text: Vec::new(), number: 0 };
        lines.next()?;
        if lines.words().collect::<Vec<_>>() != [b"ply"] {
            return Err(lines.error("`ply`"));
        }
        let mut encoding = None;
        let mut elements: Vec<Element> = Vec::new();
        loop {
            lines.next()?;
            let words: Vec<&[u8]> = lines.words().collect();
            match words.as_slice() {
                [b"comment" | b"obj_info", ..] => {}
                [b"format", kind, version] if encoding.is_none() && elements.is_empty() => {
                    if *version != b"1.0" {
                        return Err(lines.error("format version `1.0`"));
                    }
                    let known = [Encoding::Ascii, Encoding::LittleEndian, Encoding::BigEndian];
                    encoding = known.into_iter().find(|known| known.keyword().as_bytes() == *kind);
                    if encoding.is_none() {
                        return Err(lines.error("`ascii`, `binary_little_endian` or `binary_big_endian`"));
                    }
                }
                _ if encoding.is_none() => {
                    return Err(lines.error("`format ascii 1.0` or another format line"));
                }
                [b"element", name, count] => {
                    let count = std::str::from_utf8(count).ok().and_then(|text| text.parse().ok());
                    let Some(count) = count else {
                        return Err(lines.error("`element NAME COUNT` with a count of 0 or more"));
                    };
                    let name = String::from_utf8_lossy(name).into_owned();
                    if elements.iter().any(|known| known.name == name) {
                        return Err(lines.error("an element name that was not used before"));
                    }
                    elements.push(Element { name, count, properties: Vec::new() });
                }
                [b"property", kind @ .., name] => {
                    let Some(element) = elements.last_mut() else {
                        return Err(lines.error("an `element` line before the first property"));
                    };
                    let kind = parse_kind(kind).map_err(|expected| lines.error(expected))?;
                    let name = String::from_utf8_lossy(name).into_owned();
                    if element.properties.iter().any(|known| known.name == name) {
                        return Err(lines.error("a property name that was not used before in this element"));
                    }
                    element.properties.push(Property { name, kind });
                }
                [b"end_header"] => break,
                _ => return Err(lines.error("`element`, `property`, `comment` or `end_header`")),
            }
        }
        let vertex = elements.iter().position(|element| element.name == "vertex").ok_or_else(|| {
            PlyError::NoPoints("the header has no element `vertex`, so the file holds no points".to_owned())
        })?;
        for axis in ["x", "y", "z"] {
            let found = elements[vertex].properties.iter().find(|property| property.name == axis);
            if !matches!(found.map(|property| property.kind), Some(Kind::One(_))) {
                return Err(PlyError::NoPoints(format!(
                    "element `vertex` has no number `{axis}`: a point needs the properties x, y and z"
                )));
            }
        }
        let encoding = encoding.expect("no element is accepted before the format line");
        Ok(Self { encoding, elements, vertex, lines: lines.number })
    }
}

/// Reads what stands between `property` and the name.
fn parse_kind(words: &[&[u8]]) -> Result<Kind, &'static str> {
    const TYPES: &str = "a type of char, uchar, short, ushort, int, uint, float or double";
    match words {
        [b"list", length, item] => {
            let (length, item) = (Scalar::parse(length).ok_or(TYPES)?, Scalar::parse(item).ok_or(TYPES)?);
            if length.range().is_none() {
                return Err("a list length of an integer type");
            }
            Ok(Kind::List { length, item })
        }
        [scalar] => Scalar::parse(scalar).map(Kind::One).ok_or(TYPES),
        _ => Err("`property TYPE NAME` or `property list TYPE TYPE NAME`"),
    }
}

/// The header, line by line; never more than the limit in memory.
struct Lines<R> {
    from: std::io::Take<R>,
    text: Vec<u8>,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    /// Steps to the next line.
    fn next(&mut self) -> Result<(), PlyError> {
        self.text.clear();
        self.number += 1;
        self.from.read_until(b'\n', &mut self.text).map_err(PlyError::Read)?;
        if self.text.pop_if(|last| *last == b'\n').is_some() {
            self.text.pop_if(|last| *last == b'\r');
            return Ok(());
        }
        if self.from.limit() == 0 {
            return Err(PlyError::HeaderTooLong);
        }
        let expected = if self.number == 1 { "`ply`" } else { "`end_header` before the end of the file" };
        Err(match self.text.is_empty() {
            true => {
                PlyError::Line { line: self.number, expected: expected.into(), found: "the end of the file".into() }
            }
            false => self.error(expected),
        })
    }

    fn words(&self) -> impl Iterator<Item = &[u8]> {
        self.text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
    }

    fn error(&self, expected: &str) -> PlyError {
        PlyError::Line { line: self.number, expected: expected.to_owned(), found: quote(&self.text) }
    }
}
