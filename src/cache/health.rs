//! How a device is doing: who waits, what went wrong, and whether that is over.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::FillError;
use crate::base::Chain;
use crate::blob::UnitIndex;
use crate::telemetry::{Cause, Counter, Failure, Family, Telemetry};

/// What can be told about a device at one moment.
#[derive(Clone, Debug)]
pub struct DeviceHealth {
    /// Readers that wait for data of it.
    pub waiting: usize,
    /// How long the first of them has waited.
    pub oldest_wait: Option<Duration>,
    /// Units that did not come since the device was opened, by cause.
    pub failed: Vec<(Cause, u64)>,
    /// Whether the last unit that was wanted did not come, other than by being cancelled.
    pub is_failing: bool,
    /// The last failure, however long ago.
    pub last_failure: Option<Failure>,
    /// Where its bytes come from, best first, as sources describe themselves.
    pub sources: Vec<String>,
    /// Decoded bytes of the units that images name, and of those that are in the cache.
    pub needed_bytes: u64,
    pub present_bytes: u64,
}

/// What is remembered about units that did not come.
#[derive(Debug, Default)]
pub(super) struct Failures {
    /// Counts them for all devices.
    telemetry: Telemetry,
    pub(super) by_cause: Family<Cause, Counter>,
    failing: AtomicBool,
    last: Mutex<Option<Failure>>,
    late: Mutex<VecDeque<Late>>,
    /// Whether there is any. Read for every miss, and almost never set.
    has_late: AtomicBool,
}

/// A unit that did not come in time.
#[derive(Debug)]
struct Late {
    unit: UnitIndex,
    at: Instant,
    error: FillError,
}

/// Most that are remembered.
const MOST_LATE: usize = 4096;

impl Failures {
    pub(super) fn new(telemetry: Telemetry) -> Self {
        Self { telemetry, ..Self::default() }
    }

    pub(super) fn note(&self, error: &FillError) {
        let cause = error.cause();
        self.by_cause.at(cause).inc();
        self.telemetry.fills.failed.at(cause).inc();
        if cause != Cause::Cancelled {
            *self.last.lock().unwrap() = Some(Failure { at: Instant::now(), text: Chain(error).to_string() });
            self.failing.store(true, Ordering::Relaxed);
        }
    }

    /// Remembers for a moment that a unit did not come in time.
    pub(super) fn note_late(&self, unit: UnitIndex, error: FillError) {
        let mut late = self.late.lock().unwrap();
        late.push_back(Late { unit, at: Instant::now(), error });
        if late.len() > MOST_LATE {
            late.pop_front();
        }
        self.has_late.store(true, Ordering::Release);
    }

    /// Why a unit did not come in time within the last `moment`.
    pub(super) fn late(&self, unit: UnitIndex, moment: Duration) -> Option<FillError> {
        if !self.has_late.load(Ordering::Acquire) {
            return None;
        }
        let mut late = self.late.lock().unwrap();
        late.retain(|late| late.at.elapsed() < moment);
        self.has_late.store(!late.is_empty(), Ordering::Release);
        late.iter().find(|late| late.unit == unit).map(|late| late.error.clone())
    }

    /// A unit came.
    pub(super) fn heal(&self) {
        if self.failing.load(Ordering::Relaxed) {
            self.failing.store(false, Ordering::Relaxed);
        }
    }

    pub(super) fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    pub(super) fn last(&self) -> Option<Failure> {
        self.last.lock().unwrap().clone()
    }
}

impl FillError {
    /// As what it is counted.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Source { .. } => Cause::Source,
            Self::Corrupt { .. } => Cause::Corrupt,
            Self::Limited { .. } => Cause::Limit,
            Self::Unmapped { .. } => Cause::Unmapped,
            Self::NoSpace { .. } => Cause::NoSpace,
            Self::Io { .. } | Self::Lost { .. } => Cause::Io,
            Self::Cancelled => Cause::Cancelled,
        }
    }
}
