//! Names of artifacts and downloaded files. Pure text, no I/O.
//!
//! The wire defines the rules. Later stages find results by these names, so the name of an input that
//! works today must not change.

use std::{borrow::Cow, path::Path};

use sha2::{Digest, Sha256};

use super::digest::hex;
use crate::model::{PortError, PortErrorKind, TaskId, in_a_line};

/// Longest artifact path that a runner may give, in bytes.
pub(crate) const PATH_BYTES_MAX: usize = 1024;
/// Longest name or type that every domain server accepts, in bytes (posemesh.md section 10.5).
const NAME_BYTES_MAX: usize = 128;
/// Bytes of a path's digest in a name: enough to distinguish all paths of a task.
const MARK_BYTES: usize = 8;
/// Longest task id that is unchanged in a name.
const TASK_BYTES_MAX: usize = 64;
/// Longest folder or file stem on disk. File systems allow 255 bytes with the extension.
const STEM_BYTES_MAX: usize = 160;
/// Longest file extension on disk.
const EXTENSION_BYTES_MAX: usize = 64;

/// A runner's artifact path without leading, doubled or trailing slashes and without `.` segments.
pub(crate) fn relative_path(path: &str) -> Result<String, PortError> {
    let refuse = |why: &str| Err(PortError::new(PortErrorKind::InvalidPath, why.to_owned()));
    if path.len() > PATH_BYTES_MAX {
        return refuse(&format!("artifact path has {} bytes; at most {PATH_BYTES_MAX} are allowed", path.len()));
    }
    if path.contains('\0') {
        return refuse("artifact path contains a NUL character; use printable names");
    }
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty() && *segment != ".").collect();
    if segments.contains(&"..") {
        let path = for_message(path);
        return refuse(&format!(
            "artifact path {path} contains a `..` segment; expected a path below the outputs prefix"
        ));
    }
    Ok(segments.join("/"))
}

/// Outputs prefix and relative path, joined.
pub(crate) fn logical_path(prefix: Option<&str>, relative: &str) -> String {
    match prefix.map(|prefix| prefix.trim_matches('/')) {
        None | Some("") => relative.to_owned(),
        Some(prefix) if relative.is_empty() => prefix.to_owned(),
        Some(prefix) => format!("{prefix}/{relative}"),
    }
}

/// The stored name of an artifact for which the runner gives none. It ends in the task id, so that a repeated
/// attempt replaces the data of an earlier one. A name that is too long for servers is cut and marked, so that
/// it stays unique.
pub(crate) fn stored_name(logical: &str, task: &TaskId) -> String {
    let name = format!("{}_{}", safe(logical, "artifact"), in_file_name(task));
    if name.len() <= NAME_BYTES_MAX { name } else { marked_name(logical, task) }
}

/// The name for a second path of one task whose [`stored_name`] is already taken. It depends only on the path
/// and the task.
pub(crate) fn marked_name(logical: &str, task: &TaskId) -> String {
    let mark = hex(&Sha256::digest(logical.as_bytes())[..MARK_BYTES]);
    let end = format!("_{mark}_{}", in_file_name(task));
    format!("{}{end}", cut(safe(logical, "artifact"), NAME_BYTES_MAX.saturating_sub(end.len())))
}

/// A task id as a part of a file name. An id with other characters, or a long one, becomes its hash.
pub(super) fn in_file_name(task: &TaskId) -> Cow<'_, str> {
    let text = task.as_str();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if text.len() <= TASK_BYTES_MAX && text.bytes().all(plain) {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(hex(&Sha256::digest(text.as_bytes())[..16]))
    }
}

/// The data type of a path, by its extension.
pub(crate) fn data_type(relative: &str) -> String {
    let Some(extension) = Path::new(relative).extension() else { return "binary".to_owned() };
    let extension = extension.to_string_lossy().trim().to_lowercase();
    match extension.as_str() {
        "json" | "ply" | "glb" | "obj" | "csv" | "mp4" => extension,
        "drc" => "ply_draco".to_owned(),
        // Their names distinguish such artifacts, so a type that is too long for servers is cut.
        other => format!("{}_data", cut(safe(other, "artifact"), NAME_BYTES_MAX - "_data".len())),
    }
}

