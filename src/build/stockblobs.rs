//! The blob table of an image that is put together from others, while it is.

use std::collections::HashMap;

use super::chunk::Chunk;
use super::tree::{Kind, Tree};
use crate::base::BlobId;
use crate::format::blobfile::features;
use crate::format::rafs::BlobEntry;

/// Two images tell different things about one blob.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    #[error("it says that blob {blob} has {field} {value}, an image before it {before}")]
    Number { blob: String, field: &'static str, value: u64, before: u64 },
    #[error("it gives blob {blob} another {field} than an image before it")]
    Bytes { blob: String, field: &'static str },
    #[error("blob {blob} is one too many: 65536 are the limit; join layers before")]
    TooMany { blob: String },
}

/// Row of the chunks that no file uses, in the end.
const UNUSED: u16 = u16::MAX;

/// One row for each blob, however many images bring it.
#[derive(Debug, Default)]
pub(super) struct BlobRows {
    rows: Vec<BlobEntry>,
    by_id: HashMap<[u8; BlobId::MAX_LEN], u16>,
}

impl BlobRows {
    pub(super) fn rows(&self) -> &[BlobEntry] {
        &self.rows
    }

    /// The rows, to be told facts that no image knows.
    pub(super) fn rows_mut(&mut self) -> &mut [BlobEntry] {
        &mut self.rows
    }

    /// The row of the blob of `entry`, which is added if it is new. Indexes mean nothing yet.
    pub(super) fn add(&mut self, entry: &BlobEntry) -> Result<u16, Contradiction> {
        let entry = BlobEntry { index: 0.into(), ..*entry };
        if let Some(&row) = self.by_id.get(&entry.id) {
            let before = &mut self.rows[usize::from(row)];
            compare(&entry, before)?;
            // What is hot for one image is hot for all that are made of it.
            before.features |= entry.features.get() & features::IS_SEPARATED_WITH_PREFETCH_FILES;
            // Only some images know of a table of contents; all zeros means "not told".
            if before.toc_size.get() == 0 {
                (before.toc_size, before.toc_digest) = (entry.toc_size, entry.toc_digest);
            }
            return Ok(row);
        }
        let row = u16::try_from(self.rows.len()).ok().filter(|row| *row != UNUSED);
        let row = row.ok_or_else(|| Contradiction::TooMany { blob: id_text(&entry) })?;
        self.rows.push(entry);
        self.by_id.insert(entry.id, row);
        Ok(row)
    }

    /// The rows `first`, each given once, then those that files of `tree` lead to by first use,
    /// which is the order of the reference builder. All others are dropped. The chunks follow.
    pub(super) fn into_used(
        self,
        first: &[u16],
        tree: &Tree,
        chunks: &mut [Chunk],
        chunk_of_cut: &[u32],
    ) -> Vec<BlobEntry> {
        let mut order = first.to_vec();
        let mut place: Vec<Option<u16>> = vec![None; self.rows.len()];
        for (number, row) in (0..).zip(first) {
            place[usize::from(*row)] = Some(number);
        }
        let walked = tree.walk(|id| {
            if let Kind::Regular(content) = &tree.node(id).kind {
                for cut in content.cuts() {
                    let chunk = chunk_of_cut[usize::try_from(cut).expect("cuts are counted in memory")];
                    let blob = chunks[chunk as usize].blob;
                    let place = &mut place[usize::from(blob)];
                    if place.is_none() {
                        *place = Some(u16::try_from(order.len()).expect("as many as rows"));
                        order.push(blob);
                    }
                }
            }
            Ok::<(), std::convert::Infallible>(())
        });
        let Ok(()) = walked;
        for chunk in chunks {
            // A chunk of a dropped blob is one that no file uses.
            chunk.blob = place[usize::from(chunk.blob)].unwrap_or(UNUSED);
        }
        order.into_iter().map(|row| self.rows[usize::from(row)]).collect()
    }
}

/// Whether two rows about one blob can be true together.
fn compare(new: &BlobEntry, old: &BlobEntry) -> Result<(), Contradiction> {
    let numbers = |entry: &BlobEntry| {
        [
            ("chunk size", entry.chunk_size.get().into()),
            ("chunk count", entry.chunk_count.get().into()),
            ("compression", entry.compression.get().into()),
            ("digest algorithm", entry.digest.get().into()),
            ("features", (entry.features.get() & !features::IS_SEPARATED_WITH_PREFETCH_FILES).into()),
            ("stored size", entry.compressed_size.get()),
            ("decoded size", entry.uncompressed_size.get()),
            ("compression of the chunk-info array", entry.ci_compression.get().into()),
            ("chunk-info offset", entry.ci_offset.get()),
            ("stored size of the chunk-info array", entry.ci_compressed_size.get()),
            ("size of the chunk-info array", entry.ci_uncompressed_size.get()),
            ("cipher", u64::from(entry.cipher.get())),
        ]
    };
    for ((field, value), (_, before)) in numbers(new).into_iter().zip(numbers(old)) {
        if value != before {
            return Err(Contradiction::Number { blob: id_text(new), field, value, before });
        }
    }
    let toc = |entry: &BlobEntry| (entry.toc_size.get(), entry.toc_digest);
    // The same fields hold the place of tables elsewhere, or the key of an encrypted blob.
    let meta = |entry: &BlobEntry| (entry.meta_digest, entry.meta_size.get(), entry.cipher_iv.get());
    let field = if new.toc_size.get() != 0 && old.toc_size.get() != 0 && toc(new) != toc(old) {
        "table of contents"
    } else if meta(new) != meta(old) {
        "meta digest, meta size or key"
    } else {
        return Ok(());
    };
    Err(Contradiction::Bytes { blob: id_text(new), field })
}

pub(super) fn id_text(entry: &BlobEntry) -> String {
    BlobId::from_padded(&entry.id).map_or_else(|e| e.to_string(), |id| id.to_string())
}
