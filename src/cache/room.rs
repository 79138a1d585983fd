//! Whether a full disk has room again, found out before anything is fetched for it.
//!
//! A write that the file system refuses while nothing can go costs its reader an error, and has cost a request. What
//! comes after it asks the disk first, so that a full disk does not become load on a registry: without
//! room it fails and no source is asked, unless its reader needs no file. Nothing has to be told that there is room again, whoever made it.
//!
//! The disk may be wrong about itself: it has room, and the write is refused all the same (a threshold of the
//! kernel's own cache, blocks of metadata). Then it is not believed for a while.
//!
//! Asking may take the room that is asked for, for a moment. So one asks at a time, for no more than a unit, and a
//! write that is refused is tried again while nobody asks.
//!
//! Locking: the disk is not asked under the lock of what is known.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::disk::Disk;

/// How long it is believed that the disk is full, unless more of it becomes free: every failed read asks again, often
/// page by page, and the disk has others to serve.
const BELIEF: Duration = Duration::from_millis(50);

/// How long it is believed, whatever becomes free, after the disk had room and a write was refused nevertheless: the
/// attempts cost requests.
const DOUBT: Duration = Duration::from_secs(1);

/// How long a refusal is remembered without another one, if the disk says that there is room: what was refused may
/// never be asked for again.
const MEMORY: Duration = Duration::from_secs(60);

/// Bytes that are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Need {
    /// All of them,
    pub(super) bytes: u64,
    /// and those of the largest unit, which are written or refused together.
    pub(super) unit: u64,
}

impl Need {
    /// Units of so many bytes each.
    pub(super) fn of(units: impl IntoIterator<Item = u64>) -> Self {
        let sum = |need: Self, unit: u64| Self { bytes: need.bytes.saturating_add(unit), unit: need.unit.max(unit) };
        units.into_iter().fold(Self { bytes: 0, unit: 0 }, sum)
    }
}

/// Somebody who knows how full a disk is. May wait for it.
pub(super) trait Gauge: Send + Sync {
    /// Whether this could be written now. May occupy as much as a unit until it returns.
    fn has_room(&self, need: Need) -> bool;

    /// Bytes that nothing occupies, whether they could be written or not.
    fn free(&self) -> u64;
}

/// The disk of a store, below this directory. What cannot be asked is tried.
impl Gauge for (Arc<dyn Disk>, PathBuf) {
    fn has_room(&self, need: Need) -> bool {
        self.0.has_room(&self.1, need.bytes, need.unit).unwrap_or(true)
    }

    fn free(&self) -> u64 {
        self.0.free(&self.1).unwrap_or(u64::MAX)
    }
}

/// What is known of the room on the disk.
#[derive(Default)]
pub(super) struct Room {
    /// Whether there is a refusal. Read for every fetch, and almost never set.
    short: AtomicBool,
    refusal: Mutex<Option<Refusal>>,
    /// Held by who asks the disk, or writes while nobody asks.
    asking: Mutex<()>,
    /// `None` where no disk can be asked; nothing is remembered then.
    gauge: OnceLock<Box<dyn Gauge>>,
}

#[derive(Clone, Copy, Debug)]
struct Refusal {
    /// Fewest bytes for which there was no room,
    bytes: u64,
    /// which is believed until then,
    until: Instant,
    /// or until more than this is free.
    free: u64,
    /// Length of a unit that there was no room for: when one that is not shorter has been written, all this is over.
    unit: u64,
    /// When a write was last refused,
    refused: Instant,
    /// or the disk last said that one would be.
    at: Instant,
    /// Whether the disk has said since that there is room.
    promised: bool,
}

impl Room {
    /// Whom to ask. Said once, before anything is written.
    pub(super) fn ask(&self, gauge: Box<dyn Gauge>) {
        let _ = self.gauge.set(gauge);
    }

    /// Whether a write was refused, and none of that length succeeded since.
    pub(super) fn is_short(&self) -> bool {
        self.short.load(Ordering::Acquire)
    }

    /// Calls `write` while nobody asks the disk for room, which takes some for a moment.
    pub(super) fn undisturbed<T>(&self, write: impl FnOnce() -> T) -> T {
        let _nobody_asks = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        write()
    }

    /// A write of `bytes` was refused, and nothing could go to make room for it.
    pub(super) fn refused(&self, bytes: u64, now: Instant) {
        let Some(gauge) = self.gauge.get() else { return };
        // Else somebody else has taken what was promised to two.
        let says_room = gauge.free() >= bytes;
        let mut refusal = self.refusal.lock().unwrap();
        let known = refusal.as_ref();
        let until = if says_room && known.is_some_and(|known| known.promised) { now + DOUBT } else { now };
        let new = Refusal { bytes, until, free: u64::MAX, unit: bytes, refused: now, at: now, promised: false };
        // What is believed for longer than that is believed.
        let known = known.filter(|known| known.until > until);
        let shorter = |known: &Refusal| Refusal {
            bytes: known.bytes.min(bytes),
            unit: known.unit.min(bytes),
            refused: now,
            at: now,
            promised: false,
            ..*known
        };
        *refusal = Some(known.map_or(new, shorter));
        self.short.store(true, Ordering::Release);
    }

