//! Prefetch beside what it must not disturb, and beside short windows, as ratios measured in one run.
//!
//! A server in this process sends over a simulated link: one bandwidth for all connections, and a delay
//! before each answer. Two questions:
//!
//! - How long does a reader of cold data wait while a prefetch of another blob uses the same link, as a
//!   part of how long it waits alone? Both are asked in turns, read by read.
//! - How long does it take to complete a blob by long streams, beside windows of 2 MiB, four at a time, on
//!   a fast link with a delay of 20 ms?
//!
//! A missed target is printed and does not fail the run. `cargo bench --bench prefetch -- --quick` is a
//! smoke run.

use std::collections::VecDeque;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use rafsd::base::{ByteRange, Class};
use rafsd::blob::{Unit, UnitMap};
use rafsd::cache::{Device, Engine, Fill, Prefetch, PrefetchState, Store, StoreOptions, fill_blocking};
use rafsd::net::server::{BlobServer, ServerOptions};
use rafsd::net::{ClientOptions, RetryPolicy};
use rafsd::source;

/// Measure prefetch beside readers, and streams beside windows
#[derive(Debug, Parser)]
#[command(name = "prefetch", max_term_width = 100)]
struct Args {
    /// Few reads and little data, to see that everything works
    #[arg(long)]
    quick: bool,

    /// Where to put the scratch directory: on a disk
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: std::path::PathBuf,

    /// What `cargo bench` passes; without it nothing is measured
    #[arg(long, hide = true)]
    bench: bool,
}

const MIB: u64 = 1 << 20;

/// 50 Mbit/s.
const LINK: u64 = 50_000_000 / 8;

/// Foreground reads are of units of this size.
const SMALL: u64 = 128 << 10;

fn main() -> ExitCode {
    let args = Args::parse();
    if !args.bench {
        eprintln!("prefetch: nothing is measured unless `cargo bench` runs this");
        return ExitCode::SUCCESS;
    }
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("prefetch: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let scratch = tempfile::Builder::new().prefix("rafsd-bench-").tempdir_in(&args.scratch)?;
    let (reads, bytes, turns) = if args.quick { (30, 32 * MIB, 1) } else { (300, 256 * MIB, 3) };
    foreground(scratch.path(), reads)?;
    completion(scratch.path(), bytes, turns)
}

/// A blob of units of `unit` bytes that no codec can shorten, on disk; and how it is cut.
fn blob(dir: &Path, name: &str, bytes: u64, unit: u64) -> anyhow::Result<UnitMap> {
    let mut content = vec![0; usize::try_from(bytes)?];
    blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut content);
    std::fs::write(dir.join(name), &content)?;
    let pieces = content.chunks(usize::try_from(unit)?).zip(0u64..);
    let units: Option<Vec<_>> = pieces.map(|(piece, number)| Unit::plain(number * unit, piece)).collect();
    Ok(UnitMap::new(name.parse()?, bytes, units.context("a unit has at most 16 MiB")?)?)
}

/// A cache below `dir`, which is made, whose blobs come from `url`.
struct Cache {
    runtime: tokio::runtime::Runtime,
    store: Arc<Store>,
    url: String,
}

impl Cache {
    fn new(dir: &Path, url: String) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        std::fs::create_dir(dir)?;
        // Read-ahead is not what is measured.
        let options = StoreOptions { readahead_first: 0, ..StoreOptions::default() };
        let store = Store::open(dir, options, runtime.handle().clone())?;
        Ok(Self { runtime, store, url })
    }

    fn device(&self, map: &UnitMap) -> anyhow::Result<Arc<Device>> {
        let _inside = self.runtime.enter();
        let source = source::open(&self.url, &ClientOptions::default(), RetryPolicy::default())?;
        Ok(self.store.device(map.clone(), source)?)
    }

    fn engine(&self) -> &Engine {
        self.store.engine()
    }
}

