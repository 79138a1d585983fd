//! One data blob being written: `DATA CI HDR` (`blob.md` section 2, "v6 plain").
//!
//! The file has a temporary name until its image is complete, so that a failed build leaves
//! nothing behind under a name somebody could trust. It is created with the first chunk: a tree
//! without data has no blob.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use ring::digest;
use zerocopy::{FromZeros, IntoBytes};

use super::chunk::Chunk;
use super::error::{BuildError, Limit};
use crate::base::{BLOCK, BlobId, hex};
use crate::codec::Compressor;
use crate::format::blobfile::{ChunkInfoV1, Header, MAGIC, features};
use crate::format::rafs::{Algorithm, BlobEntry, DigestAlgorithm, chunk_flags};

/// What every blob of ours is: block-aligned chunks, sizes meant as version 2.2 means them.
pub(super) const FEATURES: u32 = features::ALIGNED | features::CAP_TAR_TOC;

/// Most chunks that a reader accepts in one blob.
const MAX_CHUNKS: u32 = 0xff_ffff - 1;
/// Ends of the two address spaces, in bytes.
const MAX_STORED: u64 = 1 << 40;
const MAX_DECODED: u64 = (1 << 44) - BLOCK;

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
        let flags = if stored_len < chunk.plain_len { chunk_flags::COMPRESSED } else { 0 };
        self.chunks.push(Chunk { number: index, flags, stored_len, stored_offset, decoded_offset, ..chunk });
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
    /// The blob's row of a blob table, but for its index.
    pub(super) fn entry(&self, algorithm: Algorithm, digest: DigestAlgorithm, chunk_size: u32) -> BlobEntry {
        let mut entry = BlobEntry::new_zeroed();
        entry.id = self.id.to_padded();
        entry.chunk_size = chunk_size.into();
        entry.chunk_count = u32::try_from(self.chunks.len()).expect("24 bits").into();
        entry.compression = algorithm.number().into();
        entry.digest = digest.number().into();
        entry.features = FEATURES.into();
        entry.compressed_size = self.stored_bytes.into();
        entry.uncompressed_size = self.decoded_bytes.into();
        entry.ci_compression = self.table.algorithm.number().into();
        entry.ci_offset = self.table.offset.into();
        entry.ci_compressed_size = self.table.stored_len.into();
        entry.ci_uncompressed_size = self.table.plain_len.into();
        entry
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
            match File::create_new(&path) {
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
