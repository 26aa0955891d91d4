//! `submit` against a dev server, with a hand-written node.

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use clap::Parser;
use http::Method;

use super::*;
use crate::dev::{
    Config,
    tests::{TestNode, TestServer},
};

const ECHO: &str = "/lab/echo/v1";
/// Far more than any test needs. A hang becomes a failed test.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn args(line: &[&str]) -> Args {
    Line::try_parse_from(std::iter::once(&"submit").chain(line)).expect("a valid line").args
}

/// The output on stderr.
#[derive(Clone, Default)]
struct StderrCopy(Arc<Mutex<Vec<u8>>>);

impl Write for StderrCopy {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("not poisoned").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Ended {
    code: Exit,
    stdout: String,
    stderr: String,
}

async fn submit_line(test_server: Option<&TestServer>, line: &[&str]) -> Ended {
    submit_until(test_server, line, std::future::pending()).await
}

async fn submit_until(test_server: Option<&TestServer>, line: &[&str], interrupt: impl Future<Output = ()>) -> Ended {
    let dev = test_server.map(|test_server| test_server.server.dds_url().to_string());
    let mut line = line.to_vec();
    if let Some(dev) = &dev {
        line.extend(["--dev", dev]);
    }
    let (mut stdout, stderr_copy) = (Vec::new(), StderrCopy::default());
    let notes = Notes::to(Box::new(stderr_copy.clone()));
    let running = run_to(args(&line), Default::default(), &mut stdout, notes, Duration::from_millis(100), interrupt);
    let code = tokio::time::timeout(LIMIT, running).await.expect("ends in time").expect("no unexpected error");
    let stderr = String::from_utf8(stderr_copy.0.lock().expect("not poisoned").clone()).expect("text");
    Ended { code, stdout: String::from_utf8(stdout).expect("text"), stderr }
}

/// Leases the next task as soon as there is one.
async fn take(test_server: &TestServer, node: &TestNode) -> Value {
    test_server.server.journal_until(|seen| seen.iter().any(|seen| seen.path == "/v1/jobs")).await;
    loop {
        let answer = test_server.get("/v1/tasks", Some(&node.token)).await;
        if answer.status == 200 {
            return answer.json().expect("a lease");
        }
    }
}

/// Serves one task: returns its only input as its artifact.
async fn echo(test_server: &TestServer, node: &TestNode, logical_path: &str) -> Vec<u8> {
    let lease = take(test_server, node).await;
    let (token, domain) = (lease["access_token"].as_str().expect("a token"), &lease["domain_id"]);
    let data = format!("/api/v1/domains/{}/data", domain.as_str().expect("an id"));
    let input = lease["task"]["inputs_cids"][0].as_str().expect("an input");
    let input = test_server.get(&format!("{data}/{input}?raw=true"), Some(token)).await.body;
    let task = lease["task"]["id"].as_str().expect("an id");
    let mut form =
        format!("--b\r\nContent-Disposition: form-data; name=\"echo_{task}\"; data-type=\"json\"\r\n\r\n").into_bytes();
    form.extend_from_slice(&input);
    form.extend_from_slice(b"\r\n--b--\r\n");
    let headers = [("content-type", "multipart/form-data; boundary=b")];
    let stored: Value =
        test_server.send(Method::POST, &data, Some(token), &headers, form).await.json().expect("metadata");
    let id = &stored["data"][0]["id"];
    let report = json!({"output_cids": [id], "meta": {"artifacts": [{"logical_path": logical_path, "id": id}]}});
    let path = format!("/v1/tasks/{task}/complete");
    assert_eq!(test_server.post(&path, Some(&node.token), &report).await.status, 200);
    input.to_vec()
}

#[tokio::test]
async fn submit_uploads_input_and_downloads_artifact_to_folder() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[ECHO]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let (input, out) = (folder.path().join("my scan.json"), folder.path().join("out"));
    std::fs::write(&input, b"{\"a\":1}").expect("writable");
    let (input, out) = (input.to_str().expect("text"), out.to_str().expect("text"));
    let line = [ECHO, "--input", input, "--wait", "--out", out, "--meta", "{\"k\":2}"];
    let (ended, read) =
        tokio::join!(submit_line(Some(&test_server), &line), echo(&test_server, &node, "deep/echo.json"));
    assert_eq!((ended.code, &read[..]), (Exit::Done, &b"{\"a\":1}"[..]), "{}", ended.stderr);
    let artifact = Path::new(out).join("deep/echo.json");
    assert_eq!(ended.stdout.trim_end(), artifact.display().to_string());
    assert_eq!(std::fs::read(&artifact).expect("brought"), read);
    assert_eq!(std::fs::read_dir(artifact.parent().expect("a folder")).expect("readable").count(), 1, "no other file");
    assert!(ended.stderr.contains("completed"), "{}", ended.stderr);
}

