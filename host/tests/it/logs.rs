//! Log lines: their form and their fields.

use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    folder::Folder,
    node::Cli,
};

#[tokio::test]
async fn every_line_of_a_task_carries_its_ids() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("POST /v1/tasks/*/heartbeat", 1, Bad::Status(503, "later"));
    proxy.answer("POST /v1/tasks/*/complete", 1, Bad::Cut);
    let node = proxy.node(&[fixtures::zoo()]).set("RUST_LOG", "info").leasing().await;
    let ended = test_server.run(&node, "/fixtures/logs/v1", json!({})).await;
    let task = &ended.completed().task()["id"];
    node.says("report.delivered").await;
    node.stop().await;
    let lines: Vec<Value> = node.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(lines.len(), node.log().lines().filter(|line| !line.is_empty()).count(), "each line is JSON");
    for line in &lines {
        for (key, is_there) in [("timestamp", true), ("level", true), ("message", true), ("target", true)] {
            assert_eq!(line[key].is_string(), is_there, "{key}: {line}");
        }
    }
    let of_task: Vec<&Value> = lines.iter().filter(|line| &line["task_id"] == task).collect();
    let count_of = |field: &str, value: &str| of_task.iter().filter(|line| line[field] == value).count();
    let codes = ["task.started", "heartbeat.failed", "task.ended", "report.delivered"];
    assert_eq!(codes.map(|code| count_of("event", code)), [1; 4], "{of_task:#?}");
    let texts = ["tracing at info", "from a blocking thread"];
    assert_eq!(texts.map(|text| count_of("message", text)), [1; 2], "{of_task:#?}");
    let job = of_task[0]["job_id"].clone();
    for line in &of_task {
        assert_eq!(line["capability"], "/fixtures/logs/v1", "{line}");
        assert_eq!((&line["job_id"], &line["domain_id"]), (&job, &json!(test_server.dev_server.domain_id())), "{line}");
        // The outbox knows only the report, possibly from an earlier process.
        if line["event"] != "report.delivered" && line["event"] != "report.waiting" {
            assert_eq!((&line["plugin"], &line["attempt"]), (&json!("zoo"), &json!(1)), "{line}");
        }
    }
    assert!(job.is_string());
    let end = of_task.iter().find(|line| line["event"] == "task.ended").expect("counted above");
    assert_eq!(end["report"], "waiting", "{end}");
    assert!(end["elapsed_ms"].is_u64() && end["outcome"] == "completed", "{end}");
}

