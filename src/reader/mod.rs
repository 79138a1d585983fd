//! An image as files: its bootstrap wherever it lies, its blobs wherever they are, and the bytes of
//! its files, checked unit by unit.
//!
//! This is how tools read. Nothing is cached and nothing is mounted; serving goes through `cache`.

pub mod bootstrap;
mod files;
mod lot;
pub mod maps;
mod reach;
pub mod tarfile;
mod units;

pub use bootstrap::{LoadError, Loaded};
pub use files::{FileReader, Files, OpenError, Piece};
pub use maps::{MapError, Mapped};
pub use reach::{ReachError, ensure_block_size, ensure_checkable};
pub use units::{ReadError, UnitReader, UnitRef};
