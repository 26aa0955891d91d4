//! Requirements of newer clients, and omissions of the oldest (posemesh.md sections 4.14, 6.6, 6.7, 10).

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};

use super::*;
use crate::dev::Faults;

const MINUTE: jiff::SignedDuration = jiff::SignedDuration::from_mins(1);

/// The claims of a token, which must have the form of a JWT.
fn claims(token: &Value) -> Value {
    let parts: Vec<&str> = token.as_str().expect("text").split('.').collect();
    assert_eq!(parts.len(), 3, "a JWT has three parts");
    serde_json::from_slice(&BASE64.decode(parts[1]).expect("base64url")).expect("JSON")
}

fn ahead(time: &Value) -> bool {
    let at: jiff::Timestamp = time.as_str().expect("text").parse().expect("a time");
    at > jiff::Timestamp::now() && at < jiff::Timestamp::now() + MINUTE * 20
}

/// 10.3: a lease has all coordinates and times, and its token has the claims that nodes check.
#[tokio::test]
async fn lease_has_all_fields_newer_nodes_require() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    assert_eq!(lease["domain_id"], test_server.server.domain_id().to_string());
    for time in [&lease["access_token_expires_at"], &lease["lease_expires_at"], &lease["task"]["lease_expires_at"]] {
        assert!(ahead(time), "{lease:#}");
    }
    let claims = claims(&lease["access_token"]);
    assert_eq!((&claims["iss"], &claims["domain_id"]), (&json!("dds"), &lease["domain_id"]));
    assert_eq!(claims["aud"], json!([lease["domain_server_url"]]));
    assert!(claims["exp"].as_i64().is_some_and(|exp| exp > jiff::Timestamp::now().as_second()));
    // 4.14: values that strict decoders reject if they are wrong.
    assert_eq!((&lease["cancel"], &lease["task"]["inputs_cids"]), (&json!(false), &json!([])));
    for amount in ["billing_units", "estimated_credit_cost"] {
        assert!(lease["task"][amount].is_string(), "{amount} is decimal text");
    }
    // 10.3: values that a heartbeat answer must not change, and values that it must contain.
    let heartbeat = body(&node.heartbeat(&test_server, &lease, &json!({})).await);
    assert!(heartbeat.is_object() && ahead(&heartbeat["lease_expires_at"]));
    assert_eq!(heartbeat["domain_id"], lease["domain_id"]);
    assert!(
        heartbeat["task_id"].is_null() && heartbeat["task"].is_null() && heartbeat["status"] == "running",
        "{heartbeat}"
    );
}

/// 4.14, 10.3: a poll names one capability, several or none, and never gets a capability that it did not request.
#[tokio::test]
async fn poll_can_request_one_or_several_capabilities() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &["/a", "/b", "/c"]).await;
    for capability in ["/a", "/b", "/c"] {
        test_server.job(capability, 1);
    }
    let ask = async |query: &str| {
        let answer = node.poll(&test_server, query).await;
        (answer.status == StatusCode::OK).then(|| body(&answer)["task"]["capability"].clone())
    };
    assert_eq!(ask("?capability=%2Fb").await, Some(json!("/b")));
    assert_eq!(ask("?capability=%2Fb").await, None);
    assert_eq!(ask("?capability=%2Fb&capability=/c").await, Some(json!("/c")));
    assert_eq!(ask("?capability=%2Fnot%2Fregistered").await, None);
    assert_eq!(ask("").await, Some(json!("/a")));
}

/// 4.14, 10.1, 10.3, 10.6: fields that the oldest nodes omit and the newest send as null.
#[tokio::test]
async fn reports_need_no_progress_events_meta_or_details() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server.job(HELLO, 9);
    for report in [json!({"reason": "x"}), json!({"reason": "x", "details": null}), json!({"reason": "y".repeat(4096)})]
    {
        let lease = node.lease(&test_server).await;
        for heartbeat in ["{}", "{\"progress\":null}", "{\"events\":[]}", "{\"progress\":{\"pct\":1}}", ""] {
            let sent =
                test_server.send(Method::POST, &path(&lease, "heartbeat"), Some(&node.token), &[], heartbeat).await;
            assert_eq!(sent.status, StatusCode::OK, "{heartbeat:?}: {}", sent.excerpt());
        }
        assert_eq!(test_server.post(&path(&lease, "fail"), Some(&node.token), &report).await.status, StatusCode::OK);
    }
    let lease = node.lease(&test_server).await;
    // The maximum size that newer nodes allow.
    let large = json!({"progress": {"text": "p".repeat(65_000)}, "events": vec![json!({"n": 1}); 1024]});
    assert_eq!(node.heartbeat(&test_server, &lease, &large).await.status, StatusCode::OK);
    let done = test_server.post(&path(&lease, "complete"), Some(&node.token), &json!({"output_cids": ["d"]})).await;
    assert_eq!(done.status, StatusCode::OK, "{}", done.excerpt());
    assert_eq!(test_server.server.job(job).expect("known")["receipts"][3]["outputs"], json!(["d"]));
}

