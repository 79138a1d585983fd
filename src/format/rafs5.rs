//! Records of a RAFS v5 bootstrap (`rafs-v5.md`). Chunk records are [`super::rafs::ChunkRecord`],
//! the bits of the superblock [`super::rafs::flags`].

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::rafs::flags;

/// [`Superblock::magic`]: the bytes `SFAR` at the start of the file.
pub const MAGIC: u32 = 0x5241_4653;
/// [`Superblock::version`] of RAFS v5.
pub const VERSION: u32 = 0x500;
/// [`Superblock::version`] of RAFS v4, of which nothing but the number is known.
pub const VERSION_4: u32 = 0x400;
/// Bytes of the superblock, and where the inode table starts.
pub const SUPERBLOCK_LEN: u32 = 8192;
/// Longest name of an inode in bytes.
pub const MAX_NAME: usize = 256;
/// Largest bootstrap in bytes.
pub const MAX_LEN: u64 = 0x8000_0000;
/// Every table, record and part of a record starts at a multiple of this many bytes.
pub const ALIGN: u64 = 8;
/// Number of the root directory, and the first row of the inode table.
pub const ROOT: u32 = 1;

/// The superblock, at byte 0.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Superblock {
    pub magic: U32,
    pub version: U32,
    /// [`SUPERBLOCK_LEN`].
    pub superblock_len: U32,
    /// Bytes of a chunk; a power of two between 4 KiB and 16 MiB.
    pub chunk_size: U32,

    /// [`super::rafs::flags`], of which [`FLAGS_KNOWN`] may be set.
    pub flags: U64,
    /// Distinct inodes; old builders count otherwise.
    pub inodes: U64,

    /// Bytes from the start of the bootstrap, as in all fields named so.
    pub inode_table_offset: U64,
    pub prefetch_table_offset: U64,

    pub blob_table_offset: U64,
    /// Rows of the inode table: one for each path.
    pub inode_table_entries: U32,
    pub prefetch_table_entries: U32,

    /// Bytes, padding included.
    pub blob_table_size: U32,
    pub extended_blob_table_entries: U32,
    pub extended_blob_table_offset: U64,

    pub reserved: [u8; 8112],
}

const _: () = assert!(size_of::<Superblock>() == SUPERBLOCK_LEN as usize);
const _: () = assert!(offset_of!(Superblock, extended_blob_table_offset) == 0x48);

/// Bits of [`Superblock::flags`] that a reader must understand or tolerate.
pub const FLAGS_KNOWN: u64 =
    flags::KNOWN & !(flags::INLINED_CHUNK_DIGEST | flags::TARFS_MODE | flags::ENCRYPTION_AES_128_XTS);

/// The row of the inode table for an inode record at byte `offset`; `None` if no row can say it.
pub fn inode_row(offset: u64) -> Option<u32> {
    let row = u32::try_from(offset / ALIGN).ok()?;
    (offset.is_multiple_of(ALIGN) && is_inode_row(row)).then_some(row)
}

/// The byte that a row of the inode table stands for, if it is possible.
pub fn inode_offset(row: u32) -> Option<u64> {
    is_inode_row(row).then_some(u64::from(row) * ALIGN)
}

/// Below 2^29, and behind the superblock.
fn is_inode_row(row: u32) -> bool {
    u64::from(row) * ALIGN > SUPERBLOCK_LEN.into() && row < 1 << 29
}

/// Head of a row of the blob table; the blob id follows, and a NUL unless the row is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlobHead {
    /// Always 0.
    pub prefetch_offset: U32,
    /// Bytes at the head of the blob that are wanted first.
    pub prefetch_size: U32,
}

const _: () = assert!(size_of::<BlobHead>() == 8);

/// One row of the extended blob table; the rows have the order of the blob table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedBlob {
    pub chunk_count: U32,
    /// [`super::blobfile::features`].
    pub features: U32,
    /// Length of the plain bytes, packed as the chunks are.
    pub uncompressed_size: U64,

    pub compressed_size: U64,
    pub reserved: [u8; 40],
}

