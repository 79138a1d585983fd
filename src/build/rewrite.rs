//! An existing image with some of its chunks moved to blobs of their own.
//!
//! The image is loaded as a [`Stock`]. Chunks are copied into new blobs and all files that lead to
//! them are led there; then the bootstrap is written anew. Where the bytes come from is not known
//! here: a [`ChunkSource`] reads and checks them.
//!
//! Every byte is compared with the digest that the image names before it is written, and whatever
//! was written is read back before anything has a name that somebody could trust.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use super::blobwriter::{BlobWriter, FinishedBlob, Shape, TemporaryName};
use super::chunk::{Chunk, Compression, Packer};
use super::emit::Bootstrap;
use super::error::BuildError;
use super::hintedpaths::HintedPaths;
use super::load::{LoadError, Stock};
use super::overlay::{self, Whiteouts};
use super::repack::Repacker;
use super::spec::{Version, default_batch_size};
use super::tree::{Kind, NodeId};
use super::{BlobReport, Progress, layout, merge, recheck, stockblobs};
use crate::base::{BLOCK, ByteRange, Digest};
use crate::blob::digest_of;
use crate::codec;
use crate::format::blobfile::features;
use crate::format::rafs::{Algorithm, BlobEntry, DigestAlgorithm};
use crate::image::Image;

/// Reads the chunks of an image.
pub trait ChunkSource {
    /// Gives the chunks at `places` to `visit`, one after the other, until it fails.
    ///
    /// # Errors
    /// [`BuildError::Chunk`], or what `visit` returned.
    fn read_each(
        &self,
        places: &[ChunkPlace],
        visit: &mut dyn FnMut(ChunkBytes<'_>) -> Result<(), BuildError>,
    ) -> Result<(), BuildError>;
}

/// Where a chunk is in the decoded space of its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Position in [`Image::devices`].
    pub device: usize,
    pub decoded: ByteRange,
}

/// The bytes of one chunk.
#[derive(Clone, Copy, Debug)]
pub struct ChunkBytes<'a> {
    /// As files have them, checked as well as the image allows.
    pub plain: &'a [u8],
    /// As they lie in the blob, and in which form, if the chunk lies there alone and is not
    /// encrypted.
    pub stored: Option<(Algorithm, &'a [u8])>,
}

/// An image that is to be rewritten.
#[derive(Clone, Copy)]
pub struct Existing<'a> {
    /// What to call it in messages.
    pub name: &'a Path,
    pub image: &'a Image,
    pub chunks: &'a dyn ChunkSource,
}

impl std::fmt::Debug for Existing<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Existing").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What chunks must have in common to be copied into one blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Form {
    pub compression: Algorithm,
    pub digest: DigestAlgorithm,
}

impl Form {
    fn shape(self, chunk_size: u32) -> Shape {
        let Self { compression, digest } = self;
        Shape { version: Version::V6, compression, digest, chunk_size, key: None, toc: false, inline_bootstrap: false }
    }

    /// The form of a new blob for chunks of the blob of `entry`. Nothing is written as gzip, which
    /// is slower and larger than Zstandard.
    fn of(entry: &BlobEntry) -> Option<Self> {
        let compression = match Algorithm::from_number(entry.compression.get())? {
            Algorithm::Gzip => Algorithm::Zstd,
            other => other,
        };
        Some(Self { compression, digest: DigestAlgorithm::from_number(entry.digest.get())? })
    }

    /// How chunks are stored that cannot be copied as they are.
    fn compression(self) -> Compression {
        match self.compression {
            Algorithm::None => Compression::None,
            Algorithm::Lz4Block => Compression::Lz4,
            Algorithm::Gzip | Algorithm::Zstd => Compression::default(),
        }
    }

    /// Orders forms, for choices that must not depend on a hash.
    pub(super) fn rank(self) -> (u32, u32) {
        (self.compression.number(), self.digest.number())
    }
}

/// An image whose chunks are being moved.
#[derive(Debug)]
pub(super) struct Rewrite<'a> {
    existing: Existing<'a>,
    pub stock: Stock,
    /// The chunk that each chunk of the image has become.
    chunk_of_cut: Vec<u32>,
    /// Paths that the image wants to have prefetched.
    prefetch: HintedPaths,
    new: Vec<FinishedBlob>,
    /// Chunks that were stored in another way than they were.
    pub encoded_chunks: u64,
}

