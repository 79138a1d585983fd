//! What readers asked for first, device by device, in the order in which they asked.
//!
//! A trace sees the ranges that a kernel asks for, not the calls of programs: what the kernel has in its
//! page cache it does not ask for, and it reads ahead. Only the first access of a byte is kept, so a
//! trace grows with what is read and not with time; and it is bounded.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::Want;
use crate::base::ByteRange;

/// Most ranges of one trace: what comes later is only counted.
pub const MOST_READS: usize = 1 << 18;

/// A recording that is under way, of the devices of one image.
#[derive(Debug)]
pub struct Trace(Mutex<Recorded>);

/// What a trace holds.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// Ranges that do not overlap, in the order of their first access.
    pub reads: Vec<Want>,
    /// Reads that came when the trace was full.
    pub lost: u64,
    /// By device, what is in `reads`: start and end.
    seen: Vec<BTreeMap<u64, u64>>,
}

impl Trace {
    /// A recording of this many devices, with nothing in it.
    pub fn new(devices: usize) -> Self {
        Self(Mutex::new(Recorded { seen: vec![BTreeMap::new(); devices], ..Recorded::default() }))
    }

    /// Notes a read. Called by threads that answer a kernel: short, and waits for nothing else.
    pub(super) fn note(&self, device: usize, decoded: ByteRange) {
        self.0.lock().unwrap().note(device, decoded);
    }

    /// What has been recorded so far.
    pub fn recorded(&self) -> Recorded {
        self.0.lock().unwrap().clone()
    }

    /// How many ranges have been recorded so far, and how many reads were lost.
    pub fn len(&self) -> (usize, u64) {
        let recorded = self.0.lock().unwrap();
        (recorded.reads.len(), recorded.lost)
    }
}

impl Recorded {
    fn note(&mut self, device: usize, decoded: ByteRange) {
        let Some(seen) = self.seen.get_mut(device) else { return };
        let mut at = decoded.start();
        while at < decoded.end() {
            // What was seen last at or before this byte may cover it.
            if let Some((_, &end)) = seen.range(..=at).next_back().filter(|(_, end)| **end > at) {
                at = end;
                continue;
            }
            let next = seen.range(at..).next().map_or(u64::MAX, |(&start, _)| start);
            let fresh = ByteRange::new(at, decoded.end().min(next)).unwrap_or_default();
            // A reader that walks forward makes one range.
            let continued = self.reads.last_mut().filter(|last| last.device == device && last.decoded.end() == at);
            if let Some(last) = continued {
                last.decoded = last.decoded.hull(fresh);
            } else if self.reads.len() < MOST_READS {
                self.reads.push(Want { device, decoded: fresh });
            } else {
                self.lost += 1;
                return;
            }
            cover(seen, fresh);
            at = fresh.end();
        }
    }
}

/// Adds a range that overlaps nothing, joined to what it touches.
fn cover(seen: &mut BTreeMap<u64, u64>, fresh: ByteRange) {
    let end = seen.remove(&fresh.end()).unwrap_or(fresh.end());
    match seen.range_mut(..fresh.start()).next_back().filter(|(_, before)| **before == fresh.start()) {
        Some((_, before)) => *before = end,
        None => drop(seen.insert(fresh.start(), end)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    fn recorded(reads: &[(usize, u64, u64)]) -> Vec<(usize, u64, u64)> {
        let trace = Trace::new(2);
        reads.iter().for_each(|&(device, start, end)| trace.note(device, range(start, end)));
        let reads = trace.recorded().reads;
        reads.iter().map(|want| (want.device, want.decoded.start(), want.decoded.end())).collect()
    }

    #[test]
    fn only_the_first_access_of_a_byte_is_kept_in_its_order() {
        assert_eq!(recorded(&[(0, 8, 16), (1, 8, 16), (0, 0, 32)]), [(0, 8, 16), (1, 8, 16), (0, 0, 8), (0, 16, 32)]);
        assert_eq!(recorded(&[(0, 0, 4), (0, 4, 8), (0, 2, 6)]), [(0, 0, 8)], "a walk is one range");
        assert_eq!(recorded(&[(2, 0, 4), (0, 4, 4)]), [], "no such device, no bytes");
    }

    #[test]
    fn a_full_trace_keeps_what_came_first_and_says_what_it_lost() {
        let trace = Trace::new(1);
        let most = MOST_READS as u64;
        (0..most + 5).for_each(|at| trace.note(0, range(at * 2, at * 2 + 1)));
        assert_eq!(trace.len(), (MOST_READS, 5));
        trace.note(0, range(0, 1));
        assert_eq!(trace.len(), (MOST_READS, 5), "what is known is not lost");
    }

    proptest! {
        #[test]
        fn the_order_is_that_of_first_accesses(reads in proptest::collection::vec((0usize..2, 0u64..64, 1u64..24), 0..40)) {
            let mut model: Vec<(usize, u64)> = Vec::new();
            for &(device, start, len) in &reads {
                let fresh: Vec<_> = (start..start + len).filter(|&byte| !model.contains(&(device, byte))).collect();
                model.extend(fresh.into_iter().map(|byte| (device, byte)));
            }
            let reads: Vec<_> = reads.iter().map(|&(device, start, len)| (device, start, start + len)).collect();
            let bytes: Vec<_> =
                recorded(&reads).into_iter().flat_map(|(device, start, end)| (start..end).map(move |at| (device, at))).collect();
            prop_assert_eq!(bytes, model);
        }
    }
}
