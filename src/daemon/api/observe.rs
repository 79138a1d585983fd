//! What the daemon tells about how it is doing.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::export::BackendKind;
use crate::telemetry::{BOUNDS, Failure, Snapshot};

/// Whether an image needs the daemon, and whether that works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum ImageState {
    /// Data is missing and is fetched when it is read.
    Lazy,
    /// All data is in the cache and durable.
    Complete,
    /// Data is missing, and the last attempt to get some failed.
    Degraded,
}

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Trouble {
    /// What, with its causes.
    pub error: String,
    /// Milliseconds since then.
    pub ago_ms: u64,
}

/// One source of stored bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SourceReport {
    /// Directory or URL, without user and query.
    pub source: String,
    /// Whether the last read of it failed.
    pub failing: bool,
    /// The last failure, however long ago.
    pub last_error: Option<Trouble>,
}

/// Units of one blob that did not come since it was opened, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FailedUnits {
    /// The source has it not or cannot be reached.
    pub source: u64,
    /// What came was not what the image promised.
    pub corrupt: u64,
    /// The cache's disk was full.
    pub no_space: u64,
    /// The cache's disk failed.
    pub io: u64,
    /// Its turn did not come in time, by a limit of its image.
    #[serde(default)]
    pub limit: u64,
    /// The image has nothing there.
    pub unmapped: u64,
    /// Nobody wanted it any more.
    pub cancelled: u64,
}

/// How a blob is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct HealthReport {
    /// Decoded bytes that images name, and those of them in the cache.
    pub needed_bytes: u64,
    pub present_bytes: u64,
    /// Reads that wait for data now, and how long the first of them has.
    pub waiting: u64,
    pub oldest_wait_ms: Option<u64>,
    pub failed_units: FailedUnits,
    /// Whether the last unit that was wanted did not come.
    pub failing: bool,
    /// The last failure, however long ago.
    pub last_error: Option<Trouble>,
}

/// A number for each class of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ByClass {
    /// Somebody waited.
    pub on_demand: u64,
    /// Nobody did.
    pub prefetch: u64,
}

/// Reads that one backend was asked about since the daemon's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ReadsReport {
    pub backend: BackendKind,
    /// Everything was there.
    pub at_once: u64,
    /// Waited, and the data came.
    pub filled: u64,
    /// Got an error.
    pub denied: u64,
    /// Wait now.
    pub waiting: u64,
}

/// Durations since the daemon's start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Durations {
    /// Upper bounds of all ranges but the last, in microseconds.
    pub bounds_us: Vec<u64>,
    /// How many durations each range has; one more than there are bounds.
    pub counts: Vec<u64>,
    /// All of them together, in microseconds.
    pub sum_us: u64,
}

/// What one source was asked since the daemon's start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct SourceActivity {
    /// Directory or URL, without user and query.
    pub source: String,
    /// Reads that ended, those that were cancelled left out.
    pub reads: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Attempts after the first.
    pub retries: u64,
    /// Stored bytes that came.
    pub bytes: ByClass,
    /// Whether the last read failed.
    pub failing: bool,
    /// The last failure, however long ago.
    pub last_error: Option<Trouble>,
}

/// How full the cache is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CacheFill {
    /// What it occupies on its disk; up to ten seconds old.
    pub bytes: u64,
    /// What it may occupy, if something limits it.
    pub limit: Option<u64>,
    /// Of its disk.
    pub disk_bytes: u64,
    pub disk_free: u64,
}

/// What one image asks of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ImageActivity {
    /// Mount point; absent for an image that is only registered.
    pub dir: Option<PathBuf>,
    /// SHA-256 of the bootstrap.
    pub image: String,
    pub state: ImageState,
    /// Reads of its blobs that waited, since each was opened. Blobs are shared by images.
    pub misses: u64,
    /// Reads that wait now.
    pub waiting: u64,
}

/// `GET /v1/activity`: numbers that are cheap to ask for every second. All but states only grow, so
/// that the difference of two answers is what happened in between.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Activity {
    pub pid: u32,
    /// Milliseconds since the daemon's start.
    pub uptime_ms: u64,
    pub reads: Vec<ReadsReport>,
    /// How long the first of the waiting reads has waited.
    pub oldest_wait_ms: Option<u64>,
    /// From request to answer, of reads that waited.
    pub read_durations: Durations,
    /// Ranges asked for that were not all in the cache.
    pub misses: ByClass,
    /// Stored bytes that came from sources.
    pub fetched_bytes: ByClass,
    /// Units that did not come, by cause.
    pub failed_units: FailedUnits,
    pub sources: Vec<SourceActivity>,
    pub cache: CacheFill,
    pub images: Vec<ImageActivity>,
}

/// `GET /v1/log` and `PUT /v1/log`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LogRules {
    /// `error`, `warn`, `info`, `debug`, `trace`, `off`, or rules like `info,rafsd::cache=debug`.
    pub level: String,
}

/// Milliseconds, as far as they fit.
pub(crate) fn millis(of: Duration) -> u64 {
    u64::try_from(of.as_millis()).unwrap_or(u64::MAX)
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self { error: failure.text, ago_ms: millis(failure.at.elapsed()) }
    }
}

impl From<Snapshot> for Durations {
    fn from(shot: Snapshot) -> Self {
        let micros = |of: Duration| u64::try_from(of.as_micros()).unwrap_or(u64::MAX);
        Self { bounds_us: BOUNDS.iter().copied().map(micros).collect(), counts: shot.counts, sum_us: micros(shot.sum) }
    }
}

impl Durations {
    /// The durations as they can be calculated with. The bounds are taken to be those of this
    /// version.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { counts: self.counts.clone(), sum: Duration::from_micros(self.sum_us) }
    }
}

impl FailedUnits {
    /// Those that somebody still wanted, with the names of their causes.
    pub fn wanted(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        let Self { source, corrupt, no_space, io, limit, unmapped, cancelled: _ } = *self;
        let all = [
            ("source", source),
            ("corrupt", corrupt),
            ("no space", no_space),
            ("io", io),
            ("limit", limit),
            ("unmapped", unmapped),
        ];
        all.into_iter().filter(|(_, count)| *count > 0)
    }
}
