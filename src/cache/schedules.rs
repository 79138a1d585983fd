//! What other threads may do between any two steps of a ledger or of the in-flight table.
//!
//! Run by `cargo test --features shuttle --lib schedules`. Each test is a small program of a few
//! threads, run under a thousand schedules or two, half of them random, half of them with few switches
//! at the worst places (PCT). Atomics behave as sequentially consistent ones: orderings that are too
//! weak are not found. `RAFSD_SCHEDULES` is the number of schedules of each kind, default 1000.
//!
//! Eviction against mount is in `eviction`.

mod eviction;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread;

use super::inflight::{Inflight, Lead, Role, Wait};
use super::ledger::{DurableCopy, Found, Ledger};
use super::presence::{bit, words_for};
use super::sink::Sink;
use super::{FillError, bits};
use crate::base::sync::Mutex;
use crate::base::sync::atomic::{AtomicU64, Ordering};
use crate::base::{BLOCK, Class, Digest};
use crate::blob::{Unit, UnitIndex};

/// Runs `program` under many schedules. A failure prints the schedule, which shuttle can replay.
pub(crate) fn explore(program: fn()) {
    let count = std::env::var("RAFSD_SCHEDULES").map_or(1000, |text| text.parse().expect("a number"));
    let config = || {
        let mut config = shuttle::Config::new();
        // Opening a store goes deeper than the 32 KiB that a thread has otherwise.
        config.stack_size = 256 << 10;
        config
    };
    shuttle::Runner::new(RandomScheduler::new(count), config()).run(program);
    shuttle::Runner::new(PctScheduler::new(3, count), config()).run(program);
}

// ---- ledger: landing, flush, withdrawal -------------------------------------------------------------

const UNITS: UnitIndex = 4;

/// What every unit is full of.
const BYTE: u8 = 7;

/// A data file in a page cache that a failed sync empties, and its presence file.
#[derive(Default)]
struct Files {
    /// Units whose bytes a reader of the file would get now, and those on stable storage.
    cached: BTreeSet<UnitIndex>,
    safe: BTreeSet<UnitIndex>,
    /// Data syncs that fail, counted from the first.
    failing: BTreeSet<usize>,
    syncs: usize,
    bits: Vec<u8>,
    safe_bits: Vec<u8>,
}

type Shared = Arc<Mutex<Files>>;

struct Data(Shared);

impl Sink for Data {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        assert_eq!(bytes.len() as u64, BLOCK);
        let unit = UnitIndex::try_from(at / BLOCK).unwrap();
        self.0.lock().unwrap().cached.insert(unit);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // Only what was written before the call is promised; more may come while it runs.
        let written = self.0.lock().unwrap().cached.clone();
        let mut files = self.0.lock().unwrap();
        files.syncs += 1;
        let number = files.syncs - 1;
        if files.failing.contains(&number) {
            files.cached = files.safe.clone();
            return Err(io::Error::other("medium error"));
        }
        files.safe.extend(written);
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let is_there = self.0.lock().unwrap().cached.contains(&UnitIndex::try_from(at / BLOCK).unwrap());
        bytes.fill(if is_there { BYTE } else { 0 });
        Ok(())
    }
}

struct Bits(Shared);

impl Sink for Bits {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let at = usize::try_from(at).unwrap();
        let mut files = self.0.lock().unwrap();
        let len = files.bits.len().max(at + bytes.len());
        files.bits.resize(len, 0);
        files.bits[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut files = self.0.lock().unwrap();
        files.safe_bits = files.bits.clone();
        Ok(())
    }
}

fn identity() -> bits::Identity {
    bits::Identity { layout: Digest([1; 32]), units: UNITS, inode: 2, born: 3 }
}

fn ledger(failing: &[usize]) -> (Shared, Arc<Ledger>) {
    ledger_over(Files { failing: failing.iter().copied().collect(), ..Files::default() }, 0, false)
}