const _: () = assert!(size_of::<ExtendedBlob>() == 64);
const _: () = assert!(offset_of!(ExtendedBlob, compressed_size) == 0x10);

/// One inode. Behind it lie its name, its link target, its xattrs and its chunk records, each
/// padded with zeros to [`ALIGN`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Inode {
    pub digest: [u8; 32],

    /// [`Self::ino`] of the directory; 0 for the root.
    pub parent: U64,
    /// Number of the first path of this inode.
    pub ino: U64,

    pub uid: U32,
    pub gid: U32,
    pub projid: U32,
    /// Type and permissions, as `st_mode`.
    pub mode: U32,

    /// Bytes.
    pub size: U64,
    /// In 512 bytes.
    pub blocks: U64,

    /// [`inode_flags`].
    pub flags: U64,
    pub nlink: U32,
    /// Number of the first child of a directory.
    pub child_index: U32,

    /// Children of a directory, chunks of a regular file.
    pub child_count: U32,
    /// Bytes.
    pub name_size: U16,
    /// Bytes.
    pub symlink_size: U16,
    /// Device number as the kernel encodes it, of devices only.
    pub rdev: U32,
    pub mtime_nsec: U32,

    /// Seconds since 1970, as two's complement.
    pub mtime: U64,
    pub reserved: [u8; 8],
}

const _: () = assert!(size_of::<Inode>() == 128);
const _: () = assert!(offset_of!(Inode, mtime) == 0x70);

/// Bits of [`Inode::flags`].
pub mod inode_flags {
    pub const SYMLINK: u64 = 1;
    pub const HARDLINK: u64 = 2;
    pub const XATTR: u64 = 4;
    pub const HAS_HOLE: u64 = 8;
    /// Every bit that has a meaning.
    pub const KNOWN: u64 = 0xf;
}

/// Head of an inode's xattrs. Behind it pairs: an [`XattrPair`], the full name, a NUL, the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrHead {
    /// Bytes of all pairs, without this head and without padding.
    pub content_size: U64,
}

const _: () = assert!(size_of::<XattrHead>() == 8);

/// Length of one xattr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrPair {
    /// Bytes of name, NUL and value.
    pub size: U32,
}

const _: () = assert!(size_of::<XattrPair>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblock_fields_are_where_a_reference_image_has_them() {
        // The worked example of `rafs-v5.md` section 11.
        let text = "5346415200050000 0020000000001000 0900000000000000 3300000000000000 \
                    0020000000000000 d820000000000000 d820000000000000 3600000000000000 \
                    4800000001000000 2021000000000000";
        let text: Vec<u8> = text.bytes().filter(|b| *b != b' ').collect();
        let mut bytes: Vec<u8> = text
            .chunks_exact(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        bytes.resize(SUPERBLOCK_LEN as usize, 0);
        let sb = Superblock::ref_from_bytes(&bytes).unwrap();

        assert_eq!((sb.magic.get(), sb.version.get(), sb.chunk_size.get()), (MAGIC, VERSION, 1 << 20));
        assert_eq!((sb.flags.get(), sb.inodes.get(), sb.inode_table_entries.get()), (9, 51, 54));
        assert_eq!((sb.inode_table_offset.get(), sb.blob_table_offset.get()), (0x2000, 0x20d8));
        assert_eq!((sb.blob_table_size.get(), sb.extended_blob_table_offset.get()), (72, 0x2120));
        assert_eq!(sb.as_bytes(), bytes);
    }

    #[test]
    fn rows_of_the_inode_table_count_in_eights_behind_the_superblock() {
        assert_eq!((inode_row(0x2160), inode_offset(0x42c)), (Some(0x42c), Some(0x2160)));
        for bad in [0, 8192, 0x2164, 1 << 32] {
            assert_eq!(inode_row(bad), None, "{bad}");
        }
        assert_eq!((inode_offset(1024), inode_offset(1025), inode_offset(1 << 29)), (None, Some(8200), None));
    }
}
