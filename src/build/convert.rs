//! An image of RAFS v5 as one of RAFS v6, without touching its blobs.
//!
//! What v6 wants of a blob and a v5 blob does not have is a table of its chunks. So each such blob gets a
//! file with nothing but that table, as an index into a foreign layer has one, and the bootstrap names
//! both. The chunks stay where they are stored, however they are packed there; where they are
//! decoded to is laid out anew, each on a block, without gaps, as readers of v6 expect it.
//!
//! The table lists the chunks that the image leads to, and numbers them anew if the blob has others.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;
use zerocopy::IntoBytes;

use super::blobparts::{Parts, part};
use super::blobtable::Table;
use super::blobwriter::TemporaryName;
use super::chunk::{Chunk, Compression, Packer};
use super::emit::Bootstrap;
use super::error::BuildError;
use super::load::{LoadError, Stock};
use super::overlay::{self, Whiteouts};
use super::rewrite::make_blobs_dir;
use super::tree::NodeId;
use super::verify::VerifyError;
use super::{RecheckError, layout, merge, recheck, stockblobs};
use crate::base::{BLOCK, BlobId, Digest};
use crate::blob::{BlobKind, BlobTables};
use crate::format::blobfile::features;
use crate::format::rafs::{Algorithm, BlobEntry, chunk_flags};
use crate::image::Image;

/// What to convert.
#[derive(Debug)]
pub struct ConvertSpec<'a> {
    /// What to call the image in messages.
    pub name: &'a Path,
    /// The image, lifted.
    pub image: &'a Image,
    /// Made if it is not there. Gets `bootstrap`, and in `blobs/` a file with tables for each blob that
    /// has none.
    pub out_dir: &'a Path,
}

/// What was made. The same for every run on the same image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConvertReport {
    /// Path of the bootstrap.
    pub bootstrap: String,
    pub bootstrap_bytes: u64,
    /// Blobs that got tables.
    pub tables: Vec<NewTable>,
    /// Ids of blobs that have tables of their own, and are named as before.
    pub kept_blobs: Vec<String>,
    /// Entries of the prefetch table.
    pub prefetched_paths: u64,
}

/// A file with the table of a blob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NewTable {
    /// Id of the blob, which stays as it is.
    pub blob: String,
    /// SHA-256 of the file with the table, by which it is asked for as a blob is.
    pub id: String,
    /// Path of that file.
    pub path: String,
    pub bytes: u64,
    /// Chunks in the table.
    pub chunks: u64,
    /// Chunks that the blob has, as far as the image tells.
    pub chunks_of_blob: u64,
}

/// Writes a RAFS v6 bootstrap, and tables for the blobs that have none. No blob is read.
///
/// # Errors
/// A [`BuildError`]. Nothing has a name then that was not there before.
pub fn convert(spec: &ConvertSpec<'_>) -> Result<ConvertReport, BuildError> {
    let failed = |cause| BuildError::Image { image: spec.name.to_owned(), cause: Box::new(cause) };
    let mut stock = Stock::new(None);
    let added = stock.add(spec.image, None, |_| false).map_err(failed)?;
    overlay::put_over(&mut stock.tree, NodeId::ROOT, added.root, Whiteouts::None);
    let agreed = stock.agreed().expect("an image was added");
    let Stock { tree, mut chunks, blobs, .. } = stock;
    let cuts: Vec<u32> = (0..u32::try_from(chunks.len()).expect("checked as they came")).collect();
    let mut rows = blobs.into_used(&[], &tree, &mut chunks, &cuts);

    let blobs_dir = make_blobs_dir(spec.out_dir)?;
    let mut files = Vec::new();
    let mut kept_blobs = Vec::new();
    for (row, entry) in (0u16..).zip(&mut rows) {
        let tables = BlobTables::new(entry).map_err(|cause| failed(cause.into()))?;
        if tables.kind() == BlobKind::Listed {
            files.push((row, TableFile::write(row, entry, &mut chunks, &blobs_dir).map_err(|e| e.into_build(failed))?));
        } else {
            kept_blobs.push(stockblobs::id_text(entry));
        }
    }
    let prefetch = merge::prefetch_nodes(&tree, added.prefetch.nodes(&tree));
    let layout = layout::layout(&tree, agreed.chunk_size)?;
    let bits = spec.image.summary().flags;
    let bootstrap = Bootstrap {
        tree: &tree,
        layout: &layout,
        blobs: &rows,
        chunks: &chunks,
        chunk_of_cut: &cuts,
        prefetch: &prefetch,
        facts: merge::facts(agreed, bits),
    };
    let image = recheck::bootstrap(bootstrap.bytes()?, &bootstrap.expected()).map_err(BuildError::Recheck)?;
    files.iter().try_for_each(|(row, file)| file.recheck(&image, usize::from(*row)))?;

    let (mut out, mut name) = TemporaryName::create(spec.out_dir)?;
    let written = out.write_all(image.bytes()).and_then(|()| out.sync_all());
    written.map_err(|source| BuildError::Write { path: name.path.clone(), source })?;
    for (_, file) in &mut files {
        file.name.rename(file.id.as_str())?;
    }
    name.rename("bootstrap")?;
    Ok(ConvertReport {
        bootstrap: spec.out_dir.join("bootstrap").display().to_string(),
        bootstrap_bytes: image.bytes().len() as u64,
        tables: files.into_iter().map(|(_, file)| file.report(&blobs_dir)).collect(),
        kept_blobs,
        prefetched_paths: if rows.is_empty() { 0 } else { prefetch.len() as u64 },
    })
}

