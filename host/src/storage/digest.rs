//! SHA-256 of a stream.
//!
//! Hashing takes longer than copying, so it has its own queue.

use std::io;

/// A digest, or its first bytes, in hex.
pub(crate) use base16ct::lower::encode_string as hex;
use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::piece_queue::{PieceQueue, Processor};

/// See the module documentation.
pub(crate) struct Digester(PieceQueue<Sha256>);

impl Processor for Sha256 {
    const IN_PLACE_BYTES_MAX: usize = 16 * 1024;

    fn process(&mut self, piece: &Bytes) -> io::Result<()> {
        self.update(piece);
        Ok(())
    }
}

impl Digester {
    pub(crate) fn new() -> Self {
        Self(PieceQueue::new(Sha256::new()))
    }

    /// Hashes the next piece. Waits only while four blocks are queued.
    pub(crate) async fn push(&mut self, piece: Bytes) -> io::Result<()> {
        self.0.push(piece).await
    }

    /// The digest of all pieces so far.
    pub(crate) async fn so_far(&mut self) -> io::Result<[u8; 32]> {
        self.0.when_processed(|state| state.clone().finalize().into()).await
    }
}

#[cfg(test)]
mod tests {
    use super::{super::file::BLOCK_BYTES, *};

    #[tokio::test]
    async fn digest_covers_all_pieces() {
        let bytes: Vec<u8> = (0..BLOCK_BYTES * 3 + 17).map(|n| (n % 251) as u8).collect();
        let mut digester = Digester::new();
        let mut pushed = 0;
        for piece in bytes.chunks(100_001) {
            digester.push(Bytes::copy_from_slice(piece)).await.expect("hashed");
            pushed += piece.len();
            let expected: [u8; 32] = Sha256::digest(&bytes[..pushed]).into();
            if pushed % 2 == 0 {
                assert_eq!(digester.so_far().await.expect("hashed"), expected);
            }
        }
        assert_eq!(digester.so_far().await.expect("hashed"), <[u8; 32]>::from(Sha256::digest(&bytes)));
        let nothing = hex(&Digester::new().so_far().await.expect("hashed"));
        assert_eq!(nothing, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