/// Over a disk that says it holds the `units`, whose file was changed or not since it said so.
fn ledger_over(files: Files, units: u64, is_disturbed: bool) -> (Shared, Arc<Ledger>) {
    let files = Arc::new(Mutex::new(Files { bits: bits::empty(&identity()), ..files }));
    let (nothing, words) = (vec![0; words_for(UNITS)], vec![units; words_for(UNITS)]);
    bits::write_changed(&Bits(files.clone()), &identity(), &nothing, &words).unwrap();
    let copy = DurableCopy { file: Box::new(Bits(files.clone())), identity: identity(), names: None, rest: None };
    let ledger = Ledger::new(Box::new(Data(files.clone())), Found { words, is_disturbed }, Some(copy));
    ledger.attach();
    (files, Arc::new(ledger))
}

fn unit(unit: UnitIndex) -> Unit {
    Unit::plain(u64::from(unit) * BLOCK, &[BYTE; 4096]).unwrap()
}

fn land(ledger: &Ledger, index: UnitIndex) {
    ledger.land(index, &unit(index), &[BYTE; 4096]).unwrap();
}

/// A reader of a unit that may be there.
fn look(ledger: &Ledger, index: UnitIndex) {
    if !ledger.presence.get(index) && !(ledger.is_claimed(index) && ledger.reclaim(index, &unit(index), &mut [0; 4096]))
    {
        land(ledger, index);
    }
}

/// What must hold when nobody does anything.
fn judge(files: &Shared, ledger: &Ledger) {
    let words = ledger.presence.snapshot();
    let files = files.lock().unwrap();
    for unit in (0..UNITS).filter(|&unit| bit(&words, unit)) {
        assert!(files.cached.contains(&unit), "unit {unit} is present over lost bytes");
    }
    let count: u32 = words.iter().map(|word| word.count_ones()).sum();
    assert_eq!(ledger.presence.count(), count);
    // The file as it is, because the disk may have written it at any moment, and as it was synced.
    for bits in [&files.bits, &files.safe_bits] {
        let durable = bits::read(bits, &identity());
        let lost: Vec<_> = (0..UNITS).filter(|&unit| bit(&durable, unit) && !files.safe.contains(&unit)).collect();
        assert!(lost.is_empty(), "units {lost:?} are called present after a power cut");
    }
}

/// Landing, on a thread each, against flushes that fail or not, and readers that look.
fn land_and_flush(failing: &[usize]) {
    let (files, ledger) = ledger(failing);
    let spawn = |work: Box<dyn FnOnce(&Ledger) + Send>| {
        let ledger = Arc::clone(&ledger);
        thread::spawn(move || work(&ledger))
    };
    let threads = [
        spawn(Box::new(|ledger| {
            land(ledger, 0);
            land(ledger, 1);
        })),
        spawn(Box::new(|ledger| {
            land(ledger, 1);
            land(ledger, 2);
        })),
        spawn(Box::new(|ledger| {
            // A failure is the point of some of the programs.
            let _ = ledger.flush();
            let _ = ledger.flush();
        })),
    ];
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    judge(&files, &ledger);
    // Fetched again, everything becomes durable.
    loop {
        (0..UNITS).for_each(|unit| land(&ledger, unit));
        if ledger.flush().is_ok() {
            break;
        }
    }
    judge(&files, &ledger);
    let durable = bits::read(&files.lock().unwrap().safe_bits, &identity());
    assert!((0..UNITS).all(|unit| bit(&durable, unit)), "something published never became durable");
}

#[test]
fn units_that_land_during_a_flush_are_neither_lost_nor_early() {
    explore(|| land_and_flush(&[]));
}

#[test]
fn a_unit_that_lands_during_a_failed_sync_is_not_called_present() {
    explore(|| land_and_flush(&[0]));
    explore(|| land_and_flush(&[1]));
}

#[test]
fn two_flushes_at_once_agree_about_what_is_durable() {
    explore(|| {
        let (files, ledger) = ledger(&[1]);
        let flushers: Vec<_> = (0..2)
            .map(|unit| {
                let ledger = Arc::clone(&ledger);
                thread::spawn(move || {
                    land(&ledger, unit);
                    let _ = ledger.flush();
                })
            })
            .collect();
        flushers.into_iter().for_each(|thread| thread.join().unwrap());
        judge(&files, &ledger);
    });
}

