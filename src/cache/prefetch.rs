//! Prefetch: ranges of devices are made present in an order somebody gave, behind all readers.
//!
//! A prefetch walks over its order and keeps a few reads queued, so that it costs little memory
//! however much it wants, and what it wants first is asked for first. It goes on past damaged units
//! and waits for sources that have gone away; a full disk ends it. Whoever waits looks at its
//! [`PrefetchStats`]. It holds devices weakly: when the last owner of a device lets go of it, what
//! the prefetch wants of it is given up.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use super::core::Core;
use super::device::Device;
use super::engine::Engine;
use super::guides::{List, ListId};
use super::inflight::Wait;
use super::plan::{PlanLimits, plan};
use super::presence::{bit, set_bit, words_for};
use super::{FillError, Request, is_needed};
use crate::base::{ByteRange, Chain, Class, Fault, RequestId};
use crate::blob::{Unit, UnitIndex};

/// Most units of one lot, and so of one read. Each costs memory beside its stored bytes, and a hostile image could
/// claim millions of one byte each.
const MOST_UNITS: usize = 4096;

/// Stored bytes of the first lot of a list and of a large one. Each has twice as many as the one before: what is wanted
/// first is asked for first, and further on neighbours find each other.
const FIRST_LOT: u64 = 1 << 20;
const LARGE_LOT: u64 = 16 << 20;

/// Pauses between attempts while a source cannot be reached.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Most failures that are remembered by their words.
const MOST_FAILURES: usize = 16;

/// A part of a device that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Which of the devices that the prefetch was given.
    pub device: usize,
    pub decoded: ByteRange,
}

/// How a prefetch is getting on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PrefetchStats {
    pub state: PrefetchState,
    /// Decoded bytes of all units that are wanted, whoever fetches them.
    pub bytes: u64,
    /// Those of them that are in the cache.
    pub bytes_present: u64,
    /// Units that are wanted and absent.
    pub units_absent: u64,
    /// While `retrying`, what is wrong with the source.
    pub trouble: Option<String>,
    /// What could not be fetched and why, each reason once, at most 16.
    pub failures: Vec<String>,
}

/// Where a prefetch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum PrefetchState {
    /// It fetches, or waits for readers to be done.
    Running,
    /// A source went away; it asks again after a while.
    Retrying,
    /// Everything that is wanted is in the cache, durably.
    Done,
    /// It has ended, and something that is wanted is missing.
    Failed,
    /// It was stopped before its end.
    Cancelled,
}

impl PrefetchState {
    /// Whether nothing more will happen.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// A prefetch under way. Dropping it stops it, with the reads it has begun.
pub struct Prefetch {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    devices: Vec<Weak<Core>>,
    /// Of each device, which units are wanted.
    wanted: Vec<Arc<Vec<u64>>>,
    /// Devices and units, in order. They may overlap.
    order: Vec<(usize, Range<UnitIndex>)>,
    /// How many of them somebody named. Behind them are whole devices.
    listed: usize,
    progress: Mutex<Progress>,
}

struct Progress {
    state: PrefetchState,
    trouble: Option<String>,
    failures: Vec<String>,
    /// By device, whether what it lacks will not come.
    given_up: Vec<bool>,
}

/// What a pass over the order came to.
enum Pass {
    /// Everything was tried, and what is absent will not come.
    Done,
    /// A source went away; another pass may get further.
    Interrupted,
    /// There is no room.
    Full,
}

impl Prefetch {
    /// Starts to make `wants` present, in this order, and then, if `rest`, all else of the devices,
    /// one after the other. Ranges that no unit covers are passed over.
    pub fn start(engine: &Engine, devices: &[Arc<Device>], wants: &[Want], rest: bool) -> Self {
        let cores: Vec<_> = devices.iter().map(|device| Arc::clone(device.core())).collect();
        Self::start_cores(engine, &cores, wants, rest)
    }

