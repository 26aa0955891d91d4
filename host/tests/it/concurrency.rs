//! Limits of concurrency: the node's slots, a plugin's own limit, the control plane's limit.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::{NodeSetup, TestNode},
    within,
};

/// A job whose tasks end one by one when their files appear.
struct Held {
    files: TempDir,
    job: Uuid,
}

impl Held {
    fn submit(test_server: &TestServer, tasks: usize) -> Self {
        let files = tempfile::tempdir().expect("a folder");
        let task = |n: usize| {
            json!({ "label": n.to_string(), "stage": "s", "capability": "/fixtures/wait-file/v1", "max_attempts": 1,
                    "meta": { "file": files.path().join(n.to_string()) } })
        };
        let tasks: Vec<Value> = (0..tasks).map(task).collect();
        let job = test_server.dev_server.create_job(json!({ "label": "held", "tasks": tasks })).expect("a job");
        Self { files, job }
    }

    /// Lets task number `n` end.
    fn release(&self, n: usize) {
        touch(&self.files.path().join(n.to_string()));
    }

    /// Waits for `started` tasks whose runners have started and `ended` tasks that have ended.
    async fn until(&self, test_server: &TestServer, node: &TestNode, started: usize, ended: usize) -> Value {
        let reached = test_server.dev_server.job_until(self.job, |job| {
            (running(job), job["tasks_summary"]["completed"].as_u64()) == (started, u64::try_from(ended).ok())
        });
        within(
            "tasks to start and end",
            || format!("{:#}\n{}", test_server.dev_server.job(self.job).unwrap_or_default(), node.log()),
            reached,
        )
        .await
    }
}

fn touch(file: &Path) {
    std::fs::write(file, "").expect("the folder is writable");
}

/// Tasks of a job that a node holds and whose runner has started.
fn running(job: &Value) -> usize {
    let tasks = job["tasks"].as_array().expect("tasks");
    let begun = |task: &&Value| !task["reserved_by"].is_null() && task["meta"]["progress"]["started"] == true;
    tasks.iter().filter(begun).count()
}

/// Tasks of a job that a node holds.
fn leased(job: &Value) -> usize {
    job["tasks"].as_array().expect("tasks").iter().filter(|task| !task["reserved_by"].is_null()).count()
}

#[tokio::test]
async fn running_tasks_fill_slots_and_never_exceed_them() {
    let test_server = TestServer::start().await;
    let held = Held::submit(&test_server, 7);
    let node = test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "3").leasing().await;
    let mut at_once = [0; 7];
    for ended in 0..7 {
        let started = 3.min(7 - ended);
        let job = test_server
            .dev_server
            .job_until(held.job, |job| running(job) == started && job["tasks_summary"]["completed"] == json!(ended));
        let job = within("the slots to fill", || node.log(), job).await;
        assert_eq!(leased(&job), started);
        let status = node.status().await;
        // The control plane may record an end before the page shows it.
        let tasks = status["tasks"].as_object().expect("tasks").values();
        let shown = tasks.filter(|task| task["state"] != "reporting").count();
        assert!(started <= shown && shown <= 3 && status["slots"] == 3, "{status:#}");
        // A slot is free when its task result is on disk, so leases may overlap briefly. Runs do not overlap.
        for (most, task) in at_once.iter_mut().zip(job["tasks"].as_array().expect("tasks")) {
            *most = (*most).max(task["meta"]["progress"]["at_once"].as_u64().unwrap_or_default());
        }
        held.release(ended);
    }
    test_server.ended(&node, held.job).await.completed();
    at_once.sort_unstable(); // of tasks that begin together, either may be the first
    assert_eq!(at_once, [1, 2, 3, 3, 3, 3, 3], "runs at once when each began");
}

#[tokio::test]
async fn lease_for_full_plugin_waits_with_heartbeats() {
    let test_server = TestServer::with(|config| config.lease_ttl = std::time::Duration::from_secs(2)).await;
    let held = Held::submit(&test_server, 2);
    let zoo = "[[plugin]]\nfile = \"zoo\"\nmax_concurrency = 1\n";
    let node = test_server.node(&[fixtures::zoo(), fixtures::hello()]).set("MAX_CONCURRENCY", "3").plugins_file(zoo);
    let node = node.leasing().await;
    let job = held.until(&test_server, &node, 1, 0).await;
    let (first, second) = (job["tasks"][0]["id"].clone(), job["tasks"][1]["id"].clone());
    // Another plugin is not delayed.
    test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
    // The lease is kept without a run for two lease terms, which is at least six heartbeats.
    let path = format!("/v1/tasks/{}/heartbeat", second.as_str().expect("an id"));
    test_server
        .seen(&node, |seen| seen.iter().filter(|seen| seen.path == path && seen.status == 200).count() >= 8)
        .await;
    let status = node.status().await;
    assert_eq!(status["tasks"][first.as_str().expect("an id")]["state"], "running", "{status:#}");
    assert_eq!(status["tasks"][second.as_str().expect("an id")]["state"], "waiting", "{status:#}");
    held.release(0);
    held.until(&test_server, &node, 1, 1).await;
    held.release(1);
    let ended = test_server.ended(&node, held.job).await;
    assert_eq!(ended.completed().0["tasks"][1]["attempts"], 1, "the lease never expired");
}

