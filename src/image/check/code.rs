use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Odd, wasteful or unknown to some readers; everything can be read.
    Remark,
    /// Some reader refuses the image or shows something wrong.
    Error,
}

impl std::fmt::Display for Severity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Remark => "remark",
            Self::Error => "error",
        })
    }
}

/// Defines the codes with their names and severities in one list, so that none is forgotten.
macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $name:literal, $severity:ident;)*) => {
        /// What kind of fault a finding is. The names are stable: scripts may rely on them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Code {
            $($(#[$doc])* $code,)*
        }

        impl Code {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$code,)*];

            /// The stable name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$code => $name,)*
                }
            }

            /// How bad it is.
            pub fn severity(self) -> Severity {
                match self {
                    $(Self::$code => Severity::$severity,)*
                }
            }
        }
    };
}

codes! {
    /// The bootstrap cannot be opened at all.
    Unusable = "unusable", Error;
    /// A superblock field that must be zero is not.
    Reserved = "reserved", Error;
    /// The superblock says that it has a checksum, which RAFS does not make.
    Checksum = "checksum", Error;
    /// The volume name does not end in its field.
    VolumeName = "volume-name", Error;
    /// The number of paths in the superblock is not the number found.
    PathCount = "path-count", Error;
    /// The number of blocks in the superblock is not that of the devices.
    BlockCount = "block-count", Remark;
    /// The bootstrap has a length that other readers do not expect.
    Length = "length", Remark;
    /// A table does not start where tables start.
    TableStart = "table-start", Error;
    /// Two structures lie in the same bytes.
    Overlap = "overlap", Error;
    /// Flags of the superblock contradict the blobs or inodes.
    Flags = "flags", Error;
    /// The image shares xattrs, which readers other than the kernel refuse.
    SharedXattrs = "shared-xattrs", Remark;
    /// Two devices overlap in the flat address space.
    MappedOverlap = "mapped-overlap", Error;
    /// A device has no place in the flat address space, so the image cannot be one block device.
    NotMapped = "not-mapped", Remark;
    /// The length of a device is not that of its blob.
    DeviceLength = "device-length", Error;
    /// A field of the blob table is impossible.
    BlobField = "blob-field", Error;
    /// Feature bits of a blob contradict each other or the superblock.
    BlobFeatures = "blob-features", Error;
    /// The size of a blob's chunk-info array does not fit its number of chunks.
    BlobTables = "blob-tables", Error;
    /// No file uses a blob.
    UnusedBlob = "unused-blob", Remark;
    /// A record of the chunk table is impossible.
    ChunkRecord = "chunk-record", Error;
    /// Records of the chunk table are out of order.
    ChunkOrder = "chunk-order", Error;
    /// Two records describe one chunk.
    ChunkTwice = "chunk-twice", Error;
    /// No file uses some records.
    UnusedChunks = "unused-chunks", Remark;
    /// An inode makes no sense.
    Inode = "inode", Error;
    /// A directory makes no sense.
    Directory = "directory", Error;
    /// Something does not fit in the bootstrap.
    Truncated = "truncated", Error;
    /// The tree is too deep, runs in a circle or is larger than it can be.
    Tree = "tree", Error;
    /// The root is no directory.
    Root = "root", Error;
    /// The link count of an inode is not the number of its names.
    LinkCount = "link-count", Error;
    /// Names of a directory are out of order, so some cannot be found.
    NameOrder = "name-order", Error;
    /// A directory has one name twice.
    NameTwice = "name-twice", Error;
    /// `.` or `..` is missing or leads elsewhere.
    Dots = "dots", Error;
    /// A directory says another type than the inode.
    FileType = "file-type", Error;
    /// Data behind an inode crosses a block border, which the kernel refuses.
    TailCrossesBlock = "tail-crosses-block", Error;
    /// The nanoseconds of a time are a second or more.
    Nanoseconds = "nanoseconds", Error;
    /// A special file has a size.
    SpecialSize = "special-size", Remark;
    /// The target of a symbolic link is impossible.
    Symlink = "symlink", Error;
    /// A long link target that the reference writer spoilt.
    TarfsSymlink = "tarfs-symlink", Remark;
    /// An xattr area with a head and nothing else, which the kernel refuses.
    XattrEmpty = "xattr-empty", Error;
    /// The xattrs of an inode are damaged.
    Xattr = "xattr", Error;
    /// An inode has one xattr twice.
    XattrTwice = "xattr-twice", Error;
    /// A regular file that is not made of chunks, which other readers refuse.
    FlatFile = "flat-file", Remark;
    /// A hole, which other readers refuse.
    Hole = "hole", Remark;
    /// A chunk index leads nowhere.
    ChunkIndex = "chunk-index", Error;
    /// A chunk index is not in the chunk table.
    ChunkMissing = "chunk-missing", Error;
    /// A chunk index is not in the chunk table, but the blob has digests of its own.
    ChunkUnlisted = "chunk-unlisted", Remark;
    /// A chunk has another length than the piece of the file it stands for.
    ChunkLength = "chunk-length", Error;
    /// The kernel would read the chunks of a file from other places than their indexes say.
    ChunkFormat = "chunk-format", Error;
    /// An entry of the prefetch table is no inode of the tree.
    Prefetch = "prefetch", Error;
    /// Entries of the prefetch table behind its end mark.
    PrefetchEnd = "prefetch-end", Remark;

    // Of RAFS v5 only.
    /// The digest of an inode is not that of its content.
    InodeDigest = "inode-digest", Error;
    /// An inode says that it lies in another directory than it does.
    InodeParent = "inode-parent", Error;
    /// No directory leads to some inodes.
    UnusedInodes = "unused-inodes", Remark;
    /// An xattr in a namespace that EROFS has no number for.
    XattrNamespace = "xattr-namespace", Remark;

    // Found by who opens the blobs, which `image` never does.
    /// A blob is not there, or too short.
    BlobMissing = "blob-missing", Error;
    /// The tables of a blob are not those that the image describes.
    BlobDiffers = "blob-differs", Error;
    /// A file leads to bytes of a blob for which nobody promises anything.
    Uncheckable = "uncheckable", Error;
    /// A blob is of a kind whose data cannot be looked at.
    BlobUnchecked = "blob-unchecked", Remark;
    /// A chunk does not decode to what the image promises.
    ChunkDamaged = "chunk-damaged", Error;
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
