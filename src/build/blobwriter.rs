//! One data blob being written: its chunks, then what stands behind them (`blob.md` section 2).
//!
//! The file has a temporary name until its image is complete, so that a failed build leaves
//! nothing behind under a name somebody could trust. It is created with the first chunk: a tree
//! without data has no blob, unless the bootstrap is to lie in it.
//!
//! Chunks are numbered first and appended later, in the same order: a chunk's number and its place
//! in the device depend on what was decided before it, its place in the file on how well that was
//! compressed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use zerocopy::{FromZeros, IntoBytes};

use super::blobparts::{Parts, part};
use super::blobtable::{BatchRow, Table};
use super::chunk::{Chunk, Packer};
use super::error::{BuildError, Limit};
use super::spec::Version;
use crate::base::{BLOCK, BlobId};
use crate::codec::xts::BlobKey;
use crate::format::blobfile::{Header, features};
use crate::format::rafs::{Algorithm, BlobEntry, DigestAlgorithm, chunk_flags};
use crate::sys;

/// Most chunks that a reader accepts in one blob.
const MAX_CHUNKS: u32 = 0xff_ffff - 1;
/// Ends of the two address spaces, in bytes.
const MAX_STORED: u64 = 1 << 40;
const MAX_DECODED: u64 = (1 << 44) - BLOCK;

/// What a blob is like as a whole.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub version: Version,
    pub compression: Algorithm,
    pub digest: DigestAlgorithm,
    /// Bytes; a power of two.
    pub chunk_size: u32,
    pub key: Option<BlobKey>,
    /// Whether the file ends with a table of contents.
    pub toc: bool,
    /// Whether the bootstrap lies in the file.
    pub inline_bootstrap: bool,
}

impl Shape {
    fn has_tar_headers(&self) -> bool {
        self.toc || self.inline_bootstrap
    }

    /// Where the next chunk starts in the device if one ends at byte `end`.
    fn next_start(&self, end: u64) -> u64 {
        match self.version {
            Version::V5 { aligned: false } => end,
            Version::V6 | Version::V5 { aligned: true } => end.next_multiple_of(BLOCK),
        }
    }
}

/// Appends chunks to a blob.
#[derive(Debug)]
pub(super) struct BlobWriter {
    directory: PathBuf,
    shape: Shape,
    parts: Option<Parts>,
    decoded: u64,
    chunks: Vec<Chunk>,
    batches: Vec<BatchRow>,
}

impl BlobWriter {
    /// A blob that will be made in the existing `directory`.
    pub(super) fn new(directory: PathBuf, shape: Shape) -> Self {
        Self { directory, shape, parts: None, decoded: 0, chunks: Vec::new(), batches: Vec::new() }
    }

    /// Gives a chunk its number and its place in the device. It must be appended before any that
    /// is numbered later.
    pub(super) fn number(&mut self, chunk: Chunk) -> Result<u32, BuildError> {
        let number = u32::try_from(self.chunks.len()).expect("bounded below");
        let decoded_offset = self.decoded;
        let decoded_end = self.shape.next_start(decoded_offset + u64::from(chunk.plain_len));
        if number >= MAX_CHUNKS {
            return Err(BuildError::Limit(Limit::Chunks));
        }
        if decoded_end > MAX_DECODED {
            return Err(BuildError::Limit(Limit::Decoded));
        }
        self.decoded = decoded_end;
        let flags = if self.shape.key.is_some() { chunk_flags::ENCRYPTED } else { 0 };
        self.chunks.push(Chunk { number, flags, decoded_offset, ..chunk });
        Ok(number)
    }

    /// Appends chunk `number` as `stored`.
    pub(super) fn append(&mut self, number: u32, stored: &[u8], is_compressed: bool) -> Result<(), BuildError> {
        let stored_offset = self.store(stored)?;
        let chunk = &mut self.chunks[number as usize];
        chunk.stored_offset = stored_offset;
        chunk.stored_len = u32::try_from(stored.len()).expect("hardly more than the plain length");
        if is_compressed {
            chunk.flags |= chunk_flags::COMPRESSED;
        }
        Ok(())
    }

