use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{self, Read};
use std::sync::mpsc::{Receiver, SyncSender};

use super::Settings;
use super::parcel::Parcel;
use super::pipeline::Job;
use crate::build::{Limit, Progress};

/// The bytes of one file, read once from start to end.
pub(in crate::build) trait Body {
    /// Fills `plain`. Fewer bytes than that are an error of kind `UnexpectedEof`.
    fn fill(&mut self, plain: &mut [u8]) -> io::Result<()>;

    /// Steps over the next `len` bytes and returns true, if they are known to be zero without
    /// reading them.
    fn skip_zeros(&mut self, len: u64) -> io::Result<bool>;
}

/// A body that knows nothing of holes.
#[derive(Debug)]
pub(in crate::build) struct PlainBody<R>(pub R);

impl<R: Read> Body for PlainBody<R> {
    fn fill(&mut self, plain: &mut [u8]) -> io::Result<()> {
        self.0.read_exact(plain)
    }

    fn skip_zeros(&mut self, _: u64) -> io::Result<bool> {
        Ok(false)
    }
}

/// Where the content of a regular file went.
#[derive(Clone, Debug, Default)]
pub(in crate::build) struct Content {
    /// Bytes.
    pub size: u64,
    runs: Vec<Run>,
}

/// Cuts that follow each other in one file.
#[derive(Clone, Copy, Debug)]
enum Run {
    /// `count` cuts from `first` on.
    Distinct { first: u64, count: u64 },
    /// The same cut `count` times, which keeps a huge hole small.
    Same { cut: u64, count: u64 },
}

impl Run {
    fn count(&self) -> u64 {
        match *self {
            Self::Distinct { count, .. } | Self::Same { count, .. } => count,
        }
    }
}

impl Content {
    /// Content that was never cut, for tests of what depends on sizes only.
    #[cfg(test)]
    pub(in crate::build) fn of_size(size: u64) -> Self {
        Self { size, runs: Vec::new() }
    }

    /// Content of `size` bytes whose chunks are these cuts, in order, unless one of them fails.
    pub(in crate::build) fn from_cuts<E>(size: u64, cuts: impl Iterator<Item = Result<u64, E>>) -> Result<Self, E> {
        let mut content = Self { size, runs: Vec::new() };
        for cut in cuts {
            let cut = cut?;
            match content.runs.last_mut() {
                Some(Run::Distinct { first, count }) if *first + *count == cut => *count += 1,
                Some(Run::Same { cut: same, count }) if *same == cut => *count += 1,
                Some(Run::Distinct { first, count: 1 }) if *first == cut => {
                    content.runs.pop();
                    content.runs.push(Run::Same { cut, count: 2 });
                }
                // Most files have one chunk, and room for four would be wasted on them.
                None => content.runs = vec![Run::Distinct { first: cut, count: 1 }],
                Some(_) => content.runs.push(Run::Distinct { first: cut, count: 1 }),
            }
        }
        Ok(content)
    }

    /// The number of the cut behind each chunk of the file.
    pub(in crate::build) fn cuts(&self) -> impl Iterator<Item = u64> {
        self.runs.iter().flat_map(|run| {
            let (first, count, step) = match *run {
                Run::Distinct { first, count } => (first, count, 1),
                Run::Same { cut, count } => (cut, count, 0),
            };
            (0..count).map(move |i| first + i * step)
        })
    }

    /// The same content, its chunks called by what its cuts became.
    pub(in crate::build) fn settled(&self, chunk_of_cut: &[u32]) -> Self {
        let chunk = |cut| chunk_of_cut[usize::try_from(cut).expect("cuts are counted in memory")];
        let settled = Self::from_cuts(self.size, self.cuts().map(|cut| Ok::<_, Infallible>(chunk(cut).into())));
        let Ok(settled) = settled;
        settled
    }

    /// Bytes that a [`Cutter`] knew to be holes and never read, in chunks of `chunk_size`.
    pub(in crate::build) fn hole_bytes(&self, chunk_size: u32) -> u64 {
        let holes = self.placed().filter(|(_, run)| matches!(run, Run::Same { .. }));
        holes.map(|(at, run)| self.bytes_of(at, run.count(), chunk_size)).sum()
    }

