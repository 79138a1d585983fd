//! Random reads of every kind against the bytes that must be there, as `fsx` does with files that change.
//!
//! `RAFSD_READS=10000000 cargo test --test kernel -- --backend fuse-tree random_reads` is the long run. What is read
//! follows from a seed, which is printed; `RAFSD_SEED` has one again, up to the order in which threads run.

use std::fs::{self, File};
use std::io::{IoSliceMut, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::uio::preadv;
use rafsd::net::server::ServerOptions;
use rafsd::sys::mmap::ReadMap;

use super::fixture::{FILE, Fixture, content, drop_caches};
use crate::host::Need;
use crate::support::tree::Random;
use crate::{Backend, Case, Ctx, Outcome, Place};

pub(crate) const CASES: &[Case] = &[Case {
    name: "random_reads_of_every_kind_show_the_bytes",
    needs: &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend],
    place: Place::Both,
    run: random_reads_of_every_kind_show_the_bytes,
}];

/// Readers at a time: more than there are cores in most places where this runs.
const THREADS: u64 = 4;
/// Bytes of a chunk of the image.
const CHUNK: usize = 64 << 10;
const PAGE: usize = 4096;
/// A pipe holds 16 pages, and what does not start on one takes one more.
const PIPE: usize = 15 * PAGE;
/// How often caches are dropped in a run.
const DROPS: u64 = 8;

fn random_reads_of_every_kind_show_the_bytes(ctx: &Ctx) -> Outcome {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let reads = number("RAFSD_READS").unwrap_or(if ctx.in_guest { 1000 } else { 12_000 });
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed = number("RAFSD_SEED").unwrap_or_else(|| clock.as_secs() << 10 | u64::from(clock.subsec_millis()));
    eprintln!("{reads} reads, RAFSD_SEED={seed}");
    let oracle = contents();
    let chunk = format!("{}KiB", CHUNK >> 10);
    let fixture = Fixture::with(ctx, &["--chunk-size", &chunk], ServerOptions::default(), &[], |dir| {
        oracle.iter().enumerate().try_for_each(|(number, bytes)| fs::write(dir.join(number.to_string()), bytes))
    })?;
    let mount = fixture.mount("mnt")?;
    let files: Vec<Subject<'_>> = oracle
        .iter()
        .enumerate()
        .map(|(number, bytes)| Subject::open(ctx.backend, mount.join(number.to_string()), bytes))
        .collect::<anyhow::Result<_>>()?;
    let failed = AtomicBool::new(false);

    std::thread::scope(|scope| {
        let readers = (0..THREADS).map(|thread| {
            let (files, failed) = (&files, &failed);
            scope.spawn(move || {
                let read = || -> Outcome {
                    let mut reader = Reader::new(seed.wrapping_mul(THREADS).wrapping_add(thread))?;
                    let own = reads / THREADS;
                    for read in 0..own {
                        if failed.load(Ordering::Relaxed) {
                            break;
                        }
                        if thread == 0 && read % (own / DROPS).max(1) == 0 {
                            drop_caches()?;
                        }
                        reader.step(files).with_context(|| format!("read {read} of thread {thread}, seed {seed}"))?;
                    }
                    Ok(())
                };
                read().inspect_err(|_| failed.store(true, Ordering::Relaxed))
            })
        });
        let readers: Vec<_> = readers.collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))
    })?;

    drop(files);
    fixture.finish()
}

/// Lengths on both sides of every edge, bytes that cannot be shortened, text, and zeros.
fn contents() -> Vec<Vec<u8>> {
    let lens = [0, 1, 17, 511, PAGE - 1, PAGE, PAGE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 777, 5 * CHUNK, FILE];
    let mut all: Vec<_> = lens.into_iter().enumerate().map(|(number, len)| content(number, len)).collect();
    let text = (0..FILE / 16).flat_map(|line| format!("{line:>14} \n").into_bytes()).collect();
    let mut holes = vec![0; FILE];
    holes[CHUNK - 3..CHUNK + 3].copy_from_slice(b"island");
    all.extend([text, holes]);
    // Small ones, which share stored pieces.
    all.extend((0..64).map(|number| content(1000 + number, 100 + 37 * number)));
    all
}

/// A file and what is in it.
struct Subject<'a> {
    path: PathBuf,
    file: File,
    /// Opened with `O_DIRECT`, where the kernel allows it.
    direct: Option<File>,
    bytes: &'a [u8],
}

impl<'a> Subject<'a> {
    fn open(backend: Backend, path: PathBuf, bytes: &'a [u8]) -> anyhow::Result<Self> {
        let direct = match File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(&path) {
            // EROFS over files has none (seen on 6.12 and 6.18).
            Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) && backend != Backend::FuseTree => None,
            opened => Some(opened.context("open with O_DIRECT")?),
        };
        Ok(Self { file: File::open(&path)?, path, direct, bytes })
    }

    /// What a read of `len` bytes at `at` must give.
    fn part(&self, at: usize, len: usize) -> &'a [u8] {
        let end = self.bytes.len();
        &self.bytes[at.min(end)..at.saturating_add(len).min(end)]
    }
}

