use std::ops::Range;

use super::is_needed;
use crate::base::ByteRange;
use crate::base::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::blob::{UnitIndex, UnitMap};

/// Which units are in the device file: one bit each, readable without a lock.
#[derive(Debug)]
pub(super) struct Presence {
    words: Box<[AtomicU64]>,
    /// Number of set bits.
    count: AtomicU32,
}

/// Number of 64-bit words that hold a bit per unit.
pub(super) fn words_for(units: UnitIndex) -> usize {
    units.div_ceil(64) as usize
}

/// Word and mask of one unit's bit.
fn place(unit: UnitIndex) -> (usize, u64) {
    (unit as usize / 64, 1 << (unit % 64))
}

/// Whether `unit` is set in a plain copy of the bits.
pub(super) fn bit(words: &[u64], unit: UnitIndex) -> bool {
    let (word, mask) = place(unit);
    words[word] & mask != 0
}

/// Sets `unit` in a plain copy of the bits.
pub(super) fn set_bit(words: &mut [u64], unit: UnitIndex) {
    let (word, mask) = place(unit);
    words[word] |= mask;
}

/// Clears `unit` in a plain copy of the bits, if there is such a bit.
pub(super) fn clear_bit(words: &mut [u64], unit: UnitIndex) {
    let (word, mask) = place(unit);
    if let Some(word) = words.get_mut(word) {
        *word &= !mask;
    }
}

/// A plain copy of the bits of all checkable units that lie wholly in `ranges`. Costs a walk over
/// both, because a file may be in a million pieces.
pub(super) fn found(map: &UnitMap, ranges: &[ByteRange]) -> Vec<u64> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<ByteRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start() <= last.end() => *last = last.hull(range),
            _ => merged.push(range),
        }
    }
    let mut words = vec![0; words_for(map.count())];
    let mut merged = merged.into_iter().peekable();
    // Units are in order of their blocks, so what ends before this one is of no use to the next.
    for (index, unit) in (0..).zip(map.units()) {
        while merged.next_if(|range| range.end() <= unit.blocks().start()).is_some() {}
        if is_needed(unit) && merged.peek().is_some_and(|range| range.contains(unit.blocks())) {
            set_bit(&mut words, index);
        }
    }
    words
}

impl Presence {
    /// Starts from a plain copy of the bits.
    pub(super) fn new(words: &[u64]) -> Self {
        let count = words.iter().map(|word| word.count_ones()).sum();
        Self { words: words.iter().map(|&word| AtomicU64::new(word)).collect(), count: AtomicU32::new(count) }
    }

    /// Whether `unit` is present. Whoever sees `true` also sees the unit's bytes in the file.
    pub(super) fn get(&self, unit: UnitIndex) -> bool {
        let (word, mask) = place(unit);
        self.words[word].load(Ordering::Acquire) & mask != 0
    }

    /// Whether all of `units` are present.
    pub(super) fn all(&self, mut units: Range<UnitIndex>) -> bool {
        units.all(|unit| self.get(unit))
    }

    /// Makes `unit` present; its bytes must be in the file. Tells whether it was absent before.
    pub(super) fn publish(&self, unit: UnitIndex) -> bool {
        let (word, mask) = place(unit);
        let fresh = self.words[word].fetch_or(mask, Ordering::AcqRel) & mask == 0;
        if fresh {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
        fresh
    }

    /// Number of units present.
    pub(super) fn count(&self) -> u32 {
        self.count.load(Ordering::Acquire)
    }

    /// The units that are present, in order. One that comes meanwhile may be among them.
    pub(super) fn present(&self) -> impl Iterator<Item = UnitIndex> + '_ {
        (0..).zip(&self.words).flat_map(|(number, word)| {
            let mut left = word.load(Ordering::Acquire);
            std::iter::from_fn(move || {
                let lowest = left.trailing_zeros();
                left = left.checked_sub(1)? & left;
                Some(number * u64::BITS + lowest)
            })
        })
    }

    /// A plain copy of the bits.
    pub(super) fn snapshot(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Makes `unit` absent.
    pub(super) fn withdraw_one(&self, unit: UnitIndex) {
        let (word, mask) = place(unit);
        if self.words[word].fetch_and(!mask, Ordering::AcqRel) & mask != 0 {
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Makes every unit absent that is not in `keep`.
    pub(super) fn withdraw(&self, keep: &[u64]) {
        for (word, &keep) in self.words.iter().zip(keep) {
            let lost = word.fetch_and(keep, Ordering::AcqRel) & !keep;
            self.count.fetch_sub(lost.count_ones(), Ordering::AcqRel);
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_once_and_withdrawn_exactly() {
        let presence = Presence::new(&[1 << 3, 0]);

        assert!(presence.publish(64));
        assert!(!presence.publish(64), "already there");
        assert!(presence.publish(4));
        assert_eq!((presence.count(), presence.all(3..5), presence.all(3..6)), (3, true, false));
        assert_eq!(presence.present().collect::<Vec<_>>(), [3, 4, 64]);

        presence.publish(127);
        assert_eq!(presence.present().last(), Some(127));
        presence.withdraw(&[1 << 3, 0]);
        assert_eq!((presence.count(), presence.get(3), presence.get(4), presence.get(64)), (1, true, false, false));
    }
}