impl<'a> Rewrite<'a> {
    pub(super) fn of(existing: Existing<'a>) -> Result<Self, BuildError> {
        let mut stock = Stock::new(None);
        let failed = |cause| BuildError::Image { image: existing.name.to_owned(), cause: Box::new(cause) };
        let added = stock.add(existing.image, None, |_| false).map_err(failed)?;
        if stock.blobs.rows().len() != existing.image.devices().len() {
            return Err(failed(LoadError::RepeatedBlob));
        }
        overlay::put_over(&mut stock.tree, NodeId::ROOT, added.root, Whiteouts::None);
        let chunk_of_cut = (0..u32::try_from(stock.chunks.len()).expect("checked as they came")).collect();
        Ok(Self { existing, stock, chunk_of_cut, prefetch: added.prefetch, new: Vec::new(), encoded_chunks: 0 })
    }

    /// The form of a new blob for chunks of this row.
    pub(super) fn form(&self, row: u16) -> Result<Form, BuildError> {
        let entry = &self.stock.blobs.rows()[usize::from(row)];
        let unknown = LoadError::Blob { blob: stockblobs::id_text(entry), problem: "an unknown compression or digest" };
        Form::of(entry).ok_or_else(|| self.failed(unknown))
    }

    /// Whether the blob of this row is encrypted.
    pub(super) fn is_encrypted(&self, row: u16) -> bool {
        self.stock.blobs.rows()[usize::from(row)].features.get() & features::ENCRYPTED != 0
    }

    fn failed(&self, cause: LoadError) -> BuildError {
        BuildError::Image { image: self.existing.name.to_owned(), cause: Box::new(cause) }
    }

    /// For each chunk whether a file leads to it.
    pub(super) fn used(&self) -> Vec<bool> {
        let mut used = vec![false; self.stock.chunks.len()];
        let tree = &self.stock.tree;
        let walked = tree.walk(|id| {
            if let Kind::Regular(content) = &tree.node(id).kind {
                for cut in content.cuts() {
                    let cut = usize::try_from(cut).expect("cuts are counted in memory");
                    used[self.chunk_of_cut[cut] as usize] = true;
                }
            }
            Ok::<(), std::convert::Infallible>(())
        });
        let Ok(()) = walked;
        used
    }

    /// How much of each blob files lead to.
    pub(super) fn usage(&self) -> Vec<Usage> {
        let mut usage = vec![Usage::default(); self.stock.blobs.rows().len()];
        for (chunk, used) in self.stock.chunks.iter().zip(self.used()) {
            if used {
                let usage = &mut usage[usize::from(chunk.blob)];
                usage.chunks += 1;
                usage.decoded_bytes += u64::from(chunk.plain_len).next_multiple_of(BLOCK);
            }
        }
        usage
    }

    /// Copies `wanted`, positions of chunks of the image, into one new blob in this order, and
    /// leads every file that uses them there. Chunks of the same digest become one. The blob's row of the
    /// table gets the features `marks` beside those that say how it is stored.
    pub(super) fn copy(
        &mut self,
        wanted: &[u32],
        form: Form,
        marks: u32,
        blobs_dir: &Path,
        progress: &dyn Progress,
    ) -> Result<(), BuildError> {
        let (distinct, copy_of) = self.distinct(wanted);
        let chunks: Vec<Chunk> = distinct.iter().map(|&position| self.stock.chunks[position as usize]).collect();
        let chunk_size = self.stock.agreed().expect("an image was added").chunk_size;
        let (blob, encoded) = self.write_blob(&chunks, form.shape(chunk_size), blobs_dir, progress)?;
        self.encoded_chunks += encoded;
        let entry = blob.entry.expect("a blob with chunks has a row");
        let first = u32::try_from(self.stock.chunks.len()).expect("checked as they came");
        let row = self.stock.add_blob(&entry, &blob.chunks)?;
        self.stock.blobs.rows_mut()[usize::from(row)].features |= marks;
        for (&position, copy) in wanted.iter().zip(copy_of) {
            self.chunk_of_cut[position as usize] = first + copy;
        }
        self.new.push(blob);
        Ok(())
    }

