//! What is present, read again and checked again.
//!
//! A disk may give other bytes than were written, and nobody checks them when the kernel reads
//! them. Bytes are asked of the disk, not of the page cache, as far as the kernel lets us. A
//! spoilt unit of a blob that nobody uses becomes absent, so that it is fetched again; in one that
//! is in use it is only told, loudly, because a kernel may be reading the file without asking. It is the same with
//! copies of bootstraps, which go whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Advice;

use super::bits;
use super::device::Device;
use super::disk::FileSink;
use super::inventory::Shelved;
use super::presence::{bit, clear_bit};
use super::shelves::{Shelves, StockError};
use super::store::{StoreError, at};
use super::victims::LotKind;
use crate::base::{ByteRange, Digest};
use crate::blob::{Unit, UnitIndex, verify};
use crate::codec::Sha256;

/// What reading a blob or the copy of a bootstrap again has shown. A bootstrap is one unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VerifyReport {
    pub name: String,
    /// Units that were present, and bytes that were read.
    pub units: u32,
    pub bytes: u64,
    pub spoilt: Vec<SpoiltUnit>,
    /// Whether the spoilt ones are absent now; `false` if somebody uses them.
    pub mended: bool,
    /// Whether somebody did not want to go on, so that not everything was read.
    pub cut_short: bool,
}

/// A unit that is not what its image promises.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SpoiltUnit {
    pub unit: UnitIndex,
    /// Where it lies in the device, in bytes.
    pub start: u64,
    pub len: u64,
    /// What is wrong with it.
    pub what: String,
}

/// Where the bytes of one unit are read from.
enum Reading {
    /// A device of this process, through the descriptor that raises no events.
    Live(Arc<Device>),
    Shelved(File),
}

impl Reading {
    fn file(&self) -> Option<&File> {
        match self {
            Self::Live(device) => device.reader(),
            Self::Shelved(file) => Some(file),
        }
    }
}

impl Shelves {
    /// Reads every present unit of the blob in directory `name`, a whole name, and checks it.
    /// `go_on` is told of the bytes of each unit when it has been read; the reading ends when it
    /// says no, and when the blob goes meanwhile.
    ///
    /// The file is opened for each unit anew, and not kept open in between: whoever wants to know
    /// whether the blob is in use must not be told of us for as long as all of it takes.
    pub fn verify(&self, name: &str, go_on: &mut dyn FnMut(u64) -> bool) -> Result<VerifyReport, StockError> {
        // A file that a predecessor left marked may be denied to us, which is no fault of its bytes.
        if !self.are_uses_known() {
            return Err(StockError::UsesUnknown);
        }
        let mut report = VerifyReport { name: name.to_owned(), ..VerifyReport::default() };
        let path = self.dir(&self.whole(name)?).join("data");
        let device = self.alive().get(name).and_then(|shelf| shelf.device.upgrade());
        let (map, words) = match device {
            Some(device) => {
                // In this order: what became present after the map was looked at may not be in it.
                let words = device.snapshot();
                (device.map(), words)
            }
            None => match self.shelved(name) {
                Some(shelved) => (Arc::new(shelved.map), shelved.words),
                None => return Ok(report),
            },
        };
        let inode = fs::metadata(&path).map_err(at(&path))?.ino();
        let present = (0..).zip(map.units()).filter(|(index, _)| bit(&words, *index));
        let mut room = Vec::new();
        for (index, unit) in present {
            let blocks = unit.blocks();
            let Some(reading) = self.reading(name, inode) else {
                report.cut_short = true;
                break;
            };
            if let Some(file) = reading.file()
                && let Err(what) = check(file, unit, &mut room)
            {
                let (start, len) = (blocks.start(), blocks.len());
                report.spoilt.push(SpoiltUnit { unit: index, start, len, what });
            }
            drop(reading);
            report.units += 1;
            report.bytes += blocks.len();
            if !go_on(blocks.len()) {
                report.cut_short = true;
                break;
            }
        }
        if !report.spoilt.is_empty() {
            report.mended = self.make_absent(name, &report.spoilt)?;
            report.log();
        }
        Ok(report)
    }

