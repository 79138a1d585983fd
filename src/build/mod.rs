//! From directories and tar archives to a RAFS image: a bootstrap and at most one blob for each.
//!
//! An input (`input`) walks the source once. It puts entries into the `tree` and file content
//! into the `chunk` pipeline, whose far end is the `blobwriter`. Then `layout` gives every
//! node a place and `emit` writes the bootstrap. At last `verify` reads it all again. (For RAFS v5 the
//! same three are in `v5`; whatever else is here does not depend on the version.) Nothing here
//! reads the clock, asks for the order of a directory or depends on the number of threads: the
//! same source gives the same bytes. Nothing here prints; who wants to watch passes a [`Progress`].
//!
//! Memory grows with the number of entries and chunks, not with the size of files.

mod base;
mod blobparts;
mod blobtable;
mod blobwriter;
mod chunk;
mod chunkdict;
mod compact;
mod convert;
mod emit;
mod error;
mod hintedpaths;
mod input;
mod layout;
mod lift;
mod load;
mod merge;
mod optimize;
mod overlay;
mod pattern;
mod prefetch;
mod recheck;
mod repack;
mod report;
mod rewrite;
mod selection;
mod spec;
mod stack;
mod stockblobs;
mod tree;
mod v5;
mod verify;
mod xattr;

use std::fs;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

pub use base::Base;
pub use chunk::{Compression, InvalidCompression};
pub use chunkdict::{DictionaryReport, DictionarySpec, dictionary};
pub use compact::{CompactReport, CompactSpec, CompactedBlob, Fate, compact};
pub use convert::{ConvertReport, ConvertSpec, NewTable, convert};
pub use error::{BuildError, Limit, Unfit};
pub use lift::{LIFT_VERSION, LiftError, is_showable_xattr, lift};
pub use load::{Layer, LoadError};
pub use merge::{BlobFacts, MergeReport, MergeSpec, MergeVersion, merge};
pub use optimize::{HotPath, OptimizeReport, OptimizeSpec, Remark, StillNeeded, optimize};
pub use overlay::Whiteouts;
pub use pattern::{InvalidPattern, Pattern};
pub use prefetch::{MAX_HINTS, PrefetchHints};
pub use recheck::RecheckError;
pub use report::{BlobReport, BuildReport, LayerReport};
pub use rewrite::{ChunkBytes, ChunkPlace, ChunkSource, Existing};
pub use selection::{IdRange, InvalidIdRange, Owners, Selection};
pub use spec::{Batching, BuildSpec, Encryption, Progress, Source, Version};
pub use stockblobs::Contradiction;
pub use v5::{NotInVersion5, Packed};
pub use verify::VerifyError;

use crate::base::BlobId;
use crate::format::erofs::DeviceSlot;
use crate::format::rafs::{BlobEntry, DEVICE_TABLE_OFFSET};
use base::{Based, Joined, NewBlob, Upper};
use blobwriter::{BlobWriter, FinishedBlob, SealedBlob, Shape, TemporaryName};
use chunk::{Packer, Settings, Stored};
use emit::{Bootstrap, Facts};
use layout::Layout;
use load::Agreed;
use spec::MAX_THREADS;
use stack::{NoTotal, Reading, Stratum};
use tree::{NodeId, Tree};

