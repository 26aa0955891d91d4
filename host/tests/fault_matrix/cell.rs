//! One cell: a dev server, a node, a fault, and the final checks.

use std::{
    collections::BTreeMap,
    future::Future,
    path::PathBuf,
    time::{Duration, Instant},
};

use runner_host::dev::{Faults, JournalEntry, Wires};
use serde_json::{Value, json};

use crate::{
    harness::{Ended, TestServer, node::TestNode},
    plan::{Cell, Length},
    run_cell,
};

/// Short enough to expire in a test.
const LEASE: Duration = Duration::from_secs(2);
/// Duration of a long fault. It is longer than a lease.
pub(crate) const LONG: Duration = Duration::from_millis(2500);
/// Far longer than any part of a cell takes. It turns a hang into a failed cell.
const LIMIT: Duration = Duration::from_secs(45);
/// Maximum number of requests of one kind within any second. A heartbeat may follow another after 100 ms. Polls wait
/// for at least 100 ms unless there is work. A task has four parts.
const BUSIEST: usize = 20;
/// More than two parts, the last one smaller.
const INPUT_BYTES: usize = 200_000;

/// The result of a cell.
pub(crate) struct Report {
    pub(crate) cell: Cell,
    pub(crate) took: Duration,
    /// Requests to which a fault was applied.
    pub(crate) struck: usize,
    /// The highest number of requests of one kind within a second.
    pub(crate) busiest: usize,
    /// The reason why the cell failed.
    pub(crate) failure: Option<String>,
}

pub(crate) async fn run(cell: Cell, plugin: PathBuf) -> Report {
    let began = Instant::now();
    let faults = Faults::parse(&cell.file()).expect("the plan's files are sound");
    let at_start = cell.applies_at_start();
    let test_server = TestServer::with(|config| {
        config.lease_ttl = LEASE;
        config.part_size = 64 * 1024;
        config.request_max_bytes = 100_000;
        config.journal_max = 100_000;
        if cell.is_run() {
            config.wires = Wires::NodeRuntime;
            config.run_ttl = LEASE;
            config.run_report_time = Duration::from_millis(500);
            config.offer_ttl = Duration::from_secs(1);
        }
        if at_start {
            config.faults = faults.clone();
        }
    })
    .await;
    let ended = tokio::time::timeout(LIMIT * 2, async {
        if cell.is_run() {
            run_cell::judged(&cell, &test_server, faults, plugin).await
        } else {
            judged(&cell, &test_server, faults, plugin).await
        }
    });
    let ended = ended.await;
    if !cell.is_of_the_clock() {
        // If a client disconnects, its request is in the journal only after the fault has ended.
        let struck = |seen: &[JournalEntry]| seen.iter().any(|seen| cell.struck(seen));
        let _ = tokio::time::timeout(LONG, test_server.dev_server.journal_until(struck)).await;
    }
    let journal = test_server.dev_server.journal();
    let struck = journal.iter().filter(|seen| cell.struck(seen)).count();
    let (busiest, call) = busiest(&journal);
    let failure = match ended {
        Err(_) => Some("the cell did not end".to_owned()),
        Ok(Err(failure)) => Some(failure),
        Ok(Ok(())) if struck == 0 && !cell.is_of_the_clock() => Some("the fault never struck".to_owned()),
        Ok(Ok(())) if busiest > BUSIEST => Some(format!("{busiest} times {call} within a second")),
        Ok(Ok(())) => None,
    };
    test_server.dev_server.stop().await;
    Report { cell, took: began.elapsed(), struck, busiest, failure }
}

async fn judged(cell: &Cell, test_server: &TestServer, faults: Faults, plugin: PathBuf) -> Result<(), String> {
    let setup = test_server
        .node(&[plugin])
        .set("REQUEST_TIMEOUT_SECS", "1")
        .set("REGISTER_INTERVAL_SECS", "1")
        .set("TRANSFER_STALL_TIMEOUT", "1s")
        .set("POLL_BACKOFF_MS_MIN", "100")
        .set("POLL_BACKOFF_MS_MAX", "500")
        .set("MAX_CONCURRENCY", "2");
    let setup = if cell.is_by_url() { setup.reachable() } else { setup };
    let node = setup.start().await;
    let result = |problem: String| format!("{problem}\n{}", node.log());
    if !cell.applies_at_start() {
        within("the first poll", test_server.dev_server.journal_until(polled)).await.map_err(result)?;
        test_server.dev_server.set_faults(faults);
    }
    let input: Vec<u8> = (0..INPUT_BYTES).map(|n| (n % 251) as u8).collect();
    let cid = test_server.put("in", &input).await;
    let meta = json!({ "fail": cell.endpoint == "fail" });
    let task = test_server.task("/fixtures/everything/v1").inputs(&[cid]).meta(meta);
    let job = task.set("max_attempts", json!(if cell.endpoint == "fail" { 2 } else { 30 })).submit();
    if cell.length == Length::Long && !cell.is_of_the_clock() {
        let struck = |seen: &[JournalEntry]| seen.iter().any(|seen| cell.struck(seen));
        within("the first fault", test_server.dev_server.journal_until(struck)).await.map_err(result)?;
        // No event: the fault itself is a period of time.
        tokio::time::sleep(LONG).await;
        test_server.dev_server.set_faults(Faults::default());
    }
    let over = |view: &Value| matches!(view["job"]["status"].as_str(), Some("completed" | "failed" | "canceled"));
    let ended = within("the end of the task", test_server.dev_server.job_until(job, over)).await.map_err(result)?;
    if cell.strikes_the_test() {
        test_server.dev_server.set_faults(Faults::default());
    }
    one_result(cell, test_server, &Ended(ended), &input).await.map_err(result)?;
    nothing_left(cell, test_server, &node).await.map_err(result)
}

