//! Tests that do not depend on the control plane. The same tests run with the posemesh services and with a folder of
//! job files.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::{NodeSetup, TestNode},
};

const COMPLETE: &str = "POST /v1/tasks/*/complete";

/// A control plane under test.
pub(crate) enum Plane {
    Posemesh { server: Box<TestServer>, faults: FaultProxy },
    Local(TempDir),
}

/// The name of a submitted task.
pub(crate) enum Submitted {
    Job(Uuid),
    File(String),
}

/// The end of a task, as its submitter sees it.
#[derive(Debug)]
pub(crate) struct Result {
    pub(crate) completed: bool,
    pub(crate) text: String,
    /// Number of results that the control plane has.
    pub(crate) results: usize,
}

impl Plane {
    async fn posemesh() -> Self {
        let server = Box::new(TestServer::start().await);
        let faults = FaultProxy::before(&server).await;
        Self::Posemesh { server, faults }
    }

    pub(crate) fn local() -> Self {
        Self::Local(tempfile::tempdir().expect("a folder below the system's temporary one"))
    }

    pub(crate) fn node(&self, plugins: &[PathBuf]) -> NodeSetup {
        match self {
            Self::Posemesh { faults, .. } => faults.node(plugins),
            Self::Local(folder) => NodeSetup::local(folder.path(), plugins),
        }
    }

    pub(crate) fn folder(&self) -> &std::path::Path {
        match self {
            Self::Local(folder) => folder.path(),
            Self::Posemesh { .. } => panic!("only the local control plane has a folder"),
        }
    }

    /// Submits a task with one input, unless it is empty.
    pub(crate) async fn submit(&self, capability: &str, input: &[u8], meta: Value) -> Submitted {
        match self {
            Self::Posemesh { server, .. } => {
                let task = server.task(capability).meta(meta).set("max_attempts", json!(3));
                if input.is_empty() {
                    return Submitted::Job(task.submit());
                }
                let id = server.put(&Uuid::new_v4().to_string(), input).await;
                Submitted::Job(task.inputs(&[id]).submit())
            }
            Self::Local(folder) => {
                let inputs = folder.path().join("inputs");
                fs::create_dir_all(&inputs).expect("the folder is writable");
                let id = Uuid::new_v4().to_string();
                let mut paths = Vec::new();
                if !input.is_empty() {
                    fs::write(inputs.join(&id), input).expect("the folder is writable");
                    paths.push(format!("inputs/{id}"));
                }
                let job = json!({ "capability": capability, "inputs": paths, "meta": meta, "term_secs": 600 });
                self.put_job(&id, &job);
                Submitted::File(id)
            }
        }
    }

    /// Writes a complete job file.
    pub(crate) fn put_job(&self, id: &str, job: &impl ToString) {
        let jobs = self.folder().join("jobs");
        fs::create_dir_all(&jobs).expect("the folder is writable");
        fs::write(jobs.join("new"), job.to_string()).expect("the folder is writable");
        fs::rename(jobs.join("new"), jobs.join(format!("{id}.json"))).expect("the folder is writable");
    }

    /// Waits for the result of a task.
    pub(crate) async fn result(&self, node: &TestNode, task: &Submitted) -> Result {
        match (self, task) {
            (Self::Posemesh { server, .. }, Submitted::Job(job)) => {
                let ended = server.ended(node, *job).await;
                let results = ended.0["receipts"].as_array().map_or(0, Vec::len);
                let completed = ended.status() == "completed";
                Result { completed, text: ended.receipt().to_string(), results }
            }
            (Self::Local(_), Submitted::File(id)) => {
                node.line(|line| ended_for(line, id)).await;
                let done = self.done(id).expect("the report was accepted");
                let names = fs::read_dir(self.folder().join("done")).expect("a folder").flatten();
                let results = names.filter(|entry| entry.file_name().to_string_lossy().contains(id.as_str())).count();
                Result { completed: done["outcome"] == "completed", text: done.to_string(), results }
            }
            _ => panic!("a task of the other control plane"),
        }
    }

