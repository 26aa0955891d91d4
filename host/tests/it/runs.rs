//! `dev` as a Node Runtime control plane, with its node, and `submit` over this wire.

use std::{fs, path::Path};

use http::Request;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    cli::{call, exports, workplace},
    harness::{
        fixtures,
        node::{Cli, Process},
    },
};

const HELLO: &str = "/examples/hello/v1";

async fn dev(dir: &TempDir, args: &[&str]) -> (Process, String) {
    let dev = args.iter().fold(Cli::new(&["dev", "--port", "0"]).dir(dir.path()), |dev, arg| dev.arg(*arg));
    let dev = dev.set("TMPDIR", dir.path().to_string_lossy()).start();
    dev.stdout_line(|line| line == "For development and tests, not for production.").await;
    let exports = exports(&dev);
    let base = exports.iter().find(|pair| pair.0 == "RUNNER_HOST_DEV").expect("where jobs come from").1.clone();
    (dev, base)
}

fn submit(dir: &Path, base: &str, args: &[&str]) -> Cli {
    let submit = Cli::new(&["submit", "--plane", "node-runtime"]).dir(dir).set("RUST_LOG", "");
    args.iter().fold(submit.set("RUNNER_HOST_DEV", base), |submit, arg| submit.arg(*arg))
}

async fn stop(process: &Process) {
    process.signal(Signal::TERM);
    assert_eq!(process.wait().await, 0, "{}", process.log());
}

#[tokio::test]
async fn run_completes_through_dev_and_submit() {
    let dir = workplace(&[fixtures::hello(), fixtures::echo(), fixtures::zoo()]);
    let (dev, base) = dev(&dir, &["--plane", "node-runtime"]).await;
    let submit = |args: &[&str]| submit(dir.path(), &base, args);
    fs::write(dir.path().join("who.txt"), "reader").expect("the folder is writable");
    let ended = submit(&[HELLO, "--input", "who.txt", "--wait", "--out", "brought"]).run().await.expect(0);
    assert_eq!(ended.stdout, "brought/outputs/hello.bin");
    assert_eq!(fs::read(dir.path().join("brought/outputs/hello.bin")).expect("brought"), b"hello, reader");

    let binary: Vec<u8> = (0..=255).collect();
    fs::write(dir.path().join("b.bin"), &binary).expect("the folder is writable");
    let echo = ["/examples/echo-file/v1", "--input", "who.txt", "--input", "b.bin", "--wait", "--out", "echoed"];
    let ended = submit(&echo).arg("-o").arg("json").run().await.expect(0);
    let rows: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!(rows["tasks"][0]["artifacts"][1]["path"], "echoed/echo-1.bin", "{rows:#}");
    // The inputs are in the order of their names.
    assert_eq!(fs::read(dir.path().join("echoed/echo-0.bin")).expect("brought"), binary);
    assert_eq!(fs::read(dir.path().join("echoed/echo-1.bin")).expect("brought"), b"reader");

    let meta = json!({ "voxel": 0.5, "name": "5", "deep": { "list": [1, null] } });
    let echo_meta = ["/fixtures/echo-meta/v1", "--meta", &meta.to_string(), "--wait", "--out", "meta"];
    submit(&echo_meta).run().await.expect(0);
    let lease = fs::read(dir.path().join("meta/lease.json")).expect("brought");
    let mut lease: Value = serde_json::from_slice(&lease).expect("JSON");
    let got = lease["task"]["meta"].as_object_mut().expect("an object");
    got.retain(|name, _| meta.get(name).is_some());
    assert_eq!(json!(got), meta, "every parameter keeps its type");

    let ended = submit(&["/fixtures/fail/v1", "--attempts", "1", "--wait"]).run().await.expect(1);
    assert!(ended.stderr.contains("failed: cloud not written"), "{}", ended.stderr);
    let ended = submit(&["/fixtures/slow/v1", "--wait", "--timeout", "2s"]).run().await.expect(5);
    assert!(ended.stderr.contains("the job continues: "), "{}", ended.stderr);
    let id = ended.stderr.rsplit(' ').next().expect("the id of the run").to_owned();
    let ended = submit(&["--cancel", &id]).run().await.expect(0);
    assert_eq!(ended.stdout, format!("cancelled job {id}"));
    let unknown = uuid::Uuid::nil().to_string();
    let ended = submit(&["--cancel", &unknown]).run().await.expect(1);
    assert_eq!(ended.stderr, format!("error: the control plane knows no job {unknown}"));
    // The node does not learn of the cancellation: its runner still runs. The second signal ends it.
    dev.signal(Signal::TERM);
    dev.stderr_line(|line| line.contains("node.draining")).await;
    dev.signal(Signal::TERM);
    dev.wait().await;
}

