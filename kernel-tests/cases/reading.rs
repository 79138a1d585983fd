//! Every way to read a file shows its bytes.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;

use anyhow::{Context as _, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::fixture::{FILE, Fixture, content, drop_caches};
use crate::host::Need;
use crate::support::{listing, tree};
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn both(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place: Place::Both, run }
}

pub(crate) const CASES: &[Case] = &[
    both("whole_tree_equals_its_source", whole_tree_equals_its_source),
    both("every_way_to_read_shows_the_bytes", every_way_to_read_shows_the_bytes),
    both("a_program_runs_from_the_mount", a_program_runs_from_the_mount),
    both("thirty_two_readers_fetch_each_unit_once", thirty_two_readers_fetch_each_unit_once),
    both("reads_at_and_beyond_the_end_are_short", reads_at_and_beyond_the_end_are_short),
    both("a_small_read_fetches_a_small_part", a_small_read_fetches_a_small_part),
];

fn whole_tree_equals_its_source(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::new(ctx, |dir| tree::make(dir, 7))?;
    let mount = fixture.mount("mnt")?;

    let (want, got) = (listing::of(&fixture.source())?, listing::of(&mount)?);

    ensure!(want.len() > 500, "the source has only {} entries", want.len());
    let differences = listing::diff(&want, &got);
    ensure!(differences.is_empty(), "- source, + mount:\n{differences}");
    fixture.ensure_fetched_once()?;
    fixture.finish()
}

fn every_way_to_read_shows_the_bytes(ctx: &Ctx) -> Outcome {
    type Way = fn(&Path) -> anyhow::Result<Vec<u8>>;
    let ways: &[(&str, Way)] = &[
        ("read", |path| Ok(fs::read(path)?)),
        ("mmap", by_mmap),
        ("readahead", by_readahead),
        ("sendfile", by_sendfile),
        ("copy_file_range", by_copy_file_range),
        ("backwards", backwards),
    ];
    let fixture = Fixture::files(ctx, ways.len() + 1)?;
    let mount = fixture.mount("mnt")?;

    for (number, (name, way)) in ways.iter().enumerate() {
        let got = way(&mount.join(number.to_string())).with_context(|| (*name).to_owned())?;
        ensure!(got == content(number, FILE), "{name} shows other bytes");
    }
    direct(ctx.backend, &mount.join(ways.len().to_string()), &content(ways.len(), FILE))?;
    fixture.finish()
}

fn by_mmap(path: &Path) -> anyhow::Result<Vec<u8>> {
    // ReadMap asks for a file that never shrinks; nothing in an EROFS mount does.
    Ok(rafsd::sys::mmap::ReadMap::new(&File::open(path)?)?.to_vec())
}

fn by_readahead(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    posix_fadvise(&file, 0, FILE as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
    let mut out = Vec::new();
    file.read_to_end(&mut out)?;
    Ok(out)
}

fn by_sendfile(path: &Path) -> anyhow::Result<Vec<u8>> {
    let file = File::open(path)?;
    let (left, mut right) = std::os::unix::net::UnixStream::pair()?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut out = Vec::new();
            right.read_to_end(&mut out).map(|_| out)
        });
        let mut sent = 0;
        while sent < FILE {
            sent += rustix::fs::sendfile(left.as_fd(), file.as_fd(), None, FILE - sent)?;
        }
        drop(left);
        Ok(receiver.join().expect("the receiver does not panic")?)
    })
}