/// Units 0 and 1 are there, 2 was spoilt by somebody, and 3 never was.
fn look_and_flush(failing: &[usize]) {
    let there = BTreeSet::from([0, 1]);
    let failing = failing.iter().copied().collect();
    let files = Files { cached: there.clone(), safe: there, failing, ..Files::default() };
    let (files, ledger) = ledger_over(files, 0b111, true);
    assert_eq!(ledger.presence.count(), 0);
    let readers = [[0, 2], [1, 3]].map(|units| {
        let ledger = Arc::clone(&ledger);
        thread::spawn(move || units.into_iter().for_each(|unit| look(&ledger, unit)))
    });
    let flusher = thread::spawn({
        let ledger = Arc::clone(&ledger);
        move || {
            let _ = ledger.flush();
            let _ = ledger.flush();
        }
    });
    readers.into_iter().chain([flusher]).for_each(|thread| thread.join().unwrap());
    let words = ledger.presence.snapshot();
    let lost: Vec<_> =
        (0..UNITS).filter(|&unit| bit(&words, unit) && !files.lock().unwrap().cached.contains(&unit)).collect();
    assert!(lost.is_empty(), "units {lost:?} are present over lost bytes");
    loop {
        (0..UNITS).for_each(|unit| look(&ledger, unit));
        if ledger.flush().is_ok() {
            break;
        }
    }
    judge(&files, &ledger);
    let durable = bits::read(&files.lock().unwrap().safe_bits, &identity());
    assert!((0..UNITS).all(|unit| bit(&durable, unit)), "something looked at never became durable");
}

#[test]
fn what_is_looked_at_during_a_flush_is_neither_lost_nor_believed_early() {
    explore(|| look_and_flush(&[]));
    explore(|| look_and_flush(&[0]));
    explore(|| look_and_flush(&[1]));
}

#[test]
fn nothing_is_written_behind_the_back_of_the_next_owner() {
    explore(|| {
        let (files, ledger) = ledger(&[]);
        land(&ledger, 0);
        let flusher = {
            let ledger = Arc::clone(&ledger);
            thread::spawn(move || ledger.flush().unwrap())
        };
        ledger.detach();
        // The next owner reads what is there, and nobody may change it from here on.
        let taken = files.lock().unwrap().bits.clone();
        flusher.join().unwrap();
        assert!(files.lock().unwrap().bits == taken, "the presence file changed after the last owner left");
    });
}

// ---- the in-flight table ------------------------------------------------------------------------------

/// What became of the readers of one program.
struct Readers {
    /// How often each reader was told Ok, and an error.
    told: Vec<Arc<(AtomicU64, AtomicU64)>>,
    table: Arc<Inflight>,
    /// Units whose bytes are there.
    published: Arc<Mutex<BTreeSet<UnitIndex>>>,
    /// Fetches that were begun, by unit.
    fetches: Arc<Mutex<Vec<UnitIndex>>>,
}

/// What a leader does with its duty.
#[derive(Clone, Copy)]
enum Fate {
    Finish,
    Fail,
    /// As an unwinding thread does. Unwinding itself cannot be explored: all threads of a schedule share
    /// the one real thread, and with it the flag that says that it panics.
    Drop,
}

impl Readers {
    fn new() -> Self {
        Self { told: Vec::new(), table: Arc::default(), published: Arc::default(), fetches: Arc::default() }
    }

    /// A reader of `units`; the fetches it has to lead end as `fate` says.
    fn read(&mut self, units: &'static [UnitIndex], class: Class, fate: Fate) -> thread::JoinHandle<()> {
        let told = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        self.told.push(Arc::clone(&told));
        let (table, published, fetches) = (self.table.clone(), self.published.clone(), self.fetches.clone());
        thread::spawn(move || {
            let seen = Arc::clone(&published);
            let wait = Wait::new(Box::new(move |outcome| match outcome {
                Ok(()) => {
                    let there = seen.lock().unwrap();
                    assert!(units.iter().all(|unit| there.contains(unit)), "told that {units:?} are there: {there:?}");
                    told.0.fetch_add(1, Ordering::SeqCst);
                }
                Err(_) => drop(told.1.fetch_add(1, Ordering::SeqCst)),
            }));
            let mut leads = Vec::new();
            for &unit in units {
                match table.enter(unit, class, Some(&wait), std::iter::empty()) {
                    Role::Lead(led) => leads.extend(led),
                    Role::Joined { promote } => assert!(!promote || class == Class::OnDemand),
                }
            }
            wait.settle(&Ok(()));
            drop(wait);
            leads.into_iter().for_each(|lead| end(lead, fate, &published, &fetches));
        })
    }

