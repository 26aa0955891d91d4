//! Tests of inputs and outputs in local files.

use uuid::Uuid;

use super::*;
use crate::model::{Capability, DataLocation, Lease, Setup, TaskId};

struct Fixture {
    dir: tempfile::TempDir,
    ports: LocalPorts,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let scan = dir.path().join("my scan.ply");
    std::fs::write(&scan, b"ply").expect("written");
    std::fs::write(dir.path().join("empty"), b"").expect("written");
    let inputs = vec![scan, dir.path().join("empty"), dir.path().join("gone"), dir.path().to_owned()];
    let ports = {
        let files = LocalFiles { inputs, out: dir.path().join("out") };
        let lease = Lease::bare(TaskId::from(Uuid::nil()), Capability::parse("/x/v1").expect("a name"));
        let (held, _) = HeldLease::new(lease, Setup::Ready(Ok(DataLocation::LocalFiles(files.clone()))));
        let scratch = dir.path().join("scratch");
        LocalPorts::new(held, Some(files), scratch, Budget::unlimited(), UnpackLimits::default())
    };
    Fixture { dir, ports }
}

fn spec(path: &str) -> ArtifactSpec {
    ArtifactSpec { path: path.to_owned(), ..ArtifactSpec::default() }
}

fn files(dir: &Path) -> Vec<String> {
    let mut found: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    found.sort();
    found
}

#[tokio::test]
async fn inputs_are_found_by_number_and_by_path() {
    let Fixture { dir, ports } = fixture();
    let by_path = dir.path().join("my scan.ply").display().to_string();
    for cid in ["input-0", " input-0 ", by_path.as_str()] {
        let mut stream = ports.open(cid).await.expect("opens");
        assert_eq!((stream.meta().data_type.as_deref(), stream.meta().size), (Some("ply"), Some(3)));
        assert_eq!(stream.next().await.expect("reads").as_deref(), Some(&b"ply"[..]));
        assert!(stream.next().await.expect("ends").is_none());
    }
    let mut empty = ports.open("input-1").await.expect("opens");
    assert!(empty.next().await.expect("ends").is_none());
    for (cid, kind) in [
        ("input-2", PortErrorKind::NotFound),
        ("input-3", PortErrorKind::BadRequest),
        ("input-4", PortErrorKind::NotFound),
        ("/etc/passwd", PortErrorKind::NotFound),
    ] {
        assert_eq!(ports.open(cid).await.map(|_| ()).expect_err("no such input").kind, kind, "{cid}");
    }
}

