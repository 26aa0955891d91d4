//! `dev --faults`: fault injection for users and their own CI (docs/operations/faults.md).

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use http::Request;
use runner_host::{
    dev::Faults,
    transport::{self, Client},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{
    EVENT_LIMIT, TestServer, fixtures,
    node::{Cli, Process},
};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations")
}

/// A folder with the plugin `hello` and a fault file.
fn workplace(faults: &str) -> TempDir {
    let dir = fixtures::plugins_dir(&[fixtures::hello()]);
    std::fs::write(dir.path().join("faults.toml"), faults).expect("the folder is writable");
    dir
}

fn dev(dir: &Path, args: &[&str]) -> Cli {
    let dev = Cli::new(&["dev", "--port", "0", "--lease-ttl", "2s", "--faults", "faults.toml"]);
    let dev = args.iter().fold(dev, |dev, arg| dev.arg(*arg));
    dev.arg("--plugins").arg(dir).dir(dir).set("TMPDIR", dir.to_string_lossy()).set("REQUEST_TIMEOUT_SECS", "1")
}

/// The line `export RUNNER_HOST_DEV=…`, as a setting.
async fn address(dev: &Process) -> String {
    let line = dev.stdout_line(|line| line.starts_with("export RUNNER_HOST_DEV=")).await;
    line.split_once('=').expect("a setting").1.to_owned()
}

#[tokio::test]
async fn task_completes_and_request_journal_records_faults() {
    let dir = workplace(
        "seed = 5
        [[fault]]\nname = \"busy\"\nendpoint = \"lease\"\nkind = \"status\"\ncode = 503\ncount = 2
        [[fault]]\nname = \"not heard\"\nendpoint = \"complete\"\nkind = \"lost_answer\"\ncount = 1",
    );
    let dev = dev(dir.path(), &[]).start();
    let address = address(&dev).await;
    dev.stdout_line(|line| line.starts_with("faults ") && line.ends_with("2 rules of faults.toml, seed 5")).await;
    let out = dir.path().join("out");
    let submit = Cli::new(&["submit", "/examples/hello/v1", "--attempts", "3", "--wait", "--timeout", "15s"]);
    submit.arg("--out").arg(out).set("RUNNER_HOST_DEV", &address).run().await.expect(0);
    let struck = |word: &'static str| move |line: &str| line.contains("fault injected") && line.contains(word);
    dev.stderr_line(struck("busy")).await;
    dev.stderr_line(struck("not heard")).await;
    let request = Request::get(format!("{address}/dev/v1/requests")).body(transport::full("")).expect("a request");
    let answer =
        Client::new(transport::Config::default()).call(request, EVENT_LIMIT).await.expect("the dev server answers");
    let requests: Value = answer.json().expect("JSON");
    let seen = |endpoint: &str, fault: Value| {
        let all = requests["requests"].as_array().expect("a list").iter();
        all.filter(|seen| seen["endpoint"] == endpoint && seen["fault"] == fault).count()
    };
    assert_eq!((seen("lease", json!("status")), seen("complete", json!("lost_answer"))), (2, 1));
    dev.signal(Signal::TERM);
    assert_eq!(dev.wait().await, 0, "{}", dev.log());
}

#[tokio::test]
async fn invalid_fault_file_is_refused_in_one_line() {
    for (text, problem) in [
        (
            "[[fault]]\nname = \"busy\"\nendpoint = \"lease\"\nkind = \"reset\"\ncuont = 1",
            "faults.toml: [[fault]] 1 \"busy\" unknown key \"cuont\", did you mean \"count\"?",
        ),
        (
            "[[fault]]\nendpoint = \"lease\"\nkind = \"steal_lease\"",
            "faults.toml: [[fault]] 1 kind: steal_lease cannot apply to lease: the call names no task",
        ),
    ] {
        let dir = workplace(text);
        let ended = dev(dir.path(), &["--no-node"]).run().await.expect(78);
        assert_eq!((ended.stderr.as_str(), ended.stdout.as_str()), (&*format!("error: {problem}"), ""));
    }
    let missing = Cli::new(&["dev", "--no-node", "--faults", "nowhere.toml"]).run().await.expect(78);
    assert!(missing.stderr.starts_with("error: --faults nowhere.toml: No such file"), "{}", missing.stderr);
}

#[test]
fn example_fault_files_are_valid_and_documented() {
    let page = std::fs::read_to_string(docs().join("faults.md")).expect("the page");
    let mut examples = 0;
    for entry in std::fs::read_dir(docs().join("faults")).expect("the examples") {
        let file = entry.expect("an entry").path();
        let name = file.file_name().expect("a name").to_str().expect("text");
        Faults::read(&file).unwrap_or_else(|err| panic!("{err}"));
        assert!(page.contains(&format!("(faults/{name})")), "{name} is not on the page");
        examples += 1;
    }
    assert_eq!(page.matches(".toml](faults/").count(), examples);
    // The rule from the page.
    let rule = page.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a rule");
    assert_eq!(Faults::parse(rule).expect("a sound rule").len(), 1);
}

#[tokio::test]
async fn node_completes_tasks_under_every_example_fault_file() {
    let examples = std::fs::read_dir(docs().join("faults")).expect("the examples");
    let files = examples.map(|entry| entry.expect("an entry").path());
    // `it::runs` has the example for the other wire.
    let run = files.filter(|file| !file.ends_with("runs.toml")).map(|file| async move {
        let test_server = TestServer::with(|config| {
            config.lease_ttl = Duration::from_secs(2);
            config.part_size = 64 * 1024;
            config.faults = Faults::read(&file).expect("a sound file");
        })
        .await;
        let setup =
            test_server.node(&[fixtures::echo()]).set("REQUEST_TIMEOUT_SECS", "1").set("REGISTER_INTERVAL_SECS", "1");
        let node = setup.start().await;
        let input = test_server.put("in", &[7; 150_000]).await;
        let task =
            |_| test_server.task("/examples/echo-file/v1").inputs(&[input]).set("max_attempts", json!(20)).submit();
        for job in (0..3).map(task).collect::<Vec<_>>() {
            let ended = test_server.ended(&node, job).await;
            assert_eq!(ended.status(), "completed", "{}: {:#}\n{}", file.display(), ended.0, node.log());
        }
        node.stop().await;
        // The rules do not apply to the requests from here on.
        test_server.dev_server.set_faults(Faults::default());
        let left = (test_server.stored().await, test_server.dev_server.open_uploads(), node.scratch());
        assert_eq!(left, (4, 0, Vec::new()), "{}: items, open uploads, files", file.display());
    });
    futures_util::future::join_all(run).await;
}
