//! The node is killed at every point of a task's life, as in a power failure, and starts again. The control plane
//! then has exactly one accepted result and every artifact once. Nothing is left on the disk.
//!
//! Where possible, the dev server holds an answer back while the node is killed. Between two such points the node
//! kills itself (`runner_host::crash`, debug builds only).

use std::{path::PathBuf, time::Duration};

use http::Request;
use http_body_util::BodyExt;
use runner_host::transport::{self, Client};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::{
    EVENT_LIMIT, TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::{NodeSetup, TestNode},
};

const COMPLETE: &str = "POST /v1/tasks/*/complete";
const MIB: usize = 1024 * 1024;
/// The lease expires soon and the task is queued again, because its result is not on the disk.
const BRIEF: Duration = Duration::from_secs(2);
/// The lease does not expire during the test, so the result must come from the disk.
const LONG: Duration = Duration::from_secs(600);

struct Scene {
    test_server: TestServer,
    proxy: FaultProxy,
    job: Uuid,
    bytes: Vec<u8>,
}

impl Scene {
    async fn new(lease: Duration) -> Self {
        let test_server = TestServer::with(|config| {
            config.lease_ttl = lease;
            config.request_max_bytes = MIB as i64;
            config.part_size = MIB as u64;
        })
        .await;
        let proxy = FaultProxy::before(&test_server).await;
        let bytes: Vec<u8> = (0..3 * MIB + 5).map(|n| (n % 251) as u8).collect();
        let input = test_server.put("in", &bytes).await;
        let job = test_server.task("/examples/echo-file/v1").inputs(&[input]).set("max_attempts", json!(3)).submit();
        Self { test_server, proxy, job, bytes }
    }

    fn node(&self) -> NodeSetup {
        self.proxy.node(&[fixtures::echo()])
    }

    /// A node that kills itself at `point`.
    async fn dies_at(&self, point: &str) -> TestNode {
        let node = self.node().set("RUNNER_HOST_CRASH_AT", point).start().await;
        assert_eq!(node.wait().await, -1, "killed, not ended: {}", node.log());
        node
    }

    /// A node that is killed after this many requests match.
    async fn killed_at(&self, request: &str, times: usize) -> TestNode {
        let node = self.node().start().await;
        self.proxy.seen(request, times).await;
        node.kill();
        node.wait().await;
        node
    }

    /// Starts the node again and checks the state.
    async fn survives(self, dead: TestNode, attempts: u64) {
        self.proxy.heal();
        let next = self.node().after(&dead).leasing().await;
        let ended = self.test_server.ended(&next, self.job).await;
        assert_eq!(ended.completed().task()["attempts"], attempts, "{}", next.log());
        let receipts = ended.0["receipts"].as_array().expect("a list");
        assert_eq!(receipts.len(), 1, "one result: {receipts:#?}");
        assert_eq!(ended.artifacts().len(), 1);
        assert!(self.test_server.artifact(&ended, "echo-0.bin").await == self.bytes, "the artifact is whole");
        assert_eq!(self.stored().await, 1, "the artifact is there once");
        next.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 0 && page.1["tasks"] == json!({})).await;
        next.stop().await;
        assert_eq!(dead.scratch(), Vec::<PathBuf>::new(), "nothing stays in SCRATCH_DIR");
    }

    /// Number of artifacts in the domain.
    async fn stored(&self) -> usize {
        let dev_server = &self.test_server.dev_server;
        let url = format!("{}api/v1/domains/{}/data", dev_server.dds_url(), dev_server.domain_id());
        let request = Request::get(url)
            .header("authorization", format!("Bearer {}", dev_server.grant()))
            .header("accept", "application/json")
            .body(transport::full(""))
            .expect("a request");
        let answer =
            Client::new(transport::Config::default()).send(request, EVENT_LIMIT).await.expect("the dev server answers");
        let body = answer.into_body().collect().await.expect("a whole body").to_bytes();
        let value: Value = serde_json::from_slice(&body).unwrap_or_else(|err| panic!("{err}: {body:?}"));
        let all = value["data"].as_array().or(value.as_array()).expect("a list of data");
        all.iter().filter(|item| item["name"].as_str().is_some_and(|name| name.contains("echo"))).count()
    }
}

