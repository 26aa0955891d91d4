//! Leases, heartbeats and reports over the wire.

use super::*;

#[tokio::test]
async fn task_runs_from_job_creation_to_receipt() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let domain = test_server.server.domain_id();
    let job = test_server
        .server
        .create_job(json!({
            "label": "greeting", "priority": 3,
            "tasks": [{"label": "hello", "stage": "hello", "capability": HELLO, "inputs_cids": ["in"],
                       "outputs_prefix": "out", "meta": {"who": "you"}, "max_attempts": 2}],
        }))
        .expect("a valid job");
    let lease = node.lease(&test_server).await;
    assert_eq!(lease["domain_id"], domain.to_string());
    assert_eq!(lease["domain_server_url"], format!("http://{}", test_server.server.address()));
    assert_eq!(lease["cancel"], false);
    for time in ["access_token_expires_at", "lease_expires_at"] {
        let at: jiff::Timestamp = lease[time].as_str().expect("text").parse().expect("a time");
        assert!(at > jiff::Timestamp::now(), "{time} is in the future");
    }
    let task = &lease["task"];
    assert_eq!(task["job_id"], job.to_string());
    assert_eq!(task["inputs_cids"], json!(["in"]));
    assert_eq!((&task["outputs_prefix"], &task["meta"]["who"]), (&json!("out"), &json!("you")));
    assert_eq!((&task["attempts"], &task["max_attempts"]), (&json!(1), &json!(2)));
    assert_eq!(test_server.server.job(job).expect("known")["job"]["status"], "running");

    let heartbeat =
        node.heartbeat(&test_server, &lease, &json!({"progress": {"pct": 20}, "events": [{"n": 1}, {"n": 2}]})).await;
    assert_eq!((heartbeat.status, &body(&heartbeat)["cancel"]), (StatusCode::OK, &json!(false)));
    let seen = test_server.server.job(job).expect("known");
    assert_eq!(seen["tasks"][0]["status"], "running");
    assert_eq!(seen["tasks"][0]["meta"]["progress"], json!({"pct": 20}));
    assert_eq!(seen["tasks"][0]["meta"]["events"], json!([{"n": 1}, {"n": 2}]));
    // The oldest nodes send neither progress nor events.
    assert_eq!(node.heartbeat(&test_server, &lease, &json!({})).await.status, StatusCode::OK);
    assert_eq!(test_server.server.job(job).expect("known")["tasks"][0]["meta"]["progress"], json!({"pct": 20}));

    for _ in 0..2 {
        assert_eq!(node.complete(&test_server, &lease, &["out-1"]).await.status, StatusCode::OK, "repeating is fine");
    }
    let seen = test_server.server.job(job).expect("known");
    assert_eq!(seen["job"]["status"], "completed");
    assert_eq!(seen["tasks_summary"]["completed"], 1);
    assert_eq!(seen["receipts"].as_array().map(Vec::len), Some(1));
    assert_eq!((&seen["receipts"][0]["outputs"], &seen["receipts"][0]["meta"]), (&json!(["out-1"]), &json!({"a": 1})));
    assert_eq!(
        node.heartbeat(&test_server, &lease, &json!({})).await.status,
        StatusCode::CONFLICT,
        "the lease is over"
    );
    test_server.server.stop().await;
}

