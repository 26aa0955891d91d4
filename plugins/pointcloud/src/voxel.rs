//! The grid divides space into cubes of one size. Each occupied cube keeps the mean of its points.
//!
//! Cubes are aligned to the origin. Therefore the result does not depend on the order of the points or on the split
//! into files. Memory grows only with the number of occupied cubes.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use crate::cloud::Point;

/// Above this index a double cannot distinguish a cube from its neighbour.
const INDEX_MAX: f64 = (1_u64 << 53) as f64;

/// The reason why a voxel size is invalid.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum VoxelError {
    /// The value is not a valid size.
    #[error("expected a voxel size that is finite and above 0, found {found}")]
    Size {
        /// The value as given.
        found: f64,
    },
    /// The point is too many voxels away from the origin.
    #[error("voxel size {voxel} is too small for a point at {coordinate}: choose at least {least:e}")]
    TooSmall {
        /// The size in use.
        voxel: f64,
        /// The coordinate that does not fit.
        coordinate: f64,
        /// A valid size for this coordinate.
        least: f64,
    },
}

/// The side of a cube. It is finite and above 0.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct VoxelSize(f64);

impl VoxelSize {
    /// Checks a size.
    pub fn new(size: f64) -> Result<Self, VoxelError> {
        if size.is_finite() && size > 0.0 { Ok(Self(size)) } else { Err(VoxelError::Size { found: size }) }
    }

    /// The smallest size that keeps cubes apart at this distance from the origin, with a margin.
    pub fn least_at(reach: f64) -> f64 {
        reach * (4.0 / INDEX_MAX)
    }

    /// The size as a number.
    pub fn get(self) -> f64 {
        self.0
    }

    fn index(self, position: [f64; 3]) -> Result<[i64; 3], VoxelError> {
        let mut index = [0; 3];
        for (cell, coordinate) in index.iter_mut().zip(position) {
            let value = (coordinate / self.0).floor();
            if value.is_nan() || value.abs() >= INDEX_MAX {
                let least = Self::least_at(coordinate.abs());
                return Err(VoxelError::TooSmall { voxel: self.0, coordinate, least });
            }
            *cell = value as i64;
        }
        Ok(index)
    }
}

/// The data of one cube.
#[derive(Clone, Copy, Default)]
struct Cell {
    position: [f64; 3],
    count: u64,
    color: [u64; 3],
    colored: u64,
}

/// The occupied cubes.
pub struct Grid {
    size: VoxelSize,
    // This is the seeded hash of the standard library. It is needed because the coordinates are untrusted.
    cells: HashMap<[i64; 3], Cell>,
}

impl Grid {
    /// An empty grid.
    pub fn new(size: VoxelSize) -> Self {
        Self { size, cells: HashMap::new() }
    }

    /// Adds a point to its cube.
    pub fn add(&mut self, point: &Point) -> Result<(), VoxelError> {
        let cell = self.cells.entry(self.size.index(point.position)?).or_default();
        cell.count += 1;
        for (sum, value) in cell.position.iter_mut().zip(point.position) {
            *sum += value;
        }
        if let Some(color) = point.color {
            cell.colored += 1;
            for (sum, value) in cell.color.iter_mut().zip(color) {
                *sum += u64::from(value);
            }
        }
        Ok(())
    }

    /// Number of occupied cubes.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Whether no point was added.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// One point per cube: the mean of the points in it. The points are ordered by the position of the cube.
    pub fn into_cloud(self) -> Vec<Point> {
        let mut cells: Vec<_> = self.cells.into_iter().collect();
        cells.sort_unstable_by_key(|(index, _)| *index);
        cells.into_iter().map(|(_, cell)| cell.mean()).collect()
    }
}

