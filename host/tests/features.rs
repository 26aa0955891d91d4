//! `docs/features.md` maps every promised feature to its tests. No row may be missing, and every named test must
//! exist. `docs/operations/troubleshooting.md` may quote only messages that exist. Sources may cite only documents of
//! this repository, and sections that exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Every promised row, in ranges of numbers.
const ROWS: &[(&str, &[&str])] = &[
    ("S0", &["01-14", "14b", "15a", "15b", "15c", "16a", "16b", "17a", "17b", "17c", "17d", "18a", "18b", "18c"]),
    ("S0", &["19a", "19b", "20-26", "30-39", "39b", "50-77", "80-94"]),
    ("S1", &["01-25"]),
    ("S2", &["01-03", "06-12", "19-28", "30-36", "49-52", "55"]),
    ("S3", &["58"]),
];

#[test]
fn every_row_names_tests_that_exist() {
    let root = workspace();
    let page = fs::read_to_string(root.join("docs/features.md")).expect("the page is there");
    let tests = all_tests(&root);
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for line in page.lines().filter(|line| line.starts_with("| S")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [row, _feature, proof] = cells[..] else {
            problems.push(format!("expected three cells, found {}: {line}", cells.len()));
            continue;
        };
        if !seen.insert(row.to_owned()) {
            problems.push(format!("{row} is listed twice"));
        }
        let named: Vec<&str> =
            proof.split('`').skip(1).step_by(2).filter(|name| name.contains("::") && !name.contains(' ')).collect();
        if named.is_empty() || proof.contains('@') {
            problems.push(format!("{row} names no test, or has a gap"));
        }
        for test in named {
            let exists = match test.strip_prefix("fault_matrix::") {
                Some(cell) => is_cell(&root, cell),
                None => exists(&tests, test),
            };
            if !exists {
                problems.push(format!("{row}: there is no test {test}"));
            }
        }
    }
    let promised = promised();
    problems.extend(promised.difference(&seen).map(|row| format!("{row} is missing")));
    problems.extend(seen.difference(&promised).map(|row| format!("{row} is not a promised row")));
    assert!(problems.is_empty(), "docs/features.md:\n{}", problems.join("\n"));
}

/// Every message of the troubleshooting page occurs in the source. The text between its `…` is compared.
#[test]
fn troubleshooting_page_messages_occur_in_the_source() {
    let root = workspace();
    let page = fs::read_to_string(root.join("docs/operations/troubleshooting.md")).expect("the page is there");
    let source: String = ["host/src", "runner-sdk/src"]
        .iter()
        .flat_map(|folder| rust_files(&root.join(folder)))
        .filter(|file| !file.to_string_lossy().contains("tests"))
        .map(|file| joined(&fs::read_to_string(file).expect("a readable file")))
        .collect();
    let (mut seen, mut problems) = (0, Vec::new());
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    for message in rows.filter_map(|row| row.split_once("` |")).map(|(message, _)| message) {
        seen += 1;
        let pieces: Vec<&str> = message.split('…').map(str::trim).filter(|piece| piece.len() > 2).collect();
        if !pieces.iter().any(|piece| piece.len() >= 8) {
            problems.push(format!("`{message}` is too short to search for"));
        }
        let missing = pieces.iter().filter(|piece| !source.contains(**piece));
        problems.extend(missing.map(|piece| format!("`{message}`: no source contains `{piece}`")));
    }
    assert!(problems.is_empty(), "docs/operations/troubleshooting.md:\n{}", problems.join("\n"));
    assert!(seen > 100, "{seen} messages were found; are they still rows that begin with one?");
}

