//! The cache against sources that stall, lie and vanish, and against disks that fill up.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rafsd::base::{BlobId, ByteRange, Class};
use rafsd::blob::{Check, DecodeError, Part, Recipe, Unit, UnitIndex, UnitMap};
use rafsd::cache::{
    Device, DeviceOfImage, Engine, Fill, FillError, ImageKey, ImageUse, Prefetch, PrefetchState, Sink, Store,
    StoreError, StoreOptions, Trace, Want, fill_blocking,
};
use rafsd::codec::{Compressor, blake3};
use rafsd::source::{BlobSource, BoxFuture, ReadCtx, SourceError};
use rafsd::telemetry::Cause;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

// ---- a blob -----------------------------------------------------------------------------------

/// A blob in all its forms.
struct Blob {
    id: BlobId,
    /// What a reader must see: the device from end to end.
    plain: Vec<u8>,
    stored: Vec<u8>,
    units: Vec<Unit>,
}

impl Blob {
    /// `count` zstd units of `size` plain bytes, with `gap` stored bytes between them.
    fn new(count: usize, size: usize, gap: usize) -> Self {
        let (mut plain, mut stored, mut units) = (Vec::new(), Vec::new(), Vec::new());
        let mut zstd = Compressor::zstd(1).unwrap();
        for number in 0..count {
            let bytes: Vec<u8> = (0..size).map(|at| u8::try_from((at / 7 + number * 31) % 251).unwrap()).collect();
            let packed = zstd.compress(&bytes).expect("compressible");
            units.push(Unit {
                decoded: ByteRange::at(plain.len() as u64, size as u64).unwrap(),
                stored: ByteRange::at(stored.len() as u64, packed.len() as u64).unwrap(),
                recipe: Recipe::Zstd,
                check: Check::Blake3(blake3(&bytes).0),
                part: None,
                encrypted: false,
            });
            stored.extend_from_slice(packed);
            stored.resize(stored.len() + gap, 0xee);
            plain.extend_from_slice(&bytes);
            plain.resize(plain.len().next_multiple_of(4096), 0);
        }
        Self { id: "blob".parse().unwrap(), plain, stored, units }
    }

    fn map(&self) -> UnitMap {
        UnitMap::new(self.id.clone(), self.plain.len() as u64, self.units.clone()).unwrap()
    }

    /// The map of an image that knows how to check only some units.
    fn map_knowing(&self, known: Range<usize>) -> UnitMap {
        let mut units = self.units.clone();
        for (index, unit) in units.iter_mut().enumerate() {
            if !known.contains(&index) {
                unit.check = Check::Unknown;
            }
        }
        UnitMap::new(self.id.clone(), self.plain.len() as u64, units).unwrap()
    }

    /// The decoded blocks of some units.
    fn range(&self, units: Range<usize>) -> ByteRange {
        self.units[units.start].blocks().hull(self.units[units.end - 1].blocks())
    }

    fn one(&self, unit: usize) -> ByteRange {
        self.range(unit..unit + 1)
    }

    fn stored_hull(&self, units: Range<usize>) -> ByteRange {
        self.units[units.start].stored.hull(self.units[units.end - 1].stored)
    }
}

// ---- a source that follows a script -------------------------------------------------------------

type Answer = dyn Fn(ByteRange, Class) -> Act + Send + Sync;

/// What the source does with one request.
enum Act {
    Serve,
    /// Serve with one bit of the blob flipped.
    Flip(u64),
    /// Serve when the gate gives a permit.
    Gate(Arc<Semaphore>),
    /// Never answer.
    Hang,
    Fail,
    /// Say that there is no such blob.
    Deny,
}

struct Scripted {
    name: &'static str,
    stored: Vec<u8>,
    log: Mutex<Vec<ByteRange>>,
    answer: Box<Answer>,
}

impl Scripted {
    fn new(blob: &Blob, answer: impl Fn(ByteRange, Class) -> Act + Send + Sync + 'static) -> Arc<Self> {
        Self::named("a script", blob, answer)
    }

    fn named(
        name: &'static str,
        blob: &Blob,
        answer: impl Fn(ByteRange, Class) -> Act + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { name, stored: blob.stored.clone(), log: Mutex::default(), answer: Box::new(answer) })
    }

    fn honest(blob: &Blob) -> Arc<Self> {
        Self::new(blob, |_, _| Act::Serve)
    }

    fn log(&self) -> Vec<ByteRange> {
        self.log.lock().unwrap().clone()
    }
}

impl BlobSource for Scripted {
    fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(async { Ok(self.stored.len() as u64) })
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        self.log.lock().unwrap().push(stored);
        let act = (self.answer)(stored, ctx.class);
        Box::pin(async move {
            let (place, len) = (self.describe(), self.stored.len() as u64);
            if stored.end() > len {
                return Err(SourceError::OutOfRange { blob: blob.clone(), place, range: stored, len });
            }
            let cut = usize::try_from(stored.start()).unwrap()..usize::try_from(stored.end()).unwrap();
            let mut bytes = self.stored[cut].to_vec();
            match act {
                Act::Serve => {}
                Act::Flip(bit) if (stored.start()..stored.end()).contains(&(bit / 8)) => {
                    bytes[usize::try_from(bit / 8 - stored.start()).unwrap()] ^= 1 << (bit % 8);
                }
                Act::Flip(_) => {}
                Act::Gate(gate) => gate.acquire().await.unwrap().forget(),
                Act::Hang => std::future::pending().await,
                Act::Deny => return Err(SourceError::NotFound { blob: blob.clone(), place }),
                Act::Fail => {
                    return Err(SourceError::Unavailable { blob: blob.clone(), place, detail: "scripted".to_owned() });
                }
            }
            Ok(bytes.into())
        })
    }

    fn describe(&self) -> String {
        self.name.to_owned()
    }
}

/// Answers with zeros, and remembers how long it would have had for each answer.
#[derive(Default)]
struct Zeros(Mutex<Vec<Instant>>);

impl BlobSource for Zeros {
    fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(async { Ok(u64::MAX) })
    }

    fn read<'a>(&'a self, _: &'a BlobId, stored: ByteRange, ctx: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        self.0.lock().unwrap().push(ctx.deadline);
        Box::pin(async move { Ok(vec![0; usize::try_from(stored.len()).unwrap()].into()) })
    }

    fn describe(&self) -> String {
        "zeros".to_owned()
    }
}

// ---- a sink in memory ---------------------------------------------------------------------------

/// Takes only writes that a cachefiles object would take.
#[derive(Clone, Default)]
struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    full: Arc<AtomicBool>,
    sync_fails: Arc<AtomicBool>,
}

impl Sink for Memory {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let fits = bytes.as_ptr().addr().is_multiple_of(4096) && bytes.len().is_multiple_of(4096);
        if !fits || !at.is_multiple_of(4096) || bytes.len() > 1 << 20 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.full.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let at = usize::try_from(at).unwrap();
        let mut file = self.bytes.lock().unwrap();
        let len = file.len().max(at + bytes.len());
        file.resize(len, 0);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.sync_fails.load(Ordering::SeqCst) { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
}

// ---- a bench ------------------------------------------------------------------------------------

/// No read-ahead, and no flush that the test did not ask for.
fn quiet() -> StoreOptions {
    StoreOptions { readahead_first: 0, flush_every: Duration::from_secs(3600), ..StoreOptions::default() }
}

/// The same, and units with anything between them are fetched one by one.
fn apart() -> StoreOptions {
    StoreOptions { gap: 0, ..quiet() }
}

struct Bench {
    runtime: Runtime,
    root: TempDir,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        Self { runtime, root: tempfile::tempdir().unwrap() }
    }

    fn store(&self, options: StoreOptions) -> Arc<Store> {
        Store::open(self.root.path(), options, self.runtime.handle().clone()).unwrap()
    }

    fn engine(&self, options: StoreOptions) -> Arc<Engine> {
        Engine::new(options, self.runtime.handle().clone()).unwrap()
    }

    fn in_memory(&self, blob: &Blob, source: &Arc<Scripted>, options: StoreOptions) -> (Arc<Device>, Memory) {
        self.in_memory_knowing(blob, 0..blob.units.len(), source, options)
    }

    fn in_memory_knowing(
        &self,
        blob: &Blob,
        known: Range<usize>,
        source: &Arc<Scripted>,
        options: StoreOptions,
    ) -> (Arc<Device>, Memory) {
        let memory = Memory::default();
        let (source, sink) = (Arc::clone(source), Box::new(memory.clone()));
        (Device::with_sink(blob.map_knowing(known), source, sink, &[], self.engine(options)), memory)
    }
}

