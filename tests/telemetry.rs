//! What the cache counts on the way of a miss: each part of its time, each way to end.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rafsd::base::{BLOCK, BlobId, ByteRange, Class, RequestId};
use rafsd::blob::{Unit, UnitMap};
use rafsd::cache::{Device, Engine, Fill, FillError, Request, Sink, StoreOptions, fill_blocking};
use rafsd::source::{BlobSource, BoxFuture, ReadCtx, SourceError};
use rafsd::telemetry::{Cause, Telemetry};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

/// Units of one block each, of these bytes over and over.
fn block(number: u64) -> Vec<u8> {
    vec![u8::try_from(number).unwrap(); usize::try_from(BLOCK).unwrap()]
}

fn map(units: u64) -> UnitMap {
    let unit = |number| Unit::plain(number * BLOCK, &block(number)).unwrap();
    UnitMap::new("blob".parse().unwrap(), units * BLOCK, (0..units).map(unit).collect()).unwrap()
}

fn unit(number: u64) -> ByteRange {
    ByteRange::new(number * BLOCK, (number + 1) * BLOCK).unwrap()
}

struct Nowhere;

impl Sink for Nowhere {
    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What a read of the scripted source is told.
enum Reply {
    Right,
    Wrong,
    Refused,
}

/// A source whose every read waits for the test to reply.
struct Scripted(Mutex<Sender<(ByteRange, RequestId, oneshot::Sender<Reply>)>>);

impl BlobSource for Scripted {
    fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        unreachable!("nobody asks")
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        let (reply, replied) = oneshot::channel();
        self.0.lock().unwrap().send((stored, ctx.request, reply)).unwrap();
        Box::pin(async move {
            match replied.await {
                Ok(Reply::Right) => {
                    Ok((stored.start() / BLOCK..stored.end() / BLOCK).flat_map(block).collect::<Vec<_>>().into())
                }
                Ok(Reply::Wrong) => Ok(vec![255; usize::try_from(stored.len()).unwrap()].into()),
                Ok(Reply::Refused) => {
                    Err(SourceError::Refused { blob: blob.clone(), place: "here".to_owned(), status: 403 })
                }
                Err(_) => std::future::pending().await,
            }
        })
    }

    fn describe(&self) -> String {
        "here".to_owned()
    }
}

struct Bench {
    _runtime: Runtime,
    telemetry: Telemetry,
    device: Arc<Device>,
    reads: Receiver<(ByteRange, RequestId, oneshot::Sender<Reply>)>,
}

impl Bench {
    /// One device of eight units over a source that one reader at a time may ask.
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let options = StoreOptions { readahead_first: 0, fetches: 1, decode_threads: 1, ..StoreOptions::default() };
        let telemetry = Telemetry::default();
        let engine = Engine::counted(options, runtime.handle().clone(), telemetry.clone()).unwrap();
        let (tell, reads) = channel();
        let source = Arc::new(Scripted(Mutex::new(tell)));
        let device = Device::with_sink(map(8), source, Box::new(Nowhere), &[], engine);
        Self { _runtime: runtime, telemetry, device, reads }
    }

    /// Asks for a unit as a reader of that number does.
    fn ask(&self, number: u64, id: u64) -> (Request, Receiver<Result<(), FillError>>) {
        let request = Request::new(RequestId::new(id), Class::OnDemand);
        let (tell, told) = channel();
        self.device.fill_for(request.clone(), unit(number), Box::new(move |outcome| tell.send(outcome).unwrap()));
        (request, told)
    }

    /// The next read of the source.
    fn read(&self) -> (ByteRange, RequestId, oneshot::Sender<Reply>) {
        self.reads.recv_timeout(Duration::from_secs(20)).expect("a read of the source")
    }

    fn reply(&self, reply: Reply) {
        assert!(self.read().2.send(reply).is_ok(), "the read was given up");
    }
}

fn outcome(told: &Receiver<Result<(), FillError>>) -> Result<(), FillError> {
    told.recv_timeout(Duration::from_secs(20)).expect("every fill is answered")
}

