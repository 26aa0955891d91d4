//! Inputs of runners: a stream of the first part, or all parts on disk.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::{
    Inner,
    transfer::{Arrived, Transfer},
};
use crate::{
    model::{InputMeta, InputStream, Materialized, PortError, PortErrorKind},
    storage::{
        file::FileSink,
        naming::{dataset_file, dataset_folder, for_message},
        zip,
    },
    transport::multipart::PartHead,
};

pub(super) async fn open(inner: &Arc<Inner>, cid: &str) -> Result<Box<dyn InputStream>, PortError> {
    let (transfer, head) = Transfer::begin(inner, cid).await?;
    let meta = meta(cid, head);
    Ok(Box::new(FirstPart { state: State::Running(Box::new(transfer)), inner: Arc::clone(inner), meta }))
}

/// The first part as a stream.
struct FirstPart {
    state: State,
    inner: Arc<Inner>,
    meta: InputMeta,
}

enum State {
    Running(Box<Transfer>),
    /// Its end was returned.
    Ended,
    /// Every later call returns the same error, so that a failure never looks like an end.
    Failed(PortError),
}

#[async_trait]
impl InputStream for FirstPart {
    fn meta(&self) -> &InputMeta {
        &self.meta
    }

    async fn next(&mut self) -> Result<Option<Bytes>, PortError> {
        let state = &mut self.state;
        let next = async {
            let transfer = match state {
                State::Ended => return Ok(None),
                State::Failed(err) => return Err(err.clone()),
                State::Running(transfer) => transfer,
            };
            match transfer.next().await {
                Ok(Arrived::Data(data)) => Ok(Some(data)),
                Ok(_) => {
                    // A stream has only the first part.
                    transfer.read_to_end().await;
                    *state = State::Ended;
                    Ok(None)
                }
                Err(err) => {
                    *state = State::Failed(err.clone());
                    Err(err)
                }
            }
        };
        self.inner.guarded(next).await
    }
}

pub(super) async fn materialize(inner: &Arc<Inner>, cid: &str) -> Result<Materialized, PortError> {
    let (mut transfer, first) = Transfer::begin(inner, cid).await?;
    let root = inner.dir.join(format!("domain-input-{}", Uuid::new_v4()));
    let unfinished = Unfinished(Some(root.clone()));
    let mut taken = HashSet::new();
    let mut files = Vec::new();
    let mut extracted_paths = Vec::new();
    let mut head = Some(first.clone());
    while let Some(part) = head.take() {
        let path = place(&root, &part, &mut taken);
        write_part(&mut transfer, &path).await.map_err(|err| named(err, &path))?;
        extracted_paths.extend(unpack(inner, &root, &part, &path, &mut taken).await?);
        files.push(path);
        head = match transfer.next().await? {
            Arrived::Part(part) => Some(part),
            _ => None,
        };
    }
    transfer.read_to_end().await;
    unfinished.keep();
    let path = files.remove(0);
    let meta = meta(cid, first);
    Ok(Materialized { meta, path, root_dir: root, related_files: files, extracted_paths })
}

/// Unpacks a part that is an archive.
async fn unpack(
    inner: &Inner,
    root: &Path,
    part: &PartHead,
    archive: &Path,
    taken: &mut HashSet<PathBuf>,
) -> Result<Vec<PathBuf>, PortError> {
    let data_type = part.data_type.as_deref().unwrap_or_default();
    if !zip::is_archive(data_type) {
        return Ok(Vec::new());
    }
    let name = part.name.as_deref().unwrap_or_default();
    let into = (1..).map(|number| root.join(zip::folder(data_type, name, number)));
    let into = into.into_iter().find(|into| taken.insert(into.clone()));
    let into = into.expect("the numbers are unlimited");
    let what = format!("archive {}", for_message(name));
    let work = zip::unpacked(&what, archive.to_owned(), into, inner.config.unpack.clone(), Some(inner.tracker.token()));
    tokio::select! {
        biased;
        _ = inner.held.cancel.cancelled() => {
            Err(PortError::new(PortErrorKind::LeaseOver, format!("{what} is not unpacked: the task is cancelled")))
        }
        files = work => files,
    }
}

/// Removes the folder on drop, unless the input is complete.
struct Unfinished(Option<PathBuf>);

impl Unfinished {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(root) = &self.0 {
            // An error does not matter, because the whole task directory is removed later.
            let _ = std::fs::remove_dir_all(root);
        }
    }
}

/// A failure of a local file, or of the transfer into it.
enum WriteError {
    Port(PortError),
    Local(std::io::Error),
}

fn named(err: WriteError, path: &Path) -> PortError {
    match err {
        WriteError::Port(err) => err,
        WriteError::Local(err) => {
            // The control plane gets this text, and it must not see paths of this machine.
            tracing::debug!(path = %path.display(), error = %err, "input file could not be written");
            let name = path.file_name().unwrap_or_default().display();
            PortError::new(PortErrorKind::Local, format!("cannot write input file {name}: {err}"))
        }
    }
}

/// Streams the body of the current part into a new file.
async fn write_part(transfer: &mut Transfer, path: &Path) -> Result<(), WriteError> {
    let target = path.to_owned();
    let file = tokio::task::spawn_blocking(move || {
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::File::create_new(target)
    });
    let file = file.await.map_err(std::io::Error::other).and_then(|made| made).map_err(WriteError::Local)?;
    let mut sink = FileSink::new(file);
    while let Arrived::Data(data) = transfer.next().await.map_err(WriteError::Port)? {
        sink.write(data).await.map_err(WriteError::Local)?;
    }
    sink.finish().await.map_err(WriteError::Local)?;
    Ok(())
}

fn meta(cid: &str, head: PartHead) -> InputMeta {
    let PartHead { id, domain_id, name, data_type, size, .. } = head;
    InputMeta { cid: cid.to_owned(), data_id: id, name, data_type, domain_id, size }
}

/// A path for a part, different from those of all other parts of the answer.
fn place(root: &Path, part: &PartHead, taken: &mut HashSet<PathBuf>) -> PathBuf {
    let name = part.name.as_deref().unwrap_or_default();
    let folder = root.join("datasets").join(dataset_folder(name));
    let (stem, extension) = dataset_file(name, part.data_type.as_deref().unwrap_or_default());
    let mut path = folder.join(format!("{stem}.{extension}"));
    let mut number = 2;
    while !taken.insert(path.clone()) {
        path = folder.join(format!("{stem}_{number}.{extension}"));
        number += 1;
    }
    path
}
