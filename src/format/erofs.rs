//! EROFS records, as `fs/erofs/erofs_fs.h` of Linux 6.12 defines them and RAFS v6 uses them.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Where the superblock starts, in bytes.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// `EROFS_SUPER_MAGIC_V1`.
pub const MAGIC: u32 = 0xe0f5_e1e2;
/// Private compatible feature bit that marks a RAFS v6 bootstrap.
pub const COMPAT_RAFS_V6: u32 = 0x4000_0000;
/// `EROFS_FEATURE_INCOMPAT_CHUNKED_FILE`.
pub const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// `EROFS_FEATURE_INCOMPAT_DEVICE_TABLE`.
pub const INCOMPAT_DEVICE_TABLE: u32 = 0x8;
/// Device table offset in units of 128 bytes, the only value RAFS v6 knows (byte 1408).
pub const DEVICE_TABLE_SLOT: u16 = 11;
/// An inode number counts slots of this many bytes from the start of the metadata area.
pub const INODE_SLOT: u64 = 32;
/// Most devices: the chunk index has 8 bits for "device + 1", and the writer stops below 255.
pub const MAX_DEVICES: usize = 254;
/// Longest name of a directory entry in bytes.
pub const MAX_NAME: usize = 255;
/// Longest symbolic link target that readers accept, in bytes.
pub const MAX_SYMLINK: u64 = 4096;

/// The superblock, at byte 1024.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Superblock {
    pub magic: U32,
    pub checksum: U32,
    pub feature_compat: U32,
    /// log2 of the block size: 12, or 9 for tarfs images.
    pub blkszbits: u8,
    pub sb_extslots: u8,
    pub root_nid: U16,

    /// Number of paths of the tree, the root included.
    pub inos: U64,
    pub build_time: U64,

    pub build_time_nsec: U32,
    /// Sum of the devices' blocks.
    pub blocks: U32,
    /// First block of the metadata area.
    pub meta_blkaddr: U32,
    pub xattr_blkaddr: U32,

    pub uuid: [u8; 16],

    pub volume_name: [u8; 16],

    pub feature_incompat: U32,
    pub compression_algs: U16,
    pub extra_devices: U16,
    /// Offset of the device table in units of 128 bytes.
    pub devt_slotoff: U16,
    pub reserved: [u8; 38],
}

const _: () = assert!(size_of::<Superblock>() == 128);
const _: () = assert!(offset_of!(Superblock, devt_slotoff) == 0x58);

/// One row of the device table; row `i` is device `i + 1`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DeviceSlot {
    /// Blob id, padded with NUL.
    pub tag: [u8; 64],

    /// Length of the decoded blob, in blocks.
    pub blocks: U32,
    /// Start in the flat address space, in blocks.
    pub mapped_blkaddr: U32,
    pub reserved: [u8; 56],
}

const _: () = assert!(size_of::<DeviceSlot>() == 128);
const _: () = assert!(offset_of!(DeviceSlot, mapped_blkaddr) == 68);

/// An inode of 64 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InodeExtended {
    /// Bit 0 set, then [`layout`] in bits 1 to 3.
    pub format: U16,
    /// 0, or 1 + (bytes of the xattr area - 12) / 4.
    pub xattr_icount: U16,
    pub mode: U16,
    pub reserved: U16,
    pub size: U64,

    /// First data block, chunk format, or device number.
    pub u: U32,
    pub ino: U32,
    pub uid: U32,
    pub gid: U32,

    /// Seconds since 1970, as two's complement.
    pub mtime: U64,
    pub mtime_nsec: U32,
    pub nlink: U32,

    pub reserved2: [u8; 16],
}

const _: () = assert!(size_of::<InodeExtended>() == 64);
const _: () = assert!(offset_of!(InodeExtended, nlink) == 0x2c);

/// An inode of 32 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InodeCompact {
    pub format: U16,
    pub xattr_icount: U16,
    pub mode: U16,
    pub nlink: U16,
    pub size: U32,
    pub reserved: U32,

    pub u: U32,
    pub ino: U32,
    pub uid: U16,
    pub gid: U16,
    pub reserved2: U32,
}

