//! Which read is next: what waits in each queue, what runs, and who must give way to whom.
//!
//! Nothing here starts or ends anything: the fetcher does, under whose lock all of this is.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::Notify;

use super::admission::{Admission, STUCK};
use super::allowances::{Allowances, Wait};
use super::budget::Budget;
use super::engine::StoreOptions;
use super::guides::ListId;
use super::lanes::{LaneKey, Lanes};
use super::users::{ImageKey, Readers};
use super::window::Window;
use crate::base::{Class, RequestId};
use crate::blob::UnitIndex;

/// Reads that wait for their turn, and those that run.
pub(super) struct Queues {
    pub(super) on_demand: Lanes<Window>,
    pub(super) prefetch: VecDeque<Window>,
    pub(super) bulk: VecDeque<Window>,
    pub(super) running: Vec<Running>,
    pub(super) budget: Budget,
    pub(super) admission: Admission,
    pub(super) allowances: Allowances,
    /// When somebody will look again whether bulk may begin.
    pub(super) wake: Option<Instant>,
    pub(super) next_ticket: u64,
    /// Some thread is starting windows; others only note that there may be more to start.
    pub(super) pumping: bool,
    pub(super) pump_again: bool,
}

/// A read that occupies a slot.
pub(super) struct Running {
    pub(super) ticket: u64,
    pub(super) device: u64,
    /// Whose limits it counts for.
    pub(super) image: Option<ImageKey>,
    pub(super) units: RangeInclusive<UnitIndex>,
    pub(super) class: Class,
    pub(super) bulk: bool,
    /// The list that says that something of it will be read soon.
    pub(super) list: Option<ListId>,
    /// A reader waits for one of its units.
    pub(super) urgent: bool,
    pub(super) began: Instant,
    pub(super) signal: Arc<Signal>,
}

impl Running {
    /// Whether a reader waits for it, or soon will, so that bulk must not begin.
    fn is_for_readers(&self) -> bool {
        !self.bulk || self.urgent
    }

    /// Whether bulk must not begin beside it. That of a list goes on beside readers who follow the same.
    fn holds_up(&self, list: Option<ListId>) -> bool {
        self.is_for_readers() && !(list.is_some() && list == self.list)
    }
}

/// What a running read may be told.
#[derive(Default)]
pub(super) struct Signal {
    pub(super) told: Notify,
    pub(super) cancelled: AtomicBool,
    /// Readers need the link: for bulk.
    pub(super) give_way: AtomicBool,
    /// Nobody wants it any more but readers who have joined: for bulk.
    pub(super) abandoned: AtomicBool,
}

impl Queues {
    pub(super) fn new(options: &StoreOptions) -> Self {
        Self {
            on_demand: Lanes::new(),
            prefetch: VecDeque::new(),
            bulk: VecDeque::new(),
            running: Vec::new(),
            budget: Budget::new(options.memory, options.memory_reserve),
            admission: Admission::new(options.prefetch_calm, options.prefetch_rate),
            allowances: Allowances::new(options),
            wake: None,
            next_ticket: 0,
            pumping: false,
            pump_again: false,
        }
    }

    /// Where a window waits, by its urgency at this moment. Readers make running bulk give way.
    pub(super) fn queue(&mut self, mut window: Window) {
        let follows = window.list;
        // Read under the lock: a promotion either came before and is seen, or finds the window.
        match window.class() {
            Class::OnDemand => {
                window.asked.get_or_insert_with(Instant::now);
                window.bulk = false;
                let readers = if self.allowances.are_endless() { Readers::default() } else { window.readers() };
                self.on_demand.push(LaneKey { device: window.core.id, readers }, window);
            }
            Class::Prefetch if window.bulk => return self.bulk.push_back(window),
            Class::Prefetch => {
                window.asked = None;
                self.prefetch.push_back(window);
            }
        }
        self.disturb(follows, |_| true);
    }

    /// A reader has come, who follows a list or does not: the running bulk that is `meant` gives way.
    fn disturb(&mut self, follows: Option<ListId>, meant: impl Fn(&Running) -> bool) {
        self.admission.disturb(Instant::now(), follows);
        let same = |running: &Running| follows.is_some() && follows == running.list;
        let in_the_way = |running: &&Running| running.bulk && !same(running) && meant(running);
        for running in self.running.iter().filter(in_the_way) {
            running.signal.give_way.store(true, Ordering::Release);
            running.signal.told.notify_one();
        }
    }

    pub(super) fn end(&mut self, ticket: u64) {
        let ended = self.running.iter().position(|running| running.ticket == ticket);
        let ended = ended.map(|at| self.running.swap_remove(at)).filter(Running::is_for_readers);
        if let Some(ended) = ended {
            self.admission.disturb(Instant::now(), ended.list);
        }
    }

    /// Until when bulk, of a list or not, must not even be considered, if a reader waits.
    pub(super) fn readers_wait(&self, list: Option<ListId>, now: Instant) -> Option<Instant> {
        let reads = || self.running.iter().filter(|running| running.holds_up(list));
        if let Some(youngest) = reads().map(|running| running.began).max() {
            // Bulk of other servers goes on beside readers whose server does not answer.
            return Some(youngest + STUCK).filter(|&later| later > now);
        }
        // They begin at the next turn, or when memory is free; either comes here again.
        let holds_up = |window: &Window| !(list.is_some() && list == window.list);
        // Whoever waits for the limits of an image leaves the line to others.
        let may = |window: &Window| self.payer(window, now).is_ok();
        let queued = self.on_demand.any(|window| holds_up(window) && may(window))
            || self.prefetch.iter().any(|window| holds_up(window) && may(window));
        queued.then_some(now + STUCK)
    }

