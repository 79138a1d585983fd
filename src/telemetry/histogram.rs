//! How long things take: counts per range of durations, without a lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the ranges but the last, which has none. From a copy between pages (10 µs) to
/// the longest that anybody waits (minutes), in steps of about 2.3.
pub const BOUNDS: [Duration; 22] = [
    Duration::from_micros(10),
    Duration::from_micros(25),
    Duration::from_micros(50),
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_micros(2500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_millis(2500),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
    Duration::from_secs(60),
    Duration::from_secs(120),
];

const BUCKETS: usize = BOUNDS.len() + 1;

/// Durations, counted by range.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// What a histogram has counted at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// One number per range; the last range has no end.
    pub counts: Vec<u64>,
    /// All durations together.
    pub sum: Duration,
}

impl Histogram {
    /// Counts one duration.
    pub fn observe(&self, took: Duration) {
        let at = BOUNDS.partition_point(|bound| *bound < took);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What has been counted so far.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)),
        }
    }
}

impl Snapshot {
    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The duration that this `part` (0 to 1) of all do not exceed, interpolated within its range;
    /// `None` if there are none. What lies above all bounds counts as the last bound.
    #[expect(clippy::cast_precision_loss, reason = "an estimate to begin with")]
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let wanted = self.count() as f64 * part;
        let mut below = 0.0;
        for (at, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let here = *count as f64;
            if below + here >= wanted {
                let from = at.checked_sub(1).map_or(Duration::ZERO, |before| BOUNDS[before.min(BOUNDS.len() - 1)]);
                let to = BOUNDS.get(at).copied().unwrap_or(from);
                return Some(from + (to - from).mul_f64(((wanted - below) / here).clamp(0.0, 1.0)));
            }
            below += here;
        }
        None
    }

    /// What was counted since `before`, an older snapshot of the same histogram.
    pub fn since(&self, before: &Self) -> Self {
        let older = |at: usize| before.counts.get(at).copied().unwrap_or(0);
        let counts = self.counts.iter().enumerate().map(|(at, count)| count.saturating_sub(older(at))).collect();
        Self { counts, sum: self.sum.saturating_sub(before.sum) }
    }

    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let most = self.counts.len().max(other.counts.len());
        let at = |of: &Self, at: usize| of.counts.get(at).copied().unwrap_or(0);
        Self { counts: (0..most).map(|i| at(self, i) + at(other, i)).collect(), sum: self.sum + other.sum }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(micros: &[u64]) -> Snapshot {
        let histogram = Histogram::default();
        micros.iter().for_each(|us| histogram.observe(Duration::from_micros(*us)));
        histogram.snapshot()
    }

    #[test]
    fn bounds_grow_and_belong_to_the_range_below_them() {
        assert!(BOUNDS.is_sorted());
        let counts = of(&[0, 10, 11, 25, 120_000_000, 120_000_001]).counts;
        let found: Vec<_> = counts.iter().enumerate().filter(|(_, n)| **n > 0).map(|(at, n)| (at, *n)).collect();
        assert_eq!(found, [(0, 2), (1, 2), (21, 1), (22, 1)]);
    }

    #[test]
    fn quantiles_lie_where_the_durations_do() {
        assert_eq!(of(&[]).quantile(0.5), None);
        let all = of(&[20; 100]);
        assert_eq!(all.quantile(1.0), Some(Duration::from_micros(25)));
        assert_eq!(all.quantile(0.5), Some(Duration::from_nanos(17_500)));
        let mixed = of(&[[30; 98].as_slice(), &[900_000; 2]].concat());
        assert!(mixed.quantile(0.5).unwrap() < Duration::from_micros(50));
        assert!(mixed.quantile(0.99).unwrap() > Duration::from_millis(500));
        assert_eq!(of(&[500_000_000]).quantile(0.5), Some(Duration::from_secs(120)));
    }

    #[test]
    fn differences_and_sums_are_those_of_the_durations() {
        let (old, new) = (of(&[20, 30]), of(&[20, 30, 30, 7]));
        assert_eq!(new.since(&old), of(&[30, 7]));
        assert_eq!(old.plus(&of(&[30, 7])), new);
        assert_eq!(Snapshot::default().plus(&old), old);
    }
}
