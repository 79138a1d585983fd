use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::mpsc::{Receiver, SyncSender};

use super::Slot;
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

impl Content {
    /// Content that was never cut, for tests of what depends on sizes only.
    #[cfg(test)]
    pub(in crate::build) fn of_size(size: u64) -> Self {
        Self { size, runs: Vec::new() }
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
    pub(super) chunk_size: u32,
    pub(super) free: Receiver<Slot>,
    pub(super) jobs: SyncSender<Job>,
    pub(super) progress: &'a dyn Progress,
    pub(super) next_cut: u64,
    /// Cuts of zeros by length, so that holes are stored once and digested once.
    pub(super) zeros: HashMap<usize, u64>,
    pub(super) indexed: u64,
    pub(super) hole_bytes: u64,
}

/// Chunk index entries of all files together: 8 bytes each, in at most 2 GiB of metadata.
pub(super) const MAX_INDEXED: u64 = (2 << 30) / 8;

impl Cutter<'_> {
    /// Sends `size` bytes of `body` on their way.
    pub(in crate::build) fn cut(&mut self, size: u64, body: &mut dyn Body) -> Result<Content, CutError> {
        let mut content = Content { size, runs: Vec::new() };
        self.indexed = self.indexed.saturating_add(size.div_ceil(self.chunk_size.into()));
        if self.indexed > MAX_INDEXED {
            return Err(CutError::Limit(Limit::Metadata));
        }
        let mut left = size;
        while left > 0 {
            let len = left.min(self.chunk_size.into());
            left -= len;
            if body.skip_zeros(len).map_err(CutError::Read)? {
                let cut = self.zeros(len)?;
                content.push(cut, false);
                self.hole_bytes += len;
            } else {
                let cut = self.send(len, |plain| body.fill(plain))?;
                content.push(cut, true);
            }
            self.progress.advance(0, len);
        }
        Ok(content)
    }

    /// Bytes of files that were known to be holes and never read.
    pub(in crate::build) fn hole_bytes(&self) -> u64 {
        self.hole_bytes
    }

    fn zeros(&mut self, len: u64) -> Result<u64, CutError> {
        let key = usize::try_from(len).expect("at most a chunk");
        if let Some(cut) = self.zeros.get(&key) {
            return Ok(*cut);
        }
        let cut = self.send(len, |plain| {
            plain.fill(0);
            Ok(())
        })?;
        self.zeros.insert(key, cut);
        Ok(cut)
    }

    fn send(&mut self, len: u64, fill: impl FnOnce(&mut [u8]) -> io::Result<()>) -> Result<u64, CutError> {
        let len = usize::try_from(len).expect("at most a chunk");
        let mut slot = self.free.recv().map_err(|_| CutError::Stopped)?;
        fill(slot.room(len)).map_err(CutError::Read)?;
        let cut = self.next_cut;
        self.next_cut += 1;
        self.jobs.send(Job { cut, slot }).map_err(|_| CutError::Stopped)?;
        Ok(cut)
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
}
