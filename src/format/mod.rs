//! Records as they lie on disk: `&[u8]` to structs and back, and nothing more.
//!
//! Every record is little-endian, unaligned and valid for every bit pattern; whether its values
//! make sense is decided where they are interpreted (`image`, `blob`). Sizes and late offsets are
//! asserted at compile time. Sources: the Linux header `fs/erofs/erofs_fs.h` for what the kernel
//! reads, `rafs-v6.md` and `blob.md` for what is private to RAFS.

pub mod blobfile;
pub mod erofs;
pub mod rafs;
pub mod rafs5;
mod view;

pub use view::{Truncated, array_at, array_at_mut, record_at};
