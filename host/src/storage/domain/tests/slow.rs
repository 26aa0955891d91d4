//! Uploads that are slow are fine while something moves.

use axum::body::Body;
use futures_util::StreamExt;

use super::*;

/// Takes a body from the connection no faster than this.
pub(super) async fn read(body: Body, bytes_per_second: u32) -> Body {
    let mut pieces = body.into_data_stream();
    let mut whole = Vec::new();
    while let Some(Ok(piece)) = pieces.next().await {
        tokio::time::sleep(Duration::from_secs(1).mul_f64(piece.len() as f64 / f64::from(bytes_per_second))).await;
        whole.extend_from_slice(&piece);
    }
    whole.into()
}

#[tokio::test]
async fn silence_breaks_an_upload_and_slowness_does_not() {
    // What the system still holds when all was handed to it takes longer than the limit of silence.
    let limit = Duration::from_secs(1);
    let world = world_with(|config| config.stall = limit).await;
    world.server.store().part_size = 16 * MIB as i64;
    world.trick("part", Trick::Slow(5_000_000));
    let bytes = noise(16 * MIB);
    let began = std::time::Instant::now();
    let id = world.put("x.bin", &bytes).await.expect("stored").expect("an id");
    assert!(world.stored(&id).bytes == bytes);
    assert!(began.elapsed() > limit * 3, "{:?}", began.elapsed());
    assert_eq!((world.count("part"), world.count("abort")), (1, 0));
    world.trick("part", Trick::Hang);
    refused(world.put("y.bin", &bytes).await, PortErrorKind::Network, "did not answer within");
}
