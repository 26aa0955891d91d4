//! Plugins that this repository did not build: another lock file, another tokio, another SDK, another language.

use std::path::Path;

use serde_json::json;

use crate::harness::{TestServer, fixtures};

fn fixture(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

/// The version of tokio in a lock file.
fn tokio(lock: &str) -> String {
    let lock: toml::Table = lock.parse().expect("a lock file is TOML");
    let packages = lock["package"].as_array().expect("packages");
    let tokio = packages.iter().find(|package| package["name"].as_str() == Some("tokio"));
    tokio.expect("tokio is locked")["version"].as_str().expect("a version").to_owned()
}

#[tokio::test]
async fn plugin_with_another_tokio_runs_leased_tasks() {
    let (own_version, plugin_version) =
        (tokio(&fixture("../Cargo.lock")), tokio(&fixture("tests/fixtures/rust/independent/Cargo.lock")));
    assert_ne!(own_version, plugin_version, "the plugin must use another tokio version");
    assert_eq!(
        own_version.rsplit_once('.').map(|(minor, _)| minor),
        plugin_version.rsplit_once('.').map(|(minor, _)| minor)
    );
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::independent()]).await;
    let input = test_server.put("letter", b"a letter").await;
    let ended = test_server.ended(&node, test_server.task("/fixtures/independent/v1").inputs(&[input]).submit()).await;
    ended.completed();
    assert_eq!(test_server.artifact(&ended, "independent.txt").await, b"an independent plugin read: a letter");
    node.stop().await;
}

#[tokio::test]
async fn c_plugin_of_sixty_lines_runs_leased_tasks() {
    let lines = fixture("tests/fixtures/c/hello.c").lines().count();
    assert!(lines <= 60, "{lines} lines");
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::c("hello", &[])]).await;
    let input = test_server.put("who", b"world").await;
    let ended = test_server.ended(&node, test_server.task("/fixtures/c-hello/v1").inputs(&[input]).submit()).await;
    ended.completed();
    assert_eq!(test_server.artifact(&ended, "c-hello.txt").await, b"hello from C, world");

    // It forwards the host's errors with their text.
    let missing = uuid::Uuid::new_v4();
    let ended = test_server.ended(&node, test_server.task("/fixtures/c-hello/v1").inputs(&[missing]).submit()).await;
    let (reason, _) = ended.failed();
    assert!(reason.starts_with("runner failed: ") && reason.contains("404"), "{reason}");
    node.stop().await;
}

#[tokio::test]
async fn runner_ported_from_the_published_api_runs() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let scans = [test_server.put("north", b"c\na\n").await, test_server.put("south", b"b\n").await];
    // The second run finds the map of the first one and replaces it.
    for revision in ["1", "2"] {
        let task = test_server.task("/fixtures/ported/v1").inputs(&scans).meta(json!({ "map": "floor" }));
        let ended = test_server.ended(&node, task.submit()).await;
        let map = test_server.artifact(ended.completed(), "map.txt").await;
        assert_eq!(String::from_utf8_lossy(&map), format!("{revision}\na\nb\nc\n"));
        assert_eq!(test_server.artifact(&ended, "lines.txt").await, b"a\nb\nc\n");
        assert_eq!(test_server.artifact(&ended, "done.txt").await, b"done");
        let report = test_server.artifact(&ended, "report.json").await;
        let report: serde_json::Value = serde_json::from_slice(&report).expect("JSON");
        assert_eq!(report["revision"].to_string(), revision);
    }
    let ended = test_server.run(&node, "/fixtures/ported/v1", json!({ "map": "floor" })).await;
    let (reason, details) = ended.failed();
    assert_eq!((reason, &details["retryable"]), ("runner failed: a merge needs at least one scan", &json!(false)));
    node.stop().await;
}

#[tokio::test]
async fn one_file_serves_as_two_plugins() {
    let test_server = TestServer::start().await;
    let file = r#"
        [[plugin]]
        name = "formal"
        file = "libc-instances.so"
        capabilities = ["/fixtures/instance-a/v1"]
        config = { greeting = "Good day" }
        [[plugin]]
        name = "casual"
        file = "libc-instances.so"
        capabilities = ["/fixtures/instance-b/v1"]
        config = { greeting = "hi" }
    "#;
    let node = test_server.node(&[fixtures::c("instances", &[])]).plugins_file(file).leasing().await;
    for (number, name, capability, greeting) in
        [(1, "formal", "/fixtures/instance-a/v1", "Good day"), (2, "casual", "/fixtures/instance-b/v1", "hi")]
    {
        test_server.run(&node, capability, json!({})).await.completed();
        let line = node.line(|line| line["message"] == "a task runs" && line["plugin"] == name).await;
        // The number counts the instances in one copy of the library's statics: it was opened once.
        let expected = json!({ "instance": number, "config": { "greeting": greeting }, "serves": capability, "of": 1 });
        for (key, value) in expected.as_object().expect("an object") {
            assert_eq!(&line[key], value, "{line}");
        }
    }
    let plugins = node.status().await["plugins"].clone();
    let names: Vec<&serde_json::Value> = plugins.as_array().expect("a list").iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["formal", "casual"]);
    node.stop().await;
}

#[tokio::test]
async fn plugin_of_a_later_sdk_loads() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::newer_sdk()]).await;
    test_server.run(&node, "/fixtures/newer-sdk/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn foreign_and_own_plugins_serve_together() {
    let test_server = TestServer::start().await;
    let plugins = [fixtures::independent(), fixtures::c("hello", &[]), fixtures::hello(), fixtures::zoo()];
    let node = test_server.node(&plugins).set("MAX_CONCURRENCY", "4").leasing().await;
    let capabilities =
        ["/fixtures/independent/v1", "/fixtures/c-hello/v1", "/examples/hello/v1", "/fixtures/tokio-net/v1"];
    let input = test_server.put("who", b"all").await;
    let jobs: Vec<_> = (0..5)
        .flat_map(|_| capabilities)
        .map(|capability| test_server.task(capability).inputs(&[input]).submit())
        .collect();
    for job in jobs {
        test_server.ended(&node, job).await.completed();
    }
    assert_eq!(node.status().await["stale_calls"], 0);
    node.stop().await;
    assert_eq!(node.said("task.ended").len(), 20);
}
