//! How the decoded space of a blob is cut into units, and how one unit is made and checked.
//!
//! A *unit* is the smallest piece that can be verified alone: a RAFS chunk. Several small ones may
//! share a stored range, which is then fetched and decompressed as one. A
//! [`UnitMap`] is the complete list for one blob. [`decode()`] turns stored bytes into checked
//! decoded bytes and is the only way bytes get into a cache. Nothing here does I/O.

mod batch;
mod decode;
mod entry;
mod listed;
mod map;
mod tables;
pub mod toc;
pub mod zran;

pub use crate::codec::xts::{BlobKey, EqualHalves};
pub use decode::{DecodeError, Decoder, decode, verify};
pub use entry::BlobKind;
pub use map::{UnitMap, UnitMapError};
pub use tables::{BlobTables, TablesError};

use crate::base::{ByteRange, Digest};
use crate::codec;
use crate::format::rafs::DigestAlgorithm;

/// The digest of `plain` by `algorithm`.
pub fn digest_of(algorithm: DigestAlgorithm, plain: &[u8]) -> Digest {
    match algorithm {
        DigestAlgorithm::Blake3 => codec::blake3(plain),
        DigestAlgorithm::Sha256 => codec::sha256(plain),
    }
}

/// Ordinal of a unit in its blob, from 0.
pub type UnitIndex = u32;

/// Largest decoded size of one unit in bytes (`blob.md` section 1).
pub const MAX_UNIT: u64 = 16 << 20;

/// One independently fetchable, independently verifiable piece of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Where the plain bytes belong in the device; empty if the unit is vacant. Starts on a block
    /// boundary; the end does not have to. The bytes from the end to the next block boundary belong to the unit and are zero.
    pub decoded: ByteRange,
    /// Where the stored bytes lie in the blob file.
    pub stored: ByteRange,
    /// How to get from one to the other.
    pub recipe: Recipe,
    /// How to know that the result is right.
    pub check: Check,
    /// The unit's share of what its stored bytes hold; `None` if that is all of it.
    pub part: Option<Part>,
    /// Whether the stored bytes are encrypted, with the key of the [`UnitMap`].
    pub encrypted: bool,
}

/// A share of a stored range that holds several units: a member of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// Where the unit starts in the plain bytes of its stored range.
    pub at: u32,
    /// How many plain bytes the stored range has, all its units together: at most [`MAX_UNIT`].
    pub whole: u32,
}

impl Unit {
    /// A unit that stores `bytes` as they are at `at`, in both spaces, and knows their digest.
    /// `None` if it would end behind the address space.
    pub fn plain(at: u64, bytes: &[u8]) -> Option<Self> {
        let range = ByteRange::at(at, bytes.len() as u64)?;
        let check = Check::Blake3(crate::codec::blake3(bytes).0);
        Some(Self { decoded: range, stored: range, recipe: Recipe::Plain, check, part: None, encrypted: false })
    }

    /// A unit of which nothing is known but its number, behind the byte `at`, a block boundary.
    pub fn vacant(at: u64) -> Self {
        Self {
            decoded: ByteRange::new(at, at).unwrap_or_default(),
            stored: ByteRange::default(),
            recipe: Recipe::Plain,
            check: Check::Unknown,
            part: None,
            encrypted: false,
        }
    }

    /// Whether nothing is known of it.
    pub fn is_vacant(&self) -> bool {
        self.decoded.is_empty()
    }

    /// Whether what comes for it can be told from anything else. Else it never comes.
    pub fn is_checkable(&self) -> bool {
        self.check != Check::Unknown
    }

    /// How many plain bytes the stored range holds.
    pub fn whole_len(&self) -> u64 {
        self.part.map_or(self.decoded.len(), |part| part.whole.into())
    }

    /// Whether both are parts of one stored range, so that one fetch and one decompression serve both.
    pub fn shares_with(&self, other: &Self) -> bool {
        self.part.is_some() && other.part.is_some() && self.stored == other.stored
    }

    /// The unit's part of the device, padding included: whole blocks.
    pub fn blocks(&self) -> ByteRange {
        self.decoded.align_out(crate::base::BLOCK).expect("a unit map refuses units near the end of the address space")
    }
}

/// How stored bytes become plain bytes.
///
/// A closed enum on purpose: `decode.rs` has one exhaustive match, and a new kind of blob is a
/// compile error in the one place that must think about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recipe {
    /// Stored as is.
    Plain,
    /// One raw LZ4 block without a size prefix.
    Lz4Block,
    /// One Zstandard frame.
    Zstd,
    /// One gzip member.
    Gzip,
    /// The middle of a gzip file, entered through a [`zran::Context`].
    GzipWindow,
}

/// How to know that a decoded unit is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Check {
    /// BLAKE3 of the plain bytes.
    Blake3([u8; 32]),
    /// SHA-256 of the plain bytes.
    Sha256([u8; 32]),
    /// CRC-32C of the plain bytes; only where the image carries no digest.
    Crc32c(u32),
    /// The image does not say: such a unit belongs to no file of the image and is never filled.
    Unknown,
}

impl Check {
    /// By a digest of `algorithm`.
    pub fn of(algorithm: DigestAlgorithm, digest: [u8; 32]) -> Self {
        match algorithm {
            DigestAlgorithm::Blake3 => Self::Blake3(digest),
            DigestAlgorithm::Sha256 => Self::Sha256(digest),
        }
    }
}
