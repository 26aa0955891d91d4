//! The plugins of the integration tests. They are built on first use, once per test run, into `<target>/fixtures`.
//!
//! Cargo builds no cdylib of another crate for a test, so the harness runs cargo. A lock file keeps concurrent test
//! processes from building at once. Within a process each library is built once. Start at [`zoo`] for runners with a
//! behaviour, and at [`c`] for plugins that are rejected.

use std::{
    collections::HashMap,
    env::consts::{DLL_PREFIX, DLL_SUFFIX, EXE_SUFFIX},
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock, PoisonError},
};

use runner_sdk::abi;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Runners for every behaviour: `host/tests/fixtures/rust/zoo`.
pub(crate) fn zoo() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| fixture("zoo", "zoo")).clone()
}

/// A plugin whose runner panics in its constructor.
pub(crate) fn init_panics() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| fixture("init-panics", "init_panics")).clone()
}

/// A Rust plugin with another parameter in its function table. Only the layout check detects the difference.
pub(crate) fn changed_struct() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| fixture("changed-struct", "changed_struct")).clone()
}

/// A plugin that reads the storage token and says so in its manifest.
pub(crate) fn wants_token() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| fixture("wants-token", "wants_token")).clone()
}

/// A plugin of the first draft of the ABI.
pub(crate) fn first_draft() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| fixture("first-draft", "first_draft")).clone()
}

/// A plugin built with the same SDK under a later version number.
pub(crate) fn newer_sdk() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| fixture("newer-sdk", "newer_sdk")).clone()
}

/// A plugin with its own lock file and another version of tokio.
pub(crate) fn independent() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| fixture("independent", "independent")).clone()
}

/// A build of a package below `host/tests/fixtures/rust/variants`. `words` are for cargo: features of the SDK, `--release`.
/// A plugin serves `/fixtures/<name>/v1`.
pub(crate) fn variant(name: &str, package: &str, words: &[&str]) -> PathBuf {
    static BUILT: OnceLock<Mutex<HashMap<String, PathBuf>>> = OnceLock::new();
    let mut built = BUILT.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    built.entry(name.to_owned()).or_insert_with(|| build_variant(name, package, words)).clone()
}

fn build_variant(name: &str, package: &str, words: &[&str]) -> PathBuf {
    let _lock = lock();
    let dir = host_dir().join("tests/fixtures/rust/variants");
    let words = [&["build", "-p", package], words].concat();
    let capability = format!("/fixtures/{name}/v1");
    run_cargo(&dir, &words, &[("RH_FIXTURE_CAPABILITY", &capability)])
        .unwrap_or_else(|why| panic!("cargo {words:?} in {} fails\n{why}", dir.display()));
    let profile = if words.contains(&"--release") { "release" } else { "debug" };
    let file = if package == "variant" { library_name(package) } else { format!("{package}{EXE_SUFFIX}") };
    // The builds of a package all write the same file.
    let kept = target_dir().join("variants");
    let (whole, partial) = (kept.join(format!("{name}-{file}")), kept.join(format!("{name}.partial")));
    std::fs::create_dir_all(&kept).expect("the target folder is writable");
    std::fs::copy(target_dir().join(profile).join(file), &partial).expect("cargo wrote it");
    std::fs::rename(&partial, &whole).expect("the target folder is writable");
    whole
}

/// The workspace's own `hello`.
pub(crate) fn hello() -> PathBuf {
    own("hello")
}

/// The workspace's own `echo`.
pub(crate) fn echo() -> PathBuf {
    own("echo")
}

/// The workspace's own `noop`.
pub(crate) fn noop() -> PathBuf {
    own("noop")
}

/// The workspace's own `pointcloud`.
pub(crate) fn pointcloud() -> PathBuf {
    own("pointcloud")
}

/// A C plugin, such as `c("refused", &["ABI=0x30000"])`. It is `host/tests/fixtures/c/<name>.c`, compiled with `-D`
/// for each of `defines`. The head of the file lists the defines.
pub(crate) fn c(name: &str, defines: &[&str]) -> PathBuf {
    static BUILT: OnceLock<Mutex<HashMap<String, PathBuf>>> = OnceLock::new();
    let plain = |text: &str| text.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    // The prefix `c` avoids a clash: a folder may also contain the Rust `hello`.
    let words = ["c", name].into_iter().chain(defines.iter().copied());
    let library = words.map(plain).collect::<Vec<_>>().join("-");
    let mut built = BUILT.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    built.entry(library).or_insert_with_key(|library| compile(name, defines, &[], library)).clone()
}

/// A valid C plugin that serves `/fixtures/refused/v1`, with more keys in its manifest.
pub(crate) fn with_manifest(keys: &Value) -> PathBuf {
    let abi = format!("{}.{}", abi::ABI_MAJOR, abi::ABI_MINOR);
    let mut manifest = json!({ "name": "refused", "abi": abi, "capabilities": ["/fixtures/refused/v1"] });
    let (keys, all) = (keys.as_object().expect("keys"), manifest.as_object_mut().expect("keys"));
    all.extend(keys.clone());
    // Rust escapes quotes as C does.
    c("refused", &[&format!("MANIFEST={:?}", manifest.to_string())])
}

