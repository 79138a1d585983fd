//! Units that the disk has no room for, in the hands of readers who can take bytes that are in no file.
//!
//! A kernel that reads the file can only be told an error. A reader whose answer is written by this process needs no file:
//! it is given the decoded and checked blocks themselves. The last few are kept, because readers go on where they
//! were: a unit is longer than a read.
//!
//! Units lie here only while a write was refused and none succeeded since, and nothing is said of them to anybody
//! else: they are not present.

use std::collections::{HashMap, VecDeque};
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

impl fmt::Debug for LentUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LentUnit").field("device", &self.device).field("unit", &self.unit).finish_non_exhaustive()
    }
}

/// What was given to readers last.
#[derive(Debug)]
pub(super) struct Lent {
    kept: Mutex<Kept>,
    /// Most bytes that are kept, unless one unit has more.
    most: u64,
}

/// By device and number, and in the order in which they came; of one that came again the last place counts.
#[derive(Debug, Default)]
struct Kept {
    units: HashMap<(u64, UnitIndex), (u64, LentUnit)>,
    order: VecDeque<(u64, (u64, UnitIndex))>,
    bytes: u64,
    /// Units that came so far.
    came: u64,
}

impl Kept {
    fn remove(&mut self, key: (u64, UnitIndex)) {
        if let Some((_, unit)) = self.units.remove(&key) {
            self.bytes -= unit.blocks.len();
        }
    }
}

impl Lent {
    pub(super) fn new(most: u64) -> Self {
        Self { kept: Mutex::default(), most }
    }

    pub(super) fn keep(&self, unit: LentUnit) {
        let (key, len) = ((unit.device, unit.unit), unit.blocks.len());
        let mut kept = self.kept.lock().unwrap();
        kept.remove(key);
        while kept.bytes + len > self.most
            && let Some((came, oldest)) = kept.order.pop_front()
        {
            if kept.units.get(&oldest).is_some_and(|(at, _)| *at == came) {
                kept.remove(oldest);
            }
        }
        let came = kept.came;
        kept.came += 1;
        kept.bytes += len;
        kept.units.insert(key, (came, unit));
        kept.order.push_back((came, key));
        let Kept { units, order, .. } = &mut *kept;
        if order.len() > 2 * units.len() + 16 {
            order.retain(|(came, key)| units.get(key).is_some_and(|(at, _)| at == came));
        }
    }

    pub(super) fn find(&self, device: u64, unit: UnitIndex) -> Option<LentUnit> {
        self.kept.lock().unwrap().units.get(&(device, unit)).map(|(_, unit)| unit.clone())
    }

    /// Forgets all of a device: nobody is left who could ask.
    pub(super) fn forget(&self, device: u64) {
        let mut kept = self.kept.lock().unwrap();
        let keys: Vec<_> = kept.units.keys().filter(|(of, _)| *of == device).copied().collect();
        keys.into_iter().for_each(|key| kept.remove(key));
        kept.order.retain(|(_, (of, _))| *of != device);
    }

    /// Forgets all: there is room again.
    pub(super) fn clear(&self) {
        *self.kept.lock().unwrap() = Kept::default();
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
