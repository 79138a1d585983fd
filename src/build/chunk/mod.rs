//! File content on its way into a blob: cut, digested, deduplicated, compressed, in order.
//!
//! The calling thread reads and cuts. Workers digest and compress. One writer puts the results
//! back in order and alone decides what is stored, so the blob does not depend on the number of
//! workers or on who was faster. What it decides to batch goes back to the workers, and is
//! appended when its turn comes. A fixed set of [`Parcel`](parcel::Parcel)s goes round; when all
//! are under way the reader waits, which bounds memory whatever the size of the files.
//!
//! Chunks are numbered in the order they were cut (*cuts*). A file remembers its cuts, and
//! learns at the end which chunk of the blob each of them became.

mod cut;
mod pack;
mod parcel;
mod pipeline;
mod stored;
mod writer;

pub(super) use cut::{Body, Content, CutError, Cutter, PlainBody};
pub(super) use pack::Packer;
pub(super) use parcel::Packed;
pub(super) use pipeline::{Known, Stored, rehearse, run};
pub(super) use stored::Chunk;

use std::num::NonZeroUsize;

use super::error::BuildError;
use crate::codec::Compressor;
use crate::codec::xts::BlobKey;
use crate::format::rafs::{Algorithm, DigestAlgorithm};

/// How chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Stored as they are.
    None,
    /// LZ4 blocks: fast, larger.
    Lz4,
    /// Zstandard, level 1 to 22.
    Zstd { level: i32 },
}

/// Text that names no compression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a compression; write zstd, zstd:LEVEL with 1 to 22, lz4 or none")]
pub struct InvalidCompression(String);

impl std::str::FromStr for Compression {
    type Err = InvalidCompression;

    fn from_str(text: &str) -> Result<Self, InvalidCompression> {
        let invalid = || InvalidCompression(text.to_owned());
        match text {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::default()),
            _ => {
                let level = text.strip_prefix("zstd:").and_then(|level| level.parse().ok()).ok_or_else(invalid)?;
                if (1..=22).contains(&level) { Ok(Self::Zstd { level }) } else { Err(invalid()) }
            }
        }
    }
}

impl Default for Compression {
    /// Level 3, what the library and other builders of the format use when not told otherwise.
    fn default() -> Self {
        Self::Zstd { level: 3 }
    }
}

impl Compression {
    /// What the format calls it.
    pub fn algorithm(self) -> Algorithm {
        match self {
            Self::None => Algorithm::None,
            Self::Lz4 => Algorithm::Lz4Block,
            Self::Zstd { .. } => Algorithm::Zstd,
        }
    }

    pub(super) fn compressor(self) -> std::io::Result<Compressor> {
        match self {
            Self::None => Ok(Compressor::store()),
            Self::Lz4 => Ok(Compressor::lz4()),
            Self::Zstd { level } => Compressor::zstd(level),
        }
    }
}

/// What every stage of the pipeline knows.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub compression: Compression,
    pub digest: DigestAlgorithm,
    /// Bytes; a power of two.
    pub chunk_size: u32,
    /// Files shorter than half of this share stored pieces of less than this; 0 if none do.
    pub batch_size: u32,
    /// What the blob is encrypted with.
    pub key: Option<BlobKey>,
    pub workers: NonZeroUsize,
}

impl Settings {
    /// Makes plain bytes into what this blob stores for them.
    pub(super) fn packer(&self) -> Result<Packer, BuildError> {
        let compressor = self.compression.compressor().map_err(BuildError::Compressor)?;
        Ok(Packer::new(compressor, self.key.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressions_are_read_as_documented() {
        for (text, want) in [
            ("none", Compression::None),
            ("lz4", Compression::Lz4),
            ("zstd", Compression::Zstd { level: 3 }),
            ("zstd:19", Compression::Zstd { level: 19 }),
        ] {
            assert_eq!(text.parse(), Ok(want));
        }
        for bad in ["", "gzip", "zstd:", "zstd:0", "zstd:23", "zstd:x", "lz4:1"] {
            assert!(bad.parse::<Compression>().is_err(), "{bad}");
        }
    }
}