    /// The first of each set of chunks with the same bytes, and for every chunk which of these it
    /// is.
    fn distinct(&self, wanted: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let mut seen = HashMap::with_capacity(wanted.len());
        let (mut distinct, mut copy_of) = (Vec::new(), Vec::with_capacity(wanted.len()));
        for &position in wanted {
            let next = u32::try_from(distinct.len()).expect("no more than there are chunks");
            let copy = match self.content(position) {
                Some(content) => *seen.entry(content).or_insert(next),
                None => next,
            };
            if copy == next {
                distinct.push(position);
            }
            copy_of.push(copy);
        }
        (distinct, copy_of)
    }

    /// What chunks with the same bytes have in common; nothing if the image does not say.
    pub(super) fn content(&self, position: u32) -> Option<(u32, Digest, u32)> {
        let chunk = &self.stock.chunks[position as usize];
        let algorithm = self.stock.blobs.rows()[usize::from(chunk.blob)].digest.get();
        (chunk.digest != NO_DIGEST).then_some((algorithm, chunk.digest, chunk.plain_len))
    }

    fn write_blob(
        &self,
        chunks: &[Chunk],
        shape: Shape,
        blobs_dir: &Path,
        progress: &dyn Progress,
    ) -> Result<(FinishedBlob, u64), BuildError> {
        let form = Form { compression: shape.compression, digest: shape.digest };
        let batch_size = default_batch_size(shape.chunk_size);
        let compressor = form.compression().compressor().map_err(BuildError::Compressor)?;
        let packer = Packer::new(compressor, shape.key.clone());
        let mut blob = Repacker::new(BlobWriter::new(blobs_dir.to_owned(), shape), packer, batch_size);
        let places: Vec<ChunkPlace> = chunks.iter().map(|chunk| self.place(chunk)).collect::<Result<_, _>>()?;
        let mut next = chunks.iter();
        self.existing.chunks.read_each(&places, &mut |bytes| {
            let chunk = next.next().expect("as many chunks as places");
            let digest = self.checked(chunk, bytes.plain, form.digest)?;
            let new = Chunk::new(digest, codec::crc32c(bytes.plain), bytes.plain.len());
            match bytes.stored.and_then(|(algorithm, stored)| as_it_is(algorithm, stored, bytes.plain, form)) {
                Some(stored) => blob.copy(new, stored)?,
                None => blob.pack(new, bytes.plain)?,
            }
            progress.advance(1, bytes.plain.len() as u64);
            Ok(())
        })?;
        let anew = blob.anew;
        Ok((blob.finish()?.expect("nobody asks for a blob without chunks"), anew))
    }

    fn place(&self, chunk: &Chunk) -> Result<ChunkPlace, BuildError> {
        let decoded = ByteRange::at(chunk.decoded_offset, chunk.plain_len.into()).filter(|range| !range.is_empty());
        let blob = || stockblobs::id_text(&self.stock.blobs.rows()[usize::from(chunk.blob)]);
        let decoded =
            decoded.ok_or_else(|| self.failed(LoadError::Blob { blob: blob(), problem: "an empty chunk" }))?;
        Ok(ChunkPlace { device: chunk.blob.into(), decoded })
    }

    /// The digest of `plain` for the new blob, if they are the bytes that the image promised.
    fn checked(&self, chunk: &Chunk, plain: &[u8], wanted: DigestAlgorithm) -> Result<Digest, BuildError> {
        let entry = &self.stock.blobs.rows()[usize::from(chunk.blob)];
        let algorithm = DigestAlgorithm::from_number(entry.digest.get());
        let got = algorithm.map(|algorithm| digest_of(algorithm, plain));
        if plain.len() as u64 != u64::from(chunk.plain_len) || (chunk.digest != NO_DIGEST && got != Some(chunk.digest))
        {
            return Err(BuildError::OtherBytes { blob: stockblobs::id_text(entry), chunk: chunk.number });
        }
        Ok(got.filter(|_| algorithm == Some(wanted)).unwrap_or_else(|| digest_of(wanted, plain)))
    }

