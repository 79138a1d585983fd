//! One checked row of the blob table: what kind of blob it is, and where its tables lie.

use super::TablesError;
use super::map::{MAX_DECODED, MAX_UNITS};
use crate::base::{BLOCK, BlobId, ByteRange, Digest};
use crate::codec::xts::BlobKey;
use crate::format::blobfile::{ChunkInfoV1, ChunkInfoV2, features};
use crate::format::rafs::{Algorithm, BlobEntry, DigestAlgorithm};

/// What a blob is, as far as reading it is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlobKind {
    /// Chunks in a file of RAFS's own layout, alone or in batches, encrypted or not.
    Native,
    /// An index into a gzip file that somebody else made: the chunks are ranges of its plain stream.
    Zran,
    /// A plain tar file, which is its own device.
    Tarfs,
    /// A generated chunk dictionary: only some of the chunks of an existing blob, numbered anew.
    Dictionary,
    /// Chunks and nothing else, as RAFS v5 stores them: its units are those that bootstraps list.
    Listed,
}

impl BlobKind {
    /// What to call a blob of this kind in a sentence.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "a native blob",
            Self::Zran => "an index into a foreign gzip layer",
            Self::Tarfs => "a plain tar layer",
            Self::Dictionary => "a generated chunk dictionary",
            Self::Listed => "a blob without tables",
        }
    }
}

/// A chunk-info array may not grow to more than this many times its stored size: real ones reach
/// about 8, and a hostile one must not make a few bytes claim hundreds of megabytes.
const MAX_CI_RATIO: u64 = 256;
/// The same where the array has dictionaries of plain text behind it, which may be all alike.
const MAX_ZRAN_RATIO: u64 = 4096;
/// Largest stored blob in bytes (`rafs-v6.md` section 5).
pub(super) const MAX_STORED: u64 = 1 << 40;
/// Value of `cipher` for AES-128-XTS, the only one in use (`blob.md` section 9).
const AES_128_XTS: u32 = 1;

/// The facts in a row of the blob table, checked.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) blob: BlobId,
    /// The file that holds the tables: another one if the chunks lie in a foreign file.
    pub(super) home: BlobId,
    pub(super) kind: BlobKind,
    pub(super) index: u32,
    pub(super) count: u32,
    pub(super) decoded_len: u64,
    /// Chunk data lies below this byte of the blob file.
    pub(super) data_end: u64,
    pub(super) compression: Algorithm,
    pub(super) digest: DigestAlgorithm,
    pub(super) features: u32,
    pub(super) key: Option<BlobKey>,
    pub(super) ci_compression: Algorithm,
    /// Empty for a blob without tables.
    pub(super) ci_stored: ByteRange,
    pub(super) ci_plain_len: usize,
}

impl Entry {
    pub(super) fn new(row: &BlobEntry) -> Result<Self, TablesError> {
        let blob = BlobId::from_padded(&row.id)?;
        let set = row.features.get();
        let field = |field, value: u64| TablesError::Field { blob: blob.clone(), field, value };
        let kind = kind(set).ok_or(field("features", set.into()))?;
        let kind = if kind == BlobKind::Native && row.has_no_tables() { BlobKind::Listed } else { kind };
        if set & features::EXTERNAL != 0 {
            return Err(TablesError::Unsupported { blob, kind: "an external object" });
        }
        let algorithm = |name, number: u32| Algorithm::from_number(number).ok_or(field(name, number.into()));
        let compression = algorithm("compression", row.compression.get())?;
        let ci_compression = algorithm("chunk-info compression", row.ci_compression.get())?;
        let digest =
            DigestAlgorithm::from_number(row.digest.get()).ok_or(field("digest algorithm", row.digest.get().into()))?;
        if row.uncompressed_size.get() > MAX_DECODED {
            return Err(field("decoded size", row.uncompressed_size.get()));
        }
        let ci = match kind {
            BlobKind::Tarfs => ByteRange::default(),
            BlobKind::Listed => listed_sizes(row, &blob)?,
            BlobKind::Native | BlobKind::Zran | BlobKind::Dictionary => chunk_info(row, kind, &blob)?,
        };
        Ok(Self {
            home: home(row, &blob)?,
            kind,
            index: row.index.get(),
            count: row.chunk_count.get(),
            decoded_len: row.uncompressed_size.get(),
            data_end: data_end(row, kind).ok_or(field("offset of the chunk-info array", row.ci_offset.get()))?,
            compression,
            digest,
            features: set,
            key: key(row).ok_or(field("cipher", row.cipher.get().into()))?,
            ci_compression,
            ci_stored: ci,
            ci_plain_len: usize::try_from(row.ci_uncompressed_size.get())
                .map_err(|_| field("size of the chunk-info array", row.ci_uncompressed_size.get()))?,
            blob,
        })
    }

    pub(super) fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }

    /// Bytes of one chunk-info entry.
    pub(super) fn entry_size(&self) -> usize {
        entry_size(self.features)
    }

    /// Length of the device, whole blocks.
    pub(super) fn device_len(&self) -> u64 {
        self.decoded_len.next_multiple_of(BLOCK)
    }

    pub(super) fn damaged(&self, what: &'static str) -> TablesError {
        TablesError::Damaged { blob: self.blob.clone(), what }
    }
}

