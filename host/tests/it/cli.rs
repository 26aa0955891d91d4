//! The commands besides `run`, as people and scripts use them.

use std::path::Path;

use http::Request;
use runner_host::transport::{self, Client};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{
    EVENT_LIMIT, fixtures,
    folder::Folder,
    node::{Cli, Process},
    within,
};

/// The SDK's folder, for `plugins new`.
const SDK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../runner-sdk");

/// A folder to work in, with plugins where they are looked for by default.
pub(crate) fn workplace(libraries: &[std::path::PathBuf]) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let plugins = dir.path().join("plugins");
    std::fs::create_dir(&plugins).expect("the folder is writable");
    for library in libraries {
        std::fs::copy(library, plugins.join(library.file_name().expect("a name"))).expect("the library is copied");
    }
    dir
}

fn invoke(dir: &Path, capability: &str) -> Cli {
    Cli::new(&["invoke", capability]).dir(dir).set("TMPDIR", dir.to_string_lossy())
}

#[tokio::test]
async fn invoke_runs_runner_and_writes_artifacts() {
    let dir = workplace(&[fixtures::hello()]);
    std::fs::write(dir.path().join("who.txt"), "reader").expect("the folder is writable");
    let ended = invoke(dir.path(), "/examples/hello/v1").arg("--input").arg("who.txt").run().await.expect(0);
    assert_eq!(ended.stdout, "out/outputs/hello.bin");
    assert_eq!(std::fs::read(dir.path().join("out/outputs/hello.bin")).expect("an artifact"), b"hello, reader");
    assert!(ended.stderr.contains("progress {\"status\":\"finished\"}"), "{}", ended.stderr);
    assert!(ended.stderr.contains("event    {"), "{}", ended.stderr);

    let ended = invoke(dir.path(), "/examples/hello/v1").arg("--out").arg("elsewhere").arg("-o").arg("json");
    let ended = ended.run().await.expect(0);
    let row: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&row["path"], &row["data_type"]), (&json!("elsewhere/outputs/hello.bin"), &json!("bin_data")));
    assert_eq!(std::fs::read(dir.path().join("elsewhere/outputs/hello.bin")).expect("an artifact"), b"hello, ");
}

#[tokio::test]
async fn invoke_failure_is_one_line_and_exit_1() {
    let dir = workplace(&[fixtures::zoo()]);
    let ended = invoke(dir.path(), "/fixtures/fail/v1").run().await.expect(1);
    assert!(ended.stderr.contains("cloud not written: shard 3 not written: disk full"), "{}", ended.stderr);
    let ended = invoke(dir.path(), "/fixtures/panic/v1").run().await.expect(1);
    assert!(ended.stderr.contains("boom 42"), "{}", ended.stderr);
}

#[tokio::test]
async fn invoke_obeys_the_memory_budget() {
    let dir = workplace(&[fixtures::echo()]);
    std::fs::write(dir.path().join("large.bin"), vec![7; 4 << 20]).expect("the folder is writable");
    let echo = |budget| {
        let command = invoke(dir.path(), "/examples/echo-bytes/v1").arg("--input").arg("large.bin");
        command.set("MEMORY_BUDGET", budget).set("RUST_LOG", "").run()
    };
    let refused = echo("3MiB").await.expect(1);
    assert!(
        refused.stderr.contains("4194304 bytes do not fit into MEMORY_BUDGET, 3145728 bytes"),
        "{}",
        refused.stderr
    );
    assert_eq!(echo("30MiB").await.expect(0).stdout, "out/echo-0.bin");
}

#[tokio::test]
async fn interrupt_cancels_invoked_runner() {
    let dir = workplace(&[fixtures::zoo()]);
    let process = invoke(dir.path(), "/fixtures/slow/v1").start();
    process.stderr_line(|line| line.contains("{\"started\":true}")).await;
    process.signal(Signal::INT);
    assert_eq!(process.wait().await, 3, "{}", process.log());
    assert_eq!(process.stderr().last().map(String::as_str), Some("cancelled"));
}

#[tokio::test]
async fn invoke_used_wrongly_says_what_was_expected() {
    let dir = workplace(&[fixtures::hello()]);
    let ended = invoke(dir.path(), "/no/such/v1").set("RUST_LOG", "").run().await.expect(2);
    assert_eq!(ended.stderr, "error: no plugin serves /no/such/v1; these do: /examples/hello/v1");
    let ended = invoke(dir.path(), "/examples/hello/v1").arg("--meta").arg("{").run().await.expect(2);
    assert!(ended.stderr.contains("--meta: expected JSON"), "{}", ended.stderr);
    let ended = invoke(dir.path(), "/examples/hello/v1").arg("--input").arg("missing.bin").run().await.expect(2);
    assert!(ended.stderr.contains("--input missing.bin"), "{}", ended.stderr);
    invoke(dir.path(), "no slash").run().await.expect(2);
}

#[tokio::test]
async fn config_show_prints_origins_and_masks_secrets() {
    let key = "ab".repeat(32);
    let cli = |args: &[&str]| {
        Cli::new(args)
            .set("SECP256K1_PRIVHEX", key.as_str())
            .set("REG_SECRET", "not-to-be-seen")
            .set("MAX_CONCURRENCY", "3")
            .set("DMS_BASE_URL", "https://plane.example/v1")
    };
    let shown = cli(&["config", "show", "--http-bind", "127.0.0.1:1", "-o", "json"]).run().await.expect(0);
    let rows: Value = serde_json::from_str(&shown.stdout).expect("JSON");
    let row = |value: Value, origin: &str| json!({ "value": value, "origin": origin });
    assert_eq!(rows["MAX_CONCURRENCY"], row(json!("3"), "environment"));
    assert_eq!(rows["HTTP_BIND"], row(json!("127.0.0.1:1"), "flag"));
    assert_eq!(rows["DRAIN_TIMEOUT"], row(json!("30s"), "default"));
    assert_eq!(rows["DDS_BASE_URL"], row(Value::Null, "unset"));
    assert_eq!(rows["REG_SECRET"], row(json!("********"), "environment"));
    let text = cli(&["config", "show"]).run().await.expect(0);
    assert!(text.stdout.lines().any(|line| line.starts_with("MAX_CONCURRENCY") && line.ends_with("environment")));
    for output in [&shown, &text] {
        assert!(!output.stdout.contains(&key) && !output.stdout.contains("not-to-be-seen"), "{}", output.stdout);
    }
}

#[tokio::test]
async fn config_check_reports_all_mistakes() {
    let ended = Cli::new(&["config", "check", "--max-concurrency", "none"]).run().await.expect(78);
    assert_eq!(ended.stderr.lines().filter(|line| line.starts_with("error: ")).count(), 5, "{}", ended.stderr);
    let complete = Cli::new(&["config", "check"])
        .set("DMS_BASE_URL", "https://plane.example/v1")
        .set("DDS_BASE_URL", "https://dds.example")
        .set("REG_SECRET", "s")
        .set("SECP256K1_PRIVHEX", "ab".repeat(32));
    let ended = complete.run().await.expect(0);
    assert_eq!(ended.stdout, "the configuration is complete");
    let ended = Cli::new(&["config", "check", "--set", "MAX_CONCURENCY=3"]).run().await.expect(78);
    assert!(ended.stderr.contains("did you mean MAX_CONCURRENCY?"), "{}", ended.stderr);
    let ended = Cli::new(&["config", "check", "--set", "REG_SECRET=visible"]).run().await.expect(78);
    assert!(ended.stderr.contains("use the environment") && !ended.stderr.contains("visible\n"), "{}", ended.stderr);
}

