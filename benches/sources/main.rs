//! How long bytes take from a registry to a reader, as ratios measured in one run.
//!
//! A registry in this process has an image of three layers of this host's files, in Nydus form. It is mounted by its
//! reference through the daemon, by the fanotify backend, and read:
//!
//! - all of it, cold, as a part of the rate at which two threads decode and check the same units in memory;
//! - 4 KiB at a time, cold, with nobody else there;
//! - the longest file, from its beginning to its end, over a line with a delay and a bandwidth;
//! - a recorded start-up set with its trace as prefetch order, over such lines, as a multiple
//!   of what the bytes of that set take on the line and two round trips. `--nydusd PROGRAM` reads the same over the same lines through nydusd.
//!
//! A missed target is printed and does not fail the run. Needs root and a kernel that the fanotify backend can use.
//! `cargo bench --bench sources -- --quick` is a smoke run.

#[allow(dead_code, reason = "shared with side_by_side, which uses all of it")]
#[path = "../side_by_side/corpus.rs"]
mod corpus;
#[path = "../side_by_side/daemon.rs"]
#[allow(dead_code, reason = "shared with side_by_side, which uses all of it")]
mod daemon;
mod image;
mod line;
mod longest;
#[allow(dead_code, reason = "shared with side_by_side, which uses all of it")]
#[path = "../side_by_side/measure.rs"]
mod measure;
mod misses;
#[allow(dead_code, unreachable_pub, reason = "shared with tests, which use all of it")]
#[path = "../../tests/support/nydusform.rs"]
mod nydusform;
mod peer;
mod registry;
mod startup;
mod throughput;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use rafsd::base::ByteSize;

/// Measure the way from a registry to a reader
#[derive(Debug, Parser)]
#[command(name = "sources", max_term_width = 100)]
struct Args {
    /// Directory to take files from
    #[arg(long, value_name = "DIR", default_value = "/usr/lib")]
    source: PathBuf,

    /// How many bytes of files to take [default: 240MiB, quick: 48MiB]
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteSize>,

    /// Size of chunks [default: that of `rafsd build`]
    #[arg(long, value_name = "SIZE")]
    chunk_size: Option<ByteSize>,

    /// Decides which files are taken, which make up the start-up set, and where they are read at random
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Where to put the scratch directory: on ext4, XFS or btrfs
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,

    /// A peer to read the start-up set with as well: nydusd
    #[arg(long, value_name = "PROGRAM")]
    nydusd: Option<PathBuf>,

    /// Few files and few turns, to see that everything works
    #[arg(long)]
    quick: bool,

    /// What `cargo bench` passes; without it nothing is measured
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !args.bench {
        eprintln!("sources: nothing is measured unless `cargo bench` runs this");
        return ExitCode::SUCCESS;
    }
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sources: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("mounting and dropping caches need root");
    }
    rafsd::sys::process::raise_descriptor_limit().context("cannot raise the limit of open files")?;
    let scratch = tempfile::Builder::new().prefix("rafsd-bench-").tempdir_in(&args.scratch)?;
    let size = args.size.map_or(if args.quick { 48 << 20 } else { 240 << 20 }, |size| size.0);
    let image = image::Image::make(&args.source, size, args.chunk_size, args.seed, scratch.path())?;
    let registry = image.registry()?;
    println!(
        "{} files, {} in {} blobs of {}; by fanotify and EROFS, from a registry on this host",
        image.files.len(),
        ByteSize(image.bytes()),
        image.blobs.len(),
        ByteSize(image.stored_bytes())
    );
    let turns = if args.quick { 1 } else { 5 };
    throughput::measure(&image, &registry, scratch.path(), turns)?;
    misses::measure(&image, &registry, scratch.path(), if args.quick { 60 } else { 500 }, args.seed)?;
    longest::measure(&image, &registry, scratch.path(), turns.min(3), args.nydusd.as_deref())?;
    startup::measure(&image, &registry, scratch.path(), turns.min(3), args.nydusd.as_deref())?;
    scratch.close().context("cannot remove the scratch directory")
}

/// What the turn with the median `time` gave.
fn middle<T: Copy>(
    turns: usize,
    time: impl Fn(&T) -> f64,
    mut turn: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut taken = (0..turns).map(|_| turn()).collect::<anyhow::Result<Vec<_>>>()?;
    taken.sort_by(|one, other| time(one).total_cmp(&time(other)));
    taken.get(turns / 2).copied().context("at least one turn")
}

/// How a value stands to its target.
fn verdict(is_met: bool, target: &str) -> String {
    format!("{target}  {}", if is_met { "ok" } else { "MISS" })
}
