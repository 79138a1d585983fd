//! Reading through the daemon beside a native mount of the same image.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use rafsd::net::server::{BlobServer, ServerOptions};

use super::corpus::{Corpus, read_block, read_through, walk};
use super::daemon::Daemon;
use super::measure::{Turned, drop_caches, seconds, seconds_each};
use super::native::Native;
use super::report::{Report, Target};
use super::{Interrupted, Turns};

/// Random reads with data on the disk or in memory, and of data that is on the server.
const READS: usize = 2000;
const COLD_READS: usize = 200;

/// A way to read an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Sequential,
    Random { reads: usize },
    Walk,
}

/// Where the bytes are before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// On the disk, or further away.
    PageCold,
    /// In the page cache.
    Hot,
}

const WORKS: [Work; 3] = [Work::Sequential, Work::Random { reads: READS }, Work::Walk];

/// What one pass needs to know.
struct Bench<'a> {
    corpus: &'a Corpus,
    /// Names below the root.
    entries: u64,
    /// Where random reads read: numbers of files, and offsets.
    positions: Vec<(usize, u64)>,
    turns: Turns,
    interrupted: &'a Interrupted,
}

/// Measures reading of the image in the directory `image`.
pub(crate) fn measure(
    corpus: &Corpus,
    image: &Path,
    scratch: &Path,
    turns: Turns,
    delay: Duration,
    interrupted: &Interrupted,
    report: &mut Report,
) -> anyhow::Result<()> {
    let bench = Bench { corpus, entries: walk(&corpus.dir)?, positions: corpus.positions(READS), turns, interrupted };
    let server = BlobServer::start(image.join("blobs"), ServerOptions { delay, ..ServerOptions::default() })
        .context("cannot start the HTTP server")?;
    let native = Native::mount(image, &scratch.join("native"))?;
    corpus.compare(native.mnt()).context("the native mount")?;
    bench.complete(&native, image, &server, &scratch.join("complete"), report)?;
    bench.cold(&native, image, &server, &scratch.join("cold"), report)
}

impl Bench<'_> {
    /// Everything is in the cache: the kernel should read it as if there were no daemon.
    fn complete(
        &self,
        native: &Native,
        image: &Path,
        server: &BlobServer,
        dir: &Path,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let daemon = Daemon::mount(dir, image, &server.url(), true)?;
        daemon.await_complete()?;
        let mnt = daemon.mnt();
        self.corpus.compare(&mnt).context("the complete mount")?;
        let (cpu, mut wall) = (daemon.cpu_seconds()?, 0.0);
        for state in [State::PageCold, State::Hot] {
            for work in WORKS {
                let take = |root| self.timed(work, state, root);
                let turned = Turned::take(self.turns_of(work), || take(&mnt), || take(native.mnt()))?;
                wall += turned.ours_total();
                let name = format!("{}, {}", if state == State::Hot { "hot" } else { "page-cold" }, work.name());
                let target = if work == Work::Walk { Target::Same(0.03) } else { Target::Ratio(0.97) };
                report.compare(name, self.rates(work, &turned), turned.ratio(), target);
            }
        }
        let share = (daemon.cpu_seconds()? - cpu) / wall;
        report.value("the same, daemon's processor time", share * 100.0, "%", Target::AtMost(1.0));
        Ok(())
    }

    /// Nothing is in the cache: beside the native mount with its data on the disk.
    fn cold(
        &self,
        native: &Native,
        image: &Path,
        server: &BlobServer,
        dir: &Path,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        for work in [Work::Sequential, Work::Random { reads: COLD_READS }, Work::Walk] {
            let ours = || {
                let daemon = Daemon::mount(dir, image, &server.url(), false)?;
                drop_caches()?;
                // The disk of the server is not what is measured.
                for blob in fs::read_dir(image.join("blobs"))? {
                    fs::read(blob?.path())?;
                }
                let open = self.open(work, &daemon.mnt())?;
                let taken = seconds(|| self.pass(work, &daemon.mnt(), &open))?;
                drop(open);
                if work == Work::Sequential {
                    self.corpus.compare(&daemon.mnt()).context("the cold mount")?;
                }
                Ok(taken)
            };
            let turned = Turned::take(self.turns.cold, ours, || self.timed(work, State::PageCold, native.mnt()))?;
            let target = match work {
                Work::Sequential => Target::AtLeast(250.0),
                Work::Random { .. } => Target::None,
                Work::Walk => Target::Same(0.03),
            };
            let name = format!("cold over HTTP, {}", work.name());
            report.compare(name, self.rates(work, &turned), turned.ratio(), target);
        }
        Ok(())
    }

    /// What takes little time is done more often, because the disk's share in it varies more.
    fn turns_of(&self, work: Work) -> usize {
        if work == Work::Sequential { self.turns.read } else { 3 * self.turns.read }
    }

    /// Seconds of one pass over `root`, after bringing the page cache into `state`.
    fn timed(&self, work: Work, state: State, root: &Path) -> anyhow::Result<f64> {
        let open = self.open(work, root)?;
        // Before hot reads too: how fast pages are read depends a little on where in memory they
        // happen to lie, and each turn is to get other ones.
        drop_caches()?;
        if state == State::PageCold {
            return seconds(|| self.pass(work, root, &open));
        }
        self.pass(work, root, &open)?;
        seconds_each(self.turns.hot, || self.pass(work, root, &open))
    }

    /// The files of random reads, opened beforehand: opening is what the walk measures.
    fn open(&self, work: Work, root: &Path) -> anyhow::Result<Vec<File>> {
        let files = match work {
            Work::Random { .. } => self.corpus.files.as_slice(),
            Work::Sequential | Work::Walk => &[],
        };
        Ok(files.iter().map(|(path, _)| File::open(root.join(path))).collect::<Result<_, _>>()?)
    }

    fn pass(&self, work: Work, root: &Path, open: &[File]) -> anyhow::Result<()> {
        self.interrupted.check()?;
        match work {
            Work::Sequential => {
                let mut buffer = [0; 128 << 10];
                for (path, len) in &self.corpus.files {
                    let got = read_through(&root.join(path), &mut buffer)?;
                    ensure!(got == *len, "{} has {got} bytes instead of {len}", path.display());
                    self.interrupted.check()?;
                }
            }
            Work::Random { reads } => {
                for &(file, at) in &self.positions[..reads] {
                    read_block(&open[file], at)?;
                }
            }
            Work::Walk => {
                let got = walk(root)?;
                ensure!(got == self.entries, "{got} names instead of {}", self.entries);
            }
        }
        Ok(())
    }

    #[expect(clippy::cast_precision_loss, reason = "printed with few digits")]
    fn rates(&self, work: Work, turned: &Turned) -> (f64, f64, &'static str) {
        let (amount, unit) = match work {
            Work::Sequential => (self.corpus.bytes as f64 / 1e6, "MB/s"),
            Work::Random { reads } => (reads as f64, "reads/s"),
            Work::Walk => (self.entries as f64 / 1e3, "k names/s"),
        };
        (amount / turned.ours(), amount / turned.other(), unit)
    }
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Sequential => "128 KiB sequential",
            Self::Random { .. } => "4 KiB random",
            Self::Walk => "find -ls",
        }
    }
}