    /// The result of a job, if it has one.
    pub(crate) fn done(&self, id: &str) -> Option<Value> {
        let text = fs::read_to_string(self.folder().join("done").join(format!("{id}.json"))).ok()?;
        Some(serde_json::from_str(&text).expect("JSON"))
    }

    /// The bytes that echo-file published.
    async fn echoed(&self, node: &TestNode, task: &Submitted) -> Vec<u8> {
        match (self, task) {
            (Self::Posemesh { server, .. }, Submitted::Job(job)) => {
                server.artifact(&server.ended(node, *job).await, "echo-0.bin").await
            }
            (Self::Local(folder), Submitted::File(id)) => {
                fs::read(folder.path().join("out").join(id).join("echo-0.bin")).expect("published")
            }
            _ => panic!("a task of the other control plane"),
        }
    }

    /// Rejects every report until [`Plane::accept_reports`].
    fn refuse_reports(&self) {
        match self {
            Self::Posemesh { faults, .. } => faults.answer(COMPLETE, usize::MAX, Bad::Status(503, "not now")),
            Self::Local(folder) => {
                let done = folder.path().join("done");
                fs::remove_dir(&done).expect("an empty folder");
                fs::write(done, "in the way").expect("the folder is writable");
            }
        }
    }

    fn accept_reports(&self) {
        match self {
            Self::Posemesh { faults, .. } => faults.heal(),
            Self::Local(folder) => {
                let done = folder.path().join("done");
                fs::remove_file(&done).expect("the file in the way");
                fs::create_dir(done).expect("the folder is writable");
            }
        }
    }
}

/// Whether the line says that the report of this task was accepted, at once or later.
fn ended_for(line: &Value, id: &str) -> bool {
    let accepted = line["event"] == "task.ended" && line["report"] == "accepted";
    line["task_id"] == id && (accepted || line["event"] == "report.delivered")
}

async fn completed_task_publishes_its_artifacts(plane: Plane) {
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    let task = plane.submit("/examples/echo-file/v1", b"some bytes", json!({})).await;
    let result = plane.result(&node, &task).await;
    assert!(result.completed && result.results == 1, "{result:?}");
    assert_eq!(plane.echoed(&node, &task).await, b"some bytes");
    node.says_ended("accepted").await;
    let page = node.page("/status.json").await.1;
    let recent = &page["recent"][0];
    assert_eq!((&recent["report"], &recent["inputs"][0]["size"]), (&json!("accepted"), &json!(10)), "{page:#}");
    node.stop().await;
    assert_eq!(node.scratch(), Vec::<PathBuf>::new());
}

async fn failure_and_panic_are_reported(plane: Plane) {
    let node = plane.node(&[fixtures::zoo()]).leasing().await;
    for (capability, text) in [("/fixtures/fail-details/v1", "invalid_input"), ("/fixtures/panic/v1", "runner_panic")] {
        let task = plane.submit(capability, b"", json!({})).await;
        let result = plane.result(&node, &task).await;
        assert!(!result.completed && result.text.contains(text), "{result:?}");
    }
    node.stop().await;
}

async fn drain_lets_a_running_task_finish(plane: Plane) {
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let node = plane.node(&[fixtures::zoo()]).leasing().await;
    let task = plane.submit("/fixtures/wait-file/v1", b"", json!({ "file": go })).await;
    node.says("task.started").await;
    node.term();
    node.says("node.draining").await;
    fs::write(&go, "").expect("the folder is writable");
    assert!(plane.result(&node, &task).await.completed, "{}", node.log());
    assert_eq!(node.wait().await, 0, "{}", node.log());
    assert_eq!(node.scratch(), Vec::<PathBuf>::new());
}

async fn task_cut_short_by_a_stop_runs_again(plane: Plane) {
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let first = plane.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "0s").leasing().await;
    let task = plane.submit("/fixtures/wait-file/v1", b"", json!({ "file": go })).await;
    first.says("task.started").await;
    first.term();
    assert_eq!(first.wait().await, 75, "{}", first.log());
    fs::write(&go, "").expect("the folder is writable");
    let next = plane.node(&[fixtures::zoo()]).after(&first).leasing().await;
    assert!(plane.result(&next, &task).await.completed, "{}", next.log());
    next.stop().await;
}