#[tokio::test]
async fn large_inputs_and_results_pass_through_the_domain_server() {
    let dir = workplace(&[fixtures::echo()]);
    let (dev, base) = dev(&dir, &["--plane", "node-runtime"]).await;
    // A result of this size does not fit into a report.
    let large: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
    for (name, bytes) in [("z.txt", &b"some text"[..]), ("a.bin", &large)] {
        fs::write(dir.path().join(name), bytes).expect("the folder is writable");
    }
    let echo = ["/examples/echo-file/v1", "--input", "z.txt", "--input", "a.bin", "--wait", "--out", "echoed"];
    let ended = submit(dir.path(), &base, &echo).arg("-o").arg("json").run().await.expect(0);
    // The inputs are in the order of their names.
    assert!(fs::read(dir.path().join("echoed/echo-0.bin")).expect("brought") == large);
    assert_eq!(fs::read(dir.path().join("echoed/echo-1.bin")).expect("brought"), b"some text");
    let rows: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let id = rows["tasks"][0]["artifacts"][0]["id"].as_str().expect("an id");
    uuid::Uuid::parse_str(id).expect("the id of data");
    stop(&dev).await;
}

#[tokio::test]
async fn stored_data_is_submitted_by_id_or_url() {
    let dir = workplace(&[fixtures::hello()]);
    let (dev, base) = dev(&dir, &["--plane", "both"]).await;
    let submit = |args: &[&str]| {
        let submit = Cli::new(&["submit", HELLO, "--wait"]).dir(dir.path()).set("RUST_LOG", "");
        args.iter().fold(submit.set("RUNNER_HOST_DEV", &base), |submit, arg| submit.arg(*arg))
    };
    fs::write(dir.path().join("who.txt"), "reader").expect("the folder is writable");
    let first = submit(&["--input", "who.txt", "-o", "json"]).run().await.expect(0);
    let first: Value = serde_json::from_str(&first.stdout).expect("JSON");
    let id = first["tasks"][0]["artifacts"][0]["id"].as_str().expect("an id");
    let world = call(Request::get(format!("{base}/dev/v1/world")), &Value::Null).await;
    let text = |name: &str| world[name].as_str().expect("text").trim_end_matches('/').to_owned();
    let data = format!("{}/api/v1/domains/{}/data", text("domain_server"), text("domain_id"));
    for plane in ["dms", "node-runtime"] {
        for input in [id.to_owned(), format!("{data}/{id}"), format!("{data}?ids={id}")] {
            let ended = submit(&["--plane", plane, "--input", &input, "--out", "out"]).run().await.expect(0);
            assert_eq!(ended.stdout, "out/outputs/hello.bin", "{plane} {input}");
            let hello = fs::read(dir.path().join(&ended.stdout)).expect("brought");
            assert_eq!(String::from_utf8_lossy(&hello), "hello, hello, reader", "{plane} {input}");
        }
    }
    let twice = submit(&["--plane", "node-runtime", "--input", id, "--input", id]).run().await.expect(2);
    assert!(twice.stderr.contains("it is given twice"), "{}", twice.stderr);
    // A file wins over an id.
    fs::write(dir.path().join(id), "file").expect("the folder is writable");
    submit(&["--input", id, "--out", "out"]).run().await.expect(0);
    assert_eq!(fs::read(dir.path().join("out/outputs/hello.bin")).expect("brought"), b"hello, file");
    stop(&dev).await;
}

