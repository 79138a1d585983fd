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

use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use tokio::runtime::Handle;

use super::allowances::Wait;
use super::core::Core;
use super::engine::StoreOptions;
use super::miss::NotFetched;
use super::pool::{Job, Queue};
use super::queues::{Choice, Queues, Running, Signal};
use super::room::Need;
use super::sink::Scratch;
use super::stream;
use super::users::ImageKey;
use super::window::{Led, Window};
use crate::base::{Class, RequestId};
use crate::blob::UnitIndex;
use crate::source::SourceError;
use crate::telemetry::Telemetry;

/// The queues and everything that runs.
pub(super) struct Fetcher {
    pub(super) options: Arc<StoreOptions>,
    runtime: Handle,
    pub(super) jobs: Arc<Queue>,
    pub(super) telemetry: Telemetry,
    state: Mutex<Queues>,
}

/// What the queue lock decides about the next window.
enum Turn {
    Start(Window, Slot),
    /// Its reader has waited too long already, if for the limits of its image, for this one.
    Expired(Window, Option<&'static str>),
    /// Somebody has to look again at this moment.
    Later(Instant),
}

impl Queues {
    /// Has somebody look again at `later`, unless somebody will anyhow.
    fn wake_at(&mut self, later: Instant, now: Instant) -> Option<Turn> {
        let known = self.wake.is_some_and(|wake| wake > now && wake <= later);
        (!known).then(|| {
            self.wake = Some(later);
            Turn::Later(later)
        })
    }
}

impl Fetcher {
    pub(super) fn new(
        options: Arc<StoreOptions>,
        runtime: Handle,
        jobs: Arc<Queue>,
        telemetry: Telemetry,
    ) -> Arc<Self> {
        let state = Queues::new(&options);
        Arc::new(Self { options, runtime, jobs, telemetry, state: Mutex::new(state) })
    }

    /// Queues reads by their urgency at this moment, and starts what can start.
    pub(super) fn enqueue(self: &Arc<Self>, windows: Vec<Window>) {
        let mut state = self.state.lock().unwrap();
        windows.into_iter().for_each(|window| state.queue(window));
        drop(state);
        self.pump();
    }

    /// Puts what is left of a bulk read that gave way where it came from, unless it is `abandoned`.
    /// What readers wait for by now becomes reads of their own.
    pub(super) fn give_back(self: &Arc<Self>, rest: Window, abandoned: bool) {
        let (core, missing) = (Arc::clone(&rest.core), rest.stored.len().saturating_sub(rest.head.len() as u64));
        let (bulk, urgent): (Vec<_>, Vec<_>) = rest.split_by_urgency().into_iter().partition(|part| part.bulk);
        let mut state = self.state.lock().unwrap();
        state.admission.refund(missing);
        urgent.into_iter().for_each(|part| state.queue(part));
        let (kept, dropped) = if abandoned { (Vec::new(), bulk) } else { (bulk, Vec::new()) };
        kept.into_iter().rev().for_each(|part| state.bulk.push_front(part));
        drop(state);
        // Not under the lock: it cancels who waits.
        drop(dropped);
        // A device that closed in between has already removed its windows and missed these.
        if core.is_closed() {
            self.remove(core.id);
        }
        self.pump();
    }

    /// Gives up the bulk of a device; its leads cancel who waits. Readers who have joined are served.
    pub(super) fn abandon(self: &Arc<Self>, device: u64) {
        let abandoned = self.state.lock().unwrap().abandon(device);
        drop(abandoned);
        self.pump();
    }

    /// Lets the work for these units go before prefetch, wherever it is. Their urgency must have been
    /// raised already.
    pub(super) fn promote(self: &Arc<Self>, core: &Core, units: &[UnitIndex], request: RequestId) {
        let follows = core.guides.list_of(units.iter().copied());
        let mut state = self.state.lock().unwrap();
        state.promote(core.id, units, request, follows);
        drop(state);
        units.iter().for_each(|&unit| self.jobs.promote((core.id, unit)));
        self.pump();
    }

