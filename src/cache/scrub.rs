//! The thread that reads complete blobs and copies of bootstraps again, slowly.
//!
//! One after the other, the one that was not verified for longest first, and none more often
//! than once a week. It comes last in every queue of the system: for the processor, for the disk,
//! and by a rate that it keeps to.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::engine::Engine;
use super::pool::join_others;
use super::shelves::Shelves;
use super::stats::{StoreCounters, count};
use super::verify;
use super::victims::LotKind;
use crate::base::{ByteRate, Chain, Paid};
use crate::sys::process;

/// What was verified this lately is left in peace.
const EVERY: Duration = Duration::from_secs(7 * 24 * 3600);

/// Pause between looks for something to verify.
const PAUSE: Duration = Duration::from_secs(600);

/// Pause before the first: a daemon that starts has better things to do.
const FIRST_PAUSE: Duration = Duration::from_secs(60);

/// The running thread. Dropping it ends it within one unit.
pub(super) struct Scrub {
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
}

/// The wish that the thread ends.
#[derive(Default)]
struct End {
    asked: Mutex<bool>,
    told: Condvar,
}

impl End {
    /// Waits so long; `false` if the end was asked for.
    fn wait(&self, pause: Duration) -> bool {
        let asked = self.asked.lock().unwrap();
        !*self.told.wait_timeout_while(asked, pause, |asked| !*asked).unwrap().0
    }
}

impl Scrub {
    /// Starts the thread, unless the rate is 0.
    pub(super) fn start(shelves: &Arc<Shelves>, engine: &Engine) -> io::Result<Option<Self>> {
        let rate = engine.options.scrub_rate;
        if rate == 0 {
            return Ok(None);
        }
        let end = Arc::<End>::default();
        let thread = std::thread::Builder::new().name("scrub-0".to_owned());
        let thread = thread.spawn({
            let (end, shelves, counters) = (Arc::clone(&end), Arc::clone(shelves), Arc::clone(&engine.counters));
            move || {
                process::step_back();
                let mut pause = FIRST_PAUSE;
                while end.wait(pause) {
                    // A file that a predecessor left marked is read when somebody answers for it.
                    if shelves.are_uses_known() {
                        pass(&shelves, &counters, rate, now(), &|pause| end.wait(pause));
                    }
                    pause = PAUSE;
                }
            }
        })?;
        Ok(Some(Self { end, thread: Some(thread) }))
    }
}

