//! Superblocks, devices, blob table and prefetch table (`rafs-v6.md` sections 2 to 6).

use super::super::{Device, Image};
use super::{Code, Report};
use crate::base::ByteRange;
use crate::format::blobfile::{ChunkInfoV1, ChunkInfoV2, features};
use crate::format::erofs::{DeviceSlot, SUPERBLOCK_OFFSET, Superblock};
use crate::format::rafs::{
    Algorithm, DEVICE_TABLE_OFFSET, DigestAlgorithm, EXT_SUPERBLOCK_OFFSET, ExtSuperblock, flags,
};
use crate::format::{array_at, record_at};

/// `EROFS_FEATURE_COMPAT_SB_CHKSUM`.
const COMPAT_CHECKSUM: u32 = 0x1;
/// Where tables start: multiples of this, and never at zero.
const TABLE_ALIGN: u64 = 4096;
/// Shortest bootstrap that the reference reader loads (`rafs-v6.md` section 1).
const MIN_LENGTH: u64 = 8192;
/// What the superblock of old images without blobs says instead of zero blocks.
const OLD_EMPTY_BLOCKS: u32 = 4096;
/// Limits of `rafs-v6.md` section 5.
const MAX_CHUNKS: u32 = 0x100_0000;
const MAX_STORED: u64 = 1 << 40;
const MAX_DECODED: u64 = 1 << 44;

pub(super) fn check(image: &Image, report: &mut Report) {
    let sb: &Superblock = record_at(image.bytes(), SUPERBLOCK_OFFSET, "superblock").expect("checked by parse()");
    let ext: &ExtSuperblock =
        record_at(image.bytes(), EXT_SUPERBLOCK_OFFSET, "extended superblock").expect("checked by parse()");
    superblock(image, sb, report);
    extended(image, sb, ext, report);
    let slots: &[DeviceSlot] =
        array_at(image.bytes(), DEVICE_TABLE_OFFSET, image.devices().len() as u64, "device table")
            .expect("checked by parse()");
    mapped(image, slots, report);
    for (index, (device, slot)) in image.devices().iter().zip(slots).enumerate() {
        let place = format!("blob {index}");
        blob(image, device, slot, &place, report);
        blob_features(image, device, &place, report);
    }
}

fn superblock(image: &Image, sb: &Superblock, report: &mut Report) {
    let place = "superblock";
    let len = image.bytes().len() as u64;
    report.expect(len >= MIN_LENGTH && len.is_multiple_of(4096), Code::Length, "bootstrap", || {
        format!("{len} bytes; other readers want a multiple of 4096, and at least {MIN_LENGTH}")
    });
    let has_checksum = sb.feature_compat.get() & COMPAT_CHECKSUM != 0;
    report.expect(!has_checksum, Code::Checksum, place, || "the kernel would verify a checksum".into());
    let zero = [
        ("checksum", u64::from(sb.checksum.get())),
        ("sb_extslots", sb.sb_extslots.into()),
        ("compression algorithms", sb.compression_algs.get().into()),
        ("reserved bytes", sb.reserved.iter().map(|&byte| u64::from(byte)).sum()),
    ];
    for (field, value) in zero {
        report.expect(value == 0, Code::Reserved, place, || format!("{field} is {value:#x}, must be zero"));
    }
    let named = sb.volume_name.contains(&0);
    report.expect(named, Code::VolumeName, place, || "the volume name has no end in its 16 bytes".into());
    report.expect(sb.xattr_blkaddr.get() == 0, Code::SharedXattrs, place, || {
        format!("xattrs are shared from block {}", sb.xattr_blkaddr)
    });
    let blocks: u64 = image.devices().iter().map(|device| device.len / image.summary().block_size).sum();
    let found = sb.blocks.get();
    let old = image.devices().is_empty() && found == OLD_EMPTY_BLOCKS;
    report.expect(u64::from(found) == blocks || old, Code::BlockCount, place, || {
        format!("{found} blocks; the devices have {blocks}")
    });
}

fn extended(image: &Image, sb: &Superblock, ext: &ExtSuperblock, report: &mut Report) {
    let tables = [
        ("blob table", ext.blob_table_offset.get(), TABLE_ALIGN, ext.blob_table_size.get() > 0),
        ("chunk table", ext.chunk_table_offset.get(), TABLE_ALIGN, ext.chunk_table_size.get() > 0),
        ("prefetch table", ext.prefetch_table_offset.get(), 8, image.prefetch_table.1 > 0),
    ];
    for (place, at, align, exists) in tables {
        report.expect(!exists || at > 0 && at.is_multiple_of(align), Code::TableStart, place, || {
            format!("starts at byte {at}, which is not a multiple of {align}")
        });
    }
    let set = ext.flags.get();
    let place = "extended superblock";
    let mut flag = |holds: bool, rule: &str| {
        report.expect(holds, Code::Flags, place, || format!("flags {set:#x}: {rule}"));
    };
    let tarfs = set & flags::TARFS_MODE != 0;
    flag(tarfs == (sb.blkszbits == 9), "tarfs mode and blocks of 512 bytes go together");
    let ciphers = flags::ENCRYPTION_NONE | flags::ENCRYPTION_AES_128_XTS;
    flag(set & ciphers != ciphers, "both encrypted and not encrypted");
    let features = |device: &Device| device.entry.features.get();
    if set & flags::INLINED_CHUNK_DIGEST != 0 {
        let all = image.devices().iter().all(|device| features(device) & features::INLINED_CHUNK_DIGEST != 0);
        flag(all, "every blob should carry digests, and one does not");
    }
    let encrypted = image.devices().iter().any(|device| features(device) & features::ENCRYPTED != 0);
    flag(!encrypted || set & flags::ENCRYPTION_AES_128_XTS != 0, "a blob is encrypted, and the image does not say so");
}

