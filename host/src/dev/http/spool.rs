//! Streams bodies to and from the disk in chunks. Each chunk is moved, not copied.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    mem,
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{Stream, stream};
use tokio::task::spawn_blocking;

use crate::dev::uploads::WriteLock;

/// Bytes read from or written to a file at once.
const CHUNK_BYTES: usize = 256 * 1024;

/// A range of a file. It ends early if the file is shorter.
pub(super) fn chunks(file: File, from: u64, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::try_unfold((file, from, length), |(mut file, at, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let read = move || {
            let size = left.min(CHUNK_BYTES as u64);
            let mut chunk = Vec::with_capacity(size as usize);
            file.seek(SeekFrom::Start(at))?;
            (&mut file).take(size).read_to_end(&mut chunk)?;
            Ok::<_, io::Error>((file, Bytes::from(chunk)))
        };
        let (file, chunk) = spawn_blocking(read).await.map_err(io::Error::other)??;
        let size = chunk.len() as u64;
        Ok((size > 0).then_some((chunk, (file, at + size, left - size))))
    })
}

/// Writes chunks to a file, from the file's current position.
pub(super) struct Spool {
    /// `None` after an error.
    file: Option<File>,
    write_lock: WriteLock,
    pieces: Vec<Bytes>,
    /// Total size of `pieces`.
    bytes: usize,
}

impl Spool {
    pub(super) fn new(file: File, write_lock: WriteLock) -> Self {
        Self { file: Some(file), write_lock, pieces: Vec::new(), bytes: 0 }
    }

    /// Adds bytes, and writes when a chunk is complete.
    pub(super) async fn push(&mut self, piece: Bytes) -> io::Result<()> {
        self.bytes += piece.len();
        self.pieces.push(piece);
        if self.bytes >= CHUNK_BYTES { self.flush().await } else { Ok(()) }
    }

    /// Writes the remaining bytes.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        let mut file = self.file.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let pieces = mem::take(&mut self.pieces);
        self.bytes = 0;
        let write_lock = Arc::clone(&self.write_lock).lock_owned().await;
        let write = move || {
            let _write_lock = write_lock; // held until the write ends, also if the caller was dropped
            pieces.iter().try_for_each(|piece| file.write_all(piece))?;
            Ok::<_, io::Error>(file)
        };
        let file = spawn_blocking(write).await.map_err(io::Error::other)??;
        self.file = Some(file);
        Ok(())
    }
}
