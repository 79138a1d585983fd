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
use super::output::OutputFile;
use super::sparse::SparseWriter;
use crate::base::BLOCK;
use crate::blob::Check;
use crate::build::Progress;
use crate::format::rafs::DEVICE_TABLE_OFFSET;
use crate::image::ImageError;
use crate::reader::{Files, ReachError, ReadError, UnitRef, ensure_block_size, ensure_checkable};

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

/// Why no disk was made.
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
    /// Block numbers have 32 bits.
    #[error("the image takes more than 16 TiB as one disk")]
    TooLong,
}

/// Writes the image as one disk to the file `disk`, which is replaced when everything is on disk.
///
/// # Errors
/// An [`ExportError`]; nothing was replaced then.
pub fn export(
    files: &Files,
    disk: &Path,
    verity: &Verity,
    progress: &dyn Progress,
) -> Result<ExportReport, ExportError> {
    ensure_block_size(files.image())?;
    ensure_checkable(files.image(), files.maps())?;
    let placement = placement::place(files.image())?;
    let failed = |source| ExportError::Write { path: disk.to_owned(), source };
    let output = OutputFile::create(disk).map_err(failed)?;
    write_bootstrap(files, &placement, &output).map_err(failed)?;
    let data_bytes = write_devices(files, &placement, &output, progress, &failed)?;
    output.file().set_len(placement.len).map_err(failed)?;

    let verity = add_verity(&output, disk, placement.len, verity)?;
    let disk_bytes = output.file().metadata().map_err(failed)?.len();
    output.finish().map_err(failed)?;
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
            let known = map.units().iter().zip(0..).filter(|(unit, _)| unit.check != Check::Unknown);
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

/// Writes the hash tree over the first `len` bytes of the disk, if one is wanted.
fn add_verity(
    output: &OutputFile,
    disk: &Path,
    len: u64,
    verity: &Verity,
) -> Result<Option<VerityReport>, ExportError> {
    let data_blocks = len / BLOCK;
    let write = |path: &Path, tree: &OutputFile, hash_offset| {
        let root = verity::write_tree(output.file(), data_blocks, tree.file(), hash_offset);
        let root = root.map_err(|source| ExportError::Write { path: path.to_owned(), source })?;
        Ok(Some(VerityReport {
            root_hash: root.to_string(),
            hash_file: path.display().to_string(),
            hash_offset,
            data_blocks,
            hash_bytes: verity::tree_len(data_blocks),
        }))
    };
    match verity {
        Verity::None => Ok(None),
        Verity::Append => write(disk, output, len),
        Verity::File(path) => {
            let failed = |source| ExportError::Write { path: path.clone(), source };
            let tree = OutputFile::create(path).map_err(failed)?;
            let report = write(path, &tree, 0)?;
            // Before the disk, so that a disk under its name always finds its tree.
            tree.finish().map_err(failed)?;
            Ok(report)
        }
    }
}