type Outcomes = Receiver<Result<(), FillError>>;

/// Starts one fill per range.
fn start(device: &Device, ranges: impl IntoIterator<Item = ByteRange>, class: Class) -> Outcomes {
    let (tx, rx) = channel();
    for range in ranges {
        let tx = tx.clone();
        device.fill(range, class, Box::new(move |outcome| drop(tx.send(outcome))));
    }
    rx
}

fn next(outcomes: &Outcomes) -> Result<(), FillError> {
    outcomes.recv_timeout(Duration::from_secs(20)).expect("a completion must come")
}

fn is_deadline(outcome: &Result<(), FillError>) -> bool {
    matches!(outcome, Err(FillError::Source { cause, .. }) if matches!(**cause, SourceError::Deadline { .. }))
}

/// Waits for something another thread is about to do.
fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn present(device: &Device, blob: &Blob) -> Vec<usize> {
    (0..blob.units.len()).filter(|&unit| device.present(blob.one(unit))).collect()
}

#[track_caller]
fn assert_bytes(device: &Device, blob: &Blob, units: Range<usize>) {
    let range = blob.range(units);
    let want = usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
    let mut got = vec![0; want.len()];
    device.open_data().unwrap().read_exact_at(&mut got, range.start()).unwrap();
    assert!(got == blob.plain[want], "bytes differ in {range:?}");
}

// ---- one fetch, few requests ----------------------------------------------------------------------

#[test]
fn many_readers_of_one_cold_unit_cost_one_request() {
    let (bench, blob) = (Bench::new(), Blob::new(1, 100_000, 0));
    let gate = Arc::new(Semaphore::new(0));
    let source = Scripted::new(&blob, {
        let gate = gate.clone();
        move |_, _| Act::Gate(gate.clone())
    });
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    let threads: Vec<_> = (0..32)
        .map(|reader| {
            let (device, at) = (device.clone(), reader * 3000);
            std::thread::spawn(move || fill_blocking(&*device, ByteRange::at(at, 3000).unwrap()))
        })
        .collect();
    eventually("all readers wait", || device.stats().misses == 32);
    gate.add_permits(32);

    threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
    assert_eq!(source.log(), [blob.units[0].stored]);
    assert_bytes(&device, &blob, 0..1);
}

#[test]
fn neighbouring_units_come_in_one_request() {
    let (bench, blob) = (Bench::new(), Blob::new(6, 50_000, 100));
    let source = Scripted::honest(&blob);
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    fill_blocking(&*device, blob.one(2)).unwrap();
    fill_blocking(&*device, blob.range(0..5)).unwrap();

    // The small present unit in between is rather read again than paid for with a round trip.
    assert_eq!(source.log(), [blob.units[2].stored, blob.stored_hull(0..5)]);
    assert_eq!(present(&device, &blob), [0, 1, 2, 3, 4]);
    assert_bytes(&device, &blob, 0..5);
    let stats = device.stats();
    assert_eq!((stats.requests, stats.units_filled, stats.units_present, stats.errors), (2, 5, 5, 0));
}

#[test]
fn what_is_present_is_not_fetched_again() {
    let (bench, blob) = (Bench::new(), Blob::new(2, 50_000, 0));
    let source = Scripted::honest(&blob);
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    for _ in 0..3 {
        fill_blocking(&*device, blob.range(0..2)).unwrap();
    }

    assert_eq!(source.log().len(), 1);
    assert_eq!((device.stats().hits, device.stats().misses), (2, 1));
}

// ---- wrong bytes ------------------------------------------------------------------------------------

#[test]
fn a_corrupt_unit_fails_only_its_own_readers() {
    let (bench, blob) = (Bench::new(), Blob::new(4, 50_000, 0));
    let bit = blob.units[1].stored.start() * 8 + 100;
    let source = Scripted::new(&blob, move |_, _| Act::Flip(bit));
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    let error = fill_blocking(&*device, blob.range(0..4)).unwrap_err();

    assert!(matches!(error, FillError::Corrupt { unit: 1, .. }), "{error:?}");
    assert_eq!(error.errno(), libc::EIO);
    assert_eq!(present(&device, &blob), [0, 2, 3]);
    assert_eq!(source.log(), [blob.stored_hull(0..4), blob.units[1].stored], "asked once more, alone");
    fill_blocking(&*device, blob.range(2..4)).unwrap();
}

#[test]
fn damage_on_the_way_is_repaired_by_asking_again() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 50_000, 0));
    let (bit, first) = (blob.units[1].stored.start() * 8, AtomicBool::new(true));
    let source =
        Scripted::new(&blob, move |_, _| if first.swap(false, Ordering::SeqCst) { Act::Flip(bit) } else { Act::Serve });
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    fill_blocking(&*device, blob.range(0..3)).unwrap();

    assert_eq!(source.log(), [blob.stored_hull(0..3), blob.units[1].stored]);
    assert_bytes(&device, &blob, 0..3);
}

#[test]
fn a_unit_behind_the_end_of_the_blob_fails_only_its_own_readers() {
    let (bench, blob) = (Bench::new(), Blob::new(4, 50_000, 0));
    let mut misplaced = Blob::new(4, 50_000, 0);
    let last = misplaced.units[3].stored;
    misplaced.units[3].stored = ByteRange::at(last.start() + 10, last.len()).unwrap();
    let source = Scripted::honest(&blob);
    let (device, _) = bench.in_memory(&misplaced, &source, quiet());

    let error = fill_blocking(&*device, blob.range(0..4)).unwrap_err();

    let FillError::Source { unit: 3, cause, .. } = &error else { panic!("{error:?}") };
    assert!(matches!(**cause, SourceError::OutOfRange { .. }), "{cause:?}");
    assert_eq!(present(&device, &blob), [0, 1, 2]);
    assert_eq!(source.log().len(), 5, "all together, then each alone");
}

#[test]
fn no_flipped_bit_ever_reaches_the_device() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 20_000, 0));
    let engine = bench.engine(quiet());
    let bits = blob.stored.len() as u64 * 8;
    let mut refused = 0;
    for sample in 0..300 {
        let bit = (sample * 2_654_435_761) % bits;
        let (source, memory) = (Scripted::new(&blob, move |_, _| Act::Flip(bit)), Memory::default());
        let device = Device::with_sink(blob.map(), source, Box::new(memory.clone()), &[], engine.clone());
        let outcomes = start(&device, (0..3).map(|unit| blob.one(unit)), Class::OnDemand);

        refused += (0..3).filter(|_| next(&outcomes).is_err()).count();

        let file = memory.bytes.lock().unwrap();
        for unit in present(&device, &blob) {
            let range = blob.one(unit);
            let cut = usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
            assert!(file[cut.clone()] == blob.plain[cut], "bit {bit} got through");
        }
    }
    assert!(refused > 250, "a flipped bit is nearly always an error, but only {refused} were");
}

#[test]
fn units_nobody_vouches_for_and_gaps_are_errors_without_a_request() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 50_000, 0));
    let source = Scripted::honest(&blob);
    let device = bench.store(quiet()).device(blob.map_knowing(0..1), source.clone()).unwrap();

    let unknown = fill_blocking(&*device, blob.one(1));
    let outside = fill_blocking(&*device, ByteRange::at(device.decoded_len(), 1).unwrap());

    assert!(matches!(unknown, Err(FillError::Corrupt { unit: 1, cause: DecodeError::Unverifiable, .. })));
    assert!(matches!(outside, Err(FillError::Unmapped { .. })));
    assert_eq!(source.log(), []);
}

// ---- sources that do not answer ------------------------------------------------------------------------

#[test]
fn a_stalled_source_is_an_error_at_the_deadline() {
    let (bench, blob) = (Bench::new(), Blob::new(20, 5000, 1));
    let source = Scripted::new(&blob, |_, _| Act::Hang);
    let options = StoreOptions { deadline: Duration::from_millis(50), fetches: 2, ..apart() };
    let (device, _) = bench.in_memory(&blob, &source, options);

    // More than can run at once: waiting in the queue counts as well.
    let outcomes = start(&device, (0..20).map(|unit| blob.one(unit)), Class::OnDemand);

    for _ in 0..20 {
        let outcome = next(&outcomes);
        assert!(is_deadline(&outcome), "{outcome:?}");
    }
    assert!(source.log().len() < 20, "those that expired in the queue were never asked for");
}

