use crate::base::ByteRange;
use crate::blob::{Unit, UnitIndex};

/// How units are gathered into ranged reads. All sizes are stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlanLimits {
    /// Neighbours with at most this much between them share a read. Reading a little too much is
    /// cheaper than another round trip.
    pub(super) gap: u64,
    /// Longest read of units in more than one place.
    pub(super) window: u64,
}

/// One ranged read and the units it brings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) stored: ByteRange,
    /// In order of stored offset.
    pub(super) units: Vec<UnitIndex>,
}

/// Gathers `missing` units into ranged reads, ordered by stored offset.
///
/// Every unit is in exactly one read and lies wholly in it. A unit longer than a window is a read
/// of its own. Pure: the outcome depends on nothing else.
pub(super) fn plan(mut missing: Vec<(UnitIndex, Unit)>, limits: PlanLimits) -> Vec<Planned> {
    missing.sort_by_key(|(index, unit)| (unit.stored, *index));
    let mut reads: Vec<Planned> = Vec::new();
    for (index, unit) in missing {
        match reads.last_mut() {
            Some(read) if joins(read.stored, unit.stored, limits) => {
                read.stored = read.stored.hull(unit.stored);
                read.units.push(index);
            }
            _ => reads.push(Planned { stored: unit.stored, units: vec![index] }),
        }
    }
    reads
}

/// Whether a read of `read` does best to bring `unit`, which begins no earlier, as well.
fn joins(read: ByteRange, unit: ByteRange, limits: PlanLimits) -> bool {
    // What is in the read already costs nothing, however long it is: another member of a batch.
    read.contains(unit)
        || unit.start().saturating_sub(read.end()) <= limits.gap && read.hull(unit).len() <= limits.window
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::blob::{Check, Recipe};

    const LIMITS: PlanLimits = PlanLimits { gap: 64 << 10, window: 4 << 20 };

    fn unit(stored_start: u64, stored_len: u64) -> Unit {
        Unit {
            decoded: ByteRange::at(0, 4096).unwrap(),
            stored: ByteRange::at(stored_start, stored_len).unwrap(),
            recipe: Recipe::Zstd,
            check: Check::Crc32c(0),
            part: None,
            encrypted: false,
        }
    }

    fn check(units: &[(u64, u64)], want: &[(u64, u64, &[UnitIndex])]) {
        let missing = (0..).zip(units.iter().map(|&(start, len)| unit(start, len))).collect();
        let want: Vec<_> = want
            .iter()
            .map(|&(start, end, units)| Planned { stored: ByteRange::new(start, end).unwrap(), units: units.to_vec() })
            .collect();
        assert_eq!(plan(missing, LIMITS), want, "{units:?}");
    }

    #[test]
    fn neighbours_share_a_read() {
        check(&[], &[]);
        check(&[(10, 5), (15, 5)], &[(10, 20, &[0, 1])]);
        check(&[(0, 5), (5 + (64 << 10), 5)], &[(0, 10 + (64 << 10), &[0, 1])]);
        check(&[(0, 5), (6 + (64 << 10), 5)], &[(0, 5, &[0]), (6 + (64 << 10), 11 + (64 << 10), &[1])]);
    }

    #[test]
    fn reads_are_ordered_by_where_the_bytes_are_stored() {
        check(&[(1 << 30, 5), (0, 5), (5, 5)], &[(0, 10, &[1, 2]), (1 << 30, (1 << 30) + 5, &[0])]);
    }

    #[test]
    fn a_read_does_not_outgrow_its_window_unless_one_unit_does() {
        let mib = 1 << 20;
        check(
            &[(0, 2 * mib), (2 * mib, 2 * mib), (4 * mib, 1)],
            &[(0, 4 * mib, &[0, 1]), (4 * mib, 4 * mib + 1, &[2])],
        );
        check(&[(0, 16 * mib), (16 * mib, 1)], &[(0, 16 * mib, &[0]), (16 * mib, 16 * mib + 1, &[1])]);
        check(&[(0, 5 * mib), (0, 5 * mib), (5 * mib, 1)], &[(0, 5 * mib, &[0, 1]), (5 * mib, 5 * mib + 1, &[2])]);
    }

    proptest! {
        #[test]
        fn every_unit_is_read_once_and_whole(
            units in proptest::collection::vec((0u64..8 << 20, 1u64..6 << 20), 0..40),
            gap in 0u64..1 << 20,
        ) {
            let units: Vec<(UnitIndex, Unit)> = (0..).zip(units.iter().map(|&(s, l)| unit(s, l))).collect();
            let limits = PlanLimits { gap, window: 4 << 20 };
            let reads = plan(units.clone(), limits);
            let mut seen: Vec<UnitIndex> = reads.iter().flat_map(|read| read.units.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..).take(units.len()).collect::<Vec<UnitIndex>>());
            for read in &reads {
                let longest = read.units.iter().map(|&index| units[index as usize].1.stored.len()).max();
                prop_assert!(read.stored.len() <= limits.window.max(longest.unwrap_or(0)));
                for &index in &read.units {
                    prop_assert!(read.stored.contains(units[index as usize].1.stored));
                }
            }
        }
    }
}
