//! Tests against programs of others. `host/tests/outside/install` installs them; `cargo test` alone skips this target.
//!
//! `cargo test -p runner-host --test outside` runs the real binary against a Node Runtime control plane in Python
//! (`control_plane.py`).

#[path = "../it/harness/mod.rs"]
#[allow(dead_code, reason = "these tests use only a part of the shared harness")]
mod harness;
mod node_runtime;
