//! A lease is kept while its task runs, and dropped when it is lost.

use std::time::Duration;

use runner_host::dev::{Config, DevServer};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{
    Ended, TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
};

/// Short enough that several leases expire in a test, long enough for a busy machine.
const LEASE: Duration = Duration::from_secs(2);

fn go() -> (TempDir, Value) {
    let files = tempfile::tempdir().expect("a folder");
    let meta = json!({ "file": files.path().join("go") });
    (files, meta)
}

fn release(files: &TempDir) {
    std::fs::write(files.path().join("go"), "").expect("the folder is writable");
}

#[tokio::test]
async fn heartbeats_extend_lease_beyond_three_lease_terms() {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let (files, meta) = go();
    let job = test_server.task("/fixtures/wait-file/v1").meta(meta).submit();
    let first = test_server.started(&node, job).await;
    let end = |task: &Value| task["lease_expires_at"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok());
    let wanted = end(&first).expect("a lease has an end") + jiff::SignedDuration::try_from(LEASE * 3).expect("seconds");
    test_server.task_until(&node, job, |task| end(task).is_some_and(|end| end > wanted)).await;
    release(&files);
    let ended = test_server.ended(&node, job).await;
    assert_eq!(ended.completed().task()["attempts"], 1);
    let beats = test_server.dev_server.journal().iter().filter(|seen| seen.path.ends_with("/heartbeat")).count();
    assert!((7..=60).contains(&beats), "{beats} heartbeats in three lengths");
}

#[tokio::test]
async fn later_transfers_use_renewed_domain_token() {
    let test_server = TestServer::with(|config| {
        config.lease_ttl = LEASE;
        config.domain_token_ttl = Duration::from_secs(2);
        config.domain_token_renew_after = Duration::from_millis(500);
        config.domain_token_grace = Duration::from_millis(500);
    })
    .await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::echo()]).leasing().await;
    let input = test_server.put("in", b"held back").await;
    // The input arrives only after the first token has long been replaced.
    let (gate, held) = Bad::gate();
    proxy.answer("GET /api/v1/domains/*/data?ids=", 1, held);
    let newer_tokens: std::sync::Arc<tokio::sync::Semaphore> = std::sync::Arc::new(tokio::sync::Semaphore::new(0));
    let note = std::sync::Arc::clone(&newer_tokens);
    proxy.answer(
        "POST /v1/tasks/*/heartbeat",
        usize::MAX,
        Bad::edit(move |answer| {
            note.add_permits(usize::from(answer["access_token"].is_string()));
        }),
    );
    let job = test_server.task("/examples/echo-bytes/v1").inputs(&[input]).submit();
    let twice = async { newer_tokens.acquire_many(2).await.expect("never closed").forget() };
    crate::harness::within("two newer tokens", || node.log(), twice).await;
    gate.cancel();
    let ended = test_server.ended(&node, job).await;
    assert_eq!(test_server.artifact(ended.completed(), "echo-0.bin").await, b"held back");
    let refused = test_server.dev_server.journal().into_iter().find(|seen| seen.status == 401);
    assert_eq!(refused, None, "no call went out with a replaced token");
}

/// Lets a runner send as much as it can while no heartbeat is answered, so that nothing leaves its queue. Returns how
/// its task ended and what the runner received.
async fn says_too_much(meta: Value) -> (Ended, Value) {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let (gate, held) = Bad::gate();
    proxy.answer("POST /v1/tasks/*/heartbeat", 1, held);
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let job = test_server.task("/fixtures/limits/v1").meta(meta).submit();
    proxy.seen("POST /v1/tasks/*/heartbeat", 1).await;
    node.says_text("reached every limit").await;
    gate.cancel();
    let ended = test_server.ended(&node, job).await;
    let seen = test_server.artifact(ended.completed(), "limits.json").await;
    (ended, serde_json::from_slice(&seen).expect("JSON"))
}

#[tokio::test]
async fn large_updates_fail_and_excess_events_wait() {
    let (ended, seen) = says_too_much(json!({})).await;
    assert_eq!(seen["progress"], "Limit: progress is 70002 bytes of JSON, at most 65536 are allowed");
    assert_eq!(seen["event"], "Limit: event is 70002 bytes of JSON, at most 65536 are allowed");
    // The set-up heartbeat may have carried the first events, which still wait for its answer.
    assert_eq!(seen["taken"], 1024);
    // The dev server stores the last events.
    let events = ended.task()["meta"]["events"].as_array().expect("a list");
    let numbers: Vec<Option<u64>> = events.iter().map(|event| event["n"].as_u64()).collect();
    let wanted: Vec<Option<u64>> = (1025 - events.len() as u64..=1024).map(Some).collect();
    assert!(numbers.len() >= 32 && numbers == wanted, "in order, each once: {numbers:?}");
}

