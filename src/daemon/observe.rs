//! How the daemon and its images are doing, put together for people and dashboards.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::Daemon;
use super::api::observe::{
    Activity, ByClass, CacheFill, Durations, FailedUnits, HealthReport, ImageActivity, ReadsReport, SourceActivity,
    SourceReport, millis,
};
use crate::base::Class;
use crate::cache::DeviceHealth;
use crate::export::BackendKind;
use crate::telemetry::{Answer, Backend, Cause, Counter, Family, Outcome, Place, Telemetry};

/// How long the size of the cache is believed. It is found by looking at every file.
const STALE: Duration = Duration::from_secs(10);

/// The bytes that a directory occupied when somebody last looked.
#[derive(Debug, Default)]
pub(super) struct Occupied(Mutex<Option<(Instant, u64)>>);

impl Occupied {
    /// The bytes allocated below `dir`, at most [`STALE`] ago. Reads directories.
    fn below(&self, dir: &Path) -> u64 {
        let mut known = self.0.lock().unwrap();
        if let Some((at, bytes)) = *known
            && at.elapsed() < STALE
        {
            return bytes;
        }
        let bytes = allocated(dir);
        *known = Some((Instant::now(), bytes));
        bytes
    }
}

/// Bytes allocated for everything below `dir`. What vanishes meanwhile or cannot be read counts as
/// nothing.
fn allocated(dir: &Path) -> u64 {
    let (mut bytes, mut dirs) = (0, vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    bytes
}

impl Daemon {
    /// What is counted, for whoever adds to it.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// All metrics in the OpenMetrics text format. May look at the files of the cache.
    pub fn metrics(&self) -> String {
        self.note_space();
        let backends = self.served().into_iter().map(|(_, served)| served.backend).collect::<Vec<_>>();
        for kind in BackendKind::ALL {
            let count = backends.iter().filter(|backend| **backend == kind).count();
            self.telemetry.images.at(label(kind)).set(count as u64);
        }
        self.telemetry.unserved.set(self.unserved().len() as u64);
        self.telemetry.exposition()
    }

    /// Takes over what the store has counted.
    fn note_space(&self) {
        let (stats, space) = (self.store.stats(), &self.telemetry.space);
        space.bytes.set(self.occupied.below(&self.options.cache));
        space.limit.set(stats.limit_bytes.unwrap_or(0));
        for (counter, total) in [
            (&space.evictions, stats.evicted),
            (&space.evicted_bytes, stats.evicted_bytes),
            (&space.scrubbed_bytes, stats.scrubbed_bytes),
            (&space.scrub_bad_units, stats.spoilt_units),
            (&space.dedup_units, stats.copied_units),
            (&space.dedup_bytes, stats.copied_bytes),
        ] {
            counter.raise_to(total);
        }
    }

    /// What happened since the start, in numbers. May look at the files of the cache.
    pub fn activity(&self) -> Activity {
        self.note_space();
        let (fills, reads) = (&self.telemetry.fills, &self.telemetry.reads);
        let places = self.telemetry.places();
        let bytes = |class| places.iter().map(|(_, place)| place.bytes.at(class).get()).sum();
        let durations = reads.iter().map(|(_, reads)| reads.duration.snapshot());
        let waits = self.served().into_iter().filter_map(|(_, served)| served.oldest_wait()).min();
        Activity {
            pid: std::process::id(),
            uptime_ms: millis(self.started.elapsed()),
            reads: BackendKind::ALL.map(|kind| self.reads_of(kind)).into(),
            oldest_wait_ms: waits.map(|since| millis(since.elapsed())),
            read_durations: Durations::from(durations.reduce(|sum, more| sum.plus(&more)).unwrap_or_default()),
            misses: by_class(|class| fills.misses.at(class).get()),
            fetched_bytes: by_class(bytes),
            failed_units: failed_units(|cause| fills.failed.at(cause).get()),
            sources: places.iter().map(|(name, place)| source_activity(name, place)).collect(),
            cache: self.cache_fill(),
            images: self.images(),
        }
    }

    fn reads_of(&self, backend: BackendKind) -> ReadsReport {
        let reads = self.telemetry.reads.at(label(backend));
        let count = |answer| reads.answered.at(answer).get();
        ReadsReport {
            backend,
            at_once: count(Answer::AtOnce),
            filled: count(Answer::Filled),
            denied: count(Answer::Denied),
            waiting: u64::try_from(reads.waiting.get()).unwrap_or(0),
        }
    }

    fn cache_fill(&self) -> CacheFill {
        let disk = disk(&self.options.cache).unwrap_or_default();
        let limit = u64::try_from(self.telemetry.space.limit.get()).ok().filter(|limit| *limit > 0);
        CacheFill { bytes: self.occupied.below(&self.options.cache), limit, disk_bytes: disk.0, disk_free: disk.1 }
    }

    fn images(&self) -> Vec<ImageActivity> {
        let image = |(dir, served): (Option<std::path::PathBuf>, super::served::Served)| ImageActivity {
            dir,
            image: served.prepared.key.to_string(),
            state: served.state(),
            misses: served.open_devices().map(|device| device.stats().misses).sum(),
            waiting: served.open_devices().map(|device| device.waiting().0 as u64).sum(),
        };
        self.served().into_iter().map(image).collect()
    }
}

/// Bytes of the disk of `dir`, and those of them that are free.
fn disk(dir: &Path) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok((stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize))
}