/// A reader of cold data with a prefetch beside it, and without.
fn foreground(scratch: &Path, reads: u64) -> anyhow::Result<()> {
    let blobs = scratch.join("link");
    std::fs::create_dir(&blobs)?;
    let wanted = blob(&blobs, "wanted", 2 * reads * SMALL, SMALL)?;
    let behind = blob(&blobs, "behind", 2 * reads * SMALL, MIB)?;
    let link =
        ServerOptions { delay: Duration::from_millis(10), bytes_per_second: Some(LINK), ..ServerOptions::default() };
    let server = BlobServer::start(&blobs, link)?;
    let cache = Cache::new(&scratch.join("link-cache"), server.url())?;
    let (device, prefetched) = (cache.device(&wanted)?, cache.device(&behind)?);
    // A connection for each that may be needed, so that neither has to make them.
    fill_blocking(&*device, ByteRange::new(0, SMALL).unwrap_or_default())?;
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let mut going: Option<Prefetch> = None;
    // In turns of a few reads each, over units that are far apart.
    for read in 1..2 * reads {
        if read % 10 == 0 {
            going = match going.take() {
                Some(_) => None,
                None => Some(Prefetch::start(cache.engine(), std::slice::from_ref(&prefetched), &[], true)),
            };
            // What was broken off has to leave the link.
            std::thread::sleep(Duration::from_millis(100));
        }
        // As a program that does something with what it reads.
        std::thread::sleep(Duration::from_millis(80));
        let unit = read * 617 % (2 * reads);
        let range = ByteRange::at(unit * SMALL, SMALL).context("a small file")?;
        if device.present(range) {
            continue;
        }
        let clock = Instant::now();
        fill_blocking(&*device, range)?;
        let took = clock.elapsed();
        if going.is_some() { beside.push(took) } else { alone.push(took) }
    }
    let done = prefetched.stats();
    println!(
        "{} cold reads of {} KiB alone, {} beside a prefetch that brought {} MiB meanwhile, 50 Mbit/s:",
        alone.len(),
        SMALL >> 10,
        beside.len(),
        done.stored_bytes_fetched / MIB
    );
    ensure!(done.stored_bytes_fetched > 0, "there was no prefetch to speak of");
    for (name, part, target) in [("median", 0.5, None), ("p99", 0.99, Some(1.2))] {
        let (alone, beside) = (quantile(&mut alone, part), quantile(&mut beside, part));
        let ratio = beside / alone;
        let verdict = target.map_or("", |most| if ratio <= most { "<= 1.2  ok" } else { "<= 1.2  MISS" });
        println!("  {name:<8} {:>7.1} ms alone {:>7.1} ms beside  {ratio:>5.2}  {verdict}", alone * 1e3, beside * 1e3);
    }
    Ok(())
}

/// Seconds below which this part of the times lies.
fn quantile(times: &mut [Duration], part: f64) -> f64 {
    times.sort_unstable();
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a few hundred"
    )]
    let at = ((times.len() as f64 * part) as usize).min(times.len() - 1);
    times[at].as_secs_f64()
}

/// A blob made complete by streams, and by windows.
fn completion(scratch: &Path, bytes: u64, turns: usize) -> anyhow::Result<()> {
    let blobs = scratch.join("far");
    std::fs::create_dir(&blobs)?;
    let map = blob(&blobs, "far", bytes, MIB)?;
    let far = ServerOptions { delay: Duration::from_millis(20), ..ServerOptions::default() };
    let server = BlobServer::start(&blobs, far)?;
    let (mut streams, mut windows) = (Vec::new(), Vec::new());
    for turn in 0..2 * turns {
        let dir = scratch.join(format!("far-cache-{turn}"));
        let cache = Cache::new(&dir, server.url())?;
        let device = cache.device(&map)?;
        let clock = Instant::now();
        if turn % 2 == 0 {
            by_streams(&cache, &device)?;
            streams.push(clock.elapsed());
        } else {
            by_windows(&device)?;
            windows.push(clock.elapsed());
        }
        drop((device, cache));
        std::fs::remove_dir_all(&dir)?;
    }
    let (streams, windows) = (quantile(&mut streams, 0.5), quantile(&mut windows, 0.5));
    println!(
        "{} MiB over loopback with a delay of 20 ms: {streams:.2} s by streams, {windows:.2} s by windows, {:.2} times as fast",
        bytes / MIB,
        windows / streams
    );
    Ok(())
}

fn by_streams(cache: &Cache, device: &Arc<Device>) -> anyhow::Result<()> {
    let prefetch = Prefetch::start(cache.engine(), std::slice::from_ref(device), &[], true);
    while !prefetch.has_ended() {
        std::thread::sleep(Duration::from_millis(1));
    }
    ensure!(prefetch.stats().state == PrefetchState::Done, "{:?}", prefetch.stats());
    Ok(())
}

/// As prefetch was before it had streams: 8 MiB at a time, in four windows, two such lots on their way.
fn by_windows(device: &Arc<Device>) -> anyhow::Result<()> {
    let lots = (0..device.decoded_len() / (8 * MIB)).filter_map(|lot| ByteRange::at(lot * 8 * MIB, 8 * MIB));
    let mut waiting = VecDeque::new();
    for lot in lots {
        if waiting.len() == 2 {
            let done: std::sync::mpsc::Receiver<_> = waiting.pop_front().context("two are waiting")?;
            done.recv()??;
        }
        let (tx, rx) = channel();
        device.fill(lot, Class::Prefetch, Box::new(move |outcome| drop(tx.send(outcome))));
        waiting.push_back(rx);
    }
    waiting.into_iter().try_for_each(|done| anyhow::Ok(done.recv()??))?;
    device.flush()?;
    Ok(())
}
