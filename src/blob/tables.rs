//! The tables of a blob: from chunk-info bytes and digests to a [`UnitMap`].

use std::sync::Arc;

use zerocopy::FromBytes;

use super::batch::Batches;
use super::entry::{BlobKind, Entry};
use super::map::find;
use super::{BlobKey, Check, Recipe, Unit, UnitMap, UnitMapError, zran};
use crate::base::{BLOCK, BlobId, ByteRange, InvalidBlobId};
use crate::codec::{self, CodecError};
use crate::format::blobfile::{BatchContext, ChunkInfoV1, ChunkInfoV2, Header, MAGIC, ZranContext, features};
use crate::format::rafs::{Algorithm, BlobEntry, ChunkRecord, DigestAlgorithm, chunk_flags};

/// Where a blob keeps its tables, and how to read them: one checked row of the blob table.
#[derive(Clone, Debug)]
pub struct BlobTables {
    pub(super) entry: Entry,
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

/// The tables as they lie in the file, decrypted, decompressed and cut.
struct Plain {
    bytes: Vec<u8>,
    /// Where the entries end and the contexts begin.
    entries: usize,
    /// Where the contexts end and the dictionaries begin.
    contexts: usize,
}

impl BlobTables {
    /// Checks one row of the blob table.
    pub fn new(entry: &BlobEntry) -> Result<Self, TablesError> {
        Ok(Self { entry: Entry::new(entry)? })
    }

    /// The blob these are the tables of.
    pub fn blob(&self) -> &BlobId {
        &self.entry.blob
    }

    /// What kind of blob it is.
    pub fn kind(&self) -> BlobKind {
        self.entry.kind
    }

    /// The file that [`BlobTables::stored`] is a range of. Another one than the blob itself if the
    /// chunks lie in a foreign file.
    pub fn home(&self) -> &BlobId {
        &self.entry.home
    }

    /// The key of an encrypted blob.
    pub fn key(&self) -> Option<&BlobKey> {
        self.entry.key.as_ref()
    }

    /// Length of the device in bytes, whole blocks.
    pub fn decoded_len(&self) -> u64 {
        self.entry.device_len()
    }

    /// Chunks lie below this byte of the blob file.
    pub fn data_end(&self) -> u64 {
        self.entry.data_end
    }

    /// What compressed chunks are compressed with.
    pub fn compression(&self) -> Algorithm {
        self.entry.compression
    }

    /// What digests of chunks are made with.
    pub fn digest(&self) -> DigestAlgorithm {
        self.entry.digest
    }

    /// The bytes of the blob file that [`BlobTables::geometry`] wants: the chunk-info array and
    /// the header behind it. Empty for a blob that has no tables.
    pub fn stored(&self) -> ByteRange {
        let ci = self.entry.ci_stored;
        let header = if ci.is_empty() { 0 } else { size_of::<Header>() as u64 };
        ByteRange::new(ci.start(), ci.end() + header).expect("bounded by Entry::new()")
    }

    /// Fails if units of this blob cannot be served. Those of a plain tar layer can as soon as they have digests,
    /// which the whole layer has to be read for.
    pub fn ensure_servable(&self) -> Result<(), TablesError> {
        match self.entry.kind {
            BlobKind::Native | BlobKind::Zran | BlobKind::Listed | BlobKind::Tarfs => Ok(()),
            kind => Err(TablesError::Unsupported { blob: self.entry.blob.clone(), kind: kind.name() }),
        }
    }

    /// Makes the unit map from the bytes of [`BlobTables::stored`]. Units get a check only where
    /// the blob itself carries one (a CRC); [`BlobTables::with_digests`] adds the image's. A blob
    /// without tables has no units yet.
    pub fn geometry(&self, stored: &[u8]) -> Result<UnitMap, TablesError> {
        match self.entry.kind {
            BlobKind::Tarfs => self.map(self.tar_units()),
            BlobKind::Listed => self.map(Vec::new()),
            _ if self.entry.has(features::ZRAN) => self.gzip_map(&self.open(stored)?),
            _ => self.map(self.chunk_units(&self.open(stored)?)?),
        }
    }

