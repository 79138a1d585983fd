//! From a directory or a tar archive to a RAFS v6 image: a bootstrap and at most one blob.
//!
//! An input (`input`) walks the source once. It puts entries into the `tree` and file content
//! into the `chunk` pipeline, whose far end is the `blobwriter`. Then `layout` gives every
//! node a place and `emit` writes the bootstrap. Nothing here reads the clock, asks for the
//! order of a directory or depends on the number of threads: the same source gives the same
//! bytes. Nothing here prints; who wants to watch passes a [`Progress`].
//!
//! Memory grows with the number of entries and chunks, not with the size of files.

mod blobwriter;
mod chunk;
mod emit;
mod error;
mod input;
mod layout;
mod tree;
mod xattr;

use std::fs;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use chunk::{Compression, InvalidCompression};
pub use error::{BuildError, Limit, Unfit};

use crate::format::rafs::DigestAlgorithm;
use blobwriter::{BlobWriter, TemporaryName};
use chunk::Settings;
use emit::Bootstrap;
use tree::{Kind, Tree};

/// What an image is made from.
pub enum Source {
    /// A directory with everything below it.
    Directory(PathBuf),
    /// A tar archive, plain or gzip; which one is found out from its first bytes.
    Archive {
        /// Named in errors only.
        name: PathBuf,
        stream: Box<dyn Read>,
    },
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(path) => f.debug_tuple("Directory").field(path).finish(),
            Self::Archive { name, .. } => f.debug_struct("Archive").field("name", name).finish_non_exhaustive(),
        }
    }
}

