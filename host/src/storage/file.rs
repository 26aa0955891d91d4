//! Files as streams: written behind the network, read ahead of it.
//!
//! Disk calls run on the blocking pool and overlap with the transfer. Bytes in the page cache are read
//! directly, because that takes less time than a hand-over to the pool.

use std::{
    fs::File,
    io::{self, Write},
    sync::Arc,
};

use bytes::Bytes;
use tokio::task::{JoinHandle, spawn_blocking};

use super::piece_queue::{PieceQueue, Processor};

/// Bytes of one read or write.
pub(crate) const BLOCK_BYTES: usize = 256 * 1024;

/// Writes a stream of pieces to a file.
pub(crate) struct FileSink(PieceQueue<Disk>);

/// `None` after the file was returned.
struct Disk(Option<File>);

impl Processor for Disk {
    fn process(&mut self, piece: &Bytes) -> io::Result<()> {
        self.0.as_mut().ok_or(io::ErrorKind::NotFound)?.write_all(piece)
    }
}

impl FileSink {
    pub(crate) fn new(file: File) -> Self {
        Self(PieceQueue::new(Disk(Some(file))))
    }

    /// Writes a piece. Waits only while four blocks are queued.
    pub(crate) async fn write(&mut self, piece: Bytes) -> io::Result<()> {
        self.0.push(piece).await
    }

    /// Writes the rest and returns the file.
    pub(crate) async fn finish(mut self) -> io::Result<File> {
        let file = self.0.when_processed(|disk| disk.0.take()).await?;
        Ok(file.expect("returned once"))
    }
}

/// Reads a range of a file block by block: directly while it is in the page cache, then one block ahead.
pub(crate) struct FileBlocks {
    file: Arc<File>,
    at: u64,
    left: u64,
    ahead: Option<JoinHandle<io::Result<Bytes>>>,
    /// All reads so far came from the page cache.
    in_memory: bool,
}

impl FileBlocks {
    pub(crate) fn new(file: Arc<File>, offset: u64, length: u64) -> Self {
        Self { file, at: offset, left: length, ahead: None, in_memory: true }
    }

    /// The next block. `None` at the end. A file that became shorter is an error.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        if self.in_memory && self.left > 0 {
            let mut block = vec![0; self.size()];
            match read_from_memory(&self.file, &mut block, self.at) {
                0 => self.in_memory = false,
                read => {
                    block.truncate(read);
                    self.at += read as u64;
                    self.left -= read as u64;
                    return Ok(Some(block.into()));
                }
            }
        }
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
        let size = self.size();
        let (file, at) = (Arc::clone(&self.file), self.at);
        self.at += size as u64;
        self.left -= size as u64;
        self.ahead = Some(spawn_blocking(move || {
            let mut block = vec![0; size];
            read_exact_at(&file, &mut block, at)?;
            Ok(block.into())
        }));
    }

    /// Bytes of the next block.
    fn size(&self) -> usize {
        self.left.min(BLOCK_BYTES as u64) as usize
    }
}

/// Reads what the page cache holds. 0 at the end, and on systems without such a read.
#[cfg(target_os = "linux")]
fn read_from_memory(file: &File, block: &mut [u8], at: u64) -> usize {
    let mut into = [io::IoSliceMut::new(block)];
    rustix::io::preadv2(file, &mut into, at, rustix::io::ReadWriteFlags::NOWAIT).unwrap_or(0)
}

#[cfg(not(target_os = "linux"))]
fn read_from_memory(_: &File, _: &mut [u8], _: u64) -> usize {
    0
}

/// Fills `block` from offset `at`. A file that ends before is an `UnexpectedEof` with a clear text.
pub(crate) fn read_exact_at(file: &File, block: &mut [u8], at: u64) -> io::Result<()> {
    fill(file, block, at).map_err(|err| match err.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(err.kind(), "the file became shorter meanwhile"),
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
    async fn written_pieces_are_read_in_blocks() {
        let bytes: Vec<u8> = (0..BLOCK_BYTES * 3 + 17).map(|n| (n % 251) as u8).collect();
        let mut sink = FileSink::new(tempfile::tempfile().expect("a temporary file"));
        for piece in bytes.chunks(100_001) {
            sink.write(Bytes::copy_from_slice(piece)).await.expect("written");
        }
        let file = Arc::new(sink.finish().await.expect("finished"));
        // Both from the page cache and from the disk.
        for in_memory in [true, false] {
            let mut blocks = FileBlocks::new(Arc::clone(&file), 5, bytes.len() as u64 - 5);
            blocks.in_memory = in_memory;
            let mut back = Vec::new();
            while let Some(block) = blocks.next().await.expect("read") {
                assert!(block.len() <= BLOCK_BYTES);
                back.extend_from_slice(&block);
            }
            assert!(back == bytes[5..]);
        }
        let mut beyond = FileBlocks::new(file, bytes.len() as u64, 1);
        assert_eq!(beyond.next().await.expect_err("too short").kind(), io::ErrorKind::UnexpectedEof);
    }
}