    pub(super) fn start_cores(engine: &Engine, cores: &[Arc<Core>], wants: &[Want], rest: bool) -> Self {
        let covered = |want: &Want| Some((want.device, cores.get(want.device)?.covering(want.decoded)?));
        let mut order: Vec<_> = wants.iter().filter_map(covered).collect();
        let listed = order.len();
        if rest {
            order.extend(cores.iter().enumerate().map(|(device, core)| (device, 0..core.map().count())));
        }
        let mut wanted: Vec<_> = cores.iter().map(|core| vec![0; words_for(core.map().count())]).collect();
        for (device, units) in &order {
            let map = cores[*device].map();
            let needed = units.clone().filter(|&unit| is_needed(&map.units()[unit as usize]));
            needed.for_each(|unit| set_bit(&mut wanted[*device], unit));
        }
        let wanted: Vec<_> = wanted.into_iter().map(Arc::new).collect();
        // They last as long as the work, however long its outcome is kept.
        let id = ListId::next();
        let lists: Vec<_> =
            wanted.iter().filter(|_| !rest).map(|wanted| Arc::new(List { id, wanted: Arc::clone(wanted) })).collect();
        cores.iter().zip(&lists).for_each(|(core, list)| core.guides.add(list));
        let shared = Arc::new(Shared {
            devices: cores.iter().map(Arc::downgrade).collect(),
            wanted,
            listed,
            order,
            progress: Mutex::new(Progress {
                state: PrefetchState::Running,
                trouble: None,
                failures: Vec::new(),
                given_up: vec![false; cores.len()],
            }),
        });
        let reads = engine.options.fetches(Class::Prefetch) + 1;
        let work = {
            let shared = Arc::clone(&shared);
            async move {
                let _lists = lists;
                shared.work(reads).await;
            }
        };
        Self { shared, task: engine.runtime.spawn(work) }
    }

    /// How it is getting on. Costs a look at each unit that is wanted.
    pub fn stats(&self) -> PrefetchStats {
        // First, so that an end is never told with a count from before it.
        let (state, trouble, failures) = {
            let progress = self.shared.progress.lock().unwrap();
            (progress.state, progress.trouble.clone(), progress.failures.clone())
        };
        let mut stats = PrefetchStats { state, bytes: 0, bytes_present: 0, units_absent: 0, trouble, failures };
        for core in self.shared.devices.iter().enumerate().filter_map(|(at, core)| Some((at, core.upgrade()?))) {
            let (wanted, core) = (&self.shared.wanted[core.0], core.1);
            for (index, unit) in (0..).zip(core.map().units()).filter(|(index, _)| bit(wanted, *index)) {
                let is_present = core.ledger.presence.get(index);
                stats.bytes += unit.decoded.len();
                stats.bytes_present += if is_present { unit.decoded.len() } else { 0 };
                stats.units_absent += u64::from(!is_present);
            }
        }
        stats
    }

    /// Stops it, unless it has ended.
    pub fn cancel(&self) {
        self.task.abort();
        let mut progress = self.shared.progress.lock().unwrap();
        if progress.state.is_end() {
            return;
        }
        progress.state = PrefetchState::Cancelled;
        drop(progress);
        // Another prefetch of the device asks again for what it joined.
        self.shared.devices.iter().filter_map(Weak::upgrade).for_each(|core| core.engine.fetcher.abandon(core.id));
    }

