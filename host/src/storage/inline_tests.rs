//! Tests of data in leases and reports.

use uuid::Uuid;

use super::*;
use crate::model::{Capability, Lease, Setup, TaskId};

fn ports(dir: &Path, inputs: &[(&str, &[u8])], budget: &Budget) -> InlinePorts {
    let inputs = inputs.iter().map(|(name, bytes)| ((*name).to_owned(), Bytes::copy_from_slice(bytes))).collect();
    let inputs = InlineInputs(Arc::new(inputs));
    let lease = Lease::bare(TaskId::from(Uuid::nil()), Capability::parse("/x/v1").expect("a name"));
    let (held, _) = HeldLease::new(lease, Setup::Ready(Ok(DataLocation::Inline(inputs.clone()))));
    InlinePorts::new(held, inputs, dir.to_owned(), budget.clone(), UnpackLimits::default())
}

fn spec(path: &str) -> ArtifactSpec {
    ArtifactSpec { path: path.to_owned(), ..ArtifactSpec::default() }
}

async fn put(ports: &InlinePorts, path: &str, bytes: &[u8]) -> Result<Option<String>, PortError> {
    let mut stream = ports.create(spec(path)).await?;
    for piece in bytes.chunks(1024 * 1024) {
        stream.write(Bytes::copy_from_slice(piece)).await?;
    }
    stream.finish().await
}

#[tokio::test]
async fn inputs_are_values_of_the_lease() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let budget = Budget::unlimited();
    let ports = ports(dir.path(), &[("my scan.ply", b"ply"), ("empty", b"")], &budget);
    let mut stream = ports.open("my scan.ply").await.expect("opens");
    assert_eq!(stream.next().await.expect("reads").as_deref(), Some(&b"ply"[..]));
    assert!(stream.next().await.expect("ends").is_none());
    assert!(ports.open("empty").await.expect("opens").next().await.expect("ends").is_none());
    let input = ports.materialize("my scan.ply").await.expect("materialized");
    assert!(input.path.ends_with("datasets/my_scan/my_scan.ply"), "{}", input.path.display());
    assert_eq!(std::fs::read(&input.path).expect("there"), b"ply");
    assert_eq!(ports.open("other").await.map(|_| ()).expect_err("no such input").kind, PortErrorKind::NotFound);
    assert_eq!(ports.fetched().len(), 2);
    assert!(budget.in_flight() > 0);
    drop((ports, stream));
    assert_eq!(budget.in_flight(), 0);
}

#[tokio::test]
async fn query_lists_values_of_the_lease() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ports = ports(dir.path(), &[("a.ply", b"ply"), ("b.json", b"{}")], &Budget::unlimited());
    let query = DataQuery { data_type: Some("json".to_owned()), ..DataQuery::default() };
    let mut stream = ports.find(query).await.expect("found");
    let expected = "{\"id\":\"b.json\",\"name\":\"b\",\"data_type\":\"json\",\"size\":2}\n";
    assert_eq!(stream.next().await.expect("reads").as_deref(), Some(expected.as_bytes()));
    assert!(stream.next().await.expect("ends").is_none());
    assert!(ports.open("b.json").await.is_ok());
}

#[tokio::test]
async fn query_of_many_inputs_has_several_pieces() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let names: Vec<String> = (0..2000).map(|n| format!("input with a long name {n:04}.json")).collect();
    let inputs: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
    let ports = ports(dir.path(), &inputs, &Budget::unlimited());
    let mut stream = ports.find(DataQuery::default()).await.expect("found");
    let (mut pieces, mut text) = (0, Vec::new());
    while let Some(piece) = stream.next().await.expect("reads") {
        pieces += 1;
        text.extend_from_slice(&piece);
    }
    assert!(pieces > 1);
    let id = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["id"].clone();
    let ids: Vec<serde_json::Value> = String::from_utf8(text).expect("text").lines().map(id).collect();
    assert_eq!(ids, names);
}

#[tokio::test]
async fn results_are_text_or_base64() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let budget = Budget::unlimited();
    let ports = ports(dir.path(), &[], &budget);
    put(&ports, "/a//text.txt", "é".as_bytes()).await.expect("published");
    put(&ports, "raw.bin", b"\xff\x00").await.expect("published");
    put(&ports, "both", b"\xff").await.expect("published");
    put(&ports, "both", b"text").await.expect("replaced");
    std::fs::write(dir.path().join("file"), b"file").expect("written");
    ports.put_file(spec("from-file"), &dir.path().join("file")).await.expect("published");
    let expected = [("a/text.txt", "é"), ("both", "text"), ("from-file", "file"), ("raw.bin;base64", "/wA=")];
    assert_eq!(ports.inline(), expected.map(|(key, text)| (key.to_owned(), text.to_owned())).into());
    assert_eq!(ports.published()[3].sha256, Some(hex(&Sha256::digest(b"\xff\x00"))));
    let refused = put(&ports, "x;base64", b"x").await.expect_err("a reserved name");
    assert_eq!(refused.kind, PortErrorKind::InvalidPath);
    ports.close().await;
    assert_eq!(put(&ports, "late", b"x").await.expect_err("the task is over").kind, PortErrorKind::LeaseOver);
    assert_eq!(ports.inline().len(), 4);
    drop(ports);
    assert_eq!(budget.in_flight(), 0);
}

#[tokio::test]
async fn results_have_a_size_limit() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ports = ports(dir.path(), &[], &Budget::unlimited());
    let half = vec![b'a'; INLINE_BYTES_MAX / 2 - 8];
    put(&ports, "a", &half).await.expect("there is space");
    put(&ports, "b", &half).await.expect("there is space");
    put(&ports, "b", &half).await.expect("it replaces the first one");
    let refused = put(&ports, "c", &half).await.expect_err("no space");
    assert_eq!(refused.kind, PortErrorKind::Limit);
    assert!(refused.message.contains("at most 3145728 bytes"), "{refused}");
    // Base64 needs four bytes for three.
    let refused = put(&ports, "a", &vec![0xff; INLINE_BYTES_MAX / 2]).await.expect_err("no space");
    assert_eq!(refused.kind, PortErrorKind::Limit);
    std::fs::write(dir.path().join("large"), vec![b'a'; INLINE_BYTES_MAX + 1]).expect("written");
    let refused = ports.put_file(spec("large"), &dir.path().join("large")).await.expect_err("too large");
    assert_eq!(refused.kind, PortErrorKind::Limit);
}
