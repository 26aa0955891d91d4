//! Artifacts through the binary: names, kinds of files, uploads after failures, and the report.

use std::{collections::BTreeSet, time::Duration};

use runner_host::dev::{Faults, JournalEntry};
use serde_json::{Value, json};

use crate::harness::{
    Ended, TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures,
    node::TestNode,
};

const PUTS: &str = "/fixtures/puts/v1";

/// A dev server with small requests and parts, so that small artifacts are sent in parts.
async fn small_parts() -> TestServer {
    TestServer::with(|config| {
        config.request_max_bytes = 100_000;
        config.part_size = 64 * 1024;
    })
    .await
}

async fn puts(test_server: &TestServer, node: &TestNode, puts: Value) -> Ended {
    test_server.run(node, PUTS, json!({ "puts": puts })).await
}

/// The result of each entry, as the runner saw it.
async fn results(test_server: &TestServer, ended: &Ended) -> Vec<Value> {
    serde_json::from_slice(&test_server.artifact(ended, "puts.json").await).expect("the runner's own JSON")
}

#[tokio::test]
async fn paths_with_one_reduced_name_are_separate_artifacts() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let paths = ["a/b.json", "a_b.json", "a.b.json"];
    let mut list: Vec<Value> = paths.iter().map(|path| json!({ "path": path, "text": path })).collect();
    list.push(json!({ "path": "a/b.json", "text": "the same path again" }));
    let ended = puts(&test_server, &node, json!(list)).await;
    let artifacts = ended.completed().artifacts();
    let ids: BTreeSet<&str> = paths.iter().filter_map(|path| artifacts[*path]["id"].as_str()).collect();
    assert_eq!((artifacts.len(), ids.len()), (4, 3), "{artifacts:#?}");
    assert_eq!(test_server.artifact(&ended, "a/b.json").await, b"the same path again");
    for path in &paths[1..] {
        assert_eq!(test_server.artifact(&ended, path).await, path.as_bytes());
    }
    let task = ended.task()["id"].as_str().expect("an id");
    assert_eq!(artifacts["a/b.json"]["name"], format!("a_b_json_{task}"));
}

#[tokio::test]
async fn report_lists_each_artifact_once_in_order() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let same = json!({ "path": "z", "text": "1", "name": "n", "data_type": "t" });
    let other = json!({ "path": "m", "text": "2", "name": "n", "data_type": "t" });
    let ended = puts(
        &test_server,
        &node,
        json!([same, other, { "path": "b", "file": "9 bytes" }, { "path": "b", "text": "b" }]),
    );
    let ended = ended.await;
    let receipt = ended.completed().receipt();
    let listed = receipt["artifacts"].as_array().expect("a list");
    let paths: Vec<&str> = listed.iter().filter_map(|row| row["logical_path"].as_str()).collect();
    assert_eq!(paths, ["b", "m", "puts.json", "z"]);
    for row in listed {
        let keys: Vec<&String> = row.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["data_type", "id", "logical_path", "name"]);
    }
    let receipts = ended.0["receipts"].as_array().expect("receipts");
    let cids = receipts[0]["outputs"].as_array().expect("ids");
    assert_eq!(cids.len(), 3, "one id once: {receipts:#?}");
}

#[tokio::test]
async fn every_domain_call_has_the_client_id() {
    let test_server = small_parts().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo(), fixtures::echo()]).set("CLIENT_ID", "billed-once").leasing().await;
    let input = test_server.put("in", b"some input").await;
    test_server.ended(&node, test_server.task("/examples/echo-bytes/v1").inputs(&[input]).submit()).await.completed();
    puts(&test_server, &node, json!([{ "path": "large", "file": "200000 bytes" }])).await.completed();
    let seen = proxy.headers("/api/", "posemesh-client-id");
    for call in ["GET /api/v1/info", "POST /api/v1/domains", "PUT /api/v1/domains", "GET /api/v1/domains"] {
        assert!(seen.iter().any(|(name, _)| name.starts_with(call)), "no {call} in {seen:#?}");
    }
    assert!(seen.iter().all(|(_, id)| id.as_deref() == Some("billed-once")), "{seen:#?}");
    let unbilled = proxy.headers("/v1/", "posemesh-client-id");
    assert!(unbilled.iter().all(|(_, id)| id.is_none()), "no request goes to the control plane");
}

#[tokio::test]
async fn node_creates_and_keeps_a_client_id() {
    let mut ids = BTreeSet::new();
    for _ in 0..2 {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::before(&test_server).await;
        let node = proxy.node(&[fixtures::echo()]).leasing().await;
        let input = test_server.put("in", b"some input").await;
        for _ in 0..2 {
            test_server
                .ended(&node, test_server.task("/examples/echo-bytes/v1").inputs(&[input]).submit())
                .await
                .completed();
        }
        let seen: BTreeSet<Option<String>> =
            proxy.headers("/api/", "posemesh-client-id").into_iter().map(|(_, id)| id).collect();
        assert_eq!(seen.len(), 1, "one id for all of its calls: {seen:?}");
        let id = seen.into_iter().next().flatten().expect("each call says it");
        let own = id.strip_prefix("runner-host/").and_then(|rest| rest.parse::<uuid::Uuid>().ok());
        assert!(own.is_some(), "{id}");
        ids.insert(id);
    }
    assert_eq!(ids.len(), 2, "no two nodes share one");
}

