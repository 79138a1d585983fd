//! The cache that the kernel keeps below the store's directory, as far as the store's limit goes.
//!
//! Its files are the kernel's: nobody else may remove one while it is in use, and whether it is, only the kernel
//! knows. So it is asked, by whoever has bound that cache.

use std::io;

use super::victims::{Lot, LotKind};

/// Whoever can have the kernel's files listed and removed.
pub trait KernelCache: Send + Sync + std::fmt::Debug {
    /// What lies there. Blocks.
    ///
    /// # Errors
    /// Of the file system; `InvalidInput` if the cache is not bound any more.
    fn objects(&self) -> io::Result<Vec<KernelObject>>;

    /// Has the kernel remove an object; tells whether it did. One in use stays. Blocks.
    ///
    /// # Errors
    /// As above.
    fn remove(&self, name: &str) -> io::Result<bool>;
}

/// A blob, or a bootstrap, in the kernel's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelObject {
    /// Its path below the kernel's directory of volumes.
    pub name: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// When it was last opened or written to, in seconds since 1970.
    pub last_used: u64,
    /// Whether the kernel has it open.
    pub in_use: bool,
}

impl From<KernelObject> for Lot {
    fn from(object: KernelObject) -> Self {
        let KernelObject { name, bytes, last_used, in_use } = object;
        Self { name, kind: LotKind::Kernel, bytes, last_used, held: in_use }
    }
}
