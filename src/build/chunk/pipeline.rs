use std::collections::{BTreeMap, HashMap};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::cut::MAX_INDEXED;
use super::{Cutter, Settings, Slot};
use crate::base::Digest;
use crate::build::blobwriter::{BlobWriter, Chunk};
use crate::build::{BuildError, Progress};
use crate::codec::{self, Compressor};
use crate::format::rafs::DigestAlgorithm;

/// A cut on its way to a worker.
pub(super) struct Job {
    pub cut: u64,
    pub slot: Slot,
}

/// What a worker tells the writer.
enum Report {
    Done(Done),
    /// The worker is unwinding, and its cut will never come.
    Panicked,
}

/// Reports a panic of the worker that owns it. Without it the writer would wait for ever for the
/// lost cut, and the reader for a slot.
struct Alarm<'a>(&'a Sender<Report>);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.send(Report::Panicked);
        }
    }
}

/// A cut on its way to the writer.
struct Done {
    cut: u64,
    slot: Slot,
    digest: Digest,
    crc32c: u32,
    outcome: Outcome,
}

#[derive(Clone, Copy)]
enum Outcome {
    /// `slot.packed` is what to store.
    Packed,
    /// Compression does not pay; `slot.plain()` is what to store.
    Plain,
    /// Another cut with the same bytes was seen first. If that one comes later in the input, the
    /// writer has to compress this one itself.
    Seen,
}

/// What came out at the far end.
#[derive(Debug)]
pub(in crate::build) struct Stored {
    pub blob: BlobWriter,
    /// The chunk that each cut became.
    pub chunk_of_cut: Vec<u32>,
    /// Bytes of files that were not stored again because an equal chunk was.
    pub deduplicated_bytes: u64,
}