#[tokio::test]
async fn foreign_and_unknown_tasks_are_refused() {
    let test_server = TestServer::start().await;
    let (owner, other) = (test_server.node(1, &[HELLO]).await, test_server.node(2, &[HELLO]).await);
    test_server.job(HELLO, 1);
    let lease = owner.lease(&test_server).await;
    assert_eq!(other.heartbeat(&test_server, &lease, &json!({})).await.status, StatusCode::CONFLICT);
    assert_eq!(other.complete(&test_server, &lease, &[]).await.status, StatusCode::CONFLICT);
    assert_eq!(other.fail(&test_server, &lease, "no").await.status, StatusCode::CONFLICT);
    let unknown = json!({"task": {"id": Uuid::new_v4()}});
    assert_eq!(owner.heartbeat(&test_server, &unknown, &json!({})).await.status, StatusCode::NOT_FOUND);
    assert_eq!(
        owner.heartbeat(&test_server, &json!({"task": {"id": "x"}}), &json!({})).await.status,
        StatusCode::NOT_FOUND
    );
    assert_eq!(owner.complete(&test_server, &lease, &[]).await.status, StatusCode::OK);
    let other_node = test_server.post(&path(&lease, "complete"), Some("nobody"), &json!({})).await;
    assert_eq!(other_node.status, StatusCode::UNAUTHORIZED);
    assert_eq!(test_server.post(&path(&lease, "complete"), None, &json!({})).await.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn expired_lease_requeues_task_until_attempts_run_out() {
    let test_server = TestServer::with(Config { lease_ttl: Duration::from_millis(40), ..Config::default() }).await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server.job(HELLO, 2);
    let first = node.lease(&test_server).await;
    let waiting = |job: &Value| job["tasks"][0]["status"] == "queued";
    let seen = tokio::time::timeout(LIMIT, test_server.server.job_until(job, waiting))
        .await
        .expect("re-queued after the expiry");
    assert_eq!(seen["tasks"][0]["attempts"], 1);
    assert_eq!(node.complete(&test_server, &first, &[]).await.status, StatusCode::CONFLICT, "a stale report");
    let second = node.lease(&test_server).await;
    assert_eq!(second["task"]["id"], first["task"]["id"]);
    assert_eq!(second["task"]["attempts"], 2);
    let ended = |job: &Value| job["job"]["status"] == "failed";
    let seen = tokio::time::timeout(LIMIT, test_server.server.job_until(job, ended)).await.expect("out of attempts");
    assert_eq!(seen["receipts"][0]["meta"]["reason"], "lease expired on attempt 2 of 2");
}

#[tokio::test]
async fn failed_task_is_retried_until_attempts_run_out() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server.job(HELLO, 2);
    let lease = node.lease(&test_server).await;
    // Without an earlier heartbeat: the set-up may have failed.
    assert_eq!(node.fail(&test_server, &lease, "node_setup_failed").await.status, StatusCode::OK);
    assert_eq!(node.fail(&test_server, &lease, "node_setup_failed").await.status, StatusCode::OK, "a repeat");
    assert_eq!(test_server.server.job(job).expect("known")["tasks"][0]["status"], "queued");
    let lease = node.lease(&test_server).await;
    assert_eq!(lease["task"]["attempts"], 2);
    assert_eq!(node.fail(&test_server, &lease, "runner failed: no").await.status, StatusCode::OK);
    let seen = test_server.server.job(job).expect("known");
    assert_eq!((&seen["job"]["status"], &seen["tasks"][0]["status"]), (&json!("failed"), &json!("failed")));
    let reasons: Vec<_> = seen["receipts"].as_array().expect("receipts").iter().map(|r| &r["meta"]["reason"]).collect();
    assert_eq!(reasons, ["node_setup_failed", "runner failed: no"]);
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn poll_leases_registered_requested_capabilities_in_rotation() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &["/a", "/b"]).await;
    for capability in ["/a", "/a", "/a", "/b", "/c"] {
        test_server.job(capability, 1);
    }
    assert_eq!(node.poll(&test_server, "?capability=%2Fc").await.status, StatusCode::NO_CONTENT, "not registered");
    let mut leased = Vec::new();
    for _ in 0..3 {
        leased.push(node.lease(&test_server).await["task"]["capability"].as_str().expect("text").to_owned());
    }
    assert_eq!(leased, ["/a", "/b", "/a"]);
    assert_eq!(node.poll(&test_server, "?capability=%2Fb").await.status, StatusCode::NO_CONTENT);
    assert_eq!(body(&node.poll(&test_server, "?capability=%2Fa").await)["task"]["capability"], "/a");
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn poll_filters_by_job_id_and_domain_id() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let (_, second) = (test_server.job(HELLO, 1), test_server.job(HELLO, 1));
    assert_eq!(node.poll(&test_server, &format!("?domain_id={}", Uuid::new_v4())).await.status, StatusCode::NO_CONTENT);
    let lease =
        node.poll(&test_server, &format!("?job_id={second}&domain_id={}", test_server.server.domain_id())).await;
    assert_eq!(body(&lease)["task"]["job_id"], second.to_string());
    assert_eq!(node.poll(&test_server, "?job_id=x").await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn node_at_lease_limit_is_busy() {
    let test_server = TestServer::with(Config { leases_per_node: Some(1), ..Config::default() }).await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.job(HELLO, 1);
    test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::CONFLICT);
    let busy = body(&test_server.get("/v1/nodes/busy?mode=all", Some(&test_server.server.grant())).await);
    assert_eq!(busy["nodes"][0]["task_id"], lease["task"]["id"]);
    assert_eq!(busy["nodes"][0]["task_status"], "leased");
    node.complete(&test_server, &lease, &[]).await;
    node.lease(&test_server).await;
}

#[tokio::test]
async fn heartbeat_answer_delivers_job_cancellation() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server
        .server
        .create_job(json!({"label": "two", "tasks": [task("a", HELLO, 3), task("b", "/other", 3)]}))
        .expect("a valid job");
    let lease = node.lease(&test_server).await;
    let cancel = format!("/v1/jobs/{job}/cancel");
    let grant = test_server.server.grant();
    for _ in 0..2 {
        let answer = test_server.send(Method::POST, &cancel, Some(&grant), &[], "").await;
        assert_eq!(body(&answer)["status"], "canceled");
    }
    let seen = test_server.server.job(job).expect("known");
    assert_eq!(seen["job"]["status"], "canceled");
    assert_eq!((&seen["tasks"][0]["status"], &seen["tasks"][1]["status"]), (&json!("leased"), &json!("canceled")));
    assert!(seen["tasks"][0]["cancel_requested_at"].is_string());
    for _ in 0..2 {
        let heartbeat = node.heartbeat(&test_server, &lease, &json!({})).await;
        assert_eq!((heartbeat.status, &body(&heartbeat)["cancel"]), (StatusCode::OK, &json!(true)));
    }
    assert_eq!(test_server.server.job(job).expect("known")["tasks"][0]["status"], "canceled");
    assert_eq!(node.complete(&test_server, &lease, &[]).await.status, StatusCode::CONFLICT);

    let done = test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    node.complete(&test_server, &lease, &[]).await;
    let late = test_server.send(Method::POST, &format!("/v1/jobs/{done}/cancel"), Some(&grant), &[], "").await;
    assert_eq!(late.status, StatusCode::CONFLICT);
}

