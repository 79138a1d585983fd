//! Chunks of other blobs on their way into a new one: as they were stored, or packed anew.

use super::blobwriter::{BlobWriter, FinishedBlob};
use super::chunk::{Chunk, Packed, Packer};
use super::error::BuildError;

/// Writes a blob of chunks that come one by one. Small ones that are packed anew share stored
/// pieces with their neighbours, as in a build, so that an image of small files does not grow.
#[derive(Debug)]
pub(super) struct Repacker {
    writer: BlobWriter,
    packer: Packer,
    /// Plain bytes of a batch stay below it; nothing joins if it is 0.
    batch_size: usize,
    /// The plain bytes of the batch that is being filled, its first member and how many there are.
    open: Vec<u8>,
    first: u32,
    members: u32,
    packed: Vec<u8>,
    /// Chunks that were packed anew.
    pub anew: u64,
}

impl Repacker {
    pub(super) fn new(writer: BlobWriter, packer: Packer, batch_size: u32) -> Self {
        let (open, packed) = (Vec::new(), Vec::new());
        Self { writer, packer, batch_size: batch_size as usize, open, first: 0, members: 0, packed, anew: 0 }
    }

    /// Appends a chunk as it was stored elsewhere.
    pub(super) fn copy(&mut self, chunk: Chunk, stored: &[u8]) -> Result<(), BuildError> {
        self.close()?;
        let is_compressed = stored.len() < chunk.plain_len as usize;
        let number = self.writer.number(chunk)?;
        self.writer.append(number, stored, is_compressed)
    }

    /// Packs a chunk anew.
    pub(super) fn pack(&mut self, chunk: Chunk, plain: &[u8]) -> Result<(), BuildError> {
        self.anew += 1;
        let joins = plain.len() < self.batch_size / 2;
        if !joins || self.open.len() + plain.len() >= self.batch_size {
            self.close()?;
        }
        let number = self.writer.number(chunk)?;
        if joins {
            if self.members == 0 {
                self.first = number;
            }
            self.members += 1;
            self.open.extend_from_slice(plain);
            return Ok(());
        }
        self.packed.clear();
        let packed = self.packer.chunk(plain, &mut self.packed);
        match packed {
            Packed::Plain => self.writer.append(number, plain, false),
            Packed::Bytes { compressed, .. } => self.writer.append(number, &self.packed, compressed),
            Packed::Padded { whole, .. } => self.writer.append_batch(number, 1, &self.packed, whole),
        }
    }

    /// The complete blob; nothing if no chunk came.
    pub(super) fn finish(mut self) -> Result<Option<FinishedBlob>, BuildError> {
        self.close()?;
        self.writer.seal(&mut self.packer)?.map(|sealed| sealed.finish(None)).transpose()
    }

    /// Appends the batch that is being filled.
    fn close(&mut self) -> Result<(), BuildError> {
        if self.members == 0 {
            return Ok(());
        }
        self.packed.clear();
        let (bytes, whole) = match self.packer.batch(&self.open, &mut self.packed) {
            Packed::Plain => (&self.open, self.open.len()),
            Packed::Bytes { .. } => (&self.packed, self.open.len()),
            Packed::Padded { whole, .. } => (&self.packed, whole),
        };
        self.writer.append_batch(self.first, self.members, bytes, whole)?;
        self.open.clear();
        self.members = 0;
        Ok(())
    }
}
