//! The documents match the program: commands and flags exist, tables are those of the host, and the
//! code is what `plugins new` writes.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use runner_host::{cli::Exit, config::KEYS};

/// Documents with commands in them.
const DOCUMENTS: [&str; 18] = [
    "README.md",
    "CONTRIBUTING.md",
    "ARCHITECTURE.md",
    "plugins.toml",
    "runner-sdk/README.md",
    "docs/features.md",
    "docs/jobs.md",
    "docs/performance.md",
    "docs/porting.md",
    "docs/protocols/posemesh.md",
    "docs/operations/README.md",
    "docs/operations/configuration.md",
    "docs/operations/faults.md",
    "docs/operations/outbox.md",
    "docs/operations/registration.md",
    "docs/operations/status.md",
    "docs/operations/tasks.md",
    "docs/operations/troubleshooting.md",
];

#[test]
fn documented_commands_and_flags_exist() {
    let mut seen = BTreeSet::new();
    for document in DOCUMENTS {
        for line in commands(&read(document)).filter(|line| line.starts_with("runner-host ")) {
            let words: Vec<&str> = line.split_whitespace().skip(1).collect();
            // `plugins list`, `config show`: some commands have commands.
            let nested = matches!(words[0], "plugins" | "config" | "outbox");
            let Some(command) = words.get(..if nested { 2 } else { 1 }) else {
                // Named as a whole, as in "`runner-host plugins`".
                continue;
            };
            let command: Vec<&str> = command.iter().flat_map(|word| word.split('|').take(1)).collect();
            let help = runner_host(command.iter().copied().chain(["--help"]));
            assert!(help.status.success(), "{document}: `{line}`: there is no such command");
            let help = String::from_utf8(help.stdout).expect("help is text");
            let known: BTreeSet<&str> = help
                .split(|c: char| c.is_whitespace() || c == ',' || c == '[' || c == ']')
                .filter(|word| word.starts_with('-'))
                .collect();
            for flag in words.iter().filter(|word| word.len() > 1 && word.starts_with('-')) {
                let flag = flag.split('=').next().unwrap_or(flag);
                assert!(known.contains(flag), "{document}: `{line}`: {command:?} has no {flag}");
            }
            seen.insert(command.join(" "));
        }
    }
    for expected in [
        "cancel",
        "config check",
        "dev",
        "invoke",
        "outbox drop",
        "outbox list",
        "outbox retry",
        "plugins inspect",
        "plugins list",
        "plugins new",
        "run",
        "submit",
    ] {
        assert!(seen.contains(expected), "`runner-host {expected}` is in no document");
    }
}

#[test]
fn documented_cargo_commands_name_workspace_items() {
    let root = workspace();
    let aliases: toml::Table = read(".cargo/config.toml").parse().expect("TOML");
    let aliases = aliases["alias"].as_table().expect("aliases");
    let mut seen = BTreeSet::new();
    for line in commands(&read("README.md")).chain(commands(&read("CONTRIBUTING.md")).collect::<Vec<_>>()) {
        let mut words = line.split_whitespace();
        if words.next() != Some("cargo") {
            continue;
        }
        let words: Vec<&str> = words.collect();
        let usual = ["build", "clippy", "deny", "doc", "fmt", "install", "package", "run", "test", "tree"];
        let name = words.first().copied().unwrap_or_default();
        assert!(usual.contains(&name) || aliases.contains_key(name), "`{line}`: cargo knows no {name}");
        for pair in words.windows(2) {
            if pair[0] == "-p" {
                let found = ["", "plugins/", "examples/"].iter().any(|at| root.join(at).join(pair[1]).is_dir());
                assert!(found || pair[1] == "runner-host", "`{line}`: no package {}", pair[1]);
            }
        }
        seen.insert(name.to_owned());
    }
    assert!(seen.contains("demo") && seen.contains("test"), "the quick start is `cargo demo` and `cargo test`");
    let demo = aliases["demo"].as_str().expect("a command");
    assert!(demo.contains("--package demo") && root.join("examples/demo").is_dir(), "{demo}");
}

#[test]
fn settings_table_matches_the_host() {
    let mut table = "| variable | key in a file | type | default | |\n|---|---|---|---|---|\n".to_owned();
    for key in KEYS {
        let default = match (key.default, key.required) {
            (Some(default), _) => format!("`{default}`"),
            (None, true) => "**required**".to_owned(),
            (None, false) => String::new(),
        };
        let (name, file, kind, help) = (key.name, key.file, key.kind.as_str(), key.help.replace('|', "\\|"));
        writeln!(table, "| `{name}` | `{file}` | {kind} | {default} | {help} |").expect("memory takes it");
    }
    let document = "docs/operations/configuration.md";
    let text = read(document);
    let (before, rest) = text.split_once("<!-- settings").expect("the section begins");
    let (marker, rest) = rest.split_once("-->\n").expect("its marker closes");
    let (shown, after) = rest.split_once("<!-- /settings -->").expect("the section ends");
    if shown == table {
        return;
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let updated = format!("{before}<!-- settings{marker}-->\n{table}<!-- /settings -->{after}");
        fs::write(workspace().join(document), updated).expect("the document can be written");
        return;
    }
    let odd = table.lines().zip(shown.lines().chain(std::iter::repeat(""))).find(|(own, shown)| own != shown);
    let (own, shown) = odd.unwrap_or(("", "more rows than settings"));
    panic!(
        "{document} shows\n  {shown}\nthe host has\n  {own}\nUPDATE_DOCS=1 cargo test -p runner-host --test readme updates it"
    );
}

