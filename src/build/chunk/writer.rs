use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, SyncSender};

use super::Chunk;
use super::pack::Packer;
use super::parcel::{Outcome, Packed, Parcel};
use super::pipeline::{Job, Report, Seen, Stored};
use crate::build::blobwriter::BlobWriter;
use crate::build::{BuildError, Limit};

/// Small chunks that are stored as one piece, and numbered one after the other.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Position among all batches, from 0.
    pub number: u64,
    /// Number of the first member.
    first: u32,
    members: u32,
    pub plain: Vec<u8>,
    /// What a worker made of `plain`, and how it is to be read.
    pub packed: Vec<u8>,
    pub form: Option<Packed>,
}

/// Something to append to the blob when everything before it has been.
enum Step {
    /// A chunk of the parcel in front, called `chunk` in the blob.
    Chunk { cut: usize, packed: Packed, chunk: u32 },
    /// Nothing of the parcel in front is needed any more.
    Release,
    /// The next batch.
    Batch,
}

/// The far end of the pipeline. Decides in the order of the input what is stored, and appends it
/// in that order; only batches go back to the workers in between.
pub(super) struct Writer<'a> {
    blob: BlobWriter,
    packer: Packer,
    seen: &'a Seen,
    /// Chunks that are not in the blob, numbered before those that are.
    known: u32,
    free: Sender<Parcel>,
    jobs: SyncSender<Job>,
    /// Plain bytes of a batch stay below it; nothing joins if it is 0.
    batch_size: usize,
    /// Batches that may be under way. With more, deciding waits; which bounds memory.
    batch_limit: usize,
    /// What became of the cuts so far.
    chunk_of_cut: Vec<u32>,
    /// Parcels that came before their turn; never more than there are.
    early: BTreeMap<u64, Parcel>,
    next_parcel: u64,
    open: Batch,
    next_batch: u64,
    /// Batches that have come back, and the one that is to be appended next.
    packed: BTreeMap<u64, Batch>,
    next_packed: u64,
    steps: VecDeque<Step>,
    held: VecDeque<Parcel>,
    spare: Vec<Batch>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        blob: BlobWriter,
        packer: Packer,
        (seen, known): (&'a Seen, u32),
        free: Sender<Parcel>,
        jobs: SyncSender<Job>,
        (batch_size, batch_limit): (usize, usize),
    ) -> Self {
        Self {
            blob,
            packer,
            seen,
            known,
            free,
            jobs,
            batch_size,
            batch_limit,
            chunk_of_cut: Vec::from_iter(0..known),
            early: BTreeMap::new(),
            next_parcel: 0,
            open: Batch::default(),
            next_batch: 0,
            packed: BTreeMap::new(),
            next_packed: 0,
            steps: VecDeque::new(),
            held: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// Takes what the workers report until everything the reader has sent is in the blob, or a
    /// worker has panicked.
    pub(super) fn drain(mut self, reports: &Receiver<Report>) -> Result<Stored, BuildError> {
        let mut total = None;
        while let Ok(report) = reports.recv() {
            match report {
                Report::Parcel(parcel) => drop(self.early.insert(parcel.number, parcel)),
                Report::Batch(batch) => drop(self.packed.insert(batch.number, batch)),
                Report::End { parcels } => total = Some(parcels),
                Report::Panicked => break,
            }
            self.advance()?;
            if total == Some(self.next_parcel) {
                self.close_batch();
                self.append()?;
                if self.steps.is_empty() {
                    break;
                }
            }
        }
        Ok(Stored { blob: self.blob, packer: self.packer, chunk_of_cut: self.chunk_of_cut, known: self.known })
    }

    fn advance(&mut self) -> Result<(), BuildError> {
        loop {
            self.append()?;
            let under_way = self.next_batch - self.next_packed;
            if under_way >= self.batch_limit as u64 {
                return Ok(());
            }
            let Some(parcel) = self.early.remove(&self.next_parcel) else { return Ok(()) };
            self.next_parcel += 1;
            self.decide(parcel)?;
        }
    }

    /// Gives every cut of a parcel its chunk.
    fn decide(&mut self, mut parcel: Parcel) -> Result<(), BuildError> {
        let mut is_needed = false;
        for cut in 0..parcel.cuts.len() {
            let made = parcel.made[cut];
            let len = parcel.plain(cut).len();
            let key = (made.digest, len);
            if let Some(chunk) = self.seen.stored(&key) {
                self.chunk_of_cut.push(chunk);
                continue;
            }
            let joins = parcel.cuts[cut].joins;
            if !joins || self.open.plain.len() + len >= self.batch_size {
                self.close_batch();
            }
            let chunk = self.blob.number(Chunk::new(made.digest, made.crc32c, len))?;
            let position = self.known.checked_add(chunk).ok_or(BuildError::Limit(Limit::Chunks))?;
            self.seen.store(key, position);
            self.chunk_of_cut.push(position);
            if joins {
                self.join(parcel.plain(cut), chunk);
                continue;
            }
            let packed = match made.outcome {
                Outcome::Packed(packed) => packed,
                Outcome::Seen | Outcome::Joins => {
                    let (plain, out) = parcel.plain_and_packed(cut);
                    self.packer.chunk(plain, out)
                }
            };
            self.steps.push_back(Step::Chunk { cut, packed, chunk });
            is_needed = true;
        }
        if is_needed {
            self.steps.push_back(Step::Release);
            self.held.push_back(parcel);
        } else {
            self.release(parcel);
        }
        Ok(())
    }

    fn join(&mut self, plain: &[u8], chunk: u32) {
        if self.open.members == 0 {
            self.open.first = chunk;
        }
        self.open.members += 1;
        self.open.plain.extend_from_slice(plain);
    }

    /// Sends the open batch to the workers, if anything has joined it.
    fn close_batch(&mut self) {
        if self.open.members == 0 {
            return;
        }
        let mut batch = std::mem::replace(&mut self.open, self.spare.pop().unwrap_or_default());
        batch.number = self.next_batch;
        self.next_batch += 1;
        self.steps.push_back(Step::Batch);
        // Workers that are gone have panicked and said so.
        let _ = self.jobs.send(Job::Batch(batch));
    }

    /// Appends what is ready.
    fn append(&mut self) -> Result<(), BuildError> {
        while let Some(step) = self.steps.front() {
            match *step {
                Step::Chunk { cut, packed, chunk } => {
                    let bytes = self.held.front().expect("a step has its parcel").stored(cut, packed);
                    match packed {
                        Packed::Plain => self.blob.append(chunk, bytes, false)?,
                        Packed::Bytes { compressed, .. } => self.blob.append(chunk, bytes, compressed)?,
                        Packed::Padded { whole, .. } => self.blob.append_batch(chunk, 1, bytes, whole)?,
                    }
                }
                Step::Release => {
                    let parcel = self.held.pop_front().expect("a step has its parcel");
                    self.release(parcel);
                }
                Step::Batch => {
                    let Some(batch) = self.packed.remove(&self.next_packed) else { return Ok(()) };
                    self.next_packed += 1;
                    self.append_batch(batch)?;
                }
            }
            self.steps.pop_front();
        }
        Ok(())
    }

    fn append_batch(&mut self, mut batch: Batch) -> Result<(), BuildError> {
        let (bytes, whole) = match batch.form.expect("a worker has packed it") {
            Packed::Plain => (&batch.plain, batch.plain.len()),
            Packed::Bytes { .. } => (&batch.packed, batch.plain.len()),
            Packed::Padded { whole, .. } => (&batch.packed, whole),
        };
        self.blob.append_batch(batch.first, batch.members, bytes, whole)?;
        batch.plain.clear();
        batch.packed.clear();
        self.spare.push(Batch { plain: batch.plain, packed: batch.packed, ..Batch::default() });
        Ok(())
    }

    fn release(&self, mut parcel: Parcel) {
        parcel.empty();
        // The reader may have finished already.
        let _ = self.free.send(parcel);
    }
}
