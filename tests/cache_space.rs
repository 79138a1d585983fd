//! The room that the cache takes: what goes and what never does, what is read again, what is copied.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rafsd::base::{BlobId, ByteRange, Class, RequestId};
use rafsd::blob::{Check, Recipe, Unit, UnitMap};
use rafsd::cache::{
    Device, Fill, FillError, ImageKey, LotKind, Request, Shelves, Sink, StockError, Store, StoreError, StoreOptions,
    Wanted, fill_blocking,
};
use rafsd::codec::blake3;
use rafsd::source::{BlobSource, BoxFuture, ReadCtx, SourceError};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const MIB: usize = 1 << 20;
const UNIT: usize = 64 << 10;

/// A blob of plain units, each of noise that its seed decides.
struct Blob {
    id: BlobId,
    plain: Vec<u8>,
    units: Vec<Unit>,
}

impl Blob {
    fn new(name: &str, seeds: impl IntoIterator<Item = u64>) -> Self {
        let (mut plain, mut units) = (Vec::new(), Vec::new());
        for seed in seeds {
            let mut bytes = vec![0; UNIT];
            ::blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
            let range = ByteRange::at(plain.len() as u64, UNIT as u64).unwrap();
            units.push(Unit {
                decoded: range,
                stored: range,
                recipe: Recipe::Plain,
                check: Check::Blake3(blake3(&bytes).0),
                part: None,
                encrypted: false,
            });
            plain.extend_from_slice(&bytes);
        }
        Self { id: name.parse().unwrap(), plain, units }
    }

    /// A blob of `mib` MiB that shares nothing with one of another number.
    fn numbered(number: u64, mib: usize) -> Self {
        Self::new(&format!("blob-{number}"), (0..(mib * MIB / UNIT) as u64).map(|unit| number << 32 | unit))
    }

    fn map(&self) -> UnitMap {
        UnitMap::new(self.id.clone(), self.plain.len() as u64, self.units.clone()).unwrap()
    }

    fn all(&self) -> ByteRange {
        ByteRange::new(0, self.plain.len() as u64).unwrap()
    }

    fn source(&self) -> Arc<Plain> {
        Arc::new(Plain { stored: self.plain.clone().into(), reads: AtomicUsize::new(0), requests: AtomicUsize::new(0) })
    }
}

/// A source that always has the bytes, and counts how many it was asked for, and how often.
struct Plain {
    stored: Bytes,
    reads: AtomicUsize,
    requests: AtomicUsize,
}

impl BlobSource for Plain {
    fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(async { Ok(self.stored.len() as u64) })
    }

    fn read<'a>(&'a self, _: &'a BlobId, range: ByteRange, _: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        let range = usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
        self.reads.fetch_add(range.len(), Ordering::SeqCst);
        self.requests.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move { Ok(self.stored.slice(range)) })
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

struct Bench {
    runtime: Runtime,
    root: TempDir,
    _calm: Option<RwLockReadGuard<'static, ()>>,
}

/// A process that has just been forked has every file open that this one has, until it becomes
/// another program: held for writing meanwhile, and for reading by who wants to know what is open.
static FORKS: RwLock<()> = RwLock::new(());

fn output(command: &mut Command) -> std::io::Result<Output> {
    let child = {
        let _alone = FORKS.write().unwrap_or_else(PoisonError::into_inner);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    child?.wait_with_output()
}

fn options() -> StoreOptions {
    StoreOptions { readahead_first: 0, flush_every: Duration::from_millis(20), ..StoreOptions::default() }
}

fn limited(mib: usize) -> StoreOptions {
    StoreOptions { cache_limit: Some((mib * MIB) as u64), ..options() }
}

impl Bench {
    /// For tests that start no process while this lives.
    fn new() -> Self {
        let calm = FORKS.read().unwrap_or_else(PoisonError::into_inner);
        Self { _calm: Some(calm), ..Self::forking() }
    }

    fn forking() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        // A disk: memory file systems have no holes to count and no leases to ask for.
        Self { runtime, root: tempfile::tempdir_in("/var/tmp").unwrap(), _calm: None }
    }

    fn store_at(&self, root: &Path, options: StoreOptions) -> Arc<Store> {
        // The last jobs of the store before may keep it locked for a moment.
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            match Store::open(root, options.clone(), self.runtime.handle().clone()) {
                Err(StoreError::Locked { .. }) if Instant::now() < until => std::thread::yield_now(),
                outcome => return outcome.unwrap(),
            }
        }
    }

    fn store(&self, options: StoreOptions) -> Arc<Store> {
        let store = self.store_at(self.root.path(), options);
        store.say_uses_are_known();
        store
    }

    fn dir(&self, blob: &Blob) -> PathBuf {
        self.root.path().join("v1").join(blob.id.as_str())
    }
}

fn open(store: &Store, blob: &Blob) -> Arc<Device> {
    store.device(blob.map(), blob.source()).unwrap()
}

/// Brings all of `blob` in, and lets go of it.
fn bring(store: &Store, blob: &Blob) {
    let device = open(store, blob);
    fill_blocking(&*device, blob.all()).unwrap();
    device.flush().unwrap();
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Makes `blob` look as if it was last used at `at` seconds since 1970.
fn last_used(bench: &Bench, blob: &Blob, at: u64) {
    let note = File::options().write(true).open(bench.dir(blob).join("used")).unwrap();
    note.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(at)).unwrap();
}

