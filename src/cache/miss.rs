//! The way of a miss: what is absent is led or joined, gathered into ranged reads, and when the bytes
//! are there decoded, checked, written and published.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::core::Core;
use super::inflight::{Lead, Role, Wait};
use super::lent::LentUnit;
use super::plan::{PlanLimits, plan};
use super::pool::Job;
use super::readahead::Reach;
use super::sink::Scratch;
use super::store::is_full;
use super::users::ImageKey;
use super::window::{Led, Window, groups};
use super::{Completion, FillError, Request, is_needed};
use crate::base::{ByteRange, Class, RequestId};
use crate::blob::{DecodeError, Unit, UnitIndex, UnitMap};
use crate::source::{SourceError, Verdict};

/// Most decoded bytes that one call of `fill` looks at before it returns; the rest is up to the
/// pool, one step after the other. A kernel asks for a whole file when somebody maps it, and a
/// hostile image can cut that into millions of units. Larger than what all readers' slots hold.
const STEP: u64 = 64 << 20;

/// Most units before and after one that are brought along with it. Far more than a batch of small
/// files has; a hostile one could have millions of one byte each.
const MOST_SIBLINGS: usize = 2048;

/// Why the bytes of a read did not come.
pub(super) enum NotFetched {
    /// No source had them.
    Source(Arc<SourceError>),
    /// It did not get its turn, by this limit of its image.
    Limit(&'static str),
    /// There is no room to put them, so that nobody was asked.
    NoRoom,
}

impl Core {
    /// Makes `decoded` present a step after the other, then settles `wait`.
    pub(super) fn fill_range(self: &Arc<Self>, decoded: ByteRange, wait: Arc<Wait>) {
        let request = wait.request().clone();
        let step = decoded.clamp_end(decoded.start().saturating_add(STEP));
        let Some(units) = self.covering(step) else {
            let error = FillError::Unmapped { blob: self.blob().clone(), decoded: step };
            self.inflight.failures.note(&error);
            return wait.settle(&Err(error));
        };
        let rest = ByteRange::new(step.end(), decoded.end()).expect("a step ends in its range");
        let (core, class) = (Arc::clone(self), request.class());
        let done = move |outcome: Result<(), FillError>| {
            if outcome.is_err() || rest.is_empty() {
                return wait.settle(&outcome);
            }
            // A job, because the caller may be the thread that must not block.
            let engine = Arc::clone(&core.engine);
            engine.jobs().push(Job::new(class, move |_| core.fill_range(rest, wait)));
        };
        self.fill_for(request, units, Box::new(done));
    }

    /// Makes `units` present for `request`, then calls `done`. At the limit of the cache, what nobody
    /// waits for is put off until the evictor has looked, and fails if there is no room then.
    pub(super) fn fill_for(self: &Arc<Self>, request: Request, units: Range<UnitIndex>, done: Completion) {
        let (class, id) = (request.class(), request.id());
        let wait = Wait::of(request, done);
        match class {
            Class::OnDemand => self.fill_now(units, Class::OnDemand, id, &wait),
            Class::Prefetch => {
                let wanted = units.clone();
                let then = move |core: &Arc<Self>, wait: &Arc<Wait>| core.fill_now(units, Class::Prefetch, id, wait);
                self.when_room(wanted, &wait, then);
            }
        }
    }

    /// Goes on with `then` at once, or at the limit of the cache when the evictor has looked, if
    /// there is room then and any of `units` is absent now.
    pub(super) fn when_room(
        self: &Arc<Self>,
        mut units: impl Iterator<Item = UnitIndex>,
        wait: &Arc<Wait>,
        then: impl FnOnce(&Arc<Self>, &Arc<Wait>) + Send + 'static,
    ) {
        if self.engine.space.is_spent()
            && let Some(unit) = units.find(|&index| !self.ledger.presence.get(index))
        {
            let (core, wait) = (Arc::clone(self), Arc::clone(wait));
            let later = move |room| {
                if room {
                    then(&core, &wait);
                } else {
                    wait.settle(&Err(FillError::NoSpace { blob: core.blob().clone(), unit }));
                }
            };
            return self.engine.space.when_looked(Box::new(later));
        }
        then(self, wait);
    }

