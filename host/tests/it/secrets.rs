//! No secret leaves the node: not to a plugin, not to its log.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::harness::{
    Lab, fixtures,
    rubbish::{Bad, Rubbish},
};

const REG_SECRET: &str = "a-registration-secret-nobody-may-see";

#[tokio::test]
async fn s0_25_s0_26_a_plugin_finds_no_secret_in_the_environment() {
    let lab = Lab::start().await;
    let node = lab.node(&[fixtures::zoo()]).set("REG_SECRET", REG_SECRET).set("SOMETHING_ELSE", "is visible");
    let node = node.leasing().await;
    let ended = lab.run(&node, "/fixtures/dump-env/v1", json!({})).await;
    let env: Value = serde_json::from_slice(&lab.artifact(ended.completed(), "env.json").await).expect("JSON");
    assert_eq!(env["SOMETHING_ELSE"], "is visible", "the dump works");
    assert!(env.get("REG_SECRET").is_none() && env.get("SECP256K1_PRIVHEX").is_none(), "{env}");
    let kernel = lab.artifact(&ended, "proc-environ.bin").await;
    let kernel = String::from_utf8_lossy(&kernel);
    assert!(kernel.contains("SOMETHING_ELSE=is visible"), "the dump works");
    for secret in [REG_SECRET, &node.key] {
        assert!(!env.to_string().contains(secret) && !kernel.contains(secret), "a secret is visible");
    }
}

#[tokio::test]
async fn no_log_line_holds_a_key_a_secret_or_a_token() {
    let lab = Lab::with(|config| {
        config.lease_ttl = std::time::Duration::from_secs(2);
        config.domain_token_renew_after = std::time::Duration::ZERO;
        config.request_max_bytes = 64 * 1024;
        config.part_size = 64 * 1024;
    })
    .await;
    let rubbish = Rubbish::before(&lab).await;
    let tokens: Arc<Mutex<Vec<String>>> = Arc::default();
    let note = || {
        let tokens = Arc::clone(&tokens);
        Bad::edit(move |answer| {
            let token = answer["access_token"].as_str().map(str::to_owned);
            tokens.lock().expect("notes").extend(token);
        })
    };
    for call in ["POST /internal/v1/auth/siwe/verify", "GET /v1/tasks", "POST /v1/tasks/*/heartbeat"] {
        rubbish.answer(call, usize::MAX, note());
    }
    let node = rubbish.node(&[fixtures::hello(), fixtures::echo(), fixtures::zoo()]);
    let node = node.set("REG_SECRET", REG_SECRET).set("RUST_LOG", "trace").leasing().await;
    let input = lab.put("in", &[7; 300_000]).await;
    for capability in ["/examples/hello/v1", "/examples/echo-file/v1", "/examples/echo-stream/v1"] {
        lab.ended(&node, lab.task(capability).inputs(&[input]).submit()).await.completed();
    }
    lab.run(&node, "/fixtures/fail/v1", json!({})).await.failed();
    // Refusals that repeat what they were sent are the usual way for a secret to get into a log.
    rubbish.answer("GET /api/v1/domains/*/data", 1, Bad::Echo(403));
    lab.ended(&node, lab.task("/examples/hello/v1").inputs(&[input]).submit()).await.failed();
    rubbish.answer("GET /v1/tasks", 1, Bad::Echo(500));
    rubbish.heal();
    rubbish.answer("GET /v1/tasks", 1, Bad::Echo(500));
    node.says("poll failed").await;
    node.stop().await;
    let log = node.log();
    let tokens = tokens.lock().expect("notes").clone();
    assert!(tokens.len() >= 6, "node, domain and renewed tokens were seen: {}", tokens.len());
    for secret in tokens.iter().map(String::as_str).chain([REG_SECRET, node.key.as_str()]) {
        let at = log.find(secret);
        assert!(at.is_none(), "a secret is in: {}", log.lines().find(|line| line.contains(secret)).unwrap_or_default());
    }
    assert!(log.contains("\"level\":\"TRACE\""), "the log was as talkative as it can be");
}

#[tokio::test]
async fn a_runner_gets_the_token_only_where_plugins_toml_grants_it() {
    let lab = Lab::start().await;
    let node = lab.joined(&[fixtures::zoo()]).await;
    let ended = lab.run(&node, "/fixtures/token/v1", json!({})).await;
    let seen: Value = serde_json::from_slice(&lab.artifact(ended.completed(), "token.json").await).expect("JSON");
    assert_eq!((&seen["granted"], &seen["kind"]), (&json!(false), &json!("Unsupported")), "{seen}");
    node.stop().await;

    let granted = "[[plugin]]\nfile = \"zoo\"\ngrant = [\"token\"]\n";
    let node = lab.node(&[fixtures::zoo()]).plugins_file(granted).leasing().await;
    let ended = lab.run(&node, "/fixtures/token/v1", json!({})).await;
    let seen: Value = serde_json::from_slice(&lab.artifact(ended.completed(), "token.json").await).expect("JSON");
    assert_eq!(seen["granted"], true, "{seen}");
    assert!(seen["length"].as_u64() > Some(20), "{seen}");
}