/// Builds an image. What had the same names in the output directory is replaced, and only when
/// the image is complete, checked and on disk; a failed build leaves nothing behind but empty
/// directories.
///
/// # Errors
/// A [`BuildError`] that names the entry or file at fault.
pub fn build(mut spec: BuildSpec, progress: &dyn Progress) -> Result<BuildReport, BuildError> {
    let (_, Shape { chunk_size, digest, .. }) = settings(&spec)?;
    let sources = std::mem::take(&mut spec.sources);
    let is_directory = matches!(sources.as_slice(), [Source::Directory(_)]);
    let no_total = NoTotal(progress);
    let progress = if sources.len() > 1 { &no_total } else { progress };
    let blobs = spec.out_dir.join("blobs");
    sources.iter().try_for_each(|source| refuse_output_in_source(&spec.out_dir, source))?;
    fs::create_dir_all(&blobs).map_err(|source| BuildError::Write { path: blobs.clone(), source })?;
    let mut strata = stack::by_blob(sources, spec.one_blob);
    let last = strata.pop().filter(|sources| !sources.is_empty()).ok_or(BuildError::NoSource)?;
    let is_stack = !strata.is_empty();
    if spec.inline_bootstrap && is_stack {
        return Err(BuildError::InlineInMany);
    }

    // Only one directory has its hinted files in front of everything.
    let has_head = is_directory && !spec.prefetch.table && !spec.prefetch.is_empty();
    let explicit_ids = spec.selection.owners != Owners::Omitted;
    let mut based = Based::on(&spec.base, Agreed { chunk_size, explicit_ids }, digest)?;
    let reading = Reading { spec: &spec, blobs: &blobs, progress };
    let mut report = BuildReport::default();
    let mut below = Vec::new();
    for sources in strata {
        let first = report.layers.len();
        if let Some(blob) = reading.add(sources, &mut based, &mut report)? {
            report.layers[first..].iter_mut().for_each(|layer| layer.blob = Some(blob.id.to_string()));
            below.push(blob);
        }
    }
    let first = report.layers.len();
    let Stratum { layers, stored, shape } = reading.read(last, &based, &mut report)?;
    let Stored { blob, mut packer, chunk_of_cut, .. } = stored;
    let writing = Writing { shape: &shape, chunk_of_cut: &chunk_of_cut, hints: &spec.prefetch, has_head, explicit_ids };
    let mut made = writing.write(based, layers, blob, &mut packer)?;
    if let Some(blob) = made.blobs.last() {
        report.layers[first..].iter_mut().for_each(|layer| layer.blob = Some(blob.id.to_string()));
    }
    if is_stack {
        made.keep_used(below);
    }
    if spec.verify {
        made.blobs.iter().for_each(|blob| progress.verifying(Some(blob.temporary_path())));
        if made.blobs.is_empty() {
            progress.verifying(None);
        }
        writing.verify(&made, spec.threads.min(MAX_THREADS))?;
    }
    report.encrypted = shape.key.is_some() && !made.blobs.is_empty();
    report.prefetch_entries = if made.image.rows.is_empty() { 0 } else { made.image.prefetch.len() as u64 };
    report.verified = spec.verify;
    made.describe(&spec.out_dir, &blobs, &mut report);
    made.publish(&spec.out_dir)?;
    Ok(report)
}

/// Reads an archive as [`build`] does and lays out the image, but stores nothing. Entry point of the
/// fuzz target: content is read in chunks of 4 KiB, of which there may be few.
///
/// # Errors
/// As [`build`].
#[doc(hidden)]
pub fn read_archive(bytes: Vec<u8>) -> Result<BuildReport, BuildError> {
    let name = Path::new("archive");
    let stream = Box::new(io::Cursor::new(bytes));
    let mut spec = BuildSpec::new(Source::Archive { name: name.to_owned(), stream: Box::new(io::empty()) }, "");
    (spec.compression, spec.chunk_size) = (Compression::None, 4096);
    let (settings, shape) = settings(&spec)?;
    let read = chunk::rehearse(&settings, |cutter| input::archive(name, stream, &spec.selection, cutter, &()))?;
    layout::layout(&read.tree, shape.chunk_size)?;
    let mut report = report::count(&read.tree);
    report.hole_bytes = report::holes(&read.tree, shape.chunk_size);
    report.skipped_xattrs = read.skipped_xattrs;
    Ok(report)
}

/// What the stages of a build are told, if it is possible at all.
fn settings(spec: &BuildSpec) -> Result<(Settings, Shape), BuildError> {
    spec.ensure_version_has_it()?;
    let chunk_size = spec.checked_chunk_size()?;
    let key = spec.encryption.key()?;
    let shape = Shape {
        version: spec.version,
        compression: spec.compression.algorithm(),
        digest: spec.digest,
        chunk_size,
        key: key.clone(),
        toc: spec.blob_toc,
        inline_bootstrap: spec.inline_bootstrap,
    };
    let settings = Settings {
        compression: spec.compression,
        digest: spec.digest,
        chunk_size,
        batch_size: spec.checked_batch_size(chunk_size)?,
        key,
        workers: spec.threads.min(MAX_THREADS),
    };
    Ok((settings, shape))
}

/// What a bootstrap is written from when the source has been read.
struct Writing<'a> {
    shape: &'a Shape,
    chunk_of_cut: &'a [u32],
    hints: &'a PrefetchHints,
    /// Whether the data of hinted files is the head of the only blob, and nothing else says so.
    has_head: bool,
    explicit_ids: bool,
}