/// What is wrong with a blob, or with writing its table.
enum Failure {
    Load(LoadError),
    Build(BuildError),
}

impl From<BuildError> for Failure {
    fn from(cause: BuildError) -> Self {
        Self::Build(cause)
    }
}

impl Failure {
    fn into_build(self, failed: impl FnOnce(LoadError) -> BuildError) -> BuildError {
        match self {
            Self::Load(cause) => failed(cause),
            Self::Build(cause) => cause,
        }
    }
}

/// A file with the table of one blob, under a temporary name.
struct TableFile {
    blob: String,
    id: BlobId,
    file: fs::File,
    name: TemporaryName,
    bytes: u64,
    chunks: u64,
    chunks_of_blob: u64,
}

impl TableFile {
    /// Writes the table of the blob of `entry`, which then names it, and gives all chunks of the blob,
    /// which is number `row`, the numbers and places of the table.
    fn write(row: u16, entry: &mut BlobEntry, chunks: &mut [Chunk], blobs_dir: &Path) -> Result<Self, Failure> {
        let blob = stockblobs::id_text(entry);
        let problem = |problem| Failure::Load(LoadError::Blob { blob: blob.clone(), problem });
        let compression = match Algorithm::from_number(entry.compression.get()) {
            Some(Algorithm::None) => Compression::None,
            Some(Algorithm::Lz4Block) => Compression::Lz4,
            Some(Algorithm::Zstd) => Compression::default(),
            Some(Algorithm::Gzip) => {
                return Err(problem(
                    "chunks in gzip members of a foreign layer, whose lengths are not known: build it anew",
                ));
            }
            None => return Err(problem("an unknown compression")),
        };
        let listed = place(row, chunks).ok_or_else(|| problem("more decoded bytes than RAFS v6 can have"))?;
        let is_short = listed.iter().all(fits_short);
        if !is_short && !listed.iter().all(|chunk| chunk.stored_len < 1 << 24) {
            return Err(problem("chunks of 16 MiB that no table of RAFS v6 can describe: build it anew"));
        }
        let chunks_of_blob = entry.chunk_count.get().into();
        let mut set = features::ALIGNED | features::SEPARATE | features::CAP_TAR_TOC;
        if !is_short {
            set |= features::CHUNK_INFO_V2;
        }
        let (table, plain) = Table::new(&listed, &[], !is_short);
        let mut packer = Packer::new(compression.compressor().map_err(BuildError::Compressor)?, None);
        let (stored, is_compressed) = packer.table(&plain);
        let algorithm = if is_compressed { compression.algorithm() } else { Algorithm::None };
        let table = table.placed(algorithm, 0, stored.len());
        let header = table.header(set);
        let mut parts = Parts::create(blobs_dir)?;
        parts.write_part(part::CHUNK_INFO, &stored, &plain, algorithm)?;
        parts.write_part(part::HEADER, header.as_bytes(), header.as_bytes(), Algorithm::None)?;
        let (file, name, bytes, id) = parts.finish()?;

        let end = listed.last().map_or(0, end_of);
        entry.features = set.into();
        entry.chunk_count = u32::try_from(listed.len()).expect("24 bits").into();
        entry.uncompressed_size = end.into();
        entry.ci_compression = algorithm.number().into();
        entry.ci_offset = 0.into();
        entry.ci_compressed_size = table.stored_len.into();
        entry.ci_uncompressed_size = table.plain_len.into();
        entry.meta_digest = Digest::from_hex(id.as_str()).expect("it is a SHA-256").0;
        entry.meta_size = bytes.into();
        Ok(Self { blob, id, file, name, bytes, chunks: listed.len() as u64, chunks_of_blob })
    }

