//! A folder of plugins, and the output of the binary for it.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use super::{
    fixtures,
    node::{Cli, Finished},
};

/// A plugins folder that a test fills, with an optional plugins file.
pub(crate) struct Folder {
    root: TempDir,
    file: Option<PathBuf>,
    env: Vec<(String, String)>,
}

impl Folder {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().expect("a folder below the system's temporary one");
        std::fs::create_dir(root.path().join("plugins")).expect("the folder is writable");
        Self { root, file: None, env: Vec::new() }
    }

    /// With a valid library `good.so` that serves `/fixtures/good/v1`.
    pub(crate) fn with_a_good_one() -> Self {
        let folder = Self::new();
        folder.put("good.so", &fixtures::c("refused", &["CAPABILITY=\"/fixtures/good/v1\""]));
        folder
    }

    /// The root of all files. It is the current folder of the binary.
    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("plugins").join(name)
    }

    /// Copies a library into the folder.
    pub(crate) fn put(&self, name: &str, library: &Path) -> PathBuf {
        let path = self.path(name);
        std::fs::copy(library, &path).unwrap_or_else(|err| panic!("copy {}: {err}", library.display()));
        path
    }

    /// Writes any file.
    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("the folder is writable");
        path
    }

    pub(crate) fn plugins_file(&mut self, text: &str) {
        let file = self.root.path().join("plugins.toml");
        std::fs::write(&file, text).expect("the folder is writable");
        self.file = Some(file);
    }

    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        self.env.push((name.to_owned(), value.into()));
    }

    /// For tests of the complete output: default logs, whatever `IT_RUST_LOG` sets.
    pub(crate) fn usual_logs(mut self) -> Self {
        self.set("RUST_LOG", "");
        self
    }

    /// A command on this folder.
    pub(crate) fn cli(&self, args: &[&str]) -> Cli {
        let mut cli = Cli::new(args).arg("--plugins").arg(self.root.path().join("plugins")).dir(self.root.path());
        // For task directories of `invoke` and copies of libraries.
        cli = cli.set("TMPDIR", self.root.path().to_string_lossy());
        if let Some(file) = &self.file {
            cli = cli.arg("--plugins-file").arg(file);
        }
        for (name, value) in &self.env {
            cli = cli.set(name, value.as_str());
        }
        cli
    }

    /// `plugins list` as text.
    pub(crate) async fn rows(&self, code: i32) -> Vec<String> {
        let Finished { stdout, .. } = self.cli(&["plugins", "list"]).run().await.expect(code);
        stdout.lines().map(str::to_owned).collect()
    }

    /// `plugins list -o json`.
    pub(crate) async fn listings(&self, code: i32) -> Vec<Value> {
        let Finished { stdout, .. } = self.cli(&["plugins", "list", "-o", "json"]).run().await.expect(code);
        serde_json::from_str(&stdout).unwrap_or_else(|err| panic!("{err}: {stdout}"))
    }

    /// Runs one task of `capability`.
    pub(crate) async fn invoke(&self, capability: &str, args: &[&str]) -> Finished {
        let mut cli = self.cli(&["invoke", capability]).arg("--out").arg(self.root.path().join("out"));
        for arg in args {
            cli = cli.arg(*arg);
        }
        cli.run().await
    }

    /// The bytes that `invoke` published.
    pub(crate) fn output(&self, path: &str) -> Vec<u8> {
        let path = self.root.path().join("out").join(path);
        std::fs::read(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
    }
}
