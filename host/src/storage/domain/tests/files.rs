//! Files as a runner names them: which are taken, what is known of them afterwards, and what happens
//! when they change under our hands.

use std::{fs::File, io::Write, path::PathBuf, time::SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::*;
use crate::storage::digest::hex;

fn sha256(bytes: &[u8]) -> Option<String> {
    Some(hex(&Sha256::digest(bytes)))
}

#[tokio::test]
async fn size_and_digest_of_every_artifact_are_known() {
    let world = world().await;
    world.answer("initiate", 404, "text/plain", "");
    let (small, large) = (noise(1000), noise(5 * MIB + 7));
    world.put("spooled.bin", &large).await.expect("stored");
    world.put("small.bin", &small).await.expect("stored");
    world.put("large.bin", &large).await.expect("stored");
    for (path, bytes) in [("stream-small", &small), ("stream-large", &large), ("empty", &Vec::new())] {
        let mut stream = world.ports.create(spec(path)).await.expect("opens");
        for piece in bytes.chunks(100_001) {
            stream.write(Bytes::copy_from_slice(piece)).await.expect("taken");
        }
        stream.finish().await.expect("stored");
    }
    world.put("small.bin", b"changed").await.expect("stored");
    let known: Vec<(String, Option<u64>, Option<String>)> =
        world.ports.published().into_iter().map(|row| (row.logical_path, row.size, row.sha256)).collect();
    let row = |path: &str, bytes: &[u8]| (format!("out/{path}"), Some(bytes.len() as u64), sha256(bytes));
    assert_eq!(
        known,
        [
            row("empty", b""),
            row("large.bin", &large),
            row("small.bin", b"changed"),
            row("spooled.bin", &large),
            row("stream-large", &large),
            row("stream-small", &small),
        ]
    );
}

#[tokio::test]
async fn a_server_that_stored_another_size_is_not_believed() {
    let world = world().await;
    for (at, bytes) in [("create", 10), ("complete", 5 * MIB)] {
        let entry = json!({"id": "d", "size": 9});
        let body = if at == "create" { json!({ "data": [entry] }) } else { entry };
        world.answer(at, 200, "application/json", body.to_string());
        let text = format!("{bytes} bytes were sent, the server stored 9");
        refused(world.put("x.bin", &noise(bytes)).await, PortErrorKind::Malformed, &text);
    }
    assert!(world.ports.published().is_empty());
}

#[cfg(unix)]
#[tokio::test]
async fn only_regular_files_with_content_are_taken() {
    // An empty file is a bad request, before any call.
    use std::os::unix::fs::symlink;
    let world = world().await;
    let dir = world.dir.path();
    let outside = tempfile::tempdir().expect("a temporary directory");
    let secret = outside.path().join("secret");
    std::fs::write(&secret, b"secret").expect("written");
    std::fs::write(dir.join("empty"), b"").expect("written");
    std::fs::create_dir(dir.join("folder")).expect("made");
    symlink(&secret, dir.join("link")).expect("linked");
    symlink(outside.path(), dir.join("way-out")).expect("linked");
    let fifo = rustix::fs::CWD;
    rustix::fs::mkfifoat(fifo, dir.join("fifo"), rustix::fs::Mode::RUSR).expect("made");
    for (path, text) in [
        ("empty", "is empty"),
        ("folder", "is a directory"),
        ("fifo", "is a pipe"),
        ("link", "leads out of the task's directory"),
        ("way-out/secret", "leads out of the task's directory"),
    ] {
        let err = world.ports.put_file(spec("x"), &dir.join(path)).await;
        refused(err, PortErrorKind::BadRequest, text);
    }
    let nowhere = world.ports.put_file(spec("x"), &dir.join("nowhere")).await;
    refused(nowhere, PortErrorKind::Local, "upload of out/x failed: cannot read its file nowhere: ");
    assert_eq!(world.log(), [""; 0], "refused before any request");
    // A workspace of the runner's own, and a link that stays inside, are its business.
    world.ports.put_file(spec("x"), &secret).await.expect("stored");
    let own = world.file(b"own");
    symlink(&own, dir.join("inner")).expect("linked");
    world.ports.put_file(spec("y"), &dir.join("inner")).await.expect("stored");
}

/// A file last written long ago, so that a change shows whatever the clock's steps are.
fn old_file(world: &World, bytes: &[u8]) -> PathBuf {
    let path = world.file(bytes);
    let file = File::options().write(true).open(&path).expect("ours");
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).expect("ours");
    path
}

/// Uploads a file in parts to which `change` happens before the second part.
async fn while_changed(world: &World, bytes: &[u8], change: impl FnOnce(File) + Send + 'static) -> Option<PortError> {
    let path = old_file(world, bytes);
    let file = File::options().write(true).open(&path).expect("ours");
    world.trick("part", Trick::First(Box::new(|| {})));
    world.trick("part", Trick::First(Box::new(move || change(file))));
    world.ports.put_file(spec("x.bin"), &path).await.err()
}

#[tokio::test]
async fn a_file_that_changes_under_the_upload_is_not_published() {
    let world = world_with(|config| config.parallel_parts = 1).await;
    let bytes = noise(5 * MIB);
    let changed = while_changed(&world, &bytes, |mut file| file.write_all(b"other").expect("ours")).await;
    refused(changed.map_or(Ok(()), Err), PortErrorKind::Local, "its file changed while it was uploaded");
    let shorter = while_changed(&world, &bytes, |file| file.set_len(MIB as u64).expect("ours")).await;
    refused(shorter.map_or(Ok(()), Err), PortErrorKind::Local, "it became shorter meanwhile");
    assert_eq!((world.count("complete"), world.count("abort"), world.server.store().uploads.len()), (0, 2, 0));
    assert!(world.ports.published().is_empty());
}

#[tokio::test]
async fn a_file_that_grows_is_published_as_it_was() {
    // Runners publish their logs while they write them.
    let world = world_with(|config| config.parallel_parts = 1).await;
    let bytes = noise(5 * MIB);
    let grown = |mut file: File| {
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).expect("ours");
        file.write_all(b"one more line").expect("ours");
    };
    assert!(while_changed(&world, &bytes, grown).await.is_none());
    let published = &world.ports.published()[0];
    assert_eq!((published.size, &published.sha256), (Some(bytes.len() as u64), &sha256(&bytes)));
    assert!(world.stored(published.id.as_deref().expect("an id")).bytes == bytes);
}

#[tokio::test]
async fn a_small_file_that_changes_is_not_published_either() {
    let world = world().await;
    let path = old_file(&world, b"before");
    let target = path.clone();
    world.trick("create", Trick::First(Box::new(move || std::fs::write(target, b"after!").expect("ours"))));
    let changed = world.ports.put_file(spec("x"), &path).await;
    refused(changed, PortErrorKind::Local, "its file changed while it was uploaded");
    assert!(world.ports.published().is_empty());
}
