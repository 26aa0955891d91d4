//! No finished work is lost: reports are kept until the control plane accepts or permanently refuses them.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::{Cli, TestNode, can_mount},
};

const COMPLETE: &str = "POST /v1/tasks/*/complete";

/// Waits until no task runs and this many reports wait.
async fn waiting(node: &TestNode, count: usize) -> Value {
    let waits = |page: &Value| page["outbox"]["waiting"] == count && page["tasks"] == json!({});
    node.page_until("/status.json", |page| waits(&page.1)).await.1
}

/// Number of reports that the dev server has accepted.
fn accepted(test_server: &TestServer) -> usize {
    let journal = test_server.dev_server.journal();
    journal.iter().filter(|seen| seen.path.ends_with("/complete") && seen.status == 200).count()
}

#[tokio::test]
async fn reports_survive_long_outage_and_restart() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    // The leases of the dev server are longer, but the node gets an expiry in one second.
    let brief = || {
        Bad::edit(|answer| {
            let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1);
            answer["lease_expires_at"] = soon.to_string().into();
        })
    };
    proxy.answer("GET /v1/tasks", usize::MAX, brief());
    proxy.answer("POST /v1/tasks/*/heartbeat", usize::MAX, brief());
    proxy.answer(COMPLETE, usize::MAX, Bad::Cut);
    let node = proxy.node(&[fixtures::hello()]).set("MAX_CONCURRENCY", "2").leasing().await;
    let input = test_server.put("who", b"world").await;
    let jobs: Vec<_> = (0..5).map(|_| test_server.task("/examples/hello/v1").inputs(&[input]).submit()).collect();
    // A report is in the outbox shortly before its task is among the recent ones.
    let all =
        |page: &Value| page["outbox"]["waiting"] == 5 && page["recent"].as_array().is_some_and(|all| all.len() == 5);
    let status = node.page_until("/status.json", |page| all(&page.1)).await.1;
    assert!(status["outbox"]["last_error"].is_string() && status["outbox"]["oldest"].is_string(), "{status:#}");
    let records = status["recent"].as_array().expect("a list");
    assert_eq!(records.len(), 5);
    assert!(
        records.iter().all(|record| record["report"] == "waiting" && record["outcome"] == "completed"),
        "{status:#}"
    );
    tokio::time::sleep(Duration::from_secs(2)).await; // two more leases
    assert_eq!(accepted(&test_server), 0);
    // The process ends while reports wait.
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    assert_eq!(node.said("outbox.reports_left")[0]["reports"], 5);
    assert_eq!(node.said("report.waiting").len(), 1, "an outage is said once: {}", node.log());

    proxy.heal();
    let next = proxy.node(&[fixtures::hello()]).after(&node).leasing().await;
    for job in jobs {
        let ended = test_server.ended(&next, job).await;
        assert_eq!(ended.completed().task()["attempts"], 1, "nothing is done twice");
    }
    assert_eq!(accepted(&test_server), 5);
    waiting(&next, 0).await;
    next.stop().await;
    assert_eq!(next.said("report.delivered").len(), 5);
}

#[tokio::test]
async fn unanswered_report_counts_as_waiting_and_tried() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Hang);
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    // The first task ends at once. The second takes longer, and its report is written before the first try.
    for (count, nap) in [(1, 0), (2, 100)] {
        test_server.task("/fixtures/ignores-cancel/v1").meta(json!({ "sleep_ms": nap })).submit();
        proxy.seen(COMPLETE, count).await;
        let outbox = node.status().await["outbox"].clone();
        assert_eq!((&outbox["waiting"], &outbox["oldest_tries"]), (&json!(count), &json!(1)), "{outbox:#}");
        assert!(outbox["oldest"].is_string() && outbox["last_error"].is_null(), "{outbox:#}");
    }
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    let (listed, _) = self::outbox(&node, &["list"], 0).await;
    for report in listed.as_array().expect("a list") {
        // The attempt tries once, and the node tries again before its end. Without answers, one try is enough.
        assert!(report["attempts"].as_u64().is_some_and(|tries| tries >= 1), "{listed:#}");
        assert_eq!(report["last_error"], "the node stopped before the control plane answered", "{listed:#}");
    }
}