#[tokio::test]
async fn completions_and_help_name_every_command() {
    let ended = Cli::new(&["completions", "bash"]).run().await.expect(0);
    assert!(ended.stdout.contains("_runner__host()") && ended.stdout.contains("--plugins-file"), "{}", ended.stdout);
    let help = Cli::new(&["--help"]).run().await.expect(0);
    for command in ["run", "dev", "submit", "invoke", "cancel", "plugins", "config", "outbox", "completions"] {
        assert!(help.stdout.lines().any(|line| line.trim_start().starts_with(command)), "{command}: {}", help.stdout);
    }
    let help = Cli::new(&["run", "--help"]).run().await.expect(0);
    assert!(help.stdout.contains("POLL_BACKOFF_MS_MAX") && help.stdout.contains("[default: 30000]"), "{}", help.stdout);
}

#[tokio::test]
async fn wrong_flags_get_suggestions() {
    for (args, wanted) in [
        (&["run", "--plugin", "x"][..], "'--plugins'"),
        (&["dev", "--lease-tll", "3s"], "'--lease-ttl'"),
        (&["invok"], "'invoke'"),
        (&["config", "shw"], "'show'"),
        (&["dev", "--lease-ttl", "soon"], "expected a duration above 0 and of at most a year, such as 90s"),
        (&["dev", "--lease-ttl", "0"], "expected a duration above 0 and of at most a year, such as 90s"),
        (
            &["submit", "/a/b/v1", "--timeout", "0s"],
            "'--timeout <TIME>': expected a duration above 0 and of at most a year, such as 90s",
        ),
        (&["submit", "/a/b/v1", "--timeout=-1s"], "expected a duration above 0 and of at most a year, such as 90s"),
        (
            &["submit", "hello"],
            "'hello' for '[CAPABILITY]': capability \"hello\" does not begin with /, expected a name such as /examples/",
        ),
        (&["submit", "/a", "--timeout", "-1s"], "expected a duration above 0 and of at most a year, such as 90s"),
        (&["dev", "--lease-ttl", "1e18"], "expected a duration above 0 and of at most a year, such as 90s"),
        (&["submit", "/a", "--timeout", "18446744073709551616"], "expected a duration above 0 and of at most a year"),
        (&["submit", "/a", "--count", "-1"], "-1 is not in 1..=1000000"),
        (&["submit", "/a", "--attempts", "18446744073709551616"], "'--attempts <N>'"),
        (&["dev", "--leases-per-node", "0"], "expected a whole number above 0"),
        (&["dev", "--leases-per-node", "-1"], "expected a whole number above 0"),
        (&["dev", "--port", "-1"], "-1 is not in 0..=65535"),
        (&["cancel", "a b"], "'a b' for '<TASK>': a task id has 1 to 128 "),
        (&["cancel", "a", "--plane", "A"], "'A' for '--plane <NAME>': the name of a control plane has 1 to 64 "),
        (&["outbox", "drop", "a b"], "'a b' for '[TASK]...': a task id has 1 to 128 "),
        (&["submit", "/a", "--domain", "x"], "'x' for '--domain <UUID>': expected an id such as 00000000-"),
        (
            &["submit", "/"],
            "has an empty part between slashes or at its end, expected a name such as /examples/hello/v1",
        ),
        (&["submit", "/a//v1"], "has an empty part between slashes or at its end"),
        (&["submit", "/a/v1/"], "has an empty part between slashes or at its end"),
        (&["submit", "/a b"], "holds white space"),
        (&["invoke", "hello"], "does not begin with /, expected a name such as /examples/hello/v1"),
    ] {
        let ended = Cli::new(args).run().await.expect(2);
        assert!(ended.stderr.contains(wanted), "{args:?}: {}", ended.stderr);
    }
}

