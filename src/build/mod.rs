//! From a directory or a tar archive to a RAFS v6 image: a bootstrap and at most one blob.
//!
//! An input (`input`) walks the source once. It puts entries into the `tree` and file content
//! into the `chunk` pipeline, whose far end is the `blobwriter`. Then `layout` gives every
//! node a place and `emit` writes the bootstrap. At last `verify` reads it all again. Nothing here
//! reads the clock, asks for the order of a directory or depends on the number of threads: the
//! same source gives the same bytes. Nothing here prints; who wants to watch passes a [`Progress`].
//!
//! Memory grows with the number of entries and chunks, not with the size of files.

mod blobparts;
mod blobtable;
mod blobwriter;
mod chunk;
mod emit;
mod error;
mod input;
mod layout;
mod pattern;
mod prefetch;
mod report;
mod selection;
mod spec;
mod tree;
mod verify;
mod xattr;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub use chunk::{Compression, InvalidCompression};
pub use error::{BuildError, Limit, Unfit};
pub use pattern::{InvalidPattern, Pattern};
pub use prefetch::{MAX_HINTS, PrefetchHints};
pub use report::{BlobReport, BuildReport};
pub use selection::{IdRange, InvalidIdRange, Owners, Selection, Whiteouts};
pub use spec::{Batching, BuildSpec, Encryption, Progress, Source};
pub use verify::VerifyError;

use crate::base::BlobId;
use crate::format::erofs::DeviceSlot;
use crate::format::rafs::{BlobEntry, DEVICE_TABLE_OFFSET};
use blobwriter::{BlobWriter, FinishedBlob, SealedBlob, Shape, TemporaryName};
use chunk::{Packer, Settings, Stored};
use emit::{Bootstrap, Facts};
use layout::Layout;
use verify::Expected;

/// Builds an image. What had the same names in the output directory is replaced, and only when
/// the image is complete, checked and on disk; a failed build leaves nothing behind but empty
/// directories.
///
/// # Errors
/// A [`BuildError`] that names the entry or file at fault.
pub fn build(spec: BuildSpec, progress: &dyn Progress) -> Result<BuildReport, BuildError> {
    let (settings, shape) = settings(&spec)?;
    let blobs = spec.out_dir.join("blobs");
    fs::create_dir_all(&blobs).map_err(|source| BuildError::Write { path: blobs.clone(), source })?;
    refuse_output_in_source(&spec)?;

    let blob = BlobWriter::new(blobs.clone(), shape.clone());
    let (selection, hints) = (&spec.selection, &spec.prefetch);
    let (read, stored) = chunk::run(&settings, blob, progress, |cutter| match spec.source {
        Source::Directory(path) => input::directory(&path, selection, hints, cutter, progress),
        Source::Archive { name, stream } => input::archive(&name, stream, selection, cutter, progress),
    })?;

    let layout = layout::layout(&read.tree, shape.chunk_size)?;
    let prefetch = spec.prefetch.listed(&read.tree);
    let Stored { blob, mut packer, chunk_of_cut, deduplicated_bytes } = stored;
    let writing = Writing {
        read: &read,
        layout: &layout,
        shape: &shape,
        chunk_of_cut: &chunk_of_cut,
        prefetch: &prefetch,
        explicit_ids: spec.selection.owners != Owners::Omitted,
    };
    let mut made = writing.write(blob, &mut packer)?;

    if spec.verify {
        progress.verifying(made.blob.as_ref().map(FinishedBlob::temporary_path));
        verify::image(made.readable_bootstrap(), &writing.expected(&made), made.blob.as_ref(), spec.threads)?;
    }
    let mut report = report::count(&read.tree);
    report.deduplicated_bytes = deduplicated_bytes;
    report.hole_bytes = read.hole_bytes;
    report.skipped_xattrs = read.skipped_xattrs;
    report.gzip_bytes = read.gzip_bytes;
    report.encrypted = shape.key.is_some() && made.blob.is_some();
    report.prefetch_entries = if made.blob.is_some() { prefetch.len() as u64 } else { 0 };
    report.verified = spec.verify;
    made.describe(&spec.out_dir, &blobs, &mut report);
    made.publish(&spec.out_dir)?;
    Ok(report)
}

/// What the stages of a build are told, if it is possible at all.
fn settings(spec: &BuildSpec) -> Result<(Settings, Shape), BuildError> {
    let chunk_size = spec.checked_chunk_size()?;
    let key = spec.encryption.key()?;
    let shape = Shape {
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
        workers: spec.threads,
    };
    Ok((settings, shape))
}

/// What a bootstrap is written from when the source has been read.
struct Writing<'a> {
    read: &'a input::Read,
    layout: &'a Layout,
    shape: &'a Shape,
    chunk_of_cut: &'a [u32],
    prefetch: &'a [tree::NodeId],
    explicit_ids: bool,
}

