//! The pages of a node.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::TestNode,
    within,
};

/// SHA-256 of the input `world` and of the output of `hello`.
const WORLD: &str = "486ea46224d1bb4fb680f34f7c9ad96a8f24ec88be73ea8e5a6c65260e9cb8a7";
const HELLO_WORLD: &str = "09ca7e4eaa6e8ae9c7d261167129184883644d07dfba7cbfbc4c8a2e08360d5b";

#[tokio::test]
async fn health_answers_and_ready_has_reasons() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer("POST /internal/v1/nodes/register-wallet", usize::MAX, Bad::Status(403, "not on the list"));
    let node = proxy.node(&[fixtures::hello()]).set("REGISTER_INTERVAL_SECS", "1").start().await;
    node.says("registration.failed").await;
    assert_eq!(node.page("/health").await.0, 200);
    let is_refused = |text: &str| text.starts_with("not signed in (") && text.contains("not on the list");
    let page = node.page_until("/ready", |page| page.1["reason"].as_str().is_some_and(is_refused)).await;
    assert_eq!((page.0, &page.1["ready"]), (503, &json!(false)));
    assert_eq!(proxy.count("GET /v1/tasks"), 0, "nothing is leased before the sign-in");
    proxy.heal();
    let ready = node.page_until("/ready", |page| page.0 == 200).await;
    assert_eq!(ready.1, json!({ "ready": true }));
    assert_eq!(node.page("/no-such-page").await.0, 404);
}

#[tokio::test]
async fn node_without_poll_answers_is_not_ready() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).set("REQUEST_TIMEOUT_SECS", "15").leasing().await;
    node.page_until("/ready", |page| page.0 == 200).await;
    proxy.answer("GET /v1/tasks", usize::MAX, Bad::Hang);
    let (_, page) = node.page_until("/ready", |page| page.0 == 503).await;
    assert_eq!(page["reason"], "the control plane does not answer the poll");
    assert_eq!(node.status().await["polls"], json!({ "failed": 0, "last_error": null, "unanswered": true }));
    proxy.heal();
    node.page_until("/ready", |page| page.0 == 200).await;
    assert_eq!(node.status().await["polls"], json!({ "failed": 0, "last_error": null, "unanswered": false }));
}

#[tokio::test]
async fn node_with_failed_polls_is_not_ready() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::hello()]).leasing().await;
    node.page_until("/ready", |page| page.0 == 200).await;
    proxy.answer("GET /v1/tasks", usize::MAX, Bad::Status(404, "nothing here"));
    let (_, page) = node.page_until("/ready", |page| page.0 == 503).await;
    let reason = page["reason"].as_str().expect("a reason");
    let (start, end) = ("the last ", "it usually ends in /v1: nothing here");
    assert!(
        reason.starts_with(start) && reason.contains(" polls of the control plane failed: ") && reason.ends_with(end),
        "{reason}"
    );
    let polls = node.status().await["polls"].clone();
    assert!(polls["failed"].as_u64().is_some_and(|failed| failed >= 3), "{polls}");
    assert!(polls["last_error"].as_str().is_some_and(|err| reason.contains(err)), "{polls}");
    // The log shows it too.
    let line = node.says("poll.failed").await;
    let remedy = "control plane answered 404 to the poll; check the path of DMS_BASE_URL, it usually ends in /v1";
    assert!(line["error"].as_str().is_some_and(|err| err.starts_with(remedy)), "{line}");
    proxy.heal();
    node.page_until("/ready", |page| page.0 == 200).await;
    assert_eq!(node.status().await["polls"], json!({ "failed": 0, "last_error": null, "unanswered": false }));
    // A single failure changes nothing.
    proxy.answer("GET /v1/tasks", 1, Bad::Status(503, "later"));
    node.line(|line| line["error"].as_str().is_some_and(|err| err.contains("503"))).await;
    assert_eq!(node.page("/ready").await.0, 200);
    node.stop().await;
}

