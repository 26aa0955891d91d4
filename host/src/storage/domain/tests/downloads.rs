//! Inputs as streams and as files, broken answers, and bearers and leases that change meanwhile.

use std::io;

use bytes::Bytes;
use futures_util::{StreamExt, stream};

use super::*;
use crate::model::{BootInstant, CancelReason};

const KIND: &str = "multipart/form-data; boundary=q7";

/// A body that sends `bytes` and then breaks off, or sends nothing more.
fn unfinished(bytes: Vec<u8>, breaks: bool) -> Body {
    let first = stream::iter([Ok::<_, io::Error>(Bytes::from(bytes))]);
    // The server sends these bytes before it sees the end.
    let cut = stream::once(async {
        tokio::task::yield_now().await;
        Err(io::Error::other("cut"))
    });
    match breaks {
        true => Body::from_stream(first.chain(cut)),
        false => Body::from_stream(first.chain(stream::pending())),
    }
}

#[tokio::test]
async fn input_streams_have_the_metadata_of_the_store() {
    let fixture = fixture().await;
    let bytes = noise(3 * MIB + 5);
    fixture.item("d-7", "scan a", "ply", bytes.clone());
    let mut stream = fixture.ports.open(" d-7 ").await.expect("opens");
    let meta = stream.meta().clone();
    assert_eq!((meta.data_id.as_deref(), meta.name.as_deref()), (Some("d-7"), Some("scan a")));
    assert_eq!((meta.data_type.as_deref(), meta.size), (Some("ply"), Some(bytes.len() as u64)));
    assert_eq!(meta.domain_id, Some(DOMAIN.to_string()));
    assert_eq!(drain(&mut stream).await.expect("reads"), bytes);
    assert!(stream.next().await.expect("every later call returns the end").is_none());
}

#[tokio::test]
async fn each_input_part_gets_its_own_file() {
    let fixture = fixture().await;
    fixture.item("a", "dmt_2025-06-01_08-30-00", "dmt_manifest_json", "one");
    fixture.item("b", "dmt_2025-06-01_08-30-00", "dmt_manifest_json", "two");
    fixture.item("c", "../evil", "p;l", noise(MIB));
    fixture.item("d", "empty", "csv", "");
    let url = format!("{}api/v1/domains/{DOMAIN}/data?ids=a,b,c,d", fixture.url);
    let input = fixture.ports.materialize(&url).await.expect("comes");
    assert_eq!((input.meta.cid.as_str(), input.meta.data_id.as_deref()), (url.as_str(), Some("a")));
    assert!(input.root_dir.starts_with(fixture.dir.path()));
    let below = |path: &std::path::Path| {
        path.strip_prefix(input.root_dir.join("datasets")).expect("below the root").display().to_string()
    };
    assert_eq!(below(&input.path), "2025-06-01_08-30-00/dmt_2025-06-01_08-30-00.dmt_manifest_json");
    let related: Vec<String> = input.related_files.iter().map(|path| below(path)).collect();
    assert_eq!(
        related,
        ["2025-06-01_08-30-00/dmt_2025-06-01_08-30-00_2.dmt_manifest_json", "___evil/___evil.p_l", "empty/empty.csv",]
    );
    let read = |path: &std::path::Path| std::fs::read(path).expect("there");
    assert_eq!((read(&input.path), read(&input.related_files[0])), (b"one".to_vec(), b"two".to_vec()));
    assert_eq!(read(&input.related_files[1]), noise(MIB));
    assert_eq!(read(&input.related_files[2]), b"");
}

#[tokio::test]
async fn empty_inputs_are_empty_files_and_streams() {
    let fixture = fixture().await;
    fixture.item("d", "nothing", "csv", "");
    let input = fixture.ports.materialize("d").await.expect("comes");
    assert_eq!(std::fs::metadata(input.path).expect("there").len(), 0);
    let mut stream = fixture.ports.open("d").await.expect("opens");
    assert_eq!(drain(&mut stream).await.expect("reads"), b"");
}

#[tokio::test]
async fn missing_inputs_are_not_found() {
    // The three answers for missing data.
    let fixture = fixture().await;
    refused(
        fixture.ports.materialize("missing").await,
        PortErrorKind::NotFound,
        "input missing refused: not found (404)",
    );
    for body in ["--q7--\r\n", ""] {
        fixture.answer("download", 200, KIND, body);
        refused(fixture.ports.open("missing").await.map(|_| ()), PortErrorKind::NotFound, "missing");
    }
    fixture.item("here", "a", "b", "c");
    fixture.answer("download", 404, "application/json", "{}");
    refused(fixture.ports.open("here").await.map(|_| ()), PortErrorKind::NotFound, "(404)");
}