    /// Adds to `map` the digests that the image's chunk table names for this blob. Rows of other
    /// blobs are passed over. If the blob has no tables, the rows are all there is to tell of it, and
    /// `map` is passed over.
    ///
    /// # Errors
    /// If a row and the map place the same chunk differently, or two rows promise different bytes.
    pub fn with_digests<'a>(
        &self,
        map: UnitMap,
        rows: impl Iterator<Item = &'a ChunkRecord>,
    ) -> Result<UnitMap, TablesError> {
        if self.entry.kind == BlobKind::Listed {
            return self.listed(rows);
        }
        let contexts = map.contexts().cloned();
        // Millions of them in a large image: they are changed where they are.
        let mut units = map.into_units();
        let mut named = vec![false; units.len()];
        let of_tar = self.entry.kind == BlobKind::Tarfs;
        for row in rows.filter(|row| row.blob_index.get() == self.entry.index && !of_tar) {
            let chunk = row.index.get();
            let disagree = || TablesError::Disagree { blob: self.entry.blob.clone(), chunk };
            // A generated dictionary counts its own chunks and not those of the blob.
            let number = match self.entry.kind {
                BlobKind::Dictionary => find(&units, row.uncompressed_offset.get()).ok_or_else(disagree)?,
                _ => chunk,
            };
            let unit = units.get_mut(number as usize).ok_or_else(disagree)?;
            if !self.is_same_place(unit, row) {
                return Err(disagree());
            }
            let check = self.promised(row);
            if named[number as usize] && check != unit.check {
                return Err(disagree());
            }
            named[number as usize] = true;
            if check != Check::Unknown {
                unit.check = check;
            }
        }
        Ok(self.map(units)?.entered(contexts))
    }

    fn map(&self, units: Vec<Unit>) -> Result<UnitMap, TablesError> {
        let (blob, key) = (self.entry.blob.clone(), self.entry.key.clone());
        UnitMap::with_key(blob, self.entry.decoded_len, units, key)
            .map_err(|cause| TablesError::Map { blob: self.entry.blob.clone(), cause })
    }

    /// Whether a row of the chunk table means the unit with its number.
    fn is_same_place(&self, unit: &Unit, row: &ChunkRecord) -> bool {
        let flags = row.flags.get();
        let is_same_decoded = unit.decoded.start() == row.uncompressed_offset.get()
            && unit.decoded.len() == u64::from(row.uncompressed_size.get());
        let is_same_stored = unit.stored.start() == row.compressed_offset.get()
            && unit.stored.len() == u64::from(row.compressed_size.get());
        is_same_decoded
            && match (self.entry.kind, unit.part) {
                // Positions of an inflater when it met the chunk, no ranges (`blob.md` section 11.1).
                (BlobKind::Zran, _) => true,
                // Rows of members name no place, and their flags are those of the chunk before it
                // became a member (`blob.md` section 11.3).
                (_, Some(_)) => is_same_stored || row.compressed_offset.get() == 0 && row.compressed_size.get() == 0,
                (_, None) => {
                    is_same_stored
                        && (unit.recipe == Recipe::Plain) == (flags & chunk_flags::COMPRESSED == 0)
                        && unit.encrypted == (flags & chunk_flags::ENCRYPTED != 0)
                }
            }
    }

    /// What a row promises about the plain bytes: its digest, its CRC where it carries none.
    pub(super) fn promised(&self, row: &ChunkRecord) -> Check {
        if row.digest != [0; 32] {
            return Check::of(self.entry.digest, row.digest);
        }
        let has_crc = row.flags.get() & chunk_flags::HAS_CRC32 != 0;
        if has_crc { Check::Crc32c(row.crc32.get()) } else { Check::Unknown }
    }

