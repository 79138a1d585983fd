//! One fetch per unit, however many readers ask for it.
//!
//! A kernel read, a prefetch and a background completion may want the same unit at the same
//! moment. The first caller becomes the *leader* and fetches it; the others *join* and learn the
//! leader's outcome. Nothing here knows what a fetch is.
//!
//! Locking: neither lock is held while a completion runs.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::health::Failures;
use super::lent::LentUnit;
use super::users::{ImageKey, Readers};
use super::{Completion, FillError, Request};
use crate::base::Class;
use crate::base::sync::Mutex;
use crate::base::sync::atomic::{AtomicBool, Ordering};
use crate::blob::UnitIndex;
use crate::telemetry::Telemetry;

/// One caller of `fill`, waiting for all units of its range.
///
/// The completion is called exactly once: by the last [`Wait::settle`], or with
/// [`FillError::Cancelled`] when the last owner drops it unsettled.
pub(super) struct Wait {
    request: Request,
    state: Mutex<Waiting>,
}

struct Waiting {
    /// Units not settled yet, plus one while the caller is still adding units.
    open: usize,
    failed: Option<FillError>,
    done: Option<Completion>,
}

impl Wait {
    /// Starts with one open share, which the caller settles when it has added all units.
    pub(super) fn of(request: Request, done: Completion) -> Arc<Self> {
        Arc::new(Self { request, state: Mutex::new(Waiting { open: 1, failed: None, done: Some(done) }) })
    }

    /// For a reader without a number.
    #[cfg(test)]
    pub(super) fn new(done: Completion) -> Arc<Self> {
        Self::of(Request::new(crate::base::RequestId::NONE, Class::OnDemand), done)
    }

    /// The request it is for.
    pub(super) fn request(&self) -> &Request {
        &self.request
    }

    fn add(&self) {
        self.state.lock().unwrap().open += 1;
    }

    /// Notes the outcome of one share; the first error is the one that is told.
    pub(super) fn settle(&self, outcome: &Result<(), FillError>) {
        let mut waiting = self.state.lock().unwrap();
        if let Err(error) = outcome {
            waiting.failed.get_or_insert_with(|| error.clone());
        }
        waiting.open -= 1;
        if waiting.open > 0 {
            return;
        }
        let (done, failed) = (waiting.done.take(), waiting.failed.take());
        drop(waiting);
        if let Some(done) = done {
            tell(done, failed.map_or(Ok(()), Err));
        }
    }

    /// Notes a failure that belongs to no unit in flight.
    pub(super) fn fail(&self, error: FillError) {
        self.state.lock().unwrap().failed.get_or_insert(error);
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let done = self.state.get_mut().ok().and_then(|waiting| waiting.done.take());
        if let Some(done) = done {
            tell(done, Err(FillError::Cancelled));
        }
    }
}

/// Runs a completion. One that panics must not take along the others that wait for the same unit,
/// nor, from a destructor, the process; what it owned answers by being dropped.
fn tell(done: Completion, outcome: Result<(), FillError>) {
    if catch_unwind(AssertUnwindSafe(|| done(outcome))).is_err() {
        tracing::error!("a completion panicked");
    }
}

/// Whether a reader waits for a unit, and readers of which images do. Shared by everything that queues work for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Urgency(Arc<Wanting>);

#[derive(Debug, Default)]
struct Wanting {
    urgent: AtomicBool,
    takes_bytes: AtomicBool,
    readers: Mutex<Readers>,
}

impl Urgency {
    pub(super) fn new(class: Class) -> Self {
        Self(Arc::new(Wanting { urgent: AtomicBool::new(class == Class::OnDemand), ..Wanting::default() }))
    }

    pub(super) fn class(&self) -> Class {
        if self.0.urgent.load(Ordering::Acquire) { Class::OnDemand } else { Class::Prefetch }
    }

    /// Whose readers wait.
    pub(super) fn readers(&self) -> Readers {
        self.0.readers.lock().unwrap().clone()
    }

    /// Whether a reader waits who can take bytes that are in no file.
    pub(super) fn takes_bytes(&self) -> bool {
        self.0.takes_bytes.load(Ordering::Acquire)
    }

    /// A reader waits, of `image` if that is known. Makes the unit urgent; tells whether it was not before, or not
    /// for this image.
    fn raise(&self, image: Option<ImageKey>) -> bool {
        let is_news = self.0.readers.lock().unwrap().add(image);
        !self.0.urgent.swap(true, Ordering::AcqRel) || is_news
    }

