//! Artifacts written piece by piece.
//!
//! A separate task takes the pieces from a channel of one, so the runner waits while the store is slower.
//! Up to 4 MiB are held in memory. A shorter artifact is sent in one request. A longer one is sent in parts,
//! or through a file in the task's directory if the server offers no parts. Memory is bounded by the parts
//! in transfer and the part that is being filled.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    Inner,
    info::Limits,
    source::Source,
    upload::{Plan, Stored, Whole},
    uploads_in_parts::PartsUpload,
};
use crate::{
    model::{ArtifactSpec, Charge, Coordinates, OutputStream, PortError, PortErrorKind},
    storage::{
        digest::{Digester, hex},
        file::FileSink,
    },
};

/// Parts up to this size are filled in memory, larger ones in a file.
const PART_MEMORY_BYTES_MAX: u64 = 4 * 1024 * 1024;

enum Message {
    Piece(Bytes),
    Finish,
}

pub(super) fn create(inner: &Arc<Inner>, spec: ArtifactSpec) -> Result<Box<dyn OutputStream>, PortError> {
    let plan = inner.plan(spec)?;
    let (pieces, taken) = mpsc::channel(1);
    let shared = Arc::clone(inner);
    let driver = inner.tracker.spawn(async move {
        let writing = write(&shared, plan, Pieces { taken, digester: Digester::new() });
        shared.guarded(writing).await
    });
    Ok(Box::new(Writer { pieces, end: End::Running(driver), inner: Arc::clone(inner) }))
}

/// The runner's side.
struct Writer {
    pieces: mpsc::Sender<Message>,
    end: End,
    inner: Arc<Inner>,
}

enum End {
    Running(JoinHandle<Result<String, PortError>>),
    Failed(PortError),
}

impl Writer {
    /// Why the task takes no more pieces.
    async fn failure(&mut self) -> PortError {
        let err = match &mut self.end {
            End::Failed(err) => return err.clone(),
            End::Running(driver) => match driver.await {
                Ok(Err(err)) => err,
                // It succeeds only after `Finish`, which consumes the writer.
                Ok(Ok(_)) => PortError::new(PortErrorKind::Other, "the artifact is already complete"),
                Err(err) => internal(&err),
            },
        };
        self.end = End::Failed(err.clone());
        err
    }
}

fn internal(err: &tokio::task::JoinError) -> PortError {
    PortError::new(PortErrorKind::Other, format!("the upload's task ended unexpectedly: {err}"))
}

#[async_trait]
impl OutputStream for Writer {
    async fn write(&mut self, piece: Bytes) -> Result<(), PortError> {
        self.inner.check_held().await?;
        match self.pieces.send(Message::Piece(piece)).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.failure().await),
        }
    }

    async fn finish(mut self: Box<Self>) -> Result<Option<String>, PortError> {
        self.inner.check_held().await?;
        if self.pieces.send(Message::Finish).await.is_err() {
            return Err(self.failure().await);
        }
        match self.end {
            End::Failed(err) => Err(err),
            End::Running(driver) => driver.await.map_err(|err| internal(&err))?.map(Some),
        }
    }

    async fn abort(self: Box<Self>) {
        let Self { pieces, end, .. } = *self;
        drop(pieces);
        if let End::Running(driver) = end {
            // Its only result is the error of the abort.
            let _ = driver.await;
        }
    }
}

/// The pieces that the runner writes, and their digest.
struct Pieces {
    taken: mpsc::Receiver<Message>,
    digester: Digester,
}

impl Pieces {
    async fn recv(&mut self) -> Option<Message> {
        self.taken.recv().await
    }

    /// Hashes a piece, once.
    async fn hash(&mut self, piece: &Bytes) -> Result<(), PortError> {
        self.digester.push(piece.clone()).await.map_err(|err| hash_failed(&err))
    }

    async fn digest(&mut self) -> Result<String, PortError> {
        self.digester.so_far().await.map(|digest| hex(&digest)).map_err(|err| hash_failed(&err))
    }
}

fn hash_failed(err: &std::io::Error) -> PortError {
    PortError::new(PortErrorKind::Other, format!("the upload could not be hashed: {err}"))
}

