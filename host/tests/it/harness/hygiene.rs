//! No secret may leave a process. The output of every process that a test starts is searched when the process ends.
//!
//! The search is for the secrets given to the process, in every encoding. It is also for recognisable values of the
//! dev server: node tokens, callback secrets, and domain tokens by their form. It covers the output of the process,
//! its scratch and state folders, and its pages ([`super::node`]).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Shorter values are not treated as secrets, because they occur in ordinary words.
const SECRET_BYTES_MIN: usize = 12;
/// Larger files contain data.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// Settings that contain secrets, and settings that name folders a process writes to.
const SECRETS: [&str; 2] = ["REG_SECRET", "SECP256K1_PRIVHEX"];
const FOLDERS: [&str; 3] = ["SCRATCH_DIR", "STATE_DIR", "TMPDIR"];
/// Prefixes of the dev server's node tokens and callback secrets, and both forms of its domain tokens.
const MARKS: [&str; 4] = ["dev-node-token-", "dev-callback-secret-", ".eyJ", "dom-ZXlK"];

/// The secrets of a process, and the folders where it could have left them.
pub(crate) struct Hygiene {
    texts: Vec<String>,
    folders: Vec<PathBuf>,
}

impl Hygiene {
    /// For a process with these variables.
    pub(crate) fn of(env: &BTreeMap<String, String>) -> Self {
        let given = SECRETS.iter().filter_map(|name| {
            let from_file = || std::fs::read_to_string(env.get(&format!("{name}_FILE"))?).ok();
            env.get(*name).cloned().or_else(from_file)
        });
        let given = given.map(|secret| secret.trim().to_owned()).filter(|secret| secret.len() >= SECRET_BYTES_MIN);
        let spellings = |secret: String| {
            let bare = secret.strip_prefix("0x").unwrap_or(&secret).to_owned();
            let escaped = |text: &str| {
                let json = serde_json::Value::from(text).to_string();
                json[1..json.len() - 1].to_owned()
            };
            // A JSON body in a JSON log line is escaped twice.
            let (once, twice) = (escaped(&bare), escaped(&escaped(&bare)));
            [bare.to_lowercase(), bare.to_uppercase(), once, twice, bare]
        };
        let mut texts: Vec<String> = given.flat_map(spellings).collect();
        texts.extend(MARKS.map(str::to_owned));
        texts.sort();
        texts.dedup();
        let folders = FOLDERS.iter().filter_map(|name| env.get(*name).map(PathBuf::from)).collect();
        Self { texts, folders }
    }

    /// The first line of `bytes` that contains a secret.
    pub(crate) fn find(&self, bytes: &[u8]) -> Option<String> {
        let at = self.texts.iter().find_map(|text| memchr::memmem::find(bytes, text.as_bytes()))?;
        let start = memchr::memrchr(b'\n', &bytes[..at]).map_or(0, |end| end + 1);
        let line = bytes[start..].split(|byte| *byte == b'\n').next().unwrap_or_default();
        Some(String::from_utf8_lossy(&line[..line.len().min(4096)]).into_owned())
    }

    /// The first file below the process' folders that contains a secret.
    pub(crate) fn find_in_files(&self) -> Option<String> {
        self.folders.iter().find_map(|folder| self.walk(folder))
    }

    fn walk(&self, folder: &Path) -> Option<String> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).find_map(|path| {
            let facts = path.symlink_metadata().ok()?;
            if facts.is_dir() {
                return self.walk(&path);
            }
            if !facts.is_file() || facts.len() > FILE_BYTES_MAX {
                return None;
            }
            let line = self.find(&std::fs::read(&path).ok()?)?;
            Some(format!("{}: {line}", path.display()))
        })
    }
}

#[test]
fn search_finds_only_secrets_in_every_spelling() {
    let key = format!("0x{}", "aB".repeat(32));
    let env = [("SECP256K1_PRIVHEX", key.as_str()), ("REG_SECRET", "planted-\"secret\""), ("CLIENT_ID", "somebody")];
    let hygiene = Hygiene::of(&env.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    for leak in [
        "ab".repeat(32),
        "AB".repeat(32),
        key,
        "it is planted-\"secret\"".to_owned(),
        r#"{"registration_credentials":"planted-\"secret\""}"#.to_owned(),
        r#"{"error":"got {\"secret\":\"planted-\\\"secret\\\"\"}"}"#.to_owned(),
        "dev-node-token-00".to_owned(),
        "bearer eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJkZHMifQ.c2ln".to_owned(),
    ] {
        assert_eq!(hygiene.find(format!("one\ntwo {leak} three\nfour").as_bytes()), Some(format!("two {leak} three")));
    }
    assert_eq!(hygiene.find(b"client somebody signed in with ab12"), None);
}
