//! `plugins new`: writes a runner crate that builds and passes its test without changes.
//!
//! It writes whole files and fills in the name. It runs no tool and uses no network. It never changes an existing
//! folder that is not empty.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why no crate was written.
#[derive(Debug, thiserror::Error)]
pub enum ScaffoldError {
    /// The name is not a valid crate name.
    #[error("`{name}` cannot be the name of a plugin: {why}; expected something like `my-runner`")]
    Name {
        /// The name as given.
        name: String,
        /// What is wrong with the name.
        why: &'static str,
    },
    /// The target folder exists and is not empty.
    #[error("{} exists and is not an empty folder; choose another name or remove it", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// The folder cannot be created at this path.
    #[error("{}: expected a folder, found a file at {}; name another path", path.display(), file.display())]
    FileInPath {
        /// The folder.
        path: PathBuf,
        /// The file that is a part of the path.
        file: PathBuf,
    },
    /// No SDK was named, and cargo cannot find one by itself.
    #[error(
        "runner-sdk is not published yet, so cargo cannot find it; name a copy with --sdk PATH, the folder runner-sdk of this project's source"
    )]
    SdkNotNamed,
    /// The named folder does not contain the SDK.
    #[error("{} holds no runner-sdk (no Cargo.toml of that package); pass the folder that does", path.display())]
    NoSdk {
        /// The path as given.
        path: PathBuf,
    },
    /// The path cannot be written to a Cargo.toml.
    #[error("{} is not valid UTF-8, which a Cargo.toml must be; move the SDK elsewhere", path.display())]
    NotUtf8 {
        /// The SDK's folder.
        path: PathBuf,
    },
    /// A file or folder could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        #[source]
        source: io::Error,
    },
}

/// Writes a runner crate called `name` into `dir` and returns the files. `dir` must not exist or must be empty. The
/// crate depends on the copy of runner-sdk in the folder `sdk`.
///
/// The crate has its own workspace table. Therefore it also builds inside the folder of another project.
///
/// # Errors
/// When the name, the folder or the SDK is invalid. Nothing was written then.
pub fn create(dir: &Path, name: &str, sdk: Option<&Path>) -> Result<Vec<PathBuf>, ScaffoldError> {
    check_name(name)?;
    let dependency = dependency(sdk.ok_or(ScaffoldError::SdkNotNamed)?)?;
    if let Some(file) = dir.ancestors().skip(1).find(|above| above.is_file()) {
        return Err(ScaffoldError::FileInPath { path: dir.to_owned(), file: file.to_owned() });
    }
    if !is_free(dir) {
        return Err(ScaffoldError::Occupied { path: dir.to_owned() });
    }
    let names = Names { name, library: name.replace('-', "_"), runner: runner_name(name) };
    let files = [
        ("Cargo.toml", cargo_toml(&names, &dependency)),
        ("src/lib.rs", lib_rs(&names)),
        ("README.md", readme(&names)),
        (".gitignore", "/target\n".to_owned()),
    ];
    let mut written = Vec::with_capacity(files.len());
    for (file, text) in files {
        let path = dir.join(file);
        let parent = path.parent().unwrap_or(dir);
        std::fs::create_dir_all(parent).map_err(|source| ScaffoldError::Write { path: parent.to_owned(), source })?;
        std::fs::write(&path, text).map_err(|source| ScaffoldError::Write { path: path.clone(), source })?;
        written.push(path);
    }
    Ok(written)
}

struct Names<'a> {
    name: &'a str,
    library: String,
    runner: String,
}

impl Names<'_> {
    fn fill(&self, template: &str) -> String {
        template.replace("{name}", self.name).replace("{library}", &self.library).replace("{runner}", &self.runner)
    }
}

/// The longest crate name. With prefix and suffix it is a valid file name on every system.
const NAME_BYTES_MAX: usize = 64;

/// Words that are invalid as crate names. They already have a meaning for cargo, for the compiler or in the code of the
/// new crate.
const RESERVED: [&str; 14] = [
    "alloc",
    "build",
    "core",
    "deps",
    "examples",
    "incremental",
    "proc-macro",
    "proc_macro",
    "runner-sdk",
    "runner_sdk",
    "serde-json",
    "serde_json",
    "std",
    "test",
];

/// Types that the written code uses. A runner with such a name would hide the type.
const USED_TYPES: [&str; 12] =
    ["Default", "Err", "Error", "Ok", "Option", "Result", "Runner", "Some", "String", "TaskCtx", "TestHost", "Vec"];