    /// Decrypts, decompresses and cuts the tables.
    fn open(&self, stored: &[u8]) -> Result<Plain, TablesError> {
        let entry = &self.entry;
        if stored.len() as u64 != self.stored().len() || stored.len() < size_of::<Header>() {
            return Err(entry.damaged("the tables have another length than the image says"));
        }
        let (ci, header) = stored.split_at(stored.len() - size_of::<Header>());
        let (ci, header) = (self.decrypt(ci)?, self.decrypt(header)?);
        let header = Header::ref_from_bytes(&header).map_err(|_| entry.damaged("the header is cut"))?;
        self.check_header(header)?;
        let mut bytes = vec![0; entry.ci_plain_len];
        let codec = |cause| TablesError::Codec { blob: entry.blob.clone(), cause };
        match entry.ci_compression {
            Algorithm::None if ci.len() == bytes.len() => bytes.copy_from_slice(&ci),
            Algorithm::None => return Err(entry.damaged("the chunk-info array has another length than the image says")),
            Algorithm::Lz4Block => codec::lz4_block_decode(&ci, &mut bytes).map_err(codec)?,
            Algorithm::Gzip => codec::gzip_decode(&ci, &mut bytes).map_err(codec)?,
            Algorithm::Zstd => codec::zstd_decode(&ci, &mut bytes).map_err(codec)?,
        }
        let (entries, contexts) = self.cut(header)?;
        Ok(Plain { bytes, entries, contexts })
    }

