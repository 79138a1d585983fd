//! Whether an image is whole: its metadata, and if asked for, the tables and data of its blobs.
//!
//! Data is read in the order in which it is stored, in pieces of bounded size, and dropped as soon
//! as it has been checked: memory does not grow with the blobs.

pub mod v5;

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;
use tokio::runtime::Handle;

use crate::base::{BLOCK, BlobId, ByteRange, Chain, Class};
use crate::blob::{BlobKind, BlobTables, TablesError, Unit};
use crate::build::Progress;
use crate::image::check::{self, Code};
use crate::image::{Device, Image};
use crate::reader::tarfile::{self, TarFileError};
use crate::reader::{Mapped, ensure_checkable};
use crate::source::{BlobSource, ReadCtx, SourceError};

/// How long one read may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// Bytes read at once, unless a single chunk is longer.
const PIECE: u64 = 4 << 20;

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Depth {
    /// At the bootstrap alone.
    Meta,
    /// At the tables of each blob as well.
    Blob,
    /// At every chunk as well: all data is read and decoded.
    Data,
}

/// What a check found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub depth: Depth,
    #[serde(flatten)]
    pub found: check::Report,
    /// Blobs that were looked at; none at [`Depth::Meta`].
    pub blobs: Vec<BlobReport>,
}

impl Report {
    /// The report on a bootstrap alone.
    pub fn of_metadata(found: check::Report) -> Self {
        Self { depth: Depth::Meta, found, blobs: Vec::new() }
    }

    /// Whether some blob could not be looked at.
    pub fn is_partial(&self) -> bool {
        self.blobs.iter().any(|blob| blob.unchecked.is_some())
    }
}

/// What was seen of one blob.
#[derive(Clone, Debug, Serialize)]
pub struct BlobReport {
    pub id: String,
    /// Chunks in the blob's own table.
    pub chunks: u64,
    /// Chunks that were decoded to what the image promises.
    pub verified: u64,
    /// Chunks for which nobody promises anything, because no file of this image uses them.
    pub unpromised: u64,
    /// Stored bytes that were read and decoded.
    pub stored_bytes: u64,
    /// Decoded bytes that were checked.
    pub decoded_bytes: u64,
    /// Why the blob was not looked at, if it was not.
    pub unchecked: Option<String>,
}

/// Why a check could not be finished. What is wrong with the image is in the [`Report`] instead.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CheckError {
    /// Blobs are to be looked at, and nobody said where they are.
    #[error("the depth {0:?} needs the blobs, and no source of them was given")]
    NoSource(Depth),
    /// The source failed in a way that says nothing about the blob.
    #[error("cannot read blob {blob}")]
    Source {
        blob: BlobId,
        #[source]
        cause: SourceError,
    },
}

/// Checks `image` down to `depth`. Blocks; runs its fetches on `runtime`.
pub fn check(
    image: &Image,
    depth: Depth,
    source: Option<&dyn BlobSource>,
    runtime: &Handle,
    progress: &dyn Progress,
) -> Result<Report, CheckError> {
    let mut report = Report { depth, ..Report::of_metadata(check::check(image)) };
    if depth == Depth::Meta {
        return Ok(report);
    }
    let fetch = Fetch { source: source.ok_or(CheckError::NoSource(depth))?, runtime };
    let mut blobs = Vec::new();
    for device in image.devices() {
        blobs.push(tables(image, device, &fetch, &mut report)?);
    }
    // Only where everything else is well: a blob that is missing or damaged says enough.
    if report.found.is_sound() && !report.is_partial() && image.summary().block_size == BLOCK {
        let all = blobs.iter().map(|mapped| mapped.as_ref().map(|mapped| mapped.map.clone()));
        if let Some(Err(cause)) = all.collect::<Option<Vec<_>>>().map(|all| ensure_checkable(image, &all)) {
            report.found.add(Code::Uncheckable, "image", || Chain(&cause).to_string());
        }
    }
    if depth == Depth::Blob {
        return Ok(report);
    }
    progress.total(0, blobs.iter().flatten().map(|mapped| bytes_of(promised(mapped).iter().copied())).sum());
    for (number, mapped) in blobs.iter().enumerate() {
        let Some(mapped) = mapped else { continue };
        match mapped.kind {
            _ if report.blobs[number].unchecked.is_some() => {}
            BlobKind::Tarfs => tar(mapped, number, &fetch, &mut report, progress)?,
            _ => data(mapped, number, &fetch, &mut report, progress)?,
        }
    }
    Ok(report)
}

