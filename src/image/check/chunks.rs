//! The chunk table, and the chunk indexes of files against it (`rafs-v6.md` sections 12 and 13).

use super::super::{Image, Inode, RecordIndex};
use super::{Code, Place, Report};
use crate::base::ByteRange;
use crate::format::blobfile::features;
use crate::format::erofs::ChunkIndex;
use crate::format::rafs::{ChunkRecord, chunk_flags, flags};

/// Bits of a record's flags that have a meaning.
const KNOWN_FLAGS: u32 = chunk_flags::COMPRESSED | chunk_flags::ENCRYPTED | chunk_flags::HAS_CRC32;

/// The chunk table by place, and which of its records a file uses.
pub(super) struct Records {
    index: RecordIndex,
    /// By position in the table.
    used: Vec<bool>,
    /// By blob: whether a file uses it.
    used_blobs: Vec<bool>,
    /// Whether every index must be in the table: not in a tarfs image.
    complete: bool,
}

impl Records {
    /// Checks every record alone and their order.
    pub(super) fn check(image: &Image, report: &mut Report) -> Self {
        let rows = image.chunk_records();
        let complete = image.summary().flags & flags::TARFS_MODE == 0;
        let mut last: Option<&ChunkRecord> = None;
        for (number, row) in (0u32..).zip(rows) {
            let place = Place::Row("chunk record", number.into());
            if let Some(rule) = impossible(image, row) {
                report
                    .add(Code::ChunkRecord, &place, || format!("blob {} chunk {}: {rule}", row.blob_index, row.index));
            }
            let order = |row: &ChunkRecord| (row.digest, row.blob_index.get(), row.index.get());
            report.expect(last.is_none_or(|last| order(last) < order(row)), Code::ChunkOrder, &place, || {
                "is not behind the record before it".into()
            });
            last = Some(row);
        }
        let index = RecordIndex::new(image);
        for (first, second, blob, chunk) in index.twins() {
            report.add(Code::ChunkTwice, Place::Row("chunk record", second.into()), || {
                format!("describes chunk {chunk} of blob {blob}, as record {first} does")
            });
        }
        Self { index, used: vec![false; rows.len()], used_blobs: vec![false; image.devices().len()], complete }
    }

    /// Checks the chunk indexes of a regular file.
    pub(super) fn check_file(
        &mut self,
        image: &Image,
        inode: &Inode,
        bits: u32,
        place: &Place<'_>,
        report: &mut Report,
    ) {
        let rows = match image.chunk_indexes(inode) {
            Ok(rows) => rows,
            Err(cause) => return report.add(Code::Truncated, place, || cause.to_string()),
        };
        let chunk_size = u64::from(image.summary().chunk_size);
        report.chunks += rows.len() as u64;
        for (number, row) in (0u64..).zip(rows) {
            let len = chunk_size.min(inode.size - number * chunk_size);
            self.check_index(image, inode, row, len, (number, place), report);
        }
        if let Some(rule) = misread(image, inode, rows, bits) {
            report.add(Code::ChunkFormat, place, || format!("chunk size 2^{bits} in the inode: {rule}"));
        }
    }

