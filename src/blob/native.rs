//! The tables of a native v6 blob: from chunk-info bytes and digests to a [`UnitMap`].

use zerocopy::FromBytes;

use super::{Check, Recipe, Unit, UnitMap, UnitMapError};
use crate::base::{BlobId, ByteRange, InvalidBlobId};
use crate::codec::{self, CodecError};
use crate::format::blobfile::{ChunkInfoV1, ChunkInfoV2, Header, MAGIC, features};
use crate::format::rafs::{Algorithm, BlobEntry, ChunkRecord, DigestAlgorithm, chunk_flags};

/// Where a blob keeps its tables, and how to read them: one checked row of the blob table.
///
/// Knows native blobs only: those whose chunks are stored one by one in a file of our own layout.
/// Everything else is refused by name.
#[derive(Clone, Debug)]
pub struct BlobTables {
    blob: BlobId,
    index: u32,
    count: u32,
    decoded_len: u64,
    /// Chunk data lies below this byte of the blob file.
    data_end: u64,
    compression: Algorithm,
    digest: DigestAlgorithm,
    long_entries: bool,
    features: u32,
    ci_compression: Algorithm,
    ci_stored: ByteRange,
    ci_plain_len: usize,
}

/// Why the tables of a blob cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TablesError {
    /// The blob has no usable name.
    #[error(transparent)]
    Id(#[from] InvalidBlobId),
    /// The blob is of a kind this version cannot serve.
    #[error("blob {blob} is {kind}, which this version cannot serve")]
    Unsupported { blob: BlobId, kind: &'static str },
    /// A field of the blob table has an impossible value.
    #[error("blob {blob}: {field} of the blob table is impossible: {value}")]
    Field { blob: BlobId, field: &'static str, value: u64 },
    /// The blob's own tables do not fit what the image says.
    #[error("blob {blob}: {what}")]
    Damaged { blob: BlobId, what: &'static str },
    /// The chunk-info array does not decompress.
    #[error("blob {blob}: chunk-info array is damaged")]
    Codec {
        blob: BlobId,
        #[source]
        cause: CodecError,
    },
    /// The chunks do not make a map.
    #[error("blob {blob}: the chunks do not fit together")]
    Map {
        blob: BlobId,
        #[source]
        cause: UnitMapError,
    },
    /// The image and the blob disagree about a chunk.
    #[error("blob {blob}: image and blob disagree about chunk {chunk}")]
    Disagree { blob: BlobId, chunk: u32 },
}

/// A chunk-info array may not grow to more than this many times its stored size: real ones reach
/// about 8, and a hostile one must not make a few bytes claim hundreds of megabytes.
const MAX_CI_RATIO: u64 = 256;
/// Largest stored blob in bytes (`rafs-v6.md` section 5).
const MAX_STORED: u64 = 1 << 40;

impl BlobTables {
    /// Checks one row of the blob table.
    pub fn new(entry: &BlobEntry) -> Result<Self, TablesError> {
        let blob = BlobId::from_padded(&entry.id)?;
        let features = entry.features.get();
        refuse_unsupported(&blob, features)?;
        let field = |field, value: u64| TablesError::Field { blob: blob.clone(), field, value };
        if features & !features::KNOWN != 0 {
            return Err(field("features", features.into()));
        }
        let algorithm = |name, number: u32| Algorithm::from_number(number).ok_or(field(name, number.into()));
        let compression = algorithm("compression", entry.compression.get())?;
        let ci_compression = algorithm("chunk-info compression", entry.ci_compression.get())?;
        let digest = DigestAlgorithm::from_number(entry.digest.get())
            .ok_or(field("digest algorithm", entry.digest.get().into()))?;
        let (count, plain) = (entry.chunk_count.get(), entry.ci_uncompressed_size.get());
        let long_entries = features & features::CHUNK_INFO_V2 != 0;
        let size = if long_entries { size_of::<ChunkInfoV2>() } else { size_of::<ChunkInfoV1>() };
        if count == 0 || count as usize > super::map::MAX_UNITS || plain != u64::from(count) * size as u64 {
            return Err(field("chunk count", count.into()));
        }
        let stored = entry.ci_compressed_size.get();
        if stored == 0 || stored > plain || plain / MAX_CI_RATIO > stored {
            return Err(field("stored size of the chunk-info array", stored));
        }
        let offset = entry.ci_offset.get();
        let ci_stored = ByteRange::at(offset, stored)
            .filter(|range| range.end() <= MAX_STORED)
            .ok_or(field("offset of the chunk-info array", offset))?;
        if entry.uncompressed_size.get() > super::map::MAX_DECODED {
            return Err(field("decoded size", entry.uncompressed_size.get()));
        }
        let data_end = if features & features::CAP_TAR_TOC == 0 {
            entry.compressed_size.get()
        } else {
            let header = if features & features::HAS_TAR_HEADER == 0 { 0 } else { 512 };
            offset.checked_sub(header).ok_or(field("offset of the chunk-info array", offset))?
        };
        Ok(Self {
            index: entry.index.get(),
            count,
            decoded_len: entry.uncompressed_size.get(),
            data_end,
            compression,
            digest,
            long_entries,
            features,
            ci_compression,
            ci_stored,
            ci_plain_len: usize::try_from(plain).map_err(|_| field("chunk count", count.into()))?,
            blob,
        })
    }

    /// The blob these are the tables of.
    pub fn blob(&self) -> &BlobId {
        &self.blob
    }

    /// Length of the device in bytes, whole blocks.
    pub fn decoded_len(&self) -> u64 {
        self.decoded_len.next_multiple_of(crate::base::BLOCK)
    }

    /// The bytes of the blob file that [`BlobTables::geometry`] wants: the chunk-info array and
    /// the header behind it.
    pub fn stored(&self) -> ByteRange {
        let header = size_of::<Header>() as u64;
        ByteRange::new(self.ci_stored.start(), self.ci_stored.end() + header).expect("bounded by new()")
    }

    /// Makes the unit map from the bytes of [`BlobTables::stored`]. Units get a check only where
    /// the blob itself carries one (a CRC); [`BlobTables::with_digests`] adds the image's.
    pub fn geometry(&self, stored: &[u8]) -> Result<UnitMap, TablesError> {
        if stored.len() as u64 != self.stored().len() {
            return Err(self.damaged("the tables have another length than the image says"));
        }
        let (ci, header) = stored.split_at(stored.len() - size_of::<Header>());
        let header = Header::ref_from_bytes(header).map_err(|_| self.damaged("the header is cut"))?;
        self.check_header(header)?;
        let mut plain = vec![0; self.ci_plain_len];
        let codec = |cause| TablesError::Codec { blob: self.blob.clone(), cause };
        match self.ci_compression {
            Algorithm::None if ci.len() == plain.len() => plain.copy_from_slice(ci),
            Algorithm::None => return Err(self.damaged("the chunk-info array has another length than the image says")),
            Algorithm::Lz4Block => codec::lz4_block_decode(ci, &mut plain).map_err(codec)?,
            Algorithm::Gzip => codec::gzip_decode(ci, &mut plain).map_err(codec)?,
            Algorithm::Zstd => codec::zstd_decode(ci, &mut plain).map_err(codec)?,
        }
        let cut = |_| self.damaged("the chunk-info array is ragged");
        let units = if self.long_entries {
            let rows = <[ChunkInfoV2]>::ref_from_bytes(&plain).map_err(|e| cut(e.to_string()))?;
            rows.iter().map(|row| self.long_unit(row)).collect::<Result<Vec<_>, _>>()
        } else {
            let rows = <[ChunkInfoV1]>::ref_from_bytes(&plain).map_err(|e| cut(e.to_string()))?;
            rows.iter().map(|row| self.short_unit(row)).collect()
        }?;
        UnitMap::new(self.blob.clone(), self.decoded_len, units)
            .map_err(|cause| TablesError::Map { blob: self.blob.clone(), cause })
    }

    /// Adds to `map` the digests that the image's chunk table names for this blob. Rows of other
    /// blobs are passed over.
    ///
    /// # Errors
    /// If a row and the map place the same chunk differently, or two rows promise different bytes.
    pub fn with_digests<'a>(
        &self,
        map: &UnitMap,
        rows: impl Iterator<Item = &'a ChunkRecord>,
    ) -> Result<UnitMap, TablesError> {
        let mut units = map.units().to_vec();
        let mut named = vec![false; units.len()];
        for row in rows.filter(|row| row.blob_index.get() == self.index) {
            let chunk = row.index.get();
            let disagree = || TablesError::Disagree { blob: self.blob.clone(), chunk };
            let unit = units.get_mut(chunk as usize).ok_or_else(disagree)?;
            let same = unit.decoded.start() == row.uncompressed_offset.get()
                && unit.decoded.len() == u64::from(row.uncompressed_size.get())
                && unit.stored.start() == row.compressed_offset.get()
                && unit.stored.len() == u64::from(row.compressed_size.get())
                && (unit.recipe == Recipe::Plain) == (row.flags.get() & chunk_flags::COMPRESSED == 0);
            if !same || row.flags.get() & chunk_flags::ENCRYPTED != 0 {
                return Err(disagree());
            }
            let check = self.promised(row);
            if named[chunk as usize] && check != unit.check {
                return Err(disagree());
            }
            named[chunk as usize] = true;
            if check != Check::Unknown {
                unit.check = check;
            }
        }
        UnitMap::new(self.blob.clone(), self.decoded_len, units)
            .map_err(|cause| TablesError::Map { blob: self.blob.clone(), cause })
    }

    /// What a row promises about the plain bytes: its digest, its CRC where it carries none.
    fn promised(&self, row: &ChunkRecord) -> Check {
        if row.digest != [0; 32] {
            return match self.digest {
                DigestAlgorithm::Blake3 => Check::Blake3(row.digest),
                DigestAlgorithm::Sha256 => Check::Sha256(row.digest),
            };
        }
        let has_crc = row.flags.get() & chunk_flags::HAS_CRC32 != 0;
        if has_crc { Check::Crc32c(row.crc32.get()) } else { Check::Unknown }
    }

    fn check_header(&self, header: &Header) -> Result<(), TablesError> {
        let agrees = header.magic.get() == MAGIC
            && header.magic2.get() == MAGIC
            && header.ci_entries.get() == self.count
            && header.ci_compression.get() == self.ci_compression.number()
            && header.ci_offset.get() == self.ci_stored.start()
            && header.ci_compressed_size.get() == self.ci_stored.len()
            && header.ci_uncompressed_size.get() == self.ci_plain_len as u64;
        // The one documented difference is in bits that describe the bootstrap's place.
        let same_kind = (header.features.get() ^ self.features) & features::CHUNK_INFO_V2 == 0;
        if agrees && same_kind { Ok(()) } else { Err(self.damaged("its header is not the one the image describes")) }
    }

    fn short_unit(&self, row: &ChunkInfoV1) -> Result<Unit, TablesError> {
        let (decoded_size, stored_size) = (row.uncompressed_size(), row.compressed_size());
        self.unit(
            (row.uncompressed_offset(), decoded_size),
            (row.compressed_offset(), stored_size),
            decoded_size != stored_size,
            Check::Unknown,
        )
    }

    fn long_unit(&self, row: &ChunkInfoV2) -> Result<Unit, TablesError> {
        let foreign = ChunkInfoV2::ZRAN | ChunkInfoV2::BATCH | ChunkInfoV2::ENCRYPTED;
        if row.flags() & foreign != 0 {
            return Err(self.damaged("a chunk is of a kind that the blob does not announce"));
        }
        self.unit(
            (row.uncompressed_offset(), row.uncompressed_size()),
            (row.compressed_offset(), row.compressed_size()),
            row.flags() & ChunkInfoV2::COMPRESSED != 0,
            row.crc32c().map_or(Check::Unknown, Check::Crc32c),
        )
    }

    fn unit(
        &self,
        (decoded_at, decoded_size): (u64, u32),
        (stored_at, stored_size): (u64, u32),
        compressed: bool,
        check: Check,
    ) -> Result<Unit, TablesError> {
        let recipe = match (compressed, self.compression) {
            (false, _) => Recipe::Plain,
            (true, Algorithm::Lz4Block) => Recipe::Lz4Block,
            (true, Algorithm::Gzip) => Recipe::Gzip,
            (true, Algorithm::Zstd) => Recipe::Zstd,
            (true, Algorithm::None) => return Err(self.damaged("a chunk of an uncompressed blob is compressed")),
        };
        let range =
            |at, size: u32| ByteRange::at(at, size.into()).ok_or_else(|| self.damaged("a chunk is out of range"));
        let stored = range(stored_at, stored_size)?;
        if stored.end() > self.data_end {
            return Err(self.damaged("a chunk lies outside the blob's data"));
        }
        Ok(Unit { decoded: range(decoded_at, decoded_size)?, stored, recipe, check, part: None, encrypted: false })
    }

    fn damaged(&self, what: &'static str) -> TablesError {
        TablesError::Damaged { blob: self.blob.clone(), what }
    }
}

fn refuse_unsupported(blob: &BlobId, set: u32) -> Result<(), TablesError> {
    let kinds = [
        (features::INLINED_FS_META, "a blob that holds its own bootstrap"),
        (features::ZRAN, "an index into a foreign gzip layer"),
        (features::SEPARATE, "an index into a foreign layer"),
        (features::TARFS, "a plain tar layer"),
        (features::BATCH, "a blob with batched chunks"),
        (features::ENCRYPTED, "encrypted"),
        (features::IS_CHUNKDICT_GENERATED, "a generated chunk dictionary"),
        (features::EXTERNAL, "an external object"),
    ];
    match kinds.iter().find(|(bit, _)| set & bit != 0) {
        Some((_, kind)) => Err(TablesError::Unsupported { blob: blob.clone(), kind }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromZeros, IntoBytes};

    struct Sample {
        entry: BlobEntry,
        stored: Vec<u8>,
        rows: Vec<ChunkRecord>,
    }

    /// Two chunks, the first compressed, as the builder lays them out.
    fn sample() -> Sample {
        let ci = [ChunkInfoV1::new(0, 5000, 0, 100), ChunkInfoV1::new(8192, 300, 100, 300)];
        let mut entry = BlobEntry::new_zeroed();
        entry.id = [b'a'; 64];
        entry.index = 1.into();
        entry.chunk_count = 2.into();
        entry.compression = 3.into();
        entry.features = (features::ALIGNED | features::CAP_TAR_TOC).into();
        entry.uncompressed_size = 12288.into();
        entry.ci_offset = 400.into();
        entry.ci_compressed_size = 32.into();
        entry.ci_uncompressed_size = 32.into();
        let mut header = Header::new_zeroed();
        header.magic = MAGIC.into();
        header.magic2 = MAGIC.into();
        header.ci_entries = 2.into();
        header.ci_offset = 400.into();
        header.ci_compressed_size = 32.into();
        header.ci_uncompressed_size = 32.into();
        let rows = ci.iter().zip(0u32..).map(|(chunk, index)| {
            let mut row = ChunkRecord::new_zeroed();
            row.digest = [7; 32];
            row.blob_index = 1.into();
            row.index = index.into();
            row.flags = u32::from(chunk.compressed_size() != chunk.uncompressed_size()).into();
            row.compressed_size = chunk.compressed_size().into();
            row.uncompressed_size = chunk.uncompressed_size().into();
            row.compressed_offset = chunk.compressed_offset().into();
            row.uncompressed_offset = chunk.uncompressed_offset().into();
            row
        });
        let rows = rows.collect();
        Sample { entry, stored: [ci.as_bytes(), header.as_bytes()].concat(), rows }
    }

    fn map(sample: &Sample) -> Result<UnitMap, TablesError> {
        let tables = BlobTables::new(&sample.entry)?;
        tables.with_digests(&tables.geometry(&sample.stored)?, sample.rows.iter())
    }

    #[test]
    fn tables_give_each_chunk_its_place_recipe_and_check() {
        let map = map(&sample()).unwrap();

        assert_eq!(map.decoded_len(), 12288);
        let units: Vec<_> = map.units().iter().map(|u| (u.decoded.start(), u.stored.start(), u.recipe)).collect();
        assert_eq!(units, [(0, 0, Recipe::Zstd), (8192, 100, Recipe::Plain)]);
        assert!(map.units().iter().all(|u| u.check == Check::Blake3([7; 32])));
    }

    #[test]
    fn chunks_that_the_image_does_not_name_stay_unverifiable() {
        let mut sample = sample();
        sample.rows.pop();
        assert_eq!(map(&sample).unwrap().units()[1].check, Check::Unknown);
    }

    #[test]
    fn two_rows_that_promise_different_bytes_are_refused() {
        let mut sample = sample();
        sample.rows.push(ChunkRecord { digest: [8; 32], ..sample.rows[0] });
        assert!(matches!(map(&sample), Err(TablesError::Disagree { chunk: 0, .. })));
    }

    #[test]
    fn any_flipped_bit_gives_an_error_or_the_same_geometry() {
        let good = map(&sample()).unwrap();
        let places = |map: &UnitMap| map.units().iter().map(|u| (u.decoded, u.stored, u.recipe)).collect::<Vec<_>>();
        let (mut refused, mut accepted) = (0, 0);
        let mut check = |sample: &Sample| match map(sample) {
            Err(_) => refused += 1,
            Ok(map) => {
                accepted += 1;
                assert_eq!(places(&map), places(&good));
            }
        };
        let bits = |len: usize| (0..len * 8).map(|bit| (bit / 8, 1u8 << (bit % 8)));
        for (at, flip) in bits(32 + 64) {
            let mut bad = sample();
            bad.stored[at] ^= flip;
            check(&bad);
        }
        for (at, flip) in bits(size_of::<ChunkRecord>()) {
            let mut bad = sample();
            bad.rows[0].as_mut_bytes()[at] ^= flip;
            check(&bad);
        }
        assert!(refused > 700 && accepted > 100, "{refused} {accepted}");
    }

    #[test]
    fn hostile_sizes_are_refused_before_anything_is_allocated() {
        let refused = |change: fn(&mut BlobEntry)| {
            let mut sample = sample();
            change(&mut sample.entry);
            BlobTables::new(&sample.entry).is_err()
        };
        assert!(refused(|e| e.chunk_count = 0.into()));
        assert!(refused(|e| e.chunk_count = u32::MAX.into()));
        assert!(refused(|e| e.ci_uncompressed_size = u64::MAX.into()));
        assert!(refused(|e| e.ci_offset = u64::MAX.into()));
        assert!(refused(|e| e.uncompressed_size = u64::MAX.into()));
        assert!(refused(|e| {
            e.chunk_count = 0xff_ffff.into();
            e.ci_uncompressed_size = (0xff_ffff * 16).into();
        }));
        assert!(refused(|e| e.features = features::ENCRYPTED.into()));
    }
}