#[tokio::test]
async fn backlog_is_delivered_oldest_first_with_limited_concurrency() {
    const COUNT: usize = 20;
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    let jobs: Vec<_> = (0..COUNT).map(|_| test_server.task("/fixtures/ok/v1").submit()).collect();
    waiting(&node, COUNT).await;
    node.term();
    assert_eq!(node.wait().await, 75);
    let (listed, _) = outbox(&node, &["list"], 0).await;
    let tasks = listed.as_array().expect("a list").iter().map(|report| report["task_id"].as_str().expect("an id"));
    let tasks: Vec<String> = tasks.map(|task| format!("POST /v1/tasks/{task}/complete")).collect();

    proxy.heal();
    let (first, held) = Bad::gate();
    proxy.answer(COMPLETE, 1, held);
    let (others, held) = Bad::gate();
    proxy.answer(COMPLETE, usize::MAX, held);
    let before: Vec<usize> = tasks.iter().map(|task| proxy.count(task)).collect();
    let sent = |proxy: &FaultProxy| -> Vec<bool> {
        tasks.iter().zip(&before).map(|(task, before)| proxy.count(task) > *before).collect()
    };
    let so_far = before.iter().sum::<usize>();
    let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
    // The node first tries one report only.
    proxy.seen(COMPLETE, so_far + 1).await;
    assert_eq!(sent(&proxy).iter().position(|sent| !sent), Some(1));
    first.cancel();
    proxy.seen(COMPLETE, so_far + 9).await;
    // More reports than allowed could be sent in this time.
    next.page_until("/status.json", |page| page.1["outbox"]["waiting"] == COUNT - 1).await;
    let sent: Vec<usize> = (0..COUNT).filter(|at| sent(&proxy)[*at]).collect();
    assert_eq!(sent, (0..9).collect::<Vec<_>>(), "the oldest eight more, and each once");
    assert_eq!(proxy.count(COMPLETE), so_far + 9);
    others.cancel();
    for job in jobs {
        test_server.ended(&next, job).await.completed();
    }
    waiting(&next, 0).await;
    next.stop().await;
    assert_eq!(accepted(&test_server), COUNT);
}

#[tokio::test]
async fn node_token_refused_during_delivery_is_renewed() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, 3, Bad::Status(401, "no"));
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let job = test_server.task("/fixtures/ok/v1").submit();
    assert_eq!(test_server.ended(&node, job).await.completed().task()["attempts"], 1);
    let record = node.page_until("/status.json", |page| page.1["recent"][0]["report"] == "accepted").await.1;
    assert_eq!(record["outbox"]["waiting"], 0);
    assert!(proxy.count("POST /internal/v1/auth/siwe/verify") > 1, "it signed in anew");
    node.stop().await;
}

#[tokio::test]
async fn permanently_refused_report_is_logged_not_repeated() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, 1, Bad::Cut);
    proxy.answer(COMPLETE, 1, Bad::Status(410, "gone"));
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    test_server.task("/fixtures/ok/v1").submit();
    let line = node.says("report.refused").await;
    assert!(line["error"].as_str().is_some_and(|text| text.contains("410")), "{line}");
    let status = waiting(&node, 0).await;
    assert_eq!((&status["unreported"], &status["recent"][0]["report"]), (&json!(1), &json!("refused")));
    assert_eq!(status["outbox"]["last_error"], Value::Null);
    node.stop().await;
    assert_eq!(proxy.count(COMPLETE), 2);
}

#[tokio::test]
async fn report_retry_waits_for_retry_after() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, 1, Bad::Busy(429, 1));
    proxy.answer(COMPLETE, 1, Bad::Busy(503, 1));
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let job = test_server.task("/fixtures/ok/v1").submit();
    proxy.seen(COMPLETE, 1).await;
    let began = Instant::now();
    test_server.ended(&node, job).await.completed();
    assert!(began.elapsed() >= Duration::from_millis(1900), "two seconds were asked for: {:?}", began.elapsed());
    assert_eq!(proxy.count(COMPLETE), 3);
    node.stop().await;
}

// posemesh.md section 9: while heartbeats work, a long wait for acceptance causes no second run.
#[tokio::test]
async fn heartbeats_continue_until_report_is_accepted() {
    const HEARTBEAT: &str = "POST /v1/tasks/*/heartbeat";
    let ttl = Duration::from_secs(1);
    let test_server = TestServer::with(|config| config.lease_ttl = ttl).await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    let job = test_server.task("/fixtures/ok/v1").set("max_attempts", json!(5)).submit();
    node.says_ended("waiting").await;
    let began = Instant::now();
    // The slot is free during the wait.
    test_server.run(&node, "/fixtures/fail/v1", json!({})).await.failed();
    tokio::time::sleep((ttl * 3).saturating_sub(began.elapsed())).await; // three lengths of the lease
    proxy.heal();
    let ended = test_server.ended(&node, job).await;
    assert_eq!(ended.completed().task()["attempts"], 1, "{:#}", ended.0);
    assert_eq!(ended.0["receipts"].as_array().map(Vec::len), Some(1), "{:#}", ended.0);
    waiting(&node, 0).await;
    let beats = proxy.count(HEARTBEAT);
    assert!(beats >= 8, "{beats} heartbeats in three lengths of a lease");
    tokio::time::sleep(ttl).await; // not an event: nothing may happen
    assert_eq!(proxy.count(HEARTBEAT), beats, "no heartbeat for what is accepted");
    assert!(node.said("lease.lost").is_empty(), "{}", node.log());
    node.stop().await;
}