#[tokio::test]
async fn submit_says_what_the_plane_cannot_take() {
    let dir = workplace(&[fixtures::hello()]);
    let (first, base) = dev(&dir, &["--plane", "node-runtime", "--no-node"]).await;
    fs::create_dir(dir.path().join("other")).expect("the folder is writable");
    for name in ["a.txt", "other/a.txt"] {
        fs::write(dir.path().join(name), "x").expect("the folder is writable");
    }
    let twice = [HELLO, "--input", "a.txt", "--input", "other/a.txt"];
    let ended = submit(dir.path(), &base, &twice).run().await.expect(2);
    let expected = "error: --input other/a.txt: another input has this file name; rename one of them";
    assert_eq!(ended.stderr, expected);
    let ended = submit(dir.path(), &base, &[HELLO, "--meta", "[]"]).run().await.expect(2);
    assert!(ended.stderr.starts_with("error: --meta: expected an object"), "{}", ended.stderr);
    let ended = Cli::new(&["submit", HELLO]).set("RUST_LOG", "").set("RUNNER_HOST_DEV", &base).run().await.expect(2);
    let expected = format!("error: the dev server at {base} does not serve dms; use submit --plane node-runtime");
    assert_eq!(ended.stderr, expected);
    stop(&first).await;
    let ended = submit(dir.path(), &base, &[HELLO]).run().await.expect(75);
    assert!(ended.stderr.starts_with("error: no dev server answers at "), "{}", ended.stderr);
    let remedy = "; start runner-host dev --plane node-runtime, or name a running one with --dev";
    assert!(ended.stderr.ends_with(remedy), "{}", ended.stderr);
    let (second, base) = dev(&dir, &["--no-node"]).await;
    let ended = submit(dir.path(), &base, &[HELLO]).run().await.expect(2);
    assert!(ended.stderr.ends_with("start it with runner-host dev --plane node-runtime"), "{}", ended.stderr);
    stop(&second).await;
}

#[tokio::test]
async fn dev_serves_both_control_planes_at_once() {
    let dir = workplace(&[fixtures::hello()]);
    let (dev, base) = dev(&dir, &["--plane", "both"]).await;
    let run = submit(dir.path(), &base, &[HELLO, "--wait", "--count", "3"]).run();
    let job = Cli::new(&["submit", HELLO, "--wait", "--count", "3"]).dir(dir.path());
    let job = job.set("RUST_LOG", "").set("RUNNER_HOST_DEV", &base).run();
    let (run, job) = tokio::join!(run, job);
    assert_eq!(run.expect(0).stdout, ["outputs/hello.bin -"; 3].join("\n"));
    assert_eq!(job.expect(0).stdout.matches("outputs/hello.bin ").count(), 3);
    stop(&dev).await;
}

#[tokio::test]
async fn runs_complete_under_the_example_fault_file() {
    let dir = workplace(&[fixtures::hello()]);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations/faults/runs.toml");
    let (dev, base) = dev(&dir, &["--plane", "node-runtime", "--faults", &file.to_string_lossy()]).await;
    let ended = submit(dir.path(), &base, &[HELLO, "--wait", "--count", "3"]).run().await.expect(0);
    assert_eq!(ended.stdout, ["outputs/hello.bin -"; 3].join("\n"));
    for fault in ["unknown node", "away", "leased again", "not heard"] {
        dev.stderr_line(|line| line.contains("dev.fault_injected") && line.contains(fault)).await;
    }
    stop(&dev).await;
}