    fn check_index(
        &mut self,
        image: &Image,
        inode: &Inode,
        row: &ChunkIndex,
        len: u64,
        (number, place): (u64, &Place<'_>),
        report: &mut Report,
    ) {
        let device = match image.place(inode, row, len) {
            Ok(Some((device, _))) => device,
            Ok(None) => return report.add(Code::Hole, place, || format!("chunk {number} is a hole")),
            Err(cause) => return report.add(Code::ChunkIndex, place, || format!("chunk {number}: {cause}")),
        };
        self.used_blobs[device] = true;
        let entry = &image.devices()[device].entry;
        let index = row.index();
        report.expect(index < entry.chunk_count.get(), Code::ChunkIndex, place, || {
            format!("chunk {number} is number {index} of blob {device}, which has {} chunks", entry.chunk_count)
        });
        if !self.complete {
            return;
        }
        let Some(record) = self.index.find(row) else {
            let own_digests = entry.features.get() & features::INLINED_CHUNK_DIGEST != 0;
            let code = if own_digests { Code::ChunkUnlisted } else { Code::ChunkMissing };
            return report.add(code, place, || {
                format!("chunk {number}: no record of chunk {index} of blob {device} at block {}", row.blkaddr)
            });
        };
        self.used[record] = true;
        let size = image.chunk_records()[record].uncompressed_size.get();
        report.expect(u64::from(size) == len, Code::ChunkLength, place, || {
            format!("chunk {number} has {size} bytes, the file has room for {len}")
        });
    }

    /// Remarks on records and blobs that no file uses.
    pub(super) fn report_unused(&self, image: &Image, report: &mut Report) {
        for (index, _) in self.used_blobs.iter().enumerate().filter(|(_, used)| !**used) {
            report.add(Code::UnusedBlob, Place::Row("blob", index as u64), || "no file uses it".into());
        }
        let unused = self.used.iter().filter(|used| !**used).count();
        report.expect(unused == 0 || !self.complete, Code::UnusedChunks, "chunk table", || {
            format!("no file uses {unused} of {} records", image.chunk_records().len())
        });
    }
}

/// Why a record cannot be right, if so.
fn impossible(image: &Image, row: &ChunkRecord) -> Option<&'static str> {
    let Some(device) = image.devices().get(row.blob_index.get() as usize) else {
        return Some("there is no such blob");
    };
    let entry = &device.entry;
    let set = entry.features.get();
    let (stored, plain) = (row.compressed_size.get(), row.uncompressed_size.get());
    if row.index.get() >= entry.chunk_count.get() {
        return Some("the blob has fewer chunks");
    }
    if plain == 0 || plain > image.summary().chunk_size {
        return Some("its size is zero or larger than a chunk");
    }
    if !row.uncompressed_offset.get().is_multiple_of(image.summary().block_size) {
        return Some("its decoded bytes do not start on a block");
    }
    let decoded = ByteRange::at(row.uncompressed_offset.get(), plain.into());
    if decoded.is_none_or(|decoded| decoded.end() > entry.uncompressed_size.get()) {
        return Some("its decoded bytes end behind the blob");
    }
    if row.flags.get() & !KNOWN_FLAGS != 0 {
        return Some("it has unknown flags");
    }
    // Members of a batch, and chunks of a gzip layer, have no place of their own.
    let own_place = set & (features::BATCH | features::ZRAN) == 0;
    let end = ByteRange::at(row.compressed_offset.get(), stored.into()).map(ByteRange::end);
    if own_place && (stored == 0 || end.is_none_or(|end| end > entry.compressed_size.get())) {
        return Some("its stored bytes are none, or end behind the blob");
    }
    let as_is = row.flags.get() & (chunk_flags::COMPRESSED | chunk_flags::ENCRYPTED) == 0;
    (own_place && as_is && stored != plain).then_some("it is stored as it is, but with another size")
}

/// How the kernel would misread `inode`, if so. It takes one index for every 2^`bits` bytes and
/// reads on from there, so all chunks of the image in such a piece must follow each other.
fn misread(image: &Image, inode: &Inode, rows: &[ChunkIndex], bits: u32) -> Option<String> {
    let (size, block) = (u64::from(image.summary().chunk_size), image.summary().block_size);
    let piece = 1u64 << bits;
    if piece < size && inode.size > piece {
        return Some(format!("smaller than the chunks of the image ({size}), so there are too few indexes"));
    }
    let per_piece = usize::try_from(piece / size).unwrap_or(usize::MAX).max(1);
    let step = size / block;
    for (number, pair) in rows.windows(2).enumerate() {
        // Behind the first piece, the kernel takes indexes that stand for earlier chunks.
        if per_piece > 1 && number + 1 >= per_piece {
            return Some(format!("smaller than the file, but larger than the chunks of the image ({size})"));
        }
        let follows = pair[0].device_id.to_bytes()[0] == pair[1].device_id.to_bytes()[0]
            && u64::from(pair[0].blkaddr.get()) + step == u64::from(pair[1].blkaddr.get());
        if per_piece > 1 && !follows {
            return Some(format!("chunk {} does not follow the one before it", number + 1));
        }
    }
    None
}
