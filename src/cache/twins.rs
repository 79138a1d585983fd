//! Where else in the store the bytes with a digest are.
//!
//! A unit whose digest lies in another complete blob is copied instead of fetched. This remembers
//! where; nothing here is trusted: whoever copies checks the bytes by the digest, so a stale or
//! crowded entry costs a read and no wrong byte.
//!
//! The key is the beginning of the digest and an entry has 16 bytes; with the room that a hash
//! table leaves, a unit costs at most 34 bytes, and [`StoreOptions::twins`] bounds their number.
//!
//! A file must not be read here once its device may be marked, or the reading thread would wait
//! for a fetch that needs that thread. So a blob is forgotten *before* it is served incomplete,
//! and [`Twin::open`] asks whether it still counts *after* it has opened the file: a descriptor
//! from before a mark raises no events.
//!
//! [`StoreOptions::twins`]: super::StoreOptions::twins

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::base::{BLOCK, ByteRange};
use crate::blob::{Check, Unit, UnitMap};

/// The index. Empty, and cheap to ask, until somebody adds a blob.
#[derive(Debug)]
pub(super) struct Twins {
    most: usize,
    state: Mutex<State>,
    /// Whether files may be read: only once somebody answers the events of those that are marked.
    open: AtomicBool,
    /// Whether the file system has not yet refused to share blocks between files.
    sharing: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    places: HashMap<u64, Place>,
    /// Complete blobs by number; `None` where one was forgotten.
    blobs: Vec<Option<PathBuf>>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    blob: u32,
    /// First block in the data file.
    block: u32,
}

/// A unit's bytes in another file.
#[derive(Debug)]
pub(super) struct Twin {
    blob: u32,
    data: PathBuf,
    /// Whole blocks, as many as the unit asked for has.
    pub(super) range: ByteRange,
}

impl Twins {
    /// An index of at most `most` units.
    pub(super) fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), open: AtomicBool::new(false), sharing: AtomicBool::new(true) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// From now on files of the store may be read by any thread.
    pub(super) fn open(&self) {
        self.open.store(true, Ordering::Release);
    }

    /// Whether there is any sense in asking.
    pub(super) fn is_of_use(&self) -> bool {
        self.open.load(Ordering::Acquire) && self.known() > 0
    }

    /// Whether it is worth trying to share blocks between files instead of copying them.
    pub(super) fn may_share(&self) -> bool {
        self.sharing.load(Ordering::Relaxed)
    }

    /// The file system shares no blocks.
    pub(super) fn cannot_share(&self) {
        self.sharing.store(false, Ordering::Relaxed);
    }

    /// Whether anything can be in it.
    pub(super) fn is_wanted(&self) -> bool {
        self.most > 0
    }

    /// Adds the units of a complete blob, as many as there is room for.
    pub(super) fn add(&self, data: &Path, map: &UnitMap) {
        let mut state = self.state();
        if !self.is_wanted() || state.blobs.iter().flatten().any(|known| known == data) {
            return;
        }
        let free = state.blobs.iter().position(Option::is_none).unwrap_or(state.blobs.len());
        let Ok(blob) = u32::try_from(free) else { return };
        match state.blobs.get_mut(free) {
            Some(slot) => *slot = Some(data.to_owned()),
            None => state.blobs.push(Some(data.to_owned())),
        }
        for unit in map.units() {
            let Some(key) = key(&unit.check) else { continue };
            let Ok(block) = u32::try_from(unit.decoded.start() / BLOCK) else { continue };
            if state.places.len() >= self.most && !state.places.contains_key(&key) {
                break;
            }
            state.places.insert(key, Place { blob, block });
        }
    }

    /// Whether units of the file are offered.
    pub(super) fn knows(&self, data: &Path) -> bool {
        self.state().blobs.iter().flatten().any(|known| known == data)
    }

    /// From now on nothing of the file is offered. Tells whether anything was.
    pub(super) fn forget(&self, data: &Path) -> bool {
        let mut state = self.state();
        let Some(at) = state.blobs.iter().position(|known| known.as_deref() == Some(data)) else { return false };
        state.blobs[at] = None;
        state.places.retain(|_, place| place.blob as usize != at);
        true
    }

    /// How many units it knows a place of.
    pub(super) fn known(&self) -> usize {
        self.state().places.len()
    }

    /// Where the bytes of `unit` are said to be, other than in `own`.
    pub(super) fn find(&self, unit: &Unit, own: Option<&Path>) -> Option<Twin> {
        let key = key(&unit.check)?;
        let state = self.state();
        let place = state.places.get(&key)?;
        let data = state.blobs.get(place.blob as usize)?.clone()?;
        if own == Some(data.as_path()) {
            return None;
        }
        let range = ByteRange::at(u64::from(place.block) * BLOCK, unit.blocks().len())?;
        Some(Twin { blob: place.blob, data, range })
    }

    fn counts(&self, twin: &Twin) -> bool {
        self.state().blobs.get(twin.blob as usize).is_some_and(|blob| blob.as_ref() == Some(&twin.data))
    }
}