impl Writing<'_> {
    /// Completes the blob and writes the bootstrap. One that lies in the blob is written first and
    /// does not know the blob's id, which depends on it.
    fn write(
        &self,
        based: Based,
        layers: Vec<Upper>,
        blob: BlobWriter,
        packer: &mut Packer,
    ) -> Result<Made, BuildError> {
        let Some(sealed) = blob.seal(packer)? else {
            return Ok(Made { image: self.image(based, layers, None)?, blobs: Vec::new(), inline: false });
        };
        if self.shape.inline_bootstrap {
            let entry = sealed.entry();
            let image = self.image(based, layers, entry.as_ref().map(|entry| (entry, sealed.chunks.as_slice())))?;
            let blob = SealedBlob::finish(sealed, Some(&image.bootstrap))?;
            return Ok(Made { image, blobs: vec![blob], inline: true });
        }
        let blob = sealed.finish(None)?;
        Ok(Made { image: self.image(based, layers, blob.contents())?, blobs: vec![blob], inline: false })
    }

    fn image(&self, based: Based, layers: Vec<Upper>, new: Option<NewBlob<'_>>) -> Result<Imaged, BuildError> {
        let joined = based.join(layers, new, self.chunk_of_cut)?;
        let Joined { tree, chunks, rows, prefetch } = joined;
        let prefetch = if self.hints.is_empty() { prefetch } else { self.hints.listed(&tree) };
        let mut image = Imaged { bootstrap: Vec::new(), tree, layout: None, chunks, rows, prefetch };
        match self.shape.version {
            Version::V6 => {
                let layout = layout::layout(&image.tree, self.shape.chunk_size)?;
                image.bootstrap = self.bootstrap(&image, &layout).bytes()?;
                image.layout = Some(layout);
            }
            Version::V5 { .. } => image.bootstrap = self.v5(&image).bytes()?,
        }
        Ok(image)
    }

    fn bootstrap<'i>(&'i self, image: &'i Imaged, layout: &'i Layout) -> Bootstrap<'i> {
        Bootstrap {
            tree: &image.tree,
            layout,
            blobs: &image.rows,
            chunks: &image.chunks,
            chunk_of_cut: self.chunk_of_cut,
            prefetch: &image.prefetch,
            facts: self.facts(),
        }
    }

    fn v5<'i>(&'i self, image: &'i Imaged) -> v5::Source<'i> {
        v5::Source {
            tree: &image.tree,
            blobs: &image.rows,
            chunks: &image.chunks,
            chunk_of_cut: self.chunk_of_cut,
            prefetch: &image.prefetch,
            head: self.has_head.then_some(self.hints),
            facts: self.facts(),
        }
    }

    fn facts(&self) -> Facts {
        Facts {
            compression: self.shape.compression,
            digest: self.shape.digest,
            chunk_size: self.shape.chunk_size,
            explicit_ids: self.explicit_ids,
            claim_xattrs: false,
        }
    }

    /// Reads everything again.
    fn verify(&self, made: &Made, threads: NonZeroUsize) -> Result<(), BuildError> {
        let bytes = made.readable_bootstrap();
        match &made.image.layout {
            Some(layout) => verify::image(bytes, &self.bootstrap(&made.image, layout).expected(), &made.blobs, threads),
            None => v5::image(&bytes, &self.v5(&made.image), &made.blobs, threads),
        }
    }
}

/// A bootstrap and what it was written from.
struct Imaged {
    bootstrap: Vec<u8>,
    tree: Tree,
    /// Where everything is in the metadata of v6.
    layout: Option<Layout>,
    chunks: Vec<chunk::Chunk>,
    rows: Vec<BlobEntry>,
    prefetch: Vec<NodeId>,
}

/// An image that nobody knows of yet.
struct Made {
    image: Imaged,
    /// The new ones.
    blobs: Vec<FinishedBlob>,
    /// Whether the bootstrap lies in the only one.
    inline: bool,
}

impl Made {
    /// Adds the blobs of lower layers to the one of the highest, and keeps those that the image
    /// needs.
    fn keep_used(&mut self, below: Vec<FinishedBlob>) {
        let place = |blob: &FinishedBlob| {
            let id = blob.id.to_padded();
            self.image.rows.iter().position(|row| row.id == id)
        };
        let all = below.into_iter().chain(self.blobs.drain(..));
        let mut used: Vec<_> = all.filter_map(|blob| Some((place(&blob)?, blob))).collect();
        used.sort_by_key(|(place, _)| *place);
        self.blobs = used.into_iter().map(|(_, blob)| blob).collect();
    }

