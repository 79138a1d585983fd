mod saved;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::zran::Contexts;
use super::{BlobKey, Check, Decoder, MAX_UNIT, Recipe, Unit, UnitIndex};
use crate::base::{BLOCK, BlobId, ByteRange, Digest};

/// Every unit of one blob, ordered by decoded offset.
///
/// Holds by construction: units start on block boundaries, do not overlap, are between 1 byte and
/// [`MAX_UNIT`] long on both sides, and end within the device. Units that are parts of one stored
/// range agree about what it is, and no unit is encrypted unless there is a key.
///
/// A blob without tables of its own has a *listed* map: units have the numbers that images give
/// them, and those that no image has listed yet are *vacant*. They have no place and no bytes, and
/// [`UnitMap::merge`] fills them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitMap {
    blob: BlobId,
    decoded_len: u64,
    units: Vec<Unit>,
    key: Option<BlobKey>,
    /// How the blob is entered, if it is a gzip file that somebody else made.
    contexts: Option<Arc<Contexts>>,
    layout: Memo<Digest>,
    checkable: Memo<(UnitIndex, u64)>,
    is_listed: bool,
}

/// What was computed when somebody wanted it. Says nothing that the map does not say, and so makes no two maps differ;
/// a clone, which may be changed, starts without it.
#[derive(Debug)]
struct Memo<T>(OnceLock<T>);