    /// Lets reads for these units go before prefetch, for `request`, whose reader `follows` a list or does not.
    /// Their urgency must have been raised already.
    pub(super) fn promote(&mut self, device: u64, units: &[UnitIndex], request: RequestId, follows: Option<ListId>) {
        for &unit in units {
            let queued = self.prefetch.iter().position(|window| window.holds(device, unit));
            if let Some(window) = queued.and_then(|at| self.prefetch.remove(at)) {
                self.queue(Window { asked: Some(Instant::now()), request, ..window });
            }
        }
        if !self.allowances.are_endless() {
            // Somebody of another image waits for it too, whose limits may be wider.
            for &unit in units {
                if let Some(window) = self.on_demand.pick(device, |window| window.holds(device, unit)) {
                    self.queue(window);
                }
            }
        }
        for window in std::mem::take(&mut self.bulk) {
            if window.core.id == device && window.class() == Class::OnDemand {
                Window { request, ..window }.split_by_urgency().into_iter().for_each(|part| self.queue(part));
            } else {
                self.bulk.push_back(window);
            }
        }
        let carries =
            |running: &Running| running.device == device && units.iter().any(|unit| running.units.contains(unit));
        // Those judge for themselves whether the reader is served best by going on.
        for running in self.running.iter_mut().filter(|running| carries(running)) {
            running.urgent = true;
            running.signal.told.notify_one();
        }
        self.disturb(follows, |running| !carries(running));
    }

    /// Takes out the bulk of a device that no reader has joined, to be dropped outside of the lock, and
    /// tells what runs of it.
    #[must_use]
    pub(super) fn abandon(&mut self, device: u64) -> Vec<Window> {
        let (joined, abandoned) = take_of(&mut self.bulk, device)
            .into_iter()
            .partition::<Vec<_>, _>(|window| window.class() == Class::OnDemand);
        self.bulk.extend(joined);
        for running in self.running.iter().filter(|running| running.bulk && running.device == device) {
            running.signal.abandoned.store(true, Ordering::Release);
            running.signal.told.notify_one();
        }
        abandoned
    }

    /// Takes out what waits for a device, to be dropped outside of the lock, and stops what runs.
    #[must_use]
    pub(super) fn remove(&mut self, device: u64) -> Vec<Window> {
        let mut removed: Vec<_> = self.on_demand.remove(device).into();
        removed.extend(take_of(&mut self.prefetch, device));
        removed.extend(take_of(&mut self.bulk, device));
        for running in self.running.iter().filter(|running| running.device == device) {
            running.signal.cancelled.store(true, Ordering::Release);
            running.signal.told.notify_one();
        }
        removed
    }

    /// Whose turn it is, if there is a slot for it, and how many bytes it wants; `later` becomes the moment from which
    /// somebody may go who was passed over, unless it is before.
    pub(super) fn choose(&self, options: &StoreOptions, now: Instant, later: &mut Option<Instant>) -> Option<Choice> {
        let mut may = |window: &Window| {
            let outcome = self.payer(window, now);
            if let Err(Wait::Until(at)) = outcome {
                // Whoever has waited too long by then is told so.
                let late = window.asked.and_then(|asked| asked.checked_add(options.deadline));
                let at = late.map_or(at, |late| at.min(late));
                *later = Some(later.map_or(at, |later| later.min(at)));
            }
            outcome.is_ok()
        };
        let held = |class| self.running.iter().filter(move |running| running.class == class && !running.bulk);
        let free = |class| held(class).count() < options.fetches(class);
        if !self.on_demand.is_empty() {
            if !free(Class::OnDemand) {
                return None;
            }
            let most = options.fetches_per_device();
            let of = |device| held(Class::OnDemand).filter(move |running| running.device == device).count();
            if let Some((lane, window)) = self.on_demand.find(|device, window| of(device) < most && may(window)) {
                return Some(Choice::OnDemand { lane: lane.clone(), bytes: window.stored.len() });
            }
        }
        if !free(Class::Prefetch) {
            return None;
        }
        // Readers who wait for one of their own device's slots still go before its prefetch.
        let may = |window: &Window| !self.on_demand.has(window.core.id) && may(window);
        let at = self.prefetch.iter().position(may)?;
        Some(Choice::Prefetch { at, bytes: self.prefetch[at].stored.len() })
    }
}

/// Whose turn it is.
#[derive(Clone, Debug)]
pub(super) enum Choice {
    /// The next read for readers in this lane.
    OnDemand { lane: LaneKey, bytes: u64 },
    /// What is fetched ahead, at this place of the queue.
    Prefetch { at: usize, bytes: u64 },
}

impl Queues {
    /// For which image's limits a read counts that readers wait for, or soon will; `None` for nobody's.
    ///
    /// # Errors
    /// It must not begin yet.
    pub(super) fn payer(&self, window: &Window, now: Instant) -> Result<Option<ImageKey>, Wait> {
        if self.allowances.are_endless() {
            return Ok(None);
        }
        let images = window.core.users().of(&window.readers());
        let running = |image| {
            let same = |running: &&Running| running.class == Class::OnDemand && running.image == Some(image);
            self.running.iter().filter(same).count()
        };
        self.allowances.payer(&images, running, now)
    }
}

/// Takes the windows of a device, the others keep their order.
fn take_of(windows: &mut VecDeque<Window>, device: u64) -> VecDeque<Window> {
    let (taken, kept) = std::mem::take(windows).into_iter().partition(|window| window.core.id == device);
    *windows = kept;
    taken
}