/// One thread's choices and buffers.
struct Reader {
    random: Random,
    buffer: Vec<u8>,
    pipe: (std::io::PipeReader, std::io::PipeWriter),
}

impl Reader {
    fn new(seed: u64) -> anyhow::Result<Self> {
        Ok(Self { random: Random::new(seed), buffer: vec![0; 5 * CHUNK + PAGE], pipe: std::io::pipe()? })
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.random.below(end as u64)).expect("below a usize")
    }

    /// A position and a length: near an edge as often as anywhere.
    fn range(&mut self, size: usize) -> (usize, usize) {
        let unit = [PAGE, CHUNK, size.max(1)][self.below(3)];
        let edge = self.below(size / unit + 2) * unit;
        let at = match self.below(4) {
            0 => edge.min(size + PAGE),
            1 => edge.min(size + PAGE).saturating_sub(1 + self.below(64)),
            _ => self.below(size + 16),
        };
        let len = match self.below(8) {
            0 => 1 + self.below(16),
            1 => PAGE,
            2 => 2 * CHUNK + self.below(3 * CHUNK),
            3 | 4 => 1 + self.below(CHUNK),
            _ => 1 + self.below(2 * PAGE),
        };
        (at, len)
    }

    /// Reads something in some way and compares it.
    fn step(&mut self, files: &[Subject<'_>]) -> Outcome {
        type Way = fn(&mut Reader, &Subject<'_>, usize, usize) -> anyhow::Result<bool>;
        let ways: [(&str, Way); 6] = [
            ("pread", Self::pread),
            ("preadv", Self::preadv),
            ("mmap", Self::mmap),
            ("sendfile to a pipe", Self::sendfile),
            ("O_DIRECT", Self::direct),
            ("pread of a fresh descriptor", Self::reopened),
        ];
        let subject = &files[self.below(files.len())];
        if self.below(200) == 0 {
            posix_fadvise(&subject.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        let (at, len) = self.range(subject.bytes.len());
        // Half of them in the plainest way.
        let (name, way) = ways[self.below(2 * ways.len() - 1).saturating_sub(ways.len() - 1)];
        let told = || format!("{name} of {len} bytes at {at} of {}", subject.path.display());
        ensure!(way(self, subject, at, len).with_context(told)?, "{} shows other bytes", told());
        Ok(())
    }

    fn pread(&mut self, subject: &Subject<'_>, at: usize, len: usize) -> anyhow::Result<bool> {
        let got = subject.file.read_at(&mut self.buffer[..len], at as u64)?;
        Ok(self.buffer[..got] == *subject.part(at, len))
    }

    fn reopened(&mut self, subject: &Subject<'_>, at: usize, len: usize) -> anyhow::Result<bool> {
        let got = File::open(&subject.path)?.read_at(&mut self.buffer[..len], at as u64)?;
        Ok(self.buffer[..got] == *subject.part(at, len))
    }

    fn preadv(&mut self, subject: &Subject<'_>, at: usize, len: usize) -> anyhow::Result<bool> {
        let (first, second) = (self.below(len + 1), self.below(len + 1));
        let (low, high) = (first.min(second), first.max(second));
        let (head, tail) = self.buffer[..len].split_at_mut(low);
        let (middle, tail) = tail.split_at_mut(high - low);
        let mut pieces = [head, middle, tail].map(IoSliceMut::new);
        let got = preadv(&subject.file, &mut pieces, i64::try_from(at)?)?;
        Ok(self.buffer[..got] == *subject.part(at, len))
    }

    fn mmap(&mut self, subject: &Subject<'_>, at: usize, len: usize) -> anyhow::Result<bool> {
        // ReadMap asks for a file that never shrinks; nothing in a read-only mount does.
        let map = ReadMap::new(&subject.file)?;
        let end = at.saturating_add(len).min(map.len());
        Ok(map.len() == subject.bytes.len() && map[at.min(end)..end] == *subject.part(at, len))
    }

    /// The kernel moves pages from file to pipe, as `splice` does.
    fn sendfile(&mut self, subject: &Subject<'_>, at: usize, len: usize) -> anyhow::Result<bool> {
        let want = subject.part(at, len.min(PIPE));
        let (reader, writer) = &mut self.pipe;
        let (mut offset, mut sent) = (at as u64, 0);
        while sent < want.len() {
            let more =
                rustix::fs::sendfile(writer.as_fd(), subject.file.as_fd(), Some(&mut offset), want.len() - sent)?;
            ensure!(more > 0, "it ends after {sent} of {} bytes", want.len());
            reader.read_exact(&mut self.buffer[sent..sent + more])?;
            sent += more;
        }
        Ok(self.buffer[..sent] == *want)
    }

    fn direct(&mut self, subject: &Subject<'_>, at: usize, len: usize) -> anyhow::Result<bool> {
        let Some(file) = &subject.direct else { return self.pread(subject, at, len) };
        let (at, len) = (at / PAGE * PAGE, len.div_ceil(PAGE).min(5 * CHUNK / PAGE) * PAGE);
        let skip = self.buffer.as_ptr().align_offset(PAGE);
        let aligned = &mut self.buffer[skip..skip + len];
        let got = file.read_at(aligned, at as u64)?;
        Ok(aligned[..got] == *subject.part(at, len))
    }
}
