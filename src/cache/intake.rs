//! Where the bytes of a ranged read arrive and are cut into units.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};

use super::core::Core;
use super::fetch::{Slot, job};
use super::pool::Queue;
use super::window::{Led, Window, groups};
use crate::base::{ByteRange, Class, RequestId};
use crate::source::SourceError;

/// A reader of a unit in bulk waits for the stream if no more than this has to come before the unit.
const NEAR: u64 = 256 << 10;

/// The same where a list says that something in the stream will be read: mostly all of it, and going on costs a reader no more
/// than a round trip would.
const NEAR_IN_A_LIST: u64 = 1 << 20;

/// Most bytes of a half arrived unit that are kept when a stream gives way.
const MOST_KEPT: usize = 1 << 20;

/// What a read has to do with readers who may have joined it.
pub(super) enum Joined {
    Nobody,
    /// One waits for what will not come within a moment.
    TooFarAhead,
    /// One waits since then.
    Since(Instant),
}

/// Where the bytes of a read arrive and are cut into units.
pub(super) struct Intake {
    core: Arc<Core>,
    jobs: Arc<Queue>,
    slot: Arc<Slot>,
    stored: ByteRange,
    pub(super) is_divisible: bool,
    /// As of the window.
    pub(super) asked: Option<Instant>,
    pub(super) request: RequestId,
    bulk: bool,
    began: Instant,
    /// What has not come whole, in order of stored ranges.
    groups: VecDeque<Vec<Led>>,
    /// Stored offset of the first byte of `buffer`.
    base: u64,
    buffer: BytesMut,
    /// More came than was asked for.
    overrun: bool,
}

impl Intake {
    pub(super) fn new(window: Window, jobs: Arc<Queue>, slot: Arc<Slot>) -> Self {
        let is_divisible = window.is_divisible();
        let Window { core, stored, units, asked, request, bulk, head, .. } = window;
        Self {
            core,
            jobs,
            slot,
            stored,
            is_divisible,
            asked,
            request,
            bulk,
            began: Instant::now(),
            groups: groups(units).into(),
            base: stored.start(),
            buffer: head,
            overrun: false,
        }
    }

    fn leds(&self) -> impl Iterator<Item = &Led> {
        self.groups.iter().flatten()
    }

    /// How often bytes of it came and were wrong.
    pub(super) fn wrong(&self) -> usize {
        self.leds().map(|led| led.wrong).max().unwrap_or(0)
    }

    /// Whether all units have come.
    pub(super) fn is_whole(&self) -> bool {
        self.groups.is_empty()
    }

    fn is_listed(&self) -> bool {
        let units: Vec<_> = self.leds().map(|led| led.lead.unit()).collect();
        self.core.guides.list_of(units.into_iter()).is_some()
    }

    /// First byte that has not come.
    fn received(&self) -> u64 {
        self.base + self.buffer.len() as u64
    }

    pub(super) fn missing(&self) -> ByteRange {
        ByteRange::new(self.received(), self.stored.end()).unwrap_or_default()
    }

    pub(super) fn take(&mut self, mut piece: Bytes) {
        self.core.counters.received(piece.len() as u64);
        if piece.len() as u64 > self.missing().len() {
            self.overrun = true;
            return;
        }
        while !piece.is_empty() {
            if self.buffer.is_empty() && self.pass(&mut piece) {
                continue;
            }
            // No more than completes the first group: those behind it may lie in one piece.
            let first = self.groups.front().map(|group| group[0].unit.stored.end().saturating_sub(self.received()));
            let want = first.and_then(|want| usize::try_from(want).ok()).filter(|&want| want > 0);
            let part = piece.split_to(want.unwrap_or(piece.len()).min(piece.len()));
            self.buffer.reserve(want.unwrap_or(0));
            self.buffer.extend_from_slice(&part);
            self.cut();
        }
    }