    /// Bytes that a [`Cutter`] read, in cuts that `is_counted`, of chunks of `chunk_size`.
    pub(in crate::build) fn read_bytes(&self, chunk_size: u32, is_counted: &dyn Fn(u64) -> bool) -> u64 {
        let mut bytes = 0;
        for (at, run) in self.placed() {
            let Run::Distinct { first, count } = *run else { continue };
            let counted = (0..count).filter(|i| is_counted(first + i));
            bytes += counted.map(|i| self.bytes_of(at + i, 1, chunk_size)).sum::<u64>();
        }
        bytes
    }

    /// The runs, each with the number of its first chunk in the file.
    fn placed(&self) -> impl Iterator<Item = (u64, &Run)> {
        self.runs.iter().scan(0, |next, run| {
            let at = *next;
            *next += run.count();
            Some((at, run))
        })
    }

    /// Bytes of `count` chunks from chunk `at` of the file on; its last one may be shorter.
    fn bytes_of(&self, at: u64, count: u64, chunk_size: u32) -> u64 {
        let start = at * u64::from(chunk_size);
        self.size.min(start.saturating_add(count.saturating_mul(chunk_size.into()))) - start
    }

    fn push(&mut self, cut: u64, fresh: bool) {
        match self.runs.last_mut() {
            Some(Run::Distinct { first, count }) if fresh && *first + *count == cut => *count += 1,
            Some(Run::Same { cut: same, count }) if !fresh && *same == cut => *count += 1,
            _ if fresh => self.runs.push(Run::Distinct { first: cut, count: 1 }),
            _ => self.runs.push(Run::Same { cut, count: 1 }),
        }
    }
}

/// Why a file could not be cut.
#[derive(Debug)]
pub(in crate::build) enum CutError {
    /// The body could not be read.
    Read(io::Error),
    /// The image would be too big.
    Limit(Limit),
    /// A later stage has failed and will say why.
    Stopped,
}

/// The reading end of the pipeline.
pub(in crate::build) struct Cutter<'a> {
    chunk_size: u32,
    /// Files shorter than this join batches.
    joins_below: u64,
    free: Receiver<Parcel>,
    jobs: SyncSender<Job>,
    progress: &'a dyn Progress,
    /// What is being filled.
    open: Option<Parcel>,
    parcels: u64,
    next_cut: u64,
    /// Cuts of zeros by length, so that holes are stored once and digested once.
    zeros: HashMap<(usize, bool), u64>,
    indexed: u64,
}

/// Chunk index entries of all files together: 8 bytes each, in at most 2 GiB of metadata.
const MAX_INDEXED: u64 = (2 << 30) / 8;

impl<'a> Cutter<'a> {
    pub(super) fn new(
        settings: &Settings,
        next_cut: u64,
        free: Receiver<Parcel>,
        jobs: SyncSender<Job>,
        progress: &'a dyn Progress,
    ) -> Self {
        Self {
            chunk_size: settings.chunk_size,
            joins_below: u64::from(settings.batch_size / 2),
            free,
            jobs,
            progress,
            open: None,
            parcels: 0,
            next_cut,
            zeros: HashMap::new(),
            indexed: 0,
        }
    }

    /// Behaves as if the image were almost at its limit of chunk indexes already.
    pub(super) fn be_nearly_full(&mut self) {
        self.indexed = MAX_INDEXED - 1024;
    }

    /// Sends what is left on its way, and hangs up. Returns how many parcels were sent.
    pub(super) fn finish(mut self) -> u64 {
        // Who does not take it has failed and says why.
        let _ = self.send();
        self.parcels
    }