    /// Drops what is queued for a device and stops what runs; the leads cancel their waiters.
    pub(super) fn remove(self: &Arc<Self>, device: u64) {
        let mut state = self.state.lock().unwrap();
        let dropped = state.remove(device);
        drop(state);
        drop(dropped);
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
                    Turn::Start(window, slot) if window.core.engine.space.room.is_short() => look_first(window, slot),
                    Turn::Start(window, slot) => start(window, slot),
                    Turn::Later(wake) => self.look_again(wake),
                    Turn::Expired(window, limit) => self.expire(window, limit),
                }
                state = self.state.lock().unwrap();
            }
            if !state.pump_again {
                state.pumping = false;
                return;
            }
        }
    }

    fn next_turn(self: &Arc<Self>, state: &mut Queues) -> Option<Turn> {
        let late =
            state.on_demand.find(|_, window| window.is_late(self.options.deadline)).map(|(lane, _)| lane.clone());
        if let Some(lane) = late {
            let window = state.on_demand.take(&lane)?;
            let limit = state.payer(&window, Instant::now()).err().map(Wait::limit);
            return Some(Turn::Expired(window, limit));
        }
        let (now, mut later) = (Instant::now(), None);
        let Some(choice) = state.choose(&self.options, now, &mut later) else {
            return self.next_bulk(state).or_else(|| state.wake_at(later?, now));
        };
        let (class, bytes) = match &choice {
            Choice::OnDemand { bytes, .. } => (Class::OnDemand, *bytes),
            Choice::Prefetch { bytes, .. } => (Class::Prefetch, *bytes),
        };
        if !state.budget.try_take(class, bytes) {
            return None;
        }
        let window = match choice {
            Choice::OnDemand { lane, .. } => state.on_demand.take(&lane)?,
            Choice::Prefetch { at, .. } => state.prefetch.remove(at)?,
        };
        Some(self.begin(state, window, class))
    }

    /// The next read that is behind everything else, or when to look again.
    fn next_bulk(self: &Arc<Self>, state: &mut Queues) -> Option<Turn> {
        let held = state.running.iter().filter(|running| running.bulk).count();
        if held >= self.options.fetches(Class::Prefetch) {
            return None;
        }
        // Lists say what is wanted first, and somebody may be following one now.
        let at = state.bulk.iter().position(|window| window.list.is_some()).unwrap_or(0);
        let window = state.bulk.get(at)?;
        let (bytes, list) = (window.stored.len(), window.list);
        let now = Instant::now();
        let admitted = match state.readers_wait(list, now) {
            Some(later) => Err(later),
            None if !state.budget.try_take(Class::Prefetch, bytes) => return None,
            None => state.admission.admit(bytes, list, now).inspect_err(|_| state.budget.give_back(bytes)),
        };
        if let Err(later) = admitted {
            return state.wake_at(later, now);
        }
        let window = state.bulk.remove(at)?;
        Some(self.begin(state, window, Class::Prefetch))
    }

    /// Gives a window a slot; its memory has been taken.
    fn begin(self: &Arc<Self>, state: &mut Queues, window: Window, class: Class) -> Turn {
        let signal = Arc::<Signal>::default();
        // What is fetched ahead of readers is for them as well.
        let now = Instant::now();
        let image = if window.bulk { None } else { state.payer(&window, now).ok().flatten() };
        if let Some(image) = image {
            state.allowances.charge(image, window.stored.len(), now);
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.running.push(Running {
            ticket,
            device: window.core.id,
            image,
            units: window.span(),
            class,
            bulk: window.bulk,
            list: window.list,
            urgent: false,
            began: Instant::now(),
            signal: Arc::clone(&signal),
        });
        let (bytes, bulk) = (window.stored.len(), window.bulk);
        Turn::Start(window, Slot { fetcher: Arc::clone(self), ticket, bytes, class, image, bulk, signal })
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

    /// Fails a window whose readers' time is over. On the pool, where completions may run.
    fn expire(&self, window: Window, limit: Option<&'static str>) {
        let late = || window.core.deadline_error(window.stored, window.core.sources.describe());
        let cause = limit.map_or_else(|| NotFetched::Source(Arc::new(late())), NotFetched::Limit);
        fail_by(&self.jobs, window, cause);
    }

    /// Starts what may start by now, after images have come or gone.
    pub(super) fn look_at_limits(self: &Arc<Self>) {
        if self.options.image_fetches > 0 || self.options.image_rate.is_some() {
            self.pump();
        }
    }
}

/// What a running read occupies. Dropping it, at the end or in a panic, frees it.
pub(super) struct Slot {
    pub(super) fetcher: Arc<Fetcher>,
    ticket: u64,
    bytes: u64,
    pub(super) class: Class,
    /// Who has paid for it.
    image: Option<ImageKey>,
    bulk: bool,
    pub(super) signal: Arc<Signal>,
}

impl Slot {
    /// Nobody will be asked: gives back what was paid for that by any limits.
    fn not_used(self) {
        let mut state = self.fetcher.state.lock().unwrap();
        if self.bulk {
            state.admission.refund(self.bytes);
        }
        if let Some(image) = self.image {
            state.allowances.refund(image, self.bytes);
        }
        // Dropping the slot locks as well.
        drop(state);
    }

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

/// Has a read run.
fn start(window: Window, slot: Slot) {
    let runtime = slot.fetcher.runtime.clone();
    drop(runtime.spawn(stream::run(window, slot)));
}

/// The same after the disk has been asked whether there is room for what it brings: on the pool, because that waits.
/// What there is no room for at once is asked for one by one, what there is none for at all by nobody, unless a reader
/// can take it without a file. What had been written before and is absent again needs none.
fn look_first(window: Window, slot: Slot) {
    let jobs = Arc::clone(&slot.fetcher.jobs);
    let units = window.units.iter().map(|led| (window.core.id, led.lead.unit())).collect();
    let urgency = window.units.iter().map(|led| led.lead.urgency().clone()).collect();
    let run = Box::new(move |_: &mut Scratch| {
        let need = Need::of(window.units.iter().map(|led| led.unit.blocks().len()));
        let space = &window.core.engine.space;
        let needs_none = || !window.is_divisible() && window.has_blocks() && space.room.may_try(Instant::now());
        let takes_bytes = || window.units.iter().any(|led| led.lead.urgency().takes_bytes());
        if space.has_room(need) || needs_none() || !window.is_divisible() && takes_bytes() {
            start(window, slot);
            return;
        }
        slot.not_used();
        if window.is_divisible() {
            window.core.clone().split(window);
        } else {
            fail_now(window, &NotFetched::NoRoom);
        }
    });
    jobs.push(Job { units, urgency, run });
}

/// The work for one stored range whose bytes have come now. `asked`, by whom and when, as in [`Window`].
pub(super) fn job(
    core: &Arc<Core>,
    group: Vec<Led>,
    asked: (Option<Instant>, RequestId),
    bytes: Bytes,
    slot: &Arc<Slot>,
) -> Job {
    let (core, slot, fetched) = (Arc::clone(core), Arc::clone(slot), Instant::now());
    let units = group.iter().map(|led| (core.id, led.lead.unit())).collect();
    let urgency = group.iter().map(|led| led.lead.urgency().clone()).collect();
    let run = Box::new(move |scratch: &mut _| {
        let (fills, begun) = (&core.engine.telemetry.fills, Instant::now());
        fills.decode_queue.at(slot.class).observe(begun.saturating_duration_since(fetched));
        core.land(group, asked, &bytes, scratch);
        fills.land.at(slot.class).observe(begun.elapsed());
        drop((bytes, slot));
    });
    Job { units, urgency, run }
}

pub(super) fn fail(jobs: &Queue, window: Window, cause: SourceError) {
    fail_by(jobs, window, NotFetched::Source(Arc::new(cause)));
}

fn fail_by(jobs: &Queue, window: Window, cause: NotFetched) {
    jobs.push(Job::new(Class::OnDemand, move |_| fail_now(window, &cause)));
}

/// The same for who may run completions.
fn fail_now(window: Window, cause: &NotFetched) {
    for led in window.units {
        window.core.fetch_failed(led, cause);
    }
}
