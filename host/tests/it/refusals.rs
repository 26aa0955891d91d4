//! Every reason to reject a library: the exact line, in text and as JSON. The other libraries still load.

use std::{collections::BTreeMap, path::Path};

use runner_sdk::abi;
use serde_json::{Value, json};

use crate::harness::{fixtures, folder::Folder, node::Cli};

/// A valid C plugin, as bytes that a test damages.
fn sound() -> Vec<u8> {
    std::fs::read(fixtures::c("refused", &[])).expect("it was just built")
}

/// Checks that a folder's libraries are rejected with these reasons, in text and JSON, and that `good.so` loads. Then
/// checks that a folder with only rejected libraries causes exit code 4.
#[track_caller]
fn check<'a>(folder: &'a Folder, reasons: &'a [(&str, &str)]) -> impl Future<Output = ()> + 'a {
    let caller = std::panic::Location::caller();
    async move {
        let mut expected: Vec<String> =
            reasons.iter().map(|(file, reason)| format!("refused  {file:<24} {reason}")).collect();
        expected.push(format!("loaded   {:<24} /fixtures/good/v1", "good.so"));
        expected.sort();
        let mut rows = folder.rows(0).await;
        rows.sort();
        assert_eq!(rows, expected, "at {caller}");

        let by_file: BTreeMap<&str, &str> = reasons.iter().copied().collect();
        let listings = folder.listings(0).await;
        assert_eq!(listings.len(), reasons.len() + 1, "at {caller}");
        for listing in &listings {
            let path = Path::new(listing["file"].as_str().expect("a path"));
            let file = path.file_name().and_then(|name| name.to_str()).expect("a name");
            let (state, reason) = match by_file.get(file) {
                Some(reason) => ("refused", Some(*reason)),
                None => ("loaded", None),
            };
            assert_eq!(listing["state"], state, "at {caller}: {listing}");
            assert_eq!(listing["reason"].as_str(), reason, "at {caller}: {listing}");
        }

        std::fs::remove_file(folder.path("good.so")).expect("it is there");
        let rows = folder.rows(4).await;
        assert_eq!(rows.len(), reasons.len(), "at {caller}: {rows:#?}");
        let served = folder.cli(&["invoke", "/fixtures/good/v1"]).run().await.expect(4);
        let lines = served.stderr.lines().filter(|line| line.starts_with("error: plugin ")).count();
        assert_eq!(lines, reasons.len(), "at {caller}: {}", served.stderr);
    }
}

/// Checks one library under one name, together with a good one.
async fn check_one(library: &Path, reason: &str) {
    let folder = Folder::with_a_good_one();
    folder.put("bad.so", library);
    check(&folder, &[("bad.so", reason)]).await;
}

const CUT: &str = "the library is damaged or cut short";

#[tokio::test]
async fn non_library_files_are_refused() {
    let folder = Folder::with_a_good_one();
    folder.write("text.so", "hello, I am a library\n");
    folder.write("empty.so", "");
    folder.write("magic.so", b"\x7fELF");
    folder.write("noise.so", [0xff; 4096]);
    folder.write("ignored.txt", "has no suffix of a library and is passed over");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_runner-host"), folder.path("program.so")).expect("a link");
    std::fs::create_dir(folder.path("dir.so")).expect("a folder");
    std::os::unix::fs::symlink(folder.path("nowhere"), folder.path("dangling.so")).expect("a link");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        folder.path("pipe.so"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from(0o600),
        0,
    )
    .expect("a pipe");
    let reasons = [
        ("text.so", "expected a shared library, found text; build the runner as a cdylib"),
        ("empty.so", "expected a shared library, found an empty file; build the runner as a cdylib"),
        ("magic.so", "expected a shared library, found the beginning of a library; build the runner as a cdylib"),
        ("noise.so", "expected a shared library, found something else; build the runner as a cdylib"),
        ("program.so", "expected a shared library, found a program; build the runner as a cdylib"),
        ("dir.so", "is a directory, expected a library file; folders are not searched recursively"),
        (
            "dangling.so",
            "cannot be read: No such file or directory (os error 2); check that it exists and that this user may read it",
        ),
        (
            "pipe.so",
            "expected a shared library, found something that is not a regular file; build the runner as a cdylib",
        ),
    ];
    check(&folder, &reasons).await;
}

