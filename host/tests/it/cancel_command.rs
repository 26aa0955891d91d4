//! `runner-host cancel`: an operator ends a task.

use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use serde_json::{Value, json};

use crate::{
    both_planes::{Plane, Submitted},
    harness::{
        TestServer,
        fault_proxy::{Bad, FaultProxy},
        fixtures,
        node::{Cli, Finished, NodeSetup, TestNode},
    },
};

/// A file that no test creates.
const NEVER: &str = "/never";

/// Runs the command on this state folder.
async fn cancel_in(state_dir: &Path, words: &[&str], code: i32) -> Finished {
    let cli = words.iter().fold(Cli::new(&["cancel"]).set("RUST_LOG", ""), |cli, word| cli.arg(*word));
    cli.set("STATE_DIR", state_dir.to_string_lossy()).run().await.expect(code)
}

/// Runs the command for a node, and returns the line that it printed.
async fn cancel(node: &TestNode, words: &[&str], code: i32) -> String {
    let Finished { stdout, stderr, .. } = cancel_in(node.state_dir(), words, code).await;
    assert!(stdout.is_empty() || stderr.is_empty(), "{stdout}\n{stderr}");
    stdout + &stderr
}

fn id_of(task: &Value) -> &str {
    task["id"].as_str().expect("an id")
}

/// Waits until the node has a task in this stage, and returns its id.
async fn task_in(node: &TestNode, state: &str) -> String {
    let of = |page: &Value| {
        let mut tasks = page["tasks"].as_object()?.iter();
        tasks.find(|(_, task)| task["state"] == state).map(|(id, _)| id.clone())
    };
    let (_, page) = node.page_until("/status.json", |page| of(&page.1).is_some()).await;
    of(&page).expect("it was there")
}

#[tokio::test]
async fn cancelled_task_fails_and_is_not_retryable() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let job = test_server.task("/fixtures/polls-cancel/v1").submit();
    let task = test_server.started(&node, job).await;
    // A UUID may have any usual form.
    let said = cancel(&node, &[&id_of(&task).to_uppercase()], 0).await;
    let id = id_of(&task);
    assert_eq!(said, format!("task {id} of posemesh is cancelled and fails, its runner has CANCEL_GRACE to return"));
    assert!(node.says_text("flag seen").await.to_string().contains("Operator"));
    let ended = test_server.ended(&node, job).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "cancelled by operator");
    assert_eq!(
        json!([details["outcome"], details["code"], details["retryable"]]),
        json!(["cancelled", "cancelled_by_operator", false]),
        "{details}"
    );
    let line = node.says("task.cancelled_by_operator").await;
    assert_eq!((line["task_id"].as_str(), &line["plane"]), (Some(id), &json!("posemesh")), "{line}");
    let line = node.says_ended("accepted").await;
    assert_eq!((&line["outcome"], &line["reason"]), (&json!("cancelled"), &json!("cancelled by operator")), "{line}");
    assert_eq!(cancel(&node, &[id], 1).await, format!("error: task {id} has ended (cancelled)"));
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn cancel_command_gives_a_stuck_runner_up() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("CANCEL_GRACE", "100ms").leasing().await;
    let job = test_server.task("/fixtures/ignores-cancel/v1").meta(json!({ "file": NEVER })).submit();
    let task = test_server.started(&node, job).await;
    let said = cancel(&node, &[id_of(&task), "-o", "json"], 0).await;
    let said: Value = serde_json::from_str(&said).expect("JSON");
    let expected = json!({ "task_id": task["id"], "plane": "posemesh", "capability": "/fixtures/ignores-cancel/v1", "cancel_reason": "operator" });
    assert_eq!(said, expected);
    assert_eq!(node.says("runner.stuck").await["strikes"], 1);
    assert_eq!(test_server.ended(&node, job).await.failed().0, "cancelled by operator");
    node.kill();
}

#[tokio::test]
async fn completion_after_the_command_does_not_count() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("CANCEL_GRACE", "20s").leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let job = test_server.task("/fixtures/ignores-cancel/v1").meta(json!({ "file": file })).submit();
    let task = test_server.started(&node, job).await;
    cancel(&node, &[id_of(&task)], 0).await;
    // A second command changes nothing.
    cancel(&node, &[id_of(&task)], 0).await;
    std::fs::write(&file, "").expect("the folder is writable");
    assert_eq!(test_server.ended(&node, job).await.failed().0, "cancelled by operator");
    assert_eq!(node.said("task.cancelled_by_operator").len(), 1);
    assert!(node.said("runner.stuck").is_empty());
    node.stop().await;
}

