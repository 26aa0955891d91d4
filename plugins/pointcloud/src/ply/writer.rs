//! A cloud as a PLY file: positions, and colours where there are any. Nothing else is ever written.
#![forbid(unsafe_code)]

use std::io::{self, Write};

use super::Encoding;
use crate::cloud::Point;

/// Points without a colour are written in this one, in a file that has colours.
const GREY: [u8; 3] = [160, 160, 160];

/// What a row of the file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How numbers are written.
    pub encoding: Encoding,
    /// Coordinates as `double` instead of `float`.
    pub wide: bool,
    /// With red, green and blue.
    pub color: bool,
}

/// Writes points, one by one; the number of them is told beforehand and held to.
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
        // Three doubles and three bytes at most.
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

    /// Flushes, and hands back what was written to.
    pub fn finish(mut self) -> io::Result<W> {
        if self.left > 0 {
            return Err(io::Error::other("fewer points than announced"));
        }
        self.to.flush()?;
        Ok(self.to)
    }
}