#[tokio::test]
async fn waiting_report_uses_new_id_after_heartbeat_rename() {
    let other = "11111111-2222-4333-8444-555555555555";
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(1)).await;
    let proxy = FaultProxy::before(&test_server).await;
    let complete = format!("POST /v1/tasks/{other}/complete");
    // The test answers calls for the new name: the dev server knows only the old name.
    proxy.answer(&complete, 1, Bad::Json(json!({})));
    proxy.answer(&format!("POST /v1/tasks/{other}/heartbeat"), usize::MAX, Bad::Json(json!({})));
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    test_server.task("/fixtures/ok/v1").submit();
    waiting(&node, 1).await;
    proxy.answer("POST /v1/tasks/*/heartbeat", usize::MAX, Bad::Json(json!({ "task_id": other })));
    let line = node.says("report.delivered").await;
    assert_eq!((line["task_id"].as_str(), proxy.count(&complete)), (Some(other), 1), "{}", node.log());
    node.page_until("/status.json", |page| page.1["recent"][0]["report"] == "accepted").await;
    node.stop().await;
}

#[tokio::test]
async fn stopping_node_retries_report_before_exit() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let (gate, held) = Bad::gate();
    proxy.answer(COMPLETE, 1, held);
    proxy.answer(COMPLETE, 1, Bad::Cut);
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let job = test_server.task("/fixtures/ok/v1").submit();
    proxy.seen(COMPLETE, 1).await;
    // The first try hangs when the second signal arrives. The second try fails.
    node.term();
    node.says("node.draining").await;
    node.term();
    assert_eq!(node.wait().await, 75, "tasks were cut short: {}", node.log());
    drop(gate);
    test_server.ended(&node, job).await.completed();
    assert_eq!(proxy.count(COMPLETE), 3);
    assert!(node.said("outbox.reports_left").is_empty(), "{}", node.log());
}

#[tokio::test]
async fn stopping_node_repeats_no_unanswered_report() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let (gate, held) = Bad::gate();
    proxy.answer(COMPLETE, 1, Bad::Status(503, "later"));
    proxy.answer(COMPLETE, 1, held);
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let job = test_server.task("/fixtures/ok/v1").submit();
    // The outbox sends the second try. Its answer does not arrive before the exit.
    proxy.seen(COMPLETE, 2).await;
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    assert_eq!(proxy.count(COMPLETE), 2, "{}", node.log());
    node.says("outbox.reports_left").await;
    drop(gate);
    test_server.ended(&node, job).await.completed();
}

#[tokio::test]
async fn stopping_node_does_not_wait_for_stored_reports() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Hang);
    let node = proxy.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "10m").leasing().await;
    let job = test_server.task("/fixtures/ok/v1").submit();
    proxy.seen(COMPLETE, 1).await;
    node.term();
    // The test has a limit for this that is far below ten minutes.
    assert_eq!(node.wait().await, 75, "{}", node.log());
    assert_eq!(node.said("outbox.reports_left")[0]["reports"], 1);
    proxy.heal();
    let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
    assert_eq!(test_server.ended(&next, job).await.completed().task()["attempts"], 1);
    next.stop().await;
}

#[tokio::test]
async fn full_outbox_pauses_leasing_until_space_is_free() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).set("OUTBOX_MAX", "2").leasing().await;
    let jobs: Vec<_> = (0..3).map(|_| test_server.task("/fixtures/ok/v1").submit()).collect();
    node.says("outbox.full").await;
    let reason = "the outbox is full: 2 reports wait for the control plane";
    node.page_until("/ready", |page| page.0 == 503 && page.1["reason"] == reason).await;
    assert_eq!(node.status().await["outbox"]["full"], true);
    assert_eq!(
        test_server.dev_server.job(jobs[2]).expect("a job")["job"]["status"],
        "pending",
        "nothing new is leased"
    );
    proxy.heal();
    for job in jobs {
        test_server.ended(&node, job).await.completed();
    }
    node.says("outbox.has_room").await;
    node.page_until("/ready", |page| page.0 == 200).await;
    node.stop().await;
}

/// When the file of the outbox was last written.
fn written(node: &TestNode) -> std::time::SystemTime {
    let file = std::fs::metadata(node.state_dir().join("outbox.redb")).expect("there");
    file.modified().expect("a file system with times")
}

#[tokio::test]
async fn report_accepted_at_once_needs_no_disk_write() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    // On a busy machine an answer can be late. Then the report is written, which is correct.
    let mut unwritten = 0;
    for _ in 0..50 {
        let before = written(&node);
        let job = test_server.task("/fixtures/ok/v1").submit();
        test_server.ended(&node, job).await.completed();
        node.page_until("/status.json", |page| page.1["tasks"] == json!({})).await;
        unwritten += usize::from(written(&node) == before);
    }
    assert!(unwritten > 0, "every report was written: {}", node.log());
    node.stop().await;
}

#[tokio::test]
async fn unanswered_report_is_written_to_disk() {
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(600)).await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Hang);
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    let first = test_server.task("/fixtures/ok/v1").submit();
    proxy.seen(COMPLETE, 1).await;
    // The one slot serves the next task only after the first report is on the disk.
    test_server.task("/fixtures/ok/v1").submit();
    proxy.seen(COMPLETE, 2).await;
    node.kill();
    node.wait().await;
    proxy.heal();
    let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
    // Its lease has not expired, so the report is from the disk.
    let ended = test_server.ended(&next, first).await;
    assert_eq!(ended.completed().task()["attempts"], 1, "{}", next.log());
    assert_eq!(ended.0["receipts"].as_array().map(Vec::len), Some(1));
    next.stop().await;
}