#[tokio::test]
async fn cancel_counts_until_the_report_begins() {
    let test_server = TestServer::with(|config| {
        config.request_max_bytes = 100_000;
        config.part_size = 64 * 1024;
    });
    let test_server = test_server.await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    // The runner completes while the abort of its upload gets no answer.
    let (gate, held) = Bad::gate();
    let abort = "DELETE /api/v1/domains/*/data/multipart";
    proxy.answer(abort, 1, held);
    let job = test_server.task("/fixtures/drop-writer/v1").submit();
    proxy.seen(abort, 1).await;
    proxy.seen("POST /api/v1/domains/*/data", 1).await;
    tokio::time::sleep(Duration::from_millis(300)).await; // no event tells that the runner has returned
    cancel(&node, &[&task_in(&node, "running").await], 0).await;
    gate.cancel();
    let ended = test_server.ended(&node, job).await;
    let (reason, details) = ended.failed();
    assert_eq!((reason, &details["artifacts"][0]["logical_path"]), ("cancelled by operator", &json!("kept.txt")));
    node.stop().await;
}

#[tokio::test]
async fn task_that_waits_for_its_plugin_is_cancelled() {
    let test_server = TestServer::start().await;
    let file = "[[plugin]]\nfile = \"zoo\"\nmax_concurrency = 1\n";
    let node = test_server.node(&[fixtures::zoo()]).plugins_file(file).set("MAX_CONCURRENCY", "2").leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let wait = || test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": go })).submit();
    let first = wait();
    test_server.started(&node, first).await;
    let second = wait();
    let waiting = task_in(&node, "waiting").await;
    cancel(&node, &[&waiting], 0).await;
    assert_eq!(test_server.ended(&node, second).await.failed().0, "cancelled by operator");
    std::fs::write(&go, "").expect("the folder is writable");
    test_server.ended(&node, first).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn local_job_without_a_slot_is_cancelled() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    for id in ["a", "b"] {
        plane.put_job(id, &json!({ "capability": "/fixtures/wait-file/v1", "meta": { "file": NEVER } }));
        task_in(&node, if id == "a" { "running" } else { "waiting" }).await;
    }
    for id in ["b", "a"] {
        cancel(&node, &[id, "--plane", "jobs"], 0).await;
        plane.result(&node, &Submitted::File(id.to_owned())).await;
        let done = plane.done(id).expect("a result");
        let expected = json!(["cancelled", "cancelled_by_operator", "cancelled by operator", false]);
        assert_eq!(json!([done["outcome"], done["code"], done["reason"], done["retryable"]]), expected, "{done}");
    }
    node.stop().await;
}

#[cfg(feature = "grpc")]
#[tokio::test]
async fn cancelled_grpc_run_fails() {
    use crate::harness::node_plane::{NodePlane, lease};
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::zoo()], "").leasing().await;
    plane.send(&node, lease("run", "/fixtures/wait-file/v1", &[], &[("file", NEVER)])).await;
    task_in(&node, "running").await;
    cancel(&node, &["run"], 0).await;
    let sent = plane.failed(&node, "run").await;
    assert_eq!((sent.error_message.as_str(), sent.retryable), ("cancelled by operator", false), "{sent:?}");
    let details: Value = serde_json::from_str(&sent.error_details).expect("JSON");
    assert_eq!(details, json!({ "outcome": "cancelled", "code": "cancelled_by_operator" }));
    node.stop().await;
}

#[tokio::test]
async fn task_set_up_without_an_answer_is_cancelled() {
    // A third of the lease passes before a heartbeat without an answer ends. Only then may the report follow.
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(6)).await;
    let proxy = FaultProxy::before(&test_server).await;
    // Without a domain the runner waits for the first heartbeat, which gets no answer.
    proxy.answer("GET /v1/tasks", usize::MAX, Bad::edit(|lease| lease["domain_id"] = Value::Null));
    proxy.answer("POST /v1/tasks/*/heartbeat", usize::MAX, Bad::Hang);
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    test_server.task("/fixtures/ok/v1").submit();
    let id = task_in(&node, "setting-up").await;
    cancel(&node, &[&id], 0).await;
    node.line(|line| line["event"] == "task.ended" && line["outcome"] == "cancelled").await;
    node.kill();
}

