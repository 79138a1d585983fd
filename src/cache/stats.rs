//! What devices count, for people and dashboards; nothing is decided by it.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a device has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeviceStats {
    /// Units the image has, those it names no check for left out.
    pub units: u32,
    /// Units present.
    pub units_present: u32,
    /// Units decoded, checked and written since the device was opened.
    pub units_filled: u64,
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

    pub(super) fn received(&self, bytes: u64) {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
    }
}