fn everything() -> Wanted {
    Wanted { excess: u64::MAX, ..Wanted::default() }
}

#[track_caller]
fn assert_bytes(device: &Device, blob: &Blob) {
    let mut got = vec![0; blob.plain.len()];
    device.open_data().unwrap().read_exact_at(&mut got, 0).unwrap();
    assert!(got == blob.plain, "wrong bytes in {}", blob.id);
}

// ---- what goes, and what never does ---------------------------------------------------------------

#[test]
fn over_the_high_water_the_least_recently_used_go_down_to_the_low_one() {
    let bench = Bench::new();
    let blobs: Vec<Blob> = (0..8).map(|number| Blob::numbered(number, 1)).collect();
    let store = bench.store(options());
    blobs.iter().for_each(|blob| bring(&store, blob));
    // Not in the order of their names.
    for (at, number) in [5, 2, 7, 0, 1, 3, 4, 6].into_iter().enumerate() {
        last_used(&bench, &blobs[number], 1000 + at as u64);
    }
    drop(store);

    let store = bench.store(StoreOptions { high_water: 60, low_water: 50, ..limited(8) });
    eventually("as many as it takes have gone", || store.stats().evicted == 5);
    assert!(store.stats().used_bytes <= 4 * MIB as u64);
    let left: BTreeSet<_> = store.shelves().inventory().unwrap().blobs.into_iter().map(|blob| blob.name).collect();
    // Of 8 MiB and a little, 4 MiB are left at most: without their small files, 3 blobs.
    assert_eq!(left, ["blob-3", "blob-4", "blob-6"].map(str::to_owned).into());
}

#[test]
fn a_blob_that_is_attached_stays_whole_whatever_the_limit_is() {
    let bench = Bench::new();
    let (used, idle) = (Blob::numbered(1, 2), Blob::numbered(2, 2));
    let store = bench.store(limited(1));
    let device = open(&store, &used);
    let inode = fs::metadata(device.data_path().unwrap()).unwrap().ino();
    last_used(&bench, &used, 1);

    fill_blocking(&*device, used.all()).unwrap();
    bring(&store, &idle);
    eventually("the other one goes", || !bench.dir(&idle).exists());

    assert!(matches!(store.shelves().remove("blob-1"), Err(StockError::InUse(_))));
    assert_eq!(store.shelves().collect(everything(), false).unwrap(), []);
    assert_bytes(&device, &used);
    assert_eq!(fs::metadata(device.data_path().unwrap()).unwrap().ino(), inode);
    assert!(store.stats().used_bytes > 2 * MIB as u64, "over the limit, because it must be");
}

#[test]
fn nothing_goes_until_the_uses_are_known() {
    let bench = Bench::new();
    let blob = Blob::numbered(1, 2);
    let store = bench.store_at(bench.root.path(), limited(1));
    bring(&store, &blob);

    assert!(!store.make_room(1));
    assert!(matches!(store.shelves().remove("blob-1"), Err(StockError::UsesUnknown)));
    assert!(matches!(store.shelves().collect(everything(), false), Err(StockError::UsesUnknown)));
    assert!(store.shelves().inventory().unwrap().blobs[0].in_use);

    store.say_uses_are_known();
    eventually("over its limit, it goes", || !bench.dir(&blob).exists());
}

#[test]
fn what_anybody_has_open_is_in_use_as_a_mount_without_a_daemon_is() {
    let bench = Bench::new();
    let blob = Blob::numbered(1, 1);
    let store = bench.store(options());
    bring(&store, &blob);
    let file = File::open(bench.dir(&blob).join("data")).unwrap();

    assert!(matches!(store.shelves().remove("blob-1"), Err(StockError::InUse(_))));
    assert!(store.shelves().inventory().unwrap().blobs[0].in_use);
    drop(file);

    // The last job of a device may hold its file for a moment longer.
    eventually("not in use", || !store.shelves().inventory().unwrap().blobs[0].in_use);
    store.shelves().remove("blob-1").unwrap();
    assert!(!bench.dir(&blob).exists());
}

#[test]
fn a_pin_holds_across_restarts_until_it_is_removed() {
    let bench = Bench::new();
    let blob = Blob::numbered(1, 1);
    let store = bench.store(options());
    bring(&store, &blob);
    let name = store.shelves().find("bl").unwrap();
    store.shelves().pin(&name, true).unwrap();
    drop(store);

    let store = bench.store(options());
    assert!(matches!(store.shelves().remove(&name), Err(StockError::Pinned(_))));
    assert_eq!(store.shelves().collect(everything(), false).unwrap(), []);
    assert!(store.shelves().inventory().unwrap().blobs[0].pinned);

    store.shelves().pin(&name, false).unwrap();
    eventually("only told", || store.shelves().collect(everything(), true).unwrap().len() == 1);
    assert_eq!(store.shelves().collect(everything(), false).unwrap()[0].kind, LotKind::Blob);
    assert!(matches!(store.shelves().find("blob"), Err(StockError::Unknown(_))));
}

