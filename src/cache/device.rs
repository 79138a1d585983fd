use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::Instant;

use bytes::Bytes;

use super::background::Background;
use super::engine::Engine;
use super::fetch::{Led, Window, groups};
use super::health::DeviceHealth;
use super::inflight::{Inflight, Lead, Role, Wait};
use super::ledger::{FlushError, Ledger};
use super::plan::{PlanLimits, plan};
use super::pool::Job;
use super::prefetch::Want;
use super::presence::found;
use super::readahead::{Reach, Streams};
use super::shelves::note_use;
use super::sink::{Scratch, Sink};
use super::sources::Sources;
use super::stats::{Counters, DeviceStats, count};
use super::store::{StoreError, is_full};
use super::trace::Trace;
use super::twins::Twins;
use super::{Completion, Fill, FillError, Request, is_needed};
use crate::base::{BlobId, ByteRange, Class, RequestId};
use crate::blob::{DecodeError, Decoder, Unit, UnitIndex, UnitMap};
use crate::source::{BlobSource, SourceError};
use crate::sys::faultpoint;

/// A blob's decoded bytes, brought in when wanted.
///
/// Dropping the last owner cancels what is queued, completes every waiter and makes durable what
/// is present, for which it waits for the disk.
pub struct Device {
    core: Arc<Core>,
    /// Where the device lives in a store; `None` over a foreign sink.
    home: Option<Home>,
    /// Held while the map changes: two teachers at once would lose what one of them taught.
    learning: Mutex<()>,
}

type Save = dyn Fn(&UnitMap) -> Result<(), StoreError> + Send + Sync;

/// Where a device of a store lives.
pub(super) struct Home {
    /// The file of decoded bytes.
    pub(super) data: PathBuf,
    /// The same, open for writing since before anybody could mark it, if it is a file of this host.
    pub(super) file: Option<Arc<File>>,
    /// Makes what the map says durable. Presence must not outlive the checks it was won by.
    pub(super) save: Box<Save>,
    /// The right to write there: the store stays locked while a device can write to it.
    pub(super) _lock: Arc<File>,
}

/// Most decoded bytes that one call of `fill` looks at before it returns; the rest is up to the
/// pool, one step after the other. A kernel asks for a whole file when somebody maps it, and a
/// hostile image can cut that into millions of units. Larger than what all readers' slots hold.
const STEP: u64 = 64 << 20;

/// Most units before and after one that are brought along with it. Far more than a batch of small
/// files has; a hostile one could have millions of one byte each.
const MOST_SIBLINGS: usize = 2048;

/// What queued and running work holds on to.
pub(super) struct Core {
    /// Unique within the engine.
    pub(super) id: u64,
    /// Where units lie. Never changes, so that asking for presence takes no lock.
    layout: Arc<UnitMap>,
    /// The same units with all checks known so far; another image may add some.
    map: RwLock<Arc<UnitMap>>,
    pub(super) sources: Sources,
    pub(super) ledger: Arc<Ledger>,
    inflight: Arc<Inflight>,
    /// The data file, if it is a store's.
    pub(super) data: Option<PathBuf>,
    streams: Mutex<Streams>,
    pub(super) engine: Arc<Engine>,
    pub(super) counters: Counters,
    completeness: Completeness,
    pub(super) background: Background,
    /// Whether anybody is in `traces`: asked for every read.
    is_traced: AtomicBool,
    /// Who wants to know what is read, and which of its devices this is.
    traces: Mutex<Vec<(Arc<Trace>, usize)>>,
    closed: AtomicBool,
    /// The last flush failed; said once, not every two seconds.
    flush_failed: AtomicBool,
}