/// Rust's keywords.
const KEYWORDS: [&str; 52] = [
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "crate", "do", "dyn", "else",
    "enum", "extern", "false", "final", "fn", "for", "gen", "if", "impl", "in", "let", "loop", "macro", "match", "mod",
    "move", "mut", "override", "priv", "pub", "ref", "return", "self", "static", "struct", "super", "trait", "true",
    "try", "type", "typeof", "union", "unsafe", "unsized", "use", "virtual", "where", "while", "yield",
];

fn check_name(name: &str) -> Result<(), ScaffoldError> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_BYTES_MAX {
        "it is longer than 64 characters"
    } else if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
        "it does not begin with a lower-case letter"
    } else if !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_') {
        "it contains characters other than lower-case letters, digits, `-` and `_`"
    } else if KEYWORDS.contains(&name) {
        "it is a word of the Rust language"
    } else if RESERVED.contains(&name) {
        "the name is taken by a tool or a library that the crate uses"
    } else {
        return Ok(());
    };
    // The name is shown on one line, so control characters are escaped.
    let shown: String = name.chars().take(NAME_BYTES_MAX).flat_map(char::escape_debug).collect();
    Err(ScaffoldError::Name { name: shown, why })
}

fn is_free(dir: &Path) -> bool {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_none(),
        Err(err) => err.kind() == io::ErrorKind::NotFound && std::fs::symlink_metadata(dir).is_err(),
    }
}

/// The right side of `runner-sdk = …`.
fn dependency(path: &Path) -> Result<String, ScaffoldError> {
    let missing = || ScaffoldError::NoSdk { path: path.to_owned() };
    let manifest = std::fs::read_to_string(path.join("Cargo.toml")).map_err(|_| missing())?;
    let manifest: toml::Table = manifest.parse().map_err(|_| missing())?;
    let package = manifest.get("package").and_then(|package| package.get("name"));
    if package.and_then(toml::Value::as_str) != Some("runner-sdk") {
        return Err(missing());
    }
    let absolute = std::path::absolute(path).map_err(|_| missing())?;
    let text = absolute.to_str().ok_or_else(|| ScaffoldError::NotUtf8 { path: absolute.clone() })?;
    Ok(format!("{{ path = {} }}", quoted(text)))
}

/// `text` as a TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// `my-scan2_x` as `MyScan2X`.
fn runner_name(name: &str) -> String {
    let mut camel = String::with_capacity(name.len());
    for word in name.split(['-', '_']) {
        let mut chars = word.chars();
        camel.extend(chars.next().map(|first| first.to_ascii_uppercase()));
        camel.extend(chars);
    }
    if USED_TYPES.contains(&camel.as_str()) { camel + "Runner" } else { camel }
}

fn cargo_toml(names: &Names<'_>, dependency: &str) -> String {
    let template = r#"[package]
name = "{name}"
version = "0.1.0"
edition = "2024"
publish = false

[lib]
crate-type = ["cdylib", "rlib"] # the plugin, and a library for its tests

[dependencies]
runner-sdk = {sdk}
serde_json = "1"

# A workspace of its own, whatever folder it is in.
[workspace]
"#;
    names.fill(template).replace("{sdk}", dependency)
}

fn lib_rs(names: &Names<'_>) -> String {
    names.fill(
        r#"//! A runner for runner-host that serves `/{name}/v1`.

use runner_sdk::{Error, Runner, TaskCtx, export_runner};
use serde_json::json;

/// Counts the lines of each input and publishes the numbers as `lines.txt`.
#[derive(Default)]
pub struct {runner};

impl Runner for {runner} {
    const CAPABILITY: &'static str = "/{name}/v1";

    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        let mut report = String::new();
        for (index, cid) in ctx.lease.task.inputs_cids.iter().enumerate() {
            if ctx.ctrl.is_cancelled() {
                return Err(Error::msg("cancelled"));
            }
            let bytes = ctx.input.get_bytes_by_cid(cid).await?;
            let text = String::from_utf8(bytes).map_err(|err| Error::from(err).invalid_input())?;
            report.push_str(&format!("{} {cid}\n", text.lines().count()));
            ctx.ctrl.progress(json!({ "inputs_done": index + 1 })).await?;
        }
        ctx.output.put_bytes("lines.txt", report).await?;
        Ok(())
    }
}

export_runner!({runner});

#[cfg(test)]
mod tests {
    use runner_sdk::testing::TestHost;

    use super::*;

    #[test]
    fn every_input_gets_a_line() {
        let ended = TestHost::new().input("a.txt", "one\ntwo\n").input("b.txt", "").run_blocking(&{runner});
        assert!(ended.is_ok(), "{:?}", ended.failure());
        assert_eq!(ended.output("lines.txt"), Some(&b"2 a.txt\n0 b.txt\n"[..]));
    }

    #[test]
    fn invalid_utf8_is_invalid_input() {
        let ended = TestHost::new().input("a.bin", [0xff]).run_blocking(&{runner});
        assert!(ended.error().is_invalid_input());
    }
}
"#,
    )
}