    /// It is fetched ahead of a reader of `image`.
    fn note(&self, image: ImageKey) {
        self.0.readers.lock().unwrap().add(Some(image));
    }
}

/// Units being fetched, with everyone who waits for them.
#[derive(Default)]
pub(super) struct Inflight {
    fetches: Mutex<HashMap<UnitIndex, Fetch>>,
    /// Of units that were led and did not come.
    pub(super) failures: Failures,
}

struct Fetch {
    urgency: Urgency,
    waits: Vec<Arc<Wait>>,
}

/// What the caller of [`Inflight::enter`] has to do next.
#[must_use]
pub(super) enum Role {
    /// Fetch the unit, which is the first, and its siblings, then call [`Lead::finish`] for each.
    Lead(Vec<Lead>),
    /// Nothing: the wait has been queued. If `promote`, a reader just joined work that was queued
    /// as prefetch, or for another image, and whoever holds it must see whether it goes first now.
    Joined { promote: bool },
}

impl Inflight {
    /// An empty table whose failures `telemetry` counts.
    pub(super) fn new(telemetry: Telemetry) -> Self {
        Self { failures: Failures::new(telemetry), ..Self::default() }
    }

    /// Joins the fetch of `unit`, or starts one. `wait`, if any, is settled with the outcome.
    ///
    /// Whoever becomes the leader also leads those of `siblings`, which come with the unit, that
    /// nobody leads yet, each with the urgency it is given. All at once: a reader of a sibling that
    /// came in between would fetch everything a second time.
    pub(super) fn enter(
        self: &Arc<Self>,
        unit: UnitIndex,
        class: Class,
        wait: Option<&Arc<Wait>>,
        siblings: impl Iterator<Item = (UnitIndex, Class)>,
    ) -> Role {
        if let Some(wait) = wait {
            wait.add();
        }
        let image = wait.and_then(|wait| wait.request.image());
        let takes_bytes = wait.is_some_and(|wait| wait.request.takes_bytes());
        let waits = wait.cloned();
        let mut fetches = self.fetches.lock().unwrap();
        let slot = match fetches.entry(unit) {
            Entry::Occupied(mut fetch) => {
                fetch.get_mut().waits.extend(waits);
                if takes_bytes {
                    fetch.get().urgency.0.takes_bytes.store(true, Ordering::Release);
                }
                return Role::Joined { promote: class == Class::OnDemand && fetch.get().urgency.raise(image) };
            }
            Entry::Vacant(slot) => slot,
        };
        let lead = |unit, urgency| Lead { table: Arc::clone(self), unit, urgency, started: None, finished: false };
        let urgency = Urgency::new(class);
        urgency.0.takes_bytes.store(takes_bytes, Ordering::Release);
        match (class, image) {
            (Class::OnDemand, image) => {
                urgency.raise(image);
            }
            (Class::Prefetch, Some(image)) => urgency.note(image),
            (Class::Prefetch, None) => {}
        }
        slot.insert(Fetch { urgency: urgency.clone(), waits: waits.into_iter().collect() });
        let mut leads = vec![lead(unit, urgency)];
        for (sibling, class) in siblings {
            if let Entry::Vacant(slot) = fetches.entry(sibling) {
                let urgency = Urgency::new(class);
                slot.insert(Fetch { urgency: urgency.clone(), waits: Vec::new() });
                leads.push(lead(sibling, urgency));
            }
        }
        Role::Lead(leads)
    }

    fn leave(
        &self,
        unit: UnitIndex,
        started: Option<Instant>,
        outcome: &Result<(), FillError>,
        lent: Option<&LentUnit>,
    ) {
        match outcome {
            Ok(()) => self.failures.heal(),
            Err(error) if lent.is_none() => self.failures.note(error),
            Err(_) => {}
        }
        let fetch = self.fetches.lock().unwrap().remove(&unit);
        for wait in fetch.into_iter().flat_map(|fetch| fetch.waits) {
            if let Some(started) = started {
                wait.request.note_start(started);
            }
            match lent.filter(|_| wait.request.takes_bytes()) {
                Some(lent) => {
                    wait.request.give(lent.clone());
                    wait.settle(&Ok(()));
                }
                None => wait.settle(outcome),
            }
        }
    }

