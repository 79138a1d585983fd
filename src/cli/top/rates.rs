//! What happened between two answers of the daemon.

use std::time::Duration;

use serde::Serialize;

use crate::daemon::api::observe::{Activity, ByClass};
use crate::telemetry::Snapshot;

/// Numbers of the time between two looks at a daemon.
#[derive(Debug, Serialize)]
pub(super) struct Rates {
    /// Milliseconds between them.
    pub(super) interval_ms: u64,
    pub(super) at_once_per_second: f64,
    pub(super) waited_per_second: f64,
    pub(super) denied_per_second: f64,
    pub(super) misses_per_second: PerClass,
    pub(super) bytes_per_second: PerClass,
    /// Of reads that waited and were answered in between; absent if there were none.
    pub(super) p50_us: Option<u64>,
    pub(super) p99_us: Option<u64>,
    /// In the order of the later answer.
    pub(super) sources: Vec<SourceRates>,
    pub(super) images: Vec<ImageRates>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct PerClass {
    pub(super) on_demand: f64,
    pub(super) prefetch: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct SourceRates {
    pub(super) reads_per_second: f64,
    pub(super) failed_per_second: f64,
    pub(super) bytes_per_second: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct ImageRates {
    pub(super) misses_per_second: f64,
}

/// Both, for machines.
#[derive(Debug, Serialize)]
pub(super) struct WithActivity<'a> {
    rates: &'a Rates,
    activity: &'a Activity,
}

impl Rates {
    /// What happened between `before` and `now`. A daemon that was started in between has done all
    /// it has done since its start.
    pub(super) fn between(before: &Activity, now: &Activity) -> Self {
        let is_same = before.pid == now.pid && before.uptime_ms <= now.uptime_ms;
        let before = is_same.then_some(before);
        let interval_ms = now.uptime_ms - before.map_or(0, |before| before.uptime_ms);
        let rate = |count: u64, older: Option<u64>| per_second(count.saturating_sub(older.unwrap_or(0)), interval_ms);
        let classes = |get: fn(&Activity) -> ByClass| PerClass {
            on_demand: rate(get(now).on_demand, before.map(|before| get(before).on_demand)),
            prefetch: rate(get(now).prefetch, before.map(|before| get(before).prefetch)),
        };
        let answers = |get: fn(&Activity) -> u64| rate(get(now), before.map(get));
        let durations = now.read_durations.snapshot();
        let durations = before.map_or(durations.clone(), |before| durations.since(&before.read_durations.snapshot()));
        let source = |at: &crate::daemon::api::observe::SourceActivity| {
            let older = before.and_then(|before| before.sources.iter().find(|older| older.source == at.source));
            let bytes = |of: ByClass| of.on_demand + of.prefetch;
            SourceRates {
                reads_per_second: rate(at.reads, older.map(|older| older.reads)),
                failed_per_second: rate(at.failed, older.map(|older| older.failed)),
                bytes_per_second: rate(bytes(at.bytes), older.map(|older| bytes(older.bytes))),
            }
        };
        let image = |at: &crate::daemon::api::observe::ImageActivity| {
            let same = |older: &&crate::daemon::api::observe::ImageActivity| {
                (&older.dir, &older.image) == (&at.dir, &at.image)
            };
            let older = before.and_then(|before| before.images.iter().find(same));
            // What is seen for the first time may have been there for long.
            let older = older.map_or(at.misses, |older| older.misses);
            ImageRates { misses_per_second: rate(at.misses, Some(older)) }
        };
        Self {
            interval_ms,
            at_once_per_second: answers(|of| of.reads.iter().map(|reads| reads.at_once).sum()),
            waited_per_second: answers(|of| of.reads.iter().map(|reads| reads.filled).sum()),
            denied_per_second: answers(|of| of.reads.iter().map(|reads| reads.denied).sum()),
            misses_per_second: classes(|of| of.misses),
            bytes_per_second: classes(|of| of.fetched_bytes),
            p50_us: quantile(&durations, 0.5),
            p99_us: quantile(&durations, 0.99),
            sources: now.sources.iter().map(source).collect(),
            images: now.images.iter().map(image).collect(),
        }
    }

    pub(super) fn with<'a>(&'a self, activity: &'a Activity) -> WithActivity<'a> {
        WithActivity { rates: self, activity }
    }
}

fn quantile(of: &Snapshot, part: f64) -> Option<u64> {
    of.quantile(part).map(|took: Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX))
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn per_second(count: u64, interval_ms: u64) -> f64 {
    if interval_ms == 0 { 0.0 } else { count as f64 * 1000.0 / interval_ms as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::samples;

    fn later() -> Activity {
        let mut later = samples::activity();
        later.uptime_ms += 2000;
        later.reads[0].filled += 6;
        later.misses.on_demand += 10;
        later.fetched_bytes.prefetch += 4 << 20;
        later.sources[0].reads += 2;
        later.images[0].misses += 10;
        later.read_durations.counts[3] += 6;
        later
    }

    #[test]
    fn rates_are_differences_by_time() {
        let rates = Rates::between(&samples::activity(), &later());
        assert_eq!((rates.interval_ms, rates.waited_per_second, rates.denied_per_second), (2000, 3.0, 0.0));
        assert_eq!(rates.misses_per_second, PerClass { on_demand: 5.0, prefetch: 0.0 });
        assert_eq!(rates.bytes_per_second.prefetch, f64::from(2 << 20));
        assert_eq!((rates.sources[0].reads_per_second, rates.images[0].misses_per_second), (1.0, 5.0));
        assert_eq!(rates.p99_us.map(|us| (50..=100).contains(&us)), Some(true), "{:?}", rates.p99_us);
    }

    #[test]
    fn nothing_happened_between_an_answer_and_itself() {
        let rates = Rates::between(&samples::activity(), &samples::activity());
        assert_eq!((rates.interval_ms, rates.waited_per_second, rates.p50_us), (0, 0.0, None));
    }

    #[test]
    fn another_daemon_starts_from_nothing() {
        let mut other = later();
        other.pid += 1;
        other.uptime_ms = 1000;
        let rates = Rates::between(&samples::activity(), &other);
        assert_eq!((rates.interval_ms, rates.waited_per_second), (1000, 10.0));
        assert_eq!(rates.images[0].misses_per_second, 0.0);
    }
}
