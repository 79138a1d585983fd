//! Stored bytes become decoded bytes, once.
//!
//! The whole layer exists for one verb, [`Fill::fill`]: make this decoded range present, then say
//! so. It knows units, a source and a file; it knows no file system format, no kernel interface
//! and no registry. A byte reaches the device file only after the unit it belongs to was checked,
//! and a presence bit is set only after the bytes are in the file.
//!
//! A [`Store`] owns a directory and gives out [`Device`]s; an [`Engine`] has the threads, queues
//! and limits all devices share. The way of one cold read: `device` finds the missing units, joins
//! or leads each in `inflight`, `plan` gathers the led ones into ranged reads, `fetch` queues the
//! reads and runs them on the network threads, `pool` decodes and checks, `ledger` writes and
//! publishes, and the last unit to settle runs the completion.
//!
//! What there is, who uses it and how it goes is in [`Shelves`]: `space` counts bytes, `victims`
//! chooses, `evictor` removes, `room` asks a full disk before anything is fetched for it, `verify` and `scrub` read again. `twins` knows where else bytes are,
//! so that `copy` spares fetching them.

mod admission;
mod allowances;
mod background;
mod bits;
mod bootstraps;
mod budget;
mod claims;
mod copy;
mod core;
mod device;
mod disk;
mod engine;
mod evictor;
mod fetch;
mod flush;
mod guides;
mod health;
mod inflight;
mod intake;
mod inventory;
mod kernelcache;
mod land;
mod lanes;
mod ledger;
mod lent;
mod miss;
mod place;
mod plan;
mod pool;
mod prefetch;
mod presence;
mod queues;
mod readahead;
mod request;
mod rest;
mod room;
#[cfg(all(test, feature = "shuttle"))]
mod schedules;
mod scrub;
mod settled;
mod shelves;
mod sink;
mod sources;
mod space;
mod stats;
mod store;
mod stream;
mod trace;
mod twins;
mod users;
mod verify;
mod victims;
mod window;

pub use bootstraps::{BootstrapStamp, Bootstraps, KeptBootstrap};
pub use device::Device;
pub use disk::{Disk, DiskFile, FileFacts, FileSink, HostDisk};
pub use engine::{Engine, StoreOptions};
pub use health::DeviceHealth;
pub use inventory::{BlobStock, BootstrapStock, Inventory};
pub use kernelcache::{KernelCache, KernelObject};
pub use ledger::FlushError;
pub use prefetch::{Prefetch, PrefetchState, PrefetchStats, Want};
pub use request::Request;
#[cfg(all(test, feature = "shuttle"))]
pub(crate) use schedules::explore;
pub use shelves::{Removed, Shelves, StockError};
pub use sink::{MAX_PIECE, Sink};
pub use stats::{DeviceStats, StoreStats};
pub use store::{Store, StoreError};
pub use trace::{MOST_READS, Recorded, Trace};
pub use users::{DeviceOfImage, ImageKey, ImageUse, Users};
pub use verify::{SpoiltUnit, VerifyReport};
pub use victims::{LotKind, Wanted};

use std::sync::Arc;

use crate::base::{BlobId, ByteRange, Class, Fault, RequestId};
use crate::blob::{DecodeError, Unit, UnitIndex};
use crate::source::SourceError;

/// Called exactly once, on a pool thread or before `fill` returns; must not block.
pub type Completion = Box<dyn FnOnce(Result<(), FillError>) + Send>;

/// A device whose missing ranges can be made present.
pub trait Fill: Send + Sync {
    /// Length of the device in bytes, a multiple of the block size.
    fn decoded_len(&self) -> u64;

    /// Whether every byte of `decoded` is in the device file. No I/O, no lock.
    fn present(&self, decoded: ByteRange) -> bool;

    /// Makes `decoded` present for `request` and then calls `done`. Never blocks: the caller may be
    /// the thread that answers the kernel. `done` may run before this returns.
    fn fill_for(&self, request: Request, decoded: ByteRange, done: Completion);

    /// The same for a request that is made now and has no number.
    fn fill(&self, decoded: ByteRange, class: Class, done: Completion) {
        self.fill_for(Request::new(RequestId::NONE, class), decoded, done);
    }

    /// Puts the bytes at `decoded`, which are as many, into `into`: those that are present, and those that were given to
    /// `request` because the disk has no room for them.
    ///
    /// # Errors
    /// If some are neither, or the file fails.
    fn read_given(&self, request: &Request, decoded: ByteRange, into: &mut [u8]) -> std::io::Result<()> {
        let _ = (request, into);
        Err(std::io::Error::other(format!("{decoded} of a device is not there")))
    }

    /// Tells the device that `decoded` was found present by a reader, so that it can fetch ahead
    /// of a sequential one. Never blocks.
    fn touched(&self, decoded: ByteRange);
}

/// Makes `decoded` present for a reader and waits for it: for command lines and tests, never for a
/// thread that answers a kernel.
pub fn fill_blocking(device: &dyn Fill, decoded: ByteRange) -> Result<(), FillError> {
    let (tx, rx) = std::sync::mpsc::channel();
    // The receiver is alive until the answer has come, so sending cannot fail.
    device.fill(decoded, Class::OnDemand, Box::new(move |outcome| drop(tx.send(outcome))));
    rx.recv().unwrap_or(Err(FillError::Cancelled))
}

/// Whether anything can ever make this unit present.
fn is_needed(unit: &Unit) -> bool {
    unit.is_checkable()
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
        cause: Arc<SourceError>,
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
    /// Its turn did not come in time, because of a limit that is its image's own.
    #[error("unit {unit} of blob {blob} at stored {stored} waited too long for its turn by {limit} of its image")]
    Limited {
        blob: BlobId,
        unit: UnitIndex,
        stored: ByteRange,
        /// The setting that is the limit.
        limit: &'static str,
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
    /// It was written, and the cache's file system has lost it since.
    #[error("the cache could not keep decoded {decoded}")]
    Lost { decoded: ByteRange },
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
            Self::Unmapped { .. } | Self::Io { .. } | Self::Lost { .. } => Fault::Permanent,
            Self::NoSpace { .. } | Self::Limited { .. } => Fault::Transient,
            Self::Cancelled => Fault::Cancelled,
        }
    }

    /// What the reader is told. The only place where a failed fill turns into a number.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoSpace { .. } => libc::ENOSPC,
            Self::Source { .. }
            | Self::Corrupt { .. }
            | Self::Limited { .. }
            | Self::Unmapped { .. }
            | Self::Io { .. }
            | Self::Lost { .. }
            | Self::Cancelled => libc::EIO,
        }
    }
}