/// The store's side: sends the artifact, and returns its id.
async fn write(inner: &Arc<Inner>, mut plan: Plan, mut pieces: Pieces) -> Result<String, PortError> {
    let mut held = BytesMut::new();
    let mut limits = None;
    // Hold pieces in memory up to the limit of one request. `more` is the piece that exceeds it.
    let more = loop {
        match pieces.recv().await {
            None => return Err(abandoned(&plan)),
            Some(Message::Piece(piece)) => {
                pieces.hash(&piece).await?;
                let length = held.len() as u64 + piece.len() as u64;
                check_overrun(&plan, length)?;
                let limits = known(inner, &mut limits).await?;
                limits.check(&plan, length.max(plan.size.unwrap_or(0)))?;
                if length > limits.single_bytes_max(&plan) {
                    break piece;
                }
                held.extend_from_slice(&piece);
            }
            Some(Message::Finish) => {
                let size = held.len() as u64;
                plan.check_size(size)?;
                let at = inner.coordinates().await?;
                let existing = inner.existing(&at, &mut plan).await?;
                let (plan, source) = (Arc::new(plan), Source::from(held.freeze()));
                let stored = match inner.put_whole(&at, &plan, existing, source.clone(), true).await? {
                    Whole::Stored(stored) => stored,
                    Whole::InParts(upload) => upload.send(source).await?,
                };
                return Ok(inner.add_published(&plan, stored, size, pieces.digest().await?));
            }
        }
    };
    let opening = [held.freeze(), more];
    let at = inner.coordinates().await?;
    let existing = inner.existing(&at, &mut plan).await?;
    let limits = known(inner, &mut limits).await?;
    let plan = Arc::new(plan);
    let upload = match limits.parts {
        true => PartsUpload::begin(inner, &at, &plan, existing.as_ref(), plan.size).await?,
        false => None,
    };
    let (stored, size) = match upload {
        Some(upload) => write_parts(inner, &plan, limits, upload, opening, &mut pieces).await?,
        None => {
            let source = spool(inner, &plan, limits, opening, &mut pieces).await?;
            let size = source.length();
            let stored = match inner.put_whole(&at, &plan, existing, source.clone(), !limits.parts).await? {
                Whole::Stored(stored) => stored,
                Whole::InParts(upload) => upload.send(source).await?,
            };
            (stored, size)
        }
    };
    Ok(inner.add_published(&plan, stored, size, pieces.digest().await?))
}

/// The server's limits. They are requested with the first piece.
async fn known(inner: &Inner, limits: &mut Option<Limits>) -> Result<Limits, PortError> {
    if let Some(limits) = *limits {
        return Ok(limits);
    }
    let at: Coordinates = inner.coordinates().await?;
    Ok(*limits.insert(inner.limits(&at.server).await))
}

async fn write_parts(
    inner: &Inner,
    plan: &Plan,
    limits: Limits,
    mut upload: PartsUpload,
    opening: [Bytes; 2],
    pieces: &mut Pieces,
) -> Result<(Stored, u64), PortError> {
    match fill_parts(inner, plan, limits, &mut upload, opening, pieces).await {
        Ok(size) => Ok((upload.complete().await?, size)),
        Err(err) => upload.fail(err).await,
    }
}

async fn fill_parts(
    inner: &Inner,
    plan: &Plan,
    limits: Limits,
    upload: &mut PartsUpload,
    opening: [Bytes; 2],
    pieces: &mut Pieces,
) -> Result<u64, PortError> {
    let mut total = 0;
    let mut part = Filling::new(inner, plan, upload.part_size)?;
    let mut opening = opening.into_iter();
    loop {
        let message = match opening.next() {
            Some(piece) => Some(Message::Piece(piece)),
            // Parts in transfer make progress, and fail early, while the runner works.
            None => tokio::select! {
                message = pieces.recv() => {
                    if let Some(Message::Piece(piece)) = &message {
                        pieces.hash(piece).await?;
                    }
                    message
                }
                arrived = upload.arrived() => {
                    arrived?;
                    continue;
                }
            },
        };
        match message {
            None => return Err(abandoned(plan)),
            Some(Message::Piece(mut piece)) => {
                total += piece.len() as u64;
                check_overrun(plan, total)?;
                limits.check(plan, total)?;
                while !piece.is_empty() {
                    if part.left == 0 {
                        let full = std::mem::replace(&mut part, Filling::new(inner, plan, upload.part_size)?);
                        upload.push(full.close(plan).await?).await?;
                    }
                    let take = usize::try_from(part.left).unwrap_or(usize::MAX).min(piece.len());
                    part.take(plan, piece.split_to(take)).await?;
                }
            }
            Some(Message::Finish) => {
                plan.check_size(total)?;
                upload.push(part.close(plan).await?).await?;
                return Ok(total);
            }
        }
    }
}

