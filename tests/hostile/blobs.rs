//! Blobs with flipped bits and missing ends, and servers that fail: each unit has its bytes or its
//! read fails with an error that says where, and all is well when the fault is gone.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rafsd::base::{BlobId, ByteRange};
use rafsd::blob::{Check, Recipe, Unit, UnitMap};
use rafsd::net::server::{BlobServer, Fault, ServerOptions};
use rafsd::net::{ClientOptions, RetryPolicy};
use rafsd::source::{BlobSource, BoxFuture, LocalSource, ReadCtx, SourceError};

use super::mutation::{Mutation, for_each_case};
use super::sample::{KITS, Sample, index};
use super::served::{Bench, Served};
use super::support::tree::Random;

/// A device of the sample, from a source that is about to fail.
fn device(bench: &Bench, sample: &Sample, source: &Arc<dyn BlobSource>) -> Served {
    bench.device(sample.map.clone(), Arc::clone(source))
}

/// Number of units whose stored bytes hold the byte at `offset`.
fn hit(sample: &Sample, offset: usize) -> usize {
    let holds = |unit: &&Unit| (index(unit.stored.start())..index(unit.stored.end())).contains(&offset);
    sample.map.units().iter().filter(holds).count()
}

#[test]
fn a_flipped_bit_anywhere_in_a_blob_costs_its_unit_only() {
    for (seed, kit) in (50..).zip(KITS) {
        let sample = Sample::new(kit);
        let mut random = Random::new(seed);
        let len = sample.stored.len() as u64;
        let mut flip = || Mutation::Flip { at: index(random.below(len)), bit: random.next().to_le_bytes()[0] % 8 };
        let cases: Vec<_> = (0..150).map(|_| flip()).collect();
        let bench = Bench::new(Duration::from_secs(10));
        let source: Arc<dyn BlobSource> = Arc::new(LocalSource::new(sample.blobs()).unwrap());
        let path = sample.blobs().join(sample.blob.as_str());
        for_each_case("flipped blob", cases, move |case| {
            let Mutation::Flip { at, .. } = case else { unreachable!("only flips were made") };
            fs::write(&path, case.of(&sample.stored)).unwrap();
            let served = device(&bench, &sample, &source);

            let outcome = served.fill_and_judge(&sample.device);
            // A codec may leave a bit unused, so that the unit still decodes to the right bytes.
            assert!(outcome.failed.len() <= hit(&sample, *at), "{outcome:?}");

            fs::write(&path, &sample.stored).unwrap();
            assert!(served.fill_and_judge(&sample.device).failed.is_empty(), "the fault is gone");
        });
    }
}

#[test]
fn a_blob_that_ends_early_costs_the_units_behind_its_end() {
    let sample = Sample::new(KITS[0]);
    let mut random = Random::new(60);
    let len = sample.stored.len();
    let mut cuts = vec![0, 1, len - 4097, len - 4096, len - 1];
    for unit in sample.map.units() {
        let end = index(unit.stored.end());
        cuts.extend([end - 1, end, end + 1]);
    }
    cuts.extend((0..50).map(|_| index(random.below(len as u64))));
    let cases: Vec<_> = cuts.into_iter().map(|len| Mutation::Cut { len }).collect();
    let bench = Bench::new(Duration::from_secs(10));
    let source: Arc<dyn BlobSource> = Arc::new(LocalSource::new(sample.blobs()).unwrap());
    let path = sample.blobs().join(sample.blob.as_str());
    for_each_case("cut blob", cases, move |case| {
        let Mutation::Cut { len } = case else { unreachable!("only cuts were made") };
        fs::write(&path, case.of(&sample.stored)).unwrap();
        let served = device(&bench, &sample, &source);

        let outcome = served.fill_and_judge(&sample.device);
        let behind = sample.map.units().iter().filter(|unit| index(unit.stored.end()) > *len).count();
        assert_eq!(outcome.failed.len(), behind, "{outcome:?}");

        fs::write(&path, &sample.stored).unwrap();
        assert!(served.fill_and_judge(&sample.device).failed.is_empty(), "the fault is gone");
    });
}

/// Two attempts, almost without a pause.
const QUICK: RetryPolicy =
    RetryPolicy { attempts: 2, first_delay: Duration::from_millis(1), max_delay: Duration::from_millis(1) };

fn http(server: &BlobServer) -> Arc<dyn BlobSource> {
    Arc::new(rafsd::source::http(&server.url(), &ClientOptions::default(), QUICK).unwrap())
}

#[test]
fn a_byte_that_a_server_spoils_costs_its_unit_only() {
    let sample = Sample::new(KITS[3]);
    let mut random = Random::new(70);
    let data = index(sample.map.units().iter().map(|unit| unit.stored.end()).max().unwrap());
    let cases: Vec<_> = (0..40).map(|_| index(random.below(data as u64))).collect();
    let bench = Bench::new(Duration::from_secs(10));
    let server = BlobServer::start(sample.blobs(), ServerOptions::default()).unwrap();
    let source = http(&server);
    for_each_case("byte spoilt by the server", cases, move |offset| {
        server.set_fault(Fault::FlipByte { blob: sample.blob.to_string(), offset: *offset as u64 });
        let served = device(&bench, &sample, &source);

        let outcome = served.fill_and_judge(&sample.device);
        assert_eq!(outcome.failed.len(), hit(&sample, *offset), "{outcome:?}");

        server.set_fault(Fault::None);
        assert!(served.fill_and_judge(&sample.device).failed.is_empty(), "the fault is gone");
    });
}

