//! Records of a data blob: chunk-info entries and the header behind them (`blob.md` section 4).

use std::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// [`Header::magic`] and [`Header::magic2`].
pub const MAGIC: u32 = 0xb10b_b10b;

/// Blob feature bits (`blob.md` section 5).
pub mod features {
    pub const ALIGNED: u32 = 0x1;
    pub const INLINED_FS_META: u32 = 0x2;
    pub const CHUNK_INFO_V2: u32 = 0x4;
    pub const ZRAN: u32 = 0x8;
    pub const SEPARATE: u32 = 0x10;
    pub const INLINED_CHUNK_DIGEST: u32 = 0x20;
    pub const TARFS: u32 = 0x40;
    pub const BATCH: u32 = 0x80;
    pub const ENCRYPTED: u32 = 0x100;
    pub const IS_CHUNKDICT_GENERATED: u32 = 0x200;
    pub const EXTERNAL: u32 = 0x800;
    pub const HAS_TAR_HEADER: u32 = 0x1000_0000;
    pub const HAS_TOC: u32 = 0x2000_0000;
    pub const CAP_TAR_TOC: u32 = 0x4000_0000;
    /// Every bit a v6 reader accepts.
    pub const KNOWN: u32 = 0xfff | HAS_TAR_HEADER | HAS_TOC | CAP_TAR_TOC | 0x0fff_0000;
}

/// The header that follows the chunk-info array, 4096 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub magic: U32,
    pub features: U32,
    pub ci_compression: U32,
    pub ci_entries: U32,

    pub ci_offset: U64,
    pub ci_compressed_size: U64,

    pub ci_uncompressed_size: U64,
    pub ci_zran_offset: U64,

    pub ci_zran_size: U64,
    pub ci_zran_count: U32,
    pub reserved: [u8; 4032],
    pub magic2: U32,
}

const _: () = assert!(size_of::<Header>() == 4096);
const _: () = assert!(offset_of!(Header, magic2) == 0xffc);

/// A chunk-info entry of 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkInfoV1 {
    uncomp: U64,
    comp: U64,
}

const _: () = assert!(size_of::<ChunkInfoV1>() == 16);

impl ChunkInfoV1 {
    /// Packs an entry. Sizes are 1 to 2^24 bytes, `uncompressed_offset` is a multiple of 4096
    /// below 2^44, `compressed_offset` is below 2^40.
    pub fn new(uncompressed_offset: u64, uncompressed_size: u32, compressed_offset: u64, compressed_size: u32) -> Self {
        let size = |size: u32| {
            let less_one = u64::from(size - 1);
            (less_one & 0xf_ffff) << 44 | (less_one >> 20)
        };
        let (uncomp, comp) = (size(uncompressed_size), size(compressed_size));
        Self {
            uncomp: ((uncomp & !0xf) | (uncomp & 0xf) << 8 | (uncompressed_offset & 0xfff_ffff_f000)).into(),
            comp: ((comp & !0xf) | (comp & 0xf) << 40 | (compressed_offset & 0xff_ffff_ffff)).into(),
        }
    }

    /// Where the plain bytes belong in the device.
    pub fn uncompressed_offset(&self) -> u64 {
        self.uncomp.get() & 0xfff_ffff_f000
    }

    /// Length of the plain bytes.
    pub fn uncompressed_size(&self) -> u32 {
        Self::size(self.uncomp.get() >> 44, self.uncomp.get() >> 8)
    }

    /// Where the stored bytes lie in the blob.
    pub fn compressed_offset(&self) -> u64 {
        self.comp.get() & 0xff_ffff_ffff
    }

    /// Length of the stored bytes.
    pub fn compressed_size(&self) -> u32 {
        Self::size(self.comp.get() >> 44, self.comp.get() >> 40)
    }

    fn size(low: u64, high: u64) -> u32 {
        u32::try_from((low & 0xf_ffff) | (high & 0xf) << 20).expect("24 bits") + 1
    }
}

/// A chunk-info entry of 24 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkInfoV2 {
    uncomp: U64,
    comp: U64,
    data: U64,
}

const _: () = assert!(size_of::<ChunkInfoV2>() == 24);

impl ChunkInfoV2 {
    /// Flag: the stored bytes are compressed.
    pub const COMPRESSED: u8 = 0x1;
    /// Flag: the chunk lies in a gzip stream with random access contexts.
    pub const ZRAN: u8 = 0x2;
    /// Flag: the chunk shares its stored bytes with others.
    pub const BATCH: u8 = 0x4;
    /// Flag: the stored bytes are encrypted.
    pub const ENCRYPTED: u8 = 0x8;
    /// Flag: the entry carries a CRC-32C.
    pub const HAS_CRC32: u8 = 0x10;