    pub(super) fn fill_now(self: &Arc<Self>, units: Range<UnitIndex>, class: Class, id: RequestId, wait: &Arc<Wait>) {
        let map = self.map();
        let (mut leads, mut urgent) = (Vec::new(), Vec::new());
        let mut hit = true;
        for index in units.clone().filter(|&index| !self.ledger.presence.get(index)) {
            hit = false;
            let unit = &map.units()[index as usize];
            if let Some(lent) = self.lent(index, wait.request()) {
                wait.request().give(lent);
            } else if let Some(error) = self.late(index, class) {
                wait.fail(error);
            } else if is_needed(unit) {
                leads.extend(self.enter(&map, index, units.clone(), class, Some(wait), &mut urgent));
            } else {
                let error = self.corrupt(index, unit, DecodeError::Unverifiable);
                self.inflight.failures.note(&error);
                wait.fail(error);
            }
        }
        if !urgent.is_empty() {
            self.engine.fetcher.promote(self, &urgent, id);
        }
        self.submit(&map, leads, class, id, None);
        if !hit {
            self.engine.telemetry.fills.misses.at(class).inc();
        }
        if class == Class::OnDemand {
            let counter = if hit { &self.counters.hits } else { &self.counters.misses };
            counter.fetch_add(1, Ordering::Relaxed);
            self.observe(units, wait.request().image());
        }
        wait.settle(&Ok(()));
    }

    /// Why a reader need not wait for a unit again.
    fn late(&self, index: UnitIndex, class: Class) -> Option<FillError> {
        let is_reader = class == Class::OnDemand;
        is_reader.then(|| self.inflight.failures.late(index, self.engine.options.late)).flatten()
    }

    /// A unit that the disk had no room for, for who can take it. Once there is room it is fetched and written.
    fn lent(&self, index: UnitIndex, request: &Request) -> Option<LentUnit> {
        let asks = request.takes_bytes() && self.engine.space.room.is_short();
        asks.then(|| self.engine.lent.find(self.id, index)).flatten()
    }

    /// Joins or leads the fetch of one absent unit of `wanted`, and what comes with it. Gives what is
    /// led. A unit that is to be promoted, because a reader joined a prefetch, is added to `urgent`.
    pub(super) fn enter(
        &self,
        map: &UnitMap,
        index: UnitIndex,
        wanted: Range<UnitIndex>,
        class: Class,
        wait: Option<&Arc<Wait>>,
        urgent: &mut Vec<UnitIndex>,
    ) -> Vec<Lead> {
        // Those that the caller is about to ask for as well are as urgent at once: raising them later
        // means a search through the queues for each.
        let urgency = |sibling| (sibling, if wanted.contains(&sibling) { class } else { Class::Prefetch });
        match self.inflight.enter(index, class, wait, self.siblings(map, index).map(urgency)) {
            // One may have been published and finished between the caller's look and this.
            Role::Lead(leads) => {
                let (present, absent) = leads.into_iter().partition(|lead| self.ledger.presence.get(lead.unit()));
                let present: Vec<Lead> = present;
                present.into_iter().for_each(|lead| lead.finish(&Ok(())));
                absent
            }
            Role::Joined { promote } => {
                if promote {
                    urgent.push(index);
                }
                Vec::new()
            }
        }
    }

    /// The absent units that share the stored bytes of unit `index`: whoever fetches one brings
    /// them all, and decompresses once. Members of a batch have consecutive numbers.
    pub(super) fn siblings<'a>(&'a self, map: &'a UnitMap, index: UnitIndex) -> impl Iterator<Item = UnitIndex> + 'a {
        let unit = &map.units()[index as usize];
        let shares = move |&other: &UnitIndex| map.units()[other as usize].shares_with(unit);
        let before = (0..index).rev().take_while(shares);
        let after = (index + 1..map.count()).take_while(shares);
        let can_come = |&other: &UnitIndex| !self.ledger.presence.get(other) && is_needed(&map.units()[other as usize]);
        before.take(MOST_SIBLINGS).chain(after.take(MOST_SIBLINGS)).filter(can_come)
    }

