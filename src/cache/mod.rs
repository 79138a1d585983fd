//! Stored bytes become decoded bytes, once.
//!
//! The whole layer exists for one verb, [`Fill::fill`]: make this decoded range present, then say
//! so. It knows units, a source and a file; it knows no file system format, no kernel interface
//! and no registry. A byte reaches the device file only after the unit it belongs to was checked,
//! and a presence bit is set only after the bytes are in the file.

use std::sync::Arc;

use crate::base::{BlobId, ByteRange, Class, Fault};
use crate::blob::{DecodeError, UnitIndex};
use crate::source::SourceError;

/// Called exactly once, on a pool thread or before `fill` returns; must not block.
pub type Completion = Box<dyn FnOnce(Result<(), FillError>) + Send>;

/// A device whose missing ranges can be made present.
pub trait Fill: Send + Sync {
    /// Length of the device in bytes, a multiple of the block size.
    fn decoded_len(&self) -> u64;

    /// Whether every byte of `decoded` is in the device file. No I/O, no lock.
    fn present(&self, decoded: ByteRange) -> bool;

    /// Makes `decoded` present and then calls `done`. Never blocks: the caller may be the thread
    /// that answers the kernel. `done` may run before this returns.
    fn fill(&self, decoded: ByteRange, class: Class, done: Completion);

    /// Tells the device that `decoded` was found present by a reader, so that it can fetch ahead
    /// of a sequential one. Never blocks.
    fn touched(&self, decoded: ByteRange);
}

/// Why a range could not be made present.
///
/// `Clone` because one failed fetch answers many readers; causes are shared, not copied.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FillError {
    /// The stored bytes could not be had.
    #[error("unit {unit} of blob {blob} at stored {stored} could not be fetched")]
    Source {
        blob: BlobId,
        unit: UnitIndex,
        stored: ByteRange,
        #[source]
        cause: SourceError,
    },
    /// The stored bytes came and are not what the image promised.
    #[error("unit {unit} of blob {blob} at stored {stored} is corrupt")]
    Corrupt {
        blob: BlobId,
        unit: UnitIndex,
        stored: ByteRange,
        #[source]
        cause: DecodeError,
    },
    /// No unit covers part of the range.
    #[error("blob {blob} has nothing at decoded {decoded}")]
    Unmapped { blob: BlobId, decoded: ByteRange },
    /// The cache's file system is full.
    #[error("the cache has no room left for unit {unit} of blob {blob}")]
    NoSpace { blob: BlobId, unit: UnitIndex },
    /// The cache's file system failed.
    #[error("cannot write unit {unit} of blob {blob} to the cache")]
    Io {
        blob: BlobId,
        unit: UnitIndex,
        #[source]
        cause: Arc<std::io::Error>,
    },
    /// The device is being closed, or the fetch was abandoned.
    #[error("the fill was cancelled")]
    Cancelled,
}

impl FillError {
    /// What a caller may do about it: retry, give up, refetch, or nothing.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Source { cause, .. } => cause.fault(),
            Self::Corrupt { .. } => Fault::Corrupt,
            Self::Unmapped { .. } | Self::Io { .. } => Fault::Permanent,
            Self::NoSpace { .. } => Fault::Transient,
            Self::Cancelled => Fault::Cancelled,
        }
    }

    /// What the reader is told. The only place where a failed fill turns into a number.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoSpace { .. } => libc::ENOSPC,
            Self::Source { .. } | Self::Corrupt { .. } | Self::Unmapped { .. } | Self::Io { .. } | Self::Cancelled => {
                libc::EIO
            }
        }
    }
}
