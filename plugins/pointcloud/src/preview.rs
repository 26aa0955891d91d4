//! Draws the picture: 512 by 512 pixels, seen along the thinnest axis of the cloud, and shaded to show its shape.
//!
//! [`draw`] works in four steps on an image of twice the size:
//!
//! 1. It draws every point as a disc that is large enough to touch its neighbours.
//! 2. It blends the nearest discs into one surface of depths.
//! 3. It computes the light from the slopes of that surface and from its depth below the surroundings.
//! 4. It scales the result down, which smooths the edges.
//!
//! Memory does not depend on the number of points.
#![forbid(unsafe_code)]

use crate::cloud::{Bounds, Cancelled, Point};

/// Side of the picture in pixels.
pub const SIDE: usize = 512;
/// Side of the image while drawing, in pixels.
const WIDE: usize = SIDE * 2;
/// Share of the picture that is left empty on each side of the cloud.
const MARGIN: f64 = 0.06;
/// The background colour.
const BACKGROUND: [f32; 3] = [0.010, 0.012, 0.017];
/// Number of points drawn between two checks for cancellation.
const POINTS_PER_LOOK: usize = 16 * 1024;
/// Maximum radius of a disc, in pixels. A cloud of a few points must still look like a few points.
const RADIUS_MAX: f64 = 28.0;

/// Draws the cloud as a PNG. `voxel` is the distance between its points.
pub fn draw(cloud: &[Point], voxel: f64, cancelled: &dyn Fn() -> bool) -> Result<Vec<u8>, Cancelled> {
    let pixels = match Bounds::around(cloud.iter().map(|point| point.position)) {
        None => vec![BACKGROUND; WIDE * WIDE],
        Some(bounds) => {
            let view = View::of(&bounds);
            let radius = view.radius(cloud, voxel);
            let surface = Surface::of(cloud, &view, radius, cancelled)?;
            surface.light(radius)
        }
    };
    Ok(encode(&shrink(&pixels)))
}

/// The view: its direction and its scale.
struct View {
    center: [f64; 3],
    /// The axes of the cloud that point right, up and to the viewer, each with its sign.
    axes: [(usize, f64); 3],
    /// Pixels per unit.
    scale: f64,
}

impl View {
    fn of(bounds: &Bounds) -> Self {
        let extent = bounds.extent();
        let thinnest = (0..3).min_by(|a, b| extent[*a].total_cmp(&extent[*b])).expect("three axes");
        // Each view is right-handed, so that the picture is not mirrored. The y axis points up, as in phone scans
        // and in graphics. A cloud that is flat along y is seen from above, as a map.
        let axes = match thinnest {
            0 => [(2, -1.0), (1, 1.0), (0, 1.0)],
            1 => [(0, 1.0), (2, -1.0), (1, 1.0)],
            _ => [(0, 1.0), (1, 1.0), (2, 1.0)],
        };
        let widest = extent[axes[0].0].max(extent[axes[1].0]);
        let scale = WIDE as f64 * (1.0 - 2.0 * MARGIN) / widest;
        // A single position has no usable scale. It is drawn as one disc. The same applies to a cloud that is too
        // small.
        Self { center: bounds.center(), axes, scale: if scale.is_finite() { scale } else { 1.0 } }
    }

    /// Position of a point to the right, down and toward the viewer, in pixels.
    fn project(&self, point: &Point) -> [f64; 3] {
        let [right, up, near] =
            self.axes.map(|(axis, sign)| (point.position[axis] - self.center[axis]) * sign * self.scale);
        [WIDE as f64 / 2.0 + right, WIDE as f64 / 2.0 - up, near]
    }

    /// The disc size in pixels at which neighbours touch.
    fn radius(&self, cloud: &[Point], voxel: f64) -> f64 {
        // The voxel is the smallest distance of points, not the actual one. Where the scan is thinner than the
        // grid, the covered area is a better measure. The area is counted in blocks. Otherwise thin clouds would
        // look like dust.
        const BLOCKS: usize = 64;
        let mut hit = vec![false; BLOCKS * BLOCKS];
        for point in cloud {
            let [x, y, _] = self.project(point);
            let block = |value: f64| ((value / WIDE as f64 * BLOCKS as f64) as usize).min(BLOCKS - 1);
            hit[block(y) * BLOCKS + block(x)] = true;
        }
        let block_side = WIDE as f64 / BLOCKS as f64;
        let area = hit.iter().filter(|hit| **hit).count() as f64 * block_side * block_side;
        // A closed surface shows half of its points.
        let spacing = (area / (cloud.len() as f64 / 2.0)).sqrt();
        // On a full grid neighbours are one voxel apart. Randomly placed points leave larger gaps. Discs of 1.5
        // times their mean distance close nearly all of these gaps.
        (voxel * self.scale * 1.05).max(spacing * 1.5).clamp(1.5, RADIUS_MAX)
    }
}

