//! What a RAFS v5 bootstrap can say of blobs that exist already.
//!
//! A layer of version 5 is lifted before it is taken apart, and its chunks lie elsewhere in a device then than
//! among the plain bytes of its blob. Readers of version 5 keep plain bytes under the name of the
//! blob, at the places that its images tell, so a new image has to tell the old ones: [`Packed`]
//! remembers them. A blob of version 6 keeps its places, if it is made of nothing but chunks.

use std::collections::HashMap;

use zerocopy::FromZeros;

use crate::base::BlobId;
use crate::blob::{BlobKind, BlobTables, TablesError};
use crate::build::chunk::Chunk;
use crate::build::emit::Facts;
use crate::build::stockblobs;
use crate::format::blobfile::features;
use crate::format::rafs::{Algorithm, BlobEntry, chunk_flags};
use crate::image::v5::{Bootstrap, BootstrapError, Extent};

/// Why images cannot be put together as one of RAFS v5.
#[derive(Debug, thiserror::Error)]
pub enum NotInVersion5 {
    #[error("blob {blob} is {kind}, and version 5 knows only chunks that are stored alone")]
    Kind { blob: String, kind: &'static str },
    #[error(
        "blob {blob} is compressed with {compression}, another one with {before}, and all blobs have one compression"
    )]
    Compression { blob: String, compression: &'static str, before: &'static str },
    #[error("blob {blob} has {digest} digests, another one {before}, and all of an image are of one kind")]
    Digest { blob: String, digest: &'static str, before: &'static str },
    #[error(
        "blob {blob} is of version 5, and no layer of that version tells where its plain bytes lie; merge those that it came from"
    )]
    Untold { blob: String },
    #[error("blob {blob} is so old that no image tells how many chunks it has")]
    Old { blob: String },
    #[error("two layers tell different sizes of blob {blob}")]
    Sizes { blob: String },
    #[error("two layers tell different places of chunk {chunk} of blob {blob}")]
    Place { blob: String, chunk: u32 },
    #[error("chunk {chunk} of blob {blob} does not lie where that blob has chunks")]
    Outside { blob: String, chunk: u32 },
    #[error("chunk {chunk} of blob {blob} has {has} bytes, where a file of it needs {needs}")]
    Length { blob: String, chunk: u32, has: u32, needs: u64 },
    #[error("a layer's inode records lie over each other")]
    Overlap,
    #[error(transparent)]
    Layer(#[from] BootstrapError),
    #[error(transparent)]
    Tables(#[from] TablesError),
}

/// Where layers of RAFS v5 say that the plain bytes of their blobs lie.
#[derive(Debug, Default)]
pub struct Packed {
    blobs: HashMap<BlobId, Blob>,
}

#[derive(Debug)]
struct Blob {
    extent: Option<Extent>,
    features: u32,
    /// By number.
    places: HashMap<u32, Place>,
}

/// What lifting changes of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    packed_offset: u64,
    /// As told: of a gzip member a bound.
    stored_len: u32,
}

impl Packed {
    /// Adds what a layer says, every blob of which has its name.
    ///
    /// # Errors
    /// If the layer is damaged, or says other things about a blob than one before.
    pub fn add(&mut self, image: &Bootstrap<'_>) -> Result<(), NotInVersion5> {
        for blob in image.blobs() {
            let extent = blob.extent;
            let new = || Blob { extent, features: blob.features & !features::INLINED_FS_META, places: HashMap::new() };
            let known = self.blobs.entry(blob.id.clone()).or_insert_with(new);
            if known.extent != extent {
                return Err(NotInVersion5::Sizes { blob: blob.id.to_string() });
            }
        }
        // In a sound image no byte belongs to two inodes.
        let mut room = image.bytes().len() as u64;
        for number in 1..=image.paths() {
            let inode = image.inode(number)?;
            room = room.checked_sub(inode.len).ok_or(NotInVersion5::Overlap)?;
            for (position, record) in (0..).zip(inode.chunks) {
                let Some(chunk) = image.chunk(&inode, position).transpose()? else { break };
                let Some(index) = chunk.index else { break };
                let id = &image.blobs()[chunk.blob].id;
                let place = Place { packed_offset: chunk.packed.start(), stored_len: record.compressed_size.get() };
                let blob = self.blobs.get_mut(id).expect("all were added");
                if *blob.places.entry(index).or_insert(place) != place {
                    return Err(NotInVersion5::Place { blob: id.to_string(), chunk: index });
                }
            }
        }
        Ok(())
    }

