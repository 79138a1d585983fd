//! The settings, each named once.

use super::field::Range;
use super::{Field, Setting};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SECOND: u64 = 1000;
const HOUR: u64 = 3600 * SECOND;
const DAY: u64 = 24 * HOUR;

const fn setting(key: &'static str, field: Field, default: &'static str, help: &'static str) -> Setting {
    Setting { key, field, default, help }
}

/// All settings, in the order in which they are shown.
pub const TABLE: &[Setting] = &[
    setting("cache", Field::Path(|s| &mut s.cache), "/var/lib/rafsd", "Directory of the cache, on ext4, XFS or btrfs"),
    setting("run", Field::Path(|s| &mut s.run), "/run/rafsd", "Directory of the daemon's sockets"),
    setting(
        "backend",
        Field::Backends(|s| &mut s.backend),
        "cachefiles,fanotify,fuse-device,fuse-tree",
        "Backends in the order of preference for mounts that ask for none; one left out is only used when asked for",
    ),
    setting(
        "fuse_transport",
        Field::Transport(|s| &mut s.fuse_transport),
        "dev",
        "How FUSE requests come: dev is /dev/fuse; io-uring takes fewer calls, where the kernel has it switched on, but if the \
         daemon is killed, reads of what it had mounted fail for good",
    ),
    setting(
        "deadline",
        Field::Time(Range(100, HOUR), |s| &mut s.store.deadline),
        "1m",
        "How long a read may wait for its data before it fails with EIO",
    ),
    setting(
        "prefetch_deadline",
        Field::Time(Range(SECOND, DAY), |s| &mut s.store.prefetch_deadline),
        "2m",
        "How long one ranged read of prefetch may take",
    ),
    setting(
        "fetches",
        Field::Count(Range(1, 1024), |s| &mut s.store.fetches),
        "16",
        "Ranged reads for waiting readers that run at once; one blob may hold half of them",
    ),
    setting(
        "prefetch_fetches",
        Field::Count(Range(1, 1024), |s| &mut s.store.prefetch_fetches),
        "8",
        "Ranged reads of prefetch that run at once",
    ),
    setting(
        "prefetch_rate",
        Field::SizeOrNone(Range(KIB, 1024 * GIB), |s| &mut s.store.prefetch_rate),
        "none",
        "Bytes per second that prefetch may fetch, what is fetched ahead of readers aside",
    ),
    setting(
        "image_fetches",
        Field::Count(Range(0, 1024), |s| &mut s.store.image_fetches),
        "0",
        "Ranged reads for waiting readers of one image that run at once; 0 for no limit",
    ),
    setting(
        "image_rate",
        Field::SizeOrNone(Range(KIB, 1024 * GIB), |s| &mut s.store.image_rate),
        "none",
        "Bytes per second that are fetched for waiting readers of one image",
    ),
    setting(
        "window",
        Field::Size(Range(4 * KIB, GIB), |s| &mut s.store.window),
        "4MiB",
        "Longest ranged read for a waiting reader, unless one piece is longer",
    ),
    setting(
        "prefetch_window",
        Field::Size(Range(4 * KIB, GIB), |s| &mut s.store.prefetch_window),
        "2MiB",
        "Longest ranged read of prefetch, unless one piece is longer",
    ),
    setting(
        "gap",
        Field::Size(Range(0, GIB), |s| &mut s.store.gap),
        "64KiB",
        "Bytes between two wanted pieces that are rather read than paid for with a second request",
    ),
    setting(
        "memory",
        Field::Size(Range(MIB, 1024 * GIB), |s| &mut s.store.memory),
        "128MiB",
        "Memory for what was fetched and is not written yet; less by default where a control group leaves little",
    ),
    setting(
        "memory_reserve",
        Field::Size(Range(0, 1024 * GIB), |s| &mut s.store.memory_reserve),
        "32MiB",
        "The part of memory that only waiting readers may use",
    ),
    setting(
        "readahead_first",
        Field::Size(Range(0, GIB), |s| &mut s.store.readahead_first),
        "1MiB",
        "Bytes fetched ahead when a reader is first seen to walk forward; 0 for no read-ahead",
    ),
    setting(
        "readahead_most",
        Field::Size(Range(0, GIB), |s| &mut s.store.readahead_most),
        "16MiB",
        "Most bytes fetched ahead in one step",
    ),
    setting(
        "flush_every",
        Field::Time(Range(10, HOUR), |s| &mut s.store.flush_every),
        "2s",
        "How often what arrived is made to survive a crash",
    ),
    setting(
        "decode_threads",
        Field::Count(Range(0, 1024), |s| &mut s.store.decode_threads),
        "0",
        "Threads that decode, check and write; 0 for one per core",
    ),
    setting(
        "cache_limit",
        Field::SizeOrNone(Range(MIB, 1 << 60), |s| &mut s.store.cache_limit),
        "none",
        "Most bytes that the cache should take on disk; what mounted images read is fetched beyond it too",
    ),
    setting(
        "high_water",
        Field::Percent(Range(1, 100), |s| &mut s.store.high_water),
        "95",
        "Percent of the limit at which blobs that no mounted image uses go, the least recently used first",
    ),
    setting(
        "low_water",
        Field::Percent(Range(0, 100), |s| &mut s.store.low_water),
        "85",
        "Percent of the limit at which that ends",
    ),
    setting(
        "scrub_rate",
        Field::Size(Range(0, 1024 * GIB), |s| &mut s.store.scrub_rate),
        "2MiB",
        "Bytes a second that complete blobs are read again and checked with; 0 for never",
    ),
    setting(
        "hosts_dir",
        Field::Path(|s| &mut s.hosts_dir),
        "/etc/containerd/certs.d",
        "Directory with a hosts.toml for each registry, as containerd has it: mirrors, certificates, proxies, limits",
    ),
    setting(
        "docker_config",
        Field::PathOrNone(|s| &mut s.docker_config),
        "none",
        "A config.json of docker or auth.json of podman with logins and credential helpers; none for the usual places",
    ),
    setting(
        "credential_providers",
        Field::PathOrNone(|s| &mut s.credential_providers),
        "none",
        "The kubelet's config file of credential provider plugins, as JSON",
    ),
    setting(
        "credential_provider_bin_dir",
        Field::PathOrNone(|s| &mut s.credential_provider_bin_dir),
        "none",
        "Directory of the programs of these plugins",
    ),
    setting(
        "registry_secrets",
        Field::Paths(|s| &mut s.registry_secrets),
        "",
        "Docker-config secrets of Kubernetes: files, or directories of them",
    ),
    setting(
        "exit_when_idle",
        Field::TimeOrNever(Range(SECOND, 365 * DAY), |s| &mut s.exit_when_idle),
        "never",
        "Exit after so long without anything to serve (10s where a mount started the daemon)",
    ),
    setting(
        "restart",
        Field::Restart(|s| &mut s.restart),
        "auto",
        "Who starts another daemon when this one dies: its keepers, unless a service manager started it",
    ),
    setting(
        "keep_mounts",
        Field::Switch(|s| &mut s.keep_mounts),
        "off",
        "Leave mounts as they are on SIGTERM, for the next daemon, instead of unmounting them",
    ),
    setting(
        "log",
        Field::LogRules(|s| &mut s.log),
        "warn,rafsd=info",
        "What to log to stderr: error, warn, info, debug, trace, or rules like info,rafsd::cache=debug",
    ),
    setting("log_format", Field::LogFormat(|s| &mut s.log_format), "text", "How to log"),
    setting(
        "metrics_listen",
        Field::LoopbackOrNone(|s| &mut s.metrics_listen),
        "none",
        "Address of the loopback interface where GET /metrics is answered as well, for Prometheus",
    ),
    setting(
        "sandbox",
        Field::Switch(|s| &mut s.sandbox),
        "on",
        "Whether the daemon confines itself by landlock and seccomp",
    ),
    setting(
        "sandbox_read",
        Field::Paths(|s| &mut s.sandbox_read),
        "",
        "Directories that the confined daemon may read besides its own; empty for all",
    ),
];