fn entry_size(set: u32) -> usize {
    if set & features::CHUNK_INFO_V2 != 0 { size_of::<ChunkInfoV2>() } else { size_of::<ChunkInfoV1>() }
}

/// The kind that a combination of features stands for, or `None` for one that means nothing
/// (`blob.md` section 5).
fn kind(set: u32) -> Option<BlobKind> {
    let has = |feature| set & feature != 0;
    let is_long = has(features::BATCH) || has(features::ZRAN) || has(features::ENCRYPTED);
    // A key lies where the name of a separate file would.
    let is_sound = set & !features::KNOWN == 0
        && (!is_long || has(features::CHUNK_INFO_V2))
        && !(has(features::ENCRYPTED) && has(features::SEPARATE))
        && !(has(features::ZRAN) && (has(features::BATCH) || has(features::ENCRYPTED)));
    let kind = if has(features::TARFS) {
        BlobKind::Tarfs
    } else if has(features::IS_CHUNKDICT_GENERATED) {
        BlobKind::Dictionary
    } else if has(features::ZRAN) {
        BlobKind::Zran
    } else {
        BlobKind::Native
    };
    is_sound.then_some(kind)
}

/// An empty range, if the sizes of a blob without tables are possible.
fn listed_sizes(row: &BlobEntry, blob: &BlobId) -> Result<ByteRange, TablesError> {
    let field = |field, value: u64| TablesError::Field { blob: blob.clone(), field, value };
    let (count, stored) = (row.chunk_count.get(), row.compressed_size.get());
    if count == 0 || count as usize > MAX_UNITS {
        return Err(field("chunk count", count.into()));
    }
    if stored > MAX_STORED { Err(field("stored size", stored)) } else { Ok(ByteRange::default()) }
}

/// Where the chunk-info array lies, if its sizes are possible (`rafs-v6.md` section 5).
fn chunk_info(row: &BlobEntry, kind: BlobKind, blob: &BlobId) -> Result<ByteRange, TablesError> {
    let field = |field, value: u64| TablesError::Field { blob: blob.clone(), field, value };
    let set = row.features.get();
    let (count, plain) = (row.chunk_count.get(), row.ci_uncompressed_size.get());
    let entries = u64::from(count) * entry_size(set) as u64;
    let has_contexts = set & (features::BATCH | features::ZRAN | features::ENCRYPTED) != 0;
    let fits = match kind {
        // Its numbers are those of a blob with other chunks besides.
        BlobKind::Dictionary => plain >= entry_size(set) as u64,
        _ if has_contexts => plain >= entries,
        _ => plain == entries,
    };
    if count == 0 || count as usize > MAX_UNITS || !fits {
        return Err(field("chunk count", count.into()));
    }
    let ratio = if set & features::ZRAN == 0 { MAX_CI_RATIO } else { MAX_ZRAN_RATIO };
    let stored = row.ci_compressed_size.get();
    if stored == 0 || stored > plain || plain / ratio > stored {
        return Err(field("stored size of the chunk-info array", stored));
    }
    // A context takes 40 bytes and has a chunk of 24, or a dictionary of 32 KiB besides.
    let most = if set & features::ZRAN == 0 { 64 * MAX_UNITS as u64 } else { MAX_ZRAN_PLAIN };
    if plain > most {
        return Err(field("size of the chunk-info array", plain));
    }
    let offset = row.ci_offset.get();
    ByteRange::at(offset, stored)
        .filter(|range| range.end() <= MAX_STORED)
        .ok_or(field("offset of the chunk-info array", offset))
}

/// Largest array with dictionaries: a context for every 2 MiB of 16 GiB.
const MAX_ZRAN_PLAIN: u64 = 512 << 20;

/// Where the data of the chunks ends (`blob.md` section 2).
fn data_end(row: &BlobEntry, kind: BlobKind) -> Option<u64> {
    let set = row.features.get();
    let has = |feature| set & feature != 0;
    if matches!(kind, BlobKind::Tarfs | BlobKind::Listed) || has(features::SEPARATE) || !has(features::CAP_TAR_TOC) {
        return Some(row.compressed_size.get());
    }
    row.ci_offset.get().checked_sub(if has(features::HAS_TAR_HEADER) { 512 } else { 0 })
}

/// The file with the tables. A foreign file has them in another one, named by its digest.
fn home(row: &BlobEntry, blob: &BlobId) -> Result<BlobId, TablesError> {
    if row.features.get() & features::SEPARATE == 0 {
        return Ok(blob.clone());
    }
    if row.meta_digest == [0; 32] {
        // Whoever takes a bootstrap out of a file knows its name and fills it in.
        return Err(TablesError::Damaged { blob: blob.clone(), what: "nobody says which file has its tables" });
    }
    Ok(Digest(row.meta_digest).to_string().parse()?)
}

/// The key of an encrypted blob, `Some(None)` for any other, `None` if it makes no sense.
fn key(row: &BlobEntry) -> Option<Option<BlobKey>> {
    let is_encrypted = row.features.get() & features::ENCRYPTED != 0;
    match row.cipher.get() {
        0 if !is_encrypted => Some(None),
        AES_128_XTS if is_encrypted => {
            let mut iv = [0; 16];
            iv[..8].copy_from_slice(&row.meta_size.to_bytes());
            iv[8..].copy_from_slice(&row.cipher_iv.to_bytes());
            BlobKey::new(row.meta_digest, iv).ok().map(Some)
        }
        _ => None,
    }
}