fn label(kind: BackendKind) -> Backend {
    match kind {
        BackendKind::Fanotify => Backend::Fanotify,
        BackendKind::Cachefiles => Backend::Cachefiles,
        BackendKind::FuseDevice => Backend::FuseDevice,
        BackendKind::FuseTree => Backend::FuseTree,
        BackendKind::Blobfs => Backend::Blobfs,
    }
}

fn by_class(count: impl Fn(Class) -> u64) -> ByClass {
    ByClass { on_demand: count(Class::OnDemand), prefetch: count(Class::Prefetch) }
}

fn failed_units(count: impl Fn(Cause) -> u64) -> FailedUnits {
    FailedUnits {
        source: count(Cause::Source),
        corrupt: count(Cause::Corrupt),
        no_space: count(Cause::NoSpace),
        io: count(Cause::Io),
        limit: count(Cause::Limit),
        unmapped: count(Cause::Unmapped),
        cancelled: count(Cause::Cancelled),
    }
}

fn source_activity(name: &str, place: &Place) -> SourceActivity {
    let count = |outcomes: &Family<Outcome, Counter>| outcomes.sum() - outcomes.at(Outcome::Cancelled).get();
    let reads: u64 = place.reads.iter().map(|(_, outcomes)| count(outcomes)).sum();
    let good: u64 = place.reads.iter().map(|(_, outcomes)| outcomes.at(Outcome::Ok).get()).sum();
    SourceActivity {
        source: name.to_owned(),
        reads,
        // Another thread may have counted one in between.
        failed: reads.saturating_sub(good),
        retries: place.retries.get(),
        bytes: by_class(|class| place.bytes.at(class).get()),
        failing: place.is_failing(),
        last_error: place.last_failure().map(Into::into),
    }
}

/// What is told about the sources that are called `names`.
pub(super) fn source_reports(names: Vec<String>, telemetry: &Telemetry) -> Vec<SourceReport> {
    let report = |source: String| {
        let place = telemetry.find(&source);
        let failing = place.as_ref().is_some_and(|place| place.is_failing());
        SourceReport { source, failing, last_error: place.and_then(|place| place.last_failure()).map(Into::into) }
    };
    names.into_iter().map(report).collect()
}

impl From<DeviceHealth> for HealthReport {
    fn from(health: DeviceHealth) -> Self {
        let failed = |cause| health.failed.iter().find(|(of, _)| *of == cause).map_or(0, |(_, count)| *count);
        Self {
            needed_bytes: health.needed_bytes,
            present_bytes: health.present_bytes,
            waiting: health.waiting as u64,
            oldest_wait_ms: health.oldest_wait.map(millis),
            failed_units: failed_units(failed),
            failing: health.is_failing,
            last_error: health.last_failure.clone().map(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_occupy_nothing_and_directories_are_walked() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let deep = dir.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let empty = allocated(dir.path());
        std::fs::File::create(deep.join("sparse")).unwrap().set_len(1 << 30).unwrap();
        assert_eq!(allocated(dir.path()), empty);

        std::fs::write(deep.join("data"), vec![1; 1 << 20]).unwrap();
        // Delayed allocation: blocks are counted when they are written.
        std::fs::File::open(deep.join("data")).unwrap().sync_all().unwrap();

        assert_eq!(allocated(dir.path()), empty + (1 << 20));
        assert_eq!(allocated(&dir.path().join("nowhere")), 0);
    }

    #[test]
    fn a_source_is_told_of_by_its_name_and_one_that_was_never_asked_is_fine() {
        let telemetry = Telemetry::default();
        telemetry.place("/a").failed("gone".to_owned());

        let reports = source_reports(vec!["/a".to_owned(), "/b".to_owned()], &telemetry);

        let told: Vec<_> =
            reports.iter().map(|r| (r.failing, r.last_error.as_ref().map(|t| t.error.as_str()))).collect();
        assert_eq!(told, [(true, Some("gone")), (false, None)]);
    }
}