/// Folder of a downloaded part below `datasets/`: the time stamp in its name, otherwise the name. Files of one
/// scan have the same time stamp.
pub(crate) fn dataset_folder(name: &str) -> String {
    cut(safe(time_stamp(name).unwrap_or(name), "part"), STEM_BYTES_MAX)
}

/// Stem and extension of a downloaded part's file. Runners recognise files by the extension.
pub(crate) fn dataset_file(name: &str, data_type: &str) -> (String, String) {
    (cut(safe(name, "part"), STEM_BYTES_MAX), cut(safe(data_type, "part"), EXTENSION_BYTES_MAX))
}

/// The first `YYYY-MM-DD_HH-MM-SS` (or with `-` in the middle) in `name`.
fn time_stamp(name: &str) -> Option<&str> {
    const SHAPE: &[u8] = b"0000-00-00_00-00-00";
    let fits = |window: &[u8]| {
        window.iter().zip(SHAPE).all(|(byte, shape)| match shape {
            b'0' => byte.is_ascii_digit(),
            b'_' => matches!(byte, b'_' | b'-'),
            _ => byte == shape,
        })
    };
    let at = name.as_bytes().windows(SHAPE.len()).position(fits)?;
    // Only ASCII matched, so both ends are character boundaries.
    name.get(at..at + SHAPE.len())
}

/// Replaces every character outside `A–Z a–z 0–9 - _` by `_`. An empty text becomes `empty`.
pub(crate) fn safe(text: &str, empty: &str) -> String {
    if text.is_empty() {
        return empty.to_owned();
    }
    text.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' }).collect()
}

fn cut(mut ascii: String, limit: usize) -> String {
    ascii.truncate(limit);
    ascii
}

