//! Plugins that break or strain the rules of runner.h. The head of `fixtures/c/hostile.c` numbers the behaviours.
//!
//! Each ends in a refusal or one failed task. The node and its other plugins go on.

#[cfg(target_os = "linux")]
use std::collections::{BTreeMap, BTreeSet};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use uuid::Uuid;

#[cfg(target_os = "linux")]
use crate::harness::within;
use crate::harness::{
    Ended, TestServer, fixtures,
    node::{NodeSetup, TestNode},
};

/// A short lease, so that the heartbeat with a cancel comes soon.
const LEASE: Duration = Duration::from_secs(2);
const HELLO: &str = "/examples/hello/v1";
/// Every input of these tests. One of them fills the memory budget.
const INPUT_BYTES: usize = 3 << 20;
const MEMORY_BUDGET: &str = "3MiB";

/// The behaviours that need nothing from a test, with the reason of the failed task.
const BEHAVIOURS: [(&str, &str); 33] = [
    ("null-reply", "ended"),
    ("null-text", "11 x 68"),
    ("long-text", "44 x 68"),
    ("large-text", "11 x 77"),
    ("null-bytes", "4 x 68, 4 releases"),
    ("null-release", "2 x 0"),
    ("not-utf8", "\"caf\u{fffd}\""),
    ("forged-host", "102 x 66, 12"),
    ("forged-task", "102 x 66, 12"),
    ("double-complete", "first"),
    ("unknown-end", "unknown end"),
    ("long-complete", ""),
    ("null-complete", "the plugin passed 18446744073709551615 bytes at the address 0x0, which no memory has"),
    ("after-complete", "ended"),
    ("eight-threads", "544 answers"),
    ("eight-complete", "one of eight"),
    ("nested", "fits"),
    ("nested-stale", "ended"),
    ("nested-forged", "fits"),
    ("nested-folder", "fits, fits, fits, fits"),
    ("nested-release", "fits, fits, fits"),
    ("nested-threads", "ended"),
    ("two-reads", "3145728 bytes, status 0"),
    ("after-finish", "1 x 0, 3 x 68"),
    ("wrong-direction", "5 x 68, 3 x 0"),
    ("unknown-stream", "20 x 68"),
    ("many-streams", "64 x 0, 16 x 77"),
    ("unknown-flags", "4 x 65"),
    ("read-sizes", "1 bytes, bounded"),
    ("odd-json", "2 x 0, 2 x 68, 1 x 77"),
    ("logs", "ended"),
    ("many-calls", "76 of 76 x 77"),
    ("late-release", "kept"),
];
/// Those that take long.
#[cfg(target_os = "linux")]
const HEAVY: [&str; 15] = [
    "after-finish",
    "large-text",
    "late-release",
    "logs",
    "many-calls",
    "many-streams",
    "nested",
    "nested-folder",
    "nested-forged",
    "nested-release",
    "nested-stale",
    "nested-threads",
    "null-release",
    "two-reads",
    "wrong-direction",
];
/// Each task of this behaviour has another of the numbers.
const MORE_ENDS: [(&str, &str); 3] = [("unknown-end", "unknown end"); 3];

fn hostile() -> PathBuf {
    fixtures::c("hostile", &[])
}

fn capability(behaviour: &str) -> String {
    format!("/fixtures/hostile/{behaviour}/v1")
}

fn submit(test_server: &TestServer, behaviour: &str, input: Uuid) -> Uuid {
    test_server.task(&capability(behaviour)).inputs(&[input]).submit()
}

async fn input(test_server: &TestServer) -> Uuid {
    test_server.put("input", &vec![7; INPUT_BYTES]).await
}

fn node_of(test_server: &TestServer) -> NodeSetup {
    let node = test_server.node(&[hostile(), fixtures::hello()]).set("MEMORY_BUDGET", MEMORY_BUDGET);
    node.set("MAX_CONCURRENCY", "8").set("CANCEL_GRACE", "200ms")
}

/// What the plugin gave as the reason of the failure.
fn reason(ended: &Ended) -> String {
    let (reason, _) = ended.failed();
    reason.strip_prefix("runner failed: ").unwrap_or(reason).to_owned()
}

fn plugin(status: &Value, name: &str) -> Value {
    let plugins = status["plugins"].as_array().into_iter().flatten();
    plugins.clone().find(|plugin| plugin["name"] == name).cloned().unwrap_or_default()
}

