//! Files as artifacts: names, one request or parts, failures on the way.

use std::sync::{Arc, LazyLock};

use super::*;
use crate::model::CancelReason;

#[tokio::test]
async fn small_file_is_sent_in_one_request() {
    let fixture = fixture().await;
    let payload = b"--boundary\r\n\r\n--boundary--\r\n".to_vec();
    let id = fixture.put("/x/y.PLY", &payload).await.expect("stored");
    assert_eq!(id.as_deref(), Some("d-2"));
    let name = format!("out_x_y_PLY_{TASK}");
    assert_eq!(fixture.stored("d-2"), Item { name: name.clone(), data_type: "ply".into(), bytes: payload, version: 0 });
    assert_eq!(fixture.put("x//y.PLY", b"again").await.expect("stored"), id, "the same path is updated");
    assert_eq!(fixture.stored("d-2").bytes, b"again");
    assert_eq!(fixture.log(), ["list", "info", "create", "update"], "limits and the id are remembered");
    let published = fixture.ports.published();
    assert_eq!(published.len(), 1);
    assert_eq!((published[0].logical_path.as_str(), published[0].name.as_str()), ("out/x/y.PLY", name.as_str()));
    assert_eq!((published[0].data_type.as_str(), published[0].id.clone()), ("ply", id));
}

#[tokio::test]
async fn artifact_of_an_earlier_attempt_is_updated() {
    // Only equal names and types count. The test server matches partially.
    let fixture = fixture().await;
    fixture.item("d-0", &format!("out_x_json_{TASK}_more"), "json", "a");
    fixture.item("d-1", &format!("out_x_json_{TASK}"), "json", "old");
    assert_eq!(fixture.put("x.json", b"new").await.expect("stored").as_deref(), Some("d-1"));
    assert_eq!((fixture.stored("d-0").bytes, fixture.stored("d-1").bytes), (b"a".to_vec(), b"new".to_vec()));
}

#[tokio::test]
async fn explicit_names_reach_the_store_unchanged() {
    let fixture = fixture().await;
    fixture.item("d-9", "somebody", "else", "x");
    let explicit = |id: Option<&str>| ArtifactSpec {
        path: "logs/é.txt".into(),
        name: Some("refined é, scan 1".into()),
        data_type: Some("refined_scan_zip".into()),
        existing_id: id.map(str::to_owned),
        size: None,
    };
    let file = fixture.file(b"zip");
    let id = fixture.ports.put_file(explicit(None), &file).await.expect("stored").expect("an id");
    let item = fixture.stored(&id);
    assert_eq!((item.name.as_str(), item.data_type.as_str()), ("refined é, scan 1", "refined_scan_zip"));
    let id = fixture.ports.put_file(explicit(Some("d-9")), &file).await.expect("stored");
    assert_eq!((id.as_deref(), fixture.stored("d-9").bytes), (Some("d-9"), b"zip".to_vec()));
    assert_eq!(fixture.ports.published()[0].logical_path, "out/logs/é.txt");
}

#[tokio::test]
async fn large_file_is_sent_and_updated_in_parts() {
    let fixture = fixture().await;
    let bytes = noise(5 * MIB + 1);
    let id = fixture.put("big.ply", &bytes).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    assert_eq!((fixture.count("initiate"), fixture.count("part"), fixture.count("complete")), (1, 6, 1));
    assert_eq!((fixture.count("abort"), fixture.count("create"), fixture.count("info")), (0, 0, 1));
    let bytes = noise(5 * MIB);
    assert_eq!(fixture.put("big.ply", &bytes).await.expect("stored").expect("an id"), id);
    assert!(fixture.stored(&id).bytes == bytes);
    assert_eq!(fixture.count("part"), 11, "no empty part at the end");
}

#[tokio::test]
async fn request_limit_of_a_server_is_obeyed() {
    let fixture = fixture().await;
    fixture.server.store().info = json!({"upload": {"request_max_bytes": 2000, "multipart": {"enabled": true}}});
    fixture.put("x", &noise(2000)).await.expect("stored");
    fixture.put("y", &noise(100)).await.expect("stored");
    assert_eq!((fixture.count("complete"), fixture.count("create"), fixture.count("info")), (1, 1, 1));
}

/// A fixture whose server states no limits.
async fn without_stated_limits() -> Fixture {
    let fixture = fixture().await;
    fixture.answer("info", 404, "text/plain", "");
    fixture
}

#[tokio::test]
async fn files_try_parts_first_if_limits_are_unknown() {
    // posemesh.md section 6.8: files need no /info for that.
    let fixture = without_stated_limits().await;
    fixture.server.store().part_size = 50_000;
    let bytes = noise(70_000);
    let id = fixture.put("x.bin", &bytes).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    fixture.put("small.bin", &noise(60_000)).await.expect("stored");
    fixture.answer("initiate", 404, "text/plain", "no");
    fixture.put("old.bin", &bytes).await.expect("stored");
    assert_eq!(
        fixture.log(),
        ["list", "info", "initiate", "part", "part", "complete", "list", "create", "list", "initiate", "create"]
    );
}

