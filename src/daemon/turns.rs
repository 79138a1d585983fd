//! Whoever comes for the same thing waits until the first has it.
//!
//! Many containers of one cold image start at once. The first learns what the image is and fetches its bootstrap and
//! tables; the others find them.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::DaemonError;
use super::asker::Asker;
use crate::base::Digest;

/// How often it is looked whether whoever waits is still waited for.
const STEP: Duration = Duration::from_millis(50);

/// What somebody has a turn at, by digest.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<HashMap<Digest, Weak<Thing>>>);

/// Whether somebody has a turn at it.
#[derive(Debug, Default)]
struct Thing {
    is_taken: Mutex<bool>,
    given_back: Condvar,
}

/// A place in the queue for one thing.
#[derive(Debug)]
pub(super) struct Queue(Arc<Thing>);

/// A turn, which ends when it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Thing);

impl Turns {
    /// The queue for what has this digest.
    pub(super) fn queue(&self, digest: Digest) -> Queue {
        let mut queues = self.0.lock().unwrap();
        if let Some(queue) = queues.get(&digest).and_then(Weak::upgrade) {
            return Queue(queue);
        }
        queues.retain(|_, queue| queue.strong_count() > 0);
        let queue = Arc::default();
        queues.insert(digest, Arc::downgrade(&queue));
        Queue(queue)
    }
}

impl Queue {
    /// Waits for all who came before.
    ///
    /// # Errors
    /// `until` came first, or `asker` waits no longer.
    pub(super) fn wait(&self, until: Instant, asker: &Asker) -> Result<Turn<'_>, DaemonError> {
        let mut is_taken = self.0.is_taken.lock().unwrap();
        while *is_taken {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(DaemonError::Crowded);
            }
            asker.ensure_wanted()?;
            is_taken = self.0.given_back.wait_timeout(is_taken, left.min(STEP)).unwrap().0;
        }
        *is_taken = true;
        Ok(Turn(&self.0))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // It guards nothing that somebody who panicked could have left half done.
        *self.0.is_taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.given_back.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn take(queue: &Queue) -> Turn<'_> {
        queue.wait(later(), &Asker::patient()).unwrap()
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn one_has_a_turn_at_a_thing_and_others_are_not_in_the_way() {
        let (turns, thing, inside) = (Turns::default(), Digest([1; 32]), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let queue = turns.queue(thing);
                    let _turn = take(&queue);
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });

        let queue = turns.queue(thing);
        let turn = take(&queue);
        drop(take(&turns.queue(Digest([2; 32]))));
        assert!(matches!(turns.queue(thing).wait(Instant::now(), &Asker::patient()), Err(DaemonError::Crowded)));
        assert_eq!(turns.0.lock().unwrap().len(), 2);
        drop(turn);
        drop(queue);
        drop(turns.queue(Digest([3; 32])));
        assert_eq!(turns.0.lock().unwrap().len(), 1, "queues of nobody are let go");
    }
}
