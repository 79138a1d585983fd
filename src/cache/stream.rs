//! Long reads of prefetch: units are decoded as their bytes arrive.
//!
//! A stream gives way. When a reader needs something that the stream will not bring within a moment,
//! the transfer is broken off and the rest goes back to the head of the queue, to be asked for again
//! when readers are quiet; what a reader waits for leaves the rest and is fetched for it alone. So a
//! stream may be long without holding anybody up.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::core::Core;
use super::fetch::{Slot, fail, hope, job};
use super::pool::Queue;
use super::window::{Led, Window, groups};
use crate::base::{ByteRange, Class, Fault, RequestId};
use crate::source::{BlobSource, ReadCtx, SourceError};

/// A reader of a stream's unit waits for the stream if no more than this has to come before the unit.
const NEAR: u64 = 256 << 10;

/// The same where a list says that something in the stream will be read: mostly all of it, and going on costs a reader no more
/// than a round trip would.
const NEAR_IN_A_LIST: u64 = 1 << 20;

/// Most bytes of a half arrived unit that are kept when a stream gives way.
const MOST_KEPT: usize = 1 << 20;

/// How a stream ended.
enum End {
    Whole,
    /// Readers need the link.
    GaveWay,
    /// Nobody wants it but readers who have joined.
    Abandoned,
    /// The device is gone.
    Cancelled,
    Failed(SourceError),
}

/// Runs one read and hands each unit to the pool when it has come. Dropping the task cancels the
/// waiters.
pub(super) async fn run(mut window: Window, slot: Slot) {
    let started = Instant::now();
    window.start(started, &slot.fetcher.telemetry);
    let (core, slot) = (Arc::clone(&window.core), Arc::new(slot));
    let jobs = Arc::clone(&slot.fetcher.jobs);
    let intake = Mutex::new(Intake::new(window, Arc::clone(&jobs), Arc::clone(&slot)));
    let end = pour(&core, &intake, &slot).await;
    if matches!(end, End::Whole | End::Failed(_)) {
        slot.fetcher.telemetry.fills.fetch.at(Class::Prefetch).observe(started.elapsed());
    }
    let rest = intake.into_inner().expect("nothing panics while it is held").rest();
    let Some(rest) = rest else { return slot.fetched() };
    match end {
        End::GaveWay => slot.fetcher.give_back(rest, false),
        End::Abandoned => slot.fetcher.give_back(rest, true),
        End::Failed(SourceError::OutOfRange { .. }) if rest.is_divisible() => core.split(rest),
        End::Failed(error) => fail(&jobs, rest, error),
        // What has come whole leaves no rest.
        End::Cancelled | End::Whole => drop(rest),
    }
    slot.fetched();
}