/// 4.14: heartbeats at the rate of the progress updates, and repeated events.
#[tokio::test]
async fn frequent_heartbeats_with_repeated_events_are_accepted() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let job = test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    for n in 0..30 {
        let heartbeat =
            node.heartbeat(&test_server, &lease, &json!({"progress": {"n": n}, "events": [{"same": 1}]})).await;
        assert_eq!(heartbeat.status, StatusCode::OK);
    }
    let task = test_server.server.job(job).expect("known")["tasks"][0].clone();
    assert_eq!(
        (&task["meta"]["progress"], task["meta"]["events"].as_array().map(Vec::len)),
        (&json!({"n": 29}), Some(30))
    );
}

/// 10.2, 10.6: a registration every 120 s by a wallet that is logged in and works.
#[tokio::test]
async fn repeated_registration_keeps_token_and_lease() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.job(HELLO, 1);
    let lease = node.lease(&test_server).await;
    for _ in 0..3 {
        assert_eq!(node.register(&test_server, &[HELLO, "/more"]).await.status, StatusCode::OK);
    }
    assert_eq!(
        node.heartbeat(&test_server, &lease, &json!({})).await.status,
        StatusCode::OK,
        "token and lease stay valid"
    );
    test_server.job("/more", 1);
    assert_eq!(node.lease(&test_server).await["task"]["capability"], "/more", "a changed set counts at once");
}

/// 6.6, 6.7, 10.5, 10.6: limits and the start of an upload, in both spellings.
#[tokio::test]
async fn upload_answers_have_all_fields_newer_writers_need() {
    let config =
        Config { request_max_bytes: 9_000, domain_data_max_bytes: 70_000, part_size: 1_000, ..Config::default() };
    let test_server = TestServer::with(config).await;
    let limits = json!({
        "upload": {"request_max_bytes": 9_000, "domain_data_max_bytes": 70_000,
                   "multipart": {"enabled": true, "part_size_bytes": 1_000}},
    });
    // Without a token, with headers that newer clients send on every request.
    let headers =
        [("posemesh-client-id", "it"), ("posemesh-sdk-version", "auki-sdk/1.0.0"), ("accept", "application/json")];
    let path = "/api/v1/info";
    assert_eq!(body(&test_server.send(Method::GET, path, None, &headers, "").await), limits);
    let base = format!("/api/v1/domains/{}/data", test_server.server.domain_id());
    let grant = test_server.server.grant();
    let send = async |method: Method, query: &str, sent: String| {
        body(&test_server.send(method, &format!("{base}/multipart{query}"), Some(&grant), &headers, sent).await)
    };
    let mut existing = json!(null);
    for (spelling, fields) in [
        // The reference sends every field. The newer SDK sends only the fields that it uses.
        ("?uploads", json!({"name": "a", "data_type": "ply", "size": 3, "content_type": null, "existing_id": null})),
        ("?uploads=", json!({"name": "b", "data_type": "ply", "size": 3, "content_type": "application/octet-stream"})),
        ("?uploads=", json!({"existing_id": "", "size": 3, "content_type": "application/octet-stream"})),
    ] {
        let mut fields = fields;
        if fields["existing_id"] == "" {
            fields["existing_id"] = existing.clone();
        }
        let begun = send(Method::POST, spelling, fields.to_string()).await;
        let upload = begun["upload_id"].as_str().and_then(|id| Uuid::parse_str(id).ok()).expect("a UUID");
        let data = begun["data_id"].as_str().and_then(|id| Uuid::parse_str(id).ok()).expect("a UUID");
        assert_eq!(begun["part_size"], 1_000);
        assert!(begun["expires_at"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok()).is_some(), "{begun}");
        if !fields["existing_id"].is_null() {
            assert_eq!(begun["data_id"], existing, "replacing keeps the id");
        }
        let part = send(Method::PUT, &format!("?uploadId={upload}&partNumber=1"), "abc".to_owned()).await;
        let etag = part["etag"].as_str().expect("text").to_owned();
        assert!((1..=1024).contains(&etag.len()));
        let parts = json!({"parts": [{"part_number": 1, "etag": etag}]}).to_string();
        let item = send(Method::POST, &format!("?uploadId={upload}"), parts).await;
        assert_eq!((&item["id"], &item["size"]), (&json!(data), &json!(3)));
        existing = item["id"].clone();
    }
}

