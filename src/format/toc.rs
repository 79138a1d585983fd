//! What separates the parts of a blob file that holds more than chunks: tar headers, and the table
//! of contents at the end (`blob.md` sections 6 and 7).
//!
//! A tar header stands *behind* the part it describes, and nothing is padded to 512 bytes: such a
//! file is walked from its end, and is no archive that a tar program could read.

use std::mem::offset_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Names of the parts, in the order in which they follow each other.
pub mod part {
    pub const DATA: &str = "image.blob";
    /// The chunk-info array. Its tar header counts the blob header with it.
    pub const CHUNK_INFO: &str = "blob.meta";
    pub const HEADER: &str = "blob.meta.header";
    pub const DIGESTS: &str = "blob.digest";
    pub const BOOTSTRAP: &str = "image.boot";
    pub const TOC: &str = "rafs.blob.toc";
}

/// One row of the table of contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TocEntry {
    /// One of [`TocEntry::PLAIN`], [`TocEntry::ZSTD`], [`TocEntry::LZ4`].
    pub flags: U32,
    pub reserved: U32,
    /// Padded with NUL, which is missing if the name fills it.
    pub name: [u8; 16],
    /// SHA-256 of the plain part.
    pub uncompressed_digest: [u8; 32],

    /// Bytes from the start of the blob file.
    pub compressed_offset: U64,
    pub compressed_size: U64,

    pub uncompressed_size: U64,
    /// Some writers leave rubbish here.
    pub reserved2: [u8; 48],
}

const _: () = assert!(size_of::<TocEntry>() == 128);
const _: () = assert!(offset_of!(TocEntry, uncompressed_size) == 0x48);

impl TocEntry {
    /// The part is stored as it is.
    pub const PLAIN: u32 = 1;
    /// The part is one Zstandard frame.
    pub const ZSTD: u32 = 2;
    /// The part is one LZ4 block.
    pub const LZ4: u32 = 4;
    /// The bits that say how the part is compressed.
    pub const COMPRESSION_MASK: u32 = 0xf;

    /// A row for the part called `name`.
    ///
    /// # Panics
    /// If the name has more than 16 bytes.
    pub fn new(name: &str, flags: u32) -> Self {
        let mut entry = Self::new_zeroed();
        entry.flags = flags.into();
        entry.name[..name.len()].copy_from_slice(name.as_bytes());
        entry
    }

    /// The name without its padding.
    pub fn name(&self) -> &[u8] {
        let len = self.name.iter().position(|byte| *byte == 0).unwrap_or(self.name.len());
        &self.name[..len]
    }
}

/// A tar header with only those fields filled that the format fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TarHeader {
    pub name: [u8; 100],
    /// Mode, uid and gid.
    pub owner: [u8; 24],

    pub size: [u8; 12],
    pub mtime: [u8; 12],
    pub checksum: [u8; 8],
    pub kind: u8,
    pub link: [u8; 100],

    pub magic: [u8; 8],
    pub rest: [u8; 247],
}

const _: () = assert!(size_of::<TarHeader>() == 512);
const _: () = assert!(offset_of!(TarHeader, magic) == 257);

impl TarHeader {
    /// Magic and version of the GNU format.
    pub const MAGIC: [u8; 8] = *b"ustar  \0";
    /// The kind of a regular file.
    pub const REGULAR: u8 = b'0';

    /// The header behind a part of `size` bytes called `name`.
    ///
    /// # Panics
    /// If the name has more than 100 bytes.
    pub fn new(name: &str, size: u64) -> Self {
        let mut header = Self::new_zeroed();
        header.name[..name.len()].copy_from_slice(name.as_bytes());
        header.size = size_field(size);
        header.mtime = size_field(0);
        header.kind = Self::REGULAR;
        header.magic = Self::MAGIC;
        header.checksum = header.sum();
        header
    }

    /// The checksum field that belongs to the other fields.
    fn sum(&self) -> [u8; 8] {
        let summed = Self { checksum: [b' '; 8], ..*self };
        let sum: u32 = summed.as_bytes().iter().copied().map(u32::from).sum();
        let mut field = [0; 8];
        field[..7].copy_from_slice(format!("{sum:07o}").as_bytes());
        field
    }
}

/// Eleven octal digits and NUL; from 8 GiB on the number itself, big-endian behind a marker.
fn size_field(size: u64) -> [u8; 12] {
    let mut field = [0; 12];
    if size < 1 << 33 {
        field[..11].copy_from_slice(format!("{size:011o}").as_bytes());
    } else {
        field[0] = 0x80;
        field[4..].copy_from_slice(&size.to_be_bytes());
    }
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_fields_are_those_of_the_format() {
        let header = TarHeader::new(part::DATA, 0x1e7a);
        let bytes = header.as_bytes();

        assert_eq!(&bytes[..11], b"image.blob\0");
        assert_eq!(&bytes[124..148], b"00000017172\x0000000000000\0");
        // The checksum as a tar program adds it up.
        let sum: u32 = bytes.iter().map(|b| u32::from(*b)).sum::<u32>()
            - bytes[148..156].iter().map(|b| u32::from(*b)).sum::<u32>()
            + 8 * 32;
        assert_eq!(&bytes[148..156], format!("{sum:07o}\0").as_bytes());
        assert_eq!((bytes[156], &bytes[257..265]), (b'0', b"ustar  \0".as_slice()));
        let filled = |at: usize| matches!(at, 0..10 | 124..147 | 148..156 | 156 | 257..265);
        assert!(bytes.iter().enumerate().all(|(at, byte)| filled(at) || *byte == 0), "everything else is NUL");
    }

    #[test]
    fn sizes_that_do_not_fit_in_octal_are_written_in_binary() {
        assert_eq!(&size_field((1 << 33) - 1), b"77777777777\0");
        assert_eq!(size_field(1 << 33), [0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
    }

    #[test]
    fn the_longest_name_fills_its_field() {
        let entry = TocEntry::new(part::HEADER, TocEntry::PLAIN);
        assert_eq!((entry.name(), entry.name), (part::HEADER.as_bytes(), *b"blob.meta.header"));
        assert_eq!(TocEntry::new(part::DATA, 1).name(), b"image.blob");
    }
}
