//! Records of a data blob: chunk-info entries and the header behind them (`blob.md` section 4).

use std::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

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
    /// A hot blob: all of it is wanted first, in its order.
    pub const IS_SEPARATED_WITH_PREFETCH_FILES: u32 = 0x400;
    pub const EXTERNAL: u32 = 0x800;
    pub const HAS_TAR_HEADER: u32 = 0x1000_0000;
    pub const HAS_TOC: u32 = 0x2000_0000;
    pub const CAP_TAR_TOC: u32 = 0x4000_0000;
    /// Bits with the names that the reference tools give them.
    pub const NAMES: [(u32, &str); 15] = [
        (ALIGNED, "aligned"),
        (INLINED_FS_META, "inlined-fs-meta"),
        (CHUNK_INFO_V2, "chunk-info-v2"),
        (ZRAN, "zran"),
        (SEPARATE, "separate"),
        (INLINED_CHUNK_DIGEST, "inlined-chunk-digest"),
        (TARFS, "tarfs"),
        (BATCH, "batch"),
        (ENCRYPTED, "encrypted"),
        (IS_CHUNKDICT_GENERATED, "chunkdict-generated"),
        (IS_SEPARATED_WITH_PREFETCH_FILES, "separated-with-prefetch-files"),
        (EXTERNAL, "external"),
        (HAS_TAR_HEADER, "has-tar-header"),
        (HAS_TOC, "has-toc"),
        (CAP_TAR_TOC, "cap-tar-toc"),
    ];
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

    /// The entry of a member of a batch: `part_at` bytes into the plain bytes of context `context`,
    /// whose stored bytes start at `compressed_offset`. Limits as in [`ChunkInfoV1::new`].
    pub fn member(
        (uncompressed_offset, uncompressed_size): (u64, u32),
        compressed_offset: u64,
        (context, part_at): (u32, u32),
        encrypted: bool,
    ) -> Self {
        let flags = Self::BATCH | Self::COMPRESSED | if encrypted { Self::ENCRYPTED } else { 0 };
        let data = u64::from(context) << 32 | u64::from(part_at);
        Self::packed((uncompressed_offset, uncompressed_size), (compressed_offset, 0), flags, data)
    }

    /// The entry of a chunk with stored bytes of its own. `flags` are [`ChunkInfoV2::COMPRESSED`]
    /// and [`ChunkInfoV2::ENCRYPTED`]. Sizes are at most 2^24 decoded and 2^24 - 1 stored.
    ///
    /// A CRC of 0 is left out: readers refuse it (`blob.md` section 3.3).
    pub fn alone(decoded: (u64, u32), stored: (u64, u32), flags: u8, crc32c: Option<u32>) -> Self {
        let crc = crc32c.unwrap_or(0);
        let has_crc = if crc == 0 { 0 } else { Self::HAS_CRC32 };
        Self::packed(decoded, stored, flags | has_crc, crc.into())
    }

    fn packed(
        (decoded_at, decoded_size): (u64, u32),
        (stored_at, stored_size): (u64, u32),
        flags: u8,
        data: u64,
    ) -> Self {
        let size = u64::from(decoded_size - 1) & 0xff_ffff;
        Self {
            uncomp: (u64::from(flags) << 56 | size << 32 | (decoded_at >> 12 & 0xffff_ffff)).into(),
            comp: (u64::from(stored_size) << 40 | (stored_at & 0xff_ffff_ffff)).into(),
            data: data.into(),
        }
    }

    /// Context and offset of the chunk in the plain bytes of that context, for [`Self::BATCH`] and
    /// [`Self::ZRAN`].
    pub fn place(&self) -> (u32, u32) {
        let word = |value: u64| u32::try_from(value & 0xffff_ffff).expect("32 bits");
        (word(self.data.get() >> 32), word(self.data.get()))
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

/// What the members of one batch share (`blob.md` section 11.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BatchContext {
    /// Stored bytes of the batch.
    pub compressed_size: U32,
    /// Its plain bytes, all members together.
    pub uncompressed_size: U32,
    pub reserved: [u8; 32],
}

const _: () = assert!(size_of::<BatchContext>() == 40);

/// A place where a gzip stream can be entered (`blob.md` section 11.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZranContext {
    /// Of the compressed bytes in the gzip file.
    pub in_offset: U64,
    /// Of the plain bytes in what the whole file decompresses to.
    pub out_offset: U64,
    /// Of the dictionary in the area behind all contexts.
    pub dict_offset: U64,
    pub in_len: U32,
    pub out_len: U32,

    pub dict_size: U32,
    /// The byte before `in_offset` if bits of it belong to the context.
    pub ctx_byte: u8,
    /// How many high bits of that byte do, 0 to 7.
    pub ctx_bits: u8,
    pub reserved: [u8; 2],
}

const _: () = assert!(size_of::<ZranContext>() == 40);
const _: () = assert!(offset_of!(ZranContext, ctx_byte) == 0x24);