/// Pours the window's bytes into `intake`, from one source after the other, each going on where the
/// one before broke off. The failure is the one that leaves most hope.
async fn pour(core: &Arc<Core>, intake: &Mutex<Intake>, slot: &Slot) -> End {
    let mut deadline = Instant::now() + slot.fetcher.options.prefetch_deadline;
    let mut sources = core.sources.all();
    let is_divisible = {
        let intake = intake.lock().unwrap();
        if intake.leds().any(|led| led.again) {
            // Its bytes were damaged, and another one's may not be.
            sources.rotate_left(1);
        }
        intake.is_divisible
    };
    let mut failure: Option<SourceError> = None;
    for (left, source) in (0..sources.len()).rev().zip(sources) {
        let error = match pour_from(&source, left == 0, core, intake, slot, &mut deadline).await {
            End::Failed(error) => error,
            end => return end,
        };
        match error.fault() {
            Fault::Cancelled => return End::Failed(error),
            // A range outside the blob says more about the image than about the source.
            Fault::Permanent if !matches!(error, SourceError::OutOfRange { .. }) => core.sources.demote(&source),
            Fault::Permanent | Fault::Transient | Fault::Corrupt => {}
        }
        if failure.as_ref().is_none_or(|known| hope(&error, is_divisible) > hope(known, is_divisible)) {
            failure = Some(error);
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    failure.map_or(End::Cancelled, End::Failed)
}

/// Asks one source for what is missing, for at most half of the time left unless it is the `last`.
async fn pour_from(
    source: &Arc<dyn BlobSource>,
    last: bool,
    core: &Arc<Core>,
    intake: &Mutex<Intake>,
    slot: &Slot,
    deadline: &mut Instant,
) -> End {
    let share = |deadline: Instant| {
        let now = Instant::now();
        if last { deadline } else { now + deadline.saturating_duration_since(now) / 2 }
    };
    let mut until = share(*deadline);
    let missing = intake.lock().unwrap().missing();
    let near = if intake.lock().unwrap().is_listed() { NEAR_IN_A_LIST } else { NEAR };
    core.counters.request();
    let mut take = |piece| intake.lock().unwrap().take(piece);
    let ctx = ReadCtx::new(Class::Prefetch, until);
    let mut stream = source.stream(core.blob(), missing, ctx, &mut take);
    loop {
        tokio::select! {
            outcome = &mut stream => {
                return match outcome {
                    Err(error) => End::Failed(error),
                    Ok(()) => intake.lock().unwrap().verdict(source.describe()).map_or_else(End::Failed, |()| End::Whole),
                };
            }
            () = tokio::time::sleep_until(until.into()) => {
                return End::Failed(core.deadline_error(missing, source.describe()));
            }
            () = slot.signal.told.notified() => {
                if slot.signal.cancelled.load(Ordering::Acquire) {
                    return End::Cancelled;
                }
                if slot.signal.abandoned.load(Ordering::Acquire) {
                    return End::Abandoned;
                }
                let waited_for = intake.lock().unwrap().last_urgent();
                let far = waited_for.is_some_and(|distance| distance > near);
                if far || slot.signal.give_way.load(Ordering::Acquire) {
                    return End::GaveWay;
                }
                if waited_for.is_some() {
                    // From now on the patience of the reader counts.
                    *deadline = (*deadline).min(Instant::now() + slot.fetcher.options.deadline);
                    until = until.min(share(*deadline));
                }
            }
        }
    }
}

/// Where the bytes of a stream arrive and are cut into units.
struct Intake {
    core: Arc<Core>,
    jobs: Arc<Queue>,
    slot: Arc<Slot>,
    stored: ByteRange,
    is_divisible: bool,
    /// What has not come whole, in order of stored ranges.
    groups: VecDeque<Vec<Led>>,
    /// Stored offset of the first byte of `buffer`.
    base: u64,
    buffer: BytesMut,
    /// More came than was asked for.
    overrun: bool,
}

impl Intake {
    fn new(window: Window, jobs: Arc<Queue>, slot: Arc<Slot>) -> Self {
        let is_divisible = window.is_divisible();
        let Window { core, stored, units, head, .. } = window;
        Self {
            core,
            jobs,
            slot,
            stored,
            is_divisible,
            groups: groups(units).into(),
            base: stored.start(),
            buffer: head,
            overrun: false,
        }
    }

    fn leds(&self) -> impl Iterator<Item = &Led> {
        self.groups.iter().flatten()
    }

    fn is_listed(&self) -> bool {
        let units: Vec<_> = self.leds().map(|led| led.lead.unit()).collect();
        self.core.guides.list_of(units.into_iter()).is_some()
    }

    /// First byte that has not come.
    fn received(&self) -> u64 {
        self.base + self.buffer.len() as u64
    }

    fn missing(&self) -> ByteRange {
        ByteRange::new(self.received(), self.stored.end()).unwrap_or_default()
    }

    fn take(&mut self, piece: Bytes) {
        self.core.counters.received(piece.len() as u64);
        if piece.len() as u64 > self.missing().len() {
            self.overrun = true;
            return;
        }
        self.buffer.extend_from_slice(&piece);
        self.cut();
    }

    /// Hands on every group whose bytes have come. Stored ranges may overlap in a strange image, so a
    /// byte is kept until no later group can begin before it.
    fn cut(&mut self) {
        while self.groups.front().is_some_and(|group| group[0].unit.stored.end() <= self.received())
            && let Some(group) = self.groups.pop_front()
        {
            let range = group[0].unit.stored;
            self.skip_to(range.start());
            let len = usize::try_from(range.len()).expect("a unit fits in memory");
            let is_free = self.groups.front().is_none_or(|next| next[0].unit.stored.start() >= range.end());
            let bytes = if is_free {
                self.base = range.end();
                self.buffer.split_to(len).freeze()
            } else {
                Bytes::copy_from_slice(&self.buffer[..len])
            };
            self.jobs.push(job(&self.core, group, (None, RequestId::NONE), bytes, &self.slot));
        }
    }

    /// Drops what lies before `at`, as far as it has come.
    fn skip_to(&mut self, at: u64) {
        let skipped = at.min(self.received()).saturating_sub(self.base);
        drop(self.buffer.split_to(usize::try_from(skipped).expect("it is in memory")));
        self.base += skipped;
    }

    /// How many bytes have to come before the last unit that a reader waits for, that unit aside.
    fn last_urgent(&self) -> Option<u64> {
        let urgent = self.leds().filter(|led| led.lead.urgency().class() == Class::OnDemand);
        urgent.map(|led| led.unit.stored.start().saturating_sub(self.received())).max()
    }

    /// Holds a source to its word.
    fn verdict(&self, place: String) -> Result<(), SourceError> {
        if self.missing().is_empty() && !self.overrun {
            return Ok(());
        }
        let (came, asked) = (self.received() - self.stored.start(), self.stored.len());
        let detail = if self.overrun {
            "more bytes came than were asked for".to_owned()
        } else {
            format!("{came} bytes came instead of {asked}")
        };
        Err(SourceError::Unavailable { blob: self.core.blob().clone(), place, detail })
    }

    /// What has not come, with the beginning of it that has.
    fn rest(mut self) -> Option<Window> {
        let first = self.groups.front()?[0].unit.stored.start();
        self.skip_to(first);
        let stored = self.groups.iter().map(|group| group[0].unit.stored).reduce(ByteRange::hull)?;
        let keep = self.base == first && self.buffer.len() <= MOST_KEPT;
        let head = if keep { self.buffer } else { BytesMut::new() };
        let units = self.groups.into_iter().flatten().collect();
        Some(Window { head, ..Window::bulk(self.core, stored, units) })
    }
}