async fn plugin_until(node: &TestNode, wanted: impl Fn(&Value) -> bool) -> Value {
    let (_, status) = node.page_until("/status.json", |page| wanted(&plugin(&page.1, "hostile"))).await;
    status
}

async fn still_serves(test_server: &TestServer, node: &TestNode) {
    test_server.run(node, HELLO, json!({})).await.completed();
}

#[tokio::test]
async fn hostile_calls_end_in_one_failed_task() {
    let test_server = TestServer::start().await;
    let input = input(&test_server).await;
    let node = node_of(&test_server).leasing().await;
    let all = BEHAVIOURS.into_iter().chain(MORE_ENDS);
    let jobs: Vec<_> = all.map(|(name, wanted)| (name, wanted, submit(&test_server, name, input))).collect();
    let mut wrong = Vec::new();
    for (behaviour, wanted, job) in jobs {
        let found = reason(&test_server.ended(&node, job).await);
        // The text of long-complete.
        if found.trim_start_matches('x') != wanted {
            wrong.push(format!("{behaviour}: {found}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let status = plugin_until(&node, |plugin| plugin["unreleased_bytes"] == 0).await;
    let found = plugin(&status, "hostile");
    assert_eq!(json!([found["state"], found["hanging_calls"]]), json!(["loaded", null]), "{found}");
    // 114 of forged-task, 1 of double-complete, 17 of after-complete, 7 of eight-complete, 20 000 each of
    // nested-stale, nested-folder and nested-release, 4 of nested-threads, 1 of logs.
    assert_eq!(status["stale_calls"], 60_144, "{status}");
    assert_eq!(status["stuck_runners"], 0, "{status}");
    still_serves(&test_server, &node).await;
    node.stop().await;
}

#[tokio::test]
async fn calls_for_another_instance_are_stale() {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let only = |file: &str, names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| capability(name)).collect();
        format!("[[plugin]]\nfile = \"{file}\"\ncapabilities = {names:?}\n")
    };
    let other = fixtures::c("hostile", &["NAME=\"other\""]);
    let node = test_server.node(&[]).set("MAX_CONCURRENCY", "2");
    for (name, library) in [("one.so", hostile()), ("other.so", other)] {
        std::fs::copy(library, node.plugins().join(name)).expect("the folder is writable");
    }
    let file = only("one.so", &["other-task", "other-host"]) + &only("other.so", &["complete-in-cancel"]);
    let node = node.plugins_file(&file).leasing().await;
    let held = test_server.task(&capability("complete-in-cancel")).submit();
    let numbers = test_server.started(&node, held).await["meta"]["progress"].clone();
    for (behaviour, meta) in [
        ("other-task", json!({ "other_task": numbers["task"] })),
        ("other-host", json!({ "other_host": numbers["host"] })),
    ] {
        assert_eq!(reason(&test_server.run(&node, &capability(behaviour), meta).await), "17 x 66", "{behaviour}");
    }
    assert_eq!(node.status().await["stale_calls"], 34);
    assert!(test_server.dev_server.cancel_job(held));
    node.line(|line| line["event"] == "task.ended" && line["outcome"] == "cancelled").await;
    node.stop().await;
}

/// A `release` runs on a thread of its plugin, not on one that moves the data of all tasks.
#[tokio::test]
async fn hanging_release_blocks_only_its_plugin() {
    let test_server = TestServer::start().await;
    let node = node_of(&test_server).leasing().await;
    // More than a node with 8 slots has threads for data.
    for _ in 0..16 {
        let ended = test_server.run(&node, &capability("slow-release"), json!({})).await;
        assert_eq!(reason(&ended), "1 x 0");
    }
    plugin_until(&node, |plugin| plugin["hanging_calls"] == 16).await;
    still_serves(&test_server, &node).await;
    test_server.run(&node, &capability("go-on"), json!({})).await;
    plugin_until(&node, |plugin| plugin["hanging_calls"].is_null()).await;
    node.stop().await;
}

#[tokio::test]
async fn late_and_silent_runners_are_counted() {
    let test_server = TestServer::with(|config| config.lease_ttl = LEASE).await;
    let input = input(&test_server).await;
    let node = node_of(&test_server).leasing().await;

    let job = submit(&test_server, "complete-in-cancel", input);
    test_server.started(&node, job).await;
    assert!(test_server.dev_server.cancel_job(job));
    node.line(|line| line["event"] == "task.ended" && line["outcome"] == "cancelled").await;
    let (_, status) = node.page_until("/status.json", |page| page.1["stale_calls"] == 1).await;
    assert_eq!(status["stuck_runners"], 0, "{status}");

    let silent = test_server.task(&capability("silent")).meta(json!({ "budgets": { "wall_ms": 100 } })).submit();
    let ended = test_server.ended(&node, silent).await;
    assert_eq!(ended.failed().0, "budget: wall time 100ms exceeded");
    plugin_until(&node, |plugin| plugin["stuck_runners"] == 1).await;

    let ended = test_server.run(&node, &capability("hangs-in-start"), json!({})).await;
    assert_eq!(reason(&ended), "ended");
    plugin_until(&node, |plugin| plugin["hanging_calls"] == 1).await;
    test_server.run(&node, &capability("go-on"), json!({})).await;
    plugin_until(&node, |plugin| plugin["hanging_calls"].is_null()).await;

    let ended = test_server.ended(&node, submit(&test_server, "no-release", input)).await;
    assert_eq!(reason(&ended), "kept");
    plugin_until(&node, |plugin| plugin["unreleased_bytes"].as_u64() > Some(0)).await;
    still_serves(&test_server, &node).await;
    node.stop().await;
}

#[tokio::test]
async fn calls_without_end_take_plugin_out_of_service() {
    let test_server = TestServer::start().await;
    let node = node_of(&test_server).leasing().await;
    test_server.run(&node, &capability("flood"), json!({})).await;
    let line = node.says("plugin.out_of_service").await;
    let reason = "it makes calls faster than it takes their answers; fix the plugin and restart the node";
    assert_eq!((&line["plugin"], &line["reason"]), (&json!("hostile"), &json!(reason)), "{line}");
    // It gets no answers any more, so its calls end.
    plugin_until(&node, |plugin| plugin["hanging_calls"].is_null()).await;
    still_serves(&test_server, &node).await;
    node.stop().await;
}

#[tokio::test]
async fn hostile_create_refuses_only_its_plugin() {
    let test_server = TestServer::start().await;
    let cases = [
        ("twice", "loaded", ""),
        ("thread", "loaded", ""),
        ("zero", "loaded", ""),
        ("unknown", "refused", "not known"),
        ("null-text", "refused", "which no memory has"),
        ("never", "refused", "2s"),
        ("late", "refused", "2s"),
    ];
    let mut node = test_server.node(&[fixtures::hello()]).set("PLUGIN_INIT_TIMEOUT", "2s");
    let mut file = String::from("[[plugin]]\nfile = \"hello\"\n");
    // Each serves another capability.
    for ((create, ..), (behaviour, _)) in cases.iter().zip(BEHAVIOURS) {
        let name = format!("CREATE=\"{create}\"");
        let library = fixtures::c("hostile", &[&name, &format!("NAME=\"{create}\"")]);
        std::fs::copy(library, node.plugins().join(format!("{create}.so"))).expect("the folder is writable");
        file += &format!("[[plugin]]\nfile = \"{create}.so\"\ncapabilities = [{:?}]\n", capability(behaviour));
    }
    node = node.plugins_file(&file);
    let node = node.leasing().await;
    let status = node.status().await;
    for (create, state, why) in cases {
        let found = plugin(&status, create);
        assert_eq!(found["state"], state, "{found}");
        assert!(found["reason"].as_str().unwrap_or_default().contains(why), "{found}");
    }
    assert_eq!(node.said("plugin.second_create").len(), 1);
    for (_, (behaviour, wanted)) in cases.iter().zip(BEHAVIOURS).filter(|((_, state, _), _)| *state == "loaded") {
        assert_eq!(reason(&test_server.run(&node, &capability(behaviour), json!({})).await), wanted);
    }
    still_serves(&test_server, &node).await;
    node.stop().await;
}

#[tokio::test]
async fn hanging_shutdowns_share_one_deadline() {
    let test_server = TestServer::start().await;
    let mut file = String::new();
    let mut libraries = Vec::new();
    // Each serves another capability.
    for (number, (behaviour, _)) in (0..6).zip(BEHAVIOURS) {
        let library = fixtures::c("hostile", &["SHUTDOWN=\"hangs\"", &format!("NAME=\"hangs-{number}\"")]);
        let name = library.file_name().expect("a library has a name").to_string_lossy().into_owned();
        file += &format!("[[plugin]]\nfile = \"{name}\"\ncapabilities = [{:?}]\n", capability(behaviour));
        libraries.push(library);
    }
    let node = test_server.node(&libraries).plugins_file(&file).leasing().await;
    let began = Instant::now();
    node.stop().await;
    // One deadline is a second. Six of them would be six.
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
}

#[tokio::test]
async fn calls_after_shutdown_are_stale() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::c("hostile", &["SHUTDOWN=\"calls\""])]).await;
    // The plugin aborts the process if one of the calls succeeds.
    node.stop().await;
}