    /// Has led units copied where that can be, and the others fetched, for `request`; by the limits of
    /// `bulk` behind everything.
    pub(super) fn submit(
        self: &Arc<Self>,
        map: &UnitMap,
        leads: Vec<Lead>,
        class: Class,
        request: RequestId,
        bulk: Option<PlanLimits>,
    ) {
        let leads = self.look_at_claims(map, leads, (class, request, bulk));
        let leads = if self.engine.twins.is_of_use() { self.copy_twins(map, leads) } else { leads };
        self.fetch(map, leads, class, request, bulk);
    }

    /// Has those of the led units looked at that may be in the file already; gives back the others.
    fn look_at_claims(
        self: &Arc<Self>,
        map: &UnitMap,
        leads: Vec<Lead>,
        (class, request, bulk): (Class, RequestId, Option<PlanLimits>),
    ) -> Vec<Lead> {
        let (claimed, others) = leads.into_iter().partition(|lead| self.ledger.is_claimed(lead.unit()));
        let claimed: Vec<Lead> = claimed;
        for lead in claimed {
            let unit = map.units()[lead.unit() as usize];
            let (units, urgency) = (vec![(self.id, lead.unit())], vec![lead.urgency().clone()]);
            let core = Arc::clone(self);
            let look = move |scratch: &mut Scratch| {
                // Dropping the lead cancels whoever waits.
                if core.is_closed() {
                    return;
                }
                let room = scratch.room(usize::try_from(unit.blocks().len()).expect("a unit has at most 16 MiB"));
                if core.ledger.reclaim(lead.unit(), &unit, room) {
                    lead.finish(&Ok(()));
                    core.flush_if_full();
                    return;
                }
                tracing::warn!(blob = %core.blob(), unit = lead.unit(), "a unit that somebody changed on disk is fetched again");
                core.fetch(&core.map(), vec![lead], class, request, bulk);
            };
            self.engine.jobs().push(Job { units, urgency, run: Box::new(look) });
        }
        others
    }

    /// Gathers led units into ranged reads and queues them.
    pub(super) fn fetch(
        self: &Arc<Self>,
        map: &UnitMap,
        leads: Vec<Lead>,
        class: Class,
        request: RequestId,
        bulk: Option<PlanLimits>,
    ) {
        if leads.is_empty() {
            return;
        }
        let options = &self.engine.options;
        let limits = bulk.unwrap_or(PlanLimits { gap: options.gap, window: options.window(class) });
        let missing = leads.iter().map(|lead| (lead.unit(), map.units()[lead.unit() as usize])).collect();
        let mut leads: HashMap<UnitIndex, Lead> = leads.into_iter().map(|lead| (lead.unit(), lead)).collect();
        let reads = plan(missing, limits);
        let windows = reads.into_iter().map(|read| {
            let led = |index| {
                let lead = leads.remove(&index)?;
                Some(Led { unit: map.units()[index as usize], lead, wrong: 0 })
            };
            let units = read.units.into_iter().filter_map(led).collect();
            let window = Window::new(Arc::clone(self), read.stored, units, None);
            Window { request, bulk: bulk.is_some(), ..window }
        });
        self.enqueue(windows.collect());
    }

    pub(super) fn enqueue(self: &Arc<Self>, windows: Vec<Window>) {
        self.engine.fetcher.enqueue(windows);
        // A device that closed in between has already removed its windows and missed these.
        if self.is_closed() {
            self.engine.fetcher.remove(self.id);
        }
    }

    /// Notes where a reader is, of `image` if that is known, and fetches ahead of it if it walks forward. Not while
    /// reads are recorded that a kernel only tells of what is missing: what had come before its reader would be in no
    /// trace.
    pub(super) fn observe(self: &Arc<Self>, units: Range<UnitIndex>, image: Option<ImageKey>) {
        let options = &self.engine.options;
        let reach = Reach { first: options.readahead_first, most: options.readahead_most };
        let hides = self.ledger.file().is_none() && self.is_traced();
        let space = &self.engine.space;
        if units.is_empty() || reach.first == 0 || hides || space.is_spent() || space.room.is_short() {
            return;
        }
        // A list knows better what is next than a guess, which would be in its way.
        if self.guides.list_of(units.clone()).is_some() {
            return;
        }
        // A missed observation costs a little speed; waiting would cost a reader its answer.
        let Ok(mut streams) = self.streams.try_lock() else { return };
        let Some(ahead) = streams.observe(&self.layout(), units, reach) else { return };
        drop(streams);
        if self.ledger.presence.all(ahead.clone()) {
            return;
        }
        let core = Arc::clone(self);
        // Urgent although it is prefetch: it is short, and late it is of no use.
        self.engine.jobs().push(Job::new(Class::OnDemand, move |_| core.prefetch(ahead, image)));
    }