#[tokio::test]
async fn broken_answers_are_errors_and_leave_no_files() {
    let fixture = fixture_with(|config| config.stall = Duration::from_secs(2)).await;
    let whole = multipart(
        "q7",
        &[("d".into(), Item { name: "n".into(), data_type: "t".into(), bytes: noise(5000), version: 0 })],
    );
    let longer = String::from_utf8_lossy(&multipart("q7", &[]))
        .replace("--q7--", "--q7\r\nContent-Disposition: f; size=1\r\n\r\nab\r\n--q7--");
    let cases: Vec<(&'static str, Body, PortErrorKind)> = vec![
        ("text/html", "<html>welcome</html>".into(), PortErrorKind::Malformed),
        ("application/json", "{\"data\":[]}".into(), PortErrorKind::Malformed),
        (KIND, "<html>welcome</html>".into(), PortErrorKind::Malformed),
        (KIND, longer.into(), PortErrorKind::Malformed),
        (KIND, format!("--q7\r\nX: {}", "y".repeat(20_000)).into(), PortErrorKind::Malformed),
        (KIND, whole[..2000].to_vec().into(), PortErrorKind::Network),
        (KIND, whole[..whole.len() - 12].to_vec().into(), PortErrorKind::Network),
        (KIND, unfinished(whole[..2000].to_vec(), true), PortErrorKind::Network),
        (KIND, unfinished(whole[..2000].to_vec(), false), PortErrorKind::Network),
    ];
    for (n, (kind, body, expected)) in cases.into_iter().enumerate() {
        fixture.answer("download", 200, kind, body);
        refused(fixture.ports.materialize("d").await, expected, "download of input d failed");
        let left = std::fs::read_dir(fixture.dir.path()).expect("listed").count();
        assert_eq!(left, 0, "case {n}");
    }
}

#[tokio::test]
async fn broken_streams_keep_failing() {
    let fixture = fixture().await;
    let whole = multipart("q7", &[("d".into(), Item { bytes: noise(5000), ..Item::default() })]);
    fixture.answer("download", 200, KIND, unfinished(whole[..2000].to_vec(), true));
    let mut stream = fixture.ports.open("d").await.expect("opens");
    refused(drain(&mut stream).await, PortErrorKind::Network, "broke off");
    refused(stream.next().await, PortErrorKind::Network, "broke off");
}

#[tokio::test]
async fn refused_bearer_is_replaced_once() {
    let fixture = fixture_with(|config| config.token_wait = Duration::from_secs(60)).await;
    fixture.item("d", "n", "t", "body");
    fixture.server.store().tokens = vec!["t2".to_owned()];
    let (input, ()) = tokio::join!(fixture.ports.materialize("d"), async {
        fixture.until("download").await;
        fixture.writer.publish(|now| now.token = Some(Token::new("t2")));
    });
    input.expect("sent with the newer bearer");
    assert_eq!(fixture.count("download"), 2);
}

#[tokio::test]
async fn second_refusal_of_the_bearer_is_final() {
    let fixture = fixture().await;
    fixture.server.store().tokens.clear();
    refused(fixture.ports.materialize("d").await, PortErrorKind::Unauthorized, "unauthorized (401)");
    assert_eq!(fixture.count("download"), 2, "repeated once, not more");
}

#[tokio::test]
async fn error_texts_never_contain_the_bearer() {
    let fixture = fixture().await;
    fixture.writer.publish(|now| now.token = Some(Token::new("very-secret")));
    let err = fixture.ports.materialize("d").await.expect_err("refused");
    assert_eq!(err.kind, PortErrorKind::Unauthorized);
    assert!(err.message.contains("is not accepted") && !err.message.contains("very-secret"), "{err}");
}

#[tokio::test]
async fn expired_lease_is_lost_without_a_notice() {
    let fixture = fixture().await;
    fixture.item("d", "n", "t", "bytes");
    fixture.writer.deadline().set(BootInstant::now());
    refused(fixture.ports.materialize("d").await, PortErrorKind::LeaseOver, "lease is lost");
    refused(fixture.put("x", b"y").await, PortErrorKind::LeaseOver, "lease is lost");
    assert_eq!(fixture.held.cancel.reason(), Some(CancelReason::LeaseLost));
    assert!(fixture.log().is_empty(), "{:?}", fixture.log());
}