#[tokio::test]
async fn node_crash_with_unwritten_report_yields_one_receipt() {
    for held in [Bad::Hang, Bad::gate().1] {
        let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(2)).await;
        let proxy = FaultProxy::before(&test_server).await;
        proxy.answer(COMPLETE, usize::MAX, held);
        let node = proxy.node(&[fixtures::zoo()]).leasing().await;
        let job = test_server.task("/fixtures/ok/v1").set("max_attempts", json!(3)).submit();
        proxy.seen(COMPLETE, 1).await;
        node.kill();
        node.wait().await;
        proxy.heal();
        let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
        let ended = test_server.ended(&next, job).await;
        assert_eq!(ended.completed().0["receipts"].as_array().map(Vec::len), Some(1), "{}", next.log());
        next.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 0 && page.1["tasks"] == json!({})).await;
        next.stop().await;
    }
}

#[tokio::test]
async fn unanswered_report_does_not_block_its_slot() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let (gate, held) = Bad::gate();
    proxy.answer(COMPLETE, 1, held);
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    let first = test_server.task("/fixtures/ok/v1").submit();
    proxy.seen(COMPLETE, 1).await;
    // Its report hangs. The one slot serves the next task.
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    gate.cancel();
    test_server.ended(&node, first).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn state_files_logs_and_reports_contain_no_token() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let token = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let seen = std::sync::Arc::clone(&token);
    proxy.answer(
        "GET /v1/tasks",
        usize::MAX,
        Bad::edit(move |lease| {
            if let Some(text) = lease["access_token"].as_str() {
                *seen.lock().expect("nobody panics") = text.to_owned();
            }
        }),
    );
    proxy.answer("POST /v1/tasks/*/fail", usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).plugins_file("[[plugin]]\nfile = \"zoo\"\ngrant = [\"token\"]\n");
    let node = node.leasing().await;
    let job = test_server.task("/fixtures/tells-token/v1").submit();
    waiting(&node, 1).await;
    node.kill();
    node.wait().await;
    let token = token.lock().expect("nobody panics").clone();
    assert!(token.len() > 20, "a token was seen");
    for file in std::fs::read_dir(node.state_dir()).expect("listed").flatten() {
        let Ok(bytes) = std::fs::read(file.path()) else { continue };
        for secret in [token.as_str(), node.key.as_str(), "a-registration-secret"] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{} holds a secret", file.path().display());
        }
        let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().expect("there").permissions());
        assert_eq!(mode & 0o077, 0, "{} is for others to read", file.path().display());
    }
    assert!(!node.log().contains(&token), "{}", node.log());
    proxy.heal();
    let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
    let ended = test_server.ended(&next, job).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "runner failed: refused with (token)");
    assert_eq!(details["details"], json!({ "header": "Bearer (token)" }));
    next.stop().await;
}

#[tokio::test]
async fn second_node_on_same_state_folder_is_refused() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::hello()]).await;
    let dir = node.state_dir().to_string_lossy().into_owned();
    let said = test_server.node(&[fixtures::hello()]).set("STATE_DIR", dir.as_str()).set("LOG_FORMAT", "text");
    let said = said.refused().await.expect(75);
    let wanted = format!("error: STATE_DIR cannot be used: {dir} is in use by another node (process ");
    let lines: Vec<&str> = said.stderr.lines().filter(|line| line.starts_with("error")).collect();
    assert!(lines.len() == 1 && lines[0].starts_with(&wanted), "{}", said.stderr);
    node.stop().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_string_lossy().into_owned();
    let said = test_server.node(&[fixtures::hello()]).set("STATE_DIR", path.as_str()).refused().await.expect(78);
    assert_eq!(said.stderr, format!("error: STATE_DIR: expected a folder, found a file at {path}"));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn node_accepts_commands_with_long_state_path() {
    let test_server = TestServer::start().await;
    let base = tempfile::tempdir().expect("a folder");
    let long = base.path().join("a".repeat(120)).join("b".repeat(120));
    let node = test_server.node(&[fixtures::hello()]).set("STATE_DIR", long.to_string_lossy()).leasing().await;
    let list = || Cli::new(&["outbox", "list", "--state-dir"]).arg(&long).run();
    let said = list().await.expect(0);
    assert_eq!(said.stderr.lines().last(), Some("the outbox is empty"), "{}", said.stderr);
    assert!(node.said("control.no_socket").is_empty());
    node.stop().await;
    assert!(!long.join("control.sock").exists(), "the socket goes with its node");
}

#[tokio::test]
async fn node_moves_damaged_outbox_file_and_continues() {
    let test_server = TestServer::start().await;
    let state = tempfile::tempdir().expect("a folder");
    std::fs::write(state.path().join("outbox.redb"), "no database").expect("written");
    let node = test_server.node(&[fixtures::hello()]).set("STATE_DIR", state.path().to_string_lossy()).leasing().await;
    let line = node.says("outbox.damaged").await;
    assert_eq!(line["level"], "ERROR");
    let aside = line["moved_to"].as_str().expect("a path");
    assert_eq!(std::fs::read(aside).expect("kept"), b"no database");
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    node.stop().await;
}