    /// Appends the chunks from `first` on as one piece, which stands for `whole` plain bytes.
    /// Their records say nothing of the place (`blob.md` section 11.3).
    pub(super) fn append_batch(
        &mut self,
        first: u32,
        members: u32,
        stored: &[u8],
        whole: usize,
    ) -> Result<(), BuildError> {
        let stored_offset = self.store(stored)?;
        let len = |len: usize| u32::try_from(len).expect("at most 16 MiB and a little");
        self.batches.push(BatchRow { first, members, stored_offset, stored_len: len(stored.len()), whole: len(whole) });
        Ok(())
    }

    fn store(&mut self, stored: &[u8]) -> Result<u64, BuildError> {
        let parts = match &mut self.parts {
            Some(parts) => parts,
            none => none.insert(Parts::create(&self.directory)?),
        };
        let at = parts.len();
        if at + stored.len() as u64 > MAX_STORED {
            return Err(BuildError::Limit(Limit::Stored));
        }
        parts.write(stored)?;
        Ok(at)
    }

    /// Adds the tables. `None` if there would be nothing in the file.
    pub(super) fn seal(mut self, packer: &mut Packer) -> Result<Option<SealedBlob>, BuildError> {
        let parts = match self.parts.take() {
            Some(parts) => parts,
            None if self.shape.inline_bootstrap => Parts::create(&self.directory)?,
            None => return Ok(None),
        };
        self.dissolve_batches();
        let mut features = features::CAP_TAR_TOC;
        if self.shape.inline_bootstrap {
            features |= features::INLINED_FS_META;
        }
        if self.shape.toc {
            features |= features::HAS_TOC;
        }
        if self.shape.has_tar_headers() {
            features |= features::HAS_TAR_HEADER;
        }
        let Self { shape, decoded, chunks, batches, .. } = self;
        let mut sealed = SealedBlob { shape, parts, features, decoded_bytes: decoded, chunks, batches, table: None };
        match sealed.shape.version {
            _ if sealed.chunks.is_empty() => {}
            Version::V6 => sealed.add_tables(packer)?,
            // The bootstrap has all tables.
            Version::V5 { .. } if sealed.shape.has_tar_headers() => sealed.parts.end_data(sealed.decoded_bytes)?,
            Version::V5 { .. } => {}
        }
        Ok(Some(sealed))
    }

    /// Where no batch has two members, their bytes are those of ordinary chunks, and so they are
    /// called: any reader understands those.
    fn dissolve_batches(&mut self) {
        let chunks = &self.chunks;
        let is_chunk = |row: &BatchRow| row.members == 1 && row.whole == chunks[row.first as usize].plain_len;
        if !self.batches.iter().all(is_chunk) {
            return;
        }
        for row in self.batches.drain(..) {
            let chunk = &mut self.chunks[row.first as usize];
            (chunk.stored_offset, chunk.stored_len) = (row.stored_offset, row.stored_len);
            if row.stored_len != row.whole {
                chunk.flags |= chunk_flags::COMPRESSED;
            }
        }
    }
}

/// A blob whose chunks and tables are written.
#[derive(Debug)]
pub(super) struct SealedBlob {
    shape: Shape,
    parts: Parts,
    features: u32,
    /// Length of the device, whole blocks unless chunks are packed.
    pub decoded_bytes: u64,
    /// In the order of their numbers.
    pub chunks: Vec<Chunk>,
    batches: Vec<BatchRow>,
    /// Missing if there are no chunks, or if they are listed in the bootstrap alone.
    table: Option<Table>,
}

/// What stands for the id of a blob in a bootstrap that lies in it.
const UNKNOWN_ID: [u8; BlobId::MAX_LEN] = [b'x'; BlobId::MAX_LEN];