#[test]
fn queueing_is_told_from_service() {
    let bench = Bench::new();
    let (first, first_told) = bench.ask(0, 11);
    let (second, second_told) = bench.ask(7, 12);
    let (range, request, reply) = bench.read();
    assert_eq!((range, request), (unit(0), RequestId::new(11)));
    assert!(bench.reads.try_recv().is_err(), "the second waits for the only slot");
    let (queued, served) = second.split();
    assert!(served.is_zero() && !queued.is_zero());
    let held = Duration::from_millis(30);
    std::thread::sleep(held);

    reply.send(Reply::Right).ok().unwrap();
    outcome(&first_told).unwrap();
    let (range, request, reply) = bench.read();
    assert_eq!((range, request), (unit(7), RequestId::new(12)));
    reply.send(Reply::Right).ok().unwrap();
    outcome(&second_told).unwrap();

    let (first, second) = (first.split(), second.split());
    assert!(first.1 >= held, "the first was served for as long as its read was held: {first:?}");
    assert!(second.0 >= held, "and the second queued: {second:?}");
    let fills = &bench.telemetry.fills;
    let (queue, fetch) = (fills.queue.snapshot(), fills.fetch.at(Class::OnDemand).snapshot());
    assert_eq!((queue.count(), fetch.count()), (2, 2));
    assert!(queue.sum >= held && fetch.sum >= held, "{queue:?} {fetch:?}");
    assert_eq!(fills.fetch.at(Class::Prefetch).snapshot().count(), 0);
    assert_eq!(fills.misses.at(Class::OnDemand).get(), 2);
    assert_eq!(fills.filled.at(Class::OnDemand).get(), 2);
    assert_eq!(fills.filled_bytes.at(Class::OnDemand).get(), 2 * BLOCK);
    assert_eq!(fills.failed.sum(), 0);
}

#[test]
fn every_unit_that_does_not_come_is_counted_by_its_cause() {
    let bench = Bench::new();
    let fills = &bench.telemetry.fills;
    let failed = |cause| fills.failed.at(cause).get();

    let (_, told) = bench.ask(0, 1);
    bench.reply(Reply::Refused);
    assert!(matches!(outcome(&told), Err(FillError::Source { .. })));
    assert_eq!(failed(Cause::Source), 1);
    assert!(bench.device.is_failing());

    let (_, told) = bench.ask(1, 2);
    bench.reply(Reply::Wrong);
    bench.reply(Reply::Wrong);
    assert!(matches!(outcome(&told), Err(FillError::Corrupt { .. })));
    assert_eq!((failed(Cause::Corrupt), fills.refetched.get()), (1, 1));
    // The second attempt is no new queueing of the same reader.
    assert_eq!(fills.queue.snapshot().count(), 2);

    let behind = ByteRange::new(8 * BLOCK, 9 * BLOCK).unwrap();
    assert!(matches!(fill_blocking(&*bench.device, behind), Err(FillError::Unmapped { .. })));
    assert_eq!(failed(Cause::Unmapped), 1);

    let (_, told) = bench.ask(1, 3);
    bench.reply(Reply::Right);
    outcome(&told).unwrap();
    assert!(!bench.device.is_failing(), "one came");
    let health = bench.device.health();
    let by_cause: Vec<_> = health.failed.iter().filter(|(_, count)| *count > 0).copied().collect();
    assert_eq!(by_cause, [(Cause::Source, 1), (Cause::Corrupt, 1), (Cause::Unmapped, 1)]);
    assert_eq!((health.needed_bytes, health.present_bytes), (8 * BLOCK, BLOCK));
    assert!(health.last_failure.unwrap().text.contains("has nothing at"));
    assert_eq!(health.sources, ["here"]);
}

#[test]
fn who_waits_is_told_while_they_wait_and_cancelling_is_counted() {
    let bench = Bench::new();
    let (first, first_told) = bench.ask(3, 1);
    let (_, second_told) = bench.ask(3, 2);
    let held = bench.read();

    let (waiting, since) = bench.device.waiting();
    assert_eq!((waiting, since), (2, Some(first.asked())));

    let Bench { telemetry, device, _runtime, reads: _reads } = bench;
    drop(device);
    for told in [first_told, second_told] {
        assert!(matches!(outcome(&told), Err(FillError::Cancelled)));
    }
    assert_eq!(telemetry.fills.failed.at(Cause::Cancelled).get(), 1, "one unit, however many waited");
    drop(held);
}