    /// Whether nothing more will happen.
    pub fn has_ended(&self) -> bool {
        self.shared.progress.lock().unwrap().state.is_end()
    }
}

impl std::fmt::Debug for Prefetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.shared.progress.lock().unwrap().state;
        f.debug_struct("Prefetch").field("state", &state).finish_non_exhaustive()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Shared {
    /// Passes over the order until a pass meets no source that is away.
    async fn work(self: Arc<Self>, reads: usize) {
        let mut pause = FIRST_PAUSE;
        let mut before = self.absent();
        while let Pass::Interrupted = self.pass(reads).await {
            let absent = self.absent();
            // A source that brings something now and then is not away for ever.
            pause = if absent < before { FIRST_PAUSE } else { pause };
            before = absent;
            self.progress.lock().unwrap().state = PrefetchState::Retrying;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        let shared = Arc::clone(&self);
        // On a thread that may wait for the disk. An error says that the runtime ends.
        drop(tokio::task::spawn_blocking(move || shared.finish()).await);
    }

    /// Makes durable what has come, and says how it ended.
    fn finish(&self) {
        let cores: Vec<_> = self.devices.iter().filter_map(Weak::upgrade).collect();
        cores.iter().for_each(|core| core.flush_and_log());
        let is_whole = cores.len() == self.devices.len() && self.absent() == 0;
        let mut progress = self.progress.lock().unwrap();
        progress.trouble = None;
        if !progress.state.is_end() {
            progress.state = if is_whole { PrefetchState::Done } else { PrefetchState::Failed };
        }
    }

    /// Units that are wanted and absent.
    fn absent(&self) -> u64 {
        let absent = |(core, wanted): (Arc<Core>, &Arc<Vec<u64>>)| {
            let present = core.ledger.presence.snapshot();
            wanted
                .iter()
                .zip(&present)
                .map(|(wanted, present)| u64::from((wanted & !present).count_ones()))
                .sum::<u64>()
        };
        self.devices
            .iter()
            .zip(&self.wanted)
            .filter_map(|(core, wanted)| Some((core.upgrade()?, wanted)))
            .map(absent)
            .sum()
    }

    /// Asks for everything that is absent once, in order, with some `reads` queued at a time.
    async fn pass(&self, reads: usize) -> Pass {
        let limits = self.limits();
        // Those whose source is away, for this pass.
        let mut away = self.progress.lock().unwrap().given_up.clone();
        let (tx, mut rx) = unbounded_channel();
        let (mut cursor, mut open, mut interrupted) = (Cursor::new(), 0, false);
        loop {
            while open < reads
                && let Some((device, core, units)) = self.next_read(&mut cursor, &limits, &away)
            {
                core.fill_bulk(&units, limits[device], told(device, tx.clone()));
                open += 1;
            }
            if open == 0 {
                return if interrupted { Pass::Interrupted } else { Pass::Done };
            }
            let Some((device, outcome)) = rx.recv().await else { return Pass::Done };
            open -= 1;
            let Err(error) = outcome else {
                self.recovered();
                continue;
            };
            match error {
                // There is room again when somebody makes room, not when we wait.
                FillError::NoSpace { .. } => {
                    self.note(&error, None);
                    return Pass::Full;
                }
                _ => match error.fault() {
                    // One bad unit does not spoil the others.
                    Fault::Corrupt => self.note(&error, None),
                    Fault::Transient => {
                        interrupted = true;
                        away[device] = true;
                        self.progress.lock().unwrap().trouble = Some(Chain(&error).to_string());
                    }
                    // What it had joined was given up by who had begun it.
                    Fault::Cancelled if self.is_open(device) => interrupted = true,
                    Fault::Permanent | Fault::Cancelled => {
                        away[device] = true;
                        self.note(&error, Some(device));
                    }
                },
            }
        }
    }

    fn is_open(&self, device: usize) -> bool {
        self.devices[device].upgrade().is_some_and(|core| !core.is_closed())
    }

    /// Something came: whatever was wrong has passed.
    fn recovered(&self) {
        let mut progress = self.progress.lock().unwrap();
        if progress.state == PrefetchState::Retrying {
            progress.state = PrefetchState::Running;
            progress.trouble = None;
        }
    }

    /// Notes a failure; with a device, that nothing more will come of it.
    fn note(&self, error: &FillError, given_up: Option<usize>) {
        let text = Chain(error).to_string();
        let mut progress = self.progress.lock().unwrap();
        if progress.failures.len() < MOST_FAILURES && !progress.failures.contains(&text) {
            progress.failures.push(text);
        }
        if let Some(device) = given_up {
            progress.given_up[device] = true;
        }
    }

    /// How reads of each device are gathered: long ones where most of its blob is wanted and absent.
    fn limits(&self) -> Vec<PlanLimits> {
        let limits = |(core, wanted): (&Weak<Core>, &Arc<Vec<u64>>)| {
            let Some(core) = core.upgrade() else { return PlanLimits { gap: 0, window: 0 } };
            let map = core.map();
            let (mut all, mut absent) = (0u64, 0u64);
            for (index, unit) in (0..).zip(map.units()) {
                // A part of a batch as if it had its own bytes: this only says which is more.
                all = all.saturating_add(unit.decoded.len());
                if bit(wanted, index) && !core.ledger.presence.get(index) {
                    absent = absent.saturating_add(unit.decoded.len());
                }
            }
            core.engine.options.bulk_limits(absent >= all / 2)
        };
        self.devices.iter().zip(&self.wanted).map(limits).collect()
    }

    /// The next absent units that one read brings, of a device that is not `away`.
    fn next_read(
        &self,
        cursor: &mut Cursor,
        limits: &[PlanLimits],
        away: &[bool],
    ) -> Option<(usize, Arc<Core>, Vec<UnitIndex>)> {
        loop {
            while let Some((device, mut units)) = cursor.reads.pop_front() {
                let core = if away[device] { None } else { self.devices[device].upgrade() };
                let Some(core) = core else { continue };
                // A reader may have been faster.
                units.retain(|&index| !core.ledger.presence.get(index));
                if !units.is_empty() {
                    return Some((device, core, units));
                }
            }
            if !self.gather(cursor, limits, away) {
                return None;
            }
        }
    }

    /// Walks over the order until there is a lot of absent units, and makes reads of it, ordered by what is wanted first
    /// of each. `false`: there is nothing left.
    fn gather(&self, cursor: &mut Cursor, limits: &[PlanLimits], away: &[bool]) -> bool {
        // By device and unit: its turn.
        let mut turns: BTreeMap<(usize, UnitIndex), usize> = BTreeMap::new();
        let (mut bytes, mut before) = (0, None::<Unit>);
        let longest = || limits.iter().map(|limits| limits.window).max().unwrap_or(0);
        let (lot, end) =
            if cursor.leg < self.listed { (cursor.lot, self.listed) } else { (longest(), self.order.len()) };
        cursor.lot = (cursor.lot * 2).min(LARGE_LOT);
        'lot: while let Some((device, leg)) = self.order[..end].get(cursor.leg) {
            let core = if away[*device] { None } else { self.devices[*device].upgrade() };
            let Some(core) = core else {
                cursor.next_leg();
                continue;
            };
            let map = core.map();
            for index in leg.start + cursor.done..leg.end {
                let unit = &map.units()[index as usize];
                if is_needed(unit) && !core.ledger.presence.get(index) {
                    let turn = turns.len();
                    // Parts of one stored range come by one read.
                    let is_counted = before.is_some_and(|before| before.shares_with(unit));
                    let more = if is_counted { 0 } else { unit.stored.len() };
                    let is_more = turn >= MOST_UNITS || bytes + more > lot;
                    if is_more && turn > 0 {
                        break 'lot;
                    }
                    turns.entry((*device, index)).or_insert(turn);
                    (bytes, before) = (bytes + more, Some(*unit));
                }
                cursor.done += 1;
            }
            cursor.next_leg();
        }
        let mut reads = Vec::new();
        for (device, core) in self.devices.iter().enumerate() {
            let Some(core) = core.upgrade() else { continue };
            let map = core.map();
            let units = turns.range((device, 0)..(device + 1, 0)).map(|((_, index), _)| *index);
            let missing = units.map(|index| (index, map.units()[index as usize])).collect();
            reads.extend(plan(missing, limits[device]).into_iter().map(|read| (device, read.units)));
        }
        let first = |units: &[UnitIndex], device| units.iter().filter_map(|unit| turns.get(&(device, *unit))).min();
        reads.sort_by_key(|(device, units)| first(units, *device));
        cursor.reads.extend(reads);
        !turns.is_empty() || cursor.leg < self.order.len()
    }
}

/// How far a pass has come.
struct Cursor {
    leg: usize,
    /// Units of the leg that were looked at.
    done: UnitIndex,
    /// Stored bytes of the next lot.
    lot: u64,
    /// Of the latest lot, what has not been asked for.
    reads: VecDeque<(usize, Vec<UnitIndex>)>,
}

impl Cursor {
    fn new() -> Self {
        Self { leg: 0, done: 0, lot: FIRST_LOT, reads: VecDeque::new() }
    }

