//! The base of every integration test: the real binary, the real dev server, real plugins.
//!
//! [`TestServer`] is a dev server with helpers for jobs and data. [`node`] starts the binary. [`fault_proxy`] is a proxy
//! between the two that gives bad answers. [`fixtures`] builds the plugins. Nothing here sleeps: every wait is for an
//! event. Each wait has a time limit, and a timeout fails with the node's own log.

pub(crate) mod fault_proxy;
pub(crate) mod fixtures;
pub(crate) mod folder;
pub(crate) mod hygiene;
pub(crate) mod node;
#[cfg(feature = "grpc")]
pub(crate) mod node_plane;
pub(crate) mod tls;

use std::{collections::BTreeMap, future::Future, path::PathBuf, time::Duration};

use http::{Request, StatusCode};
use http_body_util::BodyExt;
use runner_host::{
    dev::{Config, DevServer, JournalEntry},
    transport::{self, Client},
};
use serde_json::{Value, json};
use url::Url;
use uuid::Uuid;

use node::{NodeSetup, TestNode};

/// Far longer than any step takes. It turns a hang into a failed test.
pub(crate) const EVENT_LIMIT: Duration = Duration::from_secs(20);

/// Waits for `event`. On timeout it fails and names the event.
pub(crate) async fn within<T>(what: &str, log: impl Fn() -> String, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(EVENT_LIMIT, event).await {
        Ok(value) => value,
        Err(_) => panic!("waited {EVENT_LIMIT:?} for {what}; the node said:\n{}", log()),
    }
}

/// A dev server, and a client of it.
pub(crate) struct TestServer {
    pub(crate) dev_server: DevServer,
    client: Client,
}

impl TestServer {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        change(&mut config);
        Self::around(DevServer::start(config).await.expect("a dev server starts on a free port"))
    }

    pub(crate) fn around(dev_server: DevServer) -> Self {
        Self { dev_server, client: Client::new(transport::Config::default()) }
    }

    /// The setup of a node that will connect to this dev server with these plugins.
    pub(crate) fn node(&self, plugins: &[PathBuf]) -> NodeSetup {
        let (dds, dms) = (self.dev_server.dds_url(), self.dev_server.dms_url());
        NodeSetup::new(&dds, &dms, plugins)
    }

    /// A node that has registered and leases.
    pub(crate) async fn joined(&self, plugins: &[PathBuf]) -> TestNode {
        self.node(plugins).leasing().await
    }

    /// A job with one task.
    pub(crate) fn task(&self, capability: &str) -> TaskSetup<'_> {
        let task = json!({ "label": "one", "stage": "one", "capability": capability, "max_attempts": 1 });
        TaskSetup { test_server: self, task }
    }

    /// Runs a job with one task to its end.
    pub(crate) async fn run(&self, node: &TestNode, capability: &str, meta: Value) -> Ended {
        self.ended(node, self.task(capability).meta(meta).submit()).await
    }

    /// Waits until all tasks of the job have ended.
    pub(crate) async fn ended(&self, node: &TestNode, job: Uuid) -> Ended {
        let over = |view: &Value| matches!(view["job"]["status"].as_str(), Some("completed" | "failed" | "canceled"));
        let ended = within("the end of a job", || node.log(), self.dev_server.job_until(job, over)).await;
        Ended(ended)
    }

    /// Waits until the job's first task matches `wanted`.
    pub(crate) async fn task_until(&self, node: &TestNode, job: Uuid, wanted: impl Fn(&Value) -> bool) -> Value {
        let view = self.dev_server.job_until(job, |view| wanted(&view["tasks"][0]));
        within("a change of a task", || node.log(), view).await["tasks"][0].clone()
    }

    /// Waits until the job's first task runs and its runner has reported that.
    pub(crate) async fn started(&self, node: &TestNode, job: Uuid) -> Value {
        self.task_until(node, job, |task| task["meta"]["progress"]["started"] == true).await
    }

    /// Waits until the dev server's journal matches `wanted`.
    pub(crate) async fn seen(&self, node: &TestNode, wanted: impl Fn(&[JournalEntry]) -> bool) -> Vec<JournalEntry> {
        within("a request", || node.log(), self.dev_server.journal_until(wanted)).await
    }

    /// Stores an input.
    pub(crate) async fn put(&self, name: &str, bytes: &[u8]) -> Uuid {
        self.dev_server.put_data(name, "binary", bytes).await.expect("the dev server stores data")
    }

    /// An artifact's bytes.
    pub(crate) async fn read(&self, id: &str) -> Vec<u8> {
        let url =
            format!("{}api/v1/domains/{}/data/{id}?raw=1", self.dev_server.dds_url(), self.dev_server.domain_id());
        let request = Request::get(url).header("authorization", format!("Bearer {}", self.dev_server.grant()));
        let request = request.body(transport::full("")).expect("a request");
        let answer = self.client.send(request, EVENT_LIMIT).await.expect("the dev server answers");
        assert_eq!(answer.status(), StatusCode::OK, "artifact {id}");
        answer.into_body().collect().await.expect("a whole body").to_bytes().to_vec()
    }

    /// Number of items in the domain.
    pub(crate) async fn stored(&self) -> usize {
        let url = format!("{}api/v1/domains/{}/data", self.dev_server.dds_url(), self.dev_server.domain_id());
        let request = Request::get(url).header("authorization", format!("Bearer {}", self.dev_server.grant()));
        let request = request.body(transport::full("")).expect("a request");
        let answer = self.client.call(request, EVENT_LIMIT).await.expect("the dev server answers");
        let listed: Value = answer.json().expect("JSON");
        listed["data"].as_array().expect("a list").len()
    }

    /// Number of bytes that the dev server reports for an id.
    pub(crate) async fn size(&self, id: &str) -> u64 {
        let url = format!("{}api/v1/domains/{}/data/{id}", self.dev_server.dds_url(), self.dev_server.domain_id());
        let request = Request::get(url).header("authorization", format!("Bearer {}", self.dev_server.grant()));
        let request = request.body(transport::full("")).expect("a request");
        let answer = self.client.call(request, EVENT_LIMIT).await.expect("the dev server answers");
        answer.json::<Value>().expect("JSON")["size"].as_u64().expect("a size")
    }

    /// The artifact a finished job published under this logical path.
    pub(crate) async fn artifact(&self, ended: &Ended, path: &str) -> Vec<u8> {
        self.read(ended.artifacts()[path]["id"].as_str().expect("an artifact has an id")).await
    }
}

