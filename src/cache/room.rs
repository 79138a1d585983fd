//! Whether a full disk has room again, found out before anything is fetched for it.
//!
//! A write that the file system refuses while nothing can go costs its reader an error, and has cost a request. What
//! comes after it asks the disk first, so that a full disk does not become load on a registry: without
//! room it fails and no source is asked. Nothing has to be told that there is room again, whoever made it.
//!
//! The disk may be wrong about itself: it has room, and the write is refused all the same (a threshold of the
//! kernel's own cache, blocks of metadata). Then it is not believed for a while.
//!
//! Locking: the disk is not asked under the lock.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::disk::Disk;

/// How long it is believed that the disk is full, unless more of it becomes free: every failed read asks again, often
/// page by page, and the disk has others to serve.
const BELIEF: Duration = Duration::from_millis(50);

/// How long it is believed, whatever becomes free, after the disk had room and a write was refused nevertheless: the
/// attempts cost requests.
const DOUBT: Duration = Duration::from_secs(1);

/// Somebody who knows how full a disk is. May wait for it.
pub(super) trait Gauge: Send + Sync {
    /// Whether this many bytes could be written now.
    fn has_room(&self, bytes: u64) -> bool;

    /// Bytes that nothing occupies, whether they could be written or not.
    fn free(&self) -> u64;
}

/// The disk of a store, below this directory. What cannot be asked is tried.
impl Gauge for (Arc<dyn Disk>, PathBuf) {
    fn has_room(&self, bytes: u64) -> bool {
        self.0.has_room(&self.1, bytes).unwrap_or(true)
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

    /// A write of `bytes` was refused, and nothing could go to make room for it.
    pub(super) fn refused(&self, bytes: u64, now: Instant) {
        if self.gauge.get().is_none() {
            return;
        }
        let mut refusal = self.refusal.lock().unwrap();
        let known = refusal.as_ref();
        let until = if known.is_some_and(|known| known.promised) { now + DOUBT } else { now };
        let new = Refusal { bytes, until, free: u64::MAX, promised: false };
        // What is believed for longer than that is believed.
        let known = known.filter(|known| known.until > until);
        *refusal =
            Some(known.map_or(new, |known| Refusal { bytes: known.bytes.min(bytes), promised: false, ..*known }));
        self.short.store(true, Ordering::Release);
    }

    /// A write of `bytes` to where nothing was has succeeded.
    pub(super) fn written(&self, bytes: u64) {
        if !self.is_short() {
            return;
        }
        let mut refusal = self.refusal.lock().unwrap();
        if refusal.is_some_and(|refusal| refusal.bytes <= bytes) {
            *refusal = None;
            self.short.store(false, Ordering::Release);
        }
    }

    /// Whether `bytes` can be written by all that is known, or after `make_room` said that something has gone.
    /// Asks the disk, and waits for it, if something was refused.
    pub(super) fn has(&self, bytes: u64, now: Instant, make_room: impl FnOnce() -> bool) -> bool {
        let known = *self.refusal.lock().unwrap();
        let (Some(known), Some(gauge)) = (known, self.gauge.get()) else { return true };
        if bytes >= known.bytes && now < known.until && gauge.free() <= known.free {
            return false;
        }
        let has = gauge.has_room(bytes) || (make_room() && gauge.has_room(bytes));
        // Looked at afterwards: what becomes free from now on is news.
        let free = if has { 0 } else { gauge.free() };
        let mut refusal = self.refusal.lock().unwrap();
        match &mut *refusal {
            Some(refusal) if has => refusal.promised = true,
            // One that came meanwhile, and is believed whatever becomes free.
            Some(refusal) if refusal.until > now + BELIEF => refusal.bytes = refusal.bytes.min(bytes),
            Some(refusal) => *refusal = Refusal { bytes, until: now + BELIEF, free, promised: false },
            None => {}
        }
        has
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
        fn has_room(&self, bytes: u64) -> bool {
            self.asked.fetch_add(1, Ordering::SeqCst);
            bytes + self.kept <= Gauge::free(self)
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

    fn nothing_goes() -> bool {
        false
    }

    #[test]
    fn nobody_is_asked_before_something_was_refused() {
        let (room, disk) = room(with(0));

        assert!(!room.is_short() && room.has(10, Instant::now(), || unreachable!()));
        assert_eq!(disk.asked.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_full_disk_is_asked_now_and_then_and_believed_in_between() {
        let (room, disk) = room(Small { kept: 5, ..with(9) });
        let now = Instant::now();
        room.refused(10, now);

        for later in 0..1000 {
            assert!(room.is_short() && !room.has(10, now + Duration::from_millis(later), nothing_goes));
        }
        assert_eq!(disk.asked.load(Ordering::SeqCst), 20);
    }

    #[test]
    fn what_becomes_free_is_seen_at_once() {
        let (room, disk) = room(Small { kept: 5, ..with(9) });
        let now = Instant::now();
        room.refused(10, now);
        assert!(!room.has(10, now, nothing_goes));

        disk.free.store(14, Ordering::SeqCst);
        assert!(!room.has(10, now, nothing_goes), "not enough");
        disk.free.store(15, Ordering::SeqCst);
        assert!(room.has(10, now, nothing_goes));
        room.written(10);

        assert!(!room.is_short());
    }

    #[test]
    fn what_is_shorter_than_what_was_refused_may_fit() {
        let (room, _) = room(with(5));
        let now = Instant::now();
        room.refused(10, now);
        assert!(!room.has(10, now, nothing_goes));

        assert!(room.has(5, now, nothing_goes));
        room.written(5);

        assert!(room.is_short() && !room.has(10, now, nothing_goes), "which says nothing of what is longer");
        assert!(!room.has(6, now, nothing_goes) && !room.has(6, now, || unreachable!("just asked")));
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
        assert!(room.has(10, now, goes));
        assert!(room.is_short(), "until something is written");
    }

    #[test]
    fn a_disk_that_is_wrong_about_itself_is_not_believed_for_a_while() {
        let (room, disk) = room(with(1000));
        let now = Instant::now();
        room.refused(10, now);
        room.refused(10, now);
        assert!(room.has(10, now, nothing_goes), "both had begun before anything was known");

        room.refused(10, now);
        room.refused(10, now);
        disk.free.store(2000, Ordering::SeqCst);
        assert!(!room.has(10, now + DOUBT - BELIEF, nothing_goes), "however many had been let through");
        assert!(room.has(10, now + DOUBT, nothing_goes));
    }

    #[test]
    fn without_a_disk_to_ask_nothing_is_remembered() {
        let room = Room::default();
        room.refused(10, Instant::now());
        assert!(!room.is_short());
    }
}
