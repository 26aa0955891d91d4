//! The inputs of a job: files, which are uploaded, and data that is stored already.

use std::path::{Path, PathBuf};

use url::Url;
use uuid::Uuid;

use crate::cli::unreadable;

/// What `--input` takes.
const FORMS: &str = "expected a file, the id (a UUID) of stored data, or its http(s) URL";

/// One input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Input {
    File(PathBuf),
    /// An id or a URL, exactly as it was given.
    Stored(String),
}

impl Input {
    /// Reads an argument. A file with this name is an input, even if the name is an id.
    ///
    /// # Errors
    /// One line about an argument that has none of the forms.
    pub(super) fn read(argument: &Path) -> Result<Self, String> {
        let shown = argument.display();
        match std::fs::metadata(argument) {
            Err(err) => match argument.to_str().filter(|text| is_stored(text)) {
                Some(text) => Ok(Self::Stored(text.to_owned())),
                None => Err(format!("--input {shown}: {err}; {FORMS}")),
            },
            Ok(about) => match unreadable("--input", argument) {
                Some(why) => Err(why),
                None if !about.is_file() => Err(format!("--input {shown}: expected a file, found something else")),
                None => Ok(Self::File(argument.to_owned())),
            },
        }
    }

    /// Its name, where inputs have names.
    pub(super) fn name(&self) -> String {
        match self {
            Self::File(file) => file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            Self::Stored(text) => text.clone(),
        }
    }
}

/// Whether this is an id with hyphens, or an absolute URL.
fn is_stored(text: &str) -> bool {
    let is_id = text.len() == uuid::fmt::Hyphenated::LENGTH && Uuid::parse_str(text).is_ok();
    let is_url = |url: Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    is_id || (text.contains("://") && Url::parse(text).is_ok_and(is_url))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_files_ids_or_urls() {
        let dir = tempfile::tempdir().expect("a folder");
        let id = "0b9c6d1e-52f3-4b2e-9d0a-0c8f3f1d7a11";
        let stored = |text: &str| assert_eq!(Input::read(Path::new(text)), Ok(Input::Stored(text.to_owned())));
        stored(id);
        stored(&id.to_uppercase());
        stored("https://ds.example/api/v1/domains/d/data?name=scan%20a&data_type=ply");
        stored(&format!("http://127.0.0.1:8700/api/v1/domains/d/data/{}", "x".repeat(5000)));
        for text in ["scan.ply", "", &id[1..], &id.replace('-', ""), "ftp://a/b", "https://", "/api/v1/data/x", "a://b"]
        {
            let err = Input::read(Path::new(text)).expect_err(text);
            assert!(err.starts_with(&format!("--input {text}: ")) && err.ends_with(FORMS), "{err}");
        }
        let file = dir.path().join(id);
        std::fs::write(&file, "x").expect("writable");
        assert_eq!(Input::read(&file), Ok(Input::File(file.clone())));
        assert_eq!(Input::File(file).name(), id);
        let err = Input::read(dir.path()).expect_err("a folder");
        assert!(err.ends_with("expected a file, found a folder"), "{err}");
    }
}