#[tokio::test]
async fn lost_lease_ends_transfers_and_forbids_new_ones() {
    let fixture = fixture().await;
    let whole = multipart("q7", &[("d".into(), Item { bytes: noise(5000), ..Item::default() })]);
    fixture.answer("download", 200, KIND, unfinished(whole[..2000].to_vec(), false));
    let mut stream = fixture.ports.open("d").await.expect("opens");
    assert!(stream.next().await.expect("the first piece").is_some());
    let held = fixture.held.clone();
    let (result, ()) = tokio::join!(stream.next(), async move { held.cancel.cancel(CancelReason::LeaseLost) });
    refused(result, PortErrorKind::LeaseOver, "lease is lost");
    let before = fixture.log().len();
    refused(fixture.ports.materialize("d").await, PortErrorKind::LeaseOver, "lease is lost");
    refused(fixture.put("x", b"y").await, PortErrorKind::LeaseOver, "lease is lost");
    assert_eq!(fixture.log().len(), before, "no request is sent");
}

#[tokio::test]
async fn control_plane_cancel_forbids_new_transfers() {
    for (reason, forbids) in [(CancelReason::Plane, true), (CancelReason::Drained, false)] {
        let fixture = fixture().await;
        fixture.item("d", "n", "t", "body");
        fixture.held.cancel.cancel(reason);
        let input = fixture.ports.materialize("d").await;
        assert_eq!((input.is_err(), fixture.log().is_empty()), (forbids, forbids), "{reason:?}");
        if let Err(err) = input {
            refused::<()>(Err(err), PortErrorKind::LeaseOver, "the control plane cancelled the task");
        }
    }
}

#[tokio::test]
async fn download_of_wrong_type_is_retried() {
    let fixture = fixture_with(|config| config.retry_limit = Duration::from_secs(30)).await;
    fixture.item("d", "n", "t", "body");
    fixture.answer("download", 200, "text/html", "<html>sign in</html>");
    let input = fixture.ports.materialize("d").await.expect("the second answer is the input");
    assert_eq!(std::fs::read(input.path).expect("there"), b"body");
    assert_eq!(fixture.count("download"), 2);
}

#[tokio::test]
async fn calls_after_close_fail_as_over() {
    let fixture = fixture().await;
    fixture.item("d", "n", "t", "body");
    let mut stream = fixture.ports.open("d").await.expect("opens");
    fixture.ports.close().await;
    refused(stream.next().await, PortErrorKind::LeaseOver, "task is over");
    refused(fixture.ports.open("d").await.map(|_| ()), PortErrorKind::LeaseOver, "task is over");
    refused(fixture.ports.create(spec("x")).await.map(|_| ()), PortErrorKind::LeaseOver, "task is over");
}

#[tokio::test]
async fn archives_are_unpacked_for_running_tasks_only() {
    use std::io::Write as _;
    let fixture = fixture().await;
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    writer.start_file("a/b.csv", zip::write::SimpleFileOptions::default()).expect("written");
    writer.write_all(b"1,2").expect("written");
    let bytes = writer.finish().expect("written").into_inner();
    for id in ["d", "e"] {
        fixture.item(id, "refined_scan_2025-06-01_08-30-00", "refined_scan_zip", &*bytes);
    }
    fixture.item("f", "clouds", "my_zip", &*bytes);
    let url = format!("{}api/v1/domains/{DOMAIN}/data?ids=d,e,f", fixture.url);
    let input = fixture.ports.materialize(&url).await.expect("comes");
    let below = |path: &std::path::PathBuf| {
        assert_eq!(std::fs::read(path).expect("there"), b"1,2");
        path.strip_prefix(&input.root_dir).expect("below the root").display().to_string()
    };
    let extracted: Vec<String> = input.extracted_paths.iter().map(below).collect();
    let scan = "refined/local/2025-06-01_08-30-00";
    // Two archives of one scan have separate folders.
    assert_eq!(extracted[0], format!("{scan}/sfm/a/b.csv"));
    assert_eq!(extracted[1..], [format!("{scan}_2/sfm/a/b.csv"), "unpacked/clouds/a/b.csv".to_owned()]);
    std::fs::remove_dir_all(&input.root_dir).expect("removed");

    fixture.held.cancel.cancel(CancelReason::Drained);
    refused(fixture.ports.materialize("d").await, PortErrorKind::LeaseOver, "not unpacked: the task is cancelled");
    assert_eq!(std::fs::read_dir(fixture.dir.path()).expect("listed").count(), 0);
}
