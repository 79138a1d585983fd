//! Ranged reads waiting for their turn, and the tasks that run them.
//!
//! Three queues: readers, then what is fetched ahead of them, then prefetch of whole files and
//! blobs (*bulk*), which begins only while nothing else is wanted and gives way when something is
//! ([`super::admission`], [`super::stream`]). A read starts when its class has a free slot and the
//! budget has memory for its bytes; until then it waits here and no thread does. The slot is
//! free again when the bytes have come, the memory when they are written. Among readers, devices
//! take turns and none may hold all slots: the servers behind two images fail independently.
//!
//! Locking: nothing is spawned, dropped or completed under the queue lock.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::admission::{Admission, STUCK};
use super::budget::Budget;
use super::device::Core;
use super::engine::StoreOptions;
use super::inflight::Lead;
use super::lanes::Lanes;
use super::pool::{Job, Queue};
use super::stream;
use crate::base::{ByteRange, Class, Fault};
use crate::blob::{Unit, UnitIndex};
use crate::source::{BlobSource, ReadCtx, SourceError};

/// One ranged read and the duty to finish the units it brings.
pub(super) struct Window {
    pub(super) core: Arc<Core>,
    pub(super) stored: ByteRange,
    /// Not empty.
    pub(super) units: Vec<Led>,
    /// When a reader began to wait; `None` while nobody does.
    pub(super) asked: Option<Instant>,
    /// Whether it is part of a prefetch that gives way to everything else. No more so once a reader
    /// waits for one of its units.
    pub(super) bulk: bool,
    /// What has come already of a bulk read that gave way, from the start of `stored` on.
    pub(super) head: BytesMut,
}

/// A unit on its way, and the duty to finish it.
pub(super) struct Led {
    pub(super) unit: Unit,
    pub(super) lead: Lead,
    /// Whether this is the second attempt, after a first one brought damaged bytes.
    pub(super) again: bool,
}

impl Window {
    /// A read of its own for `units`, for readers or ahead of one.
    pub(super) fn new(core: Arc<Core>, stored: ByteRange, units: Vec<Led>, asked: Option<Instant>) -> Self {
        Self { core, stored, units, asked, bulk: false, head: BytesMut::new() }
    }

    /// The same for a prefetch behind everybody.
    pub(super) fn bulk(core: Arc<Core>, stored: ByteRange, units: Vec<Led>) -> Self {
        Self { bulk: true, ..Self::new(core, stored, units, None) }
    }

    /// Parts of which each is wholly urgent or wholly bulk, in order. What has come of the first is
    /// kept if it is bulk; a reader's read brings its own.
    fn split_by_urgency(self) -> Vec<Self> {
        let Self { core, units, mut head, .. } = self;
        let longest = core.engine.options.window;
        let mut parts: Vec<Self> = Vec::new();
        for group in groups(units) {
            let is_urgent = group.iter().any(|led| led.lead.urgency().class() == Class::OnDemand);
            let stored = group[0].unit.stored;
            match parts.last_mut() {
                Some(part) if part.bulk != is_urgent && (part.bulk || part.stored.hull(stored).len() <= longest) => {
                    part.stored = part.stored.hull(stored);
                    part.units.extend(group);
                }
                _ => {
                    let head = std::mem::take(&mut head);
                    let part = Self::new(Arc::clone(&core), stored, group, is_urgent.then(Instant::now));
                    parts.push(if is_urgent { part } else { Self { bulk: true, head, ..part } });
                }
            }
        }
        parts
    }

    fn class(&self) -> Class {
        let classes = self.units.iter().map(|led| led.lead.urgency().class());
        classes.min().unwrap_or(Class::Prefetch)
    }

    /// Whether a reader has waited this long already.
    fn is_late(&self, deadline: Duration) -> bool {
        self.asked.is_some_and(|asked| asked.elapsed() >= deadline)
    }

    /// Whether its units can be asked for by more than one read.
    pub(super) fn is_divisible(&self) -> bool {
        self.units.iter().any(|led| led.unit.stored != self.stored)
    }

    fn span(&self) -> RangeInclusive<UnitIndex> {
        let units = || self.units.iter().map(|led| led.lead.unit());
        units().min().unwrap_or(0)..=units().max().unwrap_or(0)
    }

    fn holds(&self, device: u64, unit: UnitIndex) -> bool {
        self.core.id == device && self.units.iter().any(|led| led.lead.unit() == unit)
    }
}

/// The queues and everything that runs.
pub(super) struct Fetcher {
    pub(super) options: Arc<StoreOptions>,
    runtime: Handle,
    pub(super) jobs: Arc<Queue>,
    state: Mutex<State>,
}

