//! Chunk records of files, and where their chunks lie in a device.
//!
//! In v5 plain bytes are packed, and a kernel reads devices in whole blocks. So the decoded space is
//! laid out anew: each chunk starts where its block started, one block further for each chunk before
//! it. Nothing overlaps then, and the place depends on the chunk alone: images that list different
//! chunks of one blob agree about those that both list.

use super::tables::Extent;
use super::{Bootstrap, BootstrapError, Inode};
use crate::base::{BLOCK, ByteRange};
use crate::format::rafs::{Algorithm, ChunkRecord, chunk_flags};

/// One chunk of a file, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Position in [`Bootstrap::blobs`].
    pub blob: usize,
    /// Ordinal in the blob, below 2^24; `None` in images that are too old to tell how many there are,
    /// and may not number them either.
    pub index: Option<u32>,
    pub is_compressed: bool,
    /// Where its bytes lie in the blob file. Of a gzip member, bytes of something else may follow.
    pub stored: ByteRange,
    /// Where its plain bytes lie among those of the blob, one behind the other.
    pub packed: ByteRange,
}

impl Chunk {
    /// Where the plain bytes of a chunk belong in the device, if it is number `index` of the blob and they
    /// start at `packed`; on a block.
    pub fn decoded_offset(packed: u64, index: u32) -> u64 {
        packed / BLOCK * BLOCK + u64::from(index) * BLOCK
    }
}

impl Bootstrap<'_> {
    /// Chunk `position` of regular file `inode`, counted from 0; `None` behind the last.
    pub fn chunk(&self, inode: &Inode<'_>, position: u32) -> Option<Result<Chunk, BootstrapError>> {
        let record = inode.chunks.get(position as usize)?;
        Some(self.checked(record, inode, position).map_err(|(field, value, rule)| BootstrapError::Chunk {
            number: inode.number,
            chunk: position,
            field,
            value,
            rule,
        }))
    }

    fn checked(&self, record: &ChunkRecord, inode: &Inode<'_>, position: u32) -> Result<Chunk, Wrong> {
        const KNOWN: u32 = chunk_flags::COMPRESSED | chunk_flags::HAS_CRC32;
        let chunk_size = u64::from(self.summary.chunk_size);
        let at = u64::from(position) * chunk_size;
        let (blob, index, flags) = (record.blob_index.get(), record.index.get(), record.flags.get());
        let wrong = |field, value: u64, rule| Err((field, value, rule));
        let of = usize::try_from(blob).ok().and_then(|blob| self.blobs.get(blob));
        let Some(of) = of else { return wrong("blob", blob.into(), "which is no row of the blob table") };
        if flags & !KNOWN != 0 {
            return wrong("flags", flags.into(), "of which some have no meaning in RAFS v5");
        }
        if record.file_offset.get() != at {
            return wrong("offset in the file", record.file_offset.get(), "which is not where it lies");
        }
        let len = u64::from(record.uncompressed_size.get());
        if len != chunk_size.min(inode.size.saturating_sub(at)) {
            return wrong("length", len, "which is not what the file needs");
        }
        let numbered = of.extent.map(|extent| extent.chunks);
        if numbered.is_some_and(|chunks| index >= chunks) {
            return wrong("index", index.into(), "more than the blob has chunks");
        }
        let start = record.uncompressed_offset.get();
        let most = of.extent.map_or(1 << 44, |extent| extent.decoded_len);
        let packed = ByteRange::at(start, len).filter(|packed| packed.end() <= most);
        let Some(packed) = packed else { return wrong("plain offset", start, "so that it ends behind the blob") };
        let is_compressed = flags & chunk_flags::COMPRESSED != 0;
        if is_compressed && self.summary.compression == Algorithm::None {
            return wrong("flags", flags.into(), "compressed, in an image without compression");
        }
        let stored = self.stored(record, is_compressed, of.extent.as_ref())?;
        if !is_compressed && stored.len() != len {
            return wrong("stored length", stored.len(), "which is not its length, and it is not compressed");
        }
        Ok(Chunk { blob: blob as usize, index: numbered.map(|_| index), is_compressed, stored, packed })
    }

    /// The stored bytes of a chunk, which end where the data of the blob ends.
    fn stored(&self, record: &ChunkRecord, is_compressed: bool, extent: Option<&Extent>) -> Result<ByteRange, Wrong> {
        let (at, len) = (record.compressed_offset.get(), u64::from(record.compressed_size.get()));
        let end = extent.map_or(1 << 40, |extent| extent.data_end);
        if is_compressed && self.summary.compression == Algorithm::Gzip {
            // A member of somebody's gzip layer, of which only the start is known for sure: the
            // length is no more than a bound (`rafs-v5.md` section 9).
            let most = longest_member(record.uncompressed_size.get());
            let bound = if len == 0 { most } else { len.min(most) };
            let room = end.checked_sub(at).filter(|room| *room > 0);
            let room = room.ok_or(("stored offset", at, "which is behind the data of the blob"))?;
            return ByteRange::at(at, bound.min(room)).ok_or(("stored offset", at, "which is behind everything"));
        }
        let stored = ByteRange::at(at, len).filter(|stored| !stored.is_empty());
        let stored = stored.ok_or(("stored length", len, "which is nothing, or too much"))?;
        if stored.end() > end {
            return Err(("stored offset", at, "so that it ends behind the data of the blob"));
        }
        Ok(stored)
    }
}

/// Field, value and rule of what is wrong with a chunk.
type Wrong = (&'static str, u64, &'static str);

/// Most bytes of a gzip member that holds `plain` bytes: head, tail, and the cost of blocks stored as
/// they are.
fn longest_member(plain: u32) -> u64 {
    let plain = u64::from(plain);
    plain + 10 + 8 + 5 + plain / 16384 * 5 + 128
}

impl Extent {
    /// Length in bytes of the device that chunks are laid out in, whole blocks.
    pub fn device_len(&self) -> u64 {
        self.decoded_len.next_multiple_of(BLOCK) + u64::from(self.chunks) * BLOCK
    }
}