#[test]
fn who_comes_back_at_once_for_what_was_late_does_not_wait_again() {
    let (bench, blob) = (Bench::new(), Blob::new(2, 5000, 1));
    let source = Scripted::new(&blob, |_, _| Act::Hang);
    let options = StoreOptions { deadline: Duration::from_secs(1), ..apart() };
    let (device, _) = bench.in_memory(&blob, &source, options);
    let read = || {
        let asked = Instant::now();
        let outcome = fill_blocking(&*device, blob.one(0));
        assert!(is_deadline(&outcome), "{outcome:?}");
        (asked.elapsed() < Duration::from_millis(500), source.log().len())
    };

    assert_eq!(read(), (false, 1));
    assert_eq!(read(), (true, 1), "as a kernel does");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(read(), (false, 2), "it is not remembered for long");
}

#[test]
fn a_dead_source_does_not_hold_up_another_device() {
    let (bench, blob) = (Bench::new(), Blob::new(40, 64, 1));
    let engine = bench.engine(StoreOptions { fetches: 4, ..apart() });
    let device = |source: &Arc<Scripted>| {
        Device::with_sink(blob.map(), source.clone(), Box::new(Memory::default()), &[], engine.clone())
    };
    let (dead, healthy) = (Scripted::new(&blob, |_, _| Act::Hang), Scripted::honest(&blob));
    let (stuck, working) = (device(&dead), device(&healthy));
    let stuck_readers = start(&stuck, (0..20).map(|unit| blob.one(unit)), Class::OnDemand);
    eventually("the dead source holds all it may", || dead.log().len() == 2);

    let readers = start(&working, (0..40).map(|unit| blob.one(unit)), Class::OnDemand);
    (0..40).for_each(|_| next(&readers).unwrap());
    let idle = device(&healthy);
    next(&start(&idle, [blob.one(0)], Class::Prefetch)).unwrap();

    assert_eq!(dead.log().len(), 2, "the others wait for the first two");
    assert!(stuck_readers.try_recv().is_err());
}

#[test]
fn an_image_has_no_more_reads_under_way_than_it_may_and_holds_up_no_other() {
    let (bench, blob) = (Bench::new(), Blob::new(40, 64, 1));
    let engine = bench.engine(StoreOptions { image_fetches: 3, ..apart() });
    let device = |source: &Arc<Scripted>, image| used(&blob, source, &engine, image);
    let (busy, other) = (Scripted::new(&blob, |_, _| Act::Hang), Scripted::honest(&blob));
    let ((lower, _of_lower), (upper, _of_upper)) = (device(&busy, 1), device(&busy, 1));
    let (single, _of_single) = device(&other, 2);
    let below = start(&lower, (0..20).map(|unit| blob.one(unit)), Class::OnDemand);
    let above = start(&upper, (0..20).map(|unit| blob.one(unit)), Class::OnDemand);
    eventually("the image has all it may", || busy.log().len() == 3);

    let readers = start(&single, (0..40).map(|unit| blob.one(unit)), Class::OnDemand);
    (0..40).for_each(|_| next(&readers).unwrap());

    assert_eq!(busy.log().len(), 3, "both of its blobs together");
    assert!(below.try_recv().is_err() && above.try_recv().is_err());
}

/// A device that an image uses.
fn used(blob: &Blob, source: &Arc<Scripted>, engine: &Arc<Engine>, image: u64) -> (Arc<Device>, ImageUse) {
    let device = Device::with_sink(blob.map(), source.clone(), Box::new(Memory::default()), &[], engine.clone());
    let of_image = device.used_by(ImageKey(image));
    (device, of_image)
}

/// Starts one fill per range, through a mount of `image`.
fn start_of(device: &Arc<Device>, image: u64, units: Range<usize>, blob: &Blob) -> Outcomes {
    let (tx, rx) = channel();
    let of_image = DeviceOfImage::new(Arc::clone(device), ImageKey(image));
    for unit in units {
        let tx = tx.clone();
        of_image.fill(blob.one(unit), Class::OnDemand, Box::new(move |outcome| drop(tx.send(outcome))));
    }
    rx
}

#[test]
fn a_read_of_a_shared_blob_counts_for_the_image_it_came_through() {
    let (bench, blob) = (Bench::new(), Blob::new(40, 64, 1));
    let engine = bench.engine(StoreOptions { image_fetches: 3, ..apart() });
    let source = Scripted::new(&blob, |_, _| Act::Hang);
    let (device, _first) = used(&blob, &source, &engine, 1);
    let _second = device.used_by(ImageKey(2));

    let _greedy = start_of(&device, 1, 0..20, &blob);
    eventually("the first image has all it may", || source.log().len() == 3);
    let _modest = start_of(&device, 2, 20..22, &blob);
    eventually("the second one does not wait for it", || source.log().len() == 5);

    // One of those that the first image waits for is wanted by the second as well, which has one left.
    let _joining = start_of(&device, 2, 19..20, &blob);
    eventually("who joins brings what is its own", || source.log().contains(&blob.stored_hull(19..20)));
    let _more = start_of(&device, 2, 30..35, &blob);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(source.log().len(), 6, "{:?}", source.log());
}

#[test]
fn where_nobody_knows_whose_reader_it_is_any_image_pays_that_is_there() {
    let (bench, blob) = (Bench::new(), Blob::new(40, 64, 1));
    let engine = bench.engine(StoreOptions { image_fetches: 3, fetches: 64, ..apart() });
    let source = Scripted::new(&blob, |_, _| Act::Hang);
    let (device, first) = used(&blob, &source, &engine, 1);
    let _waiting = start(&device, (0..40).map(|unit| blob.one(unit)), Class::OnDemand);
    eventually("one image", || source.log().len() == 3);

    let second = device.used_by(ImageKey(2));
    eventually("a mount while it is open brings its own", || source.log().len() == 6);
    let again = device.used_by(ImageKey(2));
    drop(first);
    drop(second);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(source.log().len(), 6, "a second mount of one image brings nothing");
    drop(again);

    eventually("whoever is left when all images have gone is held up by none", || source.log().len() == 32);
}

#[test]
fn readers_of_an_image_get_its_rate_and_those_of_another_do_not_wait() {
    let (bench, blob) = (Bench::new(), Blob::new(8, 5000, 0));
    let stored = blob.stored.len() as u64;
    let engine = bench.engine(StoreOptions { image_rate: Some(stored), ..apart() });
    let source = Scripted::honest(&blob);
    let ((slow, _slow), (other, _other)) = (used(&blob, &source, &engine, 1), used(&blob, &source, &engine, 2));
    let clock = Instant::now();
    let readers = start(&slow, (0..8).map(|unit| blob.one(unit)), Class::OnDemand);

    next(&start(&other, [blob.one(0)], Class::OnDemand)).unwrap();
    (0..8).for_each(|_| next(&readers).unwrap());

    // A second's worth, of which a quarter comes at once, and the last read is not waited for.
    assert!(clock.elapsed() > Duration::from_millis(550), "{:?}", clock.elapsed());
}

#[test]
fn a_reader_whose_turn_does_not_come_by_its_images_limit_is_told_which() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 5000, 0));
    let deadline = Duration::from_millis(80);
    let options = StoreOptions { image_rate: Some(1000), deadline, ..apart() };
    let engine = bench.engine(options);
    let source = Scripted::honest(&blob);
    let (device, _use) = used(&blob, &source, &engine, 1);

    let outcomes = start(&device, (0..3).map(|unit| blob.one(unit)), Class::OnDemand);

    next(&outcomes).unwrap();
    for _ in 0..2 {
        let error = next(&outcomes).unwrap_err();
        assert!(matches!(error, FillError::Limited { limit: "image_rate", .. }), "{error:?}");
        assert!(error.to_string().ends_with("waited too long for its turn by image_rate of its image"), "{error}");
        assert_eq!(error.errno(), libc::EIO);
    }
    assert_eq!(device.health().failed.iter().find(|(cause, _)| *cause == Cause::Limit), Some(&(Cause::Limit, 2)));
    assert_eq!(source.log().len(), 1, "nobody was asked for what was not to come");
}

#[test]
fn a_second_attempt_at_a_corrupt_unit_gets_no_time_of_its_own() {
    let (bench, blob) = (Bench::new(), Blob::new(1, 5000, 0));
    let source = Arc::<Zeros>::default();
    let device = Device::with_sink(blob.map(), source.clone(), Box::new(Memory::default()), &[], bench.engine(quiet()));

    let error = fill_blocking(&*device, blob.one(0)).unwrap_err();

    assert!(matches!(error, FillError::Corrupt { unit: 0, .. }), "{error:?}");
    let deadlines = source.0.lock().unwrap();
    assert_eq!((deadlines.len(), deadlines[0]), (2, deadlines[1]));
}

