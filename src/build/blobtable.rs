//! The table of a blob's own chunks, and the header behind it (`blob.md` sections 4 and 11.3).

use zerocopy::{FromZeros, IntoBytes};

use super::chunk::Chunk;
use crate::format::blobfile::{BatchContext, ChunkInfoV1, ChunkInfoV2, Header, MAGIC};
use crate::format::rafs::{Algorithm, chunk_flags};

/// One stored piece that several chunks lie in, one behind the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatchRow {
    /// Number of the first member; the others follow.
    pub first: u32,
    pub members: u32,
    pub stored_offset: u64,
    pub stored_len: u32,
    /// Plain bytes: those of the members, and maybe zeros behind them.
    pub whole: u32,
}

/// Where the chunk-info array lies, and how long it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    /// Of the stored array, which may be plain where chunks are not.
    pub algorithm: Algorithm,
    /// Bytes from the start of the blob file.
    pub offset: u64,
    pub stored_len: u64,
    pub plain_len: u64,
    entries: u32,
    /// Bytes of the plain array before the contexts of batches.
    contexts_at: u64,
    contexts: u32,
}

impl Table {
    /// The plain array, and what is known of its place. `long` entries are needed for batches and
    /// encryption.
    pub(super) fn new(chunks: &[Chunk], batches: &[BatchRow], long: bool) -> (Self, Vec<u8>) {
        let mut plain = if long { long_entries(chunks, batches) } else { short_entries(chunks) };
        let contexts_at = plain.len() as u64;
        for batch in batches {
            let mut context = BatchContext::new_zeroed();
            context.compressed_size = batch.stored_len.into();
            context.uncompressed_size = batch.whole.into();
            plain.extend_from_slice(context.as_bytes());
        }
        let table = Self {
            algorithm: Algorithm::None,
            offset: 0,
            stored_len: 0,
            plain_len: plain.len() as u64,
            entries: u32::try_from(chunks.len()).expect("24 bits"),
            contexts_at,
            contexts: u32::try_from(batches.len()).expect("no more than chunks"),
        };
        (table, plain)
    }

    /// The same table as it was stored.
    pub(super) fn placed(self, algorithm: Algorithm, offset: u64, stored_len: usize) -> Self {
        Self { algorithm, offset, stored_len: stored_len as u64, ..self }
    }

    pub(super) fn header(&self, features: u32) -> Header {
        let mut header = Header::new_zeroed();
        header.magic = MAGIC.into();
        header.features = features.into();
        header.ci_compression = self.algorithm.number().into();
        header.ci_entries = self.entries.into();
        header.ci_offset = self.offset.into();
        header.ci_compressed_size = self.stored_len.into();
        header.ci_uncompressed_size = self.plain_len.into();
        if self.contexts > 0 {
            header.ci_zran_offset = self.contexts_at.into();
            header.ci_zran_size = (self.plain_len - self.contexts_at).into();
            header.ci_zran_count = self.contexts.into();
        }
        header.magic2 = MAGIC.into();
        header
    }
}

fn short_entries(chunks: &[Chunk]) -> Vec<u8> {
    let entry =
        |chunk: &Chunk| ChunkInfoV1::new(chunk.decoded_offset, chunk.plain_len, chunk.stored_offset, chunk.stored_len);
    chunks.iter().map(entry).flat_map(|entry| <[u8; 16]>::try_from(entry.as_bytes()).expect("its size")).collect()
}

fn long_entries(chunks: &[Chunk], batches: &[BatchRow]) -> Vec<u8> {
    let mut out = Vec::with_capacity(chunks.len() * size_of::<ChunkInfoV2>());
    let mut batches = (0u32..).zip(batches).peekable();
    // Where the next member starts in its batch.
    let mut at = 0;
    for chunk in chunks {
        if batches.next_if(|(_, batch)| batch.first + batch.members <= chunk.number).is_some() {
            at = 0;
        }
        let entry = match batches.peek() {
            Some((context, batch)) if batch.first <= chunk.number => {
                let entry = member(chunk, batch, *context, at);
                at += chunk.plain_len;
                entry
            }
            _ => ordinary(chunk),
        };
        out.extend_from_slice(entry.as_bytes());
    }
    out
}

