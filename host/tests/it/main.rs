//! The integration tests: the real binary, the real embedded world over loopback, real plugins.
//!
//! A module per promise; what they stand on is in [`harness`].

#![allow(missing_docs, reason = "tests are named as statements")]

mod harness;

mod abi_calls;
mod lease_path;
mod plugin_files;
mod refusals;
mod strangers;