struct State {
    on_demand: Lanes<Window>,
    prefetch: VecDeque<Window>,
    bulk: VecDeque<Window>,
    running: Vec<Running>,
    budget: Budget,
    admission: Admission,
    /// When somebody will look again whether bulk may begin.
    wake: Option<Instant>,
    next_ticket: u64,
    /// Some thread is starting windows; others only note that there may be more to start.
    pumping: bool,
    pump_again: bool,
}

/// A read that occupies a slot.
struct Running {
    ticket: u64,
    device: u64,
    units: RangeInclusive<UnitIndex>,
    class: Class,
    bulk: bool,
    /// A reader waits for one of its units.
    urgent: bool,
    began: Instant,
    signal: Arc<Signal>,
}

impl Running {
    /// Whether a reader waits for it, or soon will, so that bulk must not begin.
    fn is_for_readers(&self) -> bool {
        !self.bulk || self.urgent
    }
}

/// What a running read may be told.
#[derive(Default)]
pub(super) struct Signal {
    pub(super) told: Notify,
    pub(super) cancelled: AtomicBool,
    /// Readers need the link: for bulk.
    pub(super) give_way: AtomicBool,
}

impl State {
    /// Where a window waits, by its urgency at this moment. Readers make running bulk give way.
    fn queue(&mut self, mut window: Window) {
        // Read under the lock: a promotion either came before and is seen, or finds the window.
        match window.class() {
            Class::OnDemand => {
                window.asked.get_or_insert_with(Instant::now);
                window.bulk = false;
                self.on_demand.push(window.core.id, window);
            }
            Class::Prefetch if window.bulk => return self.bulk.push_back(window),
            Class::Prefetch => {
                window.asked = None;
                self.prefetch.push_back(window);
            }
        }
        self.disturb(|_| true);
    }

    /// A reader has come: the running bulk that is `meant` gives way.
    fn disturb(&mut self, meant: impl Fn(&Running) -> bool) {
        self.admission.disturb(Instant::now());
        for running in self.running.iter().filter(|running| running.bulk && meant(running)) {
            running.signal.give_way.store(true, Ordering::Release);
            running.signal.told.notify_one();
        }
    }

    fn end(&mut self, ticket: u64) {
        let ended = self.running.iter().position(|running| running.ticket == ticket);
        if ended.is_some_and(|at| self.running.swap_remove(at).is_for_readers()) {
            self.admission.disturb(Instant::now());
        }
    }

    /// Until when bulk must not even be considered, if a reader waits.
    fn readers_wait(&self, now: Instant) -> Option<Instant> {
        let reads = || self.running.iter().filter(|running| running.is_for_readers());
        if let Some(youngest) = reads().map(|running| running.began).max() {
            // Bulk of other servers goes on beside readers whose server does not answer.
            return Some(youngest + STUCK).filter(|&later| later > now);
        }
        // They begin at the next turn, or when memory is free; either comes here again.
        let queued = !self.on_demand.is_empty() || !self.prefetch.is_empty();
        queued.then_some(now + STUCK)
    }
}

/// What the queue lock decides about the next window.
enum Turn {
    Start(Window, Slot),
    /// Its reader has waited too long already.
    Expired(Window),
    /// Somebody has to look again at this moment.
    Later(Instant),
}

impl Fetcher {
    pub(super) fn new(options: Arc<StoreOptions>, runtime: Handle, jobs: Arc<Queue>) -> Arc<Self> {
        let state = State {
            on_demand: Lanes::new(),
            prefetch: VecDeque::new(),
            bulk: VecDeque::new(),
            running: Vec::new(),
            budget: Budget::new(options.memory, options.memory_reserve),
            admission: Admission::new(options.prefetch_calm, options.prefetch_rate),
            wake: None,
            next_ticket: 0,
            pumping: false,
            pump_again: false,
        };
        Arc::new(Self { options, runtime, jobs, state: Mutex::new(state) })
    }

    /// Queues reads by their urgency at this moment, and starts what can start.
    pub(super) fn enqueue(self: &Arc<Self>, windows: Vec<Window>) {
        let mut state = self.state.lock().unwrap();
        windows.into_iter().for_each(|window| state.queue(window));
        drop(state);
        self.pump();
    }