    /// Writes the bootstrap, reads everything back that is new, and gives it its names. The blobs
    /// `first` come first in the blob table, then those that are used, by first use.
    pub(super) fn finish(
        mut self,
        first: &[u16],
        prefetch: Option<&[NodeId]>,
        out_dir: &Path,
    ) -> Result<Rewritten, BuildError> {
        let agreed = self.stock.agreed().expect("an image was added");
        let Stock { tree, mut chunks, blobs, .. } = self.stock;
        let wishes = || merge::prefetch_nodes(&tree, self.prefetch.nodes(&tree));
        let prefetch = prefetch.map_or_else(wishes, <[NodeId]>::to_vec);
        let rows = blobs.into_used(first, &tree, &mut chunks, &self.chunk_of_cut);
        let bits = self.existing.image.summary().flags;
        let layout = layout::layout(&tree, agreed.chunk_size)?;
        let bootstrap = Bootstrap {
            tree: &tree,
            layout: &layout,
            blobs: &rows,
            chunks: &chunks,
            chunk_of_cut: &self.chunk_of_cut,
            prefetch: &prefetch,
            facts: merge::facts(agreed, bits),
        };
        let bytes = bootstrap.bytes()?;
        let image = recheck::image(bytes, &bootstrap.expected(), &self.new).map_err(BuildError::Recheck)?;

        let blobs_dir = out_dir.join("blobs");
        let blobs = self.new.iter().map(|blob| report(blob, &blobs_dir)).collect();
        let prefetched_paths = if rows.is_empty() { 0 } else { prefetch.len() as u64 };
        publish(out_dir, &mut self.new, image.bytes())?;
        Ok(Rewritten {
            bootstrap: out_dir.join("bootstrap").display().to_string(),
            bootstrap_bytes: image.bytes().len() as u64,
            blobs,
            rows,
            prefetched_paths,
        })
    }

    /// Position of the first chunk that the image did not have.
    pub(super) fn first_new_chunk(&self) -> usize {
        self.chunk_of_cut.len()
    }
}

/// What stands in a chunk table where there is no digest.
const NO_DIGEST: Digest = Digest([0; 32]);

/// How much of a blob files lead to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub chunks: u64,
    /// Bytes in whole blocks.
    pub decoded_bytes: u64,
}

/// A rewritten image that has its names.
#[derive(Debug)]
pub(super) struct Rewritten {
    pub bootstrap: String,
    pub bootstrap_bytes: u64,
    pub blobs: Vec<BlobReport>,
    /// The blob table.
    pub rows: Vec<BlobEntry>,
    pub prefetched_paths: u64,
}

/// The stored bytes of a chunk if a blob of `form` can hold them unchanged: tables tell compressed
/// chunks from others by their length (`blob.md` section 4.2).
fn as_it_is<'b>(algorithm: Algorithm, stored: &'b [u8], plain: &[u8], form: Form) -> Option<&'b [u8]> {
    let fits = match algorithm {
        // What did not compress in one blob will not in another of its kind.
        Algorithm::None => stored.len() == plain.len(),
        compressed => compressed == form.compression && stored.len() < plain.len(),
    };
    fits.then_some(stored)
}

fn report(blob: &FinishedBlob, blobs_dir: &Path) -> BlobReport {
    BlobReport {
        id: blob.id.to_string(),
        path: blobs_dir.join(blob.id.as_str()).display().to_string(),
        stored_bytes: blob.stored_bytes,
        decoded_bytes: blob.decoded_bytes,
        chunks: blob.chunks.len() as u64,
        batches: blob.batches,
    }
}

/// Makes the directory for new blobs in the output directory.
pub(super) fn make_blobs_dir(out_dir: &Path) -> Result<std::path::PathBuf, BuildError> {
    let blobs = out_dir.join("blobs");
    fs::create_dir_all(&blobs).map_err(|source| BuildError::Write { path: blobs.clone(), source })?;
    Ok(blobs)
}

/// Writes the bootstrap and gives all files their names, the bootstrap last: under its own name it
/// always finds its blobs.
fn publish(out_dir: &Path, blobs: &mut [FinishedBlob], bootstrap: &[u8]) -> Result<(), BuildError> {
    fs::create_dir_all(out_dir).map_err(|source| BuildError::Write { path: out_dir.to_owned(), source })?;
    let (mut file, mut name) = TemporaryName::create(out_dir)?;
    let written = file.write_all(bootstrap).and_then(|()| file.sync_all());
    written.map_err(|source| BuildError::Write { path: name.path.clone(), source })?;
    for blob in blobs {
        blob.publish()?;
    }
    name.rename("bootstrap")
}