#[tokio::test]
async fn query_lists_inputs_that_are_files() {
    let Fixture { dir: _dir, ports } = fixture();
    let find = async |json: &str| {
        let query = DataQuery::parse(json.as_bytes()).expect("a query");
        let mut stream = ports.find(query).await.expect("found");
        let lines = stream.next().await.expect("read").unwrap_or_default();
        assert!(stream.next().await.expect("ended").is_none());
        String::from_utf8(lines.to_vec()).expect("text")
    };
    let scan = "{\"id\":\"input-0\",\"name\":\"my scan\",\"data_type\":\"ply\",\"size\":3}\n";
    let empty = "{\"id\":\"input-1\",\"name\":\"empty\",\"size\":0}\n";
    assert_eq!(find("{}").await, format!("{scan}{empty}"));
    assert_eq!(find(r#"{"data_type":"ply"}"#).await, scan);
    assert_eq!(find(r#"{"ids":["input-1","input-2"]}"#).await, empty);
    assert_eq!(find(r#"{"name":"other"}"#).await, "");
    let mut input = ports.open("input-0").await.expect("opens");
    assert_eq!(input.next().await.expect("reads").as_deref(), Some(&b"ply"[..]));
    ports.close().await;
    let late = ports.find(DataQuery::default()).await.map(|_| ()).expect_err("the task is over");
    assert_eq!(late.kind, PortErrorKind::LeaseOver);
}

#[tokio::test]
async fn task_without_data_cannot_be_queried() {
    let lease = Lease::bare(TaskId::from(Uuid::nil()), Capability::parse("/x/v1").expect("a name"));
    let (held, _) = HeldLease::new(lease, Setup::Ready(Ok(DataLocation::None)));
    let ports = LocalPorts::new(held, None, PathBuf::new(), Budget::unlimited(), UnpackLimits::default());
    let refused = ports.find(DataQuery::default()).await.map(|_| ()).expect_err("no data");
    assert_eq!(refused.kind, PortErrorKind::Unsupported);
}

#[tokio::test]
async fn runner_gets_a_copy_of_the_input() {
    let Fixture { dir, ports } = fixture();
    let input = ports.materialize("input-0").await.expect("materialized");
    assert!(input.path.starts_with(&input.root_dir) && input.root_dir.starts_with(dir.path().join("scratch")));
    assert!(input.path.ends_with("datasets/my_scan/my_scan.ply"), "{}", input.path.display());
    std::fs::write(&input.path, b"spoiled").expect("writable");
    assert_eq!(std::fs::read(dir.path().join("my scan.ply")).expect("there"), b"ply");
}

#[tokio::test]
async fn unfinished_outputs_do_not_appear() {
    let Fixture { dir, ports } = fixture();
    let out = dir.path().join("out");
    ports.put_file(spec("/a//b.json"), &dir.path().join("my scan.ply")).await.expect("copied");
    let mut stream = ports.create(spec("é.txt")).await.expect("opens");
    stream.write(Bytes::from_static(b"one ")).await.expect("taken");
    assert!(!out.join("é.txt").exists());
    stream.write(Bytes::from_static(b"two")).await.expect("taken");
    stream.finish().await.expect("published");
    assert_eq!(std::fs::read(out.join("é.txt")).expect("there"), b"one two");
    let mut stream = ports.create(spec("dropped")).await.expect("opens");
    stream.write(Bytes::from_static(b"x")).await.expect("taken");
    drop(stream);
    ports.create(spec("aborted")).await.expect("opens").abort().await;
    let short = ArtifactSpec { size: Some(5), ..spec("short") };
    let refused = ports.create(short).await.expect("opens").finish().await.expect_err("no bytes were written");
    assert_eq!(refused.kind, PortErrorKind::BadRequest);
    assert_eq!(
        (files(&out), files(&out.join("a"))),
        (vec!["a".to_owned(), "é.txt".to_owned()], vec!["b.json".to_owned()])
    );
    let published: Vec<String> = ports.published().into_iter().map(|artifact| artifact.logical_path).collect();
    assert_eq!(published, ["a/b.json", "é.txt"]);
    let known = |at: usize| (ports.published()[at].size, ports.published()[at].sha256.clone());
    assert_eq!(known(0), (Some(3), Some(hex(&Sha256::digest(b"ply")))));
    assert_eq!(known(1), (Some(7), Some(hex(&Sha256::digest(b"one two")))));
}

#[tokio::test]
async fn outputs_stay_below_their_folder() {
    let Fixture { dir, ports } = fixture();
    let source = dir.path().join("my scan.ply");
    for path in ["../x", "a/../../x", "", "/", "a\0b"] {
        let err = ports.put_file(spec(path), &source).await.expect_err("refused");
        assert_eq!(err.kind, PortErrorKind::InvalidPath, "{path:?}");
    }
    ports.put_file(spec("/abs"), &source).await.expect("below the folder");
    assert_eq!(files(&dir.path().join("out")), ["abs"]);
    assert_eq!(
        ports.put_file(spec("abs/x"), &source).await.expect_err("the parent is a file").kind,
        PortErrorKind::Local
    );
    for unfit in [dir.path().to_owned(), dir.path().join("empty")] {
        let err = ports.put_file(spec("x"), &unfit).await.expect_err("no file to publish");
        assert_eq!(err.kind, PortErrorKind::BadRequest, "{err}");
    }
}