    /// Reads the copy of a bootstrap with this name, and sees whether that is its digest. One that is spoilt and that
    /// nobody uses is removed: it is copied again when it is mounted. `go_on` as for blobs.
    pub fn verify_bootstrap(&self, name: &str, go_on: &mut dyn FnMut(u64) -> bool) -> Result<VerifyReport, StockError> {
        // One that a superblock of a predecessor has mounted must be known as in use.
        if !self.are_uses_known() {
            return Err(StockError::UsesUnknown);
        }
        let bootstraps = self.bootstraps();
        let unknown = || StockError::Unknown(name.to_owned());
        let digest = Digest::from_hex(name).ok_or_else(unknown)?;
        let path = bootstraps.dir().join(digest.to_string());
        let inode = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(unknown()),
            meta => meta.map_err(at(&path))?.ino(),
        };
        let mut report = VerifyReport { name: name.to_owned(), units: 1, ..VerifyReport::default() };
        let found = digest_on_disk(&path, inode, |bytes| {
            report.bytes += bytes;
            go_on(bytes)
        });
        let what = match found {
            Ok(None) => {
                report.cut_short = true;
                return Ok(report);
            }
            Ok(Some(found)) if found == digest => return Ok(report),
            Ok(Some(found)) => format!("its digest is {found}"),
            Err(error) => error.to_string(),
        };
        report.spoilt.push(SpoiltUnit { unit: 0, start: 0, len: report.bytes, what });
        report.mended = bootstraps.remove(name)?;
        report.log();
        Ok(report)
    }

    /// The data file of directory `name`, if it is still the one with this inode.
    fn reading(&self, name: &str, inode: u64) -> Option<Reading> {
        let alive = self.alive();
        let device = alive.get(name).and_then(|shelf| shelf.device.upgrade());
        let reading = match device {
            Some(device) => Reading::Live(device),
            // Opened under the lock that devices are opened under, and so before anybody can mark
            // it, or else the reading would ask this very process.
            None => Reading::Shelved(File::open(self.dir(name).join("data")).ok()?),
        };
        drop(alive);
        let same = reading.file().is_some_and(|file| file.metadata().is_ok_and(|meta| meta.ino() == inode));
        same.then_some(reading)
    }

    fn whole(&self, name: &str) -> Result<String, StockError> {
        self.find(name).ok().filter(|found| found == name).ok_or_else(|| StockError::Unknown(name.to_owned()))
    }

    /// Makes units absent in a blob that nobody uses, durably; `false` if somebody does.
    fn make_absent(&self, name: &str, spoilt: &[SpoiltUnit]) -> Result<bool, StoreError> {
        let alive = self.alive();
        if self.is_used(&alive, name) {
            return Ok(false);
        }
        let dir = self.dir(name);
        self.twins.forget(&dir.join("data"));
        let Some(Shelved { words: before, identity, .. }) = self.shelved(name) else { return Ok(true) };
        let mut after = before.clone();
        spoilt.iter().for_each(|spoilt| clear_bit(&mut after, spoilt.unit));
        let path = dir.join("present");
        let present = OpenOptions::new().write(true).open(&path).map_err(at(&path))?;
        bits::write_changed(&FileSink::new(present), &identity, &before, &after).map_err(at(&path))?;
        Ok(true)
    }
}

impl VerifyReport {
    fn log(&self) {
        for SpoiltUnit { unit, start, len, what } in &self.spoilt {
            let name = &self.name;
            if self.mended {
                tracing::error!(name, unit, start, len, what, "a unit is spoilt on disk; it will be brought again");
            } else {
                tracing::error!(
                    name,
                    unit,
                    start,
                    len,
                    what,
                    "a unit is spoilt on disk and its blob in use: readers may see wrong bytes; unmount it and verify again"
                );
            }
        }
    }
}

