//! An image as one disk that the kernel mounts alone: the bootstrap, and every device where the
//! bootstrap expects it (`rafs-v6.md` section 14).
//!
//! Only checked units are written, and only where they are not zero: everything else is a hole.

mod placement;
mod verity;

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use self::placement::Placement;
use super::output::{OutputFile, is_same_place};
use super::sparse::SparseWriter;
use crate::base::BLOCK;
use crate::build::Progress;
use crate::format::rafs::DEVICE_TABLE_OFFSET;
use crate::image::ImageError;
use crate::reader::{Files, ReachError, ReadError, UnitRef, ensure_checkable};

/// Where the dm-verity tree of a disk goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verity {
    /// There is none.
    None,
    /// Behind the data, on the same disk.
    Append,
    /// Into a file of its own.
    File(PathBuf),
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// Path of the disk.
    pub disk: String,
    /// Length of the disk in bytes, holes and hash tree included.
    pub disk_bytes: u64,
    /// Bytes of units that were written; the blocks of zeros in them are holes.
    pub data_bytes: u64,
    pub devices: u64,
    /// Whether the image did not say where its devices belong, so that its copy was changed.
    pub is_placed_anew: bool,
    pub verity: Option<VerityReport>,
}

/// What `veritysetup open --no-superblock --salt=-` wants to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerityReport {
    /// SHA-256, hexadecimal.
    pub root_hash: String,
    /// Path of the file that holds the tree.
    pub hash_file: String,
    /// First byte of the tree in it.
    pub hash_offset: u64,
    /// Blocks of 4096 bytes that the tree covers.
    pub data_blocks: u64,
    pub hash_bytes: u64,
}

/// Why an image was not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The bootstrap makes no sense.
    #[error("the image is damaged")]
    Image(#[source] ImageError),
    /// A file leads where nothing can be checked.
    #[error(transparent)]
    Reach(#[from] ReachError),
    /// A unit could not be had.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The disk or the hash tree could not be written.
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    /// One file cannot be both.
    #[error("{} cannot be the disk and its hash tree; `append` puts the tree behind the data", path.display())]
    SameFile { path: PathBuf },
    /// The disk is new, and the file for its hash tree is what it was.
    #[error("{} was replaced, but its hash tree is not at {}", disk.display(), path.display())]
    HashTree { disk: PathBuf, path: PathBuf, source: io::Error },
    /// Block numbers have 32 bits.
    #[error("the image takes more than 16 TiB as one disk")]
    TooLong,
}

/// Writes the image as one disk to the file `disk`, which is replaced when everything is on disk.
/// A hash tree in a file of its own replaces that file right after.
///
/// # Errors
/// An [`ExportError`]; nothing was replaced then, unless it is [`ExportError::HashTree`].
pub fn export(
    files: &Files,
    disk: &Path,
    verity: &Verity,
    progress: &dyn Progress,
) -> Result<ExportReport, ExportError> {
    ensure_checkable(files.image(), files.maps())?;
    let placement = placement::place(files.image())?;
    let failed = |source| ExportError::Write { path: disk.to_owned(), source };
    let apart = hash_file(disk, verity)?;
    let output = OutputFile::create(disk).map_err(failed)?;
    write_bootstrap(files, &placement, &output).map_err(failed)?;
    let data_bytes = write_devices(files, &placement, &output, progress, &failed)?;
    output.file().set_len(placement.len).map_err(failed)?;

    let verity = match (&apart, verity) {
        (Some((path, tree)), _) => Some(write_tree(&output, placement.len, tree, path, 0)?),
        (None, Verity::Append) => Some(write_tree(&output, placement.len, &output, disk, placement.len)?),
        (None, _) => None,
    };
    let disk_bytes = output.file().metadata().map_err(failed)?.len();
    if let Some((path, tree)) = &apart {
        // What can fail for want of room does so before anything is replaced.
        let synced = tree.file().sync_all();
        synced.map_err(|source| ExportError::Write { path: (*path).to_owned(), source })?;
    }
    output.finish().map_err(failed)?;
    if let Some((path, tree)) = apart {
        let put = tree.finish();
        put.map_err(|source| ExportError::HashTree { disk: disk.to_owned(), path: path.to_owned(), source })?;
    }
    Ok(ExportReport {
        disk: disk.display().to_string(),
        disk_bytes,
        data_bytes,
        devices: placement.devices.len() as u64,
        is_placed_anew: placement.table.is_some_and(|table| !table.is_empty()),
        verity,
    })
}

fn write_bootstrap(files: &Files, placement: &Placement, output: &OutputFile) -> io::Result<()> {
    output.file().write_all_at(files.image().bytes(), 0)?;
    if let Some(table) = &placement.table {
        output.file().write_all_at(table, DEVICE_TABLE_OFFSET)?;
    }
    Ok(())
}

/// Writes every unit that can be checked; no file leads to another one. Gives back their bytes.
fn write_devices(
    files: &Files,
    placement: &Placement,
    output: &OutputFile,
    progress: &dyn Progress,
    failed: &dyn Fn(io::Error) -> ExportError,
) -> Result<u64, ExportError> {
    let wanted = || {
        files.maps().iter().enumerate().flat_map(|(device, map)| {
            let known = map.units().iter().zip(0..).filter(|(unit, _)| unit.is_checkable());
            known.map(move |(unit, index)| (UnitRef { device, index }, unit))
        })
    };
    if progress.wants_total() {
        progress.total(0, wanted().map(|(_, unit)| unit.decoded.len()).sum());
    }
    let mut units = files.units(Box::new(wanted().map(|(unit, _)| unit)));
    let mut total = 0;
    for (at, unit) in wanted() {
        let place = placement.devices[at.device];
        let bytes = units.unit(at)?;
        // What lies behind the end of the device is of no use to the kernel, and in the way of the
        // next one.
        let room = place.len().saturating_sub(unit.decoded.start()).min(bytes.len() as u64);
        let bytes = &bytes[..usize::try_from(room).expect("at most a unit")];
        let start = place.start() + unit.decoded.start();
        SparseWriter::new(output.file(), start).write(bytes).map_err(failed)?;
        total += unit.decoded.len();
        progress.advance(0, unit.decoded.len());
    }
    Ok(total)
}

/// Writes the hash tree over the first `len` bytes of `output` to `tree`, from byte `hash_offset`.
fn write_tree(
    output: &OutputFile,
    len: u64,
    tree: &OutputFile,
    path: &Path,
    hash_offset: u64,
) -> Result<VerityReport, ExportError> {
    let data_blocks = len / BLOCK;
    let root = verity::write_tree(output.file(), data_blocks, tree.file(), hash_offset);
    let root = root.map_err(|source| ExportError::Write { path: path.to_owned(), source })?;
    Ok(VerityReport {
        root_hash: root.to_string(),
        hash_file: path.display().to_string(),
        hash_offset,
        data_blocks,
        hash_bytes: verity::tree_len(data_blocks),
    })
}

/// Makes the file for the hash tree, if it is to have one of its own.
fn hash_file<'v>(disk: &Path, verity: &'v Verity) -> Result<Option<(&'v Path, OutputFile)>, ExportError> {
    let Verity::File(path) = verity else { return Ok(None) };
    let failed = |source| ExportError::Write { path: path.clone(), source };
    if is_same_place(disk, path) {
        return Err(ExportError::SameFile { path: path.clone() });
    }
    Ok(Some((path, OutputFile::create(path).map_err(failed)?)))
}