    /// The bootstrap as readers see it: one out of a blob gets the blob's id from the name of the
    /// file (`blob.md` section 8).
    fn readable_bootstrap(&self) -> Vec<u8> {
        let mut bytes = self.image.bootstrap.clone();
        if let Some(FinishedBlob { id, entry: Some(_), .. }) = self.blobs.last().filter(|_| self.inline) {
            match self.image.layout {
                Some(_) => name_blob(&mut bytes, &self.image.rows, id),
                None => v5::name_blob(&mut bytes, &UNNAMED, id),
            }
        }
        bytes
    }

    fn describe(&self, out_dir: &Path, blobs: &Path, report: &mut BuildReport) {
        let path = |blob: &FinishedBlob| blobs.join(blob.id.as_str()).display().to_string();
        report.bootstrap = match self.blobs.last() {
            Some(blob) if self.inline => path(blob),
            _ => out_dir.join("bootstrap").display().to_string(),
        };
        report.bootstrap_in_blob = self.inline;
        report.bootstrap_bytes = self.image.bootstrap.len() as u64;
        let is_new = |row: &&BlobEntry| {
            let mut new = self.blobs.iter().filter_map(|blob| blob.entry.as_ref());
            row.id == UNNAMED || new.any(|entry| entry.id == row.id)
        };
        report.base_blobs = self.image.rows.iter().filter(|row| !is_new(row)).map(stockblobs::id_text).collect();
        report.blobs.extend(self.blobs.iter().map(|blob| BlobReport {
            id: blob.id.to_string(),
            path: path(blob),
            stored_bytes: blob.stored_bytes,
            decoded_bytes: blob.decoded_bytes,
            chunks: blob.chunks.len() as u64,
            batches: blob.batches,
        }));
        for layer in &mut report.layers {
            layer.blob.take_if(|id| !report.blobs.iter().any(|blob| blob.id == *id));
        }
    }

    /// Writes the bootstrap and gives all files their names, the blobs first: a bootstrap under
    /// its own name always finds its blobs.
    fn publish(&mut self, out_dir: &Path) -> Result<(), BuildError> {
        if self.inline {
            return self.blobs.iter_mut().try_for_each(FinishedBlob::publish);
        }
        let (mut file, mut name) = TemporaryName::create(out_dir)?;
        let written = file.write_all(&self.image.bootstrap).and_then(|()| file.sync_all());
        written.map_err(|source| BuildError::Write { path: name.path.clone(), source })?;
        self.blobs.iter_mut().try_for_each(FinishedBlob::publish)?;
        name.rename("bootstrap")
    }
}

/// What stands for the id of a blob that holds the bootstrap, until it is known.
const UNNAMED: [u8; BlobId::MAX_LEN] = [b'x'; BlobId::MAX_LEN];

/// Writes the id of the blob that had none into a bootstrap with these rows: into its device slot
/// and its row of the blob table.
fn name_blob(bootstrap: &mut [u8], rows: &[BlobEntry], id: &BlobId) {
    let Some(row) = rows.iter().position(|row| row.id == UNNAMED) else { return };
    let slots = usize::try_from(DEVICE_TABLE_OFFSET).expect("a small number");
    let table = (slots + rows.len() * size_of::<DeviceSlot>()).next_multiple_of(4096);
    for at in [slots + row * size_of::<DeviceSlot>(), table + row * size_of::<BlobEntry>()] {
        bootstrap[at..at + BlobId::MAX_LEN].copy_from_slice(&id.to_padded());
    }
}

/// An output inside the source would become part of the image it is written for.
fn refuse_output_in_source(out_dir: &Path, source: &Source) -> Result<(), BuildError> {
    let Source::Directory(source_dir) = source else { return Ok(()) };
    let real = |path: &Path| -> Result<PathBuf, BuildError> {
        path.canonicalize().map_err(|source: io::Error| BuildError::Read { path: path.to_owned(), source })
    };
    // What is not there yet will be made in the first directory above it that is.
    let absolute = std::path::absolute(out_dir).map_err(|source| BuildError::Read { path: out_dir.into(), source })?;
    let above = absolute.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if real(above)?.starts_with(real(source_dir)?) {
        return Err(BuildError::OutputInSource { out: out_dir.to_owned(), source_dir: source_dir.clone() });
    }
    Ok(())
}
