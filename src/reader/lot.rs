//! A lot: the stored bytes of the units that are wanted next, fetched with few reads.
//!
//! Units are taken in the order in which they will be wanted and fetched in the order in which they
//! are stored; neighbours share a read. A lot is bounded in bytes and in units, and so is what its
//! reads bring besides.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::units::UnitRef;
use crate::base::{BlobId, ByteRange, Class};
use crate::blob::{Unit, UnitMap};
use crate::source::{BlobSource, ReadCtx, SourceError};

/// Stored bytes of a lot, unless its first unit alone is longer.
const LOT: u64 = 8 << 20;
/// Units of a lot: bounds the memory for units of a few bytes.
const LOT_UNITS: usize = 4096;
/// Longest read of more than one unit.
const WINDOW: u64 = 4 << 20;
/// Neighbours with at most this much between them share a read.
const GAP: u64 = 64 << 10;
/// Bytes that the reads of a lot may bring between its units.
const WASTE: u64 = 4 << 20;
/// How long one read may take, retries included.
const DEADLINE: Duration = Duration::from_secs(60);

/// Units whose stored bytes are here or on their way.
#[derive(Debug, Default)]
pub(super) struct Lot {
    /// For each unit the number of its read.
    units: HashMap<UnitRef, usize>,
    reads: Vec<Read>,
}

#[derive(Debug)]
struct Read {
    stored: ByteRange,
    state: State,
}

#[derive(Debug)]
enum State {
    Running(JoinHandle<Result<Bytes, SourceError>>),
    Done(Result<Bytes, SourceError>),
}

/// Where lots come from.
#[derive(Clone)]
pub(super) struct Fetcher {
    pub source: Arc<dyn BlobSource>,
    pub runtime: Handle,
    /// Reads that run at the same time.
    pub slots: Arc<Semaphore>,
}

impl Fetcher {
    /// Starts to read `stored` of `blob`.
    fn start(&self, blob: BlobId, stored: ByteRange) -> JoinHandle<Result<Bytes, SourceError>> {
        let (source, slots) = (Arc::clone(&self.source), Arc::clone(&self.slots));
        self.runtime.spawn(async move {
            let _slot = slots.acquire_owned().await.expect("nobody closes the slots");
            read(source.as_ref(), &blob, stored).await
        })
    }

    /// Reads `stored` of `blob` now.
    pub(super) fn fetch(&self, blob: &BlobId, stored: ByteRange) -> Result<Bytes, SourceError> {
        self.runtime.block_on(read(self.source.as_ref(), blob, stored))
    }
}

async fn read(source: &dyn BlobSource, blob: &BlobId, stored: ByteRange) -> Result<Bytes, SourceError> {
    let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + DEADLINE);
    source.read(blob, stored, ctx).await
}

impl Lot {
    /// Takes units from `coming` until the lot is full, and starts to fetch them. What has no unit
    /// in `maps` is passed over.
    pub(super) fn start(
        coming: &mut std::iter::Peekable<impl Iterator<Item = UnitRef>>,
        maps: &[UnitMap],
        fetcher: &Fetcher,
    ) -> Self {
        let taken = take(coming, maps);
        let (units, plan) = plan(taken);
        let reads = plan.into_iter().map(|(device, stored)| Read {
            stored,
            state: State::Running(fetcher.start(maps[device].blob().clone(), stored)),
        });
        Self { units, reads: reads.collect() }
    }

    pub(super) fn has(&self, unit: UnitRef) -> bool {
        self.units.contains_key(&unit)
    }

    /// The stored bytes of `unit`, which lie at `stored`; waits for them. `None` if the lot does
    /// not have it.
    pub(super) fn stored(
        &mut self,
        unit: UnitRef,
        stored: ByteRange,
        runtime: &Handle,
    ) -> Option<Result<Bytes, SourceError>> {
        let read = &mut self.reads[*self.units.get(&unit)?];
        if let State::Running(task) = &mut read.state {
            let outcome = runtime.block_on(task).expect("a source does not panic, and nobody aborts while we wait");
            read.state = State::Done(outcome);
        }
        let State::Done(outcome) = &read.state else { unreachable!("made so above") };
        let within = |at: u64| usize::try_from(at - read.stored.start()).expect("a read is in memory");
        Some(outcome.clone().map(|bytes| bytes.slice(within(stored.start())..within(stored.end()))))
    }
}

impl Drop for Lot {
    fn drop(&mut self) {
        for read in &self.reads {
            if let State::Running(task) = &read.state {
                task.abort();
            }
        }
    }
}

/// The units of the next lot, each once.
fn take(
    coming: &mut std::iter::Peekable<impl Iterator<Item = UnitRef>>,
    maps: &[UnitMap],
) -> HashMap<UnitRef, ByteRange> {
    let (mut taken, mut bytes, mut last) = (HashMap::new(), 0, None);
    while let Some(unit) = coming.peek() {
        let stored = maps.get(unit.device).and_then(|map| map.get(unit.index)).map(|unit: &Unit| unit.stored);
        if let Some(stored) = stored
            && !taken.contains_key(unit)
        {
            // Neighbours may be made from the same stored bytes, which are read once.
            let added = if last == Some((unit.device, stored)) { 0 } else { stored.len() };
            if !taken.is_empty() && (bytes + added > LOT || taken.len() == LOT_UNITS) {
                break;
            }
            bytes += added;
            last = Some((unit.device, stored));
            taken.insert(*unit, stored);
        }
        coming.next();
    }
    taken
}

