//! The longest file over a slow line, read from its beginning to its end with nothing fetched beforehand.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rafsd::base::ByteSize;

use super::daemon::Daemon;
use super::image::{Image, Piece};
use super::line::{BANDWIDTH, Line, Shape};
use super::measure::drop_caches;
use super::middle;
use super::peer::Nydusd;
use super::registry::Registry;
use super::throughput::mount;

const SHAPE: Shape = Shape { round_trip: Duration::from_millis(20), bytes_per_second: BANDWIDTH };

pub(crate) fn measure(
    image: &Image,
    registry: &Registry,
    scratch: &Path,
    turns: usize,
    nydusd: Option<&Path>,
) -> anyhow::Result<()> {
    let (path, len) = image.files.iter().max_by_key(|(_, len)| *len).context("an image without files")?;
    let stored = image.needed(&[Piece { path: path.clone(), at: 0, len: *len }])?;
    #[expect(clippy::cast_precision_loss, reason = "printed with few digits")]
    let least = stored as f64 / SHAPE.bytes_per_second;
    println!(
        "the longest file, {}, read through over 20 ms and 200 Mbit/s, where its {} stored take {least:.3} s:",
        ByteSize(*len),
        ByteSize(stored)
    );
    let dir = scratch.join("longest");
    let line = Line::to(registry.address, SHAPE)?;
    let time = |walk: &Walk| walk.all.as_secs_f64();
    let ours = || {
        let daemon = Daemon::start(&dir)?;
        mount(&daemon, line.address, &[])?;
        Walk::through(&daemon.mnt().join(path), *len)
    };
    print("rafsd", &middle(turns, time, ours)?, least);
    if let Some(program) = nydusd {
        let theirs = || {
            let nydusd = Nydusd::mount(program, &dir, line.address, &image.bootstrap, &[])?;
            Walk::through(&nydusd.mnt().join(path), *len)
        };
        print("nydusd", &middle(turns, time, theirs)?, least);
    }
    registry.take_asked();
    registry.take_sent();
    Ok(())
}

/// How one reading went.
#[derive(Clone, Copy, Debug)]
struct Walk {
    all: Duration,
    /// The longest of its reads of 128 KiB.
    longest: Duration,
}

impl Walk {
    fn through(path: &Path, len: u64) -> anyhow::Result<Self> {
        drop_caches()?;
        let (begun, mut last, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
        let (mut file, mut buffer, mut sum) = (File::open(path)?, [0; 128 << 10], 0);
        loop {
            let got = file.read(&mut buffer)?;
            longest = longest.max(last.elapsed());
            last = Instant::now();
            sum += got as u64;
            if got == 0 {
                break;
            }
        }
        ensure!(sum == len, "{} has {sum} bytes instead of {len}", path.display());
        Ok(Self { all: begun.elapsed(), longest })
    }
}

fn print(name: &str, walk: &Walk, least: f64) {
    let all = walk.all.as_secs_f64();
    println!("  {name:<8} {all:.3} s, {:.2} times that; longest wait {} ms", all / least, walk.longest.as_millis());
}