#[test]
fn troubleshooting_page_lists_node_warnings_and_errors() {
    let root = workspace();
    let page = fs::read_to_string(root.join("docs/operations/troubleshooting.md")).expect("the page is there");
    let (mut seen, mut missing) = (0, Vec::new());
    for file in rust_files(&root.join("host/src")) {
        let inside = file.strip_prefix(&root).expect("found below it").to_string_lossy().into_owned();
        if inside.contains("tests") || inside.starts_with("host/src/dev/") {
            continue; // messages of the dev server are not for operators
        }
        let text = fs::read_to_string(&file).expect("a readable file");
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for call in code.split("warn!(").skip(1).chain(code.split("error!(").skip(1)) {
            seen += 1;
            let message = last_literal(call);
            // Lines of a plugin have the message `{text}`.
            if !message.starts_with('{') && !page.contains(&format!("`{message}`")) {
                missing.push(format!("{inside}: {message}"));
            }
        }
    }
    assert!(missing.is_empty(), "docs/operations/troubleshooting.md lacks\n{}", missing.join("\n"));
    assert!(seen > 50, "{seen} warnings and errors were found; do these macros still write them?");
}

/// `docs/operations/events.md` lists each event code of the log with its levels and fields, and no other code.
#[test]
fn event_codes_match_their_page() {
    let root = workspace();
    let page = fs::read_to_string(root.join("docs/operations/events.md")).expect("the page is there");
    let words = |cell: &str| cell.split([' ', ',', '`']).filter(|word| !word.is_empty()).map(str::to_owned).collect();
    let mut listed: BTreeMap<String, (BTreeSet<String>, BTreeSet<String>)> = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [code, levels, fields, _meaning, _remedy] = cells[..] else { panic!("expected five cells: {line}") };
        let fields: BTreeSet<String> = if fields == "-" { BTreeSet::new() } else { words(fields) };
        let before = listed.insert(code.trim_matches('`').to_owned(), (words(levels), fields));
        assert!(before.is_none(), "{code} is listed twice");
    }
    let mut used: BTreeMap<String, (BTreeSet<String>, BTreeSet<String>)> = BTreeMap::new();
    let mut nameless = Vec::new();
    for file in ["host/src", "runner-sdk/src"].iter().flat_map(|folder| rust_files(&root.join(folder))) {
        let inside = file.strip_prefix(&root).expect("found below it").to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).expect("a readable file");
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for (level, arguments) in log_calls(code) {
            let fields: Vec<&str> = arguments.iter().map(|argument| field(argument)).collect();
            let event = arguments.iter().find_map(|argument| argument.strip_prefix("event = "));
            match event {
                Some(event) => {
                    let entry = used.entry(event.trim_matches('"').to_owned()).or_default();
                    entry.0.insert(level.to_owned());
                    let own = fields.into_iter().filter(|field| !field.is_empty() && *field != "event");
                    entry.1.extend(own.map(str::to_owned));
                }
                // Debug lines are for developers. Lines of a plugin have the plugin's text.
                None if level == "debug" || arguments.contains(&"\"{text}\"") => {}
                // Lines of the SDK are lines of a plugin.
                None if inside.starts_with("runner-sdk") => {}
                None => nameless.push(format!("{inside}: {arguments:?}")),
            }
        }
    }
    assert!(nameless.is_empty(), "log lines without an event code:\n{}", nameless.join("\n"));
    assert!(used.len() > 60, "{} codes were found; do these macros still write lines?", used.len());
    let only = |page_codes: &BTreeMap<_, _>, source_codes: &BTreeMap<_, _>| -> Vec<String> {
        let differs = page_codes.iter().filter(|(code, facts)| source_codes.get(*code) != Some(*facts));
        differs
            .map(|(code, facts): (&String, &(BTreeSet<String>, BTreeSet<String>))| format!("{code}: {facts:?}"))
            .collect()
    };
    let (page_only, code_only) = (only(&listed, &used), only(&used, &listed));
    assert!(
        page_only.is_empty() && code_only.is_empty(),
        "docs/operations/events.md has\n{}\nthe source has\n{}",
        page_only.join("\n"),
        code_only.join("\n")
    );
}