#[test]
fn a_reader_that_joins_a_stalled_prefetch_waits_no_longer_than_a_reader_may() {
    let (bench, blob) = (Bench::new(), Blob::new(1, 5000, 0));
    let source = Scripted::new(&blob, |_, _| Act::Hang);
    let options = StoreOptions { deadline: Duration::from_millis(50), ..quiet() };
    let (device, _) = bench.in_memory(&blob, &source, options);
    let prefetch = start(&device, [blob.one(0)], Class::Prefetch);
    eventually("the prefetch runs", || source.log().len() == 1);

    let reader = start(&device, [blob.one(0)], Class::OnDemand);

    for outcome in [next(&reader), next(&prefetch)] {
        assert!(is_deadline(&outcome), "{outcome:?}");
    }
}

#[test]
fn ten_thousand_fills_return_at_once_and_are_all_cancelled_in_the_end() {
    let (bench, blob) = (Bench::new(), Blob::new(10_000, 64, 1));
    let source = Scripted::new(&blob, |_, _| Act::Hang);
    let (device, _) = bench.in_memory(&blob, &source, apart());

    let outcomes = start(&device, (0..10_000).map(|unit| blob.one(unit)), Class::OnDemand);
    assert!(outcomes.try_recv().is_err(), "nothing can have been answered");
    drop(device);

    for _ in 0..10_000 {
        assert!(matches!(next(&outcomes), Err(FillError::Cancelled)));
    }
    assert!(outcomes.recv_timeout(Duration::from_secs(20)).is_err(), "each is told once");
    assert!(source.log().len() <= 8, "only as many as may run at once were ever asked for");
}

#[test]
fn a_huge_range_is_filled_a_step_after_the_other() {
    // 80 MiB of one block each.
    let (bench, blob) = (Bench::new(), Blob::new(20_480, 64, 0));
    let open = Arc::new(AtomicBool::new(false));
    let source = Scripted::new(&blob, {
        let open = open.clone();
        move |_, _| if open.load(Ordering::SeqCst) { Act::Serve } else { Act::Hang }
    });
    let (device, memory) = bench.in_memory(&blob, &source, StoreOptions { window: 10_000, ..quiet() });
    let outcomes = start(&device, [blob.range(0..20_480)], Class::OnDemand);
    eventually("something is asked for", || !source.log().is_empty());
    assert!(outcomes.try_recv().is_err());
    drop(device);
    assert!(matches!(next(&outcomes), Err(FillError::Cancelled)), "what was not begun is cancelled as well");
    assert!(outcomes.recv_timeout(Duration::from_secs(20)).is_err(), "told once");
    assert_eq!(memory.bytes.lock().unwrap().len(), 0);

    open.store(true, Ordering::SeqCst);
    let (device, memory) = bench.in_memory(&blob, &source, quiet());
    let outcomes = start(&device, [blob.range(0..20_480)], Class::Prefetch);
    assert!(next(&outcomes).is_ok());
    assert!(device.present(blob.range(0..20_480)) && *memory.bytes.lock().unwrap() == blob.plain);
    assert_eq!(device.stats().requests, 2, "a step does not begin before the one before has ended");
}

#[test]
fn a_lost_runtime_cancels_instead_of_leaving_readers_blocked() {
    let (bench, blob) = (Bench::new(), Blob::new(2000, 64, 1));
    let (device, _) = bench.in_memory(&blob, &Scripted::honest(&blob), apart());
    drop(bench.runtime);

    let outcomes = start(&device, (0..2000).map(|unit| blob.one(unit)), Class::OnDemand);

    for _ in 0..2000 {
        assert!(matches!(next(&outcomes), Err(FillError::Cancelled)));
    }
}

#[test]
fn a_failed_fetch_is_told_to_everybody_and_not_remembered() {
    let (bench, blob) = (Bench::new(), Blob::new(2, 5000, 0));
    let down = Arc::new(AtomicBool::new(true));
    let source = Scripted::new(&blob, {
        let down = down.clone();
        move |_, _| {
            if down.load(Ordering::SeqCst) { Act::Fail } else { Act::Serve }
        }
    });
    let (device, _) = bench.in_memory(&blob, &source, quiet());

    for _ in 0..2 {
        let error = fill_blocking(&*device, blob.range(0..2)).unwrap_err();
        let FillError::Source { unit: 0, cause, .. } = &error else { panic!("{error:?}") };
        assert!(matches!(**cause, SourceError::Unavailable { .. }), "{cause:?}");
    }
    down.store(false, Ordering::SeqCst);
    fill_blocking(&*device, blob.range(0..2)).unwrap();

    assert_eq!(device.stats().errors, 4);
}

// ---- several sources --------------------------------------------------------------------------------

/// A store's device whose sources answer as told, oldest first.
fn device_of(bench: &Bench, blob: &Blob, sources: &[&Arc<Scripted>], options: StoreOptions) -> Arc<Device> {
    let store = bench.store(options);
    let devices: Vec<_> = sources.iter().map(|&source| store.device(blob.map(), source.clone()).unwrap()).collect();
    devices.into_iter().next_back().unwrap()
}

#[test]
fn a_source_without_the_blob_does_not_spoil_the_one_that_has_it() {
    for newest_is_good in [false, true] {
        let (bench, blob) = (Bench::new(), Blob::new(3, 5000, 1));
        let good = Scripted::named("good", &blob, |_, _| Act::Serve);
        let empty = Scripted::named("empty", &blob, |_, _| Act::Deny);
        let order = if newest_is_good { [&empty, &good] } else { [&good, &empty] };
        let device = device_of(&bench, &blob, &order, apart());

        (0..3).for_each(|unit| fill_blocking(&*device, blob.one(unit)).unwrap());

        assert_eq!(good.log().len(), 3);
        assert_eq!(empty.log().len(), usize::from(!newest_is_good), "asked once and then put last");
        assert_eq!(device.stats().errors, 0);
    }
}

#[test]
fn a_source_that_stalls_leaves_time_for_the_next() {
    let (bench, blob) = (Bench::new(), Blob::new(2, 5000, 1));
    let good = Scripted::named("good", &blob, |_, _| Act::Serve);
    let down = Scripted::named("down", &blob, |_, _| Act::Fail);
    let stalled = Scripted::named("stalled", &blob, |_, _| Act::Hang);
    let options = StoreOptions { deadline: Duration::from_secs(2), ..apart() };
    let device = device_of(&bench, &blob, &[&good, &down, &stalled], options);

    fill_blocking(&*device, blob.one(0)).unwrap();

    assert_eq!([good.log().len(), down.log().len(), stalled.log().len()], [1, 1, 1]);
}

#[test]
fn when_all_sources_fail_the_failure_that_may_pass_is_told() {
    let (bench, blob) = (Bench::new(), Blob::new(1, 5000, 0));
    let down = Scripted::named("down", &blob, |_, _| Act::Fail);
    let empty = Scripted::named("empty", &blob, |_, _| Act::Deny);
    let device = device_of(&bench, &blob, &[&down, &empty], quiet());

    let error = fill_blocking(&*device, blob.one(0)).unwrap_err();

    let FillError::Source { unit: 0, cause, .. } = &error else { panic!("{error:?}") };
    assert!(matches!(&**cause, SourceError::Unavailable { place, .. } if place == "down"), "{cause:?}");
}

#[test]
fn damaged_bytes_are_asked_for_again_elsewhere() {
    let (bench, blob) = (Bench::new(), Blob::new(1, 5000, 0));
    let good = Scripted::named("good", &blob, |_, _| Act::Serve);
    let bad = Scripted::named("bad", &blob, |_, _| Act::Flip(100));
    let device = device_of(&bench, &blob, &[&good, &bad], quiet());

    fill_blocking(&*device, blob.one(0)).unwrap();

    assert_eq!([good.log().len(), bad.log().len()], [1, 1]);
    assert_bytes(&device, &blob, 0..1);
}

// ---- prefetch ---------------------------------------------------------------------------------------

#[test]
fn thousands_of_prefetches_do_not_delay_a_reader() {
    let (bench, blob) = (Bench::new(), Blob::new(3001, 64, 1));
    let source = Scripted::new(&blob, |_, class| if class == Class::Prefetch { Act::Hang } else { Act::Serve });
    let (device, _) = bench.in_memory(&blob, &source, apart());
    let prefetches = start(&device, (0..3000).map(|unit| blob.one(unit)), Class::Prefetch);
    let slots = StoreOptions::default().prefetch_fetches;
    eventually("the prefetch slots are taken", || source.log().len() == slots);

    fill_blocking(&*device, blob.one(3000)).unwrap();
    fill_blocking(&*device, blob.one(2999)).unwrap();

    assert_eq!(present(&device, &blob), [2999, 3000], "one was new, one waited behind all others");
    assert!(next(&prefetches).is_ok(), "the prefetch of the unit a reader wanted is done as well");
}