/// Runs `feed` on this thread, with nothing behind it: the first [`REHEARSED`] cuts are read and
/// dropped, and one more is refused as by a pipeline that has failed. The room in the metadata is
/// almost used up from the start, so that huge holes do not take long. For fuzzing.
pub(in crate::build) fn rehearse<T>(chunk_size: u32, feed: impl FnOnce(&mut Cutter<'_>) -> T) -> T {
    let (free_slots, free) = mpsc::channel();
    for _ in 0..REHEARSED {
        free_slots.send(Slot::default()).expect("the receiver is in this function");
    }
    drop(free_slots);
    let (jobs, _todo) = mpsc::sync_channel(REHEARSED);
    let mut cutter = Cutter {
        chunk_size,
        free,
        jobs,
        progress: &(),
        next_cut: 0,
        zeros: HashMap::new(),
        indexed: MAX_INDEXED - 1024,
        hole_bytes: 0,
    };
    feed(&mut cutter)
}

/// Cuts of one rehearsal.
const REHEARSED: usize = 64;

/// Runs `feed` on this thread, with workers and a writer behind it, until everything it cut has
/// been stored in `blob`.
///
/// # Errors
/// The error of the writer if it has one, since that is why the feed stopped; else the feed's.
pub(in crate::build) fn run<T>(
    settings: Settings,
    blob: BlobWriter,
    progress: &dyn Progress,
    feed: impl FnOnce(&mut Cutter<'_>) -> Result<T, BuildError>,
) -> Result<(T, Stored), BuildError> {
    let workers = settings.workers.get();
    // Two for each worker keep it busy while the writer catches up; two more are being read into
    // and written out.
    let slots = 2 * workers + 2;
    let compressors = (0..=workers)
        .map(|_| settings.compression.compressor().map_err(BuildError::Compressor))
        .collect::<Result<Vec<_>, _>>()?;
    let seen = Seen::default();
    let (free_slots, free) = mpsc::channel();
    for _ in 0..slots {
        free_slots.send(Slot::default()).expect("the receiver is in this function");
    }
    let (jobs, todo) = mpsc::sync_channel(slots);
    let (results, done) = mpsc::channel();
    let todo = Mutex::new(todo);

    thread::scope(|scope| {
        let mut compressors = compressors.into_iter();
        let writer = compressors.next().map(|compressor| Writer { blob, compressor, free_slots, seen: &seen });
        let writer = writer.expect("one compressor more than workers");
        let writer = scope.spawn(move || writer.drain(&done));
        for compressor in compressors {
            let (results, todo, seen) = (results.clone(), &todo, &seen);
            scope.spawn(move || work(settings.digest, compressor, todo, &results, seen));
        }
        drop(results);

        let mut cutter = Cutter {
            chunk_size: settings.chunk_size,
            free,
            jobs,
            progress,
            next_cut: 0,
            zeros: HashMap::new(),
            indexed: 0,
            hole_bytes: 0,
        };
        let fed = feed(&mut cutter);
        drop(cutter);
        let stored = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((fed?, stored))
    })
}

/// Digests and compresses until the reader hangs up, or the writer does.
fn work(
    digest: DigestAlgorithm,
    mut compressor: Compressor,
    todo: &Mutex<Receiver<Job>>,
    results: &Sender<Report>,
    seen: &Seen,
) {
    let _alarm = Alarm(results);
    loop {
        // Whoever holds the lock waits for a job, the others wait for the lock: the same thing.
        let job = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { cut, mut slot }) = job else { return };
        let plain = slot.plain();
        let crc32c = codec::crc32c(plain);
        let digest = match digest {
            DigestAlgorithm::Blake3 => codec::blake3(plain),
            DigestAlgorithm::Sha256 => codec::sha256(plain),
        };
        let outcome = if seen.claim((digest, plain.len())) { pack(&mut compressor, &mut slot) } else { Outcome::Seen };
        if results.send(Report::Done(Done { cut, slot, digest, crc32c, outcome })).is_err() {
            return;
        }
    }
}

fn pack(compressor: &mut Compressor, slot: &mut Slot) -> Outcome {
    match compressor.compress(slot.plain()) {
        Some(packed) => {
            slot.packed.clear();
            slot.packed.extend_from_slice(packed);
            Outcome::Packed
        }
        None => Outcome::Plain,
    }
}

/// What makes two chunks the same (`blob.md` section 10).
type Key = (Digest, usize);

/// Every chunk met so far. Workers use it as a hint, the writer as the truth.
#[derive(Default)]
struct Seen(Mutex<HashMap<Key, Option<u32>>>);

impl Seen {
    /// Whether nobody has met this chunk before; if so it is now the caller's to compress.
    fn claim(&self, key: Key) -> bool {
        let mut seen = self.0.lock().unwrap();
        let before = seen.len();
        seen.entry(key).or_insert(None);
        seen.len() > before
    }

    /// The stored chunk with these bytes.
    fn stored(&self, key: &Key) -> Option<u32> {
        self.0.lock().unwrap().get(key).copied().flatten()
    }

    fn store(&self, key: Key, chunk: u32) {
        self.0.lock().unwrap().insert(key, Some(chunk));
    }
}

struct Writer<'a> {
    blob: BlobWriter,
    compressor: Compressor,
    free_slots: Sender<Slot>,
    seen: &'a Seen,
}

impl Writer<'_> {
    fn drain(mut self, done: &Receiver<Report>) -> Result<Stored, BuildError> {
        let (mut chunk_of_cut, mut deduplicated_bytes) = (Vec::new(), 0);
        // Early results wait here; never more than there are slots.
        let mut early = BTreeMap::new();
        let mut next = 0;
        while let Ok(Report::Done(result)) = done.recv() {
            early.insert(result.cut, result);
            while let Some(result) = early.remove(&next) {
                next += 1;
                let Done { slot, digest, crc32c, outcome, .. } = result;
                let key = (digest, slot.plain().len());
                let (chunk, slot) = match self.seen.stored(&key) {
                    Some(chunk) => {
                        deduplicated_bytes += slot.plain().len() as u64;
                        (chunk, slot)
                    }
                    None => self.store(key, crc32c, outcome, slot)?,
                };
                chunk_of_cut.push(chunk);
                // The reader may have finished already.
                let _ = self.free_slots.send(slot);
            }
        }
        Ok(Stored { blob: self.blob, chunk_of_cut, deduplicated_bytes })
    }

    fn store(&mut self, key: Key, crc32c: u32, outcome: Outcome, mut slot: Slot) -> Result<(u32, Slot), BuildError> {
        let outcome = match outcome {
            Outcome::Seen => pack(&mut self.compressor, &mut slot),
            other => other,
        };
        let bytes = if matches!(outcome, Outcome::Packed) { slot.packed.as_slice() } else { slot.plain() };
        let chunk = Chunk::new(key.0, crc32c, slot.plain().len());
        let index = self.blob.append(chunk, bytes)?;
        self.seen.store(key, index);
        Ok((index, slot))
    }
}
