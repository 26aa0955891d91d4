//! Tests whole scans, from file to picture: a synthetic scan and, on request, a real one.
//!
//! The pictures stay in the target folder (`target/tmp/*.png`) for inspection.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use pointcloud::downsample::{self, FileSource, Outcome, Settings};
use pointcloud::ply::{Encoding, Reader};
use pointcloud::synth;
use serde_json::json;

/// Runs the job and keeps its picture.
fn run(name: &str, files: &[PathBuf], meta: &serde_json::Value) -> (Outcome, Vec<u8>) {
    let sources: Vec<FileSource> =
        files.iter().map(|path| FileSource::new(name, path).expect("the file exists")).collect();
    let settings = Settings::from_meta(meta).expect("good settings");
    let mut cloud = Vec::new();
    let percent = AtomicU8::new(0);
    let progress = |now: downsample::Progress| {
        assert!(percent.swap(now.percent, Ordering::Relaxed) <= now.percent, "progress fell to {now:?}");
    };
    let outcome = downsample::run(&sources, settings, &mut cloud, &progress, &|| false).expect("a good scan");
    assert_eq!(percent.load(Ordering::Relaxed), 100);
    let picture = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.png"));
    std::fs::write(&picture, &outcome.preview).expect("the target folder takes files");
    println!("{name}: {} -> {}", outcome.report.to_json(), picture.display());
    (outcome, cloud)
}

fn points_in(cloud: &[u8]) -> u64 {
    let mut reader = Reader::new(cloud).expect("our own header");
    let mut points = 0;
    while reader.next_point().expect("our own rows").is_some() {
        points += 1;
    }
    points
}

#[test]
fn generated_scan_gives_cloud_and_picture() {
    for (name, points, meta) in [
        ("knot", 400_000, json!({})),
        ("knot_sparse", 4_000, json!({ "voxel": 0.001 })),
        ("knot_coarse", 400_000, json!({ "voxel": 0.02 })),
    ] {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.ply"));
        let file = std::fs::File::create(&path).expect("the target folder takes files");
        synth::write_scan(std::io::BufWriter::new(file), 1, points, Encoding::LittleEndian).expect("disk has room");
        let (outcome, cloud) = run(name, std::slice::from_ref(&path), &meta);
        std::fs::remove_file(path).expect("the scan was written just above");
        assert_eq!((outcome.report.points_in, outcome.report.skipped), (points, 0));
        assert_eq!(points_in(&cloud), outcome.report.points_out);
        assert!(outcome.report.points_out <= points);
    }
}

#[test]
#[ignore = "needs igea.ply: set RUNNER_HOST_TEST_DATA to its folder, and run with --ignored"]
fn igea_is_thinned_and_drawn() {
    let data = std::env::var_os("RUNNER_HOST_TEST_DATA").expect("RUNNER_HOST_TEST_DATA is the folder of igea.ply");
    let path = PathBuf::from(data).join("igea.ply");
    let (outcome, cloud) = run("igea", &[path], &json!({}));
    assert_eq!((outcome.report.points_in, outcome.report.skipped), (134_345, 0));
    assert_eq!(points_in(&cloud), outcome.report.points_out);
    assert!((20_000..100_000).contains(&outcome.report.points_out), "{}", outcome.report.points_out);
}