    /// Puts what is left of a bulk read that gave way where it came from. What readers wait for by
    /// now becomes reads of their own.
    pub(super) fn give_back(self: &Arc<Self>, rest: Window) {
        let (core, missing) = (Arc::clone(&rest.core), rest.stored.len().saturating_sub(rest.head.len() as u64));
        let mut state = self.state.lock().unwrap();
        state.admission.refund(missing);
        for part in rest.split_by_urgency().into_iter().rev() {
            if part.bulk { state.bulk.push_front(part) } else { state.queue(part) }
        }
        drop(state);
        // A device that closed in between has already removed its windows and missed these.
        if core.is_closed() {
            self.remove(core.id);
        }
        self.pump();
    }

    /// Lets the work for these units go before prefetch, wherever it is. Their urgency must have been
    /// raised already.
    pub(super) fn promote(self: &Arc<Self>, device: u64, units: &[UnitIndex]) {
        let mut state = self.state.lock().unwrap();
        for &unit in units {
            let queued = state.prefetch.iter().position(|window| window.holds(device, unit));
            if let Some(window) = queued.and_then(|at| state.prefetch.remove(at)) {
                state.queue(Window { asked: Some(Instant::now()), ..window });
            }
        }
        for window in std::mem::take(&mut state.bulk) {
            if window.core.id == device && window.class() == Class::OnDemand {
                window.split_by_urgency().into_iter().for_each(|part| state.queue(part));
            } else {
                state.bulk.push_back(window);
            }
        }
        let carries = |running: &Running| {
            running.device == device && units.iter().any(|unit| running.units.contains(unit))
        };
        // Those judge for themselves whether the reader is served best by going on.
        for running in state.running.iter_mut().filter(|running| carries(running)) {
            running.urgent = true;
            running.signal.told.notify_one();
        }
        state.disturb(|running| !carries(running));
        drop(state);
        units.iter().for_each(|&unit| self.jobs.promote((device, unit)));
        self.pump();
    }

    /// Drops what is queued for a device and stops what runs; the leads cancel their waiters.
    pub(super) fn remove(self: &Arc<Self>, device: u64) {
        let mut state = self.state.lock().unwrap();
        let readers = state.on_demand.remove(device);
        let (prefetch, kept): (Vec<_>, Vec<_>) = state.prefetch.drain(..).partition(|window| window.core.id == device);
        state.prefetch = kept.into();
        let (bulk, kept): (Vec<_>, Vec<_>) = state.bulk.drain(..).partition(|window| window.core.id == device);
        state.bulk = kept.into();
        for running in state.running.iter().filter(|running| running.device == device) {
            running.signal.cancelled.store(true, Ordering::Release);
            running.signal.told.notify_one();
        }
        drop(state);
        drop((readers, prefetch, bulk));
    }

    /// Starts reads until slots, memory or windows run out.
    ///
    /// Starting one may end it at once, when the runtime is gone, and ending one calls this; so
    /// only one thread at a time loops, and recursion is cut short.
    fn pump(self: &Arc<Self>) {
        let mut state = self.state.lock().unwrap();
        if state.pumping {
            state.pump_again = true;
            return;
        }
        state.pumping = true;
        loop {
            state.pump_again = false;
            while let Some(turn) = self.next_turn(&mut state) {
                drop(state);
                match turn {
                    Turn::Start(window, slot) if window.bulk => drop(self.runtime.spawn(stream::run(window, slot))),
                    Turn::Start(window, slot) => drop(self.runtime.spawn(run(window, slot))),
                    Turn::Later(wake) => self.look_again(wake),
                    Turn::Expired(window) => self.expire(window),
                }
                state = self.state.lock().unwrap();
            }
            if !state.pump_again {
                state.pumping = false;
                return;
            }
        }
    }

    fn next_turn(self: &Arc<Self>, state: &mut State) -> Option<Turn> {
        let late = state.on_demand.find(|_, window| window.is_late(self.options.deadline)).map(|(device, _)| device);
        if let Some(device) = late {
            return state.on_demand.take(device).map(Turn::Expired);
        }
        let Some((class, device, bytes)) = self.choose(state) else { return self.next_bulk(state) };
        if !state.budget.try_take(class, bytes) {
            return None;
        }
        let window = match class {
            Class::OnDemand => state.on_demand.take(device)?,
            Class::Prefetch => state.prefetch.pop_front()?,
        };
        Some(self.begin(state, window, class))
    }

    /// The next read that is behind everything else, or when to look again.
    fn next_bulk(self: &Arc<Self>, state: &mut State) -> Option<Turn> {
        let bytes = state.bulk.front()?.stored.len();
        let held = state.running.iter().filter(|running| running.bulk).count();
        if held >= self.options.fetches(Class::Prefetch) {
            return None;
        }
        let now = Instant::now();
        let admitted = match state.readers_wait(now) {
            Some(later) => Err(later),
            None if !state.budget.try_take(Class::Prefetch, bytes) => return None,
            None => state.admission.admit(bytes, now).inspect_err(|_| state.budget.give_back(bytes)),
        };
        if let Err(later) = admitted {
            let known = state.wake.is_some_and(|wake| wake > now && wake <= later);
            return (!known).then(|| {
                state.wake = Some(later);
                Turn::Later(later)
            });
        }
        let window = state.bulk.pop_front()?;
        Some(self.begin(state, window, Class::Prefetch))
    }