/// A device simulates a disk with errors.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn inaccessible_outbox_file_is_not_treated_as_damaged() {
    let test_server = TestServer::start().await;
    let state = tempfile::tempdir().expect("a folder");
    let file = state.path().join("outbox.redb");
    std::os::unix::fs::symlink("/dev/full", &file).expect("made");
    let node = test_server.node(&[fixtures::hello()]).set("STATE_DIR", state.path().to_string_lossy());
    let node = node.set("LOG_FORMAT", "text").refused().await;
    let said = node.stderr.lines().filter(|line| line.starts_with("error: ")).collect::<Vec<_>>();
    let start = format!("error: STATE_DIR cannot be used: cannot open {}: ", file.display());
    assert!(said.len() == 1 && said[0].starts_with(&start), "{}", node.stderr);
    assert!([75, 78].contains(&node.code), "{node:?}");
    let left = std::fs::read_dir(state.path()).expect("listed").flatten().map(|entry| entry.file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().contains("damaged")), "nothing is set aside");
}

const MADE_AGAIN: &str = "state.recreated";

#[tokio::test]
async fn removed_state_folder_is_recreated_with_waiting_reports() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let first = test_server.task("/fixtures/ok/v1").submit();
    waiting(&node, 1).await;
    std::fs::remove_dir_all(node.state_dir()).expect("removed");
    let second = test_server.task("/fixtures/ok/v1").submit();
    let line = node.says(MADE_AGAIN).await;
    assert_eq!(line["level"], "ERROR", "{line}");
    waiting(&node, 2).await;
    // Commands reach the node through the new folder, which only this user can open.
    let socket = node.state_dir().join("control.sock");
    node.page_until("/status.json", |_| socket.exists()).await;
    assert_eq!(outbox(&node, &["list"], 0).await.0.as_array().map(Vec::len), Some(2));
    let mode = std::fs::metadata(node.state_dir()).expect("there").permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o700);
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    assert_eq!(node.said("outbox.reports_left")[0]["reports"], 2);
    assert_eq!(node.said(MADE_AGAIN).len(), 1, "{}", node.log());
    proxy.heal();
    let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
    for job in [first, second] {
        assert_eq!(test_server.ended(&next, job).await.completed().task()["attempts"], 1, "nothing is done twice");
    }
    next.stop().await;
}

#[tokio::test]
async fn unwritable_outbox_stops_leasing_and_logs_lost_reports() {
    let test_server = TestServer::start().await;
    let base = tempfile::tempdir().expect("a folder");
    let state = base.path().join("state");
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).set("STATE_DIR", state.to_string_lossy()).leasing().await;
    let in_the_way = || {
        std::fs::remove_dir_all(&state).expect("removed");
        std::fs::write(&state, "in the way").expect("written");
    };
    in_the_way();
    let first = test_server.task("/fixtures/ok/v1").submit();
    let broken = "outbox.not_writable";
    assert_eq!(node.says(broken).await["level"], "ERROR");
    let page = node.page_until("/ready", |page| page.0 == 503).await.1;
    let reason = page["reason"].as_str().unwrap_or_default();
    assert!(reason.starts_with("the outbox cannot be written: cannot make "), "{reason}");
    waiting(&node, 1).await;
    let second = test_server.task("/fixtures/ok/v1").submit();
    // The pause after a failed report is longer than several pauses between polls.
    proxy.seen(COMPLETE, proxy.count(COMPLETE) + 2).await;
    assert_eq!(test_server.dev_server.job(second).expect("a job")["job"]["status"], "pending", "nothing new is leased");
    std::fs::remove_file(&state).expect("removed");
    // The node detects this without a restart. Then it leases the second task.
    node.says("outbox.writable").await;
    waiting(&node, 2).await;
    assert_eq!(node.page("/ready").await.0, 200);
    assert_eq!(node.said(broken).len(), 1, "{}", node.log());
    in_the_way();
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    let lost = node.said("outbox.reports_lost");
    assert_eq!((&lost[0]["level"], &lost[0]["lost"]), (&json!("ERROR"), &json!(2)), "{lost:?}");
    let tasks = [first, second].map(|job| test_server.dev_server.job(job).expect("a job")["tasks"][0]["id"].clone());
    assert_eq!(lost[0]["tasks"], tasks.map(|id| id.as_str().expect("an id").to_owned()).join(" "));
    assert!(node.said("outbox.reports_left").is_empty(), "{}", node.log());
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn full_disk_is_logged_once_until_space_returns() {
    if !can_mount() {
        return;
    }
    let test_server = TestServer::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).set("STATE_DIR", folder.path().to_string_lossy());
    let node = node.small_disk(folder.path()).leasing().await;
    // These reports make the file grow. Later reports can use the pages that they free.
    for _ in 0..20 {
        test_server.task("/fixtures/ok/v1").submit();
    }
    waiting(&node, 20).await;
    // The disk in the mount namespace of the node.
    let inside = PathBuf::from(format!("/proc/{}/root", node.pid()));
    let filler = inside.join(folder.path().strip_prefix("/").expect("an absolute path")).join("filler");
    let filled = File::create(&filler).and_then(|mut file| io::copy(&mut io::repeat(1), &mut file));
    assert_eq!(filled.map_err(|err| err.kind()), Err(io::ErrorKind::StorageFull));
    let (broken, mended) = ("outbox.not_writable", "outbox.writable");
    // Some of these reports fit into the file, others do not.
    for _ in 0..200 {
        test_server.task("/fixtures/ok/v1").submit();
    }
    node.says(broken).await;
    node.page_until("/ready", |page| page.0 == 503).await;
    // There is one second between two tries to write.
    let enough = Instant::now() + Duration::from_millis(2500);
    node.page_until("/ready", |page| {
        assert_eq!(page.0, 503, "{}", node.log());
        Instant::now() >= enough
    })
    .await;
    assert_eq!((node.said(broken).len(), node.said(mended).len()), (1, 0), "{}", node.log());
    std::fs::remove_file(&filler).expect("removed");
    node.says(mended).await;
    node.page_until("/ready", |page| page.0 == 200).await;
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
}