#[test]
fn prefetch_leaves_memory_to_readers() {
    let (bench, blob) = (Bench::new(), Blob::new(4, 50_000, 1));
    let one = blob.units[0].stored.len();
    let source = Scripted::new(&blob, |_, class| if class == Class::Prefetch { Act::Hang } else { Act::Serve });
    let options = StoreOptions { memory: one * 2 + 100, memory_reserve: one + 50, ..apart() };
    let (device, _) = bench.in_memory(&blob, &source, options);
    let _prefetches = start(&device, (0..3).map(|unit| blob.one(unit)), Class::Prefetch);
    eventually("one prefetch has the memory", || source.log().len() == 1);

    fill_blocking(&*device, blob.one(3)).unwrap();

    assert_eq!(source.log(), [blob.units[0].stored, blob.units[3].stored]);
}

/// Reads in the given order and returns which units the source was asked for.
fn units_fetched_by(reads: impl IntoIterator<Item = usize>, expect_beyond: bool) -> BTreeSet<usize> {
    let (bench, blob) = (Bench::new(), Blob::new(64, 65_536, 0));
    let source = Scripted::honest(&blob);
    let options = StoreOptions { readahead_first: 65_536, readahead_most: 8 * 65_536, gap: 0, ..quiet() };
    let (device, _) = bench.in_memory(&blob, &source, options);
    let reads: Vec<usize> = reads.into_iter().collect();
    for &unit in &reads {
        if device.present(blob.one(unit)) {
            device.touched(blob.one(unit));
        } else {
            fill_blocking(&*device, blob.one(unit)).unwrap();
        }
    }
    let fetched = || {
        let log = source.log();
        (0..64).filter(|&unit| log.iter().any(|range| range.contains(blob.units[unit].stored))).collect::<BTreeSet<_>>()
    };
    if expect_beyond {
        eventually("something is fetched ahead", || fetched().len() > reads.len());
    }
    // Ends all work that is queued, so that nothing can still be on its way to the source.
    drop(device);
    fetched()
}

#[test]
fn sequential_readers_are_read_ahead_of() {
    let fetched = units_fetched_by(0..12, true);
    assert!(fetched.is_superset(&(0..12).collect()), "{fetched:?}");
}

#[test]
fn random_readers_are_not() {
    let reads = || (0..24).map(|i| i * 23 % 64 / 2 * 2).collect::<BTreeSet<_>>();
    let order: Vec<usize> = (0..24).map(|i| i * 23 % 64 / 2 * 2).collect();
    assert_eq!(units_fetched_by(order, false), reads());
}

#[test]
fn nobody_is_read_ahead_of_where_it_would_hide_reads_from_a_trace() {
    let (bench, blob) = (Bench::new(), Blob::new(24, 65_536, 0));
    let source = Scripted::honest(&blob);
    let options = StoreOptions { readahead_first: 65_536, readahead_most: 8 * 65_536, gap: 0, ..quiet() };
    let (device, _) = bench.in_memory(&blob, &source, options);
    let trace = Arc::new(Trace::new(1));
    device.start_trace(&trace, 0);

    (0..12).for_each(|unit| fill_blocking(&*device, blob.one(unit)).unwrap());
    drop(device);

    assert_eq!(source.log(), (0..12).map(|unit| blob.units[unit].stored).collect::<Vec<_>>());
    assert_eq!(trace.recorded().reads, [Want { device: 0, decoded: blob.range(0..12) }]);
}

#[test]
fn a_walking_reader_soon_finds_everything_there() {
    let (bench, blob) = (Bench::new(), Blob::new(200, 65_536, 0));
    let source = Scripted::honest(&blob);
    let options = StoreOptions { readahead_first: 65_536, readahead_most: 16 * 65_536, ..quiet() };
    let (device, _) = bench.in_memory(&blob, &source, options);

    for unit in 0..200 {
        fill_blocking(&*device, blob.one(unit)).unwrap();
    }

    assert!(source.log().len() < 40, "{} requests for 200 units", source.log().len());
}

#[test]
fn a_blob_completes_in_the_background_and_says_so_once_it_is_durable() {
    let (bench, blob) = (Bench::new(), Blob::new(300, 5000, 0));
    let source = Scripted::honest(&blob);
    let store = bench.store(StoreOptions { prefetch_window: 10_000, ..quiet() });
    let device = store.device(blob.map_knowing(10..300), source.clone()).unwrap();
    let (tx, rx) = channel();
    device.on_complete(Box::new(move || tx.send(()).unwrap()));
    assert!(!device.is_complete_durable());

    device.complete_in_background();

    rx.recv_timeout(Duration::from_secs(20)).expect("completion must be told");
    assert!(device.is_complete_durable() && device.stats().complete);
    assert_eq!(present(&device, &blob), (10..300).collect::<Vec<_>>(), "units nobody vouches for are not needed");
    assert!(rx.recv_timeout(Duration::from_secs(20)).is_err(), "told once");
    assert_bytes(&device, &blob, 10..300);

    let told = Arc::new(AtomicUsize::new(0));
    device.on_complete(Box::new({
        let told = told.clone();
        move || {
            told.fetch_add(1, Ordering::SeqCst);
        }
    }));
    assert_eq!(told.load(Ordering::SeqCst), 1, "a late listener is told at once");
}

#[test]
fn a_blob_nobody_vouches_for_is_never_complete() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 5000, 0));
    let (device, _) = bench.in_memory_knowing(&blob, 0..0, &Scripted::honest(&blob), quiet());
    let (tx, rx) = channel();
    device.on_complete(Box::new(move || tx.send(()).unwrap()));

    device.complete_in_background();
    device.flush().unwrap();

    assert!(!device.is_complete_durable() && rx.try_recv().is_err());
    assert!(device.learn(blob.map(), Scripted::honest(&blob)));
    fill_blocking(&*device, blob.range(0..3)).unwrap();
    device.flush().unwrap();
    assert!(device.is_complete_durable() && rx.try_recv().is_ok());
}

#[test]
fn one_bad_unit_does_not_end_the_background_completion() {
    let (bench, blob) = (Bench::new(), Blob::new(50, 5000, 0));
    let bit = blob.units[7].stored.start() * 8;
    let source = Scripted::new(&blob, move |_, _| Act::Flip(bit));
    let (device, _) = bench.in_memory(&blob, &source, StoreOptions { prefetch_window: 1000, ..quiet() });

    device.complete_in_background();

    eventually("all but one arrive", || device.stats().units_present == 49);
    assert!(!device.is_complete_durable() && !device.present(blob.one(7)));
}

// ---- disks ------------------------------------------------------------------------------------------

#[test]
fn a_reopened_store_is_warm_and_fetches_nothing() {
    let (bench, blob) = (Bench::new(), Blob::new(5, 50_000, 0));
    let store = bench.store(quiet());
    let device = store.device(blob.map(), Scripted::honest(&blob)).unwrap();
    fill_blocking(&*device, blob.range(1..3)).unwrap();
    store.close().unwrap();
    drop((device, store));

    let (store, source) = (bench.store(quiet()), Scripted::honest(&blob));
    assert_eq!(store.saved_map(&blob.id), Some(blob.map()));
    let device = store.device(blob.map(), source.clone()).unwrap();
    fill_blocking(&*device, blob.range(1..3)).unwrap();

    assert_eq!(present(&device, &blob), [1, 2]);
    assert_eq!(source.log(), []);
    assert_bytes(&device, &blob, 1..3);
}

#[test]
fn after_a_crash_only_what_was_durable_is_trusted() {
    let (bench, blob) = (Bench::new(), Blob::new(5, 50_000, 0));
    let present_file = bench.root.path().join("v1/blob/present");
    let store = bench.store(quiet());
    let device = store.device(blob.map(), Scripted::honest(&blob)).unwrap();
    fill_blocking(&*device, blob.one(1)).unwrap();
    device.flush().unwrap();
    let durable = std::fs::read(&present_file).unwrap();
    fill_blocking(&*device, blob.one(3)).unwrap();
    assert_eq!(std::fs::read(&present_file).unwrap(), durable, "no bit before its bytes are synced");
    drop((device, store));
    std::fs::write(&present_file, &durable).unwrap();

    let device = bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap();

    assert_eq!(present(&device, &blob), [1]);
}

