//! Folders of tasks: no leftovers, sweeps of ended processes, and full disks.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{
    TestServer, fixtures,
    node::{Cli, can_mount},
    within,
};

#[tokio::test]
async fn two_hundred_tasks_leave_no_files() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo(), fixtures::echo()]).set("MAX_CONCURRENCY", "8").leasing().await;
    let input = test_server.put("in", b"some input").await;
    let jobs: Vec<_> = (0..200)
        .map(|n| match n % 4 {
            0 => test_server.task("/examples/echo-file/v1").inputs(&[input]),
            1 => test_server.task("/fixtures/scratch/v1"),
            2 => test_server.task("/fixtures/panic/v1"),
            _ => {
                test_server.task("/fixtures/puts/v1").meta(json!({ "puts": [{ "path": "x", "file": "100000 bytes" }] }))
            }
        })
        .map(crate::harness::TaskSetup::submit)
        .collect();
    for job in jobs {
        test_server.ended(&node, job).await;
    }
    node.page_until("/status.json", |page| page.1["tasks"] == json!({})).await;
    let left: Vec<PathBuf> = node.scratch().into_iter().filter(|path| !is_own(path)).collect();
    assert!(left.is_empty(), "{left:#?}");
    let scratch = node.scratch_dir().to_owned();
    node.stop().await;
    assert_eq!(entries(&scratch), ["lock"; 0]);
}

#[tokio::test]
async fn slot_is_free_after_its_folder_is_removed() {
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    let task = || test_server.task("/fixtures/scratch/v1").meta(json!({ "files": 5000 })).submit();
    for job in [task(), task()] {
        let ended = test_server.ended(&node, job).await;
        let seen: Value =
            serde_json::from_slice(&test_server.artifact(ended.completed(), "scratch.json").await).expect("JSON");
        let mut beside: Vec<String> = serde_json::from_value(seen["beside"].clone()).expect("paths");
        beside.retain(|path| ["/spare-", "lock"].iter().all(|other| !path.contains(other)));
        assert_eq!(json!(beside), json!([seen["dir"]]), "its own folder is the only one of a task");
    }
}

#[tokio::test]
async fn removed_scratch_folder_is_created_again() {
    let test_server = TestServer::start().await;
    let base = tempfile::tempdir().expect("a folder");
    let scratch = base.path().join("scratch");
    let node = || test_server.node(&[fixtures::echo()]).set("SCRATCH_DIR", scratch.to_string_lossy());
    let first = node().leasing().await;
    std::fs::remove_dir_all(&scratch).expect("removed");
    let input = test_server.put("in", b"some input").await;
    let echo = || test_server.task("/examples/echo-file/v1").inputs(&[input]).submit();
    test_server.ended(&first, echo()).await.completed();
    first.says("scratch.recreated").await;
    // The new folder is locked too: another start on the same base removes nothing.
    let second = node().leasing().await;
    assert_eq!(second.said("scratch.leftover_removed").len(), 0, "{}", second.log());
    second.stop().await;
    test_server.ended(&first, echo()).await.completed();
    // The reason names the failure without a path of this machine.
    std::fs::remove_dir_all(&scratch).expect("removed");
    std::fs::write(&scratch, b"").expect("written");
    let once = test_server.task("/examples/echo-file/v1").inputs(&[input]).set("max_attempts", json!(1)).submit();
    let ended = test_server.ended(&first, once).await;
    let (reason, _) = ended.failed();
    assert!(reason.starts_with("storage: cannot "), "{reason}");
    assert!(!reason.contains(&*base.path().to_string_lossy()), "{reason}");
    first.says("task.directory_not_created").await;
    first.term();
    first.wait().await;
}

#[tokio::test]
async fn runner_gets_its_directory_without_the_nodes_folder() {
    let test_server = TestServer::start().await;
    let base = tempfile::tempdir().expect("a folder");
    let scratch = base.path().join("scratch");
    let plugins = [fixtures::zoo(), fixtures::c("hello", &[])];
    let node = test_server.node(&plugins).set("SCRATCH_DIR", scratch.to_string_lossy()).leasing().await;
    let task = || test_server.task("/fixtures/scratch/v1").set("max_attempts", json!(1));
    let own = || {
        let names = entries(&scratch);
        assert_eq!(names.len(), 1, "{names:?}");
        scratch.join(&names[0])
    };
    let home = own();
    let again = "scratch.recreated";
    for (removed, times) in [(&scratch, 1), (&home, 2)] {
        std::fs::remove_dir_all(removed).expect("removed");
        for _ in 0..2 {
            let ended = test_server.ended(&node, task().submit()).await;
            let seen = test_server.artifact(ended.completed(), "scratch.json").await;
            let seen: Value = serde_json::from_slice(&seen).expect("JSON");
            assert_eq!(seen["mode"], "700");
        }
        assert_eq!((own(), node.said(again).len()), (home.clone(), times), "{}", node.log());
    }
    // With a file in its place no folder can be created. This is no failure of a runner.
    for place in [&home, &scratch] {
        std::fs::remove_dir_all(place).expect("removed");
        std::fs::write(place, b"").expect("written");
        // The second plugin is not built with the SDK, so the node creates its directory before the start.
        for task in [task(), test_server.task("/fixtures/c-hello/v1").set("max_attempts", json!(1))] {
            let ended = test_server.ended(&node, task.submit()).await;
            let (reason, details) = ended.failed();
            assert!(reason.starts_with("storage: cannot make"), "{reason}");
            assert_eq!(details["outcome"], "storage");
            assert!(!reason.contains(&*base.path().to_string_lossy()), "{reason}");
        }
        node.says("task.directory_not_created").await;
        std::fs::remove_file(place).expect("removed");
        test_server.ended(&node, task().submit()).await.completed();
    }
    assert_eq!(own(), home);
    node.stop().await;
    assert_eq!(entries(&scratch), ["lock"; 0]);
}