#[tokio::test]
async fn reports_of_another_identity_remain_unsent_and_logged() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Cut);
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    test_server.task("/fixtures/ok/v1").submit();
    waiting(&node, 1).await;
    node.term();
    assert_eq!(node.wait().await, 75);
    proxy.heal();
    let before = proxy.count(COMPLETE);
    let dir = node.state_dir().to_string_lossy().into_owned();
    let other = proxy.node(&[fixtures::zoo()]).set("STATE_DIR", dir).leasing().await;
    let line = other.says("outbox.foreign_reports").await;
    assert_eq!(line["reports"], 1);
    let status = other.status().await;
    assert_eq!((&status["outbox"]["foreign"], &status["outbox"]["waiting"]), (&json!(1), &json!(0)));
    other.stop().await;
    assert_eq!(proxy.count(COMPLETE), before);
}

/// `runner-host outbox …` on a state folder.
async fn outbox(node: &TestNode, words: &[&str], code: i32) -> (Value, String) {
    let cli = Cli::new(&["outbox"]);
    let cli = words.iter().fold(cli, |cli, word| cli.arg(*word));
    let said = cli.arg("-o").arg("json").arg("--state-dir").arg(node.state_dir()).run().await.expect(code);
    (serde_json::from_str(&said.stdout).unwrap_or_default(), said.stderr)
}

#[tokio::test]
async fn outbox_commands_work_with_and_without_running_node() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    assert_eq!(outbox(&node, &["list"], 0).await, (json!([]), "the outbox is empty".to_owned()));
    let jobs: Vec<_> = (0..3).map(|_| test_server.task("/fixtures/ok/v1").submit()).collect();
    waiting(&node, 3).await;
    let (listed, _) = outbox(&node, &["list"], 0).await;
    let task = |at: usize| listed[at]["task_id"].as_str().expect("an id").to_owned();
    assert_eq!(listed.as_array().map(Vec::len), Some(3));
    assert_eq!((&listed[0]["outcome"], &listed[0]["capability"]), (&json!("completed"), &json!("/fixtures/ok/v1")));
    assert!(listed[0]["last_error"].as_str().is_some_and(|text| text.contains("503")), "{listed}");

    // A running node deletes one report and logs this.
    let (dropped, said) = outbox(&node, &["drop", &task(0)], 0).await;
    assert_eq!((dropped[0]["task_id"].as_str(), said.as_str()), (Some(task(0).as_str()), "dropped 1 report"));
    assert_eq!(node.says("report.dropped").await["task_id"], task(0).as_str());
    waiting(&node, 2).await;
    let gone =
        format!("error: no report of task {} is in the outbox; `runner-host outbox list` shows what is", task(0));
    for word in ["drop", "retry"] {
        assert_eq!(outbox(&node, &[word, &task(0)], 1).await, (json!([]), gone.clone()), "{word}");
    }
    let tries = proxy.count(COMPLETE);
    let (_, said) = outbox(&node, &["retry", "--all"], 0).await;
    assert_eq!(said, "2 reports will be sent now");
    proxy.seen(COMPLETE, tries + 1).await;
    node.term();
    assert_eq!(node.wait().await, 75);

    // With a stopped node, the command changes the file itself.
    let (listed, _) = outbox(&node, &["list"], 0).await;
    assert_eq!(listed.as_array().map(Vec::len), Some(2));
    let (_, said) = outbox(&node, &["retry", &task(1)], 0).await;
    assert_eq!(said, "no node runs here; 1 report will be sent when one starts");
    let text = Cli::new(&["outbox", "list"]).set("STATE_DIR", node.state_dir().to_string_lossy()).run().await.expect(0);
    for line in text.stdout.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[1], "posemesh", "{line}");
        assert_eq!(words[6], if words[5] == "1" { "try" } else { "tries" }, "{line}");
    }
    assert_eq!(outbox(&node, &["drop", &task(1)], 0).await.1, "dropped 1 report");
    for word in ["drop", "retry"] {
        assert_eq!(outbox(&node, &[word, &task(0)], 1).await, (json!([]), gone.clone()), "{word}");
    }
    let (dropped, said) = outbox(&node, &["drop", &task(1), &task(0)], 1).await;
    assert_eq!((dropped, said.lines().count()), (json!([]), 2), "one that is gone twice, and one that is gone: {said}");
    proxy.heal();
    let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
    test_server.ended(&next, jobs[2]).await.completed();
    assert_eq!(accepted(&test_server), 1);
    next.stop().await;
    let text = Cli::new(&["outbox", "list"]).set("STATE_DIR", node.state_dir().to_string_lossy()).run().await.expect(0);
    assert_eq!((text.stdout.as_str(), text.stderr.as_str()), ("", "the outbox is empty"));
    let socket = node.state_dir().join("control.sock");
    assert!(!socket.exists(), "a node that ends takes its socket with it");
    Cli::new(&["outbox", "drop"]).run().await.expect(2);
}