/// `export NAME=VALUE` lines of a greeting.
pub(crate) fn exports(process: &Process) -> Vec<(String, String)> {
    let lines = process.stdout();
    let pairs = lines.iter().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

pub(crate) async fn call(request: http::request::Builder, body: &Value) -> Value {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let request = request.header("content-type", "application/json").body(transport::full(body)).expect("a request");
    let answer =
        Client::new(transport::Config::default()).call(request, EVENT_LIMIT).await.expect("the dev server answers");
    assert!(answer.status.is_success(), "{}", answer.excerpt());
    answer.json().expect("JSON")
}

/// Runs a hello job on the dev server at `base` over HTTP.
async fn hello(base: &str, log: impl Fn() -> String) {
    let dev_server = call(Request::get(format!("{base}/dev/v1/world")), &Value::Null).await;
    let (dms, grant) = (dev_server["dms"].as_str().expect("a URL"), dev_server["grant"].as_str().expect("a grant"));
    let bearer = format!("Bearer {grant}");
    let task = json!({ "label": "one", "stage": "one", "capability": "/examples/hello/v1" });
    let job = json!({ "domain_id": dev_server["domain_id"], "label": "cli", "tasks": [task] });
    let job = call(Request::post(format!("{dms}/jobs")).header("authorization", &bearer), &job).await;
    let job = format!("{dms}/jobs/{}", job["job_id"].as_str().expect("an id"));
    let ended = async {
        loop {
            let view = call(Request::get(&job).header("authorization", &bearer), &Value::Null).await;
            if matches!(view["job"]["status"].as_str(), Some("completed" | "failed")) {
                return view;
            }
            // HTTP has no event for the end of a job.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let view = within("the end of a job", log, ended).await;
    assert_eq!(view["job"]["status"], "completed", "{view:#}");
}

#[tokio::test]
async fn node_joins_dev_server_with_printed_exports() {
    let dir = workplace(&[fixtures::hello()]);
    let dev = Cli::new(&["dev", "--no-node", "--port", "0"]).dir(dir.path()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let exports = exports(&dev);
    let value = |name: &str| exports.iter().find(|pair| pair.0 == name).map(|pair| pair.1.clone());
    let base = value("RUNNER_HOST_DEV").expect("where jobs come from");
    let node = exports.iter().fold(Cli::new(&["run"]).dir(dir.path()), |node, (name, value)| node.set(name, value));
    let node = node.set("SCRATCH_DIR", dir.path().join("scratch").to_string_lossy());
    let node = node.set("STATE_DIR", dir.path().join("state").to_string_lossy()).start();
    node.stderr_line(|line| line.contains("\"node.leasing\"")).await;
    hello(&base, || node.log()).await;
    for process in [&node, &dev] {
        process.signal(Signal::TERM);
        assert_eq!(process.wait().await, 0, "{}", process.log());
    }
}

#[tokio::test]
async fn dev_starts_services_and_a_node() {
    let dir = workplace(&[fixtures::hello()]);
    let dev = Cli::new(&["dev", "--port", "0"]).dir(dir.path()).set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let table = dev.stdout().join("\n");
    assert!(table.contains("all data is deleted at the end"), "{table}");
    assert!(dev.stdout().iter().any(|line| line.starts_with("serving") && line.ends_with("/examples/hello/v1")));
    let exports = exports(&dev);
    let base = &exports.iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    hello(base, || dev.log()).await;
    let dev_server = call(Request::get(format!("{base}/dev/v1/world")), &Value::Null).await;
    assert_eq!(dev_server["nodes"].as_array().map(Vec::len), Some(1), "{dev_server}");
    dev.signal(Signal::INT);
    assert_eq!(dev.wait().await, 0, "{}", dev.log());
    // Logs are text, and data is on the other stream.
    assert!(dev.stderr().iter().all(|line| !line.starts_with('{')), "{}", dev.log());
}

#[tokio::test]
async fn submit_finds_dev_server_and_downloads_artifacts() {
    let dir = workplace(&[fixtures::hello(), fixtures::zoo()]);
    let dev = Cli::new(&["dev", "--port", "0"]).dir(dir.path()).set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let exports = exports(&dev);
    let base = exports.iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1.clone();
    let submit = |capability: &str| {
        Cli::new(&["submit", capability, "--attempts", "1"]).dir(dir.path()).set("RUNNER_HOST_DEV", base.as_str())
    };
    std::fs::write(dir.path().join("who.txt"), "reader").expect("the folder is writable");
    let ended = submit("/examples/hello/v1").arg("--input").arg("who.txt").arg("--wait").arg("--out").arg("brought");
    let ended = ended.run().await.expect(0);
    assert_eq!(ended.stdout, "brought/outputs/hello.bin");
    assert_eq!(std::fs::read(dir.path().join("brought/outputs/hello.bin")).expect("brought"), b"hello, reader");
    let ended = submit("/examples/hello/v1").arg("--count").arg("2").arg("--wait").arg("-o").arg("json");
    let ended: Value = serde_json::from_str(&ended.run().await.expect(0).stdout).expect("JSON");
    assert_eq!(ended["tasks"].as_array().map(Vec::len), Some(2), "{ended}");
    let ended = submit("/fixtures/fail/v1").arg("--wait").run().await.expect(1);
    assert!(ended.stderr.contains("runner failed: cloud not written"), "{}", ended.stderr);
    let ended = submit("/nobody/serves-this/v1")
        .set("RUST_LOG", "")
        .arg("--wait")
        .arg("--timeout")
        .arg("2s")
        .run()
        .await
        .expect(5);
    assert!(ended.stderr.contains("the job continues"), "{}", ended.stderr);
    let waits = "no node serves /nobody/serves-this/v1 at the moment; the job waits for one";
    assert_eq!(ended.stderr.lines().next(), Some(waits), "it is printed at once");
    let ended = submit("/exmaples/hello/v1").set("RUST_LOG", "").run().await.expect(0);
    let suggests =
        "no node serves /exmaples/hello/v1 at the moment; the job waits for one, did you mean /examples/hello/v1?";
    assert_eq!(ended.stderr, suggests);
    dev.signal(Signal::TERM);
    assert_eq!(dev.wait().await, 0, "{}", dev.log());
    let ended = submit("/examples/hello/v1").run().await.expect(75);
    assert!(ended.stderr.contains("start runner-host dev"), "{}", ended.stderr);
}

#[tokio::test]
async fn submit_without_connection_prints_json() {
    for what in [&["/examples/hello/v1"][..], &["--cancel", "6f1e9a3c-52f3-4b2e-9d0a-0c8f3f1d7a11"]] {
        let line = [&["submit"], what, &["-o", "json", "--dev", "http://127.0.0.1:1"]].concat();
        let ended = Cli::new(&line).run().await.expect(75);
        let mut printed: Value = serde_json::from_str(&ended.stdout).expect("JSON");
        let reason = printed["reason"].take();
        assert!(reason.as_str().is_some_and(|reason| ended.stderr.ends_with(reason)), "{reason} {}", ended.stderr);
        let expected = json!({
            "status": "unreachable", "reason": null, "during": "connect", "jobs": [], "unanswered": false, "tasks": [],
        });
        assert_eq!(printed, expected);
    }
}

#[tokio::test]
async fn artifacts_with_unusable_paths_are_stored_by_id() {
    let dir = workplace(&[fixtures::zoo()]);
    let dev = Cli::new(&["dev", "--port", "0"]).dir(dir.path()).set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let base = exports(&dev).into_iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    std::fs::create_dir_all(dir.path().join("brought/folder")).expect("the folder is writable");
    let long = format!("long/{}", "x".repeat(300));
    let cases = [
        ("a", None),
        ("a/b", Some("leads through an existing file")),
        ("a/b/c", Some("leads through an existing file")),
        ("d/e", None),
        ("folder", Some("is the path of an existing folder")),
        ("", Some("names no file")),
        (&*long, Some("has a name that is too long for a file")),
        ("C:x", Some("contains a character that is invalid in file names")),
        ("last", None),
    ];
    let puts = cases.map(|(path, _)| json!({ "path": path, "text": path }));
    let submit =
        Cli::new(&["submit", "/fixtures/puts/v1", "--wait", "--out", "brought", "-o", "json", "--attempts", "1"]);
    let submit = submit.arg("--meta").arg(json!({ "puts": puts }).to_string()).dir(dir.path());
    let ended = submit.set("RUNNER_HOST_DEV", base.as_str()).run().await.expect(0);
    let printed: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let artifacts = printed["tasks"][0]["artifacts"].as_array().expect("a list");
    assert_eq!(artifacts.len(), cases.len() + 1, "{printed:#}");
    let notes: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("; stored as ")).collect();
    assert_eq!(notes.len(), cases.iter().filter(|(_, why)| why.is_some()).count(), "{}", ended.stderr);
    for (path, why) in cases {
        let artifact = artifacts.iter().find(|one| one["logical_path"] == *path).expect(path);
        let (at, id) = (artifact["path"].as_str().expect("a path"), artifact["id"].as_str().expect("an id"));
        assert_eq!(std::fs::read(dir.path().join(at)).expect(path), path.as_bytes());
        match why {
            None => assert_eq!(at, format!("brought/{path}")),
            Some(why) => {
                assert_eq!(at, format!("brought/{id}"));
                let note = format!("artifact path {path:?} {why}; stored as {id}");
                assert!(notes.contains(&&*note), "{note}\n{}", ended.stderr);
            }
        }
    }
    stopped(&dev).await;
}

/// Texts of a runner are printed on a terminal.
#[tokio::test]
async fn runner_texts_cannot_control_the_terminal() {
    let dir = workplace(&[fixtures::zoo()]);
    std::fs::write(dir.path().join("plugins/a\n\u{1b}[2J.so"), "no library").expect("the folder is writable");
    let dev = Cli::new(&["dev", "--port", "0"]).dir(dir.path()).set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let base = exports(&dev).into_iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    let bad = "boom \u{1b}[31mred\u{9b}0m \u{202e}back\u{7f}";
    let bad_path = format!("{bad}\nsecond line");
    let shown = "boom \u{fffd}[31mred\u{fffd}0m \u{fffd}back\u{fffd}";
    let shown_path = format!("{shown}\u{fffd}second line");
    let puts = |put: Value| json!({ "puts": [put] }).to_string();
    let (fails, works) = (puts(json!({ "path": "x", "file": bad })), puts(json!({ "path": bad_path, "text": "x" })));
    let submit = |meta: &str| {
        let submit = Cli::new(&["submit", "/fixtures/puts/v1", "--wait", "--attempts", "1", "--meta", meta]);
        submit.dir(dir.path()).set("RUNNER_HOST_DEV", base.as_str())
    };
    let invoke = |meta: &str| invoke(dir.path(), "/fixtures/puts/v1").arg("--meta").arg(meta);
    let list = Cli::new(&["plugins", "list"]).dir(dir.path());

    let mut all = Vec::new();
    for (command, code, wanted) in [
        (submit(&fails), 1, format!("failed: runner failed: no file of kind {shown}")),
        (submit(&works), 0, shown_path.clone()),
        (submit(&works).arg("--out").arg("on"), 0, format!("on/{shown_path}")),
        (invoke(&fails), 1, format!("no file of kind {shown}")),
        (invoke(&works), 0, format!("out/{shown_path}")),
        (list, 0, "refused  a\u{fffd}\u{fffd}[2J.so".to_owned()),
    ] {
        let ended = command.run().await.expect(code);
        assert!(ended.stdout.contains(&wanted) || ended.stderr.contains(&wanted), "{wanted}: {ended:?}");
        all.push(ended);
    }
    for ended in &all {
        let text = format!("{}{}", ended.stdout, ended.stderr);
        let raw = text.find(|c: char| (c.is_control() && c != '\n') || c == '\u{202e}');
        assert_eq!(raw, None, "{ended:?}");
        assert!(!text.lines().any(|line| line.starts_with("second ")), "{ended:?}");
    }
    // JSON has the original text.
    let ended = submit(&fails).arg("-o").arg("json").run().await.expect(1);
    let printed: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!(printed["tasks"][0]["reason"], format!("runner failed: no file of kind {bad}"));
    let ended = submit(&works).arg("-o").arg("json").run().await.expect(0);
    let printed: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!(printed["tasks"][0]["artifacts"][0]["logical_path"], bad_path);
    let ended = invoke(&works).arg("-o").arg("json").run().await.expect(0);
    let row: Value = serde_json::from_str(ended.stdout.lines().next().expect("a row")).expect("JSON");
    assert_eq!(row["path"], format!("out/{bad_path}"));
    // The text log has no control characters either.
    let refused =
        |line: &str| line.contains("plugin.refused") && line.contains("file=./plugins/a\u{fffd}\u{fffd}[2J.so ");
    dev.stderr_line(refused).await;
    assert_eq!(dev.log().find(|c: char| c.is_control() && c != '\n'), None, "{}", dev.log());
    stopped(&dev).await;
}

#[tokio::test]
async fn submit_timeout_ends_every_stage() {
    let dir = workplace(&[fixtures::hello()]);
    let hang = |endpoint: &str| format!("[[fault]]\nendpoint = \"{endpoint}\"\nclient = \"submit\"\nkind = \"hang\"\n");
    let faults = format!("{}count = 1\n{}count = 1\n{}", hang("create"), hang("jobs"), hang("by_id"));
    std::fs::write(dir.path().join("faults.toml"), faults).expect("the folder is writable");
    std::fs::write(dir.path().join("who.txt"), "reader").expect("the folder is writable");
    let dev = Cli::new(&["dev", "--port", "0", "--faults", "faults.toml"]).dir(dir.path());
    let dev = dev.set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let exports = exports(&dev);
    let base = &exports.iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    let submit = || Cli::new(&["submit", "/examples/hello/v1"]).dir(dir.path()).set("RUNNER_HOST_DEV", base.as_str());
    let ended = submit().arg("--input").arg("who.txt").arg("--timeout").arg("1s").run().await.expect(5);
    assert!(ended.stderr.ends_with("stopped after 1s; no job was submitted"), "{}", ended.stderr);
    let ended = submit().arg("--timeout").arg("1s").run().await.expect(5);
    let output = "stopped after 1s; a job was sent and not answered; whether it was created is not known";
    assert!(ended.stderr.ends_with(output), "{}", ended.stderr);
    let ended = submit().arg("--wait").arg("--out").arg("brought").arg("--timeout").arg("5s").run().await.expect(5);
    let output = "stopped after 5s; the job has ended, not all artifacts were downloaded: ";
    assert!(ended.stderr.contains(output), "{}", ended.stderr);
    stopped(&dev).await;
}

/// The calls that a dev server got, by name, with their statuses.
async fn calls(base: &str) -> Vec<(String, u64)> {
    let seen = call(Request::get(format!("{base}/dev/v1/requests")), &Value::Null).await;
    let seen = seen["requests"].as_array().cloned().unwrap_or_default();
    let name = |one: &Value| one["endpoint"].as_str().map(str::to_owned);
    seen.iter().filter_map(|one| Some((name(one)?, one["status"].as_u64().expect("a status")))).collect()
}

#[tokio::test]
async fn interrupted_submit_aborts_upload_and_prints_json() {
    let dir = workplace(&[]);
    let hang = |endpoint: &str, count: u32| {
        format!("[[fault]]\nendpoint = \"{endpoint}\"\nclient = \"submit\"\nkind = \"hang\"\ncount = {count}\n")
    };
    std::fs::write(dir.path().join("faults.toml"), hang("part", 4) + &hang("abort", 1))
        .expect("the folder is writable");
    // Larger than one request may be; nothing of it is on the disk.
    let large = std::fs::File::create(dir.path().join("large.bin")).expect("the folder is writable");
    large.set_len(9 * 1024 * 1024).expect("the folder is writable");
    let (dev, exports) = dev_server(dir.path(), &["--faults", "faults.toml"]).await;
    let base = &exports.iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    let submit = || {
        let submit = Cli::new(&["submit", "/examples/hello/v1", "-o", "json"]);
        submit.dir(dir.path()).set("RUNNER_HOST_DEV", base.as_str())
    };
    let aborts = async |status: u64| {
        let all = calls(base).await;
        all.iter().filter(|(name, output)| name == "abort" && *output == status).count()
    };
    // The abort hangs as well: the command ends all the same.
    let began = std::time::Instant::now();
    let ended = submit().arg("--input").arg("large.bin").arg("--timeout").arg("1s").run().await.expect(5);
    assert!(began.elapsed() < std::time::Duration::from_secs(8), "{:?}", began.elapsed());
    let output: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let wanted = json!({
        "status": "timed_out", "reason": "stopped after 1s", "during": "upload", "jobs": [], "unanswered": false,
        "tasks": [],
    });
    assert_eq!(output, wanted);
    submit().arg("--input").arg("large.bin").arg("--timeout").arg("1s").run().await.expect(5);
    assert_eq!(aborts(200).await, 1, "{:?}", calls(base).await);

    for (signal, parts) in [(Signal::INT, 3), (Signal::TERM, 4)] {
        let process = submit().set("RUST_LOG", "").arg("--input").arg("large.bin").start();
        let begun = async {
            while calls(base).await.iter().filter(|(name, _)| name == "part").count() < parts {
                // The journal has no event over HTTP.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        within("a part that hangs", || process.log(), begun).await;
        process.signal(signal);
        assert_eq!(process.wait().await, 3, "{}", process.log());
        assert_eq!(process.stderr().last().map(String::as_str), Some("interrupted; no job was submitted"));
        let output: Value = serde_json::from_str(&process.stdout().join("\n")).expect("JSON");
        assert_eq!((&output["status"], &output["during"]), (&json!("interrupted"), &json!("upload")), "{output}");
        assert_eq!(aborts(200).await, parts - 1, "{:?}", calls(base).await);
    }

    let ended = submit().arg("--wait").arg("--timeout").arg("1s").run().await.expect(5);
    let output: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&output["status"], &output["during"]), (&json!("timed_out"), &json!("wait")), "{output}");
    let (jobs, task) = (output["jobs"].as_array().expect("jobs"), &output["tasks"][0]);
    assert_eq!((jobs.len(), &task["job_id"], &task["status"]), (1, &jobs[0], &json!("queued")), "{output}");
    stopped(&dev).await;
}

/// A dev server without a node that obeys these fault rules, and its address.
async fn faulty(dir: &Path, faults: &str) -> (Process, String) {
    std::fs::write(dir.join("faults.toml"), faults).expect("the folder is writable");
    let (dev, exports) = dev_server(dir, &["--faults", "faults.toml"]).await;
    let base = exports.into_iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    (dev, base)
}

/// What an author's GET below the dev server's address answers.
async fn ask(base: &str, path: impl Fn(&Value) -> String) -> Value {
    let dev_server = call(Request::get(format!("{base}/dev/v1/world")), &Value::Null).await;
    let bearer = format!("Bearer {}", dev_server["grant"].as_str().expect("a grant"));
    let request = Request::get(format!("{base}{}", path(&dev_server))).header("authorization", bearer);
    call(request.header("accept", "application/json"), &Value::Null).await
}

async fn jobs(base: &str) -> Vec<Value> {
    let listed = ask(base, |_| "/v1/jobs".to_owned()).await;
    listed["items"].as_array().expect("a list").clone()
}

#[tokio::test]
async fn submit_exits_75_when_the_dev_server_dies() {
    let dir = workplace(&[]);
    let (dev, base) = faulty(dir.path(), "").await;
    let submit = Cli::new(&["submit", "/lab/none/v1", "--wait", "-o", "json", "--timeout", "4s"]);
    let submit = submit.dir(dir.path()).set("RUNNER_HOST_DEV", base.as_str()).start();
    submit.stderr_line(|line| line.contains("no node serves")).await;
    dev.signal(Signal::KILL);
    dev.wait().await;
    assert_eq!(submit.wait().await, 75, "{}", submit.log());
    let last = submit.stderr().last().cloned().unwrap_or_default();
    assert!(last.starts_with("stopped after 4s; the control plane is unreachable ("), "{last}");
    assert!(
        last.contains("); whether the job continues is not known: ") && !last.contains("; the job continues: "),
        "{last}"
    );
    let output: Value = serde_json::from_str(&submit.stdout().join("\n")).expect("JSON");
    assert_eq!(
        (&output["status"], output["jobs"].as_array().map(Vec::len)),
        (&json!("unreachable"), Some(1)),
        "{output}"
    );
}

#[tokio::test]
async fn submit_exits_75_when_the_dev_server_hangs() {
    let dir = workplace(&[]);
    let (dev, base) = faulty(dir.path(), "[[fault]]\nendpoint = \"jobs\"\nkind = \"hang\"\nskip = 1").await;
    let submit = Cli::new(&["submit", "/lab/none/v1", "--wait", "--timeout", "4s"]);
    let ended = submit.dir(dir.path()).set("RUNNER_HOST_DEV", base.as_str()).run().await.expect(75);
    assert!(ended.stderr.contains("whether the job continues is not known: "), "{}", ended.stderr);
    stopped(&dev).await;
}

#[tokio::test]
async fn submit_cancel_cancels_a_job() {
    let dir = workplace(&[]);
    let (dev, base) = faulty(dir.path(), "").await;
    let submit = |args: &[&str]| {
        let submit = Cli::new(&[&["submit"], args].concat()).dir(dir.path());
        submit.set("RUNNER_HOST_DEV", &*base).set("RUST_LOG", "")
    };
    let create = async || submit(&["/lab/none/v1"]).run().await.expect(0).stdout;
    let status = async |id: &str| ask(&base, |_| format!("/v1/jobs/{id}")).await["job"]["status"].clone();

    let id = create().await;
    let ended = submit(&["--cancel", &id]).run().await.expect(0);
    assert_eq!((ended.stdout, status(&id).await), (format!("cancelled job {id}"), json!("canceled")));
    let id = create().await;
    let ended = submit(&["--cancel", &id, "-o", "json"]).run().await.expect(0);
    let output: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((output, status(&id).await), (json!({ "job_id": id, "status": "canceled" }), json!("canceled")));

    let nil = uuid::Uuid::nil().to_string();
    let ended = submit(&["--cancel", &nil]).run().await.expect(1);
    assert_eq!(ended.stderr, format!("error: the control plane knows no job {nil}"));
    submit(&["/lab/none/v1", "--cancel", &nil]).run().await.expect(2);
    submit(&[]).run().await.expect(2);
    stopped(&dev).await;
}

#[tokio::test]
async fn cancel_of_an_ended_job_is_one_clear_line() {
    let dir = workplace(&[fixtures::hello()]);
    std::fs::write(dir.path().join("who.txt"), "reader").expect("the folder is writable");
    let dev = Cli::new(&["dev", "--port", "0"]).dir(dir.path()).set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let base = exports(&dev).into_iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    let submit = |args: &[&str]| {
        let submit = Cli::new(&[&["submit"], args].concat()).dir(dir.path());
        submit.set("RUNNER_HOST_DEV", base.as_str()).set("RUST_LOG", "")
    };
    let args = ["/examples/hello/v1", "--input", "who.txt", "--wait", "-o", "json"];
    let said: Value = serde_json::from_str(&submit(&args).run().await.expect(0).stdout).expect("JSON");
    let id = said["tasks"][0]["job_id"].as_str().expect("an id");
    for form in ["text", "json"] {
        let ended = submit(&["--cancel", id, "-o", form]).run().await.expect(1);
        let wanted = format!("error: job {id} cannot be cancelled any more, its status is completed");
        assert_eq!((ended.stdout.as_str(), ended.stderr), ("", wanted), "{form}");
    }
    stopped(&dev).await;
}

#[tokio::test]
async fn submit_retries_transient_errors() {
    let dir = workplace(&[fixtures::hello()]);
    std::fs::write(dir.path().join("who.txt"), "reader").expect("the folder is writable");
    let rule = |endpoint: &str, kind: &str| {
        format!("[[fault]]\nendpoint = \"{endpoint}\"\nclient = \"submit\"\nkind = {kind}\ncount = 1\n")
    };
    let faults = [
        rule("info", "\"status\"\ncode = 503"),
        rule("create", "\"lost_answer\""),
        rule("jobs", "\"lost_answer\""),
        rule("by_id", "\"reset_body\""),
    ];
    std::fs::write(dir.path().join("faults.toml"), faults.concat()).expect("the folder is writable");
    let dev = Cli::new(&["dev", "--port", "0", "--faults", "faults.toml"]).dir(dir.path());
    let dev = dev.set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let base = exports(&dev).into_iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    let submit = Cli::new(&["submit", "/examples/hello/v1", "--input", "who.txt", "--wait", "--out", "brought"]);
    let ended = submit.dir(dir.path()).set("RUNNER_HOST_DEV", base.as_str()).run().await.expect(0);
    assert_eq!(std::fs::read(dir.path().join("brought/outputs/hello.bin")).expect("brought"), b"hello, reader");
    assert_eq!(ended.stderr.matches("; trying again").count(), faults.len(), "{}", ended.stderr);
    assert_eq!(jobs(&base).await.len(), 1, "a repeat creates no second job");
    let path =
        |dev_server: &Value| format!("/api/v1/domains/{}/data", dev_server["domain_id"].as_str().expect("an id"));
    let stored = ask(&base, path).await;
    assert_eq!(stored["data"].as_array().map(Vec::len), Some(2), "one input and one artifact: {stored}");
    stopped(&dev).await;
}

#[tokio::test]
async fn submit_repeats_no_lost_job_blindly() {
    let dir = workplace(&[]);
    let (dev, base) = faulty(dir.path(), "[[fault]]\nendpoint = \"jobs\"\nkind = \"lost_answer\"\ncount = 1").await;
    let dev_server = call(Request::get(format!("{base}/dev/v1/world")), &Value::Null).await;
    let word = |name: &str| dev_server[name].as_str().expect("text").to_owned();
    let (dms, domain, server) = (word("dms"), word("domain_id"), word("domain_server"));
    let submit = Cli::new(&["submit", "/lab/none/v1", "--dms", &dms, "--domain", &domain, "--domain-server", &server]);
    let ended = submit.arg("--token").arg(word("grant")).run().await.expect(75);
    assert!(ended.stderr.ends_with("whether it was created is not known"), "{}", ended.stderr);
    assert_eq!(jobs(&base).await.len(), 1, "the job was sent once");
    stopped(&dev).await;
}

#[tokio::test]
async fn faults_strike_nodes_alone_by_default() {
    let dir = workplace(&[]);
    std::fs::write(dir.path().join("who.txt"), "reader").expect("the folder is writable");
    let (dev, base) = faulty(dir.path(), "[[fault]]\nendpoint = \"any\"\nkind = \"reset\"").await;
    let submit = Cli::new(&["submit", "/lab/none/v1", "--input", "who.txt"]).dir(dir.path());
    let ended = submit.set("RUNNER_HOST_DEV", base.as_str()).run().await.expect(0);
    assert!(!ended.stderr.contains("trying again"), "{}", ended.stderr);
    stopped(&dev).await;
}

#[tokio::test]
async fn unusable_paths_are_reported_before_anything_is_sent() {
    let dir = workplace(&[fixtures::hello()]);
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("the folder is writable");
    write("file", "");
    write("two", "a\nb\n");
    let elsewhere = |more: &str| {
        format!(
            "submit /a --dms http://127.0.0.1:9/v1 --domain-server http://127.0.0.1:9 --domain {} {more}",
            uuid::Uuid::nil()
        )
    };
    let none = "No such file or directory (os error 2)";
    for (line, code, wanted) in [
        ("submit /a --input none".to_owned(), 2, format!("--input none: {none}")),
        ("submit /a --input plugins".to_owned(), 2, "--input plugins: expected a file, found a folder".to_owned()),
        (
            "submit /a --input /dev/null".to_owned(),
            2,
            "--input /dev/null: expected a file, found something else".to_owned(),
        ),
        (
            "submit /a --wait --out file/x".to_owned(),
            2,
            "--out file/x: expected a folder, found a file at file".to_owned(),
        ),
        ("submit /a --dev http://a..b".to_owned(), 2, "'--dev <URL>': expected a host of names".to_owned()),
        ("submit /a --dev here".to_owned(), 2, "'--dev <URL>': expected a base URL, such as https://".to_owned()),
        (elsewhere("--token-file none"), 2, format!("--token-file none: {none}")),
        (elsewhere("--token-file plugins"), 2, "--token-file plugins: expected a file, found a folder".to_owned()),
        (elsewhere("--token-file /dev/zero"), 2, "--token-file /dev/zero: expected a file, found a device".to_owned()),
        ("dev --faults /dev/zero".to_owned(), 78, "--faults /dev/zero: expected a file, found a device".to_owned()),
        (
            "plugins list --plugins-file /dev/zero".to_owned(),
            78,
            "--plugins-file /dev/zero: expected a file, found a device".to_owned(),
        ),
        (elsewhere("--token-file file"), 2, "--token-file file: expected one word of visible ASCII".to_owned()),
        (elsewhere("--token-file two"), 2, "--token-file two: expected one word of visible ASCII".to_owned()),
        ("invoke /examples/hello/v1 --input none".to_owned(), 2, format!("--input none: {none}")),
        (
            "invoke /examples/hello/v1 --input plugins".to_owned(),
            2,
            "--input plugins: expected a file, found a".to_owned(),
        ),
        (
            "invoke /examples/hello/v1 --out file".to_owned(),
            2,
            "--out file: expected a folder, found a file at file".to_owned(),
        ),
        (format!("plugins new x --dir /proc/x --sdk {SDK}"), 1, "cannot write /proc/x".to_owned()),
        ("dev --faults none".to_owned(), 78, format!("--faults none: {none}")),
        ("dev --config none".to_owned(), 78, format!("--config none: {none}")),
        ("dev --data file".to_owned(), 78, "--data file: expected a folder, found a file at file".to_owned()),
        ("plugins list --plugins-file none".to_owned(), 78, format!("--plugins-file none: {none}")),
        (
            "plugins list --plugins none".to_owned(),
            78,
            "plugins folder none does not exist; create it, or name".to_owned(),
        ),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let ended = Cli::new(&words).dir(dir.path()).run().await.expect(code);
        let first = ended.stderr.lines().next().unwrap_or_default();
        assert!(first.starts_with("error: ") && first.contains(&wanted), "{line}: {}", ended.stderr);
        assert!(ended.stdout.is_empty(), "{line}: {}", ended.stdout);
    }
}

/// A pipe whose reader closes after the first line.
#[tokio::test]
async fn closed_stdout_causes_no_panic() {
    let dir = workplace(&[fixtures::zoo(), fixtures::hello()]);
    for command in ["completions bash", "plugins list", "config show", "--help"] {
        let script = format!("'{}' {command} | head -1", env!("CARGO_BIN_EXE_runner-host"));
        let mut shell = std::process::Command::new("sh");
        shell.arg("-c").arg(script).current_dir(dir.path());
        let ended = tokio::task::spawn_blocking(move || shell.output());
        let ended = within(command, String::new, ended).await.expect("it does not panic").expect("a shell runs");
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(!stderr.contains("panicked"), "{command}: {stderr}");
        assert_eq!(String::from_utf8_lossy(&ended.stdout).lines().count(), 1, "{command}: {stderr}");
    }
}

#[tokio::test]
async fn invalid_utf8_in_arguments_is_reported() {
    let dir = workplace(&[]);
    let binary = env!("CARGO_BIN_EXE_runner-host");
    for (script, code, wanted) in [
        ("REG_SECRET=$(printf 'a\\377') '$0' config check", 78, "error: REG_SECRET: expected UTF-8, found other bytes"),
        ("STATE_DIR=$(printf '/a\\377') '$0' config check", 78, "error: STATE_DIR: expected UTF-8, found other bytes"),
        ("'$0' submit /$(printf 'a\\377')", 2, "error: invalid UTF-8 was detected in one or more arguments"),
        ("'$0' run --set X=$(printf 'a\\377')", 2, "error: invalid UTF-8 was detected in one or more arguments"),
        ("'$0' plugins list --plugins /$(printf 'a\\377')", 78, "error: plugins folder /a\u{fffd} does not exist"),
    ] {
        let mut shell = std::process::Command::new("sh");
        shell.arg("-c").arg(script.replace("$0", binary)).current_dir(dir.path());
        let ended = tokio::task::spawn_blocking(move || shell.output());
        let ended = within(script, String::new, ended).await.expect("it does not panic").expect("a shell runs");
        let stderr = String::from_utf8_lossy(&ended.stderr);
        assert!(stderr.lines().any(|line| line.starts_with(wanted)), "{script}: {stderr}");
        assert_eq!(ended.status.code(), Some(code), "{script}: {stderr}");
    }
}

#[tokio::test]
async fn json_shows_paths_that_are_not_utf8() {
    use std::os::unix::ffi::OsStrExt as _;
    let dir = workplace(&[fixtures::hello()]);
    let out = std::ffi::OsStr::from_bytes(b"o\xff");
    let wanted = json!("o\u{fffd}/outputs/hello.bin");
    let stored = || std::fs::read(dir.path().join(out).join("outputs/hello.bin")).expect("an artifact");

    let ended = invoke(dir.path(), "/examples/hello/v1").arg("-o").arg("json").arg("--out").arg(out);
    let ended = ended.run().await.expect(0);
    let row: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&row["path"], &stored()[..]), (&wanted, &b"hello, "[..]), "{}", ended.stderr);

    std::fs::remove_dir_all(dir.path().join(out)).expect("removed");
    let dev = Cli::new(&["dev", "--port", "0"]).dir(dir.path()).set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let base = exports(&dev).into_iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    let submit = Cli::new(&["submit", "/examples/hello/v1", "--wait", "-o", "json", "--out"]).arg(out);
    let ended = submit.dir(dir.path()).set("RUNNER_HOST_DEV", base).run().await.expect(0);
    let printed: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&printed["tasks"][0]["artifacts"][0]["path"], &stored()[..]), (&wanted, &b"hello, "[..]));
    stopped(&dev).await;
}