#[tokio::test]
async fn documented_job_is_what_submit_sends() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/jobs.md");
    let page = std::fs::read_to_string(page).expect("the page of job authors");
    let command = page.lines().find(|line| line.starts_with("runner-host submit ")).expect("a command");
    let words: Vec<&str> = command.split(' ').skip(2).map(|word| word.trim_matches('\'')).collect();
    let (_, documented) = page.split_once("```json\n").expect("an example");
    let (documented, _) = documented.split_once("```").expect("its end");
    let mut documented: Value = serde_json::from_str(documented).expect("JSON");

    let args = args(&words);
    let domain = documented["domain_id"].as_str().and_then(|id| id.parse().ok()).expect("a UUID");
    let url = Url::parse("https://plane.example").expect("a URL");
    let plane = Plane::new(Client::new(Default::default()), &url, &url, domain, "grant".to_owned()).expect("a plane");
    let cids: Vec<String> = look(&args).expect("stored inputs").iter().map(Input::name).collect();
    assert_eq!(job(&args, args.capability.as_ref().expect("one"), &plane, &cids, 1), documented);

    let test_server = TestServer::start().await;
    documented["domain_id"] = json!(test_server.server.domain_id());
    let answer = test_server.post("/v1/jobs", Some(&test_server.server.grant()), &documented).await;
    assert_eq!(answer.status, 200, "{}", answer.excerpt());
    let answer: Value = answer.json().expect("JSON");
    assert!(answer["job_id"].as_str().is_some_and(|id| id.parse::<Uuid>().is_ok()), "{answer}");
}

#[tokio::test]
async fn large_and_empty_inputs_are_uploaded_completely() {
    let test_server = TestServer::with(Config { part_size: 1000, request_max_bytes: 5000, ..Config::default() }).await;
    let node = test_server.node(1, &[ECHO]).await;
    let folder = tempfile::tempdir().expect("a folder");
    for size in [0_usize, 2500, 899] {
        let file = folder.path().join(format!("{size}.bin"));
        let content: Vec<u8> = (0..size).map(|n| n.to_le_bytes()[0]).collect();
        std::fs::write(&file, &content).expect("writable");
        let line = [ECHO, "--wait", "-o", "json", "--input", file.to_str().expect("text")];
        let (ended, read) =
            tokio::join!(submit_line(Some(&test_server), &line), echo(&test_server, &node, "echo.json"));
        assert_eq!((ended.code, read == content), (Exit::Done, true), "{size} bytes: {}", ended.stderr);
        let printed: Value = serde_json::from_str(&ended.stdout).expect("JSON");
        assert_eq!(printed["tasks"][0]["artifacts"][0]["logical_path"], "echo.json");
    }
    let parts = test_server
        .server
        .journal()
        .iter()
        .filter(|seen| seen.method == "PUT" && seen.path.ends_with("/multipart"))
        .count();
    assert_eq!(parts, 3, "only the one that does not fit a request was uploaded in parts");
}

