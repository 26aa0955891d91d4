//! Builds the measured binaries in the target folder of this binary, and creates folders of plugins.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

/// The capability whose plugin is copied to fill a folder.
const NOOP: &str = "/examples/noop/v1";

/// The binaries, and a scratch folder that is removed at the end.
pub(crate) struct Built {
    folder: PathBuf,
    scratch: tempfile::TempDir,
}

impl Built {
    pub(crate) fn make() -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("find this binary")?;
        let folder = own.parent().context("this binary is in no folder")?.to_owned();
        let target = folder.parent().context("this binary is in no target folder")?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        // Plugins are built separately, as their authors do. In one build they would get the dependency features that
        // the host enables.
        for packages in [&["runner-host"][..], &["noop", "echo"]] {
            let mut build = Command::new(&cargo);
            // `cargo run` sets variables that name this package, and the build scripts of some dependencies read
            // them. If they stayed set, each build would invalidate the other.
            for (name, _) in std::env::vars_os() {
                let text = name.to_string_lossy();
                let own = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
                if own.iter().any(|own| text.starts_with(own)) {
                    build.env_remove(&name);
                }
            }
            build.args(["build", "--release", "--quiet", "--manifest-path"]);
            build.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")).arg("--target-dir").arg(target);
            build.args(packages.iter().flat_map(|package| ["--package", package]));
            let status = build.status().context("start cargo")?;
            anyhow::ensure!(status.success(), "{} could not be built", packages.join(" and "));
        }
        // In the target folder, because the system's temporary folder may be in memory.
        let scratch = tempfile::Builder::new().prefix("bench-").tempdir_in(target).context("make a scratch folder")?;
        Ok(Self { folder, scratch })
    }

    pub(crate) fn host(&self) -> PathBuf {
        self.folder.join("runner-host")
    }

    /// The folder for all files that are written during the measurements.
    pub(crate) fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    pub(crate) fn library(&self, name: &str) -> PathBuf {
        self.folder.join(format!("lib{name}.so"))
    }

    /// A folder of `count` plugins and the file that configures them. Each plugin is the noop runner without its
    /// sleep.
    pub(crate) fn noops(&self, count: usize) -> anyhow::Result<(PathBuf, PathBuf)> {
        self.plugins(&format!("{count}-plugins"), count, "sleep_secs = 0.0")
    }

    /// The same with one noop runner, and `config` for it.
    pub(crate) fn noop(&self, folder: &str, config: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
        self.plugins(folder, 1, config)
    }

    /// No two plugins may serve one capability. So each copy gets another name of the same length, in the manifest
    /// and in the code.
    fn plugins(&self, folder: &str, count: usize, config: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
        let folder = self.scratch.path().join(folder);
        let listing = folder.join("plugins.toml");
        if listing.is_file() {
            return Ok((folder, listing));
        }
        std::fs::create_dir_all(&folder)?;
        let original = std::fs::read(self.library("noop")).context("read the noop plugin")?;
        let mut entries = String::new();
        for number in 0..count {
            let mut library = original.clone();
            if number > 0 {
                let name = format!("/examples/n{number:03}/v1");
                let places: Vec<usize> = memchr::memmem::find_iter(&original, NOOP).collect();
                anyhow::ensure!(!places.is_empty() && name.len() == NOOP.len(), "the noop plugin does not name {NOOP}");
                for at in places {
                    library[at..at + NOOP.len()].copy_from_slice(name.as_bytes());
                }
            }
            let file = format!("noop{number}.so");
            std::fs::write(folder.join(&file), library)?;
            entries.push_str(&format!("[[plugin]]\nfile = \"{file}\"\nconfig = {{ {config} }}\n\n"));
        }
        std::fs::write(&listing, entries)?;
        Ok((folder, listing))
    }
}
