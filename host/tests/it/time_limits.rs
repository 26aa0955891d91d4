//! Time limits of runs: of the plugins file, of the node, of the task and of its control plane.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    both_planes::{Plane, Submitted},
    harness::{TestServer, fixtures, folder::Folder, node::TestNode},
};

const SLOW: &str = "/fixtures/slow/v1";

/// Waits until a task with this state runs, and returns its status.
async fn task_in(node: &TestNode, state: &str) -> Value {
    let of = |page: &Value| page["tasks"].as_object()?.values().find(|task| task["state"] == state).cloned();
    let (_, page) = node.page_until("/status.json", |page| of(&page.1).is_some()).await;
    of(&page).expect("it was there")
}

#[tokio::test]
async fn plugin_limit_cancels_and_fails_a_run() {
    let test_server = TestServer::start().await;
    let file = "[[plugin]]\nfile = \"zoo\"\nlimits = { wall_time = \"300ms\" }\n";
    let node = test_server.node(&[fixtures::zoo()]).plugins_file(file).leasing().await;
    let ended = test_server.run(&node, "/fixtures/polls-cancel/v1", json!({})).await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "budget: wall time 300ms exceeded");
    // Another node may have another limit.
    assert_eq!(
        json!([details["outcome"], details["code"], details["retryable"]]),
        json!(["budget", "budget", true]),
        "{details}"
    );
    assert!(node.says_text("flag seen").await.to_string().contains("Deadline"));
    let line = node.says_ended("accepted").await;
    assert_eq!((&line["outcome"], &line["reason"]), (&json!("budget"), &json!("wall time 300ms exceeded")), "{line}");
    assert!(node.said("runner.stuck").is_empty());
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    node.stop().await;
}

#[tokio::test]
async fn capability_limit_replaces_the_plugin_limit() {
    let test_server = TestServer::start().await;
    let file = format!(
        "[defaults]\nlimits = {{ wall_time = \"100ms\" }}\n[[plugin]]\nfile = \"zoo\"\nlimits = {{ wall_time = \"1h30m\" }}\n\
         [plugin.capability_limits.\"{SLOW}\"]\nwall_time = \"200ms\"\n"
    );
    let node = test_server.node(&[fixtures::zoo()]).plugins_file(&file).set("TASK_TIME_LIMIT", "100ms");
    let node = node.set("MAX_CONCURRENCY", "2").leasing().await;
    let ended = test_server.run(&node, SLOW, json!({})).await;
    assert_eq!(ended.failed().0, "budget: wall time 200ms exceeded");
    let other = test_server.task("/fixtures/polls-cancel/v1").submit();
    let running = task_in(&node, "running").await;
    assert_eq!(running["time_limit_ms"], 5_400_000, "{running}");
    let status = node.status().await;
    let limits = &status["plugins"][0]["time_limits_ms"];
    assert_eq!((&limits[SLOW], &limits["/fixtures/ok/v1"]), (&json!(200), &json!(5_400_000)), "{limits}");
    assert!(test_server.dev_server.cancel_job(other));
    node.says_ended("none").await;
    node.stop().await;
}

#[tokio::test]
async fn node_limit_applies_where_plugin_has_none() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("TASK_TIME_LIMIT", "200ms").leasing().await;
    let ended = test_server.run(&node, SLOW, json!({})).await;
    assert_eq!(ended.failed().0, "budget: wall time 200ms exceeded");
    // The task may shorten the limit of the node. It cannot extend it.
    let ended = test_server.run(&node, SLOW, json!({ "budgets": { "wall_ms": 3_600_000 } })).await;
    assert_eq!((ended.failed().0, &ended.failed().1["retryable"]), ("budget: wall time 200ms exceeded", &json!(true)));
    let ended = test_server.run(&node, SLOW, json!({ "budgets": { "wall_ms": 100 } })).await;
    assert_eq!((ended.failed().0, &ended.failed().1["retryable"]), ("budget: wall time 100ms exceeded", &json!(false)));
    node.stop().await;
}

#[tokio::test]
async fn smallest_limit_of_a_local_job_applies() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::zoo()]).set("TASK_TIME_LIMIT", "1h").leasing().await;
    for (id, secs, wall_ms, text) in
        [("a", 3600, 150, "wall time 150ms exceeded"), ("b", 1, 90_000, "wall time 1s exceeded")]
    {
        let meta = json!({ "budgets": { "wall_ms": wall_ms } });
        plane.put_job(id, &json!({ "capability": SLOW, "time_limit_secs": secs, "meta": meta }));
        plane.result(&node, &Submitted::File(id.to_owned())).await;
        let done = plane.done(id).expect("a result");
        assert_eq!(
            json!([done["outcome"], done["reason"], done["retryable"]]),
            json!(["budget", text, false]),
            "{done}"
        );
    }
    node.stop().await;
}

