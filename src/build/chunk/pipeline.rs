use std::collections::HashMap;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::pack::Packer;
use super::parcel::{Made, Outcome, Parcel};
use super::writer::{Batch, Writer};
use super::{Cutter, Settings};
use crate::base::Digest;
use crate::blob::digest_of;
use crate::build::blobwriter::BlobWriter;
use crate::build::{BuildError, Progress};
use crate::codec;
use crate::format::rafs::DigestAlgorithm;

/// Something for a worker to do.
pub(super) enum Job {
    /// Digest these cuts, and pack those that are stored alone.
    Parcel(Parcel),
    /// Pack this batch.
    Batch(Batch),
}

/// What the writer is told.
pub(super) enum Report {
    Parcel(Parcel),
    Batch(Batch),
    /// The reader has sent this many parcels and sends no more.
    End {
        parcels: u64,
    },
    /// The worker is unwinding, and its job will never come back.
    Panicked,
}

/// Reports a panic of the worker that owns it. Without it the writer would wait for ever for the
/// lost job, and the reader for a parcel.
struct Alarm<'a>(&'a Sender<Report>);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.send(Report::Panicked);
        }
    }
}

/// What came out at the far end.
#[derive(Debug)]
pub(in crate::build) struct Stored {
    pub blob: BlobWriter,
    /// Packs the tables of the blob as its chunks were packed.
    pub packer: Packer,
    /// The chunk that each cut became: those known before first, then those of the blob.
    pub chunk_of_cut: Vec<u32>,
    /// How many were known before.
    pub known: u32,
}

/// Chunks that exist already, in blobs that the image may use.
#[derive(Debug, Default)]
pub(in crate::build) struct Known {
    /// How many there are. They count as the first cuts, each having become itself.
    pub count: u32,
    /// Digest, length in bytes and number of those that new cuts may turn out to be. The first of
    /// equals is taken.
    pub by_content: Vec<(Digest, u32, u32)>,
}

impl Known {
    fn seen(&self) -> Seen {
        let mut seen = HashMap::with_capacity(self.by_content.len());
        for &(digest, len, chunk) in &self.by_content {
            let len = usize::try_from(len).expect("at most 16 MiB");
            seen.entry((digest, len)).or_insert(Some(chunk));
        }
        Seen(Mutex::new(seen))
    }
}