/// Runs `outbox retry --from FILE` on a state folder.
async fn retry_from(state: &Path, file: &Path) -> (Vec<Value>, String) {
    let cli = Cli::new(&["outbox", "retry", "--from"]).arg(file).arg("-o").arg("json").arg("--state-dir").arg(state);
    let said = cli.run().await.expect(0);
    assert!(!said.stderr.contains("panicked"), "{}", said.stderr);
    (serde_json::from_str(&said.stdout).expect("a list"), said.stderr)
}

/// A state folder of a node that was killed with this many waiting reports.
async fn killed_with_reports(proxy: &FaultProxy, test_server: &TestServer, count: usize) -> (TestNode, Vec<Uuid>) {
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    let jobs = (0..count).map(|_| test_server.task("/fixtures/ok/v1").submit()).collect();
    waiting(&node, count).await;
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    proxy.heal();
    (node, jobs)
}

#[tokio::test]
async fn retry_takes_up_a_damaged_file() {
    const COUNT: usize = 8;
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(600)).await;
    let proxy = FaultProxy::before(&test_server).await;
    let (node, jobs) = killed_with_reports(&proxy, &test_server, COUNT).await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("set-aside.redb");
    let mut bytes = std::fs::read(node.state_dir().join("outbox.redb")).expect("read");
    for at in [0, bytes.len() / 3, bytes.len() / 2] {
        bytes[at] ^= 1;
    }
    std::fs::write(&file, &bytes).expect("written");
    let next = proxy.node(&[fixtures::zoo()]).leasing().await;
    // The first file is from another node: its reports are kept and not sent.
    let (taken, said) = retry_from(next.state_dir(), &file).await;
    assert!(taken.len() >= COUNT - 1, "{taken:#?}");
    assert!(taken.iter().all(|report| report["state"] == "foreign"), "{taken:#?}");
    assert_eq!(said, format!("added {} reports, which will be sent now", taken.len()));
    next.stop().await;

    // The same node without its outbox sends them.
    std::fs::remove_file(node.state_dir().join("outbox.redb")).expect("removed");
    let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
    let (taken, _) = retry_from(node.state_dir(), &file).await;
    next.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 0).await;
    next.stop().await;
    assert!(taken.len() >= COUNT - 1, "{taken:#?}");
    assert_eq!(accepted(&test_server), taken.len());
    assert_eq!(std::fs::read(&file).expect("read"), bytes, "the file is as it was");
    drop(jobs);
}

#[tokio::test]
async fn retry_doubles_no_report() {
    const COUNT: usize = 3;
    // No lease ends meanwhile: a task that is leased again may run again.
    let test_server = TestServer::with(|config| config.lease_ttl = Duration::from_secs(600)).await;
    let proxy = FaultProxy::before(&test_server).await;
    let (node, jobs) = killed_with_reports(&proxy, &test_server, COUNT).await;
    let state = node.state_dir();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("copy.redb");
    std::fs::copy(state.join("outbox.redb"), &file).expect("copied");
    let doubled = "3 reports are in the outbox already";
    assert_eq!(retry_from(state, &file).await, (Vec::new(), doubled.to_owned()));
    let (dropped, _) = outbox(&node, &["drop", "--all"], 0).await;
    assert_eq!(dropped.as_array().map(Vec::len), Some(COUNT));
    let (taken, said) = retry_from(state, &file).await;
    assert_eq!(said, "added 3 reports; no node runs here, the next start sends them");
    assert_eq!(json!(taken), dropped);
    assert_eq!(retry_from(state, &file).await, (Vec::new(), doubled.to_owned()));
    // A running node that cannot deliver the reports.
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
    assert_eq!(retry_from(state, &file).await, (Vec::new(), doubled.to_owned()));
    proxy.heal();
    // The node may have delivered some of them by itself by now.
    let said = outbox(&node, &["retry", "--all"], 0).await.1;
    assert!(said.ends_with(" will be sent now") || said == "the outbox is empty", "{said}");
    for job in jobs {
        test_server.ended(&next, job).await.completed();
    }
    next.stop().await;
    assert_eq!(accepted(&test_server), COUNT, "{}", next.log());
    // A file without reports, and a missing file.
    std::fs::write(&file, "no database").expect("written");
    let from = |file: &Path| Cli::new(&["outbox", "retry", "--from"]).arg(file).arg("--state-dir").arg(state);
    let said = from(&file).run().await.expect(1);
    assert_eq!(said.stderr, "error: the file has no report that can be read");
    let said = from(&folder.path().join("missing")).run().await.expect(78);
    assert!(said.stderr.starts_with(&format!("error: cannot read {}/missing: ", folder.path().display())), "{said:?}");
}