// The size of the queue is also limited in bytes.
#[tokio::test]
async fn large_events_are_bounded_by_their_bytes() {
    let (ended, seen) = says_too_much(json!({ "event_bytes": 30_000 })).await;
    assert_eq!(seen["taken"], 8, "eight times 30 kB, not nine");
    let events = ended.task()["meta"]["events"].as_array().expect("a list");
    let numbers: Vec<Option<u64>> = events.iter().map(|event| event["n"].as_u64()).collect();
    assert_eq!(numbers, (0..9).map(Some).collect::<Vec<_>>(), "over several heartbeats, in order, each once");
}

#[tokio::test]
async fn events_of_failed_heartbeats_are_resent_in_order() {
    const BEAT: &str = "POST /v1/tasks/*/heartbeat";
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    // The first requests arrive without an answer, so the control plane has the events twice. Later requests do not
    // arrive.
    proxy.answer(BEAT, 2, Bad::CutAfter(0));
    proxy.answer(BEAT, 1, Bad::Status(503, "later"));
    let ended = test_server.run(&node, "/fixtures/events/v1", json!({ "count": 20 })).await;
    let events = ended.completed().task()["meta"]["events"].as_array().expect("a list");
    let numbers: Vec<u64> = events.iter().filter_map(|event| event["n"].as_u64()).collect();
    let mut first = Vec::new();
    for n in &numbers {
        if !first.contains(n) {
            first.push(*n);
        }
    }
    assert_eq!(first, (1..=20).collect::<Vec<_>>(), "{numbers:?}");
    assert!(numbers.len() > 20, "what was heard and not answered came again: {numbers:?}");
    assert_eq!(proxy.count(BEAT), 4);
}

// posemesh.md section 10.3: the earlier of the two expiry times decides when the next heartbeat is due.
#[tokio::test]
async fn domain_token_expiry_triggers_earlier_heartbeats() {
    let test_server = TestServer::with(|config| {
        config.domain_token_ttl = Duration::from_secs(3);
        config.domain_token_renew_after = Duration::from_millis(500);
        config.domain_token_grace = Duration::ZERO;
    })
    .await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let (files, meta) = go();
    let job = test_server.task("/fixtures/wait-file/v1").meta(meta).submit();
    test_server.started(&node, job).await;
    let beats =
        |seen: &[runner_host::dev::JournalEntry]| seen.iter().filter(|seen| seen.path.ends_with("/heartbeat")).count();
    let (began, before) = (std::time::Instant::now(), beats(&test_server.dev_server.journal()));
    test_server.seen(&node, |seen| beats(seen) >= before + 2).await;
    assert!(began.elapsed() < Duration::from_secs(5), "a lease of a minute alone asks for one in 15 s");
    release(&files);
    test_server.ended(&node, job).await.completed();
}

// posemesh.md section 10.3: a 401 of the domain server triggers a heartbeat, which returns a newer token.
#[tokio::test]
async fn refused_domain_token_is_renewed_by_immediate_heartbeat() {
    let test_server = TestServer::with(|config| config.domain_token_ttl = Duration::from_millis(300)).await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(
        "GET /v1/tasks",
        usize::MAX,
        Bad::edit(|lease| {
            if let Some(lease) = lease.as_object_mut() {
                lease.remove("access_token_expires_at");
            }
        }),
    );
    let node = proxy.node(&[fixtures::echo()]).leasing().await;
    let input = test_server.put("in", b"held back").await;
    let (gate, held) = Bad::gate();
    proxy.answer("GET /api/v1/domains/*/data?ids=", 1, held);
    let job = test_server.task("/examples/echo-bytes/v1").inputs(&[input]).submit();
    proxy.seen("GET /api/v1/domains/*/data?ids=", 1).await;
    // There is no event for the expiry of a token.
    tokio::time::sleep(Duration::from_millis(350)).await;
    gate.cancel();
    let ended = test_server.ended(&node, job).await;
    assert_eq!(test_server.artifact(ended.completed(), "echo-0.bin").await, b"held back");
    let refused = test_server.dev_server.journal().into_iter().filter(|seen| seen.status == 401).count();
    assert_eq!(refused, 1, "one refusal, then the newer token");
    assert!(proxy.count("POST /v1/tasks/*/heartbeat") <= 4, "{:#?}", test_server.dev_server.journal());
}

