//! Notices readers that walk forward, and says what to fetch ahead of them.
//!
//! A single-threaded reader asks for 128 KiB, waits, and asks for the next 128 KiB; without help it
//! would pay a round trip to the registry for every unit. Pure: it sees unit numbers and answers
//! with unit numbers.

use std::ops::Range;

use crate::blob::{UnitIndex, UnitMap};

/// How far to run ahead, in decoded bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    /// The first step, when a reader has entered a second unit in a row. At least one unit.
    pub(super) first: u64,
    /// The largest step; each is twice the one before.
    pub(super) most: u64,
}

/// How many readers of one device are told apart.
const STREAMS: usize = 8;

/// The readers of one device.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    clock: u64,
}

#[derive(Debug)]
struct Stream {
    /// The furthest unit read.
    last: UnitIndex,
    /// The units asked for by the latest step; empty before the first.
    step: Range<UnitIndex>,
    /// Decoded bytes of the latest step; 0 before the first.
    bytes: u64,
    /// When it was last seen, for forgetting the stalest.
    seen: u64,
}

impl Streams {
    /// Notes a read of `units`, which is not empty; returns units worth fetching now, if any.
    pub(super) fn observe(&mut self, map: &UnitMap, units: Range<UnitIndex>, reach: Reach) -> Option<Range<UnitIndex>> {
        self.clock += 1;
        let (first, last) = (units.start, units.end - 1);
        let Some(stream) = self.streams.iter_mut().find(|stream| stream.continues(first, last)) else {
            self.remember(last);
            return None;
        };
        stream.seen = self.clock;
        if last <= stream.last {
            return None;
        }
        stream.last = last;
        stream.advance(map, reach)
    }

    fn remember(&mut self, last: UnitIndex) {
        if self.streams.len() >= STREAMS
            && let Some(stalest) = (0..self.streams.len()).min_by_key(|&at| self.streams[at].seen)
        {
            self.streams.swap_remove(stalest);
        }
        self.streams.push(Stream { last, step: 0..0, bytes: 0, seen: self.clock });
    }
}

impl Stream {
    /// Whether a read of `first..=last` goes on where this stream is. Kernel read-ahead arrives
    /// slightly out of order, so a read within what was already asked for counts, and so does one
    /// just behind.
    fn continues(&self, first: UnitIndex, last: UnitIndex) -> bool {
        let ahead = self.step.end.max(self.last.saturating_add(1));
        first <= ahead && last.saturating_add(1) >= self.last
    }

    fn advance(&mut self, map: &UnitMap, reach: Reach) -> Option<Range<UnitIndex>> {
        let from = if self.bytes == 0 {
            self.bytes = reach.first;
            self.last + 1
        } else if self.last >= self.step.start + (self.step.end - self.step.start) / 2 {
            self.bytes = (self.bytes * 2).min(reach.most);
            self.step.end.max(self.last + 1)
        } else {
            return None;
        };
        let to = reach_from(map, from, self.bytes);
        if from < to {
            self.step = from..to;
            return Some(from..to);
        }
        None
    }
}

/// The end of the fewest units from `from` on that hold at least `bytes`.
fn reach_from(map: &UnitMap, from: UnitIndex, bytes: u64) -> UnitIndex {
    let mut sum = 0;
    let mut end = from;
    while let Some(unit) = map.get(end)
        && sum < bytes
    {
        sum += unit.decoded.len();
        end += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ByteRange;
    use crate::blob::{Check, Recipe, Unit};

    const REACH: Reach = Reach { first: 1 << 20, most: 8 << 20 };

    /// `count` units of 1 MiB.
    fn map(count: u64) -> UnitMap {
        let range = |at: u64| ByteRange::at(at << 20, 1 << 20).unwrap();
        let unit = |at| Unit {
            decoded: range(at),
            stored: range(at),
            recipe: Recipe::Plain,
            check: Check::Crc32c(0),
            part: None,
            encrypted: false,
        };
        UnitMap::new("b".parse().unwrap(), count << 20, (0..count).map(unit).collect()).unwrap()
    }

    fn steps(count: u64, reads: impl IntoIterator<Item = UnitIndex>) -> Vec<(UnitIndex, Range<UnitIndex>)> {
        let (map, mut streams) = (map(count), Streams::default());
        let steps = reads.into_iter().filter_map(|at| Some((at, streams.observe(&map, at..at + 1, REACH)?)));
        steps.collect()
    }

    #[test]
    fn a_walking_reader_is_outrun_in_doubling_steps() {
        let reads = (0..40).flat_map(|unit| [unit; 8]);
        let want = [(1, 2..3), (2, 3..5), (4, 5..9), (7, 9..17), (13, 17..25), (21, 25..33), (29, 33..40)];
        assert_eq!(steps(40, reads), want);
    }

    #[test]
    fn random_readers_are_left_alone() {
        let reads = (0..200).map(|i: u32| i * 7919 % 1000).filter(|unit| unit % 2 == 0);
        assert_eq!(steps(1000, reads), []);
    }

    #[test]
    fn several_readers_are_told_apart() {
        let reads = (0..3).flat_map(|step| (0..4).map(move |reader| reader * 100 + step));
        let found = steps(1000, reads);
        let starts: Vec<_> = found.iter().map(|(_, ahead)| ahead.start).collect();
        assert_eq!(starts, [2, 102, 202, 302, 3, 103, 203, 303]);
    }

    #[test]
    fn nothing_is_asked_for_behind_the_end() {
        assert_eq!(steps(3, 0..3), [(1, 2..3)]);
        assert_eq!(steps(1, [0, 0]), []);
    }
}