impl Twin {
    /// Opens the file for reading; `None` if it does not count any more.
    pub(super) fn open(&self, twins: &Twins) -> Option<io::Result<File>> {
        let file = File::open(&self.data);
        twins.counts(self).then_some(file)
    }
}

/// The beginning of a digest. Checksums that anybody can hit name nobody's bytes.
fn key(check: &Check) -> Option<u64> {
    match check {
        Check::Blake3(digest) | Check::Sha256(digest) => digest.first_chunk().map(|head| u64::from_le_bytes(*head)),
        Check::Crc32c(_) | Check::Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(name: &str, contents: &[&[u8]]) -> UnitMap {
        let unit = |(number, bytes): (u64, &&[u8])| Unit::plain(number * BLOCK, bytes).unwrap();
        UnitMap::new(name.parse().unwrap(), 1 << 20, (0..).zip(contents).map(unit).collect()).unwrap()
    }

    fn found(twins: &Twins, bytes: &[u8], own: Option<&Path>) -> Option<(PathBuf, u64)> {
        twins.find(&Unit::plain(0, bytes).unwrap(), own).map(|twin| (twin.data, twin.range.start()))
    }

    #[test]
    fn a_unit_is_found_in_another_blob_until_that_is_forgotten() {
        let twins = Twins::new(100);
        let (a, b) = (Path::new("a/data"), Path::new("b/data"));
        twins.add(a, &map("a", &[b"one", b"two"]));

        assert_eq!(found(&twins, b"two", Some(b)), Some((a.to_owned(), 4096)));
        assert_eq!(found(&twins, b"two", Some(a)), None, "not in itself");
        assert_eq!(found(&twins, b"three", None), None);

        twins.add(b, &map("b", &[b"three"]));
        let twin = twins.find(&Unit::plain(0, b"one").unwrap(), None).unwrap();
        assert!(twins.forget(a) && !twins.forget(a));
        assert!(twin.open(&twins).is_none(), "forgotten between the look and the opening");
        assert_eq!((found(&twins, b"one", None), found(&twins, b"three", None)), (None, Some((b.to_owned(), 0))));

        twins.add(a, &map("a", &[b"one"]));
        assert_eq!(found(&twins, b"one", None), Some((a.to_owned(), 0)), "complete again");
    }

    #[test]
    fn memory_is_bounded_and_checksums_find_nothing() {
        let twins = Twins::new(2);
        twins.add(Path::new("a"), &map("a", &[b"one", b"two", b"three"]));
        assert_eq!(twins.known(), 2);
        assert_eq!(found(&twins, b"three", None), None);

        let unit = Unit { check: Check::Crc32c(1), ..Unit::plain(0, b"one").unwrap() };
        assert!(twins.find(&unit, None).is_none());
        assert!(!Twins::new(0).is_wanted());
    }
}
