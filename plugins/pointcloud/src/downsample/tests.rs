use std::cell::{Cell, RefCell};

use super::*;
use crate::synth::{Random, write_scan};

/// Bytes as a source. It counts how often it was opened.
struct Held {
    label: String,
    bytes: Vec<u8>,
    opened: Cell<usize>,
}

impl Held {
    fn new(label: &str, bytes: impl Into<Vec<u8>>) -> Self {
        Self { label: label.to_owned(), bytes: bytes.into(), opened: Cell::new(0) }
    }

    fn scan(label: &str, seed: u64, points: u64, encoding: Encoding) -> Self {
        let mut bytes = Vec::new();
        write_scan(&mut bytes, seed, points, encoding).expect("a Vec takes every byte");
        Self::new(label, bytes)
    }

    fn ascii(rows: &[&str]) -> Self {
        let head = "ply\nformat ascii 1.0\nelement vertex";
        let tail = "property double x\nproperty double y\nproperty double z\nend_header\n";
        Self::new("rows", format!("{head} {}\n{tail}{}", rows.len(), rows.join("\n")))
    }
}

impl Source for Held {
    fn label(&self) -> &str {
        &self.label
    }

    fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        self.opened.set(self.opened.get() + 1);
        Ok(Box::new(self.bytes.as_slice()))
    }
}

fn size(voxel: f64) -> Settings {
    Settings { voxel: Some(VoxelSize::new(voxel).expect("a size above 0")) }
}

fn try_run(sources: &[Held], settings: Settings) -> Result<(Outcome, Vec<u8>), DownsampleError> {
    let mut cloud = Vec::new();
    run(sources, settings, &mut cloud, &|_| (), &|| false).map(|outcome| (outcome, cloud))
}

fn points(cloud: &[u8]) -> Vec<Point> {
    let mut reader = Reader::new(cloud).expect("our own header");
    std::iter::from_fn(|| reader.next_point().expect("our own rows")).collect()
}

/// The error and its causes as the host shows them, and whether the input is the cause.
fn refusal(sources: &[Held], settings: Settings) -> (String, bool) {
    let error = try_run(sources, settings).map(|(outcome, _)| outcome.report).expect_err("must be refused");
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text += &format!(": {inner}");
        cause = inner.source();
    }
    (text, error.is_invalid_input())
}

#[test]
fn derived_voxel_size_needs_a_second_pass() {
    let given = [Held::scan("scan", 1, 5_000, Encoding::LittleEndian)];
    let (outcome, cloud) = try_run(&given, size(0.02)).expect("a good scan");
    assert_eq!((given[0].opened.get(), outcome.report.voxel), (1, 0.02));
    assert_eq!(points(&cloud).len() as u64, outcome.report.points_out);

    let derived = [Held::scan("scan", 1, 5_000, Encoding::LittleEndian)];
    let (outcome, _) = try_run(&derived, Settings::default()).expect("a good scan");
    assert_eq!((derived[0].opened.get(), outcome.report.voxel), (2, outcome.report.bounds.diagonal() / 256.0));
}

#[test]
fn encodings_do_not_change_the_result() {
    let run = |encoding| try_run(&[Held::scan("scan", 4, 3_000, encoding)], size(0.02)).expect("a good scan");
    let [ascii, little, big] = [Encoding::Ascii, Encoding::LittleEndian, Encoding::BigEndian].map(run);
    assert!(little.1 == big.1 && little.0.preview == big.0.preview);
    assert_eq!(little.0.report.points_out, ascii.0.report.points_out);
    for (one, other) in points(&little.1).iter().zip(points(&ascii.1)) {
        assert!((0..3).all(|axis| (one.position[axis] - other.position[axis]).abs() < 1e-6), "{one:?} {other:?}");
        assert_eq!(one.color, other.color);
    }
}

#[test]
fn several_inputs_are_merged_into_one_grid() {
    let whole: Vec<Point> = crate::synth::Scan::new(9, 4_000).collect();
    let part = |points: &[Point]| {
        let layout = Layout { encoding: Encoding::BigEndian, wide: true, color: true };
        let mut writer = Writer::new(Vec::new(), layout, points.len() as u64).expect("a Vec takes every byte");
        points.iter().for_each(|point| writer.point(point).expect("a Vec takes every byte"));
        Held::new("part", writer.finish().expect("the announced count"))
    };
    for settings in [size(0.05), Settings::default()] {
        let (together, cloud) = try_run(&[part(&whole)], settings).expect("a good scan");
        let parts = [part(&whole[..1_500]), part(&[]), part(&whole[1_500..])];
        let (apart, merged) = try_run(&parts, settings).expect("good scans");
        assert!(cloud == merged && together.preview == apart.preview);
        assert_eq!(
            Report { elapsed: Duration::ZERO, ..together.report },
            Report { elapsed: Duration::ZERO, ..apart.report }
        );
    }
}

