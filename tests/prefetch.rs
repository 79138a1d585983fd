//! Prefetch behind readers: in whose order, in which pieces, and what ends it. No test here looks at a
//! clock: sources answer when they are told to.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rafsd::base::{BlobId, ByteRange, Class};
use rafsd::blob::{Unit, UnitMap};
use rafsd::cache::{
    Device, Engine, Fill, FillError, Prefetch, PrefetchState, Sink, StoreOptions, Trace, Want, fill_blocking,
};
use rafsd::source::{BlobSource, BoxFuture, ReadCtx, SourceError};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

/// Length of every unit. Stored as it is, so decoded and stored places are the same.
const UNIT: u64 = 64 << 10;

fn content(units: u64) -> Vec<u8> {
    (0..units * UNIT).map(|at| u8::try_from((at / 251 + at / UNIT * 7) % 256).unwrap()).collect()
}

fn units(from: u64, to: u64) -> ByteRange {
    ByteRange::new(from * UNIT, to * UNIT).unwrap()
}

/// A source that hands out one permit's worth at a time, or fails.
struct Gated {
    name: &'static str,
    bytes: Vec<u8>,
    /// One permit for each unit that prefetch may bring.
    streams: Semaphore,
    /// One permit for each unit that readers may be brought.
    reads: Semaphore,
    log: Mutex<Vec<(Class, ByteRange)>>,
    /// Reads of prefetch under way.
    active: AtomicUsize,
    down: AtomicBool,
    missing: AtomicBool,
}

impl Gated {
    fn new(units: u64, streams: usize, reads: usize) -> Arc<Self> {
        Arc::new(Self {
            name: "a gated source",
            bytes: content(units),
            streams: Semaphore::new(streams),
            reads: Semaphore::new(reads),
            log: Mutex::default(),
            active: AtomicUsize::new(0),
            down: AtomicBool::new(false),
            missing: AtomicBool::new(false),
        })
    }

    /// What was asked for by prefetch, or by readers.
    fn log(&self, class: Class) -> Vec<ByteRange> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|(of, _)| *of == class).map(|(_, range)| *range).collect()
    }

    /// Waits until the stream under way has been broken off.
    fn await_break(&self) {
        eventually("the end of the stream", || self.active.load(Ordering::SeqCst) == 0);
    }

    fn begin(&self, blob: &BlobId, stored: ByteRange, class: Class) -> Result<Bytes, SourceError> {
        self.log.lock().unwrap().push((class, stored));
        let (blob, place) = (blob.clone(), self.name.to_owned());
        if self.down.load(Ordering::SeqCst) {
            return Err(SourceError::Unavailable { blob, place, detail: "it is down".into() });
        }
        if self.missing.load(Ordering::SeqCst) {
            return Err(SourceError::NotFound { blob, place });
        }
        let at = |at: u64| usize::try_from(at).unwrap();
        Ok(Bytes::copy_from_slice(&self.bytes[at(stored.start())..at(stored.end())]))
    }
}

impl BlobSource for Gated {
    fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(async { Ok(self.bytes.len() as u64) })
    }

    fn read<'a>(&'a self, _: &'a BlobId, _: ByteRange, _: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        unreachable!("units are decoded as they arrive")
    }

    fn stream<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move {
            let (permits, active) = match ctx.class {
                Class::OnDemand => (&self.reads, None),
                Class::Prefetch => (&self.streams, Some(&self.active)),
            };
            // Before anybody can see that it was asked.
            let _end = active.map(Active::begin);
            let mut bytes = self.begin(blob, stored, ctx.class)?;
            while !bytes.is_empty() {
                permits.acquire().await.unwrap().forget();
                take(bytes.split_to(bytes.len().min(usize::try_from(UNIT).unwrap())));
            }
            Ok(())
        })
    }

    fn describe(&self) -> String {
        self.name.to_owned()
    }
}

/// A read of prefetch under way.
struct Active<'a>(&'a AtomicUsize);

impl<'a> Active<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Keeps nothing, unless it is full.
#[derive(Clone, Default)]
struct Nowhere(Arc<AtomicBool>);

impl Sink for Nowhere {
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        if self.0.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Bench {
    _runtime: Runtime,
    engine: Arc<Engine>,
    full: Nowhere,
}

impl Bench {
    /// One read of prefetch at a time, and no read-ahead.
    fn new() -> Self {
        Self::with(|options| options)
    }

