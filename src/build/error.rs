use std::io;
use std::path::PathBuf;

use super::load::LoadError;
use super::recheck::RecheckError;
use super::stockblobs::Contradiction;
use crate::base::BlobId;

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} changed while it was being read; build from a snapshot or stop what writes to it", path.display())]
    Changed { path: PathBuf },
    #[error("{} cannot be part of an image: {problem}", path.display())]
    Entry { path: PathBuf, problem: Unfit },
    #[error("damaged or unsupported archive {} at byte {at}: {problem}", archive.display())]
    Archive { archive: PathBuf, at: u64, problem: String },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("output {} lies inside the source {}; choose a directory elsewhere", out.display(), source_dir.display())]
    OutputInSource { out: PathBuf, source_dir: PathBuf },
    #[error("chunk size {0} is not a power of two between 4 KiB and 16 MiB")]
    ChunkSize(u64),
    #[error("batch size {size} is not a power of two between 4 KiB and the chunk size of {chunk_size} bytes")]
    BatchSize { size: u64, chunk_size: u32 },
    #[error("chunks of 16 MiB can be neither batched nor encrypted; use a smaller --chunk-size")]
    LongEntries,
    #[error("RAFS v5 has no {0}; leave it out, or build RAFS v6 (--fs-version 6)")]
    NotInVersion5(&'static str),
    #[error("RAFS v5 cannot be made of these layers; make RAFS v6 of them (--fs-version 6)")]
    NotAsVersion5(#[from] super::v5::NotInVersion5),
    #[error("the system has no random bytes for a key")]
    Random,
    #[error("cannot set up the compressor")]
    Compressor(#[source] io::Error),
    /// An image that was to become part of this one. Boxed to keep results small.
    #[error("cannot use the image {}", image.display())]
    Image {
        image: PathBuf,
        #[source]
        cause: Box<LoadError>,
    },
    #[error("the blob that was written contradicts what an image says of it")]
    NewBlob(#[source] Contradiction),
    #[error("there is nothing to merge")]
    NoLayers,
    #[error("there is nothing to build from")]
    NoSource,
    #[error("several sources make several blobs, and a bootstrap can lie in only one; add --one-blob")]
    InlineInMany,
    #[error("none of the layers uses blob {0}, about which there are facts")]
    UnknownBlob(BlobId),
    #[error("blob {0} is encrypted, and its meta fields hold the key")]
    MetaOfEncrypted(BlobId),
    #[error("no chunk of the dictionary {} has a {digest} digest, as this image will; use --digest", dictionary.display())]
    UselessDictionary { dictionary: PathBuf, digest: &'static str },
    /// The bytes of a chunk could not be had; says which one and why.
    #[error(transparent)]
    Chunk(Box<dyn std::error::Error + Send + Sync>),
    #[error("chunk {chunk} of blob {blob} does not have the bytes that the image promises")]
    OtherBytes { blob: String, chunk: u32 },
    #[error("blob {0} is encrypted, its chunks would be stored plain in the new blob; allow that with --decrypt")]
    WouldDecrypt(String),
    #[error("no path of the list leads to data in the image, so there is nothing to put into a hot blob")]
    NothingHot,
    #[error("no chunk is in {images} of the images; use a smaller --min-images, or build them with the same options")]
    NothingShared { images: usize },
    #[error("what was written cannot be read back")]
    Recheck(#[source] RecheckError),
    #[error("too big for one image: {0}")]
    Limit(Limit),
    /// What was written is not what was meant: nothing is published.
    #[error("the image was written, and is not sound")]
    Verify(#[from] super::verify::VerifyError),
    /// The two passes over the metadata disagree: a fault of the builder, never of the input.
    #[error("metadata was laid out at byte {at} and written elsewhere; please report this")]
    Layout { at: u64 },
}

/// What makes one entry unfit for the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error("its name has {0} bytes, 255 is the limit")]
    NameTooLong(usize),
    #[error("its name is empty, '.', '..', or holds '/' or NUL")]
    Name,
    #[error("its parent is not a directory")]
    ParentNotDirectory,
    #[error("the metadata of the image is at its limit of 2 GiB; split the source")]
    TooManyEntries,
    #[error("a symbolic link target has 1 to 4095 bytes, this one {0}")]
    SymlinkLength(usize),
    #[error("device number {major}:{minor} does not fit in 12 and 20 bits")]
    DeviceNumber { major: u64, minor: u64 },
    #[error("xattr {name} has {len} bytes, 65535 is the limit")]
    XattrValue { name: String, len: usize },
    #[error("its xattrs take {0} bytes, 262144 is the limit")]
    XattrArea(usize),
    #[error("its xattr {0} refers to another place of the overlayfs that it comes from; copy the tree as mounted")]
    OverlayXattr(String),
    #[error("its content takes more chunks than an image can index; use a larger --chunk-size")]
    TooManyChunks,
}

/// What an image has too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Limit {
    #[error("more than 16777214 different chunks; use a larger --chunk-size")]
    Chunks,
    #[error("more than 1 TiB of stored data; split the source")]
    Stored,
    #[error("more than 16 TiB of file data; split the source")]
    Decoded,
    #[error("more than 2 GiB of metadata; split the source")]
    Metadata,
    #[error("more than 254 blobs; join layers before")]
    Blobs,
}