#[test]
fn servers_that_break_the_protocol_give_errors_and_never_bytes() {
    let sample = Sample::new(KITS[2]);
    let cases = vec![
        Fault::Status { code: 500, retry_after: None },
        Fault::Status { code: 404, retry_after: None },
        Fault::Status { code: 403, retry_after: None },
        Fault::Status { code: 200, retry_after: None },
        Fault::Status { code: 206, retry_after: None },
        Fault::Redirect { location: "/elsewhere".into() },
        Fault::Cut { after: 0 },
        Fault::Cut { after: 4095 },
        Fault::Reset { after: 0 },
        Fault::Reset { after: 5000 },
        Fault::IgnoreRange,
        Fault::WrongContentRange,
        Fault::Surplus { bytes: 1 },
        Fault::Encoded,
    ];
    let units = sample.map.units().len();
    let bench = Bench::new(Duration::from_secs(10));
    let server = BlobServer::start(sample.blobs(), ServerOptions::default()).unwrap();
    let source = http(&server);
    for_each_case("server fault", cases, move |fault| {
        server.set_fault(fault.clone());
        let served = device(&bench, &sample, &source);

        let outcome = served.fill_and_judge(&sample.device);
        // A small unit may fit in front of the cut.
        let through = matches!(fault, Fault::Cut { after } | Fault::Reset { after } if *after > 0);
        assert!(outcome.failed.len() == units || through && !outcome.failed.is_empty(), "{outcome:?}");

        server.set_fault(Fault::None);
        assert!(served.fill_and_judge(&sample.device).failed.is_empty(), "the fault is gone");
    });
}

#[test]
fn sources_that_stall_or_are_gone_fail_by_the_deadline() {
    const DEADLINE: Duration = Duration::from_millis(300);
    let sample = Sample::of_noise(20_000, 5);
    let cases = vec![Fault::StallHead, Fault::Stall { after: 0 }, Fault::Stall { after: 6000 }];
    let bench = Bench::new(DEADLINE);
    let server = BlobServer::start(sample.blobs(), ServerOptions::default()).unwrap();
    let source = http(&server);
    assert_eq!(sample.map.units().len(), 1);
    for_each_case("stalling server", cases, move |fault| {
        server.set_fault(fault.clone());
        let served = device(&bench, &sample, &source);

        let clock = Instant::now();
        let outcome = served.fill_and_judge(&sample.device);
        // Asked for twice, one after the other.
        assert!(clock.elapsed() < DEADLINE * 2 + Duration::from_millis(700), "{:?}", clock.elapsed());
        assert_eq!(outcome.failed.len(), 1);

        server.set_fault(Fault::None);
        assert!(served.fill_and_judge(&sample.device).failed.is_empty(), "the fault is gone");
    });

    let sample = Sample::of_noise(20_000, 5);
    let bench = Bench::new(DEADLINE);
    let server = BlobServer::start(sample.blobs(), ServerOptions::default()).unwrap();
    let source = http(&server);
    server.stop();
    let clock = Instant::now();
    assert_eq!(device(&bench, &sample, &source).fill_and_judge(&sample.device).failed.len(), 1);
    assert!(clock.elapsed() < DEADLINE * 2 + Duration::from_millis(700), "{:?}", clock.elapsed());
}

/// Has nothing, and remembers the longest read it was asked for.
#[derive(Default)]
struct Nothing {
    longest: AtomicU64,
}

impl BlobSource for Nothing {
    fn len<'a>(&'a self, blob: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(async { Err(SourceError::NotFound { blob: blob.clone(), place: self.describe() }) })
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        _: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        self.longest.fetch_max(stored.len(), Ordering::Relaxed);
        Box::pin(async { Err(SourceError::NotFound { blob: blob.clone(), place: self.describe() }) })
    }

    fn describe(&self) -> String {
        "nowhere".into()
    }
}

/// Units of one stored byte each would all fit in one window, and each costs hundreds of bytes of
/// memory on its way.
#[test]
fn prefetch_takes_a_bounded_number_of_units_at_once_however_small_they_are() {
    let unit = |number| Unit {
        decoded: ByteRange::at(number * 4096, 4096).unwrap(),
        stored: ByteRange::at(number, 1).unwrap(),
        recipe: Recipe::Lz4Block,
        check: Check::Blake3([7; 32]),
        part: None,
        encrypted: false,
    };
    let map = UnitMap::new("a".parse().unwrap(), 10_000 * 4096, (0..10_000).map(unit).collect()).unwrap();
    let bench = Bench::new(Duration::from_secs(10));
    let source = Arc::<Nothing>::default();
    let served = bench.device(map, source.clone());

    served.device.complete_in_background();
    let clock = Instant::now();
    // The first batch is enough: whether others follow after such an error is another matter.
    while served.device.stats().errors == 0 {
        assert!(clock.elapsed() < Duration::from_secs(10), "{:?}", served.device);
        std::thread::yield_now();
    }

    let longest = source.longest.load(Ordering::Relaxed);
    assert!((1..=4096).contains(&longest), "{longest} units at once");
}
