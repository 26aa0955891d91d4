//! Writes the Rust code of `lease.proto`. Run it in its folder after a change of the file.
//!
//! `host/src/leases/node_runtime/lease.in.rs` gets the messages, the client, and the server for the dev server and
//! tests. With `--check` it writes nothing, and fails if the file would change.

use std::{error::Error, fs, path::Path, process::ExitCode};

const HEAD: &str = "// Written by host/protos/generate from host/protos/lease.proto. Do not edit.\n";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let check = std::env::args().any(|argument| argument == "--check");
    let protos = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this folder is below host/protos");
    let host = protos.parent().expect("protos is below host");
    let files = protox::compile(["lease.proto"], [protos])?;
    let out = tempfile::tempdir()?;
    tonic_prost_build::configure()
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .out_dir(out.path())
        .compile_fds(files)?;
    let text = format!("{HEAD}{}", fs::read_to_string(out.path().join("lease.rs"))?);
    let target = host.join("src/leases/node_runtime/lease.in.rs");
    if !check {
        fs::write(target, text)?;
    } else if fs::read_to_string(&target).unwrap_or_default() != text {
        eprintln!("{} differs from lease.proto; run `cargo run` in host/protos/generate", target.display());
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
