//! Makes synthetic scans: a cloud of any length from a seed, for tests and the demo.
//!
//! The object is a weathered rope in a trefoil knot, half a metre across, in stone and copper colours. The
//! simulated scanner adds a little noise. Points are made one by one and written at once, so ten million points
//! need no extra memory. More points of one seed show the same surface more densely.
#![forbid(unsafe_code)]

use std::f64::consts::TAU;
use std::io::{self, Write};

use crate::cloud::Point;
use crate::ply::{Encoding, Layout, Writer};

/// Writes a scan of `points` points as a PLY file.
pub fn write_scan(to: impl Write, seed: u64, points: u64, encoding: Encoding) -> io::Result<()> {
    let mut writer = Writer::new(to, Layout { encoding, wide: false, color: true }, points)?;
    for point in Scan::new(seed, points) {
        writer.point(&point)?;
    }
    writer.finish().map(drop)
}

/// A small random number generator (splitmix64). It gives the same numbers everywhere. It is not for secrets.
pub struct Random(u64);

impl Random {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait, reason = "it never ends, and needs no adapter")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// The next number from 0 up to, but not including, 1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// The points of a scan, in scanning order.
pub struct Scan {
    random: Random,
    /// The positions of the bumps. They depend on the seed.
    phases: [f64; 3],
    next: u64,
    points: u64,
}

impl Scan {
    /// A scan of `points` points.
    pub fn new(seed: u64, points: u64) -> Self {
        let mut random = Random::new(seed);
        let phases = std::array::from_fn(|_| random.unit() * TAU);
        Self { random, phases, next: 0, points }
    }
}

/// Metres per unit of the curve. The curve reaches about 3.6 units from its middle.
const SCALE: f64 = 0.07;
/// Thickness of the tube, in units of the curve.
const TUBE: f64 = 0.62;
/// Maximum error of the scanner, in units of the curve.
const NOISE: f64 = 0.004;

/// The centre line of the tube.
fn curve(t: f64) -> [f64; 3] {
    let wide = 2.0 + (3.0 * t).cos();
    [wide * (2.0 * t).cos(), wide * (2.0 * t).sin(), (3.0 * t).sin()]
}

fn cross(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

fn unit(vector: [f64; 3]) -> [f64; 3] {
    let length = vector.iter().map(|value| value * value).sum::<f64>().sqrt();
    vector.map(|value| value / length)
}

impl Iterator for Scan {
    type Item = Point;

    fn next(&mut self) -> Option<Point> {
        if self.next == self.points {
            return None;
        }
        // Points follow the knot in order and go around it by the golden ratio. The coverage is even for any number
        // of points.
        let share = (self.next as f64 + self.random.unit()) / self.points as f64;
        let around = (self.next as f64 * 0.618_033_988_749_894_9 + self.random.unit() * 0.25).fract() * TAU;
        self.next += 1;

        let t = share * TAU;
        let center = curve(t);
        let ahead = curve(t + 1e-4);
        let along = unit(std::array::from_fn(|axis| ahead[axis] - center[axis]));
        // The curve is never vertical, so this frame is always valid.
        let side = unit(cross(along, [0.0, 0.0, 1.0]));
        let up = cross(side, along);

        let [first, second, third] = self.phases;
        // Five strands as in a rope, and bumps as from weathering.
        let strand = 1.0 - 2.0 * (0.5 * (38.0 * t + 5.0 * around + first)).cos().abs().powi(3);
        let knob = (13.0 * t + second).sin() * (3.0 * around + third).cos();
        let relief = 0.75 * strand + 0.25 * knob;
        let noise = (self.random.unit() * 2.0 - 1.0) * NOISE;
        let radius = TUBE * (1.0 + 0.09 * relief) + noise;
        let (sine, cosine) = around.sin_cos();
        let position =
            std::array::from_fn(|axis| SCALE * (center[axis] + radius * (cosine * side[axis] + sine * up[axis])));

        // Copper where the relief is low, pale stone where it is high.
        let worn = (0.5 + 0.5 * relief).powi(2);
        let speckle = 1.0 + (self.random.unit() - 0.5) * 0.12;
        let channel = |low: f64, high: f64| ((low + (high - low) * worn) * speckle).clamp(0.0, 255.0) as u8;
        let color = [channel(150.0, 236.0), channel(84.0, 224.0), channel(56.0, 204.0)];
        Some(Point { position, color: Some(color) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Bounds;

    #[test]
    fn seed_determines_the_scan() {
        let write = |seed| {
            let mut bytes = Vec::new();
            write_scan(&mut bytes, seed, 500, Encoding::LittleEndian).expect("a Vec takes every byte");
            bytes
        };
        assert_eq!(write(1), write(1));
        assert_ne!(write(1), write(2));
    }

    #[test]
    fn scan_is_half_a_metre_wide_and_flat() {
        let bounds = Bounds::around(Scan::new(3, 20_000).map(|point| point.position)).expect("20 000 points");
        let [x, y, z] = bounds.extent();
        assert!((0.4..0.6).contains(&x) && (0.4..0.6).contains(&y) && (0.2..0.3).contains(&z), "{bounds:?}");
    }
}
