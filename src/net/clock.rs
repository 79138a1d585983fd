//! The time, which a test may take into its own hands.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::select;

/// Another time than the system's.
pub trait Timekeeper: Send + Sync {
    /// A moment that never goes back.
    fn now(&self) -> Instant;

    /// The time of day, which may be wrong by any amount.
    fn wall(&self) -> SystemTime;

    /// Ends when `now` has reached `at`.
    fn sleep_until(&self, at: Instant) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// Where everything that waits for the network gets its time from: pauses between attempts, ends of
/// tokens, patience with silent servers. Cheap to clone. By default it is the system's.
#[derive(Clone, Default)]
pub struct Clock(Option<Arc<dyn Timekeeper>>);

/// Something did not end in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl Clock {
    /// A clock that somebody else moves.
    pub fn kept_by(keeper: Arc<dyn Timekeeper>) -> Self {
        Self(Some(keeper))
    }

    /// A moment that never goes back.
    pub fn now(&self) -> Instant {
        self.0.as_ref().map_or_else(Instant::now, |keeper| keeper.now())
    }

    /// The time of day, which may be wrong by any amount.
    pub fn wall(&self) -> SystemTime {
        self.0.as_ref().map_or_else(SystemTime::now, |keeper| keeper.wall())
    }

    /// Ends at `at`.
    pub async fn sleep_until(&self, at: Instant) {
        match &self.0 {
            None => tokio::time::sleep_until(at.into()).await,
            Some(keeper) => keeper.sleep_until(at).await,
        }
    }

    /// Ends after `pause`. One that is too long to be a moment is for ever.
    pub async fn sleep(&self, pause: Duration) {
        match self.now().checked_add(pause) {
            Some(at) => self.sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// What `work` gives, unless `at` comes first; then `work` is dropped.
    ///
    /// # Errors
    /// `at` came first.
    pub async fn timeout_at<T>(&self, at: Instant, work: impl Future<Output = T>) -> Result<T, Elapsed> {
        select! {
            biased;
            done = work => Ok(done),
            () = self.sleep_until(at) => Err(Elapsed),
        }
    }
}

/// A time that only moves by hand, for tests.
#[cfg(test)]
#[derive(Clone)]
pub(super) struct Hand(Arc<std::sync::Mutex<Instant>>);

#[cfg(test)]
impl Hand {
    pub(super) fn new() -> Self {
        Self(Arc::new(std::sync::Mutex::new(Instant::now())))
    }

    pub(super) fn pass(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }

    pub(super) fn clock(&self) -> Clock {
        Clock::kept_by(Arc::new(self.clone()))
    }
}

#[cfg(test)]
impl Timekeeper for Hand {
    fn now(&self) -> Instant {
        *self.0.lock().unwrap()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }

    fn sleep_until(&self, at: Instant) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let hand = self.clone();
        let is_over = move || if hand.now() >= at { std::task::Poll::Ready(()) } else { std::task::Poll::Pending };
        Box::pin(std::future::poll_fn(move |_| is_over()))
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Clock(kept)" } else { "Clock(system)" })
    }
}