#[tokio::test]
async fn artifact_with_an_id_replaces_that_data() {
    let test_server = small_parts().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let (text, file, stream) =
        (test_server.put("one", b"1").await, test_server.put("two", b"2").await, test_server.put("three", b"3").await);
    let before = test_server.stored().await;
    let list = json!([
        { "path": "a", "text": "new", "id": text },
        { "path": "b", "file": "9 bytes", "id": file },
        { "path": "c", "stream": 200_000, "id": stream },
    ]);
    let ended = puts(&test_server, &node, list).await;
    for (path, id, size) in [("a", text, 3), ("b", file, 9), ("c", stream, 200_000)] {
        assert_eq!(ended.completed().artifacts()[path]["id"], json!(id), "{path}");
        assert_eq!(test_server.size(&id.to_string()).await, size, "{path}");
    }
    assert_eq!(test_server.stored().await - before, 1, "only the runner's own list is new");
}

#[tokio::test]
async fn unusable_files_are_refused_in_one_line() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let cases = [
        ("folder", "is a directory, expected a regular file"),
        ("empty", "is empty; expected at least one byte"),
        ("pipe", "is a pipe, socket, device or link, expected a regular file"),
        ("link /etc/hostname", "leads out of the task's directory; publish a file in it, without links"),
    ];
    let list: Vec<Value> = cases.iter().map(|(file, _)| json!({ "path": "x", "file": file })).collect();
    let ended = puts(&test_server, &node, json!(list)).await;
    let result = results(&test_server, ended.completed()).await;
    for ((file, text), result) in cases.iter().zip(result) {
        let output = result["text"].as_str().unwrap_or_default();
        assert_eq!(result["kind"], "BadRequest", "{file}: {result}");
        assert!(output == format!("upload of x refused: its file {text}"), "{file}: {output}");
        assert!(!output.contains('\n'), "{output}");
    }
}

#[tokio::test]
async fn names_that_break_a_header_are_refused() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let bad = ["a\r\nX-Other: y", "a\"; id=\"b", "a;b", "a\\"];
    let mut list: Vec<Value> = bad.iter().map(|name| json!({ "path": "x", "text": "x", "name": name })).collect();
    list.push(json!({ "path": "good", "text": "x", "name": "scan ä, 2", "data_type": "refined_scan_zip" }));
    let ended = puts(&test_server, &node, json!(list)).await;
    let result = results(&test_server, ended.completed()).await;
    for result in &result[..bad.len()] {
        assert_eq!(result["kind"], "BadRequest", "{result}");
        assert!(
            result["text"].as_str().is_some_and(|text| text.starts_with("upload of x refused: the name ")),
            "{result}"
        );
    }
    let good = &ended.artifacts()["good"];
    assert_eq!((&good["name"], &good["data_type"]), (&json!("scan ä, 2"), &json!("refined_scan_zip")));
    assert_eq!(test_server.stored().await, 2);
}

#[tokio::test]
async fn content_like_a_boundary_is_stored_completely() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let node = proxy.node(&[fixtures::zoo()]).leasing().await;
    let texts = ["\r\n--boundary--\r\n", "a\r\n--boundary\r\nContent-Disposition: form-data; id=\"x\"\r\n\r\nb"];
    let list: Vec<Value> = (0..).zip(texts).map(|(n, text)| json!({ "path": n.to_string(), "text": text })).collect();
    let ended = puts(&test_server, &node, json!(list)).await;
    for (n, text) in (0..).zip(texts) {
        assert_eq!(test_server.artifact(ended.completed(), &format!("{n}")).await, text.as_bytes());
    }
    // No content can contain the boundary, because it is random for each upload.
    let kinds = proxy.headers("/api/", "content-type").into_iter().filter(|(call, _)| call.starts_with("POST "));
    let kinds: Vec<String> = kinds.filter_map(|(_, kind)| kind).collect();
    assert_eq!((kinds.len(), BTreeSet::from_iter(&kinds).len()), (3, 3), "{kinds:?}");
}

#[tokio::test]
async fn lost_answers_lose_or_duplicate_no_artifact() {
    let faults = |rules: &[(&str, &str)]| {
        let rule =
            |(endpoint, rest): &(&str, &str)| format!("[[fault]]\nendpoint = \"{endpoint}\"\ncount = 1\n{rest}\n");
        Faults::parse(&rules.iter().map(rule).collect::<String>()).expect("sound rules")
    };
    let test_server = small_parts().await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let list = json!([
        { "path": "small", "bytes": 1000 },
        { "path": "file", "file": "200000 bytes" },
        { "path": "stream", "stream": 200_000 },
    ]);
    let lost = "kind = \"lost_answer\"";
    let busy = "kind = \"status\"\ncode = 503";
    for rules in [
        [("create", lost), ("initiate", lost), ("complete_upload", lost)],
        [("part", lost), ("list", lost), ("create", busy)],
        [("part", busy), ("initiate", busy), ("complete_upload", busy)],
        [("part", "kind = \"reset\""), ("list", "kind = \"reset\""), ("complete_upload", "kind = \"reset\"")],
    ] {
        let before = test_server.stored().await;
        test_server.dev_server.set_faults(faults(&rules));
        let ended = puts(&test_server, &node, list.clone()).await;
        for (path, size) in [("small", 1000), ("file", 200_000), ("stream", 200_000)] {
            let back = test_server.artifact(ended.completed(), path).await;
            let same = back.iter().enumerate().all(|(n, byte)| usize::from(*byte) == n % 251);
            assert!(back.len() == size && same, "{path} under {rules:?}");
        }
        assert_eq!(test_server.stored().await - before, 4, "under {rules:?}");
    }
}