/// One row of the table of contents at the end of a blob (`blob.md` section 6).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TocEntry {
    /// The low four bits are [`TocEntry::PLAIN`], [`TocEntry::ZSTD`] or LZ4 (4).
    pub flags: U32,
    pub reserved: U32,
    /// Padded with NUL; may fill all of it.
    pub name: [u8; 16],

    /// SHA-256 of the plain content.
    pub digest: [u8; 32],
    pub compressed_offset: U64,
    pub compressed_size: U64,
    pub uncompressed_size: U64,
    /// Not always zero: old writers leaked into the last four bytes.
    pub reserved2: [u8; 48],
}

const _: () = assert!(size_of::<TocEntry>() == 128);
const _: () = assert!(offset_of!(TocEntry, uncompressed_size) == 0x48);

impl TocEntry {
    /// Flag: stored as is.
    pub const PLAIN: u32 = 1;
    /// Flag: one zstd frame.
    pub const ZSTD: u32 = 2;
    /// Flag: one LZ4 block.
    pub const LZ4: u32 = 4;
}

/// The tar header that follows each part of a blob (`blob.md` section 7).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PartHeader {
    /// Padded with NUL.
    pub name: [u8; 100],
    unused: [u8; 24],
    size: [u8; 12],
    mtime: [u8; 12],
    checksum: [u8; 8],
    pub kind: u8,
    unused2: [u8; 100],
    pub magic: [u8; 8],
    unused3: [u8; 247],
}

const _: () = assert!(size_of::<PartHeader>() == 512);
const _: () = assert!(offset_of!(PartHeader, magic) == 257);

impl PartHeader {
    /// [`PartHeader::kind`] of a regular file.
    pub const REGULAR: u8 = b'0';
    /// [`PartHeader::magic`] of the GNU form.
    pub const GNU: [u8; 8] = *b"ustar  \0";

    /// The header of a part of `size` bytes; `name` has at most 100 bytes.
    pub fn new(name: &str, size: u64) -> Self {
        let mut header = Self::new_zeroed();
        header.name[..name.len()].copy_from_slice(name.as_bytes());
        if size < 1 << 33 {
            header.size[..11].copy_from_slice(format!("{size:011o}").as_bytes());
        } else {
            header.size[0] = 0x80;
            header.size[4..].copy_from_slice(&size.to_be_bytes());
        }
        header.mtime[..11].copy_from_slice(b"00000000000");
        header.kind = Self::REGULAR;
        header.magic = Self::GNU;
        let sum = format!("{:07o}", header.sum());
        header.checksum[..7].copy_from_slice(sum.as_bytes());
        header
    }

    /// Length of the part before the header, or `None` if the field makes no sense.
    pub fn size(&self) -> Option<u64> {
        if self.size[0] & 0x80 == 0 {
            return octal(&self.size);
        }
        let (high, low) = self.size.split_at(4);
        let is_small = high[0] == 0x80 && high[1..] == [0; 3];
        is_small.then(|| u64::from_be_bytes(low.try_into().expect("8 bytes")))
    }

    /// Whether the checksum is right.
    pub fn is_sound(&self) -> bool {
        octal(&self.checksum) == Some(self.sum().into())
    }

    /// The sum of all bytes, those of the checksum counted as spaces.
    fn sum(&self) -> u32 {
        let spaces = Self { checksum: [b' '; 8], ..*self };
        spaces.as_bytes().iter().map(|&byte| u32::from(byte)).sum()
    }
}

/// Digits up to the first NUL or space.
fn octal(field: &[u8]) -> Option<u64> {
    let len = field.iter().position(|byte| matches!(byte, 0 | b' ')).unwrap_or(field.len());
    let digits = field[..len].iter().map(|&digit| char::from(digit).to_digit(8).map(u64::from));
    // At most 12 digits of 3 bits, so nothing overflows.
    (len > 0).then(|| digits.into_iter().try_fold(0, |value, digit| Some(value << 3 | digit?))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_headers_are_those_of_a_reference_image() {
        // `blob.md` section 14: 0x1e7a bytes of data.
        let header = PartHeader::new("image.blob", 0x1e7a);
        assert_eq!(&header.size, b"00000017172\0");
        assert_eq!(&header.checksum, b"0005641\0");
        assert!(header.is_sound());
        for size in [0, 1, (1 << 33) - 1, 1 << 33, u64::MAX] {
            assert_eq!(PartHeader::new("image.boot", size).size(), Some(size));
        }
    }

    #[test]
    fn long_entries_keep_every_field() {
        let entry = ChunkInfoV2::member((0xfff_ffff_f000, 0x100_0000), 0xff_ffff_ffff, (7, 9), true);
        assert_eq!((entry.uncompressed_offset(), entry.uncompressed_size()), (0xfff_ffff_f000, 0x100_0000));
        assert_eq!((entry.compressed_offset(), entry.compressed_size()), (0xff_ffff_ffff, 0));
        assert_eq!((entry.place(), entry.flags(), entry.crc32c()), ((7, 9), 0x0d, None));
        let entry = ChunkInfoV2::alone((4096, 1), (5, 0xff_ffff), ChunkInfoV2::ENCRYPTED, Some(3));
        assert_eq!((entry.uncompressed_offset(), entry.compressed_size()), (4096, 0xff_ffff));
        assert_eq!((entry.flags(), entry.crc32c()), (0x18, Some(3)));
        assert_eq!(ChunkInfoV2::alone((0, 1), (0, 1), 0, Some(0)).flags(), 0);
    }

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
}