#[test]
fn damage_to_any_file_of_a_device_never_makes_absent_units_present() {
    let (bench, blob) = (Bench::new(), Blob::new(5, 50_000, 0));
    let dir = bench.root.path().join("v1/blob");
    let fill = || {
        let device = bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap();
        fill_blocking(&*device, blob.range(0..5)).unwrap();
    };
    let reopened = || present(&bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap(), &blob);
    let damage = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        fill();
        let mut bytes = std::fs::read(dir.join(name)).unwrap();
        change(&mut bytes);
        // A new file takes the name, as a restore from elsewhere would.
        std::fs::write(dir.join("other"), &bytes).unwrap();
        std::fs::rename(dir.join("other"), dir.join(name)).unwrap();
        reopened()
    };

    assert_eq!(damage("present", &|_| ()), [0, 1, 2, 3, 4], "a sound file is trusted");
    assert_eq!(damage("present", &|bytes| bytes[9] ^= 1), Vec::<usize>::new(), "head");
    assert_eq!(damage("present", &|bytes| bytes[600] ^= 1), Vec::<usize>::new(), "page");
    assert_eq!(damage("present", &|bytes| bytes.truncate(700)), Vec::<usize>::new(), "torn page");
    assert_eq!(damage("data", &|_| ()), Vec::<usize>::new(), "another inode is another file");
    assert_eq!(damage("data", &|bytes| bytes.truncate(4096)), Vec::<usize>::new(), "short");
    assert_eq!(
        damage("units", &|bytes| bytes[80] ^= 1),
        Vec::<usize>::new(),
        "what the units were checked against is lost"
    );
    let device = bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap();
    assert_eq!(device.open_data().unwrap().metadata().unwrap().len(), device.decoded_len());
}

#[test]
fn a_data_file_that_lost_pieces_is_not_believed_about_the_rest() {
    let (bench, blob) = (Bench::new(), Blob::new(5, 50_000, 0));
    let data = bench.root.path().join("v1/blob/data");
    let reopened = |change: &dyn Fn(&std::fs::File)| {
        let device = bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap();
        fill_blocking(&*device, blob.range(0..5)).unwrap();
        drop(device);
        change(&std::fs::File::options().write(true).open(&data).unwrap());
        let device = bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap();
        let found = present(&device, &blob);
        fill_blocking(&*device, blob.range(0..5)).unwrap();
        assert_bytes(&device, &blob, 0..5);
        found
    };
    let len = blob.plain.len() as u64;

    assert_eq!(reopened(&|_| ()), [0, 1, 2, 3, 4], "a sound file is trusted");
    let cut_and_stretched = |file: &std::fs::File| {
        file.set_len(4096).unwrap();
        file.set_len(len).unwrap();
    };
    assert_eq!(reopened(&cut_and_stretched), Vec::<usize>::new(), "holes where units were");
    assert_eq!(reopened(&|file| file.set_len(len + 4096).unwrap()), Vec::<usize>::new(), "longer");
    assert_eq!(reopened(&|file| file.set_len(len - 4096).unwrap()), Vec::<usize>::new(), "shorter");
}

#[test]
fn what_was_changed_while_nobody_used_it_is_checked_again_and_only_what_is_spoilt_is_fetched() {
    let (bench, blob) = (Bench::new(), Blob::new(5, 50_000, 0));
    let data = bench.root.path().join("v1/blob/data");
    let open = || {
        let source = Scripted::honest(&blob);
        (bench.store(quiet()).device(blob.map(), source.clone()).unwrap(), source)
    };
    let reopened = |change: &dyn Fn(&std::fs::File)| {
        let (device, _) = open();
        fill_blocking(&*device, blob.range(0..5)).unwrap();
        drop(device);
        // Times of files go on in ticks.
        std::thread::sleep(Duration::from_millis(20));
        change(&std::fs::File::options().write(true).open(&data).unwrap());
        let (device, source) = open();
        let found = present(&device, &blob);
        fill_blocking(&*device, blob.range(0..5)).unwrap();
        assert_bytes(&device, &blob, 0..5);
        (found, source.log())
    };
    let nothing = Vec::<usize>::new;
    let byte = blob.units[2].decoded.start() + 77;
    let other = !blob.plain[usize::try_from(byte).unwrap()];
    let padding = blob.units[3].decoded.end();
    assert!(!padding.is_multiple_of(4096), "there is none");

    let flip = |file: &std::fs::File| file.write_all_at(&[other], byte).unwrap();
    assert_eq!(reopened(&flip), (nothing(), vec![blob.units[2].stored]));
    assert_eq!(
        reopened(&|file| file.write_all_at(&[1], padding).unwrap()),
        (nothing(), vec![blob.units[3].stored]),
        "the padding"
    );
    let same = |file: &std::fs::File| file.write_all_at(&blob.plain[..1], 0).unwrap();
    assert_eq!(reopened(&same), (nothing(), vec![]), "nothing is wrong with it");
    // What is noted of the file means nothing once it is used again.
    let (device, _) = open();
    assert!(!data.with_file_name("rest").exists());
    drop(device);
    assert!(data.with_file_name("rest").exists());
    // One that says nothing is none.
    for note in ["", "x", "-1", "1", "18446744073709551616\n"] {
        std::fs::write(data.with_file_name("rest"), note).unwrap();
        assert_eq!(present(&open().0, &blob), [0, 1, 2, 3, 4], "{note:?}");
    }
    // What nobody has looked at is looked at the next time.
    std::fs::write(data.with_file_name("rest"), "1\n").unwrap();
    for _ in 0..2 {
        let (device, source) = open();
        assert_eq!((present(&device, &blob), device.is_complete_durable()), (vec![], false));
        fill_blocking(&*device, blob.one(4)).unwrap();
        assert_eq!((present(&device, &blob), source.log()), (vec![4], vec![]));
    }
    let (device, source) = open();
    fill_blocking(&*device, blob.range(0..5)).unwrap();
    device.flush().unwrap();
    assert!(device.is_complete_durable() && source.log().is_empty());
    drop(device);
    assert_eq!(present(&open().0, &blob), [0, 1, 2, 3, 4]);
}

#[test]
fn a_data_file_cut_off_while_in_use_does_not_grow_again() {
    let (bench, blob) = (Bench::new(), Blob::new(5, 50_000, 0));
    let store = bench.store(quiet());
    let device = store.device(blob.map(), Scripted::honest(&blob)).unwrap();
    fill_blocking(&*device, blob.range(0..2)).unwrap();
    let file = std::fs::File::options().write(true).open(device.data_path().unwrap()).unwrap();
    file.set_len(4096).unwrap();

    // Grown again, it would have a hole where units 0 and 1 are called present.
    let error = fill_blocking(&*device, blob.one(4)).unwrap_err();

    assert!(matches!(error, FillError::Io { unit: 4, .. }), "{error:?}");
    assert_eq!(file.metadata().unwrap().len(), 4096);
    let refused = store.device(blob.map(), Scripted::honest(&blob)).unwrap_err();
    assert!(matches!(refused, StoreError::Replaced { .. }), "{refused:?}");
    drop(device);
    let device = store.device(blob.map(), Scripted::honest(&blob)).unwrap();
    assert_eq!(present(&device, &blob), Vec::<usize>::new());
    fill_blocking(&*device, blob.range(0..5)).unwrap();
    assert_bytes(&device, &blob, 0..5);
}

#[test]
fn a_data_file_replaced_while_in_use_is_shared_with_nobody_new() {
    let (bench, blob) = (Bench::new(), Blob::new(2, 50_000, 0));
    let store = bench.store(quiet());
    let device = store.device(blob.map(), Scripted::honest(&blob)).unwrap();
    fill_blocking(&*device, blob.range(0..2)).unwrap();
    let data = device.data_path().unwrap().to_owned();
    let second = || store.device(blob.map(), Scripted::honest(&blob));

    std::fs::copy(&data, data.with_extension("copy")).unwrap();
    std::fs::rename(data.with_extension("copy"), &data).unwrap();
    assert!(matches!(second(), Err(StoreError::Replaced { path }) if path == data), "another file");
    std::fs::remove_file(&data).unwrap();
    assert!(matches!(second(), Err(StoreError::Replaced { path }) if path == data), "no file");

    drop(device);
    // The thread that makes things durable may hold the old file for a moment.
    let until = Instant::now() + Duration::from_secs(10);
    let device = loop {
        match second() {
            Err(StoreError::Replaced { .. }) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            outcome => break outcome.unwrap(),
        }
    };
    fill_blocking(&*device, blob.range(0..2)).unwrap();
    assert_bytes(&device, &blob, 0..2);
}

#[test]
fn a_full_disk_is_an_error_until_there_is_room_again() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 50_000, 0));
    let (device, memory) = bench.in_memory(&blob, &Scripted::honest(&blob), quiet());
    fill_blocking(&*device, blob.one(0)).unwrap();

    memory.full.store(true, Ordering::SeqCst);
    let error = fill_blocking(&*device, blob.one(1)).unwrap_err();

    assert!(matches!(error, FillError::NoSpace { unit: 1, .. }), "{error:?}");
    assert_eq!(error.errno(), libc::ENOSPC);
    assert_eq!(present(&device, &blob), [0], "what was there stays");
    memory.full.store(false, Ordering::SeqCst);
    fill_blocking(&*device, blob.one(1)).unwrap();
}

