use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::lent::LentUnit;
use super::users::ImageKey;
use crate::base::{Class, RequestId};
use crate::blob::UnitIndex;

/// Somebody's wish for a range, from the question to the answer. Clones are the same request.
///
/// It is created where the question is read, so that the time until work begins is known as well as
/// the time that the work takes.
#[derive(Clone, Debug)]
pub struct Request(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: RequestId,
    class: Class,
    asked: Instant,
    /// Nanoseconds from `asked` to the start of the last fetch that it waited for, plus one; 0 while
    /// none has begun.
    started: AtomicU64,
    image: OnceLock<ImageKey>,
    /// What the disk has no room for; `None` if its reader needs to have it in a file.
    given: Option<Mutex<Vec<LentUnit>>>,
}

impl Request {
    /// A request that is made now.
    pub fn new(id: RequestId, class: Class) -> Self {
        Self::with(id, class, None)
    }

    /// The same of a reader who can take bytes that are in no file, by [`super::Fill::read_given`]: on a full disk it is given
    /// them, where others get an error.
    pub fn for_bytes(id: RequestId, class: Class) -> Self {
        Self::with(id, class, Some(Mutex::default()))
    }

    fn with(id: RequestId, class: Class, given: Option<Mutex<Vec<LentUnit>>>) -> Self {
        let (asked, started, image) = (Instant::now(), AtomicU64::new(0), OnceLock::new());
        Self(Arc::new(Inner { id, class, asked, started, image, given }))
    }

    /// Whether its reader can take bytes that are in no file.
    pub(super) fn takes_bytes(&self) -> bool {
        self.0.given.is_some()
    }

    /// Gives its reader a unit, if it can take it.
    pub(super) fn give(&self, unit: LentUnit) {
        if let Some(given) = &self.0.given {
            given.lock().unwrap().push(unit);
        }
    }

    /// A unit that it was given.
    pub(super) fn given(&self, device: u64, unit: UnitIndex) -> Option<LentUnit> {
        let given = self.0.given.as_ref()?.lock().unwrap();
        given.iter().find(|known| (known.device, known.unit) == (device, unit)).cloned()
    }

    /// The same request, known to come from a reader of `image`, unless it is known to be another's.
    #[must_use]
    pub fn of(self, image: ImageKey) -> Self {
        let _ = self.0.image.set(image);
        self
    }

    /// Of which image its reader is, if that is known.
    pub fn image(&self) -> Option<ImageKey> {
        self.0.image.get().copied()
    }

    /// Its name in log lines.
    pub fn id(&self) -> RequestId {
        self.0.id
    }

    /// How urgent it is.
    pub fn class(&self) -> Class {
        self.0.class
    }

    /// When it was made.
    pub fn asked(&self) -> Instant {
        self.0.asked
    }

    /// Notes that a fetch it waits for began at `at`, maybe before the request was made.
    pub(super) fn note_start(&self, at: Instant) {
        let waited = at.saturating_duration_since(self.0.asked).as_nanos();
        self.0.started.fetch_max(u64::try_from(waited).unwrap_or(u64::MAX - 1) + 1, Ordering::Relaxed);
    }

    /// Its time so far, split: until the last fetch that it waited for began, and since. All of it
    /// is the former while no fetch has begun.
    pub fn split(&self) -> (Duration, Duration) {
        let all = self.0.asked.elapsed();
        match self.0.started.load(Ordering::Relaxed).checked_sub(1) {
            None => (all, Duration::ZERO),
            Some(queue) => {
                let queue = Duration::from_nanos(queue).min(all);
                (queue, all - queue)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_queueing_until_the_last_fetch_begins() {
        let request = Request::new(RequestId::new(1), Class::OnDemand);
        let (queue, service) = request.split();
        assert!(service.is_zero() && !queue.is_zero());

        // One that ran already when the reader came, and one that began with it.
        request.note_start(request.asked() - Duration::from_secs(1));
        assert!(request.split().0.is_zero());
        let later = request.asked() + Duration::from_nanos(1);
        request.note_start(later);
        request.note_start(request.asked());

        let (queue, service) = request.split();
        assert_eq!(queue, Duration::from_nanos(1));
        assert!(!service.is_zero());
    }
}
