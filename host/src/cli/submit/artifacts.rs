//! Reads the receipts of a finished job, and chooses the paths of its artifacts.

use std::{
    fmt, fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde_json::{Value, json};

/// One artifact of a finished task.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Artifact {
    pub(super) logical_path: String,
    pub(super) source: Source,
    /// Its path, after it was stored.
    pub(super) path: Option<PathBuf>,
}

/// Where the bytes of an artifact are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// In the domain, under this id. `None`: the report has no id, so they cannot be found.
    Domain(Option<String>),
    /// Here: the control plane has sent them with the result.
    Inline(Bytes),
}

impl Artifact {
    fn id(&self) -> Option<&str> {
        match &self.source {
            Source::Domain(id) => id.as_deref(),
            Source::Inline(_) => None,
        }
    }

    pub(super) fn to_json(&self) -> Value {
        // JSON holds only text. Bytes of a path that are not UTF-8 become U+FFFD.
        let path = self.path.as_deref().map(Path::to_string_lossy);
        json!({ "logical_path": self.logical_path, "id": self.id(), "path": path })
    }
}

impl fmt::Display for Artifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}", path.display()),
            None => write!(f, "{} {}", self.logical_path, self.id().unwrap_or("-")),
        }
    }
}

/// The artifacts in the newest receipt of a task that has outputs. Other
/// implementations may list ids only: then the id is used as the path.
pub(super) fn listed(job: &Value, task: &str) -> Vec<Artifact> {
    let has_outputs = |receipt: &&Value| {
        let filled = |list: &Value| list.as_array().is_some_and(|list| !list.is_empty());
        filled(&receipt["outputs"]) || filled(&receipt["meta"]["artifacts"])
    };
    let Some(receipt) = receipts(job, task).filter(has_outputs).last() else { return Vec::new() };
    let named = receipt["meta"]["artifacts"].as_array().into_iter().flatten();
    let mut found: Vec<Artifact> = named
        .filter_map(|artifact| {
            let logical_path = artifact["logical_path"].as_str()?.to_owned();
            let id = artifact["id"].as_str().map(ToOwned::to_owned);
            Some(Artifact { logical_path, source: Source::Domain(id), path: None })
        })
        .collect();
    for id in receipt["outputs"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !found.iter().any(|artifact| artifact.id() == Some(id)) {
            let source = Source::Domain(Some(id.to_owned()));
            found.push(Artifact { logical_path: id.to_owned(), source, path: None });
        }
    }
    found
}

/// Why a task failed, by its newest receipt.
pub(super) fn reason(job: &Value, task: &str) -> String {
    let reason = receipts(job, task).filter_map(|receipt| receipt["meta"]["reason"].as_str()).last();
    reason.unwrap_or("the control plane gives no reason").to_owned()
}

fn receipts<'a>(job: &'a Value, task: &'a str) -> impl Iterator<Item = &'a Value> {
    job["receipts"].as_array().into_iter().flatten().filter(move |receipt| receipt["task_id"] == task)
}

/// Why an artifact cannot be stored under its logical path.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum UnusablePath {
    #[error("names no file")]
    Empty,
    #[error("would leave the folder")]
    OutsideFolder,
    /// On other systems a backslash or a colon begins an absolute path.
    #[error("contains a character that is invalid in file names")]
    InvalidCharacter,
    #[error("has a name that is too long for a file")]
    TooLong,
    #[error("leads through an existing file")]
    ThroughFile,
    #[error("is the path of an existing folder")]
    Folder,
}

/// A path below `folder` for a logical path.
///
/// # Errors
/// When the logical path is not a usable path below `folder`.
pub(super) fn local_path(folder: &Path, logical_path: &str) -> Result<PathBuf, UnusablePath> {
    let mut path = folder.to_owned();
    let mut deeper = false;
    for segment in logical_path.split('/').filter(|segment| !segment.is_empty() && *segment != ".") {
        if segment == ".." {
            return Err(UnusablePath::OutsideFolder);
        }
        if segment.contains(['\0', '\\', ':']) {
            return Err(UnusablePath::InvalidCharacter);
        }
        path.push(segment);
        deeper = true;
    }
    if deeper { Ok(path) } else { Err(UnusablePath::Empty) }
}

/// Creates the folders above `path` and checks whether a file can be stored there. `Some` if not.
///
/// # Errors
/// Errors that do not concern the path, such as a full disk.
pub(super) fn create_parents(path: &Path) -> io::Result<Option<UnusablePath>> {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    match made.and_then(|()| fs::symlink_metadata(path)) {
        Ok(metadata) => Ok(metadata.is_dir().then_some(UnusablePath::Folder)),
        Err(err) => match err.kind() {
            ErrorKind::NotFound => Ok(None),
            ErrorKind::AlreadyExists | ErrorKind::NotADirectory => Ok(Some(UnusablePath::ThroughFile)),
            ErrorKind::InvalidFilename => Ok(Some(UnusablePath::TooLong)),
            _ => Err(err),
        },
    }
}

/// `text` as one harmless file name.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn artifacts_stay_below_the_folder() {
        let check = |path: &str| local_path(Path::new("out"), path);
        assert_eq!(check("a/b.json"), Ok(PathBuf::from("out/a/b.json")));
        assert_eq!(check("/abs//x/./y"), Ok(PathBuf::from("out/abs/x/y")));
        for (why, bad) in [
            (UnusablePath::OutsideFolder, &["../x", "a/../../x"][..]),
            (UnusablePath::Empty, &["", "/", ".", "//./"]),
            (UnusablePath::InvalidCharacter, &["a\0b", "a\\..\\b", "C:x"]),
        ] {
            for path in bad {
                assert_eq!(check(path).as_ref(), Err(&why), "{path:?}");
            }
        }
        assert_eq!(plain("../a b"), "___a_b");
    }

    #[test]
    fn newest_receipt_gives_artifacts_and_failure_reason() {
        let job = json!({"receipts": [
            {"task_id": "t", "outputs": [], "meta": {"reason": "first"}},
            {"task_id": "t", "outputs": ["d-1", "d-2"], "meta": {"artifacts": [{"logical_path": "a.json", "id": "d-1"}]}},
            {"task_id": "other", "outputs": [], "meta": {"reason": "not this one"}},
        ]});
        let artifact = |path: &str, id: &str| Artifact {
            logical_path: path.to_owned(),
            source: Source::Domain(Some(id.to_owned())),
            path: None,
        };
        assert_eq!(listed(&job, "t"), [artifact("a.json", "d-1"), artifact("d-2", "d-2")]);
        assert_eq!(reason(&job, "t"), "first");
        assert_eq!(reason(&job, "unknown"), "the control plane gives no reason");
    }
}
