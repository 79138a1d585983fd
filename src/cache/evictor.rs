//! The thread that keeps the cache within its limit.
//!
//! It looks when the high water is reached, when a write was refused, when prefetch waits at the
//! limit, and now and then to put right what was counted. It takes no lock that a reader needs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::engine::Engine;
use super::pool::join_others;
use super::shelves::{Shelves, StockError};
use super::space::{Call, Space};
use super::stats::{StoreCounters, count};
use super::victims::Wanted;
use crate::base::{ByteSize, Chain};

/// How often the disk is measured when nothing calls for it.
const LOOK_EVERY: Duration = Duration::from_secs(300);

/// The same where the kernel keeps a cache: what it brought for an image that was mounted for the first time has a
/// name, and takes room that can be measured, only when that is unmounted.
const LOOK_AT_KERNEL_EVERY: Duration = Duration::from_secs(15);

/// How long the high water calls in vain after nothing could go; and how often it is looked whether
/// anything can go by now.
const CALM: Duration = Duration::from_secs(5);

/// How long it is believed that nothing can go. On a full disk every read asks, and looking through a
/// large cache for each would take its time from those that can be answered.
const BELIEF: Duration = Duration::from_millis(200);

/// Least bytes freed after a refused write, if there are as many, so that not every write is.
const LEAST_ROOM: u64 = 64 << 20;

/// The running thread. Dropping it ends it; nobody waits for room any more then.
pub(super) struct Evictor {
    space: Arc<Space>,
    thread: Option<JoinHandle<()>>,
}

struct Work {
    shelves: Arc<Shelves>,
    space: Arc<Space>,
    counters: Arc<StoreCounters>,
    /// Whether somebody opened a device that misses something, so that twins are of use.
    wants_twins: Arc<AtomicBool>,
    /// Whether it was said that the cache is over its high water and nothing can go.
    was_over: AtomicBool,
}

impl Evictor {
    pub(super) fn start(shelves: &Arc<Shelves>, engine: &Engine, wants_twins: &Arc<AtomicBool>) -> io::Result<Self> {
        let work = Work {
            shelves: Arc::clone(shelves),
            space: Arc::clone(&engine.space),
            counters: Arc::clone(&engine.counters),
            wants_twins: Arc::clone(wants_twins),
            was_over: AtomicBool::new(false),
        };
        let thread = std::thread::Builder::new().name("evict-0".to_owned()).spawn(move || {
            let leave = Leave(Arc::clone(&work.space));
            work.run();
            drop(leave);
        })?;
        engine.space.attend(thread.thread().id());
        Ok(Self { space: Arc::clone(&engine.space), thread: Some(thread) })
    }
}

impl Drop for Evictor {
    fn drop(&mut self) {
        self.space.stop();
        join_others(self.thread.take());
        // In case the thread was gone before it was announced.
        self.space.leave();
    }
}

/// However the thread ends, nobody waits for it afterwards.
struct Leave(Arc<Space>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Work {
    fn run(&self) {
        self.shelves.sweep();
        self.space.measured(|| self.shelves.bytes());
        let mut calm = Instant::now();
        let (mut knows_twins, mut every) = (false, self.look_every());
        let mut hopeless: Option<Instant> = None;
        while let Some(call) = self.space.next_call(every, calm) {
            if !knows_twins && self.wants_twins.load(Ordering::Acquire) && self.shelves.are_uses_known() {
                self.shelves.tell_twins();
                knows_twins = true;
            }
            if call.only_refused && hopeless.is_some_and(|at| at.elapsed() < BELIEF) {
                self.space.answered(0);
                continue;
            }
            let freed = self.look(call);
            hopeless = (call.refused > 0 && freed == 0).then(Instant::now);
            every = self.look_every();
            if freed == 0 && self.space.used() > self.space.high {
                (calm, every) = (Instant::now() + CALM, CALM);
            }
            self.space.answered(freed);
        }
    }

    fn look_every(&self) -> Duration {
        if self.shelves.attends_kernel() && self.space.limit < u64::MAX { LOOK_AT_KERNEL_EVERY } else { LOOK_EVERY }
    }

    /// Measures, and removes what must go. Gives the bytes that were freed.
    fn look(&self, call: Call) -> u64 {
        let used = self.space.measured(|| self.shelves.bytes());
        let over = if used > self.space.high { used - self.space.low } else { 0 };
        let refused = if call.refused > 0 { call.refused.max(LEAST_ROOM) } else { 0 };
        let excess = over.max(refused);
        if over == 0 {
            self.was_over.store(false, Ordering::Relaxed);
        }
        if excess == 0 {
            return 0;
        }
        let removed = match self.shelves.collect(Wanted { excess, ..Wanted::default() }, false) {
            Ok(removed) => removed,
            Err(StockError::UsesUnknown) => return 0,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "cannot make room in the cache");
                return 0;
            }
        };
        let freed = removed.iter().map(|removed| removed.bytes).sum();
        count(&self.counters.evicted, removed.len() as u64);
        count(&self.counters.evicted_bytes, freed);
        for removed in &removed {
            let (name, size) = (&removed.name, ByteSize(removed.bytes));
            tracing::info!(name, kind = ?removed.kind, %size, "evicted");
        }
        let left = used.saturating_sub(freed);
        // Said once, not at every look.
        let is_over = over > 0 && left > self.space.high;
        if is_over && !self.was_over.swap(is_over, Ordering::Relaxed) {
            let (left, limit) = (ByteSize(left), ByteSize(self.space.limit));
            tracing::warn!(%left, %limit, "the cache is over its high water, and all of it is in use or pinned");
        }
        self.space.freed(freed);
        freed
    }
}