#[tokio::test]
async fn text_log_lines_are_readable() {
    let test_server = TestServer::start().await;
    let node =
        test_server.node(&[fixtures::hello()]).set("LOG_FORMAT", " TEXT ").set("HTTP_BIND", "999").refused().await;
    let node = node.expect(78);
    assert!(node.stderr.starts_with("error: HTTP_BIND: "), "{}", node.stderr);
    for format in ["json", "JSON", "proxy", ""] {
        let ended = Cli::new(&["run"]).set("LOG_FORMAT", format).set("HTTP_BIND", "999").run().await.expect(78);
        let as_json = ended.stderr.lines().all(|line| serde_json::from_str::<Value>(line).is_ok());
        assert_eq!(as_json, !format.is_empty(), "s0_15a, LOG_FORMAT={format}: {}", ended.stderr);
        assert!(ended.stderr.contains("HTTP_BIND: expected an address"), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn capabilities_of_a_loaded_plugin_are_logged() {
    let dir = tempfile::tempdir().expect("a folder");
    let zoo = fixtures::zoo();
    let run = |format: &str| {
        // The node ends after it has loaded its plugins, because no machine has this address.
        let run = Cli::new(&["run", "--plugins"]).arg(&zoo).set("LOG_FORMAT", format).set("RUST_LOG", "info");
        let run = run.set("DMS_BASE_URL", "http://127.0.0.1:9/v1").set("DDS_BASE_URL", "http://127.0.0.1:9");
        let run = run.set("REG_SECRET", "s").set("SECP256K1_PRIVHEX", "ab".repeat(32)).set("HTTP_BIND", "192.0.2.1:1");
        let run = run.set("SCRATCH_DIR", dir.path().join("scratch").to_string_lossy());
        run.set("STATE_DIR", dir.path().join("state").to_string_lossy()).run()
    };
    let ended = run("json").await.expect(78);
    let lines = ended.stderr.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let loaded = lines.into_iter().find(|line| line["event"] == "plugin.loaded").expect("it is loaded");
    let names = loaded["capabilities"].as_str().expect("text");
    let words: Vec<&str> = names.split(' ').collect();
    assert!(words.len() > 2 && words.contains(&"/fixtures/fail/v1"), "{loaded}");
    let ended = run("text").await.expect(78);
    let loaded = ended.stderr.lines().find(|line| line.contains("plugin loaded")).expect("it is loaded");
    assert!(loaded.contains(&format!("capabilities=\"{names}\"")), "{loaded}");
}

#[tokio::test]
async fn plugin_fields_are_readable_in_text_logs() {
    let folder = Folder::new();
    folder.put("zoo.so", &fixtures::zoo());
    let invoke = |name: &str, filter: &str| {
        let cli = folder.cli(&["invoke"]).arg(format!("/fixtures/{name}/v1")).set("RUST_LOG", filter);
        cli.set("RUST_BACKTRACE", "1").run()
    };
    let ended = invoke("logs", "info").await.expect(0);
    let line = ended.stderr.lines().find(|line| line.contains("tracing at info")).expect("it is logged");
    for field in [" answer=\"forty-two\"", " done=true", " level_number=3", " ratio=0.5"] {
        assert!(line.contains(field), "{field}: {line}");
    }
    assert!(!ended.stderr.contains("plugin_fields"), "{}", ended.stderr);

    let ended = invoke("panic", "error").await.expect(1);
    let (trace, lines): (Vec<&str>, Vec<&str>) = ended.stderr.lines().partition(|line| line.starts_with("    | "));
    let panicked = lines.iter().filter(|line| line.contains(" place=\"src/ends.rs:")).count();
    assert_eq!(panicked, 1, "{}", ended.stderr);
    assert!(trace.iter().any(|line| line.contains("zoo::ends::panic")), "{}", ended.stderr);
    assert!(trace.len() <= 25 && lines.iter().all(|line| line.len() < 1000), "{}", ended.stderr);
}

#[tokio::test]
async fn invalid_filter_is_one_line() {
    for filter in ["runner_host=loud", "a=b=c", "[", "info,runner_host[x=\"=debug"] {
        let ended = Cli::new(&["config", "check"]).set("RUST_LOG", filter).run().await.expect(78);
        let output = ended.stderr.lines().filter(|line| line.contains("RUST_LOG cannot be used")).count();
        assert_eq!(output, 1, "{filter}: {}", ended.stderr);
        assert!(!ended.stderr.lines().any(|line| line.trim().is_empty()), "{}", ended.stderr);
    }
    // Blank is unset.
    let ended = Cli::new(&["config", "check"]).set("RUST_LOG", " ").run().await.expect(78);
    assert!(!ended.stderr.contains("RUST_LOG"), "{}", ended.stderr);
}

#[test]
fn second_log_set_up_changes_nothing() {
    use runner_host::observe::logs::{Format, init};
    // A process has one subscriber, so this test starts itself as a new process.
    const TWICE: &str = "IT_LOGS_TWICE";
    if std::env::var_os(TWICE).is_some() {
        init(Format::Json, "info");
        init(Format::Text, "trace");
        tracing::info!("set up twice");
        tracing::debug!("not asked for");
        return;
    }
    let this = std::env::current_exe().expect("this program has a path");
    let name = "logs::second_log_set_up_changes_nothing";
    let ended = std::process::Command::new(this).args(["--exact", name, "--nocapture"]).env(TWICE, "1").output();
    let ended = ended.expect("it starts");
    let output = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{output}");
    let lines: Vec<Value> = output.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let messages: Vec<&Value> = lines.iter().map(|line| &line["message"]).collect();
    assert_eq!((messages, output.lines().count()), (vec![&json!("set up twice")], 1), "{output}");
}

#[tokio::test]
async fn log_is_json_at_level_info_by_default() {
    let test_server = TestServer::start().await;
    // Blank is unset.
    let node = test_server.node(&[fixtures::hello()]).set("RUST_LOG", "").leasing().await;
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    node.stop().await;
    let lines = node.lines();
    assert!(lines[0]["timestamp"].is_string() && lines[0]["message"].is_string(), "{}", lines[0]);
    let levels: std::collections::BTreeSet<_> = lines.iter().filter_map(|line| line["level"].as_str()).collect();
    assert!(levels.contains("INFO") && levels.iter().all(|level| ["INFO", "WARN"].contains(level)), "{levels:?}");
}
