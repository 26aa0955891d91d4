//! A cell of the Node Runtime wire: one run with inline data.

use std::path::PathBuf;

use http::Request;
use runner_host::{
    dev::{Faults, JournalEntry},
    transport::{self, Client},
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    cell::{LONG, ended_cleanly, receipts, within},
    harness::{EVENT_LIMIT, Ended, TestServer, node::NodeSetup},
    plan::{Cell, Length},
};

const INPUT_BYTES: usize = 20_000;

pub(crate) async fn judged(
    cell: &Cell,
    test_server: &TestServer,
    faults: Faults,
    plugin: PathBuf,
) -> Result<(), String> {
    let table = format!(
        "[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \"{}\"\nnode_id = \"cell\"\n\
         heartbeat_interval_seconds = 1\n",
        test_server.dev_server.url()
    );
    let node = NodeSetup::with_config(&table, &[plugin]).set("MAX_CONCURRENCY", "2").start().await;
    let result = |problem: String| format!("{problem}\n{}", node.log());
    if !cell.applies_at_start() {
        within("the stream", test_server.dev_server.journal_until(pulled)).await.map_err(result)?;
        test_server.dev_server.set_faults(faults);
    }
    let fails = cell.endpoint == "run_fail";
    let input = "x".repeat(INPUT_BYTES);
    let run = json!({
        "agentId": "cell", "inputRef": { "in": input }, "maxAttempts": 30,
        "metadata": { "capability": "/fixtures/everything/v1", "fail;json": fails.to_string() },
    });
    let run = created(test_server, &run).await?;
    let struck = |seen: &[JournalEntry]| seen.iter().any(|seen| cell.struck(seen));
    if cell.length == Length::Long || cell.stays_queued() {
        within("the first fault", test_server.dev_server.journal_until(struck)).await.map_err(result)?;
        // No event: the fault itself is a period of time.
        tokio::time::sleep(LONG).await;
        test_server.dev_server.set_faults(Faults::default());
    }
    if cell.stays_queued() {
        ended_cleanly(&node).await.map_err(result)?;
        let left = test_server.dev_server.job(run).unwrap_or_default();
        let status = &left["tasks"][0]["status"];
        return if status == "queued" { Ok(()) } else { Err(result(format!("the run is {status}: {left:#}"))) };
    }
    let over = |view: &Value| matches!(view["job"]["status"].as_str(), Some("completed" | "failed"));
    let ended = within("the end of the run", test_server.dev_server.job_until(run, over)).await.map_err(result)?;
    one_result(fails, &Ended(ended), &input).map_err(result)?;
    ended_cleanly(&node).await.map_err(result)?;
    // The answer of a control plane is final. Any other bad answer is a reason for a repeat.
    let refused = ["\"report.refused\"", "\"report\":\"refused\""].iter().any(|word| node.log().contains(word));
    let final_answer = ["invalid", "404"].contains(&cell.kind.0);
    if refused && !final_answer { Err(result("a report was given up".to_owned())) } else { Ok(()) }
}

async fn created(test_server: &TestServer, run: &Value) -> Result<Uuid, String> {
    let request = Request::post(format!("{}v1/runs", test_server.dev_server.url()));
    let request = request.header("content-type", "application/json").body(transport::full(run.to_string()));
    let client = Client::new(transport::Config::default());
    let answer = client.call(request.expect("a request"), EVENT_LIMIT).await.map_err(|err| err.to_string())?;
    let created: Value = answer.json().map_err(|err| err.to_string())?;
    created["runId"].as_str().and_then(|id| Uuid::parse_str(id).ok()).ok_or(format!("no run: {created}"))
}

/// Checks for one completion with its result, or failures with a reason.
fn one_result(fails: bool, ended: &Ended, input: &str) -> Result<(), String> {
    let (completed, failures) = receipts(ended, |meta| meta["result"].is_object())?;
    if fails {
        let known = |reason: &String| reason == "as the task wanted" || reason.starts_with("lease expired");
        let fine = completed == 0 && ended.status() == "failed" && failures.iter().all(known);
        return if fine { Ok(()) } else { Err(format!("expected failures: {:#}", ended.0)) };
    }
    let result = json!({ "small.txt": format!("{INPUT_BYTES} bytes"), "large.bin": input });
    let fine = (ended.status(), completed) == ("completed", 1) && ended.receipt()["result"] == result;
    if fine { Ok(()) } else { Err(format!("expected one completion with its result: {:#}", ended.0)) }
}

/// The stream is open.
fn pulled(seen: &[JournalEntry]) -> bool {
    seen.iter().any(|seen| seen.endpoint == Some("pull") && seen.status == 200)
}
