use std::io::Cursor;

use zip::{ZipWriter, write::SimpleFileOptions};

use super::*;

/// A compressed archive of these files.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    archive_with(files, SimpleFileOptions::default().compression_method(CompressionMethod::Deflated))
}

fn archive_with(files: &[(&str, &[u8])], options: SimpleFileOptions) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in files {
        match name.strip_suffix('/') {
            Some(_) => writer.add_directory(*name, options).expect("written"),
            None => {
                writer.start_file(*name, options).expect("written");
                writer.write_all(bytes).expect("written");
            }
        }
    }
    writer.finish().expect("written").into_inner()
}

/// Replaces every `old` by `new`, which has the same length.
fn edited(mut archive: Vec<u8>, old: &[u8], new: &[u8]) -> Vec<u8> {
    assert_eq!(old.len(), new.len());
    let places: Vec<usize> = memchr::memmem::find_iter(&archive, old).collect();
    assert!(!places.is_empty());
    for at in places {
        archive[at..at + new.len()].copy_from_slice(new);
    }
    archive
}

/// The offset of the nth entry in the archive's directory.
fn listed(archive: &[u8], nth: usize) -> usize {
    memchr::memmem::find_iter(archive, b"PK\x01\x02").nth(nth).expect("listed")
}

/// Unpacks, and returns the files with their paths below the folder, or the refusal. Nothing is written outside
/// the folder.
fn check(bytes: &[u8], limits: &UnpackLimits) -> Result<Vec<(String, Vec<u8>)>, String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (path, into) = (dir.path().join("a.zip"), dir.path().join("in/to"));
    fs::write(&path, bytes).expect("written");
    let unpacked = unpack(&path, &into, limits, &|| false);
    let outside = fs::read_dir(dir.path()).expect("listed").count();
    assert!(outside <= 2 && fs::read_dir(dir.path().join("in")).map_or(0, Iterator::count) <= 1);
    let files = unpacked.map_err(|err| err.to_string())?;
    let read = |path: PathBuf| {
        let below = path.strip_prefix(&into).expect("below the folder").to_str().expect("text").to_owned();
        (below, fs::read(path).expect("there"))
    };
    Ok(files.into_iter().map(read).collect())
}

#[track_caller]
fn refused(bytes: &[u8], text: &str) {
    let err = check(bytes, &UnpackLimits::default()).expect_err("refused");
    assert!(err.contains(text) && !err.contains(['\n', '\0']), "{err} does not say {text}");
}

#[test]
fn files_have_the_order_of_the_archive() {
    // posemesh.md section 11.4: stored without compression, and packed.
    let files: [(&str, &[u8]); 4] =
        [("images.bin", &[7; 300_000]), ("sub/", b""), ("sub/cameras.bin", b"c"), ("./a//empty.txt", b"")];
    for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
        for zip64 in [false, true] {
            let options = SimpleFileOptions::default().compression_method(method).large_file(zip64);
            let found = check(&archive_with(&files, options), &UnpackLimits::default()).expect("valid");
            let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, ["images.bin", "sub/cameras.bin", "a/empty.txt"]);
            assert!(found[0].1 == [7; 300_000] && found[1].1 == b"c");
        }
    }
    assert_eq!(check(&archive(&[]), &UnpackLimits::default()).expect("valid"), []);
}

