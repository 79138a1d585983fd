//! All of an image, read cold, beside what two threads need to decode and check it.

use std::ffi::OsStr;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, ensure};
use nix::unistd::{SysconfVar, sysconf};
use rafsd::blob::{Decoder, Unit};

use super::corpus::read_through;
use super::daemon::Daemon;
use super::image::{Blob, Image, reference, slice};
use super::measure::{Turned, drop_caches, seconds};
use super::registry::Registry;
use super::verdict;

/// The target is set for so many cores.
const CORES: usize = 2;

/// Units that a thread takes at once; those of one batch lie together.
const LOT: usize = 16;

pub(crate) fn measure(image: &Image, registry: &Registry, scratch: &Path, turns: usize) -> anyhow::Result<()> {
    let (mut cpu, mut idle) = (0.0, 0.0);
    let ours = || {
        let daemon = Daemon::start(&scratch.join("sequential"))?;
        mount(&daemon, registry.address, &[])?;
        drop_caches()?;
        let (mut buffer, before, idle_before) = ([0; 128 << 10], daemon.cpu_seconds()?, idle_seconds()?);
        let taken = seconds(|| {
            for (path, len) in &image.files {
                let got = read_through(&daemon.mnt().join(path), &mut buffer)?;
                ensure!(got == *len, "{} has {got} bytes instead of {len}", path.display());
            }
            Ok(())
        })?;
        cpu += daemon.cpu_seconds()? - before;
        idle += idle_seconds()? - idle_before;
        Ok(taken / megabytes(image.bytes()))
    };
    let decoded: u64 = image.blobs.iter().flat_map(|blob| blob.map.units()).map(|unit| unit.decoded.len()).sum();
    let bound = || Ok(seconds(|| decode(image))? / megabytes(decoded));
    let turned = Turned::take(turns, ours, bound)?;
    let ratio = turned.ratio();
    println!(
        "cold sequential: {:.0} MB/s, {CORES} threads that decode and check: {:.0} MB/s, ratio {:.2} ({:.2}..{:.2})  {}",
        1.0 / turned.ours(),
        1.0 / turned.other(),
        ratio.median,
        ratio.low,
        ratio.high,
        verdict(ratio.median >= 0.8, ">= 0.80")
    );
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let (turns, cores) = (turns as f64, std::thread::available_parallelism()?.get() as f64);
    let taken = turned.ours() * megabytes(image.bytes());
    println!(
        "  processor time meanwhile, of {:.2} s: the daemon {:.2} s, idle {:.2} s, the reader, the kernel and the registry the rest",
        taken * cores,
        cpu / turns,
        idle / turns
    );
    registry.take_asked();
    Ok(())
}

/// Mounts the image that the registry at `address` has.
pub(crate) fn mount(daemon: &Daemon, address: SocketAddr, options: &[&OsStr]) -> anyhow::Result<()> {
    let (reference, mnt) = (reference(address), daemon.mnt());
    let args = [OsStr::new(&reference), mnt.as_os_str(), OsStr::new("--backend"), OsStr::new("fanotify")];
    daemon.ask("mount", args.into_iter().chain(options.iter().copied()))?;
    Ok(())
}

/// Seconds that the processors of this host had nothing to do, all together, since it started; proc_stat(5).
fn idle_seconds() -> anyhow::Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let fields = stat.lines().next().unwrap_or_default().split_whitespace();
    let ticks: f64 = fields.skip(4).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("the system does not tell its ticks")?;
    #[expect(clippy::cast_precision_loss, reason = "a small number")]
    Ok(ticks / per_second as f64)
}

#[expect(clippy::cast_precision_loss, reason = "printed with few digits")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Decodes and checks every unit, from memory to memory.
fn decode(image: &Image) -> anyhow::Result<()> {
    let lots: Vec<(&Blob, &[Unit])> =
        image.blobs.iter().flat_map(|blob| blob.map.units().chunks(LOT).map(move |lot| (blob, lot))).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut out = Vec::new();
        while let Some((blob, lot)) = lots.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut decoder = Decoder::new();
            for unit in *lot {
                out.resize(usize::try_from(unit.blocks().len())?, 0);
                decoder.decode(blob.map.key(), unit, slice(&blob.stored, unit.stored), &mut out)?;
            }
        }
        anyhow::Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CORES).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })
}