#[tokio::test]
async fn heartbeat_renews_token_and_old_token_has_grace() {
    let config = Config {
        domain_token_renew_after: Duration::ZERO,
        domain_token_grace: Duration::from_millis(60),
        ..Config::default()
    };
    let test_server = TestServer::with(config).await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    let list = format!("/api/v1/domains/{}/data", test_server.server.domain_id());
    let opens = async |token: &Value| test_server.get(&list, token.as_str()).await.status;
    let old = lease["access_token"].clone();
    assert_eq!(opens(&old).await, StatusCode::OK);
    let new = body(&node.heartbeat(&test_server, &lease, &json!({})).await)["access_token"].clone();
    assert!(new.is_string() && new != old);
    assert_eq!(opens(&new).await, StatusCode::OK);
    let dead = async { while opens(&old).await != StatusCode::UNAUTHORIZED {} };
    tokio::time::timeout(LIMIT, dead).await.expect("the grace ends");
    assert_eq!(opens(&new).await, StatusCode::OK);
    node.complete(&test_server, &lease, &[]).await;
    assert_eq!(opens(&new).await, StatusCode::UNAUTHORIZED, "no lease, no access");
}

#[tokio::test]
async fn rejected_token_is_replaced_by_next_heartbeat() {
    let config = Config { domain_token_ttl: Duration::from_millis(1), ..Config::default() };
    let test_server = TestServer::with(config).await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    let list = format!("/api/v1/domains/{}/data", test_server.server.domain_id());
    let refused = async {
        while test_server.get(&list, lease["access_token"].as_str()).await.status != StatusCode::UNAUTHORIZED {}
    };
    tokio::time::timeout(LIMIT, refused).await.expect("the token expires");
    assert!(body(&node.heartbeat(&test_server, &lease, &json!({})).await)["access_token"].is_string());
}

#[tokio::test]
async fn journal_records_method_path_status_and_node() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    node.poll(&test_server, "?capability=x").await;
    let seen = test_server.server.journal();
    let last = seen.last().expect("requests");
    assert_eq!((&*last.method, &*last.path, last.status), ("GET", "/v1/tasks", 204));
    assert!(last.node.is_some());
    let over_the_wire = body(&test_server.get(&format!("/dev/v1/requests?since={}", last.number), None).await);
    assert_eq!(over_the_wire["requests"].as_array().map(Vec::len), Some(1));
    let server = body(&test_server.get("/dev/v1/world", None).await);
    assert_eq!(server["nodes"][0]["capabilities"], json!([HELLO]));
    assert_eq!(server["dms"], test_server.server.dms_url().as_str());
    assert_eq!(test_server.get("/v1/jobs", server["grant"].as_str()).await.status, StatusCode::OK);
    let waiting = test_server.server.journal_until(|seen| seen.iter().any(|seen| seen.path == "/v1/jobs"));
    tokio::time::timeout(LIMIT, waiting).await.expect("it was asked");
    tokio::time::timeout(LIMIT, test_server.server.node_online(HELLO)).await.expect("it is online");
}