#[tokio::test]
async fn after_the_lease_before_its_answer_is_read() {
    let scene = Scene::new(BRIEF).await;
    scene.proxy.answer("GET /v1/tasks", 1, Bad::gate().1);
    let node = scene.node().start().await;
    scene.test_server.task_until(&node, scene.job, |task| task["status"] == "leased").await;
    node.kill();
    node.wait().await;
    scene.survives(node, 2).await;
}

#[tokio::test]
async fn after_the_lease_at_its_first_heartbeat() {
    let scene = Scene::new(BRIEF).await;
    scene.proxy.answer("POST /v1/tasks/*/heartbeat", 1, Bad::gate().1);
    let node = scene.killed_at("POST /v1/tasks/*/heartbeat", 1).await;
    scene.survives(node, 2).await;
}

#[tokio::test]
async fn after_the_start_while_the_input_comes() {
    let scene = Scene::new(BRIEF).await;
    scene.proxy.answer("GET /api/v1/domains/*/data?ids=", usize::MAX, Bad::gate().1);
    let node = scene.killed_at("GET /api/v1/domains/*/data?ids=", 1).await;
    scene.survives(node, 2).await;
}

#[tokio::test]
async fn between_two_parts() {
    let scene = Scene::new(BRIEF).await;
    let part = "PUT /api/v1/domains/*/data/multipart";
    scene.proxy.answer(part, 1, Bad::edit(|_| {}));
    scene.proxy.answer(part, usize::MAX, Bad::gate().1);
    let node = scene.killed_at(part, 2).await;
    scene.survives(node, 2).await;
}

#[tokio::test]
async fn before_the_write() {
    let scene = Scene::new(BRIEF).await;
    let node = scene.dies_at("before-write").await;
    scene.survives(node, 2).await;
}

#[tokio::test]
async fn after_the_write() {
    let scene = Scene::new(LONG).await;
    let node = scene.dies_at("after-write").await;
    assert_eq!(scene.proxy.count(COMPLETE), 0);
    scene.survives(node, 1).await;
}

#[tokio::test]
async fn before_complete_is_sent() {
    let scene = Scene::new(LONG).await;
    let node = scene.dies_at("before-report").await;
    assert_eq!(scene.proxy.count(COMPLETE), 0);
    scene.survives(node, 1).await;
}

#[tokio::test]
async fn kill_before_report_acceptance_loses_no_result() {
    let scene = Scene::new(LONG).await;
    scene.proxy.answer(COMPLETE, usize::MAX, Bad::Hang);
    let node = scene.killed_at(COMPLETE, 1).await;
    scene.survives(node, 1).await;
}

#[tokio::test]
async fn kill_before_acceptance_is_read_loses_no_result() {
    let scene = Scene::new(LONG).await;
    scene.proxy.answer(COMPLETE, usize::MAX, Bad::gate().1);
    let node = scene.node().start().await;
    scene.test_server.ended(&node, scene.job).await.completed();
    node.kill();
    node.wait().await;
    scene.survives(node, 1).await;
}

#[tokio::test]
async fn after_the_answer_is_read() {
    let scene = Scene::new(LONG).await;
    let node = scene.dies_at("answer-read").await;
    scene.survives(node, 1).await;
}

#[tokio::test]
async fn stored_report_completes_repeated_lease_without_second_run() {
    let scene = Scene::new(BRIEF).await;
    scene.proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "not now"));
    let dead = scene.killed_at(COMPLETE, 1).await;
    // The lease expires. The next node of this identity leases the task that it has completed already.
    let next = scene.node().after(&dead).start().await;
    next.says("task.leased_again").await;
    scene.test_server.task_until(&next, scene.job, |task| task["attempts"] == 2 && task["status"] == "running").await;
    scene.proxy.heal();
    let ended = scene.test_server.ended(&next, scene.job).await;
    assert_eq!(ended.completed().task()["attempts"], 2, "{}", next.log());
    assert_eq!(ended.0["receipts"].as_array().map(Vec::len), Some(1));
    assert_eq!(scene.stored().await, 1);
    assert_eq!(next.said("task.started").len(), 0, "it is not done twice: {}", next.log());
    next.stop().await;
}
