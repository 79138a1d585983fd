//! Answers as a daemon gives them, for tests of who shows them.

use super::observe::{
    Activity, ByClass, CacheFill, Durations, FailedUnits, HealthReport, ImageActivity, ImageState, ReadsReport,
    SourceActivity, SourceReport, Trouble,
};
use super::{DeviceReport, ImageReport, Info, UnservedReport};
use crate::cache::DeviceStats;
use crate::export::BackendKind;
use crate::export::host::{Finding, Host};

const MIB: u64 = 1 << 20;

fn trouble(error: &str) -> Option<Trouble> {
    Some(Trouble { error: error.to_owned(), ago_ms: 12_000 })
}

fn failed_units() -> FailedUnits {
    FailedUnits { source: 3, corrupt: 1, cancelled: 7, ..FailedUnits::default() }
}

pub(crate) fn image() -> ImageReport {
    let stats = DeviceStats {
        units: 71,
        units_present: 8,
        units_copied: 2,
        units_filled: 8,
        stored_bytes_fetched: 2 * MIB,
        requests: 5,
        hits: 31,
        misses: 4,
        errors: 4,
        complete: false,
    };
    let health = HealthReport {
        needed_bytes: 12 * MIB,
        present_bytes: 3 * MIB,
        waiting: 2,
        oldest_wait_ms: Some(1500),
        failed_units: failed_units(),
        failing: false,
        last_error: trouble("unit 3 is corrupt"),
    };
    let source = "https://blobs.example/image".to_owned();
    ImageReport {
        dir: Some("/mnt".into()),
        shows: None,
        backend: BackendKind::Fanotify,
        why: "pre-content events passed their self test, and there is no cachefiles".to_owned(),
        transport: None,
        state: ImageState::Lazy,
        image: "4708d63853773c9d7e61585863c05dacbef550e32a80a736d87aa2a5b6c967fe".to_owned(),
        reference: Some("registry.example/team/app:1".to_owned()),
        manifest: Some("b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c".to_owned()),
        unconfirmed: Some("https://registry.example does not answer: connection refused".to_owned()),
        bootstrap_bytes: 45_056,
        source: source.clone(),
        sources: vec![SourceReport { source, failing: false, last_error: trouble("no answer in time") }],
        mount_options: None,
        devices: vec![DeviceReport {
            blob: "9dc702c353581414c39e648b205ab5ab4810eae1133f6e72ddf7376a981c56f3".to_owned(),
            decoded_bytes: 13 * MIB,
            stored_bytes: 6 * MIB,
            stats: Some(stats),
            health: Some(health),
        }],
    }
}

pub(crate) fn info() -> Info {
    let finding = |name: &str, works, detail: &str, remedy: Option<&str>| Finding {
        name: name.to_owned(),
        works,
        detail: detail.to_owned(),
        remedy: remedy.map(ToOwned::to_owned),
    };
    let missing = "/dev/cachefiles cannot be opened (No such file or directory)";
    Info {
        version: "0.1.0".to_owned(),
        pid: 4711,
        uptime_ms: 7_500_000,
        cache: "/var/lib/rafsd".into(),
        keeper_alive: true,
        events_hit: 31,
        events_missed: 7,
        cachefiles_reads: 0,
        takeover_ms: Some(41),
        unserved: vec![UnservedReport { dir: Some("/old".into()), why: "no connection".to_owned() }],
        host: Host {
            kernel: "6.18.0".to_owned(),
            cache_file_system: "ext4".to_owned(),
            findings: vec![
                finding("cachefiles", false, missing, Some("load the cachefiles module")),
                finding("erofs-on-demand", true, "EROFS knows the fsid option", None),
                finding("pre-content-events", true, "a cold read raised an event", None),
                finding("fuse", true, "FUSE file systems can be mounted; protocol 7.45", None),
                finding("fuse-device", true, "EROFS read a device through FUSE", None),
            ],
            choice: Some(BackendKind::Fanotify),
        },
    }
}

pub(crate) fn activity() -> Activity {
    let image = image();
    let reads = |backend, at_once, filled, denied, waiting| ReadsReport { backend, at_once, filled, denied, waiting };
    let histogram = crate::telemetry::Histogram::default();
    [3, 4, 5, 80].iter().for_each(|ms| histogram.observe(std::time::Duration::from_millis(*ms)));
    Activity {
        pid: 4711,
        uptime_ms: 7_500_000,
        reads: vec![reads(BackendKind::Fanotify, 31, 4, 1, 2), reads(BackendKind::Cachefiles, 0, 0, 0, 0)],
        oldest_wait_ms: Some(1500),
        read_durations: Durations::from(histogram.snapshot()),
        misses: ByClass { on_demand: 7, prefetch: 2 },
        fetched_bytes: ByClass { on_demand: 2 * MIB, prefetch: 40 * MIB },
        failed_units: failed_units(),
        sources: vec![SourceActivity {
            source: image.source.clone(),
            reads: 9,
            failed: 4,
            retries: 6,
            bytes: ByClass { on_demand: 2 * MIB, prefetch: 40 * MIB },
            failing: true,
            last_error: trouble("no answer in time"),
        }],
        cache: CacheFill { bytes: 3 * MIB, limit: Some(1 << 30), disk_bytes: 10 << 30, disk_free: 5 << 30 },
        images: vec![ImageActivity { dir: image.dir, image: image.image, state: image.state, misses: 4, waiting: 2 }],
    }
}
