//! Spoilt state of a cache directory, found at the next start: right bytes or another fetch.
//!
//! `units` and `present` guard themselves. Flips in `data` are outside of the promise: those bytes
//! were checked when they came, and what a disk does to them afterwards is the disk's to notice.
//! A `data` of another length, or none, is inside.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rafsd::cache::{Device, Fill, Store, StoreError, fill_blocking};
use rafsd::source::{BlobSource, LocalSource};
use tempfile::TempDir;

use super::mutation::{Mutation, flips, for_each_case};
use super::sample::{KITS, Sample, index};
use super::served::{Bench, options};
use super::support::tree::Random;

/// A cache with every other unit of the sample in it, and the sample.
struct Cache {
    root: TempDir,
    bench: Bench,
    sample: Sample,
    source: Arc<dyn BlobSource>,
    /// `units` and `present` as they were saved.
    units: Vec<u8>,
    present: Vec<u8>,
    /// The device with garbage for the absent units, so that a false bit is seen.
    data: Vec<u8>,
}

impl Cache {
    fn new() -> Self {
        let sample = Sample::new(KITS[0]);
        // Memory, where there is some: every case syncs several files.
        let root = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let source: Arc<dyn BlobSource> = Arc::new(LocalSource::new(sample.blobs()).unwrap());
        let mut cache = Self {
            root,
            bench: Bench::new(options().deadline),
            data: sample.device.clone(),
            sample,
            source,
            units: Vec::new(),
            present: Vec::new(),
        };
        let (store, device) = cache.open();
        for (number, unit) in cache.sample.map.units().iter().enumerate() {
            if number % 2 == 0 {
                fill_blocking(&*device, unit.blocks()).unwrap();
            } else {
                cache.data[index(unit.blocks().start())..index(unit.blocks().end())].fill(0xaa);
            }
        }
        device.flush().unwrap();
        drop((device, store));
        cache.units = fs::read(cache.file("units")).unwrap();
        cache.present = fs::read(cache.file("present")).unwrap();
        cache
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join("v1").join(self.sample.blob.as_str()).join(name)
    }

    /// What a daemon does at its start.
    fn open(&self) -> (Arc<Store>, Arc<Device>) {
        let store = open_store(self.root.path(), &self.bench);
        let map = store.saved_map(&self.sample.blob).unwrap_or_else(|| self.sample.map.clone());
        assert!(map == self.sample.map, "a saved map is the one that was saved or none");
        let device = store.device(map, Arc::clone(&self.source)).unwrap();
        (store, device)
    }

    /// Back to what was saved, in the same files: presence is bound to the identity of `data`.
    fn restore(&self) {
        for (name, bytes) in [("units", &self.units), ("present", &self.present), ("data", &self.data)] {
            overwrite(&self.file(name), bytes);
        }
        // As after a crash: nobody knows when what was changed.
        let _ = std::fs::remove_file(self.file("rest"));
    }

    /// Starts on what is there and compares every byte, before and after filling everything.
    /// Gives the number of units that were found present.
    fn start_and_judge(&self) -> usize {
        let (_store, device) = self.open();
        let units = self.sample.map.units();
        let file = device.open_data().unwrap();
        let present: Vec<_> = units.iter().filter(|unit| device.present(unit.blocks())).collect();
        present.iter().for_each(|unit| self.assert_right(&file, unit));
        for unit in units {
            fill_blocking(&*device, unit.blocks()).unwrap();
            self.assert_right(&file, unit);
        }
        present.len()
    }

    fn assert_right(&self, data: &File, unit: &rafsd::blob::Unit) {
        let range = index(unit.blocks().start())..index(unit.blocks().end());
        let mut bytes = vec![0; range.len()];
        data.read_exact_at(&mut bytes, unit.blocks().start()).unwrap();
        assert!(bytes == self.sample.device[range], "wrong bytes at {}", unit.decoded);
    }
}

/// Opens the store at `root`. The last jobs of the store before may keep it locked for a moment
/// longer, as they would not if this were another process after its end.
pub(super) fn open_store(root: &Path, bench: &Bench) -> Arc<Store> {
    let clock = Instant::now();
    loop {
        match Store::open(root, options(), bench.runtime.handle().clone()) {
            Err(StoreError::Locked { .. }) if clock.elapsed() < Duration::from_secs(5) => std::thread::yield_now(),
            outcome => return outcome.unwrap(),
        }
    }
}

fn overwrite(path: &Path, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

/// Flips and cuts of a file of `len` bytes.
fn spoilt(len: usize, seed: u64, flipped: usize) -> Vec<Mutation> {
    let mut random = Random::new(seed);
    let all: Vec<_> = flips(0..len).collect();
    let mut cases: Vec<_> = (0..flipped).map(|_| all[index(random.below(all.len() as u64))].clone()).collect();
    cases.extend((0..25).map(|_| Mutation::Cut { len: index(random.below(len as u64)) }));
    cases.extend([0, 1, 31, 32, 511, 512, 513, len - 1].map(|len| Mutation::Cut { len }));
    cases
}

#[test]
fn a_cache_that_nobody_touched_keeps_what_it_had() {
    let cache = Cache::new();
    let half = cache.sample.map.units().len().div_ceil(2);
    for _ in 0..2 {
        cache.restore();
        assert_eq!(cache.start_and_judge(), half);
    }
}

#[test]
fn spoilt_presence_is_absence() {
    let cache = Cache::new();
    for_each_case("spoilt presence", spoilt(cache.present.len(), 80, 200), move |case| {
        cache.restore();
        overwrite(&cache.file("present"), &case.of(&cache.present));
        assert_eq!(cache.start_and_judge(), 0, "all bits of the sample are in one page");
    });
}

#[test]
fn a_spoilt_unit_table_is_fetched_again_and_takes_presence_with_it() {
    let cache = Cache::new();
    for_each_case("spoilt units", spoilt(cache.units.len(), 81, 150), move |case| {
        // The spoilt start removed `present`, and may not have made another one yet.
        drop(File::create(cache.file("present")).unwrap());
        cache.restore();
        overwrite(&cache.file("units"), &case.of(&cache.units));
        assert_eq!(cache.start_and_judge(), 0);
    });
}

#[test]
fn a_data_file_of_another_length_or_none_is_made_anew() {
    let cache = Cache::new();
    let len = cache.data.len() as u64;
    let lengths = [0, 1, len - 4096, len - 1, len + 1, len + 4096];
    for_each_case("data of another length", lengths.into(), move |len| {
        // Each case leaves another inode, so presence has to be earned first.
        cache.start_and_judge();
        assert_eq!(cache.start_and_judge(), cache.sample.map.units().len());
        OpenOptions::new().write(true).open(cache.file("data")).unwrap().set_len(*len).unwrap();
        assert_eq!(cache.start_and_judge(), 0);

        fs::remove_file(cache.file("data")).unwrap();
        assert_eq!(cache.start_and_judge(), 0);
    });
}

#[test]
fn missing_and_exchanged_files_are_no_state_at_all() {
    let cache = Cache::new();
    let names = ["units", "present", "data"];
    for name in names {
        cache.start_and_judge();
        fs::remove_file(cache.file(name)).unwrap();
        assert_eq!(cache.start_and_judge(), 0, "without {name}");
        for other in names.iter().filter(|other| **other != name) {
            fs::copy(cache.file(other), cache.file(name)).unwrap();
            let found = cache.start_and_judge();
            assert_eq!(found, 0, "{other} as {name}");
        }
    }
}