    fn decrypt<'a>(&self, stored: &'a [u8]) -> Result<std::borrow::Cow<'a, [u8]>, TablesError> {
        let Some(key) = &self.entry.key else { return Ok(stored.into()) };
        let mut text = stored.to_vec();
        key.decrypt(&mut text).map_err(|cause| TablesError::Codec { blob: self.entry.blob.clone(), cause })?;
        Ok(text.into())
    }

    fn check_header(&self, header: &Header) -> Result<(), TablesError> {
        let entry = &self.entry;
        let is_renumbered = entry.kind == BlobKind::Dictionary;
        let agrees = header.magic.get() == MAGIC
            && header.magic2.get() == MAGIC
            && (header.ci_entries.get() == entry.count || is_renumbered)
            && header.ci_compression.get() == entry.ci_compression.number()
            && header.ci_offset.get() == entry.ci_stored.start()
            && header.ci_compressed_size.get() == entry.ci_stored.len()
            && header.ci_uncompressed_size.get() == entry.ci_plain_len as u64;
        // The one documented difference is in bits that describe the bootstrap's place.
        let layout = features::CHUNK_INFO_V2 | features::BATCH | features::ZRAN | features::ENCRYPTED;
        let same_kind = (header.features.get() ^ entry.features) & layout == 0;
        if agrees && same_kind { Ok(()) } else { Err(entry.damaged("its header is not the one the image describes")) }
    }

    /// Where entries and contexts end in the plain array (`blob.md` section 4.1).
    fn cut(&self, header: &Header) -> Result<(usize, usize), TablesError> {
        let entry = &self.entry;
        let wrong = || entry.damaged("the parts of its chunk-info array do not fit together");
        let entries = (header.ci_entries.get() as usize).checked_mul(entry.entry_size()).ok_or_else(wrong)?;
        let count = header.ci_zran_count.get() as usize;
        let (record, has_tail) = match (entry.has(features::BATCH), entry.has(features::ZRAN)) {
            (_, true) => (size_of::<ZranContext>(), true),
            (true, false) => (size_of::<BatchContext>(), false),
            (false, false) => return if entries == entry.ci_plain_len { Ok((entries, entries)) } else { Err(wrong()) },
        };
        let contexts = count.checked_mul(record).and_then(|len| entries.checked_add(len)).ok_or_else(wrong)?;
        let fits = if has_tail { contexts <= entry.ci_plain_len } else { contexts == entry.ci_plain_len };
        let says = count == 0
            || header.ci_zran_offset.get() == entries as u64
                && header.ci_zran_size.get() == (entry.ci_plain_len - entries.min(entry.ci_plain_len)) as u64;
        if fits && says { Ok((entries, contexts)) } else { Err(wrong()) }
    }

    fn contexts(&self, plain: &Plain) -> Result<zran::Contexts, TablesError> {
        let rows = self.rows::<ZranContext>(&plain.bytes[plain.entries..plain.contexts])?;
        zran::Contexts::new(rows, &plain.bytes[plain.contexts..], self.entry.data_end)
            .map_err(|what| self.entry.damaged(what))
    }

    fn rows<'a, T>(&self, bytes: &'a [u8]) -> Result<&'a [T], TablesError>
    where
        T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
    {
        <[T]>::ref_from_bytes(bytes).map_err(|_| self.entry.damaged("the chunk-info array is ragged"))
    }

    fn chunk_units(&self, plain: &Plain) -> Result<Vec<Unit>, TablesError> {
        let entry = &self.entry;
        let entries = &plain.bytes[..plain.entries];
        if !entry.has(features::CHUNK_INFO_V2) {
            return all(self.rows::<ChunkInfoV1>(entries)?.iter().map(|row| self.short_unit(row)));
        }
        let rows = self.rows::<ChunkInfoV2>(entries)?.iter();
        let mut batches = Batches::new(self.rows::<BatchContext>(&plain.bytes[plain.entries..plain.contexts])?);
        all(rows.map(|row| self.long_unit(row, &mut batches)))
    }

    /// Of a blob that is an index into a gzip file.
    fn gzip_map(&self, plain: &Plain) -> Result<UnitMap, TablesError> {
        let contexts = self.contexts(plain)?;
        let rows = self.rows::<ChunkInfoV2>(&plain.bytes[..plain.entries])?;
        let units = all(rows.iter().map(|row| self.zran_unit(row, &contexts)))?;
        Ok(self.map(units)?.entered(Some(Arc::new(contexts))))
    }

    fn short_unit(&self, row: &ChunkInfoV1) -> Result<Unit, TablesError> {
        let (decoded_size, stored_size) = (row.uncompressed_size(), row.compressed_size());
        let stored = ByteRange::at(row.compressed_offset(), stored_size.into());
        let recipe = self.recipe(decoded_size != stored_size)?;
        self.unit((row.uncompressed_offset(), decoded_size), stored, recipe)
    }

    fn long_unit(&self, row: &ChunkInfoV2, batches: &mut Batches<'_>) -> Result<Unit, TablesError> {
        let entry = &self.entry;
        let flags = row.flags();
        let is = |flag| flags & flag != 0;
        let foreign = is(ChunkInfoV2::ZRAN)
            || is(ChunkInfoV2::BATCH) && !entry.has(features::BATCH)
            || is(ChunkInfoV2::ENCRYPTED) && !entry.has(features::ENCRYPTED);
        if foreign {
            return Err(entry.damaged("a chunk is of a kind that the blob does not announce"));
        }
        let decoded = (row.uncompressed_offset(), row.uncompressed_size());
        if is(ChunkInfoV2::BATCH) {
            let member = batches.member(row).map_err(|what| entry.damaged(what))?;
            // Whether the batch is compressed is not in the flags of its members: only its sizes
            // tell, and where it is encrypted, the decoder's look at it (`blob.md` section 11.3).
            let is_compressed = member.stored.len() != u64::from(member.part.whole);
            let is_plain = !is_compressed || entry.compression == Algorithm::None;
            let recipe = if is_plain { Recipe::Plain } else { self.recipe(true)? };
            let encrypted = entry.has(features::ENCRYPTED);
            let unit = self.unit(decoded, Some(member.stored), recipe)?;
            return Ok(Unit { part: Some(member.part), encrypted, ..unit });
        }
        let stored = ByteRange::at(row.compressed_offset(), row.compressed_size().into());
        let unit = self.unit(decoded, stored, self.recipe(is(ChunkInfoV2::COMPRESSED))?)?;
        let check = row.crc32c().map_or(Check::Unknown, Check::Crc32c);
        Ok(Unit { check, encrypted: is(ChunkInfoV2::ENCRYPTED), ..unit })
    }

    fn zran_unit(&self, row: &ChunkInfoV2, contexts: &zran::Contexts) -> Result<Unit, TablesError> {
        if row.flags() & (ChunkInfoV2::ZRAN | ChunkInfoV2::BATCH | ChunkInfoV2::ENCRYPTED) != ChunkInfoV2::ZRAN {
            return Err(self.entry.damaged("a chunk is of a kind that the blob does not announce"));
        }
        // Where the inflater was: of no use, but a sign of damage if it is outside.
        if row.compressed_offset() + u64::from(row.compressed_size()) > self.entry.data_end {
            return Err(self.entry.damaged("a chunk lies outside the blob's data"));
        }
        let (stored, part) = contexts.member(row).map_err(|what| self.entry.damaged(what))?;
        let decoded = (row.uncompressed_offset(), row.uncompressed_size());
        Ok(Unit { part: Some(part), ..self.unit(decoded, Some(stored), Recipe::GzipWindow)? })
    }

    /// A tar file in pieces: decoded and stored space are the same, and nothing has a digest
    /// (`blob.md` section 11.4). Its chunks start within blocks, so they are no units.
    fn tar_units(&self) -> Vec<Unit> {
        /// At most 65,536 pieces of even the longest file.
        const PIECES: u64 = 1 << 16;
        let len = self.entry.decoded_len.min(self.entry.data_end);
        let piece = len.div_ceil(PIECES).next_multiple_of(BLOCK).max(1 << 20);
        let unit = |number| {
            let range = ByteRange::at(number * piece, piece).expect("bounded by Entry::new()").clamp_end(len);
            Unit {
                decoded: range,
                stored: range,
                recipe: Recipe::Plain,
                check: Check::Unknown,
                part: None,
                encrypted: false,
            }
        };
        (0..len.div_ceil(piece)).map(unit).collect()
    }

    pub(super) fn recipe(&self, compressed: bool) -> Result<Recipe, TablesError> {
        Ok(match (compressed, self.entry.compression) {
            (false, _) => Recipe::Plain,
            (true, Algorithm::Lz4Block) => Recipe::Lz4Block,
            (true, Algorithm::Gzip) => Recipe::Gzip,
            (true, Algorithm::Zstd) => Recipe::Zstd,
            (true, Algorithm::None) => {
                return Err(self.entry.damaged("a chunk of an uncompressed blob is compressed"));
            }
        })
    }

    pub(super) fn unit(
        &self,
        (decoded_at, decoded_size): (u64, u32),
        stored: Option<ByteRange>,
        recipe: Recipe,
    ) -> Result<Unit, TablesError> {
        let out_of_range = || self.entry.damaged("a chunk is out of range");
        let decoded = ByteRange::at(decoded_at, decoded_size.into()).ok_or_else(out_of_range)?;
        let stored = stored.ok_or_else(out_of_range)?;
        if stored.end() > self.entry.data_end {
            return Err(self.entry.damaged("a chunk lies outside the blob's data"));
        }
        Ok(Unit { decoded, stored, recipe, check: Check::Unknown, part: None, encrypted: false })
    }
}