/// `text` for an error message: one line of bounded length.
pub(crate) fn for_message(text: &str) -> String {
    const CHARS_MAX: usize = 200;
    let mut for_message = in_a_line(&text.chars().take(CHARS_MAX).collect::<String>());
    if text.chars().nth(CHARS_MAX).is_some() {
        for_message.push('…');
    }
    for_message
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const TASK: Uuid = Uuid::nil();

    /// prefix, path as the runner gives it, expected `logical name type` with `TASK` for the id.
    #[track_caller]
    fn check(prefix: Option<&str>, path: &str, expected: [&str; 3]) {
        let relative = relative_path(path).expect("an acceptable path");
        let logical = logical_path(prefix, &relative);
        let name = stored_name(&logical, &TASK.into()).replace(&TASK.to_string(), "TASK");
        assert_eq!([logical.as_str(), name.as_str(), data_type(&relative).as_str()], expected, "{prefix:?} {path:?}");
    }

    #[test]
    fn artifact_names_follow_the_wire() {
        // The samples of the contract.
        check(Some("/a/b/"), "/x/y.PLY", ["a/b/x/y.PLY", "a_b_x_y_PLY_TASK", "ply"]);
        check(None, "dir.v1/file", ["dir.v1/file", "dir_v1_file_TASK", "binary"]);
        check(None, "é.json", ["é.json", "__json_TASK", "json"]);
        check(None, "p.we ird", ["p.we ird", "p_we_ird_TASK", "we_ird_data"]);
        check(Some("p"), "", ["p", "p_TASK", "binary"]);
        // Its table of extensions.
        for (path, kind) in [
            ("a.json", "json"),
            ("a.ply", "ply"),
            ("a.glb", "glb"),
            ("a.obj", "obj"),
            ("a.csv", "csv"),
            ("a.mp4", "mp4"),
            ("a.drc", "ply_draco"),
            ("a.zip", "zip_data"),
            ("a.tar.gz", "gz_data"),
            ("a.", "artifact_data"),
            ("a", "binary"),
            ("d/.json", "binary"),
        ] {
            assert_eq!(data_type(path), kind, "{path}");
        }
        check(None, "", ["", "artifact_TASK", "binary"]);
        check(Some("///"), "a.csv", ["a.csv", "a_csv_TASK", "csv"]);
    }

    #[test]
    fn artifact_paths_are_normalised_or_refused() {
        check(None, "a//b", ["a/b", "a_b_TASK", "binary"]);
        check(None, "./a/./b/", ["a/b", "a_b_TASK", "binary"]);
        check(None, "..a/b..", ["..a/b..", "__a_b___TASK", "artifact_data"]);
        let long = "x".repeat(PATH_BYTES_MAX + 1);
        for bad in ["..", "a/../b", "/..", "a\0b", &long] {
            let err = relative_path(bad).expect_err("an impossible path");
            assert_eq!(err.kind, PortErrorKind::InvalidPath, "{bad:?}");
            assert!(err.message.len() < 400 && !err.message.contains('\0'), "{}", err.message);
        }
        assert!(relative_path(&long[1..]).is_ok(), "the limit itself is allowed");
    }

    #[test]
    fn marked_names_depend_only_on_path_and_task() {
        let name = marked_name("a_b.json", &TASK.into());
        assert_eq!(name, marked_name("a_b.json", &TASK.into()));
        let paths = ["a_b.json", "a/b.json", "a.b.json", "a b.json", "é_b.json"];
        let names: std::collections::BTreeSet<String> =
            paths.iter().map(|path| marked_name(path, &TASK.into())).collect();
        assert_eq!(names.len(), paths.len());
        assert!(name.starts_with("a_b_json_") && name.ends_with(&format!("_{TASK}")), "{name}");
        assert_eq!(name.len(), "a_b_json".len() + 1 + 2 * MARK_BYTES + 1 + 36);
    }

    #[test]
    fn long_names_and_types_are_cut() {
        let longest = "x".repeat(NAME_BYTES_MAX - 1 - 36);
        assert_eq!(
            stored_name(&longest, &TASK.into()),
            format!("{longest}_{TASK}"),
            "a name at the limit is unchanged"
        );
        let [one, two] = ["/a", "_a"].map(|end| stored_name(&format!("{longest}{end}"), &TASK.into()));
        assert_eq!((one.len(), two.len()), (NAME_BYTES_MAX, NAME_BYTES_MAX));
        assert_ne!(one, two, "cut names stay different");
        assert!(one.ends_with(&TASK.to_string()));
        assert_eq!(data_type(&format!("a.{}", "é".repeat(200))).len(), NAME_BYTES_MAX);
    }

    #[test]
    fn downloads_have_folders_by_scan() {
        assert_eq!(dataset_folder("dmt_2025-06-01_08-30-00"), "2025-06-01_08-30-00");
        assert_eq!(dataset_folder("é2025-06-01-08-30-00é"), "2025-06-01-08-30-00");
        assert_eq!(dataset_folder("2025-06-01 08-30-00"), "2025-06-01_08-30-00");
        assert_eq!(dataset_folder("../.."), "_____");
        assert_eq!(dataset_folder(""), "part");
        let file = |name, kind| dataset_file(name, kind);
        assert_eq!(file("scan a", "dmt_manifest_json"), ("scan_a".into(), "dmt_manifest_json".into()));
        assert_eq!(file("", ""), ("part".into(), "part".into()));
        let (stem, extension) = file(&"n".repeat(900), &"t".repeat(900));
        assert!(stem.len() + extension.len() < 250, "the file system accepts it with a counter");
    }

    #[test]
    fn any_task_id_is_safe_in_file_names() {
        let longest = "x".repeat(TaskId::BYTES_MAX);
        let [dots, path, long] = ["..", "../a/b", &longest].map(|id| TaskId::parse(id).expect("an id"));
        for task in [&dots, &path, &long] {
            let name = in_file_name(task);
            assert!(name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit()), "{name}");
        }
        assert_ne!(in_file_name(&dots), in_file_name(&path));
        assert_eq!(in_file_name(&TaskId::from(TASK)), TASK.to_string());
        assert!(marked_name(&"y".repeat(500), &long).len() <= NAME_BYTES_MAX);
    }
}
