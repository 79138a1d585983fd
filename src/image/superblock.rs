use std::collections::HashSet;

use super::{Device, ImageError, MAX_BOOTSTRAP};
use crate::base::{BlobId, ByteRange};
use crate::format::erofs::{self, DeviceSlot, MAX_DEVICES, SUPERBLOCK_OFFSET, Superblock};
use crate::format::rafs::{self, BlobEntry, ChunkRecord, ExtSuperblock, flags};
use crate::format::{array_at, record_at};
use zerocopy::little_endian::U32;

/// Facts about an image as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Length of the bootstrap in bytes.
    pub bootstrap_len: u64,
    /// Bytes of one block, in which the bootstrap counts its addresses and those in devices: 4096,
    /// or 512 in a tarfs image.
    pub block_size: u64,
    /// Number of paths, the root included.
    pub paths: u64,
    /// Inode number of the root.
    pub root: u64,
    /// First byte of the metadata area.
    pub meta_start: u64,
    /// First byte of the xattrs that inodes share, if there are any. RAFS writes none.
    pub shared_xattrs: Option<u64>,
    /// Chunk size of files in bytes: a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// [`flags`] of the extended superblock.
    pub flags: u64,
    /// What the volume name says it was.
    pub origin: Origin,
}

/// Which version of the format an image had before it became a bootstrap that the kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// RAFS v6, which is that already.
    V6,
    /// RAFS v5, lifted.
    V5,
}

impl Origin {
    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6 => "RAFS v6",
            Self::V5 => "RAFS v5",
        }
    }
}

/// Volume name of a bootstrap that was lifted from RAFS v5.
pub const VOLUME_OF_V5: [u8; 16] = *b"lifted rafs v5\0\0";

pub(super) struct Head {
    pub(super) summary: Summary,
    pub(super) devices: Vec<Device>,
    /// First byte and number of records.
    pub(super) chunk_table: (u64, u64),
    /// First byte and number of entries.
    pub(super) prefetch_table: (u64, u64),
}

/// Checks everything that a mount relies on before the kernel sees the image.
pub(super) fn parse(bytes: &[u8]) -> Result<Head, ImageError> {
    let field = |field, value: u64| Err(ImageError::Field { field, value });
    let sb: &Superblock = record_at(bytes, SUPERBLOCK_OFFSET, "superblock")?;
    if sb.magic.get() != erofs::MAGIC {
        return Err(ImageError::NotRafs("no EROFS magic at byte 1024"));
    }
    if sb.feature_compat.get() & erofs::COMPAT_RAFS_V6 == 0 {
        return Err(ImageError::NotRafs("an EROFS image without the RAFS marker"));
    }
    let len = bytes.len() as u64;
    if len > MAX_BOOTSTRAP || !len.is_multiple_of(512) {
        return field("bootstrap length", len);
    }
    if !matches!(sb.blkszbits, 9 | 12) {
        return field("block size bits", sb.blkszbits.into());
    }
    let block_size = 1 << sb.blkszbits;
    if sb.feature_incompat.get() != erofs::INCOMPAT_CHUNKED_FILE | erofs::INCOMPAT_DEVICE_TABLE {
        return field("incompatible features", sb.feature_incompat.get().into());
    }
    if sb.devt_slotoff.get() != erofs::DEVICE_TABLE_SLOT {
        return field("device table offset", sb.devt_slotoff.get().into());
    }
    let meta_start = u64::from(sb.meta_blkaddr.get()) * block_size;
    if meta_start > len {
        return field("metadata address", meta_start);
    }
    let ext: &ExtSuperblock = record_at(bytes, rafs::EXT_SUPERBLOCK_OFFSET, "extended superblock")?;
    check_extended(ext)?;
    let devices = devices(bytes, sb, ext)?;
    let chunk_table = chunk_table(bytes, ext)?;
    let prefetch_table = prefetch_table(bytes, ext)?;
    check_apart(ext, prefetch_table.1 > 0)?;
    let shared_xattrs = match sb.xattr_blkaddr.get() {
        0 => None,
        block if u64::from(block) * block_size < len => Some(u64::from(block) * block_size),
        block => return field("address of the shared xattrs", block.into()),
    };
    let summary = Summary {
        bootstrap_len: len,
        block_size,
        paths: sb.inos.get(),
        root: sb.root_nid.get().into(),
        meta_start,
        shared_xattrs,
        chunk_size: ext.chunk_size.get(),
        flags: ext.flags.get(),
        origin: if sb.volume_name == VOLUME_OF_V5 { Origin::V5 } else { Origin::V6 },
    };
    Ok(Head { summary, devices, chunk_table, prefetch_table })
}

fn chunk_table(bytes: &[u8], ext: &ExtSuperblock) -> Result<(u64, u64), ImageError> {
    let len = ext.chunk_table_size.get();
    let record = size_of::<ChunkRecord>() as u64;
    if !len.is_multiple_of(record) {
        return Err(ImageError::Field { field: "chunk table size", value: len });
    }
    let table = (ext.chunk_table_offset.get(), len / record);
    array_at::<ChunkRecord>(bytes, table.0, table.1, "chunk table")?;
    Ok(table)
}

