//! Tables private to RAFS v6 that follow the EROFS superblock (`rafs-v6.md` sections 3, 5, 13).

use std::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Where the extended superblock starts, in bytes.
pub const EXT_SUPERBLOCK_OFFSET: u64 = 1152;
/// Where the device table starts, in bytes.
pub const DEVICE_TABLE_OFFSET: u64 = 1408;

/// Bits of [`ExtSuperblock::flags`].
pub mod flags {
    pub const COMPRESSION_NONE: u64 = 0x1;
    pub const COMPRESSION_LZ4: u64 = 0x2;
    pub const HASH_BLAKE3: u64 = 0x4;
    pub const HASH_SHA256: u64 = 0x8;
    pub const EXPLICIT_UID_GID: u64 = 0x10;
    pub const HAS_XATTR: u64 = 0x20;
    pub const COMPRESSION_GZIP: u64 = 0x40;
    pub const COMPRESSION_ZSTD: u64 = 0x80;
    pub const INLINED_CHUNK_DIGEST: u64 = 0x100;
    pub const TARFS_MODE: u64 = 0x200;
    pub const ENCRYPTION_NONE: u64 = 0x0100_0000;
    pub const ENCRYPTION_AES_128_XTS: u64 = 0x0200_0000;
    /// Every bit a reader must understand or tolerate.
    pub const KNOWN: u64 = 0x3ff | ENCRYPTION_NONE | ENCRYPTION_AES_128_XTS | 0xfc00_0000;
}

/// The extended superblock, at byte 1152.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtSuperblock {
    pub flags: U64,
    /// Bytes from the start of the bootstrap.
    pub blob_table_offset: U64,

    /// Bytes.
    pub blob_table_size: U32,
    /// Bytes; a power of two between 4 KiB and 16 MiB.
    pub chunk_size: U32,
    pub chunk_table_offset: U64,

    /// Bytes.
    pub chunk_table_size: U64,
    pub prefetch_table_offset: U64,

    /// Bytes.
    pub prefetch_table_size: U32,
    pub padding: U32,
    pub reserved: [u8; 200],
}

const _: () = assert!(size_of::<ExtSuperblock>() == 256);
const _: () = assert!(offset_of!(ExtSuperblock, prefetch_table_size) == 0x30);

/// One row of the blob table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlobEntry {
    /// Blob id, padded with NUL.
    pub id: [u8; 64],

    pub index: U32,
    pub chunk_size: U32,
    pub chunk_count: U32,
    /// [`Algorithm`] of the chunks.
    pub compression: U32,
    pub digest: U32,
    /// [`super::blobfile::features`].
    pub features: U32,
    pub compressed_size: U64,

    pub uncompressed_size: U64,
    pub toc_size: U32,
    /// [`Algorithm`] of the chunk-info array.
    pub ci_compression: U32,
    pub ci_offset: U64,
    pub ci_compressed_size: U64,

    pub ci_uncompressed_size: U64,
    pub toc_digest: [u8; 32],

    pub meta_digest: [u8; 32],

    pub meta_size: U64,
    pub cipher_iv: U64,
    pub cipher: U32,
    pub reserved: [u8; 36],
}

impl BlobEntry {
    /// Whether it says nothing of a chunk-info array, nor of anything that only such an array tells: then the
    /// units of the blob are those that bootstraps list.
    pub fn has_no_tables(&self) -> bool {
        use super::blobfile::features;
        let told = features::CHUNK_INFO_V2 | features::SEPARATE | features::HAS_TOC | features::INLINED_CHUNK_DIGEST;
        let sizes = self.ci_offset.get() | self.ci_compressed_size.get() | self.ci_uncompressed_size.get();
        sizes == 0 && self.features.get() & told == 0
    }
}

const _: () = assert!(size_of::<BlobEntry>() == 256);
const _: () = assert!(offset_of!(BlobEntry, cipher) == 0xd8);

/// One row of the chunk table: where a chunk is stored and what it digests to.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkRecord {
    /// Digest of the plain bytes.
    pub digest: [u8; 32],

    pub blob_index: U32,
    /// [`chunk_flags`].
    pub flags: U32,
    pub compressed_size: U32,
    pub uncompressed_size: U32,

    pub compressed_offset: U64,
    pub uncompressed_offset: U64,

    /// Position in the last file that uses the chunk.
    pub file_offset: U64,
    /// Ordinal in the blob.
    pub index: U32,
    /// CRC-32C of the plain bytes if flagged.
    pub crc32: U32,
}

const _: () = assert!(size_of::<ChunkRecord>() == 80);
const _: () = assert!(offset_of!(ChunkRecord, crc32) == 0x4c);

/// Bits of [`ChunkRecord::flags`] and of the flags byte of a chunk-info entry.
pub mod chunk_flags {
    pub const COMPRESSED: u32 = 0x1;
    pub const ENCRYPTED: u32 = 0x4;
    pub const HAS_CRC32: u32 = 0x10;
}

/// Compression as numbered in blob tables and blob headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    None,
    Lz4Block,
    Gzip,
    Zstd,
}

impl Algorithm {
    /// The algorithm with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::None,
            1 => Self::Lz4Block,
            2 => Self::Gzip,
            3 => Self::Zstd,
            _ => return None,
        })
    }

    /// What the reference tools call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4Block => "lz4_block",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// The number of this algorithm.
    pub fn number(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Lz4Block => 1,
            Self::Gzip => 2,
            Self::Zstd => 3,
        }
    }

    /// The superblock flag that stands for this algorithm.
    pub fn flag(self) -> u64 {
        match self {
            Self::None => flags::COMPRESSION_NONE,
            Self::Lz4Block => flags::COMPRESSION_LZ4,
            Self::Gzip => flags::COMPRESSION_GZIP,
            Self::Zstd => flags::COMPRESSION_ZSTD,
        }
    }
}

/// Digest as numbered in blob tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DigestAlgorithm {
    Blake3,
    Sha256,
}

impl DigestAlgorithm {
    /// The algorithm with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Blake3,
            1 => Self::Sha256,
            _ => return None,
        })
    }

    /// What the reference tools call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blake3 => "blake3",
            Self::Sha256 => "sha256",
        }
    }

    /// The number of this algorithm.
    pub fn number(self) -> u32 {
        match self {
            Self::Blake3 => 0,
            Self::Sha256 => 1,
        }
    }

    /// The superblock flag that stands for this algorithm.
    pub fn flag(self) -> u64 {
        match self {
            Self::Blake3 => flags::HASH_BLAKE3,
            Self::Sha256 => flags::HASH_SHA256,
        }
    }
}