#[tokio::test]
async fn full_node_with_failed_heartbeats_is_not_ready() {
    // Long enough for three failed heartbeats on a busy machine, and short enough that the first comes soon.
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(10)).await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let task = |name: &str| test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": files.path().join(name) }));
    let job = task("first").submit();
    let id = test_server.started(&node, job).await["id"].as_str().expect("an id").to_owned();
    assert_eq!(node.page("/ready").await.0, 200);
    proxy.answer("POST /v1/tasks/*/heartbeat", usize::MAX, Bad::Status(503, "under repair"));
    let (_, page) = node.page_until("/ready", |page| page.0 == 503).await;
    let reason = page["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("the last ") && reason.contains(" heartbeats of a lease failed: "), "{reason}");
    let shown = node.status().await["tasks"][&id].clone();
    assert!(shown["heartbeats_failed"].as_u64().is_some_and(|failed| failed >= 3), "{shown}");
    let error = shown["heartbeat_error"].as_str().expect("an error");
    assert!(error.contains("503") && reason.ends_with(error), "{reason}: {shown}");
    proxy.heal();
    node.page_until("/ready", |page| page.0 == 200).await;
    let shown = node.status().await["tasks"][&id].clone();
    assert!(shown["state"] == "running" && shown["heartbeats_failed"] == 0, "{shown}");
    std::fs::write(files.path().join("first"), "").expect("the folder is writable");
    test_server.ended(&node, job).await.completed();
}

#[tokio::test]
async fn status_page_shows_running_and_ended_tasks() {
    let test_server = TestServer::start().await;
    let files = tempfile::tempdir().expect("a folder");
    let refused = files.path().join("broken.so");
    std::fs::write(&refused, "no library").expect("the folder is writable");
    let node = test_server.node(&[fixtures::zoo(), refused]).set("MAX_CONCURRENCY", "2").leasing().await;
    test_server.run(&node, "/fixtures/fail/v1", json!({})).await.failed();
    node.says("task.ended").await;
    let job = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": files.path().join("go") })).submit();
    let task = test_server.started(&node, job).await;
    let status = node.status().await;
    assert_eq!(status["phase"], "running");
    assert_eq!(status["registration"], "registered");
    assert_eq!(status["slots"], 2);
    assert_eq!(status["unreported"], 0);
    assert_eq!(status["ended"], json!({ "failed": 1 }));
    assert!(status["version"].is_string() && status["started_at"].is_string(), "{status:#}");
    assert!(status["node"].as_str().is_some_and(|node| node.starts_with("0x") && node.len() == 42), "{status:#}");
    let shown = &status["tasks"][task["id"].as_str().expect("an id")];
    assert_eq!((&shown["capability"], &shown["state"]), (&json!("/fixtures/wait-file/v1"), &json!("running")));
    assert_eq!(shown["job_id"], json!(job));
    assert_eq!((&shown["plugin"], &shown["attempt"]), (&json!("zoo"), &json!(1)));
    assert_eq!(shown["domain_id"], json!(test_server.dev_server.domain_id()));
    let at = |key: &str| shown[key].as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok());
    let now = jiff::Timestamp::now();
    assert!(
        at("lease_expires_at").is_some_and(|at| at > now) && at("token_expires_at").is_some_and(|at| at > now),
        "{shown}"
    );
    assert!(at("progress_at").is_some_and(|at| at <= now && Some(at) >= at_since(shown)), "{shown}");
    assert!(shown.get("progress").is_none(), "what a runner reports is not for everyone: {shown}");
    let plugins = status["plugins"].as_array().expect("plugins");
    assert_eq!(plugins.len(), 2);
    let states: Vec<&str> = plugins.iter().filter_map(|plugin| plugin["state"].as_str()).collect();
    assert!(states.contains(&"loaded") && states.contains(&"refused"), "{states:?}");
    assert!(!status.to_string().contains(&node.key), "no secret on a page");
}

#[tokio::test]
async fn domain_of_the_set_up_heartbeat_is_shown() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let without = Bad::edit(|lease| {
        if lease["task"].is_object() {
            lease["domain_id"] = serde_json::Value::Null;
        }
    });
    proxy.answer("GET /v1/tasks", usize::MAX, without);
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let job = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": go })).submit();
    let task = test_server.started(&node, job).await;
    let id = task["id"].as_str().expect("an id");
    let (domain, status) = (json!(test_server.dev_server.domain_id()), node.status().await);
    assert_eq!(status["tasks"][id]["domain_id"], domain, "{status:#}");
    std::fs::write(&go, "").expect("the folder is writable");
    test_server.ended(&node, job).await.completed();
    let ended = node.says("task.ended").await;
    assert_eq!((&ended["task_id"], &ended["domain_id"]), (&json!(id), &domain), "{ended}");
    assert!(node.says("task.started").await.get("domain_id").is_none(), "the lease did not say it");
    node.stop().await;
}