#[test]
fn a_crash_in_the_middle_of_a_removal_leaves_nothing_that_lies() {
    let bench = Bench::new();
    let (gone, stays) = (Blob::numbered(1, 1), Blob::numbered(2, 1));
    let store = bench.store(options());
    bring(&store, &gone);
    bring(&store, &stays);
    drop(store);
    // As far as a removal gets: another name, and some files gone.
    let trash = bench.root.path().join("v1/.trash-0");
    fs::rename(bench.dir(&gone), &trash).unwrap();
    fs::remove_file(trash.join("units")).unwrap();

    let store = bench.store(options());
    eventually("the rest goes", || !trash.exists());
    let names: Vec<_> = store.shelves().inventory().unwrap().blobs.into_iter().map(|blob| blob.name).collect();
    assert_eq!(names, ["blob-2"]);
    let device = open(&store, &gone);
    assert!(!device.present(gone.all()));
    fill_blocking(&*device, gone.all()).unwrap();
    assert_bytes(&device, &gone);
}

#[test]
fn removals_race_with_mounts_and_every_mount_finds_a_whole_blob_or_none() {
    let bench = Bench::new();
    let store = bench.store(StoreOptions { twins: 0, ..options() });
    let blobs: Vec<Blob> =
        (0..3).map(|number| Blob::new(&format!("b{number}"), number * 10..number * 10 + 3)).collect();
    let ended = AtomicBool::new(false);
    let (mounts, found, removed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));

    std::thread::scope(|scope| {
        let evictors: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    while !ended.load(Ordering::SeqCst) {
                        let gone = store.shelves().collect(everything(), false).unwrap();
                        removed.fetch_add(gone.len(), Ordering::SeqCst);
                    }
                })
            })
            .collect();
        let readers: Vec<_> = (0..4)
            .map(|reader| {
                let (store, blobs, mounts, found) = (&store, &blobs, &mounts, &found);
                scope.spawn(move || {
                    for round in 0..150 {
                        let blob = &blobs[(reader + round) % blobs.len()];
                        let device = open(store, blob);
                        // What a kernel would have open, and would read without asking when it may.
                        let file = device.open_data().unwrap();
                        if device.present(blob.all()) {
                            found.fetch_add(1, Ordering::SeqCst);
                        }
                        fill_blocking(&*device, blob.all()).unwrap();
                        let mut got = vec![0; blob.plain.len()];
                        file.read_exact_at(&mut got, 0).unwrap();
                        assert!(got == blob.plain, "wrong bytes");
                        let named = fs::metadata(device.data_path().unwrap()).unwrap();
                        assert_eq!(named.ino(), file.metadata().unwrap().ino(), "removed while in use");
                        mounts.fetch_add(1, Ordering::SeqCst);
                        drop((file, device));
                    }
                })
            })
            .collect();
        let outcomes: Vec<_> = readers.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        ended.store(true, Ordering::SeqCst);
        evictors.into_iter().for_each(|evictor| evictor.join().unwrap());
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    });

    assert_eq!(mounts.into_inner(), 600);
    assert!(removed.into_inner() > 20, "the race was a race");
}

// ---- at the limit ---------------------------------------------------------------------------------

#[test]
fn at_the_limit_readers_go_on_and_prefetch_does_not() {
    let bench = Bench::new();
    let blob = Blob::numbered(1, 4);
    let store = bench.store(limited(1));
    let device = open(&store, &blob);
    let (first, rest) =
        (ByteRange::at(0, 2 * MIB as u64).unwrap(), ByteRange::at(2 * MIB as u64, UNIT as u64).unwrap());
    fill_blocking(&*device, first).unwrap();

    let (tx, rx) = channel();
    device.fill(rest, Class::Prefetch, Box::new(move |outcome| tx.send(outcome).unwrap()));
    let outcome = rx.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(matches!(outcome, Err(FillError::NoSpace { .. })), "{outcome:?}");
    device.complete_in_background();
    std::thread::sleep(Duration::from_millis(200));
    assert!(!device.present(rest), "nothing is fetched that nobody waits for");

    fill_blocking(&*device, rest).unwrap();
    assert!(device.present(rest) && device.present(first));
}

#[test]
fn prefetch_at_the_limit_waits_for_room_and_then_goes_on() {
    let bench = Bench::new();
    let (old, new) = (Blob::numbered(1, 3), Blob::numbered(2, 2));
    let store = bench.store(options());
    bring(&store, &old);
    drop(store);

    // The gate is closed, so that nothing goes before prefetch asks.
    let store = bench.store_at(bench.root.path(), limited(2));
    let device = open(&store, &new);
    eventually("the disk is measured", || store.stats().used_bytes > 2 * MIB as u64);
    store.say_uses_are_known();
    let (tx, rx) = channel();
    let some = ByteRange::at(0, MIB as u64).unwrap();
    device.fill(some, Class::Prefetch, Box::new(move |outcome| tx.send(outcome).unwrap()));

    rx.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    assert!(!bench.dir(&old).exists());
}

// ---- what is read again ---------------------------------------------------------------------------

fn spoil(bench: &Bench, blob: &Blob, at: u64) {
    let data = File::options().write(true).open(bench.dir(blob).join("data")).unwrap();
    data.write_all_at(&[0x55; 3], at).unwrap();
    data.sync_all().unwrap();
}

