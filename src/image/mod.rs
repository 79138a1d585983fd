//! The meaning of a bootstrap: inodes, names, and where the bytes of files lie.
//!
//! An [`Image`] is a checked view over the bytes of a RAFS v6 bootstrap. It never opens a blob and
//! never sees a byte of file data: extents are the only bridge from files to devices. Every access
//! is bounds-checked, so a hostile image gives an [`ImageError`], never a panic, and no allocation
//! is sized by a number from the image.

pub mod check;
mod chunks;
pub mod dump;
mod error;
mod extents;
mod first_paths;
mod inode;
mod list;
mod records;
#[cfg(test)]
mod sample;
mod superblock;
mod symlink;
pub mod v5;
mod walk;
mod xattr;

pub use error::ImageError;
pub use extents::Extent;
pub use first_paths::FirstPaths;
pub use inode::{Inode, Kind, Layout, Nid};
pub use list::DirEntry;
pub use records::RecordIndex;
pub use superblock::{Origin, Summary, VOLUME_OF_V5};
pub use walk::{Entry, Visit, Walk};
pub use xattr::Xattr;

use std::fs::File;
use std::path::Path;

use zerocopy::little_endian::U32;

use crate::base::BlobId;
use crate::format::blobfile::features;
use crate::format::rafs::{BlobEntry, ChunkRecord};
use crate::sys::mmap::ReadMap;

/// Largest bootstrap in bytes (`build-rules.md` section 9).
pub const MAX_BOOTSTRAP: u64 = 2 << 30;

/// One bootstrap.
pub struct Image {
    bytes: Box<dyn AsRef<[u8]> + Send + Sync>,
    summary: Summary,
    devices: Vec<Device>,
    chunk_table: (u64, u64),
    prefetch_table: (u64, u64),
}

/// One device of an image: a blob in its decoded form.
#[derive(Clone, Debug)]
pub struct Device {
    /// The blob.
    pub blob: BlobId,
    /// Length that the kernel may read, in bytes.
    pub len: u64,
    /// The blob's row of the blob table.
    pub entry: BlobEntry,
}

impl Device {
    /// Whether its blob was made of what is needed first, in the order in which it is needed (`blob.md` section 5).
    pub fn is_hot(&self) -> bool {
        self.entry.features.get() & features::IS_SEPARATED_WITH_PREFETCH_FILES != 0
    }
}

impl Image {
    /// Maps and checks the bootstrap at `path`, a complete file that nobody writes any more.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let open = || ReadMap::new(&File::open(path)?);
        let bytes = open().map_err(|cause| OpenError::Io { path: path.to_owned(), cause })?;
        Self::parse(bytes).map_err(|cause| OpenError::Image { path: path.to_owned(), cause })
    }

    /// Checks the superblocks and tables in `bytes`. Inodes are checked when they are asked for.
    pub fn parse(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self, ImageError> {
        let head = superblock::parse(bytes.as_ref())?;
        Ok(Self {
            bytes: Box::new(bytes),
            summary: head.summary,
            devices: head.devices,
            chunk_table: head.chunk_table,
            prefetch_table: head.prefetch_table,
        })
    }

    /// Facts about the image as a whole.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The devices, in the order of their numbers: entry `i` is device `i + 1` of the kernel.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The chunk table: place and digest of every chunk that a file of this image uses.
    pub fn chunk_records(&self) -> &[ChunkRecord] {
        let (at, count) = self.chunk_table;
        crate::format::array_at(self.bytes(), at, count, "chunk table").expect("checked by parse()")
    }

    /// Inodes to fetch before anybody asks, the most urgent first; a directory stands for
    /// everything in it (`rafs-v6.md` section 6). Only as sound as the image: a number may be that
    /// of no inode, which [`Image::inode`] tells.
    pub fn prefetch(&self) -> impl Iterator<Item = Nid> + '_ {
        let (at, count) = self.prefetch_table;
        let table: &[U32] =
            crate::format::array_at(self.bytes(), at, count, "prefetch table").expect("checked by parse()");
        // A zero ends the list, whatever follows.
        table.iter().map(|nid| Nid::from(nid.get())).take_while(|&nid| nid != 0)
    }

    /// The bootstrap as it lies in its file, for whoever copies it.
    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("summary", &self.summary).field("devices", &self.devices).finish_non_exhaustive()
    }
}

/// Why a bootstrap file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        path: std::path::PathBuf,
        #[source]
        cause: std::io::Error,
    },
    /// The file is not a usable bootstrap.
    #[error("{} is not a usable RAFS v6 bootstrap", path.display())]
    Image {
        path: std::path::PathBuf,
        #[source]
        cause: ImageError,
    },
}
