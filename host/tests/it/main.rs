//! The integration tests: the real binary, the real dev server over loopback, real plugins.
//!
//! One module per promise. The shared base is in [`harness`].

#![allow(missing_docs, reason = "tests are named as statements")]

mod abi_calls;
mod abi_matrix;
#[cfg(feature = "grpc")]
mod appsettings;
mod artifacts;
mod bad_answers;
mod bad_config;
mod bad_leases;
#[cfg(feature = "grpc")]
mod bad_node_planes;
mod both_planes;
mod cancel_command;
mod cancellation;
mod cli;
mod clocks;
mod concurrency;
mod config_files;
mod crash_points;
mod disk;
mod ends;
mod faults;
mod foreign_plugins;
mod harness;
mod heartbeats;
mod hostile;
mod inputs;

mod lease_life;
mod lease_path;
mod local_plane;
mod login;
mod logs;
mod memory;
mod node_events;
#[cfg(feature = "grpc")]
mod node_runtime;
mod outbox;
mod pages;
#[cfg(feature = "grpc")]
mod plane_tls;
mod plugin_files;
mod pointcloud;
mod polling;
mod refusals;
mod registration;
#[cfg(feature = "grpc")]
mod run_data;
#[cfg(feature = "grpc")]
mod runs;
mod secrets;
mod settings;
#[cfg(feature = "grpc")]
mod several_planes;
mod signals;
mod time_limits;

mod tls_and_proxy;
mod zip;