#[test]
fn points_without_coordinates_are_skipped_and_counted() {
    let source = [Held::ascii(&["0 0 0", "nan 1 1", "2 2 2", "inf 0 0", "0.5 0 0"])];
    let (outcome, cloud) = try_run(&source, size(1.0)).expect("a good file");
    let Report { points_in, points_out, skipped, bounds, .. } = outcome.report;
    assert_eq!((points_in, points_out, skipped), (5, 2, 2));
    assert_eq!(bounds, Bounds { min: [0.0; 3], max: [2.0; 3] });
    let means: Vec<[f64; 3]> = points(&cloud).iter().map(|point| point.position).collect();
    assert_eq!(means, [[0.25, 0.0, 0.0], [2.0, 2.0, 2.0]]);
    let json = outcome.report.to_json();
    assert_eq!(json["bounds"], json!({ "min": [0.0, 0.0, 0.0], "max": [2.0, 2.0, 2.0] }));
    assert_eq!((&json["points_in"], &json["skipped"], &json["voxel"]), (&json!(5), &json!(2), &json!(1.0)));
    assert!(json["elapsed_ms"].is_u64());
}

#[test]
fn coordinates_far_from_the_origin_stay_exact() {
    // Metres in a national grid, thinned to a millimetre. A float would move the points by a quarter of a metre.
    let source = [Held::ascii(&["5500000.1234 400000.5 100", "5500000.1254 400000.5 100"])];
    let (outcome, cloud) = try_run(&source, size(0.001)).expect("a good file");
    assert_eq!(outcome.report.points_out, 2);
    assert_eq!(points(&cloud)[0].position, [5_500_000.123_4, 400_000.5, 100.0]);
    // The derived size is never finer than the resolution of the coordinates.
    let source = [Held::ascii(&["1e15 0 0", "1000000000000000.5 0 0"])];
    let (outcome, _) = try_run(&source, Settings::default()).expect("a good file");
    assert!(outcome.report.voxel >= 0.25, "{}", outcome.report.voxel);
    // A single position has no size from which a voxel size can be derived.
    let (outcome, _) = try_run(&[Held::ascii(&["7 7 7", "7 7 7"])], Settings::default()).expect("a good file");
    assert_eq!((outcome.report.points_out, outcome.report.voxel), (1, 1.0));
}

#[test]
fn bad_input_is_refused_in_one_line() {
    let lie =
        "ply\nformat ascii 1.0\nelement vertex 9\nproperty int x\nproperty int y\nproperty int z\nend_header\n1 2 3\n";
    let empty = lie.replace("vertex 9", "vertex 0").replace("1 2 3\n", "");
    for (sources, settings, expected) in [
        (vec![], size(1.0), "expected at least one PLY file as input, found none"),
        (
            vec![Held::scan("first", 1, 10, Encoding::Ascii), Held::new("second", lie)],
            size(1.0),
            "second is not a readable PLY file: the header promises 9 rows of element `vertex`, the data ends after 1",
        ),
        (
            vec![Held::new("input", "solid cube\n")],
            Settings::default(),
            "input is not a readable PLY file: line 1: expected `ply`, found `solid cube`",
        ),
        (
            vec![Held::new("input", "")],
            size(1.0),
            "input is not a readable PLY file: line 1: expected `ply`, found the end of the file",
        ),
        (
            vec![Held::new("input", empty.clone())],
            size(1.0),
            "expected points with finite coordinates, found none (0 skipped)",
        ),
        (
            vec![Held::ascii(&["nan 0 0"])],
            Settings::default(),
            "expected points with finite coordinates, found none (1 skipped)",
        ),
        (
            vec![Held::ascii(&["0 1e200 0"])],
            Settings::default(),
            "rows: expected coordinates within 1e100 of the origin, found 1e200",
        ),
        (
            vec![Held::ascii(&["0 5e6 0"])],
            size(1e-12),
            "voxel size 0.000000000001 is too small for a point at 5000000: choose at least 2.220446049250313e-9",
        ),
    ] {
        assert_eq!(refusal(&sources, settings), (expected.to_owned(), true));
    }
    // An element that a false header describes costs no memory and no time, whatever its count.
    let huge = lie.replace("vertex 9", "vertex 18446744073709551615");
    assert!(refusal(&[Held::new("input", huge)], size(1.0)).1);
}

