use super::Nid;
use crate::base::{BlobId, InvalidBlobId};
use crate::format::Truncated;

/// What is wrong with a bootstrap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Something does not fit in the file.
    #[error(transparent)]
    Truncated(#[from] Truncated),
    /// The file is something else.
    #[error("not a RAFS v6 bootstrap: {0}")]
    NotRafs(&'static str),
    /// A RAFS image, but of a kind this version cannot read.
    #[error("{0} is not supported by this version")]
    Unsupported(&'static str),
    /// A superblock field has an impossible value.
    #[error("{field} has the impossible value {value:#x}")]
    Field { field: &'static str, value: u64 },
    /// Two tables lie in the same bytes.
    #[error("the {first} and the {second} overlap")]
    Overlap { first: &'static str, second: &'static str },
    /// A blob has no usable name.
    #[error("blob {index} has no usable id")]
    BlobId {
        index: usize,
        #[source]
        cause: InvalidBlobId,
    },
    /// The device table and the blob table disagree.
    #[error("device table and blob table disagree about blob {0}")]
    Device(usize),
    /// Two devices are the same blob.
    #[error("blob {0} appears twice")]
    Twice(BlobId),
    /// An inode makes no sense.
    #[error("inode {nid} {rule}")]
    Inode { nid: Nid, rule: &'static str },
    /// A time of an inode has a whole second or more in its nanoseconds.
    #[error("inode {nid} has mtime_nsec {value}, more than 999999999")]
    Nanoseconds { nid: Nid, value: u32 },
    /// A directory makes no sense.
    #[error("directory {nid} {rule}")]
    Directory { nid: Nid, rule: &'static str },
    /// The tree is deeper or larger than the image says it can be, or runs in a circle.
    #[error("the tree {0}")]
    Tree(&'static str),
}
