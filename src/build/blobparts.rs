//! The file of a blob as a row of parts, with what separates and lists them (`blob.md` sections 6
//! to 8).
//!
//! A part's tar header follows the part. The blob's id is the digest of everything in the file but
//! the digests of its chunks.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use ring::digest;
use zerocopy::{FromZeros, IntoBytes};

use super::blobwriter::TemporaryName;
use super::error::BuildError;
use crate::base::{BlobId, hex};
use crate::codec::{self, Compressor};
use crate::format::blobfile::{PartHeader, TocEntry};
use crate::format::rafs::Algorithm;

/// Names of the parts, in the order in which they follow each other.
pub(super) mod part {
    pub(crate) const DATA: &str = "image.blob";
    /// The chunk-info array. Its tar header counts the blob header with it.
    pub(crate) const CHUNK_INFO: &str = "blob.meta";
    pub(crate) const HEADER: &str = "blob.meta.header";
    pub(crate) const DIGESTS: &str = "blob.digest";
    pub(crate) const BOOTSTRAP: &str = "image.boot";
    pub(crate) const TOC: &str = "rafs.blob.toc";
}

/// A file that is hashed as it grows.
pub(super) struct Parts {
    file: BufWriter<File>,
    name: TemporaryName,
    hash: digest::Context,
    len: u64,
    rows: Vec<TocEntry>,
}

/// How a bootstrap names the table of contents of a blob.
#[derive(Debug)]
pub(super) struct Toc {
    /// Bytes from its start to the end of the file.
    pub size: u32,
    pub digest: [u8; 32],
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("name", &self.name).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Parts {
    /// An empty file in `directory`.
    pub(super) fn create(directory: &Path) -> Result<Self, BuildError> {
        let (file, name) = TemporaryName::create(directory)?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 17, file),
            name,
            hash: digest::Context::new(&digest::SHA256),
            len: 0,
            rows: Vec::new(),
        })
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Makes tests of limits possible without a terabyte.
    #[cfg(test)]
    pub(super) fn pretend_len(&mut self, len: u64) {
        self.len = len;
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.hash.update(bytes);
        self.write_unhashed(bytes)
    }

    fn write_unhashed(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.len += bytes.len() as u64;
        let written = self.file.write_all(bytes);
        written.map_err(|source| BuildError::Write { path: self.name.path.clone(), source })
    }

    /// Writes the tar header of the `size` bytes just written.
    pub(super) fn end_part(&mut self, name: &str, size: u64) -> Result<(), BuildError> {
        self.write(PartHeader::new(name, size).as_bytes())
    }

    /// Ends the chunk data, which is all there is so far and stands for `decoded` bytes.
    pub(super) fn end_data(&mut self, decoded: u64) -> Result<(), BuildError> {
        let size = self.len;
        self.end_part(part::DATA, size)?;
        let mut listed = row(part::DATA, TocEntry::PLAIN);
        // As the format has it, the digest counts the header in.
        listed.digest.copy_from_slice(self.hash.clone().finish().as_ref());
        listed.compressed_size = size.into();
        listed.uncompressed_size = decoded.into();
        self.rows.push(listed);
        Ok(())
    }

    /// Writes a part as `stored`, which stands for `plain`.
    pub(super) fn write_part(
        &mut self,
        name: &str,
        stored: &[u8],
        plain: &[u8],
        algorithm: Algorithm,
    ) -> Result<(), BuildError> {
        self.list(name, stored.len(), plain, algorithm);
        self.write(stored)
    }

    /// Writes the digests of the chunks, which do not count for the blob's id.
    pub(super) fn write_digests(&mut self, digests: &[u8]) -> Result<(), BuildError> {
        self.list(part::DIGESTS, digests.len(), digests, Algorithm::None);
        self.write_unhashed(digests)
    }

    /// Writes the bootstrap with its header; compressed if that pays and there is a table of
    /// contents to say so.
    pub(super) fn write_bootstrap(&mut self, bytes: &[u8], compress: bool) -> Result<(), BuildError> {
        let mut zstd = Compressor::zstd(BOOTSTRAP_LEVEL).map_err(BuildError::Compressor)?;
        let packed = if compress { zstd.compress(bytes) } else { None };
        let algorithm = if packed.is_some() { Algorithm::Zstd } else { Algorithm::None };
        let stored = packed.unwrap_or(bytes);
        self.write_part(part::BOOTSTRAP, stored, bytes, algorithm)?;
        self.end_part(part::BOOTSTRAP, stored.len() as u64)
    }

    fn list(&mut self, name: &str, stored: usize, plain: &[u8], algorithm: Algorithm) {
        let flags = match algorithm {
            Algorithm::Zstd => TocEntry::ZSTD,
            Algorithm::Lz4Block => TocEntry::LZ4,
            Algorithm::None | Algorithm::Gzip => TocEntry::PLAIN,
        };
        let mut listed = row(name, flags);
        listed.digest = codec::sha256(plain).0;
        listed.compressed_offset = self.len.into();
        listed.compressed_size = (stored as u64).into();
        listed.uncompressed_size = (plain.len() as u64).into();
        self.rows.push(listed);
    }

    /// Writes the table of contents, the last part of a blob that has one.
    pub(super) fn write_toc(&mut self) -> Result<Toc, BuildError> {
        let mut bytes = self.rows.as_bytes().to_vec();
        let header = PartHeader::new(part::TOC, bytes.len() as u64);
        bytes.extend_from_slice(header.as_bytes());
        self.write(&bytes)?;
        let size = u32::try_from(bytes.len()).expect("five rows and a header");
        Ok(Toc { size, digest: codec::sha256(&bytes).0 })
    }

    /// Syncs the file and gives it its id.
    pub(super) fn finish(self) -> Result<(File, TemporaryName, u64, BlobId), BuildError> {
        let synced = self.file.into_inner().map_err(io::IntoInnerError::into_error);
        let synced = synced.and_then(|file| file.sync_all().map(|()| file));
        let file = synced.map_err(|source| BuildError::Write { path: self.name.path.clone(), source })?;
        let id = hex(self.hash.finish().as_ref()).parse().expect("64 hexadecimal digits are a blob id");
        Ok((file, self.name, self.len, id))
    }
}