    /// Gives a window a slot; its memory has been taken.
    fn begin(self: &Arc<Self>, state: &mut State, window: Window, class: Class) -> Turn {
        let signal = Arc::<Signal>::default();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.running.push(Running {
            ticket,
            device: window.core.id,
            units: window.span(),
            class,
            bulk: window.bulk,
            urgent: false,
            began: Instant::now(),
            signal: Arc::clone(&signal),
        });
        let bytes = window.stored.len();
        Turn::Start(window, Slot { fetcher: Arc::clone(self), ticket, bytes, class, signal })
    }

    /// Pumps again at `wake`, unless everything has ended by then.
    fn look_again(self: &Arc<Self>, wake: Instant) {
        let fetcher = Arc::downgrade(self);
        drop(self.runtime.spawn(async move {
            tokio::time::sleep_until(wake.into()).await;
            if let Some(fetcher) = fetcher.upgrade() {
                fetcher.pump();
            }
        }));
    }

    /// Whose turn it is, if there is a slot for it, and how many bytes it wants.
    fn choose(&self, state: &State) -> Option<(Class, u64, u64)> {
        let held = |class| state.running.iter().filter(move |running| running.class == class && !running.bulk);
        let free = |class| held(class).count() < self.options.fetches(class);
        if !state.on_demand.is_empty() {
            if !free(Class::OnDemand) {
                return None;
            }
            let most = self.options.fetches_per_device();
            let may = |device| held(Class::OnDemand).filter(|running| running.device == device).count() < most;
            if let Some((device, window)) = state.on_demand.find(|device, _| may(device)) {
                return Some((Class::OnDemand, device, window.stored.len()));
            }
        }
        let window = state.prefetch.front().filter(|_| free(Class::Prefetch))?;
        let device = window.core.id;
        // Readers who wait for one of their own device's slots still go before its prefetch.
        (!state.on_demand.has(device)).then_some((Class::Prefetch, device, window.stored.len()))
    }

    /// Fails a window whose readers' time is over. On the pool, where completions may run.
    fn expire(&self, window: Window) {
        let error = window.core.deadline_error(window.stored, window.core.sources.describe());
        fail(&self.jobs, window, error);
    }
}

/// What a running read occupies. Dropping it, at the end or in a panic, frees it.
pub(super) struct Slot {
    pub(super) fetcher: Arc<Fetcher>,
    ticket: u64,
    bytes: u64,
    class: Class,
    pub(super) signal: Arc<Signal>,
}

impl Slot {
    /// The bytes have come: another read may start. The memory stays taken.
    pub(super) fn fetched(&self) {
        self.fetcher.state.lock().unwrap().end(self.ticket);
        self.fetcher.pump();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.fetcher.state.lock().unwrap();
        state.end(self.ticket);
        state.budget.give_back(self.bytes);
        drop(state);
        self.fetcher.pump();
    }
}

/// Runs one read and hands its units to the pool. Dropping the task cancels the waiters.
async fn run(mut window: Window, slot: Slot) {
    let Some(outcome) = read(&mut window, &slot).await else { return };
    slot.fetched();
    let jobs = Arc::clone(&slot.fetcher.jobs);
    match outcome {
        Ok(bytes) => deliver(&jobs, window, &bytes, slot),
        Err(SourceError::OutOfRange { .. }) if window.is_divisible() => {
            drop(slot);
            window.core.clone().split(window);
        }
        Err(error) => fail(&jobs, window, error),
    }
}