#[tokio::test]
async fn escaping_artifact_is_stored_inside_the_output_folder() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[ECHO]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let (input, out) = (folder.path().join("in.json"), folder.path().join("out"));
    std::fs::write(&input, b"x").expect("writable");
    let line = [ECHO, "--wait", "--input", input.to_str().expect("text"), "--out", out.to_str().expect("text")];
    let (ended, _) = tokio::join!(submit_line(Some(&test_server), &line), echo(&test_server, &node, "../escaped.json"));
    assert_eq!(ended.code, Exit::Done);
    assert!(ended.stderr.contains("would leave the folder"), "{}", ended.stderr);
    assert!(!folder.path().join("escaped.json").exists());
    assert_eq!(std::fs::read_dir(&out).expect("made").count(), 1);
}

#[tokio::test]
async fn failed_task_prints_its_reason() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[ECHO]).await;
    let serve = async {
        let lease = take(&test_server, &node).await;
        node.fail(&test_server, &lease, "runner failed: no points").await;
    };
    let (ended, ()) = tokio::join!(submit_line(Some(&test_server), &[ECHO, "--wait", "--attempts", "1"]), serve);
    assert_eq!(ended.code, Exit::Failed);
    assert!(ended.stderr.contains("failed: runner failed: no points"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
}

#[tokio::test]
async fn many_tasks_become_jobs_of_a_bounded_size() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[ECHO]).await;
    let serve = async {
        for _ in 0..250 {
            let lease = take(&test_server, &node).await;
            node.complete(&test_server, &lease, &[]).await;
        }
    };
    let (ended, ()) = tokio::join!(submit_line(Some(&test_server), &[ECHO, "--wait", "--count", "250"]), serve);
    assert_eq!(ended.code, Exit::Done, "{}", ended.stderr);
    assert!(ended.stderr.contains("250 of 250 tasks ended"), "{}", ended.stderr);
    let listed = test_server.get("/v1/jobs", Some(&test_server.server.grant())).await.json::<Value>().expect("JSON");
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(3));
}

#[tokio::test]
async fn missing_node_warns_once_and_wait_times_out() {
    let test_server = TestServer::start().await;
    let ended = submit_line(Some(&test_server), &[ECHO, "--wait", "--timeout", "1500ms"]).await;
    assert_eq!(ended.code, Exit::TimedOut);
    assert_eq!(ended.stderr.matches("no node serves /lab/echo/v1").count(), 1, "{}", ended.stderr);
    assert!(ended.stderr.contains("the job continues"), "{}", ended.stderr);
}

#[tokio::test]
async fn interrupted_wait_does_not_cancel_the_job() {
    let test_server = TestServer::start().await;
    let queried = async {
        let path = |seen: &crate::dev::JournalEntry| seen.path.starts_with("/v1/jobs/");
        test_server.server.journal_until(|seen| seen.iter().any(path)).await;
    };
    let ended = submit_until(Some(&test_server), &[ECHO, "--wait"], queried).await;
    assert_eq!(ended.code, Exit::Cancelled);
    let listed = test_server.get("/v1/jobs", Some(&test_server.server.grant())).await.json::<Value>().expect("JSON");
    let job = &listed["items"][0]["job"];
    assert_eq!(job["status"], "pending", "the job was not cancelled");
    let id = job["id"].as_str().expect("an id");
    assert!(ended.stderr.contains(&format!("interrupted; the job continues: {id}")), "{}", ended.stderr);
    let ended = submit_until(Some(&test_server), &[ECHO], std::future::ready(())).await;
    assert_eq!((ended.code, ended.stderr.contains("no job was submitted")), (Exit::Cancelled, true));
}

#[tokio::test]
async fn cancelled_job_has_its_own_exit_code() {
    let test_server = TestServer::start().await;
    let submitted = submit_line(Some(&test_server), &[ECHO]).await;
    assert_eq!(submitted.code, Exit::Done);
    assert!(Uuid::parse_str(submitted.stdout.trim()).is_ok(), "the job's id: {}", submitted.stdout);
    let cancel = async {
        let made = |seen: &[crate::dev::JournalEntry]| seen.iter().filter(|seen| seen.path == "/v1/jobs").count() == 2;
        test_server.server.journal_until(made).await;
        let listed =
            test_server.get("/v1/jobs", Some(&test_server.server.grant())).await.json::<Value>().expect("JSON");
        let newest = listed["items"][0]["job"]["id"].as_str().expect("an id").parse().expect("a UUID");
        assert!(test_server.server.cancel_job(newest));
    };
    let (ended, ()) = tokio::join!(submit_line(Some(&test_server), &[ECHO, "--wait"]), cancel);
    assert_eq!(ended.code, Exit::Cancelled, "{}", ended.stderr);
}

