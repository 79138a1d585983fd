//! What devices count, for people and dashboards; nothing is decided by it.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a device has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DeviceStats {
    /// Units the image has, those it names no check for left out.
    pub units: u32,
    /// Units present.
    pub units_present: u32,
    /// Units decoded, checked and written since the device was opened.
    pub units_filled: u64,
    /// Those of them that came from another blob of the store and were not fetched.
    #[serde(default)]
    pub units_copied: u64,
    /// Stored bytes that sources delivered, gaps between units included.
    pub stored_bytes_fetched: u64,
    /// Ranged reads begun.
    pub requests: u64,
    /// Reads that found everything present.
    pub hits: u64,
    /// Reads that had to wait.
    pub misses: u64,
    /// Units that failed to be fetched, checked or written.
    pub errors: u64,
    /// Whether everything is present and durable.
    pub complete: bool,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) filled: AtomicU64,
    pub(super) copied: AtomicU64,
    pub(super) fetched: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) errors: AtomicU64,
}

impl Counters {
    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn failed(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn received(&self, bytes: u64) {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What a store has done so far beside filling devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct StoreStats {
    /// Bytes on disk: measured now and then, counted in between.
    pub used_bytes: u64,
    /// Most bytes that there should be; `None` without a limit.
    pub limit_bytes: Option<u64>,
    /// Blobs and bootstraps removed to make room, and the bytes they took.
    pub evicted: u64,
    pub evicted_bytes: u64,
    /// Writes that the file system refused for lack of room.
    pub refused_writes: u64,
    /// Units that there was no room for, and that readers over FUSE got from memory.
    #[serde(default)]
    pub lent_units: u64,
    /// Units copied from another blob instead of fetched, their bytes, and how many of them share
    /// their blocks on disk.
    pub copied_units: u64,
    pub copied_bytes: u64,
    pub shared_units: u64,
    /// Units of which is known where else they can be copied from.
    pub known_units: u64,
    /// Units and bytes that the scrub has read again, and units that it found spoilt.
    pub scrubbed_units: u64,
    pub scrubbed_bytes: u64,
    pub spoilt_units: u64,
}

/// Where the numbers of [`StoreStats`] are counted.
#[derive(Debug, Default)]
pub(super) struct StoreCounters {
    pub(super) evicted: AtomicU64,
    pub(super) evicted_bytes: AtomicU64,
    pub(super) refused_writes: AtomicU64,
    pub(super) lent_units: AtomicU64,
    pub(super) copied_units: AtomicU64,
    pub(super) copied_bytes: AtomicU64,
    pub(super) shared_units: AtomicU64,
    pub(super) scrubbed_units: AtomicU64,
    pub(super) scrubbed_bytes: AtomicU64,
    pub(super) spoilt_units: AtomicU64,
}

/// Adds to a counter that nothing is decided by.
pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl StoreCounters {
    /// A copy of the counters; what they do not count is left at nothing.
    pub(super) fn snapshot(&self) -> StoreStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StoreStats {
            evicted: read(&self.evicted),
            evicted_bytes: read(&self.evicted_bytes),
            refused_writes: read(&self.refused_writes),
            lent_units: read(&self.lent_units),
            copied_units: read(&self.copied_units),
            copied_bytes: read(&self.copied_bytes),
            shared_units: read(&self.shared_units),
            scrubbed_units: read(&self.scrubbed_units),
            scrubbed_bytes: read(&self.scrubbed_bytes),
            spoilt_units: read(&self.spoilt_units),
            ..StoreStats::default()
        }
    }
}