/// The folder of a process.
fn is_own(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let empty = std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    name.starts_with("node-") || name.starts_with("spare-") && empty
}

/// The entries of a folder, without lock files.
fn entries(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.retain(|name| name != ".lock");
    names.sort();
    names
}

#[tokio::test]
async fn start_sweeps_only_folders_of_ended_processes() {
    let test_server = TestServer::start().await;
    let base = tempfile::tempdir().expect("a folder");
    let elsewhere = tempfile::tempdir().expect("a folder");
    std::fs::write(elsewhere.path().join("kept"), b"x").expect("written");
    let node = || test_server.node(&[fixtures::zoo()]).set("SCRATCH_DIR", base.path().to_string_lossy());
    let dead = node().leasing().await;
    let file = json!({ "file": base.path().join("never") });
    let job = test_server.task("/fixtures/wait-file/v1").meta(file.clone()).submit();
    test_server.started(&dead, job).await;
    assert_eq!(entries(base.path()).len(), 1);
    dead.kill();
    dead.wait().await;
    let left = entries(base.path());
    assert_eq!(left.len(), 1, "killed, it leaves its folder with the task's in it");
    // Other entries of every kind.
    std::fs::write(base.path().join("node-notes.txt"), b"x").expect("written");
    std::fs::create_dir(base.path().join("foreign")).expect("made");
    std::fs::create_dir(base.path().join("domain-input-7")).expect("made");
    std::os::unix::fs::symlink(elsewhere.path(), base.path().join("node-link")).expect("linked");
    let living = node().leasing().await;
    let swept = living.says("scratch.leftover_removed").await;
    assert!(swept["path"].as_str().is_some_and(|path| path.ends_with(&left[0])), "{swept}");
    // A second node while the first lives: nothing is left to sweep, and the first folder stays.
    let job = test_server.task("/fixtures/wait-file/v1").meta(file).submit();
    test_server.started(&living, job).await;
    let before = entries(base.path());
    let second = node().leasing().await;
    let kept: Vec<String> = entries(base.path()).into_iter().filter(|name| before.contains(name)).collect();
    assert_eq!(kept, before);
    assert!(second.said("scratch.leftover_removed").is_empty(), "{}", second.log());
    second.stop().await;
    let names = entries(base.path());
    let foreign: Vec<&String> = names.iter().filter(|name| !name.starts_with("node-") || name.len() < 20).collect();
    assert_eq!(foreign, ["domain-input-7", "foreign", "node-link", "node-notes.txt"]);
    assert!(elsewhere.path().join("kept").exists());
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn leasing_pauses_below_the_disk_floor() {
    // In memory, where no other process writes.
    let base = tempfile::tempdir_in("/dev/shm").expect("Linux has it");
    let about = rustix::fs::statvfs(base.path()).expect("a file system");
    const MIB: u64 = 1 << 20;
    let floor = about.f_bavail * about.f_frsize - 8 * MIB;
    let filler = base.path().join("filler");
    std::fs::write(&filler, vec![1; 16 * MIB as usize]).expect("written");
    let test_server = TestServer::start().await;
    let node = test_server.node(&[fixtures::hello()]).set("SCRATCH_DIR", base.path().join("scratch").to_string_lossy());
    let node = node.set("DISK_FREE_MIN", floor.to_string()).leasing().await;
    let job = test_server.task("/examples/hello/v1").submit();
    let output = node.says("disk.full").await;
    assert_eq!((&output["level"], &output["floor_bytes"]), (&json!("WARN"), &json!(floor)), "{output}");
    let (status, ready) = node.page("/ready").await;
    let reason = ready["reason"].as_str().unwrap_or_default().to_owned();
    assert_eq!(status, 503);
    assert!(
        reason.starts_with("disk nearly full: ") && reason.ends_with(&format!("DISK_FREE_MIN is {floor}")),
        "{reason}"
    );
    let disk = node.status().await["disk"].clone();
    assert_eq!((&disk["full"], &disk["floor_bytes"]), (&json!(true), &json!(floor)));
    assert!(disk["free_bytes"].as_u64().is_some_and(|free| free < floor), "{disk}");
    let leased =
        |test_server: &TestServer| test_server.dev_server.journal().iter().any(|seen| seen.path.ends_with("/tasks"));
    assert!(!leased(&test_server), "not one poll");
    std::fs::remove_file(&filler).expect("ours");
    test_server.ended(&node, job).await.completed();
    assert_eq!(node.said("disk.has_room").len(), 1);
    assert_eq!(node.page("/ready").await.0, 200);
    // A node that waits for space ends as quickly as any.
    std::fs::write(&filler, vec![1; 16 * MIB as usize]).expect("written");
    node.page_until("/status.json", |page| page.1["disk"]["full"] == true).await;
    within("a quick end", || node.log(), node.stop()).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn full_disk_during_transfer_is_storage_failure() {
    const LIMIT: u64 = 24 << 20;
    let test_server = TestServer::with(|config| config.part_size = 32 << 20).await;
    let node = test_server.node(&[fixtures::zoo(), fixtures::echo()]).file_bytes_max(LIMIT).leasing().await;
    let input = test_server.put("in", &vec![7; LIMIT as usize + 1]).await;
    let download = test_server.task("/examples/echo-file/v1").inputs(&[input]);
    // A stream is written to a file until a part is complete.
    let stream = json!([{ "path": "x", "stream": LIMIT + 1 }]);
    for (task, what) in
        [(download, "cannot write input "), (test_server.task("/fixtures/big-output/v1"), "upload of big.bin ")]
    {
        let ended = test_server.ended(&node, task.meta(json!({ "bytes": LIMIT + 1, "puts": stream })).submit()).await;
        let (reason, details) = ended.failed();
        assert!(reason.starts_with(&format!("storage: {what}")), "{reason}");
        assert!(!reason.contains('\n') && details["outcome"] == "storage", "{reason} {details}");
    }
    node.page_until("/status.json", |page| page.1["tasks"] == json!({})).await;
    let left: Vec<PathBuf> = node.scratch().into_iter().filter(|path| !is_own(path)).collect();
    assert!(left.is_empty(), "{left:#?}");
    assert_eq!(test_server.dev_server.open_uploads(), 0);
    test_server.run(&node, "/fixtures/ok/v1", json!({})).await.completed();
}

#[tokio::test]
async fn invoke_on_a_full_disk_exits_75() {
    if !can_mount() {
        return;
    }
    let dir = fixtures::plugins_dir(&[fixtures::hello(), fixtures::echo()]);
    let (out, input) = (dir.path().join("out"), dir.path().join("input.bin"));
    std::fs::create_dir(&out).expect("the folder is writable");
    std::fs::write(&input, vec![7; 6_000_000]).expect("the folder is writable");
    let invoke = |capability: &str| {
        let invoke = Cli::new(&["invoke", capability, "--out"]).arg(&out).arg("--plugins").arg(dir.path());
        invoke.set("TMPDIR", dir.path().to_string_lossy())
    };
    let bytes = invoke("/examples/hello/v1").full_disk(&out);
    let file = invoke("/examples/echo-file/v1").arg("--input").arg(&input).small_disk(&out);
    let stream = invoke("/examples/echo-stream/v1").arg("--input").arg(&input).small_disk(&out);
    for invoke in [bytes, file, stream] {
        let ended = invoke.run().await.expect(75);
        assert!(ended.stderr.contains("No space left on device"), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn submit_onto_a_full_disk_exits_75() {
    if !can_mount() {
        return;
    }
    let test_server = TestServer::start().await;
    let _node = test_server.node(&[fixtures::hello(), fixtures::echo()]).leasing().await;
    let dir = tempfile::tempdir().expect("a folder");
    let (out, input) = (dir.path().join("out"), dir.path().join("input.bin"));
    std::fs::create_dir(&out).expect("the folder is writable");
    std::fs::write(&input, vec![7; 6_000_000]).expect("the folder is writable");
    let submit = |capability: &str| {
        let submit = Cli::new(&["submit", capability, "--wait", "-o", "json", "--out"]).arg(&out);
        submit.set("RUNNER_HOST_DEV", test_server.dev_server.dds_url().to_string())
    };
    let small = submit("/examples/hello/v1").full_disk(&out);
    let large = submit("/examples/echo-file/v1").arg("--input").arg(&input).small_disk(&out);
    for submit in [small, large] {
        let ended = submit.run().await.expect(75);
        let printed: Value = serde_json::from_str(&ended.stdout).expect("JSON");
        assert_eq!((&printed["status"], &printed["during"]), (&json!("disk_full"), &json!("download")), "{printed}");
        assert_eq!((&printed["unanswered"], &printed["tasks"][0]["status"]), (&json!(false), &json!("completed")));
        let jobs = printed["jobs"].as_array().expect("a list");
        assert_eq!((jobs.len(), &jobs[0]), (1, &printed["tasks"][0]["job_id"]), "{printed}");
        let job = jobs[0].as_str().expect("an id");
        let last = ended.stderr.lines().last().expect("an error");
        for part in ["error: ", "No space left on device", job, "free the disk"] {
            assert!(last.contains(part), "{part}: {}", ended.stderr);
        }
    }
}
