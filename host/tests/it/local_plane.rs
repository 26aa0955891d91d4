//! The local control plane: a folder of job files (docs/protocols/local.md).

use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use crate::{
    both_planes::{Plane, Submitted},
    harness::{fixtures, node::TestNode},
};

/// Waits until the job has a result.
async fn done(plane: &Plane, node: &TestNode, id: &str) -> Value {
    let text = plane.result(node, &Submitted::File(id.to_owned())).await.text;
    serde_json::from_str(&text).expect("JSON")
}

#[tokio::test]
async fn heartbeats_do_not_move_the_deadline() {
    let plane = Plane::local();
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let node = plane.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "2").leasing().await;
    let job = json!({ "capability": "/fixtures/wait-file/v1", "meta": { "file": go }, "term_secs": 1 });
    plane.put_job("short", &job);
    node.says_ended("none").await;
    assert_eq!(node.said("lease.lost").len(), 1, "{}", node.log());
    assert_eq!(plane.done("short"), None, "nothing is reported for a lost claim");
    // The claim has ended, so the job starts again and ends in time.
    fs::write(&go, "").expect("the folder is writable");
    assert_eq!(done(&plane, &node, "short").await["outcome"], "completed");
    node.stop().await;
}

#[tokio::test]
async fn cancel_file_ends_a_task() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::zoo()]).leasing().await;
    let Submitted::File(id) = plane.submit("/fixtures/slow/v1", b"", json!({})).await else { panic!("a file") };
    node.says("task.started").await;
    let Plane::Local(folder) = &plane else { panic!("a folder") };
    fs::write(folder.path().join("jobs").join(format!("{id}.cancel")), "").expect("the folder is writable");
    let line = node.says("task.ended").await;
    assert_eq!((&line["outcome"], &line["cancelled"]), (&json!("cancelled"), &json!("plane")), "{line}");
    assert_eq!(plane.done(&id).expect("a result")["outcome"], "cancelled");
    assert!(!folder.path().join("running").join(format!("{id}.json")).exists(), "the claim is removed");
    node.stop().await;
}

#[tokio::test]
async fn job_cancelled_before_its_claim_never_runs() {
    let plane = Plane::local();
    let jobs = plane.folder().join("jobs");
    let node = plane.node(&[fixtures::zoo()]).leasing().await;
    for number in 0..5_u8 {
        let id = format!("job-{number}");
        fs::write(jobs.join(format!("{id}.cancel")), "").expect("the folder is writable");
        plane.put_job(&id, &json!({ "capability": "/fixtures/slow/v1" }));
        let line = node.line(|line| line["event"] == "task.ended" && line["task_id"] == id.as_str()).await;
        assert_eq!((&line["outcome"], &line["report"]), (&json!("cancelled"), &json!("none")), "{line}");
        let is_shown = |page: &Value| {
            let records = page["recent"].as_array().expect("a list");
            records.iter().any(|record| record["task_id"] == id.as_str() && record["outcome"] == "cancelled")
        };
        node.page_until("/status.json", |page| is_shown(&page.1)).await;
        assert_eq!(plane.done(&id).expect("a result")["outcome"], "cancelled");
    }
    for event in ["lease.taken_elsewhere", "lease.lost", "heartbeat.refused", "task.started"] {
        assert!(node.said(event).is_empty(), "{event}: {}", node.log());
    }
    for part in ["jobs", "running"] {
        let left = fs::read_dir(plane.folder().join(part)).expect("a folder").count();
        assert_eq!(left, 0, "{part}");
    }
    node.stop().await;
}

