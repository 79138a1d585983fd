//! What every metric is called and what it means. `docs/METRICS.md` is made of this.

use std::fmt::Write;

/// One metric, with all its labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Without the suffixes that unit and kind add; see [`Metric::name`].
    pub(super) stem: &'static str,
    /// What kind of number it is.
    pub kind: Kind,
    /// In what it is measured.
    pub unit: Unit,
    /// Names of its labels, in order.
    pub labels: &'static [&'static str],
    /// Whether its name, labels and meaning will stay.
    pub stability: Stability,
    /// What it says, in one sentence without a full stop.
    pub meaning: &'static str,
}

/// Kinds of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, from 0 at the start of the daemon.
    Counter,
    /// A state.
    Gauge,
    /// How many durations fell into which range.
    Histogram,
}

/// Units of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A number of things.
    None,
    Bytes,
    Seconds,
}

/// What may be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stability {
    /// Changes only with a major version.
    Stable,
    /// May change with any version, which the changelog says.
    Experimental,
}

impl Metric {
    /// Its full name in the exposition. A histogram's series add `_bucket`, `_sum` and `_count`.
    pub fn name(&self) -> String {
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{}{total}", self.stem, self.unit.suffix())
    }
}

impl Kind {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

impl Unit {
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Bytes => "_bytes",
            Self::Seconds => "_seconds",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Bytes => "bytes",
            Self::Seconds => "seconds",
        }
    }
}

impl Stability {
    fn text(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Experimental => "experimental",
        }
    }
}

const fn counter(
    stem: &'static str,
    unit: Unit,
    labels: &'static [&'static str],
    stability: Stability,
    meaning: &'static str,
) -> Metric {
    Metric { stem, kind: Kind::Counter, unit, labels, stability, meaning }
}