/// The units of a blob that somebody promises something about, with their numbers, in the order in
/// which they are stored. Of a plain tar layer these are all: its name is the promise.
fn promised(mapped: &Mapped) -> Vec<(usize, &Unit)> {
    let is_promised = |unit: &Unit| mapped.kind == BlobKind::Tarfs || unit.is_checkable();
    let mut units: Vec<_> = mapped.map.units().iter().enumerate().filter(|(_, unit)| is_promised(unit)).collect();
    units.sort_by_key(|(_, unit)| (unit.stored.start(), unit.stored.end()));
    units
}

/// Stored bytes of `units`, in the order of [`promised`]: what several of them share counts once.
fn bytes_of<'a>(units: impl Iterator<Item = (usize, &'a Unit)>) -> u64 {
    let mut last = ByteRange::default();
    let bytes = units.map(|(_, unit)| {
        let is_shared = unit.part.is_some() && unit.stored == last;
        last = unit.stored;
        if is_shared { 0 } else { unit.stored.len() }
    });
    bytes.sum()
}

/// Reads of one source, waited for.
struct Fetch<'a> {
    source: &'a dyn BlobSource,
    runtime: &'a Handle,
}

impl Fetch<'_> {
    /// The tables of a blob, or `None` if they are not where the image says.
    fn tables(&self, tables: &BlobTables) -> Result<Option<Bytes>, CheckError> {
        if tables.stored().is_empty() { Ok(Some(Bytes::new())) } else { self.read(tables.home(), tables.stored()) }
    }

    /// The bytes, or `None` if the blob does not have them.
    fn read(&self, blob: &BlobId, range: ByteRange) -> Result<Option<Bytes>, CheckError> {
        let ctx = ReadCtx::new(Class::Prefetch, Instant::now() + DEADLINE);
        match self.runtime.block_on(self.source.read(blob, range, ctx)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(cause) if is_missing(&cause) => Ok(None),
            Err(cause) => Err(CheckError::Source { blob: blob.clone(), cause }),
        }
    }
}

/// The map of one blob if its tables are sound; adds its report.
fn tables(
    image: &Image,
    device: &Device,
    fetch: &Fetch<'_>,
    report: &mut Report,
) -> Result<Option<Mapped>, CheckError> {
    let id = &device.blob;
    let mut blob = BlobReport {
        id: id.to_string(),
        chunks: 0,
        verified: 0,
        unpromised: 0,
        stored_bytes: 0,
        decoded_bytes: 0,
        unchecked: None,
    };
    let place = format!("blob {id}");
    let mut is_readable = true;
    let outcome = match BlobTables::new(&device.entry) {
        Err(cause) => Err(cause),
        Ok(tables) => match fetch.tables(&tables)? {
            Some(stored) => {
                is_readable = tables.kind() != BlobKind::Dictionary;
                Mapped::new(&tables, &stored, image)
            }
            None => {
                report.found.add(Code::BlobMissing, place, || format!("has no bytes {}", tables.stored()));
                report.blobs.push(blob);
                return Ok(None);
            }
        },
    };
    let mapped = match outcome {
        Ok(mapped) => {
            let chunks = mapped.map.units().len();
            blob.chunks = chunks as u64;
            blob.unpromised = (chunks - promised(&mapped).len()) as u64;
            if report.depth == Depth::Data && !is_readable {
                let kind = mapped.kind.name();
                report.found.add(Code::BlobUnchecked, place, || format!("is {kind}: its data was not looked at"));
                blob.unchecked = Some(kind.into());
            }
            Some(mapped)
        }
        Err(TablesError::Unsupported { kind, .. }) => {
            report.found.add(Code::BlobUnchecked, place, || format!("is {kind}"));
            blob.unchecked = Some(kind.into());
            None
        }
        Err(cause) => {
            report.found.add(Code::BlobDiffers, place, || Chain(&cause).to_string());
            None
        }
    };
    report.blobs.push(blob);
    Ok(mapped)
}