/// Most bytes that 4 500 tasks may leave in memory, after 500 have warmed up the node.
#[cfg(target_os = "linux")]
const KEPT_BYTES_MAX: u64 = 12 << 20;

/// How many more idle connections and idle threads there may be: two for each slot.
#[cfg(target_os = "linux")]
const IDLE_MORE_MAX: usize = 16;

/// Open descriptors by kind and threads by name.
#[cfg(target_os = "linux")]
type Used = BTreeMap<String, usize>;

#[cfg(target_os = "linux")]
fn used_by(node: &TestNode) -> Used {
    let mut used = Used::new();
    let mut count = |folder: &str, name: &dyn Fn(PathBuf) -> String| {
        for entry in std::fs::read_dir(format!("/proc/{}/{folder}", node.pid())).expect("it runs").flatten() {
            *used.entry(format!("{folder} {}", name(entry.path()))).or_default() += 1;
        }
    };
    count("fd", &|path| {
        let target = std::fs::read_link(path).unwrap_or_default().to_string_lossy().into_owned();
        target.split(':').next().unwrap_or_default().to_owned()
    });
    count("task", &|path| std::fs::read_to_string(path.join("comm")).unwrap_or_default().trim().to_owned());
    used
}

/// Whether a process uses what it used before. Of idle connections and idle threads of the runtime there may be some
/// more, because more calls may have come at once.
#[cfg(target_os = "linux")]
fn is_as_before(used: &Used, before: &Used) -> bool {
    let kinds: BTreeSet<&String> = used.keys().chain(before.keys()).collect();
    kinds.into_iter().all(|kind| {
        let of = |counts: &Used| counts.get(kind).copied().unwrap_or_default();
        match kind.as_str() {
            "fd socket" | "task tokio-rt-worker" => of(used) <= of(before) + IDLE_MORE_MAX,
            _ => of(used) == of(before),
        }
    })
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn thousands_of_hostile_tasks_leave_nothing() {
    let test_server = TestServer::start().await;
    let input = input(&test_server).await;
    // With one arena, free memory of one thread serves the others. At `trace` the log would take most of the time.
    let node = node_of(&test_server).set("MALLOC_ARENA_MAX", "1").set("RUST_LOG", "info").leasing().await;
    let light: Vec<&str> = BEHAVIOURS.iter().map(|(name, _)| *name).filter(|name| !HEAVY.contains(name)).collect();
    // The threads of the behaviours end after their tasks.
    let settled = async |wanted: &dyn Fn(&Used) -> bool| {
        let ends = async {
            while !wanted(&used_by(&node)) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            used_by(&node)
        };
        within("threads and descriptors to be as before", || format!("{:#?}", used_by(&node)), ends).await
    };
    let mut before = None;
    for batch in 0..10 {
        let heavy = if batch % 2 == 0 { &HEAVY[..] } else { &[] };
        let names = heavy.iter().chain(light.iter().cycle()).take(500);
        let jobs: Vec<_> = names.map(|name| submit(&test_server, name, input)).collect();
        for job in jobs {
            test_server.ended(&node, job).await.failed();
        }
        if before.is_none() {
            // The dispatcher has two threads.
            let used = settled(&|used| used.get("task plugin-hostile") == Some(&2)).await;
            before = Some((used, node.memory("RssAnon")));
        }
    }
    let (used, memory) = before.expect("the first batch is the warm-up");
    settled(&|now| is_as_before(now, &used)).await;
    let kept = node.memory("RssAnon").saturating_sub(memory);
    assert!(kept <= KEPT_BYTES_MAX, "{} KiB kept", kept / 1024);
    still_serves(&test_server, &node).await;
    node.stop().await;
}
