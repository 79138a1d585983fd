use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::background::Background;
use super::core::{Completeness, Core};
use super::engine::Engine;
use super::guides::Guides;
use super::health::DeviceHealth;
use super::inflight::{Inflight, Wait};
use super::ledger::{FlushError, Found, Ledger};
use super::prefetch::Want;
use super::presence::found;
use super::shelves::note_use;
use super::sink::Sink;
use super::sources::Sources;
use super::stats::{Counters, DeviceStats};
use super::store::StoreError;
use super::trace::Trace;
use super::users::{ImageKey, ImageUse, Users};
use super::{Completion, Fill, Request, is_needed};
use crate::base::sync::{Mutex, RwLock};
use crate::base::{BlobId, ByteRange, Class};
use crate::blob::UnitMap;
use crate::source::BlobSource;

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

impl Device {
    /// A device over a file that somebody else owns, with no durable copy of its presence.
    ///
    /// `present` are the decoded ranges already in the sink: a unit is present if all its blocks
    /// lie in them. They may come in any order, touch and overlap.
    pub fn with_sink(
        map: impl Into<Arc<UnitMap>>,
        source: Arc<dyn BlobSource>,
        sink: Box<dyn Sink>,
        present: &[ByteRange],
        engine: Arc<Engine>,
    ) -> Arc<Self> {
        let map = map.into();
        let words = found(&map, present);
        Self::assemble(
            map,
            source,
            Arc::new(Ledger::new(sink, Found { words, is_disturbed: false }, None)),
            None,
            engine,
        )
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
            first: Arc::clone(&map),
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
            guides: Guides::default(),
            users: OnceLock::new(),
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

    /// How the device is doing. Looks at every unit that is there: for people who ask, not for each read.
    pub fn health(&self) -> DeviceHealth {
        let (core, map) = (&self.core, self.map());
        let (waiting, since) = core.inflight.waiting();
        let failures = &core.inflight.failures;
        let (_, needed_bytes) = map.checkable();
        let present = core.ledger.presence.present().filter_map(|index| map.units().get(index as usize));
        let present_bytes = present.filter(|unit| is_needed(unit)).map(|unit| unit.decoded.len()).sum();
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
        let layout = self.core.layout();
        let present = self.core.ledger.presence.present().filter_map(|index| layout.units().get(index as usize));
        present.map(|unit| unit.blocks().len()).sum()
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

    /// Counts `image` among those that have the device open: its readers may be under the limits of that one.
    pub fn used_by(&self, image: ImageKey) -> ImageUse {
        ImageUse::new(self.core.users(), image, &self.core.engine)
    }

    /// Has `users` be the images that have it open, for a device that is not there as long as they have. To be said
    /// before anybody reads it.
    pub fn is_used_by(&self, users: &Arc<Users>) {
        let _ = self.core.users.set(Arc::clone(users));
    }

    /// As [`Fill::touched`], by a reader of `image` if that is known.
    pub(super) fn touched_by(&self, image: Option<ImageKey>, decoded: ByteRange) {
        self.core.counters.hits.fetch_add(1, Ordering::Relaxed);
        self.core.note_read(decoded);
        if let Some(units) = self.core.covering(decoded) {
            self.core.observe(units, image);
        }
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
    pub fn learn(&self, map: impl Into<Arc<UnitMap>>, source: Arc<dyn BlobSource>) -> bool {
        self.try_learn(&map.into(), source).unwrap_or_else(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(blob = %self.blob(), cause, "{error}");
            false
        })
    }

    /// The same for callers that can return an error.
    pub(super) fn try_learn(&self, map: &Arc<UnitMap>, source: Arc<dyn BlobSource>) -> Result<bool, StoreError> {
        let _one_at_a_time = self.learning.lock().unwrap();
        let known = self.map();
        if Arc::ptr_eq(&known, map) {
            self.core.sources.add(source);
            return Ok(true);
        }
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
        self.core.engine.lent.forget(self.core.id);
        self.core.flush_and_log();
        if let Some(dir) = self.data_path().and_then(Path::parent) {
            note_use(dir);
        }
        self.core.ledger.detach();
    }
}

impl Fill for Device {
    fn decoded_len(&self) -> u64 {
        self.core.first.decoded_len()
    }

    fn present(&self, decoded: ByteRange) -> bool {
        self.core.covering(decoded).is_some_and(|units| self.core.ledger.presence.all(units))
    }

    fn fill_for(&self, request: Request, decoded: ByteRange, done: Completion) {
        if request.class() == Class::OnDemand {
            self.core.note_read(decoded);
        }
        let wait = Wait::of(request, done);
        self.core.fill_range(decoded, wait);
    }

    fn read_given(&self, request: &Request, decoded: ByteRange, into: &mut [u8]) -> io::Result<()> {
        let lost = || io::Error::other(format!("{decoded} of a device is not there"));
        let layout = self.core.layout();
        for index in self.core.covering(decoded).ok_or_else(lost)? {
            let blocks = layout.units()[index as usize].blocks();
            let (start, end) = (blocks.start().max(decoded.start()), blocks.end().min(decoded.end()));
            let part = ByteRange::new(start, end).ok_or_else(lost)?;
            let place = |from: u64| usize::try_from(part.start() - from).map_err(|_| lost());
            let len = usize::try_from(part.len()).map_err(|_| lost())?;
            let rest = into.get_mut(place(decoded.start())?..).and_then(|rest| rest.get_mut(..len)).ok_or_else(lost)?;
            if self.core.ledger.presence.get(index) {
                self.core.ledger.file().ok_or_else(lost)?.read_exact_at(rest, part.start())?;
                continue;
            }
            let given = request.given(self.core.id, index).ok_or_else(lost)?;
            let at = place(given.blocks.start())?;
            rest.copy_from_slice(given.bytes.get(at..at + len).ok_or_else(lost)?);
        }
        Ok(())
    }

    fn touched(&self, decoded: ByteRange) {
        self.touched_by(None, decoded);
    }
}
