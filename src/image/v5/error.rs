use super::Number;
use crate::base::InvalidBlobId;
use crate::format::Truncated;
use crate::format::rafs5::VERSION_4;

/// What is wrong with a RAFS v5 bootstrap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootstrapError {
    /// Something does not fit in the file.
    #[error(transparent)]
    Truncated(#[from] Truncated),
    /// The file is something else.
    #[error("not a RAFS v5 bootstrap: no magic at its start")]
    Magic,
    /// A version that nobody can read.
    #[error("{}", version_text(*.0))]
    Version(u32),
    /// A field of the superblock has an impossible value.
    #[error("{field} of the superblock has the impossible value {value:#x}")]
    Field { field: &'static str, value: u64 },
    /// A table lies where it cannot.
    #[error("the {table} of {len} bytes at byte {at} {rule}")]
    Place { table: Table, at: u64, len: u64, rule: &'static str },
    /// Two tables lie in the same bytes.
    #[error("the {first} and the {second} overlap")]
    Overlap { first: Table, second: Table },
    /// A blob has no usable name.
    #[error("blob {index} has no usable id")]
    BlobId {
        index: usize,
        #[source]
        cause: InvalidBlobId,
    },
    /// A field of a blob has an impossible value.
    #[error("{field} of blob {index} has the impossible value {value:#x}")]
    Blob { index: usize, field: &'static str, value: u64 },
    /// A blob of a kind that cannot be read.
    #[error("blob {index} is {kind}, which is not supported in RAFS v5 images")]
    Unsupported { index: usize, kind: &'static str },
    /// A field of an inode has an impossible value.
    #[error("{field} of inode {number} has the value {value}, {rule}")]
    Inode { number: Number, field: &'static str, value: u64, rule: &'static str },
    /// A field of a chunk of a file has an impossible value.
    #[error("{field} of chunk {chunk} of inode {number} has the value {value}, {rule}")]
    Chunk { number: Number, chunk: u32, field: &'static str, value: u64, rule: &'static str },
    /// The name of an inode is impossible.
    #[error("name of inode {number} {rule}")]
    Name { number: Number, rule: &'static str },
    /// The xattrs of an inode are damaged.
    #[error("xattrs of inode {number}: {rule}")]
    Xattr { number: Number, rule: &'static str },
    /// The children of a directory are not in the order by which they are looked up.
    #[error("name of inode {number} does not sort behind that of the one before it in directory {directory}")]
    Order { directory: Number, number: Number },
}

/// A table of a bootstrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    Inodes,
    Prefetch,
    Blobs,
    ExtendedBlobs,
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Inodes => "inode table",
            Self::Prefetch => "prefetch table",
            Self::Blobs => "blob table",
            Self::ExtendedBlobs => "extended blob table",
        })
    }
}

fn version_text(version: u32) -> String {
    if version == VERSION_4 {
        return "a RAFS v4 image: the format of before 2020, of which only the head of the superblock is known and \
                which no tool reads any more; convert the image from its OCI original, such as with `rafsd build`"
            .into();
    }
    format!("a RAFS image of version {version:#x}; this version reads v5 (0x500) and v6")
}