    /// Turns rows of a blob table and the chunks of these blobs into what RAFS v5 says of them, and returns
    /// what its superblock says. `renamed` has the names that layers gave to blobs which are called
    /// otherwise now, by their new ones.
    pub(in crate::build) fn pack(
        &self,
        rows: &mut [BlobEntry],
        chunks: &mut [Chunk],
        renamed: &HashMap<BlobId, BlobId>,
        mut facts: Facts,
    ) -> Result<Facts, NotInVersion5> {
        facts.compression = compression(rows, chunks)?.unwrap_or(facts.compression);
        facts.digest = match rows {
            [] => facts.digest,
            [first, ..] => {
                let name = |row: &BlobEntry| BlobTables::new(row).map(|tables| tables.digest());
                let before = name(first)?;
                for row in rows.iter() {
                    let digest = name(row)?;
                    if digest != before {
                        let (digest, before) = (digest.name(), before.name());
                        return Err(NotInVersion5::Digest { blob: stockblobs::id_text(row), digest, before });
                    }
                }
                before
            }
        };
        let mut packed = Vec::with_capacity(rows.len());
        for row in rows.iter_mut() {
            let id = BlobTables::new(row)?.blob().clone();
            let blob = self.blobs.get(renamed.get(&id).unwrap_or(&id));
            *row = match blob {
                Some(blob) => blob.row(row)?,
                None => of_version_6(row)?,
            };
            packed.push(blob);
        }
        for chunk in chunks {
            // Those of dropped blobs are used by no file.
            let Some(row) = rows.get(usize::from(chunk.blob)) else { continue };
            let blob = || stockblobs::id_text(row);
            let Some(known) = packed[usize::from(chunk.blob)] else {
                let end = chunk.stored_offset.saturating_add(chunk.stored_len.into());
                if chunk.number >= row.chunk_count.get() || end > row.compressed_size.get() {
                    return Err(NotInVersion5::Outside { blob: blob(), chunk: chunk.number });
                }
                continue;
            };
            let place = known.places.get(&chunk.number);
            let place = place.ok_or_else(|| NotInVersion5::Outside { blob: blob(), chunk: chunk.number })?;
            (chunk.decoded_offset, chunk.stored_len) = (place.packed_offset, place.stored_len);
        }
        Ok(facts)
    }
}

impl Blob {
    /// What the layer had in its extended blob table.
    fn row(&self, row: &BlobEntry) -> Result<BlobEntry, NotInVersion5> {
        let extent = self.extent.ok_or_else(|| NotInVersion5::Old { blob: stockblobs::id_text(row) })?;
        Ok(plain(row, self.features, extent.chunks, extent.decoded_len, extent.stored_len))
    }
}

/// A row with nothing but what an extended blob table has, and the id.
fn plain(row: &BlobEntry, features: u32, chunks: u32, decoded_len: u64, stored_len: u64) -> BlobEntry {
    let mut packed = BlobEntry::new_zeroed();
    packed.id = row.id;
    packed.features = features.into();
    packed.chunk_count = chunks.into();
    packed.uncompressed_size = decoded_len.into();
    packed.compressed_size = stored_len.into();
    packed
}

/// A blob of version 6 for readers that take its chunks by their records, and know none of its tables.
fn of_version_6(row: &BlobEntry) -> Result<BlobEntry, NotInVersion5> {
    let blob = stockblobs::id_text(row);
    let tables = BlobTables::new(row)?;
    let set = row.features.get();
    let parts = [
        (features::BATCH, "a blob with batches"),
        (features::ENCRYPTED, "encrypted"),
        (features::SEPARATE, "a blob with its tables in another file"),
    ];
    let kind = match tables.kind() {
        BlobKind::Listed => return Err(NotInVersion5::Untold { blob }),
        BlobKind::Native => parts.into_iter().find(|(bit, _)| set & bit != 0).map(|(_, kind)| kind),
        other => Some(other.name()),
    };
    match kind {
        Some(kind) => Err(NotInVersion5::Kind { blob, kind }),
        None => {
            Ok(plain(row, features::CAP_TAR_TOC, row.chunk_count.get(), row.uncompressed_size.get(), tables.data_end()))
        }
    }
}

/// The compression of all blobs with a chunk that is compressed; `None` if there is no such chunk.
fn compression(rows: &[BlobEntry], chunks: &[Chunk]) -> Result<Option<Algorithm>, NotInVersion5> {
    let mut needs = vec![false; rows.len()];
    for chunk in chunks.iter().filter(|chunk| chunk.flags & chunk_flags::COMPRESSED != 0) {
        if let Some(needs) = needs.get_mut(usize::from(chunk.blob)) {
            *needs = true;
        }
    }
    let mut found: Option<Algorithm> = None;
    for (row, _) in rows.iter().zip(&needs).filter(|(_, needs)| **needs) {
        let this = BlobTables::new(row)?.compression();
        let before = *found.get_or_insert(this);
        if before != this {
            let (compression, before) = (this.name(), before.name());
            return Err(NotInVersion5::Compression { blob: stockblobs::id_text(row), compression, before });
        }
    }
    Ok(found)
}
