//! Reading over FUSE: the tree beside nydusd, and with requests over io_uring beside the usual ones; devices beside a
//! native mount.
//!
//! Everything is in both caches before, so that no source is measured.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, ensure};
use rafsd::export::fuse::Transport;

use super::corpus::{Corpus, read_through, walk};
use super::daemon::Daemon;
use super::measure::{Turned, cpu_seconds, drop_caches, memory, seconds, seconds_each};
use super::native::Native;
use super::nydusd::Nydusd;
use super::report::{Report, Target};
use super::{Interrupted, Turns};

/// Random reads of one pass.
const READS: usize = 2000;
const PAGE: usize = 4096;

/// How many times as fast as nydusd this should be.
const AIM: f64 = 1.3;

/// A way to read an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Everything { readers: usize },
    Random { readers: usize, direct: bool },
    Walk,
}

const WORKS: [Work; 7] = [
    Work::Everything { readers: 1 },
    Work::Everything { readers: 4 },
    Work::Random { readers: 1, direct: false },
    Work::Random { readers: 4, direct: false },
    Work::Random { readers: 1, direct: true },
    Work::Random { readers: 4, direct: true },
    Work::Walk,
];

/// Where the kernel is told whether to offer requests over io_uring.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// Has the kernel offer them to who mounts while this lives.
struct Switch(String);

impl Switch {
    fn on() -> Option<Self> {
        let was = std::fs::read_to_string(SWITCH).ok()?;
        std::fs::write(SWITCH, "Y").ok()?;
        Some(Self(was))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = std::fs::write(SWITCH, self.0.trim());
    }
}

struct Bench<'a> {
    corpus: &'a Corpus,
    entries: u64,
    positions: Vec<(usize, u64)>,
    turns: Turns,
    interrupted: &'a Interrupted,
}

/// Measures the image in the directory `image`, the tree only if there is a nydusd to compare it with.
pub(crate) fn measure(
    corpus: &Corpus,
    image: &Path,
    scratch: &Path,
    turns: Turns,
    nydusd: Option<&Path>,
    interrupted: &Interrupted,
    report: &mut Report,
) -> anyhow::Result<()> {
    let bench = Bench { corpus, entries: walk(&corpus.dir)?, positions: corpus.positions(READS), turns, interrupted };
    let blobs = image.join("blobs");
    let blobs = blobs.to_str().context("the scratch directory has a strange name")?;
    let daemon = Daemon::mount_by("fuse-tree", &scratch.join("fuse"), image, blobs, true)?;
    daemon.await_complete()?;
    if let Some(program) = nydusd {
        let other = Nydusd::mount(program, &scratch.join("nydusd"), image)?;
        bench.tree(&daemon, &other, report)?;
    }
    bench.transports(&daemon, image, (blobs, &scratch.join("fuse-uring")), report)?;
    let native = Native::mount(image, &scratch.join("native-beside-fuse"))?;
    let devices = daemon.mount_again(image, blobs, "fuse-device")?;
    bench.devices(&devices, &native, report)
}

