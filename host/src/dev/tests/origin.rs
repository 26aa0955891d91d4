//! The Node Runtime control plane in the form of the original.

use tonic::Code;

use super::{
    runs::{Calls, ack, complete, config, fail, next, pull},
    *,
};

fn origin() -> Config {
    Config { origin: true, ..config() }
}

/// A registered node that has sent a heartbeat.
async fn active_node(test_server: &TestServer, id: &str) -> Calls {
    let calls = test_server.register_run_node(id).await;
    heartbeat(test_server, id).await;
    calls
}

async fn heartbeat(test_server: &TestServer, id: &str) {
    let status = json!({"status": {"state": "active", "activeRuns": 0, "availableSlots": 2}});
    let answer = test_server.post(&format!("/v1/nodes/{id}:heartbeat"), None, &status).await;
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn origin_registers_a_node_once() {
    let test_server = TestServer::with(origin()).await;
    let mut calls = test_server.calls().await;
    let mut unknown = pull(&mut calls, "n", 2).await;
    assert_eq!(unknown.message().await.expect("a clean end"), None);
    let node = json!({"nodeId": "n", "capacity": {"slots": 4}});
    assert_eq!(test_server.post("/v1/nodes:register", None, &node).await.status, StatusCode::CREATED);
    let again = test_server.post("/v1/nodes:register", None, &node).await;
    assert_eq!(again.status, StatusCode::INTERNAL_SERVER_ERROR);
    test_server.run(1).await;
    let mut stream = pull(&mut calls, "n", 2).await;
    let waits = tokio::time::timeout(Duration::from_millis(300), stream.message()).await;
    assert!(waits.is_err(), "no slot before the first heartbeat: {waits:?}");
    heartbeat(&test_server, "n").await;
    next(&mut stream).await;
    test_server.server.stop().await;
    let end = stream.message().await.expect_err("an end with a status");
    assert_eq!(end.code(), Code::Cancelled, "{end}");
}

#[tokio::test]
async fn origin_compares_the_node_only() {
    let test_server = TestServer::with(origin()).await;
    let mut calls = active_node(&test_server, "n").await;
    for _ in 0..4 {
        test_server.run(3).await;
    }
    let mut stream = pull(&mut calls, "n", 1).await;
    let mut leases = Vec::new();
    for _ in 0..4 {
        leases.push(next(&mut stream).await); // more than max_leases
    }
    let mut other = leases[0].clone();
    other.lease_id = "any".to_owned();
    assert!(ack(&mut calls, "x", &other).await);
    assert!(!complete(&mut calls, "x", &other).await);
    assert!(complete(&mut calls, "n", &other).await);
    assert!(complete(&mut calls, "n", &other).await, "a repeat");
    assert_eq!(test_server.shown(&other.run_id).await["status"], "completed");
    assert_eq!(fail(&mut calls, "n", &leases[1], true).await, (true, true));
    assert_eq!(test_server.shown(&leases[1].run_id).await["status"], "failed", "no retry");
    test_server.server.stop().await;
}

#[tokio::test]
async fn origin_leases_a_lost_run_without_end() {
    let test_server = TestServer::with(Config { run_ttl: Duration::from_millis(200), ..origin() }).await;
    let mut calls = active_node(&test_server, "n").await;
    let run = test_server.run(1).await;
    let mut stream = pull(&mut calls, "n", 1).await;
    let first = next(&mut stream).await;
    drop(stream);
    test_server.until_status(&run, "pending").await;
    assert!(!complete(&mut calls, "n", &first).await, "the assignment is lost");
    let mut stream = pull(&mut calls, "n", 1).await;
    for _ in 0..2 {
        assert_eq!(next(&mut stream).await.run_id, run);
    }
    assert!(complete(&mut calls, "n", &first).await, "the node has it again");
    test_server.server.stop().await;
}
