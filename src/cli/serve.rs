use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::connect::{Place, block_on};
use crate::base::ByteSize;
use crate::cache::{StoreError, StoreOptions};
use crate::daemon::control::Control;
use crate::daemon::{Daemon, DaemonError, Options};
use crate::sys::process;

/// Run the daemon that serves mounted images
///
/// SIGTERM and SIGINT unmount everything and exit; requests under way have five seconds to end,
/// and none after a second signal. A mount that is in use and incomplete stays:
/// its readers wait, held by the keeper, and never see zeros.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd serve --cache /var/lib/rafsd")]
pub(super) struct ServeArgs {
    /// Directory of the cache, on ext4, XFS or btrfs
    #[arg(long, value_name = "DIR", env = "RAFSD_CACHE", default_value = "/var/lib/rafsd")]
    cache: PathBuf,

    #[command(flatten)]
    place: Place,

    /// Seconds that a read may wait for its data before it fails with EIO
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    deadline: u64,

    /// Most bytes that the cache should take on disk [default: no limit]
    ///
    /// Above the high water, blobs that no mounted image uses go, the least recently used first,
    /// down to the low water. What mounted images read is fetched beyond the limit too.
    #[arg(long, value_name = "SIZE")]
    cache_limit: Option<ByteSize>,

    /// Percent of the limit at which blobs that nobody uses begin to go
    #[arg(long, value_name = "PERCENT", default_value_t = 95, value_parser = clap::value_parser!(u8).range(1..=100))]
    high_water: u8,

    /// Percent of the limit at which that ends
    #[arg(long, value_name = "PERCENT", default_value_t = 85, value_parser = clap::value_parser!(u8).range(0..=100))]
    low_water: u8,

    /// Bytes a second that complete blobs are read again and checked with; 0 for never
    #[arg(long, value_name = "SIZE", default_value = "2MiB")]
    scrub_rate: ByteSize,

    /// Exit after this many seconds without anything to serve
    #[arg(long, value_name = "SECONDS")]
    exit_when_idle: Option<u64>,

    /// Leave the terminal's session and the working directory
    #[arg(long, hide = true)]
    detached: bool,
}

/// How long to wait for a predecessor to leave the cache.
const HANDOVER: Duration = Duration::from_secs(10);

/// Exit status: 0 after an orderly stop.
pub(super) fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    if args.detached {
        process::leave_session().context("cannot leave the session")?;
    }
    process::protect_from_oom();
    process::raise_descriptor_limit().context("cannot raise the limit of open files")?;
    for dir in [&args.place.run, &args.cache] {
        let create = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        create.with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let real = |dir: &Path| dir.canonicalize().with_context(|| format!("cannot use {}", dir.display()));
    let (cache, run) = (real(&args.cache)?, real(&args.place.run)?);
    if args.detached {
        // Not to keep busy the file system that a command was started in.
        std::env::set_current_dir("/").context("cannot leave the working directory")?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().min(4)))
        .thread_name("net")
        .enable_all()
        .build()?;
    anyhow::ensure!(
        args.low_water <= args.high_water,
        "--low-water {} is above --high-water {}",
        args.low_water,
        args.high_water
    );
    let store = StoreOptions {
        deadline: Duration::from_secs(args.deadline),
        cache_limit: args.cache_limit.map(|size| size.0),
        high_water: args.high_water,
        low_water: args.low_water,
        scrub_rate: args.scrub_rate.0,
        ..StoreOptions::default()
    };
    let program = PathBuf::from("/proc/self/exe");
    let options = Options { cache, run: run.clone(), program, store };
    let idle = args.exit_when_idle.map(Duration::from_secs);
    let stopped = runtime.block_on(async {
        // First, so that two daemons started at once do not both try out the host.
        let control = Control::bind(&run)?;
        let stop = Arc::new(Notify::new());
        // Before anything is mounted: from here on a signal is an orderly stop.
        watch_signals(stop.clone())?;
        let handle = tokio::runtime::Handle::current();
        let daemon = tokio::task::spawn_blocking(move || start(&options, &handle)).await??;
        tracing::info!(run = %run.display(), choice = ?daemon.info().host.choice, "serving");
        control.serve(daemon.clone(), stop, idle).await?;
        anyhow::Ok(daemon)
    });
    let daemon = stopped?;
    tracing::info!("stopping");
    daemon.stop();
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(ExitCode::SUCCESS)
}

/// Starts the daemon, waiting a while for one that is just leaving the same cache.
fn start(options: &Options, handle: &tokio::runtime::Handle) -> anyhow::Result<Arc<Daemon>> {
    let until = Instant::now() + HANDOVER;
    loop {
        match Daemon::start(options.clone(), handle.clone()) {
            Err(DaemonError::Store(StoreError::Locked { .. })) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(50));
            }
            outcome => return Ok(outcome?),
        }
    }
}

fn watch_signals(stop: Arc<Notify>) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        // The first asks to stop, the next one not to wait for clients.
        loop {
            tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
            stop.notify_one();
        }
    });
    Ok(())
}

/// Stop the daemon: unmount everything and exit
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd stop")]
pub(super) struct StopArgs {
    #[command(flatten)]
    place: Place,
}

/// Exit status: 0 when the daemon has gone.
pub(super) fn stop(args: StopArgs) -> anyhow::Result<ExitCode> {
    let pid = block_on(async {
        let client = args.place.client()?;
        let info = client.info().await.map_err(|e| args.place.explain(e))?;
        client.stop().await?;
        Ok(info.pid)
    })?;
    let process = PathBuf::from(format!("/proc/{pid}/stat"));
    let until = Instant::now() + Duration::from_secs(60);
    // A zombie has stopped; whoever started it has not looked yet.
    while std::fs::read_to_string(&process).is_ok_and(|stat| !stat.contains(") Z ")) {
        anyhow::ensure!(Instant::now() < until, "the daemon (process {pid}) does not stop");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ExitCode::SUCCESS)
}
