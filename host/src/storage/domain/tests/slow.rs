//! Slow uploads succeed while bytes move.

use axum::body::Body;
use futures_util::StreamExt;

use super::*;

/// Reads a body at most at this rate.
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
async fn stalled_uploads_fail_and_slow_ones_succeed() {
    // The bytes in the system's buffers need longer than the stall limit after the whole body was taken.
    let limit = Duration::from_secs(1);
    let fixture = fixture_with(|config| config.stall = limit).await;
    fixture.server.store().part_size = 16 * MIB as i64;
    fixture.fault("part", Fault::Slow(5_000_000));
    let bytes = noise(16 * MIB);
    let began = std::time::Instant::now();
    let id = fixture.put("x.bin", &bytes).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    assert!(began.elapsed() > limit * 3, "{:?}", began.elapsed());
    assert_eq!((fixture.count("part"), fixture.count("abort")), (1, 0));
    fixture.fault("part", Fault::Hang);
    refused(fixture.put("y.bin", &bytes).await, PortErrorKind::Network, "did not answer within");
}