#[test]
fn a_failed_sync_is_reported_and_its_units_are_fetched_again() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 50_000, 0));
    let (device, memory) = bench.in_memory(&blob, &Scripted::honest(&blob), quiet());
    fill_blocking(&*device, blob.one(0)).unwrap();
    device.flush().unwrap();
    fill_blocking(&*device, blob.one(1)).unwrap();

    memory.sync_fails.store(true, Ordering::SeqCst);
    assert!(device.flush().is_err());

    assert_eq!(present(&device, &blob), [0]);
    memory.sync_fails.store(false, Ordering::SeqCst);
    fill_blocking(&*device, blob.one(1)).unwrap();
    assert_eq!(device.stats().requests, 3);
}

#[test]
fn who_writes_waits_for_a_disk_that_loses_it_after_the_reader_was_answered() {
    let (bench, blob) = (Bench::new(), Blob::new(8, 50_000, 0));
    let options = StoreOptions { unsynced: Some(1), ..apart() };
    let (device, memory) = bench.in_memory(&blob, &Scripted::honest(&blob), options);
    memory.sync_fails.store(true, Ordering::SeqCst);
    let (tx, rx) = channel();
    for unit in 0..8 {
        let (device_then, tx, range) = (Arc::clone(&device), tx.clone(), blob.one(unit));
        let seen =
            move |outcome: Result<(), FillError>| tx.send((outcome.is_ok(), device_then.present(range))).unwrap();
        device.fill(range, Class::OnDemand, Box::new(seen));
        assert_eq!(rx.recv().unwrap(), (true, true), "told of what is not there");
    }
    // It was synced each time, and lost.
    eventually("all of it is absent", || present(&device, &blob).is_empty());

    memory.sync_fails.store(false, Ordering::SeqCst);
    fill_blocking(&*device, blob.range(0..8)).unwrap();
    eventually("all of it is durable", || device.is_complete_durable());
}

#[test]
fn a_foreign_sink_is_believed_about_whole_units_only() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 50_000, 0));
    let there = ByteRange::new(blob.one(0).start(), blob.one(1).end() - 4096).unwrap();
    let source = Scripted::honest(&blob);
    let sink = Box::new(Memory::default());
    let device = Device::with_sink(blob.map(), source, sink, &[there], bench.engine(quiet()));

    assert_eq!(present(&device, &blob), [0]);
    assert_eq!(device.data_path(), None);
    assert_eq!(device.open_data().unwrap_err().kind(), io::ErrorKind::Unsupported);
    fill_blocking(&*device, blob.range(0..3)).unwrap();
    device.flush().unwrap();
    assert!(device.is_complete_durable());
}

#[test]
fn ranges_in_a_foreign_sink_that_touch_count_as_one() {
    let (bench, blob) = (Bench::new(), Blob::new(7, 10_000, 0));
    let engine = bench.engine(quiet());
    let present_in = |blocks: &[(u64, u64)]| {
        let ranges: Vec<_> = blocks.iter().map(|&(s, e)| ByteRange::new(s * 4096, e * 4096).unwrap()).collect();
        let (source, sink) = (Scripted::honest(&blob), Box::new(Memory::default()));
        present(&Device::with_sink(blob.map(), source, sink, &ranges, engine.clone()), &blob)
    };

    // Every unit has three blocks.
    assert_eq!(present_in(&[(0, 1), (1, 2), (2, 3)]), [0], "three that touch");
    assert_eq!(present_in(&[(2, 6), (0, 2)]), [0, 1], "in any order");
    assert_eq!(present_in(&[(3, 8), (4, 5), (7, 10)]), [1, 2], "overlaps");
    assert_eq!(present_in(&[(0, 2), (3, 5), (6, 9), (10, 12)]), [2], "a block is missing of the others");
    assert_eq!(present_in(&[(0, 0), (5, 5), (18, 99)]), [6], "empty ones, and one behind the end");
    assert_eq!(present_in(&[]), Vec::<usize>::new());
}

#[test]
fn a_device_over_a_foreign_sink_learns_from_another_image() {
    let (bench, blob) = (Bench::new(), Blob::new(3, 5000, 0));
    let mut lie = Blob::new(3, 5000, 0);
    lie.units[0].check = Check::Blake3([9; 32]);
    let (source, sink) = (Scripted::honest(&blob), Box::new(Memory::default()));
    let device = Device::with_sink(blob.map_knowing(0..1), source.clone(), sink, &[], bench.engine(quiet()));
    assert!(matches!(fill_blocking(&*device, blob.one(1)), Err(FillError::Corrupt { unit: 1, .. })));

    assert!(!device.learn(lie.map(), source.clone()), "it contradicts what is known");
    assert!(matches!(fill_blocking(&*device, blob.one(1)), Err(FillError::Corrupt { unit: 1, .. })));
    assert!(device.learn(blob.map_knowing(1..2), source.clone()));
    fill_blocking(&*device, blob.range(0..2)).unwrap();

    assert_eq!(*device.map(), blob.map_knowing(0..2));
    assert_eq!((present(&device, &blob), device.stats().units), (vec![0, 1], 2));
}

#[test]
fn what_a_stored_device_learns_outlives_it() {
    let (bench, blob) = (Bench::new(), Blob::new(2, 5000, 0));
    let store = bench.store(quiet());
    let device = store.device(blob.map_knowing(0..1), Scripted::honest(&blob)).unwrap();

    assert!(device.learn(blob.map_knowing(1..2), Scripted::honest(&blob)));

    // Else a unit checked by one digest could be present for an image that names another.
    assert_eq!(store.saved_map(&blob.id), Some(blob.map()));
}

// ---- the store --------------------------------------------------------------------------------------

#[test]
fn a_store_has_one_writer_until_its_last_device_is_gone() {
    let (bench, blob) = (Bench::new(), Blob::new(1, 5000, 0));
    let second = || Store::open(bench.root.path(), quiet(), bench.runtime.handle().clone());
    let store = bench.store(quiet());
    let device = store.device(blob.map(), Scripted::honest(&blob)).unwrap();

    assert!(matches!(second(), Err(StoreError::Locked { pid: Some(pid), .. }) if pid == std::process::id()));
    drop(store);
    assert!(matches!(second(), Err(StoreError::Locked { .. })), "the device can still write");
    drop(device);
    second().unwrap();
}

#[test]
fn images_that_agree_share_a_device_and_teach_it() {
    let (bench, blob) = (Bench::new(), Blob::new(4, 5000, 0));
    let store = bench.store(quiet());
    let device = store.device(blob.map_knowing(0..2), Scripted::honest(&blob)).unwrap();
    fill_blocking(&*device, blob.range(0..2)).unwrap();
    device.flush().unwrap();
    assert!(device.is_complete_durable());

    let same = store.device(blob.map_knowing(1..4), Scripted::honest(&blob)).unwrap();

    assert!(Arc::ptr_eq(&device, &same));
    assert!(!device.is_complete_durable(), "there is more to fetch now");
    fill_blocking(&*device, blob.range(2..4)).unwrap();
    assert_eq!(store.saved_map(&blob.id), Some(blob.map()));
    drop((device, same));

    let device = store.device(blob.map_knowing(0..1), Scripted::honest(&blob)).unwrap();
    assert_eq!(present(&device, &blob), [0, 1, 2, 3], "what one image learnt the next one has");
}

#[test]
fn an_image_with_false_digests_poisons_nobody_else() {
    let (bench, blob) = (Bench::new(), Blob::new(2, 5000, 0));
    let mut lie = Blob::new(2, 5000, 0);
    lie.units[1].check = Check::Blake3([9; 32]);
    let store = bench.store(quiet());

    let liar = store.device(lie.map(), Scripted::honest(&blob)).unwrap();
    let honest = store.device(blob.map(), Scripted::honest(&blob)).unwrap();

    assert!(matches!(fill_blocking(&*liar, blob.one(1)), Err(FillError::Corrupt { unit: 1, .. })));
    fill_blocking(&*honest, blob.range(0..2)).unwrap();
    assert_bytes(&honest, &blob, 0..2);
    assert!(!liar.present(blob.one(1)));
    let name = format!("blob.{}", &blob.map().fingerprint().to_string()[..16]);
    assert_eq!(honest.data_path().unwrap(), bench.root.path().join("v1").join(name).join("data"));
    drop((liar, honest, store));

    let honest = bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap();
    assert_eq!(present(&honest, &blob), [0, 1], "found again after a restart");
}

