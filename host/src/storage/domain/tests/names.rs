//! Stored names: two paths that reduce to one, and what becomes of them in a second attempt.

use super::*;

/// What this attempt's report would say: path, name without the task id, id.
fn published(world: &World) -> Vec<[String; 3]> {
    let task = format!("_{TASK}");
    let rows = world.ports.published().into_iter();
    rows.map(|row| [row.logical_path, row.name.replace(&task, ""), row.id.expect("an id")]).collect()
}

#[tokio::test]
async fn two_paths_of_one_name_are_two_artifacts() {
    let world = world().await;
    let one = world.put("a/b.json", b"1").await.expect("stored");
    let two = world.put("a_b.json", b"2").await.expect("stored");
    assert_ne!(one, two);
    assert_eq!(world.put("a_b.json", b"3").await.expect("stored"), two);
    let [[path, name, _], [other_path, other_name, other]] = &published(&world)[..] else { panic!("two artifacts") };
    assert_eq!((path.as_str(), name.as_str()), ("out/a/b.json", "out_a_b_json"), "as every node names it");
    assert_eq!(other_path, "out/a_b.json", "sorted by path");
    assert!(other_name.starts_with("out_a_b_json_") && other_name.len() == "out_a_b_json_".len() + 16, "{other_name}");
    assert_eq!(world.stored(other).bytes, b"3");
    // Another type is another name on the wire.
    world.put("a/b_json", b"4").await.expect("stored");
    assert_eq!(published(&world)[1][1], "out_a_b_json");
}

#[tokio::test]
async fn paths_keep_their_names_in_another_attempt_whichever_comes_first() {
    let first = world().await;
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
async fn another_attempt_of_one_path_takes_over_what_it_stored_before() {
    let first = world().await;
    let id = first.put("a/b.json", b"1").await.expect("stored");
    let again = first.another_attempt();
    assert_eq!(put(&again, &first, "a/b.json", b"2").await, id);
    assert_eq!(first.count("list"), 3, "one more question, and only where something was found");
}

async fn put(ports: &DomainPorts, world: &World, path: &str, bytes: &[u8]) -> Option<String> {
    ports.put_file(spec(path), &world.file(bytes)).await.expect("stored")
}

#[tokio::test]
async fn a_long_path_gets_a_name_that_every_server_takes() {
    let world = world().await;
    let folder = "long".repeat(40);
    for (n, path) in [format!("{folder}/a.json"), format!("{folder}/b.json")].into_iter().enumerate() {
        let id = world.put(&path, b"{}").await.expect("stored").expect("an id");
        let item = world.stored(&id);
        assert_eq!((item.name.len(), world.server.store().items.len()), (128, n + 1));
        assert!(item.name.starts_with("out_longlong") && item.name.ends_with(&TASK.to_string()), "{}", item.name);
    }
}

#[tokio::test]
async fn two_paths_the_runner_gives_one_name_both_stand_for_what_is_stored() {
    // One entry a path, and none that tells of content which is gone.
    let world = world().await;
    let named = |path: &str| ArtifactSpec { name: Some("log".into()), data_type: Some("txt".into()), ..spec(path) };
    for (path, bytes) in [("b", "one"), ("a", "other")] {
        world.ports.put_file(named(path), &world.file(bytes.as_bytes())).await.expect("stored");
    }
    let published = world.ports.published();
    assert_eq!((published[0].logical_path.as_str(), published[1].logical_path.as_str()), ("out/a", "out/b"));
    assert_eq!((published[0].id.clone(), published[0].size), (published[1].id.clone(), Some(5)));
    assert_eq!((published[1].size, &published[1].sha256), (Some(5), &published[0].sha256));
}

#[tokio::test]
async fn a_server_that_stores_another_name_is_not_believed() {
    let world = world().await;
    let answer = |name: &str, kind: &str| json!({"data": [{"id": "d", "name": name, "data_type": kind}]}).to_string();
    let name = format!("out_x_json_{TASK}");
    world.answer("create", 200, "application/json", answer("out", "json"));
    refused(world.put("x.json", b"{}").await, PortErrorKind::Malformed, "stored it under the name out");
    world.answer("create", 200, "application/json", answer(&name, "js"));
    refused(world.put("x.json", b"{}").await, PortErrorKind::Malformed, "stored it as the type js");
    assert!(world.ports.published().is_empty());
    world.answer("create", 200, "application/json", answer(&name, "json"));
    world.put("x.json", b"{}").await.expect("stored");
}