impl Cell {
    fn mean(&self) -> Point {
        let count = self.count as f64;
        let color =
            (self.colored > 0).then(|| self.color.map(|sum| ((sum + self.colored / 2) / self.colored).min(255) as u8));
        Point { position: self.position.map(|sum| sum / count), color }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::synth::Random;

    fn point(position: [f64; 3]) -> Point {
        Point { position, color: None }
    }

    #[test]
    fn grid_matches_a_model_with_all_points() {
        for seed in 0..20 {
            let mut random = Random::new(seed);
            let size = 0.01 + random.unit() * 0.4;
            let points: Vec<Point> = (0..2_000)
                .map(|_| Point {
                    position: std::array::from_fn(|_| random.unit() * 4.0 - 2.0),
                    color: (random.unit() < 0.7).then(|| std::array::from_fn(|_| random.next() as u8)),
                })
                .collect();
            let mut model: BTreeMap<Vec<i64>, Vec<&Point>> = BTreeMap::new();
            let mut grid = Grid::new(VoxelSize::new(size).expect("a size above 0"));
            for point in &points {
                let place = point.position.iter().map(|value| (value / size).floor() as i64).collect();
                model.entry(place).or_default().push(point);
                grid.add(point).expect("near the origin");
            }
            assert_eq!(grid.len(), model.len());
            for (mean, members) in grid.into_cloud().iter().zip(model.values()) {
                for axis in 0..3 {
                    let sum: f64 = members.iter().map(|point| point.position[axis]).sum();
                    assert!((mean.position[axis] - sum / members.len() as f64).abs() < 1e-12);
                }
                let colors: Vec<[u8; 3]> = members.iter().filter_map(|point| point.color).collect();
                assert_eq!(mean.color.is_some(), !colors.is_empty());
                for (channel, value) in mean.color.into_iter().flatten().enumerate() {
                    let sum: f64 = colors.iter().map(|color| f64::from(color[channel])).sum();
                    assert!((f64::from(value) - sum / colors.len() as f64).abs() <= 0.5);
                }
            }
        }
    }

    #[test]
    fn point_order_does_not_matter() {
        let mut random = Random::new(7);
        // Multiples of a power of two have exact sums in any order.
        let mut points: Vec<Point> =
            (0..500).map(|_| point(std::array::from_fn(|_| (random.next() % 64) as f64 / 16.0 - 2.0))).collect();
        let run = |points: &[Point]| {
            let mut grid = Grid::new(VoxelSize::new(0.5).expect("a size above 0"));
            points.iter().for_each(|point| grid.add(point).expect("near the origin"));
            grid.into_cloud()
        };
        let forward = run(&points);
        points.reverse();
        assert_eq!(forward, run(&points));
    }

    #[test]
    fn voxels_do_not_overlap_at_zero() {
        let mut grid = Grid::new(VoxelSize::new(1.0).expect("a size above 0"));
        for x in [-0.5, -0.25, 0.25, 0.5] {
            grid.add(&point([x, 0.0, 0.0])).expect("near the origin");
        }
        assert_eq!(grid.into_cloud(), [point([-0.375, 0.0, 0.0]), point([0.375, 0.0, 0.0])]);
    }

    #[test]
    fn invalid_voxel_sizes_are_refused() {
        for found in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = VoxelSize::new(found).expect_err("not a size").to_string();
            assert_eq!(error, format!("expected a voxel size that is finite and above 0, found {found}"));
        }
        let mut grid = Grid::new(VoxelSize::new(1e-12).expect("a size above 0"));
        let error = grid.add(&point([0.0, 5e6, 0.0])).expect_err("5e18 cubes").to_string();
        assert!(
            error.starts_with("voxel size 0.000000000001 is too small for a point at 5000000: choose at least 2.2"),
            "{error}"
        );
        let mut grid = Grid::new(VoxelSize::new(VoxelSize::least_at(5e6)).expect("a size above 0"));
        grid.add(&point([5e6, -5e6, 0.0])).expect("the size named in the error works");
        let mut grid = Grid::new(VoxelSize::new(f64::MIN_POSITIVE / 2.0).expect("a size above 0"));
        assert!(grid.add(&point([1.0, 0.0, 0.0])).is_err(), "an index that is not even finite");
    }
}