/// Old writers left a size without a place behind when there was nothing to prefetch.
fn prefetch_table(bytes: &[u8], ext: &ExtSuperblock) -> Result<(u64, u64), ImageError> {
    let (at, len) = (ext.prefetch_table_offset.get(), u64::from(ext.prefetch_table_size.get()));
    let entry = size_of::<U32>() as u64;
    if !len.is_multiple_of(entry) {
        return Err(ImageError::Field { field: "prefetch table size", value: len });
    }
    let table = if at == 0 { (0, 0) } else { (at, len / entry) };
    array_at::<U32>(bytes, table.0, table.1, "prefetch table")?;
    Ok(table)
}

/// Fails if two of the tables share a byte (`rafs-v6.md` section 3). All lie in the bootstrap.
fn check_apart(ext: &ExtSuperblock, has_prefetch: bool) -> Result<(), ImageError> {
    let prefetch_len = if has_prefetch { ext.prefetch_table_size.get() } else { 0 };
    let tables = [
        ("blob table", ext.blob_table_offset.get(), ext.blob_table_size.get().into()),
        ("chunk table", ext.chunk_table_offset.get(), ext.chunk_table_size.get()),
        ("prefetch table", ext.prefetch_table_offset.get(), prefetch_len.into()),
    ];
    let ranges = tables.map(|(name, at, len)| (name, ByteRange::at(at, len).filter(|range| !range.is_empty())));
    for (index, (first, one)) in ranges.iter().enumerate() {
        for (second, other) in &ranges[index + 1..] {
            if let (Some(one), Some(other)) = (one, other)
                && one.overlaps(*other)
            {
                return Err(ImageError::Overlap { first, second });
            }
        }
    }
    Ok(())
}

fn check_extended(ext: &ExtSuperblock) -> Result<(), ImageError> {
    let set = ext.flags.get();
    let one_of = |bits: u64| (set & bits).count_ones() == 1;
    let compression =
        flags::COMPRESSION_NONE | flags::COMPRESSION_LZ4 | flags::COMPRESSION_GZIP | flags::COMPRESSION_ZSTD;
    let sound = set & !flags::KNOWN == 0 && one_of(compression) && one_of(flags::HASH_BLAKE3 | flags::HASH_SHA256);
    if !sound {
        return Err(ImageError::Field { field: "RAFS flags", value: set });
    }
    let chunk_size = ext.chunk_size.get();
    if !chunk_size.is_power_of_two() || !(0x1000..=0x100_0000).contains(&chunk_size) {
        return Err(ImageError::Field { field: "chunk size", value: chunk_size.into() });
    }
    Ok(())
}

fn devices(bytes: &[u8], sb: &Superblock, ext: &ExtSuperblock) -> Result<Vec<Device>, ImageError> {
    let count = usize::from(sb.extra_devices.get());
    let table_len = u64::from(ext.blob_table_size.get());
    if count > MAX_DEVICES || table_len != (count * size_of::<BlobEntry>()) as u64 {
        return Err(ImageError::Field { field: "number of devices", value: count as u64 });
    }
    let slots: &[DeviceSlot] = array_at(bytes, rafs::DEVICE_TABLE_OFFSET, count as u64, "device table")?;
    let table_at = if count == 0 { 0 } else { ext.blob_table_offset.get() };
    let entries: &[BlobEntry] = array_at(bytes, table_at, count as u64, "blob table")?;
    let mut seen = HashSet::new();
    slots
        .iter()
        .zip(entries)
        .enumerate()
        .map(|(index, (slot, entry))| device(bytes.len() as u64, 1 << sb.blkszbits, index, slot, entry, &mut seen))
        .collect()
}

fn device(
    bootstrap_len: u64,
    block_size: u64,
    index: usize,
    slot: &DeviceSlot,
    entry: &BlobEntry,
    seen: &mut HashSet<BlobId>,
) -> Result<Device, ImageError> {
    if entry.id == [b'x'; 64] {
        return Err(ImageError::Unsupported("a bootstrap that does not name its blob (taken out of a blob file)"));
    }
    let blob = BlobId::from_padded(&entry.id).map_err(|cause| ImageError::BlobId { index, cause })?;
    let len = u64::from(slot.blocks.get()) * block_size;
    let agree = slot.tag == entry.id
        && entry.index.get() as usize == index
        && len > 0
        // Below the end of the bootstrap, the kernel would take its own metadata from the device.
        && (slot.mapped_blkaddr.get() == 0 || u64::from(slot.mapped_blkaddr.get()) * block_size >= bootstrap_len)
        && len <= entry.uncompressed_size.get().checked_next_multiple_of(block_size).unwrap_or(0);
    if !agree {
        return Err(ImageError::Device(index));
    }
    if !seen.insert(blob.clone()) {
        return Err(ImageError::Twice(blob));
    }
    Ok(Device { blob, len, entry: *entry })
}
