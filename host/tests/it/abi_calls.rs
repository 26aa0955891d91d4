//! Calls that plugins may make for their tasks, and calls that they may not make, over the real boundary.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

use crate::harness::{Ended, TestServer, fixtures, folder::Folder};

/// A folder with the zoo in it, for `invoke`.
fn zoo() -> Folder {
    let folder = Folder::new();
    folder.put("libzoo.so", &fixtures::zoo());
    folder
}

/// The fields that a plugin logged with a line.
fn fields(line: &Value) -> Value {
    let ours = ["timestamp", "level", "message", "target", "plugin", "plugin_target"];
    let task = ["plane", "task_id", "job_id", "capability", "domain_id", "attempt"];
    let mut fields = line.as_object().expect("a line is an object").clone();
    fields.retain(|name, _| !ours.contains(&name.as_str()) && !task.contains(&name.as_str()));
    Value::Object(fields)
}

#[tokio::test]
async fn second_completion_is_stale_and_counted() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::c("behave", &[])]).await;
    test_server.run(&node, "/fixtures/c-double/v1", json!({})).await.completed();
    let line = node.says_text("completed twice").await;
    let (ok, stale) = (runner_sdk::abi::Status::OK.0, runner_sdk::abi::Status::STALE.0);
    assert_eq!(fields(&line), json!({ "first": ok, "second": stale }));
    assert_eq!(node.status().await["stale_calls"], 1);
    node.stop().await;
}

#[tokio::test]
async fn late_and_forged_calls_are_answered_stale() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::c("behave", &[])]).await;
    test_server.run(&node, "/fixtures/c-late/v1", json!({})).await.completed();
    let stale = runner_sdk::abi::Status::STALE.0;
    for message in ["late calls", "forged calls"] {
        let line = node.says_text(message).await;
        assert_eq!(fields(&line), json!({ "calls": 17, "stale": 17, "cancelled": stale, "complete": stale }));
    }
    // Two rounds of 17 calls with an answer, plus log, cancelled and complete.
    assert_eq!(node.status().await["stale_calls"], 40);
    // These calls have no effect, and the next task is not disturbed.
    let ended = test_server.run(&node, "/fixtures/c-thread/v1", json!({})).await;
    assert!(ended.completed().artifacts().is_empty());
    node.stop().await;
}

#[tokio::test]
async fn progress_and_events_must_be_json() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::c("behave", &[])]).await;
    let ended = test_server.run(&node, "/fixtures/c-words/v1", json!({})).await;
    let line = node.says_text("words that are no JSON").await;
    let (ok, refused) = (runner_sdk::abi::Status::OK.0, runner_sdk::abi::Status::BAD_REQUEST.0);
    assert_eq!(fields(&line), json!({ "progress": refused, "event": refused, "sound": ok }));
    let meta = &ended.completed().task()["meta"];
    assert_eq!(meta["progress"], json!({ "sound": true }));
    assert!(meta["events"].as_array().is_none_or(Vec::is_empty), "{meta}");
    node.stop().await;
}

#[tokio::test]
async fn context_gets_task_over_after_the_end() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let ended = test_server.run(&node, "/fixtures/use-after-end/v1", json!({})).await;
    let line = node.says_text("call after the end").await;
    assert_eq!(fields(&line)["kind"], "TaskOver");
    assert_eq!(fields(&line)["all"], true);
    assert!(ended.completed().artifacts().is_empty());
    assert!(node.status().await["stale_calls"].as_u64() >= Some(4));
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn runner_finds_data_by_name() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let wanted = test_server.put("wanted", b"one").await;
    test_server.put("other", b"three").await;
    let one = json!([{ "id": wanted, "name": "wanted", "data_type": "binary", "size": 3, "text": "one" }]);
    for (name, expected) in [("wanted", one), ("absent", json!([]))] {
        let ended = test_server.run(&node, "/fixtures/finds/v1", json!({ "name": name })).await;
        let found = test_server.artifact(ended.completed(), "found.json").await;
        assert_eq!(serde_json::from_slice::<Value>(&found).expect("JSON"), expected, "{name}");
    }
    let ended = test_server.run(&node, "/fixtures/finds/v1", json!({ "name": "" })).await;
    let (reason, _, _) = failure(&ended);
    assert!(reason.contains("empty name or data_type"), "{reason}");
    node.stop().await;
}

