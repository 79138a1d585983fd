//! Lazily mounted RAFS images through the kernel's own EROFS.
//!
//! See `ARCHITECTURE.md` for the layers; a module knows only what lies below it.

pub mod base;
pub mod blob;
pub mod build;
pub mod cache;
pub mod cli;
pub mod codec;
pub mod credentials;
pub mod daemon;
pub mod export;
pub mod format;
pub mod image;
pub mod net;
pub mod oci;
pub mod reader;
pub mod source;
pub mod sys;
pub mod telemetry;
pub mod tools;