#[tokio::test]
async fn host_panic_blames_no_plugin() {
    let dir = workplace(&[fixtures::hello()]);
    let ended = invoke(dir.path(), "/examples/hello/v1").set("RUNNER_HOST_CRASH_AT", "panic:invoke.before-run");
    let ended = ended.run().await.expect(101);
    assert!(ended.stderr.contains("panic at invoke.before-run"), "{}", ended.stderr);
    assert!(ended.stderr.ends_with("error: runner-host has a bug and panicked; report the message above"));
    assert!(!ended.stderr.contains("a plugin ended the process"), "{}", ended.stderr);
}

#[tokio::test]
async fn dev_data_in_use_exits_75() {
    let dir = workplace(&[]);
    let (dev, _) = dev_server(dir.path(), &["--data", "kept"]).await;
    let second = Cli::new(&["dev", "--no-node", "--port", "0", "--data", "kept"]).dir(dir.path());
    let ended = second.run().await.expect(75);
    let wanted = "data folder kept is in use by another dev server; stop that one or name another folder";
    assert!(ended.stderr.ends_with(wanted) && ended.stderr.lines().count() == 1, "{}", ended.stderr);
    stopped(&dev).await;
}

/// Every user may create folders in the parent of the default folder.
#[tokio::test]
async fn temporary_folder_of_another_user_is_refused() {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
    let dir = workplace(&[fixtures::hello()]);
    let elsewhere = tempfile::tempdir().expect("a folder");
    let user = rustix::process::geteuid();
    let trap = dir.path().join(format!("runner-host-{}", user.as_raw()));
    let open = std::fs::Permissions::from_mode(0o777);
    let commands = [
        &["invoke", "/examples/hello/v1"][..],
        &["dev", "--port", "0", "--no-node"],
        &["config", "check"],
        &["run", "--set", "MAX_CONCURRENCY=1"],
    ];
    for (found, laid) in [("a link", 0), ("a folder that others can write to", 1), ("a folder of another user", 2)] {
        let _ = std::fs::remove_file(&trap).or_else(|_| std::fs::remove_dir(&trap));
        match laid {
            0 => symlink(elsewhere.path(), &trap).expect("the folder is writable"),
            1 => {
                std::fs::create_dir(&trap).expect("the folder is writable");
                std::fs::set_permissions(&trap, open.clone()).expect("ours");
            }
            // Only the superuser can give a folder away.
            _ if !user.is_root() => continue,
            _ => {
                std::fs::create_dir(&trap).expect("the folder is writable");
                chown(&trap, Some(65_534), None).expect("given away");
            }
        }
        for command in commands {
            let ended = Cli::new(command).dir(dir.path()).set("TMPDIR", dir.path().to_string_lossy());
            let ended = ended.set("HOME", dir.path().to_string_lossy()).run().await.expect(78);
            let wanted = format!(
                "error: SCRATCH_DIR: expected a folder of this user alone, found {found} at {}; have it removed, or set",
                trap.display()
            );
            assert!(ended.stderr.lines().any(|line| line.starts_with(&wanted)), "{command:?}: {}", ended.stderr);
        }
        assert_eq!(std::fs::read_dir(elsewhere.path()).expect("listed").count(), 0, "{found}");
    }
}

