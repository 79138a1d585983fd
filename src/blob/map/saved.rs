//! A map as it lies in a cache directory: our own format, guarded by a checksum.

use std::sync::Arc;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Memo, UnitMap, UnitMapError};
use crate::base::{BlobId, ByteRange, Digest};
use crate::blob::zran::Contexts;
use crate::blob::{BlobKey, Check, Part, Recipe, Unit};
use crate::codec::xts::{IV_LEN, KEY_LEN};

impl UnitMap {
    /// The map as bytes that [`UnitMap::from_bytes`] understands: our own format, for our own
    /// cache directory, guarded by a checksum.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(size_of::<SavedHead>() + self.units.len() * size_of::<SavedUnit>() + SUM_LEN);
        self.body(|unit| SavedUnit::from(unit), |piece| out.extend_from_slice(piece));
        let sum = blake3::hash(&out);
        out.extend_from_slice(sum.as_bytes());
        out
    }

    /// BLAKE3 of what [`UnitMap::to_bytes`] would give, had each unit become what `unit` makes of it.
    pub(super) fn digest_with(&self, unit: impl Fn(&Unit) -> Unit) -> Digest {
        let mut hasher = blake3::Hasher::new();
        self.body(
            |it| SavedUnit::from(&unit(it)),
            |piece| {
                hasher.update(piece);
            },
        );
        let sum = hasher.finalize();
        Digest(*hasher.update(sum.as_bytes()).finalize().as_bytes())
    }

    /// Hands `take` everything but the checksum, in pieces that fit into a processor's cache: maps have millions of bytes,
    /// and who only wants their digest need not have them all at once.
    fn body(&self, saved: impl Fn(&Unit) -> SavedUnit, mut take: impl FnMut(&[u8])) {
        let mut id = [0; BlobId::MAX_LEN];
        id[..self.blob.as_str().len()].copy_from_slice(self.blob.as_str().as_bytes());
        let head = SavedHead {
            magic: SAVED_MAGIC,
            id,
            decoded_len: self.decoded_len.into(),
            count: self.count().into(),
            flags: (if self.key.is_some() { HAS_KEY } else { 0 }
                | if self.is_listed { IS_LISTED } else { 0 }
                | if self.contexts.is_some() { HAS_CONTEXTS } else { 0 })
            .into(),
            key: self.key.as_ref().map_or([0; KEY_LEN], |key| *key.key()),
            iv: self.key.as_ref().map_or([0; IV_LEN], |key| *key.iv()),
        };
        take(head.as_bytes());
        let mut piece = Vec::with_capacity(PIECE * size_of::<SavedUnit>());
        for units in self.units.chunks(PIECE) {
            piece.clear();
            units.iter().for_each(|unit| piece.extend_from_slice(saved(unit).as_bytes()));
            take(&piece);
        }
        if let Some(contexts) = &self.contexts {
            piece.clear();
            contexts.save(&mut piece);
            take(&piece);
        }
    }

    /// Reads a saved map back. Any difference from what was saved is an error.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, UnitMapError> {
        let (body, sum) = bytes.split_last_chunk::<SUM_LEN>().ok_or(UnitMapError::Saved("too short"))?;
        if blake3::hash(body).as_bytes() != sum {
            return Err(UnitMapError::Saved("checksum mismatch"));
        }
        let (head, rest) =
            SavedHead::read_from_prefix(body).map_err(|_| UnitMapError::Saved("too short for its head"))?;
        if head.magic != SAVED_MAGIC {
            return Err(UnitMapError::Saved("unknown version"));
        }
        let (units, rest) = <[SavedUnit]>::ref_from_prefix_with_elems(rest, head.count.get() as usize)
            .map_err(|_| UnitMapError::Saved("too short for its records"))?;
        let id_len = head.id.iter().position(|&b| b == 0).unwrap_or(head.id.len());
        let blob = std::str::from_utf8(&head.id[..id_len])
            .ok()
            .and_then(|id| id.parse().ok())
            .ok_or(UnitMapError::Saved("impossible blob id"))?;
        let units = units
            .iter()
            .map(|saved| Unit::try_from(saved).map_err(UnitMapError::Saved))
            .collect::<Result<Vec<_>, _>>()?;
        let flags = head.flags.get();
        if flags & !(HAS_KEY | IS_LISTED | HAS_CONTEXTS) != 0 {
            return Err(UnitMapError::Saved("unknown flags"));
        }
        let key = BlobKey::new(head.key, head.iv).map_err(|_| UnitMapError::Saved("impossible key"));
        let key = if flags & HAS_KEY == 0 { None } else { Some(key?) };
        let contexts = match (flags & HAS_CONTEXTS != 0, rest.is_empty()) {
            (true, _) => Some(Arc::new(Contexts::saved(rest).map_err(UnitMapError::Saved)?)),
            (false, true) => None,
            (false, false) => return Err(UnitMapError::Saved("too long")),
        };
        let (decoded_len, is_listed) = (head.decoded_len.get(), flags & IS_LISTED != 0);
        Self { blob, decoded_len, units, key, contexts, is_listed, layout: Memo::default(), checkable: Memo::default() }
            .checked()
    }
}