#[tokio::test]
async fn runner_sees_its_time_left_and_token_expiry() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]);
    let node = node.plugins_file("[defaults]\ngrant = [\"token\"]\nlimits = { wall_time = \"90s\" }\n").leasing().await;
    let ended = test_server.run(&node, "/fixtures/time-left/v1", json!({})).await;
    let left = test_server.artifact(ended.completed(), "left.json").await;
    let left: Value = serde_json::from_slice(&left).expect("JSON");
    let seconds = |key: &str| left[key].as_f64().unwrap_or_else(|| panic!("{key}: {left}"));
    assert!(seconds("limit") > 30.0 && seconds("limit") <= 90.0, "{left}");
    assert!(seconds("lease") > 0.0 && seconds("lease") <= 3600.0, "{left}");
    assert!(seconds("token") > 0.0, "{left}");
    node.stop().await;
}

/// The end of a job in the control plane: reason, and outcome and code of the details.
fn failure(ended: &Ended) -> (String, Value, Value) {
    let (reason, details) = ended.failed();
    (reason.to_owned(), details["outcome"].clone(), details["code"].clone())
}

#[tokio::test]
async fn panic_fails_its_task_with_text_and_place() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let cases = [
        ("/fixtures/panic/v1", "boom 42"),
        ("/fixtures/panic-in-drop/v1", "boom in drop"),
        ("/fixtures/panic-blocking/v1", "boom on a blocking thread"),
    ];
    for (capability, text) in cases {
        let ended = test_server.run(&node, capability, json!({})).await;
        let (reason, outcome, code) = failure(&ended);
        let place = reason.strip_prefix(&format!("runner panicked: {text} at src/ends.rs:"));
        let line = place.unwrap_or_else(|| panic!("{capability}: {reason}"));
        assert!(line.parse::<u32>().is_ok(), "{reason}");
        assert_eq!((outcome, code), (json!("panicked"), json!("runner_panic")), "{capability}");
    }
    // A panic on another thread does not end the task. The host logs its text and place.
    test_server.run(&node, "/fixtures/panic-thread/v1", json!({})).await.completed();
    let line = node.says_text("boom on a thread of its own").await;
    assert_eq!((&line["level"], &line["plugin"]), (&json!("ERROR"), &json!("zoo")));
    assert!(fields(&line)["place"].as_str().is_some_and(|place| place.starts_with("src/ends.rs:")), "{line}");
    assert_eq!(fields(&line)["hint"], "set RUST_BACKTRACE=1 to log a backtrace", "{line}");
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn panic_logs_a_backtrace_on_request() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("RUST_BACKTRACE", "1").leasing().await;
    test_server.run(&node, "/fixtures/panic-thread/v1", json!({})).await.completed();
    let line = node.says_text("boom on a thread of its own").await;
    assert!(fields(&line)["backtrace"].as_str().is_some_and(|trace| trace.contains("panic_thread")), "{line}");
    node.stop().await;
}

#[tokio::test]
async fn plugin_log_lines_carry_plugin_and_task() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("RUST_LOG", "trace").leasing().await;
    let job = test_server.task("/fixtures/logs/v1").submit();
    let ended = test_server.ended(&node, job).await;
    let task = ended.completed().task()["id"].as_str().expect("an id").to_owned();
    let own_thread = node.says_text("from a thread of its own").await;
    let by_text: BTreeMap<String, Value> = node
        .lines()
        .into_iter()
        .filter(|line| !line["plugin_target"].is_null())
        .map(|line| (line["message"].as_str().expect("a message").to_owned(), line))
        .collect();
    for level in ["error", "warn", "info", "debug", "trace"] {
        for (bridge, target) in [("tracing", "zoo::calls"), ("log", "zoo-log")] {
            let text = format!("{bridge} at {level}");
            let line = by_text.get(&text).unwrap_or_else(|| panic!("no line {text}: {}", node.log()));
            assert_eq!(line["level"], level.to_uppercase(), "{line}");
            assert_eq!(line["plugin"], "zoo", "{line}");
            assert_eq!(line["plugin_target"], target, "{line}");
            assert_eq!(line["task_id"], task, "{line}");
            assert_eq!(line["capability"], "/fixtures/logs/v1", "{line}");
        }
    }
    let info = fields(&by_text["tracing at info"]);
    assert_eq!(info, json!({ "level_number": 3, "answer": "forty-two", "ratio": 0.5, "done": true }));
    assert_eq!(by_text["from a blocking thread"]["task_id"], task);
    assert_eq!(own_thread["plugin"], "zoo");
    assert_eq!(own_thread["plugin_target"], "zoo::calls");
    node.stop().await;
}