fn member(chunk: &Chunk, batch: &BatchRow, context: u32, at: u32) -> ChunkInfoV2 {
    let encrypted = chunk.flags & chunk_flags::ENCRYPTED != 0;
    ChunkInfoV2::member((chunk.decoded_offset, chunk.plain_len), batch.stored_offset, (context, at), encrypted)
}

fn ordinary(chunk: &Chunk) -> ChunkInfoV2 {
    let flag = |in_record, in_entry| if chunk.flags & in_record == 0 { 0 } else { in_entry };
    let flags =
        flag(chunk_flags::COMPRESSED, ChunkInfoV2::COMPRESSED) | flag(chunk_flags::ENCRYPTED, ChunkInfoV2::ENCRYPTED);
    let decoded = (chunk.decoded_offset, chunk.plain_len);
    ChunkInfoV2::alone(decoded, (chunk.stored_offset, chunk.stored_len), flags, Some(chunk.crc32c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Digest;
    use zerocopy::FromBytes;

    fn chunk(number: u32, plain_len: usize) -> Chunk {
        Chunk { number, decoded_offset: u64::from(number) * 4096, ..Chunk::new(Digest([0; 32]), 7, plain_len) }
    }

    #[test]
    fn members_know_their_batch_and_their_place_in_it() {
        let mut chunks: Vec<Chunk> = (0..6).map(|number| chunk(number, 10 + number as usize)).collect();
        (chunks[3].stored_offset, chunks[3].stored_len) = (50, 13);
        let batch =
            |first, members, stored_offset, whole| BatchRow { first, members, stored_offset, stored_len: 9, whole };
        let batches = [batch(0, 1, 0, 10), batch(1, 2, 9, 23), batch(4, 2, 63, 29)];

        let (table, plain) = Table::new(&chunks, &batches, true);

        let (entries, contexts) = plain.split_at(6 * 24);
        let entries = <[ChunkInfoV2]>::ref_from_bytes(entries).unwrap();
        let member = |at: u64, context, from| (0x5, at, 0, (context, from));
        let got: Vec<_> =
            entries.iter().map(|e| (e.flags(), e.compressed_offset(), e.compressed_size(), e.place())).collect();
        let want = [
            member(0, 0, 0),
            member(9, 1, 0),
            member(9, 1, 11),
            (0x10, 50, 13, (0, 7)),
            member(63, 2, 0),
            member(63, 2, 14),
        ];
        assert_eq!(got, want);
        let contexts = <[BatchContext]>::ref_from_bytes(contexts).unwrap();
        let sizes: Vec<_> = contexts.iter().map(|c| (c.compressed_size.get(), c.uncompressed_size.get())).collect();
        assert_eq!(sizes, [(9, 10), (9, 23), (9, 29)]);
        let header = table.header(0);
        let zran = (header.ci_zran_offset.get(), header.ci_zran_size.get(), header.ci_zran_count.get());
        assert_eq!((header.ci_entries.get(), zran), (6, (144, 120, 3)));
    }

    #[test]
    fn short_entries_are_those_of_the_worked_example() {
        let mut second = chunk(1, 13400);
        (second.decoded_offset, second.stored_offset, second.stored_len) = (0x5000, 0x12dc, 2974);

        let first = Chunk { stored_len: 0x12dc, ..chunk(0, 16931) };
        let (table, plain) = Table::new(&[first, second], &[], false);

        assert_eq!(plain[16..24], 0x0345_7000_0000_5000u64.to_le_bytes());
        assert_eq!(plain[24..], 0x00b9_d000_0000_12dcu64.to_le_bytes());
        let table = table.placed(Algorithm::None, 0x207a, 32);
        let header = table.header(0x7000_0021);
        let start = "0bb10bb1210000700000000002000000 7a20000000000000 2000000000000000 2000000000000000";
        assert_eq!(crate::base::hex(&header.as_bytes()[..40]), start.replace(' ', ""));
        assert_eq!(header.as_bytes()[40..4092], [0; 4052]);
    }
}
