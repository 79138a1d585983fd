//! How much of the disk the cache takes, and the meeting of those who want room with the thread
//! that makes it.
//!
//! The count is kept by everybody who writes and put right by the evictor whenever it looks at the
//! disk. Reaching the high water wakes the evictor and holds up nobody. At the limit prefetch
//! waits for the evictor's word; readers are let through, because a mounted image must go on. A
//! write that the file system refuses waits for the evictor too, and is told whether to try again.
//!
//! Locking: nothing is called under the lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::engine::StoreOptions;
use super::room::{Need, Room};

/// Called once with whether there is room under the limit.
type Parked = Box<dyn FnOnce(bool) + Send>;

/// Bytes taken and bytes allowed.
pub(super) struct Space {
    /// Bytes landed since the start,
    landed: AtomicU64,
    /// and what must be added to them for what is used; modulo 2^64, for it may be negative.
    base: AtomicU64,
    /// `u64::MAX` where there is no limit.
    pub(super) limit: u64,
    pub(super) high: u64,
    pub(super) low: u64,
    /// Whether the evictor has been woken for the high water and has not looked yet.
    woken: AtomicBool,
    state: Mutex<State>,
    /// The evictor waits on this,
    wake: Condvar,
    /// and who needs room on this.
    looked: Condvar,
    pub(super) room: Room,
}

#[derive(Default)]
struct State {
    /// The evictor's thread, while there is one.
    evictor: Option<ThreadId>,
    stopped: bool,
    kicked: bool,
    /// Bytes that somebody could not write.
    refused: u64,
    /// Rounds that the evictor has begun and ended, and the bytes that all of them freed.
    begun: u64,
    ended: u64,
    freed: u64,
    parked: Vec<Parked>,
}

/// Why the evictor looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Bytes that the file system had no room for; 0 if nothing was refused.
    pub(super) refused: u64,
    /// Whether there is no other reason.
    pub(super) only_refused: bool,
}

impl Space {
    pub(super) fn new(options: &StoreOptions) -> Self {
        let limit = options.cache_limit.unwrap_or(u64::MAX);
        let part = |percent: u8| {
            let part = u128::from(limit) * u128::from(percent.min(100)) / 100;
            if limit == u64::MAX { limit } else { u64::try_from(part).expect("a part of a u64") }
        };
        let high = part(options.high_water);
        Self {
            landed: AtomicU64::new(0),
            base: AtomicU64::new(0),
            limit,
            high,
            low: part(options.low_water).min(high),
            woken: AtomicBool::new(false),
            state: Mutex::default(),
            wake: Condvar::new(),
            looked: Condvar::new(),
            room: Room::default(),
        }
    }

    pub(super) fn used(&self) -> u64 {
        self.landed.load(Ordering::Relaxed).wrapping_add(self.base.load(Ordering::Relaxed))
    }

    /// Puts what `measure` finds in place of what was counted; gives that. What lands meanwhile is
    /// counted in any case: rather twice, until the next time, than not at all.
    pub(super) fn measured(&self, measure: impl FnOnce() -> u64) -> u64 {
        let before = self.landed.load(Ordering::Relaxed);
        let bytes = measure();
        self.base.store(bytes.wrapping_sub(before), Ordering::Relaxed);
        bytes
    }