fn at_since(shown: &serde_json::Value) -> Option<jiff::Timestamp> {
    // The page has whole milliseconds, this value is exact.
    let since: jiff::Timestamp = shown["since"].as_str()?.parse().ok()?;
    jiff::Timestamp::from_millisecond(since.as_millisecond() - 1).ok()
}

#[tokio::test]
async fn ended_task_shows_sizes_and_digests() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::hello()]).leasing().await;
    let input = test_server.put("who", b"world").await;
    let job = test_server.task("/examples/hello/v1").inputs(&[input]).submit();
    let ended = test_server.ended(&node, job).await;
    let id = ended.completed().artifacts()["outputs/hello.bin"]["id"].clone();
    let page = node.page_until("/status.json", |page| page.1["recent"][0]["report"] == "accepted").await.1;
    let record = &page["recent"][0];
    assert_eq!((&record["task_id"], &record["job_id"]), (&ended.task()["id"], &json!(job)));
    assert_eq!((&record["outcome"], &record["code"]), (&json!("completed"), &json!("ok")));
    let plugin = &page["plugins"][0];
    assert_eq!((&record["plugin"], &record["plugin_sha256"]), (&plugin["name"], &plugin["sha256"]));
    assert_eq!((&record["attempt"], &record["reason"]), (&json!(1), &serde_json::Value::Null));
    let (read, written) = (&record["inputs"][0], &record["artifacts"][0]);
    assert_eq!((&read["cid"], &read["size"], &read["sha256"]), (&json!(input), &json!(5), &json!(WORLD)));
    assert_eq!((&written["logical_path"], &written["id"]), (&json!("outputs/hello.bin"), &id));
    assert_eq!((&written["size"], &written["sha256"]), (&json!(12), &json!(HELLO_WORLD)));
    assert_eq!(
        (record["inputs"].as_array().map(Vec::len), record["artifacts"].as_array().map(Vec::len)),
        (Some(1), Some(1))
    );
    node.stop().await;
}

/// The answer of a page to a request for `host` on a new connection.
async fn ask(node: &TestNode, path: &str, host: &str) -> String {
    let mut visitor = TcpStream::connect(&node.address).await.expect("the system's queue takes it");
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    visitor.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    within(path, || node.log(), visitor.read_to_end(&mut answer)).await.expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

/// Opens `count` connections and sends half a request on each.
async fn slow(node: &TestNode, count: usize) -> Vec<TcpStream> {
    let mut visitors = Vec::new();
    for _ in 0..count {
        let mut visitor = TcpStream::connect(&node.address).await.expect("the system's queue takes it");
        // A write to a connection that is already closed fails.
        let _ = visitor.write_all(b"GET /health HTTP/1.1\r\nho").await;
        visitors.push(visitor);
    }
    visitors
}

#[tokio::test]
async fn status_keys_match_their_documentation() {
    let test_server = TestServer::start().await;
    let files = tempfile::tempdir().expect("a folder");
    let broken = files.path().join("broken.so");
    std::fs::write(&broken, "no library").expect("the folder is writable");
    let libraries = [fixtures::hello(), fixtures::zoo(), broken];
    let node = test_server.node(&libraries).set("MAX_CONCURRENCY", "2").leasing().await;
    let input = test_server.put("who", b"world").await;
    let job = test_server.task("/examples/hello/v1").inputs(&[input]).submit();
    test_server.ended(&node, job).await.completed();
    test_server.run(&node, "/fixtures/fail/v1", json!({})).await.failed();
    let go = files.path().join("go");
    let job = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": go })).submit();
    test_server.started(&node, job).await;
    let page = node.page_until("/status.json", |page| page.1["recent"].as_array().is_some_and(|all| all.len() == 2));
    let status = page.await.1;
    assert!(status["recent"][1]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{status:#}");
    std::fs::write(&go, "").expect("the folder is writable");
    test_server.ended(&node, job).await.completed();

    let text = include_str!("../../../docs/operations/status.md");
    let (_, table) = text.split_once("| key | type | meaning |\n|---|---|---|\n").expect("the table");
    let rows = table.lines().take_while(|line| line.starts_with('|')).map(|line| {
        let mut cells = line.split('|').map(str::trim).skip(1);
        (cells.next().expect("a key").trim_matches('`'), cells.next().expect("a type"))
    });
    let listed: std::collections::BTreeMap<&str, &str> = rows.collect();
    let mut shown = std::collections::BTreeMap::new();
    keys("", &status, &mut shown);
    let mut problems = Vec::new();
    for (key, kinds) in &shown {
        match listed.get(key.as_str()) {
            None => problems.push(format!("the page does not list {key}")),
            Some(kind) => problems.extend(
                kinds
                    .iter()
                    .filter(|found| !kind.contains(**found))
                    .map(|found| format!("{key} is {found}, not {kind}")),
            ),
        }
    }
    let missing = listed.iter().filter(|(key, kind)| !shown.contains_key(**key) && !kind.contains("(optional)"));
    problems.extend(missing.map(|(key, _)| format!("the node does not show {key}")));
    assert!(problems.is_empty(), "docs/operations/status.md:\n{}", problems.join("\n"));
    node.stop().await;
}

/// Every key below `value`, in the form of the documentation, with the types of its values.
fn keys<'a>(
    at: &str,
    value: &'a serde_json::Value,
    found: &mut std::collections::BTreeMap<String, std::collections::BTreeSet<&'a str>>,
) {
    use serde_json::Value;
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    };
    if !at.is_empty() && !at.ends_with("[]") {
        found.entry(at.to_owned()).or_default().insert(kind);
    }
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let name = if ["tasks", "ended", "planes"].contains(&at) { "*" } else { name };
                let below = if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
                keys(&below, member, found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| keys(&format!("{at}[]"), item, found)),
        _ => {}
    }
}

