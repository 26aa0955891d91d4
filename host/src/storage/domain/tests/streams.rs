//! Artifacts written piece by piece.

use bytes::Bytes;

use super::*;
use crate::model::CancelReason;

async fn write(world: &World, spec: ArtifactSpec, bytes: &[u8], piece: usize) -> Result<Option<String>, PortError> {
    let mut stream = world.ports.create(spec).await?;
    for piece in bytes.chunks(piece) {
        stream.write(Bytes::copy_from_slice(piece)).await?;
    }
    stream.finish().await
}

#[tokio::test]
async fn a_short_stream_goes_in_one_request() {
    let world = world().await;
    for bytes in [noise(0), noise(1), noise(4 * MIB)] {
        let path = format!("{}.bin", bytes.len());
        let id = write(&world, spec(&path), &bytes, 60_000).await.expect("stored").expect("an id");
        assert!(world.stored(&id).bytes == bytes);
    }
    assert_eq!((world.count("create"), world.count("initiate")), (3, 0));
    assert_eq!(world.ports.published().len(), 3);
}

#[tokio::test]
async fn a_long_stream_goes_in_parts_of_either_kind() {
    let world = world().await;
    let bytes = noise(9 * MIB + 3);
    // Filled in memory, filled in files, one large part, one large piece.
    for (n, (part_size, piece)) in
        [(MIB, 70_001), (MIB, 20 * MIB), (9 * MIB, 70_001), (100 * MIB, MIB)].into_iter().enumerate()
    {
        world.server.store().part_size = part_size as i64;
        let id = write(&world, spec(&n.to_string()), &bytes, piece).await.expect("stored").expect("an id");
        assert!(world.stored(&id).bytes == bytes, "{part_size} {piece}");
    }
    assert_eq!((world.count("complete"), world.count("create")), (4, 0));
    assert_eq!(std::fs::read_dir(world.dir.path()).expect("listed").count(), 0, "no spool file stays");
}

#[tokio::test]
async fn a_promised_size_is_announced_and_kept() {
    let world = world().await;
    let bytes = noise(5 * MIB);
    let sized = |path: &str, size: usize| ArtifactSpec { size: Some(size as u64), ..spec(path) };
    // The server checks that what it was told is what it got.
    let id = write(&world, sized("a", bytes.len()), &bytes, MIB).await.expect("stored").expect("an id");
    assert!(world.stored(&id).bytes == bytes);
    refused(
        write(&world, sized("b", bytes.len() + 1), &bytes, MIB).await,
        PortErrorKind::BadRequest,
        "bytes were promised",
    );
    assert_eq!(world.count("abort"), 1);
    refused(
        write(&world, sized("c", 5), &noise(4), 9).await,
        PortErrorKind::BadRequest,
        "5 bytes were promised, 4 came",
    );
    refused(
        write(&world, sized("d", 5), &noise(6), 9).await,
        PortErrorKind::BadRequest,
        "5 bytes were promised, 6 came",
    );
    let file = world.file(b"1234");
    refused(
        world.ports.put_file(sized("e", 5), &file).await,
        PortErrorKind::BadRequest,
        "5 bytes were promised, 4 came",
    );
    assert_eq!(world.ports.published().len(), 1);
}

#[tokio::test]
async fn without_uploads_in_parts_a_long_stream_goes_through_a_file() {
    let world = world().await;
    world.answer("initiate", 501, "text/plain", "no");
    let bytes = noise(6 * MIB);
    let id = write(&world, spec("x"), &bytes, 70_001).await.expect("stored").expect("an id");
    assert!(world.stored(&id).bytes == bytes);
    assert_eq!(world.count("create"), 1);
    assert_eq!(std::fs::read_dir(world.dir.path()).expect("listed").count(), 0);
}

#[tokio::test]
async fn a_dropped_or_aborted_stream_publishes_nothing_and_is_aborted() {
    let world = world().await;
    for explicit in [false, true] {
        let mut stream = world.ports.create(spec("x")).await.expect("opens");
        stream.write(noise(6 * MIB).into()).await.expect("taken");
        world.until("part").await;
        if explicit {
            stream.abort().await;
        } else {
            drop(stream);
        }
    }
    // One that is too short to have been begun needs no abort.
    drop(world.ports.create(spec("y")).await.expect("opens"));
    world.ports.close().await;
    assert_eq!((world.count("abort"), world.server.store().uploads.len()), (2, 0));
    assert_eq!((world.ports.published().len(), world.count("create")), (0, 0));
}

#[tokio::test]
async fn an_idle_stream_is_aborted_when_the_task_closes() {
    let world = world().await;
    let mut stream = world.ports.create(spec("x")).await.expect("opens");
    stream.write(noise(6 * MIB).into()).await.expect("taken");
    world.until("part").await;
    world.ports.close().await;
    assert_eq!(world.count("abort"), 1);
    refused(stream.write(Bytes::from_static(b"x")).await, PortErrorKind::LeaseOver, "task is over");
    refused(stream.finish().await, PortErrorKind::LeaseOver, "task is over");
}

#[tokio::test]
async fn a_failing_stream_tells_the_writer_and_stays_failed() {
    let world = world().await;
    world.answer("part", 413, "text/plain", "too much");
    let mut stream = world.ports.create(spec("x")).await.expect("opens");
    let err = loop {
        if let Err(err) = stream.write(noise(3 * MIB).into()).await {
            break err;
        }
    };
    assert!(err.message.contains("unexpected status (413): too much"), "{err}");
    refused(stream.write(Bytes::from_static(b"x")).await, PortErrorKind::Limit, "(413)");
    refused(stream.finish().await, PortErrorKind::Limit, "(413)");
    assert_eq!(world.count("abort"), 1);
}

#[tokio::test]
async fn a_lost_lease_ends_a_stream_without_another_request() {
    let world = world().await;
    let mut stream = world.ports.create(spec("x")).await.expect("opens");
    stream.write(noise(6 * MIB).into()).await.expect("taken");
    world.until("part").await;
    world.grant.cancel.cancel(CancelReason::LeaseLost);
    refused(stream.write(Bytes::from_static(b"x")).await, PortErrorKind::LeaseOver, "lease is lost");
    refused(stream.finish().await, PortErrorKind::LeaseOver, "lease is lost");
    world.ports.close().await;
    assert_eq!(world.count("abort"), 0);
}