/// All of `units`, or the first error. Their memory is taken once, by how many rows there are; `collect` would not know that
/// and take it piece by piece.
fn all<E>(units: impl ExactSizeIterator<Item = Result<Unit, E>>) -> Result<Vec<Unit>, E> {
    let mut all = Vec::with_capacity(units.len());
    for unit in units {
        all.push(unit?);
    }
    Ok(all)
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
        tables.with_digests(tables.geometry(&sample.stored)?, sample.rows.iter())
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
        assert!(refused(|e| e.features = (features::ENCRYPTED | features::CHUNK_INFO_V2).into()), "no cipher");
        assert!(refused(|e| e.cipher = 1.into()), "a cipher without encryption");
    }

    // ---- batches and encryption -------------------------------------------------------------------

    use crate::format::blobfile::BatchContext;

    /// A whole blob file: a batch of three chunks, a chunk of its own, and the tables.
    struct Batched {
        entry: BlobEntry,
        file: Vec<u8>,
        rows: Vec<ChunkRecord>,
        plain: Vec<Vec<u8>>,
    }

    fn batched(key: Option<BlobKey>) -> Batched {
        let plain: Vec<Vec<u8>> = [(1u8, 300), (2, 40), (3, 5000), (4, 6000)].map(|(byte, len)| vec![byte; len]).into();
        let seal = |text: Vec<u8>| key.as_ref().map_or(text.clone(), |key| key.encrypt(&text));
        let mut zstd = codec::Compressor::zstd(3).unwrap();
        let mut pack = |text: &[u8]| seal(zstd.compress(text).unwrap().to_vec());
        let (batch, alone) = (pack(&plain[..3].concat()), pack(&plain[3]));
        let (batch_len, alone_len) = (u32::try_from(batch.len()).unwrap(), u32::try_from(alone.len()).unwrap());
        let encrypted = key.is_some();
        let flags = ChunkInfoV2::COMPRESSED | if encrypted { ChunkInfoV2::ENCRYPTED } else { 0 };
        let ci = [
            ChunkInfoV2::member((0, 300), 0, (0, 0), encrypted),
            ChunkInfoV2::member((4096, 40), 0, (0, 300), encrypted),
            ChunkInfoV2::member((8192, 5000), 0, (0, 340), encrypted),
            ChunkInfoV2::alone((16384, 6000), (batch_len.into(), alone_len), flags, Some(codec::crc32c(&plain[3]))),
        ];
        let mut context = BatchContext::new_zeroed();
        context.compressed_size = batch_len.into();
        context.uncompressed_size = 5340.into();
        let ci = seal([ci.as_bytes(), context.as_bytes()].concat());

        let set = features::ALIGNED | features::CAP_TAR_TOC | features::CHUNK_INFO_V2 | features::BATCH;
        let set = set | if encrypted { features::ENCRYPTED } else { 0 };
        let mut entry = BlobEntry::new_zeroed();
        entry.id = [b'a'; 64];
        entry.chunk_count = 4.into();
        entry.compression = 3.into();
        entry.features = set.into();
        entry.uncompressed_size = 24576.into();
        entry.ci_offset = u64::from(batch_len + alone_len).into();
        entry.ci_compressed_size = (ci.len() as u64).into();
        entry.ci_uncompressed_size = entry.ci_compressed_size;
        if let Some(key) = &key {
            entry.cipher = 1.into();
            entry.meta_digest = *key.key();
            entry.meta_size = u64::from_le_bytes(key.iv()[..8].try_into().unwrap()).into();
            entry.cipher_iv = u64::from_le_bytes(key.iv()[8..].try_into().unwrap()).into();
        }
        let mut header = Header::new_zeroed();
        (header.magic, header.magic2, header.features) = (MAGIC.into(), MAGIC.into(), set.into());
        header.ci_entries = 4.into();
        header.ci_offset = entry.ci_offset;
        header.ci_compressed_size = entry.ci_compressed_size;
        header.ci_uncompressed_size = entry.ci_uncompressed_size;
        header.ci_zran_offset = 96.into();
        header.ci_zran_size = 40.into();
        header.ci_zran_count = 1.into();

        let row = |index: u32| {
            let mut row = ChunkRecord::new_zeroed();
            let text = &plain[index as usize];
            row.digest = codec::blake3(text).0;
            row.index = index.into();
            row.flags = (u32::from(index == 3) * if encrypted { 5 } else { 1 }).into();
            row.uncompressed_size = u32::try_from(text.len()).unwrap().into();
            row.uncompressed_offset = [0, 4096, 8192, 16384][index as usize].into();
            if index == 3 {
                (row.compressed_offset, row.compressed_size) = (u64::from(batch_len).into(), alone_len.into());
            }
            row
        };
        let rows = (0..4).map(row).collect();
        Batched { entry, file: [batch, alone, ci, seal(header.as_bytes().to_vec())].concat(), rows, plain }
    }

    fn key() -> BlobKey {
        BlobKey::new(std::array::from_fn(|at| u8::try_from(at * 7).unwrap()), [0xee; 16]).unwrap()
    }

    /// Every chunk of a blob file, or the first thing that is wrong.
    fn read_chunks(blob: &Batched) -> Result<Vec<Vec<u8>>, String> {
        let cut = |range: ByteRange| {
            let (from, to) = (usize::try_from(range.start()).unwrap(), usize::try_from(range.end()).unwrap());
            blob.file.get(from..to).ok_or("a range outside the file".to_owned())
        };
        let tables = BlobTables::new(&blob.entry).map_err(|e| e.to_string())?;
        let map = tables.geometry(cut(tables.stored())?).map_err(|e| e.to_string())?;
        let map = tables.with_digests(map, blob.rows.iter()).map_err(|e| e.to_string())?;
        let mut decoder = super::super::Decoder::new();
        let read = |unit: &Unit| {
            let mut out = vec![0; usize::try_from(unit.blocks().len()).unwrap()];
            decoder.decode(map.key(), unit, cut(unit.stored)?, &mut out).map_err(|e| e.to_string())?;
            out.truncate(usize::try_from(unit.decoded.len()).unwrap());
            Ok(out)
        };
        map.units().iter().map(read).collect()
    }

    #[test]
    fn batches_are_read_plain_and_encrypted() {
        for key in [None, Some(key())] {
            let blob = batched(key);
            assert_eq!(read_chunks(&blob), Ok(blob.plain));
        }
    }

    #[test]
    fn any_flipped_bit_of_a_blob_or_its_rows_gives_an_error_or_the_same_bytes() {
        for key in [None, Some(key())] {
            let good = batched(key);
            let (mut refused, mut same) = (0, 0);
            let mut check = |bad: &Batched| match read_chunks(bad) {
                Err(_) => refused += 1,
                Ok(plain) => {
                    same += 1;
                    assert!(plain == good.plain);
                }
            };
            // All of the data and the array, and the part of the header that is not reserved.
            let tables = good.file.len() - size_of::<Header>();
            for bit in 0..(tables + 64) * 8 {
                let mut bad = Batched { file: good.file.clone(), rows: good.rows.clone(), plain: Vec::new(), ..good };
                bad.file[bit / 8] ^= 1 << (bit % 8);
                check(&bad);
            }
            for bit in 0..size_of::<ChunkRecord>() * 8 {
                for row in [0, 3] {
                    let mut rows = good.rows.clone();
                    rows[row].as_mut_bytes()[bit / 8] ^= 1 << (bit % 8);
                    check(&Batched { file: good.file.clone(), rows, plain: Vec::new(), ..good });
                }
            }
            assert!(refused > 1500 && same > 100, "{refused} {same}");
        }
    }

    #[test]
    fn hostile_contexts_and_flags_are_refused() {
        let refused = |change: &dyn Fn(&mut Batched)| {
            let mut blob = batched(None);
            change(&mut blob);
            read_chunks(&blob).is_err()
        };
        let ci = |blob: &Batched| usize::try_from(blob.entry.ci_offset.get()).unwrap();
        assert!(!refused(&|_| ()));
        assert!(
            refused(&|blob| {
                let at = ci(blob) + 96;
                blob.file[at + 4..at + 8].fill(0xff);
            }),
            "a batch of 4 GiB"
        );
        assert!(
            refused(&|blob| {
                let at = ci(blob) + 96;
                blob.file[at..at + 4].fill(0);
            }),
            "a batch of nothing"
        );
        assert!(
            refused(&|blob| {
                let at = ci(blob) + 20;
                blob.file[at..at + 4].fill(0xff);
            }),
            "a context that does not exist"
        );
        assert!(refused(&|blob| blob.entry.ci_uncompressed_size = (96 + 80).into()));
        assert!(refused(&|blob| blob.entry.features = (blob.entry.features.get() & !features::BATCH).into()));
        assert!(refused(&|blob| blob.entry.features = (blob.entry.features.get() | features::ZRAN).into()));
        assert!(refused(&|blob| blob.rows[0].compressed_size = 5.into()), "a member with a place of its own");
    }

    #[test]
    fn encrypted_blobs_need_a_key_that_is_one() {
        let refused = |change: &dyn Fn(&mut BlobEntry)| {
            let mut blob = batched(Some(key()));
            change(&mut blob.entry);
            BlobTables::new(&blob.entry).is_err()
        };
        assert!(refused(&|entry| entry.cipher = 0.into()));
        assert!(refused(&|entry| entry.cipher = 2.into()));
        assert!(refused(&|entry| entry.meta_digest = [3; 32]), "equal halves");
        assert!(refused(&|entry| entry.features = (entry.features.get() | features::SEPARATE).into()));
    }

    #[test]
    fn a_generated_dictionary_finds_its_chunks_by_place() {
        let mut sample = sample();
        sample.entry.features = (sample.entry.features.get() | features::IS_CHUNKDICT_GENERATED).into();
        sample.entry.chunk_count = 1.into();
        sample.rows.remove(0);
        sample.rows[0].index = 0.into();
        let map = map(&sample).unwrap();
        assert_eq!(
            map.units().iter().map(|unit| unit.check).collect::<Vec<_>>(),
            [Check::Unknown, Check::Blake3([7; 32])]
        );
    }

    #[test]
    fn blobs_of_the_time_before_2_2_have_data_up_to_their_end() {
        let mut sample = sample();
        sample.entry.features = features::ALIGNED.into();
        sample.entry.compressed_size = 400.into();
        assert!(map(&sample).is_ok());
        sample.entry.compressed_size = 399.into();
        assert!(matches!(map(&sample), Err(TablesError::Damaged { .. })));
    }
}