/// A task before it is submitted.
pub(crate) struct TaskSetup<'a> {
    test_server: &'a TestServer,
    task: Value,
}

impl TaskSetup<'_> {
    pub(crate) fn meta(mut self, meta: Value) -> Self {
        self.task["meta"] = meta;
        self
    }

    pub(crate) fn inputs(mut self, ids: &[Uuid]) -> Self {
        self.task["inputs_cids"] = json!(ids);
        self
    }

    /// Sets any other field.
    pub(crate) fn set(mut self, field: &str, value: Value) -> Self {
        self.task[field] = value;
        self
    }

    pub(crate) fn submit(self) -> Uuid {
        self.test_server
            .dev_server
            .create_job(json!({ "label": "it", "tasks": [self.task] }))
            .expect("a job the dev server takes")
    }
}

/// A job that has ended, as its author sees it.
#[derive(Debug)]
pub(crate) struct Ended(pub(crate) Value);

impl Ended {
    pub(crate) fn status(&self) -> &str {
        self.0["job"]["status"].as_str().expect("a job has a status")
    }

    pub(crate) fn task(&self) -> &Value {
        &self.0["tasks"][0]
    }

    /// The last receipt's meta.
    pub(crate) fn receipt(&self) -> &Value {
        &self.0["receipts"].as_array().and_then(|all| all.last()).expect("a job that ended has a receipt")["meta"]
    }

    pub(crate) fn completed(&self) -> &Self {
        assert_eq!(self.status(), "completed", "{:#}", self.0);
        self
    }

    /// Reason and details of a failure.
    pub(crate) fn failed(&self) -> (&str, &Value) {
        assert_eq!(self.status(), "failed", "{:#}", self.0);
        let meta = self.receipt();
        (meta["reason"].as_str().expect("a failure has a reason"), &meta["details"])
    }

    /// Artifacts of the receipt by logical path, of a completion or a failure.
    pub(crate) fn artifacts(&self) -> BTreeMap<String, Value> {
        let meta = self.receipt();
        let list = if meta["artifacts"].is_array() { &meta["artifacts"] } else { &meta["details"]["artifacts"] };
        let list = list.as_array().expect("a list of artifacts");
        let path = |artifact: &Value| artifact["logical_path"].as_str().expect("a path").to_owned();
        list.iter().map(|artifact| (path(artifact), artifact.clone())).collect()
    }
}

/// A URL on `base` without a trailing slash.
pub(crate) fn trimmed(base: &Url) -> &str {
    base.as_str().trim_end_matches('/')
}
