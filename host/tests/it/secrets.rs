//! No secret leaves the node, neither to a plugin nor to the log.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::{Cli, NodeSetup},
};

const REG_SECRET: &str = "a-registration-secret-nobody-may-see";
/// In bodies of every kind. No log line contains it either.
const CONTENT: &str = "what-only-the-jobs-author-knows";

#[tokio::test]
async fn plugin_finds_no_secret_in_the_environment() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("REG_SECRET", REG_SECRET).set("SOMETHING_ELSE", "is visible");
    // Otherwise only the superuser can read /proc/self/environ.
    let node = node.set("ALLOW_CORE_DUMPS", "true").leasing().await;
    let ended = test_server.run(&node, "/fixtures/dump-env/v1", json!({})).await;
    let env: Value = serde_json::from_slice(&test_server.artifact(ended.completed(), "env.json").await).expect("JSON");
    assert_eq!(env["SOMETHING_ELSE"], "is visible", "the dump works");
    assert!(env.get("REG_SECRET").is_none() && env.get("SECP256K1_PRIVHEX").is_none(), "{env}");
    let kernel = test_server.artifact(&ended, "proc-environ.bin").await;
    let kernel = String::from_utf8_lossy(&kernel);
    assert!(kernel.contains("SOMETHING_ELSE=is visible"), "the dump works");
    for secret in [REG_SECRET, &node.key] {
        assert!(!env.to_string().contains(secret) && !kernel.contains(secret), "a secret is visible");
    }
}

#[tokio::test]
async fn no_log_line_contains_a_secret() {
    let test_server = TestServer::with(|config| {
        config.lease_ttl = std::time::Duration::from_secs(2);
        config.domain_token_renew_after = std::time::Duration::ZERO;
        config.request_max_bytes = 64 * 1024;
        config.part_size = 64 * 1024;
    })
    .await;
    let proxy = FaultProxy::before(&test_server).await;
    let tokens: Arc<Mutex<Vec<String>>> = Arc::default();
    let note = || {
        let tokens = Arc::clone(&tokens);
        Bad::edit(move |answer| {
            let token = answer["access_token"].as_str().map(str::to_owned);
            tokens.lock().expect("notes").extend(token);
        })
    };
    for call in ["POST /internal/v1/auth/siwe/verify", "GET /v1/tasks", "POST /v1/tasks/*/heartbeat"] {
        proxy.answer(call, usize::MAX, note());
    }
    let node = proxy.node(&[fixtures::hello(), fixtures::echo(), fixtures::zoo()]);
    let node = node.set("REG_SECRET", REG_SECRET).set("RUST_LOG", "trace").leasing().await;
    let input = test_server.put("in", CONTENT.repeat(10_000).as_bytes()).await;
    let note = json!({ "note": CONTENT, "path": CONTENT });
    for capability in ["/examples/hello/v1", "/examples/echo-file/v1", "/examples/echo-stream/v1"] {
        test_server
            .ended(&node, test_server.task(capability).inputs(&[input]).meta(note.clone()).submit())
            .await
            .completed();
    }
    test_server.run(&node, "/fixtures/echo-meta/v1", note).await.completed();
    test_server.run(&node, "/fixtures/fail/v1", json!({})).await.failed();
    // A rejection that repeats the request is the usual way for a secret into a log.
    proxy.answer("GET /api/v1/domains/*/data", 1, Bad::Echo(403));
    test_server.ended(&node, test_server.task("/examples/hello/v1").inputs(&[input]).submit()).await.failed();
    proxy.answer("GET /v1/tasks", 1, Bad::Echo(500));
    proxy.heal();
    proxy.answer("GET /v1/tasks", 1, Bad::Echo(500));
    node.says("poll.failed").await;
    node.stop().await;
    let log = node.log();
    let tokens = tokens.lock().expect("notes").clone();
    assert!(tokens.len() >= 6, "node, domain and renewed tokens were seen: {}", tokens.len());
    for secret in tokens.iter().map(String::as_str).chain([REG_SECRET, node.key.as_str(), CONTENT]) {
        let at = log.find(secret);
        assert!(at.is_none(), "a secret is in: {}", log.lines().find(|line| line.contains(secret)).unwrap_or_default());
    }
    assert!(log.contains("\"level\":\"TRACE\""), "the log has the most verbose level");
}

