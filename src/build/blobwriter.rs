//! One data blob being written: `DATA CI HDR` (`blob.md` section 2, "v6 plain").
//!
//! The file has a temporary name until its image is complete, so that a failed build leaves
//! nothing behind under a name somebody could trust. It is created with the first chunk: a tree
//! without data has no blob.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use ring::digest;
use zerocopy::{FromZeros, IntoBytes};

use super::error::{BuildError, Limit};
use crate::base::{BLOCK, BlobId, Digest, hex};
use crate::codec::Compressor;
use crate::format::blobfile::{ChunkInfoV1, Header, MAGIC, features};
use crate::format::rafs::Algorithm;

/// What every blob of ours is: block-aligned chunks, sizes meant as version 2.2 means them.
pub(super) const FEATURES: u32 = features::ALIGNED | features::CAP_TAR_TOC;

/// Most chunks that a reader accepts in one blob.
const MAX_CHUNKS: u32 = 0xff_ffff - 1;
/// Ends of the two address spaces, in bytes.
const MAX_STORED: u64 = 1 << 40;
const MAX_DECODED: u64 = (1 << 44) - BLOCK;

/// A chunk of the blob.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    /// Of the plain bytes.
    pub digest: Digest,
    /// Of the plain bytes.
    pub crc32c: u32,
    /// Bytes, at most the chunk size.
    pub plain_len: u32,
    /// Bytes in the blob file.
    pub stored_len: u32,
    pub stored_offset: u64,
    /// A multiple of 4096.
    pub decoded_offset: u64,
}

impl Chunk {
    /// A chunk that has no place yet.
    pub(super) fn new(digest: Digest, crc32c: u32, plain_len: usize) -> Self {
        let plain_len = u32::try_from(plain_len).expect("a chunk has at most 16 MiB");
        Self { digest, crc32c, plain_len, stored_len: 0, stored_offset: 0, decoded_offset: 0 }
    }
}

/// Appends chunks to a blob.
#[derive(Debug)]
pub(super) struct BlobWriter {
    directory: PathBuf,
    output: Option<Output>,
    stored: u64,
    decoded: u64,
    chunks: Vec<Chunk>,
}

/// A file that is hashed as it grows.
struct Output {
    file: BufWriter<File>,
    name: TemporaryName,
    hash: digest::Context,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").field("name", &self.name).finish_non_exhaustive()
    }
}