fn readme(names: &Names<'_>) -> String {
    names.fill(
        "# {name}

A runner for runner-host that serves `/{name}/v1`: it counts the lines of each input.

```sh
cargo test             # runs it in memory, without a host
cargo build --release  # makes target/release/lib{library}.so (.dylib and .dll elsewhere)

runner-host invoke /{name}/v1 --plugins target/release/lib{library}.so --input README.md --out out
cat out/lines.txt
```

To serve leased work, copy the library into a node's plugins folder.
",
    )
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn sdk() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../runner-sdk")
    }

    fn refused(name: &str) -> String {
        let dir = tempfile::tempdir().expect("a folder");
        let err = create(&dir.path().join("new"), name, Some(&sdk())).expect_err(name);
        assert!(!dir.path().join("new").exists(), "{name}: something was written");
        err.to_string()
    }

    #[test]
    fn invalid_name_is_refused_on_one_line() {
        let names =
            ["", "My", "9lives", "a b", "../up", "a/b", "sch\u{f6}n", "-x", "fn", "std", "serde_json", "a\nb\"c"];
        for name in names.map(str::to_owned).into_iter().chain(["x".repeat(65)]) {
            let line = refused(&name);
            assert!(line.contains("cannot be the name of a plugin") && line.lines().count() == 1, "{line}");
        }
        assert_eq!(
            refused("Big"),
            "`Big` cannot be the name of a plugin: it does not begin with a lower-case letter; expected something like `my-runner`"
        );
    }

    #[test]
    fn non_empty_folder_is_left_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("mine.txt"), "mine").expect("writable");
        for taken in [dir.path().to_owned(), dir.path().join("mine.txt")] {
            let err = create(&taken, "mine", Some(&sdk())).expect_err("taken");
            assert!(matches!(err, ScaffoldError::Occupied { .. }), "{err}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 1);
    }

    #[test]
    fn path_without_the_sdk_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        for path in [dir.path().join("missing"), Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()] {
            let err = create(&dir.path().join("new"), "mine", Some(&path)).expect_err("no sdk");
            assert!(err.to_string().contains("holds no runner-sdk"), "{err}");
        }
    }

    #[test]
    fn names_are_filled_into_every_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let files = create(dir.path(), "scan-2_b", Some(&sdk())).expect("an empty folder will do");
        assert_eq!(files.len(), 4);
        let manifest = std::fs::read_to_string(dir.path().join("Cargo.toml")).expect("written");
        let manifest: toml::Table = manifest.parse().expect("TOML");
        assert_eq!(manifest["dependencies"]["runner-sdk"]["path"].as_str(), sdk().to_str());
        let code = std::fs::read_to_string(dir.path().join("src/lib.rs")).expect("written");
        assert!(code.contains("pub struct Scan2B;") && code.contains("\"/scan-2_b/v1\""));
    }

    /// Builds real crates. The names are those that could conflict with the names in the written code.
    #[test]
    fn new_crate_builds_and_passes_its_tests() {
        let target = std::env::current_exe().expect("a path");
        let target = target.ancestors().nth(3).expect("target/debug/deps/test").join("fixtures");
        for name in ["line-counter", "error"] {
            let dir = tempfile::tempdir().expect("a folder");
            create(dir.path(), name, Some(&sdk())).expect("written");
            let test = |offline: &[&str]| {
                let mut cargo = Command::new(env!("CARGO"));
                cargo.current_dir(dir.path()).arg("test").args(offline).arg("--target-dir").arg(&target);
                cargo.output().expect("cargo runs")
            };
            let mut output = test(&["--offline"]);
            if !output.status.success() {
                output = test(&[]);
            }
            let stdout = String::from_utf8_lossy(&output.stdout);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{stdout}{stderr}");
            assert!(!stderr.contains("warning"), "{stderr}");
            assert!(stdout.contains("2 passed"), "{stdout}");
        }
    }
}