    /// A write of `bytes` to where nothing was has succeeded. Whether by that nothing is short any more.
    pub(super) fn written(&self, bytes: u64) -> bool {
        if !self.is_short() {
            return false;
        }
        let mut refusal = self.refusal.lock().unwrap();
        let is_over = refusal.is_some_and(|refusal| refusal.unit <= bytes);
        if is_over {
            self.forget(&mut refusal);
        }
        is_over
    }

    fn forget(&self, refusal: &mut Option<Refusal>) {
        *refusal = None;
        self.short.store(false, Ordering::Release);
    }

    /// Whether `need` can be written by all that is known, or after `make_room` said that something has gone.
    /// Asks the disk, and waits for it, if something was refused.
    pub(super) fn has(&self, need: Need, now: Instant, make_room: impl FnOnce() -> bool) -> bool {
        let known = *self.refusal.lock().unwrap();
        let (Some(known), Some(gauge)) = (known, self.gauge.get()) else { return true };
        if need.bytes >= known.bytes && now < known.until && gauge.free() <= known.free {
            return false;
        }
        let ask = || self.undisturbed(|| gauge.has_room(need));
        let has = ask() || (make_room() && ask());
        // Looked at afterwards: what becomes free from now on is news.
        let free = gauge.free();
        let mut refusal = self.refusal.lock().unwrap();
        match &mut *refusal {
            Some(known) if has && now.saturating_duration_since(known.at) >= MEMORY => self.forget(&mut refusal),
            Some(known) if has => {
                known.promised = true;
                // There is room for what was refused too. It need not come again to end this.
                if now >= known.until && free >= known.unit {
                    known.unit = known.unit.min(need.unit);
                }
            }
            // One that came meanwhile, and is believed whatever becomes free.
            Some(known) if known.until > now + BELIEF => {
                *known = Refusal { bytes: known.bytes.min(need.bytes), at: now, ..*known };
            }
            Some(known) => {
                let Need { bytes, unit } = need;
                let until = now + BELIEF;
                *known = Refusal { bytes, until, free, unit, refused: known.refused, at: now, promised: false };
            }
            None => {}
        }
        has
    }

