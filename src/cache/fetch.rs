//! Ranged reads waiting for their turn, and the tasks that run them.
//!
//! Two queues: readers before prefetch. A read starts when its class has a free slot and the
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

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::budget::Budget;
use super::device::Core;
use super::engine::StoreOptions;
use super::inflight::Lead;
use super::lanes::Lanes;
use super::pool::{Job, Queue, UnitKey};
use crate::base::{ByteRange, Class, Fault, RequestId};
use crate::blob::{Unit, UnitIndex};
use crate::source::{BlobSource, ReadCtx, SourceError};
use crate::telemetry::Telemetry;

/// One ranged read and the duty to finish the units it brings.
pub(super) struct Window {
    pub(super) core: Arc<Core>,
    pub(super) stored: ByteRange,
    /// Not empty.
    pub(super) units: Vec<Led>,
    /// When a reader began to wait; `None` while nobody does.
    pub(super) asked: Option<Instant>,
    /// The request of the kernel that it was made for or promoted by.
    pub(super) request: RequestId,
}

/// A unit on its way, and the duty to finish it.
pub(super) struct Led {
    pub(super) unit: Unit,
    pub(super) lead: Lead,
    /// Whether this is the second attempt, after a first one brought damaged bytes.
    pub(super) again: bool,
}

impl Window {
    fn class(&self) -> Class {
        let classes = self.units.iter().map(|led| led.lead.urgency().class());
        classes.min().unwrap_or(Class::Prefetch)
    }

    /// Whether a reader has waited this long already.
    fn is_late(&self, deadline: Duration) -> bool {
        self.asked.is_some_and(|asked| asked.elapsed() >= deadline)
    }

    /// Whether its units can be asked for by more than one read.
    fn is_divisible(&self) -> bool {
        self.units.iter().any(|led| led.unit.stored != self.stored)
    }

    fn span(&self) -> RangeInclusive<UnitIndex> {
        let units = || self.units.iter().map(|led| led.lead.unit());
        units().min().unwrap_or(0)..=units().max().unwrap_or(0)
    }

    /// Notes that its units are being fetched now, and how long a reader has waited for that.
    fn start(&mut self, now: Instant, telemetry: &Telemetry) {
        let mut is_first = true;
        for led in &mut self.units {
            is_first &= led.lead.start(now);
        }
        if let Some(asked) = self.asked.filter(|_| is_first) {
            telemetry.fills.queue.observe(now.saturating_duration_since(asked));
        }
    }

    fn holds(&self, (device, unit): UnitKey) -> bool {
        self.core.id == device && self.units.iter().any(|led| led.lead.unit() == unit)
    }
}

/// The queues and everything that runs.
pub(super) struct Fetcher {
    options: Arc<StoreOptions>,
    runtime: Handle,
    jobs: Arc<Queue>,
    telemetry: Telemetry,
    state: Mutex<State>,
}

struct State {
    on_demand: Lanes<Window>,
    prefetch: VecDeque<Window>,
    running: Vec<Running>,
    budget: Budget,
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
    signal: Arc<Signal>,
}

/// What a running read may be told.
#[derive(Default)]
struct Signal {
    told: Notify,
    cancelled: AtomicBool,
}

/// What the queue lock decides about the next window.
enum Turn {
    Start(Window, Slot),
    /// Its reader has waited too long already.
    Expired(Window),
}

impl Fetcher {
    pub(super) fn new(
        options: Arc<StoreOptions>,
        runtime: Handle,
        jobs: Arc<Queue>,
        telemetry: Telemetry,
    ) -> Arc<Self> {
        let state = State {
            on_demand: Lanes::new(),
            prefetch: VecDeque::new(),
            running: Vec::new(),
            budget: Budget::new(options.memory, options.memory_reserve),
            next_ticket: 0,
            pumping: false,
            pump_again: false,
        };
        Arc::new(Self { options, runtime, jobs, telemetry, state: Mutex::new(state) })
    }

    /// Queues reads by their urgency at this moment, and starts what can start.
    pub(super) fn enqueue(self: &Arc<Self>, windows: Vec<Window>) {
        let mut state = self.state.lock().unwrap();
        for mut window in windows {
            // Read under the lock: a promotion either came before and is seen, or finds the window.
            match window.class() {
                Class::OnDemand => {
                    window.asked.get_or_insert_with(Instant::now);
                    state.on_demand.push(window.core.id, window);
                }
                Class::Prefetch => {
                    window.asked = None;
                    state.prefetch.push_back(window);
                }
            }
        }
        drop(state);
        self.pump();
    }