fn by_copy_file_range(path: &Path) -> anyhow::Result<Vec<u8>> {
    let (file, mut copy) = (File::open(path)?, tempfile::tempfile_in("/var/tmp").or_else(|_| tempfile::tempfile())?);
    let mut copied = 0;
    while copied < FILE {
        match rustix::fs::copy_file_range(&file, None, &copy, None, FILE - copied) {
            Ok(0) => break,
            Ok(len) => copied += len,
            // Between these two file systems the kernel may refuse; then its fallback is a copy.
            Err(rustix::io::Errno::XDEV | rustix::io::Errno::INVAL) => {
                std::io::copy(&mut &file, &mut copy)?;
                break;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    copy.rewind()?;
    let mut out = Vec::new();
    copy.read_to_end(&mut out)?;
    Ok(out)
}

fn backwards(path: &Path) -> anyhow::Result<Vec<u8>> {
    let (file, mut out) = (File::open(path)?, vec![0; FILE]);
    for at in (0..FILE).step_by(40_000).rev() {
        let end = FILE.min(at + 40_000);
        file.read_exact_at(&mut out[at..end], at as u64)?;
    }
    Ok(out)
}

/// The kernel refuses `O_DIRECT` on both kinds of mount (seen on 6.12 and 6.18); where it allows it,
/// the bytes must be right.
fn direct(backend: Backend, path: &Path, want: &[u8]) -> Outcome {
    let opened = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(path);
    let file = match opened {
        Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) && backend != Backend::FuseTree => return Ok(()),
        other => other.context("open with O_DIRECT")?,
    };
    let mut buffer = vec![0; (1 << 20) + 4096];
    let skip = buffer.as_ptr().align_offset(4096);
    let aligned = &mut buffer[skip..skip + (1 << 20)];
    let len = file.read_at(aligned, 1 << 20).context("read with O_DIRECT")?;
    ensure!(len > 0 && aligned[..len] == want[1 << 20..(1 << 20) + len], "O_DIRECT shows other bytes");
    Ok(())
}

fn a_program_runs_from_the_mount(ctx: &Ctx) -> Outcome {
    let shell = fs::canonicalize("/bin/sh")?;
    let fixture = Fixture::new(ctx, |dir| fs::copy(&shell, dir.join("sh")).map(drop))?;
    let mount = fixture.mount("mnt")?;

    let output = Command::new(mount.join("sh")).args(["-c", "echo $((6 * 7))"]).output()?;

    ensure!(output.status.success() && output.stdout == b"42\n", "{output:?}");
    fixture.finish()
}

fn thirty_two_readers_fetch_each_unit_once(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let path = fixture.mount("mnt")?.join("0");
    let (want, barrier) = (content(0, FILE), Barrier::new(32));

    std::thread::scope(|scope| {
        let read = || {
            barrier.wait();
            fs::read(&path)
        };
        let readers: Vec<_> = (0..32).map(|_| scope.spawn(read)).collect();
        for reader in readers {
            let got = reader.join().expect("a reader does not panic")?;
            ensure!(got == want, "a reader saw other bytes");
        }
        Ok(())
    })?;

    fixture.ensure_fetched_once()?;
    fixture.finish()
}

fn reads_at_and_beyond_the_end_are_short(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::new(ctx, |dir| fs::write(dir.join("f"), content(1, 5000)))?;
    let file = File::open(fixture.mount("mnt")?.join("f"))?;
    let mut buffer = [0xff; 4096];

    ensure!(file.read_at(&mut buffer, 5000)? == 0, "at the end");
    ensure!(file.read_at(&mut buffer, 1 << 40)? == 0, "far beyond");
    ensure!(file.read_at(&mut buffer, 4096)? == 904, "across the end");
    ensure!(buffer[..904] == content(1, 5000)[4096..], "the last bytes differ");
    ensure!(buffer[904..].iter().all(|&b| b == 0xff), "bytes beyond the end were touched");
    drop(file);
    fixture.finish()
}

fn a_small_read_fetches_a_small_part(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 6)?;
    let mount = fixture.mount("mnt")?;
    fixture.server.reset_stats();

    let mut byte = [0];
    File::open(mount.join("3"))?.read_exact_at(&mut byte, 100)?;

    ensure!(byte[0] == content(3, FILE)[100], "another byte");
    let fetched: u64 = fixture.fetched().iter().map(|(range, _)| range.len()).sum();
    ensure!((1..=2 << 20).contains(&fetched), "{fetched} bytes fetched for one");
    drop_caches()?;
    fixture.finish()
}
