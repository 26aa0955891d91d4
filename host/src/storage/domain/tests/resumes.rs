//! Broken downloads resume where they stopped, and never deliver a byte of other data.

use std::io;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sha2::{Digest, Sha256};

use super::*;

const KIND: &str = "multipart/form-data; boundary=q7";

/// A body that sends `bytes` and then breaks.
fn cut(bytes: Vec<u8>) -> Body {
    let first = stream::iter([Ok::<_, io::Error>(Bytes::from(bytes))]);
    // The server sends these bytes before it sees the end.
    let end = stream::once(async {
        tokio::task::yield_now().await;
        Err(io::Error::other("cut"))
    });
    Body::from_stream(first.chain(end))
}

/// A fixture whose ports repeat failed requests, with one item `d`.
async fn retrying(bytes: &[u8]) -> Fixture {
    let fixture = fixture_with(|config| config.retry_limit = Duration::from_secs(20)).await;
    fixture.item("d", "n", "t", bytes);
    fixture
}

/// The complete answer for these items.
fn whole(fixture: &Fixture, ids: &[&str]) -> Vec<u8> {
    let items: Vec<(String, Item)> = ids.iter().map(|id| ((*id).to_owned(), fixture.stored(id))).collect();
    multipart("q7", &items)
}

/// The download breaks after this many bytes of the body of its first part.
fn breaks_after(fixture: &Fixture, ids: &[&str], bytes: usize) {
    let whole = whole(fixture, ids);
    let head = whole.windows(4).position(|window| window == b"\r\n\r\n").expect("a head") + 4;
    fixture.answer("download", 200, KIND, cut(whole[..head + bytes].to_vec()));
}

fn sha256(bytes: &[u8]) -> String {
    crate::storage::digest::hex(&Sha256::digest(bytes))
}

/// Reads `d` as a stream and as a file. `faults` prepares the server before each.
async fn comes_whole(fixture: &Fixture, bytes: &[u8], faults: impl Fn(&Fixture), requests: &[&str]) {
    for file in [false, true] {
        fixture.server.store().log.clear();
        faults(fixture);
        let read = if file {
            std::fs::read(fixture.ports.materialize("d").await.expect("comes").path).expect("there")
        } else {
            drain(&mut fixture.ports.open("d").await.expect("opens")).await.expect("reads")
        };
        assert!(read == bytes, "file: {file}");
        assert_eq!(fixture.log(), requests, "file: {file}");
    }
    let fetched = fixture.ports.fetched();
    let [input] = &*fetched else { panic!("listed once: {fetched:?}") };
    assert_eq!((input.cid.as_str(), input.name.as_deref(), input.size), ("d", Some("n"), bytes.len() as u64));
    assert_eq!(input.sha256, sha256(bytes));
}

#[tokio::test]
async fn broken_download_resumes_at_its_byte() {
    let bytes = noise(700_000);
    let fixture = retrying(&bytes).await;
    comes_whole(
        &fixture,
        &bytes,
        |fixture| breaks_after(fixture, &["d"], 400_000),
        &["download", "raw from 400000", "meta"],
    )
    .await;
}

#[tokio::test]
async fn broken_rest_is_resumed_by_entity_tag() {
    let bytes = noise(700_000);
    let fixture = retrying(&bytes).await;
    let faults = |fixture: &Fixture| {
        breaks_after(fixture, &["d"], 100_000);
        let answer = Response::builder()
            .status(206)
            .header(header::ETAG, "\"d-0\"")
            .header(header::CONTENT_RANGE, "bytes 100000-699999/700000")
            .body(cut(noise(700_000)[100_000..300_000].to_vec()));
        fixture.fault("raw", Fault::Answer(answer.expect("a response")));
    };
    let requests = ["download", "raw from 100000", "meta", "raw from 300000"];
    comes_whole(&fixture, &bytes, faults, &requests).await;
}

#[tokio::test]
async fn restarted_download_delivers_no_byte_twice() {
    let bytes = noise(700_000);
    for (raw, requests) in [
        (Raw { served: true, ranges: false, etags: true }, &["download", "raw from 400000"][..]),
        (Raw { served: false, ranges: false, etags: false }, &["download", "raw from 400000", "download"]),
    ] {
        let fixture = retrying(&bytes).await;
        fixture.server.store().raw = raw;
        comes_whole(&fixture, &bytes, |fixture| breaks_after(fixture, &["d"], 400_000), requests).await;
    }
}

#[tokio::test]
async fn changed_data_is_never_mixed() {
    for (ranges, etags) in [(true, true), (true, false), (false, true)] {
        let fixture = retrying(&noise(700_000)).await;
        fixture.server.store().raw = Raw { served: true, ranges, etags };
        for file in [false, true] {
            breaks_after(&fixture, &["d"], 400_000);
            let server = fixture.server.clone();
            let change = move || {
                let mut store = server.store();
                let item = store.items.get_mut("d").expect("there");
                item.bytes.iter_mut().for_each(|byte| *byte ^= 1);
                item.version += 1;
            };
            fixture.fault("raw", Fault::First(Box::new(change)));
            let result = match file {
                true => fixture.ports.materialize("d").await.map(|_| ()),
                false => drain(&mut fixture.ports.open("d").await.expect("opens")).await.map(|_| ()),
            };
            refused(result, PortErrorKind::Network, "changed on the server");
        }
        assert!(fixture.ports.fetched().is_empty(), "a partial input is not listed");
        assert_eq!(std::fs::read_dir(fixture.dir.path()).expect("listed").count(), 0);
    }
}

