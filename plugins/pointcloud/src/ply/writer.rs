//! Writes a cloud as a PLY file: positions, and colours if there are any. It writes no other properties.
#![forbid(unsafe_code)]

use std::io::{self, Write};

use super::Encoding;
use crate::cloud::Point;

/// The colour of points without a colour, in a file that has colours.
const GREY: [u8; 3] = [160, 160, 160];

/// The layout of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The encoding of numbers.
    pub encoding: Encoding,
    /// Coordinates are `double` instead of `float`.
    pub wide: bool,
    /// Rows have red, green and blue.
    pub color: bool,
}

/// Writes points one by one. The number of points is given first and enforced.
pub struct Writer<W> {
    to: W,
    layout: Layout,
    left: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header.
    pub fn new(mut to: W, layout: Layout, count: u64) -> io::Result<Self> {
        let coordinate = if layout.wide { "double" } else { "float" };
        writeln!(to, "ply\nformat {} 1.0\nelement vertex {count}", layout.encoding.keyword())?;
        for axis in ["x", "y", "z"] {
            writeln!(to, "property {coordinate} {axis}")?;
        }
        if layout.color {
            to.write_all(b"property uchar red\nproperty uchar green\nproperty uchar blue\n")?;
        }
        to.write_all(b"end_header\n")?;
        Ok(Self { to, layout, left: count })
    }

    /// Writes one row.
    pub fn point(&mut self, point: &Point) -> io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| io::Error::other("more points than announced"))?;
        let color = self.layout.color.then(|| point.color.unwrap_or(GREY));
        if self.layout.encoding == Encoding::Ascii {
            let [x, y, z] = point.position;
            if self.layout.wide {
                write!(self.to, "{x} {y} {z}")?;
            } else {
                write!(self.to, "{} {} {}", x as f32, y as f32, z as f32)?;
            }
            if let Some([red, green, blue]) = color {
                write!(self.to, " {red} {green} {blue}")?;
            }
            return self.to.write_all(b"\n");
        }
        // A row has at most three doubles and three bytes.
        let mut row = [0; 27];
        let mut used = 0;
        let mut push = |bytes: &mut [u8]| {
            if self.layout.encoding == Encoding::BigEndian {
                bytes.reverse();
            }
            row[used..used + bytes.len()].copy_from_slice(bytes);
            used += bytes.len();
        };
        for value in point.position {
            if self.layout.wide {
                push(&mut value.to_le_bytes());
            } else {
                push(&mut (value as f32).to_le_bytes());
            }
        }
        for channel in color.into_iter().flatten() {
            push(&mut [channel]);
        }
        self.to.write_all(&row[..used])
    }

    /// Flushes and returns the underlying writer.
    pub fn finish(mut self) -> io::Result<W> {
        if self.left > 0 {
            return Err(io::Error::other("fewer points than announced"));
        }
        self.to.flush()?;
        Ok(self.to)
    }
}
