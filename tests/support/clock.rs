//! A time that stands still until a test moves it, and a driver that moves it when nothing else can happen.
//!
//! With real sockets nobody can know for sure that all is quiet: bytes may be between two ends. The
//! [`Driver`] therefore asks a [`Bustle`] whether somebody works, wants to see nothing change for a while, and
//! does not count a while in which this host was too busy to let the driver itself run. It then moves the
//! time to the next sleeper and never further, so that a deadline cannot pass before what was due earlier.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use rafsd::net::{Clock, Timekeeper};
use tokio::runtime::Handle;

/// Stands still until it is told to move. Clones show the same time.
#[derive(Clone)]
pub struct VirtualClock {
    shared: Arc<Shared>,
}

struct Shared {
    time: Mutex<Time>,
    /// Grows with everything that is done with the clock.
    changes: AtomicU64,
}

struct Time {
    start: Instant,
    now: Instant,
    /// What `wall` shows at `start`.
    wall: SystemTime,
    /// By the moment they wait for, then by arrival.
    sleepers: BTreeMap<(Instant, u64), Waker>,
    arrivals: u64,
}

impl VirtualClock {
    /// A clock that shows the present.
    pub fn new() -> Self {
        let now = Instant::now();
        let time = Time { start: now, now, wall: SystemTime::now(), sleepers: BTreeMap::new(), arrivals: 0 };
        Self { shared: Arc::new(Shared { time: Mutex::new(time), changes: AtomicU64::new(0) }) }
    }

    /// This clock as the network layer takes it.
    pub fn clock(&self) -> Clock {
        Clock::kept_by(Arc::new(self.clone()))
    }

    /// Time that was let pass.
    pub fn elapsed(&self) -> Duration {
        let time = self.shared.time.lock().unwrap();
        time.now - time.start
    }

    /// Moves on by `by`. Whoever was to wake up on the way is waked, in order, but sees the new time.
    pub fn advance(&self, by: Duration) {
        let to = self.now() + by;
        self.advance_to(to);
    }

    /// Moves to the moment the first sleeper waits for. `false`: nobody sleeps.
    pub fn advance_to_next_sleeper(&self) -> bool {
        let first = self.shared.time.lock().unwrap().sleepers.keys().next().copied();
        if let Some((at, _)) = first {
            self.advance_to(at);
        }
        first.is_some()
    }

    /// Sets the time of day `ahead` seconds ahead of the present one, or behind it.
    pub fn skew_wall(&self, ahead: i64) {
        let mut time = self.shared.time.lock().unwrap();
        let by = Duration::from_secs(ahead.unsigned_abs());
        let wall = if ahead < 0 { time.wall.checked_sub(by) } else { time.wall.checked_add(by) };
        time.wall = wall.expect("a time that exists");
        drop(time);
        self.changed();
    }

    /// How many wait for a later time.
    pub fn sleepers(&self) -> usize {
        self.shared.time.lock().unwrap().sleepers.len()
    }

    /// Grows whenever somebody goes to sleep, wakes up or gives up sleeping.
    pub fn changes(&self) -> u64 {
        self.shared.changes.load(Ordering::SeqCst)
    }

    fn advance_to(&self, to: Instant) {
        let mut time = self.shared.time.lock().unwrap();
        time.now = time.now.max(to);
        let behind = time.now + Duration::from_nanos(1);
        let later = time.sleepers.split_off(&(behind, 0));
        let due = std::mem::replace(&mut time.sleepers, later);
        drop(time);
        self.changed();
        due.into_values().for_each(Waker::wake);
    }

    fn changed(&self) {
        self.shared.changes.fetch_add(1, Ordering::SeqCst);
    }
}

impl Timekeeper for VirtualClock {
    fn now(&self) -> Instant {
        self.shared.time.lock().unwrap().now
    }

    fn wall(&self) -> SystemTime {
        let time = self.shared.time.lock().unwrap();
        time.wall + (time.now - time.start)
    }

    fn sleep_until(&self, at: Instant) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(Sleep { clock: self.clone(), at, place: None })
    }
}

/// One who waits; dropped, one who waits no longer.
struct Sleep {
    clock: VirtualClock,
    at: Instant,
    place: Option<(Instant, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let shared = Arc::clone(&self.clock.shared);
        let mut time = shared.time.lock().unwrap();
        if time.now >= self.at {
            return Poll::Ready(());
        }
        let place = self.place.unwrap_or_else(|| {
            time.arrivals += 1;
            shared.changes.fetch_add(1, Ordering::SeqCst);
            (self.at, time.arrivals)
        });
        self.place = Some(place);
        time.sleepers.insert(place, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.clock.shared.time.lock().unwrap().sleepers.remove(&place);
            self.clock.changed();
        }
    }
}

/// Whether somebody works whom the time must wait for.
pub trait Bustle: Send + Sync {
    /// Somebody works, and not only waits for time to pass.
    fn busy(&self) -> bool;

    /// Grows with everything that is done.
    fn steps(&self) -> u64;
}

/// Nobody but the sleepers themselves.
impl Bustle for () {
    fn busy(&self) -> bool {
        false
    }

    fn steps(&self) -> u64 {
        0
    }
}

/// Moves a clock whenever nothing else can happen, until it is dropped.
#[must_use = "the time stands still without it"]
pub struct Driver {
    driving: tokio::task::JoinHandle<()>,
}

/// How long nothing must have changed before the time moves.
pub const QUIET: Duration = Duration::from_millis(12);

/// Looks that make up a while.
const LOOKS: u32 = 6;

/// A look that comes later than this says that others did not get to run either.
const LATE: Duration = Duration::from_millis(8);

impl Driver {
    /// Starts to drive on this runtime. `quiet` is [`QUIET`] where several threads take part; where the driver's
    /// runtime is the only one and has one thread, a few milliseconds are plenty, because the driver itself does
    /// not run while others can.
    pub fn start(clock: &VirtualClock, bustle: Arc<dyn Bustle>, quiet: Duration) -> Self {
        let clock = clock.clone();
        let driving = tokio::spawn(async move {
            loop {
                until_quiet(&clock, &*bustle, quiet).await;
                clock.advance_to_next_sleeper();
            }
        });
        Self { driving }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.driving.abort();
    }
}

/// Ends when somebody sleeps, nobody works and nothing has changed for `quiet` of a time in which
/// this host was not too busy.
pub async fn until_quiet(clock: &VirtualClock, bustle: &dyn Bustle, quiet: Duration) {
    let pause = quiet / LOOKS;
    let mut calm = 0;
    let mut seen = (clock.changes(), bustle.steps());
    while calm < LOOKS {
        let before = Instant::now();
        tokio::time::sleep(pause).await;
        for _ in 0..4 {
            // Each lets the runtime look for news of its sockets.
            tokio::task::yield_now().await;
        }
        let late = before.elapsed() > pause + LATE;
        let now = (clock.changes(), bustle.steps());
        let still = now == seen && !bustle.busy() && !late && clock.sleepers() > 0 && others_rest();
        calm = if still { calm + 1 } else { 0 };
        seen = now;
    }
}

/// Whether no other thread of this runtime has anything to do; of those that wait for a processor nobody knows.
fn others_rest() -> bool {
    let metrics = Handle::current().metrics();
    let active = |worker: &usize| metrics.worker_park_unpark_count(*worker).is_multiple_of(2);
    (0..metrics.num_workers()).filter(active).count() <= 1
}