    /// Packs an entry. `uncompressed_offset` is a multiple of 4096 below 2^44,
    /// `uncompressed_size` is 1 to 2^24 bytes, `compressed_offset` is below 2^40,
    /// `compressed_size` is below 2^24; what `data` means depends on `flags`.
    pub fn new(
        flags: u8,
        (uncompressed_offset, uncompressed_size): (u64, u32),
        (compressed_offset, compressed_size): (u64, u32),
        data: u64,
    ) -> Self {
        let size = u64::from(uncompressed_size - 1) & 0xff_ffff;
        Self {
            uncomp: (u64::from(flags) << 56 | size << 32 | (uncompressed_offset >> 12 & 0xffff_ffff)).into(),
            comp: (u64::from(compressed_size) << 40 | (compressed_offset & 0xff_ffff_ffff)).into(),
            data: data.into(),
        }
    }

    /// `data` of a member of batch `context`, whose plain bytes start `at` bytes into the batch.
    pub fn member(context: u32, at: u32) -> u64 {
        u64::from(context) << 32 | u64::from(at)
    }

    /// Where the plain bytes belong in the device.
    pub fn uncompressed_offset(&self) -> u64 {
        (self.uncomp.get() & 0xffff_ffff) << 12
    }

    /// Length of the plain bytes.
    pub fn uncompressed_size(&self) -> u32 {
        u32::try_from(self.uncomp.get() >> 32 & 0xff_ffff).expect("24 bits") + 1
    }

    /// Flag bits.
    pub fn flags(&self) -> u8 {
        self.uncomp.to_bytes()[7]
    }

    /// Where the stored bytes lie in the blob.
    pub fn compressed_offset(&self) -> u64 {
        self.comp.get() & 0xff_ffff_ffff
    }

    /// Length of the stored bytes.
    pub fn compressed_size(&self) -> u32 {
        u32::try_from(self.comp.get() >> 40).expect("24 bits")
    }

    /// CRC-32C of the plain bytes, if the entry carries one.
    pub fn crc32c(&self) -> Option<u32> {
        let flags = self.flags();
        let carries = flags & Self::HAS_CRC32 != 0 && flags & (Self::ZRAN | Self::BATCH) == 0;
        carries.then(|| u32::try_from(self.data.get() & 0xffff_ffff).expect("32 bits"))
    }
}

/// A row of the table behind the entries of a blob with batches: one stored piece that holds
/// several chunks, one behind the other (`blob.md` section 11.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BatchContext {
    /// Length of the piece as stored.
    pub compressed_size: U32,
    /// Length of its plain bytes. If the two lengths are equal it is not compressed.
    pub uncompressed_size: U32,
    pub reserved: [u8; 32],
}

const _: () = assert!(size_of::<BatchContext>() == 40);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_bytes_are_those_of_a_reference_image() {
        // Chunk 1 of the worked example in `blob.md` section 14.
        let entry = ChunkInfoV1::new(0x5000, 13400, 0x12dc, 2974);
        assert_eq!(entry.uncomp.get(), 0x0345_7000_0000_5000);
        assert_eq!(entry.comp.get(), 0x00b9_d000_0000_12dc);
    }

    #[test]
    fn every_field_survives_at_its_limits() {
        for size in [1, 2, 0x10_0000, 0x10_0001, 0xff_ffff, 0x100_0000] {
            for (decoded, stored) in [(0, 0), (0xfff_ffff_f000, 0xff_ffff_ffff), (4096, 1)] {
                let entry = ChunkInfoV1::new(decoded, size, stored, size);
                assert_eq!(entry.uncompressed_offset(), decoded);
                assert_eq!(entry.compressed_offset(), stored);
                assert_eq!((entry.uncompressed_size(), entry.compressed_size()), (size, size));
            }
        }
    }

    #[test]
    fn every_field_of_a_long_entry_survives_at_its_limits() {
        for size in [1, 0x10_0000, 0x100_0000] {
            for (decoded, stored, len) in [(0, 0, 0), (0xfff_ffff_f000, 0xff_ffff_ffff, 0xff_ffff), (4096, 1, 18)] {
                let entry = ChunkInfoV2::new(0x1f, (decoded, size), (stored, len), u64::MAX);
                assert_eq!((entry.uncompressed_offset(), entry.uncompressed_size()), (decoded, size));
                assert_eq!((entry.compressed_offset(), entry.compressed_size()), (stored, len));
                assert_eq!((entry.flags(), entry.data.get()), (0x1f, u64::MAX));
            }
        }
    }

    #[test]
    fn long_entry_bytes_are_those_of_a_reference_image() {
        // A compressed chunk with its checksum, and the second member of a batch.
        let entry = ChunkInfoV2::new(0x11, (0x10_0000, 0x3_d621), (0x41, 26), 0x5f8a_f121);
        assert_eq!((entry.uncomp.get(), entry.comp.get()), (0x1103_d620_0000_0100, 0x1a00_0000_0041));
        assert_eq!(entry.data.get(), 0x5f8a_f121);
        let entry = ChunkInfoV2::new(0x5, (0x42_1000, 5), (0x9_e452, 0), ChunkInfoV2::member(0, 5));
        assert_eq!((entry.uncomp.get(), entry.comp.get()), (0x0500_0004_0000_0421, 0x9_e452));
        assert_eq!(entry.data.get(), 5);
    }
}
