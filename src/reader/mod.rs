//! An image as files: its bootstrap wherever it lies, its blobs wherever they are, and the bytes of
//! its files, checked unit by unit.
//!
//! This is how tools read. Nothing is cached and nothing is mounted; serving goes through `cache`.

pub mod bootstrap;
pub mod maps;

pub use bootstrap::{LoadError, Loaded};
pub use maps::MapError;
