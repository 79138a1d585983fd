//! Spoilt tables of blobs: whatever is accepted brings the right bytes or an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rafsd::format::blobfile::Header;
use rafsd::image::Image;
use rafsd::source::{BlobSource, LocalSource};

use super::allocations::peak_of;
use super::mutation::{Mutation, flips, for_each_case, odd_value};
use super::sample::{KITS, Kit, Sample};
use super::served::Bench;
use super::support::tree::Random;

/// Where a case spoils something.
#[derive(Clone, Debug)]
enum Spoilt {
    Bootstrap(Mutation),
    Blob(Mutation),
}

/// Runs the cases, and gives how many were refused before a mount, how many lost units, and how
/// many made no difference.
fn check(kit: Kit, pick: impl FnOnce(&Sample) -> Vec<Spoilt>) -> [usize; 3] {
    let sample = Sample::new(kit);
    let cases = pick(&sample);
    let counts: Arc<[AtomicUsize; 3]> = Arc::default();
    let bench = Bench::new(Duration::from_secs(10));
    let source: Arc<dyn BlobSource> = Arc::new(LocalSource::new(sample.blobs()).unwrap());
    let path = sample.blobs().join(sample.blob.as_str());
    let tally = Arc::clone(&counts);
    for_each_case("spoilt tables", cases, move |case| {
        let (bootstrap, stored) = match case {
            Spoilt::Bootstrap(mutation) => (mutation.of(&sample.bootstrap), sample.stored.clone()),
            Spoilt::Blob(mutation) => (sample.bootstrap.clone(), mutation.of(&sample.stored)),
        };
        // In place and back again below: sources keep files open.
        std::fs::write(&path, &stored).unwrap();
        let prepare = || bench.prepare(&Image::parse(bootstrap)?, &*source);
        let (map, peak) = peak_of(prepare);
        assert!(peak < 4 << 20, "{peak} bytes of memory");
        let kind = match map {
            Err(_) => 0,
            Ok(map) => {
                let outcome = bench.device(map, Arc::clone(&source)).fill_and_judge(&sample.device);
                if outcome.failed.is_empty() { 2 } else { 1 }
            }
        };
        tally[kind].fetch_add(1, Ordering::Relaxed);
    });
    [0, 1, 2].map(|kind: usize| counts[kind].load(Ordering::Relaxed))
}

fn pick(random: &mut Random, all: &[Mutation]) -> Mutation {
    all[usize::try_from(random.below(all.len() as u64)).unwrap()].clone()
}

fn regions(sample: &Sample, name: &str) -> Vec<std::ops::Range<usize>> {
    sample.regions().into_iter().filter(|region| region.name == name).map(|region| region.bytes()).collect()
}

#[test]
fn every_bit_of_the_blob_table_may_flip() {
    let [refused, lossy, harmless] =
        check(KITS[0], |sample| flips(regions(sample, "blob entry").remove(0)).map(Spoilt::Bootstrap).collect());
    assert!(refused > 500 && lossy >= 1 && harmless > 500, "{refused} {lossy} {harmless}");
}

#[test]
fn bits_and_fields_of_the_chunk_table_may_be_anything() {
    for (seed, kit) in (20..).zip(KITS) {
        let [refused, lossy, harmless] = check(kit, |sample| {
            let range = regions(sample, "chunk record").remove(0);
            let all: Vec<_> = flips(range.clone()).collect();
            let mut random = Random::new(seed);
            let mut cases: Vec<_> = (0..250).map(|_| Spoilt::Bootstrap(pick(&mut random, &all))).collect();
            let mut odd = || odd_value(&mut random, range.clone(), &sample.bootstrap);
            cases.extend((0..100).map(|_| Spoilt::Bootstrap(odd())));
            cases
        });
        assert!(refused > 50 && lossy > 50 && harmless > 10, "{refused} {lossy} {harmless}");
    }
}

#[test]
fn bits_and_fields_of_the_blobs_own_tables_may_be_anything() {
    for (seed, kit) in (30..).zip(KITS) {
        let [refused, lossy, harmless] = check(kit, |sample| {
            let header = sample.stored.len() - size_of::<Header>();
            let data_end = sample.map.units().iter().map(|unit| unit.stored.end()).max().unwrap();
            let array = usize::try_from(data_end).unwrap()..header;
            let bits: Vec<_> = flips(array.clone()).collect();
            let mut random = Random::new(seed);
            let mut cases: Vec<_> = flips(header..header + 64).step_by(3).map(Spoilt::Blob).collect();
            cases.extend((0..200).map(|_| Spoilt::Blob(pick(&mut random, &bits))));
            let mut odd = |range| Spoilt::Blob(odd_value(&mut random, range, &sample.stored));
            cases.extend((0..60).map(|_| odd(array.clone())));
            cases.extend((0..60).map(|_| odd(header..header + 64)));
            cases
        });
        assert_eq!(lossy, 0, "geometry is compared with the image before anything is mounted");
        assert!(refused > 150 && harmless > 20, "{refused} {harmless}");
    }
}

#[test]
fn one_field_of_each_table_may_agree_with_another_lie() {
    for (seed, kit) in (40..).zip(KITS) {
        check(kit, |sample| {
            let header = sample.stored.len() - size_of::<Header>();
            let tables = [regions(sample, "blob entry").remove(0), regions(sample, "chunk record").remove(0)];
            let mut random = Random::new(seed);
            let mut odd = |range| Box::new(odd_value(&mut random, range, &sample.bootstrap));
            let both = |(first, second)| Spoilt::Bootstrap(Mutation::Both(first, second));
            let mut cases: Vec<_> =
                (0..200).map(|n| both((odd(tables[n % 2].clone()), odd(tables[0].clone())))).collect();
            cases.extend((0..50).map(|_| both((odd(tables[1].clone()), odd(tables[1].clone())))));
            cases.push(Spoilt::Blob(Mutation::Cut { len: header }));
            cases
        });
    }
}
