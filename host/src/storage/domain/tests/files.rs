//! Files of a runner: which are accepted, their size and digest, and changes during the upload.

use std::{fs::File, io::Write, path::PathBuf, time::SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::*;
use crate::storage::digest::hex;

fn sha256(bytes: &[u8]) -> Option<String> {
    Some(hex(&Sha256::digest(bytes)))
}

#[tokio::test]
async fn artifacts_have_size_and_digest() {
    let fixture = fixture().await;
    fixture.answer("initiate", 404, "text/plain", "");
    let (small, large) = (noise(1000), noise(5 * MIB + 7));
    fixture.put("spooled.bin", &large).await.expect("stored");
    fixture.put("small.bin", &small).await.expect("stored");
    fixture.put("large.bin", &large).await.expect("stored");
    for (path, bytes) in [("stream-small", &small), ("stream-large", &large), ("empty", &Vec::new())] {
        let mut stream = fixture.ports.create(spec(path)).await.expect("opens");
        for piece in bytes.chunks(100_001) {
            stream.write(Bytes::copy_from_slice(piece)).await.expect("taken");
        }
        stream.finish().await.expect("stored");
    }
    fixture.put("small.bin", b"changed").await.expect("stored");
    let known: Vec<(String, Option<u64>, Option<String>)> =
        fixture.ports.published().into_iter().map(|row| (row.logical_path, row.size, row.sha256)).collect();
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
async fn other_stored_size_is_an_error() {
    let fixture = fixture().await;
    for (at, bytes) in [("create", 10), ("complete", 5 * MIB)] {
        let entry = json!({"id": "d", "size": 9});
        let body = if at == "create" { json!({ "data": [entry] }) } else { entry };
        fixture.answer(at, 200, "application/json", body.to_string());
        let text = format!("{bytes} bytes were sent, the server stored 9");
        refused(fixture.put("x.bin", &noise(bytes)).await, PortErrorKind::Malformed, &text);
    }
    assert!(fixture.ports.published().is_empty());
}

#[cfg(unix)]
#[tokio::test]
async fn only_regular_files_with_content_are_accepted() {
    // An empty file is a bad request, before any call.
    use std::os::unix::fs::symlink;
    let fixture = fixture().await;
    let dir = fixture.dir.path();
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
        let err = fixture.ports.put_file(spec("x"), &dir.join(path)).await;
        refused(err, PortErrorKind::BadRequest, text);
    }
    let nowhere = fixture.ports.put_file(spec("x"), &dir.join("nowhere")).await;
    refused(nowhere, PortErrorKind::Local, "upload of out/x failed: cannot read its file nowhere: ");
    assert_eq!(fixture.log(), [""; 0], "refused before any request");
    // Files elsewhere, and links that stay in the directory, are allowed.
    fixture.ports.put_file(spec("x"), &secret).await.expect("stored");
    let own = fixture.file(b"own");
    symlink(&own, dir.join("inner")).expect("linked");
    fixture.ports.put_file(spec("y"), &dir.join("inner")).await.expect("stored");
}

/// A file with an old time of change, so that a change is visible with a coarse clock too.
fn old_file(fixture: &Fixture, bytes: &[u8]) -> PathBuf {
    let path = fixture.file(bytes);
    let file = File::options().write(true).open(&path).expect("the file is writable");
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).expect("the file is writable");
    path
}

/// Uploads a file in parts. `change` runs before the second part.
async fn while_changed(
    fixture: &Fixture,
    bytes: &[u8],
    change: impl FnOnce(File) + Send + 'static,
) -> Option<PortError> {
    let path = old_file(fixture, bytes);
    let file = File::options().write(true).open(&path).expect("the file is writable");
    fixture.fault("part", Fault::First(Box::new(|| {})));
    fixture.fault("part", Fault::First(Box::new(move || change(file))));
    fixture.ports.put_file(spec("x.bin"), &path).await.err()
}

#[tokio::test]
async fn large_file_changed_during_upload_is_not_published() {
    let fixture = fixture_with(|config| config.parallel_parts = 1).await;
    let bytes = noise(5 * MIB);
    let changed =
        while_changed(&fixture, &bytes, |mut file| file.write_all(b"other").expect("the file is writable")).await;
    refused(changed.map_or(Ok(()), Err), PortErrorKind::Local, "its file changed while it was uploaded");
    let shorter = while_changed(&fixture, &bytes, |file| file.set_len(MIB as u64).expect("the file is writable")).await;
    refused(shorter.map_or(Ok(()), Err), PortErrorKind::Local, "the file became shorter meanwhile");
    assert_eq!((fixture.count("complete"), fixture.count("abort"), fixture.server.store().uploads.len()), (0, 2, 0));
    assert!(fixture.ports.published().is_empty());
}

#[tokio::test]
async fn growing_file_is_published_with_its_first_size() {
    // Runners publish their logs while they write them.
    let fixture = fixture_with(|config| config.parallel_parts = 1).await;
    let bytes = noise(5 * MIB);
    let grown = |mut file: File| {
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).expect("the file is writable");
        file.write_all(b"one more line").expect("the file is writable");
    };
    assert!(while_changed(&fixture, &bytes, grown).await.is_none());
    let published = &fixture.ports.published()[0];
    assert_eq!((published.size, &published.sha256), (Some(bytes.len() as u64), &sha256(&bytes)));
    assert!(fixture.stored(published.id.as_deref().expect("an id")).bytes == bytes);
}

#[tokio::test]
async fn small_file_changed_during_upload_is_not_published() {
    let fixture = fixture().await;
    let path = old_file(&fixture, b"before");
    let target = path.clone();
    fixture.fault(
        "create",
        Fault::First(Box::new(move || std::fs::write(target, b"after!").expect("the file is writable"))),
    );
    let changed = fixture.ports.put_file(spec("x"), &path).await;
    refused(changed, PortErrorKind::Local, "its file changed while it was uploaded");
    assert!(fixture.ports.published().is_empty());
}