    fn next_leg(&mut self) {
        (self.leg, self.done) = (self.leg + 1, 0);
    }
}

type Outcome = (usize, Result<(), FillError>);

/// Tells a pass how a read ended. Nobody listens any more when the prefetch was stopped.
fn told(device: usize, tx: UnboundedSender<Outcome>) -> super::Completion {
    Box::new(move |outcome| drop(tx.send((device, outcome))))
}

impl Core {
    /// Makes `units` present behind everything else, then calls `done`.
    fn fill_bulk(self: &Arc<Self>, units: &[UnitIndex], limits: PlanLimits, done: super::Completion) {
        let (wait, owned) = (Wait::of(Request::new(RequestId::NONE, Class::Prefetch), done), units.to_vec());
        let then = move |core: &Arc<Self>, wait: &Arc<Wait>| core.fill_bulk_now(&owned, limits, wait);
        self.when_room(units.iter().copied(), &wait, then);
    }

    fn fill_bulk_now(self: &Arc<Self>, units: &[UnitIndex], limits: PlanLimits, wait: &Arc<Wait>) {
        self.engine.telemetry.fills.misses.at(Class::Prefetch).inc();
        let map = self.map();
        // Prefetch that joins a fetch makes nothing urgent.
        let lead = |&index: &UnitIndex| {
            self.enter(&map, index, index..index + 1, Class::Prefetch, Some(wait), &mut Vec::new())
        };
        let leads = units.iter().flat_map(lead).collect();
        self.submit(&map, leads, Class::Prefetch, RequestId::NONE, Some(limits));
        wait.settle(&Ok(()));
    }
}
