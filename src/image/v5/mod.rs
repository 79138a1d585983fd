//! A RAFS v5 bootstrap: its tables, inodes, names and chunk records, checked (`rafs-v5.md`).
//!
//! [`Bootstrap`] is a view over the bytes. Like [`super::Image`] it opens no blob, and every access
//! is bounds-checked. Records are looked at when they are asked for, so that opening costs as much
//! as the tables. Paths are *numbers*, rows of the inode table; those of a directory follow each
//! other in the order of their names, and all are larger than the directory's own. So no walk down
//! can run in a circle; that no two directories share a child is up to whoever walks.

mod chunk;
mod error;
mod inode;
mod tables;
mod xattr;

pub use chunk::Chunk;
pub use error::{BootstrapError, Table};
pub use inode::{Inode, Number};
pub use tables::{Blob, Extent};
pub use xattr::Pairs;

use zerocopy::little_endian::U32;

use crate::base::BlobId;
use crate::format::rafs::{Algorithm, DigestAlgorithm, flags};
use crate::format::rafs5;

/// One bootstrap.
#[derive(Debug)]
pub struct Bootstrap<'a> {
    bytes: &'a [u8],
    summary: Summary,
    inode_table: &'a [U32],
    prefetch_table: &'a [U32],
    blobs: Vec<Blob>,
}

/// Facts about an image as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of all chunks but the last of a file: a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Of all blobs.
    pub compression: Algorithm,
    /// Of all chunks and inodes.
    pub digest: DigestAlgorithm,
    /// Whether owners mean anything.
    pub explicit_ids: bool,
    /// Whether the image says that some inode has xattrs.
    pub has_xattrs: bool,
    /// As the superblock has it; old builders count otherwise than new ones.
    pub inodes: u64,
}

/// Whether `head`, the start of a file, is that of a RAFS v5 bootstrap or an older one.
pub fn is_bootstrap(head: &[u8]) -> bool {
    head.starts_with(&rafs5::MAGIC.to_le_bytes())
}

impl<'a> Bootstrap<'a> {
    /// Checks the superblock and the tables in `bytes`.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BootstrapError> {
        tables::parse(bytes)
    }

    /// Facts about the image as a whole.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The blobs, in the order in which chunks name them.
    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// Gives the blobs that a bootstrap cannot name the `name` of the file it was found by. If it was
    /// `taken_out` of a blob, those of the time before 2.2 have a name that is not theirs.
    pub fn name_blobs(&mut self, name: &BlobId, taken_out: bool) {
        for blob in &mut self.blobs {
            if blob.is_unnamed() || taken_out && !blob.names_itself() {
                blob.id = name.clone();
            }
        }
    }

    /// Number of paths, the root included. Numbers of paths are 1 to this.
    pub fn paths(&self) -> Number {
        Number::try_from(self.inode_table.len()).expect("the superblock has 32 bits for it")
    }

    /// Numbers of what to fetch before anybody asks, the most urgent first. Only as sound as the image.
    pub fn prefetch(&self) -> impl Iterator<Item = Number> + '_ {
        // A zero ends the list, whatever follows.
        self.prefetch_table.iter().map(|number| number.get()).take_while(|&number| number != 0)
    }

    /// The bootstrap as it lies in its file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl Summary {
    /// Compression and digest that these flags of a superblock stand for. Of several the first counts,
    /// and what is not said is LZ4 and BLAKE3 (`rafs-v5.md` section 2).
    fn algorithms(set: u64) -> (Algorithm, DigestAlgorithm) {
        let order = [Algorithm::None, Algorithm::Lz4Block, Algorithm::Gzip, Algorithm::Zstd];
        let compression = order.into_iter().find(|algorithm| set & algorithm.flag() != 0);
        let digests = set & (flags::HASH_BLAKE3 | flags::HASH_SHA256);
        let digest = if digests == flags::HASH_SHA256 { DigestAlgorithm::Sha256 } else { DigestAlgorithm::Blake3 };
        (compression.unwrap_or(Algorithm::Lz4Block), digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_algorithms_the_first_counts() {
        use {Algorithm::*, DigestAlgorithm::*};
        for (set, want) in [
            (0, (Lz4Block, Blake3)),
            (flags::COMPRESSION_ZSTD | flags::HASH_SHA256, (Zstd, Sha256)),
            (flags::COMPRESSION_ZSTD | flags::COMPRESSION_GZIP | flags::HASH_BLAKE3, (Gzip, Blake3)),
            (flags::COMPRESSION_NONE | flags::COMPRESSION_LZ4 | 0xc, (None, Blake3)),
        ] {
            assert_eq!(Summary::algorithms(set), want, "{set:#x}");
        }
    }
}