#[test]
fn a_spoilt_unit_that_nobody_uses_is_told_and_fetched_again() {
    let bench = Bench::new();
    let blob = Blob::numbered(1, 1);
    let store = bench.store(options());
    bring(&store, &blob);
    let sound = store.shelves().verify("blob-1", &mut |_| true).unwrap();
    assert_eq!((sound.units, sound.bytes, sound.spoilt.len()), (16, MIB as u64, 0));
    spoil(&bench, &blob, 3 * UNIT as u64 + 100);

    eventually("not in use", || !store.shelves().inventory().unwrap().blobs[0].in_use);
    let report = store.shelves().verify("blob-1", &mut |_| true).unwrap();
    assert_eq!(report.spoilt.iter().map(|spoilt| spoilt.unit).collect::<Vec<_>>(), [3]);
    assert!(report.mended && !report.cut_short);
    let stock = store.shelves().inventory().unwrap().blobs.remove(0);
    assert_eq!((stock.units_present, stock.complete), (15, false));
    drop(store);

    let store = bench.store(options());
    let source = blob.source();
    let device = store.device(blob.map(), source.clone()).unwrap();
    fill_blocking(&*device, blob.all()).unwrap();
    assert_eq!(source.reads.load(Ordering::SeqCst), UNIT);
    assert_bytes(&device, &blob);
}

#[test]
fn a_spoilt_unit_in_use_is_told_and_left_alone() {
    let bench = Bench::new();
    let blob = Blob::numbered(1, 1);
    let store = bench.store(options());
    let device = open(&store, &blob);
    let half = ByteRange::at(0, MIB as u64 / 2).unwrap();
    fill_blocking(&*device, half).unwrap();
    device.flush().unwrap();
    spoil(&bench, &blob, 5 * UNIT as u64);

    let report = store.shelves().verify("blob-1", &mut |_| true).unwrap();
    assert_eq!(
        report.spoilt.iter().map(|spoilt| (spoilt.unit, spoilt.start)).collect::<Vec<_>>(),
        [(5, 5 * UNIT as u64)]
    );
    assert!(!report.mended && device.present(half));
    assert_eq!(report.units, 8, "what is absent is not read");

    let mut read = 0;
    let cut = store.shelves().verify("blob-1", &mut |bytes| {
        read += bytes;
        read < 2 * UNIT as u64
    });
    assert!(cut.unwrap().cut_short);
    assert!(matches!(store.shelves().verify("blob-2", &mut |_| true), Err(StockError::Unknown(_))));
}

#[test]
fn without_a_daemon_the_shelves_are_looked_through_under_the_lock() {
    let bench = Bench::new();
    let blob = Blob::numbered(1, 1);
    let store = bench.store(options());
    bring(&store, &blob);
    let locked = Shelves::open(bench.root.path());
    assert!(
        matches!(locked, Err(StoreError::Locked { pid: Some(pid), .. }) if pid == std::process::id()),
        "{locked:?}"
    );
    drop(store);

    let mut shelves = Err(StoreError::Locked { root: PathBuf::new(), pid: None });
    eventually("the lock is free", || {
        shelves = Shelves::open(bench.root.path());
        shelves.is_ok()
    });
    let shelves = shelves.unwrap();
    assert!(shelves.inventory().unwrap().blobs[0].complete);
    eventually("collected", || shelves.collect(everything(), false).unwrap().len() == 1);
    assert!(Shelves::open(&bench.root.path().join("nowhere")).is_err());
}

// ---- what is copied -------------------------------------------------------------------------------

#[test]
fn units_of_a_complete_blob_are_copied_and_not_fetched() {
    let bench = Bench::new();
    let (first, second) = (Blob::new("first", 0..16), Blob::new("second", 8..24));
    let store = bench.store(options());
    let held = open(&store, &first);
    fill_blocking(&*held, first.all()).unwrap();
    held.flush().unwrap();
    eventually("its units are known", || store.stats().known_units == 16);

    let source = second.source();
    let device = store.device(second.map(), source.clone()).unwrap();
    fill_blocking(&*device, second.all()).unwrap();
    assert_bytes(&device, &second);
    assert_eq!(source.reads.load(Ordering::SeqCst), 8 * UNIT);
    assert_eq!((device.stats().units_copied, device.stats().units_filled), (8, 16));
    assert_eq!((store.stats().copied_units, store.stats().copied_bytes), (8, 8 * UNIT as u64));

    // What is copied is present as durably as what is fetched.
    drop((device, held, store));
    let store = bench.store(options());
    assert!(store.shelves().inventory().unwrap().blobs.iter().all(|blob| blob.complete));
}

/// Takes what it is given, as the kernel's cache would.
struct Elsewhere(std::fs::File);