#[test]
fn readme_and_changelog_stay_short() {
    for (document, lines_max) in [("README.md", 200), ("CHANGELOG.md", 80)] {
        let lines = read(document).lines().count();
        assert!(lines <= lines_max, "{document} has {lines} lines, at most {lines_max} are allowed");
    }
}

#[test]
fn documents_name_the_abi_version() {
    let (version, major) = (runner_sdk::abi::ABI_TEXT, runner_sdk::abi::ABI_MAJOR.to_string());
    for document in DOCUMENTS {
        for after in read(document).split("ABI ").skip(1) {
            // As in "ABI 2.0" and "the ABI is version 2.0".
            let mut words = after.split_whitespace().skip_while(|word| ["is", "major", "version"].contains(word));
            let number = words.next().unwrap_or_default().trim_end_matches([',', ';', ':', '.']);
            if number.starts_with(|c: char| c.is_ascii_digit()) && !number.ends_with('x') {
                assert!(number == version || number == major, "{document}: ABI {number}, expected {version}");
            }
        }
    }
    for document in ["README.md", "CHANGELOG.md"] {
        let text = read(document);
        let named = ["ABI ", "ABI is version "].iter().any(|before| text.contains(&format!("{before}{version}")));
        assert!(named, "{document} does not name ABI {version}");
    }
}

#[test]
fn exit_code_table_matches_the_host() {
    let all = [
        Exit::Done,
        Exit::Failed,
        Exit::Usage,
        Exit::Cancelled,
        Exit::PluginsRefused,
        Exit::TimedOut,
        Exit::Temporary,
        Exit::Configuration,
        Exit::Panicked,
    ];
    let page = read("docs/operations/README.md");
    let (_, section) = page.split_once("| code | meaning |\n|---|---|\n").expect("the table");
    let rows: Vec<&str> = section.lines().take_while(|line| line.starts_with('|')).collect();
    let codes: Vec<u8> =
        rows.iter().map(|row| row.split('|').nth(1).expect("a column").trim().parse().expect("a number")).collect();
    assert_eq!(codes, all.map(|exit| exit as u8));
}

#[test]
fn readme_runner_equals_plugins_new() {
    let dir = tempfile::tempdir().expect("a folder");
    let sdk = workspace().join("runner-sdk");
    let made = Command::new(env!("CARGO_BIN_EXE_runner-host"))
        .args(["plugins", "new", "line-count", "--sdk"])
        .arg(sdk)
        .current_dir(dir.path())
        .output()
        .expect("runner-host starts");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let written = fs::read_to_string(dir.path().join("line-count/src/lib.rs")).expect("written");
    let readme = read("README.md");
    let blocks: Vec<&str> = readme.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(blocks.len(), 2, "the runner and its test");
    for block in blocks {
        assert!(written.contains(block), "README.md shows\n{block}\nbut `plugins new` writes\n{written}");
    }
}

#[test]
fn plugins_toml_reference_is_valid() {
    let reference = read("plugins.toml");
    let as_it_is: toml::Table = reference.parse().expect("TOML");
    assert!(as_it_is.is_empty(), "everything in it is commented out: {as_it_is:?}");

    let on: String = reference
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '[') => rest,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let dir = tempfile::tempdir().expect("a folder");
    fs::create_dir(dir.path().join("plugins")).expect("a folder");
    fs::write(dir.path().join("plugins.toml"), &on).expect("written");
    let listed = Command::new(env!("CARGO_BIN_EXE_runner-host"))
        .args(["plugins", "list"])
        .current_dir(dir.path())
        .output()
        .expect("runner-host starts");
    let stdout = String::from_utf8_lossy(&listed.stdout);
    let stderr = String::from_utf8_lossy(&listed.stderr);
    // Every key is understood and in effect; only the library itself is not there.
    assert_eq!(listed.status.code(), Some(Exit::PluginsRefused as i32), "{stdout}{stderr}");
    assert!(stdout.contains("hello") && stdout.contains("was not found"), "{stdout}{stderr}");
}

#[test]
fn document_links_resolve() {
    let root = workspace();
    for document in DOCUMENTS {
        let folder = root.join(document);
        let folder = folder.parent().expect("a document is in a folder");
        for (_, rest) in read(document).split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|s| (rest, s.0)))
        {
            let file = rest.split('#').next().unwrap_or(rest);
            if !file.starts_with("http") && !file.is_empty() {
                assert!(folder.join(file).exists(), "{document} links to {rest}");
            }
        }
    }
}

/// Commands in a document: lines of shell blocks, and text in backticks or after `$`.
fn commands(document: &str) -> impl Iterator<Item = &str> {
    let lines = document.lines().map(|line| line.trim_start_matches("$ "));
    let quoted = document.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    lines.filter(|line| line.starts_with("cargo ") || line.starts_with("runner-host ")).chain(quoted).map(|line| {
        let end = line.find(" #").unwrap_or(line.len());
        line[..end].trim()
    })
}

fn runner_host<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_runner-host")).args(arguments).output().expect("runner-host starts")
}

fn read(document: &str) -> String {
    fs::read_to_string(workspace().join(document)).unwrap_or_else(|err| panic!("{document}: {err}"))
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("host is in the workspace").to_owned()
}
