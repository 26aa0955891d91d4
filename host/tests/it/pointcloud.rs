//! The packaged point cloud runner on a leased task. Inputs are scans, and outputs are a cloud, a picture and a
//! report.

use serde_json::{Value, json};

use crate::harness::{Ended, TestServer, fixtures};

const CAPABILITY: &str = "/pointcloud/downsample/v1";

/// Four points, of which two are in one voxel of side 1, and the strip of a mesh, which the runner ignores.
const POINTS: &str = "0 0 0\n0.25 0 0\n4 0 0\n0 4 0\n";
const STRIP: &str = "5 0 1 2 -1 3\n";

/// An ASCII scan with its elements in this order.
fn scan(strip_first: bool) -> String {
    let vertex = ("element vertex 4\nproperty float x\nproperty float y\nproperty float z\n", POINTS);
    let strip = ("element tristrips 1\nproperty list int int vertex_indices\n", STRIP);
    let (first, second) = if strip_first { (strip, vertex) } else { (vertex, strip) };
    format!("ply\nformat ascii 1.0\n{}{}end_header\n{}{}", first.0, second.0, first.1, second.1)
}

/// Runs a task on this scan to its end.
async fn downsampled(test_server: &TestServer, scan: &str) -> Ended {
    let node = test_server.joined(&[fixtures::pointcloud()]).await;
    let input = test_server.put("scan", scan.as_bytes()).await;
    let job = test_server.task(CAPABILITY).inputs(&[input]).meta(json!({ "voxel": 1.0 })).submit();
    let ended = test_server.ended(&node, job).await;
    node.stop().await;
    ended
}

#[tokio::test]
async fn leased_scan_gives_cloud_picture_and_report() {
    for strip_first in [false, true] {
        let test_server = TestServer::start().await;
        let ended = downsampled(&test_server, &scan(strip_first)).await;
        let artifacts = ended.completed().artifacts();
        let types: Vec<_> = artifacts.iter().map(|(path, artifact)| (path.as_str(), &artifact["data_type"])).collect();
        let wanted = [("cloud.ply", json!("ply")), ("preview.png", json!("png_data")), ("report.json", json!("json"))];
        assert_eq!(types, wanted.each_ref().map(|(path, data_type)| (*path, data_type)));

        let cloud = test_server.artifact(&ended, "cloud.ply").await;
        assert!(cloud.starts_with(b"ply\n"), "{}", cloud.escape_ascii());
        assert!(cloud.windows(17).any(|words| words == b"element vertex 3\n"), "{}", cloud.escape_ascii());
        assert!(test_server.artifact(&ended, "preview.png").await.starts_with(b"\x89PNG\r\n\x1a\n"));
        let report: Value = serde_json::from_slice(&test_server.artifact(&ended, "report.json").await).expect("JSON");
        assert_eq!(json!([report["points_in"], report["points_out"], report["voxel"]]), json!([4, 3, 1.0]), "{report}");
    }
}

#[tokio::test]
async fn scan_with_wrong_header_is_not_retried() {
    let test_server = TestServer::start().await;
    let ended = downsampled(&test_server, &scan(false).replace("vertex 4", "vertex 4000")).await;
    let (reason, details) = ended.failed();
    assert!(reason.starts_with("runner failed: ") && reason.contains("input 1 of 1"), "{reason}");
    assert_eq!(
        json!([details["outcome"], details["code"], details["retryable"]]),
        json!(["failed", "invalid_input", false])
    );
    assert!(ended.artifacts().is_empty());
}