/// The level and the arguments of each call of a log macro.
fn log_calls(code: &str) -> Vec<(&'static str, Vec<&str>)> {
    let mut calls = Vec::new();
    for level in ["debug", "info", "warn", "error"] {
        for (at, found) in code.match_indices(&format!("{level}!(")) {
            let bare = !code[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
            if bare {
                calls.push((level, arguments(&code[at + found.len()..])));
            }
        }
    }
    calls
}

/// The text up to the closing parenthesis, split at its outer commas.
fn arguments(text: &str) -> Vec<&str> {
    let (mut depth, mut quoted, mut escaped, mut start, mut found) = (0, false, false, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if quoted => {}
            '(' | '[' | '{' => depth += 1,
            ')' if depth == 0 => {
                found.push(text[start..at].trim());
                break;
            }
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                found.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    found.retain(|argument| !argument.is_empty() && !argument.starts_with("target:"));
    found
}

/// The name of the field that an argument of a log macro sets. It is empty for the message.
fn field(argument: &str) -> &str {
    let name = argument.trim_start_matches(['%', '?']);
    let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(name.len());
    &name[..end]
}

/// A citation is `posemesh.md section N`, or `sections N, M and K` or `sections N to M`.
#[test]
fn every_citation_of_the_wire_has_its_section() {
    let root = workspace();
    let page = fs::read_to_string(root.join("docs/protocols/posemesh.md")).expect("the page is there");
    let sections: BTreeSet<&str> = page
        .lines()
        .filter(|line| line.starts_with("##"))
        .filter_map(|line| line.split_whitespace().nth(1))
        .map(|number| number.trim_end_matches('.'))
        .collect();
    let (mut seen, mut problems) = (0, Vec::new());
    for (file, text) in sources(&root) {
        let text: Vec<&str> = text.split_whitespace().filter(|word| !word.starts_with("//")).collect();
        for at in (0..text.len()).filter(|at| text[*at].ends_with("posemesh.md")) {
            let mut numbers = text[at + 1..].iter().peekable();
            let cited = numbers.next_if(|word| word.starts_with("section")).is_some();
            let mut found = 0;
            while let Some(word) = numbers.next_if(|word| is_citation_word(word)) {
                let number = word.trim_matches(|c: char| !c.is_ascii_digit());
                if number.is_empty() {
                    continue;
                }
                found += 1;
                if !sections.contains(number) {
                    problems.push(format!("{file} cites section {number}"));
                }
                if word.ends_with(['.', ')', ':', ';']) {
                    break;
                }
            }
            seen += found;
            if !cited || found == 0 {
                problems.push(format!("{file} cites posemesh.md without a section"));
            }
        }
    }
    assert!(problems.is_empty(), "docs/protocols/posemesh.md has no such section:\n{}", problems.join("\n"));
    assert!(seen > 50, "{seen} citations were found; do they still have this form?");
}

/// A word of a citation: `4.2`, `6.5,` or `2.9).`, or a word between two of them.
fn is_citation_word(word: &str) -> bool {
    matches!(word, "and" | "to") || word.starts_with(|c: char| c.is_ascii_digit())
}

/// Only `docs/features.md` maps rows to tests, and every cited document is in this repository.
#[test]
fn sources_contain_no_row_ids_or_foreign_citations() {
    let foreign =
        [concat!("design", ".md"), concat!("research", "/"), concat!("../", "shared"), concat!("contract", " 4.")];
    let mut problems = Vec::new();
    for (file, text) in sources(&workspace()) {
        for (number, line) in text.lines().enumerate() {
            let words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
            problems.extend(words.filter(|word| is_row_id(word)).map(|id| format!("{file}:{}: {id}", number + 1)));
            let cited = foreign.iter().filter(|name| line.contains(**name));
            problems.extend(cited.map(|name| format!("{file}:{}: {name}", number + 1)));
        }
    }
    assert!(problems.is_empty(), "remove these from the sources:\n{}", problems.join("\n"));
}

/// A letter or `S` with a digit, a hyphen, then one or two digits and an optional letter.
fn is_row_id(word: &str) -> bool {
    let Some((kind, number)) = word.split_once('-') else { return false };
    let known = matches!(kind, "P" | "D" | "S0" | "S1" | "S2" | "S3");
    let digits = number.trim_end_matches(|c: char| c.is_ascii_lowercase());
    known && (1..=2).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Every Rust, C and header file of the workspace except this one, by its path.
fn sources(root: &Path) -> Vec<(String, String)> {
    ["host", "runner-sdk", "plugins", "examples"]
        .iter()
        .flat_map(|folder| files(&root.join(folder), &["rs", "c", "h"]))
        .filter(|file| !file.ends_with(file!()))
        .map(|file| {
            let inside = file.strip_prefix(root).expect("found below it").to_string_lossy().into_owned();
            (inside, fs::read_to_string(&file).expect("a readable file"))
        })
        .collect()
}

/// The last text literal before the closing parenthesis of the call: the message of a log call.
fn last_literal(call: &str) -> &str {
    let (mut depth, mut last) = (1, "");
    let mut at = 0;
    while depth > 0 {
        match call.as_bytes().get(at) {
            Some(b'(') => depth += 1,
            Some(b')') => depth -= 1,
            Some(b'"') => {
                let begin = at + 1;
                at = begin;
                while call.as_bytes()[at] != b'"' {
                    at += if call.as_bytes()[at] == b'\\' { 2 } else { 1 };
                }
                last = &call[begin..at];
            }
            Some(_) => {}
            None => break,
        }
        at += 1;
    }
    last
}

/// The text of a source file, with string literals over several lines joined.
fn joined(text: &str) -> String {
    let mut whole = String::with_capacity(text.len());
    let mut continued = false;
    for line in text.lines() {
        let line = if continued { line.trim_start() } else { line };
        continued = line.ends_with('\\');
        whole.push_str(line.trim_end_matches('\\'));
        if !continued {
            whole.push('\n');
        }
    }
    whole.replace("\\\"", "\"")
}

/// `it::signals::name` is the test `name` in a file whose path ends with `it/signals`.
fn exists(tests: &BTreeMap<String, Vec<String>>, test: &str) -> bool {
    let (modules, name) = test.rsplit_once("::").expect("looked at before");
    let end = format!("/{}", modules.replace("::", "/"));
    tests.get(name).is_some_and(|files| files.iter().any(|file| file.ends_with(&end)))
}

/// `lease/hang`: a call and a fault in the plan of the fault matrix.
fn is_cell(root: &Path, cell: &str) -> bool {
    let plan = fs::read_to_string(root.join("host/tests/fault_matrix/plan.rs")).expect("the plan is there");
    let parts: Vec<&str> = cell.split('/').collect();
    parts.len() == 2 && parts.iter().all(|part| plan.contains(&format!("\"{part}\"")))
}

/// Names of all test functions, each with its files (without suffix, `mod.rs` as its folder).
fn all_tests(root: &Path) -> BTreeMap<String, Vec<String>> {
    let mut tests: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for folder in ["host/src", "host/tests", "runner-sdk", "plugins", "examples"] {
        for file in rust_files(&root.join(folder)) {
            let text = fs::read_to_string(&file).expect("a readable file");
            let place = file.with_extension("");
            let place = place.to_string_lossy().trim_end_matches("/mod").to_owned();
            let mut marked = false;
            for line in text.lines().map(str::trim) {
                if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                    marked = true;
                } else if let Some((_, rest)) = line.split_once("fn ").filter(|_| marked) {
                    marked = false;
                    let name = rest.split('(').next().unwrap_or_default().to_owned();
                    tests.entry(name).or_default().push(place.clone());
                }
            }
        }
    }
    tests
}

fn promised() -> BTreeSet<String> {
    let mut rows = BTreeSet::new();
    for (seed, parts) in ROWS {
        for part in *parts {
            match part.split_once('-') {
                None => drop(rows.insert(format!("{seed}-{part}"))),
                Some((first, last)) => {
                    let (first, last): (u32, u32) = (first.parse().expect("a number"), last.parse().expect("a number"));
                    rows.extend((first..=last).map(|number| format!("{seed}-{number:02}")));
                }
            }
        }
    }
    rows
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    files(folder, &["rs"])
}

/// Files below `folder` with one of these extensions, except build output.
fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("a readable entry").path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|found| extensions.iter().any(|extension| found == *extension)) {
                found.push(path);
            }
        }
    }
    found
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("host is in the workspace").to_owned()
}
