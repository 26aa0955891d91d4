//! Enforces the module map: which module may import which, where `unsafe` may be used, and the dependencies of the
//! SDK.
//!
//! A failure means that a dependency is new. If both modules need the item, move it to `model`. Otherwise change the
//! table below and ARCHITECTURE.md, and state the reason.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A module, the modules that it imports, and the reason.
type Rule = (&'static str, &'static [&'static str], &'static str);

/// The dependencies as they are. A dependency that no code uses must be removed.
const RULES: &[Rule] = &[
    ("model", &[], "the shared types import nothing of this crate"),
    ("transport", &["model"], "the HTTP client knows addresses, bytes and clocks, not leases"),
    ("node_event", &["model"], "what the node does; a module whose state an operator follows imports it"),
    ("listen", &[], "accepts connections and serves HTTP; knows no page"),
    ("observe", &["listen", "model"], "logs, and pages that show the status"),
    ("plugins", &["model", "node_event"], "runs a task in a library; knows no plane and no store"),
    ("storage", &["model", "node_event", "transport"], "moves inputs and outputs; gets its token from a held lease"),
    ("auth", &["model", "node_event", "transport"], "signs in and keeps the node's token fresh"),
    ("leases", &["auth", "model", "node_event", "transport"], "speaks to one control plane with the node's token"),
    ("session", &["leases", "model", "node_event"], "keeps one lease of any control plane"),
    (
        "outbox",
        &["crash", "leases", "model", "node_event"],
        "keeps reports until their control plane has accepted them",
    ),
    ("control", &["listen", "model", "node_event", "outbox"], "commands query and control a running node"),
    ("crash", &[], "crash points for tests"),
    ("open_files", &[], "asks the system for more open files, once"),
    (
        "engine",
        &["leases", "model", "node_event", "outbox", "plugins", "session", "storage"],
        "takes a task through the modules",
    ),
    (
        "config",
        &["auth", "engine", "leases", "model", "observe", "outbox", "plugins", "session", "storage", "transport"],
        "fills the part of the configuration that each module owns",
    ),
    (
        "dev",
        &["leases", "listen", "model", "transport"],
        "the server side of the wire, in the same wire types; calls nodes back",
    ),
    (
        "app",
        &[
            "auth",
            "config",
            "control",
            "engine",
            "leases",
            "model",
            "node_event",
            "observe",
            "open_files",
            "outbox",
            "plugins",
            "session",
            "storage",
            "transport",
        ],
        "the composition root builds all modules",
    ),
    (
        "cli",
        &[
            "app",
            "auth",
            "config",
            "control",
            "crash",
            "dev",
            "engine",
            "leases",
            "model",
            "observe",
            "open_files",
            "outbox",
            "plugins",
            "storage",
            "transport",
        ],
        "commands start modules; what they do is in the modules",
    ),
];

/// Dependencies that only tests have: a module is tested with the real modules around it.
const IN_TESTS: &[Rule] = &[
    ("cli", &["dev"], "`submit` is tested against the dev server"),
    ("engine", &["transport"], "the engine is tested with the storage of a node"),
    ("outbox", &["auth", "transport"], "reports are sent over a real connection"),
    ("session", &["auth", "transport"], "a session is tested over a real connection"),
];

/// The crate roots of the library and of the binary, which are not modules of the map.
const CRATE_ROOTS: [&str; 2] = ["lib", "main"];

/// All code of the plugin boundary, and the code that removes secrets from the process memory.
const UNSAFE_HERE: [&str; 9] = [
    "host/src/config/secrets.rs",
    "host/src/main.rs",
    "host/src/plugins/ffi.rs",
    "host/src/plugins/load.rs",
    "host/src/plugins/open/",
    "host/src/plugins/threads.rs",
    "runner-sdk/src/abi/",
    "runner-sdk/src/shim/",
    "plugins/pointcloud/tests/memory.rs", // counts what the allocator hands out
];

/// Dependencies that the SDK must not bring to a runner author.
const NOT_IN_THE_SDK: [&str; 9] =
    ["axum", "h2", "hyper", "hyper-util", "native-tls", "openssl", "reqwest", "runner-host", "rustls"];

#[test]
fn modules_import_only_what_the_table_allows() {
    let root = workspace();
    let known: BTreeSet<&str> = RULES.iter().map(|rule| rule.0).collect();
    let mut arrows: BTreeMap<(String, String), PathBuf> = BTreeMap::new();
    let mut problems = Vec::new();
    for file in rust_files(&root.join("host/src")) {
        let inside = file.strip_prefix(root.join("host/src")).expect("found below it");
        let module = inside.components().next().expect("a file has a name").as_os_str().to_string_lossy();
        let module = module.trim_end_matches(".rs").to_owned();
        if !known.contains(module.as_str()) && !CRATE_ROOTS.contains(&module.as_str()) {
            problems.push(format!("{}: {module} is not in the table", inside.display()));
        }
        let text = fs::read_to_string(&file).expect("readable source");
        let (code, tests) = match text.split_once("#[cfg(test)]\nmod tests {") {
            _ if is_test_file(inside) => (String::new(), code_of(&text)),
            Some((code, tests)) => (code_of(code), code_of(tests)),
            None => (code_of(&text), String::new()),
        };
        for other in imports(&code) {
            if other != module && !allowed(RULES, &module, &other) {
                problems.push(format!("{}: {module} imports {other}", inside.display()));
            }
            arrows.insert((module.clone(), other), inside.to_owned());
        }
        for other in imports(&tests) {
            if other != module && !allowed(RULES, &module, &other) && !allowed(IN_TESTS, &module, &other) {
                problems.push(format!("{}: a test of {module} imports {other}", inside.display()));
            }
        }
    }
    for (module, others, _) in RULES {
        for other in *others {
            if !arrows.contains_key(&((*module).to_owned(), (*other).to_owned())) {
                problems.push(format!("{module} no longer imports {other}: remove it from the table"));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn layer_table_has_no_cycle() {
    let mut left: Vec<&Rule> = RULES.iter().collect();
    while !left.is_empty() {
        let waiting: BTreeSet<&str> = left.iter().map(|rule| rule.0).collect();
        let before = left.len();
        left.retain(|rule| rule.1.iter().any(|other| waiting.contains(other)));
        assert!(left.len() < before, "these import each other: {waiting:?}");
    }
}

#[test]
fn unsafe_is_only_at_the_boundary() {
    let root = workspace();
    let mut found = BTreeSet::new();
    for folder in ["host/src", "runner-sdk/src", "plugins", "examples"] {
        for file in rust_files(&root.join(folder)) {
            let text = fs::read_to_string(&file).expect("readable source");
            let code = code_of(&text);
            if words(&code).any(|word| word == "unsafe") {
                let inside = file.strip_prefix(&root).expect("found below it");
                found.insert(inside.to_string_lossy().replace('\\', "/"));
            }
        }
    }
    let outside: Vec<_> =
        found.iter().filter(|file| !UNSAFE_HERE.iter().any(|allowed| file.starts_with(allowed))).collect();
    assert!(outside.is_empty(), "unsafe code outside the boundary: {outside:?}");
    assert!(found.contains("host/src/plugins/ffi.rs"), "the search works: {found:?}");
}

#[test]
fn sdk_depends_on_no_network_or_host_crate() {
    let names = tree(&["-p", "runner-sdk"]);
    assert!(names.contains("runner-sdk") && names.contains("abi_stable"), "the tree is its tree: {names:?}");
    let unwanted: Vec<_> = NOT_IN_THE_SDK.iter().filter(|name| names.contains(**name)).collect();
    assert!(unwanted.is_empty(), "runner-sdk depends on {unwanted:?}");
}

#[test]
fn grpc_feature_brings_all_grpc_crates() {
    let with = tree(&["-p", "runner-host"]);
    let without = tree(&["-p", "runner-host", "--no-default-features"]);
    for name in ["h2", "prost", "tonic", "tonic-prost"] {
        assert!(with.contains(name) && !without.contains(name), "{name}");
    }
}

/// The names of all packages that `cargo tree` lists for ordinary dependencies.
fn tree(arguments: &[&str]) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "-e", "normal", "--prefix", "none", "--format", "{p}"])
        .args(arguments)
        .current_dir(workspace())
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).expect("cargo prints text");
    tree.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn imports_are_found_in_every_form() {
    let code = code_of(
        "use crate::model::{Lease, HeldLease};\nuse crate::{\n    auth::{self, Auth},\n    storage,\n};\n\
         // use crate::dev;\nlet text = \"crate::cli\"; let quote = '\"'; pub(in crate::leases) fn f<'a>() { crate::engine::go() }",
    );
    let found: Vec<String> = imports(&code).into_iter().collect();
    assert_eq!(found, ["auth", "engine", "leases", "model", "storage"]);
}

fn allowed(rules: &[Rule], module: &str, other: &str) -> bool {
    // lib.rs and main.rs may import every module, because they declare the modules.
    CRATE_ROOTS.contains(&module) || rules.iter().any(|rule| rule.0 == module && rule.1.contains(&other))
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("host is in the workspace").to_owned()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("a source folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|suffix| suffix == "rs") {
            files.push(path);
        }
    }
    files
}

fn is_test_file(inside: &Path) -> bool {
    let name = inside.file_stem().unwrap_or_default().to_string_lossy();
    name == "tests" || name.ends_with("_tests") || inside.components().any(|part| part.as_os_str() == "tests")
}

/// The identifiers of a program.
fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// The modules that `crate::…` paths name, including grouped imports.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, path) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + path.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.extend(words(rest).next().map(str::to_owned));
            continue;
        };
        let (mut depth, mut first) = (0_usize, true);
        for (index, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => first = true,
                c if first && !c.is_whitespace() => {
                    found.extend(words(&group[index..]).next().map(str::to_owned));
                    first = false;
                }
                _ => {}
            }
        }
    }
    found
}

/// A program without its comments and string literals. It parses only the Rust syntax that this repository uses.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("r#\"") {
            rest.find("\"#").map_or(rest.len(), |end| end + 2)
        } else if c == '"' {
            quoted(rest)
        } else if c == '\'' {
            // A character literal. An unclosed quote is a lifetime.
            let inner =
                if rest[1..].starts_with('\\') { 3 } else { 1 + rest[1..].chars().next().map_or(0, char::len_utf8) };
            if rest.get(inner..).is_some_and(|end| end.starts_with('\'')) { inner + 1 } else { 0 }
        } else {
            0
        };
        if skipped == 0 {
            code.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            code.push(' ');
            rest = &rest[skipped..];
        }
    }
    code
}

/// The length of the string literal at the start of `rest`, quotes included.
fn quoted(rest: &str) -> usize {
    let mut escaped = false;
    for (index, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return index + 1,
            _ => {}
        }
    }
    rest.len()
}
