//! Writes a synthetic scan: `cargo run -p pointcloud --example scan -- FILE [POINTS [SEED]]`.
//!
//! The demo and the benchmark make their inputs with it. The same seed gives the same file everywhere.

use std::{fs::File, io::BufWriter, process::ExitCode};

use pointcloud::{ply::Encoding, synth::write_scan};

const USAGE: &str = "usage: scan FILE [POINTS [SEED]], such as scan scan.ply 1000000 7";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match write(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("error: {problem}");
            ExitCode::from(2)
        }
    }
}

fn write(arguments: &[String]) -> Result<(), String> {
    let (path, numbers) = arguments.split_first().ok_or(USAGE)?;
    let number = |index: usize, usual: u64| match numbers.get(index) {
        None => Ok(usual),
        Some(text) => text.parse().map_err(|_| format!("expected a number, found {text:?}; {USAGE}")),
    };
    let (points, seed) = (number(0, 1_000_000)?, number(1, 7)?);
    let file = File::create(path).map_err(|err| format!("{path}: {err}"))?;
    write_scan(BufWriter::new(file), seed, points, Encoding::LittleEndian).map_err(|err| format!("{path}: {err}"))
}
