//! Jobs over the wire (posemesh.md section 4.13).

use super::*;

fn job(test_server: &TestServer, tasks: &[Value], edges: &[(&str, &str)]) -> Value {
    let edges: Vec<Value> = edges.iter().map(|(from, to)| json!({"from": from, "to": to})).collect();
    json!({"domain_id": test_server.server.domain_id(), "label": "job", "tasks": tasks, "edges": edges})
}

#[tokio::test]
async fn stages_start_after_all_earlier_stages() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &["/one", "/two"]).await;
    let request = job(
        &test_server,
        &[task("a", "/one", 1), task("a", "/one", 1), task("b", "/two", 1)],
        &[("a", "b"), ("a", "b")],
    );
    let id = body(&test_server.post("/v1/jobs", Some(&test_server.server.grant()), &request).await)["job_id"].clone();
    let path = format!("/v1/jobs/{}", id.as_str().expect("an id"));
    let deps = async || {
        let seen = body(&test_server.get(&path, Some(&test_server.server.grant())).await);
        (seen["tasks"][2]["deps_remaining"].clone(), seen["tasks"][2]["status"].clone())
    };
    assert_eq!(deps().await, (json!(2), json!("queued")));
    let (first, second) = (node.lease(&test_server).await, node.lease(&test_server).await);
    node.complete(&test_server, &first, &[]).await;
    assert_eq!(deps().await, (json!(1), json!("queued")));
    assert_eq!(node.poll(&test_server, "").await.status, StatusCode::NO_CONTENT);
    node.complete(&test_server, &second, &[]).await;
    assert_eq!(deps().await.0, json!(0));
    assert_eq!(node.lease(&test_server).await["task"]["stage"], "b");
}

#[tokio::test]
async fn failed_stage_cancels_dependent_tasks() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &["/one", "/two"]).await;
    let tasks = [task("a", "/one", 1), task("b", "/two", 1), task("c", "/two", 1), task("alone", "/two", 1)];
    let request = job(&test_server, &tasks, &[("a", "b"), ("b", "c")]);
    let id = test_server.server.create_job(request).expect("a valid job");
    let lease = body(&node.poll(&test_server, "?capability=/one").await);
    node.fail(&test_server, &lease, "runner failed: x").await;
    let seen = test_server.server.job(id).expect("known");
    let words: Vec<_> = seen["tasks"].as_array().expect("tasks").iter().map(|task| &task["status"]).collect();
    assert_eq!(words, ["failed", "canceled", "canceled", "queued"]);
    assert_eq!(seen["job"]["status"], "running", "an end is final, so it waits for all");
    let lease = node.lease(&test_server).await;
    node.complete(&test_server, &lease, &[]).await;
    assert_eq!(test_server.server.job(id).expect("known")["job"]["status"], "failed");
}

#[tokio::test]
async fn invalid_jobs_are_refused_with_one_line() {
    let test_server = TestServer::start().await;
    let grant = test_server.server.grant();
    let check = async |request: Value, line: &str| {
        for path in ["/v1/jobs", "/v1/jobs/estimate"] {
            let answer = test_server.post(path, Some(&grant), &request).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.excerpt());
            let found = refusal(&answer);
            assert!(found.contains(line) && !found.contains('\n'), "expected {line:?} in {found:?}");
        }
    };
    let (a, b) = (task("a", "/x", 1), task("b", "/x", 1));
    check(job(&test_server, &[], &[]), "tasks is empty").await;
    check(job(&test_server, std::slice::from_ref(&a), &[("a", "z")]), "no task has stage \"z\"").await;
    check(job(&test_server, std::slice::from_ref(&a), &[("a", "a")]), "cannot wait for itself").await;
    check(job(&test_server, &[a.clone(), b.clone()], &[("a", "b"), ("b", "a")]), "through other stages").await;
    check(job(&test_server, &[task("a", "", 1)], &[]), "tasks[0]: capability is empty").await;
    check(job(&test_server, &[json!({"stage": "a"})], &[]), "missing field `label`").await;
    let mut elsewhere = job(&test_server, std::slice::from_ref(&a), &[]);
    elsewhere["domain_id"] = json!(Uuid::new_v4());
    check(elsewhere, "domain_id is").await;
    assert_eq!(
        test_server.post("/v1/jobs", None, &job(&test_server, std::slice::from_ref(&a), &[])).await.status,
        StatusCode::UNAUTHORIZED
    );
    let node = test_server.node(1, &["/x"]).await;
    assert_eq!(
        test_server.get("/v1/jobs", Some(&node.token)).await.status,
        StatusCode::UNAUTHORIZED,
        "not an author's token"
    );
    let listed = body(&test_server.get("/v1/jobs", Some(&grant)).await);
    assert_eq!(listed["items"], json!([]), "nothing was stored");
}

