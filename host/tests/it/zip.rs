//! Zip inputs through the binary. They are unpacked for later stages, or rejected with one line.

use std::io::{Cursor, Write};

use serde_json::{Value, json};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use crate::harness::{Ended, TestServer, fixtures, folder::Folder, node::TestNode};

fn archive(method: CompressionMethod, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in files {
        writer.start_file(*name, SimpleFileOptions::default().compression_method(method)).expect("written");
        writer.write_all(bytes).expect("written");
    }
    writer.finish().expect("written").into_inner()
}

async fn inputs(test_server: &TestServer, node: &TestNode, name: &str, data_type: &str, bytes: &[u8]) -> Ended {
    let id = test_server.dev_server.put_data(name, data_type, bytes).await.expect("stored");
    test_server.ended(node, test_server.task("/fixtures/inputs/v1").inputs(&[id]).submit()).await
}

#[tokio::test]
async fn refined_scan_is_unpacked_for_later_stages() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::zoo(), fixtures::echo()]).await;
    let files: [(&str, &[u8]); 4] =
        [("images.bin", &[1; 70_000]), ("cameras.bin", b"c"), ("points3D.bin", b"p"), ("portals.csv", b"a,b\n")];
    let bytes = archive(CompressionMethod::Stored, &files);
    let ended = inputs(&test_server, &node, "refined_scan_2025-06-01_08-30-00", "refined_scan_zip", &bytes).await;
    let seen: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "inputs.json").await).expect("JSON");
    let input = &seen[0];
    let root = input["root_dir"].as_str().expect("a folder");
    let expected: Vec<String> =
        files.iter().map(|(name, _)| format!("{root}/refined/local/2025-06-01_08-30-00/sfm/{name}")).collect();
    assert_eq!(input["extracted_paths"], json!(expected), "in the archive's order");
    assert_eq!(json!([input["inside"], input["on_disk"]]), json!([true, bytes.len()]), "the archive stays beside them");
    assert!(input["path"].as_str().is_some_and(|path| path.ends_with(".refined_scan_zip")), "{input}");
    // The byte form is the archive itself, because real runners unpack it (posemesh.md section 11.4).
    let ended = test_server
        .ended(&node, test_server.task("/examples/echo-bytes/v1").set("inputs_cids", json!([input["cid"]])).submit())
        .await;
    assert!(test_server.artifact(ended.completed(), "echo-0.bin").await == bytes);
    node.page_until("/status.json", |page| page.1["tasks"] == json!({})).await;
    assert_eq!(node.scratch().iter().filter(|path| path.is_file()).count(), 0);
}

#[tokio::test]
async fn unsafe_archives_are_refused_in_one_line() {
    let test_server = TestServer::start().await;
    let node = test_server
        .node(&[fixtures::zoo()])
        .set("UNPACK_BYTES_MAX", "2MiB")
        .set("UNPACK_FILES_MAX", "3")
        .leasing()
        .await;
    let deflated = CompressionMethod::Deflated;
    let mut escaping = archive(deflated, &[("qqqqqqq", b"x")]);
    let places: Vec<usize> = (0..escaping.len() - 7).filter(|at| escaping[*at..].starts_with(b"qqqqqqq")).collect();
    places.into_iter().for_each(|at| escaping[at..at + 7].copy_from_slice(b"../evil"));
    let small: &[u8] = b"1";
    for (bytes, text) in [
        (escaping, "its entry ../evil would leave the folder it is unpacked to"),
        (archive(deflated, &[("a", &[0; 3 << 20])]), "at most 2097152 are allowed (UNPACK_BYTES_MAX)"),
        (
            archive(deflated, &["a", "b", "c", "d"].map(|name| (name, small))),
            "at most 3 are allowed (UNPACK_FILES_MAX)",
        ),
        (b"not an archive".to_vec(), "it is not a valid zip archive: its end is missing; is the upload complete?"),
    ] {
        let name = format!("scans {}", bytes.len());
        let ended = inputs(&test_server, &node, &name, "zip_data", &bytes).await;
        let (reason, details) = ended.failed();
        assert!(reason.starts_with(&format!("runner failed: archive {name} refused: ")), "{reason}");
        assert!(reason.ends_with(text) && !reason.contains('\n'), "{reason}");
        assert_eq!(details["outcome"], "failed", "the input is at fault, not the node");
    }
    node.page_until("/status.json", |page| page.1["tasks"] == json!({})).await;
    assert_eq!(node.scratch().iter().filter(|path| path.is_file()).count(), 0);
}

#[tokio::test]
async fn unpack_ratio_is_a_setting() {
    let test_server = TestServer::start().await;
    let bomb = archive(CompressionMethod::Deflated, &[("zeros", &vec![0; 20 << 20])]);
    let strict = test_server.joined(&[fixtures::zoo()]).await;
    let ended = inputs(&test_server, &strict, "few zeros", "zip", &bomb).await;
    let reason = ended.failed().0;
    assert!(
        reason.ends_with("it unpacks to 20971520 bytes, more than 200 times its size (UNPACK_RATIO_MAX)"),
        "{reason}"
    );
    strict.stop().await;
    let node = test_server.node(&[fixtures::zoo()]).set("UNPACK_RATIO_MAX", "5000").leasing().await;
    inputs(&test_server, &node, "zeros", "zip", &bomb).await.completed();
}

const PLY: &str =
    "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\nend_header\n";

#[tokio::test]
async fn pointcloud_merges_the_clouds_of_an_archive() {
    let test_server = TestServer::start().await;
    let node = test_server.joined(&[fixtures::pointcloud()]).await;
    let (one, two) = (format!("{PLY}0 0 0\n4 0 0\n"), format!("{PLY}0 4 0\n0 0 4\n"));
    let clouds = archive(
        CompressionMethod::Deflated,
        &[("scans/a.ply", one.as_bytes()), ("notes.txt", b"no cloud"), ("scans/b.PLY", two.as_bytes())],
    );
    let task = async |bytes: &[u8], name: &str| {
        let id = test_server.dev_server.put_data(name, "zip", bytes).await.expect("stored");
        let task = test_server.task("/pointcloud/downsample/v1").inputs(&[id]).meta(json!({ "voxel": 1.0 }));
        test_server.ended(&node, task.submit()).await
    };
    let ended = task(&clouds, "clouds").await;
    let report: Value =
        serde_json::from_slice(&test_server.artifact(ended.completed(), "report.json").await).expect("JSON");
    assert_eq!(json!([report["points_in"], report["points_out"]]), json!([4, 4]), "{report}");
    let ended = task(&archive(CompressionMethod::Stored, &[("notes.txt", b"no cloud")]), "notes").await;
    let (reason, details) = ended.failed();
    assert_eq!(reason, "runner failed: input 1 of 1: the archive holds no .ply file");
    assert_eq!(details["code"], "invalid_input");
}

#[tokio::test]
async fn invoke_unpacks_archives() {
    let folder = Folder::new();
    folder.put("libpointcloud.so", &fixtures::pointcloud());
    let cloud = format!("{PLY}0 0 0\n4 0 0\n");
    let path = folder.root().join("clouds.zip");
    std::fs::write(&path, archive(CompressionMethod::Deflated, &[("a.ply", cloud.as_bytes())])).expect("written");
    let args = ["--input", path.to_str().expect("text"), "--meta", "{\"voxel\":1.0}"];
    folder.invoke("/pointcloud/downsample/v1", &args).await.expect(0);
    let report: Value = serde_json::from_slice(&folder.output("report.json")).expect("JSON");
    assert_eq!(report["points_in"], 2);
}