impl Writing<'_> {
    /// Completes the blob and writes the bootstrap. One that lies in the blob is written first and
    /// does not know the blob's id, which depends on it.
    fn write(&self, blob: BlobWriter, packer: &mut Packer) -> Result<Made, BuildError> {
        let Some(sealed) = blob.seal(packer)? else {
            return Ok(Made { bootstrap: self.bootstrap(None, &[])?, blob: None, inline: false });
        };
        if self.shape.inline_bootstrap {
            let bootstrap = self.bootstrap(sealed.entry(), &sealed.chunks)?;
            let blob = SealedBlob::finish(sealed, Some(&bootstrap))?;
            return Ok(Made { bootstrap, blob: Some(blob), inline: true });
        }
        let blob = sealed.finish(None)?;
        Ok(Made { bootstrap: self.bootstrap(blob.entry, &blob.chunks)?, blob: Some(blob), inline: false })
    }

    fn bootstrap(&self, entry: Option<BlobEntry>, chunks: &[chunk::Chunk]) -> Result<Vec<u8>, BuildError> {
        let bootstrap = Bootstrap {
            tree: &self.read.tree,
            layout: self.layout,
            blobs: entry.as_slice(),
            chunks,
            chunk_of_cut: self.chunk_of_cut,
            prefetch: self.prefetch,
            facts: Facts {
                compression: self.shape.compression,
                digest: self.shape.digest,
                chunk_size: self.shape.chunk_size,
                explicit_ids: self.explicit_ids,
            },
        };
        bootstrap.bytes()
    }

    fn expected<'e>(&'e self, made: &'e Made) -> Expected<'e> {
        Expected {
            tree: &self.read.tree,
            layout: self.layout,
            chunks: made.blob.as_ref().map_or(&[], |blob| &blob.chunks),
            chunk_of_cut: self.chunk_of_cut,
            digest: self.shape.digest,
        }
    }
}

/// An image that nobody knows of yet.
struct Made {
    bootstrap: Vec<u8>,
    blob: Option<FinishedBlob>,
    /// Whether the bootstrap lies in the blob.
    inline: bool,
}

impl Made {
    /// The bootstrap as readers see it: one out of a blob gets the blob's id from the name of the
    /// file (`blob.md` section 8).
    fn readable_bootstrap(&self) -> Vec<u8> {
        let mut bytes = self.bootstrap.clone();
        if let Some(FinishedBlob { id, entry: Some(_), .. }) = self.blob.as_ref().filter(|_| self.inline) {
            name_blob(&mut bytes, id);
        }
        bytes
    }

    fn describe(&self, out_dir: &Path, blobs: &Path, report: &mut BuildReport) {
        let path = |blob: &FinishedBlob| blobs.join(blob.id.as_str()).display().to_string();
        report.bootstrap = match &self.blob {
            Some(blob) if self.inline => path(blob),
            _ => out_dir.join("bootstrap").display().to_string(),
        };
        report.bootstrap_in_blob = self.inline;
        report.bootstrap_bytes = self.bootstrap.len() as u64;
        report.blobs.extend(self.blob.as_ref().map(|blob| BlobReport {
            id: blob.id.to_string(),
            path: path(blob),
            stored_bytes: blob.stored_bytes,
            decoded_bytes: blob.decoded_bytes,
            chunks: blob.chunks.len() as u64,
            batches: blob.batches,
        }));
    }

    /// Writes the bootstrap and gives both files their names, the blob first: a bootstrap under
    /// its own name always finds its blob.
    fn publish(&mut self, out_dir: &Path) -> Result<(), BuildError> {
        if self.inline {
            return self.blob.as_mut().map_or(Ok(()), FinishedBlob::publish);
        }
        let (mut file, mut name) = TemporaryName::create(out_dir)?;
        let written = file.write_all(&self.bootstrap).and_then(|()| file.sync_all());
        written.map_err(|source| BuildError::Write { path: name.path.clone(), source })?;
        if let Some(blob) = &mut self.blob {
            blob.publish()?;
        }
        name.rename("bootstrap")
    }
}

/// Writes the id of its only blob into a bootstrap: into the device slot and the blob table.
fn name_blob(bootstrap: &mut [u8], id: &BlobId) {
    let device = usize::try_from(DEVICE_TABLE_OFFSET).expect("a small number");
    let table = (device + size_of::<DeviceSlot>()).next_multiple_of(4096);
    for at in [device, table] {
        bootstrap[at..at + BlobId::MAX_LEN].copy_from_slice(&id.to_padded());
    }
}

/// An output inside the source would become part of the image it is written for.
fn refuse_output_in_source(spec: &BuildSpec) -> Result<(), BuildError> {
    let Source::Directory(source_dir) = &spec.source else { return Ok(()) };
    let real = |path: &Path| -> Result<PathBuf, BuildError> {
        path.canonicalize().map_err(|source: io::Error| BuildError::Read { path: path.to_owned(), source })
    };
    if real(&spec.out_dir)?.starts_with(real(source_dir)?) {
        return Err(BuildError::OutputInSource { out: spec.out_dir.clone(), source_dir: source_dir.clone() });
    }
    Ok(())
}