#[tokio::test]
async fn upload_of_a_cancelled_task_is_aborted() {
    let test_server = small_parts().await;
    let node =
        test_server.node(&[fixtures::zoo()]).set("DRAIN_TIMEOUT", "0").set("CANCEL_GRACE", "100ms").leasing().await;
    // The second part is never answered.
    let hang = "[[fault]]\nendpoint = \"part\"\nskip = 1\nkind = \"hang\"";
    test_server.dev_server.set_faults(Faults::parse(hang).expect("a sound rule"));
    test_server.task(PUTS).meta(json!({ "puts": [{ "path": "x", "file": "300000 bytes" }] })).submit();
    let part = |seen: &[JournalEntry]| seen.iter().any(|seen| seen.endpoint == Some("part") && seen.status == 200);
    test_server.seen(&node, part).await;
    assert_eq!(test_server.dev_server.open_uploads(), 1);
    node.term();
    node.wait().await;
    assert_eq!(test_server.dev_server.open_uploads(), 0, "{}", node.log());
}

#[tokio::test]
async fn cancel_during_upload_sends_only_one_abort() {
    const UPLOAD: &str = "/api/v1/domains/*/data/multipart";
    let (part, abort) = (format!("PUT {UPLOAD}"), format!("DELETE {UPLOAD}"));
    // Frequent heartbeats, so that the node learns of the cancel soon.
    let test_server = TestServer::with(|config| {
        config.request_max_bytes = 100_000;
        config.part_size = 64 * 1024;
        config.lease_ttl = Duration::from_secs(2);
    });
    let test_server = test_server.await;
    let proxy = FaultProxy::before(&test_server).await;
    // The upload must end before the grace period does.
    let node = proxy.node(&[fixtures::zoo()]).set("CANCEL_GRACE", "60s").leasing().await;
    let (gate, held) = Bad::gate();
    proxy.answer(&part, usize::MAX, held);
    let job = test_server.task(PUTS).meta(json!({ "puts": [{ "path": "x", "file": "600000 bytes" }] })).submit();
    proxy.seen(&part, 2).await;
    assert!(test_server.dev_server.cancel_job(job));
    proxy.seen(&abort, 1).await;
    gate.cancel();
    assert_eq!(node.says_ended("none").await["outcome"], "cancelled");
    assert_eq!((proxy.count(&part), proxy.count(&abort)), (2, 1));
    assert_eq!(test_server.ended(&node, job).await.status(), "canceled");
}

#[tokio::test]
async fn too_large_artifact_is_not_retryable() {
    let test_server = TestServer::with(|config| config.multipart = false).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let rule = "[[fault]]\nendpoint = \"create\"\nkind = \"status\"\ncode = 413";
    test_server.dev_server.set_faults(Faults::parse(rule).expect("a sound rule"));
    let ended = test_server.run(&node, "/fixtures/big-output/v1", json!({ "bytes": 1000 })).await;
    let (reason, details) = ended.failed();
    assert!(reason.contains("(413)"), "{reason}");
    assert_eq!((&details["outcome"], &details["retryable"]), (&json!("failed"), &json!(false)), "{details}");
}

#[tokio::test]
async fn stated_limits_are_checked_before_an_upload() {
    let test_server = TestServer::with(|config| config.domain_data_max_bytes = 100_000).await;
    let node = test_server.joined(&[fixtures::zoo()]).await;
    let list = json!([
        { "path": "file", "file": "100001 bytes" },
        { "path": "stream", "stream": 100_001 },
        { "path": "bytes", "bytes": 100_001 },
        { "path": "fits", "file": "100000 bytes" },
    ]);
    let ended = puts(&test_server, &node, list).await;
    let result = results(&test_server, ended.completed()).await;
    for (result, path) in result.iter().zip(["file", "stream", "bytes"]) {
        let text = format!("upload of {path} refused: the domain server stores at most 100000 bytes an item");
        assert_eq!((&result["kind"], &result["text"]), (&json!("Limit"), &json!(text)));
    }
    assert_eq!(test_server.artifact(&ended, "fits").await.len(), 100_000);
    let uploads = test_server
        .dev_server
        .journal()
        .into_iter()
        .filter(|seen| seen.method == "POST" && seen.path.ends_with("/data"));
    assert_eq!(uploads.count(), 2, "the one that fits, and the runner's own list");
}