#[tokio::test]
async fn unreachable_server_is_asked_again() {
    let fixture = retrying(b"body").await;
    let faults = |fixture: &Fixture| {
        for status in [503, 500, 429, 408] {
            fixture.answer("download", status, "text/plain", "later");
        }
        fixture.fault("download", Fault::Unread(Box::new(|| reply(200, KIND, cut(Vec::new())))));
    };
    comes_whole(&fixture, b"body", faults, &["download"; 6]).await;
}

#[tokio::test]
async fn download_retry_waits_for_requested_pause() {
    let fixture = retrying(b"body").await;
    let later = Response::builder().status(503).header(header::RETRY_AFTER, "1").body(Body::empty());
    fixture.fault("download", Fault::Answer(later.expect("a response")));
    let began = std::time::Instant::now();
    fixture.ports.materialize("d").await.expect("comes");
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn stalled_downloads_fail_and_slow_ones_succeed() {
    let bytes = noise(10_000);
    let fixture = fixture_with(|config| {
        config.retry_limit = Duration::from_secs(20);
        config.stall = Duration::from_millis(400);
    })
    .await;
    fixture.item("d", "n", "t", &*bytes);
    let whole = whole(&fixture, &["d"]);
    // The answer takes three times the stall limit, with a few bytes every 50 ms.
    let pieces: Vec<Bytes> = whole.chunks(whole.len().div_ceil(24)).map(Bytes::copy_from_slice).collect();
    let slow = stream::iter(pieces).then(|piece| async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok::<_, io::Error>(piece)
    });
    fixture.answer("download", 200, KIND, Body::from_stream(slow));
    let mut stream = fixture.ports.open("d").await.expect("opens");
    assert!(drain(&mut stream).await.expect("reads") == bytes);
    assert_eq!(fixture.log(), ["download"]);
    let stalled = stream::iter([Ok::<_, io::Error>(Bytes::copy_from_slice(&whole[..5000]))]).chain(stream::pending());
    fixture.answer("download", 200, KIND, Body::from_stream(stalled));
    let mut stream = fixture.ports.open("d").await.expect("opens");
    assert!(drain(&mut stream).await.expect("reads") == bytes);
    assert_eq!(fixture.log().len(), 4, "{:?}", fixture.log());
}

#[tokio::test]
async fn only_missing_parts_are_requested_again() {
    let fixture = retrying(&noise(300_000)).await;
    fixture.item("e", "m", "t", noise(200_000));
    fixture.item("f", "l", "t", noise(100));
    let url = format!("{}api/v1/domains/{DOMAIN}/data?ids=d,e,f", fixture.url);
    let head = whole(&fixture, &["d"]).len();
    for broken_at in [head - 5, head + 30, head + 100_000] {
        fixture.server.store().log.clear();
        let whole = whole(&fixture, &["d", "e", "f"]);
        fixture.answer("download", 200, KIND, cut(whole[..broken_at].to_vec()));
        let input = fixture.ports.materialize(&url).await.expect("comes");
        let read = |path: &std::path::Path| std::fs::read(path).expect("there");
        assert!(read(&input.path) == noise(300_000) && read(&input.related_files[0]) == noise(200_000));
        assert_eq!((read(&input.related_files[1]), input.related_files.len()), (noise(100), 2));
        let log = fixture.log();
        assert_eq!(log.iter().filter(|call| *call == "download").count(), 2, "{log:?}");
    }
    let fetched = fixture.ports.fetched();
    let names: Vec<_> = fetched.iter().map(|input| input.name.as_deref().unwrap_or_default()).collect();
    assert_eq!(names, ["n", "m", "l"]);
}

#[tokio::test]
async fn digest_of_the_server_is_compared() {
    let fixture = fixture().await;
    fixture.item("d", "n", "t", "body");
    let digest = |bytes: &[u8]| {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        STANDARD.encode(Sha256::digest(bytes))
    };
    let with = |header: String| {
        let whole = String::from_utf8(whole(&fixture, &["d"])).expect("text");
        whole.replace("Content-Type:", &format!("{header}\r\nContent-Type:"))
    };
    for header in [
        format!("Repr-Digest: sha-512=:AAAA:, sha-256=:{}:", digest(b"body")),
        format!("Digest: SHA-256={}", digest(b"body")),
        "Digest: sha-256=invalid".to_owned(),
    ] {
        fixture.answer("download", 200, KIND, with(header));
        fixture.ports.materialize("d").await.expect("comes");
    }
    fixture.answer("download", 200, KIND, with(format!("Content-Digest: sha-256=:{}:", digest(b"other"))));
    refused(fixture.ports.materialize("d").await, PortErrorKind::Malformed, "SHA-256");
}

#[tokio::test]
async fn resumed_download_has_the_newest_bearer() {
    let bytes = noise(700_000);
    let fixture = retrying(&bytes).await;
    breaks_after(&fixture, &["d"], 400_000);
    let mut stream = fixture.ports.open("d").await.expect("opens");
    assert!(stream.next().await.expect("the first piece").is_some());
    fixture.server.store().tokens = vec!["t2".to_owned()];
    fixture.writer.publish(|now| now.token = Some(Token::new("t2")));
    drain(&mut stream).await.expect("sent with the newer bearer");
}

#[tokio::test]
async fn lost_lease_ends_the_pause() {
    let fixture = fixture_with(|config| {
        config.retry_limit = Duration::from_secs(600);
        config.part_pause = Duration::from_secs(60);
    })
    .await;
    fixture.answer("download", 503, "text/plain", "later");
    let held = fixture.held.clone();
    let (result, ()) = tokio::join!(fixture.ports.materialize("d"), async {
        fixture.until("download").await;
        held.cancel.cancel(crate::model::CancelReason::LeaseLost);
    });
    refused(result, PortErrorKind::LeaseOver, "lease is lost");
}