/// The number of completions, and the reasons of all failures.
pub(crate) fn receipts(ended: &Ended, is_completion: impl Fn(&Value) -> bool) -> Result<(usize, Vec<String>), String> {
    let receipts = ended.0["receipts"].as_array().ok_or("no receipts")?;
    let completed = receipts.iter().filter(|receipt| is_completion(&receipt["meta"])).count();
    let failures = receipts.iter().filter_map(|receipt| Some(receipt["meta"]["reason"].as_str()?.to_owned()));
    let failures: Vec<String> = failures.collect();
    if completed + failures.len() != receipts.len() || failures.iter().any(String::is_empty) {
        return Err(format!("a receipt is neither a completion nor a failure with a reason: {:#}", ended.0));
    }
    let attempts = ended.task()["attempts"].as_u64().unwrap_or_default();
    if receipts.len() as u64 > attempts {
        return Err(format!("{} results of {attempts} attempts: {:#}", receipts.len(), ended.0));
    }
    Ok((completed, failures))
}

/// Checks for one completion, or failures with a reason. Artifacts must be complete and without duplicates.
async fn one_result(cell: &Cell, test_server: &TestServer, ended: &Ended, input: &[u8]) -> Result<(), String> {
    let (completed, failures) = receipts(ended, |meta| meta["artifacts"].is_array())?;
    if cell.endpoint == "fail" {
        let own = |reason: &String| reason.starts_with("runner failed: as the task wanted");
        let expired = |reason: &String| reason.starts_with("lease expired");
        let fine = completed == 0 && failures.iter().all(|reason| own(reason) || expired(reason));
        return if fine && ended.status() == "failed" {
            Ok(())
        } else {
            Err(format!("expected failures: {:#}", ended.0))
        };
    }
    if (ended.status(), completed) != ("completed", 1) {
        return Err(format!("expected one completion: {:#}", ended.0));
    }
    let artifacts = ended.artifacts();
    if artifacts.keys().map(String::as_str).collect::<Vec<_>>() != ["large.bin", "small.txt"] {
        return Err(format!("expected two artifacts: {:#}", ended.0));
    }
    if test_server.artifact(ended, "large.bin").await != input
        || test_server.artifact(ended, "small.txt").await != b"200000 bytes"
    {
        return Err("an artifact is not what was published".to_owned());
    }
    let stored = test_server.stored().await;
    if stored != 3 {
        return Err(format!("{stored} items are stored, expected the input and two artifacts"));
    }
    Ok(())
}

/// Checks that no upload, file or process is left.
async fn nothing_left(cell: &Cell, test_server: &TestServer, node: &TestNode) -> Result<(), String> {
    ended_cleanly(node).await?;
    let open = test_server.dev_server.open_uploads();
    if open > 0 && !may_leave_uploads(cell) {
        return Err(format!("{open} uploads were left open"));
    }
    Ok(())
}

/// Stops the node. Checks that no file or process is left.
pub(crate) async fn ended_cleanly(node: &TestNode) -> Result<(), String> {
    node.term();
    let code = within("the end of the node", node.wait()).await?;
    if code != 0 {
        return Err(format!("the node ended with {code}"));
    }
    let left = node.scratch();
    if !left.is_empty() {
        return Err(format!("left in SCRATCH_DIR: {left:?}"));
    }
    if node.log().contains("panicked") {
        return Err("something panicked".to_owned());
    }
    Ok(())
}

/// An upload stays open until it expires in three cases. The one abort is lost. No client has received its id. Its
/// lease is gone, and with it the token for an abort.
fn may_leave_uploads(cell: &Cell) -> bool {
    let unheard = ["reset_body", "malformed", "oversize", "wrong_type", "lost_answer"];
    match cell.endpoint {
        "abort" => true,
        "initiate" => unheard.contains(&cell.kind.0),
        _ => cell.kind.0 == "steal_lease",
    }
}

/// The highest number of requests of one call that arrived within any second.
fn busiest(journal: &[JournalEntry]) -> (usize, &'static str) {
    let mut arrivals: BTreeMap<&'static str, Vec<jiff::Timestamp>> = BTreeMap::new();
    for seen in journal {
        // The requests of the test itself have no node id. There are few of them.
        arrivals.entry(seen.endpoint.unwrap_or("other")).or_default().push(seen.at);
    }
    let second = jiff::SignedDuration::from_secs(1);
    let most = |times: &mut Vec<jiff::Timestamp>| {
        times.sort();
        let within =
            |at: usize| times[at..].iter().take_while(|later| later.duration_since(times[at]) < second).count();
        (0..times.len()).map(within).max().unwrap_or_default()
    };
    arrivals.iter_mut().map(|(call, times)| (most(times), *call)).max().unwrap_or_default()
}

fn polled(seen: &[JournalEntry]) -> bool {
    seen.iter().any(|seen| seen.endpoint == Some("lease") && seen.status == 204)
}

pub(crate) async fn within<T>(what: &str, event: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(LIMIT, event).await.map_err(|_| format!("waited {LIMIT:?} for {what}"))
}