    /// Lets the work for `unit` go before prefetch, wherever it is. Its urgency must have been
    /// raised already.
    pub(super) fn promote(self: &Arc<Self>, unit: UnitKey, request: RequestId) {
        let mut state = self.state.lock().unwrap();
        let queued = state.prefetch.iter().position(|window| window.holds(unit));
        if let Some(mut window) = queued.and_then(|at| state.prefetch.remove(at)) {
            window.asked = Some(Instant::now());
            window.request = request;
            state.on_demand.push(window.core.id, window);
        }
        for running in &state.running {
            if running.device == unit.0 && running.units.contains(&unit.1) {
                running.signal.told.notify_one();
            }
        }
        drop(state);
        self.jobs.promote(unit);
        self.pump();
    }

    /// Drops what is queued for a device and stops what runs; the leads cancel their waiters.
    pub(super) fn remove(self: &Arc<Self>, device: u64) {
        let mut state = self.state.lock().unwrap();
        let readers = state.on_demand.remove(device);
        let (prefetch, kept): (Vec<_>, Vec<_>) = state.prefetch.drain(..).partition(|window| window.core.id == device);
        state.prefetch = kept.into();
        for running in state.running.iter().filter(|running| running.device == device) {
            running.signal.cancelled.store(true, Ordering::Release);
            running.signal.told.notify_one();
        }
        drop(state);
        drop((readers, prefetch));
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
                    Turn::Start(window, slot) => drop(self.runtime.spawn(run(window, slot))),
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
        let (class, device, bytes) = self.choose(state)?;
        if !state.budget.try_take(class, bytes) {
            return None;
        }
        let window = match class {
            Class::OnDemand => state.on_demand.take(device)?,
            Class::Prefetch => state.prefetch.pop_front()?,
        };
        let signal = Arc::<Signal>::default();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        let units = window.span();
        state.running.push(Running { ticket, device, units, class, signal: Arc::clone(&signal) });
        Some(Turn::Start(window, Slot { fetcher: Arc::clone(self), ticket, bytes, class, signal }))
    }

    /// Whose turn it is, if there is a slot for it, and how many bytes it wants.
    fn choose(&self, state: &State) -> Option<(Class, u64, u64)> {
        let held = |class| state.running.iter().filter(move |running| running.class == class);
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
    fetcher: Arc<Fetcher>,
    ticket: u64,
    bytes: u64,
    class: Class,
    signal: Arc<Signal>,
}

impl Slot {
    /// The bytes have come: another read may start. The memory stays taken.
    fn fetched(&self) {
        self.fetcher.state.lock().unwrap().running.retain(|running| running.ticket != self.ticket);
        self.fetcher.pump();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.fetcher.state.lock().unwrap();
        state.running.retain(|running| running.ticket != self.ticket);
        state.budget.give_back(self.bytes);
        drop(state);
        self.fetcher.pump();
    }
}

/// Runs one read and hands its units to the pool. Dropping the task cancels the waiters.
async fn run(mut window: Window, slot: Slot) {
    let telemetry = &slot.fetcher.telemetry;
    let (started, class) = (Instant::now(), slot.class);
    window.start(started, telemetry);
    let Some(outcome) = read(&mut window, &slot).await else { return };
    telemetry.fills.fetch.at(class).observe(started.elapsed());
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
        if failure.as_ref().is_none_or(|known| hope(&error, window) > hope(known, window)) {
            failure = Some(error);
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    failure.map(Err)
}

/// What can still be done after a failure: ask for the units one by one, or try again later.
fn hope(error: &SourceError, window: &Window) -> u8 {
    match error {
        SourceError::OutOfRange { .. } if window.is_divisible() => 2,
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
    let ctx = ReadCtx { class: slot.class, deadline: until, request: window.request };
    let mut read = source.read(core.blob(), stored, ctx);
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
    let Window { core, stored, units, asked, request } = window;
    let (slot, fetched) = (Arc::new(slot), Instant::now());
    for group in groups(units) {
        let cut = |at: u64| usize::try_from(at - stored.start()).expect("a window fits in memory");
        let range = group[0].unit.stored;
        let bytes = bytes.slice(cut(range.start())..cut(range.end()));
        let (core, slot) = (Arc::clone(&core), Arc::clone(&slot));
        let units = group.iter().map(|led| (core.id, led.lead.unit())).collect();
        let urgency = group.iter().map(|led| led.lead.urgency().clone()).collect();
        let run = Box::new(move |scratch: &mut _| {
            let (fills, begun) = (&core.engine.telemetry.fills, Instant::now());
            fills.decode_queue.at(slot.class).observe(begun.saturating_duration_since(fetched));
            core.land(group, (asked, request), &bytes, scratch);
            fills.land.at(slot.class).observe(begun.elapsed());
            drop((bytes, slot));
        });
        jobs.push(Job { units, urgency, run });
    }
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

fn fail(jobs: &Queue, window: Window, cause: SourceError) {
    let cause = Arc::new(cause);
    jobs.push(Job::new(Class::OnDemand, move |_| {
        for led in window.units {
            window.core.fetch_failed(led, &cause);
        }
    }));
}
