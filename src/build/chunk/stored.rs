use crate::base::Digest;
use crate::format::rafs::{ChunkRecord, chunk_flags};
use zerocopy::FromZeros;

/// A chunk that lies in a blob of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::build) struct Chunk {
    /// Of the plain bytes.
    pub digest: Digest,
    /// Of the plain bytes; 0 if unknown.
    pub crc32c: u32,
    /// Bytes, at most the chunk size.
    pub plain_len: u32,
    /// Row of the blob table: below 254 once the rows that no file uses are gone.
    pub blob: u16,
    /// Ordinal in the blob, below 2^24.
    pub number: u32,
    /// [`chunk_flags`] without `HAS_CRC32`.
    pub flags: u32,
    /// Bytes in the blob file.
    pub stored_len: u32,
    pub stored_offset: u64,
    /// A multiple of 4096, except in packed blobs of version 5.
    pub decoded_offset: u64,
}

impl Chunk {
    /// A chunk that has no place yet.
    pub(in crate::build) fn new(digest: Digest, crc32c: u32, plain_len: usize) -> Self {
        let plain_len = u32::try_from(plain_len).expect("a chunk has at most 16 MiB");
        Self {
            digest,
            crc32c,
            plain_len,
            blob: 0,
            number: 0,
            flags: 0,
            stored_len: 0,
            stored_offset: 0,
            decoded_offset: 0,
        }
    }

    /// What a row of a chunk table says, as a chunk of blob number `blob`.
    pub(in crate::build) fn of_record(record: &ChunkRecord, blob: u16) -> Self {
        let flags = record.flags.get();
        Self {
            digest: Digest(record.digest),
            crc32c: if flags & chunk_flags::HAS_CRC32 == 0 { 0 } else { record.crc32.get() },
            plain_len: record.uncompressed_size.get(),
            blob,
            number: record.index.get(),
            flags: flags & !chunk_flags::HAS_CRC32,
            stored_len: record.compressed_size.get(),
            stored_offset: record.compressed_offset.get(),
            decoded_offset: record.uncompressed_offset.get(),
        }
    }

    /// The chunk's row of the chunk table. `file_offset` is where it lies in the last file that
    /// uses it.
    pub(in crate::build) fn record(&self, file_offset: u64) -> ChunkRecord {
        let mut record = ChunkRecord::new_zeroed();
        record.digest = self.digest.0;
        record.blob_index = u32::from(self.blob).into();
        // Readers take a flagged checksum of 0 for damage.
        let crc = if self.crc32c == 0 { 0 } else { chunk_flags::HAS_CRC32 };
        record.flags = (self.flags | crc).into();
        record.compressed_size = self.stored_len.into();
        record.uncompressed_size = self.plain_len.into();
        record.compressed_offset = self.stored_offset.into();
        record.uncompressed_offset = self.decoded_offset.into();
        record.file_offset = file_offset.into();
        record.index = self.number.into();
        record.crc32 = self.crc32c.into();
        record
    }
}