/// Waits until the node has removed a file.
async fn removed(file: &std::path::Path, node: &TestNode) {
    crate::harness::within("a removed file", || node.log(), async {
        // A file gives no event.
        while file.is_symlink() || file.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn unusable_job_gets_a_result_at_once() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    let echo = |rest: &str| format!("{{\"capability\":\"/examples/echo-file/v1\",\n{rest}}}");
    let cases = [
        ("no-capability", r#"{"inputs":[]}"#.to_owned(), "missing field `capability` at line 1 column 13"),
        ("bad-capability", r#"{"capability":"echo"}"#.to_owned(), "does not begin with /"),
        ("unknown-key", echo(r#""input":[]"#), "unknown field `input`"),
        ("text", "\"text\"".to_owned(), r#"invalid type: string "text", expected an object at line 1"#),
        ("array", r#"["/examples/echo-file/v1",[],{},null,60,null]"#.to_owned(), "expected an object at line 1"),
        ("twice", echo(r#""meta":null"#) + "{}", "trailing characters at line 2"),
        ("cut", r#"{"capability":"/examples/"#.to_owned(), "EOF while parsing a string at line 1"),
        ("not-json", "capability".to_owned(), "expected value at line 1 column 1"),
        ("term", echo(r#""term_secs":0"#), "term_secs is 0, expected 1 to 86400 at line 2"),
        (
            "term-text",
            echo(r#""term_secs":"1h""#),
            r#"term_secs is "1h", expected a whole number of seconds at line 2"#,
        ),
        (
            "limit",
            echo(r#""time_limit_secs":-1"#),
            "time_limit_secs is -1, expected a whole number of seconds at line 2",
        ),
        (
            "wall-time",
            echo(r#""meta":{"budgets":{"wall_ms":"15m"}}"#),
            "meta.budgets.wall_ms is a text, expected a whole number of milliseconds above 0 at line 2",
        ),
        ("input", echo(r#""inputs":[5]"#), "a path is 5, expected a text or an array of bytes at line 2"),
        ("bytes", echo(r#""inputs":[[300]]"#), "a path is [300], expected a text or an array of bytes at line 2"),
        (
            "out",
            echo(r#""out":"done/x""#),
            "out is done/x, a folder of the control plane; give another folder at line 2",
        ),
    ];
    for (id, job, text) in cases {
        plane.put_job(id, &job);
        let line = node.line(|line| line["event"] == "lease.unreadable" && line["task_id"] == id).await;
        let error = line["error"].as_str().expect("a text");
        assert!(error.contains(text) && error.contains(" at line "), "{id}: {error}");
        for name in ["AnyPath", "struct", "enum", "u64", "u8"] {
            assert!(!error.contains(name), "{id}: {error}");
        }
        removed(&plane.folder().join("jobs").join(format!("{id}.json")), &node).await;
        let result = plane.done(id).expect("a result");
        assert_eq!((&result["outcome"], &result["code"]), (&json!("failed"), &json!("invalid_input")), "{result}");
        assert_eq!((&result["retryable"], &result["reason"]), (&json!(false), &line["error"]), "{result}");
    }
    // Some editors write a byte order mark.
    plane.put_job("mark", &format!("\u{feff}{}", echo(r#""meta":null"#)));
    let result = done(&plane, &node, "mark").await;
    assert_ne!(result["code"], "invalid_input", "{result}");
    node.stop().await;
}

#[cfg(unix)]
#[tokio::test]
async fn out_in_own_folders_is_refused() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    let folder = plane.folder().canonicalize().expect("a folder");
    for (link, to) in [("to-done", "done"), ("to-plane", ".")] {
        std::os::unix::fs::symlink(to, folder.join(link)).expect("the folder is writable");
    }
    fs::write(folder.join("input"), "x").expect("the folder is writable");
    let job = |out: &str| json!({ "capability": "/examples/echo-file/v1", "inputs": ["input"], "out": out });
    let absolute = folder.join("new/../running/.").display().to_string();
    let itself = folder.display().to_string();
    let refused = [
        "./done",
        "x/../jobs",
        "x/../jobs/y",
        "running/",
        "to-done",
        "to-done/x",
        "to-plane/jobs",
        "to-plane",
        ".",
        "x/..",
        "",
        &absolute,
        &itself,
    ];
    for (number, out) in refused.into_iter().enumerate() {
        let id = format!("refused-{number}");
        plane.put_job(&id, &job(out));
        let line = node.line(|line| line["task_id"] == id.as_str() && line["event"] == "lease.unreadable").await;
        let error = line["error"].as_str().expect("a text");
        let text = format!("out is {out}, a folder of the control plane; give another folder at line 1 column ");
        assert!(error.contains(&text), "{out}: {error}");
    }
    for (number, out) in ["results", "done-old", "jobs/../results", "done.x/y"].into_iter().enumerate() {
        let id = format!("accepted-{number}");
        plane.put_job(&id, &job(out));
        assert_eq!(done(&plane, &node, &id).await["outcome"], "completed", "{out}");
        assert!(folder.join(out).join("echo-0.bin").exists(), "{out}");
    }
    node.stop().await;
}

#[tokio::test]
async fn job_for_another_capability_stays_in_the_folder() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    plane.put_job("0-foreign", &json!({ "capability": "/other/v1" }));
    let task = plane.submit("/examples/echo-file/v1", b"x", json!({})).await;
    assert!(plane.result(&node, &task).await.completed);
    let Plane::Local(folder) = &plane else { panic!("a folder") };
    assert!(folder.path().join("jobs/0-foreign.json").exists() && plane.done("0-foreign").is_none());
    node.stop().await;
}

#[tokio::test]
async fn two_nodes_sharing_folder_run_each_job_once() {
    let plane = Plane::local();
    let nodes = [
        plane.node(&[fixtures::echo()]).set("MAX_CONCURRENCY", "2").leasing().await,
        plane.node(&[fixtures::echo()]).set("MAX_CONCURRENCY", "2").leasing().await,
    ];
    let mut ids = Vec::new();
    for number in 0..20_u8 {
        let Submitted::File(id) = plane.submit("/examples/echo-file/v1", &[number], json!({})).await else {
            panic!("a file")
        };
        ids.push(id);
    }
    let Plane::Local(folder) = &plane else { panic!("a folder") };
    crate::harness::within("20 results", || nodes[0].log(), async {
        // A file gives no event.
        while ids.iter().any(|id| plane.done(id).is_none()) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    let [first, second] = nodes;
    first.stop().await;
    second.stop().await;
    let reported = |node: &TestNode| node.said("task.ended").iter().filter(|line| line["report"] == "accepted").count();
    assert_eq!(reported(&first) + reported(&second), 20, "{}\n{}", first.log(), second.log());
    for part in ["jobs", "running"] {
        let left: Vec<PathBuf> =
            fs::read_dir(folder.path().join(part)).expect("a folder").flatten().map(|e| e.path()).collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "{part}");
    }
}

#[tokio::test]
async fn status_shows_lease_without_slot_as_waiting() {
    let plane = Plane::local();
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let node = plane.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "1").leasing().await;
    for id in ["a", "b", "c"] {
        plane.put_job(id, &json!({ "capability": "/fixtures/wait-file/v1", "meta": { "file": go } }));
    }
    let states = |page: &Value| -> Vec<(String, String)> {
        let tasks = page["tasks"].as_object().expect("tasks by id");
        tasks.iter().map(|(id, task)| (id.clone(), task["state"].as_str().unwrap_or_default().to_owned())).collect()
    };
    let expected = [("a".to_owned(), "running".to_owned()), ("b".to_owned(), "waiting".to_owned())];
    node.page_until("/status.json", |page| states(&page.1) == expected).await;
    fs::write(&go, "").expect("the folder is writable");
    for id in ["a", "b", "c"] {
        assert_eq!(done(&plane, &node, id).await["outcome"], "completed");
    }
    node.stop().await;
}

#[tokio::test]
async fn run_past_its_time_limit_fails() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::zoo()]).leasing().await;
    plane.put_job("limited", &json!({ "capability": "/fixtures/slow/v1", "time_limit_secs": 1 }));
    let result = done(&plane, &node, "limited").await;
    assert_eq!((&result["outcome"], &result["code"]), (&json!("budget"), &json!("budget")), "{result}");
    assert_eq!((&result["reason"], &result["retryable"]), (&json!("wall time 1s exceeded"), &json!(false)));
    node.stop().await;
}

#[cfg(unix)]
#[tokio::test]
async fn pipes_links_and_dot_names_do_not_stop_node() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    let Plane::Local(folder) = &plane else { panic!("a folder") };
    let pipe = folder.path().join("jobs/a-pipe.json");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs");
    assert!(made.success());
    for name in ["..json", "...json"] {
        fs::write(folder.path().join("jobs").join(name), r#"{"capability":"/examples/echo-file/v1"}"#)
            .expect("written");
    }
    let line = node.line(|line| line["event"] == "lease.unreadable" && line["task_id"] == "a-pipe").await;
    assert_eq!(line["error"], "the job file is not a regular file");
    let link = folder.path().join("jobs/link.json");
    std::os::unix::fs::symlink("nothing", &link).expect("the folder is writable");
    let line = node.line(|line| line["event"] == "lease.unreadable" && line["task_id"] == "link").await;
    assert_eq!(line["error"], "the job file is a link to a file that does not exist");
    removed(&link, &node).await;
    assert_eq!(plane.done("link").expect("a result")["reason"], line["error"]);
    let task = plane.submit("/examples/echo-file/v1", b"x", json!({})).await;
    assert!(plane.result(&node, &task).await.completed);
    assert!(node.lines().iter().all(|line| line["task_id"] != "." && line["task_id"] != ".."), "{}", node.log());
    node.stop().await;
}

/// Waits until `/ready` shows that the control plane cannot be used, and returns why.
async fn not_ready(node: &TestNode) -> String {
    let message = |page: &Value| page["reasons"][0]["message"].as_str().unwrap_or_default().to_owned();
    let is_known = |page: &Value| !message(page).ends_with("is not checked yet");
    let (_, page) = node.page_until("/ready", |page| page.0 == 503 && is_known(&page.1)).await;
    assert_eq!(page["reasons"][0]["code"], "plane-not-ready", "{page}");
    message(&page)
}

#[tokio::test]
async fn unwritable_folder_is_not_ready_and_claims_nothing() {
    let plane = Plane::local();
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    node.page_until("/ready", |page| page.0 == 200).await;
    for part in ["done", "running"] {
        let path = plane.folder().join(part);
        fs::rename(&path, path.with_extension("away")).expect("the folder is writable");
        fs::write(&path, "in the way").expect("the folder is writable");
        let task = plane.submit("/examples/echo-file/v1", b"x", json!({})).await;
        let reason = not_ready(&node).await;
        assert!(reason.contains(&format!("cannot write to {part}: Not a directory")), "{reason}");
        assert!(reason.contains(&plane.folder().canonicalize().expect("a folder").display().to_string()), "{reason}");
        let line = node.says("plane.not_ready").await;
        assert_eq!(line["plane"], "jobs", "{line}");
        let Submitted::File(id) = &task else { panic!("a file") };
        let started = node.said("task.started").iter().any(|line| line["task_id"] == id.as_str());
        assert!(!started, "{}", node.log());
        fs::remove_file(&path).expect("the file in the way");
        fs::rename(path.with_extension("away"), &path).expect("the folder is writable");
        assert!(plane.result(&node, &task).await.completed, "{}", node.log());
        node.page_until("/ready", |page| page.0 == 200).await;
        node.says("plane.ready").await;
    }
    node.stop().await;
}

#[tokio::test]
async fn lock_held_elsewhere_is_not_ready() {
    let plane = Plane::local();
    let lock = fs::File::create(plane.folder().join(".lock")).expect("the folder is writable");
    lock.lock().expect("nobody holds it");
    // Held at the start: the node waits for it.
    let node = plane.node(&[fixtures::echo()]).start().await;
    let reason = not_ready(&node).await;
    assert!(reason.ends_with("another process has held .lock for 2 s"), "{reason}");
    lock.unlock().expect("it is ours");
    node.page_until("/ready", |page| page.0 == 200).await;
    // Held while the node runs.
    lock.lock().expect("nodes hold it for a short time");
    let task = plane.submit("/examples/echo-file/v1", b"x", json!({})).await;
    not_ready(&node).await;
    assert!(node.said("task.started").is_empty(), "{}", node.log());
    lock.unlock().expect("it is ours");
    assert!(plane.result(&node, &task).await.completed, "{}", node.log());
    lock.lock().expect("nodes hold it for a short time");
    node.stop().await;
}

#[tokio::test]
async fn claims_of_other_programs_are_bounded() {
    let plane = Plane::local();
    let running = plane.folder().join("running");
    fs::create_dir(&running).expect("the folder is writable");
    let far = json!({ "claim": uuid::Uuid::nil(), "ends_at": "9999-01-01T00:00:00Z" }).to_string();
    let day = std::time::Duration::from_secs(24 * 3600);
    let claims = [
        ("far-new", far.as_str(), "9999-01-01T00:00:00Z, more than 24 h after it was written"),
        ("far-old", far.as_str(), "9999-01-01T00:00:00Z, more than 24 h after it was written"),
        ("no-time", r#"{"claim":"00000000-0000-0000-0000-000000000000"}"#, "missing field `ends_at`"),
        ("not-json", "held", "expected value at line 1"),
    ];
    for (id, claim, _) in claims {
        fs::write(running.join(format!("{id}.json")), claim).expect("the folder is writable");
        plane.put_job(id, &json!({ "capability": "/examples/echo-file/v1" }));
    }
    let file = fs::File::options().write(true).open(running.join("far-old.json")).expect("written");
    file.set_modified(std::time::SystemTime::now() - 2 * day).expect("the file is ours");
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    for (id, _, text) in &claims {
        let line = node.line(|line| line["event"] == "claim.invalid" && line["task_id"] == *id).await;
        assert!(line["error"].as_str().is_some_and(|error| error.contains(text)), "{line}");
    }
    for id in ["far-old", "no-time", "not-json"] {
        assert_eq!(done(&plane, &node, id).await["id"], id);
    }
    // More scans: the claim that still holds is logged once.
    let last = plane.submit("/examples/echo-file/v1", b"x", json!({})).await;
    assert!(plane.result(&node, &last).await.completed);
    assert_eq!(plane.done("far-new"), None, "its claim holds");
    assert_eq!(node.said("claim.invalid").len(), claims.len(), "{}", node.log());
    node.stop().await;
}

#[tokio::test]
async fn removed_job_gets_its_result_and_loses_its_claim() {
    let plane = Plane::local();
    let files = tempfile::tempdir().expect("a folder");
    let go = files.path().join("go");
    let claim = |id: &str| plane.folder().join("running").join(format!("{id}.json"));
    let node = plane.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "0s").leasing().await;
    let start = async |id: &str| {
        plane.put_job(id, &json!({ "capability": "/fixtures/wait-file/v1", "meta": { "file": go } }));
        node.line(|line| line["event"] == "task.started" && line["task_id"] == id).await;
        fs::remove_file(plane.folder().join("jobs").join(format!("{id}.json"))).expect("the job file");
    };
    start("ends").await;
    fs::write(&go, "").expect("the folder is writable");
    assert_eq!(done(&plane, &node, "ends").await["outcome"], "completed");
    assert!(!claim("ends").exists());
    fs::remove_file(&go).expect("written above");
    start("stopped").await;
    node.term();
    assert_eq!(node.wait().await, 75, "{}", node.log());
    let result = plane.done("stopped").expect("a result");
    assert_eq!((&result["outcome"], &result["retryable"]), (&json!("drained"), &json!(true)), "{result}");
    assert!(!claim("stopped").exists());
}

#[tokio::test]
async fn abandoned_claims_are_removed_at_start() {
    let plane = Plane::local();
    let running = plane.folder().join("running");
    fs::create_dir(&running).expect("the folder is writable");
    let minute = jiff::SignedDuration::from_mins(1);
    let now = jiff::Timestamp::now();
    for (id, ends_at) in [("old", now - 11 * minute), ("recent", now - minute), ("held", now + minute)] {
        let claim = json!({ "claim": uuid::Uuid::nil(), "ends_at": ends_at });
        fs::write(running.join(format!("{id}.json")), claim.to_string()).expect("the folder is writable");
    }
    fs::write(
        running.join("with-job.json"),
        json!({ "claim": uuid::Uuid::nil(), "ends_at": now - 11 * minute }).to_string(),
    )
    .expect("the folder is writable");
    plane.put_job("with-job", &json!({ "capability": "/other/v1" }));
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    node.page_until("/ready", |page| page.0 == 200).await;
    let mut left: Vec<_> = fs::read_dir(&running).expect("a folder").flatten().map(|entry| entry.file_name()).collect();
    left.sort();
    assert_eq!(left, ["held.json", "recent.json", "with-job.json"]);
    node.stop().await;
}

#[tokio::test]
async fn start_removes_temporary_files_of_killed_nodes() {
    let plane = Plane::local();
    let kept = ["running/.tmp-job.json", "running/notes", "done/.tmp-job.json"].map(|name| plane.folder().join(name));
    let removed = ["running/.tmpAbC123", "done/.tmpXyZ789"].map(|name| plane.folder().join(name));
    for part in ["running", "done"] {
        fs::create_dir(plane.folder().join(part)).expect("the folder is writable");
    }
    let claim = json!({ "claim": uuid::Uuid::nil(), "ends_at": jiff::Timestamp::now() }).to_string();
    for file in kept.iter().chain(&removed) {
        fs::write(file, &claim).expect("the folder is writable");
    }
    let node = plane.node(&[fixtures::echo()]).leasing().await;
    node.page_until("/ready", |page| page.0 == 200).await;
    assert!(kept.iter().all(|file| file.exists()), "files of other kinds stay");
    assert!(!removed.iter().any(|file| file.exists()), "temporary files are removed");
    node.stop().await;
}