const SAVED_MAGIC: [u8; 8] = *b"rafsdum2";
/// BLAKE3 of everything before it.
const SUM_LEN: usize = blake3::OUT_LEN;
/// How many units are saved at once.
const PIECE: usize = 512;
/// Bit of [`SavedHead::flags`]: the blob is encrypted.
const HAS_KEY: u32 = 0x1;
/// Bit of [`SavedHead::flags`]: units may be vacant.
const IS_LISTED: u32 = 0x2;
/// Bit of [`SavedHead::flags`]: behind the units come the contexts of a gzip file.
const HAS_CONTEXTS: u32 = 0x4;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SavedHead {
    magic: [u8; 8],
    id: [u8; 64],
    decoded_len: U64,
    count: U32,
    /// [`HAS_KEY`], [`IS_LISTED`], [`HAS_CONTEXTS`].
    flags: U32,
    key: [u8; KEY_LEN],
    iv: [u8; IV_LEN],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SavedUnit {
    decoded_start: U64,
    decoded_len: U32,
    stored_len: U32,
    stored_start: U64,
    recipe: u8,
    check: u8,
    /// 0 or 1.
    encrypted: u8,
    reserved: [u8; 5],
    part_at: U32,
    /// 0 for a unit that is no part.
    part_whole: U32,
    value: [u8; 32],
}

impl From<&Unit> for SavedUnit {
    fn from(unit: &Unit) -> Self {
        let small = |len: u64| u32::try_from(len).expect("a map refuses longer units").into();
        let (check, value) = match unit.check {
            Check::Unknown => (0, [0; 32]),
            Check::Blake3(digest) => (1, digest),
            Check::Sha256(digest) => (2, digest),
            Check::Crc32c(crc) => {
                let mut value = [0; 32];
                value[..4].copy_from_slice(&crc.to_le_bytes());
                (3, value)
            }
        };
        let recipe = match unit.recipe {
            Recipe::Plain => 0,
            Recipe::Lz4Block => 1,
            Recipe::Gzip => 2,
            Recipe::Zstd => 3,
            Recipe::GzipWindow => 4,
        };
        Self {
            decoded_start: unit.decoded.start().into(),
            decoded_len: small(unit.decoded.len()),
            stored_len: small(unit.stored.len()),
            stored_start: unit.stored.start().into(),
            recipe,
            check,
            encrypted: unit.encrypted.into(),
            reserved: [0; 5],
            part_at: unit.part.map_or(0, |part| part.at).into(),
            part_whole: unit.part.map_or(0, |part| part.whole).into(),
            value,
        }
    }
}

impl TryFrom<&SavedUnit> for Unit {
    type Error = &'static str;

    fn try_from(saved: &SavedUnit) -> Result<Self, &'static str> {
        let range = |start: U64, len: U32| ByteRange::at(start.get(), len.get().into()).ok_or("range overflows");
        let crc = || u32::from_le_bytes([saved.value[0], saved.value[1], saved.value[2], saved.value[3]]);
        Ok(Self {
            decoded: range(saved.decoded_start, saved.decoded_len)?,
            stored: range(saved.stored_start, saved.stored_len)?,
            recipe: match saved.recipe {
                0 => Recipe::Plain,
                1 => Recipe::Lz4Block,
                2 => Recipe::Gzip,
                3 => Recipe::Zstd,
                4 => Recipe::GzipWindow,
                _ => return Err("unknown recipe"),
            },
            check: match saved.check {
                0 => Check::Unknown,
                1 => Check::Blake3(saved.value),
                2 => Check::Sha256(saved.value),
                3 => Check::Crc32c(crc()),
                _ => return Err("unknown check"),
            },
            part: match saved.part_whole.get() {
                0 => None,
                whole => Some(Part { at: saved.part_at.get(), whole }),
            },
            encrypted: match saved.encrypted {
                0 => false,
                1 => true,
                _ => return Err("unknown encryption"),
            },
        })
    }
}