/// The visible surface, pixel by pixel.
struct Surface {
    /// Nearness in pixels. Negative infinity where there is no surface.
    depth: Vec<f32>,
    /// The surface's own colour. Empty when the cloud has no colours.
    color: Vec<[f32; 3]>,
}

impl Surface {
    fn of(cloud: &[Point], view: &View, radius: f64, cancelled: &dyn Fn() -> bool) -> Result<Self, Cancelled> {
        let mut nearest = vec![f32::NEG_INFINITY; WIDE * WIDE];
        splat(cloud, view, radius, cancelled, |pixel, _, depth, _| {
            nearest[pixel] = nearest[pixel].max(depth);
        })?;
        // Discs within this distance behind the nearest one belong to the same surface. They are blended with it.
        let behind = (radius * 2.5) as f32;
        let colored = cloud.iter().any(|point| point.color.is_some());
        let mut depth = vec![0.0_f32; WIDE * WIDE];
        let mut weights = vec![0.0_f32; WIDE * WIDE];
        let mut color = vec![[0.0_f32; 3]; if colored { WIDE * WIDE } else { 0 }];
        splat(cloud, view, radius, cancelled, |pixel, weight, near, point| {
            if near < nearest[pixel] - behind {
                return;
            }
            weights[pixel] += weight;
            depth[pixel] += weight * near;
            if colored {
                let own = point.color.unwrap_or([160; 3]);
                for (sum, value) in color[pixel].iter_mut().zip(own) {
                    *sum += weight * to_linear(value);
                }
            }
        })?;
        for (pixel, weight) in weights.iter().enumerate() {
            if *weight > 0.0 {
                depth[pixel] /= weight;
                color.get_mut(pixel).into_iter().flatten().for_each(|value| *value /= weight);
            } else {
                depth[pixel] = f32::NEG_INFINITY;
            }
        }
        Ok(Self { depth, color })
    }

    /// Converts depths to light.
    fn light(&self, radius: f64) -> Vec<[f32; 3]> {
        let step = (radius * 0.7).round().clamp(1.0, 14.0) as usize;
        let smooth = average(&self.depth, step, (radius * 2.5) as f32);
        let wide = average(&smooth, 20, f32::INFINITY);
        let wider = average(&smooth, 64, f32::INFINITY);
        let there = smooth.iter().filter(|depth| depth.is_finite());
        let (far, near) =
            there.fold((f32::INFINITY, f32::NEG_INFINITY), |(far, near), depth| (far.min(*depth), near.max(*depth)));
        let range = (near - far).max(1.0);
        let key = unit([-0.45, 0.62, 0.72]);
        let fill = unit([0.8, -0.1, 0.45]);
        let half = unit([key[0], key[1], key[2] + 1.0]);

        let mut pixels = vec![BACKGROUND; WIDE * WIDE];
        for (pixel, depth) in smooth.iter().enumerate().filter(|(_, depth)| depth.is_finite()) {
            let [across, down] = slope(&smooth, pixel, step);
            let normal = unit([-across, down, 1.0]);
            let share = (depth - far) / range;
            // A pixel that is deeper than its surroundings gets less light.
            let hollow = (wide[pixel] - depth).max(-12.0) / 26.0 + (wider[pixel] - depth).max(-40.0) / 110.0;
            let open = (1.0 - 0.55 * hollow).clamp(0.25, 1.25);
            let key_light = dot(normal, key).max(0.0);
            let fill_light = dot(normal, fill).max(0.0);
            let shine = dot(normal, half).max(0.0).powi(28) * 0.10;
            let light = (0.05 + 0.92 * key_light * key_light + 0.14 * fill_light) * open * (0.40 + 0.60 * share);
            let own = match self.color.get(pixel) {
                Some(own) => *own,
                None => ramp(share),
            };
            pixels[pixel] = own.map(|value| value * light + shine * open * (0.3 + 0.7 * share));
        }
        pixels
    }
}

/// Calls `touch(pixel, weight, nearness, point)` for each pixel of each point's disc.
fn splat(
    cloud: &[Point],
    view: &View,
    radius: f64,
    cancelled: &dyn Fn() -> bool,
    mut touch: impl FnMut(usize, f32, f32, &Point),
) -> Result<(), Cancelled> {
    for some in cloud.chunks(POINTS_PER_LOOK) {
        if cancelled() {
            return Err(Cancelled);
        }
        for point in some {
            let [x, y, near] = view.project(point);
            let span = |middle: f64| {
                let first = (middle - radius).ceil().max(0.0) as usize;
                let end = ((middle + radius).floor() + 1.0).clamp(0.0, WIDE as f64) as usize;
                first..end
            };
            for row in span(y) {
                let down = row as f64 - y;
                for column in span(x) {
                    let across = column as f64 - x;
                    let share = 1.0 - (across * across + down * down) / (radius * radius);
                    if share > 0.0 {
                        let weight = (share * share + 1e-4) as f32;
                        touch(row * WIDE + column, weight, near as f32, point);
                    }
                }
            }
        }
    }
    Ok(())
}