#[test]
fn failing_source_is_not_invalid_input() {
    struct Broken(bool);
    impl Source for Broken {
        fn label(&self) -> &str {
            "input"
        }
        fn bytes(&self) -> u64 {
            1
        }
        fn open(&self) -> io::Result<Box<dyn Read + '_>> {
            if self.0 { Ok(Box::new(Failing)) } else { Err(io::Error::other("gone")) }
        }
    }
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("gone"))
        }
    }
    for opens in [true, false] {
        let error = run(&[Broken(opens)], size(1.0), io::sink(), &|_| (), &|| false).expect_err("a broken source");
        assert!(!error.is_invalid_input(), "{error}");
    }
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::other("no room"))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let scan = [Held::scan("scan", 1, 100, Encoding::Ascii)];
    let error = run(&scan, size(1.0), Full, &|_| (), &|| false).expect_err("a full disk");
    assert!(matches!(error, DownsampleError::Write(_)) && !error.is_invalid_input());
}

#[test]
fn settings_come_from_meta() {
    let parse = |meta: Value| Settings::from_meta(&meta).map_err(|error| error.to_string());
    assert_eq!(parse(json!({})), Ok(Settings::default()));
    assert_eq!(parse(json!({ "voxel": null, "budgets": {} })), Ok(Settings::default()));
    assert_eq!(parse(Value::Null), Ok(Settings::default()));
    assert_eq!(parse(json!({ "voxel": 0.25 })), Ok(size(0.25)));
    assert_eq!(parse(json!({ "voxel": 2 })), Ok(size(2.0)));
    for (given, shown) in [
        (json!(0), "0".to_owned()),
        (json!(-1.5), "-1.5".to_owned()),
        (json!("0.1"), "\"0.1\"".to_owned()),
        (json!([1]), "[1]".to_owned()),
        (json!("é".repeat(50)), format!("\"{}…", "é".repeat(39))),
    ] {
        assert_eq!(
            parse(json!({ "voxel": given })),
            Err(format!("meta.voxel: expected a number above 0, found {shown}"))
        );
    }
}

#[test]
fn progress_rises_and_names_every_stage() {
    for (settings, stages) in
        [(Settings::default(), "measuring reading drawing writing"), (size(0.01), "reading drawing writing")]
    {
        let reported = RefCell::new(Vec::new());
        let scans = [1, 2].map(|seed| Held::scan("scan", seed, 200_000, Encoding::LittleEndian));
        run(&scans, settings, io::sink(), &|now| reported.borrow_mut().push(now), &|| false).expect("good scans");
        let reported = reported.into_inner();
        assert!(reported.is_sorted_by_key(|now| now.percent), "{reported:?}");
        assert_eq!((reported[0].percent, reported[reported.len() - 1].percent), (0, 100));
        assert!((20..=102).contains(&reported.len()), "{} calls", reported.len());
        let mut seen: Vec<&str> = reported.iter().map(|now| now.stage.name()).collect();
        seen.dedup();
        assert_eq!(seen.join(" "), stages);
    }
}

#[test]
fn cancel_stops_the_job_in_every_stage() {
    let scans = [Held::scan("scan", 1, 300_000, Encoding::LittleEndian)];
    let looks = Cell::new(0_u64);
    let finish = |stop_at: u64| {
        looks.set(0);
        let cancelled = || looks.replace(looks.get() + 1) == stop_at;
        run(&scans, Settings::default(), io::sink(), &|_| (), &cancelled)
    };
    finish(u64::MAX).expect("nobody cancels");
    let all = looks.get();
    // 4.5 MB, read twice, in pieces of 64 KiB.
    assert!(all >= 2 * 300_000 * 15 / READ_BYTES as u64, "{all} looks");
    for stop_at in (0..all).step_by(7).chain([all - 1]) {
        let error = finish(stop_at).map(|outcome| outcome.report).expect_err("cancelled");
        assert!(matches!(error, DownsampleError::Cancelled(_)), "{error:?}");
        assert_eq!(looks.get(), stop_at + 1, "it stops at once");
    }
}

#[test]
fn garbage_is_refused_without_a_panic() {
    let scan = Held::scan("scan", 1, 40, Encoding::Ascii).bytes;
    for seed in 0..1_000 {
        let mut random = Random::new(seed);
        let mut bytes = scan.clone();
        for _ in 0..=random.next() % 6 {
            let at = (random.next() % bytes.len() as u64) as usize;
            bytes[at] = b"0123456789eE+-. \nnaif\xff\0"[(random.next() % 23) as usize];
        }
        if let Err(error) = each_point(
            &[Held::new("input", bytes)],
            &Watch { progress: &|_| (), cancelled: &|| false, last: Cell::new(None) },
            Stage::Reading,
            0..100,
            |_| Ok(()),
        ) {
            assert!(error.is_invalid_input(), "{error:?}");
        }
    }
}
