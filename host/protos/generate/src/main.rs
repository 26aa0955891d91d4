//! Writes the Rust code of `lease.proto`. Run it in its folder after a change of the file.
//!
//! `host/src/leases/node_runtime/lease.in.rs` gets the messages and the client. `host/tests/it/lease_server.in.rs` gets the
//! server for the tests. With `--check` it writes nothing, and fails if a file would change.

use std::{error::Error, fs, path::Path, process::ExitCode};

const HEAD: &str = "// Written by host/protos/generate from host/protos/lease.proto. Do not edit.\n";

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let check = std::env::args().any(|argument| argument == "--check");
    let protos = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this folder is below host/protos");
    let host = protos.parent().expect("protos is below host");
    let files = protox::compile(["lease.proto"], [protos])?;
    let out = tempfile::tempdir()?;
    let mut same = true;
    for (client, target) in [(true, "src/leases/node_runtime/lease.in.rs"), (false, "tests/it/lease_server.in.rs")] {
        let mut builder = tonic_prost_build::configure()
            .build_transport(false)
            .build_client(client)
            .build_server(!client)
            .emit_rerun_if_changed(false)
            .out_dir(out.path());
        if !client {
            builder = builder.extern_path(".lease", "::runner_host::leases::node_runtime::lease");
        }
        builder.compile_fds(files.clone())?;
        let text = format!("{HEAD}{}", fs::read_to_string(out.path().join("lease.rs"))?);
        let target = host.join(target);
        if check {
            if fs::read_to_string(&target).unwrap_or_default() != text {
                eprintln!("{} differs from lease.proto; run `cargo run` in host/protos/generate", target.display());
                same = false;
            }
        } else {
            fs::write(target, text)?;
        }
    }
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