    /// Reads the table again, as readers of the image do, and compares it with what the image lists.
    fn recheck(&self, image: &Image, row: usize) -> Result<(), BuildError> {
        let device = &image.devices()[row];
        let check = || -> Result<(), VerifyError> {
            let tables = BlobTables::new(&device.entry)?;
            let range = tables.stored();
            let mut stored = vec![0; usize::try_from(range.len()).expect("tables of 2^24 chunks fit in memory")];
            self.file.read_exact_at(&mut stored, range.start())?;
            tables.with_digests(tables.geometry(&stored)?, image.chunk_records().iter())?;
            Ok(())
        };
        let blob = device.blob.clone();
        check().map_err(|cause| BuildError::Recheck(RecheckError::Blob { blob, cause }))
    }

    fn report(self, blobs_dir: &Path) -> NewTable {
        NewTable {
            blob: self.blob,
            path: blobs_dir.join(self.id.as_str()).display().to_string(),
            id: self.id.to_string(),
            bytes: self.bytes,
            chunks: self.chunks,
            chunks_of_blob: self.chunks_of_blob,
        }
    }
}

/// Gives the chunks of blob number `row` numbers and places without gaps, in the order of the numbers
/// that they had, and returns each once. `None` if there is not so much room.
fn place(row: u16, chunks: &mut [Chunk]) -> Option<Vec<Chunk>> {
    let mut own: Vec<&mut Chunk> = chunks.iter_mut().filter(|chunk| chunk.blob == row).collect();
    own.sort_by_key(|chunk| chunk.number);
    let mut listed: Vec<Chunk> = Vec::new();
    let mut before = None;
    for chunk in own {
        // Layers that share a blob bring its chunks several times.
        let is_same = before.replace(chunk.number) == Some(chunk.number);
        let last = listed.last().copied();
        if let Some(same) = last.filter(|_| is_same) {
            (chunk.number, chunk.decoded_offset) = (same.number, same.decoded_offset);
            continue;
        }
        chunk.number = u32::try_from(listed.len()).ok()?;
        chunk.decoded_offset = last.as_ref().map_or(0, end_of);
        if end_of(chunk) > MAX_DECODED {
            return None;
        }
        listed.push(*chunk);
    }
    Some(listed)
}

/// Where the chunk behind this one starts.
fn end_of(chunk: &Chunk) -> u64 {
    (chunk.decoded_offset + u64::from(chunk.plain_len)).next_multiple_of(BLOCK)
}

/// End of a device, in bytes (`rafs-v6.md` section 5).
const MAX_DECODED: u64 = (1 << 44) - BLOCK;

/// Whether an entry of 16 bytes can describe a chunk: such entries tell compressed ones by their length.
fn fits_short(chunk: &Chunk) -> bool {
    let is_compressed = chunk.flags & chunk_flags::COMPRESSED != 0;
    is_compressed == (chunk.stored_len != chunk.plain_len) && (1..=1 << 24).contains(&chunk.stored_len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_get_numbers_and_places_without_gaps_and_equals_stay_equal() {
        let chunk = |blob, number, plain_len| Chunk { blob, number, ..Chunk::new(Digest([0; 32]), 0, plain_len) };
        let mut chunks = [chunk(1, 9, 5000), chunk(0, 3, 1), chunk(1, 2, 4096), chunk(1, 9, 5000), chunk(1, 10, 1)];

        let listed = place(1, &mut chunks).unwrap();

        let facts = chunks.map(|chunk| (chunk.blob, chunk.number, chunk.decoded_offset));
        assert_eq!(facts, [(1, 1, 4096), (0, 3, 0), (1, 0, 0), (1, 1, 4096), (1, 2, 12288)]);
        assert_eq!(listed.iter().map(|chunk| chunk.number).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn short_entries_describe_what_their_lengths_tell() {
        let mut chunk = Chunk::new(Digest([0; 32]), 0, 100);
        for (stored_len, flags, fits) in [(100, 0, true), (99, 1, true), (100, 1, false), (101, 1, true), (0, 1, false)]
        {
            (chunk.stored_len, chunk.flags) = (stored_len, flags);
            assert_eq!(fits_short(&chunk), fits, "{stored_len} {flags}");
        }
    }
}
