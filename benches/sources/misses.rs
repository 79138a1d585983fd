//! Single cold reads of 4 KiB, with nobody else there.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rafsd::blob::Unit;

use super::daemon::Daemon;
use super::image::{Blob, Image, slice};
use super::measure::{Rng, drop_caches};
use super::registry::Registry;
use super::throughput::mount;
use super::verdict;

/// Between two reads everything comes to rest.
const PAUSE: Duration = Duration::from_millis(10);

/// Chunks from here on count as large.
const LARGE: u64 = 512 << 10;

pub(crate) fn measure(
    image: &Image,
    registry: &Registry,
    scratch: &Path,
    reads: usize,
    seed: u64,
) -> anyhow::Result<()> {
    let daemon = Daemon::start(&scratch.join("misses"))?;
    mount(&daemon, registry.address, &[])?;
    drop_caches()?;
    let (mut rng, mut known, mut taken) = (Rng::new(seed), HashSet::new(), Vec::new());
    let blocks: Vec<u64> = image
        .files
        .iter()
        .scan(0, |sum, (_, len)| {
            *sum += len.div_ceil(4096);
            Some(*sum)
        })
        .collect();
    let all = blocks.last().copied().unwrap_or(0);
    for _ in 0..20 * reads {
        if taken.len() == reads {
            break;
        }
        let block = rng.below(all);
        let file = blocks.partition_point(|&end| end <= block);
        let at = (block - file.checked_sub(1).map_or(0, |before| blocks[before])) * 4096;
        let (path, _) = &image.files[file];
        // Only the first read of a stored range is a miss.
        let Some((blob, unit)) = image.unit(path, at)?.filter(|(blob, unit)| known.insert((*blob, unit.stored))) else {
            continue;
        };
        let open = File::open(daemon.mnt().join(path))?;
        posix_fadvise(&open, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        std::thread::sleep(PAUSE);
        let clock = Instant::now();
        open.read_at(&mut [0; 4096], at)?;
        let took = clock.elapsed();
        taken.push(Taken { chunk: unit.decoded.len(), miss: took, decode: decode(&image.blobs[blob], &unit)? });
    }
    println!("lone cold reads of 4 KiB, {} requests for {}:", registry.take_asked().len(), taken.len());
    print("all", &taken, true);
    let (large, others): (Vec<_>, Vec<_>) = taken.into_iter().partition(|taken| taken.chunk >= LARGE);
    print("in large chunks", &large, false);
    print("in others", &others, false);
    Ok(())
}

/// One miss.
struct Taken {
    /// Plain bytes of the chunk.
    chunk: u64,
    miss: Duration,
    /// What of it nobody can save: all that the chunk is stored with has to be decoded and checked.
    decode: Duration,
}

/// How long it takes to decode and check a unit, in memory.
fn decode(blob: &Blob, unit: &Unit) -> anyhow::Result<Duration> {
    let mut out = vec![0; usize::try_from(unit.blocks().len())?];
    let clock = Instant::now();
    blob.map.decoder().decode(blob.map.key(), unit, slice(&blob.stored, unit.stored), &mut out)?;
    Ok(clock.elapsed())
}

fn print(name: &str, taken: &[Taken], has_target: bool) {
    let sorted = |time: fn(&Taken) -> Duration| {
        let mut times: Vec<_> = taken.iter().map(|taken| time(taken).as_secs_f64() * 1e3).collect();
        times.sort_by(f64::total_cmp);
        times
    };
    let Some(last) = taken.len().checked_sub(1) else { return };
    let (misses, decodes) = (sorted(|taken| taken.miss), sorted(|taken| taken.decode));
    let (p50, p99) = (misses[last / 2], misses[last * 99 / 100]);
    let verdicts = if has_target {
        format!("  {}, {}", verdict(p50 <= 1.0, "p50 <= 1 ms"), verdict(p99 <= 5.0, "p99 <= 5 ms"))
    } else {
        String::new()
    };
    println!(
        "  {name:<16} {:>4} reads  p50 {p50:.2} ms  p99 {p99:.2} ms; decoding alone p50 {:.2} ms  p99 {:.2} ms{verdicts}",
        taken.len(),
        decodes[last / 2],
        decodes[last * 99 / 100]
    );
}
