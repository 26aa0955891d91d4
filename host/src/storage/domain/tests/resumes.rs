//! Downloads that break go on where they stopped, and never deliver a byte of other data.

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
    // The server sends what it has before it hears of the end.
    let end = stream::once(async {
        tokio::task::yield_now().await;
        Err(io::Error::other("cut"))
    });
    Body::from_stream(first.chain(end))
}

/// A world that has patience, with one item `d`.
async fn patient(bytes: &[u8]) -> World {
    let world = world_with(|config| config.patience = Duration::from_secs(20)).await;
    world.item("d", "n", "t", bytes);
    world
}

/// The download of these items as it would be.
fn whole(world: &World, ids: &[&str]) -> Vec<u8> {
    let items: Vec<(String, Item)> = ids.iter().map(|id| ((*id).to_owned(), world.stored(id))).collect();
    multipart("q7", &items)
}

/// The download breaks after this many bytes of the body of its first part.
fn breaks_after(world: &World, ids: &[&str], bytes: usize) {
    let whole = whole(world, ids);
    let head = whole.windows(4).position(|window| window == b"\r\n\r\n").expect("a head") + 4;
    world.answer("download", 200, KIND, cut(whole[..head + bytes].to_vec()));
}

fn sha256(bytes: &[u8]) -> String {
    crate::storage::digest::hex(&Sha256::digest(bytes))
}

/// Reads `d` as a stream and as a file; `tricks` are laid before each.
async fn comes_whole(world: &World, bytes: &[u8], tricks: impl Fn(&World), requests: &[&str]) {
    for file in [false, true] {
        world.server.store().log.clear();
        tricks(world);
        let read = if file {
            std::fs::read(world.ports.materialize("d").await.expect("comes").path).expect("there")
        } else {
            drain(&mut world.ports.open("d").await.expect("opens")).await.expect("reads")
        };
        assert!(read == bytes, "file: {file}");
        assert_eq!(world.log(), requests, "file: {file}");
    }
    let fetched = world.ports.fetched();
    let [input] = &*fetched else { panic!("noted once: {fetched:?}") };
    assert_eq!((input.cid.as_str(), input.name.as_deref(), input.size), ("d", Some("n"), bytes.len() as u64));
    assert_eq!(input.sha256, sha256(bytes));
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    let bytes = noise(700_000);
    let world = patient(&bytes).await;
    comes_whole(&world, &bytes, |world| breaks_after(world, &["d"], 400_000), &["download", "raw from 400000", "meta"])
        .await;
}

#[tokio::test]
async fn a_continuation_that_breaks_is_continued_by_its_entity_tag() {
    let bytes = noise(700_000);
    let world = patient(&bytes).await;
    let tricks = |world: &World| {
        breaks_after(world, &["d"], 100_000);
        let answer = Response::builder()
            .status(206)
            .header(header::ETAG, "\"d-0\"")
            .header(header::CONTENT_RANGE, "bytes 100000-699999/700000")
            .body(cut(noise(700_000)[100_000..300_000].to_vec()));
        world.trick("raw", Trick::Answer(answer.expect("a response")));
    };
    let requests = ["download", "raw from 100000", "meta", "raw from 300000"];
    comes_whole(&world, &bytes, tricks, &requests).await;
}

#[tokio::test]
async fn without_ranges_or_content_by_id_a_download_begins_again_and_delivers_nothing_twice() {
    let bytes = noise(700_000);
    for (raw, requests) in [
        (Raw { served: true, ranges: false, etags: true }, &["download", "raw from 400000"][..]),
        (Raw { served: false, ranges: false, etags: false }, &["download", "raw from 400000", "download"]),
    ] {
        let world = patient(&bytes).await;
        world.server.store().raw = raw;
        comes_whole(&world, &bytes, |world| breaks_after(world, &["d"], 400_000), requests).await;
    }
}

#[tokio::test]
async fn data_that_was_changed_meanwhile_is_never_mixed_with_the_old() {
    for (ranges, etags) in [(true, true), (true, false), (false, true)] {
        let world = patient(&noise(700_000)).await;
        world.server.store().raw = Raw { served: true, ranges, etags };
        for file in [false, true] {
            breaks_after(&world, &["d"], 400_000);
            let server = world.server.clone();
            let change = move || {
                let mut store = server.store();
                let item = store.items.get_mut("d").expect("there");
                item.bytes.iter_mut().for_each(|byte| *byte ^= 1);
                item.version += 1;
            };
            world.trick("raw", Trick::First(Box::new(change)));
            let result = match file {
                true => world.ports.materialize("d").await.map(|_| ()),
                false => drain(&mut world.ports.open("d").await.expect("opens")).await.map(|_| ()),
            };
            refused(result, PortErrorKind::Network, "changed on the server");
        }
        assert!(world.ports.fetched().is_empty(), "half an input is none");
        assert_eq!(std::fs::read_dir(world.dir.path()).expect("listed").count(), 0);
    }
}

#[tokio::test]
async fn a_server_that_is_away_for_a_while_is_asked_again() {
    let world = patient(b"body").await;
    let tricks = |world: &World| {
        for status in [503, 500, 429, 408] {
            world.answer("download", status, "text/plain", "later");
        }
        world.trick("download", Trick::Unread(Box::new(|| reply(200, KIND, cut(Vec::new())))));
    };
    comes_whole(&world, b"body", tricks, &["download"; 6]).await;
}