#[tokio::test]
async fn log_line_belongs_to_its_spans_task() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "2").leasing().await;
    let jobs = [test_server.task("/fixtures/spans/v1").submit(), test_server.task("/fixtures/spans/v1").submit()];
    let mut tasks = Vec::new();
    for job in jobs {
        tasks.push(test_server.ended(&node, job).await.completed().task()["id"].clone());
    }
    node.stop().await;
    let spoken = |line: &Value| line["plugin_target"] == "zoo::calls";
    let texts_of = |task: &Value| -> Vec<String> {
        let own = node.lines().into_iter().filter(|line| spoken(line) && &line["task_id"] == task);
        let mut texts: Vec<String> = own.map(|line| line["message"].as_str().expect("a text").to_owned()).collect();
        texts.sort();
        texts
    };
    for task in &tasks {
        let wanted = [
            "at the end",
            "back in the span",
            "in a child of a span",
            "in a span",
            "in a spawned task that was given the span",
            "in spans within spans",
            "out of one of them",
            "with the span as its parent",
        ];
        assert_eq!(texts_of(task), wanted, "{}", node.log());
    }
    let nobodys = [
        "in a span of nobody",
        "in a span of nobody",
        "in a spawned task that was not",
        "in a spawned task that was not",
    ];
    assert_eq!(
        texts_of(&Value::Null),
        [&nobodys[..], &["with no parent", "with no parent"]].concat(),
        "{}",
        node.log()
    );
}

#[tokio::test]
async fn spawned_future_logs_with_its_task() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("RUST_LOG", "info").leasing().await;
    let ended = test_server.run(&node, "/fixtures/spawns/v1", json!({})).await;
    let task = ended.task()["id"].clone();
    let (reason, _) = ended.failed();
    let panicked = "runner failed: a spawned future panicked: boom in a spawned future at src/calls.rs:";
    assert!(reason.starts_with(panicked), "{reason}");
    for text in ["from a spawned future", "from a thread of a spawned future", "boom in a spawned future"] {
        assert_eq!(node.says_text(text).await["task_id"], task, "{text}");
    }
    node.stop().await;
}

#[tokio::test]
async fn log_lines_of_plugins_obey_the_hosts_filter() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("RUST_LOG", "warn,runner_host::app=info").leasing().await;
    test_server.run(&node, "/fixtures/logs/v1", json!({})).await.completed();
    let is_logged = |text: &str| !node.said_text(text).is_empty();
    assert!(is_logged("tracing at warn") && is_logged("log at error"));
    assert!(!is_logged("tracing at info") && !is_logged("log at debug"));
    node.stop().await;
}

#[tokio::test]
async fn runner_uses_tokio_and_blocking_threads() {
    let folder = zoo();
    folder.invoke("/fixtures/tokio-net/v1", &[]).await.expect(0);
    assert_eq!(folder.output("net.txt"), b"through the loopback");
    folder.invoke("/fixtures/block-on/v1", &[]).await.expect(0);
    assert_eq!(folder.output("blocking.txt"), b"blocking");
    assert_eq!(folder.output("thread.txt"), b"thread");
}

#[tokio::test]
async fn runs_that_block_all_workers_are_named() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("RUST_LOG", "").set("MAX_CONCURRENCY", "3").leasing().await;
    let file = node.scratch_dir().join("release");
    let block = || test_server.task("/fixtures/block-worker/v1").meta(json!({ "file": file })).submit();
    let jobs = [block(), block()];
    let mut blocking = BTreeSet::new();
    for job in jobs {
        let task = test_server.started(&node, job).await["id"].clone();
        blocking.insert(task.as_str().expect("an id").to_owned());
    }
    let other = test_server.task("/fixtures/ok/v1").submit();
    let is_warning = |line: &Value| line["event"] == "runner.blocks_worker";
    for task in &blocking {
        let line = node.line(|line| is_warning(line) && line["task_id"] == task.as_str()).await;
        assert_eq!(line["level"], "WARN", "{line}");
        assert_eq!(line["capability"], "/fixtures/block-worker/v1", "{line}");
    }
    std::fs::write(&file, "").expect("the folder is writable");
    for job in [jobs[0], jobs[1], other] {
        test_server.ended(&node, job).await.completed();
    }
    node.stop().await;
    assert_eq!(node.lines().iter().filter(|line| is_warning(line)).count(), 2, "{}", node.log());
}