impl Sink for Elsewhere {
    fn write_at(&self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        self.0.write_all_at(bytes, at)
    }

    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_device_elsewhere_copies_what_the_store_has_whole_also_at_once_after_a_restart() {
    let bench = Bench::new();
    let (whole, part) = (Blob::new("whole", 0..16), Blob::new("part", 100..116));
    let store = bench.store(options());
    bring(&store, &whole);
    let begun = open(&store, &part);
    fill_blocking(&*begun, part.units[0].blocks()).unwrap();
    drop((begun, store));

    let store = bench.store(options());
    store.offer_to_others([&whole.id, &part.id, &"unknown".parse().unwrap()]);

    assert_eq!(store.stats().known_units, 16, "and of what is not whole, none");
    for (blob, fetched) in [(&whole, 0), (&part, 16 * UNIT)] {
        let (file, source) = (tempfile::NamedTempFile::new().unwrap(), blob.source());
        let sink = Box::new(Elsewhere(file.reopen().unwrap()));
        let device = Device::with_sink(blob.map(), source.clone(), sink, &[], store.engine().clone());
        fill_blocking(&*device, blob.all()).unwrap();
        assert_eq!(source.reads.load(Ordering::SeqCst), fetched, "{}", blob.id);
        assert!(std::fs::read(file.path()).unwrap() == blob.plain);
    }
}

#[test]
fn after_a_restart_complete_blobs_on_disk_are_known_too() {
    let bench = Bench::new();
    let (first, second) = (Blob::new("first", 0..16), Blob::new("second", 8..24));
    let store = bench.store(options());
    bring(&store, &first);
    drop(store);

    let store = bench.store(options());
    let source = second.source();
    let device = store.device(second.map(), source.clone()).unwrap();
    eventually("its units are known", || store.stats().known_units == 16);
    fill_blocking(&*device, second.all()).unwrap();
    assert_bytes(&device, &second);
    assert_eq!(source.reads.load(Ordering::SeqCst), 8 * UNIT);
    assert!(store.shelves().collect(everything(), false).unwrap().iter().any(|gone| gone.name == "first"));
    eventually("forgotten with its blob", || store.stats().known_units == 0 || device.is_complete_durable());
}

#[test]
fn spoilt_bytes_are_never_copied() {
    let bench = Bench::new();
    let (first, second) = (Blob::new("first", 0..16), Blob::new("second", 0..16));
    let store = bench.store(options());
    let held = open(&store, &first);
    fill_blocking(&*held, first.all()).unwrap();
    held.flush().unwrap();
    eventually("its units are known", || store.stats().known_units == 16);
    spoil(&bench, &first, 2 * UNIT as u64 + 7);

    let source = second.source();
    let device = store.device(second.map(), source.clone()).unwrap();
    fill_blocking(&*device, second.all()).unwrap();
    assert_bytes(&device, &second);
    assert_eq!(source.reads.load(Ordering::SeqCst), UNIT, "only the spoilt one is fetched");
}

#[test]
fn a_blob_that_becomes_incomplete_is_copied_from_no_more() {
    let bench = Bench::new();
    let whole = Blob::new("first", 0..16);
    let mut units = whole.units.clone();
    units[8..].iter_mut().for_each(|unit| unit.check = Check::Unknown);
    let half = UnitMap::new(whole.id.clone(), whole.plain.len() as u64, units).unwrap();
    let store = bench.store(options());
    let device = store.device(half, whole.source()).unwrap();
    fill_blocking(&*device, ByteRange::at(0, 8 * UNIT as u64).unwrap()).unwrap();
    device.flush().unwrap();
    eventually("complete, as far as its image knows", || store.stats().known_units == 8);

    let again = store.device(whole.map(), whole.source()).unwrap();
    assert!(Arc::ptr_eq(&device, &again) && !device.is_complete_durable());
    assert_eq!(store.stats().known_units, 0);

    fill_blocking(&*device, whole.all()).unwrap();
    device.flush().unwrap();
    eventually("complete again", || store.stats().known_units == 16);
}

/// A file system in a file; unmounted and gone when dropped.
struct Disk {
    at: PathBuf,
    _dir: TempDir,
}

impl Disk {
    fn new(mkfs: &[&str], mib: usize) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".into());
        }
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (file, at) = (dir.path().join("disk"), dir.path().join("mnt"));
        File::create(&file).unwrap().set_len((mib * MIB) as u64).unwrap();
        fs::create_dir(&at).unwrap();
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&file))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&at))?;
        Ok(Self { at, _dir: dir })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.at)).expect("nobody uses the disk any more");
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = output(command).map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {output:?}")) }
}

#[test]
fn where_the_file_system_can_copies_share_their_blocks() {
    let disk = match Disk::new(&["mkfs.xfs", "-q"], 320) {
        Ok(disk) => disk,
        Err(why) => return eprintln!("SKIPPED where_the_file_system_can_copies_share_their_blocks: {why}"),
    };
    let bench = Bench::new();
    let (first, second) = (Blob::new("first", 0..16), Blob::new("second", 0..16));
    let store = bench.store_at(&disk.at.join("cache"), options());
    store.say_uses_are_known();
    let held = open(&store, &first);
    fill_blocking(&*held, first.all()).unwrap();
    held.flush().unwrap();
    eventually("its units are known", || store.stats().known_units == 16);

    let source = second.source();
    let device = store.device(second.map(), source.clone()).unwrap();
    fill_blocking(&*device, second.all()).unwrap();
    assert_bytes(&device, &second);
    assert_eq!((source.reads.load(Ordering::SeqCst), store.stats().shared_units), (0, 16));
}

