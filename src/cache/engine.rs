use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;

use super::fetch::Fetcher;
use super::flush::Flusher;
use super::lent::Lent;
use super::plan::PlanLimits;
use super::pool::{Pool, Queue};
use super::space::Space;
use super::stats::StoreCounters;
use super::twins::Twins;
use super::users::{ImageKey, ImageUse, Users};
use crate::base::Class;
use crate::sys::sandbox::Sandbox;
use crate::telemetry::Telemetry;

/// Limits of a cache. The defaults suit one host that runs containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    /// Threads that decode, check and write. Default: one per core.
    pub decode_threads: usize,
    /// Bytes that fetched and not yet written windows may hold. Default 128 MiB.
    pub memory: u64,
    /// The part of `memory` that only on-demand fetches may use. Default 32 MiB.
    pub memory_reserve: u64,
    /// Longest ranged read for a waiting reader, in stored bytes, unless one unit is longer.
    /// Default 4 MiB.
    pub window: u64,
    /// The same for prefetch: shorter, so that several run at once and readers that join one do
    /// not wait for much else. Default 2 MiB.
    pub prefetch_window: u64,
    /// Stored bytes between two units that are rather read than paid for with a second request.
    /// Default 64 KiB.
    pub gap: u64,
    /// Ranged reads for waiting readers that run at once. One device may hold half of them, so
    /// that a server that does not answer holds up nobody else's readers. Default 16.
    pub fetches: usize,
    /// Ranged reads of prefetch that run at once, and as many ahead of readers. Default 8: a line of 20 ms and 200 Mbit/s is
    /// full with reads of 64 KiB.
    pub prefetch_fetches: usize,
    /// Ranged reads for waiting readers of one image that run at once; 0, the default, for no limit of its own. A blob
    /// that several images share counts for the one that came first.
    pub image_fetches: usize,
    /// Stored bytes per second for waiting readers of one image; `None`, the default, for as many as come.
    pub image_rate: Option<u64>,
    /// Longest read of a prefetch that wants most of a blob. Its units are decoded as they arrive, and
    /// it gives way to readers. Default 16 MiB.
    pub stream: u64,
    /// Stored bytes per second that prefetch may fetch, what is fetched ahead of readers aside;
    /// `None`, the default, for as many as come.
    pub prefetch_rate: Option<u64>,
    /// How long no reader must have waited before prefetch goes on. Default 20 ms.
    pub prefetch_calm: Duration,
    /// How long a reader may wait, queues included. Default 60 s.
    pub deadline: Duration,
    /// How long one prefetch read may take once it runs. Default 120 s.
    pub prefetch_deadline: Duration,
    /// Decoded bytes fetched ahead when a reader is first seen to walk forward; 0 for no
    /// read-ahead at all. Default 1 MiB.
    pub readahead_first: u64,
    /// Most decoded bytes fetched ahead in one step. Default 16 MiB.
    pub readahead_most: u64,
    /// How often new presence bits are made durable. Default 2 s.
    pub flush_every: Duration,
    /// How long it is remembered that a unit did not come in time: a kernel whose read-ahead has failed asks for the first page
    /// at once, on behalf of the same reader, who has waited as long as a reader may. Default 200 ms.
    pub late: Duration,
    /// Bytes written and not yet on the disk at which who writes more waits for the disk; `None`, the default, where the
    /// kernel sees to that.
    pub unsynced: Option<u64>,
    /// What the decoding threads narrow themselves by. Default: nothing.
    pub sandbox: Sandbox,
    /// Most bytes that the cache should take on disk; `None`, the default, for as many as there are.
    /// Readers of mounted images are let through beyond it.
    pub cache_limit: Option<u64>,
    /// Percent of `cache_limit` at which blobs that nobody uses begin to go. Default 95.
    pub high_water: u8,
    /// Percent of `cache_limit` at which that ends. Default 85.
    pub low_water: u8,
    /// Bytes a second that the scrub reads again of complete blobs; 0 for no scrub. Default 2 MiB.
    pub scrub_rate: u64,
    /// Most units that are remembered for copying instead of fetching, at 34 bytes each at most; 0
    /// to copy nothing. Default 458752, which are 448 GiB in chunks of 1 MiB and take up to 9 MiB.
    pub twins: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            decode_threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            memory: 128 * MIB,
            memory_reserve: 32 * MIB,
            window: 4 * MIB,
            prefetch_window: 2 * MIB,
            gap: 64 << 10,
            fetches: 16,
            prefetch_fetches: 8,
            image_fetches: 0,
            image_rate: None,
            deadline: Duration::from_secs(60),
            stream: 16 * MIB,
            prefetch_rate: None,
            prefetch_calm: Duration::from_millis(20),
            prefetch_deadline: Duration::from_secs(120),
            readahead_first: MIB,
            readahead_most: 16 * MIB,
            flush_every: Duration::from_secs(2),
            late: Duration::from_millis(200),
            unsynced: None,
            sandbox: Sandbox::off(),
            cache_limit: None,
            high_water: 95,
            low_water: 85,
            scrub_rate: 2 * MIB,
            // As many as fill the table of a hash map to the brim.
            twins: (1 << 19) / 8 * 7,
        }
    }
}