impl SealedBlob {
    fn add_tables(&mut self, packer: &mut Packer) -> Result<(), BuildError> {
        self.features |= features::ALIGNED;
        if !self.batches.is_empty() {
            self.features |= features::CHUNK_INFO_V2 | features::BATCH;
        }
        if self.shape.key.is_some() {
            self.features |= features::CHUNK_INFO_V2 | features::ENCRYPTED;
        }
        if self.shape.toc {
            self.features |= features::INLINED_CHUNK_DIGEST;
        }
        let framed = self.shape.has_tar_headers();
        if framed {
            self.parts.end_data(self.decoded_bytes)?;
        }
        let long = self.features & features::CHUNK_INFO_V2 != 0;
        let (table, plain) = Table::new(&self.chunks, &self.batches, long);
        let (stored, is_compressed) = packer.table(&plain);
        let algorithm = if is_compressed { self.shape.compression } else { Algorithm::None };
        let table = table.placed(algorithm, self.parts.len(), stored.len());
        let header = table.header(self.features);
        self.parts.write_part(part::CHUNK_INFO, &stored, &plain, algorithm)?;
        self.parts.write_part(part::HEADER, &packer.bare(header.as_bytes()), header.as_bytes(), Algorithm::None)?;
        if framed {
            self.parts.end_part(part::CHUNK_INFO, table.stored_len + size_of::<Header>() as u64)?;
        }
        if self.shape.toc {
            let digests: Vec<u8> = self.chunks.iter().flat_map(|chunk| chunk.digest.0).collect();
            self.parts.write_digests(&digests)?;
            self.parts.end_part(part::DIGESTS, digests.len() as u64)?;
        }
        self.table = Some(table);
        Ok(())
    }

    /// The blob's row of the blob table, but for its index, as a bootstrap in the blob has it.
    /// `None` if the blob has no chunks: such a blob is in no table.
    pub(super) fn entry(&self) -> Option<BlobEntry> {
        if self.chunks.is_empty() {
            return None;
        }
        let mut entry = BlobEntry::new_zeroed();
        entry.id = UNKNOWN_ID;
        entry.chunk_size = self.shape.chunk_size.into();
        entry.chunk_count = u32::try_from(self.chunks.len()).expect("24 bits").into();
        entry.compression = self.shape.compression.number().into();
        entry.digest = self.shape.digest.number().into();
        entry.features = self.features.into();
        entry.compressed_size = self.parts.len().into();
        entry.uncompressed_size = self.decoded_bytes.into();
        if let Some(table) = &self.table {
            entry.ci_compression = table.algorithm.number().into();
            entry.ci_offset = table.offset.into();
            entry.ci_compressed_size = table.stored_len.into();
            entry.ci_uncompressed_size = table.plain_len.into();
        }
        if let Some(key) = &self.shape.key {
            let (low, high) = key.iv().split_at(8);
            let half = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("half of 16 bytes"));
            entry.meta_digest = *key.key();
            entry.meta_size = half(low).into();
            entry.cipher_iv = half(high).into();
            entry.cipher = CIPHER_AES_128_XTS.into();
        }
        Some(entry)
    }

    /// Adds the bootstrap, if it lies in the blob, and the table of contents, and gives the blob
    /// its id.
    pub(super) fn finish(mut self, bootstrap: Option<&[u8]>) -> Result<FinishedBlob, BuildError> {
        let mut entry = self.entry();
        if let Some(bytes) = bootstrap {
            self.parts.write_bootstrap(bytes, self.shape.toc)?;
        }
        let toc = if self.shape.toc { Some(self.parts.write_toc()?) } else { None };
        let batches = self.batches.len() as u64;
        let (file, name, stored_bytes, id) = self.parts.finish()?;
        if let Some(entry) = &mut entry {
            entry.id = id.to_padded();
            // A bootstrap in the blob cannot know what stands behind it.
            if let (None, Some(toc)) = (bootstrap, toc) {
                entry.toc_size = toc.size.into();
                entry.toc_digest = toc.digest;
            }
            if bootstrap.is_none() {
                entry.compressed_size = stored_bytes.into();
            }
        }
        let (chunks, decoded_bytes) = (self.chunks, self.decoded_bytes);
        Ok(FinishedBlob { id, file, name, stored_bytes, decoded_bytes, chunks, batches, entry })
    }
}

/// The cipher as numbered in blob tables.
const CIPHER_AES_128_XTS: u32 = 1;

/// A complete, synced blob under a temporary name.
#[derive(Debug)]
pub(super) struct FinishedBlob {
    pub id: BlobId,
    /// Open for reading.
    pub file: File,
    name: TemporaryName,
    /// Length of the file.
    pub stored_bytes: u64,
    /// Length of the device, whole blocks unless chunks are packed.
    pub decoded_bytes: u64,
    pub chunks: Vec<Chunk>,
    pub batches: u64,
    /// The blob's row of a blob table, but for its index; missing if it has no chunks.
    pub entry: Option<BlobEntry>,
}