#[test]
fn on_a_full_disk_a_reader_waits_for_what_nobody_uses_to_go() {
    let disk = match Disk::new(&["mkfs.ext4", "-q", "-m", "0"], 24) {
        Ok(disk) => disk,
        Err(why) => return eprintln!("SKIPPED on_a_full_disk_a_reader_waits_for_what_nobody_uses_to_go: {why}"),
    };
    let bench = Bench::new();
    let root = disk.at.join("cache");
    let (old, new) = (Blob::numbered(1, 12), Blob::numbered(2, 16));
    let store = bench.store_at(&root, options());
    store.say_uses_are_known();
    bring(&store, &old);

    // Several readers, each of which meets the end of the disk.
    let device = open(&store, &new);
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let (device, new, wrong) = (&device, &new, &wrong);
            scope.spawn(move || {
                for unit in new.units.iter().skip(reader).step_by(4) {
                    if let Err(error) = fill_blocking(&**device, unit.blocks()) {
                        wrong.lock().unwrap().push(error);
                    }
                }
            });
        }
    });

    assert!(wrong.lock().unwrap().is_empty(), "{wrong:?}");
    assert_bytes(&device, &new);
    assert!(!root.join("v1/blob-1").exists());
    let stats = store.stats();
    assert!(stats.refused_writes > 0 && stats.evicted >= 1, "{stats:?}");

    // With nothing left to go, the answer is an error, and what is there stays readable.
    let more = Blob::numbered(3, 12);
    let third = open(&store, &more);
    let refused = more
        .units
        .iter()
        .filter(|unit| matches!(fill_blocking(&*third, unit.blocks()), Err(FillError::NoSpace { .. })));
    assert!(refused.count() > 0);
    assert_bytes(&device, &new);
}

/// Takes the rest of a disk.
fn fill_up(path: &Path) {
    use std::io::Write as _;
    let mut file = File::create(path).unwrap();
    for size in [MIB, 4096] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
    file.sync_all().unwrap();
}

/// Reads `unit` this often, each time in vain.
fn fail(device: &Device, unit: &Unit, times: usize) {
    for _ in 0..times {
        let outcome = fill_blocking(device, unit.blocks());
        assert!(matches!(outcome, Err(FillError::NoSpace { .. })), "{outcome:?}");
    }
}

#[test]
fn on_a_full_disk_nothing_is_fetched_until_there_is_room() {
    let disk = match Disk::new(&["mkfs.ext4", "-q", "-m", "0"], 24) {
        Ok(disk) => disk,
        Err(why) => return eprintln!("SKIPPED on_a_full_disk_nothing_is_fetched_until_there_is_room: {why}"),
    };
    let bench = Bench::new();
    let (old, new) = (Blob::numbered(1, 4), Blob::numbered(2, 12));
    let store = bench.store_at(&disk.at.join("cache"), options());
    store.say_uses_are_known();
    let held = open(&store, &old);
    fill_blocking(&*held, old.all()).unwrap();
    held.flush().unwrap();
    let source = new.source();
    let device = store.device(new.map(), source.clone()).unwrap();
    fill_blocking(&*device, new.units[0].blocks()).unwrap();
    fill_up(&disk.at.join("ballast"));
    let requests = || source.requests.load(Ordering::SeqCst);
    let before = requests();

    fail(&device, &new.units[1], 200);
    std::thread::sleep(Duration::from_millis(100));
    fail(&device, &new.units[2], 200);
    // Several readers, and a read of many units.
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| fail(&device, &new.units[3], 50)))));
    assert!(fill_blocking(&*device, new.all()).is_err());
    assert!(requests() <= before + 1, "{} requests", requests() - before);
    assert!(!device.present(new.units[1].blocks()) && device.present(new.units[0].blocks()));

    // Room that somebody else makes: the next read has its data.
    fs::remove_file(disk.at.join("ballast")).unwrap();
    eventually("there is room", || fill_blocking(&*device, new.units[1].blocks()).is_ok());
    fill_up(&disk.at.join("ballast"));
    let before = requests();
    fail(&device, &new.units[2], 200);
    assert!(requests() <= before + 2, "{} requests", requests() - before);

    // A blob that nobody uses any more makes room as well.
    drop(held);
    eventually("it goes", || fill_blocking(&*device, new.units[2].blocks()).is_ok());
    assert!(!disk.at.join("cache/v1/blob-1").exists());
    for unit in &new.units[..48] {
        fill_blocking(&*device, unit.blocks()).unwrap();
    }
    let mut got = vec![0; 48 * UNIT];
    device.open_data().unwrap().read_exact_at(&mut got, 0).unwrap();
    assert!(got == new.plain[..48 * UNIT], "wrong bytes");
}

#[test]
fn on_a_full_disk_who_needs_no_file_is_given_bytes() {
    let disk = match Disk::new(&["mkfs.ext4", "-q", "-m", "0"], 24) {
        Ok(disk) => disk,
        Err(why) => return eprintln!("SKIPPED on_a_full_disk_who_needs_no_file_is_given_bytes: {why}"),
    };
    let bench = Bench::new();
    let new = Blob::numbered(2, 4);
    let store = bench.store_at(&disk.at.join("cache"), options());
    store.say_uses_are_known();
    let source = new.source();
    let device = store.device(new.map(), source.clone()).unwrap();
    fill_blocking(&*device, new.units[0].blocks()).unwrap();
    device.flush().unwrap();
    fill_up(&disk.at.join("ballast"));
    let requests = || source.requests.load(Ordering::SeqCst);
    let read = |range: ByteRange| {
        let request = Request::for_bytes(RequestId::NONE, Class::OnDemand);
        let (tx, rx) = channel();
        device.fill_for(request.clone(), range, Box::new(move |outcome| tx.send(outcome).unwrap()));
        rx.recv().unwrap().unwrap();
        let mut got = vec![0; usize::try_from(range.len()).unwrap()];
        device.read_given(&request, range, &mut got).unwrap();
        let want = usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
        assert!(got == new.plain[want], "wrong bytes at {range}");
    };

    // What is there, what is not, and in the middle of units.
    let range = ByteRange::new(new.units[0].decoded.start() + 8192, new.units[3].decoded.end() - 4096).unwrap();
    read(range);
    assert!(!device.present(range) && store.stats().lent_units >= 3, "{:?}", store.stats());
    // Others who need a file get an error, and who comes again costs nothing.
    fail(&device, &new.units[1], 200);
    let before = requests();
    (0..3).for_each(|_| read(range));
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| read(range)))));
    assert_eq!(requests(), before);
    let mut none = [0];
    let other = Request::for_bytes(RequestId::NONE, Class::OnDemand);
    assert!(device.read_given(&other, new.units[1].decoded, &mut [0; UNIT]).is_err(), "it was given nothing");
    assert!(device.read_given(&other, new.units[0].decoded, &mut none).is_err(), "another length");

    // Once there is room it is written like everything else.
    fs::remove_file(disk.at.join("ballast")).unwrap();
    eventually("there is room", || {
        read(range);
        fill_blocking(&*device, new.units[20].blocks()).is_ok()
    });
    read(range);
    assert!(device.present(range));
}