#[tokio::test]
async fn task_opens_at_most_64_streams() {
    let folder = zoo();
    folder.invoke("/fixtures/streams/v1", &["--meta", "{\"count\":70}"]).await.expect(0);
    let output: Value = serde_json::from_slice(&folder.output("streams.json")).expect("JSON");
    assert_eq!(output["open"], 64);
    assert_eq!(output["refused"]["kind"], "Limit");
    assert!(
        output["refused"]["text"].as_str().is_some_and(|text| text.contains("64 inputs and outputs are open already"))
    );
    assert_eq!(output["again"], true);
}

/// The files below `invoke`'s output folder.
fn published(folder: &Folder) -> Vec<String> {
    let entries = std::fs::read_dir(folder.root().join("out")).into_iter().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn dropped_writer_publishes_nothing() {
    let folder = zoo();
    let output = folder.invoke("/fixtures/drop-writer/v1", &["-o", "json"]).await.expect(0);
    assert_eq!(published(&folder), ["kept.txt"]);
    assert_eq!(output.stdout.lines().count(), 1, "{}", output.stdout);
    assert_eq!(folder.output("kept.txt"), b"kept");

    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let ended = test_server.run(&node, "/fixtures/drop-writer/v1", json!({})).await;
    let artifacts = ended.completed().artifacts();
    assert_eq!(artifacts.keys().collect::<Vec<_>>(), ["kept.txt"]);
    node.stop().await;
}

#[tokio::test]
async fn fast_progress_keeps_the_last_value() {
    let folder = zoo();
    let output = folder.invoke("/fixtures/progress-storm/v1", &["--meta", "{\"count\":20000}"]).await.expect(0);
    let last = output.stderr.lines().rfind(|line| line.starts_with("progress"));
    assert_eq!(last, Some("progress {\"n\":20000}"), "{}", output.stderr);
}

#[tokio::test]
async fn outputs_of_any_size_arrive_unchanged() {
    let folder = zoo();
    for bytes in [0_usize, 1, 65_536, 40_000_000] {
        for announce in [true, false] {
            let meta = json!({ "bytes": bytes, "announce": announce }).to_string();
            folder.invoke("/fixtures/big-output/v1", &["--meta", &meta]).await.expect(0);
            let found = folder.output("big.bin");
            assert_eq!(found.len(), bytes);
            assert!(found.iter().enumerate().all(|(n, byte)| usize::from(*byte) == n % 251), "{bytes} bytes");
        }
    }
}

#[tokio::test]
async fn failed_invoke_reports_why_and_cleans_up() {
    let folder = zoo().usual_logs();
    let cases = [
        ("fail", "error: failed: cloud not written: shard 3 not written: disk full"),
        ("fail-details", "error: failed: the scan is empty"),
        ("retryable", "error: failed: the scanner is busy"),
    ];
    for (runner, line) in cases {
        let output = folder.invoke(&format!("/fixtures/{runner}/v1"), &[]).await.expect(1);
        assert_eq!(output.stderr, line);
    }
    let output = folder.invoke("/fixtures/panic/v1", &[]).await.expect(1);
    let last = output.stderr.lines().last().expect("a line");
    assert!(last.starts_with("error: panicked: boom 42 at src/ends.rs:"), "{}", output.stderr);
    let left: Vec<_> = walk(folder.root()).into_iter().filter(|path| path.contains("/task")).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn walk(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path().to_string_lossy().into_owned());
        found.extend(walk(&entry.path()));
    }
    found
}