/// Other machines may reach the pages.
#[tokio::test]
async fn slow_connections_do_not_delay_others() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello()]).await;
    let began = Instant::now();
    let mut visitors = slow(&node, 400).await;
    let answer = ask(&node, "/health", "node").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    // Slow connections are closed after 5 s. No request has waited for that.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    // The first ones were closed for later ones of the same sender.
    let mut nothing = Vec::new();
    let closed = within("the end of a connection", || node.log(), visitors[0].read_to_end(&mut nothing)).await;
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn idle_connections_are_closed_by_pages() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello()]).await;
    let mut visitor = slow(&node, 1).await.remove(0);
    let mut nothing = Vec::new();
    let closed = within("the end of a connection", || node.log(), visitor.read_to_end(&mut nothing)).await;
    assert!(closed.is_ok(), "{closed:?}");
    node.stop().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn pages_answer_without_free_descriptors() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).open_files(128, 128).leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let (taken, go) = (files.path().join("taken"), files.path().join("go"));
    let job = test_server.task("/fixtures/take-files/v1").meta(json!({ "taken": taken, "file": go })).submit();
    // The runner cannot report, because no descriptor is left for a connection.
    let all_taken = async {
        while !taken.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within("a process without free descriptors", || node.log(), all_taken).await;
    // These connections use more than the reserve.
    let visitors = slow(&node, 20).await;
    for _ in 0..10 {
        let answer = ask(&node, "/ready", "node").await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"ready\":true"), "{answer}");
    }
    node.line(|line| line["event"] == "descriptors.exhausted").await;
    drop(visitors);
    std::fs::write(&go, "").expect("the folder is writable");
    test_server.ended(&node, job).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn status_page_answers_own_host_names_only() {
    let test_server = TestServer::start().await;
    let setup = test_server.node(&[fixtures::hello()]).set("REGISTRATION", "wallet");
    let node = setup.set("NODE_URL", "https://node.example:8443/below").leasing().await;
    for own in ["127.0.0.1", "127.0.0.1:8080", "[::1]:80", "localhost", "node.example:8443", "NODE.example"] {
        let answer = ask(&node, "/status.json", own).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"phase\""), "{own}: {answer}");
    }
    for other in ["evil.example", "evil.example:80", "node.example.evil.example", ""] {
        let answer = ask(&node, "/status.json", other).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.1 421 "), "{other}: {answer}");
        assert!(body.contains("use its IP address") && body.lines().count() == 1, "{other}: {answer}");
        // The pages for probes contain no facts of the node.
        assert!(ask(&node, "/ready", other).await.starts_with("HTTP/1.1 200 "), "{other}");
    }
    node.stop().await;
}

#[tokio::test]
async fn incomplete_request_does_not_delay_a_stop() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello()]).await;
    let mut client = TcpStream::connect(&node.address).await.expect("the pages answer");
    client.write_all(b"GET /health HTTP/1.1\r\nHo").await.expect("sent");
    // Sent later on the same listener. After its answer, the incomplete request is being read.
    assert_eq!(node.page("/health").await.0, 200);
    node.stop().await;
    drop(client);
}
