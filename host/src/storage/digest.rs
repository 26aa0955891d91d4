//! SHA-256 of what streams by.
//!
//! Hashing takes longer than copying, so it runs on the blocking pool, one block at a time, while
//! the next block arrives. At most two blocks wait in memory.

use std::io;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::task::{JoinHandle, spawn_blocking};

use super::file::BLOCK_BYTES;

/// Fewer bytes than this are hashed in place: that takes less than handing them over.
const IN_PLACE_BYTES_MAX: usize = 16 * 1024;

/// See the module's text.
pub(crate) struct Digester {
    /// `None` while a block is being hashed.
    state: Option<Sha256>,
    hashing: Option<JoinHandle<Sha256>>,
    waiting: Vec<Bytes>,
    waiting_bytes: usize,
}

impl Digester {
    pub(crate) fn new() -> Self {
        Self { state: Some(Sha256::new()), hashing: None, waiting: Vec::new(), waiting_bytes: 0 }
    }

    /// Takes the next piece; waits only while two blocks are on their way.
    pub(crate) async fn push(&mut self, piece: Bytes) -> io::Result<()> {
        self.waiting_bytes += piece.len();
        self.waiting.push(piece);
        if self.waiting_bytes >= BLOCK_BYTES {
            self.settle().await?;
            let mut state = self.state.take().expect("settled, so the state is here");
            let pieces = std::mem::take(&mut self.waiting);
            self.waiting_bytes = 0;
            self.hashing = Some(spawn_blocking(move || {
                pieces.iter().for_each(|piece| state.update(piece));
                state
            }));
        }
        Ok(())
    }

    /// The digest of all that was taken so far.
    pub(crate) async fn so_far(&mut self) -> io::Result<[u8; 32]> {
        self.settle().await?;
        let mut state = self.state.take().expect("settled, so the state is here");
        let pieces = std::mem::take(&mut self.waiting);
        let bytes = std::mem::take(&mut self.waiting_bytes);
        let update = move || {
            pieces.iter().for_each(|piece| state.update(piece));
            state
        };
        let state = match bytes <= IN_PLACE_BYTES_MAX {
            true => update(),
            false => spawn_blocking(update).await.map_err(io::Error::other)?,
        };
        let digest = state.clone().finalize().into();
        self.state = Some(state);
        Ok(digest)
    }

    async fn settle(&mut self) -> io::Result<()> {
        if let Some(hashing) = &mut self.hashing {
            let state = hashing.await.map_err(io::Error::other);
            self.hashing = None;
            self.state = Some(state?);
        }
        Ok(())
    }
}

/// A digest, or the beginning of one, as it is written: two hex digits a byte, lower case.
pub(crate) fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_digest_is_that_of_the_pieces_joined_whenever_it_is_asked_for() {
        let bytes: Vec<u8> = (0..BLOCK_BYTES * 3 + 17).map(|n| (n % 251) as u8).collect();
        let mut digester = Digester::new();
        let mut taken = 0;
        for piece in bytes.chunks(100_001) {
            digester.push(Bytes::copy_from_slice(piece)).await.expect("hashed");
            taken += piece.len();
            let expected: [u8; 32] = Sha256::digest(&bytes[..taken]).into();
            if taken % 2 == 0 {
                assert_eq!(digester.so_far().await.expect("hashed"), expected);
            }
        }
        assert_eq!(digester.so_far().await.expect("hashed"), <[u8; 32]>::from(Sha256::digest(&bytes)));
        let nothing = hex(&Digester::new().so_far().await.expect("hashed"));
        assert_eq!(nothing, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
