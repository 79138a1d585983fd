//! An image without what its files no longer need: chunks left over from merges, blobs of a few
//! kilobytes.
//!
//! A blob is *rebuilt* when too little of it is used, and *merged* with others when what is used of
//! it is small. Both mean that its live chunks are copied, in the order in which they lie, into a
//! new blob together with those of neighbours of the same form. All other blobs stay as they are.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::error::BuildError;
use super::load::Layer;
use super::rewrite::{Existing, Form, Rewrite, Usage, make_blobs_dir};
use super::{BlobReport, Progress, merge, stockblobs};
use crate::format::rafs::BlobEntry;

/// How to compact an image.
#[derive(Debug)]
pub struct CompactSpec<'a> {
    pub existing: Existing<'a>,
    /// Made if it is not there. Gets `bootstrap` and, if there are new blobs, `blobs/`.
    pub out_dir: &'a Path,
    /// Percent: a blob of which less is used is rebuilt.
    pub min_used: u8,
    /// Bytes: blobs of which less is used are merged with each other.
    pub small: u64,
    /// Bytes: how much merged blobs should hold at most.
    pub target: u64,
    /// An image whose blobs are left alone: others use them as well.
    pub dictionary: Option<&'a Layer>,
    /// Whether encrypted blobs are compacted too, which stores their chunks plain.
    pub decrypt: bool,
}

impl CompactSpec<'_> {
    pub const DEFAULT_MIN_USED: u8 = 50;
    pub const DEFAULT_SMALL: u64 = 10 << 20;
    pub const DEFAULT_TARGET: u64 = 100 << 20;
}

/// What was made. The same for every run on the same image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CompactReport {
    /// Path of the bootstrap.
    pub bootstrap: String,
    pub bootstrap_bytes: u64,
    /// Whether every blob was kept: the new bootstrap then names what the old one named.
    pub nothing_to_do: bool,
    pub new_blobs: Vec<BlobReport>,
    /// The blobs of the image as it was.
    pub blobs: Vec<CompactedBlob>,
    /// Chunks that were copied into new blobs.
    pub live_chunks: u64,
    /// Of these, chunks that could not be copied as they were stored.
    pub encoded_chunks: u64,
    /// Bytes of the blobs that the image names.
    pub stored_bytes_before: u64,
    pub stored_bytes_after: u64,
}

/// One blob of the image as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CompactedBlob {
    pub id: String,
    pub stored_bytes: u64,
    pub decoded_bytes: u64,
    /// Of the decoded bytes, those of chunks that files lead to.
    pub used_bytes: u64,
    pub fate: Fate,
}

/// What became of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It serves the new image too.
    Kept,
    /// The same, because it is a blob of the dictionary.
    KeptForDictionary,
    /// The same, because its chunks would have to be stored plain.
    KeptEncrypted,
    /// No file needs it.
    Dropped,
    /// Too little of it was used.
    Rebuilt,
    /// It was small.
    Merged,
}

/// Compacts an image. Its old blobs are not touched.
///
/// # Errors
/// A [`BuildError`]. Nothing has a name then that was not there before.
pub fn compact(spec: &CompactSpec<'_>, progress: &dyn Progress) -> Result<CompactReport, BuildError> {
    let mut rewrite = Rewrite::of(spec.existing)?;
    let before = rewrite.stock.blobs.rows().to_vec();
    let usage = rewrite.usage();
    let mut fates: Vec<Fate> = (0u16..).zip(&usage).map(|(row, usage)| spec.fate(&rewrite, row, usage)).collect();
    let bins = bins(spec, &rewrite, &usage, &mut fates)?;

    let live = live_chunks(&rewrite, &bins);
    let sum = |chunk: &u32| u64::from(rewrite.stock.chunks[*chunk as usize].plain_len);
    progress.total(0, live.iter().flatten().map(sum).sum());
    if !bins.is_empty() {
        let blobs_dir = make_blobs_dir(spec.out_dir)?;
        for ((form, _), chunks) in bins.iter().zip(&live) {
            rewrite.copy(chunks, *form, 0, &blobs_dir, progress)?;
        }
    }
    let encoded_chunks = rewrite.encoded_chunks;
    let made = rewrite.finish(&[], None, spec.out_dir)?;
    let stored = |rows: &[BlobEntry]| rows.iter().map(|row| row.compressed_size.get()).sum();
    let blobs = before.iter().zip(&usage).zip(&fates).map(|((entry, usage), fate)| CompactedBlob {
        id: stockblobs::id_text(entry),
        stored_bytes: entry.compressed_size.get(),
        decoded_bytes: entry.uncompressed_size.get(),
        used_bytes: usage.decoded_bytes,
        fate: *fate,
    });
    Ok(CompactReport {
        bootstrap: made.bootstrap,
        bootstrap_bytes: made.bootstrap_bytes,
        nothing_to_do: fates.iter().all(|fate| fate.is_kept()),
        new_blobs: made.blobs,
        blobs: blobs.collect(),
        live_chunks: live.iter().map(|chunks| chunks.len() as u64).sum(),
        encoded_chunks,
        stored_bytes_before: stored(&before),
        stored_bytes_after: stored(&made.rows),
    })
}