#[test]
fn names_outside_the_folder_are_refused() {
    for (name, why) in [
        ("../evil", "would leave the folder"),
        ("a/../../evil", "would leave the folder"),
        ("a/..", "would leave the folder"),
        ("/etc/evil", "absolute path"),
        ("C:evil", "absolute path"),
        ("c:/evil", "absolute path"),
        ("a\\..\\..\\evil", "backslash"),
        ("\\\\host\\evil", "backslash"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
    ] {
        // Written with a harmless name of that length first, because the writer refuses some names.
        let harmless = "q".repeat(name.len());
        refused(&edited(archive(&[(&harmless, b"x")]), harmless.as_bytes(), name.as_bytes()), why);
    }
    refused(&archive(&[(&"n".repeat(256), b"x")]), "more than 255 bytes");
    refused(&archive(&[(&"n/".repeat(600), b"")]), "more than 1024 bytes");
    refused(&archive(&[("./", b"")]), "has no name");
}

#[test]
fn links_and_special_files_are_refused() {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    writer.add_symlink("link", "/etc/passwd", SimpleFileOptions::default()).expect("written");
    let link = writer.finish().expect("written").into_inner();
    refused(&link, "is a link");
    for mode in [0o010_644_u32, 0o020_644, 0o060_644, 0o140_644] {
        let mut special = archive(&[("special", b"")]);
        let at = listed(&special, 0);
        special[at + 5] = 3; // made on Unix
        special[at + 38..at + 42].copy_from_slice(&(mode << 16).to_le_bytes());
        refused(&special, "is a special file");
    }
}

#[test]
fn duplicate_names_are_refused() {
    let two = |one: &str, other: &str| archive(&[(one, b"1"), (other, b"2")]);
    refused(&edited(two("same", "came"), b"came", b"same"), "twice");
    refused(&two("same", "SAME"), "twice");
    refused(&two("sub/É", "SUB/é"), "twice");
    refused(&two("a", "a/b"), "both as a file and as a folder");
    refused(&two("a/b", "A"), "both as a file and as a folder");
    check(&archive(&[("a/", b""), ("a/b", b"1")]), &UnpackLimits::default()).expect("valid");
}

#[test]
fn overlapping_entries_are_refused() {
    // The second entry of the directory points at the first one's data.
    let mut shared = archive(&[("a", &[1; 100]), ("b", &[1; 100])]);
    let at = listed(&shared, 1);
    shared[at + 42..at + 46].copy_from_slice(&0_u32.to_le_bytes());
    refused(&shared, "overlap");

    // The data of the first entry covers the second entry with its header, as in archives that unpack to far more
    // than their own size.
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut quoting = archive_with(&[("a", b"1"), ("b", &[2; 100])], stored);
    let (first, second) = (listed(&quoting, 0), memchr::memmem::rfind(&quoting, b"PK\x03\x04").expect("a header"));
    let data = u32::try_from(first - second + 1).expect("small");
    for at in [20, 24] {
        quoting[first + at..first + at + 4].copy_from_slice(&data.to_le_bytes());
    }
    refused(&quoting, "overlap");
}

#[test]
fn zip_bombs_are_refused_before_unpacking() {
    let limits = UnpackLimits::default();
    let zeros = archive(&[("zeros", &vec![0; 20 << 20])]);
    let err = check(&zeros, &limits).expect_err("a ratio of a thousand");
    assert_eq!(err, "it unpacks to 20971520 bytes, more than 200 times its size (UNPACK_RATIO_MAX)");
    check(&zeros, &UnpackLimits { ratio: 2000, ..limits.clone() }).expect("where the operator allows it");
    let two = archive(&[("a", &[1; 600]), ("b", &[2; 600])]);
    let err = check(&two, &UnpackLimits { bytes: 1199, ..limits.clone() }).expect_err("too large");
    assert_eq!(err, "it unpacks to 1200 bytes, at most 1199 are allowed (UNPACK_BYTES_MAX)");
    check(&two, &UnpackLimits { bytes: 1200, ..limits.clone() }).expect("the limit itself");
    let err = check(&two, &UnpackLimits { files: 1, ..limits.clone() }).expect_err("too many");
    assert_eq!(err, "it contains 2 files and folders, at most 1 are allowed (UNPACK_FILES_MAX)");
    // The end record states a directory of 4 GiB.
    let mut changed = two.clone();
    let end = memchr::memmem::rfind(&changed, b"PK\x05\x06").expect("an end");
    changed[end + 12..end + 16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(check(&changed, &limits).expect_err("too large").contains("directory has 4294967295 bytes"));
}

#[test]
fn sizes_in_the_directory_are_checked() {
    for size in [99_u32, 101] {
        let mut changed = archive(&[("a", &[1; 100])]);
        let at = listed(&changed, 0);
        changed[at + 24..at + 28].copy_from_slice(&size.to_le_bytes());
        refused(&changed, "its entry a ");
    }
}

#[test]
fn damaged_archives_are_refused() {
    let valid =
        archive_with(&[("a", &[1; 1000])], SimpleFileOptions::default().compression_method(CompressionMethod::Stored));
    refused(&valid[..valid.len() - 30], "not a valid zip");
    refused(&valid[500..], "not a valid zip");
    refused(b"ply\nformat ascii 1.0\n", "not a valid zip");
    refused(b"", "not a valid zip");
    let mut flipped = valid.clone();
    flipped[500] ^= 1;
    refused(&flipped, "its entry a cannot be unpacked: Invalid checksum");
    let mut encrypted = valid.clone();
    let at = listed(&valid, 0);
    encrypted[at + 8] |= 1;
    encrypted[6] |= 1;
    refused(&encrypted, "is encrypted");
    let mut unknown = valid;
    unknown[at + 10..at + 12].copy_from_slice(&98_u16.to_le_bytes());
    refused(&unknown, "compressed by another method than deflate");
}

#[test]
fn unpacking_stops_between_blocks() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("a.zip");
    fs::write(&path, archive(&[("a", &vec![1; 4 * BLOCK_BYTES])])).expect("written");
    let checks = std::cell::Cell::new(0);
    let stop = || checks.replace(checks.get() + 1) == 2;
    let stopped = unpack(&path, &dir.path().join("out"), &UnpackLimits::default(), &stop);
    assert!(matches!(stopped, Err(UnpackError::Stopped)));
    let written = fs::metadata(dir.path().join("out/a")).expect("there").len();
    assert!(written <= 2 * BLOCK_BYTES as u64, "{written}");
}

#[test]
fn archive_folders_follow_the_data_type() {
    for (data_type, expected) in
        [("refined_scan_zip", true), ("zip", true), ("zip_data", true), ("gzip", false), ("zip_json", false)]
    {
        assert_eq!(is_archive(data_type), expected, "{data_type}");
    }
    let refined = folder("refined_scan_zip", "refined_scan_2025-06-01_08-30-00", 1);
    assert_eq!(refined, Path::new("refined/local/2025-06-01_08-30-00/sfm"));
    assert_eq!(folder("refined_scan_zip", "../x", 1), Path::new("refined/local/___x/sfm"));
    assert_eq!(folder("zip", "clouds", 1), Path::new("unpacked/clouds"));
}

#[test]
fn folders_in_file_names_are_counted() {
    let deep: Vec<String> = (0..40).map(|number| format!("{number}/{}f", "d/".repeat(400))).collect();
    let files: Vec<(&str, &[u8])> = deep.iter().map(|name| (name.as_str(), b"".as_slice())).collect();
    let limits = UnpackLimits { files: 1000, ..UnpackLimits::default() };
    let err = check(&archive(&files), &limits).expect_err("refused");
    assert!(err.ends_with("files and folders, at most 1000 are allowed (UNPACK_FILES_MAX)"), "{err}");
    assert_eq!(check(&archive(&files[..2]), &limits).expect("few enough").len(), 2);
}