const fn gauge(stem: &'static str, unit: Unit, labels: &'static [&'static str], meaning: &'static str) -> Metric {
    Metric { stem, kind: Kind::Gauge, unit, labels, stability: Stability::Stable, meaning }
}

const fn histogram(stem: &'static str, labels: &'static [&'static str], meaning: &'static str) -> Metric {
    let (kind, unit, stability) = (Kind::Histogram, Unit::Seconds, Stability::Stable);
    Metric { stem, kind, unit, labels, stability, meaning }
}

use Stability::{Experimental, Stable};
use Unit::{Bytes, None};

pub(super) const READS: Metric = counter(
    "rafsd_reads",
    None,
    &["backend", "answer"],
    Stable,
    "Reads that the kernel asked about, by what they were told",
);
pub(super) const READS_WAITING: Metric =
    gauge("rafsd_reads_waiting", None, &["backend"], "Reads that wait for their data now");
pub(super) const READ_DURATION: Metric =
    histogram("rafsd_read_duration", &["backend"], "From the kernel's request to its answer, of reads that waited");
pub(super) const MISSES: Metric =
    counter("rafsd_misses", None, &["class"], Stable, "Ranges asked for that were not all in the cache");
pub(super) const READ_QUEUE: Metric = histogram(
    "rafsd_read_queue",
    &[],
    "From the request of a reader to the start of the ranged read that it waits for",
);
pub(super) const FETCH_DURATION: Metric =
    histogram("rafsd_fetch_duration", &["class"], "One ranged read, with all its attempts and sources");
pub(super) const DECODE_QUEUE: Metric =
    histogram("rafsd_decode_queue", &["class"], "From the arrival of stored bytes to a thread that decodes them");
pub(super) const LAND_DURATION: Metric =
    histogram("rafsd_land_duration", &["class"], "Decoding, checking and writing the units of one stored range");
pub(super) const UNITS_FILLED: Metric =
    counter("rafsd_units_filled", None, &["class"], Stable, "Units decoded, checked and written");
pub(super) const FILLED: Metric =
    counter("rafsd_filled", Bytes, &["class"], Stable, "Decoded bytes of the units that were written");
pub(super) const UNITS_FAILED: Metric =
    counter("rafsd_units_failed", None, &["cause"], Stable, "Units that did not come, by cause");
pub(super) const REFETCHED: Metric =
    counter("rafsd_refetches", None, &[], Stable, "Stored ranges asked for again because what came was damaged");
pub(super) const SOURCE_READS: Metric = counter(
    "rafsd_source_reads",
    None,
    &["source", "class", "outcome"],
    Stable,
    "Ranged reads of a source, by how they ended",
);
pub(super) const SOURCE: Metric =
    counter("rafsd_source", Bytes, &["source", "class"], Stable, "Stored bytes that a source delivered");
pub(super) const SOURCE_RETRIES: Metric =
    counter("rafsd_source_retries", None, &["source"], Stable, "Attempts after the first, over all reads of a source");
pub(super) const SOURCE_HEDGES: Metric = counter(
    "rafsd_source_hedges",
    None,
    &["source"],
    Stable,
    "Second requests beside a first that was slower than is usual",
);
pub(super) const SOURCE_WRONG: Metric = counter(
    "rafsd_source_wrong",
    None,
    &["source"],
    Stable,
    "Ranges of which a source delivered bytes that did not fit their digest, where another source had those that do",
);
pub(super) const CACHE: Metric = gauge("rafsd_cache", Bytes, &[], "Bytes that the cache occupies on its disk");
pub(super) const CACHE_LIMIT: Metric =
    gauge("rafsd_cache_limit", Bytes, &[], "Bytes that the cache may occupy; 0 if nothing limits it");
pub(super) const EVICTIONS: Metric =
    counter("rafsd_evictions", None, &[], Stable, "Blobs thrown out of the cache to make room");
pub(super) const EVICTED: Metric = counter("rafsd_evicted", Bytes, &[], Stable, "Bytes freed by that");
pub(super) const SCRUBBED: Metric =
    counter("rafsd_scrubbed", Bytes, &[], Experimental, "Decoded bytes in the cache that were checked again");
pub(super) const SCRUB_BAD_UNITS: Metric =
    counter("rafsd_scrub_bad_units", None, &[], Experimental, "Units that this found bad");
pub(super) const DEDUP_UNITS: Metric =
    counter("rafsd_dedup_units", None, &[], Experimental, "Units copied from another blob in the cache, not fetched");
pub(super) const DEDUP: Metric = counter("rafsd_dedup", Bytes, &[], Experimental, "Decoded bytes of those units");
pub(super) const IMAGES: Metric = gauge("rafsd_images", None, &["backend"], "Images mounted or registered now");
pub(super) const UNSERVED: Metric = gauge(
    "rafsd_unserved_mounts",
    None,
    &[],
    "Mounts of an earlier daemon that live and cannot be served: their cold reads fail, and their blobs stay in the cache",
);
pub(super) const ADOPTIONS: Metric =
    counter("rafsd_adoptions", None, &[], Experimental, "Whether this daemon took over from another, 1 or 0");
pub(super) const ADOPTED_MOUNTS: Metric =
    counter("rafsd_adopted_mounts", None, &[], Experimental, "Mounts that it took over");
pub(super) const ADOPTED_READS: Metric = counter(
    "rafsd_adopted_reads",
    None,
    &["answer"],
    Experimental,
    "Reads by fanotify or FUSE that its predecessor had taken and not answered, by what they were told",
);

/// Every metric, in the order of the exposition.
pub const CATALOGUE: &[Metric] = &[
    READS,
    READS_WAITING,
    READ_DURATION,
    MISSES,
    READ_QUEUE,
    FETCH_DURATION,
    DECODE_QUEUE,
    LAND_DURATION,
    UNITS_FILLED,
    FILLED,
    UNITS_FAILED,
    REFETCHED,
    SOURCE_READS,
    SOURCE,
    SOURCE_HEDGES,
    SOURCE_RETRIES,
    SOURCE_WRONG,
    CACHE,
    CACHE_LIMIT,
    EVICTIONS,
    EVICTED,
    SCRUBBED,
    SCRUB_BAD_UNITS,
    DEDUP_UNITS,
    DEDUP,
    IMAGES,
    UNSERVED,
    ADOPTIONS,
    ADOPTED_MOUNTS,
    ADOPTED_READS,
];

/// The catalogue as a table, for `docs/METRICS.md`.
pub fn markdown() -> String {
    let mut table =
        String::from("| Name | Kind | Unit | Labels | Stability | Meaning |\n| --- | --- | --- | --- | --- | --- |\n");
    for metric in CATALOGUE {
        let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let (kind, unit, stability) = (metric.kind.text(), metric.unit.text(), metric.stability.text());
        let (name, labels) = (metric.name(), labels.join(", "));
        // Writing to a string cannot fail.
        let _ = writeln!(table, "| `{name}` | {kind} | {unit} | {labels} | {stability} | {} |", metric.meaning);
    }
    table
}