/// The bytes of the window from the first source that has them, or `None` if nobody wants them any
/// more. The failure is the one that leaves most hope.
async fn read(window: &mut Window, slot: &Slot) -> Option<Result<Bytes, SourceError>> {
    let core = Arc::clone(&window.core);
    let options = &slot.fetcher.options;
    let mut deadline = match window.asked {
        Some(asked) => asked + options.deadline,
        None => Instant::now() + options.prefetch_deadline,
    };
    let mut sources = core.sources.all();
    if window.units.iter().any(|led| led.again) {
        // Its bytes were damaged, and another one's may not be.
        sources.rotate_left(1);
    }
    let mut failure: Option<SourceError> = None;
    while !sources.is_empty() {
        let source = sources.remove(0);
        let error = match ask(&source, sources.is_empty(), window, slot, &mut deadline).await? {
            Ok(bytes) => return Some(Ok(bytes)),
            Err(error) => error,
        };
        match error.fault() {
            Fault::Cancelled => return Some(Err(error)),
            // A range outside the blob says more about the image than about the source.
            Fault::Permanent if !matches!(error, SourceError::OutOfRange { .. }) => core.sources.demote(&source),
            Fault::Permanent | Fault::Transient | Fault::Corrupt => {}
        }
        let is_divisible = window.is_divisible();
        if failure.as_ref().is_none_or(|known| hope(&error, is_divisible) > hope(known, is_divisible)) {
            failure = Some(error);
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    failure.map(Err)
}

/// What can still be done after a failure: ask for the units one by one, or try again later.
pub(super) fn hope(error: &SourceError, is_divisible: bool) -> u8 {
    match error {
        SourceError::OutOfRange { .. } if is_divisible => 2,
        error if error.fault() == Fault::Transient => 1,
        _ => 0,
    }
}

/// Asks one source, for at most half of the time left unless it is the `last`. A reader that joins
/// meanwhile may bring `deadline` forward. `None` if nobody wants the bytes any more.
async fn ask(
    source: &Arc<dyn BlobSource>,
    last: bool,
    window: &mut Window,
    slot: &Slot,
    deadline: &mut Instant,
) -> Option<Result<Bytes, SourceError>> {
    let (core, stored) = (Arc::clone(&window.core), window.stored);
    let share = |deadline: Instant| {
        let now = Instant::now();
        if last { deadline } else { now + deadline.saturating_duration_since(now) / 2 }
    };
    let mut until = share(*deadline);
    core.counters.request();
    let mut read = source.read(core.blob(), stored, ReadCtx { class: slot.class, deadline: until });
    loop {
        tokio::select! {
            outcome = &mut read => {
                return Some(outcome.and_then(|bytes| core.whole(bytes, stored, source.describe())));
            }
            () = tokio::time::sleep_until(until.into()) => {
                return Some(Err(core.deadline_error(stored, source.describe())));
            }
            () = slot.signal.told.notified() => {
                if slot.signal.cancelled.load(Ordering::Acquire) {
                    return None;
                }
                // A reader has joined: from now on its patience counts.
                let asked = *window.asked.get_or_insert_with(Instant::now);
                *deadline = (*deadline).min(asked + slot.fetcher.options.deadline);
                until = until.min(share(*deadline));
            }
        }
    }
}

/// One job per stored range, so that all threads share a window and each unit is answered by
/// itself, but units that share their stored bytes are decompressed once.
fn deliver(jobs: &Queue, window: Window, bytes: &Bytes, slot: Slot) {
    let Window { core, stored, units, asked, .. } = window;
    let slot = Arc::new(slot);
    for group in groups(units) {
        let cut = |at: u64| usize::try_from(at - stored.start()).expect("a window fits in memory");
        let range = group[0].unit.stored;
        let bytes = bytes.slice(cut(range.start())..cut(range.end()));
        jobs.push(job(&core, group, asked, bytes, &slot));
    }
}

/// The work for one stored range whose bytes have come.
pub(super) fn job(core: &Arc<Core>, group: Vec<Led>, asked: Option<Instant>, bytes: Bytes, slot: &Arc<Slot>) -> Job {
    let (core, slot) = (Arc::clone(core), Arc::clone(slot));
    let units = group.iter().map(|led| (core.id, led.lead.unit())).collect();
    let urgency = group.iter().map(|led| led.lead.urgency().clone()).collect();
    let run = Box::new(move |scratch: &mut _| {
        core.land(group, asked, &bytes, scratch);
        drop((bytes, slot));
    });
    Job { units, urgency, run }
}

/// Units that share their stored bytes together, all others alone. They come in order of stored
/// ranges, as [`super::plan`] leaves them, so those that share are neighbours.
pub(super) fn groups(units: Vec<Led>) -> Vec<Vec<Led>> {
    let mut groups: Vec<Vec<Led>> = Vec::new();
    for led in units {
        match groups.last_mut() {
            Some(group) if group[0].unit.shares_with(&led.unit) => group.push(led),
            _ => groups.push(vec![led]),
        }
    }
    groups
}

pub(super) fn fail(jobs: &Queue, window: Window, cause: SourceError) {
    let cause = Arc::new(cause);
    jobs.push(Job::new(Class::OnDemand, move |_| {
        for led in window.units {
            window.core.fetch_failed(led, &cause);
        }
    }));
}