#[tokio::test]
async fn upload_after_413_is_sent_in_parts() {
    let fixture = without_stated_limits().await;
    let bytes = noise(1000);
    fixture.server.store().part_size = 600;
    for fault in ["create", "create", "update"] {
        fixture.answer(fault, 413, "text/plain", "too much");
    }
    let id = fixture.put("x.bin", &bytes).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    let in_parts = ["create", "initiate", "part", "part", "complete"];
    assert_eq!(fixture.log()[2..], in_parts, "a file");
    let mut stream = fixture.ports.create(spec("y.bin")).await.expect("opens");
    stream.write(bytes.clone().into()).await.expect("taken");
    let streamed = stream.finish().await.expect("stored").expect("an id");
    assert!(fixture.stored(&streamed).bytes == bytes);
    assert_eq!(fixture.log()[8..], in_parts, "bytes and streams");
    assert_eq!(fixture.put("x.bin", &noise(1200)).await.expect("stored"), Some(id.clone()), "an update too");
    assert!(fixture.stored(&id).bytes == noise(1200));
    assert_eq!((fixture.count("abort"), fixture.server.store().items.len()), (0, 2));
}

#[tokio::test]
async fn too_large_artifact_is_refused() {
    let fixture = without_stated_limits().await;
    for bytes in [noise(1000), noise(70_000)] {
        fixture.answer("initiate", 405, "text/plain", "no");
        fixture.answer("create", 413, "text/plain", "too much");
        refused(fixture.put("x.bin", &bytes).await, PortErrorKind::Limit, "unexpected status (413): too much");
    }
    assert_eq!(fixture.count("initiate"), 2, "limits are requested once per server");
    // Zero bytes cannot be split.
    fixture.answer("create", 413, "text/plain", "too much");
    let stream = fixture.ports.create(spec("y.bin")).await.expect("opens");
    refused(stream.finish().await, PortErrorKind::Limit, "unexpected status (413)");
    assert_eq!(fixture.count("initiate"), 2);
}

#[tokio::test]
async fn without_parts_a_large_file_is_one_request() {
    let fixture = fixture().await;
    let bytes = noise(5 * MIB);
    for (n, status) in [404, 405, 501].into_iter().enumerate() {
        fixture.answer("initiate", status, "text/plain", "no");
        let id = fixture.put(&format!("{n}.ply"), &bytes).await.expect("stored").expect("an id");
        assert!(fixture.stored(&id).bytes == bytes);
    }
    assert_eq!((fixture.count("create"), fixture.count("abort")), (3, 0));
    fixture.answer("initiate", 403, "text/plain", "no");
    refused(fixture.put("x", &bytes).await, PortErrorKind::Other, "unexpected status (403)");
}

#[tokio::test]
async fn next_part_uses_token_renewed_between_parts() {
    // With one part at a time, the old bearer is refused from the third on.
    let fixture = fixture_with(|config| config.parallel_parts = 1).await;
    let (server, writer) = (fixture.server.clone(), Arc::clone(&fixture.writer));
    for _ in 0..2 {
        fixture.fault("part", Fault::First(Box::new(|| {})));
    }
    fixture.fault(
        "part",
        Fault::First(Box::new(move || {
            server.store().tokens = vec!["t2".to_owned()];
            writer.publish(|now| now.token = Some(Token::new("t2")));
        })),
    );
    let bytes = noise(6 * MIB);
    let id = fixture.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    assert_eq!(fixture.count("part"), 7, "the part in flight was refused with the old bearer and repeated");
}

#[tokio::test]
async fn refused_part_is_not_sent_again() {
    let fixture = fixture_with(|config| config.parallel_parts = 1).await;
    let bytes = noise(5 * MIB);
    fixture.answer("part", 409, "text/plain", "taken");
    refused(fixture.put("z.ply", &bytes).await, PortErrorKind::Conflict, "conflict (409): taken");
    assert_eq!((fixture.count("part"), fixture.count("abort")), (1, 1));
}

/// An answer to a part that is too large to keep for ten thousand parts.
static LONG_ETAG: LazyLock<String> = LazyLock::new(|| json!({ "etag": "e".repeat(1025) }).to_string());