/// 10.5: content and metadata by id, lists with encoded ids, boundaries chosen by the writer.
#[tokio::test]
async fn data_api_supports_newer_request_forms() {
    let test_server = TestServer::start().await;
    let (base, grant) =
        (format!("/api/v1/domains/{}/data", test_server.server.domain_id()), test_server.server.grant());
    let send = async |method: Method, rest: &str, headers: &[(&str, &str)], sent: &str| {
        test_server.send(method, &format!("{base}{rest}"), Some(&grant), headers, sent.to_owned()).await
    };
    let boundary = "auki-3f0c1c1e-8f57-4d0a-9a83-5f0f3f1b7c11";
    let kind = format!("multipart/form-data; boundary={boundary}");
    let form = format!(
        "--{boundary}\r\nContent-Type: application/octet-stream\r\n\
         Content-Disposition: form-data; name=\"a\"; data-type=\"ply\"\r\n\r\nabc\r\n--{boundary}--\r\n"
    );
    let created = body(&send(Method::POST, "", &[("content-type", &kind)], &form).await);
    assert_eq!(created["data"].as_array().map(Vec::len), Some(1), "exactly one entry");
    let id = created["data"][0]["id"].as_str().expect("text").to_owned();
    assert!(Uuid::parse_str(&id).is_ok());
    let again = send(Method::POST, "", &[("content-type", &kind)], &form).await;
    assert_eq!((again.status, refusal(&again).contains("exists already")), (StatusCode::CONFLICT, true));

    let json = [("accept", "application/json")];
    let other = test_server.server.put_data("b", "ply", b"b").await.expect("stored");
    for query in [format!("?ids={id},{other}"), format!("?ids={id}%2C{other}")] {
        let listed = body(&send(Method::GET, &query, &json, "").await);
        assert_eq!(listed["data"].as_array().map(Vec::len), Some(2), "{query}");
    }
    assert_eq!(body(&send(Method::GET, &format!("/{id}"), &json, "").await), created["data"][0]);
    let raw = send(Method::GET, &format!("/{id}?raw=true"), &[("accept", "application/octet-stream")], "").await;
    assert_eq!((raw.status, &raw.body[..]), (StatusCode::OK, &b"abc"[..]));
}

/// 10.6: JSON content types on every answer, including rejections.
#[tokio::test]
async fn every_json_answer_has_a_json_content_type() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    let (domain, grant) = (test_server.server.domain_id(), test_server.server.grant());
    let data = format!("/api/v1/domains/{domain}/data");
    let unknown = format!("/v1/tasks/{}/heartbeat", Uuid::new_v4());
    for (method, path, bearer) in [
        (Method::POST, "/internal/v1/auth/siwe/request", ""),
        (Method::POST, "/internal/v1/auth/siwe/verify", ""),
        (Method::POST, "/internal/v1/nodes/register-wallet", ""),
        (Method::GET, "/v1/tasks", "nobody"),
        (Method::POST, &*unknown, &*node.token),
        (Method::GET, "/api/v1/info", ""),
        (Method::GET, &*data, &*grant),
        (Method::GET, &*data, "nobody"),
        (Method::POST, &*data, &*grant),
        (Method::POST, &*format!("{data}/multipart?uploads"), &*grant),
        (Method::GET, &*format!("{data}/{}", Uuid::new_v4()), &*grant),
        (Method::GET, "/v1/jobs", &*grant),
        (Method::GET, "/nowhere", ""),
        (Method::PUT, "/v1/tasks", ""),
    ] {
        let answer = test_server.send(method.clone(), path, Some(bearer), &[], "").await;
        assert!(body(&answer).is_object(), "{method} {path}");
    }
}

/// The dev server's old form: the fields that the reference does not need are absent.
#[tokio::test]
async fn old_form_omits_newer_fields_and_endpoints() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    test_server.server.set_faults(Faults::parse("[world]\nform = \"old\"").expect("a valid file"));
    // No header says that the answer is JSON.
    let plain = |answer: &Answer| {
        assert_eq!(answer.headers["content-type"], "text/plain; charset=utf-8");
        serde_json::from_slice::<Value>(&answer.body).expect("it is JSON although no header says so")
    };
    test_server.job(HELLO, 1);
    let lease = plain(&node.poll(&test_server, "").await);
    let opaque = lease["access_token"].as_str().expect("text");
    assert!(!opaque.contains('.'), "no JWT");
    assert!(lease["access_token_expires_at"].is_null() && lease["task"]["lease_expires_at"].is_null());
    assert!(ahead(&lease["lease_expires_at"]));
    let heartbeat = plain(&node.heartbeat(&test_server, &lease, &json!({})).await);
    let content_types: Vec<&String> =
        heartbeat.as_object().expect("an object").iter().filter(|(_, v)| !v.is_null()).map(|(k, _)| k).collect();
    assert_eq!(content_types, ["cancel", "lease_expires_at"]);
    assert_eq!(test_server.get("/api/v1/info", None).await.status, StatusCode::NOT_FOUND);
    let data = format!("/api/v1/domains/{}/data", test_server.server.domain_id());
    let begun = test_server
        .post(&format!("{data}/multipart?uploads"), Some(opaque), &json!({"name": "a", "data_type": "b"}))
        .await;
    assert_eq!(begun.status, StatusCode::NOT_FOUND);
    assert_eq!(test_server.get(&data, Some(opaque)).await.status, StatusCode::OK);
    assert_eq!(node.complete(&test_server, &lease, &[]).await.status, StatusCode::OK);
    assert_eq!(test_server.get(&data, Some(opaque)).await.status, StatusCode::UNAUTHORIZED, "no lease, no access");
}