/// Gathers units into reads: for each unit the number of its read, and for each read its device
/// and range. Every unit lies wholly in its read.
fn plan(taken: HashMap<UnitRef, ByteRange>) -> (HashMap<UnitRef, usize>, Vec<(usize, ByteRange)>) {
    let mut sorted: Vec<_> = taken.into_iter().collect();
    sorted.sort_unstable_by_key(|(unit, stored)| (unit.device, *stored, unit.index));
    let (mut units, mut reads, mut waste) = (HashMap::new(), Vec::<(usize, ByteRange)>::new(), 0);
    for (unit, stored) in sorted {
        match reads.last_mut() {
            Some((device, read)) if *device == unit.device && joins(*read, stored, WASTE - waste) => {
                waste += gap(*read, stored);
                *read = read.hull(stored);
            }
            _ => reads.push((unit.device, stored)),
        }
        units.insert(unit, reads.len() - 1);
    }
    (units, reads)
}

fn gap(read: ByteRange, next: ByteRange) -> u64 {
    next.start().saturating_sub(read.end())
}

fn joins(read: ByteRange, next: ByteRange, spare: u64) -> bool {
    gap(read, next) <= GAP.min(spare) && (read.contains(next) || read.hull(next).len() <= WINDOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::{Check, Recipe};

    fn map(stored: &[(u64, u64)]) -> UnitMap {
        let unit = |(index, &(at, len)): (u64, &(u64, u64))| Unit {
            decoded: ByteRange::at(index * 4096, 1).unwrap(),
            stored: ByteRange::at(at, len).unwrap(),
            recipe: Recipe::Zstd,
            check: Check::Unknown,
            part: None,
            encrypted: false,
        };
        let blob = "ab".repeat(32).parse().unwrap();
        UnitMap::new(blob, 1 << 40, (0..).zip(stored).map(unit).collect()).unwrap()
    }

    /// The reads of the lots that the units `wanted` make, as (start, end).
    fn lots(stored: &[(u64, u64)], wanted: &[u32]) -> Vec<Vec<(u64, u64)>> {
        let maps = [map(stored)];
        let mut coming = wanted.iter().map(|&index| UnitRef { device: 0, index }).peekable();
        let mut lots = Vec::new();
        while coming.peek().is_some() {
            let (_, reads) = plan(take(&mut coming, &maps));
            lots.push(reads.iter().map(|(_, read)| (read.start(), read.end())).collect());
        }
        lots
    }

    #[test]
    fn neighbours_share_a_read_whatever_order_they_are_wanted_in() {
        assert_eq!(lots(&[(10, 5), (15, 5), (20, 5)], &[2, 0, 1, 0]), [[(10, 25)]]);
        assert_eq!(lots(&[(0, 5), (5 + GAP, 5)], &[0, 1]), [[(0, 10 + GAP)]]);
        assert_eq!(lots(&[(0, 5), (6 + GAP, 5)], &[0, 1]), [[(0, 5), (6 + GAP, 11 + GAP)]]);
    }

    #[test]
    fn units_made_from_the_same_stored_bytes_are_read_once() {
        let mib = 1 << 20;
        assert_eq!(lots(&[(0, 6 * mib); 3], &[0, 1, 2]), [[(0, 6 * mib)]]);
    }

    #[test]
    fn a_lot_is_bounded_and_a_long_unit_is_one_of_its_own() {
        let mib = 1 << 20;
        let stored: Vec<_> = (0..3).map(|i| (i * 4 * mib, 4 * mib)).collect();
        assert_eq!(lots(&stored, &[0, 1, 2]), [vec![(0, 4 * mib), (4 * mib, 8 * mib)], vec![(8 * mib, 12 * mib)]]);
        assert_eq!(lots(&[(0, 16 * mib), (16 * mib, 1)], &[0, 1]), [[(0, 16 * mib)], [(16 * mib, 16 * mib + 1)]]);
        let many: Vec<_> = (0..LOT_UNITS as u64 + 1).map(|i| (i, 1)).collect();
        let all: Vec<_> = (0..=u32::try_from(LOT_UNITS).unwrap()).collect();
        assert_eq!(lots(&many, &all).len(), 2);
    }

    #[test]
    fn what_lies_between_units_is_bounded_for_the_whole_lot() {
        let apart: Vec<_> = (0..1000).map(|i| (i * (GAP + 1), 1)).collect();
        let all: Vec<_> = (0..1000).collect();

        let lots = lots(&apart, &all);

        let read: u64 = lots[0].iter().map(|(start, end)| end - start).sum();
        assert_eq!(lots.len(), 1);
        assert!((WASTE / 2..=WASTE + 1000).contains(&read), "{read}");
    }

    #[test]
    fn units_that_do_not_exist_are_passed_over() {
        assert_eq!(lots(&[(10, 5)], &[7, 0, 8]), [[(10, 15)]]);
    }
}