/// Each call that does not return occupies a thread, also after its task was completed.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn plugin_with_hanging_calls_goes_out_of_service() {
    const SLOTS: u64 = 2;
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::c("behave", &[]), fixtures::zoo()]);
    let node = node.set("MAX_CONCURRENCY", SLOTS.to_string()).leasing().await;
    test_server.run(&node, "/fixtures/c-hangs/v1", json!({})).await.completed();
    let line = node.line(|line| line["event"] == "plugin.calls_hang").await;
    assert_eq!(json!([line["plugin"], line["call"], line["calls"]]), json!(["behave", "start", 1]), "{line}");
    let behave = |page: &Value| {
        let plugins = page["plugins"].as_array().cloned().unwrap_or_default();
        plugins.into_iter().find(|plugin| plugin["name"] == "behave").unwrap_or_default()
    };
    node.page_until("/status.json", |page| behave(&page.1)["hanging_calls"] == 1).await;

    let jobs: Vec<_> = (0..200).map(|_| test_server.task("/fixtures/c-hangs/v1").submit()).collect();
    let line = node.line(|line| line["event"] == "plugin.out_of_service").await;
    assert_eq!(line["plugin"], "behave", "{line}");
    let reason = line["reason"].as_str().expect("a reason").to_owned();
    assert!(reason.contains("calls into it have not returned, the oldest is start"), "{line}");
    let (_, status) = node.page_until("/status.json", |page| behave(&page.1)["state"] == "out-of-service").await;
    assert_eq!(behave(&status)["reason"], reason);
    let (code, ready) = node.page("/ready").await;
    assert_eq!((code, &ready["degraded"]), (200, &json!([format!("plugin behave is out of service: {reason}")])));
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    let threads = std::fs::read_dir(format!("/proc/{}/task", node.pid())).expect("it runs").count();
    assert!(threads < jobs.len() / 2, "{threads} threads");
    node.stop().await;
}

/// A plugin whose `start` does not return blocks only itself.
#[tokio::test]
async fn blocking_start_affects_only_its_plugin() {
    // A short lease, so that the heartbeat with the cancel comes soon.
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(2)).await;
    let plugins = [fixtures::c("refused", &["START_BLOCKS"]), fixtures::zoo()];
    let node = test_server.node(&plugins).set("CANCEL_GRACE", "200ms").set("MAX_CONCURRENCY", "2").leasing().await;
    let stuck = test_server.task("/fixtures/refused/v1").submit();
    node.says("task.started").await;
    test_server.run(&node, "/fixtures/tokio-net/v1", json!({})).await.completed();
    assert!(test_server.dev_server.cancel_job(stuck));
    node.says("runner.stuck").await;
    for _ in 0..4 {
        test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    }
    let status = node.status().await;
    let held = status["tasks"].as_object().expect("tasks").values();
    assert!(held.into_iter().all(|task| task["capability"] != "/fixtures/refused/v1"), "{status:#}");
    node.stop().await;
}

#[tokio::test]
async fn plugin_texts_are_bounded_and_readable() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::c("untidy", &[])]).set("RUST_LOG", "info").leasing().await;
    let ended = test_server.run(&node, "/fixtures/c-text/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert!(reason.contains("caf\u{fffd} xxx"), "{}", &reason[..200]);
    assert!(reason.len() < 20_000, "{}", reason.len());
    assert_eq!(details["details"]["left_out_bytes"], 4 << 20, "{}", ended.task());
    node.stop().await;
    let line = &node.said_text("caf\u{fffd} is not UTF-8")[0];
    assert_eq!((&line["n"], &line["plugin"]), (&json!("\u{fffd}"), &json!("untidy")));
    assert_eq!(node.lines().iter().filter(|line| line["plugin_target"] == "untidy").count(), 2);
    let longest = node.log().lines().map(str::len).max();
    assert!(longest.is_some_and(|longest| longest < 50_000), "{longest:?}");
}

#[tokio::test]
async fn unreleased_bytes_are_counted_and_warned_of() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::c("untidy", &[]), fixtures::hello()]).leasing().await;
    let bytes = 17 << 20;
    let input = test_server.put("in", &vec![7; bytes]).await;
    test_server.ended(&node, test_server.task("/fixtures/c-leak/v1").inputs(&[input]).submit()).await.completed();
    let warned = node.line(|line| line["event"] == "plugin.leaked").await;
    assert_eq!(warned["plugin"], "untidy");
    assert!(warned["bytes"].as_u64().is_some_and(|warned| warned >= bytes as u64), "{warned}");
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    let none_of_hello = |plugin: &Value| plugin["name"] != "hello" || plugin["unreleased_bytes"] == 0;
    let settled = |page: &(u16, Value)| page.1["plugins"].as_array().is_some_and(|all| all.iter().all(none_of_hello));
    let (_, status) = node.page_until("/status.json", settled).await;
    let untidy = status["plugins"].as_array().into_iter().flatten().find(|plugin| plugin["name"] == "untidy");
    let held = untidy.and_then(|plugin| plugin["unreleased_bytes"].as_u64());
    assert!(held.is_some_and(|held| held >= bytes as u64), "{status}");
    node.stop().await;
}
