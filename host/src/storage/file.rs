//! Files as streams: written behind the back of the network, read ahead of it.
//!
//! Disk calls run on the blocking pool, one at a time per file, and overlap with the transfer.
//! At most two blocks of a file are in memory.

use std::{
    fs::File,
    io::{self, Write},
    sync::Arc,
};

use bytes::Bytes;
use tokio::task::{JoinHandle, spawn_blocking};

/// How much is read or written at once.
pub(crate) const BLOCK_BYTES: usize = 256 * 1024;

/// Writes a stream of pieces to a file.
pub(crate) struct FileSink {
    /// `None` while a block is being written.
    file: Option<File>,
    writing: Option<JoinHandle<io::Result<File>>>,
    waiting: Vec<Bytes>,
    waiting_bytes: usize,
}

impl FileSink {
    pub(crate) fn new(file: File) -> Self {
        Self { file: Some(file), writing: None, waiting: Vec::new(), waiting_bytes: 0 }
    }

    /// Takes a piece; waits for the disk only when a whole block is waiting.
    pub(crate) async fn write(&mut self, piece: Bytes) -> io::Result<()> {
        self.waiting_bytes += piece.len();
        self.waiting.push(piece);
        if self.waiting_bytes >= BLOCK_BYTES {
            self.settle().await?;
            self.begin();
        }
        Ok(())
    }

    /// Writes what is left and gives the file back.
    pub(crate) async fn finish(mut self) -> io::Result<File> {
        self.settle().await?;
        self.begin();
        self.settle().await?;
        Ok(self.file.take().expect("settled, so the file is here"))
    }

    async fn settle(&mut self) -> io::Result<()> {
        if let Some(writing) = &mut self.writing {
            let written = writing.await.map_err(io::Error::other);
            self.writing = None;
            self.file = Some(written??);
        }
        Ok(())
    }

    fn begin(&mut self) {
        // After a failed write the file is gone with its error; there is nothing to write to.
        let Some(mut file) = self.file.take() else { return };
        let pieces = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        self.writing = Some(spawn_blocking(move || {
            for piece in pieces {
                file.write_all(&piece)?;
            }
            Ok(file)
        }));
    }
}

/// Reads a range of a file block by block, one block ahead.
pub(crate) struct FileBlocks {
    file: Arc<File>,
    at: u64,
    left: u64,
    ahead: Option<JoinHandle<io::Result<Bytes>>>,
}

impl FileBlocks {
    pub(crate) fn new(file: Arc<File>, offset: u64, length: u64) -> Self {
        Self { file, at: offset, left: length, ahead: None }
    }

    /// The next block; `None` at the end. A file that became shorter is an error.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if self.ahead.is_none() {
            self.begin();
        }
        let Some(ahead) = &mut self.ahead else { return Ok(None) };
        let block = ahead.await.map_err(io::Error::other);
        self.ahead = None;
        let block = block??;
        self.begin();
        Ok(Some(block))
    }

    fn begin(&mut self) {
        if self.left == 0 {
            return;
        }
        let size = self.left.min(BLOCK_BYTES as u64) as usize;
        let (file, at) = (Arc::clone(&self.file), self.at);
        self.at += size as u64;
        self.left -= size as u64;
        self.ahead = Some(spawn_blocking(move || {
            let mut block = vec![0; size];
            read_exact_at(&file, &mut block, at)?;
            Ok(block.into())
        }));
    }
}

/// Fills `block` from `at` on. A file that ends before is an `UnexpectedEof` that says so.
pub(crate) fn read_exact_at(file: &File, block: &mut [u8], at: u64) -> io::Result<()> {
    fill(file, block, at).map_err(|err| match err.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(err.kind(), "it became shorter meanwhile"),
        _ => err,
    })
}

#[cfg(unix)]
fn fill(file: &File, block: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, block, at)
}

#[cfg(windows)]
fn fill(file: &File, mut block: &mut [u8], mut at: u64) -> io::Result<()> {
    while !block.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, block, at)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        block = &mut block[read..];
        at += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_in_pieces_is_read_in_blocks() {
        let bytes: Vec<u8> = (0..BLOCK_BYTES * 3 + 17).map(|n| (n % 251) as u8).collect();
        let mut sink = FileSink::new(tempfile::tempfile().expect("a temporary file"));
        for piece in bytes.chunks(100_001) {
            sink.write(Bytes::copy_from_slice(piece)).await.expect("written");
        }
        let file = Arc::new(sink.finish().await.expect("finished"));
        let mut blocks = FileBlocks::new(Arc::clone(&file), 5, bytes.len() as u64 - 5);
        let mut back = Vec::new();
        while let Some(block) = blocks.next().await.expect("read") {
            assert!(block.len() <= BLOCK_BYTES);
            back.extend_from_slice(&block);
        }
        assert_eq!(back, bytes[5..]);
        let mut beyond = FileBlocks::new(file, bytes.len() as u64, 1);
        assert_eq!(beyond.next().await.expect_err("too short").kind(), io::ErrorKind::UnexpectedEof);
    }
}
