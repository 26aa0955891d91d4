//! Domain data over the wire (posemesh.md section 6).

use super::*;

const OCTETS: (&str, &str) = ("content-type", "application/octet-stream");

/// A single upload in the form of the reference implementation.
fn form(boundary: &str, parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (disposition, payload) in parts {
        body.extend_from_slice(format!("--{boundary}\r\nContent-Type: application/octet-stream\r\n").as_bytes());
        body.extend_from_slice(format!("Content-Disposition: form-data; {disposition}\r\n\r\n").as_bytes());
        body.extend_from_slice(payload);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
    body
}

impl TestServer {
    fn data(&self, rest: &str) -> String {
        format!("/api/v1/domains/{}/data{rest}", self.server.domain_id())
    }

    async fn upload(&self, method: Method, parts: &[(&str, &[u8])]) -> Answer {
        let headers = [("content-type", "multipart/form-data; boundary=boundary")];
        self.send(method, &self.data(""), Some(&self.server.grant()), &headers, form("boundary", parts)).await
    }

    async fn raw(&self, id: &Value) -> Answer {
        let id = id.as_str().expect("an id");
        self.get(&self.data(&format!("/{id}?raw=true")), Some(&self.server.grant())).await
    }

    async fn multipart(&self, method: Method, query: &str, body: impl Into<bytes::Bytes>) -> Answer {
        self.send(method, &self.data(&format!("/multipart{query}")), Some(&self.server.grant()), &[OCTETS], body).await
    }
}

#[tokio::test]
async fn data_is_created_found_read_replaced_and_deleted() {
    let test_server = TestServer::start().await;
    let grant = test_server.server.grant();
    let payload: Vec<u8> = (0..200_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let parts: [(&str, &[u8]); 2] =
        [("name=\"scan a\"; data-type=\"ply\"", &payload), ("name=\"empty\"; data-type=\"json\"", b"")];
    let created = body(&test_server.upload(Method::POST, &parts).await);
    let (scan, empty) = (created["data"][0].clone(), created["data"][1].clone());
    assert_eq!((&scan["name"], &scan["data_type"], &scan["size"]), (&json!("scan a"), &json!("ply"), &json!(200_000)));
    assert_eq!((&scan["domain_id"], &empty["size"]), (&json!(test_server.server.domain_id()), &json!(0)));

    let listed = body(&test_server.get(&test_server.data("?name=scan+a&data_type=ply"), Some(&grant)).await);
    assert_eq!(listed, json!({"data": [scan]}));
    assert_eq!(body(&test_server.get(&test_server.data("?name=scan"), Some(&grant)).await), json!({"data": []}));
    assert_eq!(
        body(&test_server.get(&test_server.data(""), Some(&grant)).await)["data"].as_array().map(Vec::len),
        Some(2)
    );

    let raw = test_server.raw(&scan["id"]).await;
    assert_eq!((&raw.body[..], &raw.headers["content-length"]), (&payload[..], &"200000".parse().expect("a value")));
    let one = format!("/{}", scan["id"].as_str().expect("an id"));
    assert_eq!(body(&test_server.get(&test_server.data(&one), Some(&grant)).await), scan);

    let update = format!("id=\"{}\"", scan["id"].as_str().expect("an id"));
    let replaced = body(&test_server.upload(Method::PUT, &[(&update, b"new")]).await)["data"][0].clone();
    assert_eq!((&replaced["id"], &replaced["size"], &replaced["name"]), (&scan["id"], &json!(3), &json!("scan a")));
    assert_eq!(&test_server.raw(&scan["id"]).await.body[..], b"new");

    let deleted = test_server.send(Method::DELETE, &test_server.data(&one), Some(&grant), &[], "").await;
    assert_eq!(deleted.status, StatusCode::OK);
    assert_eq!(test_server.get(&test_server.data(&one), Some(&grant)).await.status, StatusCode::NOT_FOUND);
    assert_eq!(
        test_server.send(Method::DELETE, &test_server.data(&one), Some(&grant), &[], "").await.status,
        StatusCode::NOT_FOUND
    );
}

#[tokio::test]
async fn data_is_listed_by_name_type_and_ids() {
    let test_server = TestServer::start().await;
    let mut ids = Vec::new();
    for (name, data_type) in [("scan a", "ply"), ("scan a", "obj"), ("scan b", "ply")] {
        ids.push(test_server.server.put_data(name, data_type, b"abc").await.expect("stored").to_string());
    }
    let unknown = Uuid::nil();
    for (query, expected) in [
        (String::new(), &[0, 1, 2][..]),
        ("?name=scan+a".to_owned(), &[0, 1]),
        ("?data_type=ply".to_owned(), &[0, 2]),
        ("?name=scan%20a&data_type=ply".to_owned(), &[0]),
        // A filter has the exact text. Real servers may also match a part of a name.
        ("?name=scan".to_owned(), &[]),
        // Listed ids keep their order. Unknown ones are left out.
        (format!("?ids={}%2C{unknown}%2C{}", ids[2], ids[0].to_uppercase()), &[2, 0]),
        (format!("?ids={},{}&name=scan+a", ids[2], ids[1]), &[1]),
    ] {
        let listed = body(&test_server.get(&test_server.data(&query), Some(&test_server.server.grant())).await);
        let listed = listed["data"].as_array().expect("a list");
        let found: Vec<&str> = listed.iter().map(|entry| entry["id"].as_str().expect("an id")).collect();
        let expected: Vec<&str> = expected.iter().map(|at| ids[*at].as_str()).collect();
        assert_eq!(found, expected, "{query}");
    }
}

#[tokio::test]
async fn content_by_id_is_served_in_ranges() {
    // posemesh.md sections 6.5, 10.5: production runners read content by id themselves.
    let test_server = TestServer::start().await;
    let id = test_server.server.put_data("scan", "ply", b"0123456789").await.expect("stored");
    let path = test_server.data(&format!("/{id}?raw=true"));
    let ask = async |headers: &[(&str, &str)]| {
        let answer = test_server.send(Method::GET, &path, Some(&test_server.server.grant()), headers, "").await;
        let range = answer.headers.get("content-range").map(|range| range.to_str().expect("text").to_owned());
        let body = String::from_utf8(answer.body.to_vec()).expect("text");
        let etag = answer.headers["etag"].to_str().expect("text").to_owned();
        assert_eq!(answer.headers["accept-ranges"], "bytes");
        (answer.status.as_u16(), range.unwrap_or_default(), body, etag)
    };
    let (status, range, whole, etag) = ask(&[]).await;
    assert_eq!((status, range.as_str(), whole.as_str()), (200, "", "0123456789"));
    for (asked, status, range, body) in [
        ("bytes=4-", 206, "bytes 4-9/10", "456789"),
        ("bytes=4-4", 206, "bytes 4-4/10", "4"),
        ("bytes=8-99", 206, "bytes 8-9/10", "89"),
        ("bytes=-3", 206, "bytes 7-9/10", "789"),
        ("bytes=-99", 206, "bytes 0-9/10", "0123456789"),
        ("bytes=10-", 416, "bytes */10", ""),
        ("bytes=5-4", 200, "", "0123456789"),
        ("bytes=0-1,4-5", 200, "", "0123456789"),
        ("lines=1-", 200, "", "0123456789"),
    ] {
        let found = ask(&[("range", asked), ("if-range", &etag)]).await;
        assert_eq!((found.0, found.1.as_str(), found.2.as_str()), (status, range, body), "{asked}");
    }
    let update = format!("id=\"{id}\"");
    test_server.upload(Method::PUT, &[(&update, b"abcdefghij")]).await;
    let found = ask(&[("range", "bytes=4-"), ("if-range", &etag)]).await;
    assert_eq!((found.0, found.2.as_str()), (200, "abcdefghij"), "other data by now");
    assert_ne!(found.3, etag);
}

#[tokio::test]
async fn multipart_download_has_the_format_nodes_parse() {
    let test_server = TestServer::start().await;
    let first = test_server.server.put_data("scan a", "ply", b"abcd").await.expect("stored");
    let second = test_server.server.put_data("b", "json", b"--x\r\n\r\n").await.expect("stored");
    let ask = async |query: &str| {
        let headers = [("accept", "multipart/form-data")];
        test_server.send(Method::GET, &test_server.data(query), Some(&test_server.server.grant()), &headers, "").await
    };
    let answer = ask(&format!("?ids={second},{first}")).await;
    let content_type = answer.headers["content-type"].to_str().expect("text").to_owned();
    let boundary = content_type.strip_prefix("multipart/form-data; boundary=").expect("the exact beginning");
    assert!(!boundary.contains(['"', ';']));
    let text = std::str::from_utf8(&answer.body).expect("text");
    let mut rest = text;
    for (id, name, data_type, payload) in [(second, "b", "json", "--x\r\n\r\n"), (first, "scan a", "ply", "abcd")] {
        let block = rest.strip_prefix(&format!("--{boundary}\r\n")).expect("a delimiter");
        let (head, after) = block.split_once("\r\n\r\n").expect("headers");
        let size = payload.len();
        for parameter in [
            format!("; name=\"{name}\""),
            format!("; data-type=\"{data_type}\""),
            format!("; id=\"{id}\""),
            format!("; domain-id=\"{}\"", test_server.server.domain_id()),
            format!("; size=\"{size}\""),
            "; created-at=\"".to_owned(),
            "; updated-at=\"".to_owned(),
        ] {
            assert!(head.contains(&parameter), "{parameter} in {head}");
        }
        assert_eq!(&after[..size], payload);
        rest = after[size..].strip_prefix("\r\n").expect("a line end");
    }
    assert_eq!(rest, format!("--{boundary}--\r\n"));
    assert_eq!(ask(&format!("?ids={}", Uuid::new_v4())).await.status, StatusCode::NOT_FOUND);
    assert_eq!(ask("?ids=not-an-id").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn invalid_uploads_are_refused_and_store_nothing() {
    let config = Config { request_max_bytes: 100_000, domain_data_max_bytes: 50_000, ..Config::default() };
    let test_server = TestServer::with(config).await;
    let check = async |answer: Answer, status: StatusCode, line: &str| {
        assert_eq!(answer.status, status, "{}", answer.excerpt());
        assert!(refusal(&answer).contains(line), "{}", answer.excerpt());
    };
    let named = "name=\"a\"; data-type=\"json\"";
    assert_eq!(test_server.upload(Method::POST, &[(named, b"1")]).await.status, StatusCode::OK);
    check(test_server.upload(Method::POST, &[(named, b"2")]).await, StatusCode::CONFLICT, "exists already").await;
    let both: [(&str, &[u8]); 2] = [("name=\"b\"; data-type=\"json\"", b"1"), (named, b"2")];
    check(test_server.upload(Method::POST, &both).await, StatusCode::CONFLICT, "exists already").await;
    let bad = test_server.upload(Method::POST, &[("name=\"a/b\"; data-type=\"json\"", b"1")]).await;
    check(bad, StatusCode::BAD_REQUEST, "'/'").await;
    check(test_server.upload(Method::POST, &[("name=\"a\"", b"1")]).await, StatusCode::BAD_REQUEST, "data-type").await;
    check(test_server.upload(Method::PUT, &[(named, b"1")]).await, StatusCode::BAD_REQUEST, "no id").await;
    let unknown = format!("id=\"{}\"", Uuid::new_v4());
    check(test_server.upload(Method::PUT, &[(&unknown, b"1")]).await, StatusCode::NOT_FOUND, "no data").await;
    let large = vec![b'x'; 60_000];
    let item = test_server.upload(Method::POST, &[("name=\"c\"; data-type=\"json\"", &large)]).await;
    check(item, StatusCode::PAYLOAD_TOO_LARGE, "50000 bytes are stored").await;
    let larger = vec![b'x'; 4_000_000];
    let request = test_server.upload(Method::POST, &[("name=\"c\"; data-type=\"json\"", &larger)]).await;
    check(request, StatusCode::PAYLOAD_TOO_LARGE, "upload in parts").await;
    let headers = [("content-type", "multipart/form-data; boundary=other")];
    let cut = form("boundary", &[(named, b"1")]);
    let cut =
        test_server.send(Method::POST, &test_server.data(""), Some(&test_server.server.grant()), &headers, cut).await;
    check(cut, StatusCode::BAD_REQUEST, "no boundary was found").await;
    let json = test_server.post(&test_server.data(""), Some(&test_server.server.grant()), &json!({})).await;
    check(json, StatusCode::BAD_REQUEST, "expected Content-Type multipart/form-data").await;

    let listed = body(&test_server.get(&test_server.data(""), Some(&test_server.server.grant())).await);
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(1), "only the first one was stored");
}

#[tokio::test]
async fn data_access_needs_valid_token_for_its_domain() {
    let test_server = TestServer::start().await;
    let node = test_server.node(1, &[HELLO]).await;
    assert_eq!(test_server.get(&test_server.data(""), None).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(test_server.get(&test_server.data(""), Some("x.y.z")).await.status, StatusCode::UNAUTHORIZED);
    assert_eq!(
        test_server.get(&test_server.data(""), Some(&node.token)).await.status,
        StatusCode::UNAUTHORIZED,
        "a node token"
    );
    let elsewhere = format!("/api/v1/domains/{}/data", Uuid::new_v4());
    assert_eq!(test_server.get(&elsewhere, Some(&test_server.server.grant())).await.status, StatusCode::FORBIDDEN);
    let headers = [("content-type", "multipart/form-data; boundary=boundary")];
    let large = form("boundary", &[("name=\"a\"; data-type=\"b\"", &vec![0; 5_000_000])]);
    let refused = test_server.send(Method::POST, &test_server.data(""), Some("x"), &headers, large).await;
    assert_eq!(refused.status, StatusCode::UNAUTHORIZED, "answered before the body was complete");
    let info = body(&test_server.get("/api/v1/info", None).await);
    assert!(info["upload"]["request_max_bytes"].is_i64() && info["upload"]["domain_data_max_bytes"].is_i64());
    assert_eq!(info["upload"]["multipart"]["enabled"], true);
    assert!(info["upload"]["multipart"]["part_size_bytes"].is_u64());
}

#[tokio::test]
async fn large_data_comes_in_parts() {
    let test_server = TestServer::with(Config { part_size: 1000, ..Config::default() }).await;
    let initiate = json!({"name": "big", "data_type": "ply", "size": 2500, "content_type": null, "existing_id": null});
    let begun = body(&test_server.multipart(Method::POST, "?uploads", initiate.to_string()).await);
    assert_eq!(begun["part_size"], 1000);
    assert!(begun["data_id"].is_string() && begun["expires_at"].is_string());
    let id = begun["upload_id"].as_str().expect("an id").to_owned();
    let part = async |number: u32, bytes: &[u8]| {
        let query = format!("?uploadId={id}&partNumber={number}");
        test_server.multipart(Method::PUT, &query, bytes.to_vec()).await
    };
    let complete = async |etags: &[&Value]| {
        let parts: Vec<Value> =
            etags.iter().enumerate().map(|(at, etag)| json!({"part_number": at + 1, "etag": etag})).collect();
        test_server.multipart(Method::POST, &format!("?uploadId={id}"), json!({"parts": parts}).to_string()).await
    };
    assert_eq!(part(0, b"x").await.status, StatusCode::BAD_REQUEST);
    assert_eq!(part(4, b"x").await.status, StatusCode::BAD_REQUEST, "2500 bytes are three parts");
    assert_eq!(part(1, &[0; 1001]).await.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(part(1, b"").await.status, StatusCode::BAD_REQUEST);
    let one = body(&part(1, &[1; 1000]).await)["etag"].clone();
    let three = body(&part(3, &[3; 500]).await)["etag"].clone();
    let missing = complete(&[&one, &three]).await;
    assert_eq!(
        (missing.status, refusal(&missing)),
        (StatusCode::BAD_REQUEST, "part 2 has not been uploaded".to_owned())
    );
    let stale = body(&part(2, &[9; 1000]).await)["etag"].clone();
    let two = body(&part(2, &[2; 1000]).await)["etag"].clone();
    assert!(refusal(&complete(&[&one, &stale, &three]).await).contains("another etag"));
    assert!(refusal(&complete(&[&one, &two]).await).contains("2000 bytes together, 2500 were announced"));
    assert!(refusal(&complete(&[]).await).contains("parts is empty"));
    let done = complete(&[&one, &two, &three]).await;
    assert_eq!(done.status, StatusCode::OK, "{}", done.excerpt());
    let item = body(&done);
    assert_eq!((&item["id"], &item["size"]), (&begun["data_id"], &json!(2500)));
    let expected: Vec<u8> = [[1; 1000].as_slice(), &[2; 1000], &[3; 500]].concat();
    assert_eq!(&test_server.raw(&item["id"]).await.body[..], &expected[..]);
    assert_eq!(body(&complete(&[&one, &two, &three]).await), item, "the answer may have been lost");
    assert_eq!(part(1, b"x").await.status, StatusCode::NOT_FOUND, "it is finished");

    // Replaced by id, with the spelling and the fields of newer writers.
    let initiate = json!({"existing_id": item["id"], "size": 3, "content_type": "application/octet-stream"});
    let begun = body(&test_server.multipart(Method::POST, "?uploads=", initiate.to_string()).await);
    assert_eq!(begun["data_id"], item["id"]);
    let id = begun["upload_id"].as_str().expect("an id");
    let etag =
        body(&test_server.multipart(Method::PUT, &format!("?uploadId={id}&partNumber=1"), "new").await)["etag"].clone();
    let parts = json!({"parts": [{"part_number": 1, "etag": etag}]});
    let replaced = body(&test_server.multipart(Method::POST, &format!("?uploadId={id}"), parts.to_string()).await);
    assert_eq!((&replaced["id"], &replaced["name"], &replaced["size"]), (&item["id"], &json!("big"), &json!(3)));
    assert_eq!(&test_server.raw(&item["id"]).await.body[..], b"new");
}

#[tokio::test]
async fn abort_and_server_stop_delete_unfinished_uploads() {
    let folder = tempfile::tempdir().expect("a folder");
    let test_server = TestServer::with(Config { data: Some(folder.path().to_owned()), ..Config::default() }).await;
    let begin = async || {
        let initiate = json!({"name": "big", "data_type": "ply"});
        let begun = body(&test_server.multipart(Method::POST, "?uploads", initiate.to_string()).await);
        let id = begun["upload_id"].as_str().expect("an id").to_owned();
        let written = test_server.multipart(Method::PUT, &format!("?uploadId={id}&partNumber=1"), "x").await;
        assert_eq!(written.status, StatusCode::OK);
        id
    };
    let uploads = || std::fs::read_dir(folder.path().join("uploads")).map_or(0, Iterator::count);
    let id = begin().await;
    assert_eq!(uploads(), 1);
    let abort = format!("?uploadId={id}");
    assert_eq!(test_server.multipart(Method::DELETE, &abort, "").await.status, StatusCode::OK);
    assert_eq!(uploads(), 0);
    assert_eq!(test_server.multipart(Method::DELETE, &abort, "").await.status, StatusCode::NOT_FOUND);
    begin().await;
    test_server.server.put_data("kept", "json", b"{}").await.expect("stored");
    let domain = test_server.server.domain_id();
    test_server.server.stop().await;
    assert_eq!(uploads(), 0);

    let again = TestServer::with(Config { data: Some(folder.path().to_owned()), ..Config::default() }).await;
    assert_eq!(again.server.domain_id(), domain);
    let listed = body(&again.get(&again.data(""), Some(&again.server.grant())).await);
    assert_eq!(listed["data"][0]["name"], "kept");
}

#[tokio::test]
async fn without_multipart_initiating_is_unknown() {
    let test_server = TestServer::with(Config { multipart: false, ..Config::default() }).await;
    let answer =
        test_server.multipart(Method::POST, "?uploads", json!({"name": "a", "data_type": "b"}).to_string()).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert_eq!(body(&test_server.get("/api/v1/info", None).await)["upload"]["multipart"]["enabled"], false);
}

#[tokio::test]
async fn stop_closes_idle_and_busy_connections() {
    let test_server = TestServer::with(Config { stop_grace: Duration::from_millis(50), ..Config::default() }).await;
    test_server.server.put_data("a", "json", b"{}").await.expect("stored");
    // A connection that never finishes its request.
    let mut stuck = tokio::net::TcpStream::connect(test_server.server.address()).await.expect("connects");
    let head = format!("POST {} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n", test_server.data(""));
    tokio::io::AsyncWriteExt::write_all(&mut stuck, head.as_bytes()).await.expect("writes");
    assert_eq!(test_server.get("/api/v1/info", None).await.status, StatusCode::OK);
    let address = test_server.server.address();
    tokio::time::timeout(LIMIT, test_server.server.stop()).await.expect("stops");
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}