#[cfg(feature = "grpc")]
#[tokio::test]
async fn smallest_limit_of_a_grpc_run_applies() {
    use crate::harness::node_plane::{NodePlane, lease};
    let plane = NodePlane::start().await;
    let node = plane.node(&[fixtures::zoo()], "").set("TASK_TIME_LIMIT", "1h").leasing().await;
    // The budgets of this lease allow 60 s.
    plane.send(&node, lease("short", SLOW, &[], &[("budgets;json", r#"{"wall_ms":150}"#)])).await;
    let sent = plane.failed(&node, "short").await;
    assert_eq!((sent.error_message.as_str(), sent.retryable), ("wall time 150ms exceeded", false));
    plane.send(&node, lease("bad", SLOW, &[], &[("budgets;json", r#"{"wall_ms":-1}"#)])).await;
    let sent = plane.failed(&node, "bad").await;
    assert!(sent.error_message.contains("meta.budgets.wall_ms is -1, expected a whole number"), "{sent:?}");
    plane.send(&node, lease("long", SLOW, &[], &[("budgets;json", r#"{"wall_ms":900000}"#)])).await;
    assert_eq!(task_in(&node, "running").await["time_limit_ms"], 60_000);
    node.kill();
}

#[tokio::test]
async fn unusable_wall_ms_fails_the_task() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    for (wall_ms, found) in [
        (json!(0), "0"),
        (json!(-5), "-5"),
        (json!(1.5), "1.5"),
        (json!("15m"), "a text"),
        (json!(true), "a boolean"),
        (json!([1]), "a list or an object"),
    ] {
        let ended = test_server.run(&node, SLOW, json!({ "budgets": { "wall_ms": wall_ms } })).await;
        let (reason, details) = ended.failed();
        assert_eq!((reason, &details["stage"]), ("node_setup_failed", &json!("start_session")), "{details}");
        let error = format!("meta.budgets.wall_ms is {found}, expected a whole number of milliseconds above 0");
        assert_eq!(details["error"], error);
    }
    // Other budgets and metadata of another form set no limit.
    for meta in [json!({ "budgets": { "wall_ms": null } }), json!({ "budgets": "none" }), json!([{ "wall_ms": 0 }])] {
        test_server.run(&node, "/fixtures/ok/v1", meta).await.completed();
    }
    node.stop().await;
}

#[tokio::test]
async fn three_runs_ignoring_their_limit_end_the_plugin() {
    let test_server = TestServer::start().await;
    let file = "[[plugin]]\nfile = \"zoo\"\nlimits = { wall_time = \"200ms\" }\n";
    let node = test_server.node(&[fixtures::zoo()]).plugins_file(file).set("CANCEL_GRACE", "100ms").leasing().await;
    for strikes in 1..=3 {
        let ended = test_server.run(&node, "/fixtures/ignores-cancel/v1", json!({ "file": "/never" })).await;
        assert_eq!(ended.failed().0, "budget: wall time 200ms exceeded");
        node.line(|line| line["event"] == "runner.stuck" && line["strikes"] == strikes).await;
    }
    assert_eq!(node.says("plugin.out_of_service").await["plugin"], "zoo");
    let (_, page) = node.page_until("/ready", |page| page.0 == 503).await;
    assert_eq!(page["reasons"][0]["code"], "no-plugin-in-service", "{page}");
}

#[tokio::test]
async fn completion_after_the_limit_does_not_count() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("TASK_TIME_LIMIT", "200ms").set("CANCEL_GRACE", "20s");
    let node = node.leasing().await;
    let ended = test_server.run(&node, "/fixtures/ignores-cancel/v1", json!({ "sleep_ms": 500 })).await;
    assert_eq!(ended.failed().0, "budget: wall time 200ms exceeded");
    assert!(node.said("runner.stuck").is_empty());
    node.stop().await;
}

#[tokio::test]
async fn time_in_the_queue_does_not_count() {
    let test_server = TestServer::start().await;
    let file = format!(
        "[[plugin]]\nfile = \"zoo\"\nmax_concurrency = 1\ncapability_limits = {{ \"{SLOW}\" = {{ wall_time = \"300ms\" }} }}\n"
    );
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let node = test_server.node(&[fixtures::zoo()]).plugins_file(&file).set("MAX_CONCURRENCY", "2").leasing().await;
    let first = test_server.task("/fixtures/wait-file/v1").meta(json!({ "file": go })).submit();
    test_server.started(&node, first).await;
    let second = test_server.task(SLOW).submit();
    assert_eq!(task_in(&node, "waiting").await["time_limit_ms"], 300);
    tokio::time::sleep(Duration::from_millis(600)).await; // no event to wait for: nothing must happen
    task_in(&node, "waiting").await;
    std::fs::write(&go, "").expect("the folder is writable");
    test_server.ended(&node, first).await.completed();
    test_server.started(&node, second).await;
    assert_eq!(test_server.ended(&node, second).await.failed().0, "budget: wall time 300ms exceeded");
    node.stop().await;
}

#[tokio::test]
async fn limit_of_an_unknown_capability_refuses_plugin() {
    let mut folder = Folder::with_a_good_one();
    folder.plugins_file(
        "[[plugin]]\nfile = \"good.so\"\ncapability_limits = { \"/other/v1\" = { wall_time = \"1s\" } }\n",
    );
    let listing = &folder.listings(4).await[0];
    let reason = "does not serve /other/v1, which plugins.toml lists for it; it serves /fixtures/good/v1";
    assert_eq!(listing["reason"], reason, "{listing}");
    folder.plugins_file("[defaults]\nlimits = { wall_time = \"15m\" }\n[[plugin]]\nfile = \"good.so\"\n");
    let listing = &folder.listings(0).await[0];
    assert_eq!(listing["time_limits_ms"], json!({ "/fixtures/good/v1": 900_000 }), "{listing}");
}

#[tokio::test]
async fn invoke_obeys_the_time_limit() {
    let mut folder = Folder::new().usual_logs();
    folder.put("zoo.so", &fixtures::zoo());
    folder.set("TASK_TIME_LIMIT", "200ms");
    let said = folder.invoke(SLOW, &[]).await.expect(1);
    assert!(said.stderr.ends_with("error: budget: wall time 200ms exceeded"), "{}", said.stderr);
}