/// Whether everything that can be present is, durably.
#[derive(Default)]
struct Completeness {
    /// Units whose check is known.
    needed: AtomicU32,
    reached: AtomicBool,
    /// Whom to tell.
    callbacks: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl Device {
    /// A device over a file that somebody else owns, with no durable copy of its presence.
    ///
    /// `present` are the decoded ranges already in the sink: a unit is present if all its blocks
    /// lie in them. They may come in any order, touch and overlap.
    pub fn with_sink(
        map: UnitMap,
        source: Arc<dyn BlobSource>,
        sink: Box<dyn Sink>,
        present: &[ByteRange],
        engine: Arc<Engine>,
    ) -> Arc<Self> {
        let words = found(&map, present);
        Self::assemble(Arc::new(map), source, Arc::new(Ledger::new(sink, words, None)), None, engine)
    }

    pub(super) fn assemble(
        map: Arc<UnitMap>,
        source: Arc<dyn BlobSource>,
        ledger: Arc<Ledger>,
        home: Option<Home>,
        engine: Arc<Engine>,
    ) -> Arc<Self> {
        ledger.attach();
        let core = Arc::new(Core {
            id: engine.number_device(),
            layout: Arc::clone(&map),
            map: RwLock::new(Arc::clone(&map)),
            sources: Sources::new(source),
            ledger,
            inflight: Arc::new(Inflight::new(engine.telemetry.clone())),
            data: home.as_ref().map(|home| home.data.clone()),
            streams: Mutex::default(),
            engine: Arc::clone(&engine),
            counters: Counters::default(),
            completeness: Completeness::default(),
            background: Background::default(),
            is_traced: AtomicBool::new(false),
            traces: Mutex::default(),
            closed: AtomicBool::new(false),
            flush_failed: AtomicBool::new(false),
        });
        core.learn(map);
        engine.flusher.watch(Arc::downgrade(&core));
        Arc::new(Self { core, home, learning: Mutex::default() })
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// The blob this device holds.
    pub fn blob(&self) -> &BlobId {
        self.core.blob()
    }

    /// All units, with the checks known at this moment.
    pub fn map(&self) -> Arc<UnitMap> {
        self.core.map()
    }

    /// The file that holds the decoded bytes; `None` over a foreign sink.
    pub fn data_path(&self) -> Option<&Path> {
        self.home.as_ref().map(|home| home.data.as_path())
    }

    /// The file that holds the decoded bytes, open for writing since before anybody could mark it;
    /// `None` over a foreign sink, or if the store's disk is not one of this host.
    pub fn data_file(&self) -> Option<&Arc<File>> {
        self.home.as_ref().and_then(|home| home.file.as_ref())
    }

    /// Name of the device's directory in its store; `None` over a foreign sink.
    pub fn directory(&self) -> Option<&str> {
        self.data_path()?.parent()?.file_name()?.to_str()
    }

    /// Opens the file that holds the decoded bytes, for reading.
    ///
    /// # Errors
    /// `Unsupported` over a foreign sink, else what the system says.
    pub fn open_data(&self) -> io::Result<File> {
        File::open(self.data_path().ok_or(io::ErrorKind::Unsupported)?)
    }

    /// What the device has done so far.
    pub fn stats(&self) -> DeviceStats {
        let (core, counters) = (&self.core, &self.core.counters);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceStats {
            units: core.completeness.needed.load(Ordering::Acquire),
            units_present: core.ledger.presence.count(),
            units_filled: read(&counters.filled),
            units_copied: read(&counters.copied),
            stored_bytes_fetched: read(&counters.fetched),
            requests: read(&counters.requests),
            hits: read(&counters.hits),
            misses: read(&counters.misses),
            errors: read(&counters.errors),
            complete: self.is_complete_durable(),
        }
    }

    /// How the device is doing. Looks at every unit: for people who ask, not for each read.
    pub fn health(&self) -> DeviceHealth {
        let (core, map) = (&self.core, self.map());
        let (waiting, since) = core.inflight.waiting();
        let failures = &core.inflight.failures;
        let (mut needed_bytes, mut present_bytes) = (0, 0);
        for (index, unit) in (0..).zip(map.units()).filter(|(_, unit)| is_needed(unit)) {
            needed_bytes += unit.decoded.len();
            present_bytes += if core.ledger.presence.get(index) { unit.decoded.len() } else { 0 };
        }
        DeviceHealth {
            waiting,
            oldest_wait: since.map(|since| since.elapsed()),
            failed: failures.by_cause.iter().map(|(cause, count)| (cause, count.get())).collect(),
            is_failing: failures.is_failing(),
            last_failure: failures.last(),
            sources: core.sources.all().iter().map(|source| source.describe()).collect(),
            needed_bytes,
            present_bytes,
        }
    }

    /// Whether the last unit that was wanted did not come, other than by being cancelled.
    pub fn is_failing(&self) -> bool {
        self.core.inflight.failures.is_failing()
    }

    /// Readers that wait for data of it now, and since when the first of them has.
    pub fn waiting(&self) -> (usize, Option<Instant>) {
        self.core.inflight.waiting()
    }

    /// Bytes of the units that are present, in whole blocks.
    pub fn present_bytes(&self) -> u64 {
        let layout = &self.core.layout;
        let present = (0..).zip(layout.units()).filter(|(index, _)| self.core.ledger.presence.get(*index));
        present.map(|(_, unit)| unit.blocks().len()).sum()
    }

    /// A copy of the presence of all units.
    pub(super) fn snapshot(&self) -> Vec<u64> {
        self.core.ledger.presence.snapshot()
    }

    /// The data file, for reading without raising events.
    pub(super) fn reader(&self) -> Option<&File> {
        self.core.ledger.file()
    }

    /// Whether every unit whose check is known is present and on stable storage. Never true while
    /// there are units and no check of any is known.
    pub fn is_complete_durable(&self) -> bool {
        self.core.is_complete_durable()
    }

    /// Whether it is complete and durable, and nobody wants to see its reads: whoever reads it need
    /// not ask.
    pub fn is_settled(&self) -> bool {
        self.is_complete_durable() && !self.core.is_traced()
    }

    /// Tells `trace` of all reads from now on, as those of its device `number`.
    pub fn start_trace(&self, trace: &Arc<Trace>, number: usize) {
        self.core.traces.lock().unwrap().push((Arc::clone(trace), number));
        // Under the lock under which devices are found settled.
        let _callbacks = self.core.completeness.callbacks.lock().unwrap();
        self.core.is_traced.store(true, Ordering::Release);
    }

    /// Tells `trace` no more. May run what waits for the device to settle.
    pub fn stop_trace(&self, trace: &Arc<Trace>) {
        let mut traces = self.core.traces.lock().unwrap();
        traces.retain(|(other, _)| !Arc::ptr_eq(other, trace));
        self.core.is_traced.store(!traces.is_empty(), Ordering::Release);
        drop(traces);
        self.core.note_completeness();
    }

    /// Calls `callback` once, when [`Device::is_settled`] becomes true: at once, or later on the
    /// thread that flushes or ends a trace. It must not block; this call may wait for a flush.
    pub fn on_complete(&self, callback: Box<dyn FnOnce() + Send>) {
        let mut callbacks = self.core.completeness.callbacks.lock().unwrap();
        if !self.is_settled() {
            return callbacks.push(callback);
        }
        drop(callbacks);
        callback();
    }

    /// Makes everything present durable now. Waits for the disk.
    pub fn flush(&self) -> Result<(), FlushError> {
        self.core.flush()
    }

    /// Starts fetching everything that is missing, behind all readers. Goes on after transient
    /// faults and past corrupt units; a full disk or a permanent fault ends it, and it may be
    /// started again. Does nothing if it is going on already.
    pub fn complete_in_background(&self) {
        self.fetch_in_background(&[], true);
    }

    /// The same for some ranges, in this order, and then for what else is missing if `rest` is set.
    pub fn fetch_in_background(&self, decoded: &[ByteRange], rest: bool) {
        let wants: Vec<_> = decoded.iter().map(|&decoded| Want { device: 0, decoded }).collect();
        self.core.background.start(&self.core, &wants, rest);
    }

    /// Stops what [`Device::complete_in_background`] started; units in flight still arrive.
    pub fn cancel_background(&self) {
        self.core.background.stop();
    }

    /// Adds what `map` knows about how to check units, and a source to ask before the others, when
    /// another image turns out to share the blob. Waits for the disk if the device is a store's.
    ///
    /// Returns `false` and changes nothing if the maps disagree, or if what is new could not be
    /// made durable, which is logged: the other image then needs a device of its own.
    pub fn learn(&self, map: &UnitMap, source: Arc<dyn BlobSource>) -> bool {
        self.try_learn(map, source).unwrap_or_else(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(blob = %self.blob(), cause, "{error}");
            false
        })
    }

    /// The same for callers that can return an error.
    pub(super) fn try_learn(&self, map: &UnitMap, source: Arc<dyn BlobSource>) -> Result<bool, StoreError> {
        let _one_at_a_time = self.learning.lock().unwrap();
        let known = self.map();
        let Some(merged) = known.merge(map) else { return Ok(false) };
        let news = merged != *known;
        if let Some(home) = self.home.as_ref().filter(|_| news) {
            (home.save)(&merged)?;
        }
        self.core.sources.add(source);
        if news {
            self.core.learn(Arc::new(merged));
        }
        Ok(true)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("blob", self.blob()).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.core.closed.store(true, Ordering::Release);
        self.core.background.stop();
        self.core.engine.fetcher.remove(self.core.id);
        self.core.flush_and_log();
        if let Some(dir) = self.data_path().and_then(Path::parent) {
            note_use(dir);
        }
        self.core.ledger.detach();
    }
}

impl Fill for Device {
    fn decoded_len(&self) -> u64 {
        self.core.layout.decoded_len()
    }