/// Looks whether a plain tar layer is what its name says: one digest of all of it.
fn tar(
    mapped: &Mapped,
    number: usize,
    fetch: &Fetch<'_>,
    report: &mut Report,
    progress: &dyn Progress,
) -> Result<(), CheckError> {
    let place = format!("blob {}", mapped.map.blob());
    let watch = |bytes| progress.advance(0, bytes);
    let blob = &mut report.blobs[number];
    match tarfile::digested(&mapped.map, fetch.source, fetch.runtime, &watch) {
        Ok(map) => {
            blob.verified = map.units().len() as u64;
            blob.stored_bytes = map.units().iter().map(|unit| unit.stored.len()).sum();
            blob.decoded_bytes = blob.stored_bytes;
        }
        Err(cause @ TarFileError::Unnamed { .. }) => {
            blob.unchecked = Some(mapped.kind.name().into());
            report.found.add(Code::BlobUnchecked, place, || cause.to_string());
        }
        Err(cause @ TarFileError::Differs { .. }) => {
            report.found.add(Code::ChunkDamaged, place, || cause.to_string());
        }
        Err(TarFileError::Read { cause, .. }) if is_missing(&cause) => {
            report.found.add(Code::BlobMissing, place, || cause.to_string());
        }
        Err(TarFileError::Read { blob, cause }) => return Err(CheckError::Source { blob, cause }),
    }
    Ok(())
}

fn is_missing(cause: &SourceError) -> bool {
    matches!(cause, SourceError::NotFound { .. } | SourceError::OutOfRange { .. })
}

/// Decodes every chunk of blob `number` that the image promises something about.
fn data(
    mapped: &Mapped,
    number: usize,
    fetch: &Fetch<'_>,
    report: &mut Report,
    progress: &dyn Progress,
) -> Result<(), CheckError> {
    let (map, units) = (&mapped.map, promised(mapped));
    let (mut plain, mut decoder) = (Vec::new(), map.decoder());
    let mut last = ByteRange::default();
    let mut rest = units.as_slice();
    while let Some((_, first)) = rest.first() {
        let (count, range) = piece(rest, first.stored);
        let (now, later) = rest.split_at(count);
        rest = later;
        let stored = fetch.read(map.blob(), range)?;
        for (chunk, unit) in now {
            let place = || format!("blob {} chunk {chunk}", map.blob());
            let from = unit.stored.start() - range.start();
            let slice = |stored: &Bytes| {
                let at = |offset: u64| usize::try_from(offset).expect("a piece is small");
                stored.slice(at(from)..at(from + unit.stored.len()))
            };
            match stored.as_ref().map(slice) {
                None => {
                    report.found.add(Code::BlobMissing, place(), || format!("the blob has no bytes {}", unit.stored));
                }
                Some(stored) => {
                    plain.resize(usize::try_from(unit.blocks().len()).expect("a unit is small"), 0);
                    match decoder.decode(map.key(), unit, &stored, &mut plain) {
                        Ok(()) => {
                            let blob = &mut report.blobs[number];
                            blob.verified += 1;
                            // What several chunks share was read once.
                            let is_shared = unit.part.is_some() && unit.stored == last;
                            blob.stored_bytes += if is_shared { 0 } else { unit.stored.len() };
                            last = unit.stored;
                            blob.decoded_bytes += unit.decoded.len();
                        }
                        Err(cause) => report.found.add(Code::ChunkDamaged, place(), || Chain(&cause).to_string()),
                    }
                }
            }
        }
        progress.advance(count as u64, bytes_of(now.iter().copied()));
    }
    Ok(())
}

/// How many of `units`, sorted by where they are stored, are read at once, and the bytes to read.
fn piece(units: &[(usize, &Unit)], first: ByteRange) -> (usize, ByteRange) {
    let mut range = first;
    let mut count = 1;
    for (_, unit) in &units[1..] {
        let longer = range.hull(unit.stored);
        if longer.len() > PIECE.max(first.len()) {
            break;
        }
        range = longer;
        count += 1;
    }
    (count, range)
}