impl FinishedBlob {
    /// What images are told of it, if there are chunks in it.
    pub(super) fn contents(&self) -> Option<(&BlobEntry, &[Chunk])> {
        self.entry.as_ref().map(|entry| (entry, self.chunks.as_slice()))
    }

    /// Where the file lies until it is published.
    pub(super) fn temporary_path(&self) -> &Path {
        &self.name.path
    }

    /// Gives the blob its name in the directory it was made in.
    pub(super) fn publish(&mut self) -> Result<(), BuildError> {
        self.name.rename(self.id.as_str())
    }
}

/// A file name that is removed unless it is replaced by a lasting one.
#[derive(Debug)]
pub(super) struct TemporaryName {
    pub path: PathBuf,
    lasting: bool,
}

impl TemporaryName {
    /// A new empty file in `directory` that nobody else writes to.
    pub(super) fn create(directory: &Path) -> Result<(File, Self), BuildError> {
        let mut attempt = 0u32;
        loop {
            let path = directory.join(format!(".building-{}-{attempt}", std::process::id()));
            match File::options().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => return Ok((file, Self { path, lasting: false })),
                // Left by a process that was killed, or in use by another thread.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
                Err(source) => return Err(BuildError::Write { path, source }),
            }
        }
    }

    /// Moves the file to `name` in the same directory, over whatever has that name.
    pub(super) fn rename(&mut self, name: impl AsRef<OsStr>) -> Result<(), BuildError> {
        let path = self.path.with_file_name(name);
        let directory = path.parent().expect("a name in a directory");
        let moved = sys::files::ensure_replaceable(&path)
            .and_then(|()| fs::rename(&self.path, &path))
            .and_then(|()| File::open(directory)?.sync_all());
        moved.map_err(|source| BuildError::Write { path: path.clone(), source })?;
        self.lasting = true;
        Ok(())
    }
}

impl Drop for TemporaryName {
    fn drop(&mut self) {
        if !self.lasting {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of one more chunk of `plain_len` bytes, stored in `stored_len`, behind so many
    /// stored and decoded bytes.
    fn append_at(stored: u64, decoded: u64, plain_len: usize, stored_len: usize) -> Result<u64, Option<Limit>> {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape {
            version: Version::V6,
            compression: Algorithm::None,
            digest: DigestAlgorithm::Blake3,
            chunk_size: 1 << 24,
            key: None,
            toc: false,
            inline_bootstrap: false,
        };
        let mut parts = Parts::create(dir.path()).unwrap();
        parts.pretend_len(stored);
        let mut blob = BlobWriter { parts: Some(parts), decoded, ..BlobWriter::new(dir.path().to_owned(), shape) };
        let number = blob.number(Chunk::new(crate::base::Digest([0; 32]), 0, plain_len));
        let appended = number.and_then(|number| {
            blob.append(number, &vec![0; stored_len], stored_len < plain_len)?;
            Ok(number)
        });
        match appended {
            Ok(number) => Ok(blob.chunks[number as usize].decoded_offset / BLOCK),
            Err(BuildError::Limit(limit)) => Err(Some(limit)),
            Err(_) => Err(None),
        }
    }

    /// Block 0xffffffff means a hole, and there are no numbers behind it.
    #[test]
    fn no_chunk_gets_a_block_that_has_no_number() {
        let blocks = |n: u64| n * BLOCK;
        assert_eq!(append_at(0, blocks(0xffff_fffe), 4096, 1), Ok(0xffff_fffe));
        assert_eq!(append_at(0, blocks(0xffff_fffe), 4097, 1), Err(Some(Limit::Decoded)));
        assert_eq!(append_at(0, blocks(0xffff_ffff), 1, 1), Err(Some(Limit::Decoded)));
        assert_eq!(append_at(0, blocks(0xffff_ff00), 2 << 20, 1), Err(Some(Limit::Decoded)));
    }

    #[test]
    fn no_chunk_is_stored_behind_what_forty_bits_reach() {
        assert_eq!(append_at((1 << 40) - 7, 0, 4096, 7), Ok(0));
        assert_eq!(append_at((1 << 40) - 7, 0, 4096, 8), Err(Some(Limit::Stored)));
    }
}
