//! Artifacts written piece by piece.

use bytes::Bytes;

use super::*;
use crate::model::CancelReason;

async fn write(fixture: &Fixture, spec: ArtifactSpec, bytes: &[u8], piece: usize) -> Result<Option<String>, PortError> {
    let mut stream = fixture.ports.create(spec).await?;
    for piece in bytes.chunks(piece) {
        stream.write(Bytes::copy_from_slice(piece)).await?;
    }
    stream.finish().await
}

#[tokio::test]
async fn short_stream_is_sent_in_one_request() {
    let fixture = fixture().await;
    for bytes in [noise(0), noise(1), noise(4 * MIB)] {
        let path = format!("{}.bin", bytes.len());
        let id = write(&fixture, spec(&path), &bytes, 60_000).await.expect("stored").expect("an id");
        assert!(fixture.stored(&id).bytes == bytes);
    }
    assert_eq!((fixture.count("create"), fixture.count("initiate")), (3, 0));
    assert_eq!(fixture.ports.published().len(), 3);
}

#[tokio::test]
async fn long_stream_is_sent_in_parts() {
    let fixture = fixture().await;
    let bytes = noise(9 * MIB + 3);
    // Filled in memory, filled in files, one large part, one large piece.
    for (n, (part_size, piece)) in
        [(MIB, 70_001), (MIB, 20 * MIB), (9 * MIB, 70_001), (100 * MIB, MIB)].into_iter().enumerate()
    {
        fixture.server.store().part_size = part_size as i64;
        let id = write(&fixture, spec(&n.to_string()), &bytes, piece).await.expect("stored").expect("an id");
        assert!(fixture.stored(&id).bytes == bytes, "{part_size} {piece}");
    }
    assert_eq!((fixture.count("complete"), fixture.count("create")), (4, 0));
    assert_eq!(std::fs::read_dir(fixture.dir.path()).expect("listed").count(), 0, "no spool file is left");
}

#[tokio::test]
async fn promised_size_is_announced_and_checked() {
    let fixture = fixture().await;
    let bytes = noise(5 * MIB);
    let sized = |path: &str, size: usize| ArtifactSpec { size: Some(size as u64), ..spec(path) };
    // The server checks the announced size.
    let id = write(&fixture, sized("a", bytes.len()), &bytes, MIB).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    refused(
        write(&fixture, sized("b", bytes.len() + 1), &bytes, MIB).await,
        PortErrorKind::BadRequest,
        "bytes were promised",
    );
    assert_eq!(fixture.count("abort"), 1);
    refused(
        write(&fixture, sized("c", 5), &noise(4), 9).await,
        PortErrorKind::BadRequest,
        "5 bytes were promised, 4 came",
    );
    refused(
        write(&fixture, sized("d", 5), &noise(6), 9).await,
        PortErrorKind::BadRequest,
        "5 bytes were promised, 6 came",
    );
    let file = fixture.file(b"1234");
    refused(
        fixture.ports.put_file(sized("e", 5), &file).await,
        PortErrorKind::BadRequest,
        "5 bytes were promised, 4 came",
    );
    assert_eq!(fixture.ports.published().len(), 1);
}

#[tokio::test]
async fn without_parts_a_long_stream_uses_a_file() {
    let fixture = fixture().await;
    fixture.answer("initiate", 501, "text/plain", "no");
    let bytes = noise(6 * MIB);
    let id = write(&fixture, spec("x"), &bytes, 70_001).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    assert_eq!(fixture.count("create"), 1);
    assert_eq!(std::fs::read_dir(fixture.dir.path()).expect("listed").count(), 0);
}

#[tokio::test]
async fn dropped_or_aborted_stream_publishes_nothing() {
    let fixture = fixture().await;
    for explicit in [false, true] {
        let mut stream = fixture.ports.create(spec("x")).await.expect("opens");
        stream.write(noise(6 * MIB).into()).await.expect("taken");
        fixture.until("part").await;
        if explicit {
            stream.abort().await;
        } else {
            drop(stream);
        }
    }
    // A stream that is too short for parts needs no abort.
    drop(fixture.ports.create(spec("y")).await.expect("opens"));
    fixture.ports.close().await;
    assert_eq!((fixture.count("abort"), fixture.server.store().uploads.len()), (2, 0));
    assert_eq!((fixture.ports.published().len(), fixture.count("create")), (0, 0));
}

#[tokio::test]
async fn idle_stream_is_aborted_at_close() {
    let fixture = fixture().await;
    let mut stream = fixture.ports.create(spec("x")).await.expect("opens");
    stream.write(noise(6 * MIB).into()).await.expect("taken");
    fixture.until("part").await;
    fixture.ports.close().await;
    assert_eq!(fixture.count("abort"), 1);
    refused(stream.write(Bytes::from_static(b"x")).await, PortErrorKind::LeaseOver, "task is over");
    refused(stream.finish().await, PortErrorKind::LeaseOver, "task is over");
}

#[tokio::test]
async fn failed_stream_fails_every_later_call() {
    let fixture = fixture().await;
    fixture.answer("part", 413, "text/plain", "too much");
    let mut stream = fixture.ports.create(spec("x")).await.expect("opens");
    let err = loop {
        if let Err(err) = stream.write(noise(3 * MIB).into()).await {
            break err;
        }
    };
    assert!(err.message.contains("unexpected status (413): too much"), "{err}");
    refused(stream.write(Bytes::from_static(b"x")).await, PortErrorKind::Limit, "(413)");
    refused(stream.finish().await, PortErrorKind::Limit, "(413)");
    assert_eq!(fixture.count("abort"), 1);
}

#[tokio::test]
async fn lost_lease_ends_a_stream_without_a_request() {
    let fixture = fixture().await;
    let mut stream = fixture.ports.create(spec("x")).await.expect("opens");
    stream.write(noise(6 * MIB).into()).await.expect("taken");
    fixture.until("part").await;
    fixture.held.cancel.cancel(CancelReason::LeaseLost);
    refused(stream.write(Bytes::from_static(b"x")).await, PortErrorKind::LeaseOver, "lease is lost");
    refused(stream.finish().await, PortErrorKind::LeaseOver, "lease is lost");
    fixture.ports.close().await;
    assert_eq!(fixture.count("abort"), 0);
}