    /// Hands on the first group if all of it lies in `piece`, which begins at the first byte that has not come, and
    /// takes it out.
    fn pass(&mut self, piece: &mut Bytes) -> bool {
        let Some(range) = self.groups.front().map(|group| group[0].unit.stored) else { return false };
        let place = |at: u64| usize::try_from(at.checked_sub(self.base)?).ok();
        let (Some(from), Some(to)) = (place(range.start()), place(range.end())) else { return false };
        if to > piece.len() || !self.is_first_free(range) {
            return false;
        }
        let bytes = piece.slice(from..to);
        piece.advance(to);
        self.base = range.end();
        self.hand_on(bytes);
        true
    }

    /// Hands on every group whose bytes have come. Stored ranges may overlap in a strange image, so a
    /// byte is kept until no later group can begin before it.
    fn cut(&mut self) {
        while let Some(range) = self.groups.front().map(|group| group[0].unit.stored)
            && range.end() <= self.received()
        {
            self.skip_to(range.start());
            let len = usize::try_from(range.len()).expect("a unit fits in memory");
            let bytes = if self.is_first_free(range) {
                self.base = range.end();
                self.buffer.split_to(len).freeze()
            } else {
                Bytes::copy_from_slice(&self.buffer[..len])
            };
            self.hand_on(bytes);
        }
    }

    /// Whether no group behind the first, which is at `range`, shares any of its bytes.
    fn is_first_free(&self, range: ByteRange) -> bool {
        self.groups.get(1).is_none_or(|next| next[0].unit.stored.start() >= range.end())
    }

    /// Has the first group, whose stored bytes these are, decoded and written.
    fn hand_on(&mut self, bytes: Bytes) {
        let Some(group) = self.groups.pop_front() else { return };
        if self.groups.is_empty() {
            self.observe();
        }
        self.jobs.push(job(&self.core, group, (self.asked, self.request), bytes, &self.slot));
    }

    /// Counts how long the read took. Before anybody is answered by its end.
    pub(super) fn observe(&self) {
        self.slot.fetcher.telemetry.fills.fetch.at(self.slot.class).observe(self.began.elapsed());
    }

    /// Drops what lies before `at`, as far as it has come.
    fn skip_to(&mut self, at: u64) {
        let skipped = at.min(self.received()).saturating_sub(self.base);
        drop(self.buffer.split_to(usize::try_from(skipped).expect("it is in memory")));
        self.base += skipped;
    }

    /// Looks for readers who have joined since the last time.
    pub(super) fn joined(&mut self) -> Joined {
        if !self.bulk {
            return Joined::Since(*self.asked.get_or_insert_with(Instant::now));
        }
        let near = if self.is_listed() { NEAR_IN_A_LIST } else { NEAR };
        match self.last_urgent() {
            None => Joined::Nobody,
            Some(distance) if distance > near => Joined::TooFarAhead,
            Some(_) => Joined::Since(Instant::now()),
        }
    }

    /// How many bytes have to come before the last unit that a reader waits for, that unit aside.
    fn last_urgent(&self) -> Option<u64> {
        let urgent = self.leds().filter(|led| led.lead.urgency().class() == Class::OnDemand);
        urgent.map(|led| led.unit.stored.start().saturating_sub(self.received())).max()
    }

    /// Holds a source to its word.
    pub(super) fn verdict(&self, place: String) -> Result<(), SourceError> {
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
    pub(super) fn rest(mut self) -> Option<Window> {
        let first = self.groups.front()?[0].unit.stored.start();
        self.skip_to(first);
        let stored = self.groups.iter().map(|group| group[0].unit.stored).reduce(ByteRange::hull)?;
        let keep = self.base == first && self.buffer.len() <= MOST_KEPT;
        let head = if keep { self.buffer } else { BytesMut::new() };
        let units = self.groups.into_iter().flatten().collect();
        let (request, bulk) = (self.request, self.bulk);
        Some(Window { request, bulk, head, ..Window::new(self.core, stored, units, self.asked) })
    }
}