/// Reads the blocks of a unit from the disk and checks them.
fn check(file: &File, unit: &Unit, room: &mut Vec<u8>) -> Result<(), String> {
    let blocks = unit.blocks();
    room.resize(usize::try_from(blocks.len()).expect("a unit has at most 16 MiB"), 0);
    // Only pages that are clean and unused go: a hint, before, not to be told what is in memory,
    // and afterwards, not to leave there what nobody asked for.
    forget_pages(file, blocks);
    let read = file.read_exact_at(room, blocks.start());
    forget_pages(file, blocks);
    read.map_err(|error| error.to_string())?;
    check_blocks(unit, room)
}

/// Checks the `blocks` of a unit, the padding too.
pub(super) fn check_blocks(unit: &Unit, blocks: &[u8]) -> Result<(), String> {
    let (plain, padding) = blocks.split_at(usize::try_from(unit.decoded.len()).expect("a unit has at most 16 MiB"));
    verify(&unit.check, plain).map_err(|error| error.to_string())?;
    if padding.iter().any(|&byte| byte != 0) {
        return Err("the bytes behind its end are not zero".to_owned());
    }
    Ok(())
}

fn forget_pages(file: &File, range: ByteRange) {
    let len = std::num::NonZeroU64::new(range.len());
    let _ = rustix::fs::fadvise(file, range.start(), len, Advice::DontNeed);
}

/// SHA-256 of a file as it is on the disk; `None` if `go_on` said no, or if it is not the one with this inode any more.
/// Opened for each piece anew, as blobs are for each unit: it must not be in use for as long as all of it takes.
fn digest_on_disk(path: &Path, inode: u64, mut go_on: impl FnMut(u64) -> bool) -> io::Result<Option<Digest>> {
    const PIECE: usize = 1 << 20;
    let (mut hasher, mut room, mut start) = (Sha256::new(), vec![0; PIECE], 0);
    loop {
        let piece = ByteRange::new(start, start + PIECE as u64).unwrap_or_default();
        let file = File::open(path)?;
        if file.metadata()?.ino() != inode {
            return Ok(None);
        }
        forget_pages(&file, piece);
        let len = file.read_at(&mut room, start)?;
        if len == 0 {
            return Ok(Some(hasher.finish()));
        }
        forget_pages(&file, piece);
        drop(file);
        hasher.update(&room[..len]);
        start += len as u64;
        if !go_on(len as u64) {
            return Ok(None);
        }
    }
}

/// When something was last verified, if that is noted.
pub(super) fn noted(shelves: &Shelves, kind: LotKind, name: &str) -> Option<u64> {
    super::inventory::changed(&verified(shelves, kind, name)?)
}

/// Notes that all of it was verified now.
pub(super) fn note(shelves: &Shelves, kind: LotKind, name: &str) {
    // It may have gone since; the note must not bring a rest of it back.
    let is_there = match kind {
        LotKind::Blob => fs::metadata(shelves.dir(name)).is_ok(),
        LotKind::Bootstrap => shelves.bootstraps().has(name),
        LotKind::Kernel => false,
    };
    if let Some(note) = verified(shelves, kind, name).filter(|_| is_there) {
        super::shelves::stamp(&note);
    }
}

/// Where it is noted; nowhere for what the kernel keeps, which is not ours to read.
fn verified(shelves: &Shelves, kind: LotKind, name: &str) -> Option<PathBuf> {
    Some(match kind {
        LotKind::Blob => shelves.dir(name).join(VERIFIED),
        LotKind::Bootstrap => super::bootstraps::verified(&shelves.bootstraps().dir().join(name)),
        LotKind::Kernel => return None,
    })
}

/// Its time of change is when the blob was last verified from end to end.
const VERIFIED: &str = "verified";