#[test]
fn on_a_full_disk_a_blob_is_taken_up_again_as_it_was() {
    let disk = match Disk::new(&["mkfs.ext4", "-q", "-m", "0"], 24) {
        Ok(disk) => disk,
        Err(why) => return eprintln!("SKIPPED on_a_full_disk_a_blob_is_taken_up_again_as_it_was: {why}"),
    };
    let bench = Bench::new();
    let root = disk.at.join("cache");
    let blob = Blob::numbered(1, 4);
    let store = bench.store_at(&root, options());
    store.say_uses_are_known();
    let device = open(&store, &blob);
    fill_blocking(&*device, blob.all()).unwrap();
    device.flush().unwrap();
    let data = device.data_path().unwrap().to_owned();
    fill_up(&disk.at.join("ballast"));
    let again = || {
        let source = blob.source();
        let device = store.device(blob.map(), source.clone()).unwrap();
        let was_there = device.present(blob.all());
        fill_blocking(&*device, blob.all()).unwrap();
        device.flush().unwrap();
        assert_eq!(source.requests.load(Ordering::SeqCst), 0, "something was lost");
        was_there
    };

    // How it lies cannot be noted, and nothing is known.
    drop(device);
    assert!(again() && again());
    fs::remove_file(disk.at.join("ballast")).unwrap();
    again();
    fill_up(&disk.at.join("ballast"));
    // It is noted, and changed in a way that means nothing.
    std::thread::sleep(Duration::from_millis(20));
    fs::set_permissions(&data, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(!again(), "it was not looked at");
    assert!(root.join("v1/blob-1").exists());
}

#[test]
fn what_has_its_blocks_comes_again_on_a_full_disk() {
    let disk = match Disk::new(&["mkfs.ext4", "-q", "-m", "0"], 24) {
        Ok(disk) => disk,
        Err(why) => return eprintln!("SKIPPED what_has_its_blocks_comes_again_on_a_full_disk: {why}"),
    };
    let bench = Bench::new();
    let root = disk.at.join("cache");
    let (old, new) = (Blob::numbered(1, 1), Blob::numbered(2, 1));
    let store = bench.store_at(&root, options());
    store.say_uses_are_known();
    bring(&store, &old);
    let data = File::options().write(true).open(root.join("v1/blob-1/data")).unwrap();
    data.write_all_at(&[0x55; 3], 2 * UNIT as u64).unwrap();
    data.sync_all().unwrap();
    drop(data);
    eventually("not in use", || !store.shelves().inventory().unwrap().blobs[0].in_use);
    store.shelves().verify("blob-1", &mut |_| true).unwrap();
    let (device, other) = (open(&store, &old), open(&store, &new));
    assert!(!device.present(old.units[2].blocks()));
    fill_up(&disk.at.join("ballast"));
    fail(&other, &new.units[0], 20);

    eventually("it is tried", || fill_blocking(&*device, old.units[2].blocks()).is_ok());

    assert_bytes(&device, &old);
    fail(&other, &new.units[0], 20);
}

/// Refuses what it is told to, whatever room its disk has.
#[derive(Clone, Default)]
struct Stubborn(Arc<AtomicBool>);

impl Sink for Stubborn {
    fn write_at(&self, _: &[u8], _: u64) -> std::io::Result<()> {
        if self.0.load(Ordering::SeqCst) { Err(std::io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn where_the_disk_has_room_and_writes_are_refused_requests_are_few_all_the_same() {
    let bench = Bench::new();
    let (blob, sink) = (Blob::numbered(1, 1), Stubborn::default());
    let (store, source) = (bench.store(options()), blob.source());
    let sinks = Box::new(sink.clone());
    let device = Device::with_sink(blob.map(), source.clone(), sinks, &[], Arc::clone(store.engine()));
    sink.0.store(true, Ordering::SeqCst);
    let began = Instant::now();

    fail(&device, &blob.units[0], 300);

    let (requests, seconds) = (source.requests.load(Ordering::SeqCst), began.elapsed().as_secs());
    assert!(requests as u64 <= 3 + seconds, "{requests} requests in {seconds} s");
    sink.0.store(false, Ordering::SeqCst);
    eventually("it is tried again", || fill_blocking(&*device, blob.units[0].blocks()).is_ok());
}

#[test]
fn what_is_not_fetched_because_the_disk_is_full_counts_for_no_limit() {
    let bench = Bench::new();
    let (blob, sink) = (Blob::numbered(1, 1), Stubborn::default());
    let rate = Some(4 * UNIT as u64);
    let store = bench.store(StoreOptions { image_rate: rate, prefetch_rate: rate, ..options() });
    let (engine, source) = (Arc::clone(store.engine()), blob.source());
    let device = Device::with_sink(blob.map(), source.clone(), Box::new(sink.clone()), &[], engine);
    let _use = device.used_by(ImageKey(1));
    sink.0.store(true, Ordering::SeqCst);
    // Until the disk is not believed for a second.
    fail(&device, &blob.units[0], 2);
    let (requests, began) = (source.requests.load(Ordering::SeqCst), Instant::now());

    fail(&device, &blob.units[0], 50);
    assert!(fill_blocking(&*device, blob.all()).is_err());

    // At that rate, 66 units took 16 s.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert!(source.requests.load(Ordering::SeqCst) <= requests + 3);
}

/// Refuses its first write, as a disk does whose last room is taken for a moment.
#[derive(Default)]
struct Reluctant(AtomicBool);

impl Sink for Reluctant {
    fn write_at(&self, _: &[u8], _: u64) -> std::io::Result<()> {
        let is_first = !self.0.swap(true, Ordering::SeqCst);
        if is_first { Err(std::io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_write_that_is_refused_is_tried_again_although_nothing_can_go() {
    let bench = Bench::new();
    let blob = Blob::numbered(1, 1);
    let (store, source) = (bench.store(options()), blob.source());
    let device =
        Device::with_sink(blob.map(), source.clone(), Box::<Reluctant>::default(), &[], Arc::clone(store.engine()));

    fill_blocking(&*device, blob.units[0].blocks()).unwrap();

    assert_eq!((store.stats().refused_writes, source.requests.load(Ordering::SeqCst)), (0, 1));
}

// ---- the command without a daemon -----------------------------------------------------------------

fn rafsd(bench: &Bench, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
    command.arg("cache").args(args).arg("--cache").arg(bench.root.path());
    let output = output(command.arg("--run").arg(bench.root.path().join("run"))).unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn without_a_daemon_the_commands_work_on_the_directory() {
    let bench = Bench::forking();
    let (first, second) = (Blob::numbered(1, 1), Blob::numbered(2, 1));
    let store = bench.store(options());
    bring(&store, &first);
    bring(&store, &second);
    let (code, _, error) = rafsd(&bench, &["list"]);
    let holder = format!("in use by process {}", std::process::id());
    assert!(code == Some(1) && error.contains(&holder), "{error}");
    drop(store);
    drop(bench.store(options()));

    let list: serde_json::Value = serde_json::from_str(&rafsd(&bench, &["list", "--json"]).1).unwrap();
    let names: Vec<_> = list["blobs"].as_array().unwrap().iter().map(|blob| blob["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["blob-1", "blob-2"]);
    assert_eq!((&list["blobs"][0]["complete"], &list["blobs"][0]["in_use"]), (&true.into(), &false.into()));

    assert_eq!(rafsd(&bench, &["verify"]).0, Some(0));
    spoil(&bench, &first, 0);
    let (code, told, _) = rafsd(&bench, &["verify", "blob-1"]);
    assert!(code == Some(1) && told.contains("blob-1: unit 0 at 0: digest"), "{told}");
    assert_eq!(rafsd(&bench, &["verify"]).0, Some(0), "it is absent now");
    let copy = bench.store(options()).shelves().bootstraps().keep(b"a bootstrap").unwrap().path().to_owned();
    let name = copy.file_name().unwrap().to_str().unwrap();
    assert_eq!(rafsd(&bench, &["verify", &name[..12]]).0, Some(0));
    fs::write(&copy, "another one").unwrap();
    let (code, told, _) = rafsd(&bench, &["verify"]);
    assert!(code == Some(1) && told.contains(name) && told.contains("its digest is") && !copy.exists(), "{told}");

    assert_eq!(rafsd(&bench, &["pin", "blob-2"]).0, Some(0));
    let (code, _, error) = rafsd(&bench, &["drop", "blob-2"]);
    assert!(code == Some(1) && error.contains("pin --remove"), "{error}");
    let (code, told, _) = rafsd(&bench, &["gc", "--dry-run"]);
    assert!(code == Some(0) && told.contains("blob-1") && told.contains("would be freed"), "{told}");
    assert_eq!(rafsd(&bench, &["gc", "--older-than", "1h"]).1.lines().count(), 1, "both are young");
    assert!(rafsd(&bench, &["gc"]).1.starts_with("blob       blob-1 "));
    assert_eq!(rafsd(&bench, &["pin", "--remove", "blob"]).0, Some(0), "the only one that is left");
    assert_eq!(rafsd(&bench, &["drop", "blob-2"]).0, Some(0));
    let (code, _, error) = rafsd(&bench, &["drop", "blob-2"]);
    assert!(code == Some(1) && error.contains("no blob blob-2 is in the cache"), "{error}");
    assert!(bench.root.path().join("v1").read_dir().unwrap().next().is_none());
}