#[tokio::test]
async fn unreadable_file_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::with_a_good_one();
    let path = folder.write("secret.so", sound());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).expect("our own file");
    let listed = folder.cli(&["plugins", "list"]).obeys_permissions().run().await.expect(0);
    let reason = "cannot be read: Permission denied (os error 13); check that it exists and that this user may read it";
    assert_eq!(listed.stdout.lines().next_back(), Some(&*format!("refused  {:<24} {reason}", "secret.so")));
    assert!(listed.stdout.starts_with("loaded   good.so"), "{}", listed.stdout);
}

#[tokio::test]
async fn truncated_library_is_refused_at_any_length() {
    let folder = Folder::with_a_good_one();
    let whole = sound();
    let cuts = (1..48).map(|part| part * whole.len() / 48).chain([4, 16, 63, 64, 65, whole.len() - 1]);
    let mut count = 0;
    for cut in cuts {
        count += usize::from(!folder.path(&format!("cut-{cut}.so")).exists());
        folder.write(&format!("cut-{cut}.so"), &whole[..cut]);
    }
    let rows = folder.rows(0).await;
    assert_eq!(rows.len(), count + 1);
    for row in rows.iter().filter(|row| !row.contains("good.so")) {
        assert!(row.starts_with("refused  cut-"), "{row}");
        assert!(row.contains(CUT) || row.contains("found the beginning of a library"), "{row}");
    }
    let header = rows.iter().find(|row| row.contains("cut-64.so")).expect("listed");
    assert!(header.contains(CUT), "{header}");
    let last = rows.iter().find(|row| row.contains(&format!("cut-{}.so", whole.len() - 1))).expect("listed");
    assert!(last.ends_with("; copy it again"), "{last}");
}

#[tokio::test]
async fn damaged_library_never_crashes_the_host() {
    let folder = Folder::with_a_good_one();
    let whole = sound();
    // Headers, tables and names are damaged. Code is not, because a change to it cannot be detected.
    let tail = whole.len() - 2048;
    for (number, at) in (16..1024).step_by(24).chain((tail..whole.len()).step_by(48)).enumerate() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xff;
        let path = folder.write(&format!("damaged-{number:03}.so"), bytes);
        let inspected = Cli::new(&["plugins", "inspect"]).arg(&path).run().await;
        assert!(matches!(inspected.code, 0 | 4), "byte {at}: {inspected:?}");
        if inspected.code == 4 {
            assert_eq!(inspected.stderr.lines().count(), 1, "byte {at}: {}", inspected.stderr);
        }
    }
}

#[tokio::test]
async fn library_for_another_machine_is_refused() {
    let (machine, name) = if cfg!(target_arch = "x86_64") { (183_u16, "aarch64") } else { (62, "x86_64") };
    let folder = Folder::with_a_good_one();
    let mut bytes = sound();
    bytes[18..20].copy_from_slice(&machine.to_le_bytes());
    folder.write("other.so", bytes);
    let own = std::env::consts::ARCH;
    check(&folder, &[("other.so", &format!("built for {name}, this host runs {own}; build it for {own}"))]).await;
}

#[tokio::test]
async fn library_without_entry_or_manifest_is_refused() {
    let folder = Folder::with_a_good_one();
    folder.put("no-entry.so", &fixtures::c("refused", &["NO_ENTRY"]));
    folder.put("no-manifest.so", &fixtures::c("refused", &["NO_MANIFEST"]));
    let reasons = [
        ("no-entry.so", "exports no symbol runner_module_v2, expected one; add export_runner!(…) or, in C, define it"),
        (
            "no-manifest.so",
            "has no section .runner, expected a manifest; add export_runner!(…) or, in C, RUNNER_MANIFEST(…)",
        ),
    ];
    check(&folder, &reasons).await;
}

/// A plugin with this text as its manifest.
fn manifest(folder: &Folder, name: &str, text: &str) {
    // Written over the fixture's own manifest, because a define with every kind of quote is hard to write.
    let mut bytes = sound();
    let own = r#"{"name":"refused","version":"1.0.0","abi":"ABI","capabilities":["/fixtures/refused/v1"]}"#;
    let own = own.replace("ABI", abi::ABI_TEXT);
    assert!(text.len() <= own.len(), "{text} is longer than the one it replaces");
    let at = bytes.windows(own.len()).position(|window| window == own.as_bytes()).expect("the manifest is in the file");
    bytes[at..at + own.len()].fill(0);
    bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
    folder.write(name, bytes);
}