impl Fate {
    fn is_kept(self) -> bool {
        match self {
            Self::Kept | Self::KeptForDictionary | Self::KeptEncrypted => true,
            Self::Dropped | Self::Rebuilt | Self::Merged => false,
        }
    }
}

impl CompactSpec<'_> {
    /// What should become of a blob, whatever the others are like.
    fn fate(&self, rewrite: &Rewrite<'_>, row: u16, usage: &Usage) -> Fate {
        let entry = &rewrite.stock.blobs.rows()[usize::from(row)];
        let in_dictionary = |layer: &Layer| merge::blob_ids(layer).any(|id| id.to_padded() == entry.id);
        let used = u128::from(usage.decoded_bytes) * 100;
        if usage.chunks == 0 {
            Fate::Dropped
        } else if self.dictionary.is_some_and(in_dictionary) {
            Fate::KeptForDictionary
        } else if rewrite.is_encrypted(row) && !self.decrypt {
            Fate::KeptEncrypted
        } else if used < u128::from(self.min_used) * u128::from(entry.uncompressed_size.get()) {
            Fate::Rebuilt
        } else if stored_estimate(entry, usage) < self.small {
            Fate::Merged
        } else {
            Fate::Kept
        }
    }
}

/// About how many bytes of a blob file are used: all of it, in proportion. What a member of a batch
/// takes by itself nobody can say.
fn stored_estimate(entry: &BlobEntry, usage: &Usage) -> u64 {
    let (stored, decoded) = (u128::from(entry.compressed_size.get()), u128::from(entry.uncompressed_size.get()).max(1));
    u64::try_from(stored * u128::from(usage.decoded_bytes) / decoded).unwrap_or(u64::MAX)
}

/// Rows that share a new blob, and its form.
type Bin = (Form, Vec<u16>);

/// Puts blobs of one form together, in the order of their rows, as far as the target allows. A
/// small blob that finds no company is kept.
fn bins(
    spec: &CompactSpec<'_>,
    rewrite: &Rewrite<'_>,
    usage: &[Usage],
    fates: &mut [Fate],
) -> Result<Vec<Bin>, BuildError> {
    let mut open: BTreeMap<(u32, u32), (Form, Vec<u16>, u64)> = BTreeMap::new();
    let mut full = Vec::new();
    for (row, fate) in (0u16..).zip(fates.iter()) {
        if !matches!(fate, Fate::Rebuilt | Fate::Merged) {
            continue;
        }
        let form = rewrite.form(row)?;
        let bytes = stored_estimate(&rewrite.stock.blobs.rows()[usize::from(row)], &usage[usize::from(row)]);
        let (_, rows, held) = open.entry(form.rank()).or_insert((form, Vec::new(), 0));
        if !rows.is_empty() && held.saturating_add(bytes) > spec.target {
            full.push((form, std::mem::take(rows)));
            *held = 0;
        }
        rows.push(row);
        *held = held.saturating_add(bytes);
    }
    full.extend(open.into_values().map(|(form, rows, _)| (form, rows)));
    full.retain(|(_, rows)| {
        let lonely = rows.len() == 1 && fates[usize::from(rows[0])] == Fate::Merged;
        if lonely {
            fates[usize::from(rows[0])] = Fate::Kept;
        }
        !lonely
    });
    full.sort_by_key(|(_, rows)| rows[0]);
    Ok(full)
}

/// The chunks of each bin that files lead to, by blob and place.
fn live_chunks(rewrite: &Rewrite<'_>, bins: &[Bin]) -> Vec<Vec<u32>> {
    let mut bin_of_row = vec![None; rewrite.stock.blobs.rows().len()];
    for (bin, (_, rows)) in bins.iter().enumerate() {
        rows.iter().for_each(|row| bin_of_row[usize::from(*row)] = Some(bin));
    }
    let mut live = vec![Vec::new(); bins.len()];
    for ((position, chunk), used) in (0u32..).zip(&rewrite.stock.chunks).zip(rewrite.used()) {
        if let Some(bin) = bin_of_row[usize::from(chunk.blob)].filter(|_| used) {
            live[bin].push(position);
        }
    }
    for chunks in &mut live {
        chunks.sort_by_key(|&position| {
            let chunk = &rewrite.stock.chunks[position as usize];
            (chunk.blob, chunk.decoded_offset)
        });
    }
    live
}