#[tokio::test]
async fn damage_in_any_page_leaves_readable_reports() {
    const COUNT: usize = 8;
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let (node, _) = killed_with_reports(&proxy, &test_server, COUNT).await;
    let sound = std::fs::read(node.state_dir().join("outbox.redb")).expect("read");
    let target = node.state_dir();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("damaged.redb");
    let used = |page: &usize| sound[page * 4096..][..4096].iter().any(|byte| *byte != 0);
    let pages: Vec<usize> = (0..sound.len() / 4096).filter(used).collect();
    for page in &pages {
        let mut bytes = sound.clone();
        let used = bytes[page * 4096..][..4096].iter().rposition(|byte| *byte != 0).expect("a used page");
        bytes[page * 4096 + used / 2] ^= 0x10;
        std::fs::write(&file, &bytes).expect("written");
        outbox(&node, &["drop", "--all"], 0).await;
        let (taken, said) = retry_from(target, &file).await;
        assert!(taken.len() >= COUNT - 1, "page {page}: {} reports; {said}", taken.len());
    }
    // The next start sets such a file aside. The first byte of a page is its kind.
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    for some in [&pages[..], &pages[1..], &pages[pages.len() / 2..]] {
        let mut bytes = sound.clone();
        some.iter().for_each(|page| bytes[page * 4096] ^= 0x10);
        std::fs::write(target.join("outbox.redb"), &bytes).expect("written");
        let next = proxy.node(&[fixtures::zoo()]).after(&node).leasing().await;
        let kept = next.status().await["outbox"]["waiting"].as_u64().expect("a number");
        assert!(kept >= COUNT as u64 - 1, "{kept} reports; {}", next.log());
        let line = next.line(|line| line["event"] == "outbox.damaged").await;
        let aside = line["moved_to"].as_str().expect("a path");
        let (taken, _) = retry_from(target, Path::new(aside)).await;
        assert!(taken.is_empty(), "what can be read was taken up before: {taken:#?}");
        next.term();
        assert_eq!(next.wait().await, 75, "{}", next.log());
        assert!(!next.log().contains("panicked"), "{}", next.log());
    }
}

#[tokio::test]
async fn folder_without_outbox_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = folder.path().join("mistyped");
    let list = |dir: &std::path::Path| Cli::new(&["outbox", "list", "--state-dir"]).arg(dir);
    let wanted = format!(
        "error: there is no outbox in {}; name a node's state folder with --state-dir or STATE_DIR",
        missing.display()
    );
    for list in [list(&missing), list(&missing).arg("-o").arg("json")] {
        let said = list.run().await.expect(1);
        assert_eq!((said.stdout.as_str(), said.stderr.as_str()), ("", wanted.as_str()));
    }
    for word in ["drop", "retry"] {
        let ask = Cli::new(&["outbox", word, "--state-dir"]).arg(&missing).arg(uuid::Uuid::nil().to_string());
        let said = ask.run().await.expect(1);
        let start = format!("error: there is no outbox in {}; name a node's state folder", missing.display());
        assert!(said.stderr.starts_with(&start) && said.stderr.lines().count() == 1, "{word}: {}", said.stderr);
    }
    assert!(!missing.exists(), "nothing is made");
    // A state folder that cannot be read is an error.
    let file = folder.path().join("file");
    std::fs::write(&file, "x").expect("written");
    let said = list(&file).run().await.expect(78);
    assert!(
        said.stderr.starts_with(&format!("error: cannot open {}/outbox.redb: ", file.display())),
        "{}",
        said.stderr
    );
}

#[tokio::test]
async fn retry_from_refuses_devices() {
    let folder = tempfile::tempdir().expect("a folder");
    let ended = Cli::new(&["outbox", "retry", "--from", "/dev/zero", "--state-dir"]).arg(folder.path()).run().await;
    assert!(ended.code != 0 && ended.stderr.contains("expected a regular file"), "{ended:?}");
}

#[tokio::test]
async fn empty_outbox_file_is_reported() {
    let state = tempfile::tempdir().expect("a folder");
    let file = state.path().canonicalize().expect("a folder").join("outbox.redb");
    std::fs::write(&file, "").expect("the folder is writable");
    let wanted = format!(
        "error: {} is empty: it has 0 bytes, its reports are lost; a node that starts there creates a new one",
        file.display()
    );
    for args in [&["outbox", "list", "-o", "json"][..], &["outbox", "drop", "--all"], &["outbox", "retry", "--all"]] {
        let ended = Cli::new(args).set("STATE_DIR", state.path().to_string_lossy()).run().await.expect(78);
        assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", wanted.as_str()), "{args:?}");
    }
    assert_eq!(std::fs::metadata(&file).expect("it stays").len(), 0, "the commands change nothing");
}