#[tokio::test]
async fn submit_errors_are_one_line_with_exit_codes() {
    let test_server = TestServer::start().await;
    let address = test_server.server.dds_url().to_string();
    let unreachable = TestServer::start().await;
    let unreachable_address = unreachable.server.dds_url().to_string();
    unreachable.server.stop().await;
    let ended = submit_line(None, &[ECHO, "--dev", &unreachable_address]).await;
    assert_eq!(ended.code, Exit::Temporary);
    assert!(ended.stderr.contains("start runner-host dev"), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1);

    let ended = submit_line(Some(&test_server), &[ECHO, "--input", "/no/such/file"]).await;
    assert_eq!((ended.code, ended.stderr.lines().count()), (Exit::Usage, 1));
    assert!(ended.stderr.contains("/no/such/file"), "{}", ended.stderr);

    let domain = test_server.server.domain_id().to_string();
    let dms = test_server.server.dms_url().to_string();
    let elsewhere = [ECHO, "--dms", &dms, "--domain", &domain, "--domain-server", &address];
    let ended = submit_line(None, &elsewhere).await;
    assert_eq!(ended.code, Exit::Usage, "no token");
    let ended = submit_line(None, &[&elsewhere[..], &["--token", "wrong"]].concat()).await;
    assert_eq!(ended.code, Exit::Usage);
    assert!(ended.stderr.contains("401") && !ended.stderr.contains("wrong"), "{}", ended.stderr);
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), format!("{}\n", test_server.server.grant())).expect("writable");
    let token_file = file.path().to_str().expect("text").to_owned();
    let ended = submit_line(None, &[&elsewhere[..], &["--token-file", &token_file]].concat()).await;
    assert_eq!(ended.code, Exit::Done, "{}", ended.stderr);
}

#[cfg(feature = "grpc")]
#[tokio::test]
async fn too_large_run_is_refused_in_one_line() {
    let config = Config { wires: crate::dev::Wires::NodeRuntime, ..Config::default() };
    let test_server = TestServer::with(config).await;
    let meta = json!({ "large": "x".repeat(4_500_000) }).to_string();
    let ended = submit_line(Some(&test_server), &["--plane", "node-runtime", ECHO, "--meta", &meta]).await;
    assert_eq!((ended.code, ended.stderr.lines().count()), (Exit::Usage, 1), "{}", ended.stderr);
    assert!(ended.stderr.contains("413") && ended.stderr.contains("at most 4 MiB"), "{}", ended.stderr);
}

#[test]
fn lines_are_checked_before_anything_is_sent() {
    let refused = |line: &[&str]| {
        let line = std::iter::once(&"submit").chain(line);
        Line::try_parse_from(line).expect_err("refused").to_string()
    };
    assert!(refused(&["a b"]).contains("white space"));
    assert!(refused(&[ECHO, "--meta", "{"]).contains("not JSON"));
    assert!(refused(&[ECHO, "--count", "0"]).contains("1..="));
    assert!(refused(&[ECHO, "--out", "x"]).contains("--wait"));
    assert!(
        refused(&[ECHO, "--wait", "--timeout", "soon"])
            .contains("expected a duration above 0 and of at most a year, such as 90s")
    );
    assert!(refused(&[ECHO, "--dms", "http://127.0.0.1:1/v1"]).contains("--domain"));
    assert_eq!(crate::cli::parse_duration_above_zero("1.5m"), Ok(Duration::from_secs(90)));
    assert_eq!(crate::cli::parse_duration_above_zero("250ms"), Ok(Duration::from_millis(250)));
    assert_eq!(crate::cli::parse_duration_above_zero("7"), Ok(Duration::from_secs(7)));
}
