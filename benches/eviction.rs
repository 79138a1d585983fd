//! What the eviction of a large blob does to somebody who reads another one.
//!
//! A reader of a mounted image does two things to the cache: it reads what is there, and it has
//! fetched what is not. Both are timed here, on the disk of `RAFSD_TEST_DIR` (or `/var/tmp`), for a
//! while in peace and then while a blob of 1 GiB goes. In one run, because only the ratio means
//! anything.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rafsd::base::{BlobId, ByteRange};
use rafsd::blob::{Check, Recipe, Unit, UnitMap};
use rafsd::cache::{Device, Fill, Store, StoreOptions, fill_blocking};
use rafsd::source::{BlobSource, BoxFuture, ReadCtx, SourceError};

const GIB: u64 = 1 << 30;
const LARGE: u64 = 1 << 20;
const SMALL: u64 = 16 << 10;

/// Every byte of every blob: units cost nothing to make.
struct Sevens;

impl BlobSource for Sevens {
    fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(async { Ok(u64::MAX) })
    }

    fn read<'a>(&'a self, _: &'a BlobId, range: ByteRange, _: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move { Ok(vec![7; usize::try_from(range.len()).expect("a window")].into()) })
    }

    fn describe(&self) -> String {
        "sevens".to_owned()
    }
}

fn map(name: &str, len: u64, unit: u64) -> UnitMap {
    let check = Check::Crc32c(rafsd::codec::crc32c(&vec![7; usize::try_from(unit).expect("a unit")]));
    let units = (0..len / unit).map(|number| {
        let range = ByteRange::at(number * unit, unit).expect("far from the end");
        Unit { decoded: range, stored: range, recipe: Recipe::Plain, check, part: None, encrypted: false }
    });
    UnitMap::new(name.parse().expect("a name"), len, units.collect()).expect("a map")
}

/// Times of the two things, while `go_on` says so.
fn read(device: &Device, file: &File, cold: &mut u64, go_on: impl Fn() -> bool) -> [Vec<Duration>; 2] {
    let (mut hits, mut misses) = (Vec::new(), Vec::new());
    let mut page = [0; 4096];
    while go_on() && *cold < GIB / SMALL {
        let begin = Instant::now();
        fill_blocking(device, ByteRange::at(*cold * SMALL, SMALL).expect("in the blob")).expect("a fill");
        misses.push(begin.elapsed());
        *cold += 1;
        for back in 1..=4 {
            let begin = Instant::now();
            file.read_exact_at(&mut page, cold.saturating_sub(back) * SMALL).expect("what was just filled");
            hits.push(begin.elapsed());
        }
    }
    [hits, misses]
}

fn row(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: usize| times.get(times.len().saturating_sub(1) * part / 1000).copied().unwrap_or_default();
    println!(
        "{name:<24} {:>8} p50 {:>9.1?} p99 {:>9.1?} p99.9 {:>9.1?} max {:>9.1?}",
        times.len(),
        at(500),
        at(990),
        at(999),
        at(1000)
    );
}

fn main() {
    let base = std::env::var_os("RAFSD_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let root = tempfile::tempdir_in(base).expect("a directory");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let options = StoreOptions { readahead_first: 0, scrub_rate: 0, ..StoreOptions::default() };
    let store = Store::open(root.path(), options, runtime.handle().clone()).expect("a store");
    store.say_uses_are_known();

    let large = store.device(map("large", GIB, LARGE), Arc::new(Sevens)).expect("a device");
    fill_blocking(&*large, ByteRange::new(0, large.decoded_len()).expect("a range")).expect("a fill");
    large.flush().expect("a flush");
    let took = std::fs::metadata(large.data_path().expect("a file")).expect("there").blocks() * 512;
    drop(large);

    let device = store.device(map("read", GIB, SMALL), Arc::new(Sevens)).expect("a device");
    let file = device.open_data().expect("a file");
    let mut cold = 0;
    let until = Instant::now() + Duration::from_secs(5);
    let peace = read(&device, &file, &mut cold, || Instant::now() < until);

    let ended = AtomicBool::new(false);
    let (evicted, during) = std::thread::scope(|scope| {
        let evicting = scope.spawn(|| {
            let begin = Instant::now();
            store.shelves().remove("large").expect("nobody uses it");
            let elapsed = begin.elapsed();
            // What the journal has left to do is part of it.
            std::thread::sleep(Duration::from_millis(500));
            ended.store(true, Ordering::SeqCst);
            elapsed
        });
        let during = read(&device, &file, &mut cold, || !ended.load(Ordering::SeqCst));
        (evicting.join().expect("it ran"), during)
    });

    println!("{} MiB evicted in {evicted:.1?}", took >> 20);
    for (name, times) in ["hits in peace", "misses in peace"].into_iter().zip(peace) {
        row(name, times);
    }
    for (name, times) in ["hits while it goes", "misses while it goes"].into_iter().zip(during) {
        row(name, times);
    }
}