/// The slope of the depth to the right and downward, over pixels of the same surface.
fn slope(depth: &[f32], pixel: usize, step: usize) -> [f32; 2] {
    let (row, column) = (pixel / WIDE, pixel % WIDE);
    let here = depth[pixel];
    // A steeper slope than this is an edge between two surfaces.
    let most = 6.0 * step as f32;
    let toward = |before: Option<usize>, after: Option<usize>| {
        let rise = |neighbour: Option<usize>| {
            let rise = depth[neighbour?] - here;
            (rise.abs() <= most).then_some(rise)
        };
        let step = step as f32;
        match (rise(before), rise(after)) {
            (Some(before), Some(after)) => (after - before) / (2.0 * step),
            (Some(before), None) => -before / step,
            (None, Some(after)) => after / step,
            (None, None) => 0.0,
        }
    };
    [
        toward(
            column.checked_sub(step).map(|column| row * WIDE + column),
            (column + step < WIDE).then_some(pixel + step),
        ),
        toward(pixel.checked_sub(step * WIDE), (row + step < WIDE).then_some(pixel + step * WIDE)),
    ]
}

/// The mean over a square. It includes only pixels that exist and differ from the middle by at most `apart`.
fn average(depth: &[f32], reach: usize, apart: f32) -> Vec<f32> {
    let rows = average_along(depth, reach, apart, 1, WIDE);
    average_along(&rows, reach, apart, WIDE, 1)
}

/// One direction of [`average`]. `stride` leads to the next pixel, `other` to the next line.
fn average_along(depth: &[f32], reach: usize, apart: f32, stride: usize, other: usize) -> Vec<f32> {
    let mut averaged = vec![f32::NEG_INFINITY; depth.len()];
    let mut sums = vec![(0.0_f64, 0_u32); WIDE + 1];
    for line in 0..WIDE {
        let at = |place: usize| line * other + place * stride;
        // With prefix sums the cost does not depend on the size of the square.
        for place in 0..WIDE {
            let (sum, count) = sums[place];
            let value = depth[at(place)];
            sums[place + 1] = if value.is_finite() { (sum + f64::from(value), count + 1) } else { (sum, count) };
        }
        for place in (0..WIDE).filter(|place| depth[at(*place)].is_finite()) {
            let here = depth[at(place)];
            let (first, end) = (place.saturating_sub(reach), (place + reach + 1).min(WIDE));
            averaged[at(place)] = if apart.is_finite() {
                let near = (first..end).map(|place| depth[at(place)]).filter(|value| (value - here).abs() <= apart);
                let (sum, count) = near.fold((0.0, 0.0_f32), |(sum, count), value| (sum + value, count + 1.0));
                sum / count
            } else {
                let (sum, count) = (sums[end].0 - sums[first].0, sums[end].1 - sums[first].1);
                (sum / f64::from(count)) as f32
            };
        }
    }
    averaged
}

/// The colour of a cloud without colours: cool in the distance, warm in front.
fn ramp(share: f32) -> [f32; 3] {
    const STOPS: [[f32; 3]; 3] = [[0.09, 0.20, 0.42], [0.48, 0.58, 0.66], [1.0, 0.89, 0.74]];
    let place = share.clamp(0.0, 1.0) * 2.0;
    let (from, to) = if place < 1.0 { (STOPS[0], STOPS[1]) } else { (STOPS[1], STOPS[2]) };
    let share = place - if place < 1.0 { 0.0 } else { 1.0 };
    std::array::from_fn(|channel| from[channel] + (to[channel] - from[channel]) * share)
}

fn dot(a: [f32; 3], b: [f32; 3]) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

fn unit(vector: [f32; 3]) -> [f32; 3] {
    let length = dot(vector, vector).sqrt();
    vector.map(|value| value / length)
}

fn to_linear(value: u8) -> f32 {
    let share = f32::from(value) / 255.0;
    share * share
}

fn to_byte(value: f32) -> u8 {
    (value.clamp(0.0, 1.0).sqrt() * 255.0).round() as u8
}

/// Scales down: four pixels become one.
fn shrink(pixels: &[[f32; 3]]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SIDE * SIDE * 3);
    for row in 0..SIDE {
        for column in 0..SIDE {
            let corner = row * 2 * WIDE + column * 2;
            let four = [corner, corner + 1, corner + WIDE, corner + WIDE + 1];
            // Light above white is clipped before the mix. Otherwise edges next to a highlight stay jagged.
            let sum = |channel: usize| four.iter().map(|pixel| pixels[*pixel][channel].min(1.0)).sum::<f32>();
            bytes.extend([0, 1, 2].map(|channel| to_byte(sum(channel) / 4.0)));
        }
    }
    bytes
}

fn encode(bytes: &[u8]) -> Vec<u8> {
    const WRITTEN: &str = "a Vec takes every byte, and the image has the announced size";
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, SIDE as u32, SIDE as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().expect(WRITTEN);
    writer.write_image_data(bytes).expect(WRITTEN);
    writer.finish().expect(WRITTEN);
    file
}

#[cfg(test)]
mod tests;