#[tokio::test]
async fn the_pause_a_server_asks_for_is_kept() {
    let world = patient(b"body").await;
    let later = Response::builder().status(503).header(header::RETRY_AFTER, "1").body(Body::empty());
    world.trick("download", Trick::Answer(later.expect("a response")));
    let began = std::time::Instant::now();
    world.ports.materialize("d").await.expect("comes");
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn silence_breaks_a_download_and_slowness_does_not() {
    let bytes = noise(10_000);
    let world = world_with(|config| {
        config.patience = Duration::from_secs(20);
        config.stall = Duration::from_millis(400);
    })
    .await;
    world.item("d", "n", "t", &*bytes);
    let whole = whole(&world, &["d"]);
    // Three times as long as the stall limit allows for silence, a little every 50 ms.
    let pieces: Vec<Bytes> = whole.chunks(whole.len().div_ceil(24)).map(Bytes::copy_from_slice).collect();
    let slow = stream::iter(pieces).then(|piece| async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        Ok::<_, io::Error>(piece)
    });
    world.answer("download", 200, KIND, Body::from_stream(slow));
    let mut stream = world.ports.open("d").await.expect("opens");
    assert!(drain(&mut stream).await.expect("reads") == bytes);
    assert_eq!(world.log(), ["download"]);
    let silent = stream::iter([Ok::<_, io::Error>(Bytes::copy_from_slice(&whole[..5000]))]).chain(stream::pending());
    world.answer("download", 200, KIND, Body::from_stream(silent));
    let mut stream = world.ports.open("d").await.expect("opens");
    assert!(drain(&mut stream).await.expect("reads") == bytes);
    assert_eq!(world.log().len(), 4, "{:?}", world.log());
}

#[tokio::test]
async fn of_several_parts_only_what_has_not_come_is_asked_for_again() {
    let world = patient(&noise(300_000)).await;
    world.item("e", "m", "t", noise(200_000));
    world.item("f", "l", "t", noise(100));
    let url = format!("{}api/v1/domains/{DOMAIN}/data?ids=d,e,f", world.url);
    let head = whole(&world, &["d"]).len();
    for broken_at in [head - 5, head + 30, head + 100_000] {
        world.server.store().log.clear();
        let whole = whole(&world, &["d", "e", "f"]);
        world.answer("download", 200, KIND, cut(whole[..broken_at].to_vec()));
        let input = world.ports.materialize(&url).await.expect("comes");
        let read = |path: &std::path::Path| std::fs::read(path).expect("there");
        assert!(read(&input.path) == noise(300_000) && read(&input.related_files[0]) == noise(200_000));
        assert_eq!((read(&input.related_files[1]), input.related_files.len()), (noise(100), 2));
        let log = world.log();
        assert_eq!(log.iter().filter(|call| *call == "download").count(), 2, "{log:?}");
    }
    let fetched = world.ports.fetched();
    let names: Vec<_> = fetched.iter().map(|input| input.name.as_deref().unwrap_or_default()).collect();
    assert_eq!(names, ["n", "m", "l"]);
}

#[tokio::test]
async fn a_digest_the_server_gives_is_compared() {
    let world = world().await;
    world.item("d", "n", "t", "body");
    let digest = |bytes: &[u8]| {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        STANDARD.encode(Sha256::digest(bytes))
    };
    let with = |header: String| {
        let whole = String::from_utf8(whole(&world, &["d"])).expect("text");
        whole.replace("Content-Type:", &format!("{header}\r\nContent-Type:"))
    };
    for header in [
        format!("Repr-Digest: sha-512=:AAAA:, sha-256=:{}:", digest(b"body")),
        format!("Digest: SHA-256={}", digest(b"body")),
        "Digest: sha-256=rubbish".to_owned(),
    ] {
        world.answer("download", 200, KIND, with(header));
        world.ports.materialize("d").await.expect("comes");
    }
    world.answer("download", 200, KIND, with(format!("Content-Digest: sha-256=:{}:", digest(b"other"))));
    refused(world.ports.materialize("d").await, PortErrorKind::Malformed, "SHA-256");
}

#[tokio::test]
async fn a_newer_bearer_is_taken_for_a_continuation() {
    let bytes = noise(700_000);
    let world = patient(&bytes).await;
    breaks_after(&world, &["d"], 400_000);
    let mut stream = world.ports.open("d").await.expect("opens");
    assert!(stream.next().await.expect("the first piece").is_some());
    world.server.store().tokens = vec!["t2".to_owned()];
    world.keys.publish(|now| now.token = Some(Token::new("t2")));
    drain(&mut stream).await.expect("comes with the newer bearer");
}

#[tokio::test]
async fn a_lost_lease_ends_the_pause_before_the_next_try() {
    let world = world_with(|config| {
        config.patience = Duration::from_secs(600);
        config.part_pause = Duration::from_secs(60);
    })
    .await;
    world.answer("download", 503, "text/plain", "later");
    let grant = world.grant.clone();
    let (result, ()) = tokio::join!(world.ports.materialize("d"), async {
        world.until("download").await;
        grant.cancel.cancel(crate::model::CancelReason::LeaseLost);
    });
    refused(result, PortErrorKind::LeaseOver, "lease is lost");
}