const _: () = assert!(size_of::<InodeCompact>() == 32);
const _: () = assert!(offset_of!(InodeCompact, gid) == 0x1a);

/// Data layouts of an inode, bits 1 to 3 of its format.
pub mod layout {
    /// All data in whole blocks.
    pub const FLAT_PLAIN: u16 = 0;
    /// Whole blocks, the tail behind the inode.
    pub const FLAT_INLINE: u16 = 2;
    /// An array of chunk indexes behind the inode.
    pub const CHUNK_BASED: u16 = 4;
}

/// Bit of [`InodeExtended::u`] of a chunk-based file: entries are [`ChunkIndex`], not block numbers.
pub const CHUNK_FORMAT_INDEXES: u32 = 0x20;
/// Bits of [`InodeExtended::u`] of a chunk-based file: log2(chunk size) - log2(block size).
pub const CHUNK_FORMAT_BITS: u32 = 0x1f;

/// One entry of a regular file's chunk array (`rafs-v6.md` section 12).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkIndex {
    /// Chunk number in its blob, low 16 bits.
    pub advise: U16,
    /// Bits 0 to 7: device; bits 8 to 15: chunk number, high 8 bits.
    pub device_id: U16,
    /// First block of the chunk in the device, or all ones for a hole.
    pub blkaddr: U32,
}

const _: () = assert!(size_of::<ChunkIndex>() == 8);

/// [`ChunkIndex::blkaddr`] of a hole.
pub const HOLE: u32 = u32::MAX;

impl ChunkIndex {
    /// An entry for chunk number `index` (below 2^24) of blob number `blob`.
    pub fn new(blob: u8, index: u32, blkaddr: u32) -> Self {
        debug_assert!(index < 1 << 24 && blob < u8::MAX);
        let [low, mid, high, _] = index.to_le_bytes();
        Self {
            advise: u16::from_le_bytes([low, mid]).into(),
            device_id: u16::from_le_bytes([blob + 1, high]).into(),
            blkaddr: blkaddr.into(),
        }
    }

    /// Blob number, or `None` for device 0, the bootstrap itself.
    pub fn blob(&self) -> Option<u8> {
        self.device_id.to_bytes()[0].checked_sub(1)
    }

    /// Chunk number in its blob.
    pub fn index(&self) -> u32 {
        let [low, mid] = self.advise.to_bytes();
        u32::from_le_bytes([low, mid, self.device_id.to_bytes()[1], 0])
    }
}

/// One directory entry; names follow all entries of a block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Dirent {
    pub nid: U64,
    /// Where the name starts, from the start of the block.
    pub nameoff: U16,
    /// [`file_type`].
    pub file_type: u8,
    pub reserved: u8,
}

const _: () = assert!(size_of::<Dirent>() == 12);

/// Kinds of a directory entry.
pub mod file_type {
    pub const REGULAR: u8 = 1;
    pub const DIRECTORY: u8 = 2;
    pub const CHARACTER: u8 = 3;
    pub const BLOCK: u8 = 4;
    pub const FIFO: u8 = 5;
    pub const SOCKET: u8 = 6;
    pub const SYMLINK: u8 = 7;
}

/// Head of an inode's xattr area.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrHead {
    pub name_filter: U32,
    pub shared_count: u8,
    pub reserved: [u8; 7],
}

const _: () = assert!(size_of::<XattrHead>() == 12);

/// One xattr; the name without its prefix and the value follow, padded to 4 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    pub name_len: u8,
    /// Which prefix was cut off: see [`XATTR_PREFIXES`].
    pub name_index: u8,
    pub value_size: U16,
}

const _: () = assert!(size_of::<XattrEntry>() == 4);

/// Prefixes of xattr names with their numbers. The two ACL names are whole names.
pub const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_index_bytes_are_those_of_a_reference_image() {
        // Chunk 66000 of blob 0 at block 66000 (`rafs-v6.md` section 16).
        let entry = ChunkIndex::new(0, 66000, 66000);
        assert_eq!(entry.as_bytes(), [0xd0, 0x01, 0x01, 0x01, 0xd0, 0x01, 0x01, 0x00]);
        assert_eq!((entry.blob(), entry.index()), (Some(0), 66000));
    }
}
