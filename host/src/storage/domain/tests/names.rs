//! Stored names of two paths that reduce to one name, also in a second attempt.

use super::*;

/// The published artifacts: path, name without the task id, id.
fn published(fixture: &Fixture) -> Vec<[String; 3]> {
    let task = format!("_{TASK}");
    let rows = fixture.ports.published().into_iter();
    rows.map(|row| [row.logical_path, row.name.replace(&task, ""), row.id.expect("an id")]).collect()
}

#[tokio::test]
async fn two_paths_of_one_name_are_separate() {
    let fixture = fixture().await;
    let one = fixture.put("a/b.json", b"1").await.expect("stored");
    let two = fixture.put("a_b.json", b"2").await.expect("stored");
    assert_ne!(one, two);
    assert_eq!(fixture.put("a_b.json", b"3").await.expect("stored"), two);
    let [[path, name, _], [other_path, other_name, other]] = &published(&fixture)[..] else { panic!("two artifacts") };
    assert_eq!((path.as_str(), name.as_str()), ("out/a/b.json", "out_a_b_json"), "as every node names it");
    assert_eq!(other_path, "out/a_b.json", "sorted by path");
    assert!(other_name.starts_with("out_a_b_json_") && other_name.len() == "out_a_b_json_".len() + 16, "{other_name}");
    assert_eq!(fixture.stored(other).bytes, b"3");
    // Another type is another name on the wire.
    fixture.put("a/b_json", b"4").await.expect("stored");
    assert_eq!(published(&fixture)[1][1], "out_a_b_json");
}

#[tokio::test]
async fn paths_keep_their_names_in_another_attempt() {
    let first = fixture().await;
    first.put("a/b.json", b"1").await.expect("stored");
    first.put("a_b.json", b"2").await.expect("stored");
    let before = published(&first);
    for order in [["a/b.json", "a_b.json"], ["a_b.json", "a/b.json"]] {
        let again = first.another_attempt();
        for path in order {
            put(&again, &first, path, path.as_bytes()).await;
        }
        let after: Vec<[String; 3]> = again
            .published()
            .into_iter()
            .map(|row| [row.logical_path, row.name.replace(&format!("_{TASK}"), ""), row.id.expect("an id")])
            .collect();
        assert_eq!(after, before, "{order:?}");
        for [path, _, id] in after {
            assert_eq!(first.stored(&id).bytes, path.trim_start_matches("out/").as_bytes(), "{order:?}");
        }
    }
    assert_eq!(first.server.store().items.len(), 2, "updated, not doubled");
}

#[tokio::test]
async fn another_attempt_replaces_its_earlier_artifact() {
    let first = fixture().await;
    let id = first.put("a/b.json", b"1").await.expect("stored");
    let again = first.another_attempt();
    assert_eq!(put(&again, &first, "a/b.json", b"2").await, id);
    assert_eq!(first.count("list"), 3, "one more question, and only where something was found");
}

async fn put(ports: &DomainPorts, fixture: &Fixture, path: &str, bytes: &[u8]) -> Option<String> {
    ports.put_file(spec(path), &fixture.file(bytes)).await.expect("stored")
}

#[tokio::test]
async fn long_paths_get_names_that_servers_accept() {
    let fixture = fixture().await;
    let folder = "long".repeat(40);
    for (n, path) in [format!("{folder}/a.json"), format!("{folder}/b.json")].into_iter().enumerate() {
        let id = fixture.put(&path, b"{}").await.expect("stored").expect("an id");
        let item = fixture.stored(&id);
        assert_eq!((item.name.len(), fixture.server.store().items.len()), (128, n + 1));
        assert!(item.name.starts_with("out_longlong") && item.name.ends_with(&TASK.to_string()), "{}", item.name);
    }
}

#[tokio::test]
async fn paths_with_one_given_name_share_the_data() {
    // One entry per path, each with the current size and digest.
    let fixture = fixture().await;
    let named = |path: &str| ArtifactSpec { name: Some("log".into()), data_type: Some("txt".into()), ..spec(path) };
    for (path, bytes) in [("b", "one"), ("a", "other")] {
        fixture.ports.put_file(named(path), &fixture.file(bytes.as_bytes())).await.expect("stored");
    }
    let published = fixture.ports.published();
    assert_eq!((published[0].logical_path.as_str(), published[1].logical_path.as_str()), ("out/a", "out/b"));
    assert_eq!((published[0].id.clone(), published[0].size), (published[1].id.clone(), Some(5)));
    assert_eq!((published[1].size, &published[1].sha256), (Some(5), &published[0].sha256));
}

#[tokio::test]
async fn other_stored_name_is_an_error() {
    let fixture = fixture().await;
    let answer = |name: &str, kind: &str| json!({"data": [{"id": "d", "name": name, "data_type": kind}]}).to_string();
    let name = format!("out_x_json_{TASK}");
    fixture.answer("create", 200, "application/json", answer("out", "json"));
    refused(fixture.put("x.json", b"{}").await, PortErrorKind::Malformed, "stored it under the name out");
    fixture.answer("create", 200, "application/json", answer(&name, "js"));
    refused(fixture.put("x.json", b"{}").await, PortErrorKind::Malformed, "stored it as the type js");
    assert!(fixture.ports.published().is_empty());
    fixture.answer("create", 200, "application/json", answer(&name, "json"));
    fixture.put("x.json", b"{}").await.expect("stored");
}