/// Stderr is a terminal here; other tests use a pipe.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn terminal_output_has_the_same_text() {
    let dir = workplace(&[fixtures::zoo()]);
    let binary = env!("CARGO_BIN_EXE_runner-host");
    for (command, code, wanted) in [
        ("plugins list", 0, "loaded   libzoo.so"),
        ("invoke /fixtures/fail/v1", 1, "error: failed: cloud not written"),
        ("config check", 78, "error: REG_SECRET is not set"),
        ("run --set LOG_FORMAT=text", 78, "error: REG_SECRET is not set"),
        ("submit /a/v1 --dev http://127.0.0.1:9", 75, "error: no dev server answers at http://127.0.0.1:9"),
    ] {
        let mut terminal = std::process::Command::new("script");
        terminal.args(["-q", "-e", "-c"]).arg(format!("'{binary}' {command}")).arg("/dev/null");
        terminal.current_dir(dir.path()).env("RUST_LOG", "info").env_remove("RUNNER_HOST_DEV");
        for name in ["REG_SECRET", "DDS_BASE_URL", "DMS_BASE_URL", "SECP256K1_PRIVHEX"] {
            terminal.env_remove(name);
        }
        let ended = tokio::task::spawn_blocking(move || terminal.output());
        let ended = within(command, String::new, ended).await.expect("it does not panic");
        let Ok(ended) = ended else {
            eprintln!("skipped: there is no script(1)");
            return;
        };
        let output = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert_eq!(ended.status.code(), Some(code), "{command}: {output}");
        assert!(output.contains(wanted) && !output.contains("tracing-subscriber"), "{command}: {output}");
    }
}

