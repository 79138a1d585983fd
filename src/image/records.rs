use super::{Image, ImageError, Inode, Layout};
use crate::format::array_at;
use crate::format::erofs::ChunkIndex;
use crate::format::rafs::ChunkRecord;

/// What a record of the chunk table is found by: blob, ordinal in the blob, and block in the device
/// (`rafs-v6.md` section 13).
type Key = (u32, u32, u64);

/// The chunk table of an image in an order to search it by.
#[derive(Debug)]
pub struct RecordIndex {
    /// Key and position in the table, sorted by key.
    keys: Vec<(Key, u32)>,
}

impl RecordIndex {
    /// Sorts the table of `image`: 24 bytes of memory for each record of 80.
    pub fn new(image: &Image) -> Self {
        let key = |row: &ChunkRecord| {
            let block = row.uncompressed_offset.get() / image.summary.block_size;
            (row.blob_index.get(), row.index.get(), block)
        };
        let mut keys: Vec<_> = (0u32..).zip(image.chunk_records()).map(|(number, row)| (key(row), number)).collect();
        keys.sort_unstable();
        Self { keys }
    }

    /// Position in [`Image::chunk_records`] of the record that a chunk index of a file means.
    pub fn find(&self, row: &ChunkIndex) -> Option<usize> {
        let key = (u32::from(row.blob()?), row.index(), u64::from(row.blkaddr.get()));
        let found = self.keys.binary_search_by_key(&key, |(key, _)| *key).ok()?;
        Some(self.keys[found].1 as usize)
    }

    /// Positions of records that describe the same chunk of the same blob, in pairs, with blob and
    /// chunk.
    pub(super) fn twins(&self) -> impl Iterator<Item = (u32, u32, u32, u32)> + '_ {
        let pairs = self.keys.windows(2).map(|pair| (pair[0], pair[1]));
        let same = pairs.filter(|((one, _), (other, _))| (one.0, one.1) == (other.0, other.1));
        same.map(|((_, first), (key, second))| (first, second, key.0, key.1))
    }
}

impl Image {
    /// The chunk indexes of a file, one for every chunk of the image's chunk size; empty for
    /// whatever has none.
    ///
    /// # Errors
    /// If they do not fit in the bootstrap.
    pub fn chunk_indexes(&self, inode: &Inode) -> Result<&[ChunkIndex], ImageError> {
        let Layout::Chunks { indexes, .. } = inode.layout else { return Ok(&[]) };
        let count = inode.size.div_ceil(self.summary.chunk_size.into());
        Ok(array_at(self.bytes(), indexes, count, "chunk array")?)
    }
}