#[tokio::test]
async fn ended_and_unknown_tasks_are_named() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let (gate, held) = Bad::gate();
    proxy.answer("POST /v1/tasks/*/complete", 1, held);
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let state = node.state_dir().canonicalize().expect("a folder");
    let job = test_server.task("/fixtures/ok/v1").submit();
    let id = task_in(&node, "reporting").await;
    let said = cancel(&node, &[&id], 1).await;
    assert_eq!(said, format!("error: task {id} has ended, its report is being sent"));
    gate.cancel();
    test_server.ended(&node, job).await.completed();
    node.says_ended("accepted").await;
    assert_eq!(cancel(&node, &[&id], 1).await, format!("error: task {id} has ended (completed)"));
    let said = cancel(&node, &["other"], 1).await;
    let start = "error: the node of ";
    let end = " has no task other; /status.json shows its tasks, --state-dir names the folder of another node";
    assert!(said.starts_with(start) && said.ends_with(end), "{said}");
    assert!(said.contains(&*state.to_string_lossy()), "{said}");
    let said = cancel(&node, &[&id, "--plane", "runs"], 2).await;
    assert_eq!(said, "error: --plane: the node has no such control plane, it has posemesh");
    node.stop().await;
}

#[tokio::test]
async fn earlier_cancel_reason_is_named() {
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(2)).await;
    let node = test_server.node(&[fixtures::zoo()]).set("CANCEL_GRACE", "20s").leasing().await;
    let files = tempfile::tempdir().expect("a folder");
    let file = files.path().join("go");
    let job = test_server.task("/fixtures/ignores-cancel/v1").meta(json!({ "file": file })).submit();
    let task = test_server.started(&node, job).await;
    assert!(test_server.dev_server.cancel_job(job));
    node.says("task.cancelled").await;
    node.says_text("cancel ignored").await;
    let said = cancel(&node, &[id_of(&task)], 0).await;
    assert_eq!(said, format!("task {} of posemesh was already cancelled (plane)", id_of(&task)));
    std::fs::write(&file, "").expect("the folder is writable");
    node.says_ended("none").await;
    assert!(node.said("task.cancelled_by_operator").is_empty());
    node.stop().await;
}

#[tokio::test]
async fn same_id_on_two_planes_needs_the_plane() {
    let folders = [Plane::local(), Plane::local()];
    let table = |name: &str, plane: &Plane| {
        format!("[plane.{name}]\nkind = \"local\"\nfolder = {:?}\n", plane.folder().display().to_string())
    };
    let config = table("left", &folders[0]) + &table("right", &folders[1]);
    let node = NodeSetup::with_config(&config, &[fixtures::zoo()]).set("MAX_CONCURRENCY", "2").leasing().await;
    for plane in &folders {
        plane.put_job("same", &json!({ "capability": "/fixtures/wait-file/v1", "meta": { "file": NEVER } }));
    }
    for plane in ["left", "right"] {
        node.line(|line| line["event"] == "task.started" && line["plane"] == plane).await;
    }
    let said = cancel(&node, &["same"], 2).await;
    assert_eq!(said, "error: several control planes have a task same; choose one with --plane: left, right");
    cancel(&node, &["same", "--plane", "right"], 0).await;
    let ended = node.line(|line| line["event"] == "task.ended").await;
    assert_eq!((&ended["plane"], &ended["outcome"]), (&json!("right"), &json!("cancelled")), "{ended}");
    cancel(&node, &["same"], 0).await;
    node.line(|line| line["event"] == "task.ended" && line["plane"] == "left").await;
    node.stop().await;
}

#[tokio::test]
async fn cancel_without_a_node_is_one_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let said = |path: &Path| {
        let path = path.display();
        format!("error: no node runs with the state folder {path}; name that of a node with --state-dir")
    };
    for path in [folder.path(), &folder.path().join("missing")] {
        assert_eq!(cancel_in(path, &["a"], 1).await.stderr, said(path));
    }
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "nothing was created");
    // A killed node leaves its lock file and its socket.
    let plane = Plane::local();
    let node = plane.node(&[fixtures::zoo()]).leasing().await;
    node.kill();
    node.wait().await;
    assert_eq!(cancel(&node, &["a"], 1).await, said(node.state_dir()));
}

#[tokio::test]
async fn cancel_names_why_the_node_is_not_reached() {
    let folder = tempfile::tempdir().expect("a folder");
    // A node without a socket holds the folder.
    let lock = std::fs::File::create(folder.path().join("lock")).expect("the folder is writable");
    lock.lock().expect("nobody else holds it");
    let said = cancel_in(folder.path(), &["a"], 75).await.stderr;
    let start =
        format!("error: try again later: the node at {}/control.sock does not answer: ", folder.path().display());
    assert!(said.starts_with(&start), "{said}");
    drop(lock);
    let hidden = folder.path().join("hidden");
    std::fs::create_dir(&hidden).expect("the folder is writable");
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o0)).expect("it is ours");
    let cli = Cli::new(&["cancel", "a"]).set("RUST_LOG", "").arg("--state-dir").arg(&hidden).obeys_permissions();
    let said = cli.run().await.expect(78).stderr;
    assert_eq!(said, format!("error: cannot open {}/lock: Permission denied (os error 13)", hidden.display()));
}