/// The part that is being filled.
struct Filling {
    left: u64,
    length: u64,
    store: Store,
}

enum Store {
    Memory(BytesMut, Charge),
    File(FileSink),
}

impl Filling {
    fn new(inner: &Inner, plan: &Plan, size: u64) -> Result<Self, PortError> {
        let store = if size <= PART_MEMORY_BYTES_MAX {
            // The whole size at once, because growth by doubling would need up to twice as much.
            Store::Memory(BytesMut::with_capacity(size as usize), inner.config.budget.count(size))
        } else {
            Store::File(spool_file(inner, plan)?)
        };
        Ok(Self { left: size, length: 0, store })
    }

    async fn take(&mut self, plan: &Plan, piece: Bytes) -> Result<(), PortError> {
        self.left -= piece.len() as u64;
        self.length += piece.len() as u64;
        match &mut self.store {
            // Copied, so that a small piece does not hold a large buffer of the runner.
            Store::Memory(bytes, _) => bytes.extend_from_slice(&piece),
            Store::File(sink) => sink.write(piece).await.map_err(|err| local(plan, &err))?,
        }
        Ok(())
    }

    async fn close(self, plan: &Plan) -> Result<Source, PortError> {
        match self.store {
            Store::Memory(bytes, charge) => Ok(charge.tie(bytes).into()),
            Store::File(sink) => {
                let file = sink.finish().await.map_err(|err| local(plan, &err))?;
                Ok(Source::File { file: Arc::new(file), offset: 0, length: self.length })
            }
        }
    }
}

/// Writes everything to a file, for a server that accepts only one request.
async fn spool(
    inner: &Inner,
    plan: &Plan,
    limits: Limits,
    opening: [Bytes; 2],
    pieces: &mut Pieces,
) -> Result<Source, PortError> {
    let mut whole = Filling { left: u64::MAX, length: 0, store: Store::File(spool_file(inner, plan)?) };
    for piece in opening {
        whole.take(plan, piece).await?;
    }
    loop {
        match pieces.recv().await {
            None => return Err(abandoned(plan)),
            Some(Message::Piece(piece)) => {
                pieces.hash(&piece).await?;
                whole.take(plan, piece).await?;
                check_overrun(plan, whole.length)?;
                limits.check(plan, whole.length)?;
            }
            Some(Message::Finish) => {
                plan.check_size(whole.length)?;
                return whole.close(plan).await;
            }
        }
    }
}

/// A file without a name in the task's directory. It is removed when it is closed.
fn spool_file(inner: &Inner, plan: &Plan) -> Result<FileSink, PortError> {
    tempfile::tempfile_in(&inner.dir).map(FileSink::new).map_err(|err| local(plan, &err))
}

fn local(plan: &Plan, err: &std::io::Error) -> PortError {
    let message = format!("{} failed: cannot write to the task's directory: {err}", plan.what);
    PortError::new(PortErrorKind::Local, message)
}

/// Refuses an artifact as soon as it is longer than promised.
fn check_overrun(plan: &Plan, so_far: u64) -> Result<(), PortError> {
    if plan.size.is_some_and(|promised| so_far > promised) { plan.check_size(so_far) } else { Ok(()) }
}

fn abandoned(plan: &Plan) -> PortError {
    PortError::new(PortErrorKind::Other, format!("{} was aborted before its end; nothing is published", plan.what))
}