    /// Fetches what is absent of `units` and in nobody's hands yet, ahead of a reader of `image`.
    pub(super) fn prefetch(self: &Arc<Self>, units: Range<UnitIndex>, image: Option<ImageKey>) {
        let map = self.map();
        let mut request = Request::new(RequestId::NONE, Class::Prefetch);
        if let Some(image) = image {
            request = request.of(image);
        }
        // Nobody waits; it says for whom it is.
        let wait = Wait::of(request, Box::new(drop));
        let absent = units.filter(|&index| !self.ledger.presence.get(index) && is_needed(&map.units()[index as usize]));
        // Prefetch that joins a fetch makes nothing urgent.
        let lead = |index| self.enter(&map, index, index..index + 1, Class::Prefetch, Some(&wait), &mut Vec::new());
        let leads = absent.flat_map(lead).collect();
        self.submit(&map, leads, Class::Prefetch, RequestId::NONE, None);
        wait.settle(&Ok(()));
    }

    /// Asks for every stored range of a window alone, because the blob ends before the window does: the
    /// one that an image misplaced must not take its neighbours along.
    pub(super) fn split(self: &Arc<Self>, window: Window) {
        let alone = |group: Vec<Led>| {
            let alone = Window::new(Arc::clone(self), group[0].unit.stored, group, window.asked);
            Window { request: window.request, bulk: window.bulk, ..alone }
        };
        self.enqueue(groups(window.units).into_iter().map(alone).collect());
    }

    /// Asks once more for a stored range whose bytes were damaged, alone: a proxy may have mixed up
    /// a long range, and its neighbours were fine. So often that each place that has the blob is asked. Who waits does not wait any longer for that.
    pub(super) fn refetch(self: &Arc<Self>, damaged: Vec<Led>, (asked, request): (Option<Instant>, RequestId)) {
        self.engine.telemetry.fills.refetched.inc();
        let stored = damaged[0].unit.stored;
        self.sources.judged(self.blob(), stored, Verdict::Wrong);
        let units = damaged.into_iter().map(|led| Led { wrong: led.wrong + 1, ..led }).collect();
        self.enqueue(vec![Window { request, ..Window::new(Arc::clone(self), stored, units, asked) }]);
    }

    pub(super) fn fetch_failed(&self, led: Led, cause: &NotFetched) {
        let (blob, unit, stored) = (self.blob().clone(), led.lead.unit(), led.unit.stored);
        let error = match cause {
            NotFetched::Source(cause) => FillError::Source { blob, unit, stored, cause: Arc::clone(cause) },
            NotFetched::Limit(limit) => FillError::Limited { blob, unit, stored, limit },
            NotFetched::NoRoom => FillError::NoSpace { blob, unit },
        };
        if matches!(cause, NotFetched::Source(cause) if matches!(**cause, SourceError::Deadline { .. })) {
            self.inflight.failures.note_late(led.lead.unit(), error.clone());
        }
        self.counters.failed();
        led.lead.finish(&Err(error));
    }

    pub(super) fn deadline_error(&self, range: ByteRange, place: String) -> SourceError {
        SourceError::Deadline { blob: self.blob().clone(), place, range }
    }

    pub(super) fn corrupt(&self, index: UnitIndex, unit: &Unit, cause: DecodeError) -> FillError {
        FillError::Corrupt { blob: self.blob().clone(), unit: index, stored: unit.stored, cause }
    }

    pub(super) fn unwritten(&self, unit: UnitIndex, cause: io::Error) -> FillError {
        let blob = self.blob().clone();
        if is_full(&cause) {
            FillError::NoSpace { blob, unit }
        } else {
            FillError::Io { blob, unit, cause: Arc::new(cause) }
        }
    }
}