    /// Everybody was told exactly once, and nobody is in the table any more.
    fn judge(self) -> Vec<bool> {
        let told: Vec<_> = self.told.iter().map(|t| (t.0.load(Ordering::SeqCst), t.1.load(Ordering::SeqCst))).collect();
        assert!(told.iter().all(|(ok, failed)| ok + failed == 1), "told (Ok, error) times: {told:?}");
        for unit in 0..UNITS {
            let role = self.table.enter(unit, Class::OnDemand, None, std::iter::empty());
            assert!(matches!(role, Role::Lead(_)), "unit {unit} stays in the table");
        }
        told.into_iter().map(|(ok, _)| ok == 1).collect()
    }
}

fn end(lead: Lead, fate: Fate, published: &Mutex<BTreeSet<UnitIndex>>, fetches: &Mutex<Vec<UnitIndex>>) {
    let unit = lead.unit();
    fetches.lock().unwrap().push(unit);
    match fate {
        Fate::Finish => {
            published.lock().unwrap().insert(unit);
            lead.finish(&Ok(()));
        }
        Fate::Fail => lead.finish(&Err(FillError::NoSpace { blob: "x".parse().unwrap(), unit })),
        Fate::Drop => drop(lead),
    }
}

#[test]
fn every_reader_is_told_once_and_never_before_its_units_are_there() {
    explore(|| {
        let mut readers = Readers::new();
        let threads = [
            readers.read(&[0, 1], Class::OnDemand, Fate::Finish),
            readers.read(&[1, 2], Class::OnDemand, Fate::Finish),
            readers.read(&[2, 0], Class::Prefetch, Fate::Finish),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(readers.judge(), [true, true, true]);
    });
}

#[test]
fn a_leader_that_fails_or_drops_its_duty_leaves_nobody_waiting() {
    fn with(fate: Fate) {
        let mut readers = Readers::new();
        let threads = [
            readers.read(&[0, 1], Class::OnDemand, fate),
            readers.read(&[1, 0], Class::Prefetch, Fate::Finish),
            readers.read(&[1, 3], Class::OnDemand, Fate::Finish),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        readers.judge();
    }
    explore(|| with(Fate::Fail));
    explore(|| with(Fate::Drop));
}

#[test]
fn a_prefetch_is_promoted_by_exactly_one_reader() {
    explore(|| {
        let table: Arc<Inflight> = Arc::default();
        let Role::Lead(leads) = table.enter(0, Class::Prefetch, None, std::iter::empty()) else { unreachable!() };
        let urgency = leads[0].urgency().clone();
        let promoted = Arc::new(AtomicU64::new(0));
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let (table, promoted) = (Arc::clone(&table), Arc::clone(&promoted));
                thread::spawn(move || match table.enter(0, Class::OnDemand, None, std::iter::empty()) {
                    Role::Joined { promote } => drop(promoted.fetch_add(u64::from(promote), Ordering::SeqCst)),
                    Role::Lead(_) => panic!("led twice at once"),
                })
            })
            .collect();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        assert_eq!((promoted.load(Ordering::SeqCst), urgency.class()), (1, Class::OnDemand));
        leads.into_iter().for_each(|lead| lead.finish(&Ok(())));
    });
}

#[test]
fn siblings_are_led_by_one_reader_only() {
    explore(|| {
        let table: Arc<Inflight> = Arc::default();
        let led = Arc::new(Mutex::new(Vec::new()));
        let readers: Vec<_> = (0..3)
            .map(|unit| {
                let (table, led) = (Arc::clone(&table), Arc::clone(&led));
                thread::spawn(move || {
                    let siblings = (0..3).filter(|&other| other != unit).map(|other| (other, Class::Prefetch));
                    if let Role::Lead(leads) = table.enter(unit, Class::OnDemand, None, siblings) {
                        led.lock().unwrap().extend(leads);
                    }
                })
            })
            .collect();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        let mut units: Vec<_> = led.lock().unwrap().iter().map(Lead::unit).collect();
        units.sort_unstable();
        assert_eq!(units, [0, 1, 2]);
        drop(std::mem::take(&mut *led.lock().unwrap()));
    });
}