#[test]
fn the_store_is_closed_to_other_users() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    std::fs::set_permissions(bench.root.path(), std::fs::Permissions::from_mode(0o755)).unwrap();

    let _store = bench.store(quiet());

    assert_eq!(std::fs::metadata(bench.root.path()).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn unit_numbers_fit_what_a_map_can_hold() {
    // A last partial word and a last partial page of bits.
    let (bench, blob) = (Bench::new(), Blob::new(4000, 64, 0));
    let device = bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap();
    fill_blocking(&*device, blob.range(0..4000)).unwrap();
    drop(device);

    let device = bench.store(quiet()).device(blob.map(), Scripted::honest(&blob)).unwrap();

    assert_eq!(device.stats().units_present, UnitIndex::try_from(blob.units.len()).unwrap());
    assert!(device.is_complete_durable());
}

// ---- batches --------------------------------------------------------------------------------------

impl Blob {
    /// One batch of `count` members of `size` plain bytes, and a unit of its own behind it.
    fn batch(count: usize, size: usize) -> Self {
        let mut blob = Self::new(count, size, 0);
        let whole: Vec<u8> = blob.units.iter().flat_map(|unit| blob.plain_of(unit).to_vec()).collect();
        let mut zstd = Compressor::zstd(1).unwrap();
        blob.stored = zstd.compress(&whole).expect("compressible").to_vec();
        let range = ByteRange::at(0, blob.stored.len() as u64).unwrap();
        for (number, unit) in blob.units.iter_mut().enumerate() {
            let at = u32::try_from(number * size).unwrap();
            unit.stored = range;
            unit.part = Some(Part { at, whole: u32::try_from(whole.len()).unwrap() });
        }
        let tail = Unit::plain(blob.plain.len() as u64, &[9; 100]).unwrap();
        blob.units.push(Unit { stored: ByteRange::at(range.end(), 100).unwrap(), ..tail });
        blob.stored.extend_from_slice(&[9; 100]);
        blob.plain.extend_from_slice(&[9; 100]);
        blob.plain.resize(blob.plain.len().next_multiple_of(4096), 0);
        blob
    }

    /// So many batches, one behind the other.
    fn batches(count: usize) -> Self {
        let (members, size) = (16, 512);
        let mut blob = Self::new(count * members, size, 0);
        let mut zstd = Compressor::zstd(1).unwrap();
        blob.stored.clear();
        for batch in 0..count {
            let units = batch * members..(batch + 1) * members;
            let whole: Vec<u8> = units.clone().flat_map(|unit| blob.plain_of(&blob.units[unit]).to_vec()).collect();
            let stored = zstd.compress(&whole).expect("compressible").to_vec();
            let range = ByteRange::at(blob.stored.len() as u64, stored.len() as u64).unwrap();
            blob.stored.extend_from_slice(&stored);
            for (number, unit) in blob.units[units].iter_mut().enumerate() {
                let at = u32::try_from(number * size).unwrap();
                unit.stored = range;
                unit.part = Some(Part { at, whole: u32::try_from(whole.len()).unwrap() });
            }
        }
        blob
    }

    fn plain_of(&self, unit: &Unit) -> &[u8] {
        &self.plain[usize::try_from(unit.decoded.start()).unwrap()..usize::try_from(unit.decoded.end()).unwrap()]
    }
}

#[test]
fn prefetch_brings_many_batches_by_few_reads() {
    let (bench, blob) = (Bench::new(), Blob::batches(64));
    let source = Scripted::honest(&blob);
    let stored = blob.stored.len() as u64;
    // Room for all of it in eight reads, if each batch is counted once.
    let store = bench.store(StoreOptions { prefetch_window: stored / 8 + 100, ..quiet() });
    let device = store.device(blob.map(), source.clone()).unwrap();

    let prefetch = Prefetch::start(store.engine(), &[Arc::clone(&device)], &[], true);

    eventually("all of it", || prefetch.stats().state == PrefetchState::Done);
    assert!(source.log().len() <= 12, "{} reads for {stored} bytes", source.log().len());
    assert_bytes(&device, &blob, 0..64 * 16);
}

#[test]
fn readers_of_different_members_of_a_cold_batch_cost_one_request() {
    let (bench, blob) = (Bench::new(), Blob::batch(40, 500));
    let gate = Arc::new(Semaphore::new(0));
    let source = Scripted::new(&blob, {
        let gate = gate.clone();
        move |_, _| Act::Gate(gate.clone())
    });
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    let readers: Vec<_> = (0..40)
        .map(|member| {
            let (device, range) = (device.clone(), blob.one(member));
            std::thread::spawn(move || fill_blocking(&*device, range))
        })
        .collect();
    eventually("the request", || source.log().len() == 1);
    gate.add_permits(100);
    readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());

    assert_eq!(source.log(), [blob.units[0].stored]);
    assert_eq!(present(&device, &blob), (0..40).collect::<Vec<_>>());
    assert_bytes(&device, &blob, 0..40);
}

#[test]
fn one_cold_read_brings_the_whole_batch_in_one_job() {
    let (bench, blob) = (Bench::new(), Blob::batch(40, 500));
    let source = Scripted::honest(&blob);
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    fill_blocking(&*device, blob.one(17)).unwrap();

    eventually("the siblings", || present(&device, &blob).len() == 40);
    for member in 0..40 {
        fill_blocking(&*device, blob.one(member)).unwrap();
    }
    assert_eq!(source.log().len(), 1);
    assert_eq!(device.stats().units_filled, 40);
    assert_bytes(&device, &blob, 0..40);
}

#[test]
fn members_that_nobody_can_check_are_not_brought_along() {
    let (bench, blob) = (Bench::new(), Blob::batch(10, 500));
    let source = Scripted::honest(&blob);
    let device = bench.store(quiet()).device(blob.map_knowing(3..6), source.clone()).unwrap();

    fill_blocking(&*device, blob.one(4)).unwrap();

    eventually("the siblings", || present(&device, &blob) == [3, 4, 5]);
    assert!(matches!(fill_blocking(&*device, blob.one(0)), Err(FillError::Corrupt { unit: 0, .. })));
    assert_eq!(source.log().len(), 1);
}

#[test]
fn a_damaged_batch_is_fetched_once_more_for_all_its_members() {
    let (bench, blob) = (Bench::new(), Blob::batch(40, 500));
    let asked = AtomicUsize::new(0);
    let source = Scripted::new(&blob, move |_, _| match asked.fetch_add(1, Ordering::SeqCst) {
        0 => Act::Flip(100),
        _ => Act::Serve,
    });
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    fill_blocking(&*device, blob.range(0..40)).unwrap();

    assert_eq!(source.log(), [blob.units[0].stored; 2]);
    assert_bytes(&device, &blob, 0..40);
}

#[test]
fn a_member_with_a_false_digest_takes_no_sibling_along() {
    let (bench, mut blob) = (Bench::new(), Blob::batch(10, 500));
    blob.units[4].check = Check::Blake3([1; 32]);
    let source = Scripted::honest(&blob);
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    let outcome = fill_blocking(&*device, blob.range(0..10));

    assert!(matches!(outcome, Err(FillError::Corrupt { unit: 4, .. })), "{outcome:?}");
    assert_eq!(present(&device, &blob), [0, 1, 2, 3, 5, 6, 7, 8, 9]);
    assert_eq!(source.log().len(), 2, "one more try for the one that failed");
}

#[test]
fn a_batch_that_the_image_misplaced_fails_and_is_not_asked_for_for_ever() {
    let (bench, mut blob) = (Bench::new(), Blob::batch(10, 500));
    let beyond = ByteRange::at(blob.stored.len() as u64, blob.units[0].stored.len()).unwrap();
    blob.units[..10].iter_mut().for_each(|unit| unit.stored = beyond);
    let source = Scripted::honest(&blob);
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    let outcome = fill_blocking(&*device, blob.range(0..11));

    assert!(matches!(outcome, Err(FillError::Source { .. })), "{outcome:?}");
    assert_eq!(present(&device, &blob), [10], "what is in its place is served");
}

#[test]
fn completing_a_blob_asks_once_for_each_batch() {
    let (bench, blob) = (Bench::new(), Blob::batch(40, 500));
    let source = Scripted::honest(&blob);
    let device = bench.store(quiet()).device(blob.map(), source.clone()).unwrap();

    device.complete_in_background();

    eventually("everything", || present(&device, &blob).len() == 41);
    assert_eq!(source.log().len(), 1, "the unit behind the batch joins its read");
}