const NONCE: &str = "POST /internal/v1/auth/siwe/request";
const VERIFY: &str = "POST /internal/v1/auth/siwe/verify";
const WALLET: &str = "POST /internal/v1/nodes/register-wallet";
const BY_URL: &str = "POST /internal/v1/nodes/register";

/// A node with the most verbose log, and a secret that JSON escapes. Its output is searched on drop
/// ([`crate::harness::hygiene`]).
fn verbose(node: NodeSetup) -> NodeSetup {
    node.set("REG_SECRET", "a \"secret\" nobody\\may see").set("RUST_LOG", "trace").set("REGISTER_INTERVAL_SECS", "1")
}

#[tokio::test]
async fn refused_sign_ins_show_no_secret() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    for (call, statuses) in [(NONCE, [500, 403]), (WALLET, [403, 409]), (VERIFY, [401, 404])] {
        for status in statuses {
            proxy.answer(call, 1, Bad::Echo(status));
        }
    }
    let token = json!({ "access_token": "dev-node-token-planted", "access_expires_at": "1999-01-01T00:00:00Z" });
    proxy.answer(VERIFY, 1, Bad::Json(token));
    proxy.answer(VERIFY, 1, Bad::Json(json!({ "access_token": "dev-node-token-planted", "expires_at": "soon" })));
    proxy.answer(VERIFY, 1, Bad::Json(json!({ "access_token": ["dev-node-token-planted"] })));
    proxy.answer(VERIFY, 1, Bad::Status(500, "{\"access_token\":\"dev-node-token-planted\"}"));
    let node = verbose(proxy.node(&[fixtures::hello()])).set("TOKEN_REAUTH_JITTER_MS", "0").start().await;
    node.says("node.leasing").await;
    for event in ["registration.failed", "login.failed"] {
        assert!(node.said(event).len() >= 4, "{event}: {}", node.log());
    }
    let output = node.said("registration.failed");
    assert!(
        output.iter().any(|line| line["error"].as_str().is_some_and(|text| text.contains("[secret]"))),
        "{output:?}"
    );
    assert_eq!(node.page("/status.json").await.0, 200);
    node.stop().await;
}

#[tokio::test]
async fn refused_registration_by_url_shows_no_secret() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    for status in [500, 403, 409] {
        proxy.answer(BY_URL, 1, Bad::Echo(status));
    }
    let node = verbose(proxy.node(&[fixtures::hello()]).reachable()).start().await;
    node.says("node.leasing").await;
    assert_eq!(node.said("registration.failed").len(), 3);
    assert_eq!(node.said("registration.called_back").len(), 1);
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn ended_tasks_and_refused_reports_show_no_secret() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = verbose(proxy.node(&[fixtures::hello(), fixtures::zoo()])).leasing().await;
    let (complete, fail) = ("POST /v1/tasks/*/complete", "POST /v1/tasks/*/fail");
    for (call, capability) in [
        (complete, "/examples/hello/v1"),
        ("POST /api/v1/domains/*/data", "/examples/hello/v1"),
        ("POST /v1/tasks/*/heartbeat", "/examples/hello/v1"),
        (fail, "/fixtures/fail/v1"),
        (fail, "/fixtures/panic/v1"),
    ] {
        proxy.answer(call, 1, Bad::Echo(500));
        test_server.run(&node, capability, json!({})).await;
    }
    // A permanent rejection, and a rejection whose text repeats the token.
    proxy.answer(complete, 1, Bad::Echo(409));
    proxy.answer("GET /v1/tasks", 1, Bad::Echo(401));
    let job = test_server.task("/examples/hello/v1").submit();
    proxy.seen(complete, 3).await;
    proxy.seen(VERIFY, 2).await;
    test_server.dev_server.cancel_job(job);
    node.stop().await;
}

const GRANTED: &str = "[[plugin]]\nfile = \"zoo\"\ngrant = [\"token\"]\n";

