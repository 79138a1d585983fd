//! A recorded start-up set over a slow line.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rafsd::base::ByteSize;

use super::daemon::Daemon;
use super::image::{Image, Piece, reference};
use super::line::{BANDWIDTH, Line, Shape};
use super::peer::Nydusd;
use super::registry::Registry;
use super::throughput::mount;
use super::{middle, verdict};

/// Beside the time for the bytes.
const ROUND_TRIPS: u32 = 2;

/// Seconds of one start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// From the command that mounts to the mount.
    pub(crate) mount: f64,
    /// From there to the last byte.
    pub(crate) read: f64,
}

pub(crate) fn measure(
    image: &Image,
    registry: &Registry,
    scratch: &Path,
    turns: usize,
    nydusd: Option<&Path>,
) -> anyhow::Result<()> {
    let (pieces, trace) = (image.startup_set(), scratch.join("start.trace"));
    record(registry, scratch, &pieces, &trace)?;
    let recorded = image.traced(&fs::read_to_string(&trace)?)?;
    let needed = image.needed(&recorded)?;
    println!(
        "a start-up set of {} pieces, {} stored, of which the kernel's read-ahead made {} in the trace:",
        pieces.len(),
        ByteSize(image.needed(&pieces)?),
        ByteSize(needed)
    );
    let optimized = image.optimized(&trace, scratch)?;
    let optimized_registry = optimized.registry()?;
    for round_trip in [5, 20].map(Duration::from_millis) {
        let shape = Shape { round_trip, bytes_per_second: BANDWIDTH };
        #[expect(clippy::cast_precision_loss, reason = "printed with few digits")]
        let least = needed as f64 / BANDWIDTH + (round_trip * ROUND_TRIPS).as_secs_f64();
        println!(
            "  {} ms and 200 Mbit/s, where the bytes and {ROUND_TRIPS} round trips take {least:.3} s:",
            round_trip.as_millis()
        );
        let dir = scratch.join("start");
        for way in [Way::Optimized, Way::Beside, Way::Mounting, Way::None] {
            let (image, registry) =
                if way == Way::Optimized { (&optimized, &optimized_registry) } else { (image, registry) };
            let line = Line::to(registry.address, shape)?;
            let starts = middle(turns, |start: &Start| start.read, || start(&line, &dir, &pieces, &trace, way))?;
            let has_target = matches!(way, Way::Optimized | Way::Beside);
            print(way.name(), starts, least, has_target.then_some(1.15));
            let most = (way != Way::None).then_some(image.blobs.len() + 8);
            print_asked(registry, turns, most);
        }
        if let Some(program) = nydusd {
            let line = Line::to(registry.address, shape)?;
            let starts = middle(
                turns,
                |start: &Start| start.read,
                || {
                    let clock = Instant::now();
                    let nydusd = Nydusd::mount(program, &dir, line.address, &image.bootstrap, &pieces)?;
                    let mounted = clock.elapsed();
                    read(&nydusd.mnt(), &pieces)?;
                    Ok(Start { mount: mounted.as_secs_f64(), read: (clock.elapsed() - mounted).as_secs_f64() })
                },
            )?;
            print("nydusd: mount with its prefetch of the files, and read", starts, least, None);
            print_asked(registry, turns, None);
        }
    }
    Ok(())
}

/// Requests and bytes of one of `turns`, and whether there were at most so many.
fn print_asked(registry: &Registry, turns: usize, most: Option<usize>) {
    let asked = registry.take_asked().len().div_ceil(turns);
    let target = most.map_or(String::new(), |most| verdict(asked <= most, &format!("<= {most}")));
    println!("      {asked} requests, {} of blobs  {target}", ByteSize(registry.take_sent() / turns as u64));
}

/// When what is in the trace is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// From the mount on, of an image that `rafsd optimize` made by the trace.
    Optimized,
    /// From when the reader begins.
    Beside,
    /// From the mount on.
    Mounting,
    /// By the reader alone.
    None,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Optimized => "optimized by the trace, mount and read",
            Self::Beside => "mounted, traced prefetch with the reader",
            Self::Mounting => "mount with traced prefetch, and read",
            Self::None => "mounted, no prefetch",
        }
    }
}

/// Reads the set once from a near registry, with `rafsd mount --trace`.
fn record(registry: &Registry, scratch: &Path, pieces: &[Piece], trace: &Path) -> anyhow::Result<()> {
    let daemon = Daemon::start(&scratch.join("record"))?;
    mount(&daemon, registry.address, &[OsStr::new("--trace"), trace.as_os_str()])?;
    read(&daemon.mnt(), pieces)?;
    daemon.ask("umount", [daemon.mnt().as_os_str()])?;
    ensure!(trace.exists(), "no trace was written");
    registry.take_asked();
    registry.take_sent();
    Ok(())
}

fn start(line: &Line, dir: &Path, pieces: &[Piece], trace: &Path, way: Way) -> anyhow::Result<Start> {
    let daemon = Daemon::start(dir)?;
    let mnt = daemon.mnt();
    let (image, prefetch) = (reference(line.address), format!("--prefetch={}", trace.display()));
    let mut args = vec![OsStr::new(&image), mnt.as_os_str(), OsStr::new("--backend"), OsStr::new("fanotify")];
    args.extend(match way {
        Way::Mounting => Some(OsStr::new(&prefetch)),
        // What the image itself hints at.
        Way::Optimized => None,
        Way::Beside | Way::None => Some(OsStr::new("--prefetch=none")),
    });
    let clock = Instant::now();
    daemon.ask("mount", args)?;
    let mounted = clock.elapsed();
    let mut prefetching = None;
    if way == Way::Beside {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        command.arg("prefetch").arg(&mnt).arg("--trace").arg(trace).arg("--run").arg(dir.join("run"));
        prefetching = Some(command.stdout(Stdio::null()).spawn()?);
    }
    read(&mnt, pieces)?;
    let read = clock.elapsed() - mounted;
    if let Some(mut prefetching) = prefetching {
        ensure!(prefetching.wait()?.success(), "rafsd prefetch failed");
    }
    Ok(Start { mount: mounted.as_secs_f64(), read: read.as_secs_f64() })
}

/// Reads the pieces in their order, in parts of 128 KiB.
pub(crate) fn read(mnt: &Path, pieces: &[Piece]) -> anyhow::Result<()> {
    let mut buffer = [0; 128 << 10];
    for piece in pieces {
        let file = File::open(mnt.join(&piece.path)).with_context(|| piece.path.display().to_string())?;
        let mut done = 0;
        while done < piece.len {
            let want = usize::try_from(piece.len - done)?.min(buffer.len());
            let got = file.read_at(&mut buffer[..want], piece.at + done)?;
            ensure!(got > 0, "{} is too short", piece.path.display());
            done += got as u64;
        }
    }
    Ok(())
}

fn print(name: &str, Start { mount, read }: Start, least: f64, target: Option<f64>) {
    let target = target.map_or(String::new(), |most| verdict(read / least <= most, &format!("<= {most}")));
    println!(
        "    {name:<56} mount {mount:.3} s  read {read:.3} s  {:.2} times that, {:.2} with the mount  {target}",
        read / least,
        (mount + read) / least
    );
}
