//! What is counted, and what is said in logs.
//!
//! A [`Telemetry`] is a value that is passed in, never a global: whoever makes a store, a source or a
//! backend gives it one. Its counters are plain atomics in fixed places, so counting an event takes no
//! lock and no memory. What each one means is in the [`CATALOGUE`], once, for the exposition and for
//! `docs/METRICS.md` alike.
//!
//! Nothing is decided by a counter.

mod catalogue;
mod exposition;
mod histogram;
mod labels;
pub mod logging;
pub mod memoryless;
mod places;

pub use catalogue::{CATALOGUE, Kind, Metric, Stability, Unit, markdown};
pub use exposition::CONTENT_TYPE;
pub use histogram::{BOUNDS, Histogram, Snapshot};
pub use labels::{Answer, Backend, Cause, Label, Outcome};
pub use places::{Failure, Place};

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Instant;

use crate::base::{Class, RequestId};

/// All counters of one daemon. Clones share them.
#[derive(Clone, Default)]
pub struct Telemetry(Arc<Counters>);

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

/// The counters, by who counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads that the kernel asked about. Counted by `export`.
    pub reads: Family<Backend, Reads>,
    /// The way of a miss through the cache. Counted by `cache`.
    pub fills: Fills,
    /// The cache as a whole. Counted by whoever keeps its books.
    pub space: Space,
    /// Images served now. Counted by `daemon`.
    pub images: Family<Backend, Gauge>,
    /// Mounts of a predecessor that cannot be served. Counted by `daemon`.
    pub unserved: Gauge,
    /// What a successor took over. Counted by whoever adopts.
    pub adoption: Adoption,
    places: places::Places,
    last_request: AtomicU64,
}

/// Reads that one backend was asked about.
#[derive(Debug, Default)]
pub struct Reads {
    /// By what they were told.
    pub answered: Family<Answer, Counter>,
    /// Waiting for data at this moment.
    pub waiting: Gauge,
    /// From the kernel's request to the answer, of those that waited.
    pub duration: Histogram,
}

/// What the cache does to bring units in.
#[derive(Debug, Default)]
pub struct Fills {
    /// Ranges asked for that were not all there.
    pub misses: Family<Class, Counter>,
    /// From a reader's request to the start of the ranged read it waits for.
    pub queue: Histogram,
    /// One ranged read, all its attempts and sources included.
    pub fetch: Family<Class, Histogram>,
    /// From the arrival of stored bytes to a free thread.
    pub decode_queue: Family<Class, Histogram>,
    /// Decoding, checking and writing the units of one stored range.
    pub land: Family<Class, Histogram>,
    /// Units decoded, checked and written.
    pub filled: Family<Class, Counter>,
    /// Decoded bytes of those units.
    pub filled_bytes: Family<Class, Counter>,
    /// Units that did not come.
    pub failed: Family<Cause, Counter>,
    /// Stored ranges fetched a second time because the first bytes were damaged.
    pub refetched: Counter,
}

/// The cache as a whole.
#[derive(Debug, Default)]
pub struct Space {
    /// Bytes that the cache occupies on its disk.
    pub bytes: Gauge,
    /// Bytes that it may occupy; 0 if nothing limits it.
    pub limit: Gauge,
    /// Blobs thrown out to make room, and the bytes that freed.
    pub evictions: Counter,
    pub evicted_bytes: Counter,
    /// Decoded bytes checked again in the background, and units found bad.
    pub scrubbed_bytes: Counter,
    pub scrub_bad_units: Counter,
    /// Units, and their decoded bytes, copied from another blob instead of fetched.
    pub dedup_units: Counter,
    pub dedup_bytes: Counter,
}

/// What a daemon took over from one that died or handed over.
#[derive(Debug, Default)]
pub struct Adoption {
    /// Times that there was something to take over.
    pub adoptions: Counter,
    /// Mounts taken over.
    pub mounts: Counter,
    /// Reads that the predecessor had not answered, by what they were told.
    pub reads: Family<Answer, Counter>,
}

impl std::ops::Deref for Telemetry {
    type Target = Counters;

    fn deref(&self) -> &Counters {
        &self.0
    }
}