impl Drop for Scrub {
    fn drop(&mut self) {
        *self.end.asked.lock().unwrap() = true;
        self.end.told.notify_all();
        join_others(self.thread.take());
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

/// Verifies every complete blob and every copy of a bootstrap whose turn it is. `wait` pauses, and tells whether to
/// go on.
pub(super) fn pass(shelves: &Shelves, counters: &StoreCounters, rate: u64, now: u64, wait: &dyn Fn(Duration) -> bool) {
    let mut stock =
        shelves.names().unwrap_or_default().into_iter().map(|name| (LotKind::Blob, name)).collect::<Vec<_>>();
    stock.extend(shelves.bootstraps().lots().into_iter().map(|lot| (lot.kind, lot.name)));
    let noted = |(kind, name): (LotKind, String)| (verify::noted(shelves, kind, &name).unwrap_or(0), name, kind);
    let mut stock: Vec<_> = stock.into_iter().map(noted).collect();
    stock.sort_by(|(at, name, _), (other_at, other, _)| (at, name).cmp(&(other_at, other)));
    // A note from the future is a clock that was put back.
    let due = |at: u64| at > now || now - at >= EVERY.as_secs();
    for (_, name, kind) in stock.into_iter().filter(|(at, ..)| due(*at)) {
        let mut pace = Pace::new(rate);
        let mut go_on = |bytes| {
            count(&counters.scrubbed_bytes, bytes);
            wait(pace.pause(bytes, Instant::now()))
        };
        let verified = match kind {
            LotKind::Blob if !shelves.shelved(&name).is_some_and(|shelved| shelved.is_complete()) => continue,
            LotKind::Blob => shelves.verify(&name, &mut go_on),
            LotKind::Bootstrap => shelves.verify_bootstrap(&name, &mut go_on),
            // Its files are not ours to read.
            LotKind::Kernel => continue,
        };
        match verified {
            Ok(report) => {
                count(&counters.scrubbed_units, report.units.into());
                count(&counters.spoilt_units, report.spoilt.len() as u64);
                if report.cut_short {
                    return;
                }
                verify::note(shelves, kind, &name);
            }
            Err(error) => tracing::warn!(name, error = %Chain(&error), "cannot verify it"),
        }
    }
}

/// Keeps to a rate. Time that was lost is not caught up.
struct Pace {
    rate: ByteRate,
    paid: Paid,
}

impl Pace {
    fn new(rate: u64) -> Self {
        Self { rate: ByteRate::new(rate), paid: Paid::default() }
    }

    /// How long to wait after `bytes` more.
    fn pause(&mut self, bytes: u64, now: Instant) -> Duration {
        self.paid.charge(self.rate, bytes, now).saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::base::BLOCK;
    use crate::blob::{Unit, UnitMap};
    use crate::cache::{Fill, Store, StoreOptions, fill_blocking};
    use crate::source::LocalSource;

    #[test]
    fn the_rate_is_kept_and_lost_time_is_not_caught_up() {
        let start = Instant::now();
        let mut pace = Pace::new(1 << 20);
        let second = Duration::from_secs(1);

        assert_eq!(pace.pause(1 << 20, start), second);
        assert_eq!(pace.pause(1 << 19, start + second), second / 2);
        assert_eq!(pace.pause(1 << 20, start + 10 * second), second, "nothing was read for a while");
        assert_eq!(pace.pause(0, start + 20 * second), Duration::ZERO);
    }

    #[test]
    fn a_pass_removes_a_spoilt_bootstrap_that_nobody_keeps_and_tells_of_one_in_use() {
        let root = tempfile::tempdir_in("/var/tmp").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let store = Store::open(root.path(), StoreOptions::default(), runtime.handle().clone()).unwrap();
        store.say_uses_are_known();
        let shelves = store.shelves();
        let copies = [vec![1; 5000], vec![2; 3 << 20], vec![3; 100]];
        let [used, unused, sound] = copies.each_ref().map(|bytes| shelves.bootstraps().keep(bytes).unwrap());
        let paths = [&used, &unused, &sound].map(|kept| kept.path().to_owned());
        drop((unused, sound));
        for path in &paths[..2] {
            File::options().write(true).open(path).unwrap().write_all_at(&[9], 4500).unwrap();
        }
        let scrub = |now| {
            let counters = StoreCounters::default();
            pass(shelves, &counters, 1 << 40, now, &|_| true);
            counters.snapshot()
        };

        let found = scrub(now());

        assert_eq!((found.scrubbed_units, found.spoilt_units), (3, 2));
        assert_eq!(found.scrubbed_bytes, (3 << 20) + 5100);
        assert_eq!(paths.each_ref().map(|path| path.exists()), [true, false, true]);
        assert_eq!(scrub(now()).scrubbed_units, 0, "seen lately");
        drop(used);
        let found = scrub(now() + EVERY.as_secs() + 60);
        assert_eq!((found.scrubbed_units, found.spoilt_units), (2, 1));
        assert_eq!(paths.each_ref().map(|path| path.exists()), [false, false, true]);
        let left = fs::read_dir(shelves.bootstraps().dir()).unwrap().count();
        assert_eq!(left, 3, "the sound one, when it was used, when it was verified");
    }

    #[test]
    fn a_pass_finds_what_a_disk_spoilt_and_leaves_alone_what_it_has_seen_lately() {
        let (root, blobs) = (tempfile::tempdir_in("/var/tmp").unwrap(), tempfile::tempdir().unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let store = Store::open(root.path(), StoreOptions::default(), runtime.handle().clone()).unwrap();
        store.say_uses_are_known();
        let contents = [[1; 4096], [2; 4096]];
        let units = (0..).zip(&contents).map(|(at, bytes)| Unit::plain(at * BLOCK, bytes).unwrap()).collect();
        for name in ["whole", "part"] {
            fs::write(blobs.path().join(name), contents.concat()).unwrap();
            let map = UnitMap::new(name.parse().unwrap(), 8192, Vec::clone(&units)).unwrap();
            let device = store.device(map, Arc::new(LocalSource::new(blobs.path()).unwrap())).unwrap();
            let wanted = if name == "whole" { device.map().units().len() } else { 1 };
            device.map().units()[..wanted].iter().for_each(|unit| fill_blocking(&*device, unit.blocks()).unwrap());
        }
        let data = root.path().join("v1/whole/data");
        File::options().write(true).open(&data).unwrap().write_all_at(&[9], 5000).unwrap();
        let (shelves, counters) = (store.shelves(), StoreCounters::default());
        let scrub = |now, last: bool| {
            let pauses = Cell::new(0);
            let wait = |_| {
                pauses.set(pauses.get() + 1);
                !last
            };
            pass(shelves, &counters, 1 << 20, now, &wait);
            (pauses.get(), counters.snapshot())
        };

        // The end is asked for after the first unit: it is not called verified.
        assert_eq!(scrub(now(), true).0, 1);
        let (pauses, found) = scrub(now(), false);
        assert_eq!((pauses, found.scrubbed_units, found.scrubbed_bytes, found.spoilt_units), (2, 3, 12288, 1));
        // What was spoilt is absent, so the blob is not complete; once it is, it is seen already.
        assert_eq!(scrub(now() + EVERY.as_secs() + 60, false).0, 0);
        let device = store.device(
            store.saved_map(&"whole".parse().unwrap()).unwrap(),
            Arc::new(LocalSource::new(blobs.path()).unwrap()),
        );
        let device = device.unwrap();
        fill_blocking(&*device, device.map().units()[1].blocks()).unwrap();
        device.flush().unwrap();
        assert!(device.present(device.map().units()[1].blocks()));
        drop(device);

        assert_eq!(scrub(now(), false).0, 0, "verified this week");
        let (pauses, found) = scrub(now() + EVERY.as_secs() + 60, false);
        assert_eq!((pauses, found.spoilt_units), (2, 1), "sound now");
    }
}
