//! `/pointcloud/downsample/v1`: reads point clouds and makes a thinner one, a picture and a report.
//!
//! [`downsample`] is the whole job without a host. Read its `run` first. [`ply`] reads and writes the files.
//! [`voxel`] holds the grid. [`preview`] draws the picture. [`synth`] makes scans for tests and the demo. No module
//! keeps the points it reads. Memory grows with the number of occupied voxels.

pub mod cloud;
pub mod downsample;
pub mod ply;
pub mod preview;
mod runner;
pub mod synth;
pub mod voxel;

pub use runner::Downsample;