/// The level other builders use.
const BOOTSTRAP_LEVEL: i32 = 3;

/// A row for the part called `name`, whose place is to be filled in.
fn row(name: &str, flags: u32) -> TocEntry {
    let mut row = TocEntry::new_zeroed();
    row.flags = flags.into();
    row.name[..name.len()].copy_from_slice(name.as_bytes());
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_follow_their_parts_and_digests_do_not_count_for_the_id() {
        let dir = tempfile::tempdir().unwrap();
        let mut parts = Parts::create(dir.path()).unwrap();
        parts.write(b"data").unwrap();
        parts.end_data(4096).unwrap();
        parts.write_digests(&[7; 32]).unwrap();
        parts.end_part(part::DIGESTS, 32).unwrap();
        let bootstrap = vec![1; 8192];
        parts.write_bootstrap(&bootstrap, true).unwrap();
        let toc = parts.write_toc().unwrap();
        let (_, name, len, id) = parts.finish().unwrap();

        let file = std::fs::read(&name.path).unwrap();
        assert_eq!(file.len() as u64, len);
        let boot = file.len() - 512 - 3 * 128 - 512;
        let from = 4 + 512 + 32 + 512;
        assert_eq!(file[4..516], *PartHeader::new("image.blob", 4).as_bytes());
        assert_eq!(file[548..1060], *PartHeader::new("blob.digest", 32).as_bytes());
        assert_eq!(file[boot..boot + 512], *PartHeader::new("image.boot", (boot - from) as u64).as_bytes());
        let unhashed: Vec<u8> = [&file[..516], &file[548..]].concat();
        assert_eq!(id.as_str(), codec::sha256(&unhashed).to_string());
        assert_eq!(toc.size as usize, 3 * 128 + 512);
        assert_eq!(toc.digest, codec::sha256(&file[boot + 512..]).0);

        let mut rows = file[boot + 512..].chunks(128);
        let mut next = |name: &[u8], flags: u8, digest: &[u8], sizes: [u64; 3]| {
            let row = rows.next().unwrap();
            assert_eq!((row[0], &row[8..8 + name.len()], row[8 + name.len()]), (flags, name, 0));
            assert_eq!(row[24..56], codec::sha256(digest).0);
            assert_eq!(row[56..80], sizes.map(u64::to_le_bytes).concat());
            assert_eq!(row[80..], [0; 48]);
        };
        next(b"image.blob", 1, &file[..516], [0, 4, 4096]);
        next(b"blob.digest", 1, &[7; 32], [516, 32, 32]);
        next(b"image.boot", 2, &bootstrap, [1060, (boot - from) as u64, 8192]);
    }
}