#[tokio::test]
async fn cancel_in_setup_heartbeat_prevents_download_and_report() {
    for cancel in [json!({ "cancel": true }), json!({ "status": "cancelled" })] {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        let node = proxy.node(&[fixtures::hello()]).leasing().await;
        proxy.answer("POST /v1/tasks/*/heartbeat", 1, Bad::Json(cancel));
        let input = test_server.put("who", b"world").await;
        test_server.task("/examples/hello/v1").inputs(&[input]).submit();
        let line = node.says_ended("none").await;
        assert_eq!(line["outcome"], "cancelled", "{line}");
        assert_eq!(proxy.count("GET /api/v1/domains/*/data"), 0);
        assert_eq!(proxy.count("POST /v1/tasks/*/fail") + proxy.count("POST /v1/tasks/*/complete"), 0);
    }
}

#[tokio::test]
async fn report_uses_new_task_id_after_heartbeat_rename() {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let (files, meta) = go();
    let other = "11111111-2222-4333-8444-555555555555";
    let job = test_server.task("/fixtures/wait-file/v1").meta(meta).submit();
    test_server.started(&node, job).await;
    let old = test_server.dev_server.job(job).expect("a job")["tasks"][0]["id"].clone();
    let old = old.as_str().expect("an id");
    // The proxy answers calls for the new name, because the dev server knows the task by its old one.
    proxy.answer(&format!("POST /v1/tasks/{other}/heartbeat"), usize::MAX, Bad::Json(json!({})));
    proxy.answer(&format!("POST /v1/tasks/{other}/complete"), 1, Bad::Json(json!({})));
    proxy.answer(&format!("POST /v1/tasks/{old}/heartbeat"), usize::MAX, Bad::Json(json!({ "task_id": other })));
    node.says("task.renamed").await;
    release(&files);
    node.says("task.ended").await;
    assert_eq!(proxy.count(&format!("POST /v1/tasks/{other}/complete")), 1);
    assert_eq!(proxy.count(&format!("POST /v1/tasks/{old}/complete")), 0);
}

#[tokio::test]
async fn capability_change_during_task_is_only_logged() {
    const BEAT: &str = "POST /v1/tasks/*/heartbeat";
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let (files, meta) = go();
    let job = test_server.task("/fixtures/wait-file/v1").meta(meta).submit();
    let task = test_server.started(&node, job).await["id"].clone();
    let other = json!({ "id": task, "capability": "/fixtures/other/v1", "job_id": job, "inputs_cids": [] });
    proxy.answer(BEAT, usize::MAX, Bad::edit(move |answer| answer["task"] = other.clone()));
    let line = node.says("task.capability_renamed").await;
    assert_eq!((&line["task_id"], &line["renamed"]), (&task, &json!("/fixtures/other/v1")), "{line}");
    release(&files);
    let ended = test_server.ended(&node, job).await;
    assert_eq!(ended.completed().receipt()["job"]["capability"], "/fixtures/wait-file/v1");
}

#[tokio::test]
async fn domain_server_url_is_read_from_task_metadata() {
    for pointer in ["/domain_server_url", "/legacy/domain_server_url"] {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        let node = proxy.node(&[fixtures::hello()]).leasing().await;
        proxy.answer(
            "GET /v1/tasks",
            usize::MAX,
            Bad::edit(move |lease| {
                if lease["task"].is_object() {
                    let server = lease["domain_server_url"].take();
                    lease["task"]["meta"] = match pointer {
                        "/domain_server_url" => json!({ "domain_server_url": server }),
                        _ => json!({ "legacy": { "domain_server_url": server } }),
                    };
                }
            }),
        );
        // The heartbeat answers do not name it either.
        let silent = |answer: &mut Value| answer["domain_server_url"] = Value::Null;
        proxy.answer("POST /v1/tasks/*/heartbeat", usize::MAX, Bad::edit(silent));
        let input = test_server.put("who", b"world").await;
        let ended = test_server.ended(&node, test_server.task("/examples/hello/v1").inputs(&[input]).submit()).await;
        assert_eq!(test_server.artifact(ended.completed(), "outputs/hello.bin").await, b"hello, world", "{pointer}");
    }
}