#[tokio::test]
async fn every_failure_after_initiate_aborts_once() {
    let fixture = fixture().await;
    let bytes = noise(5 * MIB);
    let json = "application/json";
    let cases: [(&'static str, u16, &'static str, PortErrorKind); 11] = [
        ("complete", 400, "x", PortErrorKind::BadRequest),
        ("complete", 200, "<html>", PortErrorKind::Malformed),
        ("complete", 200, "", PortErrorKind::Malformed),
        ("part", 200, "{}", PortErrorKind::Malformed),
        ("initiate", 200, r#"{"upload_id":"u","part_size":0}"#, PortErrorKind::Malformed),
        ("initiate", 200, r#"{"upload_id":"u","part_size":-1}"#, PortErrorKind::Malformed),
        ("initiate", 200, r#"{"upload_id":"u","part_size":"many"}"#, PortErrorKind::Malformed),
        ("initiate", 200, r#"{"upload_id":"u","part_size":1e6}"#, PortErrorKind::Malformed),
        ("initiate", 200, r#"{"upload_id":"u","part_size":1}"#, PortErrorKind::Malformed),
        ("initiate", 200, r#"{"upload_id":"u"}"#, PortErrorKind::Malformed),
        ("part", 200, &LONG_ETAG, PortErrorKind::Malformed),
    ];
    for (n, (at, status, body, kind)) in cases.into_iter().enumerate() {
        fixture.answer(at, status, json, body);
        refused(fixture.put("x.ply", &bytes).await, kind, "upload of out/x.ply");
        assert_eq!(fixture.count("abort"), n + 1, "{at} {status} {body}");
    }
    fixture.answer("complete", 200, json, r#"{"id":"d-1","size":5}"#);
    refused(fixture.put("x.ply", &bytes).await, PortErrorKind::Malformed, "the server stored 5");
    assert!(fixture.ports.published().is_empty());
}

#[tokio::test]
async fn dropped_upload_is_aborted() {
    let fixture = fixture().await;
    fixture.fault("part", Fault::Hang);
    let bytes = noise(5 * MIB);
    tokio::select! {
        result = fixture.put("x.ply", &bytes) => panic!("the call did not wait: {result:?}"),
        () = fixture.until("part") => {}
    }
    fixture.ports.close().await;
    assert_eq!((fixture.count("abort"), fixture.server.store().uploads.len()), (1, 0));
}

#[tokio::test]
async fn close_aborts_uploads_in_transfer() {
    let fixture = fixture_with(|config| config.stall = Duration::from_secs(60)).await;
    for _ in 0..2 {
        fixture.fault("part", Fault::Hang);
    }
    let bytes = noise(5 * MIB);
    let (result, ()) = tokio::join!(fixture.put("x.ply", &bytes), async {
        fixture.until("part").await;
        fixture.ports.close().await;
        assert_eq!(fixture.count("abort"), 1, "aborted by the time close returns");
    });
    refused(result, PortErrorKind::LeaseOver, "task is over");
}

#[tokio::test]
async fn control_plane_cancel_sends_only_one_abort() {
    // The server revokes the token together with the task.
    let fixture = fixture_with(|config| config.token_wait = Duration::from_secs(60)).await;
    for _ in 0..2 {
        fixture.fault("part", Fault::Hang);
    }
    let bytes = noise(5 * MIB);
    let (result, ()) = tokio::join!(fixture.put("x.ply", &bytes), async {
        fixture.until("part").await;
        fixture.server.store().tokens.clear();
        fixture.held.cancel.cancel(CancelReason::Plane);
    });
    refused(result, PortErrorKind::LeaseOver, "the control plane cancelled the task");
    fixture.until("abort").await;
    fixture.ports.close().await;
    assert!(fixture.count("part") <= 2, "{:?}", fixture.log());
    assert_eq!(fixture.count("abort"), 1, "{:?}", fixture.log());
}

#[tokio::test]
async fn lost_lease_stops_upload_without_abort() {
    let fixture = fixture_with(|config| config.stall = Duration::from_secs(60)).await;
    for _ in 0..2 {
        fixture.fault("part", Fault::Hang);
    }
    let bytes = noise(5 * MIB);
    let (result, before) = tokio::join!(fixture.put("x.ply", &bytes), async {
        fixture.until("part").await;
        fixture.held.cancel.cancel(CancelReason::LeaseLost);
        fixture.log().len()
    });
    refused(result, PortErrorKind::LeaseOver, "lease is lost");
    fixture.ports.close().await;
    assert!(fixture.log().len() <= before + 1, "at most the second part was already in flight");
    assert_eq!(fixture.count("abort"), 0);
}

#[tokio::test]
async fn token_rejected_before_body_is_read_is_replaced() {
    // The refusal itself may be lost when the server closes on a body it does not want.
    let fixture = fixture().await;
    let (server, writer) = (fixture.server.clone(), Arc::clone(&fixture.writer));
    fixture.fault(
        "create",
        Fault::Unread(Box::new(move || {
            server.store().tokens = vec!["t2".to_owned()];
            writer.publish(|now| now.token = Some(Token::new("t2")));
            reply(401, "text/plain", "old")
        })),
    );
    let bytes = noise(4 * MIB);
    let id = fixture.put("x", &bytes).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    assert_eq!(fixture.count("create"), 2);
}
