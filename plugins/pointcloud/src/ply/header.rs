//! The header of a PLY file: the elements, their row counts, their properties and the encoding.
//!
//! The parser is strict about everything that determines how the data is read. It ignores the rest, such as
//! comments and names of elements. It records the counts and does not trust them.
#![forbid(unsafe_code)]

use std::io::{BufRead, Read};

use super::{PlyError, quote};

/// A longer header is rejected.
pub const HEADER_BYTES_MAX: usize = 64 * 1024;

/// The encoding of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Numbers as text, one row per line.
    Ascii,
    /// Packed rows, least significant byte first.
    LittleEndian,
    /// Packed rows, most significant byte first.
    BigEndian,
}

impl Encoding {
    /// The keyword in the format line.
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
    /// Writers use two families of type names. Both are accepted.
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

    /// The name in the original format.
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

    /// Size in a binary row, in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 => 1,
            Self::I16 | Self::U16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The range of whole numbers of this type. `None` for a floating-point type.
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
        /// The type of the length. It is an integer type.
        length: Scalar,
        /// The type of the entries.
        item: Scalar,
    },
}

/// A column of an element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property {
    /// The name as in the file.
    pub name: String,
    /// The content of a row.
    pub kind: Kind,
}

/// A table in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// The name as in the file.
    pub name: String,
    /// Number of rows according to the header.
    pub count: u64,
    /// The columns in order.
    pub properties: Vec<Property>,
}

/// The content of the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The encoding of the rows.
    pub encoding: Encoding,
    /// The tables in order.
    pub elements: Vec<Element>,
    /// The index of the element that holds the points.
    pub vertex: usize,
    /// Number of header lines. With it, errors in ascii data have the line number that an editor shows.
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

/// Parses the words between `property` and the name.
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

/// Reads the header line by line. It never holds more than the limit in memory.
struct Lines<R> {
    from: std::io::Take<R>,
    text: Vec<u8>,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    /// Goes to the next line.
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