    /// Sends `size` bytes of `body` on their way.
    pub(in crate::build) fn cut(&mut self, size: u64, body: &mut dyn Body) -> Result<Content, CutError> {
        let mut content = Content { size, runs: Vec::new() };
        self.indexed = self.indexed.saturating_add(size.div_ceil(self.chunk_size.into()));
        if self.indexed > MAX_INDEXED {
            return Err(CutError::Limit(Limit::Metadata));
        }
        // A batch is smaller than a chunk, so what is short enough is in one piece.
        let joins = size < self.joins_below;
        let mut left = size;
        while left > 0 {
            let len = left.min(self.chunk_size.into());
            left -= len;
            if body.skip_zeros(len).map_err(CutError::Read)? {
                let cut = self.zeros(len, joins)?;
                content.push(cut, false);
            } else {
                let cut = self.add(len, joins, |plain| body.fill(plain))?;
                content.push(cut, true);
            }
            self.progress.advance(0, len);
        }
        Ok(content)
    }

    fn zeros(&mut self, len: u64, joins: bool) -> Result<u64, CutError> {
        let key = (usize::try_from(len).expect("at most a chunk"), joins);
        if let Some(cut) = self.zeros.get(&key) {
            return Ok(*cut);
        }
        let cut = self.add(len, joins, |plain| {
            plain.fill(0);
            Ok(())
        })?;
        self.zeros.insert(key, cut);
        Ok(cut)
    }

    /// Puts a cut of `len` bytes into the open parcel, or into the next one if it is full.
    fn add(&mut self, len: u64, joins: bool, fill: impl FnOnce(&mut [u8]) -> io::Result<()>) -> Result<u64, CutError> {
        let len = usize::try_from(len).expect("at most a chunk");
        if self.open.as_ref().is_some_and(|parcel| parcel.is_full_for(len)) {
            self.send()?;
        }
        let mut parcel = match self.open.take() {
            Some(parcel) => parcel,
            None => self.free.recv().map_err(|_| CutError::Stopped)?,
        };
        fill(parcel.room(len, joins)).map_err(CutError::Read)?;
        let is_full = parcel.is_full();
        self.open = Some(parcel);
        if is_full {
            self.send()?;
        }
        let cut = self.next_cut;
        self.next_cut += 1;
        Ok(cut)
    }

    fn send(&mut self) -> Result<(), CutError> {
        let Some(mut parcel) = self.open.take() else { return Ok(()) };
        parcel.number = self.parcels;
        self.jobs.send(Job::Parcel(parcel)).map_err(|_| CutError::Stopped)?;
        self.parcels += 1;
        Ok(())
    }
}

impl std::fmt::Debug for Cutter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cutter").field("next_cut", &self.next_cut).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_give_back_the_cuts_in_order() {
        let mut content = Content::default();
        let pushed = [(0, true), (1, true), (2, false), (2, false), (3, true), (5, true), (2, false)];
        for (cut, fresh) in pushed {
            content.push(cut, fresh);
        }
        assert_eq!(content.cuts().collect::<Vec<_>>(), [0, 1, 2, 2, 3, 5, 2]);
        assert_eq!(content.runs.len(), 5);
    }

    #[test]
    fn bytes_of_holes_and_of_cuts_end_with_the_file() {
        let mut content = Content { size: 5 * 4096 + 100, runs: Vec::new() };
        for (cut, fresh) in [(7, true), (8, true), (2, false), (2, false), (9, true), (3, false)] {
            content.push(cut, fresh);
        }

        assert_eq!(content.hole_bytes(4096), 2 * 4096 + 100);
        assert_eq!(content.read_bytes(4096, &|_| true), 3 * 4096);
        assert_eq!(content.read_bytes(4096, &|cut| cut == 8 || cut == 2), 4096);
    }

    #[test]
    fn content_of_known_cuts_keeps_their_order_and_compresses_runs() {
        for (cuts, runs) in [
            (vec![], 0),
            (vec![7], 1),
            (vec![7, 8, 9], 1),
            (vec![4, 4, 4, 4], 1),
            (vec![1, 2, 2, 2, 3, 4, 0], 4),
            (vec![5, 5, 6, 6], 2),
        ] {
            let each = cuts.iter().map(|cut| Ok::<_, ()>(*cut));
            let content = Content::from_cuts(cuts.len() as u64, each).unwrap();
            assert_eq!(content.cuts().collect::<Vec<_>>(), cuts);
            assert_eq!(content.runs.len(), runs, "{cuts:?}");
        }
    }
}