async fn five_tasks_pass_through_one_slot(plane: Plane) {
    let node = plane.node(&[fixtures::echo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    let mut tasks = Vec::new();
    for number in 0..5_u8 {
        tasks.push(plane.submit("/examples/echo-file/v1", &[number], json!({})).await);
    }
    for (number, task) in tasks.iter().enumerate() {
        assert!(plane.result(&node, task).await.completed, "{}", node.log());
        assert_eq!(plane.echoed(&node, task).await, [number as u8]);
    }
    node.stop().await;
}

async fn reports_survive_an_outage_and_a_restart(plane: Plane) {
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let first = plane.node(&[fixtures::zoo()]).leasing().await;
    let task = plane.submit("/fixtures/wait-file/v1", b"", json!({ "file": go })).await;
    first.says("task.started").await;
    plane.refuse_reports();
    fs::write(&go, "").expect("the folder is writable");
    first.says("report.waiting").await;
    first.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 1).await;
    first.term();
    assert_eq!(first.wait().await, 75, "{}", first.log());
    plane.accept_reports();
    let next = plane.node(&[fixtures::zoo()]).after(&first).leasing().await;
    let result = plane.result(&next, &task).await;
    assert!(result.completed && result.results == 1, "{result:?}");
    assert!(next.said("task.started").is_empty(), "the task is not run again: {}", next.log());
    next.stop().await;
}

/// Kills the node at a point, starts it again, and expects one result.
async fn survives_a_crash_at(plane: Plane, point: &str) {
    let first = plane.node(&[fixtures::echo()]).set("RUNNER_HOST_CRASH_AT", point).leasing().await;
    let task = plane.submit("/examples/echo-file/v1", b"crash", json!({})).await;
    assert_eq!(first.wait().await, -1, "killed, not ended: {}", first.log());
    let next = plane.node(&[fixtures::echo()]).after(&first).leasing().await;
    if point == "answer-read" {
        // The control plane has the result; the node may send it once more or not at all.
        next.page_until("/status.json", |page| page.1["outbox"]["waiting"] == 0).await;
        if let (Plane::Local(_), Submitted::File(id)) = (&plane, &task) {
            assert_eq!(plane.done(id).expect("a result")["outcome"], "completed");
        }
    } else {
        let result = plane.result(&next, &task).await;
        assert!(result.completed && result.results == 1, "{result:?}");
    }
    assert_eq!(plane.echoed(&next, &task).await, b"crash");
    assert!(next.said("task.started").is_empty(), "the task is not run again: {}", next.log());
    next.stop().await;
    assert_eq!(first.scratch(), Vec::<PathBuf>::new(), "nothing stays in SCRATCH_DIR");
}

async fn crash_after_the_write_loses_no_result(plane: Plane) {
    survives_a_crash_at(plane, "after-write").await;
}

async fn crash_before_the_report_loses_no_result(plane: Plane) {
    survives_a_crash_at(plane, "before-report").await;
}

async fn crash_after_the_answer_doubles_no_result(plane: Plane) {
    survives_a_crash_at(plane, "answer-read").await;
}

macro_rules! over_both {
    ($($test:ident)*) => {
        mod posemesh {
            $(#[tokio::test]
            async fn $test() {
                super::$test(super::Plane::posemesh().await).await;
            })*
        }
        mod local {
            $(#[tokio::test]
            async fn $test() {
                super::$test(super::Plane::local()).await;
            })*
        }
    };
}

over_both! {
    completed_task_publishes_its_artifacts
    failure_and_panic_are_reported
    drain_lets_a_running_task_finish
    task_cut_short_by_a_stop_runs_again
    five_tasks_pass_through_one_slot
    reports_survive_an_outage_and_a_restart
    crash_after_the_write_loses_no_result
    crash_before_the_report_loses_no_result
    crash_after_the_answer_doubles_no_result
}