    /// How many readers wait, and since when the first of them has. Looks at every unit in flight.
    pub(super) fn waiting(&self) -> (usize, Option<Instant>) {
        let fetches = self.fetches.lock().unwrap();
        let waits = fetches.values().flat_map(|fetch| &fetch.waits);
        let on_demand = |wait: &&Arc<Wait>| wait.request.class() == Class::OnDemand;
        // A reader of several units is in the table once for each.
        let readers: HashMap<_, _> =
            waits.filter(on_demand).map(|wait| (Arc::as_ptr(wait), wait.request.asked())).collect();
        (readers.len(), readers.into_values().min())
    }
}

/// The duty to finish one fetch. Dropping it, as a panic would, cancels the waiters.
pub(super) struct Lead {
    table: Arc<Inflight>,
    unit: UnitIndex,
    urgency: Urgency,
    /// When the fetch began; `None` while it is queued.
    started: Option<Instant>,
    finished: bool,
}

impl Lead {
    pub(super) fn unit(&self) -> UnitIndex {
        self.unit
    }

    pub(super) fn urgency(&self) -> &Urgency {
        &self.urgency
    }

    /// Notes that the fetch begins. Tells whether it is the first attempt.
    pub(super) fn start(&mut self, now: Instant) -> bool {
        let is_first = self.started.is_none();
        self.started.get_or_insert(now);
        is_first
    }

    /// Tells everyone who waits. The unit must have been published before an `Ok`.
    pub(super) fn finish(mut self, outcome: &Result<(), FillError>) {
        self.finished = true;
        self.table.leave(self.unit, self.started, outcome, None);
    }