/// Streams that accept no bytes, such as a full disk or a closed pipe.
#[tokio::test]
async fn closed_stderr_causes_no_panic() {
    let dir = workplace(&[]);
    for (command, code) in [
        ("cancel x", 1),
        ("outbox list", 1),
        ("outbox drop 00000000-0000-0000-0000-000000000000", 1),
        ("plugins list", 0),
        ("plugins inspect plugins", 4),
        (concat!("plugins new x --sdk ", env!("CARGO_MANIFEST_DIR"), "/../runner-sdk"), 0),
        ("plugins new ..", 2),
        ("config check --max-concurrency -1", 78),
        ("run --max-concurrency 0", 78),
        ("submit /a --input none", 2),
        ("invoke /a", 78),
    ] {
        for stream in ["2>/dev/full", "2>&-"] {
            let script = format!("'{}' {command} {stream}", env!("CARGO_BIN_EXE_runner-host"));
            let mut shell = std::process::Command::new("sh");
            shell.arg("-c").arg(script).current_dir(dir.path()).env("STATE_DIR", dir.path().join("state"));
            let ended = tokio::task::spawn_blocking(move || shell.output());
            let ended = within(command, String::new, ended).await.expect("it does not panic").expect("a shell runs");
            assert_eq!(ended.status.code(), Some(code), "{command} {stream}: {ended:?}");
            let _ = std::fs::remove_dir_all(dir.path().join("x")); // made anew by the next
        }
    }
}