    fn present(&self, decoded: ByteRange) -> bool {
        self.core.layout.covering(decoded).is_some_and(|units| self.core.ledger.presence.all(units))
    }

    fn fill_for(&self, request: Request, decoded: ByteRange, done: Completion) {
        if request.class() == Class::OnDemand {
            self.core.note_read(decoded);
        }
        let wait = Wait::of(request, done);
        self.core.fill_range(decoded, wait);
    }

    fn touched(&self, decoded: ByteRange) {
        self.core.counters.hits.fetch_add(1, Ordering::Relaxed);
        self.core.note_read(decoded);
        if let Some(units) = self.core.layout.covering(decoded) {
            self.core.observe(units);
        }
    }
}

impl Core {
    /// As [`Device::is_complete_durable`].
    fn is_complete_durable(&self) -> bool {
        self.completeness.reached.load(Ordering::Acquire)
    }

    /// Lets other devices copy from a device, if nothing is missing of it. Holds on to it for moments
    /// only: whoever closes a device wants the file closed.
    pub(super) fn offer(device: &Weak<Self>, twins: &Twins) {
        let complete = || device.upgrade().filter(|core| core.is_complete_durable());
        let Some((Some(data), map)) = complete().map(|core| (core.data.clone(), core.map())) else { return };
        twins.add(&data, &map);
        // In between another image may have made more of it wanted, of this device or the next.
        if complete().is_none() {
            twins.forget(&data);
        }
    }