impl<T> Default for Memo<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<T> Clone for Memo<T> {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl<T> PartialEq for Memo<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for Memo<T> {}

/// Why a list of units is not a map of a blob.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitMapError {
    /// Too many units for 24-bit chunk numbers.
    #[error("{0} units are more than a blob can have")]
    TooMany(usize),
    /// A unit breaks one of the rules that every map keeps.
    #[error("unit {unit} {rule}")]
    Unit { unit: usize, rule: &'static str },
    /// Saved bytes that are not a saved map.
    #[error("saved unit table is damaged: {0}")]
    Saved(&'static str),
}

/// Most units a blob can have: chunk numbers have 24 bits (`blob.md` section 1).
pub(super) const MAX_UNITS: usize = 0xff_ffff;

/// Longest decoded space of one blob in bytes (`rafs-v6.md` section 5: 2^44).
pub(super) const MAX_DECODED: u64 = 1 << 44;

const OTHER_WHOLE: &str = "disagrees with another part of its stored range";

/// What all parts of one stored range must agree in.
fn whole(unit: &Unit) -> (Option<u32>, Recipe, bool) {
    (unit.part.map(|part| part.whole), unit.recipe, unit.encrypted)
}

/// Checks that parts of one stored range agree, wherever they are. Builders write the parts of a
/// range one behind the other and ranges in order, so this memory is rarely needed.
fn check_shared(units: &[Unit]) -> Result<(), UnitMapError> {
    let mut shared = HashMap::new();
    for (index, unit) in units.iter().enumerate().filter(|(_, unit)| unit.part.is_some()) {
        if *shared.entry(unit.stored).or_insert_with(|| whole(unit)) != whole(unit) {
            return Err(UnitMapError::Unit { unit: index, rule: OTHER_WHOLE });
        }
    }
    Ok(())
}

impl UnitMap {
    /// Checks `units` and makes a map of them. `decoded_len` is the length of the device in bytes;
    /// it is rounded up to whole blocks.
    pub fn new(blob: BlobId, decoded_len: u64, units: Vec<Unit>) -> Result<Self, UnitMapError> {
        Self::with_key(blob, decoded_len, units, None)
    }

    /// The same for a blob whose units may be encrypted.
    pub fn with_key(
        blob: BlobId,
        decoded_len: u64,
        units: Vec<Unit>,
        key: Option<BlobKey>,
    ) -> Result<Self, UnitMapError> {
        Self {
            blob,
            decoded_len,
            units,
            key,
            contexts: None,
            is_listed: false,
            layout: Memo::default(),
            checkable: Memo::default(),
        }
        .checked()
    }

    /// The same units of a blob that is entered through `contexts`, if it is a gzip file.
    #[must_use]
    pub fn entered(self, contexts: Option<Arc<Contexts>>) -> Self {
        Self { contexts, layout: Memo::default(), ..self }
    }

    /// What [`UnitMap::entered`] was told.
    pub fn contexts(&self) -> Option<&Arc<Contexts>> {
        self.contexts.as_ref()
    }

    /// A decoder for units of this blob.
    pub fn decoder(&self) -> Decoder {
        self.contexts.as_ref().map_or_else(Decoder::new, |contexts| Decoder::with_windows(Arc::clone(contexts)))
    }

    /// A map of `count` units of which only the `known` are listed so far, by their numbers. A number
    /// that is not below `count` is passed over; of one that is there twice, the last unit counts.
    pub fn listed(
        blob: BlobId,
        decoded_len: u64,
        count: UnitIndex,
        known: impl IntoIterator<Item = (UnitIndex, Unit)>,
    ) -> Result<Self, UnitMapError> {
        if count as usize > MAX_UNITS {
            return Err(UnitMapError::TooMany(count as usize));
        }
        let mut units = vec![Unit::vacant(0); count as usize];
        for (index, unit) in known {
            if let Some(vacant) = units.get_mut(index as usize) {
                *vacant = unit;
            }
        }
        place_vacant(&mut units);
        Self {
            blob,
            decoded_len,
            units,
            key: None,
            contexts: None,
            is_listed: true,
            layout: Memo::default(),
            checkable: Memo::default(),
        }
        .checked()
    }

    /// Checks every rule and rounds the length up to whole blocks.
    fn checked(self) -> Result<Self, UnitMapError> {
        let Self { blob, decoded_len, units, key, contexts, is_listed, layout, .. } = self;
        if units.len() > MAX_UNITS {
            return Err(UnitMapError::TooMany(units.len()));
        }
        let decoded_len = decoded_len.min(MAX_DECODED).next_multiple_of(BLOCK);
        let (mut free_from, mut before, mut in_order) = (0, None::<&Unit>, true);
        for (index, unit) in units.iter().enumerate() {
            let rule = |rule| UnitMapError::Unit { unit: index, rule };
            if is_listed && unit.is_vacant() {
                if *unit != Unit::vacant(free_from) {
                    return Err(rule("is vacant, and not behind the one before it"));
                }
                continue;
            }
            check_sizes(unit).map_err(rule)?;
            if unit.decoded.start() < free_from {
                return Err(rule("overlaps the one before it"));
            }
            if unit.decoded.end() > decoded_len {
                return Err(rule("ends behind the end of the device"));
            }
            if unit.encrypted && key.is_none() {
                return Err(rule("is encrypted, and the blob has no key"));
            }
            if unit.part.is_some() {
                if before.is_some_and(|before| before.stored == unit.stored && whole(before) != whole(unit)) {
                    return Err(rule(OTHER_WHOLE));
                }
                let follows =
                    |before: &Unit| before.stored == unit.stored || before.stored.start() < unit.stored.start();
                in_order &= before.is_none_or(follows);
                before = Some(unit);
            }
            free_from = unit.blocks().end();
        }
        if !in_order {
            check_shared(&units)?;
        }
        Ok(Self { blob, decoded_len, units, key, contexts, is_listed, layout, checkable: Memo::default() })
    }

    /// Whether units may be vacant now and known later.
    pub fn is_listed(&self) -> bool {
        self.is_listed
    }

    /// The key of the blob, if it is encrypted.
    pub fn key(&self) -> Option<&BlobKey> {
        self.key.as_ref()
    }

    /// The blob this is a map of.
    pub fn blob(&self) -> &BlobId {
        &self.blob
    }

    /// Length of the device in bytes, whole blocks.
    pub fn decoded_len(&self) -> u64 {
        self.decoded_len
    }

    /// All units, in order.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// Number of units.
    pub fn count(&self) -> UnitIndex {
        UnitIndex::try_from(self.units.len()).expect("a map has at most 2^24 units")
    }

    /// The unit with this number, if there is one.
    pub fn get(&self, index: UnitIndex) -> Option<&Unit> {
        self.units.get(index as usize)
    }

    /// The unit whose blocks hold the byte at `decoded`.
    pub fn find(&self, decoded: u64) -> Option<UnitIndex> {
        find(&self.units, decoded)
    }

    /// All units, without what else is known of the blob.
    pub(super) fn into_units(self) -> Vec<Unit> {
        self.units
    }

    /// Numbers of the units that touch `decoded`, or `None` if some byte of it is in no unit, or a
    /// vacant one lies between them. An empty range touches nothing.
    pub fn covering(&self, decoded: ByteRange) -> Option<Range<UnitIndex>> {
        if decoded.is_empty() {
            return Some(0..0);
        }
        let first = self.find(decoded.start())?;
        let mut last = first;
        while self.units[last as usize].blocks().end() < decoded.end() {
            let next = self.units.get(last as usize + 1)?;
            if next.decoded.start() != self.units[last as usize].blocks().end() || next.is_vacant() {
                return None;
            }
            last += 1;
        }
        Some(first..last + 1)
    }

    /// Adds what `other` knows about how to check units of the same blob.
    ///
    /// An image names digests only for the chunks its own files use, so two images that share a
    /// blob each know a part; of a listed map also which units there are. Returns `None` if the two
    /// maps disagree about anything both know, or if their units do not go together: then they must
    /// not share a cache.
    pub fn merge(&self, other: &Self) -> Option<Self> {
        let same_blob = self.blob == other.blob && self.decoded_len == other.decoded_len && self.key == other.key;
        let same_entrances = match (&self.contexts, &other.contexts) {
            (Some(mine), Some(theirs)) => Arc::ptr_eq(mine, theirs) || mine == theirs,
            (mine, theirs) => mine.is_none() && theirs.is_none(),
        };
        if !same_blob || !same_entrances || self.units.len() != other.units.len() || self.is_listed != other.is_listed {
            return None;
        }
        let mut merged = self.clone();
        let mut grows = false;
        for (mine, theirs) in merged.units.iter_mut().zip(&other.units) {
            if theirs.is_vacant() {
                continue;
            }
            if mine.is_vacant() {
                (*mine, grows) = (*theirs, true);
                continue;
            }
            if (Unit { check: theirs.check, ..*mine }) != *theirs {
                return None;
            }
            match (mine.check, theirs.check) {
                (a, b) if a == b => {}
                (_, Check::Unknown) => {}
                (Check::Unknown, b) => mine.check = b,
                _ => return None,
            }
        }
        if !grows {
            return Some(merged);
        }
        place_vacant(&mut merged.units);
        merged.checked().ok()
    }

    /// Fingerprint of what stays the same as long as a cache of this map may grow: where its units
    /// lie, however they are checked. Of a listed map only how many there are: each keeps its place
    /// once it has one, because maps that place it elsewhere do not merge.
    pub fn layout(&self) -> Digest {
        let placed =
            |unit: &Unit| if self.is_listed { Unit::vacant(0) } else { Unit { check: Check::Unknown, ..*unit } };
        let compute = || self.digest_with(placed);
        *self.layout.0.get_or_init(compute)
    }

    /// How many units can be checked, and how many plain bytes they have together.
    pub fn checkable(&self) -> (UnitIndex, u64) {
        let compute = || {
            let checkable = self.units.iter().filter(|unit| unit.is_checkable());
            checkable.fold((0, 0), |(count, bytes), unit| (count + 1, bytes + unit.decoded.len()))
        };
        *self.checkable.0.get_or_init(compute)
    }

    /// The same units without the digests that images named for them; checks that the blob itself
    /// carries stay.
    #[must_use]
    pub fn without_digests(&self) -> Self {
        let mut bare = self.clone();
        for unit in &mut bare.units {
            if matches!(unit.check, Check::Blake3(_) | Check::Sha256(_)) {
                unit.check = Check::Unknown;
            }
        }
        bare
    }

    /// A digest over everything [`UnitMap::to_bytes`] keeps: two maps are equal exactly when
    /// their fingerprints are.
    pub fn fingerprint(&self) -> Digest {
        self.digest_with(Clone::clone)
    }
}

/// As [`UnitMap::find`], of the units of a map.
pub(super) fn find(units: &[Unit], decoded: u64) -> Option<UnitIndex> {
    let after = units.partition_point(|unit| unit.decoded.start() <= decoded);
    let index = after.checked_sub(1)?;
    (decoded < units[index].blocks().end()).then(|| UnitIndex::try_from(index).expect("bounded by a map"))
}

/// Puts each vacant unit behind the one before it, which is the only place where it may be.
fn place_vacant(units: &mut [Unit]) {
    let mut end = 0;
    for unit in units {
        if unit.is_vacant() {
            *unit = Unit::vacant(end);
        } else {
            // One that ends nowhere is refused by whoever checks the map.
            end = unit.decoded.align_out(BLOCK).map_or(end, ByteRange::end);
        }
    }
}

/// The rules that a unit keeps by itself.
fn check_sizes(unit: &Unit) -> Result<(), &'static str> {
    if !unit.decoded.start().is_multiple_of(BLOCK) {
        return Err("does not start on a block boundary");
    }
    if unit.decoded.is_empty() || unit.decoded.len() > MAX_UNIT {
        return Err("has a decoded size outside 1 byte to 16 MiB");
    }
    // Incompressible data may grow a little under a codec that is told not to give up.
    if unit.stored.is_empty() || unit.stored.len() > MAX_UNIT + MAX_UNIT / 16 {
        return Err("has a stored size outside 1 byte to 17 MiB");
    }
    if let Some(part) = unit.part
        && (u64::from(part.whole) > MAX_UNIT || u64::from(part.at) + unit.decoded.len() > part.whole.into())
    {
        return Err("is a part outside of its whole, or of one larger than 16 MiB");
    }
    let plain_len = if unit.encrypted { BlobKey::encrypted_len(unit.whole_len()) } else { unit.whole_len() };
    if unit.recipe == Recipe::Plain && unit.stored.len() != plain_len {
        return Err("is stored plain but with another size");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::Part;
    use crate::codec::xts::{IV_LEN, KEY_LEN};

    fn unit(start: u64, len: u64) -> Unit {
        Unit {
            decoded: ByteRange::at(start, len).unwrap(),
            stored: ByteRange::at(start / 2, len).unwrap(),
            recipe: Recipe::Plain,
            check: Check::Crc32c(u32::try_from(len).unwrap()),
            part: None,
            encrypted: false,
        }
    }

    /// A member of a batch of 100 plain bytes, compressed to 50.
    fn member(start: u64, at: u32, len: u64) -> Unit {
        let part = Some(Part { at, whole: 100 });
        let stored = ByteRange::at(1000, 50).unwrap();
        Unit { stored, recipe: Recipe::Zstd, part, ..unit(start, len) }
    }

    fn key(byte: u8) -> BlobKey {
        let mut bytes = [byte; KEY_LEN];
        bytes[0] ^= 1;
        BlobKey::new(bytes, [byte; IV_LEN]).unwrap()
    }

    fn map(units: &[Unit]) -> Result<UnitMap, UnitMapError> {
        UnitMap::new("blob".parse().unwrap(), 1 << 20, units.to_vec())
    }

    #[test]
    fn units_that_break_a_rule_are_refused() {
        let refused = |units: &[Unit]| matches!(map(units), Err(UnitMapError::Unit { .. }));
        assert!(refused(&[unit(1, 10)]), "unaligned");
        assert!(refused(&[unit(0, 0)]), "empty");
        assert!(refused(&[unit(0, MAX_UNIT + 1)]), "huge");
        assert!(refused(&[unit(0, 4097), unit(4096, 1)]), "padding overlaps");
        assert!(refused(&[unit(4096, 1), unit(0, 1)]), "unordered");
        assert!(refused(&[unit(1 << 20, 1)]), "behind the end");
        assert!(map(&[unit(0, 4097), unit(8192, 1)]).is_ok());

        assert!(refused(&[member(0, 91, 10)]), "outside of its whole");
        assert!(refused(&[member(0, u32::MAX, 10)]), "far outside of its whole");
        assert!(
            refused(&[Unit { part: Some(Part { at: 0, whole: (16 << 20) + 1 }), ..member(0, 0, 10) }]),
            "huge whole"
        );
        assert!(refused(&[Unit { recipe: Recipe::Plain, ..member(0, 0, 10) }]), "plain whole of another size");
        let other_whole = Unit { part: Some(Part { at: 0, whole: 99 }), ..member(4096, 0, 10) };
        assert!(refused(&[member(0, 0, 10), other_whole]), "parts of two wholes in one place");
        assert!(refused(&[member(0, 0, 10), Unit { recipe: Recipe::Gzip, ..member(4096, 0, 10) }]), "two recipes");
        assert!(refused(&[Unit { encrypted: true, ..unit(0, 20) }]), "no key");
        assert!(map(&[member(0, 0, 10), member(4096, 90, 10), unit(8192, 1)]).is_ok());
    }

    #[test]
    fn a_short_encrypted_unit_has_the_size_of_its_padding() {
        let keyed = |units| UnitMap::with_key("blob".parse().unwrap(), 1 << 20, units, Some(key(1)));
        let stored = |len| Unit { stored: ByteRange::at(0, len).unwrap(), encrypted: true, ..unit(0, 6) };
        assert!(keyed(vec![stored(18)]).is_ok());
        assert!(keyed(vec![stored(6)]).is_err());
        assert!(keyed(vec![Unit { encrypted: true, ..unit(0, 16) }]).is_ok());
    }

    #[test]
    fn a_range_is_covered_only_without_gaps() {
        let map = map(&[unit(0, 4097), unit(8192, 4096), unit(16384, 1)]).unwrap();
        let covering = |start, end| map.covering(ByteRange::new(start, end).unwrap());

        assert_eq!(covering(0, 1), Some(0..1));
        assert_eq!(covering(8191, 8193), Some(0..2));
        assert_eq!(covering(0, 12288), Some(0..2));
        assert_eq!(covering(0, 12289), None, "the gap at 12288");
        assert_eq!(covering(16384, 20480), Some(2..3), "padding belongs to its unit");
        assert_eq!(covering(16384, 20481), None, "nothing behind the last unit");
        assert_eq!(covering(5, 5), Some(0..0));
    }

    #[test]
    fn saved_maps_come_back_whole_or_not_at_all() {
        let units = vec![unit(0, 4097), Unit { encrypted: true, ..unit(8192, 4096) }, member(12288, 4, 96)];
        let map = UnitMap::with_key("blob".parse().unwrap(), 1 << 20, units, Some(key(3))).unwrap();
        let bytes = map.to_bytes();

        assert_eq!(UnitMap::from_bytes(&bytes), Ok(map));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(UnitMap::from_bytes(&bad).is_err(), "flip at {at}");
            assert!(UnitMap::from_bytes(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn digests_are_those_of_the_saved_bytes() {
        let whole = |map: &UnitMap| Digest(*blake3::hash(&map.to_bytes()).as_bytes());
        let known = |at: u64| Unit { check: Check::Blake3([7; 32]), ..unit(at * 4096, 4096) };
        // Directories are named by them, and caches of earlier releases carry them.
        for count in [0, 1, 511, 512, 513, 1500] {
            let map = UnitMap::new("blob".parse().unwrap(), 1 << 30, (0..count).map(known).collect()).unwrap();
            assert_eq!(map.fingerprint(), whole(&map), "{count} units");
            assert_eq!(map.layout(), whole(&map.without_digests()), "{count} units");
        }
        let one = listed(&[(0, unit(0, 4097)), (3, unit(16384, 10))]).unwrap();
        assert_eq!(one.fingerprint(), whole(&one));
    }

    #[test]
    fn what_is_counted_is_counted_anew_for_a_map_that_was_changed() {
        let known = Unit { check: Check::Blake3([7; 32]), ..unit(0, 4097) };
        let both = map(&[known, unit(8192, 10)]).unwrap();
        assert_eq!(both.checkable(), (2, 4107));
        assert_eq!(both.without_digests().checkable(), (1, 10));
        let one = listed(&[(0, unit(0, 4097))]).unwrap();
        assert_eq!(one.checkable(), (1, 4097));
        let more = one.merge(&listed(&[(3, unit(16384, 10))]).unwrap()).unwrap();
        assert_eq!(more.checkable(), (2, 4107));
    }

    fn listed(known: &[(UnitIndex, Unit)]) -> Result<UnitMap, UnitMapError> {
        UnitMap::listed("blob".parse().unwrap(), 1 << 20, 5, known.iter().copied())
    }

    #[test]
    fn a_listed_map_grows_and_keeps_its_layout() {
        let (first, third) = (unit(0, 4097), unit(16384, 10));
        let one = listed(&[(0, first), (3, third)]).unwrap();
        let other = listed(&[(1, unit(8192, 4096)), (3, third), (4, unit(24576, 1))]).unwrap();

        let both = one.merge(&other).unwrap();

        assert_eq!(Some(&both), other.merge(&one).as_ref(), "in whichever order");
        let all = [(0, first), (1, unit(8192, 4096)), (3, third), (4, unit(24576, 1))];
        assert_eq!(both, listed(&all).unwrap());
        assert_eq!((one.layout(), other.layout()), (both.layout(), both.layout()));
        assert_ne!(one.fingerprint(), both.fingerprint());
        assert_eq!(UnitMap::from_bytes(&both.to_bytes()), Ok(both.clone()));
        assert_eq!(UnitMap::from_bytes(&one.to_bytes()), Ok(one.clone()));
        assert_eq!(both.merge(&one), Some(both.clone()));
        let none = listed(&[]).unwrap();
        assert_eq!(none.merge(&both), Some(both.clone()));

        let plain = map(&[first, unit(8192, 4096), unit(12288, 1), third, unit(24576, 1)]).unwrap();
        assert_eq!(plain.merge(&both), None, "what has tables of its own is another thing");
        assert_ne!(plain.layout(), both.layout());
    }

    #[test]
    fn listed_maps_that_place_a_unit_differently_or_in_another_one_do_not_merge() {
        let one = listed(&[(0, unit(0, 4097)), (3, unit(16384, 10))]).unwrap();
        for (number, strange) in [
            (0, unit(0, 4096)),
            (3, unit(20480, 10)),
            (2, unit(4096, 10)),
            (2, unit(16384, 10)),
            (4, unit(8192, 1)),
            (3, Unit { check: Check::Crc32c(99), ..unit(16384, 10) }),
        ] {
            assert_eq!(one.merge(&listed(&[(number, strange)]).unwrap()), None, "{number} {strange:?}");
        }
    }

    #[test]
    fn nothing_leads_to_a_vacant_unit() {
        let map = listed(&[(1, unit(4096, 4096)), (3, unit(8192, 10))]).unwrap();
        let covering = |start, end| map.covering(ByteRange::new(start, end).unwrap());
        assert_eq!((map.find(0), map.find(4096), map.find(8192), map.find(12288)), (None, Some(1), Some(3), None));
        assert_eq!((covering(4096, 8192), covering(8192, 8193)), (Some(1..2), Some(3..4)));
        assert_eq!(covering(4096, 8193), None, "unit 2 may be anything");
        assert_eq!(listed(&[(3, unit(8192, 10)), (4, unit(0, 10))]).ok(), None, "numbers go with places");
    }

    #[test]
    fn maps_share_a_cache_only_if_they_agree() {
        let full = map(&[unit(0, 10), unit(4096, 10)]).unwrap();
        let mut part = full.clone();
        part.units[1].check = Check::Unknown;
        let mut lying = full.clone();
        lying.units[1].check = Check::Crc32c(99);

        assert_eq!(part.merge(&full), Some(full.clone()));
        assert_eq!(full.merge(&part), Some(full.clone()));
        assert_eq!(full.merge(&lying), None);
        assert_eq!(full.merge(&UnitMap { key: Some(key(1)), ..full.clone() }), None);
        let mut parted = full.clone();
        parted.units[0].part = Some(Part { at: 0, whole: 10 });
        assert_eq!(full.merge(&parted), None);
        assert_ne!(full.fingerprint(), part.fingerprint());
    }
}