    /// Counts bytes that have gone.
    pub(super) fn freed(&self, bytes: u64) {
        self.base.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that were written where nothing was. No lock but the first time that the high
    /// water is reached.
    pub(super) fn landed(&self, bytes: u64) {
        self.landed.fetch_add(bytes, Ordering::Relaxed);
        if self.used() > self.high && !self.woken.swap(true, Ordering::AcqRel) {
            self.kick();
        }
    }

    /// Whether nothing may be fetched that nobody waits for.
    pub(super) fn is_spent(&self) -> bool {
        self.used() >= self.limit
    }

    /// Calls `then` when the evictor has looked, with whether there is room now; at once if there
    /// is no evictor.
    pub(super) fn when_looked(&self, then: Parked) {
        let mut state = self.state.lock().unwrap();
        if state.evictor.is_none() {
            drop(state);
            return then(!self.is_spent());
        }
        state.parked.push(then);
        state.kicked = true;
        drop(state);
        self.wake.notify_one();
    }

    /// Makes the evictor look soon.
    pub(super) fn kick(&self) {
        self.state.lock().unwrap().kicked = true;
        self.wake.notify_one();
    }

    /// Waits until the evictor has looked for `bytes` that the file system refused; whether it
    /// could free anything, so that another attempt makes sense.
    pub(super) fn make_room(&self, bytes: u64) -> bool {
        let mut state = self.state.lock().unwrap();
        // The evictor itself may get here: a completion it ran dropped the last owner of a device.
        if state.evictor.is_none_or(|thread| thread == std::thread::current().id()) {
            return false;
        }
        state.refused = state.refused.saturating_add(bytes.max(1));
        // A round under way may have looked before this.
        let (round, freed) = (state.begun + 1, state.freed);
        self.wake.notify_one();
        while state.evictor.is_some() && state.ended < round {
            state = self.looked.wait(state).unwrap();
        }
        state.freed > freed
    }

    /// Whether `need` can be written, as far as can be told beforehand. Waits for the disk and for the evictor if a
    /// write was refused before.
    pub(super) fn has_room(&self, need: Need) -> bool {
        self.room.has(need, Instant::now(), || self.make_room(need.bytes))
    }

    /// `thread` is the evictor from now on.
    pub(super) fn attend(&self, thread: ThreadId) {
        self.state.lock().unwrap().evictor = Some(thread);
    }

    /// Asks the evictor to leave.
    pub(super) fn stop(&self) {
        self.state.lock().unwrap().stopped = true;
        self.wake.notify_one();
    }

    /// The evictor has gone: nobody may wait for it.
    pub(super) fn leave(&self) {
        let mut state = self.state.lock().unwrap();
        state.evictor = None;
        let parked = std::mem::take(&mut state.parked);
        drop(state);
        self.looked.notify_all();
        // What they own cancels whoever waits.
        drop(parked);
    }

    /// Waits until somebody calls, or `every` has gone by; `None` at the end. Calls about the high
    /// water that come before `calm` are heard then, so that a cache in which nothing can go is
    /// not looked through all the time.
    pub(super) fn next_call(&self, every: Duration, calm: Instant) -> Option<Call> {
        let due = Instant::now() + every;
        let mut state = self.state.lock().unwrap();
        let only_refused = loop {
            if state.stopped {
                return None;
            }
            let now = Instant::now();
            if !state.parked.is_empty() || (state.kicked && now >= calm) || now >= due {
                break false;
            }
            if state.refused > 0 {
                break true;
            }
            let until = if state.kicked { due.min(calm) } else { due };
            state = self.wake.wait_timeout(state, until.saturating_duration_since(now)).unwrap().0;
        };
        if !only_refused {
            state.kicked = false;
            self.woken.store(false, Ordering::Release);
        }
        state.begun += 1;
        Some(Call { refused: std::mem::take(&mut state.refused), only_refused })
    }

    /// Ends the round that [`Space::next_call`] began.
    pub(super) fn answered(&self, freed: u64) {
        let mut state = self.state.lock().unwrap();
        state.ended = state.begun;
        state.freed = state.freed.saturating_add(freed);
        let parked = std::mem::take(&mut state.parked);
        drop(state);
        self.looked.notify_all();
        let room = !self.is_spent();
        parked.into_iter().for_each(|then| then(room));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::*;

    fn space(limit: u64) -> Arc<Space> {
        let options =
            StoreOptions { cache_limit: Some(limit), high_water: 90, low_water: 80, ..StoreOptions::default() };
        Arc::new(Space::new(&options))
    }

    const LONG: Duration = Duration::from_secs(3600);

    #[test]
    fn waters_are_parts_of_the_limit_and_without_one_there_are_none() {
        let space = space(1000);
        assert_eq!((space.limit, space.high, space.low), (1000, 900, 800));

        let none = Space::new(&StoreOptions::default());
        none.landed(1 << 60);
        assert!(!none.is_spent());
    }

    #[test]
    fn reaching_the_high_water_calls_the_evictor_once() {
        let space = space(1000);
        space.attend(std::thread::current().id());
        space.landed(900);
        assert!(!space.state.lock().unwrap().kicked);

        space.landed(1);
        assert_eq!(space.next_call(LONG, Instant::now()), Some(Call { refused: 0, only_refused: false }));
        space.answered(0);

        assert!(!space.is_spent());
        space.landed(99);
        assert!(space.is_spent(), "readers went on to the limit");
    }

    #[test]
    fn what_lands_while_the_disk_is_measured_is_not_lost() {
        let space = space(1000);
        space.landed(300);
        space.measured(|| {
            space.landed(40);
            200
        });
        assert_eq!(space.used(), 240);
        space.freed(140);
        space.landed(1);
        assert_eq!(space.used(), 101);
    }

    #[test]
    fn who_was_refused_waits_for_a_round_that_began_after_it_asked() {
        let space = space(1000);
        space.attend(std::thread::current().id());
        space.kick();
        space.next_call(LONG, Instant::now());
        let asking = std::thread::spawn({
            let space = space.clone();
            move || space.make_room(7)
        });
        while space.state.lock().unwrap().refused == 0 {
            std::thread::yield_now();
        }

        space.answered(0);
        assert_eq!(space.next_call(LONG, Instant::now()), Some(Call { refused: 7, only_refused: true }));
        assert!(!asking.is_finished(), "the first round had begun before it asked");
        space.answered(100);

        assert!(asking.join().unwrap());
    }

    #[test]
    fn nobody_waits_for_an_evictor_that_is_not_there_or_leaves() {
        let space = space(1000);
        let (tx, rx) = channel();
        let tell = |tx: &std::sync::mpsc::Sender<bool>| {
            let tx = tx.clone();
            Box::new(move |room| tx.send(room).unwrap())
        };
        assert!(!space.make_room(1));
        space.when_looked(tell(&tx));
        assert_eq!(rx.recv(), Ok(true));

        space.attend(std::thread::current().id());
        let asking = std::thread::spawn({
            let space = space.clone();
            move || space.make_room(1)
        });
        while space.state.lock().unwrap().refused == 0 {
            std::thread::yield_now();
        }
        space.when_looked(tell(&tx));
        space.stop();
        assert_eq!(space.next_call(LONG, Instant::now()), None);
        space.leave();

        assert!(!asking.join().unwrap());
        drop(tx);
        assert!(rx.recv().is_err(), "what was parked is dropped, which cancels it");
    }

    #[test]
    fn prefetch_at_the_limit_is_told_whether_there_is_room_after_the_next_look() {
        let space = space(1000);
        let (tx, rx) = channel();
        space.attend(std::thread::current().id());
        space.landed(1000);
        for (measured, room) in [(1000, false), (800, true)] {
            let tx = tx.clone();
            space.when_looked(Box::new(move |room| tx.send(room).unwrap()));
            assert!(rx.try_recv().is_err());
            space.next_call(LONG, Instant::now());
            assert_eq!(space.measured(|| measured), measured);
            space.answered(0);
            assert_eq!(rx.recv(), Ok(room));
        }
    }
}