#[tokio::test]
async fn manifest_survives_a_linker_that_drops_sections() {
    let folder = Folder::new();
    folder.put("small.so", &fixtures::without_unused_sections());
    folder.invoke("/fixtures/refused/v1", &[]).await.expect(0);
}

#[tokio::test]
async fn invalid_manifest_is_refused() {
    let folder = Folder::with_a_good_one();
    manifest(&folder, "no-json.so", "I am a plugin");
    manifest(&folder, "blank.so", r#"{"name":" ","abi":"2.0","capabilities":["/a"]}"#);
    manifest(&folder, "control.so", r#"{"name":"a\u0000b","abi":"2.0","capabilities":["/a"]}"#);
    manifest(&folder, "escape.so", r#"{"name":"a","version":"\u001b[2J","abi":"2.0","capabilities":["/a"]}"#);
    manifest(&folder, "nothing.so", r#"{"name":"a","abi":"2.0","capabilities":[]}"#);
    manifest(&folder, "space.so", r#"{"name":"a","abi":"2.0","capabilities":["/a b"]}"#);
    manifest(&folder, "slash.so", r#"{"name":"a","abi":"2.0","capabilities":["a/v1"]}"#);
    manifest(&folder, "empty.so", r#"{"name":"a","abi":"2.0","capabilities":[""]}"#);
    manifest(&folder, "twice.so", r#"{"name":"a","abi":"2.0","capabilities":["/a","/a"]}"#);
    manifest(&folder, "major.so", r#"{"name":"a","abi":"3.0","capabilities":["/a"]}"#);
    manifest(&folder, "abi.so", r#"{"name":"a","abi":"one","capabilities":["/a"]}"#);
    manifest(&folder, "missing.so", r#"{"name":"a","capabilities":["/a"]}"#);
    let unusable = |why: &str| {
        format!("its manifest cannot be used: {why}; rebuild it with runner-sdk or correct RUNNER_MANIFEST")
    };
    let reasons = [
        ("no-json.so", unusable("expected value at line 1 column 1")),
        ("blank.so", unusable("its name is blank")),
        (
            "control.so",
            unusable(r#"its name begins with "a\0b", expected at most 128 bytes without control characters"#),
        ),
        (
            "escape.so",
            unusable(r#"its version begins with "\u{1b}[2J", expected at most 128 bytes without control characters"#),
        ),
        ("nothing.so", unusable("it names no capability")),
        ("space.so", unusable(r#"capability "/a b" holds white space or a control character"#)),
        ("empty.so", unusable("capability is empty, expected a name such as /examples/hello/v1")),
        ("slash.so", unusable("capability \"a/v1\" does not begin with /, expected a name such as /examples/hello/v1")),
        ("twice.so", unusable("it names /a twice")),
        ("major.so", "speaks ABI 3, this host speaks 2; rebuild it with runner-sdk for ABI 2".to_owned()),
        ("abi.so", unusable(r#"its abi is "one", expected "major.minor""#)),
        ("missing.so", unusable("missing field `abi` at line 1 column 34")),
    ];
    let reasons: Vec<(&str, &str)> = reasons.iter().map(|(file, reason)| (*file, reason.as_str())).collect();
    check(&folder, &reasons).await;
}

#[tokio::test]
async fn plugin_for_a_later_host_is_refused() {
    let folder = Folder::with_a_good_one();
    let mut reasons = Vec::new();
    let mut put = |file: &'static str, keys: Value, reason: String| {
        folder.put(file, &fixtures::with_manifest(&keys));
        reasons.push((file, reason));
    };
    let (major, minor) = (abi::ABI_MAJOR, abi::ABI_MINOR);
    for (file, needed) in [("minor.so", format!("{major}.{}", minor + 1)), ("major.so", format!("{}.0", major + 1))] {
        let reason = format!("needs ABI {needed}, this host has {major}.{minor}; update runner-host");
        put(file, json!({ "min_abi": needed }), reason);
    }
    put(
        "requires.so",
        json!({ "requires": ["teleport"] }),
        "requires \"teleport\", and this host is too old to know it; update runner-host".to_owned(),
    );
    let reasons: Vec<(&str, &str)> = reasons.iter().map(|(file, reason)| (*file, reason.as_str())).collect();
    check(&folder, &reasons).await;
}

#[tokio::test]
async fn unknown_wishes_and_keys_are_ignored() {
    let folder = Folder::new();
    let abi = format!("{}.{}", abi::ABI_MAJOR, abi::ABI_MINOR);
    let keys = json!({ "wants": ["teleport"], "requires": [], "min_abi": abi, "colour": { "red": 1 } });
    folder.put("later.so", &fixtures::with_manifest(&keys));
    folder.invoke("/fixtures/refused/v1", &[]).await.expect(0);
}

#[tokio::test]
async fn plugin_without_its_grant_is_refused_at_load() {
    let mut folder = Folder::with_a_good_one();
    folder.put("rust.so", &fixtures::wants_token());
    folder.put("c.so", &fixtures::with_manifest(&json!({ "requires": ["token"] })));
    let reason = "wants \"token\", which is not granted; add grant = [\"token\"] to its entry in plugins.toml";
    check(&folder, &[("rust.so", reason), ("c.so", reason)]).await;

    // The line of the error is the remedy.
    folder.plugins_file("[[plugin]]\nfile = \"rust.so\"\ngrant = [\"token\"]\n");
    let rows = folder.rows(0).await;
    assert_eq!(rows[0], format!("loaded   {:<24} /fixtures/wants-token/v1", "rust.so"));
}

#[tokio::test]
async fn table_of_another_abi_is_refused() {
    let folder = Folder::with_a_good_one();
    let defines = [
        ("magic.so", "MAGIC=1"),
        ("major.so", "ABI=0x30000"),
        ("mask.so", "MASK=0x1d"),
        ("no-entries.so", "MASK=0x0"),
        ("null.so", "START_NULL"),
        ("null-table.so", "TABLE_NULL"),
    ];
    for (file, define) in defines {
        let capability = format!("CAPABILITY=\"/fixtures/{file}\"");
        folder.put(file, &fixtures::c("refused", &[define, &capability]));
    }
    let lacks = |entry: &str| {
        format!(
            "its table lacks the mandatory entry {entry}; rebuild it with runner-sdk or complete the mask and the table"
        )
    };
    let magic = |found: &str| {
        let expected = runner_sdk::abi::MAGIC;
        format!(
            "its table begins with {found}, expected {expected:#018x}; rebuild it with this host's runner-sdk or runner.h"
        )
    };
    let reasons = [
        ("magic.so", magic("0x0000000000000001")),
        ("major.so", "speaks ABI 3, this host speaks 2; rebuild it with runner-sdk for ABI 2".to_owned()),
        ("mask.so", lacks("start")),
        ("no-entries.so", lacks("create")),
        ("null.so", lacks("start")),
        ("null-table.so", magic("0x0000000000000000")),
    ];
    let reasons: Vec<(&str, &str)> = reasons.iter().map(|(file, reason)| (*file, reason.as_str())).collect();
    check(&folder, &reasons).await;
}

#[tokio::test]
async fn changed_struct_is_refused_before_any_call() {
    let folder = Folder::with_a_good_one();
    folder.put("changed.so", &fixtures::changed_struct());
    let reason = "its tables are not this host's (start: parameter 3: expected *const StartRequest , found Bytes); \
                  rebuild it with this host's runner-sdk";
    check(&folder, &[("changed.so", reason)]).await;
}

#[tokio::test]
async fn damaged_layout_header_is_refused() {
    let reason = "its tables are not this host's (its header is damaged: it does not point to a layout); \
                  rebuild it with this host's runner-sdk";
    check_one(&fixtures::c("header", &["MINOR=11"]), reason).await;
}

#[tokio::test]
async fn header_of_another_version_refuses_no_plugin() {
    let mut folder = Folder::new();
    folder.set("RUST_LOG", "debug");
    folder.put("later.so", &fixtures::c("header", &["MINOR=12"]));
    let ended = folder.invoke("/fixtures/refused/v1", &[]).await.expect(0);
    let reason = "its header is of abi_stable 0.12, expected 0.11";
    assert!(ended.stderr.contains(reason), "{}", ended.stderr);
}

#[tokio::test]
async fn first_draft_plugins_are_refused_in_one_line() {
    let folder = Folder::with_a_good_one();
    folder.put("c.so", &fixtures::c("first_draft", &[]));
    folder.put("rust.so", &fixtures::first_draft());
    let reason = "was built for the first draft of the ABI (it exports runner_module_v1), this host needs \
                  runner_module_v2; rebuild it with this host's runner-sdk or runner.h";
    check(&folder, &[("c.so", reason), ("rust.so", reason)]).await;
}

#[tokio::test]
async fn failed_create_is_refused_with_its_text() {
    let folder = Folder::with_a_good_one();
    folder.put("fails.so", &fixtures::c("refused", &["CREATE_FAILS"]));
    folder.put("panics.so", &fixtures::init_panics());
    let reasons = [
        ("fails.so", "create failed: the camera is not connected"),
        ("panics.so", "create panicked: no calibration in {} at src/lib.rs:9"),
    ];
    check(&folder, &reasons).await;
}

#[tokio::test]
async fn hanging_create_is_refused_after_the_timeout() {
    let mut folder = Folder::with_a_good_one();
    folder.set("PLUGIN_INIT_TIMEOUT", "300ms");
    folder.put("silent.so", &fixtures::c("refused", &["CREATE_SILENT"]));
    folder.put("stuck.so", &fixtures::c("refused", &["CREATE_BLOCKS", "CAPABILITY=\"/fixtures/stuck/v1\""]));
    let hung = "create gave no answer within 300ms; a plugin's create must answer once, soon";
    check(&folder, &[("silent.so", hung), ("stuck.so", hung)]).await;
}

#[tokio::test]
async fn invalid_init_timeout_is_one_line() {
    let mut folder = Folder::with_a_good_one();
    folder.set("PLUGIN_INIT_TIMEOUT", "soon");
    let output = folder.cli(&["plugins", "list"]).run().await.expect(78);
    assert_eq!(
        output.stderr,
        "error: PLUGIN_INIT_TIMEOUT: expected a duration above 0 such as 30s, at most 316224000 seconds, found \"soon\""
    );
    folder.set("PLUGIN_INIT_TIMEOUT", "1e18");
    let output = folder.cli(&["plugins", "list"]).run().await.expect(78);
    assert_eq!(
        output.stderr,
        "error: PLUGIN_INIT_TIMEOUT: expected a duration above 0 such as 30s, at most 316224000 seconds, found \"1e18\""
    );
    folder.set("PLUGIN_INIT_TIMEOUT", "316224000s");
    folder.rows(0).await;
}

#[tokio::test]
async fn second_create_answer_is_ignored() {
    let folder = Folder::with_a_good_one();
    folder.put("twice.so", &fixtures::c("refused", &["CREATE_TWICE"]));
    let rows = folder.rows(0).await;
    assert!(rows.iter().all(|row| row.starts_with("loaded")), "{rows:#?}");
    folder.invoke("/fixtures/refused/v1", &[]).await.expect(0);
}

#[tokio::test]
async fn missing_dependency_is_named_in_the_refusal() {
    let reason =
        "cannot be opened: librh_fixture_missing.so: cannot open shared object file: No such file or directory";
    check_one(&fixtures::needs_missing(), reason).await;
}

#[tokio::test]
async fn capability_has_one_owner() {
    let mut folder = Folder::with_a_good_one();
    let contested = "CAPABILITY=\"/fixtures/contested/v1\"";
    let first = folder.put("a.so", &fixtures::c("refused", &[contested]));
    folder.put("b.so", &fixtures::c("refused", &[contested, "TASK_FAILS"]));
    let serves = |other: &Path| {
        format!(
            "serves /fixtures/contested/v1, which {} serves already; remove one of the two, or set override = true on the one that should serve it",
            other.display()
        )
    };
    let rows = folder.rows(0).await;
    assert_eq!(rows[0], format!("loaded   {:<24} /fixtures/contested/v1", "a.so"));
    assert_eq!(rows[1], format!("refused  {:<24} {}", "b.so", serves(&first)));
    folder.invoke("/fixtures/contested/v1", &[]).await.expect(0);

    folder.plugins_file("[[plugin]]\nfile = \"b.so\"\noverride = true\n");
    let rows = folder.rows(0).await;
    assert_eq!(rows[0], format!("loaded   {:<24} /fixtures/contested/v1", "b.so"));
    assert_eq!(rows[1], format!("refused  {:<24} {}", "a.so", serves(&folder.path("b.so"))));
    let output = folder.invoke("/fixtures/contested/v1", &[]).await.expect(1);
    assert!(output.stderr.contains("this is the other library"), "{}", output.stderr);

    // If both have an override, neither has priority, and the first one in the file serves.
    folder.plugins_file("[[plugin]]\nfile = \"b.so\"\noverride = true\n[[plugin]]\nfile = \"a.so\"\noverride = true\n");
    assert_eq!(folder.rows(0).await, rows);
}
