//! rafsd beside what it competes with, as ratios measured in one run.
//!
//! `cargo bench` builds an image of a sample of this host's files, beside `zstd -3` on the same
//! bytes, merges layers, and reads the image through the daemon, beside a mount of the same image
//! that the kernel serves alone. What is compared is done in turns, so that a busy host slows both;
//! a row shows the median of the ratios of the turns and, behind it, the smallest and the largest.
//!
//! Given nydusd, it reads the image through `fuse-tree` beside that, from full caches; `fuse-device` is read beside
//! the native mount with all data there when it was mounted. Both programs should be release builds.
//!
//! Each row names its target. A missed target is printed and does not fail the run: a loaded host
//! can miss any of them. The exit status is 1 only if something did not work, wrong bytes included.
//! In page-cold rows ours can be ahead: the daemon keeps the metadata of mounted images mapped, and
//! the kernel does not drop mapped pages, so only the native mount reads its metadata anew.
//! Needs root and a kernel that the fanotify backend can use.
//!
//! `cargo bench -- --quick` is a smoke run; `cargo bench -- --help` lists the flags.

mod building;
mod corpus;
mod daemon;
mod fuse;
mod measure;
mod merging;
mod native;
mod nydusd;
mod reading;
mod reference;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use rafsd::base::ByteSize;

use corpus::Corpus;
use report::Report;

/// Build and read an image beside zstd and a native EROFS mount
#[derive(Debug, Parser)]
#[command(name = "side_by_side", max_term_width = 100)]
struct Args {
    /// Directory to take files from
    #[arg(long, value_name = "DIR", default_value = "/usr/lib")]
    source: PathBuf,

    /// How many bytes of files to take; all of them if there are fewer [default: 256MiB, quick: 48MiB]
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteSize>,

    /// Decides which files are taken and where they are read at random
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Where to put the scratch directory: on ext4, XFS or btrfs
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,

    /// Delay of the HTTP server before each answer, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2)]
    delay: u64,

    /// A peer to build with as well: the program mkfs.erofs
    #[arg(long, value_name = "PROGRAM")]
    mkfs_erofs: Option<PathBuf>,

    /// A peer to build and to merge layers with as well: the format's reference builder, nydus-image
    #[arg(long, value_name = "PROGRAM")]
    nydus_image: Option<PathBuf>,

    /// A peer to read over FUSE beside: the program nydusd
    #[arg(long, value_name = "PROGRAM")]
    nydusd: Option<PathBuf>,

    /// Few files and few turns, to see that everything works
    #[arg(long)]
    quick: bool,

    /// Print the rows as JSON
    #[arg(long)]
    json: bool,

    /// What `cargo bench` passes; without it, as in `cargo test --all-targets`, nothing is measured
    #[arg(long, hide = true)]
    bench: bool,
}

/// How often things are repeated.
#[derive(Clone, Copy, Debug)]
struct Turns {
    build: usize,
    read: usize,
    cold: usize,
    /// How long one hot measurement goes on.
    hot: Duration,
}

impl Args {
    fn turns(&self) -> Turns {
        if self.quick {
            Turns { build: 1, read: 2, cold: 1, hot: Duration::from_millis(50) }
        } else {
            Turns { build: 3, read: 7, cold: 3, hot: Duration::from_millis(300) }
        }
    }

    fn size(&self) -> u64 {
        self.size.map_or(if self.quick { 48 << 20 } else { 256 << 20 }, |size| size.0)
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !args.bench {
        eprintln!("side_by_side: nothing is measured unless `cargo bench` runs this");
        return ExitCode::SUCCESS;
    }
    let mut report = Report::default();
    let outcome = run(&args, &mut report);
    let printed = report.print(args.json);
    match outcome.and(printed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("side_by_side: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args, report: &mut Report) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("mounting and dropping caches need root");
    }
    // First, so that what follows removes everything it makes when a person has seen enough.
    let interrupted = Interrupted::watch()?;
    rafsd::sys::process::raise_descriptor_limit().context("cannot raise the limit of open files")?;
    let scratch = tempfile::Builder::new()
        .prefix("rafsd-bench-")
        .tempdir_in(&args.scratch)
        .with_context(|| format!("cannot make a directory in {}", args.scratch.display()))?;
    let corpus = Corpus::sample(&args.source, args.size(), args.seed, &scratch.path().join("files"))?;
    report.corpus(&corpus);
    let turns = args.turns();
    let image = building::measure(&corpus, scratch.path(), turns, args.mkfs_erofs.as_deref(), &interrupted, report)?;
    if let Some(program) = &args.nydus_image {
        reference::measure(&corpus, scratch.path(), turns, program, &interrupted, report)?;
    }
    merging::measure(scratch.path(), turns, args.nydus_image.as_deref(), &interrupted, report)?;
    let delay = Duration::from_millis(args.delay);
    reading::measure(&corpus, &image, scratch.path(), turns, delay, &interrupted, report)?;
    fuse::measure(&corpus, &image, scratch.path(), turns, args.nydusd.as_deref(), &interrupted, report)?;
    scratch.close().context("cannot remove the scratch directory")
}

/// Whether a person or the system asked this process to end.
#[derive(Clone, Debug)]
struct Interrupted(Arc<AtomicBool>);

impl Interrupted {
    fn watch() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let flag = Arc::new(AtomicBool::new(false));
        let told = flag.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut interrupt, mut term) = {
            let _inside = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = interrupt.recv() => {}, _ = term.recv() => {} }
            });
            told.store(true, Ordering::Release);
        })?;
        Ok(Self(flag))
    }

    /// To be called between any two steps that take time.
    fn check(&self) -> anyhow::Result<()> {
        if self.0.load(Ordering::Acquire) {
            bail!("interrupted");
        }
        Ok(())
    }
}