/// Places in the flat address space that the kernel uses when all devices are one.
fn mapped(image: &Image, slots: &[DeviceSlot], report: &mut Report) {
    let block = image.summary().block_size;
    let mut ranges = Vec::new();
    for (index, slot) in slots.iter().enumerate() {
        let start = u64::from(slot.mapped_blkaddr.get()) * block;
        if start == 0 {
            report.add(Code::NotMapped, format!("device {index}"), || {
                "has no address, so the image cannot be exported as one block device".into()
            });
        } else if let Some(range) = ByteRange::at(start, u64::from(slot.blocks.get()) * block) {
            ranges.push((range, index));
        }
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let ((one, first), (other, second)) = (pair[0], pair[1]);
        report.expect(!one.overlaps(other), Code::MappedOverlap, format!("device {second}"), || {
            format!("mapped to {other}, where device {first} lies ({one})")
        });
    }
}

fn blob(image: &Image, device: &Device, slot: &DeviceSlot, place: &str, report: &mut Report) {
    let entry = &device.entry;
    let decoded = entry.uncompressed_size.get();
    let blocks = decoded / image.summary().block_size;
    report.expect(u64::from(slot.blocks.get()) == blocks, Code::DeviceLength, place, || {
        format!("the device has {} blocks, {decoded} bytes of the blob are {blocks}", slot.blocks)
    });
    let chunk_size = image.summary().chunk_size;
    let mut field = |holds: bool, name: &str, value: u64, rule: &str| {
        report.expect(holds, Code::BlobField, place, || format!("{name} is {value}, {rule}"));
    };
    let size = entry.chunk_size.get();
    field(size == chunk_size, "chunk size", size.into(), "not that of the image");
    let count = entry.chunk_count.get();
    field((1..=MAX_CHUNKS).contains(&count), "number of chunks", count.into(), "outside 1 to 2^24");
    let number = entry.compression.get();
    field(Algorithm::from_number(number).is_some(), "compression", number.into(), "which is unknown");
    let number = entry.ci_compression.get();
    field(Algorithm::from_number(number).is_some(), "chunk-info compression", number.into(), "which is unknown");
    let number = entry.digest.get();
    field(DigestAlgorithm::from_number(number).is_some(), "digest", number.into(), "which is unknown");
    let stored = entry.compressed_size.get();
    field(stored <= MAX_STORED, "stored size", stored, "more than 2^40");
    field(decoded <= MAX_DECODED, "decoded size", decoded, "more than 2^44");
    let cipher = entry.cipher.get();
    let encrypted = entry.features.get() & features::ENCRYPTED != 0;
    field(cipher <= 1 && (cipher == 1) == encrypted, "cipher", cipher.into(), "not what the features say");
    let reserved = entry.reserved.iter().map(|&byte| u64::from(byte)).sum();
    field(reserved == 0, "sum of the reserved bytes", reserved, "must be zero");
}

fn blob_features(image: &Image, device: &Device, place: &str, report: &mut Report) {
    let entry = &device.entry;
    let set = entry.features.get();
    let has = |bits| set & bits != 0;
    let tarfs = image.summary().flags & flags::TARFS_MODE != 0;
    let mut rule = |holds: bool, text: &str| {
        report.expect(holds, Code::BlobFeatures, place, || format!("features {set:#x}: {text}"));
    };
    rule(set & !features::KNOWN == 0, "unknown bits");
    rule(has(features::ALIGNED) != tarfs, "chunks are aligned in every blob but those of tarfs images");
    let long = has(features::CHUNK_INFO_V2);
    let special = has(features::BATCH | features::ZRAN | features::ENCRYPTED);
    rule(long || !special, "batched, encrypted or indexed chunks need entries of 24 bytes");

    let count = u64::from(entry.chunk_count.get());
    let (stored, plain) = (entry.ci_compressed_size.get(), entry.ci_uncompressed_size.get());
    let row = if long { size_of::<ChunkInfoV2>() } else { size_of::<ChunkInfoV1>() };
    let want = count * row as u64;
    let fits = if long && special { plain >= want } else { plain == want };
    // The bootstrap has it all.
    let exempt = tarfs || entry.has_no_tables() || has(features::IS_CHUNKDICT_GENERATED);
    report.expect(fits || exempt, Code::BlobTables, place, || {
        format!("the chunk-info array has {plain} bytes, {count} chunks need {want}")
    });
    report.expect(stored <= plain || exempt, Code::BlobTables, place, || {
        format!("the chunk-info array has {stored} bytes stored and {plain} plain")
    });
}