/// A dev server without a node, and the environment that it prints for one.
async fn dev_server(dir: &Path, flags: &[&str]) -> (Process, Vec<(String, String)>) {
    let dev = flags.iter().fold(Cli::new(&["dev", "--no-node", "--port", "0"]), |dev, flag| dev.arg(*flag));
    let dev = dev.dir(dir).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let exports = exports(&dev);
    (dev, exports)
}

/// A node of that dev server.
fn node(dir: &Path, exports: &[(String, String)], scratch: &str) -> Cli {
    let node = exports.iter().fold(Cli::new(&["run"]).dir(dir), |node, (name, value)| node.set(name, value));
    let node = node.set("STATE_DIR", dir.join(format!("{scratch}-state")).to_string_lossy());
    node.set("SCRATCH_DIR", dir.join(scratch).to_string_lossy()).set("REGISTER_INTERVAL_SECS", "1")
}

async fn stopped(process: &Process) {
    process.signal(Signal::TERM);
    assert_eq!(process.wait().await, 0, "{}", process.log());
}

#[tokio::test]
async fn strict_identity_refuses_second_node_with_same_key() {
    let dir = workplace(&[fixtures::hello()]);
    let (dev, exports) = dev_server(dir.path(), &["--strict-identity"]).await;
    // One poll, so that no registration meets another.
    let long = [("POLL_BACKOFF_MS_MIN", "60000"), ("POLL_BACKOFF_MS_MAX", "60000")];
    let first = long.iter().fold(node(dir.path(), &exports, "first"), |node, (name, value)| node.set(name, *value));
    let first = first.start();
    first.stderr_line(|line| line.contains("\"node.leasing\"")).await;
    let base = &exports.iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    let refreshed = async {
        loop {
            let seen = call(Request::get(format!("{base}/dev/v1/requests")), &Value::Null).await;
            let seen = seen["requests"].as_array().cloned().unwrap_or_default();
            if seen.iter().filter(|one| one["endpoint"] == "register_wallet").count() >= 3 {
                return seen;
            }
            // HTTP has no event for the journal.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let seen = within("the first node to register again", || first.log(), refreshed).await;
    let statuses = seen.iter().filter(|one| one["endpoint"] == "register_wallet").map(|one| &one["status"]);
    assert!(statuses.into_iter().all(|status| *status == 200), "its own repeats are no second node: {seen:#?}");
    let second = node(dir.path(), &exports, "second").start();
    let started = second.stderr_line(|line| line.contains("\"node.started\"")).await;
    let started: Value = serde_json::from_str(&started).expect("a node logs JSON");
    second.stderr_line(|line| line.contains("\"registration.failed\"")).await;
    let ready = format!("http://{}/ready", started["address"].as_str().expect("an address"));
    let conflict = async {
        loop {
            let request = Request::get(&ready).body(transport::full("")).expect("a request");
            let answer =
                Client::new(transport::Config::default()).call(request, EVENT_LIMIT).await.expect("the page is served");
            let page: Value = answer.json().expect("JSON");
            assert_eq!(answer.status.as_u16(), 503, "{page}");
            if page["reason"].as_str().is_some_and(|reason| reason.contains("conflict")) {
                return;
            }
            // The page changes after the log line, and HTTP has no event for it.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    within("the page to say conflict", || second.log(), conflict).await;
    for process in [&second, &first, &dev] {
        stopped(process).await;
    }
}

#[tokio::test]
async fn dev_server_answers_busy_beyond_leases_per_node() {
    let dir = workplace(&[fixtures::noop()]);
    std::fs::write(dir.path().join("plugins.toml"), "[[plugin]]\nfile = \"noop\"\nconfig = { sleep_secs = 1 }\n")
        .expect("the folder is writable");
    let (dev, exports) = dev_server(dir.path(), &["--leases-per-node", "1"]).await;
    let base = &exports.iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
    let dev_server = call(Request::get(format!("{base}/dev/v1/world")), &Value::Null).await;
    let bearer = format!("Bearer {}", dev_server["grant"].as_str().expect("a grant"));
    let task = json!({ "label": "one", "stage": "one", "capability": "/examples/noop/v1" });
    let job = json!({ "domain_id": dev_server["domain_id"], "label": "cli", "tasks": [task, task] });
    let jobs = format!("{}/jobs", dev_server["dms"].as_str().expect("a URL"));
    call(Request::post(jobs).header("authorization", bearer), &job).await;
    let node = node(dir.path(), &exports, "scratch").set("MAX_CONCURRENCY", "2").start();
    let busy = async {
        loop {
            let seen = call(Request::get(format!("{base}/dev/v1/requests")), &Value::Null).await;
            let seen = seen["requests"].as_array().or(seen.as_array()).cloned().unwrap_or_default();
            if seen.iter().any(|one| one["path"] == "/v1/tasks" && one["status"] == 409) {
                return;
            }
            // HTTP has no event for the journal.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    within("a poll answered busy", || node.log(), busy).await;
    for process in [&node, &dev] {
        stopped(process).await;
    }
}

#[tokio::test]
async fn dev_server_restart_preserves_data_folder() {
    let dir = workplace(&[fixtures::hello()]);
    for round in 1..=2_usize {
        let (dev, exports) = dev_server(dir.path(), &["--data", "kept"]).await;
        let base = &exports.iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1;
        let dev_server = call(Request::get(format!("{base}/dev/v1/world")), &Value::Null).await;
        if round == 1 {
            let node = node(dir.path(), &exports, "scratch").start();
            node.stderr_line(|line| line.contains("\"node.leasing\"")).await;
            hello(base, || node.log()).await;
            stopped(&node).await;
        }
        let (server, domain) = (dev_server["domain_server"].as_str().expect("a URL"), dev_server["domain_id"].as_str());
        let list = format!("{}/api/v1/domains/{}/data", server.trim_end_matches('/'), domain.expect("an id"));
        let bearer = format!("Bearer {}", dev_server["grant"].as_str().expect("a grant"));
        let list = Request::get(list).header("authorization", bearer).header("accept", "application/json");
        let list = call(list, &Value::Null).await;
        assert_eq!(list["data"].as_array().map(Vec::len), Some(1), "round {round}: {list}");
        stopped(&dev).await;
    }
}

#[tokio::test]
async fn dev_removes_only_leftovers_of_killed_servers() {
    let dir = workplace(&[]);
    let start = async || {
        let dev = Cli::new(&["dev", "--no-node", "--port", "0"]).dir(dir.path());
        let dev = dev.set("TMPDIR", dir.path().to_string_lossy()).start();
        dev.stdout_line(|line| line == "For development and tests, not for production.").await;
        dev
    };
    let folders = || {
        let below = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let ours = below(dir.path()).filter(|path| path.to_string_lossy().contains("/runner-host-"));
        let owned = ours.flat_map(|path| below(&path).collect::<Vec<_>>()).filter(|path| path.is_dir());
        owned.collect::<std::collections::BTreeSet<_>>()
    };
    let living = start().await;
    let of_living = folders();
    let killed = start().await;
    let left: Vec<_> = folders().difference(&of_living).cloned().collect();
    assert_eq!((of_living.len(), left.len()), (1, 1));
    killed.signal(Signal::KILL);
    killed.wait().await;
    assert!(left[0].exists(), "killed, it leaves its folder");
    let next = start().await;
    assert!(!left[0].exists() && folders().is_superset(&of_living), "{:?}", folders());
    stopped(&next).await;
    stopped(&living).await;
    assert!(folders().is_empty(), "{:?}", folders());
}

#[tokio::test]
async fn logs_are_text_where_asked_for() {
    let dir = workplace(&[fixtures::hello()]);
    let node = Cli::new(&["run"])
        .dir(dir.path())
        .set("LOG_FORMAT", "text")
        .set("DMS_BASE_URL", "http://127.0.0.1:9/v1")
        .set("DDS_BASE_URL", "http://127.0.0.1:9")
        .set("REG_SECRET", "s")
        .set("SECP256K1_PRIVHEX", "ab".repeat(32))
        .set("HTTP_BIND", "127.0.0.1:0")
        .set("SCRATCH_DIR", dir.path().join("scratch").to_string_lossy())
        .set("STATE_DIR", dir.path().join("state").to_string_lossy())
        .start();
    let line = node.stderr_line(|line| line.contains("registration failed")).await;
    assert!(line.contains(" WARN ") && !line.starts_with('{') && !line.contains('\u{1b}'), "{line}");
    assert!(node.stdout().is_empty(), "logs go to stderr");
    node.signal(Signal::TERM);
    assert_eq!(node.wait().await, 0, "{}", node.log());
}

#[tokio::test]
async fn mistyped_subcommand_gets_a_suggestion() {
    for (args, near) in [(&["rnu"][..], "run"), (&["plugins", "lsit"], "list"), (&["config", "chekc"], "check")] {
        let ended = Cli::new(args).run().await.expect(2);
        let wanted = format!("tip: a similar subcommand exists: '{near}'");
        assert!(ended.stderr.contains(&wanted), "{}", ended.stderr);
    }
    let ended = Cli::new(&["banana"]).run().await.expect(2);
    assert!(!ended.stderr.contains("tip:"), "{}", ended.stderr);
}

#[tokio::test]
async fn invoke_and_dev_need_enough_open_files() {
    let folder = Folder::with_a_good_one();
    for args in [&["invoke", "/fixtures/good/v1"][..], &["dev", "--port", "0"]] {
        for limit in [12, 16, 24] {
            let ended = folder.cli(args).open_files(limit, limit).run().await.expect(75);
            let wanted = format!("only {limit} files may be open, the node needs at least 32");
            assert!(ended.stderr.contains(&wanted), "{args:?}: {}", ended.stderr);
        }
    }
}