/// Runs `feed` on this thread, with nothing behind it: the first [`REHEARSED`] parcels are filled and
/// dropped, and one more is refused as by a pipeline that has failed. The room in the metadata is
/// almost used up from the start, so that huge holes do not take long. For fuzzing.
pub(in crate::build) fn rehearse<T>(settings: &Settings, feed: impl FnOnce(&mut Cutter<'_>) -> T) -> T {
    let (free_parcels, free) = mpsc::channel();
    for _ in 0..REHEARSED {
        free_parcels.send(Parcel::default()).expect("the receiver is in this function");
    }
    drop(free_parcels);
    let (jobs, _todo) = mpsc::sync_channel(REHEARSED);
    let mut cutter = Cutter::new(settings, 0, free, jobs, &());
    cutter.be_nearly_full();
    feed(&mut cutter)
}

/// Parcels of one rehearsal.
const REHEARSED: usize = 64;

/// Runs `feed` on this thread, with workers and a writer behind it, until everything it cut has
/// been stored in `blob`.
///
/// # Errors
/// The error of the writer if it has one, since that is why the feed stopped; else the feed's.
pub(in crate::build) fn run<T>(
    settings: &Settings,
    known: &Known,
    blob: BlobWriter,
    progress: &dyn Progress,
    feed: impl FnOnce(&mut Cutter<'_>) -> Result<T, BuildError>,
) -> Result<(T, Stored), BuildError> {
    let workers = settings.workers.get();
    // Two for each worker keep it busy while the writer catches up; two more are being read into
    // and written out.
    let parcels = 2 * workers + 2;
    let batches = workers + 2;
    let mut packers = (0..=workers).map(|_| settings.packer()).collect::<Result<Vec<_>, _>>()?;
    let seen = known.seen();
    let (free_parcels, free) = mpsc::channel();
    for _ in 0..parcels {
        free_parcels.send(Parcel::default()).expect("the receiver is in this function");
    }
    // Room for everything that can be under way. Nobody who sends here holds up who receives, so a
    // full channel makes senders wait, and nothing worse.
    let (jobs, todo) = mpsc::sync_channel(parcels + batches);
    let (results, reports) = mpsc::channel();
    let todo = Mutex::new(todo);

    thread::scope(|scope| {
        let packer = packers.pop().expect("one more than workers");
        let sizes = (settings.batch_size as usize, batches);
        let writer = Writer::new(blob, packer, (&seen, known.count), free_parcels, jobs.clone(), sizes);
        let writer = scope.spawn(move || writer.drain(&reports));
        for packer in packers {
            let (results, todo, seen) = (results.clone(), &todo, &seen);
            scope.spawn(move || work(settings.digest, packer, todo, &results, seen));
        }
        let mut cutter = Cutter::new(settings, known.count.into(), free, jobs, progress);
        let fed = feed(&mut cutter);
        let parcels = cutter.finish();
        // Were the writer gone, it would have failed and say why.
        let _ = results.send(Report::End { parcels });
        drop(results);
        let stored = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((fed?, stored))
    })
}

/// Works until the reader and the writer have hung up, or nobody wants the results.
fn work(
    digest: DigestAlgorithm,
    mut packer: Packer,
    todo: &Mutex<Receiver<Job>>,
    results: &Sender<Report>,
    seen: &Seen,
) {
    let _alarm = Alarm(results);
    loop {
        // Whoever holds the lock waits for a job, the others wait for the lock: the same thing.
        let job = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        let report = match job {
            Job::Parcel(mut parcel) => {
                for cut in 0..parcel.cuts.len() {
                    let made = make(digest, &mut packer, &mut parcel, cut, seen);
                    parcel.made.push(made);
                }
                Report::Parcel(parcel)
            }
            Job::Batch(mut batch) => {
                batch.form = Some(packer.batch(&batch.plain, &mut batch.packed));
                Report::Batch(batch)
            }
        };
        if results.send(report).is_err() {
            return;
        }
    }
}

fn make(algorithm: DigestAlgorithm, packer: &mut Packer, parcel: &mut Parcel, cut: usize, seen: &Seen) -> Made {
    let plain = parcel.plain(cut);
    let crc32c = codec::crc32c(plain);
    let digest = digest_of(algorithm, plain);
    let outcome = if parcel.cuts[cut].joins {
        Outcome::Joins
    } else if seen.claim((digest, plain.len())) {
        let (plain, out) = parcel.plain_and_packed(cut);
        Outcome::Packed(packer.chunk(plain, out))
    } else {
        Outcome::Seen
    };
    Made { digest, crc32c, outcome }
}

/// What makes two chunks the same (`blob.md` section 10).
type Key = (Digest, usize);

/// Every chunk met so far. Workers use it as a hint, the writer as the truth.
pub(super) struct Seen(Mutex<HashMap<Key, Option<u32>>>);

impl Seen {
    /// Whether nobody has met this chunk before; if so it is now the caller's to compress.
    fn claim(&self, key: Key) -> bool {
        let mut seen = self.0.lock().unwrap();
        let before = seen.len();
        seen.entry(key).or_insert(None);
        seen.len() > before
    }

    /// The stored chunk with these bytes.
    pub(super) fn stored(&self, key: &Key) -> Option<u32> {
        self.0.lock().unwrap().get(key).copied().flatten()
    }

    pub(super) fn store(&self, key: Key, chunk: u32) {
        self.0.lock().unwrap().insert(key, Some(chunk));
    }
}