#[tokio::test]
async fn token_in_lines_or_panics_is_removed() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).plugins_file(GRANTED).set("RUST_LOG", "trace").leasing().await;
    let ended = test_server.run(&node, "/fixtures/says-token/v1", json!({})).await;
    let (reason, _) = ended.failed();
    assert!(reason.starts_with("runner panicked: refused with (token) at "), "{reason}");
    let line = node.says_text("granted (token)").await;
    assert_eq!(line["header"], "Bearer (token)", "{line}");
    assert_eq!(node.says_text("elsewhere (token)").await["plugin"], "zoo");
    node.says_text("refused with (token)").await;
    // An id is shortened before it is reported, a path is stored.
    for (place, expected) in [
        ("input", "download of input (token)"),
        ("path", "the path, name or data type of an artifact contains the task's token; use one without it"),
    ] {
        let ended = test_server.run(&node, "/fixtures/tells-token/v1", json!({ "as": place })).await;
        let (reason, _) = ended.failed();
        assert!(reason.contains(expected), "{reason}");
    }
    // The rest of its output is searched on drop.
    node.stop().await;
}

#[tokio::test]
async fn token_in_targets_or_escaped_fields_is_removed() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::c("untidy", &[])]);
    let node = node.plugins_file("[defaults]\ngrant = [\"token\"]\n").leasing().await;
    test_server.run(&node, "/fixtures/c-tells/v1", json!({})).await.completed();
    let line = node.says_text("the token in two places").await;
    // The target is cut before.
    assert!(line["plugin_target"].as_str().is_some_and(|target| target.starts_with("(token)…")), "{line}");
    assert_eq!(line["escaped"], "(token)", "{line}");
    node.stop().await;
}

#[tokio::test]
async fn runner_gets_the_newest_token() {
    let test_server = TestServer::with(|config| {
        config.lease_ttl = std::time::Duration::from_secs(2);
        config.domain_token_renew_after = std::time::Duration::from_millis(500);
    })
    .await;
    let node = test_server.node(&[fixtures::zoo()]).plugins_file(GRANTED).leasing().await;
    let ended = test_server.run(&node, "/fixtures/renewed-token/v1", json!({})).await;
    let seen: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "renewed.json").await).expect("JSON");
    assert!(seen["asked"].as_u64() > Some(0), "{seen}");
}

#[tokio::test]
async fn config_commands_show_no_secret() {
    let given = [("REG_SECRET", REG_SECRET), ("SECP256K1_PRIVHEX", "c0ffee00c0ffee00c0ffee00c0ffee")];
    for (command, code) in [(&["run"][..], 78), (&["config", "show"], 0), (&["config", "check"], 78)] {
        let cli =
            given.iter().fold(Cli::new(command).set("RUST_LOG", "trace"), |cli, (name, value)| cli.set(name, *value));
        cli.run().await.expect(code);
    }
}

#[tokio::test]
async fn secret_search_finds_a_leaked_secret() {
    let cli = Cli::new(&["config", "show"]).set("REG_SECRET", REG_SECRET).set("CLIENT_ID", REG_SECRET);
    let process = cli.start();
    assert_eq!(process.wait().await, 0, "{}", process.log());
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(process)));
    let output = dropped.expect_err("the search fails the test");
    assert!(output.downcast_ref::<String>().is_some_and(|output| output.starts_with("a secret got out: ")));
}

#[tokio::test]
async fn runner_gets_the_token_only_with_a_grant() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let ended = test_server.run(&node, "/fixtures/token/v1", json!({})).await;
    let seen: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "token.json").await).expect("JSON");
    assert_eq!((&seen["granted"], &seen["kind"]), (&json!(false), &json!("Unsupported")), "{seen}");
    node.stop().await;

    let node = test_server.node(&[fixtures::zoo()]).plugins_file(GRANTED).leasing().await;
    let ended = test_server.run(&node, "/fixtures/token/v1", json!({})).await;
    let seen: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "token.json").await).expect("JSON");
    assert_eq!(seen["granted"], true, "{seen}");
    assert!(seen["length"].as_u64() > Some(20), "{seen}");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn running_node_cannot_be_dumped() {
    let test_server = TestServer::start().await;
    for (allowed, dumpable) in [("", 0), ("true", 1)] {
        let node = test_server.node(&[fixtures::zoo()]).set("ALLOW_CORE_DUMPS", allowed).leasing().await;
        let ended = test_server.run(&node, "/fixtures/dumpable/v1", json!({})).await;
        let seen: Value =
            serde_json::from_slice(&test_server.artifact(ended.completed(), "dumpable.json").await).expect("JSON");
        assert_eq!(seen["dumpable"], dumpable, "ALLOW_CORE_DUMPS={allowed}");
        node.stop().await;
    }
}