#[tokio::test]
async fn busy_answer_stops_polling_until_lease_ends() {
    let test_server = TestServer::with(|config| config.leases_per_node = Some(1)).await;
    let held = Held::submit(&test_server, 3);
    let node = test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "3").leasing().await;
    let refused = |seen: &[runner_host::dev::JournalEntry]| {
        seen.iter().filter(|seen| seen.path == "/v1/tasks" && seen.status == 409).count()
    };
    for n in 0..3 {
        held.until(&test_server, &node, 1, n).await;
        test_server.seen(&node, |seen| refused(seen) > n).await;
        assert_eq!(refused(&test_server.dev_server.journal()), n + 1, "one refusal a lease, then the node waits");
        held.release(n);
    }
    test_server.ended(&node, held.job).await.completed();
}

/// Checks the scheduling of the thread that keeps the leases: a runner that wakes up does not preempt it.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn only_plugin_threads_use_batch_scheduling() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
    let threads = std::fs::read_dir(format!("/proc/{}/task", node.pid())).expect("a process").flatten();
    let mut seen = std::collections::BTreeMap::new();
    for thread in threads {
        let Ok(stat) = std::fs::read_to_string(thread.path().join("stat")) else { continue };
        let (name, rest) = stat.rsplit_once(") ").expect("a name in parentheses");
        let name = name.rsplit_once('(').expect("a name in parentheses").1.to_owned();
        // Field 41 of the line, counted from 1. `rest` starts after the number and the name.
        let policy = rest.split(' ').nth(38).expect("a policy").to_owned();
        seen.insert(name, policy);
    }
    for (kind, policy) in [("plugin-zoo", "3"), ("runner-zoo", "3"), ("control", "0")] {
        let mut threads = seen.iter().filter(|(name, _)| name.starts_with(kind)).peekable();
        assert!(threads.peek().is_some() && threads.all(|(_, seen)| seen == policy), "{kind}: {seen:?}");
    }
    node.stop().await;
}

/// The soft and the hard limit of open files of this node.
#[cfg(target_os = "linux")]
fn open_files(node: &TestNode) -> (u64, u64) {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", node.pid())).expect("the node runs");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).expect("a line about files");
    let mut numbers = line.split_whitespace().filter_map(|word| word.parse().ok());
    (numbers.next().expect("a soft limit"), numbers.next().expect("a hard limit"))
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn many_slots_raise_open_file_limit_or_warn() {
    let test_server = TestServer::start().await;
    // A node with few slots does not change the limit.
    for (slots, limits, expected) in
        [("100", (300, 2048), (1056, 2048)), ("4", (300, 2048), (300, 2048)), ("100", (300, 500), (500, 500))]
    {
        let setup = test_server.node(&[fixtures::hello()]).set("MAX_CONCURRENCY", slots);
        let node = setup.open_files(limits.0, limits.1).leasing().await;
        assert_eq!(open_files(&node), expected, "{slots} slots");
        let output = node.said("descriptors.low");
        assert_eq!(output.len(), usize::from(expected.0 < 1056 && slots == "100"), "{}", node.log());
        if let [line] = &output[..] {
            assert_eq!((&line["limit"], &line["wanted"], &line["slots"]), (&json!(500), &json!(1056), &json!(100)));
        }
        test_server.run(&node, "/examples/hello/v1", json!({})).await.completed();
        node.stop().await;
    }
}

/// All `slots` tasks end at once, and no report is answered for a while. There are at most `calls` connections. The
/// node still serves its pages.
async fn hang(setup: impl FnOnce(NodeSetup) -> NodeSetup, slots: usize, calls: usize) {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", slots.to_string());
    let node = setup(node).leasing().await;
    let held = Held::submit(&test_server, slots);
    held.until(&test_server, &node, slots, 0).await;
    let (gate, bad) = Bad::gate();
    proxy.answer("POST /v1/tasks/*/complete", usize::MAX, bad);
    (0..slots).for_each(|n| held.release(n));
    // A poll and heartbeats may use some of the connections.
    proxy.seen("POST /v1/tasks/*/complete", calls - calls / 4).await;
    assert_eq!(node.page("/health").await.0, 200);
    gate.cancel();
    held.until(&test_server, &node, 0, slots).await;
    // The sign-in uses one more.
    assert!(proxy.connections() <= calls + 1, "{} connections", proxy.connections());
    assert_eq!(node.page("/health").await.0, 200);
    node.stop().await;
}

#[tokio::test]
async fn hung_plane_gets_at_most_256_connections() {
    hang(|node| node, 300, 256).await;
}

#[tokio::test]
async fn control_plane_connections_use_quarter_of_file_limit() {
    hang(|node| node.open_files(64, 64), 60, 16).await;
}