    fn with(change: impl FnOnce(StoreOptions) -> StoreOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        let options = StoreOptions {
            readahead_first: 0,
            flush_every: Duration::from_secs(3600),
            prefetch_fetches: 1,
            prefetch_calm: Duration::from_millis(1),
            ..StoreOptions::default()
        };
        let engine = Engine::new(change(options), runtime.handle().clone()).unwrap();
        Self { _runtime: runtime, engine, full: Nowhere::default() }
    }

    fn device(&self, source: &Arc<Gated>) -> Arc<Device> {
        let unit = usize::try_from(UNIT).unwrap();
        let units = source.bytes.chunks(unit).enumerate();
        let units = units.map(|(at, bytes)| Unit::plain((at * unit) as u64, bytes).unwrap()).collect();
        let map = UnitMap::new("blob".parse().unwrap(), source.bytes.len() as u64, units).unwrap();
        Device::with_sink(map, source.clone(), Box::new(self.full.clone()), &[], self.engine.clone())
    }

    fn prefetch(&self, device: &Arc<Device>, wants: &[ByteRange], rest: bool) -> Prefetch {
        let wants: Vec<_> = wants.iter().map(|&decoded| Want { device: 0, decoded }).collect();
        Prefetch::start(&self.engine, std::slice::from_ref(device), &wants, rest)
    }
}

fn read(device: &Device, range: ByteRange) -> Receiver<Result<(), FillError>> {
    let (tx, rx) = channel();
    device.fill(range, Class::OnDemand, Box::new(move |outcome| drop(tx.send(outcome))));
    rx
}

fn answer(reader: &Receiver<Result<(), FillError>>) -> Result<(), FillError> {
    reader.recv_timeout(Duration::from_secs(20)).expect("a reader must be answered")
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ended(prefetch: &Prefetch) -> PrefetchState {
    eventually("the end of the prefetch", || prefetch.has_ended());
    prefetch.stats().state
}

/// Time for something to happen that must not. A fault may slip through, a right program never fails.
fn settle() {
    std::thread::sleep(Duration::from_millis(50));
}

#[test]
fn who_waits_for_the_beginning_of_a_long_read_does_not_wait_for_its_end() {
    let source = Gated::new(4, 0, 0);
    let bench = Bench::new();
    let device = bench.device(&source);
    let all = read(&device, units(0, 4));
    let first = read(&device, units(0, 1));

    source.reads.add_permits(1);
    answer(&first).unwrap();
    assert!(all.try_recv().is_err() && !device.present(units(1, 2)));
    source.reads.add_permits(3);
    answer(&all).unwrap();

    assert_eq!(source.log(Class::OnDemand), [units(0, 4)]);
}

#[test]
fn ranges_are_asked_for_in_the_order_given_and_neighbours_together() {
    let (bench, source) = (Bench::new(), Gated::new(40, 1000, 0));
    let device = bench.device(&source);

    let order = [units(30, 31), units(2, 4), units(4, 6), units(20, 21), units(3, 5)];
    let prefetch = bench.prefetch(&device, &order, false);

    assert_eq!(ended(&prefetch), PrefetchState::Done);
    assert_eq!(source.log(Class::Prefetch), [units(30, 31), units(2, 6), units(20, 21)]);
    let stats = prefetch.stats();
    assert_eq!((stats.bytes, stats.bytes_present, stats.units_absent), (6 * UNIT, 6 * UNIT, 0));
}

#[test]
fn the_rest_follows_in_long_reads_over_what_is_there() {
    let (bench, source) = (Bench::new(), Gated::new(100, 1000, 0));
    let device = bench.device(&source);

    let prefetch = bench.prefetch(&device, &[units(50, 51)], true);

    assert_eq!(ended(&prefetch), PrefetchState::Done);
    // Most of the blob is wanted, so the hole of one unit is read over, and all of it is one read.
    assert_eq!(source.log(Class::Prefetch), [units(50, 51), units(0, 100)]);
    assert!(device.is_complete_durable());
}

#[test]
fn a_few_files_of_a_blob_are_read_in_windows() {
    let bench = Bench::with(|options| StoreOptions { prefetch_window: 2 * UNIT, ..options });
    let source = Gated::new(100, 1000, 0);
    let device = bench.device(&source);

    let prefetch = bench.prefetch(&device, &[units(10, 15)], false);

    assert_eq!(ended(&prefetch), PrefetchState::Done);
    assert_eq!(source.log(Class::Prefetch), [units(10, 12), units(12, 14), units(14, 15)]);
}

#[test]
fn at_a_rate_no_read_is_long() {
    let bench = Bench::with(|options| StoreOptions { prefetch_rate: Some(32 * UNIT), ..options });
    let source = Gated::new(20, 1000, 0);
    let device = bench.device(&source);

    let prefetch = bench.prefetch(&device, &[], true);

    assert_eq!(ended(&prefetch), PrefetchState::Done);
    assert_eq!(source.log(Class::Prefetch), [units(0, 8), units(8, 16), units(16, 20)], "a quarter of a second each");
}

#[test]
fn units_are_there_before_their_stream_has_ended() {
    let (bench, source) = (Bench::new(), Gated::new(10, 3, 0));
    let device = bench.device(&source);

    let prefetch = bench.prefetch(&device, &[], true);

    eventually("three units", || device.present(units(0, 3)));
    assert!(!device.present(units(3, 4)) && !prefetch.has_ended());
    assert_eq!(source.log(Class::Prefetch), [units(0, 10)]);
    assert_eq!(prefetch.stats().bytes_present, 3 * UNIT);
    source.streams.add_permits(7);
    assert_eq!(ended(&prefetch), PrefetchState::Done);
}

#[test]
fn nothing_is_prefetched_while_a_reader_waits() {
    let (bench, source) = (Bench::new(), Gated::new(10, 1000, 0));
    // Of another image: the link may be the same.
    let (waited_for, device) = (bench.device(&source), bench.device(&source));
    let reader = read(&waited_for, units(0, 1));
    eventually("the reader's request", || source.log(Class::OnDemand) == [units(0, 1)]);

    let prefetch = bench.prefetch(&device, &[], true);

    settle();
    assert_eq!(source.log(Class::Prefetch), []);
    source.reads.add_permits(1);
    assert!(answer(&reader).is_ok());
    assert_eq!(ended(&prefetch), PrefetchState::Done);
}

#[test]
fn a_stream_gives_way_to_a_reader_and_goes_on_where_it_was() {
    let (bench, source) = (Bench::new(), Gated::new(40, 3, 0));
    let (other, device) = (bench.device(&source), bench.device(&source));
    let prefetch = bench.prefetch(&device, &[], true);
    eventually("three units", || device.present(units(0, 3)));

    let reader = read(&other, units(7, 8));

    eventually("the reader's request", || source.log(Class::OnDemand) == [units(7, 8)]);
    source.await_break();
    // Whatever the link carries now is for the reader.
    source.streams.add_permits(1000);
    settle();
    assert!(!device.present(units(3, 4)));
    source.reads.add_permits(1);
    assert!(answer(&reader).is_ok());
    assert_eq!(ended(&prefetch), PrefetchState::Done);
    assert_eq!(source.log(Class::Prefetch), [units(0, 40), units(3, 40)], "nothing is fetched twice");
}

#[test]
fn a_reader_of_what_a_stream_brings_late_gets_a_read_of_its_own() {
    let (bench, source) = (Bench::new(), Gated::new(40, 3, 0));
    let device = bench.device(&source);
    let prefetch = bench.prefetch(&device, &[], true);
    eventually("three units", || device.present(units(0, 3)));

    let reader = read(&device, units(30, 32));

    eventually("the reader's request", || source.log(Class::OnDemand) == [units(30, 32)]);
    source.reads.add_permits(2);
    assert!(answer(&reader).is_ok());
    source.streams.add_permits(1000);
    assert_eq!(ended(&prefetch), PrefetchState::Done);
    let prefetched = source.log(Class::Prefetch);
    assert_eq!(prefetched, [units(0, 40), units(3, 30), units(32, 40)], "each byte once");
}

#[test]
fn a_reader_of_what_a_stream_is_about_to_bring_waits_for_it() {
    let (bench, source) = (Bench::new(), Gated::new(40, 3, 0));
    let device = bench.device(&source);
    let prefetch = bench.prefetch(&device, &[], true);
    eventually("three units", || device.present(units(0, 3)));

    let reader = read(&device, units(4, 5));
    settle();
    source.streams.add_permits(2);

    assert!(answer(&reader).is_ok());
    assert_eq!(source.log(Class::OnDemand), []);
    source.streams.add_permits(1000);
    assert_eq!(ended(&prefetch), PrefetchState::Done);
    assert_eq!(source.log(Class::Prefetch), [units(0, 40)]);
}

#[test]
fn a_reader_of_what_is_queued_for_later_is_served_now() {
    let bench = Bench::with(|options| StoreOptions { stream: 10 * UNIT, ..options });
    let source = Gated::new(40, 3, 0);
    let device = bench.device(&source);
    let prefetch = bench.prefetch(&device, &[], true);
    eventually("three units", || device.present(units(0, 3)));

    let reader = read(&device, units(15, 16));

    eventually("the reader's request", || source.log(Class::OnDemand) == [units(15, 16)]);
    source.await_break();
    source.reads.add_permits(1);
    assert!(answer(&reader).is_ok());
    source.streams.add_permits(1000);
    assert_eq!(ended(&prefetch), PrefetchState::Done);
    let want = [(0, 10), (3, 10), (10, 15), (16, 20), (20, 30), (30, 40)].map(|(from, to)| units(from, to));
    assert_eq!(source.log(Class::Prefetch), want);
}

/// A list of single units, so far from each other that each is a read of its own.
fn list() -> Vec<ByteRange> {
    (0..8).map(|at| units(70 - at * 10, 71 - at * 10)).collect()
}

#[test]
fn a_list_goes_on_beside_a_reader_who_follows_it() {
    let (bench, source) = (Bench::new(), Gated::new(80, 0, 0));
    let device = bench.device(&source);
    let prefetch = bench.prefetch(&device, &list(), false);
    eventually("the first read", || source.log(Class::Prefetch) == list()[..1]);

    let reader = read(&device, list()[7]);
    eventually("the reader's request", || source.log(Class::OnDemand) == [list()[7]]);
    source.streams.add_permits(1000);

    // While it waits, everything else that it is going to read comes.
    eventually("the list", || list()[..7].iter().all(|range| device.present(*range)));
    assert!(!device.present(list()[7]));
    assert_eq!(source.log(Class::Prefetch), list()[..7], "nothing was broken off");
    source.reads.add_permits(1);
    assert!(answer(&reader).is_ok());
    assert_eq!(ended(&prefetch), PrefetchState::Done);
    assert_eq!(source.log(Class::Prefetch).len(), 7);
}

#[test]
fn a_list_gives_way_to_a_reader_of_something_else() {
    for of_another_image in [false, true] {
        let (bench, source) = (Bench::new(), Gated::new(80, 0, 0));
        let device = bench.device(&source);
        let other = if of_another_image { bench.device(&source) } else { Arc::clone(&device) };
        let prefetch = bench.prefetch(&device, &list(), false);
        eventually("the first read", || source.log(Class::Prefetch) == list()[..1]);

        let reader = read(&other, units(5, 6));

        eventually("the reader's request", || source.log(Class::OnDemand) == [units(5, 6)]);
        source.await_break();
        source.streams.add_permits(1000);
        settle();
        assert!(!list().iter().any(|range| device.present(*range)), "another image: {of_another_image}");
        source.reads.add_permits(1);
        assert!(answer(&reader).is_ok());
        assert_eq!(ended(&prefetch), PrefetchState::Done);
    }
}

#[test]
fn a_source_that_went_away_is_asked_again_and_told_about() {
    let (bench, source) = (Bench::new(), Gated::new(10, 1000, 0));
    let device = bench.device(&source);
    source.down.store(true, Ordering::SeqCst);

    let prefetch = bench.prefetch(&device, &[], true);

    eventually("trouble", || prefetch.stats().state == PrefetchState::Retrying);
    let trouble = prefetch.stats().trouble.expect("what is wrong");
    assert!(trouble.contains("it is down"), "{trouble}");
    source.down.store(false, Ordering::SeqCst);
    assert_eq!(ended(&prefetch), PrefetchState::Done);
    assert_eq!((prefetch.stats().trouble, prefetch.stats().failures), (None, Vec::new()));
}

#[test]
fn a_blob_that_is_not_there_fails_by_name_and_holds_up_no_other() {
    let (bench, good, bad) = (Bench::new(), Gated::new(5, 1000, 0), Gated::new(5, 1000, 0));
    bad.missing.store(true, Ordering::SeqCst);
    let devices = [bench.device(&bad), bench.device(&good)];

    let prefetch = Prefetch::start(&bench.engine, &devices, &[], true);

    assert_eq!(ended(&prefetch), PrefetchState::Failed);
    let stats = prefetch.stats();
    assert!(devices[1].present(units(0, 5)), "the other one");
    assert_eq!((stats.bytes, stats.bytes_present, stats.units_absent), (10 * UNIT, 5 * UNIT, 5));
    assert!(stats.failures[0].contains("blob blob is not at a gated source"), "{:?}", stats.failures);
    assert_eq!(bad.log(Class::Prefetch).len(), 1, "asked once");
}

#[test]
fn a_full_disk_ends_it() {
    let (bench, source) = (Bench::new(), Gated::new(10, 1000, 0));
    let device = bench.device(&source);
    bench.full.0.store(true, Ordering::SeqCst);

    let prefetch = bench.prefetch(&device, &[], true);

    assert_eq!(ended(&prefetch), PrefetchState::Failed);
    assert!(prefetch.stats().failures[0].contains("no room left"), "{:?}", prefetch.stats());
}

#[test]
fn it_ends_with_its_device_and_when_it_is_told_to() {
    let (bench, source) = (Bench::new(), Gated::new(10, 0, 0));
    let device = bench.device(&source);
    let prefetch = bench.prefetch(&device, &[], true);
    eventually("its request", || source.log(Class::Prefetch).len() == 1);
    drop(device);
    assert_eq!(ended(&prefetch), PrefetchState::Failed);

    let device = bench.device(&source);
    let prefetch = bench.prefetch(&device, &[], true);
    eventually("its request", || source.log(Class::Prefetch).len() == 2);
    prefetch.cancel();
    assert_eq!(prefetch.stats().state, PrefetchState::Cancelled);
    source.await_break();
    source.streams.add_permits(1000);
    settle();
    assert_eq!((prefetch.stats().state, prefetch.stats().bytes_present), (PrefetchState::Cancelled, 0));
}

#[test]
fn what_is_given_up_is_not_given_up_for_those_who_joined() {
    let (bench, source) = (Bench::new(), Gated::new(40, 0, 1));
    let device = bench.device(&source);
    let first = bench.prefetch(&device, &[], true);
    eventually("its request", || source.log(Class::Prefetch).len() == 1);
    let second = bench.prefetch(&device, &[units(0, 10)], false);
    let reader = read(&device, units(1, 2));
    settle();

    drop(first);

    assert!(answer(&reader).is_ok(), "a reader who waited for the stream");
    source.streams.add_permits(1000);
    assert_eq!(ended(&second), PrefetchState::Done);
    assert!(!device.present(units(10, 40)));
}

#[test]
fn a_trace_hears_of_readers_and_not_of_prefetch_and_keeps_a_device_unsettled() {
    let (bench, source) = (Bench::new(), Gated::new(10, 1000, 1000));
    let device = bench.device(&source);
    let trace = Arc::new(Trace::new(1));
    let settled = Arc::new(AtomicBool::new(false));
    device.start_trace(&trace, 0);
    device.on_complete(Box::new({
        let settled = settled.clone();
        move || settled.store(true, Ordering::SeqCst)
    }));

    fill_blocking(&*device, units(5, 6)).unwrap();
    assert_eq!(ended(&bench.prefetch(&device, &[], true)), PrefetchState::Done);
    device.touched(units(2, 3));

    let want = |decoded| Want { device: 0, decoded };
    assert_eq!(trace.recorded().reads, [want(units(5, 6)), want(units(2, 3))]);
    assert!(device.is_complete_durable() && !device.is_settled() && !settled.load(Ordering::SeqCst));
    device.stop_trace(&trace);
    assert!(device.is_settled() && settled.load(Ordering::SeqCst));
    device.touched(units(3, 4));
    assert_eq!(trace.recorded().reads.len(), 2);
}