    pub(super) fn blob(&self) -> &BlobId {
        self.layout.blob()
    }

    pub(super) fn map(&self) -> Arc<UnitMap> {
        Arc::clone(&self.map.read().unwrap())
    }

    fn is_traced(&self) -> bool {
        self.is_traced.load(Ordering::Acquire)
    }

    /// A reader asked for this.
    fn note_read(&self, decoded: ByteRange) {
        if self.is_traced() {
            self.traces.lock().unwrap().iter().for_each(|(trace, number)| trace.note(*number, decoded));
        }
    }

    /// The units that hold `decoded`, if there are units for all of it.
    pub(super) fn covering(&self, decoded: ByteRange) -> Option<Range<UnitIndex>> {
        self.layout.covering(decoded)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Makes `decoded` present a step after the other, then settles `wait`.
    fn fill_range(self: &Arc<Self>, decoded: ByteRange, wait: Arc<Wait>) {
        let request = wait.request().clone();
        let step = decoded.clamp_end(decoded.start().saturating_add(STEP));
        let Some(units) = self.layout.covering(step) else {
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
    fn fill_for(self: &Arc<Self>, request: Request, units: Range<UnitIndex>, done: Completion) {
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

    fn fill_now(self: &Arc<Self>, units: Range<UnitIndex>, class: Class, id: RequestId, wait: &Arc<Wait>) {
        let map = self.map();
        let (mut leads, mut urgent) = (Vec::new(), Vec::new());
        let mut hit = true;
        for index in units.clone().filter(|&index| !self.ledger.presence.get(index)) {
            hit = false;
            let unit = &map.units()[index as usize];
            if is_needed(unit) {
                leads.extend(self.enter(&map, index, units.clone(), class, Some(wait), &mut urgent));
            } else {
                let error = self.corrupt(index, unit, DecodeError::Unverifiable);
                self.inflight.failures.note(&error);
                wait.fail(error);
            }
        }
        if !urgent.is_empty() {
            self.engine.fetcher.promote(self.id, &urgent, id);
        }
        self.submit(&map, leads, class, id, None);
        if !hit {
            self.engine.telemetry.fills.misses.at(class).inc();
        }
        if class == Class::OnDemand {
            let counter = if hit { &self.counters.hits } else { &self.counters.misses };
            counter.fetch_add(1, Ordering::Relaxed);
            self.observe(units);
        }
        wait.settle(&Ok(()));
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
    fn siblings<'a>(&'a self, map: &'a UnitMap, index: UnitIndex) -> impl Iterator<Item = UnitIndex> + 'a {
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
        let leads = if self.engine.twins.is_of_use() { self.copy_twins(map, leads) } else { leads };
        self.fetch(map, leads, class, request, bulk);
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
                Some(Led { unit: map.units()[index as usize], lead, again: false })
            };
            let units = read.units.into_iter().filter_map(led).collect();
            let window = Window::new(Arc::clone(self), read.stored, units, None);
            Window { request, bulk: bulk.is_some(), ..window }
        });
        self.enqueue(windows.collect());
    }

    fn enqueue(self: &Arc<Self>, windows: Vec<Window>) {
        self.engine.fetcher.enqueue(windows);
        // A device that closed in between has already removed its windows and missed these.
        if self.is_closed() {
            self.engine.fetcher.remove(self.id);
        }
    }

    /// Notes where a reader is, and fetches ahead of it if it walks forward.
    fn observe(self: &Arc<Self>, units: Range<UnitIndex>) {
        let options = &self.engine.options;
        let reach = Reach { first: options.readahead_first, most: options.readahead_most };
        if units.is_empty() || reach.first == 0 || self.engine.space.is_spent() {
            return;
        }
        // A missed observation costs a little speed; waiting would cost a reader its answer.
        let Ok(mut streams) = self.streams.try_lock() else { return };
        let Some(ahead) = streams.observe(&self.layout, units, reach) else { return };
        drop(streams);
        if self.ledger.presence.all(ahead.clone()) {
            return;
        }
        let core = Arc::clone(self);
        // Urgent although it is prefetch: it is short, and late it is of no use.
        self.engine.jobs().push(Job::new(Class::OnDemand, move |_| core.prefetch(ahead)));
    }

    /// Fetches what is absent of `units` and in nobody's hands yet, for nobody in particular.
    fn prefetch(self: &Arc<Self>, units: Range<UnitIndex>) {
        let map = self.map();
        let absent = units.filter(|&index| !self.ledger.presence.get(index) && is_needed(&map.units()[index as usize]));
        // Prefetch that joins a fetch makes nothing urgent.
        let lead = |index| self.enter(&map, index, index..index + 1, Class::Prefetch, None, &mut Vec::new());
        let leads = absent.flat_map(lead).collect();
        self.submit(&map, leads, Class::Prefetch, RequestId::NONE, None);
    }

    /// Decodes, checks, writes and publishes the units of one stored range one by one, and tells
    /// everyone who waits. `asked`, by whom and when, as in [`Window`].
    pub(super) fn land(
        self: &Arc<Self>,
        group: Vec<Led>,
        asked: (Option<Instant>, RequestId),
        stored: &[u8],
        scratch: &mut Scratch,
    ) {
        let mut decoder = Decoder::new();
        let damaged: Vec<Led> =
            group.into_iter().filter_map(|led| self.land_one(led, stored, &mut decoder, scratch)).collect();
        if !damaged.is_empty() {
            self.refetch(damaged, asked);
        }
    }

    /// The same for one unit; gives it back if its bytes are damaged and it deserves another try.
    fn land_one(&self, led: Led, stored: &[u8], decoder: &mut Decoder, scratch: &mut Scratch) -> Option<Led> {
        if self.is_closed() {
            return None;
        }
        let (index, unit) = (led.lead.unit(), led.unit);
        let room = scratch.room(usize::try_from(unit.blocks().len()).expect("a unit has at most 16 MiB"));
        faultpoint::reach("fetched");
        let outcome = match decoder.decode(self.layout.key(), &unit, stored, room) {
            Err(_) if !led.again => return Some(led),
            Err(cause) => Err(self.corrupt(index, &unit, cause)),
            Ok(()) => self.land_checked(index, &unit, room).map_err(|cause| self.unwritten(index, cause)),
        };
        match &outcome {
            Ok(_) => self.note_filled(&unit, led.lead.urgency().class()),
            Err(_) => self.counters.failed(),
        }
        led.lead.finish(&outcome.map(drop));
        self.flush_if_full();
        None
    }

    /// Writes checked blocks and publishes them. Where the disk is full, waits until what nobody
    /// uses has gone, and tries once more.
    pub(super) fn land_checked(&self, index: UnitIndex, unit: &Unit, blocks: &[u8]) -> io::Result<bool> {
        let fresh = match self.ledger.land(index, unit, blocks) {
            Err(cause) if is_full(&cause) => {
                count(&self.engine.counters.refused_writes, 1);
                let room = self.engine.space.make_room(blocks.len() as u64);
                if room { self.ledger.land(index, unit, blocks)? } else { return Err(cause) }
            }
            outcome => outcome?,
        };
        if fresh {
            self.engine.space.landed(blocks.len() as u64);
        }
        Ok(fresh)
    }

    /// Has the device made durable at once if nothing is missing any more.
    pub(super) fn flush_if_full(&self) {
        if self.ledger.presence.count() >= self.completeness.needed.load(Ordering::Acquire) {
            self.engine.flusher.kick();
        }
    }

    fn note_filled(&self, unit: &Unit, class: Class) {
        self.counters.filled.fetch_add(1, Ordering::Relaxed);
        let fills = &self.engine.telemetry.fills;
        fills.filled.at(class).inc();
        fills.filled_bytes.at(class).add(unit.decoded.len());
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
    /// a long range, and its neighbours were fine. Who waits does not wait any longer for that.
    fn refetch(self: &Arc<Self>, damaged: Vec<Led>, (asked, request): (Option<Instant>, RequestId)) {
        self.engine.telemetry.fills.refetched.inc();
        let stored = damaged[0].unit.stored;
        let units = damaged.into_iter().map(|led| Led { again: true, ..led }).collect();
        self.enqueue(vec![Window { request, ..Window::new(Arc::clone(self), stored, units, asked) }]);
    }

    pub(super) fn fetch_failed(&self, led: Led, cause: &Arc<SourceError>) {
        let (blob, unit, stored) = (self.blob().clone(), led.lead.unit(), led.unit.stored);
        let error = FillError::Source { blob, unit, stored, cause: Arc::clone(cause) };
        self.counters.failed();
        led.lead.finish(&Err(error));
    }

    /// Holds a source to its word.
    pub(super) fn whole(&self, bytes: Bytes, stored: ByteRange, place: String) -> Result<Bytes, SourceError> {
        self.counters.received(bytes.len() as u64);
        if bytes.len() as u64 == stored.len() {
            return Ok(bytes);
        }
        let detail = format!("{} bytes came instead of {}", bytes.len(), stored.len());
        Err(SourceError::Unavailable { blob: self.blob().clone(), place, detail })
    }

    pub(super) fn deadline_error(&self, range: ByteRange, place: String) -> SourceError {
        SourceError::Deadline { blob: self.blob().clone(), place, range }
    }

    fn corrupt(&self, index: UnitIndex, unit: &Unit, cause: DecodeError) -> FillError {
        FillError::Corrupt { blob: self.blob().clone(), unit: index, stored: unit.stored, cause }
    }

    fn unwritten(&self, unit: UnitIndex, cause: io::Error) -> FillError {
        let blob = self.blob().clone();
        if is_full(&cause) {
            FillError::NoSpace { blob, unit }
        } else {
            FillError::Io { blob, unit, cause: Arc::new(cause) }
        }
    }

    /// Takes over a map of the same layout that knows at least as many checks.
    fn learn(&self, map: Arc<UnitMap>) {
        let needed = map.units().iter().filter(|unit| is_needed(unit)).count();
        self.completeness.needed.store(u32::try_from(needed).unwrap_or(u32::MAX), Ordering::Release);
        *self.map.write().unwrap() = map;
        self.note_completeness();
    }

    pub(super) fn flush(&self) -> Result<(), FlushError> {
        let outcome = self.ledger.flush();
        self.note_completeness();
        outcome
    }

    /// Flushes, for callers that have nobody to return an error to.
    pub(super) fn flush_and_log(&self) {
        match self.flush() {
            Ok(()) => self.flush_failed.store(false, Ordering::Relaxed),
            Err(FlushError::Data(cause) | FlushError::Bits(cause))
                if is_full(&cause) && self.engine.space.make_room(1) => {}
            Err(error) if !self.flush_failed.swap(true, Ordering::Relaxed) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(blob = %self.blob(), cause, "{error}");
            }
            Err(_) => {}
        }
    }

    fn note_completeness(&self) {
        // Judged under the lock, or an old verdict could overwrite one about a newer map.
        let mut callbacks = self.completeness.callbacks.lock().unwrap();
        let map = self.map();
        let needed = self.completeness.needed.load(Ordering::Acquire);
        // Of a blob whose units nobody can check yet, nothing is there, whatever is missing.
        let enough = (needed > 0 || map.count() == 0) && self.ledger.presence.count() >= needed;
        let complete = enough && self.ledger.holds_all(&map);
        self.completeness.reached.store(complete, Ordering::Release);
        let due = if complete && !self.is_traced() { std::mem::take(&mut *callbacks) } else { Vec::new() };
        drop(callbacks);
        due.into_iter().for_each(|callback| callback());
    }
}
