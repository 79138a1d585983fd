use crate::base::Digest;

/// Consecutive cuts on their way through the pipeline, with the buffers they lie in. Small files
/// travel together, since handing something from thread to thread costs more than digesting it.
#[derive(Debug, Default)]
pub(super) struct Parcel {
    /// Position among all parcels, from 0.
    pub number: u64,
    pub cuts: Vec<Cut>,
    /// What the worker made of each cut.
    pub made: Vec<Made>,
    /// Stored forms that differ from the plain bytes.
    pub packed: Vec<u8>,
    /// As large as the fullest parcel so far, so that it is cleared only once.
    buffer: Vec<u8>,
    len: usize,
}

/// One chunk's worth of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    from: usize,
    len: usize,
    /// Whether it shares its stored bytes with its neighbours.
    pub joins: bool,
}

/// What a worker knows of a cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Made {
    pub digest: Digest,
    pub crc32c: u32,
    pub outcome: Outcome,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Outcome {
    /// This is what to store.
    Packed(Packed),
    /// The cut joins a batch, which is packed as a whole.
    Joins,
    /// Another cut with the same bytes was seen first. If that one comes later in the input, the
    /// writer has to pack this one itself.
    Seen,
}

/// The form in which bytes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::build) enum Packed {
    /// As they are.
    Plain,
    /// As `len` other bytes from `from` on.
    Bytes { from: usize, len: usize, compressed: bool },
    /// As `len` other bytes that stand for more plain bytes than there are: `whole`, the rest zeros.
    Padded { from: usize, len: usize, whole: usize },
}

/// A parcel with this many bytes is full. Large enough that the handing over does not count, and
/// small enough that all workers have something to do soon.
const FULL_BYTES: usize = 128 << 10;
/// A parcel with this many cuts is full, however small they are.
const FULL_CUTS: usize = 1024;

impl Parcel {
    /// Whether a cut of `len` bytes should wait for the next parcel.
    pub(super) fn is_full_for(&self, len: usize) -> bool {
        !self.cuts.is_empty() && self.len + len > FULL_BYTES
    }

    /// Whether there is nothing to wait for.
    pub(super) fn is_full(&self) -> bool {
        self.len >= FULL_BYTES || self.cuts.len() >= FULL_CUTS
    }

    /// Room for one more cut of `len` bytes. What is in it is left over from others.
    pub(super) fn room(&mut self, len: usize, joins: bool) -> &mut [u8] {
        let from = self.len;
        self.len += len;
        if self.buffer.len() < self.len {
            self.buffer.resize(self.len, 0);
        }
        self.cuts.push(Cut { from, len, joins });
        &mut self.buffer[from..self.len]
    }

    /// The plain bytes of the cut at this position.
    pub(super) fn plain(&self, cut: usize) -> &[u8] {
        let Cut { from, len, .. } = self.cuts[cut];
        &self.buffer[from..from + len]
    }

    /// The plain bytes of the cut at this position, and the place for what becomes of them.
    pub(super) fn plain_and_packed(&mut self, cut: usize) -> (&[u8], &mut Vec<u8>) {
        let Cut { from, len, .. } = self.cuts[cut];
        (&self.buffer[from..from + len], &mut self.packed)
    }

    /// What to store for the cut at this position.
    pub(super) fn stored(&self, cut: usize, packed: Packed) -> &[u8] {
        match packed {
            Packed::Plain => self.plain(cut),
            Packed::Bytes { from, len, .. } | Packed::Padded { from, len, .. } => &self.packed[from..from + len],
        }
    }

    /// Makes the parcel ready for other cuts.
    pub(super) fn empty(&mut self) {
        self.cuts.clear();
        self.made.clear();
        self.packed.clear();
        self.len = 0;
    }
}