impl Bench<'_> {
    fn tree(&self, daemon: &Daemon, other: &Nydusd, report: &mut Report) -> anyhow::Result<()> {
        let mnt = daemon.mnt();
        self.corpus.compare(&mnt).context("the mount by fuse-tree")?;
        self.corpus.compare(other.mnt()).context("the mount by nydusd")?;
        let cpu = |processes: &[u32]| processes.iter().map(|pid| cpu_seconds(*pid)).sum::<anyhow::Result<f64>>();
        let (ours, theirs) = (daemon.processes(), other.processes());
        let before = (cpu(&ours)?, cpu(&theirs)?);
        for is_hot in [false, true] {
            for work in WORKS {
                self.row("fuse-tree", work, is_hot, &mnt, other.mnt(), Target::Ratio(AIM), report)?;
            }
        }
        let (ours_s, theirs_s) = (cpu(&ours)? - before.0, cpu(&theirs)? - before.1);
        let share = Turned::of(vec![ours_s], vec![theirs_s]).ratio();
        report.compare("fuse-tree, processor time of the rows above", (ours_s, theirs_s, "s"), share, Target::None);
        for (field, name) in [("Pss", "memory"), ("VmHWM", "most memory, by each process")] {
            let all = |processes: &[u32]| processes.iter().map(|pid| memory(*pid, field)).sum::<anyhow::Result<f64>>();
            let (ours, theirs) = (all(&ours)?, all(&theirs)?);
            let ratio = Turned::of(vec![ours], vec![theirs]).ratio();
            report.compare(format!("fuse-tree, {name}, keepers too"), (ours, theirs, "MiB"), ratio, Target::Ratio(1.0));
        }
        Ok(())
    }

    /// Requests over io_uring beside those of `daemon` by `/dev/fuse`, where the kernel can be told to offer them.
    fn transports(
        &self,
        daemon: &Daemon,
        image: &Path,
        (blobs, dir): (&str, &Path),
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let Some(switch) = Switch::on() else {
            eprintln!("bench: no rows of FUSE over io_uring: {SWITCH} cannot be written");
            return Ok(());
        };
        let ring = Daemon::start_with(dir, &["--fuse-transport", "io-uring"])?;
        ring.mount_here("fuse-tree", image, blobs, true)?;
        drop(switch);
        ring.await_complete()?;
        let used = ring.images()?.into_iter().find_map(|image| image.transport);
        ensure!(used.as_ref().is_some_and(|it| it.used == Transport::IoUring), "requests come another way: {used:?}");
        self.corpus.compare(&ring.mnt()).context("the mount over io_uring")?;
        for work in WORKS {
            let name = "fuse-tree, io-uring beside dev";
            self.row(name, work, false, &ring.mnt(), &daemon.mnt(), Target::None, report)?;
        }
        Ok(())
    }

    /// Devices whose data was complete when they were mounted.
    fn devices(&self, mnt: &Path, native: &Native, report: &mut Report) -> anyhow::Result<()> {
        self.corpus.compare(mnt).context("the mount by fuse-device")?;
        for is_hot in [false, true] {
            for work in WORKS.into_iter().filter(|work| !matches!(work, Work::Random { direct: true, .. })) {
                let target = if work == Work::Walk { Target::Same(0.03) } else { Target::Ratio(0.97) };
                self.row("fuse-device complete", work, is_hot, mnt, native.mnt(), target, report)?;
            }
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "what a row says")]
    fn row(
        &self,
        name: &str,
        work: Work,
        is_hot: bool,
        ours: &Path,
        other: &Path,
        target: Target,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let take = |root| self.timed(work, is_hot, root);
        let turned = Turned::take(self.turns.read, || take(ours), || take(other))?;
        let name = format!("{name}, {}, {}", if is_hot { "hot" } else { "page-cold" }, work.name());
        report.compare(name, self.rates(work, &turned), turned.ratio(), target);
        Ok(())
    }

    /// Seconds of one pass.
    fn timed(&self, work: Work, is_hot: bool, root: &Path) -> anyhow::Result<f64> {
        drop_caches()?;
        if !is_hot {
            return seconds(|| self.pass(work, root));
        }
        self.pass(work, root)?;
        seconds_each(self.turns.hot, || self.pass(work, root))
    }

    fn pass(&self, work: Work, root: &Path) -> anyhow::Result<()> {
        self.interrupted.check()?;
        match work {
            Work::Everything { readers } => shared(readers, |reader| {
                let mut buffer = [0; 128 << 10];
                for (path, len) in self.corpus.files.iter().skip(reader).step_by(readers) {
                    let got = read_through(&root.join(path), &mut buffer)?;
                    ensure!(got == *len, "{} has {got} bytes instead of {len}", path.display());
                }
                Ok(())
            }),
            Work::Random { readers, direct } => shared(readers, |reader| {
                let flags = if direct { nix::libc::O_DIRECT } else { 0 };
                let mut buffer = vec![0; 2 * PAGE];
                let skip = buffer.as_ptr().align_offset(PAGE);
                let page = &mut buffer[skip..skip + PAGE];
                for (file, at) in self.positions.iter().skip(reader).step_by(readers) {
                    let path = root.join(&self.corpus.files[*file].0);
                    let file = File::options().read(true).custom_flags(flags).open(path)?;
                    ensure!(file.read_at(page, *at)? > 0, "nothing at {at}");
                }
                Ok(())
            }),
            Work::Walk => {
                let got = walk(root)?;
                ensure!(got == self.entries, "{got} names instead of {}", self.entries);
                Ok(())
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "printed with few digits")]
    fn rates(&self, work: Work, turned: &Turned) -> (f64, f64, &'static str) {
        let (amount, unit) = match work {
            Work::Everything { .. } => (self.corpus.bytes as f64 / 1e6, "MB/s"),
            Work::Random { .. } => (READS as f64, "reads/s"),
            Work::Walk => (self.entries as f64 / 1e3, "k names/s"),
        };
        (amount / turned.ours(), amount / turned.other(), unit)
    }
}

/// Runs `work` in as many threads, each of which knows its number.
fn shared(readers: usize, work: impl Fn(usize) -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
    if readers == 1 {
        return work(0);
    }
    std::thread::scope(|scope| {
        let work = &work;
        let all: Vec<_> = (0..readers).map(|reader| scope.spawn(move || work(reader))).collect();
        all.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))
    })
}

impl Work {
    fn name(self) -> String {
        let by = |readers: usize| if readers == 1 { "1 reader".to_owned() } else { format!("{readers} readers") };
        match self {
            Self::Everything { readers } => format!("everything in 128 KiB, {}", by(readers)),
            Self::Random { readers, direct: true } => format!("open and 4 KiB O_DIRECT, {}", by(readers)),
            Self::Random { readers, direct: false } => format!("open and 4 KiB random, {}", by(readers)),
            Self::Walk => "find -ls".to_owned(),
        }
    }
}