impl BlobWriter {
    /// A blob that will be made in the existing `directory`.
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, output: None, stored: 0, decoded: 0, chunks: Vec::new() }
    }

    /// Appends a chunk as `stored`, and returns its number.
    pub(super) fn append(&mut self, chunk: Chunk, stored: &[u8]) -> Result<u32, BuildError> {
        let index = u32::try_from(self.chunks.len()).expect("bounded below");
        let stored_len = u32::try_from(stored.len()).expect("at most the plain length");
        let (stored_offset, decoded_offset) = (self.stored, self.decoded);
        let stored_end = stored_offset + u64::from(stored_len);
        let decoded_end = (decoded_offset + u64::from(chunk.plain_len)).next_multiple_of(BLOCK);
        if index >= MAX_CHUNKS {
            return Err(BuildError::Limit(Limit::Chunks));
        }
        if stored_end > MAX_STORED {
            return Err(BuildError::Limit(Limit::Stored));
        }
        if decoded_end > MAX_DECODED {
            return Err(BuildError::Limit(Limit::Decoded));
        }
        self.write(stored)?;
        (self.stored, self.decoded) = (stored_end, decoded_end);
        self.chunks.push(Chunk { stored_len, stored_offset, decoded_offset, ..chunk });
        Ok(index)
    }

    /// Adds the tables and gives the blob its id. `None` if it has no chunks.
    pub(super) fn finish(
        mut self,
        algorithm: Algorithm,
        compressor: &mut Compressor,
    ) -> Result<Option<FinishedBlob>, BuildError> {
        if self.chunks.is_empty() {
            return Ok(None);
        }
        let plain: Vec<ChunkInfoV1> = self.chunks.iter().map(chunk_info).collect();
        let plain = plain.as_bytes();
        let (stored, ci_algorithm) = match compressor.compress(plain) {
            Some(packed) => (packed, algorithm),
            None => (plain, Algorithm::None),
        };
        let table = Table {
            algorithm: ci_algorithm,
            offset: self.stored,
            stored_len: stored.len() as u64,
            plain_len: plain.len() as u64,
        };
        let header = table.header(self.chunks.len());
        self.write(stored)?;
        self.write(header.as_bytes())?;
        let stored_bytes = self.stored + table.stored_len + size_of::<Header>() as u64;

        let output = self.output.expect("there are chunks");
        let path = output.name.path.clone();
        let synced = output.file.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all());
        synced.map_err(|source| BuildError::Write { path, source })?;
        let id = hex(output.hash.finish().as_ref()).parse().expect("64 hexadecimal digits are a blob id");
        let (name, decoded_bytes, chunks) = (output.name, self.decoded, self.chunks);
        Ok(Some(FinishedBlob { id, name, stored_bytes, decoded_bytes, chunks, table }))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        if self.output.is_none() {
            let (file, name) = TemporaryName::create(&self.directory)?;
            self.output = Some(Output {
                file: BufWriter::with_capacity(1 << 17, file),
                name,
                hash: digest::Context::new(&digest::SHA256),
            });
        }
        let output = self.output.as_mut().expect("opened above");
        output.hash.update(bytes);
        output.file.write_all(bytes).map_err(|source| BuildError::Write { path: output.name.path.clone(), source })
    }
}

fn chunk_info(chunk: &Chunk) -> ChunkInfoV1 {
    ChunkInfoV1::new(chunk.decoded_offset, chunk.plain_len, chunk.stored_offset, chunk.stored_len)
}

/// Where the chunk-info array of a blob lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub algorithm: Algorithm,
    /// Bytes from the start of the blob file.
    pub offset: u64,
    pub stored_len: u64,
    pub plain_len: u64,
}

impl Table {
    fn header(&self, entries: usize) -> Header {
        let mut header = Header::new_zeroed();
        header.magic = MAGIC.into();
        header.features = FEATURES.into();
        header.ci_compression = self.algorithm.number().into();
        header.ci_entries = u32::try_from(entries).expect("bounded by append").into();
        header.ci_offset = self.offset.into();
        header.ci_compressed_size = self.stored_len.into();
        header.ci_uncompressed_size = self.plain_len.into();
        header.magic2 = MAGIC.into();
        header
    }
}

/// A complete, synced blob under a temporary name.
#[derive(Debug)]
pub(super) struct FinishedBlob {
    pub id: BlobId,
    name: TemporaryName,
    /// Length of the file.
    pub stored_bytes: u64,
    /// Length of the device, whole blocks.
    pub decoded_bytes: u64,
    pub chunks: Vec<Chunk>,
    pub table: Table,
}

impl FinishedBlob {
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
            match File::create_new(&path) {
                Ok(file) => return Ok((file, Self { path, lasting: false })),
                // Left by a process that was killed, or in use by another thread.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
                Err(source) => return Err(BuildError::Write { path, source }),
            }
        }
    }

    /// Moves the file to `name` in the same directory, over whatever has that name.
    pub(super) fn rename(&mut self, name: &str) -> Result<(), BuildError> {
        let path = self.path.with_file_name(name);
        let directory = path.parent().expect("a name in a directory");
        let moved = fs::rename(&self.path, &path).and_then(|()| File::open(directory)?.sync_all());
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
        let mut blob = BlobWriter { stored, decoded, ..BlobWriter::new(dir.path().to_owned()) };
        match blob.append(Chunk::new(crate::base::Digest([0; 32]), 0, plain_len), &vec![0; stored_len]) {
            Ok(index) => Ok(blob.chunks[index as usize].decoded_offset / BLOCK),
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
