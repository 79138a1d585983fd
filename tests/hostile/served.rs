//! A device in memory, filled by the real cache from a real source, and the judgement of it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rafsd::base::{BlobId, ByteRange, Chain, Class};
use rafsd::blob::{BlobTables, UnitMap};
use rafsd::cache::{Device, Engine, Fill, FillError, Sink, StoreOptions, fill_blocking};
use rafsd::image::Image;
use rafsd::source::{BlobSource, ReadCtx};
use tokio::runtime::Runtime;

use super::sample::index;

/// The pieces that many devices share.
pub(super) struct Bench {
    pub(super) runtime: Runtime,
    engine: Arc<Engine>,
}

/// Options without read-ahead, which would make the outcome of a fill depend on earlier ones.
pub(super) fn options() -> StoreOptions {
    // Each fault is looked at alone, right after the one before.
    StoreOptions {
        readahead_first: 0,
        decode_threads: 2,
        memory: 16 << 20,
        late: Duration::ZERO,
        ..StoreOptions::default()
    }
}

impl Bench {
    pub(super) fn new(deadline: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let engine = Engine::new(StoreOptions { deadline, ..options() }, runtime.handle().clone()).unwrap();
        Self { runtime, engine }
    }

    /// The unit map of the image's first device, as the daemon makes it: everything that can go
    /// wrong before a mount.
    pub(super) fn prepare(
        &self,
        image: &Image,
        source: &dyn BlobSource,
    ) -> Result<UnitMap, Box<dyn std::error::Error>> {
        let device = image.devices().first().ok_or("no device")?;
        let tables = BlobTables::new(&device.entry)?;
        let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(5));
        let stored = self.runtime.block_on(source.read(&device.blob, tables.stored(), ctx))?;
        Ok(tables.with_digests(tables.geometry(&stored)?, image.chunk_records().iter())?)
    }

    pub(super) fn device(&self, map: UnitMap, source: Arc<dyn BlobSource>) -> Served {
        let sink = Memory::default();
        let device = Device::with_sink(map, source, Box::new(sink.clone()), &[], Arc::clone(&self.engine));
        Served { device, sink }
    }
}

/// A file that remembers what was written, block by block.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<HashMap<u64, Vec<u8>>>>);

const BLOCK: usize = 4096;

impl Sink for Memory {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        assert!(at.is_multiple_of(4096) && bytes.len().is_multiple_of(BLOCK));
        let mut blocks = self.0.lock().unwrap();
        for (number, block) in (at / 4096..).zip(bytes.chunks(BLOCK)) {
            blocks.insert(number, block.to_vec());
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A device with its bytes.
pub(super) struct Served {
    pub(super) device: Arc<Device>,
    sink: Memory,
}

/// Units that came and units that did not.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) right: u32,
    pub(super) failed: Vec<(u32, FillError)>,
}

impl Served {
    /// Fills everything, then asks for each unit that is still missing by itself. A unit is
    /// either present with the bytes of `device` or its fill fails.
    ///
    /// # Panics
    /// If a unit is present with other bytes, or an error does not say what it is about.
    pub(super) fn fill_and_judge(&self, device: &[u8]) -> Outcome {
        let mut outcome = Outcome::default();
        let map = self.device.map();
        let (tx, rx) = std::sync::mpsc::channel();
        // All at once first, which is how neighbours get into one request.
        for unit in map.units() {
            let tx = tx.clone();
            self.device.fill(unit.blocks(), Class::OnDemand, Box::new(move |outcome| tx.send(outcome).unwrap()));
        }
        map.units()
            .iter()
            .for_each(|_| drop(rx.recv_timeout(Duration::from_secs(20)).expect("every fill is answered")));
        for (number, unit) in (0..).zip(map.units()) {
            if !self.device.present(unit.blocks())
                && let Err(error) = fill_blocking(&*self.device, unit.blocks())
            {
                assert_names_the_place(&error, map.blob(), number, unit.stored);
                assert!(!self.device.present(unit.blocks()), "a unit that failed is absent");
                outcome.failed.push((number, error));
                continue;
            }
            outcome.right += 1;
            self.assert_right(device, unit.blocks(), number);
        }
        outcome
    }

    fn assert_right(&self, device: &[u8], blocks: ByteRange, unit: u32) {
        let written = self.sink.0.lock().unwrap();
        for number in blocks.start() / 4096..blocks.end() / 4096 {
            let at = index(number) * BLOCK;
            let right = device.get(at..at + BLOCK);
            assert!(written.get(&number).map(Vec::as_slice) == right, "unit {unit}: block {number} is wrong");
        }
    }
}

/// A failed read is found in the log by blob, unit and place in the stored blob.
fn assert_names_the_place(error: &FillError, blob: &BlobId, unit: u32, stored: ByteRange) {
    let text = Chain(error).to_string();
    let place = format!("unit {unit} of blob {blob} at stored {stored}");
    assert!(text.contains(&place), "{text:?} does not name {place:?}");
    assert_eq!(error.errno(), libc::EIO, "{text}");
}