#[tokio::test]
async fn scans_are_downsampled_on_the_original_form() {
    let dir = workplace(&[fixtures::pointcloud()]);
    let (dev, base) = dev(&dir, &["--plane", "node-runtime", "--origin"]).await;
    let scan = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n\
                end_header\n0 0 0\n4 0 0\n";
    fs::write(dir.path().join("scan.ply"), scan).expect("the folder is writable");
    let runs = ["/pointcloud/downsample/v1", "--input", "scan.ply", "--wait", "--out", "done"];
    submit(dir.path(), &base, &runs).run().await.expect(0);
    let report = fs::read(dir.path().join("done/report.json")).expect("brought");
    let report: Value = serde_json::from_slice(&report).expect("JSON");
    assert_eq!(report["points_in"], 2, "{report}");
    stop(&dev).await;
    let refused = Cli::new(&["dev", "--origin", "--no-node"]).set("RUST_LOG", "").run().await.expect(78);
    let expected = "error: --origin: has no effect with --plane dms; add --plane node-runtime or --plane both";
    assert_eq!(refused.stderr, expected);
}

#[tokio::test]
async fn node_joins_with_the_printed_plane_table() {
    for planes in ["node-runtime", "both"] {
        let dir = workplace(&[fixtures::hello()]);
        let (dev, base) = dev(&dir, &["--plane", planes, "--no-node"]).await;
        let printed = dev.stdout();
        let printed =
            printed.iter().skip_while(|line| !line.starts_with("[plane.")).take_while(|line| !line.is_empty());
        let (settings, table): (Vec<&str>, Vec<&str>) =
            printed.map(String::as_str).partition(|line| line.starts_with("export "));
        let (last, table) = table.split_last().expect("a table");
        assert_eq!(*last, "and with:");
        fs::write(dir.path().join("node.toml"), table.join("\n")).expect("the folder is writable");
        let pairs = settings.iter().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
        let node = Cli::new(&["run", "--config", "node.toml"]).dir(dir.path());
        let node = pairs.fold(node, |node, (name, value)| node.set(name, value));
        let node = node.set("SCRATCH_DIR", dir.path().join("scratch").to_string_lossy());
        let node = node.set("STATE_DIR", dir.path().join("state").to_string_lossy()).start();
        node.stderr_line(|line| line.contains("\"node.leasing\"")).await;
        fs::write(dir.path().join("large.txt"), "x".repeat((1 << 20) + 1)).expect("the folder is writable");
        let large = [HELLO, "--input", "large.txt", "--wait"];
        let ended = submit(dir.path(), &base, &large).run().await.expect(0);
        assert!(!ended.stdout.ends_with(" -"), "the artifact is on the domain server: {}", ended.stdout);
        for process in [&node, &dev] {
            stop(process).await;
        }
    }
}

#[tokio::test]
async fn dev_ignores_control_planes_of_its_file() {
    let section = "{\"NodeRuntime\": {\n\"NodeId\": \"n\", \"ControlPlaneUrl\": \"http://127.0.0.1:9\"}}";
    let tables = "[plane.jobs]\nkind = \"local\"\nfolder = \"jobs\"\n[plane.other]\nkind = \"node-runtime\"\n\
        control_plane_url = \"http://127.0.0.1:9\"\nnode_id = \"n\"";
    for (file, text, ignored) in [
        ("appsettings.json", section, &["appsettings.json:1: control plane node-runtime"][..]),
        ("node.toml", tables, &["node.toml:1: control plane jobs", "node.toml:4: control plane other"]),
    ] {
        let dir = workplace(&[fixtures::hello()]);
        fs::write(dir.path().join(file), text).expect("the folder is writable");
        let (dev, _) = dev(&dir, &["--plane", "both", "--config", file]).await;
        for ignored in ignored {
            let wanted = format!("{ignored} has no effect: the node of dev serves its dev server only");
            dev.stderr_line(|line| line.contains("setting.warning") && line.contains(&wanted)).await;
        }
        let started = dev.stderr_line(|line| line.contains("event=\"node.started\"")).await;
        assert!(started.ends_with(" plane=\"posemesh node-runtime\""), "{started}");
        stop(&dev).await;
    }
}
