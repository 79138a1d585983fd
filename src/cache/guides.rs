//! What lists say will be read soon, and so tells readers who follow a list from all others.
//!
//! A trace that is prefetched is most of use while somebody reads just what was traced. That reader waits nearly all
//! the time, and a prefetch that stood back for it would never get ahead of it. Whoever reads something else is not
//! to be disturbed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::presence::bit;
use crate::blob::UnitIndex;

/// The units of one device that prefetches want by a list, as long as these last.
#[derive(Debug, Default)]
pub(super) struct Guides {
    /// Whether anybody is in `lists`: asked for every read of a queue.
    is_any: AtomicBool,
    lists: Mutex<Vec<Weak<Vec<u64>>>>,
}

impl Guides {
    /// Adds the units whose bits are set, until `wanted` is dropped.
    pub(super) fn add(&self, wanted: &Arc<Vec<u64>>) {
        let mut lists = self.lists.lock().unwrap();
        lists.retain(|list| list.strong_count() > 0);
        lists.push(Arc::downgrade(wanted));
        self.is_any.store(true, Ordering::Release);
    }

    /// Whether a list has one of `units`.
    pub(super) fn name_any(&self, mut units: impl Iterator<Item = UnitIndex>) -> bool {
        if !self.is_any.load(Ordering::Acquire) {
            return false;
        }
        let mut lists = self.lists.lock().unwrap();
        lists.retain(|list| list.strong_count() > 0);
        self.is_any.store(!lists.is_empty(), Ordering::Release);
        let lists: Vec<_> = lists.iter().filter_map(Weak::upgrade).collect();
        // A map may have grown since a list was made.
        let has = |list: &Arc<Vec<u64>>, unit| (unit as usize / 64) < list.len() && bit(list, unit);
        units.any(|unit| lists.iter().any(|list| has(list, unit)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_named_as_long_as_their_list_lasts() {
        let (guides, first, second) = (Guides::default(), Arc::new(vec![1 << 3, 0]), Arc::new(vec![1 << 5]));
        assert!(!guides.name_any(0..100));

        guides.add(&first);
        guides.add(&second);

        assert!(guides.name_any([90, 3].into_iter()) && guides.name_any(5..6));
        assert!(!guides.name_any(64..1000) && !guides.name_any(4..5));
        drop(first);
        assert!(!guides.name_any(3..4) && guides.name_any(5..6));
        drop(second);
        assert!(!guides.name_any(0..100) && !guides.is_any.load(Ordering::Relaxed));
    }
}
