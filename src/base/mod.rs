//! The vocabulary every layer shares: ranges, identities, classes of work, kinds of fault.
//!
//! The standard library, a measure of how alike words are, and trees of TOML and JSON. Nothing here does I/O, allocates by a foreign length, or knows a format.

mod chain;
mod class;
mod fault;
mod id;
mod nearest;
mod plain;
mod range;
mod rate;
mod request;
mod secret;
mod size;
mod span;
pub(crate) mod sync;
mod tomltext;

pub use chain::Chain;
pub use class::Class;
pub use fault::Fault;
pub use id::{BlobId, Digest, InvalidBlobId, hex};
pub use nearest::nearest;
pub use plain::Plain;
pub use range::ByteRange;
pub use rate::{ByteRate, Paid};
pub use request::RequestId;
pub use secret::Secret;
pub use size::{ByteSize, InvalidSize};
pub use span::{InvalidSpan, TimeSpan};
pub use tomltext::{toml_json, toml_string, toml_strings};

/// Bytes in one block of a native RAFS v6 image, and the alignment of every unit in a device
/// (`rafs-v6.md` section 2: `blkszbits` 12).
pub const BLOCK: u64 = 4096;
