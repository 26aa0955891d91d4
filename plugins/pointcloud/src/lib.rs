//! `/pointcloud/downsample/v1`: a point cloud in, a thinner one, a picture and a report out.
//!
//! [`downsample`] is the whole job without a host: read its `run` first. [`ply`] reads and writes the
//! files, [`voxel`] holds the grid, [`preview`] draws, and [`synth`] makes scans for tests and the demo.
//! Nothing here keeps the points it reads: memory grows with the voxels that are occupied.

pub mod cloud;
pub mod downsample;
pub mod ply;
pub mod preview;
mod runner;
pub mod synth;
pub mod voxel;

pub use runner::Downsample;
