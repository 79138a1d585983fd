//! Blobs that have no tables: an image lists those of their chunks that it uses, and nobody lists all.

use super::{Check, Unit, UnitIndex, UnitMap};
use super::{TablesError, tables::BlobTables};
use crate::base::ByteRange;
use crate::format::erofs::MAX_DEVICES;
use crate::format::rafs::{ChunkRecord, chunk_flags};

/// Numbers that a map keeps free for what other images list, however few this one does.
const MOST_FREE: usize = 1 << 12;
/// An image can have that of each of its devices.
const _: () = assert!(MOST_FREE * size_of::<Unit>() * MAX_DEVICES <= 128 << 20);
/// The same for each unit that it does list.
const FREE_PER_UNIT: usize = 8;

impl BlobTables {
    /// The units that `rows` list of this blob.
    ///
    /// Each has the number of its chunk, so that what several images list goes together. Only where
    /// nearly all numbers would be vacant, which costs memory for nothing, are they numbered anew.
    pub(super) fn listed<'a>(&self, rows: impl Iterator<Item = &'a ChunkRecord>) -> Result<UnitMap, TablesError> {
        let entry = &self.entry;
        let mut units = Vec::new();
        for row in rows.filter(|row| row.blob_index.get() == entry.index) {
            units.push((row.index.get(), self.listed_unit(row)?));
        }
        units.sort_by_key(|(chunk, _)| *chunk);
        units.dedup();
        if let Some(pair) = units.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(TablesError::Disagree { blob: entry.blob.clone(), chunk: pair[0].0 });
        }
        let fits = entry.count as usize <= MOST_FREE.max(units.len().saturating_mul(FREE_PER_UNIT));
        let map = if fits {
            UnitMap::listed(entry.blob.clone(), entry.decoded_len, entry.count, units)
        } else {
            UnitMap::new(entry.blob.clone(), entry.decoded_len, units.into_iter().map(|(_, unit)| unit).collect())
        };
        map.map_err(|cause| TablesError::Map { blob: entry.blob.clone(), cause })
    }

    fn listed_unit(&self, row: &ChunkRecord) -> Result<Unit, TablesError> {
        const KNOWN: u32 = chunk_flags::COMPRESSED | chunk_flags::HAS_CRC32;
        let chunk: UnitIndex = row.index.get();
        let flags = row.flags.get();
        if chunk >= self.entry.count || flags & !KNOWN != 0 || row.uncompressed_size.get() == 0 {
            return Err(TablesError::Disagree { blob: self.entry.blob.clone(), chunk });
        }
        let stored = ByteRange::at(row.compressed_offset.get(), row.compressed_size.get().into());
        let recipe = self.recipe(flags & chunk_flags::COMPRESSED != 0)?;
        let decoded = (row.uncompressed_offset.get(), row.uncompressed_size.get());
        let check: Check = self.promised(row);
        Ok(Unit { check, ..self.unit(decoded, stored, recipe)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::{BlobKind, Recipe};
    use crate::format::blobfile::features;
    use crate::format::rafs::BlobEntry;
    use zerocopy::FromZeros;

    const COUNT: u32 = 7;

    fn entry() -> BlobEntry {
        let mut entry = BlobEntry::new_zeroed();
        entry.id = [b'a'; 64];
        entry.index = 1.into();
        entry.chunk_count = COUNT.into();
        entry.compression = 3.into();
        entry.features = features::ALIGNED.into();
        entry.compressed_size = 1000.into();
        entry.uncompressed_size = (1 << 20).into();
        entry
    }

    fn row(chunk: u32) -> ChunkRecord {
        let mut row = ChunkRecord::new_zeroed();
        row.digest = [7; 32];
        row.blob_index = 1.into();
        row.index = chunk.into();
        row.flags = chunk_flags::COMPRESSED.into();
        row.compressed_offset = (u64::from(chunk) * 100).into();
        row.compressed_size = 100.into();
        row.uncompressed_offset = (u64::from(chunk) * 8192).into();
        row.uncompressed_size = 5000.into();
        row
    }

    fn map(entry: &BlobEntry, rows: &[ChunkRecord]) -> Result<UnitMap, TablesError> {
        let tables = BlobTables::new(entry)?;
        assert_eq!((tables.kind(), tables.stored().is_empty()), (BlobKind::Listed, true));
        tables.ensure_servable()?;
        tables.with_digests(tables.geometry(&[])?, rows.iter())
    }

    #[test]
    fn what_images_list_has_the_number_of_its_chunk() {
        let foreign = ChunkRecord { blob_index: 0.into(), uncompressed_size: 0.into(), ..row(0) };
        let map = map(&entry(), &[row(5), row(2), foreign, row(5)]).unwrap();

        assert_eq!((map.count(), map.is_listed()), (COUNT, true));
        let known = map.units().iter().enumerate().filter(|(_, unit)| !unit.is_vacant());
        assert_eq!(known.map(|(index, _)| index).collect::<Vec<_>>(), [2, 5]);
        let unit = map.units()[5];
        assert_eq!((unit.recipe, unit.check), (Recipe::Zstd, Check::Blake3([7; 32])));
        assert_eq!((unit.decoded.start(), unit.stored.start(), unit.stored.len()), (40960, 500, 100));
    }

    #[test]
    fn rows_that_cannot_be_true_are_refused() {
        let refused = |rows: &[ChunkRecord]| map(&entry(), rows).is_err();
        assert!(!refused(&[row(6)]));
        assert!(refused(&[row(COUNT)]), "number");
        assert!(refused(&[row(1), ChunkRecord { digest: [8; 32], ..row(1) }]), "two promises");
        assert!(refused(&[ChunkRecord { compressed_offset: 901.into(), ..row(1) }]), "outside of the blob");
        assert!(refused(&[ChunkRecord { uncompressed_offset: 100.into(), ..row(1) }]), "within a block");
        assert!(refused(&[ChunkRecord { uncompressed_size: 0.into(), ..row(1) }]), "empty");
        assert!(refused(&[ChunkRecord { flags: chunk_flags::ENCRYPTED.into(), ..row(1) }]), "no key");
        assert!(refused(&[row(1), ChunkRecord { uncompressed_offset: 8192.into(), ..row(2) }]), "overlap");
        let plain = BlobEntry { compression: 0.into(), ..entry() };
        assert!(map(&plain, &[row(1)]).is_err(), "compressed by nothing");
    }

    #[test]
    fn a_blob_that_claims_millions_of_chunks_costs_what_is_listed() {
        let huge = BlobEntry { chunk_count: 0xff_ffff.into(), ..entry() };
        let map = map(&huge, &[row(5), row(2)]).unwrap();
        assert_eq!((map.count(), map.is_listed()), (2, false));
        for count in [0, 0x100_0000, u32::MAX] {
            assert!(BlobTables::new(&BlobEntry { chunk_count: count.into(), ..entry() }).is_err(), "{count}");
        }
        assert!(BlobTables::new(&BlobEntry { compressed_size: (1 << 41).into(), ..entry() }).is_err());
    }
}
