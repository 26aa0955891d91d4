//! `plugins.toml`, the checks before a library is opened, `plugins inspect` and `plugins new`.

use std::{
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::harness::{
    TestServer, fixtures,
    folder::Folder,
    node::{Cli, Finished},
};

fn sha256(path: &Path) -> String {
    let bytes = std::fs::read(path).expect("a file to hash");
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The row of `file`: state and reason without the padding.
async fn row(folder: &Folder, code: i32, file: &str) -> String {
    let rows = folder.rows(code).await;
    let row = rows.iter().find(|row| row.split_whitespace().nth(1) == Some(file));
    let row = row.unwrap_or_else(|| panic!("no row of {file}: {rows:#?}"));
    row.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn pin_compares_the_files_hash() {
    let mut folder = Folder::with_a_good_one();
    let (found, other) = (sha256(&folder.path("good.so")), "0".repeat(64));
    folder.plugins_file(&format!("[[plugin]]\nfile = \"good.so\"\nsha256 = \"{}\"\n", found.to_uppercase()));
    assert_eq!(row(&folder, 0, "good.so").await, "loaded good.so /fixtures/good/v1");
    assert_eq!(folder.listings(0).await[0]["sha256"], found);

    folder.plugins_file(&format!("[[plugin]]\nfile = \"good.so\"\nsha256 = \"{other}\"\n"));
    let mark = folder.root().join("mark");
    folder.set("RH_FIXTURE_MARK", mark.to_string_lossy());
    folder.put("good.so", &fixtures::c("refused", &["MARKS"]));
    let found = sha256(&folder.path("good.so"));
    assert_eq!(
        row(&folder, 4, "good.so").await,
        format!(
            "refused good.so sha256 is {found}, plugins.toml pins {other}; install the pinned file or update the pin"
        )
    );
    assert!(!mark.exists(), "a file with another hash was opened");
}

#[tokio::test]
async fn unlisted_libraries_are_refused_on_request() {
    let mut folder = Folder::with_a_good_one();
    folder.put("stray.so", &fixtures::c("refused", &[]));
    folder.plugins_file("[trust]\nunlisted = \"refuse\"\n[[plugin]]\nfile = \"good.so\"\n");
    assert_eq!(row(&folder, 0, "good.so").await, "loaded good.so /fixtures/good/v1");
    assert_eq!(
        row(&folder, 0, "stray.so").await,
        "refused stray.so is not listed in plugins.toml and unlisted = \"refuse\"; add a [[plugin]] entry for it"
    );
    folder.plugins_file("[trust]\nunlisted = \"refuse\"\n");
    row(&folder, 4, "good.so").await;
}

#[tokio::test]
async fn disabled_and_missing_plugins_are_listed() {
    let mut folder = Folder::with_a_good_one();
    folder.put("off.so", &fixtures::c("refused", &[]));
    folder.plugins_file("[[plugin]]\nfile = \"off.so\"\nenabled = false\n[[plugin]]\nfile = \"absent\"\n");
    assert_eq!(row(&folder, 0, "off.so").await, "refused off.so is switched off by enabled = false in plugins.toml");
    let searched = folder.root().join("plugins");
    assert_eq!(
        row(&folder, 0, "absent").await,
        format!(
            "refused absent is listed in plugins.toml but was not found in {}; install it or remove the entry",
            searched.display()
        )
    );
    assert_eq!(row(&folder, 0, "good.so").await, "loaded good.so /fixtures/good/v1");
}

#[tokio::test]
async fn bare_name_finds_the_platforms_library_file() {
    let mut folder = Folder::new();
    folder.put("libmy_runner.so", &fixtures::c("refused", &[]));
    folder.plugins_file("[trust]\nunlisted = \"refuse\"\n[[plugin]]\nfile = \"my-runner\"\n");
    assert_eq!(row(&folder, 0, "libmy_runner.so").await, "loaded libmy_runner.so /fixtures/refused/v1");
    folder.plugins_file("[trust]\nunlisted = \"refuse\"\n[[plugin]]\nfile = \"./plugins/libmy_runner.so\"\n");
    assert_eq!(row(&folder, 0, "libmy_runner.so").await, "loaded libmy_runner.so /fixtures/refused/v1");
}

#[tokio::test]
async fn plugins_file_selects_capabilities() {
    let mut folder = Folder::new();
    folder.put("libbehave.so", &fixtures::c("behave", &[]));
    folder.plugins_file("[[plugin]]\nfile = \"behave\"\ncapabilities = [\"/fixtures/c-thread/v1\"]\n");
    assert_eq!(row(&folder, 0, "libbehave.so").await, "loaded libbehave.so /fixtures/c-thread/v1");
    let output = folder.invoke("/fixtures/c-double/v1", &[]).await.expect(2);
    assert!(output.stderr.contains("no plugin serves /fixtures/c-double/v1; these do: /fixtures/c-thread/v1"));

    folder.plugins_file("[[plugin]]\nfile = \"behave\"\ncapabilities = [\"/fixtures/c-four/v1\"]\n");
    assert_eq!(
        row(&folder, 4, "libbehave.so").await,
        "refused libbehave.so does not serve /fixtures/c-four/v1, which plugins.toml lists for it; it serves /fixtures/c-double/v1, /fixtures/c-late/v1, /fixtures/c-thread/v1, /fixtures/c-words/v1, /fixtures/c-hangs/v1"
    );
    folder.plugins_file("[[plugin]]\nfile = \"behave\"\ncapabilities = []\n");
    assert_eq!(
        row(&folder, 4, "libbehave.so").await,
        "refused libbehave.so would serve nothing: capabilities = [] in plugins.toml; name some, or write enabled = false"
    );
}

#[tokio::test]
async fn unavailable_key_refuses_only_its_plugin() {
    let mut folder = Folder::with_a_good_one();
    folder.put("bad.so", &fixtures::c("refused", &[]));
    let keys = [
        ("isolation = \"process\"", "isolation = \"process\""),
        ("limits = { memory = \"2GiB\" }", "limits.memory"),
        ("limits = { wall_time = \"15m\", cpu_time = \"1m\" }", "limits.cpu_time"),
        ("limits = { network = false }", "limits.network"),
        ("per_task = true", "per_task = true"),
        ("shared = true", "shared = true"),
    ];
    for (line, key) in keys {
        folder.plugins_file(&format!("[[plugin]]\nfile = \"bad.so\"\n{line}\n"));
        let output = row(&folder, 0, "bad.so").await;
        assert_eq!(output, format!("refused bad.so {key} is not available in this version; remove it"));
    }
    for (line, key) in [("require_pin = true", "require_pin = true"), ("signers = [\"02ab\"]", "signers")] {
        folder.plugins_file(&format!("[trust]\n{line}\n[[plugin]]\nfile = \"bad.so\"\n"));
        let output = row(&folder, 4, "bad.so").await;
        assert_eq!(output, format!("refused bad.so {key} is not available in this version; remove it"));
    }
    folder.plugins_file("[defaults]\nper_task = true\n[[plugin]]\nfile = \"bad.so\"\nper_task = false\n");
    assert_eq!(row(&folder, 0, "bad.so").await, "loaded bad.so /fixtures/refused/v1");
    assert_eq!(
        row(&folder, 0, "good.so").await,
        "refused good.so per_task = true is not available in this version; remove it"
    );
    folder.plugins_file(
        "[defaults]\nisolation = \"process\"\n[[plugin]]\nfile = \"bad.so\"\nisolation = \"in-process\"\n",
    );
    assert_eq!(row(&folder, 0, "bad.so").await, "loaded bad.so /fixtures/refused/v1");
}

#[tokio::test]
async fn plugins_file_error_is_one_line() {
    let mut folder = Folder::with_a_good_one();
    let file = folder.root().join("plugins.toml");
    let cases = [
        (
            "[[plugin]]\nfile = \"good.so\"\nisolaton = \"process\"",
            "unknown key \"isolaton\", did you mean \"isolation\"?",
        ),
        ("[[plugin]]\nfile = 7", "[[plugin]] 1 file: expected a path or a name, found 7"),
        ("plugin = 7", "expected [[plugin]] tables"),
        ("[[plugin]]\nfile = ", "line 2: "),
        ("\u{0}", "line 1: "),
    ];
    for (text, part) in cases {
        folder.plugins_file(text);
        let output = folder.cli(&["plugins", "list"]).run().await.expect(78);
        assert!(output.stderr.contains(part), "{text:?}: {}", output.stderr);
        assert!(output.stderr.starts_with(&format!("error: {}: ", file.display())), "{}", output.stderr);
        assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
    }
    std::fs::remove_file(&file).expect("it is there");
    let output = folder.cli(&["plugins", "list"]).run().await.expect(78);
    assert!(output.stderr.ends_with("plugins.toml: No such file or directory (os error 2)"), "{}", output.stderr);
}

#[tokio::test]
async fn missing_plugins_folder_is_an_error() {
    let folder = Folder::new();
    assert!(folder.rows(0).await.is_empty());
    let output = folder.invoke("/fixtures/good/v1", &[]).await.expect(78);
    assert_eq!(
        output.stderr,
        "error: no plugin was found; put a library into the plugins folder or name one with --plugins"
    );
    let output = Cli::new(&["plugins", "list", "--plugins", "nowhere"]).dir(folder.root()).run().await.expect(78);
    assert_eq!(
        output.stderr,
        "error: plugins folder nowhere does not exist; create it, or name another with --plugins"
    );
}

#[tokio::test]
async fn one_file_under_two_names_is_one_plugin() {
    let mut folder = Folder::with_a_good_one();
    std::os::unix::fs::symlink(folder.path("good.so"), folder.path("link.so")).expect("a link");
    assert_eq!(folder.rows(0).await, [format!("loaded   {:<24} /fixtures/good/v1", "good.so")]);
    folder.plugins_file("[[plugin]]\nfile = \"link.so\"\n");
    assert_eq!(folder.rows(0).await, [format!("loaded   {:<24} /fixtures/good/v1", "link.so")]);
    folder.plugins_file(
        "[[plugin]]\nfile = \"link.so\"\n[[plugin]]\nfile = \"good\"\n[[plugin]]\nfile = \"./plugins/good.so\"\n",
    );
    let rows = folder.rows(0).await;
    assert_eq!(rows[0], format!("loaded   {:<24} /fixtures/good/v1", "link.so"));
    assert!(
        rows[1..]
            .iter()
            .any(|row| row.ends_with("is the same file as link.so; keep one entry, or give each its own name")),
        "{rows:#?}"
    );
}

#[tokio::test]
async fn refused_plugin_releases_its_capabilities() {
    let folder = Folder::new();
    // behave serves four capabilities. A first library takes one of them, so behave is rejected. So a third library
    // may take another.
    folder.put("a.so", &fixtures::c("refused", &["CAPABILITY=\"/fixtures/c-double/v1\""]));
    folder.put("b.so", &fixtures::c("behave", &[]));
    folder.put("c.so", &fixtures::c("refused", &["CAPABILITY=\"/fixtures/c-late/v1\""]));
    let rows = folder.rows(0).await;
    assert_eq!(rows[0], format!("loaded   {:<24} /fixtures/c-double/v1", "a.so"));
    assert!(rows[1].starts_with("refused  b.so"), "{}", rows[1]);
    assert_eq!(rows[2], format!("loaded   {:<24} /fixtures/c-late/v1", "c.so"));
}

#[tokio::test]
async fn override_takes_only_its_own_capabilities() {
    let mut folder = Folder::new();
    folder.put("b.so", &fixtures::c("behave", &[]));
    folder.put("z.so", &fixtures::c("refused", &["CAPABILITY=\"/fixtures/c-late/v1\""]));
    folder.plugins_file("[[plugin]]\nfile = \"z.so\"\noverride = true\n");
    assert_eq!(row(&folder, 0, "z.so").await, "loaded z.so /fixtures/c-late/v1");
    assert_eq!(
        row(&folder, 0, "b.so").await,
        "loaded b.so /fixtures/c-double/v1, /fixtures/c-thread/v1, /fixtures/c-words/v1, /fixtures/c-hangs/v1"
    );
}

/// A's constructor overwrites B's file. B runs as it was hashed.
#[tokio::test]
async fn all_plugin_files_are_read_before_first_load() {
    let mut folder = Folder::new();
    let capability = "CAPABILITY=\"/fixtures/victim/v1\"";
    folder.put("a.so", &fixtures::c("refused", &["OVERWRITES"]));
    let victim = folder.put("b.so", &fixtures::c("refused", &[capability]));
    let original = sha256(&victim);
    let other = fixtures::c("refused", &[capability, "TASK_FAILS"]);
    folder.set("RH_FIXTURE_OVERWRITE", format!("{}={}", victim.display(), other.display()));

    let listings = folder.listings(0).await;
    assert_eq!(listings[1]["state"], "loaded", "{listings:#?}");
    assert_eq!(listings[1]["sha256"], original);
    assert_eq!(sha256(&victim), sha256(&other), "the constructor did not overwrite anything");

    folder.put("b.so", &fixtures::c("refused", &[capability]));
    folder.invoke("/fixtures/victim/v1", &[]).await.expect(0);
    assert_eq!(sha256(&victim), sha256(&other), "the constructor did not overwrite anything");
    let output = folder.invoke("/fixtures/victim/v1", &[]).await.expect(1);
    assert!(output.stderr.contains("this is the other library"), "{}", output.stderr);
}

#[tokio::test]
async fn inspect_runs_no_code_of_the_file() {
    let mut folder = Folder::new();
    let library = folder.put("marks.so", &fixtures::c("refused", &["MARKS"]));
    let mark = folder.root().join("mark");
    folder.set("RH_FIXTURE_MARK", mark.to_string_lossy());
    let inspect = |output: &str| {
        let cli = Cli::new(&["plugins", "inspect", "-o", output]).arg(&library);
        cli.set("RH_FIXTURE_MARK", mark.to_string_lossy()).run()
    };
    let output = inspect("text").await.expect(0);
    for line in [
        "name             refused",
        "version          1.0.0",
        "capabilities     /fixtures/refused/v1",
        &format!("abi              {}", runner_sdk::abi::ABI_TEXT),
    ] {
        assert!(output.stdout.lines().any(|found| found == line), "{line}\n{}", output.stdout);
    }
    assert!(output.stdout.contains(&sha256(&library)) && output.stdout.contains("libc.so.6"), "{}", output.stdout);
    let facts: Value = serde_json::from_str(&inspect("json").await.expect(0).stdout).expect("JSON");
    assert_eq!(facts["facts"]["manifest"]["name"], "refused");
    assert_eq!(facts["facts"]["machine"], std::env::consts::ARCH);
    assert_eq!(facts["facts"]["rust"], false);
    assert_eq!(facts["sha256"], sha256(&library));
    assert!(!mark.exists(), "a constructor ran");

    folder.rows(0).await;
    assert!(mark.exists(), "the constructor makes no file even when it runs");
}

#[tokio::test]
async fn inspect_describes_a_rust_plugin() {
    let output = Cli::new(&["plugins", "inspect", "-o", "json"]).arg(fixtures::hello()).run().await.expect(0);
    let facts: Value = serde_json::from_str(&output.stdout).expect("JSON");
    assert_eq!(facts["facts"]["rust"], true);
    assert_eq!(facts["facts"]["manifest"]["sdk"], env!("CARGO_PKG_VERSION"));
    assert_eq!(facts["facts"]["manifest"]["capabilities"], serde_json::json!(["/examples/hello/v1"]));
    let glibc = facts["facts"]["glibc"].as_str().expect("it needs glibc");
    assert!(glibc.starts_with("2."), "{glibc}");
}

#[tokio::test]
async fn inspect_shows_what_a_plugin_needs() {
    let inspect = |library: &Path, output: &str| Cli::new(&["plugins", "inspect", "-o", output]).arg(library).run();
    let library = fixtures::wants_token();
    let text = inspect(&library, "text").await.expect(0).stdout;
    for line in ["abi at least     2.0", "requires         token", "wants            token, a-later-feature"] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    let facts: Value = serde_json::from_str(&inspect(&library, "json").await.expect(0).stdout).expect("JSON");
    assert_eq!(facts["facts"]["manifest"]["wants"], serde_json::json!(["token", "a-later-feature"]));
    // What this host does not have is described too.
    let library = fixtures::with_manifest(&serde_json::json!({ "requires": ["teleport"] }));
    let text = inspect(&library, "text").await.expect(0).stdout;
    assert!(text.lines().any(|found| found == "requires         teleport"), "{text}");
    assert!(text.lines().any(|found| found == "wants            -"), "{text}");
}

#[tokio::test]
async fn inspect_refuses_with_one_line_and_exit_4() {
    let folder = Folder::new();
    let pipe = folder.path("pipe.so");
    let owner = rustix::fs::Mode::from(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, owner, 0).expect("a pipe");
    let text = folder.write("text.so", "hello");
    let cases = [
        (text, "expected a shared library, found text; build the runner as a cdylib"),
        (pipe, "expected a shared library, found something that is not a regular file; build the runner as a cdylib"),
        (folder.root().to_owned(), "is a directory, expected a library file; folders are not searched recursively"),
        (
            folder.path("absent.so"),
            "cannot be read: No such file or directory (os error 2); check that it exists and that this user may read it",
        ),
    ];
    for (file, reason) in cases {
        let output = Cli::new(&["plugins", "inspect"]).arg(&file).run().await.expect(4);
        assert_eq!(output.stderr, format!("error: plugin {}: {reason}", file.display()));
        assert!(output.stdout.is_empty());
    }
}

#[tokio::test]
async fn unusual_file_names_load_and_are_listed() {
    let folder = Folder::new();
    let library = fixtures::c("refused", &[]);
    let long = format!("{}.so", "l".repeat(252));
    let names: [&[u8]; 6] = [b"a b.so", b"-o.so", b"n\new.so", b"not-\xff-utf8.so", b".so.so", long.as_bytes()];
    for name in names {
        let file = folder.path("x").with_file_name(std::ffi::OsStr::from_bytes(name));
        std::fs::copy(&library, &file).expect("the file system takes the name");
        let listings = folder.listings(0).await;
        assert_eq!(listings.len(), 1);
        assert_eq!(listings[0]["state"], "loaded", "{listings:#?}");
        let rows = folder.rows(0).await;
        assert_eq!(rows.len(), 1, "{rows:#?}");
        let inspected = Cli::new(&["plugins", "inspect", "-o", "json"]).arg(&file).run().await.expect(0);
        serde_json::from_str::<Value>(&inspected.stdout).expect("JSON");
        folder.invoke("/fixtures/refused/v1", &[]).await.expect(0);
        std::fs::remove_file(file).expect("it is there");
    }
}

/// A path with a line break stays one row, also if it contains another file's name.
#[tokio::test]
async fn reason_with_a_file_name_stays_one_line() {
    let folder = Folder::new();
    let library = fixtures::c("refused", &[]);
    for name in [&b"a\nb.so"[..], b"z.so"] {
        let file = folder.path("x").with_file_name(std::ffi::OsStr::from_bytes(name));
        std::fs::copy(&library, file).expect("the file system takes the name");
    }
    let rows = folder.rows(0).await;
    assert_eq!(rows.len(), 2, "{rows:#?}");
}

#[tokio::test]
async fn plugin_output_does_not_reach_stdout() {
    let folder = Folder::new().usual_logs();
    folder.put("prints.so", &fixtures::c("refused", &["CREATE_PRINTS"]));
    let listings = folder.listings(0).await;
    assert_eq!(listings[0]["state"], "loaded");
    let output = folder.invoke("/fixtures/refused/v1", &["-o", "json"]).await.expect(0);
    assert_eq!(output.stdout, "");
    assert_eq!(output.stderr, "create was here");
}

/// Opening a library holds the linker's lock for all libraries. This process cannot recover from a constructor that
/// never ends. It can only detect and name it.
#[tokio::test]
async fn hanging_constructor_is_named_and_the_process_ends() {
    let mut folder = Folder::with_a_good_one();
    folder.set("PLUGIN_INIT_TIMEOUT", "300ms");
    folder.put("z.so", &fixtures::c("refused", &["OPEN_HANGS"]));
    assert_eq!(row(&folder, 0, "good.so").await, "loaded good.so /fixtures/good/v1");
    assert_eq!(
        row(&folder, 0, "z.so").await,
        "refused z.so opening it took longer than 300ms: a constructor in it hangs; libraries after it cannot be opened (if it is only slow, raise PLUGIN_INIT_TIMEOUT)"
    );
    many(&folder, 40);
    let began = Instant::now();
    let output = row(&folder, 0, "z.so").await;
    assert!(output.starts_with("refused"), "{output}");
    let rows = folder.rows(0).await;
    let behind: Vec<_> = rows.iter().filter(|row| row.contains("zz-")).collect();
    assert_eq!(behind.len(), 40);
    let hangs = format!("cannot be opened: {} hangs while it is opened; remove it", folder.path("z.so").display());
    assert!(behind.iter().all(|row| row.starts_with("refused") && row.ends_with(&hangs)), "{behind:#?}");
    // Two processes that wait for each library would take 24 s.
    assert!(began.elapsed() < Duration::from_secs(12), "each of them was waited for: {:?}", began.elapsed());
}

/// Puts this many valid libraries into the folder, each with its own capability.
fn many(folder: &Folder, count: usize) {
    let name = b"/fixtures/many-000/v1";
    let original = std::fs::read(fixtures::c("refused", &["CAPABILITY=\"/fixtures/many-000/v1\""])).expect("built");
    let at = original.windows(name.len()).position(|window| window == name).expect("it is in the manifest");
    for number in 0..count {
        let mut bytes = original.clone();
        bytes[at..at + name.len()].copy_from_slice(format!("/fixtures/many-{number:03}/v1").as_bytes());
        folder.write(&format!("zz-{number:03}.so"), bytes);
    }
}

/// The process cannot recover, but the exit code is no success, and the library is named.
#[tokio::test]
async fn plugin_that_calls_exit_is_named() {
    let folder = Folder::with_a_good_one().usual_logs();
    let bad = folder.put("z.so", &fixtures::c("refused", &["CREATE_EXITS"]));
    let output = folder.cli(&["plugins", "list"]).run().await.expect(75);
    let line = format!("error: plugin {} ended the process while it was loaded; remove it", bad.display());
    assert_eq!(output.stderr, line);
    folder.put("z.so", &fixtures::c("refused", &["TASK_EXITS"]));
    let output = folder.invoke("/fixtures/refused/v1", &[]).await.expect(75);
    let why = "error: a plugin ended the process; a runner must not call exit; plugin: refused; running tasks: ";
    let rest = output.stderr.strip_prefix(why).unwrap_or_else(|| panic!("{}", output.stderr));
    let (task, thread) = rest.split_once("; ").expect("two parts");
    assert_eq!((task, thread), ("invoke", "thread: plugin-refused"));
}

#[tokio::test]
async fn node_names_the_plugin_that_called_exit() {
    let plugins = [fixtures::zoo(), fixtures::hello(), fixtures::c("refused", &["TASK_EXITS"])];
    let wait = "/fixtures/wait-file/v1";
    for (exits, plugin, thread, named) in [
        ("/fixtures/refused/v1", "refused", "plugin-refused", vec!["/fixtures/refused/v1"]),
        ("/fixtures/exits/v1", "zoo", "runner-zoo", vec![wait, "/fixtures/exits/v1"]),
    ] {
        let test_server = TestServer::start().await;
        let node = test_server.node(&plugins).set("MAX_CONCURRENCY", "2").leasing().await;
        let other = test_server.task(wait).meta(serde_json::json!({ "file": "/never" })).submit();
        test_server.started(&node, other).await;
        test_server.task(exits).submit();
        assert_eq!(node.wait().await, 75);
        let line = node.says("plugin.exited").await;
        let result = [&line["level"], &line["plugin"], &line["thread"]];
        assert_eq!(result, ["ERROR", plugin, thread], "{line}");
        let ids = line["task_ids"].as_str().unwrap_or_default().split(' ');
        let mut running: Vec<Value> = Vec::new();
        for id in ids {
            let started = node.line(|line| line["event"] == "task.started" && line["task_id"] == id).await;
            running.push(started["capability"].clone());
        }
        assert_eq!(running, named, "{}", node.log());
    }
}

/// No code of the host runs after a signal or `_exit` has ended the process. So the earlier output must name the
/// cause.
#[tokio::test]
async fn last_log_line_names_a_plugin_that_crashes() {
    for (crash, code) in [("CREATE_CRASHES", -1), ("CREATE_EXITS_AT_ONCE", 0)] {
        let folder = Folder::with_a_good_one();
        let bad = folder.put("z.so", &fixtures::c("refused", &[crash]));
        let named = |stderr: &str| {
            let last = stderr.lines().last().unwrap_or_default();
            last.contains("loading plugin") && last.contains(&*bad.to_string_lossy())
        };
        let list = folder.cli(&["plugins", "list"]).set("RUST_LOG", "info").run().await.expect(code);
        assert!(named(&list.stderr), "{}", list.stderr);
        let test_server = TestServer::start().await;
        let node = test_server.node(&[fixtures::hello(), bad.clone()]).begun();
        assert_eq!(node.wait().await, code);
        let lines = node.lines();
        let last = lines.last().expect("it printed something");
        assert_eq!((&last["event"], &last["plugin"]), (&"plugin.loading".into(), &"refused".into()), "{last}");
        assert_eq!(node.said("plugin.loaded").len(), 1);
    }
}

#[tokio::test]
async fn packaged_plugins_load_together() {
    let folder = Folder::new();
    for library in [fixtures::hello(), fixtures::echo(), fixtures::noop(), fixtures::pointcloud()] {
        let name = library.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        folder.put(&name, &library);
    }
    let listings = folder.listings(0).await;
    let names: Vec<&str> = listings.iter().filter_map(|listing| listing["name"].as_str()).collect();
    assert_eq!(names, ["echo", "hello", "noop", "pointcloud"]);
    assert!(listings.iter().all(|listing| listing["state"] == "loaded"), "{listings:#?}");
    assert_eq!(listings[0]["capabilities"].as_array().map(Vec::len), Some(3), "{}", listings[0]);
    assert_eq!(listings[3]["capabilities"], serde_json::json!(["/pointcloud/downsample/v1"]));
}

#[tokio::test]
async fn hundreds_of_plugins_load_quickly() {
    let folder = Folder::new();
    let count = 300;
    many(&folder, count);
    let began = Instant::now();
    let rows = folder.rows(0).await;
    println!("{count} plugins: {:?}", began.elapsed());
    assert_eq!(rows.iter().filter(|row| row.starts_with("loaded")).count(), count);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    folder.invoke("/fixtures/many-299/v1", &[]).await.expect(0);
}

fn sdk() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../runner-sdk")
}

async fn new(folder: &Folder, args: &[&str]) -> Finished {
    let cli = Cli::new(&["plugins", "new"]).dir(folder.root());
    args.iter().fold(cli, |cli, arg| cli.arg(*arg)).run().await
}

#[tokio::test]
async fn new_plugin_without_sdk_is_an_error() {
    let folder = Folder::new();
    let output = new(&folder, &["line-count"]).await.expect(2);
    let wanted = "error: runner-sdk is not published yet, so cargo cannot find it; name a copy with --sdk PATH";
    assert!(output.stderr.starts_with(wanted) && output.stderr.lines().count() == 1, "{}", output.stderr);
    assert!(!folder.root().join("line-count").exists());
}

#[tokio::test]
async fn new_plugin_builds_and_runs_a_task() {
    let folder = Folder::new();
    let sdk = sdk();
    let output = new(&folder, &["line-count", "--sdk", &sdk.to_string_lossy()]).await.expect(0);
    assert_eq!(output.stdout.lines().count(), 4, "{}", output.stdout);
    assert_eq!(output.stderr, "next: cd line-count && cargo test && cargo build --release");
    let dir = folder.root().join("line-count");

    let tested = fixtures::cargo(&dir, &["test"]);
    assert!(tested.contains("2 passed"), "{tested}");
    fixtures::cargo(&dir, &["build"]);
    folder.put("libline_count.so", &fixtures::built("line_count"));
    std::fs::write(folder.root().join("in.txt"), "one\ntwo\n").expect("the folder is writable");
    folder.invoke("/line-count/v1", &["--input", "in.txt"]).await.expect(0);
    assert_eq!(folder.output("lines.txt"), b"2 input-0\n");
}

#[tokio::test]
async fn new_plugin_needs_name_folder_and_sdk() {
    let folder = Folder::new();
    let sdk = sdk().to_string_lossy().into_owned();
    for name in ["", "Big", "a b", "../up", "fn", "a\nb"] {
        let output = new(&folder, &[name, "--sdk", &sdk]).await.expect(2);
        assert_eq!(output.stderr.lines().count(), 1, "{name:?}: {}", output.stderr);
        assert!(output.stderr.contains("cannot be the name of a plugin"), "{name:?}: {}", output.stderr);
    }
    let output = new(&folder, &["mine", "--dir", "plugins", "--sdk", "plugins"]).await.expect(2);
    assert!(output.stderr.contains("holds no runner-sdk"), "{}", output.stderr);
    folder.write("something", "here");
    let output = new(&folder, &["mine", "--dir", "plugins", "--sdk", &sdk]).await.expect(2);
    assert!(output.stderr.contains("exists and is not an empty folder"), "{}", output.stderr);
    assert_eq!(output.stderr.lines().count(), 1);
    let output = new(&folder, &["mine", "--dir", "plugins/something/deep/er", "--sdk", &sdk]).await.expect(2);
    let blocked =
        "error: plugins/something/deep/er: expected a folder, found a file at plugins/something; name another path";
    assert_eq!(output.stderr, blocked);
    assert!(!folder.root().join("mine").exists());
}

#[test]
fn plugin_with_panic_abort_does_not_compile() {
    let output = fixtures::refused("aborts");
    let sentence = "runner-sdk catches panics at the plugin's boundary, which panic = \"abort\" makes impossible; remove it from the profile";
    assert!(output.contains(&format!("error: {sentence}")), "{output}");
}

#[test]
fn second_export_runner_does_not_compile() {
    let output = fixtures::refused("exports-twice");
    let sentence = "the name `a_library_has_one_export_runner` is defined multiple times";
    assert!(output.contains(sentence) && output.contains("export_runner!(Second);"), "{output}");
    assert_eq!(output.matches("error[").count(), output.matches(sentence).count(), "{output}");
}

#[tokio::test]
async fn plugins_list_strict_exits_4_on_refused_plugin() {
    let folder = Folder::with_a_good_one();
    folder.cli(&["plugins", "list", "--strict"]).run().await.expect(0);
    folder.write("bad.so", "no library");
    folder.cli(&["plugins", "list"]).run().await.expect(0);
    let ended = folder.cli(&["plugins", "list", "--strict"]).run().await.expect(4);
    assert_eq!(ended.stdout.lines().count(), 2, "{}", ended.stdout);
}

#[tokio::test]
async fn plugins_list_with_few_open_files_exits_75() {
    let folder = Folder::with_a_good_one();
    // A second plugin needs more files.
    std::fs::copy(folder.path("good.so"), folder.path("second.so")).expect("a copy");
    for (limit, need) in [(4, 32), (13, 32), (39, 40)] {
        let ended = folder.cli(&["plugins", "list"]).open_files(limit, limit).run().await.expect(75);
        let wanted = format!("only {limit} files may be open, the node needs at least {need}");
        assert!(ended.stderr.contains(&wanted), "{}", ended.stderr);
        assert_eq!(ended.stdout, "");
    }
}

#[tokio::test]
async fn mistyped_capability_gets_a_suggestion() {
    let folder = Folder::with_a_good_one().usual_logs();
    let ended = folder.invoke("/fixtures/goood/v1", &[]).await.expect(2);
    let wanted =
        "error: no plugin serves /fixtures/goood/v1; these do: /fixtures/good/v1, did you mean /fixtures/good/v1?";
    assert_eq!(ended.stderr, wanted);
}

#[tokio::test]
async fn world_writable_plugins_are_refused_unless_pinned() {
    let mode = |path: &Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("this user owns it");
    };
    let mut folder = Folder::with_a_good_one();
    let (file, plugins) = (folder.path("good.so"), folder.root().join("plugins"));
    let refused = |path: &Path, mode: &str| {
        let shown = path.display();
        format!(
            "refused good.so everyone may write to {shown} (mode {mode}), so anyone may change the plugin; \
             run chmod o-w {shown}, or pin the plugin by sha256 in plugins.toml"
        )
    };
    mode(&file, 0o666);
    assert_eq!(row(&folder, 4, "good.so").await, refused(&file, "0666"));
    mode(&file, 0o644);
    mode(&plugins, 0o777);
    assert_eq!(row(&folder, 4, "good.so").await, refused(&plugins, "0777"));
    // The folder of a link, and the folder of the linked file.
    let link = folder.root().join("link.so");
    std::os::unix::fs::symlink(&file, &link).expect("a link");
    let ended = Cli::new(&["plugins", "list", "--plugins"]).arg(&link).run().await.expect(4);
    assert!(ended.stdout.contains(&format!("everyone may write to {}", plugins.display())), "{}", ended.stdout);
    // In a folder with the sticky bit, no other user can replace the file.
    mode(&plugins, 0o1777);
    assert_eq!(row(&folder, 0, "good.so").await, "loaded good.so /fixtures/good/v1");

    mode(&plugins, 0o777);
    mode(&file, 0o666);
    folder.plugins_file(&format!("[[plugin]]\nfile = \"good.so\"\nsha256 = \"{}\"\n", sha256(&file)));
    assert_eq!(row(&folder, 0, "good.so").await, "loaded good.so /fixtures/good/v1");
    folder.plugins_file("");
    let allowed = folder.cli(&["plugins", "list"]).set("ALLOW_WRITABLE_PLUGINS", "true").set("RUST_LOG", "warn");
    let ended = allowed.run().await.expect(0);
    assert!(ended.stderr.contains("event=\"plugin.writable\""), "{}", ended.stderr);
    assert!(ended.stdout.starts_with("loaded "), "{}", ended.stdout);

    mode(&plugins, 0o775);
    mode(&file, 0o664);
    let ended = folder.cli(&["plugins", "list"]).set("RUST_LOG", "warn").run().await.expect(0);
    assert!(ended.stderr.contains("a group may change this plugin"), "{}", ended.stderr);
    mode(&plugins, 0o755);
    mode(&file, 0o644);
    let ended = folder.cli(&["plugins", "list"]).set("RUST_LOG", "warn").run().await.expect(0);
    assert_eq!(ended.stderr, "");
}
