//! Units that the disk has no room for, in the hands of readers who can take bytes that are in no file.
//!
//! A kernel that reads the file can only be told an error. A reader whose answer is written by this process needs no file:
//! it is given the decoded and checked blocks themselves. The last few are kept, because readers go on where they
//! were: a unit is longer than a read.
//!
//! Units lie here only while a write was refused and none succeeded since, and nothing is said of them to anybody
//! else: they are not present.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex};

use crate::base::ByteRange;
use crate::blob::UnitIndex;

/// One unit, decoded and checked.
#[derive(Clone)]
pub(super) struct LentUnit {
    /// Number of the device that it belongs to.
    pub(super) device: u64,
    pub(super) unit: UnitIndex,
    pub(super) blocks: ByteRange,
    pub(super) bytes: Arc<[u8]>,
}

impl LentUnit {
    fn is(&self, device: u64, unit: UnitIndex) -> bool {
        (self.device, self.unit) == (device, unit)
    }
}

impl fmt::Debug for LentUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LentUnit").field("device", &self.device).field("unit", &self.unit).finish_non_exhaustive()
    }
}

/// What was given to readers last.
#[derive(Debug)]
pub(super) struct Lent {
    units: Mutex<VecDeque<LentUnit>>,
    /// Most bytes that are kept, unless one unit has more.
    most: u64,
}

impl Lent {
    pub(super) fn new(most: u64) -> Self {
        Self { units: Mutex::default(), most }
    }

    pub(super) fn keep(&self, unit: LentUnit) {
        let mut units = self.units.lock().unwrap();
        units.retain(|known| !known.is(unit.device, unit.unit));
        let mut bytes: u64 = units.iter().map(|unit| unit.blocks.len()).sum::<u64>() + unit.blocks.len();
        while bytes > self.most
            && let Some(oldest) = units.pop_front()
        {
            bytes -= oldest.blocks.len();
        }
        units.push_back(unit);
    }

    pub(super) fn find(&self, device: u64, unit: UnitIndex) -> Option<LentUnit> {
        self.units.lock().unwrap().iter().find(|known| known.is(device, unit)).cloned()
    }

    /// Forgets all of a device: nobody is left who could ask.
    pub(super) fn forget(&self, device: u64) {
        self.units.lock().unwrap().retain(|unit| unit.device != device);
    }

    /// Forgets all: there is room again.
    pub(super) fn clear(&self) {
        *self.units.lock().unwrap() = VecDeque::new();
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_kept_and_no_more_bytes_than_may_be() {
        let unit = |device, unit: UnitIndex, len: u64| LentUnit {
            device,
            unit,
            blocks: ByteRange::at(0, len).unwrap(),
            bytes: vec![0; usize::try_from(len).unwrap()].into(),
        };
        let lent = Lent::new(3 * 4096);
        let known = |lent: &Lent| (0..5).filter(|&number| lent.find(1, number).is_some()).collect::<Vec<_>>();
        (0..4).for_each(|number| lent.keep(unit(1, number, 4096)));
        assert_eq!(known(&lent), [1, 2, 3]);
        lent.keep(unit(1, 1, 4096));
        lent.keep(unit(2, 4, 4096));
        assert_eq!(known(&lent), [1, 3], "the second was the oldest");
        lent.keep(unit(1, 0, 5 * 4096));
        assert_eq!(known(&lent), [0], "a large one is kept alone");
        assert!(lent.find(2, 4).is_none());
        lent.keep(unit(2, 4, 0));
        lent.forget(1);
        assert!(known(&lent).is_empty() && lent.find(2, 4).is_some());
        lent.clear();
        assert!(lent.find(2, 4).is_none());
    }
}