impl StoreOptions {
    /// The defaults for a process that may use `limit` bytes of memory altogether. With little, fewer
    /// and shorter reads run at once: slower, but alive.
    ///
    /// Fetched bytes get an eighth of it. They exist twice for moments, what a system allocator keeps
    /// comes on top, and the kernel charges the dirty pages of the cache to the same account: of a control group of the first
    /// version it does not hold up who makes them, and ends the process instead.
    pub fn within(limit: Option<u64>) -> Self {
        let default = Self::default();
        let Some(share) = limit.map(|bytes| bytes / 8).filter(|&share| share < default.memory) else { return default };
        Self {
            memory: share,
            memory_reserve: share / 4,
            window: default.window.min(share / 4),
            prefetch_window: default.prefetch_window.min(share / 4),
            stream: default.stream.min(share / 4),
            readahead_first: default.readahead_first.min(share),
            readahead_most: default.readahead_most.min(share),
            unsynced: Some(share / 2),
            ..default
        }
    }

    pub(super) fn window(&self, class: Class) -> u64 {
        match class {
            Class::OnDemand => self.window,
            Class::Prefetch => self.prefetch_window,
        }
    }

    pub(super) fn fetches(&self, class: Class) -> usize {
        match class {
            Class::OnDemand => self.fetches.max(1),
            Class::Prefetch => self.prefetch_fetches.max(1),
        }
    }

    /// How prefetch is gathered into reads: long ones, over what is there already, where `most` of
    /// a blob is wanted. At a rate no read takes much longer than a moment.
    pub(super) fn bulk_limits(&self, most: bool) -> PlanLimits {
        let moment = self.prefetch_rate.map_or(u64::MAX, |rate| (rate / 4).max(256 << 10));
        if most {
            PlanLimits { gap: self.gap.saturating_mul(2), window: self.stream.min(moment) }
        } else {
            PlanLimits { gap: self.gap, window: self.prefetch_window.min(moment) }
        }
    }

    /// How many of the on-demand ones a single device may hold.
    pub(super) fn fetches_per_device(&self) -> usize {
        (self.fetches / 2).max(1)
    }
}

/// The threads, queues and limits that devices share.
///
/// Lives as long as its last device. Dropping it ends its threads.
pub struct Engine {
    pub(super) options: Arc<StoreOptions>,
    pub(super) telemetry: Telemetry,
    pub(super) runtime: Handle,
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) flusher: Flusher,
    pub(super) space: Arc<Space>,
    /// Bytes written since the disk was last waited for by who wrote them.
    unsynced: AtomicU64,
    pub(super) twins: Arc<Twins>,
    pub(super) lent: Lent,
    pub(super) counters: Arc<StoreCounters>,
    pool: Pool,
    next_device: AtomicU64,
}

impl Engine {
    /// Starts the threads. Fetches run on `runtime`, which must have timers enabled.
    ///
    /// # Errors
    /// If the system has no room for the threads.
    pub fn new(options: StoreOptions, runtime: Handle) -> io::Result<Arc<Self>> {
        Self::counted(options, runtime, Telemetry::default())
    }

    /// The same, with `telemetry` counting what its devices do.
    pub fn counted(options: StoreOptions, runtime: Handle, telemetry: Telemetry) -> io::Result<Arc<Self>> {
        let twins = Arc::new(Twins::new(options.twins));
        Self::over(options, runtime, twins, telemetry)
    }

    /// The same, with the index of a store, and `telemetry` counting what its devices do.
    pub(super) fn over(
        options: StoreOptions,
        runtime: Handle,
        twins: Arc<Twins>,
        telemetry: Telemetry,
    ) -> io::Result<Arc<Self>> {
        let options = Arc::new(options);
        let pool = Pool::start(options.decode_threads, &options.sandbox)?;
        let fetcher = Fetcher::new(Arc::clone(&options), runtime.clone(), Arc::clone(pool.queue()), telemetry.clone());
        let flusher = Flusher::start(options.flush_every)?;
        let space = Arc::new(Space::new(&options));
        let (counters, lent) = (Arc::default(), Lent::new(options.memory_reserve));
        let (unsynced, next_device) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Self {
            options,
            telemetry,
            runtime,
            fetcher,
            flusher,
            space,
            unsynced,
            twins,
            lent,
            counters,
            pool,
            next_device,
        };
        Ok(Arc::new(shared))
    }

    /// Counts `image` among the `users` of devices that share them: see [`super::Device::is_used_by`].
    pub fn used_by(self: &Arc<Self>, users: &Arc<Users>, image: ImageKey) -> ImageUse {
        ImageUse::new(users, image, self)
    }

    pub(super) fn jobs(&self) -> &Queue {
        self.pool.queue()
    }

    /// Counts bytes that were written, and waits until all devices are on the disk when there are too many that are not.
    pub(super) fn sync_in_time(&self, written: u64) {
        let Some(limit) = self.options.unsynced else { return };
        let is_time = self.unsynced.fetch_add(written, Ordering::Relaxed) + written >= limit;
        if is_time && self.unsynced.swap(0, Ordering::Relaxed) > 0 {
            self.flusher.flush_now();
        }
    }

    pub(super) fn number_device(&self) -> u64 {
        self.next_device.fetch_add(1, Ordering::Relaxed)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("options", &self.options).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_memory_means_short_reads_and_much_changes_nothing() {
        const MIB: u64 = 1 << 20;
        let small = StoreOptions::within(Some(32 * MIB));

        assert_eq!((small.memory, small.memory_reserve, small.readahead_most), (4 * MIB, MIB, 4 * MIB));
        assert_eq!((small.window, small.prefetch_window, small.unsynced), (MIB, MIB, Some(2 * MIB)));
        assert_eq!(StoreOptions::within(Some(1024 * MIB)), StoreOptions::default());
        assert_eq!(StoreOptions::within(None), StoreOptions::default());
    }
}
