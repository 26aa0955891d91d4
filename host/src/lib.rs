//! runner-host: a node for leased compute.
//!
//! The binary only calls this library. [`app`] is the composition root: it builds the modules in order
//! and starts them. Start reading at [`engine`]: its `attempt` runs one task from the lease to the report.
//! `ARCHITECTURE.md` has the module map.

pub mod app;
pub mod auth;
pub mod cli;
pub mod config;
pub mod control;
mod crash;
pub mod dev;
pub mod engine;
pub mod leases;
mod listen;
pub mod model;
pub mod node_event;
pub mod observe;
#[cfg(unix)]
mod open_files;
pub mod outbox;
pub mod plugins;
pub mod session;
pub mod storage;
pub mod transport;