#[tokio::test]
async fn lease_unknown_to_control_plane_ends_without_report() {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let job = test_server.task("/fixtures/slow/v1").submit();
    test_server.started(&node, job).await;
    proxy.answer("POST /v1/tasks/*/heartbeat", 1, Bad::Status(404, "no such task"));
    node.says("lease.lost").await;
    let line = node.says_ended("none").await;
    assert_eq!(line["outcome"], "lease-lost", "{line}");
    assert_eq!(proxy.count("POST /v1/tasks/*/fail") + proxy.count("POST /v1/tasks/*/complete"), 0);
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
}

#[tokio::test]
async fn nodes_rejoin_a_restarted_dev_server() {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let job = test_server.task("/fixtures/slow/v1").submit();
    test_server.started(&node, job).await;
    let bind = test_server.dev_server.address();
    test_server.dev_server.stop().await;
    let dev_server =
        DevServer::start(Config { bind, lease_ttl: LEASE, ..Config::default() }).await.expect("the port is free");
    let test_server = TestServer::around(dev_server);
    let line = node.says_ended("none").await;
    assert_eq!(line["outcome"], "lease-lost", "{line}");
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    let foreign_reports =
        test_server.dev_server.journal().into_iter().filter(|seen| seen.path.ends_with("/fail")).count();
    assert_eq!(foreign_reports, 0, "nothing is reported for a lease of an earlier process");
}

#[tokio::test]
async fn node_token_revoked_by_second_login_is_renewed() {
    let test_server = TestServer::start().await;
    let first = test_server.joined(&[fixtures::hello()]).await;
    // The same wallet signs in on another node, and the first token becomes invalid.
    let second = test_server.node(&[fixtures::hello()]).set("SECP256K1_PRIVHEX", first.key.as_str()).leasing().await;
    second.stop().await;
    test_server
        .seen(&first, |seen| {
            let rejected = seen.iter().position(|seen| seen.path == "/v1/tasks" && seen.status == 401);
            rejected.is_some_and(|at| seen[at..].iter().any(|seen| seen.path == "/v1/tasks" && seen.status == 204))
        })
        .await;
    test_server.run(&first, "/examples/hello/v1", json!({})).await.completed();
    let output = first.said("poll.failed");
    assert!(output.is_empty(), "one rejection is repeated and not logged: {output:?}");
}

#[tokio::test]
async fn node_tokens_are_renewed_before_they_end() {
    let test_server = TestServer::with(|config| config.node_token_ttl = Duration::from_secs(2)).await;
    let node =
        test_server.node(&[fixtures::zoo()]).set("TOKEN_SAFETY_RATIO", "0.25").set("TOKEN_REAUTH_JITTER_MS", "0");
    let node = node.leasing().await;
    let (files, meta) = go();
    let job = test_server.task("/fixtures/wait-file/v1").meta(meta).submit();
    test_server.started(&node, job).await;
    // Five logins at intervals of half a second take longer than the first token lives.
    let login = |seen: &&runner_host::dev::JournalEntry| seen.path.ends_with("/siwe/verify");
    let seen = test_server.seen(&node, |seen| seen.iter().filter(login).count() >= 6).await;
    let at: Vec<jiff::Timestamp> = seen.iter().filter(login).map(|seen| seen.at).collect();
    let five = at[5].duration_since(at[0]);
    assert!(five < jiff::SignedDuration::from_secs(5), "at three quarters, as usual, they take 7.5 s: {five:?}");
    release(&files);
    test_server.ended(&node, job).await.completed();
    let refused = test_server.dev_server.journal().into_iter().find(|seen| seen.status == 401);
    assert_eq!(refused, None, "no call went out with an expired token");
}

#[tokio::test]
async fn polls_of_a_node_without_work_are_few() {
    let test_server = TestServer::start().await;
    let node =
        test_server.node(&[fixtures::hello()]).set("POLL_BACKOFF_MS_MIN", "100").set("POLL_BACKOFF_MS_MAX", "100");
    let node = node.leasing().await;
    let polls = |seen: &[runner_host::dev::JournalEntry]| seen.iter().filter(|seen| seen.path == "/v1/tasks").count();
    test_server.seen(&node, |seen| polls(seen) >= 1).await;
    let (began, before) = (std::time::Instant::now(), polls(&test_server.dev_server.journal()));
    test_server.seen(&node, |seen| polls(seen) >= before + 5).await;
    assert!(began.elapsed() >= Duration::from_millis(400), "{:?} for five pauses", began.elapsed());
}