    /// Whether what seems to need no room may be written whatever the disk says, because no write was refused lately.
    pub(super) fn may_try(&self, now: Instant) -> bool {
        self.refusal.lock().unwrap().is_none_or(|known| now.saturating_duration_since(known.refused) >= DOUBT)
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room").field("refusal", &self.refusal).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// A disk with as many bytes free, of which all but some can be written, and how often it was asked for room.
    #[derive(Default)]
    struct Small {
        free: AtomicU64,
        kept: u64,
        asked: AtomicU64,
    }

    impl Gauge for Arc<Small> {
        fn has_room(&self, need: Need) -> bool {
            self.asked.fetch_add(1, Ordering::SeqCst);
            need.bytes + self.kept <= Gauge::free(self)
        }

        fn free(&self) -> u64 {
            self.free.load(Ordering::SeqCst)
        }
    }

    fn room(disk: Small) -> (Room, Arc<Small>) {
        let (room, disk) = (Room::default(), Arc::new(disk));
        room.ask(Box::new(Arc::clone(&disk)));
        (room, disk)
    }

    fn with(free: u64) -> Small {
        Small { free: free.into(), ..Small::default() }
    }

    /// A unit alone.
    fn one(unit: u64) -> Need {
        Need::of([unit])
    }

    fn nothing_goes() -> bool {
        false
    }

    #[test]
    fn nobody_is_asked_before_something_was_refused() {
        let (room, disk) = room(with(0));

        assert!(!room.is_short() && room.has(one(10), Instant::now(), || unreachable!()));
        assert_eq!(disk.asked.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_full_disk_is_asked_now_and_then_and_believed_in_between() {
        let (room, disk) = room(Small { kept: 5, ..with(9) });
        let now = Instant::now();
        room.refused(10, now);

        for later in 0..1000 {
            assert!(room.is_short() && !room.has(one(10), now + Duration::from_millis(later), nothing_goes));
        }
        assert_eq!(disk.asked.load(Ordering::SeqCst), 20);
    }

    #[test]
    fn what_becomes_free_is_seen_at_once() {
        let (room, disk) = room(Small { kept: 5, ..with(9) });
        let now = Instant::now();
        room.refused(10, now);
        assert!(!room.has(one(10), now, nothing_goes));

        disk.free.store(14, Ordering::SeqCst);
        assert!(!room.has(one(10), now, nothing_goes), "not enough");
        disk.free.store(15, Ordering::SeqCst);
        assert!(room.has(one(10), now, nothing_goes));
        room.written(10);

        assert!(!room.is_short());
    }

    #[test]
    fn what_is_shorter_than_what_was_refused_may_fit() {
        let (room, _) = room(with(5));
        let now = Instant::now();
        room.refused(10, now);
        assert!(!room.has(one(10), now, nothing_goes));

        assert!(room.has(one(5), now, nothing_goes));
        room.written(5);

        assert!(room.is_short() && !room.has(one(10), now, nothing_goes), "which says nothing of what is longer");
        assert!(!room.has(one(6), now, nothing_goes) && !room.has(one(6), now, || unreachable!("just asked")));
    }

    #[test]
    fn what_goes_makes_room() {
        let (room, disk) = room(with(0));
        let now = Instant::now();
        room.refused(10, now);

        let goes = || {
            disk.free.store(64, Ordering::SeqCst);
            true
        };
        assert!(room.has(one(10), now, goes));
        assert!(room.is_short(), "until something is written");
    }

    #[test]
    fn a_disk_that_is_wrong_about_itself_is_not_believed_for_a_while() {
        let (room, disk) = room(with(1000));
        let now = Instant::now();
        room.refused(10, now);
        room.refused(10, now);
        assert!(room.has(one(10), now, nothing_goes), "both had begun before anything was known");

        room.refused(10, now);
        room.refused(10, now);
        disk.free.store(2000, Ordering::SeqCst);
        assert!(!room.has(one(10), now + DOUBT - BELIEF, nothing_goes), "however many had been let through");
        assert!(room.has(one(10), now + DOUBT, nothing_goes));
    }

    #[test]
    fn no_room_for_many_units_is_over_when_one_is_written() {
        let (room, _) = room(with(25));
        let now = Instant::now();
        room.refused(10, now);

        assert!(!room.has(Need::of([10; 4]), now, nothing_goes) && room.has(one(10), now, nothing_goes));
        room.written(10);

        assert!(!room.is_short());
    }

    #[test]
    fn with_room_for_what_was_refused_it_need_not_come_again() {
        let (room, disk) = room(with(0));
        let now = Instant::now();
        room.refused(1000, now);
        assert!(!room.has(one(1000), now, nothing_goes));
        disk.free.store(999, Ordering::SeqCst);
        assert!(room.has(one(5), now + BELIEF, nothing_goes));
        room.written(5);
        assert!(room.is_short());

        disk.free.store(1000, Ordering::SeqCst);
        assert!(room.has(one(5), now + BELIEF, nothing_goes));
        room.written(5);

        assert!(!room.is_short());
    }

    #[test]
    fn a_refusal_is_forgotten_after_a_while_where_there_is_room() {
        let (room, _) = room(with(500));
        let now = Instant::now();
        room.refused(1000, now);
        let later = now + MEMORY / 2;
        assert!(!room.has(one(1000), later, nothing_goes));

        assert!(room.has(one(5), later + MEMORY - BELIEF, nothing_goes) && room.is_short(), "the disk said it again");
        assert!(!room.has(one(501), later + MEMORY, nothing_goes), "and again");
        assert!(room.has(one(5), later + MEMORY, nothing_goes) && room.is_short());
        assert!(room.has(one(5), later + 2 * MEMORY, nothing_goes) && !room.is_short());
    }

    #[test]
    fn what_was_promised_to_two_is_no_reason_for_doubt() {
        let (room, disk) = room(with(10));
        let now = Instant::now();
        room.refused(10, now);
        assert!(room.has(one(10), now, nothing_goes) && room.has(one(10), now, nothing_goes));

        disk.free.store(0, Ordering::SeqCst);
        room.written(10);
        room.refused(10, now);
        assert!(room.has(one(10), now, || {
            disk.free.store(10, Ordering::SeqCst);
            true
        }));
        disk.free.store(0, Ordering::SeqCst);
        room.refused(10, now);
        disk.free.store(10, Ordering::SeqCst);

        assert!(room.has(one(10), now, nothing_goes));
    }

    /// Occupies all that there is while it is asked.
    struct Probe(Arc<AtomicBool>);

    impl Gauge for Probe {
        fn has_room(&self, _: Need) -> bool {
            self.0.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            self.0.store(false, Ordering::SeqCst);
            true
        }

        fn free(&self) -> u64 {
            0
        }
    }

    #[test]
    fn who_writes_undisturbed_never_meets_who_asks() {
        let (room, taken) = (Room::default(), Arc::<AtomicBool>::default());
        room.ask(Box::new(Probe(Arc::clone(&taken))));
        room.refused(10, Instant::now());
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| (0..4).all(|_| room.has(one(10), Instant::now(), nothing_goes)));
            while !asking.is_finished() {
                assert!(!room.undisturbed(|| taken.load(Ordering::SeqCst)));
            }
            assert!(asking.join().unwrap());
        });
    }

    #[test]
    fn what_needs_no_room_is_tried_unless_a_write_was_refused_lately() {
        let (room, _) = room(with(0));
        let now = Instant::now();
        assert!(room.may_try(now));
        room.refused(10, now);
        assert!(!room.has(one(10), now + DOUBT / 2, nothing_goes), "which is only said");

        assert!(!room.may_try(now + DOUBT / 2) && room.may_try(now + DOUBT));
        room.refused(10, now + DOUBT);
        assert!(!room.may_try(now + DOUBT + BELIEF));
    }

    #[test]
    fn without_a_disk_to_ask_nothing_is_remembered() {
        let room = Room::default();
        room.refused(10, Instant::now());
        assert!(!room.is_short());
    }
}
