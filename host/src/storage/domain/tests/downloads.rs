//! Inputs as streams and as files, whole and broken; bearers and leases that change meanwhile.

use std::io;

use bytes::Bytes;
use futures_util::{StreamExt, stream};

use super::*;
use crate::model::{BootInstant, CancelReason};

const KIND: &str = "multipart/form-data; boundary=q7";

/// A body that sends `bytes` and then breaks, or goes silent.
fn unfinished(bytes: Vec<u8>, breaks: bool) -> Body {
    let first = stream::iter([Ok::<_, io::Error>(Bytes::from(bytes))]);
    // The server sends what it has before it hears of the end.
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
async fn an_input_is_read_as_a_stream_with_what_the_store_says_of_it() {
    let world = world().await;
    let bytes = noise(3 * MIB + 5);
    world.item("d-7", "scan a", "ply", bytes.clone());
    let mut stream = world.ports.open(" d-7 ").await.expect("opens");
    let meta = stream.meta().clone();
    assert_eq!((meta.data_id.as_deref(), meta.name.as_deref()), (Some("d-7"), Some("scan a")));
    assert_eq!((meta.data_type.as_deref(), meta.size), (Some("ply"), Some(bytes.len() as u64)));
    assert_eq!(meta.domain_id, Some(DOMAIN.to_string()));
    assert_eq!(drain(&mut stream).await.expect("reads"), bytes);
    assert!(stream.next().await.expect("stays at its end").is_none());
}

#[tokio::test]
async fn every_part_of_an_input_comes_to_disk_under_its_own_name() {
    let world = world().await;
    world.item("a", "dmt_2025-06-01_08-30-00", "dmt_manifest_json", "one");
    world.item("b", "dmt_2025-06-01_08-30-00", "dmt_manifest_json", "two");
    world.item("c", "../evil", "p;l", noise(MIB));
    world.item("d", "empty", "csv", "");
    let url = format!("{}api/v1/domains/{DOMAIN}/data?ids=a,b,c,d", world.url);
    let input = world.ports.materialize(&url).await.expect("comes");
    assert_eq!((input.meta.cid.as_str(), input.meta.data_id.as_deref()), (url.as_str(), Some("a")));
    assert!(input.root_dir.starts_with(world.dir.path()));
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
async fn an_input_of_no_bytes_is_an_empty_file_and_an_empty_stream() {
    let world = world().await;
    world.item("d", "nothing", "csv", "");
    let input = world.ports.materialize("d").await.expect("comes");
    assert_eq!(std::fs::metadata(input.path).expect("there").len(), 0);
    let mut stream = world.ports.open("d").await.expect("opens");
    assert_eq!(drain(&mut stream).await.expect("reads"), b"");
}

#[tokio::test]
async fn what_does_not_exist_is_not_found_by_name() {
    // All three ways of saying so.
    let world = world().await;
    refused(world.ports.materialize("gone").await, PortErrorKind::NotFound, "input gone refused: not found (404)");
    for body in ["--q7--\r\n", ""] {
        world.answer("download", 200, KIND, body);
        refused(world.ports.open("gone").await.map(|_| ()), PortErrorKind::NotFound, "gone");
    }
    world.item("here", "a", "b", "c");
    world.answer("download", 404, "application/json", "{}");
    refused(world.ports.open("here").await.map(|_| ()), PortErrorKind::NotFound, "(404)");
}

#[tokio::test]
async fn a_broken_answer_is_an_error_and_leaves_nothing_behind() {
    let world = world_with(|config| config.stall = Duration::from_secs(2)).await;
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
        world.answer("download", 200, kind, body);
        refused(world.ports.materialize("d").await, expected, "download of input d failed");
        let left = std::fs::read_dir(world.dir.path()).expect("listed").count();
        assert_eq!(left, 0, "case {n}");
    }
}

#[tokio::test]
async fn a_stream_that_breaks_keeps_failing() {
    let world = world().await;
    let whole = multipart("q7", &[("d".into(), Item { bytes: noise(5000), ..Item::default() })]);
    world.answer("download", 200, KIND, unfinished(whole[..2000].to_vec(), true));
    let mut stream = world.ports.open("d").await.expect("opens");
    refused(drain(&mut stream).await, PortErrorKind::Network, "broke off");
    refused(stream.next().await, PortErrorKind::Network, "broke off");
}

#[tokio::test]
async fn a_refused_bearer_is_waited_for_and_replaced_once() {
    let world = world_with(|config| config.token_wait = Duration::from_secs(60)).await;
    world.item("d", "n", "t", "body");
    world.server.store().tokens = vec!["t2".to_owned()];
    let (input, ()) = tokio::join!(world.ports.materialize("d"), async {
        world.until("download").await;
        world.keys.publish(|now| now.token = Some(Token::new("t2")));
    });
    input.expect("comes with the newer bearer");
    assert_eq!(world.count("download"), 2);
}

#[tokio::test]
async fn a_bearer_refused_twice_is_the_end() {
    let world = world().await;
    world.server.store().tokens.clear();
    refused(world.ports.materialize("d").await, PortErrorKind::Unauthorized, "unauthorized (401)");
    assert_eq!(world.count("download"), 2, "repeated once, not more");
}

#[tokio::test]
async fn an_error_text_never_holds_the_bearer() {
    let world = world().await;
    world.keys.publish(|now| now.token = Some(Token::new("very-secret")));
    let err = world.ports.materialize("d").await.expect_err("refused");
    assert_eq!(err.kind, PortErrorKind::Unauthorized);
    assert!(err.message.contains("is not accepted") && !err.message.contains("very-secret"), "{err}");
}

#[tokio::test]
async fn a_lease_whose_end_has_passed_is_lost_before_anyone_says_so() {
    let world = world().await;
    world.item("d", "n", "t", "bytes");
    world.keys.deadline().set(BootInstant::now());
    refused(world.ports.materialize("d").await, PortErrorKind::LeaseOver, "lease is lost");
    refused(world.put("x", b"y").await, PortErrorKind::LeaseOver, "lease is lost");
    assert_eq!(world.grant.cancel.reason(), Some(CancelReason::LeaseLost));
    assert!(world.log().is_empty(), "{:?}", world.log());
}

#[tokio::test]
async fn a_lost_lease_ends_a_running_transfer_and_forbids_new_ones() {
    let world = world().await;
    let whole = multipart("q7", &[("d".into(), Item { bytes: noise(5000), ..Item::default() })]);
    world.answer("download", 200, KIND, unfinished(whole[..2000].to_vec(), false));
    let mut stream = world.ports.open("d").await.expect("opens");
    assert!(stream.next().await.expect("the first piece").is_some());
    let grant = world.grant.clone();
    let (result, ()) = tokio::join!(stream.next(), async move { grant.cancel.cancel(CancelReason::LeaseLost) });
    refused(result, PortErrorKind::LeaseOver, "lease is lost");
    let before = world.log().len();
    refused(world.ports.materialize("d").await, PortErrorKind::LeaseOver, "lease is lost");
    refused(world.put("x", b"y").await, PortErrorKind::LeaseOver, "lease is lost");
    assert_eq!(world.log().len(), before, "no request is begun");
}

#[tokio::test]
async fn control_plane_cancel_forbids_new_transfers() {
    for (reason, forbids) in [(CancelReason::Plane, true), (CancelReason::Drained, false)] {
        let world = world().await;
        world.item("d", "n", "t", "body");
        world.grant.cancel.cancel(reason);
        let input = world.ports.materialize("d").await;
        assert_eq!((input.is_err(), world.log().is_empty()), (forbids, forbids), "{reason:?}");
        if let Err(err) = input {
            refused::<()>(Err(err), PortErrorKind::LeaseOver, "the control plane cancelled the task");
        }
    }
}

#[tokio::test]
async fn download_of_wrong_type_is_retried() {
    let world = world_with(|config| config.patience = Duration::from_secs(30)).await;
    world.item("d", "n", "t", "body");
    world.answer("download", 200, "text/html", "<html>sign in</html>");
    let input = world.ports.materialize("d").await.expect("the second answer is the input");
    assert_eq!(std::fs::read(input.path).expect("there"), b"body");
    assert_eq!(world.count("download"), 2);
}

#[tokio::test]
async fn after_close_every_call_says_that_the_task_is_over() {
    let world = world().await;
    world.item("d", "n", "t", "body");
    let mut stream = world.ports.open("d").await.expect("opens");
    world.ports.close().await;
    refused(stream.next().await, PortErrorKind::LeaseOver, "task is over");
    refused(world.ports.open("d").await.map(|_| ()), PortErrorKind::LeaseOver, "task is over");
    refused(world.ports.create(spec("x")).await.map(|_| ()), PortErrorKind::LeaseOver, "task is over");
}

#[tokio::test]
async fn archives_are_unpacked_for_a_task_that_goes_on_only() {
    use std::io::Write as _;
    let world = world().await;
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    writer.start_file("a/b.csv", zip::write::SimpleFileOptions::default()).expect("written");
    writer.write_all(b"1,2").expect("written");
    let bytes = writer.finish().expect("written").into_inner();
    for id in ["d", "e"] {
        world.item(id, "refined_scan_2025-06-01_08-30-00", "refined_scan_zip", &*bytes);
    }
    world.item("f", "clouds", "my_zip", &*bytes);
    let url = format!("{}api/v1/domains/{DOMAIN}/data?ids=d,e,f", world.url);
    let input = world.ports.materialize(&url).await.expect("comes");
    let below = |path: &std::path::PathBuf| {
        assert_eq!(std::fs::read(path).expect("there"), b"1,2");
        path.strip_prefix(&input.root_dir).expect("below the root").display().to_string()
    };
    let extracted: Vec<String> = input.extracted_paths.iter().map(below).collect();
    let scan = "refined/local/2025-06-01_08-30-00";
    // Two archives of one scan do not meet.
    assert_eq!(extracted[0], format!("{scan}/sfm/a/b.csv"));
    assert_eq!(extracted[1..], [format!("{scan}_2/sfm/a/b.csv"), "unpacked/clouds/a/b.csv".to_owned()]);
    std::fs::remove_dir_all(&input.root_dir).expect("removed");

    world.grant.cancel.cancel(CancelReason::Drained);
    refused(world.ports.materialize("d").await, PortErrorKind::LeaseOver, "not unpacked: the task is cancelled");
    assert_eq!(std::fs::read_dir(world.dir.path()).expect("listed").count(), 0);
}