/// A C plugin whose linker removes every unreferenced section.
pub(crate) fn without_unused_sections() -> PathBuf {
    let flags = ["-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"];
    compile("refused", &[], &flags, "c-without_unused_sections")
}

/// A valid C plugin that needs the library `librh_fixture_missing.so`, which does not exist.
pub(crate) fn needs_missing() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        // The plugin stores the soname. Without one it would store the whole path.
        let soname = ["-Wl,-soname,librh_fixture_missing.so"];
        let missing = compile("refused", &["NO_ENTRY", "NO_MANIFEST"], &soname, "rh_fixture_missing");
        let link = ["-Wl,--no-as-needed", missing.to_str().expect("the target folder's name is UTF-8")];
        let plugin = compile("refused", &[], &link, "c-needs_missing");
        std::fs::remove_file(missing).expect("the target folder is writable");
        plugin
    };
    BUILT.get_or_init(build).clone()
}

/// A fresh folder with copies of `libraries` under their own names.
pub(crate) fn plugins_dir(libraries: &[PathBuf]) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder below the system's temporary one");
    for library in libraries {
        let name = library.file_name().expect("a library has a name");
        std::fs::copy(library, dir.path().join(name)).unwrap_or_else(|err| panic!("copy {}: {err}", library.display()));
    }
    dir
}

fn host_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `<target>/fixtures`. Cargo's folder for integration tests is in the target folder, wherever configuration or
/// environment place that.
fn target_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("cargo puts it into the target folder").join("fixtures")
}

fn library_name(name: &str) -> String {
    format!("{DLL_PREFIX}{name}{DLL_SUFFIX}")
}

/// Held during a build, by one process at a time.
fn lock() -> File {
    std::fs::create_dir_all(target_dir()).expect("the target folder is writable");
    let file = File::create(target_dir().join("harness.lock")).expect("the target folder is writable");
    #[cfg(unix)]
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).expect("the target folder can hold a lock");
    file
}

/// A separate crate below `host/tests/fixtures/rust`.
fn fixture(folder: &str, library: &str) -> PathBuf {
    cargo_build(&host_dir().join("tests/fixtures/rust").join(folder), &[]);
    built(library)
}

/// A plugin of this workspace. The first request builds all of them.
fn own(package: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let packages = ["-p", "hello", "-p", "echo", "-p", "noop", "-p", "pointcloud"];
        cargo_build(host_dir(), &packages);
    });
    built(package)
}

/// Runs `cargo build` in `dir`.
fn cargo_build(dir: &Path, arguments: &[&str]) {
    let mut words = vec!["build"];
    words.extend(arguments);
    cargo(dir, &words);
}

/// The path of a built library.
pub(crate) fn built(library: &str) -> PathBuf {
    target_dir().join("debug").join(library_name(library))
}

/// Runs cargo in `dir`, first offline, and with the network only if that fails. Returns its stdout.
pub(crate) fn cargo(dir: &Path, words: &[&str]) -> String {
    cargo_or_why(dir, words).unwrap_or_else(|why| panic!("cargo {words:?} in {} fails\n{why}", dir.display()))
}

/// The output of cargo for a crate below `host/tests/fixtures/rust` that must not compile.
pub(crate) fn refused(folder: &str) -> String {
    let dir = host_dir().join("tests/fixtures/rust").join(folder);
    cargo_or_why(&dir, &["check"]).expect_err("the crate must not compile")
}

/// Like [`cargo`]. The error is the stderr of both runs.
fn cargo_or_why(dir: &Path, words: &[&str]) -> Result<String, String> {
    let _lock = lock();
    run_cargo(dir, words, &[])
}

/// Like [`cargo_or_why`], for who holds the lock.
fn run_cargo(dir: &Path, words: &[&str], variables: &[(&str, &str)]) -> Result<String, String> {
    let run = |offline: &[&str]| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(dir).args(words).args(offline).arg("--target-dir").arg(target_dir());
        cargo.envs(variables.iter().copied());
        // Variables that cargo sets for the build of the test binary must not affect this build.
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR") {
                cargo.env_remove(name);
            }
        }
        let output = cargo.output().unwrap_or_else(|err| panic!("{} does not run: {err}", env!("CARGO")));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    };
    run(&["--offline"]).or_else(|offline| run(&[]).map_err(|online| format!("offline:\n{offline}\nonline:\n{online}")))
}

/// Compiles one variant of a C fixture. The file gets its name only when it is complete.
fn compile(name: &str, defines: &[&str], link: &[&str], library: &str) -> PathBuf {
    let _lock = lock();
    let dir = target_dir().join("c");
    std::fs::create_dir_all(&dir).expect("the target folder is writable");
    let (whole, partial) = (dir.join(library_name(library)), dir.join(format!("{library}.partial")));
    let output = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-shared", "-fPIC", "-pthread"])
        .args(defines.iter().map(|define| format!("-D{define}")))
        .arg("-I")
        .arg(host_dir().join("../runner-sdk/include"))
        .arg("-o")
        .arg(&partial)
        .arg(host_dir().join("tests/fixtures/c").join(format!("{name}.c")))
        .args(link)
        .output()
        .unwrap_or_else(|err| panic!("cc does not run ({err}); these tests need a C compiler"));
    assert!(output.status.success(), "cc {name} {defines:?}:\n{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&partial, &whole).expect("the target folder is writable");
    whole
}
