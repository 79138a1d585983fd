//! What lists say will be read soon, and so tells readers who follow a list from all others.
//!
//! A trace that is prefetched is most of use while somebody reads just what was traced. That reader waits nearly all
//! the time, and a prefetch that stood back for it would never get ahead of it. Whoever reads something else is not
//! to be disturbed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::presence::bit;
use crate::blob::UnitIndex;

/// Which prefetch a list is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ListId(u64);

impl ListId {
    /// One that no other list has.
    pub(super) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What one prefetch wants of one device. Whoever fetches it holds it.
#[derive(Debug)]
pub(super) struct List {
    pub(super) id: ListId,
    /// By unit, whether it is wanted.
    pub(super) wanted: Arc<Vec<u64>>,
}

/// The lists that prefetches of one device go by, as long as these last.
#[derive(Debug, Default)]
pub(super) struct Guides {
    /// Whether anybody is in `lists`: asked for every read.
    is_any: AtomicBool,
    lists: Mutex<Vec<Weak<List>>>,
}

impl Guides {
    /// Adds a list, until it is dropped.
    pub(super) fn add(&self, list: &Arc<List>) {
        let mut lists = self.lists.lock().unwrap();
        lists.retain(|list| list.strong_count() > 0);
        lists.push(Arc::downgrade(list));
        self.is_any.store(true, Ordering::Release);
    }

    /// The list that has one of `units`: the oldest, if there are several.
    pub(super) fn list_of(&self, units: impl Iterator<Item = UnitIndex> + Clone) -> Option<ListId> {
        if !self.is_any.load(Ordering::Acquire) {
            return None;
        }
        let mut lists = self.lists.lock().unwrap();
        lists.retain(|list| list.strong_count() > 0);
        self.is_any.store(!lists.is_empty(), Ordering::Release);
        // A map may have grown since a list was made.
        let has = |list: &List, unit| (unit as usize / 64) < list.wanted.len() && bit(&list.wanted, unit);
        let mut lists = lists.iter().filter_map(Weak::upgrade);
        lists.find(|list| units.clone().any(|unit| has(list, unit))).map(|list| list.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_named_as_long_as_their_list_lasts() {
        let list = |wanted| Arc::new(List { id: ListId::next(), wanted: Arc::new(wanted) });
        let (guides, first, second) = (Guides::default(), list(vec![1 << 3, 0]), list(vec![1 << 5]));
        let (of_first, of_second) = (Some(first.id), Some(second.id));
        assert!(of_first != of_second && guides.list_of(0..100).is_none());

        guides.add(&first);
        guides.add(&second);

        assert_eq!((guides.list_of([90, 3].into_iter()), guides.list_of(5..6)), (of_first, of_second));
        assert_eq!((guides.list_of(64..1000), guides.list_of(4..5)), (None, None));
        drop(first);
        assert_eq!((guides.list_of(3..4), guides.list_of(3..6)), (None, of_second));
        drop(second);
        assert!(guides.list_of(0..100).is_none() && !guides.is_any.load(Ordering::Relaxed));
    }
}