impl Telemetry {
    /// A number that no other request of this daemon has.
    pub fn next_request(&self) -> RequestId {
        RequestId::new(self.last_request.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Counts a read of `backend` that has to wait, since `since`.
    pub fn waiting_read(&self, backend: Backend, since: Instant) -> WaitingRead {
        self.reads.at(backend).waiting.step(1);
        WaitingRead { telemetry: self.clone(), backend, since, answer: Answer::Denied, is_adopted: false }
    }

    /// Counts a read that was answered, and that a predecessor had taken if it `is_adopted`.
    pub fn note_answer(&self, backend: Backend, answer: Answer, is_adopted: bool) {
        self.reads.at(backend).answered.at(answer).inc();
        if is_adopted {
            self.adoption.reads.at(answer).inc();
        }
    }

    /// The counters of the source that is called `place` in messages. Takes a lock: for whoever opens
    /// a source, not for each read.
    pub fn place(&self, place: &str) -> Arc<Place> {
        self.places.enter(place)
    }

    /// The counters of the source that is called `place`, if one was ever opened by that name.
    pub fn find(&self, place: &str) -> Option<Arc<Place>> {
        self.places.find(place)
    }

    /// All sources that were ever opened, by name.
    pub fn places(&self) -> Vec<(String, Arc<Place>)> {
        self.places.all()
    }

    /// Everything in the OpenMetrics text format, of content type [`CONTENT_TYPE`].
    pub fn exposition(&self) -> String {
        exposition::text(self)
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `more`.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// Takes over what somebody else has counted so far. Never goes down.
    pub fn raise_to(&self, total: u64) {
        self.0.fetch_max(total, Ordering::Relaxed);
    }

    /// The number at this moment.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Replaces the number; what does not fit is shown as the largest that does.
    pub fn set(&self, value: u64) {
        self.0.store(i64::try_from(value).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// The number at this moment.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }

    fn step(&self, by: i64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }
}

/// A read of the kernel that waits for its data.
///
/// Dropping it without an answer, as a panic would, counts as a denial: that is what its reader gets.
#[derive(Debug)]
pub struct WaitingRead {
    telemetry: Telemetry,
    backend: Backend,
    since: Instant,
    answer: Answer,
    is_adopted: bool,
}

impl WaitingRead {
    /// The same for a read that a predecessor had taken, if it `is_adopted`.
    #[must_use]
    pub fn adopted(mut self, is_adopted: bool) -> Self {
        self.is_adopted = is_adopted;
        self
    }

    /// Notes what the reader was told.
    pub fn answered(mut self, answer: Answer) {
        self.answer = answer;
    }
}

impl Drop for WaitingRead {
    fn drop(&mut self) {
        let reads = self.telemetry.reads.at(self.backend);
        reads.waiting.step(-1);
        self.telemetry.note_answer(self.backend, self.answer, self.is_adopted);
        reads.duration.observe(self.since.elapsed());
    }
}

/// One metric for each value of a label. Finding one takes neither lock nor search.
#[derive(Debug)]
pub struct Family<L, M>(Box<[M]>, PhantomData<L>);

impl<L: Label, M: Default> Default for Family<L, M> {
    fn default() -> Self {
        Self(L::ALL.iter().map(|_| M::default()).collect(), PhantomData)
    }
}

impl<L: Label, M> Family<L, M> {
    /// The metric of one value.
    pub fn at(&self, label: L) -> &M {
        &self.0[label.index()]
    }

    /// All of them with their values.
    pub fn iter(&self) -> impl Iterator<Item = (L, &M)> {
        L::ALL.iter().copied().zip(&self.0)
    }
}

impl<L: Label> Family<L, Counter> {
    /// The sum over all values.
    pub fn sum(&self) -> u64 {
        self.iter().map(|(_, counter)| counter.get()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_never_given_twice_and_never_nobodys() {
        let telemetry = Telemetry::default();
        let ids = [telemetry.next_request(), telemetry.clone().next_request(), telemetry.next_request()];
        assert_eq!(ids.map(RequestId::number), [1, 2, 3]);
    }

    #[test]
    fn a_waiting_read_is_counted_once_however_it_ends() {
        let telemetry = Telemetry::default();
        let reads = telemetry.reads.at(Backend::Fanotify);
        let answered = telemetry.waiting_read(Backend::Fanotify, Instant::now());
        let dropped = telemetry.waiting_read(Backend::Fanotify, Instant::now());
        assert_eq!(reads.waiting.get(), 2);

        answered.answered(Answer::Filled);
        drop(dropped);

        assert_eq!(reads.waiting.get(), 0);
        let counts = Answer::ALL.iter().map(|answer| reads.answered.at(*answer).get()).collect::<Vec<_>>();
        assert_eq!(counts, [0, 1, 1]);
        assert_eq!(telemetry.adoption.reads.sum(), 0);
        assert_eq!(reads.duration.snapshot().count(), 2);
    }

    #[test]
    fn what_a_predecessor_had_taken_is_counted_twice_over() {
        let telemetry = Telemetry::default();
        telemetry.waiting_read(Backend::Fanotify, Instant::now()).adopted(true).answered(Answer::Filled);
        telemetry.note_answer(Backend::Fanotify, Answer::AtOnce, true);
        telemetry.note_answer(Backend::Fanotify, Answer::AtOnce, false);

        let counts =
            |answers: &Family<Answer, Counter>| answers.iter().map(|(_, count)| count.get()).collect::<Vec<_>>();
        assert_eq!(counts(&telemetry.reads.at(Backend::Fanotify).answered), [2, 1, 0]);
        assert_eq!(counts(&telemetry.adoption.reads), [1, 1, 0]);
    }

    #[test]
    fn every_value_of_a_label_has_a_counter_of_its_own() {
        fn check<L: Label>() {
            let family = Family::<L, Counter>::default();
            L::ALL.iter().enumerate().for_each(|(at, label)| family.at(*label).add(1 << at));
            assert_eq!(family.sum(), (1 << L::ALL.len()) - 1, "{}", L::NAME);
        }
        check::<Class>();
        check::<Backend>();
        check::<Answer>();
        check::<Cause>();
        check::<Outcome>();
    }
}