impl Source {
    /// The directory or archive at `path`.
    pub fn open(path: &Path) -> Result<Self, BuildError> {
        let read = |source| BuildError::Read { path: path.to_owned(), source };
        let meta = fs::metadata(path).map_err(read)?;
        if meta.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        if !meta.is_file() {
            let what = "neither a directory nor a regular file; an archive from elsewhere goes through standard input";
            return Err(read(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        let stream = Box::new(fs::File::open(path).map_err(read)?);
        Ok(Self::Archive { name: path.to_owned(), stream })
    }
}

/// What to build, and how.
#[derive(Debug)]
pub struct BuildSpec {
    pub source: Source,
    /// Made if it is not there. Gets `bootstrap` and `blobs/`.
    pub out_dir: PathBuf,
    pub compression: Compression,
    pub digest: DigestAlgorithm,
    /// Bytes: a power of two between 4 KiB and 16 MiB.
    pub chunk_size: u64,
    /// Threads that compress. One more reads and one writes. The image does not depend on it.
    pub threads: NonZeroUsize,
}

impl BuildSpec {
    /// 1 MiB, the default of the format.
    pub const DEFAULT_CHUNK_SIZE: u64 = 1 << 20;
}

/// Somebody who watches a build. Called from the thread that called [`build`].
pub trait Progress {
    /// Whether [`Progress::total`] is worth a walk through the source before the build.
    fn wants_total(&self) -> bool {
        false
    }

    /// How much there is to do; called at most once, before anything advances.
    fn total(&self, _entries: u64, _bytes: u64) {}

    /// So many entries and bytes of content have been read since the last call.
    fn advance(&self, _entries: u64, _bytes: u64) {}
}

/// Nobody watches.
impl Progress for () {}

/// What was made. The same for every build of the same source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BuildReport {
    /// Path of the bootstrap.
    pub bootstrap: String,
    /// Length of the bootstrap.
    pub bootstrap_bytes: u64,
    /// At most one; none if no file has content.
    pub blobs: Vec<BlobReport>,
    pub directories: u64,
    /// Regular files by content: a file with several names counts once.
    pub files: u64,
    pub symlinks: u64,
    /// Devices, FIFOs and sockets.
    pub specials: u64,
    /// Names beyond the first of their files.
    pub hard_links: u64,
    /// Bytes of all regular files, each counted once.
    pub source_bytes: u64,
    /// Of these, bytes whose chunk was stored already.
    pub deduplicated_bytes: u64,
    /// Of these, bytes in holes of sparse files, which were not even read.
    pub hole_bytes: u64,
    /// Xattrs left out because the format has no place for their namespace.
    pub skipped_xattrs: u64,
}

/// One blob of a [`BuildReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlobReport {
    /// SHA-256 of the file.
    pub id: String,
    /// Path of the file.
    pub path: String,
    /// Length of the file.
    pub stored_bytes: u64,
    /// Length of the device it expands to.
    pub decoded_bytes: u64,
    pub chunks: u64,
}

/// Builds an image. What had the same names in the output directory is replaced, and only when
/// the image is complete and on disk; a failed build leaves nothing behind but empty directories.
///
/// # Errors
/// A [`BuildError`] that names the entry or file at fault.
pub fn build(spec: BuildSpec, progress: &dyn Progress) -> Result<BuildReport, BuildError> {
    let chunk_size = u32::try_from(spec.chunk_size)
        .ok()
        .filter(|size| size.is_power_of_two() && (1 << 12..=1 << 24).contains(size))
        .ok_or(BuildError::ChunkSize(spec.chunk_size))?;
    let settings = Settings { compression: spec.compression, digest: spec.digest, chunk_size, workers: spec.threads };
    let blobs = spec.out_dir.join("blobs");
    fs::create_dir_all(&blobs).map_err(|source| BuildError::Write { path: blobs.clone(), source })?;
    refuse_output_in_source(&spec)?;

    let blob = BlobWriter::new(blobs.clone());
    let (read, stored) = chunk::run(settings, blob, progress, |cutter| match spec.source {
        Source::Directory(path) => input::directory(&path, cutter, progress),
        Source::Archive { name, stream } => input::archive(&name, stream, cutter, progress),
    })?;

    let mut compressor = spec.compression.compressor().map_err(BuildError::Compressor)?;
    let mut blob = stored.blob.finish(spec.compression.algorithm(), &mut compressor)?;
    let layout = layout::layout(&read.tree, chunk_size)?;
    let bootstrap = Bootstrap {
        tree: &read.tree,
        layout: &layout,
        blob: blob.as_ref(),
        chunk_of_cut: &stored.chunk_of_cut,
        settings,
    };
    let bytes = bootstrap.bytes()?;

    let mut report = count(&read.tree);
    report.deduplicated_bytes = stored.deduplicated_bytes;
    report.hole_bytes = read.hole_bytes;
    report.skipped_xattrs = read.skipped_xattrs;
    report.bootstrap = spec.out_dir.join("bootstrap").display().to_string();
    report.bootstrap_bytes = bytes.len() as u64;
    report.blobs.extend(blob.as_ref().map(|blob| BlobReport {
        id: blob.id.to_string(),
        path: blobs.join(blob.id.as_str()).display().to_string(),
        stored_bytes: blob.stored_bytes,
        decoded_bytes: blob.decoded_bytes,
        chunks: blob.chunks.len() as u64,
    }));
    publish(&spec.out_dir, blob.as_mut(), &bytes)?;
    Ok(report)
}

/// Reads an archive as [`build`] does and lays out the image, but stores nothing. Entry point of the
/// fuzz target: content is read in chunks of 4 KiB, of which there may be few.
///
/// # Errors
/// As [`build`].
#[doc(hidden)]
pub fn read_archive(bytes: Vec<u8>) -> Result<BuildReport, BuildError> {
    const CHUNK_SIZE: u32 = 4096;
    let stream = Box::new(io::Cursor::new(bytes));
    let read = chunk::rehearse(CHUNK_SIZE, |cutter| input::archive(Path::new("archive"), stream, cutter, &()))?;
    layout::layout(&read.tree, CHUNK_SIZE)?;
    let mut report = count(&read.tree);
    report.hole_bytes = read.hole_bytes;
    report.skipped_xattrs = read.skipped_xattrs;
    Ok(report)
}

/// Writes the bootstrap and gives both files their names, the blob first: a bootstrap under its
/// own name always finds its blob.
fn publish(out_dir: &Path, blob: Option<&mut blobwriter::FinishedBlob>, bootstrap: &[u8]) -> Result<(), BuildError> {
    let (mut file, mut name) = TemporaryName::create(out_dir)?;
    let written = file.write_all(bootstrap).and_then(|()| file.sync_all());
    written.map_err(|source| BuildError::Write { path: name.path.clone(), source })?;
    if let Some(blob) = blob {
        blob.publish()?;
    }
    name.rename("bootstrap")
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

/// The part of the report that follows from the tree.
fn count(tree: &Tree) -> BuildReport {
    let mut report = BuildReport::default();
    let mut met = vec![false; tree.len()];
    let walked = tree.walk(|id| {
        if std::mem::replace(&mut met[id.index()], true) {
            report.hard_links += 1;
            return Ok(());
        }
        match &tree.node(id).kind {
            Kind::Directory(_) => report.directories += 1,
            Kind::Regular(content) => {
                report.files += 1;
                report.source_bytes += content.size;
            }
            Kind::Symlink(_) => report.symlinks += 1,
            Kind::Character(_) | Kind::Block(_) | Kind::Fifo | Kind::Socket => report.specials += 1,
        }
        Ok::<(), std::convert::Infallible>(())
    });
    let Ok(()) = walked;
    report
}