#[tokio::test]
async fn idempotency_key_prevents_duplicate_jobs() {
    let test_server = TestServer::start().await;
    let grant = test_server.server.grant();
    let send = async |key: &str, request: &Value| {
        test_server.send(Method::POST, "/v1/jobs", Some(&grant), &[("idempotency-key", key)], request.to_string()).await
    };
    let request = job(&test_server, &[task("a", "/x", 1)], &[]);
    let first = body(&send("k-1", &request).await)["job_id"].clone();
    assert_eq!(body(&send("k-1", &request).await)["job_id"], first);
    assert_ne!(body(&send("k-2", &request).await)["job_id"], first);
    let other = send("k-1", &job(&test_server, &[task("b", "/x", 1)], &[])).await;
    assert_eq!((other.status, other.headers.get("retry-after")), (StatusCode::CONFLICT, None));
    assert_eq!(send("a b", &request).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(send(&"k".repeat(129), &request).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn jobs_are_listed_in_pages_without_gaps() {
    let test_server = TestServer::start().await;
    let grant = test_server.server.grant();
    let node = test_server.node(1, &["/x"]).await;
    let mut made: Vec<String> = (0..5).map(|_| test_server.job("/x", 1).to_string()).collect();
    let both = test_server
        .server
        .create_job(job(&test_server, &[task("a", "/x", 1), task("b", "/y", 1)], &[]))
        .expect("valid");
    made.push(both.to_string());
    made.reverse();
    let page = async |query: &str| {
        let answer = test_server
            .get(&format!("/v1/jobs?domain_id={}&{query}", test_server.server.domain_id()), Some(&grant))
            .await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.excerpt());
        let page = body(&answer);
        let ids: Vec<String> = page["items"]
            .as_array()
            .expect("items")
            .iter()
            .map(|item| item["job"]["id"].as_str().expect("an id").to_owned())
            .collect();
        (ids, page["next_cursor"].as_str().map(ToOwned::to_owned))
    };
    let (mut seen, mut cursor) = page("limit=2").await;
    while let Some(at) = cursor {
        let (more, next) = page(&format!("limit=2&cursor={at}")).await;
        assert!(!more.is_empty() && more.len() <= 2);
        seen.extend(more);
        cursor = next;
    }
    assert_eq!(seen, made);
    assert_eq!(page("capabilities=/x&capabilities=/y&match_all_capabilities=true").await.0, [both.to_string()]);
    assert_eq!(page("capabilities=/y&capabilities=/z&match_all_capabilities=false").await.0, [both.to_string()]);
    let lease = node.lease(&test_server).await;
    node.complete(&test_server, &lease, &[]).await;
    assert_eq!(page("status=completed").await.0, [made[5].clone()]);
    for wrong in ["limit=0", "limit=101", "cursor=x", "status=done", "match_all_capabilities=1"] {
        let answer = test_server.get(&format!("/v1/jobs?{wrong}"), Some(&grant)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{wrong}");
    }
}

#[tokio::test]
async fn estimate_lists_tasks_with_amounts_as_text() {
    let test_server = TestServer::start().await;
    let request = job(&test_server, &[task("a", "/x", 1)], &[]);
    let estimate = body(&test_server.post("/v1/jobs/estimate", Some(&test_server.server.grant()), &request).await);
    assert_eq!(
        estimate,
        json!({"total": "0", "tasks": [{"label": "a", "stage": "a", "capability": "/x", "mode": "public",
                                        "billing_units": "0", "estimated_credit_cost": "0"}]})
    );
}

#[tokio::test]
async fn priority_orders_leases_and_finished_jobs_are_limited() {
    let test_server = TestServer::with(Config { finished_tasks_max: 2, ..Config::default() }).await;
    let node = test_server.node(1, &["/x"]).await;
    let mut ids = Vec::new();
    for (job_priority, task_priority) in [(0, -1), (0, 5), (1, -9)] {
        let mut request = job(&test_server, &[task("a", "/x", 1)], &[]);
        request["priority"] = json!(job_priority);
        request["tasks"][0]["priority"] = json!(task_priority);
        ids.push(test_server.server.create_job(request).expect("valid"));
    }
    let mut order = Vec::new();
    for _ in 0..3 {
        let lease = node.lease(&test_server).await;
        order.push(lease["task"]["job_id"].as_str().expect("an id").to_owned());
        node.complete(&test_server, &lease, &[]).await;
    }
    assert_eq!(order, [ids[2], ids[1], ids[0]].map(|id| id.to_string()));
    assert_eq!(test_server.server.job(ids[2]), None, "the oldest ended job was dropped");
    assert!(test_server.server.job(ids[0]).is_some());
}