    /// Gives the unit, which is in no file, to those who can take it, and tells the others why.
    pub(super) fn finish_lent(mut self, lent: &LentUnit, error: FillError) {
        self.finished = true;
        self.table.leave(self.unit, self.started, &Err(error), Some(lent));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if !self.finished {
            self.table.leave(self.unit, self.started, &Err(FillError::Cancelled), None);
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use std::sync::mpsc::{Receiver, TryRecvError, channel};
    use std::time::Duration;

    use super::*;
    use crate::base::RequestId;
    use crate::telemetry::Cause;

    fn watched() -> (Arc<Wait>, Receiver<Result<(), i32>>) {
        let (tx, rx) = channel();
        (Wait::new(Box::new(move |outcome| tx.send(outcome.map_err(|e| e.errno())).unwrap())), rx)
    }

    fn lead(role: Role) -> Lead {
        match role {
            Role::Lead(mut leads) => leads.pop().unwrap(),
            Role::Joined { .. } => panic!("expected to lead"),
        }
    }

    /// A unit without siblings.
    fn enter(table: &Arc<Inflight>, unit: UnitIndex, class: Class, wait: Option<&Arc<Wait>>) -> Role {
        table.enter(unit, class, wait, std::iter::empty())
    }

    #[test]
    fn siblings_are_led_with_the_unit_unless_somebody_leads_them() {
        let table = Arc::new(Inflight::default());
        let other = lead(enter(&table, 3, Class::OnDemand, None));

        let Role::Lead(leads) = table.enter(1, Class::OnDemand, None, (0..5).map(|unit| (unit, Class::Prefetch)))
        else {
            panic!("nobody leads unit 1")
        };

        let led: Vec<_> = leads.iter().map(|lead| (lead.unit(), lead.urgency().class())).collect();
        let prefetch = Class::Prefetch;
        assert_eq!(led, [(1, Class::OnDemand), (0, prefetch), (2, prefetch), (4, prefetch)]);
        assert!(promoted(&enter(&table, 4, Class::OnDemand, None)), "a reader joins a sibling");
        drop((leads, other));
        assert_eq!(lead(enter(&table, 2, Class::OnDemand, None)).unit(), 2);
    }

    fn promoted(role: &Role) -> bool {
        matches!(role, Role::Joined { promote: true })
    }

    #[test]
    fn a_wait_is_told_once_and_only_when_all_its_units_are_settled() {
        let table = Arc::new(Inflight::default());
        let (wait, told) = watched();
        let a = lead(enter(&table, 1, Class::OnDemand, Some(&wait)));
        let b = lead(enter(&table, 2, Class::OnDemand, Some(&wait)));
        wait.settle(&Ok(()));

        a.finish(&Err(FillError::NoSpace { blob: "x".parse().unwrap(), unit: 1 }));
        assert_eq!(told.try_recv(), Err(TryRecvError::Empty), "unit 2 is still open");
        b.finish(&Ok(()));

        assert_eq!(told.try_recv(), Ok(Err(libc::ENOSPC)));
        drop(wait);
        assert_eq!(told.try_recv(), Err(TryRecvError::Disconnected), "told once");
    }

    #[test]
    fn dropped_leader_cancels_instead_of_leaving_readers_blocked() {
        let table = Arc::new(Inflight::default());
        let (wait, told) = watched();
        let leader = lead(enter(&table, 1, Class::Prefetch, None));
        assert!(promoted(&enter(&table, 1, Class::OnDemand, Some(&wait))));
        wait.settle(&Ok(()));

        drop(leader);

        assert_eq!(told.try_recv(), Ok(Err(libc::EIO)));
        drop(lead(enter(&table, 1, Class::OnDemand, None)));
    }

    #[test]
    fn only_the_first_reader_promotes_a_prefetch() {
        let table = Arc::new(Inflight::default());
        let leader = lead(enter(&table, 1, Class::Prefetch, None));

        assert!(!promoted(&enter(&table, 1, Class::Prefetch, None)));
        assert_eq!(leader.urgency().class(), Class::Prefetch);
        assert!(promoted(&enter(&table, 1, Class::OnDemand, None)));
        assert!(!promoted(&enter(&table, 1, Class::OnDemand, None)));
        assert_eq!(leader.urgency().class(), Class::OnDemand);
        leader.finish(&Ok(()));
    }

    #[test]
    fn a_panicking_reader_takes_no_other_along() {
        let table = Arc::new(Inflight::default());
        let (wait, told) = watched();
        let rude = Wait::new(Box::new(|_| panic!("expected by the test")));
        let leader = lead(enter(&table, 1, Class::OnDemand, Some(&rude)));
        assert!(!promoted(&enter(&table, 1, Class::OnDemand, Some(&wait))));
        rude.settle(&Ok(()));
        wait.settle(&Ok(()));

        leader.finish(&Ok(()));

        assert_eq!(told.try_recv(), Ok(Ok(())));
    }

    #[test]
    fn readers_are_counted_once_and_prefetch_is_not() {
        let table = Arc::new(Inflight::default());
        let request = |class| Request::new(RequestId::NONE, class);
        let reader = Wait::of(request(Class::OnDemand), Box::new(drop));
        let leads = [1, 2].map(|unit| lead(enter(&table, unit, Class::OnDemand, Some(&reader))));
        let first = Some(reader.request().asked());
        let other = Wait::of(request(Class::OnDemand), Box::new(drop));
        let prefetch = Wait::of(request(Class::Prefetch), Box::new(drop));
        for wait in [&other, &prefetch] {
            assert!(matches!(enter(&table, 1, Class::Prefetch, Some(wait)), Role::Joined { .. }));
        }

        assert_eq!(table.waiting(), (2, first));
        drop(leads);
        assert_eq!(table.waiting(), (0, None));
        assert_eq!(table.failures.by_cause.at(Cause::Cancelled).get(), 2);
        assert!(!table.failures.is_failing(), "cancelling is no fault of the device");
    }

    #[test]
    fn who_joins_a_fetch_under_way_has_not_queued_for_it() {
        let table = Arc::new(Inflight::default());
        let early = Request::new(RequestId::NONE, Class::OnDemand);
        let wait = Wait::of(early.clone(), Box::new(drop));
        let mut leader = lead(enter(&table, 1, Class::OnDemand, Some(&wait)));
        assert!(leader.start(early.asked() + Duration::from_nanos(5)));
        assert!(!leader.start(Instant::now()), "a second attempt is no new start");
        let late = Request::new(RequestId::NONE, Class::OnDemand);
        let joined = Wait::of(late.clone(), Box::new(drop));
        assert!(!promoted(&enter(&table, 1, Class::OnDemand, Some(&joined))));

        leader.finish(&Ok(()));

        assert_eq!(early.split().0, Duration::from_nanos(5));
        assert_eq!(late.split().0, Duration::ZERO);
    }

    #[test]
    fn an_abandoned_wait_is_cancelled_not_forgotten() {
        let (wait, told) = watched();
        drop(wait);
        assert_eq!(told.try_recv(), Ok(Err(libc::EIO)));
    }
}
